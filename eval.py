"""Score sentence encoders as the paper does: Section 4.1, Appendix E, Table 1.

    python eval.py lsa tiny student                      # the demo: teacher, student before, after
    python eval.py BAAI/bge-m3 student --data hub        # the paper's nine benchmarks, from the Hub
    python eval.py student --data DIR --json scores.json # your own tasks, offline

Classification: macro F1 of a logistic regression on the frozen embeddings of the full training
split. Pair classification: average precision of the cosine. STS: Spearman correlation of the
cosine. Embeddings are the pooled vectors, not normalised.
"""

import argparse
import traceback
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import numpy as np
from scipy.stats import spearmanr
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import average_precision_score, f1_score

from demo.lsa import fit_lsa
from demo.tiny import tiny_student
from support import attempt, fail, interruptible, positive
from support.data import DEMO, HUB, IN_DOMAIN, load_hub_split, read_table, unique_corpus
from support.encoder import Encoder, encode, tokenize
from support.files import check_output, read_json, write_json
from support.loading import load_encoder
from support.run import pick_device

COLUMNS = {  # metric -> the columns of its tasks, the target last
    "F1": ("text", "label"),
    "AP": ("sentence1", "sentence2", "label"),
    "Spearman": ("sentence1", "sentence2", "score"),
}
AVERAGES = {"avg_in": "Avg-In*", "avg_out": "Avg-Out", "avg": "Avg"}  # key -> name in the table


class Task(NamedTuple):
    """A task's metric and its rows; only F1 has training rows."""

    metric: str
    test: list
    train: list


# -------------------------------------------------------------------------------------- the scores
def cosine(a, b):
    """Cosine similarity of matching rows: two (n, d) -> (n,); 0 where a vector is zero.

    Rounded to 12 digits, so that pairs of equal sentences are ties whatever their rounding errors.
    """
    a = a.astype(np.float64)
    b = b.astype(np.float64)
    norms = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    norms[norms == 0] = 1.0
    return ((a * b).sum(1) / norms).round(12)


def macro_f1(train, train_labels, test, test_labels):
    """Macro F1, in percent, of a logistic regression fitted on the training embeddings (n, d).

    scikit-learn warns of a regression that has not converged.
    """
    model = LogisticRegression(max_iter=1000).fit(train, train_labels)  # in float32, their type
    return 100 * f1_score(test_labels, model.predict(test), average="macro")


def gather(embeddings, rows, column):
    """The embeddings of one column's sentences: {text: (d,)}, n rows -> (n, d)."""
    return np.stack([embeddings[row[column]] for row in rows])


def score(name, task, embeddings):
    """A task's score in percent; embeddings: {text: (d,)} with all of its sentences."""
    target = COLUMNS[task.metric][-1]
    gold = [row[target] for row in task.test]
    if task.metric == "F1":
        train = gather(embeddings, task.train, "text")
        train_labels = [row["label"] for row in task.train]
        return macro_f1(train, train_labels, gather(embeddings, task.test, "text"), gold)
    first = gather(embeddings, task.test, "sentence1")
    cosines = cosine(first, gather(embeddings, task.test, "sentence2"))
    if np.ptp(cosines) <= 1e-6:
        fail(f"no score on {name}: all its pairs have the same cosine")
    if task.metric == "AP":
        return 100 * average_precision_score(gold, cosines)
    return 100 * spearmanr(cosines, gold).statistic


# --------------------------------------------------------------------------------------- the tasks
def load_tasks(data, names):
    """({name: Task}, names of the in-domain tasks), in Table 1's order, then by metric.

    data: hub or a folder; names: the tasks to load, None for all.
    """
    if data == "hub":
        available = list(HUB)
        in_domain = IN_DOMAIN
    else:
        available = sorted(path.name for path in Path(data).glob("[!._]*/"))
        in_domain = read_in_domain(Path(data, "tasks.json"), available)
    if not available:
        fail(f"--data {data} is neither demo nor hub, nor a folder with TASK/test.jsonl in it")
    names = names or available
    unknown = set(names) - set(available)
    if unknown:
        fail(f"no task {', '.join(unknown)} in {data}; there are: {', '.join(available)}")
    tasks = {name: load_task(data, name) for name in names}
    order = [name for name in HUB if name in tasks]
    for metric in COLUMNS:
        order += [name for name in names if tasks[name].metric == metric and name not in HUB]
    return {name: tasks[name] for name in order}, in_domain


