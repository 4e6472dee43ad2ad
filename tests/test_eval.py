"""eval.py and the demo: against scipy, scikit-learn and transformers used directly, and by hand."""

from support import data as tables

import importlib.util
import json
import os
import random
import subprocess
import sys

import datasets
import numpy as np
import pytest
import torch
from conftest import ROOT, SENTENCES
from scipy.stats import pearsonr, rankdata
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import average_precision_score, f1_score
from transformers import AutoModel, AutoTokenizer

import eval as evaluation


def run(*flags):
    evaluation.main([str(flag) for flag in flags])


def write(path, rows):
    """A .jsonl file of these rows, or of this text."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = rows if isinstance(rows, str) else "".join(json.dumps(row) + "\n" for row in rows)
    path.write_text(text, encoding="utf-8")


PAIRS = [{"sentence1": SENTENCES[i], "sentence2": SENTENCES[(7 * i + 1) % 48]} for i in range(40)]
TEXTS = [{"text": text, "label": text.split()[1]} for text in SENTENCES]


@pytest.fixture
def folder(tmp_path):
    """A folder with one task of each kind."""
    write(tmp_path / "data/stsb/test.jsonl", [p | {"score": i % 6} for i, p in enumerate(PAIRS)])
    write(tmp_path / "data/mrpc/test.jsonl", [p | {"label": i % 2} for i, p in enumerate(PAIRS)])
    write(tmp_path / "data/emotion/train.jsonl", TEXTS[::2])
    write(tmp_path / "data/emotion/test.jsonl", TEXTS[1::2])
    return tmp_path / "data"


# ------------------------------------------------------------------------------------- the metrics
def test_spearman_is_the_correlation_of_the_ranks():
    rng = np.random.default_rng(0)
    a, b, gold = rng.normal(size=(30, 4)), rng.normal(size=(30, 4)), rng.integers(0, 6, 30)
    cosines = [float(u @ v / (u @ u) ** 0.5 / (v @ v) ** 0.5) for u, v in zip(a, b)]
    expected = 100 * pearsonr(rankdata(cosines), rankdata(gold)).statistic
    assert evaluation.spearman(a, b, gold) == pytest.approx(expected)


def test_average_precision_by_hand():
    angles = np.array([0.1, 0.2, 0.3, 0.4])  # the smaller, the likelier: labels 1, 0, 1, 0
    a, b = np.array([[1.0, 0.0]] * 4), 7 * np.stack([np.cos(angles), np.sin(angles)], axis=1)
    expected = 100 * (1 / 1 + 2 / 3) / 2
    assert evaluation.average_precision(a, b, [1, 0, 1, 0]) == pytest.approx(expected)


def test_macro_f1_by_hand():
    train, test = np.array([[-1.0], [-2], [1], [2]]), np.array([[-3.0], [-1], [-1], [3]])
    found = evaluation.macro_f1(train, list("xxyy"), test, list("xxyy"))  # one y is taken for x
    assert found == pytest.approx(100 * (0.8 + 2 / 3) / 2)


def test_embeddings_are_classified_as_they_are():
    """Their length is information; float32 ones are not rounded further."""
    rng = np.random.default_rng(0)
    train, test = rng.normal(size=(60, 3)) * [[9]], rng.normal(size=(40, 3)) * [[9]]
    of_length = [int(np.linalg.norm(x) > 14) for x in [*train, *test]]
    fitted = LogisticRegression(max_iter=1000).fit(train, of_length[:60])
    expected = 100 * f1_score(of_length[60:], fitted.predict(test), average="macro")
    assert evaluation.macro_f1(train, of_length[:60], test, of_length[60:]) == expected


def test_cosine_of_a_zero_vector_is_0():
    a, b = np.array([[0.0, 0.0], [3.0, 4.0]]), np.array([[1.0, 2.0], [6.0, 8.0]])
    assert evaluation.cosine(a, b).tolist() == [0.0, 1.0]


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("other", [1.0, 1.7, -2.0])
def test_cosines_that_are_the_same_up_to_rounding_rank_nothing(dtype, other):
    a = np.random.default_rng(0).normal(size=(50, 32)).astype(dtype)
    b = (a * other).astype(dtype)
    assert len(set((a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1))) > 1
    rows = [{"sentence1": ("a", i), "sentence2": ("b", i), "label": i % 2} for i in range(50)]
    rows = [row | {"score": row["label"]} for row in rows]

    def vectors(names):
        return np.stack([{"a": a, "b": b}[which][i] for which, i in names])

    for kind in ("AP", "Spearman"):
        assert np.isnan(evaluation.score({"kind": kind, "test": rows}, "mine", vectors))
    b[7] *= 1 + 0.01 * np.arange(32)  # one of them is not
    for kind in ("AP", "Spearman"):
        assert np.isfinite(evaluation.score({"kind": kind, "test": rows}, "mine", vectors))


# -------------------------------------------------------------------------------- the whole script
def by_transformers(bert, text):
    """Mean pooling of one sentence, by transformers alone."""
    model, tokenizer = AutoModel.from_pretrained(bert).eval(), AutoTokenizer.from_pretrained(bert)
    with torch.no_grad():
        return model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0].mean(0).numpy()


def test_scores_equal_an_independent_path(folder, bert, tmp_path, capsys):
    flags = ["--pooling", "mean", "--batch_size", 7, "--json", tmp_path / "scores.json"]
    run(bert, "--data", folder, *flags)
    scores = json.loads((tmp_path / "scores.json").read_text())[str(bert)]
    table = capsys.readouterr().out

    known = {text: by_transformers(bert, text) for text in SENTENCES}
    a, b = (np.stack([known[pair[key]] for pair in PAIRS]) for key in ("sentence1", "sentence2"))
    cosines = (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)
    ranks = rankdata(cosines), rankdata([i % 6 for i in range(40)])
    train, test = TEXTS[::2], TEXTS[1::2]
    x, y = ([known[row["text"]] for row in rows] for rows in (train, test))
    fitted = LogisticRegression(max_iter=5000).fit(x, [row["label"] for row in train])
    predicted, gold = fitted.predict(y), [row["label"] for row in test]
    expected = {
        "emotion": 100 * f1_score(gold, predicted, average="macro"),
        "mrpc": 100 * average_precision_score([i % 2 for i in range(40)], cosines),
        "stsb": 100 * pearsonr(*ranks).statistic,
    }
    expected["avg_in"] = (expected["emotion"] + expected["stsb"]) / 2
    expected["avg_out"] = expected["mrpc"]
    expected["avg"] = sum(expected[task] for task in ("emotion", "mrpc", "stsb")) / 3
    assert list(scores) == list(expected) and scores == pytest.approx(expected, abs=0.02)

    lines = table[table.index("| model") :].split("\n")
    header, line = ([cell.strip() for cell in lines[i].split("|")[1:-1]] for i in (0, 2))
    assert header == ["model", "emotion*", "mrpc", "stsb*", "Avg-In*", "Avg-Out", "Avg"]
    assert line == [str(bert), *(f"{value:.2f}" for value in scores.values())]
    assert table.endswith("F1: emotion; AP: mrpc; Spearman: stsb; * in-domain\n")


def test_each_distinct_sentence_is_embedded_once(folder, bert, monkeypatch):
    seen, tokenize = [], evaluation.tokenize

    def watched(encoder, texts):
        seen.extend(texts)
        return tokenize(encoder, texts)

    monkeypatch.setattr(evaluation, "tokenize", watched)
    run(bert, "--data", folder)
    assert len(seen) == len(set(seen)) and set(seen) == set(SENTENCES)


def test_several_models_share_one_table(folder, bert, capsys, tmp_path):
    write(folder / "corpus.jsonl", [{"text": text} for text in SENTENCES])
    flags = ["--data", folder, "--tasks", "mrpc,emotion", "--json", tmp_path / "s.json"]
    run(bert, "lsa", "tiny", *flags)
    lines = [line.split(" | ")[0].strip("| ") for line in capsys.readouterr().out.splitlines()]
    names = [str(bert), "lsa", "tiny"]
    assert [name for name in lines if name in names] == names
    scores = json.loads((tmp_path / "s.json").read_text())
    assert list(scores) == names
    assert list(scores["tiny"]) == ["emotion", "mrpc", "avg_in", "avg_out", "avg"]


def test_tasks_json_names_the_in_domain_tasks_and_other_kinds_follow_table_1(folder, capsys):
    (folder / "tasks.json").write_text('{"in_domain": ["mrpc"]}')
    write(folder / "a/test.jsonl", [p | {"score": i} for i, p in enumerate(PAIRS)])
    write(folder / "b/test.jsonl", [p | {"label": i % 2} for i, p in enumerate(PAIRS)])
    tasks, in_domain = evaluation.load_tasks(str(folder), None)
    assert list(tasks) == ["emotion", "mrpc", "stsb", "b", "a"] and in_domain == ["mrpc"]
    assert list(evaluation.load_tasks(str(folder), ["stsb", "emotion"])[0]) == ["emotion", "stsb"]


def test_a_mean_over_no_task_is_no_number(folder, tmp_path, bert, capsys):
    run(bert, "--data", folder, "--tasks", "mrpc", "--json", tmp_path / "s.json")
    scores = json.loads((tmp_path / "s.json").read_text())[str(bert)]
    assert scores["avg_in"] is None and scores["avg_out"] == scores["avg"] == scores["mrpc"]
    assert " – | " in capsys.readouterr().out


# ----------------------------------------------------------------------------------------- the Hub
WHERE = {  # the paper's nine benchmarks: id, configuration, revision; by hand, from their pages
    "banking77": ("mteb/banking77", None, "18072d2685ea682290f7b8924d94c62acc19c0b2"),
    "tweet": ("mteb/tweet_sentiment_extraction", None, "7261898ee3b9a739595e8dbf41df6b2332f429bb"),
    "emotion": ("mteb/emotion", None, "13535ec7ed83ac3920c40db3c3fd4133af55cc06"),
    "mrpc": ("nyu-mll/glue", "mrpc", None),
    "scitail": ("allenai/scitail", "tsv_format", None),
    "wic": ("Deehan1866/WiC", None, None),
    "sick": ("RobZamp/sick", None, "refs/convert/parquet"),
    "sts12": ("mteb/sts12-sts", None, "a0d554a64d88156834ff5ae9920b964011b16384"),
    "stsb": ("mteb/stsbenchmark-sts", None, "b0fddb56ed78048fa8b90373c8a3cfc37b684831"),
}
ROWS = {  # their columns, two rows of each, and what eval.py is to make of the first
    "banking77": [{"text": "a", "label": 11, "label_text": "x"}, {"text": "b", "label": 3}],
    "tweet": [{"id": "7", "text": "a", "label": 0, "label_text": "x"}, {"text": "b", "label": 2}],
    "emotion": [{"text": "a", "label": 4, "label_text": "x"}, {"text": "b", "label": 0}],
    "mrpc": [{"sentence1": "a", "sentence2": "b", "label": 1, "idx": 0},
             {"sentence1": "c", "sentence2": "d", "label": 0, "idx": 1}],
    "scitail": [{"premise": "a", "hypothesis": "b", "label": "entails"},
                {"premise": "c", "hypothesis": "d", "label": "neutral"}],
    "wic": [{"word": "x", "sentence1": "a", "sentence2": "b", "label": 1},
            {"word": "x", "sentence1": "c", "sentence2": "d", "label": 0}],
    "sick": [{"id": 1, "sentence_A": "a", "sentence_B": "b", "relatedness_score": 4.5, "label": 1},
             {"id": 2, "sentence_A": "c", "sentence_B": "d", "relatedness_score": 2.0, "label": 0}],
    "sts12": [{"sentence1": "a", "sentence2": "b", "score": 4.5},
              {"sentence1": "c", "sentence2": "d", "score": 2.0}],
    "stsb": [{"split": "test", "sentence1": "a", "sentence2": "b", "score": 4.5},
             {"split": "test", "sentence1": "c", "sentence2": "d", "score": 2.0}],
}  # fmt: skip
CLASSIFIED, SIMILAR = {"banking77": 11, "tweet": 0, "emotion": 4}, ["sick", "sts12", "stsb"]
FIRST = {name: {"text": "a", "label": label} for name, label in CLASSIFIED.items()}
PAIRED = {"sentence1": "a", "sentence2": "b"}
FIRST |= {name: PAIRED | {"label": 1} for name in ("mrpc", "scitail", "wic")}
FIRST |= {name: PAIRED | {"score": 4.5} for name in SIMILAR}


def repository(folder, task, config):
    """A folder laid out as the benchmark's repository: its splits as parquet files."""
    names = {key: None for row in ROWS[task] for key in row}
    rows = [names | row for row in ROWS[task]]
    place = "default/{}/0000" if task == "sick" else f"{config or 'data'}/{{}}-00000-of-00001"
    files = {split: f"{place.format(split)}.parquet" for split in ("train", "validation", "test")}
    for split, file in files.items():
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        marked = [{k: f"{v}" if v != "a" else "a" for k, v in row.items()} for row in rows]
        wrong = marked if split == "validation" else rows  # which eval.py is not to read
        datasets.Dataset.from_list(wrong).to_parquet(str(folder / file))
    if config:
        paths = "".join(f"\n  - split: {s}\n    path: {file}" for s, file in files.items())
        other = "\n- config_name: another\n  data_files: nowhere.parquet"
        configs = f"configs:\n- config_name: {config}\n  data_files:{paths}{other}"
        (folder / "README.md").write_text(f"---\n{configs}\n---\n")
    return folder


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """The nine repositories in local folders; a list of what load_dataset was asked for."""
    asked, load = [], datasets.load_dataset
    ids = {where[0]: task for task, where in WHERE.items()}

    def from_folder(name, config=None, split=None, revision=None):
        asked.append((name, config, split, revision))
        place = tmp_path / name
        if not place.exists():
            repository(place, ids[name], config)
        return load(str(place), config, split=split, cache_dir=str(tmp_path / "cache"))

    monkeypatch.setattr(datasets, "load_dataset", from_folder)
    return asked


