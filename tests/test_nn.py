"""The modules against the specification, `natten2.ops.reference`."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from natten2 import NeighborhoodAttention1D, NeighborhoodAttention2D, NeighborhoodAttention3D
from natten2.ops import reference

MODULES = {1: NeighborhoodAttention1D, 2: NeighborhoodAttention2D, 3: NeighborhoodAttention3D}
SIZES = {1: (9,), 2: (8, 7), 3: (4, 6, 5)}
EMBED_DIM, NUM_HEADS = 12, 3

CASES = [
    pytest.param(1, {"kernel_size": 4, "stride": 2, "is_causal": True}, id="1d-causal-strided"),
    pytest.param(1, {"kernel_size": 3, "dilation": 3, "rel_pos_bias": True, "qk_scale": 0.3}, id="1d-dilated-bias"),
    pytest.param(2, {"kernel_size": 3, "rel_pos_bias": True}, id="2d-bias"),
    pytest.param(2, {"kernel_size": (4, 3), "stride": (3, 1), "dilation": (1, 2)}, id="2d-per-axis"),
    pytest.param(2, {"kernel_size": 3, "qk_scale": 0.0, "qkv_bias": False}, id="2d-zero-scale"),
    pytest.param(2, {"kernel_size": 3, "is_causal": (False, True), "rel_pos_bias": True}, id="2d-half-causal"),
    pytest.param(3, {"kernel_size": (2, 3, 3), "is_causal": (True, False, False), "rel_pos_bias": True}, id="3d-video"),
]


def make(rank: int, **arguments: object) -> torch.nn.Module:
    torch.manual_seed(0)
    module = MODULES[rank](EMBED_DIM, NUM_HEADS, **arguments).double()
    if module.rpb is not None:
        torch.nn.init.normal_(module.rpb)
    return module


def make_input(rank: int) -> Tensor:
    return torch.randn(2, *SIZES[rank], EMBED_DIM, dtype=torch.float64)


def per_axis(value: object, rank: int) -> tuple:
    return value if isinstance(value, tuple) else (value,) * rank


def expected_output(module: torch.nn.Module, x: Tensor, rank: int, arguments: dict[str, object]) -> Tensor:
    """The same module written out with explicit slices of its weights and the reference kernel."""
    weights = module.qkv.weight.split(EMBED_DIM)
    biases = (None,) * 3 if module.qkv.bias is None else module.qkv.bias.split(EMBED_DIM)
    head_dim = EMBED_DIM // NUM_HEADS
    query, key, value = (
        torch.nn.functional.linear(x, weight, bias).reshape(*x.shape[:-1], NUM_HEADS, head_dim)
        for weight, bias in zip(weights, biases, strict=True)
    )
    output, _ = reference.na_forward(
        query,
        key,
        value,
        module.rpb,
        None,
        None,
        per_axis(arguments["kernel_size"], rank),
        per_axis(arguments.get("stride", 1), rank),
        per_axis(arguments.get("dilation", 1), rank),
        per_axis(arguments.get("is_causal", False), rank),
        arguments.get("qk_scale", head_dim**-0.5),
    )
    return output.reshape(x.shape) @ module.proj.weight.T + module.proj.bias


@pytest.mark.parametrize(("rank", "arguments"), CASES)
def test_output_and_gradients_equal_the_reference(rank: int, arguments: dict[str, object]) -> None:
    module, x = make(rank, **arguments), make_input(rank).requires_grad_()
    inputs = {"input": x, **dict(module.named_parameters())}
    output, expected = module(x), expected_output(module, x, rank, arguments)
    torch.testing.assert_close(output, expected, rtol=1e-12, atol=1e-12)

    upstream = torch.randn_like(output)
    grads = torch.autograd.grad(output, list(inputs.values()), upstream)
    expected_grads = torch.autograd.grad(expected, list(inputs.values()), upstream)
    for name, grad, expected_grad in zip(inputs, grads, expected_grads, strict=True):
        assert grad.abs().max() > 0, name
        torch.testing.assert_close(grad, expected_grad, rtol=1e-11, atol=1e-11)
    assert ("rpb" in inputs) == arguments.get("rel_pos_bias", False)


class Recorder(TorchDispatchMode):
    """Keeps the operators that run, and the packed tensors that natten2's get and give."""

    def __init__(self) -> None:
        super().__init__()
        self.operators: list[str] = []
        self.packed: list[Tensor] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.operators.append(func._schema.name)
        results = func(*args, **(kwargs or {}))
        if func is torch.ops.natten2.na_qkv_forward.default:
            self.packed.append(args[0])
        if func is torch.ops.natten2.na_qkv_backward.default:
            self.packed += [args[2], results[0]]
        return results


COPIES = {"aten::clone", "aten::copy_", "aten::_to_copy", "aten::cat", "aten::stack", "aten::add"}


@pytest.mark.parametrize("rank", MODULES)
def test_the_operator_reads_one_product_and_writes_one_gradient(rank: int) -> None:
    module, x = make(rank, kernel_size=3), make_input(rank)
    with Recorder() as recorder:
        module(x).sum().backward()
    read, read_again, written = recorder.packed
    head_dim = EMBED_DIM // NUM_HEADS
    for tensor in (read, written):
        assert tensor.shape == (2, *SIZES[rank], 3, NUM_HEADS, head_dim)
        assert tensor.is_contiguous()
    assert read.untyped_storage().data_ptr() == read_again.untyped_storage().data_ptr()
    assert not COPIES & set(recorder.operators)


