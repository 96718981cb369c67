# SPDX-License-Identifier: Apache-2.0
"""Writes the embeddings of slides in a thread, so that no device waits for a disk."""

import argparse
from collections import Counter, deque
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from .embed_files import embedding_path, write_embedding, write_trident
from .embed_stream import timed

_MAX_WAITING = 8


class EmbeddingWriter:
    """Writes one slide after the other; a context manager, at whose end all are on the disk.

    Args:
        arguments (`argparse.Namespace`): of `dre-slcl embed`: `out`, `format`, `tile_features` and `trident`.
        config (`DreSlclConfig`): of the model.
        seconds (`Counter`): receives the time that writing took, as `write`.
    """

    def __init__(self, arguments: argparse.Namespace, config: Any, seconds: "Counter[str]") -> None:
        self._arguments, self._config, self._seconds = arguments, config, seconds
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="embedding-writer")
        self._waiting: deque[Future[None]] = deque()

    def __enter__(self) -> "EmbeddingWriter":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: Any) -> None:
        try:
            while self._waiting and kind is None:
                self._waiting.popleft().result()
        finally:
            self._executor.shutdown(cancel_futures=True)

    def write(self, result: Mapping[str, Any]) -> None:
        """Hands over what is to be written of a slide.

        Args:
            result (`Mapping`): from `iter_embeddings`, with `given_mpp`.

        Raises:
            OSError: if a slide before it could not be written.
        """
        self._waiting.append(self._executor.submit(self._write, result))
        while len(self._waiting) > _MAX_WAITING or (self._waiting and self._waiting[0].done()):
            self._waiting.popleft().result()

    def _write(self, result: Mapping[str, Any]) -> None:
        arguments, config = self._arguments, self._config
        with timed(self._seconds, "write"):
            if arguments.trident is not None:
                geometry = {"tile_size_px": config.tile_size_px, "tile_mpp": float(config.tile_mpp)}
                write_trident(arguments.trident, result, **geometry)
            # Last, for it says that the slide is done.
            path = embedding_path(arguments.out, result["slide_id"], arguments.format)
            write_embedding(path, result, with_tiles=arguments.tile_features)
