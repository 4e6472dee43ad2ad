"""The runs of the study: distil pairs with rows of the paper's tables, score them, keep everything.

    python study/run.py --pairs qwen3-0.6b --rows T STL STLA --seeds 42 43 44
    python study/run.py --pairs B --rows all --models real --embeddings mpnet.npy \
        --corpus corpus.jsonl --data DIR

A run that is in results.json is not run again; an interrupted one goes on. Start the same command
twice, and two runs go on at a time. Flags that are not listed go to talas.py (--epochs 1), but for
those that rows are made of. Without a network there are the pairs A and B: the embeddings of
all-mpnet-base-v2, an array, into students of 6 and 3 layers.
"""

import re
import shutil
import sys
from dataclasses import asdict, replace
from functools import partial
from itertools import product
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
from filelock import FileLock, Timeout

import cache_teacher
import eval as evaluation
import talas
from study import baselines, online, released, results
from study.results import PAIRS, ROWS, UNTRAINED, portable, read_json
from support import fail
from support.encoder import pooled_layers
from support.files import check_output
from support.run import check_settings

OWN = "--teacher --student --output --seed --device --resume --overwrite"
NAMED = {*re.findall(r"--(\w+)", " ".join([OWN, *(row["flags"] for row in ROWS.values())]))}
BY_NAME = ("teacher", "released-code")  # of the rows: not among `all`


class Released(talas.Objective):
    """Eq. 7 as the authors' code has it: LASD from layer 0 on, other masks in the second pass."""

    second_pass = False

    def forward(self, tokens, teacher, domains=None):
        """(loss, {its terms}); in training every other call is a step's second pass."""
        if self.training and self.second_pass:
            torch.manual_seed(int(torch.randint(2**62, ())))  # away from the first pass's masks
        self.second_pass = self.training and not self.second_pass
        twice = {name: t.repeat(2, 1) for name, t in tokens.items()}  # (2N, T)
        pooled = pooled_layers(self.encoder, twice, self.s.precision, from_layer=0)
        layers = [E.unflatten(0, (2, -1)) for E in pooled]  # L + 1 of (2, N, d_S)
        loss, terms = talas.total_loss(layers, self.projections, teacher, self.s)
        return loss, terms | {"loss": loss}


def method_of(row, flags):
    """(settings of a row and these flags; what makes (corpus, objective) of them and a cache)."""
    flags = [*flags, *ROWS[row]["flags"].split()]
    if row.split("-")[0] in online.OWN:
        return online.parse_settings(flags), online.prepare
    if "--method" in flags:
        return talas.parse_settings(flags, baselines.Settings), baselines.prepare
    kind = Released if row == "STLA-released" else talas.Objective
    return talas.parse_settings(flags), partial(baselines.prepare, kind=kind)


def keep(folder, objective, epoch):
    """Keep the student after an epoch, whole or not at all: folder/1, folder/2, ..."""
    talas.save_student(objective, folder / "draft")
    shutil.rmtree(folder / str(epoch), ignore_errors=True)
    (folder / "draft").rename(folder / str(epoch))


def train(args, teacher, dtype, s, row, prepare):
    """Train one row, unless its output holds just that; an interrupted training goes on."""
    out, told = Path(s.output), read_json(Path(s.output, "talas.json")).get("settings", {})
    lacks, there = s.sharpness and not told.get("sharpness"), (out / "checkpoint.pt").exists()
    if portable(told) == portable(asdict(s)) and not lacks and not there:
        return
    s = replace(s, resume=there, overwrite=not there)
    keeping = [partial(keep, out / "epochs")] if args.each_epoch else []
    if prepare is not online.prepare:
        cached = ["--teacher", teacher, "--output", s.teacher, "--corpus", args.corpus]
        with FileLock(f"{s.teacher}.waiting"):  # a cache that is there is kept
            cache_teacher.main([*cached, "--dtype", dtype, "--device", args.device])
    if row == "released-code":
        return released.train(args.released, s)
    baselines.run(s, prepare, *keeping)


