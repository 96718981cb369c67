# SPDX-License-Identifier: Apache-2.0
"""Retrieval: how early a ranked gallery shows something relevant.

Letters: Q queries, G gallery items, E width.
"""

from collections.abc import Sequence

import datasets
import evaluate

from .rank_gallery import RECALL_AT, rank_queries, recall_scores

_CITATION = """\
Manning, Raghavan and Schuetze, "Introduction to Information Retrieval", chapter 8, Cambridge University Press, 2008.
"""


class RecallAtK(evaluate.Metric):
    """Share of queries with a relevant item among the first k, median rank of the first, mean average precision.

    `compute` takes `queries` `(Q, E)` and `query_groups` `(Q,)`, which may also be added batch by batch, and `gallery`
    `(G, E)` with `gallery_groups` `(G,)`. A gallery item is relevant to a query of the same group: the case, or the
    class. Similarity is the cosine; among equally similar items relevant ones come last. Option `k` ((1, 5, 10)).

    It returns `recall@<k>` for each k, `median_rank` (1 is best) and `mean_average_precision`.

    Example:

    ```python
    metric = RecallAtK()
    metric.compute(queries=slides, query_groups=cases, gallery=reports, gallery_groups=report_cases)["recall@1"]
    ```
    """

    def _info(self) -> evaluate.MetricInfo:
        features = {"queries": datasets.List(datasets.Value("float32")), "query_groups": datasets.Value("string")}
        return evaluate.MetricInfo(
            description=(type(self).__doc__ or "").partition("\n")[0],
            citation=_CITATION,
            inputs_description=type(self).__doc__ or "",
            features=datasets.Features(features),
            reference_urls=[
                "https://nlp.stanford.edu/IR-book/html/htmledition/evaluation-in-information-retrieval-1.html"
            ],
        )

    def _compute(
        self,
        queries: Sequence[Sequence[float]],
        query_groups: Sequence[str],
        gallery: Sequence[Sequence[float]],
        gallery_groups: Sequence[str],
        k: Sequence[int] = RECALL_AT,
    ) -> dict[str, float]:
        ranks, precisions, _ = rank_queries(queries, query_groups, gallery, gallery_groups)
        return recall_scores(ranks, precisions, k)
