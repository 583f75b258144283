"""Checks implementations against the reference, then times them in turns."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from statistics import median

import torch
from torch import Tensor
from tqdm import tqdm

from benchmarks.cases import Case, Inputs, make_inputs
from benchmarks.floors import useful_bytes, useful_flops
from benchmarks.gpu_check import expect_everything
from benchmarks.implementations import DEFAULT_NAMES, IMPLEMENTATIONS, OURS, Attend
from benchmarks.peak import peak
from benchmarks.timing import (
    QUIET_SECONDS,
    Settings,
    clock_for,
    interleave,
    ratio,
    reason,
    region_seconds,
    threads,
)

__all__ = ["DTYPES", "MODES", "ONE_THREAD", "Record", "WrongResultError", "check", "compare"]

Step = Callable[[Attend, Case, Inputs], tuple[Tensor, ...]]

DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float64": torch.float64,
}
# natten2 itself on one thread, in a comparison on several.
ONE_THREAD = "one-thread"
_PEAK = "peak"
# Swin's scores and softmax are rounded to the inputs' dtype, so these are wider than what natten2's own tests allow.
_TOLERANCES = {torch.float32: 2e-5, torch.bfloat16: 5e-2, torch.float16: 5e-3, torch.float64: 1e-12}
# Inputs have unit variance. A smaller result's error, such as a vanishing gradient's, is taken relative to this.
_SMALLEST_RMS = 0.1


class WrongResultError(RuntimeError):
    """An implementation disagrees with the reference, so its speed means nothing."""


@dataclass(frozen=True)
class Record:
    """One measurement; the dictionaries are keyed by implementation.

    Attributes:
        gflop: Operations of the matrix products, in 1e9.
        flop_per_byte: Of those, for each byte of the inputs and outputs.
        peak_gflop_per_s: Of multiply-adds in float32, whatever the dtype, on all threads.
        ratio: Of its time to natten2's.
        share_of_peak: Of `gflop` in its time, so what it computes in vain does not count.
        failed: Why an implementation could not run.
        skipped: Why nothing was measured.
    """

    case: str
    dtype: str
    mode: str
    gflop: float
    flop_per_byte: float
    peak_gflop_per_s: float | None = None
    median_ms: dict[str, float] = field(default_factory=dict)
    min_ms: dict[str, float] = field(default_factory=dict)
    ratio: dict[str, float] = field(default_factory=dict)
    share_of_peak: dict[str, float] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    skipped: str | None = None


def _forward(attend: Attend, case: Case, inputs: Inputs) -> tuple[Tensor, ...]:
    with torch.no_grad():
        return (attend(case, inputs),)


def _forward_backward(attend: Attend, case: Case, inputs: Inputs) -> tuple[Tensor, ...]:
    output = attend(case, inputs)
    return output, *torch.autograd.grad(output, inputs.leaves, inputs.grad_output)


MODES: dict[str, Step] = {"fwd": _forward, "fwdbwd": _forward_backward}


def compare(
    cases: Sequence[Case],
    dtypes: Sequence[str],
    modes: Sequence[str],
    settings: Settings,
    names: Sequence[str] = DEFAULT_NAMES,
    thread_count: int = 1,
) -> list[Record]:
    """Checks and times every implementation that applies, for every combination of case, dtype, and mode.

    Args:
        cases: The shapes.
        dtypes: Names from `DTYPES`.
        modes: "fwd" for the forward, "fwdbwd" for the forward and the gradients of every input.
        settings: How long to measure.
        names: Names from `IMPLEMENTATIONS`; natten2 is measured in any case.
        thread_count: Number of torch's threads. With more than one a case is skipped while other programs disturb them.

    Raises:
        WrongResultError: An implementation disagrees with the reference.
    """
    jobs = [(case, dtype, mode) for case in cases for dtype in dtypes for mode in modes]
    records = []
    with threads(thread_count), tqdm(jobs, unit="case", leave=False, disable=None) as progress:
        for case, dtype, mode in progress:
            progress.set_description(f"{case.name} {dtype} {mode}")
            records.append(_record(case, dtype, mode, settings, names, thread_count))
    return records


def _record(case: Case, dtype: str, mode: str, settings: Settings, names: Sequence[str], thread_count: int) -> Record:
    record = Record(
        case.name,
        dtype,
        mode,
        gflop=_digits(useful_flops(case, mode) / 1e9),
        flop_per_byte=_digits(useful_flops(case, mode) / useful_bytes(case, mode, DTYPES[dtype].itemsize)),
    )
    before = _disturbance(thread_count)
    if before is not None:
        return replace(record, skipped=before)
    meanings = {name: IMPLEMENTATIONS[name].meaning(case) for name in IMPLEMENTATIONS if name in {OURS, *names}}
    runs, failed = _prepare(meanings, DTYPES[dtype], MODES[mode])
    runs[_PEAK] = peak().run
    if thread_count > 1:
        runs[ONE_THREAD] = partial(_on_one_thread, runs[OURS])
    samples = interleave(runs, settings, clock_for(thread_count))
    after = _disturbance(thread_count)
    if after is not None:
        return replace(record, skipped=after)
    # Seconds of as many operations as the case has, on as many threads.
    at_peak = [one * useful_flops(case, mode) / peak().flops / thread_count for one in samples.pop(_PEAK)]
    return replace(record, failed=failed, **_summarize(samples, at_peak, record.gflop))


def _disturbance(thread_count: int) -> str | None:
    """Why wall times would mean nothing now."""
    if thread_count == 1:
        return None
    seconds = region_seconds(thread_count)
    if seconds < QUIET_SECONDS:
        return None
    return f"the machine is busy: an empty parallel region takes {1e6 * seconds:.0f} us, not {1e6 * QUIET_SECONDS:.0f}"


def _on_one_thread(run: Callable[[], object]) -> object:
    with threads(1):
        return run()


def _prepare(
    meanings: Mapping[str, Case | None], dtype: torch.dtype, step: Step
) -> tuple[dict[str, Callable[[], object]], dict[str, str]]:
    """The functions to time, all of them checked, and the reasons of those that can't run here."""
    runs, failed = {}, {}
    inputs: dict[Case, Inputs] = {}
    expected: dict[Case, list[Tensor]] = {}
    for name, meaning in meanings.items():
        if meaning is None:
            continue
        if meaning not in inputs:
            inputs[meaning] = make_inputs(meaning, dtype, requires_grad=step is not _forward)
            expected[meaning] = _expect(meaning, inputs[meaning], step is not _forward)
        run = partial(step, IMPLEMENTATIONS[name].attend, meaning, inputs[meaning])
        try:
            results = run()
        except Exception as error:
            if name == OURS:
                raise
            failed[name] = reason(error)
            continue
        check(f"{name} on {meaning.name}", results, expected[meaning], _TOLERANCES[dtype])
        runs[name] = run
    return runs, failed


