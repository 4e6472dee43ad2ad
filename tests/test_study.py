"""The study: its runs on a pair made in a moment, its tables against numbers worked out by hand."""

import json
import re
import shlex
import shutil
import statistics
import sys
from dataclasses import asdict
from functools import wraps
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT, SENTENCES, small_bert
from scipy.stats import spearmanr
from transformers import AutoTokenizer, BertModel

import talas
from cache_teacher import load_cache
from study import baselines, bench, geometry, online, report, results, run
from support.data import Corpus
from support.loading import load_encoder

README, CPU = ROOT / "study" / "README.md", torch.device("cpu")
OWN_CODE = {  # a stand-in for what the authors released
    "src/evaluation/evaluation_automodel.py": "raise OSError('it would ask the network')",
    "config.py": "class TALASConfig:\n    def __init__(self, **given): self.given = given",
    "distiller.py": """import json, sys, torch, pandas
from transformers import AutoModel, AutoTokenizer
from src.evaluation.evaluation_automodel import eval_sts_task
assert not hasattr(sys.modules["src.evaluation.evaluation_automodel"], "__file__")
class KnowledgeDistiller:
    def __init__(self, config):
        told, self.step_times = config.given, [0.1, 0.2, 0.6]
        told["texts"] = list(pandas.read_csv(told["train_data_path"])["text"])
        told["length"] = torch.load(told["cache_path"]).norm(dim=1).mean().item()
        told["words"] = len(AutoTokenizer.from_pretrained("bert-base-uncased"))
        self.model_student = AutoModel.from_pretrained(told["student_model_name"])
        json.dump(told, open("told.json", "w"))
    def train(self):
        eval_sts_task(self.model_student, [])
        torch.nn.init.ones_(next(self.model_student.parameters()))
""",
}


@pytest.fixture
def pair_b(tmp_path, bert, corpus):
    """Flags of run.py: pair B with a small student, a random teacher and two tasks."""
    bert.rename(tmp_path / "student-cls")
    np.save(tmp_path / "mpnet.npy", np.random.default_rng(0).normal(size=(48, 8)).astype("f"))
    for task, label, n in (("stsb", "score", 6), ("mrpc", "label", 2)):
        pairs = [(SENTENCES[i], SENTENCES[(7 * i + n) % 48], i % n) for i in range(40)]
        rows = [dict(zip(("sentence1", "sentence2", label), pair)) for pair in pairs]
        (tmp_path / "tasks" / task).mkdir(parents=True)
        (tmp_path / "tasks" / task / "test.jsonl").write_text("\n".join(map(json.dumps, rows)))
    flags = f"--pairs B --models {tmp_path} --embeddings {tmp_path}/mpnet.npy --corpus {corpus}"
    flags += f" --data {tmp_path}/tasks --work {tmp_path}/runs --results {tmp_path}/results.json"
    return f"{flags} --epochs 2 --batch_size 16 --device cpu --lr 0.01".split()


@pytest.fixture
def trained(monkeypatch):
    """The settings of each training."""
    calls, train = [], baselines.run
    monkeypatch.setattr(baselines, "run", lambda s, *how: (calls.append(s), train(s, *how)))
    return calls


