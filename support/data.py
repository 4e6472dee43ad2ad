"""Sentences and benchmarks: tables in files, the corpora, the nine benchmarks on the Hub.

A table is a list of dicts, a row each. What is not understood is refused, with its line.
"""

import csv
import io
import json
from pathlib import Path
from typing import NamedTuple

import numpy as np

from support import fail
from support.run import reading

DEMO = Path(__file__).parent.parent / "demo"


def read_table(path):
    """Rows of a .jsonl, .csv or .tsv file as dicts, of a .txt file as {"text": line}."""
    path = Path(path)
    readers = {".txt": read_lines, ".jsonl": read_jsonl, ".csv": read_csv, ".tsv": read_csv}
    if path.suffix not in readers:
        fail(f"{path}: only .txt, .jsonl, .csv and .tsv files are read")
    with reading(path):
        text = path.read_text(encoding="utf-8-sig")
    return readers[path.suffix](path, text)


def read_lines(path, text):
    """The lines of a .txt file; only a newline ends a line, so that U+2028 and its like do not."""
    return [{"text": line} for line in text.removesuffix("\n").split("\n")]


def read_jsonl(path, text):
    """The objects of a .jsonl file, one a line; blank lines are passed over."""
    rows = []
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            with reading(f"{path}, line {number}"):
                rows.append(json.loads(line))
                if "\\u" in line:
                    json.dumps(rows[-1], ensure_ascii=False).encode()  # half a character is none
            if not isinstance(rows[-1], dict):
                fail(
                    f"{path}, line {number} is not an object with columns, but {line.strip()[:40]}"
                )
    return rows


def read_csv(path, text):
    """The rows of a .csv or .tsv file whose first line names the columns.

    Every row must have as many fields as the first, and in a .tsv, where a quotation mark is often
    just that, no field may go on over the end of its line.
    """
    tabs = path.suffix == ".tsv"
    lines = csv.reader(io.StringIO(text, newline=""), delimiter="\t" if tabs else ",", strict=True)
    rows, names, before = [], None, 0
    while True:
        try:
            fields = next(lines, None)
        except csv.Error as error:
            fail(f"cannot read {path}, line {before + 1}: {error}")
        if fields is None:
            return rows
        at, before = f"{path}, line {before + 1}", lines.line_num
        if tabs and any("\n" in field for field in fields):
            fail(f'{at}: a field begins with " and swallows the next line; double the " or drop it')
        if names is None:
            names = fields
            if len(set(names)) < len(names):
                fail(f"{at}: two columns have the same name; rename one")
        elif fields and len(fields) != len(names):
            fail(f"{at} has {len(fields)} fields, the first line has {len(names)}; quote commas")
        elif fields:
            rows.append(dict(zip(names, fields)))


def read_corpus(name, seed=42):
    """(sentences, sources) of `demo`, `paper` or a file: lists of n str, as they stand there.

    A file without a source column is one domain, named after the file.
    """
    if name == "paper":
        return paper_corpus(seed)
    rows = read_table(DEMO / "corpus.jsonl" if name == "demo" else name)
    if not rows:
        fail(f"{name} holds no sentence")
    for number, row in enumerate(rows, 1):
        if not isinstance(row.get("text"), str):
            fail(f"{name} needs a text column in every row; row {number} has: {', '.join(row)}")
        if not isinstance(row.get("source") or "", str):
            fail(f"{name}: the source of row {number} must be text, not {row['source']!r}")
    return [row["text"] for row in rows], [row.get("source") or Path(name).stem for row in rows]


def paper_corpus(seed):
    """Appendix D: 5,000 sentences of Emotion, 2,500 pairs each of WiC and STS-B, all for training."""
    rng = np.random.default_rng(seed)
    sentences, sources = [], []
    for task, count in {"emotion": 5000, "wic": 2500, "stsb": 2500}.items():
        rows = load_hub_split(task, "train")
        for i in rng.choice(len(rows), min(count, len(rows)), replace=False):
            texts = [rows[i][c] for c in ("text", "sentence1", "sentence2") if c in rows[i]]
            sentences += texts
            sources += [task] * len(texts)
    return sentences, sources


