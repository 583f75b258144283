"""What the results of a case must be, in float32 on its own device: all of them, or those of some tokens.

The gather reference checks every number where the gathered keys fit in memory, a few images at a time. Where they
don't, some queries and keys are picked, and exact attention is computed for those alone, from the neighbors that
`natten2.window.neighbors` lists.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.cases import Case, Inputs
from natten2.ops import reference
from natten2.window import neighbors

__all__ = ["Expected", "Token", "expect", "expect_everything", "expect_samples"]

# Numbers that the reference gathers at once; it holds a few tensors of this size in float32.
_GATHERED = 2**29
_QUERIES, _KEYS = 256, 8
_QUERIES_AT_ONCE = 512


class Token(NamedTuple):
    """One head of one token: of a query for its output and gradient, of a key for the key's and the value's."""

    batch: int
    head: int
    position: tuple[int, ...]

    @property
    def index(self) -> tuple[int, ...]:
        return self.batch, *self.position, self.head


@dataclass(frozen=True)
class Expected:
    """Right results, and how to pick what they are compared with from an implementation's."""

    values: list[Tensor]
    pick: Callable[[Sequence[Tensor]], list[Tensor]]


def expect(case: Case, inputs: Inputs, with_gradients: bool) -> Expected:
    """What the output, and after it the gradients of `inputs.leaves`, must be."""
    if _gathered_numbers(case) <= _GATHERED:
        return expect_everything(case, inputs, with_gradients)
    return expect_samples(case, inputs, with_gradients, _QUERIES, _KEYS)


