"""Plausible mistakes get one line, files are whole or absent, and no input is written over."""

import os
import resource
import shutil
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import SENTENCES, in_a_process, put
from safetensors.torch import load_file, save_file

import cache_teacher
import eval as evaluation
import talas
from support import attempt

SCRIPTS = {  # and the flags of each, which a row of the table may override
    "cache": (cache_teacher.main, "--corpus corpus.jsonl --output new.pt"),
    "talas": (talas.main, "--teacher teacher.pt --output new --batch_size 16"),
    "eval": (evaluation.main, "--data data --json new.json"),
}
ROWS = np.random.default_rng(0).normal(size=(48, 4))
LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"
PAIR, OTHER = {"sentence1": "a", "sentence2": "b"}, {"sentence1": "c", "sentence2": "d"}
SELF = [dict.fromkeys(PAIR, text) | {"score": len(text)} for text in SENTENCES]
TEXTS = [{"text": "a", "label": 0}, {"text": "b", "label": 1}]
a_model, array = partial(shutil.copytree, "bert"), partial(partial, np.save)
NAN, LESS = float("nan"), {"text": "b", "label": ""}
MANY = {"text": "a", "label": ["x", "y"]}
INF, NANS = np.float64("inf"), torch.full((48, 4), NAN)
TASK, TRAIN = "data/mine/test.jsonl", "data/mine/train.jsonl"


class Hostile:
    def __reduce__(self):  # a pickle of this runs code
        return open, ("it-was-here", "w")


def saved(**values):  # a cache some of whose values are others
    return lambda path: torch.save(torch.load("teacher.pt") | values, path)


def flip_a_byte(path):
    run("cache", "--output", path)
    raw, values = bytearray(path.read_bytes()), torch.load(path)["embeddings"].numpy().tobytes()
    raw[raw.index(values) + 1001] ^= 1
    path.write_bytes(raw)


def torn(path):  # a model with a weight that is no number
    a_model(path)
    weights = load_file(path / "model.safetensors")
    next(iter(weights.values()))[:] = NAN
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})


