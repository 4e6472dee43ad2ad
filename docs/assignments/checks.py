"""What a submission must do. checks.json lists the checks, with points, hints and worked values.

Worked values were computed on paper or, for random inputs, by a loop in float64. "check" names the
function below that does a check; it gets the submission, and the check's entry if that has cases.
"""

import json
import tempfile
from pathlib import Path

import torch
from torch import allclose, as_tensor  # by name: a submission can replace those in torch
from torch.nn import Parameter

import cache_teacher
from support.data import DEMO, read_table

CHECKS = json.loads(Path(__file__).with_name("checks.json").read_text("utf-8"))
NOTES = []  # what the current check has compared


class Wrong(Exception):
    """A result is wrong. A submission's own errors are of other kinds."""


def run(check, talas):
    """Do a check; returns a line on its first comparison. An exception if something is wrong."""
    NOTES.clear()
    function = globals()[check["check"]]
    if "function" in check or "cases" in check:
        function(talas, check)
    else:
        function(talas)
    return NOTES[0]


# --------------------------------------------------------------------------------------- comparing
def compare(found, expected, what, right):
    """Note both; fail unless `right`."""
    line = f"{what}: expected {expected}, got {found}"
    NOTES.append(line)
    if not right:
        raise Wrong(line)


def close(found, expected, what, tolerance=1e-4):
    """Fail unless a number or tensor has the expected shape and values."""
    if found is None:
        raise Wrong(f"{what}: nothing is returned")
    found = as_tensor(found).detach().double()
    expected = as_tensor(expected).detach().double()
    right = found.shape == expected.shape and allclose(found, expected, tolerance, tolerance)
    found = found.round(decimals=5).tolist()
    compare(found, expected.round(decimals=5).tolist(), what, right)


def random(seed, *shape):
    """Normal random numbers, the same on every machine."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def tensors(inputs):
    """JSON's lists as tensors; a number stays."""
    return [torch.tensor(x).float() if isinstance(x, list) else x for x in inputs]


def call(talas, check, inputs):
    """Call the submission's function; it gets a stack of matrices as a list."""
    arguments = []
    for x in inputs:
        if getattr(x, "ndim", 0) == 3:
            x = list(x)
        arguments.append(x)
    return getattr(talas, check["function"])(*arguments)


def worked_values(talas, check):
    """Each case is an input and the value that belongs to it."""
    for case in check["cases"]:
        found = call(talas, check, tensors(case["inputs"]))
        close(found, case["expected"], case["what"])


def gradient(talas, check):
    """Along a random line autograd's slope is that of central differences."""
    inputs = tensors(check["inputs"])

    def loss(t):
        moved = list(inputs)
        for k, x in enumerate(inputs[:2]):  # a third is a constant: the teacher, or τ
            moved[k] = x + t * random(k, *x.shape)
        return call(talas, check, moved)

    t = torch.zeros((), requires_grad=True)
    (found,) = torch.autograd.grad(loss(t), t)
    h = 0.003
    close(found, (loss(h) - loss(-h)) / (2 * h), "slope, by central differences", 3e-3)


# -------------------------------------------------------------------------- exercise 0: derivation
def gradient_of_tamd(talas):
    projected, teacher = random(1, 2, 3), random(2, 2, 3)
    found = talas.tamd_gradient(projected, teacher)
    projected.requires_grad_()
    lengths = projected.norm(dim=1) * teacher.norm(dim=1)
    loss = 1 - ((projected * teacher).sum(1) / lengths).mean()
    loss.backward()
    close(found, projected.grad, "random e W, by autograd")


def ascent_of_asam(talas):
    """‖T⁻¹ ε‖ ≤ ρ allows no larger ∇L · ε than ρ ‖T ∇L‖, by Cauchy and Schwarz."""
    w, gradient, rho, eta = random(1, 6), random(2, 6), 0.3, 0.1
    epsilon = talas.asam_ascent(w, gradient, rho, eta)
    T = w.abs() + eta
    close((epsilon / T).norm(), rho, "‖T⁻¹ ε‖, with ρ = 0.3")
    largest = rho * (T * gradient).norm()
    close((gradient * epsilon).sum(), largest, "∇L · ε, as large as ρ allows")


# -------------------------------------------------------------------- exercises 1 and 2: the losses
def numbers_differ(talas):
    layers = [random(1, 4, 3)]
    projections = [random(2, 3, 5), random(3, 3, 5)]
    found = "no error"
    try:
        talas.tamd_loss(layers, projections, random(4, 4, 5))
    except ValueError:
        found = "ValueError"
    compare(found, "ValueError", "one layer, two projections", found == "ValueError")


def detach_guide(talas):
    layers = [random(seed, 4, 3).requires_grad_() for seed in range(3)]
    loss = talas.lasd_loss(layers, detach_guide=True)
    close(loss, talas.lasd_loss(layers), "the value with detach_guide")
    gradients = torch.autograd.grad(loss, layers, materialize_grads=True)
    found = [bool(g.any()) for g in gradients]
    expected = [True, True, False]
    compare(found, expected, "do layers 1, 2, 3 move?", found == expected)


