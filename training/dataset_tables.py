# SPDX-License-Identifier: Apache-2.0
"""The two tables of a slide dataset, as Parquet: `tiles` (one row per tile) and `slides` (one row per slide).

Images are stored uncompressed (they are JPEG already) and row groups never span two slides, so that a slide's tiles
can be found and copied without decoding anything.
"""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from .manifest import DATASET_COLUMNS

if TYPE_CHECKING:
    import datasets

_IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])  # how datasets stores an `Image`
COORDINATE_SCHEMA = pa.schema(
    [("slide_id", pa.string()), ("tile_index", pa.int32()), ("x", pa.int32()), ("y", pa.int32())]
)
TILE_SCHEMA = COORDINATE_SCHEMA.append(pa.field("image", _IMAGE))
MAX_GROUP_TILES = 1000
MAX_GROUP_BYTES = 64 << 20
_SLIDES_PER_GROUP = 64


def tile_features() -> "datasets.Features":
    """Returns the columns of the `tiles` configuration; x and y are level-0 pixels of the tile's top-left corner."""
    import datasets

    return datasets.Features(
        {
            "slide_id": datasets.Value("string"),
            "tile_index": datasets.Value("int32"),
            "x": datasets.Value("int32"),
            "y": datasets.Value("int32"),
            "image": datasets.Image(),
        }
    )


def slide_features(labels: Iterable[Mapping[str, Any]]) -> "datasets.Features":
    """Returns the columns of the `slides` configuration; label columns get the type of their values.

    Args:
        labels (`Iterable[Mapping[str, Any]]`): the labels of all slides.
    """
    import datasets

    kinds = dict.fromkeys(DATASET_COLUMNS, "string")
    kinds.update(dict.fromkeys(("width_px", "height_px", "tile_size_px", "stride_px", "num_tiles"), "int32"))
    kinds.update({"tile_size_level0_px": "int32", "tile_start": "int64", "mpp": "float64", "tile_mpp": "float64"})
    features = {name: datasets.Value(kind) for name, kind in kinds.items()}
    features["tile_xy"] = datasets.List(datasets.List(datasets.Value("int32"), length=2))
    last = {name: features.pop(name) for name in ("status", "reason")}
    return datasets.Features(
        {**features, **{name: datasets.Value(kind) for name, kind in label_kinds(labels).items()}, **last}
    )


def label_kinds(labels: Iterable[Mapping[str, Any]]) -> dict[str, str]:
    """Returns the type of each label column: "bool", "int64", "float64" or "string"."""
    names = {bool: "bool", int: "int64", float: "float64", str: "string"}
    kinds: dict[str, str] = {}
    for row in labels:
        for name, value in row.items():
            if value is not None or name not in kinds:
                kinds[name] = names.get(type(value), "")
    return {name: kind or "string" for name, kind in kinds.items()}


class TileTableWriter:
    """Writes tiles to a Parquet file; the bytes depend on the rows alone, not on how they were handed over.

    Args:
        path (`Path`): the file to write.
        schema (`pyarrow.Schema`): `TILE_SCHEMA` or `COORDINATE_SCHEMA`, with or without metadata.
    """

    def __init__(self, path: Path, schema: pa.Schema) -> None:
        codecs = {"slide_id": "zstd", "tile_index": "zstd", "x": "zstd", "y": "zstd"}
        if "image" in schema.names:
            codecs.update({"image.bytes": "none", "image.path": "zstd"})
        self._schema = schema
        self._writer = pq.ParquetWriter(
            path,
            schema,
            compression=codecs,
            use_dictionary=["slide_id"],
            write_page_index=True,
            # Pages end where the content says, so the Hub stores only what changed between two versions.
            use_content_defined_chunking=True,
        )
        self._rows: list[dict[str, Any]] = []
        self._num_bytes = 0

    def __enter__(self) -> "TileTableWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.flush()
        self._writer.close()

    def add_tile(self, slide_id: str, tile_index: int, xy: tuple[int, int], image: bytes | None) -> None:
        """Adds one row; `xy` is the top-left corner in level-0 pixels, `image` the encoded tile."""
        row: dict[str, Any] = {"slide_id": slide_id, "tile_index": tile_index, "x": xy[0], "y": xy[1]}
        if image is not None:
            row["image"] = {"bytes": image, "path": None}
            self._num_bytes += len(image)
        self._rows.append(row)
        if len(self._rows) >= MAX_GROUP_TILES or self._num_bytes >= MAX_GROUP_BYTES:
            self.flush()

    def flush(self) -> None:
        """Ends the row group; called between slides."""
        if self._rows:
            self._writer.write_table(pa.Table.from_pylist(self._rows, schema=self._schema))
        self._rows, self._num_bytes = [], 0

    def copy_groups(self, source: pq.ParquetFile, groups: Iterable[int]) -> None:
        """Copies whole row groups of another file of this kind."""
        for group in groups:
            table = source.read_row_group(group).replace_schema_metadata(self._schema.metadata)
            self._writer.write_table(table, row_group_size=MAX_GROUP_TILES)


def read_tile_xy(path: Path) -> np.ndarray:
    """Reads the corners of all tiles of a tile table, int32 (N, 2)."""
    table = pq.read_table(path, columns=["x", "y"])
    return np.stack([table["x"].to_numpy(), table["y"].to_numpy()], axis=1).astype(np.int32)


def write_slide_table(
    path: Path, schema: pa.Schema, rows: Sequence[Mapping[str, Any]], tile_xy: Iterable[np.ndarray]
) -> None:
    """Writes the `slides` table of one split.

    Args:
        path (`Path`): the file to write.
        schema (`pyarrow.Schema`): schema of `slide_features`.
        rows (`Sequence[Mapping[str, Any]]`): the columns of each slide without `tile_xy`.
        tile_xy (`Iterable[np.ndarray]`): for each slide the corners of its tiles, int32 (N, 2), level-0 pixels.
    """
    corners = iter(tile_xy)
    with pq.ParquetWriter(path, schema, compression="zstd", write_page_index=True) as writer:
        for start in range(0, len(rows), _SLIDES_PER_GROUP):
            chunk = rows[start : start + _SLIDES_PER_GROUP]
            columns = {
                name: _corner_column([next(corners) for _ in chunk])
                if name == "tile_xy"
                else pa.array([row[name] for row in chunk], type=schema.field(name).type)
                for name in schema.names
            }
            writer.write_table(pa.table(columns, schema=schema))


def _corner_column(corners: Sequence[np.ndarray]) -> pa.Array:
    """Returns list<fixed_size_list<int32>[2]> without a detour over Python numbers."""
    offsets = np.concatenate([[0], np.cumsum([len(xy) for xy in corners])]).astype(np.int32)
    flat = np.concatenate([xy.reshape(-1) for xy in corners]).astype(np.int32)
    return pa.ListArray.from_arrays(pa.array(offsets), pa.FixedSizeListArray.from_arrays(pa.array(flat), 2))
