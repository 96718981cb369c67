# SPDX-License-Identifier: Apache-2.0
"""From a slide to its tiles: tissue, grid, pixel batches in constant memory, and pictures to check them by.

Shape legend: N tiles of the slide, n tiles of a batch, H = W = `tile_size_px`.
"""

import itertools
import math
import queue
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from .slide_reader import SlideError, SlideReader
from .tile_grid import TileGrid, TileGridConfig, make_tile_grid, tile_size_at_level0
from .tissue import TISSUE_METHODS, tissue_mask

try:
    import cv2
except ImportError:
    cv2 = None

if TYPE_CHECKING:
    from tqdm import tqdm

# Neighbouring tiles share compressed blocks of the file, so a thread takes a run of them.
_MAX_TILES_PER_TASK = 16
_BATCHES_AHEAD = 2
# Decoded tiles of the file, for grids that do not coincide with them: enough for a row of a slide 200,000 px wide.
_CACHE_BYTES = 192 << 20
_GRID_RGB = (20, 120, 20)


def tile_slide(reader: SlideReader, config: TileGridConfig, *, tissue: str = TISSUE_METHODS[0]) -> TileGrid:
    """Finds the tissue of an open slide and lays the tile grid over it.

    Args:
        reader (`SlideReader`): the open slide.
        config (`TileGridConfig`): size, resolution and stride of the tiles, and how much tissue they need.
        tissue (`str`, *optional*): how tissue is found, one of `TISSUE_METHODS`.

    Returns:
        `TileGrid`: at least one tile.

    Raises:
        SlideError: `mpp_too_coarse` if tiles would have to be magnified by more than 5%, `no_tissue` if no tile has
            enough tissue, or what reading the slide raises.
    """
    reader.check_resolution(config.tile_mpp)
    overview_rgb, downsample = reader.read_overview(config.mask_mpp)
    return tile_mask(reader, tissue_mask(overview_rgb, reader.info.mpp * downsample, tissue), downsample, config)


def tile_mask(reader: SlideReader, mask: np.ndarray, downsample: float, config: TileGridConfig) -> TileGrid:
    """Lays the tile grid of an open slide over a tissue mask.

    Args:
        reader (`SlideReader`): the open slide.
        mask (`np.ndarray` of shape `(h, w)`, bool): True where there is tissue; covers the slide's bounds.
        downsample (`float`): level-0 pixels per pixel of the mask.
        config (`TileGridConfig`): size, resolution and stride of the tiles, and how much tissue they need.

    Returns:
        `TileGrid`: at least one tile.

    Raises:
        SlideError: `mpp_too_coarse` or `no_tissue`, see `tile_slide`.
    """
    info = reader.info
    reader.check_resolution(config.tile_mpp)
    grid = make_tile_grid(
        mask,
        mask_downsample=downsample,
        bounds=info.bounds,
        tile_downsample=info.tile_downsample(config.tile_mpp),
        config=config,
    )
    if len(grid) == 0:
        raise SlideError(
            info.slide_id,
            "no_tissue",
            f"none of its tiles (of {grid.tile_size_level0_px} level-0 px) has at least "
            f"{config.min_tissue_fraction:.0%} tissue; {mask.mean():.2%} of the scanned area ({info.bounds[2]} x "
            f"{info.bounds[3]} px) looks like stained tissue. Look at the slide, or lower min_tissue_fraction",
        )
    return grid


