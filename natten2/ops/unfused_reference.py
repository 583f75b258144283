"""The unfused pair in plain PyTorch: scores of the pairs of a query and a key, and sums of values under any weights.

`na_qk` and `na_av` are the two halves of neighborhood attention with nothing between them. Both are linear in each of
their tensors, so that three functions of a gather make all of them, their gradients, and every higher derivative. A
query's slots are its window's, row-major from the window's start, then the additional keys.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from natten2.ops.reference import Slots, scatter, sum_offsets, window_slots
from natten2.ops.validation import accumulate_dtype

__all__ = ["na_av", "na_av_backward", "na_qk", "na_qk_backward"]


def na_qk(
    query: Tensor,
    key: Tensor,
    rpb: Tensor | None,
    additional_keys: Tensor | None,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    dilation: Sequence[int],
    is_causal: Sequence[bool],
    scale: float,
    hidden: float,
) -> Tensor:
    """Computes `natten2::na_qk`: `scale * query . key + rpb`, and `hidden` where a causal query sees no key."""
    slots = window_slots(query.shape[1:-2], kernel_size, stride, dilation, is_causal, query.device)
    scores = _products(query, key, additional_keys, slots) * scale
    window = scores[..., : slots.token.shape[1]]
    if rpb is not None:
        bias = rpb.to(scores.dtype).flatten(1)[:, slots.offset]  # [H, tokens, slots]
        window = window + bias.unflatten(0, (key.shape[-2], -1)).movedim(2, 0)
    window = window.masked_fill(~slots.visible[:, None, None], hidden)
    scores = torch.cat((window, scores[..., slots.token.shape[1] :]), -1)
    return scores.to(query.dtype).reshape(*query.shape[:-1], scores.shape[-1])


def na_qk_backward(
    grad_scores: Tensor,
    query: Tensor,
    key: Tensor,
    rpb: Tensor | None,
    additional_keys: Tensor | None,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    dilation: Sequence[int],
    is_causal: Sequence[bool],
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Computes `natten2::na_qk_backward`; the gradients of hidden slots are not read."""
    slots = window_slots(query.shape[1:-2], kernel_size, stride, dilation, is_causal, query.device)
    grad = _by_key_head(grad_scores, key.shape[-2])
    grad_query = _weighted_sums(grad, key, additional_keys, slots) * scale
    grad_key, grad_additional = _transposed_sums(grad, query, slots, key.shape[-2])
    return (
        grad_query.to(query.dtype).reshape(query.shape),
        (grad_key * scale).to(key.dtype).reshape(key.shape),
        query.new_empty(0) if rpb is None else sum_offsets(_seen(grad, slots), slots, rpb),
        query.new_empty(0) if additional_keys is None else (grad_additional * scale).to(key.dtype),
    )


def na_av(
    weights: Tensor,
    value: Tensor,
    additional_values: Tensor | None,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    dilation: Sequence[int],
    is_causal: Sequence[bool],
) -> Tensor:
    """Computes `natten2::na_av`: `sum(weights * value)` over the slots that a query sees."""
    slots = window_slots(weights.shape[1:-2], kernel_size, stride, dilation, is_causal, weights.device)
    output = _weighted_sums(_by_key_head(weights, value.shape[-2]), value, additional_values, slots)
    return output.to(value.dtype).reshape(*weights.shape[:-1], value.shape[-1])


def na_av_backward(
    grad_output: Tensor,
    weights: Tensor,
    value: Tensor,
    additional_values: Tensor | None,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    dilation: Sequence[int],
    is_causal: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """Computes `natten2::na_av_backward`; the gradients of hidden weights are zero."""
    window = (kernel_size, stride, dilation, is_causal)
    slots = window_slots(weights.shape[1:-2], *window, weights.device)
    by_head = _by_key_head(weights, value.shape[-2])
    grad_value, grad_additional = _transposed_sums(by_head, grad_output, slots, value.shape[-2])
    return (
        na_qk(grad_output, value, None, additional_values, *window, 1.0, 0.0),
        grad_value.to(value.dtype).reshape(value.shape),
        value.new_empty(0) if additional_values is None else grad_additional.to(value.dtype),
    )


def _by_key_head(tensor: Tensor, key_heads: int) -> Tensor:
    """`[B, *S, H, C]` as `[B, tokens, Hkv, G, C]` in the dtype of sums."""
    wide = tensor.to(accumulate_dtype(tensor.dtype))
    return wide.flatten(1, -3).unflatten(2, (key_heads, tensor.shape[-2] // key_heads))


def _gather(rows: Tensor, slots: Slots) -> Tensor:
    """Keys or values `[B, *S, Hkv, C]` of every slot, `[B, tokens, slots, Hkv, C]`."""
    return rows.to(accumulate_dtype(rows.dtype)).flatten(1, -3)[:, slots.token]


def _seen(weights: Tensor, slots: Slots) -> Tensor:
    """The window's part of `[B, tokens, Hkv, G, slots + N]`, with zeros in hidden slots."""
    return weights[..., : slots.token.shape[1]].masked_fill(~slots.visible[:, None, None], 0)


def _products(queries: Tensor, keys: Tensor, additional: Tensor | None, slots: Slots) -> Tensor:
    """Dot products `[B, tokens, Hkv, G, slots + N]`."""
    queries = _by_key_head(queries, keys.shape[-2])
    products = torch.einsum("bthgd,btshd->bthgs", queries, _gather(keys, slots))
    if additional is None:
        return products
    extra = torch.einsum("bthgd,bnhd->bthgn", queries, additional.to(queries.dtype))
    return torch.cat((products, extra), -1)


def _weighted_sums(weights: Tensor, rows: Tensor, additional: Tensor | None, slots: Slots) -> Tensor:
    """What each query gathers, `[B, tokens, Hkv, G, C]`."""
    sums = torch.einsum("bthgs,btshd->bthgd", _seen(weights, slots), _gather(rows, slots))
    if additional is None:
        return sums
    extra = weights[..., slots.token.shape[1] :]
    return sums + torch.einsum("bthgn,bnhd->bthgd", extra, additional.to(extra.dtype))


def _transposed_sums(weights: Tensor, queries: Tensor, slots: Slots, key_heads: int) -> tuple[Tensor, Tensor]:
    """What each key gathers, `[B, tokens, Hkv, C]`, and each additional one, `[B, N, Hkv, C]`."""
    queries, extra = _by_key_head(queries, key_heads), weights[..., slots.token.shape[1] :]
    window = torch.einsum("bthgs,bthgd->btshd", _seen(weights, slots), queries)
    return scatter(window, slots), torch.einsum("bthgn,bthgd->bnhd", extra, queries)
