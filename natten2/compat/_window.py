"""A window's arguments as natten takes them: `None` stands for a default, lists and 1-tuples are welcome."""

from __future__ import annotations

from natten2 import _arguments

__all__ = ["flags", "integers", "natten_window"]


def integers(name: str, value: object, rank: int) -> tuple[int, ...]:
    """One integer per axis; `None` means 1, but for a kernel size.

    Raises:
        ValueError: It is not one integer, nor as many as there are axes.
    """
    if value is None and name != "kernel_size":
        return (1,) * rank
    try:
        return _arguments.integers(name, value, rank)
    except TypeError as error:
        raise ValueError(str(error)) from None


def flags(name: str, value: object, rank: int) -> tuple[bool, ...]:
    """One bool per axis; `None` means False.

    Raises:
        ValueError: It is not one bool, nor as many as there are axes.
    """
    try:
        return _arguments.flags(name, False if value is None else value, rank)
    except TypeError as error:
        raise ValueError(str(error)) from None


def natten_window(
    rank: int, kernel_size: object, stride: object = 1, dilation: object = 1, is_causal: object = False
) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...], tuple[bool, ...]]:
    """The window of natten 0.17 and later, which has at least two keys along each axis.

    Raises:
        ValueError: A value is not allowed.
    """
    sizes = integers("kernel_size", kernel_size, rank)
    if min(sizes) < 2:
        raise ValueError(f"kernel_size must be at least 2 in natten, got {sizes}: natten2.na{rank}d takes 1 as well")
    return (
        sizes,
        integers("stride", stride, rank),
        integers("dilation", dilation, rank),
        flags("is_causal", is_causal, rank),
    )
