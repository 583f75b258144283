"""Rounds in which each implementation takes its turn, and whoever fails drops out; and a budget of seconds."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from benchmarks.gpu_device import Device
from benchmarks.timing import reason

__all__ = ["Budget", "GpuSettings", "sample_rounds"]

_FEWEST_ROUNDS = 10


@dataclass(frozen=True)
class GpuSettings:
    """How long to measure.

    Attributes:
        rounds: Samples of each implementation, if they fit in `seconds`.
        warmups: Calls of each before the first round.
        seconds: Slow cases get fewer rounds, though at least 10 of them, to take about this long.
        repeats: Calls in the captured graph of a latency.
    """

    rounds: int = 100
    warmups: int = 10
    seconds: float = 5.0
    repeats: int = 20


class Budget:
    """Seconds after which nothing new is started; without a limit, never."""

    def __init__(self, seconds: float | None, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._end = None if seconds is None else clock() + seconds

    @property
    def is_spent(self) -> bool:
        return self._end is not None and self._clock() >= self._end


def sample_rounds(
    runs: Mapping[str, Callable[[], object]], device: Device, settings: GpuSettings, *, is_cold: bool = True
) -> tuple[dict[str, list[float]], dict[str, str]]:
    """Samples every function once in each round.

    Returns:
        Seconds for each name, in the order of the rounds; and the reasons of those that failed, which have no seconds.
    """
    turns = _Turns(dict(runs), device, is_cold)
    round_seconds = turns.warm_up(settings)
    fitting = int(settings.seconds / round_seconds) if round_seconds > 0 else settings.rounds
    rounds = min(settings.rounds, max(fitting, _FEWEST_ROUNDS))
    samples: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, seconds in turns.take().items():
            samples[name].append(seconds)
    return {name: samples[name] for name in turns.runs}, turns.failed


class _Turns:
    """The functions that are still running, and why the others aren't."""

    def __init__(self, runs: dict[str, Callable[[], object]], device: Device, is_cold: bool) -> None:
        self.runs = runs
        self.failed: dict[str, str] = {}
        self._device, self._is_cold = device, is_cold

    def take(self) -> dict[str, float]:
        """One sample of each."""
        results = {}
        for name in list(self.runs):
            try:
                results[name] = self._device.seconds(self.runs[name], is_cold=self._is_cold)
            except Exception as error:
                self.failed[name] = reason(error)
                del self.runs[name]
        return results

    def warm_up(self, settings: GpuSettings) -> float:
        """Warms all of them up, slow ones less often; returns the seconds of the last round."""
        start, elapsed = time.monotonic(), 0.0
        for call in range(settings.warmups):
            before = time.monotonic()
            self.take()
            elapsed = time.monotonic() - before
            if call >= 1 and time.monotonic() - start > settings.seconds / 4:
                break
        return elapsed
