"""TALAS: distil the cached sentence embeddings of a large teacher into a small student encoder.

    python cache_teacher.py && python talas.py               # the demo: offline, on a laptop's CPU
    python talas.py --teacher teacher.pt --student nreimers/MiniLMv2-L6-H384-distilled-from-BERT-Base

Read it beside the paper: settings (Table 5, Appendix E), pooling (Section 3), the losses (Eqs. 3-7), ASAM (Eq. 2),
the student, its data, Algorithm 1, and what is saved. Throughout, N is the batch size, T the number of tokens,
L the number of Transformer layers of the student, d_S and d_T the dimensions of student and teacher.
"""

import json
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
import transformers
from tokenizers import BertWordPieceTokenizer
from tqdm import tqdm
from transformers import BertConfig, BertModel, BertTokenizer, HfArgumentParser
from transformers.hf_argparser import HfArg

from cache_teacher import fail, load_cache, load_encoder, pad, pick_device, pool, quiet, tokenize

# ------------------------------------------------------------------------------------------------------- settings


@dataclass
class Settings:
    """Every setting, with the paper's value as its default. The README says why where the paper says nothing."""

    teacher: str = HfArg(default="teacher.pt", help="the teacher's embeddings, cached by cache_teacher.py")
    student: str = HfArg(default="tiny", help="Hub id or directory of an encoder; tiny: a small BERT from scratch")
    output: str = HfArg(default="student", help="directory for the distilled student")
    overwrite: bool = HfArg(default=False, help="replace an earlier run's output")
    pooling: Literal["auto", "cls", "mean", "last"] = HfArg(default="auto", help="auto: as the student's files say")
    lambda1: float = HfArg(default=0.001, help="weight of SimCSE, Eq. 6")
    lambda2: float = HfArg(default=0.75, help="weight of TAMD, Eq. 3")
    lambda3: float = HfArg(default=1.0, help="weight of LASD, Eq. 5")
    temperature: float = HfArg(default=0.07, help="tau of Eq. 6")
    anchored_layers: int = HfArg(default=2, help="K = k + 1: how many of the top layers TAMD anchors, Eq. 3")
    detach_guide: bool = HfArg(default=False, help="stop LASD's gradient into the upper layer of each pair")
    optimizer: Literal["asam", "adamw"] = HfArg(default="asam", help="asam: Algorithm 1; adamw: one pass, no ascent")
    rho: float = HfArg(default=0.05, help="radius of the ascent step, Eq. 2")
    eta: float = HfArg(default=0.0, help="added to |w| in T_w, Eq. 2")
    lr: float = HfArg(default=2e-5, help="peak learning rate of AdamW, cosine decay to 0")
    projection_lr_scale: float = HfArg(default=5.0, help="the learning rate of the projections W_l, times lr")
    weight_decay: float = HfArg(default=0.01, help="of AdamW, on every parameter")
    warmup_ratio: float = HfArg(default=0.06, help="part of the steps in which lr rises from 0")
    epochs: int = HfArg(default=5, help="passes over the corpus")
    batch_size: int = HfArg(default=32, help="sentences a step, N")
    max_length: int = HfArg(default=256, help="tokens; longer sentences are truncated")
    seed: int = HfArg(default=42, help="of initial weights, order and dropout")
    device: str = HfArg(default="auto", help="auto: the accelerator if there is one, else cpu")


