"""Tables and plots of results.json; no figure of the study is typed by hand.

    python study/report.py                             # fills the tables in study/README.md
    python study/report.py README.md --latex tables.tex
    pip install matplotlib==3.11.2 && python study/report.py --plots study    # plots.py

A file to be filled holds <!-- table:NAME --> ... <!-- end -->, which becomes the table of that name
(scores-B, noise-B, gains-B, winners-B, plateau-B, sharpness-B, cost-B, geometry, and so on). In a
line <!-- figure:PAIR/ROW/TASK --> ... <!-- end --> becomes that score, <!-- figure:A minus B -->
... <!-- end --> a gain, and <!-- figure:geometry/NAME/LAYER/KEY --> ... <!-- end --> geometry.py's.
Of several seeds: the mean ± the standard deviation (of a sample, n - 1).
"""

import argparse
import math
import re
import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from support import fail, one_line
from support.files import attempt

from scipy.stats import t

from study import plots
from study.results import AVERAGES, NAMES, RESULTS, curves, pairs, read_json, runs
from study.run import ROWS

CLAIMS = {  # what a gain shows: (a row, the row without it)
    "SimCSE beside TAMD": ("ST", "T"),
    "LASD beside SimCSE and TAMD": ("STL", "ST"),
    "SimCSE and LASD beside TAMD": ("STL", "T"),
    "ASAM with all three": ("STLA", "STL"),
    "SimCSE with ASAM": ("STLA", "TLA"),
    "LASD with ASAM": ("STLA", "STA"),
    "ASAM beside SimCSE and TAMD": ("STA", "ST"),
    "ASAM, ρ 0.5 for 0.05": ("STLA-rho-0.5", "STLA"),
    "ASAM, ρ 1 for 0.05": ("STLA-rho-1", "STLA"),
    "ASAM, ρ 2 for 0.05": ("STLA-rho-2", "STLA"),
    "ASAM for SAM": ("STLA", "STLA-SAM"),
    "ASAM for DISAM": ("STLA", "STLA-DISAM"),
    "K 1 for 2, TAMD alone": ("distill", "T"),
    "K 2 for 1": ("STLA", "STLA-K-1"),
    "SimCSE, LASD and ASAM with K 1": ("STLA-K-1", "distill"),
    "K 2 for 3": ("STLA", "STLA-K-3"),
    "λ3 0.1 for 1": ("STL-lambda3-0.1", "STL"),
    "λ3 10 for 1": ("STL-lambda3-10", "STL"),
    "A fixed guide in LASD": ("STL-detach_guide", "STL"),
    "The released behaviour": ("STLA-released", "STLA"),
    "The released code itself": ("released-code", "STLA"),
    "TALAS for embedding distillation": ("STLA", "distill"),
    "TALAS for its squared error": ("STLA", "distill-mse"),
    "TALAS for Jasper and Stella": ("STLA", "stella"),
    "TALAS for DistillCSE": ("STLA", "distillcse"),
}
PLATEAU = 0.58  # TAMD below it: both of pair B's anchored layers are learning (README, the plateau)
METHODS = ("STLA", "distill", "distill-mse", "stella", "distillcse")  # that compete, task by task


# -------------------------------------------------------------------------------------- the numbers
def mean_sd(values, sign=""):
    """Numbers as "mean ± standard deviation", of one number alone "mean"; of none "–"."""
    if not values:
        return "–"
    mean = f"{statistics.fmean(values):{sign}.2f}"
    return f"{mean} ± {statistics.stdev(values):.2f}" if len(values) > 1 else mean


def scores(results, pair, row, task="avg"):
    """{seed: score} of a task or an average."""
    found = runs(results, pair, row)
    return {seed: e["scores"][task] for seed, e in found.items() if e["scores"][task] is not None}


def history(entry, key):
    """A run's values of that name, about every fiftieth step; none if it does not have them."""
    return entry.get("history", {}).get(key, [])


