"""The runs of the study: distil pairs with rows of the paper's tables, score them, keep everything.

    python study/run.py --pairs qwen3-0.6b --rows T STL STLA --seeds 42 43 44
    python study/run.py --pairs B --rows all --models real --embeddings mpnet.npy \
        --corpus corpus.jsonl --data DIR

A run that is in results.json is not run again; one that was interrupted goes on from its last whole
epoch. Start the same command twice, and two runs go on at a time. Flags that are not listed go to
talas.py (--epochs 1, --sharpness). Without a network there are the pairs A and B: the embeddings of
all-mpnet-base-v2, an array, into students of 6 and of 3 layers.
"""

import argparse
import shutil
import sys
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import asdict
from itertools import product
from pathlib import Path
from unittest import mock

sys.path.insert(0, str(Path(__file__).parent.parent))

from support import fail, one_line
from support.encoder import forward
from support.run import Checkpoint

import torch
from filelock import FileLock, Timeout

import cache_teacher
import eval as evaluation
import talas
from study import baselines, released
from study.results import RESULTS, describe, portable, read_json, record

H384, H768 = (f"nreimers/MiniLMv2-L6-{size}-distilled-from-BERT-Base" for size in ("H384", "H768"))
PAIRS = {  # teacher and student: Hub ids; of A and B, folders in --models
    "qwen3-0.6b": ("Qwen/Qwen3-Embedding-0.6B", H384),
    "bge-m3": ("BAAI/bge-m3", H768),
    "qwen3-4b": ("Qwen/Qwen3-Embedding-4B", "google-bert/bert-base-uncased"),
    "A": ("mpnet", "student6-cls"),
    "B": ("mpnet", "student-cls"),
}
LOCAL = ("A", "B")
ROWS = {  # the flags of talas.py; None: nothing is trained
    "teacher": None,
    "before": None,
    "S": "--lambda2 0 --lambda3 0 --optimizer adamw",
    "T": "--lambda1 0 --lambda3 0 --optimizer adamw",
    "ST": "--lambda3 0 --optimizer adamw",
    "STL": "--optimizer adamw",
    "TLA": "--lambda1 0",
    "STA": "--lambda3 0",
    "STLA": "",
    "STLA-rho-0.5": "--rho 0.5",
    "STLA-rho-1": "--rho 1",
    "STLA-rho-2": "--rho 2",
    "STLA-SAM": "--optimizer sam --rho 0.005",  # note 17
    "STLA-DISAM": "--optimizer disam --rho 0.005",
    "STLA-K-1": "--anchored_layers 1",
    "STLA-K-3": "--anchored_layers 3",
    "STL-lambda3-0.1": "--optimizer adamw --lambda3 0.1",
    "STL-lambda3-10": "--optimizer adamw --lambda3 10",
    "STL-detach_guide": "--optimizer adamw --detach_guide",
    "STLA-released": "",  # with released_behaviour()
    "released-code": "",  # the authors' own, from --released
    "distill": "--method distill",  # these four are by baselines.py
    "distill-mse": "--method distill --distance mse",
    "stella": "--method stella",
    "distillcse": "--method distillcse",
}


# ------------------------------------------------------------------- what is changed for the study
@contextmanager
def released_behaviour():
    """LASD from the embedding layer on (l = 0), and new dropout masks in the second pass.

    In these the released code differs from Eqs. 2 and 5 as talas.py reads them. Two more things
    stay as talas.py has them: the learning rate falls to 0 (not to 2e-6), and an epoch's last,
    incomplete batch is left out.
    """

    def with_layer_0(model, batch):
        return forward(model, batch, output_hidden_states=True).hidden_states

    def fork_rng(devices):
        return nullcontext()

    layers = mock.patch.object(talas, "hidden_states", with_layer_0)
    with layers, mock.patch.object(torch.random, "fork_rng", fork_rng):
        yield


@contextmanager
def epochs_kept(folder):
    """Keep the student after each epoch, too: folder/1, folder/2, ..."""
    save = Checkpoint.save

    def keep(self, epoch):
        if epoch and self.path.parent == folder.parent:  # not in stella's first stage
            weights = self.parts["weights"]
            talas.save_student(folder / str(epoch), weights.student, weights.projections)
        return save(self, epoch)

    with mock.patch.object(Checkpoint, "save", keep):
        yield


# --------------------------------------------------------------------------------------- the runs
def settings_of(row, flags):
    """The settings of a row that is run with these flags, and the main function that takes them."""
    if "--method" in (ROWS[row] or ""):
        return talas.parse_settings(flags, baselines.Settings), baselines.main
    return talas.parse_settings(flags), talas.main


def models_of(args, pair):
    """(teacher, student): Hub ids or paths."""
    return [str(args.models / name) if pair in LOCAL else name for name in PAIRS[pair]]


def make_cache(args, pair, path):
    """Run the pair's teacher, unless its cache is there; of A and B, take the array if given."""
    teacher, _ = models_of(args, pair)
    teacher = args.embeddings if pair in LOCAL and args.embeddings else teacher
    dtype = "bfloat16" if pair == "qwen3-4b" else "float32"
    about = ["--corpus", args.corpus, "--dtype", dtype, "--device", args.device]
    with FileLock(f"{path}.waiting"):
        cache_teacher.main(["--teacher", teacher, "--output", path, *about])


def kept(out, epochs):
    """The students that epochs_kept left, one an epoch; none unless all of them are there."""
    paths = [out / "epochs" / str(epoch) for epoch in range(1, epochs + 1)]
    return [str(path) for path in paths] if all(path.exists() for path in paths) else []


