"""Neighborhood attention as dense attention under a mask that is built pair by pair from the definition.

It shares nothing with the library: not its geometry, not its gather, and its gradients are autograd's.
"""

from __future__ import annotations

from itertools import product

import torch
from problems import Problem
from torch import Tensor


def visible(query: int, key: int, length: int, kernel_size: int, stride: int, dilation: int, is_causal: bool) -> bool:
    """Whether the query sees the key along one axis."""
    if query % dilation != key % dilation:
        return False
    group = range(query % dilation, length, dilation)
    n, p, y = len(group), query // dilation, key // dilation
    if is_causal:
        leader = min((p // stride) * stride + stride - 1, n - 1)
        return max(leader - kernel_size + 1, 0) <= y <= p
    leader = min((p // stride) * stride + stride // 2, n - 1)
    start = min(max(leader - kernel_size // 2, 0), n - kernel_size)
    return start <= y < start + kernel_size


def attention(problem: Problem, tensors: tuple[Tensor | None, ...]) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp, differentiable."""
    query, key, value, rpb, additional_keys, additional_values = tensors
    batch, *spatial, heads, _ = query.shape
    group = heads // key.shape[-2]
    mask, bias = _mask_and_bias(problem, heads, rpb)
    q, k, v = (tensor.flatten(1, len(spatial)) for tensor in (query, key, value))
    if additional_keys is not None:
        k, v = torch.cat((k, additional_keys), 1), torch.cat((v, additional_values), 1)
        extra = additional_keys.shape[1]
        mask = torch.cat((mask, mask.new_ones(mask.shape[0], extra)), 1)
        bias = torch.cat((bias, bias.new_zeros(heads, mask.shape[0], extra)), 2)
    k, v = k.repeat_interleave(group, 2), v.repeat_interleave(group, 2)
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) * problem.scale + bias
    scores = scores.masked_fill(~mask, -torch.inf)
    output = torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), v)
    logsumexp = scores.logsumexp(-1).transpose(1, 2)
    return output.reshape(batch, *spatial, heads, -1), logsumexp.reshape(batch, *spatial, heads)


def gradients(problem: Problem) -> tuple[tuple[Tensor, Tensor], tuple[Tensor | None, ...]]:
    """The results, and the gradient of every input that is there."""
    tensors = tuple(None if t is None else t.detach().requires_grad_() for t in problem.tensors)
    results = attention(problem, tensors)
    present = [tensor for tensor in tensors if tensor is not None]
    grads = iter(torch.autograd.grad(results, present, (problem.grad_output, problem.grad_logsumexp)))
    return results, tuple(None if tensor is None else next(grads) for tensor in tensors)


def _mask_and_bias(problem: Problem, heads: int, rpb: Tensor | None) -> tuple[Tensor, Tensor]:
    spatial, rank = problem.spatial, len(problem.spatial)
    tokens = list(product(*(range(length) for length in spatial)))
    axes = list(zip(spatial, problem.kernel_size, problem.stride, problem.dilation, problem.is_causal, strict=True))
    mask = torch.zeros(len(tokens), len(tokens), dtype=torch.bool)
    entries = torch.zeros(len(tokens), len(tokens), rank, dtype=torch.int64)
    for i, query in enumerate(tokens):
        for j, key in enumerate(tokens):
            mask[i, j] = all(visible(query[a], key[a], *axes[a]) for a in range(rank))
            if mask[i, j]:
                entries[i, j] = torch.tensor(
                    [key[a] // d - query[a] // d + k - 1 for a, (_, k, _, d, _) in enumerate(axes)]
                )
    if rpb is None:
        return mask, torch.zeros(heads, *mask.shape, dtype=torch.float64)
    return mask, rpb[(slice(None), *entries.unbind(-1))]
