"""The CUDA C++ kernels against the reference: on a GPU where there is one, and else emulated thread by thread.

The emulation runs the kernels' own sources, bindings included. What it can't show is what a GPU alone does: how fast
they are, and races between a warp's lanes that its order of execution hides.
"""

from __future__ import annotations

import re
from dataclasses import replace

import emulated
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import LAYOUTS, Problem, golden_cases, packed, random_problem, relative_error, with_layout
from test_kernels import REFERENCE, check_golden, run
from torch import Tensor

from natten2 import _extension
from natten2.ops import cuda, cuda_kernels

pytestmark = pytest.mark.skipif(
    not emulated.USES_GPU and emulated.compiler() is None, reason="needs a GPU, or a C++ compiler to emulate one"
)

KERNELS = (emulated.na_forward, emulated.na_backward)
RUNS = ((torch.float32, KERNELS), (torch.float64, REFERENCE))
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SOME = range(0, len(golden_cases()), 7)
BOUNDS = {torch.float32: 3e-6, torch.bfloat16: 0.02, torch.float16: 0.003}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("index", SOME)
def test_golden(index: int, dtype: torch.dtype):
    check_golden(golden_cases()[index], dtype, KERNELS)


@pytest.mark.long
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("index", [index for index in range(len(golden_cases())) if index not in SOME])
def test_golden_all(index: int, dtype: torch.dtype):
    check_golden(golden_cases()[index], dtype, KERNELS)


def check_reference(problem: Problem, dtype: torch.dtype) -> None:
    """Compares results with the float64 ones for the numbers that the problem holds in its dtype."""
    problem = problem.to(dtype)
    results, grads = run(problem, KERNELS)
    expected, expected_grads = run(problem.to(torch.float64), REFERENCE)
    for result, wanted in zip((*results, *grads), (*expected, *expected_grads), strict=True):
        assert result.shape == wanted.shape
        # Where gradients cancel, their errors are those of the terms.
        size = max(torch.linalg.vector_norm(wanted).item(), 0.1 * wanted.numel() ** 0.5)
        assert torch.linalg.vector_norm(result.double() - wanted) <= 2 * BOUNDS[dtype] * size


