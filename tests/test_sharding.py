"""PyTorch's parallelisms: DTensor, tensor parallelism, FSDP2, and DDP, on gloo processes against one process."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from problems import Problem, random_problem, relative_error
from processes import run_on
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

import natten2
import natten2.distributed
from natten2.models.nat import NAT, NATConfig
from natten2.ops.schemas import na_backward, na_forward, na_qkv_backward, na_qkv_forward

BATCH, HEADS, WHOLE = Shard(0), Shard(3), Replicate()
NAMES = ("query", "key", "value", "rpb", "additional_keys", "additional_values")


def everything(heads: int, key_heads: int, batch: int = 2) -> Problem:
    return random_problem(
        (6, 5),
        (3, 2),
        stride=(2, 1),
        dilation=(2, 1),
        is_causal=(False, True),
        batch=batch,
        heads=heads,
        key_heads=key_heads,
        value_dim=3,
        additional=2,
        bias=True,
    )


# Placements of query, key and value, of the bias, and of additional keys and values; of the output, and the gradients.
RULES: dict[str, tuple[Problem, Sequence[Placement], Placement, Sequence[Placement]]] = {
    "batch": (
        everything(2, 1),
        [BATCH, BATCH, BATCH, WHOLE, BATCH, BATCH],
        BATCH,
        [BATCH, BATCH, BATCH, Partial(), BATCH, BATCH],
    ),
    "batch, unevenly": (
        everything(2, 1, batch=3),
        [BATCH, BATCH, BATCH, WHOLE, BATCH, BATCH],
        BATCH,
        [BATCH, BATCH, BATCH, Partial(), BATCH, BATCH],
    ),
    "heads": (
        everything(8, 4),
        [HEADS, HEADS, HEADS, Shard(0), Shard(2), Shard(2)],
        HEADS,
        [HEADS, HEADS, HEADS, Shard(0), Shard(2), Shard(2)],
    ),
    "heads that share one key": (
        everything(4, 1),
        [HEADS, WHOLE, WHOLE, Shard(0), WHOLE, WHOLE],
        HEADS,
        [HEADS, Partial(), Partial(), Shard(0), Partial(), Partial()],
    ),
    "nothing": (everything(2, 2), [WHOLE] * 6, WHOLE, [WHOLE] * 6),
}


def check_rules(mesh: DeviceMesh) -> None:
    for problem, placements, outer, grad_placements in RULES.values():
        inputs = [distribute_tensor(x, mesh, [y]) for x, y in zip(problem.tensors, placements, strict=True)]
        upstream = [distribute_tensor(x, mesh, [outer]) for x in (problem.grad_output, problem.grad_logsumexp)]
        results, grads, expected, expected_grads = run_both(problem, inputs, upstream)
        for result, whole in zip(results, expected, strict=True):
            assert result.placements == (outer,)
            assert torch.equal(result.full_tensor(), whole)
        for grad, whole, placement in zip(grads, expected_grads, grad_placements, strict=True):
            assert grad.placements == (placement,)
            assert relative_error(grad.full_tensor(), whole) <= 1e-12


def run_both(
    problem: Problem, inputs: Sequence[DTensor | None], upstream: Sequence[DTensor]
) -> tuple[Sequence[DTensor], Sequence[DTensor], Sequence[Tensor], Sequence[Tensor]]:
    """Results and gradients, sharded without any communication, and whole."""
    with CommDebugMode() as communication:
        results = na_forward(*inputs, *problem.parameters)
        grads = na_backward(*upstream, *inputs, *results, *problem.parameters)
    assert communication.get_total_counts() == 0
    expected = na_forward(*problem.tensors, *problem.parameters)
    whole_upstream = (problem.grad_output, problem.grad_logsumexp)
    return results, grads, expected, na_backward(*whole_upstream, *problem.tensors, *expected, *problem.parameters)


def check_absent_inputs(mesh: DeviceMesh) -> None:
    problem = random_problem((5, 4), (3, 3))
    inputs = [None if x is None else distribute_tensor(x, mesh, [BATCH]) for x in problem.tensors]
    upstream = [distribute_tensor(x, mesh, [BATCH]) for x in (problem.grad_output, problem.grad_logsumexp)]
    _, grads, _, expected_grads = run_both(problem, inputs, upstream)
    for x, grad, whole in zip(inputs, grads, expected_grads, strict=True):
        # Nothing to sum over the ranks.
        assert x is not None or grad.placements == (WHOLE,)
        assert grad.shape == whole.shape
        assert relative_error(grad.full_tensor(), whole) <= 1e-12


def check_redistribution(mesh: DeviceMesh) -> None:
    """Rows can't be sharded, nor three heads on two ranks: results are right all the same, and so are gradients."""
    problem = everything(6, 3)
    for placements in (
        [Shard(1), Shard(1), Shard(2), WHOLE, WHOLE, Shard(1)],
        [HEADS, HEADS, HEADS, Shard(0), Shard(2), Shard(2)],
        [HEADS, WHOLE, Shard(4), Shard(1), BATCH, Shard(3)],
    ):
        inputs = [
            distribute_tensor(x, mesh, [y]).requires_grad_() for x, y in zip(problem.tensors, placements, strict=True)
        ]
        check_gradients(problem, inputs)


