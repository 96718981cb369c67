# SPDX-License-Identifier: Apache-2.0
"""Embeddings of slides or cases as one table, whatever tool made them; see `embedding_files` for the formats.

Letters: n slides or cases, D width.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from ..manifest import SLIDE_SUFFIXES
from ..manifest_checks import raise_offenders

COLUMN_SEPARATOR = "::"


@dataclass(frozen=True, eq=False)
class EmbeddingTable:
    """A vector per slide or per case.

    Args:
        name (`str`): how results call these embeddings.
        ids (`list` of `str`): of the n slides or cases, each once.
        case_ids (`list` of `str`): the case of each, "" where the files do not say.
        features (`np.ndarray` of shape `(n, D)`, float32): finite.
        left_out (`list` of `dict`): `id`, `reason` and `message` of what could not be used.
    """

    name: str
    ids: list[str]
    case_ids: list[str]
    features: np.ndarray
    left_out: list[dict[str, str]] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.ids)

    def take(self, rows: Sequence[int] | np.ndarray) -> "EmbeddingTable":
        """Returns the table of some rows, in their order."""
        rows = np.asarray(rows, dtype=np.int64)
        chosen = [[column[row] for row in rows] for column in (self.ids, self.case_ids)]
        return replace(self, ids=chosen[0], case_ids=chosen[1], features=self.features[rows])


def slide_name(text: str) -> str:
    """A slide's id as it stands in tables and file names, without the suffix of a slide file."""
    text = text.strip()
    return text[: -len(Path(text).suffix)] if Path(text).suffix.lower() in SLIDE_SUFFIXES else text


def read_embeddings(source: str, *, name: str = "slides", pool: str | None = None) -> EmbeddingTable:
    """Reads embeddings.

    Args:
        source (`str`): a file or folder, see `embedding_files`; `PATH::COLUMN` names the column of vectors.
        name (`str`, defaults to `"slides"`): how results call them.
        pool (`str`, *optional*): `"mean"` makes a slide's vector of its tile features; without it, files with features
            of tiles are refused.

    Returns:
        `EmbeddingTable`: rows that are not finite, and files that cannot be read, are in `left_out`.

    Raises:
        ValueError: if nothing usable is there, an id occurs twice, widths differ, or it is open which column is meant.
        FileNotFoundError: if there is no such file or folder.
    """
    from .embedding_files import read_vectors

    path, _, column = source.partition(COLUMN_SEPARATOR)
    ids, case_ids, vectors, left_out = read_vectors(Path(path), column or None, pool)
    return make_table(name, ids, case_ids, vectors, left_out=left_out, where=path)


def make_table(
    name: str,
    ids: Sequence[str],
    case_ids: Sequence[str],
    vectors: Sequence[np.ndarray] | np.ndarray,
    *,
    left_out: Sequence[dict[str, str]] = (),
    where: str = "embeddings",
) -> EmbeddingTable:
    """Checks vectors and makes a table of them.

    Args:
        name (`str`): how results call them.
        ids (sequence of `str`), case_ids (sequence of `str`): of each vector; a suffix such as .svs is taken off ids.
        vectors (sequence of `np.ndarray` of shape `(D,)`): a row that is not finite is left out.
        left_out (sequence of `dict`): what was left out before.
        where (`str`): for messages.

    Raises:
        ValueError: if an id occurs twice or is empty, widths differ, or no row can be used.
    """
    names = [slide_name(text) for text in ids]
    raise_offenders(f"{where}: every row needs an id", [f"row {i}" for i, text in enumerate(names, 1) if not text])
    seen: dict[str, int] = {}
    for text in names:
        seen[text] = seen.get(text, 0) + 1
    raise_offenders(
        f"{where}: every slide or case may occur once; remove the copies",
        [f"{text} ({count} times)" for text, count in seen.items() if count > 1],
    )
    widths = {len(vector) for vector in vectors}
    if len(widths) > 1 or 0 in widths:
        raise ValueError(
            f"{where}: expected vectors of one width, found widths {sorted(widths)}; embeddings of different encoders "
            "cannot be compared."
        )
    kept, skipped = [], list(left_out)
    features = np.asarray(vectors, dtype=np.float64).reshape(len(names), max(widths, default=0))
    with np.errstate(over="ignore"):
        features = features.astype(np.float32)
    is_finite = np.isfinite(features).all(axis=1)
    for row, text in enumerate(names):
        if is_finite[row]:
            kept.append(row)
        else:
            message = "the embedding holds NaN or infinity; embed the slide again"
            skipped.append({"id": text, "reason": "not_finite", "message": message})
    if not kept:
        why = f"; the first of {len(skipped)} left out: {skipped[0]['id']}: {skipped[0]['message']}" if skipped else ""
        raise ValueError(f"{where}: holds no usable embedding{why}.")
    return EmbeddingTable(name, names, list(case_ids), features, skipped).take(kept)


def mean_by_case(table: EmbeddingTable) -> EmbeddingTable:
    """Averages the slides of each case.

    Args:
        table (`EmbeddingTable`): of slides whose cases are known.

    Returns:
        `EmbeddingTable`: a row per case, in the order of their first slides.
    """
    rows: dict[str, list[int]] = {}
    for row, case_id in enumerate(table.case_ids):
        rows.setdefault(case_id, []).append(row)
    features = np.stack([table.features[places].mean(axis=0, dtype=np.float64) for places in rows.values()])
    return replace(table, ids=list(rows), case_ids=list(rows), features=features.astype(np.float32))
