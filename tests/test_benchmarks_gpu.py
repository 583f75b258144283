"""The benchmark of a GPU, tried without one: floors, statistics, checks, failures, and the command."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, replace
from math import prod
from pathlib import Path

import pytest
import torch
from torch import Tensor

pytest.importorskip("tqdm")

from benchmarks import gpu_warm, sanitize
from benchmarks.__main__ import main
from benchmarks.baselines import swin_attention, swin_sdpa_attention
from benchmarks.cases import Case, Inputs, make_inputs
from benchmarks.compare import MODES as STEPS
from benchmarks.compare import WrongResultError, check
from benchmarks.flex import Order, prepare_flex, tile_for
from benchmarks.floors import Rates, floors, useful_bytes, useful_flops
from benchmarks.gpu import Run, measure
from benchmarks.gpu_cases import JOBS, Goal, Job, shrink
from benchmarks.gpu_check import expect_everything, expect_samples
from benchmarks.gpu_device import NO_GPU, NoGpu
from benchmarks.gpu_implementations import GPU_IMPLEMENTATIONS, OURS, GpuImplementation
from benchmarks.gpu_records import format_gpu_records, percentiles, read_records, record
from benchmarks.gpu_timing import Budget, GpuSettings, sample_rounds
from benchmarks.implementations import IMPLEMENTATIONS
from benchmarks.timing import reason

H100 = Rates(flops_per_second=798e12, bytes_per_second=3.0e12)
QUICK = GpuSettings(rounds=2, warmups=1, seconds=1.0, repeats=2)
SMALL = Job(Case("small", (8, 8), 3, heads=2, head_dim=8, bias=True), ("fwd",))


def case_named(name: str) -> Case:
    return next(job.case for job in JOBS if job.name == name)


# The published shapes, by hand: GFLOP, MB, and microseconds.
@pytest.mark.parametrize(
    ("name", "mode", "gflop", "megabytes", "microseconds"),
    [
        ("nat-tiny-1-b128", "fwd", 5.04, 208.7, 69.6),
        ("nat-tiny-2-b128", "fwd", 2.52, 104.4, 34.8),
        ("nat-tiny-3-b128", "fwd", 1.26, 52.2, 17.4),
        ("nat-tiny-1-b128", "bwd", 2.5 * 5.04, 417.4, 139.2),
        ("nat-tiny-1-b128-training", "fwdbwd", 3.5 * 5.04, 626.1, 208.7),
        ("dinat-large-1", "fwd", 27.41, 460.1, 153.4),
        ("hdit-1", "fwd", 13.15, 541.1, 180.4),
        ("sequence-32k", "fwd", 34.36, 33.7, 43.1),
        ("flux", "fwd", 5153.96, 1616.9, 6458.6),
        ("hunyuan-video", "fwd", 14676.71, 2842.2, 18391.9),
        ("cosmos", "fwd", 4252.02, 1852.7, 5328.3),
        ("ltx-5", "fwd", 714.58, 1082.1, 895.5),
        ("volume", "bwd", 2.5 * 0.906, 135.3, 45.1),
    ],
)
def test_floors_of_the_published_shapes(name: str, mode: str, gflop: float, megabytes: float, microseconds: float):
    case = case_named(name)
    assert useful_flops(case, mode) / 1e9 == pytest.approx(gflop, rel=2e-3)
    assert useful_bytes(case, mode) / 1e6 == pytest.approx(megabytes, rel=2e-3)
    assert 1e6 * floors(case, mode, H100).binding == pytest.approx(microseconds, rel=3e-3)


def test_shared_keys_and_additional_keys_count_once():
    case = Case("", (10,), 3, heads=4, key_heads=2, head_dim=8, additional=5, batch=3)
    assert useful_bytes(case, "fwd") == 3 * (2 * 10 * 4 * 8 * 2 + 2 * 15 * 2 * 8 * 2 + 10 * 4 * 4)
    assert useful_flops(case, "fwd") == 4 * 3 * 4 * 10 * 8 * (3 + 5)


def test_percentiles():
    assert percentiles([float(number) for number in range(101)]) == (20.0, 50.0, 80.0)
    assert percentiles([3.0]) == (3.0, 3.0, 3.0)
    assert percentiles([4.0, 2.0]) == pytest.approx((2.4, 3.0, 3.6))


def test_case_names_differ_and_goals_come_first():
    assert len({job.name for job in JOBS}) == len(JOBS)
    with_goal = [bool(job.goals) for job in JOBS]
    assert with_goal == sorted(with_goal, reverse=True)
    assert {goal.name for job in JOBS for goal in job.goals} == {"G1", "G2", "G3", "G4", "G5", "G6", "G9"}


@pytest.mark.parametrize("job", JOBS, ids=lambda job: job.name)
def test_shrunk_jobs_are_small_and_alike(job: Job):
    small, case = shrink(job).case, job.case
    assert (small.name, len(small.spatial), small.bias) == (job.name, len(case.spatial), case.bias)
    assert prod(small.spatial) <= 256
    for length, window, gap in zip(small.spatial, small.parameters.kernel_size, small.parameters.dilation, strict=True):
        assert window * gap <= length
    for implementation in ("swin", "flex-tiled"):
        applies = GPU_IMPLEMENTATIONS[implementation].meaning
        assert applies(case) is None or applies(small) is not None


class FakeDevice(NoGpu):
    """Each function says itself how many seconds it takes."""

    def seconds(self, function: Callable[[], object], *, is_cold: bool = True) -> float:
        return function()


def test_rounds_are_interleaved():
    order = []

    def named(name: str, seconds: float) -> Callable[[], float]:
        return lambda: (order.append(name), seconds)[1]

    runs = {"a": named("a", 1.0), "b": named("b", 2.0)}
    samples, failed = sample_rounds(runs, FakeDevice(), GpuSettings(rounds=3, warmups=2))
    assert order == ["a", "b"] * 5
    assert (samples, failed) == ({"a": [1.0] * 3, "b": [2.0] * 3}, {})


def test_slow_cases_get_fewer_rounds(monkeypatch: pytest.MonkeyPatch):
    now = [0.0]
    monkeypatch.setattr("benchmarks.gpu_timing.time.monotonic", lambda: now[0])

    def slow() -> float:
        now[0] += 0.25
        return 0.25

    samples, _ = sample_rounds({"slow": slow}, FakeDevice(), GpuSettings(rounds=100, warmups=10, seconds=5.0))
    assert len(samples["slow"]) == 20
    samples, _ = sample_rounds({"slow": slow}, FakeDevice(), GpuSettings(rounds=100, warmups=10, seconds=1.0))
    assert len(samples["slow"]) == 10
    samples, _ = sample_rounds({"slow": slow}, FakeDevice(), GpuSettings(rounds=3, warmups=10, seconds=1.0))
    assert len(samples["slow"]) == 3


def test_whoever_fails_while_it_is_timed_drops_out():
    calls = iter([1.0, 1.0, 1.0])

    def tired() -> float:
        try:
            return next(calls)
        except StopIteration:
            raise MemoryError("out of\n memory") from None

    samples, failed = sample_rounds({"tired": tired, "ours": lambda: 2.0}, FakeDevice(), GpuSettings(5, warmups=1))
    assert samples == {"ours": [2.0] * 5}
    assert failed == {"tired": "MemoryError: out of memory"}


def test_a_long_reason_is_cut():
    assert len(reason(ValueError("x" * 5000))) == 300


def test_a_budget_is_spent_when_its_seconds_have_passed():
    now = [10.0]
    budget = Budget(5, clock=lambda: now[0])
    assert not budget.is_spent
    now[0] = 15.0
    assert budget.is_spent
    assert not Budget(None).is_spent


SAMPLED = (
    Case("", (19,), 5, heads=4, key_heads=2, head_dim=3, batch=2),
    Case("", (11, 14), (4, 3), stride=(2, 3), dilation=(2, 1), is_causal=(False, True), bias=True, head_dim=4),
    Case("", (4, 5, 6), (3, 2, 5), is_causal=(True, False, False), bias=True, head_dim=4),
)


@pytest.mark.parametrize("case", SAMPLED)
@pytest.mark.parametrize("expect", [expect_everything, lambda *args: expect_samples(*args, 30, 6)])
def test_expected_results_are_those_of_natten2(case: Case, expect: Callable):
    inputs = make_inputs(case, torch.float32, requires_grad=True)
    results = STEPS["fwdbwd"](IMPLEMENTATIONS[OURS].attend, case, inputs)
    expected = expect(case, inputs, True)
    check("natten2", expected.pick(results), expected.values, 1e-5, 1e-6)
    (output,) = expect(case, inputs, False).pick(results[:1])
    assert torch.equal(output, expected.pick(results)[0])


@pytest.mark.parametrize("index", range(4))
def test_samples_find_a_wrong_tensor(index: int):
    case = SAMPLED[0]
    inputs = make_inputs(case, torch.float32, requires_grad=True)
    results = list(STEPS["fwdbwd"](IMPLEMENTATIONS[OURS].attend, case, inputs))
    expected = expect_samples(case, inputs, True, 30, 6)
    results[index] = results[index].roll(1, dims=1)
    with pytest.raises(WrongResultError):
        check("rolled", expected.pick(results), expected.values, 0.05, 1e-6)


def test_images_are_checked_in_pieces(monkeypatch: pytest.MonkeyPatch):
    case = Case("", (6, 7), 3, batch=5, bias=True, head_dim=4)
    inputs = make_inputs(case, torch.float32, requires_grad=True)
    whole = expect_everything(case, inputs, True)
    monkeypatch.setattr("benchmarks.gpu_check._GATHERED", 2 * 42 * 9 * 8)
    torch.testing.assert_close(expect_everything(case, inputs, True).values, whole.values)


@pytest.mark.parametrize("bias", [False, True])
def test_swin_on_fused_attention_is_swin(bias: bool):
    inputs = make_inputs(Case("", (6, 9), 3, head_dim=4, batch=2, bias=bias), torch.float64)
    arguments = (*inputs.tensors[:4], 3, 0.3)
    torch.testing.assert_close(swin_sdpa_attention(*arguments), swin_attention(*arguments))


def test_tiles_are_boxes_and_come_back():
    order = Order((4, 6), (2, 3))
    tensor = torch.arange(24).reshape(1, 4, 6, 1, 1)
    arranged = order.arrange(tensor)
    assert arranged.flatten()[:6].tolist() == [0, 1, 2, 6, 7, 8]
    assert torch.equal(order.restore(arranged), tensor)
    row, column = order.coordinates(torch.arange(24))
    assert torch.equal(6 * row + column, arranged.flatten())
    assert (tile_for((32, 24)), tile_for((32, 20)), tile_for((128,))) == ((16, 8), None, None)


@pytest.mark.parametrize(
    "case",
    [
        Case("", (16, 16), 5, dilation=(1, 3), stride=(2, 1), is_causal=(False, True), bias=True, head_dim=16),
        Case("", (150,), 20, heads=4, key_heads=2, head_dim=16),
    ],
)
@pytest.mark.parametrize("is_tiled", [False, True])
@pytest.mark.filterwarnings("ignore:flex_attention called without")
def test_flex_is_neighborhood_attention(case: Case, is_tiled: bool):
    inputs = make_inputs(case, torch.float32)
    attend = prepare_flex(case, inputs, tile_for(case.spatial) if is_tiled else None)
    expected = expect_everything(case, inputs, False)
    check("flex", [attend(case, inputs)], expected.values, 1e-5, 1e-6)


@pytest.fixture
def run() -> Run:
    return Run(NoGpu(), Rates(1e9, 1e9), QUICK, names=(OURS, "rival"))


def with_rival(monkeypatch: pytest.MonkeyPatch, attend: Callable[[Case, Inputs], Tensor]) -> None:
    monkeypatch.setitem(GPU_IMPLEMENTATIONS, "rival", GpuImplementation(lambda *_: attend, lambda case: case))


@pytest.mark.parametrize("mode", ["fwd", "fwdbwd", "bwd"])
@pytest.mark.parametrize("is_latency", [False, True])
def test_every_mode_is_measured(monkeypatch: pytest.MonkeyPatch, run: Run, mode: str, is_latency: bool):
    with_rival(monkeypatch, IMPLEMENTATIONS["gather"].attend)
    one = measure(replace(SMALL, is_latency=is_latency), mode, run)
    assert one.failed == {}
    assert one.results.keys() == {OURS, "rival"}
    assert one.ratio.keys() == {"rival"}
    for result in one.results.values():
        assert 0 < result.p20_us <= result.median_us <= result.p80_us
        assert result.tflop_per_s * result.median_us * 1e6 == pytest.approx(useful_flops(SMALL.case, mode), rel=1e-3)
        assert result.memory_percent == pytest.approx(100 * one.memory_floor_us / result.median_us, rel=1e-2)
        assert result.matrix_percent == pytest.approx(100 * one.matrix_floor_us / result.median_us, rel=1e-2)


@pytest.mark.parametrize("mode", ["fwd", "bwd"])
def test_a_wrong_rival_fails_alone(monkeypatch: pytest.MonkeyPatch, run: Run, mode: str):
    with_rival(monkeypatch, lambda case, inputs: sum(tensor.sum() for tensor in inputs.leaves) + 1.2 * inputs.value)
    one = measure(SMALL, mode, run)
    assert one.results.keys() == {OURS}
    assert one.failed["rival"].startswith("WrongResultError: rival on small in torch.bfloat16: relative error")


def test_a_failing_rival_fails_alone(monkeypatch: pytest.MonkeyPatch, run: Run):
    def fail(case: Case, inputs: Inputs) -> Tensor:
        raise torch.OutOfMemoryError("no memory")

    with_rival(monkeypatch, fail)
    one = measure(SMALL, "fwd", run)
    assert one.results.keys() == {OURS}
    assert one.failed == {"rival": "OutOfMemoryError: no memory"}
    assert "small fwd: rival failed: OutOfMemoryError: no memory" in format_gpu_records([one])


def test_inputs_that_do_not_fit_fail_the_case_alone(monkeypatch: pytest.MonkeyPatch, run: Run):
    with_rival(monkeypatch, IMPLEMENTATIONS["gather"].attend)

    def fail(*args: object, **options: object) -> Inputs:
        raise torch.OutOfMemoryError("no memory")

    monkeypatch.setattr("benchmarks.gpu.make_inputs", fail)
    one = measure(SMALL, "fwd", run)
    assert one.results == {}
    assert one.failed == dict.fromkeys((OURS, "rival"), "OutOfMemoryError: no memory")
    assert "rival failed" in format_gpu_records([one])


def test_rivals_are_left_out_when_the_budget_is_spent(monkeypatch: pytest.MonkeyPatch, run: Run):
    with_rival(monkeypatch, IMPLEMENTATIONS["gather"].attend)
    one = measure(SMALL, "fwd", replace(run, budget=Budget(0)))
    assert one.results.keys() == {OURS}
    assert one.failed == {"rival": "not started: the budget was spent"}


def test_without_natten2_rivals_have_no_ratio(run: Run):
    one = record(SMALL, "fwd", {"rival": [1.0, 2.0]}, {"rival": SMALL.case}, {OURS: "broken"}, run.rates)
    assert one.ratio == {}
    assert f"{OURS} failed: broken" in format_gpu_records([one])


@pytest.mark.parametrize(
    ("goal", "reached"),
    [
        (Goal("G", "ms", 1.0, 0.1), True),
        (Goal("G", "memory %", 50, 80), False),
        (Goal("G", "TFLOP/s", 0, 1), True),
        (Goal("G", "rival", 3, 4), True),
        (Goal("G", "rival", 3.1, 4), False),
    ],
)
def test_goals(run: Run, goal: Goal, reached: bool):
    job = replace(SMALL, modes=("bwd", "fwd"), goals=(goal, Goal("other", "absent", 1, 1)))
    meanings = dict.fromkeys((OURS, "rival"), SMALL.case)
    quadruple = 4 * floors(SMALL.case, "bwd", run.rates).memory
    one = record(job, "bwd", {OURS: [quadruple], "rival": [3 * quadruple]}, meanings, {}, run.rates)
    assert one.results[OURS].memory_percent == pytest.approx(25)
    (judged,) = one.goals
    assert judged["reached"] == reached
    assert ("reached:" if reached else "missed:") in format_gpu_records([one])
    assert record(job, "fwd", {OURS: [quadruple]}, meanings, {}, run.rates).goals == []
    assert "missed: no result" in format_gpu_records([record(job, "bwd", {}, meanings, {OURS: "broken"}, run.rates)])


@pytest.mark.filterwarnings("ignore:flex_attention called without")
def test_the_command_writes_every_number_it_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    pytest.importorskip("matplotlib")
    file, picture = tmp_path / "new" / "gpu.json", tmp_path / "new" / "gpu.png"
    cases = ["--case", "nat-tiny-4-b128", "nat-tiny-4-b1-latency", "hunyuan-video-stride"]
    main(["gpu", "--no-gpu", "--rounds", "2", *cases, "--json", str(file), "--plot", str(picture)])
    content = json.loads(file.read_text())
    assert content["machine"]["device"] == NO_GPU
    assert {"torch", "triton", "natten", "natten2"} <= content["machine"].keys()
    assert content["canary"].keys() == {"gemm_tflop_per_s", "copy_gb_per_s"}
    assert content["settings"] == {"rounds": 2, "warmups": 1, "seconds": 1.0, "repeats": 2, "dtype": "bfloat16"}
    records = read_records(content)
    assert json.loads(json.dumps([asdict(one) for one in records])) == content["records"]
    assert [(one.case, one.mode) for one in records] == [
        ("hunyuan-video-stride", "fwd"),
        ("nat-tiny-4-b128", "fwd"),
        ("nat-tiny-4-b128", "fwdbwd"),
        ("nat-tiny-4-b1-latency", "fwd"),
    ]
    assert [one.results.keys() for one in records] == [
        {OURS, "flex-tiled", "flex"},
        {OURS, "swin", "flex"},
        {OURS, "swin"},
        {OURS, "swin", "flex"},
    ]
    # On a processor FlexAttention has no gradients.
    assert [one.failed.keys() for one in records] == [set(), set(), {"flex"}, set()]
    assert picture.read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    assert printed.startswith(NO_GPU)
    assert "nat-tiny-4-b128 fwdbwd: flex failed: NotImplementedError" in printed


def test_a_spent_budget_starts_nothing_and_a_later_run_takes_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    file = tmp_path / "gpu.json"
    options = ["gpu", "--no-gpu", "--rounds", "1", "--implementation", OURS, "--json", str(file)]
    main([*options, "--case", "volume", "--mode", "fwd"])
    before = json.loads(file.read_text())["records"]
    capsys.readouterr()

    monkeypatch.setattr("benchmarks.gpu.Budget", lambda seconds: Budget(0))
    main([*options, "--case", "volume", "nat-tiny-4-b128", "--mode", "fwd", "--budget-seconds", "1", "--resume"])
    assert "not started: nat-tiny-4-b128 fwd" in capsys.readouterr().out
    monkeypatch.undo()
    main([*options, "--case", "volume", "nat-tiny-4-b128", "--mode", "fwd", "--resume"])
    after = json.loads(file.read_text())["records"]
    assert after[:1] == before
    assert [one["case"] for one in after] == ["volume", "nat-tiny-4-b128"]

    capsys.readouterr()
    main(["gpu", "--show", str(file), str(file)])
    printed = capsys.readouterr().out
    assert printed.count(NO_GPU) == 2
    assert printed.count("nat-tiny-4-b128") == 2


def test_numbers_of_two_devices_are_not_mixed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    file = tmp_path / "gpu.json"
    options = ["gpu", "--no-gpu", "--rounds", "1", "--implementation", OURS, "--json", str(file), "--mode", "fwd"]
    main([*options, "--case", "volume"])
    monkeypatch.setattr(NoGpu, "describe", lambda self: {"device": "another"})
    with pytest.raises(SystemExit, match=f"was measured on {NO_GPU}, and this is another"):
        main([*options, "--case", "nat-tiny-4-b128", "--resume"])


def test_a_failure_of_natten2_is_the_exit_status(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    broken = GpuImplementation(lambda case, inputs: lambda *_: 2 * inputs.value, lambda case: case)
    monkeypatch.setitem(GPU_IMPLEMENTATIONS, OURS, broken)
    file = tmp_path / "gpu.json"
    options = ["gpu", "--no-gpu", "--case", "nat-tiny-4-b128", "--json", str(file)]
    with pytest.raises(SystemExit, match=f"error: {OURS} failed in nat-tiny-4-b128 fwd"):
        main([*options, "--mode", "fwd", "--implementation", OURS, "swin"])
    (one,) = read_records(json.loads(file.read_text()))
    assert one.results.keys() == {"swin"}
    assert "WrongResultError" in capsys.readouterr().out


def test_a_lost_device_ends_the_run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.setattr(NoGpu, "is_lost", lambda self: True)
    with pytest.raises(SystemExit) as exit_:
        main(["gpu", "--no-gpu", "--case", "volume", "--mode", "fwd", "--implementation", OURS])
    assert exit_.value.code == 75
    captured = capsys.readouterr()
    assert "not started: volume fwd" in captured.out
    assert "the device was lost" in captured.err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_the_command_says_so():
    with pytest.raises(SystemExit, match="there is no GPU; --no-gpu tries"):
        main(["gpu"])


def test_what_is_compiled_ahead_covers_every_job():
    ahead = gpu_warm.problems(is_small=False)
    for job in JOBS:
        for mode in job.modes:
            step = "fwd" if mode == "fwd" else "fwdbwd"
            assert any(
                (one.parameters, one.bias, how) == (job.case.parameters, job.case.bias, step) for one, _, how in ahead
            )


def test_a_problem_that_fails_ahead_gives_its_reason():
    assert gpu_warm._run((SMALL.case, torch.float32, "fwdbwd"), "cpu") is None
    assert "small torch.int8 fwd: TypeError: " in gpu_warm._run((SMALL.case, torch.int8, "fwd"), "cpu")


def test_the_sweep_for_the_sanitizer_runs(capsys: pytest.CaptureFixture[str]):
    sanitize.main(["--device", "cpu"])
    assert len(capsys.readouterr().out.splitlines()) == len(sanitize.SWEEP)