@st.composite
def tiled_problems(draw: st.DrawFn) -> Problem:
    """Problems of more than one tile, with every parameter that the kernels know."""
    rank = draw(st.integers(1, 3))
    longest = {1: (150,), 2: (19, 23), 3: (5, 7, 9)}[rank]
    spatial, kernel_size, stride, dilation = [], [], [], []
    for axis in range(rank):
        spatial.append(draw(st.integers(1, longest[axis])))
        kernel_size.append(draw(st.integers(1, min(spatial[-1], 9))))
        dilation.append(draw(st.sampled_from([1, draw(st.integers(1, spatial[-1] // kernel_size[-1]))])))
        stride.append(draw(st.sampled_from([1, draw(st.integers(1, kernel_size[-1]))])))
    key_heads = draw(st.integers(1, 2))
    problem = random_problem(
        tuple(spatial),
        tuple(kernel_size),
        stride=tuple(stride),
        dilation=tuple(dilation),
        is_causal=tuple(draw(st.lists(st.booleans(), min_size=rank, max_size=rank))),
        batch=draw(st.integers(1, 2)),
        heads=key_heads * draw(st.integers(1, 3)),
        key_heads=key_heads,
        head_dim=draw(st.sampled_from([8, 16, 24, 32, 40])),
        value_dim=draw(st.sampled_from([8, 16, 32, 48])),
        additional=draw(st.sampled_from([0, 0, 1, 5, 70])),
        bias=draw(st.booleans()),
        scale=draw(st.sampled_from([None, 0.0, 1.0, -0.7])),
        seed=draw(st.integers(0, 2**31)),
    )
    return with_layout(problem, draw(st.sampled_from(LAYOUTS)))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@settings(max_examples=10)
@given(tiled_problems())
def test_kernels_are_the_reference(dtype: torch.dtype, problem: Problem):
    check_reference(problem, dtype)


@pytest.mark.long
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@settings(max_examples=300)
@given(tiled_problems())
def test_kernels_are_the_reference_often(dtype: torch.dtype, problem: Problem):
    check_reference(problem, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", [8, 24, 32, 40, 64, 72, 128, 256])
def test_every_head_dim(head_dim: int, dtype: torch.dtype):
    if head_dim * dtype.itemsize > 512:
        pytest.skip("float32 goes to Triton from 136 channels on")
    some = {"batch": 1, "heads": 2, "key_heads": 1, "bias": True, "additional": 2}
    check_reference(random_problem((7, 9), (3, 4), head_dim=head_dim, value_dim=max(8, head_dim - 16), **some), dtype)


@pytest.mark.parametrize(
    "problem",
    [
        random_problem((14, 12), (11, 9), batch=1, heads=1, head_dim=128, bias=True),
        random_problem((180,), (150,), batch=1, heads=1, head_dim=128, stride=(8,), additional=70),
        random_problem((11, 7), (9, 5), batch=1, heads=2, key_heads=1, head_dim=128, bias=True),
        random_problem((3, 9, 8), (3, 7, 7), batch=1, heads=1, head_dim=128, is_causal=(True, False, False)),
    ],
    ids=["image", "sequence", "shared keys", "volume"],
)
def test_windows_of_many_chunks(problem: Problem):
    check_reference(problem, torch.float16)


def test_a_bias_as_large_as_the_rule_allows():
    # With rows of 512 bytes, the least memory is left to it.
    problem = random_problem((14, 15), (14, 15), batch=1, heads=1, head_dim=128, bias=True)
    assert 0.97 * cuda_kernels._MAX_OFFSETS_OF_WIDE_ROWS < 27 * 29
    check_reference(problem, torch.float32)


@pytest.mark.skipif(emulated.compiler() is None, reason="needs a C++ compiler")
def test_every_plan_fits_where_the_rule_says_so():
    limits = cuda_kernels._MAX_OFFSETS, cuda_kernels._MAX_OFFSETS_OF_WIDE_ROWS
    assert emulated.library().natten2_wrong_plans(30000, *limits) == 0
    assert emulated.library().natten2_wrong_plans(30000, limits[0], limits[0]) > 0


@pytest.mark.parametrize("number", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("poisoned", ["query", "key", "value", "grad_output", "additional"])
def test_what_is_not_finite_reaches_only_those_who_see_it(poisoned: str, number: float):
    problem = random_problem((24,), (7,), batch=1, heads=1, head_dim=8, bias=True, additional=1, dtype=torch.float32)
    query, key, value, _, _, additional = problem.tensors
    tensors = {"query": query, "key": key, "value": value, "grad_output": problem.grad_output, "additional": additional}
    tensors[poisoned][0, 0, 0, 1] = number
    results, expected = (flat(run(problem.to(dtype), kernels)) for dtype, kernels in RUNS)
    for result, wanted in zip(results[:-2], expected[:-2], strict=True):
        torch.testing.assert_close(result.double(), wanted, rtol=1e-4, atol=1e-5, equal_nan=True)
    # Additional keys see everything, so that theirs is infinite or NaN where it is expected to be either.
    for result, wanted in zip(results[-2:], expected[-2:], strict=True):
        assert torch.equal(result.isfinite(), wanted.isfinite())
        torch.testing.assert_close(
            result.nan_to_num(0, 0, 0).double(), wanted.nan_to_num(0, 0, 0), rtol=1e-4, atol=1e-5
        )


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("head_dim", [16, 136])
def test_what_is_hidden_changes_no_bit(head_dim: int, is_causal: bool):
    options = {"batch": 1, "heads": 1, "head_dim": head_dim, "bias": True, "dtype": torch.float16}
    problem = random_problem((12, 5), (5, 3), is_causal=(is_causal,) * 2, **options)
    clean = flat(run(problem, KERNELS))
    tensors = [None if tensor is None else tensor.clone() for tensor in problem.tensors]
    grad_output = problem.grad_output.clone()
    for tensor in (*tensors[:3], grad_output):
        tensor[0, 0, 0, 0, 1] = torch.nan
    results = flat(run(replace(problem, tensors=tuple(tensors), grad_output=grad_output), KERNELS))
    # Tokens see the bad one, or one that sees it, within twice the window.
    for result, wanted in zip(results[:5], clean[:5], strict=True):
        assert torch.equal(result[:, 10:], wanted[:, 10:])
        assert not result[0, 0, 0].isfinite().all()


def flat(results: tuple[tuple[Tensor, ...], tuple[Tensor, ...]]) -> list[Tensor]:
    return [tensor for group in results for tensor in group]


EVERYTHING = random_problem(
    (9, 10, 11),
    (3, 4, 5),
    stride=(1, 2, 1),
    dilation=(2, 1, 2),
    is_causal=(False, True, False),
    batch=1,
    heads=2,
    key_heads=1,
    head_dim=16,
    additional=3,
    bias=True,
)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_order_of_threads_changes_no_bit(dtype: torch.dtype):
    problem = EVERYTHING.to(dtype)
    first = flat(run(problem, KERNELS))
    if emulated.USES_GPU:
        pytest.skip("a GPU has an order of its own")
    with emulated.reversed_order():
        other = flat(run(problem, KERNELS))
    assert all(map(torch.equal, first, other))


def test_results_do_not_depend_on_the_batch():
    problem = random_problem((9, 9), (5, 5), batch=2, head_dim=8, dtype=torch.float32)
    both, _ = run(problem, KERNELS)
    alone = emulated.na_forward(*(None if x is None else x[1:] for x in problem.tensors), *problem.parameters)
    assert torch.equal(both[0][1:], alone[0])


def test_parts_of_sums_are_the_whole(monkeypatch: pytest.MonkeyPatch):
    # With one block, all tiles of a head share one table of the bias's gradient.
    monkeypatch.setattr(cuda_kernels, "_BLOCKS", 1)
    check_reference(EVERYTHING, torch.float32)


def test_packed_is_unpacked():
    problem = random_problem((9, 7), (3, 5), batch=2, head_dim=8, bias=True, dtype=torch.float16)
    qkv, rpb = torch.stack(problem.tensors[:3], -3), problem.tensors[3]
    (output, logsumexp), (*grads, grad_rpb, _, _) = run(problem, KERNELS)
    results = emulated.run(cuda_kernels.na_qkv_forward, qkv, rpb, *problem.parameters)
    assert all(map(torch.equal, results, (output, logsumexp)))
    upstream = (problem.grad_output, problem.grad_logsumexp)
    packed_grads = emulated.run(cuda_kernels.na_qkv_backward, *upstream, qkv, rpb, *results, *problem.parameters)
    assert all(map(torch.equal, packed_grads, (torch.stack(grads, -3), grad_rpb)))


def test_nothing_beside_a_tensor_is_touched():
    problem = with_layout(random_problem((11, 9), (4, 3), head_dim=24, batch=2, dtype=torch.float16), surrounded)
    check_reference(problem, torch.float16)


def surrounded(tensor: Tensor) -> Tensor:
    """The same values as a view of a tensor that is NaN elsewhere."""
    whole = tensor.new_full([*(size + 2 for size in tensor.shape[:-1]), tensor.shape[-1] + 16], torch.nan)
    inside = whole[(*(slice(1, size + 1) for size in tensor.shape[:-1]), slice(8, 8 + tensor.shape[-1]))]
    return inside.copy_(tensor)


def test_upstream_gradients_are_read_as_autograd_made_them():
    problem = random_problem((12,), (5,), head_dim=8, dtype=torch.float32)
    output, logsumexp = emulated.na_forward(*problem.tensors, *problem.parameters)
    saved = (None, *problem.tensors, output, logsumexp, *problem.parameters)
    ones = torch.ones(()).expand(problem.grad_output.shape)
    results, expected = (emulated.run(cuda_kernels.na_backward, grad, *saved) for grad in (ones, ones.clone()))
    assert all(map(torch.equal, results, expected))


def test_an_empty_batch_and_no_additional_keys():
    problem = random_problem((6,), (3,), head_dim=8, batch=2, bias=True, additional=1, dtype=torch.float32)
    for tensors in (
        [None if x is None else x if x is problem.tensors[3] else x[:0] for x in problem.tensors],
        [*problem.tensors[:4], *(x[:, :0] for x in problem.tensors[4:])],
    ):
        batch = tensors[0].shape[0]
        output, logsumexp = emulated.run(cuda_kernels.na_forward, *tensors, *problem.parameters)
        upstream = (problem.grad_output[:batch], problem.grad_logsumexp[:batch])
        grads = emulated.run(cuda_kernels.na_backward, *upstream, *tensors, output, logsumexp, *problem.parameters)
        assert [grad.shape for grad in grads] == [x.shape for x in tensors]
        expected = REFERENCE[0](*tensors, *problem.parameters)
        torch.testing.assert_close((output, logsumexp), expected)


def test_float32_products_are_as_exact_as_the_setting_asks():
    problem = random_problem((8, 8), (5, 5), head_dim=64, batch=1, heads=1, dtype=torch.float32)
    expected, expected_grads = run(problem.to(torch.float64), REFERENCE)

    def errors() -> list[float]:
        results, grads = run(problem, KERNELS)
        pairs = zip((results[0], *grads[:3]), (expected[0], *expected_grads[:3]), strict=True)
        return [relative_error(*pair) for pair in pairs]

    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("highest")
        assert max(errors()) <= 1e-6
        torch.set_float32_matmul_precision("high")
        assert all(3e-5 < one < 5e-3 for one in errors())
    finally:
        torch.set_float32_matmul_precision(before)


# The rule.


def usable(**change: object) -> str | None:
    arguments = {
        "dtype": torch.bfloat16,
        "head_dim": 32,
        "value_dim": 32,
        "spatial": (56, 56),
        "batch": 1,
        "kernel_size": (7, 7),
        "has_bias": True,
        "capability": (9, 0),
    }
    return cuda_kernels.unusable(**{**arguments, **change})


@pytest.fixture
def _built(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_extension, "cuda_library_path", lambda: "_cuda.so")


@pytest.mark.usefixtures("_built")
@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"dtype": torch.float64}, "query must have dtype torch.float32 or .* got torch.float64"),
        ({"head_dim": 20}, "head_dim must be a multiple of 8 up to 256, got 20"),
        ({"value_dim": 264}, "value_dim must be a multiple of 8 up to 256, got 264"),
        ({"dtype": torch.float32, "head_dim": 136}, "head_dim must be a multiple of 8 up to 128, got 136"),
        ({"kernel_size": (32, 32)}, "the window must have fewer than 1024 keys, got 1024"),
        ({"kernel_size": (31, 31)}, "the bias must have at most 2048 offsets, got 3721"),
        ({"kernel_size": (15, 15), "head_dim": 256}, "the bias must have at most 800 offsets, got 841"),
        ({"batch": 2**17}, "there must be fewer than 2.28 tokens, got 411041792"),
        ({"capability": (7, 5)}, "compute capability 8.0 or later"),
        ({"capability": None}, "the GPU must be NVIDIA's"),
    ],
)
def test_what_the_kernels_cannot_do_has_a_reason(change: dict, reason: str):
    assert usable() is None
    assert re.search(reason, usable(**change))


def test_a_build_without_nvcc_has_none(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(_extension, "cuda_library_path", lambda: None)
    assert usable() == "natten2 was built without nvcc"


def test_they_are_off_until_they_are_asked_for(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("NATTEN2_CUDA_KERNELS", raising=False)
    assert not cuda_kernels.wants_kernels()
    monkeypatch.setenv("NATTEN2_CUDA_KERNELS", "1")
    assert cuda_kernels.wants_kernels()


def test_rows_that_16_bytes_do_not_divide_have_a_reason():
    tensor = torch.zeros(2, 5, 3, 16, dtype=torch.float16)
    assert cuda_kernels.unusable_tensors(tensor, packed(tensor), None) is None
    assert cuda_kernels.unusable_tensors(tensor[..., :1, :8]) is None
    for bad in (tensor[..., 4:12], tensor.new_zeros(2, 5, 3, 20)[..., :16], tensor.transpose(-1, -2)):
        assert "every row must begin at a multiple of 16 bytes" in cuda_kernels.unusable_tensors(bad)
    far = torch.empty(2, 2**33, 1, 8, dtype=torch.float16, device="meta")
    assert "an axis must reach less than 2^34 bytes" in cuda_kernels.unusable_tensors(far)
    assert cuda_kernels.unusable_tensors(far[:, : 2**29]) is None


@pytest.mark.usefixtures("_built")
@pytest.mark.parametrize("is_aligned", [True, False])
@pytest.mark.parametrize("operator", ["na_forward", "na_backward", "na_qkv_forward", "na_qkv_backward"])
def test_the_rule_reads_each_operators_own_arguments(operator: str, is_aligned: bool, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(cuda, "compute_capability", lambda device: (9, 0))
    problem = random_problem((9, 8), (5, 3), head_dim=8, bias=True, additional=2, dtype=torch.float16)

    def shift(tensor: Tensor) -> Tensor:
        return tensor if is_aligned else torch.cat((tensor, tensor), -1)[..., 4:12]

    query, key, value = map(shift, problem.tensors[:3])
    qkv = shift(torch.stack(problem.tensors[:3], -3))
    output, logsumexp = problem.grad_output, problem.grad_logsumexp
    upstream, rest = (output, logsumexp), problem.tensors[3:]
    arguments = {
        "na_forward": (query, key, value, *rest),
        "na_backward": (*upstream, query, key, value, *rest, output, logsumexp),
        "na_qkv_forward": (qkv, problem.tensors[3]),
        "na_qkv_backward": (*upstream, qkv, problem.tensors[3], output, logsumexp),
    }[operator]
    reason = cuda.UNUSABLE_CPP[operator](*arguments, *problem.parameters)
    assert (reason is None) == is_aligned
    too_large = ((32, 33), *problem.parameters[1:])
    assert "got 1056" in cuda.UNUSABLE_CPP[operator](*arguments, *too_large)
