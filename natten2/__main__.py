"""`python -m natten2` reports what was built and which kernels run; `python -m natten2 window` draws a window."""

from __future__ import annotations

import argparse
import math
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

import torch

from natten2._picture import Window, draw_image, draw_text, summary
from natten2._report import report
from natten2.ops.schemas import MAX_RANK
from natten2.ops.validation import check_forward

# torch counts a tensor's bytes in 64 bits.
_MAX_TOKENS = 2**60


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command line.

    Args:
        arguments: The arguments; those of the process when `None`.

    Raises:
        SystemExit: An argument is wrong, or help was asked for.
    """
    parser = _Parser(
        prog="python -m natten2",
        description="Reports what was built and which kernels run; with a command, does that instead.",
    )
    commands = parser.add_subparsers(title="commands", dest="command", metavar="")
    window_parser = commands.add_parser(
        "window",
        help="draw what one query sees",
        description="Draws what one query sees. Values are one number for all axes, or one per axis.",
        epilog="example: python -m natten2 window --shape 14 14 --kernel-size 5 --dilation 2 --query 3 5",
    )
    _add_window_arguments(window_parser)
    options = parser.parse_args(arguments)
    if options.command is None:
        print(report())
        return
    try:
        window = _window(options)
        if options.out is not None:
            _write_image(window, options.out)
    except (ValueError, OSError, ModuleNotFoundError) as error:
        window_parser.error(str(error))
    print(_text(window, options.out))


class _Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line, without the usage."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}\n")


def _add_window_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--shape", type=int, nargs="+", required=True, metavar="N", help=f"1 to {MAX_RANK} sizes")
    parser.add_argument("--kernel-size", type=int, nargs="+", required=True, metavar="N", help="keys per window")
    parser.add_argument("--stride", type=int, nargs="+", default=[1], metavar="N", help="queries that share a window")
    parser.add_argument("--dilation", type=int, nargs="+", default=[1], metavar="N", help="distance between keys")
    parser.add_argument(
        "--causal",
        type=int,
        nargs="*",
        choices=(0, 1),
        default=[0],
        help="hide keys after the query: on all axes, or where 1 is given",
    )
    parser.add_argument("--query", type=int, nargs="+", metavar="N", help="the query's indices, by default the center")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write an image, such as window.png, with matplotlib")


def _window(options: argparse.Namespace) -> Window:
    shape = tuple(options.shape)
    rank = len(shape)
    if rank > MAX_RANK:
        raise ValueError(f"shape must have 1 to {MAX_RANK} sizes, got {rank}")
    if min(shape) < 1 or math.prod(shape) > _MAX_TOKENS:
        raise ValueError(f"shape must have sizes of at least 1 and at most 2**60 tokens, got {list(shape)}")
    window = Window(
        shape,
        _per_axis("kernel_size", options.kernel_size, rank),
        _per_axis("stride", options.stride, rank),
        _per_axis("dilation", options.dilation, rank),
        tuple(map(bool, _per_axis("causal", options.causal or [1], rank))),
        tuple(size // 2 for size in shape) if options.query is None else _per_axis("query", options.query, rank),
    )
    _check(window)
    return window


def _per_axis(name: str, values: list[int], rank: int) -> tuple[int, ...]:
    if len(values) not in (1, rank):
        raise ValueError(f"{name} must be one value, or one for each of the {rank} axes, got {values}")
    return tuple(values * rank if len(values) == 1 else values)


def _check(window: Window) -> None:
    tokens = torch.empty(1, *window.shape, 1, 1, device="meta")
    parameters = (window.kernel_size, window.stride, window.dilation, window.is_causal)
    check_forward(tokens, tokens, tokens, None, None, None, *parameters, scale=1.0)
    for axis, (index, length) in enumerate(zip(window.query, window.shape, strict=True)):
        if not 0 <= index < length:
            raise ValueError(f"query must be between 0 and {length - 1} on axis {axis}, got {index}")


def _write_image(window: Window, path: Path) -> None:
    try:
        draw_image(window, path)
    except OSError as error:
        raise OSError(f"can't write {path}: {error}") from error
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f"{error}; images need matplotlib: pip install matplotlib") from error


def _text(window: Window, image: Path | None) -> str:
    if image is not None:
        return "\n".join((*summary(window), f"written to {image}"))
    return draw_text(window, shutil.get_terminal_size().columns, sys.stdout.encoding)


if __name__ == "__main__":
    main()
