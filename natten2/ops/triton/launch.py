"""Launches the kernels: operands, tiles, and grids."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import chain
from math import prod

import torch
import triton
import triton.language as tl
from torch import Tensor

from natten2.ops.triton.backward import (
    Upstream,
    delta_kernel,
    grad_additional_kernel,
    grad_bias_kernel,
    grad_key_value_kernel,
    grad_query_kernel,
)
from natten2.ops.triton.forward import forward_kernel
from natten2.ops.triton.geometry import Channels, Inputs, Operand, Plan
from natten2.ops.triton.tiles import Tiling, count_parts, count_step_parts, count_tiles
from natten2.ops.triton.tuning import tuned

__all__ = ["na_backward", "na_forward", "na_qkv_backward", "na_qkv_forward", "on_device", "opaque"]

# Triton computes with 32-bit integers by default; positions just outside an axis must still fit.
_MAX_INT32 = 2**31 - 2**20
_DELTA_ROWS = 64
_SPLIT_WINDOW = 1024


def opaque(numbers: Sequence[int]) -> tuple[int, ...]:
    """Numbers that Triton compiles no variant for: it would for 1, and for multiples of 16, in any tuple."""
    return tuple(number << 2 | 3 for number in numbers)


def operand(tensor: Tensor | None, align: int = 1) -> Operand | None:
    """`[B, *S, H, C]` as kernels take it."""
    if tensor is None:
        return None
    batch, *tokens, head = opaque([stride // align for stride in tensor.stride()[:-1]])
    return Operand(tensor, batch, tuple(tokens), head)


def _scalars(tensor: Tensor | None) -> Operand | None:
    """`[B, *S, H]` as kernels take it."""
    return None if tensor is None else operand(tensor.unsqueeze(-1))


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
    output_shape = (*query.shape[:-1], value.shape[-1])
    if query.shape[0] == 0:
        return query.new_empty(output_shape), query.new_empty(output_shape[:-1], dtype=torch.float32)
    inputs = (query, key, value, rpb, additional_keys, additional_values)
    window = (tuple(kernel_size), tuple(stride), tuple(is_causal))

    def run(tiling: Tiling) -> tuple[Tensor, Tensor]:
        return _forward(_Call(tiling, inputs, (_contiguous_layout(output_shape),), window, dilation), scale)

    return run(tuned("forward", inputs, window, _precision(query, window[0]), run))


def _forward(call: _Call, scale: float) -> tuple[Tensor, Tensor]:
    query, value = call.tensors[0], call.tensors[2]
    output_shape = (*query.shape[:-1], value.shape[-1])
    parts = call.parts(query.shape[-2])
    output = _new_parts(parts, query, output_shape)
    logsumexp = query.new_empty(output.shape[:-1], dtype=torch.float32)
    with on_device(query):
        forward_kernel[(call.tiles * query.shape[-2], parts)](
            call.inputs,
            call.operand(output),
            _scalars(logsumexp),
            call.lengths,
            call.dilation,
            call.sizes(query.shape[-2]),
            scale,
            call.plan,
            **call.query_options,
        )
    if parts == 1:
        return output, logsumexp
    outputs, logsumexps = (x.unflatten(0, (parts, -1)) for x in (output, logsumexp))
    logsumexp = logsumexps.logsumexp(0)
    output = torch.linalg.vecdot(outputs, (logsumexps - logsumexp).exp().unsqueeze(-1), dim=0)
    return output.to(query.dtype), logsumexp


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
    grads: Sequence[Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Computes `natten2::na_backward`; arguments and results are the operator's, and were checked.

    Args:
        grads: Where to write the gradients of query, key, and value; `None` makes them.
    """
    inputs = (query, key, value, rpb, additional_keys, additional_values)
    if grads is None:
        grads = [x.new_empty(x.shape) for x in inputs[:3]]
    if query.shape[0] == 0:
        return (*grads, *(query.new_empty(0) if x is None else x.new_zeros(x.shape) for x in inputs[3:]))
    # Gradients come as autograd made them, expanded from one number even.
    if grad_output.stride(-1) != 1:
        grad_output = grad_output.contiguous()
    results = [layout for x in grads for layout in ((x.shape, x.stride()), _contiguous_layout(x.shape))]
    window = (tuple(kernel_size), tuple(stride), tuple(is_causal))

    def run(tiling: Tiling) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
        call = _Call(tiling, inputs, results, window, dilation, outputs=(grad_output, output))
        return _backward(call, grads, grad_output, grad_logsumexp, output, logsumexp, scale)

    return run(tuned("backward", inputs, window, _precision(query, window[0]), run))


