"""natten2 on a GPU against Swin on fused attention, FlexAttention, and NATTEN where it is installed.

Everything is in bfloat16. Times are the device's own, with its cache flushed before each; implementations take turns,
and every one of them is checked before it is timed. One that fails is reported, and the others go on.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path

import torch
import torch._functorch.config
from tqdm import tqdm

from benchmarks.cases import Case, Inputs, make_inputs
from benchmarks.compare import MODES as STEPS
from benchmarks.compare import check
from benchmarks.cpu import positive
from benchmarks.floors import Rates
from benchmarks.gpu_cases import JOBS, MODES, Job, shrink
from benchmarks.gpu_check import Expected, expect
from benchmarks.gpu_device import Cuda, Device, NoGpu
from benchmarks.gpu_implementations import GPU_IMPLEMENTATIONS, OURS
from benchmarks.gpu_plot import plot
from benchmarks.gpu_records import GpuRecord, format_gpu_records, read_records, record
from benchmarks.gpu_timing import Budget, GpuSettings, sample_rounds
from benchmarks.implementations import Attend
from benchmarks.report import describe_machine, write_json
from benchmarks.timing import reason

__all__ = ["Run", "add_arguments", "main", "measure"]

_DTYPE = torch.bfloat16
# Others round scores and weights to the inputs' dtype, so these are wider than natten2's.
_TOLERANCE, _TOLERANCE_OF_OTHERS = 2e-2, 5e-2
_SMALLEST_RMS = 1e-6
_LOST = 75  # EX_TEMPFAIL: a new process may succeed
_QUICK = GpuSettings(rounds=3, warmups=1, seconds=1.0, repeats=2)


@dataclass
class Run:
    """One run of the benchmark: where, how long, against whom, and what came of it."""

    device: Device
    rates: Rates
    settings: GpuSettings
    names: Sequence[str] = tuple(GPU_IMPLEMENTATIONS)
    budget: Budget = field(default_factory=lambda: Budget(None))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of :func:`main`."""
    cases = [job.name for job in JOBS]
    parser.add_argument("--case", nargs="+", choices=cases, default=cases, metavar="CASE", help=", ".join(cases))
    parser.add_argument("--mode", nargs="+", choices=MODES, help="by default those that matter for each case")
    parser.add_argument(
        "--implementation", nargs="+", choices=GPU_IMPLEMENTATIONS, default=list(GPU_IMPLEMENTATIONS), metavar="NAME"
    )
    parser.add_argument("--rounds", type=positive, help=f"samples of each, by default {GpuSettings.rounds}")
    parser.add_argument("--budget-seconds", type=positive, metavar="S", help="start nothing new after as many seconds")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all numbers there, after every case")
    parser.add_argument("--resume", action="store_true", help="keep the cases that the file of --json already holds")
    parser.add_argument("--show", nargs="+", type=Path, metavar="FILE", help="print such files, and measure nothing")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw a picture there")
    parser.add_argument("--no-gpu", action="store_true", help="try this code on the processor; numbers mean nothing")


def main(options: argparse.Namespace) -> None:
    """Measures what the options ask for, prints a table, and writes the files.

    Raises:
        SystemExit: There is no GPU, natten2 failed somewhere (1), or the device was lost (75).
    """
    if options.show is not None:
        print("\n\n".join(map(_show, options.show)))
        return
    if not options.no_gpu and not torch.cuda.is_available():
        raise SystemExit("error: there is no GPU; --no-gpu tries the benchmark's code without one")
    device = NoGpu() if options.no_gpu else Cuda()
    settings = _QUICK if options.no_gpu else GpuSettings()
    if options.rounds is not None:
        settings = replace(settings, rounds=options.rounds)
    run = Run(device, device.rates(), settings, options.implementation, Budget(options.budget_seconds))
    jobs = [job for job in JOBS if job.name in options.case]
    plan = [(shrink(job) if options.no_gpu else job, mode) for job in jobs for mode in options.mode or job.modes]

    records = _earlier(options.json, device) if options.resume else []
    rates = run.rates
    title = _title(_describe(device), rates.flops_per_second / 1e12, rates.bytes_per_second / 1e9)
    print(title)
    skipped = _measure_all(plan, run, records, partial(_write, options.json, run))
    print(format_gpu_records(records))
    if skipped:
        print(f"\nnot started: {', '.join(skipped)}")
    if options.plot is not None:
        plot(options.plot, records, title)
    if device.is_lost():
        print("error: the device was lost; --resume goes on where this run ended", file=sys.stderr)
        raise SystemExit(_LOST)
    failed = [f"{one.case} {one.mode}" for one in records if OURS in one.failed]
    if failed:
        raise SystemExit(f"error: {OURS} failed in {', '.join(failed)}")


