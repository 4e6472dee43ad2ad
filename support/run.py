"""A training run that loses nothing: devices, processes, checks, checkpoints, metrics.

`s` are the run's settings (talas.Settings).
"""

from support import fail
from support.files import alone, attempt, keep_apart, load, save, write_json

import hashlib
import json
import os
import shutil
import statistics
import sys
import time
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import asdict
from pathlib import Path

import torch
import transformers
from torch import distributed
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

LOG_EVERY = 10  # steps between two lines of metrics.jsonl
ADVICE = "try a lower --lr or --rho with another --output; the last whole epoch is kept in this one"


# ------------------------------------------------------------------------- devices and processes
def accelerator():
    """The accelerator that `auto` takes, or None. A Mac's is left out: it was never tried."""
    found = torch.accelerator.current_accelerator(check_available=True)
    return None if found is None or found.type == "mps" else found


def pick_device(name):
    """The torch device of that name; `auto` is the accelerator if there is one, else the CPU."""
    with attempt(f"use --device {name} (auto and cpu always work)"):
        probe = torch.zeros(1, device=(accelerator() or "cpu") if name == "auto" else name)
        probe.item()  # a device that computes nothing, such as meta, fails here
        return probe.device


def memory_mb(device):
    """Megabytes in use: an accelerator's peak since the last call, or this process's own memory."""
    if device.type != "cpu":
        peak = torch.accelerator.max_memory_allocated(device) / 2**20
        torch.accelerator.reset_peak_memory_stats(device)
        return peak
    statm = Path("/proc/self/statm")  # of Linux; elsewhere nothing is measured
    pages = statm.read_text().split() if statm.exists() else [0, 0, 0]
    own = int(pages[1]) - int(pages[2])  # without files, such as the cache
    return own * os.sysconf("SC_PAGE_SIZE") / 2**20 if own else 0.0


def rank():
    """Which of torchrun's processes this is, from 0; the first one speaks and writes."""
    return distributed.get_rank() if distributed.is_initialized() else 0


def processes():
    """How many processes torchrun started, one a device; 1 without torchrun."""
    return distributed.get_world_size() if distributed.is_initialized() else 1


@contextmanager
def started(s):
    """A run that has its output to itself, and its processes connected; says what to do if stopped.

    The first process alone speaks and writes.
    """
    try:
        with joined(s.device), alone(s.output) if rank() == 0 else nullcontext():
            yield
    except KeyboardInterrupt:
        kept = Path(s.output, "checkpoint.pt").exists()
        advice = "with --resume goes on from the last whole epoch" if kept else "begins again"
        fail(f"interrupted; the same command {advice}")
    except torch.OutOfMemoryError:
        fail("the device is out of memory; try a smaller --batch_size or --max_length")


