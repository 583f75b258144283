"""Interleaved timing: in every round each function takes its turn, so drift and noise meet all of them alike."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import median

import torch

__all__ = ["Settings", "clock_for", "interleave", "ratio", "sample", "threads"]

Clock = Callable[[], float]


@dataclass(frozen=True)
class Settings:
    """How long to measure.

    Attributes:
        rounds: Samples of each function.
        warmups: Calls of each function before the first round.
        min_seconds: Shortest sample: a function that is faster is called several times.
    """

    rounds: int = 15
    warmups: int = 2
    min_seconds: float = 0.02

    def __post_init__(self) -> None:
        if self.rounds < 1:
            raise ValueError(f"rounds must be at least 1, got {self.rounds}")


def clock_for(thread_count: int) -> Clock:
    """CPU time for one thread, which preemption can't disturb; wall time for more, whose CPU times would add up."""
    return time.process_time if thread_count == 1 else time.perf_counter


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Sets the number of torch's threads, and sets it back in the end."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def sample(function: Callable[[], object], min_seconds: float, clock: Clock = time.process_time) -> float:
    """Mean seconds per call of `function`, called at least once and until `min_seconds` have passed."""
    calls, elapsed, start = 0, 0.0, clock()
    while calls == 0 or elapsed < min_seconds:
        function()
        calls += 1
        elapsed = clock() - start
    return elapsed / calls


def interleave(
    functions: Mapping[str, Callable[[], object]], settings: Settings, clock: Clock = time.process_time
) -> dict[str, list[float]]:
    """Samples every function once in each round.

    Returns:
        Seconds per call for each name, in the order of the rounds.
    """
    for function in functions.values():
        for _ in range(settings.warmups):
            function()
    samples: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(settings.rounds):
        for name, function in functions.items():
            samples[name].append(sample(function, settings.min_seconds, clock))
    return samples


def ratio(samples: Sequence[float], baseline: Sequence[float]) -> float:
    """Median over the rounds of `samples / baseline`, which is steadier than the ratio of the two medians."""
    return median(one / other for one, other in zip(samples, baseline, strict=True))
