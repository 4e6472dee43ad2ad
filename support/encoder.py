"""An encoder and its pooling: sentences tokenised, padded, embedded; the model saved.

N is the size of a batch, T its longest sentence in tokens, d the model's width.
"""

import tempfile
from array import array
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError
from tokenizers import Tokenizer
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
    layers: int  # L, without the embedding layer
    dimensions: int  # d, the width of the last layer and so of the sentence embedding
    normalize: bool = False  # whether other programs normalise the embedding; here it never is

    def identity(self):
        """A hash of what its embeddings depend on, but for the weights."""
        config = self.model.config.to_diff_dict()
        config.pop("transformers_version", None)
        return digest([config, self.tokenizer.to_str(), self.pooling])


class Tokens(NamedTuple):
    """n sentences as token ids in one array: far less memory than n lists.

    Sentence i has the ids[starts[i] : starts[i + 1]]. [[7, 8], [9]] is ids 7, 8, 9, starts 0, 2, 3.
    """

    ids: np.ndarray  # int32, of all sentences one after another
    starts: np.ndarray  # (n + 1,)


def tokenize(encoder, sentences):
    """Tokens of n sentences, cut to the encoder's maximum length. Prints how many were cut."""
    ids = array("i")
    starts = [0]
    cut = 0
    for i in range(0, len(sentences), SLICE):
        for encoding in encoder.tokenizer.encode_batch(sentences[i : i + SLICE]):
            if not encoding.ids:
                sentence = sentences[len(starts) - 1]
                fail(
                    f"the tokenizer finds no token in the sentence {sentence[:60]!r}; leave it out"
                )
            ids.extend(encoding.ids)
            starts.append(len(ids))
            cut += len(encoding.overflowing) > 0
    if cut:
        print(f"{cut} of {len(sentences)} sentences are cut after {encoder.max_length} tokens")
    vocabulary = len(encoder.model.get_input_embeddings().weight)
    if max(ids) >= vocabulary:
        fail(f"the tokenizer gives the id {max(ids)}; the model has {vocabulary} word embeddings")
    return Tokens(np.array(ids, np.int32), np.array(starts))


def pad(tokens, rows, model):
    """One batch for a model: N positions -> {"input_ids", "attention_mask"}, (N, T) each."""
    rows = np.asarray(rows)
    starts = tokens.starts[rows]
    ends = tokens.starts[rows + 1]
    ids = np.zeros((len(rows), (ends - starts).max()), np.int64)
    mask = np.zeros_like(ids)  # 0 for padding, on the right; its id is 0, too
    for i, (start, end) in enumerate(zip(starts, ends)):
        ids[i, : end - start] = tokens.ids[start:end]
        mask[i, : end - start] = 1
    device = model.device
    return {
        "input_ids": torch.from_numpy(ids).to(device),
        "attention_mask": torch.from_numpy(mask).to(device),
    }


def pooled_layers(encoder, tokens, precision="float32", from_layer=1):
    """Pooled states after each layer of a right-padded batch: L of (N, d). Layer 0: embeddings.

    On a CPU the batch is split into pieces of similar length. In training, matrix products use
    `precision`.
    """
    model = encoder.model
    on_cpu = model.device.type == "cpu"
    half = precision == "bfloat16" and model.training
    lengths = tokens["attention_mask"].sum(1)
    order = lengths.argsort(stable=True)
    pieces = []  # the L pooled layers of each piece
    for rows in order.split(PIECE if on_cpu else len(order)):
        longest = lengths[rows[-1]] if on_cpu else None  # a GPU need not wait for that number
        piece = {name: values[rows, :longest] for name, values in tokens.items()}
        with torch.autocast(model.device.type, torch.bfloat16, enabled=half):
            output = model(**piece, output_hidden_states=True)
        states = list(output.hidden_states[from_layer:])
        states[-1] = output.last_hidden_state  # in some models the last norm is in this one alone
        mask = piece["attention_mask"]
        pieces.append([pool(hidden.to(model.dtype), mask, encoder.pooling) for hidden in states])
    original_order = order.argsort()
    return [torch.cat(layer)[original_order] for layer in zip(*pieces, strict=True)]


