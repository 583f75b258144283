"""Shapes, dtypes, and strides of the outputs, without data: what the compiler, export, and meta tensors see."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from natten2.ops.schemas import LIBRARY, na_backward, na_forward, na_qkv_backward, na_qkv_forward
from natten2.ops.validation import (
    accumulate_dtype,
    check_backward,
    check_forward,
    check_qkv_backward,
    check_qkv_forward,
)

# The shape and dtype of each output; kernels make them contiguous.
Layouts = tuple[tuple[Sequence[int], torch.dtype], ...]


def _results(query: Tensor, key: Tensor, value: Tensor, *_: object) -> Layouts:
    rows = query.shape[:-1]
    return ((*rows, value.shape[-1]), query.dtype), (rows, accumulate_dtype(query.dtype))


def _gradients(grad_output: Tensor, grad_logsumexp: Tensor | None, *args: object) -> Layouts:
    return tuple(((0,), grad_output.dtype) if x is None else (x.shape, x.dtype) for x in args[:6])


def _qkv_results(qkv: Tensor, *_: object) -> Layouts:
    rows = (*qkv.shape[:-3], qkv.shape[-2])
    return ((*rows, qkv.shape[-1]), qkv.dtype), (rows, accumulate_dtype(qkv.dtype))


def _qkv_gradients(grad_output: Tensor, grad_logsumexp: Tensor | None, *args: object) -> Layouts:
    return tuple(((0,), grad_output.dtype) if x is None else (x.shape, x.dtype) for x in args[:2])


def _register(op: torch._ops.OpOverload, check: Callable[..., None], layouts: Callable[..., Layouts]) -> None:
    @torch.library.register_fake(op._schema.name, lib=LIBRARY)
    def fake(*args: object) -> tuple[Tensor, ...]:
        check(*args)
        return tuple(args[0].new_empty(shape, dtype=dtype) for shape, dtype in layouts(*args))


_register(na_forward, check_forward, _results)
_register(na_backward, check_backward, _gradients)
_register(na_qkv_forward, check_qkv_forward, _qkv_results)
_register(na_qkv_backward, check_qkv_backward, _qkv_gradients)
