"""eval.py and the demo: the scores against scipy and scikit-learn used directly, and against values worked out by hand."""

import importlib.util
import json
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT, SENTENCES
from scipy.stats import pearsonr, rankdata
from sklearn.feature_extraction.text import CountVectorizer

spec = importlib.util.spec_from_file_location("eval", ROOT / "eval.py")
evaluation = sys.modules["eval"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(evaluation)


def write(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def data(tmp_path):
    """A directory with one task of each kind."""
    pairs = [
        {"sentence1": SENTENCES[i], "sentence2": SENTENCES[(7 * i + 1) % 48]} for i in range(40)
    ]
    write(
        tmp_path / "data" / "stsb" / "test.jsonl",
        [pair | {"score": i % 6} for i, pair in enumerate(pairs)],
    )
    write(
        tmp_path / "data" / "mrpc" / "test.jsonl",
        [pair | {"label": i % 2} for i, pair in enumerate(pairs)],
    )
    texts = [{"text": text, "label": text.split()[1]} for text in SENTENCES]
    write(tmp_path / "data" / "emotion" / "train.jsonl", texts[::2])
    write(tmp_path / "data" / "emotion" / "test.jsonl", texts[1::2])
    return tmp_path / "data"


# ------------------------------------------------------------------------------------------------- the metrics


def test_spearman_is_the_correlation_of_the_ranks():
    rng = np.random.default_rng(0)
    a, b, gold = rng.normal(size=(30, 4)), rng.normal(size=(30, 4)), rng.integers(0, 6, 30)
    cosines = [float(u @ v / (u @ u) ** 0.5 / (v @ v) ** 0.5) for u, v in zip(a, b)]
    assert evaluation.spearman(a, b, gold) == pytest.approx(
        100 * pearsonr(rankdata(cosines), rankdata(gold)).statistic
    )


def test_average_precision_by_hand():
    a = np.array([[1.0, 0.0]] * 4)
    angles = np.array([0.1, 0.2, 0.3, 0.4])  # ranked as listed; labels 1, 0, 1, 0
    b = 7 * np.stack([np.cos(angles), np.sin(angles)], axis=1)
    assert evaluation.average_precision(a, b, [1, 0, 1, 0]) == pytest.approx(
        100 * (1 / 1 + 2 / 3) / 2
    )


def test_macro_f1_by_hand():
    train, labels = np.array([[-1.0], [-2.0], [1.0], [2.0]]), ["x", "x", "y", "y"]
    test, gold = (
        np.array([[-3.0], [-1.0], [-1.0], [3.0]]),
        ["x", "x", "y", "y"],
    )  # one y is taken for x
    assert evaluation.macro_f1(train, labels, test, gold) == pytest.approx(100 * (0.8 + 2 / 3) / 2)


def test_cosine_of_a_zero_vector_is_0():
    assert evaluation.cosine(
        np.array([[0.0, 0.0], [3.0, 4.0]]), np.array([[1.0, 2.0], [6.0, 8.0]])
    ).tolist() == [
        0.0,
        1.0,
    ]


# ------------------------------------------------------------------------------------------------- the whole script


def test_scores_equal_an_independent_path(data, bert, tmp_path, capsys):
    import torch
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import average_precision_score, f1_score
    from transformers import AutoModel, AutoTokenizer

    evaluation.main(
        [
            str(bert),
            "--data",
            str(data),
            "--json",
            str(tmp_path / "scores.json"),
            "--pooling",
            "mean",
            "--batch_size",
            "7",
        ]
    )
    scores = json.loads((tmp_path / "scores.json").read_text())[str(bert)]

    model, tokenizer = AutoModel.from_pretrained(bert).eval(), AutoTokenizer.from_pretrained(bert)

    def embed(text):
        with torch.no_grad():
            return (
                model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0].mean(0).numpy()
            )

    rows = [json.loads(line) for line in (data / "stsb" / "test.jsonl").read_text().splitlines()]
    a, b = (
        np.stack([embed(r["sentence1"]) for r in rows]),
        np.stack([embed(r["sentence2"]) for r in rows]),
    )
    cosines = (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)
    assert scores["stsb"] == pytest.approx(
        100 * pearsonr(rankdata(cosines), rankdata([r["score"] for r in rows])).statistic, abs=0.05
    )
    assert scores["mrpc"] == pytest.approx(
        100 * average_precision_score([i % 2 for i in range(40)], cosines), abs=0.05
    )
    train, test = [
        [
            json.loads(line)
            for line in (data / "emotion" / f"{split}.jsonl").read_text().splitlines()
        ]
        for split in ("train", "test")
    ]
    fitted = LogisticRegression(max_iter=5000).fit(
        np.stack([embed(r["text"]) for r in train]), [r["label"] for r in train]
    )
    predicted = fitted.predict(np.stack([embed(r["text"]) for r in test]))
    assert scores["emotion"] == pytest.approx(
        100 * f1_score([r["label"] for r in test], predicted, average="macro"), abs=0.05
    )

    assert scores["avg_in"] == pytest.approx((scores["emotion"] + scores["stsb"]) / 2)
    assert scores["avg_out"] == pytest.approx(scores["mrpc"])
    assert scores["avg"] == pytest.approx((scores["emotion"] + scores["stsb"] + scores["mrpc"]) / 3)
    table = capsys.readouterr().out.splitlines()
    header = next(line for line in table if line.startswith("| model"))
    assert [cell.strip() for cell in header.strip("|").split("|")] == [
        "model",
        "emotion*",
        "mrpc",
        "stsb*",
        "Avg-In*",
        "Avg-Out",
        "Avg",
    ]
    assert f"{scores['avg']:.2f}" in next(line for line in table if line.startswith(f"| {bert}"))


def test_each_distinct_sentence_is_embedded_once(data, bert, monkeypatch):
    seen = []
    original = evaluation.encode
    monkeypatch.setattr(
        evaluation,
        "encode",
        lambda model, tokenizer, texts, *rest: (
            seen.extend(texts) or original(model, tokenizer, texts, *rest)
        ),
    )
    evaluation.main([str(bert), "--data", str(data)])
    assert len(seen) == len(set(seen)) and set(seen) == set(SENTENCES)


def test_several_models_share_one_table(data, bert, capsys, tmp_path):
    evaluation.main(
        [
            str(bert),
            "lsa",
            "--data",
            str(data),
            "--tasks",
            "mrpc",
            "--json",
            str(tmp_path / "s.json"),
        ]
    )
    out = capsys.readouterr().out
    assert f"| {bert}" in out and "| lsa" in out
    assert json.loads((tmp_path / "s.json").read_text())["lsa"]["avg_in"] is None


def test_tasks_json_names_the_in_domain_tasks(data):
    (data / "tasks.json").write_text('{"in_domain": ["mrpc"]}')
    assert evaluation.load_tasks(str(data), None)[1] == ["mrpc"]


# ------------------------------------------------------------------------------------------------- the Hub


def hub_repository(folder, task):
    """A directory laid out as the task's repository on the Hub, with its column names and a few rows of its labels."""
    from datasets import Dataset

    source = evaluation.HUB[task]
    values = {
        "text": lambda i: SENTENCES[i],
        "label": lambda i: list(source.labels or [0, 1])[i % 2],
        "score": lambda i: i / 2,
    }
    values |= {"sentence1": lambda i: SENTENCES[i], "sentence2": lambda i: SENTENCES[i + 9]}
    column = lambda name: values.get(source.columns.get(name), lambda i: "x")
    rows = [
        {name: column(name)(i) for name in [*source.columns, "another_column"]} for i in range(12)
    ]
    pattern = (
        "default/{}/0000.parquet"
        if task == "sick"
        else (source.config or "data") + "/{}-00000-of-00001.parquet"
    )
    for split in ("train", "validation", "test"):
        (folder / pattern.format(split)).parent.mkdir(parents=True, exist_ok=True)
        Dataset.from_list(rows).to_parquet(str(folder / pattern.format(split)))
    if source.config:
        files = "".join(
            f"\n  - split: {s}\n    path: {source.config}/{s}-*"
            for s in ("train", "validation", "test")
        )
        other = "\n- config_name: another\n  data_files: nowhere.parquet"
        (folder / "README.md").write_text(
            f"---\nconfigs:\n- config_name: {source.config}\n  data_files:{files}{other}\n---\n"
        )
    return folder


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """The nine benchmarks as local directories with the layout of their repositories."""
    table = {
        task: source._replace(dataset=str(hub_repository(tmp_path / task, task)))
        for task, source in evaluation.HUB.items()
    }
    monkeypatch.setattr(evaluation, "HUB", table)


def test_section_4_1_the_nine_benchmarks_load_from_their_layouts(hub):
    tasks, in_domain = evaluation.load_tasks("hub", None)
    assert list(tasks) == [
        "banking77",
        "tweet",
        "emotion",
        "mrpc",
        "scitail",
        "wic",
        "sick",
        "sts12",
        "stsb",
    ]  # Table 1's order
    assert [task["kind"] for task in tasks.values()] == ["F1"] * 3 + ["AP"] * 3 + ["Spearman"] * 3
    assert in_domain == ["emotion", "wic", "stsb"]
    assert [row["label"] for row in tasks["scitail"]["test"][:2]] == [1, 0]  # entails, neutral
    assert tasks["sick"]["test"][3] == {
        "sentence1": SENTENCES[3],
        "sentence2": SENTENCES[12],
        "score": 1.5,
    }


def test_a_hub_dataset_that_lost_a_column(hub, monkeypatch, ends_with_one_line):
    broken = evaluation.HUB["mrpc"]._replace(
        columns={"first": "sentence1", "sentence2": "sentence2", "label": "label"}
    )
    monkeypatch.setitem(evaluation.HUB, "mrpc", broken)
    ends_with_one_line(
        lambda: evaluation.load_tasks("hub", ["mrpc"]),
        "first",
        "another_column, label, sentence1, sentence2"[:14],
    )


def test_appendix_d_the_paper_corpus(hub):
    import cache_teacher

    sentences, sources = cache_teacher.read_corpus("paper", 0)
    assert len(sentences) == len(sources) == 12 + 2 * 12 + 2 * 12  # every row of these small splits
    assert sources.count("emotion") == 12 and sources.count("wic") == sources.count("stsb") == 24
    assert (
        cache_teacher.read_corpus("paper", 0)
        == (sentences, sources)
        != cache_teacher.read_corpus("paper", 1)
    )


def test_without_a_network_one_line_says_so():
    import os

    command = [sys.executable, str(ROOT / "eval.py"), "lsa", "--data", "hub", "--tasks", "stsb"]
    done = subprocess.run(
        command, env=os.environ | {"HF_HUB_OFFLINE": "1"}, capture_output=True, text=True
    )
    assert done.returncode == 2 and len(done.stderr.strip().splitlines()) == 1, done.stderr
    assert "mteb/stsbenchmark-sts" in done.stderr and "--data DIR" in done.stderr


# ------------------------------------------------------------------------------------------------- mistakes

PAIR = {"sentence1": "a dog", "sentence2": "a cat"}
MISTAKES = [  # (task, test rows, train rows, words of the answer)
    ("mrpc", [], None, ["mrpc", "empty"]),
    ("mrpc", None, None, ["test.jsonl", "does not exist"]),
    (
        "mrpc",
        [PAIR | {"labels": 1}],
        None,
        ["sentence1,sentence2,label", "sentence1,sentence2,labels"],
    ),
    ("mrpc", [PAIR | {"label": 1}, PAIR | {"label": 2}], None, ["0 or 1", "2"]),
    ("mrpc", [PAIR | {"label": 1}, PAIR | {"label": 1}], None, ["same label"]),
    ("mrpc", [PAIR | {"label": 1}, PAIR], None, ["row 2"]),
    ("mrpc", [PAIR | {"label": "yes"}, PAIR | {"label": 0}], None, ["row 1", "label"]),
    ("stsb", [PAIR | {"score": 1}, PAIR | {"score": float("nan")}], None, ["row 2", "score"]),
    ("stsb", [PAIR | {"score": 1}, PAIR | {"score": float("inf")}], None, ["finite"]),
    ("stsb", [PAIR | {"score": 2}, PAIR | {"score": 2}], None, ["same score"]),
    ("stsb", ["text", "text"], None, ["columns"]),
    (
        "emotion",
        [{"text": "a", "label": 0}, {"text": "b", "label": 1}],
        None,
        ["train.jsonl", "does not exist"],
    ),
    ("emotion", [{"text": "a", "label": 0}, {"text": "b", "label": 1}], [], ["train", "empty"]),
    (
        "emotion",
        [{"text": "a", "label": 0}, {"text": "b", "label": 1}],
        [{"text": "a", "label": 0}] * 2,
        ["train", "same label"],
    ),
    (
        "emotion",
        [{"text": "a", "label": 0}, {"text": "b", "label": 7}],
        [{"text": "a", "label": i} for i in (0, 1)],
        ["train lacks", "7"],
    ),
    (
        "emotion",
        [{"text": "a", "label": i} for i in (0, 1)],
        [PAIR | {"label": i} for i in (0, 1)],
        ["columns of test"],
    ),
    ("emotion", [{"text": None, "label": 0}, {"text": "b", "label": 7}], None, ["row 1", "text"]),
]


@pytest.mark.parametrize("name, test, train, words", MISTAKES)
def test_a_mistake_in_a_task_is_one_line(tmp_path, name, test, train, words, ends_with_one_line):
    (tmp_path / "data" / name).mkdir(parents=True)
    for split, rows in (("test", test), ("train", train)):
        if rows is not None:
            write(tmp_path / "data" / name / f"{split}.jsonl", rows)
    ends_with_one_line(lambda: evaluation.main(["lsa", "--data", str(tmp_path / "data")]), *words)


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--data", "nowhere"], ["nowhere", "demo, hub"]),
        (["--tasks", "topics,topix"], ["topix", "topics"]),
        (["--batch_size", "0"], ["--batch_size"]),
        (["--pooling", "max"], ["--pooling", "cls"]),
        (["--json", "no/such/folder/s.json"], ["folder"]),
        (["--tables"], ["--tables"]),
        (["no/such/model", "--tasks", "captions"], ["no/such/model"]),
    ],
)
def test_a_mistake_on_the_command_line_is_one_line(flags, words, ends_with_one_line, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    ends_with_one_line(lambda: evaluation.main(flags), *words)


def test_torn_tasks_and_embeddings_without_a_score(data, bert, ends_with_one_line):
    (data / "tasks.json").write_text('{"in_domain"')
    ends_with_one_line(lambda: evaluation.main(["lsa", "--data", str(data)]), "in_domain")
    (data / "tasks.json").unlink()
    from transformers import AutoModel

    model = AutoModel.from_pretrained(bert)
    model.encoder.layer[2].output.LayerNorm.weight.data.fill_(float("nan"))
    model.save_pretrained(bert)
    ends_with_one_line(
        lambda: evaluation.main([str(bert), "--data", str(data)]), "emotion", "not a number"
    )


def test_a_logistic_regression_that_does_not_converge_says_so_once(capsys):
    rng = np.random.default_rng(0)
    train, labels = 1e4 * rng.normal(size=(400, 60)) ** 3, rng.integers(0, 9, 400)
    evaluation.macro_f1(train, labels, train, labels, "mine", iterations=3)
    assert len(capsys.readouterr().out.splitlines()) == 1


# ------------------------------------------------------------------------------------------------- the demo


def demo(name):
    return [json.loads(line) for line in (ROOT / "demo" / name).read_text().splitlines()]


TASKS = ["topics", "paraphrases", "captions", "new-topics", "new-paraphrases", "new-captions"]


def words(text):
    return set(CountVectorizer(token_pattern=r"\w+").build_analyzer()(text))


def texts(name):
    return [
        row[column]
        for row in demo(f"{name}/test.jsonl")
        for column in ("text", "sentence1", "sentence2")
        if column in row
    ]


def test_the_demo_is_what_its_generator_writes(tmp_path):
    spec = importlib.util.spec_from_file_location("generate", ROOT / "demo" / "generate.py")
    generate = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(generate)
    generate.main(tmp_path)
    for path in tmp_path.rglob("*.json*"):
        assert path.read_bytes() == (ROOT / "demo" / path.relative_to(tmp_path)).read_bytes(), path


def test_the_demo_corpus_is_distinct_and_shares_no_sentence_with_the_tasks():
    corpus = [row["text"] for row in demo("corpus.jsonl")]
    assert len(corpus) == len(set(corpus)) == 6000
    for name in TASKS:
        assert not set(corpus) & set(texts(name))


def test_out_of_domain_tasks_use_no_word_that_the_corpus_lacks():
    vocabulary = set().union(*(words(row["text"]) for row in demo("corpus.jsonl")))
    for name in TASKS:
        assert set().union(*map(words, texts(name))) <= vocabulary, name


@pytest.mark.parametrize("name", TASKS)
def test_word_overlap_alone_scores_poorly(name):
    task = evaluation.load_tasks("demo", [name])[0][name]
    bag = CountVectorizer(token_pattern=r"\w+").fit(texts(name))
    score = evaluation.score(task, name, lambda t: bag.transform(t).toarray().astype(float))
    assert score < {"F1": 80, "AP": 65, "Spearman": 30}[task["kind"]]
