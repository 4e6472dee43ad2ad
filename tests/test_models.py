"""Models are read as their authors meant them, or refused; what is saved is what was trained.

The models are small and have random weights. The truth: token ids by `tokenizers` from
tokenizer.json; embeddings by transformers, a sentence at a time, and by sentence-transformers.
"""

import shutil
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
import torch
from helpers import SENTENCES, TEXTS, embed_alone, ids_alone, small_bert, write_files
from huggingface_hub.constants import HF_HUB_CACHE
from safetensors.torch import load_file, save_file
from sentence_transformers import SentenceTransformer
from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
from tokenizers.normalizers import BertNormalizer, Lowercase, Replace, Sequence
from transformers import AutoConfig, AutoModel, AutoTokenizer

from support.data import Corpus
from support.encoder import dry_run, encode, pad, pool, pooled_layers, save_encoder, tokenize
from support.files import read_json
from support.loading import load_encoder

TOKENIZER_CONFIG = "tokenizer_config.json"
POOLING_CONFIG = "1_Pooling/config.json"
PROMPT_CONFIG = "config_sentence_transformers.json"
BERT_CONFIG = "sentence_bert_config.json"


# ----------------------------------------------------------------------------------- small models
SIZES = {
    "vocab_size": 400,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 66,
    "bos_token_id": 0,
    "eos_token_id": 2,
    "initializer_range": 0.3,  # with the usual 0.02 all sentences get nearly the same vector
}
SPECIAL_TOKENS = ["<s>", "<pad>", "</s>", "<unk>"]  # their ids are 0 to 3


@dataclass
class Kind:
    """A kind of model: its files, and how they must be read."""

    model_type: str
    template: str = ""  # where the tokenizer puts special tokens; $A is the sentence
    config: dict = field(default_factory=dict)
    tokenizer_config: dict = field(default_factory=dict)
    pad_token: str = "<pad>"
    pooling: str = "cls"


BERT = Kind("bert", pad_token="[PAD]")
ROBERTA = Kind("roberta", "<s> $A </s>", config={"pad_token_id": 1})
MODERNBERT = replace(ROBERTA, model_type="modernbert", tokenizer_config={"pad_token": "<pad>"})
GPT2 = Kind("gpt2", tokenizer_config={"eos_token": "</s>"}, pad_token="</s>", pooling="last")
LLAMA = Kind(
    "llama",
    "<s> $A",
    config={"pad_token_id": 1},
    tokenizer_config={"pad_token": "<unk>", "padding_side": "left", "add_bos_token": True},
    pad_token="<unk>",
    pooling="last",
)
LAST_STATES_APART = replace(LLAMA, config={"tie_last_hidden_states": False})
QWEN3 = Kind(
    "qwen3",
    "$A </s>",
    config={"num_key_value_heads": 1},
    tokenizer_config={"pad_token": "</s>"},
    pad_token="</s>",
    pooling="last",
)
KINDS = [BERT, ROBERTA, MODERNBERT, GPT2, LLAMA, LAST_STATES_APART, QWEN3]


def build(folder, kind):
    """Write a model of a kind, with random weights, and its tokenizer. Returns the folder."""
    if kind == BERT:
        normalizer = Sequence([BertNormalizer(), Replace("oo", "u")])  # not that of its class
        return change_tokenizer(small_bert(folder), normalizer=normalizer)
    write_model(folder, kind.model_type, **kind.config)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=350,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(SENTENCES, trainer)
    if kind.template:
        ids = [(token, i) for i, token in enumerate(SPECIAL_TOKENS)]
        tokenizer.post_processor = processors.TemplateProcessing(kind.template, special_tokens=ids)
    tokenizer.enable_padding(length=40)  # files may say so, and no library follows
    files = {"tokenizer.json": tokenizer.to_str(), TOKENIZER_CONFIG: kind.tokenizer_config}
    return write_files(folder, files)


