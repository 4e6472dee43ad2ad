"""Make the course's files from the project as it stands.

python docs/assignments/make.py STARTER     # the students' folder: code without the solutions
python docs/assignments/make.py --key KEY   # the instructor's: key and solutions
"""

import argparse
import ast
import re
import shutil
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
BODIES = {
    "tamd_gradient": 0,
    "asam_ascent": 0,
    "tamd_loss": 1,
    "relation_matrix": 2,
    "lasd_loss": 2,
}
BODIES |= {"simcse_loss": 3, "ASAM": 4, "training_step": 5, "largest_hessian_eigenvalue": 6}
GIVEN = ["cache_teacher.py", "eval.py", "requirements.txt", "LICENSE"]
GIVEN += ["docs/assignments/checks.py", "docs/assignments/grade.py"]
FOLDERS, SKIP = ["support", "demo"], shutil.ignore_patterns("__pycache__", ".*")


def solution():
    """talas.py, and in it exercise 0, whose solution is in key.md."""
    derivation = re.search(r"```python\n(.*?)```", (HERE / "key.md").read_text("utf-8"), re.S)[1]
    source = (ROOT / "talas.py").read_text("utf-8")
    return source.replace("def tamd_loss(", f"{derivation}\n\ndef tamd_loss(", 1)


def without_solutions(source):
    """talas.py, in which the bodies of the exercises raise NotImplementedError."""
    lines, functions = source.splitlines(keepends=True), []
    there = {node.name: node for node in ast.parse(source).body if hasattr(node, "name")}
    for name, number in BODIES.items():  # of a class, all methods but __init__
        members = there[name].body if isinstance(there[name], ast.ClassDef) else [there[name]]
        own = [x for x in members if isinstance(x, ast.FunctionDef) and x.name != "__init__"]
        functions += [(x, f"Exercise {number}") for x in own]
    for function, message in sorted(functions, key=lambda pair: -pair[0].lineno):
        docstring, end = function.body[0], function.end_lineno
        while end < len(lines) and lines[end].startswith(" " * (function.col_offset + 1)):
            end += 1  # a comment at the end belongs to the body
        error = f'{" " * docstring.col_offset}raise NotImplementedError("{message}")\n'
        lines[docstring.end_lineno : end] = [error]
    text = "".join(lines)
    for line, names in re.findall(r"^(from \S+ import (.*)\n)", text, re.MULTILINE):
        if all(len(re.findall(rf"\b{name}\b", text)) == 1 for name in re.findall(r"\w+", names)):
            text = text.replace(line, "")  # it gives away what the solution needs
    return text


def make(out, key):
    """Write the starter folder, with the students' half of README.md; or key and solutions."""
    out.mkdir(parents=True)
    source = solution() if key else without_solutions(solution())
    (out / "talas.py").write_text(source, "utf-8")
    if key:
        return shutil.copy(HERE / "key.md", out)
    for name in GIVEN:
        shutil.copy(ROOT / name, out)
    for name in FOLDERS:
        shutil.copytree(ROOT / name, out / name, ignore=SKIP)
    handout = (HERE / "README.md").read_text("utf-8").split("\n## The exercises\n", 1)[1]
    (out / "README.md").write_text("# TALAS in eight exercises\n" + handout, "utf-8")


def main(argv=None):
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("out", type=Path, help="the folder to write")
    parser.add_argument("--key", action="store_true", help="make the instructor's folder")
    args = parser.parse_args(argv)
    if args.out.exists():
        parser.exit(2, f"error: {args.out} exists; choose another folder\n")
    if any(args.out.resolve().is_relative_to(ROOT / name) for name in FOLDERS):
        parser.exit(2, f"error: {args.out} lies in a folder that is copied; choose one outside\n")
    make(args.out, args.key)


if __name__ == "__main__":
    main()
