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
from helpers import *  # noqa: F403 - until no test takes them from here
from helpers import SENTENCES, SOURCES, random_rows, small_bert, small_cache, write_files

put = write_files
rows = random_rows
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


def cosines(a, b):
    """Of each row of (n, d) with each row of (m, d): (n, m)."""
    return a @ b.T / a.norm(dim=1)[:, None] / b.norm(dim=1)


def plain_tamd(layers, projections, teacher):
    """Eq. 3."""
    pairs = zip(layers, projections, strict=True)
    return torch.stack([1 - cosines(E @ W, teacher).diag() for E, W in pairs]).mean()


def plain_lasd(layers, detach_guide=False):
    """Eqs. 4-5."""
    R = [cosines(E, E) for E in layers]
    guides = [r.detach() if detach_guide else r for r in R[1:]]
    return sum(((up - low) ** 2).sum() / len(low) ** 2 for up, low in zip(guides, R)) / len(guides)


def plain_simcse(z, z_prime, tau):
    """Eq. 6."""
    likeness = torch.exp(cosines(z, z_prime) / tau)
    return -torch.log(likeness.diag() / likeness.sum(1)).mean()


def plain_total(layers, projections, teacher, s):
    """Eq. 7 and its terms, of all L of (2, N, d_S): both views for SimCSE, the first for others."""
    first = [E[0] for E in layers]
    terms = {
        "simcse": plain_simcse(*layers[-1], s.temperature),
        "tamd": plain_tamd(first[len(first) - len(projections) :], projections, teacher),
        "lasd": plain_lasd(first[-s.lasd_layers :], s.detach_guide),  # 0: all
    }
    weights = s.lambda1, s.lambda2, s.lambda3
    return sum(weight * term for weight, term in zip(weights, terms.values())), terms


def plain_perturbed(w, gradient, loss, rho, eta):
    """Eqs. 2 and 9: the gradient of loss() at w + ε̂, and the loss there; w stays. eta None: SAM."""
    saved = [p.detach().clone() for p in w]
    T = [torch.ones_like(p) if eta is None else p.abs() + eta for p in saved]
    norm = torch.sqrt(sum(((t * g) ** 2).sum() for t, g in zip(T, gradient)))
    for p, t, g in zip(w, T, gradient):
        p.data += rho * t**2 * g / norm
    perturbed = loss()
    gradient = torch.autograd.grad(perturbed, w)
    for p, before in zip(w, saved):
        p.data = before
    return gradient, perturbed
