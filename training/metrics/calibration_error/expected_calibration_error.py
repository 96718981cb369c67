# SPDX-License-Identifier: Apache-2.0
"""How far stated probabilities are from how often they are right, without the metric's import of seconds."""

import numpy as np
from sklearn.calibration import calibration_curve


def expected_calibration_error(references: np.ndarray, probabilities: np.ndarray, num_bins: int = 15) -> float:
    """Mean gap between confidence and accuracy over bins of confidence, weighted by their items.

    Confidence is the probability of the predicted class, as in Guo et al., "On Calibration of Modern Neural Networks",
    ICML 2017.

    Args:
        references (`np.ndarray` of shape `(n,)`, int): the right classes, 0 to C - 1.
        probabilities (`np.ndarray` of shape `(n, C)`, float): between 0 and 1.
        num_bins (`int`, defaults to 15): bins of equal width between 0 and 1.

    Returns:
        `float`: between 0, calibrated, and 1.
    """
    confidence = probabilities.max(axis=1)
    is_right = probabilities.argmax(axis=1) == references
    accuracies, means = calibration_curve(is_right, confidence, pos_label=True, n_bins=num_bins)
    # The bins that scikit-learn sums over, of which it leaves out those without items.
    counts = np.bincount(np.searchsorted(np.linspace(0, 1, num_bins + 1)[1:-1], confidence))
    return float(np.average(np.abs(accuracies - means), weights=counts[counts > 0]))
