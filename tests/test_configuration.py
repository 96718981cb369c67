# SPDX-License-Identifier: Apache-2.0
"""The configuration: the paper's sizes, round trips, and refusals."""

import pytest
import torch
from huggingface_hub.errors import StrictDataclassClassValidationError, StrictDataclassFieldValidationError
from transformers import AutoConfig, BertConfig, TimmWrapperConfig, ViTConfig

from modeling_dre_slcl import DreSlclConfig, DreSlclModel

from .tiny_models import tiny_config, tiny_vit_config


@pytest.fixture(scope="module")
def paper_model():
    with torch.device("meta"):
        return DreSlclModel(DreSlclConfig())


def test_the_default_has_fewer_parameters_than_the_paper_allows(paper_model):
    assert 25e6 < sum(parameter.numel() for parameter in paper_model.parameters()) < 27e6


def test_the_default_has_the_sizes_of_the_paper(paper_model):
    config = DreSlclConfig()
    encoder = config.encoder_config
    assert isinstance(encoder, ViTConfig)
    assert (encoder.image_size, encoder.patch_size, encoder.hidden_size, encoder.num_hidden_layers) == (
        256,
        16,
        384,
        12,
    )
    assert (config.hidden_size, config.num_hidden_layers, config.projection_size) == (384, 2, 4096)
    assert (config.tile_size_px, config.tile_mpp) == (256, 0.5)
    assert len(paper_model.residual_encoder.layers) == 2
    assert paper_model.codebook.shape == (config.num_codewords, 384)
    assert paper_model.slide_projection.weight.shape == (4096, 384)
    assert paper_model.text_encoder is None
    assert isinstance(paper_model.text_projection, torch.nn.Identity)


@pytest.mark.parametrize("encoder", ["vit", "timm"])
@pytest.mark.parametrize("text", [False, True])
def test_a_saved_config_loads_equal(tmp_path, encoder, text):
    config = tiny_config(encoder, text=text, tile_mpp=0.25)
    config.save_pretrained(tmp_path)
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert isinstance(loaded, DreSlclConfig)
    assert loaded.to_diff_dict() == config.to_diff_dict()
    assert isinstance(loaded.encoder_config, ViTConfig if encoder == "vit" else TimmWrapperConfig)
    assert isinstance(loaded.text_config, BertConfig) if text else loaded.text_config is None


def test_an_encoder_may_be_given_as_a_dictionary():
    config = tiny_config(encoder_config={"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4})
    assert isinstance(config.encoder_config, ViTConfig)  # the default type
    config = tiny_config(encoder_config={"model_type": "dinov2", "hidden_size": 32, "num_attention_heads": 4})
    assert config.encoder_config.model_type == "dinov2"


def test_default_encoders_are_not_shared():
    first, second = DreSlclConfig(), DreSlclConfig()
    first.encoder_config.hidden_size = 1
    assert second.encoder_config.hidden_size == 384


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("num_codewords", 0, "`num_codewords` must be at least 1, got 0"),
        ("tile_size_px", 0, "`tile_size_px` must be at least 1, got 0"),
        ("num_attention_heads", 5, r"`hidden_size` \(32\) must be a multiple of `num_attention_heads` \(5\)"),
        ("report_hidden_size", 8, r"`projection_size` \(16\) must equal `report_hidden_size` \(8\)"),
        ("tile_mpp", 0.01, "`tile_mpp` must lie between 0.05 and 10 um/px, got 0.01"),
        ("tile_mpp", 20, "`tile_mpp` must lie between 0.05 and 10 um/px, got 20"),
    ],
)
def test_refuses_numbers_that_do_not_fit(field, value, message):
    with pytest.raises(StrictDataclassClassValidationError) as error:
        tiny_config(**{field: value})
    assert isinstance(error.value.__cause__, ValueError)
    with pytest.raises(ValueError, match=message):
        raise error.value.__cause__


@pytest.mark.parametrize(
    ("field", "value"), [("num_codewords", 2.5), ("tile_pooling", "max"), ("text_pooling", "sum")]
)
def test_refuses_wrong_types_and_choices(field, value):
    with pytest.raises(StrictDataclassFieldValidationError, match=field):
        tiny_config(**{field: value})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"encoder_config": tiny_vit_config(hidden_size=64)}, "`hidden_size` is 32, but the tile encoder is 64 wide"),
        ({"text": True, "report_hidden_size": 16}, "`report_hidden_size` is 16, but the text model is 24 wide"),
    ],
)
def test_a_model_refuses_parts_of_another_width(changes, message):
    with pytest.raises(ValueError, match=message):
        DreSlclModel(tiny_config(**changes))