def write_model(folder, model_type, **config):
    """Write the weights and the config.json of a model with random weights."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModel.from_config(AutoConfig.for_model(model_type, **(SIZES | config)))
    model.save_pretrained(folder)


def change_tokenizer(folder, **parts):
    """Replace parts of a tokenizer.json, such as its normalizer. Returns the folder."""
    path = str(folder / "tokenizer.json")
    tokenizer = Tokenizer.from_file(path)
    for name, part in parts.items():
        setattr(tokenizer, name, part)
    tokenizer.save(path)
    return folder


# ---------------------------------------------------------------------------- what is compared
def embed(encoder, texts=TEXTS):
    return encode(encoder, tokenize(encoder, texts), batch_size=3)


def token_ids(encoder, texts=TEXTS):
    return [ids.tolist() for ids in tokenize(encoder, texts)]


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
all_kinds = pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.model_type)


@all_kinds
def test_a_model_is_read_as_its_authors_meant_it(kind, tmp_path, capsys):
    folder = build(tmp_path, kind)
    encoder = load_encoder(folder)
    assert f"{kind.pooling} pooling" in capsys.readouterr().out
    assert token_ids(encoder) == ids_alone(folder)
    expected = embed_alone(folder, kind.pooling)
    assert_same_vectors(embed(encoder), expected)

    rows = torch.arange(20) % 7  # more than a piece of a batch
    batch = pad(tokenize(encoder, TEXTS), rows, encoder.model)
    with torch.no_grad():
        layers = pooled_layers(encoder, batch)
    assert len(layers) == 1 + encoder.layers
    assert_same_vectors(layers[1], embed_alone(folder, kind.pooling, layer=1)[rows])
    assert_same_vectors(layers[-1], expected[rows])


@all_kinds
def test_what_is_saved_is_read_alike_by_all(kind, tmp_path):
    folder = build(tmp_path / "model", kind)
    saved = tmp_path / "saved"
    expected = embed_alone(folder, kind.pooling)
    encoder = load_encoder(folder, max_length=60)
    dry_run(encoder, small_corpus(encoder), saved)  # it refuses none of them
    save_encoder(saved, encoder)

    again = load_encoder(saved)
    assert (again.pooling, again.max_length) == (kind.pooling, 60)
    assert read_json(saved / "sentence_bert_config.json") == {"max_seq_length": 60}
    assert_same_vectors(embed(again), expected)
    assert_same_vectors(by_sentence_transformers(saved), expected)

    library = AutoTokenizer.from_pretrained(saved)
    assert library.pad_token == kind.pad_token
    assert library(TEXTS)["input_ids"] == ids_alone(folder)
    batch = library(TEXTS, padding=True, return_tensors="pt")
    hidden = AutoModel.from_pretrained(saved)(**batch).last_hidden_state
    pooled = pool(hidden, batch["attention_mask"], kind.pooling)
    assert_same_vectors(pooled.detach(), expected)


def test_sentences_are_cut_on_the_left_where_a_file_says_so(bert, tmp_path):
    write_files(bert, {TOKENIZER_CONFIG: {"truncation_side": "left"}})
    encoder = load_encoder(bert, max_length=12)
    ids = ids_alone(bert, [SENTENCES[4]])[0]
    assert len(ids) > 12
    expected = [ids[0], *ids[-11:]]  # [CLS] stays
    assert token_ids(encoder, [SENTENCES[4]]) == [expected]
    save_encoder(tmp_path / "saved", encoder)
    library = AutoTokenizer.from_pretrained(tmp_path / "saved")
    assert library(SENTENCES[4], truncation=True)["input_ids"] == expected


@pytest.mark.parametrize("pooling, expected", [("cls", 1.0), ("last", 6.0), ("mean", 3.0)])
def test_pooling_ignores_padding_on_either_side(pooling, expected):
    hidden = torch.tensor([[1.0, 2, 6, 99], [99, 1, 2, 6]])  # (N, T)
    mask = torch.tensor([[1, 1, 1, 0], [0, 1, 1, 1]])
    pooled = pool(hidden[:, :, None], mask, pooling)
    torch.testing.assert_close(pooled, torch.tensor([[expected], [expected]]))


def test_a_mean_in_half_precision_does_not_overflow():
    hidden = torch.full((1, 2000, 4), 1000.0).half()
    mean = pool(hidden, torch.ones(1, 2000), "mean")
    torch.testing.assert_close(mean, hidden[:, 0], rtol=2e-3, atol=0)


def test_thousands_of_sentences_are_tokenised_in_their_order(bert):
    texts = SENTENCES * 43 + ["rose"]  # 2,065: three slices
    assert token_ids(load_encoder(bert), texts) == ids_alone(bert, texts)


# ------------------------------------------------------------- models whose vectors would be wrong
def test_a_vector_that_depends_on_its_batch_is_refused(bert, ends_with_one_line):
    write_model(bert, "convbert", embedding_size=32)
    ends_with_one_line(lambda: load_encoder(bert), "changes when it is batched with a longer one")


@pytest.mark.parametrize(
    "weight",
    [
        pytest.param("bert.encoder.layer.1.output.dense.lora_A.weight", id="LoRA"),
        pytest.param("encoder.layer.3.output.dense.bias", id="a further layer"),
    ],
)
def test_weights_of_layers_that_would_be_left_out_are_refused(weight, bert, ends_with_one_line):
    weights = load_file(bert / "model.safetensors")
    weights[weight] = torch.ones(3)
    save_file(weights, bert / "model.safetensors")
    ends_with_one_line(lambda: load_encoder(bert), "does not use its weight", weight)


def test_what_no_embedding_needs_changes_none(bert):
    expected = embed(load_encoder(bert))
    surplus = {
        "cls.predictions.transform.dense.weight": torch.ones(3),  # a head
        "classifier.0.weight": torch.ones(3),  # a head with layers
        "encoder.layer.0.attention.masked_bias": torch.ones(3),  # a mask in older files
    }
    weights = load_file(bert / "model.safetensors")
    kept = {name: weight for name, weight in weights.items() if "pooler" not in name}
    save_file(kept | surplus, bert / "model.safetensors")
    config = {"output_attentions": True, "output_hidden_states": True, "return_dict": False}
    write_files(bert, {"config.json": config})
    assert torch.equal(embed(load_encoder(bert)), expected)


def test_weights_in_half_precision_become_float32(bert):
    AutoModel.from_pretrained(bert).half().save_pretrained(bert)
    encoder = load_encoder(bert)
    assert encoder.model.dtype == torch.float32
    assert_same_vectors(embed(encoder), embed_alone(bert, "cls"))


def test_pooling_of_a_decoder(bert, tmp_path, ends_with_one_line):
    folder = build(tmp_path, LLAMA)
    ends_with_one_line(lambda: load_encoder(folder, "cls"), "decoder", "--pooling last")
    write_files(bert, {"config.json": {"is_decoder": True}})
    assert load_encoder(bert).pooling == "last"


# -------------------------------------------------------------------------------- the tokenizer
def test_a_vocabulary_alone_is_read_by_its_class(bert):
    expected = ids_alone(bert)
    vocabulary = load_encoder(bert).tokenizer.get_vocab()
    lines = "\n".join(sorted(vocabulary, key=vocabulary.get))
    write_files(bert, {"vocab.txt": lines, "tokenizer.json": None})
    encoder = load_encoder(bert, max_length=500)
    assert encoder.max_length == 64  # the positions
    assert token_ids(encoder) == expected


def test_token_types_are_refused(bert, ends_with_one_line):
    """They change the vector, and none are given to a model here."""
    change_tokenizer(bert, post_processor=processors.TemplateProcessing("$A:1"))
    ends_with_one_line(lambda: load_encoder(bert), "token types")


# ---------------------------------------------------------------------------------- the dry run
def test_a_dry_run_leaves_no_file(bert, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", "/nowhere")  # it saves next to the output
    encoder = load_encoder(bert)
    corpus = small_corpus(encoder)
    files = sorted(tmp_path.rglob("*"))
    dry_run(encoder, corpus, tmp_path / "student")
    assert sorted(tmp_path.rglob("*")) == files


def test_a_student_that_others_would_read_otherwise_is_refused(tmp_path, ends_with_one_line):
    folder = build(tmp_path, replace(QWEN3, model_type="qwen2"))  # which is read by its class alone
    change_tokenizer(folder, normalizer=Lowercase())
    encoder = load_encoder(folder)
    corpus = small_corpus(encoder, ["rose"] * 99 + ["The Rose"])
    words = ["rebuilds the tokenizer of a qwen2", "use another student"]
    ends_with_one_line(lambda: dry_run(encoder, corpus, tmp_path / "student"), *words)


def test_a_student_without_a_token_to_pad_with_is_refused(tmp_path, ends_with_one_line):
    encoder = load_encoder(build(tmp_path, replace(GPT2, tokenizer_config={})))
    ends_with_one_line(lambda: dry_run(encoder, small_corpus(encoder), "s"), "pad_token")


def test_a_student_that_cannot_be_saved_is_refused(bert, tmp_path, ends_with_one_line):
    encoder = load_encoder(bert)
    output = tmp_path / "missing" / "student"
    corpus = small_corpus(encoder)
    ends_with_one_line(lambda: dry_run(encoder, corpus, output), str(output), "No such file")


# ------------------------------------------------------- what sentence-transformers' files declare
TRANSFORMER = "sentence_transformers.models.Transformer"
POOLING = "sentence_transformers.models.Pooling"
NORMALIZE = "sentence_transformers.models.Normalize"
DENSE = "sentence_transformers.models.Dense"
NEW_TRANSFORMER = "sentence_transformers.base.modules.transformer.Transformer"
NEW_POOLING = "sentence_transformers.sentence_transformer.modules.pooling.Pooling"


def modules(*types):
    """The content of a modules.json: the first module in the model's folder itself."""
    paths = ["", "1_Pooling", "2_Normalize"]
    return [{"name": str(i), "path": paths[i], "type": name} for i, name in enumerate(types)]


