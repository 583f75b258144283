"""The CUDA C++ kernels where tests can run them: on a GPU, or on the processor, emulated lane by lane.

`na_forward` and `na_backward` are those of :mod:`natten2.ops.cuda_kernels`. Without a GPU this module gives their
operators kernels for CPU tensors: the same sources, bindings included, compiled for the host. Channels are padded to
the next multiple of eight, which the kernels take.
"""

from __future__ import annotations

import ctypes
import fcntl
import hashlib
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import pad

from natten2 import _extension
from natten2.ops import cuda_kernels

__all__ = ["USES_GPU", "compiler", "library", "na_backward", "na_forward", "reversed_order", "run"]

USES_GPU = torch.cuda.is_available() and _extension.cuda_library_path() is not None

ROOT = Path(__file__).parent.parent
SOURCE = ROOT / "tests" / "emulation.cpp"
_CSRC = ROOT / "natten2" / "csrc"
_DEPENDENCIES = (
    SOURCE,
    _CSRC / "bind_cuda.cpp",
    _CSRC / "window.h",
    _CSRC / "isa.h",
    *sorted((_CSRC / "cuda").iterdir()),
)


def compiler() -> str | None:
    """The system's C++ compiler, or `None`."""
    return os.environ.get("CXX") or shutil.which("g++") or shutil.which("c++")


@cache
def library() -> ctypes.CDLL:
    """The emulation, built unless a build of the same sources is there, and registered for CPU tensors."""
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in _DEPENDENCIES)).hexdigest()[:16]
    path = ROOT / "build" / f"emulation-{digest}-{torch.__version__}.so"
    path.parent.mkdir(exist_ok=True)
    with open(path.with_suffix(".lock"), "w") as lock:
        # Tests run in several processes.
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not path.exists():
            _build(path)
    torch.ops.load_library(path)
    loaded = ctypes.CDLL(str(path))
    loaded.natten2_reverse_emulation.argtypes = (ctypes.c_bool,)
    return loaded


def _build(path: Path) -> None:
    torch_path, temporary = Path(torch.__file__).parent, path.with_suffix(".part")
    options = [
        "-std=c++20",
        "-O1",
        "-fno-strict-aliasing",
        "-shared",
        "-fPIC",
        "-fvisibility=hidden",
        "-Wall",
        "-Wextra",
    ]
    options += ["-DTORCH_TARGET_VERSION=0x020b000000000000", "-DNATTEN2_CUDA_KEY=CPU", f"-I{_CSRC}"]
    options += ["-isystem", torch_path / "include", f"-L{torch_path / 'lib'}", "-ltorch_cpu"]
    subprocess.run([compiler(), SOURCE, *options, "-o", temporary], check=True)
    temporary.rename(path)


@contextmanager
def reversed_order() -> Iterator[None]:
    """Lets the last warp, and in each warp the last lane, run first."""
    library().natten2_reverse_emulation(True)
    yield
    library().natten2_reverse_emulation(False)


def run(function: Callable[..., tuple[Tensor, ...]], *args: object) -> tuple[Tensor, ...]:
    """Calls a function of `cuda_kernels` with tensors where its kernels run, and brings its results back."""
    if not USES_GPU:
        library()
        return function(*args)
    _extension.load_cuda_library()
    return tuple(result.cpu() for result in function(*(_move(x) if isinstance(x, Tensor) else x for x in args)))


def _move(tensor: Tensor) -> Tensor:
    """A copy on the GPU whose strides, and what lies between its elements, are those of `tensor`."""
    whole = torch.empty(0, dtype=tensor.dtype).set_(tensor.untyped_storage()).cuda()
    return whole.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())


def _prepare(tensor: object) -> object:
    """A tensor of tokens itself where the kernels take it."""
    if not isinstance(tensor, Tensor) or (tensor.shape[-1] % 8 == 0 and cuda_kernels.unusable_tensors(tensor) is None):
        return tensor
    return pad(tensor, (0, -tensor.shape[-1] % 8)).contiguous()


def _prepare_inputs(inputs: tuple) -> tuple:
    return (*map(_prepare, inputs[:3]), inputs[3], *map(_prepare, inputs[4:6]))


def na_forward(*args: object) -> tuple[Tensor, Tensor]:
    """Computes `natten2::na_forward`."""
    output, logsumexp = run(cuda_kernels.na_forward, *_prepare_inputs(args), *args[6:])
    return output[..., : args[2].shape[-1]], logsumexp


def na_backward(grad_output: Tensor, grad_logsumexp: Tensor | None, *args: object) -> tuple[Tensor, ...]:
    """Computes `natten2::na_backward`."""
    output, logsumexp, *parameters = args[6:]
    upstream, inputs = (_prepare(grad_output), grad_logsumexp), _prepare_inputs(args)
    results = run(cuda_kernels.na_backward, *upstream, *inputs, _prepare(output), logsumexp, *parameters)
    wanted = (*args[:3], None, *args[4:6])
    return tuple(
        result if like is None else result[..., : like.shape[-1]] for result, like in zip(results, wanted, strict=True)
    )
