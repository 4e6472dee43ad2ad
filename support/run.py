"""A training run that loses nothing: devices, processes, checks, checkpoints, metrics.

`s` are the run's settings (talas.Settings).
"""

import hashlib
import json
import os
import shutil
import statistics
import sys
import time
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path

import torch
import transformers
from torch import distributed
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from support import attempt, fail, interruptible
from support.files import TOKENIZER_FILES, keep_apart, load, save, write_json

LOG_EVERY = 10  # steps between two lines of metrics.jsonl
ADVICE = "try a lower --lr or --rho with another --output; the last whole epoch is kept in this one"
ABOVE_0 = ("lr", "scale", "temperature", "anchored_layers", "epochs", "size", "length")
CARD_MARK = "talas.py writes this card anew"
NO_FACTS = ("resume", "overwrite", "output", "device", "teacher", "student")  # names, not content


# ------------------------------------------------------------------------- devices and processes
def pick_device(name):
    """The torch device of that name; `auto` is the accelerator if there is one, else the CPU."""
    if name == "auto":  # a Mac's is left out: it was never tried
        found = torch.accelerator.current_accelerator(check_available=True)
        name = "cpu" if found is None or found.type == "mps" else found
    with attempt(f"use --device {name}", RuntimeError, AssertionError):
        return torch.zeros(1, device=name).device


def memory_mb(device):
    """Megabytes in use: an accelerator's peak since the last call, or this process's own memory."""
    if device.type != "cpu":
        peak = torch.accelerator.max_memory_allocated(device) / 2**20
        torch.accelerator.reset_peak_memory_stats(device)
        return peak
    statm = Path("/proc/self/statm")
    if not statm.exists():  # elsewhere than on Linux nothing is measured
        return 0.0
    _, resident, files, *_ = map(int, statm.read_text().split())
    return (resident - files) * os.sysconf("SC_PAGE_SIZE") / 2**20  # the cache is a file


def rank():
    """Which of torchrun's processes this is, from 0; the first one speaks and writes."""
    return distributed.get_rank() if distributed.is_initialized() else 0


def processes():
    """How many processes torchrun started, one a device; 1 without torchrun."""
    return distributed.get_world_size() if distributed.is_initialized() else 1


@contextmanager
def started(s):
    """A run that was checked, with its processes connected; Ctrl-C ends it in one line.

    With torchrun the first process alone speaks and writes.
    """
    check_settings(s)
    with interruptible("with --resume the same command goes on from the last whole epoch"):
        check_output(s)  # in each process; none makes the folder before all are here
        if "LOCAL_RANK" in os.environ:  # torchrun's
            on_cpu = pick_device(s.device).type == "cpu"
            if not on_cpu:
                torch.accelerator.set_device_index(int(os.environ["LOCAL_RANK"]))
            distributed.init_process_group("gloo" if on_cpu else None)
        if rank() > 0:
            sys.stdout = open(os.devnull, "w")
        yield
        if distributed.is_initialized():
            distributed.destroy_process_group()


def seed_of(*what):
    """A seed for a stream of random numbers apart from the stream of any other `what`."""
    return int(hashlib.sha256(repr(what).encode()).hexdigest()[:15], 16)


# ---------------------------------------------------------------------- before a run: is it sound?
def check_settings(s):
    """End the program if a setting has no meaning."""
    for name, value in asdict(s).items():
        above = name.endswith(ABOVE_0)  # the others may be 0
        if type(value) in (int, float) and not (value > 0 if above else value >= 0):
            fail(f"--{name} {value}: it must be {'above' if above else 'at least'} 0")
    if s.warmup_ratio > 1:
        fail(f"--warmup_ratio {s.warmup_ratio}: it is a part of the steps, at most 1")
    if s.lambda1 == s.lambda2 == s.lambda3 == 0:
        fail("--lambda1, --lambda2 and --lambda3 are all 0: there is nothing to learn")
    if s.batch_size == 1 and s.lambda1 + s.lambda3 > 0:
        fail("--batch_size 1: Eqs. 5 and 6 compare the sentences of a batch; take more")


def check_fit(s, student, corpus):
    """End the program if the settings do not fit the student or the corpus."""
    L, n = student.layers, len(corpus)
    if n < s.batch_size * processes():
        each = f" in each of {processes()} processes" if processes() > 1 else ""
        fail(f"--batch_size {s.batch_size}{each}: the corpus has only {n} sentences")
    if len(set(student.widths)) > 1:
        fail(f"{s.student}: its layers have unlike widths, {student.widths}; take another student")
    if s.lambda2 and s.anchored_layers > L:
        fail(f"--anchored_layers {s.anchored_layers}: {s.student} has {L} layers")
    if s.lambda3 and not 2 <= (s.lasd_layers or L) <= L:
        need = f"Eq. 5 chains two or more of {s.student}'s {L} layers; --lambda3 0 skips LASD"
        fail(f"--lasd_layers {s.lasd_layers}: {need}")


