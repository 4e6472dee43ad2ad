"""The methods with an online teacher: tables worked by hand, plain loops, whole runs."""

from conftest import SENTENCES, small_bert

import json
import math
from functools import lru_cache
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.optimize import linprog
from transformers import MambaConfig, MambaModel

import talas
from study import online

METHODS = ["cdm", "dskd", "emo"]
TEXTS = [SENTENCES[i] for i in (0, 3, 9, 14)]  # of 9 to 12 tokens; some with garden, some without
norm, exp = np.linalg.norm, np.exp


# --------------------------------------------------------------------------------- pure functions
def test_edit_distances_by_hand():
    found = online.edit_distances(["kitten", "", "flaw"], ["sitting", "lawn", ""])
    assert found.tolist() == [[3, 5, 6], [7, 4, 0], [7, 2, 4]]
    assert online.edit_distances([], ["a", "b"]).shape == (0, 2)


def test_a_warping_by_hand():
    cost = np.array([[1, 3, 4, 9], [2, 0, 1, 7], [9, 5, 2, 1]])
    assert online.warp(cost) == [(0, 0), (1, 1), (1, 2), (2, 3)]  # 1 + 0 + 1 + 1
    assert online.warp(np.array([[0, 2], [0, 1], [9, 0]])) == [(0, 0), (1, 0), (2, 1)]
    assert online.warp(np.array([[1, 1, 1]])) == [(0, 0), (0, 1), (0, 2)]
    zeros = np.zeros((3, 5))  # all ways are equally cheap
    assert online.warp(zeros) == [(0, 0), (0, 1), (0, 2), (1, 3), (2, 4)]
    assert online.warp(zeros.T) == [(0, 0), (1, 0), (2, 0), (3, 1), (4, 2)]
    assert online.warp(np.array([[0, 0], [9, 0], [0, 0]]))[1] == (1, 1)  # no tie: the cheaper step


def naive_cka(X, Y):
    X, Y = ([[x - sum(c) / len(c) for x, c in zip(row, zip(*Z))] for row in Z] for Z in (X, Y))

    def length(A, B):
        return math.sqrt(
            sum(sum(a * b for a, b in zip(x, y)) ** 2 for x in zip(*A) for y in zip(*B))
        )

    return length(X, Y) / math.sqrt(length(X, X) * length(Y, Y))


def test_cka_against_loops_and_its_invariances():
    g = torch.Generator().manual_seed(0)
    X, Y = torch.randn(6, 4, generator=g).double(), torch.randn(6, 5, generator=g).double()
    expected = 1 - naive_cka(X.tolist(), Y.tolist())
    assert 0.05 < expected < 0.95
    assert online.cka_loss(X, Y).item() == pytest.approx(expected, abs=1e-9)
    assert online.cka_loss(X, X).item() == pytest.approx(0, abs=1e-9)
    turn = torch.linalg.qr(torch.randn(4, 4, generator=g).double())[0]
    for other in (X @ turn, 30 * X, X + 7):
        assert online.cka_loss(other, Y).item() == pytest.approx(expected, abs=1e-9)
    assert online.cka_loss(X[:2], Y[:2]).item() == pytest.approx(0, abs=1e-9)  # says nothing
    alike = X[:1].repeat(3, 1).requires_grad_()
    online.cka_loss(alike, Y[:3]).backward()
    assert alike.grad.isfinite().all()


def test_the_plan_has_its_marginals_and_nears_the_cheapest():
    g = torch.Generator().manual_seed(1)
    cost = torch.rand(4, 6, generator=g).double()
    a, b = (torch.rand(n, generator=g).double().softmax(0) for n in (4, 6))
    plan = online.sinkhorn(cost, a, b, 0.1, 500)
    assert torch.allclose(plan.sum(1), a) and torch.allclose(plan.sum(0), b)
    ratio = (plan / (-cost / 0.1).exp()).log()  # diag(u) K diag(v): log u_i + log v_j
    assert torch.allclose(ratio - ratio[:1], (ratio - ratio[:1])[:, :1].expand(4, 6))
    rows, columns = np.kron(np.eye(4), np.ones(6)), np.kron(np.ones(4), np.eye(6))
    best = linprog(cost.flatten(), A_eq=np.vstack([rows, columns]), b_eq=torch.cat([a, b])).fun
    dear = [(online.sinkhorn(cost, a, b, e, 5000) * cost).sum().item() for e in (0.1, 0.003)]
    assert best < dear[1] < dear[0] and dear[1] == pytest.approx(best, abs=1e-3)
    two = online.sinkhorn(  # one with padding
        torch.stack([cost, cost.flip(0)]),
        torch.stack([a, a.new_tensor([0.3, 0.7, 0, 0])]),
        b,
        0.1,
        9,
    )
    assert torch.allclose(two[0], online.sinkhorn(cost, a, b, 0.1, 9))
    short = online.sinkhorn(cost.flip(0)[:2], a.new_tensor([0.3, 0.7]), b, 0.1, 9)
    assert torch.allclose(two[1, :2], short) and not two[1, 2:].any()


