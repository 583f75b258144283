"""Timing, the baselines, and the command: benchmarks/."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path

import pytest
import torch
from torch import Tensor

pytest.importorskip("tqdm")

from benchmarks.__main__ import main
from benchmarks.baselines import swin_attention
from benchmarks.cases import CASES, SHAPES, Case, Inputs, make_inputs
from benchmarks.compare import WrongResultError, check, compare
from benchmarks.cpu_plot import roof
from benchmarks.floors import Rates
from benchmarks.implementations import DEFAULT_NAMES, IMPLEMENTATIONS, OURS, Implementation
from benchmarks.memory import LAYERS, measure_memory
from benchmarks.phases import PHASES
from benchmarks.swin import SwinLayer
from benchmarks.timing import Settings, interleave, ratio, region_seconds, sample, threads

_SMALL = next(case for case in CASES if case.name == "small")
_SHORT = Settings(rounds=1, warmups=0, min_seconds=0.0)


class FakeClock:
    """Time passes only inside the functions that it makes."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def function(self, durations: Iterator[float]) -> Callable[[], None]:
        def run() -> None:
            self.now += next(durations)

        return run


def test_sample_repeats_until_the_shortest_sample_is_reached():
    clock = FakeClock()
    assert sample(clock.function(iter([1.0, 2.0, 3.0, 100.0])), min_seconds=5.0, clock=clock) == 2.0


def test_sample_calls_a_slow_function_once():
    clock = FakeClock()
    assert sample(clock.function(iter([7.0])), min_seconds=0.0, clock=clock) == 7.0


def test_interleave_takes_turns_after_the_warmups():
    order = []
    clock = FakeClock()
    tick = clock.function(iter(lambda: 1.0, None))

    def named(name: str):
        return lambda: (order.append(name), tick())

    samples = interleave(
        {"a": named("a"), "b": named("b")}, Settings(rounds=3, warmups=2, settling=0, min_seconds=1.0), clock
    )
    assert order == ["a", "a", "b", "b", *["a", "b"] * 3]
    assert samples == {"a": [1.0] * 3, "b": [1.0] * 3}


def test_calls_that_clean_up_after_another_function_are_not_timed():
    clock = FakeClock()
    functions = {"a": clock.function(iter([9.0, 1.0, 8.0, 2.0])), "b": clock.function(iter([7.0, 3.0, 6.0, 4.0]))}
    samples = interleave(functions, Settings(rounds=2, warmups=0, settling=1, min_seconds=0.0), clock)
    assert samples == {"a": [1.0, 2.0], "b": [3.0, 4.0]}


def test_ratio_is_taken_per_round():
    # The second round is disturbed, then the machine slows down fourfold: the ratio of the medians would be 8.
    clock = FakeClock()
    settings = Settings(rounds=3, warmups=0, settling=0, min_seconds=0.0)
    samples = interleave(
        {"ours": clock.function(iter([1.0, 1.0, 4.0])), "other": clock.function(iter([2.0, 8.0, 8.0]))},
        settings,
        clock,
    )
    assert ratio(samples["other"], samples["ours"]) == 2.0
    assert ratio(samples["ours"], samples["other"]) == 0.5


def test_a_slow_function_drops_out_and_is_compared_in_its_own_rounds():
    clock = FakeClock()
    settings = Settings(rounds=5, warmups=0, settling=0, min_seconds=0.0, patience=25.0)
    samples = interleave(
        {"ours": clock.function(iter([1.0, 2.0, 4.0, 1.0, 1.0])), "slow": clock.function(iter([10.0, 20.0, 40.0]))},
        settings,
        clock,
    )
    assert samples == {"ours": [1.0, 2.0, 4.0, 1.0, 1.0], "slow": [10.0, 20.0, 40.0]}
    assert ratio(samples["slow"], samples["ours"]) == 10.0


def test_a_parallel_region_takes_time():
    assert region_seconds(2, calls=3) > 0


def test_settings_without_rounds_are_an_error():
    with pytest.raises(ValueError, match="rounds must be at least 1, got 0"):
        Settings(rounds=0)


def test_threads_are_set_back_after_an_error():
    before = torch.get_num_threads()
    inside = []

    def fail() -> None:
        with threads(before + 1):
            inside.append(torch.get_num_threads())
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert inside == [before + 1]
    assert torch.get_num_threads() == before