def unique(sentences):
    """The positions of the sentences to keep: no blank ones, no repeats (Appendix D).

    Prints how many went. Ends the program if none is left.
    """
    first = {}
    for i, sentence in enumerate(sentences):
        first.setdefault(sentence.strip(), i)
    blank = sum(not sentence.strip() for sentence in sentences)
    first.pop("", None)
    repeated = len(sentences) - blank - len(first)
    counts = f"{blank} blank and {repeated} repeated removed, {len(first)} left"
    print(f"{len(sentences)} sentences: {counts}")
    if not first:
        fail("the corpus holds no sentence")
    return list(first.values())


class Benchmark(NamedTuple):
    """Where a benchmark lives on the Hub, and how its columns and labels become ours."""

    dataset: str
    columns: dict  # the Hub's name -> ours
    revision: str | None = None
    config: str | None = None
    labels: dict | None = None  # the Hub's label -> ours
    in_domain: bool = False


TEXT = {"text": "text", "label": "label"}
PAIR = {"sentence1": "sentence1", "sentence2": "sentence2", "label": "label"}
STS = {"sentence1": "sentence1", "sentence2": "sentence2", "score": "score"}
SCITAIL = {"premise": "sentence1", "hypothesis": "sentence2", "label": "label"}
SICK = {"sentence_A": "sentence1", "sentence_B": "sentence2", "relatedness_score": "score"}
HUB = {  # in Table 1's order
    "banking77": Benchmark("mteb/banking77", TEXT, "18072d2685ea682290f7b8924d94c62acc19c0b2"),
    "tweet": Benchmark(
        "mteb/tweet_sentiment_extraction", TEXT, "7261898ee3b9a739595e8dbf41df6b2332f429bb"
    ),
    "emotion": Benchmark(
        "mteb/emotion", TEXT, "13535ec7ed83ac3920c40db3c3fd4133af55cc06", in_domain=True
    ),
    "mrpc": Benchmark("nyu-mll/glue", PAIR, config="mrpc"),
    "scitail": Benchmark(
        "allenai/scitail", SCITAIL, config="tsv_format", labels={"entails": 1, "neutral": 0}
    ),
    "wic": Benchmark("Deehan1866/WiC", PAIR, in_domain=True),
    "sick": Benchmark("RobZamp/sick", SICK, "refs/convert/parquet"),
    "sts12": Benchmark("mteb/sts12-sts", STS, "a0d554a64d88156834ff5ae9920b964011b16384"),
    "stsb": Benchmark(
        "mteb/stsbenchmark-sts", STS, "b0fddb56ed78048fa8b90373c8a3cfc37b684831", in_domain=True
    ),
}


def load_hub_split(task, split):
    """The rows of one split of one of the nine benchmarks, with our column names and labels."""
    import datasets  # here, because it is slow to import and the Hub alone needs it

    datasets.logging.set_verbosity_error()
    datasets.disable_progress_bars()
    source = HUB[task]
    with reading(f"{task} ({source.dataset}, {split}) from the Hub; --data DIR works offline"):
        data = datasets.load_dataset(
            source.dataset, source.config, split=split, revision=source.revision
        )
    if missing := set(source.columns) - set(data.column_names):
        there = ", ".join(data.column_names)
        fail(f"{source.dataset} has no column {', '.join(sorted(missing))}; it has {there}")
    data = data.select_columns(list(source.columns))
    rows = [{ours: row[theirs] for theirs, ours in source.columns.items()} for row in data]
    for row in rows if source.labels else []:
        if row["label"] not in source.labels:
            known = ", ".join(source.labels)
            fail(f"{source.dataset} has the label {row['label']!r}; known: {known}")
        row["label"] = source.labels[row["label"]]
    return rows
