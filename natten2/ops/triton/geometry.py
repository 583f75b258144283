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

__all__ = ["Operand"]


class Operand(NamedTuple):
    """A tensor of tokens as kernels take it. Strides are in units of `ALIGN` elements and go through `opaque`."""

    data: Tensor
    batch_stride: int
    token_strides: tuple[int, ...]  # along each axis of the token grid
    head_stride: int


class Tile(NamedTuple):
    """A program's tile; every entry has one value per axis."""

    group: tuple  # residue class
    first: tuple  # position of the first token
    length: tuple  # positions in the group


class Boxes(NamedTuple):
    """The boxes that cover a tile's partners; every entry but the totals has one value per axis."""

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
def partner_bounds(
    position,
    length,
    KERNEL_SIZE: tl.constexpr,
    STRIDE: tl.constexpr,
    IS_CAUSAL: tl.constexpr,
    OWNS_KEYS: tl.constexpr,
):
    """The partners of a token along one axis, as a half-open interval of positions."""
    if OWNS_KEYS:
        begin, end = query_bounds(position, length, KERNEL_SIZE, STRIDE, IS_CAUSAL)
    else:
        begin, end = key_bounds(position, length, KERNEL_SIZE, STRIDE, IS_CAUSAL)
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
def find_tile(index, lengths, dilation, TILE: tl.constexpr, INDEX: tl.constexpr):
    """Tile number `index`, row-major over the axes, by dilation group along each; and what is left of the index."""
    group, first, length = (), (), ()
    for axis in tl.static_range(len(TILE) - 1, -1, -1):
        gap = transparent(dilation[axis])
        size = transparent(lengths[axis])
        tiles = tl.cdiv(tl.cdiv(size, gap), TILE[axis])
        along = index % (tiles * gap)
        index = index // (tiles * gap)
        group = ((along // tiles).to(INDEX),) + group
        first = ((along % tiles * TILE[axis]).to(INDEX),) + first
        length = (((size + gap - 1 - along // tiles) // gap).to(INDEX),) + length
    return Tile(group, first, length), index


@triton.jit
def is_empty(tile):
    """Whether a tile starts past the end of its group, which may be one shorter than the longest."""
    empty = tile.first[0] >= tile.length[0]
    for axis in tl.static_range(1, len(tile.first)):
        empty = empty | (tile.first[axis] >= tile.length[axis])
    return empty


@triton.jit
def tile_tokens(tile, TILE: tl.constexpr, BLOCK: tl.constexpr, INDEX: tl.constexpr):
    """The positions of a tile's tokens, and whether they exist; one that doesn't stands in for the last that does."""
    local = digits(tl.arange(0, BLOCK).to(INDEX), TILE)
    exists = tl.arange(0, BLOCK) >= 0
    positions = ()
    for axis in tl.static_range(len(TILE)):
        position = tile.first[axis] + local[axis]
        exists = exists & (position < tile.length[axis])
        positions = positions + (tl.minimum(position, tile.length[axis] - 1),)
    return positions, exists


@triton.jit
def tokens_bounds(
    tile,
    positions,
    KERNEL_SIZE: tl.constexpr,
    STRIDE: tl.constexpr,
    IS_CAUSAL: tl.constexpr,
    OWNS_KEYS: tl.constexpr,
):
    """The begin and the end of every token's partners along each axis."""
    begins, ends = (), ()
    for axis in tl.static_range(len(KERNEL_SIZE)):
        begin, end = partner_bounds(
            positions[axis], tile.length[axis], KERNEL_SIZE[axis], STRIDE[axis], IS_CAUSAL[axis], OWNS_KEYS
        )
        begins = begins + (begin,)
        ends = ends + (end,)
    return begins, ends


@triton.jit
def cover(
    tile,
    TILE: tl.constexpr,
    BOX: tl.constexpr,
    KERNEL_SIZE: tl.constexpr,
    STRIDE: tl.constexpr,
    IS_CAUSAL: tl.constexpr,
    OWNS_KEYS: tl.constexpr,
):
    """The boxes that cover a tile's partners, from the outer begin on."""
    begins, count, inner_first, inner_count = (), (), (), ()
    total = tile.first[0] * 0 + 1
    inner_total = total
    for axis in tl.static_range(len(TILE)):
        length = tile.length[axis]
        last = tl.minimum(tile.first[axis] + (TILE[axis] - 1), length - 1)
        begin, inner_end = partner_bounds(
            tile.first[axis], length, KERNEL_SIZE[axis], STRIDE[axis], IS_CAUSAL[axis], OWNS_KEYS
        )
        inner_begin, end = partner_bounds(last, length, KERNEL_SIZE[axis], STRIDE[axis], IS_CAUSAL[axis], OWNS_KEYS)
        boxes = tl.cdiv(end - begin, BOX[axis])
        inner = tl.cdiv(inner_begin - begin, BOX[axis])
        inner_boxes = tl.maximum((inner_end - begin) // BOX[axis] - inner, 0)
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
def box_tokens(
    boxes, box, chunk, tile, BOX: tl.constexpr, VOLUME: tl.constexpr, BLOCK: tl.constexpr, INDEX: tl.constexpr
):
    """The positions of one chunk of a box's tokens, and whether they exist; one that doesn't lies far outside."""
    flat = chunk * BLOCK + tl.arange(0, BLOCK)
    local = digits(flat.to(INDEX), BOX)
    exists = flat < VOLUME
    positions = ()
    for axis in tl.static_range(len(BOX)):
        position = boxes.begin[axis] + box[axis] * BOX[axis] + local[axis]
        if axis == 0:
            position = tl.where(flat < VOLUME, position, tile.length[0] + BOX[0])
        exists = exists & (position < tile.length[axis])
        positions = positions + (position,)
    return positions, exists


@triton.jit
def visibility(begins, ends, positions):
    """Whether token `i` of a tile meets partner `j`, as `[tokens, partners]`."""
    result = (positions[0][None, :] >= begins[0][:, None]) & (positions[0][None, :] < ends[0][:, None])
    for axis in tl.static_range(1, len(begins)):
        result = result & (positions[axis][None, :] >= begins[axis][:, None])
        result = result & (positions[axis][None, :] < ends[axis][:, None])
    return result


@triton.jit
def locate(operand, tile, batch, head, dilation, ALIGN: tl.constexpr):
    """A pointer to position 0 of a tile's dilation group."""
    offset = batch.to(tl.int64) * transparent(operand.batch_stride)
    offset += head.to(tl.int64) * transparent(operand.head_stride)
    for axis in tl.static_range(len(tile.group)):
        offset += tile.group[axis].to(tl.int64) * transparent(operand.token_strides[axis])
    return operand.data + offset * ALIGN


@triton.jit
def offsets(operand, positions, dilation, ALIGN: tl.constexpr):
    """Where tokens lie, in elements from `locate`'s pointer."""
    result = positions[0] * (transparent(dilation[0]) * transparent(operand.token_strides[0]))
    for axis in tl.static_range(1, len(positions)):
        result += positions[axis] * (transparent(dilation[axis]) * transparent(operand.token_strides[axis]))
    return result * ALIGN


@triton.jit
def bias_offsets(strides, positions):
    """What positions contribute to their index into the bias: a key's minus its query's is the pair's."""
    result = positions[0] * transparent(strides[0])
    for axis in tl.static_range(1, len(positions)):
        result += positions[axis] * transparent(strides[axis])
    return result


@triton.jit
def load_rows(pointer, rows, exists, WIDTH: tl.constexpr, BLOCK: tl.constexpr, MASKED: tl.constexpr):
    """Rows of `WIDTH` channels as `[rows, BLOCK]`, zeros where there is no row or channel."""
    channels = tl.arange(0, BLOCK)
    pointers = pointer + rows[:, None] + channels[None, :]
    if MASKED:
        if WIDTH == BLOCK:
            result = tl.load(pointers, mask=exists[:, None], other=0.0)
        else:
            result = tl.load(pointers, mask=exists[:, None] & (channels < WIDTH)[None, :], other=0.0)
    else:
        if WIDTH == BLOCK:
            result = tl.load(pointers)
        else:
            result = tl.load(pointers, mask=(channels < WIDTH)[None, :], other=0.0)
    return result


@triton.jit
def store_rows(pointer, rows, exists, values, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """The inverse of `load_rows`, in the dtype of the pointer."""
    channels = tl.arange(0, BLOCK)
    mask = exists[:, None] & (channels < WIDTH)[None, :]
    tl.store(pointer + rows[:, None] + channels[None, :], values.to(pointer.dtype.element_ty), mask=mask)
