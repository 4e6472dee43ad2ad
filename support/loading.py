"""Models read as their authors wrote them, or refused: a model is a folder of files.

What the files declare is honoured; what is not understood ends the program in one line that names
the file and the key.
"""

import json
from pathlib import Path

import torch
import transformers
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
UNDERSTOOD = {  # sentence-transformers' files: a key's values that change nothing here
    "sentence_bert_config.json": {
        "transformer_task": ("feature-extraction",),
        "modality_config": (
            {"text": {"method": "forward", "method_output_name": "last_hidden_state"}},
        ),
        "module_output_name": ("token_embeddings",),
        "unpad_inputs": (True, False),
    },
    "config_sentence_transformers.json": {"similarity_fn_name": ("cosine", "dot", "euclidean")}
    | {"model_type": ("SentenceTransformer",)},
    "1_Pooling/config.json": {"include_prompt": (True, False)},
}
POOLINGS = {"cls": "cls", "cls_token": "cls", "mean": "mean", "mean_tokens": "mean"}
POOLINGS |= {"lasttoken": "last"}
READS_BOTH_WAYS = ("xlnet", "bert-generation")  # though listed as decoders alone


# ------------------------------------------------------------------------------ a folder of files
def model_folder(name):
    """A directory, or that of a Hub id's files, downloaded or from the cache. Ends the program."""
    if Path(name).exists():
        return Path(name)
    errors = (OSError, ValueError, HfHubHTTPError)
    with attempt(f"find {name}: no such folder, and as a model of the Hub", *errors):
        how = {"ignore_patterns": OTHER_WEIGHTS}
        folder = snapshot_download(name, allow_patterns=[*SMALL, "*.safetensors"], **how)
        if not any(Path(folder).glob("*.safetensors")):
            folder = snapshot_download(name, allow_patterns=[*SMALL, "*.bin"], **how)
        return Path(folder)


def read_json(folder, file):
    """The object in a JSON file of a model; {} if there is no such file."""
    path = folder / file
    with attempt(f"read {path}"):
        content = json.loads(path.read_text("utf-8")) if path.exists() else {}
        if not isinstance(content, (dict, list)):
            raise ValueError("it holds no object")
        return content


def refuse_unknown(path, config):
    """End the program if a file of sentence-transformers has a key that is not understood."""
    known = UNDERSTOOD["/".join(path.parts[-2:]) if path.parent.name == "1_Pooling" else path.name]
    for key, value in config.items():
        if value is not None and value not in known.get(key, ()):
            fail(f"{path}: {key} {json.dumps(value)[:60]} is not implemented; {ARRAY}")


def read_declarations(folder):
    """(folder of the weights, pooling, max_seq_length, do_lower_case) as the model's files say.

    None where they say nothing. Ends the program if they ask for what is not implemented here.
    """
    modules = read_json(folder, "modules.json")
    if not modules:
        return folder, None, None, False
    kinds = [module["type"] for module in modules]
    own = [kind.rsplit(".", 1)[-1] for kind in kinds if kind.startswith("sentence_transformers.")]
    if (
        own[:2] != ["Transformer", "Pooling"]
        or own[2:] not in ([], ["Normalize"])
        or own != [kind.rsplit(".", 1)[-1] for kind in kinds]
    ):
        fail(
            f"{folder / 'modules.json'}: {kinds} is more than a Transformer and a Pooling; {ARRAY}"
        )
    inner = folder / modules[0]["path"]
    pooling = read_pooling(folder / modules[1]["path"])
    config = read_json(inner, "sentence_bert_config.json")
    limit, lower = config.pop("max_seq_length", None), config.pop("do_lower_case", False)
    refuse_unknown(inner / "sentence_bert_config.json", config)
    if type(lower) is not bool or not (limit is None or (type(limit) is int and limit > 0)):
        fail(
            f"{inner / 'sentence_bert_config.json'}: max_seq_length {limit}, do_lower_case {lower}"
        )
    about = read_json(folder, "config_sentence_transformers.json")
    prompts, default = about.pop("prompts", {}), about.pop("default_prompt_name", None)
    about.pop("__version__", None)
    refuse_unknown(folder / "config_sentence_transformers.json", about)
    if (prompts or {}).get(default):
        fail(f"{folder} puts a prompt before every sentence, {prompts[default]!r}; {ARRAY}")
    return inner, pooling, limit, lower


