# SPDX-License-Identifier: Apache-2.0
"""Slides -> embeddings: one stream of tiles, from reader processes through the tile encoder into each slide's sums.

The device is never without a batch while there is a slide to read, and what is in memory does not grow with the
number of tiles or slides.
"""

import logging
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import PreTrainedModel

from modeling_dre_slcl.slide_inference import TileBatchEncoder, check_model
from modeling_dre_slcl.slide_info import SlideError
from modeling_dre_slcl.slide_sampling import SamplingConfig
from modeling_dre_slcl.slide_sums import SlideSums
from modeling_dre_slcl.tile_grid import TileGridConfig
from modeling_dre_slcl.tissue import TISSUE_METHODS

from .build_tiling import DEADLINE_SECONDS
from .embed_reader import OpenedSlide, SlideJob
from .embed_stream import TileBatch, TileStream, timed

logger = logging.getLogger(__name__)
_MAX_READERS = 16


@dataclass(frozen=True)
class EmbedOptions:
    """How slides are embedded.

    Args:
        min_tissue_fraction (`float`, defaults to 0.25): tiles with less tissue are left out.
        tissue (`str`, *optional*): how tissue is found, one of `TISSUE_METHODS`.
        batch_size (`int`, defaults to 32): tiles encoded at once.
        num_workers (`int`, *optional*): reader processes; by default one for each core but one, at most 16; 0 reads
            in this process, where a file that crashes a library ends the run.
        slide_timeout (`float`, defaults to 300): seconds after which a slide is given up if no tile of it was read.
        keep_features (`bool`, defaults to `False`): also return the features of tiles.
        sampling (`SamplingConfig`, *optional*): how many tiles of a slide are encoded; by default all.
    """

    min_tissue_fraction: float = 0.25
    tissue: str = TISSUE_METHODS[0]
    batch_size: int = 32
    num_workers: int | None = None
    slide_timeout: float = DEADLINE_SECONDS
    keep_features: bool = False
    sampling: SamplingConfig = field(default_factory=SamplingConfig)

    def __post_init__(self) -> None:
        if self.batch_size < 1 or (self.num_workers or 0) < 0 or not self.slide_timeout > 0:
            raise ValueError(
                f"expected batch_size of at least 1, num_workers of at least 0 and slide_timeout above 0, found "
                f"{self.batch_size}, {self.num_workers} and {self.slide_timeout}."
            )

    def readers(self) -> int:
        """Returns the number of reader processes."""
        if self.num_workers is not None:
            return self.num_workers
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        # Processes on one machine, each with a device of its own, share its cores.
        cores //= int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        return min(_MAX_READERS, max(1, cores - 1))


def iter_embeddings(
    model: PreTrainedModel,
    image_processor: Any,
    jobs: Sequence[SlideJob],
    options: EmbedOptions,
    *,
    seconds: "Counter[str] | None" = None,
) -> Iterator[tuple[int, dict[str, Any] | SlideError]]:
    """Embeds slides and yields each as soon as it is done, which need not be in their order.

    Args:
        model (`DreSlclModel`): the model; its mode is the same afterwards.
        image_processor (`DreSlclImageProcessor`): prepares tiles.
        jobs (`Sequence[SlideJob]`): the slides, with different ids.
        options (`EmbedOptions`): how.
        seconds (`Counter`, *optional*): receives the time that each step took: `open`, `mask` and `read` summed over
            the reader processes, `encode` (with the sums and the head) and `wait` of this one.

    Yields:
        `tuple`: position of the slide, and its vectors as in `slide_inference.encode_slide` with `fingerprint`,
        `width_px`, `height_px` and `tile_size_level0_px`, or why it is refused.

    Raises:
        ValueError: if the model cannot embed anything.
    """
    check_model(model)
    training, _ = model.training, model.eval()
    run = _Run(model, image_processor, jobs, options, Counter() if seconds is None else seconds)
    try:
        yield from run.embed()
    finally:
        model.train(training)


