# SPDX-License-Identifier: Apache-2.0
"""Evaluation on a tiny dataset of two colours, against the model called by hand."""

import argparse
import json
import logging
import zlib

import cv2
import numpy as np
import pytest
import torch
from datasets import Dataset
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import balanced_accuracy_score
from sklearn.model_selection import StratifiedGroupKFold

from dre_slcl.training.embed_split import embed_split
from dre_slcl.training.evaluate_model import evaluate_model
from dre_slcl.training.evaluation.evaluate_command import add_arguments, run
from dre_slcl.training.evaluation.linear_probe import fit_linear_probe, probe_scores
from dre_slcl.training.evaluation_tasks import group_slides
from dre_slcl.training.random_baseline import random_baseline
from dre_slcl.training.tile_source import TileSource
from modeling_dre_slcl import DreSlclProcessor

from .tiny_models import IMAGE_SIZE, tiny_image_processor, tiny_model, tiny_tokenizer

CARD = """---
configs:
- config_name: slides
  data_files: [{split: train, path: slides/train.parquet}, {split: test, path: slides/test.parquet}]
- config_name: tiles
  data_files: [{split: train, path: tiles/train.parquet}, {split: test, path: tiles/test.parquet}]
---
"""
COLOURS = {"normal": (200, 120, 160), "tumor": (110, 80, 190)}
NUM_TILES, SLIDES_PER_CASE = 5, 2


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Threads cost more than they bring to layers this small, above all where other work runs."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def png(label, seed):
    noise = np.random.default_rng(seed).normal(0, 12, (IMAGE_SIZE, IMAGE_SIZE, 3))
    return cv2.imencode(".png", np.clip(np.array(COLOURS[label]) + noise, 0, 255).astype(np.uint8))[1].tobytes()


def write_split(folder, split, num_cases, *, damaged=()):
    slides, tiles = [], []
    for number in range(num_cases * SLIDES_PER_CASE):
        case = number // SLIDES_PER_CASE
        label, slide_id = ("normal", "tumor")[case % 2], f"{split}-{number}"
        geometry = {"tile_size_px": IMAGE_SIZE, "tile_mpp": 0.5, "tile_size_level0_px": IMAGE_SIZE}
        slides.append(
            {"slide_id": slide_id, "case_id": f"{split}-case{case}", "split": split, "path": f"{slide_id}.svs"}
            | {"mpp": 0.5, "report": f"{label} tissue grade {case}", "status": "ok", "subtype": label, "site": None}
            | {"num_tiles": NUM_TILES, "tile_start": len(tiles), "tile_xy": [[0, 0]] * NUM_TILES, **geometry}
        )
        for tile in range(NUM_TILES):
            image = b"not an image" if slide_id in damaged else png(label, zlib.crc32(f"{slide_id}/{tile}".encode()))
            tiles.append({"slide_id": slide_id, "tile_index": tile, "image": {"bytes": image, "path": None}})
    for name, rows in (("slides", slides), ("tiles", tiles)):
        (folder / name).mkdir(exist_ok=True, parents=True)
        Dataset.from_list(rows).to_parquet(folder / name / f"{split}.parquet")


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dataset")
    write_split(folder, "train", 6)
    write_split(folder, "test", 5, damaged=["test-3"])
    (folder / "README.md").write_text(CARD)
    return folder


@pytest.fixture(scope="module")
def sources(dataset):
    return TileSource(dataset, "train"), TileSource(dataset, "test")


@pytest.fixture(scope="module")
def model():
    return tiny_model(text=True)


@pytest.fixture(scope="module")
def evaluation(model, sources):
    return evaluate_model(
        model,
        DreSlclProcessor(tiny_image_processor(), tiny_tokenizer()),
        sources[1],
        source_train=sources[0],
        label_column="subtype",
        class_names={"normal": ["normal tissue"], "tumor": ["tumor", "tumor tissue"]},
        templates=["a slide of CLASSNAME"],
        num_bootstrap=50,
        progress=False,
    )


