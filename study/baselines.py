"""Other methods that need no more than the cached embeddings of the teacher.

    python study/baselines.py --method distill --teacher bge-m3.pt --student ...

The methods: stella and distillcse, of Table 1, and the plainest one, distill (--distance cosine or
mse), which the paper does not have. The loop, the batches, the optimizer, the student, the cache
and all files are those of talas.py, and so are the flags; only the objective differs, and AdamW is
the default optimizer. What their papers leave open, and where this departs from them, stands in
study/README.md.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from support import fail, one_line
from support import run as runs
from support.encoder import Corpus

import tempfile
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F
from transformers.hf_argparser import HfArg

import talas
from cache_teacher import load_cache


@dataclass(frozen=True)
class Settings(talas.Settings):
    """Those of talas.py but for TALAS's own, and each method's, which the others do not read."""

    method: Literal["distill", "stella", "distillcse"] = HfArg(default="distill", help="which")
    distance: Literal["cosine", "mse"] = HfArg(default="cosine", help="distill's, to the teacher")
    cosine_weight: float = HfArg(default=10.0, help="stella's, of the cosine loss")
    similarity_weight: float = HfArg(default=200.0, help="stella's, of the similarity loss")
    relative_weight: float = HfArg(default=20.0, help="stella's, of relative similarity")
    margin: float = HfArg(default=0.015, help="stella's, of relative similarity")
    projection_epochs: int = HfArg(default=2, help="stella's first stage: W alone is trained")
    temperature: float = HfArg(default=0.05, help="distillcse's, of SimCSE")
    student_temperature: float = HfArg(default=0.025, help="distillcse's, of the student's softmax")
    teacher_temperature: float = HfArg(default=0.0125, help="distillcse's, of the teacher's")
    group_p: float = HfArg(default=0.1, help="distillcse's groups, in probability; 0: no shuffling")
    optimizer: Literal["asam", "sam", "adamw"] = HfArg(default="adamw", help="Eqs. 2-9")
    lambda1: float = field(default=0.0, init=False)  # TALAS's alone, no flags here;
    lambda2: float = field(default=1.0, init=False)  # so set, talas.py reads targets, makes one W
    lambda3: float = field(default=0.0, init=False)
    anchored_layers: int = field(default=1, init=False)
    lasd_layers: int = field(default=0, init=False)
    detach_guide: bool = field(default=False, init=False)
    disam_lambda: float = field(default=0.0, init=False)


# --------------------------------------------------------------------------------------- the losses
def distill_loss(e, teacher, distance):
    """Embedding distillation (after Kim et al., 2023) as sentence-transformers' EmbedDistillLoss.

    e, teacher: (N, d_T), the student's projected, the teacher's. cosine: the mean of 1 - cos;
    mse: the mean square of the differences. A scalar.
    """
    if distance == "mse":
        return F.mse_loss(e, teacher)
    return (1 - F.cosine_similarity(e, teacher)).mean()


def off_diagonal(R):
    """The rows of a matrix without its diagonal, (N, N) -> (N, N - 1)."""
    return R[~torch.eye(len(R), dtype=torch.bool, device=R.device)].view(len(R), -1)


def similarity_loss(e, teacher):
    """Jasper and Stella's L_sim (Zhang et al., 2025): mean square of the two R's difference.

    e, teacher: (N, d) of any d; R: talas.relation_matrix, (N, N). A scalar.
    """
    return F.mse_loss(talas.relation_matrix(e), talas.relation_matrix(teacher))


def relative_similarity_loss(e, teacher, margin):
    """Jasper and Stella's L_resim: max(0, s_mn - s_ij + margin) wherever t_ij > t_mn, the mean.

    s, t: the similarities of the N (N - 1) / 2 pairs of sentences, to the student, to the teacher.
    Of two pairs, the one that is more alike to the teacher is to be so to the student, by a margin.
    The memory grows with N⁴.
    """
    i, j = torch.triu_indices(len(e), len(e), offset=1, device=e.device)
    s, t = (talas.relation_matrix(x)[i, j] for x in (e, teacher))  # (P,)
    ordered = t[:, None] > t[None, :]  # (P, P): of two pairs each way round, the teacher's
    hinges = F.relu(s[None, :] - s[:, None] + margin)[ordered]
    return hinges.sum() / max(len(hinges), 1)  # a teacher to whom all are alike orders none


def stella_loss(e, teacher, s):
    """Jasper and Stella's objective in their stages 1 and 2: the weighted sum of three losses."""
    loss = s.cosine_weight * distill_loss(e, teacher, "cosine")
    loss = loss + s.similarity_weight * similarity_loss(e, teacher)
    return loss + s.relative_weight * relative_similarity_loss(e, teacher, s.margin)


