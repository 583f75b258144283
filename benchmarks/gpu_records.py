"""What a GPU benchmark leaves behind: one record per case and mode, a table of them, and how the goals were met."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
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


# What a goal may be about, other than the ratio to another implementation.
_MEASURES: dict[str, Callable[[Result], float]] = {
    "memory %": lambda result: result.memory_percent,
    "matrix %": lambda result: result.matrix_percent,
    "TFLOP/s": lambda result: result.tflop_per_s,
    "ms": lambda result: result.median_us / 1e3,
}
_LONGEST_REASON = 120


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
    goals: list[dict[str, object]] = field(default_factory=list)


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
    ratios = {name: _digits(ratio(one, ours)) for name, one in samples.items() if ours and name != OURS}
    goals = job.goals if mode == job.modes[0] else ()
    return GpuRecord(
        case=job.name,
        mode=mode,
        shape={name: value for name, value in asdict(job.case).items() if name != "name"},
        is_latency=job.is_latency,
        memory_floor_us=_digits(1e6 * floor.memory),
        matrix_floor_us=_digits(1e6 * floor.matrix),
        results=results,
        ratio=ratios,
        failed=dict(failed),
        goals=[_judge(goal, results.get(OURS), ratios) for goal in goals if goal.measure in (*_MEASURES, *meanings)],
    )


def read_records(content: Mapping[str, object]) -> list[GpuRecord]:
    """The records of a file that was written with `dataclasses.asdict`."""
    return [
        GpuRecord(**{**one, "results": {name: Result(**result) for name, result in one["results"].items()}})
        for one in content["records"]
    ]


def format_gpu_records(records: Sequence[GpuRecord]) -> str:
    """A table of natten2's measurements and of the others' ratios, then what failed, then the goals."""
    others = list(dict.fromkeys(name for one in records for name in (*one.results, *one.failed) if name != OURS))
    header = ["case", "mode", "µs", "p20", "p80", "TFLOP/s", "GB/s", "memory %", "matrix %"]
    header += [f"{name} / {OURS}" for name in others]
    rows = [_row(one, others) for one in records]
    failures = [
        f"{one.case} {one.mode}: {name} failed: {why[:_LONGEST_REASON]}"
        for one in records
        for name, why in one.failed.items()
    ]
    goals = [_verdict(one, goal) for one in records for goal in one.goals]
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


def _judge(goal: Goal, result: Result | None, ratios: Mapping[str, float]) -> dict[str, object]:
    if goal.measure in _MEASURES:
        value = None if result is None else _MEASURES[goal.measure](result)
    else:
        value = ratios.get(goal.measure)
    return {**asdict(goal), "value": value, "reached": value is not None and goal.reached(value)}


def _row(one: GpuRecord, others: Sequence[str]) -> list[str]:
    ours, numbers = one.results.get(OURS), ["-"] * 7
    if ours is not None:
        rates = (ours.tflop_per_s, ours.gb_per_s, ours.memory_percent, ours.matrix_percent)
        numbers = [f"{number:.1f}" for number in (ours.median_us, ours.p20_us, ours.p80_us, *rates)]
    return [one.case, one.mode, *numbers, *(f"{one.ratio[name]:.2f}" if name in one.ratio else "-" for name in others)]


def _verdict(one: GpuRecord, goal: Mapping[str, object]) -> str:
    unit = goal["measure"] if goal["measure"] in _MEASURES else f"times as fast as {goal['measure']}"
    value = "no result" if goal["value"] is None else f"{goal['value']:.4g} {unit}"
    state = "reached" if goal["reached"] else "missed"
    return f"{goal['name']} {one.case} {one.mode}: {state}: {value}, must {goal['must']:.4g}, aim {goal['aim']:.4g}"


def _digits(number: float) -> float:
    """Four digits are more than the noise leaves."""
    return float(f"{number:.4g}")
