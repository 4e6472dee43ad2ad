"""Models read as their authors wrote them, or refused: a model is a folder of files.

What the files declare is honoured; what is not understood ends the program in one line that names
the file and the key.
"""

import json
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError
from safetensors import SafetensorError
from tokenizers import Tokenizer
from tokenizers.normalizers import Lowercase, Sequence
from transformers import AutoConfig, AutoModel, AutoTokenizer
from transformers.models.auto import modeling_auto as registry
from transformers.utils import logging

from support import attempt, fail
from support.encoder import Encoder, forward
from support.files import TORN
from support.run import interrupted

logging.set_verbosity_error()  # the terminal is for our own lines
logging.disable_progress_bar()

ARRAY = "encode with sentence-transformers and give the array: cache_teacher.py --teacher X.npy"
SMALL = ["*.json", "*.txt", "*.model", "*.bpe", "*.codes"]  # all but weights
OTHER_WEIGHTS = ["onnx/*", "openvino/*", "original/*", "consolidated*"]
TOKENIZER_FILES = ("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*")
TOKENIZER_FILES += ("merges.txt", "*.model", "*.bpe", "*.codes")
POOLINGS = {"cls": "cls", "mean": "mean", "lasttoken": "last"}  # sentence-transformers' -> ours
READS_BOTH_WAYS = ("xlnet", "bert-generation")  # though the library lists them as decoders alone


# ------------------------------------------------------------------------------ a folder of files
def model_folder(name):
    """The path of a directory, or of a Hub id's files, downloaded or from the cache."""
    if Path(name).exists():
        return Path(name)
    errors = (OSError, ValueError, HfHubHTTPError)
    with attempt(f"find {name}: no such folder, and as a model of the Hub", *errors):
        how = {"ignore_patterns": OTHER_WEIGHTS}
        folder = snapshot_download(name, allow_patterns=[*SMALL, "*.safetensors"], **how)
        if not any(Path(folder).glob("*.safetensors")):
            folder = snapshot_download(name, allow_patterns=[*SMALL, "*.bin"], **how)
        return Path(folder)


def read_json(path):
    """What a JSON file of a model holds; {} if there is no such file."""
    with attempt(f"read {path}"):
        return json.loads(path.read_text("utf-8")) if path.exists() else {}


def read_declared(path, **known):
    """The object in a file of sentence-transformers; {} if there is none.

    known: of each key the type or the values that are understood. Others end the program.
    """
    config = read_json(path)
    for key, value in config.items():
        fits = known.get(key, ())
        if value is not None and not (type(value) is fits if type(fits) is type else value in fits):
            fail(f"{path}: {key} {json.dumps(value)[:80]} is not implemented; {ARRAY}")
    return config


def read_declarations(root):
    """(folder of the weights, pooling, max_seq_length, do_lower_case) as the model's files say.

    None where they say nothing. Ends the program if they ask for what is not implemented here.
    """
    modules = read_json(root / "modules.json")
    if not modules:
        return root, None, None, False
    kinds = [module["type"] for module in modules]
    names = [kind.rsplit(".", 1)[-1] for kind in kinds if kind.startswith("sentence_transformers.")]
    if names not in (["Transformer", "Pooling"], ["Transformer", "Pooling", "Normalize"]):
        what = "is more than a Transformer, a Pooling and a Normalize of sentence-transformers"
        fail(f"{root / 'modules.json'}: type {kinds} {what}; {ARRAY}")
    about = read_declared(
        root / "config_sentence_transformers.json",
        **{"__version__": dict, "prompts": dict, "default_prompt_name": str},
        **{"similarity_fn_name": str, "model_type": ("SentenceTransformer",)},
    )
    if prompt := (about.get("prompts") or {}).get(about.get("default_prompt_name")):
        fail(f"{root} puts a prompt before every sentence, {prompt!r}; {ARRAY}")
    folder, method = root / modules[0]["path"], {"method": "forward"}
    config = read_declared(
        next(folder.glob("sentence_*_config.json"), folder / "sentence_bert_config.json"),
        **{"max_seq_length": int, "do_lower_case": bool, "unpad_inputs": bool},
        transformer_task=("feature-extraction",),
        module_output_name=("token_embeddings",),
        modality_config=[{"text": method | {"method_output_name": "last_hidden_state"}}],
    )
    pooling = read_pooling(root / modules[1]["path"] / "config.json")
    return folder, pooling, config.get("max_seq_length"), config.get("do_lower_case") or False


