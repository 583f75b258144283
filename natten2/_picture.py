"""Pictures of what one query sees: characters for a terminal, or an image."""

from __future__ import annotations

import enum
import math
import textwrap
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from natten2.window import neighbors

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["Window", "describe", "draw_image", "draw_text", "summary", "times"]


class Mark(enum.IntEnum):
    """What a token is to the query; `GROUP` is a hidden token of the query's dilation group."""

    OTHER = 0
    GROUP = 1
    KEY = 2
    QUERY = 3


_MEANINGS = {
    Mark.QUERY: "query, also a key",
    Mark.KEY: "key",
    Mark.GROUP: "hidden, same dilation group",
    Mark.OTHER: "hidden",
}
_UNICODE = {Mark.QUERY: "◆", Mark.KEY: "■", Mark.GROUP: "○", Mark.OTHER: "·"}
_ASCII = {Mark.QUERY: "Q", Mark.KEY: "#", Mark.GROUP: "o", Mark.OTHER: "."}
_COLORS = {Mark.QUERY: "#e8590c", Mark.KEY: "#3b78b8", Mark.GROUP: "#bdd3ea", Mark.OTHER: "#eeeff1"}

_TEXT_SLICES, _TEXT_ROWS = 6, 32
_IMAGE_SLICES, _IMAGE_CELLS = 9, 48
_SLICE_CELLS, _SLICE_MARGIN = 12, 4
_TOKEN_INCHES = 0.24
_GAP = " " * 4


@dataclass(frozen=True)
class Window:
    """A query and the parameters of its window, one entry per axis; all of them valid."""

    shape: tuple[int, ...]
    kernel_size: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    is_causal: tuple[bool, ...]
    query: tuple[int, ...]

    @cached_property
    def keys(self) -> tuple[range, ...]:
        """The indices that the query sees along each axis; its own is always among them."""
        axes = zip(self.query, self.shape, self.kernel_size, self.stride, self.dilation, self.is_causal, strict=True)
        return tuple(neighbors(*axis) for axis in axes)

    def mark(self, token: tuple[int, ...]) -> Mark:
        """What the token at these indices is to the query."""
        if token == self.query:
            return Mark.QUERY
        if all(index in keys for index, keys in zip(token, self.keys, strict=True)):
            return Mark.KEY
        offsets = zip(token, self.query, self.dilation, strict=True)
        in_group = all((index - query) % dilation == 0 for index, query, dilation in offsets)
        # Without dilation all tokens are of one group, and there is nothing to tell apart.
        return Mark.GROUP if in_group and max(self.dilation) > 1 else Mark.OTHER


@dataclass(frozen=True)
class View:
    """The part of the axes that is drawn: slices of rows of tokens.

    With fewer than three axes, the missing ones have the one index 0.
    """

    window: Window
    slices: range
    rows: range
    columns: range

    @classmethod
    def around(cls, window: Window, max_slices: int, max_rows: int, max_columns: int) -> View:
        """As much of the axes as fits, with the window in the middle."""
        missing = 3 - len(window.shape)
        lengths = (1,) * missing + window.shape
        queries = (0,) * missing + window.query
        slice_keys, row_keys, column_keys = (range(1),) * missing + window.keys
        if missing == 0:
            max_rows, max_columns = _slice_limit(row_keys, max_rows), _slice_limit(column_keys, max_columns)
        # Only slices with keys are worth drawing, those next to the query first.
        near = _crop(len(slice_keys), range(len(slice_keys)), slice_keys.index(queries[0]), max_slices)
        return cls(
            window,
            slice_keys[near.start : near.stop],
            _crop(lengths[1], row_keys, queries[1], max_rows),
            _crop(lengths[2], column_keys, queries[2], max_columns),
        )

    def marks(self, slice_: int) -> list[list[Mark]]:
        """The marks of one slice, row by row."""
        rank = len(self.window.shape)
        return [[self.window.mark((slice_, row, column)[-rank:]) for column in self.columns] for row in self.rows]

    def used_marks(self) -> list[Mark]:
        """The marks that occur in the view, in the order of a legend."""
        used = {mark for slice_ in self.slices for row in self.marks(slice_) for mark in row}
        return sorted(used, reverse=True)

    def notes(self) -> Iterator[str]:
        """Which axis runs where, and what is not drawn."""
        rank = len(self.window.shape)
        if rank > 1:
            yield f"Axis {rank - 2} runs down, axis {rank - 1} across."
        if rank > 2:
            keys = self.window.keys[0]
            below, above = keys[: keys.index(self.slices[0])], keys[keys.index(self.slices[-1]) + 1 :]
            left_out = " and ".join(_interval(part) for part in (below, above) if part)
            if left_out:
                yield f"Not drawn: axis 0 at {left_out}, with keys at the same places."
        for axis, drawn in enumerate((self.rows, self.columns)[-rank:], max(rank - 2, 0)):
            length, keys = self.window.shape[axis], self.window.keys[axis]
            if len(drawn) < length:
                loss = "" if keys[0] in drawn and keys[-1] in drawn else ", which leaves out some keys"
                yield f"Axis {axis} is cropped to {_interval(drawn)} of 0-{length - 1}{loss}."


