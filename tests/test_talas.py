"""talas.py against values worked out another way: by hand, by naive loops over the formula, by the library underneath."""

import json
import math
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT, SENTENCES, in_a_process, in_two_processes, small_bert
from transformers import AutoModel, AutoTokenizer

import cache_teacher
import talas
from cache_teacher import load_cache, make_cache, pool, save
from demo import tiny
from talas import ASAM, Settings

torch.manual_seed(0)


def rows(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def cos(u, v):
    """Cosine of two vectors, from the definition, in plain Python."""
    u, v = u.tolist(), v.tolist()
    dot = sum(a * b for a, b in zip(u, v))
    return dot / math.sqrt(sum(a * a for a in u)) / math.sqrt(sum(b * b for b in v))


# ------------------------------------------------------------------------------------------------- pooling


@pytest.mark.parametrize(
    "pooling, expected", [("cls", [1.0, 10.0]), ("mean", [2.0, 20.0]), ("last", [3.0, 30.0])]
)
@pytest.mark.parametrize("left", [0, 2])
@pytest.mark.parametrize("right", [0, 3])
def test_pooling_ignores_padding_on_either_side(pooling, expected, left, right):
    tokens = torch.tensor([[1.0, 10.0], [2.0, 20.0], [3.0, 30.0]])
    junk = lambda n: torch.full((n, 2), 777.0)
    hidden = torch.cat([junk(left), tokens, junk(right)])[None]
    mask = torch.tensor([[0] * left + [1] * 3 + [0] * right])
    assert pool(hidden, mask, pooling).tolist() == [expected]


def test_pooling_of_sentences_of_different_lengths():
    hidden = rows(3, 4, 5)
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [0, 1, 1, 1]])
    assert torch.equal(
        pool(hidden, mask, "cls"), torch.stack([hidden[0, 0], hidden[1, 0], hidden[2, 1]])
    )
    assert torch.equal(
        pool(hidden, mask, "last"), torch.stack([hidden[0, 3], hidden[1, 1], hidden[2, 3]])
    )
    mean = [hidden[0].mean(0), hidden[1, :2].mean(0), hidden[2, 1:].mean(0)]
    torch.testing.assert_close(pool(hidden, mask, "mean"), torch.stack(mean))


def test_pooling_rejects_an_unknown_name():
    with pytest.raises(ValueError, match="max"):
        pool(rows(1, 2, 3), torch.ones(1, 2), "max")


# ------------------------------------------------------------------------------------------------- Eqs. 3-7


def test_eq3_tamd_by_loops():
    layers, projections, teacher = (
        [rows(5, 4, seed=1), rows(5, 4, seed=2)],
        [rows(4, 3, seed=3), rows(4, 3, seed=4)],
        rows(5, 3, seed=5),
    )
    total = 0.0
    for e, W in zip(layers, projections):
        for i in range(5):
            projected = torch.tensor([sum(e[i, a] * W[a, b] for a in range(4)) for b in range(3)])
            total += (1 - cos(projected, teacher[i])) / 5
    assert talas.tamd_loss(layers, projections, teacher).item() == pytest.approx(
        total / 2, abs=1e-12
    )


def test_eq3_tamd_by_hand():
    e, W = torch.tensor([[1.0, 0.0], [0.0, 2.0]]), torch.eye(2)
    teacher = torch.tensor([[3.0, 0.0], [0.0, -1.0]])  # same direction: 0; opposite: 2
    assert talas.tamd_loss([e], [W], teacher).item() == pytest.approx(1.0)
    assert talas.tamd_loss([e, e], [W, -W], teacher).item() == pytest.approx(1.0)
    assert talas.tamd_loss(
        [e], [W], torch.tensor([[5.0, 5.0], [0.0, 1.0]])
    ).item() == pytest.approx((1 - 1 / math.sqrt(2)) / 2)


def test_eq3_tamd_needs_a_projection_a_layer():
    with pytest.raises(ValueError):
        talas.tamd_loss([rows(2, 3), rows(2, 3)], [rows(3, 3)], rows(2, 3))


def test_eq4_relation_matrix_holds_cosines():
    E = rows(4, 6)
    R = talas.relation_matrix(E)
    for i in range(4):
        for j in range(4):
            assert R[i, j].item() == pytest.approx(cos(E[i], E[j]), abs=1e-12)


def test_eq5_lasd_by_loops():
    layers = [rows(4, 3, seed=s) for s in range(5)]
    total = 0.0
    for lower, upper in zip(layers[:-1], layers[1:]):
        for i in range(4):
            for j in range(4):
                total += (cos(upper[i], upper[j]) - cos(lower[i], lower[j])) ** 2 / 4**2
    assert talas.lasd_loss(layers).item() == pytest.approx(total / 4, abs=1e-12)


def test_eq5_lasd_by_hand():
    parallel, orthogonal = (
        torch.tensor([[1.0, 0.0], [2.0, 0.0]]),
        torch.tensor([[1.0, 0.0], [0.0, 5.0]]),
    )
    assert talas.lasd_loss([parallel, orthogonal]).item() == pytest.approx(
        2 / 4
    )  # two of four cosines go from 1 to 0
    assert talas.lasd_loss([parallel, parallel, orthogonal]).item() == pytest.approx(
        (0 + 2 / 4) / 2
    )


@pytest.mark.parametrize("detach, upper_moves", [(False, True), (True, False)])
def test_eq5_lasd_guide(detach, upper_moves):
    lower, upper = rows(4, 3, seed=1).requires_grad_(), rows(4, 3, seed=2).requires_grad_()
    talas.lasd_loss([lower, upper], detach_guide=detach).backward()
    assert lower.grad.abs().sum() > 0
    assert (upper.grad is not None) == upper_moves


def test_eq6_simcse_by_loops():
    z, z_prime, tau = rows(4, 5, seed=1), rows(4, 5, seed=2), 0.07
    total = 0.0
    for i in range(4):
        scores = [math.exp(cos(z[i], z_prime[j]) / tau) for j in range(4)]
        total -= math.log(scores[i] / sum(scores)) / 4
    assert talas.simcse_loss(z, z_prime, tau).item() == pytest.approx(total, abs=1e-10)


def test_eq6_simcse_by_hand():
    z = torch.eye(2)
    tau = 0.5  # cosines 1 and 0: -log(e² / (e² + 1))
    assert talas.simcse_loss(z, 3 * z, tau).item() == pytest.approx(
        -math.log(math.exp(2) / (math.exp(2) + 1))
    )


