# SPDX-License-Identifier: Apache-2.0
"""How well a model in training matches held-out slides and their reports.

Letters: S held-out slides, U distinct reports, E joint width, R width of report encodings.
"""

from collections.abc import Callable, Iterator

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from transformers import PreTrainedModel

from modeling_dre_slcl import DreSlclImageProcessor
from modeling_dre_slcl.contrastive_loss import similarity_logits

from .embed_split import embed_split
from .evaluation_tasks import group_slides
from .metrics.recall_at_k.rank_gallery import rank_gallery
from .sampler import generator
from .tile_source import TileSource

LOWER_IS_BETTER = ("loss",)


class ValidationStopped(Exception):  # noqa: N818 (not an error)
    """A process was asked to stop while it validated."""


class _Share:
    """The slides of one process, and of each as many tiles as are wanted, in the way of a `TileSource`."""

    def __init__(
        self, source: TileSource, places: list[int], tiles_per_slide: int | None, should_stop: Callable[[], bool]
    ) -> None:
        self.dataset, self.split = source.dataset, source.split
        self.tile_size_px, self.tile_mpp = source.tile_size_px, source.tile_mpp
        self.slides = [source.slides[place] for place in places]
        self._source, self._places, self._should_stop = source, places, should_stop
        self._tiles_per_slide = tiles_per_slide

    def iter_batches(self, slide: int, batch_size: int) -> Iterator[np.ndarray]:
        """Yields tiles of a slide, the same ones every time."""
        row = self.slides[slide]
        tiles = np.arange(row.num_tiles)
        if self._tiles_per_slide is not None and self._tiles_per_slide < row.num_tiles:
            drawn = generator("validation", row.slide_id).permutation(row.num_tiles)
            tiles = np.sort(drawn[: self._tiles_per_slide])
        for start in range(0, len(tiles), batch_size):
            if self._should_stop():
                raise ValidationStopped
            yield self._source.read(self._places[slide], tiles[start : start + batch_size])


class Validator:
    """Validates a model on the slides of a split that have a report; each process embeds its share of them.

    Args:
        source (`TileSource`): the split.
        image_processor (`DreSlclImageProcessor`): prepares tiles.
        accelerator (`Accelerator`): the run's.
        tiles_per_slide (`int`, *optional*): random tiles of each slide to encode; by default all.
        batch_size (`int`): tiles encoded at once.

    Raises:
        ValueError: if fewer than two slides have a report.
    """

    def __init__(
        self,
        source: TileSource,
        image_processor: DreSlclImageProcessor,
        accelerator: Accelerator,
        *,
        tiles_per_slide: int | None,
        batch_size: int,
    ) -> None:
        self.source, self.image_processor, self.accelerator = source, image_processor, accelerator
        self.tiles_per_slide, self.batch_size = tiles_per_slide, batch_size
        self.places = [place for place, row in enumerate(source.slides) if row.report.strip()]
        if len(self.places) < 2:
            raise ValueError(f"{source.dataset}: split '{source.split}' needs two slides with reports to validate on.")
        self._report_embeds = torch.empty(0)

    @property
    def reports(self) -> list[str]:
        """The reports of the slides that are validated on."""
        return [self.source.slides[place].report for place in self.places]

    def set_report_embeds(self, encoded: torch.Tensor) -> None:
        """Takes the encodings of `reports`, of shape `(S, R)`."""
        self._report_embeds = encoded

    def validate(self, model: PreTrainedModel, should_stop: Callable[[], bool]) -> dict[str, float] | None:
        """Embeds the split and scores it. Collective; every process gets the same numbers.

        Args:
            model (`DreSlclModel`): unwrapped.
            should_stop (callable): whether this process was asked to stop.

        Returns:
            `dict` or `None`: `mean_average_precision`, `recall@1`, `recall@5` (slides find their reports), `loss` (the
            whole split as one batch) and `slides`; `None` if a process was asked to stop meanwhile.
        """
        rank, size = self.accelerator.process_index, self.accelerator.num_processes
        width = model.config.projection_size
        # The last column says whether a slide was embedded.
        table = torch.zeros(len(self.places), width + 1, dtype=torch.float32)
        stopped = 0.0
        try:
            self._embed(model, table, list(range(len(self.places)))[rank::size], should_stop)
        except ValidationStopped:
            stopped = 1.0
        device = self.accelerator.device
        if float(self.accelerator.reduce(torch.tensor(stopped, device=device), "sum")):
            return None
        table = self.accelerator.reduce(table.to(device), "sum").cpu()
        scores = self._score(model, table[:, :-1], table[:, -1] > 0)
        # All follow the main process, so that no rounding makes them disagree on what is best.
        values = torch.tensor(list(scores.values()), dtype=torch.float64, device=device)
        values = self.accelerator.reduce(values * self.accelerator.is_main_process, "sum").tolist()
        return dict(zip(scores, values, strict=True))

    def _embed(
        self, model: PreTrainedModel, table: torch.Tensor, rows: list[int], should_stop: Callable[[], bool]
    ) -> None:
        if not rows:
            return
        share = _Share(self.source, [self.places[row] for row in rows], self.tiles_per_slide, should_stop)
        with self.accelerator.autocast():
            is_main = self.accelerator.is_main_process
            embedded = embed_split(model, self.image_processor, share, batch_size=self.batch_size, progress=is_main)
        row_of = {self.source.slides[self.places[row]].slide_id: row for row in rows}
        for slide_id, projection in zip(embedded.slide_ids, embedded.slide_projection, strict=True):
            table[row_of[slide_id], :-1] = torch.from_numpy(projection)
            table[row_of[slide_id], -1] = 1

    @torch.no_grad()
    def _score(self, model: PreTrainedModel, slides: torch.Tensor, is_embedded: torch.Tensor) -> dict[str, float]:
        """Projections `(S, E)` and which of them are there -> scores."""
        kept = is_embedded.nonzero().flatten().tolist()
        rows = [self.source.slides[self.places[place]] for place in kept]
        groups = group_slides([row.case_id for row in rows], [row.report for row in rows])
        reports = model.get_report_projection(self._report_embeds[kept].to(model.device)).float().cpu()
        scale = model.logit_scale.detach().float().exp().clamp(max=model.config.max_logit_scale).cpu()
        logits = similarity_logits(slides[kept], reports, scale)
        numbers = {group: number for number, group in enumerate(dict.fromkeys(groups))}
        group_of = torch.tensor([numbers[group] for group in groups])
        same = (group_of[:, None] == group_of).float()
        target = same / same.sum(dim=1, keepdim=True)
        loss = (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
        # Each distinct report once: slides of a case, which share it, would otherwise be counted as several answers.
        first = list({row.report: place for place, row in reversed(list(enumerate(rows)))}.values())
        ranks, precision = rank_gallery(logits[:, first].numpy(), same[:, first].bool().numpy())
        return {
            "mean_average_precision": float(precision.mean()),
            "recall@1": float((ranks <= 1).mean()),
            "recall@5": float((ranks <= 5).mean()),
            "loss": float(loss),
            "slides": float(len(kept)),
        }


def is_better(value: float, best: float | None, metric: str) -> bool:
    """Whether a validation's value beats the best one so far."""
    if best is None:
        return True
    return value < best if metric in LOWER_IS_BETTER else value > best
