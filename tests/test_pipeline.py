# SPDX-License-Identifier: Apache-2.0
"""The slide pipeline: its inputs, its options, and slides that cannot be encoded."""

import pytest
import torch
from transformers import pipeline

from modeling_dre_slcl import SlideFeatureExtractionPipeline
from modeling_dre_slcl.slide_info import SlideError

from .tiny_models import tiny_image_processor, tiny_model
from .tiny_slide import write_tiny_slide

TASK = "slide-feature-extraction"


@pytest.fixture(scope="module")
def slides(tmp_path_factory):
    folder = tmp_path_factory.mktemp("slides")
    empty = write_tiny_slide(folder / "empty.tif", tissue=False)
    return {"good": write_tiny_slide(folder / "good.tif"), "empty": empty, "absent": folder / "absent.tif"}


def make_pipeline(**options):
    parts = {"model": tiny_model(), "image_processor": tiny_image_processor(), "device": "cpu"}
    return pipeline(TASK, pipeline_class=SlideFeatureExtractionPipeline, **parts, **options)


@pytest.fixture(scope="module")
def pipe():
    return make_pipeline()


@pytest.fixture(scope="module")
def expected(slides):
    return tiny_model().encode_slide(slides["good"], image_processor=tiny_image_processor())


@pytest.mark.parametrize("batch_size", [1, 7, 1000])
def test_the_batch_size_changes_nothing_but_speed(slides, expected, batch_size):
    for found in (make_pipeline(batch_size=batch_size)(slides["good"]), make_pipeline()(slides["good"], batch_size=8)):
        assert (found["status"], found["slide_id"], found["num_tiles"]) == ("ok", "good", expected["num_tiles"])
        for name in ("slide_embedding", "slide_projection", "residuals"):
            torch.testing.assert_close(found[name], expected[name], rtol=0, atol=1e-5)


def test_takes_paths_dictionaries_lists_and_generators(pipe, slides, expected):
    path = slides["good"]
    row = {"path": str(path), "slide_id": "named", "mpp": None, "label": 3}
    for inputs in ([path, row], ({"path": path}, row), (one for one in (str(path), row))):
        results = list(pipe(list(inputs) if isinstance(inputs, tuple) else inputs))
        assert [result["slide_id"] for result in results] == ["good", "named"]
        for result in results:
            torch.testing.assert_close(result["residuals"], expected["residuals"], rtol=0, atol=1e-5)


def test_several_slides_go_on_after_one_that_is_refused(pipe, slides):
    results = pipe([slides["absent"], slides["empty"], slides["good"]])
    assert [result["status"] for result in results] == ["refused", "refused", "ok"]
    assert [result.get("reason") for result in results] == ["not_a_file", "no_tissue", None]
    assert results[1]["slide_id"] == "empty"
    assert "empty: no_tissue" in results[1]["message"]


def test_a_single_slide_raises_unless_told_to_record(pipe, slides):
    with pytest.raises(SlideError, match="no_tissue"):
        pipe(slides["empty"])
    with pytest.raises(SlideError, match="not_a_file"):
        pipe([slides["good"], slides["absent"]], on_error="raise")
    assert pipe(slides["empty"], on_error="record")["status"] == "refused"


def test_tile_features_come_with_their_places(pipe, slides, expected):
    found = pipe(slides["good"], return_tile_features=True)
    assert found["tile_features"].shape == (expected["num_tiles"], 32)
    assert found["tile_xy"].shape == (expected["num_tiles"], 2)
    assert found["tile_size_level0_px"] == 32
    with torch.no_grad():
        again = tiny_model().get_slide_features(found["tile_features"][None]).slide_embedding[0]
    torch.testing.assert_close(again, found["slide_embedding"], rtol=0, atol=1e-5)


def test_a_stated_resolution_overrides_that_of_the_file(pipe, slides):
    found = pipe({"path": slides["good"], "mpp": 0.4}, return_tile_features=True)
    assert found["mpp"] == 0.4
    assert found["tile_size_level0_px"] == 40


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batchsize": 3}, r"Unknown options \['batchsize'\]"),
        ({"on_error": "ignore"}, "`on_error` must be 'raise' or"),
    ],
)
def test_refuses_unknown_options(pipe, slides, options, message):
    with pytest.raises(ValueError, match=message):
        pipe(slides["good"], **options)


@pytest.mark.parametrize("inputs", [{"slide": "a.svs"}, {"path": 3}, iter(["a.svs"]), 3])
def test_refuses_inputs_that_name_no_slide(pipe, inputs):
    with pytest.raises(ValueError, match="Expected a path to a slide, or a dictionary with `path`"):
        pipe(inputs)


def test_a_model_in_training_mode_is_evaluated_and_left_in_training(slides, expected):
    model = tiny_model(hidden_dropout_prob=0.5).train()
    found = model.encode_slide(slides["good"], image_processor=tiny_image_processor())
    assert model.training
    torch.testing.assert_close(found["slide_embedding"], expected["slide_embedding"], rtol=0, atol=1e-5)


def test_what_it_returns_can_enter_a_computation_with_gradients(pipe, slides):
    vector = pipe(slides["good"])["slide_projection"]
    weight = torch.ones(len(vector), requires_grad=True)
    (vector @ weight).backward()
    torch.testing.assert_close(weight.grad, vector)
