"""docs/assignments: the starter folder, its grader, right and wrong solutions."""

import ast
import json
import math
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

import talas

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "docs" / "assignments"
sys.path.append(str(FOLDER))

import checks  # noqa: E402
import grade  # noqa: E402
import make  # noqa: E402

SOURCE = (ROOT / "talas.py").read_text(encoding="utf-8")
POINTS = {f"Exercise {n}: {name}": points for n, (name, points, _) in checks.EXERCISES.items()}
# what students get as it is; whatever else talas.py defines must be one of the exercises
KEPT = {"Settings", "embed", "total_loss", "disam_objective", "Objective", "batches", "set_up"}
KEPT |= {"train", "measure_sharpness", "parse_settings", "load_student", "save_student", "main"}


@pytest.fixture(scope="module")
def starter(tmp_path_factory):
    """A starter folder."""
    out = tmp_path_factory.mktemp("class") / "starter"
    make.make(out)
    return out


def run_grader(folder, *arguments):
    """(what it prints, its results) of grade.py in a folder."""
    command = [sys.executable, "grade.py", "--json", "results.json", *arguments]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout, json.loads((folder / "results.json").read_text())["tests"]


def functions(source):
    """{name: node} of the functions, and of the methods as Class.method."""
    nodes = {}
    for node in ast.parse(source).body:
        members = node.body if isinstance(node, ast.ClassDef) else [node]
        prefix = f"{node.name}." if isinstance(node, ast.ClassDef) else ""
        found = [member for member in members if isinstance(member, ast.FunctionDef)]
        nodes |= {prefix + member.name: member for member in found}
    return nodes


def is_exercise(name):
    """Whether a function or method of talas.py is to be written by the students."""
    mine = [name for _, names in make.BODIES.values() for name in names]
    return name in mine or (name.split(".")[0] in mine and not name.endswith("__init__"))


# ------------------------------------------------------------------------------ the starter folder
def test_every_function_is_given_or_an_exercise():
    """A new function in talas.py may hold a part of a solution: decide, and write it down."""
    names = {name.split(".")[0] for name in functions(SOURCE)} | {"Settings"}
    exercises = {name for _, names in make.BODIES.values() for name in names}
    assert names == KEPT | exercises


def test_the_starter_keeps_signatures_and_docstrings_and_loses_bodies(starter):
    """Everything but the bodies of the exercises is as it was."""
    ours, theirs = functions(SOURCE), functions((starter / "talas.py").read_text(encoding="utf-8"))
    assert list(ours) == list(theirs)
    for name, node in ours.items():
        other = theirs[name]
        assert ast.dump(node.args) == ast.dump(other.args)
        assert ast.get_docstring(node) == ast.get_docstring(other)
        if is_exercise(name):
            assert len(other.body) == 2 and isinstance(other.body[1], ast.Raise), name
        elif name != "ASAM.__init__":
            assert ast.dump(node) == ast.dump(other), name
    assert ast.unparse(theirs["ASAM.__init__"].body[-1]).startswith("self.optimizer")


def test_no_line_of_a_solution_is_in_the_starter(starter):
    """Neither in the code nor in its comments, the handout or the grader."""
    lines = SOURCE.splitlines()
    secret = set()
    for name, node in functions(SOURCE).items():
        if is_exercise(name):
            body = lines[node.body[0].end_lineno : node.end_lineno]
            secret |= {part.strip() for line in body for part in line.split("  # ")}
    secret = {part for part in secret if len(part) > 20}
    files = [path for path in starter.rglob("*") if path.suffix in (".py", ".md")]
    assert len(secret) > 40 and len(files) > 10
    for path in files:
        text = path.read_text(encoding="utf-8")
        assert not [part for part in secret if part in text], path


def test_the_starter_holds_what_it_needs_and_nothing_hidden(starter):
    """No link of the handout leads out of the folder, no cache of Python's is in it."""
    names = {path.name for path in starter.iterdir()}
    needed = {"talas.py", "checks.py", "grade.py", "README.md", "demo", "support", "eval.py"}
    assert needed | {"cache_teacher.py", "requirements.txt"} <= names
    assert not [path for path in starter.rglob("*") if path.name[0] in "._" and path.is_dir()]
    text = (starter / "README.md").read_text(encoding="utf-8")
    assert all(link.startswith("https:") for link in re.findall(r"\]\((.*?)\)", text))
    for number, (_, names) in make.BODIES.items():
        part = text.split(f"### {number}. ")[1].split("###")[0]
        assert f"({checks.EXERCISES[number][1]} points)" in part
        assert all(f"`{name}`" in part for name in names)


