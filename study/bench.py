"""Speed and memory, side by side; run by hand, on a machine that does nothing else:

    python cache_teacher.py --teacher mpnet.npy --corpus corpus.jsonl --output mpnet.pt
    python study/bench.py --cache mpnet.pt --student student-cls [--released Teacher-Anchor-KD]

Two sides take turns, step by step, on the same batches: a machine whose speed drifts favours none.
A ratio is the median over the turns. The rows go into results.json and are printed. One of them
needs sentence-transformers, one the authors' released code (released.py); without these they are
left out.
"""

import argparse
import itertools
import multiprocessing
import os
import random
import statistics
import sys
import tempfile
import time
from contextlib import redirect_stdout
from datetime import date
from importlib.util import find_spec
from pathlib import Path
from unittest import mock

os.environ["TOKENIZERS_PARALLELISM"] = "false"
sys.path.insert(0, str(Path(__file__).parent.parent))

from support import fail, one_line
from support.encoder import Corpus, encode, pool, tokenize
from support.files import positive, save
from support.loading import load_encoder
from support.run import memory_mb, pick_device

import torch
from torch.profiler import ProfilerActivity, profile

import talas
from cache_teacher import fingerprint, load_cache
from study import baselines, released
from study.results import RESULTS, machine, read_json, record

N, WARM_UP = 32, 4  # sentences a step; turns that do not count
ADAMW = {"optimizer": "adamw"}
SIMCSE = ADAMW | {"lambda1": 1.0, "lambda2": 0.0, "lambda3": 0.0}


def quietly(function, *args, **kwargs):
    """Call a function whose printed lines are of no use here."""
    with open(os.devnull, "w") as null, redirect_stdout(null):
        return function(*args, **kwargs)


def turns(cache):
    """The batches of an endless training, positions (N,) each: the same for every side."""
    for epoch in itertools.count():
        yield from talas.batches(len(cache["sentences"]), talas.Settings(batch_size=N), epoch)


# ------------------------------------------------------------- the sides: each a step, to be called
def ours(cache, name, device, pieces=True, method=None, **settings):
    """A step of talas.train's loop. pieces=False: on a CPU, too, a batch goes through whole.

    method: one of baselines.py, in place of TALAS.
    """
    s, kind = talas.Settings(**settings), talas.Objective
    if method:
        s, kind = baselines.Settings(method=method), baselines.Baseline
    student = quietly(load_encoder, name, device=device)
    corpus, d_T = Corpus(cache, student), cache["embeddings"].shape[1]
    objective, asam, scheduler = talas.set_up(s, student, d_T if s.lambda2 else 0, 10**6, kind)
    student.model.train()
    rows = turns(cache)
    cut = talas.pieces_of_like_length if pieces else one_piece

    def step():
        with mock.patch.object(talas, "pieces_of_like_length", cut):
            talas.training_step(objective, asam, *corpus.batch(next(rows)), s)
        scheduler.step()

    return step


def one_piece(batch):
    """In place of pieces_of_like_length, its answer on an accelerator."""
    return torch.arange(len(batch["input_ids"])), [batch]


def plain(cache, name, device):
    """The same the plain way: a batch tokenised in its turn, a pass a view, ASAM in a loop."""
    encoder, s, rows = quietly(load_encoder, name, device=device), talas.Settings(), turns(cache)
    model, d_T = encoder.model.train(), cache["embeddings"].shape[1]
    W = [1e-3 * torch.randn(encoder.dimensions, d_T, device=device) for _ in range(2)]
    parameters = [*model.parameters(), *(w.requires_grad_() for w in W)]
    adamw = torch.optim.AdamW(parameters, lr=s.lr, fused=True)

    def loss(texts, teacher):
        how = {"padding": True, "truncation": True, "max_length": 256, "return_tensors": "pt"}
        tokens = encoder.tokenizer(texts, **how).to(device)
        views = [model(**tokens, output_hidden_states=True).hidden_states[1:] for _ in range(2)]
        mask = tokens["attention_mask"]
        first, second = ([pool(h, mask, encoder.pooling) for h in view] for view in views)
        simcse = talas.simcse_loss(first[-1], second[-1], s.temperature)
        tamd, lasd = talas.tamd_loss(first[-2:], W, teacher), talas.lasd_loss(first)
        return s.lambda1 * simcse + s.lambda2 * tamd + s.lambda3 * lasd

    def step():
        batch = next(rows)
        texts = [cache["sentences"][i] for i in batch]
        teacher = cache["embeddings"][batch].float().to(device)
        loss(texts, teacher).backward()
        with torch.no_grad():
            moved = [p for p in parameters if p.grad is not None]
            norm = torch.stack([(p.abs() * p.grad).norm() for p in moved]).norm()
            w = [p.clone() for p in moved]
            for p in moved:
                p += s.rho * p.abs() ** 2 * p.grad / norm
        adamw.zero_grad()
        loss(texts, teacher).backward()
        with torch.no_grad():
            for p, saved in zip(moved, w):
                p.copy_(saved)
        adamw.step()
        adamw.zero_grad()

    return step


