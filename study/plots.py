"""The plots of results.json: PAIR-terms.svg, of T and STL, and PAIR-scores.svg; by matplotlib."""

import statistics

from study.results import AVERAGES, NAMES, ROWS, UNTRAINED, pairs, runs, scores

GREY = "#7d8590"  # of letters and lines: readable on white and on black
COLOURS = ["#4a90d9", "#d9603b", "#3a9d5d", "#9a6dd7", "#e0b050", "#b8405e", "#4ab5b5"]
TERMS = {"simcse": "SimCSE", "tamd": "TAMD", "lasd": "LASD"}
SHOWN = ("before", "T", "STL", "STLA", "distill", "stella", "distillcse", "teacher")


def colour_of(row):
    """The same in every plot."""
    main = ["T", "STLA", "STL", "distill", "stella", "distillcse", "distill-mse"]
    others = [name for name in ROWS if name not in main]
    return GREY if row in UNTRAINED else COLOURS[(main + others).index(row) % len(COLOURS)]


def draw(path, panels, **style):
    """An SVG of panels side by side: {title: {row: {x: y}}}, a line or marks a row."""
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    inked = ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color")
    plt.rcParams |= dict.fromkeys(inked, GREY) | {"font.size": 9, "svg.fonttype": "none"}
    plt.rcParams |= {"svg.hashsalt": "talas", "font.family": "sans-serif"}
    how = {"figsize": (9, 3.2), "layout": "constrained", "squeeze": False}
    picture, axes = plt.subplots(1, len(panels), **how)
    for axis, (title, rows) in zip(axes[0], panels.items()):
        if "marker" in style:  # a thin line through the marks of a column
            columns = list(zip(*(points.values() for points in rows.values())))
            ends = list(map(min, columns)), list(map(max, columns))
            axis.vlines(list(next(iter(rows.values()))), *ends, color=GREY, lw=0.5)
        for row, points in rows.items():
            axis.plot(*zip(*points.items()), color=colour_of(row), label=row, **style)
        axis.set(title=title, xlabel="" if "marker" in style else "step")
        axis.patch.set_alpha(0)
        axis.spines[["top", "right"]].set_visible(False)
        axis.legend(frameon=False, labelcolor=GREY, loc="center left", bbox_to_anchor=(1, 0.5))
    picture.savefig(path, transparent=True, metadata={"Date": None})
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
        if means := {row: mean_scores(results, pair, row) for row in SHOWN if row in first}:
            draw(folder / f"{pair}-scores.svg", {"": means}, marker="o", linestyle="")
