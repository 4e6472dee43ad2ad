"""The study: its runs on a pair made in a moment, its tables against numbers worked out by hand."""

from dataclasses import asdict
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import ROOT, SENTENCES, before_each_step, embed_alone, random_rows, write_files
from scipy.stats import spearmanr
from torch.nn.functional import cosine_similarity

import talas
from cache_teacher import load_cache
from study import baselines, bench, geometry, plots, report, run
from study.results import AVERAGES, HERE, PAIRS, ROWS, TABLE3, TASKS, describe, portable
from support.files import read_json


# ------------------------------------------------------------------------------------------- runs
@pytest.fixture
def pair_b(tmp_path, bert, corpus, monkeypatch):
    """Flags of run.py: pair B with a small student, a random teacher and one task; short runs."""
    bert.rename(tmp_path / "student-cls")
    np.save(tmp_path / "mpnet.npy", random_rows(48, 8, dtype=torch.float32).numpy())
    pairs = []
    for i, text in enumerate(SENTENCES):
        pairs.append({"sentence1": text, "sentence2": SENTENCES[0], "score": i % 6})
    write_files(tmp_path / "tasks/stsb", {"test.jsonl": pairs})
    for row in ROWS.values():
        monkeypatch.setitem(row, "flags", f"{row['flags']} --epochs 2 --batch_size 16 --lr 0.01")
    return [
        "--pairs=B",
        f"--models={tmp_path}",
        f"--embeddings={tmp_path}/mpnet.npy",
        f"--corpus={corpus}",
        f"--data={tmp_path}/tasks",
        f"--work={tmp_path}/runs",
        f"--results={tmp_path}/results.json",
    ]


def test_runs_are_recorded_under_their_names(pair_b, tmp_path, monkeypatch):
    monkeypatch.setitem(PAIRS["B"], "dtype", "float16")
    run.main([*pair_b, "--rows", "before", "T", "--seeds", "1", "2"])
    recorded = read_json(tmp_path / "results.json")
    assert sorted(recorded) == ["B/T/1", "B/T/2", "B/before"]
    scores = {entry["scores"]["stsb"] for entry in recorded.values()}
    assert len(scores) == 3
    assert load_cache(f"{tmp_path}/runs/mpnet.pt")["embeddings"].dtype == torch.float16


def test_another_run_of_the_same_name_is_refused(pair_b, tmp_path, ends_with_one_line):
    flags = [*pair_b, "--rows", "T"]
    run.main(flags)
    ROWS["T"]["flags"] += " --lr 0.02"
    ends_with_one_line(lambda: run.main(flags), "results.json, B/T/42", "settings")
    sentences = ["A sentence of the other corpus.", *SENTENCES[1:]]
    write_files(tmp_path, {"other.jsonl": [{"text": text} for text in sentences]})
    flags.append(f"--corpus={tmp_path}/other.jsonl")
    (tmp_path / "runs/mpnet.pt").unlink()
    (tmp_path / "results.json").unlink()
    ends_with_one_line(lambda: run.main(flags), "runs/B-T-42", "corpus")


def test_an_interrupted_run_resumes(pair_b, monkeypatch):
    steps = []

    def interrupt(number, objective):
        steps.append(type(objective))
        if len(steps) == 5:  # in the second epoch of three steps
            raise KeyboardInterrupt

    before_each_step(interrupt, monkeypatch)
    flags = [*pair_b, "--rows", "STLA-released"]
    with pytest.raises(KeyboardInterrupt):
        run.main(flags)
    run.main(flags)
    assert steps == [run.Released] * (5 + 3)


def test_the_released_objective(bert, cache):
    s = talas.Settings(student=str(bert), device="cpu", rho=0.0, lr=1e-9)
    corpus, objective = baselines.prepare(s, load_cache(str(cache)), run.Released)
    batch = corpus.batch(torch.arange(8))
    layers = [embed_alone(bert, "cls", SENTENCES[:8], layer) for layer in (0, 1, 2, 3)]
    _, terms = objective.eval()(*batch)
    torch.testing.assert_close(terms["lasd"], talas.lasd_loss(layers))
    asam, _ = talas.make_optimizer(s, objective.train(), steps=10)
    values = talas.training_step(objective, asam, *batch, s)
    assert values["sharpness_gap"] != 0  # w̃ = w at ρ = 0: the second pass has other masks


