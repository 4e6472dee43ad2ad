"""Score sentence encoders as the paper does: Section 4.1, Appendix E, Table 1.

    python eval.py lsa tiny student                      # the demo: teacher, student before, after
    python eval.py BAAI/bge-m3 student --data hub        # the paper's nine benchmarks, from the Hub
    python eval.py student --data DIR --json scores.json # your own tasks, offline

Classification: macro F1 of a logistic regression on the frozen embeddings of the full training
split. Pair classification: average precision of the cosine. STS: Spearman correlation of the
cosine. Embeddings are the pooled vectors as they are, not normalised.
"""

import argparse
import warnings
from contextlib import suppress
from functools import partial
from pathlib import Path

import numpy as np
from scipy.stats import spearmanr
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import average_precision_score, f1_score

from cache_teacher import fit_lsa
from demo.tiny import tiny_student
from support import attempt, fail, interruptible
from support.data import DEMO, HUB, IN_DOMAIN, is_word, load_hub_split, read_table, unique_corpus
from support.encoder import encode, tokenize
from support.files import check_output, positive, read_json, write_json
from support.loading import load_encoder
from support.run import pick_device

KINDS = {  # the metric of each kind of task, which is read off its columns
    "F1": ("text", "label"),
    "AP": ("sentence1", "sentence2", "label"),
    "Spearman": ("sentence1", "sentence2", "score"),
}
AVERAGES = ("avg_in", "avg_out", "avg")


# -------------------------------------------------------------------------------------- the scores
def cosine(a, b):
    """Cosine similarity of matching rows: two (n, d) -> (n,); 0 where a vector is zero."""
    a, b = a.astype(np.float64), b.astype(np.float64)
    norms = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    return (a * b).sum(1) / np.where(norms > 0, norms, 1.0)


def macro_f1(train, train_labels, test, test_labels, name="task", iterations=1000):
    """Macro F1, in percent, of a logistic regression fitted on the training embeddings (n, d)."""
    with warnings.catch_warnings(action="ignore", category=ConvergenceWarning):  # we say it
        model = LogisticRegression(max_iter=iterations).fit(train, train_labels)
    if model.n_iter_.max() >= iterations:
        print(f"{name}: the logistic regression stopped unconverged after {iterations} iterations")
    return 100 * f1_score(test_labels, model.predict(test), average="macro")


def average_precision(a, b, labels):
    """Average precision, in percent, of the cosine between two (n, d) as the score of label 1."""
    return 100 * average_precision_score(labels, cosine(a, b))


def spearman(a, b, scores):
    """Spearman correlation, in percent, of the cosine between two (n, d) with the gold scores."""
    return 100 * spearmanr(cosine(a, b), scores).statistic


def score(task, name, vectors):
    """One task's score in percent; `vectors` maps n sentences to (n, d)."""
    test = [[row[column] for row in task["test"]] for column in KINDS[task["kind"]]]
    if task["kind"] == "F1":
        texts, labels = zip(*[(row["text"], row["label"]) for row in task["train"]])
        return macro_f1(vectors(texts), labels, vectors(test[0]), test[1], name)
    a, b, gold = vectors(test[0]), vectors(test[1]), test[2]
    if np.ptp(cosine(a, b)) <= 1e-6:  # all the same up to rounding: they rank nothing
        fail(f"no score on {name}: all its pairs have the same cosine")
    return average_precision(a, b, gold) if task["kind"] == "AP" else spearman(a, b, gold)


# --------------------------------------------------------------------------------------- the tasks
def load_tasks(data, names):
    """({task: {"kind", "test", "train"}}, in-domain names), in Table 1's order, then by kind.

    data: demo, hub or a directory; names: some of the tasks, or None for all.
    """
    if is_word(data, "hub"):
        there, in_domain, read = list(HUB), IN_DOMAIN, load_hub_split
    else:
        folder = DEMO if is_word(data, "demo") else Path(data)
        there = sorted(path.name for path in folder.glob("[!._]*/"))
        read, in_domain, named = partial(read_split, folder), IN_DOMAIN, folder / "tasks.json"
        if named.exists():
            with attempt(f'read {named} as {{"in_domain": [tasks]}}', KeyError, TypeError):
                in_domain = read_json(named)["in_domain"]
                unknown = set(in_domain) - set(there)
            if unknown:
                fail(f"{named}: in_domain names {unknown}, the tasks are {', '.join(there)}")
    if not there:
        fail(f"--data {data} is neither demo nor hub, nor a folder with TASK/test.jsonl in it")
    names = names or there
    if unknown := set(names) - set(there):
        fail(f"no task {', '.join(unknown)} in {data}; there are: {', '.join(there)}")
    if clash := set(names) & set(AVERAGES):
        fail(f"a task can't be called {clash.pop()}, as an average is; rename its folder")
    tasks = {name: load_task(name, read) for name in names}
    places = [*HUB, *(name for kind in KINDS for name in tasks if tasks[name]["kind"] == kind)]
    return {name: tasks[name] for name in sorted(tasks, key=places.index)}, in_domain