# What the student from scratch needs instead: the paper's values move a pretrained student a little.
TINY = {"lr": 5e-3, "epochs": 1}
TINY_BERT = {"hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 128, "attention_probs_dropout_prob": 0.0}
TINY_VOCABULARY = 4000

LOG_EVERY = 10  # steps between two lines of metrics.jsonl
METRICS = ["loss", "simcse", "tamd", "lasd", "sharpness_gap"]  # the gap is L(w̃) - L(w)

# ------------------------------------------------------------------------------------------------ losses (Section 3)


def tamd_loss(layers, projections, teacher):
    """Teacher-anchored multi-layer distillation, Eq. 3: the mean over K layers of 1 - cos(e_l W_l, e^T).

    layers: K tensors (N, d_S), the top layers; projections: K tensors W_l (d_S, d_T); teacher: (N, d_T). Scalar in [0, 2].
    """
    distances = [1 - F.cosine_similarity(E @ W, teacher, dim=-1) for E, W in zip(layers, projections, strict=True)]
    return torch.stack(distances).mean()  # (K, N) -> scalar


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


def simcse_loss(z, z_prime, temperature):
    """Unsupervised SimCSE, Eq. 6: two dropout views (N, d_S) -> scalar; -log softmax of the matching pair's cosine / tau."""
    similarities = F.normalize(z, dim=-1) @ F.normalize(z_prime, dim=-1).T / temperature  # (N, N)
    return F.cross_entropy(similarities, torch.arange(len(z), device=z.device))


def total_loss(student, projections, tokens, teacher, s):
    """The training objective, Eq. 7, on one batch: (loss, [simcse, tamd, lasd]); a term of weight 0 is not computed.

    tokens: input_ids and attention_mask, (N, T); teacher: (N, d_T), the cached targets; s: Settings.
    """
    N = len(tokens["input_ids"])
    if s.lambda1:  # both views in one forward pass: dropout draws a mask for each of the 2N rows
        tokens = {name: torch.cat([t, t]) for name, t in tokens.items()}  # (2N, T)
    hidden = student(**tokens, output_hidden_states=True).hidden_states[1:]  # L of (N or 2N, T, d_S); [0] is no layer
    view = [pool(h[:N], tokens["attention_mask"][:N], s.pooling) for h in hidden]  # L of (N, d_S): the first view
    zero = view[-1].new_zeros(())

    simcse = tamd = lasd = zero
    if s.lambda1:
        second_view = pool(hidden[-1][N:], tokens["attention_mask"][N:], s.pooling)  # (N, d_S)
        simcse = simcse_loss(view[-1], second_view, s.temperature)
    if s.lambda2:
        tamd = tamd_loss(view[-s.anchored_layers :], projections, teacher)
    if s.lambda3:
        lasd = lasd_loss(view, s.detach_guide)
    loss = s.lambda1 * simcse + s.lambda2 * tamd + s.lambda3 * lasd
    return loss, [simcse, tamd, lasd]


# --------------------------------------------------------------------------------------------------- ASAM (Eq. 2)


class ASAM:
    """Adaptive sharpness-aware minimization, Eq. 2, around an ordinary optimizer (Kwon et al., 2021).

        loss(w).backward();  ascent_step()     # w -> w̃ = w + ε̂
        loss(w̃).backward();  descent_step()    # back to w; the optimizer steps with the gradient found at w̃

    ε̂ = ρ T_w² ∇L(w) / ‖T_w ∇L(w)‖₂ with T_w = diag(|w| + η); adaptive=False sets T_w = I, which is SAM (Eq. 9).
    """

    def __init__(self, optimizer, rho, eta=0.0, adaptive=True):
        self.optimizer, self.rho, self.eta, self.adaptive = optimizer, rho, eta, adaptive
        self.moved, self.w = [], []  # the parameters that stand at w̃, and their values at w

    @torch.no_grad()
    def ascent_step(self):
        """Move w to w̃ = w + ε̂ and clear the gradients. Parameters without a gradient stay where they are."""
        self.moved = [p for group in self.optimizer.param_groups for p in group["params"] if p.grad is not None]
        if not self.moved:
            return
        epsilon = [p.grad for p in self.moved]  # the gradient's own memory becomes ε̂: the copy of w is all that ASAM adds
        if self.adaptive:
            T = torch._foreach_abs(self.moved)
            torch._foreach_add_(T, self.eta)
            torch._foreach_mul_(epsilon, T)  # T_w ∇L
        norm = torch.stack(torch._foreach_norm(epsilon)).norm()  # over all parameters together
        scale = torch.where(norm > 0, self.rho / norm, norm)  # a zero gradient gives no step, not 0 / 0
        if self.adaptive:
            torch._foreach_mul_(epsilon, T)  # T_w² ∇L
            del T
        torch._foreach_mul_(epsilon, scale)
        self.w = [p.clone() for p in self.moved]
        torch._foreach_add_(self.moved, epsilon)
        self.optimizer.zero_grad()

    @torch.no_grad()
    def restore(self):
        """Put w back exactly, from the copy."""
        if self.moved:
            torch._foreach_copy_(self.moved, self.w)
        self.moved, self.w = [], []

    def descent_step(self):
        """Put w back, then step the optimizer with the gradients found at w̃ and clear them."""
        self.restore()
        self.optimizer.step()
        self.optimizer.zero_grad()


# ------------------------------------------------------------------------------------- the demo's student, from scratch


def tiny_student(sentences, seed):
    """(model, tokenizer, "cls"): a small BERT with random weights and a WordPiece vocabulary of the sentences' own."""
    wordpiece = BertWordPieceTokenizer()
    letters = sorted(set(wordpiece.normalize("".join(sentences))) - {" "})
    # naming the "##" letters up front fixes the trainer's order, which otherwise changes from run to run
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"##{letter}" for letter in letters)]
    wordpiece.train_from_iterator(sentences, TINY_VOCABULARY, special_tokens=special, show_progress=False)
    tokenizer = BertTokenizer(vocab=wordpiece.get_vocab(), model_max_length=512)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = BertModel(BertConfig(vocab_size=len(tokenizer), **TINY_BERT))
    return model, tokenizer, "cls"


