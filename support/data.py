"""Sentences and benchmarks: tables in files, corpora, the nine benchmarks on the Hub.

A table is a list of dicts, one for each row.
"""

import csv
import io
import json
from pathlib import Path

import numpy as np
import torch

from support import attempt, fail
from support.encoder import pad, tokenize
from support.files import digest

DEMO = Path(__file__).parent.parent / "demo"
IN_DOMAIN = ["emotion", "wic", "stsb"]
# the nine benchmarks in Table 1's order: the dataset on the Hub, its columns and our names for them
HUB = json.loads(Path(__file__).with_name("benchmarks.json").read_text("utf-8"))


# ---------------------------------------------------------------------------------- tables in files
def read_table(path):
    """Rows of a .jsonl, .csv or .tsv file as dicts, of a .txt file as {"text": line}."""
    path = Path(path)
    with attempt(f"read {path} as UTF-8 text"):
        text = path.read_text("utf-8-sig")
    lines = text.removesuffix("\n").split("\n")  # splitlines would also split at U+2028
    if path.suffix == ".txt":
        return [{"text": line} for line in lines]
    if path.suffix == ".jsonl":
        return read_jsonl(path, lines)
    if path.suffix in (".csv", ".tsv"):
        return read_csv(path, text)
    fail(f"{path}: only .txt, .jsonl, .csv and .tsv files can be read")


def read_jsonl(path, lines):
    """The rows of a .jsonl file: an object on each line; blank lines are skipped."""
    rows = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        with attempt(f"read {path}, line {number}", ValueError):
            row = json.loads(line)
        if not isinstance(row, dict):
            fail(f"cannot read {path}, line {number}: it is not a JSON object")
        rows.append(row)
    return rows


def read_csv(path, text):
    """The rows of a .csv or .tsv file, whose first line names the columns."""
    delimiter = "\t" if path.suffix == ".tsv" else ","
    reader = csv.DictReader(
        io.StringIO(text), delimiter=delimiter, strict=True, skipinitialspace=True
    )
    with attempt(f"read {path} (is a quotation mark not closed?)", csv.Error):
        rows = list(reader)
    for number, row in enumerate(rows, 1):
        if None in row or None in row.values():  # surplus fields have the key None
            fail(
                f"{path}, row {number} does not have {len(reader.fieldnames)} fields; "
                "quote one with a comma"
            )
    return rows


# -------------------------------------------------------------------------------------- the corpus
def read_corpus(name, seed=42):
    """(sentences, sources) of `demo`, `paper` or a file: two lists of n str, unchanged.

    A source is a sentence's domain. In a file without that column, all have the file's name.
    """
    if name == "paper":
        return paper_corpus(seed)
    sentences, sources = [], []
    for number, row in enumerate(read_table(DEMO / "corpus.jsonl" if name == "demo" else name), 1):
        if not isinstance(row.get("text"), str):
            fail(f"{name} needs a column named text, of text; row {number} has {list(row)}")
        sentences.append(row["text"])
        sources.append(str(row.get("source") or Path(name).stem))
    return sentences, sources


def paper_corpus(seed):
    """Appendix D: 5,000 sentences of Emotion, 2,500 pairs each of WiC and STS-B, from train."""
    rng = np.random.default_rng(seed)
    sentences, sources = [], []
    for task, count in {"emotion": 5000, "wic": 2500, "stsb": 2500}.items():
        rows = load_hub_split(task, "train")
        for row in rng.choice(rows, count, replace=False):
            for column in ("text", "sentence1", "sentence2"):
                if column in row:
                    sentences.append(row[column])
                    sources.append(task)
    return sentences, sources


def unique_corpus(name, seed=42):
    """(texts, sources, kept, n): a corpus without blank and repeated sentences (Appendix D).

    kept: the positions of the texts among the corpus's n sentences. Surrounding blanks are
    stripped. Prints how many sentences were removed; ends the program if none is left.
    """
    sentences, all_sources = read_corpus(name, seed)
    first_position = {}
    for i, sentence in enumerate(sentences):
        first_position.setdefault(sentence.strip(), i)
    first_position.pop("", None)
    texts = list(first_position)
    kept = list(first_position.values())
    if len(texts) < len(sentences):
        print(f"{len(sentences)} sentences; {len(texts)} without the blank and the repeated ones")
    if not texts:
        fail(f"the corpus {name} has no sentences")
    return texts, [all_sources[i] for i in kept], kept, len(sentences)


class Corpus:
    """The tokenised sentences of a cache, their targets and their domains."""

    def __init__(self, cache, encoder):
        self.encoder = encoder
        self.sentences = cache["sentences"]
        self.tokens = tokenize(encoder, self.sentences)
        self.embeddings = cache["embeddings"]  # (n, d_T), on disk; None without a teacher
        self.domains = torch.from_numpy(np.unique(cache["sources"], return_inverse=True)[1])

    def __len__(self):
        return len(self.domains)

    def batch(self, rows):
        """Positions (N,) -> tokens, (N, T) each; E^T, (N, d_T), or None; domains, (N,)."""
        model = self.encoder.model
        tokens = pad(self.tokens, rows, model)
        teacher = None
        if self.embeddings is not None:
            teacher = self.embeddings[rows].float().to(model.device)
        return tokens, teacher, self.domains[rows].to(model.device)

    def identity(self):
        """A hash of the sentences, targets and domains, and of the encoder without its weights."""
        return digest(self.encoder.identity(), self.sentences, self.domains, self.embeddings)


# ------------------------------------------------------------------ the nine benchmarks on the Hub
def load_hub_split(task, split):
    """The rows of one split of one of the nine benchmarks, with our column names and labels."""
    import datasets  # here, because it is slow to import and only the Hub needs it

    benchmark = HUB[task]
    source = benchmark["source"]  # dataset, configuration and revision
    columns = benchmark["columns"]
    with attempt(
        f"load {task} ({source['path']}, {split}) from the Hub; your own file (--corpus) or folder "
        "(--data) works offline"
    ):
        data = datasets.load_dataset(**source, split=split)
    rows = data.select_columns(list(columns)).rename_columns(columns).to_list()
    labels = benchmark.get("labels", {})  # their names -> numbers
    for row in rows:
        if row.get("label") in labels:
            row["label"] = labels[row["label"]]
    return rows