@pytest.fixture
def batch(bert):
    """A small student in evaluation mode (no dropout), 4 tokenised sentences, projections and targets."""
    student, tokenizer = AutoModel.from_pretrained(bert).eval(), AutoTokenizer.from_pretrained(bert)
    tokens = tokenizer(
        ["The cook.", "A nurse paints the door.", "boat", "The rose in the harbour."],
        padding=True,
        return_tensors="pt",
    )
    return (
        student,
        [torch.randn(32, 6) for _ in range(2)],
        {k: tokens[k] for k in ("input_ids", "attention_mask")},
        torch.randn(4, 6),
    )


def test_eq6_simcse_is_finite_at_a_tiny_temperature():
    z = torch.eye(2)  # exp(1 / 0.001) is more than a float holds
    assert talas.simcse_loss(z, z, 0.001).item() == pytest.approx(0.0, abs=1e-6)
    assert talas.simcse_loss(z, z.flip(0), 0.001).item() == pytest.approx(1000.0, rel=1e-5)


def test_eq7_total_loss_is_the_weighted_sum_over_transformer_layers(batch):
    student, projections, tokens, teacher = batch
    s = Settings(lambda1=0.3, lambda2=0.5, lambda3=0.7, pooling="mean")
    loss, (simcse, tamd, lasd) = talas.total_loss(student, projections, [tokens], teacher, s)
    hidden = student(**tokens, output_hidden_states=True).hidden_states
    layers = [pool(h, tokens["attention_mask"], "mean") for h in hidden]
    assert len(layers) == 4  # the embedding layer and three Transformer layers
    torch.testing.assert_close(tamd, talas.tamd_loss(layers[2:], projections, teacher))
    torch.testing.assert_close(lasd, talas.lasd_loss(layers[1:]))
    torch.testing.assert_close(
        simcse, talas.simcse_loss(layers[3], layers[3], 0.07)
    )  # without dropout both views agree
    torch.testing.assert_close(loss, 0.3 * simcse + 0.5 * tamd + 0.7 * lasd)


@pytest.mark.parametrize("weights", [(1, 0, 0), (0, 1, 0), (0, 0, 1), (0, 1, 1)])
def test_eq7_a_weight_of_zero_skips_the_term(batch, weights):
    student, projections, tokens, teacher = batch
    seen = []
    student.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    s = Settings(lambda1=weights[0], lambda2=weights[1], lambda3=weights[2], pooling="cls")
    _, terms = talas.total_loss(student, projections, [tokens], teacher, s)
    assert [bool(term != 0) for term in terms] == [bool(w) for w in weights]
    assert seen == [8 if weights[0] else 4]  # a second view only where SimCSE needs it


def test_eq6_the_two_views_are_of_the_same_sentences_with_dropout_masks_of_their_own(
    batch, monkeypatch
):
    student, projections, tokens, teacher = batch
    views = []
    monkeypatch.setattr(
        talas, "simcse_loss", lambda z, z_prime, *rest: views.append((z, z_prime)) or z.sum()
    )
    for mode in (student.train, student.eval):
        mode()
        talas.total_loss(
            student, projections, [tokens], teacher, Settings(lambda1=1, pooling="cls")
        )
    (z, z_prime), (same, also) = views
    assert (z != z_prime).any(dim=1).all()  # every sentence has two masks
    torch.testing.assert_close(same, also)


def test_a_batch_in_pieces_gives_the_loss_of_the_whole(batch):
    student, projections, tokens, teacher = batch
    order = (
        tokens["attention_mask"].sum(1).argsort()
    )  # short sentences first, each piece cut to its longest
    pieces = []
    for part in order.split([1, 2, 1]):
        T = tokens["attention_mask"][part].sum(1).max()
        pieces.append({name: t[part, :T] for name, t in tokens.items()})
    s = Settings(lambda1=0.3, pooling="mean")
    loss, terms = talas.total_loss(student, projections, pieces, teacher[order], s)
    whole, same = talas.total_loss(student, projections, [tokens], teacher, s)
    torch.testing.assert_close(loss, whole)
    torch.testing.assert_close(terms, same)


def test_bfloat16_changes_matrix_products_alone_and_only_in_training(batch, monkeypatch):
    student, projections, tokens, teacher = batch
    monkeypatch.setattr(
        talas,
        "mixed_precision",
        lambda device, wanted: torch.autocast("cpu", torch.bfloat16, enabled=wanted),
    )
    for module in student.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    student.config.attention_probs_dropout_prob = 0.0
    s, kinds = Settings(pooling="mean"), []
    student.encoder.layer[0].output.dense.register_forward_hook(
        lambda module, args, out: kinds.append(out.dtype)
    )
    losses = []
    for mode in (student.eval, student.train):
        mode()
        losses.append(talas.total_loss(student, projections, [tokens], teacher, s)[0])
    assert kinds == [torch.float32, torch.bfloat16]
    assert losses[1].dtype == torch.float32 and losses[0] != losses[1]
    assert losses[1].item() == pytest.approx(losses[0].item(), rel=0.02)


def test_algorithm1_a_batch_holds_each_sentence_with_its_own_target_and_domain(
    tmp_path, bert, cache, monkeypatch
):
    """A batch is put in order of length: tokens, targets and domains must follow each other."""
    learnt, tokenizer = load_cache(cache), AutoTokenizer.from_pretrained(bert)
    target = {text: row for text, row in zip(learnt["sentences"], learnt["embeddings"])}
    domain = {
        text: ["a", "b"].index(source)
        for text, source in zip(learnt["sentences"], learnt["sources"])
    }
    seen, lengths = [], set()

    def check(student, projections, asam, pieces, teacher, domains, s):
        texts = []
        for tokens in pieces:
            assert (
                tokens["attention_mask"].sum(1).max() == tokens["input_ids"].shape[1]
            )  # no more padding than needed
            for ids, mask in zip(tokens["input_ids"], tokens["attention_mask"]):
                texts.append(ids[mask.bool()].tolist())
                lengths.add(len(texts[-1]))
        of_ids = {tuple(tokenizer(text)["input_ids"]): text for text in target}
        names = [of_ids[tuple(ids)] for ids in texts]
        seen.extend(names)
        torch.testing.assert_close(teacher, torch.stack([target[name] for name in names]))
        assert domains.tolist() == [domain[name] for name in names]
        asam.optimizer.step()
        return torch.zeros(5)

    monkeypatch.setattr(talas, "training_step", check)
    run(
        "--teacher",
        cache,
        "--student",
        bert,
        "--output",
        tmp_path / "out",
        "--epochs",
        1,
        "--batch_size",
        12,
    )
    assert sorted(seen) == sorted(target) and len(lengths) == 5  # an epoch sees every sentence once


