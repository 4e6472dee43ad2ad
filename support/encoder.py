"""An encoder and its pooling: loaded, checked, saved; sentences tokenised, padded, embedded.

Models are read as transformers and sentence-transformers read them; what a folder's files ask for
is honoured or refused. N is a batch's size, T its longest sentence in tokens, d the model's width.
"""

import inspect
import json
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import transformers
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from huggingface_hub.utils import logging as hub_logging
from tokenizers.normalizers import Lowercase, Sequence
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoConfig, AutoModel, AutoTokenizer
from transformers.models.auto import modeling_auto as registry
from transformers.utils import cached_file

from support import fail
from support.run import progress, reading, writing

transformers.logging.set_verbosity_error()  # the terminal is for our own lines
transformers.logging.disable_progress_bar()
hub_logging.set_verbosity_error()

ARRAY = "encode with sentence-transformers and give the array: cache_teacher.py --teacher X.npy"
PIECE = 16  # rows of a piece of a batch on a CPU, which gains by less padding


@dataclass(frozen=True)
class Encoder:
    """A transformers model, its tokenizer, and how a sentence becomes one vector."""

    model: torch.nn.Module
    tokenizer: transformers.PreTrainedTokenizerBase
    pooling: str  # "cls", "mean" or "last"
    max_length: int  # tokens; longer sentences are cut
    widths: tuple  # of each of the L layers
    prompt: str = ""  # text that the model's files put before every sentence

    @property
    def layers(self):
        """L, without the embedding layer."""
        return len(self.widths)

    @property
    def dimensions(self):
        """d, the width of the last layer and so of the sentence embedding."""
        return self.widths[-1]


class Tokens(NamedTuple):
    """n sentences as token ids, end to end."""

    ids: np.ndarray  # int32
    starts: np.ndarray  # (n + 1,): where each sentence begins, and the end
    pad_id: int


# ------------------------------------------------------------------------------- pooling, batches
def pool(hidden, attention_mask, pooling):
    """Sentence embeddings from token states (Section 3, Problem Setup): (N, T, d), (N, T) -> (N, d).

    `pooling` is "cls" (the first token), "mean" or "last" ([EOS]), else ValueError; padding may be
    on either side.
    """
    rows = torch.arange(len(hidden), device=hidden.device)
    if pooling == "cls":
        return hidden[rows, attention_mask.int().argmax(1)]
    if pooling == "last":
        return hidden[rows, hidden.shape[1] - 1 - attention_mask.int().flip(1).argmax(1)]
    if pooling == "mean":
        mask = attention_mask.to(hidden.dtype)
        weights = mask / mask.sum(1, keepdim=True)  # (N, T); first, so that no half-precision sum
        return torch.einsum("nt,ntd->nd", weights, hidden)  # overflows
    raise ValueError(f"pooling must be cls, mean or last, not {pooling!r}")


def tokenize(encoder, sentences):
    """Tokens of n sentences, cut to the encoder's maximum length. Prints how many were cut."""
    tokenizer, pieces, lengths, cut = encoder.tokenizer, [], [], 0
    for i in range(0, len(sentences), 1_000):  # in slices: the library's own output is far larger
        texts = [encoder.prompt + sentence for sentence in sentences[i : i + 1_000]]
        rows = tokenizer(texts, truncation=True, max_length=encoder.max_length)
        pieces.append(np.fromiter(chain.from_iterable(rows["input_ids"]), dtype=np.int32))
        lengths += map(len, rows["input_ids"])
        cut += sum(bool(encoding.overflowing) for encoding in rows.encodings or [])
    if cut:
        print(f"{cut} of {len(sentences)} sentences are cut after {encoder.max_length} tokens")
    if not all(lengths):
        empty = sentences[lengths.index(0)]
        fail(f"the tokenizer makes nothing of the sentence {empty[:60]!r}; leave it out")
    ids = (tokenizer.pad_token_id, encoder.model.config.pad_token_id, tokenizer.eos_token_id, 0)
    pad_id = next(i for i in ids if i is not None)
    return Tokens(np.concatenate(pieces), np.concatenate([[0], np.cumsum(lengths)]), pad_id)


def pad(tokens, rows, device):
    """One batch for a model: N positions -> {input_ids, attention_mask}, (N, T) each."""
    texts = [torch.from_numpy(tokens.ids[tokens.starts[i] : tokens.starts[i + 1]]) for i in rows]
    ids = pad_sequence(texts, batch_first=True, padding_value=tokens.pad_id).long()
    lengths = torch.tensor([len(text) for text in texts])
    mask = (torch.arange(ids.shape[1]) < lengths[:, None]).long()
    return {"input_ids": to_device(ids, device), "attention_mask": to_device(mask, device)}


