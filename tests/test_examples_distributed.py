"""The programs of examples/ that run on several processes."""

import subprocess
import sys

import pytest

from examples import context_parallel


@pytest.mark.long
def test_losses_on_four_processes_are_those_of_one():
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "4"]
    program = ["-m", "examples.context_parallel", "--height", "43", "--width", "12", "--steps", "8"]
    run = subprocess.run([*command, *program], capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
    assert "Rows of the processes: 11, 11, 11, 10." in run.stdout


def test_losses_that_differ_are_an_error():
    with pytest.raises(SystemExit, match=r"error: losses differ by 2\.0e-06"):
        context_parallel.compare([1.0, 1.000002], [1.0, 1.0], [2, 2])
    with pytest.raises(SystemExit, match="error: losses differ by nan"):
        context_parallel.compare([float("nan")], [1.0], [2, 2])


def test_one_process_is_told_to_use_torchrun(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(SystemExit, match="start it with torchrun"):
        context_parallel.main([])
