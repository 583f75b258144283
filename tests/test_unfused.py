"""The unfused pair: kernels and reference against dense products, and everything that PyTorch wants to know of it."""

from collections.abc import Callable
from functools import partial

import pytest
import torch
import unfused_oracle as oracle
from hypothesis import given, settings
from problems import DTYPES, LAYOUTS, Problem, problems, random_problem, relative_error
from torch import Tensor
from torch.autograd import forward_ad
from torch.testing._internal.optests.generate_tests import ALL_TEST_UTILS
from torch.utils.flop_counter import FlopCounterMode

from natten2.ops import unfused_reference
from natten2.ops.schemas import na_av, na_av_backward, na_qk, na_qk_backward

OPERATORS = (na_qk, na_qk_backward, na_av, na_av_backward)
REFERENCE = tuple(getattr(unfused_reference, op._schema.name.split("::")[1]) for op in OPERATORS)


def qk_tensors(problem: Problem) -> tuple[Tensor | None, ...]:
    query, key, _, rpb, additional_keys, _ = problem.tensors
    return query, key, rpb, additional_keys


def window(problem: Problem) -> tuple:
    return problem.parameters[:4]


def any_weights(problem: Problem, layout: Callable[[Tensor], Tensor] = torch.clone) -> Tensor:
    """Weights that need not come from a softmax, or from `na_qk`."""
    slots = torch.Size(problem.kernel_size).numel()
    additional = problem.tensors[4]
    slots += 0 if additional is None else additional.shape[1]
    query = problem.tensors[0]
    generator = torch.Generator().manual_seed(7)
    weights = torch.randn(*query.shape[:-1], slots, generator=generator, dtype=torch.float64)
    return layout(weights.to(query.dtype))


def av_tensors(problem: Problem, layout: Callable[[Tensor], Tensor] = torch.clone) -> tuple[Tensor | None, ...]:
    return any_weights(problem, layout), problem.tensors[2], problem.tensors[5]


def run(problem: Problem, operators: tuple[Callable, ...], layout: Callable = torch.clone) -> list[Tensor]:
    """The results and gradients of both operators."""
    qk, qk_backward, av, av_backward = operators
    scores = qk(*qk_tensors(problem), *problem.parameters, -torch.inf)
    grads = qk_backward(any_weights(problem, layout), *qk_tensors(problem), *problem.parameters)
    output = av(*av_tensors(problem, layout), *window(problem))
    return [
        scores,
        *grads,
        output,
        *av_backward(problem.grad_output, *av_tensors(problem, layout), *window(problem)),
    ]


def run_oracle(problem: Problem) -> list[Tensor]:
    scores, qk_grads = _gradients(partial(oracle.scores, problem), qk_tensors(problem), any_weights(problem))
    output, av_grads = _gradients(partial(oracle.sums, problem), av_tensors(problem), problem.grad_output)
    return [scores, *qk_grads, output, *av_grads]


def _gradients(
    function: Callable, tensors: tuple[Tensor | None, ...], upstream: Tensor
) -> tuple[Tensor, tuple[Tensor, ...]]:
    leaves = tuple(None if x is None else x.detach().requires_grad_() for x in tensors)
    result = function(leaves)
    present = [x for x in leaves if x is not None]
    # Hidden scores are constants, whatever comes upstream.
    upstream = torch.where(result.detach().isfinite(), upstream, 0)
    grads = iter(torch.autograd.grad(result, present, upstream))
    return result.detach(), tuple(upstream.new_empty(0) if x is None else next(grads) for x in leaves)


def compare(results: list[Tensor], expected: list[Tensor]) -> None:
    for result, wanted in zip(results, expected, strict=True):
        torch.testing.assert_close(result, wanted, rtol=1e-9, atol=1e-11)


@settings(max_examples=25)
@given(problems(max_tokens=40))
def test_the_reference_is_dense(problem: Problem):
    compare(run(problem, REFERENCE), run_oracle(problem))


@settings(max_examples=25)
@given(problems(max_tokens=40))
def test_the_kernels_are_dense(problem: Problem):
    compare(run(problem, OPERATORS), run_oracle(problem))


