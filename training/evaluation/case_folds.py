# SPDX-License-Identifier: Apache-2.0
"""Folds of cases: all items of a case are in one part, classes in every fold as evenly as that allows.

Letters: n items.
"""

import logging
import warnings
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from sklearn.model_selection import StratifiedGroupKFold

from ..manifest_checks import raise_offenders
from .label_table import TaskLabels

logger = logging.getLogger(__name__)
_REGRESSION_STRATA = 5
_SITE_TRIALS = 50
_MAX_INNER_FOLDS = 5


@dataclass(frozen=True, eq=False)
class Fold:
    """One division of the items.

    Args:
        name (`str`): of the fold.
        train (`np.ndarray` of int), test (`np.ndarray` of int): rows of the items.
        validation (`np.ndarray` of int): rows on which methods make their choices; where it is empty they take some
            cases of `train` for that.
        seed (`int`, *optional*): the seed that this fold is for; `None` for all.
    """

    name: str
    train: np.ndarray
    test: np.ndarray
    validation: np.ndarray = field(default_factory=lambda: np.zeros(0, dtype=np.int64))
    seed: int | None = None


def strata_of(labels: TaskLabels) -> np.ndarray:
    """What folds are balanced by, int `(n,)`: class; event seen; fifth of the numbers; the rarest label an item has.

    Args:
        labels (`TaskLabels`): of the n items.
    """
    targets = labels.targets
    if labels.kind == "classification":
        return targets.astype(np.int64)
    if labels.kind == "survival":
        return targets["event"].astype(np.int64)
    if labels.kind == "regression":
        borders = np.quantile(targets, np.arange(1, _REGRESSION_STRATA) / _REGRESSION_STRATA)
        return np.searchsorted(borders, targets, side="right")
    counts = np.nansum(targets, axis=0)
    order = np.argsort(counts, kind="stable")
    has = np.nan_to_num(targets[:, order]) > 0
    return np.where(has.any(axis=1), order[has.argmax(axis=1)] + 1, 0)


def make_folds(
    labels: TaskLabels,
    case_ids: Sequence[str],
    num_folds: int,
    seeds: Sequence[int],
    *,
    sites: Sequence[str] | None = None,
    validation_fraction: float = 0.0,
) -> list[Fold]:
    """Draws stratified folds of whole cases, anew for each seed.

    Args:
        labels (`TaskLabels`): of the n items.
        case_ids (sequence of `str`): of the n items.
        num_folds (`int`): each item is in the test part of one.
        seeds (sequence of `int`): the draws.
        sites (sequence of `str`, *optional*): of the n items; no site is in the test part of two folds. Of 50 draws
            the one with the most even classes is taken.
        validation_fraction (`float`, defaults to 0): share of the training cases (with sites: of whole sites) that
            becomes the validation part; 0 leaves it to each method.

    Returns:
        `list` of `Fold`: `num_folds` for each seed.

    Raises:
        ValueError: if there are fewer cases or sites than folds, a class is in one case only, or a case is of two
            sites.
    """
    strata, cases = strata_of(labels), np.asarray(case_ids, dtype=str)
    groups = cases if sites is None else np.asarray(sites, dtype=str)
    _check_groups(cases, groups, num_folds, "cases" if sites is None else "sites")
    if labels.kind == "classification":
        _check_classes(labels, strata, groups, num_folds, "case" if sites is None else "site")
    folds = []
    for seed in seeds:
        parts = _split(strata, groups, num_folds, seed, trials=1 if sites is None else _SITE_TRIALS)
        for number, test in enumerate(parts):
            train = np.setdiff1d(np.arange(len(cases)), test)
            validation = np.zeros(0, dtype=np.int64)
            if validation_fraction:
                count = max(2, round(1 / validation_fraction))
                if len(np.unique(groups[train])) >= count:
                    validation = train[_split(strata[train], groups[train], count, seed)[0]]
                train = np.setdiff1d(train, validation)
            folds.append(Fold(str(number), train, test, validation, seed))
    return folds


def _split(strata: np.ndarray, groups: np.ndarray, num_folds: int, seed: int, *, trials: int = 1) -> list[np.ndarray]:
    """Test parts of the most even of some draws."""
    best, best_gap = [], np.inf
    for trial in range(trials):
        state = seed if trial == 0 else int(np.random.SeedSequence([seed, trial]).generate_state(1)[0])
        folds = StratifiedGroupKFold(num_folds, shuffle=True, random_state=state)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "The least populated class")  # of which `make_folds` tells
            parts = [test for _, test in folds.split(np.zeros(len(strata)), strata, groups)]
        gap = np.inf if any(not len(part) for part in parts) else _gap(strata, parts)
        if gap < best_gap or not best:
            best, best_gap = parts, gap
    if any(not len(part) for part in best):
        raise ValueError(f"{num_folds} folds: one stays empty; ask for fewer (--folds).")
    return best


def _gap(strata: np.ndarray, parts: Sequence[np.ndarray]) -> float:
    """How far the shares of strata in the worst fold are from those overall: largest difference."""
    values = np.unique(strata)
    overall = np.array([(strata == value).mean() for value in values])
    shares = np.array([[(strata[part] == value).mean() for value in values] for part in parts])
    sizes = np.array([len(part) for part in parts]) / len(strata) - 1 / len(parts)
    return float(max(np.abs(shares - overall).max(), np.abs(sizes).max()))


