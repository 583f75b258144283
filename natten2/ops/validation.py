"""The checks of every argument, for real, meta and fake tensors alike.

They are registered for the `BackendSelect` dispatch key, which every call reaches just before its backend's kernel,
also in inference mode and when an operator is called directly: no kernel ever sees arguments that were not checked.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from math import prod

import torch
from torch import Tensor
from torch._C import DispatchKey, DispatchKeySet

from natten2.ops.schemas import (
    LIBRARY,
    MAX_RANK,
    na_av,
    na_av_backward,
    na_backward,
    na_forward,
    na_qk,
    na_qk_backward,
    na_qkv_backward,
    na_qkv_forward,
)

__all__ = [
    "CHECKS",
    "DTYPES",
    "accumulate_dtype",
    "call_backend",
    "check_av",
    "check_av_backward",
    "check_backward",
    "check_fit",
    "check_forward",
    "check_qk",
    "check_qk_backward",
    "check_qkv_backward",
    "check_qkv_forward",
    "check_window",
    "count_slots",
]

_ACCUMULATE_DTYPES = {
    torch.float32: torch.float32,
    torch.float64: torch.float64,
    torch.bfloat16: torch.float32,
    torch.float16: torch.float32,
}
DTYPES = tuple(_ACCUMULATE_DTYPES)
# Expanded tensors can be larger than memory: sizes that kernels compute must not overflow.
_MAX_ADDITIONAL = 2**32
_AXES = {1: "length", 2: "height, width", 3: "depth, height, width"}


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of sums and of the log-sum-exp: float64 for float64, float32 for every other dtype."""
    return _ACCUMULATE_DTYPES[dtype]


def check_forward(
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
) -> None:
    """Checks the arguments of `natten2::na_forward`.

    Raises:
        ValueError: A shape, stride, device, or parameter is not allowed.
        TypeError: A dtype is not allowed.
        NotImplementedError: A tensor is sparse, quantized, or nested.
    """
    rank = _check_rank(kernel_size, stride, dilation, is_causal)
    _check_kind("query", query, query, _ACCUMULATE_DTYPES)
    for name, tensor in (("key", key), ("value", value)):
        _check_kind(name, tensor, query, (query.dtype,))
    _check_shapes(query, key, value, rank)
    check_window(kernel_size, stride, dilation)
    check_fit(query.shape[1:-2], kernel_size, dilation)
    if rpb is not None:
        _check_rpb(rpb, query, kernel_size)
    if additional_keys is not None or additional_values is not None:
        _check_additional(additional_keys, additional_values, query, key, value)
    largest = torch.finfo(accumulate_dtype(query.dtype)).max
    if not -largest <= scale <= largest:
        raise ValueError(f"scale must be finite in {accumulate_dtype(query.dtype)}, got {scale}")


def check_backward(
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
) -> None:
    """Checks the arguments of `natten2::na_backward`; raises what :func:`check_forward` raises."""
    check_forward(
        query, key, value, rpb, additional_keys, additional_values, kernel_size, stride, dilation, is_causal, scale
    )
    output_shape = (*query.shape[:-1], value.shape[-1])
    accumulate = accumulate_dtype(query.dtype)
    _check_like("output", output, query, output_shape, query.dtype)
    _check_unit_stride("output", output, output_shape[-1])
    _check_like("grad_output", grad_output, query, output_shape, query.dtype)
    _check_like("logsumexp", logsumexp, query, query.shape[:-1], accumulate)
    if grad_logsumexp is not None:
        _check_like("grad_logsumexp", grad_logsumexp, query, query.shape[:-1], accumulate)


def check_qkv_forward(qkv: Tensor, rpb: Tensor | None, kernel_size: Sequence[int], *parameters: object) -> None:
    """Checks the arguments of `natten2::na_qkv_forward`; raises what :func:`check_forward` raises."""
    query = _check_packed(qkv, len(kernel_size))
    check_forward(query, query, query, rpb, None, None, kernel_size, *parameters)


def check_qkv_backward(
    grad_output: Tensor,
    grad_logsumexp: Tensor | None,
    qkv: Tensor,
    rpb: Tensor | None,
    output: Tensor,
    logsumexp: Tensor,
    kernel_size: Sequence[int],
    *parameters: object,
) -> None:
    """Checks the arguments of `natten2::na_qkv_backward`; raises what :func:`check_forward` raises."""
    query = _check_packed(qkv, len(kernel_size))
    inputs = (query, query, query, rpb, None, None, output, logsumexp)
    check_backward(grad_output, grad_logsumexp, *inputs, kernel_size, *parameters)


