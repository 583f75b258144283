"""What was built, what it runs on, and which kernels the operators use."""

from __future__ import annotations

import os
import platform

import torch

from natten2 import __version__, _extension
from natten2.ops.cuda import unusable_triton
from natten2.ops.cuda_kernels import wants_kernels
from natten2.ops.schemas import LIBRARY, na_backward, na_forward

__all__ = ["DEVICE_TYPES", "cpu_kernels", "report"]

DEVICE_TYPES = ("cpu", "cuda", "mps", "xpu")
_GPU_TYPES = DEVICE_TYPES[1:]


def report() -> str:
    """The facts that a bug report needs, as text."""
    facts = {
        "torch": torch.__version__,
        "Python": platform.python_version(),
        "platform": platform.platform(),
        "library": str(_extension.library_path()),
        "CPU kernels": cpu_kernels(),
        "CUDA C++ kernels": _cuda_kernels(),
        "threads": str(torch.get_num_threads()),
    }
    lines = [f"natten2 {__version__}", *_table({**facts, **(_gpus() or {"GPUs": "none"})})]
    for operator in (na_forward, na_backward):
        kernels = {device_type: _support(operator, device_type) for device_type in DEVICE_TYPES}
        lines += ["", f"Kernels of {operator._opname}", *_table(kernels)]
    lines += ["", "untried: there is no such device; the dtypes are what the operator's checks accept."]
    return "\n".join(lines)


def _table(entries: dict[str, str]) -> list[str]:
    width = max(map(len, entries))
    return [f"  {label.ljust(width)}  {text}" for label, text in entries.items()]


def cpu_kernels() -> str:
    """The instruction sets that can run here, and which one does."""
    reason = ", as NATTEN2_CPU_CAPABILITY asks" if os.environ.get("NATTEN2_CPU_CAPABILITY") else ""
    return f"{', '.join(_extension.cpu_capabilities())} can run here; chosen: {_extension.cpu_capability()}{reason}"


def _cuda_kernels() -> str:
    """Whether there are any, and whether they may run."""
    path = _extension.cuda_library_path()
    if path is None:
        return "absent: natten2 was built without nvcc"
    state = (
        "on" if wants_kernels() else "off until they are seen to be right on a GPU: NATTEN2_CUDA_KERNELS=1 tries them"
    )
    return f"{path} ({state})"


def _gpus() -> dict[str, str]:
    return {
        f"{device_type}:{index}": _gpu(device_type, index)
        for device_type in _GPU_TYPES
        for index in range(torch.get_device_module(device_type).device_count())
    }


def _gpu(device_type: str, index: int) -> str:
    if device_type == "mps":
        return "Apple GPU"
    name = torch.get_device_module(device_type).get_device_name(index)
    if device_type == "cuda":
        major, minor = torch.cuda.get_device_capability(index)
        name += f", compute capability {major}.{minor}"
    return name


def _support(operator: torch._ops.OpOverload, device_type: str) -> str:
    """The kernel that the dispatcher has for a device type, and the dtypes it takes."""
    key = device_type.upper()
    if not torch._C._dispatch_has_kernel_for_dispatch_key(operator.name(), key):
        return "no kernel: the operator raises NotImplementedError"
    if device_type == "cuda":
        kernel = "Triton kernels"
    elif f"{operator.namespace}/{operator._opname}/{key}" in LIBRARY._op_impls:
        kernel = "plain PyTorch reference"
    else:
        kernel = f"C++ kernels ({_extension.cpu_capability()})" if device_type == "cpu" else "compiled kernels"
    is_here = torch.get_device_module(device_type).device_count() > 0
    # For CUDA there is a rule to ask.
    dtypes = _dtypes(operator, device_type if is_here and device_type != "cuda" else "meta")
    if device_type == "cuda":
        reasons = {dtype: unusable_triton(getattr(torch, dtype), 1, 1, None) for dtype in dtypes}
        dtypes = [dtype for dtype, reason in reasons.items() if reason is None]
        if not dtypes:
            return f"{kernel} that can't run: {reasons['float32']}"
    return f"{kernel}: {', '.join(dtypes)}{'' if is_here else ' (untried)'}"


def _dtypes(operator: torch._ops.OpOverload, device: str) -> list[str]:
    """The dtypes in which the operator runs on a single token."""
    known = {dtype for dtype in vars(torch).values() if isinstance(dtype, torch.dtype) and dtype.is_floating_point}
    by_size = sorted(known, key=lambda dtype: (-dtype.itemsize, str(dtype)))
    return [str(dtype).removeprefix("torch.") for dtype in by_size if _runs(operator, device, dtype)]


def _runs(operator: torch._ops.OpOverload, device: str, dtype: torch.dtype) -> bool:
    parameters = ([1], [1], [1], [False], 1.0)
    try:
        token = torch.zeros(1, 1, 1, 1, dtype=dtype, device=device)
        inputs = (token, token, token, None, None, None)
        if operator is na_forward:
            na_forward(*inputs, *parameters)
        else:
            output, logsumexp = torch.zeros_like(token), token[..., 0].to(torch.promote_types(dtype, torch.float32))
            na_backward(output, None, *inputs, output, logsumexp, *parameters)
    except (TypeError, RuntimeError):
        return False
    return True
