"""cache_teacher.py: the three kinds of teacher, what is kept and gone on with, what is refused."""

from support import encoder, files
from support.data import read_corpus

import json
import os
import signal
import zlib

import numpy as np
import pytest
import torch
from conftest import SENTENCES, SOURCES, in_a_process, small_bert
from transformers import AutoModel, AutoTokenizer

import cache_teacher
from cache_teacher import fit_lsa, load_cache, usable


def run(*flags):
    cache_teacher.main([str(flag) for flag in flags])


def read(path):
    """A cache, as the README says to read it."""
    return torch.load(path, weights_only=True, mmap=True)


def the_same(a, b):
    """Whether two caches hold the same, the embeddings bit for bit."""
    a, b = read(a), read(b)
    return torch.equal(a.pop("embeddings"), b.pop("embeddings")) and a == b


# ------------------------------------------------------------------------------------ the teachers
@pytest.mark.parametrize("pooling", ["cls", "mean", "last"])
def test_algorithm1_line_3_caches_what_the_model_gives_one_sentence_at_a_time(
    pooling, tmp_path, corpus, bert
):
    flags = ["--teacher", bert, "--corpus", corpus, "--output", tmp_path / "t.pt"]
    run(*flags, "--batch_size", 5, "--pooling", pooling)
    cache = read(tmp_path / "t.pt")
    keys = {"sentences", "sources", "embeddings", "teacher", "pooling", "max_length"}
    assert set(cache) == keys | {"fingerprint", "version", "recipe"}
    assert (cache["sentences"], cache["sources"]) == (SENTENCES, SOURCES)
    assert (cache["teacher"], cache["pooling"], cache["max_length"]) == (str(bert), pooling, 256)
    assert cache["embeddings"].dtype == torch.float32
    model, tokenizer = AutoModel.from_pretrained(bert).eval(), AutoTokenizer.from_pretrained(bert)
    for sentence, embedding in zip(SENTENCES, cache["embeddings"]):
        ids = torch.tensor([tokenizer(sentence)["input_ids"]])
        with torch.no_grad():
            hidden = model(input_ids=ids).last_hidden_state[0]
        expected = {"cls": hidden[0], "mean": hidden.mean(0), "last": hidden[-1]}[pooling]
        torch.testing.assert_close(embedding, expected, atol=1e-5, rtol=1e-5)


def test_appendix_d_the_seed_draws_the_sample(tmp_path, corpus, monkeypatch):
    asked = []

    def sample(name, seed):
        asked.append((name, seed))
        return read_corpus(corpus)

    monkeypatch.setattr(cache_teacher, "read_corpus", sample)
    run("--corpus", "paper", "--seed", 7, "--output", tmp_path / "t.pt")
    assert asked == [("paper", 7)]


def test_lsa_puts_words_of_the_same_company_together():
    lsa = fit_lsa(read_corpus("demo")[0])

    def cosine(a, b):
        return float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))

    for triple in ("doctor physician skipper", "bread baguette anchor", "boat vessel cake"):
        word, synonym, other = lsa.transform(triple.split())
        assert word.shape == (32,) and cosine(word, synonym) > cosine(word, other) + 0.3


@pytest.mark.parametrize("suffix", ["npy", "pt"])
def test_embeddings_from_elsewhere_follow_the_order_of_the_corpus(tmp_path, suffix):
    (tmp_path / "c.txt").write_text("a dog\n\na cat\na dog\na bird\nno target\n")
    array = np.arange(1.0, 13).reshape(6, 2)
    array[5] = 0
    np.save(tmp_path / "e.npy", array)
    torch.save(torch.from_numpy(array), tmp_path / "e.pt")
    flags = ["--teacher", tmp_path / f"e.{suffix}", "--corpus", tmp_path / "c.txt"]
    run(*flags, "--output", tmp_path / "t.pt")
    cache = read(tmp_path / "t.pt")
    assert cache["sentences"] == ["a dog", "a cat", "a bird"]
    assert cache["embeddings"].tolist() == array[[0, 2, 4]].tolist()


