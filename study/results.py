"""results.json, with an entry for each run; and the tables that name what can be run and shown.

pairs.csv: teachers and students; rows.csv: what a run can be; claims.csv: which row is compared
with which; bench.csv and table3.csv: the benchmark; start.csv: the table of how W starts.
"""

import argparse
import json
import platform
from itertools import product
from operator import itemgetter
from pathlib import Path

import torch
from filelock import FileLock

from support import fail
from support.data import read_table
from support.files import read_json, whole
from support.run import read_metrics

HERE = Path(__file__).parent


def read_rows(name):
    """The rows of study/NAME.csv, each under the content of its first column."""
    return {next(iter(row.values())): row for row in read_table(HERE / f"{name}.csv")}


PAIRS = read_rows("pairs")
ROWS = read_rows("rows")
CLAIMS = read_rows("claims")
BENCH = read_rows("bench")
TABLE3 = read_rows("table3")
START = read_rows("start")
STARTS = list(START["distill"])[2:]  # columns, after the method and the untrained student
UNTRAINED = ("teacher", "before")  # rows that need no training
AVERAGES = ("avg_in", "avg_out", "avg")
NAMES = {
    "banking77": "Banking77",
    "tweet": "Tweet",
    "emotion": "Emotion",
    "mrpc": "MRPC",
    "scitail": "SciTail",
    "wic": "WiC",
    "sick": "SICK",
    "sts12": "STS12",
    "stsb": "STS-B",
    "avg_in": "Avg-In",
    "avg_out": "Avg-Out",
    "avg": "Avg",
}
HISTORY = ("step", "simcse", "tamd", "lasd", "distillation", "sharpness_gap")  # kept of metrics
NOT_COMPARED = ("output", "overwrite", "resume", "device", "sharpness")  # these change no student


def command_line(doc):
    """A parser for a module's command line: --results, and errors in one line."""
    parser = argparse.ArgumentParser(description=doc.split("\n")[0], allow_abbrev=False)
    parser.error = fail
    parser.add_argument("--results", default=f"{HERE}/results.json", help="the results file")
    return parser


def record(path, key, entry):
    """Put an entry into the results file, a line each. Several processes may do so at a time."""
    with FileLock(f"{path}.lock"):
        entries = read_json(Path(path))
        entries[key] = entry
        lines = [f"{json.dumps(name)}: {json.dumps(entries[name])}" for name in sorted(entries)]
        with whole(path) as partial:
            partial.write_text("{\n" + ",\n".join(lines) + "\n}\n", "utf-8")


def portable(settings):
    """The settings that make a student what it is, with names in the place of paths."""
    kept = {}
    for name, value in settings.items():
        if name in NOT_COMPARED:
            continue
        if isinstance(value, str) and (Path(value).is_absolute() or Path(value).exists()):
            value = Path(value).name
        kept[name] = value
    return kept


def machine():
    """What times were measured on: the accelerator's name, or the kind of processor."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"{platform.machine()}, {torch.get_num_threads()} threads"


def describe(folder):
    """What a training left in its folder beside the weights: settings, versions, cost, curves."""
    about = read_json(folder / "talas.json", needed=True)
    about["settings"] = portable(about["settings"])
    about["teacher"] = Path(about["teacher"] or "").name
    about["machine"] = machine()
    about["cost"] = {"ms_per_step": about["cost"].get("ms_per_step")}  # memory is of all runs
    lines = read_metrics(folder)
    steps = [line for line in lines if "loss" in line and line["step"] % 50 == 0]
    about["history"] = {}
    for name in HISTORY:
        if all(name in line for line in steps):
            about["history"][name] = [round(line[name], 6) for line in steps]
    about["lambda_max"] = {}
    for line in lines:
        if "lambda_max" in line:
            about["lambda_max"][str(line["end_of_epoch"])] = line["lambda_max"]
    return about


def runs(entries):
    """{pair: {row: entries of its runs, by seed}}, in the order of pairs.csv and rows.csv."""
    trained = [entry for entry in entries.values() if "pair" in entry]
    grouped = {}
    for pair, row in product(PAIRS, ROWS):
        same = [entry for entry in trained if entry["pair"] == pair and entry["row"] == row]
        if same:
            grouped.setdefault(pair, {})[row] = sorted(same, key=itemgetter("seed"))
    return grouped


def scores(entries, task="avg"):
    """{seed: score} of a task or an average; an average over no task is left out."""
    scored = [entry for entry in entries if entry["scores"][task] is not None]
    return {entry["seed"]: entry["scores"][task] for entry in scored}


def gains(by_row, row, without, task="avg"):
    """What a row scores above another: a number for each seed that both have."""
    with_it = scores(by_row.get(row, []), task)
    baseline = scores(by_row.get(without, []), task)
    if without in UNTRAINED and without in by_row:  # its one score is compared with each seed
        baseline = dict.fromkeys(with_it, by_row[without][0]["scores"][task])
    return [with_it[seed] - baseline[seed] for seed in with_it if seed in baseline]
