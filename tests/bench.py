"""Speed and memory, side by side; run by hand, on a machine that does nothing else:

    python tests/bench.py --cache teacher.pt --student student --encoder student

Each ratio is the median over rounds in which both sides take turns on the same sentences, so that a machine whose speed
drifts does not favour one of them. Prints a table and writes it, with every round, to bench.json. The two rows against
sentence-transformers need `pip install sentence-transformers accelerate` and are left out without them.
"""

import argparse
import itertools
import json
import multiprocessing
import os
import platform
import random
import statistics
import sys
import tempfile
import time
from contextlib import redirect_stdout
from datetime import date
from importlib.util import find_spec
from pathlib import Path

os.environ["TOKENIZERS_PARALLELISM"] = "false"
sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
from torch.profiler import ProfilerActivity, profile

import talas
from cache_teacher import (
    encode,
    fingerprint,
    load_cache,
    load_encoder,
    memory_mb,
    mixed_precision,
    pick_device,
    pool,
    quiet,
    save,
)

STEPS, N = 14, 32  # steps of one timing, of which the first 4 do not count; sentences a step
SIMCSE = {"lambda1": 1.0, "lambda2": 0.0, "lambda3": 0.0, "optimizer": "adamw"}
TAMD = {"lambda1": 0.0, "lambda3": 0.0, "optimizer": "adamw", "anchored_layers": 1}


def part_of(cache):
    """As many sentences of a cache as one timing needs, evenly from all of it, in a random order."""
    rows = torch.linspace(0, len(cache["sentences"]) - 1, STEPS * N).long()
    rows = rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))]
    lists = {key: [cache[key][i] for i in rows] for key in ("sentences", "sources")}
    return cache | lists | {"embeddings": cache["embeddings"][rows]}


def quietly_load(name):
    """load_encoder without its line about the pooling."""
    with open(os.devnull, "w") as null, redirect_stdout(null):
        return load_encoder(name)


def milliseconds(ticks):
    """The median time between two ticks, in ms, without the warm-up."""
    steps = [b - a for a, b in itertools.pairwise(ticks)]
    return 1000 * statistics.median(steps[3:] or steps)


def tick(ticks, device):
    """Note the time at which the device has done what it was given."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    ticks.append(time.perf_counter())


def ours(cache, student, device, **settings):
    """Milliseconds a step of talas.train as it stands."""
    model, tokenizer, pooling = quietly_load(student)
    ticks, step = [], talas.training_step

    def timed(*args):
        values = step(*args)
        tick(ticks, device)
        return values

    with tempfile.TemporaryDirectory() as output:
        s = talas.Settings(
            student=student, output=output, epochs=1, batch_size=N, pooling=pooling, **settings
        )
        talas.training_step = timed
        try:
            talas.train(s, dict(cache), model.to(device), tokenizer)
        finally:
            talas.training_step = step
    return milliseconds(ticks)


def plain(cache, student, device, optimizer):
    """Milliseconds a step the plain way: each batch tokenised when its turn comes, a forward pass a view, ASAM in a loop.

    The losses, AdamW's kernel and the precision are those of talas.py.
    """
    model, tokenizer, pooling = quietly_load(student)
    model.to(device).train()
    s, ticks = talas.Settings(), []
    d_S, d_T = model.config.hidden_size, cache["embeddings"].shape[1]
    projections = [
        torch.nn.Parameter(1e-3 * torch.randn(d_S, d_T, device=device)) for _ in range(2)
    ]
    parameters = [*model.parameters(), *projections]
    adamw = torch.optim.AdamW(parameters, lr=s.lr, fused=True)

    def loss():
        texts = cache["sentences"][start : start + N]
        tokens = tokenizer(
            texts, padding=True, truncation=True, max_length=256, return_tensors="pt"
        ).to(device)
        with mixed_precision(device):
            views = [model(**tokens, output_hidden_states=True).hidden_states[1:] for _ in range(2)]
        first, second = (
            [pool(h, tokens["attention_mask"], pooling) for h in view] for view in views
        )
        teacher = cache["embeddings"][start : start + N].to(device)
        simcse = talas.simcse_loss(first[-1], second[-1], s.temperature)
        return (
            s.lambda1 * simcse
            + s.lambda2 * talas.tamd_loss(first[-2:], projections, teacher)
            + talas.lasd_loss(first)
        )

    for start in range(0, STEPS * N, N):
        loss().backward()
        if optimizer == "asam":
            with torch.no_grad():
                moved = [p for p in parameters if p.grad is not None]
                norm = torch.stack([(p.abs() * p.grad).norm() for p in moved]).norm()
                w = [p.clone() for p in moved]
                for p in moved:
                    p += s.rho * p.abs() ** 2 * p.grad / norm
            adamw.zero_grad()
            loss().backward()
            with torch.no_grad():
                for p, saved in zip(moved, w):
                    p.copy_(saved)
        adamw.step()
        adamw.zero_grad()
        tick(ticks, device)
    return milliseconds(ticks)


def trainer(cache, student, device):
    """Milliseconds a step of sentence-transformers' trainer with its embedding-distillation loss on the same targets."""
    from datasets import Dataset
    from sentence_transformers import (
        SentenceTransformer,
        SentenceTransformerTrainer,
        SentenceTransformerTrainingArguments,
    )
    from sentence_transformers.sentence_transformer.losses import EmbedDistillLoss
    from transformers import TrainerCallback

    ticks = []

    class Clock(TrainerCallback):
        def on_step_end(self, *args, **kwargs):
            tick(ticks, device)

    model = SentenceTransformer(student, device=str(device))
    rows = {"sentence": cache["sentences"], "label": cache["embeddings"].tolist()}
    with (
        tempfile.TemporaryDirectory() as output,
        open(os.devnull, "w") as null,
        redirect_stdout(null),
    ):
        arguments = SentenceTransformerTrainingArguments(
            output_dir=output, per_device_train_batch_size=N, num_train_epochs=1, report_to=[], disable_tqdm=True,
            save_strategy="no", use_cpu=device.type == "cpu", dataloader_pin_memory=device.type != "cpu",
            bf16=mixed_precision(device)._enabled,
        )  # fmt: skip
        loss = EmbedDistillLoss(model, projection_dim=cache["embeddings"].shape[1])
        data = Dataset.from_dict(rows)
        SentenceTransformerTrainer(
            model, arguments, train_dataset=data, loss=loss, callbacks=[Clock()]
        ).train()
    return milliseconds(ticks)


