"""Models, as folders of files, read as their authors wrote them.

What is not understood ends the program in one line that names the file and the key.
"""

import json
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError
from tokenizers import Tokenizer
from tokenizers.normalizers import Lowercase, Sequence
from transformers import AutoConfig, AutoModel, AutoTokenizer, logging
from transformers.models.auto import modeling_auto as registry

from support import attempt, fail
from support.encoder import POOLING_FLAGS, Encoder, takes
from support.files import TOKENIZER_FILES, TORN, read_json
from support.run import interrupted

logging.set_verbosity_error()  # the terminal is for our own lines
logging.disable_progress_bar()

ARRAY = "encode with sentence-transformers and give the array: cache_teacher.py --teacher X.npy"
SMALL = ["*.json", "*.txt", "*.model", "*.bpe", "*.codes"]  # all files but weights
OTHERS = {"ignore_patterns": ["onnx/*", "openvino/*", "original/*", "consolidated*"]}
PLAINLY = {"output_attentions": False, "chunk_size_feed_forward": 0, "return_dict": True}
POOLINGS = {"cls": "cls", "mean": "mean", "lasttoken": "last"}  # sentence-transformers' -> ours
OTHER_MODES = ("max", "mean_sqrt_len", "weightedmean")
KNOWN = {  # in the files of its versions 2 to 6: of each key the type, or the values, understood
    **dict.fromkeys(("max_seq_length", "word_embedding_dimension", "embedding_dimension"), int),
    **dict.fromkeys(("do_lower_case", "unpad_inputs", "include_prompt", *POOLING_FLAGS), bool),
    **dict.fromkeys((f"pooling_mode_{mode}_tokens" for mode in OTHER_MODES), [False]),
    **{"pooling_mode": list(POOLINGS), "transformer_task": ["feature-extraction"]},
    **{"prompts": dict, "default_prompt_name": str, "similarity_fn_name": str, "__version__": dict},
    **{"model_type": ["SentenceTransformer"], "module_output_name": ["token_embeddings"]},
    "modality_config": [{"text": {"method": "forward", "method_output_name": "last_hidden_state"}}],
}


def model_folder(name):
    """The path of a directory, or of a Hub id's files, downloaded or from the cache."""
    with attempt(f"find {name}: no such folder, nor on the Hub (offline: `hf download` it before)"):
        if Path(name).exists():
            return Path(name)
        folder = snapshot_download(name, allow_patterns=[*SMALL, "*.safetensors"], **OTHERS)
        if not any(Path(folder).rglob("*.safetensors")):
            folder = snapshot_download(name, allow_patterns=[*SMALL, "*.bin"], **OTHERS)
        return Path(folder)


def read_understood(path, needed=False):
    """What a JSON file of sentence-transformers holds, each key and value as KNOWN has it."""
    content = read_json(path, needed)
    for key, value in content.items():
        fits = KNOWN.get(key, [])
        if value is not None and not (type(value) is fits if type(fits) is type else value in fits):
            fail(f"{path}: {key} {json.dumps(value)[:80]} is not implemented; {ARRAY}")
    return content


def read_declarations(root):
    """(folder of the weights, pooling, max_seq_length, do_lower_case) as the model's files say.

    None where they say nothing. Ends the program if they ask for what is not implemented here.
    """
    if not (root / "modules.json").exists():
        return root, None, None, False
    modules = read_json(root / "modules.json")
    types = [module["type"] for module in modules]
    names = [name.rsplit(".", 1)[-1] for name in types if name.startswith("sentence_transformers.")]
    if names != ["Transformer", "Pooling", "Normalize"][: max(2, len(types))]:
        fail(f"{root / 'modules.json'}: type {types} is more than Transformer and Pooling; {ARRAY}")
    about = read_understood(root / "config_sentence_transformers.json")
    if prompt := (about.get("prompts") or {}).get(about.get("default_prompt_name")):
        fail(f"{root} puts a prompt before every sentence, {prompt!r}; {ARRAY}")
    folder, place = root / modules[0]["path"], root / modules[1]["path"] / "config.json"
    named = [folder / "sentence_bert_config.json", *folder.glob("sentence_*_config.json")]
    config = read_understood(next(filter(Path.exists, named), named[0]))
    asked = read_understood(place, needed=True)
    flags = [mode for flag, mode in POOLING_FLAGS.items() if asked.get(flag)] or ["mean"]
    pooling = POOLINGS.get(asked.get("pooling_mode")) or "+".join(flags)
    if pooling not in POOLINGS.values():
        fail(f"{place}: pooling_mode {pooling} is not implemented; {ARRAY}")
    return folder, pooling, config.get("max_seq_length"), config.get("do_lower_case") or False


def load_encoder(name, pooling="auto", max_length=256, dtype=torch.float32, device="cpu"):
    """The Encoder of a Hub id or a directory; prints its pooling, and why that one.

    max_length: tokens; dtype: of the loaded weights, whatever type the files hold. Ends the program
    with one line if the model is not understood well enough for its embeddings to be right.
    """
    root = model_folder(name)
    if interrupted(root):
        fail(f"{name} holds an interrupted run; finish it first, with --resume")
    folder, declared, limit, lower = read_declarations(root)
    model = load_model(name, folder, dtype).to(device)
    tokenizer, files, about = load_tokenizer(name, folder, lower)
    pooling = settle_pooling(name, model.config, pooling, declared)
    if limit is None:
        limit = about.get("model_max_length") or max_length
    limit = find_limit(name, model, tokenizer, about, min(max_length, limit))
    word = torch.zeros(1, 8, dtype=torch.long, device=device)  # to see the layers' widths
    with torch.inference_mode():
        layers = model(input_ids=word, output_hidden_states=True).hidden_states[1:]
    widths = tuple(h.shape[-1] for h in layers)
    return Encoder(model, tokenizer, files, pooling, limit, lower, widths)


