"""What each layer of a student knows: why TAMD stands on a plateau.

    python study/geometry.py --teacher mpnet.pt student-cls runs/B-T-42 runs/B-STL-42

For each layer, on 960 sentences: how far apart the embeddings are (1 - mean cosine), how well their
similarities follow the teacher's (Spearman), its term of TAMD; last, that of the best one vector.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
import torch.nn.functional as F
from scipy.stats import spearmanr

import talas
from cache_teacher import load_cache
from study.baselines import cosines
from study.results import command_line, record
from support import fail
from support.encoder import Corpus, pooled_layers
from support.files import check_output, load
from support.loading import load_encoder

SENTENCES, N = 960, 32


@torch.no_grad()
def geometry(student, projections, corpus, rows):
    """A dict for each layer, bottom to top; the projections are those of the top layers."""
    student.model.eval()  # without dropout
    batches, found = [corpus.batch(some) for some in rows.split(N)], []
    teacher = torch.cat([targets for _, targets, _ in batches])  # (n, d_T)
    embedded = [pooled_layers(student, tokens) for tokens, _, _ in batches]
    layers = list(map(torch.cat, zip(*embedded)))  # L of (n, d_S)
    for number, E in enumerate(layers, 1):
        alike, target = cosines(E.double()), cosines(teacher.double())  # (n (n - 1) / 2,)
        rank = 100 * float(spearmanr(alike, target).statistic)
        found.append({"layer": number, "spread": 1 - alike.mean().item(), "spearman": rank})
    for one, E, W in zip(found[::-1], layers[::-1], projections[::-1]):
        one["tamd"] = talas.tamd_loss([E], [W], teacher).item()
    return found


def main(argv=None):
    """The command line."""
    parser, flag = command_line(__doc__)
    flag("students", nargs="+", type=Path, help="directories, with or without projections.pt")
    flag("--teacher", default="teacher.pt", help="the cache")
    flag("--names", nargs="*", help="what to call them; else their directories' names")
    args = parser.parse_args(argv)
    check_output("--results", args.results, teacher=args.teacher)
    names = args.names or [path.name for path in args.students]
    if len(names) != len(args.students):
        fail(f"--names: give {len(args.students)}, one for each student")
    cache = load_cache(args.teacher)
    n = len(cache["sentences"])
    rows = torch.arange(n)[:: max(n // SENTENCES, 1)][:SENTENCES]
    for path, name in zip(args.students, names):
        student, W = load_encoder(str(path)), path / "projections.pt"
        layers = geometry(student, load(W) if W.exists() else [], Corpus(cache, student), rows)
        record(args.results, f"geometry/{name}", {"name": name, "layers": layers})
        print(name, layers)
    mean = F.normalize(cache["embeddings"][rows].float()).mean(0)  # nearest to all, on average
    one = {"layer": "", "tamd": 1 - mean.norm().item()}
    record(args.results, "geometry/~", {"name": "one vector for all", "layers": [one]})


if __name__ == "__main__":
    main()
