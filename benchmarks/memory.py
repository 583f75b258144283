"""Peak memory of one training step of an attention layer: the qkv projection, the operator, the output projection.

A process of its own for every layer takes the step, and Linux tells the most memory that it ever held, less what it
held before the step: the input, the weights, and the libraries. Unlike a count of torch's allocations, that includes
what kernels allocate themselves. Memory that is freed goes back to the system at once, so nothing is hidden in a heap.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks.compare import DTYPES
from benchmarks.swin import SwinLayer
from natten2.nn import NeighborhoodAttention2D

__all__ = ["LAYERS", "Memory", "format_memory", "in_a_process", "measure_memory", "peak_bytes", "step_bytes"]

_ROOT = Path(__file__).parents[1]
_CHANNELS, _HEADS, _WINDOW = 64, 2, 7
_SIDE, _BATCH = 56, 8
# Blocks of memory from this size on are mapped one by one, and unmapped when they are freed.
_ENVIRONMENT = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}


@dataclass(frozen=True)
class Memory:
    """Peak bytes of a training step on one thread, keyed by layer."""

    dtype: str
    batch: int
    side: int
    channels: int
    peak_bytes: dict[str, int]

    @property
    def ratio(self) -> float:
        """Of natten2's to Swin's."""
        return self.peak_bytes["natten2"] / self.peak_bytes["swin"]


LAYERS = {
    "natten2": lambda: NeighborhoodAttention2D(_CHANNELS, _HEADS, _WINDOW, rel_pos_bias=True),
    "swin": lambda: SwinLayer(_CHANNELS, _HEADS, _WINDOW),
}


def measure_memory(dtype: str, side: int = _SIDE, batch: int = _BATCH) -> Memory:
    """Measures every layer in a process of its own.

    Raises:
        RuntimeError: The system isn't Linux, or doesn't let a process reset its peak.
    """
    steps = {name: in_a_process("benchmarks.memory", name, dtype, str(side), str(batch)) for name in LAYERS}
    return Memory(dtype, batch, side, _CHANNELS, steps)


def format_memory(results: Sequence[Memory]) -> str:
    """A line for each dtype."""
    return "\n".join(
        f"A training step of a layer, {one.batch} x {one.side} x {one.side} x {one.channels} in {one.dtype}, takes "
        f"{one.peak_bytes['natten2'] / 2**20:.1f} MiB, {one.ratio:.0%} of Swin's "
        f"{one.peak_bytes['swin'] / 2**20:.1f} MiB."
        for one in results
    )


def step_bytes(name: str, dtype: str, side: int, batch: int) -> int:
    """Bytes that this process holds at the peak of a forward and a backward, more than before it."""
    torch.manual_seed(0)
    layer = LAYERS[name]().to(DTYPES[dtype])
    # What libraries set up once is not part of a step.
    _step(layer, torch.randn(1, _WINDOW, _WINDOW, _CHANNELS, dtype=DTYPES[dtype]))
    layer.zero_grad()
    input = torch.randn(batch, side, side, _CHANNELS, dtype=DTYPES[dtype])
    return peak_bytes(lambda: _step(layer, input))


def peak_bytes(step: Callable[[], object]) -> int:
    """Bytes that this process, one of :func:`in_a_process`, holds at the peak of a step, more than before it."""
    Path("/proc/self/clear_refs").write_text("5")
    before = _status_bytes("VmRSS")
    step()
    return _status_bytes("VmHWM") - before


def in_a_process(module: str, *arguments: str) -> int:
    """The number that a module prints as a program, in a process that gives freed memory back at once.

    Raises:
        RuntimeError: The program fails.
    """
    command = [sys.executable, "-m", module, *arguments]
    done = subprocess.run(command, cwd=_ROOT, env=os.environ | _ENVIRONMENT, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"memory could not be measured, which only Linux allows: {done.stderr.strip()}")
    return int(done.stdout)


def _step(layer: nn.Module, input: Tensor) -> None:
    output = layer(input.requires_grad_())
    output.backward(torch.ones((), dtype=output.dtype).expand_as(output))


def _status_bytes(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(step_bytes(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])))
