"""Score sentence encoders as the paper does: Section 4.1, Appendix E, Table 1.

    python eval.py lsa tiny student                      # the demo: teacher, student before, after
    python eval.py BAAI/bge-m3 student --data hub        # the paper's nine benchmarks, from the Hub
    python eval.py student --data DIR --json scores.json # your own tasks, offline

Classification: macro F1 of a logistic regression on the frozen embeddings of the full training
split. Pair classification: average precision of the cosine. STS: Spearman correlation of the
cosine. Embeddings are the pooled vectors as they are, not normalised.
"""

from support import fail, one_line
from support.data import DEMO, HUB, IN_DOMAIN, load_hub_split, read_corpus, read_table
from support.encoder import encode, tokenize
from support.files import attempt, check_writable, positive, write_json
from support.loading import load_encoder
from support.run import pick_device

import argparse
import json
import math
import warnings
from pathlib import Path

import numpy as np
from scipy.stats import spearmanr
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import average_precision_score, f1_score

from cache_teacher import fit_lsa
from demo.tiny import tiny_student

KINDS = {  # the metric of each kind of task, which is read off its columns
    "F1": {"text": str, "label": (str, int)},
    "AP": {"sentence1": str, "sentence2": str, "label": (int, float)},
    "Spearman": {"sentence1": str, "sentence2": str, "score": (int, float)},
}


# -------------------------------------------------------------------------------------- the scores
def cosine(a, b):
    """Cosine similarity of matching rows: two (n, d) -> (n,); 0 where a vector is zero."""
    a, b = a.astype(np.float64), b.astype(np.float64)
    norms = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    return (a * b).sum(1) / np.where(norms > 0, norms, 1.0)


