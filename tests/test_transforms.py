"""Derivatives and `torch.func` through the operators, against the same through the reference, in float64."""

from collections.abc import Callable

import pytest
import torch
from problems import INPUTS, random_problem, relative_error
from processes import run_apart
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import jvp
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transforms import AUTOGRAD, FUNCTIONAL, Function

import natten2
from natten2.ops import reference, schemas, unfused_reference
from natten2.ops.schemas import na_backward, na_forward

TRANSFORMS = AUTOGRAD | FUNCTIONAL
OPERATORS = {
    operator.__name__: (getattr(schemas, operator.__name__), operator)
    for operator in (
        reference.na_forward,
        reference.na_backward,
        reference.na_qkv_forward,
        reference.na_qkv_backward,
        unfused_reference.na_qk,
        unfused_reference.na_qk_backward,
        unfused_reference.na_av,
        unfused_reference.na_av_backward,
    )
}
# What is also compiled in short runs.
QUICK = ("backward", "double backward", "dual numbers made within", "grad", "jvp", "vmap")
# After this error, forward mode may fail in the same process, eager too.
FATAL = "INTERNAL ASSERT FAILED"
# Where PyTorch itself has no answer, whatever the operator, it says so.
RAISES = {
    ("double backward", "compiled"): "does not currently support double backward",
    ("dual numbers over backward", "compiled"): "trace_autograd_ops",
    ("linearize", "compiled"): "Attempted to call function marked as skipped",
    ("jacfwd of jacfwd", "compiled"): FATAL,
    ("jvp of jvp", "compiled"): FATAL,
    ("vmap of hessian", "compiled"): FATAL,
}
# What it compiles at times, depending on the function and on what the process compiled before.
UNSURE = ("jacfwd of jacfwd", "jvp of jvp")


def point(name: str) -> tuple[list[Tensor], tuple]:
    """The tensors and the parameters of a call with a bias, and with grouped heads and an additional key if it can."""
    is_packed = name.startswith("na_qkv")
    problem = random_problem(
        (4,),
        (3,),
        is_causal=(True,),
        batch=1,
        heads=2,
        key_heads=2 if is_packed else 1,
        head_dim=2,
        value_dim=2 if is_packed else 1,
        additional=0 if is_packed else 1,
        bias=True,
    )
    query, key, value, rpb, additional_keys, additional_values = problem.tensors
    tensors, parameters = [*problem.tensors], problem.parameters
    # Not those of a softmax: the pair takes any, which are each other's upstream gradients as well.
    scores = torch.randn(1, 4, 2, 4, dtype=torch.float64)
    if is_packed:
        tensors = [torch.stack((query, key, value), -3), rpb]
    elif name.startswith("na_qk"):
        tensors = [query, key, rpb, additional_keys]
        return ([scores, *tensors], parameters) if name.endswith("backward") else (tensors, (*parameters, 0.0))
    elif name.startswith("na_av"):
        tensors, upstream = [scores, value, additional_values], [problem.grad_output]
        return (upstream * name.endswith("backward") + tensors), parameters[:-1]
    if name.endswith("forward"):
        return tensors, parameters
    results = OPERATORS[name.replace("backward", "forward")][1](*tensors, *parameters)
    return [problem.grad_output, problem.grad_logsumexp, *tensors, *results], parameters


def of_a_vector(attention: Callable, tensors: list[Tensor], parameters: tuple) -> Function:
    """The attention as a function from all inputs in one vector to all outputs in one."""
    sizes = [tensor.numel() for tensor in tensors]

    def function(x: Tensor) -> Tensor:
        parts = (part.reshape(like.shape) for part, like in zip(x.split(sizes), tensors, strict=True))
        outputs = attention(*parts, *parameters)
        return torch.cat([x.reshape(-1) for x in ((outputs,) if isinstance(outputs, Tensor) else outputs)])

    return function


def functions(operator: str) -> tuple[Function, Function, Tensor, Tensor]:
    """The operator and its reference as functions of a vector, a point, and a direction."""
    tensors, parameters = point(operator)
    ours, theirs = (of_a_vector(attention, tensors, parameters) for attention in OPERATORS[operator])
    x = torch.cat([tensor.flatten() for tensor in tensors])
    return ours, theirs, x, torch.randn_like(x)


