"""Autocast: the operator runs in the dtype that is active when it is called."""

from __future__ import annotations

import torch
from torch import Tensor
from torch._C import DispatchKey, DispatchKeySet

from natten2.ops.schemas import LIBRARY, na_forward

__all__ = ["cast_inputs"]

_KEYS = {"cpu": "AutocastCPU", "cuda": "AutocastCUDA", "xpu": "AutocastXPU", "mps": "AutocastMPS"}


def _cast(tensor: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    # As torch's own rules do, leave float64 alone.
    eligible = tensor is not None and tensor.is_floating_point() and tensor.dtype is not torch.float64
    return tensor.to(dtype) if eligible else tensor


def cast_inputs(
    device_type: str,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    rpb: Tensor | None,
    additional_keys: Tensor | None,
    additional_values: Tensor | None,
) -> tuple[Tensor | None, ...]:
    """The inputs of `natten2::na_forward` in the dtype that autocast has chosen for the device."""
    dtype = torch.get_autocast_dtype(device_type)
    # A float32 bias is added in float32 by every kernel: rounding it would only lose precision.
    if rpb is not None and rpb.dtype is not torch.float32:
        rpb = _cast(rpb, dtype)
    query, key, value = _cast(query, dtype), _cast(key, dtype), _cast(value, dtype)
    return query, key, value, rpb, _cast(additional_keys, dtype), _cast(additional_values, dtype)


def _register(device_type: str, key: str) -> None:
    below = DispatchKeySet(getattr(DispatchKey, key))

    def autocast(*args: object) -> tuple[Tensor, Tensor]:
        inputs = cast_inputs(device_type, *args[:6])
        with torch._C._ExcludeDispatchKeyGuard(below):
            return na_forward(*inputs, *args[6:])

    LIBRARY.impl("na_forward", autocast, key)


for _device_type, _key in _KEYS.items():
    _register(_device_type, _key)