def dense_block_attention(query: Tensor, key: Tensor, value: Tensor, rpb: Tensor, window: int, scale: float) -> Tensor:
    """Attention of all tokens to all, with everything outside a query's block masked; a bias looked up pair by pair."""
    height, width, heads = query.shape[1:4]
    tokens = [(row, column) for row in range(height) for column in range(width)]
    bias = torch.full((heads, len(tokens), len(tokens)), -torch.inf, dtype=query.dtype)
    for i, (row, column) in enumerate(tokens):
        for j, (key_row, key_column) in enumerate(tokens):
            if row // window == key_row // window and column // window == key_column // window:
                bias[:, i, j] = rpb[:, key_row - row + window - 1, key_column - column + window - 1]
    query, key, value = (tensor.flatten(1, 2) for tensor in (query, key, value))
    weights = (scale * torch.einsum("bihd,bjhd->bhij", query, key) + bias).softmax(dim=-1)
    return torch.einsum("bhij,bjhd->bihd", weights, value).unflatten(1, (height, width))


def test_swin_equals_dense_attention_with_a_block_mask():
    inputs = make_inputs(
        Case("", (6, 9), 3, heads=2, head_dim=4, batch=2, bias=True), torch.float64, requires_grad=True
    )
    tensors = inputs.leaves
    scale = 0.3
    output = swin_attention(*tensors, window=3, scale=scale)
    expected = dense_block_attention(*tensors, window=3, scale=scale)
    torch.testing.assert_close(output, expected)
    for gradients in zip(
        torch.autograd.grad(output, tensors, inputs.grad_output),
        torch.autograd.grad(expected, tensors, inputs.grad_output),
        strict=True,
    ):
        torch.testing.assert_close(*gradients)


def test_swin_without_a_bias_has_a_bias_of_zero():
    inputs = make_inputs(Case("", (6, 6), 3, heads=2, head_dim=4), torch.float64)
    query, key, value = inputs.leaves
    zeros = torch.zeros(2, 5, 5, dtype=torch.float64)
    output = swin_attention(query, key, value, None, window=3, scale=0.5)
    torch.testing.assert_close(output, dense_block_attention(query, key, value, zeros, window=3, scale=0.5))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_swin_applies_where_its_blocks_fit(case: Case):
    side = case.block or case.parameters.kernel_size[0]
    fits = len(case.spatial) == 2 and len(set(case.parameters.kernel_size)) == 1
    fits = fits and all(length % side == 0 for length in case.spatial)
    fits = fits and case.kernel_size != 1 and case.key_heads is None and case.additional == 0
    assert (IMPLEMENTATIONS["swin"].meaning(case) is not None) == fits
    assert (IMPLEMENTATIONS["swin-sdpa"].meaning(case) is not None) == fits


def test_shapes_are_measured_against_what_they_are_meant_for():
    names = {
        case.name: {name for name, one in IMPLEMENTATIONS.items() if one.meaning(case) is not None} - {"natten"}
        for case in SHAPES
    }
    everything = {OURS, "gather", "unfused", "swin", "swin-sdpa", "dense", "flex"}
    assert names["nat-tiny-1"] == names["nat-tiny-4-batch"] == names["hdit-1"] == everything
    assert names["nat-tiny-1-batch"] == everything - {"dense"}
    assert names["dinat-tiny-2"] == everything | {"undilated"}
    assert names["video-28"] == {OURS, "gather", "unfused", "dense", "flex"}
    assert names["sequence-4096"] == {OURS, "unfused", "dense", "flex"}


@pytest.mark.parametrize(
    "case",
    [
        Case("line", (12,), 5, is_causal=True, bias=False),
        Case("image", (8, 8), 3, dilation=2, bias=True, batch=2, block=4),
        Case("volume", (3, 4, 5), (1, 3, 5), heads=4, key_heads=2, stride=(1, 2, 1), bias=True),
    ],
    ids=lambda case: case.name,
)
def test_every_implementation_is_checked_on_every_rank(case: Case):
    for dtype in ("float32", "bfloat16"):
        for record in compare([case], [dtype], ["fwd", "fwdbwd"], _SHORT):
            assert record.failed == {}
            assert {OURS, "gather", "dense"} <= record.median_ms.keys()


@pytest.mark.long
def test_flex_compiles_on_a_processor():
    with_bias = Case("", (8, 8), 3, heads=2, bias=True)
    (record,) = compare([with_bias], ["bfloat16"], ["fwd"], _SHORT, ["flex"])
    assert record.failed == {}
    assert record.ratio.keys() == {"flex"}


def test_case_names_differ():
    assert len({case.name for case in CASES}) == len(CASES)


