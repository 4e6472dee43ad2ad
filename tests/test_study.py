"""The study: its runs on a pair made in a moment, its tables against numbers worked out by hand."""

from support.encoder import Corpus
from support.loading import load_encoder

import json
import re
import shlex
import shutil
import statistics
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, SENTENCES
from filelock import FileLock
from scipy.stats import spearmanr

import talas
from study import baselines, bench, geometry, report, results, run

README = ROOT / "study" / "README.md"


@pytest.fixture
def pair_b(tmp_path, bert, corpus):
    """Flags of run.py: pair B with a small student, a random teacher and two tasks."""
    bert.rename(tmp_path / "student-cls")
    rng = np.random.default_rng(0)
    np.save(tmp_path / "mpnet.npy", rng.normal(size=(48, 8)).astype("float32"))
    rows = {
        "stsb": [
            {"sentence1": SENTENCES[i], "sentence2": SENTENCES[(7 * i + 1) % 48], "score": i % 6}
            for i in range(40)
        ],
        "mrpc": [
            {"sentence1": SENTENCES[i], "sentence2": SENTENCES[(5 * i + 2) % 48], "label": i % 2}
            for i in range(40)
        ],
    }
    for task, some in rows.items():
        (tmp_path / "tasks" / task).mkdir(parents=True)
        text = "".join(json.dumps(row) + "\n" for row in some)
        (tmp_path / "tasks" / task / "test.jsonl").write_text(text)
    flags = {"pairs": "B", "models": tmp_path, "embeddings": tmp_path / "mpnet.npy"}
    flags |= {"corpus": corpus, "data": tmp_path / "tasks", "work": tmp_path / "runs"}
    flags |= {"results": tmp_path / "results.json", "epochs": 2, "batch_size": 16, "device": "cpu"}
    flags["lr"] = 0.01
    return [text for name, value in flags.items() for text in (f"--{name}", str(value))]


@pytest.fixture
def trained(monkeypatch):
    """The flags of each call of talas.main."""
    calls, main = [], talas.main
    monkeypatch.setattr(talas, "main", lambda argv: (calls.append(argv), main(argv)))
    return calls


def test_rows_are_run_once_and_recorded_with_their_settings(pair_b, trained, tmp_path, capsys):
    rows = ["--rows", "before", "T", "STL", "--seeds", "1", "2"]
    run.main([*pair_b, *rows, "--each_epoch"])
    assert len(trained) == 4
    recorded = (tmp_path / "results.json").read_text()
    found = json.loads(recorded)
    assert sorted(found) == ["B/STL/1", "B/STL/2", "B/T/1", "B/T/2", "B/before"]
    entry = found["B/T/1"]
    assert (entry["settings"]["lambda1"], entry["settings"]["lambda3"]) == (0, 0)
    assert (entry["settings"]["epochs"], entry["settings"]["optimizer"]) == (2, "adamw")
    assert {"torch", "transformers"} <= entry["versions"].keys()
    assert entry["scores"]["avg"] == pytest.approx(
        (entry["scores"]["stsb"] + entry["scores"]["mrpc"]) / 2
    )
    assert list(entry["epochs"]) == ["1", "2"]
    assert entry["epochs"]["2"] == entry["scores"]["avg"]
    assert found["B/T/1"]["scores"] != found["B/T/2"]["scores"] != found["B/before"]["scores"]
    assert str(tmp_path) not in recorded  # nothing of this machine
    run.main([*pair_b, *rows])
    assert len(trained) == 4 and (tmp_path / "results.json").read_text() == recorded
    assert capsys.readouterr().out.count("done already\n") == 5
    assert sorted(path.name for path in (tmp_path / "runs" / "B-T-1" / "epochs").iterdir()) == [
        *"12"
    ]
    run.main([*pair_b, *rows, "--each_epoch", "--sharpness"])
    assert capsys.readouterr().out.count("done already, without --sharpness;") == 4
    other = ["--results", str(tmp_path / "other.json"), "--rows", "STL", "--seeds", "1"]
    run.main([*pair_b, *other, "--each_epoch", "--sharpness"])  # what it advises
    again = json.loads((tmp_path / "other.json").read_text())["B/STL/1"]
    assert again["scores"] == found["B/STL/1"]["scores"] and len(trained) == 5
    assert list(again["lambda_max"]) == list(again["epochs"]) == ["1", "2"]