def expect_everything(case: Case, inputs: Inputs, with_gradients: bool, dtype: torch.dtype = torch.float32) -> Expected:
    """Every number, by the gather reference in `dtype`."""
    images = max(_GATHERED // _gathered_numbers(case), 1)
    parts = [
        _reference(case, _images(inputs, start, start + images), with_gradients, dtype)
        for start in range(0, case.batch, images)
    ]
    columns = list(zip(*parts, strict=True))
    # The bias is the one input that all images share.
    shared = {1 + index for index, leaf in enumerate(inputs.leaves) if leaf is inputs.rpb}
    values = [
        torch.stack(column).sum(0) if index in shared else torch.cat(column) for index, column in enumerate(columns)
    ]
    return Expected(values, list)


def expect_samples(case: Case, inputs: Inputs, with_gradients: bool, queries: int, keys: int) -> Expected:
    """The output and the gradient of some queries, and both gradients of some keys; not the bias's gradient.

    Raises:
        ValueError: The case has additional keys.
    """
    if case.additional:
        raise ValueError(f"additional keys can't be sampled, got {case.additional} of them in {case.name}")
    picked_queries = _pick(case, case.heads, queries)
    columns = [[], []] if with_gradients else [[]]
    for token in picked_queries:
        for column, value in zip(columns, _query_results(case, inputs, token, with_gradients), strict=True):
            column.append(value)
    values = [torch.stack(column) for column in columns]
    if not with_gradients:
        return Expected(values, lambda results: [_rows(results[0], picked_queries)])

    picked_keys = _pick(case, case.key_heads or case.heads, keys)
    gradients = zip(*(_key_gradients(case, inputs, token) for token in picked_keys), strict=True)
    values.extend(torch.stack(column) for column in gradients)

    def pick(results: Sequence[Tensor]) -> list[Tensor]:
        of_queries = [_rows(tensor, picked_queries) for tensor in results[:2]]
        return of_queries + [_rows(tensor, picked_keys) for tensor in results[2:4]]

    return Expected(values, pick)


def _gathered_numbers(case: Case) -> int:
    """Numbers that the reference gathers for one image, for the keys alone."""
    tokens, slots = prod(case.spatial), prod(case.parameters.kernel_size)
    return tokens * slots * (case.key_heads or case.heads) * case.head_dim


def _images(inputs: Inputs, start: int, stop: int) -> Inputs:
    return Inputs(
        *(tensor if tensor is None or tensor is inputs.rpb else tensor.detach()[start:stop] for tensor in inputs)
    )


def _reference(case: Case, inputs: Inputs, with_gradients: bool, dtype: torch.dtype) -> tuple[Tensor, ...]:
    *tensors, grad_output = (None if tensor is None else tensor.detach().to(dtype) for tensor in inputs)
    output, logsumexp = reference.na_forward(*tensors, *case.parameters)
    if not with_gradients:
        return (output,)
    gradients = reference.na_backward(grad_output, None, *tensors, output, logsumexp, *case.parameters)
    present = (one for one, tensor in zip(gradients, tensors, strict=True) if tensor is not None)
    return output, *present


def _pick(case: Case, heads: int, count: int) -> list[Token]:
    """The two opposite corners, whose windows are shifted the furthest, then random tokens."""
    generator = torch.Generator().manual_seed(0)

    def below(limit: int) -> int:
        return int(torch.randint(limit, (), generator=generator))

    first = Token(0, 0, (0,) * len(case.spatial))
    last = Token(case.batch - 1, heads - 1, tuple(length - 1 for length in case.spatial))
    random = (Token(below(case.batch), below(heads), tuple(map(below, case.spatial))) for _ in range(max(count - 2, 0)))
    return [first, last, *random][:count]


def _rows(tensor: Tensor, tokens: Sequence[Token]) -> Tensor:
    index = torch.tensor([token.index for token in tokens], device=tensor.device)
    return tensor.detach()[tuple(index.unbind(1))]


class _Box(NamedTuple):
    """Some queries of a head, and all keys that any of them sees; both row-major over the axes."""

    queries: tuple[Tensor, ...]  # per axis, the queries' indices
    keys: tuple[Tensor, ...]  # per axis, the keys' indices
    visible: Tensor  # [queries, keys]
    offset: Tensor  # [queries, keys], index of the bias entry in the flattened table


def _query_results(case: Case, inputs: Inputs, token: Token, with_gradients: bool) -> list[Tensor]:
    box = _box(case, [[index] for index in token.position], inputs.query.device)
    key_head = _key_head(case, token.head)
    key, value = (_take(tensor, token.batch, box.keys, key_head) for tensor in (inputs.key, inputs.value))
    query, grad = (_take(tensor, token.batch, box.queries, token.head) for tensor in (inputs.query, inputs.grad_output))
    weights = _scores(case, inputs.rpb, token.head, query, key, box).softmax(-1)
    output = weights @ value
    if not with_gradients:
        return [output[0]]
    grad_scores = weights * (grad @ value.T - (grad * output).sum(-1, keepdim=True))
    return [output[0], (case.parameters.scale * grad_scores @ key)[0]]


def _key_gradients(case: Case, inputs: Inputs, token: Token) -> tuple[Tensor, Tensor]:
    """Gradients of one key and one value, from every query that sees it and all keys that those queries see."""
    device, scale = inputs.query.device, case.parameters.scale
    grad_key = torch.zeros(inputs.key.shape[-1], device=device)
    grad_value = torch.zeros(inputs.value.shape[-1], device=device)
    seeing = [_seeing(case, axis, index) for axis, index in enumerate(token.position)]
    group = case.heads // (case.key_heads or case.heads)
    # The box of an axis's queries is cut along the first axis, so that the scores of one piece fit in memory.
    piece = max(_QUERIES_AT_ONCE // prod(map(len, seeing[1:])), 1)
    for start in range(0, len(seeing[0]), piece):
        box = _box(case, [seeing[0][start : start + piece], *seeing[1:]], device)
        key, value = (_take(tensor, token.batch, box.keys, token.head) for tensor in (inputs.key, inputs.value))
        own = _own_column(box, token.position)
        for head in range(token.head * group, (token.head + 1) * group):
            query, grad = (_take(one, token.batch, box.queries, head) for one in (inputs.query, inputs.grad_output))
            weights = _scores(case, inputs.rpb, head, query, key, box).softmax(-1)
            delta = (grad * (weights @ value)).sum(-1)
            grad_scores = weights[:, own] * (grad @ value[own] - delta)
            grad_key += scale * grad_scores @ query
            grad_value += weights[:, own] @ grad
    return grad_key, grad_value


def _scores(case: Case, rpb: Tensor | None, head: int, query: Tensor, key: Tensor, box: _Box) -> Tensor:
    scores = case.parameters.scale * query @ key.T
    if rpb is not None:
        scores = scores + rpb.detach()[head].float().flatten()[box.offset]
    return scores.masked_fill(~box.visible, -torch.inf)


def _take(tensor: Tensor, batch: int, box: tuple[Tensor, ...], head: int) -> Tensor:
    """`[tokens of the box, channels]` in float32."""
    rows = tensor.detach()[batch].select(-2, head)
    for axis, index in enumerate(box):
        rows = rows.index_select(axis, index)
    return rows.flatten(0, -2).float()


def _key_head(case: Case, head: int) -> int:
    return head // (case.heads // (case.key_heads or case.heads))


def _box(case: Case, queries: Sequence[Sequence[int]], device: torch.device) -> _Box:
    visible = torch.ones(1, 1, dtype=torch.bool, device=device)
    offset = torch.zeros(1, 1, dtype=torch.int64, device=device)
    indices, keys = [], []
    for axis, some in enumerate(queries):
        kernel_size, dilation = case.parameters.kernel_size[axis], case.parameters.dilation[axis]
        windows = [_neighbors(case, axis, query) for query in some]
        start, stop = (torch.tensor(ends)[:, None] for ends in zip(*((w.start, w.stop) for w in windows), strict=True))
        query, key = torch.tensor(some)[:, None], torch.tensor(sorted(set().union(*windows)))
        seen = (key >= start) & (key < stop) & ((key - query) % dilation == 0)
        shift = (key // dilation - query // dilation + kernel_size - 1).clamp(0, 2 * kernel_size - 2)
        visible = _outer(visible, seen.to(device), torch.logical_and)
        offset = _outer(offset * (2 * kernel_size - 1), shift.to(device), torch.add)
        indices.append(query.flatten().to(device))
        keys.append(key.to(device))
    return _Box(tuple(indices), tuple(keys), visible, offset)


def _outer(left: Tensor, right: Tensor, combine: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """Combines `[q0, k0]` and `[q1, k1]` into `[q0 * q1, k0 * k1]`."""
    return combine(left[:, None, :, None], right[None, :, None, :]).flatten(2, 3).flatten(0, 1)


def _own_column(box: _Box, position: tuple[int, ...]) -> int:
    column = 0
    for keys, index in zip(box.keys, position, strict=True):
        column = column * len(keys) + int((keys == index).nonzero())
    return column


def _seeing(case: Case, axis: int, index: int) -> list[int]:
    """The queries that see a key along one axis, by trying all of them."""
    return [query for query in range(case.spatial[axis]) if index in _neighbors(case, axis, query)]


def _neighbors(case: Case, axis: int, query: int) -> range:
    kernel_size, stride, dilation, is_causal = (values[axis] for values in case.parameters[:4])
    return neighbors(query, case.spatial[axis], kernel_size, stride, dilation, is_causal)
