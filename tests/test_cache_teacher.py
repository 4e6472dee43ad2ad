"""cache_teacher.py: corpora, the three kinds of teacher, and the cache file."""

import json
import os

import numpy as np
import pytest
import torch
from conftest import SENTENCES, in_a_process, in_two_processes, small_bert
from transformers import AutoModel, AutoTokenizer, Qwen3Config, Qwen3Model

import cache_teacher
from cache_teacher import encode, load_cache, load_encoder, pool


def run(*flags):
    cache_teacher.main([str(flag) for flag in flags])


def read(path):
    return torch.load(path, weights_only=True, mmap=True)


# ------------------------------------------------------------------------------------------------- corpora


def test_appendix_d_blank_sentences_and_repeats_go_and_are_counted(tmp_path, capsys):
    (tmp_path / "corpus.txt").write_text(
        "one dog barks\n\ntwo cats sleep\n  one dog barks  \nthree birds sing\n   \n"
    )
    run("--corpus", tmp_path / "corpus.txt", "--output", tmp_path / "t.pt")
    cache = read(tmp_path / "t.pt")
    assert cache["sentences"] == ["one dog barks", "two cats sleep", "three birds sing"]
    assert "2 blank" in (out := capsys.readouterr().out) and "1 repeated" in out and "3 left" in out


@pytest.mark.parametrize("suffix, delimiter", [("csv", ","), ("tsv", "\t")])
def test_tables_with_text_and_source(tmp_path, suffix, delimiter):
    path = tmp_path / f"corpus.{suffix}"
    path.write_text(
        delimiter.join(["source", "text"])
        + "\n"
        + delimiter.join(["x", '"a, ""quoted"" dog\nbarks"'])
        + "\n"
        + delimiter.join(["y", "cats"])
        + "\n"
    )
    assert cache_teacher.read_corpus(str(path), 0) == (
        ['a, "quoted" dog\nbarks', "cats"],
        ["x", "y"],
    )


def test_a_corpus_without_sources_is_one_domain(tmp_path):
    (tmp_path / "mine.jsonl").write_text('{"text": "a dog"}\n{"text": "a cat"}\n')
    assert cache_teacher.read_corpus(str(tmp_path / "mine.jsonl"), 0)[1] == ["mine", "mine"]


# ------------------------------------------------------------------------------------------------- teachers


def test_algorithm1_line_3_caches_what_the_model_gives(tmp_path, corpus, bert):
    run(
        "--teacher",
        bert,
        "--corpus",
        corpus,
        "--output",
        tmp_path / "t.pt",
        "--batch_size",
        5,
        "--pooling",
        "mean",
    )
    cache = read(tmp_path / "t.pt")
    assert set(cache) == {
        "sentences",
        "sources",
        "embeddings",
        "teacher",
        "pooling",
        "max_length",
        "fingerprint",
        "version",
    }
    assert (
        cache["sources"] == ["a", "b"] * 24
        and cache["pooling"] == "mean"
        and cache["embeddings"].dtype == torch.float32
    )
    model, tokenizer = AutoModel.from_pretrained(bert).eval(), AutoTokenizer.from_pretrained(bert)
    for i in (0, 17, 47):  # one sentence at a time: no padding at all
        with torch.no_grad():
            hidden = model(
                **tokenizer(cache["sentences"][i], return_tensors="pt")
            ).last_hidden_state
        torch.testing.assert_close(cache["embeddings"][i], hidden[0].mean(0), atol=1e-5, rtol=1e-4)