# -------------------------------------------------------------------------------- exercise 4: ASAM
class Climber:
    """ASAM around an optimizer of w = (1, -2) and (2), in two groups."""

    def __init__(self, talas, kind=torch.optim.SGD, rho=0.3, eta=0.0, adaptive=True, decay=0.0):
        self.w = [Parameter(torch.tensor([1.0, -2.0])), Parameter(torch.tensor([2.0]))]
        first = {"params": self.w[:1], "lr": 0.1}
        second = {"params": self.w[1:], "lr": 0.2}
        self.optimizer = kind([first, second], weight_decay=decay)
        self.asam = talas.ASAM(self.optimizer, rho, eta=eta, adaptive=adaptive)

    def take(self, step, *gradients):
        """Take a step with these gradients, of which the second may be left out; returns w."""
        for p, g in zip(self.w, gradients):
            p.grad = torch.tensor(g).float()
        step()
        return torch.cat([p.detach() for p in self.w])


def ascents(talas, check):
    """Each case is a gradient, and w̃."""
    for case in check["cases"]:
        climber = Climber(talas, **case["settings"])
        found = climber.take(climber.asam.ascent_step, *case["gradients"])
        close(found, case["expected"], case["what"])


def no_gradient(talas):
    climber = Climber(talas)
    found = climber.take(climber.asam.ascent_step, [0.0, 0.0], [0.0])
    close(found, [1.0, -2.0, 2.0], "w = (1, -2; 2), ∇L = 0: w̃")
    climber = Climber(talas, decay=0.5)
    found = climber.take(climber.asam.ascent_step, [2.0, 1.0])
    close(found[2], 2.0, "w without a gradient, after ascent_step")
    found = climber.take(climber.asam.descent_step, [1.0, 1.0])
    close(found[2], 2.0, "w without a gradient, after descent_step")


def adamw(talas):
    climber = Climber(talas, torch.optim.AdamW, rho=1e6)
    bare = Climber(talas, torch.optim.AdamW)
    for k in range(3):
        climber.take(climber.asam.ascent_step, [1.0, k], [-1.0])
        found = climber.take(climber.asam.descent_step, [2.0, 1.0 - k], [k + 0.5])
        expected = bare.take(bare.optimizer.step, [2.0, 1.0 - k], [k + 0.5])
        close(found, expected, f"w after step {k + 1}, AdamW by itself")


def clears(talas):
    climber = Climber(talas)
    asam = climber.asam
    for step in (asam.descent_step, asam.ascent_step, asam.descent_step):  # the first by itself
        climber.take(step, [2.0, 1.0], [-0.5])
        sizes = []
        for p in climber.w:
            sizes.append(0.0 if p.grad is None else p.grad.norm().item())
        what = f"size of each group's gradients after {step.__name__}"
        compare(sizes, [0.0, 0.0], what, sizes == [0.0, 0.0])


# -------------------------------------------------------------------- exercise 5: the training step
IDS = torch.tensor([[1, 0], [3, 2]])  # sums 1 and 5: mean 3
BATCH = {"input_ids": IDS, "attention_mask": (IDS > 0).long()}
TARGETS = torch.tensor([[3.0, 0], [1, 2]])  # first column: mean 2
DOMAINS = torch.tensor([2, 0])  # times the sums: mean 1


class ToyObjective:
    """tamd 2 w², lasd 1.5 w², so the default L is 3 w²; with domains w² more."""

    def __init__(self, w, s):
        self.w = Parameter(torch.tensor(float(w)))
        self.s = s
        self.drawn = []  # a random number of each pass

    def __call__(self, tokens, teacher, domains=None):
        self.drawn.append(torch.rand(1).item())
        square = self.w**2
        sums = tokens["input_ids"].sum(1).float()
        tamd = teacher[:, 0].mean() * square
        lasd = sums.mean() / 2 * square
        loss = self.s.lambda2 * tamd + self.s.lambda3 * lasd
        values = {"tamd": tamd, "lasd": lasd, "loss": loss}
        if domains is None:
            return loss, values
        return loss + (sums * domains).mean() * square, values


class ToyASAM:
    """Goes from w to w + 1 and back; the descent goes by 0.1 times the gradient."""

    def __init__(self, w):
        self.w = w
        self.calls = []  # of each step: its name, and the gradient that it found
        self.up = 0

    def ascent_step(self):
        self.calls.append(["ascent", round(self.w.grad.item(), 4)])
        self.w.data += 1
        self.up = 1
        self.w.grad = None

    def descent_step(self):
        self.calls.append(["descent", round(self.w.grad.item(), 4)])
        self.w.data -= self.up + 0.1 * self.w.grad
        self.up = 0
        self.w.grad = None


