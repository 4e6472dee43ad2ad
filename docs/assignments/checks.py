"""What the six exercises must do, by values worked out on paper. Each check takes the module talas.

A check raises Wrong, with one line, if something is wrong. EXERCISES, at the end, says which checks
belong to which exercise, and what it is worth.
"""

import math

import torch

STEP = 0.1  # learning rate of the checks that take a step


# ---------------------------------------------------------------------------------------- helpers
class Wrong(Exception):
    """What a check found. A submission's own errors are of any other kind."""


def expect(right, told):
    """Raise Wrong unless something is right."""
    if not right:
        raise Wrong(told)


def numbers(*shape, shift=0.0):
    """A float64 tensor of numbers without a pattern, the same on every machine."""
    return (torch.arange(math.prod(shape), dtype=torch.float64) * 1.7 + shift).sin().reshape(shape)


def same(found, expected, what, tolerance=1e-4):
    """Fail unless `found` has the shape and the values of `expected`."""
    expect(found is not None, f"{what}: nothing is returned")
    found, expected = (torch.as_tensor(x).detach().double() for x in (found, expected))
    shapes = f"{tuple(found.shape)}, expected {tuple(expected.shape)}"
    expect(found.shape == expected.shape, f"{what}: the shape is {shapes}")
    close = torch.allclose(found, expected, rtol=tolerance, atol=tolerance)
    wanted, given = ((x * 1e5).round().div(1e5).tolist() for x in (expected, found))
    expect(close, f"{what}: expected {wanted}, got {given}")


def differentiable(function, inputs, what):
    """Fail unless autograd's gradient of function(*inputs) is the one that differences give."""
    inputs = [x.requires_grad_() for x in inputs]
    right = torch.autograd.gradcheck(function, inputs, raise_exception=False)
    expect(right, f"{what}: its gradient is wrong (is something detached, or made in place?)")


# ------------------------------------------------------------------------------ Exercise 1: TAMD
SENTENCES = torch.tensor([[1.0, 0], [0, 2], [3, 4]])
TEACHER = torch.tensor([[5.0, 0], [-1, 0], [0, 2]])  # cosines with SENTENCES: 1, 0, 0.8


def tamd_layers(talas):
    """A layer has distances 0, 1, 0.2; projected by -I it has 2, 1, 1.8: means 0.4 and 1.6."""
    layers = [SENTENCES, SENTENCES, 7 * SENTENCES]
    projections = [torch.eye(2), -torch.eye(2), torch.eye(2)]
    for K, expected in enumerate((0.4, 1.0, 0.8), 1):
        loss = talas.tamd_loss(layers[:K], projections[:K], TEACHER)
        same(loss, expected, f"three sentences, in layer 1 of distances 0, 1, 0.2; {K} layers")


def tamd_projection(talas):
    """(1, 2) W = (1, 2, 1) and (0, 1) W = (0, 1, 0); d_S = 2, d_T = 3. Layers and W_l learn."""
    E, W = torch.tensor([[1.0, 2], [0, 1]]), torch.tensor([[1.0, 0, 1], [0, 1, 0]])
    loss = talas.tamd_loss([E], [W], torch.tensor([[2.0, 4, 2], [0, -3, 0]]))
    same(loss, 1.0, "W with d_S = 2, d_T = 3, distances 0 and 2")
    inputs = [numbers(3, 2), numbers(3, 2, shift=1), numbers(2, 4), numbers(2, 4, shift=2)]
    teacher = numbers(3, 4, shift=3)
    differentiable(lambda *x: talas.tamd_loss(x[:2], x[2:], teacher), inputs, "tamd_loss")


# ----------------------------------------------------------- Exercise 2: relation matrix and LASD
ALIKE = torch.tensor([[1.0, 0, 0], [2, 0, 0], [3, 0, 0]])  # all cosines 1
APART = torch.tensor([[0, 5.0, 0], [1, 0, 0], [0, 0, 2]])  # cosines 0 but with themselves
PAIR = torch.tensor([[1.0, 0, 0], [4, 0, 0], [0, 3, 0]])  # the first two alike, the third apart


