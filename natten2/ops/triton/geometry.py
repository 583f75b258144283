"""Device code of the geometry: windows, tiles of the token grid, and the boxes that a tile visits.

A program *owns* a tile of tokens and visits their *partners*: in the forward pass and in the query's gradient it owns
queries and visits keys; in the key's and value's gradient it owns keys and visits queries. Either way a token's
partners are an interval along each axis, `natten2.window.key_bounds` or `query_bounds`, whose ends both grow with the
token's position. So a tile's partners lie between its first token's begin and its last token's end, the *outer* bounds,
and those that all of its tokens see between the last token's begin and the first token's end, the *inner* bounds.

Per-axis values are tuples, so that one source serves every rank. Positions count inside a dilation group.
"""

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

__all__ = ["Channels", "Inputs", "Operand", "Plan"]


class Channels(NamedTuple):
    """Channels of a token."""

    count: int
    block: int  # the power of two that registers hold; matrix instructions take 16 or more


class Plan(NamedTuple):
    """What a kernel is compiled for; a batch, a size, or a dilation is not among it."""

    kernel_size: tuple[int, ...]
    stride: tuple[int, ...]
    is_causal: tuple[bool, ...]
    owns_keys: bool
    head_dim: Channels
    value_dim: Channels
    align: int  # elements that divide every stride
    index: tl.dtype  # of offsets inside a batch entry
    precision: str  # of products, see `natten2.ops.triton.arithmetic`
    tile: tuple[int, ...]  # tokens that a program owns, along each axis
    box: tuple[int, ...]  # partners that are numbered through, along each axis
    volume: int  # of a box
    block_m: int  # tokens of a tile
    block_n: int  # partners per step


class Operand(NamedTuple):
    """A tensor of tokens as kernels take it. Strides are in units of `Plan.align` elements and go through `opaque`."""

    data: Tensor
    batch_stride: int
    token_strides: tuple[int, ...]  # along each axis of the token grid
    head_stride: int


class Inputs(NamedTuple):
    """The operator's tensors, as forward and backward kernels take them."""

    query: Operand
    key: Operand
    value: Operand
    rpb: Operand | None  # an offset's strides, from its second dimension on, as tokens' ones
    additional_keys: Operand | None
    additional_values: Operand | None


class Tile(NamedTuple):
    """Where a tile lies; every entry has one value per axis."""

    group: tuple  # residue class
    first: tuple  # position of the first token
    length: tuple  # positions in the group
    gap: tuple  # tokens from one position to the next


class Owned(NamedTuple):
    """The tokens that a program owns."""

    tile: Tile
    batch: int
    head: int
    positions: tuple  # along each axis; a token that doesn't exist has the position of one that does
    exists: tl.tensor
    begins: tuple  # where each token's partners begin along each axis
    ends: tuple


class Boxes(NamedTuple):
    """The boxes that cover a tile's partners, visited in steps; every entry but the totals has one value per axis."""

    begin: tuple  # position where box 0 begins
    count: tuple
    inner_first: tuple  # first of the boxes that lie within the inner bounds
    inner_count: tuple
    inner_total: int
    outer_total: int


@triton.jit
def transparent(number):
    """The number that `natten2.ops.triton.launch.opaque` hid from specialization."""
    return number >> 2


