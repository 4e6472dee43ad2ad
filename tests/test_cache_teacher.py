"""cache_teacher.py: what is embedded, which row is whose, what is kept and what resumes."""

import hashlib
import io
import os
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import SENTENCES, SOURCES, embed_alone, in_a_process, random_rows, write_files
from safetensors.torch import load_file, save_file

import cache_teacher
import eval as evaluation
import support.encoder
import talas
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
    "pooling, dtype", [("cls", "float32"), ("last", "float16"), ("mean", "bfloat16")]
)
def test_the_cache_has_what_the_model_gives(pooling, dtype, here):
    cache = run(*BERT, "--pooling", pooling, "--dtype", dtype)
    assert cache["sentences"] == SENTENCES
    assert cache["sources"] == SOURCES
    assert [cache["teacher"], cache["pooling"], cache["max_length"]] == ["bert", pooling, 256]
    assert cache["embeddings"].dtype == (torch.float16 if dtype == "float16" else torch.float32)
    expected = embed_alone("bert", pooling, SENTENCES)
    error = (cache["embeddings"].float() - expected).norm() / expected.norm()
    if dtype == "float32":
        assert error < 1e-6
    else:
        assert 1e-5 < error < 0.1


def test_flags_reach_the_teacher(here, monkeypatch):
    received = []

    def record(*arguments):
        received.extend(arguments)
        return load_encoder(*arguments[:4])

    monkeypatch.setattr(cache_teacher, "load_encoder", record)
    run(*BERT, "--pooling", "mean", "--max_length", 9, "--dtype", "bfloat16", "--device", "meta")
    assert received == ["bert", "mean", 9, torch.bfloat16, torch.device("meta")]


def test_the_seed_reaches_the_papers_corpus(here, monkeypatch):
    def sample(seed):
        return [f"{seed} {text}" for text in SENTENCES], SOURCES

    monkeypatch.setattr(data, "paper_corpus", sample)
    assert run("--corpus", "paper", "--seed", 7)["sentences"][0] == f"7 {SENTENCES[0]}"


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
    assert words.shape == (4, 32)
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


def test_a_model_without_numbers_stops_at_its_first_batch(here, monkeypatch, ends_with_one_line):
    weights = load_file("bert/model.safetensors")
    weights["embeddings.LayerNorm.bias"][:] = float("nan")
    save_file(weights, "bert/model.safetensors", metadata={"format": "pt"})
    sizes = record_batches(monkeypatch)
    ends_with_one_line(lambda: run(*BERT), "not finite")
    assert sizes == [5]


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_an_array_stays_on_disk(here):
    np.save("e.npy", random_rows(48, 4, dtype=torch.float32))
    args = cache_teacher.parse_args(ARRAY)
    array = cache_teacher.load_teacher(args, range(48), 48)
    cache = cache_teacher.make_cache(args, "", "", array, SENTENCES, SOURCES, array)
    assert cache["embeddings"].data_ptr() == array.data_ptr()  # not a copy
    assert "e.npy" in Path("/proc/self/maps").read_text()


def test_a_float16_cache_gives_float32_targets(here):
    np.save("e.npy", random_rows(48, 4))
    run(*ARRAY, "--dtype", "float16")
    corpus = Corpus(load_cache("t.pt"), load_encoder("bert"))
    _, targets, _ = corpus.batch(torch.tensor([3, 1]))
    assert corpus.embeddings.dtype == torch.float16
    assert torch.equal(targets, random_rows(48, 4)[[3, 1]].half().float())


def test_a_digest_is_of_all_bytes():
    tensor = torch.arange(2**24 + 5, dtype=torch.float32)
    expected = hashlib.sha256(tensor.numpy().tobytes() + b'"a"').hexdigest()
    assert digest(tensor[None], "a") == expected
    assert digest(tensor.numpy(), b'"a"') == expected


# --------------------------------------------------------------------------- which row is whose
A, B, C, D, E = (SENTENCES[i] for i in (0, 9, 22, 31, 47))
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
    assert "11 sentences: 5 blank or repeated, 6 left" in printed
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
        ("c.csv", ",text,source\n0,i,wic\n7,a,sts\n", ["i", "a"], ["wic", "sts"]),
        ("c.tsv", "text \t source\n\na, b\t\n", ["a, b"], ["c"]),
        ("c.jsonl", '\n{"text": "\u2028\x85", "source": 3}\n', ["\u2028\x85"], ["3"]),
        ("c.txt", 'a "b, \r\n\nd\x0be', ['a "b, ', "", "d\x0be"], ["c"] * 3),
    ],
)
def test_a_table_is_read(name, content, texts, sources, here):
    Path(name).write_text(content, encoding="utf-8", newline="")
    assert read_corpus(name) == (texts, sources)


