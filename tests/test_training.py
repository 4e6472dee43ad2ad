"""Whole runs: against plain PyTorch, setting by setting, interrupted, in two processes."""

import errno
import json
import math
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import asdict, replace
from functools import partial
from itertools import product
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from helpers import (
    ROOT,
    SENTENCES,
    SOURCES,
    before_each_step,
    in_a_process,
    in_two_processes,
    metrics,
    saved_weights,
    small_bert,
    small_cache,
    write_files,
)
from huggingface_hub import ModelCard
from safetensors import SafetensorError
from torch.nn.utils import parameters_to_vector, vector_to_parameters
from transformers import AutoModel, AutoTokenizer, BertModel

import talas
from demo import tiny
from support import run as runs
from support.files import digest
from support.loading import load_encoder
from talas import Settings

NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
RUN = {  # three epochs of three steps
    "student": "bert",
    "teacher": "teacher.pt",
    "output": "out",
    "epochs": 3,
    "batch_size": 16,
    "lr": 1e-3,
    "rho": 0.5,
}


def command_line(**settings):
    """The flags of RUN, with these settings added or changed."""
    flags = []
    for name, value in (RUN | settings).items():
        flags += [f"--{name}", str(value)]
    return flags


def run(**settings):
    """The run of RUN, with these settings added or changed."""
    talas.main(command_line(**settings))


def result(folder):
    """What a run leaves, to the bit: the student, its projections, its log but for the cost."""
    student, projections = saved_weights(folder)
    steps, epochs = metrics(folder)
    for line in steps:
        del line["ms_per_step"], line["memory_mb"]
    return student, projections, steps, epochs


def interrupt_move(name, number, signal_number):
    """From here on, the signal comes before a file of that name moves to its place.

    The files of the first moves are left alone: it comes at the move of that number.
    """
    move_file = os.replace
    names = []

    def move(source, target):
        names.append(Path(target).name)
        if names.count(name) == number:
            signal.raise_signal(signal_number)
        move_file(source, target)

    os.replace = move


def run_killed_in_its_second_epoch(**settings):
    """The kill comes when the log has the epoch's lines, and its checkpoint is not yet there."""
    interrupt_move("checkpoint.pt", 2, signal.SIGKILL)
    run(**settings)


@pytest.fixture(scope="module")
def earlier_runs(tmp_path_factory, shared_bert):
    """A folder: bert, teacher.pt, a run that ended (whole), the same run killed (cut)."""
    folder = tmp_path_factory.mktemp("earlier")
    shutil.copytree(shared_bert, folder / "bert")
    small_cache(folder / "teacher.pt")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        run(output="whole")
        killed_run = partial(run_killed_in_its_second_epoch, output="cut")
        assert in_a_process(killed_run) == -signal.SIGKILL
    return folder


