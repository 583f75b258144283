"""Neighborhood attention on a processor by other libraries, from the tensors of a case."""

from __future__ import annotations

import importlib.util
from functools import lru_cache
from math import prod
from types import ModuleType

import torch
from torch import Tensor

from benchmarks.cases import Attend, Case, Inputs
from benchmarks.flex import Order, bias_entry, prepare_flex, visibility

__all__ = ["dense", "flex", "for_natten", "natten"]


def dense(case: Case, inputs: Inputs) -> Tensor:
    """PyTorch's attention of all tokens to all, with a mask of the windows; the mask is not part of what is timed."""
    visible, entry = _dense_mask(case)
    query, key, value = (tensor.flatten(1, -3).transpose(1, 2) for tensor in (inputs.query, inputs.key, inputs.value))
    mask = visible
    if inputs.rpb is not None:
        # `index_select`, since the backward of `rpb[:, entry]` would add entry by entry.
        bias = inputs.rpb.flatten(1).index_select(1, entry).unflatten(1, visible.shape)
        mask = bias.masked_fill(~visible, -torch.inf)
    output = torch.nn.functional.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, scale=case.parameters.scale, enable_gqa=query.shape[1] != key.shape[1]
    )
    return output.transpose(1, 2).reshape(inputs.query.shape)


def flex(case: Case, inputs: Inputs) -> Tensor:
    """Compiled FlexAttention, compiled anew for every case."""
    return _compiled_flex(case)(case, inputs)


def natten(case: Case, inputs: Inputs) -> Tensor:
    """The kernels that NATTEN had for processors, which its version 0.17 was the last to have: scores, then values."""
    functional, rank = _natten_functional(), len(case.spatial)
    kernel_size, _, dilation, is_causal, scale = case.parameters
    query, key, value = (tensor.movedim(-2, 1).contiguous() for tensor in (inputs.query, inputs.key, inputs.value))
    scores = getattr(functional, f"na{rank}d_qk")(
        query * scale, key, kernel_size, dilation, is_causal=is_causal, rpb=inputs.rpb
    )
    output = getattr(functional, f"na{rank}d_av")(
        scores.softmax(dim=-1), value, kernel_size, dilation, is_causal=is_causal
    )
    return output.movedim(1, -2)


def for_natten(case: Case) -> Case | None:
    """What those kernels can compute, where they are installed."""
    has_strides = set(case.parameters.stride) != {1}
    if _natten_functional() is None or has_strides or case.additional or case.key_heads is not None:
        return None
    return case


@lru_cache(maxsize=1)
def _dense_mask(case: Case) -> tuple[Tensor, Tensor]:
    """Whether a query sees a key, `[tokens, tokens]`, and the flattened index of their entry in the flattened bias."""
    order = Order(case.spatial)
    query = torch.arange(prod(case.spatial))[:, None]
    key = query.transpose(0, 1)
    zero = torch.zeros((), dtype=torch.int64)
    entry = torch.zeros((), dtype=torch.int64)
    for index, kernel_size in zip(bias_entry(case, order, query, key), case.parameters.kernel_size, strict=True):
        entry = entry * (2 * kernel_size - 1) + index
    return visibility(case, order)(zero, zero, query, key), entry.flatten()


@lru_cache(maxsize=1)
def _compiled_flex(case: Case) -> Attend:
    # The mask depends on the case alone; what the tensors are, the compiler sees at every call.
    empty = torch.empty(0)
    return prepare_flex(case, Inputs(empty, empty, empty, None, None, None, empty), is_compiled=True)


@lru_cache(maxsize=1)
def _natten_functional() -> ModuleType | None:
    if importlib.util.find_spec("natten") is None:
        return None
    import natten.functional

    return natten.functional if hasattr(natten.functional, "na2d_qk") else None
