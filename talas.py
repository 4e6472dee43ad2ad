"""TALAS: distil the cached sentence embeddings of a large teacher into a small student encoder.

    python cache_teacher.py && python talas.py               # the demo: offline, on a laptop's CPU
    python talas.py --teacher teacher.pt --student nreimers/MiniLMv2-L6-H384-distilled-from-BERT-Base
    torchrun --nproc_per_node=4 talas.py --teacher ...       # data-parallel: --batch_size sentences on each of 4 GPUs

In the paper's order: settings (Appendix E), losses (Eqs. 3-7, 10-12), ASAM (Eq. 2), Algorithm 1, sharpness (Table 4).
N is the batch size, T the number of tokens, L that of the student's layers, d_S and d_T the two models' dimensions.
"""

import io
import json
import statistics
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from transformers import HfArgumentParser
from transformers.hf_argparser import HfArg

from cache_teacher import Checkpoint, average, average_gradients, fail, identity, join_processes, leave_processes, load, load_cache
from cache_teacher import load_encoder, load_sentences, memory_mb, mixed_precision, move_files, pad, pick_device, pool, processes
from cache_teacher import progress, provenance, quiet, random_state, rank, save_encoder, seed_of, set_random_state, to_device
from cache_teacher import tokenize, wait_for_processes, writing
from demo import tiny

# ------------------------------------------------------------------------------------------------------- settings
@dataclass
class Settings:
    """Every setting, with the paper's value as its default. The README says why where the paper says nothing."""

    teacher: str = HfArg(default="teacher.pt", help="cache_teacher.py's embeddings; without TAMD, a corpus will do")
    student: str = HfArg(default="tiny", help="Hub id or directory of an encoder; tiny: a small BERT from scratch")
    output: str = HfArg(default="student", help="directory for the distilled student")
    overwrite: bool = HfArg(default=False, help="replace an earlier run's output")
    resume: bool = HfArg(default=False, help="go on from the last whole epoch of an interrupted run")
    pooling: Literal["auto", "cls", "mean", "last"] = HfArg(default="auto", help="auto: as the student's files say")
    lambda1: float = HfArg(default=0.001, help="weight of SimCSE, Eq. 6")
    lambda2: float = HfArg(default=0.75, help="weight of TAMD, Eq. 3")
    lambda3: float = HfArg(default=1.0, help="weight of LASD, Eq. 5")
    temperature: float = HfArg(default=0.07, help="tau of Eq. 6")
    anchored_layers: int = HfArg(default=2, help="K = k + 1: how many of the top layers TAMD anchors, Eq. 3")
    lasd_layers: int = HfArg(default=0, help="how many of the top layers LASD chains, Eq. 5; 0: all L")
    detach_guide: bool = HfArg(default=False, help="stop LASD's gradient into the upper layer of each pair")
    optimizer: Literal["asam", "sam", "disam", "adamw"] = HfArg(default="asam", help="adamw: one pass, no ascent step")
    rho: float = HfArg(default=0.05, help="radius of the ascent step, Eq. 2")
    eta: float = HfArg(default=0.0, help="of T_w = diag(|w| + eta), Eq. 2; Algorithm 1's eta is --lr")
    disam_lambda: float = HfArg(default=0.1, help="lambda of Eq. 10: how much DISAM's ascent minds the domains' variance")
    lr: float = HfArg(default=2e-5, help="peak learning rate of AdamW, cosine decay to 0")
    projection_lr_scale: float = HfArg(default=5.0, help="the learning rate of the projections W_l, times lr")
    weight_decay: float = HfArg(default=0.01, help="of AdamW, on every parameter")
    warmup_ratio: float = HfArg(default=0.06, help="part of the steps in which lr rises from 0")
    epochs: int = HfArg(default=5, help="passes over the corpus")
    batch_size: int = HfArg(default=32, help="sentences a step, N")
    max_length: int = HfArg(default=256, help="tokens; longer sentences are truncated")
    seed: int = HfArg(default=42, help="of initial weights, order and dropout")
    device: str = HfArg(default="auto", help="auto: the accelerator if there is one, else cpu")
    sharpness: bool = HfArg(default=False, help="record the largest Hessian eigenvalue after each epoch, Table 4")


