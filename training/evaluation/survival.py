# SPDX-License-Identifier: Apache-2.0
"""A Cox model on frozen slide embeddings: who lives shorter, by scikit-survival.

Letters: n items, D feature width.
"""

import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
from sklearn.exceptions import ConvergenceWarning
from sklearn.preprocessing import StandardScaler

from .case_folds import inner_splits
from .one_thread import one_thread
from .scores import import_survival, survival_scores

# Strongest first; the stronger of two equally good ones is taken.
REGULARISATIONS = tuple(10.0 ** (power / 2) for power in range(2, -5, -1))
_L1_RATIO = 0.1


class CoxHead:
    """Proportional hazards with an elastic net on standardised features.

    Its regularisation is chosen on the validation part, or else on folds of whole cases within the training part, by
    the concordance index; then it is fitted once more on both. A prediction is the log hazard relative to that of the
    training part's mean features.

    Args:
        l1_ratio (`float`, defaults to 0.1): share of the L1 norm in the penalty; embeddings are dense, so it is small.

    Attributes:
        settings (`dict`): `regularisation` as chosen.
    """

    name = "cox"
    uses_validation = True

    def __init__(self, l1_ratio: float = _L1_RATIO) -> None:
        self.l1_ratio = l1_ratio
        self.settings: dict[str, Any] = {}

    def fit(
        self,
        features: np.ndarray,
        targets: np.ndarray,
        case_ids: Sequence[str],
        seed: int,
        is_validation: np.ndarray | None = None,
    ) -> "CoxHead":
        """Fits to features `(n, D)` and a structured array `(n,)` of `event`, bool, and `time`, float.

        Raises:
            ValueError: if no event is seen in the training part, or a time is negative.
            ImportError: if scikit-survival is not installed; it names the extra.
        """
        if not targets["event"].any():
            raise ValueError("A Cox model needs training items whose event was seen, found none.")
        if (targets["time"] < 0).any():
            raise ValueError(f"Times must not be negative, found {targets['time'].min():g}.")
        with one_thread():
            strength = self._choose(features, targets, case_ids, seed, is_validation)
            self._scaler = StandardScaler().fit(features)
            path = tuple(value for value in REGULARISATIONS if value >= strength)
            # The strength chosen may be too weak for all items together: then the weakest that can be fitted.
            self._model, fitted = self._fit_path(self._scaler.transform(features), targets, path)
        self._strength = fitted[-1]
        self.settings = {"regularisation": self._strength}
        return self

    def predict(self, features: np.ndarray) -> np.ndarray:
        """Risks `(n,)` of features `(n, D)`, higher for an earlier event."""
        return self._model.predict(self._scaler.transform(features), alpha=self._strength)

    def _choose(
        self,
        features: np.ndarray,
        targets: np.ndarray,
        case_ids: Sequence[str],
        seed: int,
        is_validation: np.ndarray | None,
    ) -> float:
        """The strongest regularisation with the best mean concordance over the parts held out."""
        found = {strength: [] for strength in REGULARISATIONS}
        for fitted, held in inner_splits(targets["event"].astype(int), case_ids, seed, is_validation):
            if not targets["event"][fitted].any():
                continue
            scaler = StandardScaler().fit(features[fitted])
            known, unknown = scaler.transform(features[fitted]), scaler.transform(features[held])
            model, path = self._fit_path(known, targets[fitted], REGULARISATIONS)
            truth = targets[held]
            for strength in REGULARISATIONS:
                score = {}
                if strength in path:
                    score = survival_scores(truth["time"], truth["event"], model.predict(unknown, alpha=strength))
                found[strength].append(score.get("c_index", np.nan))
        # What some part could not be fitted with is not chosen; a part without comparable pairs says nothing.
        means = {}
        for strength, values in found.items():
            usable = [value for place, value in enumerate(values) if not np.isnan(found[REGULARISATIONS[0]][place])]
            if usable and not np.isnan(usable).any():
                means[strength] = np.mean(usable)
        return max(means, key=means.get) if means else 1.0

    def _fit_path(
        self, features: np.ndarray, targets: np.ndarray, strengths: Sequence[float]
    ) -> tuple[Any, tuple[float, ...]]:
        """Fits all strengths at once; those too weak to be fitted are left out."""
        linear_model = import_survival("sksurv.linear_model")
        target = import_survival("sksurv.util").Surv.from_arrays(targets["event"], targets["time"])
        for count in range(len(strengths), 0, -1):
            path = tuple(strengths[:count])
            model = linear_model.CoxnetSurvivalAnalysis(alphas=path, l1_ratio=self.l1_ratio, max_iter=1000)
            try:
                with warnings.catch_warnings():
                    # A weak strength that has not settled is judged by its score, as the others are.
                    warnings.simplefilter("ignore", ConvergenceWarning)
                    warnings.filterwarnings("ignore", "all coefficients are zero")
                    return model.fit(features, target), path
            except ArithmeticError:  # numerical error: weights grew too large
                continue
        raise ValueError(
            "A Cox model could not be fitted at any regularisation; look for features of extreme size in embeddings."
        )
