"""Files of weights: every layout that is read, and what a file that doesn't fit leaves behind."""

from __future__ import annotations

import hashlib
import json
import math
import os
import pickle
import re
import struct
from argparse import Namespace
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from golden_models import state_dict_shapes
from torch import Tensor, nn

from natten2.models import NAT, NATConfig, NATFeatures, load_checkpoint
from natten2.models.zoo import CONFIGS

TINY = NATConfig(
    depths=(2, 1), num_heads=(2, 4), embed_dim=8, kernel_size=3, num_classes=5, drop_path_rate=0.1, layer_scale=0.1
)
State = dict[str, Tensor]


def make(model: type[NAT] | type[NATFeatures] = NAT, seed: int = 0, **changes: object) -> NAT | NATFeatures:
    torch.manual_seed(seed)
    made = model(replace(TINY, **changes))
    for parameter in made.parameters():
        nn.init.normal_(parameter)
    return made


def copied(model: nn.Module) -> State:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_same(actual: State, expected: State) -> None:
    assert actual.keys() == expected.keys()
    for name, tensor in actual.items():
        torch.testing.assert_close(tensor, expected[name], rtol=0, atol=0, msg=name)


def save_safetensors(state: State, path: Path) -> None:
    """Written after the format's description, apart from the reader."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    data = b""
    names = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.float64: "F64"}
    for name, tensor in state.items():
        raw = tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()
        place = [len(data), len(data) + len(raw)]
        header[name] = {"dtype": names[tensor.dtype], "shape": list(tensor.shape), "data_offsets": place}
        data += raw
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


def hugging_face(state: State, prefix: str = "nat.") -> State:
    """The names of Nat and Dinat in transformers, with `classifier` outside of the backbone."""
    exact = {
        "norm1": "layernorm_before",
        "norm2": "layernorm_after",
        "attn.rpb": "attention.self.rpb",
        "attn.proj": "attention.output.dense",
        "mlp.fc1": "intermediate.dense",
        "mlp.fc2": "output.dense",
    }
    theirs: State = {}
    for name, tensor in state.items():
        if block := re.fullmatch(r"levels\.(\d+)\.blocks\.(\d+)\.(.*?)(\.weight|\.bias)?", name):
            layer, part, kind = f"encoder.levels.{block[1]}.layers.{block[2]}.", block[3], block[4] or ""
            if part == "attn.qkv":
                for target, third in zip(("query", "key", "value"), tensor.chunk(3), strict=True):
                    theirs[f"{prefix}{layer}attention.self.{target}{kind}"] = third
            elif part == "gamma1":
                pair = torch.stack([tensor, state[name.replace("gamma1", "gamma2")]])
                theirs[f"{prefix}{layer}layer_scale_parameters"] = pair
            elif part != "gamma2":
                theirs[f"{prefix}{layer}{exact[part]}{kind}"] = tensor
        elif name.startswith("head."):
            theirs[name.replace("head", "classifier")] = tensor
        elif feature := re.fullmatch(r"norm(\d)\.(.*)", name):
            theirs[f"{prefix}hidden_states_norms.stage{int(feature[1]) + 1}.{feature[2]}"] = tensor
        else:
            name = re.sub("^levels", "encoder.levels", name).replace("patch_embed.norm", "embeddings.norm")
            name = name.replace("patch_embed.proj", "embeddings.patch_embeddings.projection")
            theirs[prefix + re.sub(r"^norm", "layernorm", name)] = tensor
    return theirs


def renamed(prefix: str) -> Callable[[State], object]:
    return lambda state: {prefix + name: tensor for name, tensor in state.items()}


LAYOUTS: dict[str, Callable[[State], object]] = {
    "flat": dict,
    "state_dict": lambda state: {"state_dict": state, "epoch": 3, "args": Namespace(model="nat_tiny")},
    "model": lambda state: {"model": state, "optimizer": {"state": {}}, "step": torch.tensor(7)},
    "nested": lambda state: {"model": {"state_dict": state}},
    "ema": lambda state: {"ema": renamed("module.")(state) | {"n_averaged": torch.tensor(3)}},
    "data-parallel": lambda state: {"state_dict": renamed("module.")(state)},
    "compiled": renamed("_orig_mod."),
    "parallel-compiled": renamed("module._orig_mod."),
    "compiled-blocks": lambda state: {re.sub(r"(blocks\.\d+\.)", r"\1_orig_mod.", key): x for key, x in state.items()},
    "hugging-face-nat": hugging_face,
    "hugging-face-dinat": lambda state: hugging_face(state, "dinat."),
    "parameters": lambda state: {name: nn.Parameter(tensor) for name, tensor in state.items()},
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_is_read(layout: str, tmp_path: Path):
    expected = copied(make())
    torch.save(LAYOUTS[layout](expected), tmp_path / "model.pth")
    model = make(seed=1)
    report = load_checkpoint(model, tmp_path / "model.pth")
    assert_same(model.state_dict(), expected)
    assert report.is_complete
    assert set(report.loaded) == expected.keys()


@pytest.mark.parametrize("layout", ["flat", "hugging-face-nat"])
def test_safetensors_are_read(layout: str, tmp_path: Path):
    expected = copied(make())
    for name in ("model.safetensors", "pytorch_model.bin"):
        save_safetensors(LAYOUTS[layout](expected), tmp_path / name)
        model = make(seed=1)
        assert load_checkpoint(model, str(tmp_path / name)).is_complete
        assert_same(model.state_dict(), expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_weights_are_cast_to_the_models_dtype(dtype: torch.dtype, tmp_path: Path):
    expected = {name: tensor.to(dtype) for name, tensor in make().state_dict().items()}
    save_safetensors(expected, tmp_path / "model.safetensors")
    model = make(seed=1)
    load_checkpoint(model, tmp_path / "model.safetensors")
    assert_same(model.state_dict(), {name: tensor.float() for name, tensor in expected.items()})


@pytest.mark.parametrize("name", ["dinat_s_tiny", "nat_isotropic_small", "vitrpb_small"])
def test_released_names_of_other_structures(name: str, tmp_path: Path):
    # The names and shapes of the released file, with weights that take no space.
    state = {key: torch.zeros(()).expand(shape) for key, shape in state_dict_shapes(name).items()}
    state["head.bias"] = torch.arange(1000.0)
    torch.save(state, tmp_path / "model.pth")
    model = NAT(CONFIGS[name])
    assert load_checkpoint(model, tmp_path / "model.pth").is_complete
    torch.testing.assert_close(model.head.bias, torch.arange(1000.0))
    assert model.patch_embed.proj.weight.abs().max() == 0


def detector(state: State) -> dict[str, object]:
    others = {"neck.lateral_convs.0.conv.weight": torch.zeros(2, 2), "decode_head.conv_seg.bias": torch.zeros(3)}
    return {"meta": {"epoch": 36}, "state_dict": renamed("backbone.")(state) | others}


@pytest.mark.parametrize("patch_size", [None, 4])
def test_backbones_of_detectors_are_read(patch_size: int | None, tmp_path: Path):
    expected = copied(make(NATFeatures, patch_size=patch_size))
    torch.save(detector(expected), tmp_path / "detector.pth")
    model = make(NATFeatures, seed=1, patch_size=patch_size)
    report = load_checkpoint(model, tmp_path / "detector.pth")
    assert_same(model.state_dict(), expected)
    assert set(report.ignored) == {"neck.lateral_convs.0.conv.weight", "decode_head.conv_seg.bias"}
    assert "2 ignored (neck." in str(report)


def test_hugging_face_backbones_are_read(tmp_path: Path):
    expected = copied(make(NATFeatures))
    for prefix in ("", "backbone.", "model.pixel_level_module.encoder."):
        torch.save(hugging_face(expected, prefix), tmp_path / "backbone.bin")
        model = make(NATFeatures, seed=1)
        assert load_checkpoint(model, tmp_path / "backbone.bin").is_complete
        assert_same(model.state_dict(), expected)


def test_a_classifier_serves_a_pyramid_when_strict_is_off(tmp_path: Path):
    expected = copied(make())
    torch.save(expected, tmp_path / "model.pth")
    model = make(NATFeatures, seed=1)
    before = copied(model)
    with pytest.raises(ValueError, match=r"4 missing \(norm0.weight, .*; 4 unexpected \(norm.weight, .*head.bias\)"):
        load_checkpoint(model, tmp_path / "model.pth")
    assert_same(model.state_dict(), before)
    report = load_checkpoint(model, tmp_path / "model.pth", strict=False)
    assert report.missing == ("norm0.weight", "norm0.bias", "norm1.weight", "norm1.bias")
    assert report.unexpected == ("norm.weight", "norm.bias", "head.weight", "head.bias")
    assert not report.is_complete
    norms = {name: before[name] for name in report.missing}
    shared = {name: tensor for name, tensor in expected.items() if name not in report.unexpected}
    assert_same(model.state_dict(), shared | norms)


def test_another_number_of_classes_keeps_its_head(tmp_path: Path):
    torch.save(copied(make()), tmp_path / "model.pth")
    model = make(seed=1, num_classes=7)
    head = model.head.weight.detach().clone()
    with pytest.raises(ValueError, match=r"2 of another shape \(head.weight \[5, 16\] for \[7, 16\], head.bias \[5\]"):
        load_checkpoint(model, tmp_path / "model.pth")
    report = load_checkpoint(model, tmp_path / "model.pth", strict=False)
    assert report.mismatched == (("head.weight", (5, 16), (7, 16)), ("head.bias", (5,), (7,)))
    torch.testing.assert_close(model.head.weight, head, rtol=0, atol=0)
    torch.testing.assert_close(model.norm.weight, make().norm.weight, rtol=0, atol=0)


def cubic(length: int, target: int) -> Tensor:
    """Cubic convolution with a = -0.75 as a matrix `[target, length]`: entries share the table's width."""
    matrix = torch.zeros(target, length)
    for index in range(target):
        place = (index + 0.5) * length / target - 0.5
        for tap in range(math.floor(place) - 1, math.floor(place) + 3):
            x, a = abs(place - tap), -0.75
            near, far = (a + 2) * x**3 - (a + 3) * x**2 + 1, a * (x**3 - 5 * x**2 + 8 * x - 4)
            matrix[index, min(max(tap, 0), length - 1)] += near if x <= 1 else far
    return matrix


