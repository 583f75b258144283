"""`torch.vmap` without a loop: a mapped dimension becomes part of the batch, or of the heads where there is a bias.

A bias has no batch, but it has heads; and heads that follow each other keep the key heads that they share.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["fold"]


def fold(op: torch._ops.OpOverload) -> Callable[..., tuple[object, object]]:
    """The rule that `torch.library.register_vmap` takes, for an operator of this library.

    It finds out from the schema's names what a tensor is: a bias `[H, ...]`, a log-sum-exp `[B, *S, H]`, or anything
    else `[B, ..., H, C]`.
    """
    arguments = [argument.name for argument in op._schema.arguments]
    returns = [result.name for result in op._schema.returns]

    def rule(info, in_dims: tuple[int | None, ...], *args: object) -> tuple[object, object]:
        count = info.batch_size
        by_heads = "rpb" in arguments and args[arguments.index("rpb")] is not None

        def enter(name: str, arg: object, dim: int | None) -> object:
            if not isinstance(arg, Tensor):
                return arg
            mapped = arg.unsqueeze(0).expand(count, *arg.shape) if dim is None else arg.movedim(dim, 0)
            axis = mapped.dim() + _head_axis(name, mapped.dim() - 1) if by_heads else 1
            folded = mapped.movedim(0, axis - 1).flatten(axis - 1, axis)
            return folded if folded.shape[-1] == 1 or folded.stride(-1) == 1 else folded.contiguous()

        def leave(name: str, result: Tensor) -> tuple[Tensor, int | None]:
            source = name.removeprefix("grad_")
            if source in arguments and args[arguments.index(source)] is None:
                return result, None
            axis = result.dim() + _head_axis(name, result.dim()) if by_heads else 0
            return result.unflatten(axis, (count, result.shape[axis] // count)), axis

        results = op(*map(enter, arguments, args, (*in_dims, *(None,) * (len(args) - len(in_dims)))))
        if isinstance(results, Tensor):
            return leave(returns[0], results)
        outputs = [leave(name, result) for name, result in zip(returns, results, strict=True)]
        return tuple(output for output, _ in outputs), tuple(dim for _, dim in outputs)

    return rule


def _head_axis(name: str, rank: int) -> int:
    """The axis of heads, counted from behind; in front of it a mapped dimension comes to stand."""
    if name.endswith("rpb"):
        return -rank
    return -1 if name.endswith("logsumexp") else -2
