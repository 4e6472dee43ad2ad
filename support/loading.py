"""Models, as folders of files, read as their authors wrote them.

What is known to change embeddings and is not implemented ends the program in one line.
"""

import re
from pathlib import Path

import numpy as np
import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError
from safetensors import SafetensorError
from tokenizers import Tokenizer
from tokenizers.normalizers import Lowercase, Sequence
from transformers import AutoConfig, AutoModel, AutoTokenizer, logging
from transformers.models.auto import modeling_auto as registry

from support import attempt, fail
from support.encoder import Encoder, Tokens, forward, pad, pool
from support.files import TORN, read_json
from support.run import interrupted

logging.set_verbosity_error()  # the terminal is for our own lines
logging.disable_progress_bar()

ARRAY = "encode with sentence-transformers and give the array: cache_teacher.py --teacher X.npy"
SMALL = ["*.json", "*.txt", "*.model", "*.bpe", "*.codes"]  # all files but weights
COPIES = ["onnx/*", "openvino/*", "original/*", "consolidated*"]  # of the weights
PLAINLY = {"output_attentions": False, "chunk_size_feed_forward": 0, "return_dict": True}
POOLINGS = {"cls": "cls", "mean": "mean", "lasttoken": "last"}  # sentence-transformers' -> ours
NUMBER = re.compile(r"\.\d+\.")  # of a layer, as in "encoder.layer.0.output.dense.bias"
BUFFERS = re.compile(r"(attn|attention)\.(masked_)?bias$|inv_freq$")  # which older files hold


def model_folder(name):
    """The path of a directory, or of a Hub id's files, downloaded or from the cache."""
    try:
        if Path(name).exists():
            return Path(name)
        for weights in ("*.safetensors", "*.bin"):
            wanted = [*SMALL, weights]
            folder = snapshot_download(name, allow_patterns=wanted, ignore_patterns=COPIES)
            if list(Path(folder).rglob(weights)):
                break
        return Path(folder)
    except (OSError, ValueError) as error:
        answer = error if isinstance(error, HfHubHTTPError) else error.__cause__
        missing = isinstance(answer, RepositoryNotFoundError)
        if isinstance(answer, GatedRepoError):  # which the library counts among the missing ones
            fail(f"{name} is gated: ask for access on its page of the Hub, then `hf auth login`")
        if isinstance(answer, HfHubHTTPError) and not missing:
            fail(f"the Hub does not give {name} now; try again later, or `hf auth login`: {answer}")
        fail(
            f"cannot find {name}: no such folder, nor on the Hub (offline: `hf download` it before)"
        )


def read_settings(path, needed=False):
    """A JSON file of settings; {} if there is no such file, unless it is `needed`."""
    settings = read_json(path, needed)
    if not isinstance(settings, dict):
        fail(f"{path} holds a {type(settings).__name__} in place of settings by name")
    for key in ("max_seq_length", "model_max_length"):
        if isinstance(settings.get(key), str):
            fail(f"{path}: {key} {settings[key]!r} must be a number")
    return settings


def read_declarations(root):
    """(folder of the weights, pooling, max_seq_length, do_lower_case, whether to normalise).

    None and False where a model's files say nothing. Ends the program if they ask for what is not
    implemented here.
    """
    path = root / "modules.json"
    if not path.exists():
        return root, None, None, False, False
    modules = read_json(path)
    with attempt(f"read {path}: it must list modules", TypeError, KeyError, AttributeError):
        types = [module["type"] for module in modules]
        folders = [root / module["path"] for module in modules]
        names = [t.rpartition(".")[2] for t in types if t.startswith("sentence_transformers.")]
    if names != ["Transformer", "Pooling", "Normalize"][: max(2, len(types))]:
        fail(f"{path}: type {types} is more than Transformer and Pooling; {ARRAY}")
    settings = read_settings(root / "config_sentence_transformers.json")
    prompts = settings.get("prompts") or {}
    prompt = prompts.get(settings.get("default_prompt_name"))
    if prompt:
        fail(f"{root} puts a prompt before every sentence, {prompt!r}; {ARRAY}")
    if settings.get("truncate_dim"):
        fail(f"{root}: truncate_dim {settings['truncate_dim']} is not implemented; {ARRAY}")
    folder = folders[0]
    path = folder / "sentence_bert_config.json"
    if not path.exists():  # older versions name it after the model: sentence_roberta_config.json
        path = next(folder.glob("sentence_*_config.json"), path)
    settings = read_settings(path)
    limit = settings.get("max_seq_length")
    lower = settings.get("do_lower_case", False)
    return folder, read_pooling(folders[1] / "config.json"), limit, lower, len(names) == 3


