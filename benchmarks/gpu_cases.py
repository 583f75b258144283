"""The shapes that are measured on a GPU, the most valuable first. A new one is one line in `JOBS`."""

from __future__ import annotations

from dataclasses import dataclass, replace

from benchmarks.cases import NAT_TINY, Case

__all__ = ["JOBS", "MODES", "Goal", "Job", "shrink"]

MODES = ("fwd", "fwdbwd", "bwd")


@dataclass(frozen=True)
class Goal:
    """What a measurement has to reach.

    Attributes:
        name: Its name in the list of goals.
        measure: "memory %" and "matrix %" are shares of a floor, "TFLOP/s" counts useful operations, "ms" is a time,
            and the name of another implementation is the ratio of its time to natten2's.
        must, aim: The least that counts, and the hope; for a time, the most.
    """

    name: str
    measure: str
    must: float
    aim: float

    def reached(self, value: float) -> bool:
        return value <= self.must if self.measure == "ms" else value >= self.must


@dataclass(frozen=True)
class Job:
    """One case in some modes.

    Attributes:
        modes: "fwd", "fwdbwd" for the forward and the gradients, "bwd" for the gradients alone.
        is_latency: Measured as replays of a captured graph with everything in the cache, not as one cold call.
        goals: Of the first of the modes.
    """

    case: Case
    modes: tuple[str, ...] = ("fwd",)
    is_latency: bool = False
    goals: tuple[Goal, ...] = ()

    @property
    def name(self) -> str:
        return self.case.name


def _batched(case: Case, batch: int, **changes: object) -> Case:
    return replace(case, name=f"{case.name}-b{batch}", batch=batch, **changes)


def _dilated(case: Case, dilation: int) -> Case:
    return replace(_batched(case, 128, dilation=dilation), name=f"di{case.name}-b128")


_STAGES = tuple(_batched(case, 128) for case in NAT_TINY)
# Two image generators and a video generator (Generalized Neighborhood Attention, arXiv 2504.16922, table 3).
_FLUX = Case("flux", (256, 256), 80, heads=24, head_dim=128)
_HUNYUAN = Case("hunyuan-video", (30, 48, 80), (18, 24, 24), heads=24, head_dim=128)
_COSMOS = Case("cosmos", (16, 44, 80), (16, 12, 24), heads=32, head_dim=128)
_SEQUENCE = Case("sequence-32k", (32768,), 2048, heads=1, head_dim=128)

_SMALL_WINDOWS = (Goal("G1", "memory %", 50, 80), Goal("G1", "swin", 2, 4), Goal("G1", "flex", 3, 10))


def _published(name: str, tflops: float, must: float, aim: float) -> tuple[Goal, ...]:
    """A goal as factors of what NATTEN's authors publish for an H100."""
    return (Goal(name, "TFLOP/s", must * tflops, aim * tflops),)


JOBS = (
    *(Job(case, ("fwd",), goals=_SMALL_WINDOWS) for case in _STAGES[:3]),
    Job(replace(_STAGES[0], name="nat-tiny-1-b128-training"), ("fwdbwd",), goals=(Goal("G2", "memory %", 40, 60),)),
    Job(_SEQUENCE, goals=_published("G3", 362, 1.15, 1.6)),
    Job(replace(_SEQUENCE, name="sequence-32k-h16", heads=16), goals=_published("G3", 362, 1.15, 1.6)),
    Job(_FLUX, goals=_published("G4", 277, 1.3, 1.8)),
    Job(_HUNYUAN, goals=_published("G5", 174, 1.7, 2.4)),
    Job(replace(_FLUX, name="flux-stride", stride=16), goals=_published("G6", 486, 0.9, 1.2)),
    Job(
        replace(_HUNYUAN, name="hunyuan-video-stride", stride=(16, 8, 8)),
        goals=_published("G6", 504, 0.9, 1.2),
    ),
    Job(Case("volume", (32, 32, 32), 3, heads=4, head_dim=64), ("bwd", "fwd"), goals=(Goal("G9", "ms", 1.0, 0.15),)),
    Job(_STAGES[3], ("fwd", "fwdbwd")),
    *(Job(_dilated(case, dilation), ("fwd",)) for case, dilation in zip(NAT_TINY, (8, 4, 2), strict=False)),
    Job(Case("hdit-1", (256, 256), 7, heads=2, head_dim=64, batch=8)),
    Job(Case("hdit-2", (128, 128), 7, heads=4, head_dim=64, batch=8)),
    Job(Case("dinat-large-1", (96, 96), 11, heads=6, batch=32, bias=True)),
    Job(Case("ltx-5", (32, 128, 128), 11, heads=4, head_dim=64)),
    *(Job(case, ("fwdbwd",)) for case in (replace(one, name=f"{one.name}-training") for one in _STAGES[1:3])),
    Job(Case("ltx-1", (16, 34, 60), (3, 7, 7), heads=32, head_dim=64)),
    Job(_COSMOS),
    Job(Case("video-b8", (16, 56, 56), (3, 7, 7), heads=2, batch=8)),
    *(
        Job(replace(_batched(case, batch), name=f"{case.name}-b{batch}-latency"), ("fwd",), is_latency=True)
        for batch in (1, 8)
        for case in NAT_TINY
    ),
)

# Lengths of a small axis by rank: a window of 7 still divides 14, and a tile of the tiled baseline 16.
_SMALL_LENGTHS = {1: (64,), 2: (16, 16), 3: (4, 8, 8)}
_SMALL_KERNELS = {1: 16, 2: 7, 3: 3}


def shrink(job: Job) -> Job:
    """The same kind of job, small enough for a processor, in a moment; its goals mean nothing there."""
    case = job.case
    kernel_size, stride, dilation, _, _ = case.parameters
    rank = len(case.spatial)
    kernel_size = tuple(min(window, _SMALL_KERNELS[rank]) for window in kernel_size)
    lengths = zip(case.spatial, _SMALL_LENGTHS[rank], kernel_size, strict=True)
    small = replace(
        case,
        spatial=tuple(_small_length(*axis) for axis in lengths),
        kernel_size=kernel_size,
        stride=tuple(map(min, stride, kernel_size)),
        dilation=tuple(min(gap, 2) for gap in dilation),
        heads=min(case.heads, 2),
        head_dim=min(case.head_dim, 16),
        batch=min(case.batch, 2),
    )
    return replace(job, case=small, goals=())


def _small_length(length: int, small: int, kernel_size: int) -> int:
    divided = small // kernel_size * kernel_size
    return min(length, divided if length % kernel_size == 0 and kernel_size == 7 else small)
