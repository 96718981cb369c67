# SPDX-License-Identifier: Apache-2.0
"""Puts the embeddings of all shares of a manifest (`dre-slcl embed --shard i/n`) together.

Files of slides are copied, or linked where they lie on the same disk; tables are joined in the manifest's order.
"""

import contextlib
import logging
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from modeling_dre_slcl.atomic_files import atomic_file, read_json, write_json, write_text

from .embed_files import TABLE_NAME
from .embed_summary import SUMMARY_NAME, write_summary
from .folder_lock import folder_lock

logger = logging.getLogger(__name__)
_PARTIAL = 3


def join_embeddings(shares: Sequence[Path], out: Path) -> int:
    """Writes the folder that one machine would have written for the whole manifest.

    Args:
        shares (`Sequence[Path]`): folders of all shares, in any order.
        out (`Path`): folder of the whole; may exist.

    Returns:
        `int`: 0 if all slides are embedded, 3 if some were refused.

    Raises:
        ValueError: if a share is missing, unfinished, given twice, or of another manifest, model or options.
    """
    options = [_read_options(folder) for folder in shares]
    _check(shares, options, out)
    position = {slide_id: place for one in options for slide_id, place in one["share"]["positions"].items()}
    (out / "embeddings").mkdir(parents=True, exist_ok=True)
    with folder_lock(out):
        for folder in shares:
            for path in sorted((folder / "embeddings").iterdir()):
                if not path.name.startswith("."):
                    _copy(path, out / "embeddings" / path.name)
        tables = [pq.read_table(folder / TABLE_NAME) for folder in shares]
        table = pa.concat_tables(tables, promote_options="permissive")
        places = pa.array([position[slide_id] for slide_id in table["slide_id"].to_pylist()])
        table = table.append_column("place", places).sort_by("place").drop_columns("place")
        with atomic_file(out / TABLE_NAME) as temporary:
            pq.write_table(table, temporary)
        write_text(out / "refused.jsonl", "".join((folder / "refused.jsonl").read_text("utf-8") for folder in shares))
        shutil.copyfile(shares[0] / "README.md", out / "README.md")
        write_json(out / "embed.json", {name: value for name, value in options[0].items() if name != "share"})
        summary = _add([read_json(folder / SUMMARY_NAME) for folder in shares])
        write_summary(out, summary)
    logger.info("%d shares with %d slides joined in %s.", len(shares), table.num_rows, out)
    return _PARTIAL if summary["num_refused"] else 0


def _read_options(folder: Path) -> dict[str, Any]:
    if not (folder / SUMMARY_NAME).is_file():
        raise ValueError(
            f"{folder}: not a finished share (no {SUMMARY_NAME}); run `dre-slcl embed --shard` to its end."
        )
    options = read_json(folder / "embed.json")
    if "share" not in options:
        raise ValueError(f"{folder}: holds embeddings of a whole manifest, not of a share (`--shard i/n`).")
    return options


def _check(shares: Sequence[Path], options: Sequence[Mapping[str, Any]], out: Path) -> None:
    if out in shares:
        raise ValueError(f"{out}: is one of the shares; choose another folder for all of them.")
    first, count = options[0], options[0]["share"]["count"]
    for folder, one in zip(shares, options, strict=True):
        if one["share"]["manifest"] != first["share"]["manifest"] or one["share"]["count"] != count:
            raise ValueError(f"{folder}: a share of another manifest than {shares[0]}.")
        differing = [name for name in first if name not in ("share", "model") and one.get(name) != first[name]]
        if differing:
            raise ValueError(f"{folder}: made with other options than {shares[0]}: {', '.join(differing)}.")
    indices = sorted(one["share"]["index"] for one in options)
    if indices != list(range(1, count + 1)):
        raise ValueError(f"--join: expected each of the {count} shares once, found shares {indices}.")


def _copy(source: Path, target: Path) -> None:
    with atomic_file(target) as temporary:
        with contextlib.suppress(OSError):  # another disk, or one without links
            os.link(source, temporary)
            return
        shutil.copyfile(source, temporary)


def _add(summaries: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Adds counts and times up; the shares are taken to have run at the same time."""
    joined: dict[str, Any] = {}
    for name, value in summaries[0].items():
        values = [summary[name] for summary in summaries]
        if isinstance(value, dict):
            keys = sorted({key for one in values for key in one}) if name != "seconds" else list(value)
            joined[name] = {key: sum(one.get(key, 0) for one in values) for key in keys}
        else:
            joined[name] = max(values) if name == "total_seconds" else sum(values)
    total = max(joined["total_seconds"], 1e-9)
    num_new = joined["num_embedded"] - joined["num_embedded_before"]
    return joined | {
        "slides_per_second": round(num_new / total, 4),
        "tiles_per_second": round(joined["num_tiles_encoded"] / total, 2),
    }
