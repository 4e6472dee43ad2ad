"""Speed and memory, side by side; run by hand, on a machine that does nothing else:

    python cache_teacher.py --teacher mpnet.npy --corpus corpus.jsonl --output mpnet.pt
    python study/bench.py --cache mpnet.pt --student student-cls --teacher mpnet \
        [--released Teacher-Anchor-KD]

The sides of a row (bench.csv) take turns on the same batches: a machine whose speed drifts favours
none. A ratio is the median over the turns. The row table3 is the paper's Table 3 (table3.csv), with
the teacher in bfloat16. Rows that need what is not there are left out.
"""

import itertools
import statistics
import sys
import tempfile
import time
from contextlib import redirect_stdout
from datetime import date
from importlib.util import find_spec
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
from torch.profiler import ProfilerActivity, profile

import talas
from cache_teacher import load_cache
from study import online, released, results, run
from study.results import BENCH, TABLE3
from support import fail
from support.encoder import encode, pad, pool, tokenize
from support.files import check_output, positive
from support.loading import load_encoder
from support.run import memory_mb, pick_device

N, WARM_UP = 32, 4  # sentences a step; turns that do not count


class Plain(talas.Objective):
    """Eq. 7 the plain way: the batch tokenised in its turn, then a pass for each view."""

    def forward(self, texts, teacher, domains=None):
        """(loss, {its terms}) of sentences, a list of N str."""
        tokens = pad(tokenize(self.encoder, texts), range(len(texts)), self.model)
        passes = [self.model(**tokens, output_hidden_states=True).hidden_states for _ in range(2)]
        mask, pooling = tokens["attention_mask"], self.encoder.pooling
        layers = [torch.stack([pool(h, mask, pooling) for h in both]) for both in zip(*passes)]
        loss, terms = talas.total_loss(layers[1:], self.projections, teacher, self.s)
        return loss, terms | {"loss": loss}


OURS = {"talas": ["STLA"], "adamw": ["STL"], "simcse": ["S"], "plain": ["STLA"]}
OURS |= {"bfloat16": ["STLA", "--precision=bfloat16"]}  # sides that are steps of ours: row, flags
OURS |= {name: [name] for name in ("distill", "stella", "distillcse", *online.OWN)}


def turns(cache):
    """The batches of an endless training, positions (N,) each."""
    for epoch in itertools.count():
        yield from talas.batches(len(cache["sentences"]), talas.Settings(batch_size=N), epoch)


def ours(name, cache, args, device):
    """A step of talas.train's loop: a function of positions, (N,)."""
    row, *flags = OURS[name]
    flags += [f"--student={args.student}", f"--teacher={args.teacher}", f"--device={device}"]
    s, prepare = run.method_of(row, flags)
    plain = {"kind": Plain} if name == "plain" else {}
    corpus, objective = prepare(s, cache, **plain)
    asam, scheduler = talas.make_optimizer(s, objective.train(), 10**6)

    def step(rows):
        tokens, teacher, domains = corpus.batch(rows)
        tokens = [cache["sentences"][i] for i in rows] if plain else tokens
        talas.training_step(objective, asam, tokens, teacher, domains, s)
        scheduler.step()

    return step


def load(name, args, device):
    """The student; or for "cached" the teacher, as the online methods have it."""
    if name == "cached":
        return load_encoder(args.teacher, dtype=torch.bfloat16, device=device)
    return load_encoder(args.student, device=device)


def side(name, cache, args, device):
    """A side of a row, a function of positions: a step, or embedding 32 batches."""
    if name in OURS:
        return ours(name, cache, args, device)
    texts = cache["sentences"][: 32 * N]
    if name == "released":  # which tokenises each batch itself
        with tempfile.TemporaryDirectory() as work:
            code = released.distiller(args.released, args.student, cache, work, batch_size=N)
        code.model_student.train()
        return lambda rows: code.train_step(code.collate_fn([code.train_ds[int(i)] for i in rows]))
    if name == "library":
        from sentence_transformers import SentenceTransformer

        model = SentenceTransformer(args.student, device=str(device))
        return lambda rows: model.encode(texts, batch_size=N, show_progress_bar=False)
    encoder = load(name, args, device)
    return lambda rows: encode(encoder, tokenize(encoder, texts), N)


def in_turn(sides, batches, device):
    """The ms that each side takes for each batch that counts: a list of lists."""
    times = []
    for i, rows in enumerate(batches):
        turn = dict.fromkeys(sides)
        for step in sides[:: 1 if i % 2 else -1]:
            start = time.perf_counter()
            step(rows)
            if device.type != "cpu":
                torch.accelerator.synchronize(device)
            turn[step] = 1000 * (time.perf_counter() - start)
        times.append(list(turn.values()))
    return times[WARM_UP:]