def read_in_domain(path, available):
    """The names of the in-domain tasks in a tasks.json; the paper's if there is no such file."""
    if not path.exists():
        return IN_DOMAIN
    in_domain = read_json(path).get("in_domain")
    if not isinstance(in_domain, list) or set(in_domain) - set(available):
        fail(f"{path}: in_domain must be a list of tasks: some of {', '.join(available)}")
    return in_domain


def read_split(data, task, split):
    """The rows of a task's split: from the Hub, a .jsonl file, or a .csv file if there is none."""
    if data == "hub":
        return load_hub_split(task, split)
    path = Path(data, task, f"{split}.jsonl")
    if not path.exists():
        path = path.with_suffix(".csv")
    return read_table(path)


def load_task(data, name):
    """A Task that can be scored; otherwise the program ends."""
    test = read_split(data, name, "test")
    metric = metric_of(name, test)
    train = read_split(data, name, "train") if metric == "F1" else []
    for split, rows in {"train": train, "test": test}.items():
        for number, row in enumerate(rows, 1):
            with attempt(f"use row {number} of {name}, {split}", ValueError):
                check_row(row, metric)
    target = COLUMNS[metric][-1]
    gold = {row[target] for row in test}
    if len(gold) < 2:
        fail(f"{name}: every row has the same {target}, so there is nothing to measure")
    if metric == "AP" and gold != {0, 1}:
        fail(f"{name}: labels must be 0 or 1; found {sorted(gold)[:5]}")
    if metric == "F1":
        unknown = gold - {row["label"] for row in train}
        if unknown:
            fail(f"{name}: test has labels that train lacks: {sorted(unknown)[:5]}")
        number_classes(train + test)
    return Task(metric, test, train)


def metric_of(name, rows):
    """The metric of a task, from its columns."""
    columns = list(rows[0]) if rows else ["no row"]
    metrics = [metric for metric, needed in COLUMNS.items() if set(needed) <= set(columns)]
    if len(metrics) != 1:
        fail(
            f"{name}: test has the columns {','.join(columns)}; a task has "
            "text,label or sentence1,sentence2,label or sentence1,sentence2,score"
        )
    return metrics[0]


def check_row(row, metric):
    """Make a row's target a number, or text if it is a class; ValueError if a cell is wrong."""
    target = COLUMNS[metric][-1]
    for column in COLUMNS[metric][:-1]:
        if not isinstance(row.get(column), str):
            raise ValueError(f"its {column} is not text")
    value = row.get(target)
    if value in (None, ""):
        raise ValueError(f"its {target} is missing")
    if metric == "F1":
        row[target] = str(value).removesuffix(".0")  # 1 and 1.0 are one class, "1" and "01" are two
    else:
        row[target] = float(value)
        if not np.isfinite(row[target]):
            raise ValueError(f"its {target} is {value}")


def number_classes(rows):
    """Replace the labels by 0, 1, ...: in order of number if all are numbers, else of text."""
    order = sorted({row["label"] for row in rows})
    with suppress(ValueError):
        order.sort(key=float)
    for row in rows:
        row["label"] = order.index(row["label"])


# -------------------------------------------------------------------------------------- the models
def load_model(name, args):
    """The Encoder of a folder, a Hub id or tiny; for lsa, scikit-learn's pipeline."""
    device = pick_device(args.device)
    if name not in ("lsa", "tiny"):
        return load_encoder(name, args.pooling, args.max_length, device=device)
    sentences = unique_corpus(f"{args.data}/corpus.jsonl")[0]  # the demo has one
    if name == "lsa":
        return fit_lsa(sentences)
    return tiny_student(sentences, 42, args.pooling, args.max_length, device)  # talas.py's seed


def embed(model, texts, batch_size, label):
    """Embeddings of n texts, (n, d); label: for the progress bar and an error."""
    if isinstance(model, Encoder):
        return encode(model, tokenize(model, texts), batch_size, label).numpy()
    return model.transform(texts)


def mean(scores):
    """Their mean; None if there are none."""
    return np.mean(scores) if scores else None


