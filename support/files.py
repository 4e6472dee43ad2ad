"""Files that are whole or not there, and one line for each error around them."""

from support import fail

import hashlib
import json
import os
import pickle
from contextlib import contextmanager, suppress
from errno import ENOSPC
from pathlib import Path

import numpy as np
import torch
from filelock import FileLock, Timeout


def reason(error):
    """Why something failed, in a few words."""
    link = error
    while link and getattr(link, "errno", None) != ENOSPC:
        link = link.__cause__ or link.__context__
    told = link or error  # torch.save hides a full disk behind an error of its own
    if isinstance(told, OSError) and told.strerror:
        return told.strerror
    if isinstance(error, pickle.UnpicklingError):
        return "it holds more than tensors and plain values"
    words = " ".join(str(error).split())
    return words if isinstance(error, (OSError, ValueError)) else f"{type(error).__name__}: {words}"


@contextmanager
def attempt(what):
    """Make any error in this block one line, the fault of the user's file: keep the block small."""
    try:
        yield
    except NameError:
        raise  # no file's fault
    except Exception as error:
        fail(f"cannot {what}: {reason(error)}")


@contextmanager
def whole(path):
    """A temporary path to write to; it takes the place of `path` when the block has ended well."""
    partial = Path(f"{path}.partial")
    try:
        with attempt(f"write {path}"):
            yield partial
            os.replace(partial, path)
    finally:
        with suppress(OSError, ValueError):
            partial.unlink()


def save(path, content):
    """torch.save, whole or not at all."""
    with whole(path) as partial, open(partial, "wb") as file:
        torch.save(content, file)


def load(path):
    """torch.load of tensors and plain values; runs no code of the file's, and leaves it on disk."""
    with attempt(f"read {path}"):
        return torch.load(path, weights_only=True, mmap=True, map_location="cpu")


def write_json(path, content):
    """A JSON file, whole or not at all."""
    text = json.dumps(content, indent=2) + "\n"
    with whole(path) as partial:
        partial.write_text(text, encoding="utf-8")


def keep_apart(output, **inputs):
    """End the program if the output is one of the inputs: a flag's name and its path each."""
    for flag, path in inputs.items():
        with suppress(OSError, ValueError):
            if os.path.samefile(output, path):
                fail(f"--output {output} is the --{flag} itself; choose another --output")


def check_writable(path):
    """End the program if neither this name nor a longer, temporary one can be written there."""
    with attempt(f"write {path}"):
        str(path).encode()  # not every library takes another name than in UTF-8
        longest = Path(f"{Path(path).absolute()}.may-i-write-{os.getpid():010}")
        longest.parent.mkdir(parents=True, exist_ok=True)
        longest.touch(exist_ok=False)
        longest.unlink()


@contextmanager
def alone(output):
    """Keep other runs from writing to this output, a file or a folder, while the block lasts."""
    path = Path(output).absolute()
    path = path.with_name(f".{path.name}.talas-lock")
    lock, made = FileLock(path), [one for one in path.parents if not os.path.exists(one)]
    check_writable(output)
    with attempt(f"write {output}"):
        try:
            lock.acquire(timeout=0)
        except Timeout:
            fail(f"another run is writing to {output}; choose another --output")
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        lock.release()
        with suppress(OSError):  # a run that wrote nothing leaves no folder behind
            for folder in made:
                folder.rmdir()


def positive(text):
    """An integer of at least 1, for argparse."""
    if not 1 <= int(text) < 2**31:
        raise ValueError
    return int(text)


def digest(*parts):
    """A hash of plain values, arrays and tensors, in their order."""
    total = hashlib.sha256()
    for part in parts:
        if isinstance(part, torch.Tensor):
            for values in part.detach().reshape(-1).split(1 << 24):  # a large one may lie on disk
                total.update(values.cpu().view(torch.uint8).numpy())
        else:
            total.update(part if isinstance(part, np.ndarray) else json.dumps(part).encode())
    return total.hexdigest()
