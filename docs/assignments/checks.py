"""What the six exercises must do, by values worked out on paper. Each check takes the module talas.

A check raises AssertionError with one line if something is wrong. EXERCISES, at the end, says which
checks belong to which exercise, and what it is worth.
"""

import math

import torch

STEP = 0.1  # learning rate of the checks that take a step


# ---------------------------------------------------------------------------------------- helpers
def rows(*values):
    """A (N, d) tensor, a tuple a row."""
    return torch.tensor(values, dtype=torch.float32)


def numbers(*shape, shift=0.0):
    """A float64 tensor of numbers without a pattern, the same on every machine."""
    return (torch.arange(math.prod(shape), dtype=torch.float64) * 1.7 + shift).sin().reshape(shape)


def show(values):
    """Numbers as short text."""
    text = str([round(value, 5) for value in values.flatten().tolist()])
    return text if values.dim() else text[1:-1]


def same(found, expected, what, tolerance=1e-4):
    """Fail unless `found` has the shape and the values of `expected`."""
    found, expected = (torch.as_tensor(x).detach().double() for x in (found, expected))
    shapes = f"{tuple(found.shape)}, expected {tuple(expected.shape)}"
    assert found.shape == expected.shape, f"{what}: the shape is {shapes}"
    close = torch.allclose(found, expected, rtol=tolerance, atol=tolerance)
    assert close, f"{what}: expected {show(expected)}, got {show(found)}"


def differentiable(function, inputs, what):
    """Fail unless autograd's gradient of function(*inputs) is the one that differences give."""
    inputs = [x.requires_grad_() for x in inputs]
    right = torch.autograd.gradcheck(function, inputs, raise_exception=False)
    assert right, f"{what}: its gradient is wrong (is something detached, or made in place?)"


# ------------------------------------------------------------------------------ Exercise 1: TAMD
SENTENCES = rows((1, 0), (0, 2), (3, 4))
TEACHER = rows((5, 0), (-1, 0), (0, 2))  # cosines with SENTENCES: 1, 0, 0.8


def tamd_one_layer(talas):
    """With W = I the distances are 0, 1 and 0.2."""
    loss = talas.tamd_loss([SENTENCES], [torch.eye(2)], TEACHER)
    same(loss, 0.4, "distances 0, 1, 0.2 of three sentences")


def tamd_projection(talas):
    """(1, 2) W = (1, 2, 1) and (0, 1) W = (0, 1, 0); d_S = 2, d_T = 3."""
    E, W = rows((1, 2), (0, 1)), rows((1, 0, 1), (0, 1, 0))
    same(talas.tamd_loss([E], [W], rows((2, 4, 2), (0, -3, 0))), 1.0, "W with d_S = 2, d_T = 3")


def tamd_two_layers(talas):
    """A layer has 0, 1, 0.2, the other, projected by -I, 2, 1, 1.8: means 0.4 and 1.6."""
    layers, projections = [SENTENCES, SENTENCES], [torch.eye(2), -torch.eye(2)]
    same(talas.tamd_loss(layers, projections, TEACHER), 1.0, "two layers, of 0.4 and 1.6")
    layers, projections = [*layers, 7 * SENTENCES], [*projections, torch.eye(2)]
    same(talas.tamd_loss(layers, projections, TEACHER), 0.8, "three layers, of 0.4, 1.6 and 0.4")


def tamd_each_sentence(talas):
    """reduction="none" keeps the sentences apart."""
    losses = talas.tamd_loss([SENTENCES], [torch.eye(2)], TEACHER, reduction="none")
    same(losses, [0, 1, 0.2], 'reduction="none"')


def tamd_gradient(talas):
    """Layers and projections learn."""
    inputs = [numbers(3, 2), numbers(3, 2, shift=1), numbers(2, 4), numbers(2, 4, shift=2)]
    teacher = numbers(3, 4, shift=3)

    def loss(lower, upper, W, V):
        return talas.tamd_loss([lower, upper], [W, V], teacher)

    differentiable(loss, inputs, "tamd_loss")


