"""docs/assignments: the starter folder, its grader, right and wrong solutions."""

import ast
import json
import os
import re
import runpy
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
from conftest import SENTENCES, in_a_process

sys.path.append(str(Path(__file__).resolve().parent.parent / "docs" / "assignments"))

import checks
import grade
import make

import eval as evaluation
import talas
from demo import tiny

SOURCE = make.solution()


def bare(source):
    """(a talas.py without the bodies of the exercises, node by node; the lines of these bodies)."""
    lines, tree = [], ast.parse(source)
    for top in tree.body:
        for node in ast.walk(top) if getattr(top, "name", "") in make.BODIES else ():
            if isinstance(node, ast.FunctionDef) and node.name != "__init__":
                lines += source.splitlines()[node.body[0].end_lineno : node.end_lineno]
                del node.body[1:]  # what follows the docstring
    return {ast.dump(node) for node in tree.body}, [line.strip() for line in lines]


def test_the_starter_has_all_but_the_solutions_and_no_points(tmp_path):
    """No line of them is anywhere, and each check says what is missing."""
    starter = tmp_path / "starter"
    make.main([str(starter)])
    ours, solutions = bare(SOURCE)
    theirs, left = bare((starter / "talas.py").read_text("utf-8"))
    assert theirs < ours and "eigsh" in str(ours - theirs)
    assert len(left) == 11 and all(line.startswith("raise NotImplementedError") for line in left)
    secret = {part for line in solutions for part in line.split("  # ") if len(part) > 20}
    assert len(secret) > 30
    for path in [*starter.rglob("*.py"), *starter.rglob("*.md")]:
        assert not [part for part in secret if part in path.read_text("utf-8")], path
    handout = (starter / "README.md").read_text("utf-8")
    assert all(f"`{name}`" in handout for name in make.BODIES)
    assert all(link.startswith("https:") for link in re.findall(r"\]\((.*?)\)", handout))
    for points, line in graded(tmp_path, (starter / "talas.py").read_bytes()):
        assert points == 0 and "NotImplementedError: Exercise" in line


def test_a_mistake_of_the_teacher_is_one_line(tmp_path, ends_with_one_line):
    """Nothing is written over, no folder is copied into itself, nothing is graded in vain."""
    inside, missing = make.ROOT / "demo" / "starter", tmp_path / "missing" / "results.json"
    ends_with_one_line(lambda: make.main([str(tmp_path)]), "exists")
    ends_with_one_line(lambda: make.main([str(inside)]), "in a folder that is copied")
    ends_with_one_line(lambda: grade.main(["--json", str(missing)]), "folder that exists")
    ends_with_one_line(lambda: make.main(["--measure", str(missing)]), "folder that exists")
    ends_with_one_line(lambda: grade.main(["8"]), "no exercise 8")
    assert not list(tmp_path.iterdir()) and not inside.exists()


def graded(folder, content, *arguments):
    """Grade bytes as a submission in a folder; returns [(points, line)] of the checks."""
    grade.SUBMISSION, results = folder / "talas.py", folder / "results.json"
    grade.SUBMISSION.write_bytes(content)
    grade.main([*arguments, "--json", str(results)])
    return [(test["score"], test["output"]) for test in json.loads(results.read_text())["tests"]]


def alone(folder, *arguments):
    """`python` with these arguments in a folder, in a process of its own, without our modules."""

    def action():
        os.chdir(folder)
        ours = (str(make.ROOT), str(make.HERE), "checks", "cache_teacher", "support", "demo")
        for name in [name for name in sys.modules if name.split(".")[0] in ours]:
            del sys.modules[name]
        sys.path[:] = [folder, *(path for path in sys.path if path not in ours)]
        sys.argv, sys.stdout = list(arguments), open(os.devnull, "w")
        runpy.run_path(arguments[0], run_name="__main__")

    return in_a_process(action)


def test_gradescopes_zip_gives_the_solution_100_points_and_no_upload_0(tmp_path):
    """In place of python a script tells where it was called, and how."""
    make.main(["--gradescope", str(tmp_path / "kit.zip")])
    with zipfile.ZipFile(tmp_path / "kit.zip") as kit:
        kit.extractall(tmp_path / "source")
        modes = [kit.getinfo(name).external_attr >> 16 for name in ("setup.sh", "run_autograder")]
    assert all(mode & 0o100 for mode in modes)
    for name in ("submission", "results", "bin"):
        (tmp_path / name).mkdir()
    (tmp_path / "bin/python").write_text('#!/bin/sh\necho "$PWD $@" >> "$AUTOGRADER/calls"\n')
    (tmp_path / "bin/python").chmod(0o755)
    where = {"AUTOGRADER": str(tmp_path), "TMPDIR": str(tmp_path)}
    where = os.environ | where | {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}"}
    for expected in (0, 100):
        subprocess.run(["bash", tmp_path / "source/run_autograder"], env=where, check=True)
        calls = [line.split() for line in (tmp_path / "calls").read_text().splitlines()]
        assert alone(*calls[expected > 0]) == 0
        tests = json.loads((tmp_path / "results/results.json").read_text())["tests"]
        assert sum(test["score"] for test in tests) == expected
        (tmp_path / "submission/talas.py").write_text(SOURCE, "utf-8")
        (tmp_path / "submission/student").mkdir(exist_ok=True)
    assert all(": expected " in test["output"] and ", got " in test["output"] for test in tests)
    assert calls[2][1:4] == ["grade.py", "--leaderboard", str(tmp_path / "submission/student")]