def test_a_sentence_without_a_known_word_has_no_target(tmp_path, capsys):
    texts = [f"the {animal} barks" for animal in ("dog", "cat", "cow", "pig")]
    (tmp_path / "c.txt").write_text("\n".join([*texts, "?!"]))
    run("--corpus", tmp_path / "c.txt", "--output", tmp_path / "t.pt")
    assert read(tmp_path / "t.pt")["sentences"] == texts
    assert "1 sentences removed" in capsys.readouterr().out


DTYPES = {"float32": torch.float32, "bfloat16": torch.float32, "float16": torch.float16}


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_type_of_the_weights_is_that_which_was_asked_for(dtype, tmp_path, corpus, bert):
    flags = ["--teacher", bert, "--corpus", corpus, "--output"]
    run(*flags, tmp_path / "t.pt", "--dtype", dtype)
    run(*flags, tmp_path / "float32.pt")
    ours, exact = (read(tmp_path / f"{name}.pt")["embeddings"] for name in ("t", "float32"))
    assert ours.dtype == DTYPES[dtype]
    distance = (ours - exact).norm() / exact.norm()
    assert distance == 0 if dtype == "float32" else 1e-5 < distance < 0.1


# -------------------------------------------------------------------------- interrupted and gone on
def all_batches(monkeypatch):
    """A list to which the size of each batch that is embedded will be appended."""
    sizes, pad = [], encoder.pad
    monkeypatch.setattr(encoder, "pad", lambda *args: sizes.append(len(args[1])) or pad(*args))
    return sizes


def killed_at_batch(number):
    batches, pad = [], encoder.pad

    def kill(*args):
        batches.append(0)
        return os.kill(os.getpid(), signal.SIGKILL) if len(batches) == number else pad(*args)

    encoder.pad = kill


ROW = 4 * (32 + 1)  # bytes of a row of the part file: 32 dimensions and a checksum


@pytest.fixture
def halfway(tmp_path, corpus, bert):
    """Flags of a run that was killed after seven of its ten batches; its output is t.pt."""
    flags = ["--teacher", bert, "--corpus", corpus, "--batch_size", 5]
    flags += ["--output", tmp_path / "t.pt"]
    assert in_a_process(lambda: (killed_at_batch(8), run(*flags))) == -9
    assert len(part_of(tmp_path)) == 35 * ROW
    return flags


def part_of(folder, content=None):
    """The bytes of the only part file in a folder, which `content` replaces."""
    (part,) = folder.glob("t.pt.part-*")
    return part.read_bytes() if content is None else part.write_bytes(content)


def zeros(first, last):
    """Write zeros over these bytes, as a hole in a file is read."""
    return lambda part: part[:first] + bytes(last - first) + part[last:]


def with_a_nan(part):
    """The seventh row begins with a NaN, and its checksum says that it was written so."""
    row = np.float32("nan").tobytes() + part[6 * ROW + 4 : 7 * ROW - 4]
    return part[: 6 * ROW] + row + zlib.crc32(row).to_bytes(4, "little") + part[7 * ROW :]


