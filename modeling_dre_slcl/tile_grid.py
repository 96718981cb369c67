# SPDX-License-Identifier: Apache-2.0
"""The tile grid of a slide: which squares of the slide are tiles, decided from a tissue mask.

Pure numpy: no files, no OpenSlide. The same mask and numbers give the same bytes on every machine.

Two frames are used. Level-0 pixels count from the top-left corner of the slide's finest image; mask pixels count from
the top-left corner of the slide's bounds and are `mask_downsample` level-0 pixels wide.
"""

import math
from dataclasses import dataclass

import numpy as np

_ROWS_AT_ONCE = 256


@dataclass(frozen=True)
class TileGridConfig:
    """Numbers that place the tiles of a slide.

    Args:
        tile_size_px (`int`, defaults to 256): side of a tile, pixels at `tile_mpp`.
        tile_mpp (`float`, defaults to 0.5): resolution of a tile, um/px.
        stride_px (`int`, *optional*): distance between neighbouring tiles, pixels at `tile_mpp`; `tile_size_px`
            (no overlap, no gap) if not given.
        min_tissue_fraction (`float`, defaults to 0.25): least share of a tile's area that must be tissue, in [0, 1].
            Tiles without any tissue are never kept.
        mask_mpp (`float`, defaults to 8.0): resolution at which tissue is looked for, um/px.

    Raises:
        ValueError: if a number is out of its range.
    """

    tile_size_px: int = 256
    tile_mpp: float = 0.5
    stride_px: int | None = None
    min_tissue_fraction: float = 0.25
    mask_mpp: float = 8.0

    def __post_init__(self) -> None:
        if not 1 <= self.tile_size_px <= 8192:
            raise ValueError(f"tile_size_px: expected 1 to 8192 pixels, found {self.tile_size_px}.")
        if not 0.05 <= self.tile_mpp <= 10:
            raise ValueError(f"tile_mpp: expected 0.05 to 10 um/px (0.5 is 20x), found {self.tile_mpp}.")
        if self.stride_px is not None and self.stride_px < 1:
            raise ValueError(f"stride_px: expected at least 1 pixel or None, found {self.stride_px}.")
        if not 0 <= self.min_tissue_fraction <= 1:
            raise ValueError(f"min_tissue_fraction: expected 0 to 1, found {self.min_tissue_fraction}.")
        if not 0.05 <= self.mask_mpp <= 100:
            raise ValueError(f"mask_mpp: expected 0.05 to 100 um/px, found {self.mask_mpp}.")

    @property
    def effective_stride_px(self) -> int:
        """Distance between neighbouring tiles, pixels at `tile_mpp`."""
        return self.tile_size_px if self.stride_px is None else self.stride_px


@dataclass(frozen=True, eq=False)
class TileGrid:
    """The tiles of one slide, in row-major order.

    Args:
        tile_xy (`np.ndarray` of shape `(N, 2)`, int32): (x, y) = (column, row) of each tile's top-left corner,
            level-0 pixels.
        tissue_fraction (`np.ndarray` of shape `(N,)`, float32): share of each tile's area that is tissue.
        tile_size_px (`int`): side of a tile, pixels at `tile_mpp`.
        tile_mpp (`float`): resolution of a tile, um/px.
        stride_px (`int`): distance between neighbouring tiles, pixels at `tile_mpp`.
        tile_size_level0_px (`int`): side of a tile, level-0 pixels.
    """

    tile_xy: np.ndarray
    tissue_fraction: np.ndarray
    tile_size_px: int
    tile_mpp: float
    stride_px: int
    tile_size_level0_px: int

    def __len__(self) -> int:
        return len(self.tile_xy)


def tile_size_at_level0(tile_size_px: int, tile_downsample: float) -> int:
    """Returns the side of a tile in level-0 pixels; `tile_downsample` is level-0 pixels per pixel of the tile."""
    return max(1, round(tile_size_px * tile_downsample))