def gains(results, pair, row, without, task="avg"):
    """What a row scores above another one, with each seed that both have; an untrained has one."""
    a, b = scores(results, pair, row, task), scores(results, pair, without, task)
    if ROWS[without] is None:
        b = {seed: score for seed in a for score in b.values()}
    return [a[seed] - b[seed] for seed in a if seed in b]


def figure(results, name):
    """One figure as text; ends the program if there is no such figure.

    A score, "PAIR/ROW/TASK"; a gain, "PAIR/ROW/TASK minus PAIR/ROW/TASK"; or one of geometry.py's,
    "geometry/NAME/LAYER/KEY".
    """
    if name.startswith("geometry/") and name.count("/") == 3:
        _, who, layer, key = name.split("/")
        layers = results.get(f"geometry/{who}", {"layers": []})["layers"]
        found = [one[key] for one in layers if str(one["layer"]) == layer and key in one]
        return f"{found[0]:.3g}" if found else fail(f"no figure {name}")
    parts = [part.split("/") for part in name.split(" minus ")]
    if any(len(part) != 3 for part in parts) or not 1 <= len(parts) <= 2:
        fail(f"no figure {name}; write PAIR/ROW/TASK, or two of them with minus between")
    if len(parts) == 1:
        pair, row, task = parts[0]
        return mean_sd(list(scores(results, pair, row, task).values()))
    (pair, row, task), (_, without, _) = parts
    return mean_sd(gains(results, pair, row, without, task), "+")


# --------------------------------------------------------------------------------------- the tables
def score_table(results, pair):
    """Every task and average of every row: a header and rows of text."""
    there = [row for row in ROWS if runs(results, pair, row)]
    some = next(iter(runs(results, pair, there[0]).values()))["scores"]
    header = ["", *(AVERAGES.get(task) or NAMES.get(task, task) for task in some), "seeds"]
    rows = []
    for row in there:
        cells = [mean_sd(list(scores(results, pair, row, task).values())) for task in some]
        trained = ROWS[row] is not None
        rows.append([row, *cells, str(len(runs(results, pair, row))) if trained else ""])
    return header, rows


def noise_table(results, pair):
    """By how much two single runs differ through their seeds alone: less than this 19 times of 20.

    The variance of a run is pooled over the rows that have several seeds.
    """
    rows = [row for row in ROWS if len(runs(results, pair, row)) > 1]
    tasks = runs(results, pair, rows[0]).popitem()[1]["scores"] if rows else []
    cells = {}
    for task in tasks:
        found = [list(scores(results, pair, row, task).values()) for row in rows]
        found = [some for some in found if len(some) > 1]
        free = sum(len(some) - 1 for some in found)
        squares = sum(statistics.variance(some) * (len(some) - 1) for some in found)
        bound = t.ppf(0.975, free) * math.sqrt(2 * squares / free) if free else None
        cells[AVERAGES.get(task) or NAMES.get(task, task)] = f"{bound:.2f}" if free else "–"
    return ["", *cells], [["two single runs", *cells.values()]] if cells else []


def gain_table(results, pair):
    """What each part of the method is worth: the gain in Avg, and on how many tasks it is one."""
    rows = []
    for claim, (row, without) in CLAIMS.items():
        if found := gains(results, pair, row, without):
            tasks = runs(results, pair, row).popitem()[1]["scores"].keys() - AVERAGES.keys()
            each = [statistics.fmean(gains(results, pair, row, without, task)) for task in tasks]
            better = f"{sum(gain > 0 for gain in each)} of {len(each)}"
            rows.append([claim, f"{row} − {without}", mean_sd(found, "+"), better, str(len(found))])
    return ["", "rows", "gain in Avg", "better on", "seeds"], rows


