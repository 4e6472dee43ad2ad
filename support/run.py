"""Everything around training: devices, processes, checks, checkpoints, metrics.

`s` is always the run's settings (talas.Settings).
"""

import json
import math
import os
import shutil
import sys
import time
from dataclasses import asdict
from pathlib import Path

import torch
import transformers
from torch import distributed
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from support import attempt, fail
from support.files import digest, keep_apart, load, save, write_json

LOG_EVERY = 10  # steps between two lines of metrics.jsonl
RESUME_ADVICE = "run the same command with --resume (without it if there is no output yet)"
ABOVE_0 = {  # settings, also of study/'s methods, that must be above 0; other numbers may be 0
    "temperature",
    "student_temperature",
    "teacher_temperature",
    "anchored_layers",
    "lr",
    "projection_lr_scale",
    "epochs",
    "batch_size",
    "max_length",
}
# these may differ when a run resumes: the content of teacher and student is compared instead
MAY_DIFFER = {"resume", "overwrite", "output", "device", "teacher", "student"}
CARD_MARK = "talas.py rewrites this card"


# ------------------------------------------------------------------------- devices and processes
def pick_device(name):
    """The torch device of that name; `auto` is the accelerator if there is one, else the CPU."""
    if name == "auto":
        accelerator = torch.accelerator.current_accelerator(check_available=True)
        usable = accelerator and accelerator.type != "mps"  # a Mac's was never tried
        name = accelerator if usable else "cpu"
    with attempt(f"use --device {name}", RuntimeError, AssertionError):
        return torch.zeros(1, device=name).device


def memory_mb(device):
    """Megabytes in use: an accelerator's peak since the last call; on a CPU, the memory now."""
    if device.type != "cpu":
        peak = torch.accelerator.max_memory_allocated(device) / 2**20
        torch.accelerator.reset_peak_memory_stats(device)
        return peak
    statm = Path("/proc/self/statm")
    if not statm.exists():  # only Linux has it
        return 0.0
    resident, shared = map(int, statm.read_text().split()[1:3])  # shared: the cache, a mapped file
    return (resident - shared) * os.sysconf("SC_PAGE_SIZE") / 2**20


def rank():
    """The number of this process, from 0. The first one writes and prints."""
    return int(os.environ.get("RANK", 0)) if processes() > 1 else 0


def processes():
    """How many processes torchrun started, one a device; 1 without torchrun."""
    return int(os.environ.get("WORLD_SIZE", 1))


def start_processes(s):
    """Under torchrun: connect this process with the others, and silence all but the first."""
    if processes() == 1:
        return
    if s.device != "cpu" and torch.accelerator.is_available():
        torch.accelerator.set_device_index(int(os.environ["LOCAL_RANK"]))
    distributed.init_process_group()
    if rank() > 0:
        sys.stdout = open(os.devnull, "w")


def stop_processes():
    """Under torchrun: disconnect this process from the others."""
    if processes() > 1:
        distributed.destroy_process_group()


def data_parallel(objective):
    """The objective; under torchrun in DDP's wrapper, whose backward pass averages gradients."""
    if processes() == 1:
        return objective
    # some weights get no gradient, such as those of BERT's pooler
    return DistributedDataParallel(objective, find_unused_parameters=True)


def batches_of_this_process(batches):
    """Every n-th of an epoch's batches, for n processes; each process gets the same number."""
    steps = len(batches) // processes()
    return batches[rank() :: processes()][:steps]


def seed_of(*parts):
    """A seed for one stream of random numbers: other parts give another stream."""
    return int(digest(repr(parts).encode())[:15], 16)


