"""ASAM and SAM, Eqs. 2, 8-9, by hand and in loops; lambda_max (Table 4) by exact spectra."""

import math
from dataclasses import replace

import pytest
import torch
from conftest import plain_perturbed, plain_tamd, rows, small_bert, small_cache

import talas
from cache_teacher import load_cache
from support.data import Corpus
from support.loading import load_encoder
from talas import ASAM, Settings, largest_hessian_eigenvalue, measure_sharpness

# ------------------------------------------------------------------------ what the paper says
BY_HAND = [  # adaptive, eta, rho, w̃, the new w
    # w = (1, -2), (2), g = (1, -8), (2). T = |w|, T g = (1, -16), (4), T² g = (1, -32), (8)
    (True, 0.0, math.sqrt(273), (2, -34, 10), (1 - 0.2, -2 + 13.6, 2 - 1.0)),
    # eta = 1: T = (2, 3), (3), T g = (2, -24), (6), T² g = (4, -72), (18)
    (True, 1.0, math.sqrt(616), (5, -74, 20), (1 - 0.5, -2 + 29.6, 2 - 2.0)),
    # SAM: T = I, which knows no eta
    (False, 1.0, math.sqrt(69), (2, -10, 4), (1 - 0.2, -2 + 4.0, 2 - 0.4)),
]


@pytest.mark.parametrize("adaptive, eta, rho, perturbed, final", BY_HAND)
def test_eq2_asam_by_hand(adaptive, eta, rho, perturbed, final):
    """L = (a² + 4 b² + c²) / 2, whose gradient is (a, 4 b), (c); the norm is over both tensors."""
    ab, c = torch.nn.Parameter(torch.tensor([1.0, -2.0])), torch.nn.Parameter(torch.tensor([2.0]))
    asam = ASAM(torch.optim.SGD([ab, c], lr=0.1), rho, eta, adaptive)
    for step, expected in [(asam.ascent_step, perturbed), (asam.descent_step, final)]:
        ((ab**2 @ torch.tensor([1.0, 4.0]) + c @ c) / 2).backward()
        step()
        assert (*ab.tolist(), *c.tolist()) == pytest.approx(expected, rel=1e-5, abs=1e-5)
    asam.optimizer.step()  # no gradient is left
    assert (*ab.tolist(), *c.tolist()) == pytest.approx(expected, rel=1e-5, abs=1e-5)


@pytest.mark.parametrize("size", [0.0, 1e-23, 1e-12, 1e-6, 1.0, 1e6, 1e20])
@pytest.mark.parametrize("how", [{}, {"eta": 0.01}, {"adaptive": False}])
def test_eq2_the_step_is_as_long_as_the_radius_and_never_longer(size, how):
    """‖T_w⁻¹ ε̂‖₂ = ρ. In float32, in which squares of 1e-23 and 1e20 are 0 and infinite."""
    w, g = rows(50, dtype=torch.float32), size * rows(50, seed=1, dtype=torch.float32)
    p, T = torch.nn.Parameter(w.clone()), w.abs() + how.get("eta", 0)
    p.grad = g.clone()
    ASAM(torch.optim.SGD([p]), 0.3, **how).ascent_step()
    epsilon = p.detach() - w
    length = (epsilon / (T if how.get("adaptive", True) else 1)).double().norm().item()
    assert length <= 0.3 * (1 + 1e-4)
    if 1e-6 <= size <= 1e6:
        assert length == pytest.approx(0.3, rel=1e-4) and (epsilon * g >= 0).all()
    if size < 1e-20:
        assert not epsilon.any()  # next to no gradient: no direction


