"""What the released checkpoints hold: `golden/models.json`, with the tensors of equal blocks written once."""

from __future__ import annotations

import json
from pathlib import Path

__all__ = ["MODELS", "state_dict_shapes"]

_GOLDEN = json.loads((Path(__file__).parent / "golden" / "models.json").read_text())
# Name to parameters, input size, and multiply-adds by kind.
MODELS: dict[str, dict] = _GOLDEN["models"]


def state_dict_shapes(name: str) -> dict[str, list[int]]:
    """The names and shapes of a model's released state dict, in its order."""
    shapes = {}
    for key, value in _GOLDEN["layouts"][MODELS[name]["layout"]].items():
        if isinstance(value, list):
            shapes[key] = value
        else:
            for block in range(value["blocks"]):
                shapes |= {f"{key[:-1]}{block}.{tensor}": shape for tensor, shape in value["tensors"].items()}
    return shapes
