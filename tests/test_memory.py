"""What the CPU kernels touch: nothing beside a tensor, and nothing beside a piece of scratch memory."""

import os
import platform
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from built import ROOT, Built, check, run

GUARDED = ROOT / "tests" / "guarded.py"
COMPILER = os.environ.get("CXX", "c++")

pytestmark = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="memory is guarded as glibc and Linux can")

# A tensor of one token more than there is memory for.
OVERRUN = """
import numpy as np, torch, natten2
short = np.zeros(4 * 20, np.float32)
query = torch.from_numpy(np.lib.stride_tricks.as_strided(short, (1, 21, 1, 4), (0, 16, 16, 4)))
natten2.na1d(query, query, query, 5)
"""
FREED = """
import ctypes, torch
tensor = torch.empty(21)
ctypes.memset(tensor.data_ptr() + 4 * 21, 1, 1)
del tensor
"""


def run_checked(*command: str | Path) -> subprocess.CompletedProcess:
    """A program that ends when it frees memory behind which something was written, as a result's is by the operator."""
    return run(*command, LD_PRELOAD="libc_malloc_debug.so.0", MALLOC_CHECK_="3")


def test_no_kernel_touches_what_is_beside_a_tensor():
    check(run_checked(sys.executable, GUARDED))


def test_a_kernel_that_touches_what_is_beside_a_tensor_ends():
    result = run(sys.executable, GUARDED, "1")
    assert result.returncode == -signal.SIGSEGV
    assert "in run" in result.stderr


@pytest.mark.skipif(platform.libc_ver() < ("glibc", "2.34"), reason="glibc 2.34 came with libc_malloc_debug")
def test_a_write_behind_a_result_ends():
    assert run_checked(sys.executable, "-c", FREED).returncode == -signal.SIGABRT


class Sanitized(Built):
    """natten2 under AddressSanitizer and UndefinedBehaviorSanitizer."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, "-DNATTEN2_SANITIZE=ON")

    def run(self, *arguments: str | Path, **variables: str) -> subprocess.CompletedProcess:
        """Python with these arguments, whose accesses are watched."""
        return super().run(
            *arguments,
            LD_PRELOAD=run(COMPILER, "-print-file-name=libasan.so").stdout.strip(),
            # Python frees little of what it has when it ends.
            ASAN_OPTIONS="detect_leaks=0",
            UBSAN_OPTIONS="print_stacktrace=1",
            **variables,
        )


@pytest.fixture(scope="module")
def sanitized(tmp_path_factory: pytest.TempPathFactory) -> Sanitized:
    if "Free Software Foundation" not in run(COMPILER, "--version").stdout:
        pytest.skip("the sanitizers are GCC's")
    return Sanitized(tmp_path_factory.mktemp("sanitized"))


TESTED = [
    "test_kernels.py::test_golden_cpp",
    "test_kernels.py::test_kernels_are_the_reference",
    "test_kernels.py::test_small_windows_are_the_reference",
    "test_kernels.py::test_wide_windows_are_the_reference",
    "test_kernels.py::test_every_head_dim",
    "test_kernels.py::test_a_long_line_is_cut_into_blocks",
    "test_kernels.py::test_a_tile_may_be_empty",
    "test_kernels.py::test_what_a_query_does_not_see_does_not_reach_it",
    "test_autograd.py::test_gradcheck",
    "test_autograd.py::test_results_are_the_same_bits_for_any_number_of_threads",
]


@pytest.mark.long
@pytest.mark.timeout(7200)
def test_the_sanitizers_find_nothing(sanitized: Sanitized):
    sanitized.test(*TESTED)
    check(sanitized.run(GUARDED))


@pytest.mark.long
@pytest.mark.timeout(7200)
def test_the_sanitizers_find_an_overrun(sanitized: Sanitized):
    result = sanitized.run("-c", OVERRUN)
    assert result.returncode != 0
    assert "AddressSanitizer: heap-buffer-overflow" in result.stderr
