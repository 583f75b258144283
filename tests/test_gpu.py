"""The kernels of a GPU: numbers, registration, determinism, graphs, streams, memory, and errors.

Without a GPU there is nothing to test. `NATTEN2_TEST_DEVICE=cpu` runs what a processor can do too, on the CPU kernels:
a trial of the tests themselves.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from functools import cache

import pytest
import test_kernels
import test_operators
import test_validation
import torch
from hypothesis import given, settings
from problems import (
    DTYPES,
    INPUTS,
    Problem,
    golden_cases,
    packed,
    problems,
    random_problem,
    relative_error,
    with_layout,
)
from torch import Tensor

import natten2
from natten2.models import nat_tiny
from natten2.ops.schemas import na_backward, na_forward

DEVICE = torch.device(os.environ.get("NATTEN2_TEST_DEVICE", "cuda"))
IS_CUDA = DEVICE.type == "cuda"
if IS_CUDA and not torch.cuda.is_available():
    pytest.skip("needs a GPU: torch.cuda.is_available() is False", allow_module_level=True)

needs_cuda = pytest.mark.skipif(not IS_CUDA, reason="needs a GPU")
HALF = (torch.bfloat16, torch.float16)


@pytest.fixture(autouse=True)
def _exact_float32(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    yield
    torch.set_float32_matmul_precision(before)


@cache
def refusal(dtype: torch.dtype) -> str | None:
    """Why the device has no kernel for a dtype, or `None` where it has one."""
    token = torch.zeros(1, 1, 1, 1, dtype=dtype, device=DEVICE)
    try:
        na_forward(token, token, token, None, None, None, (1,), (1,), (1,), (False,), 1.0)
    except NotImplementedError as error:
        return str(error)
    return None


def there(problem: Problem) -> Problem:
    """The same problem on the device, with the same strides."""
    tensors = tuple(None if tensor is None else move(tensor) for tensor in problem.tensors)
    upstream = {"grad_output": move(problem.grad_output), "grad_logsumexp": move(problem.grad_logsumexp)}
    return replace(problem, tensors=tensors, **upstream)


def move(tensor: Tensor) -> Tensor:
    """A copy on the device whose strides, and what lies between its elements, are those of `tensor`."""
    whole = torch.empty(0, dtype=tensor.dtype).set_(tensor.untyped_storage()).to(DEVICE)
    return whole.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())


def on_device(operator: Callable) -> Callable:
    """The operator with its tensors sent to the device, and its results brought back."""

    def run(*args: object) -> tuple[Tensor, ...]:
        moved = (move(arg) if isinstance(arg, Tensor) else arg for arg in args)
        return tuple(result.cpu() for result in operator(*moved))

    return run


ON_DEVICE = (on_device(na_forward), on_device(na_backward))
BOUNDS = {torch.float32: 3e-6, torch.bfloat16: 0.02, torch.float16: 0.003}


def exact(problem: Problem) -> test_kernels.Results:
    """The float64 results of the CPU kernels for the numbers that `problem` holds in its own dtype."""
    return test_kernels.run(problem.to(torch.float64))


def check_close(problem: Problem, dtype: torch.dtype, vanishing: tuple[float, float] | None = None) -> None:
    """Compares the device's results with the CPU's float64 ones.

    `vanishing` are the bounds, forward and backward, of results that may vanish, which are compared with 1.
    """
    results, grads = test_kernels.run(problem.to(dtype), ON_DEVICE)
    expected, expected_grads = exact(problem.to(dtype))
    names = ("output", "logsumexp", *(f"grad_{name}" for name in INPUTS))
    for name, result, wanted in zip(names, (*results, *grads), (*expected, *expected_grads), strict=True):
        assert result.shape == wanted.shape, name
        if vanishing is None:
            assert relative_error(result, wanted) <= BOUNDS[dtype], name
        else:
            difference = torch.linalg.vector_norm(result.double() - wanted).item()
            size = max(torch.linalg.vector_norm(wanted).item(), wanted.numel() ** 0.5)
            assert difference <= vanishing[name.startswith("grad_")] * size, name


# Those that take longest come first, so that parallel runs end together. Every example compiles kernels of its own.
@pytest.mark.parametrize(
    ("dtype", "bounds"), [(torch.float32, (1e-5, 3e-5)), (torch.bfloat16, (0.02, 0.05))], ids=["float32", "bfloat16"]
)
@pytest.mark.parametrize("largest", [40, 150, 300])
def test_random_problems(largest: int, dtype: torch.dtype, bounds: tuple[float, float]):
    @settings(max_examples=5)
    @given(problems(max_tokens=largest, min_batch=0))
    def run(problem: Problem) -> None:
        check_close(problem, dtype, bounds)

    run()


def test_a_compiled_training_step_gives_the_numbers_of_eager(fresh_compiler: None):
    # One block per level, at the size where every level of the published model runs, with its own windows.
    size = 224 if IS_CUDA else 32
    changes = {} if IS_CUDA else {"kernel_size": 1, "embed_dim": 32}
    models = []
    for _ in range(2):
        torch.manual_seed(0)
        models.append(nat_tiny(num_classes=5, depths=(1, 1, 1, 1), drop_path_rate=0.0, **changes).to(DEVICE))
    eager, model = models
    images, labels = torch.randn(2, 3, size, size, device=DEVICE), torch.tensor([1, 3], device=DEVICE)
    expected = train(eager, eager, images, labels)
    losses = train(torch.compile(model, fullgraph=True, dynamic=False), model, images, labels)
    torch.testing.assert_close(losses, expected, rtol=1e-3, atol=1e-4)
    for one, other in zip(model.parameters(), eager.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-2, atol=1e-3)


def train(function: Callable, model: torch.nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    losses = []
    for _ in range(3):
        loss = torch.nn.functional.cross_entropy(function(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return torch.stack(losses)


# The shapes that models run with: several tiles along every axis, and every border.
@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
@pytest.mark.parametrize(
    "problem",
    [
        random_problem((56, 56), (7, 7), head_dim=32, bias=True),
        random_problem((56, 56), (7, 7), dilation=(8, 8), head_dim=32, bias=True),
        random_problem((40, 33), (11, 12), head_dim=64, batch=1),
        random_problem((64, 48), (20, 16), stride=(16, 8), head_dim=128, batch=1),
        random_problem((4000,), (600,), head_dim=128, batch=1, heads=1),
        random_problem((3000,), (513,), is_causal=(True,), head_dim=64, batch=1, heads=4, key_heads=1),
        random_problem((10, 18, 20), (5, 7, 9), stride=(2, 3, 1), head_dim=64, batch=1, heads=1),
        random_problem((8, 12, 12), (3, 7, 7), is_causal=(True, False, False), head_dim=32, additional=70),
    ],
    ids=["nat", "dinat", "even", "blocks", "sequence", "causal", "volume", "video"],
)
def test_shapes_of_models(problem: Problem, dtype: torch.dtype):
    check_close(problem, dtype)


def golden_problems() -> Iterator[object]:
    """Every case in every dtype. Compiling takes seconds, so one of the half precisions is left to the long tests."""
    for index in range(len(golden_cases())):
        for dtype in DTYPES:
            marks = [pytest.mark.long] if dtype is HALF[index % 2] else []
            yield pytest.param(index, dtype, marks=marks, id=f"{index}-{dtype}")


@pytest.mark.parametrize(("index", "dtype"), golden_problems())
def test_golden(index: int, dtype: torch.dtype):
    if refusal(dtype) is not None:
        pytest.skip(refusal(dtype))
    test_kernels.check_golden(golden_cases()[index], dtype, ON_DEVICE)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_dtype_has_a_kernel_or_an_error_that_names_it(dtype: torch.dtype):
    assert refusal(dtype) is None or (dtype is torch.float64 and str(dtype) in refusal(dtype))


def head_dims() -> Iterator[object]:
    """Every one in every dtype; most of two dtypes are left to the long tests, for the same reason."""
    for head_dim in (1, 2, 3, 15, 16, 17, 31, 33, 64, 80, 127, 128, 192, 256):
        for dtype in BOUNDS:
            is_short = dtype is torch.bfloat16 or head_dim in (1, 33, 128, 256)
            yield pytest.param(head_dim, dtype, marks=[] if is_short else [pytest.mark.long], id=f"{head_dim}-{dtype}")


@pytest.mark.parametrize(("head_dim", "dtype"), head_dims())
def test_every_head_dim(head_dim: int, dtype: torch.dtype):
    problem = random_problem((5, 6), (3, 4), head_dim=head_dim, value_dim=head_dim % 256 + 1, bias=True, additional=2)
    check_close(problem, dtype)


def opchecked() -> Iterator[object]:
    for rank in (1, 2, 3):
        for make in (test_operators.plain, test_operators.everything):
            is_short = (make is test_operators.everything) == (rank == 2)
            marks = [] if is_short else [pytest.mark.long]
            yield pytest.param(make(rank).to(torch.float32), marks=marks, id=f"{make.__name__}-{rank}")
    for name, problem in test_operators.EDGE_CASES.items():
        yield pytest.param(problem.to(torch.bfloat16), id=name)


@pytest.mark.parametrize("problem", opchecked())
def test_opcheck(problem: Problem):
    problem = there(problem)
    test_operators.opcheck(na_forward, *test_operators.learnable(problem.tensors), *problem.parameters)
    test_operators.opcheck(na_backward, *test_operators.backward_args(problem))
    face = getattr(torch.ops.natten2, test_operators.FACES[len(problem.spatial) - 1]).default
    test_operators.opcheck(face, *test_operators.face_args(problem))


REPEATED = {
    "image": random_problem((30, 29), (7, 7), head_dim=32, bias=True, additional=3),
    "sequence": random_problem((5000,), (2048,), head_dim=64, batch=1, heads=1),
    "shared keys": random_problem((9, 10, 11), (3, 5, 7), head_dim=32, batch=1, heads=4, key_heads=1, bias=True),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", REPEATED)
def test_results_are_the_same_bits_every_time(name: str, dtype: torch.dtype, deterministic: None):
    problem = there(REPEATED[name].to(dtype))

    first = flat_results(problem)
    for _ in range(10):
        for index, (one, other) in enumerate(zip(flat_results(problem), first, strict=True)):
            assert torch.equal(one, other), index


def flat_results(problem: Problem) -> list[Tensor]:
    return [result for results in test_kernels.run(problem) for result in results]


@pytest.fixture
def deterministic() -> Iterator[None]:
    """Deterministic algorithms, under which PyTorch also fills new tensors with NaN."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@needs_cuda
