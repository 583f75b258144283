"""Which rows of an axis a rank needs to answer its own queries, and in which slabs it runs the operator on them.

The first spatial axis is cut into shards, one for each rank, in order. A rank owns the queries, keys, and values of its
rows, and lacks the *halo*: the keys just outside that windows of its queries reach. The operator knows nothing of this;
it runs on a *slab* of rows as if that were the whole axis. A slab is chosen so that each query it is run for has the
same window inside it as on the whole axis:

- It holds all keys of the windows, so an end that is not the axis's own shifts none of them.
- It begins at a multiple of `stride * dilation`, so strides and dilation groups fall as they do on the axis.
- It ends beyond the leader of each stride, on whose place a causal window depends.
- It is as long as the operator asks, `kernel_size * dilation`, and long enough for the kernel of the whole axis.

Rows that only place windows, and hold no key that is seen, are filled with zeros rather than fetched.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

from natten2.window import group_length, key_bounds

__all__ = ["Axis", "Piece", "Plan", "make_plan"]

# No kernel's way changes with the length of a row that has more tokens than this.
_LEAST_ROW = 16
# Edges are computed a second time, as rows of the interior's slab: a small interior isn't worth it.
_LEAST_INTERIOR = 0.5


class Axis(NamedTuple):
    """The first axis of the window.

    Attributes:
        is_only: Whether there are no others. The last axis chooses the CPU's kernels, which take another way through
            short rows, with other bits.
    """

    kernel_size: int
    stride: int
    dilation: int
    is_causal: bool
    is_only: bool


@dataclass(frozen=True)
class Piece:
    """Rows `[first, last)` of queries, answered by the operator on the slab of rows `[begin, end)`."""

    first: int
    last: int
    begin: int
    end: int


@dataclass(frozen=True)
class Plan:
    """What one rank computes, fetches, and sends; rows are counted along the whole axis.

    Attributes:
        start: The rank's first row.
        length: Number of its rows.
        interior: What needs no row of another rank, if that is worth a call of its own.
        edges: All else.
        from_previous, from_next: Rows of halo that the two neighbors send.
        to_previous, to_next: Rows of its own, its first and its last, that it sends to them.
    """

    start: int
    length: int
    interior: Piece | None
    edges: tuple[Piece, ...]
    from_previous: int
    from_next: int
    to_previous: int
    to_next: int


@lru_cache(maxsize=1024)
def make_plan(lengths: tuple[int, ...], rank: int, axis: Axis) -> Plan:
    """The plan of one rank.

    Args:
        lengths: Rows of every rank, each at least one.
        rank: The rank.
        axis: The window; `kernel_size * dilation` fits in the axis.

    Raises:
        ValueError: A shard is thinner than the halo that its neighbor needs. Every rank raises it.
    """
    starts = (0, *accumulate(lengths))
    halos = [_halo(sum(lengths), start, start + length, axis) for start, length in zip(starts, lengths, strict=False)]
    for other, (before, after) in enumerate(halos):
        for neighbor, rows in ((other - 1, before), (other + 1, after)):
            if rows > 0 and rows > lengths[neighbor]:
                raise ValueError(
                    f"lengths must be at least the halo: windows of rank {other} reach {rows} rows into the shard of "
                    f"rank {neighbor}, got lengths {list(lengths)}; use fewer ranks, or a smaller window"
                )
    start, end = starts[rank], starts[rank + 1]
    interior, edges = _pieces(starts[-1], start, end, axis)
    return Plan(
        start,
        end - start,
        interior,
        edges,
        *halos[rank],
        to_previous=halos[rank - 1][1] if rank > 0 else 0,
        to_next=halos[rank + 1][0] if rank + 1 < len(lengths) else 0,
    )


class _Windows(NamedTuple):
    """For each query row its first key's row, the row after its last key's, and that after its leader's or its own."""

    begin: Tensor
    end: Tensor
    reach: Tensor


def _windows(length: int, first: int, last: int, axis: Axis) -> _Windows:
    kernel_size, stride, dilation, is_causal, _ = axis
    row = torch.arange(first, last, device="cpu")
    group, position = row % dilation, row // dilation
    positions = group_length(length, dilation, group)
    begin, end = key_bounds(position, positions, kernel_size, stride, is_causal)
    reach = (position // stride * stride + stride).clamp(max=positions) if is_causal else end
    return _Windows(begin * dilation + group, *((x - 1) * dilation + group + 1 for x in (end, reach)))


def _halo(length: int, start: int, end: int, axis: Axis) -> tuple[int, int]:
    windows = _windows(length, start, end, axis)
    return max(start - int(windows.begin.min()), 0), max(int(windows.end.max()) - end, 0)


def _alignment(axis: Axis) -> int:
    """What a slab's first row is a multiple of. Windows that slide by one fall the same wherever it begins."""
    return 1 if axis.stride == 1 else axis.stride * axis.dilation


def _piece(length: int, first: int, last: int, axis: Axis) -> Piece:
    windows, step = _windows(length, first, last, axis), _alignment(axis)
    begin = int(windows.begin.min()) // step * step
    end = max(int(windows.reach.max()), begin + axis.kernel_size * axis.dilation)
    least = min(length, _LEAST_ROW if axis.is_only else 1)
    if end - begin < least:
        begin = min(begin, (length - least) // step * step)
        end = min(max(end, begin + least), length)
    return Piece(first, last, begin, end)


def _pieces(length: int, start: int, end: int, axis: Axis) -> tuple[Piece | None, tuple[Piece, ...]]:
    """Cuts a rank's queries into those that see rows of it alone and, above and below them, the others."""
    windows, step = _windows(length, start, end, axis), _alignment(axis)
    above = (windows.begin < -(-start // step) * step).nonzero()
    below = (windows.reach > end).nonzero()
    first = start + int(above.max()) + 1 if len(above) else start
    last = start + int(below.min()) if len(below) else end
    if last - first >= max(1, _LEAST_INTERIOR * (end - start)):
        interior = _piece(length, first, last, axis)
        if start <= interior.begin and interior.end <= end:
            edges = [_piece(length, *rows, axis) for rows in ((start, first), (last, end)) if rows[0] < rows[1]]
            return interior, tuple(edges)
    return None, (_piece(length, start, end, axis),)
