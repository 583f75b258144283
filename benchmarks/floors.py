"""What a case needs at least: multiplications, bytes, and so time on a device whose two rates were measured."""

from __future__ import annotations

from dataclasses import dataclass

from benchmarks.cases import Case
from natten2.ops.costs import Call

__all__ = ["Floors", "Rates", "floors", "useful_bytes", "useful_flops"]

# Which passes a mode consists of, as values of `is_backward`.
_PASSES = {"fwd": (False,), "bwd": (True,), "fwdbwd": (False, True)}


@dataclass(frozen=True)
class Rates:
    """What a device reaches on the two things that bound attention, measured in the same run.

    Attributes:
        flops_per_second: On a GPU of a large matrix product in bfloat16, on a processor of multiply-adds in float32.
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


def useful_flops(case: Case, mode: str) -> int:
    """Floating-point operations of the matrix products."""
    return sum(_call(case).flops(is_backward=one) for one in _PASSES[mode])


def useful_bytes(case: Case, mode: str, element_size: int = 2) -> int:
    """Bytes of every input and output, each read or written once."""
    return sum(_call(case, element_size).least_bytes(is_backward=one) for one in _PASSES[mode])


def floors(case: Case, mode: str, rates: Rates, element_size: int = 2) -> Floors:
    """The least seconds that `case` takes at the measured rates."""
    return Floors(
        memory=useful_bytes(case, mode, element_size) / rates.bytes_per_second,
        matrix=useful_flops(case, mode) / rates.flops_per_second,
    )


def _call(case: Case, element_size: int = 2) -> Call:
    return Call(
        case.batch,
        case.spatial,
        case.heads,
        case.key_heads or case.heads,
        case.head_dim,
        case.head_dim,
        *case.parameters[:-1],
        additional=case.additional,
        element_size=element_size,
    )
