"""The drop-in for natten: which names it serves, and what they compute."""

import importlib
import importlib.metadata
import importlib.util
import pickle
import sys
from collections.abc import Iterator
from types import ModuleType

import pytest
import torch
from torch import Tensor

import natten2
import natten2.compat
from natten2.ops import reference, unfused_reference

VERSIONS = natten2.compat.VERSIONS


@pytest.fixture
def natten(request: pytest.FixtureRequest) -> Iterator[ModuleType]:
    """The drop-in, of the version that the test names."""
    natten2.compat.install(getattr(request, "param", None))
    yield importlib.import_module("natten")
    natten2.compat.uninstall()


def serves(version: str | None) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("natten", [version], indirect=True, ids=[str(version)])


def heads_first(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


def reference_scores(query: Tensor, key: Tensor, rpb: Tensor | None, *window: tuple, extra: Tensor | None = None):
    tensors = (query.movedim(1, -2), key.movedim(1, -2), rpb, None if extra is None else extra.movedim(1, -2))
    return unfused_reference.na_qk(*tensors, *window, 1.0, -torch.inf).movedim(-2, 1)


def window(kernel_size: tuple, dilation: tuple, *, causal: tuple | None = None, stride: tuple | None = None) -> tuple:
    rank = len(kernel_size)
    return kernel_size, stride or (1,) * rank, dilation, causal or (False,) * rank


def test_what_is_there_before_is_there_again():
    assert importlib.util.find_spec("natten") is None
    natten2.compat.install("0.14")
    natten2.compat.install("0.21")
    assert importlib.import_module("natten").__version__ == "0.21.6"
    natten2.compat.uninstall()
    natten2.compat.uninstall()
    assert not [name for name in sys.modules if name.split(".")[0] == "natten"]
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("natten.functional")
    with pytest.raises(importlib.metadata.PackageNotFoundError):
        importlib.metadata.version("natten")


def test_an_installed_natten_is_hidden_and_comes_back(monkeypatch: pytest.MonkeyPatch):
    real = ModuleType("natten")
    monkeypatch.setitem(sys.modules, "natten", real)
    natten2.compat.install()
    assert importlib.import_module("natten") is not real
    natten2.compat.uninstall()
    assert sys.modules["natten"] is real


def test_a_version_that_never_was():
    with pytest.raises(ValueError, match=r"version must be None or one of 0\.14, 0\.15, 0\.17, 0\.21, got '0\.16'"):
        natten2.compat.install("0.16")


@pytest.mark.parametrize("version", [None, *VERSIONS])
def test_the_installed_distribution_is_found(version: str | None):
    natten2.compat.install(version)
    try:
        module = importlib.import_module("natten")
        assert importlib.util.find_spec("natten").name == "natten"
        assert importlib.metadata.version("natten") == module.__version__
        assert importlib.metadata.version("torch")
        assert version is None or module.__version__.startswith(version)
    finally:
        natten2.compat.uninstall()


def test_every_version_has_its_names():
    fused = {"na1d", "na2d", "na3d"}
    expected = {
        "0.14": {"natten2dqkrpb", "natten1dqkrpb", "natten3dqkrpb", "natten2dqk", "natten2dav", "natten1dav"},
        "0.15": {"na2d_qk_with_bias", "na3d_qk", "na1d_av", "natten3dqkrpb", "has_gemm"},
        "0.17": {"na1d_qk", "na3d_av", "natten2dav"} | fused,
        "0.21": {"attention", "merge_attentions", "neighborhood_attention_generic"} | fused,
    }
    absent = {
        "0.14": {"na2d_qk"} | fused,
        "0.15": fused,
        "0.17": {"na2d_qk_with_bias", "attention"},
        "0.21": {"na2d_qk"},
    }
    union = set()
    for version, names in expected.items():
        natten2.compat.install(version)
        functional = set(vars(importlib.import_module("natten.functional")))
        assert names <= functional, version
        assert not absent[version] & functional, version
        union |= names - {"has_gemm"}
        assert hasattr(importlib.import_module("natten"), "context") == (version in ("0.17", "0.21"))
    natten2.compat.install()
    natten = importlib.import_module("natten")
    assert union <= set(vars(importlib.import_module("natten.functional")))
    assert natten.HAS_LIBNATTEN is True
    assert natten.NeighborhoodAttention is natten.NeighborhoodAttention2D
    for name in ("utils", "utils.log", "utils.checks", "utils.varlen", "types", "context", "modules", "backends"):
        importlib.import_module(f"natten.{name}")
    natten2.compat.uninstall()


def test_the_module_under_its_own_name():
    import natten2.compat.natten as natten

    query = torch.randn(1, 5, 6, 2, 4)
    assert "natten" not in sys.modules
    assert torch.equal(natten.na2d(query, query, query, 3), natten2.na2d(query, query, query, 3))
    assert natten.functional.natten2dav is not None
    assert natten.__version__ == "0.21.6"


@serves(None)
@pytest.mark.parametrize("rank", [1, 2, 3])
def test_scores_and_sums(natten: ModuleType, rank: int):
    shape, sizes, gaps = (7, 6, 9)[:rank], (3, 3, 5)[:rank], (2, 2, 1)[:rank]
    query, key, value = (heads_first(2, 3, *shape, 4) for _ in range(3))
    rpb = heads_first(3, *(2 * k - 1 for k in sizes))
    functional = natten.functional
    expected = reference_scores(query, key, rpb, *window(sizes, gaps))
    scores = getattr(functional, f"na{rank}d_qk")(query, key, sizes, gaps, rpb=rpb)
    torch.testing.assert_close(scores, expected)
    assert scores.is_contiguous()
    weights = torch.randn_like(scores)
    output = getattr(functional, f"na{rank}d_av")(weights, value, sizes, gaps)
    transposed = (weights.movedim(1, -2), value.movedim(1, -2), None, *window(sizes, gaps))
    torch.testing.assert_close(output, unfused_reference.na_av(*transposed).movedim(-2, 1))
    # Every older name, with one size for all axes, or two for three.
    numbers = {1: (3, 2), 2: (3, 2), 3: (3, 5, 2, 1)}[rank]
    same = {1: ((3,), (2,)), 2: ((3, 3), (2, 2)), 3: ((3, 5, 5), (2, 1, 1))}[rank]
    bias = heads_first(3, *(2 * k - 1 for k in same[0]))
    expected = reference_scores(query, key, bias, *window(*same))
    torch.testing.assert_close(getattr(functional, f"natten{rank}dqkrpb")(query, key, bias, *numbers), expected)
    torch.testing.assert_close(getattr(functional, f"na{rank}d_qk_with_bias")(query, key, bias, *numbers), expected)
    plain = reference_scores(query, key, None, *window(*same))
    torch.testing.assert_close(getattr(functional, f"natten{rank}dqk")(query, key, *numbers), plain)
    torch.testing.assert_close(getattr(functional, f"na{rank}d_qk")(query, key, *numbers), plain)
    output = getattr(functional, f"natten{rank}dav")(plain, value, *numbers)
    torch.testing.assert_close(getattr(functional, f"na{rank}d_av")(plain, value, *numbers), output)


@serves("0.17")
def test_registers_and_causal_axes_of_0_17(natten: ModuleType):
    query, key, extra = heads_first(2, 3, 6, 7, 4), heads_first(2, 3, 6, 7, 4), heads_first(2, 3, 5, 4)
    scores = natten.functional.na2d_qk(query, key, 3, 1, extra, (True, False))
    expected = reference_scores(query, key, None, *window((3, 3), (1, 1), causal=(True, False)), extra=extra)
    torch.testing.assert_close(scores, expected)
    value, values = heads_first(2, 3, 6, 7, 5), heads_first(2, 3, 5, 5)
    output = natten.functional.na2d_av(scores.softmax(-1), value, 3, 1, values, (True, False))
    tensors = [x.movedim(1, -2) for x in (query, key, value, extra, values)]
    fused = natten.functional.na2d(*tensors[:3], 3, 1, (True, False), None, 1.0, *tensors[3:])
    torch.testing.assert_close(output.movedim(1, -2), fused)


@serves(None)
def test_unfused_refusals(natten: ModuleType):
    query = heads_first(1, 1, 6, 6, 2)
    for size in (4, (3, 2), 1):
        with pytest.raises(ValueError, match="kernel_size must be odd"):
            natten.functional.na2d_qk(query, query, size)
    with pytest.raises(ValueError, match=r"kernel_size \* dilation must not exceed the axis"):
        natten.functional.natten2dqkrpb(query, query, None, 3, 3)
    with pytest.raises(ValueError, match="weights must have 9 slots"):
        natten.functional.natten2dav(query, query, 3, 1)
    with pytest.raises(ValueError, match="kernel_size must be one integer or 2 of them"):
        natten.functional.na2d_qk(query, query, (3, 3, 3))
    with pytest.raises(TypeError, match=r"key must be a torch\.Tensor, got NoneType"):
        natten.functional.na2d_qk(query, None, 3)
    with pytest.raises(TypeError, match=r"query must be a torch\.Tensor, got list"):
        natten.na2d([query], query, query, 3)
    natten.functional.na2d_qk(query, query, 3, None, is_causal=None)


@serves(None)
def test_mixed_dtypes_under_autocast(natten: ModuleType):
    query, value = torch.randn(1, 2, 8, 8, 4), torch.randn(1, 2, 8, 8, 4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        weights = natten.functional.na2d_qk(query, query, 3).float().softmax(-1)
        assert natten.functional.na2d_av(weights, value.bfloat16(), 3).dtype is torch.bfloat16
    # Without autocast as well.
    assert natten.functional.na2d_av(weights, value.bfloat16(), 3).dtype is torch.bfloat16


class Tagged(Tensor):
    """A subclass that sees every call."""

    calls = 0

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        cls.calls += 1
        return super().__torch_function__(func, types, args, kwargs or {})


@serves(None)
def test_tensor_subclasses_pass_through(natten: ModuleType):
    query = torch.randn(1, 2, 6, 6, 4).as_subclass(Tagged)
    scores = natten.functional.na2d_qk(query, query, 3)
    assert type(natten.functional.na2d_av(scores, query, 3)) is Tagged
    assert Tagged.calls > 0


@serves("0.17")
def test_nested_tensors(natten: ModuleType):
    samples = [torch.randn(2, length, 4, requires_grad=True) for length in (5, 9)]
    nested = torch.nested.as_nested_tensor(samples)
    scores = natten.functional.na1d_qk(nested, nested, 3)
    output = natten.functional.na1d_av(scores, nested, 3)
    assert output.is_nested
    for sample, each in zip(samples, output.unbind(), strict=True):
        alone = natten.functional.na1d_qk(sample[None], sample[None], 3)
        torch.testing.assert_close(each, natten.functional.na1d_av(alone, sample[None], 3)[0])
    output.unbind()[0].sum().backward()
    assert samples[0].grad.abs().sum() > 0
    with pytest.raises(NotImplementedError, match="query must be a dense, strided tensor, got a nested one"):
        natten.functional.na1d(nested, nested, nested, 3)


@serves("0.17")
def test_forward_derivatives(natten: ModuleType):
    query, key, value = (heads_first(1, 1, 5, 2) for _ in range(3))

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return natten.functional.na1d_av(natten.functional.na1d_qk(query, key, 3).softmax(-1), value, 3)

    tangents = tuple(torch.randn_like(x) for x in (query, key, value))
    _, forward = torch.func.jvp(attend, (query, key, value), tangents)
    jacobians = torch.func.jacrev(attend, (0, 1, 2))(query, key, value)
    expected = sum(torch.tensordot(j, t, t.dim()) for j, t in zip(jacobians, tangents, strict=True))
    torch.testing.assert_close(forward, expected)


@pytest.mark.parametrize(
    ("natten", "meaning"), [("0.17", "dilation"), ("0.21", "stride"), (None, "stride")], indirect=["natten"]
)
def test_the_fifth_argument_is_dilation_and_then_stride(natten: ModuleType, meaning: str):
    query = torch.randn(1, 8, 8, 2, 4)
    result = natten.functional.na2d(query, query, query, 3, 2)
    assert torch.equal(result, natten2.na2d(query, query, query, 3, **{meaning: 2}))
    layer = natten.NeighborhoodAttention2D(8, 2, 3, 2)
    assert getattr(layer, meaning) == (2, 2)


@serves(None)
def test_modern_functions(natten: ModuleType):
    query, key, value = (torch.randn(2, 6, 7, 4, 3) for _ in range(3))
    extra = torch.randn(2, 3, 4, 3)
    options = {"stride": (1, 2), "dilation": None, "is_causal": (True, False), "scale": 0.0}
    output, lse = natten.na2d(
        query,
        key,
        value,
        (3, 4),
        **options,
        additional_keys=extra,
        additional_values=extra,
        backend="cutlass-fna",
        q_tile_shape=(8, 8),
        kv_tile_shape=[8, 8],
        kernel_schedule="pp",
        attention_kwargs={"backend": "flex-fmha"},
        torch_compile=True,
        return_lse=True,
    )
    expected = reference.na_forward(
        query, key, value, None, extra, extra, *window((3, 4), (1, 1), causal=(True, False), stride=(1, 2)), 0.0
    )
    torch.testing.assert_close((output, lse), expected)
    same = natten.functional.neighborhood_attention_generic(query, key, value, 3)
    assert torch.equal(same, natten2.na2d(query, key, value, 3))
    # Channels that are not contiguous are copied, as natten copies them.
    strided = query.transpose(-1, -2).contiguous().transpose(-1, -2)
    torch.testing.assert_close(natten.na2d(strided, strided, strided, 3), natten2.na2d(query, query, query, 3))


@serves(None)
@pytest.mark.parametrize(
    ("nonsense", "error", "message"),
    [
        ({"backend": "cuda"}, NotImplementedError, "backend must be None or one of"),
        ({"q_tile_shape": (8,)}, ValueError, "q_tile_shape must be None or 2 positive integers"),
        ({"backward_kv_splits": 3}, ValueError, "backward_kv_splits must be None or 2 positive integers"),
        ({"kernel_schedule": "fast"}, ValueError, "kernel_schedule must be None"),
        ({"attention_kwargs": 3}, ValueError, "attention_kwargs must be a dict or None"),
        ({"kernel_size": 1}, ValueError, "kernel_size must be at least 2 in natten"),
        ({"stride": 4}, ValueError, "stride must be between 1 and kernel_size"),
        ({"is_causal": 1}, ValueError, "is_causal must be a bool"),
        ({"dilation": 4}, ValueError, r"kernel_size \* dilation must not exceed"),
        ({"stride": 1.5}, ValueError, "stride must be an integer"),
    ],
)
def test_nonsense_raises(natten: ModuleType, nonsense: dict, error: type[Exception], message: str):
    query = torch.randn(1, 6, 6, 1, 2)
    with pytest.raises(error, match=message):
        natten.na2d(query, query, query, **({"kernel_size": 3} | nonsense))


@serves(None)
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("lengths", [(6, 6), (4, 7)])
def test_attention(natten: ModuleType, lengths: tuple[int, int], is_causal: bool):
    query = torch.randn(2, lengths[0], 4, 3, dtype=torch.float64, requires_grad=True)
    key, value = (torch.randn(2, lengths[1], 2, 3, dtype=torch.float64, requires_grad=True) for _ in range(2))
    output, lse = natten.attention(query, key, value, is_causal=is_causal, return_lse=True)
    args = (query.transpose(1, 2), *(x.transpose(1, 2).repeat_interleave(2, 1) for x in (key, value)))
    expected = torch.nn.functional.scaled_dot_product_attention(*args, is_causal=is_causal).transpose(1, 2)
    torch.testing.assert_close(output, expected)
    # The log-sum-exp has a gradient, which natten's has not.
    assert torch.autograd.grad(lse.sum(), query, retain_graph=True)[0].abs().sum() > 0
    grads = torch.autograd.grad(output.sin().sum(), (query, key, value))
    torch.testing.assert_close(grads, torch.autograd.grad(expected.sin().sum(), (query, key, value)))


@serves(None)
def test_attention_of_variable_length(natten: ModuleType):
    lengths, key_lengths = torch.tensor([3, 5], dtype=torch.int32), torch.tensor([4, 5], dtype=torch.int32)
    query, key = torch.randn(1, 8, 2, 4), torch.randn(1, 9, 2, 4)
    output = natten.attention(query, key, key, seqlens_Q=lengths, seqlens_KV=key_lengths)
    each = [
        natten.attention(query[:, :3], key[:, :4], key[:, :4]),
        natten.attention(query[:, 3:], key[:, 4:], key[:, 4:]),
    ]
    torch.testing.assert_close(output, torch.cat(each, 1))
    ends, key_ends, longest, longest_key = natten.utils.varlen.generate_varlen_parameters(
        query, key, key, lengths, key_lengths
    )
    assert (ends.tolist(), key_ends.tolist(), longest, longest_key) == ([0, 3, 8], [0, 4, 9], 5, 5)
    again = natten.attention(
        query,
        key,
        key,
        cumulative_seqlen_Q=ends,
        cumulative_seqlen_KV=key_ends,
        max_seqlen_Q=longest,
        max_seqlen_KV=longest_key,
    )
    assert torch.equal(output, again)
    with pytest.raises(ValueError, match="seqlens_Q and seqlens_KV must be given together"):
        natten.attention(query, key, key, seqlens_Q=lengths)
    with pytest.raises(ValueError, match="sequence lengths must add up to 8 and 9 tokens"):
        natten.attention(query, key, key, seqlens_Q=lengths - 1, seqlens_KV=key_lengths)


@serves(None)
def test_merged_halves_change_no_tensor_of_the_caller(natten: ModuleType):
    query, key = torch.randn(2, 6, 2, 4), torch.randn(2, 8, 2, 4)
    halves = [natten.attention(query, half, half, return_lse=True) for half in key.split(4, 1)]
    outputs, lses = map(list, zip(*halves, strict=True))
    before = [x.clone() for x in (*outputs, *lses)]
    merged, _ = natten.merge_attentions(outputs, lses, torch_compile=False)
    torch.testing.assert_close(merged, natten.attention(query, key, key))
    assert all(torch.equal(x, y) for x, y in zip(before, (*outputs, *lses), strict=True))
    with pytest.raises(ValueError, match="outputs must be at least two tensors"):
        natten.merge_attentions(outputs[:1], lses[:1])


@serves(None)
def test_flags_are_kept(natten: ModuleType):
    natten.use_fused_na(True)
    assert natten.is_fused_na_enabled() is natten.is_fna_enabled() is True
    natten.use_fused_na(False)
    assert not natten.is_fused_na_enabled()
    natten.set_memory_usage_preference("strict")
    assert natten.is_memory_usage_strict()
    assert not natten.is_memory_usage_default()
    natten.set_memory_usage_preference()
    with pytest.raises(ValueError, match="pref must be default, strict, or unrestricted"):
        natten.set_memory_usage_preference("lavish")
    natten.allow_flex_compile(backprop=True)
    assert natten.context.is_flex_compile_backprop_allowed()
    natten.disable_flex_compile()
    assert not natten.is_flex_compile_allowed()
    assert natten.has_fused_na()
    assert natten.has_half()
    assert natten.has_cuda() is torch.cuda.is_available()
    assert natten.enable_tf32() is True
    assert natten.disable_tf32() is False
    assert natten.get_configs_for_cutlass_fna() == natten.get_bwd_configs_for_cutlass_blackwell_fmha() == []
    backend = natten.backends.choose_backend()
    natten.na1d(*[torch.randn(1, 4, 1, 2)] * 3, 3, backend=backend)


@serves(None)
def test_checks_of_both_generations(natten: ModuleType):
    check = natten.utils.check_all_args
    assert check(2, 3, None, True) == ((3, 3), (1, 1), (True, True))
    assert check(1, [3], 2, (1,), None) == ((3,), (2,), (1,), (False,))
    with pytest.raises(ValueError, match="dilation must be one integer or 2 of them"):
        check(2, 3, (1,), False)
    natten.utils.log.get_logger(__name__).debug("nothing")


def test_layers_of_every_generation():
    x = torch.randn(2, 9, 8, 6)
    calls = {
        "0.14": {"dim": 6, "num_heads": 2, "kernel_size": 3, "dilation": None, "bias": True, "qk_scale": 0},
        "0.15": {"dim": 6, "num_heads": 2, "kernel_size": 3, "dilation": 2, "bias": False},
        "0.17": {"dim": 6, "num_heads": 2, "kernel_size": (3, 4), "rel_pos_bias": True, "is_causal": (True, False)},
        "0.21": {"embed_dim": 6, "num_heads": 2, "kernel_size": 4, "stride": 2, "qk_scale": 0.5},
    }
    for version, arguments in calls.items():
        for installed in (version, None):
            natten2.compat.install(installed)
            layer = importlib.import_module("natten").NeighborhoodAttention2D(**arguments)
            own = natten2.NeighborhoodAttention2D(
                6,
                2,
                layer.kernel_size,
                layer.stride,
                layer.dilation,
                layer.is_causal,
                qk_scale=layer.scale,
                rel_pos_bias=layer.rpb is not None,
            )
            own.load_state_dict(layer.state_dict())
            torch.testing.assert_close(layer(x), own(x))
            assert ("rpb" in layer.state_dict()) == bool(arguments.get("bias") or arguments.get("rel_pos_bias"))
    natten2.compat.uninstall()


@serves("0.15")
@pytest.mark.parametrize("rank", [1, 2, 3])
def test_small_maps_are_padded_behind(natten: ModuleType, rank: int):
    layer = getattr(natten, f"NeighborhoodAttention{rank}D")(6, 2, 3, dilation=2, bias=rank < 3).double()
    shape = (4, 7, 5)[:rank]
    x = torch.randn(2, *shape, 6, dtype=torch.float64)
    padded = x.new_zeros(2, *(max(6, length) for length in shape), 6)
    inside = (slice(None), *(slice(length) for length in shape))
    padded[inside] = x
    torch.testing.assert_close(layer(x), layer(padded)[inside])


@serves("0.15")
def test_three_dimensions_of_0_15(natten: ModuleType):
    layer = natten.NeighborhoodAttention3D(6, 2, 3, 5, 1, None, True)
    assert (layer.kernel_size, layer.dilation) == ((5, 3, 3), (1, 1, 1))
    assert layer.rpb.shape == (2, 9, 5, 5)
    assert layer(torch.randn(1, 2, 2, 2, 6)).shape == (1, 2, 2, 2, 6)
    with pytest.raises(ValueError, match="kernel_size must be odd"):
        natten.NeighborhoodAttention3D(6, 2, 4)


@pytest.mark.parametrize("version", [None, *VERSIONS])
def test_layers_are_pickled(version: str | None):
    natten2.compat.install(version)
    layer = importlib.import_module("natten").NeighborhoodAttention2D(4, 2, 3)
    again = pickle.loads(pickle.dumps(layer))
    x = torch.randn(1, 5, 5, 4)
    assert torch.equal(again(x), layer(x))
    natten2.compat.uninstall()


@serves("0.17")
def test_dropout_of_weights(natten: ModuleType):
    layer = natten.NeighborhoodAttention1D(4, 2, 3, attn_drop=1.0)
    x = torch.randn(1, 6, 4)
    torch.testing.assert_close(layer(x), layer.proj.bias.expand(1, 6, 4))
    assert not torch.equal(layer.eval()(x), layer.proj.bias.expand(1, 6, 4))
