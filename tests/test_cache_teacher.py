"""cache_teacher.py: corpora, the three kinds of teacher, and the cache file."""

import json

import numpy as np
import pytest
import torch
from conftest import SENTENCES, small_bert
from transformers import AutoModel, AutoTokenizer, Qwen3Config, Qwen3Model

import cache_teacher
from cache_teacher import encode, load_cache, load_encoder, pool


def run(*flags):
    cache_teacher.main([str(flag) for flag in flags])


def read(path):
    return torch.load(path, weights_only=True, mmap=True)


# ------------------------------------------------------------------------------------------------- corpora


def test_appendix_d_blank_sentences_and_repeats_go_and_are_counted(tmp_path, capsys):
    (tmp_path / "corpus.txt").write_text("one dog barks\n\ntwo cats sleep\n  one dog barks  \nthree birds sing\n   \n")
    run("--corpus", tmp_path / "corpus.txt", "--output", tmp_path / "t.pt")
    cache = read(tmp_path / "t.pt")
    assert cache["sentences"] == ["one dog barks", "two cats sleep", "three birds sing"]
    assert "2 blank" in (out := capsys.readouterr().out) and "1 repeated" in out and "3 left" in out


@pytest.mark.parametrize("suffix, delimiter", [("csv", ","), ("tsv", "\t")])
def test_tables_with_text_and_source(tmp_path, suffix, delimiter):
    path = tmp_path / f"corpus.{suffix}"
    path.write_text(delimiter.join(["source", "text"]) + "\n" + delimiter.join(["x", '"a, ""quoted"" dog\nbarks"']) + "\n" + delimiter.join(["y", "cats"]) + "\n")
    assert cache_teacher.read_corpus(str(path), 0) == (['a, "quoted" dog\nbarks', "cats"], ["x", "y"])


def test_a_corpus_without_sources_is_one_domain(tmp_path):
    (tmp_path / "mine.jsonl").write_text('{"text": "a dog"}\n{"text": "a cat"}\n')
    assert cache_teacher.read_corpus(str(tmp_path / "mine.jsonl"), 0)[1] == ["mine", "mine"]


# ------------------------------------------------------------------------------------------------- teachers


def test_algorithm1_line_3_caches_what_the_model_gives(tmp_path, corpus, bert):
    run("--teacher", bert, "--corpus", corpus, "--output", tmp_path / "t.pt", "--batch_size", 5, "--pooling", "mean")
    cache = read(tmp_path / "t.pt")
    assert set(cache) == {"sentences", "sources", "embeddings", "teacher", "pooling", "max_length", "fingerprint", "version"}
    assert cache["sources"] == ["a", "b"] * 24 and cache["pooling"] == "mean" and cache["embeddings"].dtype == torch.float32
    model, tokenizer = AutoModel.from_pretrained(bert).eval(), AutoTokenizer.from_pretrained(bert)
    for i in (0, 17, 47):  # one sentence at a time: no padding at all
        with torch.no_grad():
            hidden = model(**tokenizer(cache["sentences"][i], return_tensors="pt")).last_hidden_state
        torch.testing.assert_close(cache["embeddings"][i], hidden[0].mean(0), atol=1e-5, rtol=1e-4)


