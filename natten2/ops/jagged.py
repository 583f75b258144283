"""The operators on jagged nested tensors: one spatial axis has a length of its own in every entry of the batch.

Entries are computed one after the other, each on a view of the packed values: nothing is padded. Their bounds are read
on the host.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise

import torch
from torch import Tensor
from torch.nested._internal.nested_tensor import NestedTensor

from natten2.ops.schemas import LIBRARY, na_backward, na_forward

_NUM_INPUTS = 6


def _forward(
    cls: type, op: object, types: Sequence[type], args: Sequence[object], kwargs: object
) -> tuple[Tensor, ...]:
    inputs, parameters = args[:_NUM_INPUTS], args[_NUM_INPUTS:]
    batch = _Batch({"query": inputs[0], "key": inputs[1], "value": inputs[2]}, inputs[3:], len(parameters[0]))
    results = [na_forward(*entry, *parameters) for entry in batch.entries(inputs)]
    return tuple(batch.join(parts) for parts in zip(*results, strict=True))


def _backward(
    cls: type, op: object, types: Sequence[type], args: Sequence[object], kwargs: object
) -> tuple[Tensor, ...]:
    grad_output, grad_logsumexp, *inputs = args[: 2 + _NUM_INPUTS]
    output, logsumexp, *parameters = args[2 + _NUM_INPUTS :]
    jagged = {"query": inputs[0], "key": inputs[1], "value": inputs[2], "grad_output": grad_output, "output": output}
    batch = _Batch({**jagged, "logsumexp": logsumexp}, inputs[3:], len(parameters[0]))
    entries = batch.entries((grad_output, grad_logsumexp, *inputs, output, logsumexp))
    *grads, rpb, additional_keys, additional_values = zip(
        *(na_backward(*entry, *parameters) for entry in entries), strict=True
    )
    return (
        *(batch.join(parts) for parts in grads),
        torch.stack(rpb).sum(0),
        # An absent input's gradients have no elements, one after the other neither.
        torch.cat(additional_keys),
        torch.cat(additional_values),
    )


class _Batch:
    """How the entries of a batch lie in the packed values."""

    def __init__(self, jagged: dict[str, object], dense: Sequence[Tensor | None], rank: int) -> None:
        for name, tensor in jagged.items():
            if not isinstance(tensor, NestedTensor):
                raise TypeError(f"{name} must be a jagged nested tensor, as others are, got {type(tensor).__name__}")
        query = jagged["query"]
        self._offsets, self._axis, self._rpb = query._offsets, query._ragged_idx, dense[0]
        if query.dim() != rank + 3 or not 1 <= self._axis <= rank:
            raise ValueError(
                f"query must have {rank + 3} axes, one of its {rank} spatial ones ragged, got shape {query.shape}"
            )
        for name, tensor in jagged.items():
            if tensor._lengths is not None:
                raise NotImplementedError(f"{name} must be a nested tensor without holes, got one with lengths")
            if tensor._ragged_idx != self._axis or tensor.shape[self._axis] != query.shape[self._axis]:
                raise ValueError(f"{name} must share query's offsets, got shapes {tensor.shape} and {query.shape}")
        for name, tensor in zip(("rpb", "additional_keys", "additional_values"), dense, strict=True):
            if isinstance(tensor, NestedTensor):
                raise NotImplementedError(f"{name} must be a dense tensor, got a nested one")

    def entries(self, tensors: Sequence[Tensor | None]) -> Iterator[list[Tensor | None]]:
        """The tensors of each entry, as batches of one."""
        for index, (start, end) in enumerate(pairwise(self._offsets.tolist())):
            yield [self._entry(tensor, index, start, end) for tensor in tensors]

    def _entry(self, tensor: Tensor | None, index: int, start: int, end: int) -> Tensor | None:
        if isinstance(tensor, NestedTensor):
            return tensor._values.narrow(self._axis - 1, start, end - start).unsqueeze(0)
        return tensor if tensor is None or tensor is self._rpb else tensor[index : index + 1]

    def join(self, parts: Sequence[Tensor]) -> Tensor:
        values = torch.cat([part.squeeze(0) for part in parts], dim=self._axis - 1)
        return NestedTensor(values, offsets=self._offsets, _ragged_idx=self._axis)


torch.library.register_torch_dispatch("natten2::na_forward", NestedTensor, _forward, lib=LIBRARY)
torch.library.register_torch_dispatch("natten2::na_backward", NestedTensor, _backward, lib=LIBRARY)