@pytest.mark.parametrize("kernel_size", [2, 5, 11])
@pytest.mark.parametrize("layout", ["flat", "hugging-face-nat"])
def test_bias_tables_are_interpolated_on_request(kernel_size: int, layout: str, tmp_path: Path):
    expected = copied(make())
    torch.save(LAYOUTS[layout](expected), tmp_path / "model.pth")
    model = make(seed=1, kernel_size=kernel_size)
    with pytest.raises(ValueError, match=r"3 of another shape \(levels.0.blocks.0.attn.rpb \[2, 5, 5\] for"):
        load_checkpoint(model, tmp_path / "model.pth")
    report = load_checkpoint(model, tmp_path / "model.pth", interpolate_rpb=True)
    assert report.is_complete
    assert len(report.interpolated) == 3
    for name, tensor in model.state_dict().items():
        if name in report.interpolated:
            matrix = cubic(5, 2 * kernel_size - 1)
            torch.testing.assert_close(tensor, matrix @ expected[name] @ matrix.T)
        else:
            torch.testing.assert_close(tensor, expected[name], rtol=0, atol=0)


def test_interpolation_leaves_fitting_tables_alone(tmp_path: Path):
    expected = copied(make())
    torch.save(expected, tmp_path / "model.pth")
    model = make(seed=1)
    assert load_checkpoint(model, tmp_path / "model.pth", interpolate_rpb=True).interpolated == ()
    assert_same(model.state_dict(), expected)


