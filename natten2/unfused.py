"""Neighborhood attention in two halves, with the attention weights between them as a tensor.

Between `na2d_qk` and `na2d_av` may stand any softmax, mask, dropout, or look at the weights; where nothing does,
:func:`natten2.na2d` computes the same without writing them, several times as fast.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from natten2._arguments import check_tensor, finite_scale, flags, integers
from natten2.ops.schemas import na_av, na_qk
from natten2.ops.validation import check_fit, check_window
from natten2.window import neighbors

__all__ = ["attention_map", "na1d_av", "na1d_qk", "na2d_av", "na2d_qk", "na3d_av", "na3d_qk"]

Integers = int | Sequence[int]
Flags = bool | Sequence[bool]


def na1d_qk(
    query: Tensor,
    key: Tensor,
    kernel_size: Integers,
    stride: Integers = 1,
    dilation: Integers = 1,
    is_causal: Flags = False,
    scale: float | None = None,
    *,
    rpb: Tensor | None = None,
    additional_keys: Tensor | None = None,
) -> Tensor:
    """Scores of a sequence: :func:`na2d_qk` with one axis."""
    return _qk(1, query, key, kernel_size, stride, dilation, is_causal, scale, rpb, additional_keys)


def na2d_qk(
    query: Tensor,
    key: Tensor,
    kernel_size: Integers,
    stride: Integers = 1,
    dilation: Integers = 1,
    is_causal: Flags = False,
    scale: float | None = None,
    *,
    rpb: Tensor | None = None,
    additional_keys: Tensor | None = None,
) -> Tensor:
    """Scores of every query of an image with the keys of its window, before the softmax.

    Arguments are those of :func:`natten2.na2d`.

    Returns:
        `[B, height, width, H, slots]` in query's dtype, with `kernel_size[0] * kernel_size[1] + N` slots. A query's
        slots are the keys of its window row-major, from the one with the smallest indices on, and then the `N`
        additional keys. A causal query's slots for keys after itself hold -inf. Differentiable to any order, in
        reverse and in forward mode.

    Raises:
        ValueError: A shape, stride, device, or parameter is not allowed; the message names it.
        TypeError: An argument or a tensor's dtype is of the wrong type.
        NotImplementedError: A tensor is sparse, quantized, or nested.
    """
    return _qk(2, query, key, kernel_size, stride, dilation, is_causal, scale, rpb, additional_keys)


def na3d_qk(
    query: Tensor,
    key: Tensor,
    kernel_size: Integers,
    stride: Integers = 1,
    dilation: Integers = 1,
    is_causal: Flags = False,
    scale: float | None = None,
    *,
    rpb: Tensor | None = None,
    additional_keys: Tensor | None = None,
) -> Tensor:
    """Scores of a video or a volume: :func:`na2d_qk` with three axes."""
    return _qk(3, query, key, kernel_size, stride, dilation, is_causal, scale, rpb, additional_keys)


def na1d_av(
    weights: Tensor,
    value: Tensor,
    kernel_size: Integers,
    stride: Integers = 1,
    dilation: Integers = 1,
    is_causal: Flags = False,
    *,
    additional_values: Tensor | None = None,
) -> Tensor:
    """Sums over a sequence: :func:`na2d_av` with one axis."""
    return _av(1, weights, value, kernel_size, stride, dilation, is_causal, additional_values)


def na2d_av(
    weights: Tensor,
    value: Tensor,
    kernel_size: Integers,
    stride: Integers = 1,
    dilation: Integers = 1,
    is_causal: Flags = False,
    *,
    additional_values: Tensor | None = None,
) -> Tensor:
    """Sums the values of every query's window under its weights, which may be any.

    Args:
        weights: `[B, height, width, H, slots]`, slots as :func:`na2d_qk` returns them; those that a causal query does
            not see are not read. Any strides with contiguous slots.
        value: `[B, height, width, Hkv, Dv]` in weights' dtype; `Hkv` divides `H`.
        kernel_size, stride, dilation, is_causal: The window, as in :func:`natten2.na2d`.
        additional_values: `[B, N, Hkv, Dv]`, for the last `N` slots.

    Returns:
        `[B, height, width, H, Dv]`. Differentiable to any order, in reverse and in forward mode.

    Raises:
        ValueError, TypeError, NotImplementedError: As :func:`na2d_qk`.
    """
    return _av(2, weights, value, kernel_size, stride, dilation, is_causal, additional_values)


def na3d_av(
    weights: Tensor,
    value: Tensor,
    kernel_size: Integers,
    stride: Integers = 1,
    dilation: Integers = 1,
    is_causal: Flags = False,
    *,
    additional_values: Tensor | None = None,
) -> Tensor:
    """Sums over a video or a volume: :func:`na2d_av` with three axes."""
    return _av(3, weights, value, kernel_size, stride, dilation, is_causal, additional_values)


def attention_map(
    weights: Tensor,
    query_index: Integers,
    kernel_size: Integers,
    stride: Integers = 1,
    dilation: Integers = 1,
    is_causal: Flags = False,
    *,
    fill: float = 0.0,
) -> Tensor:
    """Scatters the weights of one query back onto the token grid, where its keys are.

    Args:
        weights: `[B, *axes, H, slots]` for one to three axes, from :func:`na2d_qk` or a softmax of it; the slots of
            additional keys, which have no place on the grid, are left out.
        query_index: The query's index along each axis.
        kernel_size, stride, dilation, is_causal: The window, as in :func:`natten2.na2d`.
        fill: What stands where the query sees no key.

    Returns:
        `[B, H, *axes]` in weights' dtype; differentiable.

    Raises:
        ValueError: The index is outside the grid, the weights have fewer slots than the window, or the window doesn't
            fit.
        TypeError: An argument is of the wrong type.
    """
    check_tensor("weights", weights)
    rank = weights.dim() - 3
    if not 1 <= rank <= 3:
        raise ValueError(f"weights must have shape [B, *axes, H, slots] with 1 to 3 axes, got {tuple(weights.shape)}")
    spatial = weights.shape[1:-2]
    index = integers("query_index", query_index, rank)
    if not all(0 <= i < length for i, length in zip(index, spatial, strict=True)):
        raise ValueError(f"query_index must lie in the grid {tuple(spatial)}, got {index}")
    kernel_size, stride = integers("kernel_size", kernel_size, rank), integers("stride", stride, rank)
    dilation, is_causal = integers("dilation", dilation, rank), flags("is_causal", is_causal, rank)
    check_window(kernel_size, stride, dilation)
    check_fit(spatial, kernel_size, dilation)
    slots = math.prod(kernel_size)
    if weights.shape[-1] < slots:
        raise ValueError(f"weights must have at least the window's {slots} slots, got {weights.shape[-1]}")
    axes = zip(index, spatial, kernel_size, stride, dilation, is_causal, strict=True)
    keys = [neighbors(*axis) for axis in axes]
    window = weights[(slice(None), *index)][..., :slots].unflatten(-1, kernel_size)
    result = weights.new_full((weights.shape[0], weights.shape[-2], *spatial), fill)
    places = tuple(slice(along.start, along.stop, along.step) for along in keys)
    result[(..., *places)] = window[(..., *(slice(len(along)) for along in keys))]
    return result


def _qk(
    rank: int,
    query: Tensor,
    key: Tensor,
    kernel_size: Integers,
    stride: Integers,
    dilation: Integers,
    is_causal: Flags,
    scale: float | None,
    rpb: Tensor | None,
    additional_keys: Tensor | None,
) -> Tensor:
    check_tensor("query", query)
    check_tensor("key", key)
    check_tensor("rpb", rpb, optional=True)
    check_tensor("additional_keys", additional_keys, optional=True)
    window = _window(rank, kernel_size, stride, dilation, is_causal)
    return na_qk(query, key, rpb, additional_keys, *window, finite_scale(scale, query), -torch.inf)


def _av(
    rank: int,
    weights: Tensor,
    value: Tensor,
    kernel_size: Integers,
    stride: Integers,
    dilation: Integers,
    is_causal: Flags,
    additional_values: Tensor | None,
) -> Tensor:
    check_tensor("weights", weights)
    check_tensor("value", value)
    check_tensor("additional_values", additional_values, optional=True)
    return na_av(weights, value, additional_values, *_window(rank, kernel_size, stride, dilation, is_causal))


def _window(rank: int, kernel_size: Integers, stride: Integers, dilation: Integers, is_causal: Flags) -> tuple:
    return (
        integers("kernel_size", kernel_size, rank),
        integers("stride", stride, rank),
        integers("dilation", dilation, rank),
        flags("is_causal", is_causal, rank),
    )
