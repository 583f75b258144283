"""The command line: the picture of a window, and its errors."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import natten2
from natten2.__main__ import main

Capture = pytest.CaptureFixture[str]
Patch = pytest.MonkeyPatch


@pytest.fixture(autouse=True)
def _terminal(monkeypatch: Patch) -> None:
    monkeypatch.setenv("COLUMNS", "80")


def printed(capsys: Capture, arguments: str) -> str:
    main(arguments.split())
    captured = capsys.readouterr()
    assert captured.err == ""
    return captured.out


PICTURES = {
    "--shape 6 12 --kernel-size 3 --query 2 5": """\
shape 6 x 12, kernel_size 3, stride 1, dilation 1
query (2, 5) sees 3 x 3 = 9 keys: key[:, 1:4, 4:7]

                       1 1
   0 1 2 3 4 5 6 7 8 9 0 1
0  · · · · · · · · · · · ·
1  · · · · ■ ■ ■ · · · · ·
2  · · · · ■ ◆ ■ · · · · ·
3  · · · · ■ ■ ■ · · · · ·
4  · · · · · · · · · · · ·
5  · · · · · · · · · · · ·

◆ query, also a key    ■ key    · hidden
Axis 0 runs down, axis 1 across.
""",
    "--shape 5 6 --kernel-size 3 4 --stride 1 3 --query 0 5": """\
shape 5 x 6, kernel_size 3 x 4, stride 1 x 3, dilation 1
query (0, 5) sees 3 x 4 = 12 keys: key[:, 0:3, 2:6]

   0 1 2 3 4 5
0  · · ■ ■ ■ ◆
1  · · ■ ■ ■ ■
2  · · ■ ■ ■ ■
3  · · · · · ·
4  · · · · · ·

◆ query, also a key    ■ key    · hidden
Axis 0 runs down, axis 1 across.
""",
    "--shape 7 11 --kernel-size 3 --dilation 2 3 --query 3 1": """\
shape 7 x 11, kernel_size 3, stride 1, dilation 2 x 3
query (3, 1) sees 3 x 3 = 9 keys: key[:, 1:6:2, 1:8:3]

                       1
   0 1 2 3 4 5 6 7 8 9 0
0  · · · · · · · · · · ·
1  · ■ · · ■ · · ■ · · ○
2  · · · · · · · · · · ·
3  · ◆ · · ■ · · ■ · · ○
4  · · · · · · · · · · ·
5  · ■ · · ■ · · ■ · · ○
6  · · · · · · · · · · ·

◆ query, also a key    ■ key    ○ hidden, same dilation group    · hidden
Axis 0 runs down, axis 1 across.
""",
    "--shape 6 6 --kernel-size 3 --causal": """\
shape 6 x 6, kernel_size 3, stride 1, dilation 1, causal
query (3, 3) sees 3 x 3 = 9 keys: key[:, 1:4, 1:4]

   0 1 2 3 4 5
0  · · · · · ·
1  · ■ ■ ■ · ·
2  · ■ ■ ■ · ·
3  · ■ ■ ◆ · ·
4  · · · · · ·
5  · · · · · ·

◆ query, also a key    ■ key    · hidden
Axis 0 runs down, axis 1 across.
""",
    "--shape 4 6 --kernel-size 3 --causal 1 0 --query 0": """\
shape 4 x 6, kernel_size 3, stride 1, dilation 1, causal on axis 0
query (0, 0) sees 1 x 3 = 3 keys: key[:, 0:1, 0:3]

   0 1 2 3 4 5
0  ◆ ■ ■ · · ·
1  · · · · · ·
2  · · · · · ·
3  · · · · · ·

◆ query, also a key    ■ key    · hidden
Axis 0 runs down, axis 1 across.
""",
    "--shape 14 --kernel-size 4 --dilation 3": """\
shape 14, kernel_size 4, stride 1, dilation 3
query (7) sees 4 keys: key[:, 1:11:3]

                    1 1 1 1
0 1 2 3 4 5 6 7 8 9 0 1 2 3
· ■ · · ■ · · ◆ · · ■ · · ○

◆ query, also a key    ■ key    ○ hidden, same dilation group    · hidden
""",
    "--shape 3 --kernel-size 2 --causal 1 --query 0": """\
shape 3, kernel_size 2, stride 1, dilation 1, causal
query (0) sees 1 key: key[:, 0:1]

0 1 2
◆ · ·