CLS = {  # in the words of older versions
    "pooling_mode_cls_token": True,
    "pooling_mode_mean_tokens": False,
    "word_embedding_dimension": 32,
}
MEAN = {"pooling_mode": "mean", "embedding_dimension": 32}
LAST = {"pooling_mode": "lasttoken", "embedding_dimension": 32}
PROMPTS = {"prompts": {"query": "query: ", "document": ""}, "default_prompt_name": None}
MEAN_SQRT = {"pooling_mode_cls_token": False, "pooling_mode_mean_sqrt_len_tokens": True}
QUERY = PROMPTS | {"default_prompt_name": "query"}
NEW_FILES = {
    "modules.json": modules(NEW_TRANSFORMER, NEW_POOLING),
    POOLING_CONFIG: LAST,
    BERT_CONFIG: {"transformer_task": "feature-extraction"},
    PROMPT_CONFIG: {"a_coming_key": 1},
}


@pytest.mark.parametrize(
    "files, pooling, max_length",
    [
        ({POOLING_CONFIG: CLS, BERT_CONFIG: {"max_seq_length": 50}}, "cls", 50),
        (
            {POOLING_CONFIG: CLS, "sentence_distilbert_config.json": {"max_seq_length": 40}},
            "cls",
            40,
        ),
        ({POOLING_CONFIG: LAST, BERT_CONFIG: {"max_seq_length": None}}, "last", 64),
        ({POOLING_CONFIG: MEAN, PROMPT_CONFIG: PROMPTS}, "mean", 64),
        ({POOLING_CONFIG: MEAN, TOKENIZER_CONFIG: {"model_max_length": 40}}, "mean", 40),
        (NEW_FILES, "last", 64),
    ],
)
def test_what_is_declared_is_followed(files, pooling, max_length, bert):
    write_files(bert, {"modules.json": modules(TRANSFORMER, POOLING)} | files)
    encoder = load_encoder(bert)
    assert (encoder.pooling, encoder.max_length) == (pooling, max_length)
    assert_same_vectors(embed(encoder), by_sentence_transformers(bert))
    asked = load_encoder(bert, "mean", 9)
    assert (asked.pooling, asked.max_length) == ("mean", 9)


