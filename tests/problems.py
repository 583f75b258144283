"""Inputs for the operator: golden ones, random ones, and the measures that results are held to."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from math import prod
from pathlib import Path

import numpy as np
import torch
from hypothesis import strategies as st
from torch import Tensor

from natten2.ops.validation import accumulate_dtype

INPUTS = ("query", "key", "value", "rpb", "additional_keys", "additional_values")
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Problem:
    """One call of `na_forward`, and the upstream gradients of `na_backward`."""

    tensors: tuple[Tensor | None, ...]
    kernel_size: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    is_causal: tuple[bool, ...]
    scale: float
    grad_output: Tensor
    grad_logsumexp: Tensor

    @property
    def parameters(self) -> tuple:
        return self.kernel_size, self.stride, self.dilation, self.is_causal, self.scale

    @property
    def spatial(self) -> tuple[int, ...]:
        return tuple(self.tensors[0].shape[1:-2])

    def to(self, dtype: torch.dtype) -> Problem:
        """The same problem, rounded to a dtype."""
        rounded = tuple(None if tensor is None else tensor.to(dtype) for tensor in self.tensors)
        grad_logsumexp = self.grad_logsumexp.to(accumulate_dtype(dtype))
        return Problem(rounded, *self.parameters, self.grad_output.to(dtype), grad_logsumexp)


def relative_error(result: Tensor, expected: Tensor) -> float:
    """`|result - expected| / |expected|`; where nothing is expected, `|result|`."""
    difference = torch.linalg.vector_norm(result.double() - expected.double()).item()
    size = torch.linalg.vector_norm(expected.double()).item()
    return difference / size if size > 0 else difference


def random_problem(
    spatial: tuple[int, ...],
    kernel_size: tuple[int, ...],
    *,
    stride: tuple[int, ...] | None = None,
    dilation: tuple[int, ...] | None = None,
    is_causal: tuple[bool, ...] | None = None,
    batch: int = 2,
    heads: int = 2,
    key_heads: int | None = None,
    head_dim: int = 4,
    value_dim: int | None = None,
    additional: int = 0,
    bias: bool = False,
    scale: float | None = None,
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
) -> Problem:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    rank = len(spatial)
    key_heads = heads if key_heads is None else key_heads
    value_dim = head_dim if value_dim is None else value_dim
    tensors = (
        normal(batch, *spatial, heads, head_dim),
        normal(batch, *spatial, key_heads, head_dim),
        normal(batch, *spatial, key_heads, value_dim),
        normal(heads, *(2 * k - 1 for k in kernel_size)) if bias else None,
        normal(batch, additional, key_heads, head_dim) if additional else None,
        normal(batch, additional, key_heads, value_dim) if additional else None,
    )
    return Problem(
        tensors,
        kernel_size,
        (1,) * rank if stride is None else stride,
        (1,) * rank if dilation is None else dilation,
        (False,) * rank if is_causal is None else is_causal,
        head_dim**-0.5 if scale is None else scale,
        normal(batch, *spatial, heads, value_dim),
        normal(batch, *spatial, heads),
    ).to(dtype)


def packed(tensor: Tensor) -> Tensor:
    """The same values as a view of a tensor with more heads, as a projection of query, key, and value gives it."""
    return torch.cat((tensor, tensor, tensor), dim=-2)[..., : tensor.shape[-2], :]


def _heads_first(tensor: Tensor) -> Tensor:
    return tensor.movedim(-2, 1).contiguous().movedim(1, -2)


def with_layout(problem: Problem, layout: Callable[[Tensor], Tensor]) -> Problem:
    """The same problem with other strides of all tensors but the bias."""
    query, key, value, rpb, *additional = problem.tensors
    tensors = (*map(layout, (query, key, value)), rpb, *(None if x is None else layout(x) for x in additional))
    return replace(problem, tensors=tensors, grad_output=layout(problem.grad_output))


LAYOUTS = (torch.clone, packed, _heads_first)


@st.composite
def problems(draw: st.DrawFn, max_tokens: int = 200, min_batch: int = 1) -> Problem:
    """Any valid float64 problem with a small token grid."""
    rank = draw(st.integers(1, 3))
    spatial, kernel_size, stride, dilation = [], [], [], []
    for axis in range(rank):
        length = draw(st.integers(1, min(24, max_tokens // prod(spatial) // 2 ** (rank - axis - 1))))
        spatial.append(length)
        dilation.append(draw(st.integers(1, length)))
        kernel_size.append(draw(st.integers(1, length // dilation[-1])))
        stride.append(draw(st.integers(1, kernel_size[-1])))
    key_heads = draw(st.integers(1, 3))
    problem = random_problem(
        tuple(spatial),
        tuple(kernel_size),
        stride=tuple(stride),
        dilation=tuple(dilation),
        is_causal=tuple(draw(st.lists(st.booleans(), min_size=rank, max_size=rank))),
        batch=draw(st.integers(min_batch, 2)),
        heads=key_heads * draw(st.integers(1, 3)),
        key_heads=key_heads,
        head_dim=draw(st.integers(1, 20)),
        value_dim=draw(st.integers(1, 20)),
        additional=draw(st.integers(0, 3)),
        bias=draw(st.booleans()),
        scale=draw(st.sampled_from([None, 0.0, 1.0, -0.7])),
        seed=draw(st.integers(0, 2**31)),
    )
    return with_layout(problem, draw(st.sampled_from(LAYOUTS)))


@st.composite
def small_windows(draw: st.DrawFn) -> Problem:
    """A float64 problem of the kind that kernels for small windows are made for: rows of all lengths, few keys."""
    rank = draw(st.integers(1, 3))
    longest = {1: (150,), 2: (18, 70), 3: (6, 10, 20)}[rank]
    widest = {1: (31,), 2: (7, 9), 3: (3, 5, 6)}[rank]
    spatial, kernel_size, stride, dilation = [], [], [], []
    for axis in range(rank):
        spatial.append(draw(st.integers(1, longest[axis])))
        kernel_size.append(draw(st.integers(1, min(spatial[-1], widest[axis]))))
        dilation.append(draw(st.integers(1, spatial[-1] // kernel_size[-1])))
        stride.append(draw(st.integers(1, kernel_size[-1])))
    key_heads = draw(st.integers(1, 4))
    problem = random_problem(
        tuple(spatial),
        tuple(kernel_size),
        stride=draw(st.sampled_from([(1,) * rank, tuple(stride)])),
        dilation=draw(st.sampled_from([(1,) * rank, tuple(dilation)])),
        is_causal=tuple(draw(st.lists(st.booleans(), min_size=rank, max_size=rank))),
        batch=draw(st.integers(1, 2)),
        heads=key_heads * draw(st.integers(1, 3)),
        key_heads=key_heads,
        head_dim=draw(st.sampled_from([1, 7, 16, 24, 32, 48, 64])),
        value_dim=draw(st.sampled_from([1, 5, 16, 20, 32, 64])),
        bias=draw(st.booleans()),
        seed=draw(st.integers(0, 2**31)),
    )
    return with_layout(problem, draw(st.sampled_from(LAYOUTS)))


@st.composite
def wide_windows(draw: st.DrawFn) -> Problem:
    """A float64 problem of one row, whose windows are so wide that queries far apart share most of their keys."""
    kernel_size = draw(st.integers(16, 180))
    dilation = draw(st.sampled_from([1, 1, 2, 3]))
    length = draw(st.integers(kernel_size * dilation, kernel_size * dilation + 260))
    problem = random_problem(
        (length,),
        (kernel_size,),
        stride=(draw(st.sampled_from([1, 1, 2, kernel_size])),),
        dilation=(dilation,),
        is_causal=(draw(st.booleans()),),
        batch=draw(st.integers(1, 2)),
        heads=draw(st.integers(1, 3)),
        head_dim=draw(st.sampled_from([3, 16, 32, 48, 64, 80])),
        value_dim=draw(st.sampled_from([5, 16, 32, 64, 112])),
        bias=draw(st.booleans()),
        seed=draw(st.integers(0, 2**31)),
    )
    return with_layout(problem, draw(st.sampled_from(LAYOUTS)))


@dataclass(frozen=True)
class Golden:
    """A problem with its float64 results."""

    problem: Problem
    output: Tensor
    logsumexp: Tensor
    grads: tuple[Tensor | None, ...]


@cache
def golden_cases() -> tuple[Golden, ...]:
    """The cases of tests/golden, computed apart from this library."""
    with np.load(Path(__file__).parent / "golden" / "neighborhood_attention_float64.npz") as archive:
        arrays = {name: torch.from_numpy(archive[name]) for name in archive.files if name != "cases"}
        parameters = json.loads(str(archive["cases"]))
    return tuple(_golden_case(index, case, arrays) for index, case in enumerate(parameters))


def _golden_case(index: int, case: dict, arrays: dict[str, Tensor]) -> Golden:
    def array(name: str) -> Tensor | None:
        return arrays.get(f"{index}/{name}")

    tensors = tuple(array(name) for name in INPUTS)
    scale = tensors[0].shape[-1] ** -0.5 if case["scale"] is None else case["scale"]
    axes = (tuple(case[name]) for name in ("kernel_size", "stride", "dilation", "is_causal"))
    problem = Problem(tensors, *axes, scale, array("grad_output"), array("grad_logsumexp"))
    return Golden(problem, array("output"), array("logsumexp"), tuple(array(f"grad_{name}") for name in INPUTS))
