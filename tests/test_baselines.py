"""The other methods of Table 1: each loss against plain loops, each run against talas.py's ways."""

from support.loading import load_encoder

import json
import math
from collections import Counter
from itertools import combinations, permutations

import pytest
import torch
from conftest import SENTENCES, in_a_process, in_two_processes, small_bert

import talas
from study import baselines
from study.baselines import Settings

METHODS = {
    "distill": [],
    "distill-mse": ["--distance", "mse"],
    "stella": ["--batch_size", "8"],
    "distillcse": [],
}
RUNS = [pytest.param([*f, "--method", m.split("-")[0]], id=m) for m, f in METHODS.items()]


def embeddings(n, d, seed):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed))


def cosine(x, y):
    dot = sum(a * b for a, b in zip(x, y))
    return dot / math.sqrt(sum(a * a for a in x)) / math.sqrt(sum(b * b for b in y))


E, T = embeddings(6, 5, 1), embeddings(6, 5, 2)
e, t = E.tolist(), T.tolist()
COUPLES = list(combinations(range(6), 2))


def mean(values):
    values = list(values)
    return sum(values) / len(values)


# --------------------------------------------------------------------------------------- the losses
def test_distill_loss_is_that_of_embed_distill():
    by_hand = mean(1 - cosine(x, y) for x, y in zip(e, t))
    assert baselines.distill_loss(E, T, "cosine").item() == pytest.approx(by_hand, rel=1e-5)
    by_hand = mean((a - b) ** 2 for x, y in zip(e, t) for a, b in zip(x, y))
    assert baselines.distill_loss(E, T, "mse").item() == pytest.approx(by_hand, rel=1e-5)


def test_distill_loss_agrees_with_sentence_transformers(bert):
    """Its EmbedDistillLoss has a bias; without one it is the same function."""
    library = pytest.importorskip("sentence_transformers")
    model = library.SentenceTransformer(str(bert), device="cpu")
    for distance in ("cosine", "mse"):
        loss = library.losses.EmbedDistillLoss(model, distance_metric=distance)
        theirs = loss.compute_loss_from_embeddings([E], [T]).item()
        assert baselines.distill_loss(E, T, distance).item() == pytest.approx(theirs, rel=1e-5)


def test_similarity_loss_compares_every_pair():
    wide = embeddings(6, 9, 3)  # the two may differ in width
    w = wide.tolist()
    square = [(cosine(e[i], e[j]) - cosine(w[i], w[j])) ** 2 for i in range(6) for j in range(6)]
    assert baselines.similarity_loss(E, wide).item() == pytest.approx(mean(square), rel=1e-5)


@pytest.mark.parametrize("margin", [0.0, 0.015, 0.5])
def test_relative_similarity_loss_wants_the_teachers_order(margin):
    hinges = []
    for (i, j), (m, n) in permutations(COUPLES, 2):
        if cosine(t[i], t[j]) > cosine(t[m], t[n]):
            hinges.append(max(0, cosine(e[m], e[n]) - cosine(e[i], e[j]) + margin))
    assert len(hinges) == 15 * 14 / 2
    loss = baselines.relative_similarity_loss(E, T, margin).item()
    assert loss == pytest.approx(mean(hinges), rel=1e-5)
    assert baselines.relative_similarity_loss(T, T, 0.0).item() == 0


def test_stella_loss_weighs_the_three():
    assert baselines.relative_similarity_loss(E, torch.ones(6, 5), 0.5) == 0  # none is ordered
    s = Settings(cosine_weight=2.0, similarity_weight=3.0, relative_weight=5.0, margin=0.1)
    parts = baselines.distill_loss(E, T, "cosine"), baselines.similarity_loss(E, T)
    expected = 2 * parts[0] + 3 * parts[1] + 5 * baselines.relative_similarity_loss(E, T, 0.1)
    assert baselines.stella_loss(E, T, s).item() == pytest.approx(expected.item(), rel=1e-6)


def test_the_defaults_are_those_of_the_papers():
    s = Settings()
    assert (s.cosine_weight, s.similarity_weight, s.relative_weight) == (10, 200, 20)
    assert (s.margin, s.projection_epochs, s.epochs, s.lr) == (0.015, 2, 5, 2e-5)
    assert (s.temperature, s.student_temperature, s.teacher_temperature) == (0.05, 0.025, 0.0125)
    assert (s.group_p, s.optimizer) == (0.1, "adamw")


