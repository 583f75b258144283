"""The packed operators are the unpacked ones on three views, forward and backward, whichever kernel runs."""

import pytest
import torch
from hypothesis import given, settings
from problems import DTYPES, Problem, problems, random_problem, small_windows
from test_operators import learnable, opcheck
from torch import Tensor

from natten2.ops import reference
from natten2.ops.schemas import na_backward, na_forward, na_qkv_backward, na_qkv_forward

QKV = (na_qkv_forward, na_qkv_backward)
REFERENCE = (reference.na_qkv_forward, reference.na_qkv_backward)


def packable(problem: Problem) -> Problem:
    """Of the same sizes, with a key head for every query head, values like keys, and no additional keys."""
    query, _, _, rpb, *_ = problem.tensors
    return random_problem(
        problem.spatial,
        problem.kernel_size,
        stride=problem.stride,
        dilation=problem.dilation,
        is_causal=problem.is_causal,
        batch=query.shape[0],
        heads=query.shape[-2],
        head_dim=query.shape[-1],
        bias=rpb is not None,
        scale=problem.scale,
    )


def pack(problem: Problem) -> Tensor:
    return torch.stack(problem.tensors[:3], -3)


def check(problem: Problem, kernels: tuple = QKV) -> None:
    forward, backward = kernels
    qkv, rpb, parameters = pack(problem), problem.tensors[3], problem.parameters
    results = forward(qkv, rpb, *parameters)
    upstream = (problem.grad_output, problem.grad_logsumexp)
    grad_qkv, grad_rpb = backward(*upstream, qkv, rpb, *results, *parameters)
    unpacked = (na_forward, na_backward) if kernels is QKV else (reference.na_forward, reference.na_backward)
    expected = unpacked[0](*problem.tensors, *parameters)
    *expected_grads, expected_rpb, _, _ = unpacked[1](*upstream, *problem.tensors, *expected, *parameters)
    for result, wanted in zip(
        (*results, grad_qkv, grad_rpb), (*expected, torch.stack(expected_grads, -3), expected_rpb), strict=True
    ):
        torch.testing.assert_close(result, wanted, rtol=0, atol=0)


@pytest.mark.parametrize("kernels", [QKV, REFERENCE], ids=["C++", "reference"])
@settings(max_examples=25)
@given(problems(max_tokens=100, min_batch=0))
def test_packed_is_unpacked(kernels: tuple, problem: Problem):
    check(packable(problem), kernels)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@settings(max_examples=8)
@given(small_windows())
def test_packed_is_unpacked_in_small_windows(capability: str, dtype: torch.dtype, problem: Problem):
    check(packable(problem).to(dtype))


def everything(rank: int, dtype: torch.dtype = torch.float64) -> Problem:
    """Bias, stride, dilation, and a causal axis."""
    return random_problem(
        (7, 6, 5)[:rank],
        (3, 2, 4)[:rank],
        stride=(2, 1, 3)[:rank],
        dilation=(2, 3, 1)[:rank],
        is_causal=(False, True, False)[:rank],
        head_dim=3,
        bias=True,
        dtype=dtype,
    )


def forward_args(problem: Problem) -> tuple[object, ...]:
    return (*learnable((pack(problem), problem.tensors[3])), *problem.parameters)


def backward_args(problem: Problem) -> tuple[object, ...]:
    qkv, rpb, *parameters = forward_args(problem)
    results = na_qkv_forward(qkv, rpb, *parameters)
    upstream = (problem.grad_output, problem.grad_logsumexp)
    return (*learnable((*upstream, qkv, rpb, *results)), *parameters)


# Each takes some seconds: the unpacked operators, which share all but the views, are checked in every way.
def test_opcheck_forward():
    qkv, rpb, *parameters = forward_args(everything(2))
    # Heads outside of query, key, and value.
    opcheck(na_qkv_forward, qkv.detach().transpose(3, 4).clone().transpose(3, 4).requires_grad_(), rpb, *parameters)


@pytest.mark.parametrize(
    "problem",
    [random_problem((5, 4), (3, 3), batch=0, bias=True), random_problem((6,), (3,), dtype=torch.bfloat16)],
    ids=["empty", "bfloat16"],
)
def test_opcheck_forward_edge_cases(problem: Problem):
    opcheck(na_qkv_forward, *forward_args(problem))


def test_opcheck_backward():
    opcheck(na_qkv_backward, *backward_args(everything(2)))


def test_gradcheck():
    qkv, rpb, *parameters = forward_args(everything(1))
    assert torch.autograd.gradcheck(lambda *x: na_qkv_forward(*x, *parameters), (qkv, rpb))


def test_gradgradcheck():
    problem = random_problem((4, 2), (3, 2), batch=1, heads=1, head_dim=2, is_causal=(False, True), bias=True)
    qkv, rpb, *parameters = forward_args(problem)
    assert torch.autograd.gradgradcheck(lambda *x: na_qkv_forward(*x, *parameters), (qkv, rpb))


