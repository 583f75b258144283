"""Neighborhood attention in plain PyTorch: the specification, readable and differentiable, on any device.

Every query's keys and values are gathered into an axis of slots; the rest is ordinary attention. It is the oracle of
the tests, the formula that second derivatives differentiate, and the kernel of devices that have none of their own.
Memory is tokens x slots x channels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from natten2.ops.validation import accumulate_dtype
from natten2.window import group_length, key_bounds

__all__ = ["na_backward", "na_forward", "na_qkv_backward", "na_qkv_forward", "window_slots"]


class Slots(NamedTuple):
    """What each query's slots hold, as tensors of shape `[queries, slots]` over the flattened token grid."""

    token: Tensor  # index of the key's token
    visible: Tensor  # False for a causal window's slots past the query
    offset: Tensor  # index of the bias entry in the flattened table


class Terms(NamedTuple):
    """The tensors that the forward and the backward formula share; heads are `[key heads, queries per key head]`."""

    query: Tensor  # [B, tokens, Hkv, G, D]
    key: Tensor  # [B, tokens, slots, Hkv, D]
    value: Tensor  # [B, tokens, slots, Hkv, Dv]
    additional_keys: Tensor  # [B, N, Hkv, D]
    additional_values: Tensor  # [B, N, Hkv, Dv]
    scores: Tensor  # [B, tokens, Hkv, G, slots + N]


def na_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    rpb: Tensor | None,
    additional_keys: Tensor | None,
    additional_values: Tensor | None,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    dilation: Sequence[int],
    is_causal: Sequence[bool],
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Computes `natten2::na_forward`; arguments and results are the operator's.

    With `S = scale * query . key + rpb` over the visible and the additional keys of a query,
    `logsumexp = log(sum(exp(S)))` and `output = sum(exp(S - logsumexp) * value)`.
    """
    slots = window_slots(query.shape[1:-2], kernel_size, stride, dilation, is_causal, query.device)
    terms = _terms(query, key, value, rpb, additional_keys, additional_values, slots, scale)
    logsumexp = terms.scores.logsumexp(dim=-1)
    weights = (terms.scores - logsumexp.unsqueeze(-1)).exp()
    window, extra = _split(weights, slots)
    output = torch.einsum("bthgs,btshd->bthgd", window, terms.value)
    output = output + torch.einsum("bthgn,bnhd->bthgd", extra, terms.additional_values)
    shape = query.shape[:-1]
    return output.to(query.dtype).reshape(*shape, value.shape[-1]), logsumexp.reshape(shape)


def na_backward(
    grad_output: Tensor,
    grad_logsumexp: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    rpb: Tensor | None,
    additional_keys: Tensor | None,
    additional_values: Tensor | None,
    output: Tensor,
    logsumexp: Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    dilation: Sequence[int],
    is_causal: Sequence[bool],
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Computes `natten2::na_backward`; arguments and results are the operator's.

    With `P = exp(S - logsumexp)`, `delta = sum(output * grad_output) - grad_logsumexp` and
    `dS = P * (grad_output . value - delta)`, the gradients are `scale * dS key` of the query, `scale * dS^T query` of
    the keys, `P^T grad_output` of the values, and `dS`, summed over equal offsets, of the bias.
    """
    slots = window_slots(query.shape[1:-2], kernel_size, stride, dilation, is_causal, query.device)
    terms = _terms(query, key, value, rpb, additional_keys, additional_values, slots, scale)
    grad, lse = _group_heads(grad_output, terms.query), _group_heads(logsumexp.unsqueeze(-1), terms.query)
    delta = (_group_heads(output, terms.query) * grad).sum(-1, keepdim=True)
    if grad_logsumexp is not None:
        delta = delta - _group_heads(grad_logsumexp.unsqueeze(-1), terms.query)

    weights = (terms.scores - lse).exp()
    grad_weights = torch.cat(
        (
            torch.einsum("bthgd,btshd->bthgs", grad, terms.value),
            torch.einsum("bthgd,bnhd->bthgn", grad, terms.additional_values),
        ),
        dim=-1,
    )
    grad_scores = weights * (grad_weights - delta)
    window, extra = _split(weights, slots)
    grad_window, grad_extra = _split(grad_scores, slots)

    grad_query = torch.einsum("bthgs,btshd->bthgd", grad_window, terms.key)
    grad_query = grad_query + torch.einsum("bthgn,bnhd->bthgd", grad_extra, terms.additional_keys)
    grad_key = torch.einsum("bthgs,bthgd->btshd", grad_window, terms.query)
    grad_value = torch.einsum("bthgs,bthgd->btshd", window, grad)
    grad_additional_keys = torch.einsum("bthgn,bthgd->bnhd", grad_extra, terms.query)
    grad_additional_values = torch.einsum("bthgn,bthgd->bnhd", extra, grad)
    return (
        (grad_query * scale).to(query.dtype).reshape(query.shape),
        scatter(grad_key * scale, slots).to(key.dtype).reshape(key.shape),
        scatter(grad_value, slots).to(value.dtype).reshape(value.shape),
        query.new_empty(0) if rpb is None else sum_offsets(grad_window, slots, rpb),
        query.new_empty(0) if additional_keys is None else (grad_additional_keys * scale).to(key.dtype),
        query.new_empty(0) if additional_values is None else grad_additional_values.to(value.dtype),
    )


def na_qkv_forward(qkv: Tensor, rpb: Tensor | None, *parameters: object) -> tuple[Tensor, Tensor]:
    """Computes `natten2::na_qkv_forward`: :func:`na_forward` of three views."""
    return na_forward(*qkv.unbind(-3), rpb, None, None, *parameters)


