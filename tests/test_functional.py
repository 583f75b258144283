"""The functions that users call."""

import numpy as np
import pytest
import torch
from problems import random_problem
from torch import Tensor

import natten2
from natten2.ops.schemas import na_backward, na_forward

FUNCTIONS = (natten2.na1d, natten2.na2d, natten2.na3d)
SPATIAL = (6, 7, 8)


def qkv(rank: int, **options) -> tuple[Tensor, Tensor, Tensor]:
    return random_problem(SPATIAL[:rank], (1,) * rank, **options).tensors[:3]


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_one_number_means_every_axis(rank: int):
    query, key, value = qkv(rank)
    function = FUNCTIONS[rank - 1]
    spelled = function(query, key, value, (3,) * rank, (2,) * rank, (2,) * rank, (True,) * rank)
    torch.testing.assert_close(function(query, key, value, 3, 2, 2, True), spelled, rtol=0, atol=0)
    torch.testing.assert_close(function(query, key, value, [3] * rank, 2, [2] * rank, True), spelled, rtol=0, atol=0)


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_functions_are_the_operator(rank: int):
    problem = random_problem(
        SPATIAL[:rank], (3, 2, 4)[:rank], stride=(2, 1, 3)[:rank], dilation=(2, 3, 1)[:rank], bias=True, additional=2
    )
    query, key, value, rpb, additional_keys, additional_values = problem.tensors
    result = FUNCTIONS[rank - 1](
        query,
        key,
        value,
        problem.kernel_size,
        problem.stride,
        problem.dilation,
        problem.is_causal,
        problem.scale,
        rpb=rpb,
        additional_keys=additional_keys,
        additional_values=additional_values,
        return_lse=True,
    )
    torch.testing.assert_close(result, na_forward(*problem.tensors, *problem.parameters), rtol=0, atol=0)
    assert isinstance(FUNCTIONS[rank - 1](query, key, value, 1), Tensor)


def test_integers_of_other_kinds_are_integers():
    query, key, value = qkv(1)
    torch.testing.assert_close(natten2.na1d(query, key, value, np.int64(3)), natten2.na1d(query, key, value, 3))


def test_scale_defaults_to_the_root_of_head_dim_and_zero_means_zero():
    query, key, value = qkv(1, head_dim=9)
    torch.testing.assert_close(natten2.na1d(query, key, value, 3), natten2.na1d(query, key, value, 3, scale=1 / 3))
    mean = torch.stack([value[:, i : i + 3].mean(1) for i in range(4)], 1)
    torch.testing.assert_close(natten2.na1d(query, key, value, 3, scale=0.0)[:, 1:-1], mean)
    torch.testing.assert_close(natten2.na1d(query, key, value, 3, scale=0)[:, 1:-1], mean)
    torch.testing.assert_close(torch.ops.natten2.na1d(query, key, value, 3, scale=0.0)[:, 1:-1], mean)


