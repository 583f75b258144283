"""What a call needs at least, whichever kernel runs it: pairs of a query and a key, operations, and bytes."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

import torch

__all__ = ["Call"]


@dataclass(frozen=True)
class Call:
    """The sizes of one call, `[batch, *spatial, heads, head_dim]`; a window's values have one entry per axis.

    Attributes:
        additional: Number of additional keys.
        element_size: Bytes of one number of query, key, and value.
    """

    batch: int
    spatial: tuple[int, ...]
    heads: int
    key_heads: int
    head_dim: int
    value_dim: int
    kernel_size: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    is_causal: tuple[bool, ...]
    additional: int = 0
    element_size: int = 2

    @property
    def tokens(self) -> int:
        return self.batch * prod(self.spatial)

    @property
    def window_pairs(self) -> int:
        """Pairs of a query and a key in its window, of one head in one entry of the batch."""
        axes = zip(self.spatial, self.kernel_size, self.stride, self.dilation, self.is_causal, strict=True)
        return prod(_count_pairs(*axis) for axis in axes)

    @property
    def pairs(self) -> int:
        """All pairs of a query and a key that it sees, additional keys among them."""
        return self.batch * self.heads * (self.window_pairs + prod(self.spatial) * self.additional)

    def flops(self, *, is_backward: bool = False) -> int:
        """Operations of the matrix products. Backward these are the scores again, the gradient of the weights, and
        those of query, key, and value.
        """
        per_pair = 3 * self.head_dim + 2 * self.value_dim if is_backward else self.head_dim + self.value_dim
        return 2 * self.pairs * per_pair

    def least_bytes(self, *, is_backward: bool = False) -> int:
        """Bytes of every input and output, each read or written once; a bias is too small to count.

        Backward, query, key, value, and output are there twice, themselves and their gradients; so is the
        log-sum-exp, beside delta.
        """
        keys = self.tokens + self.batch * self.additional
        channels = self.head_dim + self.value_dim
        numbers = (self.tokens * self.heads + keys * self.key_heads) * channels
        once = numbers * self.element_size + self.tokens * self.heads * max(4, self.element_size)
        return 2 * once if is_backward else once


def _count_pairs(length: int, kernel_size: int, stride: int, dilation: int, is_causal: bool) -> int:
    if not is_causal:
        return length * kernel_size
    # Groups differ by one token at most.
    tokens, longer = length // dilation, length % dilation
    return longer * _count_causal_pairs(tokens + 1, kernel_size, stride) + (dilation - longer) * _count_causal_pairs(
        tokens, kernel_size, stride
    )


def _count_causal_pairs(length: int, kernel_size: int, stride: int) -> int:
    """The sum of `end - start` of :func:`natten2.window.key_bounds` over all positions; also of a `torch.SymInt`."""
    strides, rest = length // stride, length % stride
    # Stride number j, counted from 1, starts at j * stride - kernel_size, from number `first` on.
    first = -(-kernel_size // stride)
    moved = torch.sym_max(strides - first + 1, 0)
    starts = stride * (stride * (first + strides) * moved // 2 - kernel_size * moved)
    last = rest * torch.sym_max(length - kernel_size, 0)
    return length * (length + 1) // 2 - starts - last
