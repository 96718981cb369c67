# SPDX-License-Identifier: Apache-2.0
"""The slides of a run: which are trained on, which this process owns, what they are trained towards.

Letters: b slides of this process in a step, P further reports, R width of report encodings, L labels.
"""

import logging

import numpy as np
import torch

from .bank_modes import BANK_MODES
from .config import TrainConfig
from .sampler import StepPlan, StepSampler, partition_slides, shards_of_process
from .slide_labels import SlideLabels, trained_labels
from .slide_reports import SlideReports
from .strata import Strata
from .tile_source import TileSource, describe_missing

logger = logging.getLogger(__name__)


class RunData:
    """Slides, virtual shards, reports and labels of a run, as one process sees them.

    Args:
        config (`TrainConfig`): the settings.
        process_index (`int`), num_processes (`int`): which process this is.

    Attributes:
        source (`TileSource`): the training split.
        reports (`SlideReports`, *optional*): unless the objective is labels only.
        labels (`SlideLabels`, *optional*): unless the objective is contrastive only.
        slides (`list` of `int`): the slides that have what the objective needs, as places in `source.slides`: a
            report, a label, or for both objectives any of them.
        shards (`list` of `list` of `int`): the slides of each virtual shard.
        owned_shards (`list` of `int`): this process's shards.
        owned (`list` of `int`): their slides, in the order of this process's memory bank.
        strata (`Strata`, *optional*): of the owned slides, in modes that sample by codeword.
        sampler (`StepSampler`): plans this process's steps.

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
        self._report_negatives = config.report_negatives
        self._read_targets(config)
        if len(self.slides) < len(rows) and process_index == 0:
            what = {"contrastive": "report", "labels": "label", "both": "report and no label"}[config.objective]
            logger.warning(
                "%d of %d slides have no %s and are left out.", len(rows) - len(self.slides), len(rows), what
            )
        shards = partition_slides([rows[slide].case_id for slide in self.slides], config.slides_per_batch, config.seed)
        self.shards = [[self.slides[place] for place in shard] for shard in shards]
        self.owned_shards = shards_of_process(config.slides_per_batch, process_index, num_processes)
        self.owned = [slide for shard in self.owned_shards for slide in self.shards[shard]]
        self._place_in_bank = {slide: place for place, slide in enumerate(self.owned)}
        mode = BANK_MODES[config.bank_mode]
        self.strata = Strata(self.owned, self.num_tiles_owned()) if mode.stratified else None
        self.sampler = StepSampler(
            self.shards,
            self.owned_shards,
            [row.slide_id for row in rows],
            [row.num_tiles for row in rows],
            tiles_per_slide=config.tiles_per_slide,
            retrieved_per_slide=config.retrieved_per_slide if mode.retrieves else 0,
            refreshed_per_slide=config.refresh_per_slide,
            strata=self.strata,
            seed=config.seed,
        )

    def source_of(self, split: str) -> TileSource:
        """Opens a split of the run's dataset."""
        config = self._config
        return TileSource(config.dataset, split, slides_root=config.slides_root, private_ids=config.private_ids)

    def _read_targets(self, config: TrainConfig) -> None:
        """Reads what slides are trained towards, and chooses the slides that have it."""
        rows, usable = self.source.slides, []
        self.reports = self.labels = None
        if config.objective != "labels":
            self.reports = SlideReports(
                rows, separator=config.report_separator, sections=config.report_sections, seed=config.seed
            )
            usable.append(self.reports.has_report)
        if config.objective != "contrastive":
            self.labels = SlideLabels(rows, config.label_columns, trained_labels(config))
            usable.append(self.labels.has_label)
        self.slides = [place for place, flags in enumerate(zip(*usable, strict=True)) if any(flags)]

    def num_tiles_owned(self) -> list[int]:
        """Tiles of each owned slide, for `MemoryBank.allocate`."""
        return [self.source.slides[slide].num_tiles for slide in self.owned]

    def bank_places(self, slides: np.ndarray | list[int]) -> torch.Tensor:
        """Where owned slides are in this process's bank: `torch.Tensor` of shape `(len(slides),)`, int64."""
        return torch.tensor([self._place_in_bank[int(slide)] for slide in slides])

    def texts(self, plan: StepPlan, device: torch.device) -> dict[str, torch.Tensor]:
        """What the slides of a step are trained towards, as the model takes it.

        Returns:
            `dict`: with reports `report_embeds` `(b, R)` and `group_ids` `(b, 2)`, and for `report_negatives: all`
            `negative_embeds` `(P, R)` and `negative_group_ids` `(P, 2)`; with labels `labels` `(b,)` or `(b, L)`.
        """
        targets = {}
        if self.reports is not None:
            names = ("report_embeds", "group_ids")
            targets.update(zip(names, self.reports.of_step(plan.step, plan.slides.tolist()), strict=True))
            if self._report_negatives == "all":
                names = ("negative_embeds", "negative_group_ids")
                targets.update(zip(names, self.reports.only_negatives(device), strict=True))
        if self.labels is not None:
            targets["labels"] = self.labels.values[plan.slides]
        return {name: tensor.to(device) for name, tensor in targets.items()}

    def names(self, plan: StepPlan) -> str:
        """The names of a step's slides, for messages."""
        return ", ".join(self.source.slides[slide].slide_id for slide in plan.slides.tolist())
