"""`python -m natten2 explain`: its numbers against counting, its rule, and its errors."""

from __future__ import annotations

import re
import sys
from itertools import product
from math import prod

import pytest
import torch
from hypothesis import given, settings
from problems import Problem, problems

from natten2 import _extension
from natten2.__main__ import main
from natten2.ops import cuda, cuda_kernels
from natten2.ops.costs import Call
from natten2.ops.triton.tiles import Tiling, choose_tiling, count_tiles
from natten2.ops.triton.waste import computed_pairs
from natten2.window import neighbors

Capture = pytest.CaptureFixture[str]
Patch = pytest.MonkeyPatch


def axes_of(problem: Problem) -> tuple[tuple, ...]:
    return problem.spatial, problem.kernel_size, problem.stride, problem.dilation, problem.is_causal


def call_of(problem: Problem) -> Call:
    query, key, value = problem.tensors[:3]
    heads = (query.shape[-2], key.shape[-2], query.shape[-1], value.shape[-1])
    return Call(query.shape[0], problem.spatial, *heads, *problem.parameters[:-1])


@settings(max_examples=60)
@given(problems(max_tokens=100))
def test_pairs_are_those_that_are_seen(problem: Problem):
    call = call_of(problem)
    assert call.window_pairs == prod(
        sum(len(neighbors(index, *axis)) for index in range(axis[0])) for axis in zip(*axes_of(problem), strict=True)
    )


def test_a_causal_window_counts_the_keys_that_are_there():
    # Queries 0, 1, and 2 see 1, 2, and 3 keys, and all others 3; dilation makes two sequences of five.
    assert Call(1, (10,), 1, 1, 4, 4, (3,), (1,), (1,), (True,)).window_pairs == 1 + 2 + 3 * 8
    dilated = Call(1, (10, 7), 1, 1, 4, 4, (3, 4), (1, 1), (2, 1), (True, False))
    assert dilated.window_pairs == 7 * 4 * 2 * (1 + 2 + 3 * 3)


def span(tokens: range, axis: tuple, owns_keys: bool) -> int:
    """Positions from the first to the last partner of some tokens of one dilation group, by looking at every pair."""
    length, _, _, dilation, _ = axis
    if owns_keys:
        partners = [index for index in range(length) if set(neighbors(index, *axis)) & set(tokens)]
    else:
        partners = [key for token in tokens for key in neighbors(token, *axis)]
    return (max(partners) - min(partners)) // dilation + 1