DAMAGE = {  # what became of the part file of 35 rows, and the batches that are then still to do
    "none": (bytes, [5, 5, 3]),
    "torn": (lambda part: part[:-7], [5, 5, 5, 3]),
    "empty": (lambda part: b"", [5] * 9 + [3]),
    "a hole of rows": (zeros(12 * ROW, 20 * ROW), [5] * 7 + [3]),
    "a hole in a row": (zeros(12 * ROW + 64, 13 * ROW), [5] * 7 + [3]),
    "a hole at the end of a batch": (zeros(10 * ROW - 4, 10 * ROW), [5] * 8 + [3]),
    "a bit": (lambda part: part[: 6 * ROW] + b"?" + part[6 * ROW + 1 :], [5] * 8 + [3]),
    "not finite": (with_a_nan, [5] * 8 + [3]),
    "all of it": (lambda part: part + part[: 13 * ROW], []),
    "too much": (lambda part: part + part, []),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_an_interrupted_run_goes_on_where_it_stopped(
    damage, halfway, tmp_path, corpus, bert, monkeypatch
):
    spoil, left = DAMAGE[damage]
    part_of(tmp_path, spoil(part_of(tmp_path)))
    if not left:  # rows of other sentences: only what is embedded is of interest
        sizes = all_batches(monkeypatch)
        run(*halfway)
        assert sum(sizes) in (0, 3) and read(tmp_path / "t.pt")["embeddings"].shape == (48, 32)
        return
    sizes = all_batches(monkeypatch)
    run(*halfway)
    assert sizes == left
    run(*halfway[:-1], tmp_path / "whole.pt")
    assert the_same(tmp_path / "t.pt", tmp_path / "whole.pt")
    assert not list(tmp_path.glob("*.part*"))


def test_an_embedding_may_hold_zeros(tmp_path, corpus, bert, monkeypatch):
    """As many of a bfloat16 model do: it is not taken for a hole in the file."""
    from safetensors.torch import load_file, save_file

    weights = load_file(bert / "model.safetensors")
    for name in ("weight", "bias"):
        weights[f"encoder.layer.2.output.LayerNorm.{name}"][3] = 0.0
    save_file(weights, bert / "model.safetensors", metadata={"format": "pt"})
    flags = ["--teacher", bert, "--corpus", corpus, "--batch_size", 5]
    flags += ["--output", tmp_path / "t.pt"]
    assert in_a_process(lambda: (killed_at_batch(8), run(*flags))) == -9
    sizes = all_batches(monkeypatch)
    run(*flags)
    assert sizes == [5, 5, 3]
    assert not read(tmp_path / "t.pt")["embeddings"][:, 3].any()


def test_ctrl_c_keeps_what_is_embedded(tmp_path, corpus, bert, monkeypatch, ends_with_one_line):
    flags = ["--teacher", bert, "--corpus", corpus, "--batch_size", 5]
    flags += ["--output", tmp_path / "t.pt"]
    pad, sizes = encoder.pad, []

    def stop(*args):
        sizes.append(0)
        return signal.raise_signal(signal.SIGINT) if len(sizes) == 4 else pad(*args)

    with monkeypatch.context() as patch:
        patch.setattr(encoder, "pad", stop)
        ends_with_one_line(lambda: run(*flags), "interrupted", "goes on")
    assert not (tmp_path / "t.pt").exists()
    sizes = all_batches(monkeypatch)
    run(*flags)
    assert sizes == [5] * 6 + [3]


def test_a_full_memory_is_one_line(tmp_path, corpus, bert, monkeypatch, ends_with_one_line):
    forward, calls = encoder.forward, []

    def full(*args, **how):
        calls.append(0)
        if len(calls) > 4:  # the first is of the look at the model when it is loaded
            raise torch.OutOfMemoryError("of 80 GiB ...")
        return forward(*args, **how)

    flags = ["--teacher", bert, "--corpus", corpus, "--output", tmp_path / "t.pt"]
    monkeypatch.setattr(encoder, "forward", full)
    ends_with_one_line(lambda: run(*flags, "--batch_size", 5), "out of memory", "--batch_size")
    monkeypatch.setattr(encoder, "forward", forward)
    sizes = all_batches(monkeypatch)
    run(*flags, "--batch_size", 3)  # as the line advises; what is embedded stays
    assert sizes == [3] * 11


def test_only_the_files_of_this_run_are_removed(halfway, tmp_path):
    others = ["t.pt.part-0123456789abcdef", "t.pt.part-mine.txt", "t.pt.part", "t.pt2", "t.pt.lock"]
    for name in others:
        (tmp_path / name).write_text("mine")
    run(*halfway)
    assert [(tmp_path / name).read_text() for name in others] == ["mine"] * len(others)
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {*others, "t.pt", "corpus.jsonl", "bert"}


# ------------------------------------------------------------ what is there, and is it the same?
def other_weights(bert, corpus):
    small_bert(bert, seed=1)


def one_weight(bert, corpus):
    model = AutoModel.from_pretrained(bert)
    model.encoder.layer[1].output.dense.bias.data[7] += 1e-3
    model.save_pretrained(bert)


def other_tokenizer(bert, corpus):
    text = (bert / "tokenizer.json").read_text()
    swapped = text.replace('"door"', '"?"').replace('"boat"', '"door"').replace('"?"', '"boat"')
    assert swapped != text
    (bert / "tokenizer.json").write_text(swapped)


def other_config(bert, corpus):
    text = (bert / "config.json").read_text()
    (bert / "config.json").write_text(text.replace('"gelu"', '"relu"'))


def shorter_by_its_files(bert, corpus):
    modules = [("Transformer", ""), ("Pooling", "1_Pooling")]
    modules = [{"type": f"x.{name}", "path": path} for name, path in modules]
    (bert / "modules.json").write_text(json.dumps(modules))
    (bert / "1_Pooling").mkdir()
    (bert / "1_Pooling" / "config.json").write_text('{"pooling_mode": "cls"}')
    (bert / "sentence_bert_config.json").write_text('{"max_seq_length": 7}')


def other_order(bert, corpus):
    lines = corpus.read_text().splitlines()
    corpus.write_text("\n".join([lines[1], lines[0], *lines[2:]]))


def other_sources(bert, corpus):
    corpus.write_text(corpus.read_text().replace('"source": "a"', '"source": "c"', 1))


def fewer_sentences(bert, corpus):
    corpus.write_text("\n".join(corpus.read_text().splitlines()[:40]))


def nothing(bert, corpus):
    pass


CHANGES = {  # what changed between two runs, and the flags of the second one
    "weights": (other_weights, []),
    "one weight": (one_weight, []),
    "tokenizer": (other_tokenizer, []),
    "configuration": (other_config, []),
    "its max_seq_length": (shorter_by_its_files, []),
    "--max_length": (nothing, ["--max_length", 7]),
    "--pooling": (nothing, ["--pooling", "mean"]),
    "--dtype float16": (nothing, ["--dtype", "float16"]),
    "--dtype bfloat16": (nothing, ["--dtype", "bfloat16"]),
    "order": (other_order, []),
    "sources": (other_sources, []),
    "fewer": (fewer_sentences, []),
}


@pytest.mark.parametrize("change, flags", CHANGES.values(), ids=CHANGES)
def test_a_cache_of_something_else_is_neither_kept_nor_replaced_unasked(
    change, flags, tmp_path, corpus, bert, capsys, ends_with_one_line
):
    given = ["--teacher", bert, "--corpus", corpus, "--output", tmp_path / "t.pt"]
    run(*given)
    before = (tmp_path / "t.pt").read_bytes()
    run(*given, "--batch_size", 3)
    assert "kept as it is" in capsys.readouterr().out
    change(bert, corpus)
    ends_with_one_line(lambda: run(*given, *flags), "something else", "--overwrite")
    assert (tmp_path / "t.pt").read_bytes() == before
    run(*given, *flags, "--overwrite")
    run(*given[:-1], tmp_path / "new.pt", *flags)
    assert the_same(tmp_path / "t.pt", tmp_path / "new.pt")


@pytest.mark.parametrize("change, flags", CHANGES.values(), ids=CHANGES)
def test_half_a_cache_of_something_else_is_not_gone_on_with(
    change, flags, halfway, tmp_path, corpus, bert, monkeypatch
):
    change(bert, corpus)
    sizes = all_batches(monkeypatch)
    run(*halfway, *flags)
    assert sum(sizes) == len(read(tmp_path / "t.pt")["sentences"])
    assert len(part_of(tmp_path)) == 35 * ROW  # it belongs to the other run


def test_an_array_of_other_values_or_another_order_is_something_else(
    tmp_path, corpus, ends_with_one_line, capsys
):
    array = np.random.default_rng(0).normal(size=(48, 3))
    np.save(tmp_path / "e.npy", array)
    flags = ["--teacher", tmp_path / "e.npy", "--corpus", corpus, "--output", tmp_path / "t.pt"]
    run(*flags)
    run(*flags)
    assert "kept as it is" in capsys.readouterr().out
    for other in (array[::-1], array + 1e-9, array[:, ::-1]):
        np.save(tmp_path / "e.npy", other)
        ends_with_one_line(lambda: run(*flags), "something else")


def test_lsa_is_kept_if_it_is_the_same(tmp_path, corpus, capsys, ends_with_one_line):
    flags = ["--corpus", corpus, "--output", tmp_path / "t.pt"]
    run(*flags)
    run(*flags)
    assert "kept as it is" in capsys.readouterr().out
    ends_with_one_line(lambda: run(*flags, "--dtype", "float16"), "something else")


def test_the_cache_is_written_whole_or_not_at_all(tmp_path, corpus, monkeypatch):
    def torn(content, file):
        file.write(b"half")
        raise KeyboardInterrupt

    flags = ["--corpus", corpus, "--output", tmp_path / "t.pt", "--overwrite"]
    run(*flags)
    good = (tmp_path / "t.pt").read_bytes()
    monkeypatch.setattr(torch, "save", torn)
    with pytest.raises(SystemExit):
        run(*flags)
    assert (tmp_path / "t.pt").read_bytes() == good
    assert {path.name for path in tmp_path.iterdir()} == {"t.pt", "corpus.jsonl"}


def test_a_second_run_into_one_output_is_refused(tmp_path, corpus, ends_with_one_line):
    flags = ["--corpus", corpus, "--output", tmp_path / "t.pt"]
    with files.alone(tmp_path / "t.pt"):
        ends_with_one_line(lambda: run(*flags), "another run", "t.pt")
        run(*flags[:-1], tmp_path / "other.pt")
    assert not (tmp_path / "t.pt").exists()
    run(*flags)


# ------------------------------------------------------------------------------- arrays, refused
R = np.random.default_rng(0).normal(size=(48, 4))
T = torch.from_numpy(R).float()
PLAIN = "no plain array of floating-point numbers"
HOLED = np.where(np.arange(48)[:, None] == 7, np.nan, R)
ARRAYS = {  # name: (its content, words of the answer, more flags)
    "int.npy": (R.astype(int), [PLAIN], []),
    "bool.npy": (R > 0, [PLAIN], []),
    "complex.npy": (R + 1j, [PLAIN], []),
    "object.npy": (R.astype(object), ["object.npy"], []),
    "text.npy": (R.astype(str), ["text.npy"], []),
    "empty.npy": (R[:, :0], ["(48, 0)"], []),
    "flat.npy": (R[:, 0], ["(48,)"], []),
    "cube.npy": (R[:, :, None], ["(48, 4, 1)"], []),
    "short.npy": (R[:47], ["47", "48"], []),
    "zero.npy": (0 * R, ["no embedding but zeros"], []),
    "nan.npy": (HOLED, ["not finite"], []),
    "large.npy": (0 * R + 1e30, ["too large"], []),
    "small.npy": (1e-30 * R, ["zero"], []),
    "half.npy": (1e5 + R, ["too large", "--dtype float32"], ["--dtype", "float16"]),
    "tiny.npy": (1e-10 * R, ["zero", "--dtype float32"], ["--dtype", "float16"]),
    "sparse.pt": (T.to_sparse(), [PLAIN], []),
    "int.pt": (T.long(), [PLAIN], []),
    "meta.pt": (T.to("meta"), [PLAIN], []),
    "list.pt": ([T], ["list", PLAIN], []),
    "cache.pt": ({"embeddings": T}, ["dict", PLAIN], []),
    "torn.npy": (b"\x93NUMPY\x01\x00", ["torn.npy"], []),
    "torn.pt": (b"PK\x03\x04", ["torn.pt"], []),
    "text.pt": (b"hello", ["text.pt"], []),
}


@pytest.mark.parametrize("name", ARRAYS)
def test_an_array_that_cannot_be_used_is_one_line(name, tmp_path, corpus, ends_with_one_line):
    content, words, flags = ARRAYS[name]
    if isinstance(content, bytes):
        (tmp_path / name).write_bytes(content)
    elif name.endswith(".npy"):
        np.save(tmp_path / name, content)
    else:
        torch.save(content, tmp_path / name)
    given = ["--teacher", tmp_path / name, "--corpus", corpus, "--output", tmp_path / "t.pt"]
    ends_with_one_line(lambda: run(*given, *flags), name, *words)
    assert {path.name for path in tmp_path.iterdir()} == {name, "corpus.jsonl"}


TAKEN = {"f2": R.astype("f2"), "f4": R.astype("f4"), "order": np.asfortranarray(R), "one": R[:, :1]}
TAKEN |= {
    "bf16": T.bfloat16(),
    "strided": T.repeat(1, 2)[:, ::2],
    "grad": T.clone().requires_grad_(),
}


@pytest.mark.parametrize("name", TAKEN)
def test_arrays_of_floating_point_numbers_are_taken(name, tmp_path, corpus):
    content = TAKEN[name]
    path = tmp_path / ("e.npy" if isinstance(content, np.ndarray) else "e.pt")
    np.save(path, content) if path.suffix == ".npy" else torch.save(content, path)
    run("--teacher", path, "--corpus", corpus, "--output", tmp_path / "t.pt")
    expected = torch.as_tensor(np.array(content) if path.suffix == ".npy" else content).float()
    assert torch.equal(load_cache(str(tmp_path / "t.pt"))["embeddings"], expected.detach())


def test_eq3_needs_a_direction_that_float32_can_hold():
    rows = torch.ones(70_000, 1)
    rows[69_999], rows[5], rows[66_000] = 1e30, 0, torch.nan
    assert (~usable(rows)).nonzero().flatten().tolist() == [5, 66_000, 69_999]


# ------------------------------------------------------------------------------- caches, refused
def replaced(**parts):
    """A way to spoil a cache: some of its values are replaced."""
    return lambda cache, path: torch.save(cache | parts, path)


def renamed(sentences):
    """A way to spoil a cache: other sentences, with a fingerprint that fits."""
    return replaced(sentences=sentences, fingerprint=cache_teacher.fingerprint(sentences))


TORN = {  # how a cache is spoilt, and words of the answer
    "torn": (lambda cache, path: path.write_bytes(path.read_bytes()[:900]), ["cannot read"]),
    "text": (lambda cache, path: path.write_text("hello"), ["cannot read"]),
    "a folder": (lambda cache, path: (path.unlink(), path.mkdir()), ["Is a directory"]),
    "tensor": (lambda cache, path: torch.save(torch.ones(3), path), ["teacher cache"]),
    "list": (lambda cache, path: torch.save([1], path), ["teacher cache"]),
    "nothing": (lambda cache, path: torch.save({}, path), ["teacher cache", "sentences"]),
    "missing": (lambda cache, path: path.unlink(), ["no teacher cache at", "cache_teacher.py"]),
    "older": (replaced(version=0), ["format 0"]),
    "shape": (replaced(embeddings=torch.ones(48)), ["(sentences, dimensions)"]),
    "type": (replaced(embeddings=torch.ones(48, 2).long()), ["float32"]),
    "sparse": (replaced(embeddings=torch.eye(48).to_sparse()), ["cannot read"]),
    "meta": (replaced(embeddings=torch.ones(48, 2, device="meta")), ["cannot read"]),
    "no tensor": (replaced(embeddings=[[1.0]] * 48), ["teacher cache"]),
    "length": (replaced(embeddings=torch.ones(47, 2)), ["47", "48"]),
    "width 0": (replaced(embeddings=torch.ones(48, 0)), ["zero"]),
    "zero": (replaced(embeddings=torch.zeros(48, 2)), ["zero or not finite"]),
    "nan": (replaced(embeddings=torch.full((48, 2), torch.nan)), ["not finite"]),
    "large": (replaced(embeddings=torch.full((48, 2), 1e30)), ["not finite"]),
    "swapped": (replaced(sentences=SENTENCES[::-1]), ["fingerprint"]),
    "numbers": (replaced(sources=[1] * 48), ["text"]),
    "no list": (replaced(sentences=3), ["teacher cache"]),
    "repeated": (renamed([*SENTENCES[:-1], SENTENCES[0]]), ["blank or repeated"]),
    "blank": (renamed([*SENTENCES[:-1], " "]), ["blank or repeated"]),
    "half a character": (renamed([*SENTENCES[:-1], "\ud800"]), ["surrogates"]),
    "no name": (replaced(teacher=torch.ones(3)), ["text"]),
}


@pytest.mark.parametrize("spoil, words", TORN.values(), ids=TORN)
def test_a_cache_that_cannot_be_used_gets_its_own_line(cache, spoil, words, ends_with_one_line):
    spoil(torch.load(cache, weights_only=True), cache)
    ends_with_one_line(lambda: load_cache(str(cache)), str(cache), *words)


def test_a_hostile_cache_runs_no_code(tmp_path, ends_with_one_line):
    class Hostile:
        def __reduce__(self):
            return (open, (str(tmp_path / "it-was-here"), "w"))

    torch.save({"sentences": Hostile()}, tmp_path / "t.pt")
    ends_with_one_line(lambda: load_cache(str(tmp_path / "t.pt")), "more than tensors")
    assert not (tmp_path / "it-was-here").exists()


def test_a_corpus_will_do_where_no_embeddings_are_needed(corpus, ends_with_one_line):
    cache = load_cache(str(corpus), needed=False)
    assert (cache["sentences"], cache["sources"], cache["embeddings"]) == (SENTENCES, SOURCES, None)
    ends_with_one_line(lambda: load_cache(str(corpus)), "cannot read")


# ------------------------------------------------------------------------------------ command line
MISTAKES = [
    (["--corpus", "nowhere.txt"], ["nowhere.txt", "No such file"]),
    (["--corpus", "."], [".txt, .jsonl, .csv and .tsv"]),
    (["--teacher", "no/such/model"], ["no/such/model"]),
    (["--teacher", "nowhere.npy"], ["nowhere.npy", "No such file"]),
    (["--teacher", "nowhere.pt"], ["nowhere.pt", "No such file"]),
    (["--batch_size", "0"], ["--batch_size"]),
    (["--batch_size", "9" * 5000], ["--batch_size"]),
    (["--max_length", "-1"], ["--max_length"]),
    (["--seed", "-1"], ["--seed"]),
    (["--dtype", "int8"], ["--dtype", "float16"]),
    (["--pooling", "max"], ["--pooling", "cls"]),
    (["--device", "quantum"], ["--device quantum"]),
    (["--device", "meta"], ["--device meta"]),
    (["--device", "cuda"], ["--device cuda"]),
    (["--outptu", "x"], ["--outptu"]),
    (["--over"], ["--over"]),
    (["--output", "no/such/folder/t.pt"], ["no/such/folder"]),
    (["--output", "."], ["--output"]),
]


@pytest.mark.parametrize("flags, words", MISTAKES)
def test_a_mistake_on_the_command_line_is_one_line(
    flags, words, corpus, tmp_path, monkeypatch, ends_with_one_line
):
    monkeypatch.chdir(tmp_path)
    given = ["--corpus", corpus, "--output", tmp_path / "t.pt"]
    ends_with_one_line(lambda: run(*given, *flags), *words)
    assert list(tmp_path.iterdir()) == [corpus]


@pytest.mark.parametrize("length", [1, 2])
def test_a_length_that_leaves_no_word_is_refused(
    length, corpus, bert, tmp_path, ends_with_one_line
):
    flags = ["--teacher", bert, "--corpus", corpus, "--output", tmp_path / "t.pt"]
    ends_with_one_line(lambda: run(*flags, "--max_length", length), f"{length} tokens leave none")
    run(*flags, "--max_length", 3)
    assert len(read(tmp_path / "t.pt")["embeddings"].unique(dim=0)) == 1  # [CLS] the [SEP]


def test_a_sentence_of_which_the_tokenizer_makes_nothing_is_named(
    tmp_path, bert, ends_with_one_line
):
    settings = json.loads((bert / "tokenizer.json").read_text())
    settings["post_processor"] = None  # neither [CLS] nor [SEP]
    (bert / "tokenizer.json").write_text(json.dumps(settings))
    (bert / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    (tmp_path / "c.txt").write_text("the cook\n\x01\n")
    flags = ["--teacher", bert, "--corpus", tmp_path / "c.txt", "--output", tmp_path / "t.pt"]
    ends_with_one_line(lambda: run(*flags), "makes nothing", "x01")


def test_an_input_is_never_changed(tmp_path, corpus, bert):
    np.save(tmp_path / "e.npy", R)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    for teacher in (bert, tmp_path / "e.npy", "lsa"):
        flags = ["--teacher", teacher, "--corpus", corpus, "--output", tmp_path / "t.pt"]
        run(*flags, "--overwrite")
    assert before == {path: path.read_bytes() for path in before}
