"""Autocast: an operator runs in the dtype that is active when it is called."""

from __future__ import annotations

import torch
from torch import Tensor
from torch._C import DispatchKey, DispatchKeySet

from natten2.ops.schemas import LIBRARY, na_av, na_forward, na_qk, na_qkv_forward

__all__ = ["cast_inputs"]

_KEYS = {"cpu": "AutocastCPU", "cuda": "AutocastCUDA", "xpu": "AutocastXPU", "mps": "AutocastMPS"}


def _cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    # As torch's own rules do, leave float64 alone.
    eligible = tensor.is_floating_point() and tensor.dtype is not torch.float64
    return tensor.to(dtype) if eligible else tensor


def cast_inputs(op: torch._ops.OpOverload, device_type: str, *args: object) -> tuple[object, ...]:
    """The first arguments of `op`, in the dtype that autocast has chosen for the device."""
    dtype = torch.get_autocast_dtype(device_type)

    def prepare(name: str, arg: object) -> object:
        # A float32 bias is added in float32 by every kernel: rounding it would only lose precision.
        is_wide_bias = name == "rpb" and arg is not None and arg.dtype is torch.float32
        return arg if is_wide_bias or not isinstance(arg, Tensor) else _cast(arg, dtype)

    return tuple(prepare(parameter.name, arg) for parameter, arg in zip(op._schema.arguments, args, strict=False))


def _register(op: torch._ops.OpOverload, device_type: str, key: str) -> None:
    below = DispatchKeySet(getattr(DispatchKey, key))

    def autocast(*args: object) -> object:
        with torch._C._ExcludeDispatchKeyGuard(below):
            return op(*cast_inputs(op, device_type, *args))

    LIBRARY.impl(op._schema.name, autocast, key)


for _op in (na_forward, na_qkv_forward, na_qk, na_av):
    for _device_type, _key in _KEYS.items():
        _register(_op, _device_type, _key)
