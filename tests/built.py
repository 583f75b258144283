"""A build of natten2 of its own, beside the installed one."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

__all__ = ["ROOT", "Built", "check", "run"]

ROOT = Path(__file__).parent.parent


def run(*command: str | Path, cwd: Path | None = None, **variables: str) -> subprocess.CompletedProcess:
    """What a command with these environment variables, on one thread, gives."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"} | variables
    command = [str(part) for part in command]
    return subprocess.run(command, text=True, capture_output=True, check=False, env=environment, cwd=cwd)


def check(result: subprocess.CompletedProcess) -> None:
    """Raises where a command failed, with the end of what it printed."""
    assert result.returncode == 0, f"{result.returncode}\n{result.stdout[-4000:]}\n{result.stderr[-8000:]}"


class Built:
    """natten2 without CUDA kernels, built with these options of CMake in an empty folder."""

    def __init__(self, folder: Path, *options: str) -> None:
        self._folder = folder
        shutil.copytree(ROOT / "natten2", folder / "natten2", ignore=shutil.ignore_patterns("csrc", "_C*"))
        build = folder / "build"
        cmake = (sys.executable, "-m", "cmake")
        options = (*options, "-DNATTEN2_CUDA=OFF", f"-DPython_EXECUTABLE={sys.executable}")
        check(run(*cmake, "-S", ROOT, "-B", build, *options))
        check(run(*cmake, "--build", build, "--parallel", os.cpu_count() or 1))
        check(run(*cmake, "--install", build, "--prefix", folder))

    def run(self, *arguments: str | Path, **variables: str) -> subprocess.CompletedProcess:
        """Python with these arguments, whose natten2 is this one: `-S` hides an editable install."""
        path = os.pathsep.join((str(self._folder), sysconfig.get_path("purelib")))
        # Elsewhere the sources would hide it.
        return run(sys.executable, "-S", *arguments, cwd=self._folder, PYTHONPATH=path, **variables)

    def test(self, *tests: str, options: tuple[str, ...] = (), **variables: str) -> None:
        """Runs tests, files in this folder or single ones, all of which have to pass."""
        fixed = ("-x", "-c", ROOT / "pyproject.toml", "-o", "pythonpath=", "-o", "timeout=3600")
        paths = [ROOT / "tests" / name for name in tests]
        check(self.run("-m", "pytest", *fixed, "-p", "no:cacheprovider", *options, *paths, **variables))
