"""Fixtures, and an environment in which no test writes to the user's home or asks the network."""

import os
import shutil
import signal
import sys
import tempfile
from pathlib import Path

HOME = tempfile.TemporaryDirectory(prefix="talas-tests-")
for name in ("HOME", "USERPROFILE", "HF_HOME", "XDG_CACHE_HOME", "TMPDIR", "TMP", "TEMP"):
    os.environ[name] = HOME.name
for name in ("HF_HUB_CACHE", "HF_DATASETS_CACHE", "HF_TOKEN", "RANK", "LOCAL_RANK", "WORLD_SIZE"):
    os.environ.pop(name, None)
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["CUDA_VISIBLE_DEVICES"] = ""
os.environ["TOKENIZERS_PARALLELISM"] = "false"
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
sys.path.insert(0, str(Path(__file__).parent.parent))

import pytest
import torch
from helpers import SENTENCES, SOURCES, small_bert, small_cache, write_files

torch.set_num_threads(1)  # a forked process has one; with as many the bits are equal


@pytest.fixture
def corpus(tmp_path):
    """A .jsonl file of the 48 sentences, from two sources."""
    rows = [{"text": text, "source": source} for text, source in zip(SENTENCES, SOURCES)]
    write_files(tmp_path, {"corpus.jsonl": rows})
    return tmp_path / "corpus.jsonl"


@pytest.fixture
def cache(tmp_path):
    """A teacher cache of the 48 sentences: random embeddings of 8 dimensions."""
    return small_cache(tmp_path / "teacher.pt")


@pytest.fixture(scope="session")
def shared_bert(tmp_path_factory):
    """The folder that the fixture bert copies."""
    return small_bert(tmp_path_factory.mktemp("shared") / "bert")


@pytest.fixture
def bert(tmp_path, shared_bert):
    """A directory with a small BERT of 3 layers and 32 dimensions."""
    return shutil.copytree(shared_bert, tmp_path / "bert")


@pytest.fixture
def here(tmp_path, corpus, cache, bert, monkeypatch):
    """The current folder, with corpus.jsonl, teacher.pt and bert."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def ends_with_one_line(capsys):
    """Check that a call ends with code 2 and one line, "error: ...", with the words; returns it."""

    def check(call, *words):
        capsys.readouterr()
        with pytest.raises(SystemExit) as stopped:
            call()
        error = capsys.readouterr().err
        assert stopped.value.code == 2
        assert error.startswith("error: ") and error.endswith("\n") and error.count("\n") == 1
        for word in words:
            assert word in error
        return error

    return check
