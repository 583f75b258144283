"""What the compiler sees: one graph, one node, no copies, no needless recompilation."""

import math
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from expecttest import assert_expected_inline
from problems import random_problem
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch._inductor.utils import run_and_get_code
from torch.fx.experimental.proxy_tensor import make_fx

import natten2
from natten2.ops.schemas import na_backward, na_forward, na_qkv_backward, na_qkv_forward

pytestmark = pytest.mark.usefixtures("fresh_compiler")


class Block(torch.nn.Module):
    """A projection, the operator on views of it, and a projection back."""

    def __init__(self, heads: int = 2, head_dim: int = 8, kernel_size: int = 3) -> None:
        super().__init__()
        self.heads, self.kernel_size = heads, kernel_size
        width = heads * head_dim
        self.qkv = torch.nn.Linear(width, 3 * width)
        self.rpb = torch.nn.Parameter(torch.randn(heads, *(2 * kernel_size - 1,) * 2))
        self.proj = torch.nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.qkv(x).reshape(*x.shape[:-1], 3, self.heads, -1)
        query, key, value = qkv.unbind(3)
        return self.proj(natten2.na2d(query, key, value, self.kernel_size, rpb=self.rpb).flatten(-2))


def outputs_and_gradients(function: Callable[[Tensor], Tensor], block: Block, x: Tensor) -> list[Tensor]:
    x = x.detach().requires_grad_()
    output = function(x)
    return [output, *torch.autograd.grad(output.square().sum(), [x, *block.parameters()])]


@pytest.mark.parametrize("dynamic", [False, True])
def test_a_block_compiles_into_one_graph(dynamic: bool):
    block = Block().double()
    x = torch.randn(2, 5, 6, 16, dtype=torch.float64)
    compiled = torch.compile(block, fullgraph=True, dynamic=dynamic)
    torch.testing.assert_close(outputs_and_gradients(compiled, block, x), outputs_and_gradients(block, block, x))


def test_a_new_batch_or_image_size_compiles_nothing():
    counter = CompileCounterWithBackend("aot_eager")
    block = Block()
    compiled = torch.compile(block, fullgraph=True, backend=counter, dynamic=True)
    for batch, height, width in ((2, 5, 6), (3, 7, 9), (4, 12, 8), (7, 30, 31)):
        x = torch.randn(batch, height, width, 16)
        torch.testing.assert_close(outputs_and_gradients(compiled, block, x), outputs_and_gradients(block, block, x))
    assert counter.frame_count == 1


def test_the_torch_operator_and_the_function_trace_alike():
    def function(query: Tensor) -> Tensor:
        return natten2.na2d(query, query, query, 3)

    def operator(query: Tensor) -> Tensor:
        return torch.ops.natten2.na2d(query, query, query, 3)

    query = torch.randn(1, 4, 5, 2, 4)
    graphs = [make_fx(each, tracing_mode="fake")(query).code for each in (function, operator)]
    assert graphs[0] == graphs[1]


def test_a_traced_step_is_one_node_forward_and_one_backward():
    def step(query: Tensor) -> Tensor:
        query = query.detach().requires_grad_()
        output = natten2.na1d(query, query, query, 3, scale=0.5)
        (grad,) = torch.autograd.grad(output, query, query)
        return grad

    graph = make_fx(step, tracing_mode="fake")(torch.randn(1, 4, 2, 4))
    assert_expected_inline(
        graph.code.strip(),
        """\
def forward(self, query_1) -> torch.Tensor:
    detach = torch.ops.aten.detach.default(query_1);  query_1 = None
    na_forward = torch.ops.natten2.na_forward.default(detach, detach, detach, None, None, None, [3], [1], [1], [False], 0.5)
    getitem = na_forward[0]
    getitem_1 = na_forward[1];  na_forward = None
    detach_1 = torch.ops.aten.detach.default(getitem);  getitem = None
    detach_2 = torch.ops.aten.detach.default(getitem_1);  getitem_1 = None
    detach_3 = torch.ops.aten.detach.default(detach_1);  detach_1 = None
    detach_4 = torch.ops.aten.detach.default(detach_2);  detach_2 = None
    na_backward = torch.ops.natten2.na_backward.default(detach, None, detach, detach, detach, None, None, None, detach_3, detach_4, [3], [1], [1], [False], 0.5);  detach = detach_3 = detach_4 = None
    getitem_2 = na_backward[0]
    getitem_3 = na_backward[1]
    getitem_4 = na_backward[2]
    getitem_5 = na_backward[3];  getitem_5 = None
    getitem_6 = na_backward[4];  getitem_6 = None
    getitem_7 = na_backward[5];  na_backward = getitem_7 = None
    add = torch.ops.aten.add.Tensor(getitem_2, getitem_3);  getitem_2 = getitem_3 = None
    add_1 = torch.ops.aten.add.Tensor(add, getitem_4);  add = getitem_4 = None
    return add_1""",  # noqa: E501
    )


