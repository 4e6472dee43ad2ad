"""Speed and memory, side by side; run by hand, on a machine that does nothing else:

    python cache_teacher.py --teacher mpnet.npy --corpus corpus.jsonl --output mpnet.pt
    python study/bench.py --cache mpnet.pt --student student-cls --teacher mpnet \
        --released Teacher-Anchor-KD

The two sides of a row (bench.csv) take turns on the same batches, so that a machine whose speed
drifts favours neither. A ratio is the median over the turns. The row table3 is the paper's Table 3
(table3.csv), with the teacher in bfloat16. All rows are recorded together; with --rows some are
measured and printed, and nothing is recorded.
"""

import itertools
import statistics
import sys
import tempfile
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
ENCODED = 32  # batches that a side embeds in a turn
STEPS = {"talas": "STLA", "adamw": "STL", "simcse": "S", "plain": "STLA", "bfloat16": "STLA"}


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
def batches(cache, n):
    """n random batches, the same at each call: positions, (N,) each."""
    generator = torch.Generator().manual_seed(0)
    sentences = len(cache["sentences"])
    return [torch.randperm(sentences, generator=generator)[:BATCH_SIZE] for _ in range(n)]


def our_step(name, cache, args):
    """A step of the loop in talas.train, of a row of rows.csv or one that STEPS names."""
    row = STEPS.get(name, name)
    flags = [f"--student={args.student}", f"--teacher={args.teacher}"]
    if name == "bfloat16":
        flags.append("--precision=bfloat16")
    s = run.settings_of(row, flags)
    if run.is_online(row):
        corpus, objective = online.prepare(s, cache)
    else:
        kind = Plain if name == "plain" else run.objective_of(row)
        corpus, objective = baselines.prepare(s, cache, kind)
    asam, scheduler = talas.make_optimizer(s, objective.train(), steps=10**6)

    def step(rows):
        tokens, teacher, domains = corpus.batch(rows)
        if name == "plain":
            tokens = [cache["sentences"][i] for i in rows]
        talas.training_step(objective, asam, tokens, teacher, domains, s)
        scheduler.step()

    return step


def released_step(cache, args):
    """A step of the released code, which tokenises each batch itself."""
    with tempfile.TemporaryDirectory() as work:
        code = released.distiller(args.released, args.student, cache, work, batch_size=BATCH_SIZE)
    code.model_student.train()

    def step(rows):
        code.train_step(code.collate_fn([code.train_ds[int(i)] for i in rows]))

    return step


def online_teacher(args, device):
    """The teacher as the online methods run it."""
    return load_encoder(args.teacher, dtype=torch.bfloat16, device=device)


def embedding(name, cache, args, device):
    """Embedding ENCODED batches: by SentenceTransformer, by encode(), or that with the teacher."""
    texts = cache["sentences"][: ENCODED * BATCH_SIZE]
    if name == "library":
        from sentence_transformers import SentenceTransformer

        model = SentenceTransformer(args.student, device=str(device))
        return lambda rows: model.encode(texts, batch_size=BATCH_SIZE, show_progress_bar=False)
    if name == "cached":
        encoder = online_teacher(args, device)
    else:
        encoder = load_encoder(args.student, device=device)
    return lambda rows: encode(encoder, tokenize(encoder, texts), BATCH_SIZE)


def side(name, cache, args, device):
    """What a side of a row does in a turn: a function of positions, (N,)."""
    if name == "released":
        return released_step(cache, args)
    if name in ("library", "encode", "cached"):
        return embedding(name, cache, args, device)
    return our_step(name, cache, args)


# ---------------------------------------------------------------------------------- measurements
def in_turn(sides, cache, turns, device):
    """{side: its ms in each turn that counts}; sides: {name: function of positions}."""
    ms = {name: [] for name in sides}
    for turn, rows in enumerate(batches(cache, WARM_UP + turns)):
        order = list(sides) if turn % 2 else list(reversed(sides))
        for name in order:
            start = time.perf_counter()
            sides[name](rows)
            if device.type != "cpu":
                torch.accelerator.synchronize(device)
            ms[name].append(1000 * (time.perf_counter() - start))
    return {name: times[WARM_UP:] for name, times in ms.items()}