def transformed(name: str, function: Function, mode: str, x: Tensor, t: Tensor) -> object:
    transform = TRANSFORMS[name]
    if mode == "eager":
        return transform(function, x, t)
    options = {"fullgraph": True, "backend": "aot_eager"}
    if name in AUTOGRAD:
        return transform(torch.compile(function, **options), x, t)
    return torch.compile(lambda x, t: transform(function, x, t), **options)(x, t)


def cells() -> list:
    """Transform, operator, and mode; the long ones are those that take seconds to compile."""
    return [
        pytest.param(name, operator, mode, marks=[pytest.mark.long] if mode == "compiled" and not is_quick else [])
        for name in TRANSFORMS
        for operator in OPERATORS
        for is_quick in [name in QUICK and operator in ("na_forward", "na_backward")]
        for mode in ("eager", "compiled")
    ]


@pytest.mark.parametrize(("name", "operator", "mode"), cells())
def test_transforms(name: str, operator: str, mode: str, fresh_compiler: None):
    if (name, mode) in RAISES:
        run = run_apart if RAISES[name, mode] == FATAL else lambda call, *args: call(*args)
        for index in range(2):
            run(raises, name, operator, mode, index)
    else:
        ours, theirs, x, t = functions(operator)
        result = transformed(name, ours, mode, x, t)
        torch.testing.assert_close(result, TRANSFORMS[name](theirs, x, t), rtol=1e-9, atol=1e-9)


def raises(name: str, operator: str, mode: str, index: int) -> None:
    """Sees PyTorch raise for the operator, or for plain PyTorch, its reference; what is unsure may be right instead."""
    *both, x, t = functions(operator)
    try:
        result = transformed(name, both[index], mode, x, t)
    except RuntimeError as error:
        assert RAISES[name, mode] in str(error)  # noqa: PT017
    else:
        assert name in UNSURE
        torch.testing.assert_close(result, TRANSFORMS[name](both[1], x, t), rtol=1e-9, atol=1e-9)


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


@pytest.mark.parametrize("operator", ["na_forward", "na_backward"])
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


TOO_LARGE = r"kernel_size \* dilation must not exceed the axis, got 5"


def of_a_window_too_large(operator: str) -> tuple[Callable, list[Tensor]]:
    tensors, (_, *parameters) = point(operator)
    return lambda *tensors: OPERATORS[operator][0](*tensors, (5,), *parameters), tensors


@pytest.mark.parametrize("operator", OPERATORS)
def test_forward_mode_checks_its_arguments(operator: str):
    function, tensors = of_a_window_too_large(operator)
    with pytest.raises(ValueError, match=TOO_LARGE):
        jvp(function, tuple(tensors), tuple(tensors))


@pytest.mark.parametrize("is_plain", [False, True], ids=["everything", "plain"])
@pytest.mark.parametrize("operator", OPERATORS)
def test_fake_results_are_like_the_kernels(operator: str, is_plain: bool):
    call, (tensors, parameters) = OPERATORS[operator][0], point(operator)
    # A bias and a log-sum-exp, which have fewer axes, may be wider than the tokens.
    tensors = [x.to(torch.bfloat16 if x.dim() > 3 else torch.float32) for x in tensors]
    if is_plain:
        is_optional = [isinstance(argument.type, torch.OptionalType) for argument in call._schema.arguments]
        # The last slot of scores and weights is the additional key's.
        tensors = [None if optional else x[..., :3] for x, optional in zip(tensors, is_optional, strict=False)]
    with FakeTensorMode() as mode:
        fakes = call(*(None if x is None else mode.from_tensor(x) for x in tensors), *parameters)
    for fake, real in zip(tree_leaves(fakes), tree_leaves(call(*tensors, *parameters)), strict=True):
        assert (fake.shape, fake.stride(), fake.dtype) == (real.shape, real.stride(), real.dtype)


@pytest.mark.parametrize("operator", OPERATORS)
def test_fake_tensors_are_checked(operator: str):
    function, tensors = of_a_window_too_large(operator)
    with FakeTensorMode() as mode, pytest.raises(ValueError, match=TOO_LARGE):
        function(*map(mode.from_tensor, tensors))


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
