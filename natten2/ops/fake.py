"""Shapes, dtypes, and strides of the outputs, without data: what the compiler, export, and meta tensors see."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from natten2.ops.schemas import (
    LIBRARY,
    na_av,
    na_av_backward,
    na_backward,
    na_forward,
    na_qk,
    na_qk_backward,
    na_qkv_backward,
    na_qkv_forward,
)
from natten2.ops.validation import CHECKS, accumulate_dtype, count_slots

# The shape and dtype of each output; kernels make them contiguous.
Layout = tuple[Sequence[int], torch.dtype]


def _results(query: Tensor, key: Tensor, value: Tensor, *_: object) -> tuple[Layout, ...]:
    rows = query.shape[:-1]
    return ((*rows, value.shape[-1]), query.dtype), (rows, accumulate_dtype(query.dtype))


def _qkv_results(qkv: Tensor, *_: object) -> tuple[Layout, ...]:
    rows = (*qkv.shape[:-3], qkv.shape[-2])
    return ((*rows, qkv.shape[-1]), qkv.dtype), (rows, accumulate_dtype(qkv.dtype))


def _scores(
    query: Tensor,
    key: Tensor,
    rpb: Tensor | None,
    additional_keys: Tensor | None,
    kernel_size: Sequence[int],
    *_: object,
) -> Layout:
    return (*query.shape[:-1], count_slots(kernel_size, additional_keys)), query.dtype


def _sums(weights: Tensor, value: Tensor, *_: object) -> Layout:
    return (*weights.shape[:-1], value.shape[-1]), weights.dtype


def _gradients(first: int, count: int) -> Callable[..., tuple[Layout, ...]]:
    """Those of the arguments from `first` on; of absent ones, size 0."""

    def gradients(*args: object) -> tuple[Layout, ...]:
        inputs = args[first : first + count]
        return tuple(((0,), args[0].dtype) if x is None else (x.shape, x.dtype) for x in inputs)

    return gradients


def _register(op: torch._ops.OpOverload, layouts: Callable[..., tuple[Layout, ...] | Layout]) -> None:
    is_single = len(op._schema.returns) == 1

    @torch.library.register_fake(op._schema.name, lib=LIBRARY)
    def fake(*args: object) -> tuple[Tensor, ...] | Tensor:
        CHECKS[op](*args)
        outputs = layouts(*args)
        made = [args[0].new_empty(shape, dtype=dtype) for shape, dtype in ([outputs] if is_single else outputs)]
        return made[0] if is_single else tuple(made)


_register(na_forward, _results)
_register(na_backward, _gradients(2, 6))
_register(na_qkv_forward, _qkv_results)
_register(na_qkv_backward, _gradients(2, 2))
_register(na_qk, _scores)
_register(na_qk_backward, _gradients(1, 4))
_register(na_av, _sums)
_register(na_av_backward, _gradients(1, 3))
