"""cache_teacher.py: what is embedded, which rows belong together, what is kept and gone on with."""

import functools
import json
import os
import signal
from contextlib import contextmanager
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import SENTENCES, SOURCES, alone, in_a_process, put
from scipy.stats import spearmanr
from transformers import BertModel

import cache_teacher
import eval as evaluation
import talas
from cache_teacher import DTYPES, fit_lsa
from demo.tiny import tiny_student
from support.data import read_corpus
from support.encoder import encode, tokenize
from support.loading import load_encoder


def run(*flags):
    cache_teacher.main([str(flag) for flag in flags])
    path = [after for flag, after in zip(flags, flags[1:]) if flag == "--output"][-1]
    return torch.load(path, weights_only=True, mmap=True)


def the_same(a, b):
    return all(torch.equal(a[k], b[k]) if k == "embeddings" else a[k] == b[k] for k in a | b)


# ------------------------------------------------------------------------------------ the teachers
@pytest.mark.parametrize("pooling, dtype", [*zip(["cls", "last", "mean"], DTYPES)])
def test_algorithm1_line_3_caches_what_a_model_gives(pooling, dtype, tmp_path, corpus, bert):
    flags = ["--teacher", bert, "--corpus", corpus, "--batch_size", 5, "--dtype", dtype]
    asked = pooling.replace("cls", "auto")
    cache = run(*flags, "--pooling", asked, "--output", tmp_path / "t.pt")
    keys = {"sentences", "sources", "embeddings", "teacher", "pooling", "max_length", "fingerprint"}
    assert set(cache) == keys | {"version", "recipe", "checksum"}
    assert (cache["sentences"], cache["sources"]) == (SENTENCES, SOURCES)
    assert (cache["teacher"], cache["pooling"], cache["max_length"]) == (str(bert), pooling, 256)
    assert cache["embeddings"].dtype == (torch.float16 if dtype == "float16" else torch.float32)
    expected = alone(bert, pooling, SENTENCES)
    distance = (cache["embeddings"].float() - expected).norm(dim=1) / expected.norm(dim=1)
    assert distance.max() < 1e-6 if dtype == "float32" else distance.min() > 1e-5
    assert distance.max() < 0.1


def test_lsa_puts_words_of_the_same_company_together_and_is_the_same_again():
    state, texts = np.random.get_state()[1].tolist(), read_corpus("demo")[0][:2000]
    lsa, again = fit_lsa(texts), fit_lsa(texts)
    assert (lsa.transform(texts[:99]) == again.transform(texts[:99])).all()
    assert np.random.get_state()[1].tolist() == state
    for triple in ("doctor physician skipper", "bread baguette anchor", "boat vessel cake"):
        a, b, c = (v / np.linalg.norm(v) for v in lsa.transform(triple.split()))
        assert a.shape == (32,) and a @ b > a @ c + 0.3
    assert not lsa.transform(["in"]).any()  # a word of many sentences


# ----------------------------------------------------------------------- rows that belong together
A, B, C, D, E = (SENTENCES[i] for i in (0, 9, 22, 31, 47))
LINES = [A, f"  {B} ", "", A, "?!", C, "\t", B, D, f"{A} ", E]
KEPT, UNIQUE = [0, 1, 5, 8, 10], [0, 1, 4, 5, 8, 10]  # lsa and the arrays have nothing for line 4


@pytest.fixture
def gaps(here):
    """Flags of a corpus whose blanks, repeats and zero rows are in its middle, a source a line."""
    rows = [{"text": text, "source": f"s{i}"} for i, text in enumerate(LINES)]
    put(here, {"corpus.jsonl": rows})
    return ["--corpus", "corpus.jsonl", "--output", "t.pt"]


@pytest.mark.parametrize("teacher", ["lsa", "bert", "e.npy", "e.pt"])
def test_rows_that_belong_together_stay_together(teacher, gaps, capsys):
    array = np.arange(1.0, 34).reshape(11, 3)
    array[4], array[5] = 0, 1e-10 * array[5]  # which is short, but has a direction
    np.save("e.npy", array)
    torch.save(torch.from_numpy(array), "e.pt")
    cache, kept = run(*gaps, "--teacher", teacher), UNIQUE if teacher == "bert" else KEPT
    out = capsys.readouterr().out
    assert "11 sentences: 2 blank and 3 repeated removed, 6 left" in out
    assert ("1 sentences removed: their embeddings are zero" in out) == (kept == KEPT)
    texts, expected = [LINES[i].strip() for i in kept], array[kept]
    assert (cache["sentences"], cache["sources"]) == (texts, [f"s{i}" for i in kept])
    if teacher == "lsa":
        expected = fit_lsa([A, B, "?!", C, D, E]).transform(texts)
    elif teacher == "bert":
        encoder = load_encoder("bert")
        expected = torch.cat([encode(encoder, tokenize(encoder, [text]), 1) for text in texts])
    torch.testing.assert_close(cache["embeddings"], torch.as_tensor(expected).float())
    assert (cache["embeddings"][2] != 0).all()


