"""TALAS: distil the cached sentence embeddings of a large teacher into a small student encoder.

    python cache_teacher.py && python talas.py             # the demo: offline, on a laptop's CPU
    python talas.py --teacher bge-m3.pt --student google-bert/bert-base-uncased
    torchrun --nproc_per_node=4 talas.py --teacher ...     # data-parallel, on 4 GPUs

Settings (Appendix E), losses (Eqs. 3-7 and 10-12), ASAM (Eq. 2), Algorithm 1, sharpness (Table 4).
`s` is the Settings. The notes are in docs/notes.md. N is the batch size, T the number of tokens, L
the number of the student's layers (L(w) is the loss), K the number of anchored layers, M the number
of domains in a batch, d_S and d_T the widths of student and teacher. The T of e^T and E^T stands
for the teacher; a transpose is ᵀ.
"""

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from scipy.sparse.linalg import LinearOperator, eigsh
from torch.nn.utils import get_total_norm
from transformers import get_cosine_schedule_with_warmup
from transformers.hf_argparser import HfArg, HfArgumentParser

from cache_teacher import load_cache
from demo import tiny
from support import fail, interruptible
from support.data import Corpus
from support.encoder import dry_run, pooled_layers, save_encoder
from support.files import save
from support.loading import load_encoder
from support.run import (
    RESUME_ADVICE,
    Checkpoint,
    Log,
    batches_of_this_process,
    check_fit,
    check_output_folder,
    check_settings,
    data_parallel,
    pick_device,
    processes,
    publish,
    rank,
    seed_of,
    start_processes,
    stop_processes,
)

# The W_l start small: Eq. 3 ignores their length, but a step of a given length turns a short one
# further (note 5).
W_STD = 1e-3
SHARPNESS_BATCHES = 2  # batches on which λ_max is measured, the same for every seed (note 21)


# ---------------------------------------------------------------------------------------- settings
@dataclass(frozen=True)
class Settings:
    """Every setting; each is a flag of the same name.

    Appendix E gives lambda1-3, lr, epochs and batch_size, Fig. 3 anchored_layers. Where the paper
    is silent, docs/notes.md explains the default.
    """

    # input and output (HfArg: a dataclass field with a help text)
    teacher: str = HfArg(
        default="teacher.pt", help="teacher cache; with --lambda2 0 a cache or a corpus"
    )
    student: str = HfArg(default="tiny", help="Hub id or directory; tiny: a small BERT, untrained")
    output: str = HfArg(default="student", help="directory for the distilled student")
    overwrite: bool = HfArg(default=False, help="replace an earlier run in output")
    resume: bool = HfArg(default=False, help="resume from the last completed epoch of a run")
    pooling: Literal["auto", "cls", "mean", "last"] = HfArg(default="auto", help="of the student")
    max_length: int = HfArg(default=256, help="tokens; longer sentences are cut")
    # losses (Sections 3.1-3.3)
    lambda1: float = HfArg(default=0.001, help="weight of SimCSE, Eq. 6")
    lambda2: float = HfArg(default=0.75, help="weight of TAMD, Eq. 3")
    lambda3: float = HfArg(default=1.0, help="weight of LASD, Eq. 5")
    temperature: float = HfArg(default=0.1, help="tau of Eq. 6")
    anchored_layers: int = HfArg(default=2, help="K = k + 1: top layers anchored by TAMD, Eq. 3")
    lasd_layers: int = HfArg(default=0, help="top layers chained by LASD, Table 8; 0: all")
    detach_guide: bool = HfArg(default=False, help="stop LASD's gradient into a pair's upper layer")
    # optimization (Section 3.3)
    optimizer: Literal["asam", "sam", "disam", "adamw"] = HfArg(default="asam", help="Eqs. 2, 8-12")
    rho: float = HfArg(default=0.05, help="radius of the ascent step, Eq. 2")
    eta: float = HfArg(default=0.0, help="of T_w = |w| + eta (Algorithm 1's eta is lr)")
    disam_lambda: float = HfArg(default=0.1, help="lambda of Eq. 10")
    # training (Table 5)
    lr: float = HfArg(default=2e-5, help="peak learning rate of AdamW; cosine decay to 0")
    projection_lr_scale: float = HfArg(default=5.0, help="the W_l's rate, as a multiple of lr")
    weight_decay: float = HfArg(default=0.01, help="of AdamW, on every parameter")
    warmup_ratio: float = HfArg(default=0.06, help="fraction of the steps in which lr rises from 0")
    epochs: int = HfArg(default=5, help="passes over the corpus")
    batch_size: int = HfArg(default=32, help="sentences a step in each process, N")
    seed: int = HfArg(default=42, help="of initial weights, order and dropout")
    device: str = HfArg(default="auto", help="auto: the accelerator (not a Mac's), else cpu")
    precision: Literal["float32", "bfloat16"] = HfArg(
        default="float32", help="of the student's matrix products"
    )
    sharpness: bool = HfArg(default=False, help="log lambda_max after each epoch, Table 4")


