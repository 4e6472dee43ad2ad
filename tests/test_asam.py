"""ASAM and SAM (Eqs. 2, 8, 9), then λ_max (Table 4): by hand, then against plain formulas."""

import math
from dataclasses import replace
from functools import partial

import pytest
import torch
from helpers import random_rows, small_bert
from torch.nn import Parameter
from torch.nn.utils import parameters_to_vector
from torch.optim import SGD

from cache_teacher import load_cache
from support.data import Corpus
from support.loading import load_encoder
from talas import ASAM, Objective, Settings, largest_hessian_eigenvalue, measure_sharpness


# ----------------------------------------------------------------------------- ASAM, Eqs. 2, 8, 9
def test_asam_by_hand():
    w = Parameter(torch.tensor([1.0, -3.0]))
    asam = ASAM(SGD([w], lr=0.1), rho=0.5, eta=1.0)
    w.grad = torch.tensor([1.5, -1.0])  # ∇L at w
    asam.ascent_step()
    # T = |w| + η = (2, 4). T ∇L = (3, -4), which has the norm 5. T² ∇L = (6, -16)
    assert w.tolist() == pytest.approx([1 + 0.5 * 6 / 5, -3 - 0.5 * 16 / 5])
    assert w.grad is None
    w.grad = torch.tensor([7.0, 8.0])  # ∇L at w̃
    asam.descent_step()
    assert w.tolist() == pytest.approx([1 - 0.1 * 7, -3 - 0.1 * 8])
    assert w.grad is None


def test_sam_by_hand():
    w = Parameter(torch.tensor([1.0, -3.0]))
    w.grad = torch.tensor([3.0, -4.0])
    ASAM(SGD([w]), rho=0.5, eta=1.0, adaptive=False).ascent_step()
    # T = (1, 1), without η. ∇L has the norm 5
    assert w.tolist() == pytest.approx([1 + 0.5 * 3 / 5, -3 - 0.5 * 4 / 5])


@pytest.mark.parametrize("adaptive, eta", [(True, 0.0), (True, 0.1), (False, 0.1)])
def test_the_ascent_step_is_equation_2(adaptive, eta):
    """The formula solves Eq. 2 to first order (Kwon et al.). All parameters are one vector, w."""
    torch.manual_seed(0)
    layer = torch.nn.Linear(4, 3, dtype=torch.float64)
    groups = [{"params": [layer.weight]}, {"params": [layer.bias]}]
    loss = 1e-6 * layer(random_rows(20, 4)).square().mean()  # small, but it has a direction
    loss.backward()
    gradient = parameters_to_vector([layer.weight.grad, layer.bias.grad])
    w = parameters_to_vector(layer.parameters()).detach()
    T = w.abs() + eta if adaptive else torch.ones_like(w)
    epsilon = 0.5 * T**2 * gradient / (T * gradient).norm()
    ASAM(SGD(groups), 0.5, eta, adaptive).ascent_step()
    torch.testing.assert_close(parameters_to_vector(layer.parameters()), w + epsilon)


@pytest.mark.parametrize("gradient_entry", [1e-15, 0.0])
def test_next_to_no_gradient_gives_no_direction(gradient_entry):
    w = Parameter(torch.zeros(4))
    w.grad = torch.full([4], gradient_entry)
    ASAM(SGD([w]), rho=0.5, adaptive=False).ascent_step()
    assert w.tolist() == [0, 0, 0, 0]


def test_w_comes_back_to_the_bit():
    before = random_rows(99, dtype=torch.float32)
    w = Parameter(before.clone())
    asam = ASAM(SGD([w]), rho=2.0)
    for _ in range(2):  # without a descent between them, so the second ascent must begin at w too
        w.grad = torch.ones(99)
        asam.ascent_step()
    asam.descent_step()  # without a gradient at w̃, SGD leaves w alone
    assert torch.equal(w, before)


# --------------------------------------------------------------------------------- λ_max, Table 4
def test_lambda_max_by_hand():
    """L = w_1² w_2 at w = (1, 2). H = [[2 w_2, 2 w_1], [2 w_1, 0]] = [[4, 2], [2, 0]]."""
    w = torch.tensor([1.0, 2.0], requires_grad=True)

    def loss():
        return w[0] ** 2 * w[1]

    # the larger root of λ² - 4 λ - 4 = 0
    assert largest_hessian_eigenvalue([loss], [w]) == pytest.approx(2 + math.sqrt(8), rel=0.01)


