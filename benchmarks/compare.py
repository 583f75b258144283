"""Checks implementations against the reference, then times them in turns."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import median

import torch
from torch import Tensor
from tqdm import tqdm

from benchmarks.baselines import gather_attention
from benchmarks.cases import Case, Inputs, make_inputs
from benchmarks.implementations import IMPLEMENTATIONS, OURS, Attend
from benchmarks.timing import Settings, clock_for, interleave, ratio, threads

__all__ = ["DTYPES", "MODES", "Record", "WrongResultError", "check", "compare"]

Step = Callable[[Attend, Case, Inputs], tuple[Tensor, ...]]

DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float64": torch.float64,
}
# Swin's scores and softmax are rounded to the inputs' dtype, so these are wider than what natten2's own tests allow.
_TOLERANCES = {torch.float32: 2e-5, torch.bfloat16: 5e-2, torch.float16: 5e-3, torch.float64: 1e-12}
# Inputs have unit variance. A smaller result's error, such as a vanishing gradient's, is taken relative to this.
_SMALLEST_RMS = 0.1


class WrongResultError(RuntimeError):
    """An implementation disagrees with the reference, so its speed means nothing."""


@dataclass(frozen=True)
class Record:
    """One measurement; the dictionaries are keyed by implementation."""

    case: str
    dtype: str
    mode: str
    median_ms: dict[str, float]
    min_ms: dict[str, float]
    ratio: dict[str, float]  # of its time to natten2's


def _forward(attend: Attend, case: Case, inputs: Inputs) -> tuple[Tensor, ...]:
    with torch.no_grad():
        return (attend(case, inputs),)


def _forward_backward(attend: Attend, case: Case, inputs: Inputs) -> tuple[Tensor, ...]:
    output = attend(case, inputs)
    return output, *torch.autograd.grad(output, inputs.leaves, inputs.grad_output)


MODES: dict[str, Step] = {"fwd": _forward, "fwdbwd": _forward_backward}


def compare(
    cases: Sequence[Case], dtypes: Sequence[str], modes: Sequence[str], settings: Settings, thread_count: int = 1
) -> list[Record]:
    """Checks and times every implementation that applies, for every combination of case, dtype, and mode.

    Args:
        cases: The shapes.
        dtypes: Names from `DTYPES`.
        modes: "fwd" for the forward, "fwdbwd" for the forward and the gradients of every input.
        settings: How long to measure.
        thread_count: Number of torch's threads.

    Raises:
        WrongResultError: An implementation disagrees with the reference.
    """
    jobs = [(case, dtype, mode) for case in cases for dtype in dtypes for mode in modes]
    records = []
    with threads(thread_count), tqdm(jobs, unit="case", leave=False, disable=None) as progress:
        for case, dtype, mode in progress:
            progress.set_description(f"{case.name} {dtype} {mode}")
            samples = _measure(case, DTYPES[dtype], MODES[mode], settings, thread_count)
            records.append(_summarize(case.name, dtype, mode, samples))
    return records


def _measure(
    case: Case, dtype: torch.dtype, step: Step, settings: Settings, thread_count: int
) -> dict[str, list[float]]:
    inputs = make_inputs(case, dtype, requires_grad=step is not _forward)
    names = [name for name, implementation in IMPLEMENTATIONS.items() if implementation.meaning(case) is not None]
    runs = {name: partial(step, IMPLEMENTATIONS[name].attend, case, inputs) for name in names}
    expected: dict[Case, tuple[Tensor, ...]] = {}
    for name, run in runs.items():
        meaning = IMPLEMENTATIONS[name].meaning(case)
        if meaning not in expected:
            expected[meaning] = step(_reference, meaning, _in_float64(inputs))
        check(f"{name} on {case.name}", run(), expected[meaning], _TOLERANCES[dtype])
    return interleave(runs, settings, clock_for(thread_count))


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


def _reference(case: Case, inputs: Inputs) -> Tensor:
    return gather_attention(*inputs.tensors, *case.parameters)


def _in_float64(inputs: Inputs) -> Inputs:
    return Inputs(*(None if one is None else one.detach().double().requires_grad_(one.requires_grad) for one in inputs))


def _summarize(case: str, dtype: str, mode: str, samples: Mapping[str, Sequence[float]]) -> Record:
    return Record(
        case,
        dtype,
        mode,
        median_ms={name: _digits(1e3 * median(seconds)) for name, seconds in samples.items()},
        min_ms={name: _digits(1e3 * min(seconds)) for name, seconds in samples.items()},
        ratio={name: _digits(ratio(seconds, samples[OURS])) for name, seconds in samples.items() if name != OURS},
    )


def _digits(number: float) -> float:
    """Four digits are more than the noise leaves."""
    return float(f"{number:.4g}")