def test_rows_are_run_once_and_recorded(pair_b, trained, tmp_path, capsys, ends_with_one_line):
    flags, file = [*pair_b, "--rows", "before", "T", "--seeds", "1", "2"], tmp_path / "results.json"
    run.main([*flags, "--each_epoch"])
    recorded, found = file.read_text(), results.read_json(file)
    assert len(trained) == 2 and sorted(found) == ["B/T/1", "B/T/2", "B/before"]
    one, scores = found["B/T/1"], found["B/T/1"]["scores"]
    wanted = {"lambda1": 0, "epochs": 2, "optimizer": "adamw", "seed": 1, "teacher": "mpnet.pt"}
    assert wanted.items() <= one["settings"].items() and len(one["cost"]) == 1
    assert scores["avg"] == pytest.approx((scores["stsb"] + scores["mrpc"]) / 2)
    assert scores != found["B/T/2"]["scores"] != found["B/before"]["scores"]
    assert str(tmp_path) not in recorded  # nothing of this machine
    kept = tmp_path / "runs/B-T-1/epochs"
    weights = [(kept / f"{epoch}/model.safetensors").read_bytes() for epoch in "12"]
    assert weights[0] != weights[1] == (kept.parent / "model.safetensors").read_bytes()
    assert len(torch.load(kept / "1/projections.pt", weights_only=True)) == 2
    run.main(flags)
    assert capsys.readouterr().out.count("done already\n") == 3 and file.read_text() == recorded
    shutil.copytree(tmp_path / "tasks", tmp_path / "others")
    for other in (["--lr", "1"], ["--data", str(tmp_path / "others")], ["--sharpness"]):
        asked = [*pair_b, "--rows", "S", "T", "--seeds", "1", *other]
        ends_with_one_line(lambda asked=asked: run.main(asked), "B/T/1", "--results")
    file.unlink()  # what is trained is scored without training it again
    run.main(flags)
    assert len(trained) == 2 and results.read_json(file)["B/T/2"] == found["B/T/2"]


def test_a_row_without_a_teacher_is_recorded_without_one(pair_b, tmp_path):
    run.main([*pair_b, "--rows", "S"])
    ((key, found),) = results.read_json(tmp_path / "results.json").items()
    assert key == "B/S/42" and found["teacher"] == "" and found["scores"]["avg"] > 0


def test_an_interrupted_run_goes_on_from_its_last_epoch(pair_b, trained, tmp_path, monkeypatch):
    flags, step, count = [*pair_b, "--rows", "STLA-released"], talas.training_step, []
    run.main(flags)
    whole = (tmp_path / "runs/B-STLA-released-42/model.safetensors").read_bytes()
    shutil.rmtree(tmp_path / "runs")
    (tmp_path / "results.json").unlink()

    def interrupted(*args):
        count.append(0)
        if len(count) == 5:  # in the second epoch of three steps
            raise KeyboardInterrupt
        return step(*args)

    monkeypatch.setattr(talas, "training_step", interrupted)
    with pytest.raises(SystemExit):
        run.main(flags)
    run.main([*flags, "stella"])
    assert [s.resume for s in trained] == [False, False, True, False]
    assert (tmp_path / "runs/B-STLA-released-42/model.safetensors").read_bytes() == whole
    found = results.read_json(tmp_path / "results.json")
    assert found["B/stella/42"]["settings"]["method"] == "stella"


def test_an_online_row_runs_the_model_and_makes_no_cache(pair_b, tmp_path):
    small_bert(tmp_path / "mpnet", seed=1, hidden_size=48)
    run.main([*pair_b, "--rows", "emo", "--each_epoch"])
    ((key, found),) = results.read_json(tmp_path / "results.json").items()
    wanted = {"teacher": "mpnet", "method": "emo", "warmup_ratio": 0.1, "epochs": 2}
    assert key == "B/emo/42" and wanted.items() <= found["settings"].items()
    assert found["teacher"] == "mpnet" and found["scores"]["avg"] > 0
    assert not list((tmp_path / "runs").glob("*.pt"))
    assert (tmp_path / "runs/B-emo-42/epochs/2/model.safetensors").exists()


def test_a_row_is_what_its_name_says():
    expected = """S optimizer=adamw lambda2=0 lambda3=0, T optimizer=adamw lambda1=0 lambda3=0,
        ST optimizer=adamw lambda3=0, STL optimizer=adamw, TLA lambda1=0, STA lambda3=0, STLA,
        STLA-released, released-code, STLA-rho-0.5 rho=0.5, STLA-rho-1 rho=1, STLA-rho-2 rho=2,
        STLA-SAM optimizer=sam rho=0.005, STLA-DISAM optimizer=disam rho=0.005,
        STLA-K-1 anchored_layers=1, STLA-K-3 anchored_layers=3, distill, stella method=stella,
        STL-lambda3-0.1 optimizer=adamw lambda3=0.1, STL-lambda3-10 optimizer=adamw lambda3=10,
        STL-detach_guide optimizer=adamw detach_guide=True, distill-mse distance=mse,
        distillcse method=distillcse, cdm teacher_dtype=bfloat16,
        dskd method=dskd teacher_dtype=bfloat16, emo method=emo teacher_dtype=bfloat16,
        cdm-sentences mse=sentences teacher_dtype=bfloat16,
        dskd-sentences method=dskd mse=sentences teacher_dtype=bfloat16"""
    for row, *wanted in map(str.split, expected.split(",")):
        flags = results.ROWS[row]["flags"].split()
        kind = baselines.Settings if "--method" in flags else talas.Settings
        kind = online.Settings if row.split("-")[0] in online.OWN else kind
        s = talas.parse_settings(["--student", "x", *flags], kind)
        changed = asdict(s).items() - asdict(kind(student="x")).items()
        assert {f"{name}={value}".removesuffix(".0") for name, value in changed} == {*wanted}, row
    claims = results.CLAIMS.values()
    assert {claim[name] for claim in claims for name in ("row", "without")} <= results.ROWS.keys()


def test_a_mistake_is_one_line_before_any_work(pair_b, trained, tmp_path, ends_with_one_line):
    nowhere, some = ["--results", f"{tmp_path}/none/r.json"], [*pair_b, "--rows", "T"]
    named = "--seed 7,--rho=1,--anchored-layers 1,--output x,--student x,--method stella,--resume"
    for main, flags, *words in [
        *(
            (run.main, [*some, *x.split()], re.split("[ =]", x)[0], "names")
            for x in named.split(",")
        ),
        (run.main, [*some, *nowhere], "--results", "none"),
        (bench.main, ["--student", "x", *nowhere], "--results", "none"),
        (geometry.main, ["x", *nowhere], "--results", "none"),
        (run.main, [*some, "--epoch", "1"], "--epoch"),
        (run.main, [*some, "stella", "--lasd_layers", "2"], "--lasd_layers"),
        (run.main, [*pair_b, "--rows", "released-code"], "--released"),
        (bench.main, ["--student", "x", "--rows", "released"], "released", "asam"),
        (geometry.main, ["a", "b", "--names", "x"], "--names", "2, one for each"),
        (report.main, [f"{tmp_path}/none.md"], "none.md", "No such file"),
    ]:
        ends_with_one_line(lambda main=main, flags=flags: main(flags), *words)
    assert not trained and not (tmp_path / "runs").exists()


def test_what_a_training_left(tmp_path):
    lines = [{"step": x, "loss": 1, "tamd": x / 10, "lasd": 0.12345678} for x in (44, 50, 90, 100)]
    lines += [{"end_of_epoch": 1, "step": 110}, {"end_of_epoch": 2, "step": 220, "lambda_max": 7.5}]
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
    settings = {"student": str(tmp_path), "teacher": "a/b", "lr": 1}
    settings |= {"output": "x", "device": "cpu", "sharpness": True}
    cost = {"ms_per_step": 3.0, "peak_mb": 9}
    about = {"settings": settings, "teacher": "/x/y.npy", "cost": cost}
    (tmp_path / "talas.json").write_text(json.dumps(about))
    told = results.describe(tmp_path)
    assert told["settings"] == {"student": tmp_path.name, "teacher": "a/b", "lr": 1}
    assert told["teacher"] == "y.npy" and told["cost"] == {"ms_per_step": 3.0}
    assert told["history"] == {"step": [50, 100], "tamd": [5, 10], "lasd": [0.123457] * 2}
    assert told["lambda_max"] == {"2": 7.5}


def test_the_released_behaviour(bert, cache):
    """LASD from layer 0 on, by a loop; at ρ = 0, where w̃ = w, the two passes' losses differ."""
    s, student, gaps, lasd = talas.Settings(rho=0.0, lr=1e-9), load_encoder(str(bert)), [], []
    batch = Corpus(load_cache(str(cache)), student).batch(torch.arange(8))
    with torch.no_grad():
        hidden = student.model(**batch[0], output_hidden_states=True).hidden_states
    R = [E @ E.T for E in (torch.nn.functional.normalize(h[:, 0], dim=1) for h in hidden)]
    by_loop = [((a - b) ** 2).mean().item() for a, b in zip(R, R[1:])]
    for kind in (run.Released, talas.Objective):
        objective = kind(student, talas.new_projections(s, student, 8), s)
        lasd.append(objective.eval()(*batch[:2])[1]["lasd"].item())
        asam, _ = talas.make_optimizer(s, objective.train(), 10)
        steps = [talas.training_step(objective, asam, *batch, s) for _ in range(2)]
        gaps += [step["sharpness_gap"].item() for step in steps]
    assert lasd == pytest.approx([*map(statistics.fmean, (by_loop, by_loop[1:]))], rel=1e-3)
    assert gaps[0] != 0 != gaps[1] and gaps[2:] == [0, 0]


def test_the_released_code_gets_our_settings(pair_b, tmp_path, monkeypatch):
    pytest.importorskip("pandas")
    for name, text in OWN_CODE.items():
        (tmp_path / "own" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "own" / name).write_text(text)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(sys, "modules", dict(sys.modules))
    original, words = AutoTokenizer.from_pretrained, AutoTokenizer.from_pretrained("student-cls")
    run.main([*pair_b, "--rows", "released-code", "--released", "own", "--max_length", "32"])
    assert AutoTokenizer.from_pretrained == original
    told = json.loads(Path("told.json").read_text())
    wanted = {"seed": 42, "epochs": 2, "batch_size": 16, "max_length": 32, "learning_rate": 0.01}
    wanted |= {"rho": 0.05, "temperature": 0.1, "warmup_ratio": 0.06, "save_dir": None}
    wanted |= {"w_task": 0.001, "w_kd": 0.75, "w_struct": 1.0, "texts": SENTENCES}
    assert {name: told[name] for name in wanted} == wanted
    assert told["words"] == len(words) and told["length"] == pytest.approx(1)
    assert results.read_json("results.json")["B/released-code/42"]["cost"] == {"ms_per_step": 200.0}
    student = load_encoder("runs/B-released-code-42")
    assert (next(student.model.parameters()) == 1).all() and student.pooling == "cls"


def test_geometry_by_hand(bert, cache, tmp_path):
    content, student, kept = load_cache(str(cache)), load_encoder(str(bert)), tmp_path / "kept"
    W = [torch.randn(32, 8, generator=torch.Generator().manual_seed(i)) for i in (0, 1)]
    torch.save(W, shutil.copytree(bert, kept) / "projections.pt")
    flags = [str(bert), str(kept), "--teacher", str(cache), "--names", "a", "b"]
    geometry.main([*flags, "--results", str(tmp_path / "results.json")])
    found = results.read_json(tmp_path / "results.json")
    one, batch = found["geometry/b"]["layers"][1], Corpus(content, student).batch(torch.arange(48))
    hidden = student.model.eval()(**batch[0], output_hidden_states=True).hidden_states
    E = hidden[2][:, 0].detach()
    E, P, T = (torch.nn.functional.normalize(x.double()) for x in (E, E @ W[0], batch[1]))
    E, P, T = E.numpy(), P.numpy(), T.numpy()
    pairs, targets = (np.array([X[i] @ X[j] for i in range(48) for j in range(i)]) for X in (E, T))
    assert one["spread"] == pytest.approx(1 - pairs.mean(), abs=1e-5)
    assert one["spearman"] == pytest.approx(100 * spearmanr(pairs, targets)[0], abs=0.1)
    assert one["tamd"] == pytest.approx(1 - (P * T).sum(1).mean(), abs=1e-4)
    best = 1 - (T @ T.mean(0)).mean() / np.linalg.norm(T.mean(0))
    _, (a, b, best_one) = report.tables(found)["geometry"]
    assert (a[2], a[4], b[2], best_one[4]) == ("", "", f"{one['tamd']:.3g}", f"{best:.3g}")


