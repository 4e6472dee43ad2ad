"""Sentences and benchmarks: tables in files, the corpora, the nine benchmarks on the Hub.

A table is a list of dicts, a row each. What is not understood is refused, with its line.
"""

import csv
import io
import json
import os
from pathlib import Path

import numpy as np
import torch

from support import attempt, fail
from support.encoder import pad, tokenize
from support.files import digest

DEMO = Path(__file__).parent.parent / "demo"
IN_DOMAIN = ["emotion", "wic", "stsb"]


def is_word(name, *words):
    """Whether a name is one of these words of ours. Ends the program if something is called so."""
    if name in words and Path(name).exists() and not os.path.samefile(name, DEMO):
        fail(f"{name} is a word of this program, and something here is called so; write ./{name}")
    return name in words


# ---------------------------------------------------------------------------------- tables in files
def read_table(path):
    """Rows of a .jsonl, .csv or .tsv file as dicts, of a .txt file as {"text": line}."""
    path = Path(path)
    if path.suffix not in (".txt", ".jsonl", ".csv", ".tsv"):
        fail(f"{path}: .txt, .jsonl, .csv and .tsv files are read")
    with attempt(f"read {path}", OSError):
        content = path.read_bytes()
    with attempt(f"read {path}; save it as UTF-8, not packed"):
        text = content.decode("utf-8-sig")
    if path.suffix in (".csv", ".tsv"):
        return read_csv(path, text)
    lines = text.removesuffix("\n").split("\n")  # splitlines would cut at U+2028 and its like, too
    if path.suffix == ".txt":
        return [{"text": line.removesuffix("\r")} for line in lines]
    rows = []
    for number, line in enumerate(lines, 1):
        with attempt(f"read {path}, line {number}", ValueError):
            rows += [json.loads(line, object_pairs_hook=a_row)] if line.strip() else []
            json.dumps(rows[-1:], ensure_ascii=False).encode()  # fails at half a character
            if rows and not isinstance(rows[-1], dict):
                raise ValueError("it is no object with columns")
    return rows


def a_row(pairs):
    """A JSON object as a dict; ValueError if a key is repeated."""
    if len(dict(pairs)) < len(pairs):
        raise ValueError(f"a column is repeated: {[key for key, _ in pairs]}")
    return dict(pairs)


def read_csv(path, text):
    """The rows of a .csv or .tsv file, whose first line names the columns."""
    tabs, rows, start = path.suffix == ".tsv", [], 1
    lines = csv.reader(io.StringIO(text), delimiter="\t" if tabs else ",", strict=True)
    try:
        names = [name.strip() for name in next(lines, [])]
        if len(set(names)) < len(names):
            raise csv.Error(f"two columns of one name: {names}")
        start = lines.line_num + 1
        for fields in filter(None, lines):
            if len(fields) > len(names):
                raise csv.Error(f"it has more than {len(names)} fields; quote one with a comma")
            if len(fields) < len(names):
                raise csv.Error(f"it has fewer than {len(names)} fields")
            if tabs and any("\n" in field for field in fields):  # where a quote is often just that
                raise csv.Error('a field begins with " and swallows the next line')
            rows.append(dict(zip(names, fields)))
            start = lines.line_num + 1
    except csv.Error as error:
        fail(f"cannot read {path}, line {start}: {error}")
    return rows


# -------------------------------------------------------------------------------------- the corpus
def read_corpus(name, seed=42):
    """(sentences, sources) of `demo`, `paper` or a file: lists of n str, as they stand there.

    A file without a source column is one domain, named after the file.
    """
    if is_word(name, "paper"):
        return paper_corpus(seed)
    rows = read_table(DEMO / "corpus.jsonl" if is_word(name, "demo") else name)
    for number, row in enumerate(rows, 1):
        if not isinstance(row.get("text"), str):
            fail(f"{name} needs a column named text, of text; row {number} is {row}")
    own = [row.get("source") for row in rows]
    sources = [Path(name).stem if source in (None, "") else str(source) for source in own]
    return [row["text"] for row in rows], sources


def paper_corpus(seed):
    """Appendix D: 5,000 sentences of Emotion, 2,500 pairs each of WiC and STS-B, from train."""
    rng = np.random.default_rng(seed)
    sentences, sources = [], []
    for task, count in {"emotion": 5000, "wic": 2500, "stsb": 2500}.items():
        rows = load_hub_split(task, "train")
        for i in rng.choice(len(rows), min(count, len(rows)), replace=False):
            texts = [rows[i][c] for c in ("text", "sentence1", "sentence2") if c in rows[i]]
            sentences += texts
            sources += [task] * len(texts)
    return sentences, sources