def test_make_writes_over_nothing(tmp_path, monkeypatch):
    """A folder that exists may hold a student's work."""
    monkeypatch.setattr(sys, "argv", ["make.py", str(tmp_path)])
    with pytest.raises(SystemExit, match="exists"):
        make.main()
    assert not list(tmp_path.iterdir())


def test_a_comment_at_the_end_of_a_body_goes_too():
    """ast does not know comments."""
    source = 'def f(x):\n    """Doc."""\n    # before\n    return x\n    # after\n\n\ndef g():\n'
    source += '    """Doc."""\n    return 1\n'
    lines = source.splitlines(keepends=True)
    make.cut(lines, ast.parse(source).body[0], "Exercise")
    text = 'def f(x):\n    """Doc."""\n    raise NotImplementedError("Exercise")\n\n\ndef g():\n'
    assert "".join(lines) == text + '    """Doc."""\n    return 1\n'


# -------------------------------------------------------------------------------------- the grader
def test_the_starter_has_no_points(starter):
    """And the grader says why, in Gradescope's format."""
    printed, tests = run_grader(starter)
    assert [(test["name"], test["max_score"]) for test in tests] == list(POINTS.items())
    assert sum(POINTS.values()) == 100
    for number, test in enumerate(tests, 1):
        assert test["score"] == 0
        assert test["output"].startswith(f"not written yet (Exercise {number}: ")
    lines = printed.splitlines()
    assert len(lines) == 7 and lines[-1].split() == ["Points", "0", "of", "100"]


def test_a_broken_submission_loses_what_is_broken(starter, tmp_path):
    """2 loops for ever, 3 does not parse, 4 exits, 5 kills its process; 1 and 6 are ours."""
    broken = {
        "relation_matrix": "    while True:\n        pass\n",
        "simcse_loss": "    return ((z, z_prime)\n",
        "ASAM.ascent_step": "        raise SystemExit(0)\n",
        "training_step": "    import os\n    os._exit(3)\n",
    }
    lines = SOURCE.splitlines(keepends=True)
    for name, node in sorted(functions(SOURCE).items(), key=lambda item: -item[1].lineno):
        if name in broken:
            lines[node.body[0].end_lineno : node.end_lineno] = [broken[name]]
    folder = tmp_path / "submission"
    folder.mkdir()
    for path in starter.iterdir():
        (folder / path.name).symlink_to(path)
    (folder / "talas.py").unlink()
    (folder / "talas.py").write_text("".join(lines), encoding="utf-8")
    for name in ("grade.py", "checks.py"):  # a program's folder is that of the file, not the link
        (folder / name).unlink()
        (folder / name).write_text((starter / name).read_text(encoding="utf-8"), encoding="utf-8")
    _, tests = run_grader(folder, "--limit", "4")
    reached = [test["score"] for test in tests]
    assert reached == [10, 0, 0, 0, 0, 20], [test["output"] for test in tests]
    assert tests[1]["output"] == "no result after 4 s: an endless loop?"
    assert re.fullmatch(r"SyntaxError: '\(' was never closed, line \d+ of.*", tests[2]["output"])
    where = int(re.search(r"line (\d+)", tests[2]["output"])[1])
    text = (folder / "talas.py").read_text(encoding="utf-8").splitlines()[where - 1]
    assert text == "    return ((z, z_prime)"
    assert tests[3]["output"].startswith("SystemExit: 0, line ")
    assert tests[4]["output"] == "the process ended without a result (exit code 3)"


def test_an_error_outside_the_functions_is_told(tmp_path):
    """Nothing can be graded then."""
    (tmp_path / "talas.py").write_text("import torch\nx = = 1\n\n\ndef f():\n    pass\n")
    with pytest.raises(SyntaxError):
        grade.load(tmp_path / "talas.py")


