"""The losses, Eqs. 3-7 and 10-12, and the embeddings that they see: by hand, in plain PyTorch."""

import math

import pytest
import torch
from conftest import SENTENCES, plain_lasd, plain_simcse, plain_tamd, plain_total, rows

import talas
from support.data import Corpus
from support.loading import load_encoder
from talas import Settings


def check(loss, plain, *inputs):
    """A scalar is that of the plain formula; its gradients are those of finite differences."""
    assert loss(*inputs).shape == ()
    torch.testing.assert_close(loss(*inputs), plain(*inputs))
    assert torch.autograd.gradcheck(loss, [x.clone().requires_grad_() for x in inputs])


# ------------------------------------------------------------------------ what the paper says
def test_eq3_tamd_is_the_formula():
    layers, W = [rows(5, 4, seed=i) for i in range(3)], [rows(4, 6, seed=i) for i in (3, 4, 5)]
    teacher = rows(5, 6, seed=7)
    both = (lambda *x, f=f: f(x[:3], x[3:], teacher) for f in (talas.tamd_loss, plain_tamd))
    check(*both, *layers, *W)
    with pytest.raises(ValueError):
        talas.tamd_loss(layers, W[1:], teacher)  # a projection a layer
    E, W = torch.tensor([[1.0, 0.0], [0.0, 2.0]]), torch.eye(2)
    teacher = torch.tensor([[3.0, 0.0], [0.0, -1.0]])  # the same direction: 0; opposite: 2
    assert talas.tamd_loss([E], [W], teacher).item() == pytest.approx(1.0)
    slanted = torch.tensor([[5.0, 5.0], [0.0, 1.0]])
    assert talas.tamd_loss([E], [W], slanted).item() == pytest.approx((1 - 1 / math.sqrt(2)) / 2)


@pytest.mark.parametrize("length", [1e-9, 1e9])
def test_eq3_tamd_does_not_see_how_long_the_teachers_vectors_are(length):
    """In float32, with W as small as a run begins."""
    E, W, teacher = rows(5, 4), 1e-3 * rows(4, 6, seed=1), rows(5, 6, seed=2)
    given = [x.float() for x in (E, W, length * teacher / teacher.norm(dim=1, keepdim=True))]
    found, expected = (
        torch.autograd.functional.vjp(lambda W, x=x, f=f: f([x[0]], [W], x[2]), x[1])
        for f, x in ((talas.tamd_loss, given), (plain_tamd, [x.double() for x in given]))
    )
    torch.testing.assert_close([x.double() for x in found], [*expected], rtol=1e-4, atol=1e-4)


def test_eq4_eq5_lasd_is_the_formula():
    check(*(lambda *x, f=f: f(x) for f in (talas.lasd_loss, plain_lasd)), *rows(4, 4, 3))
    parallel = torch.tensor([[1.0, 0.0], [2.0, 0.0]])
    orthogonal = torch.tensor([[1.0, 0.0], [0.0, 5.0]])  # two of four cosines go from 1 to 0
    assert talas.lasd_loss([parallel, parallel, orthogonal]).item() == pytest.approx(2 / 4 / 2)


def test_eq5_a_detached_guide_is_a_constant():
    """Of three layers the upper one is never moved, and the middle one only as the lower of two."""
    layers = [rows(4, 3, seed=seed).requires_grad_() for seed in range(3)]
    loss = talas.lasd_loss(layers, detach_guide=True)
    assert loss.item() == pytest.approx(plain_lasd(layers).item())
    loss.backward()
    for E, constant in zip(layers, layers[1:]):
        alone = plain_lasd([E, constant.detach()]) / 2
        torch.testing.assert_close(E.grad, torch.autograd.grad(alone, E)[0])
    assert layers[2].grad is None or not layers[2].grad.any()


