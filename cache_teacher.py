"""Run the teacher once and cache its sentence embeddings: Algorithm 1, line 3; Appendices C and D.

    python cache_teacher.py                                                      # the demo corpus, the lsa teacher
    python cache_teacher.py --teacher BAAI/bge-m3 --corpus paper --output bge-m3.pt
    torchrun --nproc_per_node=4 cache_teacher.py --teacher Qwen/Qwen3-Embedding-4B --corpus paper ...     # 4 GPUs

Writes a dict, read back with torch.load(path, weights_only=True, mmap=True): sentences (n str, unique), sources (n str,
the domain of each), embeddings (n, d_T), teacher, pooling, max_length, fingerprint (of the sentences), version.
Also here, what the three scripts share: loading an encoder, tokenising, pooling, and embedding sentences with it; devices,
processes, files that are whole or not there, and checkpoints.
"""

import argparse
import csv
import hashlib
import io
import json
import os
import pickle
import re
import shutil
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from datetime import timedelta
from itertools import chain
from pathlib import Path

import numpy as np
import torch
import transformers
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from huggingface_hub.utils import logging as hub_logging
from safetensors import SafetensorError
from sklearn.decomposition import TruncatedSVD
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.pipeline import make_pipeline
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm
from transformers import AutoModel, AutoTokenizer
from transformers.utils import cached_file

VERSION = 1  # of the cache's format
DEMO = Path(__file__).parent / "demo"
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def fail(message):
    """End with exit code 2 and one line on standard error: the user's mistake, not a bug."""
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(2)


def quiet():
    """Leave the terminal to our own lines and progress bars."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    hub_logging.set_verbosity_error()


def rank():
    """Which of the processes that torchrun started this is, from 0; 0 without torchrun. The first one speaks and writes."""
    return int(os.environ["RANK"]) if "LOCAL_RANK" in os.environ else 0


def processes():
    """How many processes torchrun started, one a device; 1 without torchrun."""
    return int(os.environ["WORLD_SIZE"]) if "LOCAL_RANK" in os.environ else 1  # other launchers set WORLD_SIZE alone


def join_processes():
    """Connect the processes that torchrun started, and let the first one alone speak."""
    if processes() > 1:
        local, devices = int(os.environ["LOCAL_RANK"]), torch.accelerator.device_count()
        if 0 < devices <= local:
            fail(f"torchrun started more processes than the {devices} devices here; lower --nproc_per_node")
        if devices:
            torch.accelerator.set_device_index(local)
        # patient, because one process may have much more left to cache than another
        torch.distributed.init_process_group(timeout=timedelta(hours=12))
    if rank() > 0:
        sys.stdout = open(os.devnull, "w")


def wait_for_processes():
    """Go on when every process has come this far."""
    if processes() > 1:
        torch.distributed.barrier()


def leave_processes():
    """The end of join_processes; not after an error, where it would wait for processes that still work."""
    if processes() > 1:
        torch.distributed.destroy_process_group()


def average(*tensors):
    """Each tensor becomes, in place, its mean over the processes; a single process leaves it as it is."""
    if processes() > 1:
        for tensor in tensors:
            torch.distributed.all_reduce(tensor)
            tensor /= processes()


def average_gradients(optimizer):
    """Data-parallel training: every gradient becomes its mean over the processes, the same number in each of them."""
    average(*(p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None))


def progress(total, unit, label=None, initial=0):
    """A progress bar with the time left; renewed every half minute where no one watches."""
    pace = {"delay": 0, "mininterval": 0.1} if sys.stderr.isatty() else {"delay": 30, "mininterval": 30}
    return tqdm(total=total, unit=unit, desc=label, initial=initial, disable=rank() > 0, dynamic_ncols=True, **pace)


def pick_device(name):
    """The torch device of that name; `auto` is the accelerator if there is one, else the CPU."""
    best = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else "cpu"
    try:
        probe = torch.zeros(1, device=best if name == "auto" else name)
        probe.item()  # a device that computes nothing, such as meta, fails here
        return probe.device
    except (RuntimeError, AssertionError, NotImplementedError):
        fail(f"--device {name} is not here; use auto or cpu")


def random_state(device):
    """The states of the random generators that a computation on the device draws from: (the CPU's, the device's or None)."""
    own = None if device.type == "cpu" else torch.get_device_module(device).get_rng_state(device)
    return torch.get_rng_state(), own


def set_random_state(device, state):
    """Go back to a state that random_state gave."""
    torch.set_rng_state(state[0])
    if state[1] is not None:
        torch.get_device_module(device).set_rng_state(state[1], device)


def mixed_precision(device, wanted=True):
    """bfloat16 for matrix products on a GPU that has it, if wanted; else a context that changes nothing."""
    has_it = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.autocast(device.type, torch.bfloat16, enabled=wanted and has_it)


def memory_mb(device):
    """Megabytes in use: the accelerator's peak since the last call, or the process's own resident memory on a CPU."""
    if device.type != "cpu":
        peak = torch.accelerator.max_memory_allocated(device) / 2**20
        torch.accelerator.reset_peak_memory_stats(device)
        return peak
    statm = Path("/proc/self/statm")  # of Linux; elsewhere nothing is measured
    if not statm.exists():
        return 0.0
    resident, shared = map(int, statm.read_text().split()[1:3])  # shared: files, the cache on disk among them
    return (resident - shared) * os.sysconf("SC_PAGE_SIZE") / 2**20


@contextmanager
def writing(path):
    """Errors of writing to `path` end the program with one line; any other error stays what it is."""
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        # torch reports a full disk, or a folder that is not there, as a RuntimeError of its file writer
        if isinstance(error, RuntimeError) and not re.search("writ|inline_container|Parent directory", str(error)):
            raise
        fail(f"cannot write {path}: {getattr(error, 'strerror', None) or str(error).splitlines()[0]}")


# ------------------------------------------------------------------------------------------------- the corpus


def read_table(path):
    """Rows of a .jsonl, .csv or .tsv file as dicts, of a .txt file as {"text": line}. Ends the program if it can't be read."""
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        fail(f"{path} does not exist")
    except OSError as error:
        fail(f"cannot read {path}: {error.strerror}")
    except UnicodeDecodeError:
        fail(f"{path} is not UTF-8 text; convert it first, for example with iconv")
    lines = text.removesuffix("\n").split("\n")  # not splitlines, which cuts at U+2028 and its like, too
    if path.suffix == ".jsonl":
        rows = []
        for number, line in enumerate(lines, 1):
            try:
                rows += [json.loads(line)] if line.strip() else []
            except json.JSONDecodeError:
                fail(f"{path}, line {number} is not JSON; is the file torn?")
        return rows
    if path.suffix in (".csv", ".tsv"):
        try:
            return list(
                csv.DictReader(io.StringIO(text), delimiter="\t" if path.suffix == ".tsv" else ",", strict=True)
            )
        except csv.Error as error:
            fail(f"{path} is not a {path.suffix} table: {error}")
    if path.suffix == ".txt":
        return [{"text": line} for line in lines]
    fail(f"{path}: only .txt, .jsonl, .csv and .tsv files are read")