def winner_table(results, pair):
    """Who wins on which task: of the methods that were run, the best two, and TALAS's place."""
    there = [row for row in METHODS if runs(results, pair, row)]
    if len(there) < 2:
        return [], []
    rows = []
    for task in runs(results, pair, there[0]).popitem()[1]["scores"]:
        found = {row: list(scores(results, pair, row, task).values()) for row in there}
        found = {row: values for row, values in found.items() if values}
        order = sorted(found, key=lambda row: -statistics.fmean(found[row]))
        best = [text for row in order[:2] for text in (row, mean_sd(found[row]))]
        if order:
            place = f"{order.index('STLA') + 1} of {len(order)}" if "STLA" in order else "–"
            rows.append([AVERAGES.get(task) or NAMES.get(task, task), *best, place])
    return ["", "first", "score", "second", "score", "STLA's place"], rows


def sharpness_table(results, pair):
    """The paper's Table 4: λ_max after each epoch, and each row's relative to STL's."""
    found = {row: curves(results, pair, row, "lambda_max") for row in ROWS}
    found = {row: some for row, some in found.items() if some}
    others = [row for row in found if row != "STL"] if "STL" in found else []
    epochs = {int(epoch) for some in found.values() for each in some.values() for epoch in each}
    rows = []
    for epoch in map(str, sorted(epochs)):
        at = {row: {k: c[epoch] for k, c in found[row].items() if epoch in c} for row in found}
        cells = [mean_sd(list(some.values())) for some in at.values()]
        for row in others:
            shared = at[row].keys() & at["STL"].keys()
            cells.append(mean_sd([at[row][seed] / at["STL"][seed] for seed in sorted(shared)]))
        rows.append([epoch, *cells])
    return ["epoch", *found, *(f"{row} / STL" for row in others)], rows


def plateau_table(results, pair):
    """When TAMD leaves its plateau, in runs that anchor two layers: the step, its end, and Avg."""
    found = {}
    for row in ROWS:
        some = [e for e in runs(results, pair, row).values() if any(history(e, "tamd"))]
        if some and some[0]["settings"]["anchored_layers"] == 2:
            told = [list(zip(history(e, "step"), history(e, "tamd"))) for e in some]
            steps = [next((x for x, tamd in one if tamd < PLATEAU), math.inf) for one in told]
            values = [one[-1][1] for one in told], [e["scores"]["avg"] for e in some]
            left = [step for step in steps if step < math.inf]
            text = f"{statistics.fmean(left):.0f}" if left else "never"
            text += f" ({len(left)} of {len(steps)} seeds)" if 0 < len(left) < len(steps) else ""
            found[row] = statistics.fmean(steps), text, *map(mean_sd, values)
    rows = [[row, *cells] for row, (_, *cells) in sorted(found.items(), key=lambda x: x[1][0])]
    return ["", f"TAMD below {PLATEAU} at step", "TAMD at the end", "Avg"], rows


def cost_table(results, pair):
    """The paper's Table 3: time and memory; memory only where an accelerator counted it."""
    names = {"ms_per_step": "ms/step"}
    names |= {f"{kind}_mb": f"{kind} MB" for kind in ("mean", "peak", "std")}
    costs = {row: [e.get("cost", {}) for e in runs(results, pair, row).values()] for row in ROWS}
    costs = {row: some for row, some in costs.items() if any(some)}
    keys = [key for key in names if any(cost.get(key) for some in costs.values() for cost in some)]
    rows = []
    for row, some in costs.items():
        cells = [mean_sd([cost[key] for cost in some if cost.get(key)]) for key in keys]
        rows.append([row, *cells])
    return ["", *(names[key] for key in keys)], rows


def geometry_table(results):
    """What each layer knows (geometry.py)."""
    rows = []
    for entry in (e for key, e in results.items() if key.startswith("geometry/")):
        for one in entry["layers"]:
            tamd = f"{one['tamd']:.3f}" if "tamd" in one else ""
            spread, rho = f"{one.get('spread', 0):.6f}", f"{one.get('spearman', 0):.1f}"
            cells = [spread, rho if "spearman" in one else "–", tamd]
            rows.append([entry["name"], str(one["layer"]), *cells])
    return ["", "layer", "1 − mean cosine", "Spearman with the teacher", "its TAMD"], rows


