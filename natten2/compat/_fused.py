"""The functions of natten 0.17 to 0.21 that hide the attention weights: heads last, as natten2's own."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from natten2 import functional
from natten2.compat._window import natten_window
from natten2.compat.types import KernelSchedule

__all__ = ["attention", "generate_varlen_parameters", "merge_attentions", "modern_function", "older_function"]

_BACKENDS = ("natten2", "cutlass-fna", "hopper-fna", "blackwell-fna", "flex-fna", "flash-fna", "reference", "metal")
_FMHA_BACKENDS = ("natten2", "cutlass-fmha", "hopper-fmha", "blackwell-fmha", "flex-fmha", "flash-fmha", "reference")
_FUSED = (functional.na1d, functional.na2d, functional.na3d)


def modern_function(rank: int | None) -> Callable[..., object]:
    """`na1d`, `na2d`, or `na3d` of 0.20 and 0.21; without a rank, it is the query's."""

    def neighborhood_attention(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kernel_size: object,
        stride: object = 1,
        dilation: object = 1,
        is_causal: object = False,
        scale: float | None = None,
        additional_keys: Tensor | None = None,
        additional_values: Tensor | None = None,
        attention_kwargs: dict | None = None,
        backend: str | None = None,
        q_tile_shape: Sequence[int] | None = None,
        kv_tile_shape: Sequence[int] | None = None,
        backward_q_tile_shape: Sequence[int] | None = None,
        backward_kv_tile_shape: Sequence[int] | None = None,
        backward_kv_splits: Sequence[int] | None = None,
        backward_use_pt_reduction: bool = False,
        run_persistent_kernel: bool = True,
        kernel_schedule: str | KernelSchedule | None = None,
        torch_compile: bool = False,
        try_fuse_additional_kv: bool = False,
        return_lse: bool = False,
        rpb: Tensor | None = None,
        xformers_kwargs: dict | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        dim = query.dim() - 3 if rank is None else rank
        _check_backend("backend", backend, _BACKENDS)
        _check_schedule(kernel_schedule)
        _check_kwargs("attention_kwargs", attention_kwargs)
        _check_kwargs("xformers_kwargs", xformers_kwargs)
        for name, shape in (
            ("q_tile_shape", q_tile_shape),
            ("kv_tile_shape", kv_tile_shape),
            ("backward_q_tile_shape", backward_q_tile_shape),
            ("backward_kv_tile_shape", backward_kv_tile_shape),
            ("backward_kv_splits", backward_kv_splits),
        ):
            _check_tile(name, shape, dim)
        window = natten_window(dim, kernel_size, stride, dilation, is_causal)
        return attend(
            dim, query, key, value, window, scale, rpb, additional_keys, additional_values, return_lse=return_lse
        )

    return neighborhood_attention


def older_function(rank: int) -> Callable[..., Tensor]:
    """`na1d`, `na2d`, or `na3d` of 0.17."""

    def neighborhood_attention(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kernel_size: object,
        dilation: object = 1,
        is_causal: object = False,
        rpb: Tensor | None = None,
        scale: float | None = None,
        additional_keys: Tensor | None = None,
        additional_values: Tensor | None = None,
        xformers_kwargs: dict | None = None,
    ) -> Tensor:
        _check_kwargs("xformers_kwargs", xformers_kwargs)
        window = natten_window(rank, kernel_size, 1, dilation, is_causal)
        return attend(rank, query, key, value, window, scale, rpb, additional_keys, additional_values)

    return neighborhood_attention


def attend(
    rank: int,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    window: tuple,
    scale: float | None,
    rpb: Tensor | None = None,
    additional_keys: Tensor | None = None,
    additional_values: Tensor | None = None,
    *,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """natten2's function on tensors of any strides, as natten's are."""
    tensors = (query, key, value, additional_keys, additional_values)
    query, key, value, additional_keys, additional_values = (None if x is None else with_rows(x) for x in tensors)
    return _FUSED[rank - 1](
        query,
        key,
        value,
        *window,
        scale,
        rpb=rpb,
        additional_keys=additional_keys,
        additional_values=additional_values,
        return_lse=return_lse,
    )


def with_rows(tensor: Tensor) -> Tensor:
    """The tensor with contiguous channels; what has none is natten2's to refuse."""
    if not isinstance(tensor, Tensor) or tensor.is_nested or tensor.layout is not torch.strided or tensor.dim() == 0:
        return tensor
    return tensor if tensor.shape[-1] == 1 or tensor.stride(-1) == 1 else tensor.contiguous()


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    is_causal: bool = False,
    scale: float | None = None,
    seqlens_Q: Tensor | None = None,  # noqa: N803
    seqlens_KV: Tensor | None = None,  # noqa: N803
    cumulative_seqlen_Q: Tensor | None = None,  # noqa: N803
    cumulative_seqlen_KV: Tensor | None = None,  # noqa: N803
    max_seqlen_Q: int | None = None,  # noqa: N803
    max_seqlen_KV: int | None = None,  # noqa: N803
    backend: str | None = None,
    q_tile_size: int | None = None,
    kv_tile_size: int | None = None,
    backward_q_tile_size: int | None = None,
    backward_kv_tile_size: int | None = None,
    backward_kv_splits: int | None = None,
    backward_use_pt_reduction: bool = False,
    run_persistent_kernel: bool = True,
    kernel_schedule: str | KernelSchedule | None = None,
    torch_compile: bool = False,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention of `[B, L, H, D]` to `[B, Lkv, Hkv, D]`; of sequences one after the other, where lengths are given.

    Raises:
        ValueError: Shapes don't fit, or lengths are incomplete.
        NotImplementedError: The backend is unknown.
    """
    _check_backend("backend", backend, _FMHA_BACKENDS)
    _check_schedule(kernel_schedule)
    for name, size in (
        ("q_tile_size", q_tile_size),
        ("kv_tile_size", kv_tile_size),
        ("backward_q_tile_size", backward_q_tile_size),
        ("backward_kv_tile_size", backward_kv_tile_size),
        ("backward_kv_splits", backward_kv_splits),
    ):
        if size is not None and (type(size) is not int or size < 1):
            raise ValueError(f"{name} must be a positive integer or None, got {size!r}")
    _check_attention(query, key, value)
    scale = query.shape[-1] ** -0.5 if scale is None else float(scale)
    if seqlens_Q is not None or seqlens_KV is not None:
        ends, key_ends, *_ = generate_varlen_parameters(query, key, value, seqlens_Q, seqlens_KV)
    else:
        ends, key_ends = cumulative_seqlen_Q, cumulative_seqlen_KV
    if (ends is None) != (key_ends is None):
        raise ValueError("cumulative_seqlen_Q and cumulative_seqlen_KV must be given together")
    if ends is None or key_ends is None:
        output, lse = _attend_all(query, key, value, is_causal, scale)
    else:
        output, lse = _attend_each(query, key, value, is_causal, scale, ends, key_ends)
    return (output, lse) if return_lse else output


def _attend_all(query: Tensor, key: Tensor, value: Tensor, is_causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    length = query.shape[1]
    if length == key.shape[1] and length > 0:
        # One window over the whole sequence: memory linear in its length, and a log-sum-exp with its gradient.
        window = ((length,), (1,), (1,), (bool(is_causal),))
        return attend(1, query, key, value, window, scale, return_lse=True)
    wide = torch.promote_types(query.dtype, torch.float32)
    group = query.shape[2] // key.shape[2]
    key, value = key.repeat_interleave(group, 2), value.repeat_interleave(group, 2)
    scores = torch.einsum("bqhd,bkhd->bhqk", query.to(wide), key.to(wide)) * scale
    if is_causal:
        hidden = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
        scores = scores.masked_fill(hidden, -torch.inf)
    output = torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), value.to(wide)).to(query.dtype)
    return output, scores.logsumexp(-1).transpose(1, 2)


def _attend_each(
    query: Tensor, key: Tensor, value: Tensor, is_causal: bool, scale: float, ends: Tensor, key_ends: Tensor
) -> tuple[Tensor, Tensor]:
    if query.shape[0] != 1:
        raise ValueError(f"query must have a batch of 1 where sequence lengths are given, got {query.shape[0]}")
    lengths, key_lengths = ends.diff().tolist(), key_ends.diff().tolist()
    if len(lengths) != len(key_lengths) or (sum(lengths), sum(key_lengths)) != (query.shape[1], key.shape[1]):
        raise ValueError(
            f"sequence lengths must add up to {query.shape[1]} and {key.shape[1]} tokens, "
            f"got {lengths} and {key_lengths}"
        )
    sequences = zip(query.split(lengths, 1), key.split(key_lengths, 1), value.split(key_lengths, 1), strict=True)
    results = [_attend_all(q, k, v, is_causal, scale) for q, k, v in sequences]
    outputs, lses = zip(*results, strict=True)
    return torch.cat(outputs, 1), torch.cat(lses, 1)


def generate_varlen_parameters(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    seqlens_Q: Tensor | None = None,  # noqa: N803
    seqlens_KV: Tensor | None = None,  # noqa: N803
) -> tuple[Tensor | None, Tensor | None, int, int]:
    """The ends of sequences that lie one after the other, and the longest lengths.

    Raises:
        ValueError: Only one of the lengths is given, or they are no vectors of one size.
    """
    if (seqlens_Q is None) != (seqlens_KV is None):
        raise ValueError("seqlens_Q and seqlens_KV must be given together")
    if seqlens_Q is None or seqlens_KV is None:
        return None, None, 0, 0
    for name, lengths in (("seqlens_Q", seqlens_Q), ("seqlens_KV", seqlens_KV)):
        if not isinstance(lengths, Tensor) or lengths.dim() != 1 or lengths.dtype is not torch.int32:
            raise ValueError(f"{name} must be a vector of dtype torch.int32, got {lengths!r}")
    if seqlens_Q.shape != seqlens_KV.shape or seqlens_Q.numel() == 0:
        raise ValueError(f"seqlens_Q and seqlens_KV must be equally many, got {len(seqlens_Q)} and {len(seqlens_KV)}")
    ends = (torch.nn.functional.pad(x.cumsum(0, dtype=torch.int32), (1, 0)) for x in (seqlens_Q, seqlens_KV))
    return (*ends, int(seqlens_Q.max()), int(seqlens_KV.max()))


def merge_attentions(
    outputs: list[Tensor], lse_tensors: list[Tensor], torch_compile: bool = True, use_autograd_fix: bool = True
) -> tuple[Tensor, Tensor]:
    """:func:`natten2.merge_attentions` of two or more, whose gradients need no fix."""
    if len(outputs) < 2:
        raise ValueError(f"outputs must be at least two tensors, got {len(outputs)}")
    return functional.merge_attentions(outputs, lse_tensors)


def _check_attention(query: Tensor, key: Tensor, value: Tensor) -> None:
    shapes = tuple(query.shape), tuple(key.shape), tuple(value.shape)
    if not all(len(shape) == 4 for shape in shapes):
        raise ValueError(f"query, key, and value must have 4 axes (batch, tokens, heads, head_dim), got {shapes}")
    if shapes[1][:3] != shapes[2][:3] or shapes[0][0] != shapes[1][0] or shapes[0][3] != shapes[1][3]:
        raise ValueError(f"key must have value's tokens and heads, and query's batch and head_dim, got {shapes}")
    if shapes[1][2] == 0 or shapes[0][2] % shapes[1][2] != 0:
        raise ValueError(f"query's heads must be a multiple of key's {shapes[1][2]} heads, got {shapes[0][2]}")


def _check_backend(name: str, backend: object, known: tuple[str, ...]) -> None:
    if backend is not None and backend not in known:
        raise NotImplementedError(f"{name} must be None or one of {', '.join(known)}, got {backend!r}")


def _check_schedule(schedule: object) -> None:
    if schedule is not None and schedule not in ("non", "coop", "pp") and not isinstance(schedule, KernelSchedule):
        raise ValueError(f"kernel_schedule must be None, 'non', 'coop', or 'pp', got {schedule!r}")


def _check_kwargs(name: str, kwargs: object) -> None:
    if kwargs is not None and not isinstance(kwargs, dict):
        raise ValueError(f"{name} must be a dict or None, got {kwargs!r}")


def _check_tile(name: str, shape: object, rank: int) -> None:
    if shape is None:
        return
    if not isinstance(shape, (tuple, list)) or len(shape) != rank or not all(type(x) is int and x > 0 for x in shape):
        raise ValueError(f"{name} must be None or {rank} positive integers, got {shape!r}")
