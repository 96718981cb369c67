# SPDX-License-Identifier: Apache-2.0
"""The metrics against scikit-learn, loops, enumeration of all orders, and the spread of a mean."""

import itertools

import numpy as np
import pytest
from sklearn.metrics import accuracy_score, average_precision_score, balanced_accuracy_score, roc_auc_score

from dre_slcl.training.evaluation.case_bootstrap import bootstrap_intervals
from dre_slcl.training.metrics.slide_metrics import (
    SlideClassification,
    SlideRetrieval,
    classification_scores,
    rank_gallery,
    retrieval_chance,
)

CHANCE_OF_TWO_RELEVANT_IN_FIVE = {"recall@1": 2 / 5, "recall@5": 1.0, "median_rank": 2.0}


def retrieve(seed=0, num_queries=40, gallery_size=23, num_groups=9, **options):
    rng = np.random.default_rng(seed)
    groups = [f"case{number}" for number in range(num_groups)]
    gallery_groups = groups + [str(group) for group in rng.choice(groups, gallery_size - num_groups)]
    query_groups = [str(group) for group in rng.choice(groups, num_queries)]
    queries, gallery = rng.normal(size=(num_queries, 7)), rng.normal(size=(gallery_size, 7))
    inputs = {"queries": queries.astype(np.float32), "query_groups": query_groups}
    fixed = {"gallery": gallery.astype(np.float32), "gallery_groups": gallery_groups}
    return inputs, fixed, SlideRetrieval(keep_in_memory=True).compute(**inputs, **fixed, **options)


def test_retrieval_agrees_with_loops_and_scikit_learn():
    inputs, fixed, result = retrieve(num_bootstrap=0)
    ranks, precisions = [], []
    for query, group in zip(inputs["queries"].astype(float), inputs["query_groups"], strict=True):
        cosines = [
            query @ item / np.linalg.norm(query) / np.linalg.norm(item) for item in fixed["gallery"].astype(float)
        ]
        relevant = [other == group for other in fixed["gallery_groups"]]
        best = max(cosine for cosine, hit in zip(cosines, relevant, strict=True) if hit)
        ranks.append(1 + sum(cosine > best for cosine in cosines))
        precisions.append(average_precision_score(relevant, cosines))
    for k in (1, 5, 10):
        assert result[f"recall@{k}"] == pytest.approx(np.mean(np.array(ranks) <= k))
    assert result["mean_average_precision"] == pytest.approx(np.mean(precisions))
    assert result["median_rank"] == np.median(ranks)
    assert (result["num_queries"], result["gallery_size"], result["interval"]) == (40, 23, {})


def test_retrieval_does_not_depend_on_batches():
    inputs, fixed, whole = retrieve()
    metric = SlideRetrieval(keep_in_memory=True)
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
    metric = SlideRetrieval(keep_in_memory=True)
    with pytest.raises(ValueError, match="no gallery item is relevant to group 'b'"):
        metric.compute(queries=vectors, query_groups=["a", "b"], gallery=vectors, gallery_groups=["a", "a"])
    with pytest.raises(ValueError, match="one per gallery item"):
        metric.compute(queries=vectors, query_groups=["a", "a"], gallery=vectors, gallery_groups=["a"])
    with pytest.raises(ValueError, match="gallery: expected finite numbers"):
        metric.compute(queries=vectors, query_groups=["a", "a"], gallery=vectors * np.nan, gallery_groups=["a", "a"])


@pytest.mark.parametrize("num_classes", [2, 4])
@pytest.mark.parametrize("decimals", [8, 1])
def test_classification_agrees_with_scikit_learn(num_classes, decimals):
    rng = np.random.default_rng(num_classes)
    references = rng.integers(num_classes, size=60)
    scores = rng.random((60, num_classes)) + 0.4 * np.eye(num_classes)[references]
    scores = (scores / scores.sum(axis=1, keepdims=True)).round(decimals)
    result = SlideClassification(keep_in_memory=True).compute(references=references, scores=scores)
    predicted = scores.argmax(axis=1)
    areas = [roc_auc_score(references == column, scores[:, column]) for column in range(num_classes)]
    assert result["balanced_accuracy"] == pytest.approx(balanced_accuracy_score(references, predicted))
    assert result["accuracy"] == pytest.approx(accuracy_score(references, predicted))
    assert result["auroc"] == pytest.approx(np.mean(areas))
    assert result["chance"]["balanced_accuracy"] == 1 / num_classes
    assert result["chance"]["accuracy"] == np.bincount(references).max() / 60
    assert np.array(result["confusion"]).sum(axis=1).tolist() == np.bincount(references).tolist()
    for name, (low, high) in result["interval"].items():
        assert low <= result[name] <= high


def test_a_class_without_slides_is_left_out_of_the_means():
    references, scores = np.array([0, 0, 2, 2]), np.eye(3)[[0, 1, 2, 2]]
    result = classification_scores(references, scores)
    assert result["balanced_accuracy"] == pytest.approx(0.75)
    assert result["auroc"] == pytest.approx((0.75 + 1.0) / 2)


def test_classification_refuses_classes_out_of_range_and_a_single_class():
    metric = SlideClassification(keep_in_memory=True)
    for references in ([0, 2], [1, 1], [-1, 0]):
        with pytest.raises(ValueError, match="at least two of the classes 0 to 1"):
            metric.compute(references=references, scores=[[0.5, 0.5], [0.5, 0.5]])


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
    assert len({tuple(sorted(sample)) for sample in seen}) > 5


def test_a_single_case_of_a_class_gives_no_interval():
    result = SlideClassification(keep_in_memory=True).compute(
        references=[0, 0, 1, 1, 1], scores=np.eye(2)[[0, 0, 1, 1, 0]], cases=["a", "a", "b", "c", "d"]
    )
    assert result["interval"] == {}
