# SPDX-License-Identifier: Apache-2.0
"""How few labelled cases are enough: k cases of each class, drawn again and again.

Letters: n slides, D feature width, C classes.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from .linear_probe import make_probe, spread_classes
from .one_thread import one_thread
from .prototypes import Prototypes

SHOTS = (1, 2, 4, 8, 16, 32)
HEADS = ("prototypes", "linear")
NUM_EPISODES = 10


class FewShot:
    """Fits a head to k random cases of each class; a class with fewer cases gives all it has.

    There is nothing to choose settings on, so the linear head has an inverse regularisation of 1.

    Args:
        num_classes (`int`): C.
        shots (`int`): k.
        head (`str`): "prototypes" or "linear".
        num_episodes (`int`, defaults to 10): draws for each fold and seed.

    Attributes:
        settings (`dict`): `cases_per_class`, the smallest and the largest that was drawn.
    """

    def __init__(
        self, num_classes: int, shots: int, head: str = "prototypes", num_episodes: int = NUM_EPISODES
    ) -> None:
        if head not in HEADS:
            raise ValueError(f"head: expected one of {HEADS}, found {head!r}.")
        self.num_classes, self.shots, self.head, self.num_episodes = num_classes, shots, head, num_episodes
        self.name = f"few_shot_{shots}" if head == "prototypes" else f"few_shot_{shots}_{head}"
        self.settings: dict[str, Any] = {}

    def fit(self, features: np.ndarray, targets: np.ndarray, case_ids: Sequence[str], seed: int) -> "FewShot":
        """Fits to some of features `(n, D)` with classes `(n,)`, int, as the seed draws them."""
        random = np.random.default_rng(seed)
        cases = np.asarray(case_ids)
        rows, counts = [], []
        for place in np.unique(targets):
            of_class = np.flatnonzero(targets == place)
            names = np.unique(cases[of_class])
            drawn = random.permutation(names)[: self.shots]
            counts.append(len(drawn))
            rows.append(of_class[np.isin(cases[of_class], drawn)])
        chosen = np.concatenate(rows)
        self.settings = {"cases_per_class": [min(counts), max(counts)]}
        if self.head == "prototypes":
            self._model = Prototypes(self.num_classes).fit(features[chosen], targets[chosen], case_ids, seed)
        else:
            with one_thread():
                self._model = make_probe(1.0).fit(features[chosen], targets[chosen])
        return self

    def predict(self, features: np.ndarray) -> np.ndarray:
        """Probabilities `(n, C)` of features `(n, D)`."""
        if self.head == "prototypes":
            return self._model.predict(features)
        with one_thread():
            return spread_classes(self._model.predict_proba(features), self._model.classes_, self.num_classes)