def _check_packed(qkv: Tensor, rank: int) -> Tensor:
    """The view of the query, like which key and value are; with a wrong rank, the tensor itself."""
    _check_kind("qkv", qkv, qkv, _ACCUMULATE_DTYPES)
    if not 1 <= rank <= MAX_RANK:
        return qkv
    shape = qkv.shape
    if len(shape) != rank + 4 or shape[-3] != 3 or min(shape[-2:]) < 1:
        raise ValueError(
            f"qkv must have shape [batch, {_AXES[rank]}, 3, heads, head_dim] for a kernel_size of {rank} entries, with "
            f"at least one head and one channel, got {tuple(shape)}"
        )
    _check_unit_stride("qkv", qkv, shape[-1])
    return qkv.select(-3, 0)


def _check_rank(
    kernel_size: Sequence[int], stride: Sequence[int], dilation: Sequence[int], is_causal: Sequence[bool]
) -> int:
    rank = len(kernel_size)
    if not 1 <= rank <= MAX_RANK:
        raise ValueError(f"kernel_size must have 1 to {MAX_RANK} entries, one per axis, got {list(kernel_size)}")
    for name, values in (("stride", stride), ("dilation", dilation), ("is_causal", is_causal)):
        if len(values) != rank:
            raise ValueError(f"{name} must have {rank} entries, as kernel_size has, got {list(values)}")
    return rank


def _check_kind(name: str, tensor: Tensor, query: Tensor, dtypes: Sequence[torch.dtype]) -> None:
    # The dispatcher lets None pass for a tensor.
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(tensor).__name__}")
    if tensor.layout is not torch.strided or tensor.is_quantized or tensor.is_nested:
        kind = "nested" if tensor.is_nested else "quantized" if tensor.is_quantized else tensor.layout
        raise NotImplementedError(f"{name} must be a dense, strided tensor, got a {kind} one")
    if tensor.dtype not in dtypes:
        allowed = " or ".join(str(dtype) for dtype in dtypes)
        raise TypeError(f"{name} must have dtype {allowed}, got {tensor.dtype}")
    if tensor.device != query.device:
        raise ValueError(f"{name} must be on query's device {query.device}, got {tensor.device}")


def _check_unit_stride(name: str, tensor: Tensor, channels: int) -> None:
    if channels != 1 and tensor.stride(-1) != 1:
        raise ValueError(
            f"{name}'s last axis must be contiguous, got strides {tuple(tensor.stride())}: call .contiguous() on it"
        )


def _check_like(name: str, tensor: Tensor, query: Tensor, shape: Sequence[int], dtype: torch.dtype) -> None:
    _check_kind(name, tensor, query, (dtype,))
    if tuple(tensor.shape) != tuple(shape):
        raise ValueError(f"{name} must have shape {tuple(shape)}, got {tuple(tensor.shape)}")


def _check_shapes(query: Tensor, key: Tensor, value: Tensor, rank: int) -> None:
    # Every call comes through here, and a look at a tensor's shape costs more than one at a tuple.
    query_shape, key_shape, value_shape = query.shape, key.shape, value.shape
    tokens = query_shape[:-2]
    for name, tensor, shape in (("query", query, query_shape), ("key", key, key_shape), ("value", value, value_shape)):
        if len(shape) != rank + 3:
            raise ValueError(
                f"{name} must have {rank + 3} axes (batch, {_AXES[rank]}, heads, head_dim) for a kernel_size of {rank} "
                f"entries, got shape {tuple(shape)}"
            )
        heads, channels = shape[-2:]
        if channels < 1 or heads < 1:
            raise ValueError(f"{name} must have at least one head and one channel, got shape {tuple(shape)}")
        _check_unit_stride(name, tensor, channels)
        if shape[:-2] != tokens:
            raise ValueError(f"{name} must have query's batch and axes {tuple(tokens)}, got shape {tuple(shape)}")
    if key_shape[-1] != query_shape[-1]:
        raise ValueError(f"key must have query's head_dim {query_shape[-1]}, got {key_shape[-1]}")
    if value_shape[-2] != key_shape[-2]:
        raise ValueError(f"value must have as many heads as key, {key_shape[-2]}, got {value_shape[-2]}")
    if query_shape[-2] % key_shape[-2] != 0:
        raise ValueError(f"query's heads must be a multiple of key's {key_shape[-2]} heads, got {query_shape[-2]}")