@pytest.mark.parametrize("tau", [0.05, 1.0])
def test_eq6_simcse_is_the_formula(tau):
    both = (lambda *z, f=f: f(*z, tau) for f in (talas.simcse_loss, plain_simcse))
    check(*both, rows(4, 5, seed=1), rows(4, 5, seed=2))
    z = torch.eye(2)  # at tau = 1/2, cosines of 1 and 0 are exp(2) and 1
    expected = -math.log(math.exp(2) / (math.exp(2) + 1))
    assert talas.simcse_loss(z, 3 * z, 0.5).item() == pytest.approx(expected)
    # the negatives are second views: z_1 has a cosine of 1 with both, z_2 one of 0 with both
    assert talas.simcse_loss(z, z[[0, 0]], 0.5).item() == pytest.approx(math.log(2))
    # exp(1 / 0.001) is more than a float holds
    assert talas.simcse_loss(z, z.flip(0), 0.001).item() == pytest.approx(1000.0)


@pytest.mark.parametrize("anchored, chained", [(1, 2), (2, 0), (3, 3)])
def test_eq7_total_loss_is_the_weighted_sum_over_the_top_layers(anchored, chained):
    """Tables 7 and 8. TAMD and LASD see the first view, SimCSE both."""
    choices = {"lambda1": 0.3, "lambda2": 0.5, "lambda3": 0.7, "temperature": 0.2}
    s = Settings(anchored_layers=anchored, lasd_layers=chained, **choices)
    given = [*rows(3, 2, 5, 4)], [*rows(anchored, 4, 6, seed=1)], rows(5, 6, seed=2)
    torch.testing.assert_close(talas.total_loss(*given, s), plain_total(*given, s))


@pytest.mark.parametrize("name", ["simcse", "tamd", "lasd"])
def test_eq7_a_term_of_weight_0_is_left_out(name):
    """It needs nothing: SimCSE alone needs a second view, TAMD alone a teacher."""
    weights = {"simcse": 0.0, "tamd": 0.0, "lasd": 0.0, name: 2.0}
    s = Settings(**{f"lambda{i}": weight for i, weight in enumerate(weights.values(), 1)})
    both, taught = rows(3, 2, 5, 4), ([*rows(2, 4, 6, seed=3)], rows(5, 6, seed=5))
    layers = [*(both if s.lambda1 else both[:, :1])]
    found = talas.total_loss(layers, *(taught if s.lambda2 else ([], None)), s)
    loss, terms = plain_total([*both], *taught, s)
    torch.testing.assert_close(found, (loss, {name: terms[name]}))


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
def batch(folder):
    """A small BERT as an Encoder, and the 48 sentences, of all five lengths, as one batch."""
    student = load_encoder(str(folder))
    cache = {"sentences": SENTENCES, "sources": ["a"] * 48, "embeddings": rows(48, 6)}
    return student, Corpus(cache, student).batch(torch.arange(48))


def test_table2_without_simcse_a_sentence_goes_through_the_student_once(bert):
    student, (tokens, teacher, _) = batch(bert)
    seen, embeddings = [], student.model.embeddings
    embeddings.register_forward_hook(lambda module, args, out: seen.append(len(out)))
    for lambda1, passes in [(0, 48), (0.3, 48 + 96)]:
        talas.Objective(student, [], Settings(lambda1=lambda1, lambda2=0))(tokens, teacher)
        assert sum(seen) == passes


def test_bfloat16_is_for_matrix_products_in_training_alone(bert):
    student, (tokens, *_) = batch(bert)

    def embeddings(training, precision):
        student.model.train(training)
        torch.manual_seed(0)
        return talas.embed(student, tokens, Settings(precision=precision))[-1]

    assert torch.equal(embeddings(False, "bfloat16"), embeddings(False, "float32"))
    exact, rounded = embeddings(True, "float32"), embeddings(True, "bfloat16")
    assert rounded.dtype == torch.float32
    assert 1e-3 * exact.norm() < (rounded - exact).norm() < 0.05 * exact.norm()