# ------------------------------------------------------------------------- interrupted and resumed
def record_batches(patch, last=None, last_signal=None):
    """The sizes of the batches embedded from here on; a signal ends the process at the last."""
    sizes = []
    forward = support.encoder.forward

    def recorded(model, batch, **options):
        sizes.append(len(batch["input_ids"]))
        if len(sizes) == last:
            os.kill(os.getpid(), last_signal)
        return forward(model, batch, **options)

    patch.setattr(support.encoder, "forward", recorded)
    return sizes


@pytest.mark.parametrize(
    "last_signal, part_size, flags, sentences_left",
    [
        pytest.param(signal.SIGKILL, 48 * 33 * 4, [], 13, id="killed"),
        pytest.param(signal.SIGINT, 48 * 33 * 4, [], 13, id="Ctrl-C"),
        pytest.param(signal.SIGKILL, 1000, [], 48, id="killed while the part got its size"),
        pytest.param(signal.SIGKILL, 48 * 33 * 4, ["--max_length", 9], 48, id="other flags"),
    ],
)
def test_an_interrupted_run_resumes_to_the_same_bits(
    last_signal, part_size, flags, sentences_left, here, capfd, monkeypatch
):
    def interrupted():
        record_batches(pytest.MonkeyPatch(), 8, last_signal)
        run(*BERT)

    if in_a_process(interrupted) == 2:
        assert "error: interrupted; run the same command again" in capfd.readouterr().err
    (part,) = here.glob("t.pt.part*")
    os.truncate(part, part_size)
    sizes = record_batches(monkeypatch)
    resumed = run(*BERT, *flags)
    assert sum(sizes) == sentences_left
    assert part.exists() == bool(flags)
    assert_same(resumed, run(*BERT, *flags, output="whole.pt"))


def test_a_run_killed_while_saving_resumes(here, monkeypatch):
    def killed():
        cache_teacher.save = lambda path, cache: os.kill(os.getpid(), signal.SIGKILL)
        run(*BERT)

    assert in_a_process(killed) == -signal.SIGKILL
    sizes = record_batches(monkeypatch)
    resumed = run(*BERT)
    assert sum(sizes) <= 5
    assert_same(resumed, run(*BERT, output="whole.pt"))


# ------------------------------------------------------------------------ an output that is there
@pytest.mark.parametrize(
    "given, file, old, new",  # old None: the last eight bytes
    [
        pytest.param(ARRAY, "e.npy", None, 8 * b"\x01", id="an array"),
        pytest.param(BERT, "bert/model.safetensors", None, 8 * b"\x01", id="the weights"),
        pytest.param(BERT, "bert/tokenizer.json", b"door", b"boar", id="the vocabulary"),
        pytest.param(BERT, "bert/config.json", b"gelu", b"relu", id="the configuration"),
        pytest.param(ARRAY, "corpus.jsonl", b'"a"', b'"c"', id="the sources"),
        pytest.param(ARRAY, "corpus.jsonl", b"door", b"gate", id="the sentences"),
    ],
)
def test_other_content_needs_overwrite(given, file, old, new, here, capsys, ends_with_one_line):
    np.save("e.npy", random_rows(48, 3))
    before = run(*given)
    run(*given, "--batch_size", 3)
    assert "t.pt holds this already; it is kept" in capsys.readouterr().out
    content = Path(file).read_bytes()
    Path(file).write_bytes(content.replace(old or content[-8:], new))
    ends_with_one_line(lambda: run(*given), "something else", "--overwrite")
    assert_same(before, torch.load("t.pt"))
    after = run(*given, output="new.pt")
    assert_same(after, run(*given, "--overwrite"))


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


def test_a_cache_without_a_request_is_kept(here, capsys):
    cache = run(*BERT)
    del cache["request"]
    torch.save(cache, "t.pt")
    assert_same(run(*BERT), cache)
    assert "it is kept" in capsys.readouterr().out


# --------------------------------------------------------------------------------------- the screen
@pytest.mark.parametrize("script", [cache_teacher, talas, evaluation])
def test_a_windows_pipe_takes_every_character(script, monkeypatch):
    pipe = io.TextIOWrapper(io.BytesIO(), encoding="cp1252", write_through=True)
    monkeypatch.setattr(sys, "stdout", pipe)
    with pytest.raises(SystemExit):
        script.main(["--help"])
    print("ε")
    assert pipe.buffer.getvalue().endswith(b"\\u03b5\n")
