"""The functions `na1d`, `na2d`, and `na3d` over shards."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor

from natten2._arguments import integers
from natten2.distributed.attention import ContextParallelAttention
from natten2.distributed.exchange import gather_lengths
from natten2.distributed.plan import Axis, make_plan
from natten2.functional import _neighborhood_attention
from natten2.ops.autocast import cast_inputs
from natten2.ops.schemas import na_forward
from natten2.ops.validation import check_fit, check_forward, check_window

__all__ = ["na1d", "na2d", "na3d"]


def na1d(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    kernel_size: int | Sequence[int],
    stride: int | Sequence[int] = 1,
    dilation: int | Sequence[int] = 1,
    is_causal: bool | Sequence[bool] = False,
    scale: float | None = None,
    *,
    rpb: Tensor | None = None,
    additional_keys: Tensor | None = None,
    additional_values: Tensor | None = None,
    return_lse: bool = False,
    group: dist.ProcessGroup | None = None,
    lengths: int | Sequence[int] | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """:func:`natten2.na1d` over a sequence whose tokens are split over a process group; see :func:`na2d`."""
    return _neighborhood_attention(
        1,
        query,
        key,
        value,
        kernel_size,
        stride,
        dilation,
        is_causal,
        scale,
        rpb,
        additional_keys,
        additional_values,
        return_lse,
        partial(_attend, group, lengths),
    )


def na2d(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    kernel_size: int | Sequence[int],
    stride: int | Sequence[int] = 1,
    dilation: int | Sequence[int] = 1,
    is_causal: bool | Sequence[bool] = False,
    scale: float | None = None,
    *,
    rpb: Tensor | None = None,
    additional_keys: Tensor | None = None,
    additional_values: Tensor | None = None,
    return_lse: bool = False,
    group: dist.ProcessGroup | None = None,
    lengths: int | Sequence[int] | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """:func:`natten2.na2d` over an image whose rows are split over a process group.

    Every rank of the group calls it with its own rows and otherwise equal arguments, and every rank or none runs
    backward. The outputs are those of the whole image, cut in the same way. Neighbors exchange the keys and values, and
    backward their gradients, of the rows that windows reach across the cut, while those that don't are computed.

    Gradients of `rpb`, `additional_keys`, and `additional_values`, which every rank holds in full, are the rank's own
    share, as those of all parameters are: their sum over the group is the gradient. Second derivatives raise. Under
    `torch.compile` the call is a graph break.

    Args:
        query: `[B, rows, width, H, D]`, at least one row.
        key: `[B, rows, width, Hkv, D]`.
        value: `[B, rows, width, Hkv, Dv]`.
        kernel_size: As in :func:`natten2.na2d`, like all that follow and aren't listed; `kernel_size * dilation` fits
            in the whole image.
        group: The process group; the default one when `None`. Its order of ranks is that of the shards.
        lengths: Rows of every rank, or one number for all. When `None`, the ranks tell each other in every call, for
            which a CUDA device has to wait.

    Returns:
        The output `[B, rows, width, H, Dv]`. With `return_lse`, also the log-sum-exp `[B, rows, width, H]`.

    Raises:
        ValueError: An argument is not allowed, as in :func:`natten2.na2d`; `lengths` is not what the ranks hold; or a
            shard is thinner than the halo that its neighbor needs, which every rank then raises.
        TypeError, NotImplementedError: As in :func:`natten2.na2d`.
    """
    return _neighborhood_attention(
        2,
        query,
        key,
        value,
        kernel_size,
        stride,
        dilation,
        is_causal,
        scale,
        rpb,
        additional_keys,
        additional_values,
        return_lse,
        partial(_attend, group, lengths),
    )


def na3d(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    kernel_size: int | Sequence[int],
    stride: int | Sequence[int] = 1,
    dilation: int | Sequence[int] = 1,
    is_causal: bool | Sequence[bool] = False,
    scale: float | None = None,
    *,
    rpb: Tensor | None = None,
    additional_keys: Tensor | None = None,
    additional_values: Tensor | None = None,
    return_lse: bool = False,
    group: dist.ProcessGroup | None = None,
    lengths: int | Sequence[int] | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """:func:`natten2.na3d` over a video whose frames, or a volume whose slices, are split over a process group.

    See :func:`na2d`.
    """
    return _neighborhood_attention(
        3,
        query,
        key,
        value,
        kernel_size,
        stride,
        dilation,
        is_causal,
        scale,
        rpb,
        additional_keys,
        additional_values,
        return_lse,
        partial(_attend, group, lengths),
    )


@torch.compiler.disable
def _attend(
    group: dist.ProcessGroup | None,
    lengths: int | Sequence[int] | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    rpb: Tensor | None,
    additional_keys: Tensor | None,
    additional_values: Tensor | None,
    kernel_size: tuple[int, ...],
    stride: tuple[int, ...],
    dilation: tuple[int, ...],
    is_causal: tuple[bool, ...],
    scale: float,
) -> tuple[Tensor, Tensor]:
    inputs = (query, key, value, rpb, additional_keys, additional_values)
    if torch.is_autocast_enabled(query.device.type):
        inputs = cast_inputs(na_forward, query.device.type, *inputs)
    check_window(kernel_size, stride, dilation)
    # The window's extent along the first axis is for the whole of it to hold, not for the shard.
    narrow = ((1, *kernel_size[1:]), (1, *stride[1:]), (1, *dilation[1:]))
    check_forward(*inputs[:3], None, *inputs[4:], *narrow, is_causal, scale)

    group = dist.group.WORLD if group is None else group
    lengths = _lengths(lengths, query, group)
    check_fit((sum(lengths), *query.shape[2:-2]), kernel_size, dilation)
    axis = Axis(kernel_size[0], stride[0], dilation[0], is_causal[0], is_only=len(kernel_size) == 1)
    plan = make_plan(lengths, dist.get_rank(group), axis)
    return ContextParallelAttention.apply(plan, group, (kernel_size, stride, dilation, is_causal, scale), *inputs)


def _lengths(lengths: int | Sequence[int] | None, query: Tensor, group: dist.ProcessGroup) -> tuple[int, ...]:
    rank, world_size = dist.get_rank(group), dist.get_world_size(group)
    if rank < 0:
        raise ValueError(f"group must hold this process, got a group of {world_size} others")
    if lengths is None:
        lengths = gather_lengths(query.shape[1], query.device, group)
    lengths = integers("lengths", lengths, world_size)
    if min(lengths) < 1:
        raise ValueError(f"lengths must be at least 1 on every rank, got {list(lengths)}")
    if lengths[rank] != query.shape[1]:
        raise ValueError(f"lengths must be those of the shards, got {lengths[rank]} for {query.shape[1]} rows of query")
    return lengths