@torch.no_grad()
def forward_by_hand(model, source, place):
    """All tiles of a slide at once through `forward`, which evaluation does not use."""
    tiles = source.read(place, np.arange(NUM_TILES))
    values = tiny_image_processor()(list(tiles), return_tensors="pt")["pixel_values"]
    return model(pixel_values=values[None])


def test_embeddings_are_those_of_the_model_and_an_unreadable_slide_is_recorded(model, sources, caplog):
    model.train()
    with caplog.at_level(logging.WARNING):
        split = embed_split(model, tiny_image_processor(), sources[1], batch_size=2, progress=False)
    assert model.training
    model.eval()
    assert [refused["slide_id"] for refused in split.refused] == ["test-3"]
    assert split.refused[0]["reason"] == "unreadable"
    assert "test-3 is left out" in caplog.text
    assert split.slide_ids == [f"test-{number}" for number in range(10) if number != 3]
    assert split.labels["subtype"][:4] == ["normal", "normal", "tumor", "normal"]
    for place, slide_id in enumerate(split.slide_ids):
        expected = forward_by_hand(model, sources[1], int(slide_id.split("-")[1]))
        np.testing.assert_allclose(split.slide_embedding[place], expected.slide_embedding[0], atol=1e-5)
        np.testing.assert_allclose(split.slide_projection[place], expected.slide_projection[0], atol=1e-5)


def test_embedding_refuses_other_tiles_and_weights_that_are_not_finite(sources):
    with pytest.raises(ValueError, match="The model takes tiles of"):
        embed_split(tiny_model(tile_mpp=1.0), tiny_image_processor(), sources[1], progress=False)
    broken = tiny_model()
    torch.nn.init.constant_(broken.slide_projection.bias, float("nan"))
    with pytest.raises(ValueError, match=r"embedding of slide test-0 is not finite"):
        embed_split(broken, tiny_image_processor(), sources[1], progress=False)


def test_metrics_hold_every_task_for_both_models(evaluation):
    metrics = evaluation.metrics
    assert list(metrics["tasks"]) == ["zero_shot", "slide_to_report", "report_to_slide", "linear_probe"]
    for task in metrics["tasks"].values():
        assert list(task) == ["trained", "random", "chance"]
        for name in ("trained", "random"):
            assert set(task["chance"]) == set(task[name]["interval"])
    assert (metrics["num_slides"], metrics["num_cases"]) == (9, 5)
    assert metrics["refused"] == [{"slide_id": "test-3", "reason": "unreadable"}]
    # Five reports, one of them relevant to each slide.
    assert metrics["tasks"]["slide_to_report"]["chance"]["recall@1"] == pytest.approx(1 / 5)
    assert metrics["tasks"]["linear_probe"]["trained"]["balanced_accuracy"] == 1.0
    json.dumps(metrics, allow_nan=False)


def test_zero_shot_is_that_of_forward(model, sources, evaluation):
    prompts = {"normal": ["a slide of normal tissue"], "tumor": ["a slide of tumor", "a slide of tumor tissue"]}
    directions = []
    for texts in prompts.values():
        each = [tiny_tokenizer()(text, return_tensors="pt") for text in texts]
        with torch.no_grad():
            mean = sum(
                model.get_text_features(**{key: one[key] for key in ("input_ids", "attention_mask")})[0]
                for one in each
            )
        directions.append(mean / mean.norm())
    predicted, right = [], []
    for row in evaluation.predictions:
        place = int(row["slide_id"].split("-")[1])
        scores = torch.stack(directions) @ forward_by_hand(model, sources[1], place).slide_projection[0]
        probabilities = (model.logit_scale.detach().exp() * scores).softmax(dim=0)
        assert list(row["zero_shot_scores"].values()) == pytest.approx(probabilities.tolist(), abs=1e-4)
        assert row["zero_shot_class"] == list(COLOURS)[scores.argmax()]
        predicted.append(row["zero_shot_class"])
        right.append(row["label"])
    found = evaluation.metrics["tasks"]["zero_shot"]["trained"]["balanced_accuracy"]
    assert found == pytest.approx(balanced_accuracy_score(right, predicted))


