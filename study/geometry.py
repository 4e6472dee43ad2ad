"""What each layer of a student has learnt: why TAMD stays on a plateau.

    python study/geometry.py --teacher mpnet.pt student-cls runs/B-T-42 runs/B-STL-42

For each layer, on 960 sentences: how far apart the embeddings are (1 - mean cosine), how well their
similarities follow the teacher's (Spearman), its term of TAMD. Last, TAMD of the best one vector.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
from scipy.stats import spearmanr

import talas
from cache_teacher import load_cache
from study.baselines import cosines
from study.results import command_line, record
from support.data import Corpus
from support.encoder import pooled_layers
from support.files import load
from support.loading import load_encoder

SENTENCES = 960


@torch.no_grad()
def geometry(encoder, projections, corpus, rows):
    """A dict for each layer, bottom to top; the projections are those of the top layers."""
    encoder.model.eval()  # without dropout
    tokens, teacher, _ = corpus.batch(rows)  # teacher: (n, d_T)
    teacher_cosines = cosines(teacher.double())  # (n (n - 1) / 2,)
    not_anchored = [None] * (encoder.layers - len(projections))
    layers = []
    for E, W in zip(pooled_layers(encoder, tokens)[1:], not_anchored + projections):  # (n, d_S)
        student_cosines = cosines(E.double())
        layer = {
            "spread": 1 - student_cosines.mean().item(),
            "spearman": 100 * float(spearmanr(student_cosines, teacher_cosines).statistic),
        }
        if W is not None:
            layer["tamd"] = talas.tamd_loss([E], [W], teacher).item()
        layers.append(layer)
    return layers


def main(argv=None):
    """The command line."""
    parser = command_line(__doc__)
    parser.add_argument("students", nargs="+", help="folders, with or without projections.pt")
    parser.add_argument("--teacher", default="teacher.pt", help="the cache")
    args = parser.parse_args(argv)
    cache = load_cache(args.teacher)
    n = len(cache["sentences"])
    rows = torch.arange(n)[:: max(n // SENTENCES, 1)][:SENTENCES]
    for folder in args.students:
        encoder = load_encoder(folder)
        W_file = Path(folder, "projections.pt")
        projections = load(W_file) if W_file.exists() else []
        layers = geometry(encoder, projections, Corpus(cache, encoder), rows)
        name = Path(folder).name
        record(args.results, f"geometry/{name}", {"name": name, "layers": layers})
    unit_vectors = torch.nn.functional.normalize(cache["embeddings"][rows].float())
    mean = unit_vectors.mean(0)  # the nearest, on average
    layer = {"tamd": 1 - mean.norm().item()}
    record(args.results, "geometry/~", {"name": "one vector for all", "layers": [layer]})


if __name__ == "__main__":
    main()
