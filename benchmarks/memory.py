"""Peak memory of one training step of an attention layer: the qkv projection, the operator, the output projection.

A process of its own for every layer takes the step, and Linux tells the most memory that it ever held, less what it
held before the step: the input, the weights, and the libraries. Unlike a count of torch's allocations, that includes
what kernels allocate themselves. Memory that is freed goes back to the system at once, so nothing is hidden in a heap.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks.baselines import partition, reverse, swin_attention
from benchmarks.compare import DTYPES
from natten2.nn import NeighborhoodAttention2D

__all__ = ["LAYERS", "Memory", "SwinLayer", "format_memory", "measure_memory", "step_bytes"]

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


class SwinLayer(nn.Module):
    """Swin's window attention with its two projections, `[B, height, width, channels]` to the same shape.

    The input is partitioned and the result reversed, as in Swin itself, so query, key, and value are not copied for it.
    """

    def __init__(self, channels: int, heads: int, window: int) -> None:
        super().__init__()
        self.heads, self.window = heads, window
        self.qkv = nn.Linear(channels, 3 * channels)
        self.rpb = nn.Parameter(torch.zeros(heads, 2 * window - 1, 2 * window - 1))
        self.proj = nn.Linear(channels, channels)

    def forward(self, input: Tensor) -> Tensor:
        channels = input.shape[-1]
        blocks = partition(input.unsqueeze(-2), self.window).view(-1, self.window, self.window, channels)
        query, key, value = self.qkv(blocks).unflatten(-1, (3, self.heads, -1)).unbind(-3)
        output = swin_attention(query, key, value, self.rpb, self.window, (channels // self.heads) ** -0.5)
        shape = (*input.shape[:-1], 1, channels)
        return reverse(self.proj(output.flatten(-2)), self.window, shape).squeeze(-2)


LAYERS = {
    "natten2": lambda: NeighborhoodAttention2D(_CHANNELS, _HEADS, _WINDOW, rel_pos_bias=True),
    "swin": lambda: SwinLayer(_CHANNELS, _HEADS, _WINDOW),
}


def measure_memory(dtype: str, side: int = _SIDE, batch: int = _BATCH) -> Memory:
    """Measures every layer in a process of its own.

    Raises:
        RuntimeError: The system isn't Linux, or doesn't let a process reset its peak.
    """
    return Memory(dtype, batch, side, _CHANNELS, {name: _in_a_process(name, dtype, side, batch) for name in LAYERS})


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
    Path("/proc/self/clear_refs").write_text("5")
    before = _status_bytes("VmRSS")
    _step(layer, input)
    return _status_bytes("VmHWM") - before


def _step(layer: nn.Module, input: Tensor) -> None:
    output = layer(input.requires_grad_())
    output.backward(torch.ones((), dtype=output.dtype).expand_as(output))


def _status_bytes(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))


def _in_a_process(name: str, dtype: str, side: int, batch: int) -> int:
    command = [sys.executable, "-m", "benchmarks.memory", name, dtype, str(side), str(batch)]
    done = subprocess.run(command, cwd=_ROOT, env=os.environ | _ENVIRONMENT, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"memory could not be measured, which only Linux allows: {done.stderr.strip()}")
    return int(done.stdout)


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(step_bytes(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])))
