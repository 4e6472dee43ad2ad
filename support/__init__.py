"""What keeps a run safe, so that the three scripts can be about the paper.

files.py: files are whole or absent; data.py: sentences and benchmarks; loading.py: models as their
authors wrote them; encoder.py: sentences to embeddings; run.py: training that can be interrupted.
"""

import sys
from contextlib import contextmanager


def fail(message):
    """End the program with exit code 2 and one line on standard error: a mistake of the user's."""
    print("error:", " ".join(message.split()), file=sys.stderr)
    raise SystemExit(2)


@contextmanager
def attempt(what, *errors):
    """Turn the `errors` of a call that reads or writes into one line: cannot `what`, and why.

    Put it around that call alone, so that a bug keeps its traceback. Default: OSError, ValueError.
    """
    try:
        yield
    except errors or (OSError, ValueError) as error:  # noqa: B030 - it is a tuple of classes
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        fail(f"cannot {what}: {reason}")


@contextmanager
def interruptible(advice):
    """Turn Ctrl-C into one line that says how to continue."""
    try:
        yield
    except KeyboardInterrupt:
        print(file=sys.stderr)  # the progress bar has not ended its line
        fail(f"interrupted; {advice}")


def positive(text):
    """An integer of at least 1, for argparse."""
    value = int(text)
    if value < 1:
        raise ValueError
    return value
