"""The gradient's kernels: every number has one owner, who gathers it, so there are no atomics.

With `P = exp(S - logsumexp)` and `dS = P * (grad_output . value - delta)`: owners of queries gather `dS key`, owners of
keys `dS^T query` and `P^T grad_output`, owners of additional keys the same over all queries, and the bias's gradient
sums `dS` over tiles that lie at equal offsets from their keys.
"""

import triton
import triton.language as tl

from natten2.ops.triton.forward import LOG2_E, _any_box, _bias_rows, _locate_additional, add_bias, add_product, product
from natten2.ops.triton.geometry import (
    bias_offsets,
    box_tokens,
    cover,
    digits,
    find_tile,
    is_empty,
    load_rows,
    locate,
    offsets,
    store_rows,
    tile_tokens,
    tokens_bounds,
    transparent,
    visibility,
)


@triton.jit
def grad_scores(scores, lse, delta, grad, value, visible, PRECISION: tl.constexpr):
    """`P` and `dS`, zero where hidden, from scores and log-sum-exp in base 2; queries are rows."""
    weights = tl.where(visible, tl.exp2(scores - lse[:, None]), 0.0)
    change = product(grad, tl.trans(value), PRECISION) - delta[:, None]
    return weights, tl.where(visible, weights * change, 0.0)


@triton.jit
def _row_values(operand, tile, batch, head, positions, exists, dilation):
    """One number for each token; `exists` is `None` for tokens that have a stand-in."""
    pointers = locate(operand, tile, batch, head, dilation, 1) + offsets(operand, positions, dilation, 1)
    if exists is None:
        result = tl.load(pointers)
    else:
        result = tl.load(pointers, mask=exists, other=0.0)
    return result


