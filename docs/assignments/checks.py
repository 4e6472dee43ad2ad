"""What talas.py must do: checks.json has each check's points and hint, and its worked values.

These are worked out on paper, or, of random inputs, by a loop in float64. What is more than a
value is a function of the class Code.
"""

import json
import tempfile
from functools import partial, partialmethod
from pathlib import Path

import numpy as np
import torch

import cache_teacher
from support.data import DEMO
from support.run import read_metrics

CHECKS = json.loads(Path(__file__).with_name("checks.json").read_text("utf-8"))
NOTES = []  # what the check that runs has compared


class Wrong(Exception):
    """What a check found. A submission's own errors are of any other kind."""


def equal(found, expected, what, right=None):
    """Note both; fail unless they are equal, or `right`."""
    NOTES.append(f"{what}: expected {expected}, got {found}")
    if not (found == expected if right is None else right):
        raise Wrong(NOTES[-1])


def same(found, expected, what, tolerance=1e-4):
    """Note both; fail unless `found` has the shape and the values of `expected`."""
    if found is None:
        raise Wrong(f"{what}: nothing is returned")
    found, expected = (torch.as_tensor(x).detach().double() for x in (found, expected))
    right = found.shape == expected.shape and torch.allclose(found, expected, tolerance, tolerance)
    equal(*((x * 1e5).round().div(1e5).tolist() for x in (found, expected)), what, right)


def random(seed, *shape):
    """Normal random numbers, the same on every machine."""
    return torch.from_numpy(np.random.RandomState(seed).standard_normal(shape)).float()


def slope(function, x, direction, h=1e-2):
    """The slope of a function at x along a direction, by central differences."""
    return (function(x + h * direction) - function(x - h * direction)) / (2 * h)


def differentiable(function, inputs, what):
    """Fail unless autograd's slope along the first two inputs is that of central differences."""
    moved = [x.requires_grad_() for x in inputs[:2]]
    found = torch.autograd.grad(function(*inputs), moved, materialize_grads=True)
    for k, (x, g) in enumerate(zip(moved, found)):
        along = random(k + 9, *x.shape) / x.numel() ** 0.5
        by_x = slope(lambda x, k=k: function(*inputs[:k], x, *inputs[k + 1 :]), x, along)
        same((g * along).sum(), by_x, f"{what} {k + 1}", 3e-4)


def run(check, talas):
    """Do a check: the rows that checks.json has of it, or the function of its name."""

    def call(*inputs):  # a stack of matrices becomes a list of them
        inputs = [list(x) if getattr(x, "ndim", 0) > 2 else x for x in inputs]
        return getattr(talas, check["function"])(*inputs)

    for what, inputs, expected in check.get("values", ()):
        inputs = [torch.tensor(x).float() if isinstance(x, list) else x for x in inputs]
        if expected is None:
            differentiable(call, inputs, what)
        else:
            same(call(*inputs), expected, what)
    for what, settings, gradients, expected in check.get("ascents", ()):
        same(Climber(talas, **settings).ascend(*gradients), expected, what)
    for settings, *expected in check.get("steps", ()):
        Toy(talas, **settings).check(*expected)
    getattr(Code, check["name"].split(": ")[1], lambda _: None)(talas)


class Climber:
    """ASAM around an optimizer of w = (1, -2) and (2), in two groups."""

    def __init__(self, talas, kind=torch.optim.SGD, rho=0.3, **settings):
        self.w = [torch.nn.Parameter(torch.tensor(w)) for w in ([1.0, -2.0], [2.0])]
        groups = [{"params": [p], "lr": lr} for p, lr in zip(self.w, (0.1, 0.2))]
        self.optimizer = kind(groups)
        self.asam = talas.ASAM(self.optimizer, rho, **settings)
        self.ascend = partial(self.take, self.asam.ascent_step)

    def take(self, step, *gradients):
        """Take a step with these gradients, of which the second may be left out; returns w."""
        for p, g in zip(self.w, gradients):
            p.grad = torch.tensor(g) * 1.0
        step()
        return torch.cat([p.detach() for p in self.w])


IDS = torch.tensor([[1, 0], [1, 1], [2, 1], [3, 3]])  # sums 1, 2, 3, 6: mean 3
BATCH = {"input_ids": IDS, "attention_mask": (IDS > 0).long()}
TARGETS = torch.tensor([[2.0, 0], [1, 2], [4, 1], [1, 5]])  # first column: mean 2
DOMAINS = torch.tensor([1, 0, 2, 0])  # times the sums: mean 1.75


