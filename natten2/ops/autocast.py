"""Autocast: the operator runs in the dtype that is active when it is called."""

from __future__ import annotations

import torch
from torch import Tensor
from torch._C import DispatchKey, DispatchKeySet

from natten2.ops.schemas import LIBRARY, na_forward, na_qkv_forward

_KEYS = {"cpu": "AutocastCPU", "cuda": "AutocastCUDA", "xpu": "AutocastXPU", "mps": "AutocastMPS"}


def _cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    # As torch's own rules do, leave float64 alone.
    eligible = tensor.is_floating_point() and tensor.dtype is not torch.float64
    return tensor.to(dtype) if eligible else tensor


def _register(op: torch._ops.OpOverload, device_type: str, key: str) -> None:
    below = DispatchKeySet(getattr(DispatchKey, key))
    bias = [argument.name for argument in op._schema.arguments].index("rpb")

    def autocast(*args: object) -> tuple[Tensor, Tensor]:
        dtype = torch.get_autocast_dtype(device_type)
        cast = [_cast(arg, dtype) if isinstance(arg, Tensor) else arg for arg in args]
        # A float32 bias is added in float32 by every kernel: rounding it would only lose precision.
        if args[bias] is not None and args[bias].dtype is torch.float32:
            cast[bias] = args[bias]
        with torch._C._ExcludeDispatchKeyGuard(below):
            return op(*cast)

    LIBRARY.impl(op._schema.name, autocast, key)


for _op in (na_forward, na_qkv_forward):
    for _device_type, _key in _KEYS.items():
        _register(_op, _device_type, _key)
