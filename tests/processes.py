"""Runs a function on a process of its own, or on several that form a process group."""

from __future__ import annotations

import gc
import multiprocessing
import os
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from torch.multiprocessing import start_processes


def run_apart(function: Callable[..., None], *args: object) -> None:
    """Calls `function(*args)` on a process of its own, of which nothing stays behind."""
    process = _context().Process(target=function, args=args)
    process.start()
    process.join()
    assert process.exitcode == 0


def run_on(processes: int, function: Callable[..., None], directory: Path, *args: object) -> None:
    """Calls `function(*args)` on every process, in a gloo group that meets in the empty `directory`."""
    _context()
    start_processes(_run, (processes, function, directory / "store", args), nprocs=processes, start_method="forkserver")


def _context() -> multiprocessing.context.BaseContext:
    """Processes are forked off one that has imported all that is slow to import."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["natten2.distributed", "torch.testing"])
    return context


def _run(rank: int, processes: int, function: Callable[..., None], store: Path, args: tuple[object, ...]) -> None:
    torch.set_num_threads(1)
    if Path("/sys/class/net/lo").exists():
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=processes)
    function(*args)
    # A DDP model that outlives the group waits for its threads with Python's lock, which they may want.
    gc.collect()
    dist.barrier()
    dist.destroy_process_group()
