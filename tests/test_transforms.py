"""Derivatives and `torch.func` through the operators, against the same through the reference, in float64."""

from collections.abc import Callable

import pytest
import torch
from problems import INPUTS, random_problem, relative_error
from torch import Tensor
from torch.func import jvp
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transforms import AUTOGRAD, EAGER, FUNCTIONAL, Function, Transform

import natten2
from natten2.ops import reference
from natten2.ops.schemas import na_backward, na_forward

TRANSFORMS = AUTOGRAD | EAGER | FUNCTIONAL
OPERATORS = {"na_forward": (na_forward, reference.na_forward), "na_backward": (na_backward, reference.na_backward)}
# What is also compiled in short runs.
QUICK = ("backward", "double backward", "grad", "jvp", "vmap")
# Where PyTorch itself has no answer, it says so.
RAISES = {("double backward", "compiled"): "does not currently support double backward"}


def point(name: str) -> tuple[list[Tensor], tuple]:
    """The tensors and the parameters of a call with grouped heads, a bias, and an additional key."""
    problem = random_problem(
        (4,),
        (3,),
        is_causal=(True,),
        batch=1,
        heads=2,
        key_heads=1,
        head_dim=2,
        value_dim=1,
        additional=1,
        bias=True,
    )
    if name == "na_forward":
        return list(problem.tensors), problem.parameters
    results = reference.na_forward(*problem.tensors, *problem.parameters)
    return [problem.grad_output, problem.grad_logsumexp, *problem.tensors, *results], problem.parameters


def of_a_vector(attention: Callable, tensors: list[Tensor], parameters: tuple) -> Function:
    """The attention as a function from all inputs in one vector to all outputs in one."""
    sizes = [tensor.numel() for tensor in tensors]

    def function(x: Tensor) -> Tensor:
        parts = (part.reshape(like.shape) for part, like in zip(x.split(sizes), tensors, strict=True))
        return torch.cat([output.reshape(-1) for output in attention(*parts, *parameters)])

    return function


def transformed(transform: Transform, function: Function, mode: str, x: Tensor, t: Tensor) -> object:
    if mode == "eager":
        return transform(function, x, t)
    options = {"fullgraph": True, "backend": "aot_eager"}
    if transform in AUTOGRAD.values():
        return transform(torch.compile(function, **options), x, t)
    return torch.compile(lambda x, t: transform(function, x, t), **options)(x, t)


def cells() -> list:
    """Transform, operator, and mode; the long ones are those that take seconds to compile."""
    return [
        pytest.param(name, operator, mode, marks=[pytest.mark.long] if mode == "compiled" and name not in QUICK else [])
        for name in TRANSFORMS
        for operator in OPERATORS
        for mode in ("eager", "compiled")
        if mode == "eager" or name not in EAGER
    ]


@pytest.mark.parametrize(("name", "operator", "mode"), cells())
def test_transforms(name: str, operator: str, mode: str, fresh_compiler: None):
    tensors, parameters = point(operator)
    ours, theirs = (of_a_vector(attention, tensors, parameters) for attention in OPERATORS[operator])
    x = torch.cat([tensor.flatten() for tensor in tensors])
    t = torch.randn_like(x)
    if (name, mode) in RAISES:
        with pytest.raises(RuntimeError, match=RAISES[name, mode]):
            transformed(TRANSFORMS[name], ours, mode, x, t)
        return
    result = transformed(TRANSFORMS[name], ours, mode, x, t)
    torch.testing.assert_close(result, TRANSFORMS[name](theirs, x, t), rtol=1e-9, atol=1e-9)


