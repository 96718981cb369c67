# SPDX-License-Identifier: Apache-2.0
"""Metric modules, as classes and by path, against their libraries, loops, and all orders of a gallery."""

import itertools
import subprocess
import sys
from pathlib import Path

import evaluate
import numpy as np
import pytest
import yaml
from sklearn import metrics
from sksurv.metrics import concordance_index_censored

from dre_slcl.training.evaluation.retrieval_chance import retrieval_chance
from dre_slcl.training.metrics.auprc.auprc import Auprc
from dre_slcl.training.metrics.auroc.auroc import Auroc
from dre_slcl.training.metrics.balanced_accuracy.balanced_accuracy import BalancedAccuracy
from dre_slcl.training.metrics.c_index.c_index import CIndex
from dre_slcl.training.metrics.calibration_error.calibration_error import CalibrationError
from dre_slcl.training.metrics.quadratic_kappa.quadratic_kappa import QuadraticKappa
from dre_slcl.training.metrics.recall_at_k.rank_gallery import rank_gallery
from dre_slcl.training.metrics.recall_at_k.recall_at_k import RecallAtK
from dre_slcl.training.metrics.weighted_f1.weighted_f1 import WeightedF1

from .test_scores import calibration_error_by_loops

FOLDER = Path(__file__).parents[1] / "training" / "metrics"
CLASSES = {
    "auprc": Auprc,
    "auroc": Auroc,
    "balanced_accuracy": BalancedAccuracy,
    "c_index": CIndex,
    "calibration_error": CalibrationError,
    "quadratic_kappa": QuadraticKappa,
    "recall_at_k": RecallAtK,
    "weighted_f1": WeightedF1,
}
CHANCE_OF_TWO_RELEVANT_IN_FIVE = {"recall@1": 2 / 5, "recall@5": 1.0, "median_rank": 2.0}


def retrieve(seed=0, num_queries=40, gallery_size=23, num_groups=9, **options):
    rng = np.random.default_rng(seed)
    groups = [f"case{number}" for number in range(num_groups)]
    gallery_groups = groups + [str(group) for group in rng.choice(groups, gallery_size - num_groups)]
    query_groups = [str(group) for group in rng.choice(groups, num_queries)]
    queries, gallery = rng.normal(size=(num_queries, 7)), rng.normal(size=(gallery_size, 7))
    inputs = {"queries": queries.astype(np.float32), "query_groups": query_groups}
    fixed = {"gallery": gallery.astype(np.float32), "gallery_groups": gallery_groups}
    return inputs, fixed, RecallAtK(keep_in_memory=True).compute(**inputs, **fixed, **options)


def test_retrieval_agrees_with_loops_and_scikit_learn():
    inputs, fixed, result = retrieve()
    ranks, precisions = [], []
    for query, group in zip(inputs["queries"].astype(float), inputs["query_groups"], strict=True):
        cosines = [
            query @ item / np.linalg.norm(query) / np.linalg.norm(item) for item in fixed["gallery"].astype(float)
        ]
        relevant = [other == group for other in fixed["gallery_groups"]]
        best = max(cosine for cosine, hit in zip(cosines, relevant, strict=True) if hit)
        ranks.append(1 + sum(cosine > best for cosine in cosines))
        precisions.append(metrics.average_precision_score(relevant, cosines))
    for k in (1, 5, 10):
        assert result[f"recall@{k}"] == pytest.approx(np.mean(np.array(ranks) <= k))
    assert result["mean_average_precision"] == pytest.approx(np.mean(precisions))
    assert result["median_rank"] == np.median(ranks)


def test_retrieval_does_not_depend_on_batches():
    inputs, fixed, whole = retrieve()
    metric = RecallAtK(keep_in_memory=True)
    for start in range(0, 40, 16):
        metric.add_batch(**{name: values[start : start + 16] for name, values in inputs.items()})
    assert metric.compute(**fixed) == whole


@pytest.mark.parametrize(("num_relevant", "gallery_size"), [(1, 1), (1, 5), (2, 5), (3, 6), (6, 6)])
def test_retrieval_chance_is_the_mean_over_all_orders(num_relevant, gallery_size):
    hits = np.array(sorted(set(itertools.permutations([1] * num_relevant + [0] * (gallery_size - num_relevant)))))
    ranks = hits.argmax(axis=1) + 1
    precision = [
        np.mean([order[: place + 1].mean() for place in range(gallery_size) if order[place]]) for order in hits
    ]
    chance = retrieval_chance(np.array([num_relevant]), gallery_size)
    for k in (1, 5, 10):
        assert chance[f"recall@{k}"] == pytest.approx(np.mean(ranks <= k))
    assert chance["mean_average_precision"] == pytest.approx(np.mean(precision))
    assert chance["median_rank"] == next(k for k in itertools.count(1) if np.mean(ranks <= k) >= 0.5)


