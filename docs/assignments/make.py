"""Make the course's files from the project as it stands.

python docs/assignments/make.py STARTER           # the students' folder: code without solutions
python docs/assignments/make.py --key KEY         # the instructor's: key and solutions
python docs/assignments/make.py --gradescope ZIP  # the autograder
python docs/assignments/make.py --measure FILE    # the numbers of the key's tables: half an hour
"""

import argparse
import ast
import json
import re
import shutil
import subprocess
import sys
import tempfile
from functools import partial
from itertools import product
from pathlib import Path
from statistics import fmean, stdev

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
sys.path.append(str(ROOT))

import grade  # noqa: E402

from support.files import check_output, write_json  # noqa: E402
from support.run import cost, read_metrics  # noqa: E402

BODIES = "tamd_gradient asam_ascent tamd_loss relation_matrix lasd_loss simcse_loss ASAM"
BODIES = f"{BODIES} training_step largest_hessian_eigenvalue".split()
BODIES = dict(zip(BODIES, (0, 0, 1, 2, 2, 3, 4, 5, 6)))
GIVEN = ["cache_teacher.py", "eval.py", "requirements.txt", "LICENSE"]
GIVEN += [f"docs/assignments/{name}" for name in ("checks.json", "checks.py", "grade.py")]
FOLDERS, SKIP = ["support", "demo"], shutil.ignore_patterns("__pycache__", ".*")
read = partial(Path.read_text, encoding="utf-8")
SEEDS, SAYS = ("--seed 42", "--seed 43", "--seed 44"), "the grader says"


def solution():
    """talas.py, and in it exercise 0, whose solution is in key.md."""
    derivation = re.search(r"```python\n(.*?)```", read(HERE / "key.md"), re.S)[1]
    return read(ROOT / "talas.py").replace("def tamd_loss(", f"{derivation}\n\ndef tamd_loss(", 1)


def without_solutions(source):
    """talas.py, in which the bodies of the exercises raise NotImplementedError."""
    lines = source.splitlines(keepends=True)
    for top in reversed(ast.parse(source).body):
        members = top.body if isinstance(top, ast.ClassDef) else [top]  # all but __init__
        for function in reversed(members) if getattr(top, "name", "") in BODIES else ():
            if isinstance(function, ast.FunctionDef) and function.name != "__init__":
                start, what = function.body[0], f"Exercise {BODIES[top.name]}"
                error = f'{" " * start.col_offset}raise NotImplementedError("{what}")\n'
                lines[start.end_lineno : function.end_lineno] = [error]
    text = "".join(lines)
    for line, names in re.findall(r"^(from \S+ import (.*)\n)", text, re.MULTILINE):
        if all(len(re.findall(rf"\b{name}\b", text)) == 1 for name in re.findall(r"\w+", names)):
            text = text.replace(line, "")  # it gives away what the solution needs
    return text


def starter(out):
    """Write the students' folder; its README.md is the second half of ours."""
    out.mkdir(parents=True)
    (out / "talas.py").write_text(without_solutions(solution()), "utf-8")
    for name in GIVEN:
        shutil.copy(ROOT / name, out)
    for name in FOLDERS:
        shutil.copytree(ROOT / name, out / name, ignore=SKIP)
    handout = read(HERE / "README.md").split("\n## The exercises\n", 1)[1]
    (out / "README.md").write_text("# TALAS in eight exercises\n" + handout, "utf-8")


def gradescope(out):
    """Write the zip that Gradescope takes: the starter, setup.sh and run_autograder."""
    with tempfile.TemporaryDirectory() as folder:
        shutil.copytree(HERE / "gradescope", f"{folder}/zip")
        starter(Path(folder, "zip", "starter"))
        shutil.move(shutil.make_archive(f"{folder}/made", "zip", f"{folder}/zip"), out)


def filled(cell):
    """key.md, with cell(code in the row, name of the column) for each empty cell of a table."""
    lines, names = [], []
    for line in read(HERE / "key.md").splitlines():
        cells = [text.strip() for text in line.split("|")[1:-1]]
        if "" in cells:
            code = re.findall("`(.+?)`", line)
            cells = [text or cell(code, name) for text, name in zip(cells, names)]
            line = f"| {' | '.join(cells)} |"
        elif cells and cells[0] != "---":
            names = cells
        lines.append(f"{line}\n")
    return "".join(lines)


def says(file, old, new):
    """Write the solution with `new` for `old` to a file; returns what the grader says to that."""
    file.write_text(solution().replace(old, new), "utf-8")
    grade.SUBMISSION, tried = file, grade.checks.CHECKS[:-1]  # not the demo
    talas = grade.load()
    found = [(check["name"], *grade.judge(check, talas)) for check in tried]
    lost = [f"`{name}`: {line}" for name, right, line in found if not right]
    return "; ".join(lost).replace("|", "\\|")


def key(out):
    """Write the instructor's folder: the key with its tables filled, and all solutions."""
    found = json.loads(read(HERE / "measured.json"))

    def cell(code, name):
        if name == SAYS:
            return says(out / "talas.py", *code)
        runs = (found[" ".join([*code, seed])] for seed in SEEDS)
        values = [run[name] for run in runs if name in run]
        return f"{fmean(values):.4g} ± {stdev(values):.2g}" if values else "–"

    out.mkdir(parents=True)
    (out / "key.md").write_text(filled(cell), "utf-8")
    (out / "talas.py").write_text(solution(), "utf-8")


def measure(file):
    """Train and score the demo for the key's tables, three seeds each; a run in FILE is kept."""
    check_output("--measure", str(file))
    found, rows = json.loads(read(file)) if file.exists() else {}, {}
    filled(lambda code, name: rows.setdefault(tuple(code), set()).add(name) or "")
    with tempfile.TemporaryDirectory() as folder:
        python, out = partial(subprocess.run, cwd=folder, check=True), Path(folder, "student")
        python([sys.executable, ROOT / "cache_teacher.py"])
        for seed, (code, names) in product(SEEDS, rows.items()):
            if (run := " ".join([*code, seed])) in found or SAYS in names:
                continue
            python([sys.executable, ROOT / "talas.py", *run.split(), "--sharpness", "--overwrite"])
            python([sys.executable, ROOT / "eval.py", "--json", out / "scores.json"])
            lines = read_metrics(out)[-11:]  # of the last hundred steps
            values = {x: fmean(line[x] for line in lines if x in line) for x in set().union(*lines)}
            values |= cost(out) | {"Avg": json.loads(read(out / "scores.json"))["student"]["avg"]}
            found[run] = {x: float(f"{values[x]:.4g}") for x in sorted(names & values.keys())}
            write_json(file, found)


def main(argv=None):
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.set_defaults(write=starter)
    parser.add_argument("out", type=Path, help="what to write; alone: the students' folder")
    for write in (key, gradescope, measure):
        how = {"action": "store_const", "const": write, "help": write.__doc__}
        parser.add_argument(f"--{write.__name__}", dest="write", **how)
    args = parser.parse_args(argv)
    if args.out.exists() and args.write != measure:
        parser.exit(2, f"error: {args.out} exists; choose another name\n")
    if any(args.out.resolve().is_relative_to(ROOT / name) for name in FOLDERS):
        parser.exit(2, f"error: {args.out} lies in a folder that is copied; choose one outside\n")
    args.write(args.out)


if __name__ == "__main__":
    main()