LOG_EVERY, SHARPNESS_BATCHES = 10, 2  # steps between two lines of metrics.jsonl; batches over which λ_max is measured
METRICS = ["simcse", "tamd", "lasd", "loss", "sharpness_gap"]  # the gap is L(w̃) - L(w), the second pass
ADVICE = "try a lower --lr or --rho, with --overwrite (the checkpoint of the last whole epoch is kept)"

# ------------------------------------------------------------------------------------------------ losses (Section 3)
def tamd_loss(layers, projections, teacher, reduction="mean"):
    """Teacher-anchored multi-layer distillation, Eq. 3: the mean over K layers of 1 - cos(e_l W_l, e^T), in [0, 2].

    layers: the top K, (N, d_S); projections: K of W_l (d_S, d_T), else ValueError; teacher: (N, d_T). "none" gives (N,).
    """
    distances = [1 - F.cosine_similarity(E @ W, teacher, dim=-1) for E, W in zip(layers, projections, strict=True)]
    losses = torch.stack(distances).mean(0)  # (K, N) -> (N,)
    return losses.mean() if reduction == "mean" else losses


def relation_matrix(E):
    """Pairwise cosine similarities of a batch, Eq. 4: R = ẼẼᵀ, (N, d_S) -> (N, N)."""
    E = F.normalize(E, dim=-1)
    return E @ E.T


def lasd_loss(layers, detach_guide=False):
    """Layer-aligned self-distillation, Eqs. 4-5: the mean over adjacent layers of ‖R_{l+1} - R_l‖²_F / N².

    layers: L >= 2 tensors (N, d_S), bottom to top. `detach_guide` makes layer l+1 a fixed target for layer l.
    """
    R = [relation_matrix(E) for E in layers]
    guides = [r.detach() for r in R[1:]] if detach_guide else R[1:]
    return torch.stack([(guide - r).square().mean() for guide, r in zip(guides, R[:-1], strict=True)]).mean()


def simcse_loss(z, z_prime, temperature, reduction="mean"):
    """Unsupervised SimCSE, Eq. 6: two dropout views, (N, d_S), and tau -> scalar, or (N,) with reduction="none"."""
    similarities = F.normalize(z, dim=-1) @ F.normalize(z_prime, dim=-1).T / temperature  # (N, N)
    # -log softmax over j, at j = i: the cross entropy of choosing one's own second view among the batch's
    return F.cross_entropy(similarities, torch.arange(len(z), device=z.device), reduction=reduction)


def embed(student, pieces, pooling, views=1):
    """Sentence embeddings after each layer, Section 3: L tensors e_l (N, views, d_S), each view under its own dropout masks.

    pieces: a batch of N sentences, those of like length together, each piece a dict of input_ids and attention_mask, (n, T).
    """
    pooled = []
    for tokens in pieces:
        tokens = {name: t.repeat_interleave(views, dim=0) for name, t in tokens.items()}  # a sentence's views side by side
        with mixed_precision(student.device, student.training):
            hidden = student(**tokens, output_hidden_states=True).hidden_states[1:]  # L of (n * views, T, d_S); [0] is no layer
        pooled.append([pool(h.to(student.dtype), tokens["attention_mask"], pooling) for h in hidden])
    return [torch.cat(e_l).unflatten(0, (-1, views)) for e_l in zip(*pooled)]


