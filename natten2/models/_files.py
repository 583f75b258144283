"""Files of weights: local ones and downloads, of `torch.save` and of safetensors, that are trusted with nothing."""

from __future__ import annotations

import hashlib
import json
import math
import re
from argparse import Namespace
from os import PathLike, fspath
from pathlib import Path
from urllib.parse import unquote, urlparse

import torch
from torch import Tensor

__all__ = ["fetch", "read"]

_SCHEMES = ("https", "http", "file")
_BLOCK_BYTES = 2**20
_LONGEST_REASON = 300
_MOST_SHOWN = 40
# https://huggingface.co/docs/safetensors: the header's length in 8 bytes, the header, and the tensors' bytes.
_LENGTH_BYTES = 8
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


def fetch(path_or_url: str | PathLike[str], sha256: str | None) -> Path:
    """The local file, downloaded where it is a URL, with the digest that was asked for."""
    if not isinstance(path_or_url, (str, PathLike)):
        raise TypeError(f"path_or_url must be a string or a path, got {path_or_url!r}")
    if not (sha256 is None or isinstance(sha256, str)):
        raise TypeError(f"sha256 must be a string or None, got {sha256!r}")
    if sha256 is not None and not re.fullmatch("[0-9a-fA-F]{64}", sha256):
        raise ValueError(f"sha256 must be 64 hexadecimal digits, got {sha256!r}")
    is_url = isinstance(path_or_url, str) and "://" in path_or_url
    path = _download(path_or_url) if is_url else Path(fspath(path_or_url))
    if not path.is_file():
        raise FileNotFoundError(f"path_or_url must be that of a file, got {path}")
    if sha256 is not None and (digest := _digest(path)) != sha256.lower():
        if is_url:
            path.unlink()
        raise ValueError(f"{path_or_url} must have the sha256 digest {sha256.lower()}, but has {digest}")
    return path


def read(path: Path) -> object:
    """What a file holds: for safetensors a dictionary of tensors, and else what `torch.save` was given.

    Raises:
        ValueError: The file is damaged, or holds anything but tensors and plain values.
    """
    with path.open("rb") as file:
        start = file.read(_MOST_SHOWN)
    if path.suffix == ".safetensors" or (start[:2] != b"PK" and start[_LENGTH_BYTES:].startswith(b"{")):
        return _read_safetensors(path)
    try:
        # Training programs save their options too.
        with torch.serialization.safe_globals([Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True)
    # A damaged pickle may fail anywhere.
    except Exception as error:
        reason = f"it begins with the text {start.decode()!r}" if _is_text(start) else _reason(error)
        raise ValueError(f"{path} is damaged, or holds more than tensors and plain values: {reason}") from error


def _is_text(start: bytes) -> bool:
    """Whether this is the start of a web page, an index, or a pointer to the file, but not of the file itself."""
    return bool(start) and start.isascii() and start.decode().replace("\n", "").isprintable()


def _reason(error: Exception) -> str:
    """What torch's unpickler found, without its advice to trust the file."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    found = next((line for line in lines if "unsupported" in line.lower()), lines[0])
    return found.partition(" Please")[0].partition(". In PyTorch")[0][:_LONGEST_REASON]


def _digest(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_BLOCK_BYTES):
            digest.update(block)
    return digest.hexdigest()


def _download(url: str) -> Path:
    """The file that a URL was or is now downloaded to; URLs with the same last part don't share one."""
    parts = urlparse(url)
    if parts.scheme not in _SCHEMES:
        raise ValueError(f"path_or_url must be a path, or a URL with {', '.join(_SCHEMES)}, got {url!r}")
    name = f"{hashlib.sha256(url.encode()).hexdigest()[:12]}-{Path(unquote(parts.path)).name}"
    path = Path(torch.hub.get_dir()) / "checkpoints" / name
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(url, str(path))
    return path


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    content = path.read_bytes()
    length = int.from_bytes(content[:_LENGTH_BYTES], "little")
    start = _LENGTH_BYTES + length
    if len(content) < _LENGTH_BYTES or start > len(content):
        raise ValueError(f"{path} is truncated: its header takes {length} bytes, the file {len(content)}")
    try:
        header = json.loads(content[_LENGTH_BYTES:start])
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged: its header is no JSON") from error
    if not isinstance(header, dict):
        raise ValueError(f"{path} is damaged: its header is no JSON object")
    data = memoryview(content)[start:]
    return {name: _tensor(path, name, entry, data) for name, entry in header.items() if name != "__metadata__"}


def _tensor(path: Path, name: str, entry: object, data: memoryview) -> Tensor:
    """A tensor of safetensors, copied out of the file's data."""
    fields = entry if isinstance(entry, dict) else {}
    shape, offsets, dtype = fields.get("shape"), fields.get("data_offsets"), _DTYPES.get(str(fields.get("dtype")))
    if not (_are_sizes(shape) and _are_sizes(offsets) and len(offsets) == 2):
        raise ValueError(f"{path} is damaged: {name} has no shape or no place, {entry!r}"[:_LONGEST_REASON])
    if dtype is None:
        raise ValueError(f"{name} in {path} must be of dtype {', '.join(_DTYPES)}, got {fields.get('dtype')}")
    begin, end = offsets
    if not begin <= end <= len(data) or end - begin != math.prod(shape) * dtype.itemsize:
        raise ValueError(f"{path} is truncated or damaged: {name} of shape {shape} takes bytes {begin} to {end}")
    if begin == end:
        return torch.empty(shape, dtype=dtype)
    return torch.frombuffer(bytearray(data[begin:end]), dtype=dtype).reshape(shape)


def _are_sizes(value: object) -> bool:
    return isinstance(value, list) and all(type(size) is int and size >= 0 for size in value)
