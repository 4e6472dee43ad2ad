"""The three methods of Table 1 that keep the teacher online: its tokens are needed in every step.

    python study/online.py --method cdm --teacher BAAI/bge-m3 --corpus corpus.jsonl --student ...

cdm: contextual dynamic mapping; dskd: dual-space knowledge distillation; emo. Loop, student, files
and flags are those of talas.py; the objective differs, and what a batch brings: in the place of
e^T, the states of a frozen teacher's tokens, and which of them stands for which student token. What
each row is, Appendix E or the code of the paper's authors, stands in study/README.md.
N is the batch size; n_S and n_T are the tokens of the longest sentence on either side.
"""

import argparse
import sys
from dataclasses import dataclass, field
from functools import lru_cache, partial
from pathlib import Path
from typing import Literal

sys.path.insert(0, str(Path(__file__).parent.parent))

import numpy as np
import torch
import torch.nn.functional as F
from torch.nn import Linear
from transformers.hf_argparser import HfArg

import talas
from cache_teacher import DTYPES, fingerprint
from support.data import unique_corpus
from support.encoder import Corpus, forward, pad, pool, rehearse, save_encoder, tokenize
from support.files import digest
from support.loading import load_encoder
from support.run import check_fit, finish, started

OWN = {  # what the released code has for each method, where Appendix E is silent
    "cdm": {"temperature": 0.07, "projection_lr_scale": 2.0},
    "dskd": {"temperature": 0.07, "projection_lr_scale": 1.0},
    "emo": {"temperature": 0.05, "projection_lr_scale": 1.0, "warmup_ratio": 0.1},
}


@dataclass(frozen=True)
class Settings(talas.Settings):
    """Those of talas.py but for TALAS's own, and the online teacher's."""

    teacher: str = HfArg(default="", help="Hub id or directory of the teacher, which runs online")
    corpus: str = HfArg(default="demo", help="as cache_teacher.py has it")
    method: Literal["cdm", "dskd", "emo"] = HfArg(default="cdm", help="which")
    mse: Literal["elements", "sentences"] = HfArg(
        default="elements", help="mean squares of unit vectors: over elements, as released, or rows"
    )
    teacher_dtype: Literal["float32", "float16", "bfloat16"] = HfArg(
        default="float32", help="of the teacher's weights"
    )
    teacher_pooling: Literal["auto", "cls", "mean", "last"] = HfArg(
        default="auto", help="of the teacher's sentence vector"
    )
    optimizer: Literal["asam", "sam", "adamw"] = HfArg(default="adamw", help="Eqs. 2-9")
    precision: str = field(default="float32", init=False)
    lambda1: float = field(default=1.0, init=False)  # TALAS's alone, no flags here;
    lambda2: float = field(default=0.0, init=False)  # so set, talas.py asks for no cache
    lambda3: float = field(default=0.0, init=False)
    anchored_layers: int = field(default=1, init=False)
    lasd_layers: int = field(default=0, init=False)
    detach_guide: bool = field(default=False, init=False)
    disam_lambda: float = field(default=0.0, init=False)


# ------------------------------------------------------------------ which token stands for which
@lru_cache(maxsize=2**20)
def levenshtein(a, b):
    """The fewest insertions, deletions and substitutions that turn one str into another."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        before, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            before, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, before + (x != y))
    return row[-1]


def edit_distances(a, b):
    """Levenshtein distances of two lists of str, (n_a, n_b): CDM's cost, Appendix E."""
    return np.array([[levenshtein(x, y) for y in b] for x in a]).reshape(len(a), len(b))


def warp(cost):
    """Dynamic time warping: the cheapest monotonic path through a cost, (n, m), Appendix E.

    A list of (i, j) from (0, 0) to (n-1, m-1), each step 1 on in i, in j or in both; of equally
    cheap ways the diagonal one.
    """
    n, m = cost.shape
    total = np.full((n + 1, m + 1), np.inf)  # total[i, j]: up to row i-1 and column j-1
    total[0, 0] = 0
    for i in range(1, n + 1):
        for j in range(1, m + 1):
            ways = total[i - 1, j - 1], total[i - 1, j], total[i, j - 1]
            total[i, j] = cost[i - 1, j - 1] + min(ways)
    path, i, j = [], n, m
    while i and j:
        path.append((i - 1, j - 1))
        ways = {(i - 1, j - 1): 0, (i - 1, j): 1, (i, j - 1): 2}
        i, j = min(ways, key=lambda way: (total[way], ways[way]))
    return path[::-1]


