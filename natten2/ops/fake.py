"""Shapes, dtypes, and strides of the outputs, without data: what the compiler, export, and meta tensors see."""

from __future__ import annotations

import torch
from torch import Tensor

from natten2.ops.schemas import LIBRARY
from natten2.ops.validation import (
    accumulate_dtype,
    check_av,
    check_av_backward,
    check_backward,
    check_forward,
    check_qk,
    check_qk_backward,
    count_slots,
)


@torch.library.register_fake("natten2::na_forward", lib=LIBRARY)
def _na_forward(query: Tensor, key: Tensor, value: Tensor, *args: object) -> tuple[Tensor, Tensor]:
    check_forward(query, key, value, *args)
    output = query.new_empty((*query.shape[:-1], value.shape[-1]))
    logsumexp = query.new_empty(query.shape[:-1], dtype=accumulate_dtype(query.dtype))
    return output, logsumexp


@torch.library.register_fake("natten2::na_backward", lib=LIBRARY)
def _na_backward(grad_output: Tensor, grad_logsumexp: Tensor | None, *args: object) -> tuple[Tensor, ...]:
    check_backward(grad_output, grad_logsumexp, *args)
    inputs = args[:6]
    return tuple(grad_output.new_empty(0) if x is None else x.new_empty(x.shape) for x in inputs)


@torch.library.register_fake("natten2::na_qk", lib=LIBRARY)
def _na_qk(query: Tensor, key: Tensor, rpb: Tensor | None, additional_keys: Tensor | None, *args: object) -> Tensor:
    check_qk(query, key, rpb, additional_keys, *args)
    return query.new_empty((*query.shape[:-1], count_slots(args[0], additional_keys)))


@torch.library.register_fake("natten2::na_qk_backward", lib=LIBRARY)
def _na_qk_backward(grad_scores: Tensor, *args: object) -> tuple[Tensor, ...]:
    check_qk_backward(grad_scores, *args)
    return tuple(grad_scores.new_empty(0) if x is None else x.new_empty(x.shape) for x in args[:4])


@torch.library.register_fake("natten2::na_av", lib=LIBRARY)
def _na_av(weights: Tensor, value: Tensor, *args: object) -> Tensor:
    check_av(weights, value, *args)
    return weights.new_empty((*weights.shape[:-1], value.shape[-1]))


@torch.library.register_fake("natten2::na_av_backward", lib=LIBRARY)
def _na_av_backward(grad_output: Tensor, *args: object) -> tuple[Tensor, ...]:
    check_av_backward(grad_output, *args)
    return tuple(grad_output.new_empty(0) if x is None else x.new_empty(x.shape) for x in args[:3])
