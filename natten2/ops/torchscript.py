"""TorchScript, which knows neither Python kernels nor gradients like ours: tracing raises at its dispatch key."""

from __future__ import annotations

from typing import NoReturn

from natten2.ops.schemas import LIBRARY
from natten2.ops.validation import CHECKS

__all__ = ["UNSUPPORTED"]

UNSUPPORTED = "natten2 doesn't support torch.jit: use torch.compile or torch.export"


def _raise(*args: object) -> NoReturn:
    raise NotImplementedError(UNSUPPORTED)


for _op in CHECKS:
    LIBRARY.impl(_op._schema.name, _raise, "Tracer")
