"""The Inductor pass that packs what models of others have split."""

from collections.abc import Callable

import pytest
import torch
from functorch.compile import make_boxed_func
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd
from torch._inductor.utils import run_and_get_code

import natten2
from natten2.ops.schemas import na_backward, na_forward, na_qkv_backward, na_qkv_forward

pytestmark = pytest.mark.usefixtures("fresh_compiler")

HEADS, HEAD_DIM = 2, 4
WIDTH = HEADS * HEAD_DIM
PACKED = {na_qkv_forward.name(), na_qkv_backward.name()}
UNPACKED = {na_forward.name(), na_backward.name()}


def unbind(qkv: Tensor) -> tuple[Tensor, ...]:
    return qkv.unflatten(-1, (3, HEADS, HEAD_DIM)).unbind(-3)


def permuted(qkv: Tensor) -> tuple[Tensor, ...]:
    """As timm writes it, heads first, and back again."""
    batch, height, width, _ = qkv.shape
    parts = qkv.reshape(batch, height * width, 3, HEADS, HEAD_DIM).permute(2, 0, 3, 1, 4)
    query, key, value = parts.unbind(0)
    return tuple(x.transpose(1, 2).reshape(batch, height, width, HEADS, HEAD_DIM) for x in (query, key, value))


def indexed(qkv: Tensor) -> tuple[Tensor, ...]:
    """As NAT's authors write it."""
    parts = qkv.reshape(*qkv.shape[:-1], 3, HEADS, HEAD_DIM).permute(3, 0, 4, 1, 2, 5)
    return tuple(parts[i].permute(0, 2, 3, 1, 4) for i in range(3))


def chunked(qkv: Tensor) -> tuple[Tensor, ...]:
    return tuple(x.view(*x.shape[:-1], HEADS, HEAD_DIM) for x in qkv.chunk(3, dim=-1))


def split(qkv: Tensor) -> tuple[Tensor, ...]:
    return tuple(x.unflatten(-1, (HEADS, -1)) for x in torch.split(qkv, WIDTH, -1))


def split_by_sizes(qkv: Tensor) -> tuple[Tensor, ...]:
    parts = qkv.flatten(0, 2).split([WIDTH, WIDTH, WIDTH], dim=1)
    return tuple(x.view(*qkv.shape[:3], HEADS, HEAD_DIM) for x in parts)


def sliced(qkv: Tensor) -> tuple[Tensor, ...]:
    return tuple(qkv[..., i * WIDTH : (i + 1) * WIDTH].unflatten(-1, (HEADS, HEAD_DIM)) for i in range(3))


def reordered(qkv: Tensor) -> tuple[Tensor, ...]:
    query, key, value = unbind(qkv)
    return key, query, value


def scaled(qkv: Tensor) -> tuple[Tensor, ...]:
    query, key, value = unbind(qkv)
    return query * 0.5, key, value


def copied(qkv: Tensor) -> tuple[Tensor, ...]:
    return tuple(x.contiguous() for x in unbind(qkv))


def shared(qkv: Tensor) -> tuple[Tensor, ...]:
    query, key, _ = unbind(qkv)
    return query, key, key


def interleaved(qkv: Tensor) -> tuple[Tensor, ...]:
    """Each head has its own query, key, and value side by side."""
    return qkv.unflatten(-1, (HEADS, 3, HEAD_DIM)).unbind(-2)


def detached(qkv: Tensor) -> tuple[Tensor, ...]:
    query, key, value = unbind(qkv)
    return query, key.detach(), value


SPLITS = (unbind, permuted, indexed, chunked, split, split_by_sizes, sliced)
OTHERS = (reordered, scaled, copied, shared, interleaved, detached)


class Block(torch.nn.Module):
    """A projection, something of another's that splits it, the operator, and a projection back."""

    def __init__(self, split: Callable, attend: Callable) -> None:
        super().__init__()
        self.split, self.attend = split, attend
        self.qkv = torch.nn.Linear(WIDTH, 3 * WIDTH)
        self.rpb = torch.nn.Parameter(torch.randn(HEADS, 5, 5))
        self.proj = torch.nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(self.attend(*self.split(self.qkv(x)), rpb=self.rpb).flatten(-2))


def function(query: Tensor, key: Tensor, value: Tensor, rpb: Tensor) -> Tensor:
    return natten2.na2d(query, key, value, 3, dilation=(2, 1), is_causal=(False, True), scale=0.3, rpb=rpb)


def face(query: Tensor, key: Tensor, value: Tensor, rpb: Tensor) -> Tensor:
    return torch.ops.natten2.na2d(query, key, value, 3, dilation=[2, 1], is_causal=[False, True], scale=0.3, rpb=rpb)


