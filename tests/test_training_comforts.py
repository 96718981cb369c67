# SPDX-License-Identifier: Apache-2.0
"""Averages, accumulation, validation, early stopping, the summary and the dry run."""

import json
import math
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from dre_slcl.training.checkpoint import CheckpointError
from dre_slcl.training.config import TrainConfig
from dre_slcl.training.metrics.recall_at_k.rank_gallery import rank_gallery
from dre_slcl.training.metrics_log import read_metrics
from dre_slcl.training.train import dry_run, train
from dre_slcl.training.trainer import Trainer
from modeling_dre_slcl import DreSlclModel

from . import tiny_dataset
from .tiny_models import IMAGE_SIZE, tiny_model


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp("comforts")
    tiny_dataset.write_dataset(root / "data", held_out=8)
    tiny_dataset.write_text_model(root / "text")
    return root


def settings(data, tmp_path, **changes):
    simple = {"finalize_steps": 0, "codebook_refits": [], "checkpoint_steps": 100}
    return tiny_dataset.train_settings(data, tmp_path / "run") | simple | changes


def newest(folder):
    return max((Path(folder) / "checkpoints").glob("step-*"))


@pytest.mark.parametrize("parts", [2, 3, 8])
def test_gradients_of_accumulated_steps_are_those_of_the_whole_step(parts):
    model = tiny_model().double().train()
    generator = torch.Generator().manual_seed(0)
    tiles = torch.randn(4, 5, 3, IMAGE_SIZE, IMAGE_SIZE, generator=generator, dtype=torch.float64)
    reports = torch.randn(4, 16, generator=generator, dtype=torch.float64)
    expected, found = {}, {}
    most = {}  # tiles that the encoder saw at once
    for number, gradients in ((1, expected), (parts, found)):
        sizes = most[number] = []
        hook = model.tile_encoder.register_forward_pre_hook(
            lambda module, args, kwargs, sizes=sizes: sizes.append(len(kwargs["pixel_values"])), with_kwargs=True
        )
        model.accumulation_steps = number
        model.zero_grad()
        outputs = model(pixel_values=tiles, report_embeds=reports)
        outputs.loss.backward()
        hook.remove()
        gradients |= {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        gradients["loss"] = outputs.loss.detach()
    assert max(most[1]) == 20
    assert max(most[parts]) == math.ceil(20 / parts)
    assert expected.keys() == found.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-6, atol=1e-12)


def test_accumulation_changes_no_loss(data, tmp_path):
    found = []
    for parts in (1, 4):
        run = settings(data, tmp_path / str(parts), accumulation_steps=parts, bank_dtype="float32", num_steps=4)
        run |= {"learning_rate": 1e-5, "head_learning_rate": 1e-5}
        assert train(TrainConfig(**run)) == 0
        found.append([row["loss"] for row in read_metrics(Path(run["output_dir"]) / "metrics.jsonl")])
    assert found[1] == pytest.approx(found[0], rel=1e-6)


def test_the_average_is_the_recursion_over_the_weights_of_all_steps_and_becomes_the_model(data, tmp_path):
    run = settings(data, tmp_path, num_steps=5, checkpoint_steps=1, keep_checkpoints=9)
    run |= {"ema_decay": 0.4, "final_weights": "ema"}
    assert train(TrainConfig(**run)) == 0
    folders = sorted((Path(run["output_dir"]) / "checkpoints").glob("step-*"))
    average = {name: value.double() for name, value in load_file(folders[0] / "average.safetensors").items()}
    for step, folder in enumerate(folders[1:], start=1):
        decay = min(0.4, (1 + step) / (10 + step))
        weights = load_file(folder / "model.safetensors")
        average = {name: decay * value + (1 - decay) * weights[name].double() for name, value in average.items()}
    model = DreSlclModel.from_pretrained(Path(run["output_dir"]) / "model").state_dict()
    last = load_file(folders[-1] / "model.safetensors")
    for name, value in average.items():
        torch.testing.assert_close(model[name].double(), value, rtol=1e-5, atol=1e-7)
    assert any(not torch.equal(model[name], last[name]) for name in average)


