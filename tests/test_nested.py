"""Jagged nested tensors: images and sequences of different sizes in one batch, against each of them alone."""

from __future__ import annotations

from math import prod

import pytest
import torch
from torch import Tensor
from torch.nested import nested_tensor_from_jagged

import natten2
from natten2.ops.schemas import na_forward

LENGTHS = (5, 9, 3, 5)
OFFSETS = torch.tensor([0, 5, 14, 17, 22])
SIZES = ((5, 4), (3, 7), (6, 3))


def jagged(*shape: int, axis: int = 1, offsets: Tensor = OFFSETS) -> tuple[Tensor, Tensor]:
    """Packed values that want a gradient, and the nested tensor of them."""
    values = torch.randn(*shape, dtype=torch.float64, requires_grad=True)
    return values, nested_tensor_from_jagged(values, offsets, jagged_dim=axis)


def backward(outputs: list[Tensor], leaves: list[Tensor]) -> list[Tensor]:
    return list(torch.autograd.grad(sum((x * x).sum() for x in outputs), leaves))


@pytest.mark.parametrize("axis", [1, 2])
def test_one_ragged_axis(axis: int):
    shape = (22, 6) if axis == 1 else (6, 22)
    (query, nested_query), (key, nested_key) = jagged(*shape, 4, 3, axis=axis), jagged(*shape, 2, 3, axis=axis)
    value, nested_value = jagged(*shape, 2, 5, axis=axis)
    rpb = torch.randn(4, 5, 3, dtype=torch.float64, requires_grad=True)
    additional = [torch.randn(4, 2, 2, d, dtype=torch.float64, requires_grad=True) for d in (3, 5)]
    parameters = ((3, 2), (2, 1), (1, 2) if axis == 1 else (2, 1), (True, False), 0.7)
    output, lse = na_forward(nested_query, nested_key, nested_value, rpb, *additional, *parameters)
    assert output.shape == (*nested_query.shape[:-1], 5)
    assert lse.shape == nested_query.shape[:-1]
    split = [x.split(LENGTHS, dim=axis - 1) for x in (query, key, value)]
    expected = [
        na_forward(*(x[i][None] for x in split), rpb, *(x[i : i + 1] for x in additional), *parameters)
        for i in range(len(LENGTHS))
    ]
    whole = [torch.cat([x[0] for x in parts], dim=axis - 1) for parts in zip(*expected, strict=True)]
    assert torch.equal(output.values(), whole[0])
    assert torch.equal(lse.values(), whole[1])
    leaves = [query, key, value, rpb, *additional]
    torch.testing.assert_close(backward([output.values(), lse.values()], leaves), backward(whole, leaves))


@pytest.mark.parametrize("face", [natten2.na1d, torch.ops.natten2.na1d])
def test_sequences_through_every_face(face):
    (query, nested_query), (key, nested_key) = jagged(22, 2, 4), jagged(22, 2, 4)
    output = face(nested_query, nested_key, nested_key, 3)
    pairs = zip(query.split(LENGTHS), key.split(LENGTHS), strict=True)
    expected = [face(q[None], k[None], k[None], 3)[0] for q, k in pairs]
    torch.testing.assert_close(output.values(), torch.cat(expected), rtol=0, atol=0)
    torch.testing.assert_close(backward([output.values()], [query, key]), backward([torch.cat(expected)], [query, key]))
    with torch.no_grad():
        assert torch.equal(face(nested_query, nested_key, nested_key, 3).values(), output.values())
    with torch.inference_mode():
        assert torch.equal(face(nested_query, nested_key, nested_key, 3).values(), output.values())


