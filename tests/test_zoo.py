"""The published models: names, shapes, parameters, and multiply-adds of the released ones; compilation; timm."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from importlib.machinery import SourceFileLoader
from math import prod
from pathlib import Path

import pytest
import torch
from golden_models import MODELS, state_dict_shapes
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch._inductor.utils import fresh_cache

from natten2 import models
from natten2._when_imported import when_imported
from natten2.models import NAT, NATConfig, NATFeatures, _timm, create, list_models
from natten2.models.block import Block, DropPath
from natten2.models.zoo import CONFIGS

ROOT = Path(__file__).parents[1]
# Billions of multiply-adds, as in the papers (arXiv 2204.07143, table 1; arXiv 2209.15001, tables 2, 3 and 6).
PUBLISHED_GIGA = {
    "nat_mini": 2.7,
    "nat_tiny": 4.3,
    "nat_small": 7.8,
    "nat_base": 13.7,
    "dinat_mini": 2.7,
    "dinat_tiny": 4.3,
    "dinat_small": 7.8,
    "dinat_base": 13.7,
    "dinat_large": 30.6,
    "dinat_large_384": 89.7,
    "dinat_large_384_11x11": 92.4,
    "dinat_s_tiny": 4.5,
    "dinat_s_small": 8.7,
    "dinat_s_base": 15.4,
    "dinat_s_large": 34.5,
    "dinat_s_large_384": 101.5,
    "nat_isotropic_small": 4.3,
    "nat_isotropic_base": 16.9,
    "dinat_isotropic_small": 4.3,
    "dinat_isotropic_base": 16.9,
    "vitrpb_small": 4.6,
    "vitrpb_base": 17.5,
}
# One of each structure, with the widest windows.
STRUCTURES = (
    "dinat_small",
    "nat_base",
    "dinat_large_384_11x11",
    "dinat_s_large_384",
    "dinat_isotropic_base",
    "vitrpb_base",
)


def on_meta(name: str, **arguments: object) -> NAT | NATFeatures:
    with torch.device("meta"):
        return create(name, **arguments)


def test_all_released_models_are_there() -> None:
    assert sorted(list_models()) == sorted(MODELS)
    assert set(models.__all__) >= set(MODELS)


@pytest.mark.parametrize("name", MODELS)
def test_parameters_are_those_of_the_released_checkpoint(name: str) -> None:
    model, released = on_meta(name), state_dict_shapes(name)
    # ViT's index tables are loaded and dropped: they say nothing that the places of tokens don't.
    learned = [(key, shape) for key, shape in released.items() if not key.endswith("relative_position_index")]
    assert [(key, list(tensor.shape)) for key, tensor in model.state_dict().items()] == learned
    assert sum(parameter.numel() for parameter in model.parameters()) == MODELS[name]["parameters"]
    model.load_state_dict({key: torch.empty(shape, device="meta") for key, shape in released.items()}, assign=True)


def count_macs(model: NAT, size: int) -> dict[str, int]:
    """Multiply-adds for one image, by kind; the attention's are those of the tokens without padding."""
    macs: Counter[str] = Counter()

    def convolution(module: nn.Conv2d, _: tuple[Tensor], output: Tensor) -> None:
        macs["conv"] += prod(output.shape[2:]) * module.weight.numel()

    def linear(module: nn.Linear, inputs: tuple[Tensor], _: Tensor) -> None:
        macs["linear"] += inputs[0].numel() // module.in_features * module.weight.numel()

    def norm(_: nn.LayerNorm, inputs: tuple[Tensor], __: Tensor) -> None:
        macs["norm"] += 5 * inputs[0].numel()

    def attention(block: Block, inputs: tuple[Tensor], _: Tensor) -> None:
        tokens, attn = prod(inputs[0].shape[1:3]), block.attn
        macs["linear"] += tokens * (attn.qkv.weight.numel() + attn.proj.weight.numel())
        macs["attn"] += 2 * tokens * prod(attn.kernel_size) * attn.embed_dim

    def pool(_: nn.LayerNorm, __: tuple[Tensor], output: Tensor) -> None:
        macs["pool"] += output.numel()

    hooks = {nn.Conv2d: convolution, nn.Linear: linear, nn.LayerNorm: norm, Block: attention}
    for module_name, module in model.named_modules():
        if type(module) in hooks and ".attn." not in module_name:
            module.register_forward_hook(hooks[type(module)])
    model.norm.register_forward_hook(pool)
    model(torch.empty(1, 3, size, size, device="meta"))
    return dict(macs)