def test_the_leaderboard_has_evals_avg(tmp_path, bert, monkeypatch, capsys, ends_with_one_line):
    """Of a student within the budget, which is that of the demo's default run."""
    corpus = (make.ROOT / "demo/corpus.jsonl").read_text("utf-8").splitlines()
    steps = len(corpus) // talas.Settings.batch_size * tiny.SETTINGS["epochs"]
    pairs = [{"sentence1": SENTENCES[0], "sentence2": x, "score": len(x)} for x in SENTENCES]
    (tmp_path / "demo/sts").mkdir(parents=True)
    (tmp_path / "demo/sts/test.jsonl").write_text("\n".join(map(json.dumps, pairs)))
    monkeypatch.setattr(evaluation, "DEMO", tmp_path / "demo")
    results, scores = tmp_path / "results.json", tmp_path / "scores.json"
    flags = ["--leaderboard", str(bert), "--json", str(results)]
    ends_with_one_line(lambda: grade.main(flags), "cannot find a trained student")
    for last, batch in ((steps + 1, 32), (steps, 33), (steps, 32)):
        (bert / "metrics.jsonl").write_text(f'{{"step": 1}}\n{{"step": {last}}}\n')
        (bert / "talas.json").write_text(json.dumps({"settings": {"batch_size": batch}}))
        if last > steps or batch > 32:
            ends_with_one_line(lambda: grade.main(flags), f"{last} steps of {batch} sentences")
    results.write_text('{"tests": []}')
    grade.main(flags)
    printed = json.loads(capsys.readouterr().out)
    evaluation.main([str(bert), "--data", str(tmp_path / "demo"), "--json", str(scores)])
    avg = round(json.loads(scores.read_text())[str(bert)]["avg"], 2)
    assert printed == [{"name": "Avg", "value": avg}]
    assert json.loads(results.read_text()) == {"tests": [], "leaderboard": printed}


def test_the_key_has_three_seeds_and_what_the_grader_says(tmp_path):
    """A mean and a spread as numpy has them; each of ten mistakes costs one check its points."""
    make.main(["--key", str(tmp_path / "key")])
    assert (tmp_path / "key/talas.py").read_text("utf-8") == SOURCE
    page = (tmp_path / "key/key.md").read_text("utf-8")
    found = json.loads((make.HERE / "measured.json").read_text())
    avgs = [found[f"--rho 1 --seed {seed}"]["Avg"] for seed in (42, 43, 44)]
    cell = f"{np.mean(avgs):.4g} ± {np.std(avgs, ddof=1):.2g}"
    assert re.search(rf"^\| `--rho 1` \| [^|]* \| {cell} \|$", page, re.MULTILINE)
    assert "| |" not in page and page.count("– |") == 1  # without LASD it has no value
    rows = re.findall(r"^\|.*\| `(.*?)` \| `(.*?)` \| `(.*?)`: (.*) \|$", page, re.MULTILINE)
    assert len(rows) == 10
    for old, new, name, line in rows:
        (exercise,) = [str(check["exercise"]) for check in checks.CHECKS if check["name"] == name]
        assert SOURCE.count(old) == 1 and "`: " not in line
        results = graded(tmp_path, SOURCE.replace(old, new).encode(), exercise)
        assert [said for points, said in results if not points] == [line.replace("\\|", "|")]