def relation_of_two(talas):
    """cos((3, 4), (1, 0)) = 0.6."""
    R = talas.relation_matrix(torch.tensor([[3.0, 4, 0], [2, 0, 0]]))
    same(R, [[1, 0.6], [0.6, 1]], "relation matrix of (3, 4, 0) and (2, 0, 0)")


def lasd_chain(talas):
    """Adjacent layers alone are compared: 6/9 of the cosines change by 1, then 2/9, then none."""
    same(talas.lasd_loss([ALIKE, APART]), 6 / 9, "six of nine cosines differ by 1")
    same(talas.lasd_loss([APART, 2 * APART]), 0.0, "two layers with the same cosines")
    same(talas.lasd_loss([ALIKE, APART, PAIR]), 4 / 9, "a chain with 6/9 and 2/9")
    same(talas.lasd_loss([ALIKE, APART, PAIR, 3 * PAIR]), 8 / 27, "a chain with 6/9, 2/9 and 0")


def lasd_gradient(talas):
    """Both layers of a pair move; with detach_guide a layer moves as the next one's pupil alone."""
    layers = [numbers(4, 3, shift=k) for k in range(3)]
    differentiable(lambda *x: talas.lasd_loss(x), layers, "lasd_loss")
    loss = talas.lasd_loss(layers, detach_guide=True)
    same(loss, talas.lasd_loss(layers), "the value with detach_guide")
    found = torch.autograd.grad(loss, layers, allow_unused=True, materialize_grads=True)
    moves = [bool(g.abs().sum() > 0) for g in found]
    expect(moves == [True, True, False], f"detach_guide: layers 1-3 have a gradient: {moves}")
    alone = talas.lasd_loss([layers[1], layers[2].detach()]) / 2  # a chain of two: twice the part
    part = torch.autograd.grad(alone, layers[1])[0]
    same(found[1], part, "detach_guide: the gradient of layer 2, of three,")


# ----------------------------------------------------------------------------- Exercise 3: SimCSE
def simcse_values(talas):
    """log(1 + exp(-1 / τ)); log 2 between equal views; cosines 0.6, 0.8, 0.6 | ... | 1, 0, 1."""
    z, same_views = torch.tensor([[1.0, 0], [0, 3]]), torch.tensor([[1.0, 0], [1, 0]])
    same(talas.simcse_loss(z, 2 * z, 1.0), 0.3132617, "cosines 1 (own view) and 0, at τ = 1")
    same(talas.simcse_loss(z, 2 * z, 0.5), 0.1269280, "cosines 1 (own view) and 0, at τ = 0.5")
    told = "second views that are all the same (negatives are second views z'_j)"
    same(talas.simcse_loss(z, same_views, 0.5), math.log(2), told)
    z, z_prime = torch.tensor([[3.0, 4], [4, 3], [1, 0]]), torch.tensor([[1.0, 0], [0, 1], [2, 0]])
    expected = (1.551445 + 1.861995 + 0.696510) / 3
    same(talas.simcse_loss(z, z_prime, 0.2), expected, "three sentences at τ = 0.2")


def simcse_extremes(talas):
    """Cosine 0 with the own view, 1 with the other: exp(1/τ) is no float. Both views learn."""
    loss = talas.simcse_loss(torch.eye(2), torch.eye(2).flip(0), 0.001)
    same(loss, 1000.0, "τ = 0.001 (exp overflows: take the largest exponent out of the sum)")
    views = [numbers(4, 3), numbers(4, 3, shift=1)]
    differentiable(lambda *z: talas.simcse_loss(*z, 0.1), views, "simcse_loss")


# ------------------------------------------------------------------------------- Exercise 4: ASAM
WEIGHTS = [[1.0, -2.0], [2.0]]  # in two groups


def climbed(talas, gradients, rho=0.3, **settings):
    """(asam, parameters) after one ascent step from WEIGHTS."""
    parameters = [torch.nn.Parameter(torch.tensor(w)) for w in WEIGHTS]
    groups = [{"params": [p]} for p in parameters]
    asam = talas.ASAM(torch.optim.SGD(groups, lr=STEP), rho, **settings)
    for p, g in zip(parameters, gradients):
        p.grad = torch.tensor(g)
    asam.ascent_step()
    return asam, parameters


