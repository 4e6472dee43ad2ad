"""eval.py and the demo: against scipy, scikit-learn and transformers used directly, and by hand."""

import json
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from conftest import ROOT, SENTENCES, alone, put, small_bert
from scipy.stats import pearsonr, rankdata
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import f1_score
from test_cache_teacher import batches

import eval as evaluation
from demo import generate
from demo.tiny import tiny_student
from support.data import read_corpus


def run(*flags):
    """What eval.py writes to its --json file."""
    evaluation.main([*map(str, flags), "--json", "scores.json"])
    return json.loads(Path("scores.json").read_text())


PAIRS = [{"sentence1": SENTENCES[i], "sentence2": SENTENCES[(7 * i + 1) % 48]} for i in range(40)]
TASKS = {
    "stsb": [pair | {"score": i % 6 / 2} for i, pair in enumerate(PAIRS)],
    "mrpc": [pair | {"label": int(i % 5 == 0)} for i, pair in enumerate(PAIRS)],
    "emotion": [{"text": text, "label": text.split()[1]} for text in SENTENCES],
    "a-task": [{"text": text, "label": 10 * len(text.split()[1])} for text in SENTENCES],
}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder with jsonl/ and csv/, each of which has the tasks, and two folders that are none."""
    monkeypatch.chdir(tmp_path)
    for name, rows in TASKS.items():
        splits = {"train": rows[::2], "test": rows[1::2]} if "text" in rows[0] else {"test": rows}
        for split, part in splits.items():
            table = [list(part[0]), *(map(str, row.values()) for row in part)]
            put(f"jsonl/{name}", {f"{split}.jsonl": part})
            put(f"csv/{name}", {f"{split}.csv": "\n".join(map(",".join, table))})
    put(tmp_path, dict.fromkeys(("csv/_notes/x", "csv/.cache/x", "jsonl/_notes/x"), ""))
    put(tmp_path, {"jsonl/mrpc/test.csv": "of the two test.jsonl is read"})
    return tmp_path


# ------------------------------------------------------------------------------------- the metrics
def test_cosines_are_ranked_as_scipy_and_scikit_learn_rank_them():
    rng = np.random.default_rng(0)
    a, b = 1e-4 * rng.normal(size=(2, 60, 5)).astype("float32")  # short vectors
    gold, labels = rng.integers(0, 6, 60), rng.random(60) < 0.15
    cosines = [u @ v / (u @ u) ** 0.5 / (v @ v) ** 0.5 for u, v in zip(a.astype(float), b)]
    np.testing.assert_allclose(evaluation.cosine(a, b), cosines, rtol=1e-6)
    expected = 100 * pearsonr(rankdata(cosines), rankdata(gold)).statistic
    assert evaluation.spearman(a, b, gold) == pytest.approx(expected)
    hits = labels[np.argsort(cosines)[::-1]]
    expected = 100 * np.mean((hits.cumsum() / np.arange(1, 61))[hits])
    assert evaluation.average_precision(a, b, labels) == pytest.approx(expected)
    assert evaluation.cosine(0 * a, b).tolist() == [0.0] * 60


def test_macro_f1_of_unlike_classes_and_vectors_as_they_are(capsys):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(300, 4)) * [50, 1, 1, 0.02]  # neither normalised nor standardised
    y = np.where(x[:, 1] + 30 * x[:, 3] > 1, "few", np.where(x[:, 2] > 0, "some", "more"))
    split = x[:200], y[:200], x[200:], y[200:]
    found, gold = LogisticRegression(max_iter=1000).fit(*split[:2]).predict(x[200:]), y[200:]
    expected = 100 * np.mean(f1_score(gold, found, average=None))
    assert evaluation.macro_f1(*split) == pytest.approx(expected) and not capsys.readouterr().out
    assert abs(expected - 100 * np.mean(found == gold)) > 1
    evaluation.macro_f1(*split, "mine", iterations=2)
    assert capsys.readouterr().out.startswith("mine: the logistic regression stopped unconverged")


def test_labels_are_numbers_if_all_are_and_else_text():
    for labels, expected in ((["10", 9, "9.0"], [10, 9, 9]), ([10, "nan"], ["10", "nan"])):
        rows = [{"text": "a", "label": label} for label in labels]
        task = evaluation.load_task("mine", lambda name, split, rows=rows: [*map(dict, rows)])
        assert [row["label"] for row in task["test"]] == expected


# -------------------------------------------------------------------------------- the whole script
def by_hand(bert):
    """The scores of mean pooling: by transformers, a sentence at a time, without dropout."""
    known, scores = dict(zip(SENTENCES, alone(bert, "mean", SENTENCES).numpy())), {}
    for task in ("emotion", "a-task"):
        x, y = zip(*[(known[row["text"]], row["label"]) for row in TASKS[task]])
        scores[task] = evaluation.macro_f1(x[::2], y[::2], x[1::2], y[1::2])
    a, b = (np.stack([known[pair[key]] for pair in PAIRS]) for key in ("sentence1", "sentence2"))
    gold = [row["score"] for row in TASKS["stsb"]]
    scores["mrpc"] = evaluation.average_precision(a, b, [row["label"] for row in TASKS["mrpc"]])
    return scores | {"stsb": evaluation.spearman(a, b, gold)}


@pytest.mark.parametrize("kind", ["jsonl", "csv"])
def test_scores_and_averages_equal_an_independent_path(kind, folder, bert, capsys):
    with batches() as sizes:
        scores = run("bert", "--data", kind, "--pooling", "mean", "--batch_size", 16)["bert"]
    assert sum(sizes) == 48 and max(sizes) == 16  # each distinct sentence once
    expected = by_hand(bert)
    expected["avg_in"] = (expected["emotion"] + expected["stsb"]) / 2
    expected["avg_out"] = (expected["a-task"] + expected["mrpc"]) / 2
    expected["avg"] = sum(expected[task] for task in TASKS) / 4
    assert scores == pytest.approx(expected, abs=0.02)
    assert list(scores) == ["emotion", "mrpc", "stsb", "a-task", "avg_in", "avg_out", "avg"]
    header, _, line = (x.split() for x in capsys.readouterr().out.splitlines() if x[:1] == "|")
    assert header[3::2] == ["emotion*", "mrpc", "stsb*", "a-task", "Avg-In*", "Avg-Out", "Avg"]
    assert line[3::2] == [f"{value:.2f}" for value in scores.values()]


def test_each_model_has_its_pooling_and_one_that_fails_costs_no_other_its_row(folder, bert, capsys):
    small_bert("other", seed=1)
    flags = ["--data", "jsonl", "--tasks", "mrpc,emotion", "--pooling"]
    alone = run("bert", *flags, "mean") | run("other", *flags, "cls")
    with pytest.raises(SystemExit) as stopped:
        run("bert", "no/model", "other", *flags, "mean,auto,cls")
    out, err = capsys.readouterr()
    assert stopped.value.code == 2
    assert err.splitlines()[-1] == "error: no scores of no/model; the reason stands above"
    assert json.loads(Path("scores.json").read_text()) == alone and list(alone) == ["bert", "other"]
    assert [line[:8] for line in out.splitlines()[-4:-2]] == ["| bert  ", "| other "]


def test_tasks_json_names_the_in_domain_tasks_and_no_task_has_no_mean(folder, bert, capsys):
    put(folder, {"jsonl/tasks.json": {"in_domain": ["mrpc"]}})
    scores = run("bert", "--data", "jsonl", "--tasks", "stsb,a-task")["bert"]
    assert scores["avg_in"] is None and " – | " in capsys.readouterr().out
    assert scores["avg"] == scores["avg_out"] == (scores["stsb"] + scores["a-task"]) / 2
    run("bert", "--data", "jsonl", "--max_length", 5)
    out = capsys.readouterr().out
    assert "48 of 48 sentences are cut after 5 tokens" in out
    header = next(line for line in out.splitlines() if "| model" in line).split()
    assert header[1:9:2] == ["model", "emotion", "mrpc*", "stsb"]


# ----------------------------------------------------------------------------------------- the Hub
HUB = {  # from their pages, in Table 1's order: id, configuration, revision
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
TEXT, PAIR = {"text": ["a", "c"], "id": [7, 8]}, {"sentence1": ["a", "c"], "sentence2": ["b", "d"]}
LABEL, SCORE = {"label": [1, 0]}, {"score": [4.5, 2.0]}
THEIRS = dict.fromkeys(("banking77", "tweet", "emotion"), TEXT | LABEL)
THEIRS |= {"mrpc": PAIR | LABEL, "wic": PAIR | LABEL, "sts12": PAIR | SCORE, "stsb": PAIR | SCORE}
THEIRS["scitail"] = {"premise": [*"ac"], "hypothesis": [*"bd"], "label": ["entails", "neutral"]}
THEIRS["sick"] = {"sentence_A": [*"ac"], "sentence_B": [*"bd"], "relatedness_score": [4.5, 2.0]}
THEIRS["sick"] |= {"entailment_AB": ["x", "y"]} | LABEL


def test_section_4_1_the_nine_benchmarks_load_from_their_layouts(monkeypatch, ends_with_one_line):
    asked, names = [], {where[0]: task for task, where in HUB.items()}

    def load(name, config=None, split=None, revision=None):
        asked.append((names[name], split))
        assert HUB[names[name]] == (name, config, revision)
        return datasets.Dataset.from_dict(THEIRS[names[name]])

    monkeypatch.setattr(datasets, "load_dataset", load)
    tasks, in_domain = evaluation.load_tasks("hub", None)
    assert list(tasks) == list(HUB) and in_domain == ["emotion", "wic", "stsb"]
    for number, (name, task) in enumerate(tasks.items()):
        rows = [{"sentence1": a, "sentence2": b} for a, b in ("ab", "cd")]
        rows = [{"text": text} for text in "ac"] if number < 3 else rows
        values = [{"label": 1}, {"label": 0}] if number < 6 else [{"score": 4.5}, {"score": 2.0}]
        assert task["test"] == [row | value for row, value in zip(rows, values)]
        splits = ["test", "train"] if number < 3 else ["test"]
        assert [split for task, split in asked if task == name] == splits
    monkeypatch.setitem(THEIRS["scitail"], "label", ["entails", "maybe"])
    ends_with_one_line(lambda: evaluation.load_tasks("hub", ["scitail"]), "scitail", "maybe")
    monkeypatch.undo()  # without a network
    ends_with_one_line(lambda: evaluation.load_tasks("hub", ["stsb"]), "mteb/stsb", "offline")


def test_appendix_d_the_paper_corpus(monkeypatch):
    def many(name, config=None, split=None, revision=None):
        n = {"mteb/emotion": 5600, "Deehan1866/WiC": 2700, "mteb/stsbenchmark-sts": 2600}[name]
        assert split == "train" and (name, config, revision) in HUB.values()
        kind, columns = name[-3:], ["text"] if "emotion" in name else ["sentence1", "sentence2"]
        rows = {column: [f"{kind} {i} {column[-1]}" for i in range(n)] for column in columns}
        rows |= {"label": [i % 2 for i in range(n)], "score": [0.5] * n}
        return datasets.Dataset.from_dict(rows)

    monkeypatch.setattr(datasets, "load_dataset", many)
    sentences, sources = read_corpus("paper", 0)
    assert sources == ["emotion"] * 5000 + ["wic"] * 5000 + ["stsb"] * 5000
    assert [text[:3] for text in sentences[::5000]] == ["ion", "WiC", "sts"]
    assert len(set(sentences)) == 15_000
    numbers = [int(text.split()[1]) for text in sentences[:5000]]
    assert max(numbers) > 5500 and numbers != sorted(numbers)  # drawn from all of them
    assert all(b == f"{a[:-1]}2" for a, b in zip(sentences[5000::2], sentences[5001::2]))
    assert read_corpus("paper", 0)[0] == sentences != read_corpus("paper", 1)[0]


# ---------------------------------------------------------------------------------------- the demo
def test_the_demo_is_what_its_generator_writes(tmp_path):
    generate.main(tmp_path)
    written = {path.relative_to(tmp_path): path.read_bytes() for path in tmp_path.rglob("*.json*")}
    assert len(written) == 10
    assert written == {path: (ROOT / "demo" / path).read_bytes() for path in written}


def test_the_tiny_student_is_that_of_its_seed():
    state, students = torch.get_rng_state(), [tiny_student(SENTENCES, seed) for seed in (1, 1, 2)]
    assert torch.equal(torch.get_rng_state(), state)
    words = [next(student.model.parameters()) for student in students]
    assert torch.equal(words[0], words[1]) and not torch.equal(words[0], words[2])
    assert len({student.files["tokenizer.json"] for student in students}) == 1