def bench_table(entry):
    """The rows of bench.py."""
    rows = []
    for row in entry["rows"].values():
        ms = " / ".join(f"{value:.0f}" for value in row["ms"] or [])
        rows.append([row["label"], f"{row['ratio']:.2f}", row["target"], ms])
    return ["", "ratio", "target", "ms"], rows


def tables(results):
    """{name: (header, rows)} of all that there are results for."""
    found = {}
    for pair in pairs(results):
        makers = {"scores": score_table, "gains": gain_table, "cost": cost_table}
        makers |= {"sharpness": sharpness_table, "winners": winner_table, "noise": noise_table}
        makers["plateau"] = plateau_table
        found |= {f"{kind}-{pair}": make(results, pair) for kind, make in makers.items()}
    found["geometry"] = geometry_table(results)
    benches = {key: e for key, e in results.items() if key.startswith("bench/")}
    found |= {key.replace("/", "-"): bench_table(entry) for key, entry in benches.items()}
    return {name: table for name, table in found.items() if table[1]}


def markdown(header, rows):
    """A table in Markdown."""
    align = ["---", *["---:"] * (len(header) - 1)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in [header, align, *rows])


def latex(header, rows):
    """A table in LaTeX, for booktabs."""
    signs = {"_": r"\_", "%": r"\%", "±": r"$\pm$", "−": "$-$", "≤": r"$\le$", "≥": r"$\ge$"}
    signs |= {"λ": r"$\lambda$", "ρ": r"$\rho$", "–": "--"}
    lines = [" & ".join(cells) + r" \\" for cells in [header, *rows]]
    text = "\n".join([lines[0], r"\midrule", *lines[1:]]).translate(str.maketrans(signs))
    columns = "l" + "r" * (len(header) - 1)
    return f"\\begin{{tabular}}{{{columns}}}\n\\toprule\n{text}\n\\bottomrule\n\\end{{tabular}}\n"


def fill(text, results):
    """A text with its marked tables and figures replaced by those of the results."""
    made = tables(results)

    def replace(found):
        kind, name = found["kind"], found["name"]
        if kind == "figure":
            inside = figure(results, name)
        elif name in made:
            inside = f"\n{markdown(*made[name])}\n"
        else:
            fail(f"no results for the table {name}; there are: {', '.join(made) or 'none'}")
        return f"<!-- {kind}:{name} -->{inside}<!-- end -->"

    marks = r"<!-- (?P<kind>table|figure):(?P<name>.+?) -->.*?<!-- end -->"
    return re.sub(marks, replace, text, flags=re.DOTALL)


@one_line
def main(argv=None):
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    flag, parser.error = parser.add_argument, fail
    flag("files", nargs="*", type=Path, help="Markdown files to fill; else study/README.md")
    flag("--latex", type=Path, help="write every table to this file, for LaTeX")
    flag("--plots", type=Path, help="write the plots to this folder")
    flag("--results", default=RESULTS, help="what run.py and bench.py wrote")
    args = parser.parse_args(argv)
    results = read_json(args.results)
    for path in args.files or [RESULTS.parent / "README.md"]:
        with attempt(f"read {path}"):
            text = path.read_text("utf-8")
        filled = fill(text, results)
        with attempt(f"write {path}"):
            path.write_text(filled, "utf-8")
    if args.latex:
        made = tables(results)
        with attempt(f"write {args.latex}"):
            args.latex.write_text("\n".join(f"% {n}\n{latex(*made[n])}" for n in made), "utf-8")
    if args.plots:
        with attempt(f"write plots to {args.plots}"):
            args.plots.mkdir(parents=True, exist_ok=True)
        plots.draw_all(results, args.plots)


if __name__ == "__main__":
    main()
