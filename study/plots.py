"""Plots, by matplotlib==3.11.2: of results.json (report.py --plots), or of runs' own metrics.jsonl.

python study/plots.py student [another ...] --output run.png    # or .svg
"""

import argparse
import statistics
import sys
from itertools import cycle, product
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from study.results import AVERAGES, NAMES, runs, scores
from support import attempt, fail
from support.run import read_metrics

GREY = "#7d8590"  # of letters and lines: readable on white and on black
COLOURS = {"T": "#4a90d9", "STLA": "#d9603b", "STL": "#3a9d5d", "distill": "#9a6dd7"}
COLOURS |= {"stella": "#e0b050", "distillcse": "#b8405e", "distill-mse": "#4ab5b5"}
TERMS = {"simcse": "SimCSE", "tamd": "TAMD", "lasd": "LASD"}
SHOWN = ("T", "STL", "STLA", "distill", "stella", "distillcse", "teacher")
CURVES = TERMS | {"lr": "learning rate", "sharpness_gap": "L(w̃) − L(w)", "lambda_max": "λ_max"}


def draw(path, panels, **style):
    """Panels one below another, for a narrow page: {title: {row: {x: y}}}; lines, or marks."""
    with attempt("draw without matplotlib (pip install matplotlib==3.11.2)", ImportError):
        from matplotlib import rcParams
        from matplotlib.figure import Figure

    inked = ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color")
    rcParams |= dict.fromkeys(inked, GREY) | {"font.size": 11, "svg.fonttype": "none"}
    rcParams |= {"svg.hashsalt": "talas", "font.family": "sans-serif"}
    picture = Figure(figsize=(5, 0.8 + 2.4 * len(panels)), layout="constrained")
    axes = picture.subplots(len(panels), squeeze=False)[:, 0]
    names = dict.fromkeys(row for rows in panels.values() for row in rows)
    colours = dict(zip(names, cycle(COLOURS.values()))) | COLOURS | {"teacher": GREY}
    for axis, (title, rows) in zip(axes, panels.items()):
        if "marker" in style:  # a thin line through the marks of a column
            columns = list(zip(*(points.values() for points in rows.values())))
            ends = list(map(min, columns)), list(map(max, columns))
            axis.vlines(list(next(iter(rows.values()))), *ends, color=GREY, lw=0.5)
            axis.tick_params("x", rotation=40)
        for row, points in rows.items():
            axis.plot(*zip(*points.items()), color=colours[row], label=row, **style)
        axis.set(title=title, xlabel="" if "marker" in style else "step")
        axis.patch.set_alpha(0)
        axis.spines[["top", "right"]].set_visible(False)
    fullest = max(axes, key=lambda axis: len(axis.lines))
    where = {"loc": "outside lower center", "ncols": 3, "frameon": False}
    picture.legend(handles=fullest.lines, labelcolor=GREY, **where)
    with attempt(f"write {path}"):
        picture.savefig(path, transparent=True, metadata={"Date": None})


def mean_scores(runs):
    """{task's name: mean over the seeds}, without the averages."""
    tasks = [task for task in runs[0]["scores"] if task not in AVERAGES]
    return {NAMES.get(x, x): statistics.fmean(scores(runs, x).values()) for x in tasks}


def draw_all(results, folder):
    """Write what there are results for: PAIR-terms.svg and PAIR-scores.svg."""
    for pair, own in runs(results).items():
        told = {row: own[row][0]["history"] for row in ("T", "STL") if row in own}
        terms = {}
        for (key, name), (row, curves) in product(TERMS.items(), told.items()):
            if any(curves.get(key, [])):  # one that was not computed is absent, or zeros
                terms.setdefault(name, {})[row] = dict(zip(curves["step"], curves[key]))
        if terms:
            draw(folder / f"{pair}-terms.svg", terms)
        means = {row: mean_scores(own[row]) for row in ("before", *SHOWN) if row in own}
        start = means.pop("before", None)
        if start and means:
            gains = {row: {k: x - start[k] for k, x in some.items()} for row, some in means.items()}
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