def count_by_hand(tiling: Tiling, problem: Problem, owns_keys: bool) -> tuple[int, int]:
    """Pairs that are computed, and tiles that are not empty, tile by tile and box by box."""
    axes = list(zip(*axes_of(problem), strict=True))
    tiles = [
        [
            range(group + first * dilation, length, dilation)[:side]
            for group in range(dilation)
            for first in range(0, len(range(group, length, dilation)), side)
        ]
        for (length, _, _, dilation, _), side in zip(axes, tiling.tile, strict=True)
    ]
    steps = -(-prod(tiling.box) // tiling.block)
    total = 0
    for tile in product(*tiles):
        boxes = 1
        for tokens, axis, side in zip(tile, axes, tiling.box, strict=True):
            boxes *= -(-span(tokens, axis, owns_keys) // side)
        total += boxes * steps * tiling.block * prod(tiling.tile)
    return total, prod(map(len, tiles))


def tiling_of(tile: tuple[int, ...], box: tuple[int, ...], block: int) -> Tiling:
    return Tiling(tile, box, box, block, steps=1, warps=4, stages=2)


@settings(max_examples=40)
@given(problems(max_tokens=60))
@pytest.mark.parametrize("owns_keys", [False, True])
def test_waste_is_what_counting_gives(owns_keys: bool, problem: Problem):
    rank = len(problem.spatial)
    chosen = choose_tiling(problem.kernel_size, problem.stride, problem.is_causal, 64, is_backward=owns_keys)
    for tiling in (chosen, tiling_of((2, 4, 2)[-rank:], (1, 4, 8)[-rank:], 16)):
        pairs, tiles = count_by_hand(tiling, problem, owns_keys)
        assert computed_pairs(tiling, *axes_of(problem), owns_keys=owns_keys) == pairs
        assert pairs >= call_of(problem).window_pairs
        assert tiles <= count_tiles(problem.spatial, problem.dilation, tiling.tile)


def test_a_window_much_longer_than_the_tile_wastes_little():
    tiling, axes = tiling_of((128,), (128,), 128), ((32768,), (2048,), (1,), (1,), (False,))
    assert computed_pairs(tiling, *axes) / (32768 * 2048) == pytest.approx(1.06, abs=0.01)


def explained(capsys: Capture, arguments: str) -> str:
    main(["explain", *arguments.split()])
    captured = capsys.readouterr()
    assert captured.err == ""
    return captured.out


NAT = "--shape 128 56 56 2 32 --kernel-size 7"


def test_what_a_gpu_runs(capsys: Capture):
    output = explained(capsys, f"--device cuda --capability 9.0 {NAT} --dilation 8 4 --bias --additional-keys 3")
    assert output.startswith(
        "shape 128 x 56 x 56 x 2 x 32, kernel_size 7, stride 1, dilation 8 x 4\n"
        "cuda, compute capability 9.0: bfloat16, bias, 3 additional keys\n"
        f"runs Triton kernels\nthe rule: {cuda.RULE}\n"
        "not CUDA C++ kernels: NATTEN2_CUDA_KERNELS is not 1\n"
        f"the rule of CUDA C++ kernels: {cuda_kernels.RULE}\n\n"
    )
    pairs = 128 * 2 * 56 * 56 * (49 + 3)
    assert f"forward: 401408 tokens, {4 * pairs * 32 / 1e9:.4g} GFLOP, at least " in output
    assert f"backward: 401408 tokens, {10 * pairs * 32 / 1e9:.4g} GFLOP, at least " in output
    kernels = {line.split()[0]: re.split(r"  +", line.strip())[1:] for line in output.splitlines() if "_kernel" in line}
    assert list(kernels) == [
        "forward_kernel",
        "grad_query_kernel",
        "grad_key_value_kernel",
        "grad_bias_kernel",
        "grad_additional_kernel",
    ]
    tiling = choose_tiling((7, 7), (1, 1), (False, False), 64)
    pairs = computed_pairs(tiling, (56, 56), (7, 7), (1, 1), (8, 4), (False, False))
    assert kernels["forward_kernel"] == [
        f"{tiling.tile[0]} x {tiling.tile[1]} queries",
        f"{tiling.box[0]} x {tiling.box[1]} keys",
        str(tiling.block),
        str(128 * 2 * count_tiles((56, 56), (8, 4), tiling.tile)),
        f"{pairs / (56 * 56 * 49):.2f}",
    ]
    assert kernels["grad_key_value_kernel"][0].endswith(" keys")
    assert kernels["grad_key_value_kernel"][1].endswith(" queries")


def test_programs_of_keys_are_for_heads_of_keys(capsys: Capture):
    output = explained(capsys, f"--device cuda --capability 8.0 {NAT} --key-heads 1 --value-dim 16 --causal")
    assert "causal\ncuda, compute capability 8.0: bfloat16, 1 key heads, value_dim 16\n" in output
    programs = [int(line.split()[-2]) for line in output.splitlines() if "_kernel " in line]
    assert programs[1] == 2 * programs[2]


def test_few_tiles_are_cut_into_parts(capsys: Capture):
    output = explained(capsys, "--device cuda --capability 9.0 --shape 1 32768 1 128 --kernel-size 2048")
    (forward,) = (line for line in output.splitlines() if "forward_kernel" in line)
    assert int(forward.split()[-2]) > 32768 // choose_tiling((2048,), (1,), (False,), 256).tile[0]


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ("--capability 7.5", "the GPU must have compute capability 8.0 or later, got 7.5"),
        ("--dtype float64", "query must have dtype torch.float32 or torch.bfloat16 or torch.float16 on a CUDA device"),
        ("--value-dim 300", "head_dim must be at most 256 on a CUDA device, got 300"),
    ],
)
def test_why_nothing_runs(arguments: str, reason: str, capsys: Capture):
    output = explained(capsys, f"--device cuda {NAT} {arguments}")
    assert f"\nruns nothing: {reason}" in output
    assert "_kernel" not in output
    assert "\nforward: 401408 tokens" in output


def test_without_triton_nothing_runs(monkeypatch: Patch, capsys: Capture):
    monkeypatch.setitem(sys.modules, "triton", None)
    cuda._unusable_package.cache_clear()
    try:
        output = explained(capsys, f"--device cuda {NAT}")
    finally:
        cuda._unusable_package.cache_clear()
    assert "\nruns nothing: Triton 3.6 or later is needed, and none is installed\n" in output


