"""ASAM and SAM, Eqs. 2, 8-9, by hand and in loops; lambda_max (Table 4) by exact spectra."""

from support.loading import load_encoder

import math

import pytest
import torch
from conftest import SENTENCES, small_bert

import talas
from talas import ASAM, Settings, largest_hessian_eigenvalue


def rows(*shape, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


def cleared(*parameters):
    """No gradient is left from the first pass: neither None nor zero adds to the second."""
    return all(p.grad is None or not p.grad.any() for p in parameters)


# ------------------------------------------------------------------------ what the paper says
@pytest.mark.parametrize(
    "adaptive, eta, rho, perturbed, final",
    [
        # w = (1, -2), gradient (1, -8). T = (1, 2), T g = (1, -16), epsilon = rho (1, -32) / √257
        (True, 0.0, math.sqrt(257), (2, -34), (1 - 0.1 * 2, -2 + 0.1 * 136)),
        # eta = 1: T = (2, 3), T g = (2, -24), epsilon = rho (4, -72) / √580
        (True, 1.0, math.sqrt(580), (5, -74), (1 - 0.1 * 5, -2 + 0.1 * 296)),
        # SAM: T = I, epsilon = rho (1, -8) / √65
        (False, 0.0, math.sqrt(65), (2, -10), (1 - 0.1 * 2, -2 + 0.1 * 40)),
        # SAM knows no eta
        (False, 1.0, math.sqrt(65), (2, -10), (1 - 0.1 * 2, -2 + 0.1 * 40)),
    ],
)
def test_eq2_asam_by_hand(adaptive, eta, rho, perturbed, final):
    """L(a, b) = (a² + 4 b²) / 2, whose gradient is (a, 4 b)."""
    a, b = torch.nn.Parameter(torch.tensor(1.0)), torch.nn.Parameter(torch.tensor(-2.0))
    asam = ASAM(torch.optim.SGD([a, b], lr=0.1), rho, eta, adaptive)
    ((a**2 + 4 * b**2) / 2).backward()
    asam.ascent_step()
    assert (a.item(), b.item()) == pytest.approx(perturbed, rel=1e-5)
    assert cleared(a, b)
    ((a**2 + 4 * b**2) / 2).backward()
    asam.descent_step()
    assert (a.item(), b.item()) == pytest.approx(final, rel=1e-5)


def test_eq2_asam_climbs_as_far_as_its_radius_allows():
    """‖T_w⁻¹ ε̂‖₂ = ρ, and no other ε of that size raises a linear loss more."""
    w, g = torch.nn.Parameter(rows(50)), rows(50, seed=1)
    before = w.detach().clone()
    asam = ASAM(torch.optim.SGD([w], lr=0.1), rho=0.3)
    (w @ g).backward()
    asam.ascent_step()
    epsilon = (w - before).detach()
    assert (epsilon / before.abs()).norm().item() == pytest.approx(0.3)
    for seed in range(100):
        other = rows(50, seed=seed + 2)
        assert before.abs() * other / other.norm() * 0.3 @ g < epsilon @ g


@pytest.mark.parametrize("adaptive, eta", [(True, 0.0), (True, 0.01), (False, 0.0)])
def test_eq2_eq9_twenty_steps_are_those_of_a_loop_over_the_parameters(adaptive, eta):
    """Several tensors, two groups, AdamW inside: Algorithm 1 on a small regression."""
    x, y = rows(20, 4, seed=8), rows(20, 3, seed=9)

    def parameters():
        return [torch.nn.Parameter(rows(*shape)) for shape in ((4, 5), (5,), (5, 3), (1, 3))]

    def loss(w):
        return (((x @ w[0] + w[1]).tanh() @ w[2] + w[3] - y) ** 2).mean()

    def adamw(w):
        groups = [{"params": w[:2]}, {"params": w[2:], "lr": 0.05}]
        return torch.optim.AdamW(groups, lr=0.01, weight_decay=0.1)

    ours, theirs = parameters(), parameters()
    asam, optimizer = ASAM(adamw(ours), 0.5, eta, adaptive), adamw(theirs)
    for _ in range(20):
        loss(ours).backward()
        asam.ascent_step()
        loss(ours).backward()
        asam.descent_step()

        gradients = torch.autograd.grad(loss(theirs), theirs)
        kept = [p.detach().clone() for p in theirs]
        T = [p.abs() + eta if adaptive else torch.ones_like(p) for p in kept]
        norm = math.sqrt(sum(((t * g) ** 2).sum().item() for t, g in zip(T, gradients)))
        for p, t, g in zip(theirs, T, gradients):
            p.data += 0.5 * t**2 * g / norm
        gradients = torch.autograd.grad(loss(theirs), theirs)
        for p, w, g in zip(theirs, kept, gradients):
            p.data, p.grad = w, g
        optimizer.step()
    for p, other, start in zip(ours, theirs, parameters()):
        torch.testing.assert_close(p, other)
        assert (p - start).abs().mean() > 0.01


def test_algorithm1_the_step_starts_from_w_exactly():
    w = torch.nn.Parameter(rows(1000, dtype=torch.float32))
    before = w.detach().clone()
    asam = ASAM(torch.optim.SGD([w], lr=0.5), rho=2.0)
    (w**4).sum().backward()
    asam.ascent_step()
    w_tilde = w.detach().clone()
    assert (w_tilde != before).any()
    (w**4).sum().backward()
    asam.optimizer.param_groups[0]["lr"] = 0.0
    asam.descent_step()
    assert torch.equal(w, before)  # bit for bit: a sum and a difference would round
    assert cleared(w)


def spectrum(*eigenvalues, dtype=torch.float64):
    """(w, loss) with a Hessian of these eigenvalues, in a random basis."""
    D, Q = torch.tensor(eigenvalues), torch.linalg.qr(rows(len(eigenvalues), len(eigenvalues)))[0]
    H = (Q @ torch.diag(D.double()) @ Q.T).to(dtype)
    w = rows(len(eigenvalues), seed=1, dtype=dtype).requires_grad_()
    return w, lambda: w @ H @ w / 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("seed", range(3))
def test_table4_lambda_max_of_a_random_symmetric_matrix_within_a_hundredth(seed, dtype):
    A = rows(300, 300, seed=seed)
    H = (A + A.T) / 2
    expected = torch.linalg.eigvalsh(H)[-1].item()
    w, H = rows(300, seed=9, dtype=dtype).requires_grad_(), H.to(dtype)
    found = largest_hessian_eigenvalue(lambda: w @ H @ w / 2, [w])
    assert found == pytest.approx(expected, rel=0.01)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    "eigenvalues, expected",
    [
        ((5.0, -5.2, 1.0, 1.0), 5.0),  # the largest in size is negative
        ((3.0, -3.0), 3.0),
        ((-1.0, -2.0, -7.0), -1.0),  # a maximum of the loss
        ((2.0,) * 6, 2.0),  # one eigenvalue alone
        ((1e-9, 2e-9, 3e-9), 3e-9),  # nearly flat
        ((1e6, 1.0, -1e6), 1e6),
        ((0.0,) * 5, 0.0),  # flat
        (tuple(float(i) for i in range(100)), 99.0),
    ],
)
def test_table4_lambda_max_of_a_known_spectrum(eigenvalues, expected, dtype):
    w, loss = spectrum(*eigenvalues, dtype=dtype)
    assert largest_hessian_eigenvalue(loss, [w]) == pytest.approx(expected, rel=0.01, abs=1e-12)