def test_images_of_different_height_and_width():
    counts = [height * width for height, width in SIZES]
    offsets = torch.tensor([0, *counts]).cumsum(0)
    (query, nested_query), (key, nested_key) = (jagged(sum(counts), 2, 4, offsets=offsets) for _ in range(2))
    rpb = torch.randn(2, 5, 3, dtype=torch.float64, requires_grad=True)
    output = natten2.nested.na2d(nested_query, nested_key, nested_key, SIZES, (3, 2), rpb=rpb)
    images = [
        [x.unflatten(0, size)[None] for x, size in zip(tensor.split(counts), SIZES, strict=True)]
        for tensor in (query, key)
    ]
    expected = [natten2.na2d(q, k, k, (3, 2), rpb=rpb).flatten(0, 2) for q, k in zip(*images, strict=True)]
    assert output.shape == nested_query.shape
    assert torch.equal(output.values(), torch.cat(expected))
    leaves = [query, key, rpb]
    torch.testing.assert_close(backward([output.values()], leaves), backward([torch.cat(expected)], leaves))


def test_videos_of_different_sizes():
    sizes, counts = ((2, 3, 4), (3, 2, 5)), [24, 30]
    query, nested = jagged(54, 1, 2, offsets=torch.tensor([0, 24, 54]))
    output = natten2.nested.na3d(nested, nested, nested, sizes, 2, is_causal=(True, False, False))
    videos = [x.unflatten(0, size)[None] for x, size in zip(query.split(counts), sizes, strict=True)]
    expected = [natten2.na3d(x, x, x, 2, is_causal=(True, False, False)).flatten(0, 3) for x in videos]
    assert torch.equal(output.values(), torch.cat(expected))


MODULES = {
    "sequences": (natten2.NeighborhoodAttention1D, (22,), 1),
    "images of different heights": (natten2.NeighborhoodAttention2D, (22, 6), 1),
    "images of different widths": (natten2.NeighborhoodAttention2D, (6, 22), 2),
    "videos of different widths": (natten2.NeighborhoodAttention3D, (4, 3, 22), 3),
}


def check_module(module: torch.nn.Module, output: Tensor, expected: list[Tensor], values: Tensor, dim: int = 0) -> None:
    """Outputs and gradients of a batch are those of its entries."""
    whole = torch.cat(expected, dim=dim)
    torch.testing.assert_close(output.values(), whole)
    leaves = [values, *module.parameters()]
    torch.testing.assert_close(backward([output.values()], leaves), backward([whole], leaves))


@pytest.mark.parametrize(("kind", "shape", "axis"), MODULES.values(), ids=MODULES)
def test_modules(kind: type, shape: tuple[int, ...], axis: int):
    module = kind(8, 2, 3, is_causal=(True, *(False,) * (len(shape) - 1)), rel_pos_bias=True).double()
    values, nested = jagged(*shape, 8, axis=axis)
    output = module(nested)
    assert output.shape == nested.shape
    entries = values.split(LENGTHS, dim=axis - 1)
    check_module(module, output, [module(entry[None])[0] for entry in entries], values, axis - 1)


@pytest.mark.parametrize("rank", [2, 3])
def test_a_module_on_images_of_different_height_and_width(rank: int):
    sizes = SIZES if rank == 2 else tuple((2, *size) for size in SIZES)
    counts = [prod(size) for size in sizes]
    kind = natten2.NeighborhoodAttention2D if rank == 2 else natten2.NeighborhoodAttention3D
    module = kind(8, 2, (2, 3, 3)[-rank:], rel_pos_bias=True, proj_drop=0.5).double().eval()
    values, nested = jagged(sum(counts), 8, offsets=torch.tensor([0, *counts]).cumsum(0))
    output = natten2.nested.attend(module, nested, sizes)
    assert output.shape == nested.shape
    images = [x.unflatten(0, size)[None] for x, size in zip(values.split(counts), sizes, strict=True)]
    check_module(module, output, [module(image)[0].flatten(0, rank - 1) for image in images], values)


def test_modules_under_autocast():
    module, (values, nested) = natten2.NeighborhoodAttention1D(8, 2, 3).double(), jagged(22, 8)
    module, nested = module.float(), nested.float()
    with torch.autocast("cpu", torch.bfloat16):
        output = module(nested)
        expected = [module(entry[None])[0] for entry in values.float().split(LENGTHS)]
    assert output.dtype is torch.bfloat16
    assert torch.equal(output.values(), torch.cat(expected))