def test_a_declared_normalisation_is_left_out(bert):
    declared = modules(TRANSFORMER, POOLING, NORMALIZE)
    write_files(bert, {"modules.json": declared, POOLING_CONFIG: MEAN})
    assert_same_vectors(embed(load_encoder(bert)), embed_alone(bert, "mean"))


def test_declared_lower_case_and_folders_are_followed_and_kept(tmp_path):
    weights = build(tmp_path / "model/0_Transformer", ROBERTA)
    write_files(weights, {BERT_CONFIG: {"max_seq_length": 50, "do_lower_case": True}})
    declared = modules(TRANSFORMER, POOLING)
    declared[0]["path"] = "0_Transformer"
    write_files(tmp_path / "model", {"modules.json": declared, POOLING_CONFIG: CLS})
    upper = [text.upper() for text in TEXTS]
    lower = [text.lower() for text in TEXTS]
    expected = embed_alone(weights, "cls", lower)

    encoder = load_encoder(tmp_path / "model")
    assert_same_vectors(embed(encoder, upper), expected)
    save_encoder(tmp_path / "saved", encoder)
    assert_same_vectors(embed(load_encoder(tmp_path / "saved"), upper), expected)
    assert_same_vectors(by_sentence_transformers(tmp_path / "saved", upper), expected)


