"""The losses of Section 3: each worked by hand, then as the paper prints it, in loops.

i and j number the N sentences of a batch. `layers` has one E of shape (N, d_S) for each layer: E[i]
is the student's embedding of sentence i after that layer; a tensor (L, N, d_S) is such a list.
`teacher` has the shape (N, d_T). random_rows(*shape) draws normal numbers in float64, which
gradcheck needs.
assert_close compares a loss with the paper's formula. gradcheck compares the gradient that autograd
gives with finite differences, (L(x + h) - L(x - h)) / 2h, for each entry x of its inputs.
"""

import math

import pytest
import torch
from helpers import SENTENCES, random_rows
from torch import cosine_similarity
from torch.autograd import gradcheck
from torch.testing import assert_close

from support.encoder import pad, tokenize
from support.loading import load_encoder
from talas import (
    Objective,
    Settings,
    disam_objective,
    embed,
    lasd_loss,
    relation_matrix,
    simcse_loss,
    tamd_loss,
    total_loss,
)


# ------------------------------------------------------------------------------------ TAMD, Eq. 3
@pytest.mark.parametrize("length", [1.0, 1e-15, 1e15])  # a cosine ignores the lengths
def test_tamd_by_hand(length):
    embeddings = torch.tensor([[1.0, 0.0], [0.0, 2.0]])
    W = 1e-3 * torch.eye(2)
    # the first is in the direction of its embedding, the second at an angle of 135 degrees
    teacher = length * torch.tensor([[3.0, 0.0], [1.0, -1.0]])
    loss = tamd_loss([embeddings], [W], teacher)
    assert loss.item() == pytest.approx(((1 - 1) + (1 - math.cos(math.radians(135)))) / 2)


def test_tamd_is_equation_3():
    layers = random_rows(2, 5, 4, seed=0).requires_grad_()  # k + 1 = 2 layers, N = 5, d_S = 4
    projections = random_rows(2, 4, 6, seed=1).requires_grad_()  # d_T = 6
    teacher = random_rows(5, 6, seed=2)
    total = 0.0
    for E, W in zip(layers, projections):
        for i in range(5):
            projected = E[i] @ W
            cosine = projected @ teacher[i] / (projected.norm() * teacher[i].norm())
            total += 1 - cosine
    assert_close(tamd_loss(layers, projections, teacher), total / (2 * 5))
    assert gradcheck(tamd_loss, (layers, projections, teacher))


def test_tamd_needs_a_projection_for_each_layer():
    with pytest.raises(ValueError):
        tamd_loss(random_rows(2, 5, 4), random_rows(1, 4, 6), random_rows(5, 6))


# ------------------------------------------------------------------------------- LASD, Eqs. 4 and 5
def test_lasd_by_hand():
    same = 3 * torch.ones(2, 2)  # two sentences in one direction
    orthogonal = 5 * torch.eye(2)
    assert_close(relation_matrix(same), torch.ones(2, 2))
    assert_close(relation_matrix(orthogonal), torch.eye(2))
    first_pair = (0 + 0 + 0 + 0) / 2**2
    second_pair = (0 + 1 + 1 + 0) / 2**2
    loss = lasd_loss([same, same, orthogonal])
    assert loss.item() == pytest.approx((first_pair + second_pair) / 2)


@pytest.mark.parametrize("detach_guide", [False, True])
def test_lasd_is_equations_4_and_5(detach_guide):
    layers = random_rows(3, 4, 2).requires_grad_()  # L = 3, N = 4, d_S = 2
    total = 0.0
    for lower, upper in zip(layers[:-1], layers[1:]):
        for i in range(4):
            for j in range(4):
                R_lower = cosine_similarity(lower[i], lower[j], dim=0)
                R_upper = cosine_similarity(upper[i], upper[j], dim=0)
                if detach_guide:  # a fixed target
                    R_upper = R_upper.detach()
                total += (R_upper - R_lower) ** 2
    expected = total / (2 * 4**2)  # L - 1 = 2 pairs of layers, N² = 16 entries of R
    loss = lasd_loss(layers, detach_guide)
    assert_close(loss, expected)
    # not gradcheck, whose finite differences would also move the detached guide
    gradient = torch.autograd.grad(loss, layers)
    assert_close(gradient, torch.autograd.grad(expected, layers))


# ---------------------------------------------------------------------------------- SimCSE, Eq. 6
def test_simcse_by_hand():
    z = torch.eye(2)
    z_prime = 3 * torch.eye(2)  # cos / tau is 1 / 0.5 for i = j, else 0
    loss = simcse_loss(z, z_prime, 0.5)
    assert loss.item() == pytest.approx(-math.log(math.exp(2) / (math.exp(2) + math.exp(0))))


