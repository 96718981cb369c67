# SPDX-License-Identifier: Apache-2.0
"""Slides find slides of the same class, none of them of their own case.

Scores, for the k nearest of the gallery by cosine; classes of the gallery are known, that of the query is asked:

- `acc@k`: share of queries with at least one right slide among the first k (Chen et al., "Towards a general-purpose
  foundation model for computational pathology", Nature Medicine 2024: Acc@K).
- `mvacc@5`: share of queries for which the most frequent class of the first 5 is right (there: MVAcc@5); of equally
  frequent classes, the one that comes first.
- `map@k`: mean over queries of the average precision of the first k, the sum of the precisions at right slides divided
  by min(k, right slides in the gallery) (Manning, Raghavan and Schuetze, "Introduction to Information Retrieval",
  chapter 8, cut off at k).

Among equally similar slides the right ones come last, so that an encoder that says the same of every slide gains
nothing.

Letters: n items, Q queries, G gallery items, E width.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..metrics.recall_at_k.rank_gallery import unit_rows
from .embedding_table import EmbeddingTable
from .label_table import TaskLabels
from .null_rows import SHUFFLED, shuffle_labels
from .protocol import truth_of
from .retrieval_rows import chance_row_of, mean_row, query_row
from .task_result import MethodResult, TaskResult

ACCURACY_AT = (1, 3, 5)
PRECISION_AT = (5, 10)
VOTE_OF = 5
MAIN_SCORE = f"mvacc@{VOTE_OF}"
_QUERIES_AT_ONCE = 512
_RANDOM_ORDERS = 20


@dataclass(frozen=True, eq=False)
class Answers:
    """What queries found.

    Args:
        queries (`np.ndarray` of shape `(Q,)`, int): the items that have a right answer in another case.
        first_rank (`np.ndarray` of shape `(Q,)`, int): of the first right slide, 1 is best.
        values (`dict`): score -> float64 `(Q,)`, whose mean is the score.
    """

    queries: np.ndarray
    first_rank: np.ndarray
    values: dict[str, np.ndarray]

    def score(self, sample: np.ndarray) -> dict[str, float]:
        """The scores of some queries, given by their places."""
        return {name: float(values[sample].mean()) for name, values in self.values.items()}


def evaluate_slide_retrieval(
    table: EmbeddingTable,
    labels: TaskLabels,
    *,
    peers: Sequence[EmbeddingTable] = (),
    baselines: Sequence[EmbeddingTable] = (),
    seeds: Sequence[int] = (0, 1, 2),
    num_bootstrap: int = 1000,
) -> TaskResult:
    """Evaluates how well slides find slides of their class in other cases.

    Args:
        table (`EmbeddingTable`): the n items, of at least two cases; `case_ids` are known.
        labels (`TaskLabels`): their classes.
        peers (sequence of `EmbeddingTable`): embeddings of other encoders, of the same items.
        baselines (sequence of `EmbeddingTable`): embeddings without merit of their own, for null rows.
        seeds (sequence of `int`): of shuffled labels and random orders.
        num_bootstrap (`int`, defaults to 1000): samples of whole cases for intervals.

    Returns:
        `TaskResult`: of kind "retrieval"; a row's predictions are ranks of the first right slide.

    Raises:
        ValueError: if the task is no classification, tables differ in their items, or no item has a right answer.
    """
    if labels.kind != "classification":
        raise ValueError(f"Slide retrieval asks for classes; task {labels.task} is of kind {labels.kind}.")
    for other in (*peers, *baselines):
        if other.ids != table.ids:
            raise ValueError(f"{other.name}: holds other items than {table.name}; take those that both have.")
    cases = np.unique(np.asarray(table.case_ids, dtype=str), return_inverse=True)[1]
    found = {one.name: rank_slides(one.features, labels.targets, cases) for one in (table, *peers, *baselines)}
    null = {one.name for one in baselines}
    rows = [_row(name, answers, table, labels, num_bootstrap, name in null) for name, answers in found.items()]
    dealt = []
    for seed in seeds:
        shuffled = shuffle_labels(labels, table.case_ids, seed).targets
        if _with_answer(shuffled, cases).any():
            answers = rank_slides(table.features, shuffled, cases)
            dealt.append(answers.score(np.arange(len(answers.queries))))
    ours = found[table.name]
    rows += [mean_row(SHUFFLED, dealt)] if dealt else []
    rows.append(chance_row_of(slide_chance(labels.targets, cases, seed=seeds[0])))
    return TaskResult(
        task=f"{labels.task}, slides find slides",
        kind="retrieval",
        rows=rows,
        main_metric=MAIN_SCORE,
        classes=labels.classes,
        num_items=len(ours.queries),
        num_cases=len(np.unique(cases[ours.queries])),
        protocol={
            "gallery": f"the items of other cases than the query's; {len(table)} items in all",
            "similarity": "cosine",
            "queries_without_right_answer": [
                table.ids[row] for row in np.flatnonzero(~_with_answer(labels.targets, cases))
            ],
            "seeds": list(seeds),
            "num_bootstrap": num_bootstrap,
        },
    )


def rank_slides(features: np.ndarray, classes: np.ndarray, cases: np.ndarray) -> Answers:
    """Lets every item find the others.

    Args:
        features (`np.ndarray` of shape `(n, E)`, float): embeddings.
        classes (`np.ndarray` of shape `(n,)`, int), cases (`np.ndarray` of shape `(n,)`, int): of the items.

    Raises:
        ValueError: if no item has one of its class in another case.
    """
    vectors = unit_rows(features, "features")
    queries = np.flatnonzero(_with_answer(classes, cases))
    if not len(queries):
        raise ValueError("No class has items of two cases, so that no slide has a right answer to find.")
    parts = []
    for start in range(0, len(queries), _QUERIES_AT_ONCE):
        chunk = queries[start : start + _QUERIES_AT_ONCE]
        parts.append(_score_order(vectors[chunk] @ vectors.T, chunk, classes, cases))
    ranks = np.concatenate([ranks for ranks, _ in parts])
    values = {name: np.concatenate([part[name] for _, part in parts]) for name in parts[0][1]}
    return Answers(queries, ranks, values)


def _score_order(
    similarity: np.ndarray, queries: np.ndarray, classes: np.ndarray, cases: np.ndarray
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Similarities `(Q, n)` -> ranks of the first right slide, and a value per score and query."""
    is_other = cases[queries, None] != cases
    is_right = is_other & (classes[queries, None] == classes)
    # Last key first: items of the own case at the end, then by similarity, right ones last among equals.
    order = np.lexsort((is_right, -similarity, ~is_other), axis=-1)
    hits = np.take_along_axis(is_right, order, axis=-1)
    values = {f"acc@{k}": hits[:, :k].any(axis=1).astype(float) for k in ACCURACY_AT}
    gallery_sizes = is_other.sum(axis=1)
    nearest = np.where(np.arange(VOTE_OF) < gallery_sizes[:, None], classes[order[:, :VOTE_OF]], -1)
    values[MAIN_SCORE] = (_vote(nearest) == classes[queries]).astype(float)
    for k in PRECISION_AT:
        first = hits[:, :k]
        precision = first.cumsum(axis=1) / np.arange(1, first.shape[1] + 1)
        values[f"map@{k}"] = (precision * first).sum(axis=1) / np.minimum(k, hits.sum(axis=1))
    return hits.argmax(axis=1) + 1, values


