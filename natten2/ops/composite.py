"""`torch.ops.natten2.na1d`, `na2d`, and `na3d`: `na_forward` with defaults, traced through by the compiler."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from natten2.ops.schemas import LIBRARY, MAX_RANK, na_forward

__all__ = ["default_scale"]


def default_scale(query: Tensor) -> float:
    """`head_dim ** -0.5`, equation 1 of "Attention Is All You Need" (arXiv 1706.03762)."""
    # Where there is no head_dim, any scale will do: the operator's checks raise.
    is_known = isinstance(query, Tensor) and (not query.is_nested or query.layout is torch.jagged)
    has_head_dim = is_known and query.dim() > 0
    head_dim = query.shape[-1] if has_head_dim else 1
    return head_dim**-0.5 if head_dim > 0 else 1.0


def _composite(rank: int) -> Callable[..., Tensor]:
    # The dispatcher leaves out arguments that equal the schema's defaults: these stand in for them.
    def neighborhood_attention(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kernel_size: Sequence[int],
        stride: Sequence[int] = (1,) * rank,
        dilation: Sequence[int] = (1,) * rank,
        is_causal: Sequence[bool] = (False,) * rank,
        scale: float | None = None,
        rpb: Tensor | None = None,
        additional_keys: Tensor | None = None,
        additional_values: Tensor | None = None,
    ) -> Tensor:
        if len(kernel_size) != rank:
            raise ValueError(f"kernel_size must have {rank} entries for na{rank}d, got {list(kernel_size)}")
        scale = default_scale(query) if scale is None else scale
        output, _ = na_forward(
            query, key, value, rpb, additional_keys, additional_values, kernel_size, stride, dilation, is_causal, scale
        )
        return output

    return neighborhood_attention


for _rank in range(1, MAX_RANK + 1):
    LIBRARY.impl(f"na{_rank}d", _composite(_rank), "CompositeImplicitAutograd")
