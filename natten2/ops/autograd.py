"""The derivative rules of the operators."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from natten2.ops import reference
from natten2.ops.differentiable import register_differentiable
from natten2.ops.schemas import LIBRARY, na_backward, na_forward, na_qkv_backward, na_qkv_forward

_NUM_PARAMETERS = 5


class NeighborhoodAttention:
    """Rule of `natten2::na_forward`: its gradient is `natten2::na_backward`, one node in every traced graph."""

    @staticmethod
    def setup_context(ctx, inputs: tuple[object, ...], output: tuple[Tensor, Tensor]) -> None:
        ctx.save_for_backward(*inputs[:-_NUM_PARAMETERS], *output)
        ctx.parameters = inputs[-_NUM_PARAMETERS:]
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx, grad_output: Tensor | None, grad_logsumexp: Tensor | None) -> tuple[Tensor | None, ...]:
        return _gradients(na_backward, ctx, grad_output, grad_logsumexp)


class PackedNeighborhoodAttention(NeighborhoodAttention):
    """Rule of `natten2::na_qkv_forward`, whose gradient is `natten2::na_qkv_backward`."""

    @staticmethod
    def backward(ctx, grad_output: Tensor | None, grad_logsumexp: Tensor | None) -> tuple[Tensor | None, ...]:
        return _gradients(na_qkv_backward, ctx, grad_output, grad_logsumexp)


class NeighborhoodAttentionBackward:
    """Rule of `natten2::na_backward`, for second derivatives: differentiates the reference's formula of the gradient.

    The formula takes the output and the log-sum-exp as inputs of their own, so their gradients flow on through
    `natten2::na_forward`. Memory is linear in the number of tokens.
    """

    @staticmethod
    def setup_context(ctx, inputs: tuple[object, ...], output: tuple[Tensor, ...]) -> None:
        ctx.save_for_backward(*inputs[:-_NUM_PARAMETERS])
        ctx.parameters = inputs[-_NUM_PARAMETERS:]

    @staticmethod
    def backward(ctx, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return _second_gradients(reference.na_backward, ctx, grads)


class PackedNeighborhoodAttentionBackward(NeighborhoodAttentionBackward):
    """Rule of `natten2::na_qkv_backward`: the same formula on views."""

    @staticmethod
    def backward(ctx, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return _second_gradients(reference.na_qkv_backward, ctx, grads)


def _gradients(
    operator: torch._ops.OpOverload, ctx, grad_output: Tensor | None, grad_logsumexp: Tensor | None
) -> tuple[Tensor | None, ...]:
    *inputs, output, logsumexp = ctx.saved_tensors
    if grad_output is None and grad_logsumexp is None:
        return (None,) * (len(inputs) + _NUM_PARAMETERS)
    if grad_output is None:
        grad_output = torch.zeros_like(output)
    grads = operator(grad_output, grad_logsumexp, *inputs, output, logsumexp, *ctx.parameters)
    present = (grad if x is not None else None for grad, x in zip(grads, inputs, strict=True))
    return (*present, *(None,) * _NUM_PARAMETERS)


def _second_gradients(
    formula: Callable[..., tuple[Tensor, ...]], ctx, grads: tuple[Tensor, ...]
) -> tuple[Tensor | None, ...]:
    tensors = ctx.saved_tensors
    present = [tensor for tensor in tensors if tensor is not None]

    def of_present(*values: Tensor) -> tuple[Tensor, ...]:
        remaining = iter(values)
        arguments = [None if tensor is None else next(remaining) for tensor in tensors]
        return formula(*arguments, *ctx.parameters)

    _, pullback = torch.func.vjp(of_present, *present)
    second = iter(pullback(grads))
    return (*(None if tensor is None else next(second) for tensor in tensors), *(None,) * _NUM_PARAMETERS)


register_differentiable(LIBRARY, na_forward, NeighborhoodAttention, reference.na_forward)
register_differentiable(LIBRARY, na_backward, NeighborhoodAttentionBackward, reference.na_backward)
register_differentiable(LIBRARY, na_qkv_forward, PackedNeighborhoodAttention, reference.na_qkv_forward)
register_differentiable(LIBRARY, na_qkv_backward, PackedNeighborhoodAttentionBackward, reference.na_qkv_backward)
