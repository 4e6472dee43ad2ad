"""docs/assignments: the starter folder, its grader, right and wrong solutions."""

import ast
import json
import math
import re
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

import talas

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT / "docs" / "assignments"))

import checks
import grade
import make

SOURCE = (ROOT / "talas.py").read_text("utf-8")
EXERCISES = {name for _, names in make.BODIES.values() for name in names}


def bare(path):
    """(the tree of a talas.py without the bodies of the exercises, the lines of these bodies)."""
    source, lines = path.read_text("utf-8"), []
    tree = ast.parse(source)
    for top in tree.body:
        for node in ast.walk(top) if getattr(top, "name", "") in EXERCISES else ():
            if isinstance(node, ast.FunctionDef) and node.name != "__init__":
                lines += source.splitlines()[node.body[0].end_lineno : node.end_lineno]
                del node.body[1:]  # what follows the docstring
    return ast.dump(tree), [line.strip() for line in lines]


def test_the_starter_has_all_but_the_solutions_and_no_points(tmp_path):
    """No line of them is anywhere, and the grader says in Gradescope's format what is missing."""
    starter = tmp_path / "starter"
    make.main([str(starter)])
    (ours, solutions), (theirs, left) = (bare(path / "talas.py") for path in (ROOT, starter))
    assert ours == theirs
    assert len(left) == 9 and all(line.startswith("raise NotImplementedError") for line in left)
    secret = {part for line in solutions for part in line.split("  # ") if len(part) > 20}
    files = [path for path in starter.rglob("*") if path.suffix in (".py", ".md")]
    assert len(secret) > 30 and len(files) > 10
    for path in files:
        assert not [part for part in secret if part in path.read_text("utf-8")], path
    handout = (starter / "README.md").read_text("utf-8")
    assert all(f"`{name}`" in handout for name in EXERCISES)
    assert all(link.startswith("https:") for link in re.findall(r"\]\((.*?)\)", handout))
    command = [sys.executable, "grade.py", "--json", "results.json"]
    printed = subprocess.run(command, cwd=starter, capture_output=True, text=True, check=True)
    tests = json.loads((starter / "results.json").read_text())["tests"]
    for number, (test, points) in enumerate(zip(tests, [10, 15, 15, 20, 20, 20], strict=True), 1):
        assert (test["score"], test["max_score"]) == (0, points)
        assert test["output"].startswith(f"not written yet (Exercise {number}: ")
    assert printed.stdout.splitlines()[6].split() == ["Points", "0", "of", "100"]


def test_a_mistake_of_the_teacher_is_one_line(tmp_path, ends_with_one_line):
    """Nothing is written over, no folder is copied into itself, nothing is graded in vain."""
    inside, missing = ROOT / "demo" / "starter", tmp_path / "missing" / "results.json"
    ends_with_one_line(lambda: make.main([str(tmp_path)]), "exists")
    ends_with_one_line(lambda: make.main([str(inside)]), "in a folder that is copied")
    ends_with_one_line(lambda: grade.main(["--json", str(missing)]), "folder that exists")
    ends_with_one_line(lambda: grade.main(["7"]), "no exercise 7")
    assert not list(tmp_path.iterdir()) and not inside.exists()


def graded(folder, content, *arguments):
    """Grade bytes as a submission in a folder; returns (points, line) of each exercise."""
    grade.SUBMISSION, results = folder / "talas.py", folder / "results.json"
    grade.SUBMISSION.write_bytes(content)
    grade.main([*arguments, "--json", str(results)])
    return [(test["score"], test["output"]) for test in json.loads(results.read_text())["tests"]]


BROKEN = """
def lasd_loss(*_):
    while True: pass
def simcse_loss(*_):
    assert False
def ASAM(*_, **__):
    raise SystemExit(0)
import os, time
def training_step(*_):
    os._exit(3)
def largest_hessian_eigenvalue(*_, **__):
    if pid := os.fork(): open(r"CHILD", "w").write(str(pid))
    else: time.sleep(600)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="needs Linux's fork")
def test_a_broken_submission_loses_what_is_broken(tmp_path):
    """1 is ours; 2 loops, 3 fails without a word, 4 exits, 5 ends its process, 6 leaves one."""
    child, broken = tmp_path / "child", SOURCE + BROKEN.replace("CHILD", str(tmp_path / "child"))
    results = graded(tmp_path, broken.encode(), "--limit", "2")
    assert [points for points, _ in results] == [10, 0, 0, 0, 0, 0]
    _, loops, fails, exits, ends, leaves = [line for _, line in results]
    assert loops == "no result after 2 s: an endless loop?"
    assert re.fullmatch(r"AssertionError, line \d+ of talas.py", fails)
    assert exits.startswith("SystemExit: 0, line ") and leaves.endswith("nothing is returned")
    assert ends == "the process ended without a result (exit code 3)"
    state, deadline = Path("/proc", child.read_text(), "stat"), time.monotonic() + 5
    while state.exists() and ") Z" not in state.read_text():  # ended, if perhaps not buried
        assert time.monotonic() < deadline, "what it started lives on"


def test_a_submission_is_read_as_python_reads_it(tmp_path):
    """A byte order mark, a declared encoding; what can't be loaded is told of each exercise."""
    assert graded(tmp_path, b"\xef\xbb\xbf" + SOURCE.encode(), "1") == [(10, "right")]
    latin = "# coding: latin-1\ndef tamd_loss(*_):\n    raise ValueError('é')\n".encode("latin-1")
    assert graded(tmp_path, latin, "1") == [(0, "ValueError: é, line 3 of talas.py")]
    first, second = graded(tmp_path, b"import torch\nx = = 1\n", "1", "2", "2")
    assert first == second and first[0] == 0 and "does not load: SyntaxError" in first[1]


TEXTBOOK = """
def tamd_loss(layers, projections, teacher):
    cosines = [F.cosine_similarity(E @ W, teacher) for E, W in zip(layers, projections)]
    return sum((1 - c).mean() for c in cosines) / len(layers)
def relation_matrix(E):
    return F.cosine_similarity(E[:, None], E[None], dim=-1)
def lasd_loss(layers, detach_guide=False):
    R = [relation_matrix(E) for E in layers]
    guides = [r.detach() if detach_guide else r for r in R[1:]]
    return sum(((g - r) ** 2).sum() for g, r in zip(guides, R)) / len(R[0]) ** 2 / len(guides)
def simcse_loss(z, z_prime, temperature):
    cosines = F.cosine_similarity(z[:, None], z_prime[None], dim=-1) / temperature
    return (cosines.logsumexp(1) - cosines.diagonal()).mean()
class ASAM:
    def __init__(self, optimizer, rho, eta=0.0, adaptive=True):
        self.optimizer, self.rho, self.eta, self.adaptive = optimizer, rho, eta, adaptive
    def ascent_step(self):
        own = [p for group in self.optimizer.param_groups for p in group["params"]]
        self.w = {p: p.data.clone() for p in own if p.grad is not None}
        T = {p: w.abs() + self.eta if self.adaptive else 1.0 for p, w in self.w.items()}
        norm = sum((T[p] * p.grad).square().sum() for p in T).sqrt()
        for p in T:
            p.data += self.rho * T[p] ** 2 * p.grad / (norm + 1e-12)
        self.optimizer.zero_grad(set_to_none=False)  # a
    def descent_step(self):
        for p, w in self.w.items():
            p.data.copy_(w)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=False)  # d
def training_step(objective, asam, tokens, teacher, domains, s):
    state = torch.get_rng_state()
    loss, terms = objective(tokens, teacher, *[domains][: s.optimizer == "disam"])
    loss.backward()
    values = {name: term.item() for name, term in terms.items()}
    if s.optimizer != "adamw":
        asam.ascent_step()
        torch.set_rng_state(state)
        above = objective(tokens, teacher)[0]
        above.backward()
        values["sharpness_gap"] = above.item() - values["loss"]
    asam.descent_step()
    return values
def largest_hessian_eigenvalue(loss_fn, parameters, seed=0):
    losses = loss_fn if isinstance(loss_fn, list) else [loss_fn]
    loss = sum(f() for f in losses) / len(losses)
    g = torch.cat([x.flatten() for x in torch.autograd.grad(loss, parameters, create_graph=True)])
    rows = [torch.autograd.grad(x, parameters, retain_graph=True) for x in g]
    H = torch.stack([torch.cat([x.flatten() for x in row]) for row in rows])
    return torch.linalg.eigvalsh(H).max()
"""
MISTAKES = [  # exercise, what in TEXTBOOK, becomes what, and the grader says
    (1, "(1 - c).mean()", "(1 - c).sum()", "1 layers: expected 0.4, got 1.2"),
    (1, "zip(layers, projections)", "[(layers[-1], projections[-1])]", "2 layers"),
    (1, "E @ W, teacher", "E @ W.detach(), teacher", "gradient is wrong"),
    (2, "F.cosine_similarity(E[:, None], E[None], dim=-1)", "E @ E.T", "relation matrix of"),
    (2, " / len(R[0]) ** 2", " / len(R[0]) / (len(R[0]) - 1)", "six of nine cosines"),
    (2, "r.detach() if detach_guide else r", "r", "detach_guide: layers 1-3"),
    (3, " / temperature", "", "at τ = 0.5"),
    (3, "cosines.logsumexp(1)", "cosines.exp().sum(1).log()", "τ = 0.001"),
    (3, "(cosines.l", "((cosines - torch.diag(torch.full((len(z),), math.inf))).l", "cosines 1"),
    (4, "T[p] ** 2 *", "T[p] *", "ρ = 0.3: w̃"),
    (4, "(norm + 1e-12)", "((T[p] * p.grad).norm() + 1e-12)", "ρ = 0.3: w̃"),
    (4, "w.abs() + self.eta", "w + self.eta", "η = 1: w̃"),
    (4, "else 1.0", "else 1.0 + self.eta", "adaptive=False"),
    (4, "(norm + 1e-12)", "norm", "a gradient of 0"),
    (4, "p.data.copy_(w)", "pass", "the step with gradients"),
    (4, "p.data.copy_(w)", "p.data -= p.data - w", "w must come back exactly"),
    (4, "self.optimizer.zero_grad(set_to_none=False)  # a", "pass", "after ascent_step"),
    (4, "self.optimizer.zero_grad(set_to_none=False)  # d", "pass", "after descent_step"),
    (4, "self.optimizer.step()", "for p in self.w: p.data -= 0.1 * p.grad", "momentum"),
    (5, "torch.set_rng_state(state)", "pass", "the second pass must draw the first's"),
    (5, '*[domains][: s.optimizer == "disam"]', "", "disam, from w = 1.0: its steps"),
    (5, "above.item() - values", "above.item() - 2 * values", "from w = 1.0: sharpness_gap"),
    (5, "term.item()", "term", "still holds its graph"),
    (6, "eigvalsh(H).max()", "eigvalsh(H).abs().max()", "diag(5, -5.2, 1, 1)"),
    (6, " / len(losses)\n    g", "\n    g", "a list of two losses"),
]


def judged(number, source):
    """(whether an exercise is right, a line on it) with what the source defines in talas.py."""
    own = vars(talas) | {"math": math}
    exec(source, own)
    return grade.judge(number, SimpleNamespace(**own))


@pytest.mark.parametrize("number", checks.EXERCISES)
def test_ours_and_another_right_solution_have_all_points(number):
    assert judged(number, "") == judged(number, TEXTBOOK) == (True, "right")


@pytest.mark.parametrize("number, old, new, told", MISTAKES)
def test_a_mistake_loses_its_exercise(number, old, new, told):
    """The line that says what is wrong points at it."""
    blocks = re.split(r"\n(?=def |class )", TEXTBOOK)
    [mistaken] = [block.replace(old, new) for block in blocks if old in block]
    right, line = judged(number, mistaken)
    assert not right and told in line and "\n" not in line
