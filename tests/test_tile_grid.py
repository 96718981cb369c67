# SPDX-License-Identifier: Apache-2.0
"""The tile grid against a slow loop, and its promises."""

import numpy as np
import pytest

from modeling_dre_slcl.tile_grid import TileGridConfig, make_tile_grid


def slow_grid(mask, downsample, bounds, mpp, config):
    """Tile by tile, mask pixel by mask pixel, in Python floats."""
    stride_px = config.tile_size_px if config.stride_px is None else config.stride_px
    step, side = stride_px * config.tile_mpp / mpp, round(config.tile_size_px * config.tile_mpp / mpp)
    tiles = []
    i = 0
    while round(i * step) < bounds[3]:
        j = 0
        while round(j * step) < bounds[2]:
            left, top = round(j * step), round(i * step)
            area = 0.0
            for row, column in np.argwhere(mask):
                width = min((column + 1) * downsample, left + side) - max(column * downsample, left)
                height = min((row + 1) * downsample, top + side) - max(row * downsample, top)
                area += max(width, 0) * max(height, 0)
            tiles.append((bounds[0] + left, bounds[1] + top, area / side**2))
            j += 1
        i += 1
    return [tile for tile in tiles if tile[2] > 0 and tile[2] >= config.min_tissue_fraction - 1e-9]


@pytest.mark.parametrize(
    ("mpp", "mask_mpp", "stride_px", "minimum"),
    [
        (0.25, 8.0, None, 0.25),
        (0.2527, 7.3, None, 0.6),
        (0.499, 8.0, 40, 0.0),
        (0.5, 3.7, 75, 0.4),
        (1.9, 9.0, 17, 0.1),
    ],
)
def test_agrees_with_a_slow_loop(mpp, mask_mpp, stride_px, minimum):
    rng = np.random.default_rng(0)
    downsample = mask_mpp / mpp
    config = TileGridConfig(tile_size_px=64, tile_mpp=max(mpp, 0.5), stride_px=stride_px, min_tissue_fraction=minimum)
    mask = np.kron(rng.random((5, 6)) < 0.6, np.ones((4, 5))).astype(bool)
    bounds = (37, 11, round(mask.shape[1] * downsample), round(mask.shape[0] * downsample))
    grid = make_tile_grid(
        mask, mask_downsample=downsample, bounds=bounds, tile_downsample=config.tile_mpp / mpp, config=config
    )
    expected = slow_grid(mask, downsample, bounds, mpp, config)
    assert len(expected) >= 3
    np.testing.assert_array_equal(grid.tile_xy, [tile[:2] for tile in expected])
    np.testing.assert_allclose(grid.tissue_fraction, [tile[2] for tile in expected], atol=1e-6)


def test_types_order_and_metadata():
    config = TileGridConfig(tile_size_px=64, tile_mpp=0.5, stride_px=32)
    mask = np.ones((20, 30), dtype=bool)
    grid = make_tile_grid(mask, mask_downsample=16.0, bounds=(0, 0, 480, 320), tile_downsample=2.0, config=config)
    assert grid.tile_xy.dtype == np.int32
    assert grid.tissue_fraction.dtype == np.float32
    assert (grid.tile_size_px, grid.tile_mpp, grid.stride_px, grid.tile_size_level0_px) == (64, 0.5, 32, 128)
    rows_then_columns = [tuple(xy) for xy in grid.tile_xy[:, ::-1].tolist()]
    assert rows_then_columns == sorted(rows_then_columns)
    assert len(set(rows_then_columns)) == len(grid)


def test_rounding_does_not_accumulate():
    # 256 px at 0.5 um/px on a slide of 0.2527 um/px: 506.53 level-0 pixels, not 506 or 507.
    mask = np.ones((4, 7000), dtype=bool)
    grid = make_tile_grid(
        mask,
        mask_downsample=32.0,
        bounds=(0, 0, 224_000, 128),
        tile_downsample=0.5 / 0.2527,
        config=TileGridConfig(min_tissue_fraction=0.0),
    )
    expected = [round(i * 256 * 0.5 / 0.2527) for i in range(len(grid))]
    assert grid.tile_xy[:, 0].tolist() == expected
    assert len(grid) == 443


def test_all_tissue_keeps_all_inner_tiles_and_none_keeps_none():
    config = TileGridConfig(min_tissue_fraction=1.0)
    mask = np.ones((64, 64), dtype=bool)
    arguments = {"mask_downsample": 16.0, "bounds": (0, 0, 1024, 1024), "tile_downsample": 1.0, "config": config}
    assert len(make_tile_grid(mask, **arguments)) == 16
    assert make_tile_grid(~mask, **arguments).tile_xy.shape == (0, 2)


def test_empty_tiles_are_dropped_even_without_a_minimum():
    mask = np.zeros((64, 64), dtype=bool)
    mask[0, 0] = True
    config = TileGridConfig(min_tissue_fraction=0.0)
    grid = make_tile_grid(mask, mask_downsample=16.0, bounds=(5, 6, 1024, 1024), tile_downsample=1.0, config=config)
    assert grid.tile_xy.tolist() == [[5, 6]]


def test_slide_smaller_than_a_tile_counts_outside_as_background():
    mask = np.ones((8, 8), dtype=bool)
    arguments = {"mask_downsample": 16.0, "bounds": (0, 0, 128, 128), "tile_downsample": 1.0}
    assert len(make_tile_grid(mask, config=TileGridConfig(min_tissue_fraction=0.26), **arguments)) == 0
    grid = make_tile_grid(mask, config=TileGridConfig(min_tissue_fraction=0.25), **arguments)
    assert grid.tissue_fraction.tolist() == [0.25]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("tile_size_px", 0),
        ("tile_mpp", float("nan")),
        ("tile_mpp", 20.0),
        ("stride_px", 0),
        ("min_tissue_fraction", 1.5),
        ("mask_mpp", -1.0),
    ],
)
def test_config_names_the_wrong_field(field, value):
    with pytest.raises(ValueError, match=field):
        TileGridConfig(**{field: value})


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("mask", np.ones((4, 4), dtype=np.uint8)),
        ("mask_downsample", float("inf")),
        ("bounds", (0, 0, 0, 10)),
        ("tile_downsample", 0.0),
    ],
)
def test_wrong_arguments_are_named(field, value):
    arguments = {
        "mask": np.ones((4, 4), dtype=bool),
        "mask_downsample": 16.0,
        "bounds": (0, 0, 64, 64),
        "tile_downsample": 1.0,
    }
    with pytest.raises(ValueError, match=field):
        make_tile_grid(**{**arguments, field: value}, config=TileGridConfig())
