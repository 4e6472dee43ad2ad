"""What several test files call: small models and caches, runs in processes of their own."""

import json
import os
import signal
import socket
import sys
import traceback
from itertools import count, product
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer
from transformers import AutoModel, BertConfig, BertModel

import talas
from cache_teacher import fingerprint
from demo.tiny import tiny_student

ROOT = Path(__file__).parent.parent
WORDS = ("cook nurse pilot clown", "sees paints", "door boat rose", "garden harbour")
SENTENCES = [  # 48, of five lengths
    f"The {who} {does} the {what} in the {where}{' and then home' * (i % 5)}."
    for i, (who, does, what, where) in enumerate(product(*map(str.split, WORDS)))
]
TEXTS = [*SENTENCES[:8], "The DOOR, a boat", "rose"]  # a few
SOURCES = ["a", "b", "a"] * 16  # two domains, unlike in size


def random_rows(*shape, seed=0, dtype=torch.float64):
    """Standard normal numbers of that seed, such as the embeddings of a batch."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


def write_files(folder, files):
    """Write files: bytes, text, rows of a .jsonl, JSON; change a JSON file's keys (a dict).

    What can be called writes the file itself; None deletes it.
    """
    for name, content in files.items():
        path = Path(folder, name)
        path.parent.mkdir(parents=True, exist_ok=True)
        if callable(content):
            content(path)
            continue
        if isinstance(content, dict) and path.exists():
            content = json.loads(path.read_text()) | content
        if isinstance(content, list) and path.suffix == ".jsonl":
            content = "\n".join(map(json.dumps, content))
        elif isinstance(content, (dict, list)):
            content = json.dumps(content)
        raw = content.encode() if isinstance(content, str) else content
        path.unlink() if raw is None else path.write_bytes(raw)
    return folder


def small_cache(path):
    """Write a teacher cache of the 48 sentences: random embeddings of 8 dimensions."""
    embeddings = torch.randn(48, 8, generator=torch.Generator().manual_seed(3))
    content = {"sentences": list(SENTENCES), "sources": list(SOURCES), "embeddings": embeddings}
    content |= {"teacher": "random", "pooling": "none", "max_length": 256, "version": 1}
    torch.save(content | {"fingerprint": fingerprint(SENTENCES)}, path)
    return path


SIZES = {"num_hidden_layers": 3, "hidden_size": 32, "num_attention_heads": 2}
SIZES |= {"intermediate_size": 64, "max_position_embeddings": 64}
SIZES |= {"initializer_range": 0.4}  # BERT's own 0.02 makes all sentences nearly the same vector


def small_bert(folder, seed=0, **config):
    """Write a BERT with random weights and the sentences' vocabulary, as transformers does."""
    student = tiny_student(SENTENCES, seed=0)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        words = student.tokenizer.get_vocab_size()
        BertModel(BertConfig(vocab_size=words, **(SIZES | config))).save_pretrained(folder)
    about = json.loads(student.files["tokenizer_config.json"]) | {"model_max_length": 64}
    tokens = student.files["tokenizer.json"]
    return write_files(folder, {"tokenizer_config.json": about, "tokenizer.json": tokens})


def own_ids(folder, texts=TEXTS, types=False):
    """Token ids by tokenizer.json alone; or pairs of them with their token_type_ids."""
    tokens = Tokenizer.from_file(str(Path(folder, "tokenizer.json")))
    tokens.no_padding()
    tokens.no_truncation()
    encoded = tokens.encode_batch(list(texts))
    return [(row.ids, row.type_ids) if types else row.ids for row in encoded]


@torch.no_grad()
def alone(folder, pooling, texts=TEXTS, layer=-1):
    """Embeddings by transformers, one sentence at a time: no padding, no mask, no batch."""
    model, made = AutoModel.from_pretrained(folder, dtype=torch.float32).eval(), []
    for ids, types in own_ids(folder, texts, types=True):
        types = {"token_type_ids": torch.tensor([types])} if any(types) else {}
        found = model(torch.tensor([ids]), **types, output_hidden_states=True)
        states = (found.last_hidden_state if layer == -1 else found.hidden_states[layer])[0]
        made.append({"cls": states[0], "last": states[-1], "mean": states.mean(0)}[pooling])
    return torch.stack(made)


def metrics(folder):
    """The lines of metrics.jsonl: those of steps, those of epochs."""
    lines = [json.loads(line) for line in Path(folder, "metrics.jsonl").read_text().splitlines()]
    return [[line for line in lines if ("end_of_epoch" in line) == e] for e in (False, True)]


def before_each_step(do, patch=None):
    """From here on, do(n, objective) happens before the n-th training step."""
    numbers, step = count(1), talas.training_step

    def watched(objective, *rest):
        do(next(numbers), objective)
        return step(objective, *rest)

    (patch or pytest.MonkeyPatch()).setattr(talas, "training_step", watched)


def start_process(action, **environment):
    """Begin an action in a process of its own and return its number; skip where none forks well."""
    if sys.platform != "linux":
        pytest.skip("needs Linux's fork and signals")
    if pid := os.fork():
        return pid
    signal.alarm(120)  # none waits for ever for another
    try:
        os.environ |= environment
        action()
        os._exit(0)
    except SystemExit as stopped:
        os._exit(stopped.code)
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(99)


def in_a_process(action):
    """Run an action in a process of its own; returns its exit code, or minus the signal."""
    return os.waitstatus_to_exitcode(os.waitpid(start_process(action), 0)[1])


def in_two_processes(action):
    """Run an action in two processes, as torchrun does; returns the exit code of each."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2"}
    pids = [start_process(action, RANK=rank, LOCAL_RANK=rank, **where) for rank in "01"]
    return [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
