"""The geometry of neighborhood attention along one axis: which keys a query sees, and which queries see a key.

An axis of `length` indices is split by `dilation` into residue classes, the *groups*. A query attends only within its
own group, so windows are intervals of *positions*, counted inside the group: index `x` is position `x // dilation` of
group `x % dilation`. Over several axes a key is visible when it is visible along each of them.

`csrc/window.h` holds the same formulas for the kernels. Numbers may be `int` or `torch.SymInt`; :func:`group_length`
and :func:`key_bounds` also take integer tensors of groups, positions, and lengths, elementwise.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["group_length", "key_bounds", "neighbors", "query_bounds"]


def _smaller(a: int | Tensor, b: int | Tensor) -> int | Tensor:
    return a.clamp(max=b) if isinstance(a, Tensor) else torch.sym_min(a, b)


def _larger(a: int | Tensor, b: int) -> int | Tensor:
    return a.clamp(min=b) if isinstance(a, Tensor) else torch.sym_max(a, b)


def group_length(length: int, dilation: int, group: int | Tensor) -> int | Tensor:
    """Number of positions in one dilation group of an axis.

    Args:
        length: Number of indices along the axis.
        dilation: Distance between neighboring positions of a group, in indices.
        group: Residue class, `0 <= group < dilation`.
    """
    return (length + dilation - 1 - group) // dilation


def key_bounds(
    position: int | Tensor, length: int | Tensor, kernel_size: int, stride: int = 1, is_causal: bool = False
) -> tuple[int | Tensor, int | Tensor]:
    """The keys that a query sees, as a half-open interval of positions `(start, end)`.

    Queries come in strides: all `stride` of them share the window of their leader, which sits in the middle of the
    stride, or at its end when causal. A window that would leave the axis is shifted back inside, never cut, so that
    every query that is not causal sees exactly `kernel_size` keys; a causal one sees between 1 and `kernel_size`.

    Args:
        position: Position of the query in its group, `0 <= position < length`.
        length: Number of positions in the group, at least `kernel_size`.
        kernel_size: Number of keys in a full window.
        stride: Number of adjacent queries that share a window, `1 <= stride <= kernel_size`.
        is_causal: Whether a query sees no position after its own.
    """
    first = position // stride * stride
    if is_causal:
        leader = _smaller(first + stride - 1, length - 1)
        return _larger(leader - kernel_size + 1, 0), position + 1
    leader = _smaller(first + stride // 2, length - 1)
    start = _smaller(_larger(leader - kernel_size // 2, 0), length - kernel_size)
    return start, start + kernel_size


def query_bounds(
    position: int, length: int, kernel_size: int, stride: int = 1, is_causal: bool = False
) -> tuple[int, int]:
    """The queries that see a key, as a half-open interval of positions `(start, end)`: the inverse of
    :func:`key_bounds`.

    The gradients of keys and values are sums over this interval, so whoever owns a key can gather them without atomics.

    Args:
        position: Position of the key in its group, `0 <= position < length`.
        length, kernel_size, stride, is_causal: As in :func:`key_bounds`.
    """
    if is_causal:
        if position + kernel_size >= length:
            return position, length
        return position, _smaller((position + kernel_size) // stride * stride, length)
    middle, strides = stride // 2, (length + stride - 1) // stride
    first_leader = 0 if position < kernel_size else position - (kernel_size - 1) // 2
    last_leader = length - 1 if position >= length - kernel_size else position + kernel_size // 2
    first = 0 if first_leader <= middle else (first_leader - middle + stride - 1) // stride
    last = strides - 1 if last_leader >= length - 1 else (last_leader - middle) // stride
    return first * stride, _smaller((last + 1) * stride, length)


def neighbors(
    index: int, length: int, kernel_size: int, stride: int = 1, dilation: int = 1, is_causal: bool = False
) -> range:
    """The indices of the keys that the query at `index` sees along one axis, in the order of the window's slots.

    Args:
        index: Index of the query, `0 <= index < length`.
        length: Number of indices along the axis, at least `kernel_size * dilation`.
        kernel_size, stride, is_causal: As in :func:`key_bounds`.
        dilation: Distance between neighboring positions of a group, in indices.
    """
    group, position = index % dilation, index // dilation
    start, end = key_bounds(position, group_length(length, dilation, group), kernel_size, stride, is_causal)
    return range(start * dilation + group, end * dilation + group, dilation)