def test_a_decoder_is_pooled_at_its_last_token_padded_on_either_side(tmp_path, bert):
    folder = tmp_path / "decoder"
    tokenizer = AutoTokenizer.from_pretrained(bert)
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16, "intermediate_size": 64}
    Qwen3Model(Qwen3Config(vocab_size=len(tokenizer), num_hidden_layers=2, **sizes)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    model, tokenizer, pooling = load_encoder(str(folder))
    assert pooling == "last"
    expected = encode(model, tokenizer, SENTENCES, "last", 64, 1)  # one at a time: no padding
    torch.testing.assert_close(encode(model, tokenizer, SENTENCES, "last", 64, 16), expected, atol=1e-5, rtol=1e-4)
    tokenizer.padding_side = "left"
    tokens = tokenizer(SENTENCES, padding=True, return_tensors="pt")
    with torch.no_grad():
        left = model(input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"]).last_hidden_state
    torch.testing.assert_close(pool(left, tokens["attention_mask"], "last"), expected, atol=1e-4, rtol=1e-3)


def test_a_model_of_half_precision_is_loaded_in_float32(tmp_path, bert):
    AutoModel.from_pretrained(bert).half().save_pretrained(bert)
    assert json.loads((bert / "config.json").read_text())["dtype"] == "float16"
    assert load_encoder(str(bert))[0].dtype == torch.float32


@pytest.mark.parametrize(
    "config, pooling",
    [
        ({"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False, "include_prompt": True}, "cls"),
        ({"pooling_mode_cls_token": False, "pooling_mode_mean_tokens": True, "word_embedding_dimension": 32}, "mean"),
        ({"pooling_mode_lasttoken": True}, "last"),
        ({"pooling_mode": "cls", "embedding_dimension": 32, "include_prompt": True}, "cls"),
        ({"pooling_mode": "lasttoken"}, "last"),
        ({"pooling_mode": "mean"}, "mean"),
    ],
)
def test_pooling_is_read_from_sentence_transformers_files(bert, config, pooling, capsys):
    modules = [{"type": "sentence_transformers.models.Transformer", "path": ""}, {"type": "sentence_transformers.models.Pooling", "path": "1_Pooling"}]
    (bert / "1_Pooling").mkdir()
    (bert / "1_Pooling" / "config.json").write_text(json.dumps(config))
    (bert / "modules.json").write_text(json.dumps(modules))
    assert load_encoder(str(bert))[2] == pooling
    assert pooling in capsys.readouterr().out


@pytest.mark.parametrize("config, word", [({"pooling_mode_max_tokens": True}, "max"), ({"pooling_mode": "weightedmean"}, "weightedmean")])
def test_pooling_that_is_not_implemented_is_refused(bert, config, word, ends_with_one_line):
    modules = [{"type": "x.Transformer", "path": ""}, {"type": "x.Pooling", "path": "1_Pooling"}]
    (bert / "1_Pooling").mkdir()
    (bert / "1_Pooling" / "config.json").write_text(json.dumps(config))
    (bert / "modules.json").write_text(json.dumps(modules))
    ends_with_one_line(lambda: load_encoder(str(bert)), word, "--pooling")


def test_a_model_with_a_dense_module_is_refused(bert, ends_with_one_line):
    (bert / "modules.json").write_text(json.dumps([{"type": "x.Transformer", "path": ""}, {"type": "x.Dense", "path": "2_Dense"}]))
    ends_with_one_line(lambda: load_encoder(str(bert)), "Dense", ".npy")


@pytest.mark.parametrize("suffix", ["npy", "pt"])
def test_embeddings_from_elsewhere_follow_the_corpus_order(tmp_path, suffix):
    (tmp_path / "c.txt").write_text("a dog\n\na cat\na dog\na bird\n")
    array = np.arange(1, 11, dtype=np.float32).reshape(5, 2)
    np.save(tmp_path / "e.npy", array)
    torch.save(torch.from_numpy(array), tmp_path / "e.pt")
    run("--teacher", tmp_path / f"e.{suffix}", "--corpus", tmp_path / "c.txt", "--output", tmp_path / "t.pt")
    cache = read(tmp_path / "t.pt")
    assert cache["sentences"] == ["a dog", "a cat", "a bird"]
    assert cache["embeddings"].tolist() == array[[0, 2, 4]].tolist()


def test_embeddings_from_elsewhere_must_be_one_a_sentence(tmp_path, corpus, ends_with_one_line):
    np.save(tmp_path / "e.npy", np.ones((47, 2)))
    ends_with_one_line(lambda: run("--teacher", tmp_path / "e.npy", "--corpus", corpus, "--output", tmp_path / "t.pt"), "47", "48")
    assert not (tmp_path / "t.pt").exists()


def test_lsa_puts_words_of_the_same_company_together():
    lsa = cache_teacher.fit_lsa(cache_teacher.read_corpus("demo", 0)[0])
    cosine = lambda a, b: float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))
    for word, synonym, other in [("doctor", "physician", "skipper"), ("bread", "baguette", "anchor"), ("boat", "vessel", "cake")]:
        word, synonym, other = lsa.transform([word, synonym, other])
        assert cosine(word, synonym) > cosine(word, other) + 0.3


def test_a_sentence_without_a_known_word_has_no_target(tmp_path, capsys):
    (tmp_path / "c.txt").write_text("the dog barks\nthe cat sleeps\nthe bird sings loud\nthe horse runs\nthe cow eats\nthe pig grunts\n?!\n")
    run("--corpus", tmp_path / "c.txt", "--output", tmp_path / "t.pt")
    assert len(read(tmp_path / "t.pt")["sentences"]) == 6 and "1 sentences removed" in capsys.readouterr().out


# ------------------------------------------------------------------------------------------------- the cache file


def test_half_precision_is_stored_so(tmp_path, corpus):
    run("--corpus", corpus, "--output", tmp_path / "t.pt", "--dtype", "float16")
    assert read(tmp_path / "t.pt")["embeddings"].dtype == torch.float16


@pytest.mark.parametrize("teacher", ["lsa", "bert"])
def test_the_same_content_is_kept_and_other_content_needs_overwrite(tmp_path, corpus, bert, teacher, ends_with_one_line, capsys):
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


def test_a_teacher_retrained_at_the_same_path_is_other_content(tmp_path, corpus, ends_with_one_line):
    flags = ["--teacher", small_bert(tmp_path / "bert", seed=0), "--corpus", corpus, "--output", tmp_path / "t.pt"]
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
