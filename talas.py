"""TALAS: distil the cached sentence embeddings of a large teacher into a small student encoder.

    python cache_teacher.py && python talas.py             # the demo: offline, on a laptop's CPU
    python talas.py --teacher bge-m3.pt --student google-bert/bert-base-uncased
    torchrun --nproc_per_node=4 talas.py --teacher ...     # data-parallel, on 4 GPUs

In the paper's order: settings (Appendix E), losses (Eqs. 3-7, 10-12), ASAM (Eq. 2), Algorithm 1,
sharpness (Table 4). N is the batch size, T the number of tokens, L that of the student's layers,
d_S and d_T the two models' dimensions.
"""

from support import fail, one_line
from support import run as runs
from support.encoder import Corpus, hidden_states, pieces_of_like_length, pool, save_encoder
from support.loading import load_encoder

import math
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from scipy.linalg import eigh_tridiagonal
from transformers import HfArgumentParser, get_cosine_schedule_with_warmup
from transformers.hf_argparser import HfArg

from cache_teacher import load_cache
from demo import tiny


# ---------------------------------------------------------------------------------------- settings
@dataclass(frozen=True)
class Settings:
    """Every setting. The paper's: lambda1-3, lr, epochs, batch_size (Appendix E), K = 2 (Fig. 3).

    Choices, where it is silent (docs/notes.md): tau, rho, eta, weight decay, warm-up, W_l's rate.
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
    optimizer: Literal["asam", "sam", "disam", "adamw"] = HfArg(default="asam", help="Eqs. 2-12")
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


SHARPNESS_BATCHES = 2  # over which λ_max is measured
METRICS = ["simcse", "tamd", "lasd", "loss", "sharpness_gap"]  # the gap is L(w̃) - L(w)


# ------------------------------------------------------------------------------ losses (Section 3)
def tamd_loss(layers, projections, teacher, reduction="mean"):
    """Teacher-anchored multi-layer distillation, Eq. 3: 1 - cos(e_l W_l, e^T), mean over K layers.

    layers: the top K, (N, d_S); projections: K of W_l (d_S, d_T), else ValueError; teacher: e^T,
    (N, d_T). A scalar in [0, 2], or with reduction="none" each sentence's own, (N,).
    """
    pairs = zip(layers, projections, strict=True)
    distances = [1 - F.cosine_similarity(E @ W, teacher, dim=-1) for E, W in pairs]
    losses = torch.stack(distances).mean(0)  # (K, N) -> (N,)
    return losses.mean() if reduction == "mean" else losses


def relation_matrix(E):
    """Pairwise cosine similarities of a batch, Eq. 4: R = ẼẼᵀ, (N, d_S) -> (N, N)."""
    E = F.normalize(E, dim=-1)
    return E @ E.T


def lasd_loss(layers, detach_guide=False):
    """Layer-aligned self-distillation, Eq. 5: ‖R_{l+1} - R_l‖²_F / N², mean over adjacent layers.

    layers: L >= 2 of (N, d_S), bottom to top. `detach_guide` makes R_{l+1} a fixed target for R_l.
    """
    R = [relation_matrix(E) for E in layers]  # L of (N, N)
    guides = [r.detach() for r in R[1:]] if detach_guide else R[1:]
    return torch.stack([(guide - r).square().mean() for guide, r in zip(guides, R[:-1])]).mean()


def simcse_loss(z, z_prime, temperature, reduction="mean"):
    """Unsupervised SimCSE, Eq. 6: two dropout views, (N, d_S), and τ.

    A scalar, or with reduction="none" each sentence's own, (N,).
    """
    similarities = F.normalize(z, dim=-1) @ F.normalize(z_prime, dim=-1).T / temperature  # (N, N)
    # -log softmax over j, at j = i: the cross entropy of choosing one's own second view
    return F.cross_entropy(similarities, torch.arange(len(z), device=z.device), reduction=reduction)


def embed(student, tokens, s, views=1):
    """Sentence embeddings after each layer (Section 3): L of e_l, (views, N, d_S).

    student: an Encoder; tokens: a batch, input_ids and attention_mask, (N, T). Each view has
    dropout masks of its own. On a CPU the batch goes through in pieces of sentences of like length.
    """
    model, pooled = student.model, []
    order, pieces = pieces_of_like_length({k: t.repeat(views, 1) for k, t in tokens.items()})
    in_bfloat16 = s.precision == "bfloat16" and model.training
    for piece in pieces:
        with torch.autocast(model.device.type, torch.bfloat16, enabled=in_bfloat16):
            hidden = hidden_states(model, piece)  # L of (n, T, d_S)
        mask = piece["attention_mask"]
        pooled.append([pool(h.to(model.dtype), mask, student.pooling) for h in hidden])
    restore = order.argsort()
    return [torch.cat(E)[restore].unflatten(0, (views, -1)) for E in zip(*pooled, strict=True)]


def total_loss(student, projections, tokens, teacher, s, reduction="mean"):
    """The training objective, Eq. 7, on one batch: (loss, [simcse, tamd, lasd]).

    tokens: as in embed(); teacher: E^T, (N, d_T), the cached targets; s: Settings. A term of weight
    0 is not computed. With reduction="none" the loss is each sentence's own, (N,), of which LASD, a
    property of the whole batch, is a shared part.
    """
    layers = embed(student, tokens, s, views=2 if s.lambda1 else 1)  # L of (2 or 1, N, d_S)
    first = [E[0] for E in layers]  # L of (N, d_S): the view that TAMD and LASD see
    L, N = len(layers), len(first[0])
    simcse = tamd = first[0].new_zeros(N if reduction == "none" else ())
    lasd = first[0].new_zeros(())
    if s.lambda1:
        z, z_prime = layers[-1]
        simcse = simcse_loss(z, z_prime, s.temperature, reduction)
    if s.lambda2:
        tamd = tamd_loss(first[L - s.anchored_layers :], projections, teacher, reduction)
    if s.lambda3:
        chained = s.lasd_layers or L
        lasd = lasd_loss(first[L - chained :], s.detach_guide)
    loss = s.lambda1 * simcse + s.lambda2 * tamd + s.lambda3 * lasd
    return loss, [simcse.mean(), tamd.mean(), lasd]


def disam_objective(losses, domains, weight):
    """What DISAM climbs on, Eqs. 10-12: Σ α_i L_i - λ Var{L_i} over the M domains of a batch.

    losses: (N,), each sentence's; domains: (N,), integers; weight: λ. L_i is the mean loss of
    domain i, α_i its share of the batch. One domain has no variance, so that SAM is left.
    """
    _, index, counts = domains.unique(return_inverse=True, return_counts=True)
    L = torch.zeros_like(counts, dtype=losses.dtype).index_add(0, index, losses) / counts  # (M,)
    alpha = counts / len(losses)
    variance = (L[:, None] - L[None, :]).square().sum() / (2 * len(L) ** 2)  # Eq. 12
    return (alpha * L).sum() - weight * variance


class Objective(torch.nn.Module):
    """L_total as a function of w, the weights of the student and the projections W_l, Eq. 7."""

    metrics = METRICS

    def __init__(self, student, projections, s):
        super().__init__()
        self.student, self.s, self.model = student, s, student.model
        self.projections = torch.nn.ParameterList(projections)

    def forward(self, tokens, teacher, reduction="mean"):
        """total_loss at the present w."""
        return total_loss(self.student, self.projections, tokens, teacher, self.s, reduction)


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
        self.moved, self.w = [], {}  # the parameters that stand at w̃; copies of w, kept for reuse

    @torch.no_grad()
    def ascent_step(self):
        """Move w to w̃ = w + ε̂ and clear the gradients; parameters without one stay at w."""
        self.restore()
        groups = self.optimizer.param_groups
        self.moved = w = [p for group in groups for p in group["params"] if p.grad is not None]
        if not w:
            return
        self.w |= {p: torch.empty_like(p) for p in w if p not in self.w}
        torch._foreach_copy_([self.w[p] for p in w], w)
        # T, Tg: lists, a tensor a parameter; torch._foreach_... does the same to each of a list
        T = torch._foreach_abs(w) if self.adaptive else [torch.ones_like(p) for p in w]
        if self.adaptive:
            torch._foreach_add_(T, self.eta)  # T_w = |w| + η
        Tg = [p.grad.mul_(t) for p, t in zip(w, T)]  # T_w ∇L(w), in the gradient's own memory
        norm = torch.nn.utils.get_total_norm(Tg)  # ‖T_w ∇L(w)‖₂, over all parameters together
        torch._foreach_mul_(T, self.rho / norm.clamp(min=1e-30))  # a zero gradient: no step
        torch._foreach_addcmul_(w, T, Tg)  # w̃ = w + ε̂, with ε̂ = ρ T_w / ‖T_w ∇L(w)‖₂ · T_w ∇L(w)
        self.optimizer.zero_grad()

    @torch.no_grad()
    def restore(self):
        """Put w back exactly, from its copy, if it stands at w̃."""
        if self.moved:
            torch._foreach_copy_(self.moved, [self.w[p] for p in self.moved])
        self.moved = []

    def descent_step(self):
        """Put w back, then step the optimizer with the gradients found at w̃ and clear them."""
        self.restore()
        self.optimizer.step()
        self.optimizer.zero_grad()


# ------------------------------------------------------------------------------------- Algorithm 1
def training_step(objective, asam, tokens, teacher, domains, s):
    """One step of Algorithm 1: w moves. Returns the values that objective.metrics names."""
    devices = [] if domains.device.type == "cpu" else [domains.device]
    if s.optimizer == "adamw":  # no ascent step: w̃ = w
        loss, terms = objective(tokens, teacher)
        perturbed_loss = loss
    else:  # 1. Ascent step
        # afterwards the random state is what it was: the second pass draws the same dropout masks
        with torch.random.fork_rng(devices):
            if s.optimizer == "disam":
                losses, terms = objective(tokens, teacher, reduction="none")  # (N,)
                loss = losses.mean()
                disam_objective(losses, domains, s.disam_lambda).backward()
            else:
                loss, terms = objective(tokens, teacher)  # L(w)
                loss.backward()
        asam.ascent_step()  # w̃ = ASAM_Perturb(w, ∇L, ρ)
        perturbed_loss, _ = objective(tokens, teacher)  # L(w̃)
    # 2. Descent step
    perturbed_loss.backward()  # g_ASAM
    asam.descent_step()  # from w, not w̃
    return torch.stack([*terms, loss, perturbed_loss - loss]).detach()


def batches(n, s, epoch):
    """The batches B of an epoch, positions (N,) each; of each process its own.

    An incomplete one is left out: it would have fewer negatives in Eq. 6.
    """
    generator = torch.Generator().manual_seed(runs.seed_of(s.seed, epoch, "order"))
    order = torch.randperm(n, generator=generator)
    return runs.share(order[: n - n % s.batch_size].split(s.batch_size))


def set_up(s, student, d_T, steps, kind=Objective):
    """(objective, ASAM, scheduler): AdamW, warm-up and cosine over all steps, in ASAM or SAM."""
    # The cosine of Eq. 3 ignores the length of W_l, which only slows its turning: start small.
    K = s.anchored_layers if s.lambda2 else 0
    projections = [torch.randn(student.dimensions, d_T) * 1e-3 for _ in range(K)]  # (d_S, d_T)
    objective = kind(student, projections, s).to(student.model.device)
    groups = [{"params": list(student.model.parameters())}]
    groups.append({"params": list(objective.projections), "lr": s.lr * s.projection_lr_scale})
    adamw = torch.optim.AdamW(groups, lr=s.lr, weight_decay=s.weight_decay, fused=True)
    scheduler = get_cosine_schedule_with_warmup(adamw, round(s.warmup_ratio * steps), steps)
    return objective, ASAM(adamw, s.rho, s.eta, adaptive=s.optimizer == "asam"), scheduler


def train(s, corpus, student, kind=Objective):
    """Algorithm 1: trains the student in place, for an objective of that kind; returns its W_l."""
    steps = len(batches(len(corpus), s, 0))  # of an epoch
    d_T = corpus.embeddings.shape[1] if s.lambda2 else 0
    objective, asam, scheduler = set_up(s, student, d_T, s.epochs * steps, kind)
    parts = {"weights": objective, "adamw": asam.optimizer, "scheduler": scheduler}
    checkpoint = runs.Checkpoint(s, corpus.identity(), parts)
    first_epoch = checkpoint.begin()
    log = runs.Log(s, objective.metrics, steps, first_epoch, student.model.device)
    parallel = runs.data_parallel(objective)
    for epoch in range(first_epoch, s.epochs):
        student.model.train()
        runs.seed_dropout(s.seed, epoch)
        log.begin()
        for rows in batches(len(corpus), s, epoch):
            tokens, teacher, domains = corpus.batch(rows)  # B, and E^T from the cache
            values = training_step(parallel, asam, tokens, teacher, domains, s)
            log.step(values, lr=scheduler.get_last_lr()[0])
            scheduler.step()
        log.epoch(lambda_max=measure_sharpness(objective, corpus, s) if s.sharpness else None)
        checkpoint.save(epoch + 1)
    return objective.projections


# ---------------------------------------------------------------------------- sharpness (Table 4)
def largest_hessian_eigenvalue(loss_fn, parameters, iterations=40, seed=0):
    """λ_max (Table 4), the algebraically largest eigenvalue of the Hessian H at the parameters.

    loss_fn: a function of nothing that gives a scalar, twice differentiable, or a list of them,
    whose mean is meant. Lanczos iteration on products H v: in the basis of the v, H is tridiagonal
    with α on the diagonal and β beside it, and the ends of its spectrum are soon those of H.
    """
    losses, parameters = loss_fn if isinstance(loss_fn, list) else [loss_fn], list(parameters)

    def times_H(v):
        total = [torch.zeros_like(p) for p in parameters]
        for loss in losses:  # one graph at a time: that of a second derivative is large
            g = torch.autograd.grad(loss(), parameters, create_graph=True, materialize_grads=True)
            slope = sum((x * y).sum() for x, y in zip(g, v))  # ∇L · v, whose gradient is H v
            if slope.requires_grad:  # not where the loss is linear
                Hv = torch.autograd.grad(slope, parameters, materialize_grads=True)
                torch._foreach_add_(total, Hv, alpha=1 / len(losses))
        return total

    def dot(x, y):
        return sum((a.double() * b).sum().item() for a, b in zip(x, y))

    generator, alphas, betas = torch.Generator().manual_seed(seed), [], []
    u = [torch.randn(p.shape, generator=generator, dtype=p.dtype).to(p.device) for p in parameters]
    v, beta = [torch.zeros_like(p) for p in parameters], math.sqrt(dot(u, u))
    for _ in range(iterations):
        before, v = v, torch._foreach_div(u, beta)
        u = times_H(v)
        alphas.append(dot(u, v))
        torch._foreach_sub_(u, torch._foreach_mul(v, alphas[-1]))
        torch._foreach_sub_(u, torch._foreach_mul(before, betas[-1] if betas else 0.0))
        beta = math.sqrt(dot(u, u))
        if not math.isfinite(beta):
            return math.nan
        if beta <= 1e-6 * max(map(abs, [*alphas, *betas])):  # the v span all that H can reach
            break
        betas.append(beta)
    return float(eigh_tridiagonal(alphas, betas[: len(alphas) - 1], eigvals_only=True)[-1])


def measure_sharpness(objective, corpus, s):
    """λ_max of the objective, Eq. 7, in the student's weights: fixed batches, no dropout."""
    model, fused = objective.model, objective.model.config._attn_implementation
    model.eval().set_attn_implementation("eager")  # the fused kernels have no second derivative
    order = torch.randperm(len(corpus), generator=torch.Generator().manual_seed(0))
    fixed = [corpus.batch(rows)[:2] for rows in order.split(s.batch_size)[:SHARPNESS_BATCHES]]
    losses = [lambda batch=batch: objective(*batch)[0] for batch in fixed]
    weights = [p for p in model.parameters() if p.requires_grad]
    lambda_max = largest_hessian_eigenvalue(losses, weights)
    model.set_attn_implementation(fused)
    return lambda_max


