# SPDX-License-Identifier: Apache-2.0
"""How much a linear classifier reads out of frozen slide embeddings.

Letters: n slides, D feature width, C classes.
"""

import logging
from collections.abc import Sequence
from typing import Any

import numpy as np
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler

from .case_folds import inner_splits
from .one_thread import one_thread

logger = logging.getLogger(__name__)
INVERSE_REGULARISATIONS = tuple(10.0**power for power in range(-4, 3))


class LinearProbe:
    """Logistic regression on standardised features, classes weighted evenly.

    Its regularisation is chosen on the validation part, or else on folds of whole cases within the training part, and
    it is fitted once more on both.

    Args:
        num_classes (`int`): C.

    Attributes:
        settings (`dict`): `inverse_regularisation` C as chosen.
    """

    name = "linear_probe"
    uses_validation = True

    def __init__(self, num_classes: int) -> None:
        self.num_classes = num_classes
        self.settings: dict[str, Any] = {}

    def fit(
        self,
        features: np.ndarray,
        targets: np.ndarray,
        case_ids: Sequence[str],
        seed: int,
        is_validation: np.ndarray | None = None,
    ) -> "LinearProbe":
        """Fits to features `(n, D)` and classes `(n,)`, int; see `fit_linear_probe`."""
        self._probe, strength = fit_linear_probe(features, targets, case_ids, seed=seed, is_validation=is_validation)
        self.settings = {"inverse_regularisation": strength}
        return self

    def predict(self, features: np.ndarray) -> np.ndarray:
        """Probabilities `(n, C)` of features `(n, D)`."""
        with one_thread():
            return spread_classes(self._probe.predict_proba(features), self._probe.classes_, self.num_classes)


def fit_linear_probe(
    embeddings: np.ndarray,
    labels: Sequence[str] | np.ndarray,
    case_ids: Sequence[str],
    *,
    seed: int,
    is_validation: np.ndarray | None = None,
) -> tuple[Pipeline, float]:
    """Fits a logistic regression on standardised embeddings, classes weighted evenly.

    Its regularisation is chosen by cross-validation that keeps the slides of a case together, or on the validation
    part: that with the lowest log loss, classes weighted evenly, over all predictions made for that. Log loss chooses
    more steadily than balanced accuracy, which many strengths share, and keeps the probabilities of different folds
    comparable. With fewer than two cases of a class, and no validation part, it is 1.

    Args:
        embeddings (`np.ndarray` of shape `(n, D)`, float32): of the training slides.
        labels (sequence of `str` or `int`): their classes.
        case_ids (sequence of `str`): their cases.
        seed (`int`): of the folds.
        is_validation (`np.ndarray` of shape `(n,)`, bool, *optional*): the slides that only choose.

    Returns:
        `tuple`: the pipeline fitted on all slides, and the inverse regularisation C.

    Raises:
        ValueError: if there are fewer than two classes.
    """
    present = sorted(set(np.asarray(labels).tolist()))
    if len(present) < 2:
        raise ValueError(f"A linear probe needs training slides of at least two classes, found {present}.")
    # One thread: more only get into each other's way at such sizes, and add up in another order from run to run.
    with one_thread():
        strength = _choose_strength(embeddings, np.asarray(labels), case_ids, seed, is_validation)
        return make_probe(strength).fit(embeddings, labels), strength


def probe_scores(probe: Pipeline, embeddings: np.ndarray, classes: Sequence[str]) -> np.ndarray:
    """Probabilities in the order of `classes`; 0 for one that the probe never saw.

    Args:
        probe (`Pipeline`): from `fit_linear_probe`.
        embeddings (`np.ndarray` of shape `(n, D)`, float32): of the slides to classify.
        classes (sequence of `str`): names of the C classes.

    Returns:
        `np.ndarray` of shape `(n, C)`, float64.
    """
    seen = probe.classes_.tolist()
    unseen = [name for name in classes if name not in seen]
    if unseen:
        logger.warning("No training slide is of class %s; the linear probe cannot find it.", ", ".join(unseen))
    places = [list(classes).index(name) for name in seen]
    return spread_classes(probe.predict_proba(embeddings), places, len(classes))


def spread_classes(probabilities: np.ndarray, classes: Sequence[int] | np.ndarray, num_classes: int) -> np.ndarray:
    """Puts the columns of the classes that were seen in training among all C; the others get 0.

    Args:
        probabilities (`np.ndarray` of shape `(n, seen)`, float): of the classes seen.
        classes (sequence of `int`): their places among all.
        num_classes (`int`): C.

    Returns:
        `np.ndarray` of shape `(n, C)`, float64.
    """
    spread = np.zeros((len(probabilities), num_classes))
    spread[:, np.asarray(classes, dtype=np.int64)] = probabilities
    return spread


def make_probe(strength: float) -> Pipeline:
    """Standardisation and logistic regression, not yet fitted.

    Args:
        strength (`float`): the inverse regularisation C.
    """
    return make_pipeline(StandardScaler(), LogisticRegression(C=strength, class_weight="balanced", max_iter=2000))


def _choose_strength(
    embeddings: np.ndarray,
    labels: np.ndarray,
    case_ids: Sequence[str],
    seed: int,
    is_validation: np.ndarray | None,
) -> float:
    strata = np.unique(labels, return_inverse=True)[1]
    num_classes = int(strata.max()) + 1
    stated, right = {strength: [] for strength in INVERSE_REGULARISATIONS}, []
    for fitted, held in inner_splits(strata, case_ids, seed, is_validation):
        if len(np.unique(strata[fitted])) < 2:
            continue
        scaler = StandardScaler().fit(embeddings[fitted])
        known, unknown = scaler.transform(embeddings[fitted]), scaler.transform(embeddings[held])
        # Each fit starts at the one before, which is near: the same answer in a third of the time.
        probe = LogisticRegression(class_weight="balanced", max_iter=2000, warm_start=True)
        for strength in INVERSE_REGULARISATIONS:
            probe.set_params(C=strength).fit(known, strata[fitted])
            stated[strength].append(spread_classes(probe.predict_proba(unknown), probe.classes_, num_classes))
        right.append(strata[held])
    if not right:
        return 1.0
    truth = np.concatenate(right)
    weights = 1 / np.bincount(truth, minlength=num_classes)[truth]
    options = {"sample_weight": weights, "labels": range(num_classes)}
    losses = [log_loss(truth, _even(np.concatenate(parts)), **options) for parts in stated.values()]
    return INVERSE_REGULARISATIONS[int(np.argmin(losses))]


def _even(probabilities: np.ndarray) -> np.ndarray:
    """Probabilities that sum to 1 in float64 too, though they were computed in float32."""
    return probabilities / probabilities.sum(axis=1, keepdims=True)
