# SPDX-License-Identifier: Apache-2.0
"""The metrics of a run, a line for every few steps, and the trackers that show them elsewhere."""

import importlib.util
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from modeling_dre_slcl.atomic_files import write_text


class MetricsLog:
    """`metrics.jsonl`: one JSON object a line, each with its `step`.

    Args:
        path (`Path`): the file.
        track (callable, *optional*): takes the numbers of each line and its step too.
    """

    def __init__(self, path: Path, track: Callable[[dict[str, float], int], None] | None = None) -> None:
        self.path, self.track = path, track

    def rewind(self, step: int) -> None:
        """Drops lines of later steps, which a killed run wrote after its last checkpoint, and a torn last line."""
        kept = [row for row in read_metrics(self.path) if row["step"] <= step]
        write_text(self.path, "".join(json.dumps(row) + "\n" for row in kept))

    def append(self, row: dict[str, Any]) -> None:
        """Adds a line."""
        with self.path.open("a", encoding="utf-8") as handle:
            handle.write(json.dumps(row) + "\n")
            handle.flush()
            os.fsync(handle.fileno())  # a checkpoint that outlives a power loss must not outlive its metrics
        if self.track is not None:
            # Trackers keep the step themselves, and some of them reserve its name.
            is_number = {name: isinstance(value, (int, float)) for name, value in row.items()} | {"step": False}
            numbers = {name: value for name, value in row.items() if is_number[name]}
            self.track(numbers, row["step"])


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Reads `metrics.jsonl`; a missing file is empty, and a torn last line is passed over."""
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows


def check_trackers(names: Sequence[str]) -> None:
    """Refuses trackers that are not installed; accelerate would leave them out without a word.

    Raises:
        ValueError: naming the tracker and how to install it.
    """
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise ValueError(f'`trackers`: {name} is not installed; `pip install "dre-slcl[{name}]"`.')


def tracked_settings(settings: dict[str, Any]) -> dict[str, int | float | str | bool]:
    """Settings as every tracker takes them: plain values, the others as JSON."""
    plain = (int, float, str, bool)
    return {name: value if isinstance(value, plain) else json.dumps(value) for name, value in settings.items()}
