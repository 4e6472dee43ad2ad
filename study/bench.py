"""Speed and memory, side by side; run by hand, on a machine that does nothing else:

    python cache_teacher.py --teacher mpnet.npy --corpus corpus.jsonl --output mpnet.pt
    python study/bench.py --cache mpnet.pt --student student-cls --teacher mpnet \
        --released Teacher-Anchor-KD

The two sides of a row (bench.csv) take turns on the same batches, so that a machine whose speed
drifts favours neither. A ratio is the median over the turns. The paper's Table 3 (table3.csv) is
measured with the teacher in bfloat16.
"""

import itertools
import platform
import statistics
import sys
import time
from datetime import date
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
from torch.profiler import ProfilerActivity, profile

import talas
from cache_teacher import load_cache
from study import baselines, online, released, results, run
from study.results import BENCH, TABLE3
from support.encoder import encode, pad, pool, tokenize
from support.loading import load_encoder
from support.run import memory_mb, pick_device

BATCH_SIZE = 32
WARM_UP = 4  # turns that are not counted
TURNS = 24  # turns that are
ENCODED = 32  # batches that a side embeds in a turn


class Plain(talas.Objective):
    """Eq. 7 the plain way: the batch is tokenised in each step, each view has a forward pass."""

    def forward(self, texts, teacher, domains=None):
        """(loss, {its terms}) of N sentences."""
        tokens = pad(tokenize(self.encoder, texts), range(len(texts)), self.model)
        views = []
        for _ in range(2):
            states = self.model(**tokens, output_hidden_states=True).hidden_states[1:]
            mask = tokens["attention_mask"]
            views.append(torch.stack([pool(h, mask, self.encoder.pooling) for h in states]))
        layers = torch.stack(views, dim=1)  # (L, 2, N, d_S)
        loss, terms = talas.total_loss(list(layers), self.projections, teacher, self.s)
        return loss, terms | {"loss": loss}


# -------------------------------------------------------------- the sides: functions of positions
def our_step(name, cache, args):
    """A step of the loop in talas.train, of a row of rows.csv; plain and bfloat16 are of STLA."""
    row = "STLA" if name in ("plain", "bfloat16") else name
    flags = [f"--student={args.student}", f"--teacher={args.teacher}"]
    if name == "bfloat16":
        flags.append("--precision=bfloat16")
    s = run.settings_of(row, flags)
    if run.is_online(row):
        corpus, objective = online.prepare(s, cache)
    else:
        kind = Plain if name == "plain" else talas.Objective
        corpus, objective = baselines.prepare(s, cache, kind)
    asam, scheduler = talas.make_optimizer(s, objective.train(), steps=10**6)

    def step(rows):
        tokens, teacher, domains = corpus.batch(rows)
        if name == "plain":
            tokens = [cache["sentences"][i] for i in rows]
        talas.training_step(objective, asam, tokens, teacher, domains, s)
        scheduler.step()

    return step


def load_teacher(args):
    """The teacher as the online methods run it."""
    return load_encoder(args.teacher, dtype=torch.bfloat16, device=args.device)


def side(name, cache, args):
    """What a side of a row does in a turn: a function of positions, (N,).

    The library, encode and cached embed ENCODED batches, whatever the positions.
    """
    texts = cache["sentences"][: ENCODED * BATCH_SIZE]
    if name == "released":  # it tokenises each batch itself
        code = released.distiller(args.released, args.student, cache, batch_size=BATCH_SIZE)
        code.model_student.train()
        return lambda rows: code.train_step(code.collate_fn([code.train_ds[int(i)] for i in rows]))
    if name == "library":
        from sentence_transformers import SentenceTransformer

        model = SentenceTransformer(args.student, device=str(args.device))
        return lambda rows: model.encode(texts, batch_size=BATCH_SIZE, show_progress_bar=False)
    if name == "encode":
        encoder = load_encoder(args.student, device=args.device)
    elif name == "cached":
        encoder = load_teacher(args)
    else:
        return our_step(name, cache, args)
    return lambda rows: encode(encoder, tokenize(encoder, texts), BATCH_SIZE)