def run(args, seed, pair, row, check=False):
    """One run, from the teacher to its entry in results.json; or a check of its settings alone."""
    about, key = PAIRS[pair], f"{pair}/{row}" if row in UNTRAINED else f"{pair}/{row}/{seed}"
    teacher, student = about["teacher"], about["student"]
    out, cache = args.work / f"{pair}-{row}-{seed}", args.work / f"{teacher.replace('/', '-')}.pt"
    if "/" not in teacher:
        teacher, student = str(args.models / teacher), str(args.models / student)
    own = {"teacher": cache, "student": student, "output": out, "seed": seed, "device": args.device}
    s, prepare = method_of(row, [*(f"--{name}={own[name]}" for name in own), *args.flags])
    if prepare is online.prepare:
        s = replace(s, teacher=teacher, corpus=args.corpus)
    check_settings(s)
    entry = {"pair": pair, "row": row, "seed": seed, "data": Path(args.data).name}
    entry["settings"] = None if row in UNTRAINED else portable(asdict(s))
    if old := read_json(args.results).get(key):
        lacks = entry["settings"] and s.sharpness and not old.get("lambda_max")
        if lacks or any(old[name] != entry[name] for name in ("data", "settings")):
            fail(f"{args.results} has {key} with other settings or data; take another --results")
    if check or old:
        return check or print("done already")
    out.mkdir(exist_ok=True)
    if entry["settings"]:
        array = args.embeddings if "/" not in about["teacher"] else None
        train(args, array or teacher, about["dtype"], s, row, prepare)
        entry |= results.describe(out)
    model, file = {"teacher": teacher, "before": student}.get(row, f"{out}"), f"{out}/scores.json"
    evaluation.main([model, "--data", args.data, "--json", file, "--device", args.device])
    results.record(args.results, key, entry | {"scores": read_json(file)[model]})


def parse_args(argv):
    """The command line; what is not listed goes to talas.py."""
    parser, flag = results.command_line(__doc__)
    many, rows = {"nargs": "+", "metavar": "X"}, ["all", *ROWS]
    flag("--pairs", **many, default=list(PAIRS)[:3], choices=PAIRS, help=", ".join(PAIRS))
    flag("--rows", **many, default=["STLA"], choices=rows, help=", ".join(rows))
    flag("--seeds", **many, type=int, default=[42], help="a run each")
    flag("--models", type=Path, default=Path("real"), help="folder of the models of A and B")
    flag("--embeddings", help="array of the embeddings of A's and B's teacher")
    flag("--corpus", default="paper", help="as cache_teacher.py has it")
    flag("--data", default="hub", help="as eval.py has it")
    flag("--device", default="auto", help="auto: the accelerator if there is one, else cpu")
    flag("--each_epoch", action="store_true", help="keep the student of each trained epoch, too")
    flag("--released", help="a clone of the released code, for the row released-code")
    flag("--work", type=Path, default=results.HERE / "runs", help="for caches and students")
    args, args.flags = parser.parse_known_args(argv)
    args.rows = [r for r in ROWS if r in args.rows or ("all" in args.rows and r not in BY_NAME)]
    if "released-code" in args.rows and not args.released:
        fail("--rows released-code needs a clone of that code, --released DIR")
    for given in (flag for flag in args.flags if flag.startswith("--")):
        if given[2:].split("=")[0].replace("-", "_") in NAMED:
            fail(f"{given} is part of what names a run: choose --pairs, --rows, --seeds, --work")
    return args


def main(argv=None):
    """The command line: each run in its turn, those of the first seed first."""
    args = parse_args(argv)
    check_output("--results", args.results)
    args.work = args.work.resolve()  # a cache that is not there yet is known by its name
    asked = list(product(args.seeds, args.pairs, args.rows))
    asked = [one for one in asked if one[2] not in UNTRAINED or one[0] == args.seeds[0]]
    for one in asked:
        run(args, *one, check=True)  # what is wrong is said before any work
    args.work.mkdir(parents=True, exist_ok=True)
    (args.work / ".gitignore").write_text("*\n")
    for seed, pair, row in asked:
        print(f"--- {pair}, {row}, seed {seed}", flush=True)
        try:
            with FileLock(args.work / f"{pair}-{row}-{seed}.running", timeout=0):
                run(args, seed, pair, row)
        except Timeout:
            print("another process is at it")


if __name__ == "__main__":
    main()
