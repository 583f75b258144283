"""NAT and its kin: the equations, padding, feature pyramids, regularization, errors, and compilation."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch._inductor.exc import InductorError

from natten2.models import NAT, NATConfig, NATFeatures, nat_tiny
from natten2.models.block import DropPath
from natten2.models.nat import Backbone
from natten2.ops import reference

SMALL = NATConfig(depths=(2, 1), num_heads=(2, 4), embed_dim=8, kernel_size=3, in_chans=1, num_classes=5)
ONE_LEVEL = {"depths": (2,), "num_heads": 2}


def make(config: NATConfig = SMALL, **changes: object) -> NAT:
    return randomize(NAT(replace(config, **changes)))


def make_features(out_indices: tuple[int, ...] | None = None, **changes: object) -> NATFeatures:
    return randomize(NATFeatures(replace(SMALL, **changes), out_indices))


def randomize(model: Backbone) -> Backbone:
    """The model in float64 and in training mode, with weights that all matter."""
    torch.manual_seed(0)
    model.double()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model


def make_images(height: int, width: int, batch: int = 2) -> Tensor:
    torch.manual_seed(1)
    return torch.randn(batch, 1, height, width, dtype=torch.float64)


def test_initial_weights() -> None:
    torch.manual_seed(0)
    model = NAT(NATConfig(depths=(1, 1), num_heads=2, embed_dim=64, layer_scale=0.25))
    for module in model.modules():
        if isinstance(module, nn.Linear):
            assert module.weight.std().item() == pytest.approx(0.02, rel=0.05)
            assert module.bias.abs().max() == 0
        elif isinstance(module, nn.LayerNorm):
            assert (module.weight == 1).all()
            assert (module.bias == 0).all()
    for block in (level.blocks[0] for level in model.levels):
        assert (block.gamma1 == 0.25).all()
        assert (block.gamma2 == 0.25).all()
        assert block.attn.rpb.std().item() == pytest.approx(0.02, rel=0.1)


def expected_attention(attn: nn.Module, tokens: Tensor, dilation: int) -> Tensor:
    """The attention of a block by the reference kernel, with explicit zeros around maps that are too small."""
    (batch, height, width, dim), kernel_size = tokens.shape, attn.kernel_size[0]
    padded = tokens.new_zeros(batch, max(height, kernel_size * dilation), max(width, kernel_size * dilation), dim)
    padded[:, :height, :width] = tokens
    qkv = padded @ attn.qkv.weight.T + (0 if attn.qkv.bias is None else attn.qkv.bias)
    query, key, value = (part.reshape(*part.shape[:-1], attn.num_heads, -1) for part in qkv.split(dim, dim=-1))
    scale = query.shape[-1] ** -0.5
    window = ((kernel_size,) * 2, (1, 1), (dilation,) * 2, (False, False))
    output, _ = reference.na_forward(query, key, value, attn.rpb, None, None, *window, scale)
    return output.reshape(padded.shape)[:, :height, :width] @ attn.proj.weight.T + attn.proj.bias


def filled_up(tensor: Tensor, multiple: int) -> Tensor:
    """`[B, H, W, C]` with zeros below and to the right, to whole multiples."""
    batch, height, width, channels = tensor.shape
    height, width = (length + -length % multiple for length in (height, width))
    padded = tensor.new_zeros(batch, height, width, channels)
    padded[:, : tensor.shape[1], : tensor.shape[2]] = tensor
    return padded


def expected_embedding(embedding: nn.Module, images: Tensor, patch_size: int | None) -> Tensor:
    if patch_size is None:
        return embedding.norm(embedding.proj(images).movedim(1, -1))
    pixels = filled_up(images.movedim(1, -1), patch_size).unfold(1, patch_size, patch_size)
    patches = pixels.unfold(2, patch_size, patch_size)  # [B, H, W, channels, rows, columns]
    return embedding.norm(torch.einsum("bhwcij,ocij->bhwo", patches, embedding.proj.weight) + embedding.proj.bias)


def expected_next_level(downsample: nn.Module, tokens: Tensor, patch_size: int | None) -> Tensor:
    if patch_size is None:
        return downsample.norm(downsample.reduction(tokens.movedim(-1, 1)).movedim(1, -1))
    filled = filled_up(tokens, 2)
    merged = [filled[:, 0::2, 0::2], filled[:, 1::2, 0::2], filled[:, 0::2, 1::2], filled[:, 1::2, 1::2]]
    return downsample.norm(torch.cat(merged, -1)) @ downsample.reduction.weight.T


def expected_levels(model: Backbone, images: Tensor) -> list[Tensor]:
    """The equations of the levels, written out for a model without dropout."""
    config = model.config
    tokens = expected_embedding(model.patch_embed, images, config.patch_size)
    dilations = config.dilations or [[1] * depth for depth in config.depths]
    if config.patch_size is not None and len(config.depths) == 1:
        levels = [(model.layers, None)]
    else:
        levels = [(level.blocks, level.downsample) for level in (model.layers if config.patch_size else model.levels)]
    outputs = []
    for (blocks, downsample), level_dilations in zip(levels, dilations, strict=False):  # levels may be left out
        for block, dilation in zip(blocks, level_dilations, strict=True):
            gammas = (1, 1) if config.layer_scale is None else (block.gamma1, block.gamma2)
            tokens = tokens + gammas[0] * expected_attention(block.attn, block.norm1(tokens), dilation)
            hidden = nn.functional.gelu(block.mlp.fc1(block.norm2(tokens)))
            tokens = tokens + gammas[1] * block.mlp.fc2(hidden)
        outputs.append(tokens)
        if downsample is not None:
            tokens = expected_next_level(downsample, tokens, config.patch_size)
    return outputs


def expected_logits(model: NAT, images: Tensor) -> Tensor:
    return model.head(model.norm(expected_levels(model, images)[-1]).flatten(1, 2).mean(1))


@pytest.mark.parametrize(
    ("size", "changes"),
    [
        pytest.param((32, 32), {}, id="even"),
        pytest.param((41, 30), {}, id="odd"),
        pytest.param((33, 40), {"dilations": ((1, 4), 2), "layer_scale": 0.5}, id="dilated-padded-scaled"),
        pytest.param((9, 32), {}, id="padded-below"),
        pytest.param((32, 7), {}, id="padded-right"),
        pytest.param((1, 1), {"kernel_size": 4, "qkv_bias": False}, id="one-pixel"),
        pytest.param((31, 45), {"patch_size": 4}, id="patches-odd"),
        pytest.param((33, 40), {"patch_size": 4, "dilations": ((1, 4), 2)}, id="patches-dilated-padded"),
        pytest.param((1, 1), {"patch_size": 4}, id="patches-one-pixel"),
        pytest.param((24, 17), {"patch_size": 5, **ONE_LEVEL, "dilations": ((1, 2),)}, id="isotropic"),
        pytest.param((1, 1), {"patch_size": 16, **ONE_LEVEL}, id="isotropic-one-pixel"),
    ],
)
def test_logits_and_gradients_equal_the_equations(size: tuple[int, int], changes: dict[str, object]) -> None:
    model, images = make(**changes), make_images(*size)
    logits, expected = model(images), expected_logits(model, images)
    assert logits.shape == (2, 5)
    torch.testing.assert_close(logits, expected, rtol=1e-10, atol=1e-10)

    parameters, upstream = dict(model.named_parameters()), torch.randn_like(logits)
    grads = torch.autograd.grad(logits, list(parameters.values()), upstream)
    expected_grads = torch.autograd.grad(expected, list(parameters.values()), upstream)
    for name, grad, expected_grad in zip(parameters, grads, expected_grads, strict=True):
        assert grad.abs().max() > 0, name
        torch.testing.assert_close(grad, expected_grad, rtol=1e-8, atol=1e-8)


def test_small_maps_are_padded_around_the_attention_alone() -> None:
    block = make(kernel_size=5).levels[0].blocks[0]
    tokens = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    padded = nn.functional.pad(block.norm1(tokens), (0, 0, 0, 0, 0, 2))
    tokens_after = tokens + block.attn(padded)[:, :3]
    expected = tokens_after + block.mlp(block.norm2(tokens_after))
    torch.testing.assert_close(block(tokens), expected, rtol=0, atol=0)


FEATURES = {"depths": (2, 1, 1), "num_heads": (2, 4, 8)}


@pytest.mark.parametrize("patch_size", [None, 4])
@pytest.mark.parametrize("out_indices", [None, (0,), (2, 0), (1, -1)])
def test_features_are_the_normed_levels(patch_size: int | None, out_indices: tuple[int, ...] | None) -> None:
    model, images = make_features(out_indices, patch_size=patch_size, **FEATURES), make_images(45, 31)
    levels = {None: (0, 1, 2), (0,): (0,), (2, 0): (0, 2), (1, -1): (1, 2)}[out_indices]
    assert (model.out_indices, model.strides) == (levels, tuple(4 * 2**level for level in levels))
    assert model.channels == tuple(8 * 2**level for level in levels)
    outputs, expected = model(images), expected_levels(model, images)
    assert len(outputs) == len(levels)
    for output, level, channels, stride in zip(outputs, levels, model.channels, model.strides, strict=True):
        assert output.shape == (2, channels, -(-45 // stride), -(-31 // stride))
        tokens = getattr(model, f"norm{level}")(expected[level])
        torch.testing.assert_close(output, tokens.movedim(-1, 1), rtol=1e-10, atol=1e-10)
    sum(output.sum() for output in outputs).backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_an_isotropic_model_has_one_map() -> None:
    model = make_features(patch_size=16, **ONE_LEVEL)
    (output,) = model(make_images(33, 64))
    assert output.shape == (2, 8, 3, 4)
    assert (model.channels, model.strides) == ((8,), (16,))


@pytest.mark.parametrize(
    ("out_indices", "error", "message"),
    [
        ((), ValueError, r"out_indices must name some of 2 levels, each once, got \(\)"),
        ((0, 0), ValueError, "each once"),
        ((1, -1), ValueError, "each once"),
        ((2,), ValueError, r"some of 2 levels, each once, got \(2,\)"),
        ((-3,), ValueError, "some of 2 levels"),
        (1, TypeError, "out_indices must be a sequence of integers, got 1"),
        ((0.5,), TypeError, "out_indices must be an integer or a sequence of integers"),
    ],
)
def test_features_refuse(out_indices: object, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        NATFeatures(SMALL, out_indices)


def test_a_model_without_head_returns_the_mean_of_normed_tokens() -> None:
    model, images = make(num_classes=0), make_images(32, 32)
    features = model(images)
    assert features.shape == (2, model.num_features) == (2, 16)
    torch.testing.assert_close(features, model.forward_features(images), rtol=0, atol=0)
    # The mean over channels of a normed token is that of the norm's bias when its weight is constant.
    nn.init.ones_(model.norm.weight)
    torch.testing.assert_close(model(images).mean(1), model.norm.bias.mean().expand(2), rtol=1e-10, atol=1e-10)


def test_drop_path_drops_whole_samples_and_keeps_the_mean() -> None:
    torch.manual_seed(0)
    drop_path, branch = DropPath(0.25), torch.randn(4000, 2, 3, dtype=torch.float64)
    output = drop_path(branch)
    kept = (output != 0).flatten(1)
    assert (kept.all(1) | ~kept.any(1)).all()
    assert kept[:, 0].double().mean().item() == pytest.approx(0.75, abs=0.03)
    torch.testing.assert_close(output[kept[:, 0]], branch[kept[:, 0]] / 0.75)
    torch.testing.assert_close(drop_path.eval()(branch), branch, rtol=0, atol=0)
    assert DropPath(1.0)(branch).abs().max() == 0


@pytest.mark.parametrize("rate", ["drop_path_rate", "drop_rate"])
def test_drop_rates_act_in_training_alone(rate: str) -> None:
    images = make_images(32, 32, batch=16)
    model, expected = make(**{rate: 0.5}), make()(images)
    assert (model(images) - expected).abs().max() > 1e-3
    torch.testing.assert_close(model.eval()(images), expected, rtol=0, atol=0)


def test_every_dropout_takes_part() -> None:
    assert all(module.p == 0.5 for module in make(drop_rate=0.5).modules() if isinstance(module, nn.Dropout))
    model, images = make(), make_images(32, 32)
    expected = model(images)
    dropouts = [module for module in model.modules() if isinstance(module, nn.Dropout)]
    assert len(dropouts) == 1 + 2 * sum(SMALL.depths)
    for dropout in dropouts:
        dropout.p = 0.5
        assert (model(images) - expected).abs().max() > 1e-6
        dropout.p = 0.0


def test_zero_scale_of_the_dot_products_means_zero() -> None:
    model, images = make(qk_scale=0.0), make_images(32, 32)
    for name, parameter in model.named_parameters():
        if name.endswith("attn.qkv.weight"):
            query_and_key = slice(0, 2 * parameter.shape[1])
            (grad,) = torch.autograd.grad(model(images).sum(), parameter)
            assert grad[query_and_key].abs().max() == 0
            assert grad.abs().max() > 0


def test_dropping_the_last_path_leaves_its_input() -> None:
    block = make(drop_path_rate=1.0).levels[1].blocks[0]
    tokens = torch.randn(2, 4, 4, 16, dtype=torch.float64)
    torch.testing.assert_close(block(tokens), tokens, rtol=0, atol=0)
    assert (block.eval()(tokens) - tokens).abs().max() > 1e-3


def test_zero_layer_scale_makes_blocks_the_identity() -> None:
    torch.manual_seed(0)
    block = NAT(replace(SMALL, layer_scale=0.0)).levels[0].blocks[0]
    tokens = torch.randn(2, 4, 4, 8)
    torch.testing.assert_close(block(tokens), tokens, rtol=0, atol=0)


def logits_and_grads(model: nn.Module, images: Tensor) -> list[Tensor]:
    torch.manual_seed(2)
    logits = model(images)
    return [logits, *torch.autograd.grad(logits.square().sum(), list(model.parameters()))]


def check_compiled(model: NAT, images: Tensor, backend: str, tolerance: float) -> None:
    torch._dynamo.reset()
    counter = CompileCounterWithBackend(backend)
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    actual, expected = logits_and_grads(compiled, images), logits_and_grads(model, images)
    assert counter.frame_count == 1
    for left, right in zip(actual, expected, strict=True):
        torch.testing.assert_close(left, right, rtol=tolerance, atol=tolerance)


@pytest.mark.long
def test_nat_tiny_traces_to_one_graph_in_training() -> None:
    torch.manual_seed(0)
    model = nat_tiny(num_classes=10).double()
    check_compiled(model, torch.randn(2, 3, 64, 64, dtype=torch.float64), "aot_eager", tolerance=0)


@pytest.mark.long
def test_a_small_model_compiles_by_inductor() -> None:
    check_compiled(make(depths=(1, 1), layer_scale=0.5), make_images(16, 16), "inductor", tolerance=1e-9)


@pytest.mark.long
def test_nat_tiny_compiles_by_inductor() -> None:
    torch.manual_seed(0)
    model = nat_tiny(num_classes=10).double().eval()
    check_compiled(model, torch.randn(1, 3, 64, 64, dtype=torch.float64), "inductor", tolerance=1e-9)


def open_images(height: int, width: int, batch: int) -> Tensor:
    """Images of which a compiler may assume no size."""
    images = make_images(height, width, batch)
    for axis in (0, 2, 3):
        torch._dynamo.mark_dynamic(images, axis)
    return images


def test_image_sizes_share_a_graph() -> None:
    model = make(drop_path_rate=0.1)
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    for size, batch in (((40, 33), 2), ((41, 57), 3), ((64, 32), 4)):
        images = open_images(*size, batch)
        for left, right in zip(logits_and_grads(compiled, images), logits_and_grads(model, images), strict=True):
            torch.testing.assert_close(left, right, rtol=1e-9, atol=1e-9)
    assert counter.frame_count == 1


@pytest.mark.long
@pytest.mark.parametrize("patch_size", [None, 4])
def test_image_sizes_share_the_code_of_inductor(patch_size: int | None) -> None:
    model = make(depths=(1, 1), patch_size=patch_size).eval()
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("inductor")
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    for size, batch in (((40, 33), 2), ((41, 57), 3), ((64, 64), 4)):
        images = open_images(*size, batch)
        with torch.no_grad():
            torch.testing.assert_close(compiled(images), model(images), rtol=1e-9, atol=1e-9)
    assert counter.frame_count == 1


@pytest.mark.long
def test_inductor_can_not_train_with_convolutions_of_open_size() -> None:
    # README.md says so. Once this fails, it need not, and ConvDownsampler may leave its images as they are.
    model = make(depths=(1, 1))
    torch._dynamo.reset()
    with pytest.raises(InductorError, match="truth value of Relational"):
        logits_and_grads(torch.compile(model, fullgraph=True), open_images(40, 33, 2))


@pytest.mark.parametrize("shape", [(1, 32, 32), (2, 3, 32, 32), (2, 1, 32, 32, 1)])
def test_images_of_the_wrong_shape_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"images must have shape \[batch, 1, height, width\], got \["):
        NAT(SMALL)(torch.zeros(shape))


def test_images_that_are_no_tensor_are_refused() -> None:
    with pytest.raises(TypeError, match=r"images must be a torch\.Tensor, got list"):
        NAT(SMALL)([[0.0]])


def test_lists_make_the_same_config() -> None:
    config = replace(SMALL, depths=[2, 1], num_heads=[2, 4])
    assert config == SMALL
    assert hash(config) == hash(SMALL)
    assert replace(SMALL, dilations=[[1, 2], 3]).dilations == ((1, 2), (3,))


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"depths": ()}, ValueError, "depths must hold at least one integer"),
        ({"depths": (2, 0)}, ValueError, r"depths must hold .* each at least 1, got \(2, 0\)"),
        ({"depths": 2}, TypeError, "depths must be a sequence with one entry per level, got 2"),
        ({"depths": (2, 1.0)}, TypeError, "depths must be an integer or a sequence of integers"),
        ({"num_heads": (2, 4, 8)}, ValueError, "num_heads must be one integer or 2 of them"),
        ({"num_heads": (2, 3)}, ValueError, r"channels of level 1 must be a multiple of num_heads\[1\] 3, got 16"),
        ({"num_heads": (0, 2)}, ValueError, r"num_heads\[0\] must be at least 1, got 0"),
        ({"embed_dim": 9}, ValueError, "embed_dim must be even, got 9"),
        ({"embed_dim": 0}, ValueError, "embed_dim must be at least 2, got 0"),
        ({"embed_dim": "8"}, TypeError, "embed_dim must be an integer, got '8'"),
        ({"patch_size": 0}, ValueError, "patch_size must be at least 1, got 0"),
        ({"patch_size": "4"}, TypeError, "patch_size must be an integer, got '4'"),
        ({"kernel_size": 0}, ValueError, "kernel_size must be at least 1, got 0"),
        ({"in_chans": 0}, ValueError, "in_chans must be at least 1, got 0"),
        ({"num_classes": -1}, ValueError, "num_classes must be at least 0, got -1"),
        ({"dilations": ((1, 1),)}, ValueError, "dilations must have one entry for each of 2 levels"),
        ({"dilations": 2}, TypeError, "dilations must be a sequence with one entry per level, got 2"),
        ({"dilations": ((1,), (1,))}, ValueError, r"dilations\[0\] must be one integer or 2 of them"),
        ({"dilations": ((1, 1), (0,))}, ValueError, r"dilations\[1\] must be at least 1 in every block, got \(0,\)"),
        ({"mlp_ratio": 0.1}, ValueError, "mlp_ratio must be finite and leave at least one hidden channel, got 0.1"),
        ({"mlp_ratio": float("inf")}, ValueError, "mlp_ratio must be finite"),
        ({"mlp_ratio": None}, TypeError, "mlp_ratio must be a number, got None"),
        ({"drop_rate": -0.1}, ValueError, "drop_rate must be between 0 and 1, got -0.1"),
        ({"drop_path_rate": 1.1}, ValueError, "drop_path_rate must be between 0 and 1, got 1.1"),
        ({"layer_scale": True}, TypeError, "layer_scale must be a number, got True"),
    ],
)
def test_config_refuses(changes: dict[str, object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        replace(SMALL, **changes)
