"""docs/assignments: the starter folder, its grader, right and wrong solutions."""

import ast
import json
import math
import os
import re
import shutil
import statistics
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from helpers import ROOT, write_files

sys.path.append(str(ROOT / "docs" / "assignments"))

import checks
import grade
import make

import eval as evaluation
from support.data import unique_corpus
from support.files import digest

SOLUTION = make.solution()
TEXTBOOK = Path(__file__).with_name("textbook.py").read_text("utf-8")
MISTAKES = json.loads(Path(__file__).with_name("mistakes.json").read_text("utf-8"))
KEY = (make.HERE / "key.md").read_text("utf-8")


def graded(folder, content, *arguments):
    """Grade bytes as a submission; returns {check: (points, line)}."""
    grade.SUBMISSION = folder / "talas.py"
    grade.SUBMISSION.write_bytes(content)
    grade.main([*arguments, "--json", str(folder / "results.json")])
    tests = json.loads((folder / "results.json").read_text())["tests"]
    return {test["name"]: (test["score"], test["output"]) for test in tests}


# ------------------------------------------------------------------------------ what make.py writes
def test_the_starter_has_no_solutions_and_no_points(tmp_path):
    starter = tmp_path / "starter"
    make.main([str(starter)])
    source = (starter / "talas.py").read_text("utf-8")
    for function, exercise in make.functions_to_write(source):
        docstring, error = function.body
        assert ast.unparse(error) == f"raise NotImplementedError('Exercise {exercise}')"
    assert "eigsh" not in source
    for points, line in graded(tmp_path, source.encode()).values():
        assert points == 0
        assert "NotImplementedError: Exercise" in line


def test_the_key_is_made_without_torch(tmp_path):
    code = f"import sys; sys.modules['torch'] = None; sys.path.append({str(make.HERE)!r})"
    command = [sys.executable, "-c", f"{code}; import make; make.main()", "--key", "key"]
    subprocess.run(command, cwd=tmp_path, check=True)
    assert (tmp_path / "key/talas.py").read_text("utf-8") == SOLUTION


def test_mistakes_of_the_teacher_are_one_line(tmp_path, ends_with_one_line):
    ends_with_one_line(lambda: make.main([str(tmp_path)]), "exists")
    ends_with_one_line(lambda: grade.main(["8"]), "no exercise 8")


@pytest.fixture
def autograder(tmp_path, monkeypatch):
    """The folder of Gradescope's autograder, with the kit and nothing uploaded."""
    make.main(["--gradescope", str(tmp_path / "kit.zip")])
    shutil.unpack_archive(tmp_path / "kit.zip", tmp_path / "source")
    (tmp_path / "results").mkdir()
    monkeypatch.setenv("AUTOGRADER", str(tmp_path))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    return tmp_path


def run_autograder(folder, python):
    """What Gradescope's script writes; python: the folder of that program."""
    environment = os.environ | {"PATH": f"{python}:{os.environ['PATH']}"}
    subprocess.run(["bash", folder / "source/run_autograder"], env=environment, check=True)
    return json.loads((folder / "results/results.json").read_text())


def test_gradescope_gives_the_solution_100_points(autograder):
    write_files(autograder, {"submission/talas.py": SOLUTION})
    results = run_autograder(autograder, Path(sys.executable).parent)
    assert results.keys() == {"tests"}
    assert sum(test["score"] for test in results["tests"]) == 100


def test_gradescope_without_talas_py_says_so_and_scores_the_student(autograder):
    """A student over the budget, which grade.py refuses, does not end the script."""
    fake_python = '#!/bin/sh\necho "$1 $2" >> "$AUTOGRADER/calls"\ntest "$2" = --json\n'
    write_files(autograder, {"python": fake_python, "submission/student/talas.json": {}})
    (autograder / "python").chmod(0o700)
    results = run_autograder(autograder, autograder)
    assert results["output"].startswith("There is no talas.py")
    calls = (autograder / "calls").read_text()
    assert calls == "grade.py --json\ngrade.py --leaderboard\n"


# --------------------------------------------------------------------------------- the leaderboard
DEMO = digest(unique_corpus("demo")[0])


def trained(folder, steps=187, student="tiny", batch_size=32, teacher="lsa", corpus=DEMO):
    """What a run leaves, except for the weights; the default is the demo's."""
    settings = {"student": student, "batch_size": batch_size}
    record = {"settings": settings, "teacher": teacher, "corpus": corpus}
    files = {"talas.json": record, "metrics.jsonl": [{"step": steps}]}
    return str(write_files(folder, files))