@torch.inference_mode()
def encode(encoder, tokens, batch_size, label=None, part=None):
    """Pooled last-layer embeddings of n sentences, not normalised: float32 (n, d), on the CPU.

    Batches hold sentences of similar length, the longest first: one that is too large fails at
    once. The embeddings are kept in the file `part`, if it is named; a second call resumes from it.
    """
    model = encoder.model.eval()
    n = len(tokens.starts) - 1
    d = encoder.dimensions
    order = np.argsort(-np.diff(tokens.starts), kind="stable")
    rows = np.zeros((n, d + 1), np.float32)  # in that order; column d is 1 where a row is done
    if part:
        rows = resumable(part, rows)
    is_done = rows[:, d]
    done = n if is_done.all() else int(is_done.argmin())  # up to the first row that is not
    done -= done % batch_size  # whole batches
    if done:
        print(f"resuming: {done} sentences are already embedded")
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
            end = start + len(vectors)
            rows[start:end, :d] = vectors.numpy()
            rows[start:end, d] = 1  # after the vectors: these rows are whole
            bar.update(len(vectors))
    return torch.from_numpy(rows[order.argsort(), :d])


def resumable(path, rows):
    """The rows in a file of that name: of an earlier call if it has their size, else written."""
    with attempt(f"write {path}"):
        if not Path(path).exists() or Path(path).stat().st_size != rows.nbytes:
            rows.tofile(path)  # which reserves the disk space
        return np.memmap(path, np.float32, "r+", shape=rows.shape)


def save_encoder(folder, encoder):
    """Write an encoder so that transformers and sentence-transformers read what was trained.

    The files of its tokenizer are written anew: the class that the old ones name may differ.
    """
    folder = Path(folder)
    encoder.model.save_pretrained(folder)
    tokenizer = Tokenizer.from_str(encoder.tokenizer.to_str())
    tokenizer.no_truncation()
    tokenizer.save(str(folder / "tokenizer.json"))
    tokenizer_config = {
        "tokenizer_class": "PreTrainedTokenizerFast",  # which reads tokenizer.json as it is
        "model_max_length": encoder.max_length,
        "padding_side": "right",
        "truncation_side": encoder.tokenizer.truncation["direction"],
        "model_input_names": ["input_ids", "attention_mask"],
        **encoder.special_tokens,
    }
    write_json(folder / "tokenizer_config.json", tokenizer_config)
    # and what sentence-transformers reads besides
    module = "sentence_transformers.models"
    modules = [
        {"idx": 0, "name": "0", "path": "", "type": f"{module}.Transformer"},
        {"idx": 1, "name": "1", "path": "1_Pooling", "type": f"{module}.Pooling"},
    ]
    if encoder.normalize:
        modules.append(
            {"idx": 2, "name": "2", "path": "2_Normalize", "type": f"{module}.Normalize"}
        )
    write_json(folder / "modules.json", modules)
    pooling = {flag: encoder.pooling == name for name, flag in POOLING_FLAGS.items()}
    pooling["word_embedding_dimension"] = encoder.dimensions
    (folder / "1_Pooling").mkdir(exist_ok=True)
    write_json(folder / "1_Pooling" / "config.json", pooling)
    limit = {"max_seq_length": encoder.max_length, "do_lower_case": False}
    write_json(folder / "sentence_bert_config.json", limit)
    write_json(folder / "config_sentence_transformers.json", {"prompts": {}})


def dry_run(encoder, corpus, output):
    """Save the student once, next to the output, before hours are spent on training it.

    Ends the program if that fails, or if transformers reads other token ids from what was saved
    than the encoder is trained with.
    """
    if not encoder.special_tokens.get("pad_token"):
        fail("the student has no token to pad with; name a pad_token in its tokenizer_config.json")
    with (
        attempt(f"save next to --output {output}", OSError, SafetensorError),
        tempfile.TemporaryDirectory(prefix=".trial-", dir=Path(output).parent) as folder,
    ):
        save_encoder(folder, encoder)
        reloaded = AutoTokenizer.from_pretrained(folder)
    for sentence in corpus.sentences[:100]:
        trained_ids = encoder.tokenizer.encode(sentence).ids
        if reloaded(sentence, truncation=True)["input_ids"] != trained_ids:
            fail(
                f"transformers tokenizes {sentence[:60]!r} differently from tokenizer.json: it "
                f"rebuilds a {encoder.model.config.model_type}'s tokenizer; use another student"
            )
