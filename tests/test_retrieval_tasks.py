# SPDX-License-Identifier: Apache-2.0
"""Retrieval and zero-shot tasks against loops over queries, all orders of a gallery, and the model called by hand."""

import itertools
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch

from dre_slcl.training.evaluation.case_folds import Fold
from dre_slcl.training.evaluation.embedding_table import make_table
from dre_slcl.training.evaluation.label_table import TaskLabels
from dre_slcl.training.evaluation.report_retrieval import (
    Pairs,
    distinct_reports,
    evaluate_report_retrieval,
    project_reports,
)
from dre_slcl.training.evaluation.result_files import write_results
from dre_slcl.training.evaluation.score_titles import score_title
from dre_slcl.training.evaluation.scores import classification_scores
from dre_slcl.training.evaluation.slide_retrieval import evaluate_slide_retrieval, rank_slides, slide_chance
from dre_slcl.training.evaluation.zero_shot import ZeroShot, evaluate_zero_shot
from modeling_dre_slcl.zero_shot import class_probabilities, zero_shot_classifier

from .tiny_models import tiny_model, tiny_tokenizer

NUM_ITEMS = 48


def cohort(merit=1.5, seed=0, num_items=NUM_ITEMS):
    """Two slides a case, three classes, one case of a fourth class that has no counterpart."""
    rng = np.random.default_rng(seed)
    classes = np.repeat(rng.integers(3, size=num_items // 2), 2)
    classes[-2:] = 3
    features = rng.normal(size=(num_items, 8))
    features[np.arange(num_items), classes] += merit
    cases = [f"case{place // 2}" for place in range(num_items)]
    table = make_table("slides", [f"s{place}" for place in range(num_items)], cases, features)
    return table, TaskLabels("subtype", "classification", classes, ["a", "b", "c", "alone"])


def by_loops(features, classes, cases):
    """The scores of each query, one after the other."""
    features = np.asarray(features, dtype=np.float64)
    rows = []
    for query in range(len(classes)):
        gallery = [item for item in range(len(classes)) if cases[item] != cases[query]]
        right = sum(classes[item] == classes[query] for item in gallery)
        if not right:
            continue
        cosine = {
            item: features[query] @ features[item] / np.linalg.norm(features[query]) / np.linalg.norm(features[item])
            for item in gallery
        }
        ranked = sorted(gallery, key=lambda item: -cosine[item])
        hits = [classes[item] == classes[query] for item in ranked]
        votes = Counter(classes[item] for item in ranked[:5])
        winner = max(votes, key=lambda name: (votes[name], -[classes[item] for item in ranked].index(name)))
        row = {f"acc@{k}": float(any(hits[:k])) for k in (1, 3, 5)} | {"mvacc@5": float(winner == classes[query])}
        for k in (5, 10):
            precisions = [np.mean(hits[: place + 1]) for place in range(min(k, len(hits))) if hits[place]]
            row[f"map@{k}"] = sum(precisions) / min(k, right)
        rows.append(row)
    return {name: np.mean([row[name] for row in rows]) for name in rows[0]}, len(rows)


def test_slides_that_find_slides_are_scored_as_loops_do():
    table, labels = cohort(merit=3)
    result = evaluate_slide_retrieval(table, labels, num_bootstrap=50)
    expected, num_queries = by_loops(table.features, labels.targets, table.case_ids)
    row = result.rows[0]
    assert {name: score.value for name, score in row.scores.items()} == pytest.approx(expected)
    assert (result.num_items, result.num_cases) == (num_queries, num_queries // 2)
    assert result.protocol["queries_without_right_answer"] == ["s46", "s47"]
    assert [one.encoder for one in result.rows] == ["slides", "shuffled labels", "chance"]
    low, high = row.scores["mvacc@5"].interval
    assert low <= row.scores["mvacc@5"].value <= high
    # What the shuffled slides find is near chance, far from what was planted.
    shuffled, chance = (result.rows[place].scores["mvacc@5"].value for place in (1, 2))
    assert abs(shuffled - chance) < 0.2 < row.scores["mvacc@5"].value - chance
    assert len(result.rows[1].scores["acc@1"].by_seed) == 3
    assert score_title("mvacc@5", result) == "MVAcc@5"
    assert score_title("map@10", result) == "mAP@10"


def test_a_slide_of_the_same_case_is_never_found():
    table, labels = cohort(merit=0)
    features = table.features.copy()
    features[1::2] = features[::2]  # the two slides of a case are the same picture
    twins = replace(table, features=features)
    found = evaluate_slide_retrieval(twins, labels, num_bootstrap=0).rows[0].scores["acc@1"].value
    assert found == pytest.approx(by_loops(features, labels.targets, table.case_ids)[0]["acc@1"])
    assert found < 0.7


def test_an_encoder_that_says_the_same_of_every_slide_gains_nothing_from_ties():
    labels = cohort()[1]
    same = rank_slides(np.ones((NUM_ITEMS, 4)), labels.targets, np.arange(NUM_ITEMS) // 2)
    assert same.score(np.arange(len(same.queries)))["acc@5"] == 0


@pytest.mark.parametrize("cases", [[0, 1, 2, 3, 4, 5, 6], [0, 0, 1, 2, 3, 4, 4]])
def test_slide_chance_is_the_mean_over_all_orders(cases):
    classes, cases = np.array([0, 0, 0, 1, 1, 1, 2]), np.array(cases)
    answers = []
    for query in range(6):
        gallery = [item for item in range(7) if cases[item] != cases[query]]
        right = sum(classes[item] == classes[query] for item in gallery)
        of_query = []
        for order in itertools.permutations(gallery):
            hits = np.array([classes[item] == classes[query] for item in order])
            precision = (hits.cumsum() / np.arange(1, len(hits) + 1) * hits)[:5].sum() / min(5, right)
            votes = Counter(classes[list(order[:5])].tolist())
            winner = max(votes, key=lambda name: (votes[name], -list(classes[list(order)]).index(name)))
            of_query.append([hits[0], hits[:3].any(), hits[:5].any(), precision, winner == classes[query]])
        answers.append(np.mean(of_query, axis=0))
    *expected, vote = np.mean(answers, axis=0)
    found = slide_chance(classes, cases, seed=0)
    assert [found[name] for name in ("acc@1", "acc@3", "acc@5", "map@5")] == pytest.approx(expected)
    drawn = [slide_chance(classes, cases, seed=seed)["mvacc@5"] for seed in range(40)]
    assert np.mean(drawn) == pytest.approx(vote, abs=0.03)


def test_slide_retrieval_compares_encoders_on_the_same_items():
    table, labels = cohort()
    noise = replace(table, name="random weights", features=np.random.default_rng(1).normal(size=(NUM_ITEMS, 3)))
    result = evaluate_slide_retrieval(table, labels, baselines=[noise], num_bootstrap=0)
    assert [(row.encoder, row.is_null) for row in result.rows[:2]] == [("slides", False), ("random weights", True)]
    with pytest.raises(ValueError, match="holds other items than slides"):
        evaluate_slide_retrieval(table, labels, peers=[noise.take(range(10))])
    with pytest.raises(ValueError, match="is of kind regression"):
        evaluate_slide_retrieval(table, TaskLabels("age", "regression", np.zeros(NUM_ITEMS), []))
    with pytest.raises(ValueError, match="no slide has a right answer"):
        evaluate_slide_retrieval(table, TaskLabels("x", "classification", np.arange(NUM_ITEMS) // 2, []))


def reports_and_pairs(seed=0):
    """Twelve slides of six cases; the last two cases share a report."""
    rng = np.random.default_rng(seed)
    cases = [f"case{place // 2}" for place in range(12)]
    reports = [f"report {min(place // 2, 4)}" for place in range(12)]
    texts = rng.normal(size=(5, 6))
    slides = texts[[min(place // 2, 4) for place in range(12)]] + 0.8 * rng.normal(size=(12, 6))
    return [f"s{place}" for place in range(12)], cases, reports, Pairs(slides, texts)


def test_reports_and_slides_find_each_other_as_loops_say(tmp_path):
    ids, cases, reports, pairs = reports_and_pairs()
    noise = reports_and_pairs(seed=1)[3]
    noise = Pairs(np.random.default_rng(2).normal(size=noise.slide_projection.shape), noise.report_projection)
    encoders = {"slides": pairs, "random weights": noise}
    results = evaluate_report_retrieval(
        ids, cases, reports, encoders, null_encoders=["random weights"], num_bootstrap=30
    )
    assert [(result.task, result.num_items) for result in results] == [("slide_to_report", 12), ("report_to_slide", 5)]
    texts = distinct_reports(reports)
    cosine = [[s @ t / np.linalg.norm(s) / np.linalg.norm(t) for t in pairs.report_projection]
              for s in pairs.slide_projection]  # fmt: skip
    forward, backward = [], []
    for slide, report in enumerate(reports):
        own = texts.index(report)
        forward.append(1 + sum(value > cosine[slide][own] for value in cosine[slide]))
    for place, text in enumerate(texts):
        best = max(cosine[slide][place] for slide in range(12) if reports[slide] == text)
        backward.append(1 + sum(cosine[slide][place] > best for slide in range(12)))
    for result, ranks in zip(results, (forward, backward), strict=True):
        row = result.rows[0]
        assert [item["prediction"] for item in row.predictions] == ranks
        assert row.scores["recall@1"].value == pytest.approx(np.mean(np.array(ranks) == 1))
        assert row.scores["median_rank"].value == np.median(ranks)
        names = [(one.encoder, one.is_null) for one in result.rows]
        assert names == [(n, n != "slides") for n in ("slides", "random weights", "shuffled reports", "chance")]
    assert results[0].rows[-1].scores["recall@1"].value == pytest.approx(1 / 5)
    write_results(tmp_path / "out", results)
    assert {path.stem for path in (tmp_path / "out" / "figures").iterdir()} == {
        f"{task}-{name}" for task in ("slide_to_report", "report_to_slide") for name in ("methods", "recall")
    }


def test_report_retrieval_refuses_what_has_no_answer():
    ids, cases, reports, pairs = reports_and_pairs()
    with pytest.raises(ValueError, match="1 slides have no report, such as s0"):
        evaluate_report_retrieval(ids, cases, [" ", *reports[1:]], {"slides": pairs})
    with pytest.raises(ValueError, match="at least two different reports"):
        evaluate_report_retrieval(ids, cases, ["x"] * 12, {"slides": pairs})
    with pytest.raises(ValueError, match="expected projections of 12 slides and 5 distinct reports, found 3 and 5"):
        evaluate_report_retrieval(
            ids, cases, reports, {"slides": Pairs(pairs.slide_projection[:3], pairs.report_projection)}
        )


@pytest.fixture(scope="module")
def model():
    return tiny_model(text=True).eval()


def test_zero_shot_is_the_models_own_on_stored_projections(model):
    rng = np.random.default_rng(0)
    features = torch.nn.functional.normalize(torch.from_numpy(rng.normal(size=(20, model.config.projection_size))))
    classes = np.arange(20) % 2
    table = make_table("slides", [f"s{i}" for i in range(20)], [f"c{i}" for i in range(20)], features.numpy())
    labels = TaskLabels("subtype", "classification", classes, ["normal", "tumor"])
    names = {"normal": ["normal tissue"], "tumor": ["tumor", "tumor tissue"]}
    result = evaluate_zero_shot(
        table, labels, model, tiny_tokenizer(), class_names=names, templates=["a slide of CLASSNAME"], num_bootstrap=20
    )
    classifier = zero_shot_classifier(model, tiny_tokenizer(), list(names.values()), ["a slide of CLASSNAME"])
    expected = class_probabilities(model, features.float(), classifier).numpy()
    stated = np.array([item["prediction"] for item in result.rows[0].predictions])
    np.testing.assert_allclose(stated, expected, atol=1e-5)
    values = {name: score.value for name, score in result.rows[0].scores.items()}
    assert values == pytest.approx(classification_scores(classes, stated))
    assert [row.encoder for row in result.rows] == ["slides", "shuffled labels", "chance"]
    part = [Fold("0", np.arange(10), np.arange(10, 20))]
    assert evaluate_zero_shot(table, labels, model, tiny_tokenizer(), folds=part, num_bootstrap=0).num_items == 10


def test_zero_shot_refuses_embeddings_that_are_not_in_the_joint_space(model):
    method = ZeroShot(model, tiny_tokenizer(), [["normal"], ["tumor"]])
    with pytest.raises(ValueError, match="Take the column `slide_projection`"):
        method.predict(np.ones((2, model.config.projection_size + 1)))
    labels = TaskLabels("x", "classification", np.array([0, 1]), ["normal", "tumor"])
    table = make_table("slides", ["a", "b"], ["a", "b"], np.ones((2, 4)))
    with pytest.raises(ValueError, match="class 'tumor', which has no names"):
        evaluate_zero_shot(table, labels, model, tiny_tokenizer(), class_names={"normal": ["normal"]})


def test_reports_are_projected_by_the_models_own_text_encoder(model):
    reports = ["a slide of tumor", "normal tissue"]
    found = project_reports(model, tiny_tokenizer(), reports)
    with torch.no_grad():
        tokens = [tiny_tokenizer()(text, return_tensors="pt") for text in reports]
        expected = [model.get_text_features(one["input_ids"], one["attention_mask"])[0].numpy() for one in tokens]
    np.testing.assert_allclose(found, expected, atol=1e-5)
