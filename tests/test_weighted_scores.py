# SPDX-License-Identifier: Apache-2.0
"""Scores of whole matrices of samples against scikit-learn on each sample."""

import numpy as np
import pytest

from dre_slcl.training.evaluation.case_bootstrap import draw_cases, paired_difference, score_samples
from dre_slcl.training.evaluation.scores import classification_scores, multilabel_scores
from dre_slcl.training.evaluation.weighted_scores import weighted_classification, weighted_multilabel


def probabilities(rng, shape, *, ties):
    values = rng.random(shape)
    values = np.round(values, 1) + 0.01 if ties else values
    return values / values.sum(axis=1, keepdims=True)


@pytest.mark.parametrize(("num_classes", "ties"), [(2, False), (2, True), (3, False), (4, True)])
def test_every_sample_of_classes_is_scored_as_scikit_learn_scores_it(num_classes, ties):
    rng = np.random.default_rng(num_classes + ties)
    references, stated = rng.integers(num_classes, size=41), probabilities(rng, (41, num_classes), ties=ties)
    cases = [f"c{number}" for number in rng.integers(15, size=41)]
    weights = draw_cases(cases, num_bootstrap=60, seed=3)
    found = weighted_classification(references, stated, weights, is_ordered=True)
    expected = score_samples(
        lambda sample: classification_scores(references[sample], stated[sample], is_ordered=True), weights
    )
    assert set(found) == set(expected)
    for name, values in expected.items():
        np.testing.assert_allclose(found[name], values, atol=1e-12, err_msg=name)


def test_every_sample_of_labels_is_scored_as_scikit_learn_scores_it():
    rng = np.random.default_rng(0)
    references = rng.integers(2, size=(50, 3)).astype(float)
    references[rng.random(references.shape) < 0.3] = np.nan
    references[3:, 2] = 0  # so rare that samples miss it
    stated = np.round(rng.random((50, 3)), 1)
    weights = draw_cases([f"c{number // 2}" for number in range(50)], num_bootstrap=80, seed=0)
    found = weighted_multilabel(references, stated, weights)
    expected = score_samples(lambda sample: multilabel_scores(references[sample], stated[sample]), weights)
    assert np.isnan(expected["auroc/2"]).any()
    for name, values in expected.items():
        np.testing.assert_allclose(found[name], values, atol=1e-12, err_msg=name)


def test_cases_are_drawn_whole_and_as_often_from_each_class():
    cases, classes = list("aabcdeff"), [0, 0, 0, 1, 1, 1, 1, 1]
    weights = draw_cases(cases, classes, num_bootstrap=500, seed=1)
    assert (weights[:, 0] == weights[:, 1]).all()
    assert (weights[:, 6] == weights[:, 7]).all()
    assert (weights[:, [0, 2]].sum(axis=1) == 2).all()
    assert (weights[:, [3, 4, 5, 6]].sum(axis=1) == 4).all()
    # A case of n is missing from a sample with probability (1 - 1/n)^n.
    assert (weights[:, 0] == 0).mean() == pytest.approx(0.25, abs=0.08)
    assert draw_cases(list("abc"), [0, 1, 1], num_bootstrap=5, seed=0) is None


def test_a_paired_difference_is_sure_where_single_intervals_overlap():
    rng = np.random.default_rng(0)
    theirs = rng.normal(0.7, 0.05, 2000)
    ours = theirs + rng.normal(0.02, 0.005, 2000)
    sure = paired_difference(ours, theirs)
    assert sure["interval"] == pytest.approx([0.01, 0.03], abs=0.002)
    assert sure["p_value"] < 0.002
    alike = paired_difference(theirs + rng.normal(0, 0.01, 2000), theirs)
    assert alike["p_value"] > 0.5
    assert paired_difference(theirs, theirs)["p_value"] == 1.0
    assert paired_difference(np.full(3, np.nan), np.ones(3)) is None
