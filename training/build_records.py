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
        refused_by_reason (`dict[str, int]`): refused slides per reason code.
        slides_per_split (`dict[str, int]`): usable slides per split.
        tiles_per_split (`dict[str, int]`): tiles per split.
        seconds (`dict[str, float]`): wall time: open, mask, read_encode and write summed over the slides read in this
            run, tiling, merge and total by the clock.
        slides_per_second (`float`), tiles_per_second (`float`): slides and tiles read in this run over `tiling`.
        is_up_to_date (`bool`): whether nothing had to be done.
    """

    num_slides: int
    num_ok: int
    num_refused: int
    num_reused: int
    num_tiles: int
    refused_by_reason: dict[str, int]
    slides_per_split: dict[str, int]
    tiles_per_split: dict[str, int]
    seconds: dict[str, float]
    slides_per_second: float
    tiles_per_second: float
    is_up_to_date: bool = False

    @property
    def exit_code(self) -> int:
        """0 if every slide was tiled, 3 if some were refused, 1 if none could be used."""
        if self.num_ok == 0:
            return 1
        return 3 if self.num_refused else 0

    def with_seconds(self, **seconds: float) -> "BuildSummary":
        """Returns a copy with more times."""
        return replace(self, seconds={**self.seconds, **{stage: round(value, 3) for stage, value in seconds.items()}})

    def to_dict(self) -> dict[str, Any]:
        """Returns the content of `summary.json`."""
        content = asdict(self)
        del content["is_up_to_date"]
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
    num_tiles_read = sum(record.num_tiles for record in fresh)
    return BuildSummary(
        num_slides=len(entries),
        num_ok=len(usable),
        num_refused=len(entries) - len(usable),
        num_reused=len(usable) - len(fresh),
        num_tiles=sum(entry.record.num_tiles for entry in usable),
        refused_by_reason=dict(sorted(reasons.items())),
        slides_per_split={split: len(group) for split, group in group_by_split(usable).items()},
        tiles_per_split=dict(count_tiles(entries)),
        seconds={**seconds, "tiling": round(tiling_seconds, 3)},
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


def versions() -> Mapping[str, str]:
    """Returns the versions of Python and of the packages that shape a dataset."""
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found