def test_what_modules_refuse():
    module = natten2.NeighborhoodAttention2D(8, 2, 3).double()
    _, nested = jagged(22, 8)
    with pytest.raises(ValueError, match=r"input must have shape \[batch, height, width, 8\], got \[4, j"):
        module(nested)
    with pytest.raises(NotImplementedError, match="input must be a dense, strided tensor, got a nested one"):
        module(torch.nested.nested_tensor([torch.randn(4, 4, 8), torch.randn(5, 3, 8)], layout=torch.strided))
    with pytest.raises(ValueError, match=r"kernel_size \* dilation must not exceed the axis, got 3 .* of length 2"):
        module(jagged(22, 2, 8)[1])
    holes = torch.nested.nested_tensor_from_jagged(torch.randn(22, 5, 8).double(), OFFSETS, torch.tensor([4, 9, 3, 5]))
    with pytest.raises(NotImplementedError, match="qkv must be a nested tensor without holes"):
        module(holes)
    with pytest.raises(TypeError, match=r"module must be a .*2D or .*3D, got NeighborhoodAttention1D"):
        natten2.nested.attend(natten2.NeighborhoodAttention1D(8, 2, 3), nested, SIZES)
    with pytest.raises(ValueError, match=r"input must have shape \[B, tokens, 8\]"):
        natten2.nested.attend(module, jagged(22, 6)[1], SIZES)
    with pytest.raises(TypeError, match="input must be a jagged nested tensor, got Tensor"):
        natten2.nested.attend(module, torch.randn(2, 5, 8), SIZES)
    with pytest.raises(NotImplementedError, match="input must be a nested tensor without holes"):
        natten2.nested.attend(module, holes, SIZES)
    with pytest.raises(ValueError, match=r"sizes must have as many tokens as the entries of input, \[5, 9, 3, 5\]"):
        natten2.nested.attend(module, nested, [(5, 1), (3, 3), (1, 3), (1, 4)])


@pytest.mark.parametrize("grad_mode", [torch.enable_grad, torch.no_grad])
def test_what_is_refused(grad_mode: type):
    with grad_mode():
        check_what_is_refused()


def check_what_is_refused() -> None:
    _, nested = jagged(22, 2, 4)
    _, other = jagged(22, 2, 4, offsets=torch.tensor([0, 4, 14, 17, 22]))
    dense = torch.randn(4, 9, 2, 4, dtype=torch.float64)
    with pytest.raises(TypeError, match="key must be a jagged nested tensor, as others are, got Tensor"):
        natten2.na1d(nested, dense, dense, 3)
    with pytest.raises(ValueError, match="key must share query's offsets"):
        natten2.na1d(nested, other, nested, 3)
    with pytest.raises(ValueError, match=r"kernel_size \* dilation must not exceed the axis, got 4 .* of length 3"):
        natten2.na1d(nested, nested, nested, 4)
    with pytest.raises(ValueError, match="one of its 2 spatial ones ragged"):
        natten2.na2d(nested, nested, nested, 3)
    holes = nested_tensor_from_jagged(nested.values(), OFFSETS, torch.tensor([4, 9, 3, 5]))
    with pytest.raises(NotImplementedError, match="query must be a nested tensor without holes"):
        natten2.na1d(holes, holes, holes, 3)
    with pytest.raises(NotImplementedError, match="query must be a nested tensor without holes"):
        natten2.nested.na2d(holes, holes, holes, [(5, 1), (3, 3), (1, 3), (1, 5)], 1)
    with pytest.raises(NotImplementedError, match="rpb must be a dense"):
        na_forward(nested, nested, nested, nested, None, None, (3,), (1,), (1,), (False,), 1.0)
    with pytest.raises(NotImplementedError, match="additional_keys must be a dense, strided tensor"):
        natten2.na1d(nested, nested, nested, 3, additional_keys=nested, additional_values=nested)
    with pytest.raises(ValueError, match=r"sizes must have as many tokens as the entries of query, \[5, 9, 3, 5\]"):
        natten2.nested.na2d(nested, nested, nested, [(5, 1), (3, 3), (1, 3), (1, 4)], 1)
    with pytest.raises(TypeError, match="query must be a jagged nested tensor, got Tensor"):
        natten2.nested.na2d(dense, dense, dense, [(3, 3)] * 4, 3)
