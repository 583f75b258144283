"""Neighborhood attention as a mask of PyTorch's FlexAttention: the rival that everybody has."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from benchmarks.cases import Attend, Case, Inputs
from natten2.window import group_length, key_bounds

__all__ = ["Order", "bias_entry", "prepare_flex", "tile_for", "visibility"]

_BLOCK = 128
_TILES = {2: (16, 8), 3: (2, 8, 8)}
_BLOCKS_AT_ONCE = 8


@dataclass(frozen=True)
class Order:
    """The order of the tokens: row-major over a grid of tiles, and row-major in each of them.

    Attributes:
        spatial: Lengths of the axes.
        tile: Lengths of a tile, which divide them; `None` is row-major over the whole grid.
    """

    spatial: tuple[int, ...]
    tile: tuple[int, ...] | None = None

    def coordinates(self, index: Tensor) -> list[Tensor]:
        """The coordinate of a token along every axis."""
        if self.tile is None:
            return _unravel(index, self.spatial)
        tokens = prod(self.tile)
        tiles, inner = _unravel(index // tokens, self._grid()), _unravel(index % tokens, self.tile)
        return [one * length + rest for one, length, rest in zip(tiles, self.tile, inner, strict=True)]

    def arrange(self, tensor: Tensor) -> Tensor:
        """`[B, *S, H, D]` as `[B, H, tokens, D]`: a view, or a copy where there are tiles."""
        if self.tile is not None:
            rank = len(self.spatial)
            split = [length for pair in zip(self._grid(), self.tile, strict=True) for length in pair]
            grid, inner = range(1, 2 * rank, 2), range(2, 2 * rank + 1, 2)
            tensor = tensor.reshape(tensor.shape[0], *split, *tensor.shape[-2:])
            tensor = tensor.permute(0, *grid, *inner, 2 * rank + 1, 2 * rank + 2)
        return tensor.flatten(1, -3).transpose(1, 2)

    def restore(self, tensor: Tensor) -> Tensor:
        """The inverse of :meth:`arrange`."""
        tensor = tensor.transpose(1, 2)
        if self.tile is not None:
            rank = len(self.spatial)
            tensor = tensor.reshape(tensor.shape[0], *self._grid(), *self.tile, *tensor.shape[-2:])
            axes = [
                axis for pair in zip(range(1, rank + 1), range(rank + 1, 2 * rank + 1), strict=True) for axis in pair
            ]
            tensor = tensor.permute(0, *axes, 2 * rank + 1, 2 * rank + 2)
        return tensor.reshape(tensor.shape[0], *self.spatial, *tensor.shape[-2:])

    def _grid(self) -> tuple[int, ...]:
        return tuple(length // side for length, side in zip(self.spatial, self.tile, strict=True))


def tile_for(spatial: Sequence[int]) -> tuple[int, ...] | None:
    """The tile whose tokens fill a block, where it divides the axes."""
    tile = _TILES.get(len(spatial))
    fits = tile is not None and all(length % side == 0 for length, side in zip(spatial, tile, strict=True))
    return tile if fits else None


def prepare_flex(
    case: Case, inputs: Inputs, tile: tuple[int, ...] | None = None, *, is_compiled: bool | None = None
) -> Attend:
    """Builds the block mask, and returns the attention that uses it.

    With a tile, tokens are permuted so that each block of them is a box of the grid, which its windows then waste less
    of; the permutation is part of what the result does. It is compiled on a GPU, unless `is_compiled` says otherwise.
    """
    torch._dynamo.reset()
    order = Order(case.spatial, tile)
    visible = visibility(case, order)
    mask = _block_mask(visible, prod(case.spatial), inputs.query.device)
    is_compiled = inputs.query.is_cuda if is_compiled is None else is_compiled
    # On a processor FlexAttention compiles slowly, without gradients, and only where the bias has the inputs' dtype.
    is_forward_only = is_compiled and not inputs.query.is_cuda
    has_groups = case.key_heads is not None and case.key_heads != case.heads

    def blocks(query: Tensor, key: Tensor, value: Tensor, rpb: Tensor | None) -> Tensor:
        # Many scores share an entry of the bias, so its gradient is summed in float32.
        add = None if rpb is None else _bias(case, order, rpb if is_forward_only else rpb.float())
        scale = case.parameters.scale
        return flex_attention(query, key, value, add, block_mask=mask, scale=scale, enable_gqa=has_groups)

    run = torch.compile(blocks, fullgraph=True, dynamic=False) if is_compiled else blocks

    def attend(_: Case, inputs: Inputs) -> Tensor:
        tensors = map(order.arrange, (inputs.query, inputs.key, inputs.value))
        return order.restore(run(*tensors, inputs.rpb))

    return attend


def _unravel(index: Tensor, lengths: Sequence[int]) -> list[Tensor]:
    coordinates = []
    for length in reversed(lengths):
        coordinates.append(index % length)
        index = index // length
    return coordinates[::-1]


def visibility(case: Case, order: Order) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
    """Whether a query sees a key, as a function of batch, head, query, and key."""
    kernel_size, stride, dilation, is_causal, _ = case.parameters

    def visible(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        seen = None
        axes = zip(order.coordinates(query), order.coordinates(key), strict=True)
        for axis, (q, k) in enumerate(axes):
            gap, group = dilation[axis], q % dilation[axis]
            length = order.spatial[axis] if gap == 1 else group_length(order.spatial[axis], gap, group)
            start, end = key_bounds(q // gap, length, kernel_size[axis], stride[axis], is_causal[axis])
            inside = (k // gap >= start) & (k // gap < end)
            inside = inside if gap == 1 else inside & (k % gap == group)
            seen = inside if seen is None else seen & inside
        return seen

    return visible


def bias_entry(case: Case, order: Order, query: Tensor, key: Tensor) -> list[Tensor]:
    """Where a query and a key look the bias up, along every axis; some entry for a key that the query can't see."""
    kernel_size, dilation = case.parameters.kernel_size, case.parameters.dilation
    axes = zip(order.coordinates(query), order.coordinates(key), kernel_size, dilation, strict=True)
    return [(k // gap - q // gap + window - 1).clamp(0, 2 * window - 2) for q, k, window, gap in axes]


def _bias(case: Case, order: Order, rpb: Tensor) -> Callable[..., Tensor]:
    def add(score: Tensor, batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return score + rpb[(head, *bias_entry(case, order, query, key))]

    return add


def _block_mask(visible: Callable[..., Tensor], tokens: int, device: torch.device) -> BlockMask:
    """`create_block_mask` without a tensor of tokens x tokens, which for a video would fill the memory."""
    blocks = -(-tokens // _BLOCK)
    key = torch.arange(tokens, device=device)
    zero = torch.zeros((), dtype=torch.int64, device=device)
    counts = []
    for start in range(0, tokens, _BLOCKS_AT_ONCE * _BLOCK):
        query = torch.arange(start, min(start + _BLOCKS_AT_ONCE * _BLOCK, tokens), device=device)
        seen = visible(zero, zero, query[:, None], key[None, :])
        padded = torch.nn.functional.pad(seen, (0, blocks * _BLOCK - tokens, 0, -len(query) % _BLOCK))
        counts.append(padded.unflatten(1, (blocks, _BLOCK)).unflatten(0, (-1, _BLOCK)).sum((1, 3)))
    count = torch.cat(counts)
    full = count == _BLOCK**2
    return BlockMask.from_kv_blocks(
        *_ordered((count > 0) & ~full),
        *_ordered(full),
        BLOCK_SIZE=_BLOCK,
        mask_mod=visible,
        seq_lengths=(tokens, tokens),
    )


def _ordered(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """For every block of queries, the number of blocks of keys, and their indices first; `[1, 1, ...]`."""
    order = blocks.to(torch.int8).argsort(dim=1, descending=True, stable=True)
    return blocks.sum(1, dtype=torch.int32)[None, None], order.to(torch.int32)[None, None].contiguous()
