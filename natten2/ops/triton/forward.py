"""The forward kernel: online softmax over the keys of a tile of queries, in base 2."""

import triton
import triton.language as tl

from natten2.ops.triton.geometry import (
    bias_offsets,
    box_tokens,
    cover,
    find_tile,
    inner_box,
    is_empty,
    load_rows,
    locate,
    offsets,
    outer_box,
    store_rows,
    tile_tokens,
    tokens_bounds,
    transparent,
    visibility,
)

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def product(left, right, PRECISION: tl.constexpr):
    """`left @ right`, summed in float32."""
    return tl.dot(left, right, input_precision="ieee" if PRECISION == "split" else PRECISION)


@triton.jit
def add_product(left, right, accumulator, PRECISION: tl.constexpr):
    """`left @ right`, added to the accumulator; `left` is in float32.

    The precision "split" takes `left` as the sum of two numbers in right's dtype. Where the terms of a sum cancel, as
    those of `dS` do, rounding them once would cost more than rounding the result does.
    """
    rounded = left.to(right.dtype)
    if PRECISION == "split":
        rest = (left - rounded.to(tl.float32)).to(right.dtype)
        accumulator = tl.dot(rest, right, accumulator)
        accumulator = tl.dot(rounded, right, accumulator)
    else:
        accumulator = tl.dot(rounded, right, accumulator, input_precision=PRECISION)
    return accumulator


@triton.jit
def add_bias(scores, rpb, head, rows, columns, visible):
    """Adds the bias, in base 2, where it is visible; `rows` and `columns` are `bias_offsets` to add."""
    pointers = rpb.data + head.to(tl.int64) * transparent(rpb.head_stride) + rows[:, None] + columns[None, :]
    return scores + tl.load(pointers, mask=visible, other=0.0).to(tl.float32) * LOG2_E


@triton.jit
def accumulate(scores, value, output, peak, total, PRECISION: tl.constexpr):
    """One step of the online softmax."""
    higher = tl.maximum(peak, tl.max(scores, 1))
    # Where every key so far is hidden, -inf - -inf would be NaN.
    finite = tl.where(higher == float("-inf"), 0.0, higher)
    weights = tl.exp2(scores - finite[:, None])
    shrink = tl.exp2(peak - finite)
    total = total * shrink + tl.sum(weights, 1)
    output = add_product(weights, value, output * shrink[:, None], PRECISION)
    return output, higher, total


