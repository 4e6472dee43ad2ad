"""docs/assignments: the starter folder, its grader, right and wrong solutions."""

import ast
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).resolve().parent.parent / "docs" / "assignments"))

import checks
import grade
import make

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


def test_the_autograder_grades_the_upload_or_the_starter(tmp_path):
    """In a copy, so that no upload stays; in place of the grader, which file it would grade."""
    page = (make.HERE / "README.md").read_text("utf-8")
    script = re.search(r"set -e\n(root=.*)python grade.py --json (.*?)```", page, re.DOTALL)
    script = f"set -e; {script[1]} cp talas.py {script[2]}"
    (tmp_path / "results").mkdir()
    for name in ("source/starter", "submission"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "talas.py").write_text(name)
        where = os.environ | {"AUTOGRADER": str(tmp_path)}
        subprocess.run(["bash", "-c", script], env=where, check=True)
        assert (tmp_path / "results" / "results.json").read_text() == name
    assert (tmp_path / "source/starter/talas.py").read_text() == "source/starter"


def test_a_mistake_of_the_teacher_is_one_line(tmp_path, ends_with_one_line):
    """Nothing is written over, no folder is copied into itself, nothing is graded in vain."""
    inside, missing = make.ROOT / "demo" / "starter", tmp_path / "missing" / "results.json"
    ends_with_one_line(lambda: make.main([str(tmp_path)]), "exists")
    ends_with_one_line(lambda: make.main([str(inside)]), "in a folder that is copied")
    ends_with_one_line(lambda: grade.main(["--json", str(missing)]), "folder that exists")
    ends_with_one_line(lambda: grade.main(["8"]), "no exercise 8")
    assert not list(tmp_path.iterdir()) and not inside.exists()


def graded(folder, content, *arguments):
    """Grade bytes as a submission in a folder; returns [(points, line)] of the checks."""
    grade.SUBMISSION, results = folder / "talas.py", folder / "results.json"
    grade.SUBMISSION.write_bytes(content)
    grade.main([*arguments, "--json", str(results)])
    return [(test["score"], test["output"]) for test in json.loads(results.read_text())["tests"]]


def test_the_key_has_all_points(tmp_path):
    """Also of the last check, which runs the demo; each prints a value beside what is expected."""
    make.main(["--key", str(tmp_path / "key")])
    results = graded(tmp_path, (tmp_path / "key" / "talas.py").read_bytes())
    assert sum(points for points, _ in results) == 100
    assert all(": expected " in line and ", got " in line for _, line in results)


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