def check_window(kernel_size: Sequence[int], stride: Sequence[int], dilation: Sequence[int]) -> None:
    """Checks what can be known of a window before the axes' lengths are.

    Raises:
        ValueError: A value is not allowed.
    """
    for axis, (window, step, gap) in enumerate(zip(kernel_size, stride, dilation, strict=True)):
        if window < 1:
            raise ValueError(f"kernel_size must be at least 1, got {window} on axis {axis}")
        if not 1 <= step <= window:
            raise ValueError(f"stride must be between 1 and kernel_size {window}, got {step} on axis {axis}")
        if gap < 1:
            raise ValueError(f"dilation must be at least 1, got {gap} on axis {axis}")


def check_fit(spatial: Sequence[int], kernel_size: Sequence[int], dilation: Sequence[int]) -> None:
    """Checks that windows fit in the axes.

    Raises:
        ValueError: They don't.
    """
    for axis, (length, window, gap) in enumerate(zip(spatial, kernel_size, dilation, strict=True)):
        # Unlike an `if`, this becomes a run-time check when the length is not known while tracing.
        torch._check_value(window * gap <= length, lambda: _too_large(window, gap, length, axis))  # noqa: B023


def _too_large(window: int, gap: int, length: int, axis: int) -> str:
    return (
        f"kernel_size * dilation must not exceed the axis, got {window} * {gap} = {window * gap} on axis {axis} "
        f"of length {length}"
    )


def _check_rpb(rpb: Tensor, query: Tensor, kernel_size: Sequence[int]) -> None:
    _check_kind("rpb", rpb, query, tuple(dict.fromkeys((query.dtype, accumulate_dtype(query.dtype)))))
    shape = (query.shape[-2], *(2 * window - 1 for window in kernel_size))
    if tuple(rpb.shape) != shape:
        raise ValueError(
            f"rpb must have shape (heads, 2 * kernel_size - 1 for each axis) = {shape}, got {tuple(rpb.shape)}"
        )


def _check_additional(
    additional_keys: Tensor | None, additional_values: Tensor | None, query: Tensor, key: Tensor, value: Tensor
) -> None:
    if additional_keys is None or additional_values is None:
        given, missing = ("keys", "values") if additional_values is None else ("values", "keys")
        raise ValueError(f"additional_{missing} must be given with additional_{given}, got None")
    _check_additional_tokens("additional_keys", additional_keys, query, key)
    _check_additional_tokens("additional_values", additional_values, query, value)
    if additional_values.shape[1] != additional_keys.shape[1]:
        raise ValueError(
            f"additional_values must have as many tokens as additional_keys, {additional_keys.shape[1]}, "
            f"got {additional_values.shape[1]}"
        )


def _check_additional_tokens(name: str, tensor: Tensor, query: Tensor, like: Tensor) -> None:
    _check_kind(name, tensor, query, (query.dtype,))
    batch, (heads, channels) = query.shape[0], like.shape[-2:]
    if tensor.dim() != 4 or (tensor.shape[0], *tensor.shape[2:]) != (batch, heads, channels):
        raise ValueError(f"{name} must have shape ({batch}, N, {heads}, {channels}), got {tuple(tensor.shape)}")
    _check_unit_stride(name, tensor, channels)
    if tensor.shape[1] > _MAX_ADDITIONAL:
        raise ValueError(f"{name} must have at most {_MAX_ADDITIONAL} tokens, got {tensor.shape[1]}")


def check_qk(
    query: Tensor,
    key: Tensor,
    rpb: Tensor | None,
    additional_keys: Tensor | None,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    dilation: Sequence[int],
    is_causal: Sequence[bool],
    scale: float,
    hidden: float = 0.0,
) -> None:
    """Checks the arguments of `natten2::na_qk`; raises what :func:`check_forward` raises."""
    window = (kernel_size, stride, dilation, is_causal)
    check_forward(query, key, key, rpb, additional_keys, additional_keys, *window, scale)


