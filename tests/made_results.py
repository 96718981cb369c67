# SPDX-License-Identifier: Apache-2.0
"""Results of every kind of task, made up at random, for what writes and draws them."""

import numpy as np

from dre_slcl.training.evaluation.scores import (
    MAIN_METRIC,
    chance_scores,
    classification_scores,
    multilabel_scores,
    regression_scores,
    survival_scores,
)
from dre_slcl.training.evaluation.task_result import MethodResult, Score, TaskResult

CLASSES = {"classification": ["LUAD", "LUSC", "normal | lung"], "multilabel": ["EGFR", "KRAS"]}
NUM_ITEMS, ITEMS_PER_CASE = 60, 2


def truths(kind, rng, num_classes):
    """What `score` takes, and what `predictions` say."""
    if kind == "classification":
        classes = rng.permutation(np.arange(NUM_ITEMS) % num_classes)
        return classes, [CLASSES[kind][place] for place in classes]
    if kind == "multilabel":
        flags = rng.integers(2, size=(NUM_ITEMS, 2)).astype(float)
        flags[rng.random(flags.shape) < 0.2] = np.nan
        return flags, [[None if np.isnan(flag) else int(flag) for flag in row] for row in flags]
    if kind == "regression":
        numbers = rng.normal(60, 10, size=NUM_ITEMS)
        return numbers, numbers.tolist()
    times, events = rng.exponential(500, size=NUM_ITEMS), rng.random(NUM_ITEMS) < 0.6
    pairs = zip(times.tolist(), events.tolist(), strict=True)
    return (times, events), [{"time": time, "event": event} for time, event in pairs]


def predicted(kind, truth, merit, rng, num_classes):
    if kind == "classification":
        stated = rng.dirichlet(np.ones(num_classes), size=NUM_ITEMS) + merit * np.eye(num_classes)[truth]
        return stated / stated.sum(axis=1, keepdims=True)
    if kind == "multilabel":
        return np.clip(rng.random((NUM_ITEMS, 2)) * (1 - merit) + merit * np.nan_to_num(truth, nan=0.5), 0, 1)
    if kind == "regression":
        return 60 + merit * (truth - 60) + rng.normal(0, 5, size=NUM_ITEMS)
    return -merit * np.log(truth[0]) + rng.normal(size=NUM_ITEMS)


def score(kind, truth, found):
    if kind == "survival":
        return survival_scores(*truth, found)
    functions = {"classification": classification_scores, "multilabel": multilabel_scores}
    return functions.get(kind, regression_scores)(truth, found)


def make_result(kind, *, num_classes=3, seed=0, few_shot=False):
    """A task with rows of two methods, a peer, two null encoders and chance."""
    rng = np.random.default_rng(seed)
    truth, told = truths(kind, rng, num_classes)

    def row(method, encoder, merit, *, is_null=False):
        found = predicted(kind, truth, merit, rng, num_classes)
        scores = {name: Score(v, (v - 0.04, v + 0.03), [v, v]) for name, v in score(kind, truth, found).items()}
        items = [
            {"id": f"s{place}", "case_id": f"case{place // ITEMS_PER_CASE}", "seed": 0, "fold": "0"}
            | {"truth": told[place], "prediction": found[place].tolist()}
            for place in range(NUM_ITEMS)
        ]
        return MethodResult(method, encoder, scores, is_null=is_null, predictions=items)

    methods = ["linear_probe", "knn", *(f"few_shot_{shots}" for shots in (1, 4) if few_shot)]
    rows = [row(method, "slides", 0.9) for method in methods]
    rows += [row(method, "peer", 0.5) for method in methods]
    for encoder in ("random weights", "shuffled labels"):
        rows += [row(method, encoder, 0.0, is_null=True) for method in methods]
    plain = truth if kind != "survival" else np.zeros(0)
    chance = {name: Score(value) for name, value in chance_scores(kind, plain, num_classes).items()}
    rows.append(MethodResult("chance", "chance", chance, is_null=True))
    classes = CLASSES.get(kind, [])[:num_classes]
    protocol = {"level": "slide", "seeds": [0], "num_bootstrap": 100, "left_out": [{"id": "x", "reason": "no_label"}]}
    counts = {"num_items": NUM_ITEMS, "num_cases": NUM_ITEMS // ITEMS_PER_CASE}
    return TaskResult(f"{kind} of/<i>", kind, rows, MAIN_METRIC[kind], classes, **counts, protocol=protocol)
