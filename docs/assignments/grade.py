"""Grade talas.py: points, and a line on each check.

    python grade.py                           # all exercises
    python grade.py 2 4 --json results.json   # some of them, in Gradescope's format, too
    python grade.py --leaderboard student     # the Avg of a trained student, within the budget

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
from pathlib import Path

import checks
import torch

from support import attempt, fail
from support.files import check_output, write_json
from support.run import read_metrics

STEPS, BATCH = 187, 32  # the demo's default run
SUBMISSION = Path(__file__).parent / "talas.py"


def load():
    """The submission as the module talas, decoded as Python does it."""
    with tokenize.open(SUBMISSION) as file:
        code, module = compile(file.read(), str(SUBMISSION), "exec"), type(sys)("talas")
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
        checks.run(check, talas)
    except (Exception, SystemExit) as error:
        return False, f"{tell(error)}. Hint: {check['hint']}"
    return True, checks.NOTES[0]


def work(todo, pipe):
    """Load the submission, send "" or why it does not load, then what is found of each check."""
    getattr(os, "setsid", bool)()  # a group, so that what it starts can be ended with it
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


def grade(todo, limit):
    """Do the checks, print a line on each, and return them in Gradescope's form."""
    tests = []
    for check, (right, line) in zip(todo, results(todo, limit)):
        name, points = check["name"], check["points"]
        tests.append({"name": name, "output": line, "score": points * right, "max_score": points})
        print(f"{name:<28} {points * right:>3} of {points:>3}   {line}", flush=True)
    reached, most = (sum(test[key] for test in tests) for key in ("score", "max_score"))
    print(f"{'Points':<28} {reached:>3} of {most:>3}")
    return {"tests": tests}


def leaderboard(folder):
    """Gradescope's form of a trained student's Avg on the demo, if it was within the budget."""
    import eval as evaluation  # slow to import, and for this alone

    with attempt(f"find a trained student in {folder}", OSError, ValueError, KeyError, TypeError):
        batch = json.loads((folder / "talas.json").read_text("utf-8"))["settings"]["batch_size"]
        steps = max(line["step"] for line in read_metrics(folder))
    if steps > STEPS or batch > BATCH:
        fail(f"{folder}: {steps} steps of {batch} sentences; at most {STEPS} of {BATCH} count")
    with contextlib.redirect_stdout(sys.stderr):  # of what eval.py has to say
        args, tasks = evaluation.parse_args([str(folder)]), evaluation.load_tasks("demo", None)
        scores = evaluation.evaluate(str(folder), "auto", *tasks, args)
    board = [{"name": "Avg", "value": round(scores["avg"], 2)}]
    print(json.dumps(board))
    return {"leaderboard": board}


def main(argv=None):
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    flag, parser.error = parser.add_argument, fail
    flag("exercises", nargs="*", type=int, help="their numbers; none: all")
    flag("--json", type=Path, help="write the results here, as Gradescope reads them")
    flag("--limit", type=float, default=30, help="seconds for a check")
    flag("--leaderboard", type=Path, help="score this trained student on the demo, grade nothing")
    args = parser.parse_args(argv)
    if unknown := set(args.exercises) - set(range(8)):
        fail(f"there is no exercise {min(unknown)}; choose of 0 to 7")
    if args.json:
        check_output("--json", str(args.json))
        with attempt(f"read {args.json}"):
            there = json.loads(args.json.read_text("utf-8")) if args.json.exists() else {}
    todo = [c for c in checks.CHECKS if not args.exercises or c["exercise"] in args.exercises]
    found = leaderboard(args.leaderboard) if args.leaderboard else grade(todo, args.limit)
    if args.json:
        write_json(args.json, there | found)


if __name__ == "__main__":
    main()
