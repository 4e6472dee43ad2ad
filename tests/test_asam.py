"""ASAM and SAM (Eqs. 2, 8, 9), then λ_max (Table 4): by hand, then against plain formulas."""

import math
from dataclasses import replace
from functools import partial

import pytest
import torch
from helpers import random_rows, small_bert
from torch.nn import Parameter
from torch.nn.utils import parameters_to_vector, vector_to_parameters
from torch.optim import SGD, AdamW

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


def new_layer():
    """A linear layer, and its optimizer, with a learning rate for each of two parameters."""
    torch.manual_seed(0)
    layer = torch.nn.Linear(4, 3)
    groups = [{"params": [layer.weight]}, {"params": [layer.bias], "lr": 0.05}]
    return layer, AdamW(groups, lr=0.01, weight_decay=0.1)


@pytest.mark.parametrize("adaptive, eta", [(True, 0.0), (True, 0.1), (False, 0.0)])
def test_ten_steps_are_those_of_equation_2(adaptive, eta):
    """Here w is one vector, of all parameters."""
    x = random_rows(20, 4, dtype=torch.float32)
    layer, adamw = new_layer()
    asam = ASAM(adamw, 0.5, eta, adaptive)
    for _ in range(10):
        layer(x).square().mean().backward()
        asam.ascent_step()
        layer(x).square().mean().backward()
        asam.descent_step()

    expected, adamw = new_layer()
    parameters = list(expected.parameters())
    for _ in range(10):
        w = parameters_to_vector(parameters).detach()
        gradient = torch.autograd.grad(expected(x).square().mean(), parameters)
        gradient = parameters_to_vector(gradient)
        T = w.abs() + eta if adaptive else torch.ones_like(w)
        epsilon = 0.5 * T**2 * gradient / (T * gradient).norm()
        vector_to_parameters(w + epsilon, parameters)
        adamw.zero_grad()
        expected(x).square().mean().backward()
        vector_to_parameters(w, parameters)
        adamw.step()
    torch.testing.assert_close(layer.state_dict(), expected.state_dict())


@pytest.mark.parametrize("size, length", [(1e6, 0.5), (1e-6, 0.5), (1e-15, 0), (0, 0)])
def test_the_ascent_step_has_the_length_rho_unless_the_gradient_is_zero(size, length):
    w = Parameter(torch.zeros(4))
    w.grad = size * torch.ones(4)
    ASAM(SGD([w]), rho=0.5, adaptive=False).ascent_step()
    assert w.norm().item() == pytest.approx(length)


def test_w_comes_back_to_the_bit():
    before = random_rows(99, dtype=torch.float32)
    w = Parameter(before.clone())
    asam = ASAM(SGD([w]), rho=2.0)
    for _ in range(2):  # the second ascent, too, begins at w: the first had no descent
        w.grad = torch.ones(99)
        asam.ascent_step()
        assert (w - before).norm() > 0.1
    asam.descent_step()  # there is no gradient at w̃
    assert torch.equal(w, before)


def test_a_parameter_without_gradient_stays():
    w = Parameter(torch.ones(2))
    late = Parameter(torch.ones(2))
    asam = ASAM(SGD([w, late], lr=0.5), rho=2.0)
    asam.ascent_step()  # no gradient at all
    assert w.tolist() == [1, 1]
    w.grad = torch.ones(2)
    asam.ascent_step()
    assert late.tolist() == [1, 1]
    late.grad = torch.ones(2)  # at w̃ it has one, and w none
    asam.descent_step()
    assert w.tolist() == [1, 1]
    assert late.tolist() == [1 - 0.5, 1 - 0.5]


# --------------------------------------------------------------------------------- λ_max, Table 4
def test_lambda_max_by_hand():
    """L = w_1² w_2 at w = (1, 2). H = [[2 w_2, 2 w_1], [2 w_1, 0]] = [[4, 2], [2, 0]]."""
    w = torch.tensor([1.0, 2.0], requires_grad=True)

    def loss():
        return w[0] ** 2 * w[1]

    # λ² - 4 λ - 4 = 0
    assert largest_hessian_eigenvalue([loss], [w]) == pytest.approx(2 + math.sqrt(8), rel=0.01)


