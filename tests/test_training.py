"""Algorithm 1 and whole runs: against plain PyTorch, setting by setting, interrupted, mistaken."""

import json
import math
import os
import resource
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
from dataclasses import asdict, fields, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import conftest
import pytest
import torch
from conftest import (
    ROOT,
    SENTENCES,
    SOURCES,
    before_each_step,
    in_a_process,
    in_two_processes,
    metrics,
    plain_perturbed,
    plain_total,
    put,
    small_bert,
)
from transformers import AutoModel, AutoTokenizer

import talas
from cache_teacher import fingerprint, load_cache
from demo import tiny
from study import baselines
from support import run as runs
from support.data import Corpus
from support.encoder import encode, tokenize
from support.loading import load_encoder
from talas import Settings

NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
EPOCHS = "--epochs 3 --batch_size 16 --lr 1e-3 --rho 0.5"  # three, of three steps


def run(*flags):
    """A run with these words for a command line; several may stand in one string."""
    talas.main(words(*flags))


def words(*flags):
    return [word for f in flags for word in (shlex.split(f) if isinstance(f, str) else [str(f)])]


def result(folder):
    """A saved student and its projections to the bit, and the losses on the way."""
    files = [Path(folder, name).read_bytes() for name in ("model.safetensors", "tokenizer.json")]
    W = [W_l.tolist() for W_l in torch.load(Path(folder, "projections.pt"), weights_only=True)]
    losses = [(line["step"], line.get("loss")) for lines in metrics(folder) for line in lines]
    return files, W, losses


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder: a student, a cache, a run of three epochs, the same run killed in the second."""
    folder = tmp_path_factory.mktemp("made")
    small_bert(folder / "bert")
    conftest.small_cache(folder / "teacher.pt")
    flags = ["--student", folder / "bert", "--teacher", folder / "teacher.pt", EPOCHS, "--output"]
    run(*flags, folder / "whole")
    assert in_a_process(lambda: (at_step(5, kill), run(*flags, folder / "cut"))) == -9
    return folder


@pytest.fixture
def copy(made, tmp_path, monkeypatch):
    """The flags of that run, but for the output, in a copy of that folder."""
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return words("--student bert --teacher teacher.pt", EPOCHS)


def at_step(number, do, rank=0):
    """From here on, something happens before that step of a run."""
    before_each_step(lambda n, _: n == number and runs.rank() == rank and do())


# --------------------------------------------------------- the paper once more, in plain PyTorch
def plain_loss(model, W, batch, teacher, s, domains=None):
    """Eq. 7 of two views, with [CLS] pooling, and its terms; with domains, for DISAM, Eq. 10."""
    twice = {name: torch.cat([t, t]) for name, t in batch.items()}
    states = model(**twice, output_hidden_states=True).hidden_states[1:]
    E = [h[:, 0].view(2, len(teacher), -1) for h in states]  # L of (2, N, d_S)
    loss, terms = plain_total(E, W, teacher, s)
    if domains is None:
        return loss, terms | {"loss": loss}
    own = [domains == d for d in set(domains.tolist())]
    L = torch.stack([plain_total([x[:, d] for x in E], W, teacher[d], s)[0] for d in own])
    alpha = torch.stack([d.double().mean() for d in own])
    return alpha @ L - s.disam_lambda * L.var(unbiased=False), terms | {"loss": loss}


def plain_step(model, W, w, batch, teacher, domains, s):
    """Eqs. 2, 8-12: the gradient for AdamW, which each of w gets, and the values of a step."""
    climbed, values = plain_loss(
        model, W, batch, teacher, s, domains if s.optimizer == "disam" else None
    )
    gradient = torch.autograd.grad(climbed, w)
    if s.optimizer != "adamw":
        eta, again = s.eta if s.optimizer == "asam" else None, (model, W, batch, teacher, s)
        gradient, L_tilde = plain_perturbed(w, gradient, lambda: plain_loss(*again)[0], s.rho, eta)
        values["sharpness_gap"] = L_tilde - values["loss"]
    for p, g in zip(w, gradient):
        p.grad = g
    return {name: value.item() for name, value in values.items()}


def plain_run(bert, cache, s, W):
    """A whole run from the projections W, in float64; returns the model, W and each step's values.

    AdamW with a linear warm-up and a cosine decay to 0.
    """
    model = AutoModel.from_pretrained(bert, dtype=torch.float64)
    tokenizer, data = AutoTokenizer.from_pretrained(bert), torch.load(cache)
    W = [W_l.double().requires_grad_() for W_l in W]
    own = [p for name, p in model.named_parameters() if "pooler" not in name]  # which is not used
    groups = [{"params": own}, {"params": W}]
    adamw = torch.optim.AdamW(groups, weight_decay=s.weight_decay)
    order = [rows for e in range(s.epochs) for rows in talas.batches(len(SENTENCES), s, e)]
    warm, values = round(s.warmup_ratio * len(order)), []
    for t, rows in enumerate(order):
        batch = tokenizer([SENTENCES[i] for i in rows], padding=True, return_tensors="pt")
        teacher = data["embeddings"][rows].double()
        domains = torch.tensor(["ab".index(SOURCES[i]) for i in rows])
        of_step = plain_step(model, W, own + W, batch, teacher, domains, s)
        past = (t - warm) / (len(order) - warm)
        lr = s.lr * (t / warm if t < warm else (1 + math.cos(math.pi * past)) / 2)
        adamw.param_groups[0]["lr"], adamw.param_groups[1]["lr"] = lr, lr * s.projection_lr_scale
        adamw.step()
        values.append(of_step | {"lr": lr})
    return model, W, values


MANY = "--lambda1 0.3 --lambda2 0.5 --lambda3 0.7 --temperature 0.2 --epochs 3 --batch_size 10 --lr"
MANY += " 1e-3 --weight_decay 0.2 --projection_lr_scale 3 --warmup_ratio 0.2 --rho 0.2 --optimizer "
RUNS = ["asam --eta 0.05", "sam --lasd_layers 2 --detach_guide"]
RUNS += ["disam --disam_lambda 2 --anchored_layers 1 --warmup_ratio 0.5"]
RUNS += ["adamw --lambda1 0.5 --temperature 0.3 --weight_decay 0 --projection_lr_scale 1"]


@pytest.mark.parametrize("settings", RUNS)
def test_algorithm1_a_whole_run_is_that_of_plain_pytorch(tmp_path, cache, monkeypatch, settings):
    """Without dropout; sentences of several lengths; what is drawn, order and W_l, is given."""
    bert, out = small_bert(tmp_path / "bert", **NO_DROPOUT), tmp_path / "student"
    flags = [MANY + settings, "--student", bert, "--teacher", cache]
    s = talas.parse_settings(words(*flags))
    drawn = [torch.randn(32, 8) * 1e-3 for _ in range(s.anchored_layers)]
    monkeypatch.setattr(talas, "new_projections", lambda *_: [W_l.clone() for W_l in drawn])
    run(*flags, "--output", out)
    model, W, values = plain_run(bert, cache, s, drawn)

    trained, start = AutoModel.from_pretrained(out), AutoModel.from_pretrained(bert)
    saved = torch.load(out / "projections.pt", weights_only=True)
    pairs = {f"W{i}": pair for i, pair in enumerate(zip(saved, W, drawn, strict=True))}
    ours, plain, before = (x.state_dict() for x in (trained, model, start))
    pairs |= {name: (ours[name], plain[name], before[name]) for name in before}
    for name, (ours, plain, before) in pairs.items():
        if "pooler" in name:  # not used: not even decayed
            assert torch.equal(ours, before)
        elif "key.bias" not in name:  # softmax does not see it: its gradient is rounding alone
            assert (ours - plain).norm() < 0.002 * (plain - before).norm(), name
    logged, first = metrics(out)[0], 0
    for line in logged:
        some, first = values[first : line["step"]], line["step"]
        expected = {name: statistics.fmean(step[name] for step in some) for name in some[0]}
        expected["lr"] = some[-1]["lr"]  # the last one's; else means
        assert {name: line[name] for name in expected} == pytest.approx(expected, 1e-3, 1e-5)
    lines = [(line["step"], line["epoch"]) for line in logged]  # each tenth, each epoch's last
    assert lines == [(4, 1), (8, 2), (10, 3), (12, 3)]


# ------------------------------------------------------------------- Algorithm 1: what is drawn
def test_algorithm1_both_passes_of_a_step_draw_the_same_dropout_and_each_W_is_small(copy):
    """Without a perturbation the passes are one and the same, without lr the W_l as they began."""
    run(*copy, "--rho 0 --lr 1e-12 --epochs 1 --output out")
    assert metrics("out")[0][0]["sharpness_gap"] == 0
    W = torch.stack(torch.load("out/projections.pt"))
    assert (W.std(), W.mean()) == (pytest.approx(1e-3, rel=0.1), pytest.approx(0, abs=2e-4))
    assert W.shape == (2, 32, 8) and (W[0] - W[1]).std() > 1e-3  # each its own


def test_algorithm1_an_epoch_has_an_order_of_its_own_and_leaves_out_what_is_incomplete():
    orders, taken, state = set(), set(), torch.get_rng_state()
    for seed in (41, 42, 43):  # (42, 1) is not (43, 0)
        for epoch in range(3):
            order = talas.batches(53, Settings(batch_size=8, seed=seed), epoch)
            assert [len(rows) for rows in order] == [8] * 6  # 53 = 6 * 8 + 5
            orders.add(str(order))
            taken.add(frozenset(torch.cat(order).tolist()))
            assert torch.equal(state, torch.get_rng_state())
    assert len(orders) == len(taken) == 9
    assert all(len(rows) == 48 and rows < set(range(53)) for rows in taken)


def test_algorithm1_seed_epoch_and_step_have_dropout_of_their_own_and_the_seed_w(copy, monkeypatch):
    dropout, W = set(), set()

    def look(n, objective):
        dropout.add(torch.get_rng_state().numpy().tobytes())
        W.update([objective.projections[0].sum().item()] if n in (1, 7) else [])

    before_each_step(look, monkeypatch)
    for seed in (42, 43):
        run(*copy, f"--epochs 2 --seed {seed} --output {seed}")
    assert len(dropout) == 12 and len(W) == 2


# --------------------------------------------------------- every setting reaches what it sets
def test_a_run_can_be_repeated_and_measuring_leaves_no_trace(copy, monkeypatch):
    small_bert("small", num_hidden_layers=1, hidden_size=16, intermediate_size=16)
    more = "--student small --lambda3 0 --anchored_layers 1 --epochs 2 --batch_size 8 --output"
    run(*copy, more, "1")
    torch.rand(7)  # nothing hangs on what was drawn before, or on what is done after an epoch
    train, seen = talas.train, []

    def watched(s, corpus, objective):
        train(s, corpus, objective, lambda epoch: (seen.append(epoch), objective.eval()))

    monkeypatch.setattr(talas, "train", watched)
    run(*copy, more, "2", "--seed 42 --sharpness")
    assert result("1") == result("2") and seen == [1, 2]
    assert ["lambda_max" in line for line in metrics("1")[1] + metrics("2")[1]] == [0, 0, 1, 1]


def test_the_paper_is_the_default_but_for_tiny(capsys):
    s = Settings()
    assert (s.lambda1, s.lambda2, s.lambda3, s.anchored_layers) == (0.001, 0.75, 1, 2)
    assert (s.lr, s.batch_size, s.epochs, s.optimizer) == (2e-5, 32, 5, "asam")
    assert (s.temperature, s.rho, s.eta, s.weight_decay) == (0.1, 0.05, 0, 0.01)
    assert (s.warmup_ratio, s.projection_lr_scale, s.precision) == (0.06, 5, "float32")
    assert (s.lasd_layers, s.detach_guide, s.pooling, s.max_length) == (0, False, "auto", 256)
    s = talas.parse_settings(["--epochs", "7"])
    assert (s.student, s.epochs, s.lr) == ("tiny", 7, tiny.SETTINGS["lr"])
    assert f"--lr {tiny.SETTINGS['lr']}" in capsys.readouterr().out
    assert talas.parse_settings(["--student", "somewhere"]) == Settings(student="somewhere")


# --------------------------------------------------------------------------- what a run leaves
def test_a_run_leaves_the_student_its_projections_and_its_record(copy):
    run(*copy, "--epochs 1 --pooling mean --max_length 12 --output out")
    out, student = Path("out"), load_encoder("out")
    assert (student.pooling, student.max_length) == ("mean", 12)
    configs = [json.loads(Path(x, "config.json").read_text()) for x in ("out", "bert")]
    assert configs[0] == configs[1]
    record, (step,), epochs = json.loads((out / "talas.json").read_text()), *metrics(out)
    assert record["settings"].keys() == set(Settings.__dataclass_fields__)
    assert [record["settings"][name] for name in ("lr", "pooling")] == [1e-3, "mean"]
    assert record["teacher"] == "random" and record["corpus"] == fingerprint(SENTENCES)
    assert record["versions"]["torch"] == torch.__version__
    terms = {"simcse", "tamd", "lasd", "loss", "sharpness_gap"}
    assert step.keys() == terms | {"step", "epoch", "lr", "ms_per_step", "memory_mb"}
    memory = {"mean_mb": step["memory_mb"], "peak_mb": step["memory_mb"], "std_mb": 0}
    assert record["cost"] == pytest.approx({"ms_per_step": step["ms_per_step"]} | memory)
    assert epochs == [{"end_of_epoch": 1, "step": 3}]
    assert (step["memory_mb"] > 50) == Path("/proc/self/statm").exists()
    left = {path.name for path in out.iterdir()} - {path.name for path in Path("bert").iterdir()}
    own = {"projections.pt", "talas.json", "metrics.jsonl", "modules.json", "1_Pooling"}
    own |= {"sentence_bert_config.json", "config_sentence_transformers.json", "README.md"}
    assert left == own and '"lr": 0.001' in (out / "README.md").read_text()  # a model card


WEIGHTS = {"sam": (0, 1, 0), "disam": (0, 0, 1), "adamw": (1, 0, 1)}


@pytest.mark.parametrize("optimizer, weights", WEIGHTS.items())
def test_table2_a_term_of_weight_0_is_left_out_of_the_run(copy, corpus, weights, optimizer):
    """Without TAMD there are no projections, and a corpus will do in place of a teacher."""
    given = [f"--lambda{i} {weight}" for i, weight in enumerate(weights, 1)]
    teacher = "teacher.pt" if weights[1] else corpus
    run(*copy, *given, "--output out --epochs 1 --optimizer", optimizer, "--teacher", teacher)
    (step,), _ = metrics("out")
    names = ["simcse", "tamd", "lasd", "sharpness_gap"]
    assert [name in step for name in names] == [*map(bool, weights), optimizer != "adamw"]
    assert len(torch.load("out/projections.pt")) == 2 * weights[1]
    record = json.loads(Path("out/talas.json").read_text())
    expected = ("random" if weights[1] else None, fingerprint(SENTENCES))
    assert (record["teacher"], record["corpus"]) == expected


def test_overwrite_leaves_nothing_that_changes_embeddings(copy, ends_with_one_line):
    out, flags = small_bert(Path("out"), num_hidden_layers=2), [*copy, "--output out"]
    names = ("special_tokens_map.json", "adapter_config.json", "mine.txt")
    put(out, dict.fromkeys(names, b'{"cls_token": "[SEP]"}'))
    put(out, {"1_Pooling/config.json": {"pooling_mode_mean_tokens": True}})
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    ends_with_one_line(lambda: run(*flags), "exists", "--overwrite")
    ends_with_one_line(lambda: run(*flags, "--overwrite --anchored_layers 9"), "3 layers")
    assert before == {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    run(*flags, "--overwrite")
    models = [load_encoder(folder) for folder in ("out", "whole")]
    assert torch.equal(*(encode(e, tokenize(e, SENTENCES), 16) for e in models))
    ids = [AutoTokenizer.from_pretrained(x)(SENTENCES)["input_ids"] for x in ("out", "whole")]
    assert ids[0] == ids[1]  # what transformers alone reads
    assert (out / "mine.txt").exists()  # which is no model's


# ------------------------------------------------------------------------------ Table 3: the cost
def test_table3_time_and_memory_by_hand(tmp_path):
    """Twenty lines: the median time without the first tenth; the mean, peak, spread of memory."""
    times = [900, 800, 4, 1, 2, 3, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18]
    sizes = [50, 10] + [10, 30] * 9
    lines = [{"step": 1, "ms_per_step": ms, "memory_mb": mb} for ms, mb in zip(times, sizes)]
    lines.insert(5, {"step": 1, "end_of_epoch": 1, "lambda_max": 0.5})
    put(tmp_path, {"metrics.jsonl": lines})
    deviation = math.sqrt((10 * 11**2 + 9 * 9**2 + 29**2) / 20)  # from a mean of 21
    expected = {"ms_per_step": 9.5, "mean_mb": 21, "peak_mb": 50, "std_mb": deviation}
    assert runs.cost(tmp_path) == pytest.approx(expected)


def test_table3_a_line_is_of_its_own_steps(tmp_path, monkeypatch, ends_with_one_line):
    """On a machine whose clock and memory are made up: 5 ms a step; 9 s, 7 GB between epochs."""
    now, peak, there = [100.0], [9000], torch.accelerator
    monkeypatch.setattr(runs.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(there, "max_memory_allocated", lambda device: peak[0] * 2**20)
    monkeypatch.setattr(there, "reset_peak_memory_stats", lambda device: peak.__setitem__(0, 0))
    model, part = torch.nn.Linear(1, 1), SimpleNamespace(state_dict=dict)
    model.model = SimpleNamespace(device=SimpleNamespace(type="cuda"))
    s, corpus = Settings(output=str(tmp_path), epochs=2), SimpleNamespace(identity=str)
    process = runs.Run(s, corpus, model, 15)

    def steps(*losses):
        for i, loss in enumerate(losses):
            now[0], peak[0] = now[0] + 0.005, max(peak[0], 20 + i)
            process.step({"loss": torch.tensor(loss)}, 0.1)

    for epoch in process.start_from(part, part):
        process.begin_epoch(epoch)
        steps(*[1.0] * 15)
        now[0], peak[0] = now[0] + 9, 7000
        process.end_epoch({})
    found = [[x["step"], x["ms_per_step"], x["memory_mb"]] for x in metrics(tmp_path)[0]]
    expected = [[10, 5, 29], [15, 5, 34], [20, 5, 24], [30, 5, 34]]
    torch.testing.assert_close(torch.tensor(found), torch.tensor(expected).float())
    ends_with_one_line(lambda: steps(*[1.0] * 6, math.inf, *[1.0] * 3), "step 37: loss is not")


# ------------------------------------------------------------------------------- interruptions
def kill_in_a_checkpoint():
    """The system ends the process when it writes a file longer than 100 kB."""
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))


def kill_in_the_last_save():
    """When the first of the student's files has taken its place."""
    move = os.replace
    in_place = lambda path: ".saving" not in str(path)  # noqa: E731
    os.replace = lambda a, b: (move(a, b), in_place(b) and not in_place(a) and kill())


