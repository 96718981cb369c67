# SPDX-License-Identifier: Apache-2.0
"""Intervals by bootstrap over whole cases."""

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence

import numpy as np


def bootstrap_intervals(
    score: Callable[[np.ndarray], dict[str, float]],
    cases: Sequence[str],
    strata: Sequence[int] | None = None,
    *,
    num_bootstrap: int,
    seed: int,
) -> dict[str, list[float]]:
    """95% percentile intervals over samples of whole cases, since slides of a case are not independent.

    Args:
        score (callable): indices of a sample, with repetitions -> scores.
        cases (sequence of `str`): the case of each item.
        strata (sequence of `int`, *optional*): class of each item; as many cases of each class are drawn as there are,
            a case being of the class that most of its items have.
        num_bootstrap (`int`): number of samples; 0 for no intervals.
        seed (`int`): of the draws; the same seed draws the same cases.

    Returns:
        `dict`: name of each score -> `[low, high]`. Empty if a stratum has a single case, which says nothing of how
        much cases differ.
    """
    items, classes = defaultdict(list), defaultdict(list)
    for index, case in enumerate(cases):
        items[case].append(index)
        classes[case].append(0 if strata is None else int(strata[index]))
    by_stratum = defaultdict(list)
    for case, indices in items.items():
        by_stratum[Counter(classes[case]).most_common(1)[0][0]].append(np.asarray(indices))
    if num_bootstrap < 1 or min(map(len, by_stratum.values())) < 2:
        return {}
    drawn = [score(sample) for sample in _samples(list(by_stratum.values()), num_bootstrap, seed)]
    # A score that a sample leaves undefined is not in its dict.
    names = dict.fromkeys(name for row in drawn for name in row)
    return {name: np.percentile([row[name] for row in drawn if name in row], [2.5, 97.5]).tolist() for name in names}


def _samples(strata: list[list[np.ndarray]], num_bootstrap: int, seed: int) -> Iterator[np.ndarray]:
    random = np.random.default_rng(seed)
    for _ in range(num_bootstrap):
        yield np.concatenate([cases[i] for cases in strata for i in random.integers(len(cases), size=len(cases))])
