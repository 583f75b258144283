"""What one thread of this processor can do at most: multiply-adds in float32, and copies."""

from __future__ import annotations

import ctypes
import os
import subprocess
import tempfile
from collections.abc import Callable
from functools import lru_cache, partial
from pathlib import Path
from typing import NamedTuple

import torch

from benchmarks.timing import Clock, sample

__all__ = ["Peak", "copy_bytes_per_second", "peak"]

_SOURCE = Path(__file__).with_name("fma_peak.c")
_STEPS = 1 << 15
_SIDE = 1024
_COPIED = 1 << 26
_COPIES = 5


class Peak(NamedTuple):
    """Work to measure the peak with.

    Attributes:
        run: Does it, on one thread.
        flops: Floating-point operations of one run; a multiply-add is two.
        source: What it is.
    """

    run: Callable[[], object]
    flops: int
    source: str


@lru_cache(maxsize=1)
def peak() -> Peak:
    """Multiply-adds between registers in C, or a matrix product, a lower bound of the peak, without a C compiler."""
    try:
        return _register_loop()
    except (OSError, subprocess.CalledProcessError):
        return _matrix_product()


def copy_bytes_per_second(clock: Clock) -> float:
    """Bytes read and written per second by a copy of 64 MiB: the best of 5, after one that maps the memory."""
    source = torch.ones(_COPIED, dtype=torch.uint8)
    target = torch.empty_like(source)
    copy = partial(target.copy_, source)
    copy()
    return 2 * _COPIED / min(sample(copy, 0.0, clock) for _ in range(_COPIES))


def _register_loop() -> Peak:
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / "fma_peak.so"
        options = ("-O3", "-march=native", "-ffp-contract=fast", "-fPIC", "-shared")
        command = [os.environ.get("CC", "cc"), *options, "-o", str(library), str(_SOURCE)]
        subprocess.run(command, check=True, capture_output=True)
        loaded = ctypes.CDLL(str(library))
    loaded.fma_flops.restype = ctypes.c_long
    loaded.fma_loop.restype = ctypes.c_float
    loaded.fma_loop.argtypes = [ctypes.c_long, ctypes.c_float, ctypes.c_float]
    return Peak(partial(loaded.fma_loop, _STEPS, 0.5, 1.0), _STEPS * loaded.fma_flops(), "multiply-adds in registers")


def _matrix_product() -> Peak:
    left, right = torch.ones(2, _SIDE, _SIDE)
    output = torch.empty(_SIDE, _SIDE)
    run = partial(torch.mm, left, right, out=output)
    return Peak(run, 2 * _SIDE**3, f"torch.mm of {_SIDE} x {_SIDE}, a lower bound")