def words_of(encoder, sentence):
    """(positions, strings) of a sentence's tokens that are not special; no markers, lower case."""
    row = encoder.tokenizer.encode(sentence)
    positions = [i for i, special in enumerate(row.special_tokens_mask) if not special]
    bare = (row.tokens[i].removeprefix("##").strip("Ġ▁").lower() for i in positions)
    return positions, list(bare)


def average_along(path, student, teacher):
    """CDM's mapping of a sentence: {(student position, teacher position): weight}, Appendix E.

    Each student token has the mean of the teacher tokens that the path gives it.
    """
    given = {}
    for i, j in path:
        given.setdefault(student[i], []).append(teacher[j])
    return {(s, t): 1 / len(many) for s, many in given.items() for t in many}


def nearest(cost, student, teacher):
    """EMO's maps of a sentence: ({teacher position: nearest student position}, reciprocal pairs).

    cost: (student, teacher), edit distances; of equally near ones the first. A pair (student,
    teacher) is reciprocal where each is the other's nearest.
    """
    of_teacher, of_student = cost.argmin(0), cost.argmin(1)
    found = {teacher[j]: student[i] for j, i in enumerate(of_teacher)}
    pairs = [(student[i], teacher[j]) for j, i in enumerate(of_teacher) if of_student[i] == j]
    return found, pairs


