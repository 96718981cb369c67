# SPDX-License-Identifier: Apache-2.0
"""Quadratic kappa of predicted classes, by scikit-learn."""

from collections.abc import Sequence

import datasets
import evaluate
from sklearn.metrics import cohen_kappa_score

_CITATION = """\
Cohen, "Weighted kappa: Nominal scale agreement provision for scaled disagreement or partial credit",
Psychological Bulletin 70, 1968.
"""


class QuadraticKappa(evaluate.Metric):
    """Agreement on grades beyond chance, where an error of two grades counts four times one of one grade.

    `compute` takes `references` and `predictions`, both of shape `(n,)`, class indices
    in the order of the grades. Option `num_classes`: how many grades there are, if one may be absent; by default
    those present are taken for consecutive.

    Example:

    ```python
    metric = QuadraticKappa()
    metric.compute(references=[0, 1, 1], predictions=[0, 1, 0])["quadratic_kappa"]
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
                "https://scikit-learn.org/stable/modules/generated/sklearn.metrics.cohen_kappa_score.html"
            ],
        )

    def _compute(
        self, predictions: Sequence[int], references: Sequence[int], num_classes: int | None = None
    ) -> dict[str, float]:
        labels = None if num_classes is None else list(range(num_classes))
        return {
            "quadratic_kappa": float(cohen_kappa_score(references, predictions, labels=labels, weights="quadratic"))
        }
