# SPDX-License-Identifier: Apache-2.0
"""Harrell's concordance index of predicted risks, by scikit-survival."""

from collections.abc import Sequence

import datasets
import evaluate
import numpy as np
from sksurv.metrics import concordance_index_censored

_CITATION = """\
Harrell, Lee and Mark, "Multivariable prognostic models: issues in developing models, evaluating assumptions and
adequacy, and measuring and reducing errors", Statistics in Medicine 15, 1996.
"""


class CIndex(evaluate.Metric):
    """Share of comparable pairs in which the item with the earlier event has the higher risk; chance is 0.5.

    `compute` takes `predictions` `(n,)`, risks, higher for an earlier event; `times` `(n,)`, to the event or to the
    end of observation; and `events` `(n,)`, whether the event was seen.

    Example:

    ```python
    metric = CIndex()
    metric.compute(predictions=[2.0, 1.0, 0.5], times=[3, 7, 9], events=[True, False, True])["c_index"]
    ```
    """

    def _info(self) -> evaluate.MetricInfo:
        number = datasets.Value("float64")
        return evaluate.MetricInfo(
            description=(type(self).__doc__ or "").partition("\n")[0],
            citation=_CITATION,
            inputs_description=type(self).__doc__ or "",
            features=datasets.Features({"predictions": number, "times": number, "events": datasets.Value("bool")}),
            reference_urls=[
                "https://scikit-survival.readthedocs.io/en/stable/api/generated/sksurv.metrics.concordance_index_censored.html"
            ],
        )

    def _compute(
        self, predictions: Sequence[float], times: Sequence[float], events: Sequence[bool]
    ) -> dict[str, float]:
        seen = np.asarray(events, dtype=bool)
        return {"c_index": float(concordance_index_censored(seen, np.asarray(times), np.asarray(predictions))[0])}