def read_pooling(path):
    """The pooling that the config.json of a Pooling module declares: cls, mean or last."""
    settings = read_settings(path, needed=True)
    modes = settings.get("pooling_mode")
    if isinstance(modes, str):
        modes = [modes]
    if not modes:  # older versions: "pooling_mode_cls_token": true, "..._mean_tokens": false
        flags = [key for key in settings if key.startswith("pooling_mode_") and settings[key]]
        names = [flag.removeprefix("pooling_mode_").removesuffix("_tokens") for flag in flags]
        modes = [name.removesuffix("_token") for name in names] or ["mean"]
    mode = "+".join(modes)
    if mode not in POOLINGS:
        fail(f"{path}: pooling_mode {mode} is not implemented; {ARRAY}")
    return POOLINGS[mode]


def load_encoder(name, pooling="auto", max_length=256, dtype=torch.float32, device="cpu"):
    """The Encoder of a Hub id or a directory; prints its pooling, and why that one.

    max_length: tokens; dtype: of the loaded weights, whatever type the files hold. Ends the program
    with one line if the model is not understood well enough for its embeddings to be right.
    """
    root = model_folder(name)
    if interrupted(root):
        fail(f"{name} holds an interrupted run; finish it first, with --resume")
    folder, declared, limit, lower, normalize = read_declarations(root)
    model = load_model(name, folder, dtype).to(device)
    tokenizer, settings = load_tokenizer(name, folder, lower)
    limit = limit or settings.get("model_max_length") or max_length
    limit = find_limit(name, model, tokenizer, min(max_length, limit))
    side = (tokenizer.truncation or {}).get("direction", "right")
    tokenizer.enable_truncation(limit, direction=settings.get("truncation_side") or side)
    attention_type = getattr(model, "attention_type", None)
    encoder = Encoder(
        model=model,
        tokenizer=tokenizer,
        special_tokens=find_special_tokens(model, tokenizer, settings),
        pooling=choose_pooling(name, model.config, pooling, declared),
        max_length=limit,
        widths=layer_widths(model),
        normalize=normalize,
    )
    check_vectors(name, encoder, settings.get("model_input_names") or [])
    if attention_type:  # a BigBird changes its own for good at the first short batch
        model.set_attention_type(attention_type)
    return encoder


def load_model(name, folder, dtype):
    """The model itself, with all its weights."""
    path = folder / "config.json"
    settings = read_settings(path, needed=True)
    if (folder / "adapter_config.json").exists():
        fail(f"{folder / 'adapter_config.json'}: adapters are not implemented; merge it first")
    for key in ("auto_map", "quantization_config"):  # code of the model's own; quantised weights
        if settings.get(key):
            fail(f"{path}: {key} is not implemented; {ARRAY}")
    layerdrop = {key: 0.0 for key in settings if "layerdrop" in key}  # a student needs all layers
    try:
        config = AutoConfig.from_pretrained(folder, **PLAINLY, **layerdrop)
        if config.is_encoder_decoder:
            fail(f"{name} is an encoder-decoder, which is not implemented; {ARRAY}")
        model, report = AutoModel.from_pretrained(
            folder,
            config=config,
            dtype=dtype,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )
    except (*TORN, SafetensorError, AssertionError, ImportError) as error:
        reason = str(error).strip().split("\n")[0][:120]  # what follows is advice that does not fit
        fail(f"cannot load {name}; are its files whole, and do they fit each other? ({reason})")
    check_weights(name, model, report)
    return model


def check_weights(name, model, report):
    """End the program if weights are missing, or layers in the files have more than the model's."""
    missing = {*report["missing_keys"], *(key for key, *_ in report["mismatched_keys"])}
    missing = sorted(key for key in missing if "pooler" not in key)  # which is not used here
    if missing:
        fail(f"{name}: its files lack {len(missing)} of config.json's weights, as {missing[0]}")
    layers = {f".{key.partition('.0.')[0]}" for key in model.state_dict() if ".0." in key}
    for key in sorted(report["unexpected_keys"]):  # those of a head are unexpected, and not used
        in_a_layer = f".{NUMBER.split(key)[0]}".endswith(tuple(layers))
        if NUMBER.search(key) and in_a_layer and not BUFFERS.search(key):
            fail(f"{name}: a {type(model).__name__} does not use its weight {key}; {ARRAY}")


def load_tokenizer(name, folder, lower):
    """(tokenizers.Tokenizer, the settings beside it), which are not at odds.

    It is that of tokenizer.json, if there is one: transformers builds some anew from their class.
    """
    path = folder / "tokenizer_config.json"
    settings = read_settings(folder / "special_tokens_map.json") | read_settings(path)
    with attempt(f"load the tokenizer of {name}", Exception):  # the library raises nothing narrower
        if (folder / "tokenizer.json").exists():
            tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        else:
            library = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
            files = library.vocab_files_names.values()
            if not library.is_fast or not any((folder / file).exists() for file in files):
                raise ValueError(f"it has no tokenizer.json; {ARRAY}")
            tokenizer = library.backend_tokenizer
    tokenizer.no_padding()
    special = tokenizer.encode("a").special_tokens_mask
    refused = {
        "auto_map": True,
        "split_special_tokens": True,
        "add_bos_token": special[0] == 0,
        "add_eos_token": special[-1] == 0,
    }
    for key, wrong in refused.items():
        if wrong and settings.get(key):
            fail(f"{path}: {key} {settings[key]} is not what tokenizer.json does; {ARRAY}")
    added = read_settings(folder / "added_tokens.json")
    for number, token in settings.get("added_tokens_decoder", {}).items():
        added[token["content"]] = int(number)
    for token, number in added.items():
        if tokenizer.token_to_id(token) != number:
            fail(f"{folder}: the added token {token!r} is not in tokenizer.json; {ARRAY}")
    lower_case = settings.get("do_lower_case")
    if lower_case is not None and f"lowercase={not lower_case}" in str(tokenizer.normalizer):
        print(
            f"{path}: do_lower_case {lower_case} is not followed: tokenizer.json has it otherwise"
        )
    if lower:  # as sentence-transformers does it
        tokenizer.normalizer = Sequence([Lowercase(), tokenizer.normalizer or Sequence([])])
    return tokenizer, settings