def describe(
    shape: Sequence[int],
    kernel_size: Sequence[int],
    stride: Sequence[int],
    dilation: Sequence[int],
    is_causal: Sequence[bool],
) -> str:
    """A shape and the parameters of its windows, in one line."""
    parameters = [f"shape {times(shape)}"]
    for name, values in (("kernel_size", kernel_size), ("stride", stride), ("dilation", dilation)):
        parameters.append(f"{name} {times(values) if len(set(values)) > 1 else values[0]}")
    causal = [f"axis {axis}" for axis, flag in enumerate(is_causal) if flag]
    if causal:
        parameters.append("causal" if all(is_causal) else f"causal on {' and '.join(causal)}")
    return ", ".join(parameters)


def summary(window: Window) -> list[str]:
    """The parameters of the window, and which keys the query sees."""
    parameters = describe(window.shape, window.kernel_size, window.stride, window.dilation, window.is_causal)
    counts = [len(keys) for keys in window.keys]
    total = math.prod(counts)
    count = f"{times(counts)} = {total}" if len(counts) > 1 else f"{total}"
    query = ", ".join(map(str, window.query))
    slices = ", ".join(_slice(keys) for keys in window.keys)
    return [parameters, f"query ({query}) sees {count} {'key' if total == 1 else 'keys'}: key[:, {slices}]"]