@pytest.mark.parametrize("name", ["lsa", "tiny"])
def test_eval_makes_the_teacher_and_the_student_of_the_same_sentences(name, gaps, here):
    vectors, pairs = run(*gaps)["embeddings"], list(combinations((A, B, C, D, E), 2))
    if name == "tiny":
        tiny = tiny_student([A, B, "?!", C, D, E], seed=talas.Settings().seed)
        vectors = encode(tiny, tokenize(tiny, [A, B, C, D, E]), 2)
    rows = [{"sentence1": a, "sentence2": b, "score": len(a + b)} for a, b in pairs]
    put(here, {"task/test.jsonl": rows})
    evaluation.main([name, "--tasks", "task", "--data", ".", "--json", "scores.json"])
    cosines = [torch.cosine_similarity(a, b, 0) for a, b in combinations(vectors, 2)]
    expected = 100 * spearmanr(cosines, [row["score"] for row in rows]).statistic
    assert json.loads(Path("scores.json").read_text())[name]["task"] == pytest.approx(expected)


def test_a_table_is_read_as_it_was_meant(here):
    def read(name, content):
        Path(name).write_text(content, encoding="utf-8", newline="")
        return read_corpus(name)

    quoted = '\ufeffsource,text\r\nx,"a, ""b""\nc"\r\ny,d\r\n'
    assert read("c.csv", quoted) == (['a, "b"\nc', "d"], ["x", "y"])
    assert read("c.tsv", "text \t source\n\na, b\t\n") == (["a, b"], ["c"])
    assert read("c.jsonl", '\n{"text": "\u2028\x85", "source": 3}\n') == (["\u2028\x85"], ["3"])
    assert read("c.txt", 'a "b, \r\n\nd\x0be') == (['a "b, ', "", "d\x0be"], ["c"] * 3)
    assert read("theirs.csv", ",text,source\n0,i,wic\n7,a,sts\n") == (["i", "a"], ["wic", "sts"])


# -------------------------------------------------------------------------- interrupted and gone on
@contextmanager
def batches(last=None, end=None):
    """A list of the sizes of BERT's batches, filled in this block; a signal ends it at the last."""
    sizes, forward = [], BertModel.forward

    @functools.wraps(forward)
    def noted(self, *args, **how):
        sizes.extend({len(how["input_ids"])} - {1})  # 1: when a model is loaded
        if len(sizes) == last:
            os.kill(os.getpid(), end)
        return forward(self, *args, **how)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(BertModel, "forward", noted)
        yield sizes


ROW_12 = (np.arange(48) == 12)[:, None]
INTERRUPTED = {  # how a run ended, what became of its part, the batches still to do, more flags
    "killed": (signal.SIGKILL, lambda rows: rows, [5, 5, 3]),
    "Ctrl-C": (signal.SIGINT, lambda rows: rows, [5, 5, 3]),
    "a hole": (signal.SIGKILL, lambda rows: np.where(ROW_12, 0, rows), [5] * 7 + [3]),
    "short": (signal.SIGKILL, lambda rows: rows[:40], [5] * 9 + [3]),
    "another": (signal.SIGKILL, lambda rows: rows, [5] * 9 + [3], "--max_length", 9),
}


@pytest.mark.parametrize("case", INTERRUPTED.values(), ids=INTERRUPTED)
def test_an_interrupted_run_goes_on_where_it_stopped(case, here, capfd):
    flags = ["--teacher", "bert", "--corpus", "corpus.jsonl", "--batch_size", 5, "--output"]
    end, spoil, left, *more = case

    def stopped():
        with batches(8, end):
            run(*flags, "t.pt")

    code, said = in_a_process(stopped), capfd.readouterr().err
    assert code == -9 or (code == 2 and "error: interrupted; the same command goes on" in said)
    (part,) = here.glob("t.pt.*")
    spoil(np.fromfile(part, np.float32).reshape(48, 33)).tofile(part)
    with batches() as sizes:
        resumed = run(*flags, "t.pt", *more)
    assert sizes == left and part.exists() == bool(more)
    assert the_same(resumed, run(*flags, "whole.pt", *more))


# ------------------------------------------------------------ what is there, and is it the same?
SWAP = {"door": "?", "boat": "door", "?": "boat"}
CHANGES = [  # between two runs: words or a bit of a file, or a flag of the second one
    ("e.npy", {}),
    ("bert/model.safetensors", {}),
    ("bert/tokenizer.json", SWAP),
    ("bert/config.json", {"gelu": "relu"}),
    ("corpus.jsonl", {"cook": "chef"}),
    ("corpus.jsonl", SWAP),  # another order
    ("corpus.jsonl", {'"a"': '"c"'}),  # other sources
    ("--max_length", 7),
    ("--pooling", "mean"),
    ("--dtype", "float16"),
]


@pytest.mark.parametrize("where, what", CHANGES)
def test_other_content_is_neither_kept_nor_replaced(where, what, here, capsys, ends_with_one_line):
    np.save("e.npy", np.random.default_rng(0).normal(size=(48, 3)))
    teacher = "bert" if "bert" in where or where == "--pooling" else "e.npy"
    given = ["--teacher", teacher, "--corpus", "corpus.jsonl", "--output", "t.pt"]
    before = run(*given)
    run(*given, "--teacher", here / teacher, "--batch_size", 3)
    assert "t.pt holds this already; kept as it is" in capsys.readouterr().out
    if where.startswith("--"):
        given += [where, what]
    else:
        raw = Path(where).read_bytes()
        raw = raw if what else raw[:-1] + bytes([raw[-1] ^ 1])
        for old, new in what.items():
            raw = raw.replace(old.encode(), new.encode())
        put(here, {where: raw})
    ends_with_one_line(lambda: run(*given), "something else", "--overwrite")
    after = run(*given, "--output", "new.pt")
    assert the_same(before, torch.load("t.pt")) and the_same(after, run(*given, "--overwrite"))
    same = before["sentences"] == after["sentences"]
    assert (before["fingerprint"] == after["fingerprint"]) == same
