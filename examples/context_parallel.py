"""Trains on an image whose rows are split over processes: `torchrun --nproc-per-node 4 -m examples.context_parallel`.

A small model learns to take noise out of an image. No process holds more of it than its rows; layers of neighborhood
attention fetch the rows that their windows reach from the neighbors. Afterwards the first process trains alone on the
whole image, and the losses must agree.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import natten2
from natten2.distributed import context_parallel

TOLERANCE = 1e-6
CHANNELS = 32


class Block(nn.Module):
    """Attention and an MLP on tokens `[B, H, W, C]`: but for the attention, each token by itself."""

    def __init__(self, dilation: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(CHANNELS)
        self.attn = natten2.NeighborhoodAttention2D(CHANNELS, 2, kernel_size=5, dilation=dilation, rel_pos_bias=True)
        self.norm2 = nn.LayerNorm(CHANNELS)
        self.mlp = nn.Sequential(nn.Linear(CHANNELS, 2 * CHANNELS), nn.GELU(), nn.Linear(2 * CHANNELS, CHANNELS))

    def forward(self, tokens: Tensor) -> Tensor:
        tokens = tokens + self.attn(self.norm1(tokens))
        return tokens + self.mlp(self.norm2(tokens))


def main(arguments: Sequence[str] | None = None) -> None:
    """Trains on all processes, then on one.

    Raises:
        SystemExit: Losses differ by more than `TOLERANCE`, or the program was not started by `torchrun`.
    """
    options = parse(arguments)
    if "RANK" not in os.environ:
        raise SystemExit("error: start it with torchrun --nproc-per-node 4 -m examples.context_parallel")
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    # A DDP model that outlives the group waits for its threads with Python's lock, which they may want.
    train_both(options)
    # Whoever leaves early may cut off others who still wait for it.
    dist.barrier()
    dist.destroy_process_group()


def train_both(options: argparse.Namespace) -> None:
    """Trains on all processes, then on one, and compares; the models end here, before their process group."""
    rank, lengths = dist.get_rank(), shard(options.height, dist.get_world_size())
    model = DistributedDataParallel(context_parallel(make_model(), lengths=lengths))
    losses = train(model, rows(sum(lengths[:rank]), lengths[rank], options), options)
    if rank == 0:
        compare(losses, train(make_model(), rows(0, options.height, options), options), lengths)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="context_parallel", description=__doc__.partition("\n")[0])
    parser.add_argument("--height", type=int, default=90)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--steps", type=int, default=20)
    return parser.parse_args(arguments)


def shard(height: int, ranks: int) -> tuple[int, ...]:
    """Rows of each rank, as even as can be."""
    return tuple(len(part) for part in torch.arange(height).tensor_split(ranks))


def make_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(1, CHANNELS), Block(dilation=1), Block(dilation=2), nn.Linear(CHANNELS, 1))


def rows(first: int, count: int, options: argparse.Namespace) -> tuple[Tensor, Tensor]:
    """Rows of the noisy and of the clean image, `[1, count, width, 1]`, made where they are needed."""
    row, column = torch.meshgrid(torch.arange(first, first + count), torch.arange(options.width), indexing="ij")
    clean = torch.sin((row**2 + column**2).double().sqrt() / 3)
    noise = (torch.sin(12.9898 * row.double() + 78.233 * column.double()) * 43758.5453).frac()
    return (clean + noise)[None, ..., None].float(), clean[None, ..., None].float()


def train(model: nn.Module, images: tuple[Tensor, Tensor], options: argparse.Namespace) -> list[float]:
    """Trains `model` in place; returns the loss of every step, the mean over the whole image."""
    noisy, clean = images
    pixels = options.height * options.width
    is_split = isinstance(model, DistributedDataParallel)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02)
    losses = []
    for _ in range(options.steps):
        loss = (model(noisy) - clean).double().square().sum() / pixels
        # DDP takes the mean of gradients, and the loss of the image is the sum of its parts.
        (loss * dist.get_world_size() if is_split else loss).backward()
        optimizer.step()
        optimizer.zero_grad()
        if is_split:
            dist.all_reduce(loss.detach_())
        losses.append(loss.item())
    return losses


def compare(split: Sequence[float], alone: Sequence[float], lengths: Sequence[int]) -> None:
    for step, (one, other) in enumerate(zip(split, alone, strict=True)):
        print(f"step {step:2}: loss {one:.7f} on {len(lengths)} processes, {other:.7f} on one")
    difference = max(abs(one - other) for one, other in zip(split, alone, strict=True))
    print(f"Rows of the processes: {', '.join(map(str, lengths))}. Largest difference of losses: {difference:.1e}")
    if not difference <= TOLERANCE:
        raise SystemExit(f"error: losses differ by {difference:.1e}, more than {TOLERANCE}")


if __name__ == "__main__":
    main()
