"""eval.py and the demo: metrics by hand, whole runs against transformers used directly."""

import json
from pathlib import Path
from unittest.mock import Mock

import datasets
import numpy as np
import pytest
import torch
from helpers import ROOT, SENTENCES, embed_alone, small_bert, write_files
from scipy.stats import spearmanr
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import average_precision_score, f1_score

import eval as evaluation
import talas
from demo import generate
from demo.tiny import tiny_student
from eval import Task
from support.data import load_hub_split, read_corpus


# ------------------------------------------------------------------------------------- the metrics
def test_pairs_of_equal_sentences_are_not_ranked_by_rounding():
    rng = np.random.default_rng(0)
    embeddings = {i: 1e-4 * rng.normal(size=64).astype("float32") for i in range(200)}
    embeddings["zero"] = np.zeros(64, "float32")  # its cosine counts as 0
    rows = [{"sentence1": i, "sentence2": i, "label": i % 2} for i in range(200)]
    rows.append({"sentence1": 0, "sentence2": "zero", "label": 0})
    # a tie of 200 pairs, half of them with label 1, before the last pair
    assert evaluation.score("mine", Task("AP", rows, []), embeddings) == 50


# --------------------------------------------------------------------------------------- the tasks
def test_numbers_are_classes_in_their_order(tmp_path):
    rows = [{"text": "a", "label": label} for label in ("10", 9, "9.0", "09")]
    write_files(tmp_path, {"mine/train.jsonl": rows, "mine/test.jsonl": rows})
    task = evaluation.load_task(tmp_path, "mine")
    assert [row["label"] for row in task.test] == [2, 1, 1, 0]  # "09" is a class of its own