def make_tile_grid(
    mask: np.ndarray,
    *,
    mask_downsample: float,
    bounds: tuple[int, int, int, int],
    tile_downsample: float,
    config: TileGridConfig,
) -> TileGrid:
    """Lays a regular grid over the slide's bounds and keeps the tiles with enough tissue.

    Tile (row i, column j) starts at `bounds[0] + round(j * stride)`, `bounds[1] + round(i * stride)` with the exact
    stride `stride_px * tile_downsample` in level-0 pixels, so rounding never accumulates. Tiles may reach over the
    right and lower edges of the bounds; what lies outside counts as background.

    Args:
        mask (`np.ndarray` of shape `(h, w)`, bool): True where there is tissue; covers the bounds.
        mask_downsample (`float`): level-0 pixels per mask pixel.
        bounds (`tuple[int, int, int, int]`): x, y, width, height of the scanned area, level-0 pixels.
        tile_downsample (`float`): level-0 pixels per pixel of a tile, from `SlideInfo.tile_downsample`.
        config (`TileGridConfig`): size, resolution and stride of the tiles, and how much tissue they need.

    Returns:
        `TileGrid`: the kept tiles, row by row from the top, each row from the left; may be empty.

    Raises:
        ValueError: if the mask is not a 2-D bool array, or a number is not positive.
    """
    _check_arguments(mask, mask_downsample, bounds, tile_downsample)
    footprint_px = tile_size_at_level0(config.tile_size_px, tile_downsample)
    stride_level0_px = config.effective_stride_px * tile_downsample
    columns = _axis_starts(bounds[2], stride_level0_px)
    rows = _axis_starts(bounds[3], stride_level0_px)
    fraction = _tissue_fraction(mask, rows, columns, footprint_px, mask_downsample)
    # argwhere walks row by row, which is the order promised.
    kept = np.argwhere((fraction >= config.min_tissue_fraction) & (fraction > 0))
    tile_xy = np.stack([bounds[0] + columns[kept[:, 1]], bounds[1] + rows[kept[:, 0]]], axis=1)
    return TileGrid(
        tile_xy=tile_xy.astype(np.int32),
        tissue_fraction=fraction[kept[:, 0], kept[:, 1]].astype(np.float32),
        tile_size_px=config.tile_size_px,
        tile_mpp=config.tile_mpp,
        stride_px=config.effective_stride_px,
        tile_size_level0_px=footprint_px,
    )


def _check_arguments(
    mask: np.ndarray, mask_downsample: float, bounds: tuple[int, int, int, int], tile_downsample: float
) -> None:
    if mask.ndim != 2 or mask.dtype != np.bool_ or mask.size == 0:
        raise ValueError(f"mask: expected a non-empty (h, w) bool array, found {mask.shape} {mask.dtype}.")
    if not (math.isfinite(mask_downsample) and mask_downsample > 0):
        raise ValueError(f"mask_downsample: expected a positive number, found {mask_downsample}.")
    if bounds[2] < 1 or bounds[3] < 1:
        raise ValueError(f"bounds: expected a positive width and height (x, y, width, height), found {bounds}.")
    if not (math.isfinite(tile_downsample) and tile_downsample > 0):
        raise ValueError(f"tile_downsample: expected a positive number, found {tile_downsample}.")


def _axis_starts(length_px: int, stride_px: float) -> np.ndarray:
    """Starts of the tiles along one axis, int64 (n,), level-0 pixels; all below `length_px`."""
    starts = np.rint(np.arange(math.ceil(length_px / stride_px), dtype=np.float64) * stride_px).astype(np.int64)
    # A stride below one pixel would name the same pixel twice.
    return starts[(starts < length_px) & (np.diff(starts, prepend=-1) > 0)]


def _tissue_fraction(
    mask: np.ndarray, rows: np.ndarray, columns: np.ndarray, footprint_px: int, mask_downsample: float
) -> np.ndarray:
    """Exact share of tissue in each tile, float64 (rows, columns), with mask pixels cut where a tile's edge cuts them.

    Tiles form a grid, so the area integral separates into one integral along x and one along y.
    """
    # (h, w) -> (h, columns) -> (columns, h) -> (columns, rows) -> (rows, columns)
    along_x = np.empty((mask.shape[0], len(columns)))
    for start in range(0, mask.shape[0], _ROWS_AT_ONCE):  # the sums take 8 bytes a pixel
        rows_of_mask = slice(start, start + _ROWS_AT_ONCE)
        along_x[rows_of_mask] = _integrate(
            mask[rows_of_mask], columns / mask_downsample, footprint_px / mask_downsample
        )
    along_xy = _integrate(along_x.T, rows / mask_downsample, footprint_px / mask_downsample)
    fraction = along_xy.T / (footprint_px / mask_downsample) ** 2
    # Sums of floats may leave [0, 1] by 1e-15, which would keep empty tiles or lose full ones.
    return np.clip(np.round(fraction, 9), 0.0, 1.0)


def _integrate(values: np.ndarray, starts: np.ndarray, length: float) -> np.ndarray:
    """Integrates each row of `values` (m, n), constant in each cell, over `[start, start + length)`."""
    # Whole numbers of mask pixels are exact, and several times faster.
    kind = np.int32 if values.dtype == np.bool_ else np.float64
    cumulative = np.zeros((values.shape[0], values.shape[1] + 1), dtype=kind)
    np.cumsum(values, axis=1, dtype=kind, out=cumulative[:, 1:])
    return _interpolate(cumulative, starts + length) - _interpolate(cumulative, starts)


def _interpolate(cumulative: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """Reads the cumulative sums (m, n + 1) at fractional positions, which outside of [0, n] are moved to the edge."""
    positions = np.clip(positions, 0, cumulative.shape[1] - 1)
    left = np.minimum(positions.astype(np.int64), cumulative.shape[1] - 2)
    weight = positions - left
    return cumulative[:, left] * (1 - weight) + cumulative[:, left + 1] * weight