def test_section_4_1_the_nine_benchmarks_load_from_their_layouts(hub):
    tasks, in_domain = evaluation.load_tasks("hub", None)
    assert list(tasks) == list(WHERE)  # Table 1's order
    assert [task["kind"] for task in tasks.values()] == ["F1"] * 3 + ["AP"] * 3 + ["Spearman"] * 3
    assert in_domain == ["emotion", "wic", "stsb"]
    of_test = [(name, config, "test", revision) for name, config, revision in WHERE.values()]
    classified = [WHERE[task] for task in ("banking77", "tweet", "emotion")]
    of_train = [(name, config, "train", revision) for name, config, revision in classified]
    assert sorted(hub, key=str) == sorted(of_test + of_train, key=str)
    for name, task in tasks.items():
        assert task["test"][0] == FIRST[name] and len(task["test"]) == 2
        assert ("train" in task) == (task["kind"] == "F1")
    assert [row["label"] for row in tasks["scitail"]["test"]] == [1, 0]  # entails, neutral


CHANGED = [  # a benchmark's rows, and words of the answer
    (
        "mrpc",
        [{"first": "a", "sentence2": "b", "label": 1}],
        ["nyu-mll/glue", "sentence1", "first"],
    ),
    ("scitail", [ROWS["scitail"][0] | {"label": "maybe"}], ["allenai/scitail", "maybe", "entails"]),
    ("mrpc", [row | {"label": -1} for row in ROWS["mrpc"]], ["mrpc", "0 or 1", "-1"]),
]


