# SPDX-License-Identifier: Apache-2.0
"""Intervals against the spread of a mean, and what each sample holds."""

import numpy as np
import pytest

from dre_slcl.training.evaluation.case_bootstrap import bootstrap_intervals


def test_intervals_are_those_of_cases_not_of_slides():
    rng = np.random.default_rng(0)
    per_case = rng.normal(size=50)
    values, cases = np.repeat(per_case, 8), np.repeat([f"case{number}" for number in range(50)], 8).tolist()
    options = {"num_bootstrap": 2000, "seed": 1}
    low, high = bootstrap_intervals(lambda sample: {"mean": values[sample].mean()}, cases, **options)["mean"]
    expected = 2 * 1.96 * per_case.std() / np.sqrt(50)
    assert high - low == pytest.approx(expected, rel=0.1)
    assert bootstrap_intervals(lambda sample: {"mean": values[sample].mean()}, cases, **options)["mean"] == [low, high]


def test_every_bootstrap_sample_has_as_many_cases_of_each_class():
    cases, classes = ["a", "a", "b", "c", "d", "e"], [0, 0, 0, 1, 1, 1]
    seen = []
    bootstrap_intervals(lambda sample: seen.append(sample) or {"x": 0.0}, cases, classes, num_bootstrap=50, seed=0)
    for sample in seen:
        drawn = [cases[index] for index in sample]
        assert drawn.count("a") / 2 + drawn.count("b") == 2
        assert sum(classes[index] for index in sample) == 3


def test_a_single_case_of_a_class_gives_no_interval():
    cases, classes = ["a", "a", "b", "c", "d"], [0, 0, 1, 1, 1]
    assert bootstrap_intervals(lambda sample: {"x": 1.0}, cases, classes, num_bootstrap=5, seed=0) == {}


def test_a_score_that_some_samples_leave_undefined_has_the_interval_of_the_others():
    def score(sample):
        return {"x": float(len(set(sample)))} | ({"y": 2.0} if 0 in sample else {})

    found = bootstrap_intervals(score, list("abcd"), num_bootstrap=200, seed=0)
    assert found["y"] == [2, 2]
    assert found["x"] == pytest.approx([1, 4], abs=1)