# ------------------------------------------------------------------------------------------------- Eq. 2, ASAM


def quadratic(a, b):
    """L(a, b) = (a² + 4 b²) / 2, whose gradient is (a, 4 b)."""
    return (a**2 + 4 * b**2) / 2


@pytest.mark.parametrize(
    "adaptive, eta, rho, perturbed, final",
    [
        # w = (1, -2), ∇L = (1, -8). ASAM: T = (1, 2), T∇L = (1, -16), ε̂ = ρ (1, -32) / √257
        (True, 0.0, math.sqrt(257), (2.0, -34.0), (1 - 0.1 * 2, -2 + 0.1 * 136)),
        # η = 1: T = (2, 3), T∇L = (2, -24), ε̂ = ρ (4, -72) / √580
        (True, 1.0, math.sqrt(580), (5.0, -74.0), (1 - 0.1 * 5, -2 + 0.1 * 296)),
        # SAM: T = I, ε̂ = ρ (1, -8) / √65
        (False, 0.0, math.sqrt(65), (2.0, -10.0), (1 - 0.1 * 2, -2 + 0.1 * 40)),
    ],
)
def test_eq2_asam_two_steps_by_hand(adaptive, eta, rho, perturbed, final):
    a, b = torch.nn.Parameter(torch.tensor(1.0)), torch.nn.Parameter(torch.tensor(-2.0))
    asam = ASAM(torch.optim.SGD([a, b], lr=0.1), rho, eta, adaptive)
    quadratic(a, b).backward()
    asam.ascent_step()
    assert (a.item(), b.item()) == pytest.approx(perturbed, rel=1e-5)
    assert a.grad is None and b.grad is None
    quadratic(a, b).backward()
    asam.descent_step()
    assert (a.item(), b.item()) == pytest.approx(final, rel=1e-5)


def test_eq2_asam_climbs_within_its_radius():
    """‖T_w⁻¹ ε̂‖₂ = ρ, and no random ε of that size raises a linear loss more."""
    w = torch.nn.Parameter(rows(50))
    g, before = rows(50, seed=1), w.detach().clone()
    asam = ASAM(torch.optim.SGD([w], lr=0.1), rho=0.3)
    (w @ g).backward()
    asam.ascent_step()
    epsilon = (w - before).detach()
    assert (epsilon / before.abs()).norm().item() == pytest.approx(0.3)
    for seed in range(100):
        other = rows(50, seed=seed + 2)
        assert before.abs() * other / other.norm() * 0.3 @ g < epsilon @ g


def test_algorithm1_w_is_restored_exactly_and_the_step_starts_from_w():
    w, unused = torch.nn.Parameter(rows(20)), torch.nn.Parameter(rows(3, seed=1))
    late = torch.nn.Parameter(rows(20, seed=2))  # has a gradient in the second pass only
    before = [p.detach().clone() for p in (w, unused, late)]
    asam = ASAM(torch.optim.SGD([w, unused, late], lr=0.5), rho=2.0)
    (w**4).sum().backward()
    asam.ascent_step()
    assert (
        not torch.equal(w, before[0])
        and torch.equal(unused, before[1])
        and torch.equal(late, before[2])
    )
    tilde = w.detach().clone()
    (w**4).sum().backward()
    late.sum().backward()
    asam.descent_step()
    torch.testing.assert_close(w.detach(), before[0] - 0.5 * 4 * tilde**3)
    assert torch.equal(unused, before[1])
    torch.testing.assert_close(late.detach(), before[2] - 0.5)


def test_algorithm1_w_is_restored_whatever_happened_to_the_gradients():
    w = torch.nn.Parameter(rows(20))
    before = w.detach().clone()
    asam = ASAM(torch.optim.SGD([w], lr=0.1), rho=1.0)
    (w**2).sum().backward()
    asam.ascent_step()
    asam.descent_step()  # the gradient of the second pass got lost: nothing to step with
    assert torch.equal(w, before)


def test_eq2_a_second_ascent_starts_from_w_again():
    """A caller that skips a batch between the two passes loses nothing."""
    w = torch.nn.Parameter(torch.tensor([1.0, 2.0]))
    asam = ASAM(torch.optim.SGD([w], lr=0.0), rho=0.5)
    for _ in range(2):
        w.square().sum().backward()
        asam.ascent_step()
    asam.descent_step()
    assert w.tolist() == [1.0, 2.0]


def test_eq2_asam_without_a_gradient_stays():
    w = torch.nn.Parameter(rows(3))
    before = w.detach().clone()
    asam = ASAM(torch.optim.SGD([w], lr=0.1), rho=1.0)
    asam.ascent_step()
    (w * 0).sum().backward()
    asam.ascent_step()
    assert torch.equal(w, before)


def test_algorithm1_with_rho_0_is_adamw_bit_for_bit(tmp_path, bert, sentences):
    cache = {
        "sentences": sentences,
        "sources": ["a"] * 48,
        "fingerprint": "",
        "teacher": "",
        "embeddings": torch.randn(48, 8, generator=torch.Generator().manual_seed(0)),
    }
    final = []
    for optimizer in ("adamw", "asam"):
        student, tokenizer = AutoModel.from_pretrained(bert), AutoTokenizer.from_pretrained(bert)
        torch.manual_seed(1)
        s = Settings(
            optimizer=optimizer,
            rho=0.0,
            lr=1e-2,
            epochs=2,
            batch_size=8,
            pooling="cls",
            output=str(tmp_path),
        )
        talas.train(s, dict(cache), student, tokenizer)
        final.append(student.state_dict())
    assert not torch.equal(
        final[0]["encoder.layer.0.output.dense.weight"],
        AutoModel.from_pretrained(bert).encoder.layer[0].output.dense.weight,
    )
    assert all(torch.equal(final[0][name], final[1][name]) for name in final[0])


