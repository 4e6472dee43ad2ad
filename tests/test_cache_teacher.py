"""cache_teacher.py: what is embedded, which row is whose, what is kept and what resumes."""

import hashlib
import os
import signal
import sys
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from helpers import SENTENCES, SOURCES, embed_alone, in_a_process, random_rows, write_files

import cache_teacher
import support.encoder
from cache_teacher import fit_lsa, load_cache
from support import data
from support.data import Corpus, read_corpus
from support.files import digest
from support.loading import load_encoder

BERT = ["--teacher", "bert", "--corpus", "corpus.jsonl", "--batch_size", 5]  # 9 batches and 3
ARRAY = ["--teacher", "e.npy", "--corpus", "corpus.jsonl"]


def run(*flags, output="t.pt"):
    """Run the script; returns the cache that it leaves."""
    cache_teacher.main([*map(str, flags), "--output", output])
    return torch.load(output, weights_only=True)


def assert_same(cache, other):
    """Two caches are equal, embeddings bit for bit."""
    assert torch.equal(cache.pop("embeddings"), other.pop("embeddings"))
    assert cache == other


# ------------------------------------------------------------------------------------ the teachers
@pytest.mark.parametrize(
    "pooling, dtype, stored_dtype, least_error, most_error",
    [
        ("cls", "float32", torch.float32, 0, 1e-6),
        ("last", "float16", torch.float16, 1e-5, 0.1),
        ("mean", "bfloat16", torch.float32, 1e-5, 0.1),
    ],
)
def test_the_cache_has_what_the_model_gives(
    pooling, dtype, stored_dtype, least_error, most_error, here
):
    cache = run(*BERT, "--pooling", pooling, "--dtype", dtype)
    assert [cache["teacher"], cache["pooling"], cache["max_length"]] == ["bert", pooling, 256]
    assert cache["embeddings"].dtype == stored_dtype
    expected = embed_alone("bert", pooling, SENTENCES)
    error = (cache["embeddings"].float() - expected).norm() / expected.norm()
    assert least_error <= error < most_error


def test_flags_reach_the_teacher(here, monkeypatch):
    load = Mock(side_effect=SystemExit)
    monkeypatch.setattr(cache_teacher, "load_encoder", load)
    with pytest.raises(SystemExit):
        run(*BERT, "--pooling=mean", "--max_length=9", "--dtype=bfloat16", "--device=meta")
    load.assert_called_once_with("bert", "mean", 9, torch.bfloat16, torch.device("meta"))


def test_the_seed_reaches_the_papers_corpus(here, monkeypatch):
    paper_corpus = Mock(return_value=(SENTENCES, SOURCES))
    monkeypatch.setattr(data, "paper_corpus", paper_corpus)
    run("--corpus", "paper", "--seed", 7)
    paper_corpus.assert_called_once_with(7)


def test_the_readme_relies_on_these_defaults():
    assert vars(cache_teacher.parse_args([])) == {
        "teacher": "lsa",
        "corpus": "demo",
        "output": "teacher.pt",
        "overwrite": False,
        "pooling": "auto",
        "batch_size": 32,
        "max_length": 256,
        "dtype": "float32",
        "device": "auto",
        "seed": 42,
    }


def test_lsa_places_words_of_one_topic_together():
    texts = read_corpus("demo")[0][:2000]
    words = fit_lsa(texts).transform(["doctor", "physician", "skipper", "in"])
    doctor, physician, skipper, common = torch.from_numpy(words)
    same_topic = torch.cosine_similarity(doctor, physician, 0)
    assert same_topic > torch.cosine_similarity(doctor, skipper, 0) + 0.3
    assert not common.any()  # a word of many sentences


def test_lsa_is_the_same_again():
    first = fit_lsa(SENTENCES).transform(SENTENCES)
    assert (fit_lsa(SENTENCES).transform(SENTENCES) == first).all()


def test_lsa_removes_a_sentence_that_shares_no_word(here):
    related = [f"{topic} {letter}" for topic in range(40) for letter in "abc"]
    write_files(here, {"c.txt": "\n".join([*related, "Zxcvbn!"])})
    assert run("--corpus", "c.txt")["sentences"] == related


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_float16_cache_stays_on_disk_and_gives_float32_targets(here):
    array = random_rows(48, 4)
    np.save("e.npy", array)
    run(*ARRAY, "--dtype", "float16")
    corpus = Corpus(load_cache("t.pt"), load_encoder("bert"))
    assert str(here / "t.pt") in Path("/proc/self/maps").read_text()  # nothing else keeps it open
    _, targets, _ = corpus.batch(torch.tensor([3, 1]))
    torch.testing.assert_close(targets, array[[3, 1]].half().float())


def test_a_digest_is_of_all_bytes():
    tensor = torch.arange(2**24 + 5, dtype=torch.float32)
    expected = hashlib.sha256(tensor.numpy().tobytes() + b'"a"').hexdigest()
    assert digest(tensor[None], "a") == expected


# --------------------------------------------------------------------------- which row is whose
A, B, C, D, E = SENTENCES[:5]
LINES = [A, f"  {B} ", "", A, "?!", C, "\t", B, D, f"{A} ", E]  # blanks and repeats between


@pytest.fixture
def gaps(here):
    """The flags of a corpus of those lines, each with a source of its own."""
    rows = [{"text": text, "source": f"s{i}"} for i, text in enumerate(LINES)]
    write_files(here, {"gaps/corpus.jsonl": rows})
    return ["--corpus", "gaps/corpus.jsonl"]


