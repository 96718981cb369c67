# SPDX-License-Identifier: Apache-2.0
"""Classification by the nearest training slides.

Letters: n slides, D feature width, C classes.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from sklearn.metrics import balanced_accuracy_score
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler
from threadpoolctl import threadpool_limits

from .case_folds import inner_splits
from .linear_probe import spread_classes

NUM_NEIGHBOURS = (1, 3, 5, 10, 20, 50)


class NearestNeighbours:
    """The share of each class among the k training slides of largest cosine, features standardised before.

    Embeddings of one encoder often share a large mean, beside which all cosines are near 1; standardising on the
    training part removes it and gives every dimension the same say, as for the linear probe.

    Args:
        num_classes (`int`): C.
        num_neighbours (`int`, *optional*): k. By default it is chosen among 1, 3, 5, 10, 20 and 50 by balanced
            accuracy, the largest of equals, on the validation part or folds of whole cases within the training part.

    Attributes:
        settings (`dict`): `num_neighbours` as chosen.
    """

    name = "knn"
    uses_validation = True

    def __init__(self, num_classes: int, num_neighbours: int | None = None) -> None:
        self.num_classes = num_classes
        self.num_neighbours = num_neighbours
        self.settings: dict[str, Any] = {}

    def fit(
        self,
        features: np.ndarray,
        targets: np.ndarray,
        case_ids: Sequence[str],
        seed: int,
        is_validation: np.ndarray | None = None,
    ) -> "NearestNeighbours":
        """Keeps features `(n, D)` and classes `(n,)`, int, after choosing k."""
        with threadpool_limits(limits=1):
            chosen = self.num_neighbours or self._choose(features, targets, case_ids, seed, is_validation)
            chosen = min(chosen, len(targets))
            self._model = _neighbours(chosen).fit(features, targets)
        self.settings = {"num_neighbours": chosen}
        return self

    def predict(self, features: np.ndarray) -> np.ndarray:
        """Shares `(n, C)` of classes among the neighbours of features `(n, D)`."""
        with threadpool_limits(limits=1):
            return spread_classes(self._model.predict_proba(features), self._model.classes_, self.num_classes)

    def _choose(
        self,
        features: np.ndarray,
        targets: np.ndarray,
        case_ids: Sequence[str],
        seed: int,
        is_validation: np.ndarray | None,
    ) -> int:
        splits = list(inner_splits(targets, case_ids, seed, is_validation))
        if not splits:
            return 1
        most = min(len(fitted) for fitted, _ in splits)
        best, best_score = 1, -1.0
        for count in (count for count in NUM_NEIGHBOURS if count <= most):
            predicted = [_neighbours(count).fit(features[a], targets[a]).predict(features[b]) for a, b in splits]
            score = balanced_accuracy_score(np.concatenate([targets[b] for _, b in splits]), np.concatenate(predicted))
            if score >= best_score:
                best, best_score = count, score
        return best


def _neighbours(count: int) -> Pipeline:
    return make_pipeline(StandardScaler(), KNeighborsClassifier(count, metric="cosine", algorithm="brute"))