def _vote(nearest: np.ndarray) -> np.ndarray:
    """The most frequent class of each row, the first of equally frequent ones; -1 has no vote."""
    votes = (nearest[:, :, None] == nearest[:, None, :]).sum(axis=2) * (nearest >= 0)
    return np.take_along_axis(nearest, votes.argmax(axis=1)[:, None], axis=1)[:, 0]


def slide_chance(classes: np.ndarray, cases: np.ndarray, *, seed: int) -> dict[str, float]:
    """Scores of a gallery in random order: expected ones, but for the vote, which is the mean over 20 orders.

    Args:
        classes (`np.ndarray` of shape `(n,)`, int), cases (`np.ndarray` of shape `(n,)`, int): of the items.
        seed (`int`): of the orders.
    """
    queries = np.flatnonzero(_with_answer(classes, cases))
    case_sizes = np.bincount(cases)[cases]
    pairs = np.stack([classes, cases])
    own_class_sizes = np.unique(pairs, axis=1, return_inverse=True, return_counts=True)[1:]
    num_right = (np.bincount(classes)[classes] - own_class_sizes[1][own_class_sizes[0].reshape(-1)])[queries, None]
    gallery_size = (len(classes) - case_sizes)[queries, None]
    places = np.arange(max(*ACCURACY_AT, *PRECISION_AT))
    # None right among the first k, drawn without replacement.
    missed = np.clip((gallery_size - num_right - places) / np.maximum(gallery_size - places, 1), 0, 1).cumprod(axis=1)
    # A place is right with probability R / G, and then each before it with (R - 1) / (G - 1).
    before = places * (num_right - 1) / np.maximum(gallery_size - 1, 1)
    precision = num_right / gallery_size * (1 + before) / (places + 1) * (places < gallery_size)
    scores = {f"acc@{k}": float((1 - missed[:, k - 1]).mean()) for k in ACCURACY_AT}
    scores[MAIN_SCORE] = _random_votes(queries, classes, cases, seed)
    for k in PRECISION_AT:
        scores[f"map@{k}"] = float((precision[:, :k].sum(axis=1) / np.minimum(k, num_right[:, 0])).mean())
    return scores


