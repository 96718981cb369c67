# SPDX-License-Identifier: Apache-2.0
"""Results as files: JSON, CSV, Markdown, an HTML page with pictures, and predictions as Parquet.

| file | content |
| --- | --- |
| results.json | list of `TaskResult.to_dict()`; written last |
| results.csv | a row per task, method, embeddings and score |
| results.md | a table per task |
| predictions.parquet | a row per held-out item, method, embeddings and seed |
| report.html | everything in one page, pictures inside |
| figures/ | the pictures alone, PNG |
"""

import csv
import io
import json
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from modeling_dre_slcl.atomic_files import atomic_file, atomic_folder, write_json, write_text

from .score_titles import score_names, score_text, score_title
from .task_result import TaskResult

_PREDICTIONS = pa.schema(
    [
        *((name, pa.string()) for name in ("task", "method", "encoder")),
        ("is_null", pa.bool_()),
        *((name, pa.string()) for name in ("id", "case_id")),
        ("seed", pa.int64()),
        *((name, pa.string()) for name in ("fold", "truth")),  # truth as JSON: its kind is that of the task
        ("prediction", pa.list_(pa.float64())),
    ]
)
_EXPLANATION = """\
Brackets: 95% intervals over samples of whole cases. They say how a score varies with the choice of cases, not with
another cohort; with few cases they are too narrow. Null rows show what is reached without the embeddings' own merit;
chance says the same of every item.
"""


def write_results(out: Path, results: Sequence[TaskResult]) -> None:
    """Writes results, each file atomically, `results.json` last.

    Args:
        out (`Path`): the folder; files of an earlier evaluation in it are replaced.
        results (sequence of `TaskResult`): what was found.

    Raises:
        OSError: if the folder cannot be written.
    """
    from .result_figures import draw_result  # matplotlib, which takes a moment
    from .result_page import write_page

    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    pictures = []
    with atomic_folder(out / "figures") as folder:
        for place, result in enumerate(results):
            others = [other.task for other in results[:place]]
            stem = result.task if result.task not in others else f"{result.task}-{place}"
            pictures.append([(path.name, caption) for path, caption in draw_result(result, folder, stem)])
    write_page(
        out / "report.html", results, [[(out / "figures" / name, text) for name, text in of] for of in pictures]
    )
    _write_predictions(out / "predictions.parquet", results)
    write_text(out / "results.csv", _results_csv(results))
    write_text(out / "results.md", results_markdown(results))
    write_json(out / "results.json", [result.to_dict() for result in results])


def results_markdown(results: Sequence[TaskResult]) -> str:
    """A table for each task, see `result_table`; scores of classes or labels are in a second table.

    Args:
        results (sequence of `TaskResult`): what was found.
    """
    parts = []
    for result in results:
        counts = f"{result.num_items} held-out items of {result.num_cases} cases"
        parts.append(f"## {result.task}\n\n{result.kind}; {counts}.\n\n{_markdown_table(result, detailed=False)}\n")
        if score_names(result, detailed=True):
            parts.append(f"{_markdown_table(result, detailed=True)}\n")
    return "\n".join([*parts, _EXPLANATION])


def result_table(result: TaskResult, *, detailed: bool = False) -> tuple[list[str], list[list[str]]]:
    """Header and rows of a task's table, as text; the rows of a method together, null rows say so.

    Args:
        result (`TaskResult`): the task.
        detailed (`bool`, defaults to `False`): scores of single classes or labels, rather than the others.
    """
    names = score_names(result, detailed=detailed)
    header = ["method", "embeddings", *(score_title(name, result) for name in names)]
    methods = list(dict.fromkeys(row.method for row in result.rows))
    rows = []
    for row in sorted(result.rows, key=lambda row: methods.index(row.method)):
        if any(name in row.scores for name in names):
            encoder = f"{row.encoder} (null)" if row.is_null else row.encoder
            rows.append([row.method, encoder, *(score_text(row.scores.get(name)) for name in names)])
    return header, rows


def _markdown_table(result: TaskResult, *, detailed: bool) -> str:
    header, rows = result_table(result, detailed=detailed)
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |" for cells in lines)


def _results_csv(results: Sequence[TaskResult]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["task", "kind", "method", "embeddings", "is_null", "score", "value", "low", "high", "by_seed"])
    for result in results:
        for row in result.rows:
            for name, score in row.scores.items():
                low, high = score.interval or ("", "")
                seeds = " ".join(map(repr, score.by_seed))
                start = [result.task, result.kind, row.method, row.encoder, row.is_null, name]
                writer.writerow([*start, score.value, low, high, seeds])
    return text.getvalue()


def _write_predictions(path: Path, results: Sequence[TaskResult]) -> None:
    columns: dict[str, list] = {name: [] for name in _PREDICTIONS.names}
    for result in results:
        for row in result.rows:
            for item in row.predictions:
                known = {"task": result.task, "method": row.method, "encoder": row.encoder, "is_null": row.is_null}
                prediction = item["prediction"] if isinstance(item["prediction"], list) else [item["prediction"]]
                known |= {**item, "truth": json.dumps(item["truth"]), "prediction": prediction}
                for name, cells in columns.items():
                    cells.append(known.get(name))
    with atomic_file(path) as temporary:
        pq.write_table(pa.table(columns, schema=_PREDICTIONS), temporary)