def train(args, pair, row, flags):
    """Train one row, unless its output holds just that; an interrupted training goes on."""
    s, program = settings_of(row, flags)
    out = Path(s.output)
    told = read_json(out / "talas.json").get("settings", {})
    lacking = s.sharpness and not told.get("sharpness")
    lacking = lacking or (args.each_epoch and row != "released-code" and not kept(out, s.epochs))
    there = (out / "checkpoint.pt").exists()
    if portable(told) == portable(asdict(s)) and not (lacking or there):
        return
    make_cache(args, pair, s.teacher)
    if row == "released-code":
        return released.train(args.released, s)
    with ExitStack() as changes:
        if row == "STLA-released":
            changes.enter_context(released_behaviour())
        if args.each_epoch:
            changes.enter_context(epochs_kept(out / "epochs"))
        if not there:
            shutil.rmtree(out / "epochs", ignore_errors=True)
        program([*flags, "--resume" if there else "--overwrite"])


def score(args, out, *models):
    """[{task: score}] of eval.py, for each of the models."""
    file = str(out / "scores.json")
    evaluation.main([*models, "--data", args.data, "--json", file, "--device", args.device])
    return [read_json(file)[model] for model in models]


def run(args, pair, row, seed):
    """One run, from the teacher to its entry in results.json, unless that has it already."""
    trained, (teacher, student) = ROWS[row] is not None, models_of(args, pair)
    key = f"{pair}/{row}/{seed}" if trained else f"{pair}/{row}"
    out, cache = args.work / f"{pair}-{row}-{seed}", f"{PAIRS[pair][0].replace('/', '-')}.pt"
    flags = ["--teacher", str(args.work / cache), "--student", student, "--output", str(out)]
    flags += ["--seed", str(seed), "--device", args.device, *(ROWS[row] or "").split(), *args.flags]
    s, data = settings_of(row, flags)[0], Path(args.data).name
    settings = portable(asdict(s)) if trained else None
    entry = {"pair": pair, "row": row, "seed": seed, "data": data, "settings": settings}
    old = read_json(args.results).get(key)
    if old and any(old[name] != entry[name] for name in ("data", "settings")):
        fail(f"{args.results} has {key} with other settings or data; take another file --results")
    if old:
        by_epoch = args.each_epoch and row != "released-code"  # which keeps the last one alone
        asked = {"sharpness": s.sharpness, "each_epoch": by_epoch}
        there = {"sharpness": old.get("lambda_max"), "each_epoch": old.get("epochs")}
        missing = [f"--{name}" for name in asked if asked[name] and trained and not there[name]]
        without = f", without {' '.join(missing)}; take another file --results" if missing else ""
        return print(f"done already{without}")
    out.mkdir(exist_ok=True)
    if trained:
        train(args, pair, row, flags)
        entry |= describe(out)
    model = {"teacher": teacher, "before": student}.get(row, str(out))
    entry["scores"], *earlier = score(args, out, model, *kept(out, s.epochs)[:-1])
    if earlier:
        averages = [scores["avg"] for scores in [*earlier, entry["scores"]]]
        entry["epochs"] = {str(epoch): avg for epoch, avg in enumerate(averages, 1)}
    record(args.results, key, entry)


# ------------------------------------------------------------------------------------ command line
def parse_args(argv):
    """The command line; what is not listed goes to talas.py."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    flag, parser.error = parser.add_argument, fail
    many, rows = {"nargs": "+", "metavar": "X"}, ["all", *ROWS]
    flag("--pairs", **many, default=list(PAIRS)[:3], choices=PAIRS, help=", ".join(PAIRS))
    flag("--rows", **many, default=["STLA"], choices=rows, help=", ".join(rows))
    flag("--seeds", **many, type=int, default=[42], help="a run each")
    flag("--models", type=Path, default=Path("real"), help="folder of the models of A and B")
    flag("--embeddings", help="array of the embeddings of A's and B's teacher")
    flag("--corpus", default="paper", help="as cache_teacher.py has it")
    flag("--data", default="hub", help="as eval.py has it")
    flag("--device", default="auto", help="auto: the accelerator if there is one, else cpu")
    flag("--each_epoch", action="store_true", help="keep and score the student of every epoch")
    flag("--released", help="a clone of the released code, for the row released-code")
    flag("--work", type=Path, default=RESULTS.parent / "runs", help="for caches and students")
    flag("--results", default=RESULTS, help="the file for the scores")
    args, args.flags = parser.parse_known_args(argv)
    if "all" in args.rows:
        args.rows = [row for row in ROWS if row != "released-code" or args.released]
    if "released-code" in args.rows and not args.released:
        fail("--rows released-code needs a clone of that code, --released DIR")
    return args


@one_line
def main(argv=None):
    """The command line: each run in its turn, those of the first seed first."""
    args = parse_args(argv)
    args.work = args.work.resolve()  # a cache that is not there yet is known by its name
    args.work.mkdir(parents=True, exist_ok=True)
    (args.work / ".gitignore").write_text("*\n")
    for seed, pair, row in product(args.seeds, args.pairs, args.rows):
        if ROWS[row] is None and seed != args.seeds[0]:
            continue
        print(f"--- {pair}, {row}, seed {seed}", flush=True)
        if row == "teacher" and pair in LOCAL and not Path(models_of(args, pair)[0]).exists():
            print(f"left out: there is no {models_of(args, pair)[0]}")
            continue
        try:
            with FileLock(args.work / f"{pair}-{row}-{seed}.running", timeout=0):
                run(args, pair, row, seed)
        except Timeout:
            print("another process is at it")


if __name__ == "__main__":
    main()
