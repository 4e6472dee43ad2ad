"""Grade talas.py, the six exercises in it: points, and a line on what failed.

    python grade.py                       # all of them
    python grade.py 2 4                   # some of them
    python grade.py --json results.json   # in Gradescope's format, too

Each exercise runs in a process of its own with a time limit, so that an endless loop, a crash or a
function that does not parse costs the points of that exercise alone.
"""

import argparse
import json
import multiprocessing
import os
import re
import sys
import types
from pathlib import Path

import torch
from checks import EXERCISES

SUBMISSION = Path(__file__).parent / "talas.py"
LOADED, LOADING = "loaded", 60  # seconds for the imports at the top of the submission


def blocks(source):
    """The source, cut before each function and class at its left margin, decorators included."""
    lines = source.splitlines(keepends=True)
    starts = [0]
    for i, line in enumerate(lines):
        if re.match(r"@|def |class ", line) and not lines[i - 1].startswith("@"):
            starts.append(i)
    return ["".join(lines[a:b]) for a, b in zip(starts, [*starts[1:], None])]


def mended(source):
    """The source, in which a function or class that does not parse is one that raises its error."""
    kept = []
    for block in blocks(source):
        try:
            compile(block, str(SUBMISSION), "exec")
        except SyntaxError as error:
            name = re.search(r"^(?:def|class) (\w+)", block, flags=re.M)
            if not name:
                raise
            line = "".join(kept).count("\n") + (error.lineno or 1)
            block_lines = block.count("\n")
            told = f"{error.msg}, line {line} of {SUBMISSION.name}"
            block = f"def {name[1]}(*_, **__): raise SyntaxError({told!r})" + "\n" * block_lines
        kept.append(block)
    return "".join(kept)


def load(path=SUBMISSION):
    """The submission as the module talas."""
    source = Path(path).read_text(encoding="utf-8")
    try:
        code = compile(source, str(path), "exec")
    except SyntaxError:
        code = compile(mended(source), str(path), "exec")
    module = types.ModuleType("talas")
    module.__file__, sys.modules["talas"] = str(path), module
    exec(code, module.__dict__)
    return module


def tell(error):
    """One line about an error: what, and where in the submission."""
    words = " ".join(str(error).split())[:300]
    if isinstance(error, NotImplementedError) and words.startswith("Exercise"):
        return f"not written yet ({words})"
    if isinstance(error, AssertionError):
        return words
    place, trace = "", error.__traceback__
    while trace:
        if Path(trace.tb_frame.f_code.co_filename).name == SUBMISSION.name:
            place = f", line {trace.tb_lineno} of {SUBMISSION.name}"
        trace = trace.tb_next
    if isinstance(error, SyntaxError):
        place = ""
    return f"{type(error).__name__}: {words}{place}"


def judge(number, talas):
    """What is wrong with an exercise, in one line; "" if nothing is."""
    for check in EXERCISES[number][2]:
        torch.manual_seed(0)
        try:
            check(talas)
        except (Exception, SystemExit) as error:
            return tell(error)
    return ""


def work(number, pipe):
    """Load the submission, judge one exercise, send the line. Runs in a process of its own."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)  # what a submission prints is not for the table
    os.dup2(nowhere, 2)
    torch.set_num_threads(1)
    try:
        talas = load()
    except (Exception, SystemExit) as error:
        pipe.send(f"{SUBMISSION.name} does not load: {tell(error)}")
        return
    pipe.send(LOADED)
    pipe.send(judge(number, talas))


def grade(number, limit):
    """judge(), in a process that has `limit` seconds once the submission is loaded."""
    # a fork has the libraries loaded already; elsewhere than on Linux they do not survive one
    processes = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
    receiver, sender = processes.Pipe(duplex=False)
    worker = processes.Process(target=work, args=(number, sender), daemon=True)
    worker.start()
    sender.close()
    try:
        for seconds in (LOADING, limit):
            if not receiver.poll(seconds):
                return f"no result after {seconds:g} s: an endless loop?"
            line = receiver.recv()
            if line != LOADED:
                return line
    except EOFError:
        worker.join()
        return f"the process ended without a result (exit code {worker.exitcode})"
    finally:
        worker.kill()
        worker.join()


def main():
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("exercises", nargs="*", type=int, help="their numbers; none: all")
    parser.add_argument(
        "--json", type=Path, help="write the results here, as Gradescope reads them"
    )
    parser.add_argument("--limit", type=float, default=30, help="seconds for an exercise")
    args = parser.parse_args()
    chosen = args.exercises or list(EXERCISES)
    if unknown := set(chosen) - set(EXERCISES):
        parser.error(f"there is no exercise {min(unknown)}; there are {len(EXERCISES)}")
    import cache_teacher  # noqa: F401 - loads the libraries once, for all exercises

    tests = []
    for number in chosen:
        name, points, _ = EXERCISES[number]
        wrong = grade(number, args.limit)
        score = 0 if wrong else points
        name = f"Exercise {number}: {name}"
        tests.append(
            {"name": name, "score": score, "max_score": points, "output": wrong or "right"}
        )
        print(f"{name:<37} {score:>3} of {points:>3}   {wrong}".rstrip(), flush=True)
    reached, most = (sum(test[key] for test in tests) for key in ("score", "max_score"))
    print(f"{'Points':<37} {reached:>3} of {most:>3}")
    if args.json:
        args.json.write_text(json.dumps({"tests": tests}, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