def the_released(cache, name, folder):
    """The released code's own train_step, and its own tokenising of each batch."""
    with tempfile.TemporaryDirectory() as work:
        code = quietly(released.distiller, folder, name, cache, work, batch_size=N)
    rows = turns(cache)
    code.model_student.train()

    def step():
        code.train_step(code.collate_fn([code.train_ds[i] for i in next(rows).tolist()]))

    return lambda: quietly(step)


def embedding(cache, name, device, library):
    """Embed 32 batches of sentences: SentenceTransformer.encode, or what cache_teacher.py does."""
    texts = cache["sentences"][: 32 * N]
    if library:
        from sentence_transformers import SentenceTransformer

        model = SentenceTransformer(name, device=str(device))
        return lambda: model.encode(texts, batch_size=N, show_progress_bar=False)
    encoder = quietly(load_encoder, name, device=device)
    return lambda: encode(encoder, tokenize(encoder, texts), N)


# ------------------------------------------------------------------------------------ measurements
def in_turn(a, b, device, count):
    """The median of the ratios of a's time to b's over `count` turns; median ms of a and of b."""
    times = []
    for i in range(WARM_UP + count):
        pair = [0.0, 0.0]
        for side in (0, 1) if i % 2 else (1, 0):
            start = time.perf_counter()
            (a, b)[side]()
            if device.type != "cpu":
                torch.accelerator.synchronize(device)
            pair[side] = 1000 * (time.perf_counter() - start)
        times.append(pair)
    counted = times[WARM_UP:]
    return statistics.median(x / y for x, y in counted), *map(statistics.median, zip(*counted))


def peak(cache, name, device, optimizer):
    """Peak bytes of tensors in four steps, from an empty memory: the device allocator's count."""

    def four_steps():
        step = ours(cache, name, device, optimizer=optimizer)
        for _ in range(4):
            step()

    if device.type != "cpu":
        torch.accelerator.reset_peak_memory_stats(device)
        four_steps()
        return torch.accelerator.max_memory_allocated(device)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as watched:
        four_steps()
    events = sorted(watched.profiler.kineto_results.events(), key=lambda event: event.start_ns())
    sizes = (event.nbytes() for event in events if event.name() == "[memory]")
    return max(itertools.accumulate(sizes))


def extra_memory(cache, name, device):
    """[Extra peak bytes of ASAM over AdamW, as a part of the bytes of what is trained]."""
    encoder, d_T = quietly(load_encoder, name), cache["embeddings"].shape[1]
    unused = sum(p.numel() for key, p in encoder.model.named_parameters() if "pooler" in key)
    weights = sum(p.numel() for p in encoder.model.parameters()) - unused
    size = 4 * (weights + 2 * encoder.dimensions * d_T)
    return [(peak(cache, name, device, "asam") - peak(cache, name, device, "adamw")) / size]


