"""What `torch.utils.flop_counter.FlopCounterMode` counts for the unfused pair: products of pairs that are seen."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.utils.flop_counter import register_flop_formula

from natten2.ops.costs import Call


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
