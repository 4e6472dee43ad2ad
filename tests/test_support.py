"""support/: what it reads, it reads as its owner meant it, or refuses it in one line.

Models are built small from configurations; the truth is transformers, one sentence at a time, and
sentence-transformers where it is installed.
"""

import json
import shutil
from functools import cache as once
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from conftest import HOME, SENTENCES
from huggingface_hub.constants import HF_HUB_CACHE
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoConfig, AutoModel, AutoTokenizer, PreTrainedTokenizerFast

import cache_teacher
import eval as evaluation
import talas
from support import encoder
from support.encoder import encode, pad, save_encoder, tokenize
from support.loading import load_encoder

SCRIPTS = {"cache_teacher": cache_teacher, "eval": evaluation, "talas": talas}


def run(script, *flags):
    """One of the three scripts' main, with flags that need not be text."""
    SCRIPTS[script].main([str(flag) for flag in flags])


# ---------------------------------------------------------------------- models, small and made here
BERT_LIKE = {"pad": "[PAD]", "unk": "[UNK]", "cls": "[CLS]", "sep": "[SEP]", "mask": "[MASK]"}
ROBERTA_LIKE = {"cls": "<s>", "pad": "<pad>", "sep": "</s>", "unk": "<unk>", "mask": "<mask>"}
GPT_LIKE = {"eos": "<|end|>"}  # no padding token
LLAMA_LIKE = {"unk": "<unk>", "bos": "<s>", "eos": "</s>", "pad": "<pad>"}
QWEN_LIKE = {"pad": "<|end|>"}  # which also ends each sentence
TEMPLATES = {"[CLS]": "[CLS] $A [SEP]", "<s>": "<s> $A </s>", "bos": "<s> $A"}


def small_tokenizer(algorithm, names, template="", limit=64, **more):
    """A tokenizer trained on the sentences; its special tokens have the ids 0, 1, 2, ..."""
    special, unk = list(names.values()), names.get("unk")
    if algorithm == "wordpiece":
        inner = Tokenizer(models.WordPiece(unk_token=unk))
        inner.normalizer = normalizers.BertNormalizer()
        inner.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        trainer = trainers.WordPieceTrainer(special_tokens=special, show_progress=False)
    elif algorithm == "bpe":
        inner = Tokenizer(models.BPE())
        inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        letters = pre_tokenizers.ByteLevel.alphabet()
        about = {"initial_alphabet": letters, "show_progress": False, "vocab_size": 350}
        trainer = trainers.BpeTrainer(special_tokens=special, **about)
    else:
        inner = Tokenizer(models.Unigram())
        inner.pre_tokenizer = pre_tokenizers.Metaspace()
        about = {"unk_token": unk, "show_progress": False}
        trainer = trainers.UnigramTrainer(special_tokens=special, **about)
    inner.train_from_iterator(SENTENCES, trainer)
    if template:
        ids = [(token, inner.token_to_id(token)) for token in special]
        inner.post_processor = processors.TemplateProcessing(template, special_tokens=ids)
    roles = {f"{role}_token": token for role, token in names.items()} | more
    return PreTrainedTokenizerFast(tokenizer_object=inner, model_max_length=limit, **roles)


def sizes(d="hidden_size", layers="num_hidden_layers", heads="num_attention_heads", **more):
    """A small configuration, under the names that the model's own has for the sizes."""
    return {"vocab_size": 400, d: 32, layers: 2, heads: 2} | more


