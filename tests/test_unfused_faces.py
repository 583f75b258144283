"""The unfused functions: defaults, slot order, and the map of one query's weights."""

import pytest
import torch
from problems import random_problem

import natten2
from natten2.window import neighbors

QK = (natten2.na1d_qk, natten2.na2d_qk, natten2.na3d_qk)
AV = (natten2.na1d_av, natten2.na2d_av, natten2.na3d_av)
FUSED = (natten2.na1d, natten2.na2d, natten2.na3d)


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_the_two_halves_are_the_fused_function(rank: int):
    problem = random_problem((6, 5, 7)[:rank], (3, 2, 3)[:rank], heads=4, key_heads=2, bias=True, additional=2)
    query, key, value, rpb, keys, values = problem.tensors
    window = ((3, 2, 3)[:rank], (2, 1, 3)[:rank], (2, 2, 1)[:rank], (True, False, False)[:rank])
    scores = QK[rank - 1](query, key, *window, 0.3, rpb=rpb, additional_keys=keys)
    output = AV[rank - 1](scores.softmax(-1), value, *window, additional_values=values)
    expected = FUSED[rank - 1](query, key, value, *window, 0.3, rpb=rpb, additional_keys=keys, additional_values=values)
    torch.testing.assert_close(output, expected)


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_defaults(rank: int):
    query, key, value = random_problem((4, 5, 3)[:rank], (3,) * rank).tensors[:3]
    output = AV[rank - 1](QK[rank - 1](query, key, 3).softmax(-1), value, 3)
    torch.testing.assert_close(output, FUSED[rank - 1](query, key, value, 3))
    assert not QK[rank - 1](query, key, 3, scale=0.0).any()


def test_slots_are_row_major_from_the_start_of_the_window():
    key = torch.arange(35.0).reshape(1, 5, 7, 1, 1)
    window = ((2, 3), (1, 1), (2, 1), (False, True))
    scores = natten2.na2d_qk(torch.ones_like(key), key, *window, scale=1.0)
    for y in range(5):
        for x in range(7):
            rows, columns = neighbors(y, 5, 2, 1, 2), neighbors(x, 7, 3, is_causal=True)
            seen = scores[0, y, x, 0].unflatten(0, (2, 3))
            assert torch.equal(seen[:, : len(columns)], key[0, list(rows)][:, list(columns), 0, 0])
            assert (seen[:, len(columns) :] == -torch.inf).all()


def test_a_map_puts_weights_where_the_keys_are():
    problem = random_problem((5, 7), (2, 3), heads=2, additional=1)
    query, key, _, _, keys, _ = problem.tensors
    window = ((2, 3), (1, 2), (2, 1), (False, True))
    weights = natten2.na2d_qk(query, key, *window, additional_keys=keys).softmax(-1).requires_grad_()
    image = natten2.attention_map(weights, (3, 1), *window)
    assert image.shape == (2, 2, 5, 7)
    rows, columns = neighbors(3, 5, 2, 1, 2), neighbors(1, 7, 3, 2, is_causal=True)
    expected = torch.zeros_like(image)
    for i, row in enumerate(rows):
        for j, column in enumerate(columns):
            expected[:, :, row, column] = weights[:, 3, 1, :, 3 * i + j]
    assert torch.equal(image, expected)
    image.sum().backward()
    assert torch.equal(weights.grad.sum((0, 3, 4)).nonzero(), torch.tensor([[3, 1]]))
    filled = natten2.attention_map(weights, (3, 1), *window, fill=-1.0)
    assert (filled == -1).sum() == 4 * (35 - len(rows) * len(columns))


def test_a_map_of_a_value_is_the_output():
    problem = random_problem((6,), (3,), batch=1, heads=1)
    query, key, value = problem.tensors[:3]
    weights = natten2.na1d_qk(query, key, 3, dilation=2).softmax(-1)
    output = natten2.na1d_av(weights, value, 3, dilation=2)
    for index in range(6):
        image = natten2.attention_map(weights, index, 3, dilation=2)[0, 0]
        torch.testing.assert_close(image @ value[0, :, 0], output[0, index, 0])


def test_refusals():
    weights = torch.zeros(1, 5, 6, 2, 9)
    with pytest.raises(ValueError, match="query_index must lie in the grid"):
        natten2.attention_map(weights, (5, 0), 3)
    with pytest.raises(ValueError, match="weights must have at least the window's 12 slots, got 9"):
        natten2.attention_map(weights, (0, 0), (3, 4))
    with pytest.raises(ValueError, match=r"kernel_size \* dilation must not exceed the axis"):
        natten2.attention_map(weights, (0, 0), 3, dilation=2)
    with pytest.raises(ValueError, match="weights must have shape"):
        natten2.attention_map(weights[0, 0, 0], 0, 3)
    with pytest.raises(TypeError, match=r"key must be a torch\.Tensor"):
        natten2.na2d_qk(weights, None, 3)
    with pytest.raises(TypeError, match="scale must be a float or None"):
        natten2.na1d_qk(weights[0], weights[0], 3, scale="1")
    with pytest.raises(ValueError, match="kernel_size must be one integer or 2 of them"):
        natten2.na2d_av(weights, weights, (3, 3, 3))
