"""Tables and plots of results.json; no figure in a table of the study is typed by hand.

    python study/report.py study/README.md README.md                # fills their tables
    python study/report.py study/README.md --plots study            # needs matplotlib

In a file, what is between <!-- table:NAME --> and <!-- end --> becomes that table: gains, methods,
geometry; bench-student-cls-cpu, cost-student-cls-cpu; of a pair, such as B: main-B (rows of the
paper's Tables 1 and 2), summary-B, start-B, sharpness-B. Several seeds are shown as mean ± standard
deviation (of a sample, n - 1), what was not run as –.
"""

import re
import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from scipy.stats import sem, t

from study import plots, results
from study.results import (
    AVERAGES,
    BENCH,
    CLAIMS,
    METHODS,
    ROWS,
    TABLE3,
    TASKS,
    gains,
)
from support.files import read_json

EPOCHS = ["1", "2", "3", "4", "5"]
SUMMARY = ("before", "distill", "stella", "distillcse", "STL", "STLA")
STARTS = (
    "before",
    "distill",
    "distill-W-0.001-x1",
    "distill-W-0.051-x5",
    "distill-W-0.051-x1",
    "STL",
    "STL-bfloat16",
    "STL-W-0.001-x1",
    "STL-W-0.051-x5",
    "STL-W-0.051-x1",
)
MAIN = [row for row in ROWS if ROWS[row]["main"]]


# ----------------------------------------------------------------------------------- several seeds
def mean_sd(values):
    """Numbers as "mean ± standard deviation"; one number alone; – for none."""
    if not values:
        return "–"
    text = f"{statistics.fmean(values):.2f}"
    if len(values) > 1:
        text += f" ± {statistics.stdev(values):.2f}"
    return text


def mean_interval(values):
    """Numbers as "mean [low, high]", a 95 % t interval; one number alone; – for none."""
    if not values:
        return "–"
    mean = statistics.fmean(values)
    if len(values) == 1:
        return f"{mean:+.2f}"
    half = t.ppf(0.975, len(values) - 1) * sem(values)
    return f"{mean:+.2f} [{mean - half:+.2f}, {mean + half:+.2f}]"


def tasks_up(runs, row, without):
    """On how many tasks the mean gain is positive, such as 6/9; – if there is no gain."""
    if not gains(runs, row, without):
        return "–"
    up = [task for task in TASKS if statistics.fmean(gains(runs, row, without, task)) > 0]
    return f"{len(up)}/{len(TASKS)}"


# ---------------------------------------------------------- tables: lists of rows, a header first
def score_table(runs, rows, tasks, label):
    """Scores of rows: the mean over the seeds; for averages the standard deviation, too."""
    table = [[""] + [task["title"] for task in tasks.values()]]
    for row in rows:
        if runs[row]:
            cells = [ROWS[row][label]]
            for task in tasks:
                values = [entry["scores"][task] for entry in runs[row]]
                if task in TASKS:
                    values = [statistics.fmean(values)]
                cells.append(mean_sd(values))
            table.append(cells)
    return table


def gain_table(by_pair, claims):
    """Gains in Avg on each pair; before them what others measured."""
    columns = list(next(iter(claims.values())))[3:]
    header = ["gain in Avg"] + columns
    for pair in by_pair:
        header += [f"pair {pair}", "tasks up"]
    table = [header]
    for title, claim in claims.items():
        row = claim["row"]
        without = claim["without"]
        measured = []
        for runs in by_pair.values():
            measured.append(mean_interval(gains(runs, row, without)))
            measured.append(tasks_up(runs, row, without))
        if set(measured) != {"–"}:
            cells = [f"{title}: {row} − {without}"]
            table.append(cells + [claim[column] for column in columns] + measured)
    return table


def sharpness_table(runs):
    """The paper's Table 4: λ_max after each epoch, a line for each run."""
    table = [["after epoch"] + EPOCHS]
    for row in ROWS:
        for entry in runs[row]:
            curve = entry.get("lambda_max")
            if curve:
                cells = [f"{curve[epoch]:.2f}" if epoch in curve else "–" for epoch in EPOCHS]
                table.append([row] + cells)
    return table