def test_retrieval_chance_averages_over_queries():
    mixed, one, two = (retrieval_chance(np.array(counts), 5) for counts in ([1, 1, 2], [1], [2]))
    for name in ("recall@1", "recall@5", "mean_average_precision"):
        assert mixed[name] == pytest.approx((2 * one[name] + two[name]) / 3)
    assert {name: two[name] for name in CHANCE_OF_TWO_RELEVANT_IN_FIVE} == pytest.approx(
        CHANCE_OF_TWO_RELEVANT_IN_FIVE
    )


def test_a_model_that_says_the_same_of_everything_gains_nothing_from_ties():
    is_relevant = np.eye(6, dtype=bool)
    ranks, precisions = rank_gallery(np.zeros((6, 6)), is_relevant)
    assert ranks.tolist() == [6] * 6
    assert precisions == pytest.approx(np.full(6, 1 / 6))


def test_retrieval_refuses_what_has_no_answer():
    vectors = np.ones((2, 3), dtype=np.float32)
    metric = RecallAtK(keep_in_memory=True)
    with pytest.raises(ValueError, match="no gallery item is relevant to group 'b'"):
        metric.compute(queries=vectors, query_groups=["a", "b"], gallery=vectors, gallery_groups=["a", "a"])
    with pytest.raises(ValueError, match="gallery_groups: expected 2, one per vector"):
        metric.compute(queries=vectors, query_groups=["a", "a"], gallery=vectors, gallery_groups=["a"])
    with pytest.raises(ValueError, match="gallery: expected finite numbers"):
        metric.compute(queries=vectors, query_groups=["a", "a"], gallery=vectors * np.nan, gallery_groups=["a", "a"])


def case(name):
    """Random inputs of a metric, and what it must give by a library's own entry point."""
    rng = np.random.default_rng(len(name))
    references = rng.integers(3, size=50)
    probabilities = rng.dirichlet(np.ones(3), size=50)
    predicted, one_hot = probabilities.argmax(axis=1), np.eye(3)[references]
    times, events, risks = rng.exponential(size=50), rng.random(50) < 0.5, rng.normal(size=50)
    stated = {"references": references, "predictions": probabilities}
    called = {"references": references, "predictions": predicted}
    return {
        "auroc": lambda: (stated, metrics.roc_auc_score(one_hot, probabilities)),
        "auprc": lambda: (stated, metrics.average_precision_score(one_hot, probabilities)),
        "balanced_accuracy": lambda: (called, metrics.balanced_accuracy_score(references, predicted)),
        "weighted_f1": lambda: (called, metrics.f1_score(references, predicted, average="weighted")),
        "quadratic_kappa": lambda: (called, metrics.cohen_kappa_score(references, predicted, weights="quadratic")),
        "calibration_error": lambda: (stated, calibration_error_by_loops(references, probabilities)),
        "c_index": lambda: (
            {"predictions": risks, "times": times, "events": events},
            concordance_index_censored(events, times, risks)[0],
        ),
        "recall_at_k": lambda: (
            {"queries": probabilities, "query_groups": references.astype(str)}
            | {"gallery": one_hot, "gallery_groups": references.astype(str), "k": (1,)},
            metrics.accuracy_score(references, predicted),  # the nearest corner of the simplex
        ),
    }[name]()


@pytest.mark.parametrize("name", CLASSES)
@pytest.mark.parametrize("by_path", [False, True])
def test_a_metric_agrees_with_its_library_as_class_and_by_path(name, by_path):
    inputs, expected = case(name)
    metric = evaluate.load(str(FOLDER / name), keep_in_memory=True) if by_path else CLASSES[name](keep_in_memory=True)
    result = metric.compute(**inputs)
    assert result["recall@1" if name == "recall_at_k" else name] == pytest.approx(expected)


