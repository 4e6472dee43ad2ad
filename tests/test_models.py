"""Models are read as their authors meant them, or refused; what is saved is what was trained.

They are built small. The truth: token ids by `tokenizers` from tokenizer.json, embeddings by
transformers, a sentence at a time, and by sentence-transformers, where it is installed.
"""

import json
import shutil
from functools import cache as once
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import HOME, SENTENCES, TEXTS, alone, own_ids, put
from huggingface_hub.constants import HF_HUB_CACHE
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoConfig, AutoModel, AutoTokenizer

import talas
from support.data import Corpus
from support.encoder import encode, pad, pool, pooled_layers, rehearse, tokenize
from support.encoder import save_encoder as save
from support.loading import load_encoder as load
from support.run import check_fit

WORDS = "tokenizer_config.json"


# ----------------------------------------------------------------------------------- small models
BERT_LIKE = {"pad": "[PAD]", "unk": "[UNK]", "cls": "[CLS]", "sep": "[SEP]", "mask": "[MASK]"}
ROBERTA_LIKE = {"cls": "<s>", "pad": "<pad>", "sep": "</s>", "unk": "<unk>", "mask": "<mask>"}
LLAMA_LIKE = {"unk": "<unk>", "bos": "<s>", "eos": "</s>", "pad": "<pad>"}
LOWER, CASED = (normalizers.BertNormalizer(lowercase=lower) for lower in (True, False))
OWN = normalizers.Sequence([normalizers.Lowercase(), normalizers.Replace("oo", "u")])


def tokenizer(algorithm, names, template="", normalizer=None):
    """(tokenizer.json's Tokenizer, trained on the sentences, words for tokenizer_config.json)."""
    how = {"special_tokens": list(names.values()), "show_progress": False}
    if algorithm == "wordpiece":
        model, split = models.WordPiece(unk_token=names["unk"]), pre_tokenizers.BertPreTokenizer()
        trainer = trainers.WordPieceTrainer(**how)
    elif algorithm == "bpe":
        model, split = models.BPE(), pre_tokenizers.ByteLevel(add_prefix_space=False)
        letters = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(initial_alphabet=letters, vocab_size=350, **how)
    else:
        model, split = models.Unigram(), pre_tokenizers.Metaspace()
        trainer = trainers.UnigramTrainer(unk_token=names["unk"], **how)
    made = Tokenizer(model)
    made.pre_tokenizer, made.normalizer = split, normalizer
    made.train_from_iterator(SENTENCES, trainer)
    if template:
        ids = [(token, made.token_to_id(token)) for token in names.values()]
        made.post_processor = processors.TemplateProcessing(template, special_tokens=ids)
    return made, {f"{role}_token": token for role, token in names.items()}


def sizes(d="hidden_size", layers="num_hidden_layers", heads="num_attention_heads", **more):
    """A small configuration, under the names that the model's own has for the sizes."""
    return {"vocab_size": 400, d: 32, layers: 2, heads: 2} | more