def _random_votes(queries: np.ndarray, classes: np.ndarray, cases: np.ndarray, seed: int) -> float:
    """How often the vote of random items of other cases is right."""
    random = np.random.default_rng(seed)
    right = 0
    for _ in range(_RANDOM_ORDERS):
        for start in range(0, len(queries), _QUERIES_AT_ONCE):
            chunk = queries[start : start + _QUERIES_AT_ONCE]
            keys = random.random((len(chunk), len(classes)), dtype=np.float32)
            keys[cases[chunk, None] == cases] = np.inf
            first = np.argpartition(keys, min(VOTE_OF, keys.shape[1] - 1), axis=1)[:, :VOTE_OF]
            chosen = np.take_along_axis(keys, first, axis=1)
            order = np.argsort(chosen, axis=1)
            first, chosen = (np.take_along_axis(values, order, axis=1) for values in (first, chosen))
            nearest = np.where(np.isfinite(chosen), classes[first], -1)
            right += int((_vote(nearest) == classes[chunk]).sum())
    return right / (_RANDOM_ORDERS * len(queries))


def _with_answer(classes: np.ndarray, cases: np.ndarray) -> np.ndarray:
    """Which items have one of their class in another case, bool `(n,)`."""
    pairs = np.unique(np.stack([classes, cases]), axis=1)
    several = [place for place, count in zip(*np.unique(pairs[0], return_counts=True), strict=True) if count > 1]
    return np.isin(classes, several)


def _row(
    name: str, answers: Answers, table: EmbeddingTable, labels: TaskLabels, num_bootstrap: int, is_null: bool
) -> MethodResult:
    items: list[dict[str, Any]] = [
        {"id": table.ids[row], "case_id": table.case_ids[row], "seed": 0, "fold": "all"}
        | {"truth": truth_of(labels, row), "prediction": int(rank)}
        for row, rank in zip(answers.queries.tolist(), answers.first_rank, strict=True)
    ]
    cases = [table.case_ids[row] for row in answers.queries]
    return query_row(name, answers.score, cases, predictions=items, num_bootstrap=num_bootstrap, is_null=is_null)
