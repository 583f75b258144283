"""Device code of the unfused pair: each program owns a block of rows, and visits their partners one by one.

Every rank runs as three axes, and every sum has one owner, or parts that are added up in order.
"""

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from natten2.ops.triton.geometry import key_bounds, query_bounds

__all__ = [
    "Grid",
    "Rows",
    "Window",
    "additional_sum_kernel",
    "offset_kernel",
    "score_kernel",
    "sum_kernel",
    "transposed_sum_kernel",
]


class Window(NamedTuple):
    """What the kernels are compiled for, along three axes."""

    kernel_size: tuple[int, ...]
    stride: tuple[int, ...]
    is_causal: tuple[bool, ...]
    block: int  # rows of a program
    channels: int  # the power of two that registers hold


class Grid(NamedTuple):
    """The token grid."""

    lengths: tuple[int, ...]
    dilation: tuple[int, ...]
    tokens: int
    heads: int
    group: int  # query heads per key head
    channels: int
    additional: int


class Rows(NamedTuple):
    """A tensor `[B, *axes, heads, numbers]` with contiguous numbers, or `[B, N, heads, numbers]`."""

    data: Tensor
    batch: int
    axes: tuple[int, ...]
    head: int


@triton.jit
def _find(index, grid):
    """Group and position of a token along each axis, and the length of its group."""
    groups, positions, lengths = (), (), ()
    for axis in tl.static_range(2, -1, -1):
        along = index % grid.lengths[axis]
        index = index // grid.lengths[axis]
        gap = grid.dilation[axis]
        groups = (along % gap,) + groups
        positions = (along // gap,) + positions
        lengths = ((grid.lengths[axis] + gap - 1 - along % gap) // gap,) + lengths
    return groups, positions, lengths


@triton.jit
def _offset(rows, groups, positions, grid):
    """Where tokens lie, in elements after the first one."""
    result = (groups[0] + positions[0] * grid.dilation[0]).to(tl.int64) * rows.axes[0]
    for axis in tl.static_range(1, 3):
        result += (groups[axis] + positions[axis] * grid.dilation[axis]).to(tl.int64) * rows.axes[axis]
    return result


@triton.jit
def _locate(rows, batch, head):
    return rows.data + batch.to(tl.int64) * rows.batch + head.to(tl.int64) * rows.head


@triton.jit
def _load(pointer, offset, exists, grid, WINDOW: tl.constexpr):
    """Rows in float32; zeros for those that don't exist."""
    channel = tl.arange(0, WINDOW.channels)
    mask = exists[:, None] & (channel < grid.channels)[None, :]
    return tl.load(pointer + offset[:, None] + channel[None, :], mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _store(pointer, offset, exists, numbers, grid, WINDOW: tl.constexpr):
    channel = tl.arange(0, WINDOW.channels)
    mask = exists[:, None] & (channel < grid.channels)[None, :]
    tl.store(pointer + offset[:, None] + channel[None, :], numbers.to(pointer.dtype.element_ty), mask=mask)


@triton.jit
def _no_rows(WINDOW: tl.constexpr):
    BLOCK: tl.constexpr = WINDOW.block
    CHANNELS: tl.constexpr = WINDOW.channels
    return tl.zeros((BLOCK, CHANNELS), tl.float32)


@triton.jit
def _same(number, WINDOW: tl.constexpr):
    """One number for every row."""
    BLOCK: tl.constexpr = WINDOW.block
    return tl.zeros((BLOCK,), tl.int64) + number


@triton.jit
def _own(grid, HEADS_OF_KEYS: tl.constexpr, WINDOW: tl.constexpr):
    """A program's rows: batch, head, whether each exists, and where it is."""
    heads = grid.heads
    if HEADS_OF_KEYS:
        heads = grid.heads // grid.group
    blocks = tl.cdiv(grid.tokens, WINDOW.block)
    program = tl.program_id(0)
    index = program % blocks * WINDOW.block + tl.arange(0, WINDOW.block)
    head, batch = program // blocks % heads, program // blocks // heads
    exists = index < grid.tokens
    groups, positions, lengths = _find(tl.minimum(index, grid.tokens - 1), grid)
    return batch, head, exists, groups, positions, lengths


@triton.jit
def _partner(slot, positions, lengths, WINDOW: tl.constexpr):
    """The key in a slot, whether it is seen, and its offset's index in a bias."""
    partners, seen, offset = (), positions[0] >= 0, positions[0] * 0
    rest = slot
    for axis in tl.static_range(2, -1, -1):
        step = rest % WINDOW.kernel_size[axis]
        rest = rest // WINDOW.kernel_size[axis]
        begin, end = key_bounds(
            positions[axis], lengths[axis], WINDOW.kernel_size[axis], WINDOW.stride[axis], WINDOW.is_causal[axis]
        )
        seen = seen & (begin + step < end)
        partners = (tl.minimum(begin + step, end - 1),) + partners
    for axis in tl.static_range(3):
        entry = partners[axis] - positions[axis] + (WINDOW.kernel_size[axis] - 1)
        offset = offset * (2 * WINDOW.kernel_size[axis] - 1) + entry
    return partners, seen, offset


@triton.jit
def score_kernel(queries, keys, additional, rpb, scores, grid, scale, hidden, WINDOW: tl.constexpr):
    """Writes scores: the products of queries with the keys that they see."""
    SLOTS: tl.constexpr = WINDOW.kernel_size[0] * WINDOW.kernel_size[1] * WINDOW.kernel_size[2]
    OFFSETS: tl.constexpr = (
        (2 * WINDOW.kernel_size[0] - 1) * (2 * WINDOW.kernel_size[1] - 1) * (2 * WINDOW.kernel_size[2] - 1)
    )
    batch, head, exists, groups, positions, lengths = _own(grid, False, WINDOW)
    query = _load(_locate(queries, batch, head), _offset(queries, groups, positions, grid), exists, grid, WINDOW)
    out = _locate(scores, batch, head) + _offset(scores, groups, positions, grid)
    for slot in range(SLOTS):
        partners, seen, offset = _partner(slot, positions, lengths, WINDOW)
        place = _offset(keys, groups, partners, grid)
        key = _load(_locate(keys, batch, head // grid.group), place, exists & seen, grid, WINDOW)
        score = tl.sum(query * key, 1) * scale
        if rpb is not None:
            score += tl.load(rpb + head * OFFSETS + offset, mask=exists, other=0.0)
        score = tl.where(seen, score, hidden)
        tl.store(out + slot, score.to(scores.data.dtype.element_ty), mask=exists)
    if additional is not None:
        for n in range(grid.additional):
            place = _same(n, WINDOW) * additional.axes[0]
            key = _load(_locate(additional, batch, head // grid.group), place, exists, grid, WINDOW)
            score = tl.sum(query * key, 1) * scale
            tl.store(out + SLOTS + n, score.to(scores.data.dtype.element_ty), mask=exists)


@triton.jit
def sum_kernel(scores, keys, additional, outputs, grid, scale, WINDOW: tl.constexpr):
    """Writes one row for each query: the sum of the keys that it sees under its scores."""
    SLOTS: tl.constexpr = WINDOW.kernel_size[0] * WINDOW.kernel_size[1] * WINDOW.kernel_size[2]
    batch, head, exists, groups, positions, lengths = _own(grid, False, WINDOW)
    given = _locate(scores, batch, head) + _offset(scores, groups, positions, grid)
    total = _no_rows(WINDOW)
    for slot in range(SLOTS):
        partners, seen, _ = _partner(slot, positions, lengths, WINDOW)
        seen = seen & exists
        place = _offset(keys, groups, partners, grid)
        key = _load(_locate(keys, batch, head // grid.group), place, seen, grid, WINDOW)
        total += tl.load(given + slot, mask=seen, other=0.0).to(tl.float32)[:, None] * key
    if additional is not None:
        for n in range(grid.additional):
            place = _same(n, WINDOW) * additional.axes[0]
            key = _load(_locate(additional, batch, head // grid.group), place, exists, grid, WINDOW)
            total += tl.load(given + SLOTS + n, mask=exists, other=0.0).to(tl.float32)[:, None] * key
    place = _offset(outputs, groups, positions, grid)
    _store(_locate(outputs, batch, head), place, exists, total * scale, grid, WINDOW)


@triton.jit
def transposed_sum_kernel(scores, queries, outputs, grid, scale, WINDOW: tl.constexpr):
    """Writes one row for each key: the sum of the queries that see it."""
    batch, head, exists, groups, positions, lengths = _own(grid, True, WINDOW)
    begins, ends, counts = (), (), ()
    for axis in tl.static_range(3):
        begin, end = query_bounds(
            positions[axis], lengths[axis], WINDOW.kernel_size[axis], WINDOW.stride[axis], WINDOW.is_causal[axis]
        )
        begins = begins + (begin,)
        ends = ends + (end,)
        counts = counts + (tl.max(end - begin),)
    total = _no_rows(WINDOW)
    for i in range(grid.group * counts[0] * counts[1] * counts[2]):
        member = head * grid.group + i // (counts[0] * counts[1] * counts[2])
        steps = (i // counts[2] // counts[1] % counts[0], i // counts[2] % counts[1], i % counts[2])
        sees, slot, partners = exists, positions[0] * 0, ()
        for axis in tl.static_range(3):
            query = begins[axis] + steps[axis]
            sees = sees & (query < ends[axis])
            query = tl.minimum(query, ends[axis] - 1)
            begin, _ = key_bounds(
                query, lengths[axis], WINDOW.kernel_size[axis], WINDOW.stride[axis], WINDOW.is_causal[axis]
            )
            slot = slot * WINDOW.kernel_size[axis] + positions[axis] - begin
            partners = partners + (query,)
        weight = tl.load(
            _locate(scores, batch, member) + _offset(scores, groups, partners, grid) + slot, mask=sees, other=0.0
        )
        place = _offset(queries, groups, partners, grid)
        row = _load(_locate(queries, batch, member), place, sees, grid, WINDOW)
        total += weight.to(tl.float32)[:, None] * row
    place = _offset(outputs, groups, positions, grid)
    _store(_locate(outputs, batch, head), place, exists, total * scale, grid, WINDOW)


@triton.jit
def additional_sum_kernel(scores, queries, sums, grid, scale, WINDOW: tl.constexpr):
    """Sums queries under the scores of an additional key, in parts: `sums` is `[parts, B, N, key heads, channels]`."""
    SLOTS: tl.constexpr = WINDOW.kernel_size[0] * WINDOW.kernel_size[1] * WINDOW.kernel_size[2]
    program, part = tl.program_id(0), tl.program_id(1)
    heads = grid.heads // grid.group
    head, n, batch = program % heads, program // heads % grid.additional, program // heads // grid.additional
    blocks = tl.cdiv(grid.tokens, WINDOW.block)
    CHANNELS: tl.constexpr = WINDOW.channels
    total = tl.zeros((CHANNELS,), tl.float32)
    for i in range(part, grid.group * blocks, tl.num_programs(1)):
        member = head * grid.group + i // blocks
        index = i % blocks * WINDOW.block + tl.arange(0, WINDOW.block)
        exists = index < grid.tokens
        groups, positions, _ = _find(tl.minimum(index, grid.tokens - 1), grid)
        given = _locate(scores, batch, member) + _offset(scores, groups, positions, grid)
        weight = tl.load(given + SLOTS + n, mask=exists, other=0.0).to(tl.float32)
        place = _offset(queries, groups, positions, grid)
        row = _load(_locate(queries, batch, member), place, exists, grid, WINDOW)
        total += tl.sum(weight[:, None] * row, 0)
    channel = tl.arange(0, WINDOW.channels)
    first = (part.to(tl.int64) * tl.num_programs(0) + program) * grid.channels
    tl.store(sums + first + channel, total * scale, mask=channel < grid.channels)


@triton.jit
def offset_kernel(scores, sums, grid, batches, WINDOW: tl.constexpr):
    """Sums the scores of every pair with one offset, in parts: `sums` is `[parts, heads, offsets]`."""
    OFFSETS: tl.constexpr = (
        (2 * WINDOW.kernel_size[0] - 1) * (2 * WINDOW.kernel_size[1] - 1) * (2 * WINDOW.kernel_size[2] - 1)
    )
    program, part = tl.program_id(0), tl.program_id(1)
    head, offset = program // OFFSETS, program % OFFSETS
    blocks = tl.cdiv(grid.tokens, WINDOW.block)
    BLOCK: tl.constexpr = WINDOW.block
    total = tl.zeros((BLOCK,), tl.float32)
    for i in range(part, batches * blocks, tl.num_programs(1)):
        index = i % blocks * WINDOW.block + tl.arange(0, WINDOW.block)
        seen = index < grid.tokens
        groups, positions, lengths = _find(tl.minimum(index, grid.tokens - 1), grid)
        rest, slot, stride = offset, positions[0] * 0, 1
        for axis in tl.static_range(2, -1, -1):
            key = positions[axis] + rest % (2 * WINDOW.kernel_size[axis] - 1) - (WINDOW.kernel_size[axis] - 1)
            rest = rest // (2 * WINDOW.kernel_size[axis] - 1)
            begin, end = key_bounds(
                positions[axis], lengths[axis], WINDOW.kernel_size[axis], WINDOW.stride[axis], WINDOW.is_causal[axis]
            )
            seen = seen & (key >= begin) & (key < end)
            slot += (key - begin) * stride
            stride = stride * WINDOW.kernel_size[axis]
        given = _locate(scores, head * 0 + i // blocks, head) + _offset(scores, groups, positions, grid)
        total += tl.load(given + slot, mask=seen, other=0.0).to(tl.float32)
    tl.store(sums + part * tl.num_programs(0) + program, tl.sum(total))