def test_a_ratio_is_the_first_sides_time_to_the_seconds(monkeypatch):
    clock, order = [0.0], []
    monkeypatch.setattr(bench.time, "perf_counter", lambda: clock[0])

    def taking(seconds):
        def step(rows):
            order.append(seconds)
            clock[0] += seconds if rows >= bench.WARM_UP else 50

        return step

    batches = range(bench.WARM_UP + 3)
    assert bench.in_turn([taking(3), taking(2)], batches, CPU) == [[3000, 2000]] * 3
    assert order[:6] == [2, 3, 3, 2, 2, 3]
    sides = {key: f"{row['first']}/{row['second']}" for key, row in results.BENCH.items()}
    wanted = {"asam": "talas/adamw", "simcse": "adamw/simcse", "plain": "talas/plain"}
    wanted |= {"released": "released/talas", "bfloat16": "released/bfloat16", "memory": "/"}
    assert sides == wanted | {"caching": "library/encode", "table3": "online/"}


def test_each_side_does_what_its_name_says(bert, cache, monkeypatch, tmp_path):
    sizes, values, forward, step = [], [], BertModel.forward, talas.training_step

    @wraps(forward)
    def counted(self, input_ids, **how):
        sizes.append((len(input_ids), torch.is_autocast_enabled("cpu")))
        return forward(self, input_ids=input_ids, **how)

    monkeypatch.setattr(BertModel, "forward", counted)
    monkeypatch.setattr(talas, "training_step", lambda *args: values.append(step(*args)))
    terms, cse = {"simcse", "tamd", "lasd", "loss"}, {"distillation", "loss"}
    gap = terms | {"sharpness_gap"}
    for name, count, wanted in [  # sentences that go through the student in a step, and its losses
        ("talas", 128, gap), ("plain", 128, gap), ("bfloat16", 128, gap), ("adamw", 64, terms),
        ("simcse", 64, {"simcse", "loss"}), ("distill", 32, cse), ("stella", 32, cse),
        ("distillcse", 64, cse | {"simcse"}), ("dskd", 96, cse | {"simcse"}),
    ]:  # fmt: skip
        asked = SimpleNamespace(student=str(bert), teacher=str(bert))  # whose 32 sentences count
        one = bench.side(name, load_cache(str(cache)), asked, CPU)
        sizes.clear()
        one(torch.arange(32))
        assert (sum(n for n, _ in sizes), values[-1].keys()) == (count, wanted), name
        assert {half for _, half in sizes} == {name == "bfloat16"}
        assert ([n for n, _ in sizes] == [32] * 4) is (name == "plain")  # a pass a view, whole
    s, content, student = talas.Settings(), load_cache(str(cache)), load_encoder(str(bert))
    batch, W = (
        Corpus(content, student).batch(torch.arange(32)),
        talas.new_projections(s, student, 8),
    )
    one, other = talas.Objective(student, W, s).eval(), bench.Plain(student, W, s).eval()
    expected = one(*batch[:2])[0].item()
    assert other(SENTENCES[:32], batch[1])[0].item() == pytest.approx(expected, rel=1e-5)
    monkeypatch.setattr(bench, "WARM_UP", 0)
    flags = ["--cache", str(cache), "--student", str(bert), "--results", str(tmp_path / "r.json")]
    bench.main([*flags, "--turns", "1", "--device", "cpu", "--rows", "simcse", "memory"])
    ((key, found),) = results.read_json(tmp_path / "r.json").items()
    assert key == "bench/bert/cpu" and list(found["rows"]) == ["simcse", "memory"]
    assert found["rows"]["memory"]["ratio"] == pytest.approx(1.0, abs=0.1)  # one copy of w
    assert len(report.tables({key: found})["bench-bert-cpu"][1]) == 2
    bench.main(
        [*flags, "--turns", "1", "--device", "cpu", "--rows", "table3", "--teacher", str(bert)]
    )
    found = results.read_json(tmp_path / "r.json")[key]
    mb = sum(p.numel() for p in student.model.parameters()) / 2**18
    for name, side in found["table3"].items():
        teacher = mb / 2 if name in ("cdm", "dskd", "emo", "cached") else 0  # in bfloat16
        assert side["teacher"] == pytest.approx(teacher) and side["ms"] > 0
        if name != "cached":  # gradients, two moments and a copy for ASAM at least
            copies = 3 + (name == "talas")
            assert side["student"] == pytest.approx(mb) and side["rest"] > 0.9 * copies * mb
    assert list(found["table3"]) == list(results.TABLE3) and len(found["rows"]) == 2