def test_the_other_methods_are_rows_too(pair_b, tmp_path):
    run.main([*pair_b, "--rows", "distill-mse", "distillcse"])
    found = json.loads((tmp_path / "results.json").read_text())
    mse, cse = found["B/distill-mse/42"], found["B/distillcse/42"]
    settings = {"method": "distill", "distance": "mse", "optimizer": "adamw", "epochs": 2}
    assert settings.items() <= mse["settings"].items()
    assert cse["settings"]["method"] == "distillcse"
    assert mse["scores"] != cse["scores"] and len(mse["cost"]) == 1


def stopped_in_the_second_epoch(monkeypatch):
    """Let Ctrl-C end the fifth step from here; returns a list with an item a step."""
    step, count = talas.training_step, []

    def interrupted(*args):
        count.append(0)
        if len(count) == 5:
            raise KeyboardInterrupt
        return step(*args)

    monkeypatch.setattr(talas, "training_step", interrupted)
    return count


def test_an_interrupted_run_goes_on_from_its_last_epoch(pair_b, trained, tmp_path, monkeypatch):
    run.main([*pair_b, "--rows", "STL", "--each_epoch"])
    whole = json.loads((tmp_path / "results.json").read_text())["B/STL/42"]
    shutil.rmtree(tmp_path / "runs")
    (tmp_path / "results.json").unlink()
    count = stopped_in_the_second_epoch(monkeypatch)
    with pytest.raises(SystemExit):
        run.main([*pair_b, "--rows", "STL", "--each_epoch"])
    run.main([*pair_b, "--rows", "STL", "--each_epoch"])
    assert trained[-1][-1] == "--resume" and len(count) == 5 + 3
    again = json.loads((tmp_path / "results.json").read_text())["B/STL/42"]
    assert again["scores"] == whole["scores"] and again["settings"] == whole["settings"]
    assert again["epochs"] == whole["epochs"] and list(whole["epochs"]) == ["1", "2"]
    (tmp_path / "results.json").unlink()
    three = [*pair_b, "--rows", "STL", "--epochs", "3"]
    run.main([*three, "--each_epoch"])
    shutil.rmtree(tmp_path / "runs" / "B-STL-42" / "epochs" / "1")  # not kept from the first on
    (tmp_path / "results.json").unlink()
    run.main(three)
    assert "epochs" not in json.loads((tmp_path / "results.json").read_text())["B/STL/42"]


def test_epochs_asked_for_later_are_trained_for_and_gone_on_with(pair_b, tmp_path, monkeypatch):
    flags = [*pair_b, "--rows", "STL"]
    run.main(flags)
    once = json.loads((tmp_path / "results.json").read_text())["B/STL/42"]
    later = [*flags, "--each_epoch", "--results", str(tmp_path / "later.json")]
    stopped_in_the_second_epoch(monkeypatch)
    with pytest.raises(SystemExit):
        run.main(later)
    run.main(later)
    found = json.loads((tmp_path / "later.json").read_text())["B/STL/42"]
    assert found["scores"] == once["scores"] and list(found["epochs"]) == ["1", "2"]


