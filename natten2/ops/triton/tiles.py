"""Chooses tiles: which box of queries a program owns, and in which boxes it visits their keys.

The model counts the pairs of a query and a key that a tile computes; what is not visible of them is waste.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import product
from math import prod

__all__ = ["Tiling", "candidate_tilings", "choose_tiling", "count_parts", "count_step_parts", "count_tiles", "span"]

# A union of windows up to this size is one box, whose keys are numbered through without a gap.
_MAX_FLAT = 1024
# From this many keys on, a window's products take longer than its loads, and larger tiles reuse more.
_LARGE_WINDOW = 1024
# Sums with few owners are taken in parts, by at most so many programs: on every device, so that results are equal.
_PROGRAMS = 1024
# A part of a tile's steps takes at least so many, for each part costs a result in float32.
_PART_STEPS = 8


@dataclass(frozen=True)
class Tiling:
    """How a kernel divides its work.

    Attributes:
        tile: Tokens that a program owns, along each axis.
        spans: The most partners of a tile along each axis, away from its borders.
        box: Partners that are numbered through, along each axis.
        block: Partners per step.
        steps: The most steps of a tile, away from its borders.
        warps: Warps per program.
        stages: Steps whose loads are in flight.
        max_registers: Per thread, of kernels that own queries; `None` for no limit.
    """

    tile: tuple[int, ...]
    spans: tuple[int, ...]
    box: tuple[int, ...]
    block: int
    steps: int
    warps: int
    stages: int
    max_registers: int | None = None


def span(tile: int, kernel_size: int, stride: int, is_causal: bool) -> int:
    """The most keys that the queries of one tile see along an axis, away from its borders."""
    if is_causal:
        return kernel_size - stride + tile + max(first % stride for first in range(0, stride * tile, tile))
    return kernel_size + max((first % stride + tile - 1) // stride * stride for first in range(0, stride * tile, tile))


@lru_cache(4096)
def choose_tiling(
    kernel_size: tuple[int, ...],
    stride: tuple[int, ...],
    is_causal: tuple[bool, ...],
    row_bytes: int,
    *,
    is_backward: bool = False,
) -> Tiling:
    """The tiling that computes the fewest pairs per query, of those that fit in registers.

    It depends on nothing that changes with the batch or the size of an image, so that these compile nothing.

    Args:
        kernel_size: Of the window, along each axis.
        stride: Of the window, along each axis.
        is_causal: Along each axis.
        row_bytes: Bytes of one token's channels, of the wider of queries and values.
        is_backward: Whether it is for the gradient's kernels, which hold more in registers.
    """
    is_large = prod(kernel_size) >= _LARGE_WINDOW and row_bytes <= 256 and not is_backward
    volume = 128 if is_large else 64 if row_bytes <= (256 if is_backward else 512) else 32 if row_bytes <= 512 else 16
    is_wide = row_bytes > (128 if is_backward else 256)
    warps = 8 if (volume == 128 and row_bytes > 128) or (volume == 64 and is_wide) else 4
    narrow = 32 if row_bytes <= 512 else 16
    windows = tuple(zip(kernel_size, stride, is_causal, strict=True))
    stages = 2 if row_bytes <= 512 else 1
    tiling = _fit(windows, volume, narrow if is_wide else 64, warps, stages)
    if tiling.box == tiling.spans and (is_backward or row_bytes > 128 or prod(tiling.spans) <= 256):
        tiling = _fit(windows, volume, narrow, warps, stages)
    # For more programs per processor; without spills in loops, which the kernel for keys would have.
    return replace(tiling, max_registers=128) if row_bytes <= 64 and tiling.block == 32 else tiling


def candidate_tilings(
    kernel_size: tuple[int, ...], stride: tuple[int, ...], is_causal: tuple[bool, ...]
) -> tuple[Tiling, ...]:
    """What to try besides :func:`choose_tiling`'s choice: its arguments say what they do there."""
    windows = tuple(zip(kernel_size, stride, is_causal, strict=True))
    options = product((32, 64, 128), (32, 64), ((4, 2), (8, 2), (4, 3), (8, 3)))
    return tuple(_fit(windows, volume, block, *rest) for volume, block, rest in options)


def count_tiles(lengths: Sequence[int], dilation: Sequence[int], tile: Sequence[int]) -> int:
    """Tiles of the token grid; in the groups that are one shorter than the longest, some may be empty."""
    axes = zip(lengths, dilation, tile, strict=True)
    return prod(gap * _ceil(_ceil(length, gap), side) for length, gap, side in axes)


def count_parts(programs: int, most: int) -> int:
    """In how many parts, `most` of them at most, a sum is taken whose owners are so many programs."""
    return max(1, min(most, _PROGRAMS // programs))


def count_step_parts(programs: int, tiling: Tiling) -> int:
    """In how many parts a tile's steps go, which keep their programs busy for longer than other sums do."""
    return count_parts(2 * programs, tiling.steps // _PART_STEPS)


def _fit(windows: Sequence[tuple[int, int, bool]], volume: int, block: int, warps: int, stages: int) -> Tiling:
    """The tile of a volume, and its boxes, that compute the fewest pairs."""

    def pairs(tile: tuple[int, ...]) -> tuple[int, int, Tiling]:
        spans = tuple(span(side, *window) for side, window in zip(tile, windows, strict=True))
        if prod(spans) <= _MAX_FLAT:
            steps, box = _ceil(prod(spans), block), spans
        else:
            steps, box = min((_steps(spans, box), box) for box in _boxes(block, len(tile)))
        return steps * block, prod(spans), Tiling(tile, spans, box, block, steps, warps, stages)

    return min(map(pairs, _boxes(volume, len(windows))), key=lambda candidate: candidate[:2])[2]


def _ceil(number: int, divisor: int) -> int:
    return -(-number // divisor)


def _steps(spans: Sequence[int], box: Sequence[int]) -> int:
    return prod(_ceil(length, side) for length, side in zip(spans, box, strict=True))


def _boxes(volume: int, rank: int) -> Iterator[tuple[int, ...]]:
    """Boxes of powers of two with a given volume, the squarest of equal ones last."""
    sides = [1 << power for power in range(volume.bit_length())]
    return (box for box in product(sides, repeat=rank) if prod(box) == volume)