def group_p_shuffle(similarities, p):
    """DistillCSE's Group-P shuffling (Xu et al., 2023): swap likely confusions of the teacher.

    similarities: (N, N - 1), of each sentence to the others. Their softmax, without a temperature,
    is cumulated downwards; those that end in one interval [g p, (g + 1) p) form a group, in which
    they are dealt out anew at random. Of the same shape.
    """
    falling, order = similarities.sort(descending=True)
    group = falling.softmax(-1).cumsum(-1).clamp(max=1 - 1e-6).div(p).floor()
    dealt = (group + torch.rand_like(group)).argsort(-1)  # a group stays in its own places
    return torch.empty_like(falling).scatter(-1, order, falling.gather(-1, dealt))


def distribution_loss(z, teacher, s, shuffled):
    """DistillCSE's distillation: cross entropy from the teacher's in-batch distribution, the mean.

    z: (N, d_S); teacher: (N, d_T). Of each sentence the softmax of its cosine to the others, over a
    temperature; the teacher's cosines are shuffled first, or are not. A scalar.
    """
    student, target = (off_diagonal(talas.relation_matrix(x)) for x in (z, teacher))  # (N, N - 1)
    target = group_p_shuffle(target, s.group_p) if shuffled and s.group_p else target
    target = (target / s.teacher_temperature).softmax(-1)
    return F.cross_entropy(student / s.student_temperature, target)


class Baseline(talas.Objective):
    """A method's objective, on the student's last layer; start: [W] of stella's first stage."""

    metrics = ["simcse", "distillation", "loss", "sharpness_gap"]

    def __init__(self, student, projections, s, start=None):
        super().__init__(student, [] if s.method == "distillcse" else start or projections, s)

    def forward(self, tokens, teacher):
        """(loss, [simcse, distillation]); of tokens and teacher as in talas.total_loss."""
        s, views = self.s, 2 if self.s.method == "distillcse" else 1
        z, *second = talas.embed(self.student, tokens, s, views)[-1]  # (N, d_S)
        simcse = talas.simcse_loss(z, *second, s.temperature) if second else z.new_zeros(())
        if s.method == "distill":
            own = distill_loss(z @ self.projections[0], teacher, s.distance)
        elif s.method == "stella":
            own = stella_loss(z @ self.projections[0], teacher, s)
        else:  # λ_max is of one function: without the shuffling, as without dropout
            own = distribution_loss(z, teacher, s, shuffled=self.model.training)
        return simcse + own, [simcse, own]


# ------------------------------------------------------------------------------------ command line
def check_settings(s):
    """End the program if a setting has no meaning."""
    may_be_0 = ("cosine_weight", "similarity_weight", "relative_weight", "margin", "group_p")
    runs.check_settings(s, may_be_0)
    if s.batch_size < 3 and s.method != "distill":
        fail(f"--batch_size {s.batch_size}: {s.method} compares sentences; take 3 or more")
    if s.batch_size > 256 and s.method == "stella":
        fail(f"--batch_size {s.batch_size}: stella compares pairs of pairs; take 256 at most")
    if s.cosine_weight == s.similarity_weight == s.relative_weight == 0:
        fail("--cosine_weight, --similarity_weight and --relative_weight are all 0")
    if s.group_p and not 0.001 <= s.group_p <= 1:
        fail(f"--group_p {s.group_p}: it is a probability, from 0.001 to 1, or 0")


def first_stage(s, corpus, student):
    """Stella's first stage: the projection alone learns, with the student fixed. Returns [W]."""
    if runs.rank() == 0:
        Path(s.output, "checkpoint.pt").unlink(missing_ok=True)  # of a run that is overwritten
    print(f"the projection alone, {s.projection_epochs} epochs; then all")
    student.model.requires_grad_(False)
    with tempfile.TemporaryDirectory() as folder:
        stage = replace(s, epochs=s.projection_epochs, output=folder, sharpness=False)
        projections = talas.train(stage, corpus, student, Baseline)
    student.model.requires_grad_(True)
    return projections


@one_line
def main(argv=None):
    """The command line: as that of talas.py, with a first stage for stella."""
    s = talas.parse_settings(argv, Settings)
    check_settings(s)
    with runs.started(s):
        runs.check_output(s)
        cache = load_cache(s.teacher)
        torch.manual_seed(s.seed)
        student = talas.load_student(s, cache["sentences"])
        runs.check_fit(s, student, len(cache["sentences"]))
        corpus, staged = Corpus(cache, student), s.method == "stella" and not s.resume
        start = first_stage(s, corpus, student) if staged else None
        projections = talas.train(s, corpus, student, partial(Baseline, start=start))
        about = {"teacher": cache["teacher"], "corpus": cache["fingerprint"]}
        runs.finish(s, about, talas.save_student, student, projections)


if __name__ == "__main__":
    main()