def test_algorithm1_both_passes_draw_the_same_dropout_masks(batch):
    student, projections, tokens, teacher = batch
    student.train()
    s = Settings(optimizer="asam", rho=0.0, lambda1=1.0, pooling="cls")
    asam = ASAM(torch.optim.SGD(student.parameters(), lr=0.0), rho=0.0)
    gap = talas.training_step(student, projections, asam, [tokens], teacher, None, s)[-1]
    assert gap.item() == 0.0  # at ρ = 0 the two passes are one function at one point


# ------------------------------------------------------------------------------------------------- Appendix B, SAM and DISAM


def test_eq10_to_12_disam_objective_by_hand():
    losses, domains = (
        torch.tensor([1.0, 3.0, 4.0, 8.0]),
        torch.tensor([5, 5, 2, 9]),
    )  # L_i: 2, 4, 8; α_i: 1/2, 1/4, 1/4
    variance = 2 * ((2 - 4) ** 2 + (2 - 8) ** 2 + (4 - 8) ** 2) / (2 * 3**2)
    assert talas.disam_objective(losses, domains, 0.5).item() == pytest.approx(4.0 - 0.5 * variance)
    assert variance == pytest.approx(torch.tensor([2.0, 4.0, 8.0]).var(unbiased=False).item())


def test_eq10_disam_on_one_domain_is_sam():
    losses = torch.tensor([1.0, 3.0, 5.0])
    assert talas.disam_objective(
        losses, torch.zeros(3, dtype=torch.long), 0.5
    ).item() == pytest.approx(3.0)


def test_eq10_disam_climbs_less_where_a_domain_is_worse_than_the_rest():
    losses = torch.tensor([1.0, 1.0, 9.0, 9.0], requires_grad=True)
    talas.disam_objective(losses, torch.tensor([0, 0, 1, 1]), 0.02).backward()
    # L = (1, 9), d Var / d L_1 = -(9 - 1) / 2: the gradient 1/2 -+ 0.02 * 4, shared by two sentences
    torch.testing.assert_close(losses.grad, torch.tensor([0.29, 0.29, 0.21, 0.21]))


def test_eq10_each_sentence_has_its_own_loss(batch):
    student, projections, tokens, teacher = batch
    s = Settings(lambda1=0.3, pooling="mean")
    losses, terms = talas.total_loss(student, projections, [tokens], teacher, s, reduction="none")
    loss, same = talas.total_loss(student, projections, [tokens], teacher, s)
    assert losses.shape == (4,)
    torch.testing.assert_close(losses.mean(), loss)
    torch.testing.assert_close(terms, same)
    hidden = student(**tokens, output_hidden_states=True).hidden_states
    layers = [pool(h, tokens["attention_mask"], "mean") for h in hidden[1:]]
    one = torch.stack(
        [
            1 - torch.cosine_similarity(layers[l][1] @ projections[l - 1], teacher[1], dim=0)
            for l in (1, 2)
        ]
    ).mean()
    cosines = torch.cosine_similarity(layers[2][1][None], layers[2]) / 0.07
    expected = 0.3 * (cosines.logsumexp(0) - cosines[1]) + 0.75 * one + talas.lasd_loss(layers)
    torch.testing.assert_close(losses[1], expected)


@pytest.mark.parametrize(
    "optimizer, domains", [("sam", [0, 1, 0, 1]), ("disam", [0, 0, 0, 0]), ("disam", [0, 1, 0, 1])]
)
def test_appendix_b_one_step_of_sam_and_disam(bert, optimizer, domains):
    """The same step written out with plain SGD: ε̂ = ρ ∇ / ‖∇‖ of what is climbed, then the gradient of L at w + ε̂."""
    tokens = {
        "input_ids": torch.tensor([[2, 40, 41, 3], [2, 42, 43, 3], [2, 44, 45, 3], [2, 46, 47, 3]]),
        "attention_mask": torch.ones(4, 4).long(),
    }
    teacher, projections, domains = (
        torch.randn(4, 6),
        [torch.randn(32, 6).requires_grad_() for _ in range(2)],
        torch.tensor(domains),
    )
    s = Settings(optimizer=optimizer, lambda1=0.3, pooling="cls", disam_lambda=5.0)
    student = AutoModel.from_pretrained(bert).eval()
    objective = lambda **how: talas.total_loss(student, projections, [tokens], teacher, s, **how)[0]
    parameters = [p for name, p in student.named_parameters() if "pooler" not in name]

    losses = objective(reduction="none")
    means = torch.stack([losses[domains == d].mean() for d in domains.unique()])
    climbed = losses.mean() - (5.0 * means.var(unbiased=False) if optimizer == "disam" else 0)
    ascent = torch.autograd.grad(climbed, parameters + projections)
    norm = sum((g**2).sum() for g in ascent).sqrt()
    saved = [p.detach().clone() for p in parameters + projections]
    with torch.no_grad():
        for p, g in zip(parameters + projections, ascent):
            p += 0.05 * g / norm
    descent = torch.autograd.grad(objective(), parameters + projections)
    with torch.no_grad():
        for p, w in zip(parameters + projections, saved):
            p.copy_(w)
    expected = [w - 0.1 * g for w, g in zip(saved, descent)]

    asam = ASAM(torch.optim.SGD([*parameters, *projections], lr=0.1), 0.05, adaptive=False)
    talas.training_step(student, projections, asam, [tokens], teacher, domains, s)
    for p, w in zip(parameters + projections, expected):
        torch.testing.assert_close(p.detach(), w, atol=2e-6, rtol=1e-4)


# ------------------------------------------------------------------------------------------------- Table 4, sharpness


@pytest.mark.parametrize("sign", [1, -1])
def test_table4_largest_eigenvalue_of_a_known_hessian(sign):
    """Also where the eigenvalue of the largest size is negative."""
    A = rows(12, 12)
    H = sign * (A @ A.T) + 3 * torch.diag(rows(12, seed=1))
    x, y = rows(8, seed=2).requires_grad_(), rows(2, 2, seed=3).requires_grad_()
    loss = lambda: (w := torch.cat([x, y.flatten()])) @ H @ w / 2
    found = talas.largest_hessian_eigenvalue(loss, [x, y], iterations=3000)
    assert found == pytest.approx(torch.linalg.eigvalsh(H).max().item(), rel=1e-4)


