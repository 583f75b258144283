"""What a GPU benchmark leaves behind: one record per case and mode, a table of them, and how the goals were met."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from statistics import median, quantiles

from benchmarks.cases import Case
from benchmarks.floors import Floors, Rates, floors, useful_bytes, useful_flops
from benchmarks.gpu_cases import Goal, Job
from benchmarks.implementations import OURS
from benchmarks.report import format_table
from benchmarks.timing import ratio

__all__ = ["GpuRecord", "Result", "format_gpu_records", "percentiles", "read_records", "record"]


@dataclass(frozen=True)
class Result:
    """One implementation's time, and what it makes of it."""

    median_us: float
    p20_us: float
    p80_us: float
    rounds: int
    tflop_per_s: float  # useful ones: those that the case's own windows need
    gb_per_s: float  # likewise
    memory_percent: float  # of the floor, the time of the bytes at the rate of the copy
    matrix_percent: float  # of the floor, the time of the products at the rate of the large product


@dataclass(frozen=True)
class GpuRecord:
    """One case in one mode; the dictionaries are keyed by implementation."""

    case: str
    mode: str
    shape: dict[str, object]
    is_latency: bool
    memory_floor_us: float
    matrix_floor_us: float
    results: dict[str, Result]
    ratio: dict[str, float]  # of its time to natten2's, the median over the rounds
    failed: dict[str, str]  # the reason
    goal: dict[str, object] | None = field(default=None)


def percentiles(samples: Sequence[float]) -> tuple[float, float, float]:
    """The 20th, 50th, and 80th percentile."""
    if len(samples) == 1:
        return samples[0], samples[0], samples[0]
    fifths = quantiles(samples, n=5, method="inclusive")
    return fifths[0], median(samples), fifths[3]


def record(
    job: Job,
    mode: str,
    samples: Mapping[str, Sequence[float]],
    meanings: Mapping[str, Case],
    failed: Mapping[str, str],
    rates: Rates,
) -> GpuRecord:
    """Summarises the seconds of one case and mode; each implementation is credited with the work of its meaning."""
    results = {name: _result(meanings[name], mode, seconds, rates) for name, seconds in samples.items()}
    floor = floors(job.case, mode, rates)
    ours = samples.get(OURS)
    return GpuRecord(
        case=job.name,
        mode=mode,
        shape={name: value for name, value in asdict(job.case).items() if name != "name"},
        is_latency=job.is_latency,
        memory_floor_us=_digits(1e6 * floor.memory),
        matrix_floor_us=_digits(1e6 * floor.matrix),
        results=results,
        ratio={name: _digits(ratio(one, ours)) for name, one in samples.items() if ours and name != OURS},
        failed=dict(failed),
        goal=_goal(job, mode, results.get(OURS)),
    )


def read_records(content: Mapping[str, object]) -> list[GpuRecord]:
    """The records of a file that was written with `dataclasses.asdict`."""
    return [
        GpuRecord(**{**one, "results": {name: Result(**result) for name, result in one["results"].items()}})
        for one in content["records"]
    ]


def format_gpu_records(records: Sequence[GpuRecord]) -> str:
    """A table of all measurements, then what failed, then the goals."""
    header = ["case", "mode", "implementation", "µs", "p20", "p80", "TFLOP/s", "GB/s", "memory %", "matrix %", "ratio"]
    rows = [_row(one, name) for one in records for name in one.results]
    failures = [f"{one.case} {one.mode}: {name} failed: {why}" for one in records for name, why in one.failed.items()]
    goals = [_verdict(one) for one in records if one.goal is not None]
    blocks = [format_table(header, rows), "\n".join(failures), "\n".join(goals)]
    return "\n\n".join(block for block in blocks if block)


def _result(case: Case, mode: str, seconds: Sequence[float], rates: Rates) -> Result:
    low, middle, high = percentiles(seconds)
    floor: Floors = floors(case, mode, rates)
    return Result(
        median_us=_digits(1e6 * middle),
        p20_us=_digits(1e6 * low),
        p80_us=_digits(1e6 * high),
        rounds=len(seconds),
        tflop_per_s=_digits(useful_flops(case, mode) / middle / 1e12),
        gb_per_s=_digits(useful_bytes(case, mode) / middle / 1e9),
        memory_percent=_digits(100 * floor.memory / middle),
        matrix_percent=_digits(100 * floor.matrix / middle),
    )


def _goal(job: Job, mode: str, result: Result | None) -> dict[str, object] | None:
    if job.goal is None or mode != job.modes[0]:
        return None
    value = None if result is None else _value(job.goal, result)
    return {**asdict(job.goal), "value": value, "reached": value is not None and job.goal.reached(value)}


def _value(goal: Goal, result: Result) -> float:
    values = {
        "memory %": result.memory_percent,
        "matrix %": result.matrix_percent,
        "TFLOP/s": result.tflop_per_s,
        "ms": result.median_us / 1e3,
    }
    return values[goal.measure]


def _row(one: GpuRecord, name: str) -> list[str]:
    result = one.results[name]
    times = [f"{number:.1f}" for number in (result.median_us, result.p20_us, result.p80_us)]
    rates = [f"{number:.1f}" for number in (result.tflop_per_s, result.gb_per_s)]
    shares = [f"{number:.1f}" for number in (result.memory_percent, result.matrix_percent)]
    return [one.case, one.mode, name, *times, *rates, *shares, f"{one.ratio[name]:.2f}" if name in one.ratio else "-"]


def _verdict(one: GpuRecord) -> str:
    goal = one.goal
    value = "no result" if goal["value"] is None else f"{goal['value']:.4g} {goal['measure']}"
    state = "reached" if goal["reached"] else "missed"
    return f"{goal['name']} {one.case} {one.mode}: {state}: {value}, must {goal['must']:.4g}, aim {goal['aim']:.4g}"


def _digits(number: float) -> float:
    """Four digits are more than the noise leaves."""
    return float(f"{number:.4g}")
