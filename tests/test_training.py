"""Algorithm 1 and whole runs: against plain PyTorch, setting by setting, interrupted, mistaken."""

from support import run as runs
from support.files import alone
from support.loading import load_encoder

import json
import math
import os
import random
import shlex
import signal
import subprocess
import sys
import time
from contextlib import nullcontext
from copy import deepcopy
from dataclasses import replace
from functools import cache as once
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import scipy.sparse.linalg
import torch
from conftest import (
    ROOT,
    SENTENCES,
    SOURCES,
    in_a_process,
    in_two_processes,
    small_bert,
    small_cache,
)
from transformers import AutoModel, AutoTokenizer

import cache_teacher
import eval as evaluation
import talas
from cache_teacher import fingerprint
from demo import tiny
from talas import ASAM, METRICS, Settings

NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


def words(*flags):
    """The words of a command line; several flags may stand in one string."""
    parted = [shlex.split(f) if isinstance(f, str) else [str(f)] for f in flags]
    return [word for words in parted for word in words]


def run(*flags):
    talas.main(words(*flags))


def weights(folder):
    """The bits of a saved student and of its projections."""
    projections = torch.load(folder / "projections.pt", weights_only=True)
    return (folder / "model.safetensors").read_bytes(), [W.tolist() for W in projections]


def metrics(folder):
    """The lines of metrics.jsonl: those of steps, those of epochs."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    of_epochs = ["end_of_epoch" in line for line in lines]
    return [[line for line, e in zip(lines, of_epochs) if e == which] for which in (False, True)]


# --------------------------------------------------------- the paper once more, in plain PyTorch
def plain_losses(model, W, batch, teacher, s):
    """Eqs. 3-7, [CLS] pooling: each sentence's loss, (N,), and the means of the three terms."""
    N = len(teacher)
    twice = {name: torch.cat([t, t]) for name, t in batch.items()}  # two dropout views
    states = model(**twice, output_hidden_states=True).hidden_states[1:]
    E = [h[:, 0] / h[:, 0].norm(dim=1, keepdim=True) for h in states]  # L of (2 N, d_S)
    likeness = torch.exp(E[-1][:N] @ E[-1][N:].T / s.temperature)
    simcse = -torch.log(likeness.diag() / likeness.sum(1))
    tamd = torch.zeros(N)
    for W_l, E_l in zip(W, E[-len(W) :]):
        projected = E_l[:N] @ W_l
        dot = (projected * teacher).sum(1)
        tamd = tamd + (1 - dot / projected.norm(dim=1) / teacher.norm(dim=1)) / len(W)
    R = [E_l[:N] @ E_l[:N].T for E_l in E[-s.lasd_layers :]]  # 0: all
    guides = [r.detach() if s.detach_guide else r for r in R]
    lasd = sum(((R_up - R_l) ** 2).sum() / N**2 for R_up, R_l in zip(guides[1:], R)) / (len(R) - 1)
    losses = s.lambda1 * simcse + s.lambda2 * tamd + s.lambda3 * lasd
    return losses, torch.stack([simcse.mean(), tamd.mean(), lasd])


def plain_gradient(w, loss, domains, s):
    """Eqs. 2, 8-12: the gradient for the base optimizer, and the values that METRICS names."""
    losses, terms = loss()
    L = losses.mean()
    climbed = L
    if s.optimizer == "disam":
        of_domains = [losses[domains == d].mean() for d in (0, 1)]
        climbed = L - s.disam_lambda * torch.stack(of_domains).var(unbiased=False)
    gradient = torch.autograd.grad(climbed, w)
    if s.optimizer == "adamw":
        return gradient, torch.stack([*terms, L, L - L]).detach()
    saved = [p.detach().clone() for p in w]
    T = [p.abs() + s.eta if s.optimizer == "asam" else torch.ones_like(p) for p in saved]
    norm = torch.sqrt(sum(((t * g) ** 2).sum() for t, g in zip(T, gradient)))
    for p, t, g in zip(w, T, gradient):
        p.data += s.rho * t**2 * g / norm
    L_tilde = loss()[0].mean()
    gradient = torch.autograd.grad(L_tilde, w)
    for p, before in zip(w, saved):
        p.data = before
    return gradient, torch.stack([*terms, L, L_tilde - L]).detach()