def declare(student):
    """Sentence-transformers' files, which say what is true of this student without them."""
    for file in ("modules.json", "sentence_bert_config.json", "1_Pooling/config.json"):
        put(student, {file: Path("whole", file).read_bytes()})


kill, interrupt = (partial(signal.raise_signal, s) for s in (signal.SIGKILL, signal.SIGINT))
ENDS = [(5, kill, -9), (6, kill_in_a_checkpoint, -25), (9, kill_in_the_last_save, -9)]


@pytest.mark.parametrize("number, do, code", [*ENDS, (5, interrupt, 2)])
def test_a_resumed_run_ends_as_one_that_nothing_interrupted(copy, number, do, code):
    """The student may stand elsewhere when it is resumed."""
    flags = [*copy, "--output out"]
    assert in_a_process(lambda: (at_step(number, do), run(*flags))) == code
    assert Path("out/checkpoint.pt").exists() and not Path("out/talas.json").exists()
    os.rename("bert", "other")
    declare("other")
    run(*flags, "--resume --student ./other")
    assert result("out") == result("whole")
    names = [sorted(path.relative_to(o) for path in Path(o).rglob("*")) for o in ("out", "whole")]
    assert names[0] == names[1]


def another(key, change):
    """To write the cache with something else under that key."""

    def write(path):
        cache = torch.load(path)
        cache[key] = change(cache[key])
        torch.save(cache | {"fingerprint": fingerprint(cache["sentences"])}, path)

    return write