class OnlineCorpus(Corpus):
    """A corpus whose batches bring the online teacher's states in the place of e^T."""

    def __init__(self, sentences, sources, student, teacher, s):
        cache = {"sentences": sentences, "sources": sources}
        super().__init__(cache | {"embeddings": torch.zeros(len(sentences), 0)}, student)
        self.sentences, self.teacher, self.s, self.mapped = sentences, teacher, s, {}
        self.teacher_tokens = tokenize(teacher, sentences)

    def identity(self):
        """A hash of what is learnt from, and of who learns and teaches."""
        weights = self.teacher.model.state_dict().values()
        return digest(super().identity(), self.teacher.identity(), *weights)

    def map(self, i):
        """What the method needs to know of a sentence's tokens; made once."""
        if i not in self.mapped:
            student, own = words_of(self.student, self.sentences[i])
            teacher, its = words_of(self.teacher, self.sentences[i])
            cost = edit_distances(own, its)
            path = warp(cost) if self.s.method == "cdm" and cost.size else []
            average = average_along(path, student, teacher)
            maps = nearest(cost, student, teacher) if cost.size else ({}, [])
            self.mapped[i] = student, teacher, average, maps
        return self.mapped[i]

    @torch.no_grad()
    def batch(self, rows):
        """Positions (N,) -> student tokens; a dict of the teacher's; domains, (N,)."""
        tokens, _, domains = super().batch(rows)
        model, emo = self.teacher.model, self.s.method == "emo"
        batch = pad(self.teacher_tokens, rows.tolist(), model)
        given = forward(model, batch, output_hidden_states=True, output_attentions=emo)
        layers = [h.float() for h in given.hidden_states[1:]]  # L_T of (N, n_T, d_T)
        mask, maps = batch["attention_mask"], [self.map(i) for i in rows.tolist()]
        teacher = {"last": layers[-1], "middle": layers[(len(layers) - 1) // 2], "mask": mask}
        teacher["sentence"] = pool(layers[-1], mask, self.teacher.pooling)  # (N, d_T)
        teacher["words"] = marked([positions for _, positions, *_ in maps], mask)
        teacher["own words"] = marked(
            [positions for positions, *_ in maps], tokens["attention_mask"]
        )
        if self.s.method == "cdm":
            average = torch.zeros(*tokens["input_ids"].shape, mask.shape[1])  # (N, n_S, n_T)
            for k, (*_, weights, _) in enumerate(maps):
                for place, weight in weights.items():
                    average[k][place] = weight
            teacher["average"] = average.to(mask.device)
        if emo:  # the layer that stands where the student's last one does, of as many blocks
            L_S, attentions = self.student.layers, given.attentions
            teacher["attention"] = attentions[L_S * (len(attentions) // L_S) - 1].float().mean(1)
            received = attentions[-1].float().mean(1).sum(1)  # (N, n_T), over heads and queries
            teacher["importance"] = received.masked_fill(mask == 0, -torch.inf).softmax(-1)
            teacher["maps"] = [maps for *_, maps in maps]
        return tokens, teacher, domains


def marked(positions, mask):
    """Lists of positions, one a sentence, as a mask of the form of another: (N, n) of bool."""
    words = torch.zeros_like(mask, dtype=torch.bool)
    for row, some in zip(words, positions):
        row[some] = True
    return words


# --------------------------------------------------------------------------------------- the losses
def unit_mse(a, b, mean="elements"):
    """Mean square of two sets of unit vectors, (r, d): 2 (1 - cos) / d; over rows: 2 (1 - cos)."""
    squares = (F.normalize(a, dim=-1) - F.normalize(b, dim=-1)).square()
    return squares.mean() if mean == "elements" else squares.sum(-1).mean()


def attend(queries, keys, values, mask):
    """Cross-attention, one head: (N, n, d_att), (N, m, d_att), (N, m, d), (N, m) -> (N, n, d)."""
    scores = queries @ keys.transpose(1, 2) / queries.shape[-1] ** 0.5  # (N, n, m)
    return scores.masked_fill(mask[:, None] == 0, -torch.inf).softmax(-1) @ values


def cka_loss(X, Y):
    """1 - linear CKA of two representations of r items, (r, n) and (r, m); as released for EMO.

    ‖XᵀY‖_F / sqrt(‖XᵀX‖_F ‖YᵀY‖_F) of columns with mean 0: the root of Kornblith et al.'s (2019).
    A scalar in [0, 1]; 1, without a gradient, where the items are all alike.
    """
    X, Y = X.double() - X.double().mean(0), Y.double() - Y.double().mean(0)
    scale = (X.T @ X).norm() * (Y.T @ Y).norm()
    return 1 - (X.T @ Y).norm() / scale.clamp(min=1e-30).sqrt()


def sinkhorn(cost, a, b, epsilon, iterations):
    """The entropic optimal transport plan of a cost, (n, m), and masses (n,), (m,): (n, m).

    Sinkhorn's iteration (Cuturi, 2013) on logarithms: diag(u) exp(-cost / ε) diag(v).
    """
    log_K, log_u = -cost / epsilon, torch.zeros_like(a)
    for _ in range(iterations):
        log_v = b.log() - (log_K + log_u[:, None]).logsumexp(0)
        log_u = a.log() - (log_K + log_v[None, :]).logsumexp(1)
    return (log_K + log_u[:, None] + log_v[None, :]).exp()


def cdm_loss(W, states, z, teacher, s):
    """Contextual dynamic mapping: 50 x the tokens' mean square + that of the sentence vectors."""
    words = teacher["own words"]
    aligned = teacher["average"] @ teacher["last"]  # (N, n_S, d_T)
    tokens = unit_mse(W["P"](states[-1][words]), aligned[words], s.mse)
    return 50 * tokens + unit_mse(W["P"](z), teacher["sentence"], s.mse)


def dskd_loss(W, states, z, teacher, s):
    """Dual-space distillation: sentences and tokens, in the teacher's space and in the student's.

    Tokens: each side's middle layer is rebuilt by attention to the other's.
    """
    sentence, T, S = teacher["sentence"], teacher["middle"], states[(len(states) - 1) // 2]
    own, its = teacher["own words"], teacher["words"]
    mask = teacher["own mask"]
    of_student = attend(W["q_S"](S), W["k_T"](T), W["v_T"](T), teacher["mask"])  # (N, n_S, d_S)
    of_teacher = attend(W["q_T"](T), W["k_S"](S), W["v_S"](S), mask)  # (N, n_T, d_T)
    loss = unit_mse(W["to_T"](z), sentence, s.mse) + unit_mse(z, W["to_S"](sentence), s.mse)
    loss = loss + unit_mse(S[own], of_student[own], s.mse)
    return loss + unit_mse(T[its], of_teacher[its], s.mse)


def emo_loss(W, states, attention, teacher):
    """EMO: 0.05 x the sum of 1 - CKA of attention rows, + half the mean cost of transport."""
    cka, transport = [], []
    own_mask, mask = teacher["own mask"], teacher["mask"]
    for i, (found, pairs) in enumerate(teacher["maps"]):
        n_S, n_T = int(own_mask[i].sum()), int(mask[i].sum())
        importance = teacher["importance"][i, :n_T]
        pairs = sorted(pairs, key=lambda pair: -importance[pair[1]].item())
        if len(pairs) > 2:  # of two rows CKA is always 1
            rows, its = map(list, zip(*pairs[: max(3, len(pairs) // 3)]))
            cka.append(cka_loss(attention[i, rows, :n_S], teacher["attention"][i, its, :n_T]))
        mass = importance.min().expand(n_S).clone()  # of student tokens that none is near to
        for t, s in found.items():
            mass[s] = importance[t]
        S, T = states[-1][i, :n_S], W["P"](teacher["last"][i, :n_T])
        cost = 1 - (S @ T.T / S.shape[-1] ** 0.5).softmax(-1)  # (n_S, n_T)
        plan = sinkhorn(cost, mass / mass.sum(), importance, 0.1, 100)
        transport.append((plan * cost).sum())
    relations = torch.stack(cka).sum() if cka else 0.0
    return 0.05 * relations + 0.5 * torch.stack(transport).mean()


def new_matrices(method, d_S, d_T):
    """A method's trained matrices: {name: Linear without a bias}."""
    if method != "dskd":
        sizes = {"P": (d_S, d_T) if method == "cdm" else (d_T, d_S)}
        return {name: Linear(*size, bias=False) for name, size in sizes.items()}
    d = min(d_S, d_T)
    sizes = {"to_T": (d_S, d_T), "to_S": (d_T, d_S), "q_S": (d_S, d), "k_T": (d_T, d)}
    sizes |= {"v_T": (d_T, d_S), "q_T": (d_T, d), "k_S": (d_S, d), "v_S": (d_S, d_T)}
    found = {name: Linear(*size, bias=False) for name, size in sizes.items()}
    for matrix in found.values():
        torch.nn.init.xavier_uniform_(matrix.weight)
    return found


class Online(talas.Objective):
    """A method's objective: SimCSE, and what it takes from the teacher's tokens."""

    def __init__(self, student, matrices, s):
        super().__init__(student, [], s)
        self.projections = torch.nn.ModuleDict(matrices).to(student.model.device)

    def forward(self, tokens, teacher, domains=None):
        """(loss, {its terms}); tokens as in talas.embed, teacher as in OnlineCorpus.batch."""
        s, N, emo = self.s, len(tokens["input_ids"]), self.s.method == "emo"
        twice = {name: t.repeat(2, 1) for name, t in tokens.items()}  # (2N, n_S)
        given = forward(self.model, twice, output_hidden_states=True, output_attentions=emo)
        views = pool(given.hidden_states[-1], twice["attention_mask"], self.student.pooling)
        z, z_prime = views.split(N)  # (N, d_S)
        states = [h[:N] for h in given.hidden_states[1:]]  # L of (N, n_S, d_S): the first view's
        teacher = teacher | {"own mask": tokens["attention_mask"]}
        simcse = talas.simcse_loss(z, z_prime, s.temperature)
        if emo:
            own = emo_loss(self.projections, states, given.attentions[-1][:N].mean(1), teacher)
        else:
            method = {"cdm": cdm_loss, "dskd": dskd_loss}[s.method]
            own = method(self.projections, states, z, teacher, s)
        loss = (1.0 if s.method == "dskd" else 0.5) * simcse + own
        return loss, {"simcse": simcse, "distillation": own, "loss": loss}


# ------------------------------------------------------------------------------------ command line
def save(objective, folder):
    """Write the student, and beside it the method's matrices."""
    save_encoder(folder, objective.student)
    torch.save(objective.projections.state_dict(), folder / "projections.pt")


def parse_settings(argv):
    """Settings from the command line; the defaults are the method's own."""
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--method", default="cdm")
    method = first.parse_known_args(argv)[0].method
    return talas.parse_settings(argv, Settings, **OWN.get(method, {}))


def main(argv=None):
    """The command line: as that of talas.py, with a corpus and a teacher that runs online."""
    s = parse_settings(argv)
    with started(s):
        sentences, sources, *_ = unique_corpus(s.corpus)
        torch.manual_seed(s.seed)
        student = talas.load_student(s, sentences)
        dtype, device = DTYPES[s.teacher_dtype], student.model.device
        teacher = load_encoder(s.teacher, s.teacher_pooling, s.max_length, dtype, device)
        teacher.model.requires_grad_(False)
        if s.method == "emo":  # the fused kernels give no attention maps
            for model in (student.model, teacher.model):
                model.set_attn_implementation("eager")
        corpus = OnlineCorpus(sentences, sources, student, teacher, s)
        matrices = new_matrices(s.method, student.dimensions, teacher.dimensions)
        objective = Online(student, matrices, s)
        check_fit(s, student, corpus)
        rehearse(student, corpus, two_views=True)
        talas.train(s, corpus, objective)
        about = {"teacher": s.teacher, "fingerprint": fingerprint(sentences)}
        finish(s, about, partial(save, objective))


if __name__ == "__main__":
    main()
