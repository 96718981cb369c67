# SPDX-License-Identifier: Apache-2.0
"""Numbers that are not finite, signals, and everything about a machine that must not change a run."""

import json
import logging
import os
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from dre_slcl.training.checkpoint import validate_checkpoint
from dre_slcl.training.config import TrainConfig
from dre_slcl.training.optimizer_step import OptimizerStep
from dre_slcl.training.stop_signals import StoppedBeforeTraining
from dre_slcl.training.train import train
from dre_slcl.training.trainer import Trainer

from . import tiny_dataset

TESTS = Path(__file__).parent


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp("faults")
    tiny_dataset.write_dataset(root / "data")
    tiny_dataset.write_text_model(root / "text")
    return root


def settings(data, tmp_path, **changes):
    simple = {
        "finalize_steps": 0,
        "codebook_refits": [],
        "checkpoint_steps": 1,
        "keep_checkpoints": 99,
        "num_steps": 6,
    }
    return tiny_dataset.train_settings(data, tmp_path / "run") | simple | changes


def check_what_is_on_disk(run, last_step):
    """All checkpoints up to the last sound step, valid and finite, and no model."""
    folder = Path(run["output_dir"])
    checkpoints = sorted((folder / "checkpoints").glob("step-*"))
    assert [int(path.name[5:]) for path in checkpoints] == list(range(last_step + 1))
    for path in checkpoints:
        validate_checkpoint(path)
        for file in path.glob("*.safetensors"):
            for name, value in load_file(file).items():
                assert torch.isfinite(value.double()).all(), (file, name)
    assert not (folder / "model").exists()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("step", [0, 3])
def test_a_feature_that_is_not_finite_names_its_slide_and_tile(data, tmp_path, step, value):
    run = settings(data, tmp_path, augment_flips=False)
    trainer = Trainer(TrainConfig(**run))
    plan = trainer.data.sampler.plan(step)
    encode, calls = trainer.unwrapped.get_tile_features, []

    def broken(pixel_values):
        features = encode(pixel_values)
        if not torch.is_grad_enabled():
            return features
        calls.append(len(features))
        if len(calls) == step + 1:  # tile 2 of the second slide of four with four tiles
            features = features.clone()
            features[4 + 2, 5] = value
        return features

    trainer.unwrapped.get_tile_features = broken
    name = trainer.data.source.slides[int(plan.slides[1])].slide_id
    expected = rf"loss of step {step} is not finite: the feature of tile {plan.sampled[1, 2]} of slide {name} is not"
    with pytest.raises(FloatingPointError, match=expected):
        trainer.run()
    check_what_is_on_disk(run, step)
    assert all(torch.isfinite(parameter).all() for parameter in trainer.unwrapped.parameters())


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
@pytest.mark.parametrize("part", ["tile_encoder", "residual_encoder", "logit_scale"])
def test_a_gradient_that_is_not_finite_names_step_and_slides_and_reaches_no_weight(data, tmp_path, part, value):
    run = settings(data, tmp_path)
    trainer = Trainer(TrainConfig(**run))
    parameter = next(p for name, p in trainer.unwrapped.named_parameters() if name.startswith(part))
    calls = []

    def break_gradient(gradient):
        calls.append(1)
        return gradient if len(calls) != 3 else gradient * 0 + value

    parameter.register_hook(break_gradient)
    names = trainer.data.names(trainer.data.sampler.plan(2))
    with pytest.raises(FloatingPointError, match=f"gradient of step 2 is not finite; slides of this process: {names}"):
        trainer.run()
    check_what_is_on_disk(run, 2)
    assert all(torch.isfinite(parameter).all() for parameter in trainer.unwrapped.parameters())


def test_a_report_encoding_that_is_not_finite_names_the_slide_before_training(data, tmp_path):
    run = settings(data, tmp_path)
    assert train(TrainConfig(**run | {"num_steps": 1})) == 0
    cached = sorted((Path(run["output_dir"]) / "report_cache").rglob("*.safetensors"))
    embedding = load_file(cached[0])["embedding"]
    embedding[1] = float("nan")
    save_file({"embedding": embedding}, cached[0])
    with pytest.raises(
        ValueError, match=r"encoding of the report of slide slide-\d+ is not finite \(1 of 6 are not\)"
    ):
        train(TrainConfig(**run | {"num_steps": 1}))


def test_a_weight_that_is_not_finite_is_never_saved(data, tmp_path):
    run = settings(data, tmp_path, checkpoint_steps=2, num_steps=2)
    trainer = Trainer(TrainConfig(**run))
    step = trainer.training_step.take

    def break_weight(batch):
        row = step(batch)
        if batch.plan.step == 1:
            trainer.unwrapped.slide_projection.weight.data[0, 0] = float("nan")
        return row

    trainer.training_step.take = break_weight
    with pytest.raises(FloatingPointError, match=r"`slide_projection.weight` \(model\)"):
        trainer.run()
    check_what_is_on_disk(run, 0)


def test_the_command_says_it_in_one_line_and_ends_with_1(data, tmp_path, caplog, monkeypatch):
    from dre_slcl.training import train as command

    run = settings(data, tmp_path)
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(run))
    monkeypatch.setattr(OptimizerStep, "descend", lambda self, plan: self.finite.check_gradient(float("nan"), plan))
    with caplog.at_level(logging.ERROR):
        assert command.main(["--config", str(path)]) == 1
    assert "gradient of step 0 is not finite" in caplog.records[-1].message


def test_a_signal_before_there_is_anything_to_save_ends_the_run(data, tmp_path, monkeypatch):
    run = settings(data, tmp_path)
    trainer = Trainer(TrainConfig(**run))

    def fill(*args, **kwargs):
        os.kill(os.getpid(), 15)
        raise AssertionError("The signal did not act.")

    monkeypatch.setattr(trainer.filler, "fill", fill)
    with pytest.raises(StoppedBeforeTraining) as stopped:
        trainer.run()
    assert stopped.value.number == 15
    assert list((Path(run["output_dir"]) / "checkpoints").iterdir()) == []


def test_a_signal_during_a_validation_leaves_it_for_the_next_start(tmp_path):
    tiny_dataset.write_dataset(tmp_path / "data", held_out=6)
    tiny_dataset.write_text_model(tmp_path / "text")
    run = settings(tmp_path, tmp_path, validation_split="val", validation_steps=2, num_steps=4, checkpoint_steps=100)
    assert train(TrainConfig(**run | {"output_dir": str(tmp_path / "whole")})) == 0
    trainer = Trainer(TrainConfig(**run))
    read = trainer.validator.source.read

    def told_to_stop(slide, tiles):
        os.kill(os.getpid(), 15)
        return read(slide, tiles)

    trainer.validator.source.read = told_to_stop
    assert trainer.run() == 15
    assert trainer.progress.validation_pending
    assert train(TrainConfig(**run)) == 0
    rows = {}
    for folder in ("whole", "run"):
        lines = [json.loads(line) for line in (tmp_path / folder / "metrics.jsonl").read_text().splitlines()]
        times = ("seconds", "per_second")
        rows[folder] = [{name: v for name, v in line.items() if not name.endswith(times)} for line in lines]
    assert rows["run"] == rows["whole"]
