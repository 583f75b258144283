"""The CUDA C++ kernels on the processor: every thread a fiber, every instruction emulated lane by lane.

`na_forward` and `na_backward` have the operators' signatures. Channels are padded to the next multiple of eight, which
the kernels take.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import subprocess
from collections.abc import Sequence
from functools import cache
from math import prod
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import pad

__all__ = ["compiler", "library", "na_backward", "na_forward", "options"]

ROOT = Path(__file__).parent.parent
SOURCES = (ROOT / "tests" / "emulation.cpp", *sorted((ROOT / "natten2" / "csrc").rglob("*.*h")))
_AXES = 3
_DTYPES = {torch.float16: 0, torch.bfloat16: 1, torch.float32: 2}

# What a run can differ in without changing its results, and what changes float32's.
options = {"is_reversed": False, "is_exact": True, "bias_parts": 3, "additional_parts": 2}


class _View(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p),
        ("batch", ctypes.c_int64),
        ("axis", ctypes.c_int64 * _AXES),
        ("head", ctypes.c_int64),
    )


class _Axis(ctypes.Structure):
    _fields_ = (*((name, ctypes.c_int32) for name in ("length", "kernel_size", "stride", "dilation")), ("is_causal", ctypes.c_bool))


class _Problem(ctypes.Structure):
    _fields_ = (
        ("axes", _Axis * _AXES),
        *((name, ctypes.c_int32) for name in ("batch", "heads", "key_heads", "head_dim", "value_dim", "additional")),
        ("scale", ctypes.c_float),
        ("is_exact", ctypes.c_bool),
    )


class _Forward(ctypes.Structure):
    _fields_ = (
        ("problem", _Problem),
        *((name, _View) for name in ("query", "key", "value", "additional_keys", "additional_values")),
        ("bias", ctypes.c_void_p),
        ("output", _View),
        ("logsumexp", _View),
    )


class _Backward(ctypes.Structure):
    _fields_ = (
        ("forward", _Forward),
        *(
            (name, _View)
            for name in ("grad_output", "grad_logsumexp", "delta", "grad_query", "grad_key", "grad_value")
        ),
        ("grad_bias", ctypes.c_void_p),
        ("grad_additional", ctypes.c_void_p),
        ("bias_parts", ctypes.c_int32),
        ("additional_parts", ctypes.c_int32),
    )


def compiler() -> str | None:
    """The system's C++ compiler, or `None`."""
    return os.environ.get("CXX") or shutil.which("g++") or shutil.which("c++")


@cache
def library() -> ctypes.CDLL:
    """The emulation, built unless a build of the same sources is there."""
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in SOURCES)).hexdigest()[:16]
    path = ROOT / "build" / f"emulation-{digest}.so"
    if not path.exists():
        path.parent.mkdir(exist_ok=True)
        # Tests run in several processes, of which the last one to have built it wins.
        temporary = path.with_suffix(f".{os.getpid()}")
        subprocess.run(
            [compiler(), "-std=c++17", "-O2", "-fno-strict-aliasing", "-shared", "-fPIC", "-Wall", "-Wextra", "-I", ROOT / "natten2" / "csrc" / "cuda"]
            + ["-o", temporary, SOURCES[0]],
            check=True,
        )
        temporary.rename(path)
    loaded = ctypes.CDLL(str(path))
    for function in (loaded.emulate_forward, loaded.emulate_backward):
        function.restype = ctypes.c_char_p
        function.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_void_p, ctypes.c_bool)
    return loaded


def _view(tensor: Tensor | None, rank: int, has_channels: bool = True) -> _View:
    if tensor is None:
        return _View()
    strides = tensor.stride()
    axes = (0,) * (_AXES - rank) + strides[1 : 1 + rank]
    assert tensor.dim() == rank + 2 + has_channels
    return _View(tensor.data_ptr(), strides[0], (ctypes.c_int64 * _AXES)(*axes), strides[1 + rank])


def _padded(tensor: Tensor | None) -> Tensor | None:
    """The tensor itself where kernels take it: its channels in pieces of 16 bytes."""
    if tensor is None:
        return None
    bytes_ = [stride * tensor.element_size() for stride in tensor.stride()[:-1]]
    is_fit = tensor.shape[-1] % 8 == 0 and tensor.stride(-1) == 1 and not any(count % 16 for count in bytes_)
    return tensor if is_fit and tensor.data_ptr() % 16 == 0 else pad(tensor, (0, -tensor.shape[-1] % 8)).contiguous()