def draw_text(window: Window, width: int, encoding: str) -> str:
    """Draws the window as lines of at most `width` characters, in plain ASCII where `encoding` has no better ones."""
    row_labels = len(str(window.shape[-2] - 1)) + 2 if len(window.shape) > 1 else 0
    view = View.around(window, _TEXT_SLICES, _TEXT_ROWS, max((width - row_labels + 1) // 2, 1))
    symbols = _UNICODE if _can_encode(_UNICODE.values(), encoding) else _ASCII
    blocks = [_text_slice(view, slice_, symbols, row_labels) for slice_ in view.slices]
    legend = [f"{symbols[mark]} {_MEANINGS[mark]}" for mark in view.used_marks()]
    if len(_GAP.join(legend)) <= width:
        legend = [_GAP.join(legend)]
    above, below = _wrap(summary(window), width), legend + _wrap(view.notes(), width)
    return "\n".join([*above, "", *_side_by_side(blocks, width), "", *below])


def _text_slice(view: View, slice_: int, symbols: dict[Mark, str], row_labels: int) -> list[str]:
    digits = len(str(view.columns[-1]))
    labels = [str(column).rjust(digits) for column in view.columns]
    lines = [f"axis 0 = {slice_}", ""] if len(view.window.shape) == 3 else []
    # Column indices are read from top to bottom, so that a column is as wide as a symbol.
    lines += [" " * row_labels + " ".join(label[digit] for label in labels) for digit in range(digits)]
    for row, marks in zip(view.rows, view.marks(slice_), strict=True):
        label = f"{row}  ".rjust(row_labels) if row_labels else ""
        lines.append(label + " ".join(symbols[mark] for mark in marks))
    return lines


def _side_by_side(blocks: list[list[str]], width: int) -> list[str]:
    """Lays blocks of equally many lines out in rows, as many beside each other as fit."""
    block_width = max(len(line) for line in blocks[0])
    across = max((width + len(_GAP)) // (block_width + len(_GAP)), 1)
    lines: list[str] = []
    for first in range(0, len(blocks), across):
        columns = zip(*blocks[first : first + across], strict=True)
        lines += [""] if first else []
        lines += [_GAP.join(line.ljust(block_width) for line in column).rstrip() for column in columns]
    return lines


def draw_image(window: Window, path: Path) -> None:
    """Draws the window as an image, in the format that the path's suffix names, PNG by default.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
        OSError: The file can't be written.
        ValueError: The suffix names no format that matplotlib can write.
    """
    from matplotlib.figure import Figure

    view = View.around(window, _IMAGE_SLICES, _IMAGE_CELLS, _IMAGE_CELLS)
    down = math.ceil(len(view.slices) / 3)
    across = math.ceil(len(view.slices) / down)
    title, notes = summary(window), list(view.notes())

    # All lengths are inches: tokens have the same size in every image, and texts never overlap.
    left, heading = 0.25 + 0.09 * len(str(view.rows[-1])), 0.3 + 0.2 * (len(window.shape) == 3)
    top, legend = 0.2 * len(title) + 0.1 + heading, 0.18 * len(notes) + 0.1
    panel_width, panel_height = len(view.columns) * _TOKEN_INCHES, len(view.rows) * _TOKEN_INCHES
    across_step, down_step = panel_width + left + 0.1, panel_height + heading + 0.15
    width, height = left + across * across_step, top + down * down_step - heading + legend + 0.35
    figure = Figure(figsize=(width, height))
    for number, slice_ in enumerate(view.slices):
        row, column = divmod(number, across)
        x, y = left + column * across_step, height - top - row * down_step - panel_height
        panel = figure.add_axes((x / width, y / height, panel_width / width, panel_height / height))
        _image_slice(panel, view, slice_)
    figure.text(left / width, 1, "\n".join(title), va="top", fontsize=10.5)
    figure.text(left / width, 0, "\n".join(notes), va="bottom", fontsize=8.5, color="#555555")
    _image_legend(figure, view, (left / width, legend / height))
    figure.savefig(path, format=path.suffix[1:] or "png", dpi=150, bbox_inches="tight", pad_inches=0.15)


def _image_legend(figure: Figure, view: View, lower_left: tuple[float, float]) -> None:
    from matplotlib.patches import Patch

    figure.legend(
        handles=[Patch(color=_COLORS[mark], label=_MEANINGS[mark]) for mark in view.used_marks()],
        loc="lower left",
        bbox_to_anchor=lower_left,
        ncols=len(Mark),
        frameon=False,
        fontsize=9.5,
        handlelength=1,
        handleheight=1,
        borderpad=0,
        borderaxespad=0,
    )


def _image_slice(panel: Axes, view: View, slice_: int) -> None:
    from matplotlib.colors import ListedColormap

    panel.pcolormesh(
        view.marks(slice_),
        cmap=ListedColormap([_COLORS[mark] for mark in Mark]),
        vmin=min(Mark),
        vmax=max(Mark),
        edgecolor="white",
        linewidth=1,
    )
    panel.invert_yaxis()
    panel.set_xticks(*_ticks(view.columns))
    panel.set_yticks(*_ticks(view.rows) if len(view.window.shape) > 1 else ((), ()))
    panel.tick_params(length=0, labelsize=8.5, labeltop=True, labelbottom=False)
    panel.spines[:].set_visible(False)
    if len(view.window.shape) == 3:
        panel.set_title(f"axis 0 = {slice_}", fontsize=9.5, loc="left")


def _ticks(indices: range) -> tuple[list[float], list[str]]:
    """Where to put labels along an axis, in tokens from its edge, and the labels: as many as are legible."""
    needed = max(len(indices) / 16, len(str(indices[-1])) / 3)
    step = next(step for step in (1, 2, 5, 10) if step >= needed)
    labelled = [index for index in indices if index % step == 0]
    return [index - indices[0] + 0.5 for index in labelled], [str(index) for index in labelled]


def _slice_limit(keys: range, limit: int) -> int:
    """How much of an axis the slices show: little beside the window, because there are many of them."""
    return min(max(keys[-1] + 1 - keys[0] + _SLICE_MARGIN, _SLICE_CELLS), limit)


def _crop(length: int, keys: range, query: int, limit: int) -> range:
    """At most `limit` indices of an axis with the keys in the middle, or the query where not all keys fit."""
    if length <= limit:
        return range(length)
    span = keys[-1] + 1 - keys[0]
    start = keys[0] - (limit - span) // 2 if span <= limit else query - limit // 2
    start = min(max(start, 0), length - limit)
    return range(start, start + limit)


def _can_encode(characters: Iterable[str], encoding: str) -> bool:
    try:
        "".join(characters).encode(encoding)
    except UnicodeEncodeError:
        return False
    return True


def _wrap(paragraphs: Iterable[str], width: int) -> list[str]:
    return [line for text in paragraphs for line in textwrap.wrap(text, width, subsequent_indent="  ")]


def times(values: Sequence[int]) -> str:
    """A size per axis, such as `7 x 7`."""
    return " x ".join(map(str, values))


def _interval(indices: range) -> str:
    if len(indices) == 1:
        return f"{indices[0]}"
    return f"{indices[0]}-{indices[-1]}" + (f" by {indices.step}" if indices.step > 1 else "")


def _slice(keys: range) -> str:
    return f"{keys[0]}:{keys[-1] + 1}" + (f":{keys.step}" if keys.step > 1 else "")