@pytest.mark.parametrize("wrong", [1.001, torch.nan])
def test_check_finds_a_wrong_gradient(wrong: float):
    right = torch.ones(3, 4, dtype=torch.float64)
    check("same", [right, right], [right, right], 1e-6)
    with pytest.raises(WrongResultError, match=r"other in torch\.float64: relative error of the gradient 1"):
        check("other", [right, wrong * right], [right, right], 1e-6)


def test_compare_never_times_a_wrong_implementation(monkeypatch: pytest.MonkeyPatch):
    calls = count()

    def wrong(case: Case, inputs: Inputs) -> Tensor:
        next(calls)
        return inputs.query * 1.0

    monkeypatch.setitem(IMPLEMENTATIONS, "wrong", Implementation(wrong, lambda case: case))
    with pytest.raises(WrongResultError, match="wrong on small"):
        compare([_SMALL], ["float32"], ["fwd"], _SHORT, ["wrong"])
    assert next(calls) == 1


def test_a_rival_that_cannot_run_is_left_out(monkeypatch: pytest.MonkeyPatch):
    def fail(case: Case, inputs: Inputs) -> Tensor:
        raise NotImplementedError("no kernel")

    monkeypatch.setitem(IMPLEMENTATIONS, "broken", Implementation(fail, lambda case: case))
    (record,) = compare([_SMALL], ["float32"], ["fwd"], _SHORT, ["broken", "gather"])
    assert record.failed == {"broken": "NotImplementedError: no kernel"}
    assert record.ratio.keys() == {"gather"}

    monkeypatch.setitem(IMPLEMENTATIONS, OURS, Implementation(fail, lambda case: case))
    with pytest.raises(NotImplementedError):
        compare([_SMALL], ["float32"], ["fwd"], _SHORT, [])


