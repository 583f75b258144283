"""Launches the kernels: operands, tiles, and grids."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from math import prod

import torch
import triton
import triton.language as tl
from torch import Tensor

from natten2.ops.triton.backward import (
    grad_additional_kernel,
    grad_bias_kernel,
    grad_key_value_kernel,
    grad_query_kernel,
)
from natten2.ops.triton.forward import forward_kernel
from natten2.ops.triton.geometry import Operand
from natten2.ops.triton.tiles import Tiling, choose_tiling

__all__ = ["na_backward", "na_forward", "opaque"]

# Triton computes with 32-bit integers by default; positions just outside an axis must still fit.
_MAX_INT32 = 2**31 - 2**20
# Sums with few owners are taken in parts, for about this many programs; a constant, so that results are the same bits.
_PROGRAMS = 1024
_LARGE_WINDOW = 1024


def opaque(numbers: Sequence[int]) -> tuple[int, ...]:
    """Numbers that Triton compiles no variant for: it would for 1, and for multiples of 16, in any tuple."""
    return tuple(number << 2 | 3 for number in numbers)


def operand(tensor: Tensor | None, align: int = 1) -> Operand | None:
    """`[B, *S, H, C]` as kernels take it."""
    if tensor is None:
        return None
    batch, *tokens, head = opaque([stride // align for stride in tensor.stride()[:-1]])
    return Operand(tensor, batch, tuple(tokens), head)


def na_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    rpb: Tensor | None,
    additional_keys: Tensor | None,
    additional_values: Tensor | None,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    dilation: Sequence[int],
    is_causal: Sequence[bool],
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Computes `natten2::na_forward`; arguments and results are the operator's, and were checked."""
    value_dim = value.shape[-1]
    output = query.new_empty((*query.shape[:-1], value_dim))
    logsumexp = query.new_empty(query.shape[:-1], dtype=torch.float32)
    if query.shape[0] == 0:
        return output, logsumexp
    tensors = (query, key, value, additional_keys, additional_values, output)
    call = _Call(tensors, kernel_size, stride, dilation, is_causal)
    with _on_device(query):
        forward_kernel[(call.tiles * query.shape[-2],)](
            *map(call.operand, tensors[:3]),
            _bias(rpb),
            *map(call.operand, tensors[3:]),
            operand(logsumexp.unsqueeze(-1)),
            call.lengths,
            call.dilation,
            call.sizes(query.shape[-2]),
            scale,
            **call.constants,
            **call.tiling_constants,
        )
    return output, logsumexp


