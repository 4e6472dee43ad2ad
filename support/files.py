"""Files are whole or absent; no input is overwritten."""

import hashlib
import json
import os
import pickle
from contextlib import contextmanager
from pathlib import Path

import torch

from support import attempt, fail

READ_ERRORS = (
    OSError,
    ValueError,
    RuntimeError,
    EOFError,
    pickle.UnpicklingError,
)


@contextmanager
def whole(path):
    """A temporary path to write to. It replaces `path` when the block ends without an error."""
    partial = Path(f"{path}.partial")
    try:
        with attempt(f"write {path}", OSError, RuntimeError):  # torch's own, on a full disk
            yield partial
            partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def save(path, content):
    """torch.save, whole or not at all."""
    with whole(path) as partial:
        torch.save(content, partial)


def write_json(path, content):
    """Write a JSON file, whole or not at all."""
    with whole(path) as partial:
        partial.write_text(json.dumps(content, indent=2) + "\n")


def read_json(path):
    """The content of a JSON file; {} if there is no such file."""
    if not path.exists():
        return {}
    with attempt(f"read {path}"):
        return json.loads(path.read_text("utf-8"))


def load(path, mmap=True):
    """torch.load of tensors and plain values; it runs no code of the file.

    With `mmap` the tensors stay on disk, so that Windows can't replace the file.
    """
    try:
        return torch.load(path, weights_only=True, mmap=mmap, map_location="cpu")
    except READ_ERRORS:  # torch's own message advises to run the file's code
        fail(
            f"cannot read {path}: it is missing, incomplete (an interrupted download, a Git LFS "
            "pointer?) or not a file of tensors and plain values that torch.save wrote"
        )


def check_output(flag, path):
    """End the program if no file can be written to the path of a flag."""
    if os.path.isdir(path):
        fail(f"{flag} {path} is not a file; give the name of a file")
    partial = Path(f"{path}.partial")
    with attempt(f"write {flag} {path}"):
        partial.touch()
        partial.unlink()


def keep_apart(output, flag, path):
    """End the program if --output is the path of another flag."""
    if os.path.exists(path) and os.path.realpath(path) == os.path.realpath(output):
        fail(f"--output {output} is the {flag} itself; choose another --output")


def digest(*parts):
    """A hash of plain values, bytes and tensors, in their order."""
    total = hashlib.sha256()
    for part in parts:
        if isinstance(part, torch.Tensor):  # without a copy: it may be large, and on disk
            part = part.reshape(-1).cpu().view(torch.uint8).numpy()
        elif not isinstance(part, bytes):
            part = json.dumps(part).encode()
        total.update(part)
    return total.hexdigest()
