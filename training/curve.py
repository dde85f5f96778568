"""Draw the loss curves of a run from its logs, `body.csv` and `full.csv`."""

from __future__ import annotations

import argparse
import csv
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt


def draw(run: Path, out: Path) -> None:
    """Draw one panel for each phase: the loss over the steps, raw and averaged over 100 steps."""
    figure, axes = plt.subplots(1, 2, figsize=(10, 4), sharey=True)
    for axis, phase, title in zip(
        axes, ("body", "full"), ("body, 32×32, batch 16", "full, 64×64, batch 8"), strict=True
    ):
        rows = [(int(row[0]), float(row[1])) for row in csv.reader((run / f"{phase}.csv").open())]
        steps, losses = zip(*rows, strict=True)
        mean = [sum(losses[max(0, k - 4) : k + 1]) / len(losses[max(0, k - 4) : k + 1]) for k in range(len(losses))]
        axis.semilogy(steps, losses, alpha=0.3, color="C0")
        axis.semilogy(steps, mean, color="C0")
        axis.set(title=title, xlabel="step")
        axis.grid(alpha=0.3, which="both")
    axes[0].set_ylabel("v-prediction loss (MSE)")
    figure.tight_layout()
    figure.savefig(out, dpi=100)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path, help="the run folder of train.py")
    parser.add_argument("out", type=Path, help="file for the picture")
    draw(**vars(parser.parse_args()))
