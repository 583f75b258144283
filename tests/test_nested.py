"""Jagged nested tensors: images and sequences of different sizes in one batch, against each of them alone."""

from __future__ import annotations

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


def test_what_is_refused():
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
    with pytest.raises(NotImplementedError, match="additional_keys must be a dense, strided tensor"):
        natten2.na1d(nested, nested, nested, 3, additional_keys=nested, additional_values=nested)
    with pytest.raises(ValueError, match=r"sizes must have as many tokens as the entries of query, \[5, 9, 3, 5\]"):
        natten2.nested.na2d(nested, nested, nested, [(5, 1), (3, 3), (1, 3), (1, 4)], 1)
    with pytest.raises(TypeError, match="query must be a jagged nested tensor, got Tensor"):
        natten2.nested.na2d(dense, dense, dense, [(3, 3)] * 4, 3)