# ------------------------------------------------------------------------------------ command line
def parse_settings(argv, kind=Settings):
    """Settings from the command line; the tiny student's own defaults are printed."""
    parser = HfArgumentParser(kind, description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.error = fail
    if parser.parse_args(argv).student == "tiny":
        shown = ", ".join(f"--{name} {value}" for name, value in tiny.SETTINGS.items())
        print("student tiny, from scratch, unless set otherwise:", shown)
        parser.set_defaults(**tiny.SETTINGS)
    return kind(**vars(parser.parse_args(argv)))


def load_student(s, sentences):
    """The student as an Encoder: tiny is made from scratch, with the sentences' own vocabulary."""
    device = runs.pick_device(s.device)
    if s.student == "tiny":
        return tiny.tiny_student(sentences, s.seed, s.pooling, s.max_length, device)
    return load_encoder(s.student, s.pooling, s.max_length, device=device)


def save_student(folder, student, projections):
    """Write the student, and beside it the projections W_l."""
    save_encoder(folder, student)
    torch.save([W.detach().cpu() for W in projections], folder / "projections.pt")


@one_line
def main(argv=None):
    """The command line: read the cache and the student, train, save."""
    s = parse_settings(argv)
    runs.check_settings(s)
    with runs.started(s):
        runs.check_output(s)
        cache = load_cache(s.teacher, needed=s.lambda2 > 0)
        torch.manual_seed(s.seed)
        student = load_student(s, cache["sentences"])
        runs.check_fit(s, student, len(cache["sentences"]))
        projections = train(s, Corpus(cache, student), student)
        about = {"teacher": cache["teacher"], "corpus": cache["fingerprint"]}
        runs.finish(s, about, save_student, student, projections)


if __name__ == "__main__":
    main()
