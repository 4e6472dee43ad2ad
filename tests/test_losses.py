"""The losses, Eqs. 3-7 and 10-12, and the embeddings that they see, against loops and by hand."""

import math
from statistics import fmean

import pytest
import torch
from conftest import SENTENCES

import talas
from support.encoder import Corpus
from support.loading import load_encoder
from talas import Settings


# ------------------------------------------------------------------- the formulas, sum by sum
def cos(u, v):
    """The cosine of two vectors, in plain Python."""
    u, v = u.tolist(), v.tolist()
    dot, uu, vv = (sum(a * b for a, b in zip(x, y)) for x, y in ((u, v), (u, u), (v, v)))
    return dot / math.sqrt(uu) / math.sqrt(vv)


def tamd_by_loops(layers, projections, teacher):
    """Eq. 3."""
    pairs = zip(layers, projections, strict=True)
    return fmean(1 - cos(e @ W, target) for E, W in pairs for e, target in zip(E, teacher))


def lasd_by_loops(layers):
    """Eqs. 4-5."""
    R = [[cos(a, b) for a in E for b in E] for E in layers]
    return fmean((y - x) ** 2 for lower, upper in zip(R, R[1:]) for x, y in zip(lower, upper))


def simcse_by_loops(z, z_prime, tau):
    """Eq. 6."""
    scores = [[math.exp(cos(u, v) / tau) for v in z_prime] for u in z]
    return -fmean(math.log(row[i] / sum(row)) for i, row in enumerate(scores))


def total_by_loops(layers, projections, teacher, s):
    """Eq. 7 with all three terms: (the sum, {the terms})."""
    first = [E[0] for E in layers]
    terms = {
        "simcse": simcse_by_loops(*layers[-1], s.temperature),
        "tamd": tamd_by_loops(first[len(first) - s.anchored_layers :], projections, teacher),
        "lasd": lasd_by_loops(first[len(first) - (s.lasd_layers or len(first)) :]),
    }
    weights = s.lambda1, s.lambda2, s.lambda3
    return sum(weight * term for weight, term in zip(weights, terms.values())), terms


def rows(*shape, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


def check(loss, expected, *inputs):
    """A scalar is the expected one; its gradients are those of finite differences."""
    assert loss(*inputs).shape == () and loss(*inputs).item() == pytest.approx(expected, rel=1e-9)
    assert torch.autograd.gradcheck(loss, [x.clone().requires_grad_() for x in inputs])


# ------------------------------------------------------------------------ what the paper says
def test_eq3_tamd_is_the_formula():
    layers, W = [rows(5, 4, seed=i) for i in range(3)], [rows(4, 6, seed=i) for i in (3, 4, 5)]
    teacher = rows(5, 6, seed=7)
    expected = tamd_by_loops(layers, W, teacher)
    check(lambda *x: talas.tamd_loss(x[:3], x[3:], teacher), expected, *layers, *W)
    with pytest.raises(ValueError):
        talas.tamd_loss(layers, W[1:], teacher)  # a projection a layer
    E, W = torch.tensor([[1.0, 0.0], [0.0, 2.0]]), torch.eye(2)
    teacher = torch.tensor([[3.0, 0.0], [0.0, -1.0]])  # the same direction: 0; opposite: 2
    assert talas.tamd_loss([E], [W], teacher).item() == pytest.approx(1.0)
    slanted = torch.tensor([[5.0, 5.0], [0.0, 1.0]])
    assert talas.tamd_loss([E], [W], slanted).item() == pytest.approx((1 - 1 / math.sqrt(2)) / 2)


@pytest.mark.parametrize("length", [1e-9, 1e9])
def test_eq3_tamd_does_not_see_how_long_the_teachers_vectors_are(length):
    E, W = rows(5, 4, dtype=torch.float32), rows(4, 6, seed=1, dtype=torch.float32)
    teacher = (length * torch.nn.functional.normalize(rows(5, 6, seed=2))).float()
    exact = (W.mul_(1e-3).double().requires_grad_(),)  # W as a run begins
    loss = talas.tamd_loss([E], [W.requires_grad_()], teacher)
    assert loss.item() == pytest.approx(tamd_by_loops([E], [W], teacher), rel=1e-5)
    (found,) = torch.autograd.grad(loss, W)
    (expected,) = torch.autograd.grad(talas.tamd_loss([E.double()], exact, teacher.double()), exact)
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-4)


def test_eq4_eq5_lasd_is_the_formula():
    layers = [rows(4, 3, seed=seed) for seed in range(4)]
    check(lambda *x: talas.lasd_loss(x), lasd_by_loops(layers), *layers)
    parallel = torch.tensor([[1.0, 0.0], [2.0, 0.0]])
    orthogonal = torch.tensor([[1.0, 0.0], [0.0, 5.0]])  # two of four cosines go from 1 to 0
    assert talas.lasd_loss([parallel, parallel, orthogonal]).item() == pytest.approx(2 / 4 / 2)


