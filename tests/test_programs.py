"""Training, validation, prediction and export, on a folder of small images."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

pytest.importorskip("matplotlib")
pytest.importorskip("sklearn")
pytest.importorskip("tqdm")

from matplotlib.image import imread
from PIL import Image

from benchmarks.timing import threads
from examples import export, predict, train, validate
from examples.images import Images, open_images, prepare, randomly_cropped, read_image
from examples.parallel import Share
from examples.train import BEST, LAST
from examples.trained import load_trained

ROOT = Path(__file__).parent.parent
CONFIG = {"depths": [1], "num_heads": 2, "embed_dim": 16, "kernel_size": 3, "patch_size": 4}
SIZE = 32


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Noisy stripes, lying and standing."""
    root, random = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for split, count in (("train", 24), ("val", 9)):
        for name in ("lying", "standing"):
            (root / split / name).mkdir(parents=True)
            for index in range(count):
                stripes = np.broadcast_to((np.arange(36)[:, None] // 3 + index) % 2 * 200.0, (36, 36))
                pixels = (stripes if name == "lying" else stripes.T) + random.uniform(0, 55, (36, 36))
                Image.fromarray(pixels.astype(np.uint8)).save(root / split / name / f"{index}.png")
    return root


def options(folder: Path, out: Path, *more: str) -> list[str]:
    size = ["--image-size", str(SIZE), "--batch-size", "8", "--epochs", "4", "--rate", "0.01", "--ema", "0.9"]
    return ["--data", str(folder), "--config", json.dumps(CONFIG), *size, "--out", str(out), *more]


@pytest.fixture(scope="module")
def run(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished training."""
    out = tmp_path_factory.mktemp("run")
    with threads(1):
        train.main(options(folder, out, "--epochs", "8"))
    return out


def read(path: Path) -> dict:
    return torch.load(path, weights_only=True)


def assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    assert actual.keys() == expected.keys()
    for name, tensor in actual.items():
        torch.testing.assert_close(tensor, expected[name], rtol=tolerance, atol=tolerance, msg=name)


def test_training_learns_and_leaves_checkpoints_and_a_plot(run: Path):
    last, best = read(run / LAST), read(run / BEST)
    losses = [epoch["loss"] for epoch in last["history"]]
    assert losses[-1] < losses[0] - 0.2
    accuracies = [epoch["accuracy"] for epoch in last["history"]]
    assert max(accuracies) == best["history"][-1]["accuracy"] > 0.9
    assert (last["classes"], last["image_size"]) == (["lying", "standing"], SIZE)
    assert (last["ema"]["head.weight"] - last["model"]["head.weight"]).abs().max() > 1e-4
    pixels = imread(run / "training.png")
    assert min(pixels.shape[:2]) > 300
    assert pixels.std() > 0.05


def test_a_resumed_training_ends_in_the_same_weights(folder: Path, tmp_path: Path):
    with threads(1):
        train.main(options(folder, tmp_path / "whole"))
        train.main(options(folder, tmp_path / "parts", "--stop-after", "1"))
        assert len(read(tmp_path / "parts" / LAST)["history"]) == 1
        history = train.main(options(folder, tmp_path / "parts", "--resume"))
    whole, parts = (read(tmp_path / name / LAST) for name in ("whole", "parts"))
    assert history == whole["history"]
    for weights in ("model", "ema"):
        assert_same(parts[weights], whole[weights], tolerance=0)


def launch(*arguments: str) -> None:
    """A program on two processes."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", *arguments]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


def test_two_processes_train_as_one_does(folder: Path, tmp_path: Path):
    plain = ("--no-augment", "--stop-after", "2", "--epochs", "2")
    with threads(1):
        train.main(options(folder, tmp_path / "one", *plain))
        # FSDP goes on from the first epoch of one process.
        train.main(options(folder, tmp_path / "fsdp", *plain, "--stop-after", "1"))
    halves = ("--batch-size", "4")
    launch("examples.train", *options(folder, tmp_path / "ddp", *plain, *halves))
    launch("examples.train", *options(folder, tmp_path / "fsdp", *plain, *halves, "--parallel", "fsdp", "--resume"))
    one = read(tmp_path / "one" / LAST)
    for kind in ("ddp", "fsdp"):
        two = read(tmp_path / kind / LAST)
        for weights in ("model", "ema"):
            assert_same(two[weights], one[weights], tolerance=1e-4)
        assert two["history"][1] == pytest.approx(one["history"][1], rel=1e-3)


@pytest.mark.long
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_a_compiled_training_in_bfloat16_on_two_processes(folder: Path, tmp_path: Path, parallel: str):
    launch("examples.train", *options(folder, tmp_path, "--compile", "--amp", "--parallel", parallel))
    history = read(tmp_path / LAST)["history"]
    assert len(history) == 4
    assert history[-1]["loss"] < history[0]["loss"]


def test_resuming_another_model_is_an_error(folder: Path, run: Path):
    other = json.dumps(CONFIG | {"embed_dim": 32})
    with pytest.raises(SystemExit, match=r"last.pth is of another model than the options say"):
        train.main(options(folder, run, "--config", other, "--resume"))


def test_validation_finds_the_accuracy_of_the_training(folder: Path, run: Path, capsys: pytest.CaptureFixture[str]):
    first, among = validate.main([str(run / BEST), "--data", str(folder), "--batch-size", "5"])
    assert first == read(run / BEST)["history"][-1]["accuracy"]
    assert among == 1.0
    assert f"18 images: top-1 {first:.2%}, top-5 100.00%" in capsys.readouterr().out


def test_prediction_prints_the_top_classes(folder: Path, run: Path, capsys: pytest.CaptureFixture[str]):
    for name in ("lying", "standing"):
        found = predict.main([str(folder / "val" / name / "0.png"), str(run / BEST)])
        assert found[0][0] == name
        assert sum(probability for _, probability in found) == pytest.approx(1.0)
        assert re.match(rf"{name} +\d+\.\d%  █+\n", capsys.readouterr().out)
    assert len(predict.main([str(folder / "val" / "lying" / "0.png"), str(run / LAST), "--top", "1", "--raw"])) == 1


def test_a_package_predicts_the_same_in_a_fresh_process(
    folder: Path, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    with threads(1):
        export.main([str(run / BEST), "--out", str(tmp_path / "model.pt2"), "--graph", str(tmp_path / "graph.pt2")])
    image = folder / "val" / "standing" / "3.png"
    # A tensor that is not contiguous, which compiled code would misread.
    inputs = torch.stack([prepare(read_image(image), SIZE)] * 3).contiguous(memory_format=torch.channels_last)
    trained, package = load_trained(run / BEST), export.load_package(tmp_path / "model.pt2")
    torch.testing.assert_close(package.logits(inputs), trained.logits(inputs), rtol=1e-4, atol=1e-4)
    graph = torch.export.load(tmp_path / "graph.pt2").module()
    torch.testing.assert_close(graph(inputs), trained.logits(inputs), rtol=1e-4, atol=1e-4)

    capsys.readouterr()
    predict.main([str(image), str(run / BEST)])
    expected = capsys.readouterr().out
    for model in (run / BEST, tmp_path / "model.pt2"):
        command = [sys.executable, "-m", "examples.predict", str(image), str(model)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
        assert done.stdout == expected, done.stderr
    assert expected.startswith("standing")


@pytest.mark.parametrize(
    ("program", "arguments", "message"),
    [
        (validate, ["missing.pth"], "No such file or directory: 'missing.pth'"),
        (validate, ["README.md"], "README.md can't be read as a checkpoint"),
        (predict, ["README.md", "BEST"], "README.md can't be read as an image"),
        (predict, ["missing.png", "BEST"], "missing.png can't be read as an image"),
        (predict, ["missing.png", "missing.pt2"], "missing.pt2 must be a package of examples.export, but is no file"),
        (validate, ["BEST", "--data", "digits"], "the model knows 2 classes, but the data have 10"),
        (validate, ["BEST", "--data", "missing"], "'digits' or a folder with val/CLASS/*.jpg, but missing/val has no"),
        (validate, ["BEST", "--model", "nat_mini"], "best.pth doesn't fit the model"),
        (export, ["BEST", "--out", "model.pth"], "--out must end in .pt2, got model.pth"),
        (train, ["--config", "[1]"], "--config must be a JSON object"),
        (train, ["--epochs", "0"], "must be at least 1, got 0"),
        (train, ["--model", "resnet"], "invalid choice: 'resnet'"),
    ],
)
def test_what_is_wrong_is_told(program, arguments: list[str], message: str, run: Path, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    with pytest.raises(SystemExit) as exit_info:
        program.main([str(run / BEST) if argument == "BEST" else argument for argument in arguments])
    assert exit_info.value.code == 2
    assert message in capsys.readouterr().err


def test_crops_are_square_normalized_and_inside():
    pixels = np.zeros((40, 80, 3), np.uint8)
    pixels[:, 20:60] = 255
    image = Image.fromarray(pixels)
    white = ((1 - torch.tensor([0.485, 0.456, 0.406])) / torch.tensor([0.229, 0.224, 0.225])).view(3, 1, 1)
    torch.testing.assert_close(prepare(image, 8), white.expand(3, 8, 8))
    crops = torch.stack([randomly_cropped(image, 8, flip=True) for _ in range(20)])
    assert crops.shape == (20, 3, 8, 8)
    assert crops.is_contiguous()
    assert crops.std(0).min() > 0


def test_digits_are_split_and_seen_whole():
    train_images, val_images = (open_images("digits", split, 32) for split in ("train", "val"))
    assert (len(train_images), len(val_images)) == (1437, 360)
    assert val_images.classes == list("0123456789")
    image, label = val_images[0]
    assert image.shape == (3, 32, 32)
    assert label in range(10)
    assert (train_images.augment, train_images.flip, val_images.augment) == (True, False, False)


def test_shares_cover_the_data_and_are_equal(monkeypatch: pytest.MonkeyPatch):
    from examples import parallel

    monkeypatch.setattr(parallel, "world_size", lambda: 3)
    shares, own = [], []
    for rank in range(3):
        monkeypatch.setattr(parallel, "rank", lambda rank=rank: rank)
        share = Share(7, shuffle=True)
        share.epoch = 2
        shares.append(list(share))
        own.append(share.own)
    assert [len(share) for share in shares] == [3, 3, 3]
    assert own == [3, 2, 2]
    assert sorted(index for share, count in zip(shares, own, strict=True) for index in share[:count]) == list(range(7))


def test_images_of_any_mode_are_read(tmp_path: Path):
    for mode in ("L", "RGBA", "P", "CMYK", "1"):
        Image.new(mode, (5, 7)).save(tmp_path / "image.tiff")
        assert read_image(tmp_path / "image.tiff").mode == "RGB"
    assert isinstance(open_images("digits", "val", 8), Images)