TEXTBOOK = """
def tamd_gradient(projected, teacher):
    return torch.func.grad(lambda E: tamd_loss([E], [torch.eye(len(E[0]))], teacher))(projected)
def asam_ascent(w, gradient, rho, eta):
    u = (w.abs() + eta) * gradient
    return rho * (w.abs() + eta) * u / u.norm()
def tamd_loss(layers, projections, teacher):
    cosines = [F.cosine_similarity(E @ W, teacher) for E, W in zip(layers, projections)]
    return sum((1 - c).mean() for c in cosines) / len(layers)
def relation_matrix(E):
    return F.cosine_similarity(E[:, None], E[None], dim=-1)
def lasd_loss(layers, detach_guide=False):
    R = [relation_matrix(E) for E in layers]
    D = [(g.detach() if detach_guide else g) - r for g, r in zip(R[1:], R)]
    return sum((d**2).mean() for d in D) / len(D)
def simcse_loss(z, z_prime, temperature):
    cosines = F.cosine_similarity(z[:, None], z_prime[None], dim=-1) / temperature
    return (cosines.logsumexp(1) - cosines.diagonal()).mean()
class ASAM:
    def __init__(self, optimizer, rho, eta=0.0, adaptive=True):
        self.optimizer, self.rho, self.eta, self.adaptive = optimizer, rho, eta, adaptive
        self.w = {}
    def ascent_step(self):
        own = [p for group in self.optimizer.param_groups for p in group["params"]]
        self.w = {p: p.data.clone() for p in own if p.grad is not None}
        T = {p: w.abs() + self.eta if self.adaptive else 1.0 for p, w in self.w.items()}
        norm = sum((T[p] * p.grad).square().sum() for p in T).sqrt()
        [p.data.add_(self.rho * T[p] ** 2 * p.grad / (norm + 1e-12)) for p in T]
        self.optimizer.zero_grad(set_to_none=False)  # a
    def descent_step(self):
        [p.data.copy_(w) for p, w in self.w.items()]
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
        (above := objective(tokens, teacher)[0]).backward()
        values["sharpness_gap"] = above.item() - values["loss"]
    asam.descent_step()
    return values
def largest_hessian_eigenvalue(loss_fn, parameters, seed=0):
    losses = loss_fn if isinstance(loss_fn, list) else [loss_fn]
    def flat(loss, **how):
        g = torch.autograd.grad(loss, parameters, allow_unused=True, **how)
        return torch.cat([(0 * p if x is None else x).flatten() for x, p in zip(g, parameters)])
    def power(shift):
        n = sum(p.numel() for p in parameters)
        v = torch.randn(n, generator=torch.Generator().manual_seed(seed))
        for _ in range(200):
            v = (v / v.norm().clamp(min=1e-30)).detach()
            loss = sum(f() for f in losses) / len(losses)
            u = flat(flat(loss, create_graph=True) @ v) + shift * v
            v, value = u, (u @ v).item() - shift
        return value
    return power(abs(power(0.0)))
"""
CHANGES = r"""
right 1: E @ W, teacher => torch.einsum("nd,de->ne", E, W), teacher
right 1: E @ W, teacher => E.double() @ W.double(), teacher.double()
right 3: cosines.logsumexp(1) => torch.stack([row.logsumexp(0) for row in cosines])
right 4: T[p] ** 2 * p.grad => p.grad.mul_(T[p]).mul_(T[p])
right 5: state = => torch.manual_seed(int(torch.randint(2**31, ()))); state =
gradient_of_tamd 0: return torch => return len(teacher) * torch
ascent_of_asam 0: rho * (w.abs() + eta) * u => rho * u
small_projection 1: E @ W, teacher => E @ F.normalize(W, dim=0), teacher
small_projection 1: E @ W, teacher => E @ W, teacher, eps=1e-2
gradient 1: E @ W, teacher => E @ W.detach(), teacher
relation 2: E[None], dim=-1 => E[None], dim=-1, eps=1e-2
relation 2: dim=-1)\ndef lasd => dim=-1).abs()\ndef lasd
chain 2: (d**2) => d.abs()
detach_guide 2: g.detach() if detach_guide else g => g
extremes 3: cosines.logsumexp(1) => ((cosines - cosines.max()).exp().sum(1).log() + cosines.max())
sam 4: else 1.0 => else 1.0 + self.eta
no_gradient 4: (norm + 1e-12) => norm
no_gradient 4: not None} => not None}; [setattr(p, "grad", 0 * p) for p in own if p.grad is None]
adamw 4: self.optimizer.step() => for p in self.w: p.data -= 0.1 * p.grad
adamw 4: p.data.copy_(w) => p.data.sub_(p.data - w)
adamw 4: self.w = {p: => self.w = self.w or {p:
adamw 4: T = {p: => [self.optimizer.state[p].update(w=w) for p, w in self.w.items()]; T = {p:
clears 4: self.w = {} => pass
clears 4: zero_grad(set_to_none=False)  # d => param_groups[0]["params"][0].grad = None
other_cases 5: above.item() - values["loss"] => abs(above.item() - values["loss"])
other_cases 5: loss.b => (loss - terms["loss"] + 0.75 * terms["tamd"] + terms["lasd"]).b
disam 5: *[domains] => *[torch.arange(len(domains)) // 2]
masks 5: torch.set_rng_state(state) => pass
masks 5: state = torch.get_rng_state() => torch.manual_seed(0); state = torch.get_rng_state()
leaves_nothing 6: torch.Generator().manual_seed(seed) => torch.manual_seed(seed)
unused_weight 6: allow_unused=True => allow_unused=False
many_weights 6: range(200) => range(200 + 2000 * (n > 999))
"""
CASES = re.findall(r"^(\w+) (\d): (.*) => (.*)$", CHANGES, re.MULTILINE)


@pytest.mark.parametrize("name, number, old, new", CASES)
def test_a_mistake_loses_its_check_alone(name, number, old, new):
    """And another style none. What stands in TEXTBOOK becomes something else."""
    old, new = old.replace("\\n", "\n"), new.replace("\\n", "\n")
    assert old in TEXTBOOK
    sys.modules["graded"] = module = type(sys)("graded")
    exec(SOURCE, vars(module))
    exec(TEXTBOOK.replace(old, new, 1), vars(module))
    own = [c for c in vars(checks.EXERCISES[int(number)]).values() if callable(c)]
    lost = [c.__name__ for c in own if not grade.judge(c, module)[0]]
    assert lost == ([] if name == "right" else [name])