def embedding(cache, name, device, library):
    """Seconds to embed the sentences: SentenceTransformer.encode, or what cache_teacher.py does."""
    sentences = cache["sentences"]
    if library:
        from sentence_transformers import SentenceTransformer

        model = SentenceTransformer(name, device=str(device))
        call = lambda texts: model.encode(texts, batch_size=N, show_progress_bar=False)
    else:
        model, tokenizer, pooling = quietly_load(name)
        part = (
            f"{tempfile.mkdtemp()}/part"  # as cache_teacher.py does it, kept in a file on the way
        )
        call = lambda texts: encode(
            model.to(device), tokenizer, texts, pooling, 256, N, part=f"{part}{len(texts)}"
        )
    call(sentences[:N])
    start = time.perf_counter()
    call(sentences)
    return time.perf_counter() - start


def peak_memory(cache, student, device, optimizer):
    """Peak bytes of tensors while talas.train takes four steps: what the accelerator's, or the CPU's, allocator gave out."""
    cache = cache | {key: cache[key][: 4 * N] for key in ("sentences", "sources", "embeddings")}
    if device.type != "cpu":
        torch.accelerator.reset_peak_memory_stats(device)
        ours(cache, student, device, optimizer=optimizer)
        return torch.accelerator.max_memory_allocated(device)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as watched:
        ours(cache, student, device, optimizer=optimizer)
    events = sorted(watched.profiler.kineto_results.events(), key=lambda event: event.start_ns())
    return max(
        itertools.accumulate(event.nbytes() for event in events if event.name() == "[memory]")
    )


def training_memory(folder, sentences, student, device):
    """Megabytes of resident memory of a training process in its thirtieth step, on a generated cache of so many sentences."""
    steps, step = [], talas.training_step

    def stop(*args):
        steps.append(0)
        if len(steps) > 30:
            raise KeyboardInterrupt
        return step(*args)

    talas.training_step = stop
    output = f"{folder}/{sentences}"
    try:
        talas.main(
            [
                "--teacher",
                f"{output}.pt",
                "--student",
                student,
                "--output",
                output,
                "--device",
                str(device),
            ]
        )
    except SystemExit:
        return memory_mb(torch.device("cpu"))  # of the process, with an accelerator too