def test_simcse_is_equation_6():
    z = random_rows(4, 5, seed=0).requires_grad_()
    z_prime = random_rows(4, 5, seed=1).requires_grad_()
    tau = 0.2
    total = 0.0
    for i in range(4):
        exponentials = []
        for j in range(4):
            cosine = cosine_similarity(z[i], z_prime[j], dim=0)
            exponentials.append(torch.exp(cosine / tau))
        total -= torch.log(exponentials[i] / sum(exponentials))
    assert_close(simcse_loss(z, z_prime, tau), total / 4)
    assert gradcheck(simcse_loss, (z, z_prime, tau))


# ------------------------------------------------------------------------------ total loss, Eq. 7
@pytest.mark.parametrize(
    "lasd_layers, chained, detach_guide",
    [(3, 3, True), (0, 4, False)],  # 0: all layers
)
def test_total_loss_is_equation_7(lasd_layers, chained, detach_guide):
    """SimCSE compares both views of the last layer. TAMD and LASD see first views of top layers."""
    layers = random_rows(4, 2, 5, 3, seed=0).requires_grad_()  # L = 4, two views, N = 5, d_S = 3
    projections = random_rows(2, 3, 6, seed=1)
    teacher = random_rows(5, 6, seed=2)
    s = Settings(
        lambda1=0.3,
        lambda2=0.5,
        lambda3=0.7,
        temperature=0.2,
        anchored_layers=2,
        lasd_layers=lasd_layers,
        detach_guide=detach_guide,
    )
    loss, terms = total_loss(layers, projections, teacher, s)
    first_views = layers[:, 0]
    simcse = simcse_loss(layers[-1, 0], layers[-1, 1], 0.2)
    tamd = tamd_loss(first_views[-2:], projections, teacher)  # of the top 2 layers
    lasd = lasd_loss(first_views[-chained:], detach_guide)
    expected = 0.3 * simcse + 0.5 * tamd + 0.7 * lasd
    assert_close(terms, {"simcse": simcse, "tamd": tamd, "lasd": lasd})
    assert_close(loss, expected)
    gradient = torch.autograd.grad(loss, layers)  # detach_guide changes only the gradient
    assert_close(gradient, torch.autograd.grad(expected, layers))


# ------------------------------------------------------------------------------ DISAM, Eqs. 10-12
def test_disam_objective_by_hand():
    losses = torch.tensor([4.0, 2.0, 8.0])
    counts = torch.tensor([1, 2, 1])
    mean = 4 * 1 / 4 + 2 * 2 / 4 + 8 * 1 / 4
    squared_differences = (4 - 2) ** 2 + (4 - 8) ** 2 + (2 - 8) ** 2
    # Eq. 12 counts each pair of domains twice, as (i, j) and as (j, i)
    variance = 2 * squared_differences / (2 * 3**2)
    objective = disam_objective(losses, counts, 0.5)
    assert objective.item() == pytest.approx(mean - 0.5 * variance)


def test_disam_objective_is_equations_10_to_12():
    losses = random_rows(4).requires_grad_()  # of M = 4 domains
    counts = torch.tensor([3, 1, 2, 1])  # of 7 sentences
    mean = 0.0
    variance = 0.0
    for i in range(4):
        mean += counts[i] / 7 * losses[i]
        for j in range(4):
            variance += (losses[i] - losses[j]) ** 2 / (2 * 4**2)
    assert_close(disam_objective(losses, counts, 0.3), mean - 0.3 * variance)
    assert gradcheck(disam_objective, (losses, counts, 0.3))


# -------------------------------------------------------------- the student's embeddings, Section 3
@pytest.fixture
def encoder(bert):
    """A small BERT of 3 layers and 32 dimensions, with [CLS] pooling."""
    return load_encoder(str(bert))


@pytest.fixture
def tokens(encoder):
    """48 sentences, of five lengths, as one batch."""
    return pad(tokenize(encoder, SENTENCES), range(48), encoder.model)


def test_each_view_has_its_own_dropout(encoder, tokens):
    encoder.model.train()
    view, other_view = embed(encoder, tokens, Settings(), views=2)[-1]
    assert (view != other_view).any(dim=1).all()


def test_without_simcse_a_sentence_goes_through_the_student_once(encoder, tokens):
    sizes = []

    def note_size(module, inputs, output):
        sizes.append(len(output))

    encoder.model.embeddings.register_forward_hook(note_size)
    Objective(encoder, [], Settings(lambda1=0, lambda2=0))(tokens, None)
    assert sum(sizes) == 48  # a sum, because a CPU takes a batch in pieces


def test_bfloat16_is_for_training_alone_and_not_for_pooling(encoder, tokens):
    s = Settings(precision="bfloat16")
    encoder.model.eval()
    exact = embed(encoder, tokens, Settings())[-1]
    assert torch.equal(embed(encoder, tokens, s)[-1], exact)
    encoder.model.train()
    assert embed(encoder, tokens, s)[-1].dtype == torch.float32
