"""Device code of the arithmetic: products, scores, and the online softmax, in base 2 and float32.

A hidden pair's weight is 0, but a product of tiles multiplies it nevertheless, and 0 times a hidden NaN or infinity is
NaN. So a program whose result holds a NaN starts again and computes it *clean*: from rows where what isn't finite is 0,
to which it then adds what isn't finite of the rows that each token sees.
"""

import triton
import triton.language as tl

from natten2.ops.triton.geometry import transparent

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def zeros(DIM: tl.constexpr, PLAN: tl.constexpr):
    """An accumulator for owned tokens."""
    ROWS: tl.constexpr = PLAN.block_m
    COLUMNS: tl.constexpr = (PLAN.head_dim if DIM == "head_dim" else PLAN.value_dim).block
    return tl.zeros((ROWS, COLUMNS), tl.float32)


@triton.jit
def product(left, right, PLAN: tl.constexpr):
    """`left @ right^T`."""
    return tl.dot(left, tl.trans(right), input_precision="ieee" if PLAN.precision == "split" else PLAN.precision)


@triton.jit
def add_product(left, right, accumulator, IS_CLEAN: tl.constexpr, PLAN: tl.constexpr):
    """`left @ right`, added to the accumulator; `left` is in float32.

    The precision "split" takes `left` as the sum of two numbers in right's dtype. Where the terms of a sum cancel, as
    those of `dS` do, rounding them once would cost more than rounding the result does.
    """
    if IS_CLEAN:
        right = tl.where(is_finite(right), right, 0.0)
    rounded = left.to(right.dtype)
    if PLAN.precision == "split":
        rest = left - rounded.to(tl.float32)
        if IS_CLEAN:
            rest = tl.where(rest == rest, rest, 0.0)
        accumulator = tl.dot(rest.to(right.dtype), right, accumulator)
        accumulator = tl.dot(rounded, right, accumulator)
    else:
        accumulator = tl.dot(rounded, right, accumulator, input_precision=PLAN.precision)
    return accumulator


@triton.jit
def add_infinite(result, visible, rows, number):
    """Adds `number`, an infinity or NaN, where it is in a visible row."""
    is_number = (rows == number) | ((rows != rows) & (number != number))
    is_seen = tl.dot(visible.to(rows.dtype), is_number.to(rows.dtype)) > 0
    return result + tl.where(is_seen, number, 0.0)


@triton.jit
def add_nan(result, visible, rows):
    """Adds NaN where a visible row isn't finite, for then the gradient of the score isn't either, or it is 0."""
    is_seen = tl.dot(visible.to(rows.dtype), (is_finite(rows) == 0).to(rows.dtype)) > 0
    return result + tl.where(is_seen, float("nan"), 0.0)


@triton.jit
def is_finite(values):
    return tl.abs(values.to(tl.float32)) < float("inf")


@triton.jit
def has_nan(values):
    """Whether any number is NaN."""
    return tl.max((values != values).to(tl.int32)) > 0


@triton.jit
def hide(values, visible, hidden: tl.constexpr):
    """`values` where visible; `visible` is `None` where all of them are."""
    if visible is None:
        result = values
    else:
        result = tl.where(visible, values, hidden)
    return result


@triton.jit
def pair_scores(
    owned,
    partners,
    left,
    right,
    rpb,
    head,
    visible,
    scale,
    PLAN: tl.constexpr,
):
    """Scores, in base 2, of owned tokens, the rows, with their partners; a hidden pair's is any number."""
    scores = product(left, right, PLAN) * (scale * LOG2_E)
    if rpb is not None:
        rows = _bias_offsets(rpb, owned.positions, PLAN.owns_keys, PLAN)
        columns = _bias_offsets(rpb, partners, not PLAN.owns_keys, PLAN)
        pointers = rpb.data + head.to(tl.int64) * transparent(rpb.head_stride) + rows[:, None] + columns[None, :]
        if visible is None:
            bias = tl.load(pointers)
        else:
            bias = tl.load(pointers, mask=visible, other=0.0)
        scores += bias.to(tl.float32) * LOG2_E
    return scores


@triton.jit
def _bias_offsets(rpb, positions, IS_KEY: tl.constexpr, PLAN: tl.constexpr):
    """What positions contribute to the index of a pair's bias: the key's minus the query's, plus `kernel_size - 1`."""
    result = positions[0] * 0
    for axis in tl.static_range(len(positions)):
        if IS_KEY:
            place = positions[axis]
        else:
            place = PLAN.kernel_size[axis] - 1 - positions[axis]
        result += place * transparent(rpb.token_strides[axis])
    return result


@triton.jit
def accumulate(scores, value, result, peak, total, IS_CLEAN: tl.constexpr, PLAN: tl.constexpr):
    """One step of the online softmax."""
    higher = tl.maximum(peak, tl.max(scores, 1))
    # Where every key so far is hidden, -inf - -inf would be NaN; from an infinite peak on, the log-sum-exp is infinite.
    finite = tl.where(tl.abs(higher) == float("inf"), 0.0, higher)
    weights = tl.exp2(scores - finite[:, None])
    shrink = tl.exp2(peak - finite)
    total = total * shrink + tl.sum(weights, 1)
    result = add_product(weights, value, result * shrink[:, None], IS_CLEAN, PLAN)
    return result, higher, total


@triton.jit
def grad_scores(scores, lse, grad_weights, delta, visible):
    """The weights `P` and the gradient `dS` of scores, both 0 where hidden; the log-sum-exp is in base 2."""
    weights = hide(tl.exp2(scores - lse), visible, 0.0)
    return weights, hide(weights * (grad_weights - delta), visible, 0.0)