def slow_validation(folder, data):
    """Mean average precision of a saved model on the held-out slides, one tile and one slide at a time."""
    from transformers import AutoImageProcessor

    from dre_slcl.training.reports import ReportEncoder
    from dre_slcl.training.tile_source import TileSource

    model, processor = DreSlclModel.from_pretrained(folder).eval(), AutoImageProcessor.from_pretrained(folder)
    source = TileSource(data / "data", "val")
    text = ReportEncoder.from_pretrained(str(data / "text"), pooling="mean", max_tokens=512)
    slides, cases = [], [row.case_id for row in source.slides]
    reports = {row.case_id: row.report for row in source.slides}
    with torch.no_grad():
        for place in range(len(source.slides)):
            pixels = next(iter(source.iter_batches(place, 10_000)))
            features = torch.cat(
                [model.get_tile_features(processor.tiles_to_pixel_values(p[None], "cpu")) for p in pixels]
            )
            slides.append(model.get_slide_features(features[None]).slide_projection[0])
        texts = torch.stack([model.get_report_projection(text.encode([report]))[0] for report in reports.values()])
    similarity = (torch.stack(slides) @ texts.T).numpy()
    relevant = torch.tensor([[case == other for other in reports] for case in cases]).numpy()
    return float(rank_gallery(similarity, relevant)[1].mean())


def test_the_best_model_of_all_validations_is_kept_and_training_stops_without_a_better_one(data, tmp_path):
    run = settings(data, tmp_path, num_steps=40, learning_rate=1e-9, head_learning_rate=1e-9)
    run |= {"validation_split": "val", "validation_steps": 2, "early_stopping_patience": 3, "final_weights": "best"}
    assert train(TrainConfig(**run)) == 0
    folder = Path(run["output_dir"])
    rows = [row for row in read_metrics(folder / "metrics.jsonl") if row.get("event") == "validation"]
    # Nothing is learned, so the first validation stays the best and the next three end the training.
    assert [row["step"] for row in rows] == [2, 4, 6, 8]
    assert rows[0]["validation_slides"] == 8
    assert rows[0]["validation_mean_average_precision"] == pytest.approx(slow_validation(folder / "best_model", data))
    summary = json.loads((folder / "summary.json").read_text())
    assert (summary["steps"], summary["stopped_early"], summary["best_step"]) == (8, True, 2)
    best, final = (load_file(folder / name / "model.safetensors") for name in ("best_model", "model"))
    assert all(torch.equal(best[name], final[name]) for name in best)
    assert train(TrainConfig(**run)) == 0  # nothing is left to do
    assert len([row for row in read_metrics(folder / "metrics.jsonl") if row.get("event")]) == 4


def test_the_summary_accounts_for_all_of_the_time_and_every_tile(data, tmp_path):
    run = settings(data, tmp_path, num_steps=6, tiles_per_slide=3, log_steps=2)
    assert train(TrainConfig(**run)) == 0
    folder = Path(run["output_dir"])
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["tiles"] == 6 * 4 * 3
    assert sum(summary["share"].values()) == pytest.approx(1, abs=1e-3)
    for row in read_metrics(folder / "metrics.jsonl"):
        parts = [value for name, value in row.items() if name.endswith("_seconds")]
        assert sum(parts) == pytest.approx(row["seconds"])
        assert min(row["encode_seconds"], row["bank_seconds"], row["loss_seconds"], row["backward_seconds"]) > 0
    assert "| tile encoder |" in (folder / "summary.md").read_text()
    with Image.open(folder / "curves.png") as curves:
        assert curves.size[0] > 300


def tree(folder):
    return sorted(str(path) for path in folder.rglob("*"))


def test_a_dry_run_prints_a_plan_and_leaves_nothing(data, tmp_path, capsys):
    run = settings(data, tmp_path, num_steps=30, ema_decay=0.9)
    before = tree(tmp_path), tree(data)
    assert dry_run(TrainConfig(**run)) == 0
    assert (tree(tmp_path), tree(data)) == before
    plan = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert plan["slides"] == 12
    assert plan["epochs"] == 30 * 4 / 12
    # Features of 16 half floats, a step and a codeword for each tile; sums and counts for each slide; the tiles of 4
    # codewords and of a step, and three numbers that tell of drift.
    tables = plan["tiles"] * (16 * 2 + 4 + 2) + 12 * 4 * (16 * 8 + 8) + 13 * 8 + (4 + 1 + 3) * 8
    assert plan["bank_bytes"] == tables
    assert plan["hours"] > 0
    assert plan["tiles_per_second"] > 0
    model = Trainer(TrainConfig(**run)).unwrapped
    assert plan["parameters_trained"] == sum(p.numel() for p in model.parameters() if p.requires_grad)


