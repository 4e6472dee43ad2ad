"""Another right solution of the exercises; test_assignments.py plants mistakes in it."""

import torch
import torch.nn.functional as F
from torch.nn.utils import parameters_to_vector


def tamd_gradient(projected, teacher):
    return torch.func.grad(cosine_distance)(projected, teacher)


def asam_ascent(w, gradient, rho, eta):
    T = w.abs() + eta
    return rho * T * T * gradient / (T * gradient).norm()


def cosine_distance(projected, teacher):
    return (1 - F.cosine_similarity(projected, teacher)).mean()


def tamd_loss(layers, projections, teacher):
    total = 0.0
    for E, W in zip(layers, projections, strict=True):
        total = total + cosine_distance(E @ W, teacher)
    return total / len(layers)


def relation_matrix(E):
    return F.cosine_similarity(E[:, None], E[None], dim=-1)


def lasd_loss(layers, detach_guide=False):
    total = 0.0
    for lower, upper in zip(layers, layers[1:]):
        guide = relation_matrix(upper)
        if detach_guide:
            guide = guide.detach()
        total = total + ((guide - relation_matrix(lower)) ** 2).mean()
    return total / (len(layers) - 1)


def simcse_loss(z, z_prime, temperature):
    cosines = F.cosine_similarity(z[:, None], z_prime[None], dim=-1) / temperature
    return (cosines.logsumexp(1) - cosines.diagonal()).mean()


class ASAM:
    def __init__(self, optimizer, rho, eta=0.0, adaptive=True):
        self.optimizer = optimizer
        self.rho = rho
        self.eta = eta
        self.adaptive = adaptive
        self.w = {}

    def ascent_step(self):
        T = {}
        for group in self.optimizer.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self.w[p] = p.data.clone()
                    T[p] = p.abs() + self.eta if self.adaptive else 1.0
        norm = sum((T[p] * p.grad).square().sum() for p in T).sqrt()
        for p in T:
            p.data += self.rho * T[p] ** 2 * p.grad / (norm + 1e-12)
        self.optimizer.zero_grad(set_to_none=False)

    def descent_step(self):
        for p in self.w:
            p.data.copy_(self.w[p])
        self.w = {}
        self.optimizer.step()
        self.optimizer.zero_grad()


def training_step(objective, asam, tokens, teacher, domains, s):
    state = torch.get_rng_state()
    climbed, terms = objective(tokens, teacher, domains if s.optimizer == "disam" else None)
    climbed.backward()
    values = {name: term.item() for name, term in terms.items()}
    if s.optimizer != "adamw":
        asam.ascent_step()
        torch.set_rng_state(state)
        perturbed, _ = objective(tokens, teacher)
        perturbed.backward()
        values["sharpness_gap"] = perturbed.item() - values["loss"]
    asam.descent_step()
    return values


def hessian_vector_product(losses, parameters, v):
    loss = sum(loss() for loss in losses) / len(losses)
    gradient = torch.autograd.grad(loss, parameters, create_graph=True, materialize_grads=True)
    slope = parameters_to_vector(gradient) @ v
    return parameters_to_vector(torch.autograd.grad(slope, parameters, materialize_grads=True))


def power_iteration(losses, parameters, shift):
    generator = torch.Generator().manual_seed(0)
    v = torch.randn(len(parameters_to_vector(parameters)), generator=generator)
    for _ in range(120):
        v = v / v.norm().clamp(min=1e-30)
        shifted = hessian_vector_product(losses, parameters, v) + shift * v
        eigenvalue = (shifted @ v).item() - shift
        v = shifted
    return eigenvalue


def largest_hessian_eigenvalue(losses, parameters):
    largest_in_size = abs(power_iteration(losses, parameters, 0.0))
    return power_iteration(losses, parameters, largest_in_size)