def test_a_decoder_is_pooled_at_its_last_token_padded_on_either_side(tmp_path, bert):
    folder = tmp_path / "decoder"
    tokenizer = AutoTokenizer.from_pretrained(bert)
    torch.manual_seed(0)
    sizes = {
        "hidden_size": 32,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 16,
        "intermediate_size": 64,
    }
    Qwen3Model(
        Qwen3Config(vocab_size=len(tokenizer), num_hidden_layers=2, **sizes)
    ).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    model, tokenizer, pooling = load_encoder(str(folder))
    assert pooling == "last"
    expected = encode(model, tokenizer, SENTENCES, "last", 64, 1)  # one at a time: no padding
    torch.testing.assert_close(
        encode(model, tokenizer, SENTENCES, "last", 64, 16), expected, atol=1e-5, rtol=1e-4
    )
    tokenizer.padding_side = "left"
    tokens = tokenizer(SENTENCES, padding=True, return_tensors="pt")
    with torch.no_grad():
        left = model(
            input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"]
        ).last_hidden_state
    torch.testing.assert_close(
        pool(left, tokens["attention_mask"], "last"), expected, atol=1e-4, rtol=1e-3
    )


def test_a_model_of_half_precision_is_loaded_in_float32(tmp_path, bert):
    AutoModel.from_pretrained(bert).half().save_pretrained(bert)
    assert json.loads((bert / "config.json").read_text())["dtype"] == "float16"
    assert load_encoder(str(bert))[0].dtype == torch.float32


@pytest.mark.parametrize(
    "config, pooling",
    [
        (
            {
                "pooling_mode_cls_token": True,
                "pooling_mode_mean_tokens": False,
                "include_prompt": True,
            },
            "cls",
        ),
        (
            {
                "pooling_mode_cls_token": False,
                "pooling_mode_mean_tokens": True,
                "word_embedding_dimension": 32,
            },
            "mean",
        ),
        ({"pooling_mode_lasttoken": True}, "last"),
        ({"pooling_mode": "cls", "embedding_dimension": 32, "include_prompt": True}, "cls"),
        ({"pooling_mode": "lasttoken"}, "last"),
        ({"pooling_mode": "mean"}, "mean"),
    ],
)
def test_pooling_is_read_from_sentence_transformers_files(bert, config, pooling, capsys):
    modules = [
        {"type": "sentence_transformers.models.Transformer", "path": ""},
        {"type": "sentence_transformers.models.Pooling", "path": "1_Pooling"},
    ]
    (bert / "1_Pooling").mkdir()
    (bert / "1_Pooling" / "config.json").write_text(json.dumps(config))
    (bert / "modules.json").write_text(json.dumps(modules))
    assert load_encoder(str(bert))[2] == pooling
    assert pooling in capsys.readouterr().out


@pytest.mark.parametrize(
    "config, word",
    [
        ({"pooling_mode_max_tokens": True}, "max"),
        ({"pooling_mode": "weightedmean"}, "weightedmean"),
    ],
)
def test_pooling_that_is_not_implemented_is_refused(bert, config, word, ends_with_one_line):
    modules = [{"type": "x.Transformer", "path": ""}, {"type": "x.Pooling", "path": "1_Pooling"}]
    (bert / "1_Pooling").mkdir()
    (bert / "1_Pooling" / "config.json").write_text(json.dumps(config))
    (bert / "modules.json").write_text(json.dumps(modules))
    ends_with_one_line(lambda: load_encoder(str(bert)), word, "--pooling")


def test_an_older_sentence_transformers_layout_with_the_model_in_a_subfolder(tmp_path, bert):
    old = tmp_path / "old"
    bert.rename(tmp_path / "0_Transformer")
    old.mkdir()
    (tmp_path / "0_Transformer").rename(old / "0_Transformer")
    (old / "0_Transformer" / "sentence_bert_config.json").write_text('{"max_seq_length": 20}')
    kinds = [("Transformer", "0_Transformer"), ("Pooling", "1_Pooling")]
    modules = [
        {"type": f"sentence_transformers.models.{kind}", "path": path} for kind, path in kinds
    ]
    (old / "modules.json").write_text(json.dumps(modules))
    (old / "1_Pooling").mkdir()
    (old / "1_Pooling" / "config.json").write_text('{"pooling_mode_mean_tokens": true}')
    model, tokenizer, pooling = load_encoder(str(old))
    assert (model.config.num_hidden_layers, tokenizer.model_max_length, pooling) == (3, 20, "mean")