MISTAKES = [  # a script and its flags, words of the answer between "|", files that are there
    ("cache --corpus nowhere.txt", "cannot read nowhere.txt: No such file"),
    ("cache --corpus c.jsonl", "c.jsonl, line 1|surrogates", ("c.jsonl", '{"text": "\\ud83d b"}')),
    ("cache --corpus c.json", "c.json|.txt, .jsonl, .csv and .tsv", ("c.json", "[]")),
    ("cache --corpus c.csv", "needs a column named text|'txt'", ("c.csv", "txt,source\na,b\n")),
    ("cache --corpus c.jsonl", "named text, of text|{'text': 3}", ("c.jsonl", [{"text": 3}])),
    ("cache --corpus c.csv", "c.csv, line 3|fewer than 2", ("c.csv", "text,source\na,b\nc\n")),
    ("cache --corpus c.csv", "line 2|more than 2|quote", ("c.csv", "text,source\na, b,c\n")),
    ("cache --corpus c.csv", "c.csv, line 1|columns of one name", ("c.csv", "text,text\na,b\n")),
    ("cache --corpus c.tsv", 'line 3|begins with "', ("c.tsv", 'text\na\n"b\nc"\nd\n')),
    ("cache --corpus c.jsonl", "line 1|no object", ("c.jsonl", "3\n")),
    ("cache --corpus c.jsonl", "line 1|repeated", ("c.jsonl", '{"text": "a", "text": "b"}\n')),
    ("cache --corpus c.txt", "c.txt|save it as UTF-8", ("c.txt", "a dog".encode("utf-16"))),
    ("cache --corpus c.jsonl", "save it as UTF-8, not packed", ("c.jsonl", b"\x1f\x8b\x08\x00")),
    ("cache --corpus paper", "./paper", ("paper", a_model)),
    ("cache --teacher e.npz", "e.npz|.npy and .pt", ("e.npz", b"PK")),
    ("cache --teacher e.npy", "e.npy has 47 rows|48 sentences", ("e.npy", array(arr=ROWS[1:]))),
    ("cache --teacher e.npy", "(48,)|(sentences, dimensions)", ("e.npy", array(arr=ROWS[:, 0]))),
    ("cache --teacher e.npy", "e.npy|int64|floats", ("e.npy", array(arr=ROWS.astype(int)))),
    ("cache --teacher e.npy", "e.npy|numpy.save wrote: the magic", ("e.npy", LFS)),
    ("cache --teacher e.pt", "e.pt|torch.save did not write it|Git LFS", ("e.pt", LFS)),
    ("cache --teacher e.npy", "e.npy|can't convert", ("e.npy", array(arr=np.array(SENTENCES)))),
    ("cache --teacher teacher.pt", "teacher.pt: <class 'dict'> is no array"),
    ("cache --teacher e.npy", "or small for float32", ("e.npy", array(arr=1e-17 * ROWS))),
    ("cache --teacher e.npy", "e.npy: embeddings are zero", ("e.npy", array(arr=0 * ROWS))),
    ("cache --teacher e.npy", "e.npy|not finite", ("e.npy", array(arr=INF * ROWS))),
    ("cache --teacher lsa", "./lsa", ("lsa", a_model)),
    ("cache --over", "--over"),
    ("cache --output teacher.pt", "something else (48 sentences, random)|--overwrite"),
    ("cache --output no/such/t.pt", "--output|no/such/t.pt|a folder that exists"),
    ("cache --output x/", "--output 'x/'|a file's name"),
    ("cache --output=", "--output ''|a file's name"),
    ("cache --output l --overwrite", "l is a link", ("l", partial(os.symlink, "teacher.pt"))),
    ("cache --output corpus.jsonl --overwrite", "is the --corpus itself|another --output"),
    ("cache --output h --overwrite", "--corpus itself", ("h", partial(os.link, "corpus.jsonl"))),
    ("cache --teacher e.npy --output e.npy", "is the --teacher itself", ("e.npy", array(arr=ROWS))),
    ("talas --student tiny", "./tiny", ("tiny", a_model)),
    ("talas --teacher nowhere.pt", "nowhere.pt is no teacher cache|python cache_teacher.py"),
    ("talas --teacher e.npy", "e.npy is no|--teacher e.npy", ("e.npy", array(arr=ROWS))),
    ("talas", "teacher.pt|a part is missing", ("teacher.pt", lambda path: os.truncate(path, 5000))),
    ("talas --teacher c.pt", "c.pt|is damaged|make it anew", ("c.pt", flip_a_byte)),
    ("talas --teacher c.pt", "c.pt has format 9|make it anew", ("c.pt", saved(version=9))),
    ("talas --teacher c.pt", "it has no sentences", ("c.pt", lambda p: torch.save({}, p))),
    ("talas --teacher c.pt", "fingerprint", ("c.pt", saved(sentences=SENTENCES[::-1]))),
    ("talas --teacher c.pt", "c.pt|1 unlike sentences", ("c.pt", saved(sentences=["a"] * 48))),
    ("talas --teacher c.pt", "c.pt|1 sources", ("c.pt", saved(sources=["a"]))),
    ("talas --teacher c.pt", "c.pt|float64", ("c.pt", saved(embeddings=NANS.double()))),
    ("talas --teacher c.pt", "c.pt|damaged", ("c.pt", saved(embeddings=NANS, checksum=None))),
    ("talas --teacher c.pt", "c.pt|more than tensors", ("c.pt", saved(teacher=Hostile()))),
    ("talas --output teacher.pt --overwrite", "is the --teacher itself"),
    ("talas --output data --overwrite", "data holds neither a run nor a model"),
    ("talas --output corpus.jsonl --overwrite", "cannot write --output corpus.jsonl: File exists"),
    ("eval bert --json corpus.jsonl", "corpus.jsonl holds something else than scores"),
    ("eval bert bert", "bert|twice"),
    ("eval bert --tasks stsb", "no task stsb in data; there are: sts"),
    ("eval bert --data nowhere", "--data nowhere|neither demo nor hub"),
    ("eval bert", "mine|sentence1,sentence2,label|labels", (TASK, [PAIR | {"labels": 1}])),
    ("eval bert", "0 or 1|2", (TASK, [PAIR | {"label": 1}, OTHER | {"label": 2}])),
    ("eval bert", "same score", (TASK, [PAIR | {"score": 2}, OTHER | {"score": 2}])),
    ("eval bert", "same cosine", (TASK, SELF)),
    ("eval bert", "row 1 of mine, test|score is missing", (TASK, [PAIR | {"score": NAN}])),
    ("eval bert", "row 2 of mine, train|missing", (TASK, TEXTS), (TRAIN, [TEXTS[0], LESS])),
    ("eval bert", "row 1 of mine|is not text", (TASK, [PAIR | {"sentence2": 3, "score": 1}])),
    ("eval bert", "mine/test.jsonl|No such file", ("data/mine/tests.jsonl", TEXTS)),
    ("eval torn", "torn gives embeddings that are not finite", ("torn", torn)),
    ("eval lsa", "lsa belongs to the demo|data/corpus.jsonl"),
    ("eval bert", "train.jsonl|No such file", (TASK, TEXTS)),
    ("eval bert", "mine|train lacks: [1.0]", (TASK, TEXTS), (TRAIN, [TEXTS[0], TEXTS[0]])),
    ("eval bert", "train lacks: [0.0]", (TASK, TEXTS), (TRAIN, [{"text": "c", "label": "1"}])),
    ("eval bert", "called avg", ("data/avg/test.jsonl", [PAIR | {"score": i} for i in range(3)])),
    ("eval bert", "tasks.json|in_domain", ("data/tasks.json", '{"in_domain": ["other"]}')),
    ("eval bert", "tasks.json|in_domain", ("data/tasks.json", '["sts"]')),
    ("eval bert", "tasks.json|in_domain", ("data/tasks.json", '{"in_domian": ["sts"]}')),
    ("eval bert", "row 1 of mine, train|unhashable", (TASK, TEXTS), (TRAIN, [MANY, *TEXTS])),
    ("eval bert", "row 1 of mine, test|score is missing", (TASK, [PAIR | {"score": None}])),
    ("eval tiny", "./tiny", ("tiny", a_model)),
    ("eval bert --data demo", "./demo", ("demo", a_model)),
    ("eval bert --data hub", "./hub", ("hub", a_model)),
]


