"""Neighborhood attention as functions.

Neighborhood Attention Transformer (arXiv 2204.07143, equations 1-3) defines the window, Dilated Neighborhood Attention
Transformer (arXiv 2209.15001) the dilation, Generalized Neighborhood Attention (arXiv 2504.16922) the stride.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from natten2._arguments import check_tensor, finite_scale, flags, integers
from natten2.ops.schemas import na_forward
from natten2.ops.torchscript import UNSUPPORTED

__all__ = ["merge_attentions", "na1d", "na2d", "na3d"]


def na1d(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    kernel_size: int | Sequence[int],
    stride: int | Sequence[int] = 1,
    dilation: int | Sequence[int] = 1,
    is_causal: bool | Sequence[bool] = False,
    scale: float | None = None,
    *,
    rpb: Tensor | None = None,
    additional_keys: Tensor | None = None,
    additional_values: Tensor | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Neighborhood attention over a sequence: :func:`na2d` with one axis.

    Tensors have the layout `[B, L, H, D]`; the bias is `[H, 2 * kernel_size - 1]`.
    """
    return _neighborhood_attention(
        1,
        query,
        key,
        value,
        kernel_size,
        stride,
        dilation,
        is_causal,
        scale,
        rpb,
        additional_keys,
        additional_values,
        return_lse,
    )