class Toy:
    """Objective and ASAM: tamd 2 w², lasd 1.5 w², L 3 w², with domains 4.75 w²; w̃ = w + 1."""

    def __init__(self, talas, optimizer, w=1, **settings):
        self.s = talas.Settings(optimizer=optimizer, **settings)
        self.w, self.up = torch.nn.Parameter(torch.tensor(w * 1.0)), 0
        self.calls, self.drawn = [], []
        self.optimizer = torch.optim.SGD([self.w], lr=0.1)
        self.step = lambda: talas.training_step(self, self, BATCH, TARGETS, DOMAINS, self.s)

    def __call__(self, tokens, teacher, domains=None):
        self.drawn.append(torch.rand(1).item())
        sums, square = tokens["input_ids"].sum(1) * 1.0, self.w**2
        terms = {"tamd": teacher[:, 0].mean() * square, "lasd": sums.mean() / 2 * square}
        terms["loss"] = self.s.lambda2 * terms["tamd"] + self.s.lambda3 * terms["lasd"]
        return terms["loss"] + (0 if domains is None else (sums * domains).mean() * square), terms

    def move(self, name, up, rate):
        """Note the gradient and clear it; put w where it is to be, less rate times the gradient."""
        self.calls.append([name, round(self.w.grad.item(), 4)])
        self.w.data += up - self.up - rate * self.w.grad
        self.up, self.w.grad = up, None

    ascent_step = partialmethod(move, "ascent", 1, 0)
    descent_step = partialmethod(move, "descent", 0, 0.1)

    def check(self, calls, w, values):
        """Take a step: the gradients of its calls, w after it, what it returns."""
        found, told = self.step(), self.s.optimizer
        equal(self.calls, calls, f"{told}: its steps, and the gradients")
        same(self.w, w, f"{told}: w after the step")
        for name, x in found.items() if found else ():
            graph = getattr(x, "requires_grad", False)  # it keeps the step's memory
            found[name] = "detach() it" if graph else round(float(x), 3)
        equal(found, values, f"{told}: what it returns")