@pytest.mark.parametrize("task, rows, words", CHANGED)
def test_a_benchmark_that_changed_is_one_line(
    hub, task, rows, words, monkeypatch, ends_with_one_line
):
    monkeypatch.setitem(ROWS, task, rows)
    ends_with_one_line(lambda: evaluation.load_tasks("hub", [task]), *words)


def test_appendix_d_the_paper_corpus(monkeypatch):
    def many(name, config=None, split=None, revision=None):
        n = {"mteb/emotion": 5600, "Deehan1866/WiC": 2700, "mteb/stsbenchmark-sts": 2600}[name]
        assert split == "train" and (name, config, revision) in WHERE.values()
        kind, numbers = name[-3:], range(n)
        pairs = {f"sentence{side}": [f"{kind} {i} {side}" for i in numbers] for side in (1, 2)}
        columns = {"text": [f"{kind} {i}" for i in numbers]} if kind == "ion" else pairs
        label = "score" if kind == "sts" else "label"
        return datasets.Dataset.from_dict(columns | {label: [i % 2 for i in numbers]})

    monkeypatch.setattr(datasets, "load_dataset", many)
    sentences, sources = tables.read_corpus("paper", 0)
    assert sources == ["emotion"] * 5000 + ["wic"] * 5000 + ["stsb"] * 5000
    assert len(set(sentences)) == 15_000
    numbers = [int(text.split()[1]) for text in sentences[:5000]]
    assert max(numbers) > 5500 and numbers != sorted(numbers)  # drawn from all of them
    for first, second in zip(sentences[5000::2], sentences[5001::2]):  # both sides of a pair
        assert first[-2:] == " 1" and second == first[:-1] + "2"
    assert {text[:3] for text in sentences[10_000:]} == {"sts"}
    assert tables.read_corpus("paper", 0) == (sentences, sources)
    assert tables.read_corpus("paper", 1)[0] != sentences


