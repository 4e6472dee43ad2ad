"""Score sentence encoders as the paper does: Section 4.1, Appendix E, Table 1.

    python eval.py lsa tiny student                            # the demo: teacher, student before, student after
    python eval.py BAAI/bge-m3 student --data hub              # the paper's nine benchmarks, from the Hub
    python eval.py student --data DIR --json scores.json       # your own tasks, offline

Classification: macro F1 of a logistic regression on the frozen embeddings of the full training split. Pair
classification: average precision of the cosine. STS: Spearman correlation of the cosine. Embeddings are the pooled
vectors as they are, not normalised.
"""

import argparse
import json
import math
import warnings
from pathlib import Path
from typing import NamedTuple

import numpy as np
from scipy.stats import spearmanr
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import average_precision_score, f1_score

from cache_teacher import (
    DEMO,
    encode,
    fail,
    fit_lsa,
    load_encoder,
    pick_device,
    positive,
    quiet,
    read_corpus,
    read_table,
    writing,
)
from demo.tiny import tiny_student

# Metric of each kind of task, which is read off its columns.
KINDS = {
    ("text", "label"): "F1",
    ("sentence1", "sentence2", "label"): "AP",
    ("sentence1", "sentence2", "score"): "Spearman",
}


class Benchmark(NamedTuple):
    """Where a benchmark lives on the Hub, and how its columns and labels become ours."""

    dataset: str
    revision: str | None
    columns: dict  # the Hub's name -> ours
    config: str | None = None
    labels: dict | None = None  # the Hub's label -> ours
    in_domain: bool = False


CLASSIFICATION = {"text": "text", "label": "label"}
PAIRS = {"sentence1": "sentence1", "sentence2": "sentence2", "label": "label"}
STS = {"sentence1": "sentence1", "sentence2": "sentence2", "score": "score"}
HUB = {  # in Table 1's order
    "banking77": Benchmark("mteb/banking77", "18072d2685ea682290f7b8924d94c62acc19c0b2", CLASSIFICATION),
    "tweet": Benchmark("mteb/tweet_sentiment_extraction", "7261898ee3b9a739595e8dbf41df6b2332f429bb", CLASSIFICATION),
    "emotion": Benchmark("mteb/emotion", "13535ec7ed83ac3920c40db3c3fd4133af55cc06", CLASSIFICATION, in_domain=True),
    "mrpc": Benchmark("nyu-mll/glue", None, PAIRS, config="mrpc"),
    "scitail": Benchmark(
        "allenai/scitail", None, {"premise": "sentence1", "hypothesis": "sentence2", "label": "label"},
        config="tsv_format", labels={"entails": 1, "neutral": 0},
    ),
    "wic": Benchmark("Deehan1866/WiC", None, PAIRS, in_domain=True),
    "sick": Benchmark(
        "RobZamp/sick", "refs/convert/parquet", {"sentence_A": "sentence1", "sentence_B": "sentence2", "relatedness_score": "score"},
    ),
    "sts12": Benchmark("mteb/sts12-sts", "a0d554a64d88156834ff5ae9920b964011b16384", STS),
    "stsb": Benchmark("mteb/stsbenchmark-sts", "b0fddb56ed78048fa8b90373c8a3cfc37b684831", STS, in_domain=True),
}  # fmt: skip


# ------------------------------------------------------------------------------------------------- the tasks


def load_hub_split(task, split):
    """The rows of one split of one of the nine benchmarks, from the Hub, with our column names and labels."""
    import datasets  # here, because it is slow to import and the Hub alone needs it

    datasets.logging.set_verbosity_error()
    datasets.disable_progress_bars()
    source = HUB[task]
    try:
        data = datasets.load_dataset(source.dataset, source.config, split=split, revision=source.revision)
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        reason = str(error).splitlines()[0]
        fail(f"cannot load {task} ({source.dataset}, {split}) from the Hub; --data DIR works offline: {reason}")
    if missing := set(source.columns) - set(data.column_names):
        fail(f"{source.dataset} has no column {', '.join(sorted(missing))}; it has {', '.join(data.column_names)}")
    rows = [
        {ours: row[theirs] for theirs, ours in source.columns.items()}
        for row in data.select_columns(list(source.columns))
    ]
    for row in rows if source.labels else []:
        if row["label"] not in source.labels:
            fail(f"{source.dataset} has the label {row['label']!r}; known: {', '.join(source.labels)}")
        row["label"] = source.labels[row["label"]]
    return rows


