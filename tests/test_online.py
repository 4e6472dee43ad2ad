"""The methods with an online teacher: tables worked by hand, plain loops, whole runs."""

import json
import math
from functools import lru_cache
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import SENTENCES, small_bert
from scipy.optimize import linprog
from transformers import MambaConfig, MambaModel

import talas
from study import online

METHODS = ["cdm", "dskd", "emo"]
TEXTS = [*(SENTENCES[i] for i in (0, 3, 9, 14)), "A rose."]  # of five lengths, some with a garden
G = torch.Generator().manual_seed(0)
X, Y = torch.randn(6, 4, generator=G).double(), torch.randn(6, 5, generator=G).double()


# --------------------------------------------------------------------------------- pure functions
def test_edit_distances_by_hand():
    found = online.edit_distances(["kitten", "", "flaw"], ["sitting", "lawn", ""])
    assert found.tolist() == [[3, 5, 6], [7, 4, 0], [7, 2, 4]]


def test_a_warping_by_hand():
    cost = np.array([[1, 3, 4, 9], [2, 0, 1, 7], [9, 5, 2, 1]])
    assert online.warp(cost) == [(0, 0), (1, 1), (1, 2), (2, 3)]  # 1 + 0 + 1 + 1
    assert online.warp(np.array([[0, 2], [0, 1], [9, 0]])) == [(0, 0), (1, 0), (2, 1)]
    zeros = np.zeros((3, 5))  # all ways are equally cheap
    assert online.warp(zeros) == [(0, 0), (0, 1), (0, 2), (1, 3), (2, 4)]
    assert online.warp(zeros.T) == [(0, 0), (1, 0), (2, 0), (3, 1), (4, 2)]


def cka(X, Y):
    X, Y = ([[x - sum(c) / len(c) for x, c in zip(row, zip(*Z))] for row in Z] for Z in (X, Y))

    def length(A, B):
        products = [sum(a * b for a, b in zip(x, y)) for x in zip(*A) for y in zip(*B)]
        return math.sqrt(sum(product**2 for product in products))

    return length(X, Y) / math.sqrt(length(X, X) * length(Y, Y))


def test_cka_against_loops_and_its_invariances():
    expected = pytest.approx(1 - cka(X.tolist(), Y.tolist()), abs=1e-9)
    turn = torch.linalg.qr(torch.randn(4, 4, generator=G).double())[0]
    for same in (X, X @ turn, 30 * X, X + 7):
        assert online.cka_loss(same, Y).item() == expected
    assert online.cka_loss(X, X).item() == pytest.approx(0, abs=1e-9)
    assert online.cka_loss(X[:2], Y[:2]).item() == pytest.approx(0, abs=1e-9)  # says nothing
    alike = X[:1].repeat(3, 1).requires_grad_()
    online.cka_loss(alike, Y[:3]).backward()
    assert alike.grad.isfinite().all()


def test_the_plan_has_its_marginals_and_nears_the_cheapest():
    cost = torch.rand(4, 6, generator=G).double()
    a, b = (torch.rand(n, generator=G).double().softmax(0) for n in (4, 6))
    plan = online.sinkhorn(cost, a, b, 0.1, 500)
    assert torch.allclose(plan.sum(1), a) and torch.allclose(plan.sum(0), b)
    scaled = (plan / (-cost / 0.1).exp()).log()  # log u_i + log v_j
    assert torch.allclose(scaled - scaled[:1], (scaled - scaled[:1])[:, :1].expand(4, 6))
    sums = np.vstack([np.kron(np.eye(4), np.ones(6)), np.kron(np.ones(4), np.eye(6))])
    best = linprog(cost.flatten().numpy(), A_eq=sums, b_eq=torch.cat([a, b]).numpy()).fun
    near, nearer = [(online.sinkhorn(cost, a, b, e, 4000) * cost).sum() for e in (0.1, 0.003)]
    assert best < nearer < near and nearer.item() == pytest.approx(best, abs=1e-3)


