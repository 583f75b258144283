"""A trained model with what its user has to know: the classes, and the size of its images."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from pickle import UnpicklingError

import torch
from torch import Tensor

from examples.images import CROP
from natten2.models import NAT, NATConfig, create, list_models, load_checkpoint

__all__ = ["Trained", "add_arguments", "load_trained", "open_trained"]


@dataclass(frozen=True)
class Trained:
    """A model that is ready for use.

    Attributes:
        model: Maps normalized images `[B, 3, image_size, image_size]` to logits `[B, len(classes)]`.
        classes: Their names, in the order of the logits.
        image_size: The side of the images that it was trained on.
        crop: The part of an image's shorter side that it sees.
        device: Where it runs.
    """

    model: Callable[[Tensor], Tensor]
    classes: Sequence[str]
    image_size: int
    crop: float
    device: torch.device = field(default_factory=lambda: torch.device("cuda" if torch.cuda.is_available() else "cpu"))

    def logits(self, images: Tensor) -> Tensor:
        """Logits on the CPU, of images on the CPU."""
        with torch.inference_mode():
            return self.model(images.to(self.device)).cpu()


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of :func:`open_trained`."""
    parser.add_argument("checkpoint", type=Path, help="a file that examples.train wrote, or a released one")
    parser.add_argument("--model", choices=list_models(), metavar="NAME", help="of a released checkpoint")
    parser.add_argument("--image-size", type=int, help="of a released checkpoint, by default 224 or what its name says")
    parser.add_argument("--raw", action="store_true", help="the last weights, not their average over the training")


def open_trained(options: argparse.Namespace) -> Trained:
    """The model that the options name.

    Raises:
        ValueError: The file is not what it should be.
    """
    if options.model is None:
        return load_trained(options.checkpoint, averaged=not options.raw)
    model = create(options.model)
    load_checkpoint(model, options.checkpoint)
    size = options.image_size or (384 if "384" in options.model else 224)
    return _ready(model, [f"class {index}" for index in range(model.config.num_classes)], size, CROP)


def load_trained(path: Path, averaged: bool = True) -> Trained:
    """The model in a checkpoint of `examples.train`.

    Args:
        averaged: Whether to load the average of the weights over the training instead of the last ones.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, UnpicklingError) as error:
        raise ValueError(f"{path} can't be read as a checkpoint") from error
    if not (isinstance(content, dict) and {"config", "classes", "image_size", "crop"} <= content.keys()):
        raise ValueError(f"{path} must be a checkpoint of examples.train, or come with --model")
    model = NAT(NATConfig(**content["config"]))
    load_checkpoint(model, path, key="ema" if averaged else "model")
    return _ready(model, content["classes"], content["image_size"], content["crop"])


def _ready(model: NAT, *about: object) -> Trained:
    trained = Trained(model.eval(), *about)
    model.to(trained.device)
    return trained
