# SPDX-License-Identifier: Apache-2.0
"""What a build reports: counts, refusals, times, versions."""

import json
import platform
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from importlib import metadata
from typing import Any

from .dataset_writer import SlideEntry, count_tiles, group_by_split
from .slide_part import STAGES

_COUNTS = ("num_slides", "num_ok", "num_refused", "num_reused", "num_tiles", "num_copied")
_PACKAGES = ("dre-slcl", "openslide-python", "openslide-bin", "opencv-python-headless", "pyarrow", "datasets", "numpy")


@dataclass(frozen=True)
class BuildSummary:
    """Outcome of a build.

    Attributes:
        num_slides (`int`): slides in the manifest.
        num_ok (`int`): slides with tiles.
        num_refused (`int`): slides refused.
        num_reused (`int`): slides whose tiles were taken over without reading the slide.
        num_tiles (`int`): tiles of all slides.
        num_copied (`int`): those of them that are the slides' own compressed tiles.
        refused_by_reason (`dict[str, int]`): refused slides per reason code.
        slides_per_split (`dict[str, int]`): usable slides per split.
        tiles_per_split (`dict[str, int]`): tiles per split.
        seconds (`dict[str, float]`): wall time: open, mask, read and write summed over the slides read for this
            dataset, tiling, merge and total by the clock.
        cpu_seconds (`dict[str, float]`): processor time of open, mask, read, write and merge.
        slides_per_second (`float`), tiles_per_second (`float`): slides and tiles read in this run over `tiling`.
        is_up_to_date (`bool`): whether nothing had to be done.
        is_strict_failure (`bool`): whether no dataset was written because of refused slides.
    """

    num_slides: int
    num_ok: int
    num_refused: int
    num_reused: int
    num_tiles: int
    num_copied: int
    refused_by_reason: dict[str, int]
    slides_per_split: dict[str, int]
    tiles_per_split: dict[str, int]
    seconds: dict[str, float]
    cpu_seconds: dict[str, float]
    slides_per_second: float
    tiles_per_second: float
    is_up_to_date: bool = False
    is_strict_failure: bool = False

    @property
    def exit_code(self) -> int:
        """0 if every slide was tiled, 3 if some were refused, 1 if none could be used, 4 if strictness forbade it."""
        if self.is_strict_failure:
            return 4
        if self.num_ok == 0:
            return 1
        return 3 if self.num_refused else 0

    def with_merge(self, seconds: float, cpu_seconds: float) -> "BuildSummary":
        """Returns a copy with the wall and processor time of merging."""
        total = self.seconds["tiling"] + seconds
        times = {**self.seconds, "merge": round(seconds, 3), "total": round(total, 3)}
        return replace(self, seconds=times, cpu_seconds={**self.cpu_seconds, "merge": round(cpu_seconds, 3)})

    def as_strict_failure(self) -> "BuildSummary":
        """Returns a copy that says that no dataset was written because of the refused slides."""
        return replace(self, is_strict_failure=True)

    def to_dict(self) -> dict[str, Any]:
        """Returns the content of `summary.json`."""
        content = asdict(self)
        del content["is_up_to_date"], content["is_strict_failure"]
        return content


def summarise(entries: Sequence[SlideEntry], *, reused: set[str], tiling_seconds: float) -> BuildSummary:
    """Counts the outcome of all slides.

    Args:
        entries (`Sequence[SlideEntry]`): all slides.
        reused (`set[str]`): ids of slides that were not read in this run.
        tiling_seconds (`float`): wall time from the start until the last slide was done.
    """
    usable = [entry for entry in entries if entry.record.status == "ok"]
    fresh = [entry.record for entry in usable if entry.row.slide_id not in reused]
    reasons = Counter(entry.record.reason for entry in entries if entry.record.status == "refused")
    seconds = {stage: round(sum(record.seconds.get(stage, 0.0) for record in fresh), 3) for stage in STAGES}
    cpu_seconds = {stage: round(sum(record.cpu_seconds.get(stage, 0.0) for record in fresh), 3) for stage in STAGES}
    num_tiles_read = sum(record.num_tiles for record in fresh)
    return BuildSummary(
        num_slides=len(entries),
        num_ok=len(usable),
        num_refused=len(entries) - len(usable),
        num_reused=len(usable) - len(fresh),
        num_tiles=sum(entry.record.num_tiles for entry in usable),
        num_copied=sum(entry.record.num_copied for entry in usable),
        refused_by_reason=dict(sorted(reasons.items())),
        slides_per_split={split: len(group) for split, group in group_by_split(usable).items()},
        tiles_per_split=dict(count_tiles(entries)),
        seconds={**seconds, "tiling": round(tiling_seconds, 3)},
        cpu_seconds=cpu_seconds,
        slides_per_second=round(len(fresh) / tiling_seconds, 3),
        tiles_per_second=round(num_tiles_read / tiling_seconds, 3),
    )


def refused_lines(entries: Sequence[SlideEntry]) -> str:
    """Returns the content of `refused.jsonl`: one JSON object per refused slide."""
    lines = [
        {
            "slide_id": entry.row.slide_id,
            "path": entry.row.stored_path,
            "split": entry.row.split,
            "reason": entry.record.reason,
            "message": entry.record.message,
        }
        for entry in entries
        if entry.record.status == "refused"
    ]
    return "".join(json.dumps(line) + "\n" for line in lines)


def summary_text(content: Mapping[str, Any]) -> str:
    """Returns the summary of a build as Markdown, `summary.md`.

    Args:
        content (`Mapping[str, Any]`): the content of `summary.json`.
    """
    counts = [(key, content[key]) for key in _COUNTS]
    rates = [(key, f"{content[key]:.2f}") for key in ("slides_per_second", "tiles_per_second")]
    seconds, cpu_seconds = content["seconds"], content["cpu_seconds"]
    stages = [
        (stage, f"{value:.1f}", f"{cpu_seconds[stage]:.1f}" if stage in cpu_seconds else "")
        for stage, value in seconds.items()
    ]
    text = "# Build of a slide dataset\n\n" + _table(("", "value"), [*counts, *rates])
    text += "\n\nopen, mask, read and write are sums over all workers; tiling, merge and total are by the clock.\n\n"
    text += _table(("stage", "seconds", "processor seconds"), stages)
    if content["refused_by_reason"]:
        text += "\n\n## Refused\n\n" + _table(("reason", "slides"), list(content["refused_by_reason"].items()))
        text += "\n\n`refused.jsonl` names them."
    return text + "\n"


def _table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


def report_text(summary: BuildSummary, out_dir: str) -> str:
    """Returns what `dre-slcl tiles` says at its end."""
    lines = [
        f"{out_dir}: {summary.num_ok} slides, {summary.num_tiles} tiles, {summary.num_refused} refused"
        + (" (up to date: nothing to do)" if summary.is_up_to_date else ""),
    ]
    if summary.num_copied:
        lines.append(f"  {summary.num_copied} tiles are the slides' own compressed ones")
    if summary.num_reused:
        lines.append(f"  {summary.num_reused} slides were tiled before")
    if not summary.is_up_to_date:
        times = ", ".join(f"{stage} {value:.1f} s" for stage, value in summary.seconds.items())
        lines.append(f"  {summary.slides_per_second:.2f} slides/s, {summary.tiles_per_second:.1f} tiles/s ({times})")
    for reason, count in summary.refused_by_reason.items():
        lines.append(f"  refused, {reason}: {count}")
    return "\n".join(lines) + "\n"


def versions() -> Mapping[str, str]:
    """Returns the versions of Python and of the packages that shape a dataset."""
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found