def test_recorded_settings_are_those_of_the_rows():
    args = SimpleNamespace(models="a", work="b", corpus="c/corpus.jsonl", sharpness=False)
    for key, entry in read_json(HERE / "results.json").items():
        if entry.get("settings"):
            s = run.settings_of_run(args, entry["pair"], entry["row"], entry["seed"])
            assert portable(asdict(s)) == entry["settings"], key


def test_what_a_training_leaves(tmp_path):
    lines = [{"step": step, "loss": 1, "tamd": step / 10} for step in (44, 50, 90, 100)]
    lines.append({"end_of_epoch": 2, "step": 220, "lambda_max": 7.5})
    about = {"settings": {}, "corpus": "1f", "versions": {}}
    write_files(tmp_path, {"metrics.jsonl": lines, "talas.json": about})
    entry = describe(tmp_path)
    assert entry["history"]["step"] == [50, 100]
    assert entry["history"]["tamd"] == [5.0, 10.0]
    assert entry["lambda_max"] == {"2": 7.5}


# --------------------------------------------------------------------------- geometry, benchmark
def test_geometry_by_hand(bert, cache, tmp_path):
    W = random_rows(2, 32, 8, dtype=torch.float32)  # of the two top layers of three
    torch.save(list(W), bert / "projections.pt")
    geometry.main([str(bert), f"--teacher={cache}", f"--results={tmp_path}/r.json"])
    _, _, top = read_json(tmp_path / "r.json")["geometry/bert"]["layers"]
    E = embed_alone(bert, "cls", SENTENCES)
    teacher = load_cache(str(cache))["embeddings"]
    loss = 1 - cosine_similarity(E @ W[1], teacher).mean().item()
    assert top["tamd"] == pytest.approx(loss, abs=1e-4)
    i, j = torch.triu_indices(48, 48, offset=1)
    cosines = cosine_similarity(E[i], E[j])
    assert top["spread"] == pytest.approx(1 - cosines.mean().item(), abs=1e-4)
    rank = spearmanr(cosines, cosine_similarity(teacher[i], teacher[j])).statistic
    assert top["spearman"] == pytest.approx(100 * rank, abs=0.1)


def test_the_benchmark_by_hand(bert, monkeypatch):
    seconds = dict.fromkeys(TABLE3, 1.0)
    seconds |= {"released": 6.0, "STLA": 4.0, "STL": 2.0, "cached": 320.0}
    passed = []

    def fake_side(name, *args):
        def step(rows):
            warm_up = len(passed) < 2 * bench.WARM_UP  # slow, and not to be counted
            passed.append(100.0 if warm_up else seconds[name])

        return step

    monkeypatch.setattr(bench.time, "perf_counter", lambda: sum(passed))
    monkeypatch.setattr(bench, "side", fake_side)
    monkeypatch.setattr(bench, "peak_mb", lambda *args: 7.0)
    cpu = torch.device("cpu")
    args = SimpleNamespace(student=str(bert), teacher=str(bert), device=cpu)
    content = {"sentences": SENTENCES * 20}
    assert bench.measure("released", content, args) == {"ratio": 1.5, "ms": [6000, 4000]}
    table3 = bench.table3(content, args)
    assert table3["distill"]["ratio"] == {"STL": 0.5, "STLA": 0.25}
    share = table3["cached"]  # 320 s for 32 batches, each used in 5 epochs: 2 s a step
    assert (share["ms"], share["ratio"]) == (2000, {"STL": 1.0, "STLA": 0.5})


# -------------------------------------------------------------------------------- tables and plots
def entry(row, seed, stsb, avg, **more):
    """An entry of pair B whose other tasks score 50."""
    scores = dict.fromkeys(TASKS | AVERAGES, 50.0)
    scores |= {"stsb": stsb, "avg": avg}
    return {"pair": "B", "row": row, "seed": seed, "scores": scores} | more


