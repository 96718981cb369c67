# SPDX-License-Identifier: Apache-2.0
"""Many slides in one stream: the same bits as one alone, whatever its neighbours do, die of, or leave out."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from dre_slcl.training import embed_stream
from dre_slcl.training.embed_engine import EmbedOptions, SlideJob, iter_embeddings
from modeling_dre_slcl import DreSlclImageProcessor
from modeling_dre_slcl.slide_info import SlideError
from modeling_dre_slcl.slide_sampling import SamplingConfig

from .deadly_reader import DeadlyReader
from .slide_cohort import write_slide
from .tiny_models import tiny_image_processor, tiny_model


@pytest.fixture(scope="module")
def model():
    return tiny_model(tile_mpp=1.0)


@pytest.fixture(scope="module")
def jobs(tmp_path_factory):
    """Five slides of different tissue, one without any, and one that is no slide."""
    folder = tmp_path_factory.mktemp("slides")
    for number in range(5):
        write_slide(folder / f"s{number}.tif", number, size=384 + 64 * number)
    write_slide(folder / "blank.tif", 9, is_blank=True)
    (folder / "broken.tif").write_bytes(b"II*\0 this is no slide")
    names = ["s0", "broken", "s1", "s2", "blank", "s3", "s4"]
    return [SlideJob(name, folder / f"{name}.tif") for name in names]


def embed(model, jobs, **options):
    """Results by slide."""
    results = iter_embeddings(model, tiny_image_processor(), jobs, EmbedOptions(**options))
    return {jobs[place].slide_id: result for place, result in results}


@pytest.fixture(scope="module")
def reference(model, jobs):
    return embed(model, jobs, num_workers=0, keep_features=True)


def refusals(results):
    return {name: one.reason for name, one in results.items() if isinstance(one, SlideError)}


def assert_same_bits(found, expected):
    for name in ("slide_embedding", "slide_projection", "residuals", "codeword_counts"):
        assert torch.equal(found[name], expected[name]), name


def test_residuals_are_those_of_a_plain_loop_in_double_precision(model, jobs, reference):
    codebook = model.codebook.double()
    for job in jobs:
        result = reference[job.slide_id]
        if isinstance(result, SlideError):
            continue
        expected = torch.zeros_like(codebook)
        for feature in result["tile_features"].double():
            nearest = int((codebook - feature).square().sum(1).argmin())
            expected[nearest] += feature - codebook[nearest]
        assert len(result["tile_features"]) == result["num_tiles"] == len(result["tile_xy"])
        torch.testing.assert_close(result["residuals"].double(), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("num_workers", [1, 3])
def test_workers_and_neighbours_change_no_bit(model, jobs, reference, num_workers):
    found = embed(model, jobs, num_workers=num_workers)
    assert refusals(found) == refusals(reference) == {"broken": "truncated", "blank": "no_tissue"}
    alone = model.encode_slide(jobs[3].path, image_processor=tiny_image_processor())
    assert_same_bits(found["s2"], alone)
    for name in ("s0", "s1", "s2", "s3", "s4"):
        assert_same_bits(found[name], reference[name])


@pytest.mark.parametrize("batch_size", [1, 7, 500])
def test_the_batch_size_changes_an_embedding_by_rounding_only(model, jobs, reference, batch_size):
    found = embed(model, jobs, num_workers=0, batch_size=batch_size)
    for name in ("s0", "s4"):
        cosine = torch.cosine_similarity(
            found[name]["slide_embedding"].double(), reference[name]["slide_embedding"].double(), dim=0
        )
        assert 1 - float(cosine) < 1e-7


def test_batches_span_slides(model, jobs):
    sizes = []
    encoded = model.get_tile_features

    def count(pixel_values):
        sizes.append(len(pixel_values))
        return encoded(pixel_values)

    good = [job for job in jobs if job.slide_id.startswith("s")]
    model.get_tile_features = count
    try:
        results = embed(model, good, num_workers=0, batch_size=24)
    finally:
        del model.get_tile_features
    num_tiles = sum(result["num_tiles"] for result in results.values())
    assert set(sizes) == {24}
    # The last one of all may be partly empty, and one where no slide was open yet.
    assert len(sizes) <= -(-num_tiles // 24) + 1


def test_a_reader_that_dies_or_hangs_costs_its_slide_only(model, jobs, reference, monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[1])  # where a new process finds this reader
    monkeypatch.setattr(embed_stream, "ReaderStart", DeadlyReader)
    path = jobs[0].path
    deadly = [SlideJob("crash", path), jobs[0], SlideJob("burst", path), SlideJob("hang", path), *jobs[2:4]]
    found = embed(model, deadly, num_workers=2, slide_timeout=5.0)
    assert refusals(found) == {"crash": "reader_aborted", "burst": "reader_aborted", "hang": "timeout"}
    assert "SIGSEGV" in str(found["crash"])
    for name in ("s0", "s1", "s2"):
        assert_same_bits(found[name], reference[name])


def test_a_tile_encoder_that_gives_nan_refuses_the_slide_and_names_the_tile(model, jobs, reference):
    encoded, calls = model.get_tile_features, Counter()

    def fail_once(pixel_values):
        calls["n"] += 1
        features = encoded(pixel_values)
        if calls["n"] == 1:
            features[5] = torch.nan
        return features

    model.get_tile_features = fail_once
    try:
        found = embed(model, [jobs[0], jobs[2], jobs[3]], num_workers=0)
    finally:
        del model.get_tile_features
    [(name, reason)] = refusals(found).items()
    assert reason == "non_finite"
    assert "tile 5 " in str(found[name])
    for other in {"s0", "s1", "s2"} - {name}:
        assert_same_bits(found[other], reference[other])


def test_a_model_that_cannot_embed_anything_is_refused(jobs):
    model = tiny_model()
    model.codebook.zero_()
    with pytest.raises(ValueError, match="all codewords of its codebook are zero"):
        embed(model, jobs, num_workers=0)
    with pytest.raises(ValueError, match="all codewords of its codebook are zero"):
        model.encode_slide(jobs[0].path, image_processor=tiny_image_processor())
    model = tiny_model()
    model.slide_projection.weight.data[0, 0] = torch.inf
    with pytest.raises(ValueError, match=r"weights `slide_projection\.weight` are not finite"):
        embed(model, jobs, num_workers=0)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_sample_is_the_same_in_a_stream_and_alone(model, jobs, reference, num_workers):
    options = {"tolerance": 0.02, "max_tiles": 100, "seed": 3}
    found = embed(model, jobs, num_workers=num_workers, sampling=SamplingConfig(**options))
    alone = model.encode_slide(jobs[-1].path, image_processor=tiny_image_processor(), **options)
    assert_same_bits(found["s4"], alone)
    assert found["s4"]["num_tiles_encoded"] == alone["num_tiles_encoded"] <= 100
    assert found["s4"]["estimated_error"] == pytest.approx(alone["estimated_error"], rel=1e-9)
    # Small slides are encoded whole: nothing is estimated.
    assert_same_bits(found["s0"], reference["s0"])
    assert found["s0"]["estimated_error"] == 0


def test_the_time_of_each_step_is_told(model, jobs):
    seconds = Counter()
    list(iter_embeddings(model, tiny_image_processor(), jobs, EmbedOptions(num_workers=0), seconds=seconds))
    assert set(seconds) == {"open", "mask", "read", "encode", "wait"}
    assert all(value > 0 for value in seconds.values())


def test_pixels_in_the_stream_are_those_of_the_slide(jobs):
    from modeling_dre_slcl.slide_reader import SlideReader
    from modeling_dre_slcl.tile_grid import TileGridConfig

    grid_config = TileGridConfig(tile_size_px=32, tile_mpp=1.0)
    options = {"tissue": "stain", "batch_size": 16, "num_workers": 1}
    num_seen = 0
    with SlideReader(jobs[0].path) as reader, embed_stream.TileStream(jobs[:1], grid_config, **options) as stream:
        for event in stream:
            if not isinstance(event, embed_stream.TileBatch):
                opened = event[1]
                order = np.arange(len(opened.tile_xy))[::-1].copy()
                stream.request(0, order, len(order))
                continue
            for _, places, wanted in event.parts:
                for pixels, tile in zip(event.pixels[places], order[wanted], strict=True):
                    x, y = opened.tile_xy[tile].tolist()
                    assert np.array_equal(pixels, reader.read_tile(x, y, tile_size_px=32, tile_mpp=1.0))
                    num_seen += 1
            stream.release(event)
            if num_seen == len(order):
                stream.finish(0)
    assert num_seen == len(order) > 16


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"do_resize": False, "image_mean": [0.4, 0.5, 0.6], "image_std": [0.2, 0.3, 0.1]},
        {"size": {"height": 20, "width": 20}},
        {"do_normalize": False},
    ],
)
def test_batches_are_prepared_as_the_processor_prepares_images(options):
    processor = DreSlclImageProcessor(**{"size": {"height": 32, "width": 32}, **options})
    tiles = np.random.default_rng(0).integers(0, 256, (5, 32, 32, 3), dtype=np.uint8)
    expected = torch.cat([processor(tile, return_tensors="pt")["pixel_values"] for tile in tiles])
    assert torch.equal(processor.tiles_to_pixel_values(tiles, "cpu"), expected)
