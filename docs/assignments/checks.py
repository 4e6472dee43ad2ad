"""What talas.py must do: a class an exercise, a function a check, with points and a hint.

Values are worked out on paper; those of random inputs are a right solution's.
"""

import json
import math
import tempfile
from functools import partial, partialmethod
from pathlib import Path

import numpy as np
import torch

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


def differentiable(function, *inputs):
    """Fail unless autograd's slope along each input is that of central differences."""
    inputs = [x.requires_grad_() for x in inputs]
    found = torch.autograd.grad(function(*inputs), inputs, materialize_grads=True)
    for k, (x, g) in enumerate(zip(inputs, found)):
        along = random(k + 9, *x.shape) / x.numel() ** 0.5
        by_x = slope(lambda x, k=k: function(*inputs[:k], x, *inputs[k + 1 :]), x, along)
        same((g * along).sum(), by_x, f"slope of input {k + 1}, central differences", 3e-4)


class Derivation:  # Eqs. 2-3
    def gradient_of_tamd(talas):
        """5 points. Only what is at right angles to e W turns the cosine. Mind 1/N, and lengths."""
        E, teacher, along = (random(seed, 2, 3) for seed in (1, 2, 3))
        loss = partial(torch.nn.CosineEmbeddingLoss(), input2=teacher, target=torch.ones(2))
        found = talas.tamd_gradient(E, teacher)
        same(found, torch.func.grad(loss)(E), "random e W, autograd")
        same((found * along).sum(), slope(loss, E, along), "a slope, central differences", 3e-4)

    def ascent_of_asam(talas):
        """5 points. With ε = T_w u the ellipse is a ball of u; L rises most along T_w ∇L there."""
        w, angles, L = random(4, 2), torch.arange(0, 6.3, 0.01), torch.nn.Softplus()
        found = talas.asam_ascent(w, torch.func.grad(lambda w: L(w).sum())(w), 0.3, 0.1)
        ellipse = 0.3 * (w.abs() + 0.1) * torch.stack([angles.cos(), angles.sin()], 1)
        same((ellipse - found).norm(dim=1).min(), 0.0, "its distance to the ellipse", 0.01)
        slopes = slope(L, w, torch.stack([found, *ellipse])).sum(1)  # by central differences
        same(slopes[0], slopes[1:].max(), "the slope along ε: the largest of the ellipse", 1e-3)


