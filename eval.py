"""Score sentence encoders as the paper does: Section 4.1, Appendix E, Table 1.

    python eval.py lsa tiny student                      # the demo: teacher, student before, after
    python eval.py BAAI/bge-m3 student --data hub        # the paper's nine benchmarks, from the Hub
    python eval.py student --data DIR --json scores.json # your own tasks, offline

Classification: macro F1 of a logistic regression on the frozen embeddings of the full training
split. Pair classification: average precision of the cosine. STS: Spearman correlation of the
cosine. Embeddings are the pooled vectors as they are, not normalised.
"""

import argparse
import json
import sys
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
from support.files import check_output, positive, write_json
from support.loading import load_encoder
from support.run import pick_device

KINDS = {  # the metric of each kind of task, which is read off its columns
    "F1": {"text": str, "label": (str, int)},
    "AP": {"sentence1": str, "sentence2": str, "label": (int, float)},
    "Spearman": {"sentence1": str, "sentence2": str, "score": (int, float)},
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
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # which is said in our own words
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
    """One task's score in percent; `vectors` maps a list of n sentences to (n, d)."""
    test = {column: [row[column] for row in task["test"]] for column in KINDS[task["kind"]]}
    if task["kind"] == "F1":
        texts, labels = zip(*[(row["text"], row["label"]) for row in task["train"]])
        return macro_f1(vectors(texts), labels, vectors(test["text"]), test["label"], name)
    a, b = vectors(test["sentence1"]), vectors(test["sentence2"])
    if np.ptp(cosine(a, b)) <= 1e-6:  # all the same up to rounding: they rank nothing
        fail(f"no score on {name}: all its pairs have the same cosine")
    if task["kind"] == "AP":
        return average_precision(a, b, test["label"])
    return spearman(a, b, test["score"])


# --------------------------------------------------------------------------------------- the tasks
def load_tasks(data, names):
    """({task: {"kind", "test", "train"}}, in-domain names), in Table 1's order, then by kind.

    data: demo, hub or a directory; names: some of the tasks, or None for all.
    """
    folder, in_domain, there = DEMO if is_word(data, "demo") else Path(data), IN_DOMAIN, list(HUB)
    if not is_word(data, "hub"):
        with attempt(f"read --data {data}, which is neither demo nor hub"):
            folders = [path.name for path in folder.iterdir() if path.is_dir()]
        there = sorted(name for name in folders if name[0] not in "._")
        if (folder / "tasks.json").exists():
            with attempt(f"read {folder / 'tasks.json'}"):
                told = json.loads((folder / "tasks.json").read_text("utf-8"))
                in_domain = told.get("in_domain") if isinstance(told, dict) else None
            if not isinstance(in_domain, list) or not set(in_domain) <= set(there):
                form = f'{{"in_domain": [some of {", ".join(there)}]}}'
                fail(f"{folder / 'tasks.json'} must hold {form}")
    wanted = there if names is None else names
    if not wanted or (unknown := [name for name in wanted if name not in there]):
        lacking = ", ".join(unknown) if wanted else "(a folder with test.jsonl)"
        fail(f"no task {lacking} in {data}; there are: {', '.join(there) or 'none'}")
    if clash := set(wanted) & set(AVERAGES):
        fail(f"a task can't be called {clash.pop()}, as an average is; rename its folder")
    tasks = {name: check_task(name, partial(read_split, data, folder)) for name in wanted}
    places = [*HUB, *(name for kind in KINDS for name in tasks if tasks[name]["kind"] == kind)]
    return {name: tasks[name] for name in sorted(tasks, key=places.index)}, in_domain


def read_split(data, folder, task, split):
    """The rows of a task's split: from the Hub, from a .jsonl file, or from a .csv file."""
    if data == "hub":
        return load_hub_split(task, split)
    if (folder / task / f"{split}.jsonl").exists() or not (folder / task / f"{split}.csv").exists():
        return read_table(folder / task / f"{split}.jsonl")
    rows = read_table(folder / task / f"{split}.csv")
    for row in rows:
        with suppress(KeyError, ValueError):
            row["score"] = float(row["score"])
    with suppress(KeyError, ValueError):  # labels are all numbers, or all text
        labels = [float(row["label"]) for row in rows]
        for row, label in zip(rows, labels):
            row["label"] = int(label) if label.is_integer() else label
    return rows


def check_task(name, rows):
    """A task that can be scored, of the rows(name, split); else the program ends."""
    task = {"test": rows(name, "test")}
    there = task["test"][0].keys() if task["test"] else {}
    fitting = [kind for kind, columns in KINDS.items() if columns.keys() <= set(there)]
    if len(fitting) != 1:
        known = " or ".join(",".join(columns) for columns in KINDS.values())
        found = ",".join(there) or "no row"
        fail(f"{name}: test must have the columns of one kind of task, {known}; it has {found}")
    task["kind"] = kind = fitting[0]
    task |= {"train": rows(name, "train")} if kind == "F1" else {}
    *_, target = KINDS[kind]
    for split in ("test", "train"):
        for number, row in enumerate(task.get(split, []), 1):
            for column, types in KINDS[kind].items():
                value = row.get(column)
                if not isinstance(value, types) or (value != value):
                    fail(f"{name}: row {number} of {split} has no usable {column}: {value!r}")
    values = {row[target] for row in task["test"]}
    learnt = {row[target] for row in task.get("train", task["test"])}
    if kind == "AP" and not values <= {0, 1}:
        fail(f"{name}: labels must be 0 or 1; found {sorted(values)[:5]}")
    if kind == "F1" and len({type(label) for label in learnt | values}) > 1:
        fail(f"{name}: some labels are numbers and some are text; write them all in one way")
    if kind == "F1" and (unseen := values - learnt):
        fail(f"{name}: test has labels that train lacks: {sorted(unseen)[:5]}")
    if min(len(values), len(learnt)) < 2:
        fail(f"{name}: every row has the same {target}, so there is nothing to measure or learn")
    return task


# -------------------------------------------------------------------------------------- the models
def load_model(name, pooling, args):
    """(n sentences, label of the progress bar) -> (n, d): a directory's, a Hub id's, lsa, tiny."""
    how = {"pooling": pooling, "max_length": args.max_length, "device": pick_device(args.device)}
    if not is_word(name, "lsa", "tiny"):
        encoder = load_encoder(name, **how)
    else:  # both are made of the corpus beside the tasks
        corpus = DEMO / "corpus.jsonl" if args.data == "demo" else Path(args.data, "corpus.jsonl")
        if not corpus.exists():
            fail(f"{name} belongs to the demo; with --data {args.data} it needs a {corpus}")
        sentences = unique_corpus(str(corpus))[0]  # as cache_teacher.py has them
        if name == "lsa":
            lsa = fit_lsa(sentences)
            return lambda texts, label: lsa.transform(texts)
        encoder = tiny_student(sentences, seed=42, **how)  # the default of talas.py
    n = args.batch_size
    return lambda texts, label: encode(encoder, tokenize(encoder, texts), n, label).numpy()


def evaluate(name, pooling, tasks, in_domain, args):
    """{task: score in percent, ..., "avg_in", "avg_out", "avg"}; a mean over no task is None."""
    embed = load_model(name, pooling, args)
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
        scores[task_name] = float(result)
    inside = [task for task in tasks if task in in_domain]
    outside = [task for task in tasks if task not in in_domain]
    for key, names in zip(AVERAGES, (inside, outside, list(tasks))):
        scores[key] = float(np.mean([scores[name] for name in names])) if names else None
    return scores


def markdown(results, tasks, in_domain):
    """The scores as a table like Table 1: a row a model, in percent."""
    header = [task + "*" * (task in in_domain) for task in tasks]
    rows = [["model", *header, "Avg-In*", "Avg-Out", "Avg"]]
    for name, scores in results.items():
        values = (scores[key] for key in (*tasks, *AVERAGES))
        rows.append([name, *("–" if value is None else f"{value:.2f}" for value in values)])
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
    """The command line; args.pooling becomes one for each model."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    flag, parser.error = parser.add_argument, fail
    models = "directories, Hub ids, lsa (the demo's teacher), tiny (its student, untrained)"
    flag("models", nargs="*", default=["student"], help=models)
    flag("--data", default="demo", help="demo; hub: the paper's nine; or a folder of tasks")
    flag("--tasks", type=lambda text: text.split(","), help="some of the tasks: a,b,c")
    flag("--json", help="write the scores to this file, too")
    of_each = "auto, cls, mean, last; one for all models, or last,cls: one each, in their order"
    flag("--pooling", default="auto", help=of_each)
    flag("--batch_size", type=positive, default=32, help="sentences a forward pass")
    flag("--max_length", type=positive, default=256, help="tokens; longer sentences are cut")
    flag("--device", default="auto", help="auto: the accelerator if there is one, else cpu")
    args = parser.parse_args(argv)
    own = args.pooling.split(",")
    args.pooling = own * len(args.models) if len(own) == 1 else own
    if len(args.pooling) != len(args.models) or not set(own) <= {"auto", "cls", "mean", "last"}:
        fail(f"--pooling {','.join(own)}: give auto, cls, mean or last, once or for each model")
    if len(set(args.models)) < len(args.models):
        fail(f"{' '.join(args.models)}: a model stands there twice; give one another name, as ./x")
    if args.json is not None:
        check_output("--json", args.json)
        text = Path(args.json).read_text("utf-8", "replace") if Path(args.json).exists() else ""
        if text and '"avg_out"' not in text:
            fail(f"{args.json} holds something else than scores; choose another --json")
    return args


def main(argv=None):
    """The command line: load the tasks, score each model that can be scored, print the table."""
    args = parse_args(argv)
    results, failed = {}, []
    with interruptible("the models that were scored are in the --json file, if there is one"):
        tasks, in_domain = load_tasks(args.data, args.tasks)
        for name, pooling in zip(args.models, args.pooling):
            try:
                results[name] = evaluate(name, pooling, tasks, in_domain, args)
            except SystemExit:  # its line is on the screen; the others' scores are not lost
                failed.append(name)
            if args.json and results:
                write_json(args.json, results)
    if results:
        print("\n" + markdown(results, tasks, in_domain))
    if failed and len(args.models) > 1:
        fail(f"no scores of {', '.join(failed)}; the reason stands above")
    if failed:
        sys.exit(2)


if __name__ == "__main__":
    main()
