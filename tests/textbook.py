"""The exercises of docs/assignments in another style than ours; test_assignments.py breaks it."""

import torch
import torch.nn.functional as F


def tamd_gradient(projected, teacher):
    return torch.func.grad(lambda E: tamd_loss([E], [torch.eye(len(E[0]))], teacher))(projected)


def asam_ascent(w, gradient, rho, eta):
    u = (w.abs() + eta) * gradient
    return rho * (w.abs() + eta) * u / u.norm()


def tamd_loss(layers, projections, teacher):
    cosines = [F.cosine_similarity(E @ W, teacher) for E, W in zip(layers, projections)]
    return sum((1 - c).mean() for c in cosines) / len(layers)


def relation_matrix(E):
    return F.cosine_similarity(E[:, None], E[None], dim=-1)


def lasd_loss(layers, detach_guide=False):
    R = [relation_matrix(E) for E in layers]
    D = [(g.detach() if detach_guide else g) - r for g, r in zip(R[1:], R)]
    return sum((d**2).mean() for d in D) / len(D)


def simcse_loss(z, z_prime, temperature):
    cosines = F.cosine_similarity(z[:, None], z_prime[None], dim=-1) / temperature
    return (cosines.logsumexp(1) - cosines.diagonal()).mean()


class ASAM:
    def __init__(self, optimizer, rho, eta=0.0, adaptive=True):
        self.optimizer, self.rho, self.eta, self.adaptive = optimizer, rho, eta, adaptive
        self.w = {}

    def ascent_step(self):
        own = [p for group in self.optimizer.param_groups for p in group["params"]]
        self.w = {p: p.data.clone() for p in own if p.grad is not None}
        T = {p: w.abs() + self.eta if self.adaptive else 1.0 for p, w in self.w.items()}
        norm = sum((T[p] * p.grad).square().sum() for p in T).sqrt()
        [p.data.add_(self.rho * T[p] ** 2 * p.grad / (norm + 1e-12)) for p in T]
        self.optimizer.zero_grad(set_to_none=False)  # a

    def descent_step(self):
        [p.data.copy_(w) for p, w in self.w.items()]
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=False)  # d


def training_step(objective, asam, tokens, teacher, domains, s):
    state = torch.get_rng_state()
    loss, terms = objective(tokens, teacher, *[domains][: s.optimizer == "disam"])
    loss.backward()
    values = {name: term.item() for name, term in terms.items()}
    if s.optimizer != "adamw":
        asam.ascent_step()
        torch.set_rng_state(state)
        (above := objective(tokens, teacher)[0]).backward()
        values["sharpness_gap"] = above.item() - values["loss"]
    asam.descent_step()
    return values


def largest_hessian_eigenvalue(loss_fn, parameters, seed=0):
    losses = loss_fn if isinstance(loss_fn, list) else [loss_fn]

    def flat(loss, **how):
        g = torch.autograd.grad(loss, parameters, allow_unused=True, **how)
        return torch.cat([(0 * p if x is None else x).flatten() for x, p in zip(g, parameters)])

    def power(shift):
        n = sum(p.numel() for p in parameters)
        v = torch.randn(n, generator=torch.Generator().manual_seed(seed))
        for _ in range(200):
            v = (v / v.norm().clamp(min=1e-30)).detach()
            loss = sum(f() for f in losses) / len(losses)
            u = flat(flat(loss, create_graph=True) @ v) + shift * v
            v, value = u, (u @ v).item() - shift
        return value

    return power(abs(power(0.0)))