def macro_f1(train, train_labels, test, test_labels, name="task", iterations=1000):
    """Macro F1, in percent, of a logistic regression fitted on the training embeddings (n, d)."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", ConvergenceWarning)
        model = LogisticRegression(max_iter=iterations).fit(train, train_labels)
    if any(issubclass(w.category, ConvergenceWarning) for w in caught):
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

    def column(split, key):
        return [row[key] for row in task[split]]

    if task["kind"] == "F1":
        train, test = vectors(column("train", "text")), vectors(column("test", "text"))
        return macro_f1(train, column("train", "label"), test, column("test", "label"), name)
    a, b = vectors(column("test", "sentence1")), vectors(column("test", "sentence2"))
    if np.ptp(cosine(a, b)) <= 1e-6:  # all the same up to rounding: they rank nothing
        return math.nan
    if task["kind"] == "AP":
        return average_precision(a, b, column("test", "label"))
    return spearman(a, b, column("test", "score"))


# --------------------------------------------------------------------------------------- the tasks
def load_tasks(data, names):
    """({task: {"kind", "test", "train"}}, in-domain names), in Table 1's order, then by kind.

    data: demo, hub or a directory; names: some of the tasks, or None for all.
    """
    folder, in_domain, there = DEMO if data == "demo" else Path(data), IN_DOMAIN, list(HUB)
    if data != "hub":
        with attempt(f"read --data {data}, which is neither demo nor hub"):
            folders = [path.name for path in folder.iterdir() if path.is_dir()]
            there = sorted(name for name in folders if name[0] not in "._")
    if data != "hub" and (folder / "tasks.json").exists():
        with attempt(f'read {folder / "tasks.json"} as {{"in_domain": [names of tasks]}}'):
            in_domain = json.loads((folder / "tasks.json").read_text("utf-8"))["in_domain"]
            if not isinstance(in_domain, list) or not set(in_domain) <= set(there):
                raise ValueError(f"{in_domain} are not all among {', '.join(there)}")
    names = there if names is None else names
    if not names or (unknown := [name for name in names if name not in there]):
        wanted = ", ".join(unknown) if names else "(a folder with test.jsonl)"
        fail(f"no task {wanted} in {data}; there are: {', '.join(there) or 'none'}")

    def rows(task, split):
        if data == "hub":
            return load_hub_split(task, split)
        return read_table(folder / task / f"{split}.jsonl")

    tasks = {name: check_task(name, rows) for name in names}
    places = [*HUB, *(name for kind in KINDS for name in tasks if tasks[name]["kind"] == kind)]
    return {name: tasks[name] for name in sorted(tasks, key=places.index)}, in_domain


def check_rows(name, split, rows):
    """The kind of task that these rows are of; ends the program if they are not just one."""
    there = rows[0].keys() if rows else {}.keys()
    fitting = [kind for kind, columns in KINDS.items() if columns.keys() <= there]
    if len(fitting) != 1:
        known = " or ".join(",".join(columns) for columns in KINDS.values())
        found = ",".join(there) or "no row"
        fail(f"{name}: {split} must have the columns of one kind of task, {known}; it has {found}")
    for number, row in enumerate(rows, 1):
        for column, types in KINDS[fitting[0]].items():
            value = row.get(column)
            sensible = isinstance(value, str) or (isinstance(value, types) and abs(value) < 2**53)
            if not (isinstance(value, types) and sensible):
                fail(f"{name}: row {number} of {split} has no usable {column}")
    return fitting[0]


def check_task(name, rows):
    """A task that can be scored, of the rows(name, split); else the program ends."""
    task = {"test": rows(name, "test")}
    task["kind"] = kind = check_rows(name, "test", task["test"])
    target = list(KINDS[kind])[-1]
    values = {row[target] for row in task["test"]}
    if kind == "AP" and not values <= {0, 1}:
        fail(f"{name}: labels must be 0 or 1; found {sorted(values)[:5]}")
    learnt = values
    if kind == "F1":
        task["train"] = rows(name, "train")
        if check_rows(name, "train", task["train"]) != kind:
            fail(f"{name}: train needs the columns of test, {','.join(KINDS[kind])}")
        learnt = {row[target] for row in task["train"]}
        if len({type(label) for label in learnt | values}) > 1:
            fail(f"{name}: some labels are numbers and some are text; write them all in one way")
        if unseen := values - learnt:
            fail(f"{name}: test has labels that train lacks: {sorted(unseen)[:5]}")
    if min(len(values), len(learnt)) < 2:
        fail(f"{name}: every row has the same {target}, so there is nothing to measure or learn")
    return task


# -------------------------------------------------------------------------------------- the models
def load_model(name, args):
    """(n sentences, label of the progress bar) -> (n, d): a directory's, a Hub id's, lsa, tiny."""
    device, corpus = pick_device(args.device), Path(args.data, "corpus.jsonl")
    corpus = DEMO / "corpus.jsonl" if args.data == "demo" else corpus
    if name in ("lsa", "tiny"):  # both are made of the corpus beside the tasks
        if not corpus.exists():
            fail(f"{name} belongs to the demo; with --data {args.data} it needs a {corpus}")
        texts = (text.strip() for text in read_corpus(str(corpus))[0])
        sentences = list(dict.fromkeys(filter(None, texts)))  # as cache_teacher.py has them
    if name == "lsa":
        lsa = fit_lsa(sentences)
        return lambda texts, label: lsa.transform(texts)
    if name == "tiny":
        encoder = tiny_student(sentences, 42, args.pooling, args.max_length, device)  # talas's seed
    else:
        encoder = load_encoder(name, args.pooling, args.max_length, device=device)

    def embed(texts, label):
        return encode(encoder, tokenize(encoder, texts), args.batch_size, label).numpy()

    return embed


def evaluate(name, tasks, in_domain, args):
    """{task: score in percent, ..., "avg_in", "avg_out", "avg"}; a mean over no task is None."""
    embed = load_model(name, args)
    known, scores = {}, {}  # each distinct sentence is embedded once
    for task_name, task in tasks.items():
        rows = [row for split in ("train", "test") for row in task.get(split, [])]
        texts = [row[c] for row in rows for c in list(KINDS[task["kind"]])[:-1]]
        if new := [text for text in dict.fromkeys(texts) if text not in known]:
            vectors = embed(new, f"{Path(name).name} {task_name}")
            if not np.isfinite(vectors).all():
                fail(f"{name} gives embeddings on {task_name} that are not a number; is it torn?")
            known.update(zip(new, vectors))
        result = score(task, task_name, lambda texts: np.stack([known[text] for text in texts]))
        if not math.isfinite(result):
            fail(f"{name} has no score on {task_name}: its embeddings are all the same")
        scores[task_name] = float(result)

    def mean(names):
        return float(np.mean([scores[name] for name in names])) if names else None

    inside = [task for task in tasks if task in in_domain]
    outside = [task for task in tasks if task not in in_domain]
    return scores | {"avg_in": mean(inside), "avg_out": mean(outside), "avg": mean(list(tasks))}


def markdown(results, tasks, in_domain):
    """The scores as a table like Table 1: a row a model, in percent."""
    header = [task + "*" * (task in in_domain) for task in tasks]
    rows = [["model", *header, "Avg-In*", "Avg-Out", "Avg"]]
    for name, scores in results.items():
        cells = ["–" if value is None else f"{value:.2f}" for value in scores.values()]
        rows.append([name, *cells])
    first, *others = [max(map(len, column)) for column in zip(*rows)]
    rows.insert(1, ["---", *["---:"] * (len(header) + 3)])
    lines = []
    for name, *cells in rows:
        padded = [name.ljust(first), *(c.rjust(width) for c, width in zip(cells, others))]
        lines.append(f"| {' | '.join(padded)} |")
    of_kind = {kind: [n for n in tasks if tasks[n]["kind"] == kind] for kind in KINDS}
    legend = [f"{kind}: {', '.join(names)}" for kind, names in of_kind.items() if names]
    return "\n".join([*lines, "", f"{'; '.join(legend)}; * in-domain"])


# ------------------------------------------------------------------------------------ command line
def parse_args(argv):
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    flag, parser.error = parser.add_argument, fail
    models = "directories, Hub ids, lsa (the demo's teacher), tiny (its student, untrained)"
    flag("models", nargs="*", default=["student"], help=models)
    flag("--data", default="demo", help="demo; hub: the paper's nine; or a folder of tasks")
    flag("--tasks", type=lambda text: text.split(","), help="some of the tasks: a,b,c")
    flag("--json", help="write the scores to this file, too")
    flag("--pooling", default="auto", choices=["auto", "cls", "mean", "last"], help="of the models")
    flag("--batch_size", type=positive, default=32, help="sentences a forward pass")
    flag("--max_length", type=positive, default=256, help="tokens; longer sentences are cut")
    flag("--device", default="auto", help="auto: the accelerator if there is one, else cpu")
    args = parser.parse_args(argv)
    if args.json is not None:
        with attempt(f"use --json {args.json}"):
            check_json(Path(args.json))
    return args


def check_json(path):
    """End the program if the scores can't be written there, or something else would be lost."""
    if path.is_dir() or not path.parent.is_dir():
        fail(f"--json {path} must be a file's name in a folder that exists")
    check_writable(path)
    if path.exists():
        with attempt(f"take {path} for earlier scores to replace; choose another --json"):
            [scores["avg"] for scores in json.loads(path.read_text("utf-8")).values()]


@one_line
def main(argv=None):
    """The command line: load the tasks, score each model, print the table."""
    args = parse_args(argv)
    tasks, in_domain = load_tasks(args.data, args.tasks)
    results = {}
    try:
        for name in args.models:
            results[name] = evaluate(name, tasks, in_domain, args)
            if args.json:
                write_json(args.json, results)
    finally:  # a model that fails loses no other's scores
        if results:
            print("\n" + markdown(results, tasks, in_domain))


if __name__ == "__main__":
    main()
