"""Exports a trained model: `python -m examples.export runs/train/best.pth --out runs/train/model.pt2`.

The file is a package of AOTInductor: compiled code and weights, which run without Python's model, for any batch. Beside
it, `--graph` writes the graph of `torch.export`, which other compilers read. The package is loaded again and compared
with the model before the program ends.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import torch
from torch.export import Dim, ExportedProgram

# The packages call natten2's operator, which is in natten2's library.
import natten2  # noqa: F401
from examples.trained import Trained, add_arguments, open_trained

TOLERANCE = 1e-4
_CLASSES, _IMAGE_SIZE, _CROP = "classes", "image_size", "crop"


def main(arguments: Sequence[str] | None = None) -> None:
    """Writes the package, loads it again, and compares."""
    parser = argparse.ArgumentParser(prog="python -m examples.export", description=__doc__.partition(":")[0] + ".")
    add_arguments(parser)
    parser.add_argument("--out", type=Path, default=Path("runs/model.pt2"), help="the package, ending in .pt2")
    parser.add_argument("--graph", type=Path, help="where to write the graph of torch.export as well")
    options = parser.parse_args(arguments)
    if options.out.suffix != ".pt2":
        parser.error(f"--out must end in .pt2, got {options.out}")
    try:
        trained = open_trained(options)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    options.out.parent.mkdir(parents=True, exist_ok=True)
    program = export(trained)
    if options.graph is not None:
        torch.export.save(program, options.graph)
    write_package(program, trained, options.out)
    error = difference(trained, load_package(options.out))
    print(f"{options.out}: {options.out.stat().st_size / 2**20:.1f} MiB, logits within {error:.1e} of the model's")
    if error > TOLERANCE:
        raise SystemExit("error: the package's logits are not the model's")


def export(trained: Trained) -> ExportedProgram:
    """The graph of the model for any batch of images of its size."""
    images = torch.zeros(2, 3, trained.image_size, trained.image_size, device=trained.device)
    with torch.no_grad():
        return torch.export.export(trained.model, (images,), dynamic_shapes=({0: Dim("batch", min=1)},))


def write_package(program: ExportedProgram, trained: Trained, path: Path) -> None:
    """Compiles the graph into a package that also holds what its user has to know."""
    about = {_CLASSES: list(trained.classes), _IMAGE_SIZE: trained.image_size, _CROP: trained.crop}
    metadata = {name: json.dumps(value) for name, value in about.items()}
    options = {"aot_inductor.metadata": metadata}
    torch._inductor.aoti_compile_and_package(program, package_path=str(path), inductor_configs=options)


def load_package(path: Path) -> Trained:
    """The model in a package that :func:`write_package` wrote.

    Raises:
        ValueError: It is none of them.
    """
    if not path.is_file():
        raise ValueError(f"{path} must be a package of examples.export, but is no file")
    package = torch._inductor.aoti_load_package(str(path))
    metadata = package.loader.get_metadata()
    if not {_CLASSES, _IMAGE_SIZE, _CROP} <= metadata.keys():
        raise ValueError(f"{path} must be a package of examples.export, with the names of the classes")
    classes, size, crop = (json.loads(metadata[name]) for name in (_CLASSES, _IMAGE_SIZE, _CROP))
    device = torch.device(metadata["AOTI_DEVICE_KEY"])
    # Compiled code reads any input as the contiguous one that it was compiled for.
    return Trained(lambda images: package(images.contiguous()), classes, size, crop, device)


def difference(trained: Trained, package: Trained) -> float:
    """The largest difference of their logits on random images, in two batches."""
    batches = [torch.randn(size, 3, trained.image_size, trained.image_size) for size in (1, 3)]
    return max(float((trained.logits(images) - package.logits(images)).abs().max()) for images in batches)


if __name__ == "__main__":
    main()
