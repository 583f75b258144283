"""The derivative rules of the unfused pair.

Each operator is linear in each of its tensors, so every derivative is again one of the four operators, to any order:
reverse mode takes the kernels alone.
"""

from __future__ import annotations

import torch
from torch import Tensor

from natten2.ops import unfused_reference
from natten2.ops.differentiable import register_differentiable
from natten2.ops.schemas import LIBRARY, na_av, na_av_backward, na_qk, na_qk_backward

_NOTHING = (None,) * 4  # the gradients of a window


class _Bilinear:
    @staticmethod
    def setup_context(ctx, inputs: tuple[object, ...], output: object) -> None:
        tensors = tuple(x for x in inputs if x is None or isinstance(x, Tensor))
        ctx.save_for_backward(*tensors)
        ctx.parameters = inputs[len(tensors) :]


class Scores(_Bilinear):
    """Rule of `natten2::na_qk`."""

    @staticmethod
    def backward(ctx, grad_scores: Tensor) -> tuple[Tensor | None, ...]:
        *window, scale, _ = ctx.parameters
        grads = na_qk_backward(grad_scores, *ctx.saved_tensors, *window, scale)
        return (*_present(grads, ctx.saved_tensors), *_NOTHING, None, None)


class ScoresBackward(_Bilinear):
    """Rule of `natten2::na_qk_backward`."""

    @staticmethod
    def backward(ctx, query_g: Tensor, key_g: Tensor, rpb_g: Tensor, additional_g: Tensor) -> tuple[Tensor | None, ...]:
        grad_scores, query, key, rpb, additional = ctx.saved_tensors
        *window, scale = ctx.parameters
        query_g, key_g = _tangent(query_g, query), _tangent(key_g, key)
        rpb_g, additional_g = _tangent(rpb_g, rpb), _tangent(additional_g, additional)
        by_query = na_qk(query_g, key, rpb_g, additional, *window, scale, 0.0)
        by_key = na_qk(query, key_g, None, additional_g, *window, scale, 0.0)
        grads = na_qk_backward(grad_scores, query_g, key_g, None, additional_g, *window, scale)
        to_query, to_key, _, to_additional = _present(grads, (query, key, None, additional))
        return (by_query + by_key, to_query, to_key, None, to_additional, *_NOTHING, None)


class Sums(_Bilinear):
    """Rule of `natten2::na_av`."""

    @staticmethod
    def backward(ctx, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        grads = na_av_backward(grad_output, *ctx.saved_tensors, *ctx.parameters)
        return (*_present(grads, ctx.saved_tensors), *_NOTHING)


class SumsBackward(_Bilinear):
    """Rule of `natten2::na_av_backward`."""

    @staticmethod
    def backward(ctx, weights_g: Tensor, value_g: Tensor, additional_g: Tensor) -> tuple[Tensor | None, ...]:
        grad_output, weights, value, additional = ctx.saved_tensors
        weights_g, value_g = _tangent(weights_g, weights), _tangent(value_g, value)
        additional_g = _tangent(additional_g, additional)
        by_weights = na_av(weights_g, value, additional, *ctx.parameters)
        by_value = na_av(weights, value_g, additional_g, *ctx.parameters)
        # Its first result has nothing to do with the weights that it is given, the others nothing with the values.
        grads = na_av_backward(grad_output, weights_g, value_g, additional_g, *ctx.parameters)
        return (by_weights + by_value, *_present(grads, (weights, value, additional)), *_NOTHING)


def _tangent(tangent: Tensor | None, primal: Tensor | None) -> Tensor | None:
    """The tangent or upstream gradient of a tensor as the operators take it: it comes expanded from one number even."""
    if primal is None:
        return None
    return torch.zeros_like(primal).contiguous() if tangent is None else tangent.contiguous()


def _present(grads: tuple[Tensor, ...], inputs: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:
    return tuple(None if x is None else grad for grad, x in zip(grads, inputs, strict=True))


register_differentiable(LIBRARY, na_qk, Scores, unfused_reference.na_qk)
register_differentiable(LIBRARY, na_qk_backward, ScoresBackward, unfused_reference.na_qk_backward)
register_differentiable(LIBRARY, na_av, Sums, unfused_reference.na_av)
register_differentiable(LIBRARY, na_av_backward, SumsBackward, unfused_reference.na_av_backward)
