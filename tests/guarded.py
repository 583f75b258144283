"""Runs the CPU kernels on tensors that begin, or end, where memory does, and compares results with those elsewhere.

`python tests/guarded.py`: a kernel that touches what is beside a tensor ends the process, or gives other numbers.
"""

from __future__ import annotations

import ctypes
import faulthandler
import mmap
import sys
from collections.abc import Callable, Sequence
from itertools import product

import torch
from problems import DTYPES, LAYOUTS, Problem, random_problem, with_layout
from torch import Tensor

from natten2 import _extension
from natten2.ops.schemas import na_backward, na_forward

_SIZE = 256 * mmap.PAGESIZE

# Odd and prime sizes, axes of one token, and channels that fill no vector; additional tokens take other kernels.
PROBLEMS = {
    "one token": random_problem((1,), (1,), batch=1, heads=1, head_dim=1),
    "one key": random_problem((13,), (1,), head_dim=5, value_dim=3),
    "line": random_problem((37,), (5,), head_dim=7, value_dim=9, bias=True),
    "wide window": random_problem((101,), (31,), heads=3, key_heads=1, head_dim=33, value_dim=17),
    "dilated line": random_problem((53,), (7,), dilation=(3,), stride=(2,), heads=3, head_dim=16),
    "causal line": random_problem((61,), (9,), is_causal=(True,), stride=(4,), heads=1, head_dim=3, bias=True),
    "many heads": random_problem((11,), (5,), heads=14, key_heads=7, head_dim=4, value_dim=1),
    "whole line": random_problem((19,), (19,), heads=1, head_dim=31, value_dim=32, bias=True),
    "short rows": random_problem((23, 3), (5, 3), batch=1, heads=1, head_dim=5),
    "image": random_problem((13, 17), (3, 5), head_dim=17, value_dim=15, bias=True),
    "one row": random_problem((1, 31), (1, 7), head_dim=40, bias=True),
    "one column": random_problem((29, 1), (7, 1), heads=5, head_dim=8),
    "wide channels": random_problem(
        (9, 37), (7, 29), is_causal=(False, True), stride=(1, 5), batch=1, heads=1, head_dim=129, value_dim=97
    ),
    "everything": random_problem(
        (11, 19), (5, 4), stride=(2, 3), dilation=(2, 1), is_causal=(False, True), heads=4, key_heads=2, bias=True
    ),
    "volume": random_problem((5, 7, 11), (3, 4, 5), batch=1, head_dim=6, bias=True),
    "thin volume": random_problem((7, 1, 13), (3, 1, 5), dilation=(2, 1, 2), head_dim=11, value_dim=2),
    "additional": random_problem((17,), (3,), heads=4, key_heads=2, head_dim=5, value_dim=19, additional=3),
    "many additional": random_problem((3, 7), (3, 3), heads=1, head_dim=13, additional=37, bias=True),
}


class Guarded:
    """Memory between two pages that nothing can touch."""

    def __init__(self) -> None:
        self._memory = mmap.mmap(-1, _SIZE + 2 * mmap.PAGESIZE)
        begin = ctypes.addressof(ctypes.c_char.from_buffer(self._memory))
        protect = ctypes.CDLL(None, use_errno=True).mprotect
        for page in (begin, begin + mmap.PAGESIZE + _SIZE):
            if protect(ctypes.c_void_p(page), ctypes.c_size_t(mmap.PAGESIZE), 0) != 0:
                raise OSError(ctypes.get_errno(), "mprotect failed")

    def place(self, tensor: Tensor, at_end: bool, shift: int) -> Tensor:
        """A copy with the same strides in the first or last bytes, or that many elements further."""
        pairs = zip(tensor.shape, tensor.stride(), strict=True)
        extent = 1 + sum((size - 1) * stride for size, stride in pairs)
        offset = mmap.PAGESIZE + (_SIZE - extent * tensor.itemsize if at_end else 0)
        elements = torch.frombuffer(self._memory, dtype=tensor.dtype)
        first = offset // tensor.itemsize
        elements.as_strided(tensor.shape, tensor.stride(), first).copy_(tensor)
        return elements.as_strided(tensor.shape, tensor.stride(), first + shift)


def run(problem: Problem, place: Callable[[Sequence[Tensor | None]], list[Tensor | None]]) -> list[Tensor]:
    """All results, of kernels whose every input was placed."""
    *tensors, grad_output, grad_logsumexp = place([*problem.tensors, problem.grad_output, problem.grad_logsumexp])
    results = na_forward(*tensors, *problem.parameters)
    placed = place([*tensors, grad_output, grad_logsumexp, *results])
    tensors, upstream, results = placed[:6], placed[6:8], placed[8:]
    return [*results, *na_backward(*upstream, *tensors, *results, *problem.parameters)]


def main(shift: int) -> None:
    """Runs every problem in every dtype, on every instruction set, at both ends of memory.

    Raises:
        RuntimeError: A result depends on where its inputs are.
    """
    faulthandler.enable()
    torch.set_num_threads(1)
    pool = [Guarded() for _ in range(10)]
    choices = product(PROBLEMS, DTYPES, _extension.cpu_capabilities(), (True, False))
    for count, (name, dtype, capability, at_end) in enumerate(choices):
        print(name, dtype, capability, "last bytes" if at_end else "first bytes", flush=True)
        _extension.set_cpu_capability(capability)
        problem = with_layout(PROBLEMS[name].to(dtype), LAYOUTS[count % len(LAYOUTS)])

        def guard(tensors: Sequence[Tensor | None], at_end: bool = at_end) -> list[Tensor | None]:
            pairs = zip(tensors, pool[: len(tensors)], strict=True)
            return [None if tensor is None else memory.place(tensor, at_end, shift) for tensor, memory in pairs]

        for one, other in zip(run(problem, guard), run(problem, list), strict=True):
            if not torch.equal(one, other):
                raise RuntimeError("a result depends on where its inputs are")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 0)
