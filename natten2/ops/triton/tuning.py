"""Chooses tilings by trying them, where `NATTEN2_AUTOTUNE=1` asks for it, and keeps the choices on disk.

A choice is made once for everything that a kernel is compiled for, at the first size that comes, and holds for every
other size. It is made outside of CUDA graphs alone: inside one, the model's tiling is taken.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import cache
from pathlib import Path
from tempfile import NamedTemporaryFile

import torch
import triton
from torch import Tensor

from natten2.ops.triton.tiles import Tiling, candidate_tilings, choose_tiling

__all__ = ["tuned"]

_chosen: dict[str, Tiling] = {}


def tuned(
    name: str,
    inputs: Sequence[Tensor | None],
    window: tuple[tuple[int, ...], tuple[int, ...], tuple[bool, ...]],
    precision: str,
    run: Callable[[Tiling], object],
) -> Tiling:
    """The tiling to take.

    Args:
        name: The pass, `"forward"` or `"backward"`.
        inputs: The operator's tensors.
        window: `kernel_size`, `stride`, and `is_causal`.
        precision: Of products.
        run: Launches the kernels of the call with a tiling.

    Raises:
        ValueError: `NATTEN2_AUTOTUNE` is neither 0 nor 1, or the file of choices can't be read.
    """
    query, _, value, rpb, additional_keys, _ = inputs
    row_bytes = max(query.shape[-1], value.shape[-1]) * query.element_size()
    default = choose_tiling(*window, row_bytes, is_backward=name == "backward")
    if not _is_wanted():
        return default
    kinds = (str(query.dtype), query.shape[-1], value.shape[-1], rpb is not None, additional_keys is not None)
    key = json.dumps([name, _device_name(query.device), triton.__version__, *kinds, precision, window])
    if not _chosen:
        _chosen.update(_read())
    if key not in _chosen:
        if _is_capturing(query.device):
            return default
        _chosen[key] = _fastest((default, *candidate_tilings(*window)), run)
        _write(_read() | _chosen)
    return _chosen[key]


def _is_wanted() -> bool:
    setting = os.environ.get("NATTEN2_AUTOTUNE", "0")
    if setting not in ("0", "1"):
        raise ValueError(f"NATTEN2_AUTOTUNE must be 0 or 1, got {setting!r}")
    return setting == "1"


@cache
def _device_name(device: torch.device) -> str:
    return torch.get_device_module(device).get_device_name(device)


def _is_capturing(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def _fastest(tilings: Sequence[Tiling], run: Callable[[Tiling], object]) -> Tiling:
    """Of tilings that fit the device; the first of them must."""
    times = {}
    for tiling in dict.fromkeys(tilings):
        try:
            times[tiling] = triton.testing.do_bench(lambda tiling=tiling: run(tiling), return_mode="median")
        except triton.OutOfResources:
            if not times:
                raise
    return min(times, key=times.__getitem__)


def _path() -> Path:
    cache_home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("NATTEN2_CACHE_DIR") or Path(cache_home) / "natten2") / "tilings.json"


def _read() -> dict[str, Tiling]:
    path = _path()
    if not path.exists():
        return {}
    try:
        return {key: Tiling(**_as_tuples(choice)) for key, choice in json.loads(path.read_text()).items()}
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} holds no choices of natten2; delete it to choose again") from error


def _write(choices: dict[str, Tiling]) -> None:
    path = _path()
    path.parent.mkdir(parents=True, exist_ok=True)
    # Other processes may read or write it now: the last one to rename its file wins.
    with NamedTemporaryFile("w", dir=path.parent, suffix=".json", delete=False) as file:
        json.dump({key: asdict(choice) for key, choice in choices.items()}, file, indent=1)
    os.replace(file.name, path)


def _as_tuples(choice: dict[str, object]) -> dict[str, object]:
    return {name: tuple(value) if isinstance(value, list) else value for name, value in choice.items()}
