"""The Triton kernels without a GPU: interpreted, against the oracle, and compiled for GPUs that are not here."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from problems import Problem, golden_cases, packed, problems, random_problem, with_layout
from test_kernels import REFERENCE, check_golden, run
from torch import Tensor
from torch.utils._pytree import tree_leaves

pytest.importorskip("triton")

from benchmarks.triton_build import BUILD_CASES, TARGETS
from natten2.ops import cuda
from natten2.ops.triton import launch, tiles
from natten2.ops.triton.tiles import choose_tiling, span
from natten2.window import key_bounds

KERNELS = (launch.na_forward, launch.na_backward)
SOME = range(0, len(golden_cases()), 7)
# The interpreter multiplies bfloat16 wrongly, so that only a GPU can run it.
DTYPES = (torch.float32, torch.float16)
ROOT = Path(__file__).parent.parent


@pytest.fixture(autouse=True)
def _few_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    # The interpreter takes some milliseconds for each program.
    monkeypatch.setattr(tiles, "_PROGRAMS", 8)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("index", SOME)
def test_golden(index: int, dtype: torch.dtype):
    check_golden(golden_cases()[index], dtype, KERNELS)


@pytest.mark.long
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("index", [index for index in range(len(golden_cases())) if index not in SOME])
def test_golden_all(index: int, dtype: torch.dtype):
    check_golden(golden_cases()[index], dtype, KERNELS)


def check_reference(problem: Problem, *, equal_nan: bool = False) -> None:
    results, grads = run(problem.to(torch.float32), KERNELS)
    expected, expected_grads = run(problem, REFERENCE)
    for result, wanted in zip((*results, *grads), (*expected, *expected_grads), strict=True):
        assert result.shape == wanted.shape
        if equal_nan:
            torch.testing.assert_close(result, wanted, rtol=1e-4, atol=1e-5, equal_nan=True)
        else:
            error = torch.linalg.vector_norm(result.double() - wanted)
            assert error <= 1e-5 * max(1.0, torch.linalg.vector_norm(wanted).item())


@settings(max_examples=3)
@given(problems(max_tokens=40, min_batch=0))
def test_kernels_are_the_reference(problem: Problem):
    check_reference(problem)


@pytest.mark.long
@settings(max_examples=25)
@given(problems(max_tokens=60, min_batch=0))
def test_more_kernels_are_the_reference(problem: Problem):
    check_reference(problem)


@pytest.mark.parametrize(
    "problem",
    [
        random_problem((40, 36), (33, 30), batch=1, heads=1, bias=True),
        random_problem((300,), (150,), batch=1, stride=(8,), additional=70),
        random_problem((300,), (150,), batch=1, heads=1, is_causal=(True,), dilation=(2,)),
        pytest.param(
            random_problem((7, 10, 18), (6, 9, 17), batch=1, heads=1, is_causal=(True, False, False)),
            marks=pytest.mark.long,
        ),
    ],
    ids=["image", "stride", "causal", "volume"],
)
def test_windows_of_many_boxes(problem: Problem):
    check_reference(problem)


@pytest.mark.parametrize("head_dim", [1, 3, 17, 64, 129, 256])
def test_every_head_dim(head_dim: int):
    problem = random_problem((5, 6), (3, 4), batch=1, head_dim=head_dim, value_dim=max(1, head_dim - 1), additional=2)
    check_reference(with_layout(problem, packed))


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("programs", [1, 128])
def test_parts_of_a_tile_are_the_whole(monkeypatch: pytest.MonkeyPatch, programs: int, is_causal: bool):
    # With 128 programs a tile's keys go into parts, of which a causal query sees no key in some.
    monkeypatch.setattr(tiles, "_PROGRAMS", programs)
    monkeypatch.setattr(tiles, "_PART_STEPS", 1)
    check_reference(random_problem((150,), (140,), batch=1, heads=2, key_heads=1, is_causal=(is_causal,), additional=5))


@pytest.mark.parametrize("number", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("poisoned", ["query", "key", "value", "grad_output", "additional"])
def test_what_is_not_finite_reaches_only_those_who_see_it(poisoned: str, number: float):
    problem = random_problem((24,), (7,), batch=1, heads=1, bias=True, additional=1, dtype=torch.float32)
    query, key, value, _, _, additional = problem.tensors
    tensors = {"query": query, "key": key, "value": value, "grad_output": problem.grad_output, "additional": additional}
    tensors[poisoned][0, 0, 0, 1] = number
    check_reference(problem, equal_nan=True)


def test_parts_keep_what_is_not_finite(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(tiles, "_PROGRAMS", 128)
    monkeypatch.setattr(tiles, "_PART_STEPS", 1)
    problem = random_problem((150,), (40,), batch=1, heads=1, dtype=torch.float32)
    for position, number in ((3, torch.nan), (70, torch.inf), (149, -torch.inf)):
        problem.tensors[2][0, position, 0, 1] = number
    check_reference(problem, equal_nan=True)


def test_64_bit_offsets(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(launch, "_MAX_INT32", 0)
    check_reference(random_problem((9, 7), (3, 5), dilation=(2, 1), bias=True, additional=3))


@settings(max_examples=200)
@given(problems(max_tokens=200, min_batch=1))
def test_a_span_bounds_the_keys_of_a_tile(problem: Problem):
    axes = zip(problem.spatial, problem.kernel_size, problem.stride, problem.is_causal, strict=True)
    for length, kernel_size, stride, is_causal in axes:
        for tile in (1, 2, 4, 8):
            for first in range(0, length, tile):
                last = min(first + tile, length) - 1
                begin, _ = key_bounds(first, length, kernel_size, stride, is_causal)
                _, end = key_bounds(last, length, kernel_size, stride, is_causal)
                assert end - begin <= span(tile, kernel_size, stride, is_causal)


def test_the_tiling_of_an_image_is_not_a_row():
    tiling = choose_tiling((7, 7), (1, 1), (False, False), 64)
    assert tiling.tile == (8, 8)
    assert tiling.box == (14, 14)


@pytest.mark.parametrize("programs", [8, 128])
def test_packed_is_unpacked(monkeypatch: pytest.MonkeyPatch, programs: int):
    # With 128 programs a tile's keys go into parts, whose sums are then written into the packed gradient.
    monkeypatch.setattr(tiles, "_PROGRAMS", programs)
    monkeypatch.setattr(tiles, "_PART_STEPS", 1)
    problem = random_problem((40,), (30,), batch=2, is_causal=(True,), head_dim=8, bias=True, dtype=torch.float32)
    qkv, rpb = torch.stack(problem.tensors[:3], -3), problem.tensors[3]
    (output, logsumexp), (*grads, grad_rpb, _, _) = run(problem, KERNELS)
    results = launch.na_qkv_forward(qkv, rpb, *problem.parameters)
    torch.testing.assert_close(results, (output, logsumexp))
    upstream = (problem.grad_output, problem.grad_logsumexp)
    packed_grads = launch.na_qkv_backward(*upstream, qkv, rpb, *results, *problem.parameters)
    torch.testing.assert_close(packed_grads, (torch.stack(grads, -3), grad_rpb))


def test_packed_tensors_are_read_and_written_in_place(monkeypatch: pytest.MonkeyPatch):
    reached: set[int] = set()

    class Launch:
        def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
            return lambda *args, **_: reached.update(x.data_ptr() for x in tree_leaves(args) if isinstance(x, Tensor))

    for name in ("forward_kernel", "delta_kernel", "grad_query_kernel", "grad_key_value_kernel"):
        monkeypatch.setattr(launch, name, Launch())
    problem = random_problem((9, 7), (3, 3), dtype=torch.float32)
    qkv = torch.stack(problem.tensors[:3], -3)
    output, logsumexp = launch.na_qkv_forward(qkv, None, *problem.parameters)
    assert {x.data_ptr() for x in (*qkv.unbind(-3), output, logsumexp)} == reached
    reached.clear()
    upstream = (problem.grad_output, problem.grad_logsumexp)
    grad_qkv, _ = launch.na_qkv_backward(*upstream, qkv, None, output, logsumexp, *problem.parameters)
    known = {x.data_ptr() for x in (*qkv.unbind(-3), *grad_qkv.unbind(-3), *upstream, output, logsumexp)}
    # Nothing else but delta.
    assert known < reached
    assert len(reached - known) == 1


def test_results_do_not_depend_on_the_batch():
    # Every number has one owner, whose work is the same for any number of programs.
    problem = random_problem((9, 9), (5, 5), batch=2, dtype=torch.float32)
    both, _ = run(problem, KERNELS)
    alone = launch.na_forward(*(None if x is None else x[1:] for x in problem.tensors), *problem.parameters)
    assert torch.equal(both[0][1:], alone[0])


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ((torch.float64, 32, 32, (9, 0)), "query must have dtype torch.float32 or .* got torch.float64"),
        ((torch.float32, 257, 32, (9, 0)), "head_dim must be at most 256 .* got 257"),
        ((torch.float16, 32, 300, (9, 0)), "head_dim must be at most 256 .* got 300"),
        ((torch.float16, 32, 32, (7, 5)), "compute capability 8.0 or later, got 7.5"),
    ],
)
def test_what_the_kernels_cannot_do_has_a_reason(arguments: tuple, reason: str):
    assert cuda.unusable_triton(torch.float16, 32, 32, (8, 0)) is None
    assert re.search(reason, cuda.unusable_triton(*arguments))


@pytest.mark.parametrize("key", ["CUDA", "XPU"])
@pytest.mark.parametrize("operator", ["na_forward", "na_backward"])
def test_gpus_have_kernels(operator: str, key: str):
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"natten2::{operator}", key)


PROGRAM = """
import torch
from benchmarks import triton_build
from natten2.ops.triton import forward, launch

