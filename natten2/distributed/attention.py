"""Neighborhood attention over an axis whose rows lie on several ranks, forward and backward."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from natten2.distributed.exchange import Exchange
from natten2.distributed.plan import Piece, Plan
from natten2.ops.schemas import na_backward, na_forward

__all__ = ["ContextParallelAttention"]

_Parameters = tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...], tuple[bool, ...], float]


class ContextParallelAttention(torch.autograd.Function):
    """`natten2::na_forward` for the rows of one rank.

    The interior is computed while the halos travel, forward and backward. Gradients of the halos travel back to their
    owners; those of the bias and of additional keys, which every rank holds, stay the rank's own share.
    """

    @staticmethod
    def forward(
        ctx, plan: Plan, group: dist.ProcessGroup, parameters: _Parameters, *inputs: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        query, key, value, *shared = inputs
        exchange = Exchange(
            group,
            [x[:, : plan.to_previous] for x in (key, value)],
            [x[:, plan.length - plan.to_next :] for x in (key, value)],
            plan.from_previous,
            plan.from_next,
        )

        def attend(piece: Piece, *tensors: Tensor) -> tuple[Tensor, ...]:
            results = na_forward(*tensors, *shared, *parameters)
            return tuple(x[:, piece.first - piece.begin : piece.last - piece.begin] for x in results)

        results = {}
        if plan.interior is not None:
            results[plan.interior] = attend(plan.interior, *_inside(plan, query, key, value))
        halos = exchange.wait()
        for piece in plan.edges:
            results[piece] = attend(piece, *_slabs(plan, piece, query, key, value, halos))
        ordered = [results[piece] for piece in sorted(results, key=lambda piece: piece.first)]
        output, logsumexp = (torch.cat(parts, dim=1) for parts in zip(*ordered, strict=True))

        ctx.save_for_backward(*inputs, output, logsumexp, *halos[0], *halos[1])
        ctx.plan, ctx.group, ctx.parameters = plan, group, parameters
        ctx.set_materialize_grads(False)
        return output, logsumexp

    @staticmethod
    def backward(ctx, grad_output: Tensor | None, grad_logsumexp: Tensor | None) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise NotImplementedError("attention over shards has no second derivatives: call it without create_graph")
        plan: Plan = ctx.plan
        query, key, value, *shared, output, logsumexp, key_before, value_before, key_after, value_after = (
            ctx.saved_tensors
        )
        halos = ((key_before, value_before), (key_after, value_after))
        grad_output = torch.zeros_like(output) if grad_output is None else grad_output
        grads = [None if x is None else x.new_zeros(x.shape) for x in (query, key, value, *shared)]
        halo_grads = [[x.new_zeros(x.shape) for x in halo] for halo in halos]

        def add(piece: Piece, query: Tensor, key: Tensor, value: Tensor) -> None:
            begin, end = piece.begin, piece.end
            grad_lse = None
            if grad_logsumexp is not None:
                grad_lse = _rows(grad_logsumexp, plan.start, begin, end)
            results = na_backward(
                _rows(grad_output, plan.start, begin, end),
                grad_lse,
                *(query, key, value, *shared),
                _rows(output, plan.start, begin, end),
                _of_the_piece(logsumexp, plan.start, piece),
                *ctx.parameters,
            )
            around = (
                (plan.start, grads[:3], results[:3]),
                (plan.start - plan.from_previous, halo_grads[0], results[1:3]),
                (plan.start + plan.length, halo_grads[1], results[1:3]),
            )
            for start, targets, sources in around:
                for grad, result in zip(targets, sources, strict=True):
                    target, source = _overlap(grad, start, result, begin)
                    target += source
            for grad, result in zip(grads[3:], results[3:], strict=True):
                if grad is not None:
                    grad += result

        for piece in plan.edges:
            add(piece, *_slabs(plan, piece, query, key, value, halos))
        exchange = Exchange(ctx.group, *halo_grads, plan.to_previous, plan.to_next)
        if plan.interior is not None:
            add(plan.interior, *_inside(plan, query, key, value))
        previous, following = exchange.wait()
        for grad, first, last in zip(grads[1:3], previous, following, strict=True):
            grad[:, : plan.to_previous] += first
            grad[:, plan.length - plan.to_next :] += last
        return (None, None, None, *grads)


def _inside(plan: Plan, *tensors: Tensor) -> tuple[Tensor, ...]:
    """The interior's slab, as views."""
    return tuple(_rows(tensor, plan.start, plan.interior.begin, plan.interior.end) for tensor in tensors)


def _slabs(
    plan: Plan, piece: Piece, query: Tensor, key: Tensor, value: Tensor, halos: Sequence[Sequence[Tensor]]
) -> tuple[Tensor, ...]:
    """The slab of an edge; queries of other ranks are zeros."""
    starts = (plan.start - plan.from_previous, plan.start, plan.start + plan.length)
    around = (zip(starts, parts, strict=True) for parts in zip(halos[0], (key, value), halos[1], strict=True))
    return _rows(query, plan.start, piece.begin, piece.end), *(_join(parts, piece.begin, piece.end) for parts in around)


def _rows(tensor: Tensor, start: int, begin: int, end: int) -> Tensor:
    """Rows `[begin, end)` of an axis of which `tensor` holds those from `start` on: a view, or filled with zeros."""
    if start <= begin and end <= start + tensor.shape[1]:
        return tensor[:, begin - start : end - start]
    return _join([(start, tensor)], begin, end)


def _join(parts: Iterable[tuple[int, Tensor]], begin: int, end: int) -> Tensor:
    """Rows `[begin, end)` of an axis of which each part holds those from its start on; zeros elsewhere."""
    parts = list(parts)
    like = parts[0][1]
    result = like.new_zeros(like.shape[0], end - begin, *like.shape[2:])
    for start, part in parts:
        target, source = _overlap(result, begin, part, start)
        target.copy_(source)
    return result


def _overlap(one: Tensor, one_start: int, other: Tensor, other_start: int) -> tuple[Tensor, Tensor]:
    """Views of the rows that both hold."""
    begin = max(one_start, other_start)
    end = max(begin, min(one_start + one.shape[1], other_start + other.shape[1]))
    return tuple(x[:, begin - start : end - start] for x, start in ((one, one_start), (other, other_start)))


def _of_the_piece(logsumexp: Tensor, start: int, piece: Piece) -> Tensor:
    """The slab's log-sum-exp; infinite, so that all weights are zero, for rows that aren't the piece's own queries."""
    slab = logsumexp.new_full((logsumexp.shape[0], piece.end - piece.begin, *logsumexp.shape[2:]), torch.inf)
    slab[:, piece.first - piece.begin : piece.last - piece.begin] = logsumexp[
        :, piece.first - start : piece.last - start
    ]
    return slab
