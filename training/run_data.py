# SPDX-License-Identifier: Apache-2.0
"""The slides of a run: which are trained on, which this process owns, which are positives together."""

import logging

import numpy as np
import torch

from .config import TrainConfig
from .sampler import StepPlan, StepSampler, partition_slides, shards_of_process
from .tile_source import TileSource, describe_missing

logger = logging.getLogger(__name__)


class RunData:
    """Slides, virtual shards and reports of a run, as one process sees them.

    Args:
        config (`TrainConfig`): the settings.
        process_index (`int`), num_processes (`int`): which process this is.

    Attributes:
        source (`TileSource`): the training split.
        slides (`list` of `int`): the slides that have a report, as places in `source.slides`.
        shards (`list` of `list` of `int`): the slides of each virtual shard.
        owned_shards (`list` of `int`): this process's shards.
        owned (`list` of `int`): their slides, in the order of this process's memory bank.
        sampler (`StepSampler`): plans this process's steps.
        report_embeds (`torch.Tensor` of shape `(slides of the source, R)`): set by `set_report_embeds`.

    Raises:
        ValueError: if there are too few cases for a batch, the processes cannot share it, or files of slides that
            are read in training are not there.
    """

    def __init__(self, config: TrainConfig, process_index: int, num_processes: int) -> None:
        self._config = config
        self.source = self.source_of(config.train_split)
        missing = self.source.missing_slides()
        if missing:  # better now than after days, in the first step that needs one
            raise ValueError(describe_missing(self.source, missing))
        rows = self.source.slides
        self.slides = [place for place, row in enumerate(rows) if row.report.strip()]
        if len(self.slides) < len(rows) and process_index == 0:
            logger.warning("%d of %d slides have no report and are left out.", len(rows) - len(self.slides), len(rows))
        shards = partition_slides([rows[slide].case_id for slide in self.slides], config.slides_per_batch, config.seed)
        self.shards = [[self.slides[place] for place in shard] for shard in shards]
        self.owned_shards = shards_of_process(config.slides_per_batch, process_index, num_processes)
        self.owned = [slide for shard in self.owned_shards for slide in self.shards[shard]]
        self._place_in_bank = {slide: place for place, slide in enumerate(self.owned)}
        self.sampler = StepSampler(
            self.shards,
            self.owned_shards,
            [row.slide_id for row in rows],
            [row.num_tiles for row in rows],
            tiles_per_slide=config.tiles_per_slide,
            retrieved_per_slide=config.retrieved_per_slide if config.bank_mode == "paper" else 0,
            seed=config.seed,
        )
        # Slides with the same report are positives together; those of one case never meet in a batch.
        first_with: dict[str, int] = {}
        self._group_of = torch.tensor([first_with.setdefault(row.report, place) for place, row in enumerate(rows)])

    def source_of(self, split: str) -> TileSource:
        """Opens a split of the run's dataset."""
        config = self._config
        return TileSource(config.dataset, split, slides_root=config.slides_root, private_ids=config.private_ids)

    @property
    def reports(self) -> list[str]:
        """The reports of `slides`."""
        return [self.source.slides[slide].report for slide in self.slides]

    def set_report_embeds(self, encoded: torch.Tensor) -> None:
        """Takes the encodings of `reports`, of shape `(len(slides), R)`.

        Raises:
            ValueError: if one is not finite; it names the slide.
        """
        wrong = (~torch.isfinite(encoded).all(dim=1)).nonzero().flatten().tolist()
        if wrong:
            name = self.source.slides[self.slides[wrong[0]]].slide_id
            raise ValueError(
                f"The encoding of the report of slide {name} is not finite ({len(wrong)} of {len(encoded)} are not): "
                "the text model overflows, or its cache is damaged; delete `report_cache` in `output_dir`, or choose "
                "another `text_model`."
            )
        self.report_embeds = torch.zeros(len(self.source.slides), encoded.shape[1])
        self.report_embeds[self.slides] = encoded

    def mean_report_embed(self) -> torch.Tensor:
        """Mean encoding of the distinct reports: `torch.Tensor` of shape `(R,)`."""
        distinct = {self.source.slides[slide].report: slide for slide in self.slides}
        return self.report_embeds[sorted(distinct.values())].mean(dim=0)

    def num_tiles_owned(self) -> list[int]:
        """Tiles of each owned slide, for `MemoryBank.allocate`."""
        return [self.source.slides[slide].num_tiles for slide in self.owned]

    def bank_places(self, slides: np.ndarray | list[int]) -> torch.Tensor:
        """Where owned slides are in this process's bank: `torch.Tensor` of shape `(len(slides),)`, int64."""
        return torch.tensor([self._place_in_bank[int(slide)] for slide in slides])

    def texts(self, plan: StepPlan, device: torch.device) -> dict[str, torch.Tensor]:
        """The reports of a step as the model takes them: `report_embeds` `(b, R)` and `group_ids` `(b,)`."""
        return {
            "report_embeds": self.report_embeds[plan.slides].to(device),
            "group_ids": self._group_of[plan.slides].to(device),
        }

    def names(self, plan: StepPlan) -> str:
        """The names of a step's slides, for messages."""
        return ", ".join(self.source.slides[slide].slide_id for slide in plan.slides.tolist())