def read_corpus(name, seed):
    """(sentences, sources): lists of n str, as they stand in the corpus; a file without a source column is one domain."""
    if name == "paper":
        return paper_corpus(seed)
    rows = read_table(DEMO / "corpus.jsonl" if name == "demo" else name)
    if not rows:
        fail(f"{name} holds no sentence")
    if missing := [row for row in rows if not isinstance(row, dict) or not isinstance(row.get("text"), str)]:
        there = ", ".join(map(str, missing[0])) if isinstance(missing[0], dict) else type(missing[0]).__name__
        fail(f"{name} needs a text column in every row; found: {there}")
    return [row["text"] for row in rows], [str(row.get("source") or Path(name).stem) for row in rows]


def paper_corpus(seed):
    """Appendix D from the Hub: 5,000 sentences of Emotion, 2,500 pairs each of WiC and STS-B, from their training splits."""
    from eval import load_hub_split  # here, because eval.py imports this file

    rng = np.random.default_rng(seed)
    sentences, sources = [], []
    for task, count in {"emotion": 5000, "wic": 2500, "stsb": 2500}.items():
        rows = load_hub_split(task, "train")
        for i in rng.choice(len(rows), min(count, len(rows)), replace=False):
            texts = [rows[i][column] for column in ("text", "sentence1", "sentence2") if column in rows[i]]
            sentences += texts
            sources += [task] * len(texts)
    return sentences, sources