# -------------------------------------------------------------------------------------- the tables
def entry(row, seed, stsb, avg):
    told = {"settings": {}, "history": {"step": [50, 100], "simcse": [0, 0], "tamd": [0.9, 0.5]}}
    told["scores"] = {"stsb": stsb, "avg_in": 10.0, "avg_out": None, "avg": avg}
    return results.Entry(told | {"pair": "B", "row": row, "seed": seed})


BEFORE = entry("before", 42, 10.0, 10.0)
T = [entry("T", 1, 1.0, 70.0), entry("T", 2, 2.0, 71.0), entry("T", 3, 4.0, 72.0)]
STL = [entry("STL", 1, 3.0, 70.5), entry("STL", 3, 3.0, 74.5)]


def test_the_tables_by_hand():
    # Avg: deviations of 70, 71, 72 are 1, 0, 1; of 70.5, 74.5 2 and 2, so 2.83. Chance: their
    # squares 2 + 8, of 2 + 1 degrees of freedom, for which t at 0.975 is 3.182.
    # STS-B: of 1, 2, 4 the mean is 7/3; the squares of -4/3, -1/3, 5/3 have the sum 42/9
    entries = dict(enumerate([BEFORE, *T, *STL, entry("STL-detach_guide", 1, 1.0, 1.0)]))
    entries[1] |= {"lambda_max": {"5": 1.0}}
    entries[4] |= {"lambda_max": {"10": 3.0, "5": 4.0}}
    found = report.tables({str(key): each for key, each in entries.items()})
    stsb, avg = (f"{3.18245 * (2 * squares / 3) ** 0.5:.2f}" for squares in (42 / 9, 2 + 8))
    assert found["main-B"] == (
        ["", "STS-B", "Avg-In", "Avg-Out", "Avg"],
        [
            ["before", "10.00", "10.00", "–", "10.00"],
            ["T", "2.33", "10.00 ± 0.00", "–", "71.00 ± 1.00"],
            ["STL", "3.00", "10.00 ± 0.00", "–", "72.50 ± 2.83"],
            ["chance", stsb, "0.00", "–", avg],
        ],
    )
    assert len(found["scores-B"][1]) == 5
    assert found["summary-B"][1][1] == ["TALAS without ASAM", "10.00 ± 0.00", "–", "72.50 ± 2.83"]
    # with seeds 1 and 3, which both rows have: 70.5 - 70 and 74.5 - 72; an untrained has one
    assert found["gains"][1] == [
        ["TAMD alone: T − before", "", "+61.00 ± 1.00"],
        ["SimCSE and LASD: STL − T", "+1.96, -0.27, +3.00", "+1.50 ± 1.41"],
        ["A fixed guide in LASD: STL-detach_guide − STL", "", "-69.50"],
    ]
    more = {"a": entry("STLA", 1, 1.0, 70.0), "b": entry("cdm", 1, 1.0, 62.5), "c": BEFORE}
    assert report.tables(more)["methods"][1][1] == [
        "TALAS over CDM: STLA − cdm", "+5.28, +4.65, +5.91", "+4.51, +4.78, +6.17", "+7.50",
    ]  # fmt: skip
    sides = {"talas": {"ms": 400.0}, "adamw": {"ms": 200.0}, "emo": {"ms": 1000.0, "rest": 7.0}}
    cost = report.tables({"bench/x/cpu": {"rows": {}, "table3": sides}})["cost-x-cpu"][1]
    assert cost[2] == ["EMO", "1000", "5.00", "6.27", "2.50", "3.26", "", "", "7"]  # 1223 / 195
    rows = [["T", "1.00", "–"], ["STL", "4.00", "3.00"]]
    assert found["sharpness-B"] == (["after epoch", "5", "10"], rows)


