"""Finds and loads the compiled kernels, and says what was built."""

from __future__ import annotations

import ctypes
import importlib.util
import os
from functools import cache
from pathlib import Path

import torch

__all__ = [
    "cpu_capabilities",
    "cpu_capability",
    "cuda_library_path",
    "library_path",
    "load_cuda_library",
    "set_cpu_capability",
]

_HOW_TO_INSTALL = "Install torch 2.11 or later, then natten2 with `pip install .` in its source folder."
_HOW_TO_BUILD = (
    "In the source folder, which hides an installed natten2, build it with `make build`, or run Python from elsewhere."
)


def library_path() -> Path:
    """Path of the compiled CPU library, beside the sources in a wheel, in site-packages for an editable install.

    Raises:
        ImportError: The library was not built.
    """
    spec = importlib.util.find_spec("natten2._C")
    if spec is None or spec.origin is None:
        raise ImportError(
            f"natten2's compiled library _C is missing from {Path(__file__).parent}. {_HOW_TO_INSTALL} {_HOW_TO_BUILD}"
        )
    return Path(spec.origin)


@cache
def cuda_library_path() -> Path | None:
    """Path of the compiled CUDA library, `None` where natten2 was built without nvcc."""
    spec = importlib.util.find_spec("natten2._cuda")
    return None if spec is None or spec.origin is None else Path(spec.origin)


@cache
def load_cuda_library() -> None:
    """Loads the CUDA library, which needs neither a GPU nor a CUDA build of torch.

    Raises:
        ImportError: natten2 was built without it, or it can't be loaded.
    """
    path = cuda_library_path()
    if path is None:
        raise ImportError("natten2 was built without nvcc, and has no compiled library _cuda")
    try:
        torch.ops.load_library(path)
    except OSError as error:
        raise ImportError(
            f"natten2's compiled library {path} can't be loaded under torch {torch.__version__}: {error}"
        ) from error


def _load() -> ctypes.CDLL:
    path = library_path()
    try:
        torch.ops.load_library(path)
    except OSError as error:
        raise ImportError(
            f"natten2's compiled library {path} can't be loaded under torch {torch.__version__} "
            f"(torch 2.11 or later is needed): {error}. {_HOW_TO_INSTALL}"
        ) from error
    library = ctypes.CDLL(str(path))
    for name in ("natten2_cpu_capability", "natten2_cpu_capabilities"):
        getattr(library, name).restype = ctypes.c_char_p
    library.natten2_set_cpu_capability.restype = ctypes.c_bool
    return library


_LIBRARY = _load()


def cpu_capability() -> str:
    """The instruction set whose kernels run: the best this processor has, or what `NATTEN2_CPU_CAPABILITY` names."""
    return _LIBRARY.natten2_cpu_capability().decode()


def cpu_capabilities() -> list[str]:
    """The instruction sets that the library has kernels for and this processor can run, plainest first."""
    return _LIBRARY.natten2_cpu_capabilities().decode().split(",")


def set_cpu_capability(name: str) -> None:
    """Makes the kernels of one instruction set run from now on.

    Raises:
        ValueError: It is not one of :func:`cpu_capabilities`.
    """
    if not _LIBRARY.natten2_set_cpu_capability(name.encode()):
        raise ValueError(f"the CPU capability must be one of {', '.join(cpu_capabilities())}, got {name!r}")


if os.environ.get("NATTEN2_CPU_CAPABILITY"):
    set_cpu_capability(os.environ["NATTEN2_CPU_CAPABILITY"])