def interrupted(folder):
    """Whether a folder holds a run that was not finished."""
    return all(Path(folder, name).exists() for name in ("checkpoint.pt", "metrics.jsonl"))


def check_output(s):
    """End the program if what is in the output folder is not to be touched."""
    keep_apart("--output", s.output, student=s.student, teacher=s.teacher)
    out = Path(s.output)
    there = {path.name for path in out.glob("*")}
    if s.resume and "checkpoint.pt" not in there:
        what = "a finished run" if "talas.json" in there else "no run"
        fail(f"{out} has no checkpoint to resume: it is {what}")
    if interrupted(out) and not (s.resume or s.overwrite):
        fail(f"{out} holds an interrupted run; --resume it, --overwrite it, or change --output")
    if there and not (s.resume or s.overwrite):
        fail(f"{out} exists; choose another --output, or --overwrite it")
    if there and not there & {"talas.json", "checkpoint.pt", "metrics.jsonl", "config.json"}:
        fail(f"--output {out} holds neither a run nor a model; choose another --output")


# ----------------------------------------------------------------------------- on the way and after
def progress(total, unit, label=None, initial=0):
    """A progress bar with the time left; renewed every half minute where no one watches."""
    pace = {"mininterval": 0.1} if sys.stderr.isatty() else {"delay": 30, "mininterval": 30}
    about = {"total": total, "unit": unit, "desc": label, "initial": initial} | pace
    return tqdm(dynamic_ncols=True, disable=rank() > 0, **about)