def _check_groups(cases: np.ndarray, groups: np.ndarray, num_folds: int, what: str) -> None:
    if num_folds < 2:
        raise ValueError(f"--folds: expected 2 or more, found {num_folds}.")
    sites_of = defaultdict(set)
    for case_id, group in zip(cases, groups, strict=True):
        sites_of[case_id].add(str(group))
    raise_offenders(
        "A case must be of one site",
        [f"{case_id}: {', '.join(sorted(found))}" for case_id, found in sites_of.items() if len(found) > 1],
    )
    count = len(np.unique(groups))
    if count < num_folds:
        raise ValueError(f"{count} {what} cannot make {num_folds} folds; ask for fewer (--folds).")


def _check_classes(labels: TaskLabels, strata: np.ndarray, groups: np.ndarray, num_folds: int, what: str) -> None:
    counts = {name: len(np.unique(groups[strata == place])) for place, name in enumerate(labels.classes)}
    present = {name: count for name, count in counts.items() if count}
    alone = [name for name, count in present.items() if count < 2]
    raise_offenders(
        f"Task {labels.task}: a class must be in two {what}s or more, else it is never both learned and tested; leave "
        "its cells empty or merge it with another",
        alone,
    )
    few = [f"{name} ({count})" for name, count in present.items() if count < num_folds]
    if few:
        logger.warning("Task %s: classes in fewer %ss than folds: %s", labels.task, what, ", ".join(few))


def check_folds(folds: Sequence[Fold], case_ids: Sequence[str]) -> None:
    """Makes sure that no case is in two parts of a fold.

    Args:
        folds (sequence of `Fold`): the folds.
        case_ids (sequence of `str`): of the items.

    Raises:
        ValueError: naming the cases and their parts.
    """
    wrong = []
    for fold in folds:
        parts = {"train": fold.train, "validation": fold.validation, "test": fold.test}
        cases = {name: {case_ids[row] for row in rows} for name, rows in parts.items()}
        for case_id in sorted(set().union(*cases.values())):
            places = [name for name, found in cases.items() if case_id in found]
            if len(places) > 1:
                wrong.append(f"fold {fold.name}: case {case_id} in {' and '.join(places)}")
    raise_offenders("Each case must be in one part of a fold, or scores would not be those of held-out cases", wrong)


def describe_folds(folds: Sequence[Fold], labels: TaskLabels, sites: Sequence[str] | None = None) -> dict[str, Any]:
    """Says how even folds are, ready for JSON.

    Args:
        folds (sequence of `Fold`): the folds.
        labels (`TaskLabels`): of the items.
        sites (sequence of `str`, *optional*): of the items.

    Returns:
        `dict`: `largest_class_gap`, the largest difference between the share of a class in a test part and overall;
        `parts`, the number of items of each stratum in each test part; and with sites those of each test part.
    """
    strata = strata_of(labels)
    names = dict(enumerate(labels.classes)) if labels.kind == "classification" else {}
    known = [fold for fold in folds if len(fold.test)]
    overall = np.unique(np.concatenate([fold.test for fold in known]))
    gap, parts = 0.0, []
    for fold in known:
        counts = Counter(strata[fold.test].tolist())
        for value in np.unique(strata[overall]):
            share = (strata[overall] == value).mean()
            gap = max(gap, abs(counts[int(value)] / len(fold.test) - share))
        content = {
            "fold": fold.name,
            "seed": fold.seed,
            "train": len(fold.train),
            "validation": len(fold.validation),
            "test": len(fold.test),
            "test_strata": {str(names.get(value, value)): count for value, count in sorted(counts.items())},
        }
        if sites is not None:
            content["test_sites"] = sorted({str(sites[row]) for row in fold.test})
        parts.append(content)
    return {"largest_class_gap": float(gap), "parts": parts}


def inner_splits(
    strata: np.ndarray, case_ids: Sequence[str], seed: int, is_validation: np.ndarray | None = None
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Divides training items so that a method can choose its settings on cases that it was not fitted on.

    Args:
        strata (`np.ndarray` of shape `(n,)`, int): classes of the items.
        case_ids (sequence of `str`): of the items.
        seed (`int`): of the draw.
        is_validation (`np.ndarray` of shape `(n,)`, bool, *optional*): the validation part, if it is given.

    Yields:
        `tuple`: rows to fit on and rows to choose on: the given parts, or up to five folds of whole cases; nothing if
        a class has fewer than two cases.
    """
    if is_validation is not None and is_validation.any():
        yield np.flatnonzero(~is_validation), np.flatnonzero(is_validation)
        return
    cases_of: dict[int, set[str]] = defaultdict(set)
    for stratum, case_id in zip(strata.tolist(), case_ids, strict=True):
        cases_of[stratum].add(case_id)
    num_folds = min(_MAX_INNER_FOLDS, *map(len, cases_of.values())) if len(cases_of) > 1 else 0
    if num_folds >= 2:
        folds = StratifiedGroupKFold(num_folds, shuffle=True, random_state=seed)
        yield from folds.split(np.zeros(len(strata)), strata, np.asarray(case_ids))