def clean(sentences):
    """The positions of the sentences to keep: blank ones and repeats go (Appendix D: unique). Prints how many went."""
    first = {}
    for i, sentence in enumerate(sentences):
        first.setdefault(sentence.strip(), i)
    blank = sum(not sentence.strip() for sentence in sentences)
    first.pop("", None)
    repeated = len(sentences) - blank - len(first)
    print(f"{len(sentences)} sentences: {blank} blank and {repeated} repeated removed, {len(first)} left")
    if not first:
        fail("the corpus holds no sentence")
    return list(first.values())


def fingerprint(sentences):
    """A hash of the sentences and their order."""
    digest = hashlib.sha256(b"[")
    for i, sentence in enumerate(sentences):  # piece by piece what json.dumps(sentences) would be, which is large
        digest.update((", " * (i > 0) + json.dumps(sentence)).encode())
    digest.update(b"]")
    return digest.hexdigest()


# ------------------------------------------------------------------------------------------ encoders, for all scripts


def pool(hidden, attention_mask, pooling):
    """Sentence embeddings from token states (Section 3, Problem Setup): (N, T, d), (N, T) -> (N, d).

    `pooling` is "cls" (the first token), "mean" or "last" ([EOS]); padding may be on either side. ValueError for another.
    """
    rows = torch.arange(len(hidden), device=hidden.device)
    if pooling == "cls":
        return hidden[rows, attention_mask.int().argmax(1)]
    if pooling == "last":
        return hidden[rows, hidden.shape[1] - 1 - attention_mask.int().flip(1).argmax(1)]
    if pooling == "mean":
        mask = attention_mask.to(hidden.dtype)
        weights = mask / mask.sum(1, keepdim=True)  # (N, T); divided first, so that no sum overflows in half precision
        return torch.einsum("nt,ntd->nd", weights, hidden)
    raise ValueError(f"pooling must be cls, mean or last, not {pooling!r}")


def read_model_json(name, file, required=False):
    """A JSON file of a model, by directory or Hub id, or {} if it has no such file.

    Ends the program if the file is torn, or if it is `required` to know and the Hub, which may have it, is out of reach.
    """
    try:
        return json.loads(Path(cached_file(name, file)).read_text(encoding="utf-8"))
    except ValueError:
        fail(f"{name}: its {file} is torn")
    except OSError as error:
        absent = isinstance(error.__cause__, (EntryNotFoundError, type(None)))
        if required and (isinstance(error.__cause__, LocalEntryNotFoundError) or not absent):
            fail(f"{name}: its {file}, which may tell its pooling, is out of reach; choose one with --pooling")
        return {}


def declared_pooling(name):
    """The pooling that a model's sentence-transformers files ask for, or None without such files.

    Reads both forms, {"pooling_mode_cls_token": true} and {"pooling_mode": "cls"}. Ends the program if the model needs a
    module or a pooling that is not implemented here: its embeddings would be wrong.
    """
    listed = read_model_json(name, "modules.json", required=True) or []
    modules = {module["type"].rsplit(".", 1)[-1]: module["path"] for module in listed}
    if extra := sorted(set(modules) - {"Transformer", "Pooling", "Normalize"}):
        fail(f"{name} has a {extra[0]} module: encode with sentence-transformers and pass the array, --teacher X.npy")
    if "Pooling" not in modules:
        return None
    config = read_model_json(name, f"{modules['Pooling']}/config.json", required=True)
    old = {"pooling_mode_cls_token": "cls", "pooling_mode_mean_tokens": "mean", "pooling_mode_lasttoken": "lasttoken"}
    modes = [old.get(key, key) for key, on in config.items() if key.startswith("pooling_mode_") and on]
    mode = config.get("pooling_mode") or "+".join(modes) or "mean"
    known = {"cls": "cls", "mean": "mean", "lasttoken": "last"}
    if str(mode) not in known:
        fail(f"{name} asks for {mode} pooling, which is not implemented; choose one with --pooling")
    return known[mode]


def save_encoder(folder, model, tokenizer, pooling, max_length):
    """Write a model as both transformers and sentence-transformers load it, with its pooling and maximum length."""
    tokenizer.model_max_length = min(max_length, tokenizer.model_max_length)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    declare_pooling(folder, pooling, model.config.hidden_size, tokenizer.model_max_length)