# ------------------------------------------------------------------------------ losses (Section 3)
def tamd_loss(layers, projections, teacher):
    """Teacher-anchored multi-layer distillation, Eq. 3: 1 - cos(e_l W_l, e^T), mean over N and K.

    layers: the top K, each (N, d_S), such as (32, 384); projections: K of W_l (d_S, d_T); teacher:
    e^T (N, d_T). A scalar in [0, 2]. ValueError if layers and projections differ in number.
    """
    losses = []
    for E, W in zip(layers, projections, strict=True):
        projected = F.normalize(E @ W, dim=-1)  # (N, d_T)
        target = F.normalize(teacher, dim=-1, eps=0)  # however short: a cache has no zero vector
        cosines = (projected * target).sum(-1)  # (N,)
        losses.append(1 - cosines.mean())
    return torch.stack(losses).mean()


def relation_matrix(E):
    """Pairwise cosine similarities of a batch, Eq. 4: R = ẼẼᵀ, (N, d_S) -> (N, N)."""
    E = F.normalize(E, dim=-1)  # Ẽ: rows of length 1
    return E @ E.T


def lasd_loss(layers, detach_guide=False):
    """Layer-aligned self-distillation, Eq. 5: ‖R_{l+1} - R_l‖²_F / N², mean over adjacent layers.

    layers: two or more, each (N, d_S), bottom to top. A scalar. `detach_guide` makes R_{l+1} a
    constant (note 4).
    """
    R = [relation_matrix(E) for E in layers]  # one (N, N) per layer
    losses = []
    for lower, guide in zip(R[:-1], R[1:]):
        if detach_guide:
            guide = guide.detach()
        losses.append((guide - lower).square().mean())  # the mean of N² squares: ‖.‖²_F / N²
    return torch.stack(losses).mean()


def simcse_loss(z, z_prime, temperature):
    """Unsupervised SimCSE, Eq. 6: two dropout views, each (N, d_S), and τ. A scalar."""
    similarities = F.normalize(z, dim=-1) @ F.normalize(z_prime, dim=-1).T / temperature  # (N, N)
    # row i: -log of the softmax at column i, which is the cross entropy with the label i
    return F.cross_entropy(similarities, torch.arange(len(z), device=z.device))


def total_loss(layers, projections, teacher, s):
    """The training objective, Eq. 7: (loss, {name: term}), scalars. Terms of weight 0 are left out.

    layers: all L, each (views, N, d_S); projections: K of W_l (d_S, d_T); teacher: E^T (N, d_T).
    """
    first_views = [E[0] for E in layers]  # L of (N, d_S): what TAMD and LASD see (note 8)
    terms = {}
    if s.lambda1:
        view, other_view = layers[-1]
        terms["simcse"] = simcse_loss(view, other_view, s.temperature)
    if s.lambda2:
        terms["tamd"] = tamd_loss(first_views[-s.anchored_layers :], projections, teacher)
    if s.lambda3:
        chained_layers = s.lasd_layers or len(first_views)
        terms["lasd"] = lasd_loss(first_views[-chained_layers:], s.detach_guide)
    weights = {"simcse": s.lambda1, "tamd": s.lambda2, "lasd": s.lambda3}
    loss = sum(weights[name] * term for name, term in terms.items())  # Eq. 7
    return loss, terms