def test_without_a_network_one_line_says_so(ends_with_one_line):
    flags = ["lsa", "--data", "hub", "--tasks", "stsb"]
    ends_with_one_line(lambda: run(*flags), "stsb", "mteb/stsbenchmark-sts", "--data DIR")
    from cache_teacher import main

    ends_with_one_line(lambda: main(["--corpus", "paper"]), "mteb/emotion")


# ---------------------------------------------------------------------------------------- mistakes
P, Q = {"sentence1": "the cook", "sentence2": "the boat"}, {"sentence1": "a", "sentence2": "b"}
BOTH = [{"text": "a", "label": 0}, {"text": "b", "label": 1}]
TASKS = {  # a mistake: (test, train, words of the answer); None: no such file
    "no row": ([], None, ["task", "no row"]),
    "no test": (None, None, ["test.jsonl", "No such file"]),
    "no kind": ([P | {"labels": 1}], None, ["sentence1,sentence2,label", "labels"]),
    "two kinds": ([P | {"label": 1, "score": 0.3}], None, ["one kind", "label,score"]),
    "three kinds": ([P | {"label": 1, "score": 0.3, "text": "a"}], None, ["one kind"]),
    "labels": ([P | {"label": 1}, P | {"label": 2}], None, ["0 or 1", "2"]),
    "half a label": ([P | {"label": 0.5}, P | {"label": 0}], None, ["0 or 1", "0.5"]),
    "one label": ([P | {"label": 1}, Q | {"label": 1}], None, ["same label"]),
    "a label short": ([P | {"label": 1}, P], None, ["row 2", "label"]),
    "a word": ([P | {"label": "yes"}, P | {"label": 0}], None, ["row 1", "label"]),
    "nan": ([P | {"score": 1}, P | {"score": float("nan")}], None, ["row 2", "score"]),
    "inf": ([P | {"score": 1}, P | {"score": float("inf")}], None, ["row 2", "score"]),
    "huge": ([P | {"score": 1}, P | {"score": 10**400}], None, ["row 2", "score"]),
    "one score": ([P | {"score": 2}, Q | {"score": 2}], None, ["same score"]),
    "alike": ([P | {"score": 1}, P | {"score": 2}], None, ["no score", "all the same"]),
    "itself": ([dict.fromkeys(P, text) | {"score": i} for i, text in enumerate(SENTENCES)], None,
               ["no score", "all the same"]),
    "no columns": (["text"], None, ["line 1"]),
    "no text": ([{"text": None, "label": 0}, BOTH[1]], BOTH, ["row 1", "text"]),
    "no train": (BOTH, None, ["train.jsonl", "No such file"]),
    "empty train": (BOTH, [], ["train", "no row"]),
    "one in train": (BOTH[:1] * 2, BOTH[:1] * 2, ["same label"]),
    "unseen": ([BOTH[0], {"text": "b", "label": 7}], BOTH, ["train lacks", "7"]),
    "other train": (BOTH, [P | {"label": 0}, P | {"label": 1}], ["columns of test"]),
    "mixed": ([{"text": "a", "label": 1}, {"text": "b", "label": "1"}], BOTH, ["one way"]),
    "mixed train": (BOTH, [*BOTH, {"text": "c", "label": "1"}], ["one way"]),
    "float label": ([{"text": "a", "label": 1.0}], BOTH, ["row 1", "label"]),
    "list label": ([{"text": "a", "label": [1]}], BOTH, ["row 1", "label"]),
    "half a character": ('{"text": "\\ud800", "label": 1}\n', BOTH, ["line 1", "surrogates"]),
    "digits": ('{"text": "a", "label": %s}\n' % ("9" * 5000), BOTH, ["line 1", "digits"]),
    "deep": ("[" * 100_000, BOTH, ["line 1", "recursion"]),
    "torn": ('{"text": "a", "label": 1}\n{"text', BOTH, ["line 2"]),
}  # fmt: skip


