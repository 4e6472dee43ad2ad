"""The methods with an online teacher: tables worked by hand, each loss in loops, whole runs."""

from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import (
    SENTENCES,
    in_two_processes,
    metrics,
    random_rows,
    small_bert,
    tokenize_alone,
)
from torch import cosine_similarity
from torch.nn.functional import pad
from torch.testing import assert_close
from transformers import AutoModel

import talas
from study import online

TEXTS = [SENTENCES[0], SENTENCES[3], SENTENCES[14], "A rose."]  # of four lengths


# ------------------------------------------------------------------ which tokens belong together
def test_edit_distance_by_hand():
    assert online.edit_distance("kitten", "sitting") == 3


def test_the_cheapest_path_by_hand():
    cost = np.array([[0, 1, 6], [5, 4, 1], [9, 7, 2]])  # D is 0 1 7 / 5 4 2 / 14 11 4
    assert online.warp(cost) == [(0, 0), (0, 1), (1, 2), (2, 2)]
    same_cost = np.zeros((2, 3))  # of several paths the one whose last steps are diagonal
    assert online.warp(same_cost) == [(0, 0), (0, 1), (1, 2)]


def test_words_have_no_markers_and_no_capitals():
    encoding = SimpleNamespace(
        tokens=["[CLS]", "ĠThe", "▁cook", "##s", "[SEP]"], special_tokens_mask=[1, 0, 0, 0, 1]
    )
    tokenizer = SimpleNamespace(encode={"The cooks": encoding}.get)
    encoder = SimpleNamespace(tokenizer=tokenizer)
    words = online.words_of(encoder, "The cooks", with_special=False)
    assert words == ([1, 2, 3], ["the", "cook", "s"])
    _, words = online.words_of(encoder, "The cooks", with_special=True)
    assert words == [online.SPECIAL, "the", "cook", "s", online.SPECIAL]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A student of 3 layers and a teacher of 5, whose tokenizer splits garden into gar, ##den."""
    folder = tmp_path_factory.mktemp("models")
    small_bert(folder / "student", initializer_range=0.1)  # more would make all tokens alike
    sizes = {"num_hidden_layers": 5, "hidden_size": 48, "initializer_range": 0.1}
    small_bert(folder / "teacher", seed=1, **sizes)
    tokenizer = folder / "teacher" / "tokenizer.json"
    tokenizer.write_text(tokenizer.read_text().replace('"garden"', '"gardens"'))
    return folder


def prepare(models, flags, texts=TEXTS):
    """(corpus, objective) for some flags."""
    argv = f"--student {models}/student --teacher {models}/teacher --device cpu {flags}".split()
    torch.manual_seed(0)
    cache = {"sentences": texts, "sources": texts, "embeddings": None}
    return online.prepare(online.parse_settings(argv), cache)


# [CLS] the cook sees the door in the garden . [SEP], and with gar ##den: 0 to 10, and 0 to 11
SAME = [(i, i) for i in range(8)]
CDM = [*SAME[1:], (7, 8), (8, 9), (9, 10)]
EMO = [*SAME[:6], (6, 9), (7, 8), (9, 10), (10, 11)]  # den is nearest to in, gar to the


@pytest.mark.parametrize(
    "method, links, mutual",
    [
        ("cdm", CDM, []),
        ("emo", EMO, [*SAME, (9, 10), (10, 11)]),
        ("dskd", [(i, j) for i in range(1, 10) for j in range(1, 11)], []),
    ],
)
def test_tokens_where_the_teacher_splits_a_word(models, method, links, mutual):
    corpus, _ = prepare(models, f"--method {method}")
    found_links, found_mutual = corpus.match(SENTENCES[0])
    assert sorted(found_links) == links
    assert sorted(found_mutual) == mutual


# ------------------------------------------------------------------------------ parts of the losses
def test_cka_of_centred_gram_matrices():
    X = random_rows(6, 4, seed=0)
    Y = random_rows(6, 5, seed=1)
    centre = torch.eye(6).double() - 1 / 6
    K = centre @ X @ X.T @ centre
    L = centre @ Y @ Y.T @ centre
    kornblith = (K * L).sum() / (K.norm() * L.norm())
    assert_close(online.cka_loss(X, Y), 1 - kornblith.sqrt())


