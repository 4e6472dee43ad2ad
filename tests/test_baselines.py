"""The other methods of Table 1: each loss against plain loops, each run against talas.py's ways."""

from collections import Counter
from itertools import combinations, permutations
from pathlib import Path

import pytest
import torch
from conftest import before_each_step, cosines, in_two_processes, metrics, rows, small_bert

import talas
from study import baselines
from support.data import Corpus
from support.loading import load_encoder

E, T, W = rows(6, 5, seed=1), rows(6, 5, seed=2), rows(6, 9, seed=3)
s_E, s_T = cosines(E, E), cosines(T, T)


def test_distill_and_similarity_losses_by_their_formulas():
    close = torch.testing.assert_close
    close(baselines.distill_loss(E, T, "cosine"), (1 - cosines(E, T).diag()).sum() / 6)
    close(baselines.distill_loss(E, T, "mse"), ((E - T) ** 2).sum() / 6 / 5)
    own = baselines.similarity_loss(E, W)  # the two may differ in width
    close(own, ((s_E - cosines(W, W)) ** 2).sum() / 6**2)


@pytest.mark.parametrize("margin", [0.0, 0.5])
def test_relative_similarity_loss_wants_the_teachers_order(margin):
    hinges = []
    for ij, mn in permutations(combinations(range(6), 2), 2):
        if s_T[ij] > s_T[mn]:
            hinges.append(max(0.0, (s_E[mn] - s_E[ij]).item() + margin))
    found = baselines.relative_similarity_loss(E, T, margin).item()
    assert found == pytest.approx(sum(hinges) / len(hinges))
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
        dealt = baselines.group_p_shuffle(row.expand(2000, 4), p)
        drawn = Counter(tuple(x) for x in dealt.tolist())
        assert drawn.keys() == wanted and min(drawn.values()) > 2000 / len(wanted) / 2


@pytest.mark.parametrize("turned", [False, True])
def test_distribution_loss_is_a_cross_entropy_without_the_sentence_itself(turned, monkeypatch):
    """Shuffled, with the others' places turned round in place of dealt out."""
    monkeypatch.setattr(baselines, "group_p_shuffle", lambda cosines, p: cosines.flip(-1))
    total = 0.0
    for i in range(6):
        others = [j for j in range(6) if j != i]
        student = (s_E[i, others] / 0.3).log_softmax(0)
        total -= (s_T[i, others[:: -1 if turned else 1]] / 0.2).softmax(0) @ student
    s = baselines.Settings(student_temperature=0.3, teacher_temperature=0.2)
    torch.testing.assert_close(baselines.distribution_loss(E, T, s, shuffled=turned), total / 6)


DEFAULTS = "--student x --epochs 5 --optimizer adamw --distance cosine --cosine_weight 10"
DEFAULTS += " --similarity_weight 200 --relative_weight 20 --margin 0.015 --projection_epochs 2"
DEFAULTS += " --temperature 0.05 --student_temperature 0.025 --teacher_temperature 0.0125"
OTHERS = " --temperature 0.3 --student_temperature 0.2 --teacher_temperature 0.1 --margin 0.3"
OTHERS += " --cosine_weight 2 --similarity_weight 3 --relative_weight 5 --group_p 0.5"


@pytest.mark.parametrize(
    "method", ["distill", "distill --distance mse", "stella --distance mse", "distillcse"]
)
def test_each_method_reads_the_last_layer(bert, cache, method):
    s = talas.parse_settings([*f"--method {method} {OTHERS}".split()], baselines.Settings)
    student, cse, simcse = load_encoder(str(bert)), method == "distillcse", 0
    objective = baselines.Baseline(student, talas.new_projections(s, student, 8), s).eval()
    tokens, teacher, _ = Corpus(torch.load(cache), student).batch(torch.arange(7))
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
        e = states @ objective.projections[0]
        distance = "mse" if method == "distill --distance mse" else "cosine"
        expected = baselines.distill_loss(e, teacher, distance)
        if "stella" in method:  # which has no choice of the distance
            expected = 2 * expected + 3 * baselines.similarity_loss(e, teacher)
            expected += 5 * baselines.relative_similarity_loss(e, teacher, 0.3)
    assert terms["distillation"].item() == pytest.approx(expected.item(), rel=1e-4)
    assert loss.item() == terms["loss"].item() == pytest.approx(expected.item() + simcse, rel=1e-4)
    assert talas.parse_settings(DEFAULTS.split(), baselines.Settings) == baselines.Settings(
        student="x", group_p=0.1
    )


# ------------------------------------------------------------------------------------ whole runs
@pytest.fixture
def flags(here):
    given = "--student bert --teacher teacher.pt --output out --device cpu --epochs 2"
    return [*given.split(), "--batch_size", "16", "--lr", "1e-3", "--method", "stella"]


def weights(folder):
    projections = torch.load(f"{folder}/projections.pt", weights_only=True)
    return Path(folder, "model.safetensors").read_bytes(), [W.tolist() for W in projections]


def test_stella_trains_the_projection_alone_then_all_and_goes_on(flags, monkeypatch, capsys):
    """One epoch of three steps alone, two epochs with the student."""
    seen = []

    def stopped(*more, at, saying):
        def stop(number, objective):
            query = objective.model.encoder.layer[0].attention.self.query.weight
            seen.append([x.detach().clone() for x in (query, *objective.projections)])
            if number == at:
                raise KeyboardInterrupt

        seen.clear()
        with monkeypatch.context() as patch, pytest.raises(SystemExit):
            before_each_step(stop, patch)
            baselines.main([*flags, "--projection_epochs", "1", *more])
        assert saying in capsys.readouterr().err

    stopped(at=2, saying="begins again")
    assert not Path("out").exists()  # nothing to resume
    stopped(at=3 + 5, saying="--resume")  # in stage two
    query = [x for x, _ in seen]
    assert all(torch.equal(x, query[0]) for x in query[:4]) and not torch.equal(*query[3:5])
    assert seen[3][1].std() > 3e-3  # W: from 1e-3
    baselines.main([*flags, "--projection_epochs", "1", "--resume"])
    resumed, (lines, _) = weights("out"), metrics("out")
    names = {"step", "epoch", "distillation", "loss", "lr", "ms_per_step", "memory_mb"}
    assert lines[0].keys() == names and lines[-1]["step"] == 6
    baselines.main([*flags, "--projection_epochs", "1", "--overwrite"])
    assert weights("out") == resumed
    stopped("--overwrite", at=3 + 5, saying="--resume")
    stopped("--overwrite", at=2, saying="begins again")  # no checkpoint of the run before is left
    stopped("--resume", at=1, saying="no checkpoint")


def test_two_processes_asam_and_a_student_of_one_layer(flags):
    assert in_two_processes(lambda: baselines.main(flags)) == [0, 0]
    assert len(weights("out")[1]) == 1
    small_bert("one", num_hidden_layers=1)
    more = "--overwrite --student one --method distillcse --optimizer asam --rho 0.5"
    baselines.main([*flags, *more.split()])
    assert metrics("out")[0][0]["sharpness_gap"] > 0 and weights("out")[1] == []


WRONG = ["--method emo", "--lambda3 1", "--optimizer disam", "--margin -1", "--batch_size 2"]


@pytest.mark.parametrize("wrong", [*WRONG, "--teacher nowhere.pt", "--teacher_temperature 0"])
def test_a_mistake_is_one_line(flags, wrong, ends_with_one_line):
    flag, value = wrong.split()
    words = [value] if flag == "--teacher" else [flag]
    ends_with_one_line(lambda: baselines.main([*flags, flag, value]), *words)
