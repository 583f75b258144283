"""A drop-in for the package `natten`: programs that import it run on natten2, unchanged.

`natten2.compat.install()`, or `python -m natten2.compat script.py`, or `import natten2.compat.natten as natten`.
`docs/natten.md` says what differs.
"""

from __future__ import annotations

import importlib.metadata
import sys
from collections.abc import Iterator
from importlib.machinery import ModuleSpec
from pathlib import Path

from natten2.compat._names import RELEASES, UNION, modules

__all__ = ["VERSIONS", "install", "uninstall"]

VERSIONS = tuple(version for version in RELEASES if version != UNION)
_hidden: dict[str, object] = {}


def install(version: str | None = None) -> None:
    """Makes `import natten` mean natten2, in this process, also where natten itself is installed.

    Args:
        version: The generation whose names and signatures to serve, one of `VERSIONS`, since they conflict: the fourth
            positional argument of the modules and the fifth of the fused functions is the dilation up to 0.17, the
            stride later. By default all names of all generations are there, a conflict is decided by the keywords
            that are used, and where they don't tell, the newest generation wins.

    Raises:
        ValueError: The version is unknown.
    """
    if version is not None and version not in VERSIONS:
        raise ValueError(f"version must be None or one of {', '.join(VERSIONS)}, got {version!r}")
    uninstall()
    chosen = UNION if version is None else version
    _hidden.update({name: sys.modules.pop(name) for name in list(sys.modules) if _is_natten(name)})
    for name, module in modules(chosen).items():
        module.__spec__ = ModuleSpec(name, None, origin="natten2.compat", is_package=True)
        module.__path__ = []
        module.__file__ = str(Path(__file__))
        sys.modules[name] = module
    sys.meta_path.insert(0, _Finder(RELEASES[chosen]))


def uninstall() -> None:
    """Undoes :func:`install`: `import natten` means again what it meant before."""
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        return
    sys.meta_path[:] = [finder for finder in sys.meta_path if not isinstance(finder, _Finder)]
    for name in [name for name in sys.modules if _is_natten(name)]:
        del sys.modules[name]
    sys.modules.update(_hidden)
    _hidden.clear()


def _is_natten(name: str) -> bool:
    return name == "natten" or name.startswith("natten.")


class _Finder(importlib.metadata.DistributionFinder):
    """Answers who asks for an installed distribution named natten."""

    def __init__(self, release: str) -> None:
        self.release = release

    def find_spec(self, name: str, path: object = None, target: object = None) -> None:
        return None

    def find_distributions(self, context: object = None) -> Iterator[importlib.metadata.Distribution]:
        if getattr(context, "name", None) in (None, "natten"):
            yield _Distribution(self.release)


class _Distribution(importlib.metadata.Distribution):
    def __init__(self, release: str) -> None:
        self.release = release

    def read_text(self, filename: str) -> str | None:
        if filename != "METADATA":
            return None
        return f"Metadata-Version: 2.1\nName: natten\nVersion: {self.release}\nSummary: natten2.compat\n"

    def locate_file(self, path: object) -> Path:
        return Path(__file__).parent / str(path)
