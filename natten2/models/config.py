"""The shape of a model as data, checked when it is made."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from natten2._arguments import check_heads, check_integer, check_probability, check_real, integers

__all__ = ["NATConfig"]


@dataclass(frozen=True)
class NATConfig:
    """The shape of a :class:`NAT` or a :class:`NATFeatures`.

    Level `i` has `embed_dim * 2 ** i` channels, and a token for every `s * s` pixels, `s = 2 ** (i + 2)` unless
    `patch_size` says otherwise.

    Args:
        depths: Number of blocks of each level; there are as many levels as entries.
        num_heads: Attention heads of each level, or one number for all; they divide the level's channels.
        embed_dim: Channels of the first level, even.
        mlp_ratio: Hidden channels of the MLPs, as a multiple of the level's channels.
        kernel_size: Keys per window and axis of every block, at least 1.
        dilations: For each level the dilation of its blocks, one number or one per block, at least 1; `None` means 1
            everywhere.
        in_chans: Channels of the image.
        num_classes: Classes of the head; 0 leaves the head out.
        qkv_bias: Whether the qkv projections have a bias.
        qk_scale: Factor of the dot products; `head_dim ** -0.5` when `None`. Zero means zero.
        drop_rate: Dropout probability of the embedded image and of the projections and MLPs.
        drop_path_rate: Probability that the last block's branches are dropped in training; it grows linearly from 0 at
            the first block.
        layer_scale: Initial value of the learned factors of each block's branches (arXiv 2103.17239); `None` leaves
            them out.
        patch_size: `None` for overlapping convolutions that embed the image at a quarter of its resolution, and halve
            it between levels, as in NAT and DiNAT. A number cuts the image into patches of that many pixels a side and
            merges 2 x 2 tokens between levels, as in DiNAT_s; with a single level that is an isotropic model.

    Raises:
        ValueError: A value is not allowed; the message names it.
        TypeError: A value is of the wrong type.
    """

    depths: Sequence[int]
    num_heads: int | Sequence[int]
    embed_dim: int
    mlp_ratio: float = 3.0
    kernel_size: int = 7
    dilations: Sequence[int | Sequence[int]] | None = None
    in_chans: int = 3
    num_classes: int = 1000
    qkv_bias: bool = True
    qk_scale: float | None = None
    drop_rate: float = 0.0
    drop_path_rate: float = 0.0
    layer_scale: float | None = None
    patch_size: int | None = None

    def __post_init__(self) -> None:
        self._check_numbers()
        # Tuples keep the frozen config hashable.
        object.__setattr__(self, "depths", self._check_depths())
        object.__setattr__(self, "num_heads", self._check_num_heads())
        object.__setattr__(self, "dilations", self._check_dilations())

    @property
    def is_isotropic(self) -> bool:
        """Whether all blocks see patches of one size."""
        return self.patch_size is not None and len(self.depths) == 1

    def channels(self, level: int) -> int:
        return self.embed_dim * 2**level

    def reduction(self, level: int) -> int:
        """Pixels per token and axis."""
        return (4 if self.patch_size is None else self.patch_size) * 2**level

    def block_dilations(self, level: int) -> tuple[int, ...]:
        return (1,) * self.depths[level] if self.dilations is None else self.dilations[level]

    def block_drop_path_rate(self, level: int, block: int) -> float:
        """Grows linearly over all blocks of the model, from 0 at the first."""
        return self.drop_path_rate * (sum(self.depths[:level]) + block) / max(sum(self.depths) - 1, 1)

    def _check_numbers(self) -> None:
        for name, minimum in (("embed_dim", 2), ("kernel_size", 1), ("in_chans", 1), ("num_classes", 0)):
            check_integer(name, getattr(self, name), minimum)
        if self.patch_size is not None:
            check_integer("patch_size", self.patch_size, minimum=1)
        if self.embed_dim % 2 != 0:
            raise ValueError(f"embed_dim must be even, got {self.embed_dim}")
        for name in ("drop_rate", "drop_path_rate"):
            check_probability(name, getattr(self, name))
        check_real("mlp_ratio", self.mlp_ratio)
        if not (math.isfinite(self.mlp_ratio) and self.embed_dim * self.mlp_ratio >= 1):
            raise ValueError(f"mlp_ratio must be finite and leave at least one hidden channel, got {self.mlp_ratio}")
        if self.layer_scale is not None:
            check_real("layer_scale", self.layer_scale)

    def _check_depths(self) -> tuple[int, ...]:
        _check_sequence("depths", self.depths)
        depths = integers("depths", self.depths, len(self.depths))
        if not depths or min(depths) < 1:
            raise ValueError(f"depths must hold at least one integer, each at least 1, got {depths}")
        return depths

    def _check_num_heads(self) -> tuple[int, ...]:
        num_heads = integers("num_heads", self.num_heads, len(self.depths))
        for level, heads in enumerate(num_heads):
            check_heads(f"the channels of level {level}", self.channels(level), f"num_heads[{level}]", heads)
        return num_heads

    def _check_dilations(self) -> tuple[tuple[int, ...], ...] | None:
        if self.dilations is None:
            return None
        _check_sequence("dilations", self.dilations)
        if len(self.dilations) != len(self.depths):
            raise ValueError(
                f"dilations must have one entry for each of {len(self.depths)} levels, got {self.dilations}"
            )
        return tuple(
            _check_dilation(f"dilations[{level}]", *entry)
            for level, entry in enumerate(zip(self.dilations, self.depths, strict=True))
        )


def _check_sequence(name: str, value: Sequence[object]) -> None:
    if not isinstance(value, Sequence):
        raise TypeError(f"{name} must be a sequence with one entry per level, got {value!r}")


def _check_dilation(name: str, dilation: int | Sequence[int], depth: int) -> tuple[int, ...]:
    dilations = integers(name, dilation, depth)
    if min(dilations) < 1:
        raise ValueError(f"{name} must be at least 1 in every block, got {dilations}")
    return dilations