# ----------------------------------------------------------- Exercise 2: relation matrix and LASD
ALIKE = rows((1, 0, 0), (2, 0, 0), (3, 0, 0))  # all cosines 1
APART = rows((0, 5, 0), (1, 0, 0), (0, 0, 2))  # cosines 0 but with themselves
PAIR = rows((1, 0, 0), (4, 0, 0), (0, 3, 0))  # the first two alike, the third apart


def relation_of_two(talas):
    """cos((3, 4), (1, 0)) = 0.6."""
    R = talas.relation_matrix(rows((3, 4, 0), (2, 0, 0)))
    same(R, [[1, 0.6], [0.6, 1]], "relation matrix of (3, 4, 0) and (2, 0, 0)")


def lasd_two_layers(talas):
    """Six of the nine cosines change by 1."""
    same(talas.lasd_loss([ALIKE, APART]), 6 / 9, "six of nine cosines differ by 1")
    same(talas.lasd_loss([APART, 2 * APART]), 0.0, "two layers with the same cosines")


def lasd_chain(talas):
    """Adjacent layers alone are compared: 6/9, then 2/9, then 0."""
    same(talas.lasd_loss([ALIKE, APART, PAIR]), 4 / 9, "a chain with 6/9 and 2/9")
    layers = [ALIKE, APART, PAIR, 3 * PAIR]
    same(talas.lasd_loss(layers), 8 / 27, "a chain with 6/9, 2/9 and 0")


def lasd_gradient(talas):
    """Without detach_guide both layers of a pair move."""

    def loss(*layers):
        return talas.lasd_loss(layers)

    differentiable(loss, [numbers(4, 3, shift=k) for k in range(3)], "lasd_loss")


def lasd_guide(talas):
    """With detach_guide the value stays, and the uppermost layer has no gradient."""
    layers = [numbers(4, 3, shift=k).requires_grad_() for k in range(3)]
    loss = talas.lasd_loss(layers, detach_guide=True)
    same(loss, talas.lasd_loss(layers), "the value with detach_guide")
    gradients = torch.autograd.grad(loss, layers, allow_unused=True, materialize_grads=True)
    moves = [bool(g.abs().sum() > 0) for g in gradients]
    assert moves == [True, True, False], f"detach_guide: layers 1-3 have a gradient: {moves}"
    same(gradients[1], guided_gradient(talas, *layers[1:]), "detach_guide: layer 2, of three,")


def guided_gradient(talas, lower, guide):
    """Half of the lower layer's gradient in a chain of two, whose guide does not move."""
    return torch.autograd.grad(talas.lasd_loss([lower, guide.detach()]), lower)[0] / 2


# ----------------------------------------------------------------------------- Exercise 3: SimCSE
def simcse_two_sentences(talas):
    """Cosines 1 with the own view and 0 with the other one: log(1 + exp(-1 / τ))."""
    z = rows((1, 0), (0, 3))
    same(talas.simcse_loss(z, 2 * z, 1.0), 0.3132617, "cosines 1 (own view) and 0, at τ = 1")
    same(talas.simcse_loss(z, 2 * z, 0.5), 0.1269280, "cosines 1 (own view) and 0, at τ = 0.5")


def simcse_negatives(talas):
    """The second views are alike: each sentence has to choose between two equal ones, log 2."""
    z, z_prime = rows((1, 0), (0, 1)), rows((1, 0), (1, 0))
    loss = talas.simcse_loss(z, z_prime, 0.5)
    same(loss, math.log(2), "second views that are all the same (negatives are second views z'_j)")


def simcse_three_sentences(talas):
    """Cosines of each with the second views: 0.6, 0.8, 0.6; 0.8, 0.6, 0.8; 1, 0, 1."""
    z, z_prime = rows((3, 4), (4, 3), (1, 0)), rows((1, 0), (0, 1), (2, 0))
    expected = [1.551445, 1.861995, 0.696510]
    same(talas.simcse_loss(z, z_prime, 0.2), sum(expected) / 3, "three sentences at τ = 0.2")
    losses = talas.simcse_loss(z, z_prime, 0.2, reduction="none")
    same(losses, expected, 'reduction="none"')


