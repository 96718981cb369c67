# SPDX-License-Identifier: Apache-2.0
"""The settings in `examples/` are accepted, and give models of the size that they speak of."""

import dataclasses
from pathlib import Path

import pytest
import torch

from dre_slcl.training.build_model import build_model
from dre_slcl.training.config import load_config
from modeling_dre_slcl import DreSlclConfig, DreSlclModel

from . import tiny_dataset

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"


def num_parameters(model):
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.yaml")), ids=lambda path: path.stem)
def test_settings_are_accepted(path):
    config = load_config(path, {})
    fields = {item.name for item in dataclasses.fields(DreSlclConfig)}
    assert set(config.model_config) <= fields
    assert path.stem.replace("_", "-") in config.output_dir


def test_the_papers_model_has_less_than_27_million_parameters():
    config = load_config(EXAMPLES / "paper_tcga_lung.yaml", {})
    # The tile encoder's weights are the user's; DreSlclConfig's default is its architecture.
    with torch.device("meta"):
        model = DreSlclModel(DreSlclConfig(**config.model_config))
    assert 26e6 < num_parameters(model) < 27e6
    assert model.config.projection_size == model.config.report_hidden_size == 4096
    assert (model.config.encoder_config.image_size, model.config.encoder_config.patch_size) == (256, 16)
    assert model.text_encoder is None
    assert (config.bank_mode, config.codebook_refits, config.center_reports) == ("paper", [], False)


def test_the_small_model_is_small_and_builds(tmp_path):
    text = tiny_dataset.write_text_model(tmp_path / "text")
    config = load_config(EXAMPLES / "cpu_small.yaml", {"text_model": str(text)})
    parts = build_model(config, tile_size_px=64, tile_mpp=2.0)
    assert 0.5e6 < num_parameters(parts.model.tile_encoder) < 1.5e6
    features = parts.model.get_tile_features(torch.zeros(2, 3, 64, 64))
    assert features.shape == (2, 128)


def test_an_encoder_from_scratch_gets_refits_and_a_pretrained_one_a_low_rate():
    paper, small = (load_config(EXAMPLES / f"{name}.yaml", {}) for name in ("paper_tcga_lung", "cpu_small"))
    assert paper.tile_encoder is not None
    assert paper.learning_rate < small.learning_rate
    assert small.codebook_refits
    assert max(small.codebook_refits) < small.num_steps
