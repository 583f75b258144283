"""What a benchmark leaves behind: a table for the terminal, and a file whose versions differ in numbers only."""

from __future__ import annotations

import json
import platform
from collections.abc import Sequence
from pathlib import Path
from statistics import geometric_mean

import torch

import natten2
from benchmarks.compare import ONE_THREAD, Record
from benchmarks.implementations import IMPLEMENTATIONS, OURS
from natten2._extension import cpu_capability

__all__ = ["describe_machine", "format_records", "format_table", "write_json"]


def format_records(records: Sequence[Record]) -> str:
    """A table of all measurements, then for each rival the mean of its ratios and the one that is worst for natten2."""
    names = (*IMPLEMENTATIONS, ONE_THREAD)
    rivals = [name for name in names if any(name in record.ratio for record in records)]
    header = ["case", "dtype", "mode", f"{OURS} ms", "min ms", "% of peak", *(f"{name} / {OURS}" for name in rivals)]
    table = format_table(header, [_row(record, rivals) for record in records])
    compared = {name: [record for record in records if name in record.ratio] for name in rivals}
    missing = dict.fromkeys(line for record in records for line in _missing(record))
    return "\n".join([table, "", *(_conclusion(name, some) for name, some in compared.items()), *missing])


def format_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Aligned columns: the first to the left, the others to the right."""
    lines = [header, *rows]
    widths = [max(len(cells[column]) for cells in lines) for column in range(len(header))]
    lines.insert(1, ["-" * width for width in widths])
    aligned = [[cells[0].ljust(widths[0]), *map(str.rjust, cells[1:], widths[1:])] for cells in lines]
    return "\n".join("  ".join(cells) for cells in aligned)


def write_json(path: Path, content: dict[str, object]) -> None:
    """Writes `content`, and the folder of `path` where it is missing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2) + "\n")


def describe_machine() -> dict[str, str]:
    """The processor, and the versions that decide the speed."""
    return {
        "processor": _processor(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torch_cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "natten2": natten2.__version__,
        "natten2_cpu_capability": cpu_capability(),
    }


def _row(record: Record, rivals: Sequence[str]) -> list[str]:
    times = [f"{milliseconds[OURS]:.3f}" if milliseconds else "-" for milliseconds in (record.median_ms, record.min_ms)]
    share = f"{100 * record.share_of_peak[OURS]:.1f}" if record.share_of_peak else "-"
    ratios = [f"{record.ratio[name]:.2f}" if name in record.ratio else "-" for name in rivals]
    return [record.case, record.dtype, record.mode, *times, share, *ratios]


def _missing(record: Record) -> list[str]:
    """What could not be measured, and why."""
    label = f"{record.case} {record.dtype} {record.mode}"
    skipped = [] if record.skipped is None else [f"skipped {label}: {record.skipped}"]
    return skipped + [f"{name} failed on {label}: {why}" for name, why in record.failed.items()]


def _conclusion(rival: str, records: Sequence[Record]) -> str:
    mean = geometric_mean(record.ratio[rival] for record in records)
    worst = min(records, key=lambda record: record.ratio[rival])
    return (
        f"{rival} takes {mean:.2f} times as long as {OURS} (geometric mean of {len(records)}); "
        f"at least {worst.ratio[rival]:.2f} times ({worst.case}, {worst.dtype}, {worst.mode})."
    )


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())
