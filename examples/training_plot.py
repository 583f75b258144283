"""The plot of `examples.train`: loss and accuracy by epoch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

__all__ = ["draw"]

LOSS, ACCURACY = "#3b78b8", "#e8590c"


def draw(path: Path, history: Sequence[dict[str, float]]) -> None:
    """Draws the history into the file `path`, whose suffix names the format."""
    figure = Figure(figsize=(9, 3.6), facecolor="white", layout="constrained")
    epochs = [int(entry["epoch"]) for entry in history]
    panels = figure.subplots(1, 2)
    for panel, name, color in zip(panels, ("loss", "accuracy"), (LOSS, ACCURACY), strict=True):
        values = [entry[name] for entry in history]
        panel.plot(epochs, values, color=color, linewidth=2, marker="o", markersize=3)
        panel.set_xlabel("epoch")
        panel.grid(color="#dee2e6", linewidth=0.6)
        panel.spines[["top", "right"]].set_visible(False)
        panel.xaxis.set_major_locator(MaxNLocator(integer=True))
    panels[0].set_title("Loss of the training")
    panels[1].set_title(f"Accuracy of the averaged weights: best {max(e['accuracy'] for e in history):.1%}")
    panels[1].yaxis.set_major_formatter(PercentFormatter(1.0))
    figure.savefig(path, dpi=120)