# -------------------------------------------------------------------------- right in another style
def textbook_tamd(layers, projections, teacher, reduction="mean"):
    """Eq. 3 with the cosine written out."""
    total = torch.zeros(len(teacher), dtype=teacher.dtype)
    for k in range(len(layers)):
        p = torch.matmul(layers[k], projections[k])
        cosine = (p * teacher).sum(-1) / (p.norm(dim=-1) * teacher.norm(dim=-1) + 1e-8)
        total = total + (1 - cosine) / len(layers)
    return total if reduction == "none" else total.sum() / len(total)


def textbook_relation(E):
    """Eq. 4, every pair by broadcasting."""
    return F.cosine_similarity(E.unsqueeze(1), E.unsqueeze(0), dim=-1)


def textbook_lasd(layers, detach_guide=False):
    """Eq. 5 as a loop with the Frobenius norm, squared."""
    loss = 0
    for lower, upper in zip(layers[:-1], layers[1:]):
        guide = textbook_relation(upper.detach() if detach_guide else upper)
        difference = guide - textbook_relation(lower)
        loss = loss + (difference**2).sum() / len(lower) ** 2
    return loss / (len(layers) - 1)


def textbook_simcse(z, z_prime, temperature, reduction="mean"):
    """Eq. 6 with logsumexp."""
    cosines = F.cosine_similarity(z[:, None], z_prime[None], dim=-1) / temperature
    losses = cosines.logsumexp(1) - cosines.diagonal()
    return losses.mean() if reduction == "mean" else losses


class TextbookASAM:
    """Eq. 2 as in the published code of ASAM: loops, + 1e-12, gradients of zero instead of none."""

    def __init__(self, optimizer, rho, eta=0.0, adaptive=True):
        self.optimizer, self.rho, self.eta, self.adaptive = optimizer, rho, eta, adaptive

    def parameters(self):
        for group in self.optimizer.param_groups:
            yield from (p for p in group["params"] if p.grad is not None)

    def T(self, p):
        return p.abs() + self.eta if self.adaptive else torch.ones_like(p)

    def norm(self):
        return torch.norm(torch.stack([(self.T(p) * p.grad).norm() for p in self.parameters()]))

    def epsilon(self, p, norm):
        return self.rho * self.T(p) ** 2 * p.grad / (norm + 1e-12)

    def clear(self):
        self.optimizer.zero_grad(set_to_none=False)

    @torch.no_grad()
    def ascent_step(self):
        norm = self.norm()
        self.old = {p: p.detach().clone() for p in self.parameters()}
        for p in self.old:
            p.add_(self.epsilon(p, norm))
        self.clear()

    @torch.no_grad()
    def back(self):
        for p, value in self.old.items():
            p.copy_(value)

    def descent_step(self):
        self.back()
        self.optimizer.step()
        self.clear()


def textbook_step(objective, asam, tokens, teacher, domains, s):
    """Algorithm 1, with the random state set by hand."""
    if s.optimizer == "adamw":
        loss, terms = objective(tokens, teacher)
        loss.backward()
        asam.descent_step()
        return torch.tensor([*(term.item() for term in terms), loss.item(), 0.0])
    state = torch.get_rng_state()
    how = {"reduction": "none"} if s.optimizer == "disam" else {}
    loss, terms = objective(tokens, teacher, **how)
    if s.optimizer == "disam":
        talas.disam_objective(loss, domains, s.disam_lambda).backward()
    else:
        loss.backward()
    loss = loss.mean().item()
    asam.ascent_step()
    torch.set_rng_state(state)
    above = objective(tokens, teacher)[0]
    above.backward()
    asam.descent_step()
    return torch.tensor([*(term.item() for term in terms), loss, above.item() - loss])