@pytest.mark.parametrize("problem", [REPEATED["image"], REPEATED["sequence"]], ids=["image", "sequence"])
def test_a_captured_graph_gives_the_same_numbers(problem: Problem, deterministic: None):
    static = there(problem.to(torch.bfloat16))
    other = there(random_like(problem).to(torch.bfloat16))
    expected = flat_results(other)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        flat_results(static)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = flat_results(static)
    overwrite(static, other)
    graph.replay()
    for index, (result, wanted) in enumerate(zip(results, expected, strict=True)):
        assert torch.equal(result, wanted), index


def overwrite(mine: Problem, theirs: Problem) -> None:
    """Copies the numbers of one problem into the tensors of another."""
    tensors, others = ((*one.tensors, one.grad_output, one.grad_logsumexp) for one in (mine, theirs))
    for tensor, other in zip(tensors, others, strict=True):
        if tensor is not None:
            tensor.copy_(other)


def random_like(problem: Problem) -> Problem:
    tensors = tuple(None if tensor is None else torch.randn_like(tensor) for tensor in problem.tensors)
    upstream = (torch.randn_like(problem.grad_output), torch.randn_like(problem.grad_logsumexp))
    return Problem(tensors, *problem.parameters, *upstream)


def test_autocast_runs_in_its_dtype():
    problem = there(random_problem((9, 8), (3, 3), head_dim=16, bias=True, dtype=torch.float32))
    with torch.autocast(DEVICE.type, torch.bfloat16):
        output, logsumexp = na_forward(*problem.tensors, *problem.parameters)
    expected, _ = na_forward(*problem.to(torch.bfloat16).tensors, *problem.parameters)
    assert (output.dtype, logsumexp.dtype) == (torch.bfloat16, torch.float32)
    torch.testing.assert_close(output, expected, rtol=0.02, atol=0.02)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_strided_views_are_read_in_place(dtype: torch.dtype):
    qkv = torch.randn(2, 128, 128, 3, 4, 32, device=DEVICE).to(dtype)
    views = qkv.unbind(3)
    copies = [view.contiguous() for view in views]
    parameters = ((7, 7), (1, 1), (1, 1), (False, False), 0.2)
    expected, _ = na_forward(*copies, None, None, None, *parameters)
    if IS_CUDA:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    output, _ = na_forward(*views, None, None, None, *parameters)
    if IS_CUDA:
        # The output, and less than as much for the log-sum-exp.
        assert torch.cuda.max_memory_allocated() - before < 2 * views[0].nbytes
    torch.testing.assert_close(output, expected)