@contextmanager
def joined(device):
    """Connect the processes that torchrun started, if it did; device: the setting."""
    names = {"RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}
    if not names <= os.environ.keys():
        yield
        return
    with attempt(f"join torchrun's processes by {', '.join(sorted(names))}"):
        local = int(os.environ["LOCAL_RANK"])
        on_cpu = device == "cpu" or accelerator() is None
        devices = 0 if on_cpu else torch.accelerator.device_count()
        if 0 < devices <= local or ":" in device:
            fail(f"torchrun needs a device for each process: there are {devices}, not --device X:N")
        if devices:
            torch.accelerator.set_device_index(local)
        distributed.init_process_group("gloo" if on_cpu else None)
    if rank() > 0:
        sys.stdout = open(os.devnull, "w")
    yield
    distributed.destroy_process_group()  # not after an error: it would wait for the others


def data_parallel(module):
    """The module; with several processes, each backward pass averages its gradients over them."""
    if processes() == 1:
        return module
    device = next(module.parameters()).device
    devices = None if device.type == "cpu" else [device]
    # some weights are never used, such as those of BERT's pooler
    return DistributedDataParallel(module, device_ids=devices, find_unused_parameters=True)


def share(batches):
    """Of an epoch's batches, those of this process: each process gets as many."""
    return batches[rank() :: processes()][: len(batches) // processes()]


def seed_of(*what):
    """A seed for a stream of random numbers apart from the stream of any other `what`."""
    return int(hashlib.sha256(repr(what).encode()).hexdigest()[:15], 16)


def seed_dropout(seed, epoch):
    """Seed an epoch's dropout: a resumed epoch draws the same masks, each process its own."""
    torch.manual_seed(seed_of(seed, epoch, rank(), "dropout"))


# ---------------------------------------------------------------------- before a run: is it sound?
def check_settings(s, also_0=()):
    """End the program if a setting has no meaning; also_0: more names of what may be 0."""
    may_be_0 = ("lambda1", "lambda2", "lambda3", "lasd_layers", "rho", "eta", "disam_lambda")
    may_be_0 += ("weight_decay", "warmup_ratio", "seed", *also_0)
    for name, value in asdict(s).items():
        is_number = type(value) in (int, float)
        if is_number and not (0 <= value < 2**63 and (value or name in may_be_0)):
            least = "at least" if name in may_be_0 else "above"
            fail(f"--{name} {value}: it must be {least} 0 and less than 2**63")
    if not s.output:
        fail("--output '': give the folder for the student a name")
    if s.warmup_ratio > 1:
        fail(f"--warmup_ratio {s.warmup_ratio}: it is a part of the steps, at most 1")
    if s.lambda1 == s.lambda2 == s.lambda3 == 0:
        fail("--lambda1, --lambda2 and --lambda3 are all 0: there is nothing to learn")
    if s.batch_size == 1 and s.lambda1 + s.lambda3 > 0:
        fail("--batch_size 1: Eqs. 5 and 6 compare the sentences of a batch; take more")
    if s.lasd_layers == 1:
        fail("--lasd_layers 1: Eq. 5 chains two layers or more; 0 means all")
    if s.max_length < 3:
        fail(f"--max_length {s.max_length}: no token is left between the first and the last")


def check_fit(s, student, n):
    """End the program if the settings do not fit the student or the corpus of n sentences."""
    L = student.layers
    if n < s.batch_size * processes():
        fail(f"--batch_size {s.batch_size}: the corpus has only {n} sentences")
    if len(set(student.widths)) > 1:
        fail(f"{s.student}: its layers have unlike widths, {student.widths}; take another student")
    if s.lambda2 and s.anchored_layers > L:
        fail(f"--anchored_layers {s.anchored_layers}: {s.student} has {L} layers")
    if s.lambda3 and max(s.lasd_layers, 2) > L:
        fail(f"--lasd_layers {s.lasd_layers}: {s.student} has {L} layers; --lambda3 0 skips LASD")


def check_output(s):
    """End the program if what is in the output folder is not to be touched."""
    if rank() > 0:
        return  # the first process may be writing already
    keep_apart(s.output, student=s.student, teacher=s.teacher)
    out = Path(s.output)
    with attempt(f"write {out}"):
        interrupted, finished = ((out / name).exists() for name in ("checkpoint.pt", "talas.json"))
        empty = not out.exists() or (out.is_dir() and not any(out.iterdir()))
    if s.resume and not interrupted:
        fail(f"{out} has no checkpoint to resume: it is {'a finished' if finished else 'no'} run")
    if interrupted and not (s.resume or s.overwrite):
        fail(f"{out} holds an interrupted run; --resume it, --overwrite it, or change --output")
    if not (empty or s.resume or (s.overwrite and out.is_dir())):
        fail(f"{out} exists; choose another --output, or --overwrite it")


# ----------------------------------------------------------------------------- on the way and after
class Checkpoint:
    """All that a run needs to go on after an interruption as if nothing had happened.

    parts: a dict of what has a state_dict; corpus: a hash of what the run learns from.
    """

    def __init__(self, s, corpus, parts):
        self.path, self.resume, self.parts = Path(s.output, "checkpoint.pt"), s.resume, parts
        own = ("resume", "overwrite", "output", "device", "teacher")
        self.facts = {f"--{name}": value for name, value in asdict(s).items() if name not in own}
        self.facts |= {"corpus or tokenizer": corpus, "number of processes": processes()}

    def begin(self):
        """Save the beginning and return 0, or go back to a saved state and return its epoch."""
        if not self.resume:
            with attempt(f"write {self.path}"):
                self.path.parent.mkdir(exist_ok=True)
            self.save(0)
            return 0
        saved = load(self.path)
        with attempt(f"read {self.path}"):
            for name, now in self.facts.items():
                if now != (before := saved["facts"][name]):
                    fail(f"--resume with another {name}: it was {before}, now it is {now}")
            for name, part in self.parts.items():
                part.load_state_dict(saved["states"][name])
            return saved["epoch"]

    def save(self, epoch):
        """Write the state after `epoch` epochs, whole or not at all."""
        states = {name: part.state_dict() for name, part in self.parts.items()}
        if not all(weights.isfinite().all() for weights in states["weights"].values()):
            fail(f"epoch {epoch} left weights that are not finite; {ADVICE}")
        if rank() == 0:
            save(self.path, {"epoch": epoch, "facts": self.facts, "states": states})


def progress(total, unit, label=None, initial=0):
    """A progress bar with the time left; renewed every half minute where no one watches."""
    pace = {"mininterval": 0.1} if sys.stderr.isatty() else {"delay": 30, "mininterval": 30}
    about = {"total": total, "unit": unit, "desc": label, "initial": initial} | pace
    return tqdm(dynamic_ncols=True, disable=rank() > 0, **about)


def read_metrics(folder, last_step=float("inf")):
    """The lines of metrics.jsonl up to that step; what can't be read is left out: it is a log."""
    lines = []
    with suppress(OSError):
        for text in Path(folder, "metrics.jsonl").read_text("utf-8", "replace").splitlines():
            with suppress(ValueError, TypeError, KeyError, RecursionError):
                line = json.loads(text)
                lines += [line] if line["step"] <= last_step else []
    return lines


class Log:
    """The progress bar and metrics.jsonl: a line every LOG_EVERY steps and one an epoch."""

    def __init__(self, s, names, steps, epoch, device):
        """names: of a step's values; steps: of an epoch; epoch: how many were done before."""
        self.path, self.device, self.names = f"{s.output}/metrics.jsonl", device, names
        self.steps, self.count, self.values = steps, epoch * steps, []
        self.bar = progress(s.epochs * steps, "step", initial=self.count)
        self.write(*read_metrics(s.output, self.count), mode="w")
        memory_mb(device)  # the first peak is of training, not of what this process did before

    def write(self, *lines, mode="a"):
        """Append lines to metrics.jsonl."""
        if rank() == 0:
            with attempt(f"write {self.path}"), open(self.path, mode, encoding="utf-8") as file:
                file.writelines(json.dumps(line) + "\n" for line in lines)

    def begin(self):
        """Start the clock, before the first step of an epoch."""
        self.clock = time.perf_counter()

    def step(self, values, lr):
        """Take one step's values, a tensor; the host waits for them only when a line is due."""
        self.values.append(values)
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
            fail(f"step {step}: {self.names[column]} is not finite; {ADVICE}")
        means = dict(zip(self.names, rows.mean(0).tolist()))
        about = {"step": self.count, "epoch": -(-self.count // self.steps)}
        cost = {"lr": lr, "ms_per_step": ms, "memory_mb": memory_mb(self.device)}
        self.write(about | means | cost)
        self.bar.set_postfix({name: f"{means[name]:.4f}" for name in self.names[:4]}, refresh=False)
        self.values, self.clock = [], time.perf_counter()

    def epoch(self, **values):
        """Write the line of an epoch that has ended."""
        self.write({"end_of_epoch": self.count // self.steps, "step": self.count} | values)
        memory_mb(self.device)  # the next peak is the next epoch's


def cost(folder):
    """Table 3 from metrics.jsonl: the median time of a step; mean, peak and spread of memory."""
    lines = read_metrics(folder)
    times = [line["ms_per_step"] for line in lines if "ms_per_step" in line]
    sizes = [line["memory_mb"] for line in lines if "memory_mb" in line]
    if not times or not sizes:
        return {}
    speed = {"ms_per_step": statistics.median(times[len(times) // 10 :])}  # without the warm-up
    memory = {"mean_mb": statistics.fmean(sizes), "peak_mb": max(sizes)}
    return speed | memory | {"std_mb": statistics.pstdev(sizes)}


def finish(s, about, write, *what):
    """Let `write(folder, *what)` write the result; add talas.json; move all into the output."""
    out, draft, costs = Path(s.output), Path(s.output, ".saving"), cost(s.output)
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    if rank() == 0:
        with attempt(f"write {out}"):
            shutil.rmtree(draft, ignore_errors=True)
            write(draft, *what)
            record = {"settings": asdict(s), **about, "cost": costs, "versions": versions}
            write_json(draft / "talas.json", record)
            for path in sorted(path for path in draft.rglob("*") if path.is_file()):
                (out / path.relative_to(draft)).parent.mkdir(exist_ok=True)
                os.replace(path, out / path.relative_to(draft))  # each of them whole
            shutil.rmtree(draft)
            (out / "checkpoint.pt").unlink()
    print(", ".join(f"{name} {value:.1f}" for name, value in costs.items()))
    print(f"student saved to {out}")
