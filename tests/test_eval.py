"""eval.py and the demo: the scores against scipy and scikit-learn used directly, and against values worked out by hand."""

import importlib.util
import json
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
    pairs = [{"sentence1": SENTENCES[i], "sentence2": SENTENCES[(7 * i + 1) % 48]} for i in range(40)]
    write(tmp_path / "data" / "stsb" / "test.jsonl", [pair | {"score": i % 6} for i, pair in enumerate(pairs)])
    write(tmp_path / "data" / "mrpc" / "test.jsonl", [pair | {"label": i % 2} for i, pair in enumerate(pairs)])
    texts = [{"text": text, "label": text.split()[1]} for text in SENTENCES]
    write(tmp_path / "data" / "emotion" / "train.jsonl", texts[::2])
    write(tmp_path / "data" / "emotion" / "test.jsonl", texts[1::2])
    return tmp_path / "data"


# ------------------------------------------------------------------------------------------------- the metrics


def test_spearman_is_the_correlation_of_the_ranks():
    rng = np.random.default_rng(0)
    a, b, gold = rng.normal(size=(30, 4)), rng.normal(size=(30, 4)), rng.integers(0, 6, 30)
    cosines = [float(u @ v / (u @ u) ** 0.5 / (v @ v) ** 0.5) for u, v in zip(a, b)]
    assert evaluation.spearman(a, b, gold) == pytest.approx(100 * pearsonr(rankdata(cosines), rankdata(gold)).statistic)


def test_average_precision_by_hand():
    a = np.array([[1.0, 0.0]] * 4)
    angles = np.array([0.1, 0.2, 0.3, 0.4])  # ranked as listed; labels 1, 0, 1, 0
    b = 7 * np.stack([np.cos(angles), np.sin(angles)], axis=1)
    assert evaluation.average_precision(a, b, [1, 0, 1, 0]) == pytest.approx(100 * (1 / 1 + 2 / 3) / 2)


def test_macro_f1_by_hand():
    train, labels = np.array([[-1.0], [-2.0], [1.0], [2.0]]), ["x", "x", "y", "y"]
    test, gold = np.array([[-3.0], [-1.0], [-1.0], [3.0]]), ["x", "x", "y", "y"]  # one y is taken for x
    assert evaluation.macro_f1(train, labels, test, gold) == pytest.approx(100 * (0.8 + 2 / 3) / 2)


def test_cosine_of_a_zero_vector_is_0():
    assert evaluation.cosine(np.array([[0.0, 0.0], [3.0, 4.0]]), np.array([[1.0, 2.0], [6.0, 8.0]])).tolist() == [0.0, 1.0]


# ------------------------------------------------------------------------------------------------- the whole script


def test_scores_equal_an_independent_path(data, bert, tmp_path, capsys):
    import torch
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import average_precision_score, f1_score
    from transformers import AutoModel, AutoTokenizer

    evaluation.main([str(bert), "--data", str(data), "--json", str(tmp_path / "scores.json"), "--pooling", "mean", "--batch_size", "7"])
    scores = json.loads((tmp_path / "scores.json").read_text())[str(bert)]

    model, tokenizer = AutoModel.from_pretrained(bert).eval(), AutoTokenizer.from_pretrained(bert)

    def embed(text):
        with torch.no_grad():
            return model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0].mean(0).numpy()

    rows = [json.loads(line) for line in (data / "stsb" / "test.jsonl").read_text().splitlines()]
    a, b = np.stack([embed(r["sentence1"]) for r in rows]), np.stack([embed(r["sentence2"]) for r in rows])
    cosines = (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)
    assert scores["stsb"] == pytest.approx(100 * pearsonr(rankdata(cosines), rankdata([r["score"] for r in rows])).statistic, abs=0.05)
    assert scores["mrpc"] == pytest.approx(100 * average_precision_score([i % 2 for i in range(40)], cosines), abs=0.05)
    train, test = [[json.loads(line) for line in (data / "emotion" / f"{split}.jsonl").read_text().splitlines()] for split in ("train", "test")]
    fitted = LogisticRegression(max_iter=5000).fit(np.stack([embed(r["text"]) for r in train]), [r["label"] for r in train])
    predicted = fitted.predict(np.stack([embed(r["text"]) for r in test]))
    assert scores["emotion"] == pytest.approx(100 * f1_score([r["label"] for r in test], predicted, average="macro"), abs=0.05)

    assert scores["avg_in"] == pytest.approx((scores["emotion"] + scores["stsb"]) / 2)
    assert scores["avg_out"] == pytest.approx(scores["mrpc"])
    assert scores["avg"] == pytest.approx((scores["emotion"] + scores["stsb"] + scores["mrpc"]) / 3)
    table = capsys.readouterr().out.splitlines()
    header = next(line for line in table if line.startswith("| model"))
    assert [cell.strip() for cell in header.strip("|").split("|")] == ["model", "emotion*", "mrpc", "stsb*", "Avg-In*", "Avg-Out", "Avg"]
    assert f"{scores['avg']:.2f}" in next(line for line in table if line.startswith(f"| {bert}"))


def test_each_distinct_sentence_is_embedded_once(data, bert, monkeypatch):
    seen = []
    original = evaluation.encode
    monkeypatch.setattr(evaluation, "encode", lambda model, tokenizer, texts, *rest: seen.extend(texts) or original(model, tokenizer, texts, *rest))
    evaluation.main([str(bert), "--data", str(data)])
    assert len(seen) == len(set(seen)) and set(seen) == set(SENTENCES)


def test_several_models_share_one_table(data, bert, capsys, tmp_path):
    evaluation.main([str(bert), "lsa", "--data", str(data), "--tasks", "mrpc", "--json", str(tmp_path / "s.json")])
    out = capsys.readouterr().out
    assert f"| {bert}" in out and "| lsa" in out
    assert json.loads((tmp_path / "s.json").read_text())["lsa"]["avg_in"] is None


def test_tasks_json_names_the_in_domain_tasks(data):
    (data / "tasks.json").write_text('{"in_domain": ["mrpc"]}')
    assert evaluation.load_tasks(str(data), None)[1] == ["mrpc"]


# ------------------------------------------------------------------------------------------------- the demo


def demo(name):
    return [json.loads(line) for line in (ROOT / "demo" / name).read_text().splitlines()]


TASKS = ["topics", "paraphrases", "captions", "new-topics", "new-paraphrases", "new-captions"]


def words(text):
    return set(CountVectorizer(token_pattern=r"\w+").build_analyzer()(text))


def texts(name):
    return [row[column] for row in demo(f"{name}/test.jsonl") for column in ("text", "sentence1", "sentence2") if column in row]


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