def test_measure_trains_what_the_file_lacks(tmp_path, monkeypatch):
    """In place of the scripts stands one that writes what they write."""
    ran, kept = [], json.loads((make.HERE / "measured.json").read_text())
    (first, old), *_ = kept.items()
    (tmp_path / "some.json").write_text(json.dumps({first: old}))

    def script(command, cwd, check):
        out = Path(cwd, "student")
        if command[1].name == "talas.py":
            ran.append(" ".join(command[2:]).removesuffix(" --sharpness --overwrite"))
            out.mkdir(exist_ok=True)
            lines = [{"step": k, "sharpness_gap": k} for k in range(20)]
            lines += [{"step": 20, "lambda_max": 5}]
            (out / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
        elif command[1].name == "eval.py":
            command[3].write_text('{"student": {"avg": 1.23456}}')

    monkeypatch.setattr(make.subprocess, "run", script)
    make.main(["--measure", str(tmp_path / "some.json")])
    found = json.loads((tmp_path / "some.json").read_text())
    assert ran == list(kept)[1:] and list(found) == list(kept) and found[first] == old
    assert found["--rho 1 --seed 44"] == {"Avg": 1.235, "sharpness_gap": 14.5}
    assert found["--rho 2 --seed 44"] == {"Avg": 1.235, "lambda_max": 5.0}


BROKEN = """
import os, time
def tamd_loss(*_):
    while True: pass
def lasd_loss(*_): assert False
def simcse_loss(*_):
    os._exit(3)
def largest_hessian_eigenvalue(*_, **__):
    if pid := os.fork(): open(r"CHILD", "w").write(str(pid))
    else: time.sleep(600)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="needs Linux's fork")
def test_a_broken_submission_loses_what_is_broken(tmp_path):
    """1 loops; in 2 the relation is ours, the rest is not; 3 ends; 6 leaves children."""
    child, broken = tmp_path / "child", SOURCE + BROKEN.replace("CHILD", str(tmp_path / "child"))
    results = graded(tmp_path, broken.encode(), "1", "2", "3", "6", "6", "--limit", "0.3")
    points, lines = zip(*results)
    assert points == (0, 0, 0, 3, *11 * [0])
    assert lines[0] == lines[2] == "no result after 0.3 s: an endless loop?"
    assert re.match(r"AssertionError, line \d+ of talas.py. Hint: Squares", lines[4])
    assert lines[7] == "the process ended without a result (exit code 3)"
    assert "nothing is returned. Hint" in lines[10]
    state, deadline = Path("/proc", child.read_text(), "stat"), time.monotonic() + 5
    while state.exists() and ") Z" not in state.read_text():  # ended, if perhaps not buried
        assert time.monotonic() < deadline, "what it started lives on"


def test_a_submission_is_read_as_python_reads_it(tmp_path):
    """A byte order mark, a declared encoding; what can't be loaded is told of each check."""
    assert sum(score for score, _ in graded(tmp_path, b"\xef\xbb\xbf" + SOURCE.encode(), "1")) == 10
    latin = "# coding: latin-1\ndef tamd_loss(*_):\n    raise ValueError('é')\n".encode("latin-1")
    assert graded(tmp_path, latin, "1")[0][1].startswith("ValueError: é, line 3 of talas.py")
    first, *_, last = graded(tmp_path, b"import torch\nx = = 1\n", "1", "2")
    assert first == last and first[0] == 0 and "does not load: SyntaxError" in first[1]


TEXTBOOK = Path(__file__).with_name("textbook.py").read_text("utf-8")
CHANGES = """
right 1: E @ W, teacher => torch.einsum("nd,de->ne", E, W), teacher
right 1: E @ W, teacher => E.double() @ W.double(), teacher.double()
right 3: cosines.logsumexp(1) => torch.stack([row.logsumexp(0) for row in cosines])
right 4: T[p] ** 2 * p.grad => p.grad.mul_(T[p]).mul_(T[p])
right 5: state = => torch.manual_seed(int(torch.randint(2**31, ()))); state =
ascent_of_asam 0: rho * (w.abs() + eta) * u => rho * u
small_projection 1: E @ W, teacher => E @ W, teacher, eps=1e-2
gradient 1: E @ W, teacher => E @ W.detach(), teacher
relation 2: E[None], dim=-1 => E[None], dim=-1, eps=1e-2
relation 2: None], E[None], dim=-1) => None], E[None], dim=-1).abs()
detach_guide 2: g.detach() if detach_guide else g => g
extremes 3: cosines.logsumexp(1) => ((cosines - cosines.max()).exp().sum(1).log() + cosines.max())
no_gradient 4: not None} => not None}; [setattr(p, "grad", 0 * p) for p in own if p.grad is None]
adamw 4: p.data.copy_(w) => p.data.sub_(p.data - w)
adamw 4: self.w = {p: => self.w = self.w or {p:
adamw 4: T = {p: => [self.optimizer.state[p].update(w=w) for p, w in self.w.items()]; T = {p:
clears 4: self.w = {} => pass
clears 4: zero_grad(set_to_none=False)  # d => param_groups[0]["params"][0].grad = None
other_cases 5: above.item() - values["loss"] => abs(above.item() - values["loss"])
other_cases 5: loss.b => (loss - terms["loss"] + 0.75 * terms["tamd"] + terms["lasd"]).b
disam 5: *[domains] => *[torch.arange(len(domains)) // 2]
masks 5: state = torch.get_rng_state() => torch.manual_seed(0); state = torch.get_rng_state()
leaves_nothing 6: torch.Generator().manual_seed(seed) => torch.manual_seed(seed)
many_weights 6: range(200) => range(200 + 2000 * (n > 999))
"""
CASES = re.findall(r"^(\w+) (\d): (.*) => (.*)$", CHANGES, re.MULTILINE)


@pytest.mark.parametrize("name, number, old, new", CASES)
def test_a_mistake_loses_its_check_alone(name, number, old, new):
    """And another style none. What stands in TEXTBOOK becomes something else."""
    assert old in TEXTBOOK
    sys.modules["graded"] = module = type(sys)("graded")
    exec(SOURCE, vars(module))
    exec(TEXTBOOK.replace(old, new, 1), vars(module))
    own = [check for check in checks.CHECKS if check["exercise"] == int(number)]
    lost = [c["name"].split(": ")[1] for c in own if not grade.judge(c, module)[0]]
    assert lost == ([] if name == "right" else [name])