def test_a_model_with_a_dense_module_is_refused(bert, ends_with_one_line):
    (bert / "modules.json").write_text(
        json.dumps([{"type": "x.Transformer", "path": ""}, {"type": "x.Dense", "path": "2_Dense"}])
    )
    ends_with_one_line(lambda: load_encoder(str(bert)), "Dense", ".npy")


@pytest.mark.parametrize("suffix", ["npy", "pt"])
def test_embeddings_from_elsewhere_follow_the_corpus_order(tmp_path, suffix):
    (tmp_path / "c.txt").write_text("a dog\n\na cat\na dog\na bird\n")
    array = np.arange(1, 11, dtype=np.float32).reshape(5, 2)
    np.save(tmp_path / "e.npy", array)
    torch.save(torch.from_numpy(array), tmp_path / "e.pt")
    run(
        "--teacher",
        tmp_path / f"e.{suffix}",
        "--corpus",
        tmp_path / "c.txt",
        "--output",
        tmp_path / "t.pt",
    )
    cache = read(tmp_path / "t.pt")
    assert cache["sentences"] == ["a dog", "a cat", "a bird"]
    assert cache["embeddings"].tolist() == array[[0, 2, 4]].tolist()


def test_embeddings_from_elsewhere_must_be_one_a_sentence(tmp_path, corpus, ends_with_one_line):
    np.save(tmp_path / "e.npy", np.ones((47, 2)))
    ends_with_one_line(
        lambda: run(
            "--teacher", tmp_path / "e.npy", "--corpus", corpus, "--output", tmp_path / "t.pt"
        ),
        "47",
        "48",
    )
    assert not (tmp_path / "t.pt").exists()


def test_lsa_puts_words_of_the_same_company_together():
    lsa = cache_teacher.fit_lsa(cache_teacher.read_corpus("demo", 0)[0])
    cosine = lambda a, b: float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))
    for word, synonym, other in [
        ("doctor", "physician", "skipper"),
        ("bread", "baguette", "anchor"),
        ("boat", "vessel", "cake"),
    ]:
        word, synonym, other = lsa.transform([word, synonym, other])
        assert cosine(word, synonym) > cosine(word, other) + 0.3


def test_a_sentence_without_a_known_word_has_no_target(tmp_path, capsys):
    (tmp_path / "c.txt").write_text(
        "the dog barks\nthe cat sleeps\nthe bird sings loud\nthe horse runs\nthe cow eats\nthe pig grunts\n?!\n"
    )
    run("--corpus", tmp_path / "c.txt", "--output", tmp_path / "t.pt")
    assert (
        len(read(tmp_path / "t.pt")["sentences"]) == 6
        and "1 sentences removed" in capsys.readouterr().out
    )


# ------------------------------------------------------------------------------------------------- the cache file


def test_half_precision_is_stored_so(tmp_path, corpus):
    run("--corpus", corpus, "--output", tmp_path / "t.pt", "--dtype", "float16")
    assert read(tmp_path / "t.pt")["embeddings"].dtype == torch.float16


@pytest.mark.parametrize("teacher", ["lsa", "bert"])
def test_the_same_content_is_kept_and_other_content_needs_overwrite(
    tmp_path, corpus, bert, teacher, ends_with_one_line, capsys
):
    flags = ["--teacher", bert if teacher == "bert" else "lsa", "--output", tmp_path / "t.pt"]
    run(*flags, "--corpus", corpus)
    before = (tmp_path / "t.pt").stat().st_mtime_ns
    run(*flags, "--corpus", corpus)
    assert "kept" in capsys.readouterr().out
    shorter = tmp_path / "shorter.txt"
    shorter.write_text("\n".join(SENTENCES[:40]))
    ends_with_one_line(lambda: run(*flags, "--corpus", shorter), "--overwrite")
    assert (tmp_path / "t.pt").stat().st_mtime_ns == before
    run(*flags, "--corpus", shorter, "--overwrite")
    assert len(load_cache(tmp_path / "t.pt")["sentences"]) == 40


