"""The methods with a cached teacher: each loss as its paper prints it, in loops; whole runs."""

from collections import Counter
from itertools import combinations, permutations

import pytest
import torch
from helpers import before_each_step, random_rows, saved_weights
from scipy.special import huber
from torch.testing import assert_close

import talas
from study import baselines

E = random_rows(6, 5, seed=1)  # the student's embeddings of six sentences
T = random_rows(6, 9, seed=2)  # the teacher's


def cosine(a, b):
    """Of two vectors."""
    return a @ b / (a.norm() * b.norm())


# ------------------------------------------------------------------------- distill, Jasper & Stella
def test_similarity_loss_compares_every_pair():
    total = 0.0
    for i in range(6):
        for j in range(6):
            total += (cosine(E[i], E[j]) - cosine(T[i], T[j])) ** 2
    assert_close(baselines.similarity_loss(E, T), total / 36)


def test_relative_similarity_loss_wants_the_teachers_order():
    hinges = []
    for (i, j), (m, n) in permutations(combinations(range(6), 2), 2):
        if cosine(T[i], T[j]) > cosine(T[m], T[n]):
            hinge = cosine(E[m], E[n]) - cosine(E[i], E[j]) + 0.5
            hinges.append(hinge.clamp(min=0))
    loss = baselines.relative_similarity_loss(E, T, margin=0.5)
    assert_close(loss, sum(hinges) / len(hinges))
    assert baselines.relative_similarity_loss(E, torch.ones(6, 9), 0.5) == 0  # no order


# -------------------------------------------------------------------------------------- DistillCSE
def test_group_p_shuffle_permutes_each_group():
    row = torch.tensor([0.1, 0.5, 0.15, 0.25]).log()
    # cumulated from the largest: 0.5, 0.75, 0.9, 1; the first is alone in [1/3, 2/3)
    largest = row[1].item()
    expected = set()
    for a, b, c in permutations(row[[0, 2, 3]].tolist()):
        expected.add((a, largest, b, c))
    torch.manual_seed(0)
    shuffled = baselines.group_p_shuffle(row.expand(2000, 4), p=1 / 3)
    counts = Counter(tuple(new_row) for new_row in shuffled.tolist())
    assert counts.keys() == expected
    assert min(counts.values()) > 2000 / 6 / 2


def test_distribution_loss_is_a_cross_entropy_over_the_other_sentences():
    total = 0.0
    for i in range(6):
        others = [j for j in range(6) if j != i]
        student = torch.stack([cosine(E[i], E[j]) for j in others])
        teacher = torch.stack([cosine(T[i], T[j]) for j in others])
        total -= (teacher / 0.2).softmax(0) @ (student / 0.3).log_softmax(0)
    s = baselines.Settings(student_temperature=0.3, teacher_temperature=0.2)
    assert_close(baselines.distribution_loss(E, T, s, shuffled=False), total / 6)


# -------------------------------------------------------------- the objectives with their settings
def prepare(flags):
    """(objective, its batch of 7 sentences) for some flags, in the folder of the fixture here."""
    argv = f"--student bert --device cpu {flags}".split()
    s = talas.parse_settings(argv, baselines.Settings)
    torch.manual_seed(0)
    corpus, objective = baselines.prepare(s, torch.load("teacher.pt"))
    tokens, teacher, _ = corpus.batch(torch.arange(7))
    return objective, tokens, teacher


def last_layer(objective, tokens):
    """The [CLS] states, without dropout."""
    return objective.eval().model(**tokens).last_hidden_state[:, 0]


def test_distill_by_cosine(here):
    objective, tokens, teacher = prepare("--method distill")
    projected = last_layer(objective, tokens) @ objective.projections[0]
    distances = [1 - cosine(projected[i], teacher[i]) for i in range(7)]
    loss, terms = objective(tokens, teacher)
    assert_close(loss, sum(distances) / 7)
    assert terms == {"distillation": loss, "loss": loss}


def test_distill_by_mse(here):
    objective, tokens, teacher = prepare("--method distill --distance mse --projection_std 1")
    projected = last_layer(objective, tokens) @ objective.projections[0]
    squares = (projected - teacher) ** 2
    assert_close(objective(tokens, teacher)[0], squares.sum() / (7 * 8))