def groups(row, p):
    """The places of a row's similarities, in groups: each a step of p of the softmax's sum."""
    total, cumulated, found = sum(map(math.exp, row)), 0.0, {}
    for place in sorted(range(len(row)), key=lambda place: -row[place]):
        cumulated += math.exp(row[place]) / total
        found.setdefault(min(int(cumulated / p), math.ceil(1 / p) - 1), []).append(place)
    return list(found.values())


@pytest.mark.parametrize("p", [0.13, 0.35, 1.0])
def test_group_p_shuffle_deals_out_anew_within_each_group(p):
    rows = 3 * embeddings(5, 9, 4)
    torch.manual_seed(0)
    drawn = torch.stack([baselines.group_p_shuffle(rows, p) for _ in range(400)])  # (400, 5, 9)
    for i, row in enumerate(rows.tolist()):
        for places in groups(row, p):
            for place in places:
                counts = Counter(drawn[:, i, place].tolist())
                assert counts.keys() == {row[other] for other in places}
                assert min(counts.values()) > 400 / len(places) / 3  # all as often, roughly
        assert torch.equal(drawn[:, i].sort(-1).values, rows[i].sort().values.expand(400, 9))


def test_distribution_loss_is_a_cross_entropy_without_the_sentence_itself():
    losses = []
    for i in range(6):
        others = [j for j in range(6) if j != i]
        student = [math.exp(cosine(e[i], e[j]) / 0.3) for j in others]
        teacher = [math.exp(cosine(t[i], t[j]) / 0.2) for j in others]
        pairs = zip(student, teacher)
        losses.append(-sum(y / sum(teacher) * math.log(x / sum(student)) for x, y in pairs))
    s = Settings(student_temperature=0.3, teacher_temperature=0.2, group_p=1.0)
    loss = baselines.distribution_loss(E, T, s, shuffled=False).item()
    assert loss == pytest.approx(mean(losses), rel=1e-5)
    torch.manual_seed(0)
    shuffled = [baselines.distribution_loss(E, T, s, shuffled=True).item() for _ in range(20)]
    assert len(set(shuffled)) > 10 and min(shuffled) != loss


def test_distribution_loss_shuffles_the_teacher(monkeypatch):
    """With the others' places turned round in place of dealt out."""
    monkeypatch.setattr(baselines, "group_p_shuffle", lambda cosines, p: cosines.flip(-1))
    losses = []
    for i in range(6):
        others = [j for j in range(6) if j != i]
        student = torch.tensor([cosine(e[i], e[j]) / 0.3 for j in others]).log_softmax(0)
        teacher = torch.tensor([cosine(t[i], t[j]) / 0.2 for j in reversed(others)]).softmax(0)
        losses.append(-(teacher * student).sum().item())
    s = Settings(student_temperature=0.3, teacher_temperature=0.2)
    loss = baselines.distribution_loss(E, T, s, shuffled=True).item()
    assert loss == pytest.approx(mean(losses), rel=1e-5)


# ------------------------------------------------------------------------------------ the objective
def objective_of(bert, flags):
    s = talas.parse_settings([*flags, "--student", str(bert)], Settings)
    student = load_encoder(str(bert))
    student.model.eval()  # no dropout: two passes agree
    torch.manual_seed(0)
    return talas.set_up(s, student, 8, 10, baselines.Baseline)[0]


@pytest.mark.parametrize("flags", RUNS)
def test_each_method_reads_the_last_layer(bert, flags):
    other = "--temperature 0.3 --student_temperature 0.2 --teacher_temperature 0.1 --margin 0.3"
    other += " --cosine_weight 2 --similarity_weight 3 --relative_weight 5"
    objective, teacher = objective_of(bert, [*flags, *other.split()]), embeddings(7, 8, 5)
    tokens = objective.student.tokenizer(SENTENCES[:7], padding=True, return_tensors="pt")
    loss, (simcse, own) = objective(tokens, teacher)
    states = objective.model(**tokens).last_hidden_state[:, 0]
    assert len(objective.projections) == (0 if "distillcse" in flags else 1)
    if "distillcse" in flags:
        known = Settings(student_temperature=0.2, teacher_temperature=0.1)
        expected = baselines.distribution_loss(states, teacher, known, shuffled=False)
        twice = talas.simcse_loss(states, states, 0.3).item()
        assert simcse.item() == pytest.approx(twice, rel=1e-4)
    else:
        projected = states @ objective.projections[0]
        distance = "mse" if "mse" in flags else "cosine"
        expected = baselines.distill_loss(projected, teacher, distance)
        if "stella" in flags:
            parts = expected, baselines.similarity_loss(projected, teacher)
            relative = baselines.relative_similarity_loss(projected, teacher, 0.3)
            expected = 2 * parts[0] + 3 * parts[1] + 5 * relative
        assert simcse.item() == 0
    assert own.item() == pytest.approx(expected.item(), rel=1e-4)
    assert loss.item() == pytest.approx((simcse + own).item(), rel=1e-6)


