# SPDX-License-Identifier: Apache-2.0
"""Bank modes in a real trainer: gradients against autograd through all tiles, and runs that resume to the bit."""

from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file

from dre_slcl.training.config import TrainConfig
from dre_slcl.training.metrics_log import read_metrics
from dre_slcl.training.trainer import Trainer
from modeling_dre_slcl.slide_state import fixed_point, from_fixed_point

from . import tiny_dataset


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp("bank_modes")
    tiny_dataset.write_dataset(root / "data")
    tiny_dataset.write_text_model(root / "text")
    return root


def make_trainer(data, folder, **changes):
    """A trainer without dropout and augmentation, with a float32 bank."""
    settings = tiny_dataset.train_settings(data, folder)
    model_config = settings["model_config"] | {"hidden_dropout_prob": 0.0}
    settings |= {"model_config": model_config, "augment_flips": False, "augment_stain": 0.0, "bank_dtype": "float32"}
    return Trainer(TrainConfig(**settings | {"finalize_steps": 0, "encode_batch_size": 3} | changes))


def one_step(trainer):
    """Takes the first step; returns its loss, the gradients before the optimizer saw them, and the plan."""
    trainer._resume()
    # In float64, so that what is left of a difference is one of formulas.
    processor, bank = trainer.parts.image_processor, trainer.unwrapped.memory_bank
    in_float32 = processor.tiles_to_pixel_values
    processor.tiles_to_pixel_values = lambda *arguments: in_float32(*arguments).double()
    trainer.unwrapped.double().train()
    for slide in range(len(bank.counts)):
        tiles = torch.arange(int(bank.slide_start[slide + 1] - bank.slide_start[slide]))
        features = encode_slide(trainer, trainer.data.owned[slide])[None].detach()
        bank.write(torch.tensor([slide]), tiles[None], features, trainer.unwrapped.codebook, 0)
    found = {}
    trainer.optimizer_step.descend = lambda plan: found.update(gradients(trainer.unwrapped)) or 0.0
    batch = next(trainer._batches(0))
    row = trainer.training_step.take(batch)
    return row["loss"], found, batch.plan


def encode_slide(trainer, slide):
    pixels = torch.from_numpy(trainer.data.source.read(slide, range(trainer.data.source.slides[slide].num_tiles)))
    values = trainer.parts.image_processor.tiles_to_pixel_values(pixels, torch.device("cpu"))
    return trainer.unwrapped.get_tile_features(values)


def gradients(model):
    return {name: value.grad.clone() for name, value in model.named_parameters() if value.grad is not None}


def all_tiles(trainer, plan):
    """Loss and gradients of the step's slides with all their tiles in one graph.

    Sums over tiles that are not sampled are kept on a grid (`slide_state`), so those tiles are rounded to it here too.
    """
    sizes = [trainer.data.source.slides[slide].num_tiles for slide in plan.slides]
    mask = torch.arange(max(sizes))[None] < torch.tensor(sizes)[:, None]
    model, encoded = trainer.unwrapped, [encode_slide(trainer, slide) for slide in plan.slides.tolist()]
    for features, sampled in zip(encoded, plan.sampled.tolist(), strict=True):
        others = [tile for tile in range(len(features)) if tile not in sampled]
        features.data[others] = from_fixed_point(fixed_point(features.detach()[others]))
    features = torch.nn.utils.rnn.pad_sequence(encoded, batch_first=True)
    model.zero_grad()
    outputs = model.get_slide_features(features, mask)
    loss = model.contrast(outputs, **trainer.data.texts(plan, torch.device("cpu"))).loss
    loss.backward()
    return loss.item(), gradients(model)


def distance(found, expected, part):
    names = [name for name in expected if name.startswith(part)]
    difference = sum(float((found[name] - expected[name]).double().square().sum()) for name in names)
    return (difference / sum(float(expected[name].double().square().sum()) for name in names)) ** 0.5


# One of several processes has its tensors moved from "cpu" to "cpu:0", which copies them, as a GPU does.
@pytest.mark.parametrize("device", ["cpu", "cpu:0"])
def test_exact_is_the_gradient_through_all_tiles(data, tmp_path, monkeypatch, device):
    monkeypatch.setattr(Accelerator, "device", torch.device(device))
    trainer = make_trainer(data, tmp_path, bank_mode="exact", tiles_per_slide=2)
    loss, found, plan = one_step(trainer)
    expected_loss, expected = all_tiles(trainer, plan)
    assert loss == pytest.approx(expected_loss, rel=1e-9)
    assert found.keys() == expected.keys()
    for part in ("tile_encoder", "residual_encoder", "slide_projection"):
        assert distance(found, expected, part) < 1e-8, part


