# SPDX-License-Identifier: Apache-2.0
"""The metrics of a run, a line for every few steps."""

import json
import os
from pathlib import Path
from typing import Any

from modeling_dre_slcl.atomic_files import write_text


class MetricsLog:
    """`metrics.jsonl`: one JSON object a line, each with its `step`.

    Args:
        path (`Path`): the file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

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


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Reads `metrics.jsonl`; a missing file is empty, and a torn last line is passed over."""
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows
