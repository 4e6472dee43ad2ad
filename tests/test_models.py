"""Models are read as their authors meant them, or refused; what is saved is what was trained.

The models are small and have random weights. The truth: token ids by `tokenizers` from
tokenizer.json; embeddings by transformers, a sentence at a time, and by sentence-transformers.
"""

import shutil
from dataclasses import dataclass, field, replace
from pathlib import Path

import httpx2
import numpy as np
import pytest
import torch
from helpers import SENTENCES, TEXTS, embed_alone, ids_alone, write_files
from huggingface_hub.constants import HF_HUB_CACHE
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError
from safetensors.torch import load_file, save_file
from sentence_transformers import SentenceTransformer
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoConfig, AutoModel, AutoTokenizer

import talas
from support.data import Corpus
from support.encoder import dry_run, encode, pad, pool, pooled_layers, save_encoder, tokenize
from support.loading import load_encoder
from support.run import check_fit

TOKENIZER_CONFIG = "tokenizer_config.json"
POOLING_CONFIG = "1_Pooling/config.json"
PROMPT_CONFIG = "config_sentence_transformers.json"
BERT_CONFIG = "sentence_bert_config.json"


# ----------------------------------------------------------------------------------- small models
BERT_TOKENS = {
    "pad_token": "[PAD]",
    "unk_token": "[UNK]",
    "cls_token": "[CLS]",
    "sep_token": "[SEP]",
    "mask_token": "[MASK]",
}
ROBERTA_TOKENS = {
    "cls_token": "<s>",
    "pad_token": "<pad>",
    "sep_token": "</s>",
    "unk_token": "<unk>",
    "mask_token": "<mask>",
}
LLAMA_TOKENS = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
GPT_TOKENS = {"eos_token": "<|end|>"}
SMALL = {"vocab_size": 400, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
SMALL_BERT = SMALL | {"intermediate_size": 48, "max_position_embeddings": 64}
SMALL_ROBERTA = SMALL_BERT | {
    "max_position_embeddings": 66,  # of which 64 are used: they are counted from 2
    "pad_token_id": 1,
    "bos_token_id": 0,
    "eos_token_id": 2,
}
SMALL_GPT2 = {
    "vocab_size": 400,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 2,
    "n_positions": 64,
    "bos_token_id": None,
    "eos_token_id": None,
}


@dataclass
class Kind:
    """A kind of model, with a tokenizer of its kind."""

    model_type: str
    config: dict
    algorithm: str  # of the tokenizer: wordpiece or bpe
    special_tokens: dict
    template: str = ""  # where the special tokens go
    normalizer: object = None
    tokenizer_config: dict = field(default_factory=dict)
    pooling: str = "cls"  # what `auto` is for it


def train_tokenizer(kind):
    """A tokenizers.Tokenizer with the vocabulary of the sentences."""
    options = {"special_tokens": list(kind.special_tokens.values()), "show_progress": False}
    if kind.algorithm == "wordpiece":
        tokenizer = Tokenizer(models.WordPiece(unk_token=kind.special_tokens["unk_token"]))
        tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        trainer = trainers.WordPieceTrainer(**options)
    else:
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        letters = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(initial_alphabet=letters, vocab_size=350, **options)
    if kind.normalizer:
        tokenizer.normalizer = kind.normalizer
    tokenizer.train_from_iterator(SENTENCES, trainer)
    if kind.template:
        ids = [(token, tokenizer.token_to_id(token)) for token in options["special_tokens"]]
        tokenizer.post_processor = processors.TemplateProcessing(kind.template, special_tokens=ids)
    return tokenizer


def build(folder, kind):
    """Write a model of a kind with random weights, and its tokenizer. Returns the folder."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModel.from_config(AutoConfig.for_model(kind.model_type, **kind.config))
        for weight in model.parameters():
            weight.data.mul_(10 if weight.ndim > 1 else 1)  # so that sentences get unlike vectors
    model.save_pretrained(folder)
    tokenizer = train_tokenizer(kind)
    tokenizer.enable_padding(length=40)  # files may say so, and no library follows
    tokenizer.save(str(folder / "tokenizer.json"))
    return write_files(folder, {TOKENIZER_CONFIG: kind.special_tokens | kind.tokenizer_config})


BERT = Kind("bert", SMALL_BERT, "wordpiece", BERT_TOKENS, "[CLS] $A [SEP]")
BERT.normalizer = normalizers.BertNormalizer()
ROBERTA = Kind("roberta", SMALL_ROBERTA, "bpe", ROBERTA_TOKENS, "<s> $A </s>")
LLAMA = Kind("llama", SMALL_BERT, "bpe", LLAMA_TOKENS, "<s> $A", pooling="last")
LLAMA.tokenizer_config = {"add_bos_token": True, "padding_side": "left"}
GPT2 = Kind("gpt2", SMALL_GPT2, "bpe", GPT_TOKENS, pooling="last")
KINDS = [
    BERT,
    ROBERTA,
    Kind(
        "modernbert",
        SMALL_ROBERTA | {"cls_token_id": 0, "sep_token_id": 2},
        "bpe",
        ROBERTA_TOKENS,
        "<s> $A </s>",
    ),
    GPT2,
    LLAMA,
    Kind(
        "qwen3",
        SMALL_BERT | {"num_key_value_heads": 1},
        "bpe",
        {"pad_token": "<|end|>"},
        "$A <|end|>",
        pooling="last",
    ),
]


# ---------------------------------------------------------------------------- what is compared
def embed(encoder, texts=TEXTS):
    return encode(encoder, tokenize(encoder, texts), batch_size=3)


def token_ids(encoder, texts=TEXTS):
    tokens = tokenize(encoder, texts)
    return [ids.tolist() for ids in np.split(tokens.ids, tokens.starts[1:-1])]


def by_sentence_transformers(folder, texts=TEXTS):
    model = SentenceTransformer(str(folder), device="cpu")
    return model.encode(list(texts), batch_size=3, convert_to_tensor=True)


def assert_same_vectors(actual, expected):
    """Equal to 1e-5 of their length, and not all alike."""
    length = expected.norm(dim=1).mean().item()
    assert torch.cdist(expected, expected).max() > 0.05 * length
    torch.testing.assert_close(actual, expected, atol=1e-5 * length, rtol=0)


def small_corpus(encoder, sentences=TEXTS):
    cache = {"sentences": sentences, "sources": ["a"] * len(sentences), "embeddings": None}
    return Corpus(cache, encoder)


# ------------------------------------------------------------------ embeddings; what is saved
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.model_type)
def test_a_model_is_read_as_meant_and_saved_as_trained(kind, tmp_path, capsys):
    folder = build(tmp_path / "model", kind)
    encoder = load_encoder(folder, max_length=60)
    assert encoder.pooling == kind.pooling
    assert f"{kind.pooling} pooling, it is a" in capsys.readouterr().out
    assert encoder.widths == (32, 32)
    assert token_ids(encoder) == ids_alone(folder)
    expected = embed_alone(folder, kind.pooling)
    assert_same_vectors(embed(encoder), expected)

    dry_run(encoder, small_corpus(encoder), tmp_path / "student", two_views=False)
    rows = torch.arange(10).repeat(2)  # more than a piece of a batch
    tokens = pad(tokenize(encoder, TEXTS), rows, encoder.model.eval())
    first, last = pooled_layers(encoder, tokens)
    assert_same_vectors(first[10:], embed_alone(folder, kind.pooling, layer=1))
    assert_same_vectors(last[10:], expected)

    saved = tmp_path / "saved"
    save_encoder(saved, encoder)
    again = load_encoder(saved)
    assert (again.pooling, again.max_length) == (kind.pooling, 60)
    assert_same_vectors(embed(again), expected)
    assert_same_vectors(embed_alone(saved, kind.pooling), expected)
    assert_same_vectors(by_sentence_transformers(saved), expected)
    tokenizer = Tokenizer.from_file(str(saved / "tokenizer.json"))
    assert tokenizer.truncation is None
    assert tokenizer.padding is None
    library = AutoTokenizer.from_pretrained(saved)
    assert library(TEXTS)["input_ids"] == ids_alone(folder)
    batch = library(TEXTS, padding=True, return_tensors="pt")
    hidden = AutoModel.from_pretrained(saved)(**batch).last_hidden_state
    assert_same_vectors(pool(hidden, batch["attention_mask"], kind.pooling).detach(), expected)


@pytest.mark.parametrize("kind", [ROBERTA, GPT2], ids=["roberta", "gpt2"])
def test_a_long_sentence_is_cut_where_the_positions_end(kind, tmp_path, capsys):
    folder = build(tmp_path, kind)
    encoder = load_encoder(folder, "mean", max_length=500)
    long = " ".join(SENTENCES)
    ids = ids_alone(folder, [long])[0]
    ids = ids[:63] + ids[-1:] if kind == ROBERTA else ids[:64]  # the end is kept
    assert token_ids(encoder, [long]) == [ids]
    hidden = encoder.model(torch.tensor([ids])).last_hidden_state
    expected = hidden.mean(1).detach()
    torch.testing.assert_close(embed(encoder, ["a", long])[1:], expected, atol=1e-4, rtol=1e-4)
    assert "1 of 2 sentences are cut after 64 tokens" in capsys.readouterr().out
    write_files(folder, {TOKENIZER_CONFIG: {"model_max_length": 40}})
    assert load_encoder(folder).max_length == 40


LEFT = {"direction": "Left", "max_length": 9, "strategy": "LongestFirst", "stride": 0}


@pytest.mark.parametrize(
    "changes",
    [{"tokenizer.json": {"truncation": LEFT}}, {TOKENIZER_CONFIG: {"truncation_side": "left"}}],
    ids=["tokenizer.json", TOKENIZER_CONFIG],
)
def test_sentences_are_cut_on_the_left_where_a_file_says_so(changes, bert, tmp_path):
    encoder = load_encoder(write_files(bert, changes), max_length=12)
    ids = ids_alone(bert, SENTENCES[4:5])[0]
    assert len(ids) > 12
    expected = [ids[0], *ids[-11:]]
    assert token_ids(encoder, SENTENCES[4:5]) == [expected]
    save_encoder(tmp_path / "saved", encoder)
    library = AutoTokenizer.from_pretrained(tmp_path / "saved")
    assert library(SENTENCES[4], truncation=True)["input_ids"] == expected
    theirs = by_sentence_transformers(tmp_path / "saved", SENTENCES[:8])
    assert_same_vectors(theirs, embed(encoder, SENTENCES[:8]))


@pytest.mark.parametrize("pooling", ["cls", "mean", "last"])
def test_padding_on_either_side_and_half_precision(pooling):
    states = 1000 * torch.rand(2000, 4).half()
    expected = {"cls": states[0], "last": states[-1], "mean": states.double().mean(0)}[pooling]
    batch = torch.full((2, 2100, 4), 6e4).half()
    mask = torch.zeros(2, 2100).long()
    batch[0, :2000] = states
    mask[0, :2000] = 1
    batch[1, 100:] = states
    mask[1, 100:] = 1
    pooled = pool(batch, mask, pooling)
    assert pooled.dtype == torch.float16
    torch.testing.assert_close(pooled.double(), expected.expand(2, 4).double(), rtol=2e-3, atol=0)
    with pytest.raises(ValueError):
        pool(batch, mask, "max")


def test_batches_and_slices_keep_their_order(bert):
    encoder = load_encoder(bert, max_length=12)
    texts = [SENTENCES[i * i % 48] for i in range(2099)] + ["rose"]
    rows = [2099, 1, 1000, 999]
    batch = pad(tokenize(encoder, texts), rows, encoder.model)
    for i, row in enumerate(rows):
        ids = ids_alone(bert, [texts[row]])[0]
        if len(ids) > 12:
            ids = ids[:11] + ids[-1:]
        padding = [0] * (12 - len(ids))
        assert batch["input_ids"][i].tolist() == ids + padding
        assert batch["attention_mask"][i].tolist() == [1] * len(ids) + padding


# ------------------------------------------------------------- models whose vectors would be wrong
def test_a_big_birds_attention_is_as_its_files_say(bert):
    """A short batch switches it to another one for good."""
    config = AutoConfig.for_model(
        "big_bird", hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48
    )
    AutoModel.from_config(config).save_pretrained(bert)
    assert load_encoder(bert).model.attention_type == "block_sparse"


def test_a_vector_that_depends_on_its_batch_is_refused(tmp_path, ends_with_one_line):
    config = SMALL_BERT | {"embedding_size": 32}
    kind = Kind("convbert", config, "wordpiece", BERT_TOKENS, "[CLS] $A [SEP]")
    folder = build(tmp_path, kind)
    ends_with_one_line(lambda: load_encoder(folder), "changes when it is batched with a longer one")


SURPLUS_WEIGHTS = [
    pytest.param("bert.encoder.layer.1.output.dense.lora_A.weight", True, id="LoRA"),
    pytest.param("encoder.layer.3.output.dense.bias", True, id="a further layer"),
    pytest.param("cls.predictions.transform.dense.weight", False, id="head"),
    pytest.param("classifier.0.weight", False, id="head with layers"),
    pytest.param("encoder.layer.0.attention.masked_bias", False, id="GPT's mask"),
]


@pytest.mark.parametrize("weight, refused", SURPLUS_WEIGHTS)
def test_surplus_weights_of_a_layer_are_refused(weight, refused, bert, ends_with_one_line):
    expected = embed(load_encoder(bert))
    weights = load_file(bert / "model.safetensors")
    weights[weight] = torch.ones(3)
    save_file(weights, bert / "model.safetensors", metadata={"format": "pt"})
    if refused:
        ends_with_one_line(lambda: load_encoder(bert), "does not use its weight", weight)
    else:
        assert torch.equal(embed(load_encoder(bert)), expected)


def test_the_last_layer_is_the_vector_that_is_served(tmp_path):
    folder = write_files(build(tmp_path, LLAMA), {"config.json": {"tie_last_hidden_states": False}})
    encoder = load_encoder(folder)
    tokens = pad(tokenize(encoder, TEXTS), range(10), encoder.model)
    last = pooled_layers(encoder, tokens)[-1]
    assert_same_vectors(last.detach(), embed_alone(folder, "last"))
    with torch.no_grad():
        states = encoder.model(**tokens, output_hidden_states=True).hidden_states
    assert not torch.allclose(last, pool(states[-1], tokens["attention_mask"], "last"), rtol=0.1)


def test_pooling_of_a_decoder(bert, tmp_path, ends_with_one_line):
    folder = build(tmp_path, LLAMA)
    ends_with_one_line(lambda: load_encoder(folder, "cls"), "decoder", "--pooling last")
    write_files(folder, {"config.json": {"is_causal": False}})  # tokens see those after them
    encoder = load_encoder(folder)
    assert encoder.pooling == "cls"
    assert_same_vectors(embed(encoder), embed_alone(folder, "cls"))
    assert load_encoder(write_files(bert, {"config.json": {"is_decoder": True}})).pooling == "last"


# -------------------------------------------------------------------------------- the tokenizer
def test_ids_are_those_of_tokenizer_json_whatever_class_is_named(tmp_path):
    kind = Kind("bert", SMALL_BERT, "wordpiece", BERT_TOKENS, "[CLS] $A [SEP]")
    kind.normalizer = normalizers.Replace("oo", "u")
    kind.tokenizer_config = {"tokenizer_class": "BertTokenizer"}
    folder = build(tmp_path / "model", kind)
    assert AutoTokenizer.from_pretrained(folder)(TEXTS)["input_ids"] != ids_alone(folder)
    encoder = load_encoder(folder)
    assert token_ids(encoder) == ids_alone(folder)
    save_encoder(tmp_path / "saved", encoder)
    library = AutoTokenizer.from_pretrained(tmp_path / "saved")
    assert library(TEXTS)["input_ids"] == ids_alone(folder)


def test_a_vocabulary_alone_is_read_by_its_class(bert):
    expected = ids_alone(bert)
    vocabulary = load_encoder(bert).tokenizer.get_vocab()
    lines = "\n".join(sorted(vocabulary, key=vocabulary.get))
    write_files(bert, {"vocab.txt": lines, "tokenizer.json": None})
    assert token_ids(load_encoder(bert)) == expected


def test_more_tokens_than_embeddings_matter_only_where_they_occur(tmp_path, ends_with_one_line):
    folder = build(tmp_path, BERT)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.add_tokens(["zebra"])
    zebra = tokenizer.token_to_id("zebra")
    tokenizer.save(str(folder / "tokenizer.json"))
    model = AutoModel.from_pretrained(folder)
    model.resize_token_embeddings(zebra)
    model.save_pretrained(folder)
    encoder = load_encoder(folder)
    assert_same_vectors(embed(encoder), embed_alone(folder, "cls"))
    words = (f"id {zebra}", f"{zebra} word embeddings")
    ends_with_one_line(lambda: tokenize(encoder, ["a", "the zebra"]), *words)


def test_a_sentence_without_tokens_is_refused(tmp_path, ends_with_one_line):
    """Its vector would be that of padding."""
    encoder = load_encoder(build(tmp_path, GPT2))
    ends_with_one_line(lambda: tokenize(encoder, ["a", ""]), "no token in the sentence ''")


def test_token_types_are_refused(tmp_path, ends_with_one_line):
    """They change the vector, and none are given to a model here."""
    folder = build(tmp_path, replace(BERT, template="[CLS]:1 $A:1 [SEP]:1"))
    ends_with_one_line(lambda: load_encoder(folder), "token types")


def test_a_length_that_special_tokens_fill_is_refused(bert, ends_with_one_line):
    """All sentences would have the same vector."""
    ends_with_one_line(lambda: load_encoder(bert, max_length=2), "2 tokens leave no room")


@pytest.mark.parametrize(
    "kind, named, pad_token",
    [
        pytest.param(BERT, {"pad_token": "[MASK]"}, "[MASK]", id="named"),
        pytest.param(ROBERTA, {"pad_token": None}, "<pad>", id="by config.json's id"),
        pytest.param(GPT2, {"pad_token": "<absent>"}, "<|end|>", id="the end of a sentence"),
    ],
)
def test_the_token_to_pad_with(kind, named, pad_token, tmp_path):
    folder = write_files(build(tmp_path, kind), {TOKENIZER_CONFIG: named})
    assert load_encoder(folder).special_tokens["pad_token"] == pad_token


# ---------------------------------------------------------------------------------- the dry run
def test_a_dry_run_changes_nothing(bert, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", "/nowhere")  # it saves next to the output
    encoder = load_encoder(bert)
    corpus = small_corpus(encoder)
    weights = [weight.clone() for weight in encoder.model.parameters()]
    state = torch.get_rng_state()
    files = sorted(tmp_path.rglob("*"))
    dry_run(encoder, corpus, tmp_path / "student", two_views=True)
    assert sorted(tmp_path.rglob("*")) == files
    assert torch.equal(torch.get_rng_state(), state)
    for before, after in zip(weights, encoder.model.parameters()):
        assert torch.equal(before, after)


def test_a_student_that_others_would_read_otherwise_is_refused(tmp_path, ends_with_one_line):
    config = SMALL_BERT | {"num_key_value_heads": 1}
    kind = Kind("qwen2", config, "bpe", {"pad_token": "<|end|>"})  # read by its class alone
    kind.normalizer = normalizers.Lowercase()
    encoder = load_encoder(build(tmp_path / "model", kind))
    corpus = small_corpus(encoder, ["rose"] * 99 + ["The Rose"])
    words = ["differently from tokenizer.json", "'The Rose'", "qwen2"]
    ends_with_one_line(lambda: dry_run(encoder, corpus, tmp_path / "student", False), *words)


def test_a_student_that_cannot_be_saved_is_refused(bert, tmp_path, ends_with_one_line):
    encoder = load_encoder(bert)
    output = tmp_path / "missing" / "student"
    corpus = small_corpus(encoder)
    ends_with_one_line(lambda: dry_run(encoder, corpus, output, False), str(output), "No such file")


def test_a_student_without_a_token_to_pad_with_is_refused(tmp_path, ends_with_one_line):
    encoder = load_encoder(build(tmp_path / "model", Kind("gpt2", SMALL_GPT2, "bpe", {})))
    corpus = small_corpus(encoder)
    ends_with_one_line(lambda: dry_run(encoder, corpus, tmp_path / "s", False), "pad_token")


def test_layers_of_different_widths_are_refused(bert, ends_with_one_line):
    encoder = replace(load_encoder(bert), widths=(32, 48, 32))
    s = talas.Settings(teacher="teacher.pt", student="bert", batch_size=2)
    words = ["bert: its layers differ in width", "(32, 48, 32)"]
    ends_with_one_line(lambda: check_fit(s, small_corpus(encoder)), *words)


# ------------------------------------------------------- what sentence-transformers' files declare
MODES = ["cls_token", "mean_tokens", "max_tokens", "mean_sqrt_len_tokens", "lasttoken"]
NO_MODE = {f"pooling_mode_{mode}": False for mode in MODES} | {"word_embedding_dimension": 32}
CLS = NO_MODE | {"pooling_mode_cls_token": True}
MEAN = NO_MODE | {"pooling_mode_mean_tokens": True}
LAST = NO_MODE | {"pooling_mode_lasttoken": True}
TRANSFORMER = "sentence_transformers.models.Transformer"
POOLING = "sentence_transformers.models.Pooling"
NORMALIZE = "sentence_transformers.models.Normalize"
NEW_TRANSFORMER = "sentence_transformers.base.modules.transformer.Transformer"
NEW_POOLING = "sentence_transformers.sentence_transformer.modules.pooling.Pooling"
DENSE = "sentence_transformers.models.Dense"
PROMPTS = {"prompts": {"query": "query: ", "document": ""}, "default_prompt_name": None}


def modules(*types, path=""):
    """The content of a modules.json; path: of the first module."""
    rows = zip("012", [path, "1_Pooling", "2_Normalize"], types)
    return [{"idx": int(i), "name": i, "path": path, "type": name} for i, path, name in rows]


NEW_FILES = {
    "modules.json": modules(NEW_TRANSFORMER, NEW_POOLING),
    POOLING_CONFIG: {"pooling_mode": "lasttoken", "embedding_dimension": 32},
    BERT_CONFIG: {"transformer_task": "feature-extraction"},
    PROMPT_CONFIG: {"a_coming_key": 1},
}
FIFTY = {"max_seq_length": 50}
DECLARED = [  # files, the pooling and the maximum length that they mean
    ({POOLING_CONFIG: CLS, BERT_CONFIG: FIFTY}, "cls", 50),
    ({POOLING_CONFIG: CLS, "sentence_distilbert_config.json": FIFTY}, "cls", 50),
    ({POOLING_CONFIG: LAST, BERT_CONFIG: {"max_seq_length": None}}, "last", 64),
    ({POOLING_CONFIG: MEAN, PROMPT_CONFIG: PROMPTS}, "mean", 64),
    (NEW_FILES, "last", 64),
]


@pytest.mark.parametrize("files, pooling, max_length", DECLARED)
def test_what_is_declared_is_followed_and_printed(files, pooling, max_length, bert, capsys):
    write_files(bert, {"modules.json": modules(TRANSFORMER, POOLING)} | files)
    encoder = load_encoder(bert)
    assert f"{pooling} pooling, from its sentence-transformers files" in capsys.readouterr().out
    assert (encoder.pooling, encoder.max_length) == (pooling, max_length)
    assert_same_vectors(embed(encoder), by_sentence_transformers(bert))
    asked = load_encoder(bert, "mean", 9)
    assert (asked.pooling, asked.max_length) == ("mean", 9)


def test_a_declared_normalisation_is_kept_for_others(bert, tmp_path):
    declared = modules(TRANSFORMER, POOLING, NORMALIZE)
    encoder = load_encoder(write_files(bert, {"modules.json": declared, POOLING_CONFIG: MEAN}))
    vectors = embed(encoder)
    assert_same_vectors(vectors, embed_alone(bert, "mean"))
    save_encoder(tmp_path / "saved", encoder)
    theirs = by_sentence_transformers(tmp_path / "saved")
    assert_same_vectors(theirs, vectors / vectors.norm(dim=1, keepdim=True))
    assert load_encoder(tmp_path / "saved").normalize


def test_declared_lower_case_and_folders_are_followed_and_kept(tmp_path):
    root = tmp_path / "model"
    build(root / "0_Transformer", ROBERTA)
    files = {
        "modules.json": modules(TRANSFORMER, POOLING, path="0_Transformer"),
        f"0_Transformer/{BERT_CONFIG}": {"max_seq_length": 50, "do_lower_case": True},
        POOLING_CONFIG: CLS,
    }
    encoder = load_encoder(write_files(root, files))
    upper = [text.upper() for text in TEXTS]
    lower = [text.lower() for text in TEXTS]
    assert token_ids(encoder, upper) == ids_alone(root / "0_Transformer", lower)
    expected = embed_alone(root / "0_Transformer", "cls", lower)
    assert_same_vectors(embed(encoder, upper), expected)
    save_encoder(tmp_path / "saved", encoder)
    assert_same_vectors(embed(load_encoder(tmp_path / "saved"), upper), expected)
    assert_same_vectors(by_sentence_transformers(tmp_path / "saved", upper), expected)


# ------------------------------------------------------------------------------------- refusals
QUERY = PROMPTS | {"default_prompt_name": "query"}
SQRT = NO_MODE | {"pooling_mode_mean_sqrt_len_tokens": True}
ADDED_TOKEN = {"added_tokens_decoder": {"90": {"content": "covid"}}}
REFUSED = [  # what is changed in a BERT's files, the file that is named, words of the message
    ({PROMPT_CONFIG: QUERY}, "", "'query: '"),
    ({PROMPT_CONFIG: {"truncate_dim": 8}}, "", "truncate_dim 8"),
    ({"modules.json": ["Transformer"]}, "modules.json", "a list of modules"),
    ({"tokenizer_config.json": {"model_max_length": "512"}}, "", "maximum length"),
    ({POOLING_CONFIG: {"pooling_mode_lasttoken": True}}, POOLING_CONFIG, "pooling_mode_lasttoken"),
    ({POOLING_CONFIG: SQRT}, POOLING_CONFIG, "pooling_mode_mean_sqrt_len_tokens"),
    ({"modules.json": modules(TRANSFORMER, POOLING, DENSE)}, "modules.json", "Dense"),
    ({"modules.json": modules("custom.Transformer", POOLING)}, "modules.json", "custom"),
    ({"model.safetensors": b"torn" * 99}, "", "files whole"),
    ({"config.json": {"intermediate_size": 7}}, "", "lack 9 of"),
    ({"config.json": {"model_type": "blenderbot"}}, "", "encoder-decoder"),
    ({"config.json": {"auto_map": {"AutoModel": "x.Y"}}}, "config.json", "auto_map"),
    ({"config.json": {"quantization_config": {"bits": 4}}}, "config.json", "quantization_config"),
    ({"config.json": {"attn_implementation": "flash_attention_2"}}, "", "FlashAttention2"),
    ({"adapter_config.json": {"r": 8}}, "adapter_config.json", "adapters"),
    ({"tokenizer.json": None}, "", "no tokenizer.json"),
    ({TOKENIZER_CONFIG: {"split_special_tokens": True}}, TOKENIZER_CONFIG, "split_special_tokens"),
    ({TOKENIZER_CONFIG: ADDED_TOKEN}, TOKENIZER_CONFIG, "'covid' is not in tokenizer.json"),
]


@pytest.mark.parametrize("changes, file, words", REFUSED)
def test_what_would_change_embeddings_is_refused(changes, file, words, bert, ends_with_one_line):
    declared = modules(TRANSFORMER, POOLING)
    write_files(bert, {"modules.json": declared, POOLING_CONFIG: CLS})
    write_files(bert, changes)
    ends_with_one_line(lambda: load_encoder(bert), str(bert / file), words)


@pytest.mark.parametrize("key", ["add_bos_token", "add_eos_token"])
def test_an_end_that_tokenizer_json_does_not_add_is_refused(key, tmp_path, ends_with_one_line):
    folder = write_files(build(tmp_path, GPT2), {TOKENIZER_CONFIG: {key: True}})
    ends_with_one_line(lambda: load_encoder(folder), TOKENIZER_CONFIG, key)


# ------------------------------------------------------------------------- weights, students, names
def test_neither_a_pooler_nor_float32_weights_are_needed(bert):
    expected = embed(load_encoder(bert))
    weights = load_file(bert / "model.safetensors")
    weights = {name: weight for name, weight in weights.items() if "pooler" not in name}
    save_file(weights, bert / "model.safetensors", metadata={"format": "pt"})
    assert torch.equal(embed(load_encoder(bert)), expected)
    AutoModel.from_pretrained(bert).half().save_pretrained(bert)
    assert load_encoder(bert).model.dtype == torch.float32
    assert_same_vectors(embed(load_encoder(bert)), embed_alone(bert, "cls"))


def test_settings_of_how_a_model_runs_change_nothing(bert):
    expected = embed(load_encoder(bert))
    config = {"output_attentions": True, "output_hidden_states": True, "return_dict": False}
    encoder = load_encoder(write_files(bert, {"config.json": config}))
    assert torch.equal(embed(encoder), expected)


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_of_a_hub_model_one_kind_of_weights_is_taken(suffix, bert, tmp_path, monkeypatch):
    def download(name, allow_patterns, ignore_patterns):
        for pattern in allow_patterns:
            for path in bert.glob(pattern):
                shutil.copy(path, tmp_path / "downloaded")
        return str(tmp_path / "downloaded")

    monkeypatch.setattr("support.loading.snapshot_download", download)
    (tmp_path / "downloaded").mkdir()
    torch.save(load_file(bert / "model.safetensors"), bert / "pytorch_model.bin")
    expected = embed(load_encoder(bert))
    if suffix == "bin":
        (bert / "model.safetensors").unlink()
    assert torch.equal(embed(load_encoder("hub/model")), expected)
    weights = list((tmp_path / "downloaded").glob("*model.*"))
    assert [path.suffix for path in weights] == [f".{suffix}"]


def hub_error(error_class, status):
    """An error of the Hub's library, which is raised from that of its network library."""
    request = httpx2.Request("GET", "https://huggingface.co")
    error = error_class("Sorry", response=httpx2.Response(status, request=request))
    error.__cause__ = httpx2.HTTPError("Sorry")
    return error


@pytest.mark.parametrize(
    "error, words",
    [
        pytest.param(hub_error(GatedRepoError, 403), "an/author is gated", id="gated"),
        pytest.param(hub_error(HfHubHTTPError, 429), "cannot find an/author", id="busy"),
    ],
)
def test_what_the_hub_answers_is_said(error, words, monkeypatch, ends_with_one_line):
    def download(name, **options):
        raise error

    monkeypatch.setattr("support.loading.snapshot_download", download)
    ends_with_one_line(lambda: load_encoder("an/author"), words)


def test_what_was_downloaded_runs_without_a_network(bert, ends_with_one_line):
    """In the cache of the Hub, a branch is a file that holds the name of a snapshot's folder."""
    ends_with_one_line(lambda: load_encoder("an/author"), "no such folder", "hf download")
    cached = Path(HF_HUB_CACHE, "models--an--author")
    shutil.copytree(bert, cached / "snapshots" / "0123abc")
    write_files(cached, {"refs/main": "0123abc"})
    assert_same_vectors(embed(load_encoder("an/author")), embed_alone(bert, "cls"))
