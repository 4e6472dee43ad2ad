"""Run the teacher once and cache its sentence embeddings: Algorithm 1, line 3; Appendices C and D.

    python cache_teacher.py                                  # the demo corpus, the lsa teacher
    python cache_teacher.py --teacher BAAI/bge-m3 --corpus paper --output bge-m3.pt

The cache is a dict, which make_cache lists; read it with
torch.load(path, weights_only=True, mmap=True).
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F

from demo.lsa import fit_lsa
from support import attempt, fail, interruptible, positive
from support.data import unique_corpus
from support.encoder import Encoder, encode, tokenize
from support.files import check_output, digest, keep_apart, load, save
from support.loading import load_encoder
from support.run import pick_device

VERSION = 1  # of the cache's format
DTYPES = ["float32", "float16", "bfloat16"]


# ------------------------------------------------------------------------------------ the teachers
def read_array(path, n):
    """Embeddings from elsewhere, on disk: a .npy or .pt array, (n, d_T), a row per sentence."""
    if path.endswith(".pt"):
        array = load(path)
    else:
        what = f"read {path} as an array of numbers that numpy.save wrote"
        with attempt(what, OSError, ValueError, TypeError):  # TypeError: an array of text
            array = torch.from_numpy(np.lib.format.open_memmap(path, mode="c"))
    shape = tuple(getattr(array, "shape", ()))
    if len(shape) != 2 or shape[0] != n:
        fail(
            f"--teacher {path} holds a {type(array).__name__} of shape {shape}; the corpus needs "
            f"an array ({n}, dimensions), a row per sentence in its order"
        )
    return array.detach()


def load_teacher(args, kept, n):
    """The teacher: the word lsa, an array (n kept sentences, d_T) or an Encoder."""
    name = args.teacher
    if name == "lsa":
        return name
    if name.endswith((".npy", ".pt")):
        array = read_array(name, n)
        return array if len(kept) == n else array[kept]  # without a copy where none is removed
    if Path(name).is_file():
        fail(f"--teacher {name}: as a file, give a .npy or .pt array; a model is a folder")
    device = pick_device(args.device)
    dtype = getattr(torch, args.dtype)
    return load_encoder(name, args.pooling, args.max_length, dtype, device)


def contents(teacher):
    """What a teacher's embeddings depend on, as parts of a hash."""
    if isinstance(teacher, Encoder):
        return [teacher.identity(), *teacher.model.state_dict().values()]
    return [teacher]


def embed(args, teacher, texts, part):
    """The teacher's embeddings of n sentences, (n, d_T). part: the file a model resumes from."""
    if isinstance(teacher, torch.Tensor):
        return teacher
    if isinstance(teacher, Encoder):
        tokens = tokenize(teacher, texts)
        with open(part, "a+b") as file:
            return encode(teacher, tokens, args.batch_size, Path(args.teacher).name, file)
    embeddings = torch.from_numpy(fit_lsa(texts).transform(texts))
    embeddings[embeddings.norm(dim=1) < 1e-3] = 0  # noise: it shares no word with other sentences
    return embeddings


# --------------------------------------------------------------------------------------- the cache
def rows_without_direction(embeddings, stored):
    """Positions of the rows of `stored`, (n, d_T), that lost the direction of their embedding.

    Eq. 3 needs nothing else. Such a row is not finite, or too large or small for its type.
    """
    cosines = []
    for rows, stored_rows in zip(embeddings.split(8192), stored.split(8192)):  # they may be on disk
        cosines.append(F.cosine_similarity(rows.float(), stored_rows.float(), eps=0))
    same = (torch.cat(cosines) - 1).abs() < 1e-3  # False for NaN
    return (~same).nonzero().flatten().tolist()


def make_cache(args, request, recipe, teacher, texts, sources, embeddings):
    """The cache's dict, of n texts, their sources and the teacher's embeddings (n, d_T).

    A sentence whose embedding is zero has no target and is removed: lsa may know none of its words.
    """
    nonzero = embeddings.any(dim=1).nonzero().flatten().tolist()
    if not nonzero:
        fail(f"{args.teacher}: all embeddings are zero")
    if len(nonzero) < len(texts):
        print(f"{len(texts) - len(nonzero)} sentences removed: their embeddings are zero")
        texts = [texts[i] for i in nonzero]
        sources = [sources[i] for i in nonzero]
        embeddings = embeddings[nonzero]
    dtype = torch.float16 if args.dtype == "float16" else torch.float32
    stored = embeddings.to(dtype).contiguous()
    bad = rows_without_direction(embeddings, stored)
    if bad:
        fail(
            f"{args.teacher}: {len(bad)} embeddings are not finite, or too large or too small for "
            f"{dtype}; the first is that of {texts[bad[0]][:60]!r}"
        )
    return {
        "sentences": texts,  # n str, unique
        "sources": sources,  # n str: the domain of each (Eq. 10)
        "embeddings": stored,  # (n, d_T), float32 or float16
        "teacher": args.teacher,
        "pooling": getattr(teacher, "pooling", "none"),
        "max_length": args.max_length,
        "fingerprint": digest(texts),
        "version": VERSION,
        "request": request,  # a hash of the corpus and the flags
        "recipe": recipe,  # a hash of these and of the teacher's content
    }