def test_inductor_hands_the_kernel_views_of_the_projection():
    block, x = Block().eval(), torch.randn(2, 8, 8, 16)
    with torch.no_grad():
        _, (code,) = run_and_get_code(torch.compile(block, fullgraph=True), x)
    call = code[code.index("def call(") :]
    lines = [line.strip() for line in call.splitlines()]
    (operator,) = [i for i, line in enumerate(lines) if "torch.ops.natten2.na_forward.default(" in line]
    # The three operands are the product's own buffer, at three offsets.
    product = lines[operator].split("reinterpret_tensor(")[1].split(",")[0]
    for offset in (0, 16, 32):
        assert f"reinterpret_tensor({product}, (2, 8, 8, 2, 8), (3072, 384, 48, 8, 1), {offset})" in lines[operator]
    assert any(f"out={product}" in line and "mm(" in line for line in lines[:operator])
    assert not [line for line in lines if "cpp_fused" in line or ".clone(" in line or ".contiguous(" in line]


def test_backward_through_inductor_copies_nothing_into_the_kernel():
    block, x = Block(), torch.randn(2, 8, 8, 16)

    def step() -> None:
        torch.compile(block, fullgraph=True)(x).sum().backward()

    _, codes = run_and_get_code(step)
    (backward,) = [code for code in codes if "torch.ops.natten2.na_backward.default(" in code]
    assert ".clone(" not in backward
    assert ".contiguous(" not in backward


def test_export_keeps_one_node_with_dynamic_sizes(tmp_path):
    class Attention(torch.nn.Module):
        def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            return torch.ops.natten2.na2d(query, key, value, 3, dilation=2) * 2

    sizes = {0: torch.export.Dim("batch"), 1: torch.export.Dim("height", min=6), 2: torch.export.Dim("width", min=6)}
    inputs = random_problem((7, 8), (3, 3)).tensors[:3]
    program = torch.export.export(Attention(), inputs, dynamic_shapes=(sizes,) * 3)
    assert [str(node.target) for node in program.graph.nodes if "natten2" in str(node.target)] == [
        "natten2.na2d.default"
    ]
    torch.export.save(program, tmp_path / "attention.pt2")
    loaded = torch.export.load(tmp_path / "attention.pt2").module()
    others = random_problem((11, 6), (3, 3), batch=3, seed=1).tensors[:3]
    torch.testing.assert_close(loaded(*others), Attention()(*others))
    lowered = program.run_decompositions()
    assert [str(n.target) for n in lowered.graph.nodes if "natten2" in str(n.target)] == ["natten2.na_forward.default"]