@pytest.fixture
def folder(earlier_runs, tmp_path, monkeypatch):
    """The current folder, a copy of earlier_runs."""
    shutil.copytree(earlier_runs, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


# ---------------------------------------------------------------- Algorithm 1, in plain PyTorch
def plain_layers(model, batch):
    """[CLS] after each layer, for two views: L of (2, N, d_S)."""
    views = {name: torch.cat([values, values]) for name, values in batch.items()}
    states = model(**views, output_hidden_states=True).hidden_states[1:]
    return [hidden[:, 0].unflatten(0, (2, -1)) for hidden in states]


def plain_disam(layers, W, teacher, domains, s):
    """What DISAM climbs: Eq. 10 of the losses in each domain."""
    losses = []
    counts = []
    for domain in domains.unique():
        rows = domains == domain
        domain_layers = [E[:, rows] for E in layers]
        domain_loss, _ = talas.total_loss(domain_layers, W, teacher[rows], s)
        losses.append(domain_loss)
        counts.append(rows.sum())
    return talas.disam_objective(torch.stack(losses), torch.stack(counts), s.disam_lambda)


def plain_step(model, W, parameters, batch, teacher, domains, s):
    """Leaves the gradients for AdamW in the parameters; returns what a step logs."""
    layers = plain_layers(model, batch)
    loss, values = talas.total_loss(layers, W, teacher, s)
    values["loss"] = loss
    if s.optimizer == "adamw":
        loss.backward()
        return values
    if s.optimizer == "disam":
        loss = plain_disam(layers, W, teacher, domains, s)
    gradient = parameters_to_vector(torch.autograd.grad(loss, parameters))
    w = parameters_to_vector(parameters).detach()
    T = w.abs() + s.eta if s.optimizer == "asam" else torch.ones_like(w)
    epsilon = s.rho * T**2 * gradient / (T * gradient).norm()  # Eq. 2
    vector_to_parameters(w + epsilon, parameters)
    perturbed_loss, _ = talas.total_loss(plain_layers(model, batch), W, teacher, s)
    perturbed_loss.backward()
    vector_to_parameters(w, parameters)
    values["sharpness_gap"] = perturbed_loss - values["loss"]
    return values


def plain_run(model, W, s):
    """Train the model and W in place, in float64; returns what each step logs.

    AdamW with a linear warm-up and a cosine decay to 0.
    """
    tokenizer = AutoTokenizer.from_pretrained("steady")
    embeddings = torch.load("teacher.pt")["embeddings"].double()
    student = [p for name, p in model.named_parameters() if "pooler" not in name]  # it is unused
    adamw = torch.optim.AdamW([{"params": student}, {"params": W}], weight_decay=s.weight_decay)
    order = []
    for epoch in range(s.epochs):
        order += talas.batches(len(SENTENCES), s, epoch)
    warm_up = round(s.warmup_ratio * len(order))
    steps = []
    for t, rows in enumerate(order):
        batch = tokenizer([SENTENCES[i] for i in rows], padding=True, return_tensors="pt")
        domains = torch.tensor([SOURCES[i] == "b" for i in rows])
        adamw.zero_grad()
        values = plain_step(model, W, student + W, batch, embeddings[rows], domains, s)
        if t < warm_up:
            lr = s.lr * t / warm_up
        else:
            lr = s.lr * (1 + math.cos(math.pi * (t - warm_up) / (len(order) - warm_up))) / 2
        adamw.param_groups[0]["lr"] = lr
        adamw.param_groups[1]["lr"] = lr * s.projection_lr_scale
        adamw.step()
        steps.append({name: value.item() for name, value in values.items()} | {"lr": lr})
    return steps


ALL_TERMS = {  # three epochs of four steps
    "student": "steady",
    "lambda1": 0.3,
    "lambda2": 0.5,
    "lambda3": 0.7,
    "temperature": 0.2,
    "batch_size": 10,
    "rho": 0.2,
    "weight_decay": 0.2,
    "projection_lr_scale": 3,
    "warmup_ratio": 0.2,  # of 12 steps: 2.4
}
METHODS = [
    {"optimizer": "asam", "eta": 0.05},
    {"optimizer": "sam", "lasd_layers": 2, "detach_guide": True, "warmup_ratio": 0.3},  # 3.6
    {"optimizer": "disam", "disam_lambda": 2, "anchored_layers": 1},
    {"optimizer": "adamw", "temperature": 0.3, "weight_decay": 0, "projection_lr_scale": 1},
]


def assert_close(weights, expected, before):
    """The same weights, but for a few thousandths of the way that they went."""
    assert (weights - expected).norm() < 0.002 * (expected - before).norm()


@pytest.mark.parametrize("method", METHODS, ids=[method["optimizer"] for method in METHODS])
def test_algorithm1_a_whole_run_is_that_of_plain_pytorch(here, monkeypatch, method):
    """Without dropout; sentences of several lengths; what is drawn, order and W_l, is given."""
    small_bert("steady", **NO_DROPOUT)
    settings = ALL_TERMS | method
    s = talas.parse_settings(command_line(**settings))
    start_W = [0.001 * torch.randn(32, 8) for _ in range(s.anchored_layers)]
    new_projections = Mock(return_value=[W.clone() for W in start_W])
    monkeypatch.setattr(talas, "new_projections", new_projections)
    monkeypatch.setattr(runs, "LOG_EVERY", 1)
    run(**settings)

    plain = AutoModel.from_pretrained("steady", dtype=torch.float64)
    plain_W = [W.double().requires_grad_() for W in start_W]
    steps = plain_run(plain, plain_W, s)

    for W, expected, before in zip(torch.load("out/projections.pt"), plain_W, start_W, strict=True):
        assert_close(W, expected, before)
    trained = AutoModel.from_pretrained("out")
    start = AutoModel.from_pretrained("steady")
    for name, expected in plain.named_parameters():
        weights = trained.get_parameter(name)
        before = start.get_parameter(name)
        if "pooler" in name:  # it is unused: not even decayed
            assert torch.equal(weights, before)
        elif "key.bias" not in name:  # the softmax does not see it: its gradient is rounding
            assert_close(weights, expected, before)
    lines, _ = metrics("out")
    for line, step in zip(lines, steps, strict=True):
        assert {name: line[name] for name in step} == pytest.approx(step, rel=1e-3, abs=1e-5)


# -------------------------------------------------------------------- Algorithm 1: what is drawn
def test_algorithm1_both_passes_of_a_step_draw_the_same_dropout(here):
    run(rho=0, epochs=1)
    [line], _ = metrics("out")
    assert line["sharpness_gap"] == 0  # without a perturbation the passes are the same


def test_new_projections_are_small_and_differ():
    corpus = Mock(encoder=tiny.tiny_student(SENTENCES, seed=0), embeddings=torch.ones(48, 80))
    W, other_W = talas.new_projections(Settings(), corpus)
    assert W.std() == pytest.approx(1e-3, rel=0.05)
    assert (W - other_W).std() > 1e-3


def test_algorithm1_each_epoch_of_each_seed_has_its_own_order():
    orders = []
    for seed, epoch in product((41, 42), (0, 1)):
        batches = talas.batches(53, Settings(batch_size=8, seed=seed), epoch)
        assert [len(rows) for rows in batches] == [8] * 6  # 53 = 6 * 8 + 5
        orders.append(torch.cat(batches).tolist())
    for order in orders:
        assert len(set(order)) == 48
        assert orders.count(order) == 1
    assert set(orders[0]) != set(orders[1])  # another five are dropped


def test_algorithm1_each_step_has_its_own_dropout_and_each_seed_its_own_W(here, monkeypatch):
    random_states = set()
    first_projections = set()

    def look(n, objective):
        assert objective.model.training  # dropout is on
        random_states.add(torch.get_rng_state().numpy().tobytes())
        if n in (1, 7):
            first_projections.add(objective.projections[0].sum().item())

    before_each_step(look, monkeypatch)
    run(output="a", epochs=2, seed=42)
    run(output="b", epochs=2, seed=43)
    assert len(random_states) == 12
    assert len(first_projections) == 2


def test_a_run_can_be_repeated_and_looking_at_it_changes_nothing(here):
    small_bert("small", num_hidden_layers=1, hidden_size=16, intermediate_size=16)
    settings = {"student": "small", "lambda3": 0, "anchored_layers": 1, "epochs": 2}
    run(output="plain", **settings)
    torch.rand(7)  # nothing depends on what was drawn before
    run(output="watched", sharpness=True, **settings)
    student, projections, steps, epochs = result("watched")
    assert result("plain")[:3] == (student, projections, steps)
    assert [line["lambda_max"] > 0 for line in epochs] == [True, True]


# ----------------------------------------------------------- every setting reaches what it sets
def test_the_defaults_are_the_papers_and_those_of_the_readme():
    assert asdict(Settings()) == {
        "teacher": "teacher.pt",
        "student": "tiny",
        "output": "student",
        "overwrite": False,
        "resume": False,
        "pooling": "auto",
        "max_length": 256,
        "lambda1": 0.001,
        "lambda2": 0.75,
        "lambda3": 1.0,
        "temperature": 0.1,
        "anchored_layers": 2,
        "lasd_layers": 0,
        "detach_guide": False,
        "optimizer": "asam",
        "rho": 0.05,
        "eta": 0.0,
        "disam_lambda": 0.1,
        "lr": 2e-5,
        "projection_lr_scale": 5.0,
        "weight_decay": 0.01,
        "warmup_ratio": 0.06,
        "epochs": 5,
        "batch_size": 32,
        "seed": 42,
        "device": "auto",
        "precision": "float32",
        "sharpness": False,
    }


def test_tiny_has_its_own_settings_unless_they_are_set():
    assert talas.parse_settings(["--epochs", "7"]) == Settings(lr=5e-3, epochs=7)
    assert talas.parse_settings(["--student", "bert"]) == Settings(student="bert")


def test_the_student_is_loaded_as_its_settings_say():
    s = Settings(pooling="mean", max_length=12, device="meta")
    encoder = talas.load_student(s, SENTENCES)
    assert encoder.pooling == "mean"
    assert encoder.max_length == 12
    assert encoder.model.device.type == "meta"
    corpus = Mock(encoder=encoder, embeddings=torch.ones(48, 8))
    assert talas.new_projections(s, corpus)[0].device.type == "meta"


def test_the_seed_gives_tiny_its_weights():
    first, other = [talas.load_student(Settings(seed=seed), SENTENCES) for seed in (1, 2)]
    assert first.model.pooler.dense.weight[0, 0] != other.model.pooler.dense.weight[0, 0]


def test_bfloat16_rounds_the_losses_of_a_run(here):
    run(output="exact", epochs=1)
    run(output="rounded", epochs=1, precision="bfloat16")
    [exact], _ = metrics("exact")
    [rounded], _ = metrics("rounded")
    assert rounded["loss"] != exact["loss"]
    assert rounded["loss"] == pytest.approx(exact["loss"], rel=0.05)


@pytest.mark.parametrize(
    "optimizer, weight, expected",
    [
        ("sam", "lambda2", {"tamd", "sharpness_gap"}),
        ("disam", "lambda3", {"lasd", "sharpness_gap"}),
        ("adamw", "lambda1", {"simcse"}),
    ],
)
def test_table2_a_term_of_weight_0_is_not_computed(here, optimizer, weight, expected):
    weights = {"lambda1": 0, "lambda2": 0, "lambda3": 0, weight: 1}
    run(epochs=1, optimizer=optimizer, **weights)
    [line], _ = metrics("out")
    assert line.keys() - {"step", "epoch", "loss", "lr", "ms_per_step", "memory_mb"} == expected


# ------------------------------------------------------------------------------ what a run leaves
def test_a_run_leaves_the_student_and_its_record(here):
    settings = {"epochs": 1, "pooling": "mean", "max_length": 12}
    run(**settings)
    student = load_encoder("out")
    assert student.pooling == "mean"
    assert student.max_length == 12
    record = json.loads(Path("out/talas.json").read_text())
    assert record["settings"] == asdict(talas.parse_settings(command_line(**settings)))
    assert record["teacher"] == "random"
    assert record["corpus"] == digest(SENTENCES)
    assert record["versions"]["torch"] == torch.__version__
    assert metrics("out")[1] == [{"end_of_epoch": 1, "step": 3}]
    names = {path.name for path in Path("out").iterdir()}
    assert not names & {"checkpoint.pt", ".saving"}


def test_without_tamd_a_corpus_is_enough(here):
    run(epochs=1, lambda2=0, teacher="corpus.jsonl")
    assert torch.load("out/projections.pt") == []
    record = json.loads(Path("out/talas.json").read_text())
    assert record["teacher"] == "none"
    assert record["corpus"] == digest(SENTENCES)


def test_the_card_names_base_model_method_task_and_example(tmp_path):
    path = tmp_path / "README.md"
    s = Settings(student="google-bert/bert-base-uncased", output="runs/my-student")
    runs.write_card(path, s, "BAAI/bge-m3")
    card = ModelCard.load(path)
    assert card.data.base_model == "google-bert/bert-base-uncased"
    assert card.data.pipeline_tag == "sentence-similarity"
    assert card.data.library_name == "sentence-transformers"
    for words in ("`BAAI/bge-m3`", "Method: TALAS", '("my-student")'):
        assert words in card.text


# ------------------------------------------------------------------------------ Table 3: the cost
@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
def test_table3_memory_is_in_megabytes():
    status = Path("/proc/self/status").read_text()
    kilobytes = int(status.split("RssAnon:")[1].split()[0])
    assert runs.memory_mb(torch.device("cpu")) == pytest.approx(kilobytes / 1024, rel=0.05)


def test_table3_a_line_covers_its_own_steps(tmp_path, monkeypatch):
    """Two epochs of 15 steps of 5 ms; between them 9 s, which are of no step."""
    clock = Mock(return_value=100.0)
    monkeypatch.setattr(runs.time, "perf_counter", clock)
    log = runs.Log(Settings(output=str(tmp_path), epochs=2), 15, 0, torch.device("cpu"))
    for epoch in range(2):
        clock.return_value += 9
        log.begin_epoch()
        for step in range(15):
            clock.return_value += 0.005
            log.step({"loss": torch.tensor(float(step))}, lr=epoch)
    expected = [  # each tenth step, an epoch's last; means over the steps since the line before
        {"step": 10, "epoch": 1, "loss": 4.5, "lr": 0},
        {"step": 15, "epoch": 1, "loss": 12, "lr": 0},
        {"step": 20, "epoch": 2, "loss": 2, "lr": 1},
        {"step": 30, "epoch": 2, "loss": 9.5, "lr": 1},
    ]
    lines, _ = metrics(tmp_path)
    for line, values in zip(lines, expected, strict=True):
        assert line.pop("memory_mb") > 0
        assert line.pop("ms_per_step") == pytest.approx(5)
        assert line == values


# ---------------------------------------------------------------------------------- interruptions
def test_a_killed_run_resumes_to_the_same_bits(folder):
    run(output="cut", resume=True)
    assert result("cut") == result("whole")


@pytest.mark.parametrize(
    "file, signal_number, exit_code",
    [
        pytest.param("checkpoint.pt", signal.SIGINT, 2, id="Ctrl-C in the first checkpoint"),
        pytest.param("model.safetensors", signal.SIGKILL, -signal.SIGKILL, id="in the last save"),
    ],
)
def test_an_interrupted_overwrite_ends_as_a_new_run_and_leaves_the_users_files(
    file, signal_number, exit_code, folder
):
    earlier_run = {"talas.json": {}, "metrics.jsonl": "", "checkpoint.pt": ""}
    users_files = {"README.md": "My own.", "notes.txt": "My notes."}
    write_files("out", earlier_run | users_files)

    def interrupted_run():
        interrupt_move(file, 1, signal_number)
        run(overwrite=True)

    assert in_a_process(interrupted_run) == exit_code
    run(resume=True)
    assert result("out") == result("whole")
    assert set(os.listdir("out")) == {*os.listdir("whole"), "notes.txt"}
    assert Path("out/README.md").read_text() == "My own."


def test_the_earlier_student_is_not_scored_while_it_is_overwritten(folder, ends_with_one_line):
    def killed_overwrite():
        interrupt_move("checkpoint.pt", 1, signal.SIGKILL)
        run(output="whole", overwrite=True)

    assert in_a_process(killed_overwrite) == -signal.SIGKILL
    assert Path("whole/model.safetensors").exists()  # the earlier run's
    ends_with_one_line(partial(load_encoder, "whole"), "whole holds an interrupted run")


@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, "disk full"), SafetensorError("disk full")]
)
def test_a_disk_that_is_full_at_the_end_costs_nothing(error, folder, ends_with_one_line):
    with pytest.MonkeyPatch.context() as patch:
        save = Mock(side_effect=[None, error])  # the dry run's goes well
        patch.setattr(BertModel, "save_pretrained", save)
        ends_with_one_line(run, "cannot save the student in out", "disk full")
    run(resume=True)
    assert result("out") == result("whole")