def at(parameters, expected, what):
    """Fail unless the parameters, one after the other, have these values."""
    same(torch.cat([p.detach().flatten() for p in parameters]), expected, what)


def asam_ascends(talas):
    """T = (1, 2 | 2), Tg = (2, 2 | -1); η = 1: (2, 3 | 3), (2, -1 | 2); SAM: g = (2, -1 | 2).

    Each has length 3 over both groups together; ε̂ = ρ T Tg / 3 and ρ = 0.3.
    """
    _, w = climbed(talas, [[2.0, 1.0], [-0.5]])
    at(w, [1.2, -1.6, 1.8], "w = (1, -2) and (2), gradients (2, 1) and (-0.5), ρ = 0.3: w̃")
    _, w = climbed(talas, [[1.0, -1 / 3], [2 / 3]], eta=1.0)
    at(w, [1.4, -2.3, 2.6], "w = (1, -2) and (2), gradients (1, -1/3) and (2/3), η = 1: w̃")
    _, w = climbed(talas, [[2.0, -1.0], [2.0]], adaptive=False, eta=1.0)
    at(w, [1.2, -2.1, 2.2], "adaptive=False, gradients (2, -1) and (2): w̃")


def cleared(parameters, step):
    """Fail unless what the next pass adds to is nothing, in every group."""
    left = sum(p.grad.abs().sum().item() for p in parameters if p.grad is not None)
    expect(left == 0, f"after {step} the gradient of its pass is still there")


def asam_returns(talas):
    """The step starts at w, not at w̃, and w comes back to the last bit; no gradient is left."""
    asam, (a, b) = climbed(talas, [[2.0, 1.0], [-0.5]])
    cleared((a, b), "ascent_step")
    a.grad, b.grad = torch.tensor([7.0, 5.0]), torch.tensor([-1.0])
    asam.descent_step()
    at((a, b), [0.3, -2.5, 2.1], "the step with gradients (7, 5) and (-1) at w̃, lr 0.1: w")
    cleared((a, b), "descent_step")
    asam, (a, b) = climbed(talas, [[2.0, 5.0], [1.0]], rho=1e9)
    a.grad, b.grad = torch.zeros(2), torch.zeros(1)
    asam.descent_step()
    there = [a.tolist(), b.tolist()]
    expect(there == WEIGHTS, f"w must come back exactly: it was {WEIGHTS}, now it is {there}")


def asam_two_steps(talas):
    """L = x² + 3 y² from (1, 1), ρ = 0.5, momentum 0.5: each step from gradients of its own."""
    w = torch.nn.Parameter(torch.ones(2))
    asam = talas.ASAM(torch.optim.SGD([w], lr=0.1, momentum=0.5), rho=0.5)
    factors, told = torch.tensor([1.0, 3.0]), "L = x² + 3 y², ρ = 0.5, lr 0.1, momentum 0.5: w"
    for expected in ([0.768377, 0.115395], [0.422228, -0.398482]):
        for step in (asam.ascent_step, asam.descent_step):
            (factors * w.square()).sum().backward()
            step()
        at([w], expected, f"{told} after a step (are old gradients cleared?)")


def asam_without_gradient(talas):
    """A parameter that the loss does not use has no gradient, and stays; so does w at a minimum."""
    used, unused = (torch.nn.Parameter(torch.tensor([x])) for x in (3.0, 5.0))
    asam = talas.ASAM(torch.optim.SGD([used, unused], lr=STEP), rho=0.5)
    for step in (asam.ascent_step, asam.descent_step):
        used.square().sum().backward()
        step()
        same(unused, [5.0], f"{step.__name__}: a parameter without a gradient, 5")
    _, w = climbed(talas, [[0.0, 0.0], [0.0]])
    at(w, [1.0, -2.0, 2.0], "a gradient of 0: w̃ = w")


