"""Layers as other libraries write them for natten: each gives the reference's numbers, forward and backward."""

import importlib
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

import natten2.compat
from natten2.compat.__main__ import main
from natten2.ops import reference


@pytest.fixture(params=["own", "union"])
def installed(request: pytest.FixtureRequest) -> Iterator[Callable[[str], ModuleType]]:
    """Installs the drop-in of a layer's own generation, or of all."""

    def install(version: str) -> ModuleType:
        natten2.compat.install(version if request.param == "own" else None)
        return importlib.import_module("natten")

    yield install
    natten2.compat.uninstall()


def attend(
    query: Tensor, key: Tensor, value: Tensor, rpb: Tensor | None, scale: float, *window: tuple, extra=(None, None)
):
    """The reference, heads last."""
    rank = len(window[0])
    kernel_size, dilation, causal = (*window, (False,) * rank)[:3]
    output, _ = reference.na_forward(query, key, value, rpb, *extra, kernel_size, (1,) * rank, dilation, causal, scale)
    return output


def check(layer: nn.Module, expected: Callable[[Tensor], Tensor], x: Tensor) -> None:
    """Compares outputs, and the gradients of the input and of every parameter."""
    x = x.requires_grad_()
    leaves = (x, *layer.parameters())
    results = [layer(x), expected(x)]
    upstream = torch.randn_like(results[0])
    torch.testing.assert_close(*results)
    ours, wanted = (torch.autograd.grad(result, leaves, upstream, allow_unused=True) for result in results)
    for grad, want in zip(ours, wanted, strict=True):
        assert grad is not None
        assert grad.abs().sum() > 0
        torch.testing.assert_close(grad, want)


