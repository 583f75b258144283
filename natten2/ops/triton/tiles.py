"""Chooses tiles: which box of queries a program owns, and in which boxes it visits their keys.

The model counts the pairs of a query and a key that a tile computes; what is not visible of them is waste.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from math import prod

__all__ = ["Tiling", "choose_tiling", "span"]

# A union of windows up to this size is one box, whose keys are numbered through without a gap.
_MAX_FLAT = 1024
# From this many keys on, a window's products take longer than its loads, and larger tiles reuse more.
_LARGE_WINDOW = 1024


@dataclass(frozen=True)
class Tiling:
    """How a kernel divides its work.

    Attributes:
        tile: Tokens that a program owns, along each axis.
        box: Partners that are numbered through, along each axis.
        block: Partners per step.
        steps: The most steps of a tile, away from its borders.
        warps: Warps per program.
        stages: Steps whose loads are in flight.
        max_registers: Registers per thread that suffice kernels that own queries, for more programs per processor.
    """

    tile: tuple[int, ...]
    box: tuple[int, ...]
    block: int
    steps: int
    warps: int
    stages: int
    max_registers: int | None


def span(tile: int, kernel_size: int, stride: int, is_causal: bool) -> int:
    """The most keys that the queries of one tile see along an axis, away from its borders."""
    if is_causal:
        return kernel_size - stride + tile + max(first % stride for first in range(0, stride * tile, tile))
    return kernel_size + max((first % stride + tile - 1) // stride * stride for first in range(0, stride * tile, tile))


def choose_tiling(
    kernel_size: Sequence[int],
    stride: Sequence[int],
    is_causal: Sequence[bool],
    row_bytes: int,
    *,
    is_backward: bool = False,
) -> Tiling:
    """The tiling that computes the fewest pairs per query, of those that fit in registers.

    It depends on nothing that changes with the batch or the size of an image, so that these compile nothing.

    Args:
        kernel_size, stride, is_causal: The window, along each axis.
        row_bytes: Bytes of one token's channels, of the wider of queries and values.
        is_backward: Whether it is for the gradient's kernels, which hold more in registers.
    """
    is_large = prod(kernel_size) >= _LARGE_WINDOW and row_bytes <= 256 and not is_backward
    volume = 128 if is_large else 64 if row_bytes <= 512 else 32
    is_wide = row_bytes > (128 if is_backward else 256)
    warps = 8 if (volume == 128 and row_bytes > 128) or (volume == 64 and is_wide) else 4
    narrow = 32 if row_bytes <= 512 else 16

    def pairs(tile: tuple[int, ...]) -> tuple[int, int, Tiling]:
        spans = tuple(span(*axis) for axis in zip(tile, kernel_size, stride, is_causal, strict=True))
        if prod(spans) <= _MAX_FLAT:
            block = narrow if is_backward or row_bytes > 128 or prod(spans) <= 256 else 64
            steps, box = -(-prod(spans) // block), spans
        else:
            block = narrow if is_wide else 64
            steps, box = min((_steps(spans, box), box) for box in _boxes(block, len(tile)))
        registers = 128 if row_bytes <= 128 and block == 32 else None
        return steps * block, prod(spans), Tiling(tile, box, block, steps, warps, 2, registers)

    return min((pairs(tile) for tile in _boxes(volume, len(kernel_size))), key=lambda candidate: candidate[:2])[2]


def _steps(spans: Sequence[int], box: Sequence[int]) -> int:
    return prod(-(-length // side) for length, side in zip(spans, box, strict=True))


def _boxes(volume: int, rank: int) -> Iterator[tuple[int, ...]]:
    """Boxes of powers of two with a given volume, the squarest of equal ones last."""
    sides = [1 << power for power in range(volume.bit_length())]
    return (box for box in product(sides, repeat=rank) if prod(box) == volume)