@pytest.mark.parametrize("name", CLASSES)
def test_a_metric_folder_is_a_space_of_its_own(name):
    card = (FOLDER / name / "README.md").read_text(encoding="utf-8")
    fields = yaml.safe_load(card.split("---\n")[1])
    assert fields["sdk"] == "gradio"
    assert {"evaluate", "metric"} <= set(fields["tags"])
    required = (FOLDER / name / "requirements.txt").read_text(encoding="utf-8")
    code = "".join(path.read_text(encoding="utf-8") for path in (FOLDER / name).glob("*.py"))
    assert ("from sklearn" in code) == ("scikit-learn" in required)
    assert ("from sksurv" in code) == ("scikit-survival" in required)
    assert "dre_slcl" not in code
    assert "from .." not in code
    example = card.split("```python")[1].split("```")[0].replace(f'"NAMESPACE/{name}"', repr(str(FOLDER / name)))
    exec(compile(example, f"{name}/README.md", "exec"), {})


def test_two_classes_are_scored_by_class_one_and_an_absent_class_by_none():
    references, stated = [0, 1, 1, 0], [[0.9, 0.1], [0.2, 0.8], [0.6, 0.4], [0.3, 0.7]]
    second = [row[1] for row in stated]
    assert Auprc(keep_in_memory=True).compute(references=references, predictions=stated)["auprc"] == pytest.approx(
        metrics.average_precision_score(references, second)
    )
    found = Auroc(keep_in_memory=True).compute(references=[0, 0, 2], predictions=np.eye(3)[[0, 1, 2]] * 0.7 + 0.1)
    assert found == {"auroc": pytest.approx((0.75 + 1) / 2), "auroc_per_class": [0.75, None, 1.0]}
    with pytest.raises(ValueError, match="at least two classes"):
        Auroc(keep_in_memory=True).compute(references=[1, 1], predictions=[[0.5, 0.5]] * 2)
    with pytest.raises(ValueError, match="expected classes 0 to 1"):
        Auroc(keep_in_memory=True).compute(references=[1, 2], predictions=[[0.5, 0.5]] * 2)


@pytest.mark.parametrize("missing", [None, float("nan")])
def test_a_label_that_is_not_known_does_not_count(missing):
    metric = evaluate.load(str(FOLDER / "auroc"), "multilabel", keep_in_memory=True)
    references = [[1, missing], [0, 1], [missing, 0], [1, 1]]
    stated = [[0.1, 0.2], [0.3, 0.4], [0.9, 0.1], [0.5, 0.0]]
    found = metric.compute(references=references, predictions=stated)
    assert found["auroc_per_class"] == [
        metrics.roc_auc_score([1, 0, 1], [0.1, 0.3, 0.5]),
        metrics.roc_auc_score([1, 0, 1], [0.4, 0.1, 0.0]),
    ]
    assert found["auroc"] == np.mean(found["auroc_per_class"])


def test_an_absent_grade_keeps_its_distance():
    references, predicted = [0, 0, 2, 2], [0, 2, 2, 2]
    found = QuadraticKappa(keep_in_memory=True).compute(references=references, predictions=predicted, num_classes=3)
    assert found["quadratic_kappa"] == pytest.approx(
        metrics.cohen_kappa_score(references, predicted, labels=[0, 1, 2], weights="quadratic")
    )


PROCESS = """
import sys
import evaluate
import numpy as np

path, cache, place = sys.argv[1], sys.argv[2], int(sys.argv[3])
metric = evaluate.load(path, num_process=2, process_id=place, experiment_id="two", cache_dir=cache)
rng = np.random.default_rng(0)
references, predictions = rng.integers(2, size=40), rng.dirichlet(np.ones(2), size=40)
metric.add_batch(references=references[place::2], predictions=predictions[place::2])
result = metric.compute()
print(None if result is None else result["auroc"])
"""


def test_two_processes_give_one_score(tmp_path):
    runs = [
        subprocess.Popen(
            [sys.executable, "-c", PROCESS, str(FOLDER / "auroc"), str(tmp_path), str(place)],
            stdout=subprocess.PIPE,
            text=True,
        )
        for place in (0, 1)
    ]
    answers = [run.communicate(timeout=120)[0].strip().splitlines()[-1] for run in runs]
    rng = np.random.default_rng(0)
    references, predictions = rng.integers(2, size=40), rng.dirichlet(np.ones(2), size=40)
    assert float(answers[0]) == pytest.approx(metrics.roc_auc_score(references, predictions[:, 1]))
    assert answers[1] == "None"
