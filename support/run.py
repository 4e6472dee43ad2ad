"""A run that loses nothing: files whole or not there, checkpoints, metrics, devices, processes.

Nothing here knows the paper.
"""

import hashlib
import json
import os
import pickle
import shutil
import statistics
import subprocess
import sys
import time
from contextlib import contextmanager, suppress
from dataclasses import asdict
from errno import ENOSPC
from pathlib import Path

import numpy as np
import torch
import transformers
from filelock import FileLock, Timeout
from torch import distributed
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from support import fail

LOG_EVERY = 10  # steps between two lines of metrics.jsonl
ADVICE = "try a lower --lr or --rho with another --output; the last whole epoch is kept in this one"


# ------------------------------------------------------------------ files: one line for each error
def reason(error):
    """Why something failed, in a few words: the operating system's, if it spoke, else the error's."""
    link = error
    while link is not None:  # torch.save hides a full disk behind an error of its own
        if isinstance(link, OSError) and link.strerror and (link is error or link.errno == ENOSPC):
            return link.strerror
        link = link.__cause__ or link.__context__
    if isinstance(error, pickle.UnpicklingError):
        return "it holds more than tensors and plain values"
    words = next((line for line in str(error).splitlines() if line.strip()), "")
    return words if isinstance(error, OSError) else f"{type(error).__name__}: {words}"


@contextmanager
def reading(what):
    """Make any error in this block the fault of the user's file: keep the block to reading it."""
    try:
        yield
    except Exception as error:
        fail(f"cannot read {what}: {reason(error)}")


@contextmanager
def writing(what):
    """End the program with one line if writing fails: keep the block to writing."""
    try:
        yield
    except Exception as error:
        fail(f"cannot write {what}: {reason(error)}")


@contextmanager
def whole(path):
    """A temporary path to write to; it takes the place of `path` when the block has ended well."""
    partial = Path(f"{path}.partial")
    try:
        with writing(path):
            yield partial
            os.replace(partial, path)
    finally:
        with suppress(OSError):
            partial.unlink()


def save(path, content):
    """torch.save, whole or not at all."""
    with whole(path) as partial, open(partial, "wb") as file:
        torch.save(content, file)


def load(path):
    """torch.load of tensors and plain values; runs no code of the file's, and leaves it on disk."""
    with reading(path):
        return torch.load(path, weights_only=True, mmap=True, map_location="cpu")


def write_json(path, content):
    """A JSON file, whole or not at all."""
    text = json.dumps(content, indent=2) + "\n"
    with whole(path) as partial:
        partial.write_text(text, encoding="utf-8")


def move_files(draft, folder):
    """Move a draft folder's files to where they belong, each of them whole; remove the draft."""
    for path in sorted(path for path in draft.rglob("*") if path.is_file()):
        (folder / path.relative_to(draft)).parent.mkdir(exist_ok=True)
        os.replace(path, folder / path.relative_to(draft))
    shutil.rmtree(draft)


def keep_apart(output, **inputs):
    """End the program if the output is one of the inputs: a flag's name and its path each."""
    for flag, path in inputs.items():
        with suppress(OSError, ValueError):
            if os.path.samefile(output, path):
                fail(f"--output {output} is the --{flag} itself; choose another --output")


@contextmanager
def alone(output):
    """Keep every other run from writing to this output, a file or a folder, while the block lasts."""
    if rank() > 0:  # the first process holds the lock for all
        yield
        return
    path = Path(f"{Path(output).absolute()}.lock")
    lock = FileLock(path)
    with writing(output):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            fail(f"another run is writing to {output}; choose another --output")
    try:
        yield
    finally:
        with suppress(OSError):
            path.unlink()
        lock.release()


def positive(text):
    """An integer of at least 1, for argparse."""
    if int(text) < 1:
        raise ValueError
    return int(text)


