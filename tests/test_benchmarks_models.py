"""Swin-Tiny, and the benchmark of whole models."""

from __future__ import annotations

import argparse
import json
from math import prod
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("tqdm")

from benchmarks import models
from benchmarks.__main__ import main
from benchmarks.compare import WrongResultError
from benchmarks.memory import Memory
from benchmarks.swin import SwinLayer, SwinTiny
from natten2.models import NAT, NATConfig


def test_swin_tiny_has_the_published_parameters_and_multiply_adds():
    with torch.device("meta"):
        model = SwinTiny()
    assert sum(parameter.numel() for parameter in model.parameters()) == 28_288_354
    macs = 0

    def count(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        nonlocal macs
        if isinstance(module, nn.Linear):
            macs += prod(output.shape) * module.in_features
        elif isinstance(module, nn.Conv2d):
            macs += prod(output.shape) * module.weight[0].numel()
        elif isinstance(module, SwinLayer):
            macs += 2 * prod(output.shape) * module.window**2

    for module in model.modules():
        module.register_forward_hook(count)
    model(torch.empty(1, 3, 224, 224, device="meta"))
    assert macs / 1e9 == pytest.approx(4.5, rel=0.02)
    shifts = [module.shift for module in model.modules() if isinstance(module, SwinLayer)]
    assert shifts == [0, 3] * 5 + [0, 0]


def dense_shifted(layer: SwinLayer, input: Tensor) -> Tensor:
    """Windows as parts of each axis that begin `shift` tokens later: attention of all tokens under a mask."""
    batch, side, _, channels = input.shape
    tokens = torch.cartesian_prod(torch.arange(side), torch.arange(side))
    part = (tokens - layer.shift).div(layer.window, rounding_mode="floor")
    is_hidden = (part[:, None] != part[None]).any(-1)
    offset = (tokens[None] - tokens[:, None] + layer.window - 1).clamp(0, 2 * layer.window - 2)
    bias = layer.rpb[:, offset[..., 0], offset[..., 1]].masked_fill(is_hidden, float("-inf"))
    qkv = layer.qkv(input).view(batch, side * side, 3, layer.heads, -1).permute(2, 0, 3, 1, 4)
    scores = qkv[0] @ qkv[1].mT * (channels // layer.heads) ** -0.5 + bias
    return layer.proj((scores.softmax(-1) @ qkv[2]).transpose(1, 2).reshape(input.shape))


@pytest.mark.parametrize("is_fused", [False, True])
@pytest.mark.parametrize("shift", [0, 1, 2])
def test_shifted_windows_are_parts_of_the_axes(shift: int, is_fused: bool):
    layer = SwinLayer(8, 2, window=4, side=12, shift=shift, is_fused=is_fused).double()
    nn.init.normal_(layer.rpb)
    input = torch.randn(2, 12, 12, 8, dtype=torch.float64)
    torch.testing.assert_close(layer(input), dense_shifted(layer, input), rtol=1e-9, atol=1e-9)


class Small(nn.Module):
    """A rival that takes no time."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 1000)

    def forward(self, images: Tensor) -> Tensor:
        return self.linear(images.mean((2, 3)))


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    config = NATConfig(depths=(1,), num_heads=1, embed_dim=8, kernel_size=3, patch_size=56)
    monkeypatch.setattr(models, "MODELS", {"nat-tiny": lambda: NAT(config), "swin-tiny": Small})


@pytest.mark.usefixtures("small")
def test_models_writes_every_number_it_measured(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(models, "in_a_process", lambda _, name, *__: {"nat-tiny": 3, "swin-tiny": 4}[name] * 2**20)
    peaks = {"natten2": 7 * 2**20, "swin": 10 * 2**20}
    monkeypatch.setattr(models, "measure_memory", lambda dtype: Memory(dtype, 8, 56, 64, peaks))
    monkeypatch.setattr(models, "_SETTINGS", models.Settings(rounds=3, warmups=1, min_seconds=0.0))
    file = tmp_path / "models.json"
    main(["models", "--model", "swin-tiny", "--batch", "2", "--eager", "--memory", "--json", str(file)])
    content = json.loads(file.read_text())
    speeds = content["speeds"]
    assert [(speed["dtype"], speed["mode"]) for speed in speeds] == [
        (dtype, mode) for dtype in ("float32", "bfloat16") for mode in ("inference", "training")
    ]
    assert content["settings"]["rounds"] == 3
    printed = capsys.readouterr().out
    for speed in speeds:
        assert 0 < speed["ratio"]["swin-tiny"] < 1
        assert f"{speed['images_per_second']['nat-tiny']:.2f}" in printed
    assert "75%" in printed
    assert [layer["peak_bytes"] for layer in content["layers"]] == [peaks] * 2
    assert "70% of Swin's" in printed


@pytest.mark.usefixtures("small")
def test_a_model_that_is_compiled_wrongly_is_not_timed(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch, "compile", lambda model, **_: lambda images: model(images) * 1.01)
    options = argparse.Namespace(batch=2, threads=1, compile=True, memory=False)
    with pytest.raises(WrongResultError, match=r"nat-tiny, inference in torch.float32: relative error of the output"):
        models.measure(["nat-tiny"], "float32", "inference", options, models.Settings(rounds=1))
