"""NAT-Tiny against Swin-Tiny, end to end: inference and a training step, both compiled.

Swin runs its un-fused window attention, and PyTorch's fused one. Ratios are medians over interleaved rounds in one
process, of the CPU time on one thread, and of the wall time on more. Every compiled model is compared with itself in
eager mode before it is timed. Peak memory is that of one step in a process of its own, less what it held before.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median

import torch
from torch import Tensor, nn
from torch.nn import functional
from tqdm import tqdm

from benchmarks.compare import DTYPES, check
from benchmarks.cpu import positive
from benchmarks.memory import format_memory, in_a_process, measure_memory, peak_bytes
from benchmarks.report import describe_machine, format_table, write_json
from benchmarks.swin import SwinTiny
from benchmarks.timing import Settings, clock_for, interleave, ratio, threads
from natten2.models import create

__all__ = ["MODELS", "MODES", "Speed", "add_arguments", "main", "measure"]

OURS = "nat-tiny"
MODELS: dict[str, Callable[[], nn.Module]] = {
    OURS: lambda: create("nat_tiny", drop_path_rate=0.0),
    "swin-tiny": SwinTiny,
    "swin-tiny-sdpa": lambda: SwinTiny(is_fused=True),
}
_SETTINGS = Settings(rounds=7, warmups=1, min_seconds=0.5, patience=60.0)
_TOLERANCES = {"float32": 1e-4, "bfloat16": 5e-2}


@dataclass(frozen=True)
class Speed:
    """One measurement; the dictionaries are keyed by model.

    Attributes:
        ratio: Of natten2's images per second to each one's.
        peak_bytes: At the peak of a step, more than before it; empty if memory was not measured.
    """

    dtype: str
    mode: str
    batch: int
    images_per_second: dict[str, float]
    ratio: dict[str, float]
    peak_bytes: dict[str, int]


def inference(model: nn.Module, images: Tensor) -> tuple[Tensor, ...]:
    with torch.no_grad():
        return (model(images),)


def training(model: nn.Module, images: Tensor) -> tuple[Tensor, ...]:
    """The loss, and the gradients of all parameters."""
    loss = functional.cross_entropy(model(images), torch.arange(len(images)))
    return loss, *torch.autograd.grad(loss, list(model.parameters()))


MODES: dict[str, Callable[[nn.Module, Tensor], tuple[Tensor, ...]]] = {"inference": inference, "training": training}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of :func:`main`."""
    parser.add_argument("--model", nargs="+", choices=MODELS, default=list(MODELS), metavar="NAME")
    parser.add_argument("--dtype", nargs="+", choices=_TOLERANCES, default=list(_TOLERANCES))
    parser.add_argument("--mode", nargs="+", choices=MODES, default=list(MODES))
    parser.add_argument("--batch", type=positive, default=8)
    parser.add_argument("--threads", type=positive, default=1, help="more than one are timed by the wall clock")
    parser.add_argument("--rounds", type=positive, help=f"samples of each model, by default {_SETTINGS.rounds}")
    parser.add_argument("--memory", action="store_true", help="peak memory of a step, and of one layer's, on Linux")
    parser.add_argument("--eager", dest="compile", action="store_false", help="without torch.compile, for a first look")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all numbers there as well")


def main(options: argparse.Namespace) -> None:
    """Measures what the options ask for, prints a table, and writes the file.

    Raises:
        WrongResultError: A compiled model disagrees with itself in eager mode.
    """
    settings = _SETTINGS if options.rounds is None else replace(_SETTINGS, rounds=options.rounds)
    names = list(dict.fromkeys([OURS, *options.model]))
    cases = [(dtype, mode) for dtype in options.dtype for mode in options.mode]
    progress = tqdm(cases, unit="case", desc="compiling and measuring")
    speeds = [measure(names, *case, options, settings) for case in progress]
    layers = [measure_memory(dtype) for dtype in options.dtype] if options.memory else []
    machine = describe_machine()
    print(f"{machine['processor']}, {options.threads} thread{'s' if options.threads > 1 else ''}")
    print("\n\n".join(filter(None, (_format(speeds), format_memory(layers)))))
    if options.json is not None:
        content = {
            "machine": machine,
            "settings": {**asdict(settings), "threads": options.threads, "compile": options.compile},
            "speeds": [asdict(speed) for speed in speeds],
            "layers": [asdict(layer) for layer in layers],
        }
        write_json(options.json, content)


def measure(names: Sequence[str], dtype: str, mode: str, options: argparse.Namespace, settings: Settings) -> Speed:
    """Checks the models, then times them in turns."""
    torch.compiler.reset()
    with threads(options.threads):
        steps = {name: make_step(name, dtype, mode, options.batch, options.compile) for name in names}
        samples = interleave(steps, settings, clock_for(options.threads))
    command = (dtype, mode, str(options.batch), str(int(options.compile)), str(options.threads))
    peaks = {name: in_a_process("benchmarks.models", name, *command) for name in names} if options.memory else {}
    return Speed(
        dtype,
        mode,
        options.batch,
        {name: options.batch / median(seconds) for name, seconds in samples.items()},
        {name: ratio(seconds, samples[OURS]) for name, seconds in samples.items() if name != OURS},
        peaks,
    )


def make_step(name: str, dtype: str, mode: str, batch: int, is_compiled: bool) -> Callable[[], object]:
    """A step of a model on random images, which was checked if it is compiled."""
    torch.manual_seed(0)
    model = MODELS[name]().to(DTYPES[dtype]).train(mode == "training")
    images = torch.randn(batch, 3, 224, 224, dtype=DTYPES[dtype])
    if not is_compiled:
        return lambda: MODES[mode](model, images)
    compiled = torch.compile(model, fullgraph=True, dynamic=False)
    results, expected = (_joined(MODES[mode](one, images)) for one in (compiled, model))
    check(f"{name}, {mode}", results, expected, _TOLERANCES[dtype], smallest_rms=0.0)
    return lambda: MODES[mode](compiled, images)


def _joined(results: Sequence[Tensor]) -> list[Tensor]:
    """The output and all gradients as one: some of them nearly vanish, and are noise."""
    gradients = [gradient.flatten() for gradient in results[1:]]
    return [results[0], *([torch.cat(gradients)] if gradients else [])]


def _format(speeds: Sequence[Speed]) -> str:
    rivals = [name for name in MODELS if name != OURS and any(name in speed.ratio for speed in speeds)]
    header = ["dtype", "mode", f"{OURS} images/s", *(f"of {name}'s" for name in rivals)]
    if any(speed.peak_bytes for speed in speeds):
        header += ["MiB", *(f"of {name}'s" for name in rivals)]
    return format_table(header, [_row(speed, rivals) for speed in speeds])


def _row(speed: Speed, rivals: Sequence[str]) -> list[str]:
    row = [speed.dtype, speed.mode, f"{speed.images_per_second[OURS]:.2f}", *(f"{speed.ratio[r]:.2f}" for r in rivals)]
    if not speed.peak_bytes:
        return row
    ours = speed.peak_bytes[OURS]
    return [*row, f"{ours / 2**20:.0f}", *(f"{ours / speed.peak_bytes[name]:.0%}" for name in rivals)]


if __name__ == "__main__":
    name, dtype, mode, batch, is_compiled, thread_count = sys.argv[1:]
    torch.set_num_threads(int(thread_count))
    step = make_step(name, dtype, mode, int(batch), bool(int(is_compiled)))
    step()
    print(peak_bytes(step))