@pytest.mark.parametrize("eta", [0.0, 0.01, None])  # None: SAM
@pytest.mark.parametrize("base", ["SGD", "AdamW"])
def test_eq2_eq9_twenty_steps_are_those_of_a_loop_over_the_parameters(base, eta):
    """Several tensors, two groups, a base optimizer with a memory: a small regression."""
    x, y = rows(20, 4, seed=8), rows(20, 3, seed=9)
    own = {"SGD": {"momentum": 0.9}, "AdamW": {"weight_decay": 0.1}}[base]

    def begin():
        w = [torch.nn.Parameter(rows(*shape)) for shape in ((4, 5), (5,), (5, 3), (1, 3))]
        groups = [{"params": w[:2]}, {"params": w[2:], "lr": 0.05}]
        return w, getattr(torch.optim, base)(groups, lr=0.01, **own)

    def loss(w):
        return (((x @ w[0] + w[1]).tanh() @ w[2] + w[3] - y) ** 2).mean()

    (ours, inner), (theirs, optimizer), start = begin(), begin(), begin()[0]
    asam = ASAM(inner, 0.5, eta or 0.0, adaptive=eta is not None)
    for _ in range(20):
        for step in (asam.ascent_step, asam.descent_step):
            loss(ours).backward()
            step()
        gradient = torch.autograd.grad(loss(theirs), theirs)
        for p, g in zip(
            theirs, plain_perturbed(theirs, gradient, lambda: loss(theirs), 0.5, eta)[0]
        ):
            p.grad = g
        optimizer.step()
    torch.testing.assert_close(ours, theirs)
    assert all((p - before).abs().mean() > 0.01 for p, before in zip(ours, start))


def test_w_comes_back_to_the_bit_and_what_has_no_gradient_stays():
    w, late = (torch.nn.Parameter(rows(99, seed=i, dtype=torch.float32)) for i in (1, 2))
    before, late_before = w.detach().clone(), late.detach().clone()
    asam = ASAM(torch.optim.SGD([w, late], lr=0.5), rho=2.0)
    asam.ascent_step()  # no gradient at all
    assert torch.equal(w, before)
    for _ in range(2):  # in the second, too, from w: the first had no descent
        (w**4).sum().backward()
        Tg = before.abs() * w.grad
        asam.ascent_step()
        torch.testing.assert_close(w.detach(), before + 2.0 * before.abs() * Tg / Tg.norm())
        assert torch.equal(late, late_before)
    late.sum().backward()  # in the second pass alone, where w has none
    asam.descent_step()
    assert torch.equal(w, before)  # a sum and a difference would round
    assert torch.equal(late, late_before - 0.5)


