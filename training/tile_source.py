# SPDX-License-Identifier: Apache-2.0
"""Slides of a slide dataset and the pixels of their tiles, from stored JPEG or from the slide files themselves.

Both tables are the memory-mapped Arrow files of `datasets`: a random tile costs one look-up and its decoding, no row
group is read around it, and what a process keeps does not grow with the dataset or with the number of reads.

Letters: n tiles, H = W = `tile_size_px`.
"""

import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import simplejpeg
from datasets import Dataset

from modeling_dre_slcl.slide_reader import SlideError

from .dataset_files import has_configuration, load_split
from .private_ids import read_private_paths
from .slide_handles import SlideHandles
from .slide_rows import SlideRow, read_slide_rows

logger = logging.getLogger(__name__)

_MAX_NAMED = 5
_START_OF_JPEG, _END_OF_JPEG = b"\xff\xd8", b"\xff\xd9"


class TileSource:
    """The usable slides of one split of a slide dataset, and their tiles' pixels.

    Can be handed to worker processes, forked or spawned: a pickle holds the names of files, and each process opens
    slides of its own. One thread at a time.

    Args:
        dataset (`str` or `Path`): folder or Hub repository of a slide dataset.
        split (`str`): its split, for example `"train"`.
        slides_root (`str` or `Path`, *optional*): folder of the slide files; needed for a dataset of coordinates only.
        private_ids (`str` or `Path`, *optional*): the private file of a dataset with hashed names, which says where
            its slide files are; then `slides_root` is not needed.

    Attributes:
        slides (`list` of `SlideRow`): slides with status `ok`, in the dataset's order.
        tile_size_px (`int`), tile_mpp (`float`): geometry of the tiles.

    Raises:
        ValueError: if the dataset has no such split, holds no usable slide, mixes geometries, or stores coordinates
            only and `slides_root` is not given or holds none of the slides.
    """

    def __init__(
        self,
        dataset: str | Path,
        split: str,
        *,
        slides_root: str | Path | None = None,
        private_ids: str | Path | None = None,
    ) -> None:
        self.dataset, self.split = str(dataset), split
        self._table = load_split(self.dataset, "slides", split).with_format("arrow")
        self.slides = read_slide_rows(self._table[:])
        if not self.slides:
            raise ValueError(f"{dataset}: split '{split}' has no slide with status 'ok'.")
        geometries = sorted({(row.tile_size_px, row.tile_mpp) for row in self.slides})
        if len(geometries) > 1:
            raise ValueError(
                f"{dataset}: slides of one dataset must share tile_size_px and tile_mpp, found {geometries}."
            )
        self.tile_size_px, self.tile_mpp = geometries[0]
        self._images = _load_images(self.dataset, split)
        self._handles: SlideHandles | None = None
        self._files: dict[str, Path] = {}  # of slides with hashed names
        if self._images is not None:
            self._check_tile_rows()
        elif slides_root is None and private_ids is None:
            raise ValueError(
                f"{dataset} stores tile coordinates but no pixels; say where the slide files are (`slides_root`, or "
                "`private_ids` if it was built with --hash-ids)."
            )
        else:
            if private_ids is not None:
                self._files = read_private_paths(Path(private_ids))
            self._handles = SlideHandles(slides_root or "")
            self._check_slide_files()

    def __getstate__(self) -> dict[str, Any]:
        # The rows are views of the memory-mapped table: another process maps it again instead of getting a copy.
        return {name: value for name, value in self.__dict__.items() if name != "slides"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.slides = read_slide_rows(self._table[:])

    def read(self, slide: int, tiles: np.ndarray) -> np.ndarray:
        """Reads tiles of a slide.

        Args:
            slide (`int`): place of the slide in `slides`.
            tiles (`np.ndarray` of shape `(n,)`, int): indices of its tiles.

        Returns:
            `np.ndarray` of shape `(n, H, W, 3)`, uint8, RGB.

        Raises:
            SlideError: if a tile cannot be read; it names the slide, the tile and what to do.
            IndexError: if the slide has no such tile.
        """
        row, tiles = self.slides[slide], np.asarray(tiles, dtype=np.int64)
        if len(tiles) and not 0 <= tiles.min() <= tiles.max() < row.num_tiles:
            raise IndexError(f"Slide {row.slide_id} has {row.num_tiles} tiles, so none with the index of {tiles}.")
        pixels = np.empty((len(tiles), self.tile_size_px, self.tile_size_px, 3), dtype=np.uint8)
        if len(tiles):
            fill = self._decode_tiles if self._images is not None else self._read_slide
            fill(row, tiles, pixels)
        return pixels

    def iter_batches(self, slide: int, batch_size: int) -> Iterator[np.ndarray]:
        """Yields all tiles of a slide in order, as `np.ndarray` of shape `(n <= batch_size, H, W, 3)`, uint8."""
        for start in range(0, self.slides[slide].num_tiles, batch_size):
            yield self.read(slide, np.arange(start, min(start + batch_size, self.slides[slide].num_tiles)))

    def missing_slides(self) -> list[SlideRow]:
        """Returns the slides whose files are needed for their pixels, and are not there."""
        if self._handles is None:
            return []
        return [row for row in self.slides if not (self._handles.slides_root / self._path(row)).is_file()]

    def _path(self, row: SlideRow) -> str:
        """Where a slide's file is, from `slides_root`; an absolute path for a hashed name."""
        return str(self._files.get(row.slide_id, row.path))

    def _decode_tiles(self, row: SlideRow, tiles: np.ndarray, pixels: np.ndarray) -> None:
        """Decodes stored tiles into `pixels`."""
        rows = self._images[(row.tile_start + tiles).tolist()]
        stored = (value for chunk in rows.column("image").chunks for value in chunk.field("bytes"))
        for place, (tile, value) in enumerate(zip(tiles, stored, strict=True)):
            found = decode_tile(value.as_py() or b"", pixels[place])
            if found:
                raise SlideError(
                    row.slide_id,
                    "unreadable",
                    f"tile {tile} (row {row.tile_start + tile} of `tiles`, split '{self.split}') of {self.dataset}: "
                    f"expected an image of {self.tile_size_px} x {self.tile_size_px} px, found {found}; the dataset "
                    "is damaged, build or download it again",
                )

    def _read_slide(self, row: SlideRow, tiles: np.ndarray, pixels: np.ndarray) -> None:
        """Reads tiles from the slide's file into `pixels`."""
        tile = None
        try:
            reader = self._handles.open(row.slide_id, self._path(row), mpp=row.mpp, fingerprint=row.fingerprint)
            for place, tile in enumerate(tiles.tolist()):
                x, y = row.tile_xy[tile].tolist()
                pixels[place] = reader.read_tile(x, y, tile_size_px=self.tile_size_px, tile_mpp=self.tile_mpp)
        except SlideError as error:
            self._handles.drop(row.slide_id)
            where = "" if tile is None else f"tile {tile} at level-0 {tuple(row.tile_xy[tile].tolist())}: "
            raise SlideError(
                row.slide_id,
                error.reason,
                f"{where}{error.message}. Mend the file and give the same command again, or build {self.dataset} "
                "again, which leaves such slides out",
            ) from error

    def _check_slide_files(self) -> None:
        """Tells a wrong folder, and names slides that are not there, before any work."""
        missing = self.missing_slides()
        if len(missing) == len(self.slides):
            raise ValueError(
                f"{self._handles.slides_root}: none of the {len(missing)} slides of {self.dataset}, split "
                f"'{self.split}', is there, for example {missing[0].path}; set `slides_root` to the folder that these "
                "paths start from, or `private_ids` to the private file of a dataset with hashed names."
            )
        if missing:
            logger.warning("%s", describe_missing(self, missing))

    def _check_tile_rows(self) -> None:
        """Tile t of a slide must be row `tile_start + t` of `tiles`: checked at the first and last tile of each."""
        for row in self.slides:
            first, last = row.tile_start, row.tile_start + row.num_tiles - 1
            found: dict[str, list[Any]] = {}
            if 0 <= first <= last < len(self._images):
                found = self._images[[first, last]].select(["slide_id", "tile_index"]).to_pydict()
            if found != {"slide_id": [row.slide_id] * 2, "tile_index": [0, row.num_tiles - 1]}:
                raise ValueError(
                    f"{self.dataset}: the tiles of slide {row.slide_id} are not where `tile_start` says; the "
                    "configurations `slides` and `tiles` do not belong together, build the dataset again."
                )


def decode_tile(encoded: bytes, out: np.ndarray) -> str:
    """Decodes an image straight into its place in a batch.

    Args:
        encoded (`bytes`): the image file: JPEG, or whatever else OpenCV reads.
        out (`np.ndarray` of shape `(H, W, 3)`, uint8): receives the pixels, RGB.

    Returns:
        `str`: what was found if it is not a whole image of this size, else empty.
    """
    try:
        shape = simplejpeg.decode_jpeg(encoded, buffer=out).shape
    except ValueError:  # no JPEG, too large, or with faults that scanners' files have and that lose no pixel
        # What a stream that was cut off lacks, some versions of OpenCV fill with grey.
        if encoded.startswith(_START_OF_JPEG) and not encoded.rstrip(b"\0").endswith(_END_OF_JPEG):
            return "one that was cut off"
        decoded = cv2.imdecode(np.frombuffer(encoded, dtype=np.uint8), cv2.IMREAD_COLOR_RGB) if encoded else None
        if decoded is None:
            return "no image"
        shape = decoded.shape
        if shape == out.shape:
            out[...] = decoded
    return "" if shape == out.shape else f"{shape[1]} x {shape[0]} px"


def describe_missing(source: TileSource, missing: list[SlideRow]) -> str:
    """Says which slide files are not there, naming the first few."""
    names = ", ".join(row.path for row in missing[:_MAX_NAMED]) + (", ..." if len(missing) > _MAX_NAMED else "")
    return (
        f"{source.dataset}, split '{source.split}': {len(missing)} of {len(source.slides)} slide files are not in the "
        f"folder of slides: {names}. Put them there, or build the dataset again without them."
    )


def _load_images(dataset: str, split: str) -> Dataset | None:
    """Loads `tiles` as Arrow, undecoded; `None` for a dataset of coordinates only."""
    if not has_configuration(dataset, "tiles"):
        return None
    tiles = load_split(dataset, "tiles", split)
    return tiles.select_columns(["slide_id", "tile_index", "image"]).with_format("arrow")


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