def read_pooling(folder):
    """The pooling that a Pooling module's config asks for, in its older or its newer form."""
    if not (folder / "config.json").exists():
        fail(f"{folder / 'config.json'} is missing, which modules.json names")
    config, old = read_json(folder, "config.json"), "pooling_mode_"
    flags = {key.removeprefix(old): config.pop(key) for key in [*config] if key.startswith(old)}
    mode = config.pop("pooling_mode", [key for key, on in flags.items() if on] or "mean")
    mode = mode if isinstance(mode, str) else "+".join(mode)
    for key in ("word_embedding_dimension", "embedding_dimension"):
        config.pop(key, None)
    refuse_unknown(Path("1_Pooling", "config.json"), config)
    if mode not in POOLINGS:
        fail(f"{folder / 'config.json'} asks for {mode} pooling, which is not implemented; {ARRAY}")
    return POOLINGS[mode]


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
    tokenizer, files = load_tokenizer(name, folder, model, lower)
    pooling = settle_pooling(name, model.config, pooling, declared)
    limit = find_limit(name, folder, model, tokenizer, limit, max_length)
    model.to(device).eval()
    return Encoder(model, tokenizer, files, pooling, limit, lower, find_widths(model, tokenizer))


def load_model(name, folder, dtype):
    """The model itself, with all its weights."""
    config = read_json(folder, "config.json")
    if not config:
        fail(f"{name} holds no model: {folder / 'config.json'} is missing")
    if (folder / "adapter_config.json").exists():
        fail(f"{folder / 'adapter_config.json'}: adapters are not implemented; merge it first")
    if config.get("auto_map"):
        fail(f"{folder / 'config.json'}: auto_map names code of the model's own; {ARRAY}")
    if config.get("is_encoder_decoder"):
        fail(f"{name} is an encoder-decoder, which is not implemented; {ARRAY}")
    with attempt(f"load {name}", *TORN, SafetensorError, KeyError):
        if AutoConfig.from_pretrained(folder).is_encoder_decoder:
            fail(f"{name} is an encoder-decoder, which is not implemented; {ARRAY}")
        how = {"dtype": dtype, "output_loading_info": True, "ignore_mismatched_sizes": True}
        model, report = AutoModel.from_pretrained(folder, **how)
    if report["mismatched_keys"]:
        fail(f"{name}: its weights do not have the sizes that its config.json gives")
    if missing := sorted(key for key in report["missing_keys"] if "pooler" not in key):
        what = f"{len(missing)} weights of a {type(model).__name__}, {missing[0]} among them"
        fail(f"{name}: its files lack {what}")  # only the pooler is not used here
    return model