def peak_mb(step, cache, device):
    """Peak MB of tensors that four steps make: the device allocator's count."""
    memory_mb(device)  # an accelerator's peak counts from here
    before = 0 if device.type == "cpu" else torch.accelerator.memory_allocated(device) / 2**20
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as watched:
        for rows in itertools.islice(turns(cache), 4):
            step(rows)
    if device.type != "cpu":
        return memory_mb(device) - before
    events = sorted(watched.profiler.kineto_results.events(), key=lambda event: event.start_ns())
    return max(itertools.accumulate(e.nbytes() for e in events if e.name() == "[memory]")) / 2**20


def table3(cache, args, device):
    """{side: {ms, and MB: teacher, student, rest}} of the paper's Table 3, a cache's share last."""
    both = [load(name, args, device).model.parameters() for name in ("cached", "encode")]
    teacher, student = (sum(p.nbytes for p in weights) / 2**20 for weights in both)
    steps = {name: side(name, cache, args, device) for name in TABLE3}
    share, found = steps.pop("cached"), {}
    for name, step in steps.items():
        held = teacher if name in online.OWN else 0
        found[name] = {"teacher": held, "student": student, "rest": peak_mb(step, cache, device)}
    batches = list(itertools.islice(turns(cache), WARM_UP + args.turns))
    for name, ms in zip(found, zip(*in_turn(list(steps.values()), batches, device))):
        found[name]["ms"] = statistics.median(ms)
    few = in_turn([share], batches[: WARM_UP + 2], device)  # of 32 batches, once in all epochs
    ms = statistics.median(one for (one,) in few) / 32 / talas.Settings.epochs
    return found | {"cached": {"teacher": teacher, "ms": ms}}


def measure(name, cache, args, device):
    """[ratio, ms of the first side, ms of the second] of a row; of memory the ratio alone.

    That is of ASAM's extra peak to the weights that it moves.
    """
    if name == "memory":
        steps = (side(one, cache, args, device) for one in ("adamw", "talas"))
        less, more = (peak_mb(step, cache, device) for step in steps)
        encoder = load_encoder(args.student)
        used = [p.numel() for key, p in encoder.model.named_parameters() if "pooler" not in key]
        used.append(2 * encoder.dimensions * cache["embeddings"].shape[1])  # the W_l
        return [(more - less) / (4 * sum(used) / 2**20)]
    sides = [side(BENCH[name][each], cache, args, device) for each in ("first", "second")]
    count = WARM_UP + max(args.turns // (4 if name == "caching" else 1), 1)
    times = in_turn(sides, itertools.islice(turns(cache), count), device)
    return [statistics.median(x / y for x, y in times), *map(statistics.median, zip(*times))]


def main(argv=None):
    """The command line."""
    parser, flag = results.command_line(__doc__)
    flag("--cache", default="teacher.pt", help="a teacher cache")
    flag("--student", required=True, help="directory or Hub id of the student to train")
    flag("--teacher", help="the model of the cache, to run online")
    flag("--released", help="a clone of the released code")
    flag("--rows", nargs="*", help=f"some of {', '.join(BENCH)}; all without it")
    flag("--turns", type=positive, default=24, help="turns of each side")
    flag("--device", default="auto", help="auto: the accelerator if there is one, else cpu")
    args = parser.parse_args(argv)
    check_output("--results", args.results, cache=args.cache)
    needed = {"released": args.released, "library": find_spec("sentence_transformers")}
    needed["online"] = args.teacher
    there = [name for name, row in BENCH.items() if needed.get(row["first"], True)]
    if unknown := set(args.rows or []) - set(there):
        fail(f"--rows {' '.join(unknown)}: the rows here are {', '.join(there)}")
    cache, device = load_cache(args.cache), pick_device(args.device)
    key = f"bench/{Path(args.student).name}/{device.type}"
    about = {"date": str(date.today()), "machine": results.machine(), "torch": torch.__version__}
    entry = {"rows": {}} | results.read_json(args.results).get(key, {}) | about
    for name in args.rows or there:
        with redirect_stdout(None):
            if name == "table3":
                found = entry["table3"] = table3(cache, args, device)
            else:
                ratio, *ms = measure(name, cache, args, device)
                found = {key: BENCH[name][key] for key in ("label", "target")}
                entry["rows"][name] = found = found | {"ratio": ratio, "ms": ms}
        print(*found.values(), flush=True)
        results.record(args.results, key, entry)


if __name__ == "__main__":
    main()