def face_with_defaults(query: Tensor, key: Tensor, value: Tensor, rpb: Tensor) -> Tensor:
    return torch.ops.natten2.na2d.default(query, key, value, [3, 3], rpb=rpb)


def overload(query: Tensor, key: Tensor, value: Tensor, rpb: Tensor) -> Tensor:
    output, logsumexp = na_forward(query, key, value, rpb, None, None, [3, 3], [1, 2], [2, 1], [False, True], 0.3)
    return output * logsumexp.unsqueeze(-1).sin()


def step(model: Callable, block: Block, x: Tensor) -> list[Tensor]:
    """The output and all gradients; sizes that are marked as dynamic stay so."""
    x.requires_grad_()
    output = model(x)
    return [output, *torch.autograd.grad(output.square().sum(), [x, *block.parameters()])]


def check(split: Callable, attend: Callable, expected: set[str]) -> None:
    """Runs the pass as Inductor does, before autograd, and the graphs that follow as they are."""
    called: set[str] = set()

    def record(graph_module: torch.fx.GraphModule, _: object) -> Callable:
        called.update(node.target.name() for node in graph_module.graph.nodes if "natten2" in str(node.target))
        return make_boxed_func(graph_module.forward)

    def backend(graph_module: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable:
        (apply,) = natten2.compile_options().values()
        apply(graph_module.graph)
        graph_module.recompile()
        return aot_autograd(fw_compiler=record, bw_compiler=record)(graph_module, inputs)

    block, x = Block(split, attend).double(), torch.randn(2, 6, 7, WIDTH, dtype=torch.float64)
    results = step(torch.compile(block, fullgraph=True, backend=backend), block, x)
    assert called == expected
    torch.testing.assert_close(results, step(block, block, x))


def called_in(codes: list[str]) -> set[str]:
    """natten2's operators in generated code."""
    names = PACKED | UNPACKED
    return {name for name in names for code in codes if f"torch.ops.{name.replace('::', '.')}.default(" in code}


@pytest.mark.parametrize("split", SPLITS)
def test_views_of_one_projection_are_packed(split: Callable):
    check(split, function, PACKED)


@pytest.mark.parametrize("attend", [face, face_with_defaults, overload])
def test_however_the_operator_is_called(attend: Callable):
    check(unbind, attend, PACKED)


@pytest.mark.parametrize("split", OTHERS)
def test_other_tensors_are_left_alone(split: Callable):
    check(split, function, UNPACKED)


def test_what_a_packed_tensor_can_not_hold_is_left_alone():
    def grouped(query: Tensor, key: Tensor, value: Tensor, rpb: Tensor) -> Tensor:
        return natten2.na2d(query, key[..., :1, :], value[..., :1, :], 3, rpb=rpb)

    def additional(query: Tensor, key: Tensor, value: Tensor, rpb: Tensor) -> Tensor:
        extra = {"additional_keys": key[:, 0, :2], "additional_values": value[:, 0, :2]}
        return natten2.na2d(query, key, value, 3, rpb=rpb, **extra)

    for attend in (grouped, additional):
        check(unbind, attend, UNPACKED)


def test_projections_of_their_own_are_left_alone():
    def tripled(qkv: Tensor) -> tuple[Tensor, ...]:
        return tuple(torch.cat((x, x), -1)[..., :HEAD_DIM] for x in unbind(qkv))

    check(tripled, function, UNPACKED)


def test_dynamic_sizes_are_packed_in_one_graph():
    block = Block(permuted, function)
    compiled = torch.compile(block, fullgraph=True, options=natten2.compile_options())
    codes = None
    torch._dynamo.utils.counters.clear()
    for batch, height, width in ((2, 6, 7), (3, 8, 9), (4, 13, 5)):
        x = torch.randn(batch, height, width, WIDTH)
        torch._dynamo.mark_dynamic(x, (0, 1, 2))
        if codes is None:
            results, codes = run_and_get_code(step, compiled, block, x)
        else:
            results = step(compiled, block, x)
        torch.testing.assert_close(results, step(block, block, x))
    assert called_in(codes) == PACKED
    # Nothing gathers the three gradients, which takes a copy where they are apart.
    assert "stack" not in "".join(codes)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_checkpointed_calls_are_packed():
    block, x = Block(indexed, face), torch.randn(2, 6, 7, WIDTH)

    def checkpointed(x: Tensor) -> Tensor:
        return torch.utils.checkpoint.checkpoint(block, x, use_reentrant=False)

    compiled = torch.compile(checkpointed, fullgraph=True, options=natten2.compile_options())
    results, codes = run_and_get_code(step, compiled, block, x)
    assert called_in(codes) == PACKED
    torch.testing.assert_close(results, step(block, block, x))