@pytest.mark.parametrize(
    "config, cache",
    [
        pytest.param({"hidden_dropout_prob": 0.2}, {}, id="the student"),
        pytest.param({}, {"sources": ["b"] * 48}, id="the domains"),
        pytest.param({}, {"embeddings": torch.ones(48, 8)}, id="the targets"),
        pytest.param(
            {},
            {"sentences": SENTENCES[::-1], "fingerprint": digest(SENTENCES[::-1])},
            id="the sentences",
        ),
    ],
)
def test_a_run_is_not_resumed_with_another(config, cache, folder, ends_with_one_line):
    write_files("bert", {"config.json": config})
    torch.save(torch.load("teacher.pt") | cache, "teacher.pt")
    ends_with_one_line(partial(run, output="cut", resume=True), "another student or corpus")


def test_a_run_is_not_resumed_with_another_setting(folder, ends_with_one_line):
    s = talas.parse_settings(command_line(output="cut", resume=True))
    for name, value in asdict(s).items():
        if name in ("resume", "overwrite", "output", "device", "teacher", "student"):
            continue
        other = replace(s, **{name: "other"})
        checkpoint = runs.Checkpoint(other, Mock(), None, None, None)
        line = f"--{name}: it was {value}, now it is other"
        ends_with_one_line(checkpoint.start_or_resume, line)