@pytest.mark.parametrize("name", MODELS)
def test_multiply_adds_are_the_published_ones(name: str) -> None:
    macs = count_macs(on_meta(name), MODELS[name]["input_size"])
    assert macs == MODELS[name]["macs"]
    if name in PUBLISHED_GIGA:
        assert sum(macs.values()) / 1e9 == pytest.approx(PUBLISHED_GIGA[name], rel=0.02)


@pytest.mark.parametrize(
    ("name", "rate", "layer_scale", "dilations"),
    [
        ("nat_mini", 0.2, None, None),
        ("nat_base", 0.5, 1e-5, None),
        ("dinat_mini", 0.2, None, ((1, 8, 1), (1, 4, 1, 4), (1, 2) * 3, (1,) * 5)),
        ("dinat_small", 0.3, None, ((1, 8, 1), (1, 4, 1, 4), (1, 2) * 9, (1,) * 5)),
        ("dinat_base", 0.5, 1e-5, ((1, 8, 1), (1, 4, 1, 4), (1, 2) * 9, (1,) * 5)),
        ("dinat_large", 0.35, None, ((1, 8, 1), (1, 4, 1, 4), (1, 2) * 9, (1,) * 5)),
        ("dinat_large_21k", 0.2, None, ((1, 8, 1), (1, 4, 1, 4), (1, 2) * 9, (1,) * 5)),
        ("dinat_large_384", 0.35, None, ((1, 13, 1), (1, 6, 1, 6), (1, 3) * 9, (1,) * 5)),
        ("dinat_large_384_11x11", 0.35, None, ((1, 8, 1), (1, 4, 1, 4), (1, 2) * 9, (1,) * 5)),
        ("dinat_s_tiny", 0.2, None, ((1, 8), (1, 4), (1, 2) * 3, (1, 1))),
        ("dinat_s_large_384", 0.35, None, ((1, 13), (1, 6), (1, 3) * 9, (1, 1))),
        ("dinat_isotropic_base", 0.4, None, ((1, 2) * 6,)),
        ("vitrpb_small", 0.1, None, None),
    ],
)
def test_published_choices(name: str, rate: float, layer_scale: float | None, dilations: object) -> None:
    model = on_meta(name)
    rates = [module.rate for module in model.modules() if isinstance(module, DropPath)]
    assert rates == pytest.approx([rate * index / (len(rates) - 1) for index in range(len(rates))])
    assert model.config.layer_scale == layer_scale
    actual = [module.attn.dilation[0] for module in model.modules() if isinstance(module, Block)]
    assert actual == [d for level in dilations or () for d in level] or (dilations is None and set(actual) == {1})


def test_create_takes_every_field_of_the_config() -> None:
    model = on_meta("dinat_large_384", num_classes=0, in_chans=1, drop_path_rate=0.25, qkv_bias=False)
    assert isinstance(model.head, nn.Identity)
    assert model.patch_embed.proj[0].in_channels == 1
    assert model.levels[0].blocks[0].attn.qkv.bias is None
    assert model.config == replace(
        CONFIGS["dinat_large_384"], num_classes=0, in_chans=1, drop_path_rate=0.25, qkv_bias=False
    )


@pytest.mark.parametrize("name", ["nat_tiny", "dinat_s_tiny", "vitrpb_small"])
def test_every_name_is_a_function(name: str) -> None:
    function = getattr(models, name)
    assert (function.__name__, create.__module__) == (name, function.__module__)
    assert "create" in function.__doc__
    with torch.device("meta"):
        model = function(10, in_chans=1)
        features = function(features_only=True, out_indices=[0])
    assert model.config == replace(CONFIGS[name], num_classes=10, in_chans=1)
    assert isinstance(features, NATFeatures)


