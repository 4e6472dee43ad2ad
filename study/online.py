"""The three methods of Table 1 that run the teacher in every step.

    python study/online.py --method cdm --teacher BAAI/bge-m3 --corpus corpus.jsonl --student ...

cdm: contextual dynamic mapping; dskd: dual-space knowledge distillation. Instead of e^T a batch has
a dict: the teacher's token states, and which teacher tokens belong to which student tokens. n_S and
n_T are the numbers of their tokens in the longest sentence. study/README.md lists the choices that
were made.
"""

import sys
from dataclasses import dataclass
from itertools import product
from operator import itemgetter
from pathlib import Path
from typing import Literal

sys.path.insert(0, str(Path(__file__).parent.parent))

import numpy as np
import torch
import torch.nn.functional as F

import talas
from cache_teacher import DTYPES
from study import baselines
from support.data import Corpus
from support.encoder import pad, pool, tokenize
from support.files import digest
from support.loading import load_encoder

PIECE = 8  # sentences that a CPU takes at a time: small, because padding costs a large teacher most
METHODS = {  # method -> its defaults, which are the released code's where Appendix E is silent
    "cdm": {"temperature": 0.07, "projection_lr_scale": 2.0},
    "dskd": {"temperature": 0.07, "projection_lr_scale": 1.0},
    "emo": {"temperature": 0.05, "projection_lr_scale": 1.0, "warmup_ratio": 0.1},
}
# emo compares this in place of a special token: far from any word, equal for both tokenizers
SPECIAL = "\1" * 20


@dataclass(frozen=True)
class Settings(baselines.Common):
    """The common settings, and those of the online teacher."""

    teacher: str = "BAAI/bge-m3"  # Hub id or directory of the model that runs online
    corpus: str = "demo"  # as for cache_teacher.py
    method: Literal[tuple(METHODS)] = "cdm"
    mse: Literal["elements", "sentences"] = "elements"  # what cdm and dskd take the mean over
    teacher_dtype: Literal[tuple(DTYPES)] = "float32"  # of the weights
    teacher_pooling: Literal["auto", "cls", "mean", "last"] = "auto"
    projection_std: float = 0.0  # of W's first values; 0: the method's own start
    precision: str = baselines.fixed("float32")
    # as for SimCSE alone: a corpus is enough, no cache is needed
    lambda1: float = baselines.fixed(1.0)
    lambda2: float = baselines.fixed(0.0)


# ------------------------------------------------------------------ which tokens belong together
def edit_distance(a, b):
    """Levenshtein's distance of two str.

    D[i, j] = min(D[i-1, j] + 1, D[i, j-1] + 1, D[i-1, j-1] + (1 if a_i ≠ b_j)) over letters.
    """
    row = list(range(len(b) + 1))  # D[0]
    for i, x in enumerate(a, 1):
        next_row = [i]
        for j, y in enumerate(b, 1):
            replaced = row[j - 1] + (x != y)
            next_row.append(min(row[j] + 1, next_row[j - 1] + 1, replaced))
        row = next_row
    return row[-1]


def warp(cost):
    """Dynamic time warping (Sakoe and Chiba, 1978): the cheapest monotonic path through a cost.

    D[i, j] = c[i, j] + min(D[i-1, j-1], D[i-1, j], D[i, j-1]). (n, m) -> a list of (i, j), from
    (0, 0) to (n-1, m-1). Of equally cheap steps back: the diagonal one, then the one in i.
    """
    best = {(-1, -1): (0, [])}  # D and the path of each cell; before the first one
    for i, j in np.ndindex(cost.shape):
        steps = [(i - 1, j - 1), (i - 1, j), (i, j - 1)]
        ways = [best[step] for step in steps if step in best]
        D, path = min(ways, key=itemgetter(0))
        best[i, j] = D + cost[i, j], path + [(i, j)]
    return best[i, j][1]


def words_of(encoder, sentence, with_special):
    """A sentence's tokens in lower case, without subword markers: (their positions, list of str).

    Special tokens are left out, or become SPECIAL.
    """
    encoding = encoder.tokenizer.encode(sentence)
    positions = []
    words = []
    for i, token in enumerate(encoding.tokens):
        special = encoding.special_tokens_mask[i]
        if with_special or not special:
            positions.append(i)
            word = token.removeprefix("##").strip("Ġ▁").lower()
            words.append(SPECIAL if special else word)
    return positions, words


