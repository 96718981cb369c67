# SPDX-License-Identifier: Apache-2.0
"""Scores against scikit-learn's and scikit-survival's own entry points, loops, and what constants must give."""

import subprocess
import sys

import numpy as np
import pytest
from scipy.stats import pearsonr, spearmanr
from sklearn import metrics

from dre_slcl.training.evaluation import scores as scores_module
from dre_slcl.training.evaluation.embedding_table import make_table
from dre_slcl.training.evaluation.evaluate_task import Protocol, evaluate_task, prepare_task
from dre_slcl.training.evaluation.label_table import make_tasks, read_labels
from dre_slcl.training.evaluation.scores import (
    chance_scores,
    classification_scores,
    multilabel_scores,
    regression_scores,
    survival_scores,
    undefined_labels,
)


def classified(num_classes, decimals=8, num_items=80):
    rng = np.random.default_rng(num_classes)
    references = rng.integers(num_classes, size=num_items)
    probabilities = rng.random((num_items, num_classes)) + 0.4 * np.eye(num_classes)[references]
    return references, (probabilities / probabilities.sum(axis=1, keepdims=True)).round(decimals)


def calibration_error_by_loops(references, probabilities, num_bins=15):
    bins = [[] for _ in range(num_bins)]
    for right, row in zip(references, probabilities, strict=True):
        confidence = max(row)
        place = next(place for place in range(num_bins) if confidence <= np.linspace(0, 1, num_bins + 1)[place + 1])
        bins[place].append((confidence, float(np.argmax(row) == right)))
    gaps = [abs(np.mean([c for c, _ in items]) - np.mean([r for _, r in items])) for items in bins if items]
    return sum(gap * len(items) for gap, items in zip(gaps, filter(None, bins), strict=True)) / len(references)


@pytest.mark.parametrize("decimals", [8, 1])
@pytest.mark.parametrize("num_classes", [2, 4])
def test_classification_agrees_with_scikit_learn(num_classes, decimals):
    references, probabilities = classified(num_classes, decimals)
    found = classification_scores(references, probabilities, is_ordered=True)
    predicted = probabilities.argmax(axis=1)
    one_hot = np.eye(num_classes)[references]
    expected = {
        "balanced_accuracy": metrics.balanced_accuracy_score(references, predicted),
        "accuracy": metrics.accuracy_score(references, predicted),
        "weighted_f1": metrics.f1_score(references, predicted, average="weighted"),
        "quadratic_kappa": metrics.cohen_kappa_score(references, predicted, weights="quadratic"),
        "calibration_error": calibration_error_by_loops(references, probabilities),
    }
    if num_classes == 2:
        expected["auroc"] = metrics.roc_auc_score(references, probabilities[:, 1])
        expected["auprc"] = metrics.average_precision_score(references, probabilities[:, 1])
    else:
        areas = metrics.roc_auc_score(one_hot, probabilities, average=None)
        expected["auroc"] = metrics.roc_auc_score(one_hot, probabilities, average="macro")
        expected["auprc"] = metrics.average_precision_score(one_hot, probabilities, average="macro")
        expected |= {f"auroc/{place}": area for place, area in enumerate(areas)}
    assert found == pytest.approx(expected)
    assert "quadratic_kappa" not in classification_scores(references, probabilities)


def test_a_class_that_is_not_there_is_left_out_and_nothing_is_not_a_number():
    references, probabilities = np.array([0, 0, 2, 2]), np.eye(3)[[0, 1, 2, 2]] * 0.7 + 0.1
    found = classification_scores(references, probabilities)
    assert found["balanced_accuracy"] == pytest.approx(0.75)
    assert found["auroc"] == pytest.approx((0.75 + 1) / 2)
    assert "auroc/1" not in found
    assert "auroc/0" in found
    alone = classification_scores(np.zeros(3, dtype=int), np.tile([0.9, 0.1], (3, 1)))
    assert set(alone) == {"balanced_accuracy", "accuracy", "weighted_f1", "calibration_error"}


def test_only_the_scores_that_are_asked_for_are_computed(monkeypatch):
    references, probabilities = classified(4)
    everything = classification_scores(references, probabilities)
    for name in everything:
        assert classification_scores(references, probabilities, names=[name]) == {name: everything[name]}
    monkeypatch.setattr(scores_module, "f1_score", None)
    assert set(classification_scores(references, probabilities, names=["auroc", "accuracy"])) == {"auroc", "accuracy"}


def test_multilabel_scores_are_those_of_each_label_on_its_known_items():
    rng = np.random.default_rng(0)
    references = rng.integers(2, size=(60, 4)).astype(float)
    references[rng.random(references.shape) < 0.3] = np.nan
    references[:, 2] = np.where(np.isnan(references[:, 2]), np.nan, 1)
    probabilities = rng.random((60, 4))
    found = multilabel_scores(references, probabilities)
    areas, precisions = {}, {}
    for label in (0, 1, 3):
        known = [item for item in range(60) if not np.isnan(references[item, label])]
        truth, stated = references[known, label], probabilities[known, label]
        areas[f"auroc/{label}"] = metrics.roc_auc_score(truth, stated)
        precisions[f"auprc/{label}"] = metrics.average_precision_score(truth, stated)
    means = {"auroc": np.mean(list(areas.values())), "auprc": np.mean(list(precisions.values()))}
    assert found == pytest.approx(areas | precisions | means)
    assert undefined_labels(references) == [2]
    assert multilabel_scores(references[:, 2:3], probabilities[:, 2:3]) == {}
    assert multilabel_scores(references, probabilities, names=["auroc/3"]) == {"auroc/3": found["auroc/3"]}