def test_two_pass_has_the_value_of_all_tiles_and_the_weighted_gradient_of_the_sampled(data, tmp_path):
    trainer = make_trainer(data, tmp_path, bank_mode="two_pass")
    loss, found, plan = one_step(trainer)
    expected_loss, expected = all_tiles(trainer, plan)
    assert loss == pytest.approx(expected_loss, rel=1e-9)
    assert distance(found, expected, "residual_encoder") < 1e-8
    assert 0.01 < distance(found, expected, "tile_encoder") < 1


@pytest.mark.parametrize("mode", ["full", "corrected"])
def test_with_a_fresh_bank_the_value_is_that_of_all_tiles(data, tmp_path, mode):
    trainer = make_trainer(data, tmp_path, bank_mode=mode)
    loss, found, plan = one_step(trainer)
    expected_loss, expected = all_tiles(trainer, plan)
    assert loss == pytest.approx(expected_loss, rel=1e-5)
    assert distance(found, expected, "residual_encoder") < 1e-4


def weights(folder):
    return load_file(max((Path(folder) / "checkpoints").glob("step-*")) / "model.safetensors")


def test_a_gradient_check_is_logged_and_changes_nothing(data, tmp_path):
    for name, every in (("without", 0), ("with", 2)):
        settings = tiny_dataset.train_settings(data, tmp_path / name) | {"bank_mode": "corrected", "log_steps": 3}
        Trainer(TrainConfig(**settings | {"gradient_check_steps": every, "finalize_steps": 0})).run()
    first, second = (weights(tmp_path / name) for name in ("without", "with"))
    assert all(torch.equal(first[name], second[name]) for name in first)
    rows = read_metrics(tmp_path / "with" / "metrics.jsonl")
    measured = {row["step"]: row["gradient_cosine"] for row in rows if "gradient_cosine" in row}
    assert list(measured) == [2, 4, 6, 8]
    assert all(0 < cosine <= 1 + 1e-9 for cosine in measured.values())


def test_the_gradient_check_finds_the_exact_mode_exact(data, tmp_path):
    trainer = make_trainer(data, tmp_path, bank_mode="exact", gradient_check_steps=1)
    trainer._resume()
    trainer.model.train()
    assert trainer.training_step.take(next(trainer._batches(0)))["gradient_cosine"] == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("stop_after", [2, 5])
def test_strata_refresh_and_dropout_resume_to_the_bit(data, tmp_path, stop_after):
    changes = {"bank_mode": "corrected", "refresh_per_slide": 3, "stale_dropout": 0.3, "codebook_refits": [4]}
    whole = Trainer(TrainConfig(**tiny_dataset.train_settings(data, tmp_path / "whole") | changes))
    whole.run()
    settings = TrainConfig(**tiny_dataset.train_settings(data, tmp_path / "parts") | changes)
    stopped = Trainer(settings)
    after_step = stopped._after_step

    def stop(plan, row, bar):
        if plan.step + 1 == stop_after:
            stopped.signals.received = 15
        return after_step(plan, row, bar)

    stopped._after_step = stop
    assert stopped.run() == 15
    Trainer(settings).run()
    first, second = weights(tmp_path / "whole"), weights(tmp_path / "parts")
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_refreshed_tiles_are_in_the_bank_before_the_step_reads_it(data, tmp_path):
    trainer = make_trainer(data, tmp_path, bank_mode="corrected", refresh_per_slide=5)
    trainer._resume()
    batch = next(trainer._batches(0))
    trainer.unwrapped.memory_bank.written_step.fill_(-1)
    trainer.unwrapped.memory_bank.feature_sums.zero_()
    trainer.unwrapped.memory_bank.counts.zero_()
    trainer.training_step.take(batch)
    bank, places = trainer.unwrapped.memory_bank, trainer.data.bank_places(batch.plan.slides)
    written = torch.zeros_like(bank.written_step, dtype=torch.bool)
    for place, *tiles in zip(places, batch.plan.sampled, batch.plan.refreshed, strict=True):
        for tile in (tile for part in tiles for tile in part.tolist() if tile >= 0):
            written[bank.slide_start[place] + tile] = True
    assert torch.equal(bank.written_step >= 0, written)
    assert (batch.plan.refreshed >= 0).any()
