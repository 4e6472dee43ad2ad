"""Models, as folders of files, read as their authors wrote them.

What is known to change embeddings and is not implemented ends the program in one line.
"""

from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError
from tokenizers import Tokenizer
from tokenizers.normalizers import Lowercase, Sequence
from transformers import AutoConfig, AutoModel, AutoTokenizer, logging
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
)

from support import attempt, fail
from support.encoder import POOLING_FLAGS, Encoder, pad, pooled_layers
from support.files import READ_ERRORS, read_json
from support.run import interrupted

logging.set_verbosity_error()  # transformers: the terminal is for our own lines
logging.disable_progress_bar()

ADVICE = (
    "choose another student; as a teacher, embed with sentence-transformers and give the array "
    "(cache_teacher.py --teacher X.npy)"
)
FILES = ["*.json", "*.txt", "*.model", "*.safetensors"]  # of a model on the Hub
COPIES = ["onnx/*", "openvino/*", "original/*", "consolidated*"]  # of the weights
BUFFERS = ("attn.bias", "attention.bias", "masked_bias", "inv_freq")  # in older weight files


def model_folder(name):
    """The path of a directory, or of a Hub id's files, downloaded or from the cache."""
    if Path(name).exists():
        return Path(name)
    with attempt(f"find {name}: no such folder, nor on the Hub (offline: run `hf download` first)"):
        folder = Path(snapshot_download(name, allow_patterns=FILES, ignore_patterns=COPIES))
        if not list(folder.rglob("*.safetensors")):
            snapshot_download(name, allow_patterns="*.bin", ignore_patterns=COPIES)
        return folder


class Declarations(NamedTuple):
    """What the sentence-transformers files of a model declare; the defaults if it has none."""

    folder: Path  # of the weights
    pooling: str | None = None
    max_length: int | None = None  # tokens
    lower_case: bool | None = None


def read_declarations(root):
    """The Declarations of a model's folder. What is not implemented here ends the program."""
    path = root / "modules.json"
    modules = read_json(path)
    if not modules:
        return Declarations(root)
    types = [module["type"] for module in modules]
    folders = [root / module["path"] for module in modules]
    names = [t.rpartition(".")[2] for t in types if t.startswith("sentence_transformers.")]
    implemented = (["Transformer", "Pooling"], ["Transformer", "Pooling", "Normalize"])
    if names not in implemented or len(names) < len(types):
        fail(f"{path}: only Transformer, Pooling and Normalize are read, not {types}; {ADVICE}")
    settings = read_json(root / "config_sentence_transformers.json")
    prompts = settings.get("prompts") or {}
    prompt = prompts.get(settings.get("default_prompt_name"))
    if prompt:
        fail(f"{root} puts a prompt before every sentence, {prompt!r}; {ADVICE}")
    if settings.get("truncate_dim"):
        fail(f"{root}: truncate_dim {settings['truncate_dim']} is not implemented; {ADVICE}")
    folder = folders[0]
    pooling = read_pooling(folders[1] / "config.json")
    limits = {}
    for path in folder.glob("sentence_*_config.json"):  # *: bert, or in old files the model
        limits = read_json(path)
    return Declarations(
        folder=folder,
        pooling=pooling,
        max_length=limits.get("max_seq_length"),
        lower_case=limits.get("do_lower_case"),
    )


def read_pooling(path):
    """The pooling that the config.json of a Pooling module declares: cls, mean or last."""
    settings = read_json(path)
    mode = settings.get("pooling_mode")
    # older versions: "pooling_mode_cls_token": true, "pooling_mode_mean_tokens": false
    flags = [key for key in settings if key.startswith("pooling_mode_") and settings[key]]
    for pooling, flag in POOLING_FLAGS.items():
        if flag.startswith(f"pooling_mode_{mode}") or flags == [flag]:
            return pooling
    fail(f"{path}: pooling_mode {mode or flags} is not implemented; {ADVICE}")


def load_encoder(name, pooling="auto", max_length=256, dtype=torch.float32, device="cpu"):
    """The Encoder of a Hub id or a directory; prints its pooling.

    max_length: tokens; dtype: of the loaded weights, whatever type the files hold. Ends the program
    with one line if the model is not understood well enough for its embeddings to be right.
    """
    root = model_folder(name)
    if interrupted(root):
        fail(f"{name} holds an interrupted run; finish it first, with --resume")
    declared = read_declarations(root)
    model = load_model(name, declared.folder, dtype).to(device)
    tokenizer, library = load_tokenizer(name, declared)
    # model_max_length is huge if no file has it
    positions = getattr(model.config, "max_position_embeddings", max_length)
    limit = min(max_length, declared.max_length or library.model_max_length, positions)
    tokenizer.enable_truncation(limit, direction=library.truncation_side)
    pooling = choose_pooling(name, model.config, pooling, declared.pooling)
    encoder = Encoder(
        model=model,
        tokenizer=tokenizer,
        special_tokens=special_tokens_of(library, tokenizer),
        pooling=pooling,
        max_length=limit,
    )
    layers = try_forward(name, encoder)
    return replace(encoder, layers=len(layers) - 1, dimensions=layers[-1].shape[1])