# ---------------------------------------------------------------------- before a run: is it sound?
def check_settings(s):
    """End the program if a setting has no meaning."""
    for name, value in asdict(s).items():
        if name in ABOVE_0 and not value > 0:  # or NaN
            fail(f"--{name} {value}: it must be above 0")
        if type(value) in (int, float) and not value >= 0:
            fail(f"--{name} {value}: it must be at least 0")
    if s.warmup_ratio > 1:
        fail(f"--warmup_ratio {s.warmup_ratio}: it is a fraction of the steps, at most 1")
    if s.lambda1 == s.lambda2 == s.lambda3 == 0:
        fail("--lambda1, --lambda2 and --lambda3 are all 0: there is nothing to learn")
    if s.batch_size == 1 and s.lambda1 + s.lambda3 > 0:
        fail("--batch_size 1: Eqs. 5 and 6 compare the sentences of a batch; use a larger one")


def check_fit(s, corpus):
    """End the program if the settings do not fit the student or the corpus."""
    L = corpus.encoder.layers
    if len(corpus) < s.batch_size * processes():
        fail(
            f"--batch_size {s.batch_size}, processes: {processes()}; the corpus has only "
            f"{len(corpus)} sentences"
        )
    if s.lambda2 and s.anchored_layers > L:
        fail(f"--anchored_layers {s.anchored_layers}: {s.student} has {L} layers")
    chained_layers = s.lasd_layers or L
    if s.lambda3 and not 2 <= chained_layers <= L:
        fail(
            f"--lasd_layers {s.lasd_layers}: Eq. 5 chains two or more of {s.student}'s {L} layers;"
            " --lambda3 0 skips LASD"
        )


def interrupted(folder):
    """Whether a folder holds an unfinished run: talas.json is written last."""
    return (folder / "metrics.jsonl").exists() and not (folder / "talas.json").exists()


def check_output_folder(s):
    """End the program if the output folder holds something that must not be touched."""
    keep_apart(s.output, "--student", s.student)
    out = Path(s.output)
    names = {path.name for path in out.glob("*")}
    if s.resume:
        if not interrupted(out):
            fail(f"--resume: {out} holds no interrupted run; check --output")
        return
    if out.is_file() or (names and "metrics.jsonl" not in names):
        fail(f"--output {out} holds something other than a run; use another --output")
    if names and not s.overwrite:
        fail(
            f"--output {out} holds a run; --resume continues an interrupted one, --overwrite "
            "replaces it; or use another --output"
        )


# ----------------------------------------------------------------------------- checkpoint and log
class Checkpoint:
    """checkpoint.pt: the state after a completed epoch, and what the run depends on.

    The state includes the length of metrics.jsonl, which is cut there when the run resumes.
    """

    def __init__(self, s, corpus, objective, optimizer, scheduler):
        self.path = Path(s.output, "checkpoint.pt")
        self.log = self.path.with_name("metrics.jsonl")
        self.resume = s.resume
        self.parts = {"weights": objective, "adamw": optimizer, "scheduler": scheduler}
        self.facts = {
            f"--{key}": value for key, value in asdict(s).items() if key not in MAY_DIFFER
        }
        self.facts["student or corpus"] = corpus.identity()
        self.facts["number of processes"] = processes()

    def start_or_resume(self):
        """The number of completed epochs: with --resume the saved state is loaded, else it is 0."""
        if not self.resume:
            for name in ("checkpoint.pt", "talas.json"):  # an earlier run's, which is overwritten
                self.path.with_name(name).unlink(missing_ok=True)
        if not self.path.exists():
            self.path.parent.mkdir(exist_ok=True)
            self.log.write_text("")
            return 0
        saved = load(self.path, mmap=False)
        for name, value in self.facts.items():
            saved_value = saved["facts"].get(name)
            if value != saved_value:
                fail(f"--resume with another {name}: it was {saved_value}, now it is {value}")
        for name, part in self.parts.items():
            part.load_state_dict(saved["states"][name])
        os.truncate(self.log, saved["log_size"])
        return saved["epoch"]

    def save(self, epoch):
        """Write the state after `epoch` epochs, whole or not at all."""
        if rank() > 0:
            return
        content = {
            "epoch": epoch,
            "facts": self.facts,
            "states": {name: part.state_dict() for name, part in self.parts.items()},
            "log_size": self.log.stat().st_size,
        }
        save(self.path, content)