# -------------------------------------------------------------------------------- the whole script
OTHERS = [(7 * i + 1) % 48 for i in range(40)]  # the second sentence of each pair
LABELS = [int(i % 5 == 0) for i in range(40)]
SCORES = [i % 6 / 2 for i in range(40)]
TOPICS = [text.split()[1] for text in SENTENCES]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The current folder; its folder data/ has three tasks, one as CSV, and files of other use."""
    monkeypatch.chdir(tmp_path)
    topics = [{"text": text, "label": label} for text, label in zip(SENTENCES, TOPICS)]
    sts = []
    csv = "id,sentence1,sentence2,label\n"
    for i, other in enumerate(OTHERS):
        pair = {"sentence1": SENTENCES[i], "sentence2": SENTENCES[other]}
        sts.append(pair | {"score": SCORES[i]})
        csv += f"{i},{SENTENCES[i]},{SENTENCES[other]},{LABELS[i]}\n"
    files = {
        "corpus.jsonl": topics,
        "_notes/x": "",
        "b-topics/train.jsonl": topics[::2],
        "b-topics/test.jsonl": topics[1:40:2],
        "stsb/test.jsonl": sts,
        "a-pairs/test.csv": csv,
    }
    write_files("data", files)
    return tmp_path


def run(*flags):
    """What eval.py writes to its --json file about the tasks in data/."""
    evaluation.main([*flags, "--data", "data", "--json", "scores.json"])
    return json.loads(Path("scores.json").read_text())


def test_scores_equal_an_independent_path(folder, bert, capsys):
    small_bert("other", seed=1)
    results = run("other", "bert")
    printed = " ".join(capsys.readouterr().out.split())
    assert "| model | stsb* | b-topics | a-pairs | Avg-In* | Avg-Out | Avg |" in printed
    for name in ("other", "bert"):
        x = embed_alone(name, "cls", SENTENCES)
        cosines = torch.cosine_similarity(x[:40], x[OTHERS]).numpy()
        classifier = LogisticRegression(max_iter=1000).fit(x[::2], TOPICS[::2])
        predicted = classifier.predict(x[1:40:2])
        stsb = 100 * spearmanr(cosines, SCORES).statistic
        topics = 100 * f1_score(TOPICS[1:40:2], predicted, average="macro")
        pairs = 100 * average_precision_score(LABELS, cosines)
        expected = {
            "stsb": stsb,
            "b-topics": topics,
            "a-pairs": pairs,
            "avg_in": stsb,
            "avg_out": (topics + pairs) / 2,
            "avg": (stsb + topics + pairs) / 3,
        }
        assert results[name] == pytest.approx(expected, abs=0.02)
        row = " | ".join(f"{score:.2f}" for score in results[name].values())
        assert f"| {name} | {row} |" in printed


@pytest.mark.parametrize("model", ["a-model", "tiny"])
def test_flags_reach_the_model(model, folder, monkeypatch):
    def load(name, pooling, max_length, device):
        return tiny_student(SENTENCES, 0, pooling, max_length, device)

    def encode(encoder, tokens, batch_size, label):
        assert encoder.pooling == "last"
        assert encoder.model.device.type == "meta"
        assert max(map(len, tokens)) == 7
        assert batch_size == 3
        sizes.append(len(tokens))
        return torch.randn(sizes[-1], 4)

    sizes = []
    monkeypatch.setattr(evaluation, "load_encoder", load)
    monkeypatch.setattr(evaluation, "encode", encode)
    flags = "--pooling last --max_length 7 --batch_size 3 --device meta"
    run(model, *flags.split())
    assert sum(sizes) == 47  # each sentence of the tasks once


def test_tiny_is_the_student_that_talas_starts_from(folder):
    args = evaluation.parse_args(["tiny", "--data", "data"])
    model = evaluation.load_model("tiny", args).model
    start = talas.load_student(talas.Settings(), SENTENCES).model
    assert torch.equal(model.pooler.dense.weight, start.pooler.dense.weight)


def test_a_mean_over_no_task_is_none(folder, bert, capsys):
    write_files("data", {"tasks.json": {"in_domain": ["a-pairs"]}})
    scores = run("bert", "--tasks", "a-pairs")["bert"]
    assert scores["avg_in"] == scores["avg"] == scores["a-pairs"]
    assert scores["avg_out"] is None
    assert " – |" in capsys.readouterr().out


@pytest.mark.parametrize(
    "error, line",
    [
        (SystemExit(2), "error: no scores for broken; see the error above"),
        (ImportError("flash_attn"), "error: no scores for broken; see the error above"),
        (KeyboardInterrupt(), "error: interrupted; the scores so far"),
    ],
)
def test_a_failure_costs_no_other_model_its_row(error, line, folder, monkeypatch, capsys):
    def load(name, *arguments, **options):
        if name == "broken":
            raise error
        return tiny_student(SENTENCES, 0)

    monkeypatch.setattr(evaluation, "load_encoder", load)
    with pytest.raises(SystemExit, match="2"):
        run("good", "broken", "--tasks", "stsb")
    printed = capsys.readouterr()
    assert printed.err.splitlines()[-1].startswith(line)
    assert "| good  |" in printed.out
    assert json.loads(Path("scores.json").read_text()).keys() == {"good"}


# ----------------------------------------------------------------------------------------- the Hub
PAIR = {"sentence1": "a", "sentence2": "b", "label": 1}
STS = {"sentence1": "a", "sentence2": "b", "score": 4.5}
SCITAIL = {"premise": "a", "hypothesis": "b", "label": "entails"}
SICK = {"sentence_A": "a", "sentence_B": "b", "relatedness_score": 4.5, "label": 1}


@pytest.mark.parametrize(
    "task, source, row, expected",
    [
        ("scitail", {"path": "allenai/scitail", "name": "tsv_format"}, SCITAIL, PAIR),
        ("sick", {"path": "RobZamp/sick", "revision": "refs/convert/parquet"}, SICK, STS),
        ("wic", {"path": "Deehan1866/WiC"}, PAIR, PAIR),
    ],
)
def test_section_4_1_the_layouts_of_the_hub(task, source, row, expected, monkeypatch):
    rows = datasets.Dataset.from_list([row | {"idx": 7}])
    load_dataset = Mock(return_value=rows)
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert load_hub_split(task, "test") == [expected]
    load_dataset.assert_called_once_with(**source, split="test")


def test_the_hub_has_the_tasks_of_table_1_in_its_order(monkeypatch):
    monkeypatch.setattr(evaluation, "load_task", lambda data, name: Task("AP", [], []))
    order = ["banking77", "tweet", "emotion", "mrpc", "scitail", "wic", "sick", "sts12", "stsb"]
    tasks, in_domain = evaluation.load_tasks("hub", order[::-1])
    assert list(tasks) == order
    assert in_domain == ["emotion", "wic", "stsb"]


def test_the_hub_without_a_network(ends_with_one_line):
    ends_with_one_line(lambda: evaluation.load_tasks("hub", ["stsb"]), "mteb/stsb", "offline")


def test_appendix_d_the_paper_corpus(monkeypatch):
    def load_dataset(path, split, **source):
        assert split == "train"
        columns = {}
        for column in ("text", "sentence1", "sentence2", "label", "score"):
            columns[column] = [f"{path} {i} {column}" for i in range(5600)]
        return datasets.Dataset.from_dict(columns)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    sentences, sources = read_corpus("paper", 0)
    assert sources == ["emotion"] * 5000 + ["wic"] * 5000 + ["stsb"] * 5000
    assert len(set(sentences)) == 15_000  # drawn without replacement
    numbers = [int(text.split()[1]) for text in sentences]
    assert max(numbers[:5000]) > 5500  # drawn from all
    assert numbers[5000::2] == numbers[5001::2]  # both sentences of a pair
    assert read_corpus("paper", 1)[0] != sentences


# ---------------------------------------------------------------------------------------- the demo
def test_the_demo_is_what_its_generator_writes(tmp_path):
    generate.main(tmp_path)
    written = list(tmp_path.rglob("*.json*"))
    assert len(written) == 10
    for path in written:
        published = ROOT / "demo" / path.relative_to(tmp_path)
        assert path.read_bytes() == published.read_bytes()