def test_cka_of_equal_rows_has_a_gradient():
    X = torch.ones(3, 4, requires_grad=True)
    online.cka_loss(X, random_rows(3, 5)).backward()
    assert X.grad.isfinite().all()


def test_sinkhorn_gives_a_plan_of_its_form_with_its_marginals():
    cost = random_rows(4, 6, seed=0).sigmoid()
    a = random_rows(4, seed=1).softmax(0)
    b = random_rows(6, seed=2).softmax(0)
    plan = online.sinkhorn(cost, a, b, epsilon=0.1, iterations=500)
    assert_close(plan.sum(1), a)
    assert_close(plan.sum(0), b)
    assert torch.linalg.matrix_rank(plan * (cost / 0.1).exp()) == 1  # u vᵀ
    # padding changes nothing, also where the plan has not converged
    plan = online.sinkhorn(cost, a, b, epsilon=0.1, iterations=2)
    padded_cost = pad(cost, (0, 2, 0, 1))
    padded_plan = online.sinkhorn(padded_cost, pad(a, (0, 1)), pad(b, (0, 2)), 0.1, iterations=2)
    assert_close(padded_plan[:4, :6], plan)


# -------------------------------------------------- each method, in loops over sentences alone
@torch.no_grad()
def alone(folder, text):
    """What an encoder makes of one sentence without padding: states (n, d), attention (n, n)."""
    model = AutoModel.from_pretrained(folder, attn_implementation="eager")
    ids = torch.tensor([tokenize_alone(folder, [text])[0].ids])
    output = model(ids, output_hidden_states=True, output_attentions=True)
    return SimpleNamespace(
        states=[hidden[0] for hidden in output.hidden_states],
        last=output.last_hidden_state[0],
        attention=[attention[0].mean(0) for attention in output.attentions],
    )


def mean_distance(pairs, mse):
    """2 (1 - cos), the mean over pairs of vectors; or over their elements."""
    distances = [2 * (1 - cosine_similarity(a, b, dim=0)) for a, b in pairs]
    mean = sum(distances) / len(pairs)
    return mean / len(pairs[0][0]) if mse == "elements" else mean


def cdm(corpus, student, teacher, projections, mse):
    (P,) = projections
    words = []
    sentences = []
    for text, S, T in zip(TEXTS, student, teacher):
        links, _ = corpus.match(text)
        for token in {i for i, j in links}:
            linked = [T.last[j] for i, j in links if i == token]
            words.append((S.last[token] @ P, sum(linked) / len(linked)))
        sentences.append((S.last[0] @ P, T.last.mean(0)))
    return 50 * mean_distance(words, mse) + mean_distance(sentences, mse)


def dskd(corpus, student, teacher, projections, mse):
    to_T, to_S, q_S, k_T, v_T, q_T, k_S, v_S = projections
    sentences_T = []
    sentences_S = []
    words_T = []
    words_S = []
    for x, y in zip(student, teacher):
        sentences_T.append((x.last[0] @ to_T, y.last.mean(0)))
        sentences_S.append((x.last[0], y.last.mean(0) @ to_S))
        S, T = x.states[2], y.states[3]  # of 3 and 5
        S_from_T = (S @ q_S @ (T @ k_T).T / 32**0.5).softmax(1) @ T @ v_T
        T_from_S = (T @ q_T @ (S @ k_S).T / 32**0.5).softmax(1) @ S @ v_S
        words_S += zip(S[1:-1], S_from_T[1:-1])  # without [CLS] and [SEP]
        words_T += zip(T[1:-1], T_from_S[1:-1])
    loss = mean_distance(sentences_T, mse) + mean_distance(sentences_S, mse)
    return loss + mean_distance(words_T, mse) + mean_distance(words_S, mse)