@triton.jit
def key_bounds(position, length, KERNEL_SIZE: tl.constexpr, STRIDE: tl.constexpr, IS_CAUSAL: tl.constexpr):
    """The keys that a query sees: `natten2.window.key_bounds`."""
    first = position // STRIDE * STRIDE
    if IS_CAUSAL:
        begin = tl.maximum(tl.minimum(first + (STRIDE - 1), length - 1) - (KERNEL_SIZE - 1), 0)
        end = position + 1
    else:
        leader = tl.minimum(first + STRIDE // 2, length - 1)
        begin = tl.minimum(tl.maximum(leader - KERNEL_SIZE // 2, 0), length - KERNEL_SIZE)
        end = begin + KERNEL_SIZE
    return begin, end


@triton.jit
def query_bounds(position, length, KERNEL_SIZE: tl.constexpr, STRIDE: tl.constexpr, IS_CAUSAL: tl.constexpr):
    """The queries that see a key: `natten2.window.query_bounds`."""
    if IS_CAUSAL:
        begin = position
        end = tl.minimum((position + KERNEL_SIZE) // STRIDE * STRIDE, length)
        end = tl.where(position + KERNEL_SIZE >= length, length, end)
    else:
        first_leader = tl.where(position < KERNEL_SIZE, 0, position - (KERNEL_SIZE - 1) // 2)
        last_leader = tl.where(position >= length - KERNEL_SIZE, length - 1, position + KERNEL_SIZE // 2)
        begin = (first_leader + (STRIDE - 1 - STRIDE // 2)) // STRIDE * STRIDE
        end = tl.minimum(((last_leader - STRIDE // 2) // STRIDE + 1) * STRIDE, length)
        end = tl.where(last_leader >= length - 1, length, end)
    return begin, end


@triton.jit
def partner_bounds(position, length, AXIS: tl.constexpr, PLAN: tl.constexpr):
    """The partners of a token along one axis, as a half-open interval of positions."""
    if PLAN.owns_keys:
        begin, end = query_bounds(position, length, PLAN.kernel_size[AXIS], PLAN.stride[AXIS], PLAN.is_causal[AXIS])
    else:
        begin, end = key_bounds(position, length, PLAN.kernel_size[AXIS], PLAN.stride[AXIS], PLAN.is_causal[AXIS])
    return begin, end


@triton.jit
def digits(index, SHAPE: tl.constexpr):
    """Row-major coordinates in a shape; the first one is not cut off."""
    result = ()
    for axis in tl.static_range(len(SHAPE) - 1, 0, -1):
        result = (index % SHAPE[axis],) + result
        index = index // SHAPE[axis]
    return (index,) + result


@triton.jit
def find_tile(index, lengths, dilation, PLAN: tl.constexpr):
    """Tile number `index`, row-major over the axes, by dilation group along each; and what is left of the index."""
    group, first, length, gaps = (), (), (), ()
    for axis in tl.static_range(len(PLAN.tile) - 1, -1, -1):
        gap = transparent(dilation[axis])
        size = transparent(lengths[axis])
        tiles = tl.cdiv(tl.cdiv(size, gap), PLAN.tile[axis])
        along = index % (tiles * gap)
        index = index // (tiles * gap)
        group = ((along // tiles).to(PLAN.index),) + group
        first = ((along % tiles * PLAN.tile[axis]).to(PLAN.index),) + first
        length = (((size + gap - 1 - along // tiles) // gap).to(PLAN.index),) + length
        gaps = (gap,) + gaps
    return Tile(group, first, length, gaps), index


@triton.jit
def whole_grid(lengths, PLAN: tl.constexpr):
    """The token grid as one dilation group."""
    zero, one, length = (), (), ()
    for axis in tl.static_range(len(PLAN.tile)):
        size = transparent(lengths[axis]).to(PLAN.index)
        length = length + (size,)
        zero = zero + (size * 0,)
        one = one + (size * 0 + 1,)
    return Tile(zero, zero, length, one)


@triton.jit
def coordinates(index, tile):
    """Row-major coordinates in a dilation group."""
    result = ()
    for axis in tl.static_range(len(tile.length) - 1, -1, -1):
        result = (index % tile.length[axis],) + result
        index = index // tile.length[axis]
    return result


@triton.jit
def is_empty(tile):
    """Whether a tile starts past the end of its group, which may be one shorter than the longest."""
    empty = tile.first[0] >= tile.length[0]
    for axis in tl.static_range(1, len(tile.first)):
        empty = empty | (tile.first[axis] >= tile.length[axis])
    return empty


@triton.jit
def own(tile, batch, head, PLAN: tl.constexpr):
    """A tile's tokens; one that doesn't exist stands in for the last that does."""
    TILE: tl.constexpr = PLAN.tile
    local = digits(tl.arange(0, PLAN.block_m).to(PLAN.index), TILE)
    exists = tl.arange(0, PLAN.block_m) >= 0
    positions, begins, ends = (), (), ()
    for axis in tl.static_range(len(PLAN.tile)):
        length = tile.length[axis]
        position = tile.first[axis] + local[axis]
        exists = exists & (position < length)
        position = tl.minimum(position, length - 1)
        begin, end = partner_bounds(position, length, axis, PLAN)
        positions = positions + (position,)
        begins = begins + (begin,)
        ends = ends + (end,)
    return Owned(tile, batch, head, positions, exists, begins, ends)


@triton.jit
def cover(tile, PLAN: tl.constexpr):
    """The boxes that cover a tile's partners, from the outer begin on; where one takes many steps, all are outer."""
    begins, count, inner_first, inner_count = (), (), (), ()
    total = tile.first[0] * 0 + 1
    inner_total = total
    for axis in tl.static_range(len(PLAN.tile)):
        length, side = tile.length[axis], PLAN.box[axis]
        last = tl.minimum(tile.first[axis] + (PLAN.tile[axis] - 1), length - 1)
        begin, inner_end = partner_bounds(tile.first[axis], length, axis, PLAN)
        inner_begin, end = partner_bounds(last, length, axis, PLAN)
        boxes = tl.cdiv(end - begin, side)
        inner = tl.cdiv(inner_begin - begin, side)
        inner_boxes = tl.maximum((inner_end - begin) // side - inner, 0)
        if PLAN.volume != PLAN.block_n:
            inner_boxes = inner_boxes * 0
        begins = begins + (begin,)
        count = count + (boxes,)
        inner_first = inner_first + (inner,)
        inner_count = inner_count + (inner_boxes,)
        total = total * boxes
        inner_total = inner_total * inner_boxes
    return Boxes(begins, count, inner_first, inner_count, inner_total, total - inner_total)


@triton.jit
def inner_box(index, boxes):
    """The coordinates of the box with this index among those within the inner bounds."""
    result = ()
    for axis in tl.static_range(len(boxes.count) - 1, -1, -1):
        if axis > 0:
            result = (boxes.inner_first[axis] + index % boxes.inner_count[axis],) + result
            index = index // boxes.inner_count[axis]
        else:
            result = (boxes.inner_first[axis] + index,) + result
    return result


@triton.jit
def outer_box(index, boxes):
    """The coordinates of the box with this index among those not within the inner bounds.

    They are ordered by the first axis along which they are outside: along it they skip the inner boxes, along earlier
    axes they are inner ones, and along later axes they are any.
    """
    full = boxes.inner_total + boxes.outer_total  # boxes over this axis and the later ones
    outside = index < 0
    result = ()
    for axis in tl.static_range(len(boxes.count)):
        count, skip = boxes.count[axis], boxes.inner_count[axis]
        full = full // count
        inner = _product_after(boxes.inner_count, axis)
        border = (count - skip) * full
        ring = tl.maximum(full - inner, 1)
        is_border = index < border
        any_or_border = outside | is_border
        divisor = tl.where(any_or_border, full, ring)
        index = tl.where(any_or_border, index, index - border)
        coordinate = index // divisor
        index = index % divisor
        shift = tl.where(coordinate >= boxes.inner_first[axis], skip, 0)
        coordinate += tl.where(outside, 0, tl.where(is_border, shift, boxes.inner_first[axis]))
        outside = any_or_border
        result = result + (coordinate,)
    return result


@triton.jit
def _product_after(values, AXIS: tl.constexpr):
    result = values[0] * 0 + 1
    for axis in tl.static_range(AXIS + 1, len(values)):
        result = result * values[axis]
    return result


@triton.jit
def divide_steps(boxes, PLAN: tl.constexpr):
    """Where a part's steps through inner boxes begin, where those through outer ones do, and where these end.

    Steps through all boxes of a tile go first through the inner ones; each of its programs takes a part of them.
    """
    part, parts = tl.program_id(1), tl.num_programs(1)
    steps = boxes.inner_total + boxes.outer_total * (PLAN.volume // PLAN.block_n + (PLAN.volume % PLAN.block_n > 0))
    begin, end = steps * part // parts, steps * (part + 1) // parts
    return begin, tl.maximum(begin, tl.minimum(end, boxes.inner_total)), end


@triton.jit
def step_tokens(step, boxes, tile, KIND: tl.constexpr, PLAN: tl.constexpr):
    """The positions of a step's partners, and whether they exist; one that doesn't lies far outside.

    The kind says in which boxes this step is: "inner", "outer", or "any".
    """
    CHUNKS: tl.constexpr = PLAN.volume // PLAN.block_n + (PLAN.volume % PLAN.block_n > 0)
    flat = tl.arange(0, PLAN.block_n)
    if KIND == "inner":
        box = inner_box(step, boxes)
    else:
        outer = tl.maximum(step - boxes.inner_total, 0)
        box = outer_box(outer // CHUNKS, boxes)
        flat += outer % CHUNKS * PLAN.block_n
        if KIND == "any" and CHUNKS == 1:
            box = select(step < boxes.inner_total, inner_box(step, boxes), box)
    BOX: tl.constexpr = PLAN.box
    local = digits(flat.to(PLAN.index), BOX)
    exists = flat < PLAN.volume
    positions = ()
    for axis in tl.static_range(len(PLAN.box)):
        position = boxes.begin[axis] + box[axis] * PLAN.box[axis] + local[axis]
        if axis == 0:
            position = tl.where(flat < PLAN.volume, position, tile.length[0] + PLAN.box[0])
        exists = exists & (position < tile.length[axis])
        positions = positions + (position,)
    return positions, exists


@triton.jit
def select(condition, left, right):
    """`tl.where` of tuples."""
    result = ()
    for axis in tl.static_range(len(left)):
        result = result + (tl.where(condition, left[axis], right[axis]),)
    return result


@triton.jit
def visibility(owned, positions):
    """Whether owned token `i` meets partner `j`, as `[tokens, partners]`."""
    result = (positions[0][None, :] >= owned.begins[0][:, None]) & (positions[0][None, :] < owned.ends[0][:, None])
    for axis in tl.static_range(1, len(positions)):
        result = result & (positions[axis][None, :] >= owned.begins[axis][:, None])
        result = result & (positions[axis][None, :] < owned.ends[axis][:, None])
    return result


@triton.jit
def find_partners(step, boxes, owned, KIND: tl.constexpr, PLAN: tl.constexpr):
    """The positions of a step's partners, whether they exist, and `visibility`; for "inner", `None` says all are."""
    positions, exists = step_tokens(step, boxes, owned.tile, KIND, PLAN)
    if KIND == "inner":
        visible, exists = None, None
    else:
        visible = visibility(owned, positions)
    return positions, exists, visible


@triton.jit
def locate(operand, batch, head, ALIGN: tl.constexpr):
    """A pointer to a head of the first token."""
    offset = batch.to(tl.int64) * transparent(operand.batch_stride)
    offset += head.to(tl.int64) * transparent(operand.head_stride)
    return operand.data + offset * ALIGN


@triton.jit
def offsets(operand, tile, positions, ALIGN: tl.constexpr):
    """Where tokens of a dilation group lie, in elements from `locate`'s pointer."""
    first, result = tile.group[0] * 0, positions[0] * 0
    for axis in tl.static_range(len(positions)):
        stride = transparent(operand.token_strides[axis])
        first += tile.group[axis] * stride
        result += positions[axis] * (tile.gap[axis] * stride)
    return (first + result) * ALIGN


@triton.jit
def load_tokens(operand, tile, batch, head, positions, exists, DIM: tl.constexpr, PLAN: tl.constexpr):
    """Channels of tokens as `[tokens, channels]`: `DIM` says which; `exists` is `None` where all tokens do."""
    ALIGN: tl.constexpr = PLAN.align
    return load_rows(locate(operand, batch, head, ALIGN), offsets(operand, tile, positions, ALIGN), exists, DIM, PLAN)


@triton.jit
def load_scalars(operand, tile, batch, head, positions, exists):
    """One number for each token; `exists` is `None` where all of them do."""
    pointers = locate(operand, batch, head, 1) + offsets(operand, tile, positions, 1)
    if exists is None:
        result = tl.load(pointers)
    else:
        result = tl.load(pointers, mask=exists, other=0.0)
    return result


@triton.jit
def load_additional(operand, batch, head, tokens, exists, DIM: tl.constexpr, PLAN: tl.constexpr):
    """`load_tokens` of additional keys or values."""
    ALIGN: tl.constexpr = PLAN.align
    rows = tokens * (transparent(operand.token_strides[0]) * ALIGN)
    return load_rows(locate(operand, batch, head, ALIGN), rows, exists, DIM, PLAN)


@triton.jit
def store_tokens(operand, owned, batch, values, DIM: tl.constexpr, PLAN: tl.constexpr):
    """The inverse of `load_tokens`, of owned tokens and in the dtype of the operand."""
    ALIGN: tl.constexpr = PLAN.align
    rows = offsets(operand, owned.tile, owned.positions, ALIGN)
    store_rows(locate(operand, batch, owned.head, ALIGN), rows, owned.exists, values, DIM, PLAN)


@triton.jit
def load_rows(pointer, rows, exists, DIM: tl.constexpr, PLAN: tl.constexpr):
    """Rows of channels as `[rows, channels]`, zeros where there is no row or channel."""
    CHANNELS: tl.constexpr = PLAN.head_dim if DIM == "head_dim" else PLAN.value_dim
    channels = tl.arange(0, CHANNELS.block)
    pointers = pointer + rows[:, None] + channels[None, :]
    if exists is None:
        if CHANNELS.count == CHANNELS.block:
            result = tl.load(pointers)
        else:
            result = tl.load(pointers, mask=(channels < CHANNELS.count)[None, :], other=0.0)
    else:
        if CHANNELS.count == CHANNELS.block:
            result = tl.load(pointers, mask=exists[:, None], other=0.0)
        else:
            result = tl.load(pointers, mask=exists[:, None] & (channels < CHANNELS.count)[None, :], other=0.0)
    return result


@triton.jit
def store_rows(pointer, rows, exists, values, DIM: tl.constexpr, PLAN: tl.constexpr):
    """The inverse of `load_rows`, in the dtype of the pointer."""
    CHANNELS: tl.constexpr = PLAN.head_dim if DIM == "head_dim" else PLAN.value_dim
    channels = tl.arange(0, CHANNELS.block)
    mask = exists[:, None] & (channels < CHANNELS.count)[None, :]
    tl.store(pointer + rows[:, None] + channels[None, :], values.to(pointer.dtype.element_ty), mask=mask)
