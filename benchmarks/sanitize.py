"""A few small problems, forward and backward, for a tool that watches every memory access.

`compute-sanitizer --tool memcheck python -m benchmarks.sanitize`
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence

# A cached block hides an access beyond a tensor's end, so every tensor gets memory of its own.
os.environ.setdefault("PYTORCH_NO_CUDA_MEMORY_CACHING", "1")

import torch

from benchmarks.cases import Case, make_inputs
from benchmarks.compare import MODES
from benchmarks.implementations import IMPLEMENTATIONS, OURS

__all__ = ["SWEEP", "main", "sweep"]

# Axes that no tile divides, and what changes the code that runs.
SWEEP = (
    (Case("bias", (13, 11), 7, bias=True), torch.bfloat16),
    (Case("bias", (13, 11), 7, bias=True), torch.float32),
    (Case("dilated-stride", (17, 19), (5, 4), stride=(2, 3), dilation=(2, 1), head_dim=24), torch.float16),
    (Case("causal", (129,), 40, is_causal=True, head_dim=128), torch.bfloat16),
    (Case("shared-keys", (67,), 9, heads=4, key_heads=2, additional=5, head_dim=3), torch.bfloat16),
    (Case("volume", (5, 7, 9), (3, 4, 5), is_causal=(True, False, False), bias=True), torch.bfloat16),
    (Case("wide", (9, 8), (5, 3), heads=2, key_heads=1, additional=5, head_dim=256, bias=True), torch.float16),
    (Case("chunks", (25, 24), (21, 20), head_dim=64), torch.bfloat16),
)


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the sweep on the device that `arguments`, by default the command line's, name."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.sanitize", description=__doc__)
    parser.add_argument("--device", default="cuda")
    sweep(torch.device(parser.parse_args(arguments).device))


def sweep(device: torch.device) -> None:
    """Runs every problem once, and prints its name.

    Raises:
        RuntimeError: A result is not finite.
    """
    for case, dtype in SWEEP:
        inputs = make_inputs(case, dtype, requires_grad=True, device=device)
        results = MODES["fwdbwd"](IMPLEMENTATIONS[OURS].attend, case, inputs)
        if not all(bool(result.isfinite().all()) for result in results):
            raise RuntimeError(f"{case.name} in {dtype}: a result is not finite")
        print(f"{case.name} {dtype}")


if __name__ == "__main__":
    main()
