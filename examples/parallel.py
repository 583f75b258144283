"""One program on one process or many: the process group of `torchrun`, DDP or FSDP2, and a fair share of the data."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import Sampler

from natten2.models.block import Block

__all__ = [
    "Share",
    "is_first",
    "model_state",
    "optimizer_state",
    "parallelize",
    "process_group",
    "rank",
    "restore",
    "restore_optimizer",
    "summed",
    "world_size",
]

_WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)


@contextmanager
def process_group() -> Iterator[torch.device]:
    """Joins the processes that `torchrun` started, if it did; gives this one's device.

    No DDP model may outlive it: the last one to hold the group waits for the group's threads, and a DDP model does so
    with Python's lock, which they may want.
    """
    is_cuda = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if is_cuda else torch.device("cpu")
    if is_cuda:
        torch.cuda.set_device(device)
    if "WORLD_SIZE" not in os.environ:
        yield device
        return
    dist.init_process_group("nccl" if is_cuda else "gloo")
    # Not after an exception, whose traceback still holds the model.
    yield device
    dist.destroy_process_group()


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def is_first() -> bool:
    """Whether this process is the one that prints and writes."""
    return rank() == 0


def summed(values: Sequence[float], device: torch.device) -> list[float]:
    """The sums over all processes."""
    total = torch.tensor(values, dtype=torch.float64, device=device)
    if dist.is_initialized():
        dist.all_reduce(total)
    return total.tolist()


def parallelize(model: nn.Module, kind: str, by_block: bool) -> nn.Module:
    """The model for many processes, which share its gradients (`ddp`) or all of it (`fsdp`).

    Args:
        by_block: Whether `fsdp` gathers the weights block by block, in little memory, or all at once, for a model that
            is compiled as a whole.
    """
    if not dist.is_initialized():
        return model
    if kind == "ddp":
        is_trained = any(parameter.requires_grad for parameter in model.parameters())
        return DistributedDataParallel(model) if is_trained else model
    for module in model.modules():
        if by_block and isinstance(module, Block):
            fully_shard(module)
    return fully_shard(model)


def model_state(model: nn.Module) -> dict[str, Tensor]:
    """The whole state dict on the CPU of the first process, under the names of a single model."""
    return get_model_state_dict(model, options=_WHOLE)


def optimizer_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, object]:
    """The optimizer's whole state on the CPU of the first process, by the names of the parameters."""
    return get_optimizer_state_dict(model, optimizer, options=_WHOLE)


def restore(model: nn.Module, state: dict[str, Tensor]) -> None:
    """Hands a state that the first process has to the models of all."""
    set_model_state_dict(model, state, options=_from_first())


def restore_optimizer(model: nn.Module, optimizer: torch.optim.Optimizer, state: dict[str, object]) -> None:
    """Hands a state that the first process has to the optimizers of all."""
    set_optimizer_state_dict(model, optimizer, state, options=_from_first())


def _from_first() -> StateDictOptions:
    return StateDictOptions(full_state_dict=True, broadcast_from_rank0=dist.is_initialized())


class Share(Sampler[int]):
    """This process's indices of a data set, as many as every other's: the first ones come again at the end.

    Args:
        total: Size of the data set.
        shuffle: Whether every epoch has an order of its own, drawn from `epoch`, which the caller sets.
    """

    def __init__(self, total: int, shuffle: bool) -> None:
        self.total, self.shuffle, self.epoch = total, shuffle, 0

    def __len__(self) -> int:
        return -(-self.total // world_size())

    def __iter__(self) -> Iterator[int]:
        order = range(self.total)
        if self.shuffle:
            order = torch.randperm(self.total, generator=torch.Generator().manual_seed(self.epoch)).tolist()
        return iter(order[(rank() + place * world_size()) % self.total] for place in range(len(self)))

    @property
    def own(self) -> int:
        """How many of them no other process has."""
        return -(-(self.total - rank()) // world_size())