def measure(job: Job, mode: str, run: Run) -> GpuRecord:
    """Checks and times every implementation that applies to a case."""
    case, samples, failed = job.case, {}, {}
    meanings = {name: GPU_IMPLEMENTATIONS[name].meaning(case) for name in run.names}
    meanings = {name: meaning for name, meaning in meanings.items() if meaning is not None}
    # The gradients alone are taken again and again of one graph, which compiled code would otherwise free.
    keep = torch._functorch.config.patch(donated_buffer=False) if mode == "bwd" else nullcontext()
    with keep:
        try:
            inputs = make_inputs(case, _DTYPE, requires_grad=mode != "fwd", device=run.device.torch_device)
            runs, failed = _prepare(job, mode, inputs, meanings, run)
            samples, failed_later = sample_rounds(runs, run.device, run.settings, is_cold=not job.is_latency)
            failed |= failed_later
        except Exception as error:
            failed = {name: failed.get(name, reason(error)) for name in meanings}
    repeats = run.settings.repeats if job.is_latency else 1
    samples = {name: [one / repeats for one in seconds] for name, seconds in samples.items()}
    return record(job, mode, samples, meanings, failed, run.rates)


def _measure_all(
    plan: Sequence[tuple[Job, str]], run: Run, records: list[GpuRecord], done: Callable[[list[GpuRecord]], None]
) -> list[str]:
    """Adds a record for every case and mode that has none yet; returns those that were not started."""
    known = {(one.case, one.mode) for one in records}
    wanted = [(job, mode) for job, mode in plan if (job.name, mode) not in known]
    skipped = []
    with tqdm(wanted, unit="case", leave=False, disable=None) as progress:
        for job, mode in progress:
            progress.set_description(f"{job.name} {mode}")
            if run.budget.is_spent or run.device.is_lost():
                skipped.append(f"{job.name} {mode}")
                continue
            records.append(measure(job, mode, run))
            done(records)
            if not run.device.is_lost():
                run.device.release()
    return skipped


def _prepare(
    job: Job, mode: str, inputs: Inputs, meanings: dict[str, Case], run: Run
) -> tuple[dict[str, Callable[[], object]], dict[str, str]]:
    """The functions to time, all of them checked, and the reasons of those that can't be."""
    runs, failed, expected = {}, {}, {}
    for name, meaning in meanings.items():
        if run.budget.is_spent and name != OURS:
            failed[name] = "not started: the budget was spent"
            continue
        own = inputs if meaning.bias == job.case.bias else inputs._replace(rpb=None)
        try:
            attend = GPU_IMPLEMENTATIONS[name].prepare(meaning, own)
            if meaning not in expected:
                expected[meaning] = expect(meaning, own, with_gradients=mode != "fwd")
            _check(name, mode, attend, meaning, own, expected[meaning])
            function = _step(mode, attend, meaning, own)
            runs[name] = run.device.capture(function, run.settings.repeats) if job.is_latency else function
        except Exception as error:
            failed[name] = reason(error)
    return runs, failed


def _check(name: str, mode: str, attend: Attend, case: Case, inputs: Inputs, expected: Expected) -> None:
    results = STEPS["fwd" if mode == "fwd" else "fwdbwd"](attend, case, inputs)
    tolerance = _TOLERANCE if name == OURS else _TOLERANCE_OF_OTHERS
    check(f"{name} on {case.name}", expected.pick(results), expected.values, tolerance, _SMALLEST_RMS)


def _step(mode: str, attend: Attend, case: Case, inputs: Inputs) -> Callable[[], object]:
    if mode != "bwd":
        return partial(STEPS[mode], attend, case, inputs)
    output = attend(case, inputs)
    return lambda: torch.autograd.grad(output, inputs.leaves, inputs.grad_output, retain_graph=True)


def _earlier(path: Path | None, device: Device) -> list[GpuRecord]:
    if path is None or not path.exists():
        return []
    content = json.loads(path.read_text())
    before, now = content["machine"]["device"], device.describe()["device"]
    if before != now:
        raise SystemExit(f"error: {path} was measured on {before}, and this is {now}")
    return read_records(content)


def _show(path: Path) -> str:
    content = json.loads(path.read_text())
    gemm, copy = content["canary"]["gemm_tflop_per_s"], content["canary"]["copy_gb_per_s"]
    return f"{_title(content['machine'], gemm, copy)}\n{format_gpu_records(read_records(content))}"


def _write(path: Path | None, run: Run, records: Sequence[GpuRecord]) -> None:
    if path is None:
        return
    content = {
        "machine": _describe(run.device),
        "canary": {
            "gemm_tflop_per_s": round(run.rates.flops_per_second / 1e12, 4),
            "copy_gb_per_s": round(run.rates.bytes_per_second / 1e9, 2),
        },
        "settings": {**asdict(run.settings), "dtype": str(_DTYPE).removeprefix("torch.")},
        "records": [asdict(one) for one in records],
    }
    write_json(path, content)


def _describe(device: Device) -> dict[str, str]:
    return {**device.describe(), **describe_machine(), "triton": _version("triton"), "natten": _version("natten")}


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _title(machine: Mapping[str, str], gemm: float, copy: float) -> str:
    """The device and its canary in one line."""
    return f"{machine['device']}, torch {machine['torch']}: matrix product {gemm:.4g} TFLOP/s, copy {copy:.4g} GB/s"