def read_pooling(path):
    """The pooling that a Pooling module's config asks for, in its older or its newer form."""
    if not path.exists():
        fail(f"{path} is missing, which modules.json names")
    old = {f"pooling_mode_{name}_tokens": (False,) for name in ("max", "mean_sqrt_len")}
    old |= dict.fromkeys(("pooling_mode_cls_token", "pooling_mode_mean_tokens"), bool)
    old |= {"pooling_mode_lasttoken": bool, "pooling_mode_weightedmean_tokens": (False,)}
    sizes = {"word_embedding_dimension": int, "embedding_dimension": int, "include_prompt": bool}
    config = read_declared(path, pooling_mode=tuple(POOLINGS), **old, **sizes)
    flags = [key.split("_")[2] for key in old if config.get(key)]
    modes = [config["pooling_mode"]] if config.get("pooling_mode") else flags or ["mean"]
    if len(modes) > 1:
        fail(f"{path}: pooling_mode {' + '.join(modes)} is not implemented; {ARRAY}")
    return POOLINGS[modes[0]]


# -------------------------------------------------------------------------------------- the model
def load_encoder(name, pooling="auto", max_length=256, dtype=torch.float32, device="cpu"):
    """The Encoder of a Hub id or a directory; prints its pooling, and why that one.

    The weights are loaded as `dtype`, whatever type the files hold. Ends the program with one line
    if the model can't be loaded, or is not understood well enough for its embeddings to be right.
    """
    root = model_folder(name)
    if interrupted(root):
        fail(f"{name} holds an interrupted run; finish it first, with --resume")
    folder, declared, limit, lower = read_declarations(root)
    model = load_model(name, folder, dtype)
    tokenizer, files, about = load_tokenizer(name, folder, lower)
    pooling = settle_pooling(name, model.config, pooling, declared)
    told = limit or about.get("model_max_length")
    limit = find_limit(name, model, tokenizer, about, (max_length, told))
    model.to(device).eval()
    return Encoder(model, tokenizer, files, pooling, limit, lower, find_widths(model, tokenizer))


def load_model(name, folder, dtype):
    """The model itself, with all its weights."""
    if not (folder / "config.json").exists():
        fail(f"{name} holds no model: {folder / 'config.json'} is missing")
    if (folder / "adapter_config.json").exists():
        fail(f"{folder / 'adapter_config.json'}: adapters are not implemented; merge it first")
    if read_json(folder / "config.json").get("auto_map"):
        fail(f"{folder / 'config.json'}: auto_map names code of the model's own; {ARRAY}")
    with attempt(f"load {name}", *TORN, SafetensorError):
        config = AutoConfig.from_pretrained(folder)
        if config.is_encoder_decoder:
            raise ValueError(f"encoder-decoders are not implemented; {ARRAY}")
        how = {"dtype": dtype, "output_loading_info": True, "ignore_mismatched_sizes": True}
        model, report = AutoModel.from_pretrained(folder, **how)
    if report["mismatched_keys"]:
        fail(f"{name}: its weights do not have the sizes that its config.json gives")
    if missing := sorted(key for key in report["missing_keys"] if "pooler" not in key):
        what = f"{len(missing)} weights of a {type(model).__name__}, {missing[0]} among them"
        fail(f"{name}: its files lack {what}")  # only the pooler is not used here
    return model