def test_the_mean_square_of_unit_vectors_is_a_cosine():
    twice = 2 * (1 - torch.cosine_similarity(3 * X, Y[:, :4])).mean().item()
    assert online.unit_mse(3 * X, Y[:, :4]).item() == pytest.approx(twice / 4)
    assert online.unit_mse(3 * X, Y[:, :4], "sentences").item() == pytest.approx(twice)


# ------------------------------------------------------------------------ the losses, plain loops
@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A student of 3 layers and a teacher of 5, whose tokenizer splits garden into gar, ##den."""
    folder, how = tmp_path_factory.mktemp("models"), {"initializer_range": 1.0}
    student = small_bert(folder / "student", **how)
    small_bert(folder / "teacher", seed=1, num_hidden_layers=5, hidden_size=48, **how)
    tokenizer = folder / "teacher" / "tokenizer.json"
    tokenizer.write_text(tokenizer.read_text().replace('"garden"', '"gardens"'))
    return ["--student", str(student), "--teacher", str(folder / "teacher"), "--device", "cpu"]


def prepare(flags, texts=TEXTS):
    s = online.parse_settings([*flags, "--teacher_pooling", "mean", "--temperature", "0.3"])
    cache = {"sentences": texts, "sources": texts, "embeddings": torch.zeros(len(texts), 0)}
    corpus, objective = online.prepare(s, cache)
    for W in objective.projections:
        n, m = W.shape
        bound = math.sqrt(6 / (n + m)) if "dskd" in flags else 1 / math.sqrt(n)
        assert 0.95 < W.abs().max() / bound <= 1  # Xavier's, or torch's own
        W.data *= 8  # or attention would be nearly the same everywhere
    return corpus, objective.eval()  # no dropout


@lru_cache(None)
def far(x, y):
    ways = [far(x[1:], y) + 1, far(x, y[1:]) + 1] if x and y else [len(x) + len(y)]
    return min([*ways, far(x[1:], y[1:]) + (x[0] != y[0])] if x and y else ways)


class Alone:
    """One sentence, without padding, in an encoder: tokens, states and attention as arrays."""

    def __init__(self, encoder, text):
        row = encoder.tokenizer.encode(text)
        self.tokens, self.words = [t.strip("#") for t in row.tokens], range(1, len(row.ids) - 1)
        encoder.model.set_attn_implementation("eager")
        how = {"output_hidden_states": True, "output_attentions": True}
        given = encoder.model(torch.tensor([row.ids]), **how)
        self.states = [h[0].detach().double().numpy() for h in given.hidden_states]
        self.maps = [a[0].detach().double().mean(0).numpy() for a in given.attentions]
        self.last, self.n = self.states[-1], len(row.ids)


def mse(pairs, mean):
    squares = np.array([(x / np.linalg.norm(x) - y / np.linalg.norm(y)) ** 2 for x, y in pairs])
    return squares.mean() if mean == "elements" else squares.sum(1).mean()


def softmax(x):
    return np.exp(x) / np.exp(x).sum(-1, keepdims=True)


def cdm(S, T, W, mean):
    words = []
    for own, its in zip(S, T):
        best = {}  # of a pair of tokens: the cheapest way there, from the front
        for j in its.words:
            for i in own.words:
                ways = [best.get(w, (np.inf, [])) for w in ((j - 1, i - 1), (j - 1, i), (j, i - 1))]
                cost, path = min(ways, key=lambda way: way[0]) if best else (0, [])
                best[j, i] = cost + far(its.tokens[j], own.tokens[i]), [*path, (j, i)]
        for i in own.words:
            states = [its.last[j] for j, k in best[its.words[-1], own.words[-1]][1] if k == i]
            words.append((own.last[i] @ W["P"], np.mean(states, axis=0)))
    sentences = [(own.last[0] @ W["P"], its.last.mean(0)) for own, its in zip(S, T)]
    return 50 * mse(words, mean) + mse(sentences, mean)


