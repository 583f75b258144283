"""Rows that neighboring ranks of a process group send each other."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import torch
import torch.distributed as dist
from torch import Tensor

__all__ = ["Exchange", "gather_lengths"]


class Exchange:
    """Sends rows to the previous and the next rank, and receives as many as announced from them.

    Nothing waits until :meth:`wait`. All tensors for one rank travel in one message.

    Args:
        group: The process group, in whose order of ranks the neighbors are.
        to_previous, to_next: What to send, the same number of tensors `[B, rows, ...]` to either side.
        from_previous, from_next: Number of rows to receive, of tensors that are otherwise like those sent.
    """

    def __init__(
        self,
        group: dist.ProcessGroup,
        to_previous: Sequence[Tensor],
        to_next: Sequence[Tensor],
        from_previous: int,
        from_next: int,
    ) -> None:
        rank = dist.get_rank(group)
        self._shapes, self._received, operations = [], [], []
        for peer, sent, rows in ((rank - 1, to_previous, from_previous), (rank + 1, to_next, from_next)):
            shapes = [(tensor.shape[0], rows, *tensor.shape[2:]) for tensor in sent]
            message = torch.cat([tensor.flatten() for tensor in sent])
            buffer = message.new_empty(sum(prod(shape) for shape in shapes))
            self._shapes.append(shapes)
            self._received.append(buffer)
            for operation, tensor in ((dist.isend, message), (dist.irecv, buffer)):
                if tensor.numel() > 0:
                    operations.append(dist.P2POp(operation, tensor, dist.get_global_rank(group, peer), group))
        # The operations keep the messages alive until they are sent.
        self._operations = operations
        self._works = dist.batch_isend_irecv(operations) if operations else []

    def wait(self) -> tuple[list[Tensor], list[Tensor]]:
        """What the previous and the next rank sent; at the outer ends of the axis, tensors without rows."""
        for work in self._works:
            work.wait()
        self._works, self._operations = [], []
        previous, following = (
            [part.reshape(shape) for part, shape in zip(_split(buffer, shapes), shapes, strict=True)]
            for buffer, shapes in zip(self._received, self._shapes, strict=True)
        )
        return previous, following


def _split(buffer: Tensor, shapes: Sequence[tuple[int, ...]]) -> Sequence[Tensor]:
    return buffer.split([prod(shape) for shape in shapes])


def gather_lengths(length: int, device: torch.device, group: dist.ProcessGroup) -> tuple[int, ...]:
    """The lengths of all ranks' shards."""
    lengths = torch.empty(dist.get_world_size(group), dtype=torch.int64, device=device)
    dist.all_gather(list(lengths.split(1)), torch.tensor([length], device=device), group=group)
    return tuple(lengths.tolist())
