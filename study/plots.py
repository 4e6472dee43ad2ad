"""Plots of results.json, by matplotlib==3.11.2: report.py --plots."""

import statistics

from study.results import TASKS, gains, runs

GREY = "#7d8590"  # of letters and lines: readable on white and on black
COLOURS = {
    "T": "#4a90d9",
    "STL": "#3a9d5d",
    "STLA": "#d9603b",
    "distill": "#9a6dd7",
    "stella": "#e0b050",
    "distillcse": "#b8405e",
    "teacher": GREY,
}
TERMS = {"simcse": "SimCSE", "tamd": "TAMD", "lasd": "LASD"}


def new_figure(titles):
    """(a narrow matplotlib figure, its axes), one below another, an axis for each title."""
    from matplotlib import rcParams  # here, because only the plots need it
    from matplotlib.figure import Figure

    for name in ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"):
        rcParams[name] = GREY
    rcParams["svg.fonttype"] = "none"
    rcParams["svg.hashsalt"] = "talas"  # the same picture is the same file
    figure = Figure(figsize=(5, 0.8 + 2.4 * len(titles)), layout="constrained")
    axes = figure.subplots(len(titles), squeeze=False)[:, 0]
    for axis, title in zip(axes, titles):
        axis.set_title(title)
    return figure, axes


def save(figure, axis, path):
    """Write a figure, with the legend of one of its axes."""
    handles = axis.get_legend_handles_labels()[0]
    figure.legend(handles=handles, loc="outside lower center", ncols=3, frameon=False)
    figure.savefig(path, transparent=True, metadata={"Date": None})


def draw_terms(path, by_row):
    """The terms of Eq. 7 over the steps, of T and STL with the first seed."""
    figure, axes = new_figure(TERMS.values())
    for axis, term in zip(axes, TERMS):
        axis.set_xlabel("step")
        for row in ("T", "STL"):
            history = by_row[row][0]["history"]
            if any(history[term]):  # a term that was not computed has no values, or zeros
                axis.plot(history["step"], history[term], label=row, color=COLOURS[row])
    save(figure, axes[1], path)  # TAMD: both rows have it


def draw_gains(path, by_row):
    """What each task gains over the untrained student, a mark for each row."""
    figure, (axis,) = new_figure(["gain over the untrained student"])
    for row, colour in COLOURS.items():
        if by_row[row]:
            heights = [statistics.fmean(gains(by_row, row, "before", task)) for task in TASKS]
            axis.plot(heights, "o", color=colour, label=row, alpha=0.8)
    titles = [task["title"] for task in TASKS.values()]
    axis.set_xticks(range(len(TASKS)), titles, rotation=40)
    axis.grid(axis="x", color=GREY, lw=0.3)
    save(figure, axis, path)


def draw_all(entries, folder):
    """Write what there are results for: PAIR-terms.svg and PAIR-scores.svg."""
    for pair, by_row in runs(entries).items():
        if by_row["T"] and by_row["STL"]:
            draw_terms(folder / f"{pair}-terms.svg", by_row)
        if by_row["before"]:
            draw_gains(folder / f"{pair}-scores.svg", by_row)
