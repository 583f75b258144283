"""Images and their classes for the programs: a folder of folders, or the digits that scikit-learn ships."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch

# Pillow comes with matplotlib, which needs it.
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import Dataset

__all__ = ["CROP", "DIGITS", "Images", "open_images", "prepare", "read_image"]

DIGITS = "digits"
SUFFIXES = {".bmp", ".jpeg", ".jpg", ".png", ".ppm", ".webp"}
# Of ImageNet's pixels, as the released models were trained.
MEAN, STD = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
# The part of an image's shorter side that is seen when it isn't trained on.
CROP = 0.875


@dataclass(frozen=True)
class Images(Dataset):
    """Pairs of a normalized image `[3, size, size]` and its label.

    Attributes:
        sources: For each image a function that reads it.
        labels: The index of each one's class.
        classes: The names of the classes.
        size: The side of what the model sees.
        augment: Whether crops are random, as in training; if not, they are central.
        flip: Whether random crops are mirrored at random.
        crop: The part of the shorter side that a central crop keeps.
    """

    sources: Sequence[Callable[[], Image.Image]]
    labels: Sequence[int]
    classes: Sequence[str]
    size: int
    augment: bool = False
    flip: bool = True
    crop: float = CROP

    def __len__(self) -> int:
        return len(self.sources)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image = self.sources[index]()
        tensor = randomly_cropped(image, self.size, self.flip) if self.augment else prepare(image, self.size, self.crop)
        return tensor, self.labels[index]


def open_images(data: str, split: str, size: int) -> Images:
    """The images of `digits`, or of a folder with `train/CLASS/*` and `val/CLASS/*`.

    Raises:
        ValueError: The folder is not like this.
    """
    if split not in ("train", "val"):
        raise ValueError(f"split must be train or val, got {split!r}")
    if data == DIGITS:
        return _open_digits(split, size)
    root = Path(data) / split
    classes = sorted(path.name for path in root.iterdir() if path.is_dir()) if root.is_dir() else []
    paths = [
        (path, label)
        for label, name in enumerate(classes)
        for path in sorted((root / name).rglob("*"))
        if path.suffix.lower() in SUFFIXES
    ]
    if not paths:
        raise ValueError(f"data must be {DIGITS!r} or a folder with {split}/CLASS/*.jpg, but {root} has no image")
    sources = [partial(read_image, path) for path, _ in paths]
    return Images(sources, [label for _, label in paths], classes, size, augment=split == "train")


def read_image(path: str | Path) -> Image.Image:
    """An image file in RGB, turned upright.

    Raises:
        ValueError: The file is missing, or is no image.
    """
    try:
        with Image.open(path) as image:
            return ImageOps.exif_transpose(image).convert("RGB")
    except (OSError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path} can't be read as an image: {error}") from error


def prepare(image: Image.Image, size: int, crop: float = CROP) -> Tensor:
    """The central square of an image, resized and normalized, `[3, size, size]`."""
    side = min(image.size) * crop
    left, top = ((length - side) / 2 for length in image.size)
    return _resized(image, size, (left, top, left + side, top + side))


def randomly_cropped(image: Image.Image, size: int, flip: bool) -> Tensor:
    """A crop of a random place, area and ratio of sides (arXiv 1409.4842, section 6), perhaps mirrored."""
    width, height = image.size
    area = width * height * random.uniform(0.35, 1.0)
    ratio = math.exp(random.uniform(math.log(3 / 4), math.log(4 / 3)))
    crop_width, crop_height = min(math.sqrt(area * ratio), width), min(math.sqrt(area / ratio), height)
    left, top = random.uniform(0, width - crop_width), random.uniform(0, height - crop_height)
    tensor = _resized(image, size, (left, top, left + crop_width, top + crop_height))
    return tensor.flip(-1) if flip and random.random() < 0.5 else tensor


def _resized(image: Image.Image, size: int, box: tuple[float, float, float, float]) -> Tensor:
    pixels = np.asarray(image.convert("RGB").resize((size, size), Image.Resampling.BICUBIC, box))
    tensor = torch.from_numpy(pixels.astype(np.float32)).permute(2, 0, 1).contiguous() / 255
    return (tensor - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)


def _open_digits(split: str, size: int) -> Images:
    """scikit-learn's 1797 scans of 8 x 8 pixels; a fifth of them, the same of every digit, is for validation."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    scans, labels = load_digits(return_X_y=True)
    parts = train_test_split(scans.reshape(-1, 8, 8), labels, test_size=0.2, stratify=labels, random_state=0)
    chosen, their_labels = (parts[0], parts[2]) if split == "train" else (parts[1], parts[3])
    pixels = (chosen * (255 / 16)).round().astype(np.uint8)
    sources = [partial(Image.fromarray, scan) for scan in pixels]
    classes = [str(digit) for digit in range(10)]
    return Images(sources, their_labels.tolist(), classes, size, augment=split == "train", flip=False, crop=1.0)