def training_memory(count, words, name, device):
    """Megabytes of this process in its thirtieth step, on so many made-up sentences on disk."""
    folder, draw = tempfile.TemporaryDirectory(), random.Random(0)
    path = f"{folder.name}/made-up.pt"
    texts = [f"{i} " + " ".join(draw.choices(words, k=12)) for i in range(count)]
    content = dict.fromkeys(("teacher", "pooling", "max_length"), "made-up")
    content |= {"sentences": texts, "sources": [f"{i % 3}" for i in range(count)], "version": 1}
    content |= {"embeddings": torch.randn(count, 384), "fingerprint": fingerprint(texts)}
    save(path, content)
    del content, texts
    step = ours(load_cache(path), name, device)
    for _ in range(30):
        step()
    return memory_mb(torch.device("cpu"))


def flat_memory(cache, name, device):
    """[The memory of training on 1,000,000 sentences to that on 10,000], a process each."""
    words = sorted({w for sentence in cache["sentences"][:5000] for w in sentence.split()})
    used = []
    for count in (1_000_000, 10_000):
        with multiprocessing.get_context("spawn").Pool(1) as alone:
            used.append(alone.apply(training_memory, (count, words, name, device)))
    return [used[0] / used[1]]


def measured(cache, args, device):
    """{row: (label, target, what measures it)}: the latter gives a ratio and the two sides' ms."""

    def side(make, *what, **settings):
        return lambda: make(cache, args.student, *what, **settings)

    def compare(a, b, count=args.turns):
        return lambda: in_turn(a(), b(), device, count)

    step, without = side(ours, device), side(ours, device, **ADAMW)
    simcse, whole = side(ours, device, **SIMCSE), side(ours, device, pieces=False)
    theirs, library = side(the_released, args.released), side(embedding, device, True)
    by, own = side(plain, device), side(embedding, device, False)
    fewer = max(args.turns // 4, 1)
    rows = {
        "asam": ("ASAM step / AdamW step, same losses", "≤ 2.1", compare(step, without)),
        "simcse": ("TALAS step without ASAM / SimCSE step", "≤ 1.15", compare(without, simcse)),
        "plain": ("TALAS step / the same the plain way", "≤ 0.8", compare(step, by)),
        "pieces": ("TALAS step in pieces / the batch whole", "≤ 0.85", compare(step, whole)),
        "released": ("The released code's step / ours", "≥ 1.7", compare(theirs, step)),
        "caching": ("SentenceTransformer.encode / ours, time", "≥ 1", compare(library, own, fewer)),
        "memory": (
            "Extra peak memory of ASAM / bytes of weights",
            "≤ 1.1",
            side(extra_memory, device),
        ),
        "corpus": ("Memory, 1,000,000 sentences / 10,000", "1", side(flat_memory, device)),
    }
    for method in ("distill", "stella", "distillcse"):
        label = f"{method}, a step / TALAS step without ASAM"
        rows[method] = (label, "", compare(side(ours, device, method=method), without))
    possible = {"pieces": device.type == "cpu", "released": args.released}
    possible["caching"] = find_spec("sentence_transformers")
    return {name: row for name, row in rows.items() if possible.get(name, True)}


@one_line
def main(argv=None):
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    flag, parser.error = parser.add_argument, fail
    flag("--cache", default="teacher.pt", help="a teacher cache")
    flag("--student", required=True, help="directory or Hub id of the student to train")
    flag("--released", help="a clone of the released code")
    flag("--rows", nargs="*", help="some of the rows; all without it")
    flag("--turns", type=positive, default=24, help="turns of each side")
    flag("--device", default="auto", help="auto: the accelerator if there is one, else cpu")
    flag("--results", default=RESULTS, help="the file for the rows")
    args = parser.parse_args(argv)
    device = pick_device(args.device)
    key = f"bench/{Path(args.student).name}/{device.type}"
    about = {"date": str(date.today()), "machine": machine(), "torch": torch.__version__}
    rows = read_json(args.results).get(key, {}).get("rows", {})
    table = measured(load_cache(args.cache), args, device)
    for name in args.rows or table:
        if name not in table:
            fail(f"no row {name} here; there are: {', '.join(table)}")
        label, target, measure = table[name]
        ratio, *ms = measure()
        rows[name] = {"label": label, "target": target, "ratio": ratio, "ms": ms}
        print(f"{label}: {ratio:.2f} ({target}); ms {[round(each) for each in ms]}", flush=True)
        record(args.results, key, about | {"rows": rows})


if __name__ == "__main__":
    main()
