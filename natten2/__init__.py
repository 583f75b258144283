"""Neighborhood attention for PyTorch 2."""

from natten2 import _extension, models, nested, nn, ops  # noqa: F401
from natten2.functional import merge_attentions, na1d, na2d, na3d
from natten2.nn import NeighborhoodAttention1D, NeighborhoodAttention2D, NeighborhoodAttention3D

__version__ = "0.1.0"

__all__ = [
    "NeighborhoodAttention1D",
    "NeighborhoodAttention2D",
    "NeighborhoodAttention3D",
    "merge_attentions",
    "models",
    "na1d",
    "na2d",
    "na3d",
    "nested",
    "nn",
]