@settings(max_examples=30)
@given(problems(max_tokens=200, min_batch=0))
def test_the_kernels_are_the_reference(capability: str, problem: Problem):
    for layout in LAYOUTS:
        compare(run(problem, OPERATORS, layout), run(problem, REFERENCE))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", [1, 3, 16, 33, 64, 100])
def test_every_dtype(capability: str, head_dim: int, dtype: torch.dtype):
    problem = random_problem((5, 9), (3, 4), heads=4, key_heads=2, head_dim=head_dim, value_dim=head_dim + 1, bias=True)
    problem = problem.to(dtype)
    exact = run(problem.to(torch.float64), REFERENCE)
    bound = {torch.float64: 1e-14, torch.float32: 1e-6, torch.bfloat16: 4e-3, torch.float16: 5e-4}[dtype]
    weights = problem.to(dtype)
    for result, wanted in zip(run(weights, OPERATORS), exact, strict=True):
        assert result.dtype is dtype
        # Random weights are rounded to the dtype as well, and a score of float64 is compared with one of few bits.
        assert relative_error(result, wanted) <= 2 * bound


def test_long_sums_stay_accurate(capability: str):
    problem = random_problem((25, 30), (25, 30), batch=1, heads=1, head_dim=5, additional=3, bias=True)
    positive = Problem(
        tuple(x.abs() for x in problem.tensors), *problem.parameters, problem.grad_output.abs(), problem.grad_logsumexp
    ).to(torch.float32)
    exact = run(positive.to(torch.float64), OPERATORS)
    for result, wanted in zip(run(positive, OPERATORS), exact, strict=True):
        assert relative_error(result, wanted) <= 3e-6


def test_the_pair_is_neighborhood_attention():
    problem = random_problem((6, 7), (3, 4), is_causal=(True, False), bias=True, additional=2, heads=4, key_heads=2)
    weights = na_qk(*qk_tensors(problem), *problem.parameters, -torch.inf).softmax(-1)
    output = na_av(weights, problem.tensors[2], problem.tensors[5], *window(problem))
    expected, _ = torch.ops.natten2.na_forward(*problem.tensors, *problem.parameters)
    torch.testing.assert_close(output, expected)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_what_is_hidden_is_not_read(capability: str, bad: float):
    problem = random_problem((7,), (4,), is_causal=(True,))
    clean = run(problem, OPERATORS)
    hidden = clean[0].isinf()
    weights = any_weights(problem).masked_fill(hidden, bad)
    grads = na_qk_backward(weights, *qk_tensors(problem), *problem.parameters)
    compare(list(grads), clean[1:5])
    torch.testing.assert_close(na_av(weights, problem.tensors[2], None, *window(problem)), clean[5])
    grads = na_av_backward(problem.grad_output, weights, problem.tensors[2], None, *window(problem))
    compare(list(grads), clean[6:])
    assert torch.equal(grads[0][hidden], torch.zeros_like(grads[0][hidden]))


def test_nan_reaches_only_who_sees_it(capability: str):
    problem = random_problem((30,), (5,), head_dim=20)
    query, key, rpb, extra = qk_tensors(problem)
    key = key.clone()
    key[:, 15] = torch.nan
    scores = na_qk(query, key, rpb, extra, *problem.parameters, -torch.inf)
    assert scores.isnan().any(-1).any(-1).any(0).nonzero().flatten().tolist() == [13, 14, 15, 16, 17]
    output = na_av(any_weights(problem), key, None, *window(problem))
    assert output.isnan().any(-1).any(-1).any(0).nonzero().flatten().tolist() == [13, 14, 15, 16, 17]


def small(rank: int, *, bias: bool = True) -> Problem:
    return random_problem(
        (5, 3, 3)[:rank],
        (2, 2, 3)[:rank],
        stride=(2, 1, 1)[:rank],
        dilation=(2, 1, 1)[:rank],
        is_causal=(True, False, True)[:rank],
        batch=1,
        heads=2,
        key_heads=1,
        head_dim=2,
        value_dim=3,
        bias=bias,
        additional=1,
    )