def total_loss(student, projections, pieces, teacher, s, reduction="mean"):
    """The training objective, Eq. 7, on one batch: (loss, [simcse, tamd, lasd]); a term of weight 0 is not computed.

    pieces: as in embed(); teacher: (N, d_T), the cached targets; s: Settings. With reduction="none" the loss is each
    sentence's own, (N,), of which LASD, a property of the whole batch, is a shared part.
    """
    both = embed(student, pieces, s.pooling, views=2 if s.lambda1 else 1)  # L of (N, 2 or 1, d_S)
    layers = [E[:, 0] for E in both]  # L of (N, d_S): the first view
    simcse = tamd = lasd = layers[-1].new_zeros(())
    if s.lambda1:
        simcse = simcse_loss(layers[-1], both[-1][:, 1], s.temperature, reduction)
    if s.lambda2:
        tamd = tamd_loss(layers[-s.anchored_layers :], projections, teacher, reduction)
    if s.lambda3:
        lasd = lasd_loss(layers[-s.lasd_layers or None :], s.detach_guide)  # all of them at 0
    loss = s.lambda1 * simcse + s.lambda2 * tamd + s.lambda3 * lasd
    return loss, [simcse.mean(), tamd.mean(), lasd]


def disam_objective(losses, domains, weight):
    """What DISAM climbs on, Eqs. 10-12: Σ α_i L_i minus `weight` (λ) times Var{L_i}, over the M domains of a batch.

    losses: (N,), each sentence's; domains: (N,), integers. L_i is the mean loss of domain i, α_i its share of the batch.
    A batch of one domain has no variance, so that SAM is left.
    """
    _, index, counts = domains.unique(return_inverse=True, return_counts=True)
    L = torch.zeros_like(counts, dtype=losses.dtype).index_add(0, index, losses) / counts  # (M,)
    variance = (L[:, None] - L[None, :]).square().sum() / (2 * len(L) ** 2)  # Eq. 12
    return (counts / len(losses) * L).sum() - weight * variance


# --------------------------------------------------------------------------------------------------- ASAM (Eq. 2)
class ASAM:
    """Adaptive sharpness-aware minimization, Eq. 2, around an ordinary optimizer (Kwon et al., 2021).

        loss(w).backward();  ascent_step()     # w -> w̃ = w + ε̂
        loss(w̃).backward();  descent_step()    # back to w; the optimizer steps with the gradient found at w̃

    ε̂ = ρ T_w² ∇L(w) / ‖T_w ∇L(w)‖₂ with T_w = diag(|w| + η); adaptive=False sets T_w = I, which is SAM (Eq. 9).
    """

    def __init__(self, optimizer, rho, eta=0.0, adaptive=True):
        self.optimizer, self.rho, self.eta, self.adaptive = optimizer, rho, eta, adaptive
        self.moved, self.w = [], {}  # the parameters that stand at w̃; the copies of w, kept from step to step

    @torch.no_grad()
    def ascent_step(self):
        """Move w to w̃ = w + ε̂ and clear the gradients. Parameters without a gradient stay where they are."""
        self.restore()
        self.moved = [p for group in self.optimizer.param_groups for p in group["params"] if p.grad is not None]
        if not self.moved:
            return
        self.w |= {p: torch.empty_like(p) for p in self.moved if p not in self.w}
        w, g = [self.w[p] for p in self.moved], [p.grad for p in self.moved]
        torch._foreach_copy_(w, self.moved)
        if self.adaptive:  # T_w enters ε̂ squared: at η = 0 the sign of w cancels, and the copy of w is all that ASAM adds
            T = torch._foreach_add(torch._foreach_abs(w), self.eta) if self.eta else w
            torch._foreach_mul_(g, T)  # T_w ∇L, in the gradient's own memory
        norm = torch.stack(torch._foreach_norm(g)).norm()  # over all parameters together
        torch._foreach_mul_(g, torch.where(norm == 0, 0, self.rho / norm))  # a zero gradient gives no step, not 0 / 0
        if self.adaptive:
            torch._foreach_addcmul_(self.moved, T, g)  # w + T_w (ρ T_w ∇L / ‖T_w ∇L‖)
        else:
            torch._foreach_add_(self.moved, g)
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


