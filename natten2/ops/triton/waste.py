"""What a tiling costs on a given image: the pairs of a query and a key that its programs compute.

It counts what `geometry.cover` makes the kernels visit, and needs no Triton.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

from natten2.ops.triton.tiles import Tiling
from natten2.window import group_length, key_bounds, query_bounds

__all__ = ["computed_pairs"]


def computed_pairs(
    tiling: Tiling,
    lengths: Sequence[int],
    kernel_size: Sequence[int],
    stride: Sequence[int],
    dilation: Sequence[int],
    is_causal: Sequence[bool],
    *,
    owns_keys: bool = False,
) -> int:
    """Pairs that are computed for one head over all tiles, whether a query sees the key or not.

    Args:
        tiling: The kernel's tiling.
        lengths: Lengths of the axes.
        kernel_size, stride, dilation, is_causal: One value per axis, as in `natten2.window`.
        owns_keys: Whether tiles are of keys, and boxes of queries.
    """
    axes = zip(lengths, kernel_size, stride, dilation, is_causal, tiling.tile, tiling.box, strict=True)
    # A tile's boxes are the product of those along each axis, so their sum over all tiles is a product too.
    boxes = prod(_count_boxes(*axis, owns_keys) for axis in axes)
    return prod(tiling.tile) * boxes * _ceil(prod(tiling.box), tiling.block) * tiling.block


def _count_boxes(
    length: int, kernel_size: int, stride: int, dilation: int, is_causal: bool, tile: int, box: int, owns_keys: bool
) -> int:
    bounds = query_bounds if owns_keys else key_bounds
    total = 0
    for group in range(dilation):
        tokens = group_length(length, dilation, group)
        for first in range(0, tokens, tile):
            begin, _ = bounds(first, tokens, kernel_size, stride, is_causal)
            _, end = bounds(min(first + tile, tokens) - 1, tokens, kernel_size, stride, is_causal)
            total += _ceil(end - begin, box)
    return total


def _ceil(number: int, divisor: int) -> int:
    return -(-number // divisor)
