"""Which kernels run for a shape, what they launch, and what the call needs at least."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import zip_longest

import torch

from natten2._picture import describe, times
from natten2._report import cpu_kernels
from natten2.ops import cuda_kernels
from natten2.ops.costs import Call
from natten2.ops.cuda import RULE, unusable_triton
from natten2.ops.triton.tiles import choose_tiling, count_step_parts, count_tiles
from natten2.ops.triton.waste import computed_pairs

__all__ = ["explain"]

_HEADER = ("kernel", "a program owns", "and visits", "at once", "programs", "pairs computed / needed")
_PREFIXES = ("", "k", "M", "G", "T", "P")


def explain(
    call: Call, dtype: torch.dtype, device_type: str, capability: tuple[int, int] | None, *, has_bias: bool = False
) -> str:
    """The rule of the device and what follows from it for a valid call, as text.

    Args:
        call: The sizes.
        dtype: The tensors' dtype.
        device_type: "cpu", "cuda", "mps", or "xpu".
        capability: Compute capability of an NVIDIA GPU, `None` where it isn't known.
        has_bias: Whether there is a relative positional bias.
    """
    shape = (call.batch, *call.spatial, call.heads, call.head_dim)
    lines = [
        describe(shape, call.kernel_size, call.stride, call.dilation, call.is_causal),
        f"{_device(device_type, capability)}: {', '.join(_rest(call, dtype, has_bias))}",
        *_rule(call, dtype, device_type, capability, has_bias),
    ]
    runs_triton = (
        device_type == "cuda"
        and _reason(call, dtype, capability) is None
        and _cpp_reason(call, dtype, capability, has_bias) is not None
    )
    for is_backward in (False, True):
        lines += ["", _costs(call, is_backward)]
        if runs_triton:
            lines += _table([_HEADER, *_kernels(call, has_bias, is_backward)])
    return "\n".join(lines)


def _rest(call: Call, dtype: torch.dtype, has_bias: bool) -> Iterator[str]:
    yield str(dtype).removeprefix("torch.")
    if call.key_heads != call.heads:
        yield f"{call.key_heads} key heads"
    if call.value_dim != call.head_dim:
        yield f"value_dim {call.value_dim}"
    if has_bias:
        yield "bias"
    if call.additional:
        yield f"{call.additional} additional keys"


def _device(device_type: str, capability: tuple[int, int] | None) -> str:
    if device_type != "cuda":
        return device_type
    return f"cuda, compute capability {'unknown' if capability is None else '{}.{}'.format(*capability)}"


def _rule(
    call: Call, dtype: torch.dtype, device_type: str, capability: tuple[int, int] | None, has_bias: bool
) -> list[str]:
    if device_type == "cpu":
        return [f"runs C++ kernels: {cpu_kernels()}"]
    if device_type == "mps" or (device_type == "xpu" and _reason(call, dtype, None) is not None):
        return ["runs the plain PyTorch reference"]
    if device_type == "xpu":
        return ["runs Triton kernels where Triton has Intel's backend, and else the plain PyTorch reference"]
    cpp_reason, reason = _cpp_reason(call, dtype, capability, has_bias), _reason(call, dtype, capability)
    cpp_rule = f"the rule of CUDA C++ kernels: {cuda_kernels.RULE}"
    if cpp_reason is None:
        return ["runs CUDA C++ kernels, or Triton's where a row's bytes don't allow it", cpp_rule]
    state = "runs Triton kernels" if reason is None else f"runs nothing: {reason}"
    return [state, f"the rule: {RULE}", f"not CUDA C++ kernels: {cpp_reason}", cpp_rule]


def _cpp_reason(call: Call, dtype: torch.dtype, capability: tuple[int, int] | None, has_bias: bool) -> str | None:
    if not cuda_kernels.wants_kernels():
        return "NATTEN2_CUDA_KERNELS is not 1"
    return cuda_kernels.unusable(
        dtype,
        call.head_dim,
        call.value_dim,
        call.spatial,
        call.batch,
        call.kernel_size,
        has_bias=has_bias,
        capability=capability,
    )


def _reason(call: Call, dtype: torch.dtype, capability: tuple[int, int] | None) -> str | None:
    return unusable_triton(dtype, call.head_dim, call.value_dim, capability)


def _costs(call: Call, is_backward: bool) -> str:
    flops, least_bytes = call.flops(is_backward=is_backward), call.least_bytes(is_backward=is_backward)
    return (
        f"{'backward' if is_backward else 'forward'}: {call.tokens} tokens, {_metric(flops)}FLOP, "
        f"at least {_metric(least_bytes)}B, {flops / least_bytes:.1f} FLOP per byte"
    )


def _kernels(call: Call, has_bias: bool, is_backward: bool) -> Iterator[Sequence[str]]:
    window = (call.kernel_size, call.stride, call.is_causal)
    row_bytes = max(call.head_dim, call.value_dim) * call.element_size
    tiling = choose_tiling(*window, row_bytes, is_backward=is_backward)
    owners = {"forward_kernel": False}
    if is_backward:
        owners = {"grad_query_kernel": False, "grad_key_value_kernel": True}
    for name, owns_keys in owners.items():
        own, other, heads = ("keys", "queries", call.key_heads) if owns_keys else ("queries", "keys", call.heads)
        axes = (call.spatial, call.kernel_size, call.stride, call.dilation, call.is_causal)
        waste = computed_pairs(tiling, *axes, owns_keys=owns_keys) / call.window_pairs
        programs = count_tiles(call.spatial, call.dilation, tiling.tile) * call.batch * heads
        sizes = (f"{times(tiling.tile)} {own}", f"{times(tiling.box)} {other}", str(tiling.block))
        yield name, *sizes, str(programs * count_step_parts(programs, tiling)), f"{waste:.2f}"
    if is_backward and has_bias:
        yield ("grad_bias_kernel",)
    if is_backward and call.additional:
        yield ("grad_additional_kernel",)


def _metric(number: int) -> str:
    """Four digits and a prefix."""
    power = min((len(str(number)) - 1) // 3, len(_PREFIXES) - 1)
    return f"{number / 1000**power:.4g} {_PREFIXES[power]}"


def _table(rows: Sequence[Sequence[str]]) -> Iterator[str]:
    widths = [max(map(len, column)) for column in zip_longest(*rows, fillvalue="")]
    for row in rows:
        yield "  " + "  ".join(map(str.ljust, row, widths)).rstrip()