# ----------------------------------------------------------------------------------------------------- Algorithm 1
def training_step(student, projections, asam, pieces, teacher, domains, s):
    """One step of Algorithm 1: w moves. Returns what METRICS names, (5,). Gradients are those of the processes' mean loss."""
    objective = lambda reduction="mean": total_loss(student, projections, pieces, teacher, s, reduction)
    random = random_state(student.device)
    loss, terms = objective("none" if s.optimizer == "disam" else "mean")
    if s.optimizer == "adamw":  # no ascent step: w̃ = w
        perturbed_loss = loss
    else:  # 1. Ascent step: the gradient at w gives w̃
        climbed = disam_objective(loss.expand(len(domains)), domains, s.disam_lambda) if s.optimizer == "disam" else loss
        climbed.backward()
        average_gradients(asam.optimizer)
        asam.ascent_step()
        set_random_state(student.device, random)  # the same dropout masks again: one function, at two points
        perturbed_loss, _ = objective()  # Eq. 7 itself, whatever was climbed
    perturbed_loss.backward()  # 2. Descent step: the gradient at w̃ moves w
    average_gradients(asam.optimizer)
    asam.descent_step()
    return torch.stack([*terms, loss.mean(), perturbed_loss - loss.mean()]).detach()


def set_up(s, student, targets, steps):
    """(projections W_l, optimizer, scheduler): AdamW with a warmed-up cosine schedule, inside ASAM or SAM."""
    shapes = [(student.config.hidden_size, targets.shape[1])] * s.anchored_layers if s.lambda2 else []  # K of (d_S, d_T)
    # The cosine of Eq. 3 ignores the length of W_l, so its initial size only sets how fast it can turn: start small.
    projections = [torch.nn.Parameter(torch.randn(shape).to(student.device) * 1e-3) for shape in shapes]
    groups = [{"params": list(student.parameters())}, {"params": projections, "lr": s.lr * s.projection_lr_scale}]
    adamw = torch.optim.AdamW([g for g in groups if g["params"]], lr=s.lr, weight_decay=s.weight_decay, fused=True)
    scheduler = transformers.get_cosine_schedule_with_warmup(adamw, round(s.warmup_ratio * steps), steps)
    return projections, ASAM(adamw, s.rho, s.eta, adaptive=s.optimizer == "asam"), scheduler


def train(s, cache, student, tokenizer, resumed=None):
    """Algorithm 1, from a checkpoint if one is given: trains the student in place, and returns (projections, cost, a dict).

    It takes sentences and sources out of the cache, so that a large corpus does not stay in memory.
    """
    facts = {f"--{name}": v for name, v in asdict(s).items() if name not in ("resume", "overwrite", "output", "device")}
    facts |= {"content of --teacher": identity(cache), "number of processes": processes()}
    tokens, targets = tokenize(tokenizer, cache.pop("sentences"), s.max_length), cache["embeddings"]
    domains = torch.from_numpy(np.unique(cache.pop("sources"), return_inverse=True)[1])
    lengths, largest = np.diff(tokens[1]), 8 if student.device.type == "cpu" else s.batch_size  # a CPU gains by less padding

    def fetch(batch):  # positions (N,) -> pieces of tokens (n, T), cached targets E^T (N, d_T), domains (N,)
        batch = batch[np.argsort(lengths[batch], kind="stable")]  # no term of the loss sees the order in a batch
        pieces = [pad(tokens, rows.tolist(), tokenizer.pad_token_id, student.device) for rows in batch.split(largest)]
        teacher = to_device(targets[batch].float(), student.device) if s.lambda2 else None
        return pieces, teacher, to_device(domains[batch], student.device)

    steps_per_epoch = len(lengths) // (s.batch_size * processes())
    projections, asam, scheduler = set_up(s, student, targets, s.epochs * steps_per_epoch)
    modules = {"student": student, "projections": torch.nn.ParameterList(projections), "adamw": asam.optimizer}
    checkpoint = Checkpoint(f"{s.output}/checkpoint.pt", facts, modules | {"scheduler": scheduler})
    first_epoch, position = checkpoint.load(resumed) if resumed else checkpoint.save(0, 0)
    meter = Meter(s, steps_per_epoch, first_epoch, position, student.device)
    for epoch in range(first_epoch, s.epochs):
        student.train()
        meter.start()
        order = torch.randperm(len(lengths), generator=torch.Generator().manual_seed(seed_of(s.seed, epoch, "order")))
        torch.manual_seed(seed_of(s.seed, epoch, rank(), "dropout"))  # a resumed epoch draws the same, each process its own
        for batch in order.split(s.batch_size)[rank() :: processes()][:steps_per_epoch]:  # B; the incomplete last one is left out
            values = training_step(student, projections, asam, *fetch(batch), s)
            meter.step(values, epoch + 1, scheduler.get_last_lr()[0])
            scheduler.step()
        lambda_max = None
        if s.sharpness:
            fixed = torch.randperm(len(lengths), generator=torch.Generator().manual_seed(0)).split(s.batch_size)[:steps_per_epoch]
            lambda_max = measure_sharpness(student, projections, map(fetch, fixed[:SHARPNESS_BATCHES]), s)
        if not all(p.isfinite().all() for p in student.parameters()):
            fail(f"epoch {epoch + 1} left weights that are not finite; {ADVICE}")
        checkpoint.save(epoch + 1, meter.write({"end_of_epoch": epoch + 1, "step": meter.count, "lambda_max": lambda_max}))
    return projections, meter.cost() if rank() == 0 else {}


