"""Plots, by matplotlib==3.11.2: of results.json (report.py --plots), or of runs' own metrics.jsonl.

python study/plots.py student [another ...] --output run.png    # or .svg
"""

import argparse
import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from study.results import AVERAGES, NAMES, START, STARTS, gains, runs
from support import attempt, fail
from support.run import read_metrics

GREY = "#7d8590"  # of letters and lines: readable on white and on black
COLOURS = {
    "T": "#4a90d9",
    "STLA": "#d9603b",
    "STL": "#3a9d5d",
    "distill": "#9a6dd7",
    "stella": "#e0b050",
    "distillcse": "#b8405e",
    "distill-mse": "#4ab5b5",
    "teacher": GREY,
}
SHOWN = ("T", "STL", "STLA", "distill", "stella", "distillcse", "teacher")
TERMS = {"simcse": "SimCSE", "tamd": "TAMD", "lasd": "LASD"}
CURVES = TERMS | {"lr": "learning rate", "sharpness_gap": "L(w̃) − L(w)", "lambda_max": "λ_max"}


def new_figure(titles):
    """(a narrow matplotlib figure, its axes), one below another, an axis for each title."""
    with attempt("draw without matplotlib (pip install matplotlib==3.11.2)", ImportError):
        from matplotlib import rcParams
        from matplotlib.figure import Figure

    for name in ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"):
        rcParams[name] = GREY
    rcParams["font.size"] = 11
    rcParams["font.family"] = "sans-serif"
    rcParams["svg.fonttype"] = "none"
    rcParams["svg.hashsalt"] = "talas"  # the same picture is the same file
    figure = Figure(figsize=(5, 0.8 + 2.4 * len(titles)), layout="constrained")
    axes = figure.subplots(len(titles), squeeze=False)[:, 0]
    for axis, title in zip(axes, titles):
        axis.set_title(title)
        axis.patch.set_alpha(0)
        axis.spines[["top", "right"]].set_visible(False)
    return figure, axes


def save(figure, axis, path):
    """Write a figure, with the legend of one of its axes."""
    handles = axis.get_legend_handles_labels()[0]
    figure.legend(handles=handles, loc="outside lower center", ncols=3, frameon=False)
    with attempt(f"write {path}"):
        figure.savefig(path, transparent=True, metadata={"Date": None})


def draw_curves(path, panels):
    """Curves over the steps, a panel for each title: {title: {label: {step: value}}}."""
    figure, axes = new_figure(panels)
    for axis, curves in zip(axes, panels.values()):
        axis.set_xlabel("step")
        for label, points in curves.items():
            axis.plot(list(points), list(points.values()), label=label, color=COLOURS.get(label))
    save(figure, max(axes, key=lambda axis: len(axis.lines)), path)


def draw_terms(path, by_row):
    """The terms of Eq. 7 over the steps, of T and STL with the first seed."""
    panels = {}
    for term, title in TERMS.items():
        for row in ("T", "STL"):
            history = by_row[row][0]["history"] if row in by_row else {}
            values = history.get(term, [])
            if any(values):  # a term that was not computed is absent, or zeros
                panels.setdefault(title, {})[row] = dict(zip(history["step"], values))
    if panels:
        draw_curves(path, panels)


def mean_gain(by_row, row, task):
    """What a row scores above the untrained student, mean over the seeds; 0 if it was not run."""
    values = gains(by_row, row, "before", task)
    return statistics.fmean(values) if values else 0


def draw_gains(path, by_row):
    """What each task gains over the untrained student, a mark for each row."""
    figure, (axis,) = new_figure(["gain over the untrained student"])
    tasks = [task for task in NAMES if task not in AVERAGES]
    for row in SHOWN:
        if row in by_row:
            heights = [mean_gain(by_row, row, task) for task in tasks]
            axis.plot(heights, "o", color=COLOURS[row], label=row, alpha=0.8)
    axis.set_xticks(range(len(tasks)), [NAMES[task] for task in tasks], rotation=40)
    axis.grid(axis="x", color=GREY, lw=0.3)
    save(figure, axis, path)


def draw_starts(path, by_row):
    """What Avg gains over the untrained student, by how W starts and learns (start.csv)."""
    figure, (axis,) = new_figure(["gain in Avg over the untrained student"])
    for i, (method, row_of) in enumerate(START.items()):
        places = [place + 0.27 * i for place in range(len(STARTS))]
        heights = [mean_gain(by_row, row_of[start], "avg") for start in STARTS]
        axis.bar(places, heights, 0.25, label=method)
    axis.set_xticks(range(len(STARTS)), STARTS, rotation=20)
    save(figure, axis, path)


def draw_all(entries, folder):
    """Write what there are results for: PAIR-terms.svg, PAIR-scores.svg; B-start.svg."""
    folder.mkdir(parents=True, exist_ok=True)
    for pair, by_row in runs(entries).items():
        draw_terms(folder / f"{pair}-terms.svg", by_row)
        if "before" in by_row:
            draw_gains(folder / f"{pair}-scores.svg", by_row)
        if pair == "B":
            draw_starts(folder / "B-start.svg", by_row)


def main(argv=None):
    """The command line: what runs left in metrics.jsonl, a panel a curve, a line a run."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.error = fail
    parser.add_argument("runs", nargs="+", help="the folders that talas.py wrote")
    parser.add_argument("--output", default="run.svg", help="a picture, .svg or .png")
    args = parser.parse_args(argv)
    panels = {}
    for folder in args.runs:
        lines = read_metrics(folder)
        if not lines:
            fail(f"{folder} has no metrics.jsonl")
        for key, title in CURVES.items():
            points = {line["step"]: line[key] for line in lines if line.get(key) is not None}
            if points:
                panels.setdefault(title, {})[folder] = points
    draw_curves(args.output, panels)
    print(f"{args.output}: {len(panels)} curves of {', '.join(args.runs)}")


if __name__ == "__main__":
    main()
