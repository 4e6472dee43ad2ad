"""Run the teacher once and cache its sentence embeddings: Algorithm 1, line 3; Appendices C and D.

    python cache_teacher.py                                  # the demo corpus, the lsa teacher
    python cache_teacher.py --teacher BAAI/bge-m3 --corpus paper --output bge-m3.pt

The cache is a dict, read with torch.load(path, weights_only=True, mmap=True): sentences (n str,
unique), sources (n str, the domain of each), embeddings (n, d_T), teacher, pooling, max_length,
fingerprint (of the sentences), version, recipe (of all that the embeddings depend on), checksum
(of the embeddings).
"""

import argparse
from functools import partial
from pathlib import Path

import numpy as np
import torch
from sklearn.decomposition import TruncatedSVD
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.pipeline import make_pipeline

from support import attempt, fail, interruptible
from support.data import is_word, unique_corpus
from support.encoder import encode, tokenize
from support.files import check_output, digest, load, positive, save
from support.loading import load_encoder
from support.run import pick_device

VERSION = 1  # of the cache's format
KEYS = ("sentences", "sources", "embeddings", "teacher", "fingerprint", "version")
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


# ------------------------------------------------------------------------------------ the teachers
def fit_lsa(sentences):
    """Latent semantic analysis, an embedder without a download: .transform(n str) -> (n, <= 32).

    TF-IDF without the commonest words (in over 3 % of the sentences), which say little, then
    truncated SVD; seeded.
    """
    commonest = max(50, len(sentences) * 3 // 100)
    tfidf = TfidfVectorizer(sublinear_tf=True, token_pattern=r"\w+", max_df=commonest)
    with attempt("fit the lsa teacher, which needs sentences with different words", ValueError):
        counts = tfidf.fit_transform(sentences)
        svd = TruncatedSVD(min(32, min(counts.shape) - 1), random_state=0).fit(counts)
    return make_pipeline(tfidf, svd)


def read_array(path, n):
    """Embeddings from elsewhere: a .npy or .pt array (n, d_T), a row a sentence of the corpus."""
    errors = OSError, ValueError, TypeError  # the last one for an array of text
    with attempt(f"read {path} as an array of numbers that numpy.save wrote", *errors):
        npy = path.endswith(".npy")
        array = torch.from_numpy(np.lib.format.open_memmap(path, "c")) if npy else load(path)
    if not torch.is_tensor(array) or not array.is_floating_point() or array.ndim != 2:
        found = f"{array.dtype} {tuple(array.shape)}" if torch.is_tensor(array) else type(array)
        fail(f"{path}: {found} is no array of floats, (sentences, dimensions)")
    if len(array) != n:
        fail(f"{path} has {len(array)} rows, the corpus {n} sentences; give a row each, in order")
    return array.detach()


def read_teacher(args, texts, kept, n):
    """(pooling, what the embeddings depend on, a function: path of a part file -> embeddings)."""
    if is_word(args.teacher, "lsa"):
        return "none", ["lsa"], lambda part: torch.from_numpy(fit_lsa(texts).transform(texts))
    if args.teacher.endswith((".npy", ".pt")):
        embeddings = read_array(args.teacher, n)[kept]
        return "none", [embeddings], lambda part: embeddings
    if Path(args.teacher).is_file():
        fail(f"{args.teacher}: of files, .npy and .pt arrays are read; a model is a folder")
    how = args.pooling, args.max_length, DTYPES[args.dtype], pick_device(args.device)
    encoder = load_encoder(args.teacher, *how)
    tokens = tokenize(encoder, texts)
    content = [encoder.identity(), *encoder.model.state_dict().values()]
    label = Path(args.teacher).name
    return encoder.pooling, content, partial(encode, encoder, tokens, args.batch_size, label)


# --------------------------------------------------------------------------------------- the cache
def fingerprint(sentences):
    """A hash of the sentences and their order."""
    return digest(sentences)


def all_have_a_direction(embeddings):
    """Whether float32 can hold the direction of each row (n, d_T), as Eq. 3 needs."""
    norms = [rows.float().norm(dim=1) for rows in embeddings.split(65_536)]  # they may lie on disk
    return all(((n > 1e-15) & n.isfinite()).all() for n in norms)


def make_cache(args, texts, sources, embeddings, pooling, recipe):
    """The cache's dict, of n texts and the teacher's embeddings (n, d_T).

    A sentence whose embedding is zero has no target and goes: lsa may know none of its words.
    """
    keep = embeddings.any(dim=1).nonzero().flatten().tolist()
    if len(keep) < len(texts):
        print(f"{len(texts) - len(keep)} sentences removed: their embeddings are zero")
    embeddings = embeddings[keep].to(torch.float16 if args.dtype == "float16" else torch.float32)
    if not keep or not all_have_a_direction(embeddings):
        fail(
            f"{args.teacher}: embeddings are zero, not finite, too large or small for {args.dtype}"
        )
    sentences = [texts[i] for i in keep]
    cache = {"sentences": sentences, "sources": [sources[i] for i in keep]}
    cache |= {"embeddings": embeddings, "teacher": args.teacher, "pooling": pooling}
    cache |= {"max_length": args.max_length, "fingerprint": fingerprint(sentences)}
    return cache | {"version": VERSION, "recipe": recipe, "checksum": digest(embeddings)}


def load_cache(path, needed=True):
    """The dict that this script wrote, checked; its embeddings stay on disk (mmap).

    If embeddings are not `needed`, a corpus will do. Ends the program if the file can't be used.
    """
    if not needed and not path.endswith(".pt"):
        texts, sources, *_ = unique_corpus(path)
        cache = {"sentences": texts, "sources": sources, "fingerprint": fingerprint(texts)}
        return cache | {"embeddings": None, "teacher": None}
    if not Path(path).exists() or path.endswith(".npy"):
        own = f"--output {path}" if path.endswith(".pt") else f"--teacher {path}"
        fail(f"{path} is no teacher cache; make one: python cache_teacher.py {own}")
    cache = load(path)
    for key in KEYS:
        if not isinstance(cache, dict) or key not in cache:
            fail(f"{path} is no teacher cache: it has no {key}")
    if cache["version"] != VERSION:
        fail(f"{path} has format {cache['version']}, this code reads {VERSION}; make it anew")
    sentences, sources, embeddings = (cache[key] for key in KEYS[:3])
    floats, shape = embeddings.dtype in (torch.float32, torch.float16), tuple(embeddings.shape)
    if not floats or not shape[:-1] == (len(sources),) == (len(set(sentences)),):
        counts = f"{len(set(sentences))} unlike sentences, {len(sources)} sources"
        need = f"{embeddings.dtype} {shape} of embeddings; a row each, float32 or float16"
        fail(f"{path}: {counts} and {need}")
    if fingerprint(sentences) != cache["fingerprint"]:
        fail(f"{path}: the sentences are not those that were embedded (fingerprint)")
    sound = cache.get("checksum") in (None, digest(embeddings))
    if not sound or not all_have_a_direction(embeddings):
        fail(f"{path} is damaged: some embeddings are not as they were written; make it anew")
    return cache if needed else cache | {"embeddings": None, "teacher": None}


# ------------------------------------------------------------------------------------ command line
def parse_args(argv):
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    flag, parser.error = parser.add_argument, fail
    flag("--teacher", default="lsa", help="Hub id or directory; lsa; or a .npy or .pt array")
    flag("--corpus", default="demo", help="demo; paper; or a .txt, .jsonl, .csv or .tsv file")
    flag("--output", default="teacher.pt", help="the cache to write")
    flag("--overwrite", action="store_true", help="replace a cache with other content")
    flag("--pooling", default="auto", choices=["auto", "cls", "mean", "last"], help="of a model")
    flag("--batch_size", type=positive, default=32, help="sentences a forward pass")
    flag("--max_length", type=positive, default=256, help="tokens; longer sentences are cut")
    flag("--dtype", default="float32", choices=DTYPES, help="of the weights; float16: stored so")
    flag("--device", default="auto", help="auto: the accelerator if there is one, else cpu")
    flag("--seed", type=positive, default=42, help="of the paper corpus's sample")
    args = parser.parse_args(argv)
    check_output("--output", args.output, teacher=args.teacher, corpus=args.corpus)
    if not args.output.endswith(".pt") and Path(args.output).exists():
        fail(f"--output {args.output} is there, and its name is not a cache's, which ends in .pt")
    return args


def main(argv=None):
    """The command line: read the corpus, run the teacher, write the cache."""
    args = parse_args(argv)
    with interruptible("the same command goes on with what is embedded, or begins again"):
        texts, sources, kept, n = unique_corpus(args.corpus, args.seed)
        pooling, content, embed = read_teacher(args, texts, kept, n)
        recipe = digest(texts, sources, args.max_length, args.dtype, *content)
        if Path(args.output).exists() and not args.overwrite:
            old = load_cache(args.output)
            if old.get("recipe") != recipe:
                there = f"{len(old['sentences'])} sentences, {old['teacher']}"
                fail(f"{args.output} holds something else ({there}); --overwrite replaces it")
            print(f"{args.output} holds this already; kept as it is")
            return
        part = f"{args.output}.part-{recipe[:16]}"
        cache = make_cache(args, texts, sources, embed(part), pooling, recipe)
        save(args.output, cache)
        Path(part).unlink(missing_ok=True)
    n, d = cache["embeddings"].shape
    print(f"{args.output}: {n} embeddings of {d} dimensions by {args.teacher}")


if __name__ == "__main__":
    main()
