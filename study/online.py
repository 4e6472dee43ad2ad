"""The three methods of Table 1 that keep the teacher online: every step needs its tokens.

    python study/online.py --method cdm --teacher BAAI/bge-m3 --corpus corpus.jsonl --student ...

cdm: contextual dynamic mapping; dskd: dual-space knowledge distillation; emo. In the place of e^T a
batch brings a dict: the states of a frozen teacher's tokens, and which of them stand for which of
the student's (n_S, n_T in the longest sentence). The choices, with reasons: study/README.md.
"""

import argparse
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

sys.path.insert(0, str(Path(__file__).parent.parent))

import numpy as np
import torch
import torch.nn.functional as F
from transformers.hf_argparser import HfArg

import talas
from cache_teacher import DTYPES
from study import baselines
from support import fail
from support.data import Corpus
from support.encoder import forward, pad, pool, tokenize
from support.files import digest
from support.loading import load_encoder

PIECE = 8  # rows of a piece of a batch on a CPU: a large teacher pays most for padding
OWN = {  # the released code's, where Appendix E is silent
    "cdm": {"temperature": 0.07, "projection_lr_scale": 2.0},
    "dskd": {"temperature": 0.07, "projection_lr_scale": 1.0},
    "emo": {"temperature": 0.05, "projection_lr_scale": 1.0, "warmup_ratio": 0.1},
}
MATRICES = {"cdm": {"P": "ST"}, "emo": {"P": "TS"}}  # from and to the width of student, teacher,
MATRICES["dskd"] = {"to_T": "ST", "to_S": "TS", "q_S": "SA", "k_T": "TA"}  # or A, the lesser
MATRICES["dskd"] |= {"v_T": "TS", "q_T": "TA", "k_S": "SA", "v_S": "ST"}


@dataclass(frozen=True)
class Settings(baselines.Common):
    """The common ones, and the online teacher's."""

    teacher: str = HfArg(default="", help="Hub id or directory of the model that runs online")
    corpus: str = HfArg(default="demo", help="as cache_teacher.py has it")
    method: Literal["cdm", "dskd", "emo"] = HfArg(default="cdm", help="which")
    mse: Literal["elements", "sentences"] = HfArg(default="elements", help="mean of numbers, rows")
    teacher_dtype: Literal[tuple(DTYPES)] = HfArg(default="float32", help="of its weights")
    teacher_pooling: Literal["auto", "cls", "mean", "last"] = HfArg(default="auto", help="its own")
    precision: str = field(default="float32", init=False)
    lambda1: float = field(default=1.0, init=False)  # so only what SimCSE needs is checked
    lambda2: float = field(default=0.0, init=False)


# ------------------------------------------------------------------ which token stands for which
def edit_distances(a, b):
    """Levenshtein's distances of two lists of str, (n_a, n_b): the cost of Appendix E's CDM.

    D[i, j] = min(D[i-1, j] + 1, D[i, j-1] + 1, D[i-1, j-1] + (1 if x_i ≠ y_j)) over letters.
    """
    found = np.zeros((len(a), len(b)), int)
    for p, q in np.ndindex(found.shape):
        row = list(range(len(b[q]) + 1))  # D[0], then D[1], ...
        for i, x in enumerate(a[p], 1):
            corner, row[0] = row[0], i
            for j, y in enumerate(b[q], 1):
                corner, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, corner + (x != y))
        found[p, q] = row[-1]
    return found


def warp(cost):
    """Dynamic time warping (Sakoe and Chiba, 1978): the cheapest monotonic path through a cost.

    D[i, j] = c[i, j] + min(D[i-1, j-1], D[i-1, j], D[i, j-1]). (n, m) -> a list of (i, j), from
    (0, 0) to (n-1, m-1); of equally cheap steps back the diagonal one, then that in i.
    """
    D = np.pad(np.zeros(cost.shape), ((1, 0), (1, 0)), constant_values=np.inf)
    D[0, 0] = 0  # an edge before row and column 0
    for i, j in np.ndindex(cost.shape):
        D[i + 1, j + 1] = cost[i, j] + min(D[i, j], D[i, j + 1], D[i + 1, j])
    path, (i, j) = [], cost.shape
    while i:
        path.append((i - 1, j - 1))
        i, j = min((i - 1, j - 1), (i - 1, j), (i, j - 1), key=lambda place: D[place])
    return path[::-1]