def test_the_mean_square_of_unit_vectors_is_a_cosine():
    g = torch.Generator().manual_seed(2)
    a, b = 3 * torch.randn(5, 7, generator=g), torch.randn(5, 7, generator=g)
    twice = 2 * (1 - torch.cosine_similarity(a, b)).mean().item()
    assert online.unit_mse(a, b).item() == pytest.approx(twice / 7, rel=1e-5)
    assert online.unit_mse(a, b, "sentences").item() == pytest.approx(twice, rel=1e-5)


# ------------------------------------------------------------------------ the losses, plain loops
@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A student of 3 layers and a teacher of 5, whose tokenizer splits garden into gar, ##den."""
    folder = tmp_path_factory.mktemp("models")
    student = small_bert(folder / "student", initializer_range=1.0)
    teacher = small_bert(folder / "teacher", seed=1, num_hidden_layers=5, hidden_size=48, initializer_range=1.0)
    text = (teacher / "tokenizer.json").read_text().replace('"garden"', '"gardens"')
    (teacher / "tokenizer.json").write_text(text)
    return ["--student", str(student), "--teacher", str(teacher), "--device", "cpu"]


def prepare(flags, texts=TEXTS):
    s = online.parse_settings([*flags, "--teacher_pooling", "mean", "--temperature", "0.3"])
    cache = {"sentences": texts, "sources": ["a"] * len(texts)}
    corpus, objective = online.prepare(s, cache | {"embeddings": torch.zeros(len(texts), 0)})
    return corpus, objective.eval()  # no dropout


@lru_cache
def letters_apart(x, y):
    if not x or not y:
        return len(x) + len(y)
    ways = letters_apart(x[1:], y) + 1, letters_apart(x, y[1:]) + 1
    return min(*ways, letters_apart(x[1:], y[1:]) + (x[0] != y[0]))


class Alone:
    """One sentence, without padding, in an encoder: tokens, states and attention as arrays."""

    def __init__(self, encoder, text):
        self.tokens = [t.removeprefix("##") for t in encoder.tokenizer.encode(text).tokens]
        ids = torch.tensor([encoder.tokenizer.encode(text).ids])
        how = {"output_hidden_states": True, "output_attentions": True}
        encoder.model.set_attn_implementation("eager")
        with torch.no_grad():
            given = encoder.model(ids, torch.ones_like(ids), **how)
        self.states = [h[0].double().numpy() for h in given.hidden_states]
        self.maps = [a[0].double().mean(0).numpy() for a in given.attentions]
        self.last, self.words = self.states[-1], range(1, len(self.tokens) - 1)


def unit(x):
    return x / norm(x, axis=-1, keepdims=True)


def mse(pairs, mean):
    squares = [(unit(x) - unit(y)) ** 2 for x, y in pairs]
    return np.mean(squares) if mean == "elements" else np.mean([x.sum() for x in squares])


def cdm_by_hand(S, T, W, mean):
    """With the best way to each pair of words, found from the front."""
    words = []
    for own, its in zip(S, T):
        best = {}
        for j in its.words:
            for i in own.words:
                ways = [best.get(w, (np.inf, [])) for w in ((j - 1, i - 1), (j - 1, i), (j, i - 1))]
                total, path = min(ways, key=lambda way: way[0]) if best else (0, [])
                total += letters_apart(its.tokens[j], own.tokens[i])
                best[j, i] = total, [*path, (j, i)]
        path = best[its.words[-1], own.words[-1]][1]
        for i in own.words:
            mean_state = np.mean([its.last[j] for j, k in path if k == i], axis=0)
            words.append((own.last[i] @ W["P"], mean_state))
    sentences = [(x.last[0] @ W["P"], y.last.mean(0)) for x, y in zip(S, T)]
    return 50 * mse(words, mean) + mse(sentences, mean)


def softmax(x):
    return exp(x) / exp(x).sum(-1, keepdims=True)