def test_two_threads_are_timed_only_on_a_quiet_machine(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    # Quiet before the first case, busy after it; busy before the second; quiet all along for the third.
    seconds = iter([1e-6, 1e-3, 1e-3, 1e-6, 1e-6])
    monkeypatch.setattr("benchmarks.compare.region_seconds", lambda thread_count: next(seconds))
    dtypes = ["float32", "float64", "float16"]
    main(["cpu", "--quick", "--threads", "2", "--case", "small", "--mode", "fwd", "--dtype", *dtypes])
    printed = capsys.readouterr().out
    assert "skipped small float32 fwd: the machine is busy: an empty parallel region takes 1000 us, not 50" in printed
    assert "skipped small float64 fwd" in printed
    assert "skipped small float16 fwd" not in printed
    assert "one-thread takes" in printed


def test_cpu_writes_every_number_it_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    path = tmp_path / "new" / "cpu.json"
    main(["cpu", "--quick", "--case", "small", "nat-tiny-4", "--dtype", "float32", "bfloat16", "--json", str(path)])
    content = json.loads(path.read_text())
    assert {"processor", "torch", "natten2", "natten2_cpu_capability"} <= content["machine"].keys()
    assert content["settings"] == {
        "rounds": 3,
        "warmups": 1,
        "settling": 1,
        "min_seconds": 0.002,
        "patience": 1.0,
        "threads": 1,
        "clock": "process_time",
    }
    measured = [(record["case"], record["dtype"], record["mode"]) for record in content["records"]]
    assert measured == [
        (case, dtype, mode)
        for case in ("nat-tiny-4", "small")
        for dtype in ("float32", "bfloat16")
        for mode in ("fwd", "fwdbwd")
    ]
    for record in content["records"]:
        rivals = {"gather", "unfused", "dense", *(("swin", "swin-sdpa") if record["case"] == "nat-tiny-4" else ())}
        assert record["ratio"].keys() == rivals
        assert record["median_ms"].keys() == record["min_ms"].keys() == {"natten2", *rivals}
        assert record["share_of_peak"].keys() == record["median_ms"].keys()
        assert record["peak_gflop_per_s"] > 0
        assert (record["failed"], record["skipped"]) == ({}, None)
        assert all(0 < record["min_ms"][name] <= record["median_ms"][name] for name in record["median_ms"])

    # 49 queries of 16 heads, as many keys, 32 channels: scores and output, and five such products backward.
    forward = content["records"][0]
    assert forward["gflop"] == pytest.approx(4 * 16 * 49**2 * 32 / 1e9, rel=1e-3)
    assert content["records"][1]["gflop"] == pytest.approx(3.5 * forward["gflop"], rel=1e-3)
    assert content["rates"].keys() == {"peak_gflop_per_s", "peak_measured_by", "copy_gb_per_s"}
    assert content["memory"] == []

    printed = capsys.readouterr().out
    assert printed.count("nat-tiny-4 ") == 4
    assert "gather takes" in printed
    assert "swin takes" in printed


def test_a_wrong_result_ends_the_program(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.setitem(
        IMPLEMENTATIONS, "gather", Implementation(lambda case, inputs: 2 * inputs.value, lambda case: case)
    )
    with pytest.raises(SystemExit) as exit_info:
        main(["cpu", "--quick", "--case", "small", "--dtype", "float32"])
    assert exit_info.value.code == 1
    assert "error: gather on small" in capsys.readouterr().err


@pytest.mark.parametrize("option", ["--rounds", "--threads"])
def test_options_below_one_are_refused(option: str, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as exit_info:
        main(["cpu", option, "0"])
    assert exit_info.value.code == 2
    assert "must be at least 1, got 0" in capsys.readouterr().err


def test_the_roof_is_the_lower_of_two():
    rates = Rates(flops_per_second=100.0, bytes_per_second=10.0)
    assert [roof(rates, one) for one in (1.0, 10.0, 50.0)] == [10.0, 100.0, 100.0]


def test_cpu_draws_a_roofline(tmp_path: Path):
    pytest.importorskip("matplotlib")
    path = tmp_path / "new" / "roofline.png"
    main(["cpu", "--quick", "--case", "small", "--dtype", "float32", "--implementation", "dense", "--plot", str(path)])
    assert path.read_bytes().startswith(b"\x89PNG")


def test_cpu_knows_groups_of_cases(monkeypatch: pytest.MonkeyPatch):
    asked = []
    monkeypatch.setattr("benchmarks.cpu.compare", lambda cases, *_: asked.append(cases) or [])
    main(["cpu"])
    main(["cpu", "--case", "corners", "nat-tiny-1"])
    main(["cpu", "--case"])
    assert asked == [list(SHAPES), [case for case in CASES if case not in SHAPES[1:]], []]
    assert "flex" not in DEFAULT_NAMES


def test_swin_layer_is_swin_attention_between_two_projections():
    torch.manual_seed(0)
    layer = SwinLayer(channels=8, heads=2, window=3).double()
    torch.nn.init.normal_(layer.rpb)
    input = torch.randn(2, 6, 3, 8, dtype=torch.float64)
    query, key, value = layer.qkv(input).unflatten(-1, (3, 2, 4)).unbind(-3)
    attended = swin_attention(query, key, value, layer.rpb, window=3, scale=0.5)
    torch.testing.assert_close(layer(input), layer.proj(attended.flatten(-2)))


@pytest.mark.skipif(sys.platform != "linux", reason="the peak is Linux's")
def test_memory_is_that_of_the_step():
    memory = measure_memory("float32", side=28, batch=2)
    assert memory.peak_bytes.keys() == LAYERS.keys()
    # At least query, key, value, and output; at most some tens of such tensors.
    image = 2 * 28 * 28 * 64 * 4
    assert all(4 * image < peak < 40 * image for peak in memory.peak_bytes.values())


def test_cpu_reports_memory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    monkeypatch.setattr("benchmarks.memory.in_a_process", lambda _, name, *__: {"natten2": 3, "swin": 4}[name] << 20)
    path = tmp_path / "cpu.json"
    main(["cpu", "--case", "--dtype", "float32", "--memory", "--json", str(path)])
    assert "takes 3.0 MiB, 75% of Swin's 4.0 MiB" in capsys.readouterr().out
    content = json.loads(path.read_text())
    assert (content["records"], content["rates"]) == ([], None)
    assert content["memory"][0]["peak_bytes"] == {"natten2": 3 << 20, "swin": 4 << 20}


@pytest.mark.long
def test_phases_are_timed(capsys: pytest.CaptureFixture[str]):
    main(["phases", "--rounds", "1"])
    table = capsys.readouterr().out
    assert all(name in table for name in PHASES)


def test_overhead_compares_calls_without_and_with_gradients(capsys: pytest.CaptureFixture[str], tmp_path: Path):
    main(["overhead", "--rounds", "1", "--json", str(tmp_path / "overhead.json")])
    rows = json.loads((tmp_path / "overhead.json").read_text())["microseconds"]
    assert {"aten::add", "SDPA", "Python operator", "natten2 operator", "natten2.na1d"} <= set(rows)
    assert all(0 < row["no gradient"] < row["with backward"] for row in rows.values())
    assert "more than a Python operator" in capsys.readouterr().out
