# SPDX-License-Identifier: Apache-2.0
"""The Cox and ridge heads against scikit-survival and scikit-learn called by hand, and against planted answers."""

import numpy as np
import pytest
from sklearn.linear_model import Ridge
from sklearn.metrics import mean_squared_error
from sklearn.preprocessing import StandardScaler

from dre_slcl.training.evaluation import regression, survival
from dre_slcl.training.evaluation.case_folds import make_folds
from dre_slcl.training.evaluation.embedding_table import make_table
from dre_slcl.training.evaluation.label_table import SURVIVAL_TARGET, TaskLabels
from dre_slcl.training.evaluation.protocol import run_method
from dre_slcl.training.evaluation.regression import RidgeHead
from dre_slcl.training.evaluation.scores import regression_scores, survival_scores
from dre_slcl.training.evaluation.survival import CoxHead


def cohort(num_items=160, width=12, seed=0):
    """Features of which three make the risk, two items a case."""
    rng = np.random.default_rng(seed)
    features = rng.normal(3, 5, size=(num_items, width)).astype(np.float32)
    risks = (features[:, :3] - 3).sum(axis=1) / 5
    event_times, ends = rng.exponential(np.exp(-risks)), rng.exponential(2, size=num_items)
    targets = np.zeros(num_items, dtype=SURVIVAL_TARGET)
    targets["event"], targets["time"] = event_times <= ends, np.minimum(event_times, ends)
    return features, risks, targets, [f"case{place // 2}" for place in range(num_items)]


def concordance(targets, risks):
    return survival_scores(targets["time"], targets["event"], risks)["c_index"]


def test_cox_is_scikit_survivals_at_the_strength_that_the_validation_part_likes_best():
    linear_model = pytest.importorskip("sksurv.linear_model")
    features, risks, targets, case_ids = cohort()
    is_validation = np.arange(120) >= 80
    head = CoxHead().fit(features[:120], targets[:120], case_ids[:120], 0, is_validation)

    def by_hand(fitted, strength):
        scaler = StandardScaler().fit(features[fitted])
        model = linear_model.CoxnetSurvivalAnalysis(alphas=[strength], l1_ratio=0.1)
        model.fit(scaler.transform(features[fitted]), targets[fitted])
        return lambda rows: model.predict(scaler.transform(features[rows]))

    found = {s: concordance(targets[80:120], by_hand(range(80), s)(range(80, 120))) for s in survival.REGULARISATIONS}
    best = max(found.values())
    assert found[head.settings["regularisation"]] == pytest.approx(best, abs=0.003)
    expected = by_hand(range(120), head.settings["regularisation"])(range(120, 160))
    np.testing.assert_allclose(head.predict(features[120:]), expected, atol=2e-3)
    assert concordance(targets[120:], head.predict(features[120:])) > concordance(targets[120:], risks[120:]) - 0.05


def test_cox_chooses_by_whole_cases_and_finds_nothing_where_nothing_is():
    pytest.importorskip("sksurv")
    features, _, targets, case_ids = cohort(width=200)
    noise = np.random.default_rng(1).normal(size=features.shape).astype(np.float32)
    head = CoxHead().fit(noise[:120], targets[:120], case_ids[:120], 0)
    assert np.isfinite(head.predict(noise[120:])).all()
    assert abs(concordance(targets[120:], head.predict(noise[120:])) - 0.5) < 0.2
    # Beside 197 features of noise the three still speak.
    head = CoxHead().fit(features[:120], targets[:120], case_ids[:120], 0)
    assert concordance(targets[120:], head.predict(features[120:])) > 0.65


def test_risks_are_relative_to_the_training_parts_mean():
    pytest.importorskip("sksurv")
    features, _, targets, case_ids = cohort()
    shifted = CoxHead().fit(features[:100] + 1000, targets[:100], case_ids[:100], 0)
    plain = CoxHead().fit(features[:100], targets[:100], case_ids[:100], 0)
    np.testing.assert_allclose(shifted.predict(features + 1000), plain.predict(features), atol=0.02)
    assert abs(plain.predict(features[:100].mean(axis=0, keepdims=True))[0]) < 1e-4


def test_cox_refuses_what_it_cannot_fit():
    pytest.importorskip("sksurv")
    features, _, targets, case_ids = cohort(num_items=20)
    nobody = targets.copy()
    nobody["event"] = False
    with pytest.raises(ValueError, match="whose event was seen"):
        CoxHead().fit(features, nobody, case_ids, 0)
    negative = targets.copy()
    negative["time"][0] = -1
    with pytest.raises(ValueError, match="must not be negative, found -1"):
        CoxHead().fit(features, negative, case_ids, 0)


def test_cox_without_its_library_names_the_extra(monkeypatch):
    features, _, targets, case_ids = cohort(num_items=20)

    def missing(module):
        raise ImportError(f"pip install 'dre-slcl[survival]' ({module})")

    monkeypatch.setattr(survival, "import_survival", missing)
    with pytest.raises(ImportError, match="survival"):
        CoxHead().fit(features, targets, case_ids, 0)


def test_ridge_is_scikit_learns_at_the_strength_with_the_least_error_on_the_validation_part():
    features, risks, _, case_ids = cohort()
    numbers = risks + np.random.default_rng(1).normal(size=len(risks))
    is_validation = np.arange(120) >= 80
    head = RidgeHead().fit(features[:120], numbers[:120], case_ids[:120], 0, is_validation)

    def by_hand(fitted, strength):
        scaler = StandardScaler().fit(features[fitted])
        model = Ridge(strength).fit(scaler.transform(features[fitted]), numbers[fitted])
        return lambda rows: model.predict(scaler.transform(features[rows]))

    errors = {
        strength: mean_squared_error(numbers[80:120], by_hand(range(80), strength)(range(80, 120)))
        for strength in regression.REGULARISATIONS
    }
    assert head.settings["regularisation"] == min(errors, key=errors.get)
    expected = by_hand(range(120), head.settings["regularisation"])(range(120, 160))
    np.testing.assert_allclose(head.predict(features[120:]), expected)
    assert regression_scores(numbers[120:], head.predict(features[120:]))["r2"] > 0.5


@pytest.mark.parametrize("kind", ["survival", "regression"])
def test_both_heads_run_through_the_protocol(kind):
    if kind == "survival":
        pytest.importorskip("sksurv")
    features, risks, targets, case_ids = cohort()
    labels = TaskLabels("task", kind, targets if kind == "survival" else risks, [])
    table = make_table("slides", [f"s{place}" for place in range(len(features))], case_ids, features)
    folds = make_folds(labels, case_ids, 4, [0])
    result = run_method(CoxHead() if kind == "survival" else RidgeHead(), table, labels, folds, [0], num_bootstrap=50)
    score = result.scores["c_index" if kind == "survival" else "r2"]
    assert score.value > 0.7
    assert score.interval[0] <= score.value <= score.interval[1]
    assert len(result.predictions) == len(features)
