"""docs/assignments: the starter folder, its grader, right and wrong solutions."""

import ast
import json
import os
import re
import statistics
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest
from helpers import ROOT, TEXTS, write_files

sys.path.append(str(ROOT / "docs" / "assignments"))

import checks
import grade
import make

import eval as evaluation
from cache_teacher import fingerprint
from support.data import unique_corpus

SOLUTION = make.solution()
TEXTBOOK = Path(__file__).with_name("textbook.py").read_text("utf-8")
MISTAKES = json.loads(Path(__file__).with_name("mistakes.json").read_text("utf-8"))
KEY = (make.HERE / "key.md").read_text("utf-8")


def table_rows(page):
    """The rows of a page's tables as dicts."""
    rows = []
    for line in page.splitlines():
        cells = [cell.strip() for cell in line.split("|")[1:-1]]
        if not cells or cells[0] == "---":
            continue
        if cells[0] in ("run", "mistake"):
            columns = cells
        else:
            rows.append(dict(zip(columns, cells)))
    return rows


KEY_ROWS = table_rows(KEY)


def graded(folder, content, *arguments):
    """Grade bytes as a submission; returns [(points, line)] of the checks."""
    grade.SUBMISSION = folder / "talas.py"
    grade.SUBMISSION.write_bytes(content)
    grade.main([*arguments, "--json", str(folder / "results.json")])
    tests = json.loads((folder / "results.json").read_text())["tests"]
    return [(test["score"], test["output"]) for test in tests]


# ------------------------------------------------------------------------------ what make.py writes
def test_the_starter_has_no_solutions_and_no_points(tmp_path):
    starter = tmp_path / "starter"
    make.main([str(starter)])
    source = (starter / "talas.py").read_text("utf-8")
    for function, exercise in make.functions_to_write(source):
        docstring, body = function.body
        assert ast.unparse(body) == f"raise NotImplementedError('Exercise {exercise}')"
    secret = []
    for function, _ in make.functions_to_write(SOLUTION):
        for statement in function.body[1:]:
            secret += [line for line in ast.unparse(statement).split("\n") if len(line) > 25]
    assert len(secret) > 25
    assert not [line for line in secret if line in source]
    assert "eigsh" not in source
    assert "student*/" in (starter / ".gitignore").read_text()
    handout = (starter / "README.md").read_text("utf-8")
    assert all(f"`{name}`" in handout for name in make.EXERCISES)
    for points, line in graded(tmp_path, source.encode()):
        assert points == 0
        assert "NotImplementedError: Exercise" in line


def test_make_needs_no_torch_and_says_what_it_wrote(tmp_path):
    code = "import sys; sys.modules['torch'] = None; import make; make.main()"
    for flags in (["starter"], ["--key", "key"]):
        command = [sys.executable, "-c", code, *flags]
        environment = os.environ | {"PYTHONPATH": str(make.HERE)}
        done = subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True
        )
        assert done.stdout.startswith(f"{flags[-1]}: the ")
    assert (tmp_path / "key/talas.py").read_text("utf-8") == SOLUTION
    assert (tmp_path / "key/key.md").read_text("utf-8") == KEY


def test_mistakes_of_the_teacher_are_one_line(tmp_path, ends_with_one_line):
    ends_with_one_line(lambda: make.main([str(tmp_path)]), "exists")
    ends_with_one_line(lambda: make.main(["/proc/starter"]), "cannot write /proc/starter")
    missing = str(tmp_path / "missing" / "results.json")
    ends_with_one_line(lambda: grade.main(["--json", missing]), "cannot write --json")
    ends_with_one_line(lambda: grade.main(["8"]), "no exercise 8")
    command = [sys.executable, make.HERE / "grade.py"]
    in_the_project = subprocess.run(command, capture_output=True, text=True)
    assert in_the_project.returncode == 2
    assert in_the_project.stderr.startswith("error: No module named 'cache_teacher'; ")
    assert in_the_project.stderr.count("\n") == 1


