"""The other methods of Table 1: each loss against plain loops, each run against talas.py's ways."""

import json
import math
from collections import Counter
from itertools import combinations, permutations, product

import pytest
import torch
from conftest import in_two_processes, small_bert

import talas
from study import baselines
from support.encoder import Corpus
from support.loading import load_encoder

RUNS = ["--method distill", "--method distill --distance mse", "--method stella --batch_size 8"]


def embeddings(n, d, seed):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed))


def cosine(x, y):
    dot = sum(a * b for a, b in zip(x, y))
    return dot / math.sqrt(sum(a * a for a in x)) / math.sqrt(sum(b * b for b in y))


def mean(values):
    values = list(values)
    return pytest.approx(sum(values) / len(values), rel=1e-5)


E, T, W = embeddings(6, 5, 1), embeddings(6, 5, 2), embeddings(6, 9, 3)
e, t, w = E.tolist(), T.tolist(), W.tolist()


def test_distill_and_similarity_losses_by_loops():
    cosines = [1 - cosine(x, y) for x, y in zip(e, t)]
    assert baselines.distill_loss(E, T, "cosine").item() == mean(cosines)
    squares = ((a - b) ** 2 for x, y in zip(e, t) for a, b in zip(x, y))
    assert baselines.distill_loss(E, T, "mse").item() == mean(squares)
    pairs = product(range(6), range(6))  # the two may differ in width
    squares = ((cosine(e[i], e[j]) - cosine(w[i], w[j])) ** 2 for i, j in pairs)
    assert baselines.similarity_loss(E, W).item() == mean(squares)


@pytest.mark.parametrize("margin", [0.0, 0.5])
def test_relative_similarity_loss_wants_the_teachers_order(margin):
    hinges = []
    for (i, j), (m, n) in permutations(combinations(range(6), 2), 2):
        if cosine(t[i], t[j]) > cosine(t[m], t[n]):
            hinges.append(max(0, cosine(e[m], e[n]) - cosine(e[i], e[j]) + margin))
    assert baselines.relative_similarity_loss(E, T, margin).item() == mean(hinges)
    assert baselines.relative_similarity_loss(E, torch.ones(6, 5), 0.5) == 0  # none is ordered


def test_group_p_shuffle_deals_out_anew_within_each_group():
    row = torch.tensor([0.1, 0.5, 0.15, 0.25]).log()  # of which the softmax is 0.1, 0.5, ...
    torch.manual_seed(0)  # downwards the sums are 0.5, 0.75, 0.9, 1: at p = 0.7 one, and three
    for p, free in ((0.7, [0, 2, 3]), (1.0, [0, 1, 2, 3]), (0.001, [])):
        wanted = set()
        for dealt in permutations(free):
            new = row.clone()
            new[free] = row[list(dealt)]
            wanted.add(tuple(new.tolist()))
        drawn = Counter(
            tuple(x) for x in baselines.group_p_shuffle(row.expand(2000, 4), p).tolist()
        )
        assert drawn.keys() == wanted and min(drawn.values()) > 2000 / len(wanted) / 2


@pytest.mark.parametrize("turned", [False, True])
def test_distribution_loss_is_a_cross_entropy_without_the_sentence_itself(turned, monkeypatch):
    """Shuffled, with the others' places turned round in place of dealt out."""
    monkeypatch.setattr(baselines, "group_p_shuffle", lambda cosines, p: cosines.flip(-1))
    losses = []
    for i in range(6):
        others = [j for j in range(6) if j != i]
        student = torch.tensor([cosine(e[i], e[j]) / 0.3 for j in others]).log_softmax(0)
        order = reversed(others) if turned else others
        teacher = torch.tensor([cosine(t[i], t[j]) / 0.2 for j in order]).softmax(0)
        losses.append(-(teacher * student).sum().item())
    s = baselines.Settings(student_temperature=0.3, teacher_temperature=0.2)
    assert baselines.distribution_loss(E, T, s, shuffled=turned).item() == mean(losses)