# ---------------------------------------------------------------------------------- measurements
def batches(cache, n):
    """n random batches, the same at each call: positions, (N,) each."""
    return talas.batches(len(cache["sentences"]), talas.Settings(), epoch=0)[:n]


def in_turn(names, cache, args):
    """{side: its ms in each turn that counts}."""
    sides = {name: side(name, cache, args) for name in names}
    ms = {name: [] for name in names}
    for turn, rows in enumerate(batches(cache, WARM_UP + TURNS)):
        for name in sorted(names, reverse=turn % 2):
            start = time.perf_counter()
            sides[name](rows)
            if args.device.type != "cpu":
                torch.accelerator.synchronize(args.device)
            if turn >= WARM_UP:
                ms[name].append(1000 * (time.perf_counter() - start))
    return ms


def median_ratio(ms, first, second):
    """The median over the turns of one side's time to another's."""
    return statistics.median(a / b for a, b in zip(ms[first], ms[second]))


def peak_mb(name, cache, args):
    """Peak MB of tensors that four turns of a side make: the device allocator's count."""
    step = side(name, cache, args)
    memory_mb(args.device)  # an accelerator's peak counts from here
    before = memory_mb(args.device)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        for rows in batches(cache, 4):
            step(rows)
    if args.device.type != "cpu":
        return memory_mb(args.device) - before
    events = sorted(profiler.profiler.kineto_results.events(), key=lambda e: e.start_ns())
    sizes = [event.nbytes() for event in events if event.name() == "[memory]"]
    return max(itertools.accumulate(sizes)) / 2**20


def weights_mb(encoder):
    """MB of an encoder's weights."""
    return sum(p.nbytes for p in encoder.model.parameters()) / 2**20


def table3(cache, args):
    """{side: {ms, ratio to two others, MB: teacher, student, rest}} of the paper's Table 3."""
    teacher = weights_mb(load_teacher(args))
    student = weights_mb(load_encoder(args.student))
    ms = in_turn(TABLE3, cache, args)
    measured = {}
    for name in TABLE3:
        # a cache's share of a step: a batch is embedded once and used in each epoch
        share = 1 / ENCODED / talas.Settings.epochs if name == "cached" else 1
        ratio = {other: share * median_ratio(ms, name, other) for other in ("STL", "STLA")}
        cost = {"ms": share * statistics.median(ms[name]), "ratio": ratio}
        cost["teacher"] = teacher if run.is_online(name) or name == "cached" else 0
        if name != "cached":
            cost["student"] = student
            cost["rest"] = peak_mb(name, cache, args)
        measured[name] = cost
    return measured


def measure(name, cache, args):
    """{ratio, ms of the two sides} of a row of bench.csv."""
    first = BENCH[name]["first"]
    second = BENCH[name]["second"]
    ms = in_turn([first, second], cache, args)
    medians = [statistics.median(times) for times in ms.values()]
    return {"ratio": median_ratio(ms, first, second), "ms": medians}


def main(argv=None):
    """The command line."""
    parser = results.command_line(__doc__)
    flag = parser.add_argument
    flag("--cache", default="teacher.pt", help="a teacher cache")
    flag("--student", required=True, help="folder or Hub id of the student to train")
    flag("--teacher", help="the model of the cache, to run online")
    flag("--released", help="a clone of the released code")
    args = parser.parse_args(argv)
    args.device = pick_device("auto")
    cache = load_cache(args.cache)
    rows = {}
    for name in BENCH:
        if name != "memory":
            rows[name] = measure(name, cache, args)
    costs = table3(cache, args)
    asam_mb = costs["STLA"]["rest"] - costs["STL"]["rest"]
    rows["memory"] = {"ratio": asam_mb / costs["STLA"]["student"], "ms": []}
    entry = {
        "date": str(date.today()),
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads",
        "torch": torch.__version__,
        "rows": rows,
        "table3": costs,
    }
    results.record(args.results, f"bench/{Path(args.student).name}/{args.device.type}", entry)


if __name__ == "__main__":
    main()
