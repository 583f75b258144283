"""The CUDA C++ kernels: which calls they take, and their outputs and scratch memory.

Nothing here is registered as an operator's kernel; :mod:`natten2.ops.cuda` calls it where its rule says so.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor

from natten2 import _extension
from natten2.ops.schemas import LIBRARY

__all__ = [
    "RULE",
    "na_backward",
    "na_forward",
    "na_qkv_backward",
    "na_qkv_forward",
    "unusable",
    "unusable_tensors",
    "wants_kernels",
]

# Of one row in shared memory, with 63 others that a block owns.
_MAX_ROW_BYTES = 512
_CHANNELS = 8
_MAX_WINDOW = 1024
# A table of sums by offset shares that memory too.
_MAX_OFFSETS, _MAX_OFFSETS_OF_WIDE_ROWS, _WIDE_ROW_BYTES = 2048, 800, 256
_MAX_TOKENS = 2**28
_ALIGNMENT = 16
# Steps along an axis count in pieces of 16 bytes, in 32 bits.
_MAX_REACH = 2**34
_MIN_CAPABILITY = (8, 0)
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Blocks among which sums with few owners are divided: on every device, so that results are equal.
_BLOCKS = 2048

RULE = (
    f"NATTEN2_CUDA_KERNELS=1, a build with nvcc, an NVIDIA GPU of compute capability "
    f"{'.'.join(map(str, _MIN_CAPABILITY))} or later, windows of fewer than {_MAX_WINDOW} keys, head_dim and value_dim "
    f"in multiples of {_CHANNELS} up to {_MAX_ROW_BYTES} bytes, a bias of at most {_MAX_OFFSETS} offsets "
    f"({_MAX_OFFSETS_OF_WIDE_ROWS} from {_WIDE_ROW_BYTES + 1} bytes on), fewer than 2^28 tokens, and rows at multiples "
    f"of {_ALIGNMENT} bytes"
)

_INPUTS = "Tensor query, Tensor key, Tensor value, Tensor? bias, Tensor? additional_keys, Tensor? additional_values"
_PARAMETERS = (
    "int[] kernel_size, int[] stride, int[] dilation, bool[] is_causal, float scale, bool is_exact, int stream"
)
LIBRARY.define(f"cuda_forward({_INPUTS}, {_PARAMETERS}, Tensor(a!) output, Tensor(b!) logsumexp) -> ()")
LIBRARY.define(
    f"cuda_backward(Tensor grad_output, Tensor? grad_logsumexp, {_INPUTS}, Tensor output, Tensor logsumexp, "
    f"{_PARAMETERS}, Tensor(a!) delta, Tensor(b!) grad_query, Tensor(c!) grad_key, Tensor(d!) grad_value, "
    "Tensor(e!)? grad_bias, Tensor(f!)? grad_additional, int bias_parts, int additional_parts) -> ()"
)
_forward = torch.ops.natten2.cuda_forward.default
_backward = torch.ops.natten2.cuda_backward.default


def wants_kernels() -> bool:
    """Whether the kernels were asked for: nobody has seen them run on a GPU yet."""
    return os.environ.get("NATTEN2_CUDA_KERNELS") == "1"


def unusable(
    dtype: torch.dtype,
    head_dim: int,
    value_dim: int,
    spatial: Sequence[int],
    batch: int,
    kernel_size: Sequence[int],
    *,
    has_bias: bool,
    capability: tuple[int, int] | None,
) -> str | None:
    """Why the kernels don't take a call, or `None` where they do if they are wanted and the tensors' strides allow it.

    Args:
        dtype: The tensors' dtype.
        head_dim: Channels of queries and keys.
        value_dim: Channels of values.
        spatial: Lengths of the axes.
        batch: Entries of the batch.
        kernel_size: Of the window, along each axis.
        has_bias: Whether there is a relative positional bias.
        capability: Compute capability of an NVIDIA GPU, `None` for another maker's.
    """
    if _extension.cuda_library_path() is None:
        return "natten2 was built without nvcc"
    if capability is None or capability < _MIN_CAPABILITY:
        return "the GPU must be NVIDIA's, of compute capability 8.0 or later"
    if dtype not in _DTYPES:
        return f"query must have dtype {' or '.join(map(str, _DTYPES))}, got {dtype}"
    for name, channels in (("head_dim", head_dim), ("value_dim", value_dim)):
        if channels % _CHANNELS or channels * dtype.itemsize > _MAX_ROW_BYTES:
            most = _MAX_ROW_BYTES // dtype.itemsize
            return f"{name} must be a multiple of {_CHANNELS} up to {most}, got {channels}"
    if prod(kernel_size) >= _MAX_WINDOW:
        return f"the window must have fewer than {_MAX_WINDOW} keys, got {prod(kernel_size)}"
    offsets = prod(2 * size - 1 for size in kernel_size)
    is_wide = max(head_dim, value_dim) * dtype.itemsize > _WIDE_ROW_BYTES
    most = _MAX_OFFSETS_OF_WIDE_ROWS if is_wide else _MAX_OFFSETS
    if has_bias and offsets > most:
        return f"the bias must have at most {most} offsets, got {offsets}"
    if batch * prod(spatial) >= _MAX_TOKENS:
        return f"there must be fewer than 2^28 tokens, got {batch * prod(spatial)}"
    return None


def unusable_tensors(*tensors: Tensor | None) -> str | None:
    """Why the kernels can't read tensors in place, or `None` where they can."""
    for tensor in tensors:
        if tensor is None:
            continue
        if not _is_aligned(tensor):
            return f"every row must begin at a multiple of {_ALIGNMENT} bytes, got strides {list(tensor.stride())}"
        axes = zip(tensor.shape[1:-2], tensor.stride()[1:-2], strict=True)
        if max((length - 1) * stride for length, stride in axes) * tensor.element_size() >= _MAX_REACH:
            return f"an axis must reach less than 2^34 bytes, got strides {list(tensor.stride())}"
    return None


