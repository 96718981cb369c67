# SPDX-License-Identifier: Apache-2.0
"""How much of a number a linear model reads out of frozen slide embeddings.

Letters: n items, D feature width.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from sklearn.linear_model import Ridge
from sklearn.metrics import mean_squared_error
from sklearn.preprocessing import StandardScaler

from .case_folds import inner_splits, strata_of
from .label_table import TaskLabels
from .one_thread import one_thread

# Strongest first; the stronger of two equally good ones is taken.
REGULARISATIONS = tuple(10.0 ** (power / 2) for power in range(12, -5, -1))


class RidgeHead:
    """Ridge regression on standardised features.

    Its regularisation is chosen on the validation part, or else on folds of whole cases within the training part, by
    the squared error over all predictions made for that; then it is fitted once more on both.

    Attributes:
        settings (`dict`): `regularisation` as chosen.
    """

    name = "ridge"
    uses_validation = True

    def __init__(self) -> None:
        self.settings: dict[str, Any] = {}

    def fit(
        self,
        features: np.ndarray,
        targets: np.ndarray,
        case_ids: Sequence[str],
        seed: int,
        is_validation: np.ndarray | None = None,
    ) -> "RidgeHead":
        """Fits to features `(n, D)` and numbers `(n,)`, float."""
        with one_thread():
            strength = _choose(features, targets, case_ids, seed, is_validation)
            self._scaler = StandardScaler().fit(features)
            self._model = Ridge(strength).fit(self._scaler.transform(features), targets)
        self.settings = {"regularisation": strength}
        return self

    def predict(self, features: np.ndarray) -> np.ndarray:
        """Numbers `(n,)` of features `(n, D)`."""
        return self._model.predict(self._scaler.transform(features))


def _choose(
    features: np.ndarray,
    targets: np.ndarray,
    case_ids: Sequence[str],
    seed: int,
    is_validation: np.ndarray | None,
) -> float:
    strata = strata_of(TaskLabels("", "regression", targets, []))
    predicted, right = {strength: [] for strength in REGULARISATIONS}, []
    for fitted, held in inner_splits(strata, case_ids, seed, is_validation):
        scaler = StandardScaler().fit(features[fitted])
        known, unknown = scaler.transform(features[fitted]), scaler.transform(features[held])
        for strength in REGULARISATIONS:
            predicted[strength].append(Ridge(strength).fit(known, targets[fitted]).predict(unknown))
        right.append(targets[held])
    if not right:
        return float(len(targets))
    truth = np.concatenate(right)
    errors = [mean_squared_error(truth, np.concatenate(parts)) for parts in predicted.values()]
    return REGULARISATIONS[int(np.argmin(errors))]