def rounded(value, form):
    """A number in that format, or nothing where there is none."""
    return "" if value is None else format(value, form)


def geometry_table(entries):
    """What each student's two top layers have learnt (geometry.py)."""
    table = [["", "spread, L − 1", "TAMD, L − 1", "spread, L", "TAMD, L", "rank, L"]]
    for entry in entries:
        below, top = ([{}] + entry["layers"])[-2:]
        values = [below.get("spread"), below.get("tamd")]
        values += [top.get("spread"), top.get("tamd"), top.get("spearman")]
        table.append([entry["name"]] + [rounded(value, ".3g") for value in values])
    return table


def bench_table(entry):
    """The rows of bench.py: the ratio, its target, the two sides' ms."""
    table = [[f"measured {entry['date']}", "ratio", "target", "ms"]]
    for name, row in entry["rows"].items():
        ms = " / ".join(f"{value:.0f}" for value in row["ms"])
        table.append([BENCH[name]["label"], f"{row['ratio']:.2f}", BENCH[name]["target"], ms])
    return table


def cost_table(entry):
    """The paper's Table 3: a step's ms, its ratio to TALAS's two, the peak of memory in MB."""
    ratios = ["/ TALAS without ASAM", "paper", "/ TALAS", "paper"]
    table = [[f"measured {entry['date']}", "ms"] + ratios + ["teacher", "student", "rest"]]
    for name, side in entry["table3"].items():
        cells = [TABLE3[name]["label"], f"{side['ms']:.0f}"]
        paper_ms = TABLE3[name]["paper ms"]  # the paper does not have them all
        for other in ("STL", "STLA"):
            cells.append(f"{side['ratio'][other]:.2f}")
            paper_ratio = int(paper_ms) / int(TABLE3[other]["paper ms"]) if paper_ms else None
            cells.append(rounded(paper_ratio, ".2f"))
        for part in ("teacher", "student", "rest"):
            cells.append(rounded(side.get(part), ".0f"))
        table.append(cells)
    return table


def tables(entries):
    """{name: table} of all that there are results for."""
    by_pair = results.runs(entries)
    made = {
        "gains": gain_table(by_pair, CLAIMS),
        "methods": gain_table(by_pair, METHODS),
        "geometry": geometry_table(entry for entry in entries.values() if "layers" in entry),
    }
    for pair, runs in by_pair.items():
        made[f"main-{pair}"] = score_table(runs, MAIN, TASKS | AVERAGES, "row")
        made[f"summary-{pair}"] = score_table(runs, SUMMARY, AVERAGES, "in words")
        made[f"sharpness-{pair}"] = sharpness_table(runs)
        made[f"start-{pair}"] = score_table(runs, STARTS, AVERAGES, "in words")
    for key, entry in entries.items():
        if "table3" in entry:
            name = key.replace("/", "-")  # such as bench-student-cls-cpu
            made[name] = bench_table(entry)
            made[name.replace("bench", "cost")] = cost_table(entry)
    return made


# ------------------------------------------------------------------------------------ Markdown
def markdown(table):
    """A table in Markdown, its numbers to the right."""
    align = ["---"] + ["---:"] * (len(table[0]) - 1)
    lines = [f"| {' | '.join(cells)} |" for cells in [table[0], align] + table[1:]]
    return "\n".join(lines)


def fill(text, made):
    """A text with the table of that name between each pair of marks."""
    marks = re.compile("(<!-- table:(.*?) -->).*?(<!-- end -->)", re.DOTALL)
    return marks.sub(lambda mark: f"{mark[1]}\n{markdown(made[mark[2]])}\n{mark[3]}", text)


def main(argv=None):
    """The command line."""
    parser = results.command_line(__doc__)
    parser.add_argument("files", nargs="+", type=Path, help="texts with marks for tables")
    parser.add_argument("--plots", type=Path, help="write the plots to this folder")
    args = parser.parse_args(argv)
    entries = read_json(args.results)
    made = tables(entries)
    for path in args.files:
        text = path.read_text("utf-8")
        path.write_text(fill(text, made), "utf-8")
    if args.plots:
        plots.draw_all(entries, args.plots)


if __name__ == "__main__":
    main()