class Tamd:  # Eq. 3
    def layers(talas):
        """4 points. The mean is over the sentences and the layers; -W turns a cosine's sign."""
        E, W = torch.tensor([[1.0, 0], [0, 2], [3, 4]]), torch.eye(2)
        teacher = torch.tensor([[5.0, 0], [-1, 0], [0, 2]])  # cosines 1, 0, 0.8
        for K, expected in enumerate((0.4, 1.0, 0.8), 1):  # layers of 0.4, 1.6, 0.4
            loss = talas.tamd_loss([E, E, 7 * E][:K], [W, -W, W][:K], teacher)
            same(loss, expected, f"distances 0, 1, 0.2 (layer 2: 2, 1, 1.8); {K} layers")

    def small_projection(talas):
        """3 points. W starts at 1e-3; the cosine is of e W and e^T, whatever their lengths."""
        E, W, teacher = random(1, 5, 3), 1e-3 * random(2, 3, 4), random(3, 5, 4)
        same(talas.tamd_loss([E], [W], teacher), 0.692039, "random inputs, W / 1000, one layer")

    def gradient(talas):
        """3 points. The layers and the W_l learn, all of them: is something detached?"""
        inputs, teacher = [random(k, 3 - k // 2, 2 + k // 2 * 2) for k in range(4)], random(8, 3, 4)
        differentiable(lambda *x: talas.tamd_loss(list(x[:2]), list(x[2:]), teacher), *inputs)


class Lasd:  # Eqs. 4-5
    def relation(talas):
        """3 points. cos((3, 4), (1, 0)) = 0.6. It may be negative, and rows may be short."""
        R = talas.relation_matrix(torch.tensor([[3e-3, 4e-3], [-2, 0], [1, 0]]))
        same(R, [[1, -0.6, 0.6], [-0.6, 1, -1], [0.6, -1, 1]], "(0.003, 0.004), (-2, 0), (1, 0)")

    def chain(talas):
        """4 points. Squares of differences; adjacent layers alone; the mean over N² and pairs."""
        alike = torch.tensor([[1.0, 0, 0], [2, 0, 0], [3, 0, 0]])  # all cosines 1
        apart = torch.tensor([[0, 5.0, 0], [1, 0, 0], [0, 0, 2]])  # 0 but with themselves
        pair = torch.tensor([[1.0, 0, 0], [4, 0, 0], [0, 3, 0]])  # two alike, the third apart
        same(talas.lasd_loss([alike, apart]), 6 / 9, "six of nine cosines differ by 1")
        same(talas.lasd_loss([alike, apart, pair, 3 * pair]), 8 / 27, "a chain: 6/9, 2/9 and 0")
        layers = [random(seed, 4, 3).abs() for seed in (1, 2, 3)]
        same(talas.lasd_loss(layers), 0.102617, "three random layers, all cosines positive")

    def gradient(talas):
        """2 points. Eq. 5 is symmetric: both layers of a pair move; is something detached?"""
        differentiable(lambda *x: talas.lasd_loss(list(x)), *(random(k, 4, 3) for k in range(3)))

    def detach_guide(talas):
        """3 points. Same value; a layer moves as the next one's pupil alone, the last one never."""
        layers = [random(k, 4, 3).requires_grad_() for k in range(3)]
        loss = talas.lasd_loss(layers, detach_guide=True)
        same(loss, talas.lasd_loss(layers), "the value with detach_guide")
        found = torch.autograd.grad(loss, layers, allow_unused=True, materialize_grads=True)
        equal([bool(g.any()) for g in found], [True, True, False], "do layers 1, 2, 3 move?")


class Simcse:  # Eq. 6
    def values(talas):
        """6 points. log(1 + exp(-1/τ)). Row i is of z_i, column j of z'_j: those are negatives."""
        z = torch.tensor([[1.0, 0], [0, 3]])
        same(talas.simcse_loss(z, 2 * z, 0.5), 0.1269280, "cosines 1 (own view) and 0, τ = 0.5")
        found = talas.simcse_loss(1e-3 * random(1, 5, 3), random(2, 5, 3), 0.2)
        same(found, 4.006501, "five random sentences, z short, τ = 0.2")

    def extremes(talas):
        """4 points. exp(1/τ) is no float: take the largest exponent of a row out of its sum."""
        found = talas.simcse_loss(torch.eye(2), torch.eye(2).flip(0), 0.001)
        same(found, 1000.0, "cosines 0 (own view) and 1, τ = 0.001")
        z, z_prime = torch.tensor([[1.0, 0], [-1, 0]]), torch.tensor([[1.0, 0], [2, 0]])
        same(
            talas.simcse_loss(z, z_prime, 0.001), math.log(2), "cosines 1, 1 and -1, -1, τ = 0.001"
        )

    def gradient(talas):
        """3 points. Both views learn."""
        differentiable(lambda *z: talas.simcse_loss(*z, 0.5), random(3, 4, 3), random(4, 4, 3))


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
            p.grad = torch.tensor(g)
        step()
        return torch.cat([p.detach() for p in self.w])


class Asam:  # Eq. 2
    def ascent(talas):
        """5 points. T_w = |w| + η; the length of T_w ∇L, here 3, is over both groups together."""
        found = Climber(talas).ascend([2.0, 1.0], [-0.5])  # T_w ∇L = (2, 2 | -1)
        same(found, [1.2, -1.6, 1.8], "w = (1, -2 | 2), ∇L = (2, 1 | -0.5), ρ = 0.3: w̃")
        found = Climber(talas, eta=1.0).ascend([1.0, -1 / 3], [2 / 3])  # (2, -1 | 2)
        same(found, [1.4, -2.3, 2.6], "w = (1, -2 | 2), ∇L = (1, -1/3 | 2/3), η = 1: w̃")

    def sam(talas):
        """3 points. adaptive=False sets T_w = I, whatever η is."""
        found = Climber(talas, adaptive=False, eta=1.0).ascend([2.0, -1.0], [2.0])
        same(found, [1.2, -2.1, 2.2], "w = (1, -2 | 2), ∇L = (2, -1 | 2), adaptive=False: w̃")

    def no_gradient(talas):
        """4 points. 0 / 0 is not a number. And None is not 0: w stays, without weight decay."""
        same(Climber(talas).ascend([0.0, 0.0], [0.0]), [1.0, -2, 2], "w = (1, -2 | 2), ∇L = 0: w̃")
        climber = Climber(talas, partial(torch.optim.SGD, weight_decay=0.5))
        same(climber.ascend([2.0, 1.0])[2], 2.0, "w without a gradient, after ascent_step")
        found = climber.take(climber.asam.descent_step, [1.0, 1.0])
        same(found[2], 2.0, "w without a gradient, after descent_step")

    def adamw(talas):
        """5 points. The optimizer itself steps, from w, which only a copy brings back exactly."""
        ours, bare = (Climber(talas, torch.optim.AdamW, rho=1e6) for _ in range(2))
        for k in range(3):
            ours.ascend([1.0, k], [-1.0])
            found = ours.take(ours.asam.descent_step, [2.0, 1.0 - k], [k + 0.5])
            expected = bare.take(bare.optimizer.step, [2.0, 1.0 - k], [k + 0.5])
            same(found, expected, f"w after step {k + 1}, AdamW by itself")

    def clears(talas):
        """3 points. backward() adds to what is there: clear it after each step, in each group."""
        climber = Climber(talas)
        asam = climber.asam
        for step in (asam.descent_step, asam.ascent_step, asam.descent_step):  # first by itself
            climber.take(step, [2.0, 1.0], [-0.5])
            left = [0.0 if p.grad is None else p.grad.abs().sum().item() for p in climber.w]
            equal(left, [0.0, 0.0], f"size of each group's gradients after {step.__name__}")


IDS = torch.tensor([[1, 0], [1, 1], [2, 1], [3, 3]])  # sums 1, 2, 3, 6: mean 3
BATCH = {"input_ids": IDS, "attention_mask": (IDS > 0).long()}
TARGETS = torch.tensor([[2.0, 0], [1, 2], [4, 1], [1, 5]])  # first column: mean 2
DOMAINS = torch.tensor([1, 0, 2, 0])  # times the sums: mean 1.75


class Toy:
    """Objective and ASAM: tamd 2 w², lasd 1.5 w², L 3 w², with domains 4.75 w²; w̃ = w + 1."""

    def __init__(self, talas, optimizer, w=1.0, **settings):
        self.s = talas.Settings(optimizer=optimizer, **settings)
        self.w, self.up, self.calls, self.drawn = torch.nn.Parameter(torch.tensor(w)), 0, [], []
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
        self.calls.append((name, round(self.w.grad.item(), 4)))
        self.w.data += up - self.up - rate * self.w.grad
        self.up, self.w.grad = up, None

    ascent_step = partialmethod(move, "ascent", 1, 0)
    descent_step = partialmethod(move, "descent", 0, 0.1)

    def check(self, gradients, w, *values):
        """Take a step: the gradients up and down, w after it, tamd, lasd, loss and gap."""
        found, told = self.step(), self.s.optimizer
        calls = list(zip(("ascent", "descent")[-len(gradients) :], gradients))
        equal(self.calls, calls, f"{told}: its steps, and the gradients")
        same(self.w, w, f"{told}: w after the step")
        for name, x in found.items() if found else ():
            graph = getattr(x, "requires_grad", False)  # it keeps the step's memory
            found[name] = "detach() it" if graph else round(float(x), 3)
        names = ("tamd", "lasd", "loss", "sharpness_gap")
        equal(found, dict(zip(names, values)), f"{told}: what it returns")


class Step:  # Algorithm 1
    def up_and_down(talas):
        """4 points. ∇L = 6 w: 6 at w = 1 and 12 at w̃ = 2; the step is from w. The gap: 12 - 3."""
        for optimizer in ("asam", "sam"):
            Toy(talas, optimizer).check([6.0, 12.0], -0.2, 2, 1.5, 3, 9)

    def other_cases(talas):
        """2 points. The gap may be below 0. The objective weighs its terms itself, by λ2 and λ3."""
        Toy(talas, "asam", w=-2.0).check([-12.0, -6.0], -1.4, 8, 6, 12, -9)
        Toy(talas, "asam", lambda2=2.0, lambda3=4.0).check([20.0, 40.0], -3.0, 2, 1.5, 10, 30)

    def disam(talas):
        """2 points. The first pass sees the domains as they are; the gap is of L, as ever."""
        Toy(talas, "disam").check([9.5, 12.0], -0.2, 2, 1.5, 3, 9)

    def adamw(talas):
        """2 points. One pass, no ascent, no gap."""
        Toy(talas, "adamw").check([6.0], 0.4, 2, 1.5, 3)

    def masks(talas):
        """5 points. Both passes draw the same, the next step others; torch's seed says which."""
        toys = [Toy(talas, "asam") for _ in range(3)]
        for seed, toy in zip((0, 0, 1), toys):
            torch.manual_seed(seed)
            toy.step(), toy.step()
        (a, b, c, _), again, other = (toy.drawn for toy in toys)
        found = [a == b, b == c, toys[0].drawn == again, a == other[0]]
        told = "same draws in the second pass, the next step, the same seed, another seed"
        equal(found, [True, False, True, False], told)


class Curvature:  # Table 4
    def diagonal(talas):
        """4 points. The largest with its sign, in whichever parameter; not the largest in size."""
        for d in ((1.0, 2, 7, 5), (5.0, -5.2, 1, 1), (-3.0, -1, -2, -4), (0.0, 0, 0, 0)):
            H, w = torch.tensor(d), [torch.nn.Parameter(torch.ones(2)) for _ in range(2)]
            loss = lambda H=H, w=w: (H * torch.cat(w) ** 2).sum() / 2  # noqa: E731
            same(talas.largest_hessian_eigenvalue(loss, w), max(d), f"H = diag{d}", 0.01)

    def at_w(talas):
        """2 points. 12 x² is 27 at x = 1.5. Of a list of losses the mean is meant: of 4 and 8."""
        x, lambda_max = torch.nn.Parameter(torch.tensor([1.5])), talas.largest_hessian_eigenvalue
        same(lambda_max(lambda: (x**4).sum(), [x]), 27.0, "L = x⁴ at 1.5", 0.01)
        both = [lambda: 2 * x.square().sum(), lambda: 4 * x.square().sum()]
        same(lambda_max(both, [x]), 6.0, "the losses 2 x² and 4 x²", 0.01)

    def leaves_nothing(talas):
        """2 points. No gradient, to which the next step would add; no seed, which repeats masks."""
        (x, y), drawn = (torch.nn.Parameter(torch.tensor(v)) for v in (1.0, -2.0)), []
        for seed in (1, 2):
            torch.manual_seed(seed)
            found = talas.largest_hessian_eigenvalue(lambda: (x + y) ** 2 + x * y, [x, y])
            same(found, 5.0, "L = (x + y)² + x y", 0.01)
            drawn.append(torch.rand(1).item())
        equal([p.grad for p in (x, y)], [None, None], "the gradients of x and y after it")
        equal(drawn[0] != drawn[1], True, "torch.manual_seed still matters after it")

    def unused_weight(talas):
        """3 points. BERT's pooler is not in the loss: allow_unused, or materialize_grads."""
        x, unused = (torch.nn.Parameter(torch.ones(2)) for _ in range(2))
        found = talas.largest_hessian_eigenvalue(lambda: 2 * x.square().sum(), [unused, x])
        same(found, 4.0, "L = 2 x², and a weight that it does not use", 0.01)

    def many_weights(talas):
        """4 points. Iterate until the value stands; H itself, of 100,000 weights, fits nowhere."""
        d, w, passes = random(2, 100_000).sin(), torch.nn.Parameter(torch.ones(100_000)), []
        d[7], told = 1.1, "100,000 weights, over 2000 backward passes"  # the others fill -1 to 1

        def loss():
            copy = w * 1
            copy.register_hook(lambda _: equal(passes.append(1) or len(passes) > 2000, False, told))
            return (d * copy.square()).sum() / 2

        found = talas.largest_hessian_eigenvalue(loss, [w])
        NOTES.clear()
        same(found, 1.1, "100,000 weights, eigenvalues from -1 to 1.1", 0.01)


class Demo:
    def ten_steps(talas):
        """5 points. All of talas.py together, on 40 sentences: what runs alone may not fit."""
        import cache_teacher

        corpus = Path(cache_teacher.__file__).parent / "demo" / "corpus.jsonl"
        rows = corpus.read_text("utf-8").splitlines()[:4000:100]
        with tempfile.TemporaryDirectory() as folder:
            corpus, cache = Path(folder, "c.jsonl"), f"{folder}/teacher.pt"
            corpus.write_text("\n".join(rows), "utf-8")
            cache_teacher.main(["--corpus", str(corpus), "--output", cache])
            for name in ("asam", "sam", "disam", "adamw --sharpness"):
                run = f"--batch_size 8 --epochs 2 --output {folder}/{name[:4]} --optimizer {name}"
                talas.main(["--teacher", cache, *run.split()])
                lines = Path(folder, name[:4], "metrics.jsonl").read_text("utf-8").splitlines()
                (a, b), last = (json.loads(line)["tamd"] for line in lines[::2]), lines[-1]
                equal(b, f"below {a}", f"{name}, after ten steps: tamd", b < 0.95 * a)
            last = json.loads(last)["lambda_max"]
            equal(last, "above 0", "after ten steps: λ_max", 0 < last < math.inf)


EXERCISES = dict(enumerate((Derivation, Tamd, Lasd, Simcse, Asam, Step, Curvature, Demo)))