def na_qkv_backward(
    grad_output: Tensor,
    grad_logsumexp: Tensor | None,
    qkv: Tensor,
    rpb: Tensor | None,
    output: Tensor,
    logsumexp: Tensor,
    *parameters: object,
) -> tuple[Tensor, Tensor]:
    """Computes `natten2::na_qkv_backward`: :func:`na_backward` of three views."""
    upstream, inputs = (grad_output, grad_logsumexp), (*qkv.unbind(-3), rpb, None, None)
    *grads, grad_rpb, _, _ = na_backward(*upstream, *inputs, output, logsumexp, *parameters)
    return torch.stack(grads, -3), grad_rpb


def _group_heads(tensor: Tensor, like: Tensor) -> Tensor:
    """`[B, *S, H, C]` in the dtype of `like` `[B, tokens, Hkv, G, D]` as `[B, tokens, Hkv, G, C]`."""
    return tensor.to(like.dtype).reshape(*like.shape[:-1], tensor.shape[-1])


def _split(weights: Tensor, slots: Slots) -> tuple[Tensor, Tensor]:
    """The weights of the window's slots, and those of the additional keys."""
    width = slots.token.shape[1]
    return weights[..., :width], weights[..., width:]


def _terms(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    rpb: Tensor | None,
    additional_keys: Tensor | None,
    additional_values: Tensor | None,
    slots: Slots,
    scale: float,
) -> Terms:
    dtype = accumulate_dtype(query.dtype)
    batch, tokens = query.shape[0], slots.token.shape[0]
    (heads, channels), key_heads = query.shape[-2:], key.shape[-2]
    query = query.to(dtype).reshape(batch, tokens, key_heads, heads // key_heads, channels)
    key = key.to(dtype).reshape(batch, tokens, *key.shape[-2:])[:, slots.token]
    value = value.to(dtype).reshape(batch, tokens, *value.shape[-2:])[:, slots.token]
    if additional_keys is None or additional_values is None:
        additional_keys, additional_values = key[:, :0, 0], value[:, :0, 0]
    additional_keys, additional_values = additional_keys.to(dtype), additional_values.to(dtype)

    scores = torch.einsum("bthgd,btshd->bthgs", query, key) * scale
    if rpb is not None:
        bias = rpb.to(dtype).flatten(1)[:, slots.offset]  # [H, tokens, slots]
        scores = scores + bias.unflatten(0, (key_heads, -1)).movedim(2, 0)
    scores = scores.masked_fill(~slots.visible[:, None, None], -torch.inf)
    extra = torch.einsum("bthgd,bnhd->bthgn", query, additional_keys) * scale
    return Terms(query, key, value, additional_keys, additional_values, torch.cat((scores, extra), dim=-1))


def scatter(gathered: Tensor, slots: Slots) -> Tensor:
    """Sums `[B, tokens, slots, Hkv, C]` over the slots that hold the same token: the transpose of the gather."""
    batch, tokens = gathered.shape[:2]
    result = gathered.new_zeros(batch, tokens, *gathered.shape[3:])
    return result.index_add(1, slots.token.flatten(), gathered.flatten(1, 2))


def sum_offsets(grad_scores: Tensor, slots: Slots, rpb: Tensor) -> Tensor:
    """Sums `[B, tokens, Hkv, G, slots]` over the batch and over equal offsets, into the shape of the bias."""
    by_head = grad_scores.sum(0).flatten(1, 2).movedim(1, 0).flatten(1)
    result = by_head.new_zeros(rpb.flatten(1).shape).index_add(1, slots.offset.flatten(), by_head)
    return result.to(rpb.dtype).reshape(rpb.shape)


def window_slots(
    spatial: Sequence[int],
    kernel_size: Sequence[int],
    stride: Sequence[int],
    dilation: Sequence[int],
    is_causal: Sequence[bool],
    device: torch.device,
) -> Slots:
    """Combines the axes: slots run row-major over the window, tokens row-major over the grid."""
    token = torch.zeros(1, 1, dtype=torch.int64, device=device)
    visible = torch.ones(1, 1, dtype=torch.bool, device=device)
    offset = torch.zeros(1, 1, dtype=torch.int64, device=device)
    for length, window, *axis in zip(spatial, kernel_size, stride, dilation, is_causal, strict=True):
        index, seen, shift = _axis_slots(length, window, *axis, device)
        token = _outer(token * length, index, torch.add)
        visible = _outer(visible, seen, torch.logical_and)
        offset = _outer(offset * (2 * window - 1), shift, torch.add)
    return Slots(token, visible, offset)


def _outer(left: Tensor, right: Tensor, combine: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """Combines `[t0, s0]` and `[t1, s1]` into `[t0 * t1, s0 * s1]`."""
    combined = combine(left[:, None, :, None], right[None, :, None, :])
    return combined.flatten(2, 3).flatten(0, 1)


def _axis_slots(
    length: int, kernel_size: int, stride: int, dilation: int, is_causal: bool, device: torch.device
) -> Slots:
    query = torch.arange(length, device=device)[:, None]
    slot = torch.arange(kernel_size, device=device)
    group, position = query % dilation, query // dilation
    start, end = key_bounds(position, group_length(length, dilation, group), kernel_size, stride, is_causal)
    # A hidden slot repeats the first one: what a query must not see can't reach it, not even as 0 * NaN.
    visible = slot < end - start
    key = start + torch.where(visible, slot, 0)
    return Slots(key * dilation + group, visible, key - position + kernel_size - 1)