def test_a_teacher_retrained_at_the_same_path_is_other_content(
    tmp_path, corpus, ends_with_one_line
):
    flags = [
        "--teacher",
        small_bert(tmp_path / "bert", seed=0),
        "--corpus",
        corpus,
        "--output",
        tmp_path / "t.pt",
    ]
    run(*flags)
    small_bert(tmp_path / "bert", seed=1)
    ends_with_one_line(lambda: run(*flags), "--overwrite")


def test_the_cache_is_written_whole_or_not_at_all(tmp_path, corpus, monkeypatch):
    def torn(cache, path):
        open(path, "w").write("half")
        raise KeyboardInterrupt

    run("--corpus", corpus, "--output", tmp_path / "t.pt")
    good = (tmp_path / "t.pt").read_bytes()
    monkeypatch.setattr(torch, "save", torn)
    with pytest.raises(KeyboardInterrupt):
        run("--corpus", corpus, "--output", tmp_path / "t.pt", "--overwrite")
    assert (tmp_path / "t.pt").read_bytes() == good


def the_same(*paths):
    """Whether two caches hold the same, the embeddings bit for bit."""
    a, b = map(read, paths)
    return torch.equal(a.pop("embeddings"), b.pop("embeddings")) and a == b


def killed_at_batch(number):
    batches, pad = [], cache_teacher.pad
    cache_teacher.pad = lambda *args: (
        batches.append(0) or (os.kill(os.getpid(), 9) if len(batches) == number else pad(*args))
    )


def test_an_interrupted_run_goes_on_where_it_stopped(tmp_path, corpus, bert, monkeypatch):
    flags = ["--teacher", bert, "--corpus", corpus, "--batch_size", 5, "--output"]
    assert in_a_process(lambda: run(*flags, tmp_path / "whole.pt")) == 0
    assert in_a_process(lambda: (killed_at_batch(8), run(*flags, tmp_path / "t.pt"))) == -9
    (part,) = tmp_path.glob("t.pt.part-*")
    part.write_bytes(part.read_bytes()[:-7])  # the end of the seventh batch is torn
    lengths, pad = [], cache_teacher.pad
    monkeypatch.setattr(
        cache_teacher, "pad", lambda *args: lengths.append(len(args[1])) or pad(*args)
    )
    run(*flags, tmp_path / "t.pt")
    assert lengths == [5, 5, 5, 3]  # the first six batches of 48 sentences were there
    assert the_same(tmp_path / "t.pt", tmp_path / "whole.pt")
    assert not list(tmp_path.glob("*.part*"))


def test_half_a_cache_of_another_teacher_is_not_gone_on_with(tmp_path, corpus):
    flags = [
        "--teacher",
        small_bert(tmp_path / "bert", seed=0),
        "--corpus",
        corpus,
        "--output",
        tmp_path / "t.pt",
    ]
    assert in_a_process(lambda: (killed_at_batch(2), run(*flags))) == -9
    small_bert(tmp_path / "bert", seed=1)
    run(*flags)
    assert load_cache(tmp_path / "t.pt")["embeddings"].shape == (48, 32)
    model, tokenizer, pooling = load_encoder(str(tmp_path / "bert"))
    torch.testing.assert_close(
        read(tmp_path / "t.pt")["embeddings"], encode(model, tokenizer, SENTENCES, pooling, 256, 32)
    )
    assert not list(tmp_path.glob("*.part*"))