def dskd_by_hand(S, T, W, mean):
    own, its = [], []
    for x, y in zip(S, T):
        s, t = x.states[2], y.states[3]
        near = softmax(s @ W["q_S"] @ (t @ W["k_T"]).T / math.sqrt(32)) @ t @ W["v_T"]
        own += [(s[i], near[i]) for i in x.words]
        near = softmax(t @ W["q_T"] @ (s @ W["k_S"]).T / math.sqrt(32)) @ s @ W["v_S"]
        its += [(t[j], near[j]) for j in y.words]
    pairs = [(x.last[0] @ W["to_T"], y.last.mean(0)) for x, y in zip(S, T)]
    back = [(x.last[0], y.last.mean(0) @ W["to_S"]) for x, y in zip(S, T)]
    return sum(mse(some, mean) for some in (pairs, back, own, its))


def nearest(j, one, other):
    """The place of the token of `other` that is nearest to token j of `one`."""
    ends = {0: 0, len(one.tokens) - 1: len(other.tokens) - 1}
    if j in ends:
        return ends[j]

    def far(i):
        apart = abs(i / (len(other.tokens) - 1) - j / (len(one.tokens) - 1))
        return letters_apart(one.tokens[j], other.tokens[i]), apart

    return min(other.words, key=far)


def emo_by_hand(S, T, W, mean):
    relations, transport = 0, []
    for own, its in zip(S, T):
        importance = softmax(its.maps[-1].sum(0))
        mass, pairs = np.full(len(own.tokens), importance.min()), []
        for j in range(len(its.tokens)):
            i = nearest(j, its, own)
            mass[i] = importance[j]
            pairs += [(importance[j], i, j)] if nearest(i, own, its) == j else []
        best = sorted(pairs, reverse=True)[: max(3, len(pairs) // 3)]
        X, Y = own.maps[-1][[i for _, i, _ in best]], its.maps[2][[j for *_, j in best]]
        relations += 1 - naive_cka(X.tolist(), Y.tolist())
        cost = 1 - softmax(own.last @ (its.last @ W["P"]).T / math.sqrt(32))
        K, u = exp(-cost / 0.1), np.ones(len(mass))
        for _ in range(100):
            v = importance / (K.T @ u)
            u = mass / mass.sum() / (K @ v)
        transport.append((u[:, None] * K * v * cost).sum())
    return 0.05 * relations + 0.5 * np.mean(transport)


@pytest.mark.parametrize("mean", ["elements", "sentences"])
@pytest.mark.parametrize("method", METHODS)
def test_a_batch_is_as_its_sentences_alone(models, method, mean):
    """So neither padding nor the other sentences, nor the pieces, change what each gives."""
    corpus, objective = prepare([*models, "--method", method, "--mse", mean])
    loss, terms = objective(*corpus.batch(torch.arange(4))[:2])
    sides = [[Alone(side, text) for text in TEXTS] for side in (corpus.student, corpus.teacher)]
    names = online.MATRICES[method]
    W = {name: w.detach().double().numpy() for name, w in zip(names, objective.projections)}
    own = {"cdm": cdm_by_hand, "dskd": dskd_by_hand, "emo": emo_by_hand}[method](*sides, W, mean)
    z = torch.tensor(np.array([x.last[0] for x in sides[0]]))
    simcse = talas.simcse_loss(z, z, 0.3).item()
    assert terms["simcse"].item() == pytest.approx(simcse, rel=1e-4)
    assert terms["distillation"].item() == pytest.approx(own, rel=1e-4)
    expected = (1.0 if method == "dskd" else 0.5) * simcse + own
    assert loss.item() == terms["loss"].item() == pytest.approx(expected, rel=1e-4)


def test_a_word_that_the_teacher_alone_splits(models):
    text = SENTENCES[0]  # The cook sees the door in the garden. Teacher: ..., the, gar, ##den, .
    path = prepare([*models, "--method", "cdm"], [text])[0].matches[0][0].tolist()
    straight = [[i, i] for i in range(1, 8)]  # to garden, den costs as much as both; so gar is left
    assert path == [*straight, [7, 8], [8, 9], [9, 10]]
    links, mutual = prepare([*models, "--method", "emo"], [text])[0].matches[0]
    same = [[i, i] for i in range(8)]
    assert sorted(mutual.tolist()) == [*same, [9, 10], [10, 11]]  # den is nearest to in
    assert sorted(links.tolist()) == [*same[:6], [6, 9], [7, 8], [9, 10], [10, 11]]


@pytest.mark.parametrize("method", METHODS)
def test_what_gets_a_gradient(models, method):
    corpus, objective = prepare([*models, "--method", method])
    before = [w.clone() for w in corpus.teacher.model.state_dict().values()]
    objective.train()
    objective(*corpus.batch(torch.arange(4))[:2])[0].backward()
    matrices = list(objective.projections)
    assert len(matrices) == (8 if method == "dskd" else 1)
    assert all(w.grad.isfinite().all() and w.grad.abs().max() > 0 for w in matrices)
    assert objective.model.get_input_embeddings().weight.grad.any()
    pairs = zip(before, corpus.teacher.model.state_dict().values())
    assert all(torch.equal(old, new) for old, new in pairs)
    assert all(w.grad is None for w in corpus.teacher.model.parameters())
    assert not corpus.teacher.model.training


# -------------------------------------------------------------------------------------- whole runs
@pytest.fixture
def flags(models, corpus, tmp_path):
    files = ["--corpus", str(corpus), "--output", str(tmp_path / "out")]
    return [*models, *files, "--epochs", "2", "--batch_size", "16", "--lr", "1e-3"]


def weights(folder):
    matrices = torch.load(folder / "projections.pt", weights_only=True)
    return (folder / "model.safetensors").read_bytes(), [W.tolist() for W in matrices]


@pytest.mark.parametrize("method", METHODS)
def test_a_run_is_saved_and_one_that_was_interrupted_ends_the_same(
    flags, tmp_path, method, monkeypatch, ends_with_one_line
):
    flags = [*flags, "--method", method, "--optimizer", "asam" if method == "dskd" else "adamw"]
    online.main(flags)
    out, step, count = tmp_path / "out", talas.training_step, []
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert {"simcse", "distillation", "loss"} < lines[0].keys()
    told = json.loads((out / "talas.json").read_text())
    assert told["settings"]["method"] == method and told["teacher"] == flags[3]
    assert talas.load_student(talas.Settings(student=str(out)), []).dimensions == 32
    whole = weights(out)
    assert len(whole[1]) == (8 if method == "dskd" else 1)

    def interrupted(*args):
        count.append(0)
        if len(count) == 5:  # in the second epoch
            raise KeyboardInterrupt
        return step(*args)

    again = [*flags, "--output", str(tmp_path / "again")]
    monkeypatch.setattr(talas, "training_step", interrupted)
    with pytest.raises(SystemExit):
        online.main(again)
    monkeypatch.setattr(talas, "training_step", step)
    other = [*again, "--resume", "--teacher", flags[1]]
    ends_with_one_line(lambda: online.main(other), "--resume with another student or corpus")
    online.main([*again, "--resume"])
    assert weights(tmp_path / "again") == whole


def test_each_method_has_its_own_defaults():
    own = {m: online.parse_settings(["--method", m, "--student", "x"]) for m in METHODS}
    names = "temperature", "projection_lr_scale", "warmup_ratio", "lr", "epochs", "optimizer"
    found = {m: [getattr(s, name) for name in names] for m, s in own.items()}
    assert found["cdm"] == [0.07, 2, 0.06, 2e-5, 5, "adamw"]
    assert found["dskd"] == [0.07, 1, 0.06, 2e-5, 5, "adamw"]
    assert found["emo"] == [0.05, 1, 0.1, 2e-5, 5, "adamw"]
    assert online.parse_settings(["--method", "emo", "--temperature", "1"]).temperature == 1


@pytest.mark.parametrize(
    "wrong, words",
    [
        (["--teacher", ""], ["--teacher is missing"]),
        (["--teacher", "nowhere/at-all"], ["nowhere/at-all"]),
        (["--method", "stella"], ["--method", "stella"]),
        (["--method"], ["--method"]),
        (["--lambda1", "1"], ["--lambda1"]),
        (["--mse", "rows"], ["--mse", "rows"]),
        (["--batch_size", "1"], ["--batch_size 1"]),
    ],
)
def test_a_mistake_is_one_line(flags, wrong, words, ends_with_one_line):
    ends_with_one_line(lambda: online.main([*flags, *wrong]), *words)


def test_what_the_files_hold_can_be_wrong(flags, tmp_path, ends_with_one_line):
    teacher = flags[3]
    over = [*flags, "--output", teacher, "--overwrite"]
    ends_with_one_line(lambda: online.main(over), "--output", "is the --teacher itself")
    MambaModel(MambaConfig(vocab_size=92, hidden_size=8, num_hidden_layers=1)).save_pretrained(
        tmp_path / "mamba"
    )
    for path in Path(teacher).glob("tokenizer*"):
        (tmp_path / "mamba" / path.name).write_bytes(path.read_bytes())
    emo = [*flags, "--teacher", str(tmp_path / "mamba"), "--method", "emo"]
    ends_with_one_line(lambda: online.main(emo), "attention maps", "MambaModel")
    (tmp_path / "blank.txt").write_text("A door.\n\u200b\x01\nA boat.\n")
    blank = [*flags, "--corpus", str(tmp_path / "blank.txt"), "--output", str(tmp_path / "b")]
    ends_with_one_line(
        lambda: online.main([*blank, "--batch_size", "2"]), "no word", "leave it out"
    )