# ----------------------------------------------------------------------------------------------------- Algorithm 1


def training_step(student, projections, optimizer, tokens, teacher, s):
    """One step of Algorithm 1 on a batch: w moves. Returns [L(w), its three terms, L(w̃) - L(w)], (5,), without gradient."""
    objective = lambda: total_loss(student, projections, tokens, teacher, s)
    if s.optimizer == "adamw":
        loss, terms = perturbed_loss, _ = objective()
    else:  # 1. Ascent step: the gradient at w gives w̃
        with torch.random.fork_rng():  # the second pass draws the same dropout masks: one function, at two points
            loss, terms = objective()
        loss.backward()
        optimizer.ascent_step()
        perturbed_loss, _ = objective()
    perturbed_loss.backward()  # 2. Descent step: the gradient at w̃ moves w
    optimizer.descent_step()
    return torch.stack([loss, *terms, perturbed_loss - loss]).detach()


def set_up(s, student, d_T, steps):
    """(projections W_l, optimizer, scheduler): AdamW with a warmed-up cosine schedule, inside ASAM."""
    d_S, anchored = student.config.hidden_size, range(s.anchored_layers if s.lambda2 else 0)
    # The cosine of Eq. 3 ignores the length of W_l, so its initial size only sets how fast it can turn: start small.
    projections = [torch.nn.Parameter(torch.randn(d_S, d_T).to(student.device) * 1e-3) for _ in anchored]
    groups = [{"params": list(student.parameters())}, {"params": projections, "lr": s.lr * s.projection_lr_scale}]
    adamw = torch.optim.AdamW([g for g in groups if g["params"]], lr=s.lr, weight_decay=s.weight_decay, fused=True)
    scheduler = transformers.get_cosine_schedule_with_warmup(adamw, round(s.warmup_ratio * steps), steps)
    return projections, ASAM(adamw, s.rho, s.eta), scheduler