def unique_corpus(name, seed=42):
    """(texts, sources, kept, n): no blank sentences, no repeats (Appendix D); blanks around go.

    kept: the positions of the texts among the corpus's n sentences. Prints how many went. Ends the
    program if none is left.
    """
    sentences, sources = read_corpus(name, seed)
    texts, first = [sentence.strip() for sentence in sentences], {}  # text -> its first position
    for i, text in enumerate(texts):
        first.setdefault(text, i)
    first.pop("", None)
    if len(first) < len(texts):
        blank, left = texts.count(""), len(first)
        counts = f"{blank} blank and {len(texts) - blank - left} repeated removed, {left} left"
        print(f"{len(texts)} sentences: {counts}")
    if not first:
        fail(f"the corpus {name} holds no sentence")
    kept = list(first.values())
    return list(first), [sources[i] for i in kept], kept, len(texts)


class Corpus:
    """The tokenised sentences of a cache, their cached targets and their domains."""

    def __init__(self, cache, encoder):
        self.encoder = encoder
        self.tokens = tokenize(encoder, cache["sentences"])
        self.embeddings = cache["embeddings"]  # (n, d_T), on disk; None: no teacher
        self.domains = torch.from_numpy(np.unique(cache["sources"], return_inverse=True)[1])

    def __len__(self):
        return len(self.domains)

    @property
    def d_T(self):
        """The teacher's dimension; None without a teacher."""
        return None if self.embeddings is None else self.embeddings.shape[1]

    def batch(self, rows):
        """Positions (N,) -> tokens, (N, T) each; E^T, (N, d_T), or None; domains, (N,)."""
        device = self.encoder.model.device
        tokens = pad(self.tokens, rows, self.encoder.model)
        teacher = None
        if self.embeddings is not None:
            teacher = self.embeddings[rows].float().to(device)
        return tokens, teacher, self.domains[rows].to(device)

    def identity(self):
        """A hash of what is learnt from, tokens, targets and domains, and of who learns."""
        parts = [self.encoder.identity(), self.tokens.ids, self.tokens.starts, self.domains]
        if self.embeddings is not None:
            parts.append(self.embeddings)
        return digest(*parts)


# ------------------------------------------------------------------ the nine benchmarks on the Hub
TEXT, PAIR, STS = "text label", "sentence1 sentence2 label", "sentence1 sentence2 score"
SICK, TWEET = "sentence_A sentence_B relatedness_score", "mteb/tweet_sentiment_extraction"
HUB = {  # in Table 1's order: dataset, configuration, revision, the columns that are read
    "banking77": ("mteb/banking77", None, "18072d2685ea682290f7b8924d94c62acc19c0b2", TEXT),
    "tweet": (TWEET, None, "7261898ee3b9a739595e8dbf41df6b2332f429bb", TEXT),
    "emotion": ("mteb/emotion", None, "13535ec7ed83ac3920c40db3c3fd4133af55cc06", TEXT),
    "mrpc": ("nyu-mll/glue", "mrpc", None, PAIR),
    "scitail": ("allenai/scitail", "tsv_format", None, "premise hypothesis label"),
    "wic": ("Deehan1866/WiC", None, None, PAIR),
    "sick": ("RobZamp/sick", None, "refs/convert/parquet", SICK),
    "sts12": ("mteb/sts12-sts", None, "a0d554a64d88156834ff5ae9920b964011b16384", STS),
    "stsb": ("mteb/stsbenchmark-sts", None, "b0fddb56ed78048fa8b90373c8a3cfc37b684831", STS),
}
OURS = {"premise": "sentence1", "hypothesis": "sentence2", "relatedness_score": "score"}
OURS |= {"sentence_A": "sentence1", "sentence_B": "sentence2"}  # what theirs are called here


def load_hub_split(task, split):
    """The rows of one split of one of the nine benchmarks, with our column names and labels."""
    import datasets  # here, because it is slow to import and the Hub alone needs it

    datasets.logging.set_verbosity_error()
    datasets.disable_progress_bars()
    name, config, revision, columns = HUB[task]
    instead = "your own file (--corpus) or folder (--data) works offline"
    with attempt(f"load {task} ({name}, {split}) from the Hub; {instead}"):
        data = datasets.load_dataset(name, config, split=split, revision=revision)
        data = data.select_columns(columns.split())
    rows = [{OURS.get(column, column): value for column, value in row.items()} for row in data]
    for row in rows if task == "scitail" else []:
        row["label"] = {"entails": 1, "neutral": 0}.get(row["label"], row["label"])
    return rows
