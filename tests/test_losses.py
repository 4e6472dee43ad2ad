"""The losses, Eqs. 3-7 and 10-12, and the embeddings they see, against the formulas as loops."""

from support.encoder import pool
from support.loading import load_encoder

import math

import pytest
import torch
from conftest import SENTENCES, small_bert

import talas
from talas import Settings


# ------------------------------------------------------------------- the formulas, sum by sum
def cos(u, v):
    """The cosine of two vectors, in plain Python."""
    u, v = u.tolist(), v.tolist()
    dot, uu, vv = (sum(a * b for a, b in zip(x, y)) for x, y in ((u, v), (u, u), (v, v)))
    return dot / math.sqrt(uu) / math.sqrt(vv)


def tamd_by_loops(layers, projections, teacher):
    """Eq. 3, of each sentence."""
    losses = []
    for i, target in enumerate(teacher):
        distances = [1 - cos(E[i] @ W, target) for E, W in zip(layers, projections, strict=True)]
        losses.append(sum(distances) / len(distances))
    return losses


def lasd_by_loops(layers):
    """Eqs. 4-5."""
    N, total = len(layers[0]), 0.0
    for lower, upper in zip(layers[:-1], layers[1:]):
        for i in range(N):
            for j in range(N):
                total += (cos(upper[i], upper[j]) - cos(lower[i], lower[j])) ** 2 / N**2
    return total / (len(layers) - 1)


def simcse_by_loops(z, z_prime, tau):
    """Eq. 6, of each sentence."""
    losses = []
    for i in range(len(z)):
        scores = [math.exp(cos(z[i], other) / tau) for other in z_prime]
        losses.append(-math.log(scores[i] / sum(scores)))
    return losses


def mean(values):
    return sum(values) / len(values)