@pytest.mark.parametrize("test, train, words", TASKS.values(), ids=TASKS)
def test_a_mistake_in_a_task_is_one_line(tmp_path, bert, test, train, words, ends_with_one_line):
    (tmp_path / "data" / "task").mkdir(parents=True)
    for split, rows in (("test", test), ("train", train)):
        if rows is not None:
            write(tmp_path / "data" / "task" / f"{split}.jsonl", rows)
    ends_with_one_line(lambda: run(bert, "--data", tmp_path / "data"), *words)


FLAGS = [
    (["--data", "nowhere"], ["nowhere", "demo", "hub"]),
    (["--tasks", "topics,topix"], ["topix", "topics"]),
    (["--tasks", ""], ["no task", "captions"]),
    (["--batch_size", "0"], ["--batch_size"]),
    (["--pooling", "max"], ["--pooling", "cls"]),
    (["--json", "no/such/folder/s.json"], ["folder"]),
    (["--json", "."], ["--json"]),
    (["--tables"], ["--tables"]),
    (["no/such/model", "--tasks", "captions"], ["no/such/model"]),
    (["--device", "quantum", "--tasks", "captions"], ["--device quantum"]),
    (["--device", "cuda", "--tasks", "captions"], ["--device cuda"]),
]


@pytest.mark.parametrize("flags, words", FLAGS)
def test_a_mistake_on_the_command_line_is_one_line(flags, words, ends_with_one_line):
    ends_with_one_line(lambda: run("lsa", *flags), *words)