def _is_aligned(tensor: Tensor) -> bool:
    width = _ALIGNMENT // tensor.element_size()
    strides = zip(tensor.shape[:-1], tensor.stride()[:-1], strict=True)
    return (
        tensor.stride(-1) == 1
        and tensor.data_ptr() % _ALIGNMENT == 0
        and not any(stride % width for length, stride in strides if length > 1)
    )


def na_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    rpb: Tensor | None,
    additional_keys: Tensor | None,
    additional_values: Tensor | None,
    *parameters: object,
) -> tuple[Tensor, Tensor]:
    """Computes `natten2::na_forward`; arguments and results are the operator's, and were checked."""
    output = query.new_empty((*query.shape[:-1], value.shape[-1]))
    logsumexp = query.new_empty(query.shape[:-1], dtype=torch.float32)
    if query.shape[0] > 0:
        inputs = (query, key, value, _table(rpb), *_present(additional_keys, additional_values))
        with _on_device(query):
            _forward(*inputs, *parameters, _is_exact(query), _stream(query), output, logsumexp)
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
    *parameters: object,
    grads: Sequence[Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Computes `natten2::na_backward`; arguments and results are the operator's, and were checked.

    Args:
        grads: Where to write the gradients of query, key, and value; `None` makes them.
    """
    if grads is None:
        grads = [x.new_empty(x.shape) for x in (query, key, value)]
    more = _present(additional_keys, additional_values)
    rest = [
        query.new_empty(0) if x is None else x.new_zeros(x.shape) for x in (rpb, additional_keys, additional_values)
    ]
    if query.shape[0] == 0:
        return (*grads, *rest)
    # Gradients come as autograd made them, expanded from one number even.
    grad_output, output = (x if _is_aligned(x) else x.contiguous() for x in (grad_output, output))
    heads, tokens = query.shape[-2], prod(query.shape[1:-2])
    bias_parts = _count_parts(heads, -(-tokens // 64) * query.shape[0])
    grad_bias = None if rpb is None else query.new_empty((bias_parts, *rpb.shape), dtype=torch.float32)
    grad_more, more_parts = None, 1
    if more[0] is not None:
        blocks = -(-more[0].shape[1] // 64) * key.shape[-2] * key.shape[0]
        more_parts = _count_parts(blocks, -(-tokens * (heads // key.shape[-2]) // 256))
        grad_more = query.new_empty(more_parts * (more[0].numel() + more[1].numel()), dtype=torch.float32)
    with _on_device(query):
        _backward(
            grad_output,
            grad_logsumexp,
            *(query, key, value, _table(rpb), *more, output, logsumexp),
            *parameters,
            *(_is_exact(query), _stream(query), torch.empty_like(logsumexp), *grads, grad_bias, grad_more),
            bias_parts,
            more_parts,
        )
    if grad_bias is not None:
        rest[0] = grad_bias.sum(0).to(rpb.dtype)
    if grad_more is not None:
        sums = grad_more.split([more_parts * x.numel() for x in more])
        rest[1:] = (part.view(more_parts, *x.shape).sum(0).to(x.dtype) for part, x in zip(sums, more, strict=True))
    return (*grads, *rest)


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


def _table(rpb: Tensor | None) -> Tensor | None:
    """The bias as the kernels read it."""
    return None if rpb is None else rpb.float().contiguous()


def _present(keys: Tensor | None, values: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """Additional keys and values, unless there are none."""
    return (None, None) if keys is None or keys.shape[1] == 0 else (keys, values)


def _count_parts(owners: int, most: int) -> int:
    """In how many parts, `most` of them at most, a sum is taken that has so many owners."""
    return max(1, min(_BLOCKS // owners, most))


def _is_exact(query: Tensor) -> bool:
    """Whether float32's products are as exact as float32, as PyTorch's setting says; half precision's always are.

    Its weights go into products as two numbers, so that rounding them costs nothing that shows: windows that these
    kernels take are bound by memory.
    """
    return query.dtype is not torch.float32 or torch.backends.cuda.matmul.fp32_precision != "tf32"


def _on_device(query: Tensor) -> torch.cuda.device:
    """Makes a tensor's device the current one; a negative index does nothing."""
    return torch.cuda.device(query.device.index if query.is_cuda else -1)


def _stream(query: Tensor) -> int:
    return torch.cuda.current_stream(query.device).cuda_stream if query.is_cuda else 0
