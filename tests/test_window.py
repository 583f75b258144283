"""The window's geometry: natten2/window.py."""

import pytest
import torch

from natten2.window import group_length, key_bounds, neighbors, query_bounds


def test_starts_of_an_even_window_shift_at_the_borders():
    assert [key_bounds(x, 8, 4)[0] for x in range(8)] == [0, 0, 0, 1, 2, 3, 4, 4]


def test_queries_of_a_stride_share_their_window():
    windows = [(0, 4), (0, 4), (1, 5), (1, 5), (3, 7), (3, 7), (5, 9), (5, 9), (6, 10), (6, 10)]
    assert [key_bounds(x, 10, 4, 2) for x in range(10)] == windows


def test_causal_windows_end_at_the_query():
    windows = [(0, 1), (0, 2), (0, 3), (0, 4), (2, 5), (2, 6), (4, 7), (4, 8), (6, 9), (6, 10)]
    assert [key_bounds(x, 10, 4, 2, is_causal=True) for x in range(10)] == windows


def test_stride_of_the_whole_window_gives_blocks():
    assert [key_bounds(x, 9, 3, 3)[0] for x in range(9)] == [0, 0, 0, 3, 3, 3, 6, 6, 6]


def test_dilation_keeps_to_its_group():
    assert list(neighbors(7, 20, 3, dilation=3)) == [4, 7, 10]
    assert list(neighbors(19, 20, 3, dilation=3)) == [13, 16, 19]
    assert [group_length(20, 3, group) for group in range(3)] == [7, 7, 6]


@pytest.mark.parametrize("is_causal", [False, True])
def test_queries_of_a_key_are_those_that_see_it(is_causal: bool):
    for length in range(1, 20):
        for kernel_size in range(1, length + 1):
            for stride in range(1, kernel_size + 1):
                windows = [key_bounds(x, length, kernel_size, stride, is_causal) for x in range(length)]
                for key in range(length):
                    seeing = [x for x, (start, end) in enumerate(windows) if start <= key < end]
                    found = query_bounds(key, length, kernel_size, stride, is_causal)
                    assert seeing == list(range(*found)), (length, kernel_size, stride, key)


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize(("kernel_size", "stride", "dilation"), [(7, 1, 1), (4, 3, 1), (3, 2, 4), (1, 1, 5)])
def test_tensors_give_what_integers_give(kernel_size: int, stride: int, dilation: int, is_causal: bool):
    index = torch.arange(23)
    group, position = index % dilation, index // dilation
    start, end = key_bounds(position, group_length(23, dilation, group), kernel_size, stride, is_causal)
    for x in range(23):
        keys = neighbors(x, 23, kernel_size, stride, dilation, is_causal)
        expected = range(int(start[x]) * dilation + x % dilation, int(end[x]) * dilation + x % dilation, dilation)
        assert keys == expected