# --------------------------------------------------------------------------- Table 4, closely
def test_table4_a_parameter_that_the_loss_does_not_know_is_flat():
    w, unknown = rows(4).requires_grad_(), rows(3).requires_grad_()
    found = largest_hessian_eigenvalue(lambda: (w**2).sum() * 1.5, [w, unknown])
    assert found == pytest.approx(3.0)
    found = largest_hessian_eigenvalue(lambda: -(w**2).sum(), [w, unknown])
    assert found == pytest.approx(0.0, abs=1e-5)
    for linear in (lambda: w.sum(), lambda: (0 * unknown).sum()):
        assert largest_hessian_eigenvalue(linear, [w, unknown]) == 0.0


def test_table4_lambda_max_is_that_of_all_parameters_together():
    H, a, b = rows(12, 12), rows(8, seed=1).requires_grad_(), rows(2, 2, seed=2).requires_grad_()
    H = H + H.T

    def loss():
        w = torch.cat([a, b.flatten()])
        return w @ H @ w / 2

    expected = torch.linalg.eigvalsh(H)[-1].item()
    assert largest_hessian_eigenvalue(loss, [a, b]) == pytest.approx(expected, rel=1e-3)
    assert largest_hessian_eigenvalue(loss, iter([a, b])) == pytest.approx(expected, rel=1e-3)


def test_table4_several_losses_are_averaged():
    A, B, w = rows(9, 9), rows(9, 9, seed=1), rows(9, seed=2).requires_grad_()
    A, B = A + A.T, B + B.T
    expected = torch.linalg.eigvalsh((A + B) / 2)[-1].item()
    found = largest_hessian_eigenvalue([lambda: w @ A @ w / 2, lambda: w @ B @ w / 2], [w])
    assert found == pytest.approx(expected, rel=1e-3)