def test_the_gpu_that_is_here_is_the_default(monkeypatch: Patch, capsys: Capture):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "\ncpu: bfloat16\n" in explained(capsys, NAT)
    assert "\ncuda, compute capability unknown: bfloat16\n" in explained(capsys, f"--device cuda {NAT}")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr("natten2.__main__.compute_capability", lambda device: (10, 3))
    assert "\ncuda, compute capability 10.3: bfloat16\n" in explained(capsys, NAT)


def test_what_other_devices_run(capsys: Capture):
    assert f"chosen: {_extension.cpu_capability()}" in explained(capsys, f"--device cpu {NAT}")
    assert "runs the plain PyTorch reference\n" in explained(capsys, f"--device mps {NAT}")
    assert "runs Triton kernels where Triton has Intel's backend" in explained(capsys, f"--device xpu {NAT}")
    float64 = explained(capsys, f"--device xpu --dtype float64 {NAT}")
    assert "runs the plain PyTorch reference\n" in float64


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--shape 9 9 --kernel-size 3", "shape must have 4 to 6 sizes (batch, axes, heads, head_dim), got 2"),
        ("--shape 1 9 0 4 --kernel-size 3", f"shape must have sizes between 1 and {2**24}, got [1, 9, 0, 4]"),
        (f"--shape 1 {2**25} 1 4 --kernel-size 3", f"shape must have sizes between 1 and {2**24}, got"),
        (
            "--shape 1 9 2 4 --kernel-size 3 3",
            "kernel_size must be one value, or one for each of the 1 axes, got [3, 3]",
        ),
        ("--shape 1 9 2 4 --kernel-size 3 --dilation 4", "kernel_size * dilation must not exceed the axis, got 3 * 4"),
        ("--shape 1 9 4 4 --kernel-size 3 --key-heads 3", "query's heads must be a multiple of key's 3 heads, got 4"),
        ("--shape 1 9 4 4 --kernel-size 3 --key-heads 0", f"key_heads must be between 1 and {2**24}, got 0"),
        ("--shape 1 9 4 4 --kernel-size 3 --value-dim -1", f"value_dim must be between 1 and {2**24}, got -1"),
        (
            "--shape 1 9 4 4 --kernel-size 3 --additional-keys -1",
            f"additional_keys must be between 0 and {2**24}, got -1",
        ),
        (
            "--shape 1 9 4 4 --kernel-size 3 --device cuda --capability 9",
            "argument --capability: must be two numbers such as 9.0, got '9'",
        ),
        (
            "--shape 1 9 4 4 --kernel-size 3 --device cpu --capability 9.0",
            "capability must be left out for the device cpu",
        ),
        ("--shape 1 9 4 4 --kernel-size 3 --dtype int8", "argument --dtype: invalid choice: 'int8' (choose from"),
        ("--shape 1 9 4 4 --kernel-size 3 --device tpu", "argument --device: invalid choice: 'tpu' (choose from"),
        ("--kernel-size 3", "the following arguments are required: --shape"),
    ],
)
def test_wrong_arguments(arguments: str, message: str, capsys: Capture):
    with pytest.raises(SystemExit) as exit_:
        main(["explain", *arguments.split()])
    captured = capsys.readouterr()
    assert (exit_.value.code, captured.out) == (2, "")
    assert captured.err.startswith(f"python -m natten2 explain: error: {message}")
    assert captured.err.count("\n") == 1


def test_what_a_gpu_runs_in_cpp(capsys: Capture, monkeypatch: Patch):
    monkeypatch.setenv("NATTEN2_CUDA_KERNELS", "1")
    monkeypatch.setattr(_extension, "cuda_library_path", lambda: "_cuda.so")
    output = explained(capsys, f"--device cuda --capability 9.0 {NAT} --bias")
    assert "runs CUDA C++ kernels" in output
    assert cuda_kernels.RULE in output
    assert "forward_kernel" not in output
    output = explained(capsys, f"--device cuda --capability 9.0 {NAT} --value-dim 20")
    assert "runs Triton kernels" in output
    assert "not CUDA C++ kernels: value_dim must be a multiple of 8 up to 256, got 20" in output
    assert "forward_kernel" in output
