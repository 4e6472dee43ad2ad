"""What each layer of a student knows: why TAMD stands on a plateau.

    python study/geometry.py --teacher mpnet.pt student-cls runs/B-T-42 runs/B-STL-42

For 960 sentences of the cache and each layer: how far apart the embeddings are (1 - their mean
cosine), how well their similarities follow the teacher's (Spearman), and, where projections.pt lies
beside the student, the layer's own term of TAMD; and the TAMD of one vector for all sentences, the
best there is. The figures go into results.json, which report.py makes the table `geometry` of.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from support import fail, one_line
from support.encoder import Corpus
from support.loading import load_encoder

import torch
import torch.nn.functional as F
from scipy.stats import spearmanr

import talas
from cache_teacher import load_cache
from study.results import RESULTS, record

SENTENCES, N = 960, 32


@torch.no_grad()
def layers_of(student, corpus, rows):
    """Sentence embeddings after each layer without dropout: L of (n, d_S); and the teacher's."""
    student.model.eval()
    batches = [corpus.batch(some)[:2] for some in rows.split(N)]
    embedded = [talas.embed(student, tokens, talas.Settings()) for tokens, _ in batches]
    layers = [torch.cat([E[0] for E in layer]) for layer in zip(*embedded, strict=True)]
    return layers, torch.cat([teacher for _, teacher in batches])


def pairs_of(E):
    """The cosine of every pair of sentences: (n, d) -> (n (n - 1) / 2,)."""
    i, j = torch.triu_indices(len(E), len(E), offset=1)
    return talas.relation_matrix(E.double())[i, j]


def geometry(layers, projections, teacher):
    """A dict for each layer, bottom to top; the projections are those of the top layers."""
    without = len(layers) - len(projections)
    found = []
    for number, E in enumerate(layers):
        cosines = pairs_of(E)
        one = {"layer": number + 1, "spread": 1 - cosines.mean().item()}
        one["spearman"] = 100 * float(spearmanr(cosines, pairs_of(teacher)).statistic)
        if number >= without:
            W = projections[number - without]
            one["tamd"] = talas.tamd_loss([E], [W], teacher).item()
        found.append(one)
    return found


@one_line
def main(argv=None):
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    flag, parser.error = parser.add_argument, fail
    flag("students", nargs="+", type=Path, help="directories, with or without projections.pt")
    flag("--teacher", default="teacher.pt", help="the cache")
    flag("--names", nargs="*", help="what to call them; else their directories' names")
    flag("--results", default=RESULTS, help="the file for the figures")
    args = parser.parse_args(argv)
    if args.names and len(args.names) != len(args.students):
        fail(f"--names: give {len(args.students)}, one for each student")
    cache = load_cache(args.teacher)
    n = len(cache["sentences"])
    rows = torch.arange(0, n, max(n // SENTENCES, 1))[:SENTENCES]
    for path, name in zip(args.students, args.names or [path.name for path in args.students]):
        student, W = load_encoder(str(path), device=torch.device("cpu")), path / "projections.pt"
        projections = torch.load(W, weights_only=True) if W.exists() else []
        layers, teacher = layers_of(student, Corpus(cache, student), rows)
        entry = {"name": name, "layers": geometry(layers, projections, teacher)}
        record(args.results, f"geometry/{name}", entry)
        print(entry)
    mean = F.normalize(teacher).mean(0)  # its cosine to all of them is the largest, on average
    one = {"layer": "", "tamd": 1 - mean.norm().item()}
    record(args.results, "geometry/~", {"name": "one vector for all", "layers": [one]})


if __name__ == "__main__":
    main()
