"""`python -m benchmarks NAME`: runs one benchmark."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from benchmarks import cpu, cuda_build, gpu, models, overhead, phases, triton_build
from benchmarks.compare import WrongResultError

BENCHMARKS = {
    "cpu": cpu,
    "cuda": cuda_build,
    "gpu": gpu,
    "models": models,
    "overhead": overhead,
    "phases": phases,
    "triton": triton_build,
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the benchmark that `arguments`, by default the command line's, name."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description="How fast natten2 is against others.")
    names = parser.add_subparsers(required=True, metavar="NAME")
    for name, benchmark in BENCHMARKS.items():
        summary = benchmark.__doc__.partition("\n")[0]
        subparser = names.add_parser(name, help=summary, description=benchmark.__doc__)
        benchmark.add_arguments(subparser)
        subparser.set_defaults(run=benchmark.main)
    options = parser.parse_args(arguments)
    try:
        options.run(options)
    except WrongResultError as error:
        parser.exit(1, f"error: {error}\n")


if __name__ == "__main__":
    main()
