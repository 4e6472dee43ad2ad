"""TALAS: distil the cached sentence embeddings of a large teacher into a small student encoder.

    python cache_teacher.py && python talas.py             # the demo: offline, on a laptop's CPU
    python talas.py --teacher bge-m3.pt --student google-bert/bert-base-uncased
    torchrun --nproc_per_node=4 talas.py --teacher ...     # data-parallel, on 4 GPUs

In the paper's order: settings (Appendix E), losses (Eqs. 3-7, 10-12), ASAM (Eq. 2), Algorithm 1,
sharpness (Table 4). N is the batch size, T the number of tokens, L that of the student's layers, K
of the anchored ones, d_S and d_T the two models' dimensions, M the number of a batch's domains.
"""

from dataclasses import dataclass
from functools import partial
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from scipy.sparse.linalg import LinearOperator, eigsh
from torch.nn.utils import get_total_norm, parameters_to_vector
from transformers import HfArgumentParser, get_cosine_schedule_with_warmup
from transformers.hf_argparser import HfArg

from cache_teacher import load_cache
from demo import tiny
from support import fail
from support.data import Corpus, is_word
from support.encoder import pooled_layers, rehearse, save_encoder
from support.loading import load_encoder
from support.run import Run, check_fit, finish, pick_device, seed_of, started

W_START = 1e-3  # standard deviation: Eq. 3's cosine ignores W_l's length, which only slows turning
SHARPNESS_BATCHES = 2  # over which Table 4's λ_max is measured, the same ones whatever the seed


# ---------------------------------------------------------------------------------------- settings
@dataclass(frozen=True)
class Settings:
    """Every setting. The paper's: lambda1-3, lr, epochs, batch_size (Appendix E), K = 2 (Fig. 3).

    Choices, where it is silent (docs/notes.md): temperature, lasd_layers, detach_guide, rho, eta,
    disam_lambda, projection_lr_scale, weight_decay, warmup_ratio, max_length, pooling.
    """

    teacher: str = HfArg(default="teacher.pt", help="the cache; without TAMD, a corpus will do")
    student: str = HfArg(default="tiny", help="Hub id or directory; tiny: a BERT from scratch")
    output: str = HfArg(default="student", help="directory for the distilled student")
    overwrite: bool = HfArg(default=False, help="replace what an earlier run left in output")
    resume: bool = HfArg(default=False, help="go on from the last whole epoch of a run")
    pooling: Literal["auto", "cls", "mean", "last"] = HfArg(default="auto", help="the student's")
    lambda1: float = HfArg(default=0.001, help="weight of SimCSE, Eq. 6")
    lambda2: float = HfArg(default=0.75, help="weight of TAMD, Eq. 3")
    lambda3: float = HfArg(default=1.0, help="weight of LASD, Eq. 5")
    temperature: float = HfArg(default=0.1, help="tau of Eq. 6")
    anchored_layers: int = HfArg(default=2, help="K = k + 1: top layers that TAMD anchors, Eq. 3")
    lasd_layers: int = HfArg(default=0, help="top layers that LASD chains, Eq. 5; 0: all L")
    detach_guide: bool = HfArg(default=False, help="stop LASD's gradient into the upper layers")
    optimizer: Literal["asam", "sam", "disam", "adamw"] = HfArg(default="asam", help="Eqs. 2, 8-12")
    rho: float = HfArg(default=0.05, help="radius of the ascent step, Eq. 2")
    eta: float = HfArg(default=0.0, help="of T_w = |w| + eta, Eq. 2; Algorithm 1's eta is lr")
    disam_lambda: float = HfArg(default=0.1, help="lambda of Eq. 10, against unlike domains")
    lr: float = HfArg(default=2e-5, help="peak learning rate of AdamW, cosine decay to 0")
    projection_lr_scale: float = HfArg(default=5.0, help="learning rate of the W_l, times lr")
    weight_decay: float = HfArg(default=0.01, help="of AdamW, on every parameter")
    warmup_ratio: float = HfArg(default=0.06, help="part of the steps in which lr rises from 0")
    epochs: int = HfArg(default=5, help="passes over the corpus")
    batch_size: int = HfArg(default=32, help="sentences a step, N")
    max_length: int = HfArg(default=256, help="tokens; longer sentences are cut")
    seed: int = HfArg(default=42, help="of initial weights, order and dropout")
    device: str = HfArg(default="auto", help="auto: the accelerator if there is one, else cpu")
    precision: Literal["float32", "bfloat16"] = HfArg(default="float32", help="of matrix products")
    sharpness: bool = HfArg(default=False, help="record lambda_max after each epoch, Table 4")