def check_cache(path, cache):
    """End the program if a file's content is not a cache, whole and of this format."""
    if not isinstance(cache, dict) or "fingerprint" not in cache:
        fail(f"{path} is not a teacher cache; cache_teacher.py --output NAME.pt writes one")
    if cache["version"] != VERSION:
        fail(f"{path} has format {cache['version']}, this code reads {VERSION}; make it again")
    sentences = cache["sentences"]
    embeddings = cache["embeddings"]
    counts = (len(set(sentences)), len(cache["sources"]), len(embeddings))
    if len(set(counts)) > 1:
        fail(f"{path}: unique sentences, sources and embeddings differ in number: {counts}")
    if digest(sentences) != cache["fingerprint"]:
        fail(f"{path}: the sentences are not those that were embedded (fingerprint)")
    if rows_without_direction(embeddings, embeddings):
        fail(f"{path} is damaged: some embeddings are zero or not finite; make it again")


def load_cache(path, needed=True):
    """The dict that make_cache made, checked; its embeddings stay on disk (mmap).

    If embeddings are not `needed`, they are None, the teacher is "none", and a corpus will do. Ends
    the program if the file can't be used.
    """
    if path.endswith(".pt"):
        if not Path(path).exists():
            fail(f"there is no {path}; make it: python cache_teacher.py --output {path}")
        cache = load(path)
        check_cache(path, cache)
    elif needed:
        fail(f"{path} is not a teacher cache; cache_teacher.py --output NAME.pt writes one")
    else:
        texts, sources = unique_corpus(path)[:2]
        cache = {"sentences": texts, "sources": sources, "fingerprint": digest(texts)}
    if not needed:
        cache |= {"embeddings": None, "teacher": "none"}
    return cache


# ------------------------------------------------------------------------------------ command line
def parse_args(argv):
    """The command line."""
    parser = argparse.ArgumentParser(
        description="Run the teacher once and cache its sentence embeddings.", allow_abbrev=False
    )
    parser.error = fail
    flag = parser.add_argument
    flag("--teacher", default="lsa", help="Hub id or folder; lsa; or a .npy or .pt array")
    flag("--corpus", default="demo", help="demo; paper; or a .txt, .jsonl, .csv or .tsv file")
    flag("--output", default="teacher.pt", help="the cache to write")
    flag("--overwrite", action="store_true", help="replace a cache that has other content")
    flag("--pooling", default="auto", choices=["auto", "cls", "mean", "last"], help="of a model")
    flag("--batch_size", type=positive, default=32, help="sentences per forward pass")
    flag("--max_length", type=positive, default=256, help="in tokens; longer sentences are cut")
    flag(
        "--dtype", default="float32", choices=DTYPES, help="of the weights; float16 is also stored"
    )
    flag("--device", default="auto", help="auto: the accelerator (not a Mac's), else cpu")
    flag("--seed", type=int, default=42, help="of the paper corpus's sample")
    args = parser.parse_args(argv)
    check_output("--output", args.output)
    keep_apart(args.output, "--teacher", args.teacher)
    if not args.output.endswith(".pt"):
        fail(f"--output {args.output}: the name of a cache ends with .pt")
    return args


def check_same(output, earlier, key, value):
    """End the program if the earlier cache in the output has another value of a key."""
    if earlier.get(key) != value:
        fail(f"{output} holds something else, by {earlier['teacher']}; --overwrite replaces it")


def main(argv=None):
    """The command line: read the corpus, run the teacher, write the cache."""
    args = parse_args(argv)
    with interruptible("run the same command again: it resumes a model, or starts again"):
        texts, sources, kept, n = unique_corpus(args.corpus, args.seed)
        request = digest(args.teacher, texts, sources, args.pooling, args.max_length, args.dtype)
        earlier = None
        if Path(args.output).exists() and not args.overwrite:
            earlier = load_cache(args.output)
            check_same(args.output, earlier, "request", request)  # before a model is loaded
        teacher = load_teacher(args, kept, n)
        recipe = digest(request, *contents(teacher))
        if earlier:
            check_same(args.output, earlier, "recipe", recipe)
            print(f"{args.output} holds this already; it is kept")
            return
        part = f"{args.output}.part-{recipe[:16]}"
        embeddings = embed(args, teacher, texts, part)
        cache = make_cache(args, request, recipe, teacher, texts, sources, embeddings)
        save(args.output, cache)
        Path(part).unlink(missing_ok=True)
    print(f"{args.output}: {tuple(cache['embeddings'].shape)} embeddings by {args.teacher}")


if __name__ == "__main__":
    main()