def na_qkv_forward(qkv: Tensor, rpb: Tensor | None, *parameters: object) -> tuple[Tensor, Tensor]:
    """Computes `natten2::na_qkv_forward`: :func:`na_forward` of three views."""
    return na_forward(*qkv.unbind(-3), rpb, None, None, *parameters)


def na_qkv_backward(
    grad_output: Tensor,
    grad_logsumexp: Tensor | None,
    qkv: Tensor,
    rpb: Tensor | None,
    output: Tensor,
    logsumexp: Tensor,
    *parameters: object,
) -> tuple[Tensor, Tensor]:
    """Computes `natten2::na_qkv_backward`: :func:`na_backward` of three views, into three views."""
    grad_qkv = qkv.new_empty(qkv.shape)
    upstream, inputs = (grad_output, grad_logsumexp), (*qkv.unbind(-3), rpb, None, None)
    grads = na_backward(*upstream, *inputs, output, logsumexp, *parameters, grads=grad_qkv.unbind(-3))
    return grad_qkv, grads[3]


def _backward(
    call: _Call,
    grads: Sequence[Tensor],
    grad_output: Tensor,
    grad_logsumexp: Tensor | None,
    output: Tensor,
    logsumexp: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    query, key, _, rpb, additional_keys, additional_values = call.tensors
    heads, key_heads = query.shape[-2], key.shape[-2]
    delta = torch.empty_like(logsumexp)
    upstream = Upstream(call.operand(grad_output), _scalars(logsumexp), _scalars(delta))
    with on_device(query):
        delta_kernel[(triton.cdiv(call.tokens * heads, _DELTA_ROWS) * call.batch,)](
            upstream.grad_output,
            call.operand(output),
            _scalars(grad_logsumexp),
            upstream.delta,
            call.lengths,
            opaque((heads, call.tokens)),
            call.plan._replace(block_m=_DELTA_ROWS),
            num_warps=4,
        )
        parts = call.parts(heads)
        grad_query = _own_parts(parts, grads[0])
        grad_query_kernel[(call.tiles * heads, parts)](
            call.inputs,
            upstream,
            call.operand(grad_query),
            call.lengths,
            call.dilation,
            call.sizes(heads),
            scale,
            call.plan,
            **call.query_options,
        )
        key_parts = call.parts(key_heads)
        grad_keys_values = [_own_parts(key_parts, grad) for grad in grads[1:]]
        grad_key_value_kernel[(call.tiles * key_heads, key_parts)](
            call.inputs,
            upstream,
            *map(call.operand, grad_keys_values),
            call.lengths,
            call.dilation,
            call.sizes(key_heads),
            scale,
            call.plan._replace(owns_keys=True),
            **call.options,
        )
        absent = query.new_empty(0)
        grad_rpb = absent if rpb is None else _grad_bias(call, rpb, upstream, scale)
        additional = (absent, absent)
        if additional_keys is not None:
            additional = _grad_additional(call, additional_keys, additional_values, upstream, scale)
        _sum_parts(parts, grad_query, grads[0])
        for sums, grad in zip(grad_keys_values, grads[1:], strict=True):
            _sum_parts(key_parts, sums, grad)
    return (*grads, grad_rpb, *additional)


def _new_parts(parts: int, like: Tensor, shape: Sequence[int]) -> Tensor:
    """A result, or the parts of its sum in float32, one after another along the batch."""
    return like.new_empty((parts * shape[0], *shape[1:]), dtype=like.dtype if parts == 1 else torch.float32)


def _own_parts(parts: int, result: Tensor) -> Tensor:
    """A result itself where it is its only part."""
    return result if parts == 1 else _new_parts(parts, result, result.shape)


def _sum_parts(parts: int, sums: Tensor, result: Tensor) -> None:
    if parts > 1:
        result.copy_(sums.unflatten(0, (parts, -1)).sum(0))


def _grad_bias(call: _Call, rpb: Tensor, upstream: Upstream, scale: float) -> Tensor:
    """Sums `dS` over tiles as it lies around them, then over the queries of a tile."""
    plan, heads = call.plan, rpb.shape[0]
    box = tuple(side + 2 * (window - 1) for side, window in zip(plan.tile, plan.kernel_size, strict=True))
    chunks = triton.cdiv(prod(box), plan.block_n)
    parts = count_parts(heads * chunks, call.tiles)
    sums = rpb.new_empty((heads, parts, chunks, plan.block_m, plan.block_n), dtype=torch.float32)
    grad_bias_kernel[(chunks * heads * parts,)](
        call.inputs,
        upstream,
        sums,
        call.lengths,
        call.dilation,
        opaque((heads, call.group, call.tiles, chunks)),
        scale,
        plan._replace(box=box, volume=prod(box)),
        **call.options,
    )
    table = sums.sum(1).transpose(1, 2).flatten(2)  # [heads, queries of a tile, keys around it]
    # Along an axis, query i finds the key at offset j at place i + j of those around the tile.
    row, along_tile, along_box = table.stride(1), _contiguous_strides(plan.tile), _contiguous_strides(box)
    strides = (table.stride(0), *(i * row + j for i, j in zip(along_tile, along_box, strict=True)), *along_box)
    pairs = table.as_strided((heads, *plan.tile, *rpb.shape[1:]), strides)
    return pairs.sum(tuple(range(1, len(box) + 1))).to(rpb.dtype)


def _grad_additional(
    call: _Call, keys: Tensor, values: Tensor, upstream: Upstream, scale: float
) -> tuple[Tensor, Tensor]:
    """Sums over parts of the queries, then over the parts."""
    batch, additional, key_heads, _ = keys.shape
    block = 64 if call.plan.block_n >= 64 else 32
    blocks = triton.cdiv(additional, block) * key_heads * batch
    steps = call.group * triton.cdiv(call.tokens, block)
    parts = count_parts(max(blocks, 1), steps)
    sums = [x.new_zeros((parts, *x.shape), dtype=torch.float32) for x in (keys, values)]
    if blocks > 0:
        grad_additional_kernel[(blocks, parts)](
            call.inputs,
            upstream,
            *sums,
            call.lengths,
            opaque((key_heads, call.group, additional, call.tokens, batch)),
            scale,
            call.plan._replace(block_m=block, block_n=block),
            num_warps=4,
            num_stages=2,
        )
    return sums[0].sum(0).to(keys.dtype), sums[1].sum(0).to(values.dtype)


class _Call:
    """What the kernels of one call share; of `results` the shapes and strides."""

    def __init__(
        self,
        tiling: Tiling,
        inputs: Sequence[Tensor | None],
        results: Sequence[tuple[Sequence[int], Sequence[int]]],
        window: tuple[tuple[int, ...], tuple[int, ...], tuple[bool, ...]],
        dilation: Sequence[int],
        *,
        outputs: Sequence[Tensor] = (),
    ) -> None:
        self.tiling, self.tensors = tiling, inputs
        query, key, value, rpb, additional_keys, additional_values = inputs
        tokens = (query, key, value, additional_keys, additional_values, *outputs)
        layouts = [(x.shape, x.stride()) for x in tokens if x is not None] + list(results)
        self.lengths, self.dilation = opaque(query.shape[1:-2]), opaque(dilation)
        self.tiles = count_tiles(query.shape[1:-2], dilation, tiling.tile) * query.shape[0]
        self.tokens = prod(query.shape[1:-2])
        self.batch = query.shape[0]
        self.group = query.shape[-2] // key.shape[-2]
        self.additional = 0 if additional_keys is None else additional_keys.shape[1]
        self.plan = Plan(
            *window,
            owns_keys=False,
            head_dim=_channels(query.shape[-1]),
            value_dim=_channels(value.shape[-1]),
            align=_alignment([strides for _, strides in layouts]),
            index=_index_dtype(layouts if rpb is None else [*layouts, (rpb.shape, rpb.stride())]),
            precision=_precision(query, window[0]),
            tile=self.tiling.tile,
            box=self.tiling.box,
            volume=prod(self.tiling.box),
            block_m=prod(self.tiling.tile),
            block_n=self.tiling.block,
        )
        self.options = {"num_warps": self.tiling.warps, "num_stages": self.tiling.stages}
        self.query_options = dict(self.options)
        if self.tiling.max_registers is not None and _is_nvidia(query.device):
            self.query_options["maxnreg"] = self.tiling.max_registers
        self.inputs = Inputs(
            *map(self.operand, (query, key, value)),
            _bias(rpb),
            *map(self.operand, (additional_keys, additional_values)),
        )

    def operand(self, tensor: Tensor | None) -> Operand | None:
        return operand(tensor, self.plan.align)

    def sizes(self, heads: int) -> tuple[int, ...]:
        return opaque((self.batch, heads, self.group, self.additional))

    def parts(self, heads: int) -> int:
        return count_step_parts(self.tiles * heads, self.tiling)


def _channels(count: int) -> Channels:
    return Channels(count, max(16, triton.next_power_of_2(count)))


def _contiguous_layout(shape: Sequence[int]) -> tuple[Sequence[int], Sequence[int]]:
    return shape, _contiguous_strides(shape)


def _contiguous_strides(shape: Sequence[int]) -> tuple[int, ...]:
    return tuple(prod(shape[axis + 1 :]) for axis in range(len(shape)))


def _bias(rpb: Tensor | None) -> Operand | None:
    return None if rpb is None else Operand(rpb, 0, opaque(rpb.stride()[1:]), *opaque(rpb.stride()[:1]))


def _alignment(strides: Sequence[Sequence[int]]) -> int:
    """The power of two, at most 16, that divides every stride but the channels': how wide kernels may load."""
    align = 16
    for stride in chain.from_iterable(along[:-1] for along in strides):
        while stride % align:
            align //= 2
    return align


def _index_dtype(layouts: Sequence[tuple[Sequence[int], Sequence[int]]]) -> tl.dtype:
    """64 bits where one entry of a batch, or one head of a bias, reaches further than 32 bits count."""
    reach = max(
        sum((size - 1) * stride for size, stride in zip(shape[1:], strides[1:], strict=True))
        for shape, strides in layouts
    )
    tokens = max(prod(shape[1:-2]) for shape, _ in layouts)
    return tl.int64 if max(reach, tokens) > _MAX_INT32 else tl.int32


def _precision(query: Tensor, kernel_size: Sequence[int]) -> str:
    """How products are computed: of float32 as PyTorch's setting says, of half precision in one product or in two.

    Without TF32, NVIDIA's matrix units still multiply float32, as three products of TF32, whose error is float32's.
    Small windows are bound by memory, and a second product is free; large ones are bound by their products.
    """
    if query.dtype is not torch.float32:
        return "split" if prod(kernel_size) < _SPLIT_WINDOW else "ieee"
    if not _is_nvidia(query.device):
        return "ieee"
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "tf32x3"


def _is_nvidia(device: torch.device) -> bool:
    return device.type != "xpu" and torch.version.hip is None


def on_device(tensor: Tensor) -> AbstractContextManager:
    """Makes a tensor's device the current one, which Triton launches on; the interpreter has none."""
    if tensor.device.index is None:
        return nullcontext()
    return torch.get_device_module(tensor.device).device(tensor.device)
