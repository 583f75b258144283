"""Launches the kernels of the unfused pair and its gradients.

Weights go through memory as they are, and so would any arrangement for matrix instructions: the kernels gather rows
through the caches.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import torch
import triton
from torch import Tensor

from natten2.ops.triton.launch import on_device
from natten2.ops.triton.tiles import count_parts
from natten2.ops.triton.unfused_kernels import (
    Grid,
    Rows,
    Window,
    additional_sum_kernel,
    offset_kernel,
    score_kernel,
    sum_kernel,
    transposed_sum_kernel,
)
from natten2.ops.validation import count_slots

__all__ = ["na_av", "na_av_backward", "na_qk", "na_qk_backward"]

_AXES = 3
_BLOCK_NUMBERS = 1024  # of a block of rows, in registers
_MOST_PARTS = 64


def na_qk(
    query: Tensor,
    key: Tensor,
    rpb: Tensor | None,
    additional_keys: Tensor | None,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    dilation: Sequence[int],
    is_causal: Sequence[bool],
    scale: float,
    hidden: float,
) -> Tensor:
    """Computes `natten2::na_qk`."""
    scores = query.new_empty((*query.shape[:-1], count_slots(kernel_size, additional_keys)))
    rpb = None if rpb is None else rpb.float().contiguous()
    call = _Call(query, key, additional_keys, kernel_size, stride, dilation, is_causal)
    call.score(query, key, additional_keys, rpb, scores, scale, hidden)
    return scores


def na_qk_backward(
    grad_scores: Tensor,
    query: Tensor,
    key: Tensor,
    rpb: Tensor | None,
    additional_keys: Tensor | None,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    dilation: Sequence[int],
    is_causal: Sequence[bool],
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Computes `natten2::na_qk_backward`."""
    grad_scores = grad_scores.contiguous()
    call = _Call(query, key, additional_keys, kernel_size, stride, dilation, is_causal)
    return (
        call.sum(grad_scores, key, additional_keys, query.new_empty(query.shape), scale),
        call.transposed_sum(grad_scores, query, key.new_empty(key.shape), scale),
        query.new_empty(0) if rpb is None else call.offset_sum(grad_scores, rpb),
        call.additional_sum(grad_scores, query, additional_keys, scale),
    )


def na_av(
    weights: Tensor,
    value: Tensor,
    additional_values: Tensor | None,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    dilation: Sequence[int],
    is_causal: Sequence[bool],
) -> Tensor:
    """Computes `natten2::na_av`."""
    call = _Call(weights, value, additional_values, kernel_size, stride, dilation, is_causal)
    output = value.new_empty((*weights.shape[:-1], value.shape[-1]))
    return call.sum(weights, value, additional_values, output, 1.0)


def na_av_backward(
    grad_output: Tensor,
    weights: Tensor,
    value: Tensor,
    additional_values: Tensor | None,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    dilation: Sequence[int],
    is_causal: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """Computes `natten2::na_av_backward`."""
    grad_output = grad_output.contiguous()
    call = _Call(weights, value, additional_values, kernel_size, stride, dilation, is_causal)
    grad_weights = weights.new_empty(weights.shape)
    call.score(grad_output, value, additional_values, None, grad_weights, 1.0, 0.0)
    return (
        grad_weights,
        call.transposed_sum(weights, grad_output, value.new_empty(value.shape), 1.0),
        call.additional_sum(weights, grad_output, additional_values, 1.0),
    )


class _Call:
    """The launches of one call."""

    def __init__(
        self,
        queries: Tensor,
        keys: Tensor,
        additional: Tensor | None,
        kernel_size: Sequence[int],
        stride: Sequence[int],
        dilation: Sequence[int],
        is_causal: Sequence[bool],
    ) -> None:
        batch, *spatial, heads, _ = queries.shape
        pad = (1,) * (_AXES - len(spatial))
        block_channels = triton.next_power_of_2(keys.shape[-1])
        block = max(16, min(64, _BLOCK_NUMBERS // block_channels))
        causal = (*(False for _ in pad), *is_causal)
        self.device, self.batch, self.rank = keys, batch, len(spatial)
        self.window = Window((*pad, *kernel_size), (*pad, *stride), causal, block, block_channels)
        self.grid = Grid(
            (*pad, *spatial),
            (*pad, *dilation),
            prod(spatial),
            heads,
            heads // keys.shape[-2],
            keys.shape[-1],
            0 if additional is None else additional.shape[1],
        )

    def score(
        self,
        queries: Tensor,
        keys: Tensor,
        additional: Tensor | None,
        rpb: Tensor | None,
        scores: Tensor,
        scale: float,
        hidden: float,
    ) -> None:
        arguments = (*self._rows(queries, keys), self._tokens(additional), rpb, *self._rows(scores))
        self._launch(score_kernel, (self._blocks(self.grid.heads),), *arguments, self.grid, scale, hidden)

    def sum(self, scores: Tensor, keys: Tensor, additional: Tensor | None, outputs: Tensor, scale: float) -> Tensor:
        arguments = (*self._rows(scores, keys), self._tokens(additional), *self._rows(outputs))
        self._launch(sum_kernel, (self._blocks(self.grid.heads),), *arguments, self.grid, scale)
        return outputs

    def transposed_sum(self, scores: Tensor, queries: Tensor, outputs: Tensor, scale: float) -> Tensor:
        blocks = self._blocks(self.grid.heads // self.grid.group)
        self._launch(transposed_sum_kernel, (blocks,), *self._rows(scores, queries, outputs), self.grid, scale)
        return outputs

    def additional_sum(self, scores: Tensor, queries: Tensor, additional: Tensor | None, scale: float) -> Tensor:
        if additional is None:
            return queries.new_empty(0)
        programs = self.batch * additional.shape[1] * additional.shape[2]
        if programs == 0:
            return additional.new_zeros(additional.shape)
        parts = count_parts(programs, _MOST_PARTS)
        sums = queries.new_empty((parts, *additional.shape), dtype=torch.float32)
        rows = self._rows(scores, queries)
        self._launch(additional_sum_kernel, (programs, parts), *rows, sums, self.grid, scale)
        return sums.sum(0).to(additional.dtype)

    def offset_sum(self, scores: Tensor, rpb: Tensor) -> Tensor:
        parts = count_parts(rpb.numel(), _MOST_PARTS)
        sums = rpb.new_zeros((parts, *rpb.shape), dtype=torch.float32)
        self._launch(offset_kernel, (rpb.numel(), parts), *self._rows(scores), sums, self.grid, self.batch)
        return sums.sum(0).to(rpb.dtype)

    def _blocks(self, heads: int) -> int:
        return self.batch * heads * triton.cdiv(self.grid.tokens, self.window.block)

    def _launch(self, kernel: triton.JITFunction, programs: tuple[int, ...], *arguments: object) -> None:
        if self.batch == 0:
            return
        with on_device(self.device):
            kernel[programs](*arguments, WINDOW=self.window)

    def _rows(self, *tensors: Tensor) -> tuple[Rows, ...]:
        pad = (0,) * (_AXES - self.rank)
        return tuple(Rows(x, x.stride(0), (*pad, *x.stride()[1:-2]), x.stride(-2)) for x in tensors)

    def _tokens(self, additional: Tensor | None) -> Rows | None:
        if additional is None:
            return None
        return Rows(additional, additional.stride(0), (additional.stride(1),), additional.stride(2))
