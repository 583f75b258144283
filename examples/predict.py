"""The classes of one image: `python -m examples.predict image.jpg runs/train/best.pth`.

A package that `examples.export` wrote, ending in `.pt2`, predicts too, without the model's code.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from examples.export import load_package
from examples.images import prepare, read_image
from examples.trained import add_arguments, open_trained

BAR = 30


def main(arguments: Sequence[str] | None = None) -> list[tuple[str, float]]:
    """Prints and returns the classes with the highest probabilities."""
    parser = argparse.ArgumentParser(prog="python -m examples.predict", description=__doc__.partition(":")[0] + ".")
    parser.add_argument("image", type=Path)
    add_arguments(parser)
    parser.add_argument("--top", type=int, default=5, help="how many classes to print")
    options = parser.parse_args(arguments)
    try:
        is_package = options.checkpoint.suffix == ".pt2"
        trained = load_package(options.checkpoint) if is_package else open_trained(options)
        image = prepare(read_image(options.image), trained.image_size, trained.crop)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    probabilities = trained.logits(image[None])[0].softmax(dim=-1)
    top = probabilities.topk(max(1, min(options.top, len(trained.classes))))
    names = [trained.classes[index] for index in top.indices.tolist()]
    found = list(zip(names, top.values.tolist(), strict=True))
    width = max(len(name) for name, _ in found)
    for name, probability in found:
        print(f"{name:{width}}  {probability:6.1%}  {'█' * round(probability * BAR)}")
    return found


if __name__ == "__main__":
    main()
