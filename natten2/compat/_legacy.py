"""The functions of natten 0.14 to 0.17 that give or take attention weights: heads first, without a scale."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from natten2.compat._window import flags, integers
from natten2.ops.schemas import na_av, na_qk

__all__ = ["av_functions", "qk_functions"]


def qk(
    rank: int,
    query: Tensor,
    key: Tensor,
    rpb: Tensor | None,
    kernel_size: object,
    dilation: object,
    is_causal: object = False,
    additional_keys: Tensor | None = None,
) -> Tensor:
    """Scores `[B, H, *axes, slots]` of `[B, H, *axes, D]`: dot products and bias."""
    _check_tensors(query=query, key=key)
    if query.is_nested or key.is_nested:
        samples = zip(*(_unbind(x, query) for x in (query, key, additional_keys)), strict=True)
        return _nest([qk(rank, q, k, rpb, kernel_size, dilation, is_causal, extra) for q, k, extra in samples])
    window = _window(rank, kernel_size, dilation, is_causal)
    rpb = rpb if rpb is None or rpb.dtype is torch.float32 else rpb.to(query.dtype)
    query, key, additional_keys = (None if x is None else _heads_last(x) for x in (query, key, additional_keys))
    return _heads_first(na_qk(query, key, rpb, additional_keys, *window, 1.0, -torch.inf))


def av(
    rank: int,
    weights: Tensor,
    value: Tensor,
    kernel_size: object,
    dilation: object,
    is_causal: object = False,
    additional_values: Tensor | None = None,
) -> Tensor:
    """Sums `[B, H, *axes, D]` of values under weights `[B, H, *axes, slots]`, which are rounded to value's dtype."""
    _check_tensors(attn=weights, value=value)
    if weights.is_nested or value.is_nested:
        samples = zip(*(_unbind(x, value) for x in (weights, value, additional_values)), strict=True)
        return _nest([av(rank, w, v, kernel_size, dilation, is_causal, extra) for w, v, extra in samples])
    window = _window(rank, kernel_size, dilation, is_causal)
    weights, value = _heads_last(weights.to(value.dtype)), _heads_last(value)
    additional_values = None if additional_values is None else _heads_last(additional_values)
    return _heads_first(na_av(weights, value, additional_values, *window))


def _check_tensors(**tensors: object) -> None:
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a torch.Tensor, got {type(tensor).__name__}")


def _window(rank: int, kernel_size: object, dilation: object, is_causal: object) -> tuple:
    kernel_size, dilation = integers("kernel_size", kernel_size, rank), integers("dilation", dilation, rank)
    if any(size < 3 or size % 2 == 0 for size in kernel_size):
        raise ValueError(
            f"kernel_size must be odd and at least 3 in natten's unfused functions, got {kernel_size}: "
            f"natten2.na{rank}d_qk takes any"
        )
    return kernel_size, (1,) * rank, dilation, flags("is_causal", is_causal, rank)


def _heads_last(tensor: Tensor) -> Tensor:
    view = tensor.movedim(1, -2)
    return view if view.shape[-1] == 1 or view.stride(-1) == 1 else view.contiguous()


def _heads_first(tensor: Tensor) -> Tensor:
    # Old code calls `view` on it.
    return tensor.movedim(-2, 1).contiguous()


def _unbind(tensor: Tensor | None, like: Tensor) -> Sequence[Tensor | None]:
    """One sample after the other, each as a batch of its own."""
    if tensor is None:
        return (None,) * like.size(0)
    if not tensor.is_nested:
        raise ValueError("query, key, value, and weights must all be nested or none of them")
    return [sample.unsqueeze(0) for sample in tensor.unbind()]


def _nest(samples: list[Tensor]) -> Tensor:
    return torch.nested.as_nested_tensor([sample.squeeze(0) for sample in samples])