# ------------------------------------------------------------------------------ losses (Section 3)
def tamd_loss(layers, projections, teacher):
    """Teacher-anchored multi-layer distillation, Eq. 3: 1 - cos(e_l W_l, e^T), mean over K layers.

    layers: the top K, (N, d_S); projections: K of W_l (d_S, d_T), else ValueError; teacher: e^T,
    (N, d_T). A scalar in [0, 2].
    """
    target = F.normalize(teacher, dim=-1, eps=0)
    pairs = zip(layers, projections, strict=True)
    cosines = [(F.normalize(E @ W, dim=-1) * target).sum(-1) for E, W in pairs]  # K of (N,)
    return 1 - torch.stack(cosines).mean()


def relation_matrix(E):
    """Pairwise cosine similarities of a batch, Eq. 4: R = ẼẼᵀ, (N, d_S) -> (N, N)."""
    E = F.normalize(E, dim=-1)
    return E @ E.T


def lasd_loss(layers, detach_guide=False):
    """Layer-aligned self-distillation, Eq. 5: ‖R_{l+1} - R_l‖²_F / N², mean over adjacent layers.

    layers: L >= 2 of (N, d_S), bottom to top. `detach_guide`: R_{l+1} is a fixed target. A scalar.
    """
    R = [relation_matrix(E) for E in layers]  # L of (N, N)
    guides = [r.detach() for r in R[1:]] if detach_guide else R[1:]
    return torch.stack([(guide - r).square().mean() for guide, r in zip(guides, R[:-1])]).mean()


def simcse_loss(z, z_prime, temperature):
    """Unsupervised SimCSE, Eq. 6: two dropout views, (N, d_S), and τ. A scalar."""
    similarities = F.normalize(z, dim=-1) @ F.normalize(z_prime, dim=-1).T / temperature  # (N, N)
    # -log softmax over j, at j = i: the cross entropy of choosing one's own second view
    return F.cross_entropy(similarities, torch.arange(len(z), device=z.device))


def total_loss(layers, projections, teacher, s):
    """The training objective, Eq. 7: (loss, {its terms}), scalars; a term of weight 0 is left out.

    layers: all L, (views, N, d_S); projections: K of W_l (d_S, d_T); teacher: E^T, (N, d_T).
    """
    first = [E[0] for E in layers]  # L of (N, d_S): the view that TAMD and LASD see
    top, chained = first[-s.anchored_layers :], first[-s.lasd_layers :]  # [-0:] is all of them
    simcse = simcse_loss(*layers[-1], s.temperature) if s.lambda1 else 0.0
    tamd = tamd_loss(top, projections, teacher) if s.lambda2 else 0.0
    lasd = lasd_loss(chained, s.detach_guide) if s.lambda3 else 0.0
    loss = s.lambda1 * simcse + s.lambda2 * tamd + s.lambda3 * lasd
    terms = {"simcse": simcse, "tamd": tamd, "lasd": lasd}
    return loss, {name: term for name, term in terms.items() if torch.is_tensor(term)}


def disam_objective(losses, counts, weight):
    """What DISAM climbs on, Eqs. 10-12: Σ α_i L_i - λ Var{L_i} over the M domains of a batch.

    losses: L_i, (M,); counts: sentences of each domain, (M,), of which α_i is the share; weight: λ.
    """
    alpha = counts.to(losses.dtype) / counts.sum()
    variance = (losses[:, None] - losses).square().mean() / 2  # of (M, M) differences, Eq. 12
    return (alpha * losses).sum() - weight * variance


