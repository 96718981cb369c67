# SPDX-License-Identifier: Apache-2.0
"""Fine-tuning on stored tile features: what it sees is what the model sees, and it learns what a probe cannot."""

import argparse
import json
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from sklearn.metrics import roc_auc_score

from dre_slcl.training.evaluation.case_folds import make_folds
from dre_slcl.training.evaluation.evaluate_command import add_arguments, run
from dre_slcl.training.evaluation.fine_tuning import (
    FineTuning,
    evaluate_fine_tuning,
    random_residual_encoder,
    residual_table,
)
from dre_slcl.training.evaluation.label_table import TaskLabels

from .tiny_models import tiny_model

NUM_SLIDES, NUM_TILES = 60, 24


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Threads cost more than they bring to layers this small, above all where other work runs."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def model():
    return tiny_model(seed=7).eval()


@pytest.fixture(scope="module")
def stored(model, tmp_path_factory):
    """Slides of two classes: those of class 1 hold tiles that lean to one direction, about one codeword."""
    folder = tmp_path_factory.mktemp("features")
    random = torch.Generator().manual_seed(0)
    features, classes = [], np.arange(NUM_SLIDES) // 2 % 2
    direction = F.normalize(torch.randn(model.config.hidden_size, generator=random), dim=0)
    for slide, is_one in enumerate(classes.tolist()):
        tiles = model.codebook[torch.randint(len(model.codebook), (NUM_TILES,), generator=random)].float()
        tiles = F.normalize(tiles, dim=-1) + 0.3 * torch.randn(tiles.shape, generator=random)
        tiles = F.normalize(tiles + 0.6 * is_one * direction, dim=-1)
        path = folder / f"s{slide:02}.safetensors"
        tensors = {"tile_features": tiles, "tile_xy": torch.zeros(NUM_TILES, 2, dtype=torch.int32)}
        save_file(tensors, path, metadata={"slide_id": path.stem})
        features.append(tiles)
    (folder / "torn.safetensors").write_bytes(b"torn")
    return folder, torch.stack(features), classes


@pytest.fixture(scope="module")
def table(model, stored):
    found = residual_table(model, stored[0])
    return replace(found, case_ids=[f"case{slide // 2}" for slide in range(NUM_SLIDES)])


def test_a_row_is_what_the_residual_encoder_sees_of_the_slide(model, stored, table):
    assert table.ids == [f"s{slide:02}" for slide in range(NUM_SLIDES)]
    assert [(item["id"], item["reason"]) for item in table.left_out] == [("torn", "unreadable")]
    method = FineTuning(model.residual_encoder, 2)
    with torch.no_grad():
        expected = model.get_slide_features(stored[1]).slide_embedding
        found = method.start.eval()(*method._tensors(table.features)).slide_embedding
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_it_learns_on_held_out_cases_and_leaves_the_model_as_it_was(model, stored, table):
    before = {name: value.clone() for name, value in model.state_dict().items()}
    train = np.arange(40)
    head = FineTuning(model.residual_encoder, 2)
    head.fit(table.features[train], stored[2][train], table.case_ids[:40], 0)
    stated = head.predict(table.features[40:])
    np.testing.assert_allclose(stated.sum(axis=1), 1)
    assert roc_auc_score(stored[2][40:], stated[:, 1]) > 0.9
    assert head.settings["epochs"] >= 1
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])
    # Both parts were trained.
    assert not torch.equal(head._encoder.norm.weight, head.start.norm.weight)


def test_the_same_seed_gives_the_same_and_leaves_torchs_own_alone(model, stored, table):
    state = torch.get_rng_state()
    runs = [
        FineTuning(model.residual_encoder, 2)
        .fit(table.features[:20], stored[2][:20], table.case_ids[:20], seed)
        .predict(table.features[20:])
        for seed in (0, 0, 1)
    ]
    assert torch.equal(torch.get_rng_state(), state)
    np.testing.assert_array_equal(runs[0], runs[1])
    assert not np.allclose(runs[0], runs[2])


