"""Shapes, dtypes, and strides of the outputs, without data: what the compiler, export, and meta tensors see."""

from __future__ import annotations

import torch
from torch import Tensor

from natten2.ops.schemas import LIBRARY
from natten2.ops.validation import accumulate_dtype, check_backward, check_forward


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