def embed(encoder, tokens, s, views=1):
    """Sentence embeddings after each layer (Section 3): L of e_l, (views, N, d_S).

    encoder: the student; tokens: input_ids, attention_mask, (N, T). Each view has its own dropout.
    """
    tokens = {name: t.repeat(views, 1) for name, t in tokens.items()}  # (views N, T)
    pooled = pooled_layers(encoder, tokens, s.precision)  # L of (views N, d_S)
    return [E.unflatten(0, (views, -1)) for E in pooled]


class Objective(torch.nn.Module):
    """L_total, Eq. 7, as a function of w: the weights of the student and the projections W_l."""

    def __init__(self, encoder, projections, s):
        super().__init__()
        self.encoder, self.s = encoder, s
        self.model = encoder.model  # so that its weights are parameters of this module
        self.projections = torch.nn.ParameterList(projections)

    def forward(self, tokens, teacher, domains=None):
        """(loss, {its terms}) at the present w, Eq. 7; with domains, (N,), Eq. 10 for the loss."""
        views = 2 if self.s.lambda1 else 1
        layers = embed(self.encoder, tokens, self.s, views)  # L of (views, N, d_S)
        loss, terms = total_loss(layers, self.projections, teacher, self.s)
        if domains is None:
            return loss, terms | {"loss": loss}
        # L_i is Eq. 7 on the sentences of domain i alone: their negatives, their R
        present, counts = domains.unique(return_counts=True)  # (M,)
        losses = []
        for d in present:
            own = [E[:, domains == d] for E in layers]
            own_teacher = None if teacher is None else teacher[domains == d]
            losses.append(total_loss(own, self.projections, own_teacher, self.s)[0])
        climbed = disam_objective(torch.stack(losses), counts, self.s.disam_lambda)
        return climbed, terms | {"loss": loss}


# ------------------------------------------------------------------------------------ ASAM (Eq. 2)
class ASAM:
    """Adaptive sharpness-aware minimization, Eq. 2, around an ordinary optimizer.

        L(w).backward();  ascent_step()     # w -> w̃ = w + ε̂
        L(w̃).backward();  descent_step()    # back to w; the optimizer steps by the gradient at w̃

    ε̂ = ρ T_w² ∇L(w) / ‖T_w ∇L(w)‖₂ with T_w = diag(|w| + η); adaptive=False sets T_w = I, which is
    SAM (Eq. 9). After Kwon et al., 2021.
    """

    def __init__(self, optimizer, rho, eta=0.0, adaptive=True):
        self.optimizer, self.rho, self.eta, self.adaptive = optimizer, rho, eta, adaptive
        self.w = {}  # of each parameter that stands at w̃: its w

    @torch.no_grad()
    def ascent_step(self):
        """Move w to w̃ = w + ε̂ and clear the gradients; parameters without one stay at w."""
        self.restore()
        groups = self.optimizer.param_groups
        moved = [p for group in groups for p in group["params"] if p.grad is not None]
        T = {}  # T_w = diag(|w| + η), a tensor a parameter
        for p in moved:
            T[p] = p.abs().add_(self.eta) if self.adaptive else torch.ones_like(p)
            p.grad.mul_(T[p])  # T_w ∇L(w), in the gradient's own memory
        norm = get_total_norm([p.grad for p in moved])  # over all parameters together
        scale = torch.where(norm > 1e-12, self.rho / norm, 0.0)  # next to no gradient: no step
        for p in moved:
            self.w[p] = p.clone()
            p.addcmul_(T[p].mul_(scale), p.grad)  # w̃ = w + ε̂, with ε̂ = ρ T_w / ‖.‖ · T_w ∇L(w)
        self.optimizer.zero_grad()

    @torch.no_grad()
    def restore(self):
        """Put w back exactly, from its copy, if it stands at w̃."""
        for p, w in self.w.items():
            p.copy_(w)
        self.w = {}

    def descent_step(self):
        """Put w back, then step the optimizer with the gradients found at w̃ and clear them."""
        self.restore()
        self.optimizer.step()
        self.optimizer.zero_grad()