def median_ratio(ms, first, second):
    """The median over the turns of one side's time to another's."""
    return statistics.median(a / b for a, b in zip(ms[first], ms[second]))


def peak_mb(step, cache, device):
    """Peak MB of tensors that four steps make: the device allocator's count."""
    memory_mb(device)  # an accelerator's peak counts from here
    if device.type != "cpu":
        before = torch.accelerator.memory_allocated(device) / 2**20
        for rows in batches(cache, 4):
            step(rows)
        return memory_mb(device) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        for rows in batches(cache, 4):
            step(rows)
    events = sorted(profiler.profiler.kineto_results.events(), key=lambda e: e.start_ns())
    sizes = [event.nbytes() for event in events if event.name() == "[memory]"]
    return max(itertools.accumulate(sizes)) / 2**20


def memory_ratio(cache, args, device):
    """What ASAM adds to the peak of memory over the bytes of the weights that it moves."""
    without = peak_mb(side("adamw", cache, args, device), cache, device)
    extra = peak_mb(side("talas", cache, args, device), cache, device) - without
    encoder = load_encoder(args.student)
    weights = 2 * encoder.dimensions * cache["embeddings"].shape[1]  # two W_l
    for name, p in encoder.model.named_parameters():
        if "pooler" not in name:  # which no loss reaches
            weights += p.numel()
    return extra / (4 * weights / 2**20)


def weights_mb(encoder):
    """MB of an encoder's weights."""
    return sum(p.nbytes for p in encoder.model.parameters()) / 2**20


def table3(cache, args, device):
    """{side: {ms, ratio to two others, MB: teacher, student, rest}} of the paper's Table 3."""
    teacher = weights_mb(online_teacher(args, device))
    student = weights_mb(load_encoder(args.student))
    sides = {name: side(name, cache, args, device) for name in TABLE3}
    ms = in_turn(sides, cache, args.turns, device)
    measured = {}
    for name in TABLE3:
        # a cache's share of a step: a batch is embedded once and used in each epoch
        share = 1 / ENCODED / talas.Settings.epochs if name == "cached" else 1
        ratio = {other: share * median_ratio(ms, name, other) for other in ("adamw", "talas")}
        measured[name] = {"ms": share * statistics.median(ms[name]), "ratio": ratio}
        measured[name]["teacher"] = teacher if run.is_online(name) or name == "cached" else 0
        if name != "cached":
            measured[name]["student"] = student
            measured[name]["rest"] = peak_mb(sides[name], cache, device)
    return measured


def measure(name, cache, args, device):
    """{ratio, ms of the two sides} of a row of bench.csv; of memory the ratio; or Table 3."""
    if name == "table3":
        return table3(cache, args, device)
    if name == "memory":
        return {"ratio": memory_ratio(cache, args, device), "ms": []}
    first = BENCH[name]["first"]
    second = BENCH[name]["second"]
    sides = {key: side(key, cache, args, device) for key in (first, second)}
    ms = in_turn(sides, cache, args.turns, device)
    medians = [statistics.median(ms[first]), statistics.median(ms[second])]
    return {"ratio": median_ratio(ms, first, second), "ms": medians}


def main(argv=None):
    """The command line."""
    parser = results.command_line(__doc__)
    flag = parser.add_argument
    flag("--cache", default="teacher.pt", help="a teacher cache")
    flag("--student", required=True, help="folder or Hub id of the student to train")
    flag("--teacher", help="the model of the cache, to run online")
    flag("--released", help="a clone of the released code")
    flag("--turns", type=int, default=24, help="turns of each side that count")
    flag("--rows", nargs="*", choices=BENCH, help="print some rows; else all are recorded")
    args = parser.parse_args(argv)
    cache = load_cache(args.cache)
    device = pick_device("auto")
    entry = {"date": str(date.today()), "machine": results.machine(), "torch": torch.__version__}
    entry["rows"] = {}
    for name in args.rows or BENCH:
        entry["rows"][name] = measure(name, cache, args, device)
        print(name, entry["rows"][name], flush=True)
    if not args.rows:
        entry["table3"] = entry["rows"].pop("table3")
        results.record(args.results, f"bench/{Path(args.student).name}/{device.type}", entry)


if __name__ == "__main__":
    main()
