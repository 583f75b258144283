"""The derivative rules of the operators."""

from __future__ import annotations

import torch
from torch import Tensor

from natten2.ops import reference
from natten2.ops.differentiable import register_differentiable
from natten2.ops.schemas import LIBRARY, na_backward, na_forward

_NUM_INPUTS = 6
_NUM_PARAMETERS = 5


class NeighborhoodAttention:
    """Rule of `natten2::na_forward`: its gradient is `natten2::na_backward`, one node in every traced graph."""

    @staticmethod
    def setup_context(ctx, inputs: tuple[object, ...], output: tuple[Tensor, Tensor]) -> None:
        ctx.save_for_backward(*inputs[:_NUM_INPUTS], *output)
        ctx.parameters = inputs[_NUM_INPUTS:]
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx, grad_output: Tensor | None, grad_logsumexp: Tensor | None) -> tuple[Tensor | None, ...]:
        if grad_output is None and grad_logsumexp is None:
            return (None,) * (_NUM_INPUTS + _NUM_PARAMETERS)
        *inputs, output, logsumexp = ctx.saved_tensors
        if grad_output is None:
            grad_output = torch.zeros_like(output)
        grads = na_backward(grad_output, grad_logsumexp, *inputs, output, logsumexp, *ctx.parameters)
        present = (grad if x is not None else None for grad, x in zip(grads, inputs, strict=True))
        return (*present, *(None,) * _NUM_PARAMETERS)


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
        tensors = ctx.saved_tensors
        present = [tensor for tensor in tensors if tensor is not None]

        def formula(*values: Tensor) -> tuple[Tensor, ...]:
            remaining = iter(values)
            arguments = [None if tensor is None else next(remaining) for tensor in tensors]
            return reference.na_backward(*arguments, *ctx.parameters)

        _, pullback = torch.func.vjp(formula, *present)
        second = iter(pullback(grads))
        return (*(None if tensor is None else next(second) for tensor in tensors), *(None,) * _NUM_PARAMETERS)


register_differentiable(LIBRARY, na_forward, NeighborhoodAttention, reference.na_forward)
register_differentiable(LIBRARY, na_backward, NeighborhoodAttentionBackward, reference.na_backward)
