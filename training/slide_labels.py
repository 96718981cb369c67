# SPDX-License-Identifier: Apache-2.0
"""Label columns of a slide dataset -> what the classifier is trained on.

Letters: S slides, L classes or labels.
"""

import difflib
import math
from collections.abc import Sequence
from typing import Any

import torch
from transformers import AutoConfig

from modeling_dre_slcl.slide_classifier import MISSING_LABEL

from .config import TrainConfig
from .slide_rows import SlideRow

SINGLE_LABEL, MULTI_LABEL = "single_label_classification", "multi_label_classification"
_YES_OR_NO = {"0": 0.0, "1": 1.0, "false": 0.0, "true": 1.0}
_MISSING = ("", "nan", "none", str(MISSING_LABEL))


class SlideLabels:
    """The labels of a run: the classes of one column, or a yes or no from each of several columns.

    Args:
        rows (sequence of `SlideRow`): the S slides.
        columns (sequence of `str`): one column holds classes, of which each slide has one; several columns hold 0 or 1
            each. Empty cells, NaN and -100 are missing labels.
        names (sequence of `str`, *optional*): the classes or labels of a model to go on from; by default those found,
            in order.

    Attributes:
        problem_type (`str`): as in `DreSlclForSlideClassification`.
        names (`list` of `str`): the L classes, or the columns.
        values (`torch.Tensor`): of shape `(S,)`, int64, -100 where missing; or `(S, L)`, float32, NaN where missing.
        has_label (`list` of `bool`): of each slide.

    Raises:
        ValueError: for a column that is not there, a value that is no label, or fewer than two classes.
    """

    def __init__(self, rows: Sequence[SlideRow], columns: Sequence[str], names: Sequence[str] | None = None) -> None:
        known = list(rows[0].labels)
        for column in columns:
            if column not in known:
                near = difflib.get_close_matches(column, known, n=1)
                hint = (
                    f"; did you mean `{near[0]}`?" if near else f"; it has {', '.join(known) or 'no label columns'}."
                )
                raise ValueError(f"The dataset has no label column `{column}`{hint}")
        self.problem_type = SINGLE_LABEL if len(columns) == 1 else MULTI_LABEL
        if self.problem_type == SINGLE_LABEL:
            self._read_classes(rows, columns[0], names)
        else:
            self._read_flags(rows, columns, names)

    def _read_classes(self, rows: Sequence[SlideRow], column: str, names: Sequence[str] | None) -> None:
        found = [_text(row.labels[column]) for row in rows]
        self.names = list(names) if names is not None else sorted({text for text in found if text}, key=_by_number)
        if len(self.names) < 2:
            raise ValueError(
                f"Label column `{column}` holds {len(self.names)} classes; a classifier needs two or more."
            )
        place_of = {name: place for place, name in enumerate(self.names)}
        for row, text in zip(rows, found, strict=True):
            if text and text not in place_of:
                raise ValueError(
                    f"Slide {row.slide_id}: `{column}` is {text!r}, which is none of the model's classes "
                    f"{', '.join(self.names)}."
                )
        self.values = torch.tensor([place_of[text] if text else MISSING_LABEL for text in found])
        self.has_label = [bool(text) for text in found]

    def _read_flags(self, rows: Sequence[SlideRow], columns: Sequence[str], names: Sequence[str] | None) -> None:
        self.names = list(columns)
        if names is not None and list(names) != self.names:
            raise ValueError(
                f"The model's labels are {', '.join(names)}; `label_columns` must be these, in this order."
            )
        for row in rows:
            for column in columns:
                text = _text(row.labels[column]).lower()
                if text and text not in _YES_OR_NO:
                    raise ValueError(
                        f"Slide {row.slide_id}: `{column}` is {row.labels[column]!r}; several label columns must "
                        "hold 0 or 1 each (for classes give one column)."
                    )
        table = [[_YES_OR_NO.get(_text(row.labels[column]).lower(), math.nan) for column in columns] for row in rows]
        self.values = torch.tensor(table)
        self.has_label = (~self.values.isnan()).any(dim=1).tolist()


def trained_labels(config: TrainConfig) -> list[str] | None:
    """The labels that a model to go on from (`model`) was trained on, `None` if it has no classifier."""
    if config.model is None:
        return None
    model_config = AutoConfig.from_pretrained(config.model)
    if "DreSlclForSlideClassification" not in (model_config.architectures or []):
        return None
    return [model_config.id2label[place] for place in range(model_config.num_labels)]


def _text(value: Any) -> str:
    """A cell as the name of a class, "" if it is missing; a column of whole numbers with gaps comes as floats."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    text = "" if value is None else str(value).strip()
    return "" if text.lower() in _MISSING else text


def _by_number(text: str) -> tuple[float, str]:
    """Numbers in their order, then words."""
    try:
        return float(text), text
    except ValueError:
        return math.inf, text
