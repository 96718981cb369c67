# SPDX-License-Identifier: Apache-2.0
"""The settings in `examples/` are accepted, and give models of the size that they speak of."""

import dataclasses
from pathlib import Path

import pytest
import torch

from dre_slcl.training.build_model import build_model
from dre_slcl.training.config import load_config
from dre_slcl.training.train import train
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
    config = load_config(EXAMPLES / "cpu_demo.yaml", {"text_model": str(text)})
    parts = build_model(config, tile_size_px=64, tile_mpp=2.0)
    assert 0.5e6 < num_parameters(parts.model.tile_encoder) < 1.5e6
    features = parts.model.get_tile_features(torch.zeros(2, 3, 64, 64))
    assert features.shape == (2, 128)


def test_an_encoder_from_scratch_gets_refits_and_a_pretrained_one_a_low_rate():
    paper, small = (load_config(EXAMPLES / f"{name}.yaml", {}) for name in ("paper_tcga_lung", "cpu_demo"))
    assert paper.tile_encoder is not None
    assert paper.learning_rate < small.learning_rate
    assert small.codebook_refits
    assert max(small.codebook_refits) < small.num_steps


def test_the_demo_settings_run_in_miniature(tmp_path):
    tiny_dataset.write_dataset(tmp_path / "data", num_slides=16)
    text = tiny_dataset.write_text_model(tmp_path / "text")
    changes = {"dataset": tmp_path / "data", "output_dir": tmp_path / "run", "text_model": text}
    changes |= {"num_steps": 4, "finalize_steps": 2, "warmup_steps": 1, "codebook_refits": "[2]", "num_workers": 0}
    config = load_config(EXAMPLES / "cpu_demo.yaml", {name: str(value) for name, value in changes.items()})
    assert train(config) == 0
    model = DreSlclModel.from_pretrained(tmp_path / "run" / "model")
    assert model.config.num_codewords == 8
    assert (tmp_path / "run" / "summary.md").exists()


def test_sixteen_processes_can_share_the_batch_of_several_machines():
    config = load_config(EXAMPLES / "multi_node.yaml", {})
    assert config.slides_per_batch % 16 == 0
    assert config.validation_split is not None