def to_device(tensor, device):
    """A copy there, for which the host does not wait."""
    if device.type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def pieces_of_like_length(batch):
    """(order, pieces): a right-padded batch as smaller ones with less padding, for a CPU.

    order (N,) holds the rows of the pieces one after another. On an accelerator: one piece, all.
    """
    lengths = batch["attention_mask"].sum(1)
    if lengths.device.type != "cpu":
        return torch.arange(len(lengths), device=lengths.device), [batch]
    order = lengths.argsort(stable=True)
    pieces = [(rows, lengths[rows].max()) for rows in order.split(PIECE)]
    return order, [{name: t[rows, :T] for name, t in batch.items()} for rows, T in pieces]


def hidden_states(model, batch):
    """The token states after each of the L layers: L of (N, T, d). The embedding layer is none."""
    without_cache = {"use_cache": False} if takes_cache(model) else {}  # of keys and values
    return model(**batch, output_hidden_states=True, **without_cache).hidden_states[1:]


def takes_cache(model):
    """Whether the model would keep its keys and values for a next token, which never comes here."""
    return "use_cache" in inspect.signature(model.forward).parameters


@torch.inference_mode()
def encode(encoder, tokens, batch_size, label=None, part=None):
    """Pooled last-layer embeddings of n sentences, not normalised: float32 (n, d), on the CPU.

    Batches hold sentences of like length, the longest first, so that padding is rare and too large
    a batch fails at once. With `part`, a path, the embeddings are kept in that file while they are
    made, and a second call goes on from there.
    """
    model, d = encoder.model.eval(), encoder.dimensions
    order = np.argsort(-np.diff(tokens.starts), kind="stable")
    embeddings = torch.empty(len(order), d)
    done = read_part(part, d, batch_size) if part else embeddings[:0]
    embeddings[order[: len(done)]] = done
    if len(done):
        print(f"going on where it stopped: {len(done)} of {len(order)} sentences are embedded")
    file = open(part, "ab") if part else None
    with progress(len(order), "sent", label, initial=len(done)) as bar:
        for start in range(len(done), len(order), batch_size):
            rows = order[start : start + batch_size]
            batch = pad(tokens, rows, model.device)
            try:
                hidden = hidden_states(model, batch)[-1]  # (N, T, d)
            except torch.OutOfMemoryError:
                bar.close()
                fail(f"{model.device} is out of memory; try a smaller --batch_size or --max_length")
            vectors = pool(hidden, batch["attention_mask"], encoder.pooling).float().cpu()
            embeddings[rows] = vectors
            if file:
                with writing(part):
                    file.write(vectors.numpy().tobytes())
                    file.flush()
            bar.update(len(rows))
    if file:
        file.close()
    return embeddings


