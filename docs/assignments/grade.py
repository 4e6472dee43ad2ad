"""Grade talas.py: points, and a line on each check.

    python grade.py                           # all exercises
    python grade.py 2 4 --json results.json   # some of them, in Gradescope's format, too

The checks run in a process of their own: an endless loop or a crash costs one check its points.
"""

import argparse
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

import checks
import torch

SUBMISSION = Path(__file__).parent / "talas.py"


def load():
    """The submission as the module talas, decoded as Python does it."""
    with tokenize.open(SUBMISSION) as file:
        code, module = compile(file.read(), str(SUBMISSION), "exec"), types.ModuleType("talas")
    module.__file__, sys.modules["talas"] = str(SUBMISSION), module
    exec(code, module.__dict__)
    return module


def tell(error):
    """One line about an error: what, and where in the submission."""
    words = " ".join(str(error).split())[:400]
    if isinstance(error, checks.Wrong):
        return words
    frames = traceback.extract_tb(error.__traceback__)
    lines = [frame.lineno for frame in frames if frame.filename == str(SUBMISSION)]
    place = f", line {lines[-1]} of talas.py" if lines else ""
    return f"{type(error).__name__}{': ' if words else ''}{words}{place}"


def judge(check, talas):
    """(whether a check is passed, one line: its last values, or what is wrong and a hint)."""
    checks.NOTES.clear()
    torch.manual_seed(0)
    try:
        check(talas)
    except (Exception, SystemExit) as error:
        return False, f"{tell(error)}. Hint: {check.__doc__.split('. ', 1)[1]}"
    return True, checks.NOTES[0]


def work(todo, pipe):
    """Load the submission, send "" or why it does not load, then what is found of each check."""
    if hasattr(os, "setsid"):
        os.setsid()  # a group, so that what it starts can be ended with it
    nowhere, own = os.open(os.devnull, os.O_WRONLY), os.getpid()
    for stream in (1, 2):  # what a submission prints is not for the table
        os.dup2(nowhere, stream)
    torch.set_num_threads(1)
    try:
        talas = load()
    except (Exception, SystemExit) as error:
        return pipe.send(f"{SUBMISSION.name} does not load: {tell(error)}")
    pipe.send("")
    for check in todo:
        found = judge(check, talas)
        if os.getpid() == own:  # else it is a child that the submission left
            pipe.send(found)


def results(todo, limit):
    """(passed, line) of each check; after one that ends or outlasts its process a new one works."""
    # a fork has the libraries loaded already; elsewhere than on Linux they do not survive one
    processes = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
    while todo:
        receiver, sender = processes.Pipe(duplex=False)
        worker = processes.Process(target=work, args=(todo, sender), daemon=True)
        worker.start()
        sender.close()
        line = f"no result after {limit:g} s: an endless loop?"
        try:
            if why := receiver.recv() if receiver.poll(60) else "talas.py does not load in 60 s":
                yield from [(False, why)] * len(todo)
                return
            while todo and receiver.poll(limit):
                yield receiver.recv()
                todo = todo[1:]
        except EOFError:
            worker.join()
            line = f"the process ended without a result (exit code {worker.exitcode})"
        finally:
            worker.kill()
            with contextlib.suppress(AttributeError, OSError):  # Windows has no groups; all ended
                os.killpg(worker.pid, signal.SIGKILL)
            worker.join()
        if todo:
            yield False, line
            todo = todo[1:]


def main(argv=None):
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    flag = parser.add_argument
    flag("exercises", nargs="*", type=int, help="their numbers; none: all")
    flag("--json", type=Path, help="write the results here, as Gradescope reads them")
    flag("--limit", type=float, default=30, help="seconds for a check")
    args = parser.parse_args(argv)
    if unknown := set(args.exercises) - set(checks.EXERCISES):
        parser.exit(2, f"error: there is no exercise {min(unknown)}; choose of 0 to 7\n")
    if args.json and (args.json.is_dir() or not args.json.parent.is_dir()):
        parser.exit(2, f"error: --json {args.json} must be a file's name in a folder that exists\n")
    tests, todo = [], []
    for number in dict.fromkeys(args.exercises or checks.EXERCISES):
        todo += [x for x in vars(checks.EXERCISES[number]).values() if callable(x)]
    for check, (right, line) in zip(todo, results(todo, args.limit)):
        name, points = check.__qualname__.replace(".", ": "), int(check.__doc__.split()[0])
        score = {"score": points * right, "max_score": points}
        tests.append({"name": name, "output": line} | score)
        print(f"{name:<28} {points * right:>3} of {points:>3}   {line}", flush=True)
    reached, most = (sum(test[key] for test in tests) for key in ("score", "max_score"))
    print(f"{'Points':<28} {reached:>3} of {most:>3}")
    if args.json:
        args.json.write_text(json.dumps({"tests": tests}, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