def test_max_length_cuts_what_a_model_reads(folder, bert, capsys):
    run(bert, "--data", folder, "--tasks", "stsb")
    assert "cut after" not in capsys.readouterr().out
    run(bert, "--data", folder, "--tasks", "stsb", "--max_length", 5)
    assert "cut after 5 tokens" in capsys.readouterr().out


def test_a_column_of_another_kind_is_not_read(folder, bert, tmp_path):
    """A pair with a text that is none: only what the task's kind needs is embedded."""
    before, after = tmp_path / "before.json", tmp_path / "after.json"
    run(bert, "--data", folder, "--tasks", "stsb", "--json", before)
    path = folder / "stsb" / "test.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    write(path, [row | {"text": ["of", "no", "kind"]} for row in rows])
    run(bert, "--data", folder, "--tasks", "stsb", "--json", after)
    assert before.read_text() == after.read_text()


TASKS_JSON = ["[", "[]", "{}", "null", '{"in_domain": "stsb"}', '{"in_domain": [1]}', "[" * 100_000]
TASKS_JSON += ['{"in_domain": [["mrpc"]]}', '{"in_domain": ["other"]}', '{"in_domain": null}']


@pytest.mark.parametrize("text", TASKS_JSON)
def test_a_tasks_json_that_is_not_understood_is_one_line(folder, text, ends_with_one_line):
    (folder / "tasks.json").write_text(text)
    ends_with_one_line(lambda: run("lsa", "--data", folder), "tasks.json", "in_domain")