def read_split(folder, task, split):
    """The rows of a task's split, from a .jsonl or, where there is none, a .csv file."""
    path = folder / task / f"{split}.jsonl"
    table = path.with_suffix(".csv")
    return read_table(path if path.exists() or not table.exists() else table)


def classes(labels):
    """Labels as whole numbers if they all are, so that their order is the numbers'; else text."""
    with suppress(ValueError):
        numbers = [float(label) for label in labels]
        if all(map(float.is_integer, numbers)):
            return numbers
    return [str(label) for label in labels]


def load_task(name, read):
    """A task that can be scored, of the rows read(name, split); else the program ends."""
    test = read(name, "test")
    found = list(test[0]) if test else ["no row"]
    kinds = [kind for kind, columns in KINDS.items() if set(columns) <= set(found)]
    if len(kinds) != 1:
        known = " or ".join(map(",".join, KINDS.values()))
        fail(f"{name}: test has the columns {','.join(found)}; one kind of task has {known}")
    kind, *texts, target = kinds[0], *KINDS[kinds[0]]
    task = {"kind": kind, "test": test, "train": read(name, "train") if kind == "F1" else []}
    for split in ("train", "test"):
        for number, row in enumerate(task[split], 1):
            with attempt(f"use row {number} of {name}, {split}", TypeError, ValueError):
                value = row.get(target)
                if value in {"", None} or value != value:
                    raise ValueError(f"its {target} is missing")
                if not all(isinstance(row.get(column), str) for column in texts):
                    raise ValueError(f"its {' or '.join(texts)} is not text")
                row[target] = value if kind == "F1" else float(value)
    if kind == "F1":
        rows = task["train"] + task["test"]
        for row, label in zip(rows, classes([row["label"] for row in rows])):
            row["label"] = label
    values, learnt = ({row[target] for row in task[split]} for split in ("test", "train"))
    if len(values) < 2:
        fail(f"{name}: every row has the same {target}, so there is nothing to measure")
    if kind == "AP" and values != {0, 1}:
        fail(f"{name}: labels must be 0 or 1; found {sorted(values)[:5]}")
    if kind == "F1" and not values <= learnt:
        fail(f"{name}: test has labels that train lacks: {sorted(values - learnt)[:5]}")
    return task


# -------------------------------------------------------------------------------------- the models
def load_model(name, pooling, args):
    """A function (n texts, label of its bar) -> (n, d) of a directory, a Hub id, lsa or tiny."""
    how = {"pooling": pooling, "max_length": args.max_length, "device": pick_device(args.device)}
    if is_word(name, "lsa", "tiny"):  # which cache_teacher.py and talas.py make of a corpus
        corpus = (DEMO if args.data == "demo" else Path(args.data)) / "corpus.jsonl"
        if not corpus.exists():
            fail(f"{name} belongs to the demo; with --data {args.data} it needs {corpus}")
        sentences = unique_corpus(str(corpus))[0]
    if name == "lsa":
        lsa = fit_lsa(sentences)
        return lambda texts, label: lsa.transform(texts)
    encoder = tiny_student(sentences, 42, **how) if name == "tiny" else load_encoder(name, **how)
    n = args.batch_size
    return lambda texts, label: encode(encoder, tokenize(encoder, texts), n, label).numpy()


