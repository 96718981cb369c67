# SPDX-License-Identifier: Apache-2.0
"""Reads pixels ahead in worker processes, in a given order; the one place where training starts a `DataLoader`.

What it yields depends neither on the number of workers nor on how they are started. Pixels stay uint8: they are
resized and normalised in batches on the device, by the image processor's `tiles_to_pixel_values`.
"""

from collections.abc import Iterable, Iterator
from typing import Any

import cv2
import torch
from torch.utils.data import DataLoader, Dataset

from modeling_dre_slcl.slide_reader import SlideError

_BATCHES_AHEAD = 4  # of each worker


class _ErrorsAsItems(Dataset):
    """Hands the error of a slide over as an item: raised in a worker it would lose its type, and gain a traceback."""

    def __init__(self, dataset: Dataset) -> None:
        self.dataset = dataset

    def __getitem__(self, index: int) -> Any:
        try:
            return self.dataset[index]
        except SlideError as error:
            return error


def load_in_order(dataset: Dataset, order: Iterable[int], *, num_workers: int, seed: int) -> Iterator[Any]:
    """Yields `dataset[index]` for each index in the given order.

    Args:
        dataset (`torch.utils.data.Dataset`): gives whole batches.
        order (iterable of `int`): indices.
        num_workers (`int`): processes that read ahead; 0: this process reads.
        seed (`int`): the run's seed.

    Raises:
        SlideError: as `dataset` raised it, once the items before it were yielded.
    """
    loader = DataLoader(
        _ErrorsAsItems(dataset),
        batch_size=None,
        sampler=list(order),
        num_workers=num_workers,
        prefetch_factor=_BATCHES_AHEAD if num_workers else None,
        pin_memory=torch.cuda.is_available(),
        # A generator of its own keeps the loader from drawing on the global random state.
        generator=torch.Generator().manual_seed(seed),
        worker_init_fn=_one_thread,
    )
    for item in loader:
        if isinstance(item, SlideError):
            raise item
        yield item


def _one_thread(_: int) -> None:
    """The workers themselves are the parallelism."""
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