def plain_run(bert, cache, s, W):
    """A whole run from the projections W, in float64; returns the model, W and each step's values.

    AdamW (Loshchilov and Hutter, Algorithm 2) with a linear warm-up and a cosine decay to 0.
    """
    model = AutoModel.from_pretrained(bert, dtype=torch.float64)
    tokenizer, data = AutoTokenizer.from_pretrained(bert), torch.load(cache)
    W = [W_l.double().requires_grad_() for W_l in W]
    w = [p for name, p in model.named_parameters() if "pooler" not in name] + W
    scales = [1.0] * (len(w) - len(W)) + [s.projection_lr_scale] * len(W)
    m, v = [torch.zeros_like(p) for p in w], [torch.zeros_like(p) for p in w]
    total = s.epochs * (len(SENTENCES) // s.batch_size)
    warm, t, values = round(s.warmup_ratio * total), 0, []
    for epoch in range(s.epochs):
        for rows in talas.batches(len(SENTENCES), s, epoch):
            batch = tokenizer([SENTENCES[i] for i in rows], padding=True, return_tensors="pt")
            teacher = data["embeddings"][rows].double()
            domains = torch.tensor(["ab".index(SOURCES[i]) for i in rows])
            loss = partial(plain_losses, model, W, batch, teacher, s)
            gradient, step_values = plain_gradient(w, loss, domains, s)
            values.append(step_values)
            past = (t - warm) / (total - warm)
            lr = s.lr * (t / warm if t < warm else (1 + math.cos(math.pi * past)) / 2)
            t += 1
            for i, g in enumerate(gradient):
                m[i] = 0.9 * m[i] + 0.1 * g
                v[i] = 0.999 * v[i] + 0.001 * g**2
                step = m[i] / (1 - 0.9**t) / (torch.sqrt(v[i] / (1 - 0.999**t)) + 1e-8)
                w[i].data -= lr * scales[i] * (step + s.weight_decay * w[i].data)
    return model, W, torch.stack(values)


@pytest.mark.parametrize("optimizer", ["asam", "sam", "disam", "adamw"])
def test_algorithm1_one_step_is_that_of_plain_pytorch(bert, optimizer):
    """With dropout, of which both passes draw the same masks; gradient descent inside, lr 0.1."""
    torch.manual_seed(0)
    s = Settings(optimizer=optimizer, lambda1=0.3, temperature=0.2, eta=0.1, disam_lambda=5.0)
    student = load_encoder(str(bert), "cls", dtype=torch.float64)
    model, equal = student.model.train(), SENTENCES[0:20:5]  # of one length: no order of rows
    batch = student.tokenizer(equal, return_tensors="pt")
    batch = {name: batch[name] for name in ("input_ids", "attention_mask")}
    W = [torch.randn(32, 6).double().requires_grad_() for _ in range(2)]
    teacher, domains = torch.randn(4, 6).double(), torch.tensor([0, 1, 1, 1])

    twin, W_twin = deepcopy(model), deepcopy(W)
    w = [p for name, p in twin.named_parameters() if "pooler" not in name] + W_twin

    def loss():
        torch.manual_seed(1)
        return plain_losses(twin, W_twin, batch, teacher, s)

    gradient, expected = plain_gradient(w, loss, domains, s)
    for p, g in zip(w, gradient):
        p.data -= 0.1 * g

    objective = talas.Objective(student, [torch.nn.Parameter(W_l) for W_l in W], s)
    asam = ASAM(torch.optim.SGD(objective.parameters(), 0.1), s.rho, s.eta, optimizer == "asam")
    torch.manual_seed(1)
    values = talas.training_step(objective, asam, batch, teacher, domains, s)
    assert METRICS == ["simcse", "tamd", "lasd", "loss", "sharpness_gap"]
    torch.testing.assert_close(values, expected)
    assert values[-1] == 0 if optimizer == "adamw" else values[-1] > 1e-4  # uphill
    torch.testing.assert_close(model.state_dict(), twin.state_dict())
    torch.testing.assert_close([p.data for p in objective.projections], [p.data for p in W_twin])


@pytest.mark.parametrize(
    "optimizer, settings",
    [
        ("asam", "--rho 0.2 --eta 0.05"),
        ("sam", "--rho 0.2 --lasd_layers 2 --detach_guide"),
        ("disam", "--rho 0.2 --disam_lambda 2 --anchored_layers 1 --warmup_ratio 0.5"),
        ("adamw", "--lambda1 0.5 --temperature 0.3 --weight_decay 0 --projection_lr_scale 1"),
    ],
)
def test_algorithm1_a_whole_run_is_that_of_plain_pytorch(
    tmp_path, cache, monkeypatch, optimizer, settings
):
    """Without dropout; sentences of several lengths; what is drawn, order and W_l, is given."""
    bert, out = small_bert(tmp_path / "bert", **NO_DROPOUT), tmp_path / "student"
    flags = "--lambda1 0.3 --lambda2 0.5 --lambda3 0.7 --temperature 0.2 --epochs 3 --batch_size 10"
    flags = f"{flags} --lr 1e-3 --weight_decay 0.2 --projection_lr_scale 3 --warmup_ratio 0.2"
    flags = [flags, f"--optimizer {optimizer}", settings, "--student", bert, "--teacher", cache]
    flags += ["--output", out]
    drawn, set_up = [], talas.set_up

    def watched(*args):
        made = set_up(*args)
        drawn.extend(W_l.detach().clone() for W_l in made[0].projections)
        return made

    monkeypatch.setattr(talas, "set_up", watched)
    run(*flags)
    s = talas.parse_settings(words(*flags))
    model, W, values = plain_run(bert, cache, s, drawn)

    trained, start = AutoModel.from_pretrained(out), AutoModel.from_pretrained(bert)
    saved = torch.load(out / "projections.pt", weights_only=True)
    assert len(saved) == len(W) == s.anchored_layers
    pairs = dict(zip(map("W{}".format, range(9)), zip(saved, W, drawn)))
    for (name, ours), plain, before in zip(
        trained.named_parameters(), model.parameters(), start.parameters()
    ):
        if "pooler" in name:  # not used: not even decayed
            assert torch.equal(ours, before)
        elif "key.bias" not in name:  # softmax does not see it: its gradient is rounding alone
            pairs[name] = ours, plain, before
    for name, (ours, plain, before) in pairs.items():
        assert (ours - plain).norm() < 0.002 * (plain - before).norm(), name
    logged, first = metrics(out)[0], 0
    for line in logged:
        expected = values[first : line["step"]].mean(0).tolist()
        assert [line[name] for name in METRICS] == pytest.approx(expected, rel=1e-3, abs=1e-5)
        first = line["step"]
    lines = [(line["step"], line["epoch"]) for line in logged]  # each tenth, each epoch's last
    assert lines == [(4, 1), (8, 2), (10, 3), (12, 3)]


# ------------------------------------------------------------------- Algorithm 1: what a run does
@pytest.fixture
def steps(monkeypatch):
    """What each training step of a run finds: a list of dicts that grows."""
    seen, step = [], talas.training_step

    def watched(objective, asam, tokens, teacher, domains, s):
        groups = asam.optimizer.param_groups
        seen.append(
            {
                "lr": [group["lr"] for group in groups],
                "decay": {group["weight_decay"] for group in groups},
                "asam": (asam.rho, asam.eta, asam.adaptive),
                "batch": [ids[m.bool()] for ids, m in zip(*tokens.values())],
                "teacher": teacher,
                "domains": domains.tolist(),
                "random": torch.get_rng_state().numpy().tobytes(),
            }
        )
        return step(objective, asam, tokens, teacher, domains, s)

    monkeypatch.setattr(talas, "training_step", watched)
    return seen


def test_algorithm1_each_group_has_its_learning_rate_at_each_step(tmp_path, bert, cache, steps):
    """AdamW's with a warm-up of a quarter of 12 steps, then a cosine to 0; W_l's is 7 times it."""
    flags = "--epochs 3 --batch_size 12 --lr 0.001 --warmup_ratio 0.25 --projection_lr_scale 7"
    out = tmp_path / "out"
    run("--student", bert, "--teacher", cache, "--output", out, flags)
    rising = [0, 1 / 3, 2 / 3]
    falling = [(1 + math.cos(math.pi * i / 9)) / 2 for i in range(9)]
    expected = [0.001 * part for part in rising + falling]
    assert [step["lr"][0] for step in steps] == pytest.approx(expected)
    assert [step["lr"][1] for step in steps] == pytest.approx([7 * lr for lr in expected])
    by_line = {line["step"]: line["lr"] for line in metrics(out)[0]}
    assert by_line == {step: pytest.approx(expected[step - 1]) for step in (4, 8, 10, 12)}


@pytest.mark.parametrize(
    "optimizer, arrived",
    [("asam", (0.3, 0.01, True)), ("sam", (0.3, 0.01, False)), ("disam", (0.3, 0.01, False))],
)
def test_algorithm1_rho_eta_and_decay_arrive(tmp_path, bert, cache, steps, optimizer, arrived):
    flags = f"--optimizer {optimizer} --rho 0.3 --eta 0.01 --weight_decay 0.07 --batch_size 48"
    out = tmp_path / "out"
    run("--student", bert, "--teacher", cache, "--output", out, "--epochs 1", flags)
    assert [(step["asam"], step["decay"]) for step in steps] == [(arrived, {0.07})]


def test_algorithm1_an_epoch_has_an_order_of_its_own_and_leaves_out_what_is_incomplete():
    s = Settings(batch_size=8)
    epochs = [[rows.tolist() for rows in talas.batches(53, s, epoch)] for epoch in range(4)]
    for batches in epochs:
        assert [len(rows) for rows in batches] == [8] * 6  # 53 = 6 * 8 + 5
        taken = [i for rows in batches for i in rows]
        assert len(set(taken)) == 48 and set(taken) < set(range(53))
    left_out = [set(range(53)) - {i for rows in batches for i in rows} for batches in epochs]
    assert len(set(map(frozenset, left_out))) == 4  # other sentences each time
    assert len({str(batches) for batches in epochs}) == 4

    def order(seed):
        return [rows.tolist() for rows in talas.batches(53, Settings(batch_size=8, seed=seed), 0)]

    assert order(42) == epochs[0] != order(43)


def test_algorithm1_a_batch_holds_each_sentence_with_its_own_target_and_domain(
    tmp_path, bert, cache, steps
):
    """After shuffling, padding and sorting by length."""
    learnt, tokenizer = torch.load(cache), AutoTokenizer.from_pretrained(bert)
    of_ids = {tuple(tokenizer(text)["input_ids"]): i for i, text in enumerate(SENTENCES)}
    flags = ["--student", bert, "--teacher", cache, "--epochs", 2, "--batch_size", 12]
    run(*flags, "--output", tmp_path / "out")
    seen = []
    for step in steps:
        rows = [of_ids[tuple(ids.tolist())] for ids in step["batch"]]
        assert len({len(ids) for ids in step["batch"]}) > 1
        torch.testing.assert_close(step["teacher"], learnt["embeddings"][rows])
        assert step["domains"] == ["ab".index(SOURCES[i]) for i in rows]
        seen.append(rows)
    assert sorted(sum(seen[:4], [])) == sorted(sum(seen[4:], [])) == list(range(48))
    assert seen[:4] != seen[4:]


def test_algorithm1_both_passes_draw_the_same_dropout_masks(bert):
    """At rho 0 they are one function at one point: no gap. The next step draws others."""
    student, s = load_encoder(str(bert)), Settings(lambda1=1.0, rho=0.0)
    student.model.train()
    objective, asam, _ = talas.set_up(s, student, 6, steps=10)
    tokens = student.tokenizer(SENTENCES[:8], padding=True, return_tensors="pt")
    tokens = {name: tokens[name] for name in ("input_ids", "attention_mask")}
    batch = tokens, torch.randn(8, 6), torch.zeros(8).long()
    values = [talas.training_step(objective, asam, *batch, s) for _ in range(2)]
    assert [step[-1].item() for step in values] == [0.0, 0.0]
    assert values[0][0] != values[1][0]  # lr is 0 in the first step of the warm-up: the same w


def test_algorithm1_the_device_whose_masks_are_drawn_again(monkeypatch):
    """On an accelerator it is that one's random state that the first pass must not use up."""
    forked = []

    def fork_rng(devices):
        forked.append(devices)
        return nullcontext()

    def objective(*args):
        return torch.zeros(3, requires_grad=True).sum(), [torch.zeros(())] * 3

    monkeypatch.setattr(torch.random, "fork_rng", fork_rng)
    w = torch.zeros(2, requires_grad=True)
    for device in ("cuda:1", "cpu"):
        domains = SimpleNamespace(device=torch.device(device))
        asam = ASAM(torch.optim.SGD([w], lr=1.0), rho=0.1)
        talas.training_step(objective, asam, None, None, domains, Settings())
    assert forked == [[torch.device("cuda:1")], []]


def test_algorithm1_dropout_has_a_stream_of_its_own_for_each_seed_and_epoch(
    tmp_path, bert, cache, steps
):
    for seed in (1, 2):
        flags = f"--epochs 2 --batch_size 48 --seed {seed} --output"
        run("--student", bert, "--teacher", cache, flags, tmp_path / f"{seed}")
    assert len({step["random"] for step in steps}) == len(steps) == 4


def test_algorithm1_with_rho_0_is_adamw_bit_for_bit(tmp_path, bert, cache):
    flags = ["--student", bert, "--teacher", cache, "--epochs", 2, "--batch_size", 8, "--lr", 1e-2]
    run(*flags, "--optimizer", "adamw", "--output", tmp_path / "adamw")
    run(*flags, "--optimizer", "asam", "--rho", 0, "--output", tmp_path / "asam")
    assert weights(tmp_path / "adamw") == weights(tmp_path / "asam")


# --------------------------------------------------------- every setting reaches what it sets
@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A function of flags: the weights that a run with them ends with, from one student."""
    folder = tmp_path_factory.mktemp("settings")
    bert, cache = small_bert(folder / "bert"), small_cache(folder / "teacher.pt")

    @once
    def weights_after(flags):
        out = folder / f"out{len(list(folder.iterdir()))}"
        base = "--epochs 2 --batch_size 16 --lr 1e-3 --rho 0.5"
        run("--student", bert, "--teacher", cache, "--output", out, base, flags)
        return weights(out)

    return weights_after


@pytest.mark.parametrize(
    "flags",
    [
        "--pooling mean",
        "--lambda1 0.01",
        "--lambda2 0.5",
        "--lambda3 2",
        "--temperature 0.05",
        "--anchored_layers 1",
        "--lasd_layers 2",
        "--detach_guide",
        "--optimizer sam",
        "--optimizer adamw",
        "--rho 0.4",
        "--eta 0.01",
        "--lr 2e-3",
        "--projection_lr_scale 4",
        "--weight_decay 0.02",
        "--warmup_ratio 0.5",
        "--epochs 1",
        "--batch_size 15",
        "--max_length 9",
        "--seed 43",
        "--precision bfloat16",
    ],
)
def test_every_setting_changes_the_run(trained, flags):
    assert trained(flags) != trained("")


def test_disam_is_another_sam_and_has_a_lambda_of_its_own(trained):
    disam = "--optimizer disam --disam_lambda"
    assert trained(f"{disam} 0.5") != trained(f"{disam} 2") != trained("--optimizer sam")


def test_a_run_can_be_repeated(trained):
    assert trained("--seed 42") == trained("")  # 42 is the default


def test_training_drops_out(tmp_path, cache, trained):
    """The same weights with dropout 0 in the configuration train to others."""
    bert, out = small_bert(tmp_path / "bert", **NO_DROPOUT), tmp_path / "out"
    flags = "--epochs 2 --batch_size 16 --lr 1e-3 --rho 0.5"
    run("--student", bert, "--teacher", cache, "--output", out, flags)
    assert weights(out) != trained("")


def test_the_paper_is_the_default():
    s = Settings()
    assert (s.lambda1, s.lambda2, s.lambda3, s.anchored_layers) == (0.001, 0.75, 1, 2)
    assert (s.lr, s.batch_size, s.epochs, s.optimizer) == (2e-5, 32, 5, "asam")
    assert (s.temperature, s.rho, s.eta, s.weight_decay) == (0.1, 0.05, 0, 0.01)
    assert (s.warmup_ratio, s.projection_lr_scale, s.precision) == (0.06, 5, "float32")


def test_tiny_brings_its_own_defaults_and_the_command_line_wins(capsys):
    s = talas.parse_settings(["--epochs", "7"])
    assert (s.student, s.epochs, s.lr) == ("tiny", 7, tiny.SETTINGS["lr"])
    assert f"--lr {tiny.SETTINGS['lr']}" in capsys.readouterr().out
    assert talas.parse_settings(["--student", "somewhere"]) == Settings(student="somewhere")


def test_tiny_takes_the_settings_that_a_loaded_student_takes():
    s = Settings(student="tiny", pooling="mean", max_length=9, seed=1)
    student, other = (talas.load_student(replace(s, seed=seed), SENTENCES) for seed in (1, 2))
    assert (student.pooling, student.max_length) == ("mean", 9)
    assert student.tokenizer.get_vocab() == other.tokenizer.get_vocab()
    assert not torch.equal(*(e.model.get_input_embeddings().weight for e in (student, other)))


def test_the_projections_start_small(bert):
    """The cosine of Eq. 3 does not see the length of W_l, which only slows its turning."""
    s = Settings(anchored_layers=3)
    objective, _, _ = talas.set_up(s, load_encoder(str(bert)), 1000, steps=10)
    assert [tuple(W.shape) for W in objective.projections] == [(32, 1000)] * 3
    for W in objective.projections:
        assert W.std().item() == pytest.approx(1e-3, rel=0.05)
        assert W.mean().item() == pytest.approx(0, abs=1e-4)


def test_the_projections_go_where_the_student_is(bert):
    moved = []

    class Watched(talas.Objective):
        def to(self, device):
            moved.append(device)
            return self

    student = load_encoder(str(bert))
    talas.set_up(Settings(), student, 8, steps=10, kind=Watched)
    assert moved == [student.model.device]


def test_the_projections_start_from_the_seed(tmp_path, bert, cache, monkeypatch):
    """W_l before the first step: --seed decides, and nothing that was drawn before."""
    started, set_up = [], talas.set_up

    def watched(*args):
        objective, *others = set_up(*args)
        started.append([W.tolist() for W in objective.projections])
        return objective, *others

    monkeypatch.setattr(talas, "set_up", watched)
    for i, seed in enumerate((1, 2, 1)):
        torch.rand(i)
        flags = ["--student", bert, "--teacher", cache, "--output", tmp_path / str(i)]
        run(*flags, f"--seed {seed} --epochs 1 --batch_size 16")
    assert started[0] == started[2] != started[1]


# --------------------------------------------------------------------------- what a run leaves
@pytest.mark.parametrize("pooling", ["cls", "mean", "last"])
def test_a_run_leaves_the_student_its_projections_and_its_record(
    tmp_path, bert, cache, pooling, monkeypatch
):
    out, kept, save = tmp_path / "out", [], talas.save_student
    monkeypatch.setattr(
        talas, "save_student", lambda *what: (kept.append(deepcopy(what[1])), save(*what))
    )
    flags = f"--pooling {pooling} --max_length 12 --epochs 1 --batch_size 16 --lr 1e-3"
    start = time.perf_counter()
    run("--student", bert, "--teacher", cache, "--output", out, flags)
    milliseconds = 1000 * (time.perf_counter() - start)
    model, tokenizer = AutoModel.from_pretrained(out).eval(), AutoTokenizer.from_pretrained(out)
    torch.testing.assert_close(model.state_dict(), kept[0].model.state_dict(), rtol=0, atol=0)
    assert model.dtype == torch.float32
    tokens = tokenizer(SENTENCES, padding=True, truncation=True, return_tensors="pt")
    assert tokens["input_ids"].shape[1] == 12  # the maximum length travels with the student
    again = load_encoder(str(out))
    assert (again.pooling, again.max_length) == (pooling, 12)
    projections = torch.load(out / "projections.pt", weights_only=True)
    assert [tuple(W.shape) for W in projections] == [(32, 8)] * 2
    record = json.loads((out / "talas.json").read_text())
    assert record["settings"]["lr"] == 1e-3 and record["settings"]["pooling"] == pooling
    assert record["settings"].keys() == set(Settings.__dataclass_fields__)
    assert record["teacher"] == "random" and record["corpus"] == fingerprint(SENTENCES)
    assert record["cost"].keys() == {"ms_per_step", "mean_mb", "peak_mb", "std_mb"}
    assert record["versions"]["torch"] == torch.__version__
    (step,), (epoch,) = metrics(out)
    assert step.keys() == {"step", "epoch", *METRICS, "lr", "ms_per_step", "memory_mb"}
    assert (step["step"], step["epoch"]) == (3, 1)
    assert 1 < 3 * step["ms_per_step"] < milliseconds
    assert (step["memory_mb"] > 50) == Path("/proc/self/statm").exists()
    assert epoch == {"end_of_epoch": 1, "step": 3, "lambda_max": None}
    left = {path.name for path in out.iterdir()} - {path.name for path in bert.iterdir()}
    assert left == {
        *("projections.pt", "talas.json", "metrics.jsonl", "modules.json", "1_Pooling"),
        *("sentence_bert_config.json", "config_sentence_transformers.json"),
    }
    assert not list(tmp_path.glob("*.lock"))


@pytest.mark.parametrize(
    "weights, optimizer", [((0, 1, 0), "sam"), ((0, 0, 1), "disam"), ((1, 0, 1), "asam")]
)
def test_table2_a_term_of_weight_0_is_left_out_of_the_run(
    tmp_path, bert, corpus, cache, weights, optimizer
):
    """Without TAMD there are no projections, and a corpus will do in place of a teacher."""
    flags = [flag for i, weight in enumerate(weights, 1) for flag in (f"--lambda{i}", weight)]
    flags += ["--student", bert, "--epochs", 1, "--batch_size", 16, "--optimizer", optimizer]
    run(*flags, "--teacher", cache if weights[1] else corpus, "--output", tmp_path / "out")
    (step,), _ = metrics(tmp_path / "out")
    assert [step[name] != 0 for name in METRICS[:3]] == [weight != 0 for weight in weights]
    assert len(torch.load(tmp_path / "out" / "projections.pt")) == 2 * weights[1]
    record = json.loads((tmp_path / "out" / "talas.json").read_text())
    assert record["teacher"] == ("random" if weights[1] else None)


def test_table3_time_and_memory_by_hand(tmp_path):
    """The median time without the first tenth; mean, peak and standard deviation of memory."""
    times, sizes = [900, 1, 2, 3, 4, 5, 6, 7, 8, 100], [10, 30, 10, 10, 20, 20, 20, 20, 30, 30]
    lines = [{"step": 1, "ms_per_step": ms, "memory_mb": mb} for ms, mb in zip(times, sizes)]
    lines.insert(5, {"step": 1, "end_of_epoch": 1, "lambda_max": 0.5})
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    deviation = math.sqrt((3 * 10**2 + 3 * 10**2) / 10)
    expected = {"ms_per_step": 5, "mean_mb": 20, "peak_mb": 30, "std_mb": deviation}
    assert runs.cost(tmp_path) == pytest.approx(expected)


def test_the_first_peak_of_memory_is_of_training(tmp_path, monkeypatch):
    """What the process did before, such as running the teacher, is not in a run's first line."""
    peaks = [9000.0, 10.0]  # of an accelerator: reading a peak begins the next one
    monkeypatch.setattr(runs, "memory_mb", lambda device: peaks.pop(0))
    log = runs.Log(Settings(student="x", output=str(tmp_path), epochs=1), ["loss"], 1, 0, None)
    log.begin()
    log.step(torch.tensor([1.0]), 0.1)
    assert metrics(tmp_path)[0][0]["memory_mb"] == 10 and not peaks


# ---------------------------------------------------------------------------- Table 4, in a run
def test_table4_lambda_max_is_that_of_the_mean_loss_without_dropout_and_leaves_no_trace(
    tmp_path, cache
):
    """By scipy, of Eq. 3 alone: its mean over two batches is its mean over all 48 sentences.

    H is that of the student's weights, W fixed.
    """
    bert = small_bert(tmp_path / "bert", num_hidden_layers=1, hidden_size=16, intermediate_size=16)
    flags = "--lambda1 0 --lambda3 0 --anchored_layers 1 --epochs 2 --batch_size 24 --lr 1e-2"
    flags = [flags, "--student", bert, "--teacher", cache, "--output"]
    run(*flags, tmp_path / "without")
    run(*flags, tmp_path / "with", "--sharpness")
    assert weights(tmp_path / "with") == weights(tmp_path / "without")
    _, (first, last) = metrics(tmp_path / "with")
    assert math.isfinite(first["lambda_max"])

    model = AutoModel.from_pretrained(tmp_path / "with", attn_implementation="eager").eval()
    tokens = AutoTokenizer.from_pretrained(bert)(SENTENCES, padding=True, return_tensors="pt")
    (W,) = torch.load(tmp_path / "with" / "projections.pt", weights_only=True)
    w = [p for name, p in model.named_parameters() if "pooler" not in name]
    E, teacher = model(**tokens).last_hidden_state[:, 0], torch.load(cache)["embeddings"]
    loss = 0.75 * (1 - torch.cosine_similarity(E @ W, teacher).mean())  # lambda2
    g = torch.cat([g.flatten() for g in torch.autograd.grad(loss, w, create_graph=True)])

    def product(v):
        Hv = torch.autograd.grad(g @ torch.from_numpy(v).float().flatten(), w, retain_graph=True)
        return torch.cat([part.flatten() for part in Hv]).numpy()

    H = scipy.sparse.linalg.LinearOperator((len(g), len(g)), product, dtype="float32")
    expected = scipy.sparse.linalg.eigsh(H, k=1, which="LA", tol=1e-4, return_eigenvectors=False)
    assert last["lambda_max"] == pytest.approx(expected[0], rel=0.02)


# ------------------------------------------------------------------------------- interruptions
THREE_EPOCHS = "--epochs 3 --batch_size 16 --lr 1e-3 --rho 0.5"  # of three steps


def killed_in_the_fifth_step():
    steps, step = [], talas.training_step

    def stop(*args):
        steps.append(0)
        return os.kill(os.getpid(), signal.SIGKILL) if len(steps) == 5 else step(*args)

    talas.training_step = stop


def killed_in_the_second_checkpoint():
    saved, save = [], torch.save

    def torn(content, file):
        saved.append(0)  # the first is that of the beginning
        if len(saved) < 3:
            return save(content, file)
        file.write(b"half a checkpoint")
        file.flush()
        os.kill(os.getpid(), signal.SIGKILL)

    torch.save = torn


def killed_in_the_last_save():
    replace = os.replace

    def half(source, target):
        replace(source, target)
        if ".saving" in str(source) and ".saving" not in str(target):
            os.kill(os.getpid(), signal.SIGKILL)

    os.replace = half


def stopped_by_ctrl_c():
    steps, step = [], talas.training_step

    def stop(*args):
        steps.append(0)
        if len(steps) == 5:
            raise KeyboardInterrupt
        return step(*args)

    talas.training_step = stop


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The output of a run of three epochs that nothing interrupted."""
    folder = tmp_path_factory.mktemp("whole")
    bert, cache = small_bert(folder / "bert"), small_cache(folder / "teacher.pt")
    run("--student", bert, "--teacher", cache, "--output", folder / "out", THREE_EPOCHS)
    return folder / "out"


def logged_losses(folder):
    return [(line["step"], line.get("loss")) for lines in metrics(folder) for line in lines]


@pytest.mark.parametrize(
    "stop, code",
    [
        (killed_in_the_fifth_step, -9),
        (killed_in_the_second_checkpoint, -9),
        (killed_in_the_last_save, -9),
        (stopped_by_ctrl_c, 2),
    ],
)
def test_a_resumed_run_ends_as_one_that_nothing_interrupted(
    tmp_path, bert, cache, whole, stop, code
):
    out = tmp_path / "out"
    flags = ["--student", bert, "--teacher", cache, "--output", out, THREE_EPOCHS]
    assert in_a_process(lambda: (stop(), run(*flags))) == code
    assert (out / "checkpoint.pt").exists() and not (out / "talas.json").exists()
    assert in_a_process(lambda: run(*flags, "--resume")) == 0
    assert weights(out) == weights(whole)
    assert logged_losses(out) == logged_losses(whole)
    names = [sorted(path.relative_to(o) for path in o.rglob("*")) for o in (out, whole)]
    assert names[0] == names[1]


@pytest.fixture
def interrupted(tmp_path, bert, cache, monkeypatch, ends_with_one_line):
    """The flags of a run that Ctrl-C ended in its second epoch; its output is tmp_path / "out"."""
    flags = ["--student", bert, "--teacher", cache, "--output", tmp_path / "out", THREE_EPOCHS]
    with monkeypatch.context() as patch:
        patch.setattr(talas, "training_step", talas.training_step)
        stopped_by_ctrl_c()
        ends_with_one_line(lambda: run(*flags), "interrupted", "--resume", "last whole epoch")
    return flags


def test_an_interrupted_run_is_no_model_and_is_not_lost_by_mistake(
    interrupted, tmp_path, cache, whole, ends_with_one_line
):
    out = tmp_path / "out"
    checkpoint = (out / "checkpoint.pt").read_bytes()
    ends_with_one_line(lambda: run(*interrupted), "interrupted run", "--resume")
    ends_with_one_line(lambda: run(*interrupted, "--resume", "--lr", 1e-4), "--lr", "0.001")
    ends_with_one_line(lambda: run(*interrupted, "--resume", "--pooling", "mean"), "auto", "mean")
    ends_with_one_line(lambda: load_encoder(str(out)), "interrupted run", "--resume")
    learnt = torch.load(cache)
    torch.save(learnt | {"embeddings": learnt["embeddings"].flip(0)}, cache)  # another teacher
    ends_with_one_line(lambda: run(*interrupted, "--resume"), "--resume", "corpus")
    torch.save(learnt | {"sources": learnt["sources"][1:] + ["a"]}, cache)  # other domains
    ends_with_one_line(lambda: run(*interrupted, "--resume"), "--resume", "corpus")
    texts = learnt["sentences"][::-1]
    torch.save(learnt | {"sentences": texts, "fingerprint": fingerprint(texts)}, cache)
    ends_with_one_line(lambda: run(*interrupted, "--resume"), "--resume", "corpus")
    torch.save(learnt, cache)
    assert (out / "checkpoint.pt").read_bytes() == checkpoint
    run(*interrupted, "--overwrite")  # from the beginning
    assert weights(out) == weights(whole)


@pytest.mark.parametrize("damage", [None, b"", b'{"step": 3}\n{"st', b"\xff[[1]]\nnull\n"])
def test_a_run_does_not_depend_on_its_log(interrupted, tmp_path, whole, damage):
    """metrics.jsonl deleted, emptied, shortened or overwritten before --resume."""
    out = tmp_path / "out"
    if damage is None:
        (out / "metrics.jsonl").unlink()
    else:
        (out / "metrics.jsonl").write_bytes(damage)
    run(*interrupted, "--resume")
    assert weights(out) == weights(whole)
    assert [line["step"] for line in metrics(out)[0]][-2:] == [6, 9]


def test_ctrl_c_before_the_first_checkpoint_begins_again(
    tmp_path, bert, cache, monkeypatch, ends_with_one_line
):
    def stop(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(talas, "load_student", stop)
    flags = ["--student", bert, "--teacher", cache, "--output", tmp_path / "out"]
    ends_with_one_line(lambda: run(*flags), "interrupted", "begins again")
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob("*.lock"))


# ------------------------------------------------------------------------------- two processes
def test_two_processes_share_an_epoch(monkeypatch):
    s, twice = Settings(batch_size=5), Settings(batch_size=10)
    together = [rows.tolist() for rows in talas.batches(48, twice, 3)]
    monkeypatch.setattr(runs, "processes", lambda: 2)
    of_ranks = []
    for rank in (0, 1):
        monkeypatch.setattr(runs, "rank", lambda rank=rank: rank)
        of_ranks.append([rows.tolist() for rows in talas.batches(48, s, 3)])
    assert [a + b for a, b in zip(*of_ranks, strict=True)] == together


@pytest.mark.parametrize("optimizer", ["asam", "adamw"])
def test_two_processes_climb_and_descend_as_one_with_their_batches_together(
    tmp_path, cache, optimizer
):
    """Without dropout, and with Eq. 3 alone, which compares no sentences."""
    bert = small_bert(tmp_path / "bert", **NO_DROPOUT)
    flags = ["--epochs 2 --lambda1 0 --lambda3 0 --lr 1e-3 --rho 0.5"]
    flags += ["--optimizer", optimizer, "--student", bert, "--teacher", cache]
    one, two = tmp_path / "one", tmp_path / "two"
    run(*flags, "--batch_size", 16, "--output", one)
    assert in_two_processes(lambda: run(*flags, "--batch_size", 8, "--output", two)) == [0, 0]
    start, *ends = (AutoModel.from_pretrained(path).state_dict() for path in (bert, one, two))
    for name in start:
        if "key.bias" not in name:  # its gradient is rounding alone
            moved = (ends[0][name] - start[name]).norm()
            assert (ends[1][name] - ends[0][name]).norm() <= 0.002 * moved, name
    assert moved == 0 and "pooler" in name  # the last one; all others
    for line, same in zip(metrics(two)[0], metrics(one)[0], strict=True):  # means over both
        assert line["step"] == same["step"]
        assert line["loss"] == pytest.approx(same["loss"], rel=1e-3)
        assert line["sharpness_gap"] == pytest.approx(same["sharpness_gap"], rel=1e-2)


@pytest.mark.parametrize("optimizer", ["asam", "disam"])
def test_two_processes_draw_their_own_dropout_and_stay_the_same(tmp_path, bert, cache, optimizer):
    seen, step = tmp_path / "seen", talas.training_step

    def watched(objective, *rest):
        mask = torch.nn.functional.dropout(torch.ones(99), 0.5).tolist()
        values = step(objective, *rest)
        total = sum(p.double().sum() for p in objective.parameters()).item()
        with open(f"{seen}{runs.rank()}", "a") as file:
            file.write(json.dumps([mask, total]) + "\n")
        return values

    def train():
        talas.training_step = watched
        flags = f"--epochs 2 --batch_size 8 --lr 1e-3 --rho 0.01 --optimizer {optimizer}"
        run("--student", bert, "--teacher", cache, "--output", tmp_path / "out", flags)

    assert in_two_processes(train) == [0, 0]
    ranks = [[json.loads(line) for line in open(f"{seen}{rank}")] for rank in (0, 1)]
    assert len(ranks[0]) == len(ranks[1]) == 6
    for (mask, total), (other, same) in zip(*ranks):
        assert mask != other and total == same
    assert len({total for _, total in ranks[0]}) > 3


def test_two_processes_resume_as_two(tmp_path, bert, cache):
    flags = ["--epochs 2 --batch_size 4 --lr 1e-3", "--student", bert, "--teacher", cache]
    flags += ["--output"]
    whole, out = tmp_path / "whole", tmp_path / "out"
    assert in_two_processes(lambda: run(*flags, whole)) == [0, 0]
    assert in_two_processes(lambda: (killed_in_the_last_save(), run(*flags, out)))[0] == -9
    assert in_a_process(lambda: run(*flags, out, "--resume")) == 2  # one process is another run
    assert in_two_processes(lambda: run(*flags, out, "--resume")) == [0, 0]
    assert weights(out) == weights(whole)


# ------------------------------------------------------------------------------------ mistakes
@pytest.mark.parametrize(
    "flags, parts",
    [
        ("--teacher nowhere.pt", ["nowhere.pt", "cache_teacher.py"]),
        ("--teacher nowhere.txt --lambda2 0", ["nowhere.txt"]),
        ("--student no/such/model", ["no/such/model"]),
        ("--student ''", ["load"]),
        ("--output ''", ["--output"]),
        ("--anchored_layers 4", ["--anchored_layers 4", "3 layers"]),
        ("--anchored_layers 0", ["--anchored_layers 0"]),
        ("--lasd_layers 1", ["--lasd_layers 1"]),
        ("--lasd_layers 4", ["--lasd_layers 4", "3 layers"]),
        ("--lambda1 0 --lambda2 0 --lambda3 0", ["all 0"]),
        ("--lambda2 -1", ["--lambda2 -1"]),
        ("--lr nan", ["--lr nan"]),
        ("--lr 0", ["--lr 0"]),
        ("--rho inf", ["--rho inf"]),
        ("--eta -0.1", ["--eta -0.1"]),
        ("--temperature 0", ["--temperature 0"]),
        ("--epochs 0", ["--epochs 0"]),
        ("--epochs 1.5", ["--epochs", "1.5"]),
        ("--batch_size 0", ["--batch_size 0"]),
        ("--batch_size 1", ["--batch_size 1", "Eqs. 5 and 6"]),
        ("--batch_size 49", ["--batch_size 49", "48"]),
        ("--warmup_ratio 2", ["--warmup_ratio 2"]),
        ("--optimizer sgd", ["--optimizer", "asam"]),
        ("--precision float16", ["--precision", "bfloat16"]),
        ("--pooling max", ["--pooling", "mean"]),
        ("--device quantum", ["--device quantum"]),
        ("--device meta", ["--device meta"]),
        ("--device cuda", ["--device cuda"]),
        ("--output new/folder/o --batch_size 49", ["--batch_size 49"]),
        ("--lambda 1", ["--lambda"]),  # no abbreviation
        ("--sharpness maybe", ["--sharpness", "maybe"]),
        ("--max_length 2", ["--max_length 2"]),
        ("--seed -1", ["--seed -1"]),
        ("--seed 100000000000000000000", ["--seed"]),
        ("--resume", ["no checkpoint"]),
    ],
)
def test_a_mistake_on_the_command_line_is_one_line_and_writes_nothing(
    tmp_path, bert, cache, flags, parts, monkeypatch, ends_with_one_line
):
    given = ["--teacher", cache, "--student", bert, "--batch_size", 16, "--output", tmp_path / "o"]
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    ends_with_one_line(lambda: run(*given, flags), *parts)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    "flags, parts",
    [
        ("--lr 1e18", ["step 2", "not finite"]),
        ("--rho 1e18", ["step 1", "sharpness_gap", "not finite"]),
        (
            "--lr 9e18 --weight_decay 9e18 --projection_lr_scale 1e9 --batch_size 48",
            ["epoch 1", "not finite"],
        ),
    ],
)
def test_divergence_is_one_line_and_leaves_the_last_whole_epoch(
    tmp_path, bert, cache, flags, parts, ends_with_one_line
):
    given = ["--batch_size 16 --epochs 2 --warmup_ratio 0", "--teacher", cache, "--student", bert]
    given += ["--output", tmp_path / "out", flags]
    ends_with_one_line(lambda: run(*given), *parts, "--lr", "--rho", "--output")
    states = torch.load(tmp_path / "out" / "checkpoint.pt", weights_only=True)["states"]
    assert all(p.isfinite().all() for p in states["weights"].values())


def test_a_full_memory_is_one_line(tmp_path, bert, cache, monkeypatch, ends_with_one_line):
    def full(*args):
        raise torch.OutOfMemoryError("of 80 GiB ...")

    monkeypatch.setattr(talas, "training_step", full)
    flags = ["--student", bert, "--teacher", cache, "--output", tmp_path / "out"]
    ends_with_one_line(lambda: run(*flags), "out of memory", "--batch_size")


def test_an_existing_output_is_kept(tmp_path, bert, cache, ends_with_one_line):
    out = tmp_path / "student"
    flags = ["--student", bert, "--teacher", cache, "--output", out, "--epochs", 1]
    flags += ["--batch_size", 16, "--lr", 1e-3]
    run(*flags)
    (out / "mine.txt").write_text("mine")
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    for also, parts in [
        ([], ["exists", "--overwrite"]),
        (["--resume"], ["finished run"]),
        (["--overwrite", "--anchored_layers", 9], ["3 layers"]),
        (["--overwrite", "--student", out], ["--student itself"]),
    ]:
        ends_with_one_line(lambda also=also: run(*flags, *also), *parts)
    assert before == {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    run(*flags, "--overwrite", "--seed", 1)
    assert (out / "mine.txt").read_text() == "mine"
    assert (out / "model.safetensors").read_bytes() != before[out / "model.safetensors"]


def test_an_output_that_cannot_be_written_is_one_line(tmp_path, bert, cache, ends_with_one_line):
    file, flags = tmp_path / "file", ["--teacher", cache, "--student", bert, "--batch_size", 16]
    file.write_text("in the way")
    ends_with_one_line(lambda: run(*flags, "--output", file), "exists")
    ends_with_one_line(lambda: run(*flags, "--output", file / "student"), "cannot write")
    ends_with_one_line(lambda: run(*flags, "--output", file, "--overwrite"), "exists")
    assert file.read_text() == "in the way"


def test_a_second_run_into_one_output_is_refused(tmp_path, bert, cache, ends_with_one_line):
    out = tmp_path / "out"
    flags = ["--teacher", cache, "--student", bert, "--epochs", 1, "--batch_size", 16]
    with alone(out):
        ends_with_one_line(lambda: run(*flags, "--output", out), "another run", str(out))
        run(*flags, "--output", tmp_path / "other")
    assert not out.exists()
    run(*flags, "--output", out)


# ------------------------------------------------------------------------------------ the demo
def test_the_demo_end_to_end_at_a_reduced_size(tmp_path, monkeypatch):
    """The three commands on 800 of the demo's sentences."""
    lines = (ROOT / "demo" / "corpus.jsonl").read_text(encoding="utf-8").splitlines()
    chosen = random.Random(0).sample(lines, 800)
    (tmp_path / "corpus.jsonl").write_text("\n".join(chosen), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    cache_teacher.main(["--corpus", "corpus.jsonl"])
    talas.main(["--epochs", "2", "--pooling", "mean"])
    names = ["lsa", "tiny", "student"]
    evaluation.main([*names, "--tasks", "topics,captions", "--json", "scores.json"])
    scores = json.loads(Path("scores.json").read_text())
    assert scores["student"]["avg"] > scores["tiny"]["avg"] + 20


def test_tiny_and_its_training_are_the_same_in_every_process(tmp_path, cache):
    """Random weights, a vocabulary of the sentences' own: nothing hangs on an order of hashes."""
    flags = ["--teacher", str(cache), "--batch_size", "16", "--output"]
    run(*flags, tmp_path / "here")
    command = [sys.executable, ROOT / "talas.py", *flags, tmp_path / "there"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONHASHSEED": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and not done.stderr, done.stderr
    assert done.stdout.endswith(f"student saved to {tmp_path / 'there'}\n")
    assert weights(tmp_path / "there") == weights(tmp_path / "here")
    vocabularies = [(tmp_path / name / "tokenizer.json").read_text() for name in ("here", "there")]
    assert vocabularies[0] == vocabularies[1]