def na_backward(
    grad_output: Tensor,
    grad_logsumexp: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    rpb: Tensor | None,
    additional_keys: Tensor | None,
    additional_values: Tensor | None,
    output: Tensor,
    logsumexp: Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    dilation: Sequence[int],
    is_causal: Sequence[bool],
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Computes `natten2::na_backward`; arguments and results are the operator's, and were checked."""
    inputs = (query, key, value, rpb, additional_keys, additional_values)
    if query.shape[0] == 0:
        return tuple(query.new_empty(0) if x is None else x.new_zeros(x.shape) for x in inputs)
    # Gradients come as autograd made them, expanded from one number even.
    if grad_output.stride(-1) != 1:
        grad_output = grad_output.contiguous()
    grad_query, grad_key, grad_value = (query.new_empty(x.shape) for x in (query, key, value))
    delta = torch.linalg.vecdot(grad_output.float(), output.float())
    if grad_logsumexp is not None:
        delta = delta - grad_logsumexp
    tensors = (query, key, value, additional_keys, additional_values, grad_output, grad_query, grad_key, grad_value)
    call = _Call(tensors, kernel_size, stride, dilation, is_causal, is_backward=True)
    heads, key_heads = query.shape[-2], key.shape[-2]
    q, k, v, extra_k, extra_v, grad, *grads = map(call.operand, tensors)
    rows = (operand(logsumexp.unsqueeze(-1)), operand(delta.unsqueeze(-1)))
    bias = _bias(rpb)
    with _on_device(query):
        grad_query_kernel[(call.tiles * heads,)](
            q,
            k,
            v,
            bias,
            extra_k,
            extra_v,
            grad,
            *rows,
            grads[0],
            call.lengths,
            call.dilation,
            call.sizes(heads),
            scale,
            **call.constants,
            **call.tiling_constants,
        )
        grad_key_value_kernel[(call.tiles * key_heads,)](
            q,
            k,
            v,
            bias,
            grad,
            *rows,
            *grads[1:],
            call.lengths,
            call.dilation,
            call.sizes(key_heads),
            scale,
            **call.constants,
            **call.tiling_constants,
        )
        grad_rpb = query.new_empty(0) if rpb is None else _grad_bias(call, rpb, (q, k, v, bias, grad, *rows), scale)
        if additional_keys is None:
            extra = query.new_empty(0), query.new_empty(0)
        else:
            extra = _grad_additional(
                call, additional_keys, additional_values, (q, extra_k, extra_v, grad, *rows), scale
            )
    return grad_query, grad_key, grad_value, grad_rpb, *extra


def _grad_bias(call: _Call, rpb: Tensor, operands: Sequence[Operand], scale: float) -> Tensor:
    """Sums `dS` over tiles as it lies around them, then over the queries of a tile."""
    tiling, heads = call.tiling, rpb.shape[0]
    box = tuple(
        side + 2 * (window - 1) for side, window in zip(tiling.tile, call.constants["KERNEL_SIZE"], strict=True)
    )
    chunks, rows = triton.cdiv(prod(box), tiling.block), prod(tiling.tile)
    parts = max(1, min(call.tiles, _PROGRAMS // (heads * chunks)))
    sums = rpb.new_empty((heads, parts, chunks, rows, tiling.block), dtype=torch.float32)
    grad_bias_kernel[(chunks * heads * parts,)](
        *operands,
        sums,
        call.lengths,
        call.dilation,
        opaque((heads, call.group, call.tiles, chunks)),
        scale,
        **call.constants,
        **{**call.tiling_constants, "BOX": box, "VOLUME": prod(box)},
    )
    table = sums.sum(1).transpose(1, 2).flatten(2)  # [heads, queries of a tile, keys around it]
    columns = _columns(tiling.tile, rpb.shape[1:], box).to(rpb.device)
    return table.gather(2, columns.expand(heads, -1, -1)).sum(1).reshape(rpb.shape).to(rpb.dtype)


def _columns(tile: Sequence[int], offsets: Sequence[int], box: Sequence[int]) -> Tensor:
    """Where, among the keys around a tile, a query finds the key at each offset: `[queries, offsets]`."""
    result = torch.zeros(1, 1, dtype=torch.int64)
    for side, count, length in zip(tile, offsets, box, strict=True):
        along = torch.arange(side)[:, None] + torch.arange(count)
        result = (result[:, None, :, None] * length + along[None, :, None, :]).flatten(2, 3).flatten(0, 1)
    return result


def _grad_additional(
    call: _Call, keys: Tensor, values: Tensor, operands: Sequence[Operand], scale: float
) -> tuple[Tensor, Tensor]:
    """Sums over parts of the queries, then over the parts."""
    batch, additional, key_heads, _ = keys.shape
    block = 64 if call.tiling.block >= 64 else 32
    blocks = triton.cdiv(additional, block) * key_heads * batch
    steps = call.group * triton.cdiv(call.tokens, block)
    parts = max(1, min(steps, _PROGRAMS // max(blocks, 1)))
    sums = [x.new_zeros((parts, *x.shape), dtype=torch.float32) for x in (keys, values)]
    constants = {name: x for name, x in call.constants.items() if name not in ("KERNEL_SIZE", "STRIDE", "IS_CAUSAL")}
    if blocks > 0:
        grad_additional_kernel[(blocks, parts)](
            *operands,
            *sums,
            call.lengths,
            opaque((key_heads, call.group, additional, call.tokens, batch)),
            scale,
            **constants,
            BLOCK_M=block,
            BLOCK_N=block,
            num_warps=4,
            num_stages=2,
        )
    return sums[0].sum(0).to(keys.dtype), sums[1].sum(0).to(values.dtype)


class _Call:
    """What the kernels of one call share."""

    def __init__(
        self,
        tensors: Sequence[Tensor | None],
        kernel_size: Sequence[int],
        stride: Sequence[int],
        dilation: Sequence[int],
        is_causal: Sequence[bool],
        *,
        is_backward: bool = False,
    ) -> None:
        query, key, value, additional_keys, *_ = tensors
        present = [tensor for tensor in tensors if tensor is not None]
        lengths, head_dim, value_dim = query.shape[1:-2], query.shape[-1], value.shape[-1]
        self.align = _alignment(present)
        self.tiling = choose_tiling(kernel_size, stride, is_causal, head_dim, value_dim, is_backward=is_backward)
        self.tiles = _count_tiles(lengths, dilation, self.tiling) * query.shape[0]
        self.tokens = prod(lengths)
        self.lengths, self.dilation = opaque(lengths), opaque(dilation)
        self.group = query.shape[-2] // key.shape[-2]
        self.additional = 0 if additional_keys is None else additional_keys.shape[1]
        self.constants = {
            "KERNEL_SIZE": tuple(kernel_size),
            "STRIDE": tuple(stride),
            "IS_CAUSAL": tuple(is_causal),
            "HEAD_DIM": head_dim,
            "VALUE_DIM": value_dim,
            "ALIGN": self.align,
            "INDEX": _index_dtype(present),
            "PRECISION": _precision(query, kernel_size),
            "BLOCK_D": max(16, triton.next_power_of_2(head_dim)),
            "BLOCK_V": max(16, triton.next_power_of_2(value_dim)),
        }
        self.tiling_constants = {
            "TILE": self.tiling.tile,
            "BOX": self.tiling.box,
            "VOLUME": prod(self.tiling.box),
            "BLOCK_M": prod(self.tiling.tile),
            "BLOCK_N": self.tiling.block,
            "num_warps": self.tiling.warps,
            "num_stages": self.tiling.stages,
        }

    def operand(self, tensor: Tensor | None) -> Operand | None:
        return operand(tensor, self.align)

    def sizes(self, heads: int) -> tuple[int, ...]:
        return opaque((heads, self.group, self.additional))


def _bias(rpb: Tensor | None) -> Operand | None:
    return None if rpb is None else Operand(rpb, 0, opaque(rpb.stride()[1:]), *opaque(rpb.stride()[:1]))


def _count_tiles(lengths: Sequence[int], dilation: Sequence[int], tiling: Tiling) -> int:
    axes = zip(lengths, dilation, tiling.tile, strict=True)
    return prod(gap * triton.cdiv(triton.cdiv(length, gap), tile) for length, gap, tile in axes)


def _alignment(tensors: Sequence[Tensor]) -> int:
    """The power of two, at most 16, that divides every stride: how wide kernels may load."""
    align = 16
    for tensor in tensors:
        for stride in tensor.stride()[:-1]:
            while stride % align:
                align //= 2
    return align


def _index_dtype(tensors: Sequence[Tensor]) -> tl.dtype:
    """64 bits where one entry of a batch, or a bias, reaches further than 32 bits count."""
    reach = max(
        sum((size - 1) * stride for size, stride in zip(tensor.shape[1:], tensor.stride()[1:], strict=True))
        for tensor in tensors
    )
    return tl.int64 if max(reach, max(prod(tensor.shape[1:-2]) for tensor in tensors)) > _MAX_INT32 else tl.int32


def _precision(query: Tensor, kernel_size: Sequence[int]) -> str:
    """How products are computed: of float32 as PyTorch's setting says, of half precision in one product or in two.

    Small windows are bound by memory, and a second product is free; large ones are bound by their products.
    """
    if query.dtype is torch.float32:
        return "tf32" if torch.backends.cuda.matmul.allow_tf32 else "ieee"
    return "split" if prod(kernel_size) < _LARGE_WINDOW else "ieee"


def _on_device(tensor: Tensor) -> AbstractContextManager:
    """Makes a tensor's device the current one, which Triton launches on; the interpreter has none."""
    if tensor.device.index is None:
        return nullcontext()
    return torch.get_device_module(tensor.device).device(tensor.device)