def test_table4_measured_on_a_student_against_the_exact_hessian_and_finite_differences(batch):
    student, projections, tokens, teacher = batch
    assert student.config._attn_implementation == "sdpa"  # which has no second derivative
    s = Settings(lambda1=0.3, pooling="cls")
    before = torch.get_rng_state()
    found = talas.measure_sharpness(student, projections, [([tokens], teacher, None)], s)
    assert (
        torch.equal(torch.get_rng_state(), before) and student.config._attn_implementation == "sdpa"
    )
    assert found == talas.measure_sharpness(student, projections, [([tokens], teacher, None)], s)

    # the exact largest eigenvalue over one bias of 32 values
    student.double().set_attn_implementation("eager")
    bias = student.encoder.layer[2].output.dense.bias
    parameters = [W.double() for W in projections]

    def loss_at(w):
        swapped = dict(student.named_parameters()) | {"encoder.layer.2.output.dense.bias": w}
        call = lambda **kw: torch.func.functional_call(student, swapped, kwargs=kw)
        call.device, call.dtype, call.training = student.device, student.dtype, False
        return talas.total_loss(call, parameters, [tokens], teacher.double(), s)[0]

    H = torch.autograd.functional.hessian(loss_at, bias.detach())
    exact = torch.linalg.eigvalsh(H).max().item()
    loss = lambda: talas.total_loss(student, parameters, [tokens], teacher.double(), s)[0]
    assert talas.largest_hessian_eigenvalue(loss, [bias], iterations=300) == pytest.approx(
        exact, rel=1e-3
    )
    v, h = rows(32, seed=5), 1e-5
    slope = lambda w: torch.autograd.functional.jacobian(loss_at, w)
    torch.testing.assert_close(
        (slope(bias.detach() + h * v) - slope(bias.detach() - h * v)) / (2 * h),
        H @ v,
        atol=1e-6,
        rtol=1e-4,
    )


# ------------------------------------------------------------------------------------------------- the student


def test_tiny_student_is_the_same_in_every_process():
    code = "from tests.conftest import SENTENCES; from demo.tiny import tiny_student; m, t, _ = tiny_student(SENTENCES, 1);"
    code += (
        "print(sorted(t.get_vocab().items()), m.encoder.layer[2].output.dense.weight.sum().item())"
    )
    there = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    model, tokenizer, _ = tiny.tiny_student(SENTENCES, 1)
    weight = model.encoder.layer[2].output.dense.weight.sum().item()
    assert there == f"{sorted(tokenizer.get_vocab().items())} {weight}\n" and "harbour" in there


@pytest.fixture
def cache(tmp_path, sentences):
    """A teacher cache of the 48 sentences with random embeddings of 8 dimensions."""
    from types import SimpleNamespace

    args = SimpleNamespace(teacher="random", max_length=256, dtype="float32")
    embeddings = torch.randn(48, 8, generator=torch.Generator().manual_seed(3))
    save(tmp_path / "teacher.pt", make_cache(args, sentences, ["a", "b"] * 24, "none", embeddings))
    return tmp_path / "teacher.pt"


def run(*flags):
    talas.main([str(flag) for flag in flags])


@pytest.mark.parametrize("pooling", ["cls", "mean", "last"])
def test_the_saved_student_loads_with_the_same_embeddings(
    tmp_path, bert, cache, sentences, pooling
):
    from cache_teacher import declared_pooling, encode, load_encoder

    out = tmp_path / "student"
    command = [
        "--teacher",
        cache,
        "--student",
        bert,
        "--output",
        out,
        "--pooling",
        pooling,
        "--max_length",
        12,
    ]
    run(*command, "--epochs", 1, "--batch_size", 16, "--lr", 1e-3)
    assert declared_pooling(str(out)) == pooling
    model, tokenizer = AutoModel.from_pretrained(out).eval(), AutoTokenizer.from_pretrained(out)
    tokens = tokenizer(sentences, padding=True, truncation=True, return_tensors="pt")
    assert tokens["input_ids"].shape[1] <= 12  # the maximum length travels with the student
    with torch.no_grad():
        expected = pool(model(**tokens).last_hidden_state, tokens["attention_mask"], pooling)
    torch.testing.assert_close(
        encode(*load_encoder(str(out))[:2], sentences, pooling, 256, 7), expected
    )
    projections = torch.load(out / "projections.pt", weights_only=True)
    assert [tuple(W.shape) for W in projections] == [(32, 8)] * 2
    settings = json.loads((out / "talas.json").read_text())
    assert (
        settings["settings"]["lr"] == 1e-3
        and settings["teacher"] == "random"
        and len(settings["corpus"]) == 64
    )
    *steps, epoch = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    columns = {
        "step",
        "epoch",
        "loss",
        "simcse",
        "tamd",
        "lasd",
        "sharpness_gap",
        "lr",
        "ms_per_step",
        "memory_mb",
    }
    assert steps[-1]["step"] == 3 and set(steps[-1]) == columns
    assert epoch["end_of_epoch"] == 1 and epoch["lambda_max"] is None
    assert settings["cost"].keys() == {"ms_per_step", "mean_mb", "peak_mb", "std_mb"}


def test_the_saved_student_in_sentence_transformers(tmp_path, bert, cache, sentences):
    library = pytest.importorskip("sentence_transformers")
    out = tmp_path / "student"
    run(
        "--teacher",
        cache,
        "--student",
        bert,
        "--output",
        out,
        "--pooling",
        "mean",
        "--epochs",
        1,
        "--batch_size",
        16,
    )
    from cache_teacher import encode, load_encoder

    theirs = library.SentenceTransformer(str(out), device="cpu").encode(
        sentences, convert_to_tensor=True
    )
    torch.testing.assert_close(
        encode(*load_encoder(str(out))[:2], sentences, "mean", 256, 32),
        theirs,
        atol=1e-5,
        rtol=1e-4,
    )


def test_training_learns_the_teacher(tmp_path, bert, corpus):
    cache, out = tmp_path / "lsa.pt", tmp_path / "student"
    cache_teacher.main(["--corpus", str(corpus), "--output", str(cache)])
    run(
        "--teacher",
        cache,
        "--student",
        bert,
        "--output",
        out,
        "--epochs",
        30,
        "--batch_size",
        16,
        "--lr",
        3e-3,
    )
    tamd = [
        json.loads(line)["tamd"]
        for line in (out / "metrics.jsonl").read_text().splitlines()
        if "lr" in line
    ]
    assert tamd[-1] < 0.3 and tamd[-1] < tamd[0] / 2


