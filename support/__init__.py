"""What keeps a run safe, so that the three scripts can be about the paper.

files.py: files whole or absent; data.py: sentences and benchmarks; loading.py: models that are
understood; encoder.py: sentences to embeddings; run.py: training that can be interrupted.
"""

import sys
from contextlib import contextmanager


def fail(message):
    """End with exit code 2 and one line on standard error: the user's mistake, not a bug."""
    line = " ".join(str(message).split())
    print("error:", line if len(line) < 600 else f"{line[:590]} ...", file=sys.stderr)
    raise SystemExit(2)


@contextmanager
def attempt(what, *errors):
    """Make the `errors` of reading a file or a model one line; keep the block small.

    Without any: OSError and ValueError.
    """
    try:
        yield
    except errors or (OSError, ValueError) as error:  # noqa: B030 - it is a tuple of classes
        plain = isinstance(error, OSError) and error.strerror
        fail(f"cannot {what}: {plain or str(error) or type(error).__name__}")


@contextmanager
def interruptible(advice):
    """Make Ctrl-C in this block one line that says how to go on."""
    try:
        yield
    except KeyboardInterrupt:
        print(file=sys.stderr)  # a progress bar ends where it is
        fail(f"interrupted; {advice}")
