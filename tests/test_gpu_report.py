"""`benchmarks/gpu_report.sh`, run without a GPU."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("tqdm")

from benchmarks.gpu_device import NO_GPU

ROOT = Path(__file__).parent.parent


def report(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [ROOT / "benchmarks" / "gpu_report.sh", *arguments],
        env={"PATH": "/usr/bin:/bin", "HOME": "/tmp", "PYTHON": sys.executable, **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )


def states(output: str) -> dict[str, str]:
    rows = output[output.index("part       state") :].splitlines()[1:-1]
    return {row.split()[0]: row.split()[1] for row in rows}


def test_the_report_runs_through_and_resumes(tmp_path: Path):
    first = report("--no-gpu", str(tmp_path))
    assert first.returncode == 0, first.stdout + first.stderr
    parts = [
        "build",
        "about",
        "cuda-tests",
        "tests",
        "warm",
        "bench",
        "cuda-mem",
        "cuda-race",
        "memcheck",
        "flex",
        "racecheck",
    ]
    assert states(first.stdout) == dict.fromkeys(parts, "ok")
    measured = {f"gpu-no-gpu{rival}.{kind}" for rival in ("", "-flex") for kind in ("json", "png")}
    assert {path.name for path in tmp_path.iterdir()} == measured | {"log.txt", "report.txt", "status.tsv"}
    assert (tmp_path / "report.txt").read_text() in first.stdout
    assert all(f"\n== {part}\n" in (tmp_path / "log.txt").read_text() for part in parts)
    assert NO_GPU in first.stdout

    second = report("--no-gpu", str(tmp_path))
    assert second.returncode == 0
    assert states(second.stdout) == dict.fromkeys(parts, "ok")
    assert second.stdout.count("earlier, kept") == len(parts)


def test_a_failing_part_stops_no_other(tmp_path: Path):
    python = tmp_path / "python"
    python.write_text(
        "#!/bin/sh\n"
        'case "$*" in "-m pytest"*) echo broken; exit 3 ;;\n'
        '"-m benchmarks.gpu_warm"*) sleep 60 ;; *) echo fine ;; esac\n'
    )
    python.chmod(0o755)
    finished = report("--no-gpu", str(tmp_path / "out"), PYTHON=str(python), DEADLINE="7")
    assert finished.returncode == 1
    assert states(finished.stdout) == {
        "build": "ok",
        "about": "ok",
        "cuda-tests": "failed",
        "tests": "failed",
        "warm": "failed",
        "bench": "skipped",
        "cuda-mem": "skipped",
        "cuda-race": "skipped",
        "memcheck": "skipped",
        "flex": "skipped",
        "racecheck": "skipped",
    }
    assert "exit status 3: broken" in finished.stdout
    assert "ran out of time" in finished.stdout
    assert "no time was left" in finished.stdout


def test_unknown_options_of_the_report_are_refused():
    finished = report("--bogus")
    assert finished.returncode == 2
    assert "unknown option --bogus" in finished.stderr
    assert "--no-gpu" in report("--help").stdout