def test_stella(here):
    weights = "--cosine_weight 2 --similarity_weight 3 --relative_weight 5 --margin 0.3"
    objective, tokens, teacher = prepare(f"--method stella --distance mse {weights}")
    projected = last_layer(objective, tokens) @ objective.projections[0]
    expected = 2 * baselines.distill_loss(projected, teacher, "cosine")  # whatever the distance
    expected += 3 * baselines.similarity_loss(projected, teacher)
    expected += 5 * baselines.relative_similarity_loss(projected, teacher, 0.3)
    assert_close(objective(tokens, teacher)[0], expected)


def test_distillcse_distils_the_first_of_two_views(here):
    temperatures = "--temperature 0.3 --student_temperature 0.2 --teacher_temperature 0.1"
    objective, tokens, teacher = prepare(f"--method distillcse --group_p 0 {temperatures}")
    objective.train()
    torch.manual_seed(1)  # of dropout
    view, other_view = talas.embed(objective.encoder, tokens, objective.s, views=2)[-1]
    distillation = baselines.distribution_loss(view, teacher, objective.s, shuffled=False)
    torch.manual_seed(1)
    loss, terms = objective(tokens, teacher)
    assert_close(terms["simcse"], talas.simcse_loss(view, other_view, 0.3))
    assert_close(terms["distillation"], distillation)
    assert_close(loss, terms["simcse"] + terms["distillation"])


def test_distillcse_shuffles_in_training(here):
    objective, tokens, teacher = prepare("--method distillcse --group_p 0.5")
    for module in objective.modules():
        module.p = 0.0  # no dropout
    objective.train()
    assert len({objective(tokens, teacher)[0].item() for _ in range(5)}) == 5
    objective.eval()
    assert len({objective(tokens, teacher)[0].item() for _ in range(5)}) == 1


def test_rkd_over_all_pairs_and_triples(here):
    objective, tokens, teacher = prepare("--method rkd --distance_weight 3 --angle_weight 5")
    teacher = teacher**5  # far apart: some differences are above 1
    e = last_layer(objective, tokens).detach()
    D_e = torch.cdist(e, e)
    D_T = torch.cdist(teacher, teacher)
    distances = 0.0
    for i, j in permutations(range(7), 2):
        difference = D_e[i, j] / (D_e.sum() / 42) - D_T[i, j] / (D_T.sum() / 42)
        distances += huber(1, difference.item())
    angles = 0.0
    for i, j, k in permutations(range(7), 3):
        student_angle = cosine(e[i] - e[j], e[k] - e[j])
        teacher_angle = cosine(teacher[i] - teacher[j], teacher[k] - teacher[j])
        angles += huber(1, (student_angle - teacher_angle).item())
    loss, _ = objective(tokens, teacher)
    assert loss.item() == pytest.approx(3 * distances / 7**2 + 5 * angles / 7**3, rel=1e-5)


def test_rkd_has_a_gradient_where_sentences_are_the_same():
    e = torch.ones(3, 5, requires_grad=True)
    baselines.rkd_loss(e, T[:3].float(), baselines.Settings()).backward()
    assert e.grad.isfinite().all()


def test_projection_std(here):
    s = baselines.WithStart(student="bert", device="cpu", projection_std=0.5)
    _, objective = baselines.prepare(s, torch.load("teacher.pt"))
    for W in objective.projections:
        assert W.std().item() == pytest.approx(0.5, rel=0.15)


# -------------------------------------------------------------------------------------- whole runs
@pytest.fixture
def flags(here):
    """Three steps an epoch, two epochs."""
    flags = "--student bert --teacher teacher.pt --output out --device cpu --epochs 2"
    return f"{flags} --batch_size 16 --lr 1e-3 --method".split()


def test_stella_trains_w_alone_then_both_and_resumes_to_the_bit(flags, monkeypatch):
    queries = []
    projections = []

    def watch(number, objective):
        layer = objective.model.encoder.layer[0]
        queries.append(layer.attention.self.query.weight.tolist())
        projections.append(objective.projections[0].tolist())
        if number == 3 + 5:  # in the second epoch of the second stage
            raise KeyboardInterrupt

    flags = [*flags, "stella", "--projection_epochs", "1"]
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        before_each_step(watch, patch)
        baselines.main(flags)
    assert queries[3] == queries[0]  # the first stage has three steps
    assert queries[4] != queries[3]
    assert projections[3] != projections[0]
    baselines.main([*flags, "--resume"])
    resumed = saved_weights("out")
    baselines.main([*flags, "--overwrite"])
    assert saved_weights("out") == resumed


def test_a_mistake_is_one_line(flags, ends_with_one_line):
    flags = [*flags, "distillcse", "--teacher_temperature", "0"]
    ends_with_one_line(lambda: baselines.main(flags), "--teacher_temperature")
