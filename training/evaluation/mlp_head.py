# SPDX-License-Identifier: Apache-2.0
"""A classifier with one hidden layer on frozen slide embeddings.

Letters: n slides, D feature width, C classes.
"""

import copy
from collections.abc import Sequence
from typing import Any

import numpy as np
from sklearn.metrics import log_loss
from sklearn.neural_network import MLPClassifier
from sklearn.preprocessing import StandardScaler

from .case_folds import inner_splits
from .linear_probe import spread_classes
from .one_thread import one_thread

MAX_EPOCHS = 200
PATIENCE = 15


class MlpHead:
    """One hidden layer on standardised features, trained until the loss on the validation part rises.

    scikit-learn's own early stopping holds out single slides; here whole cases are held out, a fifth of the training
    part where no validation part is given. Every epoch draws each class equally often.

    Args:
        num_classes (`int`): C.
        hidden_size (`int`, defaults to 128): width of the layer.

    Attributes:
        settings (`dict`): `epochs` after which the loss was best.
    """

    name = "mlp"
    uses_validation = True

    def __init__(self, num_classes: int, hidden_size: int = 128) -> None:
        self.num_classes, self.hidden_size = num_classes, hidden_size
        self.settings: dict[str, Any] = {}

    def fit(
        self,
        features: np.ndarray,
        targets: np.ndarray,
        case_ids: Sequence[str],
        seed: int,
        is_validation: np.ndarray | None = None,
    ) -> "MlpHead":
        """Trains on features `(n, D)` with classes `(n,)`, int."""
        fitted, held = next(inner_splits(targets, case_ids, seed, is_validation), (np.arange(len(targets)), None))
        if len(np.unique(targets[fitted])) < 2:
            fitted, held = np.arange(len(targets)), None
        self._scaler = StandardScaler().fit(features[fitted])
        known, right = self._scaler.transform(features[fitted]), targets[fitted]
        classes, places = np.unique(right, return_inverse=True)
        weights = 1 / np.bincount(places)[places]
        random = np.random.default_rng(seed)
        model = MLPClassifier((self.hidden_size,), alpha=1e-3, batch_size=min(64, len(right)), random_state=seed)
        # Items of a class that the fitted part lacks can say nothing about when to stop.
        chosen = held[np.isin(targets[held], classes)] if held is not None else np.zeros(0, dtype=np.int64)
        unknown = self._scaler.transform(features[chosen]) if len(chosen) else None
        best, best_loss, best_epoch = model, np.inf, 0
        with one_thread():
            for epoch in range(1, MAX_EPOCHS + 1):
                drawn = random.choice(len(right), size=len(right), p=weights / weights.sum())
                model.partial_fit(known[drawn], right[drawn], classes=classes)
                if unknown is None:
                    best, best_epoch = model, epoch
                    if epoch == PATIENCE:
                        break
                    continue
                loss = log_loss(targets[chosen], model.predict_proba(unknown), labels=classes)
                if loss < best_loss:
                    best, best_loss, best_epoch = copy.deepcopy(model), loss, epoch
                elif epoch - best_epoch >= PATIENCE:
                    break
        self._model = best
        self.settings = {"epochs": best_epoch}
        return self

    def predict(self, features: np.ndarray) -> np.ndarray:
        """Probabilities `(n, C)` of features `(n, D)`."""
        with one_thread():
            found = self._model.predict_proba(self._scaler.transform(features))
        return spread_classes(found, self._model.classes_, self.num_classes)
