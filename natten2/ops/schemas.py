"""The table of operators: every schema and its tags."""

from __future__ import annotations

import torch

__all__ = [
    "LIBRARY",
    "MAX_RANK",
    "na_av",
    "na_av_backward",
    "na_backward",
    "na_forward",
    "na_qk",
    "na_qk_backward",
    "na_qkv_backward",
    "na_qkv_forward",
]

MAX_RANK = 3
LIBRARY = torch.library.Library("natten2", "DEF")

_INPUTS = "Tensor query, Tensor key, Tensor value, Tensor? rpb, Tensor? additional_keys, Tensor? additional_values"
# Query, key, and value as one tensor `[B, *S, 3, H, D]`.
_PACKED_INPUTS = "Tensor qkv, Tensor? rpb"
_WINDOW = "int[] kernel_size, int[] stride, int[] dilation, bool[] is_causal"
_PARAMETERS = f"{_WINDOW}, float scale"
# Of the unfused pair: scores and weights are `[B, *S, H, slots]`, a causal query's unseen slots hold `hidden`.
_QK_INPUTS = "Tensor query, Tensor key, Tensor? rpb, Tensor? additional_keys"
_AV_INPUTS = "Tensor weights, Tensor value, Tensor? additional_values"
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
    f"na_qk({_QK_INPUTS}, {_PARAMETERS}, float hidden) -> Tensor scores",
    f"na_qk_backward(Tensor grad_scores, {_QK_INPUTS}, {_PARAMETERS}) -> "
    "(Tensor grad_query, Tensor grad_key, Tensor grad_rpb, Tensor grad_additional_keys)",
    f"na_av({_AV_INPUTS}, {_WINDOW}) -> Tensor output",
    f"na_av_backward(Tensor grad_output, {_AV_INPUTS}, {_WINDOW}) -> "
    "(Tensor grad_weights, Tensor grad_value, Tensor grad_additional_values)",
    *(_face(rank) for rank in range(1, MAX_RANK + 1)),
)

for _schema in _SCHEMAS:
    LIBRARY.define(_schema, tags=(torch.Tag.pt2_compliant_tag,))

na_forward = torch.ops.natten2.na_forward.default
na_backward = torch.ops.natten2.na_backward.default
na_qkv_forward = torch.ops.natten2.na_qkv_forward.default
na_qkv_backward = torch.ops.natten2.na_qkv_backward.default
na_qk = torch.ops.natten2.na_qk.default
na_qk_backward = torch.ops.natten2.na_qk_backward.default
na_av = torch.ops.natten2.na_av.default
na_av_backward = torch.ops.natten2.na_av_backward.default
