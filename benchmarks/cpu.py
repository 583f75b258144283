"""natten2 on the CPU against other ways to attend to a neighborhood, or to windows as Swin has them.

Ratios are medians over interleaved rounds in one process; every implementation is checked before it is timed. A share
of the peak is one of multiply-adds in float32, measured in the same rounds. Above one thread wall time counts, and a
case is skipped while the machine is busy.
"""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from statistics import median

from benchmarks.cases import CASES, CORNERS, SHAPES, Case
from benchmarks.compare import DTYPES, MODES, Record, compare
from benchmarks.cpu_plot import plot
from benchmarks.floors import Rates
from benchmarks.implementations import DEFAULT_NAMES, IMPLEMENTATIONS
from benchmarks.memory import format_memory, measure_memory
from benchmarks.peak import copy_bytes_per_second, peak
from benchmarks.report import describe_machine, format_records, write_json
from benchmarks.timing import Settings, clock_for, threads

__all__ = ["QUICK", "add_arguments", "main", "positive"]

QUICK = Settings(rounds=3, warmups=1, min_seconds=0.002, patience=1.0)
_GROUPS = {"shapes": SHAPES, "corners": CORNERS}
_DTYPES = ["float32", "bfloat16"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of :func:`main`."""
    names = [*_GROUPS, *(case.name for case in CASES)]
    parser.add_argument(
        "--case",
        nargs="*",
        choices=names,
        default=["shapes"],
        metavar="CASE",
        help=f"by default shapes; with no name after it, none: {', '.join(names)}",
    )
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=_DTYPES, help=f"by default {' '.join(_DTYPES)}")
    parser.add_argument("--mode", nargs="+", choices=MODES, default=list(MODES))
    parser.add_argument(
        "--implementation",
        nargs="+",
        choices=IMPLEMENTATIONS,
        default=DEFAULT_NAMES,
        metavar="NAME",
        help=f"{', '.join(IMPLEMENTATIONS)}; by default all but flex, which takes long to compile",
    )
    parser.add_argument("--threads", type=positive, default=1, help="more than one are timed by the wall clock")
    parser.add_argument("--rounds", type=positive, help=f"samples of each implementation, by default {Settings.rounds}")
    parser.add_argument(
        "--memory", action="store_true", help="peak memory of a layer's training step as well, on Linux"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all numbers there as well")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw a roofline there, such as roofline.png")
    parser.add_argument("--quick", action="store_true", help="few and short samples: for a first look, not for a claim")


def main(options: argparse.Namespace) -> None:
    """Measures what the options ask for, prints a table, and writes the files.

    Raises:
        WrongResultError: An implementation disagrees with the reference.
        ImportError: There is something to draw, and matplotlib is missing.
    """
    if options.plot is not None:
        # What is missing is missed before the measurements, not after them.
        importlib.import_module("matplotlib.figure")
    settings = QUICK if options.quick else Settings()
    if options.rounds is not None:
        settings = replace(settings, rounds=options.rounds)
    cases = _select(options.case)
    records = compare(cases, options.dtype, options.mode, settings, options.implementation, options.threads)
    memory = [measure_memory(dtype) for dtype in options.dtype] if options.memory else []
    rates = _rates(records, options.threads)
    machine = describe_machine()
    title = _title(machine["processor"], options.threads, rates)
    tables = [format_records(records) if records else "", format_memory(memory)]
    print("\n\n".join([title, *filter(None, tables)]))
    if options.json is not None:
        clock = clock_for(options.threads).__name__
        content = {
            "machine": machine,
            "rates": None if rates is None else _describe(rates),
            "settings": {**asdict(settings), "threads": options.threads, "clock": clock},
            "records": [asdict(record) for record in records],
            "memory": [asdict(one) for one in memory],
        }
        write_json(options.json, content)
    if options.plot is not None and rates is not None:
        plot(options.plot, records, rates, title)


def positive(text: str) -> int:
    """An option's whole number, at least 1."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {number}")
    return number


def _select(names: Sequence[str]) -> list[Case]:
    """The cases of these names, and those of the groups among them."""
    chosen = {*names, *(case.name for group, cases in _GROUPS.items() if group in names for case in cases)}
    return [case for case in CASES if case.name in chosen]


def _rates(records: Sequence[Record], thread_count: int) -> Rates | None:
    """The median of the peaks that were measured beside the cases, and a copy's rate; `None` without any."""
    peaks = [record.peak_gflop_per_s for record in records if record.peak_gflop_per_s is not None]
    if not peaks:
        return None
    with threads(thread_count):
        return Rates(1e9 * median(peaks), copy_bytes_per_second(clock_for(thread_count)))


def _describe(rates: Rates) -> dict[str, float | str]:
    return {
        "peak_gflop_per_s": round(rates.flops_per_second / 1e9, 1),
        "peak_measured_by": peak().source,
        "copy_gb_per_s": round(rates.bytes_per_second / 1e9, 2),
    }


def _title(processor: str, thread_count: int, rates: Rates | None) -> str:
    """The machine in one line."""
    title = f"{processor}, {thread_count} thread{'s' if thread_count > 1 else ''}"
    if rates is None:
        return title
    gflop, gbyte = rates.flops_per_second / 1e9, rates.bytes_per_second / 1e9
    return f"{title}: {gflop:.4g} GFLOP/s ({peak().source}), copy {gbyte:.3g} GB/s"