class Malicious:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, (str(self.target),)


def refuse(path: Path, message: str, **arguments: object) -> None:
    """The file is refused, strictly or not, and the model is as it was."""
    model = make(seed=1)
    before = copied(model)
    for strict in (True, False):
        with pytest.raises(ValueError, match=message):
            load_checkpoint(model, path, strict=strict, **arguments)
        assert_same(model.state_dict(), before)


@pytest.mark.parametrize("write", [torch.save, lambda content, path: path.write_bytes(pickle.dumps(content))])
def test_code_is_never_run(write: Callable[[object, Path], object], tmp_path: Path):
    write(copied(make()) | {"extra": Malicious(tmp_path / "made")}, tmp_path / "model.pth")
    refuse(tmp_path / "model.pth", "model.pth is damaged, or holds more than tensors and plain values")
    assert not (tmp_path / "made").exists()


def test_the_global_that_is_refused_is_named(tmp_path: Path):
    torch.save(copied(make()) | {"extra": Malicious(tmp_path / "made")}, tmp_path / "model.pth")
    refuse(tmp_path / "model.pth", r"mkdir")


@pytest.mark.parametrize("kept", [0.0, 0.001, 0.3, 0.999])
@pytest.mark.parametrize("name", ["model.pth", "legacy.pth", "model.safetensors"])
def test_truncated_files_are_refused(kept: float, name: str, tmp_path: Path):
    path = tmp_path / name
    if name == "model.safetensors":
        save_safetensors(copied(make()), path)
    else:
        torch.save(copied(make()), path, _use_new_zipfile_serialization=name == "model.pth")
    content = path.read_bytes()
    path.write_bytes(content[: int(kept * len(content))])
    refuse(path, f"{name} is (damaged|truncated)")