BEFORE = entry("before", 42, 10.0, 10.0)
HISTORY = {"step": [50, 100], "simcse": [0, 0], "tamd": [0.9, 0.5], "lasd": []}
T = [
    entry("T", 1, 7.0, 70.0, history=HISTORY),
    entry("T", 2, 8.0, 71.0),
    entry("T", 3, 9.0, 72.0),
]
STL = [entry("STL", 1, 20.0, 70.5, history=HISTORY), entry("STL", 3, 0.0, 74.5)]
DISTILL = entry("distill", 1, 1.0, 60.0)
ENTRIES = {str(key): run for key, run in enumerate([BEFORE, *T, *STL, DISTILL])}


def line(table, label):
    """The row of a table that begins with a label."""
    (row,) = [row for row in table if row[0].startswith(label)]
    return row[1:]


def test_scores_by_hand():
    made = report.tables(ENTRIES)
    # Avg: 70, 71, 72 deviate from 71 by 1, 0, 1
    scores = line(made["main-B"], "T")
    assert scores[-4:] == ["8.00", "50.00 ± 0.00", "50.00 ± 0.00", "71.00 ± 1.00"]


def test_gains_by_hand():
    made = report.tables(ENTRIES)
    # t with one degree of freedom at 97.5 % is 12.706, with two 4.303
    # STL and T have seeds 1 and 3: +0.5 and +2.5, mean 1.5, error √2 / √2; STS-B: +13, -9, mean 2
    gain = line(made["gains"], "SimCSE and LASD: STL − T")
    assert gain == ["+1.96, -0.27, +3.00", "+1.50 [-11.21, +14.21]", "1/9"]
    # T - before: 60, 61, 62, error 1 / √3; an untrained student has one score for all seeds
    assert line(made["gains"], "TAMD alone:") == ["", "+61.00 [+58.52, +63.48]", "0/9"]
    talas_over_distill = report.tables(ENTRIES | {"x": entry("STLA", 1, 2.0, 58.0)})["methods"]
    assert line(talas_over_distill, "TALAS over distill") == ["", "", "-2.00", "1/9"]


def test_sharpness_and_cost_by_hand():
    sharp = entry("T", 1, 1, 1, lambda_max={"5": 2.0})
    side = {"ms": 1000.0, "ratio": {"STL": 5.04, "STLA": 2.5}, "rest": 7.0}
    benchmark = {"date": "2026-01-02", "rows": {}, "table3": {"emo": side}}
    made = report.tables({"a": sharp, "bench/x/cpu": benchmark})
    assert line(made["sharpness-B"], "T") == ["–", "–", "–", "–", "2.00"]
    cost = line(made["cost-x-cpu"], "EMO")
    assert cost == ["1000", "5.04", "6.27", "2.50", "3.26", "", "", "7"]  # 6.27 = 1223 / 195


def test_the_texts_have_our_figures():
    made = report.tables(read_json(HERE / "results.json"))
    for path in (HERE / "README.md", ROOT / "README.md"):
        text = path.read_text("utf-8")
        assert "<!-- table:" in text
        assert report.fill(text, made) == text


def test_plots_of_the_study(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    drawn = {}  # the axes of each picture
    save = plots.save

    def keep_axes_and_save(figure, axis, path):
        drawn[path.name] = figure.axes
        save(figure, axis, path)

    monkeypatch.setattr(plots, "save", keep_axes_and_save)
    plots.draw_all(ENTRIES, tmp_path)
    simcse, tamd, _ = drawn["B-terms.svg"]
    assert not simcse.lines  # it is 0
    assert tamd.lines[0].get_xydata().tolist() == [[50, 0.9], [100, 0.5]]
    (scores,) = drawn["B-scores.svg"]
    assert [mark.get_label() for mark in scores.lines] == ["T", "STL", "distill"]
    assert scores.lines[0].get_ydata()[-1] == 8 - 10  # STS-B of T: the mean of 7, 8, 9