# ------------------------------------------------------------------------------------- Algorithm 1
def training_step(objective, asam, tokens, teacher, domains, s):
    """One step of Algorithm 1: w moves. Returns {name: value}, scalars, of what was computed.

    tokens: as in embed(); teacher: E^T, (N, d_T); domains: (N,). sharpness_gap: L(w̃) - L(w).
    """
    # 1. Ascent step, which AdamW alone does not have: there w̃ = w
    if s.optimizer != "adamw":
        devices = [] if domains.device.type == "cpu" else [domains.device]
        with torch.random.fork_rng(devices):  # so that the second pass draws the same masks
            loss, values = objective(tokens, teacher, domains if s.optimizer == "disam" else None)
        loss.backward()  # ∇L(w)
        asam.ascent_step()  # w̃ = ASAM_Perturb(w, ∇L, ρ)
    # 2. Descent step
    perturbed_loss, at_perturbed = objective(tokens, teacher)  # L(w̃)
    perturbed_loss.backward()  # g_ASAM
    asam.descent_step()  # from w, not w̃
    if s.optimizer == "adamw":
        values = at_perturbed
    else:
        values["sharpness_gap"] = perturbed_loss - values["loss"]
    return {name: value.detach() for name, value in values.items()}


def batches(n, s, epoch):
    """The batches B of an epoch, positions (N,) each; what is left over at the end is left out."""
    generator = torch.Generator().manual_seed(seed_of(s.seed, epoch, "order"))
    order = torch.randperm(n, generator=generator)
    return order[: n - n % s.batch_size].split(s.batch_size)


def new_projections(s, encoder, d_T):
    """K new W_l, (d_S, d_T); none without TAMD."""
    if not s.lambda2:
        return []
    shape, device = (encoder.dimensions, d_T), encoder.model.device
    return [torch.randn(shape).mul_(W_START).to(device) for _ in range(s.anchored_layers)]


def make_optimizer(s, objective, steps):
    """(ASAM or SAM around AdamW, the schedule of its rates); the projections' rate is their own."""
    groups = [{"params": list(m.parameters())} for m in (objective.model, objective.projections)]
    groups[1]["lr"] = s.lr * s.projection_lr_scale
    adamw = torch.optim.AdamW(groups, lr=s.lr, weight_decay=s.weight_decay, fused=True)
    scheduler = get_cosine_schedule_with_warmup(adamw, round(s.warmup_ratio * steps), steps)
    return ASAM(adamw, s.rho, s.eta, adaptive=s.optimizer == "asam"), scheduler


