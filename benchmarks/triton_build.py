"""What the Triton kernels compile to, for GPUs that need not be here.

Every kernel that a case launches is compiled for every target, as a launch on that GPU would compile it; then the
machine code is read: registers, spills, shared memory, and matrix instructions.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, fields
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING
from unittest.mock import patch

import torch

from benchmarks.report import format_table, write_json

if TYPE_CHECKING:
    from triton.compiler import CompiledKernel

__all__ = [
    "BUILD_CASES",
    "TARGETS",
    "Build",
    "BuildCase",
    "Target",
    "add_arguments",
    "builds",
    "innermost_loops",
    "main",
    "use_target",
]


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
    BuildCase("widest", (56, 56), (7, 7), 2, 256),
    BuildCase("widest-float32", (56, 56), (7, 7), 2, 256, dtype=torch.float32),
)


@dataclass(frozen=True)
class Target:
    """A GPU to compile for; a program may use `shared_memory` bytes."""

    backend: str
    architecture: int | str
    warp_size: int
    shared_memory: int
    matrix_instruction: str


# Shared memory: the CUDA C++ Programming Guide, compute capabilities; the CDNA 3 ISA, local data share.
TARGETS = {
    "sm_80": Target("cuda", 80, 32, 166_912, "HMMA"),
    "sm_90": Target("cuda", 90, 32, 232_448, "HGMMA"),
    "sm_100": Target("cuda", 100, 32, 232_448, "UTCHMMA"),
    "sm_120": Target("cuda", 120, 32, 101_376, "HMMA"),
    "gfx942": Target("hip", "gfx942", 64, 65_536, "v_mfma_\\w+"),
}


@dataclass(frozen=True)
class Build:
    """One kernel compiled for one target.

    Attributes:
        case: The layer.
        target: The GPU.
        kernel: The kernel's name.
        registers: Registers per thread.
        shared_memory: Bytes per program.
        matrix_instructions: In the machine code.
        spills: Loads and stores of spilled registers in the machine code.
        loop_spills: Those of them in the innermost loops that multiply; `None` where they aren't told apart.
    """

    case: str
    target: str
    kernel: str
    registers: int
    shared_memory: int
    matrix_instructions: int
    spills: int
    loop_spills: int | None


class _Driver:
    """A GPU on which launches compile and do nothing."""

    def __init__(self, target: Target) -> None:
        from triton.backends.compiler import GPUTarget

        self._target = GPUTarget(target.backend, target.architecture, target.warp_size)
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


def builds(cases: Sequence[BuildCase], targets: Sequence[str]) -> Iterator[Build]:
    """Compiles the kernels of the forward and the backward pass, and reads what came out; on all processors."""
    jobs = [(case, name) for name in targets for case in cases]
    with ProcessPoolExecutor(mp_context=get_context("spawn")) as pool:
        for found in pool.map(_compile, *zip(*jobs, strict=True)):
            yield from found


def _compile(case: BuildCase, name: str) -> list[Build]:
    target = TARGETS[name]
    use_target(target)
    read = _read_cubin if target.backend == "cuda" else _read_amdgcn
    with patch("natten2.ops.triton.launch._is_nvidia", return_value=target.backend == "cuda"):
        _launch(case)
    return [Build(case.name, name, kernel, **read(compiled, target)) for kernel, compiled in _take_compiled()]


def use_target(target: Target) -> None:
    """Makes launches compile for a target from here on."""
    from triton.runtime.driver import driver

    driver.set_active(_Driver(target))


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


def _read_cubin(compiled: CompiledKernel, target: Target) -> dict[str, int]:
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage, code = (
            subprocess.run([tool, option, file.name], capture_output=True, text=True, check=True).stdout
            for option in ("-res-usage", "-sass")
        )
    instructions = [(int(address, 16), text) for address, text in re.findall(r"/\*([0-9a-f]{4,})\*/\s+(.*?);", code)]
    # Small tiles take the plainer HMMA on every GPU.
    names = (target.matrix_instruction, f"HMMA|{target.matrix_instruction}", "LDL|STL")
    matrix, product, spill = (re.compile(rf"\b({name})\b") for name in names)
    loops = [
        [text for address, text in instructions if first <= address <= last]
        for first, last in innermost_loops(instructions)
    ]
    return {
        "registers": int(re.search(r"REG:(\d+)", usage)[1]),
        "shared_memory": compiled.metadata.shared,
        "matrix_instructions": _count(matrix, (text for _, text in instructions)),
        "spills": _count(spill, (text for _, text in instructions)),
        "loop_spills": sum(_count(spill, loop) for loop in loops if _count(product, loop)),
    }


def innermost_loops(instructions: Sequence[tuple[int, str]]) -> Iterator[tuple[int, int]]:
    """First and last addresses of loops that hold no other loop.

    Args:
        instructions: Addresses and texts.
    """
    loops = []
    for address, text in instructions:
        branch = re.search(r"\bBRA\b.*\b0x([0-9a-f]+)", text)
        if branch and int(branch[1], 16) < address:
            loops.append((int(branch[1], 16), address))
    for first, last in loops:
        if not any(first <= begin and end <= last and (begin, end) != (first, last) for begin, end in loops):
            yield first, last


def _read_amdgcn(compiled: CompiledKernel, target: Target) -> dict[str, int | None]:
    code = compiled.asm["amdgcn"]
    return {
        "registers": int(re.search(r"\.vgpr_count:\s+(\d+)", code)[1]),
        "shared_memory": compiled.metadata.shared,
        "matrix_instructions": _count(re.compile(target.matrix_instruction), code.splitlines()),
        "spills": _count(re.compile("scratch_(load|store)"), code.splitlines()),
        "loop_spills": None,
    }


def _count(pattern: re.Pattern, lines: Iterable[str]) -> int:
    return sum(pattern.search(line) is not None for line in lines)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of :func:`main`."""
    names = [case.name for case in BUILD_CASES]
    parser.add_argument("--case", nargs="+", choices=names, default=names, metavar="CASE", help=", ".join(names))
    parser.add_argument("--target", nargs="+", choices=TARGETS, default=list(TARGETS))
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the table there as well")


def main(options: argparse.Namespace) -> None:
    """Compiles what the options ask for, prints a table, and writes the file."""
    import triton

    cases = tuple(case for case in BUILD_CASES if case.name in options.case)
    found = list(builds(cases, options.target))
    header = [field.name.replace("_", " ") for field in fields(Build)]
    rows = [["-" if value is None else str(value) for value in asdict(build).values()] for build in found]
    print(format_table(header, rows))
    if options.json is not None:
        write_json(options.json, {"triton": triton.__version__, "builds": [asdict(build) for build in found]})