triton_build.use_target(triton_build.TARGETS["sm_90"])
for batch, height, width in ((1, 56, 56), (3, 57, 64), (16, 7, 113), (2, 16, 16)):
    query = torch.empty(batch, height, width, 4, 32, dtype=torch.float16, device="meta")
    for dilation in (1, 2, 1):
        gaps = (dilation if height > 7 else 1, dilation)
        launch.na_forward(query, query, query, None, None, None, (7, 7), (1, 1), gaps, (False, False), 1.0)
print(len(forward.forward_kernel.device_caches[0][0]))
"""


def compiling(*command: str) -> subprocess.CompletedProcess:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    result = subprocess.run(
        [sys.executable, *command], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    return result


def test_a_new_size_or_dilation_compiles_nothing():
    assert compiling("-c", PROGRAM).stdout.strip() == "1"


EVERYTHING = """
import sys

import torch
from benchmarks import triton_build
from natten2.ops.triton import launch

sys.path.insert(0, "tests")
from problems import random_problem

triton_build.use_target(triton_build.TARGETS["sm_90"])
some = dict(heads=4, key_heads=2, head_dim=12, value_dim=20, bias=True, additional=3, dtype=torch.float16)
for problem in (
    random_problem((9, 10), (3, 4), stride=(2, 1), dilation=(1, 2), is_causal=(False, True), **some),
    random_problem((60,), (50,), stride=(50,), **some),
):
    tensors = [x.to("meta") for x in problem.tensors]
    output, logsumexp = launch.na_forward(*tensors, *problem.parameters)
    upstream = [problem.grad_output.to("meta"), problem.grad_logsumexp.to("meta")]
    grads = launch.na_backward(*upstream, *tensors, output, logsumexp, *problem.parameters)
    assert [grad.shape for grad in grads] == [x.shape for x in tensors]
