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
_MAX_AXIS = 128


@dataclass(frozen=True)
class Tiling:
    """How a kernel divides its work.

    Attributes:
        tile: Tokens that a program owns, along each axis.
        box: Partners that are numbered through, along each axis.
        block: Partners per step.
        warps: Warps per program.
        stages: Steps whose loads are in flight.
    """

    tile: tuple[int, ...]
    box: tuple[int, ...]
    block: int
    warps: int
    stages: int


def span(tile: int, kernel_size: int, stride: int, is_causal: bool) -> int:
    """The most keys that the queries of one tile see along an axis, away from its borders."""
    if is_causal:
        return kernel_size - stride + tile + max(first % stride for first in range(0, stride * tile, tile))
    return kernel_size + max((first % stride + tile - 1) // stride * stride for first in range(0, stride * tile, tile))


def choose_tiling(
    kernel_size: Sequence[int],
    stride: Sequence[int],
    is_causal: Sequence[bool],
    head_dim: int,
    value_dim: int,
    *,
    is_backward: bool = False,
) -> Tiling:
    """The tiling that computes the fewest pairs per query, of those that fit the channels in registers.

    It depends on nothing that changes with the batch or the size of an image, so that these compile nothing.
    """
    channels = max(head_dim, value_dim)
    is_large = prod(kernel_size) >= 1024 and channels <= 128
    narrow = 32
    volume = 128 if is_large else 64 if channels <= 128 else 32

    def pairs(tile: tuple[int, ...]) -> tuple[int, int, Tiling]:
        spans = tuple(span(*axis) for axis in zip(tile, kernel_size, stride, is_causal, strict=True))
        if prod(spans) <= _MAX_FLAT:
            block = narrow if channels > 64 or prod(spans) <= 256 else 64
            steps, box = -(-prod(spans) // block), spans
        else:
            block = narrow if is_backward and channels > 64 else 64 if channels <= 128 else narrow
            steps, box = min((_steps(spans, box), box) for box in _boxes(block, len(tile)))
        return steps * block, prod(spans), Tiling(tile, box, block, 8 if volume == 128 and channels > 64 else 4, 2)

    return min((pairs(tile) for tile in _boxes(volume, len(kernel_size))), key=lambda candidate: candidate[:2])[2]


def _steps(spans: Sequence[int], box: Sequence[int]) -> int:
    return prod(-(-length // side) for length, side in zip(spans, box, strict=True))


def _boxes(volume: int, rank: int) -> Iterator[tuple[int, ...]]:
    """Boxes of powers of two with a given volume, the squarest of equal ones last."""
    sides = [1 << power for power in range(volume.bit_length())]
    return (box for box in product(sides, repeat=rank) if prod(box) == volume)