def qk_functions(rank: int) -> dict[str, dict[str, Callable[..., Tensor]]]:
    """`na*d_qk` and its relatives, by the version that has them."""

    def modern(
        query: Tensor,
        key: Tensor,
        kernel_size: object,
        dilation: object = 1,
        additional_keys: Tensor | None = None,
        is_causal: object = False,
        rpb: Tensor | None = None,
    ) -> Tensor:
        return qk(rank, query, key, rpb, kernel_size, dilation, is_causal, additional_keys)

    if rank == 3:

        def with_bias(
            query, key, bias, kernel_size_d, kernel_size, dilation_d, dilation, additional_keys=None
        ) -> Tensor:
            window = (kernel_size_d, kernel_size, kernel_size), _deep(dilation_d, dilation)
            return qk(rank, query, key, bias, *window, additional_keys=additional_keys)

        def plain(query, key, kernel_size_d, kernel_size, dilation_d, dilation, additional_keys=None) -> Tensor:
            return with_bias(query, key, None, kernel_size_d, kernel_size, dilation_d, dilation, additional_keys)

        def oldest(query, key, rpb, kernel_size_d, kernel_size, dilation_d, dilation) -> Tensor:
            return with_bias(query, key, rpb, kernel_size_d, kernel_size, dilation_d, dilation)

        def oldest_plain(query, key, kernel_size_d, kernel_size, dilation_d, dilation) -> Tensor:
            return with_bias(query, key, None, kernel_size_d, kernel_size, dilation_d, dilation)

    else:

        def with_bias(query, key, bias, kernel_size, dilation, additional_keys=None) -> Tensor:
            return qk(rank, query, key, bias, kernel_size, dilation, additional_keys=additional_keys)

        def plain(query, key, kernel_size, dilation, additional_keys=None) -> Tensor:
            return with_bias(query, key, None, kernel_size, dilation, additional_keys)

        def oldest(query, key, rpb, kernel_size, dilation) -> Tensor:
            return with_bias(query, key, rpb, kernel_size, dilation)

        def oldest_plain(query, key, kernel_size, dilation) -> Tensor:
            return with_bias(query, key, None, kernel_size, dilation)

    old = {f"natten{rank}dqkrpb": oldest, f"natten{rank}dqk": oldest_plain}
    names = {f"na{rank}d_qk": plain, f"na{rank}d_qk_with_bias": with_bias}
    union = _either(plain, modern) if rank == 3 else modern
    return {
        "0.14": old,
        "0.15": old | names,
        "0.17": old | {f"na{rank}d_qk": modern},
        "union": old | names | {f"na{rank}d_qk": union},
    }


def av_functions(rank: int) -> dict[str, dict[str, Callable[..., Tensor]]]:
    """`na*d_av` and its relatives, by the version that has them."""

    def modern(
        attn: Tensor,
        value: Tensor,
        kernel_size: object,
        dilation: object = 1,
        additional_values: Tensor | None = None,
        is_causal: object = False,
    ) -> Tensor:
        return av(rank, attn, value, kernel_size, dilation, is_causal, additional_values)

    if rank == 3:

        def plain(attn, value, kernel_size_d, kernel_size, dilation_d, dilation, additional_values=None) -> Tensor:
            window = (kernel_size_d, kernel_size, kernel_size), _deep(dilation_d, dilation)
            return av(rank, attn, value, *window, additional_values=additional_values)

        def oldest(attn, value, kernel_size_d, kernel_size, dilation_d, dilation) -> Tensor:
            return plain(attn, value, kernel_size_d, kernel_size, dilation_d, dilation)

    else:

        def plain(attn, value, kernel_size, dilation, additional_values=None) -> Tensor:
            return av(rank, attn, value, kernel_size, dilation, additional_values=additional_values)

        def oldest(attn, value, kernel_size, dilation) -> Tensor:
            return plain(attn, value, kernel_size, dilation)

    old = {f"natten{rank}dav": oldest}
    union = _either(plain, modern) if rank == 3 else modern
    return {
        "0.14": old,
        "0.15": old | {f"na{rank}d_av": plain},
        "0.17": old | {f"na{rank}d_av": modern},
        "union": old | {f"na{rank}d_av": union},
    }


def _deep(dilation_d: int | None, dilation: int | None) -> tuple[int, int, int]:
    dilation = 1 if dilation is None else dilation
    return (dilation if dilation_d is None else dilation_d, dilation, dilation)


def _either(old: Callable[..., Tensor], new: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A function of 0.15 or of 0.17: only the old one has numbers in its fifth and sixth place, or `kernel_size_d`."""

    def function(*args: object, **kwargs: object) -> Tensor:
        is_old = "kernel_size_d" in kwargs or "dilation_d" in kwargs or (len(args) > 4 and type(args[4]) is int)
        return (old if is_old else new)(*args, **kwargs)

    return function