def test_compiled_autocast_is_eager_autocast():
    block, x = Block(), torch.randn(2, 5, 6, 16)

    def run(x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return block(x)

    compiled = torch.compile(run, fullgraph=True)(x)
    assert compiled.dtype == torch.bfloat16
    torch.testing.assert_close(compiled, run(x), rtol=0.02, atol=0.02)


def test_symbolic_parameters_break_no_graph():
    query = torch.randn(1, 9, 2, 4)
    scaled = torch.compile(lambda x, s: natten2.na1d(x, x, x, 3, scale=s), fullgraph=True, backend="aot_eager")
    for scale in (0.2, 0.3, 1):
        torch.testing.assert_close(scaled(query, scale), natten2.na1d(query, query, query, 3, scale=scale))
    sized = torch.compile(lambda x, k: natten2.na1d(x, x, x, k), fullgraph=True, backend="aot_eager")
    for kernel_size in (3, 4, 5):
        torch.testing.assert_close(sized(query, kernel_size), natten2.na1d(query, query, query, kernel_size))
    whole = torch.compile(
        lambda x: natten2.na1d(x, x, x, x.shape[1], scale=1 / x.shape[1]),
        fullgraph=True,
        dynamic=True,
        backend="aot_eager",
    )
    torch.testing.assert_close(whole(query), natten2.na1d(query, query, query, 9, scale=1 / 9))


def test_compiled_autograd_of_an_eager_forward():
    query = torch.randn(1, 6, 2, 4, requires_grad=True)
    (expected,) = torch.autograd.grad(natten2.na1d(query, query, query, 3).square().sum(), query)
    with torch._dynamo.compiled_autograd._enable(torch.compile(backend="aot_eager")):
        natten2.na1d(query, query, query, 3).square().sum().backward()
    torch.testing.assert_close(query.grad, expected)


def test_compiled_gradient_of_the_log_sum_exp():
    problem = random_problem((6, 5), (3, 3), bias=True, additional=1)

    def loss(*tensors: Tensor) -> Tensor:
        query, key, value, rpb, additional_keys, additional_values = tensors
        extra = {"additional_keys": additional_keys, "additional_values": additional_values}
        _, lse = natten2.na2d(query, key, value, 3, rpb=rpb, **extra, return_lse=True)
        return lse.square().sum()

    tensors = [tensor.requires_grad_() for tensor in problem.tensors]
    expected = torch.autograd.grad(loss(*tensors), tensors, materialize_grads=True)
    compiled = torch.compile(loss, fullgraph=True)
    torch.testing.assert_close(torch.autograd.grad(compiled(*tensors), tensors, materialize_grads=True), expected)


def nat_block() -> torch.nn.Module:
    """A block of NAT, with layer scale: windows of 7 x 7, 2 heads of 16 channels."""
    return natten2.models.nat_small(num_classes=0, depths=(1,), num_heads=(2,), embed_dim=32).levels[0].blocks[0]


def schedule(code: str) -> str:
    """The kernels that generated code calls, in order, with the buffers that they read and write.

    Buffers are numbered as they come, parameters and inputs left out; memory that is used again counts as new.
    """
    body = code[code.index("def call(") :].split("\nrunner", 1)[0]
    names: dict[str, str] = {}
    lines = []
    for line in map(str.strip, body.splitlines()[3:]):
        if re.match(r"del |#|assert_|return |buf\d+ = (reinterpret_tensor|empty_strided)|buf\d+ = buf\d+; del", line):
            continue
        if taken := re.fullmatch(r"(buf\d+) = (buf\d+)\[\d+\]", line):
            names[taken[1]] = names[taken[2]]
        elif line:
            line = re.sub(r"_\d+\(", "(", line, count=1)
            called = re.match(r"(?:buf\d+ = )?([\w.]+)", line)[1] if "(" in line else line
            buffers = re.findall(r"\bbuf\d+", line.partition("(")[2] + line.partition("(")[0])
            numbers = dict.fromkeys(names.setdefault(buffer, str(len(names))) for buffer in buffers)
            lines.append(f"{called} {' '.join(numbers)}".rstrip())
    return "\n".join(lines)


def test_schedule_of_inference():
    block, x = nat_block().eval(), torch.randn(2, 9, 10, 32)
    with torch.no_grad():
        result, (code,) = run_and_get_code(torch.compile(block, fullgraph=True), x)
        torch.testing.assert_close(result, block(x))
    assert_expected_inline(
        schedule(code),
        """\
cpp_fused_native_layer_norm 0 1 2
extern_kernels.addmm 2 3
torch.ops.natten2.na_qkv_forward.default 3 4
extern_kernels.addmm 4 6
cpp_fused_add_mul_native_layer_norm_view 7 6 8 9
extern_kernels.addmm 9 10
cpp_fused_gelu_view 11
extern_kernels.addmm 11 12
cpp_fused_add_mul_view 13 12""",
    )


def test_schedule_of_training():
    block, x = nat_block(), torch.randn(2, 9, 10, 32)
    results, (forward, backward) = run_and_get_code(
        outputs_and_gradients, torch.compile(block, fullgraph=True), block, x
    )
    torch.testing.assert_close(results, outputs_and_gradients(block, block, x))
    assert_expected_inline(
        schedule(forward),
        """\
cpp_fused_native_layer_norm 0 1 2
extern_kernels.addmm 2 3
torch.ops.natten2.na_qkv_forward.default 3 4
extern_kernels.addmm 4 7
cpp_fused_add_mul_native_layer_norm_view 8 9 7 10
extern_kernels.addmm 10 11
cpp_fused_gelu_view 11 12
extern_kernels.addmm 12 13
cpp_fused_add_mul_view 7 13 14""",
    )
    assert_expected_inline(
        schedule(backward),
        """\
cpp_fused_mul_sum_view 0 1 2
extern_kernels.mm 1 3
extern_kernels.mm 1 4
cpp_fused_gelu_gelu_backward_view 5
extern_kernels.mm 5 6
cpp_fused_gelu_gelu_backward_sum_view 5 7
extern_kernels.mm 5 8
cpp_fused_add_mul_native_layer_norm_native_layer_norm_backward_sum_view 8 9 10 11 12 13 14 15 16 17
extern_kernels.mm 13 18
extern_kernels.mm 13 19
torch.ops.natten2.na_qkv_backward.default 19 20
extern_kernels.mm 20 22
cpp_fused_sum_view 20 24
extern_kernels.mm 20 25
cpp_fused_add_native_layer_norm_native_layer_norm_backward_view 26 25 27 28 29 30""",
    )


def big_copies(run: Callable[[], object], size: int) -> set[str]:
    """What copies tensors of at least `size` numbers while something runs, inside of operators too."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], record_shapes=True) as profile:
        run()
    names = {"aten::clone", "aten::contiguous", "aten::copy_", "aten::cat", "aten::stack", "aten::_to_copy"}
    return {
        f"{event.name} of {shape}"
        for event in profile.events()
        if event.name in names
        for shape in event.input_shapes
        if math.prod(shape) >= size
    }


def test_kernels_copy_none_of_the_tokens():
    problem = random_problem((9, 10), (3, 3), head_dim=16, bias=True, dtype=torch.float32)
    qkv, rpb, upstream = torch.stack(problem.tensors[:3], 3), problem.tensors[3], problem.grad_output

    def run() -> None:
        inputs = (*qkv.unbind(3), rpb, None, None)
        results = na_forward(*inputs, *problem.parameters)
        na_backward(upstream, None, *inputs, *results, *problem.parameters)
        results = na_qkv_forward(qkv, rpb, *problem.parameters)
        na_qkv_backward(upstream, None, qkv, rpb, *results, *problem.parameters)

    assert not big_copies(run, upstream.numel())


def test_a_block_of_any_size_compiles_once():
    block = nat_block()
    counter = CompileCounterWithBackend("inductor")
    compiled = torch.compile(block, fullgraph=True, backend=counter)
    for shape in ((2, 9, 10), (3, 12, 7), (5, 7, 31)):
        x = torch.randn(*shape, 32, requires_grad=True)
        torch._dynamo.mark_dynamic(x, (0, 1, 2))
        output = compiled(x)
        results = torch.autograd.grad(output.square().sum(), [x, *block.parameters()])
        torch.testing.assert_close([output, *results], outputs_and_gradients(block, block, x))
    assert counter.frame_count == 1


@pytest.mark.skipif(not hasattr(torch.Tag, "out"), reason="this torch has no such tag")
def test_inductor_can_not_plan_a_result_that_nobody_reads():
    # Why the operators have no overloads with this tag: without gradients, nobody reads the log-sum-exp. Once this
    # fails, they may have them.
    library = torch.library.Library("natten2_test", "DEF")
    tags = (torch.Tag.pt2_compliant_tag,)
    library.define("pair(Tensor x) -> (Tensor one, Tensor two)", tags=tags)
    written = "Tensor(a!) one, Tensor(b!) two"
    library.define(f"pair.out(Tensor x, *, {written}) -> ({written})", tags=(*tags, torch.Tag.out))
    library.impl("pair", lambda x: (x + 1, x + 2), "CompositeExplicitAutograd")
    library.impl("pair.out", lambda x, one, two: (one.copy_(x + 1), two.copy_(x + 2)), "CompositeExplicitAutograd")
    try:
        with pytest.raises(NameError, match="buf"), torch.no_grad():
            torch.compile(lambda x: torch.ops.natten2_test.pair(x)[0] * 2, fullgraph=True)(torch.ones(3))
    finally:
        library._destroy()


@pytest.mark.long
def test_the_cpp_wrapper_calls_the_operator():
    block, x = Block().double(), torch.randn(2, 5, 6, 16, dtype=torch.float64)
    compiled = torch.compile(block, fullgraph=True, options={"cpp_wrapper": True})
    torch.testing.assert_close(outputs_and_gradients(compiled, block, x), outputs_and_gradients(block, block, x))


CACHED = """
import torch, natten2
from torch._dynamo.utils import counters
query = torch.arange(96.0).reshape(1, 4, 3, 2, 4).sin().requires_grad_()
output = torch.compile(natten2.na2d, fullgraph=True)(query, query, query, 3)
(grad,) = torch.autograd.grad(output.square().sum(), query)
found = counters["aot_autograd"]["autograd_cache_hit"], counters["aot_autograd"]["autograd_cache_miss"]
print(*found, grad.square().sum().item())
"""


@pytest.mark.long
def test_a_second_process_compiles_nothing(tmp_path: Path):
    environment = os.environ | {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    del environment["TORCHINDUCTOR_FORCE_DISABLE_CACHES"]
    first, second = (
        subprocess.run([sys.executable, "-c", CACHED], env=environment, check=True, capture_output=True, text=True)
        for _ in range(2)
    )
    (hits, misses, norm), (hits_again, misses_again, norm_again) = (run.stdout.split() for run in (first, second))
    assert (hits, misses, hits_again, misses_again) == ("0", "1", "1", "0")
    query = torch.arange(96.0).reshape(1, 4, 3, 2, 4).sin().requires_grad_()
    (grad,) = torch.autograd.grad(natten2.na2d(query, query, query, 3).square().sum(), query)
    torch.testing.assert_close(torch.tensor([float(norm), float(norm_again)]), grad.square().sum().expand(2))