def test_the_paper_is_the_default():
    s = Settings()
    assert (s.lambda1, s.lambda2, s.lambda3, s.anchored_layers) == (0.001, 0.75, 1, 2)
    assert (s.lr, s.batch_size, s.epochs, s.optimizer) == (2e-5, 32, 5, "asam")


def test_tiny_brings_its_own_defaults_and_the_command_line_wins(capsys):
    s = talas.parse_settings(["--epochs", "7"])
    assert s.student == "tiny" and s.epochs == 7 and s.lr == tiny.SETTINGS["lr"]
    assert f"--lr {tiny.SETTINGS['lr']}" in capsys.readouterr().out
    assert talas.parse_settings(["--student", "somewhere"]).lr == 2e-5


# ------------------------------------------------------------------------------------------------- interruptions


def killed_in_the_middle_of_an_epoch():
    steps, step = [], talas.training_step
    talas.training_step = lambda *args: (
        steps.append(0) or (os.kill(os.getpid(), 9) if len(steps) == 5 else step(*args))
    )


def killed_in_the_middle_of_a_save():
    saves, write = [], torch.save

    def torn(content, path):
        saves.append(path)
        if (
            len(saves) < 3
        ):  # before the first epoch, after it, and in the middle of the one after the second
            return write(content, path)
        Path(path).write_bytes(b"half a checkpoint")
        os.kill(os.getpid(), 9)

    torch.save = torn


def killed_in_the_middle_of_the_last_save():
    talas.move_files = lambda draft, folder: (
        os.replace(draft / "config.json", folder / "config.json"),
        os.kill(os.getpid(), 9),
    )


def interrupted_by_ctrl_c():
    steps, step = [], talas.training_step

    def stop(*args):
        steps.append(0)
        if len(steps) == 5:
            raise KeyboardInterrupt
        return step(*args)

    talas.training_step = stop


@pytest.mark.parametrize(
    "stop, code",
    [
        (killed_in_the_middle_of_an_epoch, -9),
        (killed_in_the_middle_of_a_save, -9),
        (killed_in_the_middle_of_the_last_save, -9),
        (interrupted_by_ctrl_c, 2),
    ],
)
def test_a_resumed_run_ends_with_the_weights_of_an_uninterrupted_one(
    tmp_path, bert, cache, stop, code
):
    flags = ["--teacher", cache, "--student", bert, "--epochs", 3, "--batch_size", 16, "--lr", 1e-3]
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    assert in_a_process(lambda: run(*flags, "--output", whole)) == 0
    assert in_a_process(lambda: (stop(), run(*flags, "--output", resumed))) == code
    assert (resumed / "checkpoint.pt").exists() and not (resumed / "talas.json").exists()
    assert (
        in_a_process(lambda: cache_teacher.load_encoder(str(resumed))) == 2
    )  # half a run is no model
    assert (
        in_a_process(lambda: run(*flags, "--output", resumed)) == 2
    )  # neither trained again nor thrown away
    assert in_a_process(lambda: run(*flags, "--output", resumed, "--lr", 1e-4, "--resume")) == 2
    assert in_a_process(lambda: run(*flags, "--output", resumed, "--resume")) == 0
    assert sorted(p.relative_to(whole) for p in whole.rglob("*")) == sorted(
        p.relative_to(resumed) for p in resumed.rglob("*")
    )
    assert (whole / "model.safetensors").read_bytes() == (
        resumed / "model.safetensors"
    ).read_bytes()
    for W, same in zip(
        *(torch.load(out / "projections.pt", weights_only=True) for out in (whole, resumed)),
        strict=True,
    ):
        assert torch.equal(W, same)
    losses = [
        [json.loads(line).get("loss") for line in (out / "metrics.jsonl").open()]
        for out in (whole, resumed)
    ]
    assert losses[0] == losses[1] and len(losses[0]) == 6