def disam_objective(losses, counts, weight):
    """What DISAM climbs, Eqs. 10-12: Σ α_i L_i - λ Var{L_i} over the M domains of a batch.

    losses: L_i, (M,); counts: sentences of each domain, (M,), of which α_i is the share; weight: λ.
    """
    alpha = counts.to(losses.dtype) / counts.sum()
    variance = (losses[:, None] - losses).square().mean() / 2  # of (M, M) differences, Eq. 12
    return (alpha * losses).sum() - weight * variance


def embed(encoder, tokens, s, views=1):
    """Sentence embeddings after each layer (Section 3): L of e_l, each (views, N, d_S).

    tokens: input_ids, attention_mask, each (N, T). Each view draws its own dropout masks.
    support.encoder.pooled_layers runs the model and pools each layer's token states, (N, T, d_S),
    into one vector a sentence: [CLS], the last token or the mean (note 10). On a CPU it splits the
    batch into pieces, of sentences of similar length, which need less padding (note 19).
    """
    tokens = {name: t.repeat(views, 1) for name, t in tokens.items()}  # (views N, T)
    # [1:]: without layer 0, the embedding layer (note 3)
    pooled = pooled_layers(encoder, tokens, s.precision)[1:]  # L of (views N, d_S)
    return [E.unflatten(0, (views, -1)) for E in pooled]


class Objective(torch.nn.Module):
    """L_total, Eq. 7, as a function of w: the weights of the student and the projections W_l."""

    def __init__(self, encoder, projections, s):
        super().__init__()
        self.encoder = encoder
        self.model = encoder.model  # so that its weights are parameters of this module
        self.projections = torch.nn.ParameterList(projections)
        self.s = s

    def forward(self, tokens, teacher, domains=None):
        """(loss to differentiate, {values to log}) at the present w.

        tokens: as in embed; teacher: E^T (N, d_T), or None without TAMD. values["loss"] is always
        Eq. 7. The returned loss is the same or, with domains, (N,), Eq. 10, which DISAM climbs.
        """
        views = 2 if self.s.lambda1 else 1
        layers = embed(self.encoder, tokens, self.s, views)  # L of (views, N, d_S)
        loss, terms = total_loss(layers, self.projections, teacher, self.s)
        values = terms | {"loss": loss}
        if domains is None:
            return loss, values
        return self.ascent_objective(layers, teacher, domains), values

    def ascent_objective(self, layers, teacher, domains):
        """Eq. 10. L_i is Eq. 7 on domain i's sentences alone: their own negatives, their own R."""
        present, counts = domains.unique(return_counts=True)  # (M,) each
        losses = []
        for domain in present:
            in_domain = domains == domain  # (N,), bool
            domain_layers = [E[:, in_domain] for E in layers]
            domain_teacher = None if teacher is None else teacher[in_domain]
            L_i, _ = total_loss(domain_layers, self.projections, domain_teacher, self.s)
            losses.append(L_i)
        return disam_objective(torch.stack(losses), counts, self.s.disam_lambda)


