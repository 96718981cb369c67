# SPDX-License-Identifier: Apache-2.0
"""Slides find their reports, and reports their slides, by cosine in the joint space.

Scores: `recall@k`, the share of queries with a right answer among the first k; `mean_average_precision`;
`median_rank` of the first right answer. A report is right for the slides of its case, and of other cases with the same
report; each distinct report is in the gallery once.

Letters: n slides, U distinct reports, E joint width.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from transformers import PreTrainedModel

from modeling_dre_slcl.text_embeddings import TextEmbeddings

from ..evaluation_tasks import group_slides
from ..metrics.recall_at_k.rank_gallery import rank_queries, recall_scores
from .retrieval_chance import retrieval_chance
from .retrieval_rows import chance_row_of, mean_row, query_row
from .scores import MAIN_METRIC
from .task_result import MethodResult, TaskResult

SHUFFLED = "shuffled reports"
DIRECTIONS = ("slide_to_report", "report_to_slide")


@dataclass(frozen=True, eq=False)
class Pairs:
    """Slides and reports of one encoder in the joint space.

    Args:
        slide_projection (`np.ndarray` of shape `(n, E)`, float): of the slides.
        report_projection (`np.ndarray` of shape `(U, E)`, float): of the distinct reports, see `distinct_reports`.
    """

    slide_projection: np.ndarray
    report_projection: np.ndarray


def distinct_reports(reports: Sequence[str]) -> list[str]:
    """Each report once, in the order of first appearance.

    Args:
        reports (sequence of `str`): the report of each slide.
    """
    return list(dict.fromkeys(reports))


def project_reports(model: PreTrainedModel, tokenizer: Any, reports: Sequence[str]) -> np.ndarray:
    """Brings reports to the joint space by a model's own text encoder, `(len(reports), E)`, float32.

    Args:
        model (`DreSlclModel`): with a text model inside.
        tokenizer (`PreTrainedTokenizerBase` or `DreSlclProcessor`): its tokenizer.
        reports (sequence of `str`): not empty.

    Raises:
        ValueError: if no text model ships with the model, or a report is empty.
    """
    return TextEmbeddings(model, tokenizer).embed(reports).numpy()


def evaluate_report_retrieval(
    ids: Sequence[str],
    case_ids: Sequence[str],
    reports: Sequence[str],
    encoders: Mapping[str, Pairs],
    *,
    null_encoders: Sequence[str] = (),
    seeds: Sequence[int] = (0, 1, 2),
    num_bootstrap: int = 1000,
) -> list[TaskResult]:
    """Evaluates retrieval in both directions.

    Args:
        ids (sequence of `str`), case_ids (sequence of `str`), reports (sequence of `str`): of each slide.
        encoders (mapping): name of a row -> `Pairs`; the one evaluated first.
        null_encoders (sequence of `str`): those of them without merit of their own, such as random weights.
        seeds (sequence of `int`): of shuffled reports.
        num_bootstrap (`int`, defaults to 1000): samples of whole groups of cases for intervals.

    Returns:
        `list` of `TaskResult`: `slide_to_report`, `report_to_slide`; predictions are ranks of the first right answer.

    Raises:
        ValueError: if a report is empty, there are fewer than two groups, or projections are too many or too few.
    """
    empty = [id_ for id_, report in zip(ids, reports, strict=True) if not report.strip()]
    if empty:
        raise ValueError(f"{len(empty)} slides have no report, such as {empty[0]}; leave them out.")
    groups = group_slides(case_ids, reports)
    if len(set(groups)) < 2:
        raise ValueError("Retrieval needs slides with at least two different reports.")
    texts = distinct_reports(reports)
    for name, pairs in encoders.items():
        found = (len(pairs.slide_projection), len(pairs.report_projection))
        if found != (len(ids), len(texts)):
            raise ValueError(
                f"{name}: expected projections of {len(ids)} slides and {len(texts)} distinct reports, found "
                f"{found[0]} and {found[1]}."
            )
    group_of = dict(zip(reports, groups, strict=True))
    report_groups = [group_of[text] for text in texts]
    report_ids = [f"report of {group}" for group in report_groups]
    results = []
    for direction in DIRECTIONS:
        rows = []
        for name, pairs in encoders.items():
            ranked, (query_ids, query_groups) = _rank(direction, pairs, ids, groups, report_ids, report_groups)
            rows.append(_row(name, ranked, query_ids, query_groups, num_bootstrap, name in null_encoders))
        first = next(iter(encoders.values()))
        dealt = []
        for seed in seeds:
            order = np.random.default_rng(seed).permutation(len(texts))
            shuffled = Pairs(first.slide_projection, first.report_projection[order])
            ranks, precisions, _ = _rank(direction, shuffled, ids, groups, report_ids, report_groups)[0]
            dealt.append(recall_scores(ranks, precisions))
        gallery_size = len(texts) if direction == "slide_to_report" else len(ids)
        rows += [mean_row(SHUFFLED, dealt), chance_row_of(retrieval_chance(ranked[2], gallery_size))]
        results.append(
            TaskResult(
                task=direction,
                kind="retrieval",
                rows=rows,
                main_metric=MAIN_METRIC["retrieval"],
                num_items=len(query_ids),
                num_cases=len(set(query_groups)),
                protocol={
                    "gallery": f"{gallery_size} {'distinct reports' if direction == DIRECTIONS[0] else 'slides'}",
                    "similarity": "cosine",
                    "seeds": list(seeds),
                    "num_bootstrap": num_bootstrap,
                },
            )
        )
    return results


def _rank(
    direction: str,
    pairs: Pairs,
    ids: Sequence[str],
    groups: Sequence[str],
    report_ids: Sequence[str],
    report_groups: Sequence[str],
) -> tuple[tuple[np.ndarray, np.ndarray, np.ndarray], tuple[Sequence[str], Sequence[str]]]:
    """What `rank_queries` gives in a direction, and the queries' ids and groups."""
    slides, texts = (pairs.slide_projection, groups), (pairs.report_projection, report_groups)
    if direction == "slide_to_report":
        return rank_queries(*slides, *texts), (ids, groups)
    return rank_queries(*texts, *slides), (report_ids, report_groups)


def _row(
    name: str,
    ranked: tuple[np.ndarray, np.ndarray, np.ndarray],
    query_ids: Sequence[str],
    query_groups: Sequence[str],
    num_bootstrap: int,
    is_null: bool,
) -> MethodResult:
    ranks, precisions, _ = ranked
    items = [
        {"id": id_, "case_id": group, "seed": 0, "fold": "all", "truth": group, "prediction": int(rank)}
        for id_, group, rank in zip(query_ids, query_groups, ranks, strict=True)
    ]
    return query_row(
        name,
        lambda sample: recall_scores(ranks[sample], precisions[sample]),
        query_groups,
        predictions=items,
        num_bootstrap=num_bootstrap,
        is_null=is_null,
    )
