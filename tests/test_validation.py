"""Bad input: the error's type, the argument, what came, and what is allowed, however the operator is called."""

import warnings
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from torch import Tensor
from torch._C import DispatchKey, DispatchKeySet
from torch._subclasses.fake_tensor import FakeTensorMode

import natten2
from natten2.ops.schemas import na_backward, na_forward

NAMES = ("query", "key", "value", "rpb", "additional_keys", "additional_values")
PARAMETERS = ("kernel_size", "stride", "dilation", "is_causal", "scale")


def good() -> dict[str, object]:
    """A call of `na_forward` that is right, as arguments by name: [2, 6, 5] tokens, 4 heads over 2, 8 channels."""
    return {
        "query": torch.randn(2, 6, 5, 4, 8),
        "key": torch.randn(2, 6, 5, 2, 8),
        "value": torch.randn(2, 6, 5, 2, 3),
        "rpb": torch.randn(4, 5, 5),
        "additional_keys": torch.randn(2, 7, 2, 8),
        "additional_values": torch.randn(2, 7, 2, 3),
        "kernel_size": [3, 3],
        "stride": [1, 1],
        "dilation": [2, 1],
        "is_causal": [False, True],
        "scale": 0.5,
    }


@dataclass
class Bad:
    """What to change, and the error that it gives."""

    change: dict[str, object]
    error: type[Exception]
    message: str
    only_eager: bool = field(default=False)