def simcse_small_temperature(talas):
    """Cosine 0 with the own view, 1 with the other: 1/τ more than exp can hold."""
    z = rows((1, 0), (0, 1))
    loss = talas.simcse_loss(z, z.flip(0), 0.001)
    same(loss, 1000.0, "τ = 0.001 (exp overflows: take the largest exponent out of the sum)")


def simcse_gradient(talas):
    """Both views learn."""

    def loss(z, z_prime):
        return talas.simcse_loss(z, z_prime, 0.1)

    differentiable(loss, [numbers(4, 3), numbers(4, 3, shift=1)], "simcse_loss")


# ------------------------------------------------------------------------------- Exercise 4: ASAM
def climbed(talas, weights, gradients, rho=0.5, **settings):
    """(asam, parameters) after one ascent step, each parameter in a group of its own."""
    parameters = [torch.nn.Parameter(torch.tensor(w)) for w in weights]
    groups = [{"params": [p]} for p in parameters]
    asam = talas.ASAM(torch.optim.SGD(groups, lr=STEP), rho, **settings)
    for p, g in zip(parameters, gradients):
        p.grad = torch.tensor(g)
    asam.ascent_step()
    return asam, parameters


def asam_one_weight(talas):
    """w = 3, gradient 2: ε̂ = 0.5 · 9 · 2 / 6 = 1.5."""
    _, (w,) = climbed(talas, [[3.0]], [[2.0]])
    same(w, [4.5], "w = 3, gradient 2, ρ = 0.5: w̃")


def asam_two_tensors(talas):
    """w = 1 | 2, gradient 3 | 2: Tg = 3 | 4, of length 5 together; ε̂ = 0.1 · (3 | 8)."""
    _, (a, b) = climbed(talas, [[1.0], [2.0]], [[3.0], [2.0]])
    same([a.item(), b.item()], [1.3, 2.8], "w = 1 and 2 in two tensors, gradients 3 and 2: w̃")


def asam_eta(talas):
    """w = (-1, 2), η = 1: T = (2, 3), Tg = (3, 4); ε̂ = 0.1 · (6, 12)."""
    _, (w,) = climbed(talas, [[-1.0, 2.0]], [[1.5, 4 / 3]], eta=1.0)
    same(w, [-0.4, 3.2], "w = (-1, 2), gradient (1.5, 4/3), η = 1: w̃")


def asam_not_adaptive(talas):
    """SAM: ε̂ = 0.5 · (3, 4) / 5, whatever w is."""
    _, (w,) = climbed(talas, [[-1.0, 20.0]], [[3.0, 4.0]], adaptive=False)
    same(w, [-0.7, 20.4], "adaptive=False, gradient (3, 4): w̃")


def asam_clears(talas):
    """What the second pass adds to must be nothing."""
    _, (w,) = climbed(talas, [[3.0]], [[2.0]])
    left = 0.0 if w.grad is None else w.grad.abs().sum().item()
    assert left == 0, "after ascent_step the gradient of the first pass is still there"


def asam_returns(talas):
    """The step starts at w, not at w̃, and w comes back to the last bit."""
    asam, (w,) = climbed(talas, [[3.0]], [[2.0]])
    w.grad = torch.tensor([7.0])
    asam.descent_step()
    same(w, [3 - 7 * STEP], "the step with gradient 7 at w̃, lr 0.1, from w = 3: w")
    asam, (w,) = climbed(talas, [[0.1, -0.3]], [[2.0, 5.0]], rho=1e6)
    w.grad = torch.zeros(2)
    asam.descent_step()
    exact = torch.equal(w.detach(), torch.tensor([0.1, -0.3]))
    assert exact, f"w must come back exactly: it was [0.1, -0.3], now it is {w.tolist()}"


def asam_two_steps(talas):
    """L = w² twice: 2 -> w̃ 3 -> 2 - 0.1 · 6 = 1.4 -> w̃ 2.1 -> 1.4 - 0.1 · 4.2 = 0.98."""
    w = torch.nn.Parameter(torch.tensor(2.0))
    asam = talas.ASAM(torch.optim.SGD([w], lr=STEP), rho=0.5)
    for expected in (1.4, 0.98):
        w.square().backward()
        asam.ascent_step()
        w.square().backward()
        asam.descent_step()
        same(w, expected, "L = w², lr 0.1, ρ = 0.5: w after a step (are old gradients cleared?)")