◆ query, also a key    · hidden
""",
    "--shape 5 4 6 --kernel-size 3 2 3 --causal 1 0 1 --query 4 1 4": """\
shape 5 x 4 x 6, kernel_size 3 x 2 x 3, stride 1, dilation 1, causal on axis 0
  and axis 2
query (4, 1, 4) sees 3 x 2 x 3 = 18 keys: key[:, 2:5, 0:2, 2:5]

axis 0 = 2        axis 0 = 3        axis 0 = 4

   0 1 2 3 4 5       0 1 2 3 4 5       0 1 2 3 4 5
0  · · ■ ■ ■ ·    0  · · ■ ■ ■ ·    0  · · ■ ■ ■ ·
1  · · ■ ■ ■ ·    1  · · ■ ■ ■ ·    1  · · ■ ■ ◆ ·
2  · · · · · ·    2  · · · · · ·    2  · · · · · ·
3  · · · · · ·    3  · · · · · ·    3  · · · · · ·

◆ query, also a key    ■ key    · hidden
Axis 1 runs down, axis 2 across.
""",
    "--shape 32 2 30 --kernel-size 10 1 2 --dilation 3 1 4 --query 13 0 20": """\
shape 32 x 2 x 30, kernel_size 10 x 1 x 2, stride 1, dilation 3 x 1 x 4
query (13, 0, 20) sees 10 x 1 x 2 = 20 keys: key[:, 1:29:3, 0:1, 16:21:4]

axis 0 = 4                    axis 0 = 7

   1 1 1 1 1 1 1 2 2 2 2 2       1 1 1 1 1 1 1 2 2 2 2 2
   3 4 5 6 7 8 9 0 1 2 3 4       3 4 5 6 7 8 9 0 1 2 3 4
0  · · · ■ · · · ■ · · · ○    0  · · · ■ · · · ■ · · · ○
1  · · · ○ · · · ○ · · · ○    1  · · · ○ · · · ○ · · · ○

axis 0 = 10                   axis 0 = 13

   1 1 1 1 1 1 1 2 2 2 2 2       1 1 1 1 1 1 1 2 2 2 2 2
   3 4 5 6 7 8 9 0 1 2 3 4       3 4 5 6 7 8 9 0 1 2 3 4
0  · · · ■ · · · ■ · · · ○    0  · · · ■ · · · ◆ · · · ○
1  · · · ○ · · · ○ · · · ○    1  · · · ○ · · · ○ · · · ○

axis 0 = 16                   axis 0 = 19

   1 1 1 1 1 1 1 2 2 2 2 2       1 1 1 1 1 1 1 2 2 2 2 2
   3 4 5 6 7 8 9 0 1 2 3 4       3 4 5 6 7 8 9 0 1 2 3 4
0  · · · ■ · · · ■ · · · ○    0  · · · ■ · · · ■ · · · ○
1  · · · ○ · · · ○ · · · ○    1  · · · ○ · · · ○ · · · ○

◆ query, also a key    ■ key    ○ hidden, same dilation group    · hidden
Axis 1 runs down, axis 2 across.
Not drawn: axis 0 at 1 and 22-28 by 3, with keys at the same places.
Axis 2 is cropped to 13-24 of 0-29.
""",
    "--shape 3 200 --kernel-size 3 5 --query 1 120": """\
shape 3 x 200, kernel_size 3 x 5, stride 1, dilation 1
query (1, 120) sees 3 x 5 = 15 keys: key[:, 0:3, 118:123]

   1 1 1 1 1 1 1 1 1 1 1 1 1 1 1 1 1 1 1 1 1 1 1 1 1 1 1 1 1 1 1 1 1 1 1 1 1 1 1
   0 0 0 0 0 0 0 0 0 1 1 1 1 1 1 1 1 1 1 2 2 2 2 2 2 2 2 2 2 3 3 3 3 3 3 3 3 3 3
   1 2 3 4 5 6 7 8 9 0 1 2 3 4 5 6 7 8 9 0 1 2 3 4 5 6 7 8 9 0 1 2 3 4 5 6 7 8 9
0  · · · · · · · · · · · · · · · · · ■ ■ ■ ■ ■ · · · · · · · · · · · · · · · · ·
1  · · · · · · · · · · · · · · · · · ■ ■ ◆ ■ ■ · · · · · · · · · · · · · · · · ·
2  · · · · · · · · · · · · · · · · · ■ ■ ■ ■ ■ · · · · · · · · · · · · · · · · ·