def test_distillcse_shuffles_in_training_alone(bert):
    objective, teacher = objective_of(bert, ["--method", "distillcse"]), embeddings(7, 8, 5)
    object.__setattr__(objective.s, "group_p", 0.5)  # at 0.1 each of the six is its own group
    tokens = objective.student.tokenizer(SENTENCES[:7], padding=True, return_tensors="pt")
    assert objective(tokens, teacher)[0] == objective(tokens, teacher)[0]  # for λ_max
    for module in objective.model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    objective.model.train()
    for flag, same in (("0.5", False), ("0", True)):
        object.__setattr__(objective.s, "group_p", float(flag))
        values = {objective(tokens, teacher)[1][1].item() for _ in range(5)}
        assert (len(values) == 1) is same


# ------------------------------------------------------------------------------------ whole runs
@pytest.fixture
def flags(bert, cache, tmp_path):
    return [
        *("--student", str(bert), "--teacher", str(cache), "--output", str(tmp_path / "out")),
        *("--epochs", "2", "--batch_size", "16", "--lr", "1e-3", "--device", "cpu"),
    ]


def weights(folder):
    projections = torch.load(folder / "projections.pt", weights_only=True)
    return (folder / "model.safetensors").read_bytes(), [W.tolist() for W in projections]


@pytest.mark.parametrize("method", RUNS)
def test_a_run_leaves_what_talas_leaves_and_learns(tmp_path, flags, method):
    baselines.main([*flags, "--epochs", "12", *method])
    out = tmp_path / "out"
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "loss" in line]
    names = {"step", "epoch", "simcse", "distillation", "loss", "sharpness_gap"}
    assert steps[0].keys() == names | {"lr", "ms_per_step", "memory_mb"}
    assert steps[-1]["distillation"] < steps[0]["distillation"]
    assert (steps[0]["simcse"] > 0) is ("distillcse" in method)
    told = json.loads((out / "talas.json").read_text())
    assert told["settings"]["method"] == method[-1] and told["cost"]["ms_per_step"] > 0
    assert talas.load_student(talas.Settings(student=str(out)), []).dimensions == 32
    assert not (out / "checkpoint.pt").exists()


@pytest.mark.parametrize("method", RUNS)
def test_an_interrupted_run_ends_as_one_that_nothing_interrupted(
    tmp_path, flags, method, monkeypatch, ends_with_one_line
):
    baselines.main([*flags, *method])
    whole, step, count = weights(tmp_path / "out"), talas.training_step, []
    stage = 2 * 6 if "stella" in method else 0  # stella's first stage: two epochs of six steps

    def interrupted(*args):
        count.append(0)
        if len(count) == stage + (9 if "stella" in method else 5):  # in the second epoch
            raise KeyboardInterrupt
        return step(*args)

    flags[5] = str(tmp_path / "again")
    monkeypatch.setattr(talas, "training_step", interrupted)
    ends_with_one_line(lambda: baselines.main([*flags, *method]), "interrupted", "--resume")
    monkeypatch.setattr(talas, "training_step", step)
    baselines.main([*flags, *method, "--resume"])
    assert weights(tmp_path / "again") == whole


def test_stellas_first_stage_trains_the_projection_alone(tmp_path, bert, flags, monkeypatch):
    seen, train = [], talas.train

    def watched(s, corpus, student, kind):
        before = [p.clone() for p in student.model.parameters()]
        projections = train(s, corpus, student, kind)
        pairs = zip(before, student.model.parameters())
        seen.append((s.epochs, all(torch.equal(p, q) for p, q in pairs), projections[0].clone()))
        return projections

    monkeypatch.setattr(talas, "train", watched)
    set_up, started = talas.set_up, []
    monkeypatch.setattr(
        talas,
        "set_up",
        lambda *args: (
            made := set_up(*args),
            started.append(made[0].projections[0].detach().clone()),
        )[0],
    )
    baselines.main([*flags, "--method", "stella", "--projection_epochs", "3"])
    assert [(epochs, frozen) for epochs, frozen, _ in seen] == [(3, True), (2, False)]
    assert torch.equal(started[1], seen[0][2])  # the second stage begins where the first ended
    assert not torch.equal(started[0], seen[0][2]) and not torch.equal(started[1], seen[1][2])


