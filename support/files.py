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

TORN = (OSError, ValueError, RuntimeError, EOFError, pickle.UnpicklingError, zipfile.BadZipFile)


@contextmanager
def whole(path):
    """A temporary path to write to; it takes the place of `path` when the block has ended well."""
    partial = Path(f"{path}.partial")
    try:
        with attempt(f"write {path}", OSError, RuntimeError):  # torch.save's own is the latter
            yield partial
            os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def save(path, content):
    """torch.save, whole or not at all."""
    with whole(path) as partial:
        torch.save(content, partial)


def load(path, mmap=True):
    """torch.load of tensors and plain values; runs no code of the file's.

    With `mmap` the tensors stay on disk, unchecked; without, each is held against its checksum.
    """
    if not zipfile.is_zipfile(path):  # also the error of a path that is not there, or a folder
        with attempt(f"read {path}"), open(path, "rb"):
            fail(f"{path} is no file that torch.save wrote, or only a part of one")
    with attempt(f"read {path}", *TORN):
        if not mmap:
            with zipfile.ZipFile(path) as archive:
                if torn := archive.testzip():
                    raise ValueError(f"{torn} in it is damaged")
        return torch.load(path, weights_only=True, mmap=mmap, map_location="cpu")


def write_json(path, content):
    """A JSON file, whole or not at all."""
    text = json.dumps(content, indent=2) + "\n"
    with whole(path) as partial:
        partial.write_text(text, encoding="utf-8")


def check_output(flag, path, **inputs):
    """End the program if a file can't be written there, or is one of the inputs: flags and paths.

    Before any work: the folder must be there, the name must not be a folder's or a link's.
    """
    path = Path(path)
    if str(path) in ("", ".") or path.is_dir() or not path.parent.is_dir():
        fail(f"{flag} {str(path)!r} must be a file's name in a folder that exists")
    keep_apart(flag, path, **inputs)
    if path.is_symlink() or (path.exists() and not path.is_file()):
        fail(f"{flag} {path} is a link or no plain file; give the file's own name")
    with attempt(f"write {path}"):
        Path(f"{path}.partial").touch()
        Path(f"{path}.partial").unlink()


def keep_apart(flag, output, **inputs):
    """End the program if the output is one of the inputs: a flag's name and its path each."""
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
            plain = not isinstance(part, (np.ndarray, bytes))
            total.update(json.dumps(part).encode() if plain else part)
    return total.hexdigest()
