"""What the tests share: the scripts on the path, and models and corpora small enough to build in a moment."""

import json
import os
import socket
import sys
import time
import traceback
from pathlib import Path

os.environ["CUDA_VISIBLE_DEVICES"] = ""  # bit-for-bit equality, and forked processes, are the CPU's

import pytest
import torch
from transformers import BertConfig, BertModel

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

SCENES = [f"The {who} {does} the {what} in the {where}" for who in ("cook", "nurse", "pilot", "clown") for does in ("sees", "paints")
          for what in ("door", "boat", "rose") for where in ("garden", "harbour")]  # fmt: skip
SENTENCES = [
    scene + " and then home" * (i % 5) + "." for i, scene in enumerate(SCENES)
]  # of five lengths


@pytest.fixture
def sentences():
    """48 distinct sentences."""
    return list(SENTENCES)


@pytest.fixture
def corpus(tmp_path):
    """A .jsonl corpus of the 48 sentences, from two domains."""
    path = tmp_path / "corpus.jsonl"
    path.write_text(
        "".join(
            json.dumps({"text": text, "source": "ab"[i % 2]}) + "\n"
            for i, text in enumerate(SENTENCES)
        )
    )
    return path


def small_bert(folder, seed=0, layers=3, **config):
    """Write a BERT with random weights and a vocabulary of its own to `folder`, as transformers does."""
    from demo.tiny import tiny_student

    model, tokenizer, _ = tiny_student(SENTENCES, seed)
    torch.manual_seed(seed)
    sizes = {
        "hidden_size": 32,
        "num_attention_heads": 2,
        "intermediate_size": 64,
        "max_position_embeddings": 64,
    }
    model = BertModel(
        BertConfig(vocab_size=len(tokenizer), num_hidden_layers=layers, **(sizes | config))
    )
    model.save_pretrained(folder)
    tokenizer.model_max_length = 64
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def bert(tmp_path):
    """A directory with a small BERT of 3 layers and 32 dimensions."""
    return small_bert(tmp_path / "bert")


@pytest.fixture
def ends_with_one_line(capsys):
    """Checks that a call ends with exit code 2 and one line on standard error that holds the given words."""

    def check(call, *words):
        with pytest.raises(SystemExit) as stopped:
            call()
        error = capsys.readouterr().err.strip()
        assert stopped.value.code == 2
        assert len(error.splitlines()) == 1 and "Traceback" not in error, error
        for word in words:
            assert word in error, error

    return check


def start_process(action, **environment):
    """Begin an action in a process of its own, one thread (a fork has no others); returns its number."""
    pid = os.fork()
    if pid == 0:
        try:
            os.environ |= environment
            torch.set_num_threads(1)
            action()
            os._exit(0)
        except SystemExit as stopped:
            os._exit(stopped.code)
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(99)
    return pid


def in_a_process(action):
    """Run an action in a process of its own and return how it ended: its exit code, or minus a signal."""
    return os.waitstatus_to_exitcode(os.waitpid(start_process(action), 0)[1])


def in_two_processes(action):
    """Run an action in two processes that know each other as torchrun's do, and return how each of them ended."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        where = {
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(free.getsockname()[1]),
            "WORLD_SIZE": "2",
        }
    started = {
        start_process(action, RANK=rank, LOCAL_RANK=rank, **where): int(rank) for rank in "01"
    }
    codes, deadline = [None, None], time.monotonic() + 120
    while None in codes:
        time.sleep(0.05)
        for pid, i in started.items():
            if codes[i] is None and (status := os.waitpid(pid, os.WNOHANG))[0]:
                codes[i] = os.waitstatus_to_exitcode(status[1])
        if time.monotonic() > deadline or any(
            codes
        ):  # as torchrun does: if one fails, the others are stopped
            for pid, i in started.items():
                if codes[i] is None:
                    os.kill(pid, 9)
    return codes