@triton.jit
def forward_kernel(
    query,
    key,
    value,
    rpb,
    additional_keys,
    additional_values,
    output,
    logsumexp,
    lengths,
    dilation,
    sizes,  # heads, query heads per key head, additional keys
    scale,
    KERNEL_SIZE: tl.constexpr,
    STRIDE: tl.constexpr,
    IS_CAUSAL: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    ALIGN: tl.constexpr,
    INDEX: tl.constexpr,
    PRECISION: tl.constexpr,
    TILE: tl.constexpr,
    BOX: tl.constexpr,
    VOLUME: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    tile, index = find_tile(tl.program_id(0), lengths, dilation, TILE, INDEX)
    if is_empty(tile):
        return
    heads, group, additional = transparent(sizes[0]), transparent(sizes[1]), transparent(sizes[2])
    head, batch = index % heads, index // heads
    positions, exists = tile_tokens(tile, TILE, BLOCK_M, INDEX)
    begins, ends = tokens_bounds(tile, positions, KERNEL_SIZE, STRIDE, IS_CAUSAL, False)
    boxes = cover(tile, TILE, BOX, KERNEL_SIZE, STRIDE, IS_CAUSAL, False)
    q = load_rows(
        locate(query, tile, batch, head, dilation, ALIGN),
        offsets(query, positions, dilation, ALIGN),
        exists,
        HEAD_DIM,
        BLOCK_D,
        False,
    )
    keys = locate(key, tile, batch, head // group, dilation, ALIGN)
    values = locate(value, tile, batch, head // group, dilation, ALIGN)
    scale *= LOG2_E
    result = tl.zeros((BLOCK_M, BLOCK_V), tl.float32)
    peak = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    CHUNKS: tl.constexpr = (VOLUME + BLOCK_N - 1) // BLOCK_N
    inner_total = 0 if VOLUME != BLOCK_N else boxes.inner_total

    for i in range(inner_total):
        partners, there = box_tokens(boxes, inner_box(i, boxes), 0, tile, BOX, VOLUME, BLOCK_N, INDEX)
        k = load_rows(keys, offsets(key, partners, dilation, ALIGN), there, HEAD_DIM, BLOCK_D, False)
        scores = product(q, tl.trans(k), PRECISION) * scale
        if rpb is not None:
            columns = bias_offsets(rpb.token_strides, partners)
            rows = _bias_rows(rpb, positions, KERNEL_SIZE)
            scores = add_bias(scores, rpb, head, rows, columns, exists[:, None])
        v = load_rows(values, offsets(value, partners, dilation, ALIGN), there, VALUE_DIM, BLOCK_V, False)
        result, peak, total = accumulate(scores, v, result, peak, total, PRECISION)

    border = boxes.outer_total if VOLUME == BLOCK_N else boxes.outer_total + boxes.inner_total
    for i in range(border * CHUNKS):
        if VOLUME == BLOCK_N:
            box = outer_box(i, boxes)
        else:
            box = _any_box(i // CHUNKS, boxes)
        partners, there = box_tokens(boxes, box, i % CHUNKS, tile, BOX, VOLUME, BLOCK_N, INDEX)
        visible = visibility(begins, ends, partners)
        k = load_rows(keys, offsets(key, partners, dilation, ALIGN), there, HEAD_DIM, BLOCK_D, True)
        scores = product(q, tl.trans(k), PRECISION) * scale
        if rpb is not None:
            columns = bias_offsets(rpb.token_strides, partners)
            rows = _bias_rows(rpb, positions, KERNEL_SIZE)
            scores = add_bias(scores, rpb, head, rows, columns, visible)
        scores = tl.where(visible, scores, float("-inf"))
        v = load_rows(values, offsets(value, partners, dilation, ALIGN), there, VALUE_DIM, BLOCK_V, True)
        result, peak, total = accumulate(scores, v, result, peak, total, PRECISION)

    if additional_keys is not None:
        keys = _locate_additional(additional_keys, batch, head // group, ALIGN)
        values = _locate_additional(additional_values, batch, head // group, ALIGN)
        for first in range(0, additional, BLOCK_N):
            token = (first + tl.arange(0, BLOCK_N)).to(INDEX)
            there = token < additional
            rows = token * (transparent(additional_keys.token_strides[0]) * ALIGN)
            k = load_rows(keys, rows, there, HEAD_DIM, BLOCK_D, True)
            scores = product(q, tl.trans(k), PRECISION) * scale
            scores = tl.where(there[None, :], scores, float("-inf"))
            rows = token * (transparent(additional_values.token_strides[0]) * ALIGN)
            v = load_rows(values, rows, there, VALUE_DIM, BLOCK_V, True)
            result, peak, total = accumulate(scores, v, result, peak, total, PRECISION)

    store_rows(
        locate(output, tile, batch, head, dilation, ALIGN),
        offsets(output, positions, dilation, ALIGN),
        exists,
        result / total[:, None],
        VALUE_DIM,
        BLOCK_V,
    )
    lse = (peak + tl.log2(total)) * LN_2
    tl.store(
        locate(logsumexp, tile, batch, head, dilation, 1) + offsets(logsumexp, positions, dilation, 1),
        lse,
        mask=exists,
    )


@triton.jit
def _bias_rows(rpb, positions, KERNEL_SIZE: tl.constexpr):
    result = (KERNEL_SIZE[0] - 1 - positions[0]) * transparent(rpb.token_strides[0])
    for axis in tl.static_range(1, len(positions)):
        result += (KERNEL_SIZE[axis] - 1 - positions[axis]) * transparent(rpb.token_strides[axis])
    return result


@triton.jit
def _any_box(index, boxes):
    result = ()
    for axis in tl.static_range(len(boxes.count) - 1, 0, -1):
        result = (index % boxes.count[axis],) + result
        index = index // boxes.count[axis]
    return (index,) + result


@triton.jit
def _locate_additional(operand, batch, head, ALIGN: tl.constexpr):
    offset = batch.to(tl.int64) * transparent(operand.batch_stride)
    offset += head.to(tl.int64) * transparent(operand.head_stride)
    return operand.data + offset * ALIGN