# ------------------------------------------------------------------------------------ ASAM (Eq. 2)
class ASAM:
    """Adaptive sharpness-aware minimization around an ordinary optimizer.

        L(w).backward();  ascent_step()     # w -> w̃ = w + ε̂
        L(w̃).backward();  descent_step()    # back to w; the optimizer steps by the gradient at w̃

    The paper prints the problem, Eq. 2: min_w max L(w + ε) over ‖T_w⁻¹ ε‖₂ ≤ ρ. Kwon et al. (2021)
    give T_w = diag(|w| + η) and the ε that climbs most, to first order (note 2):
    ε̂ = ρ T_w² ∇L(w) / ‖T_w ∇L(w)‖₂. adaptive=False sets T_w = I, which is SAM (Eq. 9).
    """

    def __init__(self, optimizer, rho, eta=0.0, adaptive=True):
        self.optimizer = optimizer
        self.rho = rho
        self.eta = eta
        self.adaptive = adaptive
        self.w = {}  # parameter -> its unperturbed value, while the parameter is at w̃

    @torch.no_grad()
    def ascent_step(self):
        """Move w to w̃ = w + ε̂ and clear the gradients; parameters without one stay at w."""
        self.restore()  # if an earlier ascent was not followed by a descent
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        moved = [p for p in parameters if p.grad is not None]
        # p.grad becomes T_w ∇L(w), then ε̂: in place, to save memory and time
        T = {}  # parameter -> the diagonal of T_w, in its shape
        for p in moved:
            T[p] = p.abs().add_(self.eta) if self.adaptive else torch.ones_like(p)
            p.grad *= T[p]  # T_w ∇L(w)
        norm = get_total_norm([p.grad for p in moved])  # ‖T_w ∇L(w)‖₂, one norm over all (note 13)
        if norm >= 1e-12:  # a gradient this small gives no direction
            for p in moved:
                self.w[p] = p.data
                epsilon = p.grad.mul_(T[p]).mul_(self.rho / norm)  # ρ T_w² ∇L(w) / ‖T_w ∇L(w)‖₂
                p.data = p + epsilon  # w̃ in memory of its own, so that w stays as it is
        self.optimizer.zero_grad()

    @torch.no_grad()
    def restore(self):
        """Put w back exactly."""
        for p, w in self.w.items():
            p.data = w
        self.w = {}

    def descent_step(self):
        """Put w back, then step the optimizer with the gradients found at w̃ and clear them."""
        self.restore()
        self.optimizer.step()
        self.optimizer.zero_grad()


# ------------------------------------------------------------------------------------- Algorithm 1
def without_graph(values):
    """{name: scalar}, detached to be logged: they keep no graph in memory."""
    return {name: value.detach() for name, value in values.items()}


def training_step(objective, asam, tokens, teacher, domains, s):
    """One step of Algorithm 1, which moves w. Returns {name: scalar} to log.

    tokens: as in embed; teacher: E^T (N, d_T) or None; domains: (N,). sharpness_gap is L(w̃) - L(w).
    """
    if s.optimizer == "adamw":  # one pass, no perturbation
        loss, values = objective(tokens, teacher)
        loss.backward()
        asam.descent_step()  # w was not perturbed, so this is AdamW's step alone
        return without_graph(values)

    # 1. Ascent step
    # after this block the random state is as before it: both passes draw the same masks (note 6)
    devices = [] if domains.device.type == "cpu" else [domains.device]
    with torch.random.fork_rng(devices):
        climbed_domains = domains if s.optimizer == "disam" else None
        loss, values = objective(tokens, teacher, climbed_domains)
    loss.backward()  # ∇L(w); for DISAM, of Eq. 10
    asam.ascent_step()  # w̃ = ASAM_Perturb(w, ∇L, ρ)

    # 2. Descent step
    perturbed_loss, _ = objective(tokens, teacher)  # L(w̃), Eq. 7, for DISAM too (note 12)
    perturbed_loss.backward()  # g_ASAM
    asam.descent_step()  # line 15, from w, not w̃; AdamW in place of w - lr g (note 9)
    values["sharpness_gap"] = perturbed_loss - values["loss"]
    return without_graph(values)


def batches(n, s, epoch):
    """The batches of an epoch, positions (N,); an incomplete last batch is dropped (note 11)."""
    generator = torch.Generator().manual_seed(seed_of(s.seed, epoch, "order"))
    order = torch.randperm(n, generator=generator)
    return order[: n - n % s.batch_size].split(s.batch_size)


def new_projections(s, corpus):
    """K new W_l, each (d_S, d_T); none without TAMD."""
    if not s.lambda2:
        return []
    shape = (corpus.encoder.dimensions, corpus.embeddings.shape[1])  # (d_S, d_T)
    device = corpus.encoder.model.device
    return [W_STD * torch.randn(shape).to(device) for _ in range(s.anchored_layers)]