def progress(total, unit, label=None, initial=0):
    """A progress bar with the time left; where no one watches, a line every half minute."""
    seconds = 0.1 if sys.stderr.isatty() else 30
    return tqdm(
        total=total,
        unit=unit,
        desc=label,
        initial=initial,
        mininterval=seconds,
        delay=seconds,
        disable=rank() > 0,
    )


class Log:
    """metrics.jsonl, a line every ten steps and one every epoch; and the progress bar."""

    def __init__(self, s, steps, first_epoch, device):
        """steps: an epoch's, in each process."""
        self.path = Path(s.output, "metrics.jsonl")
        self.steps = steps
        self.device = device
        self.count = first_epoch * steps  # steps that are done
        self.values = []  # of the steps since the last line
        self.bar = progress(s.epochs * steps, "step", initial=self.count)

    def write(self, line):
        """Append a line to metrics.jsonl."""
        if rank() == 0:
            with open(self.path, "a") as file:
                file.write(json.dumps(line) + "\n")

    def begin_epoch(self):
        """Start the clock, and the count of an accelerator's peak memory."""
        memory_mb(self.device)
        self.clock = time.perf_counter()

    def step(self, values, lr):
        """Take one step's {name: scalar}; the host waits for them only when a line is due."""
        self.values.append(torch.stack(list(values.values())))
        self.count += 1
        self.bar.update()
        if self.count % LOG_EVERY == 0 or self.count % self.steps == 0:
            self.write_means(list(values), lr)

    def write_means(self, names, lr):
        """Write the line of the steps since the last one: means over steps and processes."""
        rows = torch.stack(self.values)  # (steps, names)
        if processes() > 1:
            distributed.all_reduce(rows)
        if not rows.isfinite().all():
            self.bar.close()
            fail(
                f"the loss is not finite at step {self.count} or before; try a lower --lr or "
                "--rho, with another --output"
            )
        means = dict(zip(names, (rows.mean(0) / processes()).tolist()))
        seconds = time.perf_counter() - self.clock
        line = {
            "step": self.count,
            "epoch": math.ceil(self.count / self.steps),
            "lr": lr,
            "ms_per_step": 1000 * seconds / len(rows),
            "memory_mb": memory_mb(self.device),
        }
        self.write(line | means)
        self.values = []
        self.clock = time.perf_counter()

    def end_epoch(self, values):
        """Write the line of an epoch, with these {name: number}."""
        line = {"end_of_epoch": self.count // self.steps, "step": self.count}
        self.write(line | values)


# ------------------------------------------------------------------------------ what a run leaves
def write_card(path, s, teacher):
    """A model card for the Hub; it names the base model if the student came from the Hub."""
    base_model = ""
    if s.student != "tiny" and not Path(s.student).exists():
        base_model = f"base_model: {s.student}\n"
    template = Path(__file__).with_name("card.md").read_text("utf-8")
    card = template.format(
        s=s,
        name=Path(s.output).name,
        teacher=teacher,
        method=getattr(s, "method", "TALAS"),
        base_model=base_model,
    )
    path.write_text(card, "utf-8")


def publish(s, cache, draft):
    """Add the card to a draft, move its files into the output folder, and write talas.json."""
    out = Path(s.output)
    record = {
        "settings": asdict(s),
        "teacher": cache["teacher"],
        "corpus": cache["fingerprint"],
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
    }
    card = out / "README.md"
    if not card.exists() or CARD_MARK in card.read_text("utf-8", "replace"):
        write_card(draft / "README.md", s, cache["teacher"])
    shutil.copytree(draft, out, copy_function=os.replace, dirs_exist_ok=True)  # moves whole files
    shutil.rmtree(draft)
    write_json(out / "talas.json", record)
    (out / "checkpoint.pt").unlink()
    print(f"student saved to {out}")
