"""The implementations that are measured. A new one is one line in `IMPLEMENTATIONS`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from benchmarks.baselines import gather_attention, swin_attention
from benchmarks.cases import Case, Inputs
from natten2.functional import na1d, na2d, na3d

__all__ = ["IMPLEMENTATIONS", "OURS", "Attend", "Implementation"]

Attend = Callable[[Case, Inputs], Tensor]
OURS = "natten2"
_FACES = {1: na1d, 2: na2d, 3: na3d}


@dataclass(frozen=True)
class Implementation:
    """One way to compute attention.

    Attributes:
        attend: Computes the output from the tensors of a case; autograd differentiates it.
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


def _gather(case: Case, inputs: Inputs) -> Tensor:
    return gather_attention(*inputs.tensors, *case.parameters)


def _swin(case: Case, inputs: Inputs) -> Tensor:
    window, scale = case.parameters.kernel_size[0], case.parameters.scale
    return swin_attention(inputs.query, inputs.key, inputs.value, inputs.rpb, window, scale)


def _as_swin(case: Case) -> Case | None:
    """The same tensors in blocks, where Swin's windows fit: for a dilated case too, since they cost it nothing more."""
    window = case.parameters.kernel_size[0]
    is_plain = not any(case.parameters.is_causal) and case.key_heads is None and case.additional == 0
    is_square = len(case.spatial) == 2 and case.parameters.kernel_size == (window, window)
    fits = window > 1 and all(length % window == 0 for length in case.spatial)
    return case.as_blocks() if is_plain and is_square and fits else None


IMPLEMENTATIONS = {
    OURS: Implementation(_natten2, lambda case: case),
    "gather": Implementation(_gather, lambda case: case),
    "swin": Implementation(_swin, _as_swin),
}