def load_tasks(data, names):
    """({task: {"kind", "test", "train"}}, in-domain names) from the Hub or a directory, in Table 1's order, then by kind."""
    if data == "hub":
        there, in_domain = list(HUB), [task for task, source in HUB.items() if source.in_domain]
    else:
        folder = DEMO if data == "demo" else Path(data)
        if not folder.is_dir():
            fail(f"--data {data} is neither demo, hub nor a directory")
        there = sorted(path.name for path in folder.iterdir() if path.is_dir() and not path.name.startswith((".", "_")))
        in_domain = ["emotion", "wic", "stsb"]
        if (folder / "tasks.json").exists():
            try:
                in_domain = json.loads((folder / "tasks.json").read_text(encoding="utf-8"))["in_domain"]
                assert isinstance(in_domain, list) and set(in_domain) <= set(there)
            except (ValueError, KeyError, TypeError, AssertionError):
                fail(f'{folder / "tasks.json"} must be {{"in_domain": [names of tasks]}}, of {", ".join(there)}')
    if unknown := [name for name in names or [] if name not in there]:
        fail(f"no task {', '.join(unknown)} in {data}; there are: {', '.join(there) or 'none'}")
    tasks = {}
    for name in names or there:
        rows = (
            (lambda split: load_hub_split(name, split))
            if data == "hub"
            else (lambda split: read_table(folder / name / f"{split}.jsonl"))
        )
        tasks[name] = check_task(name, rows)
    if not tasks:
        fail(f"{data} holds no task: a folder each, with test.jsonl and, for classification, train.jsonl")
    order = list(HUB)
    key = lambda name: (
        order.index(name) if name in order else len(order),
        list(KINDS.values()).index(tasks[name]["kind"]),
    )
    return {name: tasks[name] for name in sorted(tasks, key=key)}, in_domain


def check_rows(name, split, rows):
    """The columns that make these rows one of the three kinds of task; else the program ends."""
    if not rows:
        fail(f"{name}: the {split} split is empty")
    there = list(rows[0]) if isinstance(rows[0], dict) else []
    columns = next((columns for columns in KINDS if set(columns) <= set(there)), None)
    if columns is None:
        fail(
            f"{name}: {split} needs the columns {' or '.join(','.join(c) for c in KINDS)}; it has {','.join(there) or 'none'}"
        )
    number = (int, float)
    types = {
        "text": str,
        "sentence1": str,
        "sentence2": str,
        "score": number,
        "label": number if columns[0] == "sentence1" else (str, int),
    }
    for i, row in enumerate(rows, 1):
        if bad := [
            c for c in columns if not isinstance(row, dict) or not isinstance(row.get(c), types[c]) or row[c] != row[c]
        ]:
            fail(f"{name}: row {i} of {split} has no usable {bad[0]}")
    return columns


def check_task(name, rows):
    """A task that can be scored; `rows` gives a split's rows. Ends the program if it can't be: nothing would be measured."""
    task = {"test": rows("test")}
    columns = check_rows(name, "test", task["test"])
    task["kind"], target = KINDS[columns], columns[-1]
    values = {row[target] for row in task["test"]}
    if task["kind"] == "Spearman" and not all(map(math.isfinite, values)):
        fail(f"{name}: every score must be a finite number")
    if task["kind"] == "AP" and not values <= {0, 1}:
        fail(f"{name}: labels must be 0 or 1; found {', '.join(map(str, sorted(values)[:5]))}")
    if len(values) < 2:
        fail(f"{name}: every row of test has the same {target}, so there is nothing to measure")
    if task["kind"] == "F1":
        task["train"] = rows("train")
        if check_rows(name, "train", task["train"]) != columns:
            fail(f"{name}: train needs the columns of test, {','.join(columns)}")
        learnt = {row["label"] for row in task["train"]}
        if len(learnt) < 2:
            fail(f"{name}: every row of train has the same label, so there is nothing to learn")
        if unseen := values - learnt:
            fail(f"{name}: test has labels that train lacks: {', '.join(sorted(map(str, unseen))[:5])}")
    return task


# ------------------------------------------------------------------------------------------------- the scores


def cosine(a, b):
    """Cosine similarity of matching rows: two (n, d) -> (n,); 0 where a vector is zero."""
    norms = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    return (a * b).sum(1) / np.where(norms > 0, norms, 1.0)


def macro_f1(train, train_labels, test, test_labels, name="task", iterations=1000):
    """Macro F1, in percent, of a logistic regression fitted on the training embeddings (n, d)."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", ConvergenceWarning)
        model = LogisticRegression(max_iter=iterations).fit(train, train_labels)
    if any(issubclass(w.category, ConvergenceWarning) for w in caught):
        print(f"{name}: the logistic regression did not converge in {iterations} iterations; its score is approximate")
    return 100 * f1_score(test_labels, model.predict(test), average="macro")


def average_precision(a, b, labels):
    """Average precision, in percent, of the cosine between two (n, d) as the score of label 1."""
    return 100 * average_precision_score(labels, cosine(a, b))


def spearman(a, b, scores):
    """Spearman correlation, in percent, of the cosine between two (n, d) with the gold scores."""
    cosines = cosine(a, b)
    return 100 * spearmanr(cosines, scores).statistic if np.ptp(cosines) > 0 else math.nan  # no ranks, no warning


def score(task, name, vectors):
    """One task's score in percent; `vectors` maps n sentences to (n, d)."""
    column = lambda split, key: [row[key] for row in task[split]]
    if task["kind"] == "F1":
        train, test = vectors(column("train", "text")), vectors(column("test", "text"))
        return macro_f1(train, column("train", "label"), test, column("test", "label"), name)
    a, b = vectors(column("test", "sentence1")), vectors(column("test", "sentence2"))
    if task["kind"] == "AP":
        return average_precision(a, b, column("test", "label"))
    return spearman(a, b, column("test", "score"))