def test_parameters_have_the_names_and_shapes_of_the_checkpoints() -> None:
    module = NeighborhoodAttention3D(8, 2, (2, 3, 4), rel_pos_bias=True, qkv_bias=False)
    assert [(name, tuple(parameter.shape)) for name, parameter in module.named_parameters()] == [
        ("rpb", (2, 3, 5, 7)),
        ("qkv.weight", (24, 8)),
        ("proj.weight", (8, 8)),
        ("proj.bias", (8,)),
    ]
    assert "rpb" not in NeighborhoodAttention1D(8, 2, 3).state_dict()


def test_bias_starts_from_a_normal_distribution_of_deviation_002() -> None:
    torch.manual_seed(0)
    rpb = NeighborhoodAttention2D(64, 64, 13, rel_pos_bias=True).rpb
    assert rpb.std().item() == pytest.approx(0.02, rel=0.05)
    assert abs(rpb.mean().item()) < 1e-3


def test_projection_dropout_acts_in_training_alone() -> None:
    module, x = make(2, kernel_size=3, proj_drop=1.0), make_input(2)
    assert module.train()(x).abs().max() == 0
    torch.testing.assert_close(module.eval()(x), make(2, kernel_size=3)(x))


def test_autocast_runs_in_its_dtype() -> None:
    module, x = make(2, kernel_size=3, rel_pos_bias=True).float(), make_input(2).float()
    with torch.autocast("cpu", torch.bfloat16):
        output = module(x)
    assert output.dtype is torch.bfloat16
    assert (output.float() - module(x)).norm() < 0.02 * module(x).norm()
    output.float().sum().backward()
    assert module.rpb.grad.dtype is torch.float32


@pytest.mark.parametrize("rank", MODULES)
def test_compiles_to_one_graph(rank: int) -> None:
    module, x = make(rank, kernel_size=3, rel_pos_bias=True), make_input(rank)
    output = torch.compile(module, fullgraph=True, backend="aot_eager")(x)
    torch.testing.assert_close(output, module(x), rtol=0, atol=0)


def test_repr_tells_the_arguments() -> None:
    module = NeighborhoodAttention2D(12, 3, (3, 5), stride=2, dilation=(1, 2), is_causal=True, qk_scale=0.5)
    assert module.extra_repr() == (
        "embed_dim=12, num_heads=3, kernel_size=(3, 5), stride=(2, 2), dilation=(1, 2), is_causal=(True, True), "
        "qk_scale=0.5, rel_pos_bias=False"
    )


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"embed_dim": 10}, ValueError, "embed_dim must be a multiple of num_heads 3, got 10"),
        ({"embed_dim": 0}, ValueError, "embed_dim must be at least 1, got 0"),
        ({"embed_dim": 12.0}, TypeError, "embed_dim must be an integer, got 12.0"),
        ({"num_heads": 0}, ValueError, "num_heads must be at least 1, got 0"),
        ({"num_heads": True}, TypeError, "num_heads must be an integer, got True"),
        ({"kernel_size": 0}, ValueError, "kernel_size must be at least 1, got 0 on axis 0"),
        ({"kernel_size": (3, 3, 3)}, ValueError, "kernel_size must be one integer or 2 of them"),
        ({"kernel_size": 3.0}, TypeError, "kernel_size must be an integer"),
        ({"stride": (3, 4)}, ValueError, "stride must be between 1 and kernel_size 3, got 4 on axis 1"),
        ({"stride": 0}, ValueError, "stride must be between 1 and kernel_size 3, got 0 on axis 0"),
        ({"dilation": (1, 0)}, ValueError, "dilation must be at least 1, got 0 on axis 1"),
        ({"dilation": [1]}, ValueError, "dilation must be one integer or 2 of them"),
        ({"is_causal": (True,)}, ValueError, "is_causal must be one bool or 2 of them"),
        ({"is_causal": 1}, TypeError, "is_causal must be a bool"),
        ({"qk_scale": "0.5"}, TypeError, "qk_scale must be a number, got '0.5'"),
        ({"proj_drop": 1.5}, ValueError, "proj_drop must be between 0 and 1, got 1.5"),
        ({"proj_drop": None}, TypeError, "proj_drop must be a number, got None"),
    ],
)
def test_constructor_refuses(arguments: dict[str, object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        NeighborhoodAttention2D(**{"embed_dim": 12, "num_heads": 3, "kernel_size": 3, **arguments})


@pytest.mark.parametrize("shape", [(8, 8, 12), (1, 8, 8, 8, 12), (1, 8, 8, 11)])
def test_forward_refuses_shapes(shape: tuple[int, ...]) -> None:
    module = NeighborhoodAttention2D(12, 3, 3)
    with pytest.raises(ValueError, match=r"input must have shape \[batch, height, width, 12\], got \["):
        module(torch.zeros(shape))


def test_forward_refuses_inputs_smaller_than_the_window() -> None:
    module = NeighborhoodAttention2D(12, 3, 3, dilation=2)
    with pytest.raises(ValueError, match=r"kernel_size \* dilation must not exceed the axis.* axis 1 of length 5"):
        module(torch.zeros(1, 6, 5, 12))