# ------------------------------------------------------------------------------------- refusals
@pytest.mark.parametrize(
    "changes, words",
    [
        ({PROMPT_CONFIG: QUERY}, "'query: '"),
        ({PROMPT_CONFIG: {"truncate_dim": 8}}, "truncate_dim 8"),
        ({"modules.json": modules(TRANSFORMER, POOLING, DENSE)}, "Dense"),
        ({"modules.json": modules("custom.Transformer", POOLING)}, "custom"),
        ({POOLING_CONFIG: {"pooling_mode_lasttoken": True}}, "pooling_mode_lasttoken"),
        (
            {POOLING_CONFIG: MEAN_SQRT},
            "1_Pooling/config.json: pooling_mode ['pooling_mode_mean_sqrt",
        ),
        ({"tokenizer.json": None}, "no tokenizer.json"),
        ({"model.safetensors": b"torn" * 99}, "files whole"),
        ({"config.json": {"intermediate_size": 7}}, "lack 9 of"),
        ({"config.json": {"model_type": "blenderbot"}}, "encoder-decoder"),
        ({"config.json": {"auto_map": {"AutoModel": "x.Y"}}}, "bert: auto_map"),
        ({"config.json": {"quantization_config": {"bits": 4}}}, "bert: quantization_config"),
        ({"adapter_config.json": {"peft_type": "LORA"}}, "bert: peft_type"),
        ({"config.json": {"attn_implementation": "flash_attention_2"}}, "FlashAttention2"),
    ],
)
def test_what_would_change_embeddings_is_refused(changes, words, bert, ends_with_one_line):
    write_files(bert, {"modules.json": modules(TRANSFORMER, POOLING), POOLING_CONFIG: CLS})
    write_files(bert, changes)
    ends_with_one_line(lambda: load_encoder(bert), str(bert), words)


@pytest.mark.parametrize("key", ["add_bos_token", "add_eos_token"])
def test_an_end_that_tokenizer_json_does_not_add_is_refused(key, tmp_path, ends_with_one_line):
    folder = write_files(build(tmp_path, GPT2), {TOKENIZER_CONFIG: {key: True}})
    ends_with_one_line(lambda: load_encoder(folder), key)


# ---------------------------------------------------------------------------------------- the Hub
def test_weights_in_the_old_format_are_downloaded_where_there_are_no_others(bert, monkeypatch):
    expected = embed(load_encoder(bert))
    torch.save(load_file(bert / "model.safetensors"), bert / "pytorch_model.bin")
    (bert / "model.safetensors").unlink()
    requests = []

    def download(name, allow_patterns, ignore_patterns):
        requests.append("*.bin" in allow_patterns)
        return bert

    monkeypatch.setattr("support.loading.snapshot_download", download)
    assert torch.equal(embed(load_encoder("hub/model")), expected)
    assert requests == [False, True]


def test_what_was_downloaded_runs_without_a_network(bert, ends_with_one_line):
    """In the cache of the Hub, a branch is a file that holds the name of a snapshot's folder."""
    ends_with_one_line(lambda: load_encoder("an/author"), "no such folder", "hf download")
    cached = Path(HF_HUB_CACHE, "models--an--author")
    shutil.copytree(bert, cached / "snapshots" / "0123abc")
    write_files(cached, {"refs/main": "0123abc"})
    assert_same_vectors(embed(load_encoder("an/author")), embed_alone(bert, "cls"))
