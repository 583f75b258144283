"""Neighborhood attention as modules: the qkv projection, the operator, and the output projection."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from natten2._arguments import check_heads, check_probability, check_real, check_tensor, flags, integers
from natten2.ops.schemas import na_qkv_forward
from natten2.ops.validation import check_window

__all__ = ["NeighborhoodAttention1D", "NeighborhoodAttention2D", "NeighborhoodAttention3D"]


class _NeighborhoodAttention(nn.Module):
    _axes: tuple[str, ...]

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        kernel_size: int | Sequence[int],
        stride: int | Sequence[int] = 1,
        dilation: int | Sequence[int] = 1,
        is_causal: bool | Sequence[bool] = False,
        qkv_bias: bool = True,
        qk_scale: float | None = None,
        rel_pos_bias: bool = False,
        proj_drop: float = 0.0,
    ) -> None:
        super().__init__()
        rank = len(self._axes)
        check_heads("embed_dim", embed_dim, "num_heads", num_heads)
        if qk_scale is not None:
            check_real("qk_scale", qk_scale)
        check_probability("proj_drop", proj_drop)
        self.embed_dim = embed_dim
        self.num_heads = num_heads
        self.head_dim = embed_dim // num_heads
        self.kernel_size = integers("kernel_size", kernel_size, rank)
        self.stride = integers("stride", stride, rank)
        self.dilation = integers("dilation", dilation, rank)
        self.is_causal = flags("is_causal", is_causal, rank)
        self.qk_scale = qk_scale
        check_window(self.kernel_size, self.stride, self.dilation)

        self.qkv = nn.Linear(embed_dim, 3 * embed_dim, bias=qkv_bias)
        self.rpb = (
            nn.Parameter(torch.empty(num_heads, *(2 * k - 1 for k in self.kernel_size))) if rel_pos_bias else None
        )
        self.proj = nn.Linear(embed_dim, embed_dim)
        self.proj_drop = nn.Dropout(proj_drop)
        if self.rpb is not None:
            nn.init.trunc_normal_(self.rpb, std=0.02)

    def forward(self, input: Tensor) -> Tensor:
        check_tensor("input", input, jagged=True)
        if input.dim() != len(self._axes) + 2 or input.shape[-1] != self.embed_dim:
            axes = ", ".join(self._axes)
            raise ValueError(f"input must have shape [batch, {axes}, {self.embed_dim}], got {list(input.shape)}")
        if input.is_nested:
            return self._project_values(input, partial(self._attend_values, input))
        return self._project(input, self._attend)

    def _project(self, input: Tensor, attend: Callable[[Tensor], Tensor]) -> Tensor:
        # One product, which the operator reads in place, and one gradient.
        output = attend(self.qkv(input).unflatten(-1, (3, self.num_heads, self.head_dim)))
        return self.proj_drop(self.proj(output.flatten(-2)))

    def _project_values(self, input: Tensor, attend: Callable[[Tensor], Tensor]) -> Tensor:
        """The same for the packed values of a jagged nested tensor, which linear layers take only as they are."""
        return _like(input, self._project(input.values(), attend))

    def _attend_values(self, nested: Tensor, qkv: Tensor) -> Tensor:
        return self._attend(_like(nested, qkv)).values()

    # `natten2.distributed` puts its own in this place.
    def _attend(self, qkv: Tensor) -> Tensor:
        scale = self.head_dim**-0.5 if self.qk_scale is None else self.qk_scale
        output, _ = na_qkv_forward(qkv, self.rpb, self.kernel_size, self.stride, self.dilation, self.is_causal, scale)
        return output

    def extra_repr(self) -> str:
        return (
            f"embed_dim={self.embed_dim}, num_heads={self.num_heads}, kernel_size={self.kernel_size}, "
            f"stride={self.stride}, dilation={self.dilation}, is_causal={self.is_causal}, qk_scale={self.qk_scale}, "
            f"rel_pos_bias={self.rpb is not None}"
        )


def _like(nested: Tensor, values: Tensor) -> Tensor:
    """Packed values as a nested tensor with the offsets of another."""
    offsets, lengths = nested.offsets(), nested.lengths()
    return torch.nested.nested_tensor_from_jagged(values, offsets, lengths, jagged_dim=nested._ragged_idx)


class NeighborhoodAttention1D(_NeighborhoodAttention):
    """Multi-head neighborhood attention over a sequence: :class:`NeighborhoodAttention2D` with one axis.

    Maps `[B, length, embed_dim]` to the same shape; the bias is `[num_heads, 2 * kernel_size - 1]`.
    """

    _axes = ("length",)


class NeighborhoodAttention2D(_NeighborhoodAttention):
    """Multi-head neighborhood attention over an image (arXiv 2204.07143, figure 2 and equations 1-3).

    Maps `[B, height, width, embed_dim]` to the same shape, in the dtype of the weights: float32, float64, bfloat16, or
    float16. Every argument of the window is one number for both axes, or one per axis; :func:`natten2.na2d` says what
    they mean. Images that differ in height or in width come as a jagged nested tensor; :func:`natten2.nested.attend`
    takes those that differ in both.

    Args:
        embed_dim: Channels of input and output, a multiple of `num_heads`.
        num_heads: Attention heads of `embed_dim // num_heads` channels each.
        kernel_size: Keys per window and axis, at least 1; `kernel_size * dilation` must fit in the input.
        stride: Adjacent queries that share a window, between 1 and `kernel_size`.
        dilation: Distance between neighboring keys of a window, at least 1.
        is_causal: Whether a query sees no key after itself along the axis.
        qkv_bias: Whether the qkv projection has a bias.
        qk_scale: Factor of the dot products; `(embed_dim // num_heads) ** -0.5` when `None`. Zero means zero.
        rel_pos_bias: Whether to learn a relative positional bias, the parameter `rpb` of shape
            `[num_heads, 2 * kernel_size[0] - 1, 2 * kernel_size[1] - 1]`.
        proj_drop: Dropout probability of the output.

    Raises:
        ValueError: By the constructor, an argument is not allowed; by `forward`, the input has the wrong number of axes
            or channels, or is smaller than `kernel_size * dilation`.
        TypeError: An argument is of the wrong type.
    """

    _axes = ("height", "width")


class NeighborhoodAttention3D(_NeighborhoodAttention):
    """Multi-head neighborhood attention over a video or a volume: :class:`NeighborhoodAttention2D` with three axes.

    Maps `[B, depth, height, width, embed_dim]` to the same shape; the bias has one axis of `2 * kernel_size - 1` for
    each of the three.
    """

    _axes = ("depth", "height", "width")
