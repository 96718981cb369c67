# SPDX-License-Identifier: Apache-2.0
"""A slide whose first tiles are being read, and a queue in which the next slide is opened while one is encoded."""

import contextlib
import itertools
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from transformers import PreTrainedModel

from .slide_sampling import SamplingConfig
from .slide_sums import SlideSums

_Item = TypeVar("_Item")
_Opened = TypeVar("_Opened")


class OpenedSlide:
    """A slide whose tiles are known, with the first of them being read; a context manager.

    Holds three batches of pixels, however many tiles the slide has.

    Args:
        model (`DreSlclModel`): says how large tiles are, and has the codebook.
        path (`str` or `Path`): the slide.
        slide_id (`str`, *optional*), mpp (`float`, *optional*), min_tissue_fraction (`float`), tile_batch_size
            (`int`), num_threads (`int`), return_tile_features (`bool`), tolerance (`float`, *optional*), max_tiles
            (`int`, *optional*), seed (`int`), progress (`bool`): see `slide_inference.encode_slide`.

    Attributes:
        slide_id (`str`), mpp (`float`): of the slide.
        tile_batch_size (`int`): most tiles in a batch.
        grid (`TileGrid`): its tiles.
        sums (`SlideSums`): takes their features, in the order in which `batches` gives them.

    Raises:
        SlideError: if the slide cannot be read, has no usable mpp or no tissue.
        ValueError: if an option is out of its range.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        path: str | Path,
        *,
        slide_id: str | None = None,
        mpp: float | None = None,
        min_tissue_fraction: float = 0.25,
        tile_batch_size: int = 32,
        num_threads: int = 2,
        return_tile_features: bool = False,
        tolerance: float | None = None,
        max_tiles: int | None = None,
        seed: int = 0,
        progress: bool = False,
    ) -> None:
        # Here, so that a model that never opens a slide needs neither OpenSlide nor OpenCV.
        from .slide_reader import SlideReader
        from .slide_tiles import iter_tile_batches, tile_slide
        from .tile_grid import TileGridConfig

        sampling = SamplingConfig(tolerance=tolerance, max_tiles=max_tiles, seed=seed)
        size, tile_mpp = model.config.tile_size_px, float(model.config.tile_mpp)
        config = TileGridConfig(tile_size_px=size, tile_mpp=tile_mpp, min_tissue_fraction=min_tissue_fraction)
        with SlideReader(path, slide_id=slide_id, mpp=mpp) as reader:
            self.grid = tile_slide(reader, config)
            self.slide_id, self.mpp = reader.info.slide_id, reader.info.mpp
        self.sums = SlideSums(model, self.slide_id, self.grid.tile_xy, sampling, keep_features=return_tile_features)
        self.tile_batch_size = tile_batch_size
        options = {"mpp": self.mpp, "slide_id": self.slide_id, "num_threads": num_threads, "progress": progress}
        self._read = partial(iter_tile_batches, path, self.grid, batch_size=tile_batch_size, **options)
        self._batches = self._read(order=self.sums.order[: self.sums.first_part])
        # Reading begins when the first batch is asked for.
        self._first = [next(self._batches)]

    def batches(self) -> Iterator[np.ndarray]:
        """Pixels of the tiles, uint8 RGB `(n, H, W, 3)`, each batch valid until the next one is asked for.

        The features of all tiles before it are to be in `sums` by then.
        """
        for _, pixels in itertools.chain(self._first, self._batches):
            yield pixels
        if self.sums.first_part < self.sums.most:
            self._batches = self._read(order=self.sums.order[self.sums.first_part : self.sums.most])
            for _, pixels in self._batches:
                yield pixels

    def close(self) -> None:
        """Ends reading."""
        self._batches.close()

    def __enter__(self) -> "OpenedSlide":
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()


def open_ahead(
    items: Iterable[_Item], opens: Callable[[_Item], _Opened], closes: Callable[[_Opened], None]
) -> Iterator[Callable[[], _Opened]]:
    """Opens each item in a thread while the one before is in use, and never more than one ahead.

    The thread also asks for the items, so one that is long in coming holds up no result of those before it.

    Args:
        items (iterable): what is to be opened.
        opens (callable): item -> something open.
        closes (callable): ends something open that nobody will take.

    Yields:
        callable: returns the open item, or raises what opening it raised.
    """
    iterator = iter(items)

    def open_next() -> Callable[[], _Opened] | None:
        try:
            item = next(iterator)
        except StopIteration:
            return None
        result: Future[_Opened] = Future()
        try:
            result.set_result(opens(item))
        except Exception as error:  # noqa: BLE001 - belongs to this item, and is raised where it is taken
            result.set_exception(error)
        return result.result

    def drop(ahead: "Future[Callable[[], _Opened] | None]") -> None:
        if ahead.cancelled() or ahead.exception() or (result := ahead.result()) is None:
            return
        with contextlib.suppress(Exception):
            closes(result())

    executor = ThreadPoolExecutor(1, thread_name_prefix="slide-opener")
    ahead = executor.submit(open_next)
    try:
        while (current := ahead.result()) is not None:
            ahead = executor.submit(open_next)
            yield current
    finally:
        # Not waited for: it may be waiting for an item that never comes.
        executor.shutdown(wait=False, cancel_futures=True)
        ahead.add_done_callback(drop)


__all__ = ["OpenedSlide", "open_ahead"]