def declare_pooling(folder, pooling, dimensions, max_length):
    """Write the sentence-transformers files that `declared_pooling` reads, in the form that all its versions know."""
    folder, names = Path(folder), {"cls": "cls_token", "mean": "mean_tokens", "last": "lasttoken"}
    kind = "sentence_transformers.models."
    modes = {f"pooling_mode_{name}": pooling == key for key, name in names.items()}
    files = {
        "modules.json": [
            {"idx": 0, "name": "0", "path": "", "type": kind + "Transformer"},
            {"idx": 1, "name": "1", "path": "1_Pooling", "type": kind + "Pooling"},
        ],
        "1_Pooling/config.json": {"word_embedding_dimension": dimensions} | modes,
        "sentence_bert_config.json": {"max_seq_length": max_length, "do_lower_case": False},
    }
    (folder / "1_Pooling").mkdir(exist_ok=True)
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def load_encoder(name, pooling="auto", dtype=torch.float32):
    """(model, tokenizer, pooling) of a Hub id or a directory, an encoder or a decoder; prints the pooling it settles on.

    The weights are loaded as `dtype`, whatever type the files hold. Ends the program if the model can't be loaded.
    """
    if (Path(name) / "checkpoint.pt").exists():
        fail(f"{name} holds an interrupted run; finish it first, with --resume")
    local = read_model_json(name, "modules.json") if Path(name).is_dir() else {}
    folder = next(
        (module["path"] for module in local if module["type"].endswith("Transformer")), ""
    )  # older: a subfolder
    try:
        model, report = AutoModel.from_pretrained(name, subfolder=folder, dtype=dtype, output_loading_info=True)
        tokenizer = AutoTokenizer.from_pretrained(name, subfolder=folder)
    except (OSError, ValueError, RuntimeError, ImportError, SafetensorError) as error:
        reason = str(error).splitlines()[0]
        fail(f"cannot load {name}, neither a directory with a model nor a model on the Hub within reach: {reason}")
    if missing := sorted(key for key in report["missing_keys"] if "pooler" not in key):  # the pooler is not used here
        fail(f"{name}: its files lack {len(missing)} weights of a {type(model).__name__}, {missing[0]} among them")
    if model.config.is_encoder_decoder:
        model = model.get_encoder()
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    limit = read_model_json(name, os.path.join(folder, "sentence_bert_config.json")).get("max_seq_length")
    limits = [tokenizer.model_max_length, limit]
    if positions := getattr(model.config, "max_position_embeddings", None):  # RoBERTa's first two are no positions
        limits.append(positions - 2 * ("roberta" in model.config.model_type))
    tokenizer.model_max_length = min(limit for limit in limits if limit)
    reason = "as asked"
    if pooling == "auto":
        causal = any(getattr(module, "is_causal", False) for module in model.modules())
        pooling, reason = declared_pooling(name), "from its sentence-transformers files"
        if pooling is None:
            pooling, reason = ("last", "it is a decoder") if causal else ("cls", "it is an encoder")
    print(f"{name}: {pooling} pooling, {reason}")
    if prompt := read_model_json(name, "config_sentence_transformers.json").get("default_prompt_name"):
        print(f"{name}: its default prompt, {prompt!r}, is not put before the sentences")
    return model, tokenizer, pooling


def tokenize(tokenizer, sentences, max_length):
    """Token ids of n sentences, cut to max_length and to what the model takes: (ids, starts). Prints how many were cut.

    ids: all of them end to end, int32, in a temporary file (TMPDIR says where), for a large corpus; starts: (n + 1,), where
    each sentence begins, and the end.
    """
    limit, lengths, cut = min(max_length, tokenizer.model_max_length), [], 0
    if limit < 3:
        fail(f"--max_length {limit} leaves no token of a sentence beside the first and the last; take 3 or more")
    with tempfile.TemporaryFile() as file, writing(tempfile.gettempdir()):
        for i in range(0, len(sentences), 1_000):  # in slices: the tokenizer's own output is far larger than the ids
            rows = tokenizer(sentences[i : i + 1_000], truncation=True, max_length=limit, return_attention_mask=False)
            lengths += map(len, rows["input_ids"])
            file.write(np.fromiter(chain.from_iterable(rows["input_ids"]), dtype=np.int32).tobytes())
            cut += sum(bool(encoding.overflowing) for encoding in rows.encodings or [])
        file.flush()
        ids = np.memmap(file, dtype=np.int32, mode="c")  # it stays readable after the file's name is gone
    if cut:
        print(f"{cut} of {len(sentences)} sentences are longer than {limit} tokens: truncated")
    return ids, np.concatenate([[0], np.cumsum(lengths)])