def test_regression_agrees_with_scikit_learn_and_scipy():
    rng = np.random.default_rng(0)
    references = rng.normal(size=50)
    predictions = references + rng.normal(size=50)
    assert regression_scores(references, predictions) == pytest.approx(
        {
            "r2": metrics.r2_score(references, predictions),
            "pearson": pearsonr(references, predictions)[0],
            "spearman": spearmanr(references, predictions)[0],
            "mae": np.abs(references - predictions).mean(),
            "rmse": np.sqrt(((references - predictions) ** 2).mean()),
        }
    )
    assert set(regression_scores(references, np.ones(50))) == {"r2", "mae", "rmse"}
    assert set(regression_scores(np.ones(50), predictions)) == {"mae", "rmse"}


def test_survival_agrees_with_a_loop_over_pairs():
    pytest.importorskip("sksurv")
    rng = np.random.default_rng(0)
    times, events, risks = rng.permutation(40) + 1.0, rng.random(40) < 0.6, rng.normal(size=40).round(1)
    right, pairs = 0.0, 0
    for first in range(40):
        for second in range(40):
            if events[first] and times[first] < times[second]:
                pairs += 1
                right += (risks[first] > risks[second]) + 0.5 * (risks[first] == risks[second])
    assert survival_scores(times, events, risks) == {"c_index": pytest.approx(right / pairs)}
    assert survival_scores(times, np.zeros(40), risks) == {}
    assert survival_scores(times, times == 40, risks) == {}  # nobody is known to live longer


def test_survival_without_its_library_names_the_extra(monkeypatch):
    hidden = {name: None for name in list(sys.modules) if name.split(".")[0] == "sksurv"} | {"sksurv": None}
    for name, module in (hidden | {"sksurv.metrics": None}).items():
        monkeypatch.setitem(sys.modules, name, module)
    with pytest.raises(ImportError, match=r"pip install 'dre-slcl\[survival\]'"):
        survival_scores(np.ones(3), np.ones(3), np.ones(3))


def test_chance_is_what_saying_the_frequencies_of_every_item_scores():
    references = np.array([0, 0, 0, 1, 2, 2])
    found = chance_scores("classification", references, 3)
    assert found["balanced_accuracy"] == pytest.approx(1 / 3)
    assert found["accuracy"] == pytest.approx(1 / 2)
    assert found["auroc"] == found["auroc/1"] == 0.5
    assert found["auprc"] == pytest.approx(np.mean([3 / 6, 1 / 6, 2 / 6]))
    assert "calibration_error" not in found
    labels = np.array([[1, 0], [0, np.nan], [np.nan, 1], [0, 1]])
    assert chance_scores("multilabel", labels) == pytest.approx(
        {"auroc": 0.5, "auroc/0": 0.5, "auroc/1": 0.5, "auprc": 0.5, "auprc/0": 1 / 3, "auprc/1": 2 / 3}
    )
    numbers = np.array([1.0, 2.0, 6.0])
    assert chance_scores("regression", numbers) == pytest.approx(
        {"r2": 0, "mae": 2, "rmse": np.std(numbers), "pearson": 0, "spearman": 0}
    )
    assert chance_scores("survival", np.ones(3)) == {"c_index": 0.5}
    with pytest.raises(ValueError, match="no chance level for 'retrieval'"):
        chance_scores("retrieval", np.ones(3))


def test_scores_are_imported_without_the_seconds_that_evaluate_takes():
    code = "import sys; import dre_slcl.training.evaluation.scores; print('evaluate' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "False"


def test_risks_of_different_models_are_compared_within_their_group_only():
    rng = np.random.default_rng(0)
    times, events, groups = rng.exponential(size=60), rng.random(60) < 0.6, rng.choice(list("abc"), 60)
    risks = np.round(rng.normal(size=60), 1) - times + 100 * (groups == "b")
    pairs = [
        (first, second)
        for first in range(60)
        for second in range(60)
        if groups[first] == groups[second] and events[first] and times[first] < times[second]
    ]
    right = [np.sign(risks[first] - risks[second]) / 2 + 0.5 for first, second in pairs]
    assert survival_scores(times, events, risks, groups=groups) == {"c_index": pytest.approx(np.mean(right))}
    # Among all, the scale of a group's model counts as if it were its items' risk.
    assert survival_scores(times, events, risks)["c_index"] < np.mean(right) - 0.05
    assert survival_scores(times, events, risks, groups=[str(place) for place in range(60)]) == {}


def test_a_label_without_a_score_is_told_of(tmp_path, caplog):
    rng = np.random.default_rng(0)
    flags = np.stack([np.arange(24) % 2, np.ones(24, dtype=int)], axis=1)
    lines = [f"s{place},c{place},{first},{second}" for place, (first, second) in enumerate(flags)]
    (tmp_path / "labels.csv").write_text("\n".join(["slide_id,case_id,EGFR,KRAS", *lines]))
    labels = read_labels(tmp_path / "labels.csv")
    (task,) = make_tasks(labels, ["EGFR", "KRAS"], kind="multilabel")
    table = make_table("slides", labels.slide_ids, labels.case_ids, rng.normal(size=(24, 3)))
    protocol = Protocol(methods=("knn",), num_folds=3, seeds=(0,), num_bootstrap=0, with_shuffled=False)
    result = evaluate_task(prepare_task(table, labels, task, protocol), protocol, progress=False)
    (note,) = result.protocol["notes"]
    assert note.startswith("KRAS: its known held-out items are all alike")
    assert note in caplog.text
    assert "auroc/0" in result.rows[0].scores
    assert "auroc/1" not in result.rows[0].scores