◆ query, also a key    ■ key    · hidden
Axis 0 runs down, axis 1 across.
Axis 1 is cropped to 101-139 of 0-199.
""",
    "--shape 50 --kernel-size 3 --query 2": """\
shape 50, kernel_size 3, stride 1, dilation 1
query (2) sees 3 keys: key[:, 1:4]

                    1 1 1 1 1 1 1 1 1 1 2 2 2 2 2 2 2 2 2 2 3 3 3 3 3 3 3 3 3 3
0 1 2 3 4 5 6 7 8 9 0 1 2 3 4 5 6 7 8 9 0 1 2 3 4 5 6 7 8 9 0 1 2 3 4 5 6 7 8 9
· ■ ◆ ■ · · · · · · · · · · · · · · · · · · · · · · · · · · · · · · · · · · · ·

◆ query, also a key    ■ key    · hidden
Axis 0 is cropped to 0-39 of 0-49.
""",
    "--shape 100 --kernel-size 45 --query 99": """\
shape 100, kernel_size 45, stride 1, dilation 1
query (99) sees 45 keys: key[:, 55:100]

6 6 6 6 6 6 6 6 6 6 7 7 7 7 7 7 7 7 7 7 8 8 8 8 8 8 8 8 8 8 9 9 9 9 9 9 9 9 9 9
0 1 2 3 4 5 6 7 8 9 0 1 2 3 4 5 6 7 8 9 0 1 2 3 4 5 6 7 8 9 0 1 2 3 4 5 6 7 8 9
■ ■ ■ ■ ■ ■ ■ ■ ■ ■ ■ ■ ■ ■ ■ ■ ■ ■ ■ ■ ■ ■ ■ ■ ■ ■ ■ ■ ■ ■ ■ ■ ■ ■ ■ ■ ■ ■ ■ ◆

