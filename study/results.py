"""results.json, with an entry for each run; and the tables that name what can be run and shown.

pairs.csv: teachers and students; rows.csv: what a run can be; claims.csv and methods.csv: which row
is compared with which; tasks.csv and averages.csv: titles of the scores; bench.csv and table3.csv:
the benchmark.
"""

import argparse
import json
from collections import defaultdict
from pathlib import Path

from filelock import FileLock

from support import fail
from support.data import read_table
from support.files import read_json, whole

HERE = Path(__file__).parent


def read_rows(name):
    """The rows of study/NAME.csv, each under the content of its first column."""
    return {next(iter(row.values())): row for row in read_table(HERE / f"{name}.csv")}


PAIRS = read_rows("pairs")
ROWS = read_rows("rows")
CLAIMS = read_rows("claims")
METHODS = read_rows("methods")
TASKS = read_rows("tasks")
AVERAGES = read_rows("averages")
BENCH = read_rows("bench")
TABLE3 = read_rows("table3")
UNTRAINED = ("teacher", "before")  # rows that need no training
HISTORY = ("step", "simcse", "tamd", "lasd")  # kept of metrics.jsonl
NOT_COMPARED = ("output", "overwrite", "resume", "device", "sharpness")  # these change no student


def command_line(doc):
    """A parser for a module's command line: --results, and errors in one line."""
    parser = argparse.ArgumentParser(description=doc.split("\n")[0], allow_abbrev=False)
    parser.error = fail
    parser.add_argument("--results", type=Path, default=HERE / "results.json")
    return parser


def record(path, key, entry):
    """Put an entry into the results file, a line each. Several processes may do so at a time."""
    with FileLock(f"{path}.lock"):
        entries = read_json(path)
        entries[key] = entry
        lines = [f"{json.dumps(name)}: {json.dumps(entries[name])}" for name in sorted(entries)]
        with whole(path) as partial:
            partial.write_text("{\n" + ",\n".join(lines) + "\n}\n", "utf-8")


def portable(settings):
    """The settings that make a student what it is, with names in the place of paths."""
    kept = {}
    for name, value in settings.items():
        if name not in NOT_COMPARED:
            kept[name] = Path(value).name if isinstance(value, str) else value
    return kept


def describe(folder):
    """What a training left in its folder beside the weights: settings, versions, curves."""
    about = read_json(folder / "talas.json")
    lines = read_table(folder / "metrics.jsonl")
    steps = [line for line in lines if "loss" in line and line["step"] % 50 == 0]
    history = {}
    for name in HISTORY:
        history[name] = [round(line[name], 6) for line in steps if name in line]
    epochs = [line for line in lines if "lambda_max" in line]
    return {
        "settings": portable(about["settings"]),
        "corpus": about["corpus"],
        "versions": about["versions"],
        "history": history,
        "lambda_max": {str(line["end_of_epoch"]): line["lambda_max"] for line in epochs},
    }


def runs(entries):
    """{pair: {row: its entries, one for each seed}}; a row that was not run has []."""
    by_pair = {}
    for entry in entries.values():
        if "pair" in entry:
            by_row = by_pair.setdefault(entry["pair"], defaultdict(list))
            by_row[entry["row"]].append(entry)
    return by_pair


def gains(by_row, row, without, task="avg"):
    """What a row scores above another: a number for each seed that both have."""
    differences = []
    for entry in by_row[row]:
        for other in by_row[without]:
            if without in UNTRAINED or entry["seed"] == other["seed"]:
                differences.append(entry["scores"][task] - other["scores"][task])
    return differences