def make_optimizer(s, objective, steps):
    """(ASAM or SAM around AdamW, its learning-rate schedule); the W_l have their own rate."""
    groups = [
        {"params": objective.model.parameters()},
        {"params": objective.projections, "lr": s.lr * s.projection_lr_scale},
    ]
    adamw = torch.optim.AdamW(groups, lr=s.lr, weight_decay=s.weight_decay, fused=True)
    scheduler = get_cosine_schedule_with_warmup(adamw, round(s.warmup_ratio * steps), steps)
    adaptive = s.optimizer == "asam"  # SAM and DISAM: T_w = I (note 12)
    return ASAM(adamw, s.rho, s.eta, adaptive), scheduler


def train(s, corpus, objective):
    """Algorithm 1: train the student and the projections in place, batch by batch."""
    steps_per_epoch = len(corpus) // s.batch_size // processes()  # in each process
    asam, scheduler = make_optimizer(s, objective, s.epochs * steps_per_epoch)
    checkpoint = Checkpoint(s, corpus, objective, asam.optimizer, scheduler)
    first_epoch = checkpoint.start_or_resume()
    log = Log(s, steps_per_epoch, first_epoch, corpus.encoder.model.device)
    parallel = data_parallel(objective)  # under torchrun its backward pass averages the gradients
    for epoch in range(first_epoch, s.epochs):
        log.begin_epoch()
        objective.train()
        torch.manual_seed(seed_of(s.seed, epoch, rank(), "dropout"))  # a resumed run draws the same
        for rows in batches_of_this_process(batches(len(corpus), s, epoch)):
            tokens, teacher, domains = corpus.batch(rows)  # B, and E^T from the cache
            values = training_step(parallel, asam, tokens, teacher, domains, s)
            log.step(values, scheduler.get_last_lr()[0])
            scheduler.step()
        sharpness = {}
        if s.sharpness:
            sharpness["lambda_max"] = measure_sharpness(objective, corpus, s)
        log.end_epoch(sharpness)
        checkpoint.save(epoch + 1)


# ---------------------------------------------------------------------------- sharpness (Table 4)
def as_vector(tensors):
    """All entries of several tensors, in one vector."""
    return torch.cat([t.flatten() for t in tensors])


def hessian_vector_product(losses, parameters, v):
    """H v, for the Hessian H of the mean of the losses. v and H v: (number of weights,).

    losses: functions without arguments; each returns a scalar that is twice differentiable.
    """
    total = torch.zeros_like(v)
    for loss in losses:  # one graph at a time: that of a second derivative is large
        gradient = torch.autograd.grad(
            loss(), parameters, create_graph=True, materialize_grads=True
        )
        slope = as_vector(gradient) @ v  # ∇L · v
        if slope.requires_grad:  # the gradient of a linear loss is constant: its H is 0
            Hv = torch.autograd.grad(slope, parameters, materialize_grads=True)
            total += as_vector(Hv) / len(losses)
    return total


def largest_hessian_eigenvalue(losses, parameters, tolerance=3e-3, vectors=8, seed=0):
    """λ_max (Table 4): the algebraically largest eigenvalue of the Hessian H at the parameters.

    H is the Hessian of the mean of the losses, as in hessian_vector_product. Restarted Lanczos
    iteration (ARPACK) on products H v, to a relative `tolerance`. The host's memory holds
    `vectors` + 4 vectors of the parameters' size, and 2.5 times `vectors` at the peak. NaN if a
    loss or H is not finite.
    """
    parameters = [p for p in parameters if p.requires_grad]
    w = as_vector(parameters).detach()
    generator = torch.Generator().manual_seed(seed)
    start = torch.randn(len(w), generator=generator, dtype=w.dtype)
    Hv = hessian_vector_product(losses, parameters, start.to(w)).cpu()
    # the losses too, because an infinite linear loss has a finite H v: 0
    finite_losses = all(loss().isfinite() for loss in losses)
    if not finite_losses or not Hv.isfinite().all():
        return float("nan")
    if not Hv.any():  # H = 0: for any other H, H v is almost never 0
        return 0.0
    if len(w) == 1:  # H is a number, and Lanczos iteration needs two dimensions
        return (Hv / start).item()

    def matvec(v):
        """H v for ARPACK, from and to numpy."""
        v = torch.from_numpy(v).to(w)  # of w's device and type
        return hessian_vector_product(losses, parameters, v).cpu().numpy()

    v0 = start.numpy()
    H = LinearOperator((len(w), len(w)), matvec=matvec, dtype=v0.dtype)
    [lambda_max] = eigsh(
        H, k=1, which="LA", ncv=vectors, tol=tolerance, v0=v0, return_eigenvectors=False
    )
    return float(lambda_max)