def test_training_stops_where_the_validation_part_is_best(model, stored, table):
    is_validation = np.arange(20) >= 12
    wrong = stored[2][:20].copy()
    wrong[12:] = 1 - wrong[12:]  # the better it is learned, the worse it is here
    head = FineTuning(model.residual_encoder, 2, learning_rate=1e-2)
    head.fit(table.features[:20], wrong, table.case_ids[:20], 0, is_validation)
    assert head.settings["epochs"] <= 3


def test_labels_that_are_not_known_do_not_count(model, stored, table):
    labels = np.stack([stored[2], 1 - stored[2]], axis=1).astype(float)
    labels[::3, 1] = np.nan
    head = FineTuning(model.residual_encoder, 2, "multilabel")
    head.fit(table.features[:40], labels[:40], table.case_ids[:40], 0)
    stated = head.predict(table.features[40:])
    assert roc_auc_score(labels[40:, 0], stated[:, 0]) > 0.85
    assert roc_auc_score(1 - labels[40:, 0], stated[:, 1]) > 0.85


def test_fine_tuning_stands_beside_random_weights_shuffled_labels_and_chance(model, stored, table):
    labels = TaskLabels("subtype", "classification", stored[2], ["normal", "tumor"])
    folds = make_folds(labels, table.case_ids, 3, [0])
    result = evaluate_fine_tuning(model, table, labels, folds, seeds=[0], num_bootstrap=20)
    assert [(row.method, row.encoder) for row in result.rows] == [
        ("fine_tuning", "slides"),
        ("fine_tuning", "random weights"),
        ("fine_tuning", "shuffled labels"),
        ("chance", "chance"),
    ]
    values = [row.scores["auroc"].value for row in result.rows]
    assert values[0] > 0.9
    assert abs(values[2] - 0.5) < 0.3
    assert result.num_items == NUM_SLIDES


def test_the_command_fine_tunes_beside_its_null_rows(model, stored, tmp_path, capsys):
    model.save_pretrained(tmp_path / "model")
    ids = [f"s{slide:02}" for slide in range(NUM_SLIDES)]
    cases = [f"case{slide // 2}" for slide in range(NUM_SLIDES)]
    columns = {"slide_id": ids, "case_id": cases, "slide_embedding": np.ones((NUM_SLIDES, 4)).tolist()}
    pq.write_table(pa.table(columns), tmp_path / "slides.parquet")
    rows = [f"{id_},{case},{'tumor' if c else 'normal'}\n" for id_, case, c in zip(ids, cases, stored[2], strict=True)]
    (tmp_path / "labels.csv").write_text("slide_id,case_id,kind\n" + "".join(rows))
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    words = ["--embeddings", tmp_path / "slides.parquet", "--labels", tmp_path / "labels.csv", "--task", "kind"]
    words += ["--methods", "fine_tuning", "--model", tmp_path / "model", "--tile-features", stored[0], "--folds", 3]
    words += ["--seeds", 0, "--num-bootstrap", 20, "--out", tmp_path / "out"]
    assert run(parser.parse_args(list(map(str, words)))) == 3  # one file is torn
    assert "| fine_tuning | random weights (null) |" in capsys.readouterr().out
    (result,) = json.loads((tmp_path / "out" / "results.json").read_text())
    assert result["task"] == "kind, fine-tuning"
    assert result["rows"][0]["scores"]["auroc"]["value"] > 0.9
    assert result["protocol"]["left_out"][0]["id"] == "torn"


def test_random_weights_are_others_with_the_same_codebook(model):
    first, second = random_residual_encoder(model, 0), random_residual_encoder(model, 1)
    assert torch.equal(first.codebook, model.codebook)
    weight = model.residual_encoder.layers[0].intermediate.weight
    assert not torch.equal(first.layers[0].intermediate.weight, weight)
    assert not torch.equal(first.layers[0].intermediate.weight, second.layers[0].intermediate.weight)


def test_what_does_not_fit_is_refused(model, table, tmp_path):
    with pytest.raises(ValueError, match=r"needs rows of \d+ numbers, residuals and counts"):
        FineTuning(model.residual_encoder, 2).fit(np.ones((4, 3)), np.array([0, 1, 0, 1]), list("abcd"), 0)
    with pytest.raises(ValueError, match="this task is of kind survival"):
        FineTuning(model.residual_encoder, 2, "survival")
    with pytest.raises(ValueError, match="holds no files of tile features"):
        residual_table(model, tmp_path)