@pytest.mark.parametrize("name", ["lsa", "tiny"])
def test_what_is_made_of_the_demo_is_refused_with_other_data(folder, name, ends_with_one_line):
    words = [f"{name} belongs to the demo", "corpus.jsonl"]
    ends_with_one_line(lambda: run(name, "--data", folder), *words)


def test_embeddings_that_are_not_a_number_are_one_line(
    folder, bert, monkeypatch, ends_with_one_line
):
    model = AutoModel.from_pretrained(bert)
    model.encoder.layer[2].output.LayerNorm.weight.data.fill_(float("nan"))
    model.save_pretrained(bert)
    ends_with_one_line(lambda: run(bert, "--data", folder), str(bert), "not a number")
    monkeypatch.setattr(evaluation, "load_encoder", lambda *_, **__: None)
    monkeypatch.setattr(evaluation, "tokenize", lambda encoder, texts: texts)
    nans = torch.full((1, 3), torch.nan)
    monkeypatch.setattr(evaluation, "encode", lambda _, texts, *__: nans.repeat(len(texts), 1))
    ends_with_one_line(lambda: run(bert, "--data", folder), "emotion", "not a number")


def test_a_logistic_regression_that_does_not_converge_says_so_once(capsys):
    rng = np.random.default_rng(0)
    train, labels = 1e4 * rng.normal(size=(400, 60)) ** 3, rng.integers(0, 9, 400)
    evaluation.macro_f1(train, labels, train, labels, "mine", iterations=3)
    assert len(capsys.readouterr().out.splitlines()) == 1


# ----------------------------------------------------------------------------- --json, whole or not
def test_json_is_written_whole_or_not_at_all(
    folder, bert, tmp_path, monkeypatch, ends_with_one_line
):
    flags = [bert, "--data", folder, "--json", tmp_path / "s.json"]
    run(*flags)
    before = (tmp_path / "s.json").read_bytes()

    def torn(path, text, **_):
        path.write_bytes(text.encode()[:40])
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr("pathlib.Path.write_text", torn)
    ends_with_one_line(lambda: run(*flags, "--tasks", "mrpc"), "s.json", os.strerror(28))
    assert (tmp_path / "s.json").read_bytes() == before
    assert not list(tmp_path.glob("s.json.*"))


def test_a_model_that_fails_loses_no_other_ones_scores(folder, bert, tmp_path, capsys):
    with pytest.raises(SystemExit):
        run(bert, "no/such-model", "--data", folder, "--json", tmp_path / "s.json")
    assert list(json.loads((tmp_path / "s.json").read_text())) == [str(bert)]
    assert f"| {bert}" in capsys.readouterr().out


NO_SCORES = ["hello", "[1]", "null", '{"a": 1}', '{"a": {}}', '{"a": {"avg": 0}, "b": 1}']
NO_SCORES += ["[" * 100_000]


