# SPDX-License-Identifier: Apache-2.0
"""Groups of parameters and their learning rates, against timm's own layer-wise decay and against names."""

import pytest
import torch
from timm.optim import param_groups_layer_decay
from transformers import ConvNextConfig, Dinov2Config, ResNetConfig, TimmWrapperConfig

from dre_slcl.training.config import TrainConfig
from dre_slcl.training.optimizer import block_depths, build_optimizer, choose_trained
from modeling_dre_slcl import DreSlclModel
from modeling_dre_slcl.tile_encoder import build_tile_encoder

from .tiny_models import tiny_config, tiny_vit_config

VIT_ARGS = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 3, "num_heads": 4}
TIMM_VIT = TimmWrapperConfig(architecture="vit_tiny_patch16_224", model_args=VIT_ARGS)


def config(**changes):
    needed = {"dataset": "data", "output_dir": "out", "text_model": "text", "tile_encoder_config": {}}
    return TrainConfig(**needed | {"learning_rate": 1e-4, "head_learning_rate": 1e-3, "weight_decay": 0.1} | changes)


def peaks(model, settings):
    """Parameter -> (peak learning rate, weight decay)."""
    groups = build_optimizer(model, settings).param_groups
    return {p: (group["peak_learning_rate"], group["weight_decay"]) for group in groups for p in group["params"]}


def tiny(encoder_config, pooling):
    return DreSlclModel(tiny_config(encoder_config=encoder_config, tile_pooling=pooling))


def test_decay_over_a_timm_vit_is_timms_own():
    model = tiny(TIMM_VIT, "pooler")
    found = peaks(model, config(layer_decay=0.7))
    groups = param_groups_layer_decay(model.tile_encoder.timm_model, weight_decay=0.1, layer_decay=0.7)
    expected = {p: (1e-4 * group["lr_scale"], group["weight_decay"]) for group in groups for p in group["params"]}
    for name, parameter in model.tile_encoder.timm_model.named_parameters():
        assert found[parameter][0] == pytest.approx(expected[parameter][0]), name
        assert found[parameter][1] == expected[parameter][1], name
    assert {found[p] for p in model.residual_encoder.parameters()} == {(1e-3, 0.1), (1e-3, 0.0)}


@pytest.mark.parametrize(
    "encoder_config",
    [
        tiny_vit_config(num_hidden_layers=3),
        Dinov2Config(hidden_size=32, num_hidden_layers=3, num_attention_heads=2, image_size=32, patch_size=8),
    ],
    ids=["vit", "dinov2"],
)
def test_decay_over_a_vit_of_transformers_follows_the_numbers_of_its_blocks(encoder_config):
    model = tiny(encoder_config, "cls")
    found = peaks(model, config(layer_decay=0.5))
    seen = set()
    for name, parameter in model.tile_encoder.named_parameters():
        block = next((int(word) for word in name.split(".") if word.isdigit()), -1 if "embeddings" in name else 2)
        assert found[parameter][0] == pytest.approx(1e-4 * 0.5 ** (2 - block)), name
        seen.add(block)
    assert seen == {-1, 0, 1, 2}


def test_without_decay_there_are_the_four_groups_of_before():
    groups = build_optimizer(tiny(tiny_vit_config(), "cls"), config()).param_groups
    assert [(g["peak_learning_rate"], g["weight_decay"]) for g in groups] == [
        *((1e-4, 0.1), (1e-4, 0.0), (1e-3, 0.1), (1e-3, 0.0))
    ]


@pytest.mark.parametrize(
    "encoder_config",
    [
        ConvNextConfig(hidden_sizes=[8, 8, 16, 32], depths=[1, 1, 1, 1]),
        ResNetConfig(embedding_size=8, hidden_sizes=[8, 8, 16, 32], depths=[1, 1, 1, 1], layer_type="basic"),
        TimmWrapperConfig(architecture="convnext_atto", model_args={"depths": [1, 1, 1, 1], "dims": [8, 8, 16, 32]}),
        TimmWrapperConfig(architecture="resnet18", model_args={"channels": [8, 8, 16, 32]}),
        TimmWrapperConfig(
            architecture="swin_tiny_patch4_window7_224",
            model_args={"img_size": 32, "window_size": 4, "embed_dim": 8, "depths": [1, 1, 1], "num_heads": [1, 1, 1]},
        ),
    ],
    ids=lambda value: getattr(value, "architecture", value.model_type),
)
def test_every_parameter_has_a_depth_that_grows_towards_the_output(encoder_config):
    encoder = build_tile_encoder(encoder_config, "mean")
    depths = block_depths(encoder)
    names = [name for name, _ in encoder.named_parameters()]
    assert sorted(depths) == sorted(names)
    assert min(depths.values()) == 0
    assert len(set(depths.values())) > 2
    order = [depths[name] for name in names]
    assert order == sorted(order)


def test_an_encoder_without_blocks_is_refused():
    encoder = torch.nn.Linear(2, 2)
    with pytest.raises(ValueError, match="`layer_decay` needs a tile encoder of numbered blocks"):
        block_depths(encoder)


@pytest.mark.parametrize("encoder_config", [tiny_vit_config(num_hidden_layers=3), TIMM_VIT], ids=["vit", "timm"])
def test_adapters_of_early_blocks_learn_slower_too(encoder_config):
    model = tiny(encoder_config, "cls")
    settings = config(layer_decay=0.5, lora={"r": 2})
    choose_trained(model, settings)
    found = peaks(model, settings)
    trained = {n: found[p][0] for n, p in model.tile_encoder.named_parameters() if p.requires_grad}
    assert len(trained) == 3 * (2 if "qkv" in str(list(trained)) else 4)
    for name, rate in trained.items():
        block = next(int(word) for word in name.split(".") if word.isdigit())
        assert rate == pytest.approx(1e-4 * 0.5 ** (2 - block)), name


@pytest.mark.parametrize(
    ("lora", "message"),
    [({"rank": 4}, "Unknown field `rank` in `lora`"), ({"lora_alfa": 4}, "did you mean `lora_alpha`")],
)
def test_unknown_fields_of_lora_are_refused(lora, message):
    with pytest.raises(ValueError, match=message):
        choose_trained(tiny(tiny_vit_config(), "cls"), config(lora=lora))


@pytest.mark.parametrize("encoder_config", [tiny_vit_config(), TIMM_VIT], ids=["vit", "timm"])
def test_adapters_learn_the_same_with_activation_checkpointing(encoder_config):
    """Nothing before them wants a gradient, which is where checkpointing may lose theirs."""
    tiles = torch.randn(1, 2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    gradients = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        model = tiny(encoder_config, "cls").train()
        choose_trained(model, config(lora={"r": 2}))
        if checkpointing:
            model.activation_checkpointing_enable()
        model(pixel_values=tiles).slide_embedding[0, 0].backward()
        gradients.append({n: p.grad for n, p in model.tile_encoder.named_parameters() if p.requires_grad})
    assert max(float(gradient.abs().max()) for gradient in gradients[0].values()) > 0
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-4, atol=1e-7)
