# SPDX-License-Identifier: Apache-2.0
"""Tasks in which stored slide projections are compared with text, by the model that made them."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from transformers import AutoModel, AutoTokenizer, PreTrainedModel

import modeling_dre_slcl  # noqa: F401 - registers the model with the Auto classes
from modeling_dre_slcl.text_embeddings import TextEmbeddings

from ..manifest import ALIASES
from ..manifest_table import read_table, text_column
from ..search_index import EmbeddingIndex
from .embedding_table import COLUMN_SEPARATOR, EmbeddingTable, read_embeddings, slide_name
from .fold_files import match_folds, read_fold_files
from .report_retrieval import Pairs, distinct_reports, evaluate_report_retrieval
from .task_result import TaskResult

REPORT_COLUMNS = ("report", "text")


def load_text_model(name: str, device: str | None = None) -> tuple[PreTrainedModel, Any]:
    """Loads a model that ships with its text model, and its tokenizer; code that a repository carries is not run.

    Args:
        name (`str`): folder or Hub repository.
        device (`str`, *optional*): for example "cuda:0"; default: the CPU.

    Raises:
        ValueError: if it ships without a text model.
    """
    model = AutoModel.from_pretrained(name, trust_remote_code=False).to(device or "cpu").eval()
    if getattr(model, "text_encoder", None) is None:
        raise ValueError(f"{name}: ships without a text model, so text cannot be compared with slides.")
    return model, AutoTokenizer.from_pretrained(name, trust_remote_code=False)


def read_projections(source: str, name: str, model: str) -> EmbeddingTable:
    """Reads vectors in the joint space: column `slide_projection`, if the source names no other.

    Args:
        source (`str`), name (`str`): as for `read_embeddings`.
        model (`str`): the model that texts will be encoded with.

    Raises:
        ValueError: if slides were embedded with other weights than the model's, where that can be told.
    """
    path, _, column = source.partition(COLUMN_SEPARATOR)
    if (Path(path) / "embed.json").is_file():
        EmbeddingIndex.open(path).check_model(model)
    return read_embeddings(f"{path}{COLUMN_SEPARATOR}{column or 'slide_projection'}", name=name)


def read_reports(path: str | Path) -> dict[str, str]:
    """Reads reports: a manifest, or any table with `slide_id` or `case_id` and a column `report` or `text`.

    Args:
        path (`str` or `Path`): a .csv, .tsv or .parquet file.

    Returns:
        `dict`: slide or case -> report; empty ones are left out.

    Raises:
        ValueError: if a column is missing, or a slide or case has two reports.
    """
    table = read_table(Path(path))
    key = next((name for kind in ("slide_id", "case_id") for name in table if name in ALIASES[kind]), None)
    column = next((name for name in REPORT_COLUMNS if name in table), None)
    if key is None or column is None:
        raise ValueError(f"{path}: has columns {list(table)[:20]}; expected `slide_id` or `case_id`, and `report`.")
    reports: dict[str, str] = {}
    for id_, report in zip(text_column(key, table[key]), text_column(column, table[column]), strict=True):
        if report and reports.setdefault(slide_name(id_), report) != report:
            raise ValueError(f"{path}: {id_} has two reports; join them, or leave one out.")
    return reports


def evaluate_reports(
    table: EmbeddingTable,
    reports: dict[str, str],
    model: PreTrainedModel,
    tokenizer: Any,
    *,
    fold_files: Sequence[str] = (),
    seeds: Sequence[int] = (0, 1, 2),
    num_bootstrap: int = 1000,
) -> list[TaskResult]:
    """Evaluates retrieval between slides and reports, both ways.

    Args:
        table (`EmbeddingTable`): slide projections; their cases are known.
        reports (`dict`): slide or case -> report.
        model (`DreSlclModel`), tokenizer: they bring reports to the joint space.
        fold_files (sequence of `str`): if given, only slides in a test part of them are asked and found.
        seeds (sequence of `int`), num_bootstrap (`int`): as for `evaluate_report_retrieval`.

    Raises:
        ValueError: if fewer than two slides have a report.
    """
    rows = list(range(len(table)))
    if fold_files:
        folds, _ = match_folds(read_fold_files(fold_files), table)
        rows = sorted({int(row) for fold in folds for row in fold.test})
    texts = {row: reports.get(table.ids[row]) or reports.get(table.case_ids[row], "") for row in rows}
    kept = [row for row in rows if texts[row].strip()]
    if len(kept) < 2:
        raise ValueError(f"{len(kept)} of {len(rows)} slides have a report; compare the ids of both files.")
    items, found = table.take(kept), [texts[row] for row in kept]
    projection = TextEmbeddings(model, tokenizer).embed(distinct_reports(found)).numpy()
    pairs = {table.name: Pairs(items.features, projection)}
    options = {"seeds": seeds, "num_bootstrap": num_bootstrap}
    without = [
        {"id": table.ids[row], "reason": "no_label", "message": "has no report"}
        for row in rows
        if row not in set(kept)
    ]
    results = evaluate_report_retrieval(items.ids, items.case_ids, found, pairs, **options)
    return [
        replace(result, protocol={**result.protocol, "left_out": [*table.left_out, *without]}) for result in results
    ]