def na2d(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    kernel_size: int | Sequence[int],
    stride: int | Sequence[int] = 1,
    dilation: int | Sequence[int] = 1,
    is_causal: bool | Sequence[bool] = False,
    scale: float | None = None,
    *,
    rpb: Tensor | None = None,
    additional_keys: Tensor | None = None,
    additional_values: Tensor | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Neighborhood attention over an image: every query attends to the `kernel_size` window of keys nearest to it.

    Windows that would leave the image are shifted back inside, so every query that is not causal sees equally many
    keys. Tensors may have any strides as long as their last axis is contiguous: views cut from one packed projection
    are read in place. Every argument of the window is one number for both axes, or one per axis.

    Args:
        query: `[B, height, width, H, D]`; float32, float64, bfloat16, or float16.
        key: `[B, height, width, Hkv, D]`, in query's dtype and on its device. `Hkv` divides `H`: query head `h` reads
            key head `h // (H // Hkv)`.
        value: `[B, height, width, Hkv, Dv]`.
        kernel_size: Keys per window and axis, odd or even, at least 1.
        stride: Adjacent queries that share a window, between 1 (each has its own) and `kernel_size` (blocks, as in
            Swin).
        dilation: Distance between neighboring keys of a window, at least 1; `kernel_size * dilation` fits in the axis.
        is_causal: Whether a query sees no key after itself along the axis.
        scale: Factor of the dot products; `D ** -0.5` when `None`. Zero means zero.
        rpb: Relative positional bias `[H, 2 * kernel_size[0] - 1, 2 * kernel_size[1] - 1]`, in query's dtype or in the
            log-sum-exp's; added to the scaled dot products, indexed by key position minus query position plus
            `kernel_size - 1`.
        additional_keys: `[B, N, Hkv, D]`, which every query sees beside its window, inside the same softmax.
        additional_values: `[B, N, Hkv, Dv]`, given exactly when `additional_keys` is.
        return_lse: Whether to return the log-sum-exp as well.

    Returns:
        The output `[B, height, width, H, Dv]` in query's dtype. With `return_lse`, also the natural log-sum-exp of the
        scores, `[B, height, width, H]` in float32 (float64 for float64 inputs); both are differentiable.

    Raises:
        ValueError: A shape, stride, device, or parameter is not allowed; the message names it.
        TypeError: An argument or a tensor's dtype is of the wrong type.
        NotImplementedError: A tensor is sparse, quantized, or nested; but query, key, and value may all be jagged
            nested tensors, with one ragged spatial axis.
    """
    return _neighborhood_attention(
        2,
        query,
        key,
        value,
        kernel_size,
        stride,
        dilation,
        is_causal,
        scale,
        rpb,
        additional_keys,
        additional_values,
        return_lse,
    )


def na3d(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    kernel_size: int | Sequence[int],
    stride: int | Sequence[int] = 1,
    dilation: int | Sequence[int] = 1,
    is_causal: bool | Sequence[bool] = False,
    scale: float | None = None,
    *,
    rpb: Tensor | None = None,
    additional_keys: Tensor | None = None,
    additional_values: Tensor | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Neighborhood attention over a video or a volume: :func:`na2d` with three axes.

    Tensors have the layout `[B, depth, height, width, H, D]`; the bias has one axis of `2 * kernel_size - 1` for each
    of the three.
    """
    return _neighborhood_attention(
        3,
        query,
        key,
        value,
        kernel_size,
        stride,
        dilation,
        is_causal,
        scale,
        rpb,
        additional_keys,
        additional_values,
        return_lse,
    )


def merge_attentions(outputs: Sequence[Tensor], lses: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Merges attentions of the same queries over disjoint sets of keys into the attention over their union.

    Args:
        outputs: Any number of outputs `[..., D]`, all of one shape and dtype.
        lses: As many natural log-sum-exps `[...]`, one for each output. A set of keys with log-sum-exp -inf counts for
            nothing; for every query at least one set has a larger one.

    Returns:
        The merged output, in the outputs' dtype, and its log-sum-exp, in the log-sum-exps' dtype. Both are
        differentiable.

    Raises:
        ValueError: No outputs are given, there are more of one than of the other, or shapes or devices differ.
        TypeError: Something is no tensor, or dtypes differ.
    """
    outputs, lses = list(outputs), list(lses)
    if not outputs or len(outputs) != len(lses):
        raise ValueError(f"outputs and lses must be equally many, at least one, got {len(outputs)} and {len(lses)}")
    for name, tensors in (("outputs", outputs), ("lses", lses)):
        for index, tensor in enumerate(tensors):
            check_tensor(f"{name}[{index}]", tensor)
    if outputs[0].dim() == 0:
        raise ValueError(f"outputs must have shape [..., D], got {tuple(outputs[0].shape)}")
    _check_alike("outputs", outputs, outputs[0].shape)
    _check_alike("lses", lses, outputs[0].shape[:-1])
    stacked = torch.stack(lses)
    weights = stacked.softmax(dim=0).unsqueeze(-1)
    # The output over an empty set is 0 / 0, which no weight of zero would undo.
    merged = sum(
        weight * torch.where(weight > 0, output, 0) for weight, output in zip(weights.unbind(0), outputs, strict=True)
    )
    return merged.to(outputs[0].dtype), stacked.logsumexp(dim=0)


def _check_alike(name: str, tensors: list[Tensor], shape: torch.Size) -> None:
    for index, tensor in enumerate(tensors):
        if tensor.shape != shape:
            raise ValueError(f"{name}[{index}] must have shape {tuple(shape)}, got {tuple(tensor.shape)}")
        if tensor.device != tensors[0].device:
            raise ValueError(f"{name} must share one device, got {tensors[0].device} and {tensor.device}")
        if tensor.dtype != tensors[0].dtype or not tensor.is_floating_point():
            raise TypeError(f"{name} must share one floating-point dtype, got {tensors[0].dtype} and {tensor.dtype}")


def _neighborhood_attention(
    rank: int,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    kernel_size: int | Sequence[int],
    stride: int | Sequence[int],
    dilation: int | Sequence[int],
    is_causal: bool | Sequence[bool],
    scale: float | None,
    rpb: Tensor | None,
    additional_keys: Tensor | None,
    additional_values: Tensor | None,
    return_lse: bool,
    operator: Callable[..., tuple[Tensor, Tensor]] = na_forward,
) -> Tensor | tuple[Tensor, Tensor]:
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        check_tensor(name, tensor, jagged=True)
    for name, tensor in (("rpb", rpb), ("additional_keys", additional_keys), ("additional_values", additional_values)):
        check_tensor(name, tensor, optional=True)
    output, logsumexp = operator(
        query,
        key,
        value,
        rpb,
        additional_keys,
        additional_values,
        integers("kernel_size", kernel_size, rank),
        integers("stride", stride, rank),
        integers("dilation", dilation, rank),
        flags("is_causal", is_causal, rank),
        finite_scale(scale, query),
    )
    return (output, logsumexp) if return_lse else output


# The functions themselves, and what modules call first: torch.jit.script raises with these words at either.
for _function in (na1d, na2d, na3d, check_tensor):
    _function.__script_unsupported = UNSUPPORTED