def pad(tokens, batch, pad_id, device):
    """One batch for the model: what tokenize gave, N positions -> input_ids and attention_mask, (N, T), T the longest's."""
    ids, starts = tokens
    rows = [torch.from_numpy(ids[starts[i] : starts[i + 1]]) for i in batch]
    input_ids = pad_sequence(rows, batch_first=True, padding_value=pad_id).long()
    mask = (torch.arange(input_ids.shape[1]) < torch.tensor([len(row) for row in rows])[:, None]).long()
    return {"input_ids": to_device(input_ids, device), "attention_mask": to_device(mask, device)}


def to_device(tensor, device):
    """A copy there, for which the host does not wait."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def encode(model, tokenizer, sentences, pooling, max_length, batch_size, label=None, part=None):
    """Pooled last-layer embeddings of n sentences, not normalised: a float32 tensor (n, d) on the CPU.

    Batches hold sentences of similar length, the longest first, so that padding is rare and too large a batch fails at once.
    With `part`, a path, the embeddings are kept in files that begin with it while they are made: a second call goes on where
    an interrupted one stopped, and the processes of torchrun share the batches out; the first one gets the result.
    """
    tokens = tokenize(tokenizer, sentences, max_length)
    order = np.argsort(-np.diff(tokens[1]), kind="stable")
    batches = [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
    embed = lambda batches, bar: embed_batches(model.eval(), tokens, batches, tokenizer.pad_token_id, pooling, bar)
    embeddings = torch.empty(len(sentences), model.config.hidden_size)
    if part is None:
        with progress(len(sentences), "sent", label) as bar:
            for batch, rows in zip(batches, embed(batches, bar)):
                embeddings[batch] = rows
        return embeddings
    paths = [Path(f"{part}.{i}-of-{processes()}") for i in range(processes())]
    fill_part(paths[rank()], batches[rank() :: processes()], embed, model.config.hidden_size, label)
    wait_for_processes()
    for i, path in enumerate(paths if rank() == 0 else []):
        rows = torch.from_numpy(np.fromfile(path, dtype=np.float32)).view(-1, model.config.hidden_size)
        embeddings[np.concatenate([order[:0], *batches[i :: processes()]])] = rows
    return embeddings


@torch.inference_mode()
def embed_batches(model, tokens, batches, pad_id, pooling, bar):
    """Yields the embeddings (N, d) of one batch of positions after another, float32 on the CPU."""
    for batch in batches:
        inputs = pad(tokens, batch, pad_id, model.device)
        try:
            hidden = model(**inputs).last_hidden_state  # (N, T, d)
        except torch.OutOfMemoryError:
            bar.close()
            fail(f"{model.device} is out of memory; try a smaller --batch_size or --max_length, or another --dtype")
        yield pool(hidden, inputs["attention_mask"], pooling).float().cpu()
        bar.update(len(batch))


def fill_part(path, batches, embed, d, label):
    """Write the batches' embeddings (rows of d float32) to a file, each in its place, after the whole batches that it has."""
    with writing(path):
        path.touch()
        file = open(path, "r+b")
        rows, ends = path.stat().st_size // (4 * d), np.cumsum([0, *map(len, batches)])
    done = int(np.searchsorted(ends, rows, side="right")) - 1
    if done:
        whose = "in the first process's share " if processes() > 1 else ""
        print(f"going on from an interrupted run: {ends[done]} of {ends[-1]} sentences {whose}are embedded")
    with progress(int(ends[-1]), "sent", label, initial=int(ends[done])) as bar, file:
        for start, rows in zip(ends[done:], embed(batches[done:], bar)):
            with writing(path):
                file.seek(int(start) * 4 * d)
                file.write(rows.numpy().tobytes())
                file.flush()