class Meter:
    """The progress bar, the lines of metrics.jsonl, and at the end what the run cost (Table 3)."""

    def __init__(self, s, steps_per_epoch, first_epoch, position, device):
        self.path = f"{s.output}/metrics.jsonl"
        self.file = open(self.path, "a+", buffering=1, encoding="utf-8") if rank() == 0 else io.StringIO()
        self.file.truncate(position)  # what an interrupted epoch wrote is written again
        self.device, self.steps_per_epoch, self.count, self.window = device, steps_per_epoch, first_epoch * steps_per_epoch, []
        self.bar = progress(s.epochs * steps_per_epoch, "step", initial=self.count)

    def start(self):
        """Begin to measure time and memory: what lies between two epochs does not count."""
        self.clock, _ = time.perf_counter(), memory_mb(self.device)

    def step(self, values, epoch, lr):
        """Take the values of one step, which stay on the device until a line is due: the host does not wait for them."""
        self.window.append(values)
        self.count += 1
        self.bar.update()
        if self.count % LOG_EVERY and self.count % self.steps_per_epoch:
            return
        rows = torch.stack(self.window)  # (steps, 5)
        average(rows)
        rows = rows.cpu()
        if len(bad := (~rows.isfinite()).nonzero()):
            step, which = bad[0].tolist()
            self.bar.close()
            fail(f"step {self.count - len(rows) + 1 + step}: {METRICS[which]} is not finite; {ADVICE}")
        means, ms = dict(zip(METRICS, rows.mean(0).tolist())), 1000 * (time.perf_counter() - self.clock) / len(rows)
        line = {"step": self.count, "epoch": epoch, **means, "lr": lr, "ms_per_step": ms, "memory_mb": memory_mb(self.device)}
        self.write(line)
        self.bar.set_postfix({name: f"{means[name]:.4f}" for name in METRICS[:4]}, refresh=False)
        self.window, self.clock = [], time.perf_counter()

    def write(self, line):
        """Write a line of metrics.jsonl; returns where the next one begins."""
        with writing(self.path):
            self.file.write(json.dumps(line) + "\n")
        return self.file.tell()

    def cost(self):
        """Table 3, from the lines: the median time of a step, without the first tenth, and the memory along the run."""
        self.bar.close()
        self.file.seek(0)
        lines = [line for line in map(json.loads, self.file) if "ms_per_step" in line]
        sizes = [line["memory_mb"] for line in lines]
        speed = {"ms_per_step": statistics.median(line["ms_per_step"] for line in lines[len(lines) // 10 :])}
        return speed | {"mean_mb": statistics.fmean(sizes), "peak_mb": max(sizes), "std_mb": statistics.pstdev(sizes)}


def largest_hessian_eigenvalue(loss_fn, parameters, iterations=20, seed=0):
    """λ_max (Table 4), the largest eigenvalue of the Hessian H at the parameters, by power iteration on products H v.

    loss_fn: a function of nothing that gives a scalar, twice differentiable, or a list of them, whose mean is meant. Power
    iteration finds the eigenvalue of the largest size; if that is negative, a second one on H shifted by it finds λ_max.
    """
    loss_fns, parameters = loss_fn if isinstance(loss_fn, list) else [loss_fn], list(parameters)

    def product(v):
        total = [torch.zeros_like(p) for p in parameters]
        for fn in loss_fns:  # one graph at a time: that of a second derivative is large
            gradient = torch.autograd.grad(fn(), parameters, create_graph=True, materialize_grads=True)
            torch._foreach_add_(total, torch.autograd.grad(gradient, parameters, v, materialize_grads=True))
        return [x / len(loss_fns) for x in total]

    generator, eigenvalue, shift = torch.Generator().manual_seed(seed), 0.0, 0.0
    for _ in range(2):
        v = [torch.randn(p.shape, generator=generator, dtype=p.dtype).to(p.device) for p in parameters]
        for _ in range(iterations):
            v = torch._foreach_div(v, torch.stack(torch._foreach_norm(v)).norm())
            Hv = [h - shift * x for h, x in zip(product(v), v)]
            eigenvalue = sum((x * h).sum() for x, h in zip(v, Hv)).item() + shift  # vᵀ H v
            v = Hv
        if eigenvalue >= 0:
            break
        shift = eigenvalue
    return eigenvalue


def measure_sharpness(student, projections, batches, s):
    """λ_max of the full training objective (Eq. 7) over fixed batches, without dropout."""
    fused = student.config._attn_implementation
    student.eval().set_attn_implementation("eager")  # the fused kernels have no second derivative
    losses = [lambda batch=batch: total_loss(student, projections, *batch[:2], s)[0] for batch in batches]
    lambda_max = largest_hessian_eigenvalue(losses, [p for p in [*student.parameters(), *projections] if p.requires_grad])
    student.set_attn_implementation(fused)
    return lambda_max


# ---------------------------------------------------------------------------------- settings that fit, saving, main
def check(s, student, tokenizer, sentences):
    """End the program if a setting has no meaning, or does not fit the student or the corpus."""
    positive = ("temperature", "lr", "projection_lr_scale", "epochs", "batch_size", "max_length", "anchored_layers")
    for name, value in asdict(s).items():
        if type(value) in (int, float) and not (0 <= value < 2**63 and (value or name not in positive)):
            fail(f"--{name} {value}: it must be a sensible number {'above' if name in positive else 'of at least'} 0")
    L, vectors = student.config.num_hidden_layers, student.get_input_embeddings().num_embeddings
    wrong = {
        f"{s.student}: a student must be an encoder or a decoder, not both": student.config.is_encoder_decoder,
        f"{s.student}: its tokenizer has {len(tokenizer)} tokens, its embeddings only {vectors}": len(tokenizer) > vectors,
        f"--warmup_ratio {s.warmup_ratio}: it is a part of the steps, at most 1": s.warmup_ratio > 1,
        "--lambda1, --lambda2 and --lambda3 are all 0: there is nothing to learn": not (s.lambda1 or s.lambda2 or s.lambda3),
        "--batch_size 1: Eqs. 5 and 6 compare the sentences of a batch; take more": s.batch_size == 1 and s.lambda1 + s.lambda3 > 0,
        f"--max_length {s.max_length}: it leaves no token between the first and the last; take more": s.max_length < 3,
        f"--batch_size {s.batch_size}: the corpus has only {len(sentences)} sentences": len(sentences) < s.batch_size * processes(),
        f"--anchored_layers {s.anchored_layers}: {s.student} has {L} layers": s.lambda2 and s.anchored_layers > L,
        f"--lasd_layers {s.lasd_layers}: Eq. 5 chains 2 to L layers, {s.student} has {L}; --lambda3 0 leaves it out":
            s.lambda3 and (L < 2 or s.lasd_layers == 1 or s.lasd_layers > L),
    }  # fmt: skip
    for message in (message for message, is_wrong in wrong.items() if is_wrong):
        fail(message)


def find_checkpoint(s):
    """The checkpoint to resume from, or None for a new run. Ends the program if the output is not to be touched."""
    out, checkpoint = Path(s.output), Path(s.output) / "checkpoint.pt"
    if s.resume and checkpoint.exists():
        return load(checkpoint)
    if s.resume:
        fail(f"{out} has no checkpoint to resume from: it is {'a finished' if (out / 'talas.json').exists() else 'no'} run")
    if checkpoint.exists() and not s.overwrite:
        fail(f"{out} holds an interrupted run; --resume it, or --overwrite it")
    if out.exists() and not (out.is_dir() and (s.overwrite or not any(out.iterdir()))):
        fail(f"{out} exists; choose another --output, or --overwrite it")


def save_student(s, cache, student, tokenizer, projections, cost):
    """Write the student and the record of the run; each file is whole when it gets its place."""
    out, draft = Path(s.output), Path(s.output) / ".saving"
    save_encoder(draft, student, tokenizer, s.pooling, s.max_length)
    torch.save([W.detach().cpu() for W in projections], draft / "projections.pt")
    record = {"settings": asdict(s), "teacher": cache["teacher"], "corpus": cache["fingerprint"], "cost": cost} | provenance()
    (draft / "talas.json").write_text(json.dumps(record, indent=2) + "\n")
    move_files(draft, out)
    (out / "checkpoint.pt").unlink()


def parse_settings(argv):
    """Settings from the command line; the tiny student brings its own defaults, which are printed."""
    parser = HfArgumentParser(Settings, description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.error = fail
    if parser.parse_args(argv).student == "tiny":
        print("student tiny, from scratch, unless set otherwise:", ", ".join(f"--{k} {v}" for k, v in tiny.SETTINGS.items()))
        parser.set_defaults(**tiny.SETTINGS)
    return Settings(**vars(parser.parse_args(argv)))


def main(argv=None):
    """The command line: read the cache, train, save."""
    quiet()
    join_processes()
    s = parse_settings(argv)
    s.device, resumed = str(pick_device(s.device)), find_checkpoint(s)
    cache = load_cache(s.teacher) if s.lambda2 or s.teacher.endswith(".pt") else load_sentences(s.teacher)
    torch.manual_seed(s.seed % 2**63)  # torch takes no larger one; check() refuses it below, in one line
    if s.student == "tiny":
        student, tokenizer, s.pooling = tiny.tiny_student(cache["sentences"], s.seed % 2**63, s.pooling)
    else:
        student, tokenizer, s.pooling = load_encoder(s.student, s.pooling)
    check(s, student, tokenizer, cache["sentences"])
    wait_for_processes()  # none writes before all have looked at the output
    try:
        with writing(s.output):
            Path(s.output).mkdir(parents=True, exist_ok=True)
        projections, cost = train(s, cache, student.to(s.device), tokenizer, resumed)
        if rank() == 0:
            with writing(s.output):
                save_student(s, cache, student, tokenizer, projections, cost)
    except KeyboardInterrupt:
        fail(f"interrupted; the same command with --resume goes on from the last whole epoch in {s.output}")
    except torch.OutOfMemoryError:
        fail(f"{s.device} is out of memory; try a smaller --batch_size or --max_length")
    print(", ".join(f"{name} {value:.1f}" for name, value in cost.items()), f"\nstudent saved to {s.output}")
    leave_processes()


if __name__ == "__main__":
    main()