def rows(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# ------------------------------------------------------------------------ what the paper says
def test_eq3_tamd_is_the_formula():
    layers = [rows(5, 4, seed=1), rows(5, 4, seed=2), rows(5, 4, seed=3)]
    projections = [rows(4, 6, seed=4), rows(4, 6, seed=5), rows(4, 6, seed=6)]
    teacher = rows(5, 6, seed=7)
    found = talas.tamd_loss(layers, projections, teacher)
    assert found.shape == ()
    assert found.item() == pytest.approx(mean(tamd_by_loops(layers, projections, teacher)))


def test_eq4_relation_matrix_holds_the_cosines():
    E = rows(4, 6)
    R = talas.relation_matrix(E)
    expected = [[cos(a, b) for b in E] for a in E]
    torch.testing.assert_close(R, torch.tensor(expected, dtype=torch.float64))


def test_eq5_lasd_is_the_formula():
    layers = [rows(4, 3, seed=seed) for seed in range(5)]
    found = talas.lasd_loss(layers)
    assert found.shape == ()
    assert found.item() == pytest.approx(lasd_by_loops(layers))


@pytest.mark.parametrize("tau", [0.05, 1.0])
def test_eq6_simcse_is_the_formula(tau):
    z, z_prime = rows(4, 5, seed=1), rows(4, 5, seed=2)
    found = talas.simcse_loss(z, z_prime, tau)
    assert found.shape == ()
    assert found.item() == pytest.approx(mean(simcse_by_loops(z, z_prime, tau)))


@pytest.fixture
def student(bert):
    """A small BERT, [CLS] pooling, in evaluation mode: no dropout."""
    return load_encoder(str(bert), "cls")


TEXTS = SENTENCES[3:11]  # of all five lengths


def tokenized(student, texts=TEXTS):
    """A batch as the student takes it."""
    batch = student.tokenizer(texts, padding=True, return_tensors="pt")
    return {name: batch[name] for name in ("input_ids", "attention_mask")}


def one_by_one(student, texts=TEXTS):
    """[CLS] after each Transformer layer, L of (N, d_S): each sentence alone, without padding."""
    states = [
        student.model(**tokenized(student, [text]), output_hidden_states=True).hidden_states
        for text in texts
    ]
    return [torch.cat([h[:, 0] for h in layer]) for layer in list(zip(*states))[1:]]


def test_eq7_total_loss_is_the_weighted_sum_over_transformer_layers(student):
    s = Settings(lambda1=0.3, lambda2=0.5, lambda3=0.7, temperature=0.2)
    projections, teacher = [torch.randn(32, 6) for _ in range(2)], torch.randn(len(TEXTS), 6)
    loss, terms = talas.total_loss(student, projections, tokenized(student), teacher, s)
    layers = one_by_one(student)
    expected = [
        mean(simcse_by_loops(layers[2], layers[2], 0.2)),  # without dropout both views agree
        mean(tamd_by_loops(layers[1:], projections, teacher)),  # K = 2: the upper two
        lasd_by_loops(layers),  # all three, not the embedding layer
    ]
    assert [term.item() for term in terms] == pytest.approx(expected, rel=1e-4)
    weighted = 0.3 * expected[0] + 0.5 * expected[1] + 0.7 * expected[2]
    assert loss.item() == pytest.approx(weighted, rel=1e-4)


def test_eq10_to_12_disam_objective_by_hand():
    losses = torch.tensor([1.0, 3.0, 4.0, 8.0])
    domains = torch.tensor([5, 5, 2, 9])  # L_i: 2, 4, 8; alpha_i: 1/2, 1/4, 1/4
    variance = 2 * ((2 - 4) ** 2 + (2 - 8) ** 2 + (4 - 8) ** 2) / (2 * 3**2)
    assert talas.disam_objective(losses, domains, 0.5).item() == pytest.approx(4 - 0.5 * variance)
    assert talas.disam_objective(losses, domains, 0.0).item() == pytest.approx(losses.mean())


# ------------------------------------------------------------------------------- Eqs. 3-6, closely
def test_eq3_tamd_by_hand():
    E, W = torch.tensor([[1.0, 0.0], [0.0, 2.0]]), torch.eye(2)
    teacher = torch.tensor([[3.0, 0.0], [0.0, -1.0]])  # the same direction: 0; opposite: 2
    assert talas.tamd_loss([E], [W], teacher).item() == pytest.approx(1.0)
    assert talas.tamd_loss([E, E], [W, -W], teacher).item() == pytest.approx(1.0)
    slanted = torch.tensor([[5.0, 5.0], [0.0, 1.0]])
    assert talas.tamd_loss([E], [W], slanted).item() == pytest.approx((1 - 1 / math.sqrt(2)) / 2)


def test_eq3_tamd_needs_a_projection_a_layer():
    with pytest.raises(ValueError):
        talas.tamd_loss([rows(2, 3), rows(2, 3)], [rows(3, 3)], rows(2, 3))


def test_eq5_lasd_by_hand():
    parallel = torch.tensor([[1.0, 0.0], [2.0, 0.0]])
    orthogonal = torch.tensor([[1.0, 0.0], [0.0, 5.0]])  # two of four cosines go from 1 to 0
    assert talas.lasd_loss([parallel, orthogonal]).item() == pytest.approx(2 / 4)
    assert talas.lasd_loss([parallel, parallel, orthogonal]).item() == pytest.approx(2 / 4 / 2)


@pytest.mark.parametrize("detach_guide", [False, True])
def test_eq5_the_guide_is_moved_unless_it_is_detached(detach_guide):
    lower, upper = rows(4, 3, seed=1).requires_grad_(), rows(4, 3, seed=2).requires_grad_()
    talas.lasd_loss([lower, upper], detach_guide=detach_guide).backward()
    assert lower.grad.abs().sum() > 0
    assert (upper.grad is None or not upper.grad.any()) == detach_guide


def test_eq6_simcse_by_hand():
    z = torch.eye(2)  # at tau = 1/2, cosines of 1 and 0 are exp(2) and 1
    expected = -math.log(math.exp(2) / (math.exp(2) + 1))
    assert talas.simcse_loss(z, 3 * z, 0.5).item() == pytest.approx(expected)


def test_eq6_the_negatives_are_second_views():
    z, z_prime = torch.eye(2), torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    # cosines: z_1 with both 1, z_2 with both 0. With the first views as negatives: another value
    assert talas.simcse_loss(z, z_prime, 0.5).item() == pytest.approx(math.log(2))


def test_eq6_simcse_is_finite_at_a_tiny_temperature():
    z = torch.eye(2)  # exp(1 / 0.001) is more than a float holds
    assert talas.simcse_loss(z, z, 0.001).item() == pytest.approx(0.0, abs=1e-6)
    assert talas.simcse_loss(z, z.flip(0), 0.001).item() == pytest.approx(1000.0)


@pytest.mark.parametrize("seed", range(3))
def test_eq3_to_eq6_do_not_see_lengths_or_the_order_of_the_batch(seed):
    layers = [rows(6, 5, seed=10 * seed + i) for i in range(3)]
    projections = [rows(5, 4, seed=10 * seed + 3 + i) for i in range(3)]
    teacher, lengths = rows(6, 4, seed=10 * seed + 6), rows(6, 1, seed=10 * seed + 7).exp()
    order = torch.randperm(6, generator=torch.Generator().manual_seed(seed))

    def losses(layers, teacher):
        tamd = talas.tamd_loss(layers, projections, teacher)
        return tamd, talas.lasd_loss(layers), talas.simcse_loss(layers[0], layers[1], 0.1)

    expected = losses(layers, teacher)
    scaled = losses([lengths * E for E in layers], lengths.flip(0) * teacher)
    torch.testing.assert_close(scaled, expected)
    torch.testing.assert_close(losses([E[order] for E in layers], teacher[order]), expected)
    assert 0 <= expected[0] <= 2


def test_eq10_disam_on_one_domain_is_sam():
    losses, one = torch.tensor([1.0, 3.0, 5.0]), torch.zeros(3).long()
    assert talas.disam_objective(losses, one, 0.5).item() == pytest.approx(3.0)


def test_eq10_disam_climbs_less_where_a_domain_is_worse_than_the_rest():
    losses = torch.tensor([1.0, 1.0, 9.0, 9.0], requires_grad=True)
    talas.disam_objective(losses, torch.tensor([0, 0, 1, 1]), 0.02).backward()
    # L = (1, 9), d Var / d L_1 = -(9 - 1) / 2: 1/2 -+ 0.02 * 4, shared by two sentences each
    torch.testing.assert_close(losses.grad, torch.tensor([0.29, 0.29, 0.21, 0.21]))


def test_eq10_each_sentence_has_its_own_loss(student):
    s = Settings(lambda1=0.3, temperature=0.2)
    projections, teacher = [torch.randn(32, 6) for _ in range(2)], torch.randn(len(TEXTS), 6)
    batch = projections, tokenized(student), teacher, s
    losses, terms = talas.total_loss(student, *batch, reduction="none")
    layers = one_by_one(student)
    simcse = simcse_by_loops(layers[2], layers[2], 0.2)
    tamd = tamd_by_loops(layers[1:], projections, teacher)
    shared = lasd_by_loops(layers)
    expected = [0.3 * a + 0.75 * b + shared for a, b in zip(simcse, tamd)]
    assert losses.tolist() == pytest.approx(expected, rel=1e-4)
    assert [term.item() for term in terms] == pytest.approx(
        [mean(simcse), mean(tamd), shared], rel=1e-4
    )


def test_eq10_the_losses_of_the_terms_are_apart_where_asked():
    layers, projections = [rows(5, 4), rows(5, 4, seed=1)], [rows(4, 3, seed=2), rows(4, 3, seed=3)]
    teacher = rows(5, 3, seed=4)
    tamd = talas.tamd_loss(layers, projections, teacher, reduction="none")
    assert tamd.tolist() == pytest.approx(tamd_by_loops(layers, projections, teacher))
    simcse = talas.simcse_loss(*layers, 0.3, reduction="none")
    assert simcse.tolist() == pytest.approx(simcse_by_loops(*layers, 0.3))


# -------------------------------------------------------------------------- Eq. 7: what it is fed
@pytest.mark.parametrize("anchored, chained", [(1, 2), (2, 0), (3, 3)])
def test_eq7_tables_7_and_8_take_the_top_layers(student, anchored, chained):
    s = Settings(anchored_layers=anchored, lasd_layers=chained)
    projections, teacher = [torch.randn(32, 6) for _ in range(anchored)], torch.randn(len(TEXTS), 6)
    _, (_, tamd, lasd) = talas.total_loss(student, projections, tokenized(student), teacher, s)
    layers = one_by_one(student)
    expected = mean(tamd_by_loops(layers[3 - anchored :], projections, teacher))
    assert tamd.item() == pytest.approx(expected, rel=1e-4)
    assert lasd.item() == pytest.approx(lasd_by_loops(layers[3 - (chained or 3) :]), rel=1e-4)


@pytest.mark.parametrize("detach_guide", [False, True])
def test_eq7_detach_guide_spares_the_last_layer(student, detach_guide):
    s = Settings(lambda1=0, lambda2=0, detach_guide=detach_guide)
    talas.total_loss(student, [], tokenized(student), None, s)[0].backward()
    gradients = [layer.output.dense.weight.grad for layer in student.model.encoder.layer]
    moved = [g is not None and bool(g.any()) for g in gradients]
    assert moved == [True, True, not detach_guide]


@pytest.mark.parametrize("weights", [(1, 0, 0), (0, 1, 0), (0, 0, 1), (0, 1, 1)])
def test_eq7_a_weight_of_zero_skips_the_work_of_its_term(student, weights):
    seen = []
    student.model.embeddings.register_forward_hook(lambda _, args, out: seen.append(len(out)))
    s = Settings(**{f"lambda{i}": weight for i, weight in enumerate(weights, 1)})
    teacher = torch.randn(len(TEXTS), 6) if s.lambda2 else None
    projections = [torch.randn(32, 6) for _ in range(2)] if s.lambda2 else []
    _, terms = talas.total_loss(student, projections, tokenized(student), teacher, s)
    assert [bool(term) for term in terms] == [bool(weight) for weight in weights]
    assert sum(seen) == len(TEXTS) * (2 if s.lambda1 else 1)  # a second view for SimCSE alone


def test_eq6_both_views_have_dropout_of_their_own_in_training_alone(student):
    student.model.train()
    z, z_prime = talas.embed(student, tokenized(student), Settings(), views=2)[-1]
    assert (z != z_prime).any(dim=1).all()
    student.model.eval()
    z, z_prime = talas.embed(student, tokenized(student), Settings(), views=2)[-1]
    torch.testing.assert_close(z, z_prime)


def test_eq7_tamd_and_lasd_see_the_first_view(student):
    student.model.train()
    s, tokens = Settings(lambda1=0.3), tokenized(student)
    projections, teacher = [torch.randn(32, 6) for _ in range(2)], torch.randn(len(TEXTS), 6)
    torch.manual_seed(5)
    layers = talas.embed(student, tokens, s, views=2)
    torch.manual_seed(5)  # the same masks
    _, terms = talas.total_loss(student, projections, tokens, teacher, s)
    first = [E[0] for E in layers]
    expected = [
        mean(simcse_by_loops(*layers[2], s.temperature)),
        mean(tamd_by_loops(first[1:], projections, teacher)),
        lasd_by_loops(first),
    ]
    assert [term.item() for term in terms] == pytest.approx(expected, rel=1e-4)


def test_bfloat16_is_for_matrix_products_in_training_alone(tmp_path):
    sure = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    student, kinds = load_encoder(str(small_bert(tmp_path, **sure)), "mean"), []
    dense = student.model.encoder.layer[0].output.dense
    dense.register_forward_hook(lambda module, args, out: kinds.append(out.dtype))
    projections, teacher = [torch.randn(32, 6) for _ in range(2)], torch.randn(len(TEXTS), 6)

    def loss(precision, training):
        student.model.train(training)
        s = Settings(precision=precision)
        return talas.total_loss(student, projections, tokenized(student), teacher, s)[0]

    exact, rounded = loss("float32", True), loss("bfloat16", True)
    assert loss("bfloat16", False) == exact != rounded
    assert kinds == [torch.float32, torch.bfloat16, torch.float32]
    assert rounded.dtype == torch.float32
    assert rounded.item() == pytest.approx(exact.item(), rel=0.02)


# ------------------------------------------------------------------ Section 3: pooled embeddings
@pytest.mark.parametrize(
    "pooling, expected", [("cls", [1.0, 10.0]), ("mean", [2.0, 20.0]), ("last", [3.0, 30.0])]
)
@pytest.mark.parametrize("left", [0, 2])
@pytest.mark.parametrize("right", [0, 3])
def test_pooling_ignores_padding_on_either_side(pooling, expected, left, right):
    states = torch.tensor([[1.0, 10.0], [2.0, 20.0], [3.0, 30.0]])
    junk = torch.full((5, 2), 777.0)
    hidden = torch.cat([junk[:left], states, junk[:right]])[None]
    mask = torch.tensor([[0] * left + [1] * 3 + [0] * right])
    assert pool(hidden, mask, pooling).tolist() == [expected]


@pytest.mark.parametrize("pooling", ["cls", "mean", "last"])
def test_pooling_of_sentences_of_different_lengths(pooling):
    hidden = rows(3, 4, 5)
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [0, 1, 1, 1]])
    own = [hidden[0], hidden[1, :2], hidden[2, 1:]]
    of = {
        "cls": [h[0] for h in own],
        "mean": [h.mean(0) for h in own],
        "last": [h[-1] for h in own],
    }
    torch.testing.assert_close(pool(hidden, mask, pooling), torch.stack(of[pooling]))