def read_part(path, d, batch_size):
    """The whole batches of usable rows that a file of float32 begins with, (m, d); cuts the rest."""
    with writing(path):
        Path(path).touch()
        rows = np.fromfile(path, dtype=np.float32)
        rows = rows[: len(rows) // d * d].reshape(-1, d)
        bad = ~np.isfinite(rows).all(1) | ~rows.any(1)  # a hole in the file reads as zeros
        usable = int(bad.argmax()) if bad.any() else len(rows)
        usable -= usable % batch_size
        with open(path, "r+b") as file:
            file.truncate(4 * d * usable)
    return torch.from_numpy(rows[:usable])


# ---------------------------------------------------------------------------- loading and checking
def read_model_json(name, file, needed=True):
    """The content of a JSON file of a model, by directory or Hub id; None if it has no such file.

    If the Hub is out of reach, None too where the file is not `needed`, else the program ends.
    """
    with reading(
        f"{file} of {name}; --pooling may do without it" if needed else f"{file} of {name}"
    ):
        if Path(name).is_dir():
            path = Path(name, file)
            return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None
        try:
            return json.loads(Path(cached_file(name, file)).read_text(encoding="utf-8"))
        except OSError as error:
            unreachable = isinstance(error.__cause__, LocalEntryNotFoundError)
            absent = isinstance(error.__cause__, (EntryNotFoundError, type(None)))
            if absent and not (unreachable and needed):
                return None
            raise


def read_declarations(name, asked):
    """What a model's sentence-transformers files declare: (folder, pooling or None, config, prompt).

    Ends the program if they ask for what is not implemented here: the embeddings would be wrong.
    """
    needed = asked == "auto"
    modules = read_model_json(name, "modules.json", needed) or []
    with reading(f"modules.json of {name}"):
        paths = {module["type"].rsplit(".", 1)[-1]: module["path"] for module in modules}
        folder = paths.get("Transformer", "")
    if unknown := sorted(set(paths) - {"Transformer", "Pooling", "Normalize"}):
        fail(f"{name} has a {unknown[0]} module; {ARRAY}")
    pooling = None
    if "Pooling" in paths and asked == "auto":
        pooling = read_pooling(name, f"{paths['Pooling']}/config.json")
    kinds = ("bert", "roberta", "distilbert", "camembert", "albert", "xlm-roberta", "xlnet")
    files = [str(Path(folder, f"sentence_{kind}_config.json")) for kind in kinds]
    found = (read_model_json(name, file, needed and bool(paths)) for file in files)
    config = next((config for config in found if config is not None), {})
    about = read_model_json(name, "config_sentence_transformers.json", needed and bool(paths)) or {}
    with reading(f"the sentence-transformers files of {name}"):
        prompt = about.get("prompts", {}).get(about.get("default_prompt_name"), "")
        limit, lower = config.get("max_seq_length"), config.get("do_lower_case", False)
        if not (limit is None or (type(limit) is int and limit > 0)) or type(lower) is not bool:
            fail(f"{name}: max_seq_length {limit!r} or do_lower_case {lower!r} has no meaning")
        if not isinstance(prompt, str):
            fail(f"{name}: its default prompt is not text")
    return folder, pooling, limit, lower, prompt


def read_pooling(name, file):
    """The pooling that a Pooling module's config asks for, in its older or its newer form."""
    config = read_model_json(name, file)
    if config is None:
        fail(f"{name} names a Pooling module, but has no {file}; choose one with --pooling")
    with reading(f"{file} of {name}"):
        modes = [key for key, on in config.items() if key.startswith("pooling_mode_") and on]
        mode = config.get("pooling_mode", "+".join(modes) or "mean")
        if isinstance(mode, list):
            mode = "+".join(mode)
        mode = mode.removeprefix("pooling_mode_").removesuffix("_tokens").removesuffix("_token")
    known = {"cls": "cls", "mean": "mean", "lasttoken": "last"}
    if mode not in known:
        fail(f"{name} asks for {mode} pooling, which is not implemented; choose one with --pooling")
    return known[mode]


def load_encoder(name, pooling="auto", max_length=256, dtype=torch.float32, device="cpu"):
    """The Encoder of a Hub id or a directory; prints its pooling, and why that one.

    The weights are loaded as `dtype`, whatever type the files hold. Ends the program with one line
    if the model can't be loaded, or is not understood well enough for its embeddings to be right.
    """
    if (Path(name) / "checkpoint.pt").exists():
        fail(f"{name} holds an interrupted run; finish it first, with --resume")
    folder, declared, limit, lower, prompt = read_declarations(name, pooling)
    where = {"subfolder": folder, "trust_remote_code": False}
    with reading(f"{name}, as a directory with a model or as a model on the Hub within reach"):
        if AutoConfig.from_pretrained(name, **where).is_encoder_decoder:
            fail(f"{name} is an encoder-decoder, which is not implemented; {ARRAY}")
        how = {"dtype": dtype, "output_loading_info": True}
        model, report = AutoModel.from_pretrained(name, **where, **how)
        tokenizer = AutoTokenizer.from_pretrained(name, **where)
    if missing := sorted(key for key in report["missing_keys"] if "pooler" not in key):
        what = f"{len(missing)} weights of a {type(model).__name__}, {missing[0]} among them"
        fail(f"{name}: its files lack {what}")  # only the pooler is not used here
    check_tokenizer(name, model, tokenizer)
    if lower:
        if not tokenizer.is_fast:
            fail(f"{name} asks for lower case, which its tokenizer can't be told; {ARRAY}")
        normalizer = tokenizer.backend_tokenizer.normalizer
        steps = [Lowercase(), normalizer] if normalizer else [Lowercase()]
        tokenizer.backend_tokenizer.normalizer = Sequence(steps)
    max_length = find_limit(name, model, tokenizer, limit, max_length)
    causal, widths = examine(name, model.to(device).eval(), tokenizer)
    pooling = settle_pooling(name, model, pooling, declared, causal)
    if prompt:
        print(f"{name}: its default prompt, {prompt!r}, goes before every sentence")
    return Encoder(model, tokenizer, pooling, max_length, widths, prompt)


def check_tokenizer(name, model, tokenizer):
    """End the program if the tokenizer is not the model's."""
    vocabulary = tokenizer.get_vocab()
    words = set(vocabulary) - set(tokenizer.all_special_tokens) - set(tokenizer.get_added_vocab())
    if len(words) < 4:  # without its files, the library invents a tokenizer that knows no word
        fail(f"{name} has no tokenizer files, such as tokenizer.json; put them beside the model")
    with reading(name):
        vectors = model.get_input_embeddings().num_embeddings
    if len(tokenizer) > vectors:
        fail(f"{name}: its tokenizer has {len(tokenizer)} tokens, its embeddings only {vectors}")


def find_limit(name, model, tokenizer, declared, asked):
    """How many tokens of a sentence the model takes, at most as many as were asked for.

    Where the positions may not suffice (some models reserve the first ones), it is tried out.
    """
    positions = getattr(model.config, "max_position_embeddings", None)
    known = [asked, declared or tokenizer.model_max_length, positions]
    limit = min(n for n in known if type(n) is int and n > 0)
    if positions and limit > positions - 8:
        word = next(i for i in range(len(tokenizer)) if i not in tokenizer.all_special_ids)
        for limit in range(limit, max(limit - 8, 2), -1):
            ids = torch.full((1, limit), word)
            try:
                with torch.inference_mode():
                    model(input_ids=ids, attention_mask=torch.ones_like(ids))
                break
            except (IndexError, RuntimeError):
                continue
        else:
            fail(f"{name} does not take the {limit} tokens that its files promise")
    if limit < 3:
        fail(f"--max_length {limit} leaves no token of a sentence beside the first and the last")
    return limit


@torch.inference_mode()
def examine(name, model, tokenizer):
    """(causal, widths of the layers), found by running it on a sentence and one with another end.

    causal: the first token does not see the last one, as in a decoder.
    """
    with reading(f"{name}: it does not run as a text encoder"):
        row = tokenizer("one two three", return_special_tokens_mask=True)
        own = [i for i, special in enumerate(row["special_tokens_mask"]) if not special]
        ids, special = list(row["input_ids"]), set(tokenizer.all_special_ids)
        ids[own[-1]] = next(i for i in range(len(tokenizer)) if i not in {*special, ids[own[-1]]})
        outputs = []
        for sentence in (row["input_ids"], ids):
            batch = {"input_ids": torch.tensor([sentence], device=model.device)}
            batch["attention_mask"] = torch.ones_like(batch["input_ids"])
            outputs.append(hidden_states(model, batch))
        one, other = outputs
        return torch.equal(one[-1][0, 0], other[-1][0, 0]), tuple(h.shape[-1] for h in one)


def settle_pooling(name, model, asked, declared, causal):
    """The pooling that was asked for, else the declared one, else what the model's nature calls for.

    Prints it with the reason. Ends the program where none is certain, or the embedding would not
    change with the last word of the sentence.
    """
    kind = model.config.model_type
    known = set(registry.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
    known -= set(registry.MODEL_FOR_MASKED_LM_MAPPING_NAMES)
    if asked != "auto":
        pooling, why = asked, "as asked"
    elif declared:
        pooling, why = declared, "from its sentence-transformers files"
    elif causal:
        pooling, why = "last", "it is a decoder"
    elif kind in known:
        fail(f"{name}: {kind} is listed as a decoder but is none; choose one with --pooling")
    else:
        pooling, why = "cls", "it is an encoder"
    if causal and pooling == "cls":
        fail(f"{name} is a decoder, whose first token knows only itself; choose --pooling last")
    print(f"{name}: {pooling} pooling, {why}")
    return pooling


# ----------------------------------------------------------------------------------------- saving
def save_encoder(folder, encoder):
    """Write an encoder as both transformers and sentence-transformers load it."""
    encoder.tokenizer.model_max_length = encoder.max_length
    encoder.model.save_pretrained(folder)
    encoder.tokenizer.save_pretrained(folder)
    kind = "sentence_transformers.models."  # this form is known to all versions of the library
    modules = [
        {"idx": 0, "name": "0", "path": "", "type": kind + "Transformer"},
        {"idx": 1, "name": "1", "path": "1_Pooling", "type": kind + "Pooling"},
    ]
    names = {"cls": "cls_token", "mean": "mean_tokens", "last": "lasttoken"}
    modes = {f"pooling_mode_{name}": encoder.pooling == key for key, name in names.items()}
    prompts = {"default": encoder.prompt} if encoder.prompt else {}
    files = {
        "modules.json": modules,
        "1_Pooling/config.json": {"word_embedding_dimension": encoder.dimensions} | modes,
        "sentence_bert_config.json": {"max_seq_length": encoder.max_length, "do_lower_case": False},
        "config_sentence_transformers.json": {
            "prompts": prompts,
            "default_prompt_name": "default" if prompts else None,
        },
    }
    (Path(folder) / "1_Pooling").mkdir(exist_ok=True)
    for file, content in files.items():
        (Path(folder) / file).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
