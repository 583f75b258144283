"""`torch.vmap`: the mapped axis becomes part of the batch, or of the heads where every index has a bias of its own."""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

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


class Axes(NamedTuple):
    """Where a tensor has its batch, and where its heads."""

    batch: int | None
    heads: int


_TOKENS = Axes(0, -2)  # [B, *S, H, D], [B, *S, 3, H, D], [B, *S, H, slots]
_ROWS = Axes(0, -1)  # [B, *S, H]
_BIAS = Axes(None, 0)  # [H, ...]
_INPUTS = (_TOKENS, _TOKENS, _TOKENS, _BIAS, _TOKENS, _TOKENS)
_PACKED_INPUTS = (_TOKENS, _BIAS)
_QK_INPUTS = (_TOKENS, _TOKENS, _BIAS, _TOKENS)
_AV_INPUTS = (_TOKENS, _TOKENS, _TOKENS)
# The tensors that an operator takes first, and those that it returns.
_SIGNATURES = {
    na_forward: (_INPUTS, (_TOKENS, _ROWS)),
    na_backward: ((_TOKENS, _ROWS, *_INPUTS, _TOKENS, _ROWS), _INPUTS),
    na_qkv_forward: (_PACKED_INPUTS, (_TOKENS, _ROWS)),
    na_qkv_backward: ((_TOKENS, _ROWS, *_PACKED_INPUTS, _TOKENS, _ROWS), _PACKED_INPUTS),
    na_qk: (_QK_INPUTS, (_TOKENS,)),
    na_qk_backward: ((_TOKENS, *_QK_INPUTS), _QK_INPUTS),
    na_av: (_AV_INPUTS, (_TOKENS,)),
    na_av_backward: ((_TOKENS, *_AV_INPUTS), _AV_INPUTS),
}


def _vmap(
    op: torch._ops.OpOverload, info: torch._functorch.autograd_function.VmapInfo, in_dims: tuple[int | None, ...], *args
) -> tuple[tuple[Tensor, ...] | Tensor, tuple[int | None, ...] | int | None]:
    inputs, outputs = _SIGNATURES[op]
    count, size = len(inputs), info.batch_size
    tensors = list(zip(args[:count], in_dims[:count], inputs, strict=True))
    # A batch shares one bias, and sums its gradient.
    biases = [
        dim is not None or _BIAS in outputs for tensor, dim, axes in tensors if axes is _BIAS and tensor is not None
    ]
    where = "heads" if any(biases) else "batch"
    folded = (_fold(tensor, dim, size, getattr(axes, where)) for tensor, dim, axes in tensors)
    results = op(*folded, *args[count:])
    if len(outputs) == 1:
        return _unfold(results, size, getattr(outputs[0], where))
    unfolded = [_unfold(output, size, getattr(axes, where)) for output, axes in zip(results, outputs, strict=True)]
    return tuple(output for output, _ in unfolded), tuple(dim for _, dim in unfolded)


def _fold(tensor: Tensor | None, dim: int | None, size: int, axis: int | None) -> Tensor | None:
    """The axis `dim` of mapped tensors folded into `axis`, counted without `dim`."""
    if tensor is None or axis is None:
        return tensor
    tensor = tensor.expand(size, *tensor.shape) if dim is None else tensor.movedim(dim, 0)
    axis %= tensor.dim() - 1
    # What is contiguous under vmap is not in the caller's hands.
    folded = tensor.movedim(0, axis).flatten(axis, axis + 1)
    return folded if folded.stride(-1) == 1 else folded.contiguous()


def _unfold(output: Tensor, size: int, axis: int | None) -> tuple[Tensor, int | None]:
    """The output with its mapped axis, and where that is."""
    if axis is None:
        return output, None
    axis %= output.dim()
    return output.unflatten(axis, (size, output.shape[axis] // size)), axis


for _op in _SIGNATURES:
    torch.library.register_vmap(_op._name, partial(_vmap, _op), lib=LIBRARY)
