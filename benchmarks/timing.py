"""Interleaved timing: in every round each function takes its turn, so drift and noise meet all of them alike."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import median

import torch

__all__ = [
    "QUIET_SECONDS",
    "Clock",
    "Settings",
    "clock_for",
    "interleave",
    "ratio",
    "reason",
    "region_seconds",
    "sample",
    "threads",
]

Clock = Callable[[], float]

# A parallel region takes longer than this only where its threads wait for other programs.
QUIET_SECONDS = 50e-6
# Elements that torch gives to one thread at least.
_GRAIN = 1 << 15
_FEWEST_ROUNDS = 3
_LONGEST_REASON = 300


@dataclass(frozen=True)
class Settings:
    """How long to measure.

    Attributes:
        rounds: Samples of each function.
        warmups: Calls of each function before the first round.
        settling: Calls before each sample: they clean up after the function whose turn was before, whose memory the
            system may take back within them, and fill the caches.
        min_seconds: Shortest sample: a function that is faster is called several times.
        patience: Seconds of samples after which a function takes part in no more rounds, though in at least 3 of them.
    """

    rounds: int = 15
    warmups: int = 2
    settling: int = 1
    min_seconds: float = 0.02
    patience: float = 10.0

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
            taken = samples[name]
            if len(taken) < _FEWEST_ROUNDS or sum(taken) < settings.patience:
                for _ in range(settings.settling):
                    function()
                taken.append(sample(function, settings.min_seconds, clock))
    return samples


def ratio(samples: Sequence[float], baseline: Sequence[float]) -> float:
    """Median of `samples / baseline` over the rounds that both took part in, steadier than the ratio of the medians."""
    return median(one / other for one, other in zip(samples, baseline, strict=False))


def region_seconds(thread_count: int, calls: int = 200) -> float:
    """Median wall seconds of a parallel region of torch's threads in which each fills a few pages."""
    pages = torch.empty(thread_count * _GRAIN, dtype=torch.uint8)
    return median(sample(lambda: pages.fill_(0), 0.0, time.perf_counter) for _ in range(calls))


def reason(error: BaseException) -> str:
    """An error in one line, not a long one."""
    text = " ".join(f"{type(error).__name__}: {error}".split())
    return text if len(text) <= _LONGEST_REASON else text[: _LONGEST_REASON - 3] + "..."