def test_no_additional_tokens_change_nothing():
    query, key, value = qkv(2)
    none = key.new_empty(2, 0, 2, 4)
    result = natten2.na2d(query, key, value, 3, additional_keys=none, additional_values=none)
    torch.testing.assert_close(result, natten2.na2d(query, key, value, 3), rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_float32_bias_is_not_rounded(dtype: torch.dtype):
    problem = random_problem((5, 5), (3, 3), bias=True, dtype=dtype)
    query, key, value = problem.tensors[:3]
    rpb = torch.randn(2, 5, 5, requires_grad=True)
    output, logsumexp = natten2.na2d(query, key, value, 3, rpb=rpb, return_lse=True)
    expected = natten2.na2d(query.double(), key.double(), value.double(), 3, rpb=rpb.double(), return_lse=True)
    assert output.dtype == dtype
    torch.testing.assert_close(logsumexp.double(), expected[1], rtol=1e-5, atol=1e-5)
    logsumexp.sum().backward()
    (grad,) = torch.autograd.grad(expected[1].sum(), rpb)
    assert rpb.grad.dtype == torch.float32
    torch.testing.assert_close(rpb.grad, grad, rtol=1e-4, atol=1e-5)


STRIDED = {
    "heads first": lambda x: x.movedim(-2, 1).contiguous().movedim(1, -2),
    "column major": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "expanded batch": lambda x: x[:1].expand(x.shape),
    "every other row": lambda x: x.repeat_interleave(2, 1)[:, ::2],
    "unaligned": lambda x: torch.cat((x.flatten()[:1], x.flatten()))[1:].view(x.shape),
    "part of the channels": lambda x: torch.nn.functional.pad(x, (3, 2))[..., 3:-2],
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", STRIDED)
def test_views_are_read_in_place(layout: str, dtype: torch.dtype):
    tensors = tuple(STRIDED[layout](tensor).to(dtype) for tensor in random_problem((6, 5), (3, 3)).tensors[:3])
    views = tuple(STRIDED[layout](tensor) for tensor in tensors)
    dense = tuple(tensor.clone(memory_format=torch.contiguous_format) for tensor in views)
    for one, other in zip(
        natten2.na2d(*views, 3, return_lse=True), natten2.na2d(*dense, 3, return_lse=True), strict=True
    ):
        assert torch.equal(one, other)
        assert one.is_contiguous()


def test_autocast_follows_the_active_dtype():
    query, key, value = qkv(2, dtype=torch.float32)
    rpb = torch.randn(2, 5, 5)
    for dtype in (torch.bfloat16, torch.float16):
        with torch.autocast("cpu", dtype):
            output, logsumexp = natten2.na2d(query, key, value.to(dtype), 3, rpb=rpb, return_lse=True)
        expected = natten2.na2d(query.to(dtype), key.to(dtype), value.to(dtype), 3, rpb=rpb)
        assert (output.dtype, logsumexp.dtype) == (dtype, torch.float32)
        assert torch.equal(output, expected)
    with torch.autocast("cpu", torch.bfloat16):
        assert natten2.na2d(query.double(), key.double(), value.double(), 3).dtype == torch.float64
        assert torch.ops.natten2.na2d(query, key, value, 3).dtype == torch.bfloat16


def test_autocast_gives_gradients_in_the_parameters_dtype():
    query, key, value = (tensor.requires_grad_() for tensor in qkv(2, dtype=torch.float32))
    rpb = torch.randn(2, 5, 5, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        natten2.na2d(query, key, value, 3, rpb=rpb).float().square().sum().backward()
    exact = [tensor.detach().double().requires_grad_() for tensor in (query, key, value, rpb)]
    natten2.na2d(*exact[:3], 3, rpb=exact[3]).square().sum().backward()
    for tensor, other in zip((query, key, value, rpb), exact, strict=True):
        assert tensor.grad.dtype == torch.float32
        assert torch.linalg.vector_norm(tensor.grad - other.grad) < 0.02 * torch.linalg.vector_norm(other.grad)


def test_offsets_beyond_32_bits():
    # Virtual memory alone: only the tokens that the views name are ever touched.
    far = 2**31 + 8
    try:
        storage = torch.empty(2 * far, dtype=torch.bfloat16)
    except RuntimeError:
        pytest.skip("this system reserves no more memory than it has")
    views = [torch.as_strided(storage, (2, 4, 1, 8), (far, 8, 8, 1), offset) for offset in (0, 64, 128, 192)]
    near = [torch.randn(2, 4, 1, 8).bfloat16() for _ in views]
    for view, tensor in zip(views, near, strict=True):
        view.copy_(tensor)
    results = [natten2.na1d(*tensors[:3], 3, return_lse=True) for tensors in (views, near)]
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))
    rest = (*results[0], (3,), (1,), (1,), (False,), 0.5)
    grads = [na_backward(tensors[3], None, *tensors[:3], None, None, None, *rest) for tensors in (views, near)]
    assert all(torch.equal(one, other) for one, other in zip(*grads, strict=True))


def test_tensors_that_share_memory_until_written_stay_shared():
    tensors = [torch._lazy_clone(tensor) for tensor in qkv(1, dtype=torch.float32)]
    natten2.na1d(*tensors, 3)
    assert all(torch._C._is_cow_tensor(tensor) for tensor in tensors)


def dense_attention(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    scores = query @ key.transpose(-1, -2)
    return scores.softmax(-1) @ value, scores.logsumexp(-1)


@pytest.mark.parametrize("parts", [1, 2, 5])
def test_merged_attentions_are_attention_over_all_keys(parts: int):
    query, key, value = (torch.randn(n, 4, dtype=torch.float64, requires_grad=True) for n in (6, 10, 10))
    pieces = [dense_attention(query, k, v) for k, v in zip(key.chunk(parts), value.chunk(parts), strict=True)]
    merged = natten2.merge_attentions(*zip(*pieces, strict=True))
    whole = dense_attention(query, key, value)
    torch.testing.assert_close(merged, whole)
    upstream = tuple(torch.randn_like(tensor) for tensor in whole)
    grads = torch.autograd.grad(merged, (query, key, value), upstream)
    torch.testing.assert_close(grads, torch.autograd.grad(whole, (query, key, value), upstream))


def test_merging_windows_with_additional_keys_is_one_softmax():
    problem = random_problem((8,), (3,), additional=2)
    query, key, value, _, extra_keys, extra_values = problem.tensors
    together = natten2.na1d(
        query, key, value, 3, additional_keys=extra_keys, additional_values=extra_values, return_lse=True
    )
    window = natten2.na1d(query, key, value, 3, return_lse=True)
    scores = torch.einsum("blhd,bnhd->blhn", query, extra_keys) * problem.scale
    extra = torch.einsum("blhn,bnhd->blhd", scores.softmax(-1), extra_values), scores.logsumexp(-1)
    torch.testing.assert_close(natten2.merge_attentions(*zip(window, extra, strict=True)), together)


def test_merging_keeps_low_precision_outputs_and_ignores_empty_sets():
    for empty in (5.0, torch.nan):
        outputs = [torch.tensor([[1.0]]).bfloat16(), torch.tensor([[empty]]).bfloat16()]
        merged, lse = natten2.merge_attentions(outputs, [torch.tensor([0.5]), torch.tensor([-torch.inf])])
        assert merged.dtype == torch.bfloat16
        assert (merged.item(), lse.item()) == (1.0, 0.5)


MERGE_ERRORS = {
    "nothing": ([], [], ValueError, "equally many, at least one, got 0 and 0"),
    "too few lses": ([torch.ones(2, 3)] * 2, [torch.ones(2)], ValueError, "got 2 and 1"),
    "outputs of other shapes": (
        [torch.ones(2, 3), torch.ones(1, 3)],
        [torch.ones(2)] * 2,
        ValueError,
        r"outputs\[1\] must have shape \(2, 3\), got \(1, 3\)",
    ),
    "lses of another shape": (
        [torch.ones(2, 3)],
        [torch.ones(2, 1)],
        ValueError,
        r"lses\[0\] must have shape \(2,\), got \(2, 1\)",
    ),
    "dtypes that differ": (
        [torch.ones(2, 3), torch.ones(2, 3).half()],
        [torch.ones(2)] * 2,
        TypeError,
        "outputs must share one floating-point dtype",
    ),
    "devices that differ": (
        [torch.ones(2, 3), torch.ones(2, 3, device="meta")],
        [torch.ones(2)] * 2,
        ValueError,
        "outputs must share one device, got cpu and meta",
    ),
    "integers": ([torch.ones(2, 3).int()], [torch.ones(2)], TypeError, "outputs must share one floating-point dtype"),
    "numbers": ([torch.tensor(1.0)], [torch.tensor(1.0)], ValueError, r"outputs must have shape \[\.\.\., D\]"),
    "no tensor": ([torch.ones(2, 3)], [1.0], TypeError, r"lses\[0\] must be a torch.Tensor, got float"),
    "an output that is no tensor": (
        [1.0],
        [torch.ones(2)],
        TypeError,
        r"outputs\[0\] must be a torch.Tensor, got float",
    ),
}


@pytest.mark.parametrize("name", MERGE_ERRORS)
def test_bad_input_of_merge_attentions_raises(name: str):
    outputs, lses, error, message = MERGE_ERRORS[name]
    with pytest.raises(error, match=message):
        natten2.merge_attentions(outputs, lses)
