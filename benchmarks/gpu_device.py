"""The device that is measured: its clock, its two rates, its name. It knows nothing of attention.

`Cuda` measures a GPU. `NoGpu` has the same methods for the processor, so that all other code can be tried without a
GPU; its numbers mean nothing.
"""

from __future__ import annotations

import gc
import platform
import time
from collections.abc import Callable
from statistics import median
from typing import Protocol

import torch

from benchmarks.floors import Rates

__all__ = ["NO_GPU", "Cuda", "Device", "NoGpu"]

NO_GPU = "no GPU: numbers mean nothing"
_FLUSH_BYTES = 256 * 2**20
# The device pauses while the processor queues the work; a boosted clock makes a pause no shorter than said here.
_CYCLES_PER_SECOND = 2_000_000_000
_PAUSE_SECONDS, _LONGEST_PAUSE_SECONDS = 0.001, 0.016
_CANARY_ROUNDS = 20


class Device(Protocol):
    """What the benchmark needs of a device."""

    torch_device: torch.device

    def seconds(self, function: Callable[[], object], *, is_cold: bool = True) -> float:
        """The time of one call of `function`; `is_cold` empties the cache before it."""
        ...

    def capture(self, function: Callable[[], object], repeats: int) -> Callable[[], object]:
        """`repeats` calls of `function`, as one function that costs the processor nothing more."""
        ...

    def rates(self) -> Rates:
        """The canary: the rates of a large matrix product and of a large copy."""
        ...

    def is_lost(self) -> bool:
        """Whether an earlier error has made the device unusable for this process."""
        ...

    def release(self) -> None:
        """Gives memory back that no tensor holds."""
        ...

    def describe(self) -> dict[str, str]:
        """What decides the speed."""
        ...


class Cuda:
    """A GPU, timed with its own events."""

    def __init__(self) -> None:
        self.torch_device = torch.device("cuda", torch.cuda.current_device())
        self._flushed = torch.empty(_FLUSH_BYTES, dtype=torch.uint8, device=self.torch_device)

    def seconds(self, function: Callable[[], object], *, is_cold: bool = True) -> float:
        pause = _PAUSE_SECONDS
        while True:
            elapsed, queued = self._sample(function, is_cold, pause)
            # Had the pause ended first, the sample would hold the processor's time too.
            if queued < pause or pause >= _LONGEST_PAUSE_SECONDS:
                return elapsed
            pause *= 4

    def _sample(self, function: Callable[[], object], is_cold: bool, pause: float) -> tuple[float, float]:
        """Seconds of the device, and those that the processor took to queue them."""
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        if is_cold:
            self._flushed.zero_()
        begin = time.perf_counter()
        torch.cuda._sleep(int(pause * _CYCLES_PER_SECOND))
        start.record()
        function()
        end.record()
        queued = time.perf_counter() - begin
        end.synchronize()
        return start.elapsed_time(end) / 1e3, queued

    def capture(self, function: Callable[[], object], repeats: int) -> Callable[[], object]:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                function()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(repeats):
                function()
        return graph.replay

    def rates(self) -> Rates:
        return _rates(self, side=8192, copied=10**9)

    def is_lost(self) -> bool:
        try:
            torch.cuda.synchronize()
            torch.zeros(1, device=self.torch_device).add_(1).item()
        except RuntimeError:
            return True
        return False

    def release(self) -> None:
        gc.collect()  # an error's traceback can hold tensors in a cycle
        torch.cuda.empty_cache()

    def describe(self) -> dict[str, str]:
        properties = torch.cuda.get_device_properties(self.torch_device)
        return {
            "device": properties.name,
            "compute_capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": str(properties.multi_processor_count),
            "memory_gib": f"{properties.total_memory / 2**30:.1f}",
            "cache_mib": f"{properties.L2_cache_size / 2**20:.0f}",
            "cuda": str(torch.version.cuda or torch.version.hip),
        }


class NoGpu:
    """The processor, timed with the wall clock."""

    def __init__(self) -> None:
        self.torch_device = torch.device("cpu")
        self._flushed = torch.empty(2**16, dtype=torch.uint8)

    def seconds(self, function: Callable[[], object], *, is_cold: bool = True) -> float:
        if is_cold:
            self._flushed.zero_()
        start = time.perf_counter()
        function()
        return time.perf_counter() - start

    def capture(self, function: Callable[[], object], repeats: int) -> Callable[[], object]:
        def replay() -> None:
            for _ in range(repeats):
                function()

        return replay

    def rates(self) -> Rates:
        return _rates(self, side=64, copied=10**6)

    def is_lost(self) -> bool:
        return False

    def release(self) -> None:
        pass

    def describe(self) -> dict[str, str]:
        return {"device": NO_GPU, "machine": platform.machine()}


def _rates(device: Device, side: int, copied: int) -> Rates:
    # Random numbers: a product of zeros draws less power, and is faster than any real one.
    left, right = (torch.randn(side, side, device=device.torch_device).bfloat16() for _ in range(2))
    product = torch.empty_like(left)
    source = torch.zeros(copied, dtype=torch.uint8, device=device.torch_device)
    target = torch.empty_like(source)
    return Rates(
        flops_per_second=2 * side**3 / _median(device, lambda: torch.mm(left, right, out=product)),
        bytes_per_second=2 * copied / _median(device, lambda: target.copy_(source)),
    )


def _median(device: Device, function: Callable[[], object]) -> float:
    for _ in range(_CANARY_ROUNDS // 2):
        function()
    return median(device.seconds(function) for _ in range(_CANARY_ROUNDS))
