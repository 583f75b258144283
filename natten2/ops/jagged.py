"""The operators on jagged nested tensors: one spatial axis has a length of its own in every entry of the batch.

Entries are computed one after the other, each on a view of the packed values: nothing is padded. Their bounds are read
on the host.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor
from torch.nested._internal.nested_tensor import NestedTensor

from natten2.ops.schemas import LIBRARY, na_backward, na_forward, na_qkv_backward, na_qkv_forward

_NUM_PARAMETERS = 5
_INPUTS = ("query", "key", "value", "rpb", "additional_keys", "additional_values")
_PACKED_INPUTS = ("qkv", "rpb")
_DENSE = ("rpb", "additional_keys", "additional_values")


def _forward(
    names: tuple[str, ...], cls: type, op: Callable, types: Sequence[type], args: Sequence[object], kwargs: object
) -> tuple[Tensor, ...]:
    inputs, parameters = args[:-_NUM_PARAMETERS], args[-_NUM_PARAMETERS:]
    batch = _Batch(names[0], dict(zip(names, inputs, strict=True)), len(parameters[0]))
    results = [op(*entry, *parameters) for entry in batch.entries()]
    return tuple(batch.join(parts) for parts in zip(*results, strict=True))


def _backward(
    names: tuple[str, ...], cls: type, op: Callable, types: Sequence[type], args: Sequence[object], kwargs: object
) -> tuple[Tensor, ...]:
    tensors, parameters = args[:-_NUM_PARAMETERS], args[-_NUM_PARAMETERS:]
    all_names = ("grad_output", "grad_logsumexp", *names, "output", "logsumexp")
    batch = _Batch(names[0], dict(zip(all_names, tensors, strict=True)), len(parameters[0]))
    grads = zip(*(op(*entry, *parameters) for entry in batch.entries()), strict=True)
    return tuple(batch.join_gradients(name, parts) for name, parts in zip(names, grads, strict=True))


class _Batch:
    """How the entries of a batch lie in the packed values.

    Args:
        first: The name of the tensor whose offsets all others share.
        tensors: The operator's tensors, by name and in order.
        rank: How many spatial axes there are.
    """

    def __init__(self, first: str, tensors: dict[str, Tensor | None], rank: int) -> None:
        jagged = {name: x for name, x in tensors.items() if name not in _DENSE and x is not None}
        for name, tensor in jagged.items():
            if not isinstance(tensor, NestedTensor):
                raise TypeError(f"{name} must be a jagged nested tensor, as others are, got {type(tensor).__name__}")
        like = tensors[first]
        self._tensors, self._offsets, self._axis = tensors, like._offsets, like._ragged_idx
        axes = rank + (4 if first == "qkv" else 3)
        if like.dim() != axes or not 1 <= self._axis <= rank:
            raise ValueError(
                f"{first} must have {axes} axes, one of its {rank} spatial ones ragged, got shape {like.shape}"
            )
        for name, tensor in jagged.items():
            if tensor._lengths is not None:
                raise NotImplementedError(f"{name} must be a nested tensor without holes, got one with lengths")
            if tensor._ragged_idx != self._axis or tensor.shape[self._axis] != like.shape[self._axis]:
                raise ValueError(f"{name} must share {first}'s offsets, got shapes {tensor.shape} and {like.shape}")
        for name in _DENSE:
            if isinstance(tensors.get(name), NestedTensor):
                raise NotImplementedError(f"{name} must be a dense tensor, got a nested one")

    def entries(self) -> Iterator[list[Tensor | None]]:
        """The tensors of each entry, as batches of one."""
        for index, (start, end) in enumerate(pairwise(self._offsets.tolist())):
            yield [self._entry(name, tensor, index, start, end) for name, tensor in self._tensors.items()]

    def _entry(self, name: str, tensor: Tensor | None, index: int, start: int, end: int) -> Tensor | None:
        if isinstance(tensor, NestedTensor):
            return tensor._values.narrow(self._axis - 1, start, end - start).unsqueeze(0)
        return tensor if tensor is None or name == "rpb" else tensor[index : index + 1]

    def join(self, parts: Sequence[Tensor]) -> Tensor:
        values = torch.cat([part.squeeze(0) for part in parts], dim=self._axis - 1)
        return NestedTensor(values, offsets=self._offsets, _ragged_idx=self._axis)

    def join_gradients(self, name: str, parts: Sequence[Tensor]) -> Tensor:
        """Of an absent input, parts and whole have no elements."""
        if name == "rpb":
            return torch.stack(parts).sum(0)
        return torch.cat(parts) if name in _DENSE else self.join(parts)


for _op, _rule in (
    (na_forward, partial(_forward, _INPUTS)),
    (na_backward, partial(_backward, _INPUTS)),
    (na_qkv_forward, partial(_forward, _PACKED_INPUTS)),
    (na_qkv_backward, partial(_backward, _PACKED_INPUTS)),
):
    torch.library.register_torch_dispatch(_op._name, NestedTensor, _rule, lib=LIBRARY)
