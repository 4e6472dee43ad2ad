"""An encoder and its pooling: sentences tokenised, padded, embedded; the model saved.

N is a batch's size, T its longest sentence in tokens, d the model's width.
"""

from support import fail
from support.files import attempt, digest
from support.run import progress

import inspect
import json
import os
import zlib
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import transformers
from torch.nn.utils.rnn import pad_sequence

PIECE = 16  # rows of a piece of a batch on a CPU, which gains by less padding


@dataclass(frozen=True)
class Encoder:
    """A transformers model, its tokenizer, and how a sentence becomes one vector."""

    model: torch.nn.Module
    tokenizer: transformers.PreTrainedTokenizerBase
    pooling: str  # "cls", "mean" or "last"
    max_length: int  # tokens; longer sentences are cut
    widths: tuple  # of each of the L layers

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


def tokenize(encoder, sentences):
    """Tokens of n sentences, cut to the encoder's maximum length. Prints how many were cut."""
    tokenizer, pieces, lengths, cut = encoder.tokenizer, [], [], 0
    for i in range(0, len(sentences), 1_000):  # in slices: the library's own output is far larger
        texts = sentences[i : i + 1_000]
        rows = tokenizer(texts, truncation=True, max_length=encoder.max_length)
        pieces.append(np.fromiter(chain.from_iterable(rows["input_ids"]), dtype=np.int32))
        lengths += map(len, rows["input_ids"])
        cut += sum(bool(encoding.overflowing) for encoding in rows.encodings or [])
    if cut:
        print(f"{cut} of {len(sentences)} sentences are cut after {encoder.max_length} tokens")
    if not all(lengths):
        empty = sentences[lengths.index(0)]
        fail(f"the tokenizer makes nothing of the sentence {empty[:60]!r}; leave it out")
    own = getattr(encoder.model.config, "pad_token_id", None)
    ids = (tokenizer.pad_token_id, own, tokenizer.eos_token_id, 0)
    vectors = encoder.model.get_input_embeddings().num_embeddings
    pad_id = next(i for i in ids if i is not None and 0 <= i < vectors)
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


class Corpus:
    """The tokenised sentences of a cache, their cached targets and their domains."""

    def __init__(self, cache, student):
        self.tokens, self.device = tokenize(student, cache["sentences"]), student.model.device
        self.embeddings = cache["embeddings"]  # (n, d_T), on disk; None without a teacher
        self.domains = torch.from_numpy(np.unique(cache["sources"], return_inverse=True)[1])

    def __len__(self):
        return len(self.domains)

    def batch(self, rows):
        """Positions (N,) -> tokens, (N, T) each; E^T, (N, d_T), or None; domains, (N,)."""
        teacher = None
        if self.embeddings is not None:
            teacher = to_device(self.embeddings[rows].float(), self.device)
        tokens = pad(self.tokens, rows.tolist(), self.device)
        return tokens, teacher, to_device(self.domains[rows], self.device)

    def identity(self):
        """A hash of all that is learnt from: tokens, targets, domains."""
        targets = [] if self.embeddings is None else [self.embeddings]
        return digest(*self.tokens, self.domains, *targets)


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


def forward(model, batch, **how):
    """What a model gives for a batch, without the keys and values that a next token would need."""
    takes = inspect.signature(model.forward).parameters
    return model(**batch, **how, **({"use_cache": False} if "use_cache" in takes else {}))


def hidden_states(model, batch):
    """The token states after each layer: L of (N, T, d). The embedding layer's are left out."""
    return forward(model, batch, output_hidden_states=True).hidden_states[1:]


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
    done = read_part(part, embeddings, batch_size) if part else embeddings[:0]
    embeddings[order[: len(done)]] = done
    bar = progress(len(order), "sent", label, initial=len(done))
    with bar:
        for start in range(len(done), len(order), batch_size):
            rows = order[start : start + batch_size]
            batch = pad(tokens, rows, model.device)
            try:
                hidden = forward(model, batch).last_hidden_state  # (N, T, d)
            except torch.OutOfMemoryError:
                bar.close()
                fail(f"{model.device} is out of memory; try a smaller --batch_size or --max_length")
            vectors = pool(hidden, batch["attention_mask"], encoder.pooling).float().cpu()
            embeddings[rows] = vectors
            if part:
                with attempt(f"write {part}"), open(part, "ab") as file:
                    bits = vectors.contiguous().numpy().view(np.uint32)
                    file.write(np.column_stack([bits, checksums(bits)]).tobytes())
            bar.update(len(rows))
    return embeddings


def checksums(rows):
    """One number for each row, (m, d) -> uint32 (m,), by which a torn one is known."""
    return np.array([zlib.crc32(row) for row in rows], dtype=np.uint32)


def read_part(path, embeddings, batch_size):
    """The whole batches of usable rows that a file begins with, float32 (m, d); cuts the rest.

    embeddings: (n, d), what is to be filled.
    """
    n, d = embeddings.shape
    with attempt(f"write {path}"):
        Path(path).touch()
        bits = np.fromfile(path, dtype=np.uint32, count=n * (d + 1))
        bits = bits[: len(bits) // (d + 1) * (d + 1)].reshape(-1, d + 1)
        rows = bits[:, :d].view(np.float32)
        torn = (checksums(rows) != bits[:, d]) | ~np.isfinite(rows).all(1)
        usable = int(torn.argmax()) if torn.any() else len(rows)
        usable -= usable % batch_size
        os.truncate(path, 4 * (d + 1) * usable)
    if usable:
        print(f"going on where it stopped: {usable} sentences are embedded")
    return torch.from_numpy(rows[:usable])


# ----------------------------------------------------------------------------------------- saving
def save_encoder(folder, encoder):
    """Write an encoder as both transformers and sentence-transformers load it."""
    encoder.tokenizer.model_max_length = encoder.max_length
    encoder.model.save_pretrained(folder)
    encoder.tokenizer.save_pretrained(folder)
    names = {"cls": "cls_token", "mean": "mean_tokens", "last": "lasttoken"}
    modes = {f"pooling_mode_{name}": encoder.pooling == key for key, name in names.items()}
    modules = [("0", "", "Transformer"), ("1", "1_Pooling", "Pooling")]
    kind = "sentence_transformers.models."  # a form that all versions of the library know
    files = {
        "modules.json": [
            {"idx": int(name), "name": name, "path": path, "type": kind + module}
            for name, path, module in modules
        ],
        "1_Pooling/config.json": {"word_embedding_dimension": encoder.dimensions} | modes,
        "sentence_bert_config.json": {"max_seq_length": encoder.max_length, "do_lower_case": False},
        "config_sentence_transformers.json": {"prompts": {}, "default_prompt_name": None},
    }
    Path(folder, "1_Pooling").mkdir(exist_ok=True)
    for file, content in files.items():
        Path(folder, file).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
