"""Registers the rules of tensor subclasses whose modules take long to import, when, and only if, those are imported."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType

_SUBCLASS, _RULES = "torch.distributed.tensor", "natten2.ops.sharding"


class _Loader(Loader):
    """Loads the subclass's module, and then that of the rules."""

    def __init__(self, loader: Loader) -> None:
        self._loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        module.__spec__.loader = module.__loader__ = self._loader
        self._loader.exec_module(module)
        importlib.import_module(_RULES)


class _Finder(MetaPathFinder):
    """Notices the import of the subclass's module: no dispatch key of ours comes before a subclass's own dispatch."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name != _SUBCLASS:
            return None
        sys.meta_path.remove(self)
        spec = find_spec(name)
        if spec is not None:
            spec.loader = _Loader(spec.loader)
        return spec


if _SUBCLASS in sys.modules:
    importlib.import_module(_RULES)
else:
    sys.meta_path.insert(0, _Finder())
