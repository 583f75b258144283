"""Trains a small Neighborhood Attention Transformer on scans of handwritten digits: `python -m examples.digits`.

The data are scikit-learn's 1797 scans of 8 x 8 pixels. They are enlarged so that the model's first level has one token
per pixel, and a fifth of them is held out for the test.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor
from torch.nn import functional
from tqdm import tqdm

from benchmarks.cases import NAT_TINY
from benchmarks.compare import compare
from benchmarks.cpu import QUICK
from benchmarks.implementations import OURS
from benchmarks.report import format_records
from benchmarks.timing import threads
from examples.digits_picture import draw
from natten2.models import NAT, NATConfig

REQUIRED_ACCURACY = 0.97
CONFIG = NATConfig(
    depths=(2, 2),
    num_heads=(2, 4),
    embed_dim=32,
    mlp_ratio=2,
    kernel_size=3,
    dilations=((1, 2), (1, 1)),
    in_chans=1,
    num_classes=10,
)
# The model's first level works at a quarter of the image's resolution: one token per pixel of a scan.
IMAGE_SIZE = 32
LARGEST_BATCH = 256
# Largest change of each entry of the affine map that augmentation draws: turns, stretches, shears and shifts.
AUGMENTATION = torch.tensor([[0.15, 0.15, 0.06], [0.15, 0.15, 0.06]])

NEXT = """
What to read next:
  README.md                          how to use the operator, the modules and the models
  docs/architecture.md               how it is built, and why
  python -m natten2 window --help    which keys a query sees, drawn in the terminal
  python -m benchmarks cpu           the comparison above in full"""


@dataclass(frozen=True)
class Digits:
    """Scans `[N, 1, 8, 8]` between 0 and 1, and the digits they show, `[N]`."""

    train_scans: Tensor
    test_scans: Tensor
    train_labels: Tensor
    test_labels: Tensor


def main(arguments: Sequence[str] | None = None) -> list[float]:
    """Trains, tests, compares, and draws; returns the loss of every step.

    Raises:
        SystemExit: The accuracy on the held-out scans is below `REQUIRED_ACCURACY`.
    """
    options = parse(arguments)
    torch.manual_seed(options.seed)
    digits = load()
    model = NAT(CONFIG)
    # For batches this small, threads wait for each other longer than they work.
    with threads(1):
        losses = train(model, digits, options)
        predicted = predict(model, digits.test_scans)
    accuracy = float((predicted == digits.test_labels).float().mean())
    print(f"Accuracy on {len(predicted)} held-out scans: {accuracy:.1%}\n")

    print("The operator against other ways, on the levels of NAT-Tiny, one thread (rough: a few short samples):")
    levels = NAT_TINY[-1:] if options.quick else NAT_TINY
    print(format_records(compare(levels, ["float32"], ["fwd", "fwdbwd"], QUICK, (OURS, "gather", "swin"))))

    draw(options.out, digits.test_scans, digits.test_labels, predicted, CONFIG.kernel_size)
    print(f"\nPicture of the predictions and of what a query sees: {options.out}\n{NEXT}")
    if accuracy < REQUIRED_ACCURACY and not options.quick:
        raise SystemExit(f"error: the accuracy is {accuracy:.1%}, less than {REQUIRED_ACCURACY:.0%}")
    return losses


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m examples.digits", description=__doc__.partition("\n")[0])
    parser.add_argument("--epochs", type=int, default=60)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("runs/digits.png"), help="the picture")
    parser.add_argument("--no-compile", dest="compile", action="store_false", help="train without torch.compile")
    parser.add_argument("--quick", action="store_true", help="a short run that need not reach the accuracy")
    options = parser.parse_args(arguments)
    if options.epochs < 1:
        parser.error(f"--epochs must be at least 1, got {options.epochs}")
    if not 1 <= options.batch_size <= LARGEST_BATCH:
        parser.error(f"--batch-size must be between 1 and {LARGEST_BATCH}, got {options.batch_size}")
    if options.quick:
        options.epochs = min(options.epochs, 2)
    return options


def load() -> Digits:
    """Loads the scans, and holds out a fifth of every digit's."""
    scans, labels = load_digits(return_X_y=True)
    split = train_test_split(scans.reshape(-1, 1, 8, 8) / 16, labels, test_size=0.2, stratify=labels, random_state=0)
    train_scans, test_scans, train_labels, test_labels = map(torch.from_numpy, split)
    return Digits(train_scans.float(), test_scans.float(), train_labels, test_labels)


def enlarge(scans: Tensor, change: Tensor | float = 0.0) -> Tensor:
    """Scans `[N, 1, 8, 8]` as images `[N, 1, 32, 32]`, seen through the affine map identity + `change`."""
    maps = (torch.eye(2, 3) + change).expand(len(scans), 2, 3)
    grid = functional.affine_grid(maps, [len(scans), 1, IMAGE_SIZE, IMAGE_SIZE], align_corners=False)
    return functional.grid_sample(scans, grid, mode="bilinear", align_corners=False)


def augment(scans: Tensor) -> Tensor:
    """Scans `[N, 1, 8, 8]` as images `[N, 1, 32, 32]`, each a little distorted."""
    return enlarge(scans, torch.empty(len(scans), 2, 3).uniform_(-1, 1) * AUGMENTATION)


def train(model: NAT, digits: Digits, options: argparse.Namespace) -> list[float]:
    """Trains `model` in place; returns the loss of every step."""

    def loss_function(images: Tensor, labels: Tensor) -> Tensor:
        return functional.cross_entropy(model(images), labels, label_smoothing=0.1)

    if options.compile:
        loss_function = torch.compile(loss_function, fullgraph=True)
    batches = len(digits.train_labels) // options.batch_size
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=3e-3, total_steps=options.epochs * batches, pct_start=0.1
    )
    losses: list[float] = []
    model.train()
    with tqdm(
        total=options.epochs * batches, unit="step", desc="compiling" if options.compile else "training"
    ) as progress:
        for _ in range(options.epochs):
            # Batches of one size compile once; the few scans left over in an epoch come up in the next.
            for batch in torch.randperm(len(digits.train_labels)).split(options.batch_size)[:batches]:
                loss = loss_function(augment(digits.train_scans[batch]), digits.train_labels[batch])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
                losses.append(loss.item())
                progress.set_description("training", refresh=False)
                progress.set_postfix(loss=f"{losses[-1]:.3f}", refresh=False)
                progress.update()
    return losses


def predict(model: NAT, scans: Tensor) -> Tensor:
    """The digits that `model` reads in scans `[N, 1, 8, 8]`, as `[N]`."""
    model.eval()
    with torch.inference_mode():
        return model(enlarge(scans)).argmax(dim=-1)


if __name__ == "__main__":
    main()