@pytest.mark.parametrize("flags", [*RUNS, "--method distillcse"])
def test_each_method_reads_the_last_layer(bert, cache, flags):
    assert (s := baselines.Settings()).epochs == 5 and (s.optimizer, s.group_p) == ("adamw", 0.1)
    assert (s.cosine_weight, s.similarity_weight, s.relative_weight) == (10, 200, 20)
    assert (s.margin, s.projection_epochs, s.temperature) == (0.015, 2, 0.05)
    assert (s.student_temperature, s.teacher_temperature) == (0.025, 0.0125)
    other = " --temperature 0.3 --student_temperature 0.2 --teacher_temperature 0.1 --margin 0.3"
    other += " --cosine_weight 2 --similarity_weight 3 --relative_weight 5 --group_p 0.5"
    s = talas.parse_settings([*(flags + other).split()], baselines.Settings)
    student, cse, simcse = load_encoder(str(bert)), "distillcse" in flags, 0
    objective = baselines.Baseline(student, talas.new_projections(s, student, 8), s).eval()
    corpus = Corpus(torch.load(cache, weights_only=True), student)
    tokens, teacher, _ = corpus.batch(torch.arange(7))
    loss, terms = objective(tokens, teacher)
    states = objective.model(**tokens).last_hidden_state[:, 0]
    assert len(objective.projections) == (not cse) and ("simcse" in terms) is cse
    if cse:
        expected = baselines.distribution_loss(states, teacher, s, shuffled=False)
        simcse = talas.simcse_loss(states, states, 0.3).item()
        assert terms["simcse"].item() == pytest.approx(simcse, rel=1e-4)
        for module in objective.model.modules():  # without dropout the shuffling alone is random
            module.p = 0.0 if isinstance(module, torch.nn.Dropout) else None
        assert objective(tokens, teacher)[0] == loss  # for λ_max
        objective.train()
        assert len({objective(tokens, teacher)[0].item() for _ in range(5)}) > 1
    else:
        projected = states @ objective.projections[0]
        expected = baselines.distill_loss(projected, teacher, "mse" if "mse" in flags else "cosine")
        if "stella" in flags:
            relative = baselines.relative_similarity_loss(projected, teacher, 0.3)
            expected = 2 * expected + 3 * baselines.similarity_loss(projected, teacher)
            expected += 5 * relative
    assert terms["distillation"].item() == pytest.approx(expected.item(), rel=1e-4)
    assert loss.item() == terms["loss"].item() == pytest.approx(expected.item() + simcse, rel=1e-4)


# ------------------------------------------------------------------------------------ whole runs
@pytest.fixture
def flags(bert, cache, tmp_path):
    given = f"--student {bert} --teacher {cache} --output {tmp_path}/out --device cpu --epochs 2"
    return [*given.split(), "--batch_size", "16", "--lr", "1e-3", "--method", "stella"]


def weights(folder):
    projections = torch.load(folder / "projections.pt", weights_only=True)
    return (folder / "model.safetensors").read_bytes(), [W.tolist() for W in projections]


def test_stella_trains_the_projection_alone_and_then_all(tmp_path, flags, monkeypatch):
    seen, train = [], talas.train

    def watched(s, corpus, objective, *how):
        train(s, corpus, objective, *how)
        weight = objective.model.encoder.layer[0].attention.self.query.weight.detach().clone()
        seen.append((s.epochs, weight, objective.projections[0].detach().clone()))

    monkeypatch.setattr(talas, "train", watched)
    baselines.main([*flags, "--projection_epochs", "3"])
    start = load_encoder(flags[1]).model.encoder.layer[0].attention.self.query.weight
    (first, fixed, W), (second, moved, _) = seen
    assert (first, second) == (3, 2) and torch.equal(start, fixed) and not torch.equal(start, moved)
    lines = [json.loads(line) for line in open(tmp_path / "out" / "metrics.jsonl")]
    names = {"step", "epoch", "distillation", "loss", "lr", "ms_per_step", "memory_mb"}
    assert W.std() > 3e-3 and lines[0].keys() == names and lines[-1]["step"] == 6  # W: from 1e-3


def test_an_interrupted_stella_begins_again_or_goes_on(tmp_path, flags, monkeypatch, capsys):
    out, step, count = tmp_path / "out", talas.training_step, []

    def stopped(*more, at, saying):
        def interrupted(*args):
            count.append(0)
            if len(count) == at:
                raise KeyboardInterrupt
            return step(*args)

        count.clear()
        monkeypatch.setattr(talas, "training_step", interrupted)
        with pytest.raises(SystemExit):
            baselines.main([*flags, *more])
        assert saying in capsys.readouterr().err

    stopped(at=3, saying="begins again")
    assert not out.exists()  # nothing to resume
    stopped(at=2 * 3 + 5, saying="--resume")  # in stage two
    baselines.main([*flags, "--resume"])
    resumed = weights(out)
    baselines.main([*flags, "--overwrite"])
    assert weights(out) == resumed
    stopped("--overwrite", at=2 * 3 + 5, saying="--resume")
    stopped("--overwrite", at=3, saying="begins again")  # no checkpoint of the run before is left
    stopped("--resume", at=1, saying="no checkpoint")


def test_two_processes_asam_and_a_student_of_one_layer(tmp_path, flags):
    assert in_two_processes(lambda: baselines.main(flags)) == [0, 0]
    assert len(weights(tmp_path / "out")[1]) == 1
    flags[1] = str(small_bert(tmp_path / "one", num_hidden_layers=1))
    more = ["--overwrite", "--method", "distillcse", "--optimizer", "asam", "--rho", "0.5"]
    baselines.main([*flags, *more])
    lines = [json.loads(line) for line in open(tmp_path / "out" / "metrics.jsonl")]
    assert lines[0]["sharpness_gap"] > 0 and weights(tmp_path / "out")[1] == []


WRONG = ["--method emo", "--lambda3 1", "--optimizer disam", "--margin -1", "--batch_size 2"]


@pytest.mark.parametrize("wrong", [*WRONG, "--teacher nowhere.pt", "--teacher_temperature 0"])
def test_a_mistake_is_one_line(flags, wrong, ends_with_one_line):
    flag, value = wrong.split()
    words = [value] if flag == "--teacher" else [flag]
    ends_with_one_line(lambda: baselines.main([*flags, flag, value]), *words)
