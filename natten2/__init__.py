"""Neighborhood attention for PyTorch 2."""

from natten2 import _extension, compat, models, nested, nn, ops  # noqa: F401
from natten2.functional import merge_attentions, na1d, na2d, na3d
from natten2.inductor import compile_options
from natten2.nn import NeighborhoodAttention1D, NeighborhoodAttention2D, NeighborhoodAttention3D
from natten2.unfused import attention_map, na1d_av, na1d_qk, na2d_av, na2d_qk, na3d_av, na3d_qk

__version__ = "0.1.0"

__all__ = [
    "NeighborhoodAttention1D",
    "NeighborhoodAttention2D",
    "NeighborhoodAttention3D",
    "attention_map",
    "compile_options",
    "merge_attentions",
    "models",
    "na1d",
    "na1d_av",
    "na1d_qk",
    "na2d",
    "na2d_av",
    "na2d_qk",
    "na3d",
    "na3d_av",
    "na3d_qk",
    "nested",
    "nn",
]
