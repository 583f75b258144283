"""The operations that `torch.utils.flop_counter.FlopCounterMode` counts: those of the matrix products, for pairs that
are visible."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.utils.flop_counter import register_flop_formula

from natten2.ops.costs import Call

Shape = Sequence[int]


def _call(
    query: Shape,
    key: Shape,
    value: Shape,
    rpb: Shape | None,
    additional_keys: Shape | None,
    additional_values: Shape | None,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    dilation: Sequence[int],
    is_causal: Sequence[bool],
    scale: float,
) -> Call:
    batch, *spatial, heads, head_dim = query
    return Call(
        batch,
        tuple(spatial),
        heads,
        key[-2],
        head_dim,
        value[-1],
        tuple(kernel_size),
        tuple(stride),
        tuple(dilation),
        tuple(is_causal),
        additional=0 if additional_keys is None else additional_keys[1],
    )


@register_flop_formula(torch.ops.natten2.na_forward)
def _forward(*args: object, out_shape: object = None) -> int:
    return _call(*args).flops()


@register_flop_formula(torch.ops.natten2.na_backward)
def _backward(grad_output: Shape, grad_logsumexp: Shape | None, *args: object, out_shape: object = None) -> int:
    inputs, parameters = args[:6], args[-5:]
    return _call(*inputs, *parameters).flops(is_backward=True)


@register_flop_formula(torch.ops.natten2.na_qkv_forward)
def _qkv_forward(qkv: Shape, rpb: Shape | None, *parameters: object, out_shape: object = None) -> int:
    return _call(*_unpack(qkv), rpb, None, None, *parameters).flops()


@register_flop_formula(torch.ops.natten2.na_qkv_backward)
def _qkv_backward(
    grad_output: Shape, grad_logsumexp: Shape | None, qkv: Shape, *args: object, out_shape: object = None
) -> int:
    return _call(*_unpack(qkv), None, None, None, *args[-5:]).flops(is_backward=True)


def _unpack(qkv: Shape) -> tuple[Shape, Shape, Shape]:
    each = (*qkv[:-3], *qkv[-2:])
    return each, each, each


def _product(
    queries: Sequence[int], keys: Sequence[int], additional: Sequence[int] | None, *window: Sequence[int]
) -> int:
    """Operations of one product between queries or scores and keys or values, given by their shapes."""
    batch, *spatial, heads, _ = queries
    extra = 0 if additional is None else additional[1]
    call = Call(batch, tuple(spatial), heads, keys[-2], keys[-1], 0, *map(tuple, window), additional=extra)
    return call.flops()


@register_flop_formula(torch.ops.natten2.na_qk)
def _na_qk(query, key, rpb, additional_keys, *parameters, out_shape=None, **kwargs) -> int:
    return _product(query, key, additional_keys, *parameters[:4])


@register_flop_formula(torch.ops.natten2.na_qk_backward)
def _na_qk_backward(grad_scores, query, key, rpb, additional_keys, *parameters, out_shape=None, **kwargs) -> int:
    return 2 * _product(query, key, additional_keys, *parameters[:4])


@register_flop_formula(torch.ops.natten2.na_av)
def _na_av(weights, value, additional_values, *window, out_shape=None, **kwargs) -> int:
    return _product(weights, value, additional_values, *window)


@register_flop_formula(torch.ops.natten2.na_av_backward)
def _na_av_backward(grad_output, weights, value, additional_values, *window, out_shape=None, **kwargs) -> int:
    return 2 * _product(weights, value, additional_values, *window)