@pytest.mark.parametrize(
    ("content", "start"),
    [
        (
            b"<!DOCTYPE html>\n<html><head><title>Not Found</title></head></html>",
            r"<!DOCTYPE html>\\n<html><head><title>Not",
        ),
        (b"version https://git-lfs.github.com/spec/v1", "version https://git-lfs"),
        (b"text", "text'$"),
    ],
)
def test_text_in_a_files_place_is_shown(content: bytes, start: str, tmp_path: Path):
    (tmp_path / "model.pth").write_bytes(content)
    refuse(tmp_path / "model.pth", f"model.pth is damaged, .*: it begins with the text '{start}")


def corrupt(entry: dict[str, object]) -> dict[str, object]:
    return {"patch_embed.proj.0.weight": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]} | entry}


@pytest.mark.parametrize(
    "header",
    [
        b"[]",
        b"{",
        b'{"a": 1}',
        b"[" * 100_000,
        json.dumps(corrupt({"data_offsets": [0, 8]})).encode(),
        json.dumps(corrupt({"data_offsets": [-4, 0]})).encode(),
        json.dumps(corrupt({"data_offsets": [4, 8]})).encode(),
        json.dumps(corrupt({"data_offsets": [0]})).encode(),
        json.dumps(corrupt({"shape": [2**40, 2**40], "data_offsets": [0, 4]})).encode(),
        json.dumps(corrupt({"shape": [True], "data_offsets": [0, 4]})).encode(),
        json.dumps(corrupt({"dtype": "F4"})).encode(),
        json.dumps(corrupt({"dtype": ["F32"]})).encode(),
    ],
)
def test_damaged_safetensors_are_refused(header: bytes, tmp_path: Path):
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + b"\0\0\0\0")
    refuse(tmp_path / "model.safetensors", "model.safetensors (is|must be of dtype)")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([1, 2], "must hold a NAT, DiNAT or DiNAT_s with its embedding, but has a list"),
        ({}, "has nothing"),
        ({"conv1.weight": torch.zeros(3)}, "has 'conv1.weight'"),
        ({"state_dict": {f"layer{i}": torch.zeros(3) for i in range(9)}}, "has 'state_dict'"),
        ({"patch_embed.proj.0.weight": torch.zeros(4, 3, 3, 3)}, r"doesn't fit .*: 1 tensors fit; 57 missing"),
        ({"patch_embed.proj.weight": "text"}, "must hold a NAT"),
        ({3: torch.zeros(1)}, "must hold a NAT"),
    ],
)
def test_other_contents_are_refused(content: object, message: str, tmp_path: Path):
    torch.save(content, tmp_path / "model.pth")
    refuse(tmp_path / "model.pth", message)


def test_a_dictionary_that_holds_itself_is_refused(tmp_path: Path):
    content: dict[str, object] = {}
    content["model"] = content
    torch.save(content, tmp_path / "model.pth")
    refuse(tmp_path / "model.pth", "must hold a NAT")


ISOTROPIC = {"patch_size": 8, "depths": (2,), "num_heads": 2}


@pytest.mark.parametrize("changes", [{"patch_size": 4}, {"embed_dim": 16}, ISOTROPIC])
def test_other_models_are_refused(changes: dict[str, object], tmp_path: Path):
    torch.save(copied(make(**changes)), tmp_path / "model.pth")
    refuse(tmp_path / "model.pth", "model.pth doesn't fit the model, which is unchanged: .* missing|another shape")


def test_a_deeper_model_is_refused(tmp_path: Path):
    torch.save(copied(make(depths=(2, 2))), tmp_path / "model.pth")
    model = make(seed=1)
    with pytest.raises(ValueError, match=r"15 unexpected \(levels.1.blocks.1.gamma1"):
        load_checkpoint(model, tmp_path / "model.pth")


@pytest.mark.parametrize(
    "tensor",
    [
        torch.zeros(8, dtype=torch.int64),
        torch.zeros(8, dtype=torch.complex64),
        torch.zeros(8).to_sparse(),
        torch.zeros(8, device="meta"),
    ],
)
def test_what_is_no_dense_real_tensor_is_refused(tensor: Tensor, tmp_path: Path):
    torch.save(copied(make()) | {"patch_embed.norm.bias": tensor}, tmp_path / "model.pth")
    model = make(seed=1)
    before = copied(model)
    with pytest.raises(ValueError, match=r"1 of another shape \(patch_embed.norm.bias \[\] for \[8\]"):
        load_checkpoint(model, tmp_path / "model.pth")
    assert_same(model.state_dict(), before)


