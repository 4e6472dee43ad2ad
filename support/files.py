"""Files that are whole or absent: no input is written over, nothing is replaced unasked."""

import hashlib
import json
import os
import pickle
import zipfile
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch

from support import attempt, fail

TOKENIZER_FILES = ("tokenizer*.json", "*_tokens*.json", "vocab.*", "merges.txt")
TOKENIZER_FILES += ("*.model", "*.bpe", "*.codes")
TORN = (OSError, ValueError, RuntimeError, EOFError, pickle.UnpicklingError, zipfile.BadZipFile)


@contextmanager
def whole(path):
    """A temporary path to write to; it takes the place of `path` when the block has ended well."""
    partial = Path(f"{path}.partial")
    try:
        with attempt(f"write {path}", OSError, RuntimeError):  # the latter is torch.save's own
            yield partial
            os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def save(path, content):
    """torch.save, whole or not at all."""
    with whole(path) as partial:
        torch.save(content, partial)


def write_json(path, content):
    """A JSON file, whole or not at all."""
    with whole(path) as partial:
        partial.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def read_json(path, needed=False):
    """What a JSON file holds; {} if there is no such file, unless it is `needed`."""
    with attempt(f"read {path}"):
        return json.loads(path.read_text("utf-8")) if needed or path.exists() else {}


def load(path, mmap=True):
    """torch.load of tensors and plain values; runs no code of the file's.

    With `mmap` the tensors stay on disk, unchecked; without, each is held against its checksum.
    """
    with attempt(f"read {path}", *TORN):
        with open(path, "rb") as file:
            if not zipfile.is_zipfile(file):
                raise ValueError("torch.save did not write it, or a part is missing (Git LFS?)")
        if not mmap and (torn := zipfile.ZipFile(path).testzip()):
            raise ValueError(f"it is damaged: {torn}")
        try:
            return torch.load(path, weights_only=True, mmap=mmap, map_location="cpu")
        except pickle.UnpicklingError:  # whose own words advise to run the file's code
            raise ValueError("it holds more than tensors and plain values, or is damaged") from None


def check_output(flag, path, **inputs):
    """End the program if a file can't be written there; inputs: other flags' names and paths."""
    out = Path(path)
    if not path or path.endswith("/") or out.is_dir() or not out.parent.is_dir():
        fail(f"{flag} {path!r} must be a file's name in a folder that exists")
    keep_apart(flag, out, **inputs)
    if out.is_symlink() or (out.exists() and not out.is_file()):
        fail(f"{flag} {out} is a link or no plain file; give the file's own name")
    with attempt(f"write {out}"):
        Path(f"{out}.partial").touch()
        Path(f"{out}.partial").unlink()


def keep_apart(flag, output, **inputs):
    """End the program if the output is one of the inputs: other flags' names and paths."""
    for name, path in inputs.items():
        if os.path.exists(output) and os.path.exists(path) and os.path.samefile(output, path):
            fail(f"{flag} {output} is the --{name} itself; choose another {flag}")


def positive(text):
    """An integer of at least 1, for argparse."""
    if not 1 <= int(text) < 2**31:
        raise ValueError
    return int(text)


def digest(*parts):
    """A hash of plain values, bytes, arrays and tensors, in their order."""
    total = hashlib.sha256()
    for part in parts:
        if isinstance(part, torch.Tensor):
            for values in part.detach().reshape(-1).split(1 << 24):  # a large one may lie on disk
                total.update(values.cpu().view(torch.uint8).numpy())
        else:
            raw = isinstance(part, (np.ndarray, bytes))
            total.update(part if raw else json.dumps(part).encode())
    return total.hexdigest()