def test_a_dry_run_refuses_what_would_fail(data, tmp_path, monkeypatch):
    run = settings(data, tmp_path, num_steps=2)
    with pytest.raises(ValueError, match="there are only 6 cases"):
        dry_run(TrainConfig(**run | {"slides_per_batch": 7}))
    assert not Path(run["output_dir"]).exists()
    assert train(TrainConfig(**run)) == 0
    with pytest.raises(CheckpointError, match="`num_steps` was 2, is 3"):
        dry_run(TrainConfig(**run | {"num_steps": 3}))
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 1000}))
    with pytest.raises(ValueError, match=r"checkpoints and models need .* lower `keep_checkpoints`"):
        dry_run(TrainConfig(**run))


def test_trackers_get_every_number_and_a_missing_one_is_refused(data, tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = settings(data, tmp_path, num_steps=3, trackers=["tensorboard"])
    assert train(TrainConfig(**run)) == 0
    folder = Path(run["output_dir"])
    (events,) = folder.rglob("events.out.tfevents.*.0")
    accumulator = EventAccumulator(str(events.parent))
    accumulator.Reload()
    rows = read_metrics(folder / "metrics.jsonl")
    found = [(event.step, event.value) for event in accumulator.Scalars("loss")]
    assert found == [(row["step"], pytest.approx(row["loss"])) for row in rows]
    with pytest.raises(ValueError, match=r"wandb is not installed; `pip install \"dre-slcl\[wandb\]\"`"):
        train(TrainConfig(**run | {"trackers": ["wandb"], "output_dir": str(tmp_path / "other")}))


def test_slides_with_hashed_names_and_no_pixels_are_found_by_the_private_file(data, tmp_path):
    from dre_slcl.training.tile_source import TileSource
    from modeling_dre_slcl.slide_reader import SlideReader

    from .slide_cohort import GRID, build, write_slide

    (tmp_path / "slides").mkdir()
    names = [f"MEIER-{number}" for number in range(4)]
    for number, name in enumerate(names):
        write_slide(tmp_path / "slides" / f"{name}.tif", number)
    lines = [f"{name},slides/{name}.tif,CASE-{name},{tiny_dataset.WORDS[i]},train" for i, name in enumerate(names)]
    (tmp_path / "m.csv").write_text("\n".join(["slide_id,path,case_id,report,split", *lines]) + "\n")
    private = tmp_path / "private.json"
    build(tmp_path / "m.csv", tmp_path / "hashed", pixels="none", private_ids=private)
    source = TileSource(tmp_path / "hashed", "train", private_ids=private)
    ids = json.loads(private.read_text())["slides"]
    for place, row in enumerate(source.slides):
        assert row.slide_id not in names
        x, y = row.tile_xy[3].tolist()
        with SlideReader(tmp_path / "slides" / f"{ids[row.slide_id]['slide_id']}.tif") as reader:
            expected = reader.read_tile(x, y, tile_size_px=GRID.tile_size_px, tile_mpp=GRID.tile_mpp)
        assert (source.read(place, [3])[0] == expected).all()
    run = settings(data, tmp_path, dataset=str(tmp_path / "hashed"), num_steps=2, encoder_image_size_px=16)
    with pytest.raises(ValueError, match="`private_ids` if it was built with --hash-ids"):
        train(TrainConfig(**run))
    assert train(TrainConfig(**run | {"private_ids": str(private), "num_workers": 1})) == 0
    trained = b"".join(path.read_bytes() for path in Path(run["output_dir"]).rglob("*") if path.is_file())
    assert b"MEIER" not in trained
    (tmp_path / "slides" / f"{names[0]}.tif").unlink()
    with pytest.raises(ValueError, match="1 of 4 slide files are not"):
        train(TrainConfig(**run | {"private_ids": str(private)}))