FFN, GROUPED = {"intermediate_size": 48}, {"num_key_value_heads": 1, "head_dim": 16}
NO_IDS = {"pad_token_id": None, "bos_token_id": None, "eos_token_id": None}
ENDS = {"pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2}
AS_ROBERTA = FFN | ENDS | {"max_position_embeddings": 66}
WORDPIECE = ("wordpiece", BERT_LIKE, "[CLS] $A [SEP]")
UNIGRAM = ("unigram", BERT_LIKE, "[CLS] $A [SEP]")
BPE, GPT = ("bpe", ROBERTA_LIKE, "<s> $A </s>"), ("bpe", GPT_LIKE)
LLAMA, QWEN = ("bpe", LLAMA_LIKE, "<s> $A"), ("bpe", QWEN_LIKE, "$A <|end|>")
GPT_SIZES = sizes("n_embd", "n_layer", "n_head", n_positions=64)
ENCODERS = {  # kind: (its tokenizer, its configuration)
    "bert": (WORDPIECE, sizes(**FFN)),
    "roberta": (BPE, sizes(**AS_ROBERTA)),
    "xlm-roberta": (("unigram", ROBERTA_LIKE, "<s> $A </s>"), sizes(**AS_ROBERTA)),
    "distilbert": (WORDPIECE, sizes("dim", "n_layers", "n_heads", hidden_dim=48)),
    "mpnet": (("wordpiece", ROBERTA_LIKE, "<s> $A </s>"), sizes(**AS_ROBERTA)),
    "modernbert": (BPE, sizes(**FFN, **ENDS, cls_token_id=0, sep_token_id=2)),
    "deberta": (BPE, sizes(**FFN, relative_attention=True, pos_att_type=["c2p", "p2c"])),
    "deberta-v2": (UNIGRAM, sizes(**FFN, relative_attention=True, pos_att_type=["p2c", "c2p"])),
    "albert": (UNIGRAM, sizes(**FFN, embedding_size=16)),
    "electra": (WORDPIECE, sizes(**FFN, embedding_size=16)),
}
DECODERS = {
    "gpt2": (GPT, GPT_SIZES | NO_IDS),
    "llama": (LLAMA, sizes(**FFN)),
    "qwen3": (QWEN, sizes(**FFN, **GROUPED)),
    "gemma": (LLAMA, sizes(**FFN, **GROUPED)),
}
OTHER_DECODERS = {  # whose library marks them as decoders in other ways, or in none
    "bloom": (GPT, sizes(layers="n_layer", heads="n_head")),
    "mpt": (GPT, sizes("d_model", "n_layers", "n_heads", max_seq_len=64)),
    "xglm": (BPE, sizes("d_model", "num_layers", "attention_heads", ffn_dim=48)),
    "openai-gpt": (GPT, GPT_SIZES),
    "codegen": (GPT, GPT_SIZES | {"n_embd": 64, "n_head": 4, "rotary_dim": 8, "n_ctx": 64}),
    "mamba": (GPT, sizes(state_size=4)),
    "mamba2": (GPT, sizes(heads="num_heads", num_heads=4, head_dim=16, state_size=8, n_groups=1)),
    "rwkv": (GPT, sizes(context_length=64)),
    "opt": (BPE, sizes(ffn_dim=48, max_position_embeddings=64, word_embed_proj_dim=16)),
    "bert": (WORDPIECE, sizes(**FFN, is_decoder=True)),
}


def build(folder, kind, tokenizer, config, seed=0):
    """Write a model with random weights and its tokenizer, as transformers does."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModel.from_config(AutoConfig.for_model(kind, **config))
        for weight in model.parameters():
            weight.data.mul_(10 if weight.ndim > 1 else 1)  # so that sentences get unlike vectors
    model.save_pretrained(folder)
    small_tokenizer(*tokenizer).save_pretrained(folder)
    return folder


@once
def built(kind, decoder=False):
    """The folder of one of the models above, made once."""
    table = OTHER_DECODERS if decoder else ENCODERS | DECODERS
    return build(Path(HOME.name, f"{kind}-{decoder}"), kind, *table[kind])


def embed(encoder, sentences=SENTENCES, batch_size=7):
    return encode(encoder, tokenize(encoder, sentences), batch_size)


@torch.no_grad()
def alone(folder, pooling, sentences=SENTENCES[:6]):
    """Embeddings by transformers, one sentence at a time: no padding, no mask, no batch."""
    model, tokenizer = AutoModel.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    ids = [torch.tensor([tokenizer(sentence)["input_ids"]]) for sentence in sentences]
    states = [model.eval()(input_ids=row).last_hidden_state[0] for row in ids]
    part = {"cls": 0, "last": -1, "mean": slice(None)}[pooling]
    return torch.stack([h[part].mean(0) if pooling == "mean" else h[part] for h in states])


def close(a, b):
    """Equal to 1e-5 of the vectors' length, which is not to say that all vectors are alike."""
    a, b = torch.as_tensor(a), torch.as_tensor(b)
    assert (a[:, None] - a[None]).norm(dim=-1).max() > 0.05 * a.norm(dim=-1).mean()
    torch.testing.assert_close(a, b, atol=1e-5 * a.norm(dim=1).mean().item(), rtol=0)
    return True


@pytest.mark.parametrize("kind", ENCODERS | DECODERS)
def test_embeddings_are_those_of_one_sentence_at_a_time(kind, tmp_path):
    encoder = load_encoder(str(built(kind)))
    assert encoder.pooling == ("last" if kind in DECODERS else "cls")
    for pooling in (encoder.pooling, "mean"):
        expected = alone(built(kind), pooling)
        assert close(embed(load_encoder(str(built(kind)), pooling), SENTENCES)[:6], expected)
    save_encoder(tmp_path, encoder)
    assert close(
        embed(load_encoder(str(tmp_path)), SENTENCES[:6]), alone(tmp_path, encoder.pooling)
    )


@pytest.mark.parametrize("kind", ENCODERS | DECODERS)
def test_embeddings_are_those_of_sentence_transformers(kind, tmp_path):
    library = pytest.importorskip("sentence_transformers")
    from sentence_transformers.sentence_transformer.modules import Pooling, Transformer

    def by_the_library(model):
        model.tokenizer.pad_token = model.tokenizer.pad_token or model.tokenizer.eos_token
        return model.encode(SENTENCES, batch_size=7, convert_to_tensor=True)

    encoder = load_encoder(str(built(kind)))
    name = {"cls": "cls", "last": "lasttoken"}[encoder.pooling]
    modules = [Transformer(str(built(kind))), Pooling(encoder.dimensions, pooling_mode=name)]
    theirs = library.SentenceTransformer(modules=modules, device="cpu")
    expected = by_the_library(theirs)
    assert close(embed(encoder), expected)  # as a teacher
    batch = pad(tokenize(encoder, SENTENCES[:9]), range(9), torch.device("cpu"))
    with torch.no_grad():
        student = talas.embed(encoder, batch, talas.Settings())[-1][0]
    assert close(student, expected[:9])  # as a student
    save_encoder(tmp_path / "ours", encoder)
    saved = library.SentenceTransformer(str(tmp_path / "ours"), device="cpu")
    assert close(by_the_library(saved), expected)  # our folder, read by the library
    theirs.save(str(tmp_path / "theirs"))
    again = load_encoder(str(tmp_path / "theirs"))  # and the other way round
    assert again.pooling == encoder.pooling and close(embed(again), expected)


@pytest.mark.parametrize("kind", OTHER_DECODERS)
def test_a_decoder_is_pooled_where_it_has_read_the_whole_sentence(kind, ends_with_one_line):
    folder = str(built(kind, decoder=True))
    encoder = load_encoder(folder)
    assert encoder.pooling == "last"
    assert close(embed(encoder)[:6], alone(folder, "last"))
    one, other = embed(encoder, ["The cook sees the door", "The cook sees the boat"])
    assert (one - other).norm() > 0.01 * one.norm()
    ends_with_one_line(lambda: load_encoder(folder, "cls"), "decoder", "--pooling last")


def test_a_model_listed_as_a_decoder_that_reads_both_ways_needs_a_pooling(
    tmp_path, ends_with_one_line
):
    config = sizes("d_model", "n_layer", "n_head", d_inner=48)
    folder = str(build(tmp_path, "xlnet", BPE, config))
    ends_with_one_line(lambda: load_encoder(folder), "xlnet", "--pooling")
    assert load_encoder(folder, "cls").pooling == "cls"


# ------------------------------------------------------------------------ as long as the model is
POSITIONS = {  # models with 64 positions for tokens, some of which count from 2: 66 in their files
    "bert": (WORDPIECE, sizes(**FFN, max_position_embeddings=64)),
    "gpt2": (GPT, GPT_SIZES),
    "mpt": OTHER_DECODERS["mpt"],
    "camembert": (BPE, sizes(**AS_ROBERTA)),
    "mpnet": (BPE, sizes(**AS_ROBERTA)),
    "data2vec-text": (BPE, sizes(**AS_ROBERTA)),
    "esm": (BPE, sizes(**AS_ROBERTA, position_embedding_type="absolute", mask_token_id=4)),
    "luke": (BPE, sizes(**AS_ROBERTA, entity_vocab_size=9, entity_emb_size=8)),
    "xmod": (BPE, sizes(**AS_ROBERTA, languages=["en_XX"], default_language="en_XX")),
    "longformer": (BPE, sizes(**AS_ROBERTA, attention_window=[16, 16])),
}


@pytest.mark.parametrize("kind", POSITIONS)
def test_a_long_sentence_is_cut_where_the_positions_end(kind, tmp_path):
    (algorithm, names, *template), config = POSITIONS[kind]
    unlimited = (algorithm, names, *template, *[""] * (not template), 10**30)
    folder = build(tmp_path, kind, unlimited, config)
    encoder = load_encoder(str(folder), "mean", max_length=500)
    assert encoder.max_length == 64
    long = " ".join(SENTENCES)
    ids = encoder.tokenizer(long, truncation=True, max_length=64)["input_ids"]
    with torch.no_grad():
        hidden = encoder.model(torch.tensor([ids])).last_hidden_state
    ours = embed(encoder, [SENTENCES[0], long])[1:]
    torch.testing.assert_close(ours, hidden.mean(1), atol=1e-4, rtol=1e-4)


def test_neither_a_padding_nor_an_end_token_is_needed(tmp_path):
    folder = build(tmp_path, "gpt2", ("bpe", {}), GPT_SIZES | NO_IDS)
    assert close(embed(load_encoder(str(folder)))[:6], alone(folder, "last"))


def test_weights_of_half_precision_are_loaded_in_float32(bert):
    AutoModel.from_pretrained(bert).half().save_pretrained(bert)
    assert json.loads((bert / "config.json").read_text())["dtype"] == "float16"
    assert load_encoder(str(bert)).model.dtype == torch.float32


def test_padding_has_no_attention_and_rows_keep_their_order(bert):
    encoder = load_encoder(str(bert))
    tokens, rows = tokenize(encoder, SENTENCES), [4, 0, 9]
    batch = pad(tokens, rows, torch.device("cpu"))
    own = [encoder.tokenizer(SENTENCES[i])["input_ids"] for i in rows]
    assert len({len(ids) for ids in own}) > 1
    for ids, row, mask in zip(own, batch["input_ids"], batch["attention_mask"]):
        assert row.tolist() == ids + [0] * (len(row) - len(ids))
        assert mask.tolist() == [1] * len(ids) + [0] * (len(row) - len(ids))


def test_the_host_does_not_wait_for_a_copy_to_a_gpu():
    tensor, device = Mock(), torch.device("cuda:1")
    there = encoder.to_device(tensor, device)
    tensor.pin_memory.return_value.to.assert_called_once_with(device, non_blocking=True)
    assert there is tensor.pin_memory.return_value.to.return_value


def test_a_corpus_longer_than_a_slice_of_tokenising(bert, capsys):
    encoder = load_encoder(str(bert), max_length=12)
    texts = [SENTENCES[i * i % 48] for i in range(2500)]
    ids, starts, _ = tokenize(encoder, texts)
    assert len(starts) == 2501 and starts[-1] == len(ids)
    for i in (0, 999, 1000, 1001, 2499):
        own = encoder.tokenizer(texts[i], truncation=True, max_length=12)["input_ids"]
        assert ids[starts[i] : starts[i + 1]].tolist() == own
    cut = sum(len(encoder.tokenizer(text)["input_ids"]) > 12 for text in texts)
    assert f"{cut} of 2500 sentences are cut after 12 tokens" in capsys.readouterr().out


# ----------------------------------------------------------- what sentence-transformers' files ask
def declare(folder, pooling, kinds=("Transformer", "Pooling"), path="", **configs):
    """Make a model's folder one of sentence-transformers: modules.json and what it names."""
    paths = {"Transformer": path, "Pooling": "1_Pooling"}
    kind = "sentence_transformers.models."
    modules = [
        {"idx": i, "name": str(i), "type": kind + name, "path": paths.get(name, f"{i}_{name}")}
        for i, name in enumerate(kinds)
    ]
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
    (folder / "modules.json").write_text(json.dumps(modules))
    for name, content in configs.items():
        (folder / path / f"{name}.json").write_text(json.dumps(content))
    return folder


OFF = {"pooling_mode_cls_token": False, "pooling_mode_mean_tokens": False}
DIMENSION = {"word_embedding_dimension": 32}
POOLING = [  # 1_Pooling/config.json, in the older and the newer form, and what it means
    (OFF | {"pooling_mode_cls_token": True, "include_prompt": True}, "cls"),
    (OFF | {"pooling_mode_mean_tokens": True, "word_embedding_dimension": 32}, "mean"),
    (OFF | {"pooling_mode_lasttoken": True}, "last"),
    (OFF | {"pooling_mode_cls_token": 1}, "cls"),
    ({}, "mean"),
    ({"pooling_mode": "cls", "embedding_dimension": 32, "include_prompt": True}, "cls"),
    ({"pooling_mode": "mean"}, "mean"),
    ({"pooling_mode": ["lasttoken"]}, "last"),
]


@pytest.mark.parametrize("config, pooling", POOLING)
def test_the_declared_pooling_is_taken_and_printed(bert, config, pooling, capsys):
    assert load_encoder(str(declare(bert, config))).pooling == pooling
    assert f"{pooling} pooling, from its sentence-transformers files" in capsys.readouterr().out


CONFIGS = ["sentence_bert_config", "sentence_roberta_config", "sentence_distilbert_config"]


@pytest.mark.parametrize("path", ["", "0_Transformer"])
@pytest.mark.parametrize("config", CONFIGS)
def test_the_declared_length_and_lower_case_are_honoured(path, config, tmp_path):
    source, folder = built("roberta"), tmp_path / "model"  # whose tokenizer knows capital letters
    shutil.copytree(source, folder / path)
    asked = {config: {"max_seq_length": 20, "do_lower_case": True}}
    encoder = load_encoder(str(declare(folder, DIMENSION, path=path, **asked)))
    assert encoder.max_length == 20
    shouting = [sentence.upper() for sentence in SENTENCES[:6]]
    lower = [sentence.lower() for sentence in SENTENCES[:6]]
    plain = AutoTokenizer.from_pretrained(source)
    assert plain(shouting)["input_ids"] != plain(lower)["input_ids"]
    short = [text[:30] for text in lower]
    assert close(embed(encoder, [t[:30] for t in shouting]), alone(source, "mean", short))
    save_encoder(tmp_path / "saved", encoder)
    again = load_encoder(str(tmp_path / "saved"))
    assert close(embed(again, shouting), embed(encoder, shouting)) and again.max_length == 20
    if path == "":
        library = pytest.importorskip("sentence_transformers")
        theirs = library.SentenceTransformer(str(folder), device="cpu")
        assert close(embed(encoder, shouting), theirs.encode(shouting, convert_to_tensor=True))


PROMPTS = {"prompts": {"query": "query: "}, "default_prompt_name": "query"}
ONE_MODE = {"pooling_mode": "mean"}
NOT_UNDERSTOOD = {  # what a folder of sentence-transformers may ask for: (keywords, words)
    "max pooling": ({"pooling": {"pooling_mode_max_tokens": True}}, ["max", "--pooling"]),
    "weighted": ({"pooling": {"pooling_mode": "weightedmean"}}, ["weightedmean", "--pooling"]),
    "two poolings": ({"pooling": {"pooling_mode": ["cls", "mean"]}}, ["cls+mean"]),
    "a number": ({"pooling": {"pooling_mode": 3}}, ["1_Pooling"]),
    "a list": ({"pooling": []}, ["1_Pooling"]),
    "Dense": ({"kinds": ["Transformer", "Pooling", "Dense"]}, ["Dense", ".npy"]),
    "no Pooling": ({"kinds": ["Transformer"]}, ["Transformer", ".npy"]),
    "no Transformer": ({"kinds": ["Pooling"]}, ["Pooling"]),
    "no module": ({"kinds": []}, ["modules", ".npy"]),
    "static": ({"kinds": ["StaticEmbedding"]}, ["StaticEmbedding"]),
    "length 0": ({"sentence_bert_config": {"max_seq_length": 0}}, ["max_seq_length 0"]),
    "length -1": ({"sentence_bert_config": {"max_seq_length": -1}}, ["max_seq_length -1"]),
    "length '9'": ({"sentence_bert_config": {"max_seq_length": "9"}}, ["max_seq_length '9'"]),
    "length 2": ({"sentence_bert_config": {"max_seq_length": 2}}, ["2 tokens leave none"]),
    "case 1": ({"sentence_bert_config": {"do_lower_case": 1}}, ["do_lower_case 1"]),
    "tokenizer": ({"sentence_bert_config": {"tokenizer_name_or_path": "x"}}, ["tokenizer_name"]),
    "task": ({"sentence_bert_config": {"transformer_task": "fill-mask"}}, ["transformer_task"]),
    "arguments": ({"sentence_roberta_config": {"model_args": {"a": 1}}}, ["model_args"]),
    "prompt": ({"config_sentence_transformers": PROMPTS}, ["'query: '", ".npy"]),
}


@pytest.mark.parametrize("asks, words", NOT_UNDERSTOOD.values(), ids=NOT_UNDERSTOOD)
def test_what_is_not_understood_is_refused(bert, asks, words, ends_with_one_line):
    declare(bert, **({"pooling": ONE_MODE} | asks))
    ends_with_one_line(lambda: load_encoder(str(bert)), str(bert), *words)


def test_a_pooling_that_was_asked_for_takes_the_place_of_the_declared_one(bert):
    declare(bert, {"pooling_mode": "weightedmean"})
    assert load_encoder(str(bert), "mean").pooling == "mean"


def test_a_prompt_that_is_not_the_default_changes_nothing(bert):
    about = {"prompts": {"query": "query: "}, "default_prompt_name": None}
    declare(bert, {"pooling_mode": "cls"}, config_sentence_transformers=about)
    assert close(embed(load_encoder(str(bert)))[:6], alone(bert, "cls"))


def test_a_missing_pooling_folder_is_refused(bert, ends_with_one_line):
    shutil.rmtree(declare(bert, {}) / "1_Pooling")
    ends_with_one_line(lambda: load_encoder(str(bert)), "1_Pooling/config.json", "modules.json")


# --------------------------------------------------------------------------------- models, refused
UNREADABLE = {  # for a JSON file: where reading it is forbidden, or as good as that
    "a folder": None,
    "torn": '{"a"',
    "empty": "",
    "null": "null",
    "number": "3",
    "deep": "[" * 100_000,
    "digits": '{"max_seq_length": %s}' % ("9" * 5000),
    "binary": "\x00\x01",
}
JSON_FILES = ["config.json", "tokenizer.json", "modules.json", "1_Pooling/config.json"]
JSON_FILES += ["sentence_bert_config.json", "config_sentence_transformers.json"]


NOTHING_SAID = [(file, "null") for file in JSON_FILES[4:]]
CASES = [(file, content) for file in JSON_FILES for content in UNREADABLE]
CASES = [case for case in CASES if case not in NOTHING_SAID]


@pytest.mark.parametrize("file, content", CASES)
def test_a_model_whose_json_cannot_be_read_is_refused(file, content, bert, ends_with_one_line):
    declare(bert, {"pooling_mode": "mean"})
    (bert / file).unlink(missing_ok=True)
    if UNREADABLE[content] is None:
        (bert / file).mkdir()
    else:
        (bert / file).write_text(UNREADABLE[content])
    ends_with_one_line(lambda: load_encoder(str(bert)), str(bert))


@pytest.mark.parametrize("kind", ["bert", "roberta", "gpt2", "deberta-v2", "llama", "modernbert"])
def test_a_model_without_tokenizer_files_is_refused(kind, tmp_path, ends_with_one_line):
    folder = shutil.copytree(built(kind), tmp_path / "model")
    for path in folder.glob("tokenizer*"):
        path.unlink()
    ends_with_one_line(lambda: load_encoder(str(folder)), str(folder), "tokenizer")


def in_each_script(model, corpus, cache, folder):
    """The flags with which each script is to load a model."""
    return {
        "cache_teacher": ["--teacher", model, "--corpus", corpus, "--output", folder / "t.pt"],
        "talas": ["--student", model, "--teacher", cache, "--output", folder / "student"],
        "eval": [model, "--tasks", "captions", "--json", folder / "scores.json"],
    }


@pytest.mark.parametrize("script", SCRIPTS)
def test_no_script_takes_a_model_without_tokenizer_files(
    script, bert, tmp_path, corpus, cache, ends_with_one_line
):
    for path in bert.glob("tokenizer*"):
        path.unlink()
    flags = in_each_script(bert, corpus, cache, tmp_path)[script]
    before = sorted(tmp_path.rglob("*"))
    ends_with_one_line(lambda: run(script, *flags), str(bert), "tokenizer")
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("kind", ["bart", "t5", "t5gemma", "pegasus"])
def test_an_encoder_decoder_is_refused_before_any_work(
    script, kind, tmp_path, corpus, cache, ends_with_one_line
):
    model = tmp_path / "model"
    AutoConfig.for_model(kind).save_pretrained(model)
    flags = in_each_script(model, corpus, cache, tmp_path)[script]
    ends_with_one_line(lambda: run(script, *flags), "encoder-decoder", ".npy")


def test_a_padding_token_that_no_embedding_has_is_refused(bert, ends_with_one_line):
    config = json.loads((bert / "config.json").read_text())
    (bert / "config.json").write_text(json.dumps(config | {"pad_token_id": config["vocab_size"]}))
    ends_with_one_line(lambda: load_encoder(str(bert)), str(bert))


def in_the_cache_of_the_hub(bert, name, absent=()):
    """Put a model where the Hub's client keeps what it has fetched, and what it found absent."""
    repository = Path(HF_HUB_CACHE, f"models--{name.replace('/', '--')}")
    shutil.copytree(bert, repository / "snapshots" / "0123abc")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0123abc")
    for file in absent:
        path = repository / ".no_exist" / "0123abc" / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()


def test_a_model_in_the_cache_of_the_hub_needs_no_network(bert, ends_with_one_line, capsys):
    in_the_cache_of_the_hub(bert, "a/known", absent=["modules.json"])
    assert load_encoder("a/known").pooling == "cls"
    assert "cls pooling" in capsys.readouterr().out
    in_the_cache_of_the_hub(bert, "an/unknown")  # nobody has asked for its modules.json yet
    ends_with_one_line(lambda: load_encoder("an/unknown"), "cannot reach modules.json", "--pooling")
    assert load_encoder("an/unknown", "mean").pooling == "mean"


def test_a_tokenizer_larger_than_the_embeddings_is_refused(tmp_path, ends_with_one_line):
    folder = build(tmp_path, "bert", WORDPIECE, sizes(**FFN) | {"vocab_size": 20})
    ends_with_one_line(lambda: load_encoder(str(folder)), "tokens", "20")


def test_a_student_of_unlike_widths_is_refused(tmp_path, cache, ends_with_one_line):
    folder, output = built("opt", decoder=True), tmp_path / "student"
    flags = ["--student", folder, "--teacher", cache, "--output", output]
    ends_with_one_line(lambda: run("talas", *flags), "unlike widths", "(32, 16)")


def test_weights_that_are_torn_or_missing_are_refused(bert, ends_with_one_line):
    from safetensors.torch import load_file, save_file

    path = bert / "model.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    ends_with_one_line(lambda: load_encoder(str(bert)), str(bert))
    path.write_bytes(whole)
    weights = load_file(path)
    del weights["encoder.layer.1.output.dense.weight"]
    save_file(weights, path, metadata={"format": "pt"})
    words = ["lack 1 weights", "encoder.layer.1.output.dense.weight"]
    ends_with_one_line(lambda: load_encoder(str(bert)), *words)
    path.unlink()
    ends_with_one_line(lambda: load_encoder(str(bert)), str(bert))


@pytest.mark.parametrize("name", ["no/such-model", "nowhere", "x" * 300, "a\0b", ""])
def test_a_model_that_is_not_there_is_one_line(name, ends_with_one_line):
    for pooling in ("auto", "mean"):
        ends_with_one_line(lambda pooling=pooling: load_encoder(name, pooling))


def test_overwriting_a_folder_of_sentence_transformers_leaves_nothing_of_it(tmp_path, cache, bert):
    output = tmp_path / "student"
    shutil.copytree(bert, output)
    asks = {"config_sentence_transformers": PROMPTS, "sentence_bert_config": {"max_seq_length": 5}}
    declare(output, {"pooling_mode": "max"}, **asks)
    flags = ["--teacher", cache, "--student", bert, "--output", output, "--overwrite"]
    run("talas", *flags, "--epochs", 1, "--batch_size", 16)
    student = load_encoder(str(output))
    assert (student.pooling, student.max_length) == ("cls", 64)
    library = pytest.importorskip("sentence_transformers")
    theirs = library.SentenceTransformer(str(output), device="cpu")
    assert close(theirs.encode(SENTENCES, convert_to_tensor=True), embed(student))
