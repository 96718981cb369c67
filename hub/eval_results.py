# SPDX-License-Identifier: Apache-2.0
"""Results of `dre-slcl evaluate` -> a model's card: `model-index`, `.eval_results/*.yaml`, and a table to read.

`model-index` stands in the front matter of README.md (huggingface_hub: `EvalResult`), an entry for each task; the
newer `.eval_results/<task>.yaml` holds an entry for each method (`EvalResultEntry`), which the Hub shows on the page
of the model and on the leaderboard of the dataset. What stood there of the same task is replaced, all else is kept.

Source of the formats: https://huggingface.co/docs/hub/eval-results and https://huggingface.co/docs/hub/model-cards.
"""

import logging
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, EvalResultEntry, ModelCard, eval_result_entries_to_yaml

from modeling_dre_slcl.atomic_files import read_json, write_text

from .check_export import RESULTS_FOLDER
from .gather import PublishError
from .model_card import NOT_STATED

logger = logging.getLogger(__name__)
_TASK_TYPES = {"classification": "image-classification", "multilabel": "image-classification"}
_OTHER_TASK_TYPE = "image-feature-extraction"
_SECTION_END = re.compile(r"<!-- end of [\w.-]+ -->")
_NOTHING_YET = f"Metrics: {NOT_STATED}."  # what `build_model_card` writes where results belong
_NOT_IN_NAMES = re.compile(r"[^A-Za-z0-9_.-]+")


def read_results(path: str | Path) -> list[dict[str, Any]]:
    """Reads the file of results.

    Args:
        path (`str` or `Path`): `results.json`, or the folder that holds it.

    Raises:
        PublishError: if it is not what `dre-slcl evaluate` writes.
    """
    path = Path(path) / "results.json" if Path(path).is_dir() else Path(path)
    results = read_json(path)
    needed = {"task", "kind", "rows", "main_metric"}
    if not isinstance(results, list) or not all(isinstance(one, dict) and needed <= set(one) for one in results):
        raise PublishError(f"{path}: expected the results.json that `dre-slcl evaluate --embeddings` writes")
    return results


def add_results(folder: str | Path, results: Sequence[Mapping[str, Any]], *, dataset: str | None, name: str) -> None:
    """Writes results into the card of a model's folder.

    Args:
        folder (`str` or `Path`): with README.md, the card; without one, a card with the results alone is begun.
        results (sequence of mapping): see `read_results`.
        dataset (`str`, *optional*): Hub id of the dataset that was evaluated on; without it there are no
            `.eval_results`, which name it.
        name (`str`): the model's name, for `model-index` where the card has none.

    Raises:
        PublishError: if the card cannot be read.
    """
    folder = Path(folder)
    card = _read_card(folder / "README.md")
    shown = [result for result in results if _own_rows(result)]
    fresh = [entry for result in shown for entry in _index_entries(result, dataset)]
    replaced = {(entry.dataset_type, entry.dataset_config) for entry in fresh}
    kept = [old for old in card.data.eval_results or [] if (old.dataset_type, old.dataset_config) not in replaced]
    card.data.model_name = card.data.model_name or name
    card.data.eval_results = [*kept, *fresh] or None
    text = str(card)
    for result in shown:
        text = _with_section(text, result, dataset)
    write_text(folder / "README.md", text)
    if dataset is None:
        logger.warning("No dataset is named that results are of, so there is no %s beside the card.", RESULTS_FOLDER)
    else:
        for result in shown:
            entries = eval_result_entries_to_yaml(_benchmark_entries(result, dataset))
            content = yaml.safe_dump(entries, sort_keys=False, allow_unicode=True)
            write_text(folder / RESULTS_FOLDER / f"{_slug(result['task'])}.yaml", content)


def _read_card(path: Path) -> ModelCard:
    if not path.is_file():
        return ModelCard("---\nlibrary_name: transformers\n---\n")
    try:
        return ModelCard.load(path)
    except (ValueError, yaml.YAMLError) as error:
        raise PublishError(f"{path}: its metadata cannot be read ({str(error).splitlines()[0]})") from error