# ---------------------------------------------------------------- Exercise 5: a step of Algorithm 1
BATCH = {"input_ids": torch.tensor([[1, 0], [1, 1], [2, 1], [3, 3]])}
BATCH["attention_mask"] = (BATCH["input_ids"] > 0).long()
TARGETS = torch.tensor([[1.0, 0, 0], [1, 2, 3], [1, 1, 0], [1, 0, 5]])
DOMAINS = torch.tensor([0, 0, 1, 1])


class Toy:
    """In place of the objective and of ASAM: L(w) = 1.5 w², with the domains 1.125 w²; w̃ = w + 1.

    It notes each gradient that it is given, and draws once in each pass, as dropout does.
    """

    def __init__(self, w):
        self.w, self.up, self.calls, self.drawn = torch.nn.Parameter(torch.tensor(w)), 0, [], []
        self.optimizer = torch.optim.SGD([self.w], lr=STEP)

    def __call__(self, tokens, teacher, domains=None):
        self.drawn.append(torch.rand(3).tolist())
        losses = tokens["input_ids"].sum(1) * teacher[:, 0] * self.w**2 / 2  # of (1, 2, 3, 6)
        terms = {"tamd": 2 * self.w, "lasd": 3 * self.w, "loss": losses.mean()}
        return (terms["loss"] if domains is None else (losses * domains).mean()), terms

    def move(self, name, up, rate):
        """Note the gradient and clear it; put w where it is to be, less rate times the gradient."""
        self.calls.append((name, round(self.w.grad.item(), 4)))
        self.w.data += up - self.up - rate * self.w.grad
        self.up, self.w.grad = up, None

    def ascent_step(self):
        """w -> w̃."""
        self.move("ascent", 1, 0)

    def descent_step(self):
        """Back, and a step."""
        self.move("descent", 0, STEP)


STEPS = [  # optimizer; w; gradients up and down; w after the step; values: ∇L = 3 w, w̃ = w + 1
    ("asam", 1.0, [3.0, 6.0], 0.4, {"tamd": 2, "lasd": 3, "loss": 1.5, "sharpness_gap": 4.5}),
    ("sam", -2.0, [-6.0, -3.0], -1.7, {"tamd": -4, "lasd": -6, "loss": 6, "sharpness_gap": -4.5}),
    ("disam", 1.0, [2.25, 6.0], 0.4, {"tamd": 2, "lasd": 3, "loss": 1.5, "sharpness_gap": 4.5}),
    ("adamw", 1.0, [3.0], 0.7, {"tamd": 2, "lasd": 3, "loss": 1.5}),
]


def step_values(talas):
    """The steps and their gradients, w, and what comes back; a gap may be negative."""
    for optimizer, start, gradients, after, values in STEPS:
        toy, told = Toy(start), f"{optimizer}, from w = {start}"
        s = talas.Settings(optimizer=optimizer)
        found = talas.training_step(toy, toy, BATCH, TARGETS, DOMAINS, s)
        calls = list(zip(["ascent", "descent"][-len(gradients) :], gradients))
        expect(toy.calls == calls, f"{told}: its steps must be {calls}, not {toy.calls}")
        same(toy.w, after, f"{told}: w after the step")
        expect(isinstance(found, dict), f"{told}: no dict comes back: {type(found).__name__}")
        names = sorted(found)
        expect(names == sorted(values), f"{told}: it returns {names}, not {sorted(values)}")
        for name, value in values.items():
            same(found[name], value, f"{told}: {name}")
            free = not torch.as_tensor(found[name]).requires_grad
            expect(free, f"{told}: {name} still holds its graph: detach() it")


def step_dropout(talas):
    """Both passes draw the same masks, each step others."""
    for optimizer, passes in {"asam": 4, "sam": 4, "disam": 4, "adamw": 2}.items():
        toy, s = Toy(1.0), talas.Settings(optimizer=optimizer)
        for _ in range(2):
            talas.training_step(toy, toy, BATCH, TARGETS, DOMAINS, s)
        drawn, told = toy.drawn, f"{optimizer}: two steps need {passes} passes"
        expect(len(drawn) == passes, f"{told}, not {len(drawn)}")
        told = f"{optimizer}: the second pass must draw the first's dropout masks"
        expect(passes == 2 or drawn[0] == drawn[1], told)
        expect(drawn[0] != drawn[-1], f"{optimizer}: the next step must draw other dropout masks")