def test_eq5_a_detached_guide_is_a_constant():
    """Of three layers the upper one is never moved, and the middle one only as the lower of two."""
    layers = [rows(4, 3, seed=seed).requires_grad_() for seed in range(3)]
    loss = talas.lasd_loss(layers, detach_guide=True)
    assert loss.item() == pytest.approx(lasd_by_loops([E.detach() for E in layers]))
    loss.backward()
    for E, constant in zip(layers, layers[1:]):
        alone = talas.lasd_loss([E, constant.detach()]) / 2
        torch.testing.assert_close(E.grad, torch.autograd.grad(alone, E)[0])
    assert layers[2].grad is None or not layers[2].grad.any()


@pytest.mark.parametrize("tau", [0.05, 1.0])
def test_eq6_simcse_is_the_formula(tau):
    z = rows(4, 5, seed=1), rows(4, 5, seed=2)
    check(lambda *z: talas.simcse_loss(*z, tau), simcse_by_loops(*z, tau), *z)
    z = torch.eye(2)  # at tau = 1/2, cosines of 1 and 0 are exp(2) and 1
    expected = -math.log(math.exp(2) / (math.exp(2) + 1))
    assert talas.simcse_loss(z, 3 * z, 0.5).item() == pytest.approx(expected)
    # the negatives are second views: z_1 has a cosine of 1 with both, z_2 one of 0 with both
    assert talas.simcse_loss(z, z[[0, 0]], 0.5).item() == pytest.approx(math.log(2))
    # exp(1 / 0.001) is more than a float holds
    assert talas.simcse_loss(z, z.flip(0), 0.001).item() == pytest.approx(1000.0)


CHOICES = {"lambda1": 0.3, "lambda2": 0.5, "lambda3": 0.7, "temperature": 0.2}


@pytest.mark.parametrize("anchored, chained", [(1, 2), (2, 0), (3, 3)])
def test_eq7_total_loss_is_the_weighted_sum_over_the_top_layers(anchored, chained):
    """Tables 7 and 8. TAMD and LASD see the first view, SimCSE both."""
    s = Settings(anchored_layers=anchored, lasd_layers=chained, **CHOICES)
    given = [*rows(3, 2, 5, 4)], [*rows(anchored, 4, 6, seed=1)], rows(5, 6, seed=2)
    (loss, terms), (expected, of_terms) = talas.total_loss(*given, s), total_by_loops(*given, s)
    assert loss.item() == pytest.approx(expected) and terms == pytest.approx(of_terms)


@pytest.mark.parametrize("name", ["simcse", "tamd", "lasd"])
def test_eq7_a_term_of_weight_0_is_left_out(name):
    """It needs nothing: SimCSE alone needs a second view, TAMD alone a teacher."""
    weights = {"simcse": 0.0, "tamd": 0.0, "lasd": 0.0, name: 2.0}
    s = Settings(**{f"lambda{i}": weight for i, weight in enumerate(weights.values(), 1)})
    layers = [*rows(3, 2 if s.lambda1 else 1, 5, 4)]
    with_teacher = [*rows(2, 4, 6, seed=3)], rows(5, 6, seed=5)
    loss, terms = talas.total_loss(layers, *(with_teacher if s.lambda2 else ([], None)), s)
    twice = [E.expand(2, -1, -1) if len(E) == 1 else E for E in layers]
    _, expected = total_by_loops(twice, *with_teacher, s)
    assert terms == pytest.approx({name: expected[name]})
    assert loss.item() == pytest.approx(2 * expected[name])


# ------------------------------------------------------------------------------ DISAM, Eqs. 10-12
def test_eq10_to_12_disam_objective_by_hand():
    losses, counts = torch.tensor([4.0, 2.0, 8.0], requires_grad=True), torch.tensor([1, 2, 1])
    variance = 2 * ((2 - 4) ** 2 + (2 - 8) ** 2 + (4 - 8) ** 2) / (2 * 3**2)
    climbed = talas.disam_objective(losses, counts, 0.5)
    assert climbed.item() == pytest.approx(4 - 0.5 * variance)
    climbed.backward()  # d Var / d L_i = 2 (L_i - mean) / M, the mean being 14 / 3
    expected = [1 / 4 + 0.5 * 4 / 9, 1 / 2 + 0.5 * 16 / 9, 1 / 4 - 0.5 * 20 / 9]
    assert losses.grad.tolist() == pytest.approx(expected)
    assert talas.disam_objective(losses[:1], counts[1:2], 0.5).item() == 4.0  # SAM
    for dtype in (torch.float64, torch.bfloat16):  # alpha is of the losses' type
        third = talas.disam_objective(torch.eye(1, 2, dtype=dtype)[0], torch.tensor([1, 2]), 0.0)
        assert third.dtype == dtype
        assert third.item() == pytest.approx(1 / 3, rel=4 * torch.finfo(dtype).eps, abs=0)