def _forward_arguments(
    tensors: Sequence[Tensor | None],
    parameters: tuple,
    output: Tensor,
    logsumexp: Tensor,
) -> _Forward:
    query, key, value, bias, more_keys, more_values = tensors
    kernel_size, stride, dilation, is_causal, scale = parameters
    rank = len(kernel_size)
    axes = [(1, 1, 1, 1, False)] * (_AXES - rank)
    axes += zip(query.shape[1:-2], kernel_size, stride, dilation, is_causal, strict=True)
    problem = _Problem(
        (_Axis * _AXES)(*(_Axis(*axis) for axis in axes)),
        query.shape[0],
        query.shape[-2],
        key.shape[-2],
        query.shape[-1],
        value.shape[-1],
        0 if more_keys is None else more_keys.shape[1],
        scale,
        options["is_exact"],
    )
    return _Forward(
        problem,
        *(_view(tensor, rank) for tensor in (query, key, value)),
        *(_view(tensor, 1) for tensor in (more_keys, more_values)),
        None if bias is None else bias.data_ptr(),
        _view(output, rank),
        _view(logsumexp, rank, has_channels=False),
    )


def _run(name: str, tensors: Sequence[Tensor], arguments: ctypes.Structure) -> None:
    channels = max(tensors[0].shape[-1], tensors[2].shape[-1])
    function = getattr(library(), f"emulate_{name}")
    failure = function(_DTYPES[tensors[0].dtype], channels, ctypes.addressof(arguments), options["is_reversed"])
    if failure is not None:
        raise RuntimeError(failure.decode())


def _prepare(tensors: Sequence[Tensor | None]) -> list[Tensor | None]:
    prepared = [_padded(tensor) for tensor in tensors]
    prepared[3] = None if tensors[3] is None else tensors[3].float().contiguous()
    return prepared


def na_forward(*args: object) -> tuple[Tensor, Tensor]:
    """Computes `natten2::na_forward`."""
    tensors, parameters = _prepare(args[:6]), args[6:]
    query, value = tensors[0], tensors[2]
    output = torch.full((*query.shape[:-1], value.shape[-1]), torch.nan, dtype=query.dtype)
    logsumexp = torch.full(query.shape[:-1], torch.nan)
    _run("forward", tensors, _forward_arguments(tensors, parameters, output, logsumexp))
    return output[..., : args[2].shape[-1]], logsumexp


def na_backward(grad_output: Tensor, grad_logsumexp: Tensor | None, *args: object) -> tuple[Tensor, ...]:
    """Computes `natten2::na_backward`."""
    tensors, (output, logsumexp), parameters = _prepare(args[:6]), args[6:8], args[8:]
    query, key, value, bias, more_keys, more_values = tensors
    rank = len(parameters[0])
    grad_output, output = _padded(grad_output), _padded(output)
    forward = _forward_arguments(tensors, parameters, output, logsumexp)
    grads = [torch.full(tensor.shape, torch.nan, dtype=tensor.dtype) for tensor in (query, key, value)]
    delta = torch.full_like(logsumexp, torch.nan)
    scalars = {"rank": rank, "has_channels": False}
    parts, more_parts = options["bias_parts"], options["additional_parts"]
    grad_bias = None if bias is None else torch.full((parts, *bias.shape), torch.nan)
    more = () if more_keys is None else (more_keys.shape, more_values.shape)
    grad_more = torch.full((more_parts * sum(map(prod, more)),), torch.nan)
    arguments = _Backward(
        forward,
        _view(grad_output, rank),
        _view(grad_logsumexp, **scalars),
        _view(delta, **scalars),
        *(_view(grad, rank) for grad in grads),
        None if grad_bias is None else grad_bias.data_ptr(),
        grad_more.data_ptr() if more else None,
        parts,
        more_parts,
    )
    _run("backward", tensors, arguments)
    absent = query.new_empty(0)
    results = [*grads, absent, absent, absent]
    if grad_bias is not None:
        results[3] = grad_bias.sum(0).to(args[3].dtype)
    if more:
        sums = grad_more.split([more_parts * prod(shape) for shape in more])
        results[4:] = [part.view(more_parts, *shape).sum(0).to(query.dtype) for part, shape in zip(sums, more, strict=True)]
    wanted = [*args[:3], None, *args[4:6]]
    return tuple(
        result if like is None else result[..., : like.shape[-1]] for result, like in zip(results, wanted, strict=True)
    )