# ------------------------------------------------------------------------------ Exercise 6: λ_max
def largest(talas, *diagonals, **settings):
    """λ_max of a loss whose Hessian is diagonal; a parameter a tuple."""
    pairs = [(torch.nn.Parameter(torch.ones(len(d))), torch.tensor(d)) for d in diagonals]
    parameters = [p for p, _ in pairs]

    def loss():
        return sum((d * p.square()).sum() / 2 for p, d in pairs)

    return talas.largest_hessian_eigenvalue(loss, parameters, **settings)


def curvature_diagonal(talas):
    """The algebraically largest, not that of largest size, in whichever parameter; 0 if flat."""
    same(largest(talas, (1.0, 3.0), (5.0, 2.0)), 5.0, "H = diag(1, 3, 5, 2)", 0.01)
    same(largest(talas, (1.0, 7.0), (5.0, 2.0), seed=3), 7.0, "H = diag(1, 7, 5, 2)", 0.01)
    found = largest(talas, (5.0, -5.2, 1.0, 1.0))
    same(found, 5.0, "H = diag(5, -5.2, 1, 1)", 0.01)
    same(largest(talas, (-3.0, -1.0)), -1.0, "H = diag(-3, -1)", 0.01)
    same(largest(talas, (0.0, 0.0, 0.0)), 0.0, "H = 0", 0.01)


def curvature_coupled(talas):
    """L = 3 x y: H has 0 on the diagonal and 3 beside it; it leaves no gradient behind."""
    x, y = (torch.nn.Parameter(torch.tensor(v)) for v in (1.0, -2.0))
    same(talas.largest_hessian_eigenvalue(lambda: 3 * x * y, [x, y]), 3.0, "L = 3 x y", 0.01)
    told = "it leaves gradients in the parameters, to which the next step would add"
    expect(all(p.grad is None for p in (x, y)), told)


def curvature_at_w(talas):
    """L = x⁴: 12 x² = 27 at 1.5. And a list of losses: the mean of 4 and 8."""
    x = torch.nn.Parameter(torch.tensor([1.5]))
    same(talas.largest_hessian_eigenvalue(lambda: (x**4).sum(), [x]), 27.0, "L = x⁴ at 1.5", 0.01)
    both = [lambda: 2 * x.square().sum(), lambda: 4 * x.square().sum()]
    found = talas.largest_hessian_eigenvalue(both, [x])
    same(found, 6.0, "a list of two losses, 2 x² and 4 x²", 0.01)


def curvature_large(talas):
    """300 weights: eigenvalues 24 cos(π (i + 1/2) / 300), from -24 to 24, in a turned basis."""
    v = numbers(300).float()
    turn = torch.eye(300) - 2 * torch.outer(v, v) / v.dot(v)
    values = 24 * ((torch.arange(300) + 0.5) * math.pi / 300).cos()
    H, w = turn @ torch.diag(values) @ turn, torch.nn.Parameter(torch.ones(300))
    found = talas.largest_hessian_eigenvalue(lambda: w @ H @ w / 2, [w])
    same(found, 24.0, "300 weights with eigenvalues from -24 to 24, within 1 %", 0.01)


# ---------------------------------------------------------------------------------------- the list
ASAM = [asam_ascends, asam_returns, asam_two_steps, asam_without_gradient]
CURVATURE = [curvature_diagonal, curvature_coupled, curvature_at_w, curvature_large]
EXERCISES = {  # number: name, points, checks
    1: ("TAMD, Eq. 3", 10, [tamd_layers, tamd_projection]),
    2: ("LASD, Eqs. 4-5", 15, [relation_of_two, lasd_chain, lasd_gradient]),
    3: ("SimCSE, Eq. 6", 15, [simcse_values, simcse_extremes]),
    4: ("ASAM, Eq. 2", 20, ASAM),
    5: ("A step of Algorithm 1", 20, [step_values, step_dropout]),
    6: ("Sharpness, Table 4", 20, CURVATURE),
}
