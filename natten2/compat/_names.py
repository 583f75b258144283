"""The table of names: what `import natten` finds, by version."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType

from torch import Tensor

from natten2.compat import _fused, _legacy, _modules, _utils, context, context_names, types

__all__ = ["RELEASES", "UNION", "modules"]

UNION = "union"
# What `natten.__version__` and the distribution's metadata say.
RELEASES = {"0.14": "0.14.6", "0.15": "0.15.1", "0.17": "0.17.5", "0.21": "0.21.6", UNION: "0.21.6"}
_RANKS = (1, 2, 3)
Names = dict[str, object]


def modules(version: str) -> dict[str, ModuleType]:
    """The module `natten` and all of its submodules, by full name.

    Args:
        version: A key of `RELEASES`.
    """
    tables = _tables(version)
    result = {}
    for name, names in tables.items():
        module = ModuleType(name, f"natten {RELEASES[version]}, as natten2 has it.")
        vars(module).update(names)
        module.__all__ = sorted(key for key in names if not key.startswith("_"))
        result[name] = module
    for name, module in result.items():
        parent, _, child = name.rpartition(".")
        # In 0.20 and later, na1d is a function where it was a module.
        if parent and not hasattr(result[parent], child):
            setattr(result[parent], child, module)
    return result


def _tables(version: str) -> dict[str, Names]:
    is_new = version in ("0.21", UNION)
    layers = {f"NeighborhoodAttention{rank}D": _modules.module(rank, version) for rank in _RANKS}
    if version in ("0.14", UNION):
        layers["NeighborhoodAttention"] = layers["NeighborhoodAttention2D"]
    functional: Names = {}
    if version != "0.21":
        for rank in _RANKS:
            functional |= _legacy.qk_functions(rank)[version] | _legacy.av_functions(rank)[version]
    fused = _fused_functions(version)
    functional |= fused
    top: Names = {"__version__": RELEASES[version], **layers}
    tables = {"natten": top, "natten.functional": functional}
    flags = {"0.15": context_names.V15, "0.17": context_names.V17, "0.21": context_names.V21}
    top |= {name: getattr(context, name) for name in flags.get(version, context_names.ALL if is_new else ())}
    if version in ("0.14", "0.15", UNION):
        for rank in _RANKS:
            tables[f"natten.natten{rank}d"] = {f"NeighborhoodAttention{rank}D": layers[f"NeighborhoodAttention{rank}D"]}
    if version == "0.15":
        functional |= {name: getattr(context, name) for name in context_names.V15}
    if version in ("0.17", UNION):
        tables["natten.experimental"] = dict(_older_functions()) if version == "0.17" else dict(fused)
    if version == "0.17":
        for rank in _RANKS:
            tables[f"natten.na{rank}d"] = {f"NeighborhoodAttention{rank}D": layers[f"NeighborhoodAttention{rank}D"]}
    if version == "0.14":
        return tables
    tables |= _helpers(version)
    if version != "0.15":
        names = context_names.V17 if version == "0.17" else context_names.V21 if version == "0.21" else context.__all__
        preference = {"MemoryUsagePreference": context.MemoryUsagePreference}
        tables["natten.context"] = {name: getattr(context, name) for name in names} | preference
    if is_new:
        configurations = _configurations()
        top |= fused | configurations | {"HAS_LIBNATTEN": True}
        tables["natten.modules"] = dict(layers)
        tables["natten.backends"] = configurations | _choices()
    return tables


def _fused_functions(version: str) -> Names:
    if version == "0.17":
        return _older_functions()
    if version not in ("0.21", UNION):
        return {}
    return {
        **{f"na{rank}d": _fused.modern_function(rank) for rank in _RANKS},
        "neighborhood_attention_generic": _fused.modern_function(None),
        "attention": _fused.attention,
        "merge_attentions": _fused.merge_attentions,
    }


def _older_functions() -> Names:
    return {f"na{rank}d": _fused.older_function(rank) for rank in _RANKS}


def _helpers(version: str) -> dict[str, Names]:
    """`natten.types` and `natten.utils`."""
    utils = {name: getattr(_utils, name) for name in _utils.__all__ if name != "get_logger"}
    tables: dict[str, Names] = {
        "natten.utils": dict(utils),
        "natten.utils.checks": dict(utils),
        "natten.utils.log": {"get_logger": _utils.get_logger},
        "natten.types": {name: getattr(types, name) for name in types.__all__},
    }
    if version in ("0.21", UNION):
        tables["natten.utils.varlen"] = {"generate_varlen_parameters": _fused.generate_varlen_parameters}
    return tables


def _configurations() -> Names:
    """`get_configs_for_*`: natten2's kernels choose their tiles themselves, so there are none to choose from."""
    fna = [f"cutlass{kind}_{op}" for kind in ("", "_hopper", "_blackwell") for op in ("fna", "fmha")]
    names = [f"get_{way}configs_for_{name}" for name in fna for way in ("", "bwd_")]
    return dict.fromkeys((*names, "get_configs_for_flex_fna", "get_configs_for_flex_fmha"), _no_configurations)


def _no_configurations(*tensors: Tensor, **options: object) -> list[object]:
    return []


def _choices() -> dict[str, Callable[..., object]]:
    return {
        "choose_backend": _choose,
        "choose_fmha_backend": _choose,
        "get_compatible_backends": lambda *args, **kwargs: ["natten2"],
        "get_compatible_fmha_backends": lambda *args, **kwargs: ["natten2"],
    }


def _choose(*args: object, **kwargs: object) -> str:
    return "natten2"