def _expect(case: Case, inputs: Inputs, with_gradients: bool) -> list[Tensor]:
    """The reference's output and gradients in float64, one head after another, since what it gathers is large."""
    if case.key_heads is not None:
        return expect_everything(case, inputs, with_gradients, torch.float64).values
    one = replace(case, heads=1)
    parts = [
        expect_everything(one, _head(inputs, head), with_gradients, torch.float64).values for head in range(case.heads)
    ]
    axes = [-2, *(0 if leaf is inputs.rpb else -2 for leaf in inputs.leaves)]
    return [torch.cat(column, axis) for column, axis in zip(zip(*parts, strict=True), axes, strict=False)]


def _head(inputs: Inputs, head: int) -> Inputs:
    one_head = slice(head, head + 1)
    return Inputs(
        *(None if one is None else one[one_head] if one is inputs.rpb else one[..., one_head, :] for one in inputs)
    )


def check(
    name: str,
    results: Sequence[Tensor],
    expected: Sequence[Tensor],
    tolerance: float,
    smallest_rms: float = _SMALLEST_RMS,
) -> None:
    """Compares an output and its gradients with the reference's.

    Args:
        name: What is checked, for the error.
        results, expected: The output, then gradients.
        tolerance: Largest error, relative to the expected norm.
        smallest_rms: The error of a tensor whose root mean square is expected to be smaller is relative to this.

    Raises:
        WrongResultError: One is further away, relative to the expected norm, than `tolerance`, or not a number.
    """
    for index, (result, right) in enumerate(zip(results, expected, strict=True)):
        right = right.detach()
        smallest = smallest_rms * right.numel() ** 0.5
        error = float((result.detach() - right).norm()) / max(float(right.norm()), smallest)
        if not error <= tolerance:
            part = "output" if index == 0 else f"gradient {index}"
            raise WrongResultError(
                f"{name} in {result.dtype}: relative error of the {part} is {error:.1e} > {tolerance:.0e}"
            )


def _summarize(
    samples: Mapping[str, Sequence[float]], at_peak: Sequence[float], gflop: float
) -> dict[str, float | dict[str, float]]:
    """The fields of a record that come of samples; those at the peak took part in every round too."""
    return {
        "peak_gflop_per_s": _digits(gflop / median(at_peak)),
        "median_ms": {name: _digits(1e3 * median(seconds)) for name, seconds in samples.items()},
        "min_ms": {name: _digits(1e3 * min(seconds)) for name, seconds in samples.items()},
        "ratio": {name: _digits(ratio(seconds, samples[OURS])) for name, seconds in samples.items() if name != OURS},
        "share_of_peak": {name: _digits(ratio(at_peak, seconds)) for name, seconds in samples.items()},
    }


def _digits(number: float) -> float:
    """Four digits are more than the noise leaves."""
    return float(f"{number:.4g}")