def dskd(S, T, W, mean):
    pairs = [[], [], [], []]
    for x, y in zip(S, T):
        s, t = x.states[2], y.states[3]
        own = softmax(s @ W["q_S"] @ (t @ W["k_T"]).T / math.sqrt(32)) @ t @ W["v_T"]
        its = softmax(t @ W["q_T"] @ (s @ W["k_S"]).T / math.sqrt(32)) @ s @ W["v_S"]
        pairs[0] += [(s[i], own[i]) for i in x.words]
        pairs[1] += [(t[j], its[j]) for j in y.words]
        pairs[2] += [(x.last[0] @ W["to_T"], y.last.mean(0))]
        pairs[3] += [(x.last[0], y.last.mean(0) @ W["to_S"])]
    return sum(mse(some, mean) for some in pairs)


def nearest(j, one, other):
    if j in (0, one.n - 1):
        return j and other.n - 1

    def rank(i):
        apart = abs(i / (other.n - 1) - j / (one.n - 1))
        return far(one.tokens[j], other.tokens[i]), apart

    return min(other.words, key=rank)


def emo(S, T, W, mean):
    relations, transport = 0, []
    for own, its in zip(S, T):
        importance, pairs = softmax(its.maps[-1].sum(0)), []
        mass = np.full(own.n, importance.min())
        for j in range(its.n):
            i = nearest(j, its, own)
            mass[i] = importance[j]
            pairs += [(importance[j], i, j)] if nearest(i, own, its) == j else []
        _, i, j = map(list, zip(*sorted(pairs, reverse=True)[: max(3, len(pairs) // 3)]))
        relations += 1 - cka(own.maps[-1][i].tolist(), its.maps[2][j].tolist())
        cost = 1 - softmax(own.last @ (its.last @ W["P"]).T / math.sqrt(32))
        K, u = np.exp(-cost / 0.1), np.ones(own.n)
        for _ in range(100):
            v = importance / (K.T @ u)
            u = mass / mass.sum() / (K @ v)
        transport.append((u[:, None] * K * v * cost).sum())
    return 0.05 * relations + 0.5 * np.mean(transport)


@pytest.mark.parametrize("mean", ["elements", "sentences"])
@pytest.mark.parametrize("by_hand", [cdm, dskd, emo])
def test_a_batch_is_as_its_sentences_alone(models, by_hand, mean, monkeypatch):
    """So neither padding, nor the other sentences, nor the pieces change what each gives."""
    monkeypatch.setattr(online, "PIECE", 3)
    method = by_hand.__name__
    corpus, objective = prepare([*models, "--method", method, "--mse", mean])
    teacher = corpus.teacher.model
    before = [w.clone() for w in teacher.state_dict().values()]
    loss, terms = objective(*corpus.batch(torch.arange(5))[:2])
    loss.backward()
    S, T = ([Alone(side, text) for text in TEXTS] for side in (corpus.student, corpus.teacher))
    matrices = dict(zip(online.MATRICES[method], objective.projections, strict=True))
    own = by_hand(S, T, {name: W.detach().double().numpy() for name, W in matrices.items()}, mean)
    z = torch.tensor(np.array([x.last[0] for x in S]))
    simcse = talas.simcse_loss(z, z, 0.3).item()
    assert terms["distillation"].item() == pytest.approx(own, rel=1e-4)
    expected = (1.0 if method == "dskd" else 0.5) * simcse + own
    assert loss.item() == terms["loss"].item() == pytest.approx(expected, rel=1e-4)
    assert len(matrices) == (8 if method == "dskd" else 1)
    assert all(W.grad.isfinite().all() and W.grad.any() for W in matrices.values())
    assert all(W.grad is None for W in teacher.parameters()) and not teacher.training
    assert all(map(torch.equal, before, teacher.state_dict().values()))


def test_the_first_view_is_the_one_that_is_distilled(models, monkeypatch):
    corpus, objective = prepare([*models, "--method", "cdm"])
    seen = []
    monkeypatch.setattr(online, "cdm_loss", lambda W, student, *_: seen.append(student) or 0.0)
    objective.train()
    objective(*corpus.batch(torch.arange(5))[:2])
    assert torch.equal(seen[0]["last"][:, 0], seen[0]["sentence"])


def test_a_word_that_the_teacher_alone_splits(models):
    """The cook sees the door in the garden; den is nearest to in, gar to the."""
    corpus = prepare([*models, "--method", "cdm"], TEXTS[:1])[0]
    same = [[i, i] for i in range(8)]  # of student and teacher
    assert corpus.matches[0][0].tolist() == [*same[1:], [7, 8], [8, 9], [9, 10]]
    corpus = prepare([*models, "--method", "emo"], TEXTS[:1])[0]
    links, mutual = corpus.matches[0]
    assert sorted(mutual.tolist()) == [*same, [9, 10], [10, 11]]
    assert sorted(links.tolist()) == [*same[:6], [6, 9], [7, 8], [9, 10], [10, 11]]
    given = corpus.batch(torch.arange(1))[1]
    mass, importance = given["mass"][0], given["importance"][0]  # garden's is the least there is
    assert (mass[8] / mass[6]).item() == pytest.approx((importance.min() / importance[9]).item())


# -------------------------------------------------------------------------------------- whole runs
@pytest.fixture
def flags(models, corpus, tmp_path):
    files = ["--corpus", str(corpus), "--output", str(tmp_path / "out")]
    return [*models, *files, "--epochs", "2", "--batch_size", "24"]


def weights(folder):
    matrices = torch.load(folder / "projections.pt", weights_only=True)
    return (folder / "model.safetensors").read_bytes(), [W.tolist() for W in matrices]


@pytest.mark.parametrize("method, optimizer", list(zip(METHODS, ["asam", "sam", "adamw"])))
def test_a_run_ends_the_same_though_interrupted(
    flags, tmp_path, method, optimizer, monkeypatch, ends_with_one_line
):
    flags += ["--method", method, "--optimizer", optimizer]
    monkeypatch.setattr(online, "PIECE", 64)
    online.main(flags)
    out, step, steps = tmp_path / "out", talas.training_step, []
    told = json.loads((out / "talas.json").read_text())
    assert told["settings"]["method"] == method and told["teacher"] == flags[3]
    assert "distillation" in json.loads((out / "metrics.jsonl").read_text().split("\n")[0])
    assert talas.load_student(talas.Settings(student=str(out)), []).dimensions == 32

    def interrupted(*args):
        steps.append(0)
        if len(steps) == 3:  # in the second epoch
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
    assert weights(tmp_path / "again") == weights(out)


def test_each_method_has_its_own_defaults():
    names = "temperature", "projection_lr_scale", "warmup_ratio", "lr", "epochs", "optimizer"
    for method, own in zip(METHODS, [(0.07, 2, 0.06), (0.07, 1, 0.06), (0.05, 1, 0.1)]):
        s = online.parse_settings(["--method", method, "--student", "x"])
        assert tuple(getattr(s, name) for name in names) == (*own, 2e-5, 5, "adamw")
    assert online.parse_settings(["--method", "emo", "--temperature", "1"]).temperature == 1


def test_a_mistake_is_one_line(flags, tmp_path, ends_with_one_line):
    teacher, blank, mamba = Path(flags[3]), tmp_path / "blank.txt", tmp_path / "mamba"
    blank.write_text("A door.\n\u200b\x01\nA boat.\n")
    MambaModel(MambaConfig(vocab_size=92, hidden_size=8, num_hidden_layers=1)).save_pretrained(
        mamba
    )
    for path in teacher.glob("tokenizer*"):
        (mamba / path.name).write_bytes(path.read_bytes())
    for wrong, *words in [
        (["--teacher", ""], "--teacher is missing"),
        (["--teacher", "nowhere/at-all"], "nowhere/at-all"),
        (["--output", flags[3], "--overwrite"], "--output", "is the --teacher itself"),
        (["--teacher", str(mamba), "--method", "emo"], "attention maps", "MambaModel"),
        (["--corpus", str(blank), "--batch_size", "2"], "no word", "leave it out"),
        (["--method", "stella"], "--method", "stella"),
        (["--method"], "--method"),
        (["--lambda1", "1"], "--lambda1"),
        (["--mse", "rows"], "--mse", "rows"),
        (["--batch_size", "1"], "--batch_size 1"),
    ]:
        ends_with_one_line(lambda wrong=wrong: online.main([*flags, "--overwrite", *wrong]), *words)
