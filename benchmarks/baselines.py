"""What natten2 is measured against, as functions that autograd can differentiate."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from natten2.ops import reference

__all__ = ["gather_attention", "partition", "reverse", "swin_attention", "swin_sdpa_attention"]


def gather_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    rpb: Tensor | None,
    additional_keys: Tensor | None,
    additional_values: Tensor | None,
    *parameters: object,
) -> Tensor:
    """Neighborhood attention by gathering every query's keys and values: `natten2.ops.reference`.

    Autograd differentiates it. That keeps the gathered tensors, where the reference's own backward gathers them again:
    more memory, but less time, so the harder rival of the two.

    Arguments are those of `natten2::na_forward`; the result is its output, `[B, *S, H, Dv]`.
    """
    tensors = (query, key, value, rpb, additional_keys, additional_values)
    output, _ = reference.na_forward(*tensors, *parameters)
    return output


def swin_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    rpb: Tensor | None,
    window: int,
    scale: float,
    mask: Tensor | None = None,
) -> Tensor:
    """Swin's window attention, not fused: `softmax(scale * Q K^T + bias) V` in blocks (arXiv 2103.14030, equation 4).

    Partitioning copies query, key, and value once each, reversing copies the output once. It equals neighborhood
    attention with `stride == kernel_size`.

    Args:
        query, key, value: `[B, height, width, H, D]`; `window` divides height and width.
        rpb: Relative positional bias `[H, 2 * window - 1, 2 * window - 1]`, indexed by key position minus query
            position plus `window - 1`.
        window: Side of a block.
        scale: Factor of the dot products.
        mask: What is added to the scores of each block, `[blocks, window * window, window * window]`.

    Returns:
        The output, in the shape of `query`.
    """
    blocks = [partition(tensor, window) for tensor in (query * scale, key, value)]
    scores = blocks[0] @ blocks[1].transpose(-2, -1)
    if rpb is not None:
        scores = scores + _expand_bias(rpb, window)
    if mask is not None:
        scores = (scores.unflatten(0, (-1, len(mask))) + mask[:, None]).flatten(0, 1)
    return reverse(scores.softmax(dim=-1) @ blocks[2], window, query.shape)


def swin_sdpa_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    rpb: Tensor | None,
    window: int,
    scale: float,
    mask: Tensor | None = None,
) -> Tensor:
    """:func:`swin_attention` with PyTorch's fused attention on the blocks, which takes the bias as a mask."""
    blocks = [partition(tensor, window) for tensor in (query, key, value)]
    bias = None if rpb is None else _expand_bias(rpb, window).unsqueeze(0)
    if mask is not None:
        # The fused kernels take no fifth axis.
        images = len(blocks[0]) // len(mask)
        bias = (mask[:, None] if bias is None else mask[:, None] + bias).repeat(images, 1, 1, 1)
    output = torch.nn.functional.scaled_dot_product_attention(*blocks, attn_mask=bias, scale=scale)
    return reverse(output, window, query.shape)


def partition(tensor: Tensor, window: int) -> Tensor:
    """`[B, height, width, H, D]` as `[B * blocks, H, window * window, D]`."""
    batch, height, width, heads, channels = tensor.shape
    blocks = tensor.view(batch, height // window, window, width // window, window, heads, channels)
    return blocks.permute(0, 1, 3, 5, 2, 4, 6).reshape(-1, heads, window * window, channels)


def reverse(blocks: Tensor, window: int, shape: Sequence[int]) -> Tensor:
    """The inverse of :func:`partition`."""
    batch, height, width, heads, channels = shape
    grid = blocks.view(batch, height // window, width // window, heads, window, window, channels)
    return grid.permute(0, 1, 4, 2, 5, 3, 6).reshape(shape)


def _expand_bias(rpb: Tensor, window: int) -> Tensor:
    """`[H, 2 * window - 1, 2 * window - 1]` as `[H, window * window, window * window]`."""
    # `index_select`, since the backward of `rpb[:, index]` would add entry by entry.
    tokens = window * window
    return rpb.flatten(1).index_select(1, _relative_index(window, rpb.device)).view(-1, tokens, tokens)


@lru_cache(maxsize=4)
def _relative_index(window: int, device: torch.device) -> Tensor:
    """Index into the flattened bias for every pair of tokens in a block, row-major over (query, key)."""
    axis = torch.arange(window, device=device)
    token = torch.cartesian_prod(axis, axis)
    offset = token[None, :] - token[:, None] + window - 1
    return (offset[..., 0] * (2 * window - 1) + offset[..., 1]).flatten()
