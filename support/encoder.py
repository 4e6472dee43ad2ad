"""An encoder and its pooling: sentences tokenised, padded, embedded; the model saved.

N is a batch's size, T its longest sentence in tokens, d the model's width.
"""

import inspect
import json
import tempfile
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import numpy as np
import tokenizers
import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoTokenizer

from support import attempt, fail
from support.files import digest, write_json
from support.run import progress

PIECE = 16  # rows of a piece of a batch on a CPU, which gains by less padding
PROBES = ["The Capital of France", "naïve Straße, two  blanks?", "3.14 and 北京", "a"]
POOLING_FLAGS = {"cls": "cls_token", "mean": "mean_tokens", "last": "lasttoken"}


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


# ------------------------------------------------------------------------------- pooling, batches
def pool(hidden, attention_mask, pooling):
    """Sentence embeddings from token states (Section 3): (N, T, d), (N, T) -> (N, d).

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


def takes(model, name):
    """Whether a model's forward pass has an argument of that name."""
    return name in inspect.signature(model.forward).parameters


def tokenize(encoder, sentences):
    """Tokens of n sentences, cut to the encoder's maximum length. Prints how many were cut."""
    ids, types, lengths, cut = [], [], [], 0
    encoder.tokenizer.enable_truncation(encoder.max_length)
    for i in range(0, len(sentences), 1_000):  # in slices: the library's own output is far larger
        rows = encoder.tokenizer.encode_batch(sentences[i : i + 1_000])
        ids.append(np.fromiter(chain.from_iterable(row.ids for row in rows), np.int32))
        types.append(np.fromiter(chain.from_iterable(row.type_ids for row in rows), np.int8))
        lengths += [len(row.ids) for row in rows]
        cut += sum(bool(row.overflowing) for row in rows)
    if cut:
        print(f"{cut} of {len(sentences)} sentences are cut after {encoder.max_length} tokens")
    if not all(lengths):
        empty = sentences[lengths.index(0)]
        fail(f"the tokenizer makes nothing of the sentence {empty[:60]!r}; leave it out")
    ids, types = np.concatenate(ids), np.concatenate(types)
    vectors = encoder.model.get_input_embeddings().num_embeddings
    if ids.max() >= vectors:
        fail(f"the tokenizer gives the id {ids.max()}; the model has {vectors} word embeddings")
    types = types if types.any() and takes(encoder.model, "token_type_ids") else None
    return Tokens(ids, types, np.concatenate([[0], np.cumsum(lengths)]))


def pad(tokens, rows, model):
    """One batch for a model: N positions -> {input_ids, attention_mask, ...}, (N, T) each."""
    parts = [slice(tokens.starts[i], tokens.starts[i + 1]) for i in rows]
    own = getattr(model.config, "pad_token_id", None) or 0  # positions may be counted from it
    fill = own if 0 < own < model.get_input_embeddings().num_embeddings else 0

    def column(values, fill=0):
        texts = [torch.from_numpy(values[part]).long() for part in parts]
        return pad_sequence(texts, batch_first=True, padding_value=fill).to(model.device)

    mask = column(np.ones_like(tokens.ids))
    batch = {"input_ids": column(tokens.ids, fill), "attention_mask": mask}
    return batch if tokens.types is None else batch | {"token_type_ids": column(tokens.types)}


class Corpus:
    """The tokenised sentences of a cache, their cached targets and their domains."""

    def __init__(self, cache, student):
        self.tokens, self.student = tokenize(student, cache["sentences"]), student
        self.embeddings = cache["embeddings"]  # (n, d_T), on disk; d_T is 0 without a teacher
        self.d_T = self.embeddings.shape[1]
        self.domains = torch.from_numpy(np.unique(cache["sources"], return_inverse=True)[1])

    def __len__(self):
        return len(self.domains)

    def batch(self, rows):
        """Positions (N,) -> tokens, (N, T) each; E^T, (N, d_T); domains, (N,)."""
        model = self.student.model
        tokens = pad(self.tokens, rows.tolist(), model)
        teacher = self.embeddings[rows].float().to(model.device)
        return tokens, teacher, self.domains[rows].to(model.device)

    def identity(self):
        """A hash of what is learnt from, tokens, targets and domains, and of who learns."""
        own = self.student.identity(), self.tokens.ids, self.tokens.starts
        return digest(*own, self.domains, self.embeddings)


# -------------------------------------------------------------------------------- forward passes
def forward(model, batch, **how):
    """What a model gives for a batch, without the keys and values that a next token would need."""
    return model(**batch, **how, **({"use_cache": False} if takes(model, "use_cache") else {}))


def pooled_layers(student, tokens, precision="float32", from_layer=1):
    """Pooled states after each layer of a right-padded batch: L of (N, d). Layer 0: embeddings.

    On a CPU the batch goes through in pieces of sentences of like length, with less padding. In
    training, matrix products are of that precision.
    """
    model, lengths, pooled = student.model, tokens["attention_mask"].sum(1), []
    on_cpu, half = lengths.device.type == "cpu", precision == "bfloat16" and student.model.training
    order = lengths.argsort(stable=True) if on_cpu else torch.arange(len(lengths)).to(lengths)
    for rows in order.split(PIECE if on_cpu else len(order)):
        longest = lengths[rows].max() if on_cpu else tokens["input_ids"].shape[1]
        piece = {name: t[rows, :longest] for name, t in tokens.items()}
        with torch.autocast(model.device.type, torch.bfloat16, enabled=half):
            states = forward(model, piece, output_hidden_states=True).hidden_states[from_layer:]
        mask = piece["attention_mask"]
        pooled.append([pool(h.to(model.dtype), mask, student.pooling) for h in states])
    restore = order.argsort()
    return [torch.cat(E)[restore] for E in zip(*pooled, strict=True)]


