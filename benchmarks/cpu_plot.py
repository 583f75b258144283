"""A roofline of a CPU benchmark: operations per second over operations per byte, under what the processor can do."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.compare import Record
from benchmarks.floors import Rates
from benchmarks.implementations import OURS

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["plot", "roof"]

# A label's height on the logarithmic axis, and its distance to the right of the points.
_LINE, _GAP = 1.18, 1.15
_MARKERS = {OURS: "o", "gather": "x", "swin": "s", "swin-sdpa": "D", "dense": "v", "natten": "P", "flex": "^"}


def roof(rates: Rates, flop_per_byte: float) -> float:
    """The most operations per second that bytes and multiply-adds both allow."""
    return min(rates.flops_per_second, flop_per_byte * rates.bytes_per_second)


def plot(path: Path, records: Sequence[Record], rates: Rates, title: str) -> None:
    """Draws a panel for each dtype and mode, with a point for each case and implementation; nothing without results.

    Raises:
        ImportError: matplotlib is missing.
    """
    measured = [one for one in records if one.median_ms]
    panels = list(dict.fromkeys((one.dtype, one.mode) for one in measured))
    if not panels:
        return
    # Without `pyplot`, which would look for a display.
    from matplotlib.figure import Figure

    columns = min(2, len(panels))
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(7 * columns, 1 + 6 * rows), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True).flat
    for axes, (dtype, mode) in zip(grid, panels, strict=False):
        _draw(axes, [one for one in measured if (one.dtype, one.mode) == (dtype, mode)], rates)
        axes.set_title(f"{dtype} {mode}", fontsize=10)
    for axes in list(grid)[len(panels) :]:
        axes.set_visible(False)
    figure.supxlabel("operations per byte of the inputs and outputs", fontsize=10)
    figure.supylabel("useful GFLOP/s", fontsize=10)
    figure.suptitle(title.replace(": ", "\n", 1), fontsize=10)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def _draw(axes: Axes, records: Sequence[Record], rates: Rates) -> None:
    for name, marker in _MARKERS.items():
        points = [
            (one.flop_per_byte, one.gflop / one.median_ms[name] * 1e3) for one in records if name in one.median_ms
        ]
        if points:
            axes.scatter(*zip(*points, strict=True), s=24, marker=marker, label=name, zorder=3 if name == OURS else 2)
    _label(axes, {one.case: (one.flop_per_byte, one.gflop / one.median_ms[OURS] * 1e3) for one in records})
    ridge = rates.flops_per_second / rates.bytes_per_second
    ends = [one.flop_per_byte for one in records]
    corners = sorted((0.5 * min(*ends, ridge), ridge, 3 * max(*ends, ridge)))
    axes.plot(corners, [roof(rates, one) / 1e9 for one in corners], color="black", linewidth=1, label="roof")
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7, loc="lower right")


def _label(axes: Axes, points: Mapping[str, tuple[float, float]]) -> None:
    """Names the points in one column beside them, from the top down, since many have the same operations per byte."""
    right = _GAP * max(x for x, _ in points.values())
    lowest = float("inf")
    for name, (x, y) in sorted(points.items(), key=lambda item: item[1][::-1], reverse=True):
        lowest = min(y, lowest / _LINE)
        line = {"arrowstyle": "-", "linewidth": 0.3, "color": "gray"}
        axes.annotate(name, (x, y), xytext=(right, lowest), fontsize=6, va="center", arrowprops=line)
