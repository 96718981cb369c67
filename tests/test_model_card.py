# SPDX-License-Identifier: Apache-2.0
"""The model card: what it carries, and what it says openly to be missing."""

import pytest
from huggingface_hub import ModelCard

from dre_slcl.hub.model_card import NOT_STATED, build_model_card

from .toy_export import CONFIG


def test_card_carries_config_metrics_and_data(tmp_path):
    metrics = {
        "dataset": "tester/slides",
        "split": "test",
        "probe": {"auroc": {"value": 0.91, "low": 0.85, "high": 0.95}},
        "recall_at_1": 0.5,
    }
    card = build_model_card(
        CONFIG, repo_id="tester/toy", metrics=metrics, data_statement="Slides of X.", datasets=["tester/slides"]
    )
    (tmp_path / "README.md").write_text(str(card))
    loaded = ModelCard.load(tmp_path / "README.md")
    data = loaded.data
    assert (data.license, data.library_name, data.pipeline_tag) == (
        "apache-2.0",
        "transformers",
        "image-feature-extraction",
    )
    assert data.datasets == ["tester/slides"]
    assert {(r.metric_name, r.metric_value, r.dataset_split) for r in data.eval_results} == {
        ("probe.auroc", 0.91, "test"),
        ("recall_at_1", 0.5, "test"),
    }
    for text in ("256 px", "0.5 um/px", "128 um", "Slides of X.", "not for diagnosis", "0.91 (0.85 to 0.95)", "`vit`"):
        assert text in loaded.text


def test_card_says_openly_what_is_missing():
    card = build_model_card({"model_type": "dre_slcl"}, repo_id="tester/toy")
    assert card.data.eval_results is None
    for line in ("| side of a tile (`tile_size_px`) | ", "Datasets: ", "Metrics: ", "Statement about the data: "):
        assert f"{line}{NOT_STATED}" in card.text


@pytest.mark.parametrize("value", [float("nan"), float("inf"), "0.9", True, {"value": None}])
def test_card_refuses_metrics_that_are_not_numbers(value):
    with pytest.raises(ValueError, match=r"`probe\.auroc` is .* expected a finite number"):
        build_model_card(CONFIG, repo_id="tester/toy", metrics={"probe": {"auroc": value}})
