# SPDX-License-Identifier: Apache-2.0
"""Slides of a slide dataset and the pixels of their tiles, from stored JPEG or from the slide files themselves.

Letters: n tiles, H = W = `tile_size_px`.
"""

import json
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from datasets import Dataset, DownloadConfig, Image, get_dataset_config_names, load_dataset

from modeling_dre_slcl.slide_reader import SlideReader

_OPEN_SLIDES = 8
_SLIDE_COLUMNS = frozenset(
    [
        *("slide_id", "case_id", "split", "path", "fingerprint", "vendor", "width_px", "height_px", "mpp"),
        *("tile_size_px", "tile_mpp", "stride_px", "tile_size_level0_px", "tile_xy", "tile_start", "num_tiles"),
        *("report", "status", "reason"),
    ]
)


@dataclass(frozen=True)
class SlideRow:
    """One usable slide of a slide dataset.

    Args:
        slide_id (`str`): its name.
        case_id (`str`): its case.
        path (`str`): its file, relative to the folder of slides.
        report (`str`): its report; empty where there is none.
        mpp (`float`): level-0 resolution in um/px.
        tile_xy (`np.ndarray` of shape `(n, 2)`, int32): level-0 (x, y) of each tile's top-left corner.
        tile_start (`int`): row of its first tile in the `tiles` configuration of the same split.
        tile_size_level0_px (`int`): side of a tile in level-0 pixels.
        labels (`dict`): the label columns.
    """

    slide_id: str
    case_id: str
    path: str
    report: str
    mpp: float
    tile_xy: np.ndarray
    tile_start: int
    tile_size_level0_px: int
    labels: dict[str, Any] = field(default_factory=dict)

    @property
    def num_tiles(self) -> int:
        """Number of tiles."""
        return len(self.tile_xy)


class TileSource:
    """The usable slides of one split of a slide dataset, and their tiles' pixels.

    Args:
        dataset (`str` or `Path`): folder or Hub repository of a slide dataset.
        split (`str`): its split, for example `"train"`.
        slides_root (`str` or `Path`, *optional*): folder of the slide files; needed for a dataset of coordinates only.

    Attributes:
        slides (`list` of `SlideRow`): slides with status `ok`, in the dataset's order.
        tile_size_px (`int`), tile_mpp (`float`): geometry of the tiles.

    Raises:
        ValueError: if the dataset has no such split, holds no usable slide, mixes geometries, or stores coordinates
            only and `slides_root` is not given.
    """

    def __init__(self, dataset: str | Path, split: str, *, slides_root: str | Path | None = None) -> None:
        self.dataset, self.split = str(dataset), split
        self.slides_root = Path(slides_root) if slides_root is not None else None
        table = _load(self.dataset, "slides", split)
        rows = [row for row in table if row["status"] == "ok" and row["num_tiles"] > 0]
        if not rows:
            raise ValueError(f"{dataset}: split '{split}' has no slide with status 'ok'.")
        geometries = sorted({(row["tile_size_px"], row["tile_mpp"]) for row in rows})
        if len(geometries) > 1:
            raise ValueError(
                f"{dataset}: slides of one dataset must share tile_size_px and tile_mpp, found {geometries}."
            )
        self.tile_size_px, self.tile_mpp = geometries[0]
        self.slides = [_slide_row(row) for row in rows]
        self._images = _load_images(self.dataset, split)
        if self._images is None and self.slides_root is None:
            raise ValueError(
                f"{dataset} stores tile coordinates but no pixels; say where the slide files are (`slides_root`)."
            )
        self._check_tile_rows()
        self._readers: OrderedDict[str, SlideReader] = OrderedDict()

    def read(self, slide: int, tiles: np.ndarray) -> np.ndarray:
        """Reads tiles of a slide.

        Args:
            slide (`int`): place of the slide in `slides`.
            tiles (`np.ndarray` of shape `(n,)`, int): indices of its tiles.

        Returns:
            `np.ndarray` of shape `(n, H, W, 3)`, uint8, RGB.
        """
        row = self.slides[slide]
        if self._images is None:
            reader = self._reader(row)
            size = {"tile_size_px": self.tile_size_px, "tile_mpp": self.tile_mpp}
            return np.stack([reader.read_tile(*map(int, row.tile_xy[tile]), **size) for tile in tiles])
        images = self._images[(row.tile_start + np.asarray(tiles)).tolist()]["image"]
        return np.stack([self._decode(image["bytes"], row, tile) for image, tile in zip(images, tiles, strict=True)])

    def iter_batches(self, slide: int, batch_size: int) -> Iterator[np.ndarray]:
        """Yields all tiles of a slide in order, as `np.ndarray` of shape `(n <= batch_size, H, W, 3)`, uint8."""
        for start in range(0, self.slides[slide].num_tiles, batch_size):
            yield self.read(slide, np.arange(start, min(start + batch_size, self.slides[slide].num_tiles)))

    def _decode(self, jpeg: bytes, row: SlideRow, tile: int) -> np.ndarray:
        pixels = cv2.imdecode(np.frombuffer(jpeg, dtype=np.uint8), cv2.IMREAD_COLOR_RGB)
        if pixels is None or pixels.shape != (self.tile_size_px, self.tile_size_px, 3):
            raise ValueError(
                f"{self.dataset}: tile {tile} of slide {row.slide_id} is not an image of {self.tile_size_px} x "
                f"{self.tile_size_px} px; the dataset is damaged, build it again."
            )
        return pixels

    def _reader(self, row: SlideRow) -> SlideReader:
        """An open reader of the slide; the least recently used one is closed when too many are open."""
        if row.slide_id in self._readers:
            self._readers.move_to_end(row.slide_id)
        else:
            if len(self._readers) >= _OPEN_SLIDES:
                self._readers.popitem(last=False)[1].close()
            path = self.slides_root / row.path
            self._readers[row.slide_id] = SlideReader(path, slide_id=row.slide_id, mpp=row.mpp)
        return self._readers[row.slide_id]

    def _check_tile_rows(self) -> None:
        """Tile t of a slide must be row `tile_start + t` of `tiles`: checked at the first and last tile of each."""
        if self._images is None:
            return
        ids = self._images.select_columns(["slide_id", "tile_index"])
        for row in self.slides:
            first, last = ids[row.tile_start], ids[row.tile_start + row.num_tiles - 1]
            if (first["slide_id"], first["tile_index"]) != (row.slide_id, 0) or last != {
                "slide_id": row.slide_id,
                "tile_index": row.num_tiles - 1,
            }:
                raise ValueError(
                    f"{self.dataset}: the tiles of slide {row.slide_id} are not where `tile_start` says; the "
                    "configurations `slides` and `tiles` do not belong together, build the dataset again."
                )


