"""What several test files call: small models and caches, runs in processes of their own."""

import json
import multiprocessing
import os
import socket
import sys
from itertools import product
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer
from transformers import AutoModel, BertConfig, BertModel

import talas
from demo.tiny import tiny_student
from support.files import digest

ROOT = Path(__file__).parent.parent
WORDS = product(
    ["cook", "nurse", "pilot", "clown"],
    ["sees", "paints"],
    ["door", "boat", "rose"],
    ["garden", "harbour"],
)
SENTENCES = [  # 48, of five lengths
    f"The {who} {does} the {what} in the {where}{' and then home' * (i % 5)}."
    for i, (who, does, what, where) in enumerate(WORDS)
]
TEXTS = [*SENTENCES[:8], "The DOOR, a boat", "rose"]
SOURCES = ["a", "b", "a"] * 16  # two domains of different size


# -------------------------------------------------------------------------- tensors and files
def random_rows(*shape, seed=0, dtype=torch.float64):
    """Standard normal numbers of that seed, such as the embeddings of a batch."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


def write_files(folder, files):
    """Write {name: content}: bytes, text, the rows of a .jsonl, JSON. Returns the folder.

    A dict changes the keys of a JSON file that exists. None deletes the file.
    """
    for name, content in files.items():
        path = Path(folder, name)
        path.parent.mkdir(parents=True, exist_ok=True)
        if content is None:
            path.unlink()
            continue
        if isinstance(content, dict) and path.exists():
            content = json.loads(path.read_text()) | content
        if isinstance(content, list) and path.suffix == ".jsonl":
            content = "\n".join(json.dumps(row) for row in content)
        if isinstance(content, dict | list):
            content = json.dumps(content)
        if isinstance(content, str):
            content = content.encode()
        path.write_bytes(content)
    return folder


# ---------------------------------------------------------------------------- caches and models
def small_cache(path):
    """Write a teacher cache of the 48 sentences: random embeddings of 8 dimensions."""
    content = {
        "sentences": list(SENTENCES),
        "sources": list(SOURCES),
        "embeddings": random_rows(48, 8, seed=3, dtype=torch.float32),
        "teacher": "random",
        "pooling": "none",
        "max_length": 256,
        "version": 1,
        "fingerprint": digest(SENTENCES),
    }
    torch.save(content, path)
    return path


def small_bert(folder, seed=0, **config):
    """Write a BERT with random weights and the sentences' vocabulary. Returns its folder."""
    student = tiny_student(SENTENCES, seed=0)
    sizes = {
        "vocab_size": student.tokenizer.get_vocab_size(),
        "num_hidden_layers": 3,
        "hidden_size": 32,
        "num_attention_heads": 2,
        "intermediate_size": 64,
        "max_position_embeddings": 64,
        "initializer_range": 0.4,  # with BERT's own 0.02 all sentences get nearly the same vector
    }
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        BertModel(BertConfig(**(sizes | config))).save_pretrained(folder)
    student.tokenizer.no_truncation()
    tokenizer_config = {
        "tokenizer_class": "BertTokenizer",
        "model_max_length": 64,
        "pad_token": "[PAD]",
        "unk_token": "[UNK]",
        "cls_token": "[CLS]",
        "sep_token": "[SEP]",
    }
    files = {
        "tokenizer.json": student.tokenizer.to_str(),
        "tokenizer_config.json": tokenizer_config,
    }
    return write_files(folder, files)


def tokenize_alone(folder, texts=TEXTS):
    """The tokenizer.json's own encoding of each text: no padding, no truncation."""
    tokenizer = Tokenizer.from_file(str(Path(folder, "tokenizer.json")))
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer.encode_batch(list(texts))


def ids_alone(folder, texts=TEXTS):
    """Token ids as tokenizer.json gives them: no padding, no truncation."""
    return [encoding.ids for encoding in tokenize_alone(folder, texts)]


@torch.no_grad()
def embed_alone(folder, pooling, texts=TEXTS, layer=-1):
    """Embeddings by transformers, one sentence at a time: no padding, no mask, no batch."""
    model = AutoModel.from_pretrained(folder, dtype=torch.float32).eval()
    embeddings = []
    for encoding in tokenize_alone(folder, texts):
        inputs = {"input_ids": torch.tensor([encoding.ids])}
        if any(encoding.type_ids):
            inputs["token_type_ids"] = torch.tensor([encoding.type_ids])
        output = model(**inputs, output_hidden_states=True)
        hidden = output.last_hidden_state if layer == -1 else output.hidden_states[layer]
        if pooling == "mean":
            embeddings.append(hidden[0].mean(0))
        else:
            position = {"cls": 0, "last": -1}[pooling]
            embeddings.append(hidden[0, position])
    return torch.stack(embeddings)


# ----------------------------------------------------------------------------------------- runs
def metrics(folder):
    """The lines of metrics.jsonl: [those of steps, those of epochs]."""
    steps, epochs = [], []
    for text in Path(folder, "metrics.jsonl").read_text().splitlines():
        line = json.loads(text)
        if "end_of_epoch" in line:
            epochs.append(line)
        else:
            steps.append(line)
    return [steps, epochs]


def saved_weights(folder):
    """What a run saved, to the bit: (the file of the student's weights, the projections)."""
    projections = [W.tolist() for W in torch.load(Path(folder, "projections.pt"))]
    return Path(folder, "model.safetensors").read_bytes(), projections


def before_each_step(action, patch=None):
    """From here on, action(n, objective) is called before the n-th training step.

    Without pytest's monkeypatch, for the rest of this process.
    """
    training_step = talas.training_step
    steps = []

    def watched_step(objective, *arguments):
        steps.append(objective)
        action(len(steps), objective)
        return training_step(objective, *arguments)

    patch = patch or pytest.MonkeyPatch()
    patch.setattr(talas, "training_step", watched_step)


def run_with(environment, action):
    """Run an action with these environment variables."""
    os.environ |= environment
    action()


def start_process(action, environment):
    """Start an action in a forked process, which has these environment variables."""
    if sys.platform != "linux":
        pytest.skip("needs Linux's fork and signals")
    fork = multiprocessing.get_context("fork")
    process = fork.Process(target=run_with, args=(environment, action), daemon=True)
    process.start()
    return process


def exit_code(process):
    """The exit code of a process when it has ended, or minus the signal that killed it."""
    process.join(timeout=120)  # two processes must not wait for each other for ever
    return process.exitcode


def in_a_process(action):
    """Run an action in a process of its own; returns its exit code, or minus the signal."""
    return exit_code(start_process(action, {}))


def in_two_processes(action):
    """Run an action in two processes, as torchrun does; returns the exit code of each."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    started = []
    for rank in ("0", "1"):
        environment = {
            "RANK": rank,
            "LOCAL_RANK": rank,
            "WORLD_SIZE": "2",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
        }
        started.append(start_process(action, environment))
    return [exit_code(process) for process in started]
