"""`natten.context`: flags that natten's kernels are chosen by, kept and returned, and without any effect here.

natten2's kernels are always fused, always deterministic, and chosen by `python -m natten2 explain`'s rule.
"""

from __future__ import annotations

from collections.abc import Callable
from enum import Enum

from natten2.compat import context_names

__all__ = list(context_names.ALL)


class MemoryUsagePreference(Enum):
    """What natten may spend on parallel backward passes."""

    Default = 0
    Strict = 1
    Unrestricted = 2


_preference = MemoryUsagePreference.Default
_flags: dict[str, bool] = {}


def set_memory_usage_preference(pref: str = "default") -> None:
    """Keeps a preference.

    Raises:
        ValueError: It is not `default`, `strict`, or `unrestricted`.
    """
    global _preference
    if pref not in ("default", "strict", "unrestricted"):
        raise ValueError(f"pref must be default, strict, or unrestricted, got {pref!r}")
    _preference = MemoryUsagePreference[pref.capitalize()]


def get_memory_usage_preference() -> MemoryUsagePreference:
    return _preference


def is_memory_usage_default() -> bool:
    return _preference is MemoryUsagePreference.Default


def is_memory_usage_strict() -> bool:
    return _preference is MemoryUsagePreference.Strict


def is_memory_usage_unrestricted() -> bool:
    return _preference is MemoryUsagePreference.Unrestricted


def allow_flex_compile(mode: bool = True, backprop: bool = False) -> None:
    _flags.update(flex_compile=mode, flex_compile_backprop=mode and backprop)


def allow_flex_compile_backprop(mode: bool = True) -> None:
    _flags["flex_compile_backprop"] = mode


def disable_flex_compile() -> None:
    allow_flex_compile(False)


def disable_flex_compile_backprop() -> None:
    allow_flex_compile_backprop(False)


def use_fused_na(
    mode: bool = True, kv_parallel: bool = True, use_flex_attention: bool = False, force_flex_attention: bool = False
) -> None:
    _flags.update(fused_na=mode, kv_parallelism=mode and kv_parallel)


def use_autotuner(
    forward_pass: bool | None = None,
    backward_pass: bool | None = None,
    thorough_mode_forward: bool | None = None,
    thorough_mode_backward: bool | None = None,
    warmup_steps_forward: int | None = None,
    warmup_steps_backward: int | None = None,
    steps_forward: int | None = None,
    steps_backward: int | None = None,
) -> None:
    """Keeps what is asked for; `NATTEN2_AUTOTUNE=1` tunes natten2's own kernels."""
    asked = (forward_pass, backward_pass, thorough_mode_forward, thorough_mode_backward)
    names = ("autotune_forward", "autotune_backward", "thorough_forward", "thorough_backward")
    _flags.update({name: flag for name, flag in zip(names, asked, strict=True) if flag is not None})


def disable_autotuner() -> None:
    use_autotuner(False, False, False, False)


def is_autotuner_enabled() -> bool:
    return _flags.get("autotune_forward", False) or _flags.get("autotune_backward", False)


def use_flex_attention() -> None:
    use_fused_na()


def force_flex_attention() -> None:
    use_fused_na()


def _switch(flag: str, *, fixed: bool | None = None, returns: bool = False) -> Callable[..., bool | None]:
    def switch(mode: bool = True) -> bool | None:
        value = mode if fixed is None else fixed
        _flags[flag] = value
        return value if returns else None

    return switch


def _state(flag: str, default: bool) -> Callable[[], bool]:
    return lambda: _flags.get(flag, default)


def _has(device_index: object = None) -> bool:
    """Every kernel family that natten asks for is natten2's one operator, on every device."""
    return True


def has_cuda() -> bool:
    """Whether a GPU is there to run on."""
    import torch

    return torch.cuda.is_available()


for _name in context_names.HAS:
    globals()[_name] = _has
for _name, _flag in context_names.SWITCHES.items():
    globals()[_name] = _switch(_flag)
for _name, (_flag, _default) in context_names.STATES.items():
    globals()[_name] = _state(_flag, _default)
for _name, (_flag, _value) in context_names.OLD_SWITCHES.items():
    globals()[_name] = _switch(_flag, fixed=_value, returns=True)
use_fna = use_fused_na
