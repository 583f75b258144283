"""The unfused Triton kernels in the interpreter, compiled, and registered."""

import pytest
import torch
from problems import Problem, random_problem, relative_error
from test_triton import compiling
from test_unfused import REFERENCE, any_weights, run

unfused = pytest.importorskip("natten2.ops.triton.unfused", reason="needs Triton")

KERNELS = (unfused.na_qk, unfused.na_qk_backward, unfused.na_av, unfused.na_av_backward)
PROBLEMS = (
    random_problem((7,), (4,), batch=1, is_causal=(True,), head_dim=3),
    random_problem(
        (6, 5),
        (3, 2),
        stride=(2, 1),
        dilation=(1, 2),
        is_causal=(True, False),
        heads=4,
        key_heads=2,
        bias=True,
        additional=2,
        head_dim=5,
        value_dim=9,
    ),
    random_problem((3, 2, 4), (2, 1, 3), stride=(2, 1, 3), batch=1, head_dim=2, bias=True),
)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("problem", PROBLEMS, ids=["1d", "2d", "3d"])
def test_kernels_are_the_reference(problem: Problem, dtype: torch.dtype):
    bound = 1e-6 if dtype is torch.float32 else 2e-3
    problem = problem.to(dtype)
    for result, wanted in zip(run(problem, KERNELS), run(problem.to(torch.float64), REFERENCE), strict=True):
        hidden = wanted.isinf()
        assert torch.equal(result.isinf(), hidden)
        assert relative_error(result.masked_fill(hidden, 0), wanted.masked_fill(hidden, 0)) <= bound


def test_sums_in_parts(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(unfused, "count_parts", lambda programs, most: 3)
    problem = PROBLEMS[1].to(torch.float32)
    arguments = (any_weights(problem), *(problem.tensors[i] for i in (0, 1, 3, 4)), *problem.parameters)
    grads, wanted = unfused.na_qk_backward(*arguments), REFERENCE[1](*arguments)
    torch.testing.assert_close(grads[2:], wanted[2:])


COMPILED = """
import sys

import torch
from benchmarks import triton_build
from natten2.ops.triton import unfused

sys.path.insert(0, "tests")
from problems import random_problem
from test_unfused import av_tensors, any_weights, qk_tensors, window

triton_build.use_target(triton_build.TARGETS["sm_90"])
problem = random_problem(
    (9, 10),
    (3, 4),
    stride=(2, 1),
    dilation=(1, 2),
    is_causal=(False, True),
    heads=4,
    key_heads=2,
    head_dim=12,
    value_dim=20,
    bias=True,
    additional=3,
    dtype=torch.bfloat16,
)
qk, av, weights, grad = qk_tensors(problem), av_tensors(problem), any_weights(problem), problem.grad_output
meta = lambda *tensors: [None if x is None else x.to("meta") for x in tensors]
assert unfused.na_qk(*meta(*qk), *problem.parameters, 0.0).shape == weights.shape
unfused.na_qk_backward(*meta(weights, *qk), *problem.parameters)
assert unfused.na_av(*meta(*av), *window(problem)).shape == grad.shape
unfused.na_av_backward(*meta(grad, *av), *window(problem))
for name in ("score", "sum", "transposed_sum", "additional_sum", "offset"):
    kernels = getattr(unfused, f"{name}_kernel").device_caches[0][0].values()
    print(name, len(kernels), [triton_build._read_cubin(kernel, triton_build.TARGETS["sm_90"]) for kernel in kernels])
"""


def test_everything_compiles_for_hopper():
    lines = compiling("-c", COMPILED).stdout.splitlines()
    assert [line.split()[0] for line in lines] == ["score", "sum", "transposed_sum", "additional_sum", "offset"]
    assert all("'spills': 0" in line for line in lines)


@pytest.mark.parametrize("key", ["CUDA", "XPU", "MPS"])
@pytest.mark.parametrize("operator", ["na_qk", "na_qk_backward", "na_av", "na_av_backward"])
def test_devices_have_kernels(operator: str, key: str):
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"natten2::{operator}", key)
