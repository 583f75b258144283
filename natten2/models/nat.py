"""The Neighborhood Attention Transformer (NAT, arXiv 2204.07143) and its kin, as a classifier and as a backbone.

With a dilation per block it is the Dilated Neighborhood Attention Transformer (DiNAT, arXiv 2209.15001), with patches
instead of convolutions DiNAT_s, with patches and a single level the isotropic models. Modules and parameters bear the
names of the released checkpoints.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from torch import Tensor, nn

from natten2._arguments import check_tensor, integers
from natten2.models.block import Block
from natten2.models.config import NATConfig
from natten2.models.embedding import make_downsampler, make_embedding

__all__ = ["NAT", "Backbone", "NATConfig", "NATFeatures"]


class Backbone(nn.Module):
    """The embedding and the levels that :class:`NAT` and :class:`NATFeatures` share.

    Images of any size work. Levels have `ceil(size / reduction)` tokens per axis: convolutions see zeros around the
    image, patches and pairs of tokens are filled up with zeros at the bottom and right. Maps smaller than
    `kernel_size * dilation` are padded likewise for the attention alone, as in the released models.

    Linear weights start from a normal distribution of standard deviation 0.02, their biases from 0; convolutions keep
    PyTorch's initialization, as in the released training code.
    """

    def __init__(self, config: NATConfig, num_levels: int) -> None:
        super().__init__()
        self.config = config
        self.num_levels = num_levels
        self.patch_embed = make_embedding(config)
        self.pos_drop = nn.Dropout(config.drop_rate)
        levels = nn.ModuleList(Level(config, level, level == num_levels - 1) for level in range(num_levels))
        if config.patch_size is None:
            self.levels = levels
        else:
            self.layers = levels[0].blocks if config.is_isotropic else levels
        self.register_load_state_dict_pre_hook(_drop_index_tables)

    def forward_levels(self, images: Tensor, indices: Collection[int]) -> list[Tensor]:
        """The tokens `[B, H, W, C]` that the blocks of these levels return, in the order of the levels.

        Raises:
            ValueError: The images have the wrong number of axes or channels.
            TypeError: They are no tensor.
        """
        check_tensor("images", images)
        if images.dim() != 4 or images.shape[1] != self.config.in_chans:
            raise ValueError(
                f"images must have shape [batch, {self.config.in_chans}, height, width], got {list(images.shape)}"
            )
        tokens = self.pos_drop(self.patch_embed(images))
        outputs = []
        for level, (blocks, downsample) in enumerate(self._stages()):
            for block in blocks:
                tokens = block(tokens)
            if level in indices:
                outputs.append(tokens)
            if downsample is not None:
                tokens = downsample(tokens)
        return outputs

    def _stages(self) -> list[tuple[nn.ModuleList, nn.Module | None]]:
        if self.config.is_isotropic:
            return [(self.layers, None)]
        levels = self.levels if self.config.patch_size is None else self.layers
        return [(level.blocks, level.downsample) for level in levels]


class NAT(Backbone):
    """The Neighborhood Attention Transformer for image classification; :class:`Backbone` says what images it takes.

    The last level's tokens are normed, averaged and classified.

    Args:
        config: The shape of the model.
    """

    def __init__(self, config: NATConfig) -> None:
        super().__init__(config, len(config.depths))
        self.num_features = config.channels(self.num_levels - 1)
        self.norm = nn.LayerNorm(self.num_features)
        self.head = nn.Linear(self.num_features, config.num_classes) if config.num_classes > 0 else nn.Identity()
        self.apply(_init_linear)

    def forward_features(self, images: Tensor) -> Tensor:
        """Maps images `[B, in_chans, height, width]` to the averaged tokens of the last level `[B, num_features]`.

        Raises:
            ValueError: The images have the wrong number of axes or channels.
        """
        (tokens,) = self.forward_levels(images, (self.num_levels - 1,))
        return self.norm(tokens).mean((1, 2))

    def forward(self, images: Tensor) -> Tensor:
        """Maps images `[B, in_chans, height, width]` to logits `[B, num_classes]`, or to features without a head.

        Raises:
            ValueError: The images have the wrong number of axes or channels.
        """
        return self.head(self.forward_features(images))


class NATFeatures(Backbone):
    """The same levels as a feature pyramid for detection and segmentation; :class:`Backbone` says what images it takes.

    Parameters are those of the backbones in the released detection and segmentation checkpoints: a norm for each level
    that is returned, `norm0` to `norm3`, and no head.

    Args:
        config: The shape of the model; `num_classes` does not matter.
        out_indices: The levels to return, each once; negative ones count from the last. Levels after the last of them
            are left out.

    Attributes:
        out_indices: The levels that are returned, in ascending order.
        channels: The channels of each.
        strides: Pixels per token and axis of each.

    Raises:
        ValueError: `out_indices` is empty, repeats a level, or names one that isn't there.
        TypeError: `out_indices` is not a sequence of integers.
    """

    def __init__(self, config: NATConfig, out_indices: Sequence[int] | None = None) -> None:
        out_indices = _check_out_indices(out_indices, len(config.depths))
        super().__init__(config, out_indices[-1] + 1)
        self.out_indices = out_indices
        self.channels = tuple(config.channels(level) for level in out_indices)
        self.strides = tuple(config.reduction(level) for level in out_indices)
        for level, channels in zip(out_indices, self.channels, strict=True):
            self.add_module(f"norm{level}", nn.LayerNorm(channels))
        self.apply(_init_linear)

    def forward(self, images: Tensor) -> list[Tensor]:
        """Maps images `[B, in_chans, height, width]` to a map `[B, channels, height / stride, width / stride]` for each
        of `out_indices`, sizes rounded up; the channels are next to each other in memory.

        Raises:
            ValueError: The images have the wrong number of axes or channels.
        """
        levels = zip(self.out_indices, self.forward_levels(images, self.out_indices), strict=True)
        return [getattr(self, f"norm{level}")(tokens).permute(0, 3, 1, 2) for level, tokens in levels]


class Level(nn.Module):
    """The blocks of one resolution and, unless it is the last level, the step to the next."""

    def __init__(self, config: NATConfig, level: int, is_last: bool) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(config, level, block) for block in range(config.depths[level]))
        self.downsample = None if is_last else make_downsampler(config, level)


def _check_out_indices(out_indices: Sequence[int] | None, num_levels: int) -> tuple[int, ...]:
    if out_indices is None:
        return tuple(range(num_levels))
    if not isinstance(out_indices, Sequence):
        raise TypeError(f"out_indices must be a sequence of integers, got {out_indices!r}")
    indices = integers("out_indices", out_indices, len(out_indices))
    levels = sorted(index + num_levels if index < 0 else index for index in indices)
    if not levels or len(set(levels)) < len(levels) or levels[0] < 0 or levels[-1] >= num_levels:
        raise ValueError(f"out_indices must name some of {num_levels} levels, each once, got {tuple(out_indices)}")
    return tuple(levels)


def _drop_index_tables(module: nn.Module, state_dict: Mapping[str, Tensor], *_: object) -> None:
    """ViT's released checkpoints hold for every pair of tokens where its bias is, which follows from their places."""
    for name in [name for name in state_dict if name.endswith(".attn.relative_position_index")]:
        del state_dict[name]


def _init_linear(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