def forms(problem: Problem) -> list[tuple[Callable, tuple[Tensor, ...]]]:
    """All four operators as functions of the tensors that they are differentiable by."""
    weights = any_weights(problem)
    scored = (partial(_call, na_qk, qk_tensors(problem), (*problem.parameters, 0.0)), qk_tensors(problem))
    qk = (weights, *qk_tensors(problem))
    av, av_backward = av_tensors(problem), (problem.grad_output, *av_tensors(problem))
    forms = [
        scored,
        (partial(_call, na_qk_backward, qk, problem.parameters), qk),
        (partial(_call, na_av, av, window(problem)), av),
        (partial(_call, na_av_backward, av_backward, window(problem)), av_backward),
    ]
    return [(function, tuple(x for x in tensors if x is not None)) for function, tensors in forms]


def _call(op: Callable, tensors: tuple[Tensor | None, ...], parameters: tuple, *present: Tensor) -> object:
    remaining = iter(present)
    results = op(*(None if x is None else next(remaining) for x in tensors), *parameters)
    return results if isinstance(results, Tensor) else tuple(x for x in results if x.numel() > 0)


@pytest.mark.parametrize("index", range(4), ids=["qk", "qk_backward", "av", "av_backward"])
@pytest.mark.parametrize("rank", [1, 2, 3])
def test_derivatives(rank: int, index: int):
    function, tensors = forms(small(rank))[index]
    leaves = tuple(x.clone().requires_grad_() for x in tensors)
    is_short = rank == 1
    assert torch.autograd.gradcheck(
        function, leaves, check_forward_ad=True, check_batched_grad=is_short, fast_mode=not is_short
    )
    assert torch.autograd.gradgradcheck(
        function, leaves, check_fwd_over_rev=True, check_batched_grad=is_short, fast_mode=not is_short
    )


@pytest.mark.parametrize("index", range(4), ids=["qk", "qk_backward", "av", "av_backward"])
def test_second_derivatives_of_expanded_gradients(index: int):
    # Those of a sum are one number in every place, with strides of zero, which no kernel reads.
    function, tensors = forms(small(1))[index]

    def second(last: Callable[[Tensor], Tensor]) -> tuple[Tensor, ...]:
        leaves = tuple(x.clone().requires_grad_() for x in tensors)
        results = function(*leaves)
        results = (results,) if isinstance(results, Tensor) else results
        squares = sum(x.square().sum() for x in results)
        grads = torch.autograd.grad(squares, leaves, create_graph=True, materialize_grads=True)
        return torch.autograd.grad(sum(last(grad) for grad in grads), leaves, materialize_grads=True)

    torch.testing.assert_close(second(torch.sum), second(lambda x: (x * torch.ones_like(x)).sum()))


def test_third_derivatives_are_there():
    function, tensors = forms(small(1, bias=False))[0]
    leaves = tuple(x.clone().requires_grad_() for x in tensors)

    def gradient(*leaves: Tensor) -> Tensor:
        grads = torch.autograd.grad(function(*leaves).pow(2).sum(), leaves, create_graph=True)
        return sum(grad.pow(2).sum() for grad in grads)

    assert torch.autograd.gradgradcheck(gradient, leaves)


@pytest.mark.parametrize("index", range(4))
@pytest.mark.parametrize("bias", [False, True])
def test_vmap_is_a_loop_without_a_loop(bias: bool, index: int):
    function, tensors = forms(small(2, bias=bias))[index]
    for chosen in range(len(tensors)):
        dims = tuple(1 if i == chosen or i == 0 else None for i in range(len(tensors)))
        mapped = tuple(
            x if dim is None else torch.stack([x, 2 * x, x - 1], dim) for x, dim in zip(tensors, dims, strict=True)
        )
        result = torch.vmap(function, dims)(*mapped)
        for i in range(3):
            each = function(*(x if dim is None else x.select(dim, i) for x, dim in zip(mapped, dims, strict=True)))
            pairs = [(result, each)] if isinstance(each, Tensor) else zip(result, each, strict=True)
            for one, other in pairs:
                torch.testing.assert_close(one[i], other)


