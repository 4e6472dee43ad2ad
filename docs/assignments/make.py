"""Write a starter folder for the six exercises: the code without their solutions, and the grader.

    python docs/assignments/make.py OUT

The bodies go by their names in talas.py as it stands, so that this can't grow old: signatures and
docstrings stay.
"""

import argparse
import ast
import shutil
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
BODIES = {  # exercise: equations, names in talas.py; of a class, all methods but __init__
    1: ("Eq. 3", ["tamd_loss"]),
    2: ("Eqs. 4-5", ["relation_matrix", "lasd_loss"]),
    3: ("Eq. 6", ["simcse_loss"]),
    4: ("Eq. 2", ["ASAM"]),
    5: ("Algorithm 1", ["training_step"]),
    6: ("Table 4", ["largest_hessian_eigenvalue"]),
}
GIVEN = ["cache_teacher.py", "eval.py", "requirements.txt", "LICENSE"]
GIVEN += ["docs/assignments/checks.py", "docs/assignments/grade.py"]
FOLDERS = ["support", "demo"]


def cut(lines, function, message):
    """Replace what follows the docstring by an error."""
    docstring, end = function.body[0], function.end_lineno
    while end < len(lines) and lines[end].startswith(" " * (function.col_offset + 1)):
        end += 1  # a comment at the end belongs to the body
    error = f'raise NotImplementedError("{message}")\n'
    lines[docstring.end_lineno : end] = [" " * docstring.col_offset + error]


def without_solutions(source):
    """talas.py, in which the bodies of the exercises raise NotImplementedError."""
    lines, functions = source.splitlines(keepends=True), []
    there = {node.name: node for node in ast.parse(source).body if hasattr(node, "name")}
    for number, (equations, names) in BODIES.items():
        for node in map(there.get, names):
            members = node.body if isinstance(node, ast.ClassDef) else [node]
            own = [x for x in members if isinstance(x, ast.FunctionDef) and x.name != "__init__"]
            functions += [(x, f"Exercise {number}: {equations}") for x in own]
    for function, message in sorted(functions, key=lambda pair: -pair[0].lineno):
        cut(lines, function, message)
    return "".join(lines)


def make(out):
    """Write the starter folder; README.md is the students' half of the one beside this file."""
    out.mkdir(parents=True)
    for name in GIVEN:
        shutil.copy(ROOT / name, out)
    for name in FOLDERS:
        skip = shutil.ignore_patterns("__pycache__", ".*")
        shutil.copytree(ROOT / name, out / name, ignore=skip)
    source = (ROOT / "talas.py").read_text("utf-8")
    text = (HERE / "README.md").read_text("utf-8")
    (out / "talas.py").write_text(without_solutions(source), "utf-8")
    handout = "# TALAS in six exercises\n" + text.split("\n## The exercises\n", 1)[1]
    (out / "README.md").write_text(handout, "utf-8")


def main(argv=None):
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("out", type=Path, help="the folder to write")
    out = parser.parse_args(argv).out
    if out.exists():
        parser.exit(2, f"error: {out} exists; choose another folder\n")
    if any(out.resolve().is_relative_to(ROOT / name) for name in FOLDERS):
        parser.exit(2, f"error: {out} lies in a folder that is copied; choose one outside\n")
    make(out)
    print(f"{out}: the starter folder; python grade.py in it gives 0 points")


if __name__ == "__main__":
    main()
