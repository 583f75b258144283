"""The report of `python -m natten2`: what was built, and which kernels run."""

from __future__ import annotations

import platform
import re
import sys
from pathlib import Path

import pytest
import torch
from test_main import Capture, Patch, printed, printed_by_a_process

import natten2
from natten2 import _extension, _report


def _entries(output: str) -> dict[str, dict[str, str]]:
    """The tables of the report by their headings."""
    tables: dict[str, dict[str, str]] = {}
    for paragraph in output.split("\n\n"):
        heading, *lines = paragraph.splitlines()
        tables[heading] = dict(re.split(r"  +", line.strip(), maxsplit=1) for line in lines)
    return tables


def test_report(monkeypatch: Patch, capsys: Capture) -> None:
    monkeypatch.delenv("NATTEN2_CPU_CAPABILITY", raising=False)
    tables = _entries(printed(capsys, ""))
    facts = tables[f"natten2 {natten2.__version__}"]
    assert facts["torch"] == torch.__version__
    assert facts["Python"] == sys.version.split()[0]
    assert facts["platform"] == platform.platform()
    assert Path(facts["library"]) == _extension.library_path()
    assert facts["CPU kernels"].endswith(f"; chosen: {_extension.cpu_capability()}")
    assert facts["CPU kernels"].startswith(", ".join(_extension.cpu_capabilities()) + " can run here")
    assert facts["threads"] == str(torch.get_num_threads())
    dtypes = "float64, float32, bfloat16, float16"
    for operator in ("na_forward", "na_backward"):
        kernels = tables[f"Kernels of {operator}"]
        assert list(kernels) == ["cpu", "cuda", "mps", "xpu"]
        has_cuda = torch._C._dispatch_has_kernel_for_dispatch_key(f"natten2::{operator}", "CUDA")
        assert kernels["cuda"].startswith("no kernel: the operator raises NotImplementedError") is not has_cuda
        assert kernels["cpu"] == f"C++ kernels ({_extension.cpu_capability()}): {dtypes}"
        for device_type in ("mps", "xpu"):
            if torch.get_device_module(device_type).device_count() == 0:
                assert kernels[device_type] == f"plain PyTorch reference: {dtypes} (untried)"


def test_report_says_what_the_operator_does_without_a_kernel(monkeypatch: Patch, capsys: Capture) -> None:
    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key

    def without_backward(operator: str, key: str) -> bool:
        return (operator, key) != ("natten2::na_backward", "CPU") and has_kernel(operator, key)

    monkeypatch.setattr(torch._C, "_dispatch_has_kernel_for_dispatch_key", without_backward)
    tables = _entries(printed(capsys, ""))
    assert tables["Kernels of na_forward"]["cpu"].startswith("C++ kernels")
    assert tables["Kernels of na_backward"]["cpu"] == "no kernel: the operator raises NotImplementedError"


@pytest.mark.parametrize("name", ["na_forward", "na_backward"])
def test_report_tries_dtypes(name: str, monkeypatch: Patch, capsys: Capture) -> None:
    operator = getattr(_report, name)

    class WithoutHalf:
        namespace, name, _opname = operator.namespace, operator.name, operator._opname

        def __call__(self, *arguments: object) -> object:
            if arguments[0].dtype is torch.float16:
                raise NotImplementedError
            return operator(*arguments)

    monkeypatch.setattr(_report, name, WithoutHalf())
    tables = _entries(printed(capsys, ""))
    assert tables[f"Kernels of {name}"]["cpu"].endswith(": float64, float32, bfloat16")


def test_report_lists_gpus(monkeypatch: Patch, capsys: Capture) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_name", ["First GPU", "Second GPU"].__getitem__)
    monkeypatch.setattr(torch.cuda, "get_device_capability", [(9, 0), (12, 1)].__getitem__)
    monkeypatch.setattr(torch.mps, "device_count", lambda: 0)
    monkeypatch.setattr(torch.xpu, "device_count", lambda: 0)
    facts = _entries(printed(capsys, ""))[f"natten2 {natten2.__version__}"]
    assert facts["cuda:0"] == "First GPU, compute capability 9.0"
    assert facts["cuda:1"] == "Second GPU, compute capability 12.1"
    assert "GPUs" not in facts
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert _entries(printed(capsys, ""))[f"natten2 {natten2.__version__}"]["GPUs"] == "none"


def test_report_of_a_chosen_instruction_set() -> None:
    tables = _entries(printed_by_a_process(NATTEN2_CPU_CAPABILITY="baseline"))
    facts = tables[f"natten2 {natten2.__version__}"]
    assert facts["CPU kernels"].endswith("; chosen: baseline, as NATTEN2_CPU_CAPABILITY asks")
    assert tables["Kernels of na_forward"]["cpu"].startswith("C++ kernels (baseline): ")
