# SPDX-License-Identifier: Apache-2.0
"""`dre-slcl explain` from slide to files, from stored features and with them, and what it refuses."""

import json

import h5py
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from dre_slcl.training.deletion_curves import attention_scores, curve_area, deletion_curve, draw_curves
from dre_slcl.training.stored_features import read_stored_tiles
from dre_slcl.training.trident_export import coordinate_attributes, write_trident_features
from dre_slcl_cli import main
from modeling_dre_slcl.attribution import linear_score, text_similarity
from modeling_dre_slcl.slide_classifier import DreSlclForSlideClassification

from .tiny_models import IMAGE_SIZE, tiny_config, tiny_image_processor, tiny_model, tiny_tokenizer
from .tiny_slide import write_tiny_slide


@pytest.fixture(scope="module")
def model():
    return tiny_model(text=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory, model):
    """A model with text, one without, a slide, and its embedding."""
    folder = tmp_path_factory.mktemp("explain")
    model.save_pretrained(folder / "model")
    tiny_tokenizer().save_pretrained(folder / "model")
    tiny_model().save_pretrained(folder / "no-text")
    for name in ("model", "no-text"):
        tiny_image_processor().save_pretrained(folder / name)
    write_tiny_slide(folder / "one.tif")
    options = ["--model", folder / "model", "--slides", folder / "one.tif", "--out", folder / "embedded"]
    assert main(["embed", *map(str, options), "--tile-features"]) == 0
    return folder


def explain(folder, out, *options, model="model", slide="one.tif"):
    command = ["explain", "--model", folder / model, "--slide", folder / slide, "--out", out, *options]
    return main([str(part) for part in command])


def test_a_text_is_explained_by_leaving_each_tile_out(folder, model, tmp_path):
    stored = folder / "embedded" / "embeddings" / "one.safetensors"
    assert explain(folder, tmp_path / "fresh", "--text", "tumor tissue") == 0
    assert explain(folder, tmp_path / "stored", "--text", "tumor tissue", "--features", stored) == 0
    table = pq.read_table(tmp_path / "stored" / "one.parquet")
    tensors = load_file(stored)
    features = torch.from_numpy(tensors["tile_features"])
    tokens = tiny_tokenizer()(["tumor tissue"], return_tensors="pt")
    with torch.no_grad():
        direction = model.get_text_features(tokens["input_ids"], tokens["attention_mask"])[0]
        match = [
            float(
                model.get_slide_features(torch.cat([features[:t], features[t + 1 :]])[None]).slide_projection[0]
                @ direction
            )
            for t in range(len(features))
        ]
        whole = float(model.get_slide_features(features[None]).slide_projection[0] @ direction)
    np.testing.assert_allclose(table["score"].to_numpy(), whole - np.array(match), rtol=0, atol=1e-5)
    assert np.array_equal(np.stack([table["x"], table["y"]], axis=1), tensors["tile_xy"])
    for name in ("one.png", "one.geojson", "one.parquet", "one.json"):
        assert (tmp_path / "stored" / name).stat().st_size > 0
    facts = json.loads((tmp_path / "stored" / "one.json").read_text())
    assert facts["score"] == pytest.approx(whole, abs=1e-5)
    assert facts["target"] == "tumor tissue"
    fresh = pq.read_table(tmp_path / "fresh" / "one.parquet")
    np.testing.assert_allclose(fresh["score"].to_numpy(), table["score"].to_numpy(), rtol=0, atol=1e-5)
    with (tmp_path / "stored" / "one.geojson").open() as file:
        assert len(json.load(file)["features"]) == len(features)


def test_codewords_and_regions_need_no_text(folder, tmp_path):
    stored = folder / "embedded" / "embeddings" / "one.safetensors"
    ring = [[0, 0], [384, 0], [384, 512], [0, 512], [0, 0]]
    area = {"type": "Feature", "properties": {"name": "left"}, "geometry": {"type": "Polygon", "coordinates": [ring]}}
    away = {"type": "Polygon", "coordinates": [[[9000, 9000], [9001, 9000], [9001, 9001]]]}
    (tmp_path / "areas.geojson").write_text(json.dumps([area, away]))
    regions = ("--regions", tmp_path / "areas.geojson")
    assert explain(folder, tmp_path, "--codewords", "--features", stored, *regions, model="no-text") == 0
    table = pq.read_table(tmp_path / "one.parquet")
    assert table["score"].null_count == len(table)
    rows = pq.read_table(tmp_path / "one.regions.parquet").to_pylist()
    left = (load_file(stored)["tile_xy"] + IMAGE_SIZE / 2)[:, 0] < 384
    assert [(row["name"], row["num_tiles"]) for row in rows] == [("left", left.sum()), ("region 2", 0)]
    assert len(rows[0]["slide_embedding"]) == 32
    assert rows[1]["slide_embedding"] is None


