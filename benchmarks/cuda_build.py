"""What the compiler made of the CUDA C++ kernels: registers, spills, and instructions; it needs no GPU.

Of `_cuda.so`, by `cuobjdump`, which Triton's wheel has too. Loops are the innermost ones that multiply on tensor cores.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from importlib.util import find_spec
from pathlib import Path

from benchmarks.report import format_table, write_json
from benchmarks.triton_build import innermost_loops
from natten2 import _extension

__all__ = ["TARGETS", "Build", "add_arguments", "builds", "find_cuobjdump", "main"]

TARGETS = ("sm_80", "sm_90")
_INSTRUCTION = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(.*?);")
_SPILL = re.compile(r"\b(LDL|STL)\b")


@dataclass(frozen=True)
class Build:
    """One kernel for one target.

    Attributes:
        target: The GPU's architecture.
        kernel: "forward", "grad_query", "grad_key_value", or "delta".
        number: "Half", "BFloat16", or "Float".
        channels: The most that it takes, 0 where any number will do.
        registers: Per thread.
        stack: Bytes per thread, of spilled registers and anything else.
        matrix_instructions: On tensor cores.
        matrix_loads: Of 16x16 matrices from shared memory.
        wide_copies: Of 16 bytes to shared memory, past registers.
        wide_stores: Of 16 bytes to global memory.
        spills: Loads and stores of spilled registers.
        loop_spills: Those of them in loops.
        loop_instructions: In the longest loop.
    """

    target: str
    kernel: str
    number: str
    channels: int
    registers: int
    stack: int
    matrix_instructions: int
    matrix_loads: int
    wide_copies: int
    wide_stores: int
    spills: int
    loop_spills: int
    loop_instructions: int


def find_cuobjdump() -> str | None:
    """Path of the tool, or `None`."""
    if shutil.which("cuobjdump"):
        return shutil.which("cuobjdump")
    triton = find_spec("triton")
    path = None if triton is None else Path(triton.origin).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    return str(path) if path is not None and path.exists() else None


def builds(path: Path, targets: Sequence[str] = TARGETS) -> Iterator[Build]:
    """Every kernel in a library.

    Raises:
        FileNotFoundError: There is no cuobjdump.
    """
    tool = find_cuobjdump()
    if tool is None:
        raise FileNotFoundError("cuobjdump is needed, from the CUDA toolkit or Triton's wheel")
    for target in targets:
        usage = _run(tool, "-res-usage", "-arch", target, str(path))
        resources = dict(re.findall(r"Function (\S+):\s+(REG.*)", usage))
        code = _run(tool, "-sass", "-arch", target, str(path))
        for function in re.split(r"^\s*Function : ", code, flags=re.MULTILINE)[1:]:
            name, _, body = function.partition("\n")
            yield _build(
                target, name, resources[name], [(int(at, 16), text) for at, text in _INSTRUCTION.findall(body)]
            )


def _run(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def _build(target: str, name: str, usage: str, instructions: list[tuple[int, str]]) -> Build:
    symbol = re.search(r"(forward|backward|delta)_kernelINS0_\d+(Half|BFloat16|Float)E(?:Li(\d+)E)?(?:Lb(\d)E)?", name)
    kernel, number, channels, owns_keys = symbol.groups()
    if kernel == "backward":
        kernel = "grad_key_value" if owns_keys == "1" else "grad_query"
    loops = [
        [text for address, text in instructions if first <= address <= last]
        for first, last in innermost_loops(instructions)
    ]
    loops = [loop for loop in loops if _count(r"\bHMMA\b", loop)]
    texts = [text for _, text in instructions]
    return Build(
        target=target,
        kernel=kernel,
        number=number,
        channels=int(channels or 0),
        registers=int(re.search(r"REG:(\d+)", usage)[1]),
        stack=int(re.search(r"STACK:(\d+)", usage)[1]),
        matrix_instructions=_count(r"\bHMMA\b", texts),
        matrix_loads=_count(r"\bLDSM\b.*\.4\b", texts),
        wide_copies=_count(r"\bLDGSTS\b.*\.128\b", texts),
        wide_stores=_count(r"\bSTG\b.*\.128\b", texts),
        spills=_count(_SPILL, texts),
        loop_spills=sum(_count(_SPILL, loop) for loop in loops),
        loop_instructions=max(map(len, loops), default=0),
    )


def _count(pattern: str | re.Pattern, texts: Sequence[str]) -> int:
    return sum(re.search(pattern, text) is not None for text in texts)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of :func:`main`."""
    parser.add_argument("--target", nargs="+", choices=TARGETS, default=list(TARGETS))
    parser.add_argument("--library", type=Path, metavar="FILE", help="by default the one that was built")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the table there as well")


def main(options: argparse.Namespace) -> None:
    """Prints a table of the kernels in the library, and writes the file.

    Raises:
        FileNotFoundError: There is no library, or no cuobjdump.
    """
    path = options.library or _extension.cuda_library_path()
    if path is None:
        raise FileNotFoundError("natten2 was built without nvcc, and has no library _cuda")
    found = list(builds(path, options.target))
    header = [field.name.replace("_", " ") for field in fields(Build)]
    print(format_table(header, [[str(value) for value in asdict(build).values()] for build in found]))
    print(f"{len(found)} kernels, {path.stat().st_size / 1e6:.1f} MB")
    if options.json is not None:
        write_json(options.json, {"bytes": path.stat().st_size, "builds": [asdict(build) for build in found]})