@pytest.mark.parametrize("teacher", ["lsa", "bert", "e.npy", "e.pt"])
def test_each_sentence_keeps_its_source_and_its_row(teacher, gaps, capsys):
    array = np.arange(1.0, 34).reshape(11, 3)
    array[4] = 0
    array[5] *= 1e-10  # short, but it has a direction
    np.save("e.npy", array)
    torch.save(torch.from_numpy(array), "e.pt")
    cache = run(*gaps, "--teacher", teacher)
    printed = capsys.readouterr().out
    assert "11 sentences; 6 without the blank" in printed
    kept = [0, 1, 4, 5, 8, 10]
    if teacher != "bert":
        kept.remove(4)  # lsa has no word for "?!", the arrays have a row of zeros
        assert "1 sentences removed: their embeddings are zero" in printed
    texts = [LINES[i].strip() for i in kept]
    assert cache["sentences"] == texts
    assert cache["sources"] == [f"s{i}" for i in kept]
    expected = array[kept]
    if teacher == "lsa":
        expected = fit_lsa([A, B, "?!", C, D, E]).transform(texts)
    elif teacher == "bert":
        expected = embed_alone("bert", "cls", texts)
    torch.testing.assert_close(cache["embeddings"], torch.as_tensor(expected).float())


@pytest.mark.parametrize(
    "name, content, texts, sources",
    [
        ("c.csv", '\ufeffsource,text\r\nx,"a, ""b""\nc"\r\n', ['a, "b"\nc'], ["x"]),
        ("c.csv", ", text, source\n0,i,wic\n7,a,sts\n", ["i", "a"], ["wic", "sts"]),
        ("c.tsv", "text\tsource\n\na, b\t\n", ["a, b"], ["c"]),
        ("c.jsonl", '\n{"text": "\u2028\x85", "source": 3}\n', ["\u2028\x85"], ["3"]),
        ("c.txt", 'a "b, \r\n\nd\x0be', ['a "b, ', "", "d\x0be"], ["c"] * 3),
    ],
)
def test_a_table_is_read(name, content, texts, sources, here):
    Path(name).write_text(content, encoding="utf-8", newline="")
    assert read_corpus(name) == (texts, sources)


# ------------------------------------------------------------------------- interrupted and resumed
def record_batches(patch, last=None, last_signal=None):
    """The sizes of the batches embedded from here on; the signal comes at the last."""
    sizes = []
    pad = support.encoder.pad

    def recorded(tokens, rows, model):
        sizes.append(len(rows))
        if len(sizes) == last:
            signal.raise_signal(last_signal)
        return pad(tokens, rows, model)

    patch.setattr(support.encoder, "pad", recorded)
    return sizes


@pytest.mark.parametrize(
    "last_signal, exit_code, other_flags, sentences_left",
    [
        (signal.SIGKILL, -signal.SIGKILL, ["--max_length", 9], 48),
        (signal.SIGINT, 2, [], 13),  # Ctrl-C
    ],
)
def test_an_interrupted_run_resumes_to_the_same_bits(
    last_signal, exit_code, other_flags, sentences_left, here, monkeypatch
):
    def interrupted_run():
        record_batches(pytest.MonkeyPatch(), 8, last_signal)
        run(*BERT)

    assert in_a_process(interrupted_run) == exit_code
    sizes = record_batches(monkeypatch)
    resumed = run(*BERT, *other_flags)
    assert sum(sizes) == sentences_left
    assert_same(resumed, run(*BERT, *other_flags, output="whole.pt"))


def test_a_run_killed_while_saving_resumes(here, monkeypatch):
    def killed_run():
        cache_teacher.save = lambda path, cache: signal.raise_signal(signal.SIGKILL)
        run(*BERT)

    assert in_a_process(killed_run) == -signal.SIGKILL
    [part] = here.glob("*.part-*")
    os.truncate(part, part.stat().st_size - 7)  # as if the last row were not all on the disk
    sizes = record_batches(monkeypatch)
    resumed = run(*BERT)
    assert sum(sizes) == 3  # the last batch
    assert not part.exists()
    assert_same(resumed, run(*BERT, output="whole.pt"))


# ------------------------------------------------------------------------ an output that is there
@pytest.mark.parametrize(
    "given, file, old, new",  # old None: the last eight bytes
    [
        (ARRAY, "e.npy", None, 8 * b"\x01"),
        (BERT, "bert/model.safetensors", None, 8 * b"\x01"),
        (BERT, "bert/tokenizer.json", b"door", b"boar"),
        (BERT, "bert/config.json", b"gelu", b"relu"),
        (ARRAY, "corpus.jsonl", b'"a"', b'"c"'),  # a source
        (ARRAY, "corpus.jsonl", b"door", b"gate"),
    ],
)
def test_other_content_needs_overwrite(given, file, old, new, here, capsys, ends_with_one_line):
    np.save("e.npy", random_rows(48, 3))
    run(*given)
    run(*given, "--batch_size", 3)
    assert "t.pt holds this already; it is kept" in capsys.readouterr().out
    content = Path(file).read_bytes()
    Path(file).write_bytes(content.replace(old or content[-8:], new))
    ends_with_one_line(lambda: run(*given), "something else", "--overwrite")
    replaced = run(*given, "--overwrite")
    assert_same(replaced, run(*given, output="new.pt"))


@pytest.mark.parametrize(
    "flags",
    [
        ["--max_length", 7],
        ["--pooling", "mean"],
        ["--dtype", "float16"],
        ["--teacher", "lsa"],
        ["--corpus", "demo"],
    ],
)
def test_other_flags_are_refused_without_a_model(flags, here, monkeypatch, ends_with_one_line):
    run(*BERT)
    monkeypatch.setattr(cache_teacher, "load_teacher", None)
    ends_with_one_line(lambda: run(*BERT, *flags), "something else")