MEAN = {"pooling_mode_cls_token": False, "pooling_mode_mean_tokens": True}
CHANGES = [
    {"teacher.pt": another("embeddings", lambda E: E.flip(0))},
    {"teacher.pt": another("sources", lambda names: names[1:] + ["a"])},
    {"teacher.pt": another("sentences", lambda texts: texts[::-1])},
    {"bert/config.json": {"hidden_dropout_prob": 0.2}},
    {"bert/config.json": {"hidden_act": "relu"}},
    {"bert/sentence_bert_config.json": {"max_seq_length": 33}},
    {"bert/sentence_bert_config.json": {"do_lower_case": True}},
    {"bert/1_Pooling/config.json": MEAN},
    {"bert/tokenizer.json": lambda p: p.write_text(p.read_text().replace('"##k"', '"##K"'))},
]  # of which no sentence has the last


@pytest.mark.parametrize("change", CHANGES)
def test_a_run_with_another_student_or_corpus_is_not_resumed(copy, change, ends_with_one_line):
    declare("bert")
    put(".", change)
    ends_with_one_line(lambda: run(*copy, "--output cut --resume"), "--resume", "student or corpus")


def test_a_run_with_another_setting_is_not_resumed(copy, ends_with_one_line):
    s = talas.parse_settings(words(*copy, "--output cut --resume"))
    student, before = load_encoder("bert"), Path("cut/checkpoint.pt").read_bytes()
    corpus = Corpus(load_cache("teacher.pt"), student)
    objective = talas.Objective(student, talas.new_projections(s, student, 8), s)
    names = ["resume", "overwrite", "output", "device", "teacher", "student"]  # not their content
    for name, was in asdict(s).items():
        now = was + "x" if type(was) is str else was + 1
        other, line = replace(s, **{name: now}), f"--{name}: it was {was}, now it is {now}"
        if name not in names:
            ends_with_one_line(partial(talas.train, other, corpus, objective), line)
    assert Path("cut/checkpoint.pt").read_bytes() == before