def test_a_run_that_diverges_is_one_line_and_leaves_no_checkpoint(here, ends_with_one_line):
    diverging_run = partial(run, lr=1e18, warmup_ratio=0)
    ends_with_one_line(diverging_run, "the loss is not finite", "try a lower --lr")
    assert [path.name for path in Path("out").iterdir()] == ["metrics.jsonl"]


# ---------------------------------------------------------------------------------- two processes
def test_two_processes_are_one_with_their_batches_together(here):
    """Without dropout, and with Eq. 3 alone, which compares no sentences."""
    small_bert("steady", **NO_DROPOUT)
    settings = {"student": "steady", "lambda1": 0, "lambda3": 0}

    def note_a_random_number(n, objective):
        with open("drawn.txt", "a") as file:
            print(torch.rand(()).item(), file=file)

    def one_of_two():
        before_each_step(note_a_random_number)
        run(output="two", batch_size=9, **settings)  # five batches, of which each takes two

    run(output="one", batch_size=18, **settings)
    assert in_two_processes(one_of_two) == [0, 0]
    assert len(set(Path("drawn.txt").read_text().split())) == 2 * 6  # of each process and step
    for two, one in zip(metrics("two")[0], metrics("one")[0], strict=True):
        for name in ("step", "loss", "sharpness_gap"):
            assert two[name] == pytest.approx(one[name], rel=1e-3)


def test_two_processes_resume_as_two(here, ends_with_one_line):
    """Each has one step an epoch."""
    settings = {"batch_size": 24}
    resumed_run = partial(run, resume=True, **settings)
    assert in_two_processes(partial(run, output="whole", **settings)) == [0, 0]
    killed_run = partial(run_killed_in_its_second_epoch, **settings)
    assert in_two_processes(killed_run)[0] == -signal.SIGKILL
    ends_with_one_line(resumed_run, "number of processes")
    assert in_two_processes(resumed_run) == [0, 0]
    assert result("out") == result("whole")


# --------------------------------------------------------------------------------------- the demo
def test_the_demos_training_is_the_same_in_every_process(cache, tmp_path, monkeypatch):
    """The command of the README. Nothing depends on the order of hashes."""
    monkeypatch.chdir(tmp_path)
    talas.main([])
    os.rename("student", "first")
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONHASHSEED": "1"}
    command = [sys.executable, ROOT / "talas.py"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and not done.stderr, done.stderr
    assert done.stdout.endswith("student saved to student\n")
    assert result("student") == result("first")
