"""`natten.types`: names of the types of arguments."""

from __future__ import annotations

from enum import Enum

__all__ = [
    "CausalArg1DType",
    "CausalArg1DTypeOrDed",
    "CausalArg2DType",
    "CausalArg2DTypeOrDed",
    "CausalArg3DType",
    "CausalArg3DTypeOrDed",
    "CausalArgType",
    "CausalArgTypeOrDed",
    "Dimension1DType",
    "Dimension1DTypeOrDed",
    "Dimension2DType",
    "Dimension2DTypeOrDed",
    "Dimension3DType",
    "Dimension3DTypeOrDed",
    "DimensionType",
    "DimensionTypeOrDed",
    "KernelSchedule",
    "NoneType",
]

NoneType = type(None)
Dimension1DType, Dimension2DType, Dimension3DType = tuple[int], tuple[int, int], tuple[int, int, int]
CausalArg1DType, CausalArg2DType, CausalArg3DType = tuple[bool], tuple[bool, bool], tuple[bool, bool, bool]
DimensionType = Dimension1DType | Dimension2DType | Dimension3DType
CausalArgType = CausalArg1DType | CausalArg2DType | CausalArg3DType
Dimension1DTypeOrDed, CausalArg1DTypeOrDed = int | Dimension1DType, bool | CausalArg1DType
Dimension2DTypeOrDed, CausalArg2DTypeOrDed = int | Dimension2DType, bool | CausalArg2DType
Dimension3DTypeOrDed, CausalArg3DTypeOrDed = int | Dimension3DType, bool | CausalArg3DType
DimensionTypeOrDed, CausalArgTypeOrDed = int | DimensionType, bool | CausalArgType


class KernelSchedule(Enum):
    """Accepted, and ignored."""

    NonPersistent = 0
    WarpSpecializedCooperative = 1
    WarpSpecializedPingpong = 2
