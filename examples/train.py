"""Trains a model on a folder of images, or on scikit-learn's digits: `python -m examples.train --data digits`.

`torchrun --nproc-per-node 2 -m examples.train ...` trains on several processes. A run that was interrupted goes on with
`--resume`, and ends in the same weights as one that was not.
"""

from __future__ import annotations

import argparse
import json
import math
import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader
from tqdm import tqdm

from examples.images import DIGITS, Images, open_images
from examples.parallel import (
    Share,
    is_first,
    model_state,
    optimizer_state,
    parallelize,
    process_group,
    rank,
    restore,
    restore_optimizer,
    summed,
    world_size,
)
from examples.training_plot import draw
from natten2.models import NATConfig, create, list_models

LAST, BEST = "last.pth", "best.pth"


@dataclass
class Run:
    """All that a checkpoint holds, and the loop changes.

    Attributes:
        model: What is trained, and the processes share.
        ema: Its moving average.
        config: The shape of both.
        history: For each epoch the loss, and the accuracy of the average.
    """

    model: nn.Module
    ema: nn.Module
    optimizer: torch.optim.Optimizer
    config: NATConfig
    history: list[dict[str, float]] = field(default_factory=list)


def main(arguments: Sequence[str] | None = None) -> list[dict[str, float]]:
    """Trains, writes checkpoints and a plot after every epoch, and returns the history."""
    options = parse(arguments)
    with process_group() as device:
        return train(options, device)


def train(options: argparse.Namespace, device: torch.device) -> list[dict[str, float]]:
    """Everything that holds the process group ends with this function."""
    train_images, val_images = (open_images(options.data, split, options.image_size) for split in ("train", "val"))
    train_images = replace(train_images, augment=options.augment)
    torch.manual_seed(options.seed)
    run = make_run(options, len(train_images.classes), device)
    if options.resume:
        load(run, options.out / LAST)
    for epoch in range(len(run.history), options.stop_after or options.epochs):
        loss = train_epoch(run, train_images, epoch, options, device)
        accuracy = validate(run.ema, val_images, options, device)
        run.history.append({"epoch": epoch + 1, "loss": loss, "accuracy": accuracy})
        save(run, val_images, options)
    return run.history


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m examples.train", description=__doc__.partition(":")[0] + ".")
    parser.add_argument("--data", default=DIGITS, help="a folder with train/CLASS/* and val/CLASS/*, or digits")
    parser.add_argument("--model", default="nat_mini", choices=list_models(), metavar="NAME")
    parser.add_argument("--config", type=json.loads, default={}, help='fields to change: {"depths": [2, 2], ...}')
    parser.add_argument("--image-size", type=_positive, default=224)
    parser.add_argument("--epochs", type=_positive, default=30)
    parser.add_argument("--batch-size", type=_positive, default=64, help="of each process")
    parser.add_argument("--rate", type=float, default=1e-3, help="the highest learning rate")
    parser.add_argument("--warmup", type=float, default=0.1, help="the part of the training in which it rises")
    parser.add_argument("--weight-decay", type=float, default=0.05)
    parser.add_argument("--ema", type=float, default=0.99, help="decay of the weights' moving average per step")
    parser.add_argument("--smoothing", type=float, default=0.1, help="of the labels")
    parser.add_argument("--clip", type=float, default=5.0, help="largest norm of the gradient")
    parser.add_argument("--parallel", choices=("ddp", "fsdp"), default="ddp", help="under torchrun")
    parser.add_argument("--amp", action="store_true", help="multiply in bfloat16")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--no-augment", dest="augment", action="store_false", help="see the images as in validation")
    parser.add_argument("--workers", type=int, default=0, help="processes that read images")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("runs/train"))
    parser.add_argument("--resume", action="store_true", help=f"go on from OUT/{LAST}")
    parser.add_argument("--stop-after", type=_positive, help="stop after so many epochs, to go on later")
    options = parser.parse_args(arguments)
    if not isinstance(options.config, dict):
        parser.error("--config must be a JSON object")
    return options


def make_run(options: argparse.Namespace, num_classes: int, device: torch.device) -> Run:
    """The model and its average, for one process or many, and the optimizer."""
    fields = options.config | {"num_classes": num_classes}
    model, ema = (create(options.model, **fields).to(device) for _ in ("model", "ema"))
    ema.load_state_dict(model.state_dict())
    ema.requires_grad_(False).eval()
    config = model.config
    if options.compile:
        for one in (model, ema):
            # In place, so that neither the names nor the wrappers around the model know of it.
            one.forward = torch.compile(one.forward, dynamic=False)
    model, ema = (parallelize(one, options.parallel, by_block=not options.compile) for one in (model, ema))
    decayed, others = [], []
    for name, parameter in model.named_parameters():
        (decayed if _is_decayed(name, parameter) else others).append(parameter)
    groups = [{"params": decayed}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=options.rate, weight_decay=options.weight_decay)
    return Run(model, ema, optimizer, config)