def train(s, corpus, objective, after_epoch=lambda epoch: None):
    """Algorithm 1: trains the objective's student and projections in place, batch by batch."""
    run = Run(s, corpus, objective, len(corpus) // s.batch_size)
    asam, scheduler = make_optimizer(s, objective, run.total_steps)
    for epoch in run.start_from(asam.optimizer, scheduler):  # 0, or after the last whole one
        objective.train()
        run.begin_epoch(epoch)  # seeds the dropout masks
        for rows in run.share(batches(len(corpus), s, epoch)):
            tokens, teacher, domains = corpus.batch(rows)  # B, and E^T from the cache
            values = training_step(run.objective, asam, tokens, teacher, domains, s)
            run.step(values, lr=scheduler.get_last_lr()[0])
            scheduler.step()
        sharpness = {"lambda_max": measure_sharpness(objective, corpus, s)} if s.sharpness else {}
        run.end_epoch(sharpness)
        after_epoch(epoch + 1)


# ---------------------------------------------------------------------------- sharpness (Table 4)
def largest_hessian_eigenvalue(loss_fn, parameters, tolerance=3e-3, vectors=8, seed=0):
    """λ_max (Table 4), the algebraically largest eigenvalue of the Hessian H at the parameters.

    loss_fn: a function of nothing that gives a scalar, twice differentiable, or a list of them,
    whose mean is meant. Restarted Lanczos iteration (ARPACK) on products H v, to a relative
    `tolerance`; it keeps `vectors` copies of the parameters in the host's memory. NaN if H is.
    """
    losses, parameters = loss_fn if isinstance(loss_fn, list) else [loss_fn], list(parameters)

    def times_H(v):
        v = torch.from_numpy(v).to(parameters[0]).split([p.numel() for p in parameters])
        total = torch.zeros_like(parameters_to_vector(parameters))
        for loss in losses:  # one graph at a time: that of a second derivative is large
            g = torch.autograd.grad(loss(), parameters, create_graph=True, materialize_grads=True)
            slope = sum((x * y.view_as(x)).sum() for x, y in zip(g, v))  # ∇L · v, whose gradient
            if slope.requires_grad:  # is H v; a linear loss has none
                Hv = torch.autograd.grad(slope, parameters, materialize_grads=True)
                total += parameters_to_vector(Hv) / len(losses)
        return total.detach().cpu().numpy()

    w, generator = parameters_to_vector(parameters), torch.Generator().manual_seed(seed)
    start = torch.randn(len(w), generator=generator, dtype=w.dtype).numpy()
    image = times_H(start)
    if len(start) == 1 or not np.isfinite(image).all() or not image.any():  # H itself, NaN, 0
        return float(start @ image / (start @ start)) if np.isfinite(image).all() else np.nan
    H = LinearOperator((len(start), len(start)), matvec=times_H, dtype=start.dtype)
    how = {"k": 1, "which": "LA", "return_eigenvectors": False, "tol": tolerance, "v0": start}
    return float(eigsh(H, ncv=min(vectors, len(start)), **how)[0])


def measure_sharpness(objective, corpus, s):
    """λ_max of the objective, Eq. 7, in the student's weights: fixed batches, no dropout."""
    model, training = objective.model, objective.training
    fused = model.config._attn_implementation
    order = torch.randperm(len(corpus), generator=torch.Generator().manual_seed(0))
    fixed = [corpus.batch(rows)[:2] for rows in order.split(s.batch_size)[:SHARPNESS_BATCHES]]
    try:
        objective.eval()
        model.set_attn_implementation("eager")  # the fused kernels have no second derivative
        losses = [lambda batch=batch: objective(*batch)[0] for batch in fixed]
        weights = [p for p in model.parameters() if p.requires_grad]
        return largest_hessian_eigenvalue(losses, weights)
    finally:
        model.set_attn_implementation(fused)
        objective.train(training)


# ------------------------------------------------------------------------------------ command line
def parse_settings(argv, kind=Settings, **defaults):
    """Settings from the command line; the tiny student's own defaults are printed."""
    parser = HfArgumentParser(kind, description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.error = fail
    parser.set_defaults(**defaults)
    if parser.parse_args(argv).student == "tiny":
        shown = ", ".join(f"--{name} {value}" for name, value in tiny.SETTINGS.items())
        print("student tiny, from scratch, unless set otherwise:", shown)
        parser.set_defaults(**tiny.SETTINGS)
    return kind(**vars(parser.parse_args(argv)))


def load_student(s, sentences):
    """The student as an Encoder: tiny is made from scratch, with the sentences' own vocabulary."""
    how = {"pooling": s.pooling, "max_length": s.max_length, "device": pick_device(s.device)}
    if is_word(s.student, "tiny"):
        return tiny.tiny_student(sentences, s.seed, **how)
    return load_encoder(s.student, **how)


def save_student(objective, folder):
    """Write the student, and beside it the projections W_l."""
    save_encoder(folder, objective.encoder)
    torch.save([W.detach().cpu() for W in objective.projections], folder / "projections.pt")


def main(argv=None):
    """The command line: read the cache and the student, train, save."""
    s = parse_settings(argv)
    with started(s):
        cache = load_cache(s.teacher, needed=s.lambda2 > 0)
        torch.manual_seed(s.seed)
        encoder = load_student(s, cache["sentences"])
        corpus = Corpus(cache, encoder)
        objective = Objective(encoder, new_projections(s, encoder, corpus.d_T), s)
        check_fit(s, encoder, corpus)
        rehearse(encoder, corpus, two_views=s.lambda1 > 0)
        train(s, corpus, objective)
        finish(s, cache, partial(save_student, objective))


if __name__ == "__main__":
    main()
