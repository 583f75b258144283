"""Every kernel against the golden file, and against dense attention on inputs that nobody picked."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import oracle
import pytest
import torch
from built import Built
from hypothesis import given, settings
from problems import (
    DTYPES,
    INPUTS,
    Golden,
    Problem,
    golden_cases,
    problems,
    random_problem,
    relative_error,
    small_windows,
    wide_windows,
)
from torch import Tensor

from natten2 import _extension
from natten2.ops import reference
from natten2.ops.schemas import na_backward, na_forward

FORWARD_TOLERANCE = {torch.float64: 1e-13, torch.float32: 1e-6}
BACKWARD_TOLERANCE = {torch.float64: 1e-13, torch.float32: 3e-6}
Results = tuple[tuple[Tensor, Tensor], tuple[Tensor, ...]]
OPERATORS = (na_forward, na_backward)
REFERENCE = (reference.na_forward, reference.na_backward)


def run(problem: Problem, kernels: tuple[Callable, Callable] = OPERATORS) -> Results:
    forward, backward = kernels
    output, logsumexp = forward(*problem.tensors, *problem.parameters)
    upstream = (problem.grad_output, problem.grad_logsumexp)
    return (output, logsumexp), backward(*upstream, *problem.tensors, output, logsumexp, *problem.parameters)


def rounded_results(problem: Problem, dtype: torch.dtype) -> Results:
    """What rounding inputs and outputs to a dtype leaves of the float64 results."""
    rounded, exact = problem.to(dtype), problem.to(dtype).to(torch.float64)
    output, logsumexp = reference.na_forward(*exact.tensors, *exact.parameters)
    grads = reference.na_backward(
        exact.grad_output,
        exact.grad_logsumexp,
        *exact.tensors,
        output.to(dtype).double(),
        logsumexp,
        *exact.parameters,
    )
    return (output.to(dtype), logsumexp.to(rounded.grad_logsumexp.dtype)), tuple(grad.to(dtype) for grad in grads)


def check_golden(golden: Golden, dtype: torch.dtype, kernels: tuple[Callable, Callable]) -> None:
    problem = golden.problem
    results, grads = run(problem.to(dtype), kernels)
    if dtype in FORWARD_TOLERANCE:
        forward_bounds = (FORWARD_TOLERANCE[dtype],) * len(results)
        backward_bounds = (BACKWARD_TOLERANCE[dtype],) * len(grads)
    else:
        best, best_grads = rounded_results(problem, dtype)
        expected = (golden.output, golden.logsumexp)
        forward_bounds = tuple(rounding_bound(*pair) for pair in zip(best, expected, strict=True))
        backward_bounds = tuple(
            0.0 if pair[1] is None else rounding_bound(*pair) for pair in zip(best_grads, golden.grads, strict=True)
        )
    for name, result, expected, bound in zip(
        ("output", "logsumexp"), results, (golden.output, golden.logsumexp), forward_bounds, strict=True
    ):
        assert relative_error(result, expected) <= bound, name
    for name, grad, expected, bound in zip(INPUTS, grads, golden.grads, backward_bounds, strict=True):
        if expected is None:
            assert grad.numel() == 0, name
        else:
            assert relative_error(grad, expected) <= bound, f"grad_{name}"


def rounding_bound(rounded: Tensor, expected: Tensor) -> float:
    return 1.2 * relative_error(rounded, expected) + 1e-6


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("index", range(len(golden_cases())))
def test_golden_cpp(capability: str, index: int, dtype: torch.dtype):
    check_golden(golden_cases()[index], dtype, OPERATORS)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("index", range(len(golden_cases())))
def test_golden_reference(index: int, dtype: torch.dtype):
    check_golden(golden_cases()[index], dtype, REFERENCE)


@settings(max_examples=150)
@given(problems(max_tokens=60))
def test_reference_is_dense_attention(problem: Problem):
    check_against_oracle(problem, REFERENCE)


@settings(max_examples=150)
@given(problems(max_tokens=60))
def test_kernels_are_dense_attention(problem: Problem):
    check_against_oracle(problem, OPERATORS)


def check_against_oracle(problem: Problem, kernels: tuple[Callable, Callable]) -> None:
    expected, expected_grads = oracle.gradients(problem)
    results, grads = run(problem, kernels)
    compare(results, grads, expected, expected_grads)


@settings(max_examples=200)
@given(problems(max_tokens=500, min_batch=0))
def test_kernels_are_the_reference(capability: str, problem: Problem):
    compare(*run(problem), *run(problem, REFERENCE))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@settings(max_examples=60)
@given(small_windows())
def test_small_windows_are_the_reference(capability: str, dtype: torch.dtype, problem: Problem):
    check_small_window(problem, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@settings(max_examples=12)
@given(wide_windows())
def test_wide_windows_are_the_reference(capability: str, dtype: torch.dtype, problem: Problem):
    check_small_window(problem, dtype)


def check_small_window(problem: Problem, dtype: torch.dtype) -> None:
    problem = problem.to(dtype)
    results, grads = run(problem)
    expected, expected_grads = run(problem.to(torch.float64), REFERENCE)
    forward, backward = {
        torch.float32: (1e-6, 3e-6),
        torch.bfloat16: (5e-3, 2e-2),
        torch.float16: (8e-4, 4e-3),
    }[dtype]
    pairs = [(*pair, forward) for pair in zip(results, expected, strict=True)]
    pairs += [(*pair, backward) for pair in zip(grads, expected_grads, strict=True)]
    for result, wanted, bound in pairs:
        # Where gradients cancel, their errors are those of the terms.
        size = max(wanted.double().norm().item(), 0.1 * wanted.numel() ** 0.5)
        assert (result.double() - wanted.double()).norm().item() <= bound * size


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize(("spatial", "dilation"), [((80,), (1,)), ((22, 41), (1, 1)), ((22, 41), (3, 2))])
def test_what_a_query_does_not_see_does_not_reach_it(
    capability: str, spatial: tuple[int, ...], dilation: tuple[int, ...], is_causal: bool, bad: float
):
    rank = len(spatial)
    problem = random_problem(
        spatial,
        (5,) * rank,
        dilation=dilation,
        is_causal=(is_causal,) * rank,
        head_dim=16,
        bias=True,
        dtype=torch.float32,
    )
    clean, clean_grads = run(problem)
    token = (1, *(length // 2 for length in spatial), 1)
    tensors = [tensor if tensor is None else tensor.clone() for tensor in problem.tensors]
    grad_output = problem.grad_output.clone()
    for tensor in (*tensors[:3], grad_output):
        tensor[token] = bad
    results, grads = run(replace(problem, tensors=tuple(tensors), grad_output=grad_output))
    # Tokens see the bad one, or one that sees it, within twice the window.
    far = torch.ones(problem.tensors[0].shape[:-1], dtype=torch.bool)
    near = [
        slice(max(0, length // 2 - 8 * d), length // 2 + 8 * d + 1) for length, d in zip(spatial, dilation, strict=True)
    ]
    far[(1, *near, 1)] = False
    for result, wanted in zip((*results, *grads[:3]), (*clean, *clean_grads[:3]), strict=True):
        assert torch.equal(result[far], wanted[far])
    assert not torch.isfinite(results[0][token]).any()


def compare(results, grads, expected, expected_grads) -> None:
    for result, wanted in zip(results, expected, strict=True):
        torch.testing.assert_close(result, wanted, rtol=1e-10, atol=1e-12)
    for name, grad, wanted in zip(INPUTS, grads, expected_grads, strict=True):
        if wanted is not None:
            torch.testing.assert_close(
                grad, wanted, rtol=1e-9, atol=1e-11, msg=lambda text, name=name: f"{name}: {text}"
            )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", [1, 2, 3, 15, 16, 17, 31, 33, 64, 80, 127, 256])
def test_every_head_dim(capability: str, head_dim: int, dtype: torch.dtype):
    problem = random_problem((5, 6), (3, 4), head_dim=head_dim, value_dim=head_dim + 1, bias=True, additional=2)
    results, grads = run(problem.to(dtype))
    expected, expected_grads = run(problem.to(dtype).to(torch.float64), REFERENCE)
    bound = {torch.float64: 1e-13, torch.float32: 3e-6, torch.bfloat16: 0.02, torch.float16: 0.003}[dtype]
    for result, wanted in zip((*results, *grads), (*expected, *expected_grads), strict=True):
        assert relative_error(result, wanted) <= bound


def test_a_long_line_is_cut_into_blocks(capability: str):
    problem = random_problem((300,), (9,), dilation=(2,), stride=(2,), bias=True, additional=1, head_dim=3)
    compare(*run(problem), *run(problem, REFERENCE))


def test_a_tile_may_be_empty(capability: str):
    # Of the last axis's dilation groups, of 33 tokens and of 32, one alone has a second tile.
    problem = random_problem((11, 65), (7, 7), dilation=(1, 2), batch=1, heads=1, head_dim=256, bias=True).to(
        torch.float32
    )
    (results, grads), (expected, expected_grads) = run(problem), run(problem.to(torch.float64), REFERENCE)
    for result, wanted in zip((*results, *grads), (*expected, *expected_grads), strict=True):
        if wanted is not None and wanted.numel() > 0:
            assert relative_error(result, wanted) <= 3e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("head_dim", [20, 32])
@pytest.mark.parametrize(
    ("spatial", "kernel_size", "options"),
    [
        ((45, 19), (7, 5), {"heads": 3}),
        ((45, 19), (7, 5), {"heads": 3, "scale": 3.0}),  # beyond 1, sums are scaled, not queries
        ((70, 33), (4, 6), {"stride": (4, 3), "dilation": (2, 1), "is_causal": (True, False)}),
        ((30, 12), (11, 11), {"heads": 6, "key_heads": 2}),
        ((4, 40, 9), (3, 5, 4), {}),
    ],
)
def test_gradients_of_tall_images(
    capability: str, spatial: tuple[int, ...], kernel_size: tuple[int, ...], options: dict, head_dim: int, dtype
):
    # So many rows that a key's gradient is summed several times, and the memory of its sums used again.
    problem = random_problem(spatial, kernel_size, head_dim=head_dim, bias=True, batch=1, **options)
    check_small_window(problem, dtype)


@pytest.mark.parametrize(
    ("spatial", "kernel_size"), [((3000,), (3000,)), ((41, 43), (41, 43)), ((7, 9, 11), (7, 9, 11))]
)
def test_a_window_of_the_whole_axis_is_full_attention(spatial: tuple[int, ...], kernel_size: tuple[int, ...]):
    problem = random_problem(spatial, kernel_size, batch=1, heads=1, head_dim=2)
    query, key, value = (tensor.flatten(1, len(spatial)).transpose(1, 2) for tensor in problem.tensors[:3])
    expected = torch.nn.functional.scaled_dot_product_attention(query, key, value)
    output, _ = na_forward(*problem.tensors, *problem.parameters)
    torch.testing.assert_close(output.flatten(1, len(spatial)).transpose(1, 2), expected)


def test_long_sums_stay_accurate(capability: str):
    # Sums of numbers of one sign show every rounding error; both windows and additional keys make long ones.
    problem = random_problem((40, 40), (40, 40), batch=1, heads=1, additional=3000, bias=True)
    positive = replace(problem, tensors=tuple(x.abs() for x in problem.tensors), grad_output=problem.grad_output.abs())
    results, grads = run(positive.to(torch.float32))
    expected, expected_grads = run(positive.to(torch.float32).to(torch.float64))
    for result, wanted in zip(results, expected, strict=True):
        assert relative_error(result, wanted) <= FORWARD_TOLERANCE[torch.float32]
    for name, grad, wanted in zip(INPUTS, grads, expected_grads, strict=True):
        assert relative_error(grad, wanted) <= BACKWARD_TOLERANCE[torch.float32], name


def test_products_are_scaled_after_they_are_summed(capability: str):
    # The other way, the query would overflow.
    query, key, value = (
        torch.full((1, 2, 1, 1), 1e38),
        torch.tensor([0.0, 1e-38]).reshape(1, 2, 1, 1),
        torch.ones(1, 2, 1, 1),
    )
    _, logsumexp = na_forward(query, key, value, None, None, None, (2,), (1,), (1,), (False,), 10.0)
    torch.testing.assert_close(logsumexp.flatten(), torch.tensor([0.0, 10.0]).logsumexp(0).expand(2))


def test_gradients_are_scaled_after_they_are_summed(capability: str):
    problem = random_problem((40,), (5,), head_dim=16, scale=10.0)
    query, key, *rest = problem.tensors
    large = replace(problem, tensors=(1e38 * query.sign(), 1e-39 * key, *rest), grad_output=1e-6 * problem.grad_output)
    large = replace(large, grad_logsumexp=torch.zeros_like(problem.grad_logsumexp)).to(torch.float32)
    (_, grads), (_, expected) = run(large), run(large.to(torch.float64), REFERENCE)
    assert relative_error(grads[1], expected[1]) <= 1e-5


def test_an_empty_batch_costs_nothing(capability: str):
    tensors = [torch.empty(0, 2**33, 1, 1, requires_grad=True) for _ in range(3)]
    rpb = torch.ones(1, 5, requires_grad=True)
    output, logsumexp = na_forward(*tensors, None, None, None, (2**33,), (1,), (1,), (False,), 1.0)
    (output.sum() + logsumexp.sum()).backward()
    assert all(tensor.grad.shape == tensor.shape for tensor in tensors)
    na_forward(*tensors, rpb, None, None, (3,), (1,), (1,), (False,), 1.0)[0].sum().backward()
    assert torch.equal(rpb.grad, torch.zeros(1, 5))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_exponential_is_accurate_over_its_whole_range(capability: str, dtype: torch.dtype):
    # One key with score 0 and one with score x give the weight 1 / (1 + exp(x)) to the first value.
    scores = torch.cat((torch.linspace(-110, 110, 4001, dtype=torch.float64), torch.tensor([-torch.inf, 0.0])))
    scores = scores.to(dtype).to(torch.float64)
    key = torch.stack((torch.zeros_like(scores), scores), 1).reshape(-1, 2, 1, 1).to(dtype)
    query, value = torch.ones_like(key), torch.tensor([1.0, 0.0]).to(dtype).reshape(1, 2, 1, 1).expand(key.shape)
    output, logsumexp = na_forward(query, key, value, None, None, None, (2,), (1,), (1,), (False,), 1.0)
    expected = torch.sigmoid(-scores)
    eps = torch.finfo(dtype).eps
    tiny = torch.finfo(dtype).smallest_normal
    torch.testing.assert_close(output[:, 0, 0, 0].double(), expected, rtol=4 * eps, atol=2 * tiny)
    eps = torch.finfo(logsumexp.dtype).eps
    wanted = torch.nn.functional.softplus(scores, threshold=100)
    torch.testing.assert_close(logsumexp[:, 0, 0].double(), wanted, rtol=4 * eps, atol=4 * eps)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_converts_as_pytorch_does(capability: str, dtype: torch.dtype):
    # All 65,536 values pass through a kernel of size 1, whose output is its value.
    values = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype).reshape(1, 2**16, 1, 1)
    query = torch.zeros_like(values)
    output, _ = na_forward(query, query, values, None, None, None, (1,), (1,), (1,), (False,), 1.0)
    torch.testing.assert_close(output, values, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_rounds_to_nearest_even(capability: str, dtype: torch.dtype):
    # The mean of two neighboring values is a tie, and other means cover every distance to one.
    numbers = torch.arange(0x7C00 if dtype is torch.float16 else 0x7F80).to(torch.int16).view(dtype)
    for shift in (1, 2, 5):
        value = torch.stack((numbers[:-shift], numbers[shift:]), 1).reshape(-1, 2, 1, 1)
        query = torch.zeros_like(value)
        output, _ = na_forward(query, query, value, None, None, None, (2,), (1,), (1,), (False,), 1.0)
        expected = value.double().mean(1, keepdim=True).to(dtype).expand(value.shape)
        torch.testing.assert_close(output, expected, rtol=0, atol=0)


@pytest.mark.long
@pytest.mark.timeout(3600)
def test_pairs_of_bfloat16s_are_the_reference_where_avx512_stands_in(tmp_path: Path):
    if "avx512" not in _extension.cpu_capabilities():
        pytest.skip("the machine has no AVX-512")
    built = Built(tmp_path, "-DNATTEN2_EMULATE_BF16=ON")
    built.test("test_kernels.py", options=("-k", "avx512_bf16"))