def digest(*parts):
    """A hash of text, arrays and tensors, in their order."""
    total = hashlib.sha256()
    for part in parts:
        if isinstance(part, torch.Tensor):  # by rows: a large one may lie on disk
            for rows in part.detach().reshape(-1).split(1 << 24):
                total.update(rows.cpu().view(torch.uint8).numpy())
        elif isinstance(part, np.ndarray):
            total.update(part.tobytes())
        else:
            total.update(json.dumps(part).encode())
    return total.hexdigest()


def provenance():
    """What made a result: versions, and the commit of this code if it is a checkout of its own."""
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    home, commit = Path(__file__).resolve().parent.parent, None
    with suppress(OSError, subprocess.CalledProcessError, ValueError):
        git = ["git", "-C", str(home), "rev-parse", "--show-toplevel", "HEAD"]
        output = subprocess.run(git, capture_output=True, text=True, check=True).stdout
        top, head = output.splitlines()
        commit = head if Path(top) == home else None
    return {"versions": versions | {"python": sys.version.split()[0]}, "commit": commit}


# ------------------------------------------------------------------------- devices and processes
def pick_device(name):
    """The torch device of that name; `auto` is the accelerator if there is one, else the CPU."""
    best = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else "cpu"
    try:
        probe = torch.zeros(1, device=best if name == "auto" else name)
        probe.item()  # a device that computes nothing, such as meta, fails here
        return probe.device
    except (RuntimeError, AssertionError, NotImplementedError):
        fail(f"--device {name} is not here; use auto or cpu")


def memory_mb(device):
    """Megabytes in use: an accelerator's peak since the last call, or this process's own memory."""
    if device.type != "cpu":
        peak = torch.accelerator.max_memory_allocated(device) / 2**20
        torch.accelerator.reset_peak_memory_stats(device)
        return peak
    statm = Path("/proc/self/statm")  # of Linux; elsewhere nothing is measured
    if not statm.exists():
        return 0.0
    resident, shared = map(int, statm.read_text().split()[1:3])  # shared: files, such as the cache
    return (resident - shared) * os.sysconf("SC_PAGE_SIZE") / 2**20


def rank():
    """Which of torchrun's processes this is, from 0; the first one speaks and writes."""
    return distributed.get_rank() if distributed.is_initialized() else 0


def processes():
    """How many processes torchrun started, one a device; 1 without torchrun."""
    return distributed.get_world_size() if distributed.is_initialized() else 1


@contextmanager
def joined():
    """Connect the processes that torchrun started, if it did; the first one alone speaks."""
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    if any(name not in os.environ for name in names):
        yield
        return
    with reading("torchrun's variables (RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT)"):
        local, devices = int(os.environ["LOCAL_RANK"]), torch.accelerator.device_count()
        if 0 < devices <= local:
            fail(f"torchrun started more processes than there are devices, {devices}")
        if devices:
            torch.accelerator.set_device_index(local)
        distributed.init_process_group()
    if rank() > 0:
        sys.stdout = open(os.devnull, "w")
    yield
    distributed.destroy_process_group()  # not after an error: it would wait for the others


def wait_for_processes():
    """Go on when every process has come this far."""
    if processes() > 1:
        distributed.barrier()


def seed_of(*what):
    """A seed for a stream of random numbers apart from the stream of any other `what`."""
    return int(hashlib.sha256(repr(what).encode()).hexdigest()[:15], 16)


# ------------------------------------------------------------- a training run: s are its settings
def check_output(s):
    """End the program if what is in the output folder is not to be touched."""
    keep_apart(s.output, student=s.student, teacher=s.teacher)
    out = Path(s.output)
    with writing(out):
        interrupted, finished = ((out / name).exists() for name in ("checkpoint.pt", "talas.json"))
        there = out.exists() and not (out.is_dir() and not any(out.iterdir()))
    if s.resume and not interrupted:
        fail(
            f"{out} has no checkpoint to resume from: it is {'a finished' if finished else 'no'} run"
        )
    if interrupted and not (s.resume or s.overwrite):
        fail(f"{out} holds an interrupted run; --resume it, or choose another --output")
    if there and not (s.resume or (s.overwrite and out.is_dir())):
        fail(f"{out} exists; choose another --output, or --overwrite it")


