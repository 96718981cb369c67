# SPDX-License-Identifier: Apache-2.0
"""What is sent to a reader process of an embedding run when it starts.

Imports nothing of ours at its top: it arrives before `prepare_worker` has seen to it that no reader loads torch.
"""

from collections.abc import Mapping
from typing import Any


def prepare_reader() -> None:
    """Loads what reads slides, and nothing of torch, before a task comes whose time is limited."""
    from .slide_worker import prepare_worker

    prepare_worker()
    from . import embed_reader  # noqa: F401


class ReaderStart:
    """Makes a `SlideReading` in the process where it is first called, and hands tasks to it.

    Args:
        buffer (`SynchronizedArray`): shared bytes, from `multiprocessing`'s `RawArray`.
        grid_fields (`Mapping`): the fields of a `TileGridConfig`.
        tissue (`str`): how tissue is found.
    """

    def __init__(self, buffer: Any, grid_fields: Mapping[str, Any], tissue: str) -> None:
        self._buffer, self._grid_fields, self._tissue = buffer, dict(grid_fields), tissue
        self._reading: Any = None

    def __call__(self, task: Any) -> Any:
        """Does a task; see `SlideReading`."""
        if self._reading is None:
            from modeling_dre_slcl.tile_grid import TileGridConfig

            from .embed_reader import SlideReading

            self._reading = SlideReading(self._buffer, TileGridConfig(**self._grid_fields), self._tissue)
        return self._reading(task)