@pytest.mark.parametrize("teacher", ["bert", "lsa"])
def test_two_processes_make_the_cache_of_one(tmp_path, corpus, bert, teacher):
    flags = [
        "--teacher",
        bert if teacher == "bert" else "lsa",
        "--corpus",
        corpus,
        "--batch_size",
        5,
        "--output",
    ]
    embedded, embed_batches = tmp_path / "embedded", cache_teacher.embed_batches

    def counted(model, tokens, batches, *rest):
        with open(embedded, "a") as file:
            file.write(f"{len(batches)}\n")
        return embed_batches(model, tokens, batches, *rest)

    def share():
        cache_teacher.embed_batches = counted
        run(*flags, tmp_path / "two.pt")

    assert in_a_process(lambda: run(*flags, tmp_path / "one.pt")) == 0
    assert in_two_processes(share) == [0, 0]
    assert the_same(tmp_path / "two.pt", tmp_path / "one.pt")
    if teacher == "bert":
        assert embedded.read_text() == "5\n5\n"  # ten batches, half of them each
    assert not list(tmp_path.glob("*.part*"))


# ------------------------------------------------------------------------------------------------- mistakes

NAMES = "\n".join(SENTENCES)
MISTAKES = {  # name of the corpus: (bytes, words of the answer)
    "empty.txt": (b"", ["no sentence"]),
    "blank.txt": (b"\n \n\t\n", ["no sentence"]),
    "binary.txt": (bytes(range(256)), ["binary.txt", "UTF-8"]),
    "latin.csv": ("text\ncafé au lait\n".encode("latin-1"), ["latin.csv", "UTF-8"]),
    "torn.jsonl": (b'{"text": "a"}\n{"text": "b', ["torn.jsonl", "line 2"]),
    "list.jsonl": (b'["text"]\n', ["text column", "list"]),
    "misspelt.csv": (b"txt,source\na dog,x\n", ["text column", "txt, source"]),
    "number.jsonl": (b'{"text": 3, "source": "x"}\n', ["text column", "text, source"]),
    "quote.csv": (b'text\n"a dog\n', ["quote.csv"]),
    "corpus.docx": (b"PK", [".txt, .jsonl, .csv and .tsv"]),
    "same.txt": (b"dog\ndog\n", ["two different sentences"]),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_corpus_that_cannot_be_used_is_one_line(tmp_path, name, ends_with_one_line):
    content, words = MISTAKES[name]
    (tmp_path / name).write_bytes(content)
    ends_with_one_line(
        lambda: run("--corpus", tmp_path / name, "--output", tmp_path / "t.pt"), *words
    )
    assert [path.name for path in tmp_path.iterdir()] == [name]  # nothing half-written is left


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--corpus", "nowhere.txt"], ["nowhere.txt", "does not exist"]),
        (["--corpus", "."], ["cannot read"]),
        (["--teacher", "no/such/model"], ["no/such/model"]),
        (["--teacher", "nowhere.npy"], ["nowhere.npy"]),
        (["--teacher", "nowhere.pt"], ["nowhere.pt"]),
        (["--batch_size", "0"], ["--batch_size"]),
        (["--max_length", "-1"], ["--max_length"]),
        (["--seed", "-1"], ["--seed"]),
        (["--dtype", "int8"], ["--dtype", "float16"]),
        (["--device", "quantum"], ["--device quantum"]),
        (["--outptu", "x"], ["--outptu"]),
        (["--output", "no/such/folder/t.pt"], ["no/such/folder"]),
    ],
)
def test_a_mistake_on_the_command_line_is_one_line(
    flags, words, corpus, bert, tmp_path, ends_with_one_line
):
    if "--device" in flags:
        flags = [*flags, "--teacher", bert]
    ends_with_one_line(
        lambda: run("--corpus", corpus, "--output", tmp_path / "t.pt", *flags), *words
    )
    assert not list(tmp_path.glob("t.pt*"))