class Counter(TorchDispatchMode):
    """Counts calls of natten2's operators, and finds the largest tensor that any operator returns."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[str] = []
        self.largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "natten2":
            self.calls.append(func._opname)
        results = func(*args, **(kwargs or {}))
        self.largest = max(
            self.largest, *(leaf.numel() for leaf in tree_leaves(results) if isinstance(leaf, Tensor)), 0
        )
        return results


def mapped_inputs(mapped: str, in_dim: int = 0) -> tuple[list[Tensor], tuple, tuple]:
    """The inputs of `na_backward`, some of which have a mapped axis, their `in_dims`, and the parameters."""
    tensors, parameters = point("na_backward")
    names = ("grad_output", "grad_logsumexp", *INPUTS, "output", "logsumexp")
    chosen = names if mapped == "all" else mapped.split()
    in_dims = tuple(in_dim if name in chosen else None for name in names)
    inputs = [
        tensor if dim is None else torch.stack((tensor, tensor.sin(), tensor.cos()), dim)
        for tensor, dim in zip(tensors, in_dims, strict=True)
    ]
    return inputs, in_dims, parameters


def one_by_one(attention: Callable, inputs: list[Tensor], in_dims: tuple) -> tuple[Tensor, ...]:
    def at(index: int) -> list[Tensor]:
        return [x if dim is None else x.select(dim, index) for x, dim in zip(inputs, in_dims, strict=True)]

    return tuple(map(torch.stack, zip(*(attention(*at(index)) for index in range(3)), strict=True)))


MAPPED = ["all", "query", "key value", "rpb", "query rpb", "additional_keys additional_values", "grad_output output"]


@pytest.mark.parametrize("in_dim", [0, 1, -1])
@pytest.mark.parametrize("mapped", MAPPED)
def test_vmap_of_some_inputs(mapped: str, in_dim: int):
    inputs, in_dims, parameters = mapped_inputs(mapped, in_dim)
    with Counter() as counter:
        result = torch.vmap(lambda *x: na_backward(*x, *parameters), in_dims)(*inputs)
    assert counter.calls == ["na_backward"]
    torch.testing.assert_close(result, one_by_one(lambda *x: reference.na_backward(*x, *parameters), inputs, in_dims))
    if not any(dim is not None for dim in in_dims[2:8]):
        return
    with Counter() as counter:
        result = torch.vmap(lambda *x: na_forward(*x, *parameters), in_dims[2:8])(*inputs[2:8])
    assert counter.calls == ["na_forward"]
    expected = one_by_one(lambda *x: reference.na_forward(*x, *parameters), inputs[2:8], in_dims[2:8])
    torch.testing.assert_close(result, expected)


def test_vmap_without_a_bias_or_an_upstream_gradient():
    query, key, value = (torch.randn(3, 2, 5, 4, 2, 3, dtype=torch.float64).requires_grad_() for _ in range(3))
    with Counter() as counter:
        output, lse = torch.vmap(lambda *x: natten2.na2d(*x, (3, 2), return_lse=True))(query, key, value)
        grads = torch.autograd.grad(output.square().sum() + lse.sin().sum(), (query, key, value))
    assert counter.calls == ["na_forward", "na_backward"]
    expected, expected_lse = natten2.na2d(*(x.flatten(0, 1) for x in (query, key, value)), (3, 2), return_lse=True)
    torch.testing.assert_close((output, lse), (expected.unflatten(0, (3, 2)), expected_lse.unflatten(0, (3, 2))))
    loss = expected.square().sum() + expected_lse.sin().sum()
    torch.testing.assert_close(grads, torch.autograd.grad(loss, (query, key, value)))
    parameters = ((3, 2), (1, 1), (1, 1), (False, False), 0.5)
    backward = torch.vmap(lambda *x: na_backward(x[0], None, *x[:3], None, None, None, *x[3:], *parameters))
    absent = backward(query, key, value, output, lse)[3:]
    assert all(grad.shape == (3, 0) for grad in absent)


def test_an_ensemble_of_modules_with_biases_of_their_own():
    layers = [natten2.NeighborhoodAttention2D(8, 2, 3, rel_pos_bias=True).double() for _ in range(3)]
    weights, buffers = torch.func.stack_module_state(layers)
    x = torch.randn(2, 5, 6, 8, dtype=torch.float64)

    def call(weights: dict[str, Tensor], buffers: dict[str, Tensor]) -> Tensor:
        return torch.func.functional_call(layers[0], (weights, buffers), (x,))

    torch.testing.assert_close(torch.vmap(call)(weights, buffers), torch.stack([layer(x) for layer in layers]))
    per_sample = torch.vmap(
        torch.func.grad(lambda w, row: torch.func.functional_call(layers[0], w, (row[None],)).sum()), (None, 0)
    )(dict(layers[0].named_parameters()), x)
    for index in range(2):
        grads = torch.autograd.grad(layers[0](x[index : index + 1]).sum(), list(layers[0].parameters()))
        for name, grad in zip(dict(layers[0].named_parameters()), grads, strict=True):
            torch.testing.assert_close(per_sample[name][index], grad)


@pytest.mark.parametrize("operator", OPERATORS)
def test_derivatives_need_memory_linear_in_the_tokens(operator: str):
    def largest(tokens: int) -> int:
        problem = random_problem((tokens,), (3,), batch=1, heads=1, head_dim=2)
        results = reference.na_forward(*problem.tensors, *problem.parameters)
        tensors = [problem.grad_output, problem.grad_logsumexp, *problem.tensors, *results]
        tensors = [None if x is None else x.requires_grad_() for x in tensors]
        attention, tensors = (na_forward, tensors[2:8]) if operator == "na_forward" else (na_backward, tensors)
        present = [x for x in tensors if x is not None]

        def call(*values: Tensor) -> tuple[Tensor, ...]:
            remaining = iter(values)
            outputs = attention(*(None if x is None else next(remaining) for x in tensors), *problem.parameters)
            return tuple(output for output in outputs if output.numel() > 0)

        with Counter() as counter:
            jvp(call, tuple(present), tuple(map(torch.ones_like, present)))
            grads = torch.autograd.grad([x.sum() for x in call(*present)], present, create_graph=True)
            torch.autograd.grad([x.sum() for x in grads if x.requires_grad], present, allow_unused=True)
        return counter.largest

    # Tokens x tokens would be 400 times as much.
    assert largest(640) == 20 * largest(32)


def test_forward_mode_checks_its_arguments():
    query = torch.randn(1, 4, 1, 2)
    with pytest.raises(ValueError, match=r"kernel_size \* dilation must not exceed the axis, got 5"):
        jvp(lambda x: natten2.na1d(x, x, x, 5), (query,), (query,))


def test_forward_mode_of_half_precision():
    query, key, value = random_problem((6, 5), (3, 3), dtype=torch.bfloat16).tensors[:3]
    output, tangent = jvp(lambda x: natten2.na2d(x, key, value, 3), (query,), (value,))
    _, expected = jvp(lambda x: natten2.na2d(x, key.double(), value.double(), 3), (query.double(),), (value.double(),))
    assert output.dtype == tangent.dtype == torch.bfloat16
    assert relative_error(tangent, expected) < 0.01


def test_forward_mode_under_autocast():
    query, direction = torch.randn(2, 1, 6, 2, 4)
    with torch.autocast("cpu", torch.bfloat16):
        output, tangent = jvp(lambda x: natten2.na1d(x, x, x, 3), (query,), (direction,))
    assert output.dtype == tangent.dtype == torch.bfloat16
    _, expected = jvp(lambda x: natten2.na1d(x, x, x, 3), (query,), (direction,))
    assert relative_error(tangent, expected) < 0.02