@pytest.mark.parametrize("use", ["output", "logsumexp"])
def test_either_output_alone_has_gradients(use: str):
    qkv, rpb, *parameters = forward_args(everything(2))
    index = ("output", "logsumexp").index(use)
    na_qkv_forward(qkv, rpb, *parameters)[index].square().sum().backward()
    grads, qkv.grad, rpb.grad = (qkv.grad, rpb.grad), None, None
    na_forward(*qkv.unbind(-3), rpb, None, None, *parameters)[index].square().sum().backward()
    torch.testing.assert_close(grads, (qkv.grad, rpb.grad))


def test_functional_gradients():
    problem = random_problem((4, 3), (3, 2), batch=1, head_dim=2, bias=True)

    def loss(qkv: Tensor, rpb: Tensor, is_packed: bool) -> Tensor:
        inputs = (qkv, rpb) if is_packed else (*qkv.unbind(-3), rpb, None, None)
        output, logsumexp = (na_qkv_forward if is_packed else na_forward)(*inputs, *problem.parameters)
        return output.square().sum() + logsumexp.sin().sum()

    grad = torch.func.grad(loss, (0, 1))
    inputs = (pack(problem), problem.tensors[3])
    torch.testing.assert_close(grad(*inputs, True), grad(*inputs, False))
    hessian = torch.func.jacrev(torch.func.grad(loss))
    torch.testing.assert_close(hessian(*inputs, True), hessian(*inputs, False))


@pytest.mark.parametrize("bias_dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_autocast_runs_in_its_dtype(bias_dtype: torch.dtype):
    problem = random_problem((5, 6), (3, 3), bias=True, dtype=torch.float32)
    qkv, rpb = pack(problem), problem.tensors[3].to(bias_dtype)
    with torch.autocast("cpu", torch.bfloat16):
        results = na_qkv_forward(qkv, rpb, *problem.parameters)
        expected = na_forward(*problem.tensors[:3], rpb, None, None, *problem.parameters)
    assert results[0].dtype is torch.bfloat16
    torch.testing.assert_close(results, expected, rtol=0, atol=0)
    alone = na_qkv_forward(qkv.bfloat16(), rpb if bias_dtype is torch.float32 else rpb.bfloat16(), *problem.parameters)
    torch.testing.assert_close(results, alone, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("qkv", "error", "message"),
    [
        (
            torch.zeros(2, 6, 3, 4, 8),
            ValueError,
            r"qkv must have shape \[batch, height, width, 3, heads, head_dim\].*8\)",
        ),
        (torch.zeros(2, 6, 5, 2, 4, 8), ValueError, r"qkv must have shape .* got \(2, 6, 5, 2, 4, 8\)"),
        (torch.zeros(2, 6, 5, 3, 0, 8), ValueError, r"at least one head and one channel, got"),
        (torch.tensor(1.0), ValueError, r"qkv must have shape .* got \(\)"),
        (torch.zeros(2, 6, 5, 3, 8, 4).transpose(-1, -2), ValueError, r"qkv's last axis must be contiguous"),
        (torch.zeros(2, 6, 5, 3, 4, 8, dtype=torch.int32), TypeError, "qkv must have dtype .*, got torch.int32"),
        (torch.zeros(2, 6, 5, 3, 4, 8).to_sparse(), NotImplementedError, "qkv must be a dense, strided tensor"),
        (None, TypeError, "qkv must be a torch.Tensor, got NoneType"),
        (torch.zeros(2, 2, 5, 3, 4, 8), ValueError, r"kernel_size \* dilation must not exceed the axis"),
    ],
)
def test_what_is_refused(qkv: Tensor | None, error: type[Exception], message: str):
    parameters = ((3, 3), (1, 1), (1, 1), (False, False), 0.5)
    with pytest.raises(error, match=message):
        na_qkv_forward(qkv, None, *parameters)
    if isinstance(qkv, Tensor) and qkv.layout is torch.strided:
        with pytest.raises(error, match=message):
            na_qkv_forward(qkv.to("meta"), None, *parameters)
        output, logsumexp = qkv.new_zeros(2, 6, 5, 4, 8), torch.zeros(2, 6, 5, 4)
        with pytest.raises(error, match=message):
            na_qkv_backward(output, None, qkv, None, output, logsumexp, *parameters)


def test_other_arguments_are_checked():
    qkv, rpb, *parameters = forward_args(everything(2))
    with pytest.raises(ValueError, match="kernel_size must have 1 to 3 entries"):
        na_qkv_forward(qkv, rpb, (), (), (), (), 0.5)
    with pytest.raises(ValueError, match="rpb must have shape"):
        na_qkv_forward(qkv, rpb[:, 1:], *parameters)
    output, logsumexp = na_qkv_forward(qkv, rpb, *parameters)
    with pytest.raises(ValueError, match="grad_output must have shape"):
        na_qkv_backward(output[:1], None, qkv, rpb, output, logsumexp, *parameters)