def words_of(encoder, sentence, ends):
    """(positions, str) of a sentence's tokens: no markers, lower case; without the special ones.

    With `ends` with them, under a name for a first one and one for others, unlike any word.
    """
    row, found = encoder.tokenizer.encode(sentence), []  # cut, as tokenize() has set it
    if all(row.special_tokens_mask):
        fail(f"a tokenizer finds no word in the sentence {sentence[:60]!r}; leave it out")
    for i, (token, special) in enumerate(zip(row.tokens, row.special_tokens_mask)):
        if ends or not special:
            bare = token.removeprefix("##").strip("Ġ▁").lower()
            found.append((i, ("\1" if i else "\0") * 20 if special else bare))
    return zip(*found)


# ---------------------------------------------------------------------------- what a batch brings
def token_states(encoder, batch, maps):
    """A dict: middle and last, states after layers ceil(L / 2) and L, (N, n, d); sentence; mask.

    maps: indices of up to two layers whose attention is wanted, too, as map and top: the mean over
    heads, (N, n, n). On a CPU a right-padded batch goes through in pieces of like length; what is
    beyond them is 0.
    """
    model, mask, parts = encoder.model, batch["attention_mask"], []
    lengths, how = mask.sum(1), {"output_attentions": True} if maps else {}
    order = lengths.argsort(stable=True)
    for rows in order.split(PIECE if order.device.type == "cpu" else len(order)):
        longest = int(lengths[rows].max())
        piece = {name: t[rows, :longest] for name, t in batch.items()}
        given = forward(model, piece, output_hidden_states=True, **how)
        attentions, rest = getattr(given, "attentions", None) or (), (0, mask.shape[1] - longest)
        if maps and len(attentions) < encoder.layers:
            fail(f"--method emo needs attention maps; a {type(model).__name__} does not give them")
        two = [given.hidden_states[i] for i in ((encoder.layers + 1) // 2, -1)]  # 0: embeddings
        parts.append([F.pad(h.float(), (0, 0, *rest)) for h in two])
        parts[-1] += [F.pad(attentions[i].float().mean(1), rest * 2) for i in maps]
    whole = [torch.cat(pieces)[order.argsort()] for pieces in zip(*parts)]
    found = dict(zip(("middle", "last", "map", "top"), whole))
    return found | {"mask": mask, "sentence": pool(found["last"], mask, encoder.pooling)}


def emo_targets(teacher, pairs, student_mask):
    """What EMO takes from the teacher's last attention, (N, n_T, n_T), as a dict.

    importance, (N, n_T): softmax of what a token receives. mass, (N, n_S): of the tokens linked to
    the student's, made to sum to 1. rows: N of (student's, teacher's), positions of the pairs' most
    important third, three at least; () where there are fewer.
    """
    mask, links, rows = teacher["mask"], teacher["links"], []
    received = (teacher["top"] * mask[:, :, None]).sum(1)  # nothing from padding
    importance = received.masked_fill(mask == 0, -torch.inf).softmax(-1)
    least = importance.masked_fill(mask == 0, torch.inf).amin(1)[:, None]  # for what has no link
    linked = (links @ importance[:, :, None]).squeeze(-1)
    mass = (linked + (1 - links.sum(-1)) * least) * student_mask
    for some, weight in zip(pairs, importance.tolist()):
        first = sorted(some, key=lambda pair: -weight[pair[1]])[: max(3, len(some) // 3)]
        rows.append([list(side) for side in zip(*first)] if len(first) > 2 else ())
    return {"importance": importance, "mass": mass / mass.sum(1, keepdim=True), "rows": rows}


class OnlineCorpus(Corpus):
    """A corpus whose batches bring the online teacher's states in the place of e^T."""

    def __init__(self, cache, student, teacher, s):
        super().__init__(cache, student)
        self.teacher, self.s = teacher, s
        self.teacher_tokens = tokenize(teacher, cache["sentences"])
        made = map(self.match, cache["sentences"])
        self.matches = [[np.array(pairs, np.int16) for pairs in both] for both in made]

    def identity(self):
        """A hash of what is learnt from, and of who learns and teaches."""
        own = super().identity(), self.teacher.identity(), self.teacher_tokens.ids
        return digest(*own, *self.teacher.model.state_dict().values())

    def match(self, sentence):
        """(links, mutual), lists of (student token, teacher token): positions.

        links: for cdm the path; for dskd each word with each; for emo each student token with the
        last teacher token that has it nearest. mutual, emo's: both have each other nearest.
        """
        method, sides = self.s.method, (self.encoder, self.teacher)
        (s, own), (t, its) = (words_of(side, sentence, ends=method == "emo") for side in sides)
        if method == "dskd":
            return [(i, j) for i in s for j in t], []
        cost = edit_distances(its, own)  # (teacher, student)
        if method == "cdm":
            return [(s[j], t[i]) for i, j in warp(cost)], []
        apart = np.linspace(0, 1, len(t))[:, None] - np.linspace(0, 1, len(s))
        cost = cost + np.abs(apart) / 2  # of equally near ones that whose place is the likest
        near = list(enumerate(cost.argmin(1)))
        mutual = [(s[j], t[i]) for i, j in near if cost[:, j].argmin() == i]
        return list({s[j]: t[i] for i, j in near}.items()), mutual

    @torch.no_grad()
    def batch(self, rows):
        """Positions (N,) -> the student's tokens; a dict of the teacher's side; domains, (N,)."""
        tokens, _, domains = super().batch(rows)
        teacher, L_S, mask = self.teacher, self.encoder.layers, tokens["attention_mask"]
        block = L_S * (teacher.layers // L_S) - 1  # the layer where the student's last one would be
        maps = (block, -1) if self.s.method == "emo" else ()
        its = token_states(teacher, pad(self.teacher_tokens, rows, teacher.model), maps)
        sets, mutual = zip(*(self.matches[i] for i in rows))
        links = torch.zeros(*mask.shape, its["mask"].shape[1])  # (N, n_S, n_T)
        for link, pairs in zip(links, sets):
            link[tuple(pairs.T.astype(int))] = 1
        its["links"] = links.to(its["last"])
        return tokens, its | (emo_targets(its, mutual, mask) if maps else {}), domains


# ---------------------------------------------------------------------------------- the objectives
def unit_mse(a, b, mean="elements"):
    """Mean square of two sets of unit vectors, (r, d): 2 (1 - cos) / d; over rows: 2 (1 - cos)."""
    squares = (F.normalize(a, dim=-1) - F.normalize(b, dim=-1)).square()
    return squares.mean() if mean == "elements" else squares.sum(-1).mean()


def attention(queries, keys, mask):
    """Softmax over the keys that are no padding: (N, n, d), (N, m, d), (N, m) -> (N, n, m)."""
    scores = queries @ keys.transpose(1, 2) / queries.shape[-1] ** 0.5
    return scores.masked_fill(mask[:, None] == 0, -torch.inf).softmax(-1)


def cka_loss(X, Y):
    """1 - linear CKA of two representations of r items, (r, n) and (r, m), as released for EMO.

    CKA = ‖XᵀY‖_F / sqrt(‖XᵀX‖_F ‖YᵀY‖_F) of centred columns: the root of Kornblith et al.'s (2019).
    A scalar in [0, 1]: 0 for any two items, 1 where all items are alike.
    """
    X, Y = X.double() - X.double().mean(0), Y.double() - Y.double().mean(0)
    lengths = [(Z.T @ Z).norm().clamp(min=1e-12) for Z in (X, Y)]
    return 1 - (X.T @ Y).norm() / (lengths[0] * lengths[1]).sqrt()


def sinkhorn(cost, a, b, epsilon, iterations):
    """The entropic optimal transport plan of a cost, (n, m), from masses (n,) to (m,): (n, m).

    diag(u) K diag(v), K = exp(-cost / ε), v = b / Kᵀu, u = a / Kv in turn (Cuturi, 2013), by
    logarithms. There may be N of each, (N, n, m); a mass may be 0.
    """
    log_K, log_u = -cost / epsilon, torch.zeros_like(a)
    for _ in range(iterations):
        log_v = b.log() - (log_K + log_u.unsqueeze(-1)).logsumexp(-2)
        log_u = a.log() - (log_K + log_v.unsqueeze(-2)).logsumexp(-1)
    return (log_u.unsqueeze(-1) + log_K + log_v.unsqueeze(-2)).exp()


def cdm_loss(W, student, teacher, s):
    """Contextual dynamic mapping: 50 x the words' mean square + that of the sentence vectors."""
    words, e_T = teacher["links"].any(-1), teacher["sentence"]
    aligned = teacher["links"] @ teacher["last"]  # (N, n_S, d_T): sums, as unit vectors the means
    tokens = unit_mse(student["last"][words] @ W["P"], aligned[words], s.mse)
    return 50 * tokens + unit_mse(student["sentence"] @ W["P"], e_T, s.mse)


def dskd_loss(W, student, teacher, s):
    """Dual-space distillation: sentences and words, in the teacher's space and in the student's.

    Words: each side's middle layer, and what attention makes of the other's.
    """
    (S, e_S), (T, e_T) = ((x["middle"], x["sentence"]) for x in (student, teacher))
    own = attention(S @ W["q_S"], T @ W["k_T"], teacher["mask"]) @ (T @ W["v_T"])  # (N, n_S, d_S)
    its = attention(T @ W["q_T"], S @ W["k_S"], student["mask"]) @ (S @ W["v_S"])  # (N, n_T, d_T)
    words, its_words = teacher["links"].any(-1), teacher["links"].any(-2)
    pairs = [(e_S @ W["to_T"], e_T), (e_S, e_T @ W["to_S"])]
    pairs += [(S[words], own[words]), (T[its_words], its[its_words])]
    return sum(unit_mse(*pair, s.mse) for pair in pairs)


def emo_loss(W, student, teacher, s):
    """EMO: 0.05 x the sum of 1 - CKA of attention rows + half the mean cost of transport."""
    both = zip(student["map"], teacher["map"], teacher["rows"])
    relations = sum(cka_loss(X[rows[0]], Y[rows[1]]) for X, Y, rows in both if rows)
    cost = 1 - attention(student["last"], teacher["last"] @ W["P"], teacher["mask"])
    plan = sinkhorn(cost, teacher["mass"], teacher["importance"], 0.1, 100)
    return (0.05 * relations + 0.5 * (plan * cost).sum((1, 2)).mean()).float()


def new_matrices(method, student, d_T):
    """A method's matrices in MATRICES's order, with torch's first values; dskd's are Xavier's."""
    d_S, found = student.dimensions, []
    widths = {"S": d_S, "T": d_T, "A": min(d_S, d_T)}
    for start, end in MATRICES[method].values():
        n, m = widths[start], widths[end]
        bound = (6 / (n + m)) ** 0.5 if method == "dskd" else n**-0.5
        found.append(torch.empty(n, m).uniform_(-bound, bound).to(student.model.device))
    return found


class Online(talas.Objective):
    """A method's objective: SimCSE, and what it takes from the teacher's tokens."""

    def forward(self, tokens, teacher, domains=None):
        """(loss, {its terms}); tokens as in talas.embed, teacher as in OnlineCorpus.batch."""
        s, N = self.s, len(tokens["input_ids"])
        twice = {name: t.repeat(2, 1) for name, t in tokens.items()}  # (2N, n_S)
        both = token_states(self.encoder, twice, (-1,) if s.method == "emo" else ())
        z, z_prime = both["sentence"].split(N)
        first = {name: x[:N] for name, x in both.items()} | {"sentence": z}  # the first view
        simcse = talas.simcse_loss(z, z_prime, s.temperature)
        method = {"cdm": cdm_loss, "dskd": dskd_loss, "emo": emo_loss}[s.method]
        own = method(dict(zip(MATRICES[s.method], self.projections)), first, teacher, s)
        loss = (1.0 if s.method == "dskd" else 0.5) * simcse + own
        return loss, {"simcse": simcse, "distillation": own, "loss": loss}


# ------------------------------------------------------------------------------------ command line
def parse_settings(argv):
    """Settings from the command line; the defaults are the method's own."""
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--method", nargs="?", default=Settings.method)
    method = first.parse_known_args(argv)[0].method
    return talas.parse_settings(argv, Settings, **OWN.get(method, {}))


def prepare(s, cache):
    """(OnlineCorpus, Online) of a cache's sentences; the teacher is on the student's device."""
    if not s.teacher:
        fail("--teacher is missing: the Hub id or the folder of a model, which runs in every step")
    student = talas.load_student(s, cache["sentences"])
    how = s.teacher_pooling, s.max_length, DTYPES[s.teacher_dtype], student.model.device
    teacher = load_encoder(s.teacher, *how)
    cache["teacher"] = s.teacher
    for encoder in (student, teacher) if s.method == "emo" else ():
        encoder.model.set_attn_implementation("eager")  # the fused kernels give no maps
    objective = Online(student, new_matrices(s.method, student, teacher.dimensions), s)
    corpus = OnlineCorpus(cache, student, teacher, s)
    with torch.no_grad():  # what can't be done is said before hours of it
        objective(*corpus.batch(torch.arange(len(corpus))[:2])[:2])
    return corpus, objective


def main(argv=None):
    """The command line: as that of talas.py, with a corpus and a teacher that runs online."""
    baselines.run(parse_settings(argv), prepare)


if __name__ == "__main__":
    main()