@pytest.mark.parametrize("optimizer", ["asam", "adamw"])
def test_two_processes_climb_and_descend_as_one_with_their_batches_together(
    tmp_path, cache, optimizer
):
    """Without dropout, and with Eq. 3 alone, which sees no other sentence of the batch, the mean gradient is the same."""
    bert = small_bert(tmp_path / "bert", hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    flags = [
        "--teacher",
        cache,
        "--student",
        bert,
        "--epochs",
        2,
        "--lambda1",
        0,
        "--lambda3",
        0,
        "--lr",
        1e-3,
    ]
    flags += ["--rho", 0.5, "--optimizer", optimizer]

    def keep_weights():
        train = talas.train

        def kept(s, cache, student, *rest):
            result = train(s, cache, student, *rest)
            torch.save(student.state_dict(), tmp_path / f"process{cache_teacher.rank()}.pt")
            return result

        talas.train = kept
        run(*flags, "--batch_size", 8, "--output", tmp_path / "two")

    assert in_two_processes(keep_weights) == [0, 0]
    assert in_a_process(lambda: run(*flags, "--batch_size", 16, "--output", tmp_path / "one")) == 0
    first, second = (
        torch.load(tmp_path / f"process{rank}.pt", weights_only=True) for rank in (0, 1)
    )
    one, two = (AutoModel.from_pretrained(tmp_path / name).state_dict() for name in ("one", "two"))
    start = AutoModel.from_pretrained(bert).state_dict()
    assert not torch.equal(
        start["encoder.layer.2.output.dense.weight"], one["encoder.layer.2.output.dense.weight"]
    )
    for name in one:
        assert torch.equal(first[name], second[name]) and torch.equal(first[name], two[name])
        torch.testing.assert_close(two[name], one[name], atol=1e-4, rtol=1e-3)
    read = lambda name: [
        json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()
    ]
    assert [line["step"] for line in read("two")] == [line["step"] for line in read("one")]
    for line, same in zip(read("two"), read("one")):  # the means over both processes
        assert line.get("tamd", 0) == pytest.approx(same.get("tamd", 0), rel=1e-3)


def test_two_processes_draw_their_own_dropout_and_stay_together(tmp_path, bert, cache):
    seen, step = tmp_path / "seen", talas.training_step

    def watched(student, *rest):
        dropout = torch.get_rng_state().sum().item()
        values = step(student, *rest)
        weights = sum(p.double().sum() for p in student.parameters()).item()
        with open(f"{seen}{cache_teacher.rank()}", "a") as file:
            file.write(json.dumps([dropout, weights]) + "\n")
        return values

    def train():
        talas.training_step = watched
        run(
            "--teacher",
            cache,
            "--student",
            bert,
            "--epochs",
            2,
            "--batch_size",
            8,
            "--output",
            tmp_path / "two",
        )

    assert in_two_processes(train) == [0, 0]
    first, second = ([json.loads(line) for line in open(f"{seen}{rank}")] for rank in (0, 1))
    assert len(first) == len(second) == 6
    assert all(a[0] != b[0] and a[1] == b[1] for a, b in zip(first, second))


@pytest.mark.parametrize(
    "stop", [killed_in_the_middle_of_an_epoch, killed_in_the_middle_of_the_last_save]
)
def test_two_processes_resume_as_one_does(tmp_path, bert, cache, stop):
    flags = [
        "--teacher",
        cache,
        "--student",
        bert,
        "--epochs",
        2,
        "--batch_size",
        6,
        "--lr",
        1e-3,
        "--output",
    ]
    assert in_two_processes(lambda: run(*flags, tmp_path / "whole")) == [0, 0]
    assert -9 in in_two_processes(lambda: (stop(), run(*flags, tmp_path / "resumed")))
    assert (tmp_path / "resumed" / "checkpoint.pt").exists()
    assert (
        in_a_process(lambda: run(*flags, tmp_path / "resumed", "--resume")) == 2
    )  # one process is another run
    assert in_two_processes(lambda: run(*flags, tmp_path / "resumed", "--resume")) == [0, 0]
    whole, resumed = (tmp_path / name / "model.safetensors" for name in ("whole", "resumed"))
    assert whole.read_bytes() == resumed.read_bytes()


def test_resuming_with_another_cache_or_pooling_is_refused(
    tmp_path, bert, cache, ends_with_one_line
):
    command = [
        "--teacher",
        cache,
        "--student",
        bert,
        "--epochs",
        2,
        "--batch_size",
        16,
        "--output",
        tmp_path / "out",
    ]
    assert in_a_process(lambda: (killed_in_the_middle_of_an_epoch(), run(*command))) == -9
    ends_with_one_line(
        lambda: run(*command, "--resume", "--pooling", "mean"), "--pooling", "cls", "mean"
    )
    other = torch.load(cache, weights_only=True)
    torch.save(
        other | {"embeddings": other["embeddings"].flip(0)}, cache
    )  # the same sentences, another teacher
    ends_with_one_line(lambda: run(*command, "--resume"), "content of --teacher")


def test_the_same_seed_gives_the_same_weights_and_another_seed_others(tmp_path, bert, cache):
    flags = ["--teacher", cache, "--student", bert, "--epochs", 1, "--batch_size", 16, "--lr", 1e-3]
    weights = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        run(*flags, "--output", tmp_path / name, "--seed", seed)
        weights.append((tmp_path / name / "model.safetensors").read_bytes())
    assert weights[0] == weights[1] != weights[2]


# ------------------------------------------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--teacher", "nowhere.pt"], ["nowhere.pt", "cache_teacher.py"]),
        (["--student", "no/such/model"], ["no/such/model"]),
        (["--anchored_layers", "4"], ["--anchored_layers 4", "3 layers"]),
        (["--anchored_layers", "0"], ["--anchored_layers 0"]),
        (["--lasd_layers", "1"], ["--lasd_layers 1"]),
        (["--lasd_layers", "4"], ["--lasd_layers 4"]),
        (["--lambda1", "0", "--lambda2", "0", "--lambda3", "0"], ["all 0"]),
        (["--lambda2", "-1"], ["--lambda2 -1"]),
        (["--lr", "nan"], ["--lr nan"]),
        (["--lr", "0"], ["--lr 0"]),
        (["--rho", "inf"], ["--rho inf"]),
        (["--temperature", "0"], ["--temperature 0"]),
        (["--epochs", "0"], ["--epochs 0"]),
        (["--epochs", "1.5"], ["--epochs", "1.5"]),
        (["--batch_size", "1"], ["--batch_size 1", "Eqs. 5 and 6"]),
        (["--batch_size", "49"], ["--batch_size 49", "48"]),
        (["--warmup_ratio", "2"], ["--warmup_ratio 2"]),
        (["--optimizer", "sgd"], ["--optimizer", "asam"]),
        (["--device", "quantum"], ["--device quantum"]),
        (["--lambda", "1"], ["--lambda"]),
        (["--seed", str(10**20)], ["--seed"]),
        (["--max_length", "2"], ["--max_length 2"]),
        (["--resume"], ["no checkpoint"]),
    ],
)
def test_a_mistake_on_the_command_line_is_one_line(
    flags, words, cache, bert, tmp_path, ends_with_one_line
):
    out = tmp_path / "out"
    ends_with_one_line(
        lambda: run(
            "--teacher", cache, "--student", bert, "--batch_size", 16, "--output", out, *flags
        ),
        *words,
    )
    assert not out.exists()


def test_a_tokenizer_of_another_model_is_one_line(tmp_path, bert, cache, ends_with_one_line):
    tokenizer = AutoTokenizer.from_pretrained(bert)
    tokenizer.add_tokens([f"new{i}" for i in range(5)])
    tokenizer.save_pretrained(bert)
    ends_with_one_line(
        lambda: run("--teacher", cache, "--student", bert, "--output", tmp_path / "out"),
        "tokenizer",
        "embeddings",
    )


@pytest.mark.parametrize("flags", [["--lr", 1e18], ["--rho", 1e18]])
def test_divergence_stops_with_the_step_and_keeps_the_checkpoint(
    tmp_path, bert, cache, flags, ends_with_one_line
):
    out = tmp_path / "out"
    command = [
        "--teacher",
        cache,
        "--student",
        bert,
        "--output",
        out,
        "--batch_size",
        16,
        "--epochs",
        4,
        *flags,
    ]
    ends_with_one_line(lambda: run(*command), "not finite", "--lr", "--rho")
    state = torch.load(out / "checkpoint.pt", weights_only=True)
    assert all(p.isfinite().all() for p in state["student"].values())


