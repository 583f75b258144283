"""Autocast: the operator runs in the dtype that is active when it is called."""

from __future__ import annotations

import torch
from torch import Tensor
from torch._C import DispatchKey, DispatchKeySet

from natten2.ops.schemas import LIBRARY, na_av, na_forward, na_qk

_KEYS = {"cpu": "AutocastCPU", "cuda": "AutocastCUDA", "xpu": "AutocastXPU", "mps": "AutocastMPS"}


def _cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    # As torch's own rules do, leave float64 alone.
    eligible = tensor.is_floating_point() and tensor.dtype is not torch.float64
    return tensor.to(dtype) if eligible else tensor


def _register(op: torch._ops.OpOverload, device_type: str, key: str) -> None:
    below = DispatchKeySet(getattr(DispatchKey, key))
    names = [argument.name for argument in op._schema.arguments]

    def autocast(*args: object) -> object:
        dtype = torch.get_autocast_dtype(device_type)

        def prepare(name: str, arg: object) -> object:
            # A float32 bias is added in float32 by every kernel: rounding it would only lose precision.
            is_wide_bias = name == "rpb" and arg is not None and arg.dtype is torch.float32
            return arg if is_wide_bias or not isinstance(arg, Tensor) else _cast(arg, dtype)

        with torch._C._ExcludeDispatchKeyGuard(below):
            return op(*map(prepare, names, args))

    LIBRARY.impl(op._schema.name, autocast, key)


for _op in (na_forward, na_qk, na_av):
    for _device_type, _key in _KEYS.items():
        _register(_op, _device_type, _key)
