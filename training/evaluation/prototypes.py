# SPDX-License-Identifier: Apache-2.0
"""Classification by the nearest class mean, in the manner of SimpleShot (arXiv 1911.04623).

Letters: n slides, D feature width, C classes.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy.special import softmax
from sklearn.preprocessing import normalize

from .linear_probe import spread_classes

_SCALE = 10.0  # of cosines before softmax: it orders nothing anew, but lets probabilities of slides differ


class Prototypes:
    """The class whose mean is nearest, after features are centred on the training part and L2-normalised.

    scikit-learn's `NearestCentroid` divides by the spread within classes, which a single slide per class leaves
    undefined; hence means of our own.

    Args:
        num_classes (`int`): C.

    Attributes:
        settings (`dict`): empty, for nothing is chosen.
    """

    name = "prototypes"

    def __init__(self, num_classes: int) -> None:
        self.num_classes = num_classes
        self.settings: dict[str, Any] = {}

    def fit(self, features: np.ndarray, targets: np.ndarray, case_ids: Sequence[str], seed: int) -> "Prototypes":
        """Takes the means of features `(n, D)` of each class, `(n,)` int; cases and seed play no part."""
        self._centre = features.mean(axis=0, dtype=np.float64)
        unit = normalize(features - self._centre)
        self._classes = np.unique(targets)
        self._means = np.stack([unit[targets == place].mean(axis=0) for place in self._classes])
        return self

    def predict(self, features: np.ndarray) -> np.ndarray:
        """Probabilities `(n, C)` of features `(n, D)`: softmax over negative squared distances to the class means."""
        unit = normalize(features - self._centre)
        distances = ((unit[:, None] - self._means[None]) ** 2).sum(axis=2)
        return spread_classes(softmax(-_SCALE / 2 * distances, axis=1), self._classes, self.num_classes)
