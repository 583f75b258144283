"""The table of operators: every schema and its tags."""

from __future__ import annotations

import torch

__all__ = ["LIBRARY", "MAX_RANK", "na_backward", "na_forward", "na_qkv_backward", "na_qkv_forward"]

MAX_RANK = 3
LIBRARY = torch.library.Library("natten2", "DEF")

_INPUTS = "Tensor query, Tensor key, Tensor value, Tensor? rpb, Tensor? additional_keys, Tensor? additional_values"
# Query, key, and value as one tensor `[B, *S, 3, H, D]`.
_PACKED_INPUTS = "Tensor qkv, Tensor? rpb"
_PARAMETERS = "int[] kernel_size, int[] stride, int[] dilation, bool[] is_causal, float scale"
_GRADIENTS = (
    "Tensor grad_query, Tensor grad_key, Tensor grad_value, Tensor grad_rpb, "
    "Tensor grad_additional_keys, Tensor grad_additional_values"
)


def _face(rank: int) -> str:
    return (
        f"na{rank}d(Tensor query, Tensor key, Tensor value, int[{rank}] kernel_size, int[{rank}] stride=1, "
        f"int[{rank}] dilation=1, bool[{rank}] is_causal=False, float? scale=None, Tensor? rpb=None, "
        "Tensor? additional_keys=None, Tensor? additional_values=None) -> Tensor"
    )


# Gradients of absent inputs have size 0.
_SCHEMAS = (
    f"na_forward({_INPUTS}, {_PARAMETERS}) -> (Tensor output, Tensor logsumexp)",
    f"na_backward(Tensor grad_output, Tensor? grad_logsumexp, {_INPUTS}, Tensor output, Tensor logsumexp, "
    f"{_PARAMETERS}) -> ({_GRADIENTS})",
    f"na_qkv_forward({_PACKED_INPUTS}, {_PARAMETERS}) -> (Tensor output, Tensor logsumexp)",
    f"na_qkv_backward(Tensor grad_output, Tensor? grad_logsumexp, {_PACKED_INPUTS}, Tensor output, Tensor logsumexp, "
    f"{_PARAMETERS}) -> (Tensor grad_qkv, Tensor grad_rpb)",
    *(_face(rank) for rank in range(1, MAX_RANK + 1)),
)

for _schema in _SCHEMAS:
    LIBRARY.define(_schema, tags=(torch.Tag.pt2_compliant_tag,))

na_forward = torch.ops.natten2.na_forward.default
na_backward = torch.ops.natten2.na_backward.default
na_qkv_forward = torch.ops.natten2.na_qkv_forward.default
na_qkv_backward = torch.ops.natten2.na_qkv_backward.default