def test_an_interrupted_first_stage_leaves_nothing_to_resume(
    tmp_path, flags, monkeypatch, ends_with_one_line
):
    """Neither of its own nor of the run that it was to overwrite."""
    step, count = talas.training_step, []

    def interrupted(*args):
        count.append(0)
        if len(count) == stop:
            raise KeyboardInterrupt
        return step(*args)

    stella, out = [*flags, "--method", "stella"], tmp_path / "out"
    monkeypatch.setattr(talas, "training_step", interrupted)
    stop = 3
    ends_with_one_line(lambda: baselines.main(stella), "interrupted", "begins again")
    assert not out.exists() or not list(out.iterdir())
    stop = len(count) + 9  # in stage two
    ends_with_one_line(lambda: baselines.main(stella), "interrupted", "--resume")
    assert (out / "checkpoint.pt").exists()
    stop = len(count) + 3
    ends_with_one_line(lambda: baselines.main([*stella, "--overwrite"]), "begins again")
    ends_with_one_line(lambda: baselines.main([*stella, "--resume"]), "no checkpoint")


def test_a_finished_student_is_not_overwritten(tmp_path, flags, ends_with_one_line):
    baselines.main(flags)
    kept = weights(tmp_path / "out")
    for method in ("distill", "stella"):
        ends_with_one_line(lambda m=method: baselines.main([*flags, "--method", m]), "--overwrite")
    assert weights(tmp_path / "out") == kept


@pytest.mark.parametrize("optimizer", ["asam", "sam"])
def test_asam_takes_other_objectives_too(tmp_path, flags, optimizer):
    baselines.main([*flags, "--optimizer", optimizer, "--rho", "0.5", "--sharpness"])
    lines = [json.loads(line) for line in open(tmp_path / "out" / "metrics.jsonl")]
    assert any(line.get("sharpness_gap", 0) > 0 for line in lines)
    assert all(math.isfinite(line["lambda_max"]) for line in lines if "lambda_max" in line)


def test_two_processes_train_stella(tmp_path, flags):
    assert in_two_processes(lambda: baselines.main([*flags, "--method", "stella"])) == [0, 0]
    assert len(weights(tmp_path / "out")[1]) == 1


@pytest.mark.parametrize(
    "wrong, words",
    [
        (["--method", "emo"], ["--method", "emo"]),
        (["--lambda3", "1"], ["--lambda3"]),
        (["--optimizer", "disam"], ["--optimizer", "disam"]),
        (["--method", "stella", "--batch_size", "2"], ["--batch_size 2", "stella"]),
        (["--method", "stella", "--batch_size", "257"], ["--batch_size 257", "256"]),
        (["--method", "distillcse", "--batch_size", "2"], ["--batch_size 2", "distillcse"]),
        (["--group_p", "2"], ["--group_p 2.0", "to 1"]),
        (["--group_p", "1e-320"], ["--group_p 1e-320", "0.001"]),
        (
            ["--cosine_weight", "0", "--similarity_weight", "0", "--relative_weight", "0"],
            ["--relative_weight", "all 0"],
        ),
        (["--margin", "-1"], ["--margin -1.0", "at least 0"]),
        (["--teacher_temperature", "0"], ["--teacher_temperature 0.0", "above 0"]),
        (["--teacher", "nowhere.pt"], ["nowhere.pt"]),
    ],
)
def test_a_mistake_is_one_line(flags, wrong, words, ends_with_one_line):
    ends_with_one_line(lambda: baselines.main([*flags, *wrong]), *words)


def test_a_cache_without_embeddings_is_refused(corpus, flags, ends_with_one_line):
    flags[3] = str(corpus)
    ends_with_one_line(lambda: baselines.main(flags), "corpus.jsonl")


def test_a_batch_of_one_is_enough_for_distill(flags, tmp_path):
    assert in_a_process(lambda: baselines.main([*flags, "--batch_size", "1"])) == 0


def test_a_student_of_one_layer_can_be_distilled(tmp_path, flags):
    flags[1] = str(small_bert(tmp_path / "one", num_hidden_layers=1))
    baselines.main([*flags, "--method", "distillcse"])
    assert weights(tmp_path / "out")[1] == []
