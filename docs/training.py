"""Draws training.svg from the metrics.jsonl of runs (README, "A real distillation"); the first is AdamW's, then ASAM's:

pip install matplotlib==3.11.2
python docs/training.py real-STL real-STL-A real-rho1 real-rho2
"""

import json
import sys
from pathlib import Path

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt

GREY = "#7d8590"  # the lines and letters: readable on white and on black
plt.rcParams |= {
    "svg.fonttype": "none",
    "svg.hashsalt": "talas",
    "font.family": "sans-serif",
    "font.size": 9,
}
plt.rcParams |= dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), GREY)
lines = [
    [json.loads(line) for line in Path(run, "metrics.jsonl").read_text().splitlines()]
    for run in sys.argv[1:]
]
rho = [json.loads(Path(run, "talas.json").read_text())["settings"]["rho"] for run in sys.argv[1:]]
labels = ["AdamW", *(f"ρ = {value:g}" for value in rho[1:])]
colours = [GREY, "#e0b050", "#e08a3c", "#d9603b", "#b8405e", "#8a3a8f"]

figure, (terms, gap, flatness) = plt.subplots(1, 3, figsize=(9.6, 3), layout="constrained")
steps = lambda run, key: zip(*((line["step"], line[key]) for line in run if key in line))
for name, colour in {"tamd": "#4a90d9", "simcse": "#9a6dd7", "lasd": "#3a9d5d"}.items():
    terms.plot(
        *steps(lines[1], name),
        color=colour,
        label={"tamd": "TAMD", "simcse": "SimCSE", "lasd": "LASD"}[name],
    )
terms.set(title="The three terms", yscale="log", xlabel="step")
for run, label, colour in zip(lines[1:], labels[1:], colours[1:]):
    gap.plot(*steps(run, "sharpness_gap"), color=colour, label=label)
gap.set(title="Sharpness gap, L(w̃) − L(w)", yscale="log", xlabel="step")
for axes in (terms, gap):
    axes.legend(frameon=False, labelcolor=GREY)
largest = [run[-1]["lambda_max"] for run in lines]
for bar, value in zip(flatness.bar(labels, largest, color=colours, width=0.6), largest):
    flatness.annotate(f"{value:.0f}", (bar.get_x() + 0.3, value), ha="center", va="bottom")
flatness.set(title="λ_max after the last epoch")
for axes in (terms, gap, flatness):
    axes.patch.set_alpha(0)
    axes.spines[["top", "right"]].set_visible(False)
figure.savefig(Path(__file__).parent / "training.svg", transparent=True, metadata={"Date": None})