# ---------------------------------------------------------------------------- Table 4: λ_max
SPECTRA = [
    ((5.0, -5.2, 1.0, 1.0), 5.0),  # the largest in size is negative
    ((3.0, -3.0), 3.0),
    ((-4.0,), -4.0),  # one parameter
    ((-1.0, -2.0, -7.0), -1.0),  # a maximum of the loss
    ((2.0,) * 6, 2.0),  # one eigenvalue alone
    ((1e-9, 2e-9, 3e-9), 3e-9),  # nearly flat
    ((1e6, 1.0, -1e6), 1e6),
    ((0.0,) * 5, 0.0),  # flat
    (tuple(map(float, range(100))), 99.0),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("spectrum, expected", [*SPECTRA, (0, None), (1, None), (2, None)])
def test_table4_lambda_max_is_within_a_hundredth(spectrum, expected, dtype):
    if expected is None:  # the seed of a random symmetric matrix
        H = rows(300, 300, seed=spectrum)
        H, expected = H + H.T, torch.linalg.eigvalsh(H + H.T)[-1].item()
    else:  # in a random basis
        Q = torch.linalg.qr(rows(len(spectrum), len(spectrum)))[0]
        H = Q @ torch.diag(torch.tensor(spectrum).double()) @ Q.T
    w, H = rows(len(H), seed=9, dtype=dtype).requires_grad_(), H.to(dtype)
    found = largest_hessian_eigenvalue(lambda: w @ H @ w / 2, [w])
    assert found == pytest.approx(expected, rel=0.01, abs=1e-12)


def test_table4_lambda_max_of_the_mean_of_several_losses_in_several_parameters():
    """And nothing is moved, no gradient left, no random number drawn."""
    a, b, unused = (x.requires_grad_() for x in (rows(8), rows(2, 2), rows(3)))
    H, state = rows(3, 12, 12), torch.get_rng_state()
    losses = [lambda F=F: (w := torch.cat([a, b.flatten()])) @ F @ w for F in H]
    found = largest_hessian_eigenvalue(losses, iter([a, b, unused]))
    expected = torch.linalg.eigvalsh((H + H.mT).mean(0))[-1].item()
    assert found == pytest.approx(expected, rel=0.01)
    assert found == largest_hessian_eigenvalue(losses, [a, b, unused])
    assert torch.equal(torch.get_rng_state(), state)
    assert a.grad is None and torch.equal(a, rows(8)) and torch.equal(b, rows(2, 2))


LOSSES = [
    (lambda w, u: 1.5 * (w**2).sum(), 3.0),  # flat in u
    (lambda w, u: -(w**2).sum(), 0.0),
    (lambda w, u: w.sum(), 0.0),  # linear
    (lambda w, u: (0 * u).sum(), 0.0),
    (lambda w, u: (w**2).sum() / 0, math.nan),
    (lambda w, u: ((w - w) / (w - w)).sum(), math.nan),
]


@pytest.mark.parametrize("loss, expected", LOSSES)
def test_table4_lambda_max_of_what_has_no_curvature_or_is_not_finite(loss, expected):
    w, u = rows(4).requires_grad_(), rows(3).requires_grad_()
    found = largest_hessian_eigenvalue(lambda: loss(w, u), [w, u])
    assert found == pytest.approx(expected, abs=1e-5, nan_ok=True)


@pytest.fixture
def flat(tmp_path):
    """(objective in training mode, corpus, settings): Eq. 3 alone, a student of one layer."""
    sizes = {"num_hidden_layers": 1, "hidden_size": 16, "intermediate_size": 16}
    student = load_encoder(str(small_bert(tmp_path / "bert", **sizes)))
    s = Settings(lambda1=0, lambda3=0, anchored_layers=1, batch_size=24)
    corpus = Corpus(load_cache(str(small_cache(tmp_path / "teacher.pt"))), student)
    return talas.Objective(student, [rows(16, 8, dtype=torch.float32)], s).train(), corpus, s


def test_table4_sharpness_is_that_of_the_loss_without_dropout_in_the_students_weights(flat):
    """The mean of Eq. 3 over two batches of 24 is its mean over all 48 sentences."""
    objective, corpus, s = flat
    found, model = measure_sharpness(*flat), objective.model.eval()
    model.set_attn_implementation("eager")
    tokens, teacher, _ = corpus.batch(torch.arange(48))
    w = [p for name, p in model.named_parameters() if "pooler" not in name]

    def loss():
        E = model(**tokens).last_hidden_state[:, 0]
        return s.lambda2 * plain_tamd([E], objective.projections, teacher)

    assert found == pytest.approx(largest_hessian_eigenvalue(loss, w, tolerance=1e-4), rel=0.01)


def test_table4_sharpness_is_of_the_same_two_batches_and_leaves_the_model_as_found(flat):
    objective, corpus, s = flat
    seen, found, model = [], set(), objective.model
    model.embeddings.register_forward_hook(lambda module, args, out: seen.append(len(out)))
    for seed in (1, 2):
        torch.manual_seed(seed)
        found.add(measure_sharpness(objective, corpus, replace(s, batch_size=5, seed=seed)))
        assert model.training and objective.training
        assert model.config._attn_implementation == "sdpa"
    assert len(found) == 1
    assert set(seen) == {5} and len(seen) % 2 == 0
    objective.eval()
    objective.forward = None  # whatever happens
    with pytest.raises(TypeError):
        measure_sharpness(*flat)
    assert not objective.training and model.config._attn_implementation == "sdpa"