def test_a_model_directory_without_weights_is_one_line(bert, corpus, tmp_path, ends_with_one_line):
    (bert / "model.safetensors").unlink()
    ends_with_one_line(
        lambda: run("--teacher", bert, "--corpus", corpus, "--output", tmp_path / "t.pt"), "bert"
    )


def test_embeddings_that_are_not_finite_are_refused(tmp_path, corpus, ends_with_one_line):
    array = np.ones((48, 2))
    array[7, 1] = np.nan
    np.save(tmp_path / "e.npy", array)
    command = ["--teacher", tmp_path / "e.npy", "--corpus", corpus, "--output", tmp_path / "t.pt"]
    ends_with_one_line(lambda: run(*command), "finite")


def test_a_full_disk_is_one_line_and_leaves_nothing(
    tmp_path, corpus, monkeypatch, ends_with_one_line
):
    def full(cache, path):
        open(path, "w").write("half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    ends_with_one_line(
        lambda: run("--corpus", corpus, "--output", tmp_path / "t.pt"), "No space left"
    )
    assert not list(tmp_path.glob("t.pt*"))


@pytest.mark.parametrize(
    "message, code", [("PytorchStreamWriter failed writing file data/0", 2), ("a bug", None)]
)
def test_a_full_disk_as_torch_reports_it_is_one_line_and_a_bug_stays_a_bug(
    tmp_path, message, code, capsys
):
    with pytest.raises(SystemExit if code else RuntimeError) as stopped:
        with cache_teacher.writing(tmp_path):
            raise RuntimeError(message)
    assert not code or (stopped.value.code == code and "failed writing" in capsys.readouterr().err)


def test_long_sentences_are_cut_and_counted(tmp_path, bert, capsys):
    (tmp_path / "c.txt").write_text(
        "The cook.\n" + "The cook sees the door. " * 40 + "\nThe nurse paints.\n"
    )
    run(
        "--teacher",
        bert,
        "--corpus",
        tmp_path / "c.txt",
        "--output",
        tmp_path / "t.pt",
        "--max_length",
        300,
    )
    assert (
        "1 of 3 sentences are longer than 64 tokens" in capsys.readouterr().out
    )  # the model takes no more


def test_a_corpus_longer_than_a_slice_of_tokenising(bert):
    tokenizer = AutoTokenizer.from_pretrained(bert)
    texts = [SENTENCES[i * i % 48] for i in range(2500)]
    ids, starts = cache_teacher.tokenize(tokenizer, texts, 64)
    assert len(starts) == 2501 and starts[-1] == len(ids)
    for i in (0, 999, 1000, 1001, 2499):
        assert ids[starts[i] : starts[i + 1]].tolist() == tokenizer(texts[i])["input_ids"]


def test_padding_has_no_attention_and_rows_keep_their_order(bert):
    tokens = cache_teacher.tokenize(AutoTokenizer.from_pretrained(bert), SENTENCES, 64)
    batch = cache_teacher.pad(tokens, [4, 0, 9], 0, torch.device("cpu"))
    lengths = [len(tokens[0][tokens[1][i] : tokens[1][i + 1]]) for i in (4, 0, 9)]
    assert len(set(lengths)) == 2 and batch["attention_mask"].sum(1).tolist() == lengths
    for row, mask, i in zip(batch["input_ids"], batch["attention_mask"], (4, 0, 9)):
        assert row[mask.bool()].tolist() == tokens[0][tokens[1][i] : tokens[1][i + 1]].tolist()
        assert mask.tolist() == sorted(mask.tolist(), reverse=True) and not row[~mask.bool()].any()


def test_mean_pooling_in_half_precision_does_not_overflow():
    hidden = torch.full((1, 256, 2), 300.0, dtype=torch.float16)
    assert pool(hidden, torch.ones(1, 256), "mean").tolist() == [[300.0, 300.0]]