def test_incomplete_hugging_face_blocks_are_told(tmp_path: Path):
    state = hugging_face(copied(make()))
    del state["nat.encoder.levels.0.layers.1.attention.self.key.weight"]
    torch.save(state, tmp_path / "model.pth")
    with pytest.raises(ValueError, match=r"1 missing \(levels.0.blocks.1.attn.qkv.weight\); 2 unexpected \(levels"):
        load_checkpoint(make(), tmp_path / "model.pth")


def test_key_and_prefix_choose_among_several(tmp_path: Path):
    student, teacher = copied(make()), copied(make(seed=2))
    torch.save({"model": student, "ema": renamed("module.")(teacher)}, tmp_path / "entries.pth")
    torch.save(renamed("student.")(student) | renamed("teacher.")(teacher), tmp_path / "prefixes.pth")
    model = make(seed=1)
    load_checkpoint(model, tmp_path / "entries.pth")
    assert_same(model.state_dict(), student)
    load_checkpoint(model, tmp_path / "entries.pth", key="ema")
    assert_same(model.state_dict(), teacher)
    load_checkpoint(model, tmp_path / "prefixes.pth", prefix="student.")
    assert_same(model.state_dict(), student)
    refuse(tmp_path / "prefixes.pth", "several models: prefix must be one of 'student.', 'teacher.'")
    refuse(tmp_path / "prefixes.pth", "prefix must be 'student.' or 'teacher.' in .*, got ''", prefix="")
    refuse(tmp_path / "entries.pth", "key must be one of .*'model', 'ema', got 'model_ema'", key="model_ema")


def test_the_digest_is_checked(tmp_path: Path):
    path = tmp_path / "model.pth"
    torch.save(copied(make()), path)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    model = make(seed=1)
    assert load_checkpoint(model, path, sha256=digest.upper()).is_complete
    refuse(path, f"must have the sha256 digest {'0' * 64}, but has {digest}", sha256="0" * 64)
    refuse(path, "sha256 must be 64 hexadecimal digits, got 'abc'", sha256="abc")


def test_urls_are_downloaded_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    path = tmp_path / "model.pth"
    expected = copied(make())
    torch.save(expected, path)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    refuse(path.as_uri(), "must have the sha256 digest", sha256="0" * 64)
    assert not list((tmp_path / "hub" / "checkpoints").iterdir())
    for _ in range(2):
        model = make(seed=1)
        load_checkpoint(model, path.as_uri(), sha256=digest)
        assert_same(model.state_dict(), expected)
        path.unlink(missing_ok=True)
    assert len(list((tmp_path / "hub" / "checkpoints").iterdir())) == 1
    with pytest.raises(OSError, match="missing"):
        load_checkpoint(model, (tmp_path / "missing.pth").as_uri())


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"path_or_url": "nothing.pth"}, FileNotFoundError, "path_or_url must be that of a file, got nothing.pth"),
        ({"path_or_url": "ftp://host/nat.pth"}, ValueError, "a URL with https, http, file, got 'ftp"),
        ({"path_or_url": 3}, TypeError, "path_or_url must be a string or a path, got 3"),
        ({"sha256": 3}, TypeError, "sha256 must be a string or None, got 3"),
        ({"key": 3}, TypeError, "key must be a string or None, got 3"),
        ({"prefix": 3}, TypeError, "prefix must be a string or None, got 3"),
        ({"model": nn.Linear(2, 2)}, TypeError, "model must be one of natten2.models, not in a wrapper, got Linear"),
        ({"model": nn.DataParallel(make())}, TypeError, "got DataParallel"),
    ],
)
def test_arguments_are_checked(arguments: dict, error: type[Exception], message: str, tmp_path: Path):
    torch.save(copied(make()), tmp_path / "model.pth")
    with pytest.raises(error, match=message):
        load_checkpoint(**{"model": make(), "path_or_url": tmp_path / "model.pth"} | arguments)


def test_a_model_without_storage_is_refused(tmp_path: Path):
    torch.save(copied(make()), tmp_path / "model.pth")
    with pytest.raises(NotImplementedError, match="model must be on one device before its weights are loaded"):
        load_checkpoint(make().to("meta"), tmp_path / "model.pth")
