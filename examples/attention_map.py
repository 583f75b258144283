"""Draws what a pixel attends to: the weights of single queries, scattered back over a picture.

Queries and keys are the colors around each pixel, so that a query finds what looks like it in its window. Run with
`python -m examples.attention_map [picture] --out attention_map.png`.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.image import imread
from matplotlib.patches import Rectangle
from sklearn.datasets import load_sample_image
from torch import Tensor
from torch.nn import functional

import natten2
from natten2.window import neighbors

__all__ = ["main"]

TOKENS = 96  # along the longer side
SHARPNESS = 12.0
QUERIES = ((0.35, 0.35), (0.1, 0.75), (0.62, 0.5), (0.95, 0.97))  # as parts of height and width


def main(arguments: Sequence[str] | None = None) -> Tensor:
    """Draws the picture, and returns the maps `[queries, height, width]`."""
    parser = argparse.ArgumentParser(prog="python -m examples.attention_map", description=__doc__.splitlines()[0])
    parser.add_argument("picture", nargs="?", type=Path, help="by default a photograph that scikit-learn ships")
    parser.add_argument("--kernel-size", type=int, default=13)
    parser.add_argument("--dilation", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path("runs/attention_map.png"))
    options = parser.parse_args(arguments)
    image = load(options.picture)
    window = (options.kernel_size, 1, options.dilation)

    features = describe(image)
    weights = natten2.na2d_qk(features, features, *window, scale=SHARPNESS).softmax(-1)
    height, width = image.shape[1:]
    queries = [(int(y * (height - 1)), int(x * (width - 1))) for y, x in QUERIES]
    maps = torch.stack([natten2.attention_map(weights, query, *window)[0, 0] for query in queries])
    draw(options.out, image, queries, maps, window)
    print(f"{options.out}: {len(queries)} queries, each with {options.kernel_size**2} keys")
    return maps


def load(path: Path | None) -> Tensor:
    """A picture `[3, height, width]` in [0, 1], `TOKENS` long."""
    pixels = load_sample_image("china.jpg") / 255 if path is None else imread(path).astype(np.float64)
    image = torch.from_numpy(pixels[..., :3]).float().movedim(-1, 0)
    image = image / 255 if image.max() > 1 else image
    scale = TOKENS / max(image.shape[1:])
    return functional.interpolate(image[None], scale_factor=scale, mode="area")[0]


def describe(image: Tensor) -> Tensor:
    """The normalized colors around each pixel, `[1, height, width, 1, 27]`."""
    centered = image - image.mean((1, 2), keepdim=True)
    patches = functional.unfold(centered[None], 3, padding=1).unflatten(-1, image.shape[1:])
    return functional.normalize(patches.movedim(1, -1), dim=-1)[..., None, :].contiguous()


def draw(path: Path, image: Tensor, queries: Sequence[tuple[int, int]], maps: Tensor, window: tuple) -> None:
    """Draws one panel per query: the picture in gray, the weights over it, the query in a frame."""
    kernel_size, _, dilation = window
    figure = Figure(figsize=(11, 7.6), facecolor="white", layout="constrained")
    figure.suptitle(f"What a pixel attends to: {kernel_size} x {kernel_size} keys, dilation {dilation}")
    gray = image.mean(0).numpy()
    for axes, (y, x), weights in zip(figure.subplots(2, 2).flat, queries, maps.numpy(), strict=True):
        axes.imshow(gray, cmap="gray", vmin=-0.4, vmax=1.4)
        shown = weights / weights.max()
        axes.imshow(shown, cmap="inferno", alpha=(weights > 0) * (0.25 + 0.75 * shown))
        axes.add_patch(Rectangle((x - 0.5, y - 0.5), 1, 1, fill=False, edgecolor="#2f9e44", linewidth=2))
        rows, columns = (
            neighbors(i, length, kernel_size, 1, dilation) for i, length in zip((y, x), gray.shape, strict=True)
        )
        axes.set_title(f"row {y}, column {x}: keys in rows {rows[0]}-{rows[-1]}, columns {columns[0]}-{columns[-1]}")
        axes.set_axis_off()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