def test_an_oracle_of_reports_finds_all_and_random_weights_do_not(model, sources):
    plain = tiny_model()
    split = embed_split(plain, tiny_image_processor(), sources[1], progress=False)
    of_report = dict(zip(split.reports, split.slide_projection, strict=True))
    result = evaluate_model(
        plain,
        tiny_image_processor(),
        sources[1],
        source_train=sources[0],
        report_embeds_fn=lambda reports: torch.tensor(np.stack([of_report[report] for report in reports])),
        num_bootstrap=20,
        progress=False,
    )
    tasks = result.metrics["tasks"]
    assert list(tasks) == ["slide_to_report", "report_to_slide"]
    assert tasks["report_to_slide"]["trained"]["recall@1"] == 1.0
    assert tasks["report_to_slide"]["random"]["recall@1"] < 1.0
    # A report's twin is the last slide of its case, which therefore ranks it first.
    ranks = {row["slide_id"]: row["report_rank"] for row in result.predictions}
    assert {ranks["test-1"], ranks["test-2"], ranks["test-5"]} == {1}


def test_the_baseline_is_the_same_for_a_seed_and_leaves_the_global_random_state(model, sources):
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    made = [random_baseline(model, tiny_image_processor(), sources[0], seed=seed) for seed in (5, 5, 6)]
    assert torch.rand(1) == expected
    weights = [one.tile_encoder.state_dict() for one in made]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert not torch.equal(made[0].slide_projection.weight, made[2].slide_projection.weight)
    assert torch.equal(made[0].codebook, made[1].codebook)
    assert made[0].text_encoder is model.text_encoder
    assert not made[0].training
    features = made[0].get_tile_features(torch.randn(2, 3, IMAGE_SIZE, IMAGE_SIZE))
    # K-means on its own features puts its codewords among them, whatever the trained model's codebook is.
    assert torch.cdist(features, made[0].codebook).min() < torch.cdist(features, model.codebook).min()


def test_the_probe_chooses_its_strength_on_cases_that_it_was_not_fitted_on():
    rng = np.random.default_rng(0)
    labels = np.repeat(rng.permutation(["a", "b", "b"] * 8), 3)
    cases = np.repeat([f"case{number}" for number in range(24)], 3)
    embeddings = np.repeat(rng.normal(size=(24, 9)), 3, axis=0) + 0.1 * rng.normal(size=(72, 9))
    embeddings[:, 0] += 3 * (labels == "a")
    losses = {}
    for power in range(-4, 3):
        stated = np.zeros(len(labels))
        for fitted, held in StratifiedGroupKFold(5, shuffle=True, random_state=7).split(embeddings, labels, cases):
            assert not set(cases[fitted]) & set(cases[held])
            mean, spread = embeddings[fitted].mean(axis=0), embeddings[fitted].std(axis=0)
            probe = LogisticRegression(C=10.0**power, class_weight="balanced", max_iter=2000)
            probe.fit((embeddings[fitted] - mean) / spread, labels[fitted])
            of_class = probe.predict_proba((embeddings[held] - mean) / spread)
            stated[held] = np.where(labels[held] == "a", of_class[:, 0], of_class[:, 1])
        losses[10.0**power] = np.mean([-np.log(stated[labels == name]).mean() for name in "ab"])
    _, strength = fit_linear_probe(embeddings, labels.tolist(), cases.tolist(), seed=7)
    assert strength == min(losses, key=losses.get)
    assert min(losses) < strength < max(losses)


def test_the_probe_gives_an_unseen_class_no_chance(caplog):
    probe, strength = fit_linear_probe(np.eye(4, dtype=np.float32), ["a", "a", "b", "b"], list("wxyy"), seed=0)
    assert strength == 1.0
    scores = probe_scores(probe, np.eye(4, dtype=np.float32), ["a", "b", "c"])
    assert scores[:, 2].tolist() == [0, 0, 0, 0]
    assert scores[:, :2].sum(axis=1) == pytest.approx(np.ones(4))
    assert "No training slide is of class c" in caplog.text


