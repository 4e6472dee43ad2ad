"""The runs of the study: distil pairs with rows of the paper's tables, score them, record them.

    python study/run.py --pairs qwen3-0.6b --rows T STL STLA --seeds 42 43 44
    python study/run.py --pairs B --rows before STLA --models real --embeddings mpnet.npy \
        --corpus corpus.jsonl --data DIR

A run that is in results.json is not run again; the same command resumes an interrupted one. The
pairs A and B need no network: the embeddings of all-mpnet-base-v2, an array, and students of 6 and
3 layers.
"""

import sys
from dataclasses import asdict, replace
from itertools import product
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch

import cache_teacher
import eval as evaluation
import talas
from study import baselines, online, released
from study.results import HERE, PAIRS, ROWS, UNTRAINED, command_line, describe, portable, record
from support import fail
from support.encoder import pooled_layers
from support.files import read_json
from support.run import interrupted


class Released(talas.Objective):
    """Eq. 7 as in the authors' code: LASD from layer 0 on, new masks in the second pass."""

    second_pass = False

    def forward(self, tokens, teacher, domains=None):
        """(loss, {its terms}); in training every other call is the second pass of a step."""
        if self.training:
            if self.second_pass:
                torch.manual_seed(int(torch.randint(2**62, ())))  # not the first pass's masks
            self.second_pass = not self.second_pass
        twice = {name: values.repeat(2, 1) for name, values in tokens.items()}  # (2N, T)
        pooled = pooled_layers(self.encoder, twice, self.s.precision)
        layers = [E.unflatten(0, (2, -1)) for E in pooled]  # L + 1 of (2, N, d_S)
        loss, terms = talas.total_loss(layers, self.projections, teacher, self.s)
        return loss, terms | {"loss": loss}


# ---------------------------------------------------------------------------------- what a row is
def is_online(row):
    """Whether the teacher of a row runs in every step (online.py)."""
    return row.split("-")[0] in online.METHODS


def settings_of(row, flags):
    """The settings of a row with these flags, a list of str; the row's own flags win."""
    argv = flags + ROWS[row]["flags"].split()
    if is_online(row):
        return online.parse_settings(argv)
    if "--method" in argv:
        return talas.parse_settings(argv, baselines.Settings)
    if "--projection_std" in argv:
        return talas.parse_settings(argv, baselines.WithStart)
    return talas.parse_settings(argv)


# ----------------------------------------------------------------------------------------- a run
def model_path(args, name):
    """A model's Hub id, or its folder in --models."""
    return name if "/" in name else f"{args.models}/{name}"


def settings_of_run(args, pair, row, seed):
    """The settings of a run; the teacher is a cache's path, for an online method a model."""
    teacher = PAIRS[pair]["teacher"]
    flags = [
        f"--student={model_path(args, PAIRS[pair]['student'])}",
        f"--output={args.work}/{pair}-{row}-{seed}",
        f"--seed={seed}",
        f"--sharpness={args.sharpness}",
    ]
    if is_online(row):
        flags += [f"--teacher={model_path(args, teacher)}", f"--corpus={args.corpus}"]
    else:
        flags.append(f"--teacher={args.work}/{teacher.replace('/', '-')}.pt")
    return settings_of(row, flags)


def make_cache(args, pair, path):
    """Make the cache of a pair's teacher. If it is there with other content, the program ends."""
    teacher = PAIRS[pair]["teacher"]
    if "/" not in teacher:
        teacher = args.embeddings
    flags = [
        f"--teacher={teacher}",
        f"--corpus={args.corpus}",
        f"--output={path}",
        f"--dtype={PAIRS[pair]['dtype']}",
    ]
    cache_teacher.main(flags)


def check_same(place, found, entry):
    """End the program if what is there already is not the run of this entry."""
    for name in ("data", "corpus", "settings"):
        if name in found and found[name] != entry[name]:
            fail(f"{place} differs in its {name}; choose another --results and --work")


def train(args, row, s):
    """Train the student of a row, unless its folder has it; an interrupted training resumes."""
    out = Path(s.output)
    resume = interrupted(out)
    if not resume and (out / "talas.json").exists():
        return
    s = replace(s, resume=resume, overwrite=True)
    if row == "released-code":
        released.train(args.released, s)
    elif is_online(row):
        online.run(s)
    else:
        baselines.run(s, Released if row == "STLA-released" else talas.Objective)


def run(args, pair, row, seed):
    """One run, from the teacher to its entry in the results file, unless the entry is there."""
    key = f"{pair}/{row}"
    entry = {"pair": pair, "row": row, "seed": seed, "data": Path(args.data).name}
    model = model_path(args, PAIRS[pair]["teacher" if row == "teacher" else "student"])
    if row not in UNTRAINED:
        key += f"/{seed}"
        s = settings_of_run(args, pair, row, seed)
        model = s.output
        entry["settings"] = portable(asdict(s))
        if not is_online(row):
            make_cache(args, pair, s.teacher)
        entry["corpus"] = cache_teacher.load_cache(args.corpus, needed=False)["fingerprint"]
    recorded = read_json(args.results).get(key)
    if recorded:
        check_same(f"{args.results}, {key}", recorded, entry)
        return
    if row not in UNTRAINED:
        train(args, row, s)
        about = describe(Path(model))
        check_same(model, about, entry)
        entry |= about
    scores = f"{args.work}/{pair}-{row}-{seed}.json"
    evaluation.main([model, "--data", args.data, "--json", scores])
    entry["scores"] = read_json(Path(scores))[model]
    record(args.results, key, entry)


def main(argv=None):
    """The command line: one run after another, those of the first seed first."""
    parser = command_line(__doc__)
    flag = parser.add_argument
    flag("--pairs", nargs="+", required=True, choices=PAIRS)
    flag("--rows", nargs="+", default=list(ROWS), choices=ROWS, help="default: all")
    flag("--seeds", nargs="+", type=int, default=[42], help="a run each")
    flag("--models", default="real", help="folder of the models of A and B")
    flag("--embeddings", default="mpnet.npy", help="array of those of A's and B's teacher")
    flag("--corpus", default="paper", help="as for cache_teacher.py")
    flag("--data", default="hub", help="as for eval.py")
    flag("--sharpness", action="store_true", help="record lambda_max after each epoch")
    flag("--released", help="a clone of the released code, for the row released-code")
    flag("--work", default=f"{HERE}/runs", help="folder for caches and students")
    args = parser.parse_args(argv)
    Path(args.work).mkdir(parents=True, exist_ok=True)
    for seed, pair, row in product(args.seeds, args.pairs, args.rows):
        print(f"--- {pair}, {row}, seed {seed}", flush=True)
        run(args, pair, row, seed)


if __name__ == "__main__":
    main()
