# SPDX-License-Identifier: Apache-2.0
"""Results as one HTML page: pictures, tables, and how they were found."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..html_report import Block, Paragraph, Picture, PictureRow, Section, Table, write_html_report
from .result_files import result_table
from .score_titles import score_names, score_text, score_title
from .task_result import TaskResult

_INTERVALS = (
    "Brackets: 95% intervals over samples of whole cases. They say how a score varies with the choice of cases, not "
    "with another cohort; with few cases they are too narrow. Null rows show what is reached without the embeddings' "
    "own merit; chance says the same of every item."
)
# What the protocol holds that no reader of the page needs: results.json has it.
_NOT_SHOWN = ("left_out", "balance")


def write_page(out_html: Path, results: Sequence[TaskResult], pictures: Sequence[Sequence[tuple[Path, str]]]) -> Path:
    """Writes the page.

    Args:
        out_html (`Path`): the file.
        results (sequence of `TaskResult`): what was found.
        pictures (sequence of sequences of `tuple`): of each task, picture and caption, see `draw_result`.
    """
    sections = [
        Section(result.task, _blocks(result, list(drawn))) for result, drawn in zip(results, pictures, strict=True)
    ]
    summary = "\n\n".join(headline(result) for result in results)
    return write_html_report(out_html, title="Evaluation", summary=summary, sections=sections)


def headline(result: TaskResult) -> str:
    """One sentence: what the first method reaches, and what is reached without the embeddings.

    Args:
        result (`TaskResult`): the task.
    """
    metric = result.main_metric
    title = score_title(metric, result)
    ours = [row for row in result.rows if not row.is_null and metric in row.scores]
    if not ours:
        return f"{result.task}: no row has a score."
    first = ours[0]
    null = [row for row in result.rows if row.is_null and metric in row.scores]
    null = [row for row in null if row.method in (first.method, "chance")]
    beside = ", ".join(f"{row.encoder} {score_text(row.scores[metric], with_interval=False)}" for row in null)
    text = f"{result.task}: {first.method} on {first.encoder} reaches {title} {score_text(first.scores[metric])}"
    return f"{text}; beside it {beside}." if beside else f"{text}."


def _blocks(result: TaskResult, drawn: list[tuple[Path, str]]) -> list[Block]:
    counts = f"{result.kind}; {result.num_items} held-out items of {result.num_cases} cases."
    blocks: list[Block] = [Paragraph(counts)]
    shown = [Picture(path, caption) for path, caption in drawn]
    # Wide pictures stand alone, the others in pairs.
    wide = [picture for picture in shown if Path(picture.path).stem.endswith(("-methods", "-few_shot"))]
    narrow = [picture for picture in shown if picture not in wide]
    blocks += wide
    blocks += [PictureRow(narrow[place : place + 2]) for place in range(0, len(narrow), 2)]
    header, rows = result_table(result)
    blocks.append(Table(header, rows, caption=_INTERVALS))
    if score_names(result, detailed=True):
        header, rows = result_table(result, detailed=True)
        blocks.append(Table(header, rows, caption="Scores of single classes or labels."))
    if differences := _differences(result):
        columns = ["method", "compared with", f"difference of {score_title(result.main_metric, result)}", "p"]
        caption = "Differences on the same samples of cases; p is two-sided, and not corrected for many comparisons."
        blocks.append(Table(columns, differences, caption=caption))
    blocks.append(Table(["protocol", ""], [[name, text] for name, text in _facts(result.protocol)]))
    return blocks


def _differences(result: TaskResult) -> list[list[str]]:
    rows = []
    for row in result.rows:
        for encoder, scores in row.settings.get("differences", {}).items():
            if found := scores.get(result.main_metric):
                low, high = found["interval"]
                gap = f"{found['difference']:+.3f} [{low:+.3f}, {high:+.3f}]"
                rows.append([row.method, encoder, gap, f"{found['p_value']:.3f}"])
    return rows


def _facts(protocol: dict[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """The protocol as text."""
    facts = []
    for name, value in protocol.items():
        title = f"{prefix}{name.replace('_', ' ')}"
        if name in _NOT_SHOWN or value in (None, [], {}):
            continue
        if isinstance(value, dict):
            facts += _facts(value, f"{title}: ")
        elif isinstance(value, list):
            texts = [" ".join(map(str, item.values())) if isinstance(item, dict) else str(item) for item in value]
            facts.append((title, ", ".join(texts[:20]) + (" …" if len(texts) > 20 else "")))
        else:
            facts.append((title, str(value)))
    return facts
