"""Choosing a tiling by trying: what is tried, kept, and refused. The times are made up."""

import json
from pathlib import Path

import pytest
import torch
from problems import random_problem
from test_kernels import run

pytest.importorskip("triton")

import triton

from natten2.ops.triton import launch, tuning
from natten2.ops.triton.tiles import candidate_tilings, choose_tiling

WINDOW = ((3, 3), (1, 1), (False, False))
QUERY = torch.empty(1, 4, 4, 1, 4)
INPUTS = (QUERY, QUERY, QUERY, None, None, None)


@pytest.fixture(autouse=True)
def _wanted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("NATTEN2_AUTOTUNE", "1")
    monkeypatch.setenv("NATTEN2_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(tuning, "_chosen", {})
    monkeypatch.setattr(tuning, "_device_name", lambda device: "a GPU")


@pytest.fixture
def tried(monkeypatch: pytest.MonkeyPatch) -> list:
    """The calls that were timed; the fifth is the fastest, and the sixth doesn't fit."""
    calls = []

    def do_bench(call, return_mode: str) -> float:
        assert return_mode == "median"
        calls.append(call)
        if len(calls) == 6:
            raise triton.OutOfResources(2, 1, "shared memory")
        return abs(len(calls) - 5.0)

    monkeypatch.setattr(triton.testing, "do_bench", do_bench)
    return calls


def choose(name: str = "forward", inputs: tuple = INPUTS, precision: str = "ieee") -> object:
    return tuning.tuned(name, inputs, WINDOW, precision, lambda tiling: tiling)


def test_the_fastest_is_taken_and_kept(tried: list, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    fastest = choose()
    candidates = dict.fromkeys((choose_tiling(*WINDOW, 16), *candidate_tilings(*WINDOW)))
    assert [call() for call in tried] == list(candidates)
    assert fastest == list(candidates)[4]
    assert choose() == fastest
    monkeypatch.setattr(tuning, "_chosen", {})
    assert choose() == fastest
    assert len(tried) == len(candidates)
    assert len(json.loads((tmp_path / "tilings.json").read_text())) == 1


def test_what_is_compiled_apart_is_tried_apart(tried: list):
    rpb = torch.empty(1, 5, 5)
    counts = []
    for arguments in (
        ("forward",),
        ("backward",),
        ("forward", (*INPUTS[:3], rpb, None, None)),
        ("forward", INPUTS, "tf32"),
    ):
        choose(*arguments)
        choose(*arguments)
        counts.append(len(tried))
    assert counts == sorted(set(counts))


def test_every_candidate_computes_the_same(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("NATTEN2_AUTOTUNE", "0")
    problem = random_problem((9, 7), (3, 3), batch=1, heads=1, dtype=torch.float32)
    (expected, _), _ = run(problem, (launch.na_forward, launch.na_backward))
    inputs, window = problem.tensors, problem.parameters[:2] + problem.parameters[3:4]
    window = tuple(map(tuple, window))
    for tiling in dict.fromkeys(candidate_tilings(*window)):
        layout = (expected.shape, expected.stride())
        call = launch._Call(tiling, inputs, (layout,), window, problem.parameters[2])
        torch.testing.assert_close(launch._forward(call, problem.parameters[4])[0], expected)


def test_nothing_is_tried_inside_a_cuda_graph(tried: list, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(tuning, "_is_capturing", lambda device: True)
    assert choose() == choose_tiling(*WINDOW, 16)
    assert not tried


def test_nothing_is_tried_unless_wanted(tried: list, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("NATTEN2_AUTOTUNE", "0")
    assert choose() == choose_tiling(*WINDOW, 16)
    assert not tried
    monkeypatch.setenv("NATTEN2_AUTOTUNE", "yes")
    with pytest.raises(ValueError, match="NATTEN2_AUTOTUNE must be 0 or 1, got 'yes'"):
        choose()


@pytest.mark.parametrize("content", ["{", '{"a": 1}', '{"a": {"tile": [1]}}', "[]"])
def test_a_broken_file_is_named(tried: list, tmp_path: Path, content: str):
    (tmp_path / "tilings.json").write_text(content)
    with pytest.raises(ValueError, match=r"tilings\.json holds no choices of natten2"):
        choose()


def test_a_tiling_that_must_fit_and_does_not_is_an_error(monkeypatch: pytest.MonkeyPatch):
    def do_bench(call, return_mode: str) -> float:
        raise triton.OutOfResources(2, 1, "shared memory")

    monkeypatch.setattr(triton.testing, "do_bench", do_bench)
    with pytest.raises(triton.OutOfResources):
        choose()
