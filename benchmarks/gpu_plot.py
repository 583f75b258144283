"""A picture of a GPU benchmark: every implementation's time, as a multiple of the floor."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from benchmarks.gpu_records import GpuRecord
from benchmarks.implementations import OURS

__all__ = ["plot"]

_MARKERS = {OURS: "o", "swin": "s", "flex": "^", "flex-tiled": "v", "natten-hopper": "D", "natten-cutlass": "d"}


def plot(path: Path, records: Sequence[GpuRecord], title: str) -> None:
    """Draws one line per case and mode, on a logarithmic axis where 1 is the floor; nothing without results.

    Raises:
        ImportError: matplotlib is missing.
    """
    shown = [one for one in records if one.results]
    if not shown:
        return
    # Without `pyplot`, which would look for a display.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 1.5 + 0.28 * len(shown)), layout="constrained")
    axes = figure.add_subplot()
    for name, marker in _MARKERS.items():
        points = [(_multiple(one, name), row) for row, one in enumerate(shown) if name in one.results]
        if points:
            axes.scatter(*zip(*points, strict=True), marker=marker, label=name, zorder=3 if name == OURS else 2)
    axes.axvline(1, color="black", linewidth=1)
    axes.set_xscale("log")
    axes.set_xlabel("time / floor (1: as fast as the memory or the matrix units allow)")
    axes.set_yticks(range(len(shown)), [f"{one.case} {one.mode}" for one in shown], fontsize=8)
    axes.invert_yaxis()
    axes.grid(axis="both", alpha=0.3)
    axes.legend(fontsize=8)
    axes.set_title(title, fontsize=10)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def _multiple(one: GpuRecord, name: str) -> float:
    return one.results[name].median_us / max(one.memory_floor_us, one.matrix_floor_us)