def data_parallel(module):
    """The module, averaging its gradients over the processes in each backward pass if several."""
    if processes() == 1:
        return module
    device = next(module.parameters()).device
    ids = None if device.type == "cpu" else [device]
    # BERT's pooler, for one, is never used
    return DistributedDataParallel(module, device_ids=ids, find_unused_parameters=True)


class Checkpoint:
    """All that a run needs to go on after an interruption as if nothing had happened.

    parts: a dict of what has a state_dict; corpus: a hash of what the run learns from.
    """

    def __init__(self, s, corpus, parts):
        self.path, self.resume, self.parts = f"{s.output}/checkpoint.pt", s.resume, parts
        own = ("resume", "overwrite", "output", "device")
        self.facts = {f"--{k}": v for k, v in asdict(s).items() if k not in own}
        self.facts |= {"corpus or tokenizer": corpus, "number of processes": processes()}

    def begin(self):
        """Save the beginning and return 0, or go back to a saved state and return its epoch."""
        if not self.resume:
            with writing(self.path):
                Path(self.path).parent.mkdir(exist_ok=True)
            return self.save(0)
        saved = load(self.path)
        with reading(self.path):
            for name, now in self.facts.items():
                if now != (before := saved["facts"][name]):
                    fail(f"--resume with another {name}: it was {before}, now it is {now}")
            for name, part in self.parts.items():
                part.load_state_dict(saved["states"][name])
            return saved["epoch"]

    def save(self, epoch):
        """Write the state after `epoch` epochs, whole or not at all; returns the epoch."""
        states = {name: part.state_dict() for name, part in self.parts.items()}
        if not all(w.isfinite().all() for w in states["weights"].values()):
            fail(f"epoch {epoch} left weights that are not finite; {ADVICE}")
        if rank() == 0:
            save(self.path, {"epoch": epoch, "facts": self.facts, "states": states})
        return epoch


def progress(total, unit, label=None, initial=0):
    """A progress bar with the time left; renewed every half minute where no one watches."""
    pace = {"mininterval": 0.1} if sys.stderr.isatty() else {"delay": 30, "mininterval": 30}
    about = {"total": total, "unit": unit, "desc": label, "initial": initial} | pace
    return tqdm(dynamic_ncols=True, disable=rank() > 0, **about)


def read_metrics(folder, last_step=float("inf")):
    """The lines of metrics.jsonl up to that step; what can't be read is left out: a log, no more."""
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
        self.path, self.names, self.steps, self.device = (
            f"{s.output}/metrics.jsonl",
            names,
            steps,
            device,
        )
        self.count, self.values = epoch * steps, []
        self.bar = progress(s.epochs * steps, "step", initial=self.count)
        self.write(*read_metrics(s.output, self.count), mode="w")

    def write(self, *lines, mode="a"):
        """Append lines to metrics.jsonl."""
        if rank() == 0:
            with writing(self.path), open(self.path, mode, encoding="utf-8") as file:
                file.writelines(json.dumps(line) + "\n" for line in lines)

    def step(self, values, lr):
        """Take one step's values, a tensor; the host waits for them only when a line is due."""
        if not self.values:
            self.clock = time.perf_counter()
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
        self.values = []

    def epoch(self, **values):
        """Write the line of an epoch that has ended."""
        self.write({"end_of_epoch": self.count // self.steps, "step": self.count} | values)
        memory_mb(self.device)  # the next peak is the next epoch's


def cost(folder):
    """Table 3 from metrics.jsonl: the median time of a step, the mean, peak and spread of memory."""
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
    out, draft = Path(s.output), Path(s.output) / ".saving"
    costs = cost(out)
    if rank() == 0:
        with writing(out):
            write(draft, *what)
            record = {"settings": asdict(s), **about, "cost": costs, **provenance()}
            (draft / "talas.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
            move_files(draft, out)
            (out / "checkpoint.pt").unlink()
    print(", ".join(f"{name} {value:.1f}" for name, value in costs.items()))
    print(f"student saved to {out}")