# Features that may still be computed, and the batch that they are of.
_Pending = tuple[torch.Tensor, TileBatch]


class _Run:
    def __init__(
        self,
        model: PreTrainedModel,
        image_processor: Any,
        jobs: Sequence[SlideJob],
        options: EmbedOptions,
        seconds: "Counter[str]",
    ) -> None:
        self.model, self.jobs, self.options, self.seconds = model, jobs, options, seconds
        self.encoder = TileBatchEncoder(model, image_processor, options.batch_size)
        self.open: dict[int, tuple[OpenedSlide, SlideSums]] = {}
        config = model.config
        grid_config = TileGridConfig(
            tile_size_px=config.tile_size_px,
            tile_mpp=float(config.tile_mpp),
            min_tissue_fraction=options.min_tissue_fraction,
        )
        self.stream = TileStream(
            jobs,
            grid_config,
            tissue=options.tissue,
            batch_size=options.batch_size,
            num_workers=min(options.readers(), 2 * len(jobs)),
            deadline_seconds=options.slide_timeout,
        )

    def embed(self) -> Iterator[tuple[int, dict[str, Any] | SlideError]]:
        pending: _Pending | None = None
        with self.stream:
            while True:
                # Nothing must wait for the next event that this event may depend on.
                event = self.stream.next_event(waits=False) if pending is not None else None
                if event is None and pending is not None:
                    yield from self._add(*pending)
                    pending = None
                if event is None:
                    with timed(self.seconds, "wait"):
                        event = self.stream.next_event()
                if event is None:
                    break
                if isinstance(event, TileBatch):
                    with timed(self.seconds, "encode"):
                        features = self.encoder(event.pixels[: event.num_tiles])
                    # A device computes while the features of the batch before are added.
                    if pending is not None:
                        yield from self._add(*pending)
                    pending = features, event
                elif isinstance(event[1], SlideError):
                    self.open.pop(event[0], None)
                    yield event
                else:
                    self._start(*event)
        self.seconds.update(self.stream.seconds)

    def _start(self, slide: int, opened: OpenedSlide) -> None:
        options = self.options
        sums = SlideSums(
            self.model,
            self.jobs[slide].slide_id,
            opened.tile_xy,
            options.sampling,
            keep_features=options.keep_features,
        )
        self.open[slide] = opened, sums
        self.stream.request(slide, sums.order, sums.limit)

    def _add(self, features: torch.Tensor, batch: TileBatch) -> Iterator[tuple[int, dict[str, Any] | SlideError]]:
        """Adds the features of a batch to the sums of its slides; yields those that are done."""
        done = []
        with timed(self.seconds, "encode"):
            features = features.float().cpu()
            self.stream.release(batch)
            for slide, places, wanted in batch.parts:
                if slide in self.open:
                    try:
                        done += self._add_part(slide, features[places], wanted.start)
                    except SlideError as error:
                        del self.open[slide]
                        self.stream.finish(slide)
                        done.append((slide, error))
        yield from done

    def _add_part(self, slide: int, features: torch.Tensor, start: int) -> list[tuple[int, dict[str, Any]]]:
        opened, sums = self.open[slide]
        sums.add(features, start)
        limit = sums.limit
        if not sums.is_finished():
            if sums.limit != limit:
                self.stream.request(slide, sums.order, sums.limit)
            return []
        del self.open[slide]
        self.stream.finish(slide)
        facts = {
            "slide_id": self.jobs[slide].slide_id,
            "mpp": opened.mpp,
            "fingerprint": opened.fingerprint,
            "width_px": opened.width_px,
            "height_px": opened.height_px,
            "tile_size_level0_px": opened.tile_size_level0_px,
        }
        result = sums.describe()
        if not torch.isfinite(result["slide_embedding"]).all():
            text = "its embedding is not finite; embed in float32, or train the model again"
            raise SlideError(self.jobs[slide].slide_id, "non_finite", text)
        return [(slide, facts | result)]


__all__ = ["EmbedOptions", "SlideJob", "iter_embeddings"]