def quadratic(H, *parameters):
    """A loss that has the Hessian H, which is symmetric."""
    w = parameters_to_vector(parameters)
    return w @ H @ w / 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    "spectrum",
    [
        [5.0, -5.2, 1.0, 1.0],  # the largest in size is negative
        [-1.0, -2.0, -7.0],
        [-4.0],  # one parameter
        [2.0, 2.0, 2.0],
        [1e-9, 2e-9, 3e-9],  # nearly flat
        [0.0, 0.0, 0.0],
        [math.nan, math.nan],
    ],
)
def test_lambda_max_of_a_spectrum(spectrum, dtype):
    H = torch.diag(torch.tensor(spectrum, dtype=dtype))
    w = torch.ones(len(spectrum), dtype=dtype, requires_grad=True)
    lambda_max = largest_hessian_eigenvalue([partial(quadratic, H, w)], [w])
    assert lambda_max == pytest.approx(max(spectrum), rel=0.01, abs=1e-12, nan_ok=True)


def test_lambda_max_of_a_random_matrix():
    H = random_rows(300, 300)
    H = H + H.T
    w = random_rows(300).requires_grad_()
    lambda_max = largest_hessian_eigenvalue([partial(quadratic, H, w)], [w])
    assert lambda_max == pytest.approx(torch.linalg.eigvalsh(H)[-1].item(), rel=0.01)


def test_lambda_max_of_the_mean_of_several_losses():
    """In several parameters, of which the losses use two."""
    a = random_rows(8).requires_grad_()
    b = random_rows(2, 2).requires_grad_()
    unused = random_rows(3).requires_grad_()
    H = random_rows(3, 12, 12)
    H = H + H.mT
    losses = [partial(quadratic, H_n, a, b) for H_n in H]
    lambda_max = largest_hessian_eigenvalue(losses, [a, b, unused])
    expected = torch.linalg.eigvalsh(H.mean(dim=0))[-1]
    assert lambda_max == pytest.approx(expected.item(), rel=0.01)


def test_lambda_max_of_a_linear_loss_is_zero():
    w = random_rows(4).requires_grad_()
    assert largest_hessian_eigenvalue([w.sum], [w]) == 0


def test_lambda_max_of_a_loss_that_is_not_finite():
    """Its Hessian would be 0."""
    w = (math.inf * torch.ones(4)).requires_grad_()
    assert math.isnan(largest_hessian_eigenvalue([w.sum], [w]))


@pytest.fixture
def student(tmp_path, cache):
    """(objective, corpus, s): Eq. 3 alone, for a student of one layer; 48 sentences."""
    folder = small_bert(tmp_path, num_hidden_layers=1, hidden_size=16, intermediate_size=16)
    encoder = load_encoder(str(folder))
    corpus = Corpus(load_cache(str(cache)), encoder)
    s = Settings(lambda1=0, lambda3=0, anchored_layers=1, batch_size=24)
    W = 1e-3 * random_rows(16, 8, dtype=torch.float32)  # as a run starts: sharp in W
    return Objective(encoder, [W], s), corpus, s


def test_sharpness_is_that_of_the_loss_in_the_students_weights(student):
    """Without dropout. The mean of Eq. 3 over two batches of 24 is that over all 48 sentences."""
    objective, corpus, s = student
    objective.train()
    sharpness = measure_sharpness(objective, corpus, s)
    model = objective.model.eval()
    model.set_attn_implementation("eager")
    tokens, teacher, _ = corpus.batch(torch.arange(48))

    def loss():
        projected = model(**tokens).last_hidden_state[:, 0] @ objective.projections[0]
        return s.lambda2 * (1 - torch.cosine_similarity(projected, teacher)).mean()

    expected = largest_hessian_eigenvalue([loss], model.parameters())
    assert sharpness == pytest.approx(expected, rel=0.01)


def test_sharpness_is_over_the_same_two_batches_whatever_the_seed(student):
    objective, corpus, s = student
    sentences = set()

    def note_sentences(module, inputs):
        for ids in inputs[0]:
            sentences.add(tuple(ids[ids != 0].tolist()))  # 0 is padding

    objective.model.get_input_embeddings().register_forward_pre_hook(note_sentences)
    values = set()
    for seed in (1, 2):
        torch.manual_seed(seed)
        values.add(measure_sharpness(objective, corpus, replace(s, batch_size=5, seed=seed)))
    assert len(sentences) == 2 * 5
    assert len(values) == 1


@pytest.mark.parametrize("training, attention", [(False, "eager"), (True, "sdpa")])
def test_sharpness_leaves_the_model_as_found(student, training, attention):
    objective, corpus, s = student
    objective.train(training)
    objective.model.set_attn_implementation(attention)
    measure_sharpness(objective, corpus, s)
    assert objective.training == objective.model.training == training
    assert objective.model.config._attn_implementation == attention