def train_epoch(run: Run, images: Images, epoch: int, options: argparse.Namespace, device: torch.device) -> float:
    """Trains for one epoch; returns the mean loss over all processes."""
    # What an epoch draws depends on its number alone, so a resumed run draws the same.
    _seed(options.seed + 1_000_003 * epoch + 1009 * rank())
    share = Share(len(images), shuffle=True)
    share.epoch = epoch
    loader = DataLoader(
        images,
        options.batch_size,
        sampler=share,
        num_workers=options.workers,
        drop_last=len(share) > options.batch_size,
    )
    run.model.train()
    total = 0.0
    with tqdm(loader, unit="step", desc=f"epoch {epoch + 1}/{options.epochs}", disable=not is_first()) as progress:
        for step, (inputs, labels) in enumerate(progress):
            done = (epoch + step / len(loader)) / options.epochs
            for group in run.optimizer.param_groups:
                group["lr"] = options.rate * _schedule(done, options.warmup)
            with _autocast(options, device):
                logits = run.model(inputs.to(device))
            loss = functional.cross_entropy(logits.float(), labels.to(device), label_smoothing=options.smoothing)
            run.optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(run.model.parameters(), options.clip)
            run.optimizer.step()
            _average(run.ema, run.model, options.ema, epoch * len(loader) + step)
            total += loss.item()
            progress.set_postfix(loss=f"{total / (step + 1):.3f}", refresh=False)
    return summed([total / len(loader)], device)[0] / world_size()


def validate(model: nn.Module, images: Images, options: argparse.Namespace, device: torch.device) -> float:
    """The part of the images that the model classifies right, over all processes."""
    share = Share(len(images), shuffle=False)
    right, seen = 0, 0
    for inputs, labels in DataLoader(images, options.batch_size, sampler=share, num_workers=options.workers):
        with torch.no_grad(), _autocast(options, device):
            predicted = model(inputs.to(device)).argmax(dim=-1).cpu()
        # The last ones may be repetitions of the first.
        own = min(len(labels), share.own - seen)
        right += int((predicted == labels)[:own].sum())
        seen += own
    right, total = summed([right, seen], device)
    return right / total


def save(run: Run, images: Images, options: argparse.Namespace) -> None:
    """Writes the last checkpoint, the best one if this is it, and the plot, from the first process."""
    content = {
        "model": model_state(run.model),
        "ema": model_state(run.ema),
        "optimizer": optimizer_state(run.model, run.optimizer),
        "config": asdict(run.config),
        "classes": list(images.classes),
        "image_size": images.size,
        "crop": images.crop,
        "history": run.history,
    }
    if not is_first():
        return
    options.out.mkdir(parents=True, exist_ok=True)
    _write(content, options.out / LAST)
    accuracy = run.history[-1]["accuracy"]
    if accuracy >= max(epoch["accuracy"] for epoch in run.history):
        del content["optimizer"]
        _write(content, options.out / BEST)
    draw(options.out / "training.png", run.history)
    tqdm.write(f"epoch {len(run.history)}: loss {run.history[-1]['loss']:.3f}, accuracy of the average {accuracy:.1%}")


def load(run: Run, path: Path) -> None:
    """Goes on where a checkpoint was written."""
    if not path.exists():
        raise SystemExit(f"error: there is no {path} to go on from")
    content = torch.load(path, map_location="cpu", weights_only=True)
    if NATConfig(**content["config"]) != run.config:
        raise SystemExit(f"error: {path} is of another model than the options say")
    restore(run.model, content["model"])
    restore(run.ema, content["ema"])
    restore_optimizer(run.model, run.optimizer, content["optimizer"])
    run.history = content["history"]


def _write(content: dict[str, object], path: Path) -> None:
    """An interruption leaves the file as it was."""
    unfinished = path.with_suffix(".unfinished")
    torch.save(content, unfinished)
    unfinished.replace(path)


@torch.no_grad()
def _average(ema: nn.Module, model: nn.Module, decay: float, step: int) -> None:
    """Moves the average towards the weights, faster in the beginning, when it is an average of few."""
    decay = min(decay, (1 + step) / (10 + step))
    for mean, parameter in zip(ema.parameters(), model.parameters(), strict=True):
        mean.mul_(decay).add_(parameter, alpha=1 - decay)


def _schedule(done: float, warmup: float) -> float:
    """The learning rate's part of the highest: a linear rise, then half a cosine down to zero."""
    if done < warmup:
        return done / warmup
    return 0.5 * (1 + math.cos(math.pi * (done - warmup) / (1 - warmup)))


def _is_decayed(name: str, parameter: nn.Parameter) -> bool:
    """Matrices and convolutions alone: not norms, biases, or the attention's tables of biases."""
    return parameter.dim() > 1 and not name.endswith("rpb")


def _autocast(options: argparse.Namespace, device: torch.device) -> torch.autocast:
    return torch.autocast(device.type, torch.bfloat16, enabled=options.amp)


def _seed(seed: int) -> None:
    random.seed(seed)
    torch.manual_seed(seed)


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {number}")
    return number


if __name__ == "__main__":
    main()