"""


def test_everything_compiles():
    # The interpreter accepts types that change in a loop, and much else that the compiler doesn't.
    compiling("-c", EVERYTHING)


def check_builds(path: Path, *options: str) -> None:
    compiling("-m", "benchmarks", "triton", "--json", str(path), *options)
    builds = json.loads(path.read_text())["builds"]
    assert {build["kernel"] for build in builds} >= {"forward_kernel", "grad_query_kernel", "grad_key_value_kernel"}
    for build in builds:
        name = f"{build['target']} {build['case']} {build['kernel']}"
        assert build["shared_memory"] <= TARGETS[build["target"]].shared_memory, name
        # Tiles of 256 channels are too small for the newest matrix instructions, and fill the registers.
        is_widest = build["case"].startswith("widest")
        assert build["matrix_instructions"] > 0 or build["kernel"] == "delta_kernel" or is_widest, name
        if build["target"] == "sm_90" and not is_widest:
            assert build["loop_spills"] == 0, name
        if build["target"] == "sm_90" and build["case"] in ("nat", "hdit", "volume"):
            assert build["spills"] == 0, name


def test_builds_for_hopper(tmp_path: Path):
    # Rows of 256 channels take long to compile.
    cases = [case.name for case in BUILD_CASES if not case.name.startswith("widest")]
    check_builds(tmp_path / "builds.json", "--target", "sm_90", "--case", *cases)


def test_builds_for_other_gpus(tmp_path: Path):
    others = [target for target in TARGETS if target != "sm_90"]
    check_builds(tmp_path / "builds.json", "--case", "nat", "--target", *others)


@pytest.mark.long
def test_all_builds(tmp_path: Path):
    check_builds(tmp_path / "builds.json")
