"""The README's program runs as it stands there."""

import re
from pathlib import Path

import pytest
import torch

README = Path(__file__).parent.parent / "README.md"


def test_the_ten_lines_run(monkeypatch: pytest.MonkeyPatch):
    # Compiling the whole model takes minutes, and tests of its own do that.
    monkeypatch.setattr(torch, "compile", lambda model, fullgraph: model)
    program = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)[0]
    variables: dict[str, object] = {}
    exec(program, variables)
    assert variables["output"].shape == (2, 56, 56, 4, 32)
    assert all(parameter.grad is not None for parameter in variables["model"].parameters())
