# SPDX-License-Identifier: Apache-2.0
"""Area under the ROC curve of class or label probabilities, by scikit-learn.

Letters: n items, C classes, L labels.
"""

from collections.abc import Sequence
from typing import Any

import datasets
import evaluate
import numpy as np
from sklearn.metrics import roc_auc_score

_CITATION = """\
Hanley and McNeil, "The meaning and use of the area under a receiver operating characteristic (ROC) curve",
Radiology 143, 1982.
"""


class Auroc(evaluate.Metric):
    """Area under the receiver operating characteristic: how often a positive scores above a negative.

    Configurations: by default each item is of one class, `references` are class indices `(n,)` and `predictions`
    probabilities `(n, C)`. With "multilabel" each of L labels is there or not: `references` `(n, L)` are 1, 0, or NaN
    (`None`) where that is not known, `predictions` `(n, L)` probabilities.

    It returns `auroc`, for two classes that of class 1, else the mean over classes or labels; and
    `auroc_per_class`, a list, `None` where the items are all of the class, or none is: such a class is not in the
    mean.

    Example:

    ```python
    metric = Auroc()
    metric.compute(references=[0, 1, 1], predictions=[[0.9, 0.1], [0.2, 0.8], [0.6, 0.4]])["auroc"]
    ```
    """

    def _info(self) -> evaluate.MetricInfo:
        row = datasets.List(datasets.Value("float64"))
        references = row if self.config_name == "multilabel" else datasets.Value("int64")
        return evaluate.MetricInfo(
            description=(type(self).__doc__ or "").partition("\n")[0],
            citation=_CITATION,
            inputs_description=type(self).__doc__ or "",
            features=datasets.Features({"predictions": row, "references": references}),
            reference_urls=["https://scikit-learn.org/stable/modules/generated/sklearn.metrics.roc_auc_score.html"],
        )

    def _compute(
        self, predictions: Sequence[Sequence[float]], references: Sequence[int] | Sequence[Sequence[float]]
    ) -> dict[str, Any]:
        probabilities = np.asarray(predictions, dtype=np.float64)
        truth = np.asarray(references, dtype=np.float64)
        num_columns = probabilities.shape[1]
        if self.config_name != "multilabel":
            if not np.isin(truth, range(num_columns)).all():
                raise ValueError(f"references: expected classes 0 to {num_columns - 1}, found {np.unique(truth)}.")
            truth = np.eye(num_columns)[truth.astype(int)]
        per_class = [_score(truth[:, column], probabilities[:, column]) for column in range(num_columns)]
        defined = [value for value in per_class if value is not None]
        if not defined:
            raise ValueError("references: expected items of at least two classes.")
        is_binary = self.config_name != "multilabel" and num_columns == 2
        return {"auroc": per_class[1] if is_binary else float(np.mean(defined)), "auroc_per_class": per_class}


def _score(truth: np.ndarray, probabilities: np.ndarray) -> float | None:
    """Area under the ROC curve of one column on its known items; `None` if they are all alike."""
    known = ~np.isnan(truth)
    if len(np.unique(truth[known])) < 2:
        return None
    return float(roc_auc_score(truth[known], probabilities[known]))
