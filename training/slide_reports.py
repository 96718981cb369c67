# SPDX-License-Identifier: Apache-2.0
"""Which texts stand for a slide in a step, which slides are positives together, and which texts are only negatives.

Letters: S slides, b slides of this process in a step, T texts, P texts that are only negatives, R width of encodings.
"""

from collections.abc import Sequence
from itertools import chain

import torch

from .evaluation_tasks import group_slides
from .sampler import generator
from .slide_rows import SlideRow


class SlideReports:
    """The reports of a run.

    A report is one text, or, where a separator is given, several: its sections. `sections="sample"` takes one of a
    slide's sections in each step, a function of (seed, step, slide); `"mean"` takes the mean of their encodings.

    Two slides of a batch are positives together if their cases are linked (the same case, or cases that share a whole
    report), or if they meet with the same text.

    Args:
        rows (sequence of `SlideRow`): the S slides.
        separator (`str`, *optional*): what stands between the sections of a report.
        sections (`str`): `"mean"` or `"sample"`.
        seed (`int`): the run's seed.

    Attributes:
        has_report (`list` of `bool`): of each slide.
        distinct (`list` of `str`): the texts to encode.
    """

    def __init__(self, rows: Sequence[SlideRow], *, separator: str | None, sections: str, seed: int) -> None:
        self.rows, self.seed = rows, seed
        split = [split_report(row.report, separator) for row in rows]
        self.has_report = [bool(parts) for parts in split]
        self.distinct = list(dict.fromkeys(part for parts in split for part in parts))
        # A text is one section, or all sections of a report together, whose encodings are averaged.
        choices = [[(part,) for part in parts] if sections == "sample" or not parts else [parts] for parts in split]
        self._texts = {text: place for place, text in enumerate(dict.fromkeys(chain.from_iterable(choices)))}
        self._choices = [[self._texts[text] for text in texts] for texts in choices]
        self._group_of = torch.full((len(rows),), -1)
        told = [place for place, parts in enumerate(split) if parts]
        groups = group_slides([rows[place].case_id for place in told], [rows[place].report for place in told])
        number_of = {group: number for number, group in enumerate(dict.fromkeys(groups))}
        self._group_of[told] = torch.tensor([number_of[group] for group in groups], dtype=torch.int64)
        self._negatives, self._negative_ids = self._only_negatives()
        self._embeds: torch.Tensor | None = None

    def set_encodings(self, encoded: torch.Tensor) -> None:
        """Takes the encodings of `distinct`, of shape `(len(distinct), R)`.

        Raises:
            ValueError: if one is not finite; it names a slide.
        """
        wrong = (~torch.isfinite(encoded).all(dim=1)).nonzero().flatten().tolist()
        if wrong:
            name = next(row.slide_id for row in self.rows if self.distinct[wrong[0]] in row.report)
            raise ValueError(
                f"The encoding of the report of slide {name} is not finite ({len(wrong)} of {len(encoded)} are not): "
                "the text model overflows, or its cache is damaged; delete `report_cache` in `output_dir`, or choose "
                "another `text_model`."
            )
        place_of = {part: place for place, part in enumerate(self.distinct)}
        means = [encoded[[place_of[part] for part in text]].mean(dim=0) for text in self._texts]
        self._embeds = torch.stack(means)

    def mean_embed(self) -> torch.Tensor:
        """Mean encoding of the distinct texts: `torch.Tensor` of shape `(R,)`."""
        return self._embeds.mean(dim=0)

    def of_step(self, step: int, slides: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """The reports of a step.

        Args:
            step (`int`): the step.
            slides (sequence of `int`): its slides.

        Returns:
            `report_embeds` of shape `(b, R)` and `group_ids` of shape `(b, 2)`, int64: the linked cases and the text
            of each slide; zeros and -1 for a slide without report.
        """
        texts = torch.tensor([self._text_at(step, slide) for slide in slides])
        is_known = (texts >= 0).to(self._embeds.device)
        embeds = self._embeds[texts.clamp(min=0).to(self._embeds.device)] * is_known[:, None]
        return embeds, torch.stack([self._group_of[list(slides)], texts], dim=1)

    def only_negatives(self, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """Texts that may serve as negatives: encodings `(P, R)` and group ids `(P, 2)`, on the device.

        A text that slides of several groups hold is none: it says nothing against any of them.
        """
        self._embeds = self._embeds.to(device)
        return self._embeds[self._negatives.to(device)], self._negative_ids.to(device)

    def _text_at(self, step: int, slide: int) -> int:
        choices = self._choices[slide]
        if len(choices) < 2:
            return choices[0] if choices else -1
        return choices[generator(self.seed, "report", step, self.rows[slide].slide_id).integers(len(choices))]

    def _only_negatives(self) -> tuple[torch.Tensor, torch.Tensor]:
        groups_of: dict[int, set[int]] = {}
        for slide, texts in enumerate(self._choices):
            for text in texts:
                groups_of.setdefault(text, set()).add(int(self._group_of[slide]))
        alone = sorted((text, groups.pop()) for text, groups in groups_of.items() if len(groups) == 1)
        ids = torch.tensor([(group, text) for text, group in alone], dtype=torch.int64).reshape(-1, 2)
        return ids[:, 1], ids


def split_report(report: str, separator: str | None) -> tuple[str, ...]:
    """Splits a report into its sections; empty ones are left out, and a report of blanks has none."""
    if separator is None:
        return (report,) if report.strip() else ()
    return tuple(part.strip() for part in report.split(separator) if part.strip())