def test_the_logit_of_a_class_is_explained_by_leaving_each_tile_out(folder, tmp_path):
    torch.manual_seed(0)
    config = tiny_config(id2label={0: "LUAD", 1: "LUSC"}, label2id={"LUAD": 0, "LUSC": 1})
    classifier = DreSlclForSlideClassification(config).eval()
    classifier.load_state_dict(tiny_model().state_dict(), strict=False)
    with torch.no_grad():
        classifier.classifier.weight.mul_(50)
    classifier.save_pretrained(tmp_path / "classifier")
    stored = folder / "embedded" / "embeddings" / "one.safetensors"
    options = ("--class", "LUSC", "--features", stored)
    assert explain(folder, tmp_path / "out", *options, model=tmp_path / "classifier") == 0
    features = torch.from_numpy(load_file(stored)["tile_features"]).double()
    classifier.double()

    def logit(kept):
        return float(classifier.classify(classifier.get_slide_features(kept[None])).logits[0, 1])

    with torch.no_grad():
        whole = logit(features)
        expected = [whole - logit(torch.cat([features[:t], features[t + 1 :]])) for t in range(len(features))]
    found = pq.read_table(tmp_path / "out" / "one.parquet")["score"].to_numpy()
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-5)
    assert np.abs(expected).max() > 1e-3
    assert json.loads((tmp_path / "out" / "one.json").read_text())["target"] == "class LUSC"


def test_one_error_says_what_is_missing(folder, tmp_path, caplog):
    for options, text in (
        ((["--text", "tumor"], "no-text"), "ships without a text model"),
        ((["--codewords", "--against", "tumor"], "model"), "--against needs"),
        ((["--codewords", "--features", tmp_path / "none.safetensors"], "model"), "no such file"),
        ((["--class", "tumor"], "no-text"), "no-text"),
    ):
        caplog.clear()
        assert explain(folder, tmp_path / "out", *options[0], model=options[1]) == 1
        assert text in caplog.text
        assert len(caplog.records) >= 1
        assert not (tmp_path / "out").exists()


def test_features_of_another_slide_are_refused(folder, tmp_path, caplog):
    (tmp_path / "two.tif").write_bytes((folder / "one.tif").read_bytes() + b"\0")
    stored = folder / "embedded" / "embeddings" / "one.safetensors"
    assert explain(folder, tmp_path / "out", "--codewords", "--features", stored, slide=tmp_path / "two.tif") == 1
    assert "another file" in caplog.text


def write_foreign(path, features, **changes):
    geometry = {
        "tile_size_px": IMAGE_SIZE,
        "tile_mpp": 0.5,
        "stride_px": IMAGE_SIZE,
        "tile_size_level0_px": IMAGE_SIZE,
    }
    facts = {"mpp": 0.5, "width_px": 768, "height_px": 512, **geometry}
    encoder = changes.pop("encoder", "dre_slcl")
    attributes = coordinate_attributes("one", **{**facts, **changes})
    tile_xy = np.stack([np.arange(len(features)) * 32, np.full(len(features), 256)], axis=1).astype(np.int32)
    path.parent.mkdir(exist_ok=True)
    write_trident_features(path, features, tile_xy, encoder=encoder, attributes=attributes)
    return path


