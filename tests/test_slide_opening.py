# SPDX-License-Identifier: Apache-2.0
"""Several slides in the pipeline: the next one is opened and read while one is encoded, and no more than one."""

import shutil
import threading

import pytest
import torch

from modeling_dre_slcl import SlideFeatureExtractionPipeline
from modeling_dre_slcl.slide_opening import OpenedSlide, open_ahead
from modeling_dre_slcl.slide_reader import SlideReader

from .tiny_models import tiny_image_processor, tiny_model
from .tiny_slide import write_tiny_slide

SECONDS = 30


@pytest.fixture(scope="module")
def slides(tmp_path_factory):
    folder = tmp_path_factory.mktemp("slides")
    first = write_tiny_slide(folder / "slide-0.tif")
    return [first, *(shutil.copy(first, folder / f"slide-{number}.tif") for number in (1, 2, 3))]


@pytest.fixture
def embed():
    return SlideFeatureExtractionPipeline(model=tiny_model(), image_processor=tiny_image_processor(), device="cpu")


def test_tiles_of_the_next_slide_are_read_while_one_is_encoded(embed, slides, monkeypatch):
    is_read, read, encode, waits = threading.Event(), SlideReader.read_tile, embed.model.get_tile_features, []

    def read_tile(reader, *args, **kwargs):
        if reader.info.slide_id == "slide-1":
            is_read.set()
        return read(reader, *args, **kwargs)

    def get_tile_features(*args, **kwargs):
        # The first slide is not done before a tile of the second was read, or the wait ends without one.
        waits.append(is_read.wait(SECONDS))
        return encode(*args, **kwargs)

    monkeypatch.setattr(SlideReader, "read_tile", read_tile)
    monkeypatch.setattr(embed.model, "get_tile_features", get_tile_features)
    assert [one["slide_id"] for one in embed(slides[:2], batch_size=8)] == ["slide-0", "slide-1"]
    assert waits
    assert all(waits)


def test_no_more_than_one_slide_is_ahead(embed, slides, monkeypatch):
    is_open, most, opens, closes = set(), [], OpenedSlide.__init__, OpenedSlide.close

    def init(slide, *args, **kwargs):
        is_open.add(id(slide))
        most.append(len(is_open))
        opens(slide, *args, **kwargs)

    def close(slide):
        is_open.discard(id(slide))
        closes(slide)

    monkeypatch.setattr(OpenedSlide, "__init__", init)
    monkeypatch.setattr(OpenedSlide, "close", close)
    assert len(embed(slides, batch_size=8)) == 4
    assert max(most) <= 2
    assert not is_open


def test_results_of_many_are_those_of_one(embed, slides):
    for one, path in zip(embed((path for path in slides), max_tiles=20), slides, strict=True):
        alone = embed(path, max_tiles=20)
        assert one["slide_id"] == alone["slide_id"] == path.stem
        assert torch.equal(one["slide_embedding"], alone["slide_embedding"])
        assert torch.equal(one["tile_xy"], alone["tile_xy"])


def test_a_result_does_not_wait_for_the_next_input(embed, slides):
    goes_on = threading.Event()

    def inputs():
        yield slides[0]
        assert goes_on.wait(SECONDS)
        yield slides[1]

    results = iter(embed(inputs()))
    assert next(results)["slide_id"] == "slide-0"
    goes_on.set()
    assert next(results)["slide_id"] == "slide-1"
    assert next(results, None) is None


def test_what_nobody_takes_is_closed():
    is_open, is_closed = threading.Event(), threading.Event()

    def opens(item):
        if item == 1:
            is_open.set()
        return item

    opened = open_ahead(range(5), opens, lambda item: item == 1 and is_closed.set())
    assert next(opened)() == 0
    assert is_open.wait(SECONDS)
    opened.close()
    assert is_closed.wait(SECONDS)


def test_errors_belong_to_their_item_and_end_nothing_else():
    def opens(item):
        if item == 1:
            raise ValueError("item 1")
        return item

    takes = list(open_ahead([0, 1, 2], opens, lambda item: None))
    assert (takes[0](), takes[2]()) == (0, 2)
    with pytest.raises(ValueError, match="item 1"):
        takes[1]()


def test_an_error_of_the_inputs_themselves_is_raised():
    def inputs():
        yield 0
        raise RuntimeError("no more")

    opened = open_ahead(inputs(), lambda item: item, lambda item: None)
    assert next(opened)() == 0
    with pytest.raises(RuntimeError, match="no more"):
        next(opened)