BAD = {
    "query has too few axes": Bad(
        {"query": torch.randn(2, 6, 4, 8)},
        ValueError,
        r"query must have 5 axes \(batch, height, width, heads, head_dim\).*\(2, 6, 4, 8\)",
    ),
    "query is a number": Bad({"query": torch.tensor(1.0)}, ValueError, r"query must have 5 axes.*\(\)"),
    "key has other axes": Bad(
        {"key": torch.randn(2, 5, 6, 2, 8)},
        ValueError,
        r"key must have query's batch and axes \(2, 6, 5\), got shape \(2, 5, 6, 2, 8\)",
    ),
    "value has another batch": Bad(
        {"value": torch.randn(1, 6, 5, 2, 3)}, ValueError, r"value must have query's batch and axes \(2, 6, 5\)"
    ),
    "key has another head_dim": Bad(
        {"key": torch.randn(2, 6, 5, 2, 7)}, ValueError, "key must have query's head_dim 8, got 7"
    ),
    "value has other heads": Bad(
        {"value": torch.randn(2, 6, 5, 4, 3)}, ValueError, "value must have as many heads as key, 2, got 4"
    ),
    "heads that don't divide": Bad(
        {"query": torch.randn(2, 6, 5, 3, 8), "rpb": None},
        ValueError,
        "query's heads must be a multiple of key's 2 heads, got 3",
    ),
    "more key heads than query heads": Bad(
        {"query": torch.randn(2, 6, 5, 1, 8), "rpb": None},
        ValueError,
        "query's heads must be a multiple of key's 2 heads, got 1",
    ),
    "no heads": Bad(
        {"key": torch.randn(2, 6, 5, 0, 8), "value": torch.randn(2, 6, 5, 0, 3)},
        ValueError,
        "key must have at least one head",
    ),
    "no channels": Bad(
        {"query": torch.randn(2, 6, 5, 4, 0)}, ValueError, "query must have at least one head and one channel"
    ),
    "no value channels": Bad(
        {"value": torch.randn(2, 6, 5, 2, 0)}, ValueError, "value must have at least one head and one channel"
    ),
    "no tokens": Bad(
        {name: torch.randn(2, 0, 5, 2, 8) for name in ("query", "key", "value")} | {"rpb": None},
        ValueError,
        "kernel_size .* must not exceed the axis.* of length 0",
    ),
    "integers": Bad(
        {"query": torch.ones(2, 6, 5, 4, 8, dtype=torch.int64)}, TypeError, "query must have dtype .*, got torch.int64"
    ),
    "complex numbers": Bad(
        {"query": torch.ones(2, 6, 5, 4, 8, dtype=torch.complex64)},
        TypeError,
        "query must have dtype .*, got torch.complex64",
    ),
    "eight bits": Bad(
        {"query": torch.ones(2, 6, 5, 4, 8).to(torch.float8_e4m3fn)},
        TypeError,
        "query must have dtype .*, got torch.float8_e4m3fn",
    ),
    "dtypes that differ": Bad(
        {"key": torch.randn(2, 6, 5, 2, 8).half()}, TypeError, "key must have dtype torch.float32, got torch.float16"
    ),
    "value's dtype": Bad(
        {"value": torch.randn(2, 6, 5, 2, 3).double()},
        TypeError,
        "value must have dtype torch.float32, got torch.float64",
    ),
    "devices that differ": Bad(
        {"key": torch.randn(2, 6, 5, 2, 8, device="meta")},
        ValueError,
        "key must be on query's device cpu, got meta",
        only_eager=True,
    ),
    "sparse": Bad(
        {"query": torch.randn(2, 6, 5, 4, 8).to_sparse()},
        NotImplementedError,
        "query must be a dense, strided tensor, got a torch.sparse_coo one",
        only_eager=True,
    ),
    "sparse key": Bad(
        {"key": torch.randn(2, 6, 5, 2, 8).to_sparse()},
        NotImplementedError,
        "key must be a dense, strided tensor",
        only_eager=True,
    ),
    "mkldnn": Bad(
        {"query": torch.randn(2, 6, 5, 4, 8).to_mkldnn()},
        NotImplementedError,
        "query must be a dense, strided tensor",
        only_eager=True,
    ),
    "query's channels are strided": Bad(
        {"query": torch.randn(2, 6, 5, 8, 4).transpose(3, 4)},
        ValueError,
        r"query's last axis must be contiguous, got strides \(960, 160, 32, 1, 4\): call .contiguous\(\)",
    ),
    "value's channels are expanded": Bad(
        {"value": torch.randn(2, 6, 5, 2, 1).expand(2, 6, 5, 2, 3)}, ValueError, r"value's last axis must be contiguous"
    ),
    "additional keys' channels are strided": Bad(
        {"additional_keys": torch.randn(2, 7, 8, 2).transpose(2, 3)},
        ValueError,
        "additional_keys's last axis must be contiguous",
    ),
    "window too large": Bad(
        {"kernel_size": [3, 6], "rpb": None},
        ValueError,
        r"kernel_size \* dilation must not exceed the axis, got 6 \* 1 = 6 on axis 1 of length 5",
    ),
    "dilation too large": Bad(
        {"dilation": [3, 1]},
        ValueError,
        r"kernel_size \* dilation must not exceed the axis, got 3 \* 3 = 9 on axis 0 of length 6",
    ),
    "huge dilation": Bad({"dilation": [2**62, 1]}, ValueError, "kernel_size . dilation must not exceed the axis"),
    "kernel of zero": Bad(
        {"kernel_size": [0, 3], "rpb": None}, ValueError, "kernel_size must be at least 1, got 0 on axis 0"
    ),
    "negative kernel": Bad(
        {"kernel_size": [3, -3], "rpb": None}, ValueError, "kernel_size must be at least 1, got -3 on axis 1"
    ),
    "stride too large": Bad(
        {"stride": [1, 4]}, ValueError, "stride must be between 1 and kernel_size 3, got 4 on axis 1"
    ),
    "stride of zero": Bad(
        {"stride": [0, 1]}, ValueError, "stride must be between 1 and kernel_size 3, got 0 on axis 0"
    ),
    "dilation of zero": Bad({"dilation": [1, 0]}, ValueError, "dilation must be at least 1, got 0 on axis 1"),
    "negative dilation": Bad({"dilation": [-1, 1]}, ValueError, "dilation must be at least 1, got -1 on axis 0"),
    "bias of another kernel": Bad(
        {"rpb": torch.randn(4, 5, 7)}, ValueError, r"rpb must have shape .* \(4, 5, 5\), got \(4, 5, 7\)"
    ),
    "bias of key heads": Bad(
        {"rpb": torch.randn(2, 5, 5)}, ValueError, r"rpb must have shape .* \(4, 5, 5\), got \(2, 5, 5\)"
    ),
    "flat bias": Bad({"rpb": torch.randn(4, 25)}, ValueError, r"rpb must have shape .* got \(4, 25\)"),
    "bias of another dtype": Bad(
        {"rpb": torch.randn(4, 5, 5).double()}, TypeError, "rpb must have dtype torch.float32, got torch.float64"
    ),
    "additional keys alone": Bad(
        {"additional_values": None}, ValueError, "additional_values must be given with additional_keys, got None"
    ),
    "additional values alone": Bad(
        {"additional_keys": None}, ValueError, "additional_keys must be given with additional_values, got None"
    ),
    "additional keys of another batch": Bad(
        {"additional_keys": torch.randn(1, 7, 2, 8)},
        ValueError,
        r"additional_keys must have shape \(2, N, 2, 8\), got \(1, 7, 2, 8\)",
    ),
    "additional keys of query heads": Bad(
        {"additional_keys": torch.randn(2, 7, 4, 8)}, ValueError, r"additional_keys must have shape \(2, N, 2, 8\)"
    ),
    "additional values of another head_dim": Bad(
        {"additional_values": torch.randn(2, 7, 2, 8)}, ValueError, r"additional_values must have shape \(2, N, 2, 3\)"
    ),
    "more additional values than keys": Bad(
        {"additional_values": torch.randn(2, 6, 2, 3)},
        ValueError,
        "additional_values must have as many tokens as additional_keys, 7, got 6",
    ),
    "additional keys without a token axis": Bad(
        {"additional_keys": torch.randn(2, 2, 8)}, ValueError, r"additional_keys must have shape"
    ),
    "more additional keys than there is memory": Bad(
        {
            "additional_keys": torch.randn(2, 1, 2, 8).expand(2, 2**50, 2, 8),
            "additional_values": torch.randn(2, 1, 2, 3).expand(2, 2**50, 2, 3),
        },
        ValueError,
        "additional_keys must have at most 4294967296 tokens, got 1125899906842624",
    ),
    "scale beyond float32": Bad({"scale": 1e39}, ValueError, "scale must be finite in torch.float32, got 1e\\+39"),
    "NaN scale": Bad({"scale": float("nan")}, ValueError, "scale must be finite in torch.float32, got nan"),
    "infinite scale": Bad({"scale": float("inf")}, ValueError, "scale must be finite in torch.float32, got inf"),
}