def load_tokenizer(name, folder, model, lower):
    """(tokenizers.Tokenizer, {name: content} of its files): as tokenizer.json has it, if there."""
    config = read_json(folder, "tokenizer_config.json")
    found = {path.name: path for pattern in TOKENIZER_FILES for path in folder.glob(pattern)}
    files = {key: path.read_bytes() for key, path in found.items()}
    with attempt(f"load the tokenizer of {name}", Exception):  # tokenizers raises nothing narrower
        if "tokenizer.json" in files:
            tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        else:
            library = AutoTokenizer.from_pretrained(folder)
            if not files.keys() & set(library.vocab_files_names.values()):
                raise ValueError("it has no tokenizer files, such as tokenizer.json")
            if not library.is_fast:
                raise ValueError(f"{type(library).__name__} has no tokenizer.json; {ARRAY}")
            tokenizer = Tokenizer.from_str(library.backend_tokenizer.to_str())
    tokenizer.no_padding()
    tokenizer.no_truncation()
    check_tokenizer(name, tokenizer, config, files)
    if lower:  # as sentence-transformers does it
        own = tokenizer.normalizer
        tokenizer.normalizer = Sequence([Lowercase(), *([own] if own else [])])
    token = config.get("pad_token")
    pad_id = tokenizer.token_to_id(token["content"] if isinstance(token, dict) else token or "")
    counted = position_embeddings(model)
    if counted is not None and pad_id not in (None, counted.padding_idx):
        fail(
            f"{folder / 'config.json'}: positions are counted from the padding token's id "
            f"{counted.padding_idx}, but it is {pad_id} in the tokenizer's files"
        )
    return tokenizer, files


def check_tokenizer(name, tokenizer, config, files):
    """End the program, or print, where tokenizer_config.json contradicts tokenizer.json."""
    ids = tokenizer.encode("a").ids
    for role, end in (("bos", 0), ("eos", -1)):
        token = config.get(f"{role}_token")
        own = tokenizer.token_to_id(token["content"] if isinstance(token, dict) else token or "")
        if config.get(f"add_{role}_token") and own is not None and ids[end] != own:
            what = f"add_{role}_token in tokenizer_config.json, but tokenizer.json adds none"
            fail(f"{name}: {what}; {ARRAY}")
    asked = config.get("do_lower_case")
    normalizer = json.loads(files.get("tokenizer.json", b"{}")).get("normalizer") or {}
    for own in [normalizer, *normalizer.get("normalizers", [])]:
        if asked is not None and own.get("lowercase", asked) != asked:
            print(
                f"{name}: do_lower_case is {asked} in tokenizer_config.json, {own['lowercase']} in"
            )
            print("tokenizer.json, which is followed; older libraries followed the other")


def position_embeddings(model):
    """The position embeddings of a model that counts them from its padding token's id, or None."""
    for key, part in model.named_modules():
        if "position_embeddings" in key and getattr(part, "padding_idx", None) is not None:
            return part
    return None


def find_limit(name, folder, model, tokenizer, declared, asked):
    """How many tokens of a sentence the model takes, at most as many as were asked for."""
    names = ("max_position_embeddings", "max_seq_len")
    positions = next((n for name in names if (n := getattr(model.config, name, None))), 0)
    if counted := position_embeddings(model):
        positions = counted.num_embeddings - counted.padding_idx - 1
    told = declared or read_json(folder, "tokenizer_config.json").get("model_max_length")
    most = int(min(n for n in (asked, told, positions) if isinstance(n, (int, float)) and n > 0))
    special = tokenizer.num_special_tokens_to_add(False)
    if most <= special:
        fail(f"{name}: {most} tokens leave none of a sentence beside the {special} special ones")
    return most


@torch.inference_mode()
def find_widths(model, tokenizer):
    """The widths of a model's layers, the embedding layer left out: one sentence goes through."""
    ids = torch.tensor([tokenizer.encode("one").ids], device=model.device)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    return tuple(
        h.shape[-1] for h in forward(model, batch, output_hidden_states=True).hidden_states[1:]
    )


def settle_pooling(name, config, asked, declared):
    """The pooling that was asked for, else the declared one, else what the model's kind wants.

    Prints it with the reason. Ends the program where none is certain, or where the last word of a
    sentence would not change its embedding.
    """
    kind = config.model_type
    causal = kind in registry.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    masked = kind in registry.MODEL_FOR_MASKED_LM_MAPPING_NAMES
    decoder = (causal and not masked) or getattr(config, "is_decoder", False)
    unsure = not (causal or masked) or (causal and not masked and kind in READS_BOTH_WAYS)
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
