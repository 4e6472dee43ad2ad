"""Speed and memory, side by side; run by hand, on a machine that does nothing else:

    python cache_teacher.py --teacher mpnet.npy --corpus corpus.jsonl --output mpnet.pt
    python study/bench.py --cache mpnet.pt --student student-cls [--released Teacher-Anchor-KD]

Two sides take turns on the same batches: a machine whose speed drifts favours none. A ratio is the
median over the turns. Rows (bench.csv) that need what is not there are left out.
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
from study import baselines, released, results
from study.results import BENCH
from support import fail
from support.encoder import Corpus, encode, pad, pool, tokenize
from support.files import check_output, positive
from support.loading import load_encoder
from support.run import memory_mb, pick_device

N, WARM_UP = 32, 4  # sentences a step; turns that do not count


class Plain(talas.Objective):
    """Eq. 7 the plain way: the batch tokenised in its turn, then a pass for each view."""

    def forward(self, texts, teacher, domains=None):
        """(loss, {its terms}) of sentences, a list of N str."""
        tokens = pad(tokenize(self.student, texts), range(len(texts)), self.model)
        passes = [self.model(**tokens, output_hidden_states=True).hidden_states for _ in range(2)]
        mask, pooling = tokens["attention_mask"], self.student.pooling
        layers = [torch.stack([pool(h, mask, pooling) for h in both]) for both in zip(*passes)]
        loss, terms = talas.total_loss(layers[1:], self.projections, teacher, self.s)
        return loss, terms | {"loss": loss}


OURS = {  # of a side that is a step of ours: its settings and its objective
    "talas": {},
    "bfloat16": {"precision": "bfloat16"},
    "adamw": {"optimizer": "adamw"},
    "simcse": {"optimizer": "adamw", "lambda1": 1.0, "lambda2": 0.0, "lambda3": 0.0},
    "plain": {"kind": Plain},
    **{m: {"kind": baselines.Baseline, "method": m} for m in ("distill", "stella", "distillcse")},
}


def turns(cache):
    """The batches of an endless training, positions (N,) each."""
    for epoch in itertools.count():
        yield from talas.batches(len(cache["sentences"]), talas.Settings(batch_size=N), epoch)


def ours(cache, name, device, kind=talas.Objective, **settings):
    """A step of talas.train's loop, with an objective of that kind: a function of positions."""
    s = (baselines if kind is baselines.Baseline else talas).Settings(**settings)
    student = load_encoder(name, device=device)
    corpus = Corpus(cache, student)
    objective = kind(student, talas.new_projections(s, student, corpus.d_T), s).train()
    asam, scheduler = talas.make_optimizer(s, objective, 10**6)

    def step(rows):
        tokens, teacher, domains = corpus.batch(rows)
        tokens = [cache["sentences"][i] for i in rows] if kind is Plain else tokens
        talas.training_step(objective, asam, tokens, teacher, domains, s)
        scheduler.step()

    return step


def side(name, cache, args, device):
    """A side of a row, a function of positions: a step, or embedding 32 batches."""
    if name in OURS:
        return ours(cache, args.student, device, **OURS[name])
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
    encoder = load_encoder(args.student, device=device)
    return lambda rows: encode(encoder, tokenize(encoder, texts), N)


def in_turn(a, b, batches, device):
    """The median ratio of a's time to b's over the batches; the median ms of a and of b."""
    times = []
    for i, rows in enumerate(batches):
        pair = [0.0, 0.0]
        for which in (0, 1) if i % 2 else (1, 0):
            start = time.perf_counter()
            (a, b)[which](rows)
            if device.type != "cpu":
                torch.accelerator.synchronize(device)
            pair[which] = 1000 * (time.perf_counter() - start)
        times.append(pair)
    counted = times[WARM_UP:]
    return statistics.median(x / y for x, y in counted), *map(statistics.median, zip(*counted))


def peak(name, cache, args, device):
    """Peak bytes of tensors in four steps, from an empty memory: the device allocator's count."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as watched:
        step = side(name, cache, args, device)
        for rows in itertools.islice(turns(cache), 4):
            step(rows)
    if device.type != "cpu":
        return 2**20 * memory_mb(device)
    events = sorted(watched.profiler.kineto_results.events(), key=lambda event: event.start_ns())
    return max(itertools.accumulate(e.nbytes() for e in events if e.name() == "[memory]"))


def measure(name, cache, args, device):
    """[ratio, ms of the first side, ms of the second] of a row; of memory the ratio alone."""
    if name != "memory":
        a, b = (side(BENCH[name][each], cache, args, device) for each in ("first", "second"))
        count = WARM_UP + max(args.turns // (4 if name == "caching" else 1), 1)
        return in_turn(a, b, itertools.islice(turns(cache), count), device)
    memory_mb(device)  # an accelerator's peak counts from here
    less, more = (peak(one, cache, args, device) for one in ("adamw", "talas"))
    encoder = load_encoder(args.student)
    used = [p.numel() for key, p in encoder.model.named_parameters() if "pooler" not in key]
    used.append(2 * encoder.dimensions * cache["embeddings"].shape[1])  # the W_l
    return [(more - less) / (4 * sum(used))]


def main(argv=None):
    """The command line."""
    parser, flag = results.command_line(__doc__)
    flag("--cache", default="teacher.pt", help="a teacher cache")
    flag("--student", required=True, help="directory or Hub id of the student to train")
    flag("--released", help="a clone of the released code")
    flag("--rows", nargs="*", help=f"some of {', '.join(BENCH)}; all without it")
    flag("--turns", type=positive, default=24, help="turns of each side")
    flag("--device", default="auto", help="auto: the accelerator if there is one, else cpu")
    args = parser.parse_args(argv)
    check_output("--results", args.results, cache=args.cache)
    needed = {"released": args.released, "library": find_spec("sentence_transformers")}
    there = [name for name, row in BENCH.items() if needed.get(row["first"], True)]
    if unknown := set(args.rows or []) - set(there):
        fail(f"--rows {' '.join(unknown)}: the rows here are {', '.join(there)}")
    cache, device = load_cache(args.cache), pick_device(args.device)
    key = f"bench/{Path(args.student).name}/{device.type}"
    about = {"date": str(date.today()), "machine": results.machine(), "torch": torch.__version__}
    rows = results.read_json(args.results).get(key, {}).get("rows", {})
    for name in args.rows or there:
        with redirect_stdout(None):
            ratio, *ms = measure(name, cache, args, device)
        rows[name] = {"label": BENCH[name]["label"], "target": BENCH[name]["target"]}
        rows[name] |= {"ratio": ratio, "ms": ms}
        print(*rows[name].values(), flush=True)
        results.record(args.results, key, about | {"rows": rows})


if __name__ == "__main__":
    main()
