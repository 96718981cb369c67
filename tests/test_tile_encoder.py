# SPDX-License-Identifier: Apache-2.0
"""Part 1: pooling, widths, and the encoders of transformers and timm behind one function."""

import pytest
import timm
import torch
from transformers import (
    AutoModel,
    ConvNextConfig,
    Dinov2Config,
    PreTrainedConfig,
    ResNetConfig,
    SwinConfig,
    TimmWrapperConfig,
)

from modeling_dre_slcl import DreSlclConfig, DreSlclModel
from modeling_dre_slcl.tile_encoder import build_tile_encoder, encode_tiles, pool_tile_states, tile_encoder_width

from .tiny_models import IMAGE_SIZE, tiny_timm_config, tiny_vit_config

SMALL_CONFIGS = {
    "vit": tiny_vit_config(),
    "dinov2": Dinov2Config(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=32, patch_size=8),
    "convnext": ConvNextConfig(hidden_sizes=[8, 8, 16, 24], depths=[1, 1, 1, 1]),
    "resnet": ResNetConfig(embedding_size=8, hidden_sizes=[8, 8, 16, 24], depths=[1, 1, 1, 1], layer_type="basic"),
    "swin": SwinConfig(image_size=32, patch_size=2, embed_dim=8, depths=[1, 1], num_heads=[1, 2], window_size=4),
    "timm": tiny_timm_config(),
}


@pytest.fixture
def tiles():
    return torch.randn(3, 3, IMAGE_SIZE, IMAGE_SIZE, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("name", "pooling"),
    [
        *((name, pooling) for name in SMALL_CONFIGS for pooling in ("mean", "pooler")),
        *((name, "cls") for name in ("vit", "dinov2", "swin")),
    ],
)
def test_features_have_the_stated_width_and_unit_norm(name, pooling, tiles):
    torch.manual_seed(0)
    encoder = build_tile_encoder(SMALL_CONFIGS[name], pooling).eval()
    features = encode_tiles(encoder, tiles, pooling)
    assert features.shape == (3, tile_encoder_width(encoder))
    torch.testing.assert_close(features.norm(dim=1), torch.ones(3))


@pytest.mark.parametrize("pooling", ["cls", "mean"])
def test_vit_features_equal_those_computed_by_hand(pooling, tiles):
    torch.manual_seed(0)
    encoder = build_tile_encoder(tiny_vit_config(), pooling).eval()
    states = encoder(pixel_values=tiles).last_hidden_state
    for tile, feature in zip(states, encode_tiles(encoder, tiles, pooling), strict=True):
        vector = tile[0] if pooling == "cls" else sum(tile) / len(tile)
        torch.testing.assert_close(feature, vector / vector.square().sum().sqrt())


def test_a_timm_model_gives_the_features_that_timm_gives(tiles):
    torch.manual_seed(0)
    encoder = build_tile_encoder(tiny_timm_config(), "pooler").eval()
    model = timm.create_model("convnext_atto", depths=[1, 1, 1, 1], dims=[8, 8, 16, 32], num_classes=0).eval()
    model.load_state_dict(encoder.timm_model.state_dict())
    with torch.no_grad():
        expected = torch.nn.functional.normalize(model(tiles), dim=-1)
        assert torch.equal(encode_tiles(encoder, tiles, "pooler"), expected)


@pytest.mark.parametrize("pooling", ["cls", "mean", "pooler"])
def test_an_unused_pooler_is_removed_and_a_used_one_kept(pooling):
    encoder = build_tile_encoder(tiny_vit_config(), pooling)
    assert (encoder.pooler is not None) == (pooling == "pooler")


def test_every_parameter_receives_a_gradient(tiles):
    """Else distributed training stops with an error."""
    encoder = build_tile_encoder(tiny_vit_config(), "cls")
    encode_tiles(encoder, tiles, "cls").square()[:, 0].sum().backward()
    assert all(parameter.grad is not None for parameter in encoder.parameters())


def test_pools_feature_maps():
    maps = torch.randn(2, 5, 3, 4)
    expected = torch.stack([one.flatten(1).sum(dim=1) / 12 for one in maps])
    torch.testing.assert_close(pool_tile_states(maps, None, "mean"), expected)
    pooled = torch.randn(2, 5, 1, 1)
    assert torch.equal(pool_tile_states(maps, pooled, "pooler"), pooled[:, :, 0, 0])


def test_refuses_what_an_encoder_does_not_give():
    with pytest.raises(ValueError, match="`tile_pooling='cls'`, but this tile encoder gives a feature map"):
        pool_tile_states(torch.randn(2, 5, 3, 4), None, "cls")
    with pytest.raises(ValueError, match="`tile_pooling='pooler'`, but this tile encoder has no pooled output"):
        pool_tile_states(torch.randn(2, 7, 5), None, "pooler")


def test_refuses_an_encoder_of_unknown_width():
    encoder = AutoModel.from_config(tiny_vit_config())
    encoder.config = PreTrainedConfig()
    with pytest.raises(ValueError, match="width of tile encoder '' could not be read"):
        tile_encoder_width(encoder)


def test_a_timm_encoder_from_scratch_starts_from_timms_own_weights():
    """transformers would draw every layer from one narrow normal distribution."""
    model_args = {"layers": [1, 1, 1, 1], "channels": [32, 32, 32, 32], "norm_layer": "groupnorm"}
    wrapped = TimmWrapperConfig(architecture="resnet18", model_args=model_args)
    sizes = {"hidden_size": 32, "num_attention_heads": 2, "tile_pooling": "pooler"}
    found = DreSlclModel(DreSlclConfig(encoder_config=wrapped, **sizes)).tile_encoder.timm_model
    own = timm.create_model("resnet18", num_classes=0, **model_args)
    for (name, value), reference in zip(found.named_parameters(), own.parameters(), strict=True):
        if value.ndim > 1:
            assert value.std().item() == pytest.approx(reference.std().item(), rel=0.2), name
