# SPDX-License-Identifier: Apache-2.0
"""Weighted F1 of predicted classes, by scikit-learn."""

from collections.abc import Sequence

import datasets
import evaluate
from sklearn.metrics import f1_score

_CITATION = """\
van Rijsbergen, "Information Retrieval", Butterworths, 1979.
"""


class WeightedF1(evaluate.Metric):
    """Harmonic mean of precision and recall of each class, averaged with the classes' frequencies as weights.

    `compute` takes `references` and `predictions`, both of shape `(n,)`, class indices.

    Example:

    ```python
    metric = WeightedF1()
    metric.compute(references=[0, 1, 1], predictions=[0, 1, 0])["weighted_f1"]
    ```
    """

    def _info(self) -> evaluate.MetricInfo:
        label = datasets.Value("int64")
        return evaluate.MetricInfo(
            description=(type(self).__doc__ or "").partition("\n")[0],
            citation=_CITATION,
            inputs_description=type(self).__doc__ or "",
            features=datasets.Features({"predictions": label, "references": label}),
            reference_urls=["https://scikit-learn.org/stable/modules/generated/sklearn.metrics.f1_score.html"],
        )

    def _compute(self, predictions: Sequence[int], references: Sequence[int]) -> dict[str, float]:
        return {"weighted_f1": float(f1_score(references, predictions, average="weighted", zero_division=0))}
