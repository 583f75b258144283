"""Context parallelism: what a rank computes and fetches, and that it is what one process computes."""

from __future__ import annotations

from itertools import accumulate, pairwise
from pathlib import Path
from queue import Queue
from threading import Thread
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from problems import Problem, problems, random_problem, relative_error, small_windows
from processes import run_on
from torch import Tensor, nn

import natten2
import natten2.distributed
from natten2.distributed import attention
from natten2.distributed.attention import ContextParallelAttention
from natten2.distributed.plan import Axis, Plan, make_plan
from natten2.ops.schemas import na_backward, na_forward
from natten2.window import neighbors


@st.composite
def cuts(draw: st.DrawFn, length: int, most: int = 4) -> tuple[int, ...]:
    """Lengths of one to `most` shards of an axis."""
    ranks = draw(st.integers(1, min(most, length)))
    inner = draw(st.lists(st.integers(1, max(1, length - 1)), min_size=ranks - 1, max_size=ranks - 1, unique=True))
    ends = [0, *sorted(inner), length]
    return tuple(end - start for start, end in pairwise(ends))


@st.composite
def sharded_axes(draw: st.DrawFn) -> tuple[tuple[int, ...], Axis]:
    length = draw(st.integers(1, 60))
    dilation = draw(st.integers(1, min(length, 5)))
    kernel_size = draw(st.integers(1, min(9, length // dilation)))
    axis = Axis(kernel_size, draw(st.integers(1, kernel_size)), dilation, draw(st.booleans()), draw(st.booleans()))
    return draw(cuts(length)), axis


def make_plans(lengths: tuple[int, ...], axis: Axis) -> list[Plan]:
    """All ranks' plans; Hypothesis looks for other lengths where a shard is too thin."""
    try:
        return [make_plan(lengths, rank, axis) for rank in range(len(lengths))]
    except ValueError:
        assume(False)


@settings(max_examples=600)
@given(sharded_axes())
def test_slabs_hold_the_windows_of_the_whole_axis(sharded: tuple[tuple[int, ...], Axis]):
    lengths, axis = sharded
    length, window = sum(lengths), axis[:4]
    plans = make_plans(lengths, axis)
    for plan, start in zip(plans, accumulate(lengths, initial=0), strict=False):
        rows = range(plan.start, plan.start + plan.length)
        fetched = range(rows.start - plan.from_previous, rows.stop + plan.from_next)
        pieces = sorted((plan.edges if plan.interior is None else (plan.interior, *plan.edges)), key=lambda x: x.first)
        assert [row for piece in pieces for row in range(piece.first, piece.last)] == list(rows)
        assert plan.start == start
        for piece in pieces:
            present = rows if piece is plan.interior else fetched
            assert piece.end - piece.begin >= axis.kernel_size * axis.dilation
            assert piece is not plan.interior or (rows.start <= piece.begin and piece.end <= rows.stop)
            for row in range(piece.first, piece.last):
                keys = list(neighbors(row, length, *window))
                inside = neighbors(row - piece.begin, piece.end - piece.begin, *window)
                assert [piece.begin + key for key in inside] == keys
                assert keys[0] in present
                assert keys[-1] in present
        # Nothing is fetched that no query sees.
        seen = {key for row in rows for key in neighbors(row, length, *window)}
        assert fetched == range(min(*seen, rows.start), max(*seen, rows.stop - 1) + 1)
    for plan, following in pairwise(plans):
        assert plan.to_next == following.from_previous <= plan.length
        assert following.to_previous == plan.from_next <= following.length


def test_wide_shards_have_an_interior_and_little_else():
    plan = make_plan((64, 64, 64), 1, Axis(7, 1, 2, False, False))
    assert (plan.from_previous, plan.from_next, plan.to_previous, plan.to_next) == (6, 6, 6, 6)
    assert (plan.interior.first, plan.interior.last) == (70, 122)
    assert [(edge.begin, edge.end) for edge in plan.edges] == [(58, 76), (116, 134)]


def test_blocks_that_are_cut_between_need_no_halo():
    plans = make_plans((8, 12, 4), Axis(4, 4, 1, False, False))
    assert all(plan.edges == () and plan.from_previous == plan.from_next == 0 for plan in plans)


def test_a_shard_thinner_than_the_halo_is_refused_on_every_rank():
    for rank in range(3):
        with pytest.raises(ValueError, match=r"rank 0 reach 3 rows into the shard of rank 1, got lengths \[10, 2"):
            make_plan((10, 2, 10), rank, Axis(7, 1, 1, False, False))


class _Mail:
    """Stands in for the exchange between processes, between threads."""

    def __init__(self, group: SimpleNamespace, to_previous: list[Tensor], to_next: list[Tensor], *rows: int) -> None:
        self._group, self._rows = group, rows
        self._none = [[x[:, :0] for x in to_previous]] * 2
        for peer, sent, here in ((group.rank - 1, to_previous, "next"), (group.rank + 1, to_next, "previous")):
            if 0 <= peer < group.size and sent[0].shape[1] > 0:
                group.boxes[peer, here].put([x.clone() for x in sent])

    def wait(self) -> tuple[list[Tensor], list[Tensor]]:
        boxes = (self._group.boxes[self._group.rank, side] for side in ("previous", "next"))
        return tuple(
            box.get(timeout=60) if rows > 0 else none
            for box, rows, none in zip(boxes, self._rows, self._none, strict=True)
        )


def attend_in_threads(
    problem: Problem, lengths: tuple[int, ...]
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor | None, ...]]:
    """Results of all ranks joined, and gradients joined or, of what every rank holds, summed."""
    axis = Axis(*(values[0] for values in problem.parameters[:4]), is_only=len(problem.kernel_size) == 1)
    plans, count = make_plans(lengths, axis), len(lengths)
    boxes = {(rank, side): Queue() for rank in range(count) for side in ("previous", "next")}
    shards = [[x.split(lengths, dim=1) for x in problem.tensors[:3]], problem.tensors[3:]]
    upstream = [x.split(lengths, dim=1) for x in (problem.grad_output, problem.grad_logsumexp)]
    done: list[object] = [None] * count

    def work(rank: int) -> None:
        local = [x[rank] for x in shards[0]]
        inputs = [None if x is None else x.detach().clone().requires_grad_() for x in (*local, *shards[1])]
        group = SimpleNamespace(rank=rank, size=count, boxes=boxes)
        results = ContextParallelAttention.apply(plans[rank], group, problem.parameters, *inputs)
        torch.autograd.backward(results, [x[rank] for x in upstream])
        done[rank] = [x.detach() for x in results], [None if x is None else x.grad for x in inputs]

    threads = [Thread(target=work, args=(rank,)) for rank in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    results = tuple(torch.cat(parts, dim=1) for parts in zip(*(results for results, _ in done), strict=True))
    grads = list(zip(*(grads for _, grads in done), strict=True))
    joined = [torch.cat(parts, dim=1) for parts in grads[:3]]
    return results, (*joined, *(None if parts[0] is None else sum(parts) for parts in grads[3:]))


@settings(max_examples=150)
@given(st.data())
def test_shards_have_the_bits_of_the_whole(data: st.DataObject):
    problem = data.draw(st.one_of(problems(), small_windows()))
    problem = problem.to(data.draw(st.sampled_from([torch.float64, torch.float32, torch.bfloat16])))
    lengths = data.draw(cuts(problem.spatial[0]))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention, "Exchange", _Mail)
        results, grads = attend_in_threads(problem, lengths)
    expected = na_forward(*problem.tensors, *problem.parameters)
    for one, other in zip(results, expected, strict=True):
        assert torch.equal(one, other)
    upstream = (problem.grad_output, problem.grad_logsumexp)
    bound = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 1e-2}[problem.grad_output.dtype]
    expected = na_backward(*upstream, *problem.tensors, *expected, *problem.parameters)
    for grad, whole in zip(grads, expected, strict=True):
        assert grad is None or relative_error(grad, whole) <= bound


FUNCTIONS = {1: natten2.distributed.na1d, 2: natten2.distributed.na2d, 3: natten2.distributed.na3d}
# Shards of one pair of ranks and of all four, and a window along the axis that is cut, which others follow.
SHARDED = {
    "image": ((16, 12, 12, 10), random_problem((50, 9), (7, 5), bias=True, dtype=torch.float32)),
    "dilated": ((24, 26), random_problem((50, 9), (5, 3), dilation=(3, 2), dtype=torch.float32)),
    "strided blocks": ((9, 14, 11, 7), random_problem((41, 6), (6, 4), stride=(4, 2), dilation=(1, 1))),
    "causal video": (
        (5, 7, 6, 4),
        random_problem((22, 4, 5), (4, 3, 3), stride=(2, 1, 1), is_causal=(True, False, False), dtype=torch.bfloat16),
    ),
    "sequence with everything": (
        (33, 30),
        random_problem((63,), (5,), heads=4, key_heads=2, value_dim=3, additional=3, bias=True, dtype=torch.float32),
    ),
}


def check_context_parallelism() -> None:
    pairs = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    for lengths, problem in SHARDED.values():
        group = pairs[dist.get_rank() // 2] if len(lengths) == 2 else None
        for announced in (None, lengths):
            check_problem(problem, lengths, group, announced)
    check_autocast()
    check_modules()
    check_refusals(pairs)


def check_problem(
    problem: Problem, lengths: tuple[int, ...], group: dist.ProcessGroup | None, announced: tuple[int, ...] | None
) -> None:
    rank = dist.get_rank(group)
    *window, scale = problem.parameters
    expected = na_forward(*problem.tensors, *problem.parameters)
    upstream = (problem.grad_output, problem.grad_logsumexp)
    expected_grads = na_backward(*upstream, *problem.tensors, *expected, *problem.parameters)

    def mine(tensor: Tensor) -> Tensor:
        return tensor.split(lengths, dim=1)[rank]

    inputs = [*map(mine, problem.tensors[:3]), *problem.tensors[3:]]
    inputs = [None if x is None else x.detach().clone().requires_grad_() for x in inputs]
    query, key, value, rpb, additional_keys, additional_values = inputs
    results = FUNCTIONS[len(problem.kernel_size)](
        *(query, key, value, *window, scale),
        rpb=rpb,
        additional_keys=additional_keys,
        additional_values=additional_values,
        return_lse=True,
        group=group,
        lengths=announced,
    )
    for result, whole in zip(results, expected, strict=True):
        assert torch.equal(result, mine(whole))
    torch.autograd.backward(results, [mine(x) for x in upstream])
    bound = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 1e-2}[query.dtype]
    for x, whole in zip(inputs[:3], expected_grads[:3], strict=True):
        assert relative_error(x.grad, mine(whole)) <= bound
    for x, whole in zip(inputs[3:], expected_grads[3:], strict=True):
        if x is not None:
            dist.all_reduce(x.grad, group=group)
            assert relative_error(x.grad, whole) <= bound


def check_autocast() -> None:
    query, key, value = torch.randn(3, 1, 40, 6, 2, 8, generator=torch.Generator().manual_seed(0))
    shards = [x.tensor_split(4, dim=1)[dist.get_rank()] for x in (query, key, value)]
    with torch.autocast("cpu", torch.bfloat16):
        whole = natten2.na2d(query, key, value, 5)
        shard = natten2.distributed.na2d(*shards, 5, lengths=10)
    assert shard.dtype == torch.bfloat16
    assert torch.equal(shard, whole.tensor_split(4, dim=1)[dist.get_rank()])


def check_modules() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        natten2.NeighborhoodAttention2D(16, 2, 5, rel_pos_bias=True),
        nn.GELU(),
        natten2.NeighborhoodAttention2D(16, 2, 3, dilation=2),
    )
    image = torch.randn(2, 38, 7, 16)
    model(image).square().sum().backward()
    expected = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    assert natten2.distributed.context_parallel(model) is model
    model(image.tensor_split(4, dim=1)[dist.get_rank()]).square().sum().backward()
    for parameter, whole in zip(model.parameters(), expected, strict=True):
        dist.all_reduce(parameter.grad)
        assert relative_error(parameter.grad, whole) <= 1e-5


