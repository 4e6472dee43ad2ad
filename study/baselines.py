"""Other methods that need only the teacher's cached embeddings.

    python study/baselines.py --method distill --teacher bge-m3.pt --student ...

Each method has its own objective. The rest of the training is that of talas.py, with AdamW by
default. study/README.md lists the choices that were made.
"""

import sys
import tempfile
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
import torch.nn.functional as F

import talas
from cache_teacher import load_cache
from support.data import Corpus
from support.encoder import dry_run
from support.run import (
    check_fit,
    check_output_folder,
    check_settings,
    start_processes,
    stop_processes,
)


# ---------------------------------------------------------------------------------------- settings
def fixed(value):
    """A setting without a flag, because it belongs to TALAS alone."""
    return field(default=value, init=False)


@dataclass(frozen=True)
class WithStart(talas.Settings):
    """TALAS's own settings, and how W starts."""

    projection_std: float = 1e-3  # the standard deviation of W's first values


@dataclass(frozen=True)
class Common(WithStart):
    """The settings that all other methods share, also those of online.py."""

    optimizer: Literal["asam", "sam", "adamw"] = "adamw"
    lambda3: float = fixed(0.0)  # so lasd_layers and detach_guide change nothing
    anchored_layers: int = fixed(1)
    disam_lambda: float = fixed(0.0)


@dataclass(frozen=True)
class Settings(Common):
    """The common settings, and those that belong to one method; the other methods ignore them."""

    method: Literal["distill", "stella", "distillcse", "rkd"] = "distill"
    # distill
    distance: Literal["cosine", "mse"] = "cosine"
    # stella: the weights of its three losses, a margin, epochs of W alone
    cosine_weight: float = 10.0
    similarity_weight: float = 200.0
    relative_weight: float = 20.0
    margin: float = 0.015
    projection_epochs: int = 2
    # distillcse: τ of SimCSE and of the two softmaxes; the width of a group, 0 does not shuffle
    temperature: float = 0.05
    student_temperature: float = 0.025
    teacher_temperature: float = 0.0125
    group_p: float = 0.1
    # rkd
    distance_weight: float = 1.0
    angle_weight: float = 2.0
    # as for TAMD alone: talas.py loads the targets and makes one W
    lambda1: float = fixed(0.0)
    lambda2: float = fixed(1.0)


def method_of(s):
    """The method that the settings name; "TALAS" for settings of TALAS itself."""
    return getattr(s, "method", "TALAS")


# ------------------------------------------------------------------------- distill, Jasper & Stella
def distill_loss(e, teacher, distance):
    """Embedding distillation (after Kim et al., 2023): mean distance of e and teacher, (N, d_T)."""
    if distance == "mse":
        return F.mse_loss(e, teacher)
    return (1 - F.cosine_similarity(e, teacher)).mean()


def cosines(e):
    """The cosine of every pair of sentences: (N, d) -> (N (N - 1) / 2,)."""
    i, j = torch.triu_indices(len(e), len(e), offset=1, device=e.device)
    return talas.relation_matrix(e)[i, j]


def similarity_loss(e, teacher):
    """L_sim of Jasper and Stella (Zhang et al., 2025): mean squared difference of two R, (N, N)."""
    return F.mse_loss(talas.relation_matrix(e), talas.relation_matrix(teacher))


def relative_similarity_loss(e, teacher, margin):
    """L_resim of Jasper and Stella: the mean of max(0, s_mn - s_ij + margin) where t_ij > t_mn.

    s and t are the cosines of the N (N - 1) / 2 pairs of sentences, by student and by teacher: the
    student should order the pairs as the teacher does. Memory grows with N⁴.
    """
    s = cosines(e)  # (P,)
    t = cosines(teacher)  # (P,)
    more_similar = t[:, None] > t[None, :]  # (P, P): pair ij before pair mn
    hinges = F.relu(s[None, :] - s[:, None] + margin)[more_similar]
    return hinges.sum() / max(len(hinges), 1)  # none if the teacher finds all pairs equal


def stella_loss(e, teacher, s):
    """The loss of Jasper and Stella's stages 1 and 2: the weighted sum of three."""
    loss = s.cosine_weight * distill_loss(e, teacher, "cosine")
    loss = loss + s.similarity_weight * similarity_loss(e, teacher)
    return loss + s.relative_weight * relative_similarity_loss(e, teacher, s.margin)


# -------------------------------------------------------------------------------------- DistillCSE
def group_p_shuffle(similarities, p):
    """Group-P shuffling of DistillCSE (Xu et al., 2023): shuffle similarities that are close.

    similarities: (N, N - 1), of each sentence to the others. Their softmax is cumulated from the
    largest to the smallest. Those whose cumulated values lie in one interval [g p, (g + 1) p) are a
    group and are shuffled. Returns the same shape.
    """
    descending, order = similarities.sort(descending=True)
    cumulated = descending.softmax(-1).cumsum(-1).clamp(max=1 - 1e-6)
    group = cumulated.div(p).floor()
    shuffled = (group + torch.rand_like(group)).argsort(-1)  # within the groups
    return torch.empty_like(descending).scatter(-1, order, descending.gather(-1, shuffled))


