"""An encoder and its pooling: sentences tokenised, padded, embedded; the model saved.

N is the size of a batch, T its longest sentence in tokens, d the model's width.
"""

import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from tokenizers import Tokenizer
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoTokenizer

from support import attempt, fail
from support.files import digest, write_json
from support.run import progress

PIECE = 16  # sentences in a piece of a batch on a CPU, where less padding saves time
SLICE = 1_000  # sentences tokenised at once: the library's own output is far larger than the ids
POOLING_FLAGS = {  # those of sentence-transformers, which all its versions read
    "cls": "pooling_mode_cls_token",
    "mean": "pooling_mode_mean_tokens",
    "last": "pooling_mode_lasttoken",
}


def pool(hidden, attention_mask, pooling):
    """Sentence embeddings from token states (Section 3): (N, T, d), (N, T) -> (N, d).

    pooling: cls (the first token), mean or last ([EOS]), else ValueError. Padding: on either side.
    """
    rows = torch.arange(len(hidden), device=hidden.device)
    mask = attention_mask.int()
    if pooling == "cls":
        first = mask.argmax(1)  # the position of the first 1
        return hidden[rows, first]
    if pooling == "last":
        last = mask.shape[1] - 1 - mask.flip(1).argmax(1)
        return hidden[rows, last]
    if pooling == "mean":
        weights = mask / mask.sum(1, keepdim=True)  # before the sum, which could overflow float16
        return torch.einsum("nt,ntd->nd", weights.to(hidden.dtype), hidden)
    raise ValueError(f"pooling must be cls, mean or last, not {pooling!r}")


@dataclass(frozen=True)
class Encoder:
    """A transformers model, its tokenizer, and how a sentence becomes one vector."""

    model: torch.nn.Module
    tokenizer: Tokenizer  # tokenizer.json's, cutting at max_length, without padding
    special_tokens: dict  # such as {"pad_token": "[PAD]"}, for other programs
    pooling: str  # "cls", "mean" or "last"
    max_length: int  # tokens; longer sentences are cut
    layers: int = 0  # L, without the embedding layer
    dimensions: int = 0  # d, the width of the last layer and so of the sentence embedding

    def identity(self):
        """A hash of what its embeddings depend on, but for the weights."""
        config = self.model.config.to_diff_dict() | {"transformers_version": None}
        return digest(config, self.tokenizer.to_str(), self.pooling)


def tokenize(encoder, sentences):
    """The token ids of n sentences: n arrays, such as [101, 1037, 3899, 102].

    They are cut to the encoder's maximum length. Prints how many were cut.
    """
    special = encoder.tokenizer.num_special_tokens_to_add(False)
    if encoder.max_length <= special:
        fail(f"--max_length {encoder.max_length}: {special} special tokens leave no room for words")
    tokens = []
    cut = 0
    for i in range(0, len(sentences), SLICE):
        for encoding in encoder.tokenizer.encode_batch(sentences[i : i + SLICE]):
            tokens.append(np.array(encoding.ids, np.int32))
            cut += bool(encoding.overflowing)
    if cut:
        print(f"{cut} of {len(sentences)} sentences are cut after {encoder.max_length} tokens")
    return tokens


def pad(tokens, rows, model):
    """One batch for a model: N positions -> {"input_ids", "attention_mask"}, (N, T) each.

    Padding is on the right; its id is 0.
    """
    ids = [torch.from_numpy(tokens[i]).long() for i in rows]
    ones = [torch.ones_like(sentence) for sentence in ids]
    input_ids = pad_sequence(ids, batch_first=True).to(model.device)
    attention_mask = pad_sequence(ones, batch_first=True).to(model.device)
    return {"input_ids": input_ids, "attention_mask": attention_mask}


def pooled_layers(encoder, tokens, precision="float32"):
    """Pooled states of a right-padded batch: layer 0, the embeddings, to layer L, each (N, d).

    On a CPU the batch is split into pieces of similar length. In training, matrix products use
    `precision`.
    """
    model = encoder.model
    use_bfloat16 = precision == "bfloat16" and model.training
    lengths = tokens["attention_mask"].sum(1)
    order = lengths.argsort(stable=True)
    pieces = []  # the L + 1 pooled layers of each piece
    for rows in order.split(PIECE if model.device.type == "cpu" else len(order)):
        longest = lengths[rows[-1]]
        piece = {name: values[rows, :longest] for name, values in tokens.items()}
        with torch.autocast(model.device.type, torch.bfloat16, enabled=use_bfloat16):
            output = model(**piece, output_hidden_states=True)
        states = list(output.hidden_states)
        states[-1] = output.last_hidden_state  # in some models the last norm is in this one alone
        mask = piece["attention_mask"]
        pieces.append([pool(hidden.to(model.dtype), mask, encoder.pooling) for hidden in states])
    original_order = order.argsort()
    return [torch.cat(layer)[original_order] for layer in zip(*pieces, strict=True)]


