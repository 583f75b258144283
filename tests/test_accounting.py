"""What PyTorch counts and keeps: operations, and what activation checkpointing computes again."""

from collections.abc import Callable
from functools import partial

import pytest
import torch
from functorch.compile import make_boxed_func, min_cut_rematerialization_partition
from problems import Problem, random_problem
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts
from torch.utils.flop_counter import FlopCounterMode

import natten2
from natten2.ops.schemas import na_backward, na_forward
from natten2.window import neighbors


def windows() -> Problem:
    """Every feature that changes how many pairs there are."""
    return random_problem(
        (9, 8),
        (4, 3),
        stride=(3, 1),
        dilation=(2, 1),
        is_causal=(True, False),
        heads=4,
        key_heads=2,
        head_dim=5,
        value_dim=3,
        additional=2,
        bias=True,
    )


def pairs(problem: Problem) -> int:
    """Pairs of a query and a key that it sees, one by one."""
    axes = zip(problem.spatial, *problem.parameters[:-1], strict=True)
    window = 1
    for axis in axes:
        window *= sum(len(neighbors(index, *axis)) for index in range(axis[0]))
    query, additional_keys = problem.tensors[0], problem.tensors[4]
    extra = 0 if additional_keys is None else additional_keys.shape[1]
    tokens = query.shape[1:-2].numel()
    return query.shape[0] * query.shape[-2] * (window + tokens * extra)


@pytest.mark.parametrize("mode", ["eager", "meta", "compiled"])
def test_flop_counter(mode: str, fresh_compiler: None):
    problem = windows()
    device = "meta" if mode == "meta" else "cpu"
    tensors = [tensor.to(device).requires_grad_() for tensor in problem.tensors]
    call = partial(na_forward, *tensors, *problem.parameters)
    if mode == "compiled":
        # Under a counter PyTorch runs what it would compile.
        call = torch.compile(call)
    with FlopCounterMode(display=False) as counter:
        output, logsumexp = call()
        (output.sum() + logsumexp.sum()).backward()
    head_dim, value_dim = 5, 3
    counts = counter.get_flop_counts()["Global"]
    # Forward the scores and the weighted sum; backward the scores once more, the gradient of the weights, and three.
    assert counts[torch.ops.natten2.na_forward] == 2 * pairs(problem) * (head_dim + value_dim)
    assert counts[torch.ops.natten2.na_backward] == 2 * pairs(problem) * (3 * head_dim + 2 * value_dim)
    assert counter.get_total_flops() == sum(counts.values())


def test_flops_of_a_module_are_those_of_its_parts():
    layer, x = natten2.NeighborhoodAttention2D(8, 2, 3, rel_pos_bias=True), torch.randn(2, 5, 6, 8)
    with FlopCounterMode(display=False) as counter:
        output = layer(x)
    pairs, head_dim = 2 * 30 * 9 * 2, 4
    projections = 2 * x[..., 0].numel() * (8 * 24 + 8 * 8)
    assert counter.get_total_flops() == projections + 2 * pairs * 2 * head_dim
    with FlopCounterMode(display=False) as counter:
        output.sum().backward()
    assert counter.get_flop_counts()["Global"][torch.ops.natten2.na_qkv_backward] == 2 * pairs * 5 * head_dim


def test_flops_of_an_exported_program():
    class Attention(torch.nn.Module):
        def forward(self, query: Tensor) -> Tensor:
            return natten2.na2d(query, query, query, 3, is_causal=(True, False), stride=2)

    size = torch.export.Dim("size", min=8)
    query = torch.randn(2, 9, 8, 2, 4)
    graph = torch.export.export(Attention(), (query,), dynamic_shapes=({1: size},)).module()
    problem = random_problem((12, 8), (3, 3), stride=(2, 2), is_causal=(True, False), heads=2)
    with FlopCounterMode(display=False) as counter:
        graph(problem.tensors[0].float())
    assert counter.get_total_flops() == 2 * pairs(problem) * 8


class Calls(TorchDispatchMode):
    """Counts the calls of natten2's operators."""

    def __init__(self) -> None:
        super().__init__()
        self.forward = self.backward = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.forward += func is na_forward
        self.backward += func is na_backward
        return func(*args, **(kwargs or {}))


def block(x: Tensor, weight: Tensor) -> Tensor:
    query, key, value = (x @ weight).unflatten(-1, (3, 2, 4)).unbind(-3)
    return natten2.na2d(query, key, value, 3).flatten(-2).sin()


def checkpointed(context: Callable | None, x: Tensor, weight: Tensor) -> Tensor:
    options = {} if context is None else {"context_fn": context}
    return checkpoint(block, x, weight, use_reentrant=False, **options)


def leaves() -> tuple[Tensor, Tensor]:
    x = torch.randn(2, 5, 6, 8, dtype=torch.float64, requires_grad=True)
    return x, torch.randn(8, 24, dtype=torch.float64, requires_grad=True)


KEEP = partial(create_selective_checkpoint_contexts, [na_forward])


@pytest.mark.parametrize(("context", "repeats"), [(None, 2), (KEEP, 1)], ids=["everything", "selective"])
def test_checkpointing_repeats_what_the_policy_does_not_keep(context: Callable | None, repeats: int):
    x, weight = leaves()
    expected = torch.autograd.grad(block(x, weight).square().sum(), (x, weight))
    with Calls() as calls:
        grads = torch.autograd.grad(checkpointed(context, x, weight).square().sum(), (x, weight))
    assert (calls.forward, calls.backward) == (repeats, 1)
    torch.testing.assert_close(grads, expected)


@pytest.mark.parametrize(("context", "repeats"), [(None, 2), (KEEP, 1)], ids=["everything", "selective"])
def test_compiled_checkpointing_repeats_what_the_policy_does_not_keep(
    context: Callable | None, repeats: int, fresh_compiler: None
):
    graphs = []

    def count(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable:
        graphs.append([node.target for node in graph.graph.nodes])
        return make_boxed_func(graph.forward)

    backend = aot_autograd(fw_compiler=count, bw_compiler=count, partition_fn=min_cut_rematerialization_partition)
    x, weight = leaves()
    expected = torch.autograd.grad(block(x, weight).square().sum(), (x, weight))
    compiled = torch.compile(partial(checkpointed, context), fullgraph=True, backend=backend)
    torch.testing.assert_close(torch.autograd.grad(compiled(x, weight).square().sum(), (x, weight)), expected)
    targets = [target for graph in graphs for target in graph]
    assert (targets.count(na_forward), targets.count(na_backward)) == (repeats, 1)


def test_what_a_call_keeps_for_its_gradient_is_its_inputs_and_outputs():
    problem = windows()
    tensors = [tensor.requires_grad_() for tensor in problem.tensors]
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        output, logsumexp = na_forward(*tensors, *problem.parameters)
    assert {x.data_ptr() for x in kept} == {x.data_ptr() for x in (*tensors, output, logsumexp)}
    assert len(kept) == len(tensors) + 2
