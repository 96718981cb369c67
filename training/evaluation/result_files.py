# SPDX-License-Identifier: Apache-2.0
"""Results as files: JSON, CSV, Markdown, and predictions as Parquet."""

import csv
import io
import json
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from modeling_dre_slcl.atomic_files import atomic_file, write_json, write_text

from .task_result import Score, TaskResult


def write_results(out: Path, results: Sequence[TaskResult]) -> None:
    """Writes `results.json`, `results.csv`, `results.md` and `predictions.parquet`.

    Args:
        out (`Path`): the folder.
        results (sequence of `TaskResult`): what was found.
    """
    out.mkdir(parents=True, exist_ok=True)
    _write_predictions(out / "predictions.parquet", results)
    write_text(out / "results.csv", _results_csv(results))
    write_text(out / "results.md", results_markdown(results))
    write_json(out / "results.json", [result.to_dict() for result in results])


def results_markdown(results: Sequence[TaskResult]) -> str:
    """A table for each task, rows as they are, one column per score.

    Args:
        results (sequence of `TaskResult`): what was found.
    """
    parts = []
    for result in results:
        names = [name for name in dict.fromkeys(n for row in result.rows for n in row.scores) if "/" not in name]
        lines = [("method", "embeddings", *names), ("---",) * (2 + len(names))]
        lines += [(row.method, row.encoder, *(_cell(row.scores.get(name)) for name in names)) for row in result.rows]
        table = "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
        counts = f"{result.num_items} held-out items of {result.num_cases} cases"
        parts.append(f"## {result.task}\n\n{result.kind}; {counts}.\n\n{table}\n")
    return "\n".join(parts)


def _cell(score: Score | None) -> str:
    if score is None:
        return "-"
    bounds = f" [{score.interval[0]:.3f}, {score.interval[1]:.3f}]" if score.interval else ""
    return f"{score.value:.3f}{bounds}"


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
    columns: dict[str, list] = {
        name: [] for name in ("task", "method", "encoder", "id", "case_id", "seed", "fold", "truth", "prediction")
    }
    for result in results:
        for row in result.rows:
            for item in row.predictions:
                known = {"task": result.task, "method": row.method, "encoder": row.encoder, **item}
                known["truth"] = json.dumps(item["truth"])
                prediction = item["prediction"]
                known["prediction"] = prediction if isinstance(prediction, list) else [prediction]
                for name, cells in columns.items():
                    cells.append(known[name])
    with atomic_file(path) as temporary:
        pq.write_table(pa.table(columns), temporary)