def find_special_tokens(model, tokenizer, settings):
    """Those in the vocabulary, such as {"pad_token": "[PAD]"}; to pad, one with an embedding."""
    tokens = {}
    for role in ("pad", "cls", "sep", "mask", "unk", "bos", "eos"):
        token = settings.get(f"{role}_token")
        if isinstance(token, dict):
            token = token["content"]
        if token and tokenizer.token_to_id(token) is not None:
            tokens[f"{role}_token"] = token
    ids = [tokenizer.token_to_id(tokens.pop("pad_token", ""))]
    for role in ("pad", "eos", "unk"):
        ids.append(getattr(model.config, f"{role}_token_id", None))
        ids.append(tokenizer.token_to_id(tokens.get(f"{role}_token", "")))
    vocabulary = range(len(model.get_input_embeddings().weight))
    for number in ids:
        if number in vocabulary and "pad_token" not in tokens:
            tokens["pad_token"] = tokenizer.id_to_token(number)
    return tokens


def find_limit(name, model, tokenizer, limit):
    """How many tokens of a sentence the model takes: `limit`, unless its positions end before."""
    config = model.config
    positions = getattr(config, "max_position_embeddings", 0) or getattr(config, "max_seq_len", 0)
    for key, part in model.named_modules():  # some count positions from the padding token's id
        padding = getattr(part, "padding_idx", None)
        if "position_embeddings" in key and padding is not None:
            positions = len(part.weight) - padding - 1
    if positions > 0:
        limit = min(limit, positions)
    special = tokenizer.num_special_tokens_to_add(False)
    if limit <= special:
        fail(f"{name}: {limit} tokens leave none of a sentence beside the {special} special ones")
    return int(limit)


def choose_pooling(name, config, asked, declared):
    """The pooling asked for, else the declared one, else a decoder's last token, else [CLS]."""
    kind = config.model_type
    decoder = kind in registry.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    if kind in registry.MODEL_FOR_MASKED_LM_MAPPING_NAMES:
        decoder = getattr(config, "is_decoder", False)
    if getattr(config, "is_causal", None) is False:  # its tokens see those after them
        decoder = False
    pooling, reason = ("last", "it is a decoder") if decoder else ("cls", "it is an encoder")
    if declared:
        pooling, reason = declared, "from its sentence-transformers files"
    if asked != "auto":
        pooling, reason = asked, "as asked"
    if decoder and pooling == "cls":
        fail(f"the first token of {name}, a decoder, does not see the others; try --pooling last")
    print(f"{name}: {pooling} pooling, {reason}")
    return pooling


@torch.inference_mode()
def layer_widths(model):
    """The width of each of the L layers."""
    ids = torch.zeros(1, 8, dtype=torch.long, device=model.device)
    states = forward(model, {"input_ids": ids}, output_hidden_states=True).hidden_states
    return tuple(hidden.shape[-1] for hidden in states[1:])


@torch.inference_mode()
def check_vectors(name, encoder, input_names):
    """End the program if a sentence's vector depends on its batch, or on token types.

    Some models see padding in spite of the mask, and none is given token types here.
    """
    model = encoder.model
    short, long = encoder.tokenizer.encode_batch(["a", "a b c d e f g h"])
    ids = np.array(short.ids + long.ids) % len(model.get_input_embeddings().weight)
    tokens = Tokens(ids, np.array([0, len(short), len(ids)]))
    alone = pad(tokens, [0], model)
    batches = {"is alone": alone, "is beside a longer one": pad(tokens, [0, 1], model)}
    if "token_type_ids" in input_names:
        types = torch.tensor([short.type_ids], device=model.device)
        batches["has token_type_ids"] = alone | {"token_type_ids": types}
    tolerance = 1e-4 if model.dtype == torch.float32 else 0.1  # half precision rounds
    vectors = []
    for case, batch in batches.items():
        hidden = forward(model, batch).last_hidden_state
        vectors.append(pool(hidden, batch["attention_mask"], encoder.pooling)[0].float())
        difference = (vectors[-1] - vectors[0]).norm()
        if difference > tolerance * vectors[0].norm():
            fail(f"{name}: a sentence gets another vector where it {case}; take another model")