def test_gradescope(tmp_path):
    """Nothing uploaded: 0 points, and why. The solution: 100, whatever the folder student holds."""
    make.main(["--gradescope", str(tmp_path / "kit.zip")])
    with zipfile.ZipFile(tmp_path / "kit.zip") as kit:
        kit.extractall(tmp_path / "source")
        assert kit.getinfo("run_autograder").external_attr >> 16 & 0o100  # it can be executed
    (tmp_path / "submission/student").mkdir(parents=True)
    (tmp_path / "results").mkdir()
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = os.environ | {"AUTOGRADER": str(tmp_path), "PATH": path, "OMP_NUM_THREADS": "1"}
    totals = []
    for output in ("There is no talas.py at the top of your upload", ""):
        subprocess.run(["bash", tmp_path / "source/run_autograder"], env=environment, check=True)
        results = json.loads((tmp_path / "results/results.json").read_text())
        assert results.get("output", "").startswith(output)
        totals.append(sum(test["score"] for test in results["tests"]))
        (tmp_path / "results/results.json").unlink()
        (tmp_path / "submission/talas.py").write_text(SOLUTION, "utf-8")
    assert totals == [0, 100]
    assert "output" not in results


# --------------------------------------------------------------------------------- the leaderboard
@pytest.fixture
def student(tmp_path):
    """What the default run of the demo leaves, but for the weights."""
    record = {
        "settings": {"student": "tiny", "batch_size": 32},
        "teacher": "lsa",
        "corpus": fingerprint(unique_corpus("demo")[0]),
    }
    log = [{"step": 10}, {"step": 187}]
    return write_files(tmp_path / "student", {"talas.json": record, "metrics.jsonl": log})


@pytest.mark.parametrize(
    "steps, change, refusal",
    [
        (188, {}, "188 steps of 32"),
        (374, {"settings": {"student": "tiny", "batch_size": 16}}, "374 steps of 16"),
        (170, {"settings": {"student": "tiny", "batch_size": 35}}, "170 steps of 35"),
        (187, {"settings": {"student": "student", "batch_size": 32}}, "--student student"),
        (187, {"settings": {}}, "cannot find a trained student"),
        (187, {"teacher": "random"}, "another teacher or corpus"),
        (187, {"corpus": fingerprint(TEXTS)}, "another teacher or corpus"),
    ],
)
def test_a_student_over_the_budget(student, ends_with_one_line, steps, change, refusal):
    write_files(student, {"talas.json": change, "metrics.jsonl": [{"step": steps}]})
    ends_with_one_line(lambda: grade.main(["--leaderboard", str(student)]), refusal)


def test_the_leaderboard_has_evals_avg(student, monkeypatch):
    results = write_files(student, {"results.json": {"tests": []}}) / "results.json"

    def scores(argv):
        assert argv[:2] == [str(student), "--json"]
        Path(argv[2]).write_text(json.dumps({str(student): {"avg": 70.837}}))

    monkeypatch.setattr(evaluation, "main", scores)
    grade.main(["--leaderboard", str(student), "--json", str(results)])
    board = [{"name": "Avg", "value": 70.84}]
    assert json.loads(results.read_text()) == {"tests": [], "leaderboard": board}


# ---------------------------------------------------------------------------- broken submissions
BROKEN = """
import os, time
def relation_matrix(E): assert False
def lasd_loss(*_): return None
def simcse_loss(*_): os._exit(3)
def training_step(*_):
    child = os.fork()
    if child: open("CHILD", "w").write(str(child))
    time.sleep(600)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="needs Linux's fork")
def test_a_broken_submission_loses_what_is_broken(tmp_path):
    child = tmp_path / "child"
    source = SOLUTION + BROKEN.replace("CHILD", str(child))
    results = graded(tmp_path, source.encode(), "1", "2", "3", "5", "--limit", "0.5")
    lines = [line for points, line in results if points == 0]
    assert sum(points for points, _ in results) == 10
    assert re.match(r"AssertionError, line \d+ of talas.py. Hint: cos", lines[0])
    assert lines[1].startswith("six of nine cosines differ by 1: nothing is returned. Hint: ")
    assert lines[5] == "the process ended without a result (exit code 3)"
    assert lines[-1] == "no result after 2 s"
    stat = Path("/proc", child.read_text(), "stat")
    deadline = time.monotonic() + 10
    while stat.exists() and ") Z" not in stat.read_text():  # ended, if perhaps not buried
        assert time.monotonic() < deadline, "a process that it started lives on"


@pytest.mark.skipif(grade.resource is None, reason="needs limits of processes")
def test_an_endless_loop_ends_by_its_cpu_time(tmp_path, monkeypatch):
    monkeypatch.setattr(grade, "WALL_CLOCK", 100)
    source = (
        SOLUTION + "\ndef lasd_loss(layers, detach_guide=False):\n    while detach_guide: pass\n"
    )
    monkeypatch.setattr(checks, "CHECKS", [c for c in checks.CHECKS if "detach" in c["name"]])
    assert graded(tmp_path, source.encode(), "--limit", "1") == [
        (0, "no result after 1 s of CPU time: an endless loop?")
    ]


def test_a_submission_cannot_replace_what_the_checks_compare_with(tmp_path):
    source = """
