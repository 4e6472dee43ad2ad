"""Models loaded as transformers and sentence-transformers load them, or refused.

What a model's files ask for is honoured; what is not understood ends the program in one line.
"""

from support import fail
from support.encoder import Encoder, forward, hidden_states
from support.files import attempt, reason

import json
import os
from pathlib import Path

import torch
import torch.nn.functional as F
import transformers
from huggingface_hub import _CACHED_NO_EXIST, try_to_load_from_cache
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from huggingface_hub.utils import logging as hub_logging
from tokenizers.normalizers import Lowercase, Sequence
from transformers import AutoConfig, AutoModel, AutoTokenizer
from transformers.models.auto import modeling_auto as registry
from transformers.utils import cached_file

transformers.logging.set_verbosity_error()  # the terminal is for our own lines
transformers.logging.disable_progress_bar()
hub_logging.set_verbosity_error()

NO_MATTER = ("modality_config", "module_output_name", "unpad_inputs")  # for what is embedded
ARRAY = "encode with sentence-transformers and give the array: cache_teacher.py --teacher X.npy"


def read_model_json(name, file, needed=True):
    """The content of a JSON file of a model, by directory or Hub id; None if it has no such file.

    If the Hub is out of reach, None too where the file is not `needed`; else the program ends.
    """
    with attempt(f"load {name} ({file})"):
        path = Path(name, file)
        if not Path(name).is_dir():
            try:
                path = Path(cached_file(name, file))
            except OSError as error:
                # out of reach, but an earlier visit may have left word that there is no such file
                known = try_to_load_from_cache(name, file) is _CACHED_NO_EXIST
                if isinstance(error.__cause__, LocalEntryNotFoundError) and needed and not known:
                    fail(
                        f"cannot reach {file} of {name}; is the name right? --pooling needs no file"
                    )
                if not isinstance(error.__cause__, (EntryNotFoundError, type(None))):
                    raise
        content = json.loads(path.read_text(encoding="utf-8")) if path.exists() else None
        if path.exists() and content is None:
            raise ValueError("it holds nothing")
        return content


def read_declarations(name, asked):
    """(folder of the weights, pooling, max_seq_length, do_lower_case) that a model's files declare.

    None where they declare nothing. Ends the program if they ask for what is not implemented here:
    the embeddings would be wrong.
    """
    needed = asked == "auto"
    modules = read_model_json(name, "modules.json", needed)
    if modules is None:
        return "", None, None, False
    with attempt(f"understand the sentence-transformers files of {name}"):
        kinds = [module["type"].rsplit(".", 1)[-1] for module in modules]
        if kinds[:2] != ["Transformer", "Pooling"] or kinds[2:] not in ([], ["Normalize"]):
            fail(f"{name} has other modules than a Transformer and a Pooling: {kinds}; {ARRAY}")
        folder, of_pooling = (module["path"] for module in modules[:2])
        pooling = read_pooling(name, os.path.join(of_pooling, "config.json")) if needed else None
        files = ("bert", "roberta", "distilbert", "camembert", "albert", "xlm-roberta", "xlnet")
        files = [os.path.join(folder, f"sentence_{file}_config.json") for file in files]
        configs = (read_model_json(name, file, needed) for file in files)
        config = dict(next((config for config in configs if config is not None), {}))
        limit, lower = config.pop("max_seq_length", None), config.pop("do_lower_case", False)
        if type(lower) is not bool or not (limit is None or (type(limit) is int and limit > 0)):
            raise ValueError(f"max_seq_length {limit!r}, do_lower_case {lower!r}")
        config = {key: value for key, value in config.items() if value and key not in NO_MATTER}
        if config.pop("transformer_task", "feature-extraction") != "feature-extraction" or config:
            raise ValueError(f"{config or 'transformer_task'} is not implemented")
        about = read_model_json(name, "config_sentence_transformers.json", needed) or {}
        prompt = about.get("prompts", {}).get(about.get("default_prompt_name"))
    if prompt:
        fail(f"{name} puts a prompt before every sentence, {prompt!r}; {ARRAY}")
    return folder, pooling, limit, lower


def read_pooling(name, file):
    """The pooling that a Pooling module's config asks for, in its older or its newer form."""
    config = read_model_json(name, file)
    with attempt(f"understand {file} of {name}, which its modules.json names"):
        old = "pooling_mode_"
        modes = [key.removeprefix(old) for key, on in config.items() if key.startswith(old) and on]
        modes = config.get("pooling_mode", modes)
        mode = modes if isinstance(modes, str) else "+".join(modes)
    known = {"cls": "cls", "mean": "mean", "lasttoken": "last", "cls_token": "cls"}
    known |= {"mean_tokens": "mean", "": "mean"}  # the library's own default
    if mode not in known:
        fail(f"{name} asks for {mode} pooling, which is not implemented; choose one with --pooling")
    return known[mode]


