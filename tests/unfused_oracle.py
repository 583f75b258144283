"""The unfused pair by dense products and an index of every slot, both from the definition; gradients are autograd's."""

from __future__ import annotations

from itertools import product

import torch
from problems import Problem
from torch import Tensor


def scores(problem: Problem, tensors: tuple[Tensor | None, ...], hidden: float = -torch.inf) -> Tensor:
    """What `na_qk` computes of query, key, rpb, and additional keys."""
    query, key, rpb, additional = tensors
    tokens, entries, visible = _slots(problem)
    q, k = query.flatten(1, -3), key.flatten(1, -3).repeat_interleave(query.shape[-2] // key.shape[-2], 2)
    dense = torch.einsum("bqhd,bkhd->bqhk", q, k) * problem.scale
    window = dense.gather(3, tokens[None, :, None].expand(*dense.shape[:3], -1))
    if rpb is not None:
        window = window + rpb.flatten(1)[:, entries].movedim(0, 1)
    window = torch.where(visible[None, :, None], window, hidden)
    if additional is not None:
        extra = additional.repeat_interleave(query.shape[-2] // key.shape[-2], 2)
        window = torch.cat((window, torch.einsum("bqhd,bnhd->bqhn", q, extra) * problem.scale), -1)
    return window.reshape(*query.shape[:-1], -1)


def sums(problem: Problem, tensors: tuple[Tensor | None, ...]) -> Tensor:
    """What `na_av` computes of weights, value, and additional values."""
    weights, value, additional = tensors
    tokens, _, visible = _slots(problem)
    w, group = weights.flatten(1, -3), weights.shape[-2] // value.shape[-2]
    window = torch.where(visible[None, :, None], w[..., : tokens.shape[1]], 0)
    dense = window.new_zeros(*w.shape[:3], tokens.shape[0])
    dense = dense.scatter_add(3, tokens[None, :, None].expand_as(window), window)
    output = torch.einsum("bqhk,bkhd->bqhd", dense, value.flatten(1, -3).repeat_interleave(group, 2))
    if additional is not None:
        extra = additional.repeat_interleave(group, 2)
        output = output + torch.einsum("bqhn,bnhd->bqhd", w[..., tokens.shape[1] :], extra)
    return output.reshape(*weights.shape[:-1], -1)


def _slots(problem: Problem) -> tuple[Tensor, Tensor, Tensor]:
    """The token, the bias entry, and the visibility of every slot, `[tokens, slots]`."""
    axes = list(zip(problem.kernel_size, problem.stride, problem.dilation, problem.is_causal, strict=True))
    rows = [
        [
            _combine(problem, [_slot(x, j, n, *axis) for x, j, n, axis in zip(query, slot, problem.spatial, axes)])  # noqa: B905
            for slot in product(*(range(k) for k in problem.kernel_size))
        ]
        for query in product(*(range(length) for length in problem.spatial))
    ]
    token, entry, visible = torch.tensor(rows).unbind(-1)
    return token, entry, visible.bool()


def _slot(index: int, slot: int, length: int, k: int, s: int, d: int, is_causal: bool) -> tuple[int, int, bool]:
    """The key's index, its bias entry, and whether the query sees it, along one axis."""
    group, position = range(index % d, length, d), index // d
    leader = min(position // s * s + (s - 1 if is_causal else s // 2), len(group) - 1)
    start = max(leader - k + 1, 0) if is_causal else min(max(leader - k // 2, 0), len(group) - k)
    visible = not is_causal or start + slot <= position
    key = start + slot if visible else position
    return group[key], key - position + k - 1, visible


def _combine(problem: Problem, axes: list[tuple[int, int, bool]]) -> tuple[int, int, int]:
    token = entry = 0
    for (index, offset, _), length, k in zip(axes, problem.spatial, problem.kernel_size, strict=True):
        token, entry = token * length + index, entry * (2 * k - 1) + offset
    return token, entry, int(all(visible for *_, visible in axes))