def test_features_have_the_names_of_detection_checkpoints() -> None:
    features, released = on_meta("nat_tiny", features_only=True), state_dict_shapes("nat_tiny")
    channels = (64, 128, 256, 512)
    norms = {f"norm{level}.{key}": [channels[level]] for level in range(4) for key in ("weight", "bias")}
    backbone = {key: shape for key, shape in released.items() if key.startswith(("patch_embed.", "levels."))}
    assert {key: list(tensor.shape) for key, tensor in features.state_dict().items()} == backbone | norms
    assert (features.channels, features.strides) == (channels, (4, 8, 16, 32))


def test_fewer_levels_are_left_out() -> None:
    features = on_meta("dinat_s_tiny", features_only=True, out_indices=(1,))
    assert (features.channels, features.strides, len(features.layers)) == ((192,), (8,), 2)
    assert features.layers[1].downsample is None


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (("nat_tinny",), ValueError, "name must be that of a published model, such as nat_tiny.*; got 'nat_tinny'"),
        (("resnet50",), ValueError, "such as nat_mini, nat_tiny.*; got 'resnet50'"),
        ((7,), TypeError, "name must be a string, got 7"),
        (("nat_tiny", -1), ValueError, "num_classes must be at least 0, got -1"),
        (("nat_tiny", "ten"), TypeError, "num_classes must be an integer, got 'ten'"),
    ],
)
def test_create_refuses(arguments: tuple[object, ...], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        create(*arguments)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"windows": 7}, TypeError, "windows"),
        ({"depths": (1, 1, 1, 1)}, ValueError, r"dilations\[0\] must be one integer or 1 of them"),
        ({"out_indices": (0, 1)}, ValueError, r"out_indices must come with features_only=True, got \(0, 1\)"),
        ({"features_only": 1}, TypeError, "features_only must be a bool, got 1"),
        ({"features_only": True, "out_indices": (4,)}, ValueError, "out_indices must name some of 4 levels"),
    ],
)
def test_create_refuses_overrides(arguments: dict[str, object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        on_meta("dinat_tiny", **arguments)


def thinned(name: str, levels: int = 4) -> NATConfig:
    """The structure of a published model with at most two blocks per level, and 8 channels per head."""
    config = CONFIGS[name]
    num_heads = config.num_heads[:levels]
    dilations = config.dilations and tuple(level[:2] for level in config.dilations[:levels])
    return replace(
        config,
        depths=tuple(min(depth, 2) for depth in config.depths[:levels]),
        num_heads=num_heads,
        dilations=dilations,
        embed_dim=8 * num_heads[0],
        drop_path_rate=0.0,
        num_classes=5,
    )


def weighted(model: NAT | NATFeatures) -> NAT | NATFeatures:
    """The model with weights that all show in its output, which initial layer scales, queries, and keys hardly do."""
    torch.manual_seed(0)
    for parameter in model.parameters():
        is_matrix = parameter.dim() in (2, 4)
        nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5 if is_matrix else 1.0)
    return model


@pytest.fixture(scope="module")
def shared_kernels() -> Iterator[None]:
    """Inductor makes every graph afresh, but compiles C++ that many models have in common only once."""
    with (
        fresh_cache(),
        torch._inductor.config.patch(force_disable_caches=False, fx_graph_cache=False),
        torch._functorch.config.patch(enable_autograd_cache=False),
    ):
        yield


def compiled(model: NAT | NATFeatures, backend: str) -> tuple[nn.Module, CompileCounterWithBackend]:
    torch.compiler.reset()
    counter = CompileCounterWithBackend(backend)
    return torch.compile(model, fullgraph=True, backend=counter), counter


def check_compiled(model: NAT | NATFeatures, images: Tensor, backend: str, tolerance: float) -> None:
    function, counter = compiled(model, backend)
    torch.testing.assert_close(function(images), model(images), rtol=tolerance, atol=tolerance)
    assert counter.frame_count == 1


@pytest.mark.parametrize("name", STRUCTURES)
def test_every_structure_traces_to_one_graph(name: str) -> None:
    check_compiled(NAT(thinned(name)).eval(), torch.randn(1, 3, 65, 50), "eager", tolerance=0)


def test_features_trace_to_one_graph() -> None:
    model = NATFeatures(thinned("dinat_s_tiny"), (0, 2)).eval()
    check_compiled(model, torch.randn(1, 3, 65, 50), "eager", tolerance=0)


@pytest.mark.long
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.usefixtures("shared_kernels")
def test_every_model_compiles_by_inductor(name: str) -> None:
    model, size = weighted(create(name)).eval(), MODELS[name]["input_size"]
    with torch.no_grad():
        check_compiled(model, torch.randn(1, 3, size, size), "inductor", tolerance=1e-5)


@pytest.mark.long
@pytest.mark.parametrize("name", STRUCTURES)
@pytest.mark.usefixtures("shared_kernels")
def test_every_structure_trains_by_inductor(name: str) -> None:
    model, images = weighted(NAT(thinned(name, levels=2))).double(), torch.randn(2, 3, 65, 50, dtype=torch.float64)
    function, counter = compiled(model, "inductor")

    def step(function: nn.Module) -> list[Tensor]:
        logits = function(images)
        return [logits, *torch.autograd.grad(logits.square().sum(), list(model.parameters()))]

    torch.testing.assert_close(step(function), step(model), rtol=1e-9, atol=1e-9)
    assert counter.frame_count == 1


# Of timm, what takes part in the registration.
TIMM = """
entries = {}

def register_model(entry):
    # What timm reads of a function: its name, and the module that it adds the name to.
    import sys
    assert isinstance(sys.modules[entry.__module__].__all__, list)
    entries[entry.__name__] = entry
    return entry
"""


@pytest.fixture
def timm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The file of a module `timm.models` that can be imported, but was not yet."""
    for name in ("timm", "timm.models"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "meta_path", list(sys.meta_path))
    (tmp_path / "timm").mkdir()
    (tmp_path / "timm" / "__init__.py").write_text("from timm import models")
    file = tmp_path / "timm" / "models.py"
    file.write_text(TIMM)
    yield file
    for name in ("timm", "timm.models"):
        sys.modules.pop(name, None)


@pytest.mark.usefixtures("timm")
def test_timm_gets_every_model() -> None:
    when_imported("timm.models", _timm.register)
    assert "timm" not in sys.modules
    registry = importlib.import_module("timm").models
    assert sorted(registry.entries) == sorted(MODELS)
    entry = registry.entries["dinat_tiny"]
    with torch.device("meta"):
        model = entry(pretrained=False, pretrained_cfg=None, pretrained_cfg_overlay=None, cache_dir=None, num_classes=7)
        features = entry(features_only=True, out_indices=(1, 2))
    assert model.config == replace(CONFIGS["dinat_tiny"], num_classes=7)
    assert features.channels == (128, 256)
    with pytest.raises(ValueError, match="pretrained must be False for dinat_tiny"):
        entry(pretrained=True)


def test_a_timm_without_the_registry_is_told(timm: Path) -> None:
    timm.write_text("")
    when_imported("timm.models", _timm.register)
    with pytest.warns(UserWarning, match="natten2's models are not in timm's registry: cannot import name 'register"):
        importlib.import_module("timm")


IMPORTS = """
import sys, natten2
assert "timm" not in sys.modules
if len(sys.argv) > 1:
    import timm
    assert sorted(timm.models.entries) == sorted(natten2.models.list_models())
"""


def test_timm_is_registered_with_by_import_alone(timm: Path) -> None:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join((str(timm.parents[1]), str(ROOT)))}
    command = (sys.executable, "-W", "error::UserWarning", "-c", IMPORTS)
    subprocess.run((*command, "timm"), env=environment, check=True)
    # A timm that can't be imported is none of our business.
    timm.write_text("raise RuntimeError")
    subprocess.run(command, env=environment, check=True)


def test_a_module_is_noticed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "meta_path", list(sys.meta_path))
    (tmp_path / "natten2_noticed.py").write_text("value = 1")
    calls: list[int] = []

    def act() -> None:
        calls.append(sys.modules["natten2_noticed"].value)

    before = len(sys.meta_path)
    when_imported("natten2_noticed", act)
    when_imported("natten2_missing", act)
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("natten2_missing")
    assert calls == []
    module = importlib.import_module("natten2_noticed")
    assert (calls, len(sys.meta_path)) == ([1], before)
    assert isinstance(module.__loader__, SourceFileLoader)
    importlib.reload(module)
    assert calls == [1]
    when_imported("natten2_noticed", act)
    assert calls == [1, 1]
    del sys.modules["natten2_noticed"]
