"""The registration of every operator: what opcheck sees, and what it doesn't."""

import pytest
import torch
from problems import DTYPES, Problem, packed, random_problem, with_layout
from torch import Tensor
from torch.testing._internal.optests.generate_tests import ALL_TEST_UTILS

from natten2.ops import reference
from natten2.ops.schemas import na_backward, na_forward
from natten2.ops.validation import CHECKS

OPERATORS = tuple(op._opname for op in CHECKS)
FACES = ("na1d", "na2d", "na3d")


def opcheck(op: torch._ops.OpOverload, *args: object) -> None:
    results = torch.library.opcheck(op, args, test_utils=tuple(ALL_TEST_UTILS))
    assert set(results.values()) == {"SUCCESS"}
    assert len(results) == 5


def everything(rank: int, dtype: torch.dtype = torch.float64) -> Problem:
    """Views, bias, dilation, stride, a causal axis, grouped heads, another value_dim, and additional keys at once."""
    problem = random_problem(
        (7, 6, 5)[:rank],
        (3, 2, 4)[:rank],
        stride=(2, 1, 3)[:rank],
        dilation=(2, 3, 1)[:rank],
        is_causal=(False, True, False)[:rank],
        heads=4,
        key_heads=2,
        head_dim=3,
        value_dim=5,
        additional=2,
        bias=True,
        dtype=dtype,
    )
    return with_layout(problem, packed)


def plain(rank: int) -> Problem:
    return random_problem((5, 4, 3)[:rank], (3, 2, 3)[:rank])


EDGE_CASES = {
    "one token": random_problem((1, 1), (1, 1)),
    "empty batch": random_problem((4, 5), (3, 3), batch=0, bias=True, additional=1),
    "single frame": random_problem((1, 5, 4), (1, 3, 3), bias=True),
    "one channel": random_problem((6,), (3,), head_dim=1, value_dim=1),
    "causal": random_problem((6, 7), (3, 3), is_causal=(True, True)),
}
DTYPE_CASES = {str(dtype): random_problem((5, 4), (3, 3), bias=True, dtype=dtype) for dtype in DTYPES}


def but_one_long(cases: dict[str, Problem], short: str) -> list:
    """Parameters of a test of which one stays in short runs: second derivatives take ten seconds to trace."""
    return [pytest.param(x, id=name, marks=[] if name == short else [pytest.mark.long]) for name, x in cases.items()]


def learnable(tensors: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:
    return tuple(None if tensor is None else tensor.detach().requires_grad_() for tensor in tensors)


def backward_args(problem: Problem) -> tuple[object, ...]:
    output, logsumexp = na_forward(*problem.tensors, *problem.parameters)
    tensors = (problem.grad_output, problem.grad_logsumexp, *problem.tensors, output, logsumexp)
    return (*learnable(tensors), *problem.parameters)


def face_args(problem: Problem) -> tuple[object, ...]:
    query, key, value, *rest = learnable(problem.tensors)
    return (query, key, value, *problem.parameters, *rest)


@pytest.mark.parametrize("make", [plain, everything])
@pytest.mark.parametrize("rank", [1, 2, 3])
def test_opcheck_forward(rank: int, make):
    problem = make(rank)
    opcheck(na_forward, *learnable(problem.tensors), *problem.parameters)


@pytest.mark.parametrize(
    ("rank", "make"), [(1, plain), (2, everything), pytest.param(3, plain, marks=pytest.mark.long)]
)
def test_opcheck_backward(rank: int, make):
    opcheck(na_backward, *backward_args(make(rank)))


@pytest.mark.parametrize("make", [plain, everything])
@pytest.mark.parametrize("rank", [1, 2, 3])
def test_opcheck_faces(rank: int, make):
    opcheck(getattr(torch.ops.natten2, FACES[rank - 1]).default, *face_args(make(rank)))


@pytest.mark.parametrize("problem", EDGE_CASES.values(), ids=EDGE_CASES)
def test_opcheck_edge_cases(problem: Problem):
    opcheck(na_forward, *learnable(problem.tensors), *problem.parameters)


@pytest.mark.parametrize("problem", but_one_long(EDGE_CASES, "empty batch"))
def test_opcheck_backward_of_edge_cases(problem: Problem):
    opcheck(na_backward, *backward_args(problem))


@pytest.mark.parametrize("problem", DTYPE_CASES.values(), ids=DTYPE_CASES)
def test_opcheck_dtypes(problem: Problem):
    opcheck(na_forward, *learnable(problem.tensors), *problem.parameters)


@pytest.mark.parametrize("problem", but_one_long(DTYPE_CASES, "torch.bfloat16"))
def test_opcheck_backward_of_dtypes(problem: Problem):
    opcheck(na_backward, *backward_args(problem))


def test_opcheck_views_of_a_packed_projection():
    qkv = torch.randn(2, 6, 5, 3, 2, 4, dtype=torch.float64)
    query, key, value = (view.requires_grad_() for view in qkv.unbind(3))
    opcheck(torch.ops.natten2.na2d.default, query, key, value, [3, 3])
    opcheck(na_forward, query, key, value, None, None, None, [3, 3], [1, 1], [2, 1], [True, False], 0.5)


def test_opcheck_expanded_gradient():
    grad_output, _, *rest = backward_args(plain(1))
    opcheck(na_backward, torch.ones((), dtype=torch.float64).expand(grad_output.shape), None, *rest)


@pytest.mark.long
def test_opcheck_transposed_gradient():
    grad_output, grad_logsumexp, *rest = backward_args(plain(1))
    opcheck(
        na_backward,
        grad_output.transpose(1, 2).contiguous().transpose(1, 2),
        grad_logsumexp[:, :1].expand(grad_logsumexp.shape),
        *rest,
    )


def test_every_kernel_has_a_schema():
    assert not [name for name in torch._C._dispatch_find_dangling_impls() if "natten2" in name]


@pytest.mark.parametrize("name", OPERATORS)
@pytest.mark.parametrize("key", ["CPU", "Meta", "MPS", "XPU", "BackendSelect", "AutogradCPU", "AutogradCUDA"])
def test_operators_are_registered(name: str, key: str):
    assert torch._C._dispatch_has_computed_kernel_for_dispatch_key(f"natten2::{name}", key)


@pytest.mark.parametrize("name", ["na_forward", "na_qkv_forward", "na_qk", "na_av"])
@pytest.mark.parametrize("device", ["CPU", "CUDA", "XPU", "MPS"])
def test_autocast_is_registered(name: str, device: str):
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"natten2::{name}", f"Autocast{device}")