def textbook_eigenvalue(loss_fn, parameters, iterations=40, seed=0):
    """Lanczos with all vectors kept and orthogonalised, in float32."""
    functions, parameters = loss_fn if isinstance(loss_fn, list) else [loss_fn], list(parameters)

    def product(v):
        total = torch.zeros_like(v)
        for function in functions:
            g = torch.autograd.grad(function(), parameters, create_graph=True)
            dot = torch.cat([x.reshape(-1) for x in g]) @ v
            Hv = torch.autograd.grad(dot, parameters)
            total += torch.cat([x.reshape(-1) for x in Hv]) / len(functions)
        return total

    torch.manual_seed(seed)
    n = sum(p.numel() for p in parameters)
    q = torch.randn(n)
    Q = (q / q.norm())[None]
    for _ in range(min(iterations, n)):
        u = product(Q[-1])
        for _ in range(2):
            u = u - Q.T @ (Q @ u)
        if u.norm() < 1e-5:
            break
        Q = torch.cat([Q, (u / u.norm())[None]])
    small = torch.stack([Q @ product(q) for q in Q])
    return torch.linalg.eigvalsh((small + small.T) / 2).max()


TEXTBOOK = {
    "tamd_loss": textbook_tamd,
    "relation_matrix": textbook_relation,
    "lasd_loss": textbook_lasd,
    "simcse_loss": textbook_simcse,
    "ASAM": TextbookASAM,
    "training_step": textbook_step,
    "largest_hessian_eigenvalue": textbook_eigenvalue,
}


def judged(**replaced):
    """{exercise: what is wrong} of talas with some of its functions replaced."""
    module = SimpleNamespace(**{**vars(talas), **replaced})
    lines = {number: grade.judge(number, module) for number in checks.EXERCISES}
    return {number: line for number, line in lines.items() if line}


def test_ours_and_another_right_solution_have_all_points():
    """Values are checked, not how they are found."""
    assert judged() == {}
    assert judged(**TEXTBOOK) == {}


# ---------------------------------------------------------------------------------- wrong solutions
def sum_for_mean(layers, projections, teacher, reduction="mean"):
    """The sentences' sum."""
    losses = textbook_tamd(layers, projections, teacher, "none")
    return losses if reduction == "none" else losses.sum()


def last_layer_only(layers, projections, teacher, reduction="mean"):
    """K = 1 whatever is given."""
    return textbook_tamd(layers[-1:], projections[-1:], teacher, reduction)


def without_diagonal(layers, detach_guide=False):
    """The mean over pairs of different sentences."""
    N = len(layers[0])
    return textbook_lasd(layers, detach_guide) * N / (N - 1)


def pupil_detached(layers, detach_guide=False):
    """The wrong one of a pair is the constant."""
    if not detach_guide:
        return textbook_lasd(layers)
    return textbook_lasd(layers[::-1], detach_guide=True)


def without_tau(z, z_prime, temperature, reduction="mean"):
    """τ left out."""
    return textbook_simcse(z, z_prime, 1.0, reduction)


def negatives_of_the_first_view(z, z_prime, temperature, reduction="mean"):
    """cos(z_i, z_j) in the denominator, for j other than i."""
    cosines = F.cosine_similarity(z[:, None], z[None], dim=-1)
    own = F.cosine_similarity(z, z_prime, dim=-1)
    cosines = (cosines - torch.diag(cosines.diagonal()) + torch.diag(own)) / temperature
    losses = cosines.logsumexp(1) - cosines.diagonal()
    return losses.mean() if reduction == "mean" else losses


def views_exchanged(z, z_prime, temperature, reduction="mean"):
    """cos(z_j, z'_i) in the denominator."""
    return textbook_simcse(z_prime, z, temperature, reduction)


def without_the_positive(z, z_prime, temperature, reduction="mean"):
    """j = i left out of the denominator."""
    cosines = F.cosine_similarity(z[:, None], z_prime[None], dim=-1) / temperature
    others = cosines - torch.diag(torch.full((len(z),), math.inf))
    losses = others.logsumexp(1) - cosines.diagonal()
    return losses.mean() if reduction == "mean" else losses


def overflowing(z, z_prime, temperature, reduction="mean"):
    """Eq. 6 as it is printed."""
    powers = (F.cosine_similarity(z[:, None], z_prime[None], dim=-1) / temperature).exp()
    losses = -(powers.diagonal() / powers.sum(1)).log()
    return losses.mean() if reduction == "mean" else losses


class TForTSquared(TextbookASAM):
    def epsilon(self, p, norm):
        return self.rho * self.T(p) * p.grad / norm


