# SPDX-License-Identifier: Apache-2.0
"""How much a linear classifier reads out of frozen slide embeddings.

Letters: n slides, D feature width, C classes.
"""

import logging
from collections import defaultdict
from collections.abc import Sequence

import numpy as np
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import balanced_accuracy_score
from sklearn.model_selection import StratifiedGroupKFold, cross_val_predict
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler
from threadpoolctl import threadpool_limits

logger = logging.getLogger(__name__)
INVERSE_REGULARISATIONS = tuple(10.0**power for power in range(-4, 3))
_MAX_FOLDS = 5


def fit_linear_probe(
    embeddings: np.ndarray, labels: Sequence[str], case_ids: Sequence[str], *, seed: int
) -> tuple[Pipeline, float]:
    """Fits a logistic regression on standardised embeddings, classes weighted evenly.

    Its regularisation is chosen by cross-validation that keeps the slides of a case together: the strongest with the
    best balanced accuracy over all held-out predictions. With fewer than two cases of a class it is 1.

    Args:
        embeddings (`np.ndarray` of shape `(n, D)`, float32): of the training slides.
        labels (sequence of `str`): their classes.
        case_ids (sequence of `str`): their cases.
        seed (`int`): of the folds.

    Returns:
        `tuple`: the fitted pipeline, and the inverse regularisation C.

    Raises:
        ValueError: if there are fewer than two classes.
    """
    if len(set(labels)) < 2:
        raise ValueError(f"A linear probe needs training slides of at least two classes, found {sorted(set(labels))}.")
    # One thread: more only get into each other's way at such sizes, and add up in another order from run to run.
    with threadpool_limits(limits=1):
        strength = _choose_strength(embeddings, np.asarray(labels), np.asarray(case_ids), seed)
        return _probe(strength).fit(embeddings, labels), strength


def probe_scores(probe: Pipeline, embeddings: np.ndarray, classes: Sequence[str]) -> np.ndarray:
    """Probabilities in the order of `classes`; 0 for one that the probe never saw.

    Args:
        probe (`Pipeline`): from `fit_linear_probe`.
        embeddings (`np.ndarray` of shape `(n, D)`, float32): of the slides to classify.
        classes (sequence of `str`): names of the C classes.

    Returns:
        `np.ndarray` of shape `(n, C)`, float64.
    """
    probabilities = dict(zip(probe.classes_.tolist(), probe.predict_proba(embeddings).T, strict=True))
    unseen = [name for name in classes if name not in probabilities]
    if unseen:
        logger.warning("No training slide is of class %s; the linear probe cannot find it.", ", ".join(unseen))
    return np.stack([probabilities.get(name, np.zeros(len(embeddings))) for name in classes], axis=1)


def _probe(strength: float) -> Pipeline:
    return make_pipeline(StandardScaler(), LogisticRegression(C=strength, class_weight="balanced", max_iter=2000))


def _choose_strength(embeddings: np.ndarray, labels: np.ndarray, case_ids: np.ndarray, seed: int) -> float:
    cases_of_class = defaultdict(set)
    for label, case_id in zip(labels, case_ids, strict=True):
        cases_of_class[label].add(case_id)
    num_folds = min(_MAX_FOLDS, *map(len, cases_of_class.values()))
    if num_folds < 2:
        return 1.0
    folds = StratifiedGroupKFold(num_folds, shuffle=True, random_state=seed)
    scores = [
        balanced_accuracy_score(
            labels, cross_val_predict(_probe(strength), embeddings, labels, groups=case_ids, cv=folds)
        )
        for strength in INVERSE_REGULARISATIONS
    ]
    return INVERSE_REGULARISATIONS[int(np.argmax(scores))]