def loss_without_terms(objective, tokens, teacher):
    """Eq. 7's value alone."""
    loss, _ = objective(tokens, teacher)
    return loss


def measure_sharpness(objective, corpus, s):
    """λ_max of Eq. 7 on two fixed batches, in the student's weights, not the W_l (note 21).

    Dropout is off, so the two views of Eq. 6 are equal.
    """
    model = objective.model
    was_training = objective.training
    attention = model.config._attn_implementation
    order = torch.randperm(len(corpus), generator=torch.Generator().manual_seed(0))
    losses = []
    for rows in order.split(s.batch_size)[:SHARPNESS_BATCHES]:
        tokens, teacher, _ = corpus.batch(rows)
        losses.append(partial(loss_without_terms, objective, tokens, teacher))
    objective.eval()
    model.set_attn_implementation("eager")  # the fused kernels have no second derivative
    lambda_max = largest_hessian_eigenvalue(losses, model.parameters())
    model.set_attn_implementation(attention)
    objective.train(was_training)
    return lambda_max


# ------------------------------------------------------------------------------------ command line
def parse_settings(argv, kind=Settings, **defaults):
    """Settings from the command line. --student tiny has its own defaults, which are printed."""
    parser = HfArgumentParser(
        kind, description="Distil cached sentence embeddings into a student.", allow_abbrev=False
    )
    parser.error = fail
    parser.set_defaults(**defaults)
    flags = parser.parse_args(argv)
    if flags.student == "tiny":
        print(f"student tiny starts from scratch, with its own defaults: {tiny.SETTINGS}")
        parser.set_defaults(**tiny.SETTINGS)
        flags = parser.parse_args(argv)  # again: flags that were given win
    return kind(**vars(flags))


def load_student(s, sentences):
    """The student as an Encoder. `tiny` starts from scratch, with a vocabulary of the sentences."""
    device = pick_device(s.device)
    if s.student == "tiny":
        return tiny.tiny_student(sentences, s.seed, s.pooling, s.max_length, device)
    return load_encoder(s.student, s.pooling, s.max_length, device=device)


def finish(s, cache, objective):
    """Write the student and the W_l to a draft folder, and publish it in the output folder."""
    if rank() > 0:
        return
    draft = Path(s.output, ".saving")
    draft.mkdir(exist_ok=True)
    save_encoder(draft, objective.encoder)
    save(draft / "projections.pt", [W.detach().cpu() for W in objective.projections])
    publish(s, cache, draft)


def main(argv=None):
    """The command line: read the cache and the student, train, save."""
    s = parse_settings(argv)
    check_settings(s)
    check_output_folder(s)
    with interruptible(RESUME_ADVICE):
        start_processes(s)
        cache = load_cache(s.teacher, needed=s.lambda2 > 0)
        torch.manual_seed(s.seed)  # for the W_l, and for a pooler that the student's files lack
        encoder = load_student(s, cache["sentences"])
        corpus = Corpus(cache, encoder)
        check_fit(s, corpus)
        dry_run(encoder, corpus, s.output)
        objective = Objective(encoder, new_projections(s, corpus), s)
        train(s, corpus, objective)
        finish(s, cache, objective)
        stop_processes()


if __name__ == "__main__":
    main()
