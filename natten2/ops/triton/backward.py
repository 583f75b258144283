"""The gradient's kernels: every number has one owner, who gathers it, so there are no atomics.

With `P = exp(S - logsumexp)` and `dS = P * (grad_output . value - delta)`: owners of queries gather `dS key`, owners of
keys `dS^T query` and `P^T grad_output`, owners of additional keys the same over all queries, and the bias's gradient
sums `dS` over tiles that lie at equal offsets from their keys.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from natten2.ops.triton.arithmetic import (
    LOG2_E,
    add_infinite,
    add_nan,
    add_product,
    grad_scores,
    has_nan,
    pair_scores,
    product,
    zeros,
)
from natten2.ops.triton.geometry import (
    Operand,
    Owned,
    coordinates,
    cover,
    digits,
    divide_steps,
    find_partners,
    find_tile,
    is_empty,
    load_additional,
    load_rows,
    load_scalars,
    load_tokens,
    locate,
    offsets,
    own,
    store_rows,
    store_tokens,
    transparent,
    visibility,
    whole_grid,
)

__all__ = ["Upstream"]


class Upstream(NamedTuple):
    """What the gradient starts from."""

    grad_output: Operand
    logsumexp: Operand
    delta: Operand  # grad_output . output - grad_logsumexp


@triton.jit
def delta_kernel(
    grad_output,
    output,
    grad_logsumexp,
    delta,
    lengths,
    sizes,  # heads, tokens of a batch entry
    PLAN: tl.constexpr,
):
    heads, tokens = transparent(sizes[0]), transparent(sizes[1])
    blocks = tl.cdiv(tokens * heads, PLAN.block_m)
    batch = tl.program_id(0) // blocks
    row = (tl.program_id(0) % blocks).to(PLAN.index) * PLAN.block_m + tl.arange(0, PLAN.block_m)
    exists = row < tokens * heads
    tile = whole_grid(lengths, PLAN)
    positions, head = coordinates(row // heads, tile), row % heads
    ALIGN: tl.constexpr = PLAN.align
    grad = load_rows(*_locate_rows(grad_output, tile, batch, positions, head, ALIGN), exists, "value_dim", PLAN)
    out = load_rows(*_locate_rows(output, tile, batch, positions, head, ALIGN), exists, "value_dim", PLAN)
    result = tl.sum(grad.to(tl.float32) * out.to(tl.float32), 1)
    if grad_logsumexp is not None:
        pointer, offset = _locate_rows(grad_logsumexp, tile, batch, positions, head, 1)
        result -= tl.load(pointer + offset, mask=exists, other=0.0)
    pointer, offset = _locate_rows(delta, tile, batch, positions, head, 1)
    tl.store(pointer + offset, result, mask=exists)


@triton.jit
def _locate_rows(operand, tile, batch, positions, head, ALIGN: tl.constexpr):
    """A pointer to a batch entry, and the offsets of rows, each of its own token and head, from there."""
    rows = offsets(operand, tile, positions, ALIGN) + head * (transparent(operand.head_stride) * ALIGN)
    return locate(operand, batch, batch * 0, ALIGN), rows


@triton.jit
def grad_query_kernel(
    inputs,
    upstream,
    grad_query,  # [parts * B, *S, H, D]
    lengths,
    dilation,
    sizes,  # batch, heads, query heads per key head, additional keys
    scale,
    PLAN: tl.constexpr,
):
    tile, index = find_tile(tl.program_id(0), lengths, dilation, PLAN)
    if is_empty(tile):
        return
    heads = transparent(sizes[1])
    owned = own(tile, index // heads, index % heads, PLAN)
    if _gather_query(owned, inputs, upstream, grad_query, sizes, scale, False, PLAN):
        _gather_query(owned, inputs, upstream, grad_query, sizes, scale, True, PLAN)


@triton.jit
def _gather_query(owned, inputs, upstream, grad_query, sizes, scale, IS_CLEAN: tl.constexpr, PLAN: tl.constexpr):
    """Computes and stores the gradient of a tile, and returns whether it holds a NaN."""
    tile, batch, head = owned.tile, owned.batch, owned.head
    group, additional = transparent(sizes[2]), transparent(sizes[3])
    rows = _load_queries(inputs, upstream, tile, batch, head, owned.positions, None, PLAN)
    boxes = cover(tile, PLAN)
    inner, outer, end = divide_steps(boxes, PLAN)
    result = zeros("head_dim", PLAN)
    if not IS_CLEAN:
        if PLAN.volume == PLAN.block_n:
            for step in range(inner, outer):
                result = _visit_keys(step, boxes, owned, rows, inputs, group, scale, result, "inner", False, PLAN)
        for step in range(outer, end):
            result = _visit_keys(step, boxes, owned, rows, inputs, group, scale, result, "outer", False, PLAN)
    else:
        for step in range(inner, end):
            result = _visit_keys(step, boxes, owned, rows, inputs, group, scale, result, "any", True, PLAN)
        for step in range(inner, end):
            partners, exists, visible = find_partners(step, boxes, owned, "any", PLAN)
            k = load_tokens(inputs.key, tile, batch, head // group, partners, exists, "head_dim", PLAN)
            result = add_nan(result, visible, k)
    if inputs.additional_keys is not None:
        for first in range(0, additional if tl.program_id(1) == 0 else 0, PLAN.block_n):
            result = _visit_additional_keys(first, additional, owned, rows, inputs, group, scale, result, PLAN)
    batch += tl.program_id(1) * transparent(sizes[0])
    store_tokens(grad_query, owned, batch, result * scale, "head_dim", PLAN)
    return has_nan(result)


@triton.jit
def grad_key_value_kernel(
    inputs,
    upstream,
    grad_key,  # [parts * B, *S, H, D]
    grad_value,
    lengths,
    dilation,
    sizes,  # batch, heads of keys, query heads per key head
    scale,
    PLAN: tl.constexpr,
):
    tile, index = find_tile(tl.program_id(0), lengths, dilation, PLAN)
    if is_empty(tile):
        return
    heads = transparent(sizes[1])
    owned = own(tile, index // heads, index % heads, PLAN)
    if _gather_key_value(owned, inputs, upstream, grad_key, grad_value, sizes, scale, False, PLAN):
        _gather_key_value(owned, inputs, upstream, grad_key, grad_value, sizes, scale, True, PLAN)


@triton.jit
def _gather_key_value(
    owned, inputs, upstream, grad_key, grad_value, sizes, scale, IS_CLEAN: tl.constexpr, PLAN: tl.constexpr
):
    """Computes and stores the gradients of a tile, and returns whether they hold a NaN."""
    tile, batch, group = owned.tile, owned.batch, transparent(sizes[2])
    k = load_tokens(inputs.key, tile, batch, owned.head, owned.positions, None, "head_dim", PLAN)
    v = load_tokens(inputs.value, tile, batch, owned.head, owned.positions, None, "value_dim", PLAN)
    boxes = cover(tile, PLAN)
    inner, outer, end = divide_steps(boxes, PLAN)
    grad_k = zeros("head_dim", PLAN)
    grad_v = zeros("value_dim", PLAN)
    if not IS_CLEAN:
        if PLAN.volume == PLAN.block_n:
            for i in range(group * (outer - inner)):
                step, member = inner + i % (outer - inner), i // (outer - inner)
                grad_k, grad_v = _visit_queries(
                    step,
                    member,
                    group,
                    boxes,
                    owned,
                    k,
                    v,
                    inputs,
                    upstream,
                    scale,
                    grad_k,
                    grad_v,
                    "inner",
                    False,
                    PLAN,
                )
        for i in range(group * (end - outer)):
            step, member = outer + i % (end - outer), i // (end - outer)
            grad_k, grad_v = _visit_queries(
                step, member, group, boxes, owned, k, v, inputs, upstream, scale, grad_k, grad_v, "outer", False, PLAN
            )
    else:
        for i in range(group * (end - inner)):
            step, member = inner + i % (end - inner), i // (end - inner)
            grad_k, grad_v = _visit_queries(
                step, member, group, boxes, owned, k, v, inputs, upstream, scale, grad_k, grad_v, "any", True, PLAN
            )
        # Where a query isn't finite, its delta isn't either, and `dS` says so to those who see it.
        for i in range(3 * group * (end - inner)):
            step, head = inner + i // 3 % (end - inner), owned.head * group + i // 3 // (end - inner)
            partners, exists, visible = find_partners(step, boxes, owned, "any", PLAN)
            grad = load_tokens(upstream.grad_output, tile, batch, head, partners, exists, "value_dim", PLAN)
            grad_v = add_infinite(grad_v, visible, grad, (i % 3 - 1) * float("inf"))
    batch += tl.program_id(1) * transparent(sizes[0])
    store_tokens(grad_key, owned, batch, grad_k * scale, "head_dim", PLAN)
    store_tokens(grad_value, owned, batch, grad_v, "value_dim", PLAN)
    return has_nan(grad_k) | has_nan(grad_v)


@triton.jit
def _load_queries(inputs, upstream, tile, batch, head, positions, exists, PLAN: tl.constexpr):
    """Queries, their upstream gradients, log-sum-exps in base 2, and deltas."""
    q = load_tokens(inputs.query, tile, batch, head, positions, exists, "head_dim", PLAN)
    grad = load_tokens(upstream.grad_output, tile, batch, head, positions, exists, "value_dim", PLAN)
    lse = load_scalars(upstream.logsumexp, tile, batch, head, positions, exists) * LOG2_E
    return q, grad, lse, load_scalars(upstream.delta, tile, batch, head, positions, exists)


@triton.jit
def _visit_keys(
    step,
    boxes,
    owned,
    rows,
    inputs,
    group,
    scale,
    result,
    KIND: tl.constexpr,
    IS_CLEAN: tl.constexpr,
    PLAN: tl.constexpr,
):
    tile, batch, key_head = owned.tile, owned.batch, owned.head // group
    partners, exists, visible = find_partners(step, boxes, owned, KIND, PLAN)
    k = load_tokens(inputs.key, tile, batch, key_head, partners, exists, "head_dim", PLAN)
    v = load_tokens(inputs.value, tile, batch, key_head, partners, exists, "value_dim", PLAN)
    ds = _grad_scores_of_queries(owned, partners, rows, k, v, inputs.rpb, visible, scale, PLAN)
    return add_product(ds, k, result, IS_CLEAN, PLAN)


@triton.jit
def _visit_additional_keys(first, additional, owned, rows, inputs, group, scale, result, PLAN: tl.constexpr):
    batch, key_head = owned.batch, owned.head // group
    tokens = (first + tl.arange(0, PLAN.block_n)).to(PLAN.index)
    exists = tokens < additional
    k = load_additional(inputs.additional_keys, batch, key_head, tokens, exists, "head_dim", PLAN)
    v = load_additional(inputs.additional_values, batch, key_head, tokens, exists, "value_dim", PLAN)
    ds = _grad_scores_of_queries(owned, (tokens,), rows, k, v, None, exists[None, :], scale, PLAN)
    return add_product(ds, k, result, False, PLAN)


@triton.jit
def _grad_scores_of_queries(owned, partners, rows, k, v, rpb, visible, scale, PLAN: tl.constexpr):
    q, grad, lse, delta = rows
    scores = pair_scores(owned, partners, q, k, rpb, owned.head, visible, scale, PLAN)
    _, ds = grad_scores(scores, lse[:, None], product(grad, v, PLAN), delta[:, None], visible)
    return ds


@triton.jit
def _visit_queries(
    step,
    member,
    group,
    boxes,
    owned,
    k,
    v,
    inputs,
    upstream,
    scale,
    grad_k,
    grad_v,
    KIND: tl.constexpr,
    IS_CLEAN: tl.constexpr,
    PLAN: tl.constexpr,
):
    head = owned.head * group + member
    partners, exists, visible = find_partners(step, boxes, owned, KIND, PLAN)
    q, grad, lse, delta = _load_queries(inputs, upstream, owned.tile, owned.batch, head, partners, exists, PLAN)
    scores = pair_scores(owned, partners, k, q, inputs.rpb, head, visible, scale, PLAN)
    weights, ds = grad_scores(scores, lse[None, :], product(v, grad, PLAN), delta[None, :], visible)
    grad_v = add_product(weights, grad, grad_v, IS_CLEAN, PLAN)
    return add_product(ds, q, grad_k, IS_CLEAN, PLAN), grad_v


@triton.jit
def grad_bias_kernel(
    inputs,
    upstream,
    sums,  # [heads, parts, chunks, block_m, block_n]
    lengths,
    dilation,
    sizes,  # heads, query heads per key head, tiles of a head over the batch, chunks
    scale,
    PLAN: tl.constexpr,  # its box is tile + 2 * (kernel_size - 1): every key that a query of the tile can see anywhere
):
    heads, group = transparent(sizes[0]), transparent(sizes[1])
    tiles, chunks = transparent(sizes[2]), transparent(sizes[3])
    chunk = tl.program_id(0) % chunks
    head = tl.program_id(0) // chunks % heads
    part = tl.program_id(0) // chunks // heads
    parts = tl.num_programs(0) // chunks // heads
    flat = chunk * PLAN.block_n + tl.arange(0, PLAN.block_n)
    BOX: tl.constexpr = PLAN.box
    local = digits(flat.to(PLAN.index), BOX)
    BLOCK_M: tl.constexpr = PLAN.block_m
    BLOCK_N: tl.constexpr = PLAN.block_n
    result = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)

    for number in range(part, tiles, parts):
        tile, batch = find_tile(number, lengths, dilation, PLAN)
        owned = own(tile, batch, head, PLAN)
        partners = ()
        there = flat < PLAN.volume
        for axis in tl.static_range(len(PLAN.tile)):
            partner = tile.first[axis] - (PLAN.kernel_size[axis] - 1) + local[axis]
            there = there & (partner >= 0) & (partner < tile.length[axis])
            partners = partners + (partner,)
        visible = visibility(owned, partners) & owned.exists[:, None] & there[None, :]
        if tl.max(visible.to(tl.int32)) > 0:
            rows = _load_queries(inputs, upstream, tile, batch, head, owned.positions, owned.exists, PLAN)
            k = load_tokens(inputs.key, tile, batch, head // group, partners, there, "head_dim", PLAN)
            v = load_tokens(inputs.value, tile, batch, head // group, partners, there, "value_dim", PLAN)
            result += _grad_scores_of_queries(owned, partners, rows, k, v, inputs.rpb, visible, scale, PLAN)

    block = (head.to(tl.int64) * parts + part) * chunks + chunk
    cells = tl.arange(0, BLOCK_M)[:, None] * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    tl.store(sums + block * (BLOCK_M * BLOCK_N) + cells, result)


@triton.jit
def grad_additional_kernel(
    inputs,
    upstream,
    grad_keys,  # [parts, B, N, heads of keys, D] in float32
    grad_values,
    lengths,
    sizes,  # heads of keys, query heads per key head, additional keys, queries of a batch entry, batch
    scale,
    PLAN: tl.constexpr,
):
    heads, group, additional = transparent(sizes[0]), transparent(sizes[1]), transparent(sizes[2])
    queries, batches = transparent(sizes[3]), transparent(sizes[4])
    blocks = tl.cdiv(additional, PLAN.block_m)
    index = tl.program_id(0)
    head = index // blocks % heads
    batch = index // blocks // heads
    part, parts = tl.program_id(1), tl.num_programs(1)
    tokens = (index % blocks * PLAN.block_m + tl.arange(0, PLAN.block_m)).to(PLAN.index)
    exists = tokens < additional
    k = load_additional(inputs.additional_keys, batch, head, tokens, exists, "head_dim", PLAN)
    v = load_additional(inputs.additional_values, batch, head, tokens, exists, "value_dim", PLAN)
    grad_k = zeros("head_dim", PLAN)
    grad_v = zeros("value_dim", PLAN)
    tile = whole_grid(lengths, PLAN)
    owned = Owned(tile, batch, head, (tokens,), exists, (), ())
    steps = tl.cdiv(queries, PLAN.block_n)

    for i in range(part, group * steps, parts):
        flat = (i % steps * PLAN.block_n + tl.arange(0, PLAN.block_n)).to(PLAN.index)
        there = flat < queries
        q, grad, lse, delta = _load_queries(
            inputs, upstream, tile, batch, head * group + i // steps, coordinates(flat, tile), there, PLAN
        )
        scores = pair_scores(owned, (flat,), k, q, None, head, None, scale, PLAN)
        weights, ds = grad_scores(scores, lse[None, :], product(v, grad, PLAN), delta[None, :], there[None, :])
        grad_v = add_product(weights, grad, grad_v, False, PLAN)
        grad_k = add_product(ds, q, grad_k, False, PLAN)

    row = ((part * batches + batch).to(tl.int64) * additional + tokens) * heads + head
    store_rows(grad_keys, row * PLAN.head_dim.count, exists, grad_k * scale, "head_dim", PLAN)
    store_rows(grad_values, row * PLAN.value_dim.count, exists, grad_v, "value_dim", PLAN)
