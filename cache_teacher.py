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
from sklearn.decomposition import TruncatedSVD
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.pipeline import make_pipeline
from torch.nn import functional as F

from support import attempt, fail, interruptible, positive
from support.data import unique_corpus
from support.encoder import Encoder, encode, tokenize
from support.files import check_output, digest, load, save
from support.loading import load_encoder
from support.run import pick_device

VERSION = 1  # of the cache's format
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


# ------------------------------------------------------------------------------------ the teachers
def fit_lsa(sentences):
    """Latent semantic analysis, a teacher without a download: .transform(n str) -> (n, <= 32).

    TF-IDF without the most common words (in over 3 % of the sentences), which say little, then
    truncated SVD with a fixed seed.
    """
    most_common = max(50, len(sentences) * 3 // 100)
    tfidf = TfidfVectorizer(sublinear_tf=True, token_pattern=r"\w+", max_df=most_common)
    weights = tfidf.fit_transform(sentences)  # (n, different words)
    dimensions = min(32, min(weights.shape) - 1)
    if dimensions < 5:
        fail(
            f"{len(sentences)} sentences with {weights.shape[1]} different words are too small a "
            "corpus for lsa; give more, or another --teacher"
        )
    svd = TruncatedSVD(dimensions, random_state=0).fit(weights)
    return make_pipeline(tfidf, svd)


def read_array(path, n):
    """Embeddings from elsewhere, on disk: a .npy or .pt array, (n, d_T), a row per sentence."""
    if not Path(path).is_file():
        fail(f"--teacher {path}: there is no such file")
    if path.endswith(".pt"):
        array = load(path)
    else:
        errors = (OSError, ValueError, TypeError)  # TypeError: an array of text
        with attempt(f"read {path} as an array of numbers that numpy.save wrote", *errors):
            array = torch.from_numpy(np.lib.format.open_memmap(path, mode="c"))
    if not torch.is_tensor(array):
        fail(f"--teacher {path} holds a {type(array).__name__}, not an array of embeddings")
    if array.ndim != 2 or len(array) != n:
        fail(
            f"--teacher {path} is an array of {tuple(array.shape)}; the corpus needs "
            f"({n}, dimensions), a row per sentence in its order"
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
    if Path(name).exists() and not Path(name).is_dir():
        fail(f"--teacher {name}: as a file, give a .npy or .pt array; a model is a folder")
    device = pick_device(args.device)
    return load_encoder(name, args.pooling, args.max_length, DTYPES[args.dtype], device)


def contents(teacher):
    """All that a teacher's embeddings depend on, as parts of a hash."""
    if isinstance(teacher, Encoder):
        return [teacher.identity(), *teacher.model.state_dict().values()]
    return [teacher]


def embed(args, teacher, texts, part):
    """The teacher's embeddings of n sentences, (n, d_T). part: the file a model resumes from."""
    if isinstance(teacher, torch.Tensor):
        return teacher
    if isinstance(teacher, Encoder):
        tokens = tokenize(teacher, texts)
        Path(part).touch()
        with open(part, "r+b") as file:
            return encode(teacher, tokens, args.batch_size, Path(args.teacher).name, file)
    embeddings = torch.from_numpy(fit_lsa(texts).transform(texts))
    embeddings[embeddings.norm(dim=1) < 1e-3] = 0  # noise: it shares no word with other sentences
    return embeddings


# --------------------------------------------------------------------------------------- the cache
def fingerprint(sentences):
    """A hash of the sentences and their order."""
    return digest(sentences)


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
    kept = embeddings.any(dim=1).nonzero().flatten().tolist()
    if not kept:
        fail(f"{args.teacher}: all embeddings are zero")
    if len(kept) < len(texts):
        print(f"{len(texts) - len(kept)} sentences removed: their embeddings are zero")
        texts = [texts[i] for i in kept]
        sources = [sources[i] for i in kept]
        embeddings = embeddings[kept]
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
        "pooling": teacher.pooling if isinstance(teacher, Encoder) else "none",
        "max_length": args.max_length,
        "fingerprint": fingerprint(texts),
        "version": VERSION,
        "request": request,  # a hash of the corpus and the flags
        "recipe": recipe,  # a hash of all that the embeddings depend on
        "checksum": digest(stored),
    }


def check_cache(path, cache):
    """End the program if a file's content is not a cache, whole and of this format."""
    for key in ("sentences", "sources", "embeddings", "teacher", "fingerprint", "version"):
        if not isinstance(cache, dict) or key not in cache:
            fail(f"{path} is not a teacher cache: it has no {key}")
    if cache["version"] != VERSION:
        fail(f"{path} has format {cache['version']}, this code reads {VERSION}; make it again")
    sentences = cache["sentences"]
    embeddings = cache["embeddings"]
    counts = (len(set(sentences)), len(cache["sources"]), len(embeddings))
    if len(set(counts)) > 1:
        fail(f"{path}: unique sentences, sources and embeddings differ in number: {counts}")
    if fingerprint(sentences) != cache["fingerprint"]:
        fail(f"{path}: the sentences are not those that were embedded (fingerprint)")
    intact = cache.get("checksum") in (None, digest(embeddings))
    if not intact or rows_without_direction(embeddings, embeddings):
        fail(f"{path} is damaged: its embeddings are not those that were written; make it again")


def load_cache(path, needed=True):
    """The dict that make_cache made, checked; its embeddings stay on disk (mmap).

    If embeddings are not `needed`, they and the teacher are None, and a corpus will do. Ends the
    program if the file can't be used.
    """
    if not needed and not path.endswith(".pt"):
        texts, sources = unique_corpus(path)[:2]
        cache = {"sentences": texts, "sources": sources, "fingerprint": fingerprint(texts)}
        return cache | {"embeddings": None, "teacher": None}
    if not Path(path).is_file() or path.endswith(".npy"):
        flag = "--output" if path.endswith(".pt") else "--teacher"
        fail(f"{path} is not a teacher cache; make one: python cache_teacher.py {flag} {path}")
    cache = load(path)
    check_cache(path, cache)
    if not needed:
        cache |= {"embeddings": None, "teacher": None}
    return cache


# ------------------------------------------------------------------------------------ command line
def parse_args(argv):
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.error = fail
    flag = parser.add_argument
    flag("--teacher", default="lsa", help="Hub id or folder; lsa; or a .npy or .pt array")
    flag("--corpus", default="demo", help="demo; paper; or a .txt, .jsonl, .csv or .tsv file")
    flag("--output", default="teacher.pt", help="the cache to write")
    flag("--overwrite", action="store_true", help="replace a cache that has other content")
    flag("--pooling", default="auto", choices=["auto", "cls", "mean", "last"], help="of a model")
    flag("--batch_size", type=positive, default=32, help="sentences per forward pass")
    flag("--max_length", type=positive, default=256, help="in tokens; longer sentences are cut")
    flag("--dtype", default="float32", choices=DTYPES, help="of the weights; float16: stored so")
    flag("--device", default="auto", help="auto: the accelerator if there is one, else cpu")
    flag("--seed", type=int, default=42, help="of the paper corpus's sample")
    args = parser.parse_args(argv)
    check_output("--output", args.output, teacher=args.teacher, corpus=args.corpus)
    if Path(args.output).exists() and not args.output.endswith(".pt"):
        fail(f"--output {args.output} exists and is not a .pt file; choose another --output")
    return args


def refuse(output, earlier):
    """End the program: the output holds another cache."""
    content = f"{len(earlier['sentences'])} sentences, {earlier['teacher']}"
    fail(f"{output} holds something else ({content}); --overwrite replaces it")


def main(argv=None):
    """The command line: read the corpus, run the teacher, write the cache."""
    args = parse_args(argv)
    with interruptible("run the same command again: it resumes a model, or starts again"):
        texts, sources, kept, n = unique_corpus(args.corpus, args.seed)
        request = digest(args.teacher, texts, sources, args.pooling, args.max_length, args.dtype)
        earlier = None
        if Path(args.output).exists() and not args.overwrite:
            earlier = load_cache(args.output)
            if earlier.get("request", request) != request:  # seen before a model is loaded
                refuse(args.output, earlier)
        teacher = load_teacher(args, kept, n)
        recipe = digest(texts, sources, args.max_length, args.dtype, *contents(teacher))
        if earlier:
            if earlier.get("recipe") != recipe:
                refuse(args.output, earlier)
            print(f"{args.output} holds this already; it is kept")
            return
        part = f"{args.output}.part-{recipe[:16]}"
        embeddings = embed(args, teacher, texts, part)
        cache = make_cache(args, request, recipe, teacher, texts, sources, embeddings)
        save(args.output, cache)
        Path(part).unlink(missing_ok=True)
    n, d_T = cache["embeddings"].shape
    print(f"{args.output}: {n} embeddings of {d_T} dimensions by {args.teacher}")


if __name__ == "__main__":
    main()