def load_model(name, args):
    """A function (n sentences, label of the progress bar) -> array (n, d) for a directory, a Hub id, lsa or tiny."""
    if name in ("lsa", "tiny"):  # both come from a corpus: the one beside the tasks, else the demo's
        beside = (DEMO if args.data == "demo" else Path(args.data)) / "corpus.jsonl"
        corpus = beside if beside.exists() else DEMO / "corpus.jsonl"
        sentences = list(dict.fromkeys(read_corpus(str(corpus), 0)[0]))
        print(f"{name}: from the {len(sentences)} sentences of {corpus.parent.name}/{corpus.name}")
    if name == "lsa":
        lsa = fit_lsa(sentences)
        return lambda texts, label: lsa.transform(texts)
    if name == "tiny":
        model, tokenizer, pooling = tiny_student(sentences, 42, args.pooling)  # the default seed of talas.py
    else:
        model, tokenizer, pooling = load_encoder(name, args.pooling)
    model.to(pick_device(args.device))
    return lambda texts, label: encode(
        model, tokenizer, texts, pooling, args.max_length, args.batch_size, label
    ).numpy()


def evaluate(name, tasks, in_domain, args):
    """{task: score in percent, ..., "avg_in", "avg_out", "avg"} of one model; a mean over no task is None."""
    embed = load_model(name, args)
    known, scores = {}, {}  # each distinct sentence is embedded once
    for task_name, task in tasks.items():
        texts = [
            row[c]
            for split in ("train", "test")
            for row in task.get(split, [])
            for c in ("text", "sentence1", "sentence2")
            if c in row
        ]
        if new := [text for text in dict.fromkeys(texts) if text not in known]:
            vectors = embed(new, f"{Path(name).name} {task_name}")
            if not np.isfinite(vectors).all():
                fail(f"{name} gives embeddings on {task_name} that are not a number; is the model torn?")
            known.update(zip(new, vectors))
        scores[task_name] = float(score(task, task_name, lambda texts: np.stack([known[text] for text in texts])))
        if not math.isfinite(scores[task_name]):
            fail(f"{name} has no score on {task_name}: its embeddings are all the same")
    mean = lambda names: float(np.mean([scores[n] for n in names])) if names else None
    inside = [task for task in tasks if task in in_domain]
    outside = [task for task in tasks if task not in in_domain]
    return scores | {"avg_in": mean(inside), "avg_out": mean(outside), "avg": mean(list(tasks))}


def markdown(results, tasks, in_domain):
    """The scores as a table like Table 1: a row a model, in percent."""
    header = ["model", *(task + "*" * (task in in_domain) for task in tasks), "Avg-In*", "Avg-Out", "Avg"]
    rows = [header, ["---", *["---:"] * (len(header) - 1)]]
    for name, scores in results.items():
        rows.append([name, *("–" if value is None else f"{value:.2f}" for value in scores.values())])
    widths = [max(len(row[i]) for row in rows) for i in range(len(header))]
    lines = [
        "| "
        + " | ".join(cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths)))
        + " |"
        for row in rows
    ]
    legend = "; ".join(
        f"{kind}: {', '.join(n for n in tasks if tasks[n]['kind'] == kind)}"
        for kind in KINDS.values()
        if any(t["kind"] == kind for t in tasks.values())
    )
    return "\n".join([*lines, "", f"{legend}; * in-domain"])


def parse_args(argv):
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument(
        "models",
        nargs="*",
        default=["student"],
        help="directories, Hub ids, lsa (the demo's teacher), tiny (its student, untrained)",
    )
    parser.add_argument(
        "--data", default="demo", help="demo; hub: the paper's nine; or a directory with a folder a task"
    )
    parser.add_argument("--tasks", type=lambda text: text.split(","), help="some of the tasks, separated by commas")
    parser.add_argument("--json", help="write the scores to this file, too")
    parser.add_argument(
        "--pooling", default="auto", choices=["auto", "cls", "mean", "last"], help="auto: as each model's files say"
    )
    parser.add_argument("--batch_size", type=positive, default=32, help="sentences a forward pass")
    parser.add_argument("--max_length", type=positive, default=256, help="tokens; longer sentences are truncated")
    parser.add_argument("--device", default="auto", help="auto: the accelerator if there is one, else cpu")
    parser.error = fail
    args = parser.parse_args(argv)
    if args.json and (not Path(args.json).absolute().parent.is_dir() or Path(args.json).is_dir()):
        fail(f"--json {args.json}: it must be a file's name in a folder that exists")
    return args


def main(argv=None):
    """The command line: load the tasks, score each model, print the table."""
    quiet()
    args = parse_args(argv)
    tasks, in_domain = load_tasks(args.data, args.tasks)
    results = {}
    try:
        for name in args.models:
            results[name] = evaluate(name, tasks, in_domain, args)
            if args.json:
                with writing(args.json):
                    Path(args.json).write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    finally:  # a model that fails loses no other's scores
        if results:
            print("\n" + markdown(results, tasks, in_domain))


if __name__ == "__main__":
    main()
