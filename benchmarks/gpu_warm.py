"""Runs natten2 once on every problem of the GPU benchmark and of the sanitizer's sweep, in many processes at once.

`python -m benchmarks.gpu_warm` leaves the kernels in Triton's cache on the disk. There those programs find them, which
would compile one after the other.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import torch

from benchmarks.cases import Case, make_inputs
from benchmarks.compare import MODES
from benchmarks.gpu_cases import JOBS, shrink
from benchmarks.gpu_timing import reason
from benchmarks.implementations import IMPLEMENTATIONS, OURS
from benchmarks.sanitize import SWEEP

__all__ = ["main", "problems"]

Problem = tuple[Case, torch.dtype, str]


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the problems on the device that `arguments`, by default the command line's, name.

    Raises:
        SystemExit: One of them failed.
    """
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_warm", description=__doc__)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--processes", type=int, default=min(os.cpu_count() or 1, 12))
    options = parser.parse_args(arguments)
    wanted = problems(is_small=options.device == "cpu")
    with ProcessPoolExecutor(options.processes, get_context("spawn")) as pool:
        failed = [one for one in pool.map(_run, wanted, [options.device] * len(wanted)) if one is not None]
    print("\n".join([*failed, f"{len(wanted) - len(failed)} of {len(wanted)} problems ran"]))
    if failed:
        raise SystemExit(1)


def problems(is_small: bool) -> list[Problem]:
    """One problem for everything that is compiled alike, those that take longest first."""
    jobs = [(shrink(job) if is_small else job, mode) for job in JOBS for mode in job.modes]
    wanted = [(job.case, torch.bfloat16, "fwd" if mode == "fwd" else "fwdbwd") for job, mode in jobs]
    wanted += [(case, dtype, "fwdbwd") for case, dtype in SWEEP]
    distinct = {
        (case.parameters, case.head_dim, case.bias, dtype, mode): (case, dtype, mode) for case, dtype, mode in wanted
    }
    return sorted(distinct.values(), key=lambda problem: problem[2] == "fwd")


def _run(problem: Problem, device: str) -> str | None:
    """The reason of a failure."""
    case, dtype, mode = problem
    try:
        inputs = make_inputs(case, dtype, requires_grad=mode != "fwd", device=torch.device(device))
        for result in MODES[mode](IMPLEMENTATIONS[OURS].attend, case, inputs):
            result.sum().item()
    except Exception as error:
        return f"{case.name} {dtype} {mode}: {reason(error)}"
    return None


if __name__ == "__main__":
    main()
