"""What the Triton kernels compile to, for GPUs that need not be here.

Every kernel that a case launches is compiled for every target, as a launch on that GPU would compile it; then the
machine code is read: registers, spills, shared memory, and matrix instructions.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from benchmarks.report import format_table, write_json

__all__ = ["BUILD_CASES", "SHARED_MEMORY_LIMITS", "TARGETS", "Build", "BuildCase", "add_arguments", "builds", "main"]


@dataclass(frozen=True)
class BuildCase:
    """A layer of a published model; everything that decides what is compiled."""

    name: str
    spatial: tuple[int, ...]
    kernel_size: tuple[int, ...]
    heads: int
    head_dim: int
    dilation: int = 1
    bias: bool = False
    dtype: torch.dtype = torch.bfloat16


BUILD_CASES = (
    BuildCase("nat", (56, 56), (7, 7), 2, 32, bias=True),
    BuildCase("dinat-large-k11", (96, 96), (11, 11), 6, 32, dilation=8, bias=True),
    BuildCase("hdit", (128, 128), (7, 7), 2, 64),
    BuildCase("flux", (256, 256), (80, 80), 24, 128),
    BuildCase("hunyuan-video", (30, 48, 80), (18, 24, 24), 24, 128),
    BuildCase("sequence", (32768,), (2048,), 1, 128),
    BuildCase("volume", (32, 32, 32), (3, 3, 3), 4, 64),
    BuildCase("nat-float32", (56, 56), (7, 7), 2, 32, bias=True, dtype=torch.float32),
)
TARGETS = (80, 90, 100, 120)
# Bytes that one program may use, from the CUDA C++ Programming Guide's table of compute capabilities.
SHARED_MEMORY_LIMITS = {80: 166_912, 90: 232_448, 100: 232_448, 120: 101_376}
_INSTRUCTIONS = ("HMMA", "HGMMA", "UTCHMMA", "LDL", "STL")


@dataclass(frozen=True)
class Build:
    """One kernel compiled for one target; `instructions` counts them in the machine code."""

    case: str
    target: int
    kernel: str
    registers: int
    shared_memory: int
    instructions: dict[str, int]


class _Driver:
    """A GPU of some compute capability, on which launches compile and do nothing."""

    def __init__(self, capability: int) -> None:
        from triton.backends.compiler import GPUTarget

        self._target = GPUTarget("cuda", capability, 32)
        self.utils = self
        self.launcher_cls = lambda source, metadata: lambda *args: None

    def load_binary(self, *args: object) -> tuple[int, ...]:
        return 0, 0, 0, 0, 1024

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": 232_448}

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> object:
        return self._target


def builds(cases: tuple[BuildCase, ...], targets: tuple[int, ...]) -> Iterator[Build]:
    """Compiles the kernels of the forward and the backward pass, and reads what came out."""
    from triton.runtime.driver import driver

    for target in targets:
        driver.set_active(_Driver(target))
        for case in cases:
            _launch(case)
            for name, compiled in _take_compiled():
                registers, instructions = _read(compiled.asm["cubin"])
                yield Build(case.name, target, name, registers, compiled.metadata.shared, instructions)


def _launch(case: BuildCase) -> None:
    from natten2.ops.triton import launch

    rank = len(case.spatial)
    query = torch.empty(2, *case.spatial, case.heads, case.head_dim, dtype=case.dtype, device="meta")
    offsets = [2 * window - 1 for window in case.kernel_size]
    rpb = torch.empty(case.heads, *offsets, device="meta") if case.bias else None
    inputs = (query, query, query, rpb, None, None)
    parameters = (case.kernel_size, (1,) * rank, (case.dilation,) * rank, (False,) * rank, case.head_dim**-0.5)
    output, logsumexp = launch.na_forward(*inputs, *parameters)
    launch.na_backward(output, None, *inputs, output, logsumexp, *parameters)


def _take_compiled() -> Iterator[tuple[str, object]]:
    from natten2.ops.triton import backward, forward

    for module in (forward, backward):
        for name, function in list(vars(module).items()):
            if name.endswith("_kernel") and function.__module__ == module.__name__:
                for compiled in function.device_caches[0][0].values():
                    yield name, compiled
                function.device_caches.clear()


def _read(cubin: bytes) -> tuple[int, dict[str, int]]:
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage, code = (
            subprocess.run([tool, option, file.name], capture_output=True, text=True, check=True).stdout
            for option in ("-res-usage", "-sass")
        )
    counts = {name: len(re.findall(rf"\b{name}\b", code)) for name in _INSTRUCTIONS}
    return int(re.search(r"REG:(\d+)", usage)[1]), counts


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of :func:`main`."""
    names = [case.name for case in BUILD_CASES]
    parser.add_argument("--case", nargs="+", choices=names, default=names, metavar="CASE", help=", ".join(names))
    parser.add_argument("--target", nargs="+", type=int, choices=TARGETS, default=list(TARGETS))
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the table there as well")


def main(options: argparse.Namespace) -> None:
    """Compiles what the options ask for, prints a table, and writes the file."""
    import triton

    cases = tuple(case for case in BUILD_CASES if case.name in options.case)
    found = list(builds(cases, tuple(options.target)))
    header = ["case", "kernel", "target", "registers", "shared memory", *_INSTRUCTIONS]
    rows = [
        [x.case, x.kernel, f"sm_{x.target}", str(x.registers), str(x.shared_memory), *map(str, x.instructions.values())]
        for x in found
    ]
    print(format_table(header, rows))
    if options.json is not None:
        write_json(options.json, {"triton": triton.__version__, "builds": [asdict(build) for build in found]})