def similarities_to_others(e):
    """Cosines of each sentence to the others of the batch: (N, d) -> (N, N - 1)."""
    others = ~torch.eye(len(e), dtype=torch.bool, device=e.device)
    return talas.relation_matrix(e)[others].view(len(e), -1)


def distribution_loss(z, teacher, s, shuffled):
    """DistillCSE's distillation: the mean cross entropy with the teacher's distribution.

    z: (N, d_S); teacher: (N, d_T). A sentence's distribution is the softmax of its similarities to
    the others over a temperature. The teacher's similarities may be shuffled first.
    """
    student_similarities = similarities_to_others(z)
    target = similarities_to_others(teacher)
    if shuffled and s.group_p:
        target = group_p_shuffle(target, s.group_p)
    target = (target / s.teacher_temperature).softmax(-1)
    return F.cross_entropy(student_similarities / s.student_temperature, target)


# --------------------------------------------------------------------------------------------- RKD
def distances(e):
    """ψ_D of RKD: distances between embeddings over the mean of pairs i ≠ j, (N, d) -> (N, N)."""
    differences = e[:, None] - e[None, :]  # (N, N, d)
    lengths = differences.square().sum(-1).clamp(min=1e-12).sqrt()  # sqrt has no gradient at 0
    unequal = ~torch.eye(len(e), dtype=torch.bool, device=e.device)
    return lengths / lengths[unequal].mean() * unequal


def angles(e):
    """ψ_A of RKD: the cosine of the angle at j between i and k, [j, i, k], (N, d) -> (N, N, N)."""
    differences = e[None, :] - e[:, None]  # (N, N, d): [j, i] is e_i - e_j
    directions = F.normalize(differences, dim=-1)
    return directions @ directions.transpose(1, 2)


def rkd_loss(e, teacher, s):
    """Relational knowledge distillation (Park et al., 2019): Huber losses, distances and angles."""
    loss = s.distance_weight * F.smooth_l1_loss(distances(e), distances(teacher))
    return loss + s.angle_weight * F.smooth_l1_loss(angles(e), angles(teacher))


# ---------------------------------------------------------------------------------------- training
class Baseline(talas.Objective):
    """A method's objective on the student's last layer; projections: [W], (d_S, d_T), or none."""

    def forward(self, tokens, teacher, domains=None):
        """(loss, {its terms}); tokens and teacher as in talas.Objective, domains are ignored."""
        s = self.s
        n_views = 2 if s.method == "distillcse" else 1
        views = talas.embed(self.encoder, tokens, s, n_views)[-1]  # (views, N, d_S)
        e = views[0]
        if s.method == "distillcse":
            simcse = talas.simcse_loss(e, views[1], s.temperature)
            # λ_max is of one function: without the shuffling, as without dropout
            distillation = distribution_loss(e, teacher, s, shuffled=self.training)
            loss = simcse + distillation
            return loss, {"simcse": simcse, "distillation": distillation, "loss": loss}
        if s.method == "rkd":
            loss = rkd_loss(e, teacher, s)
        elif s.method == "stella":
            loss = stella_loss(e @ self.projections[0], teacher, s)
        else:
            loss = distill_loss(e @ self.projections[0], teacher, s.distance)
        return loss, {"distillation": loss, "loss": loss}


def prepare(s, cache, kind=talas.Objective):
    """(corpus, objective) for a cache; kind: the class of the objective of TALAS itself."""
    if method_of(s) != "TALAS":
        kind = Baseline
    encoder = talas.load_student(s, cache["sentences"])
    corpus = Corpus(cache, encoder)
    projections = []
    if method_of(s) not in ("distillcse", "rkd"):  # these compare sentences within each space
        projections = talas.new_projections(s, corpus)
    if hasattr(s, "projection_std"):
        for W in projections:
            W.mul_(s.projection_std / talas.W_STD)
    return corpus, kind(encoder, projections, s)


def start(s, path):
    """The first steps of talas.main; path: the cache, or a corpus. Returns what it holds."""
    check_settings(s)
    check_output_folder(s)
    start_processes(s)
    cache = load_cache(path, needed=s.lambda2 > 0)
    torch.manual_seed(s.seed)
    return cache


def train_and_save(s, cache, corpus, objective):
    """The last steps of talas.main, with Stella's first stage."""
    check_fit(s, corpus)
    dry_run(corpus.encoder, corpus, s.output)
    resumed = s.resume and Path(s.output, "checkpoint.pt").exists()
    if method_of(s) == "stella" and not resumed:
        print(f"first stage: {s.projection_epochs} epochs of the projection alone")
        objective.model.requires_grad_(False)
        with tempfile.TemporaryDirectory() as folder:
            stage = replace(
                s, epochs=s.projection_epochs, output=folder, resume=False, sharpness=False
            )
            talas.train(stage, corpus, objective)
        objective.model.requires_grad_(True)
    talas.train(s, corpus, objective)
    talas.finish(s, cache, objective)
    stop_processes()


def run(s, kind=talas.Objective):
    """Train with the settings s, of a method or of TALAS itself; kind: as in prepare."""
    cache = start(s, s.teacher)
    corpus, objective = prepare(s, cache, kind)
    train_and_save(s, cache, corpus, objective)


def main(argv=None):
    """The command line: that of talas.py with the settings of the methods."""
    run(talas.parse_settings(argv, Settings))


if __name__ == "__main__":
    main()
