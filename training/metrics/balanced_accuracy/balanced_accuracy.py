# SPDX-License-Identifier: Apache-2.0
"""Balanced accuracy of predicted classes, by scikit-learn."""

from collections.abc import Sequence

import datasets
import evaluate
from sklearn.metrics import balanced_accuracy_score

_CITATION = """\
Brodersen et al., "The balanced accuracy and its posterior distribution", ICPR 2010.
"""


class BalancedAccuracy(evaluate.Metric):
    """Mean over the classes present of the share of their items that are found; chance is 1 / classes.

    `compute` takes `references` and `predictions`, both of shape `(n,)`, class indices.

    Example:

    ```python
    metric = BalancedAccuracy()
    metric.compute(references=[0, 1, 1], predictions=[0, 1, 0])["balanced_accuracy"]
    ```
    """

    def _info(self) -> evaluate.MetricInfo:
        label = datasets.Value("int64")
        return evaluate.MetricInfo(
            description=(type(self).__doc__ or "").partition("\n")[0],
            citation=_CITATION,
            inputs_description=type(self).__doc__ or "",
            features=datasets.Features({"predictions": label, "references": label}),
            reference_urls=[
                "https://scikit-learn.org/stable/modules/generated/sklearn.metrics.balanced_accuracy_score.html"
            ],
        )

    def _compute(self, predictions: Sequence[int], references: Sequence[int]) -> dict[str, float]:
        return {"balanced_accuracy": float(balanced_accuracy_score(references, predictions))}