@pytest.mark.parametrize(
    "run, refusal",
    [
        ({"steps": 374, "batch_size": 16}, "374 steps of 16"),
        ({"batch_size": 35}, "187 steps of 35"),
        ({"student": "student"}, "--student student"),
        ({"teacher": "random"}, "another teacher or corpus"),
        ({"corpus": "another"}, "another teacher or corpus"),
    ],
)
def test_a_student_over_the_budget(tmp_path, ends_with_one_line, run, refusal):
    student = trained(tmp_path, **run)
    ends_with_one_line(lambda: grade.main(["--leaderboard", student]), refusal)


def test_the_leaderboard_has_evals_avg(tmp_path, monkeypatch):
    student = trained(tmp_path)
    results = write_files(tmp_path, {"results.json": {"tests": []}}) / "results.json"

    def score(argv):
        model, flag, path = argv
        write_files(tmp_path, {path: {model: {"avg": 70.837}}})

    monkeypatch.setattr(evaluation, "main", score)
    grade.main(["--leaderboard", student, "--json", str(results)])
    board = [{"name": "Avg", "value": 70.84}]
    assert json.loads(results.read_text()) == {"tests": [], "leaderboard": board}


# ---------------------------------------------------------------------------- broken submissions
BROKEN = """
import os, time
def tamd_gradient(*_): time.sleep(600)
def asam_ascent(*_):
    while True: pass
def relation_matrix(E): assert False
def lasd_loss(*_): return None
def simcse_loss(*_): os._exit(3)
"""


def test_a_broken_submission_loses_what_is_broken(tmp_path, monkeypatch):
    monkeypatch.setattr(grade, "WALL_CLOCK", 25)
    source = (SOLUTION + BROKEN).encode()
    results = graded(tmp_path, source, "0", "1", "2", "3", "--limit", "0.2")
    assert results["Derivation: gradient_of_tamd"] == (0, "no result after 5 s")
    line = "no result after 0.2 s of CPU time: an endless loop?"
    assert results["Derivation: ascent_of_asam"] == (0, line)
    assert results["Lasd: relation"][1].startswith("AssertionError, line ")
    assert "cosines differ by 1: nothing is returned. Hint: " in results["Lasd: chain"][1]
    line = "the process ended without a result (exit code 3)"
    assert results["Simcse: values"] == (0, line)
    assert sum(points for points, line in results.values()) == 10  # all of exercise 1


def test_a_file_that_python_cannot_load_gets_no_points(tmp_path):
    for points, line in graded(tmp_path, b"import torch\nx = = 1\n", "1").values():
        assert points == 0
        assert "does not load: SyntaxError" in line


# --------------------------------------------------------------------------------- right and wrong
def loaded(source):
    """A module of our solution, in which the source replaces what it defines."""
    module = type(sys)("graded")
    sys.modules["graded"] = module
    exec(SOLUTION, vars(module))
    exec(source, vars(module))
    return module


@pytest.mark.parametrize("case", MISTAKES, ids=[case["mistake"] for case in MISTAKES])
def test_a_mistake_loses_its_checks_alone(case):
    """mistakes.json says what is replaced in textbook.py; some changes are right and lose nothing.

    key.md says what the grader says to ten of them.
    """
    assert case["old"] in TEXTBOOK
    module = loaded(TEXTBOOK.replace(case["old"], case["new"]))
    lines = {}
    for check in checks.CHECKS:
        if check["exercise"] == case["exercise"]:
            passed, line = grade.judge(check, module)
            if not passed:
                lines[check["name"].split(": ")[1]] = line
    assert list(lines) == case["lost"]
    for row in KEY.splitlines():
        if row.startswith(f"| {case['mistake']} |"):
            check = case["lost"][0]
            assert row.endswith(f" | `{check}`: {lines[check]} |")


@pytest.mark.parametrize(
    "tamd, lambda_max, line",
    [
        (0.96, 3.0, "tamd after ten steps"),
        (0.94, math.nan, "λ_max after five steps"),
    ],
)
def test_exercise_7_needs_a_student_that_learns(tamd, lambda_max, line):
    def main(argv):
        output = argv[argv.index("--output") + 1]
        log = [{"tamd": 1.0}, {"tamd": tamd}, {"lambda_max": lambda_max}]
        write_files(output, {"metrics.jsonl": log})

    passed, found = grade.judge(checks.CHECKS[-1], SimpleNamespace(main=main))
    assert not passed
    assert line in found


def test_the_key_has_ten_mistakes():
    mistakes = re.findall(r"^\| (.*?) \| `[\w.]+` \| `", KEY, re.MULTILINE)
    assert len({case["mistake"] for case in MISTAKES}.intersection(mistakes)) == 10


def test_the_key_has_the_means_of_three_seeds():
    measured = json.loads((make.HERE / "measured.json").read_text())
    for run, scores in measured.items():
        flags = run.partition("--seed")[0]
        for column in scores:
            values = [measured[f"{flags}--seed {seed}"][column] for seed in (42, 43, 44)]
            cell = f"| {statistics.mean(values):.4g} ± {statistics.stdev(values):.2g} |"
            assert cell in KEY