def check_gradients(problem: Problem, inputs: Sequence[DTensor]) -> None:
    results = na_forward(*inputs, *problem.parameters)
    expected = na_forward(*problem.tensors, *problem.parameters)
    loss = sum((x * x).sum() for x in results)
    loss.backward()
    grads = na_backward(*(2 * x for x in expected), *problem.tensors, *expected, *problem.parameters)
    for result, whole in zip(results, expected, strict=True):
        assert torch.equal(result.full_tensor(), whole)
    for x, whole in zip(inputs, grads, strict=True):
        assert relative_error(x.grad.full_tensor(), whole) <= 1e-12


def check_packed(mesh: DeviceMesh) -> None:
    """The packed operators by batch, by heads, and whole, without any communication.

    One head stays whole, and so do five on the four ranks, of which one would get none.
    """
    heads = Shard(4)
    for count, placements, outer, grad_placements in (
        (4, (BATCH, WHOLE), BATCH, (BATCH, Partial())),
        (4, (heads, Shard(0)), HEADS, (heads, Shard(0))),
        (4, (WHOLE, WHOLE), WHOLE, (WHOLE, WHOLE)),
        (1, (heads, Shard(0)), WHOLE, (WHOLE, WHOLE)),
        (5, (heads, Shard(0)), WHOLE, (WHOLE, WHOLE)),
    ):
        problem = random_problem((6, 5), (3, 2), is_causal=(False, True), heads=count, bias=True)
        tensors, parameters = (torch.stack(problem.tensors[:3], -3), problem.tensors[3]), problem.parameters
        upstream = (problem.grad_output, problem.grad_logsumexp)
        inputs = [distribute_tensor(x, mesh, [y]) for x, y in zip(tensors, placements, strict=True)]
        sharded = [distribute_tensor(x, mesh, [outer]) for x in upstream]
        with CommDebugMode() as communication:
            results = na_qkv_forward(*inputs, *parameters)
            grads = na_qkv_backward(*sharded, *inputs, *results, *parameters)
        assert count in (1, 5) or communication.get_total_counts() == 0
        expected = na_qkv_forward(*tensors, *parameters)
        expected = (*expected, *na_qkv_backward(*upstream, *tensors, *expected, *parameters))
        for result, whole, placement in zip(
            (*results, *grads), expected, (outer, outer, *grad_placements), strict=True
        ):
            assert result.placements == (placement,)
            assert relative_error(result.full_tensor(), whole) <= 1e-12


def check_two_axes(mesh: DeviceMesh) -> None:
    """Batch along one axis of the mesh, heads along the other; six heads on four ranks would split a key's group."""
    problem = everything(4, 2)
    placements = [[BATCH, HEADS]] * 3 + [[WHOLE, Shard(0)]] + [[BATCH, Shard(2)]] * 2
    inputs = [distribute_tensor(x, mesh, y) for x, y in zip(problem.tensors, placements, strict=True)]
    upstream = [distribute_tensor(x, mesh, [BATCH, HEADS]) for x in (problem.grad_output, problem.grad_logsumexp)]
    _, grads, _, expected = run_both(problem, inputs, upstream)
    assert grads[3].placements == (Partial(), Shard(0))
    for grad, whole in zip(grads, expected, strict=True):
        assert relative_error(grad.full_tensor(), whole) <= 1e-12
    problem = everything(12, 6)
    placements = [[HEADS] * 2] * 3 + [[Shard(0)] * 2] + [[Shard(2)] * 2] * 2
    inputs = [distribute_tensor(x, mesh, y).requires_grad_() for x, y in zip(problem.tensors, placements, strict=True)]
    check_gradients(problem, inputs)


def small_nat() -> NAT:
    torch.manual_seed(0)
    config = NATConfig(
        depths=(2, 1), num_heads=(2, 4), embed_dim=16, kernel_size=3, dilations=((1, 2), (1,)), num_classes=5
    )
    return NAT(config).double()