@torch.inference_mode()
def encode(encoder, tokens, batch_size, label=None, file=None):
    """Pooled last-layer embeddings of n sentences, not normalised: float32 (n, d), on the CPU.

    Batches hold sentences of similar length, the longest first: one that is too large fails at
    once. The embeddings are appended to `file`, opened as a+b, after the whole batches that an
    earlier call wrote. Without `file` they go to a temporary file.
    """
    file = file or tempfile.TemporaryFile()
    model = encoder.model.eval()
    n = len(tokens)
    order = np.argsort([-len(ids) for ids in tokens], kind="stable")
    row_bytes = 4 * encoder.dimensions
    batches_done = file.seek(0, os.SEEK_END) // (row_bytes * batch_size)
    done = batches_done * batch_size
    file.truncate(done * row_bytes)
    with progress(n, "sent", label, initial=done) as bar:
        for start in range(done, n, batch_size):
            batch = pad(tokens, order[start : start + batch_size], model)
            hidden = model(**batch).last_hidden_state  # (N, T, d)
            vectors = pool(hidden, batch["attention_mask"], encoder.pooling).float().cpu()
            if not vectors.isfinite().all():
                fail(
                    f"{label}: embeddings in {model.dtype} are not finite; is the model damaged, "
                    "or the type too small for it?"
                )
            file.write(vectors.numpy())
            file.flush()
            bar.update(len(vectors))
    rows = np.memmap(file, np.float32, "r", shape=(n, encoder.dimensions))  # in that order
    return torch.from_numpy(rows[order.argsort()])


def save_encoder(folder, encoder):
    """Write an encoder so that transformers and sentence-transformers read what was trained.

    The files of its tokenizer are written anew: the class that the old ones name may differ.
    """
    with attempt(f"save the student in {folder}", OSError, SafetensorError):
        encoder.model.save_pretrained(folder)
    encoder.tokenizer.save(str(folder / "tokenizer.json"))
    tokenizer_config = {
        "tokenizer_class": "PreTrainedTokenizerFast",  # which reads tokenizer.json as it is
        "model_max_length": encoder.max_length,
        "model_input_names": ["input_ids", "attention_mask"],
    }
    write_json(folder / "tokenizer_config.json", tokenizer_config | encoder.special_tokens)
    # and what sentence-transformers reads besides: Transformer, then Pooling
    shutil.copy(Path(__file__).with_name("modules.json"), folder)
    pooling = {flag: encoder.pooling == name for name, flag in POOLING_FLAGS.items()}
    pooling["word_embedding_dimension"] = encoder.dimensions
    (folder / "1_Pooling").mkdir(exist_ok=True)
    write_json(folder / "1_Pooling" / "config.json", pooling)
    write_json(folder / "sentence_bert_config.json", {"max_seq_length": encoder.max_length})


def dry_run(encoder, corpus, output):
    """Save the student once, next to the output, before hours are spent on training it.

    Ends the program if that fails, or if transformers reads other token ids from what was saved
    than the encoder is trained with.
    """
    if not encoder.special_tokens["pad_token"]:
        fail("the student has no token to pad with; name a pad_token in its tokenizer_config.json")
    with attempt(f"write next to --output {output}", OSError):
        with tempfile.TemporaryDirectory(prefix=".trial-", dir=Path(output).parent) as folder:
            save_encoder(Path(folder), encoder)
            reloaded = AutoTokenizer.from_pretrained(folder)
    reloaded_ids = reloaded(corpus.sentences[:100], truncation=True)["input_ids"]
    if reloaded_ids != [ids.tolist() for ids in corpus.tokens[:100]]:
        fail(
            f"transformers rebuilds the tokenizer of a {encoder.model.config.model_type}, and then "
            "gives other tokens than its tokenizer.json; use another student"
        )
