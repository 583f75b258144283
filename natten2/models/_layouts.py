"""Where a model is in a checkpoint, and what its tensors are called in ours."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

__all__ = ["backbone_tensors", "find_state_dict"]

# Where training programs keep the weights, in the order of preference.
_ENTRIES = ("state_dict", "model", "module", "model_state_dict", "state_dict_ema", "model_ema", "ema")
_DEEPEST = 4
# Wrappers that put themselves between a module and its parent, wherever they are.
_WRAPPERS = re.compile(r"(?:_orig_mod|_checkpoint_wrapped_module|_fsdp_wrapped_module)\.")
_EMBEDDING = re.compile(r"((?:.*\.)?)(?:patch_embed\.proj|embeddings\.patch_embeddings\.projection)(?:\.0)?\.weight")
_MOST_SHOWN = 4

# Hugging Face's names of Nat and Dinat, without the prefix, and ours.
_HUGGING_FACE = (
    (r"embeddings\.patch_embeddings\.projection\.", "patch_embed.proj."),
    (r"embeddings\.norm\.", "patch_embed.norm."),
    (r"encoder\.(levels\.\d+\.)layers\.(\d+\.)layernorm_before\.", r"\1blocks.\2norm1."),
    (r"encoder\.(levels\.\d+\.)layers\.(\d+\.)layernorm_after\.", r"\1blocks.\2norm2."),
    (r"encoder\.(levels\.\d+\.)layers\.(\d+\.)attention\.self\.", r"\1blocks.\2attn."),
    (r"encoder\.(levels\.\d+\.)layers\.(\d+\.)attention\.output\.dense\.", r"\1blocks.\2attn.proj."),
    (r"encoder\.(levels\.\d+\.)layers\.(\d+\.)intermediate\.dense\.", r"\1blocks.\2mlp.fc1."),
    (r"encoder\.(levels\.\d+\.)layers\.(\d+\.)output\.dense\.", r"\1blocks.\2mlp.fc2."),
    (r"encoder\.(levels\.\d+\.)layers\.(\d+\.)layer_scale_parameters", r"\1blocks.\2gammas"),
    (r"encoder\.(levels\.\d+\.downsample\.)", r"\1"),
    (r"layernorm\.", "norm."),
    (r"classifier\.", "head."),
    *((rf"hidden_states_norms\.stage{level + 1}\.", f"norm{level}.") for level in range(4)),
)


def find_state_dict(content: object, path: Path, key: str | None) -> dict[str, Tensor]:
    """The tensors of a checkpoint by name, from its entry `key` or from the first that holds a model.

    Raises:
        ValueError: There is no such entry, or no model in any.
        TypeError: `key` is not a string.
    """
    if not (key is None or isinstance(key, str)):
        raise TypeError(f"key must be a string or None, got {key!r}")
    if key is not None:
        if not isinstance(content, Mapping) or key not in content:
            raise ValueError(f"key must be one of {path}'s entries, {_listed(content)}, got {key!r}")
        content = content[key]
    found = _search(content, _DEEPEST)
    if found is None:
        raise ValueError(f"{path} must hold a NAT, DiNAT or DiNAT_s with its embedding, but has {_listed(content)}")
    return found


def backbone_tensors(
    state_dict: dict[str, Tensor], path: Path, prefix: str | None
) -> tuple[dict[str, Tensor], list[str]]:
    """A model's tensors under our names, and the names of all that is not the model's.

    Raises:
        ValueError: There is no model with this prefix, or there are several and no prefix was given.
        TypeError: `prefix` is not a string.
    """
    if not (prefix is None or isinstance(prefix, str)):
        raise TypeError(f"prefix must be a string or None, got {prefix!r}")
    prefixes = sorted({match.group(1) for name in state_dict if (match := _EMBEDDING.fullmatch(name))})
    if prefix is None and len(prefixes) > 1:
        raise ValueError(f"{path} holds several models: prefix must be one of {', '.join(map(repr, prefixes))}")
    if prefix is not None and prefix not in prefixes:
        raise ValueError(f"prefix must be {' or '.join(map(repr, prefixes))} in {path}, got {prefix!r}")
    (prefix,) = prefixes if prefix is None else (prefix,)
    inside = {name.removeprefix(prefix): tensor for name, tensor in state_dict.items() if name.startswith(prefix)}
    if any(name.startswith("embeddings.") for name in inside):
        # Hugging Face's head is outside of its backbone.
        parent = re.sub(r"(?:nat|dinat)\.$", "", prefix)
        head = {f"classifier.{kind}": f"{parent}classifier.{kind}" for kind in ("weight", "bias")}
        inside |= {ours: state_dict[theirs] for ours, theirs in head.items() if theirs in state_dict}
        ignored = [name for name in state_dict if not name.startswith(prefix) and name not in head.values()]
        return _from_hugging_face(inside), ignored
    # ViT's index tables say nothing that the places of tokens don't.
    tensors = {name: tensor for name, tensor in inside.items() if not name.endswith(".attn.relative_position_index")}
    return tensors, [name for name in state_dict if not name.startswith(prefix)]


def _search(content: object, deepest: int) -> dict[str, Tensor] | None:
    """The tensors of the nearest dictionary that has those of a patch embedding, without wrappers in their names."""
    if not isinstance(content, Mapping):
        return None
    named = {name: value for name, value in content.items() if isinstance(name, str) and isinstance(value, Tensor)}
    tensors = {_WRAPPERS.sub("", name): tensor for name, tensor in named.items()}
    if any(_EMBEDDING.fullmatch(name) for name in tensors):
        return tensors
    inner = (_search(content[entry], deepest - 1) for entry in _ENTRIES if entry in content and deepest > 0)
    return next((found for found in inner if found is not None), None)


def _from_hugging_face(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    renamed = {_rename(name): tensor for name, tensor in tensors.items()}
    for name in [name for name in renamed if re.search(r"\.attn\.query\.(?:weight|bias)$", name)]:
        names = [name.replace(".attn.query.", f".attn.{part}.") for part in ("query", "key", "value")]
        parts = [renamed.get(part) for part in names]
        if all(part is not None and part.shape == parts[0].shape and part.dim() > 0 for part in parts):
            renamed[name.replace(".attn.query.", ".attn.qkv.")] = torch.cat(parts)
            for part in names:
                del renamed[part]
    for name in [name for name in renamed if name.endswith(".gammas")]:
        gammas = renamed[name]
        if gammas.dim() == 2 and len(gammas) == 2:
            block = name.removesuffix("gammas")
            renamed |= {f"{block}gamma1": gammas[0], f"{block}gamma2": gammas[1]}
            del renamed[name]
    return renamed


def _rename(name: str) -> str:
    for pattern, replacement in _HUGGING_FACE:
        renamed, count = re.subn(f"^{pattern}", replacement, name)
        if count:
            return renamed
    return name


def _listed(content: object) -> str:
    """What there is instead, in a few words."""
    if not isinstance(content, Mapping):
        return f"a {type(content).__name__}"
    names: Sequence[str] = [str(name) for name in content]
    rest = len(names) - _MOST_SHOWN
    return ", ".join(map(repr, names[:_MOST_SHOWN])) + (f" and {rest} more" if rest > 0 else "") or "nothing"
