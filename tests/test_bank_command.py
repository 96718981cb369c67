# SPDX-License-Identifier: Apache-2.0
"""A bank can be looked into, drawn, written for other tools, and started from what they wrote."""

import json
import shutil
from contextlib import ExitStack
from pathlib import Path

import cv2
import h5py
import numpy as np
import pytest
import torch

from dre_slcl.training.bank_command import open_bank
from dre_slcl.training.bank_start import match_tiles
from dre_slcl.training.config import TrainConfig
from dre_slcl.training.import_features import import_features
from dre_slcl.training.metrics_log import read_metrics
from dre_slcl.training.train import train
from dre_slcl.training.trainer import Trainer
from dre_slcl_cli import main

from . import tiny_dataset


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("bank")
    tiny_dataset.write_dataset(root / "data", num_slides=8, tiles=(10, 20))
    tiny_dataset.write_text_model(root / "text")
    train(TrainConfig(**settings(root, "run")))
    assert main(["bank", str(root / "run"), "--export", str(root / "export"), "--draw", str(root / "bank.png")]) == 0
    return root


def settings(root, name, **changes):
    changes = {"first_pass_tiles_per_slide": 6, "finalize_steps": 0, "bank_dtype": "int8"} | changes
    return tiny_dataset.train_settings(root, root / name) | changes


def feature_files(folder):
    return {path.stem: path for path in Path(folder).rglob("*.h5")}


def copy_features(root, folder, change):
    """Writes the exported files again, changed: `change(slide_id, features, coords)` returns the new arrays."""
    for slide_id, path in feature_files(root / "export").items():
        with h5py.File(path) as file:
            features, coords = change(slide_id, file["features"][:], file["coords"][:])
            attributes = dict(file["coords"].attrs)
        target = folder / "features_other" / path.name
        target.parent.mkdir(parents=True, exist_ok=True)
        with h5py.File(target, "w") as file:
            file["features"] = features
            file["coords"] = coords
            file["coords"].attrs.update(attributes)
    return folder


def started(root, tmp_path, source):
    """The bank of a new run that starts from features."""
    trainer = Trainer(TrainConfig(**settings(root, "run", output_dir=str(tmp_path / "new"), bank_init=str(source))))
    trainer.checkpoints.prepare()
    assert trainer._resume() == 0
    return trainer


def contents(bank, data):
    """(slide, tile) -> stored feature."""
    found = {}
    for place, slide in enumerate(data.owned):
        start, stop = bank.slide_start[place : place + 2].tolist()
        for row in range(start, stop):
            if bank.written_step[row] >= 0:
                found[data.source.slides[slide].slide_id, row - start] = bank.stored_features(torch.tensor([row]))[0]
    return found