@pytest.mark.parametrize(
    ("cases", "reports", "expected"),
    [
        ("aabcd", "12323", [{0, 1, 3}, {2, 4}]),
        ("abc", "121", [{0, 2}, {1}]),
        ("abba", "1233", [{0, 1, 2, 3}]),
        ("abcdcba", "1234567", [{0, 6}, {1, 5}, {2, 4}, {3}]),
    ],
)
def test_groups_join_cases_that_share_a_report(cases, reports, expected):
    names = group_slides(cases, reports)
    found = [{place for place, other in enumerate(names) if other == name} for name in dict.fromkeys(names)]
    assert found == expected


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"label_column": "grade"}, "no label column 'grade'; there is: site, subtype"),
        ({"label_column": "site"}, r"column 'site' of split 'test' holds \[\]; at least two"),
        ({"label_column": "subtype", "class_names": {"normal": ["n"]}}, "'tumor', which has no names"),
        ({"class_names": {"normal": ["n"]}}, "need a `label_column`"),
        ({"source_train": None}, "give `source_train`"),
        ({"source_train": "test"}, "5 cases are in split 'test' and in split 'test'"),
        ({"source_train": None, "with_random_baseline": False}, "nothing to evaluate"),
    ],
)
def test_what_does_not_fit_is_refused(model, sources, options, message):
    settings = {"source_train": sources[0], "progress": False, **options}
    if settings["source_train"] == "test":
        settings["source_train"] = sources[1]
    with pytest.raises(ValueError, match=message):
        evaluate_model(model, tiny_image_processor(), sources[1], **settings)


def parse(*words):
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return parser.parse_args(list(map(str, words)))


def test_the_command_writes_metrics_table_and_predictions(model, dataset, tmp_path, capsys, evaluation):
    model.save_pretrained(tmp_path / "model")
    DreSlclProcessor(tiny_image_processor(), tiny_tokenizer()).save_pretrained(tmp_path / "model")
    classes = tmp_path / "classes.json"
    classes.write_text(json.dumps(evaluation.metrics["class_names"]))
    out = tmp_path / "results" / "metrics.json"
    paths = ["--model", tmp_path / "model", "--dataset", dataset, "--out", out, "--device", "cpu"]
    words = ["--label-column", "subtype", "--classes", classes, "--num-bootstrap", 50]
    assert run(parse(*paths, *words, "--templates", "a slide of CLASSNAME")) == 3
    metrics = json.loads(out.read_text())
    for task, expected in evaluation.metrics["tasks"].items():
        assert metrics["tasks"][task]["chance"] == expected["chance"]
        assert metrics["tasks"][task]["trained"]["interval"] == expected["trained"]["interval"]
    table = (out.parent / "metrics.md").read_text()
    assert table == capsys.readouterr().out
    assert "| linear probe | balanced accuracy | 1.000 [1.000, 1.000] |" in table
    assert "| slide to report | recall@1 |" in table
    assert "| slide to report | recall@5 |" not in table
    assert "9 slides of 5 cases, 1 more could not be read" in table
    rows = [json.loads(line) for line in (out.parent / "metrics.predictions.jsonl").read_text().splitlines()]
    assert [row["slide_id"] for row in rows] == evaluation.test.slide_ids
    assert "tissue grade" not in json.dumps([metrics["tasks"], rows])
    assert str(tmp_path) not in out.read_text()
    assert sorted(path.name for path in out.parent.iterdir()) == [
        "metrics.json",
        "metrics.md",
        "metrics.predictions.jsonl",
    ]


def test_the_command_says_what_is_wrong(model, dataset, tmp_path, caplog):
    model.save_pretrained(tmp_path / "model")
    tiny_image_processor().save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    paths = ["--model", tmp_path / "model", "--dataset", dataset, "--out", tmp_path / "m.json", "--device", "cpu"]
    assert run(parse(*paths, "--split", "val")) == 1
    assert "split 'val' cannot be loaded" in caplog.text
    assert not (tmp_path / "m.json").exists()