def evaluate(name, pooling, tasks, in_domain, args):
    """{task: score in percent, ..., "avg_in", "avg_out", "avg"}; a mean over no task is None."""
    embed, known, scores = load_model(name, pooling, args), {}, {}  # each text is embedded once
    for task_name, task in tasks.items():  # one by one: a score does not depend on other tasks
        rows, columns = task["train"] + task["test"], KINDS[task["kind"]][:-1]
        texts = dict.fromkeys(row[column] for row in rows for column in columns)
        if new := [text for text in texts if text not in known]:
            vectors = embed(new, f"{Path(name).name} {task_name}")
            if not np.isfinite(vectors).all():
                fail(f"{name} gives embeddings that are not finite numbers; is it damaged?")
            known.update(zip(new, vectors))
        result = score(task, task_name, lambda texts: np.stack([known[text] for text in texts]))
        scores[task_name] = float(result)
    inside = [scores[task] for task in tasks if task in in_domain]
    outside = [scores[task] for task in tasks if task not in in_domain]
    means = [float(np.mean(some)) if some else None for some in (inside, outside, inside + outside)]
    return scores | dict(zip(AVERAGES, means))


def markdown(results, tasks, in_domain):
    """The scores as a table like Table 1: a row a model, in percent."""
    header = [task + "*" * (task in in_domain) for task in tasks]
    rows = [["model", *header, "Avg-In*", "Avg-Out", "Avg"]]
    for name, scores in results.items():
        values = [scores[key] for key in (*tasks, *AVERAGES)]
        rows.append([name, *("–" if value is None else f"{value:.2f}" for value in values)])
    rows.insert(1, ["---", *["---:"] * len(rows[0][1:])])
    widths = [max(map(len, column)) for column in zip(*rows)]
    rows = [[row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])] for row in rows]
    lines = [f"| {' | '.join(row)} |" for row in rows]
    metrics = ", ".join(f"{name} {task['kind']}" for name, task in tasks.items())
    return "\n".join([*lines, "", f"{metrics}; * in-domain"])


# ------------------------------------------------------------------------------------ command line
def parse_args(argv):
    """The command line; args.pooling becomes one for each model."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    flag, parser.error, listed = parser.add_argument, fail, lambda text: text.split(",")
    models = "directories, Hub ids, lsa (the demo's teacher), tiny (its student, untrained)"
    flag("models", nargs="*", default=["student"], help=models)
    flag("--data", default="demo", help="demo; hub: the paper's nine; or a folder of tasks")
    flag("--tasks", type=listed, help="some of the tasks: a,b,c")
    flag("--json", help="write the scores to this file, too, in the place of earlier ones")
    flag(
        "--pooling", type=listed, default="auto", help="auto, cls, mean, last; or one a model: a,b"
    )
    flag("--batch_size", type=positive, default=32, help="sentences a forward pass")
    flag("--max_length", type=positive, default=256, help="tokens; longer sentences are cut")
    flag("--device", default="auto", help="auto: the accelerator if there is one, else cpu")
    args = parser.parse_args(argv)
    if len(set(args.models)) < len(args.models):
        fail(f"{' '.join(args.models)}: a model stands there twice; give one another name, as ./x")
    if len(args.pooling) == 1:
        args.pooling = args.pooling * len(args.models)
    known = {"auto", "cls", "mean", "last"}
    if len(args.pooling) != len(args.models) or not set(args.pooling) <= known:
        fail(f"--pooling {args.pooling}: give auto, cls, mean or last, once or for each model")
    if args.json is not None:
        check_output("--json", args.json)
        text = Path(args.json).read_text("utf-8", "replace") if Path(args.json).exists() else ""
        if text and '"avg_out"' not in text:
            fail(f"{args.json} holds something else than scores; choose another --json")
    return args


def main(argv=None):
    """The command line: load the tasks, score each model that can be scored, print the table."""
    args = parse_args(argv)
    results = {}
    with interruptible("the models that were scored are in the --json file, if there is one"):
        tasks, in_domain = load_tasks(args.data, args.tasks)
        for name, pooling in zip(args.models, args.pooling):
            try:
                results[name] = evaluate(name, pooling, tasks, in_domain, args)
            except SystemExit:  # its line is on the screen; the others' scores are not lost
                if len(args.models) == 1:
                    raise
                continue
            if args.json:
                write_json(args.json, results)
    if results:
        print("\n" + markdown(results, tasks, in_domain))
    if failed := [name for name in args.models if name not in results]:
        fail(f"no scores of {', '.join(failed)}; the reason stands above")


if __name__ == "__main__":
    main()