def steps(talas, check):
    """Each case: the gradients of a step's calls, w after it, what it returns."""
    for case in check["cases"]:
        s = talas.Settings(**case["settings"])
        objective = ToyObjective(case["start"], s)
        asam = ToyASAM(objective.w)
        values = talas.training_step(objective, asam, BATCH, TARGETS, DOMAINS, s)
        what = f"{s.optimizer}: its steps, and the gradients"
        compare(asam.calls, case["calls"], what, asam.calls == case["calls"])
        close(objective.w, case["end"], f"{s.optimizer}: w after the step")
        found = {}
        for name, value in (values or {}).items():
            has_graph = getattr(value, "requires_grad", False)  # it keeps the step's memory
            found[name] = "detach() it" if has_graph else round(float(value), 3)
        what = f"{s.optimizer}: what it returns"
        compare(found, case["values"], what, found == case["values"])


def draws(talas, seed):
    """The random numbers that the four passes of two steps draw."""
    s = talas.Settings()
    objective = ToyObjective(1, s)
    asam = ToyASAM(objective.w)
    torch.manual_seed(seed)
    for _ in range(2):
        talas.training_step(objective, asam, BATCH, TARGETS, DOMAINS, s)
    return objective.drawn


def masks(talas):
    drawn = draws(talas, 0)
    first, second, next_step, _ = drawn
    other = draws(talas, 1)
    found = [first == second, first == next_step, drawn == draws(talas, 0), first == other[0]]
    expected = [True, False, True, False]
    what = "same draws in the second pass, the next step, the same seed, another seed"
    compare(found, expected, what, found == expected)


# ------------------------------------------------------------------------- exercise 6: the Hessian
class Quadratic:
    """The loss Σ d_i w_i² / 2, whose Hessian is diag(d)."""

    def __init__(self, d, *parameters):
        self.d = as_tensor(d)
        self.parameters = parameters

    def __call__(self):
        return (self.d * torch.cat(self.parameters) ** 2).sum() / 2


def diagonal(talas):
    for d in ([1.0, 2, 7, 5], [5.0, -5.2, 1, 1], [-3.0, -1, -2, -4], [0.0, 0, 0, 0]):
        w = [Parameter(torch.ones(2)), Parameter(torch.ones(2))]
        found = talas.largest_hessian_eigenvalue([Quadratic(d, *w)], w)
        close(found, max(d), f"H = diag{tuple(d)}", 0.01)


def at_w(talas):
    x = Parameter(torch.tensor([1.5]))

    def fourth_power():
        return (x**4).sum()

    found = talas.largest_hessian_eigenvalue([fourth_power], [x])
    close(found, 27.0, "L = x⁴ at 1.5", 0.01)
    losses = [Quadratic([4.0], x), Quadratic([8.0], x)]
    found = talas.largest_hessian_eigenvalue(losses, [x])
    close(found, 6.0, "the losses 2 x² and 4 x²", 0.01)


def leaves_nothing(talas):
    x, y = Parameter(torch.tensor(1.0)), Parameter(torch.tensor(-2.0))

    def loss():
        return (x + y) ** 2 + x * y

    drawn = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        found = talas.largest_hessian_eigenvalue([loss], [x, y])
        close(found, 5.0, "L = (x + y)² + x y", 0.01)
        drawn.append(torch.rand(1).item())
    gradients = [x.grad, y.grad]
    compare(gradients, [None, None], "the gradients of x and y after it", gradients == [None, None])
    differ = drawn[0] != drawn[1]
    compare(differ, True, "torch.manual_seed still matters after it", differ)


def unused_weight(talas):
    x, unused = Parameter(torch.ones(2)), Parameter(torch.ones(2))
    found = talas.largest_hessian_eigenvalue([Quadratic([4.0, 4.0], x)], [unused, x])
    close(found, 4.0, "L = 2 x², and a weight that it does not use", 0.01)


def many_weights(talas):
    d = random(2, 2_000).sin()  # from -1 to 1
    d[7] = 1.1
    w = Parameter(torch.ones(2_000))
    found = talas.largest_hessian_eigenvalue([Quadratic(d, w)], [w])
    close(found, 1.1, "2,000 weights, eigenvalues from -1 to 1.1", 0.01)


# -------------------------------------------------------------------------------- exercise 7: a run
def ten_steps(talas):
    rows = (DEMO / "corpus.jsonl").read_text("utf-8").splitlines()
    with tempfile.TemporaryDirectory() as folder:
        corpus, cache = f"{folder}/corpus.jsonl", f"{folder}/teacher.pt"
        Path(corpus).write_text("\n".join(rows[:4000:100]), "utf-8")  # 40: five batches of 8
        cache_teacher.main(["--corpus", corpus, "--output", cache])
        for optimizer in ("asam", "sam", "disam", "adamw"):
            output = f"{folder}/{optimizer}"
            flags = f"--teacher {cache} --output {output} --optimizer {optimizer}"
            talas.main([*flags.split(), "--batch_size", "8", "--epochs", "2"])
            lines = read_table(f"{output}/metrics.jsonl")
            before, after = [line["tamd"] for line in lines if "tamd" in line]
            limit = 0.95 * before
            compare(after, f"below {limit}", f"{optimizer}, tamd after ten steps", after < limit)
        talas.main([*flags.split(), "--batch_size", "8", "--overwrite", "--sharpness"])
        x = read_table(f"{output}/metrics.jsonl")[-1]["lambda_max"]
        compare(x, "above 0", "λ_max after five steps", 0 < x < 1e9)
