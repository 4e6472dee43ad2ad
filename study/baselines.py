"""Other methods that need no more than the cached embeddings of the teacher.

    python study/baselines.py --method distill --teacher bge-m3.pt --student ...

All but the objective and the optimizer, AdamW, is that of talas.py. Choices: study/README.md.
"""

import sys
import tempfile
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Literal

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
import torch.nn.functional as F
from transformers.hf_argparser import HfArg

import talas
from cache_teacher import load_cache
from support import fail, interruptible
from support import run as runs
from support.data import Corpus
from support.encoder import rehearse


@dataclass(frozen=True)
class Common(talas.Settings):
    """Those of talas.py, without flags for TALAS's own; online.py's, too."""

    optimizer: Literal["asam", "sam", "adamw"] = HfArg(default="adamw", help="Eqs. 2, 8, 9")
    lambda3: float = field(default=0.0, init=False)
    anchored_layers: int = field(default=1, init=False)
    lasd_layers: int = field(default=0, init=False)
    detach_guide: bool = field(default=False, init=False)
    disam_lambda: float = field(default=0.0, init=False)


@dataclass(frozen=True)
class Settings(Common):
    """The common ones, and each method's, which the others do not read."""

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
    group_p: float = HfArg(default=0.1, help="distillcse's groups; 0: no shuffling")
    lambda1: float = field(default=0.0, init=False)  # so talas.py reads targets, makes one W
    lambda2: float = field(default=1.0, init=False)


def distill_loss(e, teacher, distance):
    """Embedding distillation (after Kim et al., 2023), of (N, d_T): EmbedDistillLoss's mean."""
    if distance == "mse":
        return F.mse_loss(e, teacher)
    return (1 - F.cosine_similarity(e, teacher)).mean()


def cosines(e):
    """The cosine of every pair of sentences: (N, d) -> (N (N - 1) / 2,)."""
    i, j = torch.triu_indices(len(e), len(e), offset=1, device=e.device)
    return talas.relation_matrix(e)[i, j]


def similarity_loss(e, teacher):
    """Jasper and Stella's L_sim (Zhang et al., 2025), of (N, d): mean square of R's difference."""
    return F.mse_loss(talas.relation_matrix(e), talas.relation_matrix(teacher))


def relative_similarity_loss(e, teacher, margin):
    """Jasper and Stella's L_resim: max(0, s_mn - s_ij + margin) wherever t_ij > t_mn, the mean.

    s, t: the similarities of the N (N - 1) / 2 pairs of sentences, to the student, to the teacher.
    Of two pairs, the one more alike to the teacher is to be so to the student. Memory: N⁴.
    """
    s, t = cosines(e), cosines(teacher)  # (P,)
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

    similarities: (N, N - 1), of each sentence to the others. Their softmax is cumulated downwards;
    those that end in one interval [g p, (g + 1) p) are a group, dealt out anew. Of the same shape.
    """
    falling, order = similarities.sort(descending=True)
    group = falling.softmax(-1).cumsum(-1).clamp(max=1 - 1e-6).div(p).floor()
    dealt = (group + torch.rand_like(group)).argsort(-1)  # a group stays in its own places
    return torch.empty_like(falling).scatter(-1, order, falling.gather(-1, dealt))


def distribution_loss(z, teacher, s, shuffled):
    """DistillCSE's distillation: cross entropy from the teacher's in-batch distribution, the mean.

    z: (N, d_S); teacher: (N, d_T). A sentence's distribution is the softmax of its cosines to the
    others over a temperature; the teacher's may be shuffled first.
    """
    others = ~torch.eye(len(z), dtype=torch.bool, device=z.device)
    student, target = (talas.relation_matrix(x)[others].view(len(z), -1) for x in (z, teacher))
    if shuffled and s.group_p:
        target = group_p_shuffle(target, s.group_p)
    target = (target / s.teacher_temperature).softmax(-1)
    return F.cross_entropy(student / s.student_temperature, target)


class Baseline(talas.Objective):
    """A method's objective, on the student's last layer; projections: [W], (d_S, d_T)."""

    def __init__(self, student, projections, s):
        super().__init__(student, [] if s.method == "distillcse" else projections, s)

    def forward(self, tokens, teacher, domains=None):
        """(loss, {its terms}); tokens and teacher as in talas.Objective, domains are not used."""
        s, views = self.s, 2 if self.s.method == "distillcse" else 1
        z, *second = talas.embed(self.encoder, tokens, s, views)[-1]  # (N, d_S)
        if second:  # λ_max is of one function: without the shuffling, as without dropout
            simcse = talas.simcse_loss(z, *second, s.temperature)
            own = distribution_loss(z, teacher, s, shuffled=self.training)
            return simcse + own, {"simcse": simcse, "distillation": own, "loss": simcse + own}
        e = z @ self.projections[0]  # (N, d_T)
        by_stella = s.method == "stella"
        own = stella_loss(e, teacher, s) if by_stella else distill_loss(e, teacher, s.distance)
        return own, {"distillation": own, "loss": own}


def first_stage(s, corpus, objective):
    """Stella's first stage: the projection alone learns, with the student fixed."""
    Path(s.output, "checkpoint.pt").unlink(missing_ok=True)  # of a run that is overwritten
    print(f"the projection alone, {s.projection_epochs} epochs; then all")
    objective.model.requires_grad_(False)
    with tempfile.TemporaryDirectory() as folder, interruptible("the same command begins again"):
        stage = replace(s, epochs=s.projection_epochs, output=folder, sharpness=False)
        talas.train(stage, corpus, objective)
    objective.model.requires_grad_(True)


def prepare(s, cache, kind=Baseline):
    """(corpus, objective) of a cache, with an objective of that kind."""
    if s.batch_size < 3 and kind is Baseline and s.method != "distill":
        fail(f"--batch_size {s.batch_size}: {s.method} compares sentences; take 3 or more")
    student = talas.load_student(s, cache["sentences"])
    corpus = Corpus(cache, student)
    return corpus, kind(student, talas.new_projections(s, student, corpus.d_T), s)


def run(s, make, after_epoch=lambda objective, epoch: None):
    """From the cache, or online.py's --corpus, to the student as in talas.main.

    make(s, cache) gives (corpus, objective), as prepare; after_epoch(objective, epoch) ends each.
    """
    with runs.started(s):
        cache = load_cache(getattr(s, "corpus", s.teacher), needed=s.lambda2 > 0)
        torch.manual_seed(s.seed)
        corpus, objective = make(s, cache)
        runs.check_fit(s, corpus.encoder, corpus)
        two_views = s.lambda1 > 0 or not len(objective.projections)
        rehearse(corpus.encoder, corpus, two_views)
        if isinstance(objective, Baseline) and s.method == "stella" and not s.resume:
            first_stage(s, corpus, objective)
        talas.train(s, corpus, objective, partial(after_epoch, objective))
        runs.finish(s, cache, partial(talas.save_student, objective))


def main(argv=None):
    """The command line: as that of talas.py, with a first stage for stella."""
    run(talas.parse_settings(argv, Settings), prepare)


if __name__ == "__main__":
    main()