@torch.inference_mode()
def encode(encoder, tokens, batch_size, label=None, part=None):
    """Pooled last-layer embeddings of n sentences, not normalised: float32 (n, d), on the CPU.

    Batches hold sentences of like length, the longest first, so that padding is rare and too large
    a batch fails at once. With `part`, a path, the embeddings are kept in that file while they are
    made, and a second call goes on from there.
    """
    model, n, d = encoder.model.eval(), len(tokens.starts) - 1, encoder.dimensions
    order = np.argsort(-np.diff(tokens.starts), kind="stable")
    rows = open_part(part, n, d) if part else np.zeros((n, d + 1), np.float32)
    there = rows[order, d] > 0  # the last column tells which rows are there
    done = (n if there.all() else int(there.argmin())) // batch_size * batch_size
    if done:
        print(f"going on where it stopped: {done} sentences are embedded")
    with progress(n, "sent", label, initial=done) as bar:
        for start in range(done, n, batch_size):
            some = order[start : start + batch_size]
            batch = pad(tokens, some, model)
            hidden = forward(model, batch).last_hidden_state  # (N, T, d)
            vectors = pool(hidden, batch["attention_mask"], encoder.pooling)
            rows[some, :d] = vectors.float().cpu().numpy()
            rows[some, d] = 1  # after the vectors
            bar.update(len(some))
    return torch.from_numpy(rows[:, :d].copy())


def open_part(path, n, d):
    """A file as an array, float32 (n, d + 1), with zeros where nothing was written yet."""
    with attempt(f"write {path}"):
        if not Path(path).exists() or Path(path).stat().st_size != 4 * n * (d + 1):
            np.zeros((n, d + 1), np.float32).tofile(path)  # which takes the room that it needs
        return np.memmap(path, np.float32, "r+", shape=(n, d + 1))


# ----------------------------------------------------------------------------------------- saving
def save_encoder(folder, encoder):
    """Write an encoder as both transformers and sentence-transformers load it.

    Its tokenizer files are those that it came with. Ends the program if transformers reads other
    token ids from them than the encoder was trained with.
    """
    folder = Path(folder)
    encoder.model.save_pretrained(folder)
    for name, content in encoder.files.items():
        (folder / name).write_bytes(content)
    library = AutoTokenizer.from_pretrained(folder)
    if library.pad_token is None:  # sentence-transformers pads
        about = json.loads(encoder.files.get("tokenizer_config.json", b"{}"))
        pad_token = library.eos_token or library.unk_token or library.convert_ids_to_tokens(0)
        write_json(folder / "tokenizer_config.json", about | {"pad_token": pad_token})
    modes = {f"pooling_mode_{flag}": encoder.pooling == p for p, flag in POOLING_FLAGS.items()}
    modules = []
    for i, (path, kind) in enumerate([("", "Transformer"), ("1_Pooling", "Pooling")]):
        kind = f"sentence_transformers.models.{kind}"  # a form that all its versions know
        modules.append({"idx": i, "name": str(i), "path": path, "type": kind})
    write_json(folder / "modules.json", modules)
    (folder / "1_Pooling").mkdir(exist_ok=True)
    sizes = {"word_embedding_dimension": encoder.dimensions}
    write_json(folder / "1_Pooling" / "config.json", sizes | modes)
    limit = {"max_seq_length": encoder.max_length, "do_lower_case": encoder.lower}
    write_json(folder / "sentence_bert_config.json", limit)
    about = {"prompts": {}, "default_prompt_name": None}
    write_json(folder / "config_sentence_transformers.json", about)
    probes = [text.lower() if encoder.lower else text for text in PROBES]
    encoder.tokenizer.enable_truncation(encoder.max_length)
    ours = [row.ids for row in encoder.tokenizer.encode_batch(probes)]
    if library(probes, truncation=True, max_length=encoder.max_length)["input_ids"] != ours:
        fail(
            "transformers reads other tokens from the student's files than its tokenizer.json has; "
            'write "tokenizer_class": "PreTrainedTokenizerFast" into its tokenizer_config.json'
        )


def rehearse(student, corpus, two_views):
    """Try a batch in training mode, and the saving, before hours are spent on what can't end well.

    Ends the program if training yields other layers than evaluation; says so where dropout does
    nothing to the two views that SimCSE compares.
    """
    config, tokens = student.model.config.to_dict(), corpus.batch(torch.arange(2))[0]
    if drops := [key for key, value in config.items() if "layerdrop" in key and value]:
        fail(f"the student leaves out layers in training; set {drops[0]} to 0 in its config.json")
    with torch.random.fork_rng(), torch.no_grad(), tempfile.TemporaryDirectory() as folder:
        student.model.train()
        layers = pooled_layers(student, {name: t.repeat(2, 1) for name, t in tokens.items()})
        save_encoder(folder, student)
    if two_views and torch.equal(*layers[-1].chunk(2)):
        print("the student has no dropout: the two views that SimCSE compares are the same")
