# SPDX-License-Identifier: Apache-2.0
"""Classification by the nearest training slides.

Letters: n slides, D feature width, C classes.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from sklearn.metrics import balanced_accuracy_score
from sklearn.neighbors import KNeighborsClassifier, NearestNeighbors
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler

from .case_folds import inner_splits
from .linear_probe import spread_classes
from .one_thread import one_thread

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
        with one_thread():
            chosen = self.num_neighbours or self._choose(features, targets, case_ids, seed, is_validation)
            chosen = min(chosen, len(targets))
            self._model = _neighbours(chosen).fit(features, targets)
        self.settings = {"num_neighbours": chosen}
        return self

    def predict(self, features: np.ndarray) -> np.ndarray:
        """Shares `(n, C)` of classes among the neighbours of features `(n, D)`."""
        with one_thread():
            return spread_classes(self._model.predict_proba(features), self._model.classes_, self.num_classes)

    def _choose(
        self,
        features: np.ndarray,
        targets: np.ndarray,
        case_ids: Sequence[str],
        seed: int,
        is_validation: np.ndarray | None,
    ) -> int:
        said: dict[int, list[np.ndarray]] = {}
        right = []
        for fitted, held in inner_splits(targets, case_ids, seed, is_validation):
            counts = [count for count in NUM_NEIGHBOURS if count <= len(fitted)]
            scaler = StandardScaler().fit(features[fitted])
            index = NearestNeighbors(n_neighbors=counts[-1], metric="cosine", algorithm="brute")
            index.fit(scaler.transform(features[fitted]))
            # Neighbours are ranked once for all k.
            nearest = index.kneighbors(scaler.transform(features[held]), return_distance=False)
            votes = (targets[fitted][nearest][:, :, None] == np.arange(self.num_classes)).cumsum(axis=1)
            for count in counts:
                said.setdefault(count, []).append(votes[:, count - 1].argmax(axis=1))
            right.append(targets[held])
        everywhere = [count for count, parts in said.items() if len(parts) == len(right)]
        if not everywhere:
            return 1
        truth = np.concatenate(right)
        scores = {count: balanced_accuracy_score(truth, np.concatenate(said[count])) for count in everywhere}
        return max(everywhere, key=lambda count: (scores[count], count))


def _neighbours(count: int) -> Pipeline:
    return make_pipeline(StandardScaler(), KNeighborsClassifier(count, metric="cosine", algorithm="brute"))
