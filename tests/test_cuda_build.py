"""What nvcc made of the CUDA C++ kernels, without a GPU: registration, registers, and instructions."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from benchmarks.cuda_build import TARGETS, Build, builds, find_cuobjdump
from natten2 import _extension

LIBRARY = _extension.cuda_library_path()
needs_library = pytest.mark.skipif(LIBRARY is None, reason="natten2 was built without nvcc")
needs_cuobjdump = pytest.mark.skipif(find_cuobjdump() is None, reason="needs cuobjdump, of CUDA's toolkit or Triton")

PROGRAM = """
import torch
from natten2 import _extension
from natten2.ops.schemas import LIBRARY
for name in ("cuda_forward", "cuda_backward"):
    assert not torch._C._dispatch_has_kernel_for_dispatch_key(f"natten2::{name}", "CUDA")
_extension.load_cuda_library()
for name in ("cuda_forward", "cuda_backward"):
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"natten2::{name}", "CUDA")
    assert not torch._C._dispatch_has_kernel_for_dispatch_key(f"natten2::{name}", "CPU")
assert not [name for name in torch._C._dispatch_find_dangling_impls() if "natten2" in name]
"""


@needs_library
def test_the_library_loads_without_a_gpu_and_registers_its_kernels():
    result = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


@needs_library
def test_the_library_is_small():
    assert LIBRARY.stat().st_size < 20_000_000


@pytest.mark.skipif(not Path("/usr/bin/nm").exists(), reason="binutils' nm lists the symbols")
@needs_library
def test_the_library_needs_only_the_stable_interface_of_torch():
    command = ["nm", "--dynamic", "--undefined-only", "--demangle", LIBRARY]
    symbols = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "aoti_torch_" in symbols
    assert not [line for line in symbols.splitlines() if any(name in line for name in ("at::", "c10::", "torch::"))]
    # Nor the driver's or the runtime's libraries.
    assert " cu" not in symbols


def test_a_missing_library_has_an_error_of_its_own(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(_extension, "cuda_library_path", lambda: None)
    with pytest.raises(ImportError, match="natten2 was built without nvcc"):
        _extension.load_cuda_library.__wrapped__()


@needs_library
@needs_cuobjdump
@pytest.mark.parametrize("target", [pytest.param(TARGETS[0], marks=pytest.mark.long), TARGETS[1]])
def test_builds(target: str):
    found = list(builds(LIBRARY, [target]))
    assert len(found) <= 60
    check_builds(found)


def check_builds(found: Sequence[Build]) -> None:
    kernels = {(build.kernel, build.number, build.channels) for build in found}
    for kernel in ("forward", "grad_query", "grad_key_value"):
        assert {
            (kernel, number, channels) for number in ("Half", "BFloat16") for channels in (32, 64, 128, 256)
        } < kernels
        assert {(kernel, "Float", channels) for channels in (32, 64, 128)} < kernels
    for build in found:
        if build.kernel == "delta":
            continue
        assert build.matrix_instructions > 0, build
        assert build.wide_copies > 0, build
        assert build.wide_stores > 0, build
        assert build.loop_spills == 0, build
        if build.number != "Float":
            assert build.matrix_loads > 0, build
        if build.target == "sm_90":
            assert build.spills == 0, build
            assert build.stack == 0, build


def test_where_there_is_no_nvcc_cmake_says_so(tmp_path: Path):
    path = os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"]))
    source = Path(__file__).parent.parent
    # An empty compiler is one that was looked for and not found.
    options = [f"-DPython_EXECUTABLE={sys.executable}", "-DCMAKE_CUDA_COMPILER="]
    command = [shutil.which("cmake", path=path), "-S", source, "-B", tmp_path, *options]
    environment = os.environ | {"PATH": path}
    result = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "No nvcc: the CUDA C++ kernels are left out" in result.stdout
