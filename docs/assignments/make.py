"""Make the course's files from the project.

python docs/assignments/make.py STARTER           # the students' folder: code without solutions
python docs/assignments/make.py --key KEY         # the instructor's: key and solutions
python docs/assignments/make.py --gradescope ZIP  # the autograder
"""

import argparse
import ast
import re
import shutil
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
sys.path.append(str(ROOT))

from support import attempt, fail  # noqa: E402 - without torch: making a starter needs none

EXERCISES = {  # function or class: number
    "tamd_gradient": 0,
    "asam_ascent": 0,
    "tamd_loss": 1,
    "relation_matrix": 2,
    "lasd_loss": 2,
    "simcse_loss": 3,
    "ASAM": 4,
    "training_step": 5,
    "hessian_vector_product": 6,
    "largest_hessian_eigenvalue": 6,
}
FILES = (
    "cache_teacher.py",
    "eval.py",
    "requirements.txt",
    "LICENSE",
    "docs/assignments/checks.json",
    "docs/assignments/checks.py",
    "docs/assignments/grade.py",
)
FOLDERS = ("support", "demo")
IGNORED_BY_GIT = "__pycache__/\n.venv/\n*.pt\n*.partial\nstudent*/\nresults.json\n"


def solution():
    """talas.py, with the solution of exercise 0 from key.md before tamd_loss."""
    key = (HERE / "key.md").read_text("utf-8")
    derivation = re.search(r"```python\n(.*?)```", key, re.DOTALL)[1]
    source = (ROOT / "talas.py").read_text("utf-8")
    return source.replace("def tamd_loss(", f"{derivation}\n\ndef tamd_loss(", 1)


def functions_to_write(source):
    """[(function, exercise)] in the order of the file; of a class all methods but __init__."""
    functions = []
    for node in ast.parse(source).body:
        exercise = EXERCISES.get(getattr(node, "name", None))
        if exercise is None:
            continue
        members = node.body if isinstance(node, ast.ClassDef) else [node]
        for member in members:
            if isinstance(member, ast.FunctionDef) and member.name != "__init__":
                functions.append((member, exercise))
    return functions


def without_solutions(source):
    """talas.py, in which the bodies of the exercises raise NotImplementedError."""
    lines = source.splitlines(keepends=True)
    for function, exercise in reversed(functions_to_write(source)):
        docstring = function.body[0]
        indent = " " * docstring.col_offset
        error = f'{indent}raise NotImplementedError("Exercise {exercise}")\n'
        lines[docstring.end_lineno : function.end_lineno] = [error]
    text = "".join(lines)
    for line, names in re.findall(r"^(from \S+ import (\w.*)\n)", text, re.MULTILINE):
        uses = [len(re.findall(rf"\b{name}\b", text)) for name in names.split(", ")]
        if max(uses) == 1:  # an import that only the solution needs gives it away
            text = text.replace(line, "")
    return text


def starter(out):
    """Write the students' folder; its README.md is the second half of the course's."""
    out.mkdir()
    (out / "talas.py").write_text(without_solutions(solution()), "utf-8")
    for name in FILES:
        shutil.copy(ROOT / name, out)
    for name in FOLDERS:
        shutil.copytree(ROOT / name, out / name, ignore=shutil.ignore_patterns("__pycache__", ".*"))
    (out / ".gitignore").write_text(IGNORED_BY_GIT, "utf-8")
    handout = (HERE / "README.md").read_text("utf-8").partition("\n## The exercises\n")[2]
    (out / "README.md").write_text("# TALAS in eight exercises\n" + handout, "utf-8")


def gradescope(out):
    """Write the zip for Gradescope: the starter, setup.sh and run_autograder."""
    folder = out.with_name("autograder")
    shutil.copytree(HERE / "gradescope", folder)
    starter(folder / "starter")
    made = shutil.make_archive(folder, "zip", folder)
    shutil.move(made, out)


def key(out):
    """Write the instructor's folder: the key and all solutions."""
    out.mkdir()
    shutil.copy(HERE / "key.md", out)
    (out / "talas.py").write_text(solution(), "utf-8")


def write(kind, out, contents):
    """Write a folder or file, whole or not at all, and say what it contains."""
    if out.exists():
        fail(f"{out} exists; choose another name")
    with attempt(f"write {out}", OSError), tempfile.TemporaryDirectory() as folder:
        made = Path(folder, "made")
        kind(made)
        shutil.move(made, out)
    print(f"{out}: {contents}")


def main(argv=None):
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.error = fail
    parser.add_argument("out", type=Path, help="what to write; without a flag the students' folder")
    parser.add_argument("--key", action="store_true", help="the instructor's folder")
    parser.add_argument("--gradescope", action="store_true", help="the autograder, a zip")
    args = parser.parse_args(argv)
    if args.key:
        write(key, args.out, "the key and all solutions")
    elif args.gradescope:
        write(gradescope, args.out, "the autograder; upload it to Gradescope")
    else:
        write(starter, args.out, "the students' folder; it holds no solutions")


if __name__ == "__main__":
    main()