def test_table4_leaves_everything_as_it_was():
    w, loss = spectrum(4.0, 1.0, -2.0)
    before, state = w.detach().clone(), torch.get_rng_state()
    found = largest_hessian_eigenvalue(loss, [w])
    assert torch.equal(w, before) and w.grad is None
    assert torch.equal(torch.get_rng_state(), state)
    assert found == largest_hessian_eigenvalue(loss, [w])


def test_table4_a_loss_that_is_not_finite_has_no_lambda_max():
    w = torch.zeros(3, requires_grad=True)
    assert math.isnan(largest_hessian_eigenvalue(lambda: (w / w).sum(), [w]))


def test_table4_of_a_student_is_that_of_a_hessian_of_finite_differences(tmp_path):
    """Eq. 7 as a function of one bias of 16 values."""
    bert = small_bert(tmp_path, num_hidden_layers=2, hidden_size=16)
    student, s = load_encoder(str(bert), "mean", dtype=torch.float64), Settings(lambda1=0.3)
    student.model.set_attn_implementation("eager")
    tokens = student.tokenizer(SENTENCES[3:8], padding=True, return_tensors="pt")
    tokens = {name: tokens[name] for name in ("input_ids", "attention_mask")}
    projections, teacher = [rows(16, 6, seed=seed) for seed in (1, 2)], rows(5, 6, seed=3)
    bias = student.model.encoder.layer[1].output.dense.bias

    def loss():
        return talas.total_loss(student, projections, tokens, teacher, s)[0]

    def slope_beside(step):
        with torch.no_grad():
            bias.add_(step)
        (slope,) = torch.autograd.grad(loss(), bias)
        with torch.no_grad():
            bias.sub_(step)
        return slope

    h = 1e-5 * torch.eye(16, dtype=torch.float64)
    H = torch.stack([(slope_beside(step) - slope_beside(-step)) / 2e-5 for step in h])
    expected = torch.linalg.eigvalsh((H + H.T) / 2)[-1].item()
    assert largest_hessian_eigenvalue(loss, [bias]) == pytest.approx(expected, rel=1e-3)


# ----------------------------------------------------------- beyond the textbook: nothing is lost
def test_parameters_without_a_gradient_stay_where_they_are():
    w, unused, late = (torch.nn.Parameter(rows(20, seed=seed)) for seed in range(3))
    before = [p.detach().clone() for p in (w, unused, late)]
    asam = ASAM(torch.optim.SGD([w, unused, late], lr=0.5), rho=2.0)
    (w**4).sum().backward()
    asam.ascent_step()
    assert torch.equal(unused, before[1]) and torch.equal(late, before[2])
    w_tilde = w.detach().clone()
    ((w**4).sum() + late.sum()).backward()  # late has a gradient in the second pass alone
    asam.descent_step()
    torch.testing.assert_close(w.detach(), before[0] - 0.5 * 4 * w_tilde**3)
    assert torch.equal(unused, before[1])
    torch.testing.assert_close(late.detach(), before[2] - 0.5)


@pytest.mark.parametrize("rho", [1.0, 50.0])
def test_an_ascent_without_a_slope_stays(rho):
    w = torch.nn.Parameter(rows(3))
    before = w.detach().clone()
    asam = ASAM(torch.optim.SGD([w], lr=0.1), rho=rho)
    asam.ascent_step()  # no gradient at all
    (w * 0).sum().backward()
    asam.ascent_step()  # a zero gradient: no direction
    assert torch.equal(w, before)


@pytest.mark.parametrize("scale", [1e-12, 1e12])
def test_the_radius_does_not_depend_on_the_size_of_the_gradient(scale):
    w, g = torch.nn.Parameter(rows(50)), rows(50, seed=1)
    before = w.detach().clone()
    asam = ASAM(torch.optim.SGD([w], lr=0.1), rho=0.3)
    (w @ g * scale).backward()
    asam.ascent_step()
    assert ((w - before) / before.abs()).norm().item() == pytest.approx(0.3)


def test_w_comes_back_whatever_happened_to_the_gradients():
    w = torch.nn.Parameter(rows(20))
    before = w.detach().clone()
    asam = ASAM(torch.optim.SGD([w], lr=0.1), rho=1.0)
    (w**2).sum().backward()
    asam.ascent_step()
    asam.descent_step()  # the second pass left no gradient: nothing to step with
    assert torch.equal(w, before)


def test_a_second_ascent_starts_from_w_again():
    """A caller that skips a batch between the two passes loses nothing."""
    w = torch.nn.Parameter(torch.tensor([1.0, 2.0]))
    asam = ASAM(torch.optim.SGD([w], lr=0.0), rho=0.5)
    for _ in range(2):
        w.square().sum().backward()
        asam.ascent_step()
    asam.descent_step()
    assert w.tolist() == [1.0, 2.0]