def test_pooling_takes_no_other_name():
    with pytest.raises(ValueError, match="max"):
        pool(rows(1, 2, 3), torch.ones(1, 2), "max")
    assert talas.pool is pool


@pytest.mark.parametrize("pooling", ["cls", "mean", "last"])
def test_embed_gives_a_batch_what_it_gives_each_sentence_alone(bert, pooling):
    student = load_encoder(str(bert), pooling)
    layers = talas.embed(student, tokenized(student, SENTENCES), Settings(), views=2)
    assert [tuple(E.shape) for E in layers] == [(2, 48, 32)] * 3
    for i in range(0, 48, 7):
        alone = tokenized(student, [SENTENCES[i]])
        hidden = student.model(**alone, output_hidden_states=True).hidden_states
        for E, h in zip(layers, hidden[1:], strict=True):
            expected = {"cls": h[0, 0], "mean": h[0].mean(0), "last": h[0, -1]}[pooling]
            torch.testing.assert_close(E[0, i], expected, atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(E[1, i], expected, atol=1e-5, rtol=1e-5)


def test_embed_cuts_a_batch_into_pieces_of_like_length(student):
    """On a CPU: no piece is wider than its longest sentence, and little is padding."""
    pieces = []
    student.model.register_forward_pre_hook(
        lambda module, args, kwargs: pieces.append(kwargs["attention_mask"]), with_kwargs=True
    )
    batch = tokenized(student, SENTENCES)
    talas.embed(student, batch, Settings(), views=2)
    assert len(pieces) > 1 and all(piece.sum(1).max() == piece.shape[1] for piece in pieces)
    words, slots = 2 * batch["attention_mask"].sum(), sum(piece.numel() for piece in pieces)
    assert sum(piece.sum() for piece in pieces) == words
    assert words <= slots < 1.1 * words < 2 * batch["attention_mask"].numel()