def test_an_existing_output_is_kept(tmp_path, bert, cache, ends_with_one_line):
    out = tmp_path / "student"
    command = [
        "--teacher",
        cache,
        "--student",
        bert,
        "--output",
        out,
        "--epochs",
        1,
        "--batch_size",
        16,
    ]
    run(*command)
    (out / "mine.txt").write_text("mine")
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    ends_with_one_line(lambda: run(*command), "exists", "--overwrite")
    ends_with_one_line(lambda: run(*command, "--resume"), "finished run")
    ends_with_one_line(lambda: run(*command, "--overwrite", "--anchored_layers", 9), "3 layers")
    assert before == {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    run(*command, "--overwrite", "--seed", 1)
    assert (out / "mine.txt").read_text() == "mine"
    assert (out / "model.safetensors").read_bytes() != before[out / "model.safetensors"]


def test_an_output_that_cannot_be_written_is_one_line(tmp_path, bert, cache, ends_with_one_line):
    (tmp_path / "file").write_text("in the way")
    command = ["--teacher", cache, "--student", bert, "--batch_size", 16]
    ends_with_one_line(lambda: run(*command, "--output", tmp_path / "file"), "exists")
    ends_with_one_line(
        lambda: run(*command, "--output", tmp_path / "file" / "student"), "cannot write"
    )


# ------------------------------------------------------------------------------------------------- properties


@pytest.mark.parametrize("seed", range(5))
def test_eqs_3_to_6_do_not_see_lengths_or_the_order_of_the_batch(seed):
    layers, teacher = (
        [rows(6, 5, seed=10 * seed + i) for i in range(3)],
        rows(6, 4, seed=10 * seed + 3),
    )
    projections = [rows(5, 4, seed=10 * seed + 4 + i) for i in range(3)]
    lengths, order = (
        rows(6, 1, seed=10 * seed + 7).exp(),
        torch.randperm(6, generator=torch.Generator().manual_seed(seed)),
    )
    for change in (lambda E: lengths * E, lambda E: E[order]):
        changed = [change(E) for E in layers]
        for loss in (
            lambda E, T: talas.tamd_loss(E, projections, T),
            lambda E, T: talas.lasd_loss(E),
            lambda E, T: talas.simcse_loss(E[0], E[1], 0.07),
        ):
            torch.testing.assert_close(loss(changed, change(teacher)), loss(layers, teacher))
    assert 0 <= talas.tamd_loss(layers, projections, teacher) <= 2
    assert talas.lasd_loss([layers[0]] * 3) == 0


# ------------------------------------------------------------------------------------------------- Tables 2, 3, 7, 8, 9


@pytest.mark.parametrize("optimizer", ["asam", "sam", "disam", "adamw"])
@pytest.mark.parametrize("weights", [(0, 0.75, 0), (0, 0, 1), (0.001, 0.75, 1)])
def test_tables_2_and_9_every_combination_trains(tmp_path, bert, cache, optimizer, weights):
    flags = [flag for i, w in enumerate(weights) for flag in (f"--lambda{i + 1}", w)]
    command = [
        "--teacher",
        cache,
        "--student",
        bert,
        "--output",
        tmp_path / "out",
        "--epochs",
        1,
        "--batch_size",
        16,
    ]
    run(*command, "--optimizer", optimizer, *flags)
    step, epoch = [
        json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()
    ]
    assert (step["sharpness_gap"] == 0) == (optimizer == "adamw") and epoch["lambda_max"] is None


def test_table4_an_epoch_with_sharpness_trains_as_without_and_records_it(tmp_path, bert, cache):
    command = [
        "--teacher",
        cache,
        "--student",
        bert,
        "--epochs",
        2,
        "--batch_size",
        16,
        "--lr",
        1e-3,
    ]
    run(*command, "--output", tmp_path / "with", "--sharpness")
    run(*command, "--output", tmp_path / "without")
    lines = [
        json.loads(line) for line in (tmp_path / "with" / "metrics.jsonl").read_text().splitlines()
    ]
    assert [math.isfinite(line["lambda_max"]) for line in lines if "end_of_epoch" in line] == [
        True,
        True,
    ]
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("with", "without")]
    assert weights[0] == weights[1]


def test_table2_simcse_alone_needs_no_teacher(tmp_path, bert, corpus):
    command = [
        "--teacher",
        corpus,
        "--student",
        bert,
        "--output",
        tmp_path / "out",
        "--batch_size",
        16,
    ]
    run(*command, "--lambda1", 1, "--lambda2", 0, "--lambda3", 0, "--optimizer", "adamw")
    assert json.loads((tmp_path / "out" / "talas.json").read_text())["teacher"] is None


@pytest.mark.parametrize("anchored, chained", [(1, 2), (3, 3)])
def test_tables_7_and_8_the_top_layers_are_taken(batch, anchored, chained):
    student, _, tokens, teacher = batch
    projections = [torch.randn(32, 6) for _ in range(anchored)]
    s = Settings(anchored_layers=anchored, lasd_layers=chained, pooling="cls")
    _, (_, tamd, lasd) = talas.total_loss(student, projections, [tokens], teacher, s)
    layers = [h[:, 0] for h in student(**tokens, output_hidden_states=True).hidden_states[1:]]
    torch.testing.assert_close(tamd, talas.tamd_loss(layers[3 - anchored :], projections, teacher))
    torch.testing.assert_close(lasd, talas.lasd_loss(layers[3 - chained :]))


# ------------------------------------------------------------------------------------------------- the demo


def test_the_demo_end_to_end_at_a_reduced_size(tmp_path):
    """The three commands as a reader runs them, on 1,500 of the demo's sentences."""
    lines = (ROOT / "demo" / "corpus.jsonl").read_text().splitlines()
    (tmp_path / "corpus.jsonl").write_text("\n".join(random.Random(0).sample(lines, 1500)))
    scripts = [
        ["cache_teacher.py", "--corpus", "corpus.jsonl"],
        ["talas.py", "--epochs", "2"],
        [
            "eval.py",
            "lsa",
            "tiny",
            "student",
            "--tasks",
            "topics,captions",
            "--json",
            "scores.json",
        ],
    ]
    for script, *flags in scripts:
        done = subprocess.run(
            [sys.executable, str(ROOT / script), *flags],
            cwd=tmp_path,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
    scores = json.loads((tmp_path / "scores.json").read_text())
    assert scores["student"]["avg"] > scores["tiny"]["avg"] + 15
    assert "| student |" in done.stdout and load_cache(tmp_path / "teacher.pt")[
        "embeddings"
    ].shape == (1500, 32)
