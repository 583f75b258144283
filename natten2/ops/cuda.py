"""The kernels of CUDA devices, AMD's among them, and of XPU devices, and the rule that chooses one."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from functools import cache
from types import ModuleType

import torch
from torch import Tensor

from natten2 import _extension
from natten2.ops import cuda_kernels, reference, unfused_reference
from natten2.ops.schemas import LIBRARY

__all__ = ["RULE", "UNUSABLE_CPP", "compute_capability", "unusable_triton"]

_MAX_HEAD_DIM = 256
_MIN_TRITON = (3, 6)
_MIN_CAPABILITY = (8, 0)
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
RULE = (
    f"Triton {'.'.join(map(str, _MIN_TRITON))} or later, compute capability {'.'.join(map(str, _MIN_CAPABILITY))} or "
    f"later, {' or '.join(str(dtype).removeprefix('torch.') for dtype in _DTYPES)}, head_dim up to {_MAX_HEAD_DIM}"
)


def unusable_triton(
    dtype: torch.dtype, head_dim: int, value_dim: int, capability: tuple[int, int] | None
) -> str | None:
    """Why the Triton kernels can't run, or `None` where they can.

    Args:
        dtype: The tensors' dtype.
        head_dim: Channels of queries and keys.
        value_dim: Channels of values.
        capability: Compute capability of an NVIDIA GPU, `None` for another maker's.
    """
    if dtype not in _DTYPES:
        return f"query must have dtype {' or '.join(map(str, _DTYPES))} on a CUDA device, got {dtype}"
    if max(head_dim, value_dim) > _MAX_HEAD_DIM:
        return f"head_dim must be at most {_MAX_HEAD_DIM} on a CUDA device, got {max(head_dim, value_dim)}"
    if capability is not None and capability < _MIN_CAPABILITY:
        return "the GPU must have compute capability 8.0 or later, got {}.{}".format(*capability)
    return _unusable_package()


@cache
def _unusable_package() -> str | None:
    wanted = "Triton {}.{} or later is needed".format(*_MIN_TRITON)
    if importlib.util.find_spec("triton") is None:
        return f"{wanted}, and none is installed"
    import triton

    version = tuple(int(part) for part in triton.__version__.split(".")[:2])
    return None if version >= _MIN_TRITON else f"{wanted}, got {triton.__version__}"


def _register(name: str, module: str, plain: ModuleType, channels: tuple[int, int]) -> None:
    """Registers the GPU kernels of an operator: in CUDA C++ where these are wanted and can run, else in Triton.

    Args:
        name: The operator's.
        module: Where the kernel is, in `natten2.ops.triton`.
        plain: The reference.
        channels: The arguments whose last axes are channels, of queries and of values.
    """

    @cache
    def load() -> Callable[..., object]:
        return getattr(importlib.import_module(f"natten2.ops.triton.{module}"), name)

    def unusable(*args: object) -> str | None:
        query, value = (args[index] for index in channels)
        return unusable_triton(query.dtype, query.shape[-1], value.shape[-1], compute_capability(query.device))

    def on_cuda(*args: object) -> object:
        if cuda_kernels.wants_kernels() and name in UNUSABLE_CPP and UNUSABLE_CPP[name](*args) is None:
            _extension.load_cuda_library()
            return getattr(cuda_kernels, name)(*args)
        reason = unusable(*args)
        if reason is not None:
            raise NotImplementedError(f"natten2::{name} has no kernel for this call: {reason}")
        return load()(*args)

    # Triton's releases for these devices are apart from the others, and nobody need have one.
    def on_xpu(*args: object) -> object:
        is_usable = unusable(*args) is None and _has_backend("intel")
        return load()(*args) if is_usable else getattr(plain, name)(*args)

    LIBRARY.impl(name, on_cuda, "CUDA")
    LIBRARY.impl(name, on_xpu, "XPU")


@cache
def compute_capability(device: torch.device) -> tuple[int, int] | None:
    """That of an NVIDIA GPU, `None` of another maker's."""
    return None if device.type != "cuda" or torch.version.hip else torch.cuda.get_device_capability(device)


@cache
def _has_backend(name: str) -> bool:
    from triton.backends import backends

    return name in backends


def _unusable_forward(*args: object) -> str | None:
    """Why the kernels in CUDA C++ can't run `na_forward`, or `None` where they can."""
    query, key, value, rpb, additional_keys, additional_values, kernel_size, *_ = args
    return cuda_kernels.unusable(
        query.dtype,
        query.shape[-1],
        value.shape[-1],
        query.shape[1:-2],
        query.shape[0],
        kernel_size,
        has_bias=rpb is not None,
        capability=compute_capability(query.device),
    ) or cuda_kernels.unusable_tensors(query, key, value, additional_keys, additional_values)


def _unusable_backward(*args: object) -> str | None:
    inputs, parameters = args[2:8], args[10:]
    return _unusable_forward(*inputs, *parameters)


def _unusable_qkv_forward(qkv: Tensor, rpb: Tensor | None, *parameters: object) -> str | None:
    return _unusable_forward(*qkv.unbind(-3), rpb, None, None, *parameters)


def _unusable_qkv_backward(*args: object) -> str | None:
    inputs, parameters = args[2:4], args[6:]
    return _unusable_qkv_forward(*inputs, *parameters)


UNUSABLE_CPP = {
    "na_forward": _unusable_forward,
    "na_backward": _unusable_backward,
    "na_qkv_forward": _unusable_qkv_forward,
    "na_qkv_backward": _unusable_qkv_backward,
}

_register("na_forward", "launch", reference, (0, 2))
_register("na_backward", "launch", reference, (2, 4))
_register("na_qkv_forward", "launch", reference, (0, 0))
_register("na_qkv_backward", "launch", reference, (2, 2))
_register("na_qk", "unfused", unfused_reference, (0, 1))
_register("na_qk_backward", "unfused", unfused_reference, (1, 2))
_register("na_av", "unfused", unfused_reference, (1, 1))
_register("na_av_backward", "unfused", unfused_reference, (2, 2))