@pytest.mark.parametrize("content", NO_SCORES)
def test_json_replaces_nothing_but_scores(folder, bert, tmp_path, content, ends_with_one_line):
    (tmp_path / "mine.json").write_text(content)
    flags = [bert, "--data", folder, "--json", tmp_path / "mine.json"]
    ends_with_one_line(lambda: run(*flags), "mine.json", "--json")
    assert (tmp_path / "mine.json").read_text() == content


# ---------------------------------------------------------------------------------------- the demo
NAMES = ["topics", "paraphrases", "captions", "new-topics", "new-paraphrases", "new-captions"]


def demo(name):
    """The rows of one of the demo's files."""
    return [json.loads(line) for line in (ROOT / "demo" / name).read_text("utf-8").splitlines()]


def texts(name):
    """The sentences of a task's test split."""
    columns = ("text", "sentence1", "sentence2")
    return [row[c] for row in demo(f"{name}/test.jsonl") for c in columns if c in row]


def test_the_demo_is_what_its_generator_writes(tmp_path):
    spec = importlib.util.spec_from_file_location("generate", ROOT / "demo" / "generate.py")
    generate = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(generate)
    generate.main(tmp_path)
    written = [path.relative_to(tmp_path) for path in tmp_path.rglob("*.json*")]
    assert len(written) == 10
    for path in written:
        assert (tmp_path / path).read_bytes() == (ROOT / "demo" / path).read_bytes(), path


def test_the_demo_shares_words_but_no_sentence_with_its_tasks():
    corpus = [row["text"] for row in demo("corpus.jsonl")]
    words = CountVectorizer(token_pattern=r"\w+")
    vocabulary = set(words.fit(corpus).vocabulary_)
    assert len(corpus) == len(set(corpus)) == 6000
    for name in NAMES:
        assert not set(corpus) & set(texts(name))
        assert set(words.fit(texts(name)).vocabulary_) <= vocabulary, name


@pytest.mark.parametrize("name", NAMES)
def test_word_overlap_alone_scores_poorly(name):
    task = evaluation.load_tasks("demo", [name])[0][name]
    bag = CountVectorizer(token_pattern=r"\w+").fit(texts(name))
    score = evaluation.score(task, name, lambda t: bag.transform(t).toarray().astype(float))
    assert score < {"F1": 80, "AP": 65, "Spearman": 30}[task["kind"]]


def test_the_three_commands_in_a_process_of_their_own_with_a_terminal_of_ascii(tmp_path):
    """A smaller demo, run as scripts are; ASCII knows no dash."""
    lines = (ROOT / "demo" / "corpus.jsonl").read_text("utf-8").splitlines()
    chosen = random.Random(0).sample(lines, 500)
    (tmp_path / "corpus.jsonl").write_text("\n".join(chosen), encoding="utf-8")
    each = "import runpy, sys\nfor line in sys.argv[1:]:\n    sys.argv = line.split()\n"
    each += "    runpy.run_path(sys.argv[0], run_name='__main__')"
    scripts = ["cache_teacher.py --corpus corpus.jsonl", "talas.py --pooling mean --epochs 2"]
    scripts += ["eval.py lsa student --tasks captions --json scores.json"]
    command = [sys.executable, "-c", each, *(f"{ROOT}/{script}" for script in scripts)]
    environment = {"PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "ascii", "OMP_NUM_THREADS": "1"}
    about = {"cwd": tmp_path, "env": os.environ | environment, "text": True}
    done = subprocess.run(command, capture_output=True, **about)
    assert done.returncode == 0 and not done.stderr, done.stderr
    assert "| student |" in done.stdout and " ? | " in done.stdout
    scores = json.loads((tmp_path / "scores.json").read_text())
    assert scores["student"]["avg"] > 20  # untrained: 10
    names = {"corpus.jsonl", "teacher.pt", "student", "scores.json"}
    assert {path.name for path in tmp_path.iterdir()} == names
