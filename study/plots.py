"""Plots, by matplotlib==3.11.2: of results.json (report.py --plots), or of runs' own metrics.jsonl.

python study/plots.py student [another ...] --output run.png    # or .svg
"""

import argparse
import statistics
import sys
from importlib.util import find_spec
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from study.results import AVERAGES, NAMES, ROWS, UNTRAINED, pairs, runs, scores
from support import attempt, fail
from support.run import read_metrics

GREY = "#7d8590"  # of letters and lines: readable on white and on black
COLOURS = ["#4a90d9", "#d9603b", "#3a9d5d", "#9a6dd7", "#e0b050", "#b8405e", "#4ab5b5"]
TERMS = {"simcse": "SimCSE", "tamd": "TAMD", "lasd": "LASD"}
SHOWN = ("T", "STL", "STLA", "distill", "stella", "distillcse", "teacher")
CURVES = TERMS | {"lr": "learning rate", "sharpness_gap": "L(w̃) − L(w)", "lambda_max": "λ_max"}


def colour_of(row, names=()):
    """The same in every plot of results.json; of other names, a colour each."""
    main = ["T", "STLA", "STL", "distill", "stella", "distillcse", "distill-mse"]
    order = [*main, *(name for name in ROWS if name not in main)] if row in ROWS else list(names)
    return GREY if row in UNTRAINED else COLOURS[order.index(row) % len(COLOURS)]


def draw(path, panels, **style):
    """Panels one below another, for a narrow page: {title: {row: {x: y}}}; lines, or marks."""
    if not find_spec("matplotlib"):
        fail("the plots need matplotlib: pip install matplotlib==3.11.2")
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    inked = ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color")
    plt.rcParams |= dict.fromkeys(inked, GREY) | {"font.size": 11, "svg.fonttype": "none"}
    plt.rcParams |= {"svg.hashsalt": "talas", "font.family": "sans-serif"}
    how = {"figsize": (5, 0.8 + 2.4 * len(panels)), "layout": "constrained", "squeeze": False}
    picture, axes = plt.subplots(len(panels), 1, **how)
    names = dict.fromkeys(row for rows in panels.values() for row in rows)
    for (axis,), (title, rows) in zip(axes, panels.items()):
        if "marker" in style:  # a thin line through the marks of a column
            columns = list(zip(*(points.values() for points in rows.values())))
            ends = list(map(min, columns)), list(map(max, columns))
            axis.vlines(list(next(iter(rows.values()))), *ends, color=GREY, lw=0.5)
            axis.tick_params("x", rotation=40)
        for row, points in rows.items():
            axis.plot(*zip(*points.items()), color=colour_of(row, names), label=row, **style)
        axis.set(title=title, xlabel="" if "marker" in style else "step")
        axis.patch.set_alpha(0)
        axis.spines[["top", "right"]].set_visible(False)
    fullest = max(axes[:, 0], key=lambda axis: len(axis.lines))
    where = {"loc": "outside lower center", "ncols": 3, "frameon": False}
    picture.legend(handles=fullest.lines, labelcolor=GREY, **where)
    svg = {"metadata": {"Date": None}} if str(path).endswith(".svg") else {}
    with attempt(f"write {path}"):
        picture.savefig(path, transparent=True, **svg)
    plt.close(picture)


def mean_scores(results, pair, row):
    """{task's name: mean over the seeds}, without the averages."""
    tasks = [task for task in runs(results, pair, row)[0]["scores"] if task not in AVERAGES]
    found = {task: scores(results, pair, row, task).values() for task in tasks}
    return {NAMES.get(task, task): statistics.fmean(some) for task, some in found.items()}


def draw_all(results, folder):
    """Write what there are results for: PAIR-terms.svg and PAIR-scores.svg."""
    for pair in pairs(results):
        first = {row: runs(results, pair, row)[0] for row in ROWS if runs(results, pair, row)}
        told = {row: first[row]["history"] for row in ("T", "STL") if row in first}
        terms = {}
        for key, name in TERMS.items():  # one that was not computed is absent, or zeros
            some = {row: h for row, h in told.items() if any(h.get(key, []))}
            terms |= {name: {row: dict(zip(h["step"], h[key])) for row, h in some.items()}}
        if terms := {name: some for name, some in terms.items() if some}:
            draw(folder / f"{pair}-terms.svg", terms)
        means = {row: mean_scores(results, pair, row) for row in SHOWN if row in first}
        if "before" in first and means:
            start = mean_scores(results, pair, "before")
            gains = {row: {k: own[k] - start[k] for k in own} for row, own in means.items()}
            panel = {"gain over the untrained student": gains}
            draw(folder / f"{pair}-scores.svg", panel, marker="o", linestyle="", alpha=0.8)


def main(argv=None):
    """The command line: what runs left in metrics.jsonl, a panel a curve, a line a run."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    flag, parser.error = parser.add_argument, fail
    flag("runs", nargs="+", help="the folders that talas.py wrote")
    flag("--output", default="run.svg", help="a picture, .svg or .png")
    args, panels = parser.parse_args(argv), {}
    for folder in args.runs:
        if not (lines := read_metrics(folder)):
            fail(f"{folder} has no metrics.jsonl")
        for key, title in CURVES.items():
            if points := {line["step"]: line[key] for line in lines if line.get(key) is not None}:
                panels.setdefault(title, {})[Path(folder).name] = points
    draw(args.output, panels)


if __name__ == "__main__":
    main()