def emo(corpus, student, teacher, projections, mse):
    (P,) = projections
    relations = transport = 0.0
    for text, S, T in zip(TEXTS, student, teacher):
        links, mutual = corpus.match(text)
        importance = T.attention[-1].sum(0).softmax(0)
        mass = torch.full((len(S.last),), importance.min())
        for i, j in links:
            mass[i] = importance[j]
        ranked = sorted(mutual, key=lambda pair: importance[pair[1]], reverse=True)
        first = torch.tensor(ranked[: max(3, len(ranked) // 3)])
        rows = T.attention[2]  # 3 * (5 // 3) - 1: the place of the student's last layer
        relations += online.cka_loss(S.attention[-1][first[:, 0]], rows[first[:, 1]])
        cost = 1 - (S.last @ (T.last @ P).T / 32**0.5).softmax(1)
        plan = online.sinkhorn(cost, mass / mass.sum(), importance, 0.1, 100)
        transport += (plan * cost).sum() / len(TEXTS)
    return 0.05 * relations + 0.5 * transport


@pytest.mark.parametrize("mse", ["elements", "sentences"])
@pytest.mark.parametrize("method, simcse_weight", [(cdm, 0.5), (dskd, 1.0), (emo, 0.5)])
def test_a_batch_gives_what_its_sentences_give_alone(
    models, method, simcse_weight, mse, monkeypatch
):
    monkeypatch.setattr(online, "PIECE", 3)
    flags = f"--method {method.__name__} --teacher_pooling mean --temperature 0.3 --mse {mse}"
    corpus, objective = prepare(models, flags)
    for W in objective.projections:
        W.data *= 8  # or attention would be nearly the same everywhere
    loss, terms = objective.eval()(*corpus.batch(torch.tensor([2, 0, 3, 1]))[:2])
    student = [alone(models / "student", text) for text in TEXTS]
    teacher = [alone(models / "teacher", text) for text in TEXTS]
    distillation = method(corpus, student, teacher, objective.projections, mse).item()
    assert terms["distillation"].item() == pytest.approx(distillation, rel=1e-4)
    assert_close(loss, simcse_weight * terms["simcse"] + terms["distillation"])
    loss.backward()
    assert all(W.grad.any() for W in objective.projections)
    assert all(weights.grad is None for weights in corpus.teacher.model.parameters())


def test_the_first_of_two_views_is_distilled(models):
    corpus, objective = prepare(models, "--method cdm --temperature 0.3")
    objective.train()
    tokens, teacher, _ = corpus.batch(torch.tensor([2, 0, 1]))
    two_views = {name: x.repeat(2, 1) for name, x in tokens.items()}
    torch.manual_seed(0)  # of dropout
    states = online.token_states(objective.encoder, two_views, {})
    first_view = {name: x[:3] for name, x in states.items()}
    distillation = online.cdm_loss(objective.projections, first_view, teacher, objective.s)
    torch.manual_seed(0)
    _, terms = objective(tokens, teacher)
    assert_close(terms["distillation"], distillation)
    assert_close(terms["simcse"], talas.simcse_loss(*states["sentence"].chunk(2), 0.3))


# ------------------------------------------------------------------------ what the settings reach
def test_how_projections_start(models):
    _, as_torch = prepare(models, "--method cdm")
    (W,) = as_torch.projections  # (32, 48)
    assert 0.95 < W.abs().max() * 32**0.5 <= 1
    _, as_xavier = prepare(models, "--method dskd")
    for W in as_xavier.projections:
        assert 0.95 < W.abs().max() * (sum(W.shape) / 6) ** 0.5 <= 1
    _, as_set = prepare(models, "--method cdm --projection_std 7")
    assert as_set.projections[0].std().item() == pytest.approx(7, rel=0.1)


def test_what_the_settings_of_the_teacher_reach(models):
    flags = "--teacher_dtype bfloat16 --teacher_pooling last --max_length 6"
    corpus, _ = prepare(models, flags)
    assert corpus.teacher.model.dtype == torch.bfloat16
    assert corpus.teacher.pooling == "last"
    assert max(map(len, corpus.teacher_tokens)) == 6


def test_another_teacher_is_another_corpus(models):
    corpus, _ = prepare(models, "")
    identity = corpus.identity()
    corpus.teacher.model.get_input_embeddings().weight.data[5, 5] += 1
    assert corpus.identity() != identity


# -------------------------------------------------------------------------------------- whole runs
def test_two_processes_share_the_batches(models, corpus, tmp_path):
    flags = f"--student {models}/student --teacher {models}/teacher --corpus {corpus}"
    flags += f" --output {tmp_path}/out --device cpu --epochs 2 --batch_size 12"
    assert in_two_processes(partial(online.main, flags.split())) == [0, 0]
    assert metrics(tmp_path / "out")[0][-1]["step"] == 4