def load_model(name, folder, dtype):
    """The model itself, with all its weights."""
    if (folder / "adapter_config.json").exists():
        fail(f"{folder / 'adapter_config.json'}: adapters are not implemented; merge it first")
    if read_json(folder / "config.json", needed=True).get("auto_map"):
        fail(f"{folder / 'config.json'}: auto_map names code of the model's own; {ARRAY}")
    try:
        config = AutoConfig.from_pretrained(folder, **PLAINLY)  # the same embeddings, whole
        if config.is_encoder_decoder:
            fail(f"{name} is an encoder-decoder, which is not implemented; {ARRAY}")
        how = {"config": config, "dtype": dtype, "ignore_mismatched_sizes": True}
        model, report = AutoModel.from_pretrained(folder, output_loading_info=True, **how)
    except (*TORN, SafetensorError, AssertionError) as error:
        said = str(error).split("\n")[0][:120]  # what follows is advice that does not fit
        fail(f"cannot load {name}; are its files whole, and do they fit each other? ({said})")
    if not takes(model, "attention_mask"):
        fail(f"{name} reads padding as words: a {type(model).__name__} takes no mask; {ARRAY}")
    lacking = {*report["missing_keys"], *(key for key, *_ in report["mismatched_keys"])}
    if lacking := sorted(key for key in lacking if "pooler" not in key):  # which is not used here
        fail(f"{name}: its files lack {len(lacking)} of config.json's weights, as {lacking[0]}")
    return model


def load_tokenizer(name, folder, lower):
    """(tokenizers.Tokenizer, {name: content} of its files, what they say in words).

    It is that of tokenizer.json, if there is one: transformers builds some anew from their class.
    """
    files = {path.name: path.read_bytes() for glob in TOKENIZER_FILES for path in folder.glob(glob)}
    settings = folder / "tokenizer_config.json"
    about = read_json(folder / "special_tokens_map.json") | read_json(settings)
    with attempt(f"load the tokenizer of {name}", Exception):  # the library raises nothing narrower
        if "tokenizer.json" not in files:
            library = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
            if not library.is_fast or not files.keys() & {*library.vocab_files_names.values()}:
                raise ValueError(f"it has no tokenizer.json; {ARRAY}")
            files["tokenizer.json"] = library.backend_tokenizer.to_str().encode()
        tokenizer = Tokenizer.from_buffer(files["tokenizer.json"])
    tokenizer.no_padding()
    added = tokenizer.encode("a").special_tokens_mask
    refused = {"add_bos_token": added[:1] != [1], "add_eos_token": added[-1:] != [1]}
    refused |= {"truncation_side": about.get("truncation_side") != "right", "auto_map": True}
    for key in (key for key, wrong in refused.items() if wrong and about.get(key)):
        fail(f"{settings}: {key} {about[key]} is not what tokenizer.json does; {ARRAY}")
    asked = about.get("do_lower_case")
    if asked is not None and f"lowercase={not asked}" in str(tokenizer.normalizer):
        print(f"{settings}: do_lower_case {asked} is not followed: tokenizer.json has it otherwise")
    if lower:  # as sentence-transformers does it
        tokenizer.normalizer = Sequence([Lowercase(), *filter(None, [tokenizer.normalizer])])
    return tokenizer, files, about


def find_limit(name, model, tokenizer, about, most):
    """How many tokens of a sentence the model takes: `most`, unless its positions end before."""
    names = ("max_position_embeddings", "max_seq_len")
    positions = next((n for key in names if (n := getattr(model.config, key, None))), 0)
    for key, part in model.named_modules():  # some count positions from the padding token's id
        if "position_embeddings" in key and (own := getattr(part, "padding_idx", None)) is not None:
            positions = part.num_embeddings - own - 1
            pad = about.get("pad_token") or tokenizer.id_to_token(own)
            if tokenizer.token_to_id(pad["content"] if isinstance(pad, dict) else pad) != own:
                fail(f"{name}: positions are counted from id {own}, but its padding token is {pad}")
    most = int(min(most, positions) if positions > 0 else most)
    special = tokenizer.num_special_tokens_to_add(False)
    if most <= special:
        fail(f"{name}: {most} tokens leave none of a sentence beside the {special} special ones")
    return most


def settle_pooling(name, config, asked, declared):
    """The pooling asked for, else the declared one, else, where it is certain, the kind's own."""
    kind = config.model_type
    encoder = kind in registry.MODEL_FOR_MASKED_LM_MAPPING_NAMES
    decoder = kind in registry.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    if kind in ("xlnet", "bert-generation"):  # listed as decoders, which they are not
        encoder = decoder = False
    if encoder:  # many are listed as decoders, too, which their configuration can make of them
        decoder = getattr(config, "is_decoder", False)
    if asked == "auto" and not declared and not (encoder or decoder):
        fail(f"{name}: whether a {kind} is an encoder or a decoder is not certain; give --pooling")
    own, why = ("last", "it is a decoder") if decoder else ("cls", "it is an encoder")
    if declared:
        own, why = declared, "from its sentence-transformers files"
    if asked != "auto":
        own, why = asked, "as asked"
    if decoder and own == "cls":
        fail(f"the first token of {name}, a decoder, does not see the others; try --pooling last")
    print(f"{name}: {own} pooling, {why}")
    return own