def iter_tile_batches(
    path: str | Path,
    grid: TileGrid,
    *,
    batch_size: int,
    mpp: float | None = None,
    slide_id: str | None = None,
    num_threads: int = 2,
    order: np.ndarray | None = None,
    progress: bool = False,
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Reads the pixels of all tiles of a grid, batch by batch and in order, with several threads.

    Three batches are in memory, however many tiles the slide has, and their memory is used again: the pixels of a
    batch are valid until the next one is asked for. Each thread reads through its own `SlideReader`.

    Args:
        path (`str` or `Path`): the slide.
        grid (`TileGrid`): its tiles.
        batch_size (`int`): tiles per batch; the last batch may be smaller.
        mpp (`float`, *optional*): resolution of level 0, um/px, where the file's own is to be overridden. Pass
            `reader.info.mpp` to be sure that it is the one the grid was made with.
        slide_id (`str`, *optional*): name of the slide in errors; the file's stem by default.
        num_threads (`int`, defaults to 2): reading threads.
        order (`np.ndarray` of shape `(m,)`, int64, *optional*): the tiles to read, in this order; by default all.
        progress (`bool`, defaults to `False`): whether a progress bar is shown.

    Yields:
        `tuple[np.ndarray, np.ndarray]`: tile indices int64 `(n,)` and their pixels uint8 RGB `(n, H, W, 3)`.

    Raises:
        ValueError: if a number is below 1, or the grid was made for another resolution of the slide.
        SlideError: if a tile can not be read.
    """
    if batch_size < 1 or num_threads < 1:
        raise ValueError(f"batch_size and num_threads: expected at least 1, found {batch_size} and {num_threads}.")
    from tqdm.auto import tqdm  # a tenth of a second, which those who only lay grids need not wait

    with ExitStack() as stack:
        readers: queue.SimpleQueue[SlideReader] = queue.SimpleQueue()
        for _ in range(num_threads):
            reader = stack.enter_context(
                SlideReader(path, slide_id=slide_id, mpp=mpp, cache_bytes=_CACHE_BYTES // num_threads)
            )
            _check_same_geometry(reader, grid)
            readers.put(reader)
        executor = ThreadPoolExecutor(num_threads, thread_name_prefix="tile-reader")
        # Left in reverse order: reading stops first, then the readers are closed.
        stack.callback(executor.shutdown, wait=True, cancel_futures=True)
        order = np.arange(len(grid), dtype=np.int64) if order is None else order
        bar = stack.enter_context(tqdm(total=len(order), unit="tile", disable=not progress))
        pending: deque[_PendingBatch] = deque()
        shape = (min(batch_size, len(order)), grid.tile_size_px, grid.tile_size_px, 3)
        # Memory that is new to the process costs about as much time as filling it twice.
        buffers = itertools.cycle([np.empty(shape, dtype=np.uint8) for _ in range(_BATCHES_AHEAD + 1)])
        for start in range(0, len(order), batch_size):
            tiles = order[start : start + batch_size]
            pixels = next(buffers)[: len(tiles)]
            pending.append(_submit_batch(executor, readers, grid, tiles, pixels, num_threads))
            if len(pending) == _BATCHES_AHEAD:
                yield _finish_batch(pending.popleft(), bar)
        while pending:
            yield _finish_batch(pending.popleft(), bar)


# Indices (n,), pixels (n, H, W, 3) being filled, and the tasks that fill them.
_PendingBatch = tuple[np.ndarray, np.ndarray, list[Future[None]]]


def _check_same_geometry(reader: SlideReader, grid: TileGrid) -> None:
    expected = tile_size_at_level0(grid.tile_size_px, reader.info.tile_downsample(grid.tile_mpp))
    if expected != grid.tile_size_level0_px:
        raise ValueError(
            f"{reader.info.slide_id}: the grid's tiles are {grid.tile_size_level0_px} level-0 pixels wide, but at the "
            f"slide's {reader.info.mpp:g} um/px they would be {expected}. Pass the mpp that the grid was made with."
        )


def _submit_batch(
    executor: ThreadPoolExecutor,
    readers: "queue.SimpleQueue[SlideReader]",
    grid: TileGrid,
    tiles: np.ndarray,
    pixels: np.ndarray,
    num_threads: int,
) -> _PendingBatch:
    """Starts reading the tiles into `pixels`, in runs of neighbouring ones."""

    def read_run(start: int, stop: int) -> None:
        reader = readers.get()
        try:
            for place, (x, y) in enumerate(grid.tile_xy[tiles[start:stop]].tolist(), start):
                reader.read_tile(x, y, tile_size_px=grid.tile_size_px, tile_mpp=grid.tile_mpp, out=pixels[place])
        finally:
            readers.put(reader)

    run_length = min(_MAX_TILES_PER_TASK, math.ceil(len(tiles) / num_threads))
    tasks = [executor.submit(read_run, i, i + run_length) for i in range(0, len(tiles), run_length)]
    return tiles, pixels, tasks


def _finish_batch(batch: _PendingBatch, bar: "tqdm") -> tuple[np.ndarray, np.ndarray]:
    indices, pixels, tasks = batch
    for task in tasks:
        task.result()
    bar.update(len(indices))
    return indices, pixels


def draw_tile_grid(
    overview_rgb: np.ndarray, downsample: float, bounds: tuple[int, int, int, int], grid: TileGrid
) -> np.ndarray:
    """Draws the outline of every tile on an overview, to see at a glance what will be encoded.

    Args:
        overview_rgb (`np.ndarray` of shape `(h, w, 3)`, uint8): picture of the bounds, from `read_overview`.
        downsample (`float`): level-0 pixels per overview pixel.
        bounds (`tuple[int, int, int, int]`): x, y, width, height shown by the overview, level-0 pixels.
        grid (`TileGrid`): the tiles.

    Returns:
        `np.ndarray` of shape `(h, w, 3)`, uint8: the picture with outlines; what is not a tile is paled.
    """
    _require_cv2()
    left, top, right, bottom = _overview_boxes(overview_rgb, downsample, bounds, grid).T
    height, width = overview_rgb.shape[:2]
    # Steps up and down at the corners of the tiles, summed along both axes: how many tiles cover a pixel.
    cover = np.zeros((height + 1, width + 1), dtype=np.int32)
    for rows, columns, step in ((top, left, 1), (bottom, right, 1), (top, right, -1), (bottom, left, -1)):
        np.add.at(cover, (rows, columns), step)
    is_tile = cover.cumsum(axis=0).cumsum(axis=1)[:height, :width] > 0
    preview = np.where(is_tile[..., None], overview_rgb, 128 + overview_rgb // 2)
    for step in range(int(np.max(right - left, initial=0))):
        columns = np.minimum(left + step, right - 1)
        preview[top, columns] = preview[bottom - 1, columns] = _GRID_RGB
    for step in range(int(np.max(bottom - top, initial=0))):
        rows = np.minimum(top + step, bottom - 1)
        preview[rows, left] = preview[rows, right - 1] = _GRID_RGB
    return preview


def draw_heatmap(
    overview_rgb: np.ndarray,
    downsample: float,
    bounds: tuple[int, int, int, int],
    grid: TileGrid,
    values: np.ndarray,
) -> np.ndarray:
    """Lays one colour per tile over an overview: blue for low, red for high values.

    The colour scale runs from the 2nd to the 98th percentile of the values, so that single outliers do not flatten
    it. Where tiles overlap, their values are averaged.

    Args:
        overview_rgb (`np.ndarray` of shape `(h, w, 3)`, uint8): picture of the bounds, from `read_overview`.
        downsample (`float`): level-0 pixels per overview pixel.
        bounds (`tuple[int, int, int, int]`): x, y, width, height shown by the overview, level-0 pixels.
        grid (`TileGrid`): the tiles.
        values (`np.ndarray` of shape `(N,)`): one finite number per tile, such as an attribution.

    Returns:
        `np.ndarray` of shape `(h, w, 3)`, uint8: the overview with half-transparent tiles.

    Raises:
        ValueError: if there is not one finite value per tile.
    """
    _require_cv2()
    values = np.asarray(values, dtype=np.float64)
    if values.shape != (len(grid),) or not np.isfinite(values).all():
        raise ValueError(f"values: expected {len(grid)} finite numbers, one per tile, found shape {values.shape}.")
    total = np.zeros(overview_rgb.shape[:2])
    count = np.zeros(overview_rgb.shape[:2])
    boxes = _overview_boxes(overview_rgb, downsample, bounds, grid).tolist()
    for (left, top, right, bottom), value in zip(boxes, _scale_to_unit(values), strict=True):
        total[top:bottom, left:right] += value
        count[top:bottom, left:right] += 1
    # TURBO keeps its order for colour-blind readers and in print better than JET.
    unit = np.rint(255 * total / np.maximum(count, 1)).astype(np.uint8)
    colours = cv2.cvtColor(cv2.applyColorMap(unit, cv2.COLORMAP_TURBO), cv2.COLOR_BGR2RGB)
    blended = cv2.addWeighted(overview_rgb, 0.5, colours, 0.5, 0)
    return np.where(count[..., None] > 0, blended, overview_rgb)


def _scale_to_unit(values: np.ndarray) -> np.ndarray:
    """Maps the 2nd to 98th percentile of the values to [0, 1]; equal values become 0.5."""
    if len(values) == 0:
        return values
    low, high = np.percentile(values, [2, 98])
    if high <= low:
        return np.full_like(values, 0.5)
    return np.clip((values - low) / (high - low), 0, 1)


def _overview_boxes(
    overview_rgb: np.ndarray, downsample: float, bounds: tuple[int, int, int, int], grid: TileGrid
) -> np.ndarray:
    """Left, top, right, bottom (exclusive) of each tile, int64 (N, 4): at least one pixel, inside the overview."""
    height, width = overview_rgb.shape[:2]
    start = (grid.tile_xy - np.array(bounds[:2])) / downsample
    stop = start + grid.tile_size_level0_px / downsample
    start = np.clip(np.rint(start).astype(np.int64), 0, [width - 1, height - 1])
    stop = np.clip(np.rint(stop).astype(np.int64), start + 1, [width, height])
    return np.concatenate([start, stop], axis=1)


def _require_cv2() -> None:
    if cv2 is None:
        raise ImportError("Drawing needs OpenCV: pip install opencv-python-headless")
