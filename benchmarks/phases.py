"""Where the time of the stencil's forward goes, on one thread: each phase on its own, against the multiply-add peak.

Four query rows of an image of 56 x 56 tokens, 2 heads of 32 channels, float32, window 7 x 7. It compiles the kernels'
headers for this processor, and needs a C++20 compiler and the sources.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import subprocess
import tempfile
from functools import partial
from pathlib import Path
from statistics import median

from benchmarks.cpu import positive
from benchmarks.peak import peak
from benchmarks.report import format_table
from benchmarks.timing import Settings, interleave

__all__ = ["PHASES", "add_arguments", "main"]

_SOURCE = Path(__file__).with_name("phases.cpp")
_OPTIONS = ("-std=c++20", "-O3", "-fopenmp-simd", "-march=native", "-mprefer-vector-width=512", "-fPIC", "-shared")
_TILES = 14
_PRODUCTS = 2 * (4 * 56 * 2) * 49 * 32
# Floating-point operations that count: two for each multiply-add of a query with a key, or a weight with a value.
PHASES = {"transposes, other loads": 0, "query-key products": _PRODUCTS, "softmax": 0, "sums of values": _PRODUCTS}
# Stores are part of the sums.
_STORES, _IMAGE = "of which stores", "image"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of :func:`main`."""
    parser.add_argument("--rounds", type=positive, default=Settings.rounds, help=f"by default {Settings.rounds}")


def main(options: argparse.Namespace) -> None:
    """Prints each phase's time, its share of the whole, and its share of the peak.

    Raises:
        subprocess.CalledProcessError: The sources don't compile.
    """
    library = _compile()
    names = (*PHASES, _STORES, _IMAGE)
    functions = {name: partial(library.phases_run, index) for index, name in enumerate(names)}
    best = peak()
    samples = interleave({**functions, "peak": best.run}, Settings(rounds=options.rounds))
    seconds = {name: median(taken) for name, taken in samples.items()}
    rate, tile = best.flops / seconds["peak"], seconds[_IMAGE] / _TILES

    def row(name: str, taken: float, flops: int) -> tuple[str, ...]:
        share = f"{flops / taken / rate:.0%}" if flops else ""
        return name, f"{1e6 * taken:.1f}", f"{taken / tile:.0%}", share

    rows = [row(name, seconds[name], flops) for name, flops in PHASES.items()]
    rows.append(row(_STORES, seconds[_STORES], 0))
    rows.append(row("the rest", tile - sum(seconds[name] for name in PHASES), 0))
    rows.append(row("four query rows of an image", tile, sum(PHASES.values())))
    print(f"{rate / 1e9:.4g} GFLOP/s ({best.source})\n")
    print(format_table(("phase", "us", "of the time", "of the peak"), rows))


def _compile() -> ctypes.CDLL:
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / "phases.so"
        command = [os.environ.get("CXX", "c++"), *_OPTIONS, "-o", str(library), str(_SOURCE)]
        subprocess.run(command, check=True)
        return ctypes.CDLL(str(library))
