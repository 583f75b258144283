"""The implementations that are measured. A new one is one line in `IMPLEMENTATIONS`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from math import prod

from torch import Tensor

from benchmarks import rivals
from benchmarks.baselines import gather_attention, swin_attention, swin_sdpa_attention
from benchmarks.cases import Attend, Case, Inputs
from natten2.functional import na1d, na2d, na3d
from natten2.unfused import na1d_av, na1d_qk, na2d_av, na2d_qk, na3d_av, na3d_qk

__all__ = ["DEFAULT_NAMES", "IMPLEMENTATIONS", "OURS", "Attend", "Implementation"]

OURS = "natten2"
# Numbers of the keys that the gather may hold, and of the scores of all tokens with all: 512 MiB in float32.
_LARGEST = 2**27
_FACES = {1: na1d, 2: na2d, 3: na3d}
_HALVES = {1: (na1d_qk, na1d_av), 2: (na2d_qk, na2d_av), 3: (na3d_qk, na3d_av)}


@dataclass(frozen=True)
class Implementation:
    """One way to compute attention.

    Attributes:
        attend: Computes the output from the tensors of its meaning; autograd differentiates it.
        meaning: The case whose neighborhood attention it computes; `None` where it does not apply.
    """

    attend: Attend
    meaning: Callable[[Case], Case | None]


def _natten2(case: Case, inputs: Inputs) -> Tensor:
    query, key, value, rpb, additional_keys, additional_values = inputs.tensors
    return _FACES[len(case.spatial)](
        query,
        key,
        value,
        *case.parameters,
        rpb=rpb,
        additional_keys=additional_keys,
        additional_values=additional_values,
    )


def _unfused(case: Case, inputs: Inputs) -> Tensor:
    """The two halves, with the weights as a tensor between them."""
    query, key, value, rpb, additional_keys, additional_values = inputs.tensors
    qk, av = _HALVES[len(case.spatial)]
    weights = qk(query, key, *case.parameters, rpb=rpb, additional_keys=additional_keys).softmax(-1)
    return av(weights, value, *case.parameters[:4], additional_values=additional_values)


def _gather(case: Case, inputs: Inputs) -> Tensor:
    return gather_attention(*inputs.tensors, *case.parameters)


def _for_gather(case: Case) -> Case | None:
    per_token = prod(case.parameters.kernel_size) * (case.key_heads or case.heads) * case.head_dim
    return case if case.batch * prod(case.spatial) * per_token <= _LARGEST else None


def _swin(case: Case, inputs: Inputs) -> Tensor:
    window, scale = case.parameters.kernel_size[0], case.parameters.scale
    return swin_attention(inputs.query, inputs.key, inputs.value, inputs.rpb, window, scale)


def _swin_sdpa(case: Case, inputs: Inputs) -> Tensor:
    window, scale = case.parameters.kernel_size[0], case.parameters.scale
    return swin_sdpa_attention(inputs.query, inputs.key, inputs.value, inputs.rpb, window, scale)


def _as_swin(case: Case) -> Case | None:
    """The same tensors in blocks, where Swin's windows fit: for a dilated case too, since they cost it nothing more."""
    window = case.block or case.parameters.kernel_size[0]
    is_plain = not any(case.parameters.is_causal) and case.key_heads is None and case.additional == 0
    is_square = len(case.spatial) == 2 and len(set(case.parameters.kernel_size)) == 1
    fits = window > 1 and all(length % window == 0 for length in case.spatial)
    return case.as_blocks() if is_plain and is_square and fits else None


def _as_swin_without_bias(case: Case) -> Case | None:
    """Without the bias, which would take PyTorch's fused attention to a slower path."""
    blocks = _as_swin(case)
    return blocks and replace(blocks, bias=False)


def _for_dense(case: Case) -> Case | None:
    scores = case.batch * case.heads * prod(case.spatial) ** 2
    return case if case.additional == 0 and scores <= _LARGEST else None


def _undilated(case: Case) -> Case | None:
    plain = replace(case, dilation=1)
    return None if plain.parameters == case.parameters else plain


IMPLEMENTATIONS = {
    OURS: Implementation(_natten2, lambda case: case),
    "unfused": Implementation(_unfused, lambda case: case),
    "gather": Implementation(_gather, _for_gather),
    "swin": Implementation(_swin, _as_swin),
    "swin-sdpa": Implementation(_swin_sdpa, _as_swin_without_bias),
    "dense": Implementation(rivals.dense, _for_dense),
    "undilated": Implementation(_natten2, _undilated),
    "natten": Implementation(rivals.natten, rivals.for_natten),
    "flex": Implementation(rivals.flex, lambda case: case if case.additional == 0 else None),
}
# FlexAttention takes longer to compile than all the others take to measure.
DEFAULT_NAMES = tuple(name for name in IMPLEMENTATIONS if name != "flex")