def test_json_agrees_with_a_recount_and_with_the_last_line_of_the_log(root, capsys):
    assert main(["bank", str(root / "run"), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    with ExitStack() as stack:
        opened = open_bank(root / "run", stack)
    written = opened.bank.written_step
    ages = np.sort((opened.step - written[written >= 0]).numpy())
    assert 0 < len(ages) < len(written)
    assert told["step"] == opened.step == 8
    assert told["coverage"] == pytest.approx(len(ages) / len(written))
    assert told["mean_age_steps"] == pytest.approx(ages.mean())
    for name, share in (("median", 0.5), ("p90", 0.9), ("max", 1.0)):
        assert told[f"{name}_age_steps"] == np.quantile(ages, share, method="inverted_cdf")
    shares = np.bincount(opened.bank.codeword[written >= 0], minlength=4) / len(ages)
    entropy = -sum(share * np.log(share) for share in shares if share)
    assert told["codeword_entropy"] == pytest.approx(entropy / np.log(4))
    for slide, row in zip(opened.data.owned, range(len(opened.data.owned)), strict=True):
        part = written[opened.bank.slide_start[row] : opened.bank.slide_start[row + 1]]
        counts = {"stored": int((part >= 0).sum()), "tiles": len(part)}
        assert told["slides"][opened.data.source.slides[slide].slide_id] == counts
    last = read_metrics(root / "run" / "metrics.jsonl")[-1]
    for name in ("coverage", "mean_age_steps", "median_age_steps", "p90_age_steps", "codeword_entropy"):
        assert last[f"bank_{name}"] == pytest.approx(told[name]), name
    assert 0 < last["bank_drift_l2"] < 2
    assert last["bank_drift_cosine"] == pytest.approx(1 - last["bank_drift_l2"] ** 2 / 2, abs=0.1)


def test_a_table_and_pictures(root, capsys):
    assert main(["bank", str(max((root / "run/checkpoints").iterdir()))]) == 0
    table = capsys.readouterr().out
    assert "coverage" in table
    assert sum(line.lstrip().startswith("slide-") for line in table.splitlines()) == 8
    for picture in (root / "bank.png", root / "run/bank_report.png"):
        pixels = cv2.imread(str(picture))
        assert pixels.shape[0] > 500
        assert pixels.std() > 10


def test_exported_files_hold_what_is_stored(root):
    with ExitStack() as stack:
        opened = open_bank(root / "run", stack)
    expected = contents(opened.bank, opened.data)
    corners = {row.slide_id: row.tile_xy for row in opened.data.source.slides}
    num_seen = 0
    for slide_id, path in feature_files(root / "export").items():
        with h5py.File(path) as file:
            tiles = [tile for name, tile in expected if name == slide_id]
            np.testing.assert_array_equal(file["coords"][:], corners[slide_id][tiles])
            features = torch.stack([expected[slide_id, tile] for tile in tiles])
            np.testing.assert_array_equal(file["features"][:], features.numpy())
            assert file["coords"].attrs["patch_size_level0"] == tiny_dataset.TILE_PX
            num_seen += len(tiles)
    assert num_seen == len(expected)


@pytest.mark.parametrize("kind", ["same", "permuted", "dataset"])
def test_a_bank_starts_from_exported_features_in_any_order(root, tmp_path, kind):
    source = root / "export"
    if kind != "same":
        order = np.random.default_rng(0).permutation
        source = copy_features(root, tmp_path / "other", lambda _, f, xy: (f[p := order(len(f))] * 3, xy[p]))
    if kind == "dataset":
        source = tmp_path / "features"
        import_features(tmp_path / "other", source, isolated=False, progress=False)
    trainer = started(root, tmp_path, source)
    with ExitStack() as stack:
        opened = open_bank(root / "run", stack)
    before, after = contents(opened.bank, opened.data), contents(trainer.unwrapped.memory_bank, trainer.data)
    assert before.keys() == after.keys()
    for place, feature in before.items():
        unit = feature / feature.norm()
        torch.testing.assert_close(after[place], unit, rtol=0, atol=float(unit.abs().max()) / 240)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda _, f, xy: (f[:, :7], xy), "features of width 7, the tile encoder gives 16"),
        (
            lambda s, f, xy: (f, xy + 1 if s == "slide-3" else xy),
            r"Found 1: slide-3: \d+ of \d+ coordinates are no tile",
        ),
        (lambda s, f, xy: (f, xy * 0 if s == "slide-2" else xy), "slide-2: several features at one place"),
    ],
)
def test_features_that_do_not_fit_are_refused_once_for_all(root, tmp_path, change, message):
    source = copy_features(root, tmp_path / "other", change)
    with pytest.raises(ValueError, match=message):
        started(root, tmp_path, source)


def test_features_without_coordinates_and_of_other_slides_are_refused(root, tmp_path):
    with ExitStack() as stack:
        row = open_bank(root / "run", stack).data.source.slides[0]
    assert match_tiles(row, None, np.zeros((3, 16)), 16)[1] == "3 features with no coordinates"
    folder = copy_features(root, tmp_path / "other", lambda _, f, xy: (f, xy))
    for path in feature_files(folder).values():
        path.rename(path.with_name(f"x{path.name}"))
    with pytest.raises(ValueError, match="holds no tile features"):
        started(root, tmp_path, folder)


def test_what_is_no_run_is_refused(tmp_path, caplog):
    assert main(["bank", str(tmp_path)]) == 1
    assert "found no checkpoint" in caplog.text


def test_a_bank_on_a_disk_is_opened_on_a_disk_and_leaves_nothing(root):
    run = settings(root, "mapped", bank_device="disk", bank_whole_mib=0)
    train(TrainConfig(**run))
    assert list((root / "mapped" / "bank").iterdir()) == []
    with ExitStack() as stack:
        mapped = open_bank(root / "mapped", stack)
        inside = open_bank(root / "run", stack)
        assert mapped.bank.is_mapped
        for name in ("features", "scales", "written_step", "codeword", "feature_sums", "counts"):
            assert torch.equal(getattr(mapped.bank, name), getattr(inside.bank, name)), name
    shutil.rmtree(root / "mapped")