BAD_LENGTHS = {
    "no kernel_size": Bad(
        {"kernel_size": []}, ValueError, r"kernel_size must have 1 to 3 entries, one per axis, got \[\]"
    ),
    "four axes": Bad(
        {name: [1] * 4 for name in ("kernel_size", "stride", "dilation")} | {"is_causal": [False] * 4},
        ValueError,
        r"kernel_size must have 1 to 3 entries",
    ),
    "short stride": Bad({"stride": [1]}, ValueError, r"stride must have 2 entries, as kernel_size has, got \[1\]"),
    "long dilation": Bad({"dilation": [1, 1, 1]}, ValueError, r"dilation must have 2 entries"),
    "short is_causal": Bad({"is_causal": []}, ValueError, r"is_causal must have 2 entries"),
}


def arguments(change: dict[str, object]) -> list[object]:
    return list((good() | change).values())


def call_face(args: list[object]) -> object:
    query, key, value, rpb, additional_keys, additional_values, *parameters = args
    return natten2.na2d(
        query, key, value, *parameters, rpb=rpb, additional_keys=additional_keys, additional_values=additional_values
    )


def call_composite(args: list[object]) -> object:
    query, key, value, rpb, additional_keys, additional_values, *parameters = args
    return torch.ops.natten2.na2d(query, key, value, *parameters, rpb, additional_keys, additional_values)


def call_operator(args: list[object]) -> object:
    return na_forward(*args)


def call_with_gradients(args: list[object]) -> object:
    wanting = [
        arg.requires_grad_() if isinstance(arg, Tensor) and arg.is_floating_point() and not arg.is_mkldnn else arg
        for arg in args
    ]
    try:
        return na_forward(*wanting)
    finally:
        for arg in args:
            if isinstance(arg, Tensor):
                arg.requires_grad_(False)


def call_in_inference_mode(args: list[object]) -> object:
    with torch.inference_mode():
        return na_forward(*args)


def call_backward(args: list[object]) -> object:
    query, value = args[0], args[2]
    shape = (*query.shape[:-1], value.shape[-1]) if query.dim() else (1,)
    output = torch.randn(shape)
    tensors = args[:6]
    return na_backward(output, None, *tensors, output, torch.randn(shape[:-1]), *args[6:])


def call_fake(args: list[object]) -> object:
    with FakeTensorMode() as mode:
        return na_forward(*(mode.from_tensor(arg) if isinstance(arg, Tensor) else arg for arg in args))


CALLS = (
    call_face,
    call_composite,
    call_operator,
    call_with_gradients,
    call_in_inference_mode,
    call_backward,
    call_fake,
)


