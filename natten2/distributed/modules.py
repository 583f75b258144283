"""Modules over shards."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch.distributed as dist
from torch import Tensor, nn

from natten2 import nn as attention
from natten2.distributed.functional import na1d, na2d, na3d
from natten2.models.nat import Block

__all__ = ["context_parallel"]

_FUNCTIONS = {
    attention.NeighborhoodAttention1D: na1d,
    attention.NeighborhoodAttention2D: na2d,
    attention.NeighborhoodAttention3D: na3d,
}


def context_parallel(
    module: nn.Module,
    group: dist.ProcessGroup | None = None,
    lengths: int | Sequence[int] | None = None,
) -> nn.Module:
    """Makes every neighborhood attention in `module` attend over shards, in place.

    From then on the module maps the shards `[B, rows, ..., embed_dim]` of its rank as it would map the whole, provided
    that all else in it treats tokens alone. Parameters stay as they are, the same on every rank; their gradients are
    the rank's share, to be summed over the group.

    Args:
        module: A module with any number of :class:`natten2.NeighborhoodAttention2D` or of its relatives inside, or one
            of them.
        group: As in :func:`natten2.distributed.na2d`.
        lengths: As in :func:`natten2.distributed.na2d`; of every input from then on.

    Returns:
        `module`.

    Raises:
        ValueError: It has no neighborhood attention.
        NotImplementedError: It has blocks of :class:`natten2.models.nat.NAT`, which pads small maps, and whose
            convolutions see other tokens too.
    """
    modules = list(module.modules())
    if any(isinstance(child, Block) for child in modules):
        raise NotImplementedError(
            "module must hold no NAT: its convolutions and its padding see other ranks' rows as well"
        )
    layers = [child for child in modules if isinstance(child, tuple(_FUNCTIONS))]
    if not layers:
        raise ValueError(f"module must hold a neighborhood attention, got {type(module).__name__} without one")
    for layer in layers:
        function = next(function for kind, function in _FUNCTIONS.items() if isinstance(layer, kind))
        layer._attend = partial(_attend, layer, partial(function, group=group, lengths=lengths))
    return module


def _attend(layer: nn.Module, function: Callable[..., Tensor], qkv: Tensor) -> Tensor:
    window = (layer.kernel_size, layer.stride, layer.dilation, layer.is_causal, layer.qk_scale)
    return function(*qkv.unbind(-3), *window, rpb=layer.rpb)