def _own_rows(result: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The rows of the embeddings that were evaluated: not those of peers, nor null rows."""
    rows = [row for row in result["rows"] if not row["is_null"] and result["main_metric"] in row["scores"]]
    return [row for row in rows if row["encoder"] == rows[0]["encoder"]]


def _index_entries(result: Mapping[str, Any], dataset: str | None) -> list[EvalResult]:
    """All scores of the first method, and the main one of the others."""
    entries = []
    for place, row in enumerate(_own_rows(result)):
        for metric, score in row["scores"].items():
            if metric == result["main_metric"] or (place == 0 and "/" not in metric):
                entries.append(
                    EvalResult(
                        task_type=_TASK_TYPES.get(result["kind"], _OTHER_TASK_TYPE),
                        task_name=result["task"],
                        dataset_type=dataset or NOT_STATED,
                        dataset_name=dataset or NOT_STATED,
                        # Results of one dataset with the same configuration are one task to the Hub's parser.
                        dataset_config=result["task"],
                        metric_type=metric,
                        metric_name=f"{metric} ({row['method']})",
                        metric_value=score["value"],
                    )
                )
    return entries


def _benchmark_entries(result: Mapping[str, Any], dataset: str) -> list[EvalResultEntry]:
    metric = result["main_metric"]
    return [
        EvalResultEntry(
            dataset_id=dataset,
            task_id=f"{_slug(result['task'])}_{row['method']}",
            value=row["scores"][metric]["value"],
            notes=_notes(result, row),
        )
        for row in _own_rows(result)
    ]


def _notes(result: Mapping[str, Any], row: Mapping[str, Any]) -> str:
    """What the value is, in one line: metric, interval, null rows, items."""
    metric = result["main_metric"]
    parts = [f"{row['method']}, {metric}"]
    if interval := row["scores"][metric].get("interval"):
        parts.append(f"95% interval over cases {interval[0]:.3f} to {interval[1]:.3f}")
    beside = [null for null in result["rows"] if null["is_null"] and null["method"] in (row["method"], "chance")]
    parts += [
        f"{null['encoder']} {null['scores'][metric]['value']:.3f}" for null in beside if metric in null["scores"]
    ]
    return "; ".join([*parts, f"{result.get('num_items')} items of {result.get('num_cases')} cases"])


def _with_section(text: str, result: Mapping[str, Any], dataset: str | None) -> str:
    """The card with a table of the task, in the place of an earlier one."""
    # An HTML comment must not hold two hyphens in a row.
    slug = _slug(result["task"]).replace("--", "-")
    first, last = f"<!-- results of {slug} -->", f"<!-- end of {slug} -->"
    metric = result["main_metric"]
    counts = f"{result.get('num_items')} held-out items of {result.get('num_cases')} cases"
    lines = [
        first,
        f"### {result['task']}",
        "",
        f"{result['kind']} on {dataset or NOT_STATED}; {counts}.",
        "",
        f"| method | embeddings | {metric} (95% interval over cases) |",
        "| --- | --- | --- |",
    ]
    for row in result["rows"]:
        if score := row["scores"].get(metric):
            interval = f" ({score['interval'][0]:.3f} to {score['interval'][1]:.3f})" if score.get("interval") else ""
            null = ", null row" if row["is_null"] else ""
            lines.append(f"| {row['method']} | {row['encoder']}{null} | {score['value']:.3f}{interval} |")
    section = "\n".join([*lines, last])
    if first in text and last in text:
        before, _, rest = text.partition(first)
        return before + section + rest.partition(last)[2]
    if ends := list(_SECTION_END.finditer(text)):
        return f"{text[: ends[-1].end()]}\n\n{section}{text[ends[-1].end() :]}"
    if _NOTHING_YET in text:
        return text.replace(_NOTHING_YET, section, 1)
    return f"{text.rstrip()}\n\n## Results\n\n{section}\n"


def _slug(text: str) -> str:
    return _NOT_IN_NAMES.sub("_", text).strip("_.-") or "task"