def quadratic(H, *parameters):
    """A loss that has the Hessian H, which is symmetric."""
    w = parameters_to_vector(parameters)
    return w @ H @ w / 2


@pytest.mark.parametrize(
    "spectrum",
    [
        [5.0, -5.2, 1.0, 1.0],  # the largest in size is negative
        [-1.0, -2.0, -7.0],
        [-4.0],  # one parameter
        [1e-9, 2e-9, 3e-9],  # nearly flat
        [0.0, 0.0, 0.0],
        [math.nan, math.nan],
    ],
)
def test_lambda_max_of_a_spectrum(spectrum):
    H = torch.diag(torch.tensor(spectrum))
    w = torch.ones(len(spectrum), requires_grad=True)
    lambda_max = largest_hessian_eigenvalue([partial(quadratic, H, w)], [w])
    assert lambda_max == pytest.approx(max(spectrum), rel=0.01, abs=1e-12, nan_ok=True)


def test_lambda_max_of_the_mean_of_random_losses():
    """In several parameters, of which the losses use two."""
    a = random_rows(200).requires_grad_()
    b = random_rows(10, 10).requires_grad_()
    unused = random_rows(3).requires_grad_()
    H = random_rows(3, 300, 300)  # of three losses
    H = H + H.mT
    losses = [partial(quadratic, H_n, a, b) for H_n in H]
    lambda_max = largest_hessian_eigenvalue(losses, [a, b, unused])
    eigenvalues = torch.linalg.eigvalsh(H.mean(dim=0))  # in ascending order
    assert lambda_max == pytest.approx(eigenvalues[-1].item(), rel=0.01)


def test_an_infinite_loss_has_no_lambda_max():
    w = torch.full([4], math.inf, requires_grad=True)
    assert math.isnan(largest_hessian_eigenvalue([w.sum], [w]))  # although it is linear: H = 0


@pytest.fixture
def sharpness_setup(tmp_path, cache):
    """(objective, corpus, s): what measure_sharpness takes.

    A student of one layer, 48 sentences in batches of 24, and Eq. 3 as the only term.
    """
    folder = small_bert(tmp_path, num_hidden_layers=1, hidden_size=16, intermediate_size=16)
    encoder = load_encoder(str(folder))
    corpus = Corpus(load_cache(str(cache)), encoder)
    s = Settings(lambda1=0, lambda3=0, anchored_layers=1, batch_size=24)
    W = 1e-3 * random_rows(16, 8, dtype=torch.float32)  # λ_max in W would be far larger
    return Objective(encoder, [W], s), corpus, s


def test_sharpness_is_that_of_the_loss_in_the_students_weights(sharpness_setup):
    """Dropout is on before and after, and off while λ_max is measured.

    Eq. 3 over 48 sentences is the mean of Eq. 3 over two batches of 24.
    """
    objective, corpus, s = sharpness_setup
    objective.train()
    sharpness = measure_sharpness(objective, corpus, s)
    model = objective.model
    assert model.training
    assert model.config._attn_implementation == "sdpa"
    model.eval()
    model.set_attn_implementation("eager")
    tokens, teacher, _ = corpus.batch(torch.arange(48))

    def loss():
        projected = model(**tokens).last_hidden_state[:, 0] @ objective.projections[0]
        return s.lambda2 * (1 - torch.cosine_similarity(projected, teacher)).mean()

    expected = largest_hessian_eigenvalue([loss], model.parameters())
    assert sharpness == pytest.approx(expected, rel=0.01)


def test_sharpness_is_over_the_same_two_batches_whatever_the_seed(sharpness_setup):
    objective, corpus, s = sharpness_setup
    sentences = set()

    def note_sentences(module, inputs):
        for ids in inputs[0]:
            sentences.add(tuple(ids[ids != 0].tolist()))  # 0 is padding

    objective.model.get_input_embeddings().register_forward_pre_hook(note_sentences)
    for seed in (1, 2):
        measure_sharpness(objective, corpus, replace(s, batch_size=5, seed=seed))
    assert len(sentences) == 2 * 5
