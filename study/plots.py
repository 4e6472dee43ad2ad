"""The plots of results.json, SVG for light and dark pages; they alone need matplotlib.

PAIR-terms.svg: the three terms over the steps, of T and STL; PAIR-scores.svg: each task before and
after; PAIR-epochs.svg: Avg after each epoch (run.py --each_epoch); PAIR-sharpness.svg: lambda_max.
"""

import statistics

from study.results import AVERAGES, NAMES, curves, pairs, runs
from study.run import ROWS

GREY = "#7d8590"  # of letters and lines: readable on white and on black
COLOURS = ["#4a90d9", "#d9603b", "#3a9d5d", "#9a6dd7", "#e0b050", "#b8405e", "#4ab5b5"]
TERMS = {"simcse": "SimCSE", "tamd": "TAMD", "lasd": "LASD"}


def colour_of(row):
    """The same in every plot."""
    main = ["T", "STLA", "STL", "distill", "stella", "distillcse", "distill-mse"]
    others = [name for name in ROWS if name not in main]
    return GREY if ROWS[row] is None else COLOURS[(main + others).index(row) % len(COLOURS)]


def draw(path, panels, width):
    """An SVG, for light and dark pages: panels are functions of axes, side by side."""
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    inked = ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color")
    plt.rcParams |= dict.fromkeys(inked, GREY) | {"font.size": 9, "svg.fonttype": "none"}
    plt.rcParams |= {"svg.hashsalt": "talas", "font.family": "sans-serif"}
    how = {"figsize": (width, 3.2), "layout": "constrained", "squeeze": False}
    picture, axes = plt.subplots(1, len(panels), **how)
    for axis, panel in zip(axes[0], panels):
        panel(axis)
        axis.patch.set_alpha(0)
        axis.spines[["top", "right"]].set_visible(False)
        outside = {"loc": "center left", "bbox_to_anchor": (1, 0.5)}
        axis.legend(frameon=False, labelcolor=GREY, **outside)
    picture.savefig(path, transparent=True, metadata={"Date": None})
    plt.close(picture)


def plot_lines(curves, title, xlabel, style="o-"):
    """One line a row: {row: {x: y}}."""

    def panel(axis):
        for row, points in curves.items():
            how = {"color": colour_of(row), "label": row}
            axis.plot(list(points), list(points.values()), style, ms=3, **how)
        axis.set(title=title, xlabel=xlabel)
        axis.xaxis.get_major_locator().set_params(integer=True)

    return panel


def plot_scores(scores):
    """A column a task, a mark a row: {row: {task: score}}."""
    tasks = list(next(iter(scores.values())))
    columns = [[each[task] for each in scores.values()] for task in tasks]

    def panel(axis):
        axis.vlines(tasks, list(map(min, columns)), list(map(max, columns)), color=GREY, lw=0.5)
        for row in scores:
            axis.plot(tasks, list(scores[row].values()), "o", color=colour_of(row), label=row)
        axis.set_xticks(tasks, [NAMES.get(task, task) for task in tasks])

    return panel


def plot_terms(found):
    """A panel a term, the rows' lines over the steps; a term that a row does not have is zeros."""
    panels = []
    for key, label in TERMS.items():
        told = {row: entry["history"] for row, entry in found.items()}
        lines = {row: dict(zip(h["step"], h[key])) for row, h in told.items() if any(h[key])}
        panels += [plot_lines(lines, label, "step", "-")] if lines else []
    return panels


def mean_scores(results, pair, row):
    """{task: mean over the seeds}, without the averages."""
    found = [entry["scores"] for entry in runs(results, pair, row).values()]
    tasks = [task for task in found[0] if task not in AVERAGES]
    return {task: statistics.fmean(scores[task] for scores in found) for task in tasks}


def mean_curves(results, pair, key):
    """{row: {epoch: mean over the seeds}}, of the epochs that every seed has."""
    found = {row: list(curves(results, pair, row, key).values()) for row in ROWS}
    found = {row: some for row, some in found.items() if some}
    means = {}
    for row, some in found.items():
        epochs = [epoch for epoch in some[0] if all(epoch in curve for curve in some)]
        means[row] = {int(e): statistics.fmean(curve[e] for curve in some) for e in epochs}
    return means


def draw_all(results, folder):
    """Write what there are results for: PAIR-terms, -epochs, -scores and -sharpness.svg."""
    for pair in pairs(results):
        found = {row: runs(results, pair, row) for row in ROWS}
        terms = {row: next(iter(found[row].values())) for row in ("T", "STL") if found[row]}
        main = ("before", "T", "STL", "STLA", "distill", "stella", "distillcse", "teacher")
        shown = [row for row in main if found[row]]
        epochs, sharpness = (mean_curves(results, pair, key) for key in ("epochs", "lambda_max"))
        scores = {row: mean_scores(results, pair, row) for row in shown}
        panels = {
            "terms": plot_terms(terms),
            "scores": [plot_scores(scores)] if scores else [],
            "epochs": [plot_lines(epochs, "Avg", "epoch")] if epochs else [],
            "sharpness": [plot_lines(sharpness, "λ_max", "epoch")] if sharpness else [],
        }
        for name, some in panels.items():
            if some:
                draw(folder / f"{pair}-{name}.svg", some, 9 if name in ("terms", "scores") else 5)
