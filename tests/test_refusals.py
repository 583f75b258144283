"""The CPU's C++ refuses what the checks in Python refuse, and nothing else."""

import random
from collections.abc import Callable

import pytest
import torch
from problems import random_problem
from torch import Tensor

from natten2.ops.schemas import na_backward, na_forward, na_qkv_forward
from natten2.ops.validation import CHECKS


def arguments(op: torch._ops.OpOverload) -> list[object]:
    problem = random_problem((7, 5), (3, 2), dilation=(2, 1), heads=2, key_heads=1, additional=2, bias=True)
    tensors = list(problem.tensors)
    if op is na_forward:
        return [*tensors, *problem.parameters]
    if op is na_qkv_forward:
        return [torch.randn(1, 7, 5, 3, 2, 4, dtype=torch.float64), None, *problem.parameters]
    results = na_forward(*tensors, *problem.parameters)
    return [problem.grad_output, problem.grad_logsumexp, *tensors, *results, *problem.parameters]


def change(value: object, choose: random.Random) -> object:
    if isinstance(value, Tensor):
        axis = choose.randrange(value.dim())
        others = (
            value.float(),
            value.long(),
            value.transpose(0, -1),
            value[..., :1].expand(value.shape),
            value.narrow(axis, 0, 0),
            torch.cat([value, value], axis),
            value.unsqueeze(axis),
            value.to_sparse(),
            value * torch.nan,
            None,
        )
        return choose.choice(others)
    if isinstance(value, tuple):
        return choose.choice([(*value, value[0]), value[:-1], tuple(entry + 1 for entry in value), (0, *value[1:])])
    return choose.choice([torch.nan, torch.inf, 0.0, -1.0])


def outcome(function: Callable[..., object], args: list[object]) -> type | None:
    try:
        function(*args)
    except (ValueError, TypeError, NotImplementedError) as error:
        return type(error)
    return None


@pytest.mark.parametrize("op", [na_forward, na_backward, na_qkv_forward], ids=lambda op: op._schema.name)
def test_python_and_the_operator_agree(op: torch._ops.OpOverload):
    choose = random.Random(0)
    original, outcomes = arguments(op), set()
    for _ in range(250):
        args = list(original)
        index = choose.choice([i for i, arg in enumerate(args) if arg is not None])
        args[index] = change(args[index], choose)
        expected = outcome(CHECKS[op], args)
        for is_inference in (True, False):
            with torch.inference_mode(is_inference):
                assert outcome(op, args) is expected, (index, args[index])
        outcomes.add(expected)
    assert outcomes == {None, ValueError, TypeError, NotImplementedError}