class NoReturn(TextbookASAM):
    def back(self):
        pass


class InexactReturn(TextbookASAM):
    def epsilon(self, p, norm):
        self.moves = {**getattr(self, "moves", {}), p: super().epsilon(p, norm)}
        return self.moves[p]

    @torch.no_grad()
    def back(self):
        for p, move in self.moves.items():
            p.sub_(move)


class NormPerParameter(TextbookASAM):
    def epsilon(self, p, norm):
        return super().epsilon(p, (self.T(p) * p.grad).norm())


class SignedT(TextbookASAM):
    def T(self, p):
        return p + self.eta if self.adaptive else torch.ones_like(p)


class GradientKept(TextbookASAM):
    @torch.no_grad()
    def ascent_step(self):
        clear, self.clear = self.clear, lambda: None
        super().ascent_step()
        self.clear = clear


def other_masks(objective, asam, tokens, teacher, domains, s):
    """The second pass draws its own dropout masks."""
    with torch.random.fork_rng([]):
        torch.manual_seed(torch.randint(2**31, ()).item())
        state = torch.get_rng_state()
    calls = [0]

    def drawing(*batch, **how):
        calls[0] += 1
        if calls[0] == 2:
            torch.set_rng_state(state)
        return objective(*batch, **how)

    return textbook_step(drawing, asam, tokens, teacher, domains, s)


def descent_of_disam(objective, asam, tokens, teacher, domains, s):
    """DISAM's ascent forgotten."""
    plain = SimpleNamespace(optimizer="sam" if s.optimizer == "disam" else s.optimizer)
    return textbook_step(objective, asam, tokens, teacher, domains, plain)


def power_iteration(loss_fn, parameters, iterations=40, seed=0):
    """The eigenvalue of largest size."""
    functions, parameters = loss_fn if isinstance(loss_fn, list) else [loss_fn], list(parameters)
    torch.manual_seed(seed)
    v = [torch.randn_like(p) for p in parameters]
    for _ in range(iterations):
        loss = sum(function() for function in functions) / len(functions)
        g = torch.autograd.grad(loss, parameters, create_graph=True)
        length = math.sqrt(sum(x.square().sum() for x in v))
        v = [x / length for x in v]
        Hv = torch.autograd.grad(g, parameters, v)
        value = sum((a * b).sum() for a, b in zip(v, Hv))
        v = Hv
    return value


MISTAKES = [
    (1, "tamd_loss", sum_for_mean, "distances 0, 1, 0.2 of three sentences: expected 0.4, got 1.2"),
    (1, "tamd_loss", last_layer_only, "two layers, of 0.4 and 1.6: expected 1.0, got 1.6"),
    (2, "lasd_loss", without_diagonal, "six of nine cosines"),
    (2, "lasd_loss", pupil_detached, "detach_guide"),
    (3, "simcse_loss", without_tau, "τ = 0.5"),
    (3, "simcse_loss", negatives_of_the_first_view, "second views"),
    (3, "simcse_loss", views_exchanged, "second views"),
    (3, "simcse_loss", without_the_positive, "cosines 1"),
    (3, "simcse_loss", overflowing, "τ = 0.001"),
    (4, "ASAM", TForTSquared, "w = 3, gradient 2"),
    (4, "ASAM", NoReturn, "from w = 3"),
    (4, "ASAM", InexactReturn, "exactly"),
    (4, "ASAM", NormPerParameter, "two tensors"),
    (4, "ASAM", SignedT, "w = (-1, 2)"),
    (4, "ASAM", GradientKept, "gradient of the first pass"),
    (5, "training_step", other_masks, "dropout masks"),
    (5, "training_step", descent_of_disam, "disam: it climbs"),
    (6, "largest_hessian_eigenvalue", power_iteration, "-5.2"),
]


@pytest.mark.parametrize(
    "number, name, wrong, told", MISTAKES, ids=[row[2].__name__ for row in MISTAKES]
)
def test_a_mistake_loses_its_exercise_and_no_other(number, name, wrong, told):
    """The line that says what is wrong points at it."""
    lines = judged(**{name: wrong})
    assert list(lines) == [number]
    assert told in lines[number] and "\n" not in lines[number]
