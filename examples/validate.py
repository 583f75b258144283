"""Accuracy of a trained model on the validation images: `python -m examples.validate runs/train/best.pth`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from torch.utils.data import DataLoader
from tqdm import tqdm

from examples.images import DIGITS, open_images
from examples.trained import add_arguments, open_trained

TOP = 5


def main(arguments: Sequence[str] | None = None) -> tuple[float, float]:
    """Prints and returns the parts of the images whose class is the first guess, and among the first five."""
    parser = argparse.ArgumentParser(prog="python -m examples.validate", description=__doc__.partition(":")[0] + ".")
    add_arguments(parser)
    parser.add_argument("--data", default=DIGITS, help="a folder with val/CLASS/*, or digits")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--workers", type=int, default=0)
    options = parser.parse_args(arguments)
    try:
        trained = open_trained(options)
        images = open_images(options.data, "val", trained.image_size)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    if len(images.classes) != len(trained.classes):
        parser.error(f"the model knows {len(trained.classes)} classes, but the data have {len(images.classes)}")
    first, among = 0, 0
    loader = DataLoader(images, options.batch_size, num_workers=options.workers)
    for inputs, labels in tqdm(loader, unit="batch", desc="validating"):
        guesses = trained.logits(inputs).topk(min(TOP, len(trained.classes))).indices
        hits = guesses == labels[:, None]
        first += int(hits[:, 0].sum())
        among += int(hits.any(dim=1).sum())
    print(f"{len(images)} images: top-1 {first / len(images):.2%}, top-{TOP} {among / len(images):.2%}")
    return first / len(images), among / len(images)


if __name__ == "__main__":
    main()
