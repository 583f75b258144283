"""Gradients: of every input, through both outputs, to second order."""

from collections.abc import Callable

import pytest
import torch
from problems import Problem, random_problem
from test_operators import everything, learnable
from torch import Tensor

import natten2
from natten2.ops import reference
from natten2.ops.schemas import na_backward, na_forward


def small(rank: int) -> Problem:
    return random_problem(
        (4, 3, 3)[:rank],
        (3, 1, 2)[:rank],
        stride=(2, 1, 1)[:rank],
        dilation=(1, 2, 1)[:rank],
        is_causal=(False, False, True)[:rank],
        batch=1,
        heads=2,
        key_heads=1,
        head_dim=2,
        value_dim=1,
        additional=1,
        bias=True,
    )


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_gradcheck(capability: str, rank: int):
    problem = everything(rank) if rank < 3 else small(rank)
    inputs = learnable(problem.tensors)
    assert torch.autograd.gradcheck(lambda *tensors: na_forward(*tensors, *problem.parameters), inputs)


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_gradgradcheck(rank: int):
    problem = small(rank)
    inputs = learnable(problem.tensors)
    assert torch.autograd.gradgradcheck(lambda *tensors: na_forward(*tensors, *problem.parameters), inputs)


def test_gradcheck_with_dilation_and_without_bias():
    problem = random_problem((6, 5), (2, 2), dilation=(3, 2), heads=1, head_dim=2)
    inputs = learnable(problem.tensors[:3])
    assert torch.autograd.gradcheck(lambda q, k, v: na_forward(q, k, v, None, None, None, *problem.parameters), inputs)


@pytest.mark.parametrize("use", ["output", "logsumexp"])
def test_either_output_alone_has_gradients(use: str):
    problem = everything(2)
    mine, theirs = learnable(problem.tensors), learnable(problem.tensors)
    index = ("output", "logsumexp").index(use)
    na_forward(*mine, *problem.parameters)[index].square().sum().backward()
    reference.na_forward(*theirs, *problem.parameters)[index].square().sum().backward()
    for one, other in zip(mine, theirs, strict=True):
        # The log-sum-exp does not depend on the values.
        expected = torch.zeros_like(one) if other.grad is None else other.grad
        torch.testing.assert_close(one.grad, expected)


def test_gradients_flow_only_to_inputs_that_want_them():
    query, key, value = random_problem((5,), (3,)).tensors[:3]
    key.requires_grad_()
    natten2.na1d(query, key, value, 3).sum().backward()
    assert key.grad is not None
    assert query.grad is None
    assert not natten2.na1d(query, key.detach(), value, 3).requires_grad
    with torch.no_grad():
        assert not natten2.na1d(query, key, value, 3).requires_grad


@pytest.mark.parametrize("layout", ["expanded", "transposed", "sliced channels", "every other channel"])
def test_upstream_gradients_of_any_strides(layout: str):
    problem = everything(2)
    output, logsumexp = na_forward(*problem.tensors, *problem.parameters)
    shape = output.shape
    grad = {
        "expanded": torch.tensor(0.7, dtype=torch.float64).expand(shape),
        "transposed": torch.randn(*shape[::-1], dtype=torch.float64).permute(4, 3, 2, 1, 0),
        "sliced channels": torch.randn(*shape[:-1], 9, dtype=torch.float64)[..., 2 : 2 + shape[-1]],
        "every other channel": torch.randn(*shape[:-1], 2 * shape[-1], dtype=torch.float64)[..., ::2],
    }[layout]
    rest = (None, *problem.tensors, output, logsumexp, *problem.parameters)
    torch.testing.assert_close(na_backward(grad, *rest), na_backward(grad.contiguous(), *rest))


def test_gradients_through_a_packed_projection():
    qkv = torch.randn(2, 6, 5, 3, 2, 4, dtype=torch.float64, requires_grad=True)
    separate = [view.detach().clone().requires_grad_() for view in qkv.unbind(3)]
    natten2.na2d(*qkv.unbind(3), 3).square().sum().backward()
    natten2.na2d(*separate, 3).square().sum().backward()
    torch.testing.assert_close(qkv.grad, torch.stack([view.grad for view in separate], 3))


# Additional keys take other kernels than small windows do.
@pytest.mark.parametrize("additional", [0, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_results_are_the_same_bits_for_any_number_of_threads(capability: str, dtype: torch.dtype, additional: int):
    problem = random_problem((9, 70), (3, 7), heads=2, head_dim=8, bias=True, additional=additional, dtype=dtype)
    before = torch.get_num_threads()

    def run(threads: int) -> tuple[Tensor, ...]:
        torch.set_num_threads(threads)
        output, logsumexp = na_forward(*problem.tensors, *problem.parameters)
        upstream = (problem.grad_output, problem.grad_logsumexp)
        grads = na_backward(*upstream, *problem.tensors, output, logsumexp, *problem.parameters)
        return output, logsumexp, *grads

    try:
        first = run(1)
        for threads in (1, 2, 3, 7):
            assert all(torch.equal(one, other) for one, other in zip(first, run(threads), strict=True))
    finally:
        torch.set_num_threads(before)


def test_checkpointing_repeats_the_forward():
    query, key, value = learnable(random_problem((6, 6), (3, 3)).tensors[:3])
    natten2.na2d(query, key, value, 3).sum().backward()
    expected, query.grad = query.grad, None
    torch.utils.checkpoint.checkpoint(natten2.na2d, query, key, value, 3, use_reentrant=False).sum().backward()
    torch.testing.assert_close(query.grad, expected)


@pytest.mark.parametrize("poison", [torch.nan, torch.inf])
@pytest.mark.parametrize("attention", [na_forward, reference.na_forward], ids=["kernel", "reference"])
def test_nan_and_infinity_reach_only_queries_that_see_them(capability: str, attention: Callable, poison: float):
    problem = random_problem((12, 10), (3, 3), is_causal=(False, True), dilation=(2, 1), batch=1)
    query, key, value = (tensor.clone() for tensor in problem.tensors[:3])
    value[0, 5, 1, 0, 0] = poison
    output, logsumexp = attention(query, key, value, None, None, None, *problem.parameters)
    wrong = ~output.isfinite()
    expected = torch.zeros_like(wrong)
    # Row 5 is seen from rows 3, 5, and 7, and from row 1 whose window is shifted; column 1 from 1, 2, and 3.
    expected[0, 1:8:2, 1:4, 0, 0] = True
    assert torch.equal(wrong, expected)
    assert logsumexp.isfinite().all()


def test_scores_of_minus_infinity_hide_a_key(capability: str):
    query, key = torch.ones(1, 3, 1, 1), torch.tensor([1.0, -torch.inf, 2.0]).reshape(1, 3, 1, 1)
    value = torch.tensor([1.0, 2.0, 3.0]).reshape(1, 3, 1, 1)
    output, logsumexp = natten2.na1d(query, key, value, 3, scale=1.0, return_lse=True)
    weights = torch.tensor([1.0, -torch.inf, 2.0]).softmax(0)
    torch.testing.assert_close(output.flatten(), (weights * value.flatten()).sum().expand(3))
    torch.testing.assert_close(logsumexp.flatten(), torch.tensor([1.0, 2.0]).logsumexp(0).expand(3))
    _, hidden = natten2.na1d(query, torch.full_like(key, -torch.inf), value, 3, scale=1.0, return_lse=True)
    assert (hidden == -torch.inf).all()
