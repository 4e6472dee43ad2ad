"""results.json, an entry a run; pairs.csv; rows.csv: what a run can be; claims, bench, table3."""

import argparse
import json
import platform
import tempfile
from itertools import product
from pathlib import Path

import torch
from filelock import FileLock

from support import attempt, fail
from support.data import read_table
from support.files import whole
from support.run import read_metrics

HERE = Path(__file__).parent
PAIRS, ROWS, CLAIMS, BENCH, TABLE3 = (
    {next(iter(row.values())): row for row in read_table(HERE / f"{name}.csv")}
    for name in ("pairs", "rows", "claims", "bench", "table3")
)
UNTRAINED = ("teacher", "before")
AVERAGES = {"avg_in": "Avg-In", "avg_out": "Avg-Out", "avg": "Avg"}
NAMES = {"banking77": "Banking77", "mrpc": "MRPC", "scitail": "SciTail", "wic": "WiC"} | AVERAGES
NAMES |= {"tweet": "Tweet", "emotion": "Emotion", "sick": "SICK", "sts12": "STS12", "stsb": "STS-B"}
HISTORY = ["step", "simcse", "tamd", "lasd", "distillation", "sharpness_gap"]


def command_line(doc):
    """A parser whose mistakes are one line, with the flag --results; and its add_argument."""
    parser = argparse.ArgumentParser(description=doc.split("\n")[0], allow_abbrev=False)
    parser.error = fail
    parser.add_argument("--results", default=f"{HERE}/results.json", help="the results file")
    return parser, parser.add_argument


class Entry(dict):
    """An object in a JSON file, which ends the program when it is asked for a key it lacks."""

    def __missing__(self, key):
        fail(f"the results lack {key!r} in {json.dumps(self)[:100]} ...")


def read_json(path):
    """The object in a JSON file, an Entry; an empty one if there is no such file."""
    with attempt(f"read {path}"):
        text = Path(path).read_text("utf-8") if Path(path).exists() else "{}"
        content = json.loads(text, object_hook=Entry)
    return content if isinstance(content, Entry) else fail(f"{path} holds no JSON object")


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
    processor = f"{platform.machine()}, {torch.get_num_threads()} threads"
    return torch.cuda.get_device_name() if torch.cuda.is_available() else processor


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
        "teacher": Path(told["teacher"] or "").name,
        "machine": machine(),
        "history": {key: [round(line[key], 6) for line in steps] for key in kept},
        "lambda_max": {str(line["end_of_epoch"]): line["lambda_max"] for line in ends},
    }


def runs(results):
    """{pair: {row: the entries of its runs, in the seeds' order}}, of what there are runs of."""
    own = sorted((e for e in results.values() if "pair" in e), key=lambda entry: entry["seed"])
    found = {}
    for pair, row in product(sorted({entry["pair"] for entry in own}), ROWS):
        if some := [e for e in own if (e["pair"], e["row"]) == (pair, row)]:
            found.setdefault(pair, {})[row] = some
    return found


def scores(runs, task="avg"):
    """{seed: score} of a task or an average; runs whose average is of no task are left out."""
    return {e["seed"]: e["scores"][task] for e in runs if e["scores"][task] is not None}