import torch
torch.allclose = torch.equal = lambda *_, **__: True
torch.as_tensor = lambda *_, **__: torch.ones(())
def relation_matrix(E): return torch.ones(3, 3)
def simcse_loss(*_): return torch.ones(())
"""
    assert sum(points for points, _ in graded(tmp_path, source.encode(), "2", "3")) == 0


def test_a_submission_is_read_as_python_reads_it(tmp_path):
    byte_order_mark = b"\xef\xbb\xbf"
    assert (
        sum(points for points, _ in graded(tmp_path, byte_order_mark + SOLUTION.encode(), "1"))
        == 10
    )
    latin = "# coding: latin-1\ndef tamd_loss(*_):\n    raise TypeError('é')\n".encode("latin-1")
    assert graded(tmp_path, latin, "1")[0][1].startswith("TypeError: é, line 3 of talas.py")
    results = graded(tmp_path, b"import torch\nx = = 1\n", "1")
    assert {points for points, _ in results} == {0}
    assert "does not load: SyntaxError" in results[-1][1]


# --------------------------------------------------------------------------------- right and wrong
def lost_checks(source, exercise):
    """{name: line} of the checks that a solution of the textbook's style loses."""
    module = type(sys)("graded")
    sys.modules["graded"] = module
    exec(SOLUTION, vars(module))
    exec(source, vars(module))
    lost = {}
    for check in checks.CHECKS:
        if check["exercise"] == exercise:
            passed, line = grade.judge(check, module)
            if not passed:
                lost[check["name"].split(": ")[1]] = line
    return lost


@pytest.mark.parametrize("exercise", range(7))
def test_another_style_loses_nothing(exercise):
    assert lost_checks(TEXTBOOK, exercise) == {}


@pytest.mark.parametrize("case", MISTAKES, ids=lambda case: case["mistake"])
def test_a_mistake_loses_its_checks_alone(case):
    """mistakes.json says what is replaced in the textbook's solution; key.md what is then said."""
    assert case["old"] in TEXTBOOK
    lines = lost_checks(TEXTBOOK.replace(case["old"], case["new"]), case["exercise"])
    assert list(lines) == case["lost"]
    for row in KEY_ROWS:
        if row.get("mistake") == case["mistake"]:
            check = case["lost"][0]
            assert row["the grader says"] == f"`{check}`: {lines[check]}"


@pytest.mark.parametrize(
    "mistake, line",
    [
        ("ASAM.descent_step = ASAM.restore", "tamd after ten steps"),
        ("largest_hessian_eigenvalue = lambda *_: float('nan')", "λ_max after five steps"),
    ],
    ids=["no step", "no λ_max"],
)
def test_exercise_7_needs_a_student_that_learns(monkeypatch, mistake, line):
    module = type(sys)("graded")
    monkeypatch.setitem(sys.modules, "graded", module)
    exec(SOLUTION, vars(module))
    exec(mistake, vars(module))
    passed, found = grade.judge(checks.CHECKS[-1], module)
    assert not passed
    assert line in found


def test_the_key_has_the_means_of_three_seeds_and_ten_mistakes():
    measured = json.loads((make.HERE / "measured.json").read_text())
    runs = [row for row in KEY_ROWS if "run" in row]
    assert len(runs) == 21
    for row in runs:
        flags = "".join(re.findall("`(.*)`", row.pop("run")))
        for column, cell in row.items():
            seeds = [measured[f"{flags} --seed {seed}".strip()] for seed in (42, 43, 44)]
            if cell == "–":
                assert column not in seeds[0]
                continue
            values = [seed[column] for seed in seeds]
            assert cell == f"{statistics.mean(values):.4g} ± {statistics.stdev(values):.2g}", flags
    mistakes = [row["mistake"] for row in KEY_ROWS if "mistake" in row]
    assert len(mistakes) == 10
    assert set(mistakes) <= {case["mistake"] for case in MISTAKES}
