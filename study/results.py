"""results.json: a line a run, with every score, the settings, the versions and the curves."""

from support.files import attempt, whole
from support.run import read_metrics

import json
import platform
import tempfile
from pathlib import Path

import torch
from filelock import FileLock

RESULTS = Path(__file__).parent / "results.json"
AVERAGES = {"avg_in": "Avg-In", "avg_out": "Avg-Out", "avg": "Avg"}
NAMES = {"banking77": "Banking77", "mrpc": "MRPC", "scitail": "SciTail", "wic": "WiC"}
NAMES |= {"tweet": "Tweet", "emotion": "Emotion", "sick": "SICK", "sts12": "STS12", "stsb": "STS-B"}
HISTORY = ["step", "simcse", "tamd", "lasd", "distillation", "sharpness_gap"]


def read_json(path):
    """What a JSON file holds; an empty dict if there is no such file."""
    with attempt(f"read {path}"):
        return json.loads(Path(path).read_text("utf-8")) if Path(path).exists() else {}


def record(path, key, entry):
    """Add an entry to results.json; the file is whole at any time, whoever else adds to it."""
    with FileLock(Path(tempfile.gettempdir(), "talas-study.lock")):
        results = read_json(path) | {key: entry}
        lines = [f"{json.dumps(k)}: {json.dumps(results[k])}" for k in sorted(results)]
        with whole(path) as partial:
            partial.write_text("{\n" + ",\n".join(lines) + "\n}\n", "utf-8")


def portable(settings):
    """Settings without what belongs to one machine: paths become names, the output goes."""
    own = ("output", "overwrite", "resume", "device", "sharpness")
    kept = {key: value for key, value in settings.items() if key not in own}
    for key, value in kept.items():
        if isinstance(value, str) and (Path(value).is_absolute() or Path(value).exists()):
            kept[key] = Path(value).name
    return kept


def machine():
    """The accelerator's name, or the kind of processor: what times are of."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"{platform.machine()}, {torch.get_num_threads()} threads"


def describe(out):
    """What a training left in its folder beside the weights: settings, versions, cost, curves."""
    told, lines = read_json(out / "talas.json"), read_metrics(out)
    steps = [line for line in lines if "loss" in line and line["step"] % 50 == 0]
    kept = [key for key in HISTORY if all(key in line for line in steps)]
    ends = [line for line in lines if line.get("lambda_max") is not None]
    if not torch.accelerator.is_available():  # on a CPU the process holds earlier runs' memory, too
        told["cost"] = {"ms_per_step": told["cost"].get("ms_per_step")}
    return told | {
        "settings": portable(told["settings"]),
        "teacher": Path(told["teacher"]).name,
        "machine": machine(),
        "history": {key: [round(line[key], 6) for line in steps] for key in kept},
        "lambda_max": {str(line["end_of_epoch"]): line["lambda_max"] for line in ends},
    }


def runs(results, pair, row):
    """{seed: entry} of a row of a pair, in the seeds' order."""
    found = [e for e in results.values() if (e.get("pair"), e.get("row")) == (pair, row)]
    return {entry["seed"]: entry for entry in sorted(found, key=lambda entry: entry["seed"])}


def curves(results, pair, row, key):
    """{seed: {epoch: value}} of what a row's runs keep by epoch; runs without it are left out."""
    return {seed: e[key] for seed, e in runs(results, pair, row).items() if e.get(key)}


def pairs(results):
    """The pairs that there are runs of."""
    return list(dict.fromkeys(entry["pair"] for entry in results.values() if "pair" in entry))