def test_features_of_other_tools_are_taken_or_refused_with_both_values(folder, model, tmp_path):
    features = np.random.default_rng(0).normal(size=(9, 32)).astype(np.float32)
    path = write_foreign(tmp_path / "features_a" / "one.h5", features)
    tiles = read_stored_tiles(path, model.config)
    assert np.array_equal(tiles.tile_features, features)
    assert (tiles.is_own, tiles.tile_size_level0_px) == (False, IMAGE_SIZE)
    assert explain(folder, tmp_path / "out", "--text", "tumor", "--features", path) == 0
    for name, changes, text in (
        ("features_b", {"encoder": "uni_v2"}, "'uni_v2' instead of"),
        ("features_c", {"tile_mpp": 0.25}, r"0\.25 instead of 0\.5"),
        ("features_d", {"tile_size_px": 256, "tile_size_level0_px": 256}, "256 instead of 32"),
    ):
        path = write_foreign(tmp_path / name / "one.h5", features, **changes)
        with pytest.raises(ValueError, match=text):
            read_stored_tiles(path, model.config)
        assert len(read_stored_tiles(path, model.config, allow_mismatch=True).tile_xy) == 9


def test_stored_features_that_cannot_be_used_are_named(folder, model, tmp_path):
    source = folder / "embedded" / "embeddings" / "one.safetensors"
    tensors = load_file(source)
    with safe_open(source, framework="np") as stored:
        facts = stored.metadata()
    broken = {name: value.copy() for name, value in tensors.items()}
    broken["tile_features"][4, 0] = np.nan
    cases = {
        "nan": (broken, "tile 4 is not finite"),
        "none": ({"slide_embedding": tensors["slide_embedding"]}, "--tile-features"),
        "short": (tensors | {"tile_xy": tensors["tile_xy"][1:]}, "belong together"),
        "wide": (tensors | {"tile_features": np.ones((len(tensors["tile_xy"]), 7), np.float32)}, "7 wide.*32 wide"),
    }
    for name, (content, text) in cases.items():
        save_file(content, tmp_path / f"{name}.safetensors", metadata=facts)
        with pytest.raises(ValueError, match=rf"{name}\.safetensors.*{text}"):
            read_stored_tiles(tmp_path / f"{name}.safetensors", model.config)
    (tmp_path / "torn.safetensors").write_bytes(source.read_bytes()[:300])
    with pytest.raises(ValueError, match=r"torn\.safetensors"):
        read_stored_tiles(tmp_path / "torn.safetensors", model.config)
    with h5py.File(tmp_path / "one.h5", "w") as file:
        file["slide_embedding"] = tensors["slide_embedding"]
    with pytest.raises(ValueError, match="--tile-features"):
        read_stored_tiles(tmp_path / "one.h5", model.config)


@pytest.fixture(scope="module")
def many():
    features = torch.randn(60, 32, generator=torch.Generator().manual_seed(2))
    return torch.nn.functional.normalize(features, dim=-1)


def test_curves_are_the_scores_of_the_tiles_that_are_left(model, many):
    score = linear_score(torch.linspace(-1, 1, 32))
    values = torch.randn(60, generator=torch.Generator().manual_seed(1))
    order = values.argsort(descending=True)
    for mode in ("deletion", "insertion"):
        shares, curve = deletion_curve(model, many, values, score, mode=mode, num_points=7)
        for share, found in zip(shares, curve, strict=True):
            step = round(share * 60)
            kept = order[step:] if mode == "deletion" else order[:step]
            with torch.no_grad():
                expected = float(score(model.get_slide_features(many[kept][None]).slide_embedding)[0])
            assert found == pytest.approx(expected, abs=1e-4)
    assert curve_area(np.array([0.0, 0.5, 1.0]), np.array([1.0, 1.0, 3.0])) == pytest.approx(1.5)


def test_exact_scores_are_more_faithful_than_random_ones(model, many, tmp_path):
    direction = torch.nn.functional.normalize(torch.linspace(-1, 1, 16), dim=0)
    score = text_similarity(model, direction)
    orders = {
        "leave one out": model.attribute_tiles(many, direction),
        "attention": attention_scores(model, many),
        "random": torch.randn(60, generator=torch.Generator().manual_seed(3)),
    }
    curves = {
        mode: {name: deletion_curve(model, many, values, score, mode=mode) for name, values in orders.items()}
        for mode in ("deletion", "insertion")
    }
    areas = {mode: {name: curve_area(*curve) for name, curve in lines.items()} for mode, lines in curves.items()}
    assert areas["deletion"]["leave one out"] < areas["deletion"]["random"]
    assert areas["insertion"]["leave one out"] > areas["insertion"]["random"]
    draw_curves(tmp_path / "curves.png", curves)
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