def load_encoder(name, pooling="auto", max_length=256, dtype=torch.float32, device="cpu"):
    """The Encoder of a Hub id or a directory; prints its pooling, and why that one.

    The weights are loaded as `dtype`, whatever type the files hold. Ends the program with one line
    if the model can't be loaded, or is not understood well enough for its embeddings to be right.
    """
    with attempt(f"load {name}"):
        if Path(name, "checkpoint.pt").exists():
            fail(f"{name} holds an interrupted run; finish it first, with --resume")
    folder, declared, limit, lower = read_declarations(name, pooling)
    where = {"subfolder": folder, "trust_remote_code": False}
    with attempt(f"load {name}, as a directory with a model or a model on the Hub within reach"):
        if AutoConfig.from_pretrained(name, **where).is_encoder_decoder:
            fail(f"{name} is an encoder-decoder, which is not implemented; {ARRAY}")
        how = {"dtype": dtype, "output_loading_info": True}
        model, report = AutoModel.from_pretrained(name, **where, **how)
        tokenizer = AutoTokenizer.from_pretrained(name, **where)
        vectors = model.get_input_embeddings().num_embeddings
        words = tokenizer.get_vocab().keys() - tokenizer.get_added_vocab().keys()
    if missing := sorted(key for key in report["missing_keys"] if "pooler" not in key):
        what = f"{len(missing)} weights of a {type(model).__name__}, {missing[0]} among them"
        fail(f"{name}: its files lack {what}")  # only the pooler is not used here
    if len(words - set(tokenizer.all_special_tokens)) < 4:  # the library invents such a tokenizer
        fail(f"{name} has no tokenizer files, such as tokenizer.json; put them beside the model")
    if len(tokenizer) > vectors:
        fail(f"{name}: its tokenizer has {len(tokenizer)} tokens, its embeddings only {vectors}")
    if lower:  # as sentence-transformers does it
        with attempt(f"make the tokenizer of {name} write in lower case, as its files ask"):
            own = tokenizer.backend_tokenizer.normalizer
            tokenizer.backend_tokenizer.normalizer = Sequence(
                [Lowercase(), *([own] if own else [])]
            )
    max_length = find_limit(name, model, tokenizer, limit, max_length)
    with attempt(f"put {name} on {device}"):
        model.to(device).eval()
    causal, widths = examine(name, model, tokenizer)
    pooling = settle_pooling(name, model.config.model_type, pooling, declared, causal)
    return Encoder(model, tokenizer, pooling, max_length, widths)


@torch.inference_mode()
def find_limit(name, model, tokenizer, declared, asked):
    """How many tokens of a sentence the model takes, at most as many as were asked for.

    Where the positions may not suffice (some models reserve the first ones), it is tried out.
    """
    names = ("max_position_embeddings", "max_seq_len")
    positions = next((n for name in names if (n := getattr(model.config, name, None))), 0)
    special = tokenizer.num_special_tokens_to_add()
    known = (asked, declared or tokenizer.model_max_length, positions)
    most = int(min(n for n in known if isinstance(n, (int, float)) and n > 0))
    if most <= special:
        fail(f"{name}: {most} tokens leave none of a sentence beside the {special} special ones")
    if positions <= 0 or most <= positions - 8:
        return most
    word = max(set(range(len(tokenizer))) - set(tokenizer.all_special_ids))
    for limit in range(most, max(most - 8, special), -1):
        ids = torch.full((1, limit), word)
        try:
            model(input_ids=ids, attention_mask=torch.ones_like(ids))
            return limit
        except (IndexError, RuntimeError) as error:
            why = reason(error)
    fail(f"{name} does not take the {most} tokens that its files promise: {why}")


@torch.inference_mode()
def examine(name, model, tokenizer):
    """(causal, widths of the layers), found by running it on a sentence and one with another end.

    causal: the first token does not see the last one, as in a decoder.
    """
    with attempt(f"run {name} as a text encoder"):
        row = tokenizer("one two three", return_special_tokens_mask=True)
        sentence, other = row["input_ids"], list(row["input_ids"])
        end = max(i for i, special in enumerate(row["special_tokens_mask"]) if not special)
        taken = {*tokenizer.all_special_ids, sentence[end]}
        other[end] = next(i for i in range(len(tokenizer)) if i not in taken)
        outputs = []
        for ids in (sentence, other):
            ids = torch.tensor([ids], device=model.device)
            batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
            outputs.append(forward(model, batch).last_hidden_state)
        layers = hidden_states(model, batch)
        if not outputs[-1].isfinite().all():
            raise ValueError("its output is not a number")
        if not torch.equal(layers[-1], outputs[-1]):
            raise ValueError("its output is not its last layer")
        more = {name: F.pad(t, (0, 4)) for name, t in batch.items()}  # ids 0 with mask 0
        padded = forward(model, more).last_hidden_state[:, : ids.shape[1]]
        if (padded - outputs[-1]).norm() > 0.05 * outputs[-1].norm():
            raise ValueError("its embeddings depend on the padding of the batch")
        causal = torch.equal(outputs[0][0, 0], outputs[1][0, 0])
        return causal, tuple(h.shape[-1] for h in layers)


def settle_pooling(name, kind, asked, declared, causal):
    """The pooling that was asked for, else the declared one, else what the model's nature wants.

    Prints it with the reason. Ends the program where none is certain, or where the last word of a
    sentence would not change its embedding.
    """
    listed = kind in registry.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    masked = kind in registry.MODEL_FOR_MASKED_LM_MAPPING_NAMES
    if asked != "auto":
        pooling, why = asked, "as asked"
    elif declared:
        pooling, why = declared, "from its sentence-transformers files"
    elif causal != listed and not (listed and masked):  # BERT is listed, too: it can be a decoder
        fail(f"{name}: whether a {kind} is an encoder or a decoder is not certain; give --pooling")
    else:
        pooling, why = ("last", "it is a decoder") if causal else ("cls", "it is an encoder")
    if causal and pooling == "cls":
        fail(
            f"the first token of {name} does not see the last, as in a decoder; try --pooling last"
        )
    print(f"{name}: {pooling} pooling, {why}")
    return pooling
