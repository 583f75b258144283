"""Checks of what users hand to functions, modules, and models; tensors' values are the operator's to check."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from numbers import Integral, Real

import torch
from torch import Tensor

from natten2.ops.composite import default_scale

__all__ = [
    "check_heads",
    "check_integer",
    "check_probability",
    "check_real",
    "check_tensor",
    "finite_scale",
    "flags",
    "integers",
    "is_real",
]

_MAX_INT = torch.iinfo(torch.int64).max


def check_tensor(name: str, tensor: object, *, optional: bool = False, jagged: bool = False) -> None:
    if not (isinstance(tensor, Tensor) or (optional and tensor is None)):
        raise TypeError(f"{name} must be a torch.Tensor{' or None' if optional else ''}, got {type(tensor).__name__}")
    if tensor is not None and tensor.is_nested and not (jagged and tensor.layout is torch.jagged):
        raise NotImplementedError(f"{name} must be a dense, strided tensor, got a nested one")


def integers(name: str, value: int | Sequence[int], rank: int) -> tuple[int, ...]:
    """One integer per axis; the operator checks their values."""
    if type(value) is int and -_MAX_INT <= value <= _MAX_INT:
        return (value,) * rank
    values = _per_axis(value, rank)
    if len(values) != rank:
        raise ValueError(f"{name} must be one integer or {rank} of them, got {value}")
    if not all(_is_integer(entry) for entry in values):
        raise TypeError(f"{name} must be an integer or a sequence of integers, got {value!r}")
    indices = tuple(operator.index(entry) for entry in values)
    if not all(-_MAX_INT <= index <= _MAX_INT for index in indices):
        raise ValueError(f"{name} must fit in 64 bits, got {value}")
    return indices


def flags(name: str, value: bool | Sequence[bool], rank: int) -> tuple[bool, ...]:
    """One bool per axis."""
    if type(value) is bool:
        return (value,) * rank
    values = _per_axis(value, rank)
    if len(values) != rank:
        raise ValueError(f"{name} must be one bool or {rank} of them, got {value}")
    if not all(isinstance(entry, bool) for entry in values):
        raise TypeError(f"{name} must be a bool or a sequence of bools, got {value!r}")
    return values


def check_heads(dim_name: str, dim: int, heads_name: str, heads: int) -> None:
    check_integer(dim_name, dim, minimum=1)
    check_integer(heads_name, heads, minimum=1)
    if dim % heads != 0:
        raise ValueError(f"{dim_name} must be a multiple of {heads_name} {heads}, got {dim}")


def check_integer(name: str, value: int, minimum: int) -> None:
    if not _is_integer(value):
        raise TypeError(f"{name} must be an integer, got {value!r}")
    if value < minimum:
        raise ValueError(f"{name} must be at least {minimum}, got {value}")


def check_real(name: str, value: float) -> None:
    if not is_real(value):
        raise TypeError(f"{name} must be a number, got {value!r}")


def is_real(value: object) -> bool:
    """Whether a value is a real number, of Python's, of numpy's, or of the compiler's."""
    # Python's own type first: asking an abstract class takes ten times as long.
    return type(value) is float or (
        isinstance(value, (Real, torch.SymInt, torch.SymFloat)) and not isinstance(value, bool)
    )


def finite_scale(scale: float | None, query: Tensor) -> float:
    """A scale as the operators take it, the default one for `None`."""
    if scale is None:
        return default_scale(query)
    if not is_real(scale):
        raise TypeError(f"scale must be a float or None, got {type(scale).__name__}")
    try:
        return float(scale)
    except OverflowError:
        raise ValueError(f"scale must be finite, got {scale}") from None


def _is_integer(value: object) -> bool:
    return type(value) is int or (isinstance(value, (Integral, torch.SymInt)) and not isinstance(value, bool))


def _per_axis(value: object, rank: int) -> tuple[object, ...]:
    if type(value) in (int, bool):
        return (value,) * rank
    is_sequence = type(value) is tuple or (isinstance(value, Sequence) and not isinstance(value, (str, bytes)))
    return tuple(value) if is_sequence else (value,) * rank


def check_probability(name: str, value: float) -> None:
    check_real(name, value)
    if not 0 <= value <= 1:
        raise ValueError(f"{name} must be between 0 and 1, got {value}")