def test_vmap_calls_the_operator_once():
    problem = small(1)
    with FlopCounterMode(display=False) as counter:
        torch.vmap(lambda q: na_qk(q, *qk_tensors(problem)[1:], *problem.parameters, 0.0))(
            torch.randn(5, *problem.tensors[0].shape, dtype=torch.float64)
        )
    assert list(counter.get_flop_counts()["Global"]) == [torch.ops.natten2.na_qk]


def test_function_transforms():
    function, tensors = forms(small(1, bias=False))[0]

    def loss(*tensors: Tensor) -> Tensor:
        return function(*tensors).sin().sum()

    expected = torch.autograd.functional.hessian(loss, tensors)
    for hessian in (
        torch.func.hessian(loss, (0, 1, 2)),
        torch.func.jacrev(torch.func.jacrev(loss, (0, 1, 2)), (0, 1, 2)),
        torch.func.jacfwd(torch.func.jacfwd(loss, (0, 1, 2)), (0, 1, 2)),
    ):
        torch.testing.assert_close(hessian(*tensors), expected)


def test_tangents_of_one_input_alone():
    problem = small(1)
    query, key, rpb, extra = qk_tensors(problem)
    with forward_ad.dual_level():
        dual = na_qk(
            query, key, forward_ad.make_dual(rpb, torch.ones_like(rpb)), extra, *problem.parameters, -torch.inf
        )
        scores, tangent = forward_ad.unpack_dual(dual)
    slots = scores.shape[-1] - 1
    torch.testing.assert_close(tangent[..., :slots], scores[..., :slots].isfinite().double())
    assert not tangent[..., slots:].any()


@pytest.mark.parametrize(
    ("rank", "dtype"), [(1, torch.float64), (2, torch.bfloat16), (3, torch.float32)], ids=["1d", "2d", "3d"]
)
def test_opcheck(rank: int, dtype: torch.dtype):
    problem = small(rank).to(dtype)
    weights = any_weights(problem)
    calls = (
        (na_qk, qk_tensors(problem), (*problem.parameters, -torch.inf)),
        (na_qk_backward, (weights, *qk_tensors(problem)), problem.parameters),
        (na_av, av_tensors(problem), window(problem)),
        (na_av_backward, (problem.grad_output, *av_tensors(problem)), window(problem)),
    )
    for op, tensors, parameters in calls:
        leaves = tuple(None if x is None else x.clone().requires_grad_() for x in tensors)
        torch.library.opcheck(op, (*leaves, *parameters), test_utils=tuple(ALL_TEST_UTILS))


def test_opcheck_without_optional_tensors_and_without_a_batch():
    problem = random_problem((4, 5), (3, 2), batch=0)
    leaves = [x.clone().requires_grad_() for x in problem.tensors[:3]]
    arguments = (*leaves[:2], None, None, *problem.parameters, -torch.inf)
    torch.library.opcheck(na_qk, arguments, test_utils=tuple(ALL_TEST_UTILS))
    weights = any_weights(problem).requires_grad_()
    arguments = (weights, leaves[2], None, *window(problem))
    torch.library.opcheck(na_av, arguments, test_utils=tuple(ALL_TEST_UTILS))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(dtype: torch.dtype):
    problem = random_problem((5, 6), (3, 3), bias=True, dtype=torch.float32)
    query, key, value, rpb = problem.tensors[:4]
    with torch.autocast("cpu", dtype=dtype):
        scores = na_qk(query, key, rpb, None, *problem.parameters, -torch.inf)
        output = na_av(scores.softmax(-1, dtype=torch.float32), value.to(dtype), None, *window(problem))
    assert (scores.dtype, output.dtype) == (dtype, dtype)
    exact = na_qk(query.to(dtype), key.to(dtype), rpb, None, *problem.parameters, -torch.inf)
    assert torch.equal(scores, exact)
    # float64 is left alone.
    with torch.autocast("cpu", dtype=dtype):
        wide = na_qk(query.double(), key.double(), None, None, *problem.parameters, -torch.inf)
    assert wide.dtype is torch.float64


