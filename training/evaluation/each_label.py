# SPDX-License-Identifier: Apache-2.0
"""Several yes-or-no labels, some of them unknown: a classifier of two classes for each.

Letters: n slides, D feature width, L labels.
"""

import copy
from collections.abc import Sequence
from typing import Any

import numpy as np


class EachLabel:
    """Fits a method of two classes to each label, on the slides of which it is known.

    Args:
        method (`Any`): a method for `num_classes=2`; it is copied for each label.
        names (sequence of `str`): the L labels.

    Attributes:
        settings (`dict`): label -> what was chosen for it.
    """

    def __init__(self, method: Any, names: Sequence[str]) -> None:
        self.method, self.names = method, list(names)
        self.name = method.name
        self.uses_validation = getattr(method, "uses_validation", False)
        self.num_episodes = getattr(method, "num_episodes", 1)
        self.settings: dict[str, Any] = {}

    def fit(
        self,
        features: np.ndarray,
        targets: np.ndarray,
        case_ids: Sequence[str],
        seed: int,
        is_validation: np.ndarray | None = None,
    ) -> "EachLabel":
        """Fits to features `(n, D)` and labels `(n, L)` of 0, 1 and NaN."""
        cases = np.asarray(case_ids)
        self._methods: list[Any] = []
        self._shares: list[float] = []
        self.settings = {}
        for place, name in enumerate(self.names):
            known = np.flatnonzero(~np.isnan(targets[:, place]))
            right = targets[known, place].astype(np.int64)
            self._shares.append(float(right.mean()) if len(right) else 0.5)
            if len(np.unique(right)) < 2:
                self._methods.append(None)
                self.settings[name] = {"untrained": "all known training slides have the same answer"}
                continue
            options = (
                {"is_validation": is_validation[known]} if self.uses_validation and is_validation is not None else {}
            )
            fitted = copy.deepcopy(self.method).fit(features[known], right, cases[known], seed, **options)
            self._methods.append(fitted)
            self.settings[name] = fitted.settings
        return self

    def predict(self, features: np.ndarray) -> np.ndarray:
        """Probabilities `(n, L)` of features `(n, D)`; of a label that cannot be learned, its share in training."""
        columns = [
            np.full(len(features), share) if method is None else method.predict(features)[:, 1]
            for method, share in zip(self._methods, self._shares, strict=True)
        ]
        return np.stack(columns, axis=1)