FFN, GPT_SIZES = {"intermediate_size": 48}, sizes("n_embd", "n_layer", "n_head", n_positions=64)
ENDS = {"pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2}
AS_ROBERTA = sizes(**FFN, **ENDS, max_position_embeddings=66)
WORDPIECE = ("wordpiece", BERT_LIKE, "[CLS] $A [SEP]", LOWER)
UNIGRAM = ("unigram", BERT_LIKE, "[CLS] $A [SEP]")
ROBERTA, GPT = ("bpe", ROBERTA_LIKE, "<s> $A </s>"), ("bpe", {"eos": "<|end|>"})
XLNET, ONE_HEAD = ("unigram", BERT_LIKE, "$A [SEP] [CLS]:2"), {"num_key_value_heads": 1}
KINDS = {  # kind: (its tokenizer, its configuration, its pooling)
    "bert": (WORDPIECE, sizes(**FFN, max_position_embeddings=64), "cls"),
    "roberta": ((*ROBERTA, normalizers.Replace("oo", "u")), AS_ROBERTA, "cls"),
    "mpnet": (("wordpiece", *ROBERTA[1:]), AS_ROBERTA, "cls"),
    "distilbert": (WORDPIECE, sizes("dim", "n_layers", "n_heads", hidden_dim=48), "cls"),
    "modernbert": (ROBERTA, sizes(**FFN, **ENDS, cls_token_id=0, sep_token_id=2), "cls"),
    "deberta-v2": (UNIGRAM, sizes(**FFN, relative_attention=True, pos_att_type=["c2p"]), "cls"),
    "xlnet": (XLNET, sizes("d_model", "n_layer", "n_head", d_inner=48), "not certain"),
    "gpt2": (GPT, GPT_SIZES | dict.fromkeys(ENDS), "last"),
    "llama": (("bpe", LLAMA_LIKE, "<s> $A"), sizes(**FFN), "last"),
    "qwen3": (("bpe", {"pad": "<|end|>"}, "$A <|end|>"), sizes(**FFN, **ONE_HEAD), "last"),
    "mpt": (GPT, sizes("d_model", "n_layers", "n_heads", max_seq_len=64), "last"),
    "mamba": (GPT, sizes(state_size=4), "last"),
    "opt": (ROBERTA, sizes(ffn_dim=48, max_position_embeddings=64, word_embed_proj_dim=32), "last"),
}
FAST = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": 10**30}
MORE = {"llama": {"add_bos_token": True, "add_eos_token": False}}  # as tokenizer.json does it
MORE["xlnet"] = {"model_input_names": ["input_ids", "attention_mask", "token_type_ids"]}


def build(folder, kind, config, made, about, **more):
    """Write a model with random weights, tokenizer.json and tokenizer_config.json."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModel.from_config(AutoConfig.for_model(kind, **config))
        for weight in model.parameters():
            weight.data.mul_(10 if weight.ndim > 1 else 1)  # so that sentences get unlike vectors
    model.save_pretrained(folder)
    if "pad_token" in about:  # some files have both, and nobody follows
        made.enable_padding(length=40, pad_token=about["pad_token"])
    made.enable_truncation(9)
    made.save(str(folder / "tokenizer.json"))
    return put(folder, {WORDS: about | more})


@once
def built(kind):
    """The folder of one of the models above, made once, and not to be changed."""
    how, config, _ = KINDS[kind]
    more = FAST | MORE.get(kind, {})
    return build(Path(HOME.name, f"models-{kind}"), kind, config, *tokenizer(*how), **more)


def embed(encoder, texts=TEXTS):
    return encode(encoder, tokenize(encoder, texts), batch_size=3)


def ids_of(encoder, texts=TEXTS):
    tokens = tokenize(encoder, texts)
    return [part.tolist() for part in np.split(tokens.ids, tokens.starts[1:-1])]


def by_the_library(folder, texts=TEXTS):
    library = pytest.importorskip("sentence_transformers")
    model = library.SentenceTransformer(str(folder), device="cpu")
    return model.encode(list(texts), batch_size=3, convert_to_tensor=True)


def close(a, b):
    """Equal to 1e-5 of the vectors' length, which is not to say that all vectors are alike."""
    assert (a[:, None] - a[None]).norm(dim=-1).max() > 0.05 * a.norm(dim=-1).mean()
    torch.testing.assert_close(a, b, atol=1e-5 * a.norm(dim=1).mean().item(), rtol=0)
    return True


# --------------------------------------------------------------------- embeddings, there and back
def rehearsed(folder, *how):
    """(encoder, its corpus) after what is tried before a training."""
    encoder, cache = load(folder, *how), {"sentences": TEXTS, "sources": ["a"] * 10}
    corpus = Corpus(cache | {"embeddings": torch.zeros(10, 0)}, encoder)
    rehearse(encoder, corpus, two_views=True)
    return encoder, corpus


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_is_read_as_meant_and_saved_as_it_was(kind, tmp_path, ends_with_one_line, capsys):
    folder, pooling = built(kind), KINDS[kind][2]
    if pooling == "not certain":
        ends_with_one_line(lambda: load(folder), kind, "not certain", "--pooling")
        pooling = "mean"
    else:
        assert load(folder).pooling == pooling
        assert f"{pooling} pooling, it is a" in capsys.readouterr().out
    if pooling == "last":
        ends_with_one_line(lambda: load(folder, "cls"), "decoder", "--pooling last")
    expected = {way: alone(folder, way) for way in ("last", "mean", pooling)}
    for way in expected:
        encoder, corpus = rehearsed(folder, way, 60)  # in training mode, which changes nothing
        assert ids_of(encoder) == own_ids(folder)
        assert close(embed(encoder), expected[way])
    assert encoder.widths == (32, 32)

    tokens, *_ = corpus.batch(torch.arange(10).repeat(2))  # more than a piece
    first, last = pooled_layers(encoder, tokens)
    assert close(first[10:], alone(folder, way, layer=1))
    assert close(last[10:], expected[way]) and torch.equal(last[:10], last[10:])
    save(tmp_path, encoder)
    again = load(tmp_path)
    assert (again.pooling, again.max_length) == (way, 60)
    for found in (embed(again), alone(tmp_path, way), by_the_library(tmp_path)):
        assert close(found, expected[way])
    assert AutoTokenizer.from_pretrained(tmp_path)(TEXTS)["input_ids"] == own_ids(folder)
    for name in ("tokenizer.json", WORDS):  # as they were, but for a token to pad with
        there, kept = (json.loads(Path(x, name).read_bytes()) for x in (folder, tmp_path))
        pads = name == WORDS and KINDS[kind][0] == GPT
        assert kept == there | ({"pad_token": "<|end|>"} if pads else {})


@pytest.mark.parametrize("kind", ["roberta", "mpnet", "bert", "gpt2", "mpt"])
def test_a_long_sentence_is_cut_where_the_positions_end(kind, tmp_path, capsys):
    """64 of them, though the files of roberta's like have 66: they count from 2."""
    encoder, long = load(built(kind), "mean", max_length=500), " ".join(SENTENCES)
    assert encoder.max_length == 64
    (ids,), special = own_ids(built(kind), [long]), kind not in ("gpt2", "mpt")
    with torch.no_grad():
        ids = torch.tensor([ids[:63] + ids[-1:] if special else ids[:64]])
        expected = encoder.model(ids).last_hidden_state.mean(1)
    torch.testing.assert_close(embed(encoder, ["a", long])[1:], expected, atol=1e-4, rtol=1e-4)
    assert "1 of 2 sentences are cut after 64 tokens" in capsys.readouterr().out
    told = {"model_max_length": 40}
    assert load(put(shutil.copytree(built(kind), tmp_path / "m"), {WORDS: told})).max_length == 40


@pytest.mark.parametrize("pooling", ["cls", "mean", "last"])
def test_padding_on_either_side_and_half_precision(pooling):
    states = 1000 * torch.rand(2000, 4).half()
    expected = {"cls": states[0], "last": states[-1], "mean": states.double().mean(0)}[pooling]
    batch, mask = torch.full((2, 2100, 4), 6e4).half(), torch.zeros(2, 2100).long()
    batch[0, :2000], mask[0, :2000], batch[1, 100:], mask[1, 100:] = states, 1, states, 1
    found = pool(batch, mask, pooling)
    assert found.dtype == torch.float16
    torch.testing.assert_close(found.double(), expected.expand(2, 4).double(), rtol=2e-3, atol=0)
    pytest.raises(ValueError, pool, batch, mask, "max")


def test_batches_and_slices_keep_their_order(bert):
    encoder, rows = load(bert, max_length=12), [2099, 1, 1000, 999]
    texts = [SENTENCES[i * i % 48] for i in range(2099)] + ["rose"]
    batch = pad(tokenize(encoder, texts), rows, encoder.model)
    for i, own in enumerate(own_ids(bert, [texts[row] for row in rows])):
        own = own if len(own) <= 12 else own[:11] + own[-1:]
        fill = [0] * (12 - len(own))
        assert batch["input_ids"][i].tolist() == own + fill
        assert batch["attention_mask"][i].tolist() == [1] * len(own) + fill
    assert batch["attention_mask"].min() == 0


# ---------------------------------------------------------------------------- tokens, or a refusal
LAYOUTS = {  # models whose tokenizer transformers builds anew, as another one, from its class
    "paraphrase-multilingual": ("bert", UNIGRAM, sizes(**FFN)),
    "roberta with wordpiece": ("roberta", ("wordpiece", *ROBERTA[1:]), AS_ROBERTA),
    "bert, own normaliser": ("bert", (*WORDPIECE[:3], OWN), sizes(**FFN)),
    "xlm-roberta, own": ("xlm-roberta", ("unigram", *ROBERTA[1:], OWN), AS_ROBERTA),
}


@pytest.mark.parametrize("kind, how, config", LAYOUTS.values(), ids=LAYOUTS)
def test_ids_are_those_of_tokenizer_json(kind, how, config, tmp_path, capsys, ends_with_one_line):
    folder = build(tmp_path / "m", kind, config, *tokenizer(*how), do_lower_case=True)
    encoder = load(folder)
    assert "do_lower_case" not in capsys.readouterr().out
    assert ids_of(encoder) == own_ids(folder)
    assert close(embed(encoder), alone(folder, "cls"))
    if AutoTokenizer.from_pretrained(folder)(TEXTS)["input_ids"] != own_ids(folder):
        # nobody else could use what we would save
        ends_with_one_line(lambda: save(tmp_path / "s", encoder), "PreTrainedTokenizerFast", WORDS)
    save(tmp_path / "s", load(put(folder, {WORDS: {"tokenizer_class": "PreTrainedTokenizerFast"}})))
    assert close(by_the_library(tmp_path / "s"), embed(encoder))


@pytest.mark.parametrize("says, normalizer", [(True, CASED), (False, LOWER)])
def test_lower_case_that_two_files_tell_otherwise_is_one_line(says, normalizer, tmp_path, capsys):
    made = tokenizer(*WORDPIECE[:3], normalizer)
    folder = build(tmp_path, "bert", sizes(**FFN), *made, do_lower_case=says)
    assert ids_of(load(folder)) == own_ids(folder)
    line, _ = capsys.readouterr().out.splitlines()
    assert f"{WORDS}: do_lower_case {says} is not followed" in line
    load(put(folder, {WORDS: {"do_lower_case": not says}}))
    assert "do_lower_case" not in capsys.readouterr().out


def test_a_vocabulary_alone_is_read_by_its_class_and_saved_whole(bert, tmp_path):
    expected, words = own_ids(bert), load(bert).tokenizer.get_vocab()
    files = {"vocab.txt": "\n".join(sorted(words, key=words.get)).encode(), "tokenizer.json": None}
    encoder = load(put(bert, files | {"special_tokens_map.json": {"pad_token": "[PAD]"}}))
    assert ids_of(encoder) == expected
    save(tmp_path / "saved", encoder)
    assert ids_of(load(put(tmp_path / "saved", {"vocab.txt": None}))) == expected
    assert (tmp_path / "saved" / "special_tokens_map.json").exists()


def test_more_tokens_than_embeddings_matter_only_where_they_occur(tmp_path, ends_with_one_line):
    made, about = tokenizer(*WORDPIECE)
    made.add_tokens(["zebra"])
    config = sizes(**FFN) | {"vocab_size": made.get_vocab_size() - 1}
    encoder = load(build(tmp_path, "bert", config, made, about))
    assert close(embed(encoder), alone(tmp_path, "cls"))
    words = [f"id {config['vocab_size']}", f"{config['vocab_size']} word embeddings"]
    ends_with_one_line(lambda: tokenize(encoder, ["a", "the zebra"]), *words)
    nothing = load(built("gpt2"))
    ends_with_one_line(lambda: tokenize(nothing, ["a", ""]), "nothing of the sentence ''")


COPIES = {  # a model, what is changed in its files, and words of the answer
    "bos": ("gpt2", {WORDS: {"add_bos_token": True}}, f"{WORDS}: add_bos_token"),
    "eos": ("llama", {WORDS: {"add_eos_token": True}}, f"{WORDS}: add_eos_token"),
    "padding": ("roberta", {WORDS: {"pad_token": {"content": "<unk>"}}}, "counted from id 1|<unk>"),
    "layers": ("opt", {"config.json": {"layerdrop": 0.1}}, "layerdrop to 0|config.json"),
    "types": ("xlnet", {WORDS: {"model_input_names": ["input_ids"]}}, "model_input_names"),
    "no end": ("gpt2", {WORDS: {"eos_token": None}}, "no token to pad with"),
}


@pytest.mark.parametrize("kind, files, words", COPIES.values(), ids=COPIES)
def test_a_student_that_would_mislead_is_refused(kind, files, words, tmp_path, ends_with_one_line):
    folder = put(shutil.copytree(built(kind), tmp_path / "m"), files)
    how = ["mean"] if kind == "xlnet" else []
    ends_with_one_line(lambda: rehearsed(folder, *how), *words.split("|"))


# ------------------------------------------------------- what sentence-transformers' files declare
POOLING, ABOUT = "1_Pooling/config.json", "config_sentence_transformers.json"
BERT, DISTIL = "sentence_bert_config.json", "sentence_distilbert_config.json"
MODES = ("cls_token", "mean_tokens", "max_tokens", "mean_sqrt_len_tokens", "lasttoken")
FLAGS = {f"pooling_mode_{mode}": False for mode in MODES} | {"word_embedding_dimension": 32}
CLS, MEAN, LAST = (FLAGS | {f"pooling_mode_{MODES[i]}": True} for i in (0, 1, 4))
NEW = {"embedding_dimension": 32, "include_prompt": True}
TEXT = {"method": "forward", "method_output_name": "last_hidden_state"}
NEWEST = {"transformer_task": "feature-extraction", "module_output_name": "token_embeddings"}
NEWEST |= {"modality_config": {"text": TEXT}}
PROMPTS = {"prompts": {"query": "query: ", "document": ""}, "default_prompt_name": None}
VERSION = {"__version__": {"transformers": "4.6.1"}, "similarity_fn_name": "cosine"}
PLAIN = [f"sentence_transformers.models.{name}" for name in ("Transformer", "Pooling", "Normalize")]
NEW_NAMES = ("base.modules.transformer.Transformer", "sentence_transformer.modules.pooling.Pooling")


def modules(*kinds, path=""):
    """The content of a modules.json."""
    rows = zip(kinds, (path, "1_Pooling", "2_Normalize"))
    return [{"idx": i, "name": f"{i}", "type": k, "path": p} for i, (k, p) in enumerate(rows)]


FIFTY, NOTHING = {"max_seq_length": 50}, {"max_seq_length": None, "do_lower_case": False}
CLASS = {"model_type": "SentenceTransformer"}
DECLARED = [  # what versions 2 to 6 write, the pooling that is meant, the maximum length
    ({POOLING: CLS, BERT: FIFTY | {"do_lower_case": False}, ABOUT: VERSION}, "cls", 50),
    ({POOLING: LAST | {"include_prompt": True}, BERT: FIFTY}, "last", 50),
    ({POOLING: MEAN | {"pooling_mode_weightedmean_tokens": False}, ABOUT: PROMPTS}, "mean", 64),
    ({POOLING: FLAGS, BERT: NOTHING}, "mean", 64),
    ({POOLING: NEW | {"pooling_mode": "lasttoken"}, BERT: NEWEST}, "last", 64),
    ({POOLING: NEW | {"pooling_mode": "cls"}, ABOUT: CLASS}, "cls", 64),
    ({POOLING: CLS, DISTIL: FIFTY}, "cls", 50),
    ({POOLING: CLS, BERT: FIFTY, DISTIL: {"max_seq_length": 9}}, "cls", 50),
]


@pytest.mark.parametrize("files, pooling, length", DECLARED)
def test_what_is_declared_is_taken_and_printed(bert, files, pooling, length, capsys):
    new = [f"sentence_transformers.{name}" for name in NEW_NAMES]
    put(bert, {"modules.json": modules(*(new if BERT in files else PLAIN))} | files)
    encoder = load(bert)
    assert f"{pooling} pooling, from its sentence-transformers files" in capsys.readouterr().out
    assert (encoder.pooling, encoder.max_length) == (pooling, length)
    asked = load(bert, "mean", 9)
    assert (asked.pooling, asked.max_length) == ("mean", 9)
    assert close(embed(encoder), alone(bert, pooling))
    theirs = by_the_library(bert)
    assert torch.cosine_similarity(theirs, embed(encoder)).min() > 1 - 1e-6


def test_declared_lower_case_and_folders_are_honoured_and_kept(tmp_path):
    shutil.copytree(built("roberta"), folder := tmp_path / "m" / "0_Transformer")
    asks = {"max_seq_length": 50, "do_lower_case": True}
    files = {"modules.json": modules(*PLAIN, path=folder.name), POOLING: CLS}
    encoder = load(put(folder.parent, files | {f"{folder.name}/{BERT}": asks}))
    shouting, lower = [text.upper() for text in TEXTS], [text.lower() for text in TEXTS]
    assert ids_of(encoder, shouting) == own_ids(folder, lower) != own_ids(folder, shouting)
    assert close(embed(encoder, shouting), alone(folder, "cls", lower))
    save(tmp_path / "s", encoder)
    assert close(embed(load(tmp_path / "s"), shouting), embed(encoder, shouting))
    assert close(by_the_library(tmp_path / "s", shouting), embed(encoder, shouting))


DENSE = "sentence_transformers.models.Dense"
LFS, NO_RUST = b"version https://git-lfs.github.com/spec/v1", {"tokenizer_class": "EsmTokenizer"}
UNKNOWN = {  # a file, and keys with values in it that are refused in those words
    POOLING: 'pooling_mode_max_tokens true|pooling_mode "weightedmean"|pooling_mode ["cls", "mean"]'
    '|pooling_mode_cls_token "yes"|word_embedding_dimension "32"|temperature 2',
    BERT: 'max_seq_length "9"|do_lower_case 1|tokenizer_name_or_path "x"|model_args {"a": 1}'
    '|transformer_task "fill-mask"|module_output_name "x"|modality_config {"text": {"layer": -2}}',
    ABOUT: "truncate_dim 8|prompts []",
}
REFUSED = [  # what is changed in the files of a BERT with [CLS] pooling, and words of the answer
    *(
        ({file: {key: json.loads(value)}}, f"{file}: {key} {value} is not")
        for file, asks in UNKNOWN.items()
        for key, value in (ask.split(" ", 1) for ask in asks.split("|"))
    ),
    ({ABOUT: PROMPTS | {"default_prompt_name": "query"}}, "'query: '|.npy"),
    ({POOLING: {"pooling_mode_lasttoken": True}}, f"{POOLING}: pooling_mode cls+last"),
    ({POOLING: None}, f"{POOLING}: No such file"),
    ({"modules.json": modules(*PLAIN[:2], DENSE)}, "modules.json|Dense|.npy"),
    ({"modules.json": modules(PLAIN[0])}, "modules.json|Transformer"),
    ({"modules.json": modules("custom.Transformer", PLAIN[1])}, "modules.json|custom.Transformer"),
    ({"modules.json": modules(PLAIN[0], "custom.Pooling")}, "modules.json|custom.Pooling"),
    *(({BERT: {"max_seq_length": n}}, f"{n} tokens leave none") for n in (-1, 0, 2)),
    ({"model.safetensors": None}, "files whole|no file named model.safetensors"),
    ({"model.safetensors": b"torn" * 99}, "files whole"),
    ({"model.safetensors": None, "pytorch_model.bin": LFS}, "files whole"),
    ({"config.json": {"intermediate_size": 7}}, "lack 9 of|intermediate"),
    ({"config.json": {"num_hidden_layers": 4}}, "lack 16 of|layer.3"),
    ({"config.json": {"pad_token_id": 10**6}}, "files whole"),
    ({"config.json": {"model_type": "nonesuch"}}, "nonesuch"),
    ({"config.json": {"model_type": "fnet"}}, "FNetModel takes no mask"),
    ({"config.json": {"model_type": "blenderbot"}}, "encoder-decoder|.npy"),
    ({"config.json": {"auto_map": {"AutoModel": "x.Y"}}}, "/config.json: auto_map"),
    ({"config.json": None}, "config.json: No such file"),
    ({"config.json": b'{"a"'}, "/config.json: "),
    ({"adapter_config.json": {"r": 8}}, "adapter_config.json: adapters"),
    ({"tokenizer.json": None}, "it has no tokenizer.json|.npy"),
    ({"tokenizer.json": None, WORDS: NO_RUST, "vocab.txt": b"<unk>\na\n"}, "no tokenizer.json"),
    ({"tokenizer.json": b'{"a"'}, "load the tokenizer"),
    ({WORDS: {"auto_map": {"AutoTokenizer": "x.Y"}}}, f"{WORDS}: auto_map"),
    ({WORDS: {"truncation_side": "left"}}, f"{WORDS}: truncation_side left"),
]


@pytest.mark.parametrize("files, words", REFUSED)
def test_what_is_not_understood_is_refused(bert, files, words, ends_with_one_line):
    declared = {"modules.json": modules(*PLAIN[:2]), POOLING: CLS, BERT: {}, ABOUT: {}}
    put(put(bert, declared), files)
    error = ends_with_one_line(lambda: load(bert), str(bert), *words.split("|"))
    assert not any(word in error for word in ("above", "weights_only` set", "pip install"))


# ------------------------------------------------------------------------- weights, students, names
def test_neither_a_pooler_nor_float32_weights_are_needed(bert):
    expected, weights = embed(load(bert)), load_file(bert / "model.safetensors")
    weights = {name: weight for name, weight in weights.items() if "pooler" not in name}
    save_file(weights, bert / "model.safetensors", metadata={"format": "pt"})
    assert torch.equal(embed(load(bert)), expected)
    AutoModel.from_pretrained(bert).half().save_pretrained(bert)
    assert load(bert).model.dtype == torch.float32
    assert close(embed(load(bert)), alone(bert, "cls"))
    half = load(bert, dtype=torch.bfloat16)
    assert half.model.dtype == torch.bfloat16 and embed(half).dtype == torch.float32


def test_of_a_hub_model_the_bin_weights_are_taken_where_there_are_no_others(bert, monkeypatch):
    def hub(name, allow_patterns, ignore_patterns):  # brings what is asked for, and no more
        brought.mkdir(exist_ok=True)
        for path in (path for glob in allow_patterns for path in bert.glob(glob)):
            shutil.copy(path, brought)
        return str(brought)

    monkeypatch.setattr("support.loading.snapshot_download", hub)
    torch.save(load_file(bert / "model.safetensors"), bert / "pytorch_model.bin")
    expected, brought = embed(load(bert)), bert.parent / "one"
    assert torch.equal(embed(load("hub/model")), expected) and len(list(brought.glob("*.bin"))) == 0
    (bert / "model.safetensors").unlink()
    brought = bert.parent / "other"
    assert torch.equal(embed(load("hub/model")), expected) and len(list(brought.glob("*.bin"))) == 1


def test_a_student_of_unlike_widths_is_refused(tmp_path, ends_with_one_line):
    how, config, _ = KINDS["opt"]
    build(tmp_path, "opt", config | {"word_embed_proj_dim": 16}, *tokenizer(*how), **FAST)
    encoder, corpus = rehearsed(tmp_path)
    assert encoder.dimensions == 16 and close(embed(encoder), alone(tmp_path, "last"))
    s = talas.Settings(batch_size=2)
    ends_with_one_line(lambda: check_fit(s, encoder, corpus), "unlike widths, (32, 16)")


def test_settings_of_how_a_model_runs_change_nothing(bert, tmp_path):
    expected, odd = embed(load(bert)), {"output_attentions": True, "chunk_size_feed_forward": 3}
    put(bert, {"config.json": odd | {"return_dict": False, "output_hidden_states": True}})
    encoder, _ = rehearsed(bert)
    assert torch.equal(embed(encoder), expected)
    save(tmp_path / "s", encoder)
    assert torch.equal(embed(load(tmp_path / "s")), expected)
    assert load(put(bert, {"config.json": {"is_decoder": True}})).pooling == "last"


def test_what_was_downloaded_runs_without_a_network(bert, ends_with_one_line, monkeypatch):
    """In the cache of the Hub: a branch is a file with the name of a snapshot's folder."""
    there = Path(HF_HUB_CACHE, "models--an--author")
    shutil.copytree(bert, there / "snapshots" / "0123abc")
    put(there / "refs", {"main": b"0123abc"})
    assert load("an/author").pooling == "cls"  # what is absent there is absent
    assert close(embed(load("an/author")), alone(bert, "cls"))
    declared = {"modules.json": modules(*PLAIN), POOLING: MEAN}
    put(there / "snapshots" / "0123abc", declared)
    assert close(embed(load("an/author")), alone(bert, "mean"))
    for name in ("no/such-model", "nowhere", "x" * 300, "a\0b"):
        ends_with_one_line(lambda name=name: load(name), name[:9], "no such folder", "hf download")
    monkeypatch.chdir(bert.parent)
    shutil.copytree(bert, Path("an", "author"))  # a folder comes first
    assert close(embed(load("an/author")), alone(bert, "cls"))
