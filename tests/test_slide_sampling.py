# SPDX-License-Identifier: Apache-2.0
"""A part of the tiles: drawn evenly, the same for a seed, and with a stated error that holds."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from modeling_dre_slcl.slide_sampling import SamplingConfig, sampling_order
from modeling_dre_slcl.slide_sums import SlideSums

from .tiny_models import tiny_model

SIDE = 50


def corners(count=SIDE * SIDE):
    x, y = np.meshgrid(np.arange(SIDE), np.arange(SIDE))
    return (np.stack([x, y], -1).reshape(-1, 2)[:count] * 256).astype(np.int32)


@pytest.fixture(scope="module")
def model():
    return tiny_model()


@pytest.fixture(scope="module")
def features(model):
    """Features that change over the slide, as tissue does: four kinds of tile in blobs, with noise."""
    generator = torch.Generator().manual_seed(0)
    centres = F.normalize(model.codebook + 0.5 * torch.randn(model.codebook.shape, generator=generator), dim=1)
    x, y = (torch.from_numpy(corners() // 256).T).float()
    kind = ((torch.sin(x / 6) > 0).long() + 2 * (torch.cos(y / 9) > 0.3).long()) % len(centres)
    return F.normalize(centres[kind] + 0.3 * torch.randn(len(x), centres.shape[1], generator=generator), dim=1)


def draw(model, features, sampling, name="slide"):
    sums, start = SlideSums(model, name, corners(len(features)), sampling, keep_features=True), 0
    while True:
        sums.add(features[torch.from_numpy(sums.order[start : sums.limit])], start)
        start = sums.limit
        if sums.is_finished():
            return sums.describe()


@pytest.mark.parametrize("count", [1, 2, 3, 31, 1000, SIDE * SIDE])
def test_an_order_has_every_tile_once(count):
    order = sampling_order(corners(count), "a", 0)
    assert sorted(order.tolist()) == list(range(count))
    assert order.dtype == np.int64


def test_an_order_depends_on_slide_and_seed_only():
    first = sampling_order(corners(), "a", 0)
    assert np.array_equal(first, sampling_order(corners(), "a", 0))
    assert not np.array_equal(first, sampling_order(corners(), "a", 1))
    assert not np.array_equal(first, sampling_order(corners(), "b", 0))


@pytest.mark.parametrize("size", [100, 300, 700])
def test_every_beginning_is_spread_more_evenly_than_chance(size):
    def unevenness(order):
        cells = (corners()[order[:size]] // (256 * 10)) @ [1, 5]
        return np.bincount(cells, minlength=25).var()

    rng = np.random.default_rng(0)
    drawn = np.mean([unevenness(sampling_order(corners(), "a", seed)) for seed in range(20)])
    by_chance = np.mean([unevenness(rng.permutation(SIDE * SIDE)) for _ in range(20)])
    assert drawn < 0.5 * by_chance


def test_each_tile_is_drawn_as_often_as_any_other():
    counts = np.zeros(64)
    for seed in range(400):
        counts[sampling_order(corners(64), "a", seed)[:16]] += 1
    # 400 draws of a quarter: 100 each, with a standard deviation of below 9.
    assert counts.min() > 60
    assert counts.max() < 140


def test_the_stated_error_holds(model, features):
    full = F.normalize(draw(model, features, SamplingConfig())["slide_embedding"].double(), dim=0)
    true, expected, within = [], [], []
    for size in (320, 640, 1280):
        for seed in range(12):
            result = draw(model, features, SamplingConfig(max_tiles=size, seed=seed))
            assert result["num_tiles_encoded"] == size
            true.append(1 - float(F.normalize(result["slide_embedding"].double(), dim=0) @ full))
            expected.append(result["estimated_error"])
            within.append(true[-1] <= result["error_bound"])
    assert np.mean(within) >= 0.93
    assert 0.5 < np.mean(expected) / np.mean(true) < 2


def test_a_tolerance_stops_early_and_is_kept(model, features):
    full = F.normalize(draw(model, features, SamplingConfig())["slide_embedding"].double(), dim=0)
    results = [draw(model, features, SamplingConfig(tolerance=0.01, seed=seed)) for seed in range(20)]
    errors = [1 - float(F.normalize(one["slide_embedding"].double(), dim=0) @ full) for one in results]
    assert all(one["num_tiles_encoded"] < len(features) / 2 for one in results)
    assert all(one["error_bound"] <= 0.01 for one in results)
    assert np.mean(np.array(errors) <= 0.01) >= 0.9


def test_a_tolerance_that_cannot_be_met_takes_all_tiles_and_is_exact(model, features):
    result = draw(model, features, SamplingConfig(tolerance=1e-12))
    full = draw(model, features, SamplingConfig())
    assert result["estimated_error"] == result["error_bound"] == 0
    for name in ("slide_embedding", "residuals", "codeword_counts", "tile_features", "tile_xy"):
        assert torch.equal(result[name], full[name]), name


def test_sums_of_a_sample_stand_for_the_whole_slide(model, features):
    full = draw(model, features, SamplingConfig())
    drawn = [draw(model, features, SamplingConfig(max_tiles=640, seed=seed)) for seed in range(30)]
    for name, scale in (("residuals", 0.1), ("codeword_counts", 0.03)):
        mean = torch.stack([one[name].double() for one in drawn]).mean(0)
        assert float((mean - full[name]).norm() / full[name].double().norm()) < scale
    assert len(drawn[0]["tile_features"]) == len(drawn[0]["tile_xy"]) == 640
    place = {tuple(corner): tile for tile, corner in enumerate(corners().tolist())}
    tiles = [place[tuple(corner)] for corner in drawn[0]["tile_xy"].tolist()]
    assert torch.equal(drawn[0]["tile_features"], features[tiles])


def test_too_few_tiles_promise_nothing(model, features):
    assert draw(model, features, SamplingConfig(max_tiles=20))["error_bound"] == 1


@pytest.mark.parametrize(
    ("options", "message"), [({"tolerance": 0}, "tolerance: expected"), ({"max_tiles": 0}, "max_tiles: expected")]
)
def test_refuses_settings_out_of_range(options, message):
    with pytest.raises(ValueError, match=message):
        SamplingConfig(**options)


def test_more_is_drawn_where_tiles_move_the_embedding_most():
    """A tenth of the tiles, in one corner, are of another codeword and varied; directions hang on them."""
    vlad = tiny_model(codeword_tokens="vlad")
    generator = torch.Generator().manual_seed(1)
    is_rare = torch.from_numpy((corners() // 256 < 15).all(1))
    codewords = F.normalize(vlad.codebook[torch.where(is_rare, 1, 0)], dim=1)
    spread = torch.where(is_rare, 0.2, 0.02)[:, None]
    features = F.normalize(codewords + spread * torch.randn(codewords.shape, generator=generator), dim=1)
    full = F.normalize(draw(vlad, features, SamplingConfig())["slide_embedding"].double(), dim=0)
    planned, even, shares = [], [], []
    for seed in range(8):
        result = draw(vlad, features, SamplingConfig(max_tiles=640, seed=seed))
        planned.append(1 - float(F.normalize(result["slide_embedding"].double(), dim=0) @ full))
        is_drawn_rare = (result["tile_xy"] // 256 < 15).all(1).double().mean()
        shares.append(float(is_drawn_rare / is_rare.double().mean()))
        state = vlad.empty_state()
        state.add(features[torch.from_numpy(sampling_order(corners(), "slide", seed)[:640])], vlad.codebook)
        with torch.no_grad():
            embedding = vlad.get_state_features(state).slide_embedding[0]
        even.append(1 - float(F.normalize(embedding.double(), dim=0) @ full))
    assert np.mean(shares) > 1.5
    assert np.mean(planned) < 0.7 * np.mean(even)
