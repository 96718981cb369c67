# SPDX-License-Identifier: Apache-2.0
"""Real slides of several scanners with their reports, from a manifest to a vector; skipped where they are absent."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, pipeline

from dre_slcl.training.build_dataset import build_dataset
from dre_slcl.training.config import TrainConfig
from dre_slcl.training.demo.text_model import write_text_model
from dre_slcl.training.manifest import read_manifest
from dre_slcl.training.tile_source import TileSource
from dre_slcl.training.train import train
from modeling_dre_slcl import SlideFeatureExtractionPipeline
from modeling_dre_slcl.slide_reader import SlideReader
from modeling_dre_slcl.tile_grid import TileGridConfig

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
GRID = TileGridConfig(tile_size_px=64, tile_mpp=4.0)
NO_MPP = {"TCGA-CR-7395-01A-01-TS1", "TCGA-XK-AAJU"}
LARGEST = "lung-scc_HE3"
ENCODER = {
    "model_type": "timm_wrapper",
    "architecture": "resnet18",
    "model_args": {"layers": [1, 1, 1, 1], "channels": [32, 32, 64, 64], "norm_layer": "groupnorm"},
}

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (DATA / "manifest.csv").is_file(), reason="the real slides are not on this machine"),
]


@pytest.fixture(scope="module")
def manifest():
    return read_manifest(DATA / "manifest.csv")


@pytest.fixture(scope="module")
def built(tmp_path_factory, manifest):
    out = tmp_path_factory.mktemp("real") / "dataset"
    return build_dataset(manifest, out, GRID, num_workers=1, progress=False), out


@pytest.fixture(scope="module")
def trained(built, tmp_path_factory):
    root = tmp_path_factory.mktemp("run")
    source = TileSource(built[1], "train")
    text = write_text_model(root / "text", [row.report for row in source.slides], seed=0, hidden_size=64)
    config = TrainConfig(
        dataset=str(built[1]),
        output_dir=str(root / "out"),
        text_model=str(text),
        tile_encoder_config=ENCODER,
        model_config={"num_codewords": 4, "text_projection": "linear", "projection_size": 32},
        slides_per_batch=4,
        tiles_per_slide=8,
        num_steps=6,
        warmup_steps=2,
        finalize_steps=4,
        learning_rate=1e-3,
        codebook_refits=[3],
        checkpoint_steps=3,
        log_steps=1,
        num_workers=0,
    )
    assert train(config) == 0
    return root / "out"


def test_every_slide_with_a_resolution_is_tiled(built, manifest):
    summary, out = built
    refused = [json.loads(line) for line in (out / "refused.jsonl").read_text().splitlines()]
    assert {row["slide_id"]: row["reason"] for row in refused} == dict.fromkeys(NO_MPP, "mpp_missing")
    assert (summary.exit_code, summary.num_ok) == (3, len(manifest) - len(NO_MPP))
    source = TileSource(out, "train")
    reports = {row.slide_id: row.report for row in manifest}
    assert {row.slide_id for row in source.slides} == set(reports) - NO_MPP
    for place, row in enumerate(source.slides):
        assert row.report == reports[row.slide_id]
        assert row.num_tiles >= 4
        tile = source.read(place, [row.num_tiles // 2])[0]
        assert tile.std() > 4, f"{row.slide_id}: a tile without structure"


def test_stored_tiles_are_those_that_the_slide_gives(built, manifest):
    source = TileSource(built[1], "train")
    paths = {row.slide_id: row.path for row in manifest}
    for place in range(0, len(source.slides), 5):
        row = source.slides[place]
        with SlideReader(paths[row.slide_id], mpp=row.mpp) as reader:
            x, y = map(int, row.tile_xy[-1])
            read = reader.read_tile(x, y, tile_size_px=64, tile_mpp=4.0)
        stored = source.read(place, [row.num_tiles - 1])[0]
        assert abs(read.astype(int) - stored).mean() < 4, row.slide_id  # JPEG


def test_training_on_them_gives_finite_losses_and_a_full_bank(trained):
    rows = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, 11))
    assert all(0 < row["loss"] < 20 and row["gradient_norm"] > 0 for row in rows)
    assert rows[-1]["bank_coverage"] == 1


def test_the_largest_slide_through_the_pipeline(trained, built, manifest):
    model = str(trained / "model")
    embed = pipeline("slide-feature-extraction", model=model, pipeline_class=SlideFeatureExtractionPipeline)
    path = next(row.path for row in manifest if row.slide_id == LARGEST)
    found = embed(path, return_tile_features=True)
    source = TileSource(built[1], "train")
    [row] = [row for row in source.slides if row.slide_id == LARGEST]
    assert found["tile_xy"].tolist() == row.tile_xy.tolist()  # the geometry of the dataset came with the model
    assert found["codeword_counts"].sum() == found["num_tiles"] == row.num_tiles
    assert found["slide_embedding"].shape == (64,)
    assert all(torch.isfinite(found[name]).all() for name in ("slide_embedding", "slide_projection", "residuals"))
    text = AutoTokenizer.from_pretrained(model)([row.report], return_tensors="pt", truncation=True)
    with torch.no_grad():
        report = embed.model.get_text_features(text["input_ids"], text["attention_mask"])
    assert -1.001 < float(report[0] @ found["slide_projection"]) < 1.001