◆ query, also a key    ■ key
Axis 0 is cropped to 60-99 of 0-99, which leaves out some keys.
""",
}


@pytest.mark.parametrize("arguments", PICTURES)
def test_picture(arguments: str, capsys: Capture) -> None:
    assert printed(capsys, f"window {arguments}") == PICTURES[arguments]


@pytest.mark.parametrize(
    ("shape", "kernel_size", "stride", "dilation", "is_causal", "query"),
    [
        ((9, 8), (3, 4), (1, 1), (1, 1), (False, False), (8, 0)),
        ((9, 8), (4, 4), (3, 2), (2, 1), (False, True), (5, 6)),
        ((12, 11), (3, 2), (2, 1), (3, 5), (True, False), (10, 7)),
    ],
)
def test_picture_shows_what_the_operator_reads(
    shape: tuple[int, int],
    kernel_size: tuple[int, int],
    stride: tuple[int, int],
    dilation: tuple[int, int],
    is_causal: tuple[bool, bool],
    query: tuple[int, int],
    capsys: Capture,
) -> None:
    tokens = torch.zeros(1, *shape, 1, 1)
    value = torch.zeros(1, *shape, 1, 1, requires_grad=True)
    natten2.na2d(tokens, tokens, value, kernel_size, stride, dilation, is_causal)[(0, *query)].sum().backward()

    arguments = "window"
    options = {"shape": shape, "kernel-size": kernel_size, "stride": stride, "dilation": dilation, "query": query}
    for name, values in {**options, "causal": map(int, is_causal)}.items():
        arguments += f" --{name} {' '.join(map(str, values))}"
    output = printed(capsys, arguments)
    rows = re.findall(r"^ *\d+  ([·■○◆ ]+)$", output, re.MULTILINE)
    seen = torch.tensor([[symbol in "■◆" for symbol in row.split()] for row in rows])
    assert torch.equal(seen, value.grad[0, :, :, 0, 0] != 0)
    assert rows[query[0]].split()[query[1]] == "◆"
    # The slices of the summary pick the same keys.
    key = value.grad[0]
    index = tuple(slice(*map(int, axis.split(":"))) for axis in re.search(r"key\[:, (.*)\]", output)[1].split(", "))
    assert torch.count_nonzero(key[index]) == key[index].numel() == torch.count_nonzero(key)


@pytest.mark.parametrize("columns", [30, 50, 80, 200])
@pytest.mark.parametrize(
    "arguments",
    [
        "--shape 300 --kernel-size 3 --dilation 3",
        "--shape 1000 1000 --kernel-size 9 --dilation 3 --causal",
        "--shape 40 60 70 --kernel-size 9 --dilation 2 1 3 --causal 1 1 0",
    ],
)
def test_picture_fits_the_terminal(columns: int, arguments: str, monkeypatch: Patch, capsys: Capture) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    output = printed(capsys, f"window {arguments}")
    assert max(map(len, output.splitlines())) <= columns
    # The query is in a picture and in the legend, where symbols stay beside their meanings.
    assert output.count("◆") == 2
    assert re.search(r"○ hidden, same dilation group( |$)", output, re.MULTILINE)
    assert re.search(r"· hidden$", output, re.MULTILINE)


def test_picture_of_a_high_map_is_cropped(capsys: Capture) -> None:
    output = printed(capsys, "window --shape 300 3 --kernel-size 3 --query 100 1")
    assert "Axis 0 is cropped to 85-116 of 0-299.\n" in output
    rows = re.findall(r"^ *(\d+)  ([·■◆ ]+)$", output, re.MULTILINE)
    assert [int(row) for row, _ in rows] == list(range(85, 117))
    assert {row: tokens for row, tokens in rows if "·" not in tokens} == {"99": "■ ■ ■", "100": "■ ◆ ■", "101": "■ ■ ■"}


def test_window_of_an_enormous_axis_is_drawn(capsys: Capture) -> None:
    output = printed(capsys, f"window --shape {2**40} --kernel-size {2**39}")
    assert f"key[:, {2**38}:{2**38 + 2**39}]" in output
    assert len(output) < 5000


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--shape 1 2 3 4 --kernel-size 1", "shape must have 1 to 3 sizes, got 4"),
        ("--shape 5 0 --kernel-size 1", "shape must have sizes of at least 1 and at most 2**60 tokens, got [5, 0]"),
        (
            f"--shape {10**30} --kernel-size 1",
            f"shape must have sizes of at least 1 and at most 2**60 tokens, got [{10**30}]",
        ),
        (
            "--shape 9 9 --kernel-size 3 3 3",
            "kernel_size must be one value, or one for each of the 2 axes, got [3, 3, 3]",
        ),
        (
            "--shape 9 9 9 --kernel-size 3 --stride 1 1",
            "stride must be one value, or one for each of the 3 axes, got [1, 1]",
        ),
        (
            "--shape 9 --kernel-size 3 --dilation 1 1",
            "dilation must be one value, or one for each of the 1 axes, got [1, 1]",
        ),
        (
            "--shape 9 9 --kernel-size 3 --causal 1 0 1",
            "causal must be one value, or one for each of the 2 axes, got [1, 0, 1]",
        ),
        (
            "--shape 9 9 --kernel-size 3 --query 1 1 1",
            "query must be one value, or one for each of the 2 axes, got [1, 1, 1]",
        ),
        ("--shape 9 9 --kernel-size 3 --query 8 9", "query must be between 0 and 8 on axis 1, got 9"),
        ("--shape 9 9 --kernel-size 3 --query -1 0", "query must be between 0 and 8 on axis 0, got -1"),
        (
            "--shape 9 8 --kernel-size 3 --dilation 3",
            "kernel_size * dilation must not exceed the axis, got 3 * 3 = 9 on axis 1 of length 8",
        ),
        ("--shape 9 --kernel-size 3 --stride 4", "stride must be between 1 and kernel_size 3, got 4 on axis 0"),
        ("--shape 9 --kernel-size 3 --stride 0", "stride must be between 1 and kernel_size 3, got 0 on axis 0"),
        ("--shape 9 --kernel-size 0", "kernel_size must be at least 1, got 0 on axis 0"),
        ("--shape 9 --kernel-size 3 --dilation -1", "dilation must be at least 1, got -1 on axis 0"),
        ("--shape 9 --kernel-size three", "argument --kernel-size: invalid int value: 'three'"),
        ("--shape 9", "the following arguments are required: --kernel-size"),
    ],
)
def test_wrong_arguments(arguments: str, message: str, capsys: Capture) -> None:
    assert _error(capsys, f"window {arguments}") == f"python -m natten2 window: error: {message}\n"


def _error(capsys: Capture, arguments: str) -> str:
    with pytest.raises(SystemExit) as exit_:
        main(arguments.split())
    captured = capsys.readouterr()
    assert exit_.value.code == 2
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    return captured.err


def test_wrong_choices(capsys: Capture) -> None:
    assert "argument --causal: invalid choice: 2" in _error(capsys, "window --shape 9 --kernel-size 3 --causal 2")
    assert _error(capsys, "widow").startswith("python -m natten2: error: argument")


COLORS = {"query": (232, 89, 12), "key": (59, 120, 184), "group": (189, 211, 234), "other": (238, 239, 241)}


@pytest.mark.parametrize(
    ("arguments", "tokens"),
    [
        ("--shape 6 8 --kernel-size 3 --query 2 5", {"query": 1, "key": 8, "group": 0, "other": 39}),
        ("--shape 12 --kernel-size 3 --dilation 3", {"query": 1, "key": 2, "group": 1, "other": 8}),
        ("--shape 5 6 7 --kernel-size 3 2 2 --causal 1 0 0", {"query": 1, "key": 11, "group": 0, "other": 3 * 42 - 12}),
        ("--shape 500 400 --kernel-size 7", {"query": 1, "key": 48, "group": 0, "other": 48 * 48 - 49}),
    ],
)
def test_image(arguments: str, tokens: dict[str, int], tmp_path: Path, capsys: Capture) -> None:
    pytest.importorskip("matplotlib")
    from matplotlib.image import imread

    path = tmp_path / "window.png"
    output = printed(capsys, f"window {arguments} --out {path}")
    assert output.splitlines()[2:] == [f"written to {path}"]
    assert output.splitlines()[:2] == printed(capsys, f"window {arguments}").splitlines()[:2]
    assert path.read_bytes().startswith(b"\x89PNG")
    pixels = (torch.from_numpy(imread(path))[..., :3] * 255).round()
    size = 0.24 * 150
    for name, color in COLORS.items():
        area = (pixels == torch.tensor(color)).all(-1).sum().item() / size**2
        # Tokens have gaps between them; the legend has one smaller square of every color in use.
        expected = tokens[name] + 0.4 * (tokens[name] > 0)
        assert 0.75 * expected <= area <= expected, name


def test_image_without_suffix_is_png(tmp_path: Path, capsys: Capture) -> None:
    pytest.importorskip("matplotlib")
    printed(capsys, f"window --shape 6 --kernel-size 3 --out {tmp_path / 'window'}")
    assert (tmp_path / "window").read_bytes().startswith(b"\x89PNG")


def test_image_errors(tmp_path: Path, capsys: Capture) -> None:
    pytest.importorskip("matplotlib")
    prefix = "python -m natten2 window: error: "
    missing = tmp_path / "missing" / "window.png"
    error = _error(capsys, f"window --shape 6 --kernel-size 3 --out {missing}")
    assert error.startswith(f"{prefix}can't write {missing}: ")
    assert "No such file or directory" in error
    error = _error(capsys, f"window --shape 6 --kernel-size 3 --out {tmp_path / 'window.xyz'}")
    assert error.startswith(f"{prefix}Format 'xyz' is not supported")


def test_image_without_matplotlib(tmp_path: Path, monkeypatch: Patch, capsys: Capture) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    error = _error(capsys, f"window --shape 6 --kernel-size 3 --out {tmp_path / 'window.png'}")
    assert error.endswith("images need matplotlib: pip install matplotlib\n")
    # The terminal does without.
    assert "◆" in printed(capsys, "window --shape 6 --kernel-size 3")


def printed_by_a_process(*arguments: str, **environment: str) -> str:
    """What a process of its own prints."""
    command = [sys.executable, "-m", "natten2", *arguments]
    environment = {**os.environ, "COLUMNS": "80", **environment}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert (result.returncode, result.stderr) == (0, "")
    return result.stdout


def test_picture_falls_back_to_ascii() -> None:
    arguments = "window --shape 5 7 --kernel-size 2 --dilation 2"
    assert (
        printed_by_a_process(*arguments.split(), PYTHONIOENCODING="ascii")
        == """\
shape 5 x 7, kernel_size 2, stride 1, dilation 2
query (2, 3) sees 2 x 2 = 4 keys: key[:, 0:3:2, 1:4:2]

   0 1 2 3 4 5 6
0  . # . # . o .
1  . . . . . . .
2  . # . Q . o .
3  . . . . . . .
4  . o . o . o .

Q query, also a key    # key    o hidden, same dilation group    . hidden
Axis 0 runs down, axis 1 across.
"""
    )
