"""`natten.utils`: the checks and helpers that other libraries import."""

from __future__ import annotations

import logging
import math

from torch import Tensor

from natten2.compat._window import flags, integers

__all__ = [
    "check_additional_keys",
    "check_additional_values",
    "check_all_args",
    "check_causal_arg",
    "check_dilation_arg",
    "check_input_size_arg",
    "check_kernel_size_arg",
    "check_stride_arg",
    "get_logger",
    "get_num_na_weights",
    "make_attn_tensor_from_input",
]


def check_kernel_size_arg(na_dim: int, kernel_size: object) -> tuple[int, ...]:
    return integers("kernel_size", kernel_size, na_dim)


def check_stride_arg(na_dim: int, stride: object) -> tuple[int, ...]:
    return integers("stride", stride, na_dim)


def check_dilation_arg(na_dim: int, dilation: object) -> tuple[int, ...]:
    return integers("dilation", dilation, na_dim)


def check_input_size_arg(na_dim: int, input_size: object) -> tuple[int, ...]:
    if input_size is None:
        raise ValueError("input_size must be an integer or a sequence of integers, got None")
    return integers("input_size", input_size, na_dim)


def check_causal_arg(na_dim: int, is_causal: object) -> tuple[bool, ...]:
    return flags("is_causal", is_causal, na_dim)


def check_all_args(na_dim: int, kernel_size: object, *rest: object, **named: object) -> tuple:
    """One value per axis; `(dilation, is_causal)` follow in 0.17, `(stride, dilation, is_causal)` in 0.20 and later."""
    names = ("stride", "dilation", "is_causal") if len(rest) + len(named) == 3 else ("dilation", "is_causal")
    given = dict(zip(names, rest, strict=False)) | named
    if set(given) != set(names):
        raise TypeError(f"check_all_args takes na_dim, kernel_size, {', '.join(names)}, got {sorted(given)}")
    checks = {"stride": check_stride_arg, "dilation": check_dilation_arg, "is_causal": check_causal_arg}
    return (check_kernel_size_arg(na_dim, kernel_size), *(checks[name](na_dim, given[name]) for name in names))


def get_num_na_weights(kernel_size: tuple[int, ...]) -> int:
    if not isinstance(kernel_size, tuple):
        raise ValueError(f"kernel_size must be a tuple, got {kernel_size!r}")
    return math.prod(kernel_size)


def make_attn_tensor_from_input(input_tensor: Tensor, attention_dim: int) -> Tensor:
    return input_tensor.new_empty((*input_tensor.shape[:-1], attention_dim))


def check_additional_keys(query: Tensor, additional_keys: Tensor | None) -> int:
    """How many additional keys `[B, H, N, D]` there are for a query `[B, H, *axes, D]`."""
    return _count_additional("additional_keys", query, additional_keys, query.shape[-1])


def check_additional_values(
    attn: Tensor, additional_values: Tensor | None, value: Tensor, expected_kernel_size: int
) -> int:
    """How many additional values `[B, H, N, D]` there are for weights `[B, H, *axes, slots]`."""
    count = _count_additional("additional_values", attn, additional_values, value.shape[-1])
    if attn.shape[-1] != expected_kernel_size + count:
        raise ValueError(f"attn must have {expected_kernel_size + count} slots, got {attn.shape[-1]}")
    return count


def _count_additional(name: str, like: Tensor, tensor: Tensor | None, channels: int) -> int:
    if tensor is None:
        return 0
    if tensor.dim() != 4 or tensor.shape[:2] != like.shape[:2] or tensor.shape[-1] != channels:
        expected = (*like.shape[:2], "N", channels)
        raise ValueError(f"{name} must have shape {expected}, got {tuple(tensor.shape)}")
    return tensor.shape[2]


def get_logger(name: str) -> logging.Logger:
    return logging.getLogger(name)
