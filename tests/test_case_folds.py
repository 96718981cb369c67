# SPDX-License-Identifier: Apache-2.0
"""Folds keep cases and sites together whatever the cohort, and are as even as they say."""

import numpy as np
import pytest

from dre_slcl.training.evaluation.case_folds import (
    Fold,
    check_folds,
    describe_folds,
    inner_splits,
    make_folds,
    strata_of,
)
from dre_slcl.training.evaluation.label_table import SURVIVAL_TARGET, TaskLabels


def cohort(seed, num_cases=40, num_classes=3):
    """Cases with one to four slides, some with slides of two classes."""
    rng = np.random.default_rng(seed)
    of_case = np.r_[np.arange(num_classes).repeat(6), rng.integers(num_classes, size=num_cases - 6 * num_classes)]
    case_ids, targets = [], []
    for case, label in enumerate(of_case):
        for _ in range(rng.integers(1, 5)):
            case_ids.append(f"case{case}")
            targets.append(label if rng.random() < 0.9 else rng.integers(num_classes))
    names = [f"class{place}" for place in range(num_classes)]
    return TaskLabels("task", "classification", np.array(targets), names), case_ids


@pytest.mark.parametrize("seed", range(8))
def test_folds_never_share_cases_and_hold_every_item_out_once(seed):
    labels, case_ids = cohort(seed)
    folds = make_folds(labels, case_ids, 2 + seed % 4, (0, 7), validation_fraction=0.25 * (seed % 2))
    check_folds(folds, case_ids)
    for wanted in (0, 7):
        of_seed = [fold for fold in folds if fold.seed == wanted]
        assert len(of_seed) == 2 + seed % 4
        assert sorted(np.concatenate([fold.test for fold in of_seed])) == list(range(len(case_ids)))
        for fold in of_seed:
            parts = (fold.train, fold.validation, fold.test)
            assert sorted(np.concatenate(parts)) == list(range(len(case_ids)))
            assert bool(len(fold.validation)) == bool(seed % 2)
            cases = [{case_ids[row] for row in part} for part in parts]
            assert not cases[0] & cases[2]
            assert not cases[1] & cases[2]
            assert not cases[0] & cases[1]
    assert any(
        not np.array_equal(a.test, b.test)
        for a, b in zip(folds[: len(folds) // 2], folds[len(folds) // 2 :], strict=True)
    )


@pytest.mark.parametrize("seed", range(4))
def test_sites_stay_together_and_the_balance_is_that_which_is_said(seed):
    labels, case_ids = cohort(seed, num_cases=80)
    rng = np.random.default_rng(seed)
    site_of = {case_id: f"site{rng.integers(12)}" for case_id in dict.fromkeys(case_ids)}
    sites = [site_of[case_id] for case_id in case_ids]
    folds = make_folds(labels, case_ids, 3, (seed,), sites=sites)
    for fold in folds:
        assert not {sites[row] for row in fold.train} & {sites[row] for row in fold.test}
    said = describe_folds(folds, labels, sites)
    gaps = [
        abs((labels.targets[fold.test] == place).mean() - (labels.targets == place).mean())
        for fold in folds
        for place in range(3)
    ]
    assert said["largest_class_gap"] == pytest.approx(max(gaps))
    assert sorted(site for part in said["parts"] for site in part["test_sites"]) == sorted(set(sites))
    # Better than sites dealt out blindly.
    blind = []
    for trial in range(200):
        fold_of = dict(zip(sorted(set(sites)), np.random.default_rng(trial).integers(3, size=12), strict=False))
        parts = [
            np.array([row for row, site in enumerate(sites) if fold_of.get(site, 0) == number]) for number in range(3)
        ]
        if all(len(part) for part in parts):
            blind.append(
                max(
                    abs((labels.targets[part] == place).mean() - (labels.targets == place).mean())
                    for part in parts
                    for place in range(3)
                )
            )
    assert max(gaps) < np.median(blind)


def test_a_case_in_two_parts_is_refused_by_name():
    case_ids = ["a", "a", "b", "c"]
    good = Fold("0", np.array([0, 1]), np.array([2]), np.array([3]))
    check_folds([good], case_ids)
    with pytest.raises(ValueError, match="fold 4: case a in train and test"):
        check_folds([good, Fold("4", np.array([0]), np.array([1, 2]))], case_ids)
    with pytest.raises(ValueError, match="case a in validation and test"):
        check_folds([Fold("4", np.array([2]), np.array([1]), np.array([0]))], case_ids)


def test_what_cannot_be_divided_is_refused(caplog):
    labels, case_ids = cohort(0, num_cases=20)
    with pytest.raises(ValueError, match="20 cases cannot make 30 folds"):
        make_folds(labels, case_ids, 30, (0,))
    with pytest.raises(ValueError, match="--folds: expected 2 or more"):
        make_folds(labels, case_ids, 1, (0,))
    sites = ["here" if row else "there" for row in range(len(case_ids))]
    case_ids[1] = case_ids[0]
    with pytest.raises(ValueError, match=r"A case must be of one site. Found 1: case0: here, there"):
        make_folds(labels, case_ids, 2, (0,), sites=sites)
    lonely = TaskLabels("grade", "classification", np.array([0, 0, 1, 1, 2, 2]), ["x", "y", "z"])
    with pytest.raises(ValueError, match=r"a class must be in two cases or more.*Found 1: z"):
        make_folds(lonely, ["a", "b", "c", "d", "e", "e"], 2, (0,))
    rare = TaskLabels("grade", "classification", np.array([0] * 8 + [1, 1]), ["x", "y"])
    make_folds(rare, [f"c{row}" for row in range(10)], 4, (0,))
    assert "classes in fewer cases than folds: y (2)" in caplog.text


def test_other_kinds_are_balanced_by_event_fifth_and_rarest_label():
    survival = np.array([(True, 1.0), (False, 2.0)], dtype=SURVIVAL_TARGET)
    assert strata_of(TaskLabels("os", "survival", survival, [])).tolist() == [1, 0]
    numbers = np.random.default_rng(0).normal(size=100)
    fifths = strata_of(TaskLabels("age", "regression", numbers, []))
    assert np.bincount(fifths).tolist() == [20] * 5
    assert numbers[fifths == 0].max() < numbers[fifths == 1].min()
    flags = np.array([[1, 1, 0], [1, 0, np.nan], [1, 0, 1], [0, 0, 0], [1, 1, 0.0]])
    # The third label is the rarest, the first the most frequent.
    assert strata_of(TaskLabels("genes", "multilabel", flags, ["a", "b", "c"])).tolist() == [2, 1, 3, 0, 2]
    many = np.random.default_rng(0).random((200, 3)) < [0.05, 0.3, 0.6]
    labels = TaskLabels("genes", "multilabel", many.astype(float), ["a", "b", "c"])
    counts = [many[fold.test, 0].sum() for fold in make_folds(labels, [f"c{row}" for row in range(200)], 4, (0,))]
    assert max(counts) - min(counts) <= 1


def test_inner_splits_are_the_validation_part_or_folds_of_cases():
    strata, case_ids = np.array([0, 0, 1, 1, 0, 1]), list("aabbcd")
    is_validation = np.array([0, 0, 1, 1, 0, 0], dtype=bool)
    assert [(a.tolist(), b.tolist()) for a, b in inner_splits(strata, case_ids, 0, is_validation)] == [
        ([0, 1, 4, 5], [2, 3])
    ]
    splits = list(inner_splits(strata, case_ids, 0))
    assert len(splits) == 2
    for fitted, held in splits:
        assert not {case_ids[row] for row in fitted} & {case_ids[row] for row in held}
    assert not list(inner_splits(strata, list("aabbab"), 0))
