"""Entries for timm's model registry, so that `timm.create_model("dinat_tiny")` works where both are imported."""

from __future__ import annotations

import warnings
from collections.abc import Callable

from natten2.models.zoo import CONFIGS, create

# timm adds the names that it registers.
__all__: list[str] = []
# What timm passes about weights of its own.
_TIMMS_OWN = ("pretrained_cfg", "pretrained_cfg_overlay", "cache_dir")


def register() -> None:
    """Registers every model; warns if this timm has another registry."""
    try:
        from timm.models import register_model
    except ImportError as error:
        warnings.warn(f"natten2's models are not in timm's registry: {error}", stacklevel=2)
        return
    for name in CONFIGS:
        register_model(_entry(name))


def _entry(name: str) -> Callable[..., object]:
    def entry(pretrained: bool = False, **arguments: object) -> object:
        if pretrained:
            raise ValueError(f"pretrained must be False for {name}: natten2.models.load_checkpoint loads weights")
        ours = {key: value for key, value in arguments.items() if key not in _TIMMS_OWN}
        return create(name, **ours)

    entry.__name__ = entry.__qualname__ = name
    entry.__module__ = __name__
    return entry
