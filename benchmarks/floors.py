"""What a case needs at least: multiplications, bytes, and so time on a device whose two rates were measured."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

from benchmarks.cases import Case
from natten2.window import neighbors

__all__ = ["Floors", "Rates", "floors", "mean_keys", "useful_bytes", "useful_flops"]

_LOGSUMEXP_BYTES = 4
# Two products forward. Backward, the scores again, the gradient of the weights, and those of query, key, and value.
_PRODUCTS = {"fwd": 2, "bwd": 5}
# Tensors of the size of a query or a key that are read once or written once.
_QUERY_LIKE = {"fwd": 2, "bwd": 4}  # query, output; then their gradients
_KEY_LIKE = {"fwd": 2, "bwd": 4}  # key, value; then their gradients
_LOGSUMEXP_LIKE = {"fwd": 1, "bwd": 2}  # the log-sum-exp; then delta
_PASSES = {"fwd": ("fwd",), "bwd": ("bwd",), "fwdbwd": ("fwd", "bwd")}


@dataclass(frozen=True)
class Rates:
    """What a device reaches on the two things that bound attention, measured in the same run.

    Attributes:
        flops_per_second: Of a large matrix product in bfloat16.
        bytes_per_second: Of a large copy, bytes read and bytes written both counted.
    """

    flops_per_second: float
    bytes_per_second: float


@dataclass(frozen=True)
class Floors:
    """The least seconds that a case can take."""

    memory: float
    matrix: float

    @property
    def binding(self) -> float:
        return max(self.memory, self.matrix)


def mean_keys(case: Case) -> float:
    """Keys that a query sees, on average: windows of causal axes are cut at the query."""
    kernel_size, stride, dilation, is_causal, _ = case.parameters
    axes = zip(case.spatial, kernel_size, stride, dilation, is_causal, strict=True)
    return prod(_mean_keys(*axis) for axis in axes) + case.additional


def useful_flops(case: Case, mode: str) -> float:
    """Floating-point operations of the matrix products, `4 * B * H * N * K * D` forward and 2.5 times that backward."""
    query_heads_tokens = case.batch * case.heads * prod(case.spatial)
    product = 2 * query_heads_tokens * mean_keys(case) * case.head_dim
    return sum(_PRODUCTS[one] for one in _PASSES[mode]) * product


def useful_bytes(case: Case, mode: str, element_size: int = 2) -> int:
    """Bytes of every input and output, each read or written once; a bias is too small to count."""
    tokens = case.batch * prod(case.spatial)
    query = tokens * case.heads * case.head_dim * element_size
    additional = case.batch * case.additional
    key = (tokens + additional) * (case.key_heads or case.heads) * case.head_dim * element_size
    logsumexp = tokens * case.heads * _LOGSUMEXP_BYTES
    passes: Sequence[str] = _PASSES[mode]
    return sum(_QUERY_LIKE[one] * query + _KEY_LIKE[one] * key + _LOGSUMEXP_LIKE[one] * logsumexp for one in passes)


def floors(case: Case, mode: str, rates: Rates, element_size: int = 2) -> Floors:
    """The least seconds that `case` takes at the measured rates."""
    return Floors(
        memory=useful_bytes(case, mode, element_size) / rates.bytes_per_second,
        matrix=useful_flops(case, mode) / rates.flops_per_second,
    )


def _mean_keys(length: int, kernel_size: int, stride: int, dilation: int, is_causal: bool) -> float:
    if not is_causal:
        return kernel_size
    return sum(len(neighbors(i, length, kernel_size, stride, dilation, True)) for i in range(length)) / length
