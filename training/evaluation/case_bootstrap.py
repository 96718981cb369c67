# SPDX-License-Identifier: Apache-2.0
"""Intervals by drawing whole cases again, since slides of a case are not independent.

Letters: B samples, n items.
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Sequence

import numpy as np


def draw_cases(
    cases: Sequence[str], strata: Sequence[int] | np.ndarray | None = None, *, num_bootstrap: int, seed: int
) -> np.ndarray | None:
    """Draws samples of whole cases.

    Args:
        cases (sequence of `str`): the case of each item.
        strata (sequence of `int`, *optional*): class of each item; as many cases of each class are drawn as there are,
            a case being of the class that most of its items have.
        num_bootstrap (`int`): number of samples; 0 for none.
        seed (`int`): of the draws; the same seed draws the same cases.

    Returns:
        `np.ndarray` of shape `(B, n)`, int32: how often each item is in each sample. `None` if a stratum has a single
        case, which says nothing of how much cases differ.
    """
    names, case_of = np.unique(np.asarray(cases, dtype=str), return_inverse=True)
    classes = defaultdict(list)
    for index, place in enumerate(case_of.tolist()):
        classes[place].append(0 if strata is None else int(strata[index]))
    # In the order of first appearance, as strata are.
    by_stratum = defaultdict(list)
    for place, found in classes.items():
        by_stratum[Counter(found).most_common(1)[0][0]].append(place)
    if num_bootstrap < 1 or min(map(len, by_stratum.values())) < 2:
        return None
    random = np.random.default_rng(seed)
    counts = np.zeros((num_bootstrap, len(names)), dtype=np.int32)
    members = [np.asarray(places) for places in by_stratum.values()]
    for sample in counts:
        for places in members:
            sample[places] += np.bincount(random.integers(len(places), size=len(places)), minlength=len(places))
    return counts[:, case_of]


def percentile_interval(values: np.ndarray) -> tuple[float, float] | None:
    """The 95% percentile interval of a score's values over samples, NaN left aside; `None` if all are.

    Args:
        values (`np.ndarray` of shape `(B,)`, float): the score in each sample.
    """
    if np.isnan(values).all():
        return None
    low, high = np.nanpercentile(values, [2.5, 97.5])
    return float(low), float(high)


def score_samples(score: Callable[[np.ndarray], dict[str, float]], weights: np.ndarray) -> dict[str, np.ndarray]:
    """Scores every sample with a function that knows nothing of samples.

    Args:
        score (callable): rows of a sample, with repetitions -> scores; what is undefined may be left out.
        weights (`np.ndarray` of shape `(B, n)`, int): from `draw_cases`.

    Returns:
        `dict`: score -> float64 `(B,)`, NaN where a sample leaves it undefined.
    """
    rows = np.arange(weights.shape[1])
    found = [score(np.repeat(rows, counts)) for counts in weights]
    names = dict.fromkeys(name for scores in found for name in scores)
    return {name: np.array([scores.get(name, np.nan) for scores in found]) for name in names}


def bootstrap_intervals(
    score: Callable[[np.ndarray], dict[str, float]],
    cases: Sequence[str],
    strata: Sequence[int] | None = None,
    *,
    num_bootstrap: int,
    seed: int,
) -> dict[str, list[float]]:
    """95% percentile intervals over samples of whole cases.

    Args:
        score (callable): indices of a sample, with repetitions -> scores.
        cases (sequence of `str`), strata (sequence of `int`, *optional*): see `draw_cases`.
        num_bootstrap (`int`), seed (`int`): see `draw_cases`.

    Returns:
        `dict`: name of each score -> `[low, high]`. Empty if a stratum has a single case.
    """
    weights = draw_cases(cases, strata, num_bootstrap=num_bootstrap, seed=seed)
    if weights is None:
        return {}
    samples = score_samples(score, weights)
    intervals = {name: percentile_interval(values) for name, values in samples.items()}
    return {name: list(interval) for name, interval in intervals.items() if interval is not None}


def paired_difference(ours: np.ndarray, theirs: np.ndarray) -> dict[str, float | list[float]] | None:
    """How sure a difference of two scores is, both taken on the same samples.

    Args:
        ours (`np.ndarray` of shape `(B,)`, float), theirs (`np.ndarray` of shape `(B,)`, float): a score of either in
            each sample; NaN where undefined.

    Returns:
        `dict`: `interval` (95%) of ours - theirs, and `p_value`, two-sided: twice the share of samples on the rarer
        side of 0, at least 2 / (B + 1). `None` if no sample defines both.
    """
    differences = ours - theirs
    differences = differences[~np.isnan(differences)]
    if not len(differences):
        return None
    rarer = min((differences <= 0).sum(), (differences >= 0).sum())
    interval = percentile_interval(differences)
    return {"interval": list(interval), "p_value": float(min(1.0, 2 * (rarer + 1) / (len(differences) + 1)))}
