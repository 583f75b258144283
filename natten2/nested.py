"""Neighborhood attention over images, and videos, of different sizes in one batch, without padding.

A jagged nested tensor has one ragged axis. Where the images of a batch differ in height alone, or in width alone, it
holds them as they are, and :func:`natten2.na2d` and the modules take it. Where they differ in both, it holds their
tokens, image after image, row after row, and the functions here take it with the images' sizes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod

import torch
from torch import Tensor

from natten2 import functional
from natten2._arguments import integers
from natten2.nn import NeighborhoodAttention2D, NeighborhoodAttention3D

__all__ = ["attend", "na2d", "na3d"]


def na2d(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    sizes: Sequence[Sequence[int]],
    kernel_size: int | Sequence[int],
    stride: int | Sequence[int] = 1,
    dilation: int | Sequence[int] = 1,
    is_causal: bool | Sequence[bool] = False,
    scale: float | None = None,
    *,
    rpb: Tensor | None = None,
) -> Tensor:
    """:func:`natten2.na2d` over each image of a batch.

    Args:
        query: A jagged nested tensor `[B, tokens, H, D]`, its tokens row by row.
        key: `[B, tokens, Hkv, D]`, with query's offsets.
        value: `[B, tokens, Hkv, Dv]`, with query's offsets.
        sizes: For each image `(height, width)`, whose product is the number of its tokens.
        kernel_size: As in :func:`natten2.na2d`, like all that follow; the window fits in every image.

    Returns:
        The output, a jagged nested tensor `[B, tokens, H, Dv]` with query's offsets.

    Raises:
        ValueError: An argument is not allowed; the message names it.
        TypeError: An argument is of the wrong type.
        NotImplementedError: A nested tensor has holes.
    """
    return _attend(functional.na2d, 2, query, key, value, sizes, (kernel_size, stride, dilation, is_causal, scale), rpb)


def na3d(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    sizes: Sequence[Sequence[int]],
    kernel_size: int | Sequence[int],
    stride: int | Sequence[int] = 1,
    dilation: int | Sequence[int] = 1,
    is_causal: bool | Sequence[bool] = False,
    scale: float | None = None,
    *,
    rpb: Tensor | None = None,
) -> Tensor:
    """:func:`natten2.na3d` over each video of a batch: :func:`na2d` with sizes `(depth, height, width)`."""
    return _attend(functional.na3d, 3, query, key, value, sizes, (kernel_size, stride, dilation, is_causal, scale), rpb)


def attend(
    module: NeighborhoodAttention2D | NeighborhoodAttention3D, input: Tensor, sizes: Sequence[Sequence[int]]
) -> Tensor:
    """A module of neighborhood attention over each image, or video, of a batch.

    Args:
        module: The module; its projections run once, over the tokens of all.
        input: A jagged nested tensor `[B, tokens, embed_dim]`, its tokens row by row.
        sizes: For each image `(height, width)`, whose product is the number of its tokens; for each video
            `(depth, height, width)`.

    Returns:
        The output, a jagged nested tensor with input's shape and offsets.

    Raises:
        ValueError: An argument is not allowed; the message names it.
        TypeError: An argument is of the wrong type.
        NotImplementedError: A nested tensor has holes.
    """
    if not isinstance(module, NeighborhoodAttention2D | NeighborhoodAttention3D):
        raise TypeError(
            f"module must be a NeighborhoodAttention2D or NeighborhoodAttention3D, got {type(module).__name__}"
        )
    rank = len(module.kernel_size)
    _check_jagged("input", input)
    if input.dim() != 3 or input.shape[-1] != module.embed_dim:
        raise ValueError(f"input must have shape [B, tokens, {module.embed_dim}], got {input.shape}")
    sizes, counts = _split("input", input, sizes, rank)

    def each(qkv: Tensor) -> Tensor:
        images = (x.unflatten(0, size).unsqueeze(0) for x, size in zip(qkv.split(counts), sizes, strict=True))
        return torch.cat([module._attend(image).flatten(0, rank) for image in images])

    return module._project_values(input, each)


def _attend(
    attention: Callable[..., Tensor],
    rank: int,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    sizes: Sequence[Sequence[int]],
    parameters: tuple[object, ...],
    rpb: Tensor | None,
) -> Tensor:
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        _check_jagged(name, tensor)
        if tensor.dim() != 4 or tensor.shape[:2] != query.shape[:2]:
            raise ValueError(
                f"{name} must have shape [B, tokens, heads, head_dim] and query's offsets, got {tensor.shape}"
            )
    sizes, counts = _split("query", query, sizes, rank)
    shards = zip(*(tensor.values().split(counts) for tensor in (query, key, value)), strict=True)
    outputs = [
        attention(*(x.unflatten(0, size).unsqueeze(0) for x in tensors), *parameters, rpb=rpb).flatten(0, rank)
        for size, tensors in zip(sizes, shards, strict=True)
    ]
    return torch.nested.nested_tensor_from_jagged(torch.cat(outputs), query.offsets())


def _check_jagged(name: str, tensor: object) -> None:
    if not (isinstance(tensor, Tensor) and tensor.is_nested and tensor.layout is torch.jagged):
        raise TypeError(f"{name} must be a jagged nested tensor, got {type(tensor).__name__}")
    if tensor.lengths() is not None:
        raise NotImplementedError(f"{name} must be a nested tensor without holes, got one with lengths")


def _split(
    name: str, tensor: Tensor, sizes: Sequence[Sequence[int]], rank: int
) -> tuple[list[tuple[int, ...]], list[int]]:
    """The size of each entry, and the number of its tokens."""
    sizes = [integers(f"sizes[{index}]", size, rank) for index, size in enumerate(sizes)]
    counts = tensor.offsets().diff().tolist()
    if [prod(size) for size in sizes] != counts:
        raise ValueError(f"sizes must have as many tokens as the entries of {name}, {counts}, got {sizes}")
    return sizes, counts