class Code:
    """The checks that are more than a value, in the order of checks.json."""

    def gradient_of_tamd(talas):
        E, teacher, along = (random(seed, 2, 3) for seed in (1, 2, 3))
        loss = partial(torch.nn.CosineEmbeddingLoss(), input2=teacher, target=torch.ones(2))
        found = talas.tamd_gradient(E, teacher)
        same(found, torch.func.grad(loss)(E), "random e W, autograd")
        same((found * along).sum(), slope(loss, E, along), "a slope, central differences", 3e-4)

    def ascent_of_asam(talas):
        w, angles, L = random(4, 2), torch.arange(0, 6.3, 0.01), torch.nn.Softplus()
        found = talas.asam_ascent(w, torch.func.grad(lambda w: L(w).sum())(w), 0.3, 0.1)
        ellipse = 0.3 * (w.abs() + 0.1) * torch.stack([angles.cos(), angles.sin()], 1)
        same((ellipse - found).norm(dim=1).min(), 0.0, "its distance to the ellipse", 0.01)
        slopes = slope(L, w, torch.stack([found, *ellipse])).sum(1)  # by central differences
        same(slopes[0], slopes[1:].max(), "the slope along ε: the largest of the ellipse", 1e-3)

    def detach_guide(talas):
        layers = [random(k, 4, 3).requires_grad_() for k in range(3)]
        loss = talas.lasd_loss(layers, detach_guide=True)
        same(loss, talas.lasd_loss(layers), "the value with detach_guide")
        found = torch.autograd.grad(loss, layers, allow_unused=True, materialize_grads=True)
        equal([bool(g.any()) for g in found], [True, True, False], "do layers 1, 2, 3 move?")

    def no_gradient(talas):
        same(Climber(talas).ascend([0.0, 0.0], [0.0]), [1.0, -2, 2], "w = (1, -2 | 2), ∇L = 0: w̃")
        climber = Climber(talas, partial(torch.optim.SGD, weight_decay=0.5))
        same(climber.ascend([2.0, 1.0])[2], 2.0, "w without a gradient, after ascent_step")
        found = climber.take(climber.asam.descent_step, [1.0, 1.0])
        same(found[2], 2.0, "w without a gradient, after descent_step")

    def adamw(talas):
        ours, bare = (Climber(talas, torch.optim.AdamW, rho=1e6) for _ in range(2))
        for k in range(3):
            ours.ascend([1.0, k], [-1.0])
            found = ours.take(ours.asam.descent_step, [2.0, 1.0 - k], [k + 0.5])
            expected = bare.take(bare.optimizer.step, [2.0, 1.0 - k], [k + 0.5])
            same(found, expected, f"w after step {k + 1}, AdamW by itself")

    def clears(talas):
        asam = (climber := Climber(talas)).asam
        for step in (asam.descent_step, asam.ascent_step, asam.descent_step):  # first by itself
            climber.take(step, [2.0, 1.0], [-0.5])
            left = [0.0 if p.grad is None else p.grad.abs().sum().item() for p in climber.w]
            equal(left, [0.0, 0.0], f"size of each group's gradients after {step.__name__}")

    def masks(talas):
        toys = [Toy(talas, "asam") for _ in range(3)]
        for seed, toy in zip((0, 0, 1), toys):
            torch.manual_seed(seed)
            toy.step(), toy.step()
        (a, b, c, _), again, other = (toy.drawn for toy in toys)
        found = [a == b, b == c, toys[0].drawn == again, a == other[0]]
        told = "same draws in the second pass, the next step, the same seed, another seed"
        equal(found, [True, False, True, False], told)

    def diagonal(talas):
        for d in ((1.0, 2, 7, 5), (5.0, -5.2, 1, 1), (-3.0, -1, -2, -4), (0.0, 0, 0, 0)):
            H, w = torch.tensor(d), [torch.nn.Parameter(torch.ones(2)) for _ in range(2)]
            loss = lambda H=H, w=w: (H * torch.cat(w) ** 2).sum() / 2  # noqa: E731
            same(talas.largest_hessian_eigenvalue(loss, w), max(d), f"H = diag{d}", 0.01)

    def at_w(talas):
        x, lambda_max = torch.nn.Parameter(torch.tensor([1.5])), talas.largest_hessian_eigenvalue
        same(lambda_max(lambda: (x**4).sum(), [x]), 27.0, "L = x⁴ at 1.5", 0.01)
        both = [lambda: 2 * x.square().sum(), lambda: 4 * x.square().sum()]
        same(lambda_max(both, [x]), 6.0, "the losses 2 x² and 4 x²", 0.01)

    def leaves_nothing(talas):
        (x, y), drawn = (torch.nn.Parameter(torch.tensor(v)) for v in (1.0, -2.0)), []
        for seed in (1, 2):
            torch.manual_seed(seed)
            found = talas.largest_hessian_eigenvalue(lambda: (x + y) ** 2 + x * y, [x, y])
            same(found, 5.0, "L = (x + y)² + x y", 0.01)
            drawn.append(torch.rand(1).item())
        equal([p.grad for p in (x, y)], [None, None], "the gradients of x and y after it")
        equal(drawn[0] != drawn[1], True, "torch.manual_seed still matters after it")

    def unused_weight(talas):
        x, unused = (torch.nn.Parameter(torch.ones(2)) for _ in range(2))
        found = talas.largest_hessian_eigenvalue(lambda: 2 * x.square().sum(), [unused, x])
        same(found, 4.0, "L = 2 x², and a weight that it does not use", 0.01)

    def many_weights(talas):
        d, w, passes = random(2, 100_000).sin(), torch.nn.Parameter(torch.ones(100_000)), []
        d[7], told = 1.1, "100,000 weights, over 2000 backward passes"  # the others fill -1 to 1

        def loss():
            copy = w * 1
            copy.register_hook(lambda _: equal(passes.append(1) or len(passes) > 2000, False, told))
            return (d * copy.square()).sum() / 2

        found = talas.largest_hessian_eigenvalue(loss, [w])
        NOTES.clear()
        same(found, 1.1, "100,000 weights, eigenvalues from -1 to 1.1", 0.01)

    def ten_steps(talas):
        rows = (DEMO / "corpus.jsonl").read_text("utf-8").splitlines()[:4000:100]
        with tempfile.TemporaryDirectory() as folder:
            corpus, cache = Path(folder, "c.jsonl"), f"{folder}/teacher.pt"
            corpus.write_text("\n".join(rows), "utf-8")
            cache_teacher.main(["--corpus", str(corpus), "--output", cache])
            for name in ("asam", "sam", "disam", "adamw --sharpness"):
                run = f"--batch_size 8 --epochs 2 --output {folder}/{name[:4]} --optimizer {name}"
                talas.main(["--teacher", cache, *run.split()])
                lines = read_metrics(f"{folder}/{name[:4]}")
                a, b = (line["tamd"] for line in lines[::2])
                equal(b, f"below {a}", f"{name}, after ten steps: tamd", b < 0.95 * a)
            equal(x := lines[-1]["lambda_max"], "above 0", "after ten steps: λ_max", 0 < x < 1e9)