def fit_lsa(sentences):
    """Latent semantic analysis, a sentence embedder that needs no download: .transform(n str) -> array (n, <= 32).

    TF-IDF without the commonest words (in over 3 % of the sentences), which say little, then truncated SVD; seeded.
    """
    tfidf = TfidfVectorizer(sublinear_tf=True, token_pattern=r"\w+", max_df=max(50, len(sentences) * 3 // 100))
    try:
        counts = tfidf.fit_transform(sentences)
    except ValueError:  # no word is left
        counts = np.zeros((0, 0))
    if min(counts.shape) < 2:
        fail("the lsa teacher needs two different sentences with words in them; choose another --teacher or --corpus")
    svd = TruncatedSVD(min(32, min(counts.shape) - 1), random_state=0).fit(counts)
    return make_pipeline(tfidf, svd)


# ------------------------------------------------------------------------------------------------- the cache


def read_array(path, rows):
    """Embeddings that came from elsewhere: a .npy or .pt array (rows, d_T), one row a sentence in the corpus's order."""
    if path.endswith(".pt"):
        array = load(path)
    else:
        try:
            array = torch.from_numpy(np.load(path, mmap_mode="c", allow_pickle=False))
        except (OSError, ValueError, TypeError, EOFError) as error:
            fail(f"cannot read the embeddings in {path}: {str(error).splitlines()[0]}")
    if not isinstance(array, torch.Tensor) or array.ndim != 2 or not array.is_floating_point():
        fail(f"{path} must hold one array of shape (sentences, dimensions)")
    if len(array) != rows:
        fail(f"{path} has {len(array)} rows, but the corpus has {rows} sentences; give one row a sentence, in order")
    return array.detach()


def load_teacher(args, texts, rows, kept):
    """(embed, pooling) of the teacher asked for: embed(positions in texts, resumable=False) -> (len(positions), d_T).

    `rows` is the length of the corpus as it stands, `kept` the position there of each text: an array follows that order.
    """
    if args.teacher == "lsa":
        lsa = fit_lsa(texts)
        return lambda positions, **_: torch.from_numpy(lsa.transform([texts[i] for i in positions])), "none"
    if args.teacher.endswith((".npy", ".pt")):
        array = read_array(args.teacher, rows)
        return lambda positions, **_: array[[kept[i] for i in positions]], "none"
    model, tokenizer, pooling = load_encoder(args.teacher, args.pooling, DTYPES[args.dtype])
    model.to(pick_device(args.device))
    weights = [
        p.detach().flatten()[:8].tolist() for p in model.parameters()
    ]  # tells one model of that name from another
    key = fingerprint([*texts, args.teacher, pooling, args.max_length, args.batch_size, args.dtype, weights])[:16]

    def embed(positions, resumable=False):
        """What the model gives for the texts at these positions, kept on disk while it works if `resumable`."""
        part = f"{args.output}.part-{key}" if resumable else None
        of_these, name = [texts[i] for i in positions], Path(args.teacher).name
        return encode(model, tokenizer, of_these, pooling, args.max_length, args.batch_size, name, part)

    return embed, pooling


def make_cache(args, texts, sources, pooling, embeddings):
    """The cache's dict, of n texts and the embeddings (n, d_T), or of the first of them, (m, d_T).

    A sentence that the teacher has no word of (a zero vector) has no target and goes.
    """
    embeddings = embeddings.to(torch.float16 if args.dtype == "float16" else torch.float32)
    if not embeddings.isfinite().all():
        fail(f"the embeddings of {args.teacher} are not all finite numbers; try --dtype float32")
    zero = set((embeddings == 0).all(dim=1).nonzero().flatten().tolist())
    if zero:
        print(f"{len(zero)} sentences removed: the teacher knows no word of theirs")
    keep = [i for i in range(len(texts)) if i not in zero]
    cache = {
        "sentences": [texts[i] for i in keep],
        "sources": [sources[i] for i in keep],
        "embeddings": embeddings[[i for i in keep if i < len(embeddings)]],
        "teacher": args.teacher,
        "pooling": pooling,
        "max_length": args.max_length,
        "version": VERSION,
    }
    return cache | {"fingerprint": fingerprint(cache["sentences"])}


def remove_parts(output):
    """Remove what interrupted runs have left of this cache."""
    for path in Path(output).absolute().parent.iterdir():
        if path.name.startswith(f"{Path(output).name}.part-"):
            path.unlink()


def holds(old, new):
    """Whether a cache holds the same as a new one, of whose embeddings the first rows will do; they may differ by rounding."""
    if old.keys() != new.keys() or any(old[key] != new[key] for key in old if key != "embeddings"):
        return False
    a, b = old["embeddings"][: len(new["embeddings"])], new["embeddings"]
    return (
        a.dtype == b.dtype
        and a.shape == b.shape
        and bool((torch.cosine_similarity(a.float(), b.float()) > 0.999).all())
    )


def save(path, content):
    """torch.save, whole or not at all: to a temporary name first. Ends the program if it can't be written."""
    partial = Path(f"{path}.partial")
    try:
        with writing(path):
            torch.save(content, partial)
            os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def move_files(draft, folder):
    """Move a draft folder's files to where they belong, each of them whole, and remove the draft."""
    for path in sorted(path for path in draft.rglob("*") if path.is_file()):
        (folder / path.relative_to(draft)).parent.mkdir(exist_ok=True)
        os.replace(path, folder / path.relative_to(draft))
    shutil.rmtree(draft)


def load(path):
    """torch.load of tensors and plain values, without running any code of the file's; ends the program if it can't be read."""
    try:
        return torch.load(path, weights_only=True, mmap=True, map_location="cpu")
    except (OSError, RuntimeError, ValueError, EOFError, pickle.UnpicklingError) as error:
        why = getattr(error, "strerror", None) or "torn, or not a .pt file"
        if isinstance(error, pickle.UnpicklingError):
            why = "it holds more than tensors and plain values"
        fail(f"cannot read {path}: {why}")


def load_cache(path):
    """The dict that this script wrote, checked; its embeddings stay on disk (mmap). Ends the program if it can't be used."""
    if not Path(path).exists():
        fail(f"no teacher cache at {path}; make one: python cache_teacher.py --output {path}")
    cache, remedy = load(path), f"make it anew: python cache_teacher.py --overwrite --output {path}"
    keys = {"sentences", "sources", "embeddings", "teacher", "pooling", "max_length", "fingerprint", "version"}
    if not isinstance(cache, dict) or not keys <= cache.keys():
        fail(f"{path} is no teacher cache; {remedy}")
    if cache["version"] != VERSION:
        fail(f"{path} has format {cache['version']}, this code reads {VERSION}; {remedy}")
    sentences, sources, embeddings = cache["sentences"], cache["sources"], cache["embeddings"]
    if (
        not isinstance(embeddings, torch.Tensor)
        or embeddings.ndim != 2
        or embeddings.dtype not in (torch.float32, torch.float16)
    ):
        fail(f"{path}: embeddings must be a float32 or float16 array (sentences, dimensions); {remedy}")
    if not len(sentences) == len(sources) == len(embeddings) > 0:
        fail(f"{path} has {len(sentences)} sentences, {len(sources)} sources, {len(embeddings)} embeddings; {remedy}")
    if not all(isinstance(sentence, str) for sentence in sentences) or fingerprint(sentences) != cache["fingerprint"]:
        fail(f"{path}: the sentences are not the ones that were embedded (their fingerprint differs); {remedy}")
    for rows in embeddings.split(65_536):
        lengths = rows.float().norm(dim=1)
        if not lengths.isfinite().all() or not lengths.all():
            fail(f"{path}: some embeddings are zero or not finite; {remedy}")
    return cache


class Checkpoint:
    """What a training run needs to go on after an interruption as if nothing had happened, in one file.

    facts: what must be the same when it goes on, a dict; modules: a dict of whatever has a state_dict.
    """

    def __init__(self, path, facts, modules):
        self.path, self.facts, self.modules = path, facts, modules

    def save(self, epoch, position):
        """Write the state after `epoch` epochs and `position` bytes of metrics.jsonl, whole or not at all; returns both."""
        states = {name: module.state_dict() for name, module in self.modules.items()}
        if rank() == 0:
            save(self.path, states | {"facts": self.facts, "epoch": epoch, "position": position})
        return epoch, position

    def load(self, state):
        """Go back to a saved state; returns its epoch and position. Ends the program if it is of another run."""
        for name, new in self.facts.items():
            if new != (old := state["facts"].get(name)):
                fail(f"--resume with another {name}: it was {old}, now it is {new}")
        for name, module in self.modules.items():
            module.load_state_dict(state[name])
        return state["epoch"], state["position"]


def identity(cache):
    """A hash of what a run learns from: sentences, sources, teacher and, of the embeddings, their shape and some 100 rows."""
    embeddings = cache["embeddings"]
    rows = [] if embeddings is None else embeddings[:: max(1, len(embeddings) // 100)].tolist()
    shape = None if embeddings is None else list(embeddings.shape)
    return fingerprint([cache["fingerprint"], cache["teacher"], shape, rows, *cache["sources"]])


def seed_of(*what):
    """A seed for a stream of random numbers that has nothing to do with the stream of any other `what`."""
    return int(hashlib.sha256(repr(what).encode()).hexdigest()[:15], 16)


def provenance():
    """What made a result: the versions, and the commit of this code if it is a git checkout of its own and git is here."""
    versions = {"torch": torch.__version__, "transformers": transformers.__version__, "python": sys.version.split()[0]}
    try:
        git = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--show-toplevel", "HEAD"]
        folder, commit = subprocess.run(git, capture_output=True, text=True, check=True).stdout.split("\n")[:2]
    except (OSError, subprocess.CalledProcessError):
        folder = commit = None
    own = folder is not None and Path(folder) == Path(__file__).parent.resolve()
    return {"versions": versions, "commit": commit if own else None}


def load_sentences(corpus):
    """A cache without a teacher, for training without Eq. 3: a corpus's sentences, sources and fingerprint alone."""
    sentences, sources = read_corpus(corpus, seed=42)
    kept = clean(sentences)
    cache = {"sentences": [sentences[i].strip() for i in kept], "sources": [sources[i] for i in kept]}
    return cache | {"embeddings": None, "teacher": None, "fingerprint": fingerprint(cache["sentences"])}


def positive(text):
    """An integer of at least 1, for argparse."""
    if int(text) < 1:
        raise ValueError
    return int(text)


def parse_args(argv):
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument(
        "--teacher", default="lsa", help="Hub id or directory; lsa; or an array of embeddings, .npy or .pt"
    )
    parser.add_argument(
        "--corpus", default="demo", help="demo; paper (Appendix D, from the Hub); or a .txt, .jsonl, .csv or .tsv"
    )
    parser.add_argument("--output", default="teacher.pt", help="the cache to write")
    parser.add_argument("--overwrite", action="store_true", help="replace a cache with other content")
    parser.add_argument(
        "--pooling", default="auto", choices=["auto", "cls", "mean", "last"], help="auto: as the model's files say"
    )
    parser.add_argument("--batch_size", type=positive, default=32, help="sentences a forward pass")
    parser.add_argument("--max_length", type=positive, default=256, help="tokens; longer sentences are truncated")
    parser.add_argument(
        "--dtype", default="float32", choices=list(DTYPES), help="of the teacher's weights; float16 is stored so, too"
    )
    parser.add_argument("--device", default="auto", help="auto: the accelerator if there is one, else cpu")
    parser.add_argument("--seed", type=int, default=42, help="of the paper corpus's sample")
    parser.error = fail
    args = parser.parse_args(argv)
    if not Path(args.output).absolute().parent.is_dir() or Path(args.output).is_dir():
        fail(f"--output {args.output}: it must be a file's name in a folder that exists")
    if args.seed < 0:
        fail(f"--seed {args.seed}: it must be at least 0")
    return args


def main(argv=None):
    """The command line: read the corpus, run the teacher, write the cache."""
    quiet()
    join_processes()
    args = parse_args(argv)
    sentences, sources = read_corpus(args.corpus, args.seed)
    kept = clean(sentences)
    texts, sources = [sentences[i].strip() for i in kept], [sources[i] for i in kept]
    embed, pooling = load_teacher(args, texts, len(sentences), kept)
    if Path(args.output).exists() and not args.overwrite:
        probe = range(
            len(texts) if pooling == "none" else min(16, len(texts))
        )  # 16 sentences tell one model from another
        old, new = load_cache(args.output), make_cache(args, texts, sources, pooling, embed(probe))
        if not holds(old, new):
            fail(
                f"{args.output} holds something else ({len(old['sentences'])} sentences, {old['teacher']}); --overwrite replaces it"
            )
        leave_processes()
        return print(f"{args.output} holds this already; kept as it is")
    start = time.perf_counter()
    try:
        embeddings = embed(range(len(texts)), resumable=True)
    except KeyboardInterrupt:
        fail("interrupted; the same command goes on from where it stopped")
    leave_processes()
    if rank() > 0:
        return
    seconds = time.perf_counter() - start
    cache = make_cache(args, texts, sources, pooling, embeddings)
    save(args.output, cache)
    remove_parts(args.output)
    print(
        f"{args.output}: {len(cache['sentences'])} embeddings of {embeddings.shape[1]} dimensions, {args.teacher}, in {seconds:.0f} s"
    )


if __name__ == "__main__":
    main()