def check_qk_backward(
    grad_scores: Tensor, query: Tensor, key: Tensor, rpb: Tensor | None, additional_keys: Tensor | None, *args: object
) -> None:
    """Checks the arguments of `natten2::na_qk_backward`; raises what :func:`check_forward` raises."""
    check_qk(query, key, rpb, additional_keys, *args)
    shape = (*query.shape[:-1], count_slots(args[0], additional_keys))
    _check_like("grad_scores", grad_scores, query, shape, query.dtype)


def check_av(
    weights: Tensor,
    value: Tensor,
    additional_values: Tensor | None,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    dilation: Sequence[int],
    is_causal: Sequence[bool],
) -> None:
    """Checks the arguments of `natten2::na_av`; raises what :func:`check_forward` raises."""
    rank = _check_rank(kernel_size, stride, dilation, is_causal)
    check_window(kernel_size, stride, dilation)
    _check_kind("weights", weights, weights, _ACCUMULATE_DTYPES)
    _check_kind("value", value, weights, (weights.dtype,))
    for name, tensor, last in (("weights", weights, "slots"), ("value", value, "head_dim")):
        shape = tensor.shape
        if len(shape) != rank + 3 or min(shape[-2:]) < 1:
            raise ValueError(
                f"{name} must have {rank + 3} axes (batch, {_AXES[rank]}, heads, {last}) for a kernel_size of {rank} "
                f"entries, with at least one head and one channel, got shape {tuple(shape)}"
            )
        if shape[:-2] != weights.shape[:-2]:
            raise ValueError(
                f"{name} must have weights' batch and axes {tuple(weights.shape[:-2])}, got shape {tuple(shape)}"
            )
        _check_unit_stride(name, tensor, shape[-1])
    if weights.shape[-2] % value.shape[-2] != 0:
        raise ValueError(f"weights' heads must be a multiple of value's {value.shape[-2]}, got {weights.shape[-2]}")
    check_fit(weights.shape[1:-2], kernel_size, dilation)
    if additional_values is not None:
        _check_additional_tokens("additional_values", additional_values, weights, value)
    slots = count_slots(kernel_size, additional_values)
    if weights.shape[-1] != slots:
        raise ValueError(
            f"weights must have {slots} slots, those of the window and of additional_values, got {weights.shape[-1]}"
        )


def check_av_backward(grad_output: Tensor, weights: Tensor, value: Tensor, *args: object) -> None:
    """Checks the arguments of `natten2::na_av_backward`; raises what :func:`check_forward` raises."""
    check_av(weights, value, *args)
    _check_like("grad_output", grad_output, weights, (*weights.shape[:-1], value.shape[-1]), weights.dtype)


def count_slots(kernel_size: Sequence[int], additional: Tensor | None) -> int:
    """Slots of a query: those of its window, then the additional keys."""
    return prod(kernel_size) + (0 if additional is None else additional.shape[1])


CHECKS = {
    na_forward: check_forward,
    na_backward: check_backward,
    na_qkv_forward: check_qkv_forward,
    na_qkv_backward: check_qkv_backward,
    na_qk: check_qk,
    na_qk_backward: check_qk_backward,
    na_av: check_av,
    na_av_backward: check_av_backward,
}


def call_backend(op: torch._ops.OpOverload, keyset: DispatchKeySet, *args: object) -> tuple[Tensor, ...]:
    """Calls a backend's kernel with arguments that are as they should be.

    The CPU's kernel makes the same checks faster, but in fewer words; those here find the words for what it refuses.

    Args:
        op: The operator.
        keyset: The dispatch keys that are left, of which `BackendSelect` is passed over.
        args: The operator's arguments.
    """
    keyset = keyset.remove(DispatchKey.BackendSelect)
    if keyset.has(DispatchKey.Python):
        # A subclass of tensors comes before its backend: its rule calls again with the tensors that it holds.
        return op.redispatch(keyset, *args)
    check = CHECKS[op]
    if not keyset.has(DispatchKey.CPU):
        check(*args)
        return op.redispatch(keyset, *args)
    try:
        return op.redispatch(keyset, *args)
    except Exception:
        check(*args)
        raise


for _op in CHECKS:
    LIBRARY.impl(_op._schema.name, partial(call_backend, _op), "BackendSelect", with_keyset=True)
