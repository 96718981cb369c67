# SPDX-License-Identifier: Apache-2.0
"""What an embedding run did and where its time went: `summary.json`, and `summary.md` for people."""

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from modeling_dre_slcl.atomic_files import write_json, write_text

from .embed_files import EmbedRecord

SUMMARY_NAME = "summary.json"
# Steps, and what their time is counted over.
_STEPS = {
    "open": "opening slides, all readers",
    "mask": "finding tissue, all readers",
    "read": "reading tiles, all readers",
    "encode": "encoding tiles and summing, all devices",
    "write": "writing files",
    "wait": "devices without a batch",
}


def make_summary(
    records: Sequence[EmbedRecord], seconds: Mapping[str, float], *, total_seconds: float, num_processes: int
) -> dict[str, Any]:
    """Returns the summary of a run.

    Args:
        records (`Sequence[EmbedRecord]`): what became of each slide.
        seconds (`Mapping[str, float]`): time of each step.
        total_seconds (`float`): of the run.
        num_processes (`int`): processes with a device each.
    """
    refused = Counter(record.reason for record in records if record.status != "ok")
    num_tiles = sum(record.num_tiles for record in records)
    num_new = sum(record.num_tiles > 0 for record in records)
    total = max(total_seconds, 1e-9)
    return {
        "num_slides": len(records),
        "num_embedded": len(records) - refused.total(),
        "num_embedded_before": len(records) - refused.total() - num_new,
        "num_refused": refused.total(),
        "refused_by_reason": dict(sorted(refused.items())),
        "num_tiles_encoded": num_tiles,
        "num_processes": num_processes,
        "total_seconds": round(total_seconds, 3),
        "slides_per_second": round(num_new / total, 4),
        "tiles_per_second": round(num_tiles / total, 2),
        "seconds": {name: round(float(seconds.get(name, 0.0)), 3) for name in _STEPS},
    }


def write_summary(out: Path, summary: Mapping[str, Any]) -> None:
    """Writes both files."""
    write_json(out / SUMMARY_NAME, dict(summary))
    headline = (
        f"{summary['num_embedded']} of {summary['num_slides']} slides embedded ({summary['num_embedded_before']} of "
        f"them before), {summary['num_refused']} refused; {summary['num_tiles_encoded']} tiles in "
        f"{summary['total_seconds']:.1f} s: {summary['slides_per_second']:.2f} slides/s, "
        f"{summary['tiles_per_second']:.1f} tiles/s."
    )
    lines = [
        "# Embedding run",
        "",
        headline,
        "",
        "| step | seconds | of |",
        "| --- | ---: | --- |",
        *(f"| {name} | {summary['seconds'][name]:.1f} | {text} |" for name, text in _STEPS.items()),
    ]
    if summary["refused_by_reason"]:
        lines += ["", "| refused because | slides |", "| --- | ---: |"]
        lines += [f"| {reason} | {count} |" for reason, count in summary["refused_by_reason"].items()]
    write_text(out / "summary.md", "\n".join(lines) + "\n")