def asam_without_gradient(talas):
    """A parameter that the loss does not use has no gradient, and stays."""
    used, unused = (torch.nn.Parameter(torch.tensor([x])) for x in (3.0, 5.0))
    asam = talas.ASAM(torch.optim.SGD([used, unused], lr=STEP), rho=0.5)
    for step in (asam.ascent_step, asam.descent_step):
        used.square().sum().backward()
        step()
        same(unused, [5.0], f"{step.__name__}: a parameter without a gradient, 5")


# ---------------------------------------------------------------- Exercise 5: a step of Algorithm 1
class Toy:
    """An objective L(w) = mean a_i w² / 2 for a in `tokens`; notes each pass and draws a number."""

    def __init__(self):
        self.w, self.drawn, self.passes = torch.nn.Parameter(torch.tensor(1.0)), [], 0

    def __call__(self, tokens, teacher, reduction="mean"):
        self.passes += 1
        self.drawn.append(torch.rand(3).tolist())  # in place of a student's dropout masks
        losses = tokens * self.w**2 / 2
        terms = [self.w * factor for factor in (1.0, 2.0, 3.0)]
        return (losses if reduction == "none" else losses.mean()), terms


class Mover:
    """In place of ASAM: it moves w up by 1, and notes each gradient it is given."""

    def __init__(self, w):
        self.w, self.calls, self.up = w, [], False

    @torch.no_grad()
    def ascent_step(self):
        """w -> w + 1."""
        self.calls.append(("ascent", round(self.w.grad.item(), 4)))
        self.w += 1
        self.w.grad, self.up = None, True

    @torch.no_grad()
    def descent_step(self):
        """Down again, and a step."""
        self.calls.append(("descent", round(self.w.grad.item(), 4)))
        self.w -= int(self.up) + STEP * self.w.grad
        self.w.grad, self.up = None, False


def take_step(talas, optimizer, toy=None):
    """(values, toy, mover) after one step; a = 1, 2, 3, 6, in two domains."""
    toy = toy or Toy()
    mover = Mover(toy.w)
    s = talas.Settings(optimizer=optimizer, disam_lambda=0.4)
    tokens, domains = torch.tensor([1.0, 2.0, 3.0, 6.0]), torch.tensor([0, 0, 1, 1])
    return talas.training_step(toy, mover, tokens, None, domains, s), toy, mover


def step_asam(talas):
    """∇L = 3 w: 3 at w = 1, 6 at w̃ = 2; L(w) = 1.5, L(w̃) = 6."""
    for optimizer in ("asam", "sam"):
        values, toy, mover = take_step(talas, optimizer)
        wanted = [("ascent", 3.0), ("descent", 6.0)]
        told = f"{optimizer}: the steps and their gradients must be {wanted}, they are"
        assert mover.calls == wanted, f"{told} {mover.calls}"
        same(toy.w, 0.4, f"{optimizer}: w after the step")
        same(values, [1, 2, 3, 1.5, 4.5], f"{optimizer}: the values of METRICS")


def step_adamw(talas):
    """One pass and no ascent."""
    values, toy, mover = take_step(talas, "adamw")
    assert mover.calls == [("descent", 3.0)], f"adamw: descent_step alone, not {mover.calls}"
    assert toy.passes == 1, f"adamw: one pass is enough, there are {toy.passes}"
    same(values, [1, 2, 3, 1.5, 0], "adamw: the values of METRICS")


def step_disam(talas):
    """Losses of the domains 0.75 w², 2.25 w²: Var = 0.5625 w⁴, and 3 w - 0.4 · 2.25 w³ = 2.1."""
    values, _, mover = take_step(talas, "disam")
    wanted = [("ascent", 2.1), ("descent", 6.0)]
    told = "disam: it climbs on Eqs. 10-12 and descends on L: expected"
    assert mover.calls == wanted, f"{told} {wanted}, got {mover.calls}"
    same(values, [1, 2, 3, 1.5, 4.5], "disam: the values of METRICS")


