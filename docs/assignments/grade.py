"""Grade talas.py: points, and a line on each check.

    python grade.py                           # all exercises
    python grade.py 2 4 --json results.json   # two of them; results in Gradescope's format
    python grade.py --leaderboard student     # the Avg of a trained student, within the budget

The checks run in a process of their own: an endless loop or a crash costs one check its points.
"""

import argparse
import contextlib
import json
import math
import multiprocessing
import os
import signal
import sys
import tempfile
import tokenize
import traceback
from pathlib import Path

try:
    import resource
except ImportError:  # Windows has no such limits
    resource = None

try:
    import checks
    import torch

    from support import attempt, fail
    from support.data import read_table, unique_corpus
    from support.files import check_output, digest, read_json, write_json
except ModuleNotFoundError as error:
    advice = "install requirements.txt, and run grade.py in the folder that make.py writes"
    print(f"error: {error}; {advice}", file=sys.stderr)
    raise SystemExit(2) from None

STEPS, BATCH = 187, 32  # the demo's default run
WALL_CLOCK = 4  # seconds for each second of CPU time: the machine may be busy
SUBMISSION = Path(__file__).parent / "talas.py"


# ------------------------------------------------------------------------------- in the worker
def load():
    """The submission as the module talas, decoded as Python does it."""
    with tokenize.open(SUBMISSION) as file:
        code = compile(file.read(), str(SUBMISSION), "exec")
    module = type(sys)("talas")
    module.__file__ = str(SUBMISSION)
    sys.modules["talas"] = module
    exec(code, module.__dict__)
    return module


def describe(error):
    """An error in one line: what it says, and where in the submission it happened."""
    message = " ".join(str(error).split())[:400].rstrip(".")
    if isinstance(error, checks.Wrong):
        return message
    frames = traceback.extract_tb(error.__traceback__)
    lines = [frame.lineno for frame in frames if frame.filename == str(SUBMISSION)]
    text = type(error).__name__
    if message:
        text += f": {message}"
    if lines:
        text += f", line {lines[-1]} of talas.py"
    return text


def judge(check, talas):
    """(whether a check is passed, one line: what was compared, or what is wrong and a hint)."""
    torch.manual_seed(0)
    try:
        return True, checks.run(check, talas)
    except (Exception, SystemExit) as error:
        return False, f"{describe(error)}. Hint: {check['hint']}"


def limit_cpu(seconds):
    """End this process when it has used so many more seconds of CPU time."""
    if resource:
        usage = resource.getrusage(resource.RUSAGE_SELF)
        end = math.ceil(usage.ru_utime + usage.ru_stime + seconds)
        resource.setrlimit(resource.RLIMIT_CPU, (end, resource.RLIM_INFINITY))


def work(todo, limit, pipe):
    """Load the submission; send "" or why it does not load, then the result of each check."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)  # what a submission prints does not belong in the table
    os.dup2(nowhere, 2)
    torch.set_num_threads(1)
    limit_cpu(limit)
    try:
        talas = load()
    except (Exception, SystemExit) as error:
        pipe.send(f"{SUBMISSION.name} does not load: {describe(error)}")
        return
    pipe.send("")
    for check in todo:
        limit_cpu(limit)
        pipe.send(judge(check, talas))


# ------------------------------------------------------------------------- in the main process
def results(todo, limit):
    """Yield (passed, line) for each check.

    A check that ends its process, or outlasts it, is lost; a new process does the others.
    """
    # a fork has loaded the libraries already; macOS's libraries do not survive one
    processes = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
    while todo:
        receiver, sender = processes.Pipe(duplex=False)
        worker = processes.Process(target=work, args=(todo, limit, sender), daemon=True)
        worker.start()
        sender.close()
        line = f"no result after {WALL_CLOCK * limit:g} s"
        try:
            load_error = receiver.recv() if receiver.poll(60) else "talas.py does not load in 60 s"
            if load_error:
                yield from [(False, load_error)] * len(todo)
                return
            while todo and receiver.poll(WALL_CLOCK * limit):
                yield receiver.recv()
                todo = todo[1:]
        except EOFError:
            worker.join()
            line = f"the process ended without a result (exit code {worker.exitcode})"
            if resource and worker.exitcode == -signal.SIGXCPU:
                line = f"no result after {limit:g} s of CPU time: an endless loop?"
        finally:
            worker.kill()
            worker.join()
        if todo:
            yield False, line
            todo = todo[1:]


def grade(todo, limit):
    """Do the checks, print a line on each, and return them in Gradescope's form."""
    tests = []
    for check, (passed, line) in zip(todo, results(todo, limit)):
        name, points = check["name"], check["points"]
        score = points if passed else 0
        tests.append({"name": name, "output": line, "score": score, "max_score": points})
        print(f"{name:<28} {score:>3} of {points:>3}   {line}", flush=True)
    score = sum(test["score"] for test in tests)
    points = sum(test["max_score"] for test in tests)
    print(f"{'Points':<28} {score:>3} of {points:>3}")
    return {"tests": tests}


def check_budget(folder):
    """End the program unless a student was trained as the leaderboard asks."""
    with attempt(f"find a trained student in {folder}", OSError, ValueError, KeyError, TypeError):
        record = json.loads((folder / "talas.json").read_text("utf-8"))
        student = record["settings"]["student"]
        batch = record["settings"]["batch_size"]
        teacher, corpus = record["teacher"], record["corpus"]
        steps = max(line["step"] for line in read_table(folder / "metrics.jsonl"))
    if student != "tiny":
        fail(f"{folder}: --student {student}; only tiny, from scratch, counts")
    sentences, *_ = unique_corpus("demo")
    if teacher != "lsa" or corpus != digest(sentences):
        fail(f"{folder}: another teacher or corpus; only the demo's teacher.pt counts")
    if steps > STEPS or batch > BATCH:
        fail(f"{folder}: {steps} steps of {batch} sentences; at most {STEPS} of {BATCH} count")


def leaderboard(folder):
    """Gradescope's form of a trained student's Avg on the demo."""
    import eval as evaluation  # slow to import, and needed here alone

    check_budget(folder)
    with tempfile.TemporaryDirectory() as temporary:
        scores = Path(temporary, "scores.json")
        with contextlib.redirect_stdout(sys.stderr):
            evaluation.main([str(folder), "--json", str(scores)])
        avg = read_json(scores)[str(folder)]["avg"]
    board = [{"name": "Avg", "value": round(avg, 2)}]
    print(json.dumps(board))
    return {"leaderboard": board}


def main(argv=None):
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.error = fail
    flag = parser.add_argument
    flag("exercises", nargs="*", type=int, help="their numbers; none: all")
    flag("--json", type=Path, help="write the results here, in Gradescope's format")
    flag("--limit", type=float, default=30, help="seconds of CPU time for a check")
    flag("--leaderboard", type=Path, help="score this trained student on the demo, grade nothing")
    args = parser.parse_args(argv)
    for exercise in args.exercises:
        if exercise not in range(8):
            fail(f"there is no exercise {exercise}; choose from 0 to 7")
    earlier = {}
    if args.json:
        check_output("--json", str(args.json))
        earlier = read_json(args.json)
    if args.leaderboard:
        new = leaderboard(args.leaderboard)
    else:
        chosen = args.exercises or range(8)
        new = grade([check for check in checks.CHECKS if check["exercise"] in chosen], args.limit)
    if args.json:
        write_json(args.json, earlier | new)


if __name__ == "__main__":
    main()
