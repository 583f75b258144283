"""natten2 on the CPU against the gather reference and un-fused Swin window attention.

Ratios are medians over interleaved rounds in one process; every implementation is checked before it is timed.
"""

from __future__ import annotations

import argparse
from dataclasses import asdict, replace
from pathlib import Path

from benchmarks.cases import CASES
from benchmarks.compare import DTYPES, MODES, compare
from benchmarks.report import describe_machine, format_records, write_json
from benchmarks.timing import Settings, clock_for

__all__ = ["QUICK", "add_arguments", "main", "positive"]

QUICK = Settings(rounds=3, warmups=1, min_seconds=0.002)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of :func:`main`."""
    names = [case.name for case in CASES]
    parser.add_argument("--case", nargs="+", choices=names, default=names, metavar="CASE", help=", ".join(names))
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--mode", nargs="+", choices=MODES, default=list(MODES))
    parser.add_argument("--threads", type=positive, default=1, help="more than one are timed by the wall clock")
    parser.add_argument("--rounds", type=positive, help=f"samples of each implementation, by default {Settings.rounds}")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all numbers there as well")
    parser.add_argument("--quick", action="store_true", help="few and short samples: for a first look, not for a claim")


def main(options: argparse.Namespace) -> None:
    """Measures what the options ask for, prints a table, and writes the file.

    Raises:
        WrongResultError: An implementation disagrees with the reference.
    """
    settings = QUICK if options.quick else Settings()
    if options.rounds is not None:
        settings = replace(settings, rounds=options.rounds)
    cases = [case for case in CASES if case.name in options.case]
    records = compare(cases, options.dtype, options.mode, settings, options.threads)
    print(format_records(records))
    if options.json is not None:
        clock = clock_for(options.threads).__name__
        content = {
            "machine": describe_machine(),
            "settings": {**asdict(settings), "threads": options.threads, "clock": clock},
            "records": [asdict(record) for record in records],
        }
        write_json(options.json, content)


def positive(text: str) -> int:
    """An option's whole number, at least 1."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {number}")
    return number