def test_lines_end_at_newlines_only(tmp_path):
    (tmp_path / "c.jsonl").write_text('{"text": "one\u2028line\x85 only"}\n', encoding="utf-8")
    assert cache_teacher.read_corpus(str(tmp_path / "c.jsonl"), 0)[0] == ["one\u2028line\x85 only"]


TORN = {
    "torn": (lambda cache, path: path.write_bytes(path.read_bytes()[:900]), ["torn"]),
    "text": (lambda cache, path: path.write_text("hello"), ["cannot read"]),
    "tensor": (lambda cache, path: torch.save(torch.ones(3), path), ["no teacher cache"]),
    "missing": (lambda cache, path: path.unlink(), ["no teacher cache at", "cache_teacher.py"]),
    "older": (lambda cache, path: torch.save(cache | {"version": 0}, path), ["format 0"]),
    "shape": (
        lambda cache, path: torch.save(cache | {"embeddings": torch.ones(48)}, path),
        ["(sentences, dimensions)"],
    ),
    "type": (
        lambda cache, path: torch.save(cache | {"embeddings": torch.ones(48, 2).long()}, path),
        ["float32"],
    ),
    "length": (
        lambda cache, path: torch.save(cache | {"embeddings": torch.ones(47, 2)}, path),
        ["47", "48"],
    ),
    "zero": (
        lambda cache, path: torch.save(cache | {"embeddings": torch.zeros(48, 2)}, path),
        ["zero or not finite"],
    ),
    "nan": (
        lambda cache, path: torch.save(
            cache | {"embeddings": torch.full((48, 2), torch.nan)}, path
        ),
        ["not finite"],
    ),
    "swapped": (
        lambda cache, path: torch.save(cache | {"sentences": cache["sentences"][::-1]}, path),
        ["fingerprint"],
    ),
}


@pytest.mark.parametrize("name", TORN)
def test_a_cache_that_cannot_be_used_gets_its_own_line(tmp_path, corpus, name, ends_with_one_line):
    path = tmp_path / "t.pt"
    run("--corpus", corpus, "--output", path)
    spoil, words = TORN[name]
    spoil(torch.load(path, weights_only=True), path)
    ends_with_one_line(lambda: load_cache(path), "t.pt", *words)


def test_a_hostile_cache_runs_no_code(tmp_path, ends_with_one_line):
    class Hostile:
        def __reduce__(self):
            return (open, (str(tmp_path / "it-was-here"), "w"))

    torch.save({"sentences": Hostile()}, tmp_path / "t.pt")
    ends_with_one_line(lambda: load_cache(tmp_path / "t.pt"), "more than tensors")
    assert not (tmp_path / "it-was-here").exists()


def test_torn_model_files_are_one_line(bert, ends_with_one_line):
    weights = (bert / "model.safetensors").read_bytes()
    (bert / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    ends_with_one_line(lambda: load_encoder(str(bert)), "bert")
    (bert / "model.safetensors").write_bytes(weights)
    (bert / "modules.json").write_text('[{"type"')
    ends_with_one_line(lambda: load_encoder(str(bert)), "modules.json is torn")


def test_a_model_whose_files_lack_weights_is_one_line(bert, ends_with_one_line):
    from safetensors.torch import load_file, save_file

    weights = load_file(bert / "model.safetensors")
    del weights["encoder.layer.1.output.dense.weight"]
    save_file(weights, bert / "model.safetensors", metadata={"format": "pt"})
    ends_with_one_line(
        lambda: load_encoder(str(bert)), "lack 1 weights", "encoder.layer.1.output.dense.weight"
    )


def test_half_precision_that_overflows_is_refused(tmp_path, corpus, ends_with_one_line):
    np.save(tmp_path / "e.npy", np.full((48, 2), 1e5))
    command = [
        "--teacher",
        tmp_path / "e.npy",
        "--corpus",
        corpus,
        "--output",
        tmp_path / "t.pt",
        "--dtype",
        "float16",
    ]
    ends_with_one_line(lambda: run(*command), "finite", "float32")
