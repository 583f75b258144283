"""The picture of `examples.digits`: what the model read, and what a query of its first level sees."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure
from matplotlib.patches import Patch, Rectangle
from torch import Tensor

from natten2.window import neighbors

__all__ = ["draw"]

INK, FAINT, QUERY, KEY, MISTAKE = "#212529", "#6c757d", "#e8590c", "#3b78b8", "#c92a2a"
ROWS, COLUMNS = 3, 12
LEFT, RIGHT = 0.03, 0.97  # margins, as parts of the width


@dataclass(frozen=True)
class Query:
    """A query's row and column, the dilation of its window, and what there is to see."""

    token: tuple[int, int]
    dilation: int
    title: str
    note: str


QUERIES = (
    Query((4, 3), 1, "In the middle", "the query is the\nwindow's centre"),
    Query((0, 3), 1, "At an edge", "the window is shifted\ndown, back inside"),
    Query((0, 0), 1, "In a corner", "shifted down and right,\nbut never cut"),
    Query((4, 3), 2, "Dilation 2", "as many keys,\nevery second token"),
    Query((0, 7), 2, "Dilation 2, corner", "shifted in steps of\ntwo tokens"),
)


def draw(path: Path, scans: Tensor, labels: Tensor, predicted: Tensor, kernel_size: int) -> None:
    """Draws the picture into the file `path`, and makes its folder where it is missing.

    Args:
        path: Where to; the suffix names the format.
        scans: The test scans, `[N, 1, 8, 8]`.
        labels: The digits they show, `[N]`.
        predicted: The digits that the model read, `[N]`.
        kernel_size: Keys per window and axis.
    """
    wrong = (predicted != labels).nonzero().flatten().tolist()
    right = (predicted == labels).nonzero().flatten().tolist()
    figure = Figure(figsize=(11, 8), facecolor="white")
    upper, lower = figure.subfigures(2, 1)
    _headline(upper, "What the model read", _verdict(len(wrong), len(scans)))
    _draw_readings(upper, scans, labels, predicted, (wrong + right)[: ROWS * COLUMNS])
    _headline(
        lower,
        "What a query sees",
        f"One token per pixel. Every query sees {kernel_size} x {kernel_size} keys, also at the border.",
    )
    _draw_windows(lower, scans[_first(labels, right, digit=8), 0], kernel_size)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def _headline(figure: SubFigure, title: str, text: str) -> None:
    figure.text(LEFT, 0.95, title, va="top", fontsize=15, weight="bold", color=INK)
    figure.text(LEFT, 0.875, text, va="top", fontsize=11, color=FAINT)


def _verdict(mistakes: int, total: int) -> str:
    rest = "; the mistakes, framed, come first." if mistakes else "."
    return f"{total - mistakes} of {total} held-out scans right ({1 - mistakes / total:.1%}){rest}"


def _first(labels: Tensor, indices: Sequence[int], digit: int) -> int:
    """The first of the scans that shows `digit`, or else the first of all."""
    return next((index for index in indices if labels[index] == digit), 0)


def _draw_readings(figure: SubFigure, scans: Tensor, labels: Tensor, predicted: Tensor, chosen: Sequence[int]) -> None:
    panels = figure.subplots(
        ROWS, COLUMNS, gridspec_kw={"left": LEFT, "right": RIGHT, "top": 0.77, "bottom": 0.07, "hspace": 0.45}
    ).flatten()
    for panel in panels[len(chosen) :]:
        panel.set_axis_off()
    for panel, index in zip(panels, chosen, strict=False):
        read, shown = int(predicted[index]), int(labels[index])
        _draw_scan(panel, scans[index, 0])
        if read == shown:
            panel.set_xlabel(f"{read}", fontsize=12, color=INK)
        else:
            panel.set_xlabel(f"{read}, is {shown}", fontsize=12, color=MISTAKE, weight="bold")
            panel.spines[:].set(visible=True, color=MISTAKE, linewidth=2.5)


def _draw_windows(figure: SubFigure, scan: Tensor, kernel_size: int) -> None:
    panels = figure.subplots(1, len(QUERIES), gridspec_kw={"left": LEFT, "right": RIGHT, "top": 0.74, "bottom": 0.2})
    for panel, query in zip(panels, QUERIES, strict=True):
        _draw_scan(panel, scan, darkest=0.5)
        panel.set_title(query.title, fontsize=12, color=INK, weight="bold")
        panel.set_xlabel(query.note, fontsize=10.5, color=FAINT)
        for key in _keys(query, kernel_size, tuple(scan.shape)):
            panel.add_patch(_cell(key, facecolor=KEY, edgecolor="white", alpha=0.7))
        panel.add_patch(_cell(query.token, facecolor="none", edgecolor=QUERY, linewidth=3, clip_on=False, zorder=3))
    legend = [
        Patch(facecolor=KEY, alpha=0.7, label="key"),
        Patch(facecolor="none", edgecolor=QUERY, linewidth=3, label="query, also a key"),
    ]
    figure.legend(
        handles=legend,
        loc="upper right",
        bbox_to_anchor=(RIGHT, 0.97),
        borderaxespad=0,
        ncols=2,
        frameon=False,
        fontsize=11,
    )


def _keys(query: Query, kernel_size: int, shape: tuple[int, ...]) -> Iterator[tuple[int, int]]:
    rows, columns = (
        neighbors(index, length, kernel_size, dilation=query.dilation)
        for index, length in zip(query.token, shape, strict=True)
    )
    return ((row, column) for row in rows for column in columns)


def _cell(token: tuple[int, int], **style: object) -> Rectangle:
    row, column = token
    return Rectangle((column - 0.5, row - 0.5), 1, 1, **style)


def _draw_scan(panel: Axes, scan: Tensor, darkest: float = 0.85) -> None:
    panel.imshow(scan.numpy(), cmap="gray_r", vmin=0, vmax=1 / darkest)
    panel.set_xticks([])
    panel.set_yticks([])
    panel.spines[:].set(color="#ced4da")