@pytest.fixture
def work(here):
    """The current folder, with corpus.jsonl, teacher.pt, bert and a task."""
    rows = [PAIR | {"sentence2": text, "score": i} for i, text in enumerate(SENTENCES)]
    return put(here, {"data/sts/test.jsonl": rows})


def run(script, *flags):
    main, base = SCRIPTS[script]
    main([*base.split(), *map(str, flags)])


def all_of(folder):
    """The files below a folder: where each is, what it is, and what it holds."""
    files = sorted(path for path in folder.rglob("*") if not path.is_dir() or path.is_symlink())
    return [(path, path.is_symlink(), path.is_file() and path.read_bytes()) for path in files]


@pytest.mark.parametrize("row", MISTAKES, ids=lambda row: f"{row[0]}: {row[1]}")
def test_a_plausible_mistake_is_one_line_and_changes_nothing(row, work, ends_with_one_line):
    command, words, *given = row
    put(work, dict(given))
    before = all_of(work)
    ends_with_one_line(lambda: run(*command.split()), *words.split("|"))
    assert all_of(work) == before


def test_a_bug_of_ours_keeps_its_traceback(work, monkeypatch):
    for module, name in ((cache_teacher, "fit_lsa"), (talas, "train"), (evaluation, "score")):
        monkeypatch.setattr(module, name, lambda *_: {}["our bug"])
    for flags in (["cache"], ["talas", "--epochs", 1], ["eval", "bert"]):
        with pytest.raises(KeyError, match="our bug"):
            run(*flags)
    with pytest.raises(AttributeError), attempt("read it"):
        None.read()


@pytest.mark.parametrize("command", ["cache --overwrite --output", "eval bert --json"])
def test_a_full_disk_leaves_the_earlier_file_whole(command, work):
    def on_a_full_disk():
        sys.stdout = sys.stderr = open(os.devnull, "w")  # which may be files, too
        resource.setrlimit(resource.RLIMIT_FSIZE, (90, 90))  # bytes of a file
        run(*command.split(), "file.pt")

    put(work, {"file.pt": '{"bert": {"avg_out": 1}}'})
    before = all_of(work)
    assert in_a_process(on_a_full_disk) == 2 and all_of(work) == before
    os.link("file.pt", "another name")
    run(*command.split(), "file.pt")  # takes the place, writes nothing over
    assert Path("another name").read_text() == '{"bert": {"avg_out": 1}}'


def test_no_input_is_written_over(work):
    np.save(work / "e.npy", ROWS)
    before = all_of(work)
    for teacher in ("bert", "e.npy", "lsa"):
        run("cache", "--teacher", teacher, "--overwrite")
    run("talas", "--teacher", "new.pt", "--student", "bert", "--epochs", 1)
    run("eval", "bert", "new")
    evaluation.main(["bert", "--data", "data"])  # no --json, no file
    assert [one for one in all_of(work) if "new" not in str(one[0])] == before
