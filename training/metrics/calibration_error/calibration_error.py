# SPDX-License-Identifier: Apache-2.0
"""Expected calibration error of class probabilities, on scikit-learn's calibration curve."""

from collections.abc import Sequence

import datasets
import evaluate
import numpy as np

from .expected_calibration_error import expected_calibration_error

_CITATION = """\
Guo, Pleiss, Sun and Weinberger, "On Calibration of Modern Neural Networks", ICML 2017.
"""


class CalibrationError(evaluate.Metric):
    """How far the probability of the predicted class is from how often it is right; 0 is calibrated.

    `compute` takes `references`, class indices `(n,)`, and `predictions`, probabilities `(n, C)`. Option `num_bins`
    (15): bins of equal width, over whose gaps between confidence and accuracy the mean is taken.

    Example:

    ```python
    metric = CalibrationError()
    metric.compute(references=[0, 1, 1], predictions=[[0.9, 0.1], [0.2, 0.8], [0.6, 0.4]])["calibration_error"]
    ```
    """

    def _info(self) -> evaluate.MetricInfo:
        features = {"predictions": datasets.List(datasets.Value("float64")), "references": datasets.Value("int64")}
        return evaluate.MetricInfo(
            description=(type(self).__doc__ or "").partition("\n")[0],
            citation=_CITATION,
            inputs_description=type(self).__doc__ or "",
            features=datasets.Features(features),
            reference_urls=[
                "https://scikit-learn.org/stable/modules/generated/sklearn.calibration.calibration_curve.html"
            ],
        )

    def _compute(
        self, predictions: Sequence[Sequence[float]], references: Sequence[int], num_bins: int = 15
    ) -> dict[str, float]:
        probabilities = np.asarray(predictions, dtype=np.float64)
        return {"calibration_error": expected_calibration_error(np.asarray(references), probabilities, num_bins)}
