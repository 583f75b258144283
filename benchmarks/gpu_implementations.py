"""The implementations that are measured on a GPU. A new one is one line in `GPU_IMPLEMENTATIONS`."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from benchmarks.baselines import swin_sdpa_attention
from benchmarks.cases import Case, Inputs
from benchmarks.flex import prepare_flex, tile_for
from benchmarks.implementations import IMPLEMENTATIONS, OURS, Attend
from natten2 import _extension
from natten2.ops import cuda_kernels

__all__ = ["GPU_IMPLEMENTATIONS", "OURS", "GpuImplementation"]


@dataclass(frozen=True)
class GpuImplementation:
    """One way to compute attention on a GPU.

    Attributes:
        prepare: Does what a model does once, outside of the timing, and returns what computes the output.
        meaning: The case whose neighborhood attention it computes; `None` where it does not apply.
    """

    prepare: Callable[[Case, Inputs], Attend]
    meaning: Callable[[Case], Case | None]


class _CudaKernels(torch.autograd.Function):
    """The kernels in CUDA C++, whether or not they are what natten2 runs."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, parameters: tuple, *tensors: Tensor | None) -> Tensor:
        output, logsumexp = cuda_kernels.na_forward(*tensors, *parameters)
        ctx.save_for_backward(*tensors, output, logsumexp)
        ctx.parameters = parameters
        return output

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        grads = cuda_kernels.na_backward(grad_output, None, *ctx.saved_tensors, *ctx.parameters)
        return None, *(
            grad if tensor is not None else None for grad, tensor in zip(grads, ctx.saved_tensors, strict=False)
        )


def _cuda(case: Case, inputs: Inputs) -> Attend:
    _extension.load_cuda_library()
    return lambda case, inputs: _CudaKernels.apply(case.parameters, *inputs.tensors)


def _for_cuda(case: Case) -> Case | None:
    reason = cuda_kernels.unusable(
        torch.bfloat16,
        case.head_dim,
        case.head_dim,
        case.spatial,
        case.batch,
        case.parameters.kernel_size,
        has_bias=case.bias,
        capability=torch.cuda.get_device_capability() if torch.cuda.is_available() else None,
    )
    return case if reason is None else None


def _swin(case: Case, inputs: Inputs) -> Tensor:
    window, scale = case.parameters.kernel_size[0], case.parameters.scale
    return swin_sdpa_attention(inputs.query, inputs.key, inputs.value, inputs.rpb, window, scale)


def _flex_tiled(case: Case, inputs: Inputs) -> Attend:
    return prepare_flex(case, inputs, tile_for(case.spatial))


def _for_flex(case: Case) -> Case | None:
    return case if case.additional == 0 else None


def _for_tiled_flex(case: Case) -> Case | None:
    return None if tile_for(case.spatial) is None else _for_flex(case)


def _natten(backend: str, case: Case, inputs: Inputs) -> Attend:
    import natten

    function = getattr(natten, f"na{len(case.spatial)}d")
    kernel_size, stride, dilation, is_causal, scale = case.parameters

    def attend(_: Case, inputs: Inputs) -> Tensor:
        return function(
            inputs.query,
            inputs.key,
            inputs.value,
            kernel_size=kernel_size,
            stride=stride,
            dilation=dilation,
            is_causal=is_causal,
            scale=scale,
            backend=backend,
        )

    return attend


def _for_natten(case: Case) -> Case | None:
    """NATTEN has no bias any more: it is measured without one, which costs it less."""
    if importlib.util.find_spec("natten") is None or case.additional:
        return None
    return replace(case, bias=False)


# In the order of what they tell: whatever the time runs out for is last.
GPU_IMPLEMENTATIONS = {
    OURS: GpuImplementation(lambda case, inputs: IMPLEMENTATIONS[OURS].attend, lambda case: case),
    "natten2-cuda": GpuImplementation(_cuda, _for_cuda),
    "swin": GpuImplementation(lambda case, inputs: _swin, IMPLEMENTATIONS["swin"].meaning),
    "natten-hopper": GpuImplementation(partial(_natten, "hopper-fna"), _for_natten),
    "natten-cutlass": GpuImplementation(partial(_natten, "cutlass-fna"), _for_natten),
    "flex-tiled": GpuImplementation(_flex_tiled, _for_tiled_flex),
    "flex": GpuImplementation(prepare_flex, _for_flex),
}
