"""How PyTorch's `DTensor` may shard the operators: by batch, by heads, or not at all.

A tensor that is sharded in another way is redistributed; over a sharded spatial axis, `natten2.distributed` exchanges
no more than halos.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from math import prod

from torch import Tensor
from torch.distributed.tensor import Partial, Placement, Replicate, Shard
from torch.distributed.tensor.experimental import register_sharding

from natten2.ops.schemas import na_backward, na_forward, na_qkv_backward, na_qkv_forward

_Sharding = tuple[list[Placement | None], list[Placement | None]]
_NUM_INPUTS = 6
_NO_PARAMETERS = (None,) * 5


@register_sharding(na_forward)
def _na_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    rpb: Tensor | None,
    additional_keys: Tensor | None,
    additional_values: Tensor | None,
    *parameters: object,
) -> list[_Sharding]:
    inputs = (query, key, value, rpb, additional_keys, additional_values)
    return [
        ([outer, outer], [*_present(placements, inputs), *_NO_PARAMETERS])
        for outer, placements in _shardings(query, key)
    ]


@register_sharding(na_backward)
def _na_backward(grad_output: Tensor, grad_logsumexp: Tensor | None, *args: object) -> list[_Sharding]:
    inputs = args[:_NUM_INPUTS]
    shardings = []
    for outer, placements in _shardings(*inputs[:2]):
        grads = _grads(outer, placements, inputs)
        grad_lse = None if grad_logsumexp is None else outer
        shardings.append((grads, [outer, grad_lse, *_present(placements, inputs), outer, outer, *_NO_PARAMETERS]))
    return shardings


@register_sharding(na_qkv_forward)
def _na_qkv_forward(qkv: Tensor, rpb: Tensor | None, *parameters: object) -> list[_Sharding]:
    return [
        ([outer, outer], [*_present(placements, (qkv, rpb)), *_NO_PARAMETERS])
        for outer, placements in _packed_shardings(qkv)
    ]


@register_sharding(na_qkv_backward)
def _na_qkv_backward(
    grad_output: Tensor, grad_logsumexp: Tensor | None, qkv: Tensor, rpb: Tensor | None, *args: object
) -> list[_Sharding]:
    shardings = []
    for outer, placements in _packed_shardings(qkv):
        grads = _grads(outer, placements, (qkv, rpb))
        grad_lse = None if grad_logsumexp is None else outer
        inputs = [outer, grad_lse, *_present(placements, (qkv, rpb)), outer, outer, *_NO_PARAMETERS]
        shardings.append((grads, inputs))
    return shardings


def _grads(outer: Placement, placements: Sequence[Placement], inputs: Sequence[object]) -> list[Placement]:
    """What every rank holds in full gets a share of its gradient from each; an absent input's has no elements."""
    grads = [Partial() if placement.is_replicate() and outer.is_shard() else placement for placement in placements]
    return [Replicate() if x is None else grad for x, grad in zip(inputs, grads, strict=True)]


def _present(placements: Sequence[Placement], inputs: Sequence[object]) -> list[Placement | None]:
    return [None if x is None else placement for x, placement in zip(inputs, placements, strict=True)]


def _shardings(query: Tensor, key: Tensor) -> list[tuple[Placement, list[Placement]]]:
    """What one axis of the mesh may do: the placement of the output and its like, and those of the six inputs."""
    whole, heads = Replicate(), Shard(len(query.shape) - 2)
    shardings = [
        (whole, [whole] * _NUM_INPUTS),
        (Shard(0), [Shard(0), Shard(0), Shard(0), whole, Shard(0), Shard(0)]),
    ]
    if _divides(query.mesh.shape, key.shape[-2]):
        shardings.append((heads, [heads, heads, heads, Shard(0), Shard(2), Shard(2)]))
    elif key.shape[-2] == 1 and _divides(query.mesh.shape, query.shape[-2]):
        # All query heads read the one key head.
        shardings.append((heads, [heads, whole, whole, Shard(0), whole, whole]))
    return shardings


def _packed_shardings(qkv: Tensor) -> list[tuple[Placement, list[Placement]]]:
    """The same for one tensor `[B, *S, 3, H, D]` and a bias."""
    whole = Replicate()
    shardings = [(whole, [whole, whole]), (Shard(0), [Shard(0), whole])]
    if _divides(qkv.mesh.shape, qkv.shape[-2]):
        shardings.append((Shard(len(qkv.shape) - 3), [Shard(len(qkv.shape) - 2), Shard(0)]))
    return shardings


def _divides(mesh: Sequence[int], heads: int) -> bool:
    """Whether heads fall on ranks evenly, in whole groups of those that share a key head, wherever there are enough.

    A rule is asked for one axis of the mesh, and may then be applied to several at once.
    """
    numbers = {prod(sizes) for count in range(1, len(mesh) + 1) for sizes in combinations(mesh, count)}
    possible = [number for number in numbers if number <= heads]
    return bool(possible) and all(heads % number == 0 for number in possible)
