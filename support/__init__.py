"""What keeps a run safe, so that the three scripts can be about the paper.

files.py: files whole or not there; run.py: training runs, devices, processes; data.py: sentences
and benchmarks; encoder.py: sentences to embeddings; loading.py: models that are understood.
"""

import functools
import os
import sys
from errno import EBADF, EIO, ENOSPC, EPIPE


def fail(message):
    """End with exit code 2 and one line on standard error: the user's mistake, not a bug."""
    line = " ".join(str(message).splitlines())
    print("error:", line if len(line) < 600 else f"{line[:590]} ...", file=sys.stderr)
    raise SystemExit(2)


def one_line(main):
    """Wrap a script's main so that Ctrl-C and a closed or narrow terminal end in one line, too."""

    @functools.wraps(main)
    def run(argv=None):
        for name in ("stdout", "stderr"):
            stream = getattr(sys, name) or open(os.devnull, "w")  # None if it was closed
            if hasattr(stream, "reconfigure"):  # not in a notebook
                stream.reconfigure(errors="replace")  # ASCII alone must not cost a table
            setattr(sys, name, stream)
        try:
            try:
                main(argv)
            finally:
                sys.stdout.flush()
        except KeyboardInterrupt:
            fail("interrupted")
        except OSError as error:
            if error.errno not in (EPIPE, ENOSPC, EIO, EBADF) or error.filename is not None:
                raise
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            fail(f"standard output was lost: {error.strerror}")

    return run


def _report(kind, error, trace):
    """Report Ctrl-C while the libraries are still being imported in one line, too."""
    if not issubclass(kind, KeyboardInterrupt):
        return sys.__excepthook__(kind, error, trace)
    print("error: interrupted", file=sys.stderr, flush=True)
    os._exit(2)


sys.excepthook = _report