def load_model(name, folder, dtype):
    """The model itself, with all its weights."""
    settings = read_json(folder / "config.json") | read_json(folder / "adapter_config.json")
    # code of the model's own; quantised weights; an adapter
    for key in ("auto_map", "quantization_config", "peft_type"):
        if settings.get(key):
            fail(f"{folder}: {key} is not implemented; {ADVICE}")
    with attempt(f"load {name} (are its files whole?)", *READ_ERRORS, SafetensorError, ImportError):
        config = AutoConfig.from_pretrained(
            folder,
            output_attentions=False,
            return_dict=True,
            use_cache=False,  # of keys and values, for a next token that nobody asks for
        )
        if config.is_encoder_decoder:
            fail(f"{name} is an encoder-decoder, which is not implemented; {ADVICE}")
        model, report = AutoModel.from_pretrained(
            folder,
            config=config,
            dtype=dtype,
            ignore_mismatched_sizes=True,  # they are reported
            output_loading_info=True,
        )
    check_weights(name, model, report)
    return model


def check_weights(name, model, report):
    """End the program if weights are missing, or if the files' layers have weights to spare."""
    missing = [key for key in report["missing_keys"] if "pooler" not in key]  # which is not used
    missing += [mismatch[0] for mismatch in report["mismatched_keys"]]
    if missing:
        fail(f"{name}: its files lack {len(missing)} of config.json's weights, as {missing[0]}")
    layer_lists = [
        f".{key}." for key, part in model.named_modules() if isinstance(part, torch.nn.ModuleList)
    ]
    for key in report["unexpected_keys"]:  # those of a head are unexpected, and not used
        in_a_layer = any(prefix in f".{key}" for prefix in layer_lists)  # as ".encoder.layer."
        if in_a_layer and not key.endswith(BUFFERS):
            fail(f"{name}: a {type(model).__name__} does not use its weight {key}; {ADVICE}")


def load_tokenizer(name, declared):
    """(the tokenizers.Tokenizer of a model, transformers' tokenizer, for what else its files say).

    The tokenizer is that of tokenizer.json, if there is one: transformers' own may be rebuilt from
    its class.
    """
    folder = declared.folder
    with attempt(f"load the tokenizer of {name}", *READ_ERRORS, ImportError):
        library = AutoTokenizer.from_pretrained(folder)
    path = folder / "tokenizer.json"
    if path.exists():
        tokenizer = Tokenizer.from_file(str(path))
    elif any((folder / file).exists() for file in library.vocab_files_names.values()):
        tokenizer = library.backend_tokenizer
    else:
        fail(f"{name} has no tokenizer.json; {ADVICE}")
    tokenizer.no_padding()
    encoding = tokenizer.encode("a")
    if any(encoding.type_ids):
        fail(f"{name}: its tokenizer gives token types, which are not implemented; {ADVICE}")
    settings = read_json(folder / "tokenizer_config.json")
    for key, position in {"add_bos_token": 0, "add_eos_token": -1}.items():
        if settings.get(key) and not encoding.special_tokens_mask[position]:
            fail(f"{name}: {key} is true, but its tokenizer.json adds no such token; {ADVICE}")
    if declared.lower_case:  # as sentence-transformers does it
        tokenizer.normalizer = Sequence([Lowercase(), tokenizer.normalizer or Sequence([])])
    return tokenizer, library


def special_tokens_of(library, tokenizer):
    """{role: token}, such as {"pad_token": "[PAD]"}; without a token of its own, [EOS] pads.

    Tokens that are not in the vocabulary are left out.
    """
    vocabulary = tokenizer.get_vocab()
    roles = library.special_tokens_map
    tokens = {role: token for role, token in roles.items() if str(token) in vocabulary}
    tokens.setdefault("pad_token", tokens.get("eos_token"))
    return tokens


def is_decoder(config):
    """Whether a token sees only those before it."""
    if config.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES:  # such as BERT, which can be both
        return getattr(config, "is_decoder", False)
    return config.model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES


def choose_pooling(name, config, requested, declared):
    """The pooling asked for, else the declared one, else a decoder's last token, else [CLS]."""
    if requested != "auto":
        pooling = requested
    elif declared:
        pooling = declared
    else:
        pooling = "last" if is_decoder(config) else "cls"
    if pooling == "cls" and is_decoder(config):
        fail(f"the first token of {name}, a decoder, does not see the others; try --pooling last")
    print(f"{name}: {pooling} pooling")
    return pooling


@torch.inference_mode()
def try_forward(name, encoder):
    """The pooled layers of two sentences: L + 1 of (2, d).

    Ends the program if a sentence's vector depends on its batch: some models see padding in spite
    of the mask.
    """
    tokens = [np.arange(1, 4), np.arange(1, 10)]  # two sentences: of 3 and of 9 tokens
    alone = pooled_layers(encoder, pad(tokens, [0], encoder.model))[-1][0]
    layers = pooled_layers(encoder, pad(tokens, [0, 1], encoder.model))
    beside = layers[-1][0]
    tolerance = 1e-4 if encoder.model.dtype == torch.float32 else 0.1  # half precision rounds
    if (beside - alone).norm() > tolerance * alone.norm():
        fail(f"{name}: a sentence's embedding changes when it is batched with a longer one")
    return layers
