"""The published models by name (arXiv 2204.07143 and 2209.15001), with the names and values of the released code."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from difflib import get_close_matches

from natten2.models.config import NATConfig
from natten2.models.nat import NAT, NATFeatures

__all__ = ["CONFIGS", "create", "list_models"]


def _dilated(config: NATConfig, *dilations: int, **changes: object) -> NATConfig:
    """Every second block of a level has its dilation, the others 1."""
    levels = zip(config.depths, dilations, strict=True)
    pattern = tuple(tuple((1, dilation)[block % 2] for block in range(depth)) for depth, dilation in levels)
    return replace(config, dilations=pattern, **changes)


_NAT_MINI = NATConfig(depths=(3, 4, 6, 5), num_heads=(2, 4, 8, 16), embed_dim=64, mlp_ratio=3, drop_path_rate=0.2)
_NAT_TINY = replace(_NAT_MINI, depths=(3, 4, 18, 5))
_NAT_SMALL = replace(
    _NAT_TINY, num_heads=(3, 6, 12, 24), embed_dim=96, mlp_ratio=2, drop_path_rate=0.3, layer_scale=1e-5
)
_NAT_BASE = replace(_NAT_SMALL, num_heads=(4, 8, 16, 32), embed_dim=128, drop_path_rate=0.5)

_LARGE = replace(_NAT_BASE, num_heads=(6, 12, 24, 48), embed_dim=192, drop_path_rate=0.35, layer_scale=None)
_LARGE_KERNEL = replace(_LARGE, kernel_size=11)

_S_TINY = NATConfig(
    depths=(2, 2, 6, 2), num_heads=(3, 6, 12, 24), embed_dim=96, mlp_ratio=4, drop_path_rate=0.2, patch_size=4
)
_S_SMALL = replace(_S_TINY, depths=(2, 2, 18, 2), drop_path_rate=0.3)
_S_BASE = replace(_S_SMALL, num_heads=(4, 8, 16, 32), embed_dim=128, drop_path_rate=0.5)
_S_LARGE = replace(_S_BASE, num_heads=(6, 12, 24, 48), embed_dim=192, drop_path_rate=0.35)

_ISOTROPIC_SMALL = NATConfig(depths=(12,), num_heads=12, embed_dim=384, mlp_ratio=4, drop_path_rate=0.1, patch_size=16)
_ISOTROPIC_BASE = replace(_ISOTROPIC_SMALL, num_heads=24, embed_dim=768, drop_path_rate=0.4)

CONFIGS: dict[str, NATConfig] = {
    "nat_mini": _NAT_MINI,
    "nat_tiny": _NAT_TINY,
    "nat_small": _NAT_SMALL,
    "nat_base": _NAT_BASE,
    "nat_isotropic_small": _ISOTROPIC_SMALL,
    "nat_isotropic_base": _ISOTROPIC_BASE,
    "dinat_mini": _dilated(_NAT_MINI, 8, 4, 2, 1),
    "dinat_tiny": _dilated(_NAT_TINY, 8, 4, 2, 1),
    "dinat_small": _dilated(_NAT_SMALL, 8, 4, 2, 1, layer_scale=None),
    "dinat_base": _dilated(_NAT_BASE, 8, 4, 2, 1),
    "dinat_large": _dilated(_LARGE, 8, 4, 2, 1),
    "dinat_large_21k": _dilated(_LARGE, 8, 4, 2, 1, drop_path_rate=0.2),
    "dinat_large_21k_11x11": _dilated(_LARGE_KERNEL, 8, 4, 2, 1, drop_path_rate=0.2),
    "dinat_large_384": _dilated(_LARGE, 13, 6, 3, 1),
    "dinat_large_384_11x11": _dilated(_LARGE_KERNEL, 8, 4, 2, 1),
    "dinat_isotropic_small": _dilated(_ISOTROPIC_SMALL, 2),
    "dinat_isotropic_base": _dilated(_ISOTROPIC_BASE, 2),
    "dinat_s_tiny": _dilated(_S_TINY, 8, 4, 2, 1),
    "dinat_s_small": _dilated(_S_SMALL, 8, 4, 2, 1),
    "dinat_s_base": _dilated(_S_BASE, 8, 4, 2, 1),
    "dinat_s_large": _dilated(_S_LARGE, 8, 4, 2, 1),
    "dinat_s_large_21k": _dilated(_S_LARGE, 8, 4, 2, 1, drop_path_rate=0.2),
    "dinat_s_large_384": _dilated(_S_LARGE, 13, 6, 3, 1),
    # At 224 pixels, the size of their images, a window of 14 tokens is the whole map: plain attention with a bias.
    "vitrpb_small": replace(_ISOTROPIC_SMALL, kernel_size=14),
    "vitrpb_base": replace(_ISOTROPIC_BASE, kernel_size=14),
}


def list_models() -> list[str]:
    """The names that :func:`create` knows."""
    return list(CONFIGS)


def create(
    name: str,
    num_classes: int = 1000,
    *,
    features_only: bool = False,
    out_indices: Sequence[int] | None = None,
    **overrides: object,
) -> NAT | NATFeatures:
    """Makes a published model, with random weights; :func:`load_checkpoint` loads released ones.

    Args:
        name: One of :func:`list_models`. Names ending in `384` are meant for images of 384 x 384 pixels, the others for
            224 x 224, though all take any size; those with `21k` are for the weights trained on ImageNet-21k.
        num_classes: Classes of the head; 0 leaves the head out.
        features_only: Whether to make a :class:`NATFeatures`, which returns maps, instead of a :class:`NAT`.
        out_indices: With `features_only`, the levels to return, by default all.
        overrides: Other fields of :class:`NATConfig` to change.

    Raises:
        ValueError: There is no such model, a value is not allowed, or `out_indices` comes without `features_only`.
        TypeError: A value is of the wrong type, or :class:`NATConfig` has no such field.
    """
    if not isinstance(name, str):
        raise TypeError(f"name must be a string, got {name!r}")
    if not isinstance(features_only, bool):
        raise TypeError(f"features_only must be a bool, got {features_only!r}")
    if name not in CONFIGS:
        near = get_close_matches(name, CONFIGS) or CONFIGS
        raise ValueError(f"name must be that of a published model, such as {', '.join(near)}; got {name!r}")
    config = replace(CONFIGS[name], num_classes=num_classes, **overrides)
    if features_only:
        return NATFeatures(config, out_indices)
    if out_indices is not None:
        raise ValueError(f"out_indices must come with features_only=True, got {out_indices}")
    return NAT(config)


def _builder(name: str, title: str) -> Callable[..., NAT | NATFeatures]:
    def build(num_classes: int = 1000, **arguments: object) -> NAT | NATFeatures:
        return create(name, num_classes, **arguments)

    build.__name__ = build.__qualname__ = name
    build.__doc__ = f"{title}; arguments and errors are those of :func:`create`."
    return build


nat_mini = _builder("nat_mini", "NAT-Mini, 20 million parameters")
nat_tiny = _builder("nat_tiny", "NAT-Tiny, 28 million parameters")
nat_small = _builder("nat_small", "NAT-Small, 51 million parameters, with layer scale")
nat_base = _builder("nat_base", "NAT-Base, 90 million parameters, with layer scale")
nat_isotropic_small = _builder("nat_isotropic_small", "Isotropic NAT-Small, 22 million parameters")
nat_isotropic_base = _builder("nat_isotropic_base", "Isotropic NAT-Base, 86 million parameters")
dinat_mini = _builder("dinat_mini", "DiNAT-Mini, 20 million parameters")
dinat_tiny = _builder("dinat_tiny", "DiNAT-Tiny, 28 million parameters")
dinat_small = _builder("dinat_small", "DiNAT-Small, 51 million parameters, without layer scale")
dinat_base = _builder("dinat_base", "DiNAT-Base, 90 million parameters, with layer scale")
dinat_large = _builder("dinat_large", "DiNAT-Large, 201 million parameters")
dinat_large_21k = _builder("dinat_large_21k", "DiNAT-Large for ImageNet-21k")
dinat_large_21k_11x11 = _builder("dinat_large_21k_11x11", "DiNAT-Large for ImageNet-21k with windows of 11 x 11")
dinat_large_384 = _builder("dinat_large_384", "DiNAT-Large at 384 pixels, with larger dilations")
dinat_large_384_11x11 = _builder("dinat_large_384_11x11", "DiNAT-Large at 384 pixels with windows of 11 x 11")
dinat_isotropic_small = _builder("dinat_isotropic_small", "Isotropic DiNAT-Small, 22 million parameters")
dinat_isotropic_base = _builder("dinat_isotropic_base", "Isotropic DiNAT-Base, 86 million parameters")
dinat_s_tiny = _builder("dinat_s_tiny", "DiNAT_s-Tiny, 28 million parameters")
dinat_s_small = _builder("dinat_s_small", "DiNAT_s-Small, 50 million parameters")
dinat_s_base = _builder("dinat_s_base", "DiNAT_s-Base, 88 million parameters")
dinat_s_large = _builder("dinat_s_large", "DiNAT_s-Large, 197 million parameters")
dinat_s_large_21k = _builder("dinat_s_large_21k", "DiNAT_s-Large for ImageNet-21k")
dinat_s_large_384 = _builder("dinat_s_large_384", "DiNAT_s-Large at 384 pixels, with larger dilations")
vitrpb_small = _builder("vitrpb_small", "ViT-Small with a relative positional bias, 22 million parameters")
vitrpb_base = _builder("vitrpb_base", "ViT-Base with a relative positional bias, 87 million parameters")
__all__ += CONFIGS
