"""Tables and plots of results.json; no figure in a table of the study is typed by hand.

    python study/report.py                             # fills the tables in study/README.md
    python study/report.py README.md --latex tables.tex --plots study       # needs matplotlib

A file to be filled has <!-- table:NAME --> ... <!-- end -->, which becomes that table: gains,
methods, geometry; bench-student-cls-cpu, cost-student-cls-cpu; of a pair scores-B (every row),
main-B (those of the paper's Tables 1 and 2), summary-B, sharpness-B. Of several seeds: mean ±
standard deviation (of a sample, n - 1).
"""

import math
import re
import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from scipy.stats import t

from study import plots, results
from study.results import AVERAGES, CLAIMS, NAMES, ROWS, scores
from support import attempt, fail

IN_SHORT = ("before", "distill", "stella", "distillcse", "STL", "STLA")  # a summary's rows
MAIN = [row for row in ROWS if not re.match("STLA?-", row)]  # all but variants
SIGNS = {sign: f"\\{sign}" for sign in "_%&#${}"} | {sign: f"${sign}$" for sign in "<>"}
SIGNS |= {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
SIGNS |= {"–": "--", "−": "$-$", "±": r"$\pm$", "≤": r"$\le$", "≥": r"$\ge$"}
SIGNS |= {"λ": r"$\lambda$", "ρ": r"$\rho$", "τ": r"$\tau$", "η": r"$\eta$"}


def mean_sd(values, sign=""):
    """Numbers as "mean ± standard deviation", of one number alone "mean"; of none "–"."""
    text = f"{statistics.fmean(values):{sign}.2f}" if values else "–"
    return f"{text} ± {statistics.stdev(values):.2f}" if len(values) > 1 else text


def gains(runs, row, without):
    """What a row's Avg is above another's, with each seed that both have; an untrained has one."""
    a, b = (scores(runs.get(one, [])) for one in (row, without))
    b = dict.fromkeys(a, *b.values()) if b and without in results.UNTRAINED else b
    return [a[seed] - b[seed] for seed in a if seed in b]


def chance(runs, task):
    """[How far two runs differ by their seeds alone, at most, 19 times of 20]; pooled over rows."""
    found = [[*scores(some, task).values()] for some in runs.values()]
    found = [some for some in found if len(some) > 1]
    free = sum(len(some) - 1 for some in found)
    squares = sum(statistics.variance(some) * (len(some) - 1) for some in found)
    return [t.ppf(0.975, free) * math.sqrt(2 * squares / free)] if free else []


def score_table(runs, rows, tasks=None, names="row"):
    """Tasks (the mean) and averages of these rows, all and what chance may do, or some of them."""
    rows, table = [row for row in rows if row in runs], []
    every = tasks or (rows and list(runs[rows[0]][0]["scores"]))
    for row in rows:
        texts = {task: mean_sd([*scores(runs[row], task).values()]) for task in every}
        brief = [text if task in AVERAGES else text.split(" ±")[0] for task, text in texts.items()]
        table.append([ROWS[row][names], *brief])
    bounds = [] if tasks else [chance(runs, task) for task in every]
    table += [["chance", *map(mean_sd, bounds)]] if any(bounds) else []
    return ["", *(NAMES.get(task, task) for task in every)], table


def gain_table(runs, over):
    """Gains in Avg: of TALAS over other methods, or of its parts; the paper's, others', the pairs'.

    Others' are reruns on the paper's pairs (study/README.md).
    """
    rows, given = [], ["paper", "others"] if over else ["paper"]
    for claim, about in CLAIMS.items():
        row, without = about["row"], about["without"]
        worth = [mean_sd(gains(own, row, without), "+") for own in runs.values()]
        if claim.startswith("TALAS over") == over and any(text != "–" for text in worth):
            rows.append([f"{claim}: {row} − {without}", *(about[x] for x in given), *worth])
    names = ["the paper's pairs", "the same, by others"][: len(given)]
    return ["gain in Avg", *names, *(f"pair {pair}" for pair in runs)], rows


def sharpness_table(runs):
    """The paper's Table 4: λ_max after each epoch."""
    found = {row: [e.get("lambda_max", {}) for e in some] for row, some in runs.items()}
    found = {row: curves for row, curves in found.items() if any(curves)}
    epochs = sorted({epoch for curves in found.values() for c in curves for epoch in c}, key=int)
    at = {row: [[c[e] for c in curves if e in c] for e in epochs] for row, curves in found.items()}
    return ["after epoch", *epochs], [[row, *map(mean_sd, values)] for row, values in at.items()]


def geometry_table(entries):
    """What each student's two top layers know (geometry.py)."""
    rows = []
    for entry in (e for key, e in entries.items() if key.startswith("geometry/")):
        below, top = [{}, *entry["layers"]][-2:]
        kept = [(x, k) for x in (below, top) for k in ("spread", "tamd")] + [(top, "spearman")]
        rows.append([entry["name"], *(f"{x[k]:.3g}" if k in x else "" for x, k in kept)])
    return ["", "spread, L − 1", "TAMD, L − 1", "spread, L", "TAMD, L", "rank, L"], rows


def bench_table(entry):
    """The rows of bench.py: the ratio, its target, the two sides' ms."""
    rows = []
    for row in entry["rows"].values():
        ms = " / ".join(f"{value:.0f}" for value in row["ms"] or [])
        rows.append([row["label"], f"{row['ratio']:.2f}", row["target"], ms])
    return ["", "ratio", "target", "ms"], rows


def cost_table(sides):
    """The paper's Table 3: a step's ms, its ratio to TALAS's two, the peak of memory in MB."""
    rows, at = [], results.TABLE3
    for name, side in sides.items():
        ratios = []
        for other in ("adamw", "talas"):
            ratios.append(f"{side['ms'] / sides[other]['ms']:.2f}")
            theirs = at[name]["paper ms"]  # the paper does not have them all
            ratios.append(f"{int(theirs) / int(at[other]['paper ms']):.2f}" if theirs else "")
        parts = ("teacher", "student", "rest")
        memory = [f"{side[part]:.0f}" if part in side else "" for part in parts]
        rows.append([at[name]["label"], f"{side['ms']:.0f}", *ratios, *memory])
    heads = "ms", "/ TALAS without ASAM", "paper", "/ TALAS", "paper", "teacher", "student", "rest"
    return ["", *heads], rows


def tables(entries):
    """{name: (header, rows)} of all that there are results for."""
    runs = results.runs(entries)
    found = {"gains": gain_table(runs, over=False), "methods": gain_table(runs, over=True)}
    found["geometry"] = geometry_table(entries)
    for pair, own in runs.items():
        found[f"scores-{pair}"] = score_table(own, ROWS)
        found[f"main-{pair}"] = score_table(own, MAIN)
        found[f"summary-{pair}"] = score_table(own, IN_SHORT, AVERAGES, "in words")
        found[f"sharpness-{pair}"] = sharpness_table(own)
    for key in (key for key in entries if key.startswith("bench/")):
        name = key.replace("/", "-")
        found[name] = bench_table(entries[key])
        found[name.replace("bench", "cost", 1)] = cost_table(entries[key].get("table3", {}))
    return {name: table for name, table in found.items() if table[1]}


def markdown(header, rows):
    """A table in Markdown."""
    align = ["---", *["---:"] * (len(header) - 1)]
    return "\n".join(f"| {' | '.join(row)} |" for row in [header, align, *rows])


def latex(header, rows):
    """A table in LaTeX, for booktabs."""
    signs, columns = str.maketrans(SIGNS), "l" + "r" * (len(header) - 1)
    lines = [" & ".join(cell.translate(signs) for cell in row) for row in [header, *rows]]
    text = " \\\\\n".join([f"\\toprule\n{lines[0]}", f"\\midrule\n{lines[1]}", *lines[2:], ""])
    return f"\\begin{{tabular}}{{{columns}}}\n{text}\\bottomrule\n\\end{{tabular}}\n"


def fill(text, made, path):
    """The text of a file with what stands between its marks replaced by the tables of that name."""

    def replace(found):
        name, old, end = found.groups()
        if not end or "<!-- table:" in old:
            fail(f"{path}: the table {name} is left open; it ends with <!-- end -->")
        if name not in made:
            fail(f"{path}: no results for the table {name}; there are: {', '.join(made) or 'none'}")
        return f"<!-- table:{name} -->\n{markdown(*made[name])}\n{end}"

    return re.sub(r"<!-- table:(.+?) -->(.*?)(<!-- end -->|\Z)", replace, text, flags=re.DOTALL)


def main(argv=None):
    """The command line."""
    parser, flag = results.command_line(__doc__)
    flag("files", nargs="*", type=Path, help="Markdown files to fill; else study/README.md")
    flag("--latex", type=Path, help="write every table to this file, for LaTeX")
    flag("--plots", type=Path, help="write the plots to this folder")
    args = parser.parse_args(argv)
    if not Path(args.results).exists():
        fail(f"--results {args.results}: there is no such file")
    entries = results.read_json(args.results)
    made = tables(entries)
    for path in args.files or [results.HERE / "README.md"]:
        with attempt(f"fill {path}"):
            path.write_text(fill(path.read_text("utf-8"), made, path), "utf-8")
    if args.latex:
        with attempt(f"write {args.latex}"):
            args.latex.write_text("\n".join(f"% {n}\n{latex(*made[n])}" for n in made), "utf-8")
    if args.plots:
        with attempt(f"write plots to {args.plots}", OSError):
            args.plots.mkdir(parents=True, exist_ok=True)
            plots.draw_all(entries, args.plots)


if __name__ == "__main__":
    main()
