"""What one eager call costs beside its arithmetic, next to other operators of PyTorch.

The tensors hold one token of one channel, so that nothing but the call itself takes time. Calls take turns on one
thread; the numbers are medians of CPU time in microseconds.
"""

import argparse
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from statistics import median

import torch
from torch import Tensor

import natten2
from benchmarks.report import describe_machine, format_table, write_json
from benchmarks.timing import Settings, interleave, ratio, threads
from natten2.ops.schemas import na_forward

__all__ = ["add_arguments", "main", "measure"]

MODES = ("no gradient", "recorded", "with backward")
_PARAMETERS = ((1,), (1,), (1,), (False,), 1.0)
_BASELINE = "Python operator"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of :func:`main`."""
    parser.add_argument("--rounds", type=int, default=Settings.rounds, help="samples of each operator")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all numbers there as well")


def main(options: argparse.Namespace) -> None:
    """Measures, prints a table, and writes the file."""
    times = measure(Settings(rounds=options.rounds, warmups=50))
    print(f"microseconds of one call on the CPU, torch {torch.__version__}\n")
    print(format_table(["operator", *MODES], [[name, *(f"{t:.1f}" for t in row)] for name, row in times.items()]))
    over = times["natten2 operator"][0] - times[_BASELINE][0]
    print(f"\nWithout gradients natten2's operator takes {over:.1f} microseconds more than a {_BASELINE}.")
    if options.json is not None:
        rows = {name: dict(zip(MODES, row, strict=True)) for name, row in times.items()}
        write_json(options.json, {"machine": describe_machine(), "microseconds": rows})


def measure(settings: Settings) -> dict[str, list[float]]:
    """Microseconds of one call of each operator, in the order of `MODES`."""
    operators = _operators()
    with threads(1):
        by_mode = [_measure_mode(operators, mode, settings) for mode in MODES]
    return {name: [one[name] for one in by_mode] for name in operators}


def _measure_mode(
    operators: Mapping[str, Callable[[Tensor], Tensor]], mode: str, settings: Settings
) -> dict[str, float]:
    token = torch.ones(1, 1, 1, 1, requires_grad=mode != "no gradient")
    grad = torch.ones(1, 1, 1, 1)

    def bound(operator: Callable[[Tensor], Tensor]) -> Callable[[], object]:
        if mode == "with backward":
            return lambda: torch.autograd.grad(operator(token), token, grad)
        return lambda: operator(token)

    samples = interleave({name: bound(operator) for name, operator in operators.items()}, settings)
    # Against one operator in the same round, which a disturbed machine leaves alone.
    baseline = median(samples[_BASELINE])
    return {name: 1e6 * baseline * ratio(taken, samples[_BASELINE]) for name, taken in samples.items()}


@cache
def _operators() -> dict[str, Callable[[Tensor], Tensor]]:
    python, custom = _python_operator(), _custom_operator()
    return {
        "aten::add": lambda x: torch.add(x, x),
        "SDPA": lambda x: torch.nn.functional.scaled_dot_product_attention(x, x, x),
        _BASELINE: lambda x: python(x, x, x, None, None, None, *_PARAMETERS)[0],
        "custom_op": lambda x: custom(x, x, x, None, None, None, *_PARAMETERS)[0],
        "natten2 operator": lambda x: na_forward(x, x, x, None, None, None, *_PARAMETERS)[0],
        "natten2.na1d": lambda x: natten2.na1d(x, x, x, 1),
    }


def _body(query: Tensor, *args: object) -> tuple[Tensor, Tensor]:
    return torch.empty_like(query), query.new_empty(query.shape[:-1])


def _setup_context(ctx, inputs: tuple[object, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs[:3])


def _backward(ctx, grad_output: Tensor, grad_logsumexp: Tensor) -> tuple[Tensor | None, ...]:
    return (*map(torch.empty_like, ctx.saved_tensors), *(None,) * 8)


def _python_operator() -> torch._ops.OpOverload:
    """An operator of the same schema, registered in Python as PyTorch's documentation shows, that does nothing."""
    schema = str(na_forward._schema).partition("(")[2]
    name = "natten2_benchmarks::python_operator"
    torch.library.define(name, "(" + schema)
    torch.library.impl(name, "cpu", _body)
    torch.library.register_autograd(name, _backward, setup_context=_setup_context)
    return torch.ops.natten2_benchmarks.python_operator.default


def _custom_operator() -> Callable[..., tuple[Tensor, Tensor]]:
    """The same, with the decorator."""

    @torch.library.custom_op("natten2_benchmarks::custom_operator", mutates_args=())
    def operator(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        rpb: Tensor | None,
        additional_keys: Tensor | None,
        additional_values: Tensor | None,
        kernel_size: list[int],
        stride: list[int],
        dilation: list[int],
        is_causal: list[bool],
        scale: float,
    ) -> tuple[Tensor, Tensor]:
        return _body(query)

    operator.register_autograd(_backward, setup_context=_setup_context)
    return operator