class LegacyNAT(nn.Module):
    """0.14: pads by hand, heads first, a bias."""

    def __init__(self, natten: ModuleType, dim: int, heads: int, kernel_size: int, dilation: int | None = None) -> None:
        super().__init__()
        self.functional = natten.functional
        self.heads, self.kernel_size, self.dilation = heads, kernel_size, dilation or 1
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.rpb = nn.Parameter(torch.randn(heads, 2 * kernel_size - 1, 2 * kernel_size - 1))

    def forward(self, x: Tensor) -> Tensor:
        batch, rows, columns, dim = x.shape
        least = self.kernel_size * self.dilation
        x = F.pad(x, (0, 0, 0, max(0, least - columns), 0, max(0, least - rows)))
        height, width = x.shape[1:3]
        qkv = self.qkv(x).reshape(batch, height, width, 3, self.heads, dim // self.heads).permute(3, 0, 4, 1, 2, 5)
        query, key, value = qkv[0], qkv[1], qkv[2]
        query = query * (dim // self.heads) ** -0.5
        weights = self.functional.natten2dqkrpb(query, key, self.rpb, self.kernel_size, self.dilation).softmax(dim=-1)
        x = self.functional.natten2dav(weights, value, self.kernel_size, self.dilation)
        x = x.permute(0, 2, 3, 1, 4).reshape(batch, height, width, dim)
        return self.proj(x[:, :rows, :columns])


def test_a_legacy_layer(installed: Callable[[str], ModuleType]):
    layer = LegacyNAT(installed("0.14"), 6, 2, 3, 2).double()

    def expected(x: Tensor) -> Tensor:
        x = F.pad(x, (0, 0, 0, 0, 0, 2))
        query, key, value = layer.qkv(x).unflatten(-1, (3, 2, 3)).unbind(-3)
        output = attend(query, key, value, layer.rpb, 3**-0.5, (3, 3), (2, 2))
        return layer.proj(output.flatten(-2)[:, :4])

    check(layer, expected, torch.randn(2, 4, 7, 6, dtype=torch.float64))


class ThreeProjections(nn.Module):
    """As in Hugging Face's models: three projections, `view` and `permute`, weights handed out."""

    def __init__(self, natten: ModuleType, dim: int, heads: int, kernel_size: int) -> None:
        super().__init__()
        self.functional = natten.functional
        self.heads, self.kernel_size = heads, kernel_size
        self.query, self.key, self.value = (nn.Linear(dim, dim) for _ in range(3))
        self.rpb = nn.Parameter(torch.randn(heads, 2 * kernel_size - 1, 2 * kernel_size - 1))
        self.dropout = nn.Dropout(0.0)

    def split(self, x: Tensor) -> Tensor:
        return x.view(*x.shape[:-1], self.heads, -1).permute(0, 3, 1, 2, 4)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.split(self.query(x)), self.split(self.key(x)), self.split(self.value(x))
        query = query / query.shape[-1] ** 0.5
        scores = self.functional.natten2dqkrpb(query, key, self.rpb, self.kernel_size, 1)
        weights = self.dropout(F.softmax(scores, dim=-1))
        context = self.functional.natten2dav(weights, value, self.kernel_size, 1)
        context = context.permute(0, 2, 3, 1, 4).contiguous()
        return context.view(*context.shape[:-2], -1)


def test_three_projections(installed: Callable[[str], ModuleType]):
    layer = ThreeProjections(installed("0.15"), 8, 2, 5).double()

    def expected(x: Tensor) -> Tensor:
        query, key, value = (f(x).unflatten(-1, (2, 4)) for f in (layer.query, layer.key, layer.value))
        return attend(query, key, value, layer.rpb, 0.5, (5, 5), (1, 1)).flatten(-2)

    check(layer, expected, torch.randn(1, 6, 5, 8, dtype=torch.float64))


class Music(nn.Module):
    """A music model's: beats along time with growing dilation, one or two axes, the bias in a parameter of its own."""

    def __init__(self, natten: ModuleType, rank: int, dim: int, heads: int, kernel_size: int, dilation: int) -> None:
        super().__init__()
        functional = natten.functional
        self.qk = functional.natten1dqkrpb if rank == 1 else functional.natten2dqkrpb
        self.av = functional.natten1dav if rank == 1 else functional.natten2dav
        self.rank, self.heads, self.window = rank, heads, (kernel_size, dilation)
        self.query, self.key, self.value = (nn.Linear(dim, dim) for _ in range(3))
        self.rpb = nn.Parameter(torch.randn(heads, *(2 * kernel_size - 1,) * rank))

    def forward(self, x: Tensor) -> Tensor:
        axes = range(1, self.rank + 1)
        query, key, value = (
            f(x).unflatten(-1, (self.heads, -1)).permute(0, self.rank + 1, *axes, self.rank + 2)
            for f in (self.query, self.key, self.value)
        )
        weights = torch.softmax(self.qk(query / query.size(-1) ** 0.5, key, self.rpb, *self.window), dim=-1)
        output = self.av(weights, value, *self.window)
        return output.permute(0, *(axis + 1 for axis in axes), 1, self.rank + 2).contiguous().flatten(-2)


@pytest.mark.parametrize("rank", [1, 2])
def test_music(installed: Callable[[str], ModuleType], rank: int):
    layer = Music(installed("0.14"), rank, 6, 3, 3, 2).double()

    def expected(x: Tensor) -> Tensor:
        query, key, value = (f(x).unflatten(-1, (3, 2)) for f in (layer.query, layer.key, layer.value))
        return attend(query, key, value, layer.rpb, 2**-0.5, (3,) * rank, (2,) * rank).flatten(-2)

    check(layer, expected, torch.randn(2, *(9, 6)[:rank], 6, dtype=torch.float64))


class Diffusion(nn.Module):
    """A diffusion transformer's block: normalized queries and keys, rotary embedding, heads last, a scale of 1."""

    def __init__(self, natten: ModuleType, dim: int, heads: int, kernel_size: int) -> None:
        super().__init__()
        self.natten, self.heads, self.kernel_size = natten, heads, kernel_size
        self.qkv, self.out = nn.Linear(dim, 3 * dim, bias=False), nn.Linear(dim, dim, bias=False)
        self.scale = nn.Parameter(torch.full((heads, 1), 10.0))

    def prepare(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        query, key, value = self.qkv(x).unflatten(-1, (3, self.heads, -1)).movedim(-3, 0)
        query, key = (F.normalize(y, dim=-1) * self.scale.sqrt() for y in (query, key))
        return self.rotate(query), self.rotate(key), value

    def rotate(self, x: Tensor) -> Tensor:
        one, other = x.chunk(2, dim=-1)
        angle = torch.arange(x.shape[1], dtype=x.dtype)[:, None, None, None] * 0.3
        return torch.cat((one * angle.cos() - other * angle.sin(), other * angle.cos() + one * angle.sin()), -1)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.prepare(x)
        if self.natten.has_fused_na():
            output = self.natten.functional.na2d(query, key, value, self.kernel_size, scale=1.0)
        return x + self.out(output.flatten(-2))


def test_diffusion(installed: Callable[[str], ModuleType]):
    layer = Diffusion(installed("0.17"), 8, 2, 3).double()

    def expected(x: Tensor) -> Tensor:
        return x + layer.out(attend(*layer.prepare(x), None, 1.0, (3, 3), (1, 1)).flatten(-2))

    check(layer, expected, torch.randn(1, 5, 6, 8, dtype=torch.float64))


class Video(nn.Module):
    """A video's block: causal in time, with registers that every token sees."""

    def __init__(self, natten: ModuleType, dim: int, heads: int) -> None:
        super().__init__()
        self.attend, self.heads = natten.na3d, heads
        self.qkv, self.out = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.registers = nn.Parameter(torch.randn(2, 4, heads, dim // heads))

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.qkv(x).unflatten(-1, (3, self.heads, -1)).unbind(-3)
        keys, values = self.registers[:, None].expand(-1, x.shape[0], -1, -1, -1)
        output = self.attend(
            query,
            key,
            value,
            kernel_size=(2, 3, 3),
            dilation=(1, 1, 2),
            is_causal=(True, False, False),
            additional_keys=keys,
            additional_values=values,
            backend="cutlass-fna",
        )
        return self.out(output.flatten(-2))


def test_video(installed: Callable[[str], ModuleType]):
    layer = Video(installed("0.21"), 6, 2).double()

    def expected(x: Tensor) -> Tensor:
        query, key, value = layer.qkv(x).unflatten(-1, (3, 2, 3)).unbind(-3)
        extra = tuple(layer.registers[:, None].expand(-1, x.shape[0], -1, -1, -1))
        window = ((2, 3, 3), (1, 1, 2), (True, False, False))
        return layer.out(attend(query, key, value, None, 3**-0.5, *window, extra=extra).flatten(-2))

    check(layer, expected, torch.randn(2, 4, 3, 6, 6, dtype=torch.float64))


SCRIPTS = {
    "0.14": """
        from natten import NeighborhoodAttention2D as NeighborhoodAttention
        from natten.functional import natten1dav, natten1dqkrpb, natten2dav, natten2dqkrpb
        q = torch.randn(1, 2, 9, 4)
        print(natten1dav(natten1dqkrpb(q, q, None, 3, 1).softmax(-1), q, 3, 1).shape)
        layer = NeighborhoodAttention(8, num_heads=2, kernel_size=3, dilation=None, bias=True, qk_scale=None)
        print(layer(torch.randn(1, 2, 2, 8)).shape)
    """,
    "0.15": """
        import natten
        from natten.functional import na3d_av, na3d_qk_with_bias
        q = torch.randn(1, 2, 5, 6, 7, 4)
        a = na3d_qk_with_bias(q, q, torch.zeros(2, 5, 9, 9), 3, 5, 1, 1).softmax(-1)
        print(na3d_av(a, q, 3, 5, 1, 1).shape, natten.has_gemm())
        print(natten.NeighborhoodAttention1D(8, 2, 3, bias=False)(torch.randn(1, 5, 8)).shape)
    """,
    "0.17": """
        import natten
        from natten.context import is_fna_enabled
        from natten.functional import na1d_av, na1d_qk, na2d
        from natten.utils import check_all_args, log
        from natten.types import Dimension2DTypeOrDed
        natten.use_fused_na(True)
        assert is_fna_enabled() and hasattr(natten, "context")
        q = torch.randn(1, 2, 9, 4)
        print(na1d_av(na1d_qk(q, q, kernel_size=3, dilation=2).softmax(-1), q, kernel_size=3, dilation=2).shape)
        layer = natten.NeighborhoodAttention2D(dim=8, num_heads=2, kernel_size=3, rel_pos_bias=True)
        print(layer(torch.randn(1, 5, 5, 8)).shape)
    """,
    "0.21": """
        import natten
        from natten import NeighborhoodAttention3D, attention, merge_attentions, na2d
        q = torch.randn(1, 6, 6, 2, 4)
        output, lse = na2d(q, q, q, (3, 4), 2, is_causal=(True, False), return_lse=True)
        print(output.shape, lse.shape, natten.HAS_LIBNATTEN)
        print(NeighborhoodAttention3D(embed_dim=8, num_heads=2, kernel_size=2)(torch.randn(1, 2, 3, 4, 8)).shape)
    """,
}


def write(path: Path, *texts: str) -> Path:
    lines = ["import importlib.metadata, sys, torch", "print(importlib.metadata.version('natten'), sys.argv[1:])"]
    lines += [line.strip() for text in texts for line in text.strip().splitlines()]
    path.write_text("\n".join([*lines, "print('done')"]))
    return path


@pytest.mark.parametrize("version", natten2.compat.VERSIONS)
def test_scripts_of_a_generation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], version: str
):
    monkeypatch.setattr(sys, "argv", sys.argv)
    monkeypatch.setattr(sys, "path", [*sys.path])
    main(["--version", version, str(write(tmp_path / "script.py", SCRIPTS[version])), "--epochs", "3"])
    natten2.compat.uninstall()
    printed = capsys.readouterr().out
    assert printed.startswith(f"{version}.")
    assert "['--epochs', '3']" in printed
    assert printed.endswith("done\n")


def test_a_script_of_all_generations_runs_unchanged(tmp_path: Path):
    script = write(tmp_path / "script.py", *SCRIPTS.values())
    result = subprocess.run(
        [sys.executable, "-m", "natten2.compat", str(script), "--version", "7"],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parent.parent,
    )
    assert result.returncode == 0, result.stderr
    assert "['--version', '7']" in result.stdout
    assert result.stdout.endswith("done\n")


def test_the_command_line_says_what_is_missing(tmp_path: Path):
    with pytest.raises(SystemExit):
        main([str(tmp_path / "nothing.py")])
    natten2.compat.uninstall()