def _load(dataset: str, name: str, split: str) -> Dataset:
    try:
        return load_dataset(dataset, name, split=split, download_config=DownloadConfig(disable_tqdm=True))
    except ValueError as error:
        raise ValueError(f"{dataset}: configuration '{name}', split '{split}' cannot be loaded ({error}).") from error


def _load_images(dataset: str, split: str) -> Dataset | None:
    if "tiles" not in get_dataset_config_names(dataset):
        return None
    tiles = _load(dataset, "tiles", split).cast_column("image", Image(decode=False))
    return tiles.select_columns(["slide_id", "tile_index", "image"])


def _slide_row(row: dict[str, Any]) -> SlideRow:
    return SlideRow(
        slide_id=row["slide_id"],
        case_id=row["case_id"],
        path=row["path"],
        report=row["report"] or "",
        mpp=row["mpp"],
        tile_xy=np.asarray(row["tile_xy"], dtype=np.int32).reshape(-1, 2),
        tile_start=row["tile_start"],
        tile_size_level0_px=row["tile_size_level0_px"],
        labels={key: value for key, value in row.items() if key not in _SLIDE_COLUMNS},
    )


def describe_geometry(tile_size_px: int, tile_mpp: float) -> str:
    """Says a tile geometry in words, for errors."""
    return json.dumps({"tile_size_px": tile_size_px, "tile_mpp": tile_mpp})


def check_geometry(source: TileSource, tile_size_px: int, tile_mpp: float) -> None:
    """Refuses a dataset whose tiles are not those a model was made for.

    Raises:
        ValueError: with both geometries.
    """
    if source.tile_size_px != tile_size_px or abs(source.tile_mpp - tile_mpp) > 1e-6 * tile_mpp:
        raise ValueError(
            f"The model takes tiles of {describe_geometry(tile_size_px, tile_mpp)}, but {source.dataset} holds "
            f"{describe_geometry(source.tile_size_px, source.tile_mpp)}. Build the dataset with the model's geometry."
        )