@pytest.mark.parametrize("name", [*OPERATORS, *FACES])
def test_operators_comply_with_the_compiler(name: str):
    assert torch.Tag.pt2_compliant_tag in getattr(torch.ops.natten2, name).default.tags


def test_each_argument_reaches_its_own_parameter():
    # The dispatcher does not compare a stable-ABI kernel's types and order with its schema: distinct values do.
    problem = random_problem(
        (13, 17, 19),
        (2, 3, 4),
        stride=(1, 2, 3),
        dilation=(4, 3, 2),
        is_causal=(True, False, False),
        heads=6,
        key_heads=3,
        head_dim=5,
        value_dim=7,
        additional=2,
        bias=True,
        scale=0.3,
        batch=1,
    )
    expected = reference.na_forward(*problem.tensors, *problem.parameters)
    results = na_forward(*problem.tensors, *problem.parameters)
    torch.testing.assert_close(results, expected)
    upstream = (problem.grad_output, problem.grad_logsumexp)
    args = (*upstream, *problem.tensors, *results, *problem.parameters)
    torch.testing.assert_close(na_backward(*args), reference.na_backward(*args))


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_faces_fill_in_the_defaults(rank: int):
    face = getattr(torch.ops.natten2, FACES[rank - 1])
    query, key, value = random_problem((4, 5, 6)[:rank], (3,) * rank).tensors[:3]
    expected, _ = reference.na_forward(
        query, key, value, None, None, None, (3,) * rank, (1,) * rank, (1,) * rank, (False,) * rank, 0.5
    )
    torch.testing.assert_close(face(query, key, value, 3), expected)
    torch.testing.assert_close(face(query, key, value, [3] * rank, scale=0.5), expected)


def test_fake_strides_are_the_kernels_strides():
    problem = everything(3, torch.bfloat16)
    real = na_forward(*problem.tensors, *problem.parameters)
    meta = na_forward(*(tensor.to("meta") for tensor in problem.tensors), *problem.parameters)
    for one, other in zip(real, meta, strict=True):
        assert (one.shape, one.stride(), one.dtype) == (other.shape, other.stride(), other.dtype)


def test_the_meta_kernel_rejects_what_the_cpu_kernel_rejects():
    query = torch.empty(1, 4, 4, 1, 2, device="meta")
    with pytest.raises(ValueError, match=r"kernel_size \* dilation must not exceed the axis, got 5 \* 1 = 5 on axis 0"):
        torch.ops.natten2.na2d(query, query, query, 5)