def test_a_relative_work_folder_is_the_same_run(pair_b, trained, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        run.main([*pair_b, "--rows", "T", "--work", "runs"])
        shutil.rmtree("runs")
    assert len(trained) == 1 and "done already" in capsys.readouterr().out
    assert (
        json.loads(Path("results.json").read_text())["B/T/42"]["settings"]["teacher"] == "mpnet.pt"
    )


def test_a_run_that_another_process_is_at_is_left_to_it(pair_b, trained, tmp_path, capsys):
    (tmp_path / "runs").mkdir()
    with FileLock(tmp_path / "runs" / "B-T-42.running"):
        run.main([*pair_b, "--rows", "T", "before"])
    assert "another process" in capsys.readouterr().out and not trained
    assert list(json.loads((tmp_path / "results.json").read_text())) == ["B/before"]


def test_a_trained_run_is_scored_without_training_it_again(pair_b, trained, tmp_path):
    run.main([*pair_b, "--rows", "S"])
    scores = json.loads((tmp_path / "results.json").read_text())["B/S/42"]["scores"]
    (tmp_path / "results.json").unlink()
    run.main([*pair_b, "--rows", "S"])
    assert len(trained) == 1
    assert json.loads((tmp_path / "results.json").read_text())["B/S/42"]["scores"] == scores


def test_other_settings_or_data_are_not_taken_for_the_same_run(
    pair_b, tmp_path, ends_with_one_line
):
    run.main([*pair_b, "--rows", "S"])
    ends_with_one_line(lambda: run.main([*pair_b, "--rows", "S", "--lr", "1"]), "B/S/42")
    shutil.copytree(tmp_path / "tasks", tmp_path / "others")
    other = [*pair_b, "--rows", "S", "--data", str(tmp_path / "others")]
    ends_with_one_line(lambda: run.main(other), "B/S/42", "data")
    wrong = [*pair_b, "--rows", "released-code"]
    ends_with_one_line(lambda: run.main(wrong), "--released")


def test_what_a_training_left(tmp_path):
    steps = [10, 20, 30, 40, 44, 50, 60, 70, 80, 88, 90, 100, 110]  # epochs of 44 steps
    lines = [{"step": step, "loss": 1.0, "simcse": step / 10, "tamd": 0.5} for step in steps]
    lines = [line | {"lasd": 0.12345678, "sharpness_gap": 0.0} for line in lines]
    lines += [{"end_of_epoch": 1, "step": 110, "lambda_max": None}]
    lines += [{"end_of_epoch": 2, "step": 220, "lambda_max": 7.5}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    settings = {"student": str(tmp_path), "output": "x", "device": "cpu", "teacher": "a/b", "lr": 1}
    about = {"settings": settings, "teacher": "/elsewhere/mpnet.npy", "cost": {"ms_per_step": 3.0}}
    (tmp_path / "talas.json").write_text(json.dumps(about))
    told = results.describe(tmp_path)
    assert told["settings"] == {"student": tmp_path.name, "teacher": "a/b", "lr": 1}
    assert told["teacher"] == "mpnet.npy" and told["cost"] == {"ms_per_step": 3.0}
    assert told["history"]["step"] == [50, 100] and told["history"]["simcse"] == [5, 10]
    assert told["history"]["lasd"] == [0.123457, 0.123457]
    assert told["lambda_max"] == {"2": 7.5}


def test_every_row_has_settings_that_talas_takes():
    for row, flags in run.ROWS.items():
        if flags is not None:
            s, program = run.settings_of(row, ["--student", "x", *flags.split()])
            if program is baselines.main:
                assert row.startswith(s.method) and ("mse" in row) == (s.distance == "mse")
                continue
            assert (s.optimizer == "adamw") == ("A" not in row.split("-")[0] and "code" not in row)
            assert (s.lambda1 > 0) == ("S" in row or "code" in row)


def test_the_commands_in_the_text_are_understood():
    text = README.read_text("utf-8").replace("\\\n", " ")
    lines = [line.strip() for line in text.splitlines()]
    f = next(line for line in lines if line.startswith("F=")).removeprefix("F=").strip('"')
    commands = [line for line in lines if line.startswith("python study/run.py ")]
    assert len(commands) >= 5
    for line in commands:
        args = run.parse_args(shlex.split(line.replace("$F", f), comments=True)[2:])
        for row in args.rows:
            run.settings_of(row, ["--student", "x", *(run.ROWS[row] or "").split(), *args.flags])


def test_geometry_by_hand(bert, cache, tmp_path):
    content = torch.load(cache, weights_only=True)
    student = load_encoder(str(bert))
    torch.manual_seed(0)
    W = [torch.randn(32, 8), torch.randn(32, 8)]
    talas.save_student(tmp_path / "kept", student, W)
    flags = [str(bert), str(tmp_path / "kept"), "--teacher", str(cache), "--names", "a", "b"]
    geometry.main([*flags, "--results", str(tmp_path / "results.json")])
    found = json.loads((tmp_path / "results.json").read_text())
    assert [one.keys() for one in found["geometry/a"]["layers"]] == [
        {"layer", "spread", "spearman"}
    ] * 3
    kept = found["geometry/b"]["layers"]
    assert ["tamd" in one for one in kept] == [False, True, True]
    tokens = student.tokenizer(content["sentences"], padding=True, return_tensors="pt")
    with torch.no_grad():
        states = student.model.eval()(**tokens, output_hidden_states=True).hidden_states
    E, teacher = states[2][:, 0].double().numpy(), content["embeddings"].double().numpy()

    def pairs(X):
        X = X / np.linalg.norm(X, axis=1, keepdims=True)
        return np.array([X[i] @ X[j] for i in range(48) for j in range(i)])

    assert kept[1]["spread"] == pytest.approx(1 - pairs(E).mean(), abs=1e-5)
    expected = 100 * spearmanr(pairs(E), pairs(teacher)).statistic
    assert kept[1]["spearman"] == pytest.approx(expected, abs=0.1)
    projected = E @ W[0].double().numpy()
    cosines = [x @ y / np.linalg.norm(x) / np.linalg.norm(y) for x, y in zip(projected, teacher)]
    assert kept[1]["tamd"] == pytest.approx(1 - np.mean(cosines), abs=1e-5)
    header, rows = report.tables(found)["geometry"]
    assert len(rows) == 7 and rows[4][:2] == ["b", "2"]
    T = content["embeddings"] / content["embeddings"].norm(dim=1, keepdim=True)
    best = 1 - (T @ (T.mean(0) / T.mean(0).norm())).mean().item()
    assert rows[6] == ["one vector for all", "", "0.000000", "–", f"{best:.3f}"]
    assert rows[4][4] == f"{kept[1]['tamd']:.3f}" and rows[1][4] == ""
    assert report.figure(found, "geometry/b/2/tamd") == f"{kept[1]['tamd']:.3g}"


def test_the_released_behaviour(bert, cache):
    """LASD from layer 0 on, by a loop; at ρ = 0, where w̃ = w, the two passes' losses differ."""
    s = talas.Settings(optimizer="asam", rho=0.0, lambda1=0.0)
    content = torch.load(cache, weights_only=True)

    def step(changed):
        student = load_encoder(str(bert))
        torch.manual_seed(0)
        objective, asam, _ = talas.set_up(s, student, 8, 10)
        tokens, teacher, domains = Corpus(content, student).batch(torch.arange(8))
        with run.released_behaviour() if changed else torch.enable_grad():
            _, (_, _, lasd) = objective(tokens, teacher)
            student.model.train()
            values = talas.training_step(objective, asam, tokens, teacher, domains, s)
        return lasd.item(), dict(zip(talas.METRICS, values.tolist()))["sharpness_gap"], tokens

    lasd, gap, tokens = step(changed=True)
    model = load_encoder(str(bert)).model
    with torch.no_grad():
        hidden = model(**tokens, output_hidden_states=True).hidden_states
    layers = [torch.nn.functional.normalize(h[:, 0], dim=1) for h in hidden]
    R = [E @ E.T for E in layers]
    expected = statistics.fmean(((a - b) ** 2).mean().item() for a, b in zip(R, R[1:]))
    assert len(R) == 4 and lasd == pytest.approx(expected, rel=1e-4)
    assert gap != 0
    ours, own_gap, _ = step(changed=False)
    assert own_gap == 0 and ours != pytest.approx(lasd, rel=1e-2)


def test_the_bench_records_its_rows(bert, cache, tmp_path, ends_with_one_line, monkeypatch):
    sizes, forward = [], talas.hidden_states

    def counted(model, batch):
        sizes.append(len(batch["input_ids"]))
        return forward(model, batch)

    monkeypatch.setattr(talas, "hidden_states", counted)
    flags = ["--cache", str(cache), "--student", str(bert), "--results", str(tmp_path / "r.json")]
    flags += ["--turns", "2", "--device", "cpu", "--rows"]
    bench.main([*flags, "asam", "plain", "memory", "distillcse"])
    assert max(sizes) < 64 and not sizes.clear()
    bench.main(
        [*flags, "pieces"]
    )  # two views of 32 sentences; four passes whole for each in pieces
    assert sizes.count(64) == 2 * (bench.WARM_UP + 2)
    (key, found), *others = json.loads((tmp_path / "r.json").read_text()).items()
    assert key == "bench/bert/cpu" and not others
    assert sorted(found["rows"]) == ["asam", "distillcse", "memory", "pieces", "plain"]
    assert found["rows"]["memory"]["ratio"] == pytest.approx(1.0, abs=0.1)  # one copy of w
    assert all(row["ratio"] > 0 for row in found["rows"].values())
    assert len(report.tables({key: found})["bench-bert-cpu"][1]) == 5
    ends_with_one_line(lambda: bench.main([*flags, "released"]), "released")


def entry(row, seed, **scores):
    return {"pair": "B", "row": row, "seed": seed, "scores": scores}


RESULTS = {
    "B/before": entry("before", 42, stsb=10.0, avg_in=10.0, avg_out=None, avg=10.0),
    "B/T/1": entry("T", 1, stsb=1.0, avg_in=1.0, avg_out=None, avg=70.0),
    "B/T/2": entry("T", 2, stsb=2.0, avg_in=2.0, avg_out=None, avg=71.0),
    "B/T/3": entry("T", 3, stsb=4.0, avg_in=4.0, avg_out=None, avg=72.0),
    "B/STL/1": entry("STL", 1, stsb=3.0, avg_in=3.0, avg_out=None, avg=70.5)
    | {"lambda_max": {"1": 4.0, "5": 3.0}},
    "B/STL/3": entry("STL", 3, stsb=3.0, avg_in=3.0, avg_out=None, avg=74.5),
}


def test_mean_and_standard_deviation_by_hand():
    # of 1, 2, 4: mean 7/3; deviations -4/3, -1/3, 5/3, their squares' sum 42/9, by n - 1: 7/3
    assert report.mean_sd([1.0, 2.0, 4.0]) == "2.33 ± 1.53"
    assert report.mean_sd([70.126]) == "70.13"
    assert report.mean_sd([]) == "–"
    assert report.mean_sd([0.5, 2.5], "+") == "+1.50 ± 1.41"


def test_the_tables_by_hand():
    made = report.tables(RESULTS)
    header, rows = made["scores-B"]
    assert header == ["", "STS-B", "Avg-In", "Avg-Out", "Avg", "seeds"]
    assert rows == [
        ["before", "10.00", "10.00", "–", "10.00", ""],
        ["T", "2.33 ± 1.53", "2.33 ± 1.53", "–", "71.00 ± 1.00", "3"],
        ["STL", "3.00 ± 0.00", "3.00 ± 0.00", "–", "72.50 ± 2.83", "2"],
    ]
    # with seeds 1 and 3, which both rows have: 70.5 - 70 and 74.5 - 72
    assert made["gains-B"][1] == [
        ["SimCSE and LASD beside TAMD", "STL − T", "+1.50 ± 1.41", "1 of 1", "2"]
    ]
    assert made["sharpness-B"] == (["epoch", "STL"], [["1", "4.00"], ["5", "3.00"]])
    scores = {"stsb": 1.0, "avg_in": 1.0, "avg_out": None, "avg": 1.0}
    flat = [entry("STLA", seed, **scores) for seed in (1, 2)]
    flat = [e | {"lambda_max": {"1": value}} for e, value in zip(flat, (2.0, 4.0))]
    made = report.tables(RESULTS | {"x": flat[0], "y": flat[1]})
    # the ratio is of seed 1, which both have: 2 / 4
    rows = [["1", "4.00", "3.00 ± 1.41", "0.50"], ["5", "3.00", "–", "–"]]
    assert made["sharpness-B"] == (["epoch", "STL", "STLA", "STLA / STL"], rows)
    assert "cost-B" not in made and "winners-B" not in made
    alone = report.tables({"x": flat[0]})["sharpness-B"]
    assert alone == (["epoch", "STLA"], [["1", "2.00"]])


def test_how_far_two_runs_differ_by_chance():
    # squares of deviations: T's 1, 0, 1 in Avg and 42/9 in STS-B; STL's (2.83² = 8) and 0; of
    # 2 + 1 degrees of freedom, for which t at 0.975 is 3.182 in every table of it
    (header, (row,)) = report.tables(RESULTS)["noise-B"]
    assert header == ["", "STS-B", "Avg-In", "Avg-Out", "Avg"]
    stsb, avg = (f"{3.18245 * (2 * squares / 3) ** 0.5:.2f}" for squares in (42 / 9, 2 + 8))
    assert row == ["two single runs", stsb, stsb, "–", avg]
    one_each = {key: RESULTS[key] for key in ("B/before", "B/T/1", "B/STL/1")}
    assert "noise-B" not in report.tables(one_each)


def test_when_tamd_leaves_its_plateau():
    def of(row, seed, K=2, **told):
        about = {"settings": {"anchored_layers": K}, "history": {"step": [50, 100, 150]} | told}
        return entry(row, seed, avg=70.0 + seed) | about

    entries = [
        of("STL", 1, tamd=[0.7, 0.6, 0.5]),  # at step 150, and the next at 100: 125
        of("STL", 2, tamd=[0.7, 0.5, 0.59]),
        of("T", 1, tamd=[0.57, 0.58, 0.4]),
        of("STLA-SAM", 1, tamd=[0.7, 0.6, 0.58]),
        of("S", 1, tamd=[0.0, 0.0, 0.0]),
        of("STLA-K-1", 1, K=1, tamd=[0.5, 0.5, 0.5]),
        of("stella", 1, distillation=[1.0, 1.0, 1.0]),
    ]
    assert report.tables({str(i): each for i, each in enumerate(entries)})["plateau-B"][1] == [
        ["T", "50", "0.40", "71.00"],
        ["STL", "125", "0.54 ± 0.06", "71.50 ± 0.71"],
        ["STLA-SAM", "never", "0.58", "71.00"],
    ]
    entries.append(of("STLA-SAM", 2, tamd=[0.5, 0.5, 0.5]))
    table = report.tables({str(i): each for i, each in enumerate(entries)})["plateau-B"][1]
    assert table[-1][:2] == ["STLA-SAM", "50 (1 of 2 seeds)"]


def test_the_cost_of_a_step():
    costs = [{"ms_per_step": 100.0}, {"ms_per_step": 300.0}, {}]
    found = {str(i): entry("T", i, avg=1.0) | {"cost": cost} for i, cost in enumerate(costs)}
    assert report.tables(found)["cost-B"] == (["", "ms/step"], [["T", "200.00 ± 141.42"]])
    on_a_gpu = entry("S", 1, avg=1.0) | {"cost": {"ms_per_step": 50.0, "peak_mb": 9.0}}
    header, rows = report.tables(found | {"x": on_a_gpu})["cost-B"]
    assert header == ["", "ms/step", "peak MB"]
    assert rows == [["S", "50.00", "9.00"], ["T", "200.00 ± 141.42", "–"]]


def test_who_wins_on_which_task():
    entries = [
        entry("STLA", 1, stsb=5.0, avg=70.0),
        entry("distill", 1, stsb=6.0, avg=71.0),
        entry("distill", 2, stsb=8.0, avg=67.0),
        entry("stella", 1, stsb=1.0, avg=60.0),
        entry("T", 1, stsb=99.0, avg=99.0),  # a part of TALAS: it does not compete
    ]
    made = report.tables({str(i): each for i, each in enumerate(entries)})
    assert made["winners-B"][1] == [
        ["STS-B", "distill", "7.00 ± 1.41", "STLA", "5.00", "2 of 3"],
        ["Avg", "STLA", "70.00", "distill", "69.00 ± 2.83", "1 of 3"],
    ]


def test_markdown_and_latex():
    table = (["", "Avg"], [["STL − T", "+1.50 ± 1.41"], ["a_b", "–"]])
    assert report.markdown(*table).splitlines()[1:3] == [
        "| --- | ---: |",
        "| STL − T | +1.50 ± 1.41 |",
    ]
    assert r"STL $-$ T & +1.50 $\pm$ 1.41 \\" in report.latex(*table)
    assert r"a\_b & -- \\" in report.latex(*table)


def test_a_file_is_filled_between_its_marks(ends_with_one_line):
    text = "<!-- figure:B/STL/avg minus B/T/avg -->9<!-- end -->, "
    text += "<!-- figure:B/T/avg --><!-- end -->\n"
    text += (
        "<!-- figure:B/T/avg minus B/before/avg --><!-- end -->\n"  # an untrained one has no seed
    )
    marked = "<!-- table:sharpness-B -->\nold\n<!-- end -->\n"
    filled = report.fill(text + marked, RESULTS)
    assert ">+1.50 ± 1.41<" in filled and ">71.00 ± 1.00<" in filled and ">+61.00 ± 1.00<" in filled
    assert "| 5 | 3.00 |" in filled and "old" not in filled
    assert report.fill(filled, RESULTS) == filled
    ends_with_one_line(lambda: report.fill("<!-- table:x --><!-- end -->", RESULTS), "x")
    ends_with_one_line(lambda: report.fill("<!-- figure:B/T --><!-- end -->", RESULTS), "B/T")


def test_a_mistake_is_one_line(tmp_path, ends_with_one_line):
    nowhere = str(tmp_path / "nowhere")
    ends_with_one_line(lambda: report.main([nowhere]), "nowhere", "No such file")
    ends_with_one_line(lambda: report.main(["--latx", "x"]), "--latx")
    (tmp_path / "file").touch()
    below = str(tmp_path / "file" / "plots")
    text = str(tmp_path / "file")
    ends_with_one_line(lambda: report.main([text, "--plots", below]), "write plots")
    ends_with_one_line(lambda: report.main(["--latex", f"{nowhere}/t.tex"]), "t.tex")
    for turns in ("0", "x"):
        wrong = ["--student", "x", "--turns", turns]
        ends_with_one_line(lambda wrong=wrong: bench.main(wrong), "--turns")
    names = ["a", "b", "--names", "one"]
    ends_with_one_line(lambda: geometry.main(names), "--names", "2, one for each student")


@pytest.mark.parametrize("path", [README, ROOT / "README.md"], ids=["study", "README"])
def test_no_figure_is_typed(path):
    """The marked tables and figures are what the recorded results give."""
    text = path.read_text("utf-8")
    assert report.fill(text, results.read_json(results.RESULTS)) == text
    marks = re.findall("<!-- (?:table|figure):", text)
    assert len(marks) == len(re.findall("<!-- end -->", text)) > 10


CURVES = [{"1": 2.0, "2": 5.0}, {"1": 4.0}]  # only epoch 1 is of both seeds


@pytest.mark.skipif(not find_spec("matplotlib"), reason="the plots alone need matplotlib")
def test_plots(tmp_path):
    history = {"step": [50, 100], "simcse": [0, 0], "tamd": [0.9, 0.5], "lasd": [0.1, 0.2]}
    found = {key: entry | {"history": history} for key, entry in RESULTS.items()}
    from study import plots

    sharp = {str(seed): entry("T", seed) | {"lambda_max": c} for seed, c in enumerate(CURVES)}
    assert plots.mean_curves(sharp, "B", "lambda_max") == {"T": {1: 3.0}}
    plots.draw_all(found, tmp_path)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["B-scores.svg", "B-sharpness.svg", "B-terms.svg"]
    terms = (tmp_path / "B-terms.svg").read_text()
    assert "TAMD" in terms and "LASD" in terms and "SimCSE" not in terms