def step_dropout(talas):
    """Both passes draw the same masks, each step others."""
    for optimizer in ("asam", "sam", "disam"):
        _, toy, _ = take_step(talas, optimizer)
        take_step(talas, optimizer, toy)
        assert toy.passes == 4, f"{optimizer}: two steps need four passes, not {toy.passes}"
        first, second, later, _ = toy.drawn
        assert first == second, f"{optimizer}: the second pass must draw the first's dropout masks"
        assert second != later, f"{optimizer}: the next step must draw other dropout masks"


def step_values(talas):
    """The graph of a step must not live on in its values."""
    for optimizer in ("asam", "adamw"):
        values, _, _ = take_step(talas, optimizer)
        assert not values.requires_grad, f"{optimizer}: the values still hold their graph: detach()"


# ------------------------------------------------------------------------------ Exercise 6: λ_max
def largest(talas, *diagonals, **settings):
    """λ_max of a loss whose Hessian is diagonal; a parameter a tuple."""
    parameters = [torch.nn.Parameter(torch.ones(len(d))) for d in diagonals]

    def loss():
        pairs = zip(parameters, diagonals)
        return sum((torch.tensor(d) * p.square()).sum() / 2 for p, d in pairs)

    return talas.largest_hessian_eigenvalue(loss, parameters, **settings)


def curvature_diagonal(talas):
    """The largest one, in whichever parameter it is."""
    same(largest(talas, (1.0, 3.0), (5.0, 2.0)), 5.0, "H = diag(1, 3, 5, 2)", 0.01)
    same(largest(talas, (1.0, 7.0), (5.0, 2.0), seed=3), 7.0, "H = diag(1, 7, 5, 2)", 0.01)


def curvature_signs(talas):
    """The algebraically largest, not the one of largest size."""
    found = largest(talas, (5.0, -5.2, 1.0, 1.0))
    same(found, 5.0, "H = diag(5, -5.2, 1, 1)", 0.01)
    same(largest(talas, (-3.0, -1.0)), -1.0, "H = diag(-3, -1)", 0.01)


def curvature_flat(talas):
    """A flat loss has λ_max = 0, not NaN."""
    same(largest(talas, (0.0, 0.0, 0.0)), 0.0, "H = 0", 0.01)


def curvature_coupled(talas):
    """L = 3 x y: H has 0 on the diagonal and 3 beside it; it leaves no gradient behind."""
    x, y = (torch.nn.Parameter(torch.tensor(v)) for v in (1.0, -2.0))
    same(talas.largest_hessian_eigenvalue(lambda: 3 * x * y, [x, y]), 3.0, "L = 3 x y", 0.01)
    clean = all(p.grad is None for p in (x, y))
    assert clean, "it leaves gradients in the parameters, to which the next step would add"


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
TAMD = [tamd_one_layer, tamd_projection, tamd_two_layers, tamd_each_sentence, tamd_gradient]
LASD = [relation_of_two, lasd_two_layers, lasd_chain, lasd_gradient, lasd_guide]
SIMCSE = [simcse_two_sentences, simcse_negatives, simcse_three_sentences]
SIMCSE += [simcse_small_temperature, simcse_gradient]
ASAM = [asam_one_weight, asam_two_tensors, asam_eta, asam_not_adaptive, asam_clears]
ASAM += [asam_returns, asam_two_steps, asam_without_gradient]
STEPS = [step_asam, step_adamw, step_disam, step_dropout, step_values]
CURVATURE = [curvature_diagonal, curvature_signs, curvature_flat, curvature_coupled]
CURVATURE += [curvature_at_w, curvature_large]
EXERCISES = {  # number: name, points, checks
    1: ("TAMD, Eq. 3", 10, TAMD),
    2: ("LASD, Eqs. 4-5", 15, LASD),
    3: ("SimCSE, Eq. 6", 15, SIMCSE),
    4: ("ASAM, Eq. 2", 20, ASAM),
    5: ("A step of Algorithm 1", 20, STEPS),
    6: ("Sharpness, Table 4", 20, CURVATURE),
}