def test_flops_are_those_of_the_visible_pairs():
    problem = random_problem((5,), (3,), is_causal=(True,), heads=4, key_heads=2, head_dim=8, additional=2)
    leaves = [None if x is None else x.clone().requires_grad_() for x in problem.tensors]
    pairs = 2 * 4 * ((1 + 2 + 3 + 3 + 3) + 5 * 2)
    with FlopCounterMode(display=False) as counter:
        scores = na_qk(leaves[0], leaves[1], None, leaves[4], *problem.parameters, 0.0)
        na_av(scores, leaves[2], leaves[5], *window(problem)).sum().backward()
    counts = counter.get_flop_counts()["Global"]
    assert counts[torch.ops.natten2.na_qk] == counts[torch.ops.natten2.na_av] == 2 * pairs * 8
    assert counts[torch.ops.natten2.na_qk_backward] == counts[torch.ops.natten2.na_av_backward] == 4 * pairs * 8


def test_the_compiler_sees_one_node_each():
    problem = random_problem((6, 5), (3, 3), bias=True, dtype=torch.float32)
    query, key, value, rpb = (x.requires_grad_() for x in problem.tensors[:4])

    def attend(query: Tensor, key: Tensor, value: Tensor, rpb: Tensor) -> Tensor:
        weights = na_qk(query, key, rpb, None, *problem.parameters, -torch.inf).softmax(-1)
        return na_av(weights, value, None, *window(problem))

    eager = torch.autograd.grad(attend(query, key, value, rpb).sum(), (query, key, value, rpb))
    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager", dynamic=True)
    grads = torch.autograd.grad(compiled(query, key, value, rpb).sum(), (query, key, value, rpb))
    torch.testing.assert_close(grads, eager)


def test_refusals():
    q = torch.randn(1, 5, 2, 4)
    one = ((1,), (1,), (False,))
    with pytest.raises(ValueError, match="key must have query's batch and axes"):
        na_qk(q, q[:, :4], None, None, (3,), *one, 1.0, 0.0)
    with pytest.raises(ValueError, match=r"kernel_size \* dilation must not exceed the axis"):
        na_qk(q, q, None, None, (6,), *one, 1.0, 0.0)
    with pytest.raises(ValueError, match="weights must have 3 slots, those of the window and of additional_values"):
        na_av(q, q, None, (3,), *one)
    with pytest.raises(TypeError, match=r"value must have dtype torch\.float32"):
        na_av(torch.randn(1, 5, 2, 3), q.double(), None, (3,), *one)
    with pytest.raises(ValueError, match="weights' heads must be a multiple of value's 3"):
        na_av(torch.randn(1, 5, 2, 3), torch.randn(1, 5, 3, 4), None, (3,), *one)
    with pytest.raises(ValueError, match="value must have weights' batch and axes"):
        na_av(torch.randn(1, 5, 2, 3), torch.randn(1, 6, 2, 4), None, (3,), *one)
    with pytest.raises(ValueError, match="weights's last axis must be contiguous"):
        na_av(torch.randn(1, 5, 3, 2).mT, q, None, (3,), *one)
    with pytest.raises(ValueError, match="additional_values must have shape"):
        na_av(torch.randn(1, 5, 2, 4), q, torch.randn(1, 1, 3, 4), (3,), *one)
    with pytest.raises(ValueError, match="grad_scores must have shape"):
        na_qk_backward(q, q, q, None, None, (3,), *one, 1.0)
    with pytest.raises(ValueError, match="grad_output must have shape"):
        na_av_backward(q[..., :3], torch.randn(1, 5, 2, 3), q, None, (3,), *one)
    with pytest.raises(ValueError, match="stride must be between 1 and kernel_size"):
        na_av(torch.randn(1, 5, 2, 3), q, None, (3,), (4,), (1,), (False,))