def test_an_interrupted_run_is_no_model_and_is_not_lost_by_mistake(copy, ends_with_one_line):
    ends_with_one_line(lambda: run(*copy, "--output cut"), "interrupted run", "--resume")
    ends_with_one_line(lambda: load_encoder("cut"), "interrupted run", "--resume")
    content = bytearray(Path("cut/checkpoint.pt").read_bytes())
    content[len(content) // 2] ^= 1
    put("cut", {"checkpoint.pt": content})
    ends_with_one_line(lambda: run(*copy, "--output cut --resume"), "checkpoint.pt", "damaged")
    run(*copy, "--output cut --overwrite")  # from the beginning
    assert result("cut") == result("whole")
    torch.save({"model": 1}, "bert/checkpoint.pt")  # another program's, without our log
    assert load_encoder("bert").layers == 3


@pytest.mark.parametrize("damage", ['{"step": 3}\n{"st\n[[1]]\nnull\n3\n\0\n', None])
def test_a_run_does_not_depend_on_its_log(copy, damage):
    """metrics.jsonl written over or deleted before --resume."""
    put("cut", {"metrics.jsonl": damage})
    run(*copy, "--output cut --resume")
    assert result("cut")[:2] == result("whole")[:2]
    assert [line["step"] for line in metrics("cut")[0]][-2:] == [6, 9]
    assert math.isfinite(json.loads(Path("cut/talas.json").read_text())["cost"]["mean_mb"])


# ------------------------------------------------------------------------------- two processes
def test_two_processes_are_one_with_their_batches_together(copy):
    """Without dropout, and with Eq. 3 alone, which compares no sentences.

    Their weights agree to the bit; a random number drawn in a step is of each one's own.
    """
    small_bert("sure", **NO_DROPOUT)
    flags = [*copy, "--student sure --lambda1 0 --lambda3 0 --output"]

    def look(n, objective):
        total = sum(p.double().sum() for p in objective.parameters()).item()
        with open(f"seen{runs.rank()}", "a") as file:
            print(json.dumps([torch.rand(()).item(), total]), file=file)

    def train():
        before_each_step(look)
        run(*flags, "two --batch_size 9")  # five batches, of which each process takes two

    run(*flags, "one --batch_size 18")
    assert in_two_processes(train) == [0, 0]
    ranks = [[json.loads(line) for line in open(f"seen{rank}")] for rank in (0, 1)]
    assert [total for _, total in ranks[0]] == [total for _, total in ranks[1]]
    assert len({drawn for rank in ranks for drawn, _ in rank}) == 12
    for line, same in zip(metrics("two")[0], metrics("one")[0], strict=True):  # means over both
        found, expected = ([x[k] for k in ("step", "loss", "sharpness_gap")] for x in (line, same))
        assert found == pytest.approx(expected, rel=1e-3)


def test_two_processes_resume_as_two(copy, ends_with_one_line):
    flags = [*copy, "--epochs 2 --batch_size 8 --output"]
    assert in_two_processes(lambda: run(*flags, "both")) == [0, 0]
    assert in_two_processes(lambda: run(*flags, "both")) == [2, 2]  # it is there: a line of each
    codes = in_two_processes(lambda: (at_step(5, kill), run(*flags, "out")))
    assert codes[0] == -9 and codes[1]  # torchrun ends the other one, too
    ends_with_one_line(lambda: run(*flags, "out --resume"), "number of processes")
    assert in_two_processes(lambda: run(*flags, "out --resume")) == [0, 0]
    assert result("out") == result("both")


# ------------------------------------------------------------------------------------ mistakes
MISTAKES = {flags: flags for flags in ("--epochs 0", "--lr nan", "--rho -0.1", "--warmup_ratio 2")}
MISTAKES |= {
    "--batch_size 49": "--batch_size 49: the corpus has only 48",
    "--batch_size 1": "--batch_size 1: Eqs. 5 and 6",
    "--anchored_layers 4": "--anchored_layers 4: bert has 3 layers",
    "--lasd_layers 1": "--lasd_layers 1: Eq. 5 chains two",
    "--lasd_layers 4": "--lasd_layers 4: Eq. 5 chains two or more of bert's 3 layers",
    "--lambda1 0 --lambda2 0 --lambda3 0": "all 0",
    "--resume": "out has no checkpoint",
    "--lr 1e18": "step 2: simcse is not finite; try a lower --lr or --rho",
    "--rho 1e18": "step 1: sharpness_gap is not finite; try a lower --lr or --rho",
    "--lr 9e18 --weight_decay 9e18 --projection_lr_scale 1e9 --batch_size 48": "epoch 1",
}


@pytest.mark.parametrize("flags", MISTAKES)
def test_a_mistake_in_a_setting_is_one_line(copy, flags, ends_with_one_line):
    """And leaves nothing, or the last state whose weights are finite."""
    call = partial(run, *copy, "--warmup_ratio 0 --output out", flags)
    ends_with_one_line(call, MISTAKES[flags])
    left = [path.name for path in Path("out").glob("*")]
    assert sorted(left) in ([], ["checkpoint.pt", "metrics.jsonl"])
    for W in torch.load("out/checkpoint.pt")["states"]["weights"].values() if left else []:
        assert W.isfinite().all()


ABOVE_0 = "temperature anchored_layers lr projection_lr_scale epochs batch_size max_length "
ABOVE_0 += "projection_epochs student_temperature teacher_temperature"  # the baselines'


@pytest.mark.parametrize("s", [Settings(), baselines.Settings()], ids=["talas", "baselines"])
def test_which_settings_may_be_0(s, ends_with_one_line):
    numbers = [field.name for field in fields(s) if field.init and field.type in (int, float)]
    for name in numbers:
        above = name in ABOVE_0.split()
        for wrong in [0, -1, math.nan] if above else [-1, math.nan]:
            line = f"--{name} {wrong}: it must be {'above' if above else 'at least'} 0"
            ends_with_one_line(partial(runs.check_settings, replace(s, **{name: wrong})), line)
        if not above:
            runs.check_settings(replace(s, **{name: 0}))


def test_without_tamd_a_corpus_does_what_the_cache_does(copy):
    rows = [{"text": text} for text in load_cache("teacher.pt")["sentences"]]
    put(".", {"c.jsonl": rows})
    for teacher, output in (("teacher.pt", "a"), ("c.jsonl", "b")):
        run(*copy, "--lambda2 0 --epochs 1 --teacher", teacher, "--output", output)
        assert json.loads(Path(output, "talas.json").read_text())["teacher"] is None
    assert result("a") == result("b")


def test_a_student_without_dropout_is_told_of_where_simcse_needs_it(copy, capsys):
    small_bert("sure", **NO_DROPOUT)
    for flags, said in (("sure", True), ("sure --lambda1 0", False), ("bert", False)):
        run(*copy, "--epochs 1 --overwrite --output out --student", flags)
        assert ("no dropout" in capsys.readouterr().out) == said


# ------------------------------------------------------------------------------------ the demo
def test_tiny_and_its_training_are_the_same_in_every_process(copy):
    """Random weights, a vocabulary of the sentences' own: nothing hangs on an order of hashes."""
    flags = ["--teacher", "teacher.pt", "--batch_size", "16", "--output"]
    run(*flags, "here")
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONHASHSEED": "1"}
    command = [sys.executable, ROOT / "talas.py", *flags, "there"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and not done.stderr, done.stderr
    assert done.stdout.endswith("student saved to there\n")
    assert result("there") == result("here")
