"""`python -m natten2`: what was built, what one query sees, and which kernels run for a shape."""

from __future__ import annotations

import argparse
import math
import re
import shutil
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import NoReturn

import torch

from natten2._explain import explain
from natten2._picture import Window, draw_image, draw_text, summary
from natten2._report import DEVICE_TYPES, report
from natten2.ops.costs import Call
from natten2.ops.cuda import compute_capability
from natten2.ops.schemas import MAX_RANK
from natten2.ops.validation import DTYPES, check_forward

# torch counts a tensor's bytes in 64 bits.
_MAX_TOKENS = 2**60
_MAX_LENGTH = 2**24
_DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in DTYPES}


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
    window_parser.add_argument(
        "--shape", type=int, nargs="+", required=True, metavar="N", help=f"1 to {MAX_RANK} sizes"
    )
    _add_parameters(window_parser)
    _add_picture_arguments(window_parser)
    window_parser.set_defaults(run=_run_window, parser=window_parser)
    explain_parser = commands.add_parser(
        "explain",
        help="say which kernels run for a shape, and what they launch",
        description="Says which kernels run for a shape, what they launch, and what the call needs at least. It needs "
        "no GPU. Values are one number for all axes, or one per axis.",
        epilog="example: python -m natten2 explain --device cuda --capability 9.0 --shape 8 56 56 2 32 --kernel-size 7",
    )
    explain_parser.add_argument(
        "--shape",
        type=int,
        nargs="+",
        required=True,
        metavar="N",
        help=f"of the query: batch, 1 to {MAX_RANK} axes, heads, head_dim",
    )
    _add_parameters(explain_parser)
    _add_call_arguments(explain_parser)
    explain_parser.set_defaults(run=_run_explain, parser=explain_parser)
    options = parser.parse_args(arguments)
    if options.command is None:
        print(report())
        return
    try:
        text = options.run(options)
    except (ValueError, OSError, ModuleNotFoundError) as error:
        options.parser.error(str(error))
    print(text)


class _Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line, without the usage."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}\n")


def _add_parameters(parser: argparse.ArgumentParser) -> None:
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


def _add_picture_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--query", type=int, nargs="+", metavar="N", help="the query's indices, by default the center")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write an image, such as window.png, with matplotlib")


def _add_call_arguments(parser: argparse.ArgumentParser) -> None:
    has_gpu = torch.cuda.is_available()
    parser.add_argument("--device", choices=DEVICE_TYPES, default="cuda" if has_gpu else "cpu", help="kind of device")
    parser.add_argument(
        "--capability", type=_capability, metavar="X.Y", help="compute capability, by default that of the GPU here"
    )
    parser.add_argument("--dtype", choices=_DTYPES, default="bfloat16")
    parser.add_argument("--value-dim", type=int, metavar="N", help="channels of values, by default head_dim")
    parser.add_argument("--key-heads", type=int, metavar="N", help="heads of keys and values, by default heads")
    parser.add_argument("--additional-keys", type=int, default=0, metavar="N", help="keys that every query sees")
    parser.add_argument("--bias", action="store_true", help="with a relative positional bias")


def _capability(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d+)\.(\d+)", text)
    if match is None:
        raise argparse.ArgumentTypeError(f"must be two numbers such as 9.0, got {text!r}")
    return int(match[1]), int(match[2])


def _run_window(options: argparse.Namespace) -> str:
    window = _window(options)
    if options.out is None:
        return draw_text(window, shutil.get_terminal_size().columns, sys.stdout.encoding)
    _write_image(window, options.out)
    return "\n".join((*summary(window), f"written to {options.out}"))


def _run_explain(options: argparse.Namespace) -> str:
    if options.capability is not None and options.device != "cuda":
        raise ValueError(f"capability must be left out for the device {options.device}: only GPUs under cuda have one")
    call, dtype = _call(options), _DTYPES[options.dtype]
    capability = options.capability
    if capability is None and options.device == "cuda" and torch.cuda.is_available():
        capability = compute_capability(torch.device("cuda", torch.cuda.current_device()))
    return explain(call, dtype, options.device, capability, has_bias=options.bias)


def _call(options: argparse.Namespace) -> Call:
    shape, rank = tuple(options.shape), len(options.shape) - 3
    if not 1 <= rank <= MAX_RANK:
        raise ValueError(f"shape must have 4 to {MAX_RANK + 3} sizes (batch, axes, heads, head_dim), got {len(shape)}")
    if min(shape) < 1 or max(shape) > _MAX_LENGTH:
        raise ValueError(f"shape must have sizes between 1 and {_MAX_LENGTH}, got {list(shape)}")
    batch, *spatial, heads, head_dim = shape
    key_heads = heads if options.key_heads is None else options.key_heads
    value_dim = head_dim if options.value_dim is None else options.value_dim
    for name, value, least in (
        ("key_heads", key_heads, 1),
        ("value_dim", value_dim, 1),
        ("additional_keys", options.additional_keys, 0),
    ):
        if not least <= value <= _MAX_LENGTH:
            raise ValueError(f"{name} must be between {least} and {_MAX_LENGTH}, got {value}")
    parameters = _parameters(options, rank)
    empty = partial(torch.empty, dtype=_DTYPES[options.dtype], device="meta")
    query, key, value = (
        empty(batch, *spatial, *channels)
        for channels in ((heads, head_dim), (key_heads, head_dim), (key_heads, value_dim))
    )
    check_forward(query, key, value, None, None, None, *parameters, scale=1.0)
    return Call(
        batch,
        tuple(spatial),
        heads,
        key_heads,
        head_dim,
        value_dim,
        *parameters,
        additional=options.additional_keys,
        element_size=query.element_size(),
    )


def _window(options: argparse.Namespace) -> Window:
    shape = tuple(options.shape)
    rank = len(shape)
    if rank > MAX_RANK:
        raise ValueError(f"shape must have 1 to {MAX_RANK} sizes, got {rank}")
    if min(shape) < 1 or math.prod(shape) > _MAX_TOKENS:
        raise ValueError(f"shape must have sizes of at least 1 and at most 2**60 tokens, got {list(shape)}")
    query = tuple(size // 2 for size in shape) if options.query is None else _per_axis("query", options.query, rank)
    window = Window(shape, *_parameters(options, rank), query)
    _check(window)
    return window


def _parameters(
    options: argparse.Namespace, rank: int
) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...], tuple[bool, ...]]:
    """The kernel size, the stride, the dilation, and whether an axis is causal."""
    return (
        _per_axis("kernel_size", options.kernel_size, rank),
        _per_axis("stride", options.stride, rank),
        _per_axis("dilation", options.dilation, rank),
        tuple(map(bool, _per_axis("causal", options.causal or [1], rank))),
    )


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


if __name__ == "__main__":
    main()