# ----------------------------------------------------------------- Section 3: pooled embeddings
POOLED = {"cls": lambda h: h[0], "mean": lambda h: h.mean(0), "last": lambda h: h[-1]}


@pytest.mark.parametrize("pooling", POOLED)
def test_pooling_ignores_padding_on_either_side(pooling):
    hidden = rows(4, 4, 5)
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [0, 1, 1, 1], [0, 1, 0, 0]])
    hidden[mask == 0] = 777.0
    own = torch.stack([POOLED[pooling](h[m.bool()]) for h, m in zip(hidden, mask)])
    torch.testing.assert_close(talas.pool(hidden, mask, pooling), own)
    with pytest.raises(ValueError, match="max"):
        talas.pool(hidden, mask, "max")


@pytest.fixture
def learnt(bert):
    """A small BERT and ten sentences of all five lengths, tokenised, with targets and domains."""
    cache = {"sentences": SENTENCES[3:13], "sources": list("bcabbcbbcb")}
    return Corpus(cache | {"embeddings": rows(10, 6)}, load_encoder(str(bert)))


@pytest.mark.parametrize("pooling", POOLED)
def test_embed_gives_a_batch_what_it_gives_each_sentence_alone(bert, pooling):
    student = load_encoder(str(bert), pooling)
    cache = {"sentences": SENTENCES, "sources": ["a"] * 48, "embeddings": rows(48, 0)}
    short = load_encoder(str(bert), pooling, max_length=9)
    assert Corpus(cache, short).batch(torch.arange(48))[0]["input_ids"].shape == (48, 9)
    tokens = Corpus(cache, student).batch(torch.arange(48))[0]
    layers = torch.stack(talas.embed(student, tokens, Settings(), views=2))
    assert layers.shape == (3, 2, 48, 32)
    for i in range(0, 48, 7):
        ids = torch.tensor([student.tokenizer.encode(SENTENCES[i]).ids])
        hidden = student.model(ids, output_hidden_states=True).hidden_states[1:]  # L of (1, T, d)
        expected = torch.stack([POOLED[pooling](h[0]) for h in hidden])[:, None].expand(3, 2, 32)
        torch.testing.assert_close(layers[:, :, i], expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("disam", [False, True])
@torch.no_grad()
def test_eq7_and_eq10_of_a_student_in_training(learnt, disam):
    """L_i is Eq. 7 on the sentences of domain i alone: their negatives, their R."""
    s, student = Settings(**CHOICES, disam_lambda=2.0), learnt.student
    tokens, teacher, domains = learnt.batch(torch.arange(10))
    objective = talas.Objective(student, [*rows(2, 32, 6, dtype=torch.float32)], s).train()
    torch.manual_seed(5)
    layers = talas.embed(student, tokens, s, views=2)
    assert (layers[-1][0] != layers[-1][1]).any(dim=1).all()  # dropout masks of their own
    torch.manual_seed(5)
    loss, values = objective(tokens, teacher, *([domains] if disam else []))
    expected, terms = total_by_loops(layers, objective.projections, teacher, s)
    assert values == pytest.approx(terms | {"loss": expected}, rel=1e-4)
    if disam:
        L, alpha = [], (0.1, 0.6, 0.3)
        for domain in ([2], [0, 3, 4, 6, 7, 9], [1, 5, 8]):  # a, b, c
            own = [E[:, domain] for E in layers], objective.projections, teacher[domain]
            L.append(total_by_loops(*own, s)[0])
        variance = sum((x - y) ** 2 for x in L for y in L) / (2 * 3**2)
        expected = sum(a * x for a, x in zip(alpha, L)) - 2.0 * variance
    assert loss.item() == pytest.approx(expected, rel=1e-4)


def test_table2_without_simcse_a_sentence_goes_through_the_student_once(learnt):
    seen, embeddings = [], learnt.student.model.embeddings
    embeddings.register_forward_hook(lambda module, args, out: seen.append(len(out)))
    for lambda1, passes in [(0, 10), (0.3, 10 + 20)]:
        objective = talas.Objective(learnt.student, [], Settings(lambda1=lambda1, lambda2=0))
        objective(*learnt.batch(torch.arange(10))[:2])
        assert sum(seen) == passes


def test_bfloat16_is_for_matrix_products_in_training_alone(learnt):
    student, tokens = learnt.student, learnt.batch(torch.arange(10))[0]

    def embeddings(training, precision):
        student.model.train(training)
        torch.manual_seed(0)
        return talas.embed(student, tokens, Settings(precision=precision))[-1]

    assert torch.equal(embeddings(False, "bfloat16"), embeddings(False, "float32"))
    exact, rounded = embeddings(True, "float32"), embeddings(True, "bfloat16")
    assert rounded.dtype == torch.float32
    assert 1e-3 * exact.norm() < (rounded - exact).norm() < 0.05 * exact.norm()