class Run:
    """A training under way: its checkpoint, its metrics.jsonl, its share of the processes."""

    def __init__(self, s, corpus, objective, steps):
        """steps: batches of an epoch, over all processes."""
        self.s, self.device = s, objective.model.device
        self.steps, self.values = steps // processes(), []
        self.total_steps = s.epochs * self.steps
        self.checkpoint, self.log = (Path(s.output, f) for f in ("checkpoint.pt", "metrics.jsonl"))
        self.facts = {f"--{key}": value for key, value in asdict(s).items() if key not in NO_FACTS}
        self.facts |= {"student or corpus": corpus.identity(), "number of processes": processes()}
        self.parts, self.objective = {"weights": objective}, objective
        if processes() > 1:  # each backward pass averages its gradients over the processes
            devices = None if self.device.type == "cpu" else [self.device]
            unused = {"find_unused_parameters": True}  # such as those of BERT's pooler
            self.objective = DistributedDataParallel(objective, device_ids=devices, **unused)

    def start_from(self, optimizer, scheduler):
        """The epochs to come; with --resume first goes back to the end of the last whole one."""
        self.parts |= {"adamw": optimizer, "scheduler": scheduler}
        first, lines = 0, []
        if self.s.resume:
            saved, lines = load(self.checkpoint, mmap=False), read_metrics(self.s.output)
            for name, now in self.facts.items():
                if now != (before := saved["facts"].get(name)):
                    fail(f"--resume with another {name}: it was {before}, now it is {now}")
            for name, part in self.parts.items():
                part.load_state_dict(saved["states"][name])
            first = saved["epoch"]
        self.count = first * self.steps
        with attempt(f"write --output {self.s.output}"):
            self.log.parent.mkdir(exist_ok=True)
        if not self.s.resume:
            self.save(0)
        self.write(*(line for line in lines if line["step"] <= self.count), mode="w")
        self.bar = progress(self.total_steps, "step", initial=self.count)
        memory_mb(self.device)  # the first peak is of training, not of what was before
        return range(first, self.s.epochs)

    def save(self, epoch):
        """Write the state after `epoch` epochs, whole or not at all."""
        states = {name: part.state_dict() for name, part in self.parts.items()}
        if not all(weights.isfinite().all() for weights in states["weights"].values()):
            fail(f"epoch {epoch} left weights that are not finite; {ADVICE}")
        if rank() == 0:
            save(self.checkpoint, {"epoch": epoch, "facts": self.facts, "states": states})

    def share(self, batches):
        """Of an epoch's batches those of this process: each process gets as many."""
        return batches[rank() :: processes()][: self.steps]

    def begin_epoch(self, epoch):
        """Seed the dropout masks: a resumed epoch draws the same, each process its own."""
        torch.manual_seed(seed_of(self.s.seed, epoch, rank(), "dropout"))
        self.clock = time.perf_counter()

    def write(self, *lines, mode="a"):
        """Append lines to metrics.jsonl."""
        if rank() == 0:
            with open(self.log, mode, encoding="utf-8") as file:
                file.writelines(json.dumps(line) + "\n" for line in lines)

    def step(self, values, lr):
        """Take one step's {name: scalar}; the host waits for them only when a line is due."""
        self.values.append(torch.stack(list(values.values())))
        self.count += 1
        self.bar.update()
        if self.count % LOG_EVERY and self.count % self.steps:
            return
        rows = torch.stack(self.values)  # (steps since the last line, values of a step)
        if processes() > 1:
            distributed.all_reduce(rows)
        rows = rows.cpu() / processes()
        ms = 1000 * (time.perf_counter() - self.clock) / len(rows)
        for row, column in (~rows.isfinite()).nonzero().tolist():
            self.bar.close()
            step = self.count - len(rows) + 1 + row
            fail(f"step {step}: {list(values)[column]} is not finite; {ADVICE}")
        means = dict(zip(values, rows.mean(0).tolist()))
        about = {"step": self.count, "epoch": -(-self.count // self.steps)}
        cost = {"lr": lr, "ms_per_step": ms, "memory_mb": memory_mb(self.device)}
        self.write(about | means | cost)
        self.bar.set_postfix({name: f"{mean:.4f}" for name, mean in means.items()}, refresh=False)
        self.values, self.clock = [], time.perf_counter()

    def end_epoch(self, values):
        """Write the line of an epoch that has ended, and the checkpoint."""
        epoch = self.count // self.steps
        self.write({"end_of_epoch": epoch, "step": self.count} | values)
        memory_mb(self.device)  # the next peak is the next epoch's
        self.save(epoch)
        if epoch == self.s.epochs:
            self.bar.close()


def read_metrics(folder):
    """The lines of a run's metrics.jsonl; what can't be read is left out: it is a log."""
    path, lines = Path(folder, "metrics.jsonl"), []
    for text in path.read_text("utf-8", "replace").splitlines() if path.exists() else []:
        with suppress(ValueError):
            lines.append(json.loads(text))
    return [line for line in lines if isinstance(line, dict)]


def cost(folder):
    """Table 3 from metrics.jsonl: the median time of a step; mean, peak and spread of memory."""
    lines = [line for line in read_metrics(folder) if "ms_per_step" in line]
    if not lines:
        return {}
    times, sizes = ([line[key] for line in lines] for key in ("ms_per_step", "memory_mb"))
    speed = {"ms_per_step": statistics.median(times[len(times) // 10 :])}  # without the warm-up
    memory = {"mean_mb": statistics.fmean(sizes), "peak_mb": max(sizes)}
    return speed | memory | {"std_mb": statistics.pstdev(sizes)}


def write_card(path, s, about):
    """A model card, as the Hub shows it; the base model is named where it has a name there."""
    on_hub = s.student != "tiny" and not Path(s.student).exists()
    facts = json.dumps({"settings": asdict(s), "cost": about["cost"]}, indent=2)
    taught = f"taught by the embeddings of `{about['teacher']}`" if about["teacher"] else "trained"
    names = {"name": Path(s.output).name, "student": s.student, "taught": taught}
    names["method"] = getattr(s, "method", "TALAS")
    names["base_model"] = f"base_model: {s.student}\n" if on_hub else ""
    card = Path(__file__).with_name("card.md").read_text("utf-8").format(facts=facts, **names)
    path.write_text(card, encoding="utf-8")


def finish(s, cache, write):
    """Let `write(folder)` write the result; add talas.json; move all into the output, whole."""
    out, draft, costs = Path(s.output), Path(s.output, ".saving"), cost(s.output)
    if rank() == 0:
        shutil.rmtree(draft, ignore_errors=True)
        draft.mkdir()
        with attempt(f"write {out}", OSError):
            write(draft)
        versions = {"torch": torch.__version__, "transformers": transformers.__version__}
        about = {"teacher": cache["teacher"], "corpus": cache["fingerprint"], "cost": costs}
        write_json(draft / "talas.json", {"settings": asdict(s), **about, "versions": versions})
        card = out / "README.md"
        if not card.exists() or CARD_MARK in card.read_text("utf-8", "replace"):
            write_card(draft / "README.md", s, about)
        for pattern in (*TOKENIZER_FILES, "adapter_config.json"):  # of what is overwritten
            for path in out.glob(pattern):
                path.unlink()
        for path in sorted(path for path in draft.rglob("*") if path.is_file()):
            (out / path.relative_to(draft)).parent.mkdir(exist_ok=True)
            os.replace(path, out / path.relative_to(draft))  # each of them whole
        shutil.rmtree(draft)
        (out / "checkpoint.pt").unlink()
    print(", ".join(f"{name} {value:.1f}" for name, value in costs.items()))
    print(f"student saved to {out}")
