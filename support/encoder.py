"""An encoder and its pooling: sentences tokenised, padded, embedded; the model saved.

N is a batch's size, T its longest sentence in tokens, d the model's width.
"""

import inspect
import json
import tempfile
from array import array
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import tokenizers
import torch
from transformers import AutoTokenizer

from support import attempt, fail
from support.files import digest, write_json
from support.run import progress

PIECE = 16  # rows of a piece of a batch on a CPU, which gains by less padding
PROBES = ["The Capital of France", "naïve Straße, two  blanks?", "3.14 and 北京!", "a"]
POOLING_FLAGS = {"pooling_mode_cls_token": "cls", "pooling_mode_mean_tokens": "mean"}
POOLING_FLAGS["pooling_mode_lasttoken"] = "last"  # all versions of sentence-transformers read these
MODULES = [
    {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"},
    {"idx": 1, "name": "1", "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"},
]


@dataclass(frozen=True)
class Encoder:
    """A transformers model, its tokenizer, and how a sentence becomes one vector."""

    model: torch.nn.Module
    tokenizer: tokenizers.Tokenizer  # as tokenizer.json has it, with no padding
    files: dict  # name -> bytes: the tokenizer files that the model came with
    pooling: str  # "cls", "mean" or "last"
    max_length: int  # tokens; longer sentences are cut
    lower: bool  # sentence-transformers' own do_lower_case
    widths: tuple  # of each of the L layers

    @property
    def layers(self):
        """L, without the embedding layer."""
        return len(self.widths)

    @property
    def dimensions(self):
        """d, the width of the last layer and so of the sentence embedding."""
        return self.widths[-1]

    def identity(self):
        """A hash of all that makes it but the weights."""
        facts = [self.model.config.to_json_string(), self.pooling, self.max_length, self.lower]
        return digest(facts, *(self.files[name] for name in sorted(self.files)))


class Tokens(NamedTuple):
    """n sentences as token ids, end to end."""

    ids: np.ndarray  # int32
    types: np.ndarray | None  # token_type_ids, where a model takes them and they are not all 0
    starts: np.ndarray  # (n + 1,): where each sentence begins, and the end


def pool(hidden, attention_mask, pooling):
    """Sentence embeddings from token states (Section 3): (N, T, d), (N, T) -> (N, d).

    pooling: cls (the first token), mean or last ([EOS]), else ValueError. Padding: on either side.
    """
    rows = torch.arange(len(hidden), device=hidden.device)
    if pooling == "cls":
        return hidden[rows, attention_mask.int().argmax(1)]
    if pooling == "last":
        return hidden[rows, hidden.shape[1] - 1 - attention_mask.int().flip(1).argmax(1)]
    if pooling == "mean":
        weights = attention_mask / attention_mask.sum(1, keepdim=True)  # first: no sum overflows
        return torch.einsum("nt,ntd->nd", weights.to(hidden.dtype), hidden)
    raise ValueError(f"pooling must be cls, mean or last, not {pooling!r}")


def takes(model, name):
    """Whether a model's forward pass has an argument of that name."""
    return name in inspect.signature(model.forward).parameters


def tokenize(encoder, sentences):
    """Tokens of n sentences, cut to the encoder's maximum length. Prints how many were cut."""
    ids, types, starts, cut = array("i"), array("b"), [0], 0
    encoder.tokenizer.enable_truncation(encoder.max_length)
    for i in range(0, len(sentences), 1_000):  # in slices: the library's own output is far larger
        for row in encoder.tokenizer.encode_batch(sentences[i : i + 1_000]):
            ids.extend(row.ids)
            types.extend(row.type_ids)
            starts.append(len(ids))
            cut += bool(row.overflowing)
    if cut:
        print(f"{cut} of {len(sentences)} sentences are cut after {encoder.max_length} tokens")
    ids, types, starts = np.array(ids, np.int32), np.array(types, np.int8), np.array(starts)
    for i in (np.diff(starts) == 0).nonzero()[0]:
        fail(f"the tokenizer makes nothing of the sentence {sentences[i][:60]!r}; leave it out")
    if ids.max() >= (vectors := encoder.model.get_input_embeddings().num_embeddings):
        fail(f"the tokenizer gives the id {ids.max()}; the model has {vectors} word embeddings")
    given = types.any() and takes(encoder.model, "token_type_ids")
    return Tokens(ids, types if given else None, starts)


def pad(tokens, rows, model):
    """One batch for a model: N positions -> {input_ids, attention_mask, ...}, (N, T) each."""
    starts, ends = (tokens.starts[np.asarray(rows) + i] for i in (0, 1))
    places = starts[:, None] + np.arange((ends - starts).max())  # of the tokens of each row
    mask = places < ends[:, None]  # False on the right, where ids and types are 0
    batch = {"attention_mask": mask, "input_ids": tokens.ids[places * mask] * mask}
    if tokens.types is not None:
        batch["token_type_ids"] = tokens.types[places * mask] * mask
    return {name: torch.from_numpy(t).long().to(model.device) for name, t in batch.items()}


def forward(model, batch, **how):
    """What a model gives for a batch, without the keys and values that a next token would need."""
    return model(**batch, **how, **({"use_cache": False} if takes(model, "use_cache") else {}))


def pooled_layers(student, tokens, precision="float32", from_layer=1):
    """Pooled states after each layer of a right-padded batch: L of (N, d). Layer 0: embeddings.

    On a CPU it goes through in pieces of like length. In training, products are of that precision.
    """
    model, lengths, pooled = student.model, tokens["attention_mask"].sum(1), []
    on_cpu, half = model.device.type == "cpu", precision == "bfloat16" and model.training
    order = lengths.argsort(stable=True)
    for rows in order.split(PIECE if on_cpu else len(order)):
        longest = lengths[rows[-1]] if on_cpu else None  # a GPU need not wait for that number
        piece = {name: t[rows, :longest] for name, t in tokens.items()}
        with torch.autocast(model.device.type, torch.bfloat16, enabled=half):
            states = forward(model, piece, output_hidden_states=True).hidden_states[from_layer:]
        mask = piece["attention_mask"]
        pooled.append([pool(h.to(model.dtype), mask, student.pooling) for h in states])
    return [torch.cat(E)[order.argsort()] for E in zip(*pooled, strict=True)]


@torch.inference_mode()
def encode(encoder, tokens, batch_size, label=None, part=None):
    """Pooled last-layer embeddings of n sentences, not normalised: float32 (n, d), on the CPU.

    Batches hold sentences of like length, the longest first: too large a one fails at once. They
    are kept in the file `part`, if one is named, from which a second call goes on.
    """
    model, n, d = encoder.model.eval(), len(tokens.starts) - 1, encoder.dimensions
    order = np.argsort(-np.diff(tokens.starts), kind="stable")
    rows = np.zeros((n, d + 1), np.float32)  # in that order
    if part:
        with attempt(f"write {part}"):
            if not Path(part).exists() or Path(part).stat().st_size != rows.nbytes:
                rows.tofile(part)  # which takes the room that it needs
            rows = np.memmap(part, np.float32, "r+", shape=rows.shape)
    done = int(np.append(rows[:, d], 0).argmin()) // batch_size * batch_size  # whole batches
    if done:
        print(f"going on where it stopped: {done} sentences are embedded")
    with progress(n, "sent", label, initial=done) as bar:
        for start in range(done, n, batch_size):
            some = slice(start, start + batch_size)
            batch = pad(tokens, order[some], model)
            hidden = forward(model, batch).last_hidden_state  # (N, T, d)
            vectors = pool(hidden, batch["attention_mask"], encoder.pooling)
            rows[some, :d] = vectors.float().cpu().numpy()
            rows[some, d] = 1  # after the vectors: these rows are there
            bar.update(len(vectors))
    return torch.from_numpy(rows[order.argsort(), :d])


def save_encoder(folder, encoder):
    """Write an encoder, and the tokenizer files it came with, for both libraries to load.

    Ends the program if transformers reads other token ids than the encoder was trained with.
    """
    folder, limit = Path(folder), encoder.max_length
    encoder.model.save_pretrained(folder)
    for name, content in encoder.files.items():
        (folder / name).write_bytes(content)
    library = AutoTokenizer.from_pretrained(folder)
    if library.pad_token is None:  # sentence-transformers pads
        about = json.loads(encoder.files.get("tokenizer_config.json", b"{}"))
        end = library.eos_token or library.unk_token or fail("the student has no token to pad with")
        write_json(folder / "tokenizer_config.json", about | {"pad_token": end})
        library = AutoTokenizer.from_pretrained(folder)
    (folder / "1_Pooling").mkdir(exist_ok=True)
    pooling = {flag: encoder.pooling == mode for flag, mode in POOLING_FLAGS.items()}
    pooling["word_embedding_dimension"] = encoder.dimensions
    about = {"max_seq_length": limit, "do_lower_case": encoder.lower}
    write_json(folder / "modules.json", MODULES)
    write_json(folder / "1_Pooling" / "config.json", pooling)
    write_json(folder / "sentence_bert_config.json", about)
    write_json(folder / "config_sentence_transformers.json", {"prompts": {}})
    probes = [text.lower() if encoder.lower else text for text in PROBES]
    read = library(probes, truncation=True, max_length=limit)
    encoder.tokenizer.enable_truncation(limit)
    for i, row in enumerate(encoder.tokenizer.encode_batch(probes)):
        types = read.get("token_type_ids", {i: [0] * len(row.ids)})[i]
        if (read["input_ids"][i], types) != (row.ids, row.type_ids):
            what = "transformers reads other input_ids or token_type_ids than the student's; try"
            right = '"tokenizer_class": "PreTrainedTokenizerFast", or to name "model_input_names",'
            fail(f"{what} {right} in its tokenizer_config.json")


def rehearse(student, corpus, two_views):
    """Try a batch in training mode, and the saving, before hours are spent on what can't end well.

    Says so where dropout does nothing to the two views that SimCSE compares.
    """
    config, tokens = student.model.config.to_dict(), corpus.batch(torch.arange(len(corpus))[:2])[0]
    if drops := [key for key, value in config.items() if "layerdrop" in key and value]:
        fail(f"the student leaves out layers in training; set {drops[0]} to 0 in its config.json")
    devices = [] if student.model.device.type == "cpu" else [student.model.device]
    with torch.random.fork_rng(devices), torch.no_grad(), tempfile.TemporaryDirectory() as folder:
        student.model.train()
        layers = pooled_layers(student, {name: t.repeat(2, 1) for name, t in tokens.items()})
        save_encoder(folder, student)
    if two_views and torch.equal(*layers[-1].chunk(2)):
        print("the student has no dropout: the two views that SimCSE compares are the same")