def test_a_file_is_filled_between_its_marks(tmp_path, ends_with_one_line):
    table = (["", "λ_max", "50 %"], [["STL − T", "+1.50 ± 1.41", r"\x{1}"], ["a & #1", "–", "^~$"]])
    assert report.latex(*table).splitlines()[1:-1] == [
        r"\toprule", r" & $\lambda$\_max & 50 \% \\", r"\midrule",
        r"STL $-$ T & +1.50 $\pm$ 1.41 & \textbackslash{}x\{1\} \\",
        r"a \& \#1 & -- & \textasciicircum{}\textasciitilde{}\$ \\", r"\bottomrule",
    ]  # fmt: skip
    file, text, latex = tmp_path / "r.json", tmp_path / "text.md", tmp_path / "t.tex"

    def fill(content, entries):
        text.write_text(content)
        file.write_text(json.dumps(entries))
        report.main([str(text), "--results", str(file), "--latex", str(latex)])

    good = {"B/before": BEFORE, "B/T/1": T[0]}
    fill("a\n<!-- table:main-B -->\nold\n<!-- end -->\nb\n<!-- table:gains --><!-- end -->c", good)
    filled = text.read_text()
    assert "| T | 1.00 | 10.00 | – | 70.00 |\n<!-- end -->\nb\n" in filled and "old" not in filled
    assert "% main-B\n\\begin{tabular}" in latex.read_text()
    fill(filled, good)
    assert text.read_text() == filled
    for content, entries, *words in [
        (
            "<!-- table:main-B -->\nold\n<!-- table:gains --><!-- end -->",
            good,
            "main-B",
            "left open",
        ),
        ("<!-- table:gains -->\nold", good, "gains", "left open", "text.md"),
        ("<!-- table:x --><!-- end -->", good, "table x", "main-B"),
        ("", {"B/T/1": {"pair": "B", "row": "T", "seed": 1}}, "'scores'"),
        ("", {"bench/x": {"rows": {"asam": {"label": "x", "ratio": 1.0}}}}, "'ms'"),
        ("", [], "no JSON object"),
    ]:
        ends_with_one_line(lambda content=content, entries=entries: fill(content, entries), *words)
    ends_with_one_line(lambda: report.main(["--results", "nowhere.json"]), "--results")


def test_the_texts_have_our_figures_and_commands():
    found = report.tables(results.read_json(results.HERE / "results.json"))
    for path in (README, ROOT / "README.md"):
        text = path.read_text("utf-8")
        assert report.fill(text, found, path) == text and "<!-- table:" in text
    lines = [line.strip() for line in README.read_text("utf-8").replace("\\\n", " ").splitlines()]
    f = next(line for line in lines if line.startswith("F=")).removeprefix("F=").strip('"')
    commands = [line for line in lines if line.startswith("python study/run.py ")]
    for line in commands:
        args = run.parse_args(shlex.split(line.replace("$F", f), comments=True)[2:])
        assert all(run.run(args, 42, args.pairs[0], row, check=True) for row in args.rows)
    assert len(commands) >= 5