def evaluate(name, tasks, in_domain, args):
    """{task: score in percent, ..., "avg_in", "avg_out", "avg"}; a mean over no task is None."""
    model = load_model(name, args)
    embeddings = {}  # text -> (d,); each text is embedded once
    scores = {}
    for task_name, task in tasks.items():  # one by one: a score does not depend on other tasks
        texts = {}  # its keys: the new ones, in their order
        for row in task.train + task.test:
            for column in COLUMNS[task.metric][:-1]:
                if row[column] not in embeddings:
                    texts[row[column]] = None
        if texts:
            vectors = embed(model, list(texts), args.batch_size, f"{name} {task_name}")
            embeddings.update(zip(texts, vectors))
        scores[task_name] = score(task_name, task, embeddings)
    inside = [value for task, value in scores.items() if task in in_domain]
    outside = [value for task, value in scores.items() if task not in in_domain]
    averages = {"avg_in": mean(inside), "avg_out": mean(outside), "avg": mean(inside + outside)}
    return scores | averages


def markdown(results, tasks, in_domain):
    """The scores in percent as a Markdown table like Table 1, a row for each model."""
    titles = {task: f"{task}*" if task in in_domain else task for task in tasks}
    width = max(len(name) for name in ("model", *results))
    columns = [[cell.ljust(width) for cell in ("model", "---", *results)]]
    for key, title in (titles | AVERAGES).items():
        column = [title, "---:"]
        for scores in results.values():
            value = scores[key]
            column.append("–" if value is None else f"{value:.2f}")
        width = max(len(cell) for cell in column)
        columns.append([cell.rjust(width) for cell in column])
    lines = [f"| {' | '.join(row)} |" for row in zip(*columns)]
    metrics = ", ".join(f"{name} {task.metric}" for name, task in tasks.items())
    return "\n".join([*lines, "", f"{metrics}; * in-domain"])


# ------------------------------------------------------------------------------------ command line
def parse_args(argv):
    """The command line; args.tasks becomes a list, args.data a path or the word hub."""
    parser = argparse.ArgumentParser(
        description="Score sentence encoders as the paper does.", allow_abbrev=False
    )
    parser.error = fail
    flag = parser.add_argument
    models = "folders, Hub ids, lsa (the demo's teacher), tiny (its student, untrained, seed 42)"
    flag("models", nargs="*", default=["student"], help=models)
    flag("--data", default="demo", help="demo; hub: the paper's nine; or a folder of tasks")
    flag("--tasks", help="some of the tasks: a,b,c")
    flag("--json", help="also write the scores to this file; replaces earlier scores")
    flag("--pooling", default="auto", choices=["auto", "cls", "mean", "last"], help="of the models")
    flag("--batch_size", type=positive, default=32, help="sentences in a forward pass")
    flag("--max_length", type=positive, default=256, help="tokens; longer sentences are cut")
    flag("--device", default="auto", help="auto: the accelerator (not a Mac's), else cpu")
    args = parser.parse_args(argv)
    if args.data == "demo":
        args.data = DEMO
    if args.tasks:
        args.tasks = args.tasks.split(",")
    if args.json is not None:
        check_output("--json", args.json)
        path = Path(args.json)
        if path.exists() and b'"avg_out"' not in path.read_bytes():
            fail(f"{args.json} contains something other than scores; choose another --json")
    return args


def main(argv=None):
    """The command line: load the tasks, score each model that can be scored, print the table."""
    args = parse_args(argv)
    results = {}
    with interruptible("the scores so far, if any, are in the table above"):
        tasks, in_domain = load_tasks(args.data, args.tasks)
        try:
            for name in args.models:
                try:
                    results[name] = evaluate(name, tasks, in_domain, args)
                except (Exception, SystemExit) as error:  # the other models are scored
                    if len(args.models) == 1:
                        raise
                    if isinstance(error, Exception):
                        traceback.print_exc()
                if args.json and results:
                    write_json(args.json, results)
        finally:  # after Ctrl-C, too
            if results:
                print("\n" + markdown(results, tasks, in_domain))
    failed = [name for name in args.models if name not in results]
    if failed:
        fail(f"no scores for {', '.join(failed)}; see the error above")


if __name__ == "__main__":
    main()
