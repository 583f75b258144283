"""Tensor parallelism: modules whose heads are split over ranks."""

from __future__ import annotations

from functools import partial

from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ParallelStyle, RowwiseParallel, parallelize_module
from torch.distributed.tensor.placement_types import _StridedShard

from natten2.nn import NeighborhoodAttention1D, NeighborhoodAttention2D, NeighborhoodAttention3D

__all__ = ["HeadwiseParallel"]

_MODULES = (NeighborhoodAttention1D, NeighborhoodAttention2D, NeighborhoodAttention3D)


class HeadwiseParallel(ParallelStyle):
    """Splits the heads of a neighborhood attention over a mesh, for `parallelize_module`.

    Each rank projects to the queries, keys, and values of its own heads, attends with its part of the bias, and
    projects back; the sum over ranks is the output. That is one all-reduce forward and one backward (Megatron-LM, arXiv
    1909.08053). Parameters become `DTensor` of the same global values: checkpoints don't depend on the mesh. Every rank
    holds input and output in full, as plain tensors; the input may be a `DTensor`.

    Raises:
        TypeError: By `parallelize_module`, the module is no neighborhood attention of natten2.
        ValueError: By `parallelize_module`, the mesh has more than one axis, or its size doesn't divide `num_heads`.
    """

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        if not isinstance(module, _MODULES):
            raise TypeError(f"module must be a neighborhood attention, got {type(module).__name__}")
        if device_mesh.ndim != 1 or module.num_heads % device_mesh.size() != 0:
            raise ValueError(
                f"device_mesh must have one axis whose size divides num_heads {module.num_heads}, "
                f"got shape {tuple(device_mesh.shape)}"
            )
        # Queries, keys, and values lie one behind the other, each of all heads.
        for name in ("weight", "bias"):
            self._shard(module.qkv, name, device_mesh, _StridedShard(0, split_factor=3))
        module.qkv.forward = partial(_project, module.qkv, device_mesh)
        self._shard(module, "rpb", device_mesh, Shard(0))
        parallelize_module(module.proj, device_mesh, RowwiseParallel(), src_data_rank=self.src_data_rank)
        return module

    def _shard(self, module: nn.Module, name: str, device_mesh: DeviceMesh, placement: Placement) -> None:
        parameter = getattr(module, name)
        if parameter is not None:
            tensor = distribute_tensor(parameter, device_mesh, [placement], src_data_rank=self.src_data_rank)
            module.register_parameter(name, nn.Parameter(tensor, requires_grad=parameter.requires_grad))


def _project(qkv: nn.Linear, device_mesh: DeviceMesh, input: Tensor) -> DTensor:
    """What `qkv` computes, by products of what each rank has: `DTensor`'s own backward would gather the weights."""
    if not isinstance(input, DTensor):
        input = DTensor.from_local(input, device_mesh, [Replicate()], run_check=False)
    local = input.redistribute(placements=[Replicate()]).to_local(grad_placements=[Partial()])
    weight, bias = (None if x is None else x.to_local() for x in (qkv.weight, qkv.bias))
    output = nn.functional.linear(local, weight, bias)
    placement = _StridedShard(output.dim() - 1, split_factor=3)
    shape = (*output.shape[:-1], qkv.out_features)
    stride = _contiguous_stride(shape)
    return DTensor.from_local(output, device_mesh, [placement], run_check=False, shape=shape, stride=stride)


def _contiguous_stride(shape: tuple[int, ...]) -> tuple[int, ...]:
    stride = [1]
    for size in reversed(shape[1:]):
        stride.insert(0, stride[0] * size)
    return tuple(stride)
