"""Loads released and self-trained weights, and changes nothing where a file doesn't fit.

What a file may be, in turn: :mod:`natten2.models._files` reads it, :mod:`natten2.models._layouts` finds the model in it
and gives its tensors the names that ours have, and this module compares them with the model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from os import PathLike

import torch
from torch import Tensor
from torch.nn import functional

from natten2.models._files import fetch, read
from natten2.models._layouts import backbone_tensors, find_state_dict
from natten2.models.nat import Backbone

__all__ = ["LoadReport", "load_checkpoint"]

_MOST_SHOWN = 4


@dataclass(frozen=True)
class LoadReport:
    """What became of every tensor of a file and of a model.

    Attributes:
        loaded: The model's tensors that were loaded.
        missing: Those that the file lacks.
        unexpected: The file's tensors that the model lacks, under the model's naming.
        mismatched: Those of another shape, as `(name, shape in the file, shape in the model)`, `()` where it is
            not a dense tensor of real numbers.
        interpolated: The bias tables among `loaded` that were interpolated to another kernel size.
        ignored: Names in the file that are not of the backbone and its head: necks, detection heads, auxiliary heads.
    """

    loaded: tuple[str, ...]
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    mismatched: tuple[tuple[str, tuple[int, ...], tuple[int, ...]], ...]
    interpolated: tuple[str, ...]
    ignored: tuple[str, ...]

    @property
    def is_complete(self) -> bool:
        """Whether the model and the file hold the same tensors."""
        return not (self.missing or self.unexpected or self.mismatched)

    def __str__(self) -> str:
        return self.describe("loaded")

    def describe(self, done: str) -> str:
        """All of it in a sentence; `done` is what became of the tensors that fit."""
        mismatched = [f"{name} {list(there)} for {list(here)}" for name, there, here in self.mismatched]
        parts = {
            "missing": self.missing,
            "unexpected": self.unexpected,
            "of another shape": mismatched,
            "interpolated": self.interpolated,
            "ignored": self.ignored,
        }
        found = [f"{len(names)} {what} ({_shortened(names)})" for what, names in parts.items() if names]
        return "; ".join([f"{len(self.loaded)} tensors {done}", *found])


def load_checkpoint(
    model: Backbone,
    path_or_url: str | PathLike[str],
    *,
    strict: bool = True,
    sha256: str | None = None,
    key: str | None = None,
    prefix: str | None = None,
    interpolate_rpb: bool = False,
) -> LoadReport:
    """Loads the weights of a file into a model.

    Files are those of `torch.save` or safetensors: released NAT, DiNAT, DiNAT_s and isotropic classifiers; backbones
    inside detection and segmentation checkpoints; Hugging Face's Nat and Dinat, classifiers and backbones; and what
    training programs and wrappers such as `DataParallel` and `torch.compile` make of any of them. Nothing but tensors
    and plain values is ever unpickled (`weights_only=True`). On an error the model is as it was.

    A file that fits by names and shapes is taken to be of this model; dilations leave no trace in weights.

    Args:
        model: A :class:`NAT` or :class:`NATFeatures` itself, not a wrapper around it.
        path_or_url: A path, or a `https`, `http` or `file` URL, which is downloaded to `torch.hub.get_dir()` once.
        strict: Whether every tensor must fit. If not, those that do are loaded, if there are any of an attention's, and
            the report tells of the others: so a classifier's file serves a :class:`NATFeatures`, or another number of
            classes.
        sha256: The expected digest of the file, 64 hexadecimal digits.
        key: The entry of the file that holds the weights, such as `"ema"`; by default it is found.
        prefix: What precedes the names of the model's tensors in the file, such as `"backbone."`; by default it is
            found.
        interpolate_rpb: Whether bias tables of another kernel size are interpolated, bicubically, to the model's.

    Returns:
        A report of what was loaded and what was not.

    Raises:
        FileNotFoundError: There is no such file.
        OSError: A download fails.
        ValueError: The file is truncated, holds anything but tensors and plain values, has another digest, holds no
            such model, or doesn't fit.
        TypeError: An argument is of the wrong type.
        NotImplementedError: Some of the model's tensors are on the meta device, or distributed.
    """
    if not isinstance(model, Backbone):
        raise TypeError(f"model must be one of natten2.models, not in a wrapper, got {type(model).__name__}")
    path = fetch(path_or_url, sha256)
    state_dict = find_state_dict(read(path), path, key)
    tensors, ignored = backbone_tensors(state_dict, path, prefix)
    targets = model.state_dict()
    for name, target in targets.items():
        if type(target) is not Tensor or target.is_meta:
            raise NotImplementedError(f"model must be on one device before its weights are loaded, but {name} is not")
    interpolated = _interpolate(tensors, targets) if interpolate_rpb else ()
    report = _compare(tensors, targets, interpolated, ignored)
    if (strict and not report.is_complete) or not any(name.endswith("attn.qkv.weight") for name in report.loaded):
        raise ValueError(f"{path} doesn't fit the model, which is unchanged: {report.describe('fit')}")
    with torch.no_grad():
        for name in report.loaded:
            targets[name].copy_(tensors[name])
    return report


def _compare(
    tensors: dict[str, Tensor], targets: dict[str, Tensor], interpolated: Sequence[str], ignored: Sequence[str]
) -> LoadReport:
    common = [name for name in targets if name in tensors]
    fits = {name: None for name in common if _shape(tensors[name]) == tuple(targets[name].shape)}
    return LoadReport(
        loaded=tuple(fits),
        missing=tuple(name for name in targets if name not in tensors),
        unexpected=tuple(name for name in tensors if name not in targets),
        mismatched=tuple(
            (name, _shape(tensors[name]), tuple(targets[name].shape)) for name in common if name not in fits
        ),
        interpolated=tuple(interpolated),
        ignored=tuple(ignored),
    )


def _shape(tensor: Tensor) -> tuple[int, ...]:
    """The shape, which is empty where there is nothing to copy."""
    is_usable = tensor.is_floating_point() and tensor.layout == torch.strided and not tensor.is_meta
    return tuple(tensor.shape) if is_usable else ()


def _interpolate(tensors: dict[str, Tensor], targets: dict[str, Tensor]) -> list[str]:
    """Replaces the bias tables `[heads, 2k - 1, 2k - 1]` of another kernel size; returns their names."""
    names = [
        name
        for name, table in tensors.items()
        if name.endswith("attn.rpb")
        and name in targets
        and len(_shape(table)) == 3
        and table.shape[0] == targets[name].shape[0]
        and table.shape != targets[name].shape
    ]
    for name in names:
        # As the released weights for windows of 11 x 11 were made of those for 7 x 7.
        table = tensors[name].float()[None]
        size = targets[name].shape[1:]
        tensors[name] = functional.interpolate(table, size, mode="bicubic", align_corners=False)[0]
    return names


def _shortened(names: Sequence[str]) -> str:
    shown = ", ".join(names[:_MOST_SHOWN])
    return shown if len(names) <= _MOST_SHOWN else f"{shown}, and {len(names) - _MOST_SHOWN} more"