def test_strided_gradients_are_read_in_place():
    problem = random_problem((12, 13), (5, 4), head_dim=16, dtype=torch.float32)
    moved = there(with_layout(problem, packed))
    assert not moved.tensors[0].is_contiguous()
    _, grads = test_kernels.run(moved)
    _, expected = test_kernels.run(there(problem))
    torch.testing.assert_close(grads, expected)
    ones = torch.ones((), device=DEVICE).expand(problem.grad_output.shape)
    output, logsumexp = na_forward(*moved.tensors, *moved.parameters)
    saved = (None, *moved.tensors, output, logsumexp, *moved.parameters)
    torch.testing.assert_close(na_backward(ones, *saved), na_backward(ones.contiguous(), *saved))


@pytest.mark.parametrize("poison", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("spatial", "parameters", "hidden_from"),
    [
        # The poisoned token is the last one of each axis; whoever sees it is a corner of the grid.
        ((64,), ((5,), (1,), (1,), (False,), 0.3), (slice(0, 59),)),
        ((64,), ((5,), (1,), (1,), (True,), 0.3), (slice(0, 63),)),
        ((64,), ((5,), (1,), (2,), (False,), 0.3), (slice(0, 63, 2),)),
        ((20, 21), ((3, 4), (1, 1), (1, 1), (False, False), 0.3), (slice(None), slice(0, 17))),
        ((20, 21), ((3, 4), (2, 3), (1, 1), (False, True), 0.3), (slice(None), slice(0, 20))),
        ((6, 7, 8), ((3, 3, 3), (1, 1, 1), (1, 1, 1), (False, False, False), 0.3), (slice(0, 3),)),
    ],
    ids=["sequence", "causal", "dilated", "image", "causal image", "volume"],
)
def test_hidden_tokens_reach_nobody(
    spatial: tuple[int, ...], parameters: tuple, hidden_from: tuple[slice, ...], dtype: torch.dtype, poison: float
):
    problem = there(random_problem(spatial, parameters[0], head_dim=16).to(dtype))
    query, key, value = problem.tensors[:3]
    clean, clean_lse = na_forward(query, key, value, None, None, None, *parameters)
    last = (slice(None), *(-1 for _ in spatial))
    key, value = key.clone(), value.clone()
    key[last], value[last] = poison, poison
    output, logsumexp = na_forward(query, key, value, None, None, None, *parameters)
    index = (slice(None), *hidden_from)
    assert torch.equal(output[index], clean[index])
    assert torch.equal(logsumexp[index], clean_lse[index])
    assert not output[last].isfinite().all()

    # Backward, a poisoned query and its gradient reach no key that it does not see.
    query, grad = query.clone(), problem.grad_output.clone()
    key, value = problem.tensors[1:3]
    expected = na_backward(grad, None, query, key, value, None, None, None, clean, clean_lse, *parameters)
    query[last], grad[last] = poison, poison
    grads = na_backward(grad, None, query, key, value, None, None, None, clean, clean_lse, *parameters)
    unseen = (slice(None), *(slice(0, length // 4) for length in spatial))
    for result, wanted in zip(grads[1:3], expected[1:3], strict=True):
        assert torch.equal(result[unseen], wanted[unseen])
        assert not result[last].isfinite().all()


BAD = {
    name: bad
    for name, bad in {**test_validation.BAD, **test_validation.BAD_LENGTHS}.items()
    if not bad.only_eager and name != "more additional keys than there is memory"
}


@pytest.mark.parametrize("call", [test_validation.call_operator, test_validation.call_with_gradients])
@pytest.mark.parametrize("name", BAD)
def test_bad_input_raises_what_it_raises_on_the_cpu(name: str, call: Callable):
    bad = BAD[name]
    with pytest.raises(bad.error, match=bad.message):
        call(arguments(bad.change))
    call(arguments({}))


def arguments(change: dict[str, object]) -> list[object]:
    args = test_validation.arguments(change)
    return [move(arg) if isinstance(arg, Tensor) else arg for arg in args]


@needs_cuda
def test_bad_input_on_two_devices_raises():
    query = torch.randn(1, 6, 2, 4, device=DEVICE)
    with pytest.raises(ValueError, match=r"key must be on query's device cuda:\d+, got cpu"):
        natten2.na1d(query, query.cpu(), query, 3)


@needs_cuda
def test_work_is_done_on_the_current_stream():
    problem = random_problem((64, 64), (7, 7), head_dim=32, dtype=torch.float32)
    on_default = there(problem)
    expected = flat_results(on_default)
    late = there(random_like(problem))
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        # Whoever does not wait for this stream sees the old numbers.
        torch.cuda._sleep(50_000_000)
        overwrite(late, on_default)
        results = flat_results(late)
    stream.synchronize()
    for result, wanted in zip(results, expected, strict=True):
        assert torch.equal(result, wanted)


def test_running_out_of_memory_leaves_the_process_usable():
    expected_error = torch.OutOfMemoryError if IS_CUDA else RuntimeError
    token = torch.randn(1, 1, 1, 1, 64, device=DEVICE, dtype=torch.float32)
    huge = token.expand(1, 2**22, 2**16, 1, 64)
    with pytest.raises(expected_error):
        natten2.na2d(huge, huge, huge, 3)
    check_close(random_problem((9, 8), (3, 3), head_dim=16), torch.float32)


@needs_cuda
def test_a_loss_of_memory_in_the_backward_leaves_the_process_usable():
    free, _ = torch.cuda.mem_get_info()
    query = torch.randn(1, 4096, 4, 64, device=DEVICE, requires_grad=True)
    # Expanded inputs cost nothing; their gradients would not be expanded.
    batch = 4 * free // query.nbytes
    args = (query.detach().expand(batch, -1, -1, -1),) * 3
    logsumexp = torch.zeros(1, 1, 1, device=DEVICE).expand(batch, 4096, 4)
    with pytest.raises(torch.OutOfMemoryError):
        na_backward(args[0], None, *args, None, None, None, args[0], logsumexp, (3,), (1,), (1,), (False,), 0.1)
    natten2.na1d(query, query, query, 3).sum().backward()
    assert query.grad.isfinite().all()


@needs_cuda
def test_tensors_of_more_than_two_to_the_31_elements():
    tokens, heads, head_dim = 2**20 + 2**10, 32, 64
    needed = 12 * 2 * tokens * heads * head_dim
    if torch.cuda.mem_get_info()[0] < needed:
        pytest.skip(f"needs {needed / 2**30:.0f} GiB of free memory")
    query = torch.randn(1, tokens, heads, head_dim, dtype=torch.bfloat16, device=DEVICE)
    parameters = ((5,), (1,), (1,), (False,), 0.125)
    output, logsumexp = na_forward(query, query, query, None, None, None, *parameters)
    grads = na_backward(output, None, query, query, query, None, None, None, output, logsumexp, *parameters)
    end = query[:, -64:].contiguous()
    expected, expected_lse = na_forward(end, end, end, None, None, None, *parameters)
    expected_grads = na_backward(expected, None, end, end, end, None, None, None, expected, expected_lse, *parameters)
    # The first tokens of the piece have other windows than they have in the whole.
    for result, wanted in zip((output, *grads[:3]), (expected, *expected_grads[:3]), strict=True):
        torch.testing.assert_close(result[:, -48:], wanted[:, -48:], rtol=0.02, atol=0.02)
    torch.testing.assert_close(logsumexp[:, -48:], expected_lse[:, -48:])


@needs_cuda
@pytest.mark.parametrize("allow", ["matmul precision", "allow_tf32"])
def test_float32_products_are_as_exact_as_the_setting_asks(allow: str):
    if torch.version.hip or torch.cuda.get_device_capability() < (8, 0):
        pytest.skip("needs tf32")
    problem = random_problem((64, 64), (9, 9), head_dim=64, batch=1, dtype=torch.float32)
    expected, expected_grads = exact(problem)

    def errors() -> list[float]:
        results, grads = test_kernels.run(problem, ON_DEVICE)
        pairs = zip((results[0], *grads[:3]), (expected[0], *expected_grads[:3]), strict=True)
        return [relative_error(*pair) for pair in pairs]

    assert max(errors()) <= 3e-6
    if allow == "allow_tf32":
        torch.backends.cuda.matmul.allow_tf32 = True
    else:
        torch.set_float32_matmul_precision("high")
    assert all(3e-5 < one < 5e-3 for one in errors())
    torch.set_float32_matmul_precision("highest")
    assert max(errors()) <= 3e-6


def test_second_derivatives_are_those_of_the_cpu():
    tensors = random_problem((6, 5), (3, 3), bias=True, head_dim=16, dtype=torch.float32).tensors[:4]

    def second(tensors: Iterable[Tensor]) -> list[Tensor]:
        inputs = [tensor.detach().requires_grad_() for tensor in tensors]
        query, key, value, rpb = inputs
        output = natten2.na2d(query, key, value, 3, rpb=rpb)
        first = torch.autograd.grad(output.square().sum(), inputs, create_graph=True)
        return list(torch.autograd.grad(sum(one.square().sum() for one in first), inputs))

    expected = second(tensor.double() for tensor in tensors)
    for index, (result, wanted) in enumerate(zip(second(map(move, tensors)), expected, strict=True)):
        assert relative_error(result.cpu(), wanted) <= 1e-5, index
