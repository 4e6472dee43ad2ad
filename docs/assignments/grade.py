"""Grade talas.py, the six exercises in it: points, and a line on what failed.

    python grade.py                       # all of them
    python grade.py 2 4                   # some of them
    python grade.py --json results.json   # in Gradescope's format, too

Each exercise runs in a process of its own with a time limit, so that an endless loop or a crash
costs the points of that exercise alone.
"""

import argparse
import ast
import contextlib
import json
import multiprocessing
import os
import signal
import sys
import tokenize
import traceback
import types
from pathlib import Path

import torch
from checks import EXERCISES, Wrong

SUBMISSION = Path(__file__).parent / "talas.py"
LOADED, LOADING = "loaded", 60  # seconds for what stands outside the submission's functions


def read():
    """The submission's text, as Python decodes it: with a byte order mark, a declared encoding."""
    with tokenize.open(SUBMISSION) as file:
        return file.read()


def load():
    """The submission as the module talas."""
    code, module = compile(read(), str(SUBMISSION), "exec"), types.ModuleType("talas")
    module.__file__, sys.modules["talas"] = str(SUBMISSION), module
    exec(code, module.__dict__)
    return module


def tell(error):
    """One line about an error: what, and where in the submission."""
    words = " ".join(str(error).split())[:300]
    if isinstance(error, Wrong):
        return words
    if isinstance(error, NotImplementedError) and words.startswith("Exercise"):
        return f"not written yet ({words})"
    frames = traceback.extract_tb(error.__traceback__)
    lines = [frame.lineno for frame in frames if frame.filename == str(SUBMISSION)]
    place = f", line {lines[-1]} of {SUBMISSION.name}" if lines else ""
    return f"{type(error).__name__}{': ' if words else ''}{words}{place}"


def judge(number, talas):
    """(whether an exercise is right, one line on it)."""
    try:
        for check in EXERCISES[number][2]:
            torch.manual_seed(0)
            check(talas)
    except (Exception, SystemExit) as error:
        return False, tell(error)
    return True, "right"


def work(number, pipe):
    """Load the submission, judge one exercise, send what is found: all in a process of its own."""
    if hasattr(os, "setsid"):
        os.setsid()  # a group, so that what it starts can be ended with it
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in (1, 2):  # what a submission prints is not for the table
        os.dup2(nowhere, stream)
    torch.set_num_threads(1)
    try:
        talas = load()
    except (Exception, SystemExit) as error:
        pipe.send((False, f"{SUBMISSION.name} does not load: {tell(error)}"))
    else:
        pipe.send(LOADED)
        pipe.send(judge(number, talas))


def grade(number, limit):
    """(whether the submission loads, whether an exercise of it is right, one line on it).

    The exercise has `limit` seconds once the submission is loaded.
    """
    # a fork has the libraries loaded already; elsewhere than on Linux they do not survive one
    processes = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
    receiver, sender = processes.Pipe(duplex=False)
    worker = processes.Process(target=work, args=(number, sender), daemon=True)
    worker.start()
    sender.close()
    loaded = False
    try:
        for seconds in (LOADING, limit):
            if not receiver.poll(seconds):
                return loaded, False, f"no result after {seconds:g} s: an endless loop?"
            found = receiver.recv()
            if found != LOADED:
                return loaded, *found
            loaded = True
    except EOFError:
        worker.join()
        return loaded, False, f"the process ended without a result (exit code {worker.exitcode})"
    finally:
        worker.kill()
        with contextlib.suppress(AttributeError, OSError):  # Windows has no groups; or all ended
            os.killpg(worker.pid, signal.SIGKILL)
        worker.join()


def main(argv=None):
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    flag = parser.add_argument
    flag("exercises", nargs="*", type=int, help="their numbers; none: all")
    flag("--json", type=Path, help="write the results here, as Gradescope reads them")
    flag("--limit", type=float, default=30, help="seconds for an exercise")
    args = parser.parse_args(argv)
    if unknown := set(args.exercises) - set(EXERCISES):
        parser.exit(2, f"error: there is no exercise {min(unknown)}; choose of 1 to 6\n")
    if args.json and (args.json.is_dir() or not args.json.parent.is_dir()):
        parser.exit(2, f"error: --json {args.json} must be a file's name in a folder that exists\n")
    with contextlib.suppress(Exception, SystemExit):  # once for all, which tell what fails
        imports = [x for x in ast.parse(read()).body if isinstance(x, (ast.Import, ast.ImportFrom))]
        exec(compile(ast.Module(imports, []), SUBMISSION.name, "exec"), {})
    tests, loaded = [], True
    for number in dict.fromkeys(args.exercises or EXERCISES):
        name, points, _ = EXERCISES[number]
        if loaded:  # else the last answer is that of all
            loaded, right, line = grade(number, args.limit)
        test = {"name": f"Exercise {number}: {name}", "score": points if right else 0}
        tests.append(test | {"max_score": points, "output": line})
        wrong = "" if right else f"   {line}"
        print(f"{test['name']:<37} {test['score']:>3} of {points:>3}{wrong}", flush=True)
    reached, most = (sum(test[key] for test in tests) for key in ("score", "max_score"))
    print(f"{'Points':<37} {reached:>3} of {most:>3}")
    if args.json:
        args.json.write_text(json.dumps({"tests": tests}, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