def check_refusals(pairs: list[dist.ProcessGroup]) -> None:
    rank, ones = dist.get_rank(), torch.ones(1, 4, 4, 1, 4)
    thin = ones if rank != 1 else ones[:, :2]
    for lengths in (None, (4, 2, 4, 4)):
        with pytest.raises(ValueError, match="3 rows into the shard of rank 1, got lengths"):
            natten2.distributed.na2d(thin, thin, thin, (7, 3), lengths=lengths)
    with pytest.raises(ValueError, match="lengths must be those of the shards, got 5 for 4 rows"):
        natten2.distributed.na2d(ones, ones, ones, 3, lengths=5)
    with pytest.raises(ValueError, match="lengths must be one integer or 4 of them"):
        natten2.distributed.na2d(ones, ones, ones, 3, lengths=(4, 4))
    with pytest.raises(ValueError, match=r"kernel_size \* dilation .* = 17 on axis 0 of length 16"):
        natten2.distributed.na2d(ones, ones, ones, (17, 3), lengths=4)
    with pytest.raises(ValueError, match="group must hold this process"):
        natten2.distributed.na2d(ones, ones, ones, 3, group=pairs[1 - rank // 2])
    query = ones.clone().requires_grad_()
    output = natten2.distributed.na2d(query, ones, ones, 3, lengths=4)
    with pytest.raises(NotImplementedError, match="no second derivatives"):
        torch.autograd.grad(output.sum(), query, create_graph=True)


def test_four_processes_give_what_one_gives(tmp_path: Path):
    run_on(4, check_context_parallelism, tmp_path)


def test_modules_that_see_other_rows_are_refused():
    config = natten2.models.nat.NATConfig(depths=(1,), num_heads=1, embed_dim=4, num_classes=0)
    with pytest.raises(NotImplementedError, match="module must hold no NAT"):
        natten2.distributed.context_parallel(natten2.models.nat.NAT(config))
    with pytest.raises(ValueError, match="module must hold a neighborhood attention, got Linear without one"):
        natten2.distributed.context_parallel(nn.Linear(2, 2))
