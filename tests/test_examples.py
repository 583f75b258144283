"""The programs of examples/, in short runs."""

from __future__ import annotations

from pathlib import Path
from statistics import fmean

import pytest
import torch
from torch.nn import functional

pytest.importorskip("matplotlib")
pytest.importorskip("sklearn")
pytest.importorskip("tqdm")

from matplotlib.image import imread

from benchmarks.timing import threads
from examples import attention_map, digits
from examples.digits_picture import QUERIES, Query, _keys, draw


def test_digits_learns_compares_and_draws(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    picture = tmp_path / "new" / "digits.png"
    losses = digits.main(["--quick", "--no-compile", "--out", str(picture)])

    assert fmean(losses[-10:]) < fmean(losses[:10]) - 0.1
    pixels = imread(picture)
    assert min(pixels.shape[:2]) > 500
    assert pixels.std() > 0.05
    printed = capsys.readouterr().out
    for line in (
        "Accuracy on 360 held-out scans",
        "nat-tiny-4",
        "gather takes",
        "swin takes",
        str(picture),
        "README.md",
    ):
        assert line in printed


def test_digits_repeats_with_the_same_seed():
    options = digits.parse(["--quick", "--no-compile", "--epochs", "1", "--batch-size", "256"])
    scans = digits.load()

    def losses(seed: int) -> list[float]:
        torch.manual_seed(seed)
        return digits.train(digits.NAT(digits.CONFIG), scans, options)

    with threads(1):
        first, again, other = losses(0), losses(0), losses(1)
    assert first == again
    assert first != other


def test_low_accuracy_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(digits, "compare", lambda *_: [])
    monkeypatch.setattr(digits, "format_records", lambda _: "")
    picture = tmp_path / "digits.png"
    with pytest.raises(SystemExit, match=r"error: the accuracy is .*%, less than 97%"):
        digits.main(["--no-compile", "--epochs", "1", "--batch-size", "256", "--out", str(picture)])
    assert picture.exists()


@pytest.mark.parametrize("arguments", [["--epochs", "0"], ["--batch-size", "0"], ["--batch-size", "257"]])
def test_senseless_options_are_refused(arguments: list[str]):
    with pytest.raises(SystemExit) as exit_info:
        digits.parse(arguments)
    assert exit_info.value.code == 2


def test_held_out_scans_are_disjoint_and_balanced():
    data = digits.load()
    assert len(data.train_labels) + len(data.test_labels) == 1797
    assert data.test_scans.shape == (360, 1, 8, 8)
    assert data.test_labels.bincount().min() >= 34
    assert data.train_scans.min() == 0
    assert data.train_scans.max() == 1


def test_enlarging_is_bilinear_interpolation():
    scans = digits.load().test_scans[:4]
    images = digits.enlarge(scans)
    assert images.shape == (4, 1, 32, 32)
    # Beyond the border one repeats the last pixel, the other sees paper.
    inside = (..., slice(2, -2), slice(2, -2))
    torch.testing.assert_close(images[inside], functional.interpolate(scans, scale_factor=4, mode="bilinear")[inside])


def test_a_change_of_the_map_moves_the_image():
    scans = digits.load().test_scans[:4]
    one_token = torch.tensor([[0.0, 0.0, 2 / 8], [0.0, 0.0, 0.0]])
    torch.testing.assert_close(digits.enlarge(scans, one_token)[..., :-4], digits.enlarge(scans)[..., 4:])


@pytest.mark.parametrize("query", QUERIES, ids=lambda query: query.title)
def test_drawn_windows_stay_inside_and_hold_the_query(query: Query):
    keys = list(_keys(query, 3, (8, 8)))
    assert len(set(keys)) == 9
    assert query.token in keys
    assert all(0 <= row < 8 and 0 <= column < 8 for row, column in keys)


def test_a_picture_without_mistakes(tmp_path: Path):
    data = digits.load()
    scans, labels = data.test_scans[:5], data.test_labels[:5]
    draw(tmp_path / "few.png", scans, labels, labels.clone(), kernel_size=3)
    assert (tmp_path / "few.png").stat().st_size > 10_000


def test_attention_maps_are_weights_over_a_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    path = tmp_path / "new" / "map.png"
    maps = attention_map.main(["--kernel-size", "5", "--dilation", "3", "--out", str(path)])
    torch.testing.assert_close(maps.sum((1, 2)), torch.ones(4))
    assert ((maps > 0).sum((1, 2)) <= 25).all()
    # A query looks like itself most of all.
    assert [tuple(divmod(int(index), maps.shape[2])) for index in maps.flatten(1).argmax(1)] == [
        (int(y * (maps.shape[1] - 1)), int(x * (maps.shape[2] - 1))) for y, x in attention_map.QUERIES
    ]
    pixels = imread(path)
    assert min(pixels.shape[:2]) > 500
    assert pixels.std() > 0.05
    # Any other picture does as well.
    attention_map.main([str(path), "--out", str(tmp_path / "again.png")])
    assert "169 keys" in capsys.readouterr().out
