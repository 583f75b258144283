"""The package as a user gets it: built into a wheel and installed where nothing else is."""

import fcntl
import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest
import torch

import natten2
from natten2 import _extension

ROOT = Path(__file__).parent.parent
PROGRAM = """
import torch, natten2
assert "site-packages" in natten2.__file__, natten2.__file__
query = torch.randn(1, 8, 8, 2, 16, requires_grad=True)
natten2.na2d(query, query, query, 3).sum().backward()
print(natten2.__version__, tuple(query.grad.shape))
"""


def run(*command: str | Path, **options) -> subprocess.CompletedProcess:
    return subprocess.run([str(part) for part in command], text=True, capture_output=True, check=False, **options)


def clean_environment() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "NATTEN2"))}


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel of the sources, built with this environment's torch, once for all workers.

    It takes what `make build` has compiled; `test_an_isolated_build_installs` compiles everything.
    """
    own = tmp_path_factory.getbasetemp()
    folder = (own.parent if "PYTEST_XDIST_WORKER" in os.environ else own) / "wheel"
    folder.mkdir(exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not list(folder.glob("*.whl")):
            result = run(sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-w", folder, ROOT)
            assert result.returncode == 0, result.stdout + result.stderr
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def environment(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A new virtual environment that holds the wheel and sees this one's torch."""
    folder = tmp_path_factory.mktemp("environment")
    assert run(sys.executable, "-m", "venv", folder).returncode == 0
    site = folder / "lib" / f"python{sys.version_info.major}.{sys.version_info.minor}" / "site-packages"
    (site / "torch.pth").write_text(sysconfig.get_path("purelib"))
    result = run(folder / "bin" / "pip", "install", "--no-deps", "--no-index", wheel)
    assert result.returncode == 0, result.stdout + result.stderr
    return folder


def test_one_wheel_serves_every_python(wheel: Path):
    assert wheel.name.startswith(f"natten2-{natten2.__version__}-py3-none-")
    names = zipfile.ZipFile(wheel).namelist()
    assert "natten2/_C.so" in names
    has_cuda = _extension.cuda_library_path() is not None
    assert ("natten2/_cuda.so" in names) == has_cuda
    assert not [name for name in names if "csrc" in name]
    assert wheel.stat().st_size < (8_000_000 if has_cuda else 2_000_000)


def test_the_wheel_runs_in_an_empty_environment(environment: Path, tmp_path: Path):
    result = run(environment / "bin" / "python", "-c", PROGRAM, cwd=tmp_path, env=clean_environment())
    assert result.returncode == 0, result.stderr
    assert result.stdout.split("\n")[0] == f"{natten2.__version__} (1, 8, 8, 2, 16)"


def test_a_build_without_nvcc_says_so(environment: Path, tmp_path: Path):
    (installed,) = environment.glob("lib/*/site-packages/natten2")
    shutil.copytree(installed, tmp_path / "natten2", ignore=shutil.ignore_patterns("_cuda.so"))
    result = run(environment / "bin" / "python", "-m", "natten2", cwd=tmp_path, env=clean_environment())
    assert "CUDA C++ kernels  absent: natten2 was built without nvcc" in result.stdout


def test_a_missing_library_says_what_to_do(environment: Path, tmp_path: Path):
    package = tmp_path / "natten2"
    shutil.copytree(ROOT / "natten2", package, ignore=shutil.ignore_patterns("csrc", "__pycache__"))
    result = run(environment / "bin" / "python", "-c", "import natten2", cwd=tmp_path, env=clean_environment())
    assert result.returncode == 1
    assert f"ImportError: natten2's compiled library _C is missing from {package}. Install torch" in result.stderr
    assert "build it with `make build`" in result.stderr
    assert "\nbuild: " in (ROOT / "Makefile").read_text()


def test_an_unloadable_library_says_what_to_do(environment: Path, tmp_path: Path):
    package = tmp_path / "natten2"
    shutil.copytree(ROOT / "natten2", package, ignore=shutil.ignore_patterns("csrc", "__pycache__"))
    (package / "_C.so").write_bytes(b"no library")
    result = run(environment / "bin" / "python", "-c", "import natten2", cwd=tmp_path, env=clean_environment())
    assert result.returncode == 1
    assert f"{package}/_C.so can't be loaded under torch {torch.__version__}" in result.stderr


def test_every_instruction_set_can_be_forced():
    for name in _extension.cpu_capabilities():
        environment = os.environ | {"NATTEN2_CPU_CAPABILITY": name}
        result = run(
            sys.executable, "-c", "from natten2 import _extension as e; print(e.cpu_capability())", env=environment
        )
        assert result.stdout.strip() == name


def test_an_empty_instruction_set_is_none():
    result = run(sys.executable, "-c", "import natten2", env=os.environ | {"NATTEN2_CPU_CAPABILITY": ""})
    assert result.returncode == 0, result.stderr


def test_an_unknown_instruction_set_says_which_there_are():
    environment = os.environ | {"NATTEN2_CPU_CAPABILITY": "mmx"}
    result = run(sys.executable, "-c", "import natten2", env=environment)
    assert "ValueError: the CPU capability must be one of baseline" in result.stderr
    assert "got 'mmx'" in result.stderr


@pytest.mark.skipif(shutil.which("nm") is None, reason="binutils' nm lists the symbols")
def test_the_library_needs_only_the_stable_interface_of_torch():
    # A C++ name of torch's among the undefined symbols would tie the library to one torch release.
    symbols = run("nm", "--dynamic", "--undefined-only", "--demangle", _extension.library_path()).stdout
    assert "aoti_torch_" in symbols
    assert not [line for line in symbols.splitlines() if any(name in line for name in ("at::", "c10::", "torch::"))]


@pytest.mark.long
def test_an_isolated_build_installs(tmp_path: Path):
    folder = tmp_path / "environment"
    assert run(sys.executable, "-m", "venv", folder).returncode == 0
    pip = folder / "bin" / "pip"
    assert run(pip, "install", f"torch=={torch.__version__.split('+')[0]}").returncode == 0
    result = run(pip, "install", ROOT)
    assert result.returncode == 0, result.stdout + result.stderr
    result = run(folder / "bin" / "python", "-c", PROGRAM, cwd=tmp_path, env=clean_environment())
    assert result.returncode == 0, result.stderr
    assert "nvidia" not in run(pip, "list").stdout
