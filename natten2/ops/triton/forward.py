"""The forward kernel: online softmax over the keys of a tile of queries."""

import triton
import triton.language as tl

from natten2.ops.triton.arithmetic import LN_2, accumulate, add_infinite, has_nan, hide, pair_scores, zeros
from natten2.ops.triton.geometry import (
    cover,
    divide_steps,
    find_partners,
    find_tile,
    is_empty,
    load_additional,
    load_tokens,
    locate,
    offsets,
    own,
    store_tokens,
    transparent,
)


@triton.jit
def forward_kernel(
    inputs,
    output,  # [parts * B, *S, H, V]
    logsumexp,
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
    if _attend(owned, inputs, output, logsumexp, sizes, scale, False, PLAN):
        _attend(owned, inputs, output, logsumexp, sizes, scale, True, PLAN)


@triton.jit
def _attend(owned, inputs, output, logsumexp, sizes, scale, IS_CLEAN: tl.constexpr, PLAN: tl.constexpr):
    """Computes and stores the result of a tile, and returns whether it holds a NaN."""
    tile, batch, head = owned.tile, owned.batch, owned.head
    group, additional = transparent(sizes[2]), transparent(sizes[3])
    q = load_tokens(inputs.query, tile, batch, head, owned.positions, None, "head_dim", PLAN)
    boxes = cover(tile, PLAN)
    inner, outer, end = divide_steps(boxes, PLAN)
    result = zeros("value_dim", PLAN)
    total = tl.sum(result, 1)
    peak = total - float("inf")

    if not IS_CLEAN:
        if PLAN.volume == PLAN.block_n:
            for step in range(inner, outer):
                result, peak, total = _visit(
                    step, boxes, owned, q, inputs, group, scale, result, peak, total, "inner", False, PLAN
                )
        for step in range(outer, end):
            result, peak, total = _visit(
                step, boxes, owned, q, inputs, group, scale, result, peak, total, "outer", False, PLAN
            )
    else:
        for step in range(inner, end):
            result, peak, total = _visit(
                step, boxes, owned, q, inputs, group, scale, result, peak, total, "any", True, PLAN
            )
    if inputs.additional_keys is not None:
        for first in range(0, additional if tl.program_id(1) == 0 else 0, PLAN.block_n):
            result, peak, total = _visit_additional(
                first, additional, owned, q, inputs, group, scale, result, peak, total, PLAN
            )
    # A part may hold no key that a query sees.
    result = tl.where(total[:, None] == 0, 0.0, result / total[:, None])
    if IS_CLEAN:
        for i in range(3 * (end - inner)):
            partners, exists, visible = find_partners(inner + i // 3, boxes, owned, "any", PLAN)
            v = load_tokens(inputs.value, tile, batch, head // group, partners, exists, "value_dim", PLAN)
            result = add_infinite(result, visible, v, (i % 3 - 1) * float("inf"))

    batch += tl.program_id(1) * transparent(sizes[0])
    store_tokens(output, owned, batch, result, "value_dim", PLAN)
    pointers = locate(logsumexp, batch, head, 1) + offsets(logsumexp, tile, owned.positions, 1)
    tl.store(pointers, (peak + tl.log2(total)) * LN_2, mask=owned.exists)
    return has_nan(result)


@triton.jit
def _visit(
    step,
    boxes,
    owned,
    q,
    inputs,
    group,
    scale,
    result,
    peak,
    total,
    KIND: tl.constexpr,
    IS_CLEAN: tl.constexpr,
    PLAN: tl.constexpr,
):
    tile, batch, key_head = owned.tile, owned.batch, owned.head // group
    partners, exists, visible = find_partners(step, boxes, owned, KIND, PLAN)
    k = load_tokens(inputs.key, tile, batch, key_head, partners, exists, "head_dim", PLAN)
    scores = pair_scores(owned, partners, q, k, inputs.rpb, owned.head, visible, scale, PLAN)
    scores = hide(scores, visible, float("-inf"))
    v = load_tokens(inputs.value, tile, batch, key_head, partners, exists, "value_dim", PLAN)
    return accumulate(scores, v, result, peak, total, IS_CLEAN, PLAN)


@triton.jit
def _visit_additional(first, additional, owned, q, inputs, group, scale, result, peak, total, PLAN: tl.constexpr):
    key_head = owned.head // group
    tokens = (first + tl.arange(0, PLAN.block_n)).to(PLAN.index)
    exists = tokens < additional
    k = load_additional(inputs.additional_keys, owned.batch, key_head, tokens, exists, "head_dim", PLAN)
    scores = pair_scores(owned, (tokens,), q, k, None, owned.head, None, scale, PLAN)
    scores = hide(scores, exists[None, :], float("-inf"))
    v = load_additional(inputs.additional_values, owned.batch, key_head, tokens, exists, "value_dim", PLAN)
    return accumulate(scores, v, result, peak, total, False, PLAN)
