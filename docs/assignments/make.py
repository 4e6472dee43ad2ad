"""Write a starter folder for the six exercises: the code without their solutions, and the grader.

    python docs/assignments/make.py OUT

The bodies go by their names in talas.py as it stands, so that this can't grow old: signatures and
docstrings stay.
"""

import ast
import shutil
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
BODIES = {  # exercise: equations, names in talas.py; of a class, all methods
    1: ("Eq. 3", ["tamd_loss"]),
    2: ("Eqs. 4-5", ["relation_matrix", "lasd_loss"]),
    3: ("Eq. 6", ["simcse_loss"]),
    4: ("Eq. 2", ["ASAM"]),
    5: ("Algorithm 1", ["training_step"]),
    6: ("Table 4", ["largest_hessian_eigenvalue"]),
}
GIVEN = ["cache_teacher.py", "eval.py", "support", "demo", "requirements.txt", "LICENSE"]
GRADER = ["checks.py", "grade.py"]


def cut(lines, function, message):
    """Replace what follows the docstring by an error."""
    first, *rest = function.body
    if not (rest and ast.get_docstring(function)):
        sys.exit(f"error: {function.name} needs a docstring and a body")
    end = function.end_lineno
    while end < len(lines) and lines[end].startswith(" " * (function.col_offset + 1)):
        end += 1  # a comment at the end belongs to the body
    indent = " " * first.col_offset
    lines[first.end_lineno : end] = [f'{indent}raise NotImplementedError("{message}")\n']


def cut_init(lines, function):
    """Keep what stores the arguments in __init__; what the solution needs besides goes."""
    arguments = {argument.arg for argument in function.args.args} - {"self"}
    for statement in reversed(function.body):
        used = {node.id for node in ast.walk(statement) if isinstance(node, ast.Name)}
        if not used & arguments:
            del lines[statement.lineno - 1 : statement.end_lineno]


def without_solutions(source):
    """talas.py, in which the bodies of the exercises raise NotImplementedError."""
    lines = source.splitlines(keepends=True)
    there = {node.name: node for node in ast.parse(source).body if hasattr(node, "name")}
    functions = []
    for number, (equations, names) in BODIES.items():
        for name in names:
            node = there[name]
            members = node.body if isinstance(node, ast.ClassDef) else [node]
            members = [member for member in members if isinstance(member, ast.FunctionDef)]
            functions += [(member, f"Exercise {number}: {equations}") for member in members]
    for function, message in sorted(functions, key=lambda pair: -pair[0].lineno):
        if function.name == "__init__":
            cut_init(lines, function)
        else:
            cut(lines, function, message)
    return "".join(lines)


def handout(text):
    """The students' part of README.md: from its heading on."""
    return "# TALAS in six exercises\n" + text.split("\n## The exercises\n", 1)[1]


def make(out):
    """Write the starter folder."""
    out.mkdir(parents=True)
    for name in GIVEN:
        if (ROOT / name).is_dir():
            skip = shutil.ignore_patterns("__pycache__", ".*")
            shutil.copytree(ROOT / name, out / name, ignore=skip)
        else:
            shutil.copy(ROOT / name, out / name)
    for name in GRADER:
        shutil.copy(HERE / name, out / name)
    source = (ROOT / "talas.py").read_text(encoding="utf-8")
    (out / "talas.py").write_text(without_solutions(source), encoding="utf-8")
    text = (HERE / "README.md").read_text(encoding="utf-8")
    (out / "README.md").write_text(handout(text), encoding="utf-8")


def main():
    """The command line."""
    if len(sys.argv) != 2 or sys.argv[1].startswith("-"):
        sys.exit("usage: python docs/assignments/make.py OUT")
    out = Path(sys.argv[1])
    if out.exists():
        sys.exit(f"error: {out} exists; choose another folder")
    make(out)
    print(f"{out}: the starter folder; python grade.py in it gives 0 points")


if __name__ == "__main__":
    main()