def train(model: nn.Module, images: Tensor, labels: Tensor, steps: int = 3) -> list[float]:
    """Losses of a few steps; of each rank its own."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(steps):
        loss = nn.functional.cross_entropy(model(images), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(8, 3, 24, 28, generator=generator, dtype=torch.float64)
    return images, torch.randint(5, (8,), generator=generator)


def check_training(mesh: DeviceMesh) -> None:
    """The mean of the ranks' losses is the loss of one process that has the whole batch, step by step."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    images, labels = batch()
    expected = torch.tensor(train(small_nat(), images, labels), dtype=torch.float64)
    assert expected[-1] < expected[0]
    share = [x.chunk(ranks)[rank] for x in (images, labels)]

    sharded = small_nat()
    for level in sharded.levels:
        for block in level.blocks:
            fully_shard(block)
    fully_shard(sharded)
    split = small_nat()
    blocks = {f"levels.{level}.blocks.{block}" for level, block in ((0, 0), (0, 1), (1, 0))}
    plan = {f"{block}.attn": natten2.distributed.HeadwiseParallel() for block in blocks}
    plan |= {f"{block}.mlp.fc1": ColwiseParallel() for block in blocks}
    plan |= {f"{block}.mlp.fc2": RowwiseParallel() for block in blocks}
    parallelize_module(split, mesh["model"], plan)
    names = {name: parameter.shape for name, parameter in split.named_parameters()}
    assert names == {name: parameter.shape for name, parameter in small_nat().named_parameters()}

    for model, data in (
        (DistributedDataParallel(small_nat()), share),
        (sharded, share),
        (split, [images, labels]),
    ):
        losses = torch.tensor(train(model, *data), dtype=torch.float64)
        dist.all_reduce(losses)
        torch.testing.assert_close(losses / ranks, expected, rtol=1e-9, atol=0)


def check_heads(mesh: DeviceMesh) -> None:
    """Forward without communication but the sum of the output, backward but the sum of the input's gradient."""
    torch.manual_seed(0)
    whole = natten2.NeighborhoodAttention2D(16, 4, 3, rel_pos_bias=True).double()
    torch.manual_seed(0)
    split = natten2.NeighborhoodAttention2D(16, 4, 3, rel_pos_bias=True).double()
    parallelize_module(split, mesh, natten2.distributed.HeadwiseParallel())
    assert split.qkv.weight.to_local().shape == (24, 16)
    for name, parameter in whole.named_parameters():
        assert torch.equal(split.get_parameter(name).full_tensor(), parameter)
    tokens = torch.randn(2, 6, 5, 16, dtype=torch.float64)
    mine, theirs = (tokens.clone().requires_grad_() for _ in range(2))
    with CommDebugMode() as communication:
        output = split(mine)
        output.square().sum().backward()
    assert communication.get_total_counts() == 2
    expected = whole(theirs)
    expected.square().sum().backward()
    assert relative_error(output, expected) <= 1e-12
    assert relative_error(mine.grad, theirs.grad) <= 1e-12
    for name, parameter in whole.named_parameters():
        assert relative_error(split.get_parameter(name).grad.full_tensor(), parameter.grad) <= 1e-12
    odd = natten2.NeighborhoodAttention2D(12, 3, 3)
    with pytest.raises(ValueError, match="size divides num_heads 3"):
        parallelize_module(odd, mesh, natten2.distributed.HeadwiseParallel())
    with pytest.raises(TypeError, match="module must be a neighborhood attention, got Linear"):
        parallelize_module(nn.Linear(2, 2), mesh, natten2.distributed.HeadwiseParallel())


def check_all() -> None:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "model"))
    check_rules(mesh["model"])
    check_absent_inputs(mesh["model"])
    check_redistribution(mesh["model"])
    check_packed(mesh["model"])
    check_two_axes(mesh)
    check_heads(mesh["model"])
    check_training(mesh)


def test_four_processes_give_what_one_gives(tmp_path: Path):
    run_on(4, check_all, tmp_path)


# Each in a process of its own, since rules are registered once.
@pytest.mark.parametrize(
    "imports", ["natten2, torch.distributed.tensor", "torch.distributed.tensor, natten2"], ids=["after", "before"]
)
def test_rules_are_registered_whenever_dtensor_is_imported(imports: str):
    program = f"""
import sys, {imports}
import torch.distributed.tensor as tensor
propagator = tensor.DTensor._op_dispatcher.sharding_propagator
assert sys.modules["natten2"].ops.schemas.na_forward in propagator.op_strategy_funcs
assert sys.modules["natten2"].ops.schemas.na_backward in propagator.op_strategy_funcs
"""
    subprocess.run([sys.executable, "-c", program], check=True)


def test_natten2_alone_does_not_import_dtensor():
    program = "import sys, natten2; assert 'torch.distributed.tensor' not in sys.modules"
    subprocess.run([sys.executable, "-c", program], check=True)