@pytest.mark.parametrize("call", CALLS)
def test_good_input_is_accepted(call: Callable):
    call(arguments({}))


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("name", BAD)
def test_bad_input_raises(name: str, call: Callable):
    bad = BAD[name]
    if call is call_fake and bad.only_eager:
        call = call_operator
    with pytest.raises(bad.error, match=bad.message):
        call(arguments(bad.change))


@pytest.mark.parametrize("call", [call_operator, call_with_gradients, call_in_inference_mode, call_backward, call_fake])
@pytest.mark.parametrize("name", BAD_LENGTHS)
def test_bad_lengths_raise(name: str, call: Callable):
    bad = BAD_LENGTHS[name]
    with pytest.raises(bad.error, match=bad.message):
        call(arguments(bad.change))


NOT_FOR_THE_KERNEL = {"sparse", "sparse key", "mkldnn", "NaN scale", "infinite scale", "scale beyond float32"}


@pytest.mark.parametrize("name", [name for name in {**BAD, **BAD_LENGTHS} if name not in NOT_FOR_THE_KERNEL])
def test_the_kernel_alone_survives_bad_input(name: str):
    # As in a program without Python, where the checks of natten2.ops.validation don't run.
    with pytest.raises((ValueError, RuntimeError)):
        na_forward.redispatch(DispatchKeySet(DispatchKey.CPU), *arguments({**BAD, **BAD_LENGTHS}[name].change))


def backward_arguments(**change: object) -> list[object]:
    args = arguments({})
    output, logsumexp = na_forward(*args)
    tensors = {
        "grad_output": torch.randn_like(output),
        "grad_logsumexp": torch.randn_like(logsumexp),
        **dict(zip(NAMES, args[:6], strict=True)),
        "output": output,
        "logsumexp": logsumexp,
    }
    return [*(tensors | change).values(), *args[6:]]


BAD_BACKWARD = {
    "grad_output": (
        torch.randn(2, 6, 5, 4, 8),
        ValueError,
        r"grad_output must have shape \(2, 6, 5, 4, 3\), got \(2, 6, 5, 4, 8\)",
    ),
    "output": (torch.randn(2, 6, 5, 4), ValueError, r"output must have shape \(2, 6, 5, 4, 3\)"),
    "logsumexp": (torch.randn(2, 6, 5, 2), ValueError, r"logsumexp must have shape \(2, 6, 5, 4\)"),
    "grad_logsumexp": (
        torch.randn(2, 6, 5, 4).double(),
        TypeError,
        "grad_logsumexp must have dtype torch.float32, got torch.float64",
    ),
}


@pytest.mark.parametrize("name", BAD_BACKWARD)
def test_bad_gradients_raise(name: str):
    tensor, error, message = BAD_BACKWARD[name]
    with pytest.raises(error, match=message):
        na_backward(*backward_arguments(**{name: tensor}))
    with pytest.raises(ValueError, match="natten2: "):
        na_backward.redispatch(DispatchKeySet(DispatchKey.CPU), *backward_arguments(**{name: tensor}))