# ---------------------------------------------------------------------------- what a batch brings
def token_states(encoder, batch, attention_layers):
    """What an encoder computes for a right-padded batch of n tokens; 0 at padding.

    attention_layers: {name: index of a layer}. Returns a dict: middle and last, the token states
    after layers ceil(L / 2) and L, (N, n, d); sentence, (N, d); mask, (N, n); and under each name
    the attention of that layer, mean over the heads, (N, n, n). On a CPU the batch is processed in
    pieces of sentences of similar length.
    """
    mask = batch["attention_mask"]
    lengths = mask.sum(1)
    zeros = torch.zeros(*mask.shape, encoder.dimensions, device=mask.device)
    states = {"mask": mask, "middle": zeros, "last": zeros.clone()}
    for name in attention_layers:
        states[name] = torch.zeros(*mask.shape, mask.shape[1], device=mask.device)
    order = lengths.argsort(stable=True)
    for rows in order.split(PIECE if mask.device.type == "cpu" else len(mask)):
        n = lengths[rows].max()
        piece = {name: values[rows, :n] for name, values in batch.items()}
        output = encoder.model(
            **piece, output_hidden_states=True, output_attentions=bool(attention_layers)
        )
        hidden = output.hidden_states  # 0: the embeddings
        states["middle"][rows, :n] = hidden[(encoder.layers + 1) // 2].float()
        states["last"][rows, :n] = hidden[-1].float()
        for name, layer in attention_layers.items():
            states[name][rows, :n, :n] = output.attentions[layer].float().mean(1)
    states["sentence"] = pool(states["last"], mask, encoder.pooling)
    return states


def nearest(cost):
    """The pairs of EMO from a cost, (n_T, n_S): (links, mutual), lists of (student, teacher).

    links: each student token with the last teacher token that is nearest to it. mutual: the pairs
    in which each token is the other's nearest. Of several at equal cost, a token's nearest is the
    one at the nearest place in its sentence, from 0 to 1.
    """
    n_T, n_S = cost.shape
    distance = np.abs(np.linspace(0, 1, n_T)[:, None] - np.linspace(0, 1, n_S))
    cost = cost + distance / 2  # decides between equal costs alone: they are whole numbers
    links = {}
    mutual = []
    for i, j in enumerate(cost.argmin(1)):
        links[j] = i
        if cost[:, j].argmin() == i:
            mutual.append((j, i))
    return list(links.items()), mutual


class OnlineCorpus(Corpus):
    """A corpus whose batches have the online teacher's states instead of e^T."""

    def __init__(self, cache, encoder, teacher, s):
        super().__init__(cache, encoder)
        self.teacher = teacher
        self.method = s.method
        self.teacher_tokens = tokenize(teacher, cache["sentences"])
        self.matches = [self.match(sentence) for sentence in cache["sentences"]]

    def identity(self):
        """A hash of the corpus, of the student without its weights and of the teacher's weights."""
        weights = self.teacher.model.state_dict().values()
        return digest(super().identity(), *weights)

    def match(self, sentence):
        """(links, mutual): lists of positions (student token, teacher token) in a sentence.

        links: for cdm the warping path; for dskd every pair of words. For emo: see nearest.
        """
        with_special = self.method == "emo"
        S, S_words = words_of(self.encoder, sentence, with_special)
        T, T_words = words_of(self.teacher, sentence, with_special)
        if self.method == "dskd":
            return list(product(S, T)), []
        cost = np.vectorize(edit_distance)(np.array(T_words)[:, None], S_words)  # (n_T, n_S)
        if self.method == "cdm":
            return [(S[j], T[i]) for i, j in warp(cost)], []
        return nearest(cost)  # with special tokens, every token has its place in S and T

    @torch.no_grad()
    def batch(self, rows):
        """Positions (N,) -> the student's tokens; a dict for the teacher; domains, (N,).

        The dict has the teacher's token_states and what match found: links, (N, n_S, n_T), 1 where
        there is one; mutual, N lists of pairs.
        """
        tokens, _, domains = super().batch(rows)
        attention_layers = {}
        if self.method == "emo":  # the teacher has ⌊L_T / L_S⌋ layers for each student layer
            L_S = self.encoder.layers
            top = L_S * (self.teacher.layers // L_S) - 1
            attention_layers = {"attention": top, "last_attention": -1}
        teacher_batch = pad(self.teacher_tokens, rows, self.teacher.model)
        teacher = token_states(self.teacher, teacher_batch, attention_layers)
        links = torch.zeros(*tokens["attention_mask"].shape, teacher["mask"].shape[1])
        teacher["mutual"] = []
        for i, row in enumerate(rows):
            pairs, mutual = self.matches[row]
            student_positions, teacher_positions = zip(*pairs)
            links[i, student_positions, teacher_positions] = 1
            teacher["mutual"].append(mutual)
        teacher["links"] = links.to(domains.device)
        return tokens, teacher, domains


# ---------------------------------------------------------------------------------- the objectives
def unit_mse(a, b, mean):
    """Mean square of two sets of unit vectors, (r, d): 2 (1 - cos) / d; over rows: 2 (1 - cos)."""
    squares = (F.normalize(a, dim=-1) - F.normalize(b, dim=-1)).square()
    return squares.mean() if mean == "elements" else squares.sum(-1).mean()


def attention(queries, keys, mask):
    """Softmax over the keys that are not padding: (N, n, d), (N, m, d), (N, m) -> (N, n, m)."""
    scores = queries @ keys.transpose(1, 2) / queries.shape[-1] ** 0.5
    return scores.masked_fill(mask[:, None] == 0, -torch.inf).softmax(-1)


def cka_loss(X, Y):
    """1 - linear CKA of two representations of r items, (r, n) and (r, m), as released for EMO.

    CKA = ‖XᵀY‖_F / sqrt(‖XᵀX‖_F ‖YᵀY‖_F) of centred columns: the root of Kornblith et al.'s (2019).
    A scalar in [0, 1]: 0 for any two items, 1 where all items are alike.
    """
    X = X.double() - X.double().mean(0)
    Y = Y.double() - Y.double().mean(0)
    lengths = (X.T @ X).norm() * (Y.T @ Y).norm()
    return 1 - (X.T @ Y).norm() / lengths.clamp(min=1e-24).sqrt()


def sinkhorn(cost, a, b, epsilon, iterations):
    """The entropic optimal transport plan of a cost, (n, m), from masses (n,) to (m,): (n, m).

    diag(u) K diag(v), K = exp(-cost / ε), where v = b / Kᵀu and u = a / Kv in turn (Cuturi, 2013).
    There may be N of each, (N, n, m). Rows and columns of mass 0, such as padding, do not change
    the rest, whether or not the plan has converged.
    """
    K = (-cost / epsilon).exp()
    u = (a > 0).to(K)  # 1, and 0 without mass
    for _ in range(iterations):
        v = b / torch.einsum("...nm,...n->...m", K, u)
        u = a / torch.einsum("...nm,...m->...n", K, v)
    return u.unsqueeze(-1) * K * v.unsqueeze(-2)


def cdm_loss(projections, student, teacher, s):
    """Contextual dynamic mapping: 50 x the mean square of words + that of sentences."""
    P = projections[0]
    words = teacher["links"].any(-1)  # (N, n_S)
    aligned = teacher["links"] @ teacher["last"]  # (N, n_S, d_T): sums; unit_mse ignores length
    word_loss = unit_mse(student["last"][words] @ P, aligned[words], s.mse)
    sentence_loss = unit_mse(student["sentence"] @ P, teacher["sentence"], s.mse)
    return 50 * word_loss + sentence_loss


def dskd_loss(projections, student, teacher, s):
    """Dual-space distillation: of sentences and words, in the teacher's and the student's space.

    The words are the states of the middle layers. Each side's words are compared with what
    cross-attention makes of the other side's.
    """
    to_T, to_S, q_S, k_T, v_T, q_T, k_S, v_S = projections
    S, T = student["middle"], teacher["middle"]
    S_from_T = attention(S @ q_S, T @ k_T, teacher["mask"]) @ (T @ v_T)  # (N, n_S, d_S)
    T_from_S = attention(T @ q_T, S @ k_S, student["mask"]) @ (S @ v_S)  # (N, n_T, d_T)
    S_words = teacher["links"].any(-1)  # (N, n_S)
    T_words = teacher["links"].any(-2)  # (N, n_T)
    loss = unit_mse(student["sentence"] @ to_T, teacher["sentence"], s.mse)
    loss = loss + unit_mse(student["sentence"], teacher["sentence"] @ to_S, s.mse)
    loss = loss + unit_mse(S[S_words], S_from_T[S_words], s.mse)
    return loss + unit_mse(T[T_words], T_from_S[T_words], s.mse)


def emo_loss(projections, student, teacher):
    """EMO: 0.05 x the sum of 1 - CKA of attention rows + half the mean cost of transport.

    CKA compares the rows of a third of the mutual pairs, at least three: those with the most
    important teacher tokens. The importance of a token is the softmax of the attention that it
    receives, and its mass in the transport. A student token has the mass of the teacher token that
    is linked to it, without a link the least one; the sum over a sentence is then made 1.
    """
    mask = teacher["mask"]  # (N, n_T)
    received = (teacher["last_attention"] * mask[:, :, None]).sum(1)  # none from padding
    importance = received.masked_fill(mask == 0, -torch.inf).softmax(-1)  # (N, n_T)
    relations = 0
    for i, mutual in enumerate(teacher["mutual"]):
        if len(mutual) >= 3:  # CKA of fewer rows is constant
            S, T = torch.tensor(mutual, device=mask.device).T
            order = importance[i, T].argsort(descending=True, stable=True)
            order = order[: max(3, len(order) // 3)]
            X = student["attention"][i, S[order]]
            Y = teacher["attention"][i, T[order]]
            relations = relations + cka_loss(X, Y)
    teacher_states = teacher["last"] @ projections[0]  # (N, n_T, d_S)
    cost = 1 - attention(student["last"], teacher_states, mask)  # (N, n_S, n_T)
    links = teacher["links"]  # (N, n_S, n_T)
    least = importance.masked_fill(mask == 0, torch.inf).amin(1, keepdim=True)
    linked = (links * importance[:, None]).sum(-1)  # (N, n_S)
    mass = torch.where(links.any(-1), linked, least) * student["mask"]
    mass = mass / mass.sum(1, keepdim=True)
    plan = sinkhorn(cost, mass, importance, epsilon=0.1, iterations=100)
    transport = (plan * cost).sum((1, 2)).mean()
    return (0.05 * relations + 0.5 * transport).float()


def new_projections(s, encoder, d_T):
    """A method's matrices, in the order in which its loss unpacks them.

    They start as torch's linear layers do, those of dskd as Xavier's, or with s.projection_std.
    """
    d_S = encoder.dimensions
    d_A = min(d_S, d_T)  # of queries and keys
    to_T = (d_S, d_T)
    to_S = (d_T, d_S)
    S_to_A = (d_S, d_A)
    T_to_A = (d_T, d_A)
    shapes = {
        "cdm": [to_T],
        "emo": [to_S],
        "dskd": [to_T, to_S, S_to_A, T_to_A, to_S, T_to_A, S_to_A, to_T],
    }
    projections = []
    for n, m in shapes[s.method]:
        bound = (6 / (n + m)) ** 0.5 if s.method == "dskd" else n**-0.5
        W = torch.empty(n, m).uniform_(-bound, bound)
        if s.projection_std:
            W.normal_(std=s.projection_std)
        projections.append(W.to(encoder.model.device))
    return projections


class Online(talas.Objective):
    """A method's objective: SimCSE, and its distillation of the teacher's tokens."""

    def forward(self, tokens, teacher, domains=None):
        """(loss, {its terms}); tokens as in talas.embed, teacher as in OnlineCorpus.batch."""
        s = self.s
        two_views = {name: values.repeat(2, 1) for name, values in tokens.items()}  # (2 N, n_S)
        attention_layers = {"attention": -1} if s.method == "emo" else {}
        states = token_states(self.encoder, two_views, attention_layers)
        z, z_prime = states["sentence"].chunk(2)
        simcse = talas.simcse_loss(z, z_prime, s.temperature)
        student = {name: values[: len(z)] for name, values in states.items()}  # the first view
        student["sentence"] = z  # the same numbers, and one path for their gradient
        if s.method == "cdm":
            distillation = cdm_loss(self.projections, student, teacher, s)
        elif s.method == "dskd":
            distillation = dskd_loss(self.projections, student, teacher, s)
        else:
            distillation = emo_loss(self.projections, student, teacher)
        simcse_weight = 1.0 if s.method == "dskd" else 0.5
        loss = simcse_weight * simcse + distillation
        return loss, {"simcse": simcse, "distillation": distillation, "loss": loss}


# ---------------------------------------------------------------------------------------- training
def parse_settings(argv):
    """Settings from the command line, with the defaults of the method that it names."""
    method = talas.parse_settings(argv, Settings).method
    return talas.parse_settings(argv, Settings, **METHODS[method])


def prepare(s, cache):
    """(corpus, objective) for a cache's sentences, with the teacher on the student's device."""
    encoder = talas.load_student(s, cache["sentences"])
    dtype = getattr(torch, s.teacher_dtype)
    teacher = load_encoder(s.teacher, s.teacher_pooling, s.max_length, dtype, encoder.model.device)
    cache["teacher"] = s.teacher
    if s.method == "emo":  # the fused kernels return no attention
        encoder.model.set_attn_implementation("eager")
        teacher.model.set_attn_implementation("eager")
    projections = new_projections(s, encoder, teacher.dimensions)
    return OnlineCorpus(cache, encoder, teacher, s), Online(encoder, projections, s)


def run(s):
    """Train with the settings s."""
    cache = baselines.start(s, s.corpus)
    corpus, objective = prepare(s, cache)
    baselines.train_and_save(s, cache, corpus, objective)


def main(argv=None):
    """The command line: that of talas.py, with a corpus and a teacher that runs online."""
    run(parse_settings(argv))


if __name__ == "__main__":
    main()