def train(s, cache, student, tokenizer, log):
    """Algorithm 1. Trains the student in place and returns the projections; `log` is called with each line of metrics."""
    sentences, targets = tokenize(tokenizer, cache["sentences"], s.max_length), cache["embeddings"]
    steps_per_epoch = len(sentences) // s.batch_size
    steps = s.epochs * steps_per_epoch
    projections, optimizer, scheduler = set_up(s, student, targets.shape[1], steps)
    student.train()
    step, window, start = 0, [], time.perf_counter()
    bar = tqdm(total=steps, unit="step", disable=None, dynamic_ncols=True)
    for epoch in range(s.epochs):
        order = torch.randperm(len(sentences), generator=torch.Generator().manual_seed(s.seed + epoch))
        for batch in order.split(s.batch_size)[:steps_per_epoch]:  # sample a mini-batch B; an incomplete one is left out
            tokens = pad([sentences[i] for i in batch], tokenizer.pad_token_id, student.device)  # (N, T)
            teacher = targets[batch].to(student.device, torch.float32)  # retrieve its cached targets, (N, d_T)
            window.append(training_step(student, projections, optimizer, tokens, teacher, s))
            scheduler.step()
            step += 1
            bar.update()
            if step % LOG_EVERY == 0 or step == steps:
                means = dict(zip(METRICS, torch.stack(window).mean(0).tolist()))
                ms = 1000 * (time.perf_counter() - start) / len(window)
                log({"step": step, "epoch": epoch + 1, **means, "lr": scheduler.get_last_lr()[0], "ms_per_step": ms})
                bar.set_postfix({name: f"{means[name]:.4f}" for name in METRICS[:4]})
                window, start = [], time.perf_counter()
    bar.close()
    return projections


# ---------------------------------------------------------------------------------------------------------- saving


def save_student(s, cache, student, tokenizer, projections):
    """Write the student so that transformers and sentence-transformers both load it, with the pooling it was trained with."""
    out = Path(s.output)
    tokenizer.model_max_length = min(s.max_length, tokenizer.model_max_length)
    student.save_pretrained(out)
    tokenizer.save_pretrained(out)
    torch.save([W.detach().cpu() for W in projections], out / "projections.pt")
    names = {"cls": "cls_token", "mean": "mean_tokens", "last": "lasttoken"}
    pooling = {f"pooling_mode_{name}": s.pooling == key for key, name in names.items()}
    modules = [("Transformer", ""), ("Pooling", "1_Pooling")]
    files = {
        "modules.json": [{"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"} for i, (kind, path) in enumerate(modules)],
        "1_Pooling/config.json": {"word_embedding_dimension": student.config.hidden_size, **pooling},
        "sentence_bert_config.json": {"max_seq_length": tokenizer.model_max_length, "do_lower_case": False},
        "talas.json": {
            "settings": asdict(s), "teacher": cache["teacher"], "corpus": cache["fingerprint"],
            "versions": {"torch": torch.__version__, "transformers": transformers.__version__, "python": sys.version.split()[0]},
        },
    }  # fmt: skip
    (out / "1_Pooling").mkdir(exist_ok=True)
    for name, content in files.items():
        (out / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def parse_settings(argv):
    """Settings from the command line; the tiny student brings its own defaults, which are printed."""
    parser = HfArgumentParser(Settings, description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.error = fail
    s = Settings(**vars(parser.parse_args(argv)))
    if s.student == "tiny":
        print("student tiny, from scratch, unless set otherwise:", ", ".join(f"--{k} {v}" for k, v in TINY.items()))
        parser.set_defaults(**TINY)
        s = Settings(**vars(parser.parse_args(argv)))
    return s


def main(argv=None):
    """The command line: read the cache, train, save."""
    quiet()
    s = parse_settings(argv)
    if Path(s.output).exists() and not s.overwrite:
        fail(f"{s.output} exists; choose another --output, or --overwrite it")
    cache = load_cache(s.teacher)
    torch.manual_seed(s.seed)
    if s.student == "tiny":
        student, tokenizer, s.pooling = tiny_student(cache["sentences"], s.seed)
    else:
        student, tokenizer, s.pooling = load_encoder(s.student, s.pooling)
    student.to(pick_device(s.device))
    Path(s.output).mkdir(parents=True, exist_ok=True)
    with open(f"{s.output}/metrics.jsonl", "w") as metrics:
        projections = train(s, cache, student, tokenizer, lambda line: metrics.write(json.dumps(line) + "\n"))
    save_student(s, cache, student, tokenizer, projections)
    print(f"student saved to {s.output}; score it with: python eval.py {s.output}")


if __name__ == "__main__":
    main()