@triton.jit
def grad_query_kernel(
    query,
    key,
    value,
    rpb,
    additional_keys,
    additional_values,
    grad_output,
    logsumexp,
    delta,
    grad_query,
    lengths,
    dilation,
    sizes,
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
    rows = offsets(query, positions, dilation, ALIGN)
    q = load_rows(locate(query, tile, batch, head, dilation, ALIGN), rows, exists, HEAD_DIM, BLOCK_D, False)
    rows = offsets(grad_output, positions, dilation, ALIGN)
    grad = load_rows(locate(grad_output, tile, batch, head, dilation, ALIGN), rows, exists, VALUE_DIM, BLOCK_V, False)
    lse = _row_values(logsumexp, tile, batch, head, positions, None, dilation) * LOG2_E
    change = _row_values(delta, tile, batch, head, positions, None, dilation)
    keys = locate(key, tile, batch, head // group, dilation, ALIGN)
    values = locate(value, tile, batch, head // group, dilation, ALIGN)
    result = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    CHUNKS: tl.constexpr = (VOLUME + BLOCK_N - 1) // BLOCK_N

    for i in range((boxes.inner_total + boxes.outer_total) * CHUNKS):
        partners, there = box_tokens(boxes, _any_box(i // CHUNKS, boxes), i % CHUNKS, tile, BOX, VOLUME, BLOCK_N, INDEX)
        visible = visibility(begins, ends, partners)
        k = load_rows(keys, offsets(key, partners, dilation, ALIGN), there, HEAD_DIM, BLOCK_D, True)
        v = load_rows(values, offsets(value, partners, dilation, ALIGN), there, VALUE_DIM, BLOCK_V, True)
        scores = product(q, tl.trans(k), PRECISION) * (scale * LOG2_E)
        if rpb is not None:
            columns = bias_offsets(rpb.token_strides, partners)
            scores = add_bias(scores, rpb, head, _bias_rows(rpb, positions, KERNEL_SIZE), columns, visible)
        _, ds = grad_scores(scores, lse, change, grad, v, visible, PRECISION)
        result = add_product(ds, k, result, PRECISION)

    if additional_keys is not None:
        keys = _locate_additional(additional_keys, batch, head // group, ALIGN)
        values = _locate_additional(additional_values, batch, head // group, ALIGN)
        for first in range(0, additional, BLOCK_N):
            token = (first + tl.arange(0, BLOCK_N)).to(INDEX)
            there = token < additional
            rows = token * (transparent(additional_keys.token_strides[0]) * ALIGN)
            k = load_rows(keys, rows, there, HEAD_DIM, BLOCK_D, True)
            rows = token * (transparent(additional_values.token_strides[0]) * ALIGN)
            v = load_rows(values, rows, there, VALUE_DIM, BLOCK_V, True)
            scores = product(q, tl.trans(k), PRECISION) * (scale * LOG2_E)
            _, ds = grad_scores(scores, lse, change, grad, v, there[None, :], PRECISION)
            result = add_product(ds, k, result, PRECISION)

    rows = offsets(grad_query, positions, dilation, ALIGN)
    pointer = locate(grad_query, tile, batch, head, dilation, ALIGN)
    store_rows(pointer, rows, exists, result * scale, HEAD_DIM, BLOCK_D)


@triton.jit
def grad_key_value_kernel(
    query,
    key,
    value,
    rpb,
    grad_output,
    logsumexp,
    delta,
    grad_key,
    grad_value,
    lengths,
    dilation,
    sizes,  # heads of keys, query heads per key head
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
    key_heads, group = transparent(sizes[0]), transparent(sizes[1])
    key_head, batch = index % key_heads, index // key_heads
    positions, exists = tile_tokens(tile, TILE, BLOCK_M, INDEX)
    begins, ends = tokens_bounds(tile, positions, KERNEL_SIZE, STRIDE, IS_CAUSAL, True)
    boxes = cover(tile, TILE, BOX, KERNEL_SIZE, STRIDE, IS_CAUSAL, True)
    rows = offsets(key, positions, dilation, ALIGN)
    k = load_rows(locate(key, tile, batch, key_head, dilation, ALIGN), rows, exists, HEAD_DIM, BLOCK_D, False)
    rows = offsets(value, positions, dilation, ALIGN)
    v = load_rows(locate(value, tile, batch, key_head, dilation, ALIGN), rows, exists, VALUE_DIM, BLOCK_V, False)
    result_key = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    result_value = tl.zeros((BLOCK_M, BLOCK_V), tl.float32)
    CHUNKS: tl.constexpr = (VOLUME + BLOCK_N - 1) // BLOCK_N
    steps = (boxes.inner_total + boxes.outer_total) * CHUNKS

    for i in range(group * steps):
        head = key_head * group + i // steps
        step = i % steps
        partners, there = box_tokens(
            boxes, _any_box(step // CHUNKS, boxes), step % CHUNKS, tile, BOX, VOLUME, BLOCK_N, INDEX
        )
        visible = visibility(begins, ends, partners)
        queries = locate(query, tile, batch, head, dilation, ALIGN)
        q = load_rows(queries, offsets(query, partners, dilation, ALIGN), there, HEAD_DIM, BLOCK_D, True)
        grads = locate(grad_output, tile, batch, head, dilation, ALIGN)
        grad = load_rows(grads, offsets(grad_output, partners, dilation, ALIGN), there, VALUE_DIM, BLOCK_V, True)
        lse = _row_values(logsumexp, tile, batch, head, partners, there, dilation) * LOG2_E
        change = _row_values(delta, tile, batch, head, partners, there, dilation)
        scores = product(k, tl.trans(q), PRECISION) * (scale * LOG2_E)
        if rpb is not None:
            key_offsets = bias_offsets(rpb.token_strides, positions)
            scores = add_bias(scores, rpb, head, key_offsets, _bias_rows(rpb, partners, KERNEL_SIZE), visible)
        weights = tl.where(visible, tl.exp2(scores - lse[None, :]), 0.0)
        result_value = add_product(weights, grad, result_value, PRECISION)
        ds = weights * (product(v, tl.trans(grad), PRECISION) - change[None, :])
        result_key = add_product(tl.where(visible, ds, 0.0), q, result_key, PRECISION)

    pointer = locate(grad_key, tile, batch, key_head, dilation, ALIGN)
    rows = offsets(grad_key, positions, dilation, ALIGN)
    store_rows(pointer, rows, exists, result_key * scale, HEAD_DIM, BLOCK_D)
    pointer = locate(grad_value, tile, batch, key_head, dilation, ALIGN)
    store_rows(pointer, offsets(grad_value, positions, dilation, ALIGN), exists, result_value, VALUE_DIM, BLOCK_V)


@triton.jit
def grad_bias_kernel(
    query,
    key,
    value,
    rpb,
    grad_output,
    logsumexp,
    delta,
    sums,  # [heads, slices, chunks, BLOCK_M, BLOCK_N]
    lengths,
    dilation,
    sizes,  # heads, query heads per key head, tiles of a head over the batch, chunks
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
    BOX: tl.constexpr,  # tile + 2 * (kernel_size - 1): every key that a query of the tile can see anywhere
    VOLUME: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    heads, group = transparent(sizes[0]), transparent(sizes[1])
    tiles, chunks = transparent(sizes[2]), transparent(sizes[3])
    chunk = tl.program_id(0) % chunks
    head = tl.program_id(0) // chunks % heads
    part = tl.program_id(0) // chunks // heads
    parts = tl.num_programs(0) // chunks // heads
    flat = chunk * BLOCK_N + tl.arange(0, BLOCK_N)
    local = digits(flat.to(INDEX), BOX)
    result = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)

    for number in range(part, tiles, parts):
        tile, batch = find_tile(number, lengths, dilation, TILE, INDEX)
        positions, exists = tile_tokens(tile, TILE, BLOCK_M, INDEX)
        begins, ends = tokens_bounds(tile, positions, KERNEL_SIZE, STRIDE, IS_CAUSAL, False)
        partners = ()
        there = flat < VOLUME
        for axis in tl.static_range(len(TILE)):
            partner = tile.first[axis] - (KERNEL_SIZE[axis] - 1) + local[axis]
            there = there & (partner >= 0) & (partner < tile.length[axis])
            partners = partners + (partner,)
        visible = visibility(begins, ends, partners) & exists[:, None] & there[None, :]
        if tl.max(visible.to(tl.int32)) > 0:
            rows = offsets(query, positions, dilation, ALIGN)
            q = load_rows(locate(query, tile, batch, head, dilation, ALIGN), rows, exists, HEAD_DIM, BLOCK_D, True)
            rows = offsets(grad_output, positions, dilation, ALIGN)
            pointer = locate(grad_output, tile, batch, head, dilation, ALIGN)
            grad = load_rows(pointer, rows, exists, VALUE_DIM, BLOCK_V, True)
            lse = _row_values(logsumexp, tile, batch, head, positions, None, dilation) * LOG2_E
            change = _row_values(delta, tile, batch, head, positions, None, dilation)
            pointer = locate(key, tile, batch, head // group, dilation, ALIGN)
            k = load_rows(pointer, offsets(key, partners, dilation, ALIGN), there, HEAD_DIM, BLOCK_D, True)
            pointer = locate(value, tile, batch, head // group, dilation, ALIGN)
            v = load_rows(pointer, offsets(value, partners, dilation, ALIGN), there, VALUE_DIM, BLOCK_V, True)
            scores = product(q, tl.trans(k), PRECISION) * (scale * LOG2_E)
            columns = bias_offsets(rpb.token_strides, partners)
            scores = add_bias(scores, rpb, head, _bias_rows(rpb, positions, KERNEL_SIZE), columns, visible)
            _, ds = grad_scores(scores, lse, change, grad, v, visible, PRECISION)
            result += ds

    block = (head.to(tl.int64) * parts + part) * chunks + chunk
    cells = tl.arange(0, BLOCK_M)[:, None] * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    tl.store(sums + block * (BLOCK_M * BLOCK_N) + cells, result)


@triton.jit
def grad_additional_kernel(
    query,
    additional_keys,
    additional_values,
    grad_output,
    logsumexp,
    delta,
    grad_keys,  # [parts, B, N, heads of keys, D] in float32
    grad_values,
    lengths,
    sizes,  # heads of keys, query heads per key head, additional keys, queries of a batch entry, batch
    scale,
    HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    ALIGN: tl.constexpr,
    INDEX: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    key_heads, group, additional = transparent(sizes[0]), transparent(sizes[1]), transparent(sizes[2])
    queries, batches = transparent(sizes[3]), transparent(sizes[4])
    blocks = tl.cdiv(additional, BLOCK_M)
    index = tl.program_id(0)
    first = index % blocks * BLOCK_M
    key_head = index // blocks % key_heads
    batch = index // blocks // key_heads
    part, parts = tl.program_id(1), tl.num_programs(1)
    token = (first + tl.arange(0, BLOCK_M)).to(INDEX)
    exists = token < additional
    rows = token * (transparent(additional_keys.token_strides[0]) * ALIGN)
    pointer = _locate_additional(additional_keys, batch, key_head, ALIGN)
    k = load_rows(pointer, rows, exists, HEAD_DIM, BLOCK_D, True)
    rows = token * (transparent(additional_values.token_strides[0]) * ALIGN)
    pointer = _locate_additional(additional_values, batch, key_head, ALIGN)
    v = load_rows(pointer, rows, exists, VALUE_DIM, BLOCK_V, True)
    result_key = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    result_value = tl.zeros((BLOCK_M, BLOCK_V), tl.float32)
    steps = tl.cdiv(queries, BLOCK_N)

    for i in range(part, group * steps, parts):
        head = key_head * group + i // steps
        flat = (i % steps * BLOCK_N + tl.arange(0, BLOCK_N)).to(INDEX)
        there = flat < queries
        query_rows, grad_rows, lse_rows, delta_rows = flat * 0, flat * 0, flat * 0, flat * 0
        rest = flat
        for axis in tl.static_range(len(lengths) - 1, -1, -1):
            position = rest % transparent(lengths[axis])
            rest = rest // transparent(lengths[axis])
            query_rows += position * transparent(query.token_strides[axis])
            grad_rows += position * transparent(grad_output.token_strides[axis])
            lse_rows += position * transparent(logsumexp.token_strides[axis])
            delta_rows += position * transparent(delta.token_strides[axis])
        pointer = _locate_additional(query, batch, head, ALIGN)
        q = load_rows(pointer, query_rows * ALIGN, there, HEAD_DIM, BLOCK_D, True)
        pointer = _locate_additional(grad_output, batch, head, ALIGN)
        grad = load_rows(pointer, grad_rows * ALIGN, there, VALUE_DIM, BLOCK_V, True)
        lse = tl.load(_locate_additional(logsumexp, batch, head, 1) + lse_rows, mask=there, other=0.0) * LOG2_E
        change = tl.load(_locate_additional(delta, batch, head, 1) + delta_rows, mask=there, other=0.0)
        scores = product(k, tl.trans(q), PRECISION) * (scale * LOG2_E)
        weights = tl.where(there[None, :], tl.exp2(scores - lse[None, :]), 0.0)
        result_value = add_product(weights, grad, result_value, PRECISION)
        ds = weights * (product(v, tl.trans(grad), PRECISION) - change[None, :])
        result_key = add_product(tl.where(there[None, :], ds, 0.0), q, result_key, PRECISION)

    row = ((part * batches + batch).to(tl.int64) * additional + token) * key_heads + key_head
    store_rows(grad_keys, row * HEAD_DIM, exists, result_key * scale, HEAD_DIM, BLOCK_D)
    store_rows(grad_values, row * VALUE_DIM, exists, result_value, VALUE_DIM, BLOCK_V)