def load_tokenizer(name, folder, lower):
    """(tokenizers.Tokenizer, {name: content} of its files, what they say in words).

    It is that of tokenizer.json, if there is one: transformers builds some anew from their class.
    """
    found = {path.name: path for pattern in TOKENIZER_FILES for path in folder.glob(pattern)}
    files = {key: path.read_bytes() for key, path in found.items()}
    about = read_json(folder / "special_tokens_map.json")
    about |= read_json(folder / "tokenizer_config.json")
    with attempt(f"load the tokenizer of {name}", Exception):  # the library raises nothing narrower
        if "tokenizer.json" in files:
            tokenizer = Tokenizer.from_file(str(found["tokenizer.json"]))
        else:
            library = AutoTokenizer.from_pretrained(folder)
            if not files.keys() & set(library.vocab_files_names.values()) or not library.is_fast:
                raise ValueError(f"it has no tokenizer.json; {ARRAY}")
            tokenizer = Tokenizer.from_str(library.backend_tokenizer.to_str())
    tokenizer.no_padding()
    tokenizer.no_truncation()
    ids = tokenizer.encode("a").ids
    for role, end in (("bos", 0), ("eos", -1)):
        if about.get(f"add_{role}_token") and token_id(tokenizer, about, role) not in (
            None,
            ids[end],
        ):
            what = f"add_{role}_token in tokenizer_config.json, but tokenizer.json adds none"
            fail(f"{name}: {what}; {ARRAY}")
    asked, normalizer = about.get("do_lower_case"), str(tokenizer.normalizer)
    if asked is not None and f"lowercase={not asked}" in normalizer:
        print(f"{name}: tokenizer_config.json says do_lower_case {asked}, tokenizer.json does not,")
        print("and is followed; older versions of transformers followed the other")
    if lower:  # as sentence-transformers does it
        own = [tokenizer.normalizer] if tokenizer.normalizer else []
        tokenizer.normalizer = Sequence([Lowercase(), *own])
    return tokenizer, files, about


def token_id(tokenizer, about, role):
    """The id of the token that a tokenizer's files name for a role, such as pad, or None."""
    token = about.get(f"{role}_token")
    return tokenizer.token_to_id(token["content"] if isinstance(token, dict) else token or "")


def find_limit(name, model, tokenizer, about, limits):
    """How many tokens of a sentence the model takes, at most as many as the `limits` allow."""
    names = ("max_position_embeddings", "max_seq_len")
    positions = next((n for key in names if (n := getattr(model.config, key, None))), 0)
    for key, part in model.named_modules():  # some count positions from the padding token's id
        first = getattr(part, "padding_idx", None) if "position_embeddings" in key else None
        if first is not None:
            positions = part.num_embeddings - first - 1
            if (pad := token_id(tokenizer, about, "pad")) not in (None, first):
                what = f"its config.json counts positions from the padding token's id, {first}"
                fail(f"{name}: {what}, which is {pad} in its tokenizer's files")
    most = int(min(n for n in (*limits, positions) if isinstance(n, (int, float)) and n > 0))
    special = tokenizer.num_special_tokens_to_add(False)
    if most <= special:
        fail(f"{name}: {most} tokens leave none of a sentence beside the {special} special ones")
    return most


@torch.inference_mode()
def find_widths(model, tokenizer):
    """The widths of a model's layers, without the embedding layer: one word goes through."""
    ids = torch.tensor([tokenizer.encode("one").ids], device=model.device)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    states = forward(model, batch, output_hidden_states=True).hidden_states[1:]
    return tuple(h.shape[-1] for h in states)


def settle_pooling(name, config, asked, declared):
    """The pooling that was asked for, else the declared one, else what the model's kind wants.

    Prints it with the reason. Ends the program where none is certain, or where the last word of a
    sentence would not change its embedding.
    """
    kind = config.model_type
    causal = kind in registry.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    masked = kind in registry.MODEL_FOR_MASKED_LM_MAPPING_NAMES
    decoder = (causal and not masked) or getattr(config, "is_decoder", False)
    unsure = kind in READS_BOTH_WAYS or not (causal or masked)
    if asked != "auto":
        pooling, why = asked, "as asked"
    elif declared:
        pooling, why = declared, "from its sentence-transformers files"
    elif unsure:
        fail(f"{name}: whether a {kind} is an encoder or a decoder is not certain; give --pooling")
    else:
        pooling, why = ("last", "it is a decoder") if decoder else ("cls", "it is an encoder")
    if decoder and not unsure and pooling == "cls":
        fail(f"the first token of {name}, a decoder, does not see the others; try --pooling last")
    print(f"{name}: {pooling} pooling, {why}")
    return pooling