BAD_CALLS = {
    "query is a list": ({"query": [1.0]}, TypeError, "query must be a torch.Tensor, got list"),
    "query is None": ({"query": None}, TypeError, "query must be a torch.Tensor, got NoneType"),
    "bias is an array": ({"rpb": 1.0}, TypeError, "rpb must be a torch.Tensor or None, got float"),
    "additional keys are True": (
        {"additional_keys": True},
        TypeError,
        "additional_keys must be a torch.Tensor or None",
    ),
    "kernel_size is missing an axis": (
        {"kernel_size": [3]},
        ValueError,
        r"kernel_size must be one integer or 2 of them, got \[3\]",
    ),
    "kernel_size is a float": (
        {"kernel_size": 3.0},
        TypeError,
        "kernel_size must be an integer or a sequence of integers, got 3.0",
    ),
    "kernel_size is a bool": ({"kernel_size": True}, TypeError, "kernel_size must be an integer"),
    "kernel_size is text": ({"kernel_size": "77"}, TypeError, "kernel_size must be an integer"),
    "kernel_size is None": ({"kernel_size": None}, TypeError, "kernel_size must be an integer"),
    "kernel_size is astronomical": ({"kernel_size": 10**30}, ValueError, "kernel_size must fit in 64 bits"),
    "kernel_size is a tensor": ({"kernel_size": torch.tensor([3, 3])}, TypeError, "kernel_size must be an integer"),
    "kernel_size is an array": ({"kernel_size": np.array([3, 3])}, TypeError, "kernel_size must be an integer"),
    "kernel_size is bytes": ({"kernel_size": b"\x03\x03"}, TypeError, "kernel_size must be an integer"),
    "stride has a float": ({"stride": [1, 1.5]}, TypeError, "stride must be an integer"),
    "dilation is missing an axis": ({"dilation": (1, 1, 1)}, ValueError, "dilation must be one integer or 2 of them"),
    "is_causal is an integer": ({"is_causal": 1}, TypeError, "is_causal must be a bool or a sequence of bools, got 1"),
    "is_causal is missing an axis": ({"is_causal": [True]}, ValueError, "is_causal must be one bool or 2 of them"),
    "scale is a tensor": ({"scale": torch.tensor(1.0)}, TypeError, "scale must be a float or None, got Tensor"),
    "scale is astronomical": ({"scale": 10**400}, ValueError, "scale must be finite, got 1000"),
    "scale is complex": ({"scale": np.complex64(1)}, TypeError, "scale must be a float or None, got complex64"),
    "scale is text": ({"scale": "1"}, TypeError, "scale must be a float or None, got str"),
    "scale is a bool": ({"scale": True}, TypeError, "scale must be a float or None, got bool"),
}


@pytest.mark.parametrize("name", BAD_CALLS)
def test_bad_arguments_of_the_functions_raise(name: str):
    change, error, message = BAD_CALLS[name]
    with pytest.raises(error, match=message):
        call_face(arguments(change))


def test_nested_tensors_that_are_not_jagged_are_refused():
    nested = torch.nested.nested_tensor([torch.randn(3, 1, 2), torch.randn(4, 1, 2)], layout=torch.strided)
    with pytest.raises(NotImplementedError, match="query must be a dense, strided tensor, got a nested one"):
        natten2.na1d(nested, nested, nested, 3)


@pytest.mark.parametrize("name", NAMES[:3])
def test_none_is_no_tensor(name: str):
    for call in (call_composite, call_operator, call_in_inference_mode):
        with pytest.raises(TypeError, match=f"{name} must be a torch.Tensor, got NoneType"):
            call(arguments({name: None}))


def test_memory_that_was_freed_is_not_read():
    query, key = torch.randn(1, 4, 1, 2), torch.randn(1, 4, 1, 2)
    key.untyped_storage().resize_(0)
    with pytest.raises(ValueError, match="key has no memory"):
        natten2.na1d(query, key, query, 3)


def test_running_out_of_memory_says_so_and_leaves_the_process_usable():
    query = torch.randn(1, 1, 1, 1, 64)
    with pytest.raises(
        RuntimeError, match=r"can't allocate memory for a tensor of shape \[1, 16777216, 16384, 1, 64\]"
    ):
        natten2.na2d(*(query.expand(1, 2**24, 2**14, 1, 64),) * 3, 3)
    extra = query[0].expand(1, 2**32, 1, 64)
    with pytest.raises(RuntimeError, match=r"can.t allocate \d+ bytes of memory"):
        natten2.na1d(query[0], query[0], query[0], 1, additional_keys=extra, additional_values=extra)
    assert natten2.na1d(query[0], query[0], query[0], 1).shape == (1, 1, 1, 64)


def test_quantized_tensors_are_not_supported():
    args = arguments({})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        args[0] = torch.quantize_per_tensor(args[0], 0.1, 0, torch.quint8)
    with pytest.raises(NotImplementedError, match="query must be a dense, strided tensor, got a quantized one"):
        na_forward(*args)


def test_the_face_of_another_rank_says_so():
    query = torch.randn(1, 4, 4, 1, 2)
    with pytest.raises(ValueError, match=r"kernel_size must have 2 entries for na2d, got \[3, 3, 3\]"):
        torch.ops.natten2.na2d(query, query, query, [3, 3, 3])


def test_errors_while_tracing_are_the_eager_ones():
    query = torch.randn(1, 4, 1, 2)
    compiled = torch.compile(lambda x: natten2.na1d(x, x, x, 5), backend="eager", fullgraph=True)
    with pytest.raises(Exception, match=r"kernel_size \* dilation must not exceed the axis, got 5 \* 1 = 5"):
        compiled(query)