def generate(folder, count, like):
    """Write a cache of made-up sentences of the same words and random embeddings."""
    words, draw = (
        sorted({w for sentence in like["sentences"][:5000] for w in sentence.split()}),
        random.Random(0),
    )
    sentences = [f"{i} " + " ".join(draw.choices(words, k=12)) for i in range(count)]
    embeddings = torch.randn(count, 384, generator=torch.Generator().manual_seed(0))
    about = {
        "sentences": sentences,
        "sources": [f"made-up {i % 3}" for i in range(count)],
        "fingerprint": fingerprint(sentences),
    }
    save(f"{folder}/{count}.pt", like | about | {"embeddings": embeddings})


def apart(function, *args):
    """Call a function in a fresh process, whose memory is its own."""
    with multiprocessing.get_context("spawn").Pool(1) as pool_of_one:
        return pool_of_one.apply(function, args)


def in_turn(name, target, a, b, rounds):
    """A row: the median of a() / b() over rounds that take turns, the second first in every other one."""
    pairs = [(a(), b()) if i % 2 == 0 else (b(), a())[::-1] for i in range(rounds)]
    row = {
        "name": name,
        "target": target,
        "ratio": statistics.median(x / y for x, y in pairs),
        "rounds": pairs,
    }
    print(f"{name}: {row['ratio']:.2f} (target {target}), {pairs}", file=sys.stderr)
    return row


def speed(args, device):
    """The rows of time."""
    cache = part_of(load_cache(args.cache))
    step = lambda **settings: lambda: ours(cache, args.student, device, **settings)
    old = lambda optimizer: lambda: plain(cache, args.student, device, optimizer)
    rows = [
        ("ASAM step / AdamW step, same losses", "<= 2.0", step(), step(optimizer="adamw")),
        (
            "TALAS step without ASAM / SimCSE step",
            "<= 1.15",
            step(optimizer="adamw"),
            step(**SIMCSE),
        ),
        ("TALAS step / the same the plain way", "<= 0.8", step(), old("asam")),
        (
            "TALAS step without ASAM / the same the plain way",
            "<= 0.8",
            step(optimizer="adamw"),
            old("adamw"),
        ),
    ]
    if find_spec("sentence_transformers"):
        embed = lambda library: lambda: embedding(cache, args.encoder, device, library)
        rows += [
            ("TAMD (K = 1, AdamW) step / sentence-transformers' trainer, EmbedDistillLoss", "", step(**TAMD),
                lambda: trainer(cache, args.student, device)),
            ("SentenceTransformer.encode / cache_teacher.py, time", ">= 1.0", embed(True), embed(False)),
        ]  # fmt: skip
    return [in_turn(*row, args.rounds) for row in rows]


def memory(args, device):
    """The rows of memory."""
    size = sum(4 * p.numel() for p in quietly_load(args.student)[0].parameters())
    cache = part_of(load_cache(args.cache))
    extra = (
        peak_memory(cache, args.student, device, "asam")
        - peak_memory(cache, args.student, device, "adamw")
    ) / size
    name = "Extra peak memory of ASAM / bytes of the weights"
    rows = [{"name": name, "target": "<= 1.1", "ratio": extra, "rounds": [extra]}]
    with tempfile.TemporaryDirectory() as folder:
        for count in (10_000, 1_000_000):
            generate(folder, count, load_cache(args.cache))
        use = [
            apart(training_memory, folder, count, args.student, device)
            for count in (1_000_000, 10_000)
        ]
    name = "Memory of training, 1,000,000 sentences / 10,000"
    return [*rows, {"name": name, "target": "1.0", "ratio": use[0] / use[1], "rounds": [use]}]


def main():
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--cache", default="teacher.pt", help="cache_teacher.py's embeddings")
    parser.add_argument("--student", default="student", help="directory of the student to train")
    parser.add_argument(
        "--encoder", default="student", help="directory of the model to embed sentences with"
    )
    parser.add_argument("--rounds", type=int, default=5, help="how often each pair takes turns")
    parser.add_argument(
        "--device", default="auto", help="auto: the accelerator if there is one, else cpu"
    )
    parser.add_argument("--json", default="bench.json", help="file for the results")
    args = parser.parse_args()
    quiet()
    device = pick_device(args.device)
    rows = speed(args, device) + memory(args, device)
    print("| what | ratio | target |\n| --- | ---: | ---: |")
    for row in rows:
        print(f"| {row['name']} | {row['ratio']:.2f} | {row['target']} |")
    machine = (
        torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else platform.processor() or platform.machine()
    )
    about = {
        "date": str(date.today()),
        "device": machine,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }
    Path(args.json).write_text(
        json.dumps(about | {"arguments": vars(args), "rows": rows}, indent=1) + "\n"
    )


if __name__ == "__main__":
    main()
