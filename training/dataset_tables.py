# SPDX-License-Identifier: Apache-2.0
"""The two tables of a slide dataset, as Parquet: `tiles` (one row per tile) and `slides` (one row per slide).

Images are stored uncompressed (they are JPEG already) and row groups never span two slides, so that a slide's tiles
can be found and copied without decoding anything. x and y of a tile are level-0 pixels of its top-left corner.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from .arrow_columns import ByteStrings, binary_column, join_strings, number_column, read_numbers, value_column
from .manifest import DATASET_COLUMNS
from .parquet_join import TableSlice


def schema_for_datasets(schema: pa.Schema) -> pa.Schema:
    """Adds what the library `datasets` writes beside its own tables, which so need not be loaded to write ours."""
    features = {field.name: _feature(field.type) for field in schema}
    return schema.with_metadata({"huggingface": json.dumps({"info": {"features": features}})})


def _feature(kind: pa.DataType) -> dict[str, Any]:
    if pa.types.is_struct(kind):
        return {"_type": "Image"}
    if pa.types.is_fixed_size_list(kind):
        return {"feature": _feature(kind.value_type), "length": kind.list_size, "_type": "List"}
    if pa.types.is_list(kind):
        return {"feature": _feature(kind.value_type), "_type": "List"}
    return {"dtype": _DTYPES.get(str(kind), str(kind)), "_type": "Value"}


_DTYPES = {"double": "float64"}  # where pyarrow has another name
_LABEL_TYPES = {"bool": pa.bool_(), "int64": pa.int64(), "float64": pa.float64(), "string": pa.string()}
_IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])  # how datasets stores an `Image`
COORDINATE_SCHEMA = pa.schema(
    [("slide_id", pa.string()), ("tile_index", pa.int32()), ("x", pa.int32()), ("y", pa.int32())]
)
TILE_SCHEMA = schema_for_datasets(COORDINATE_SCHEMA.append(pa.field("image", _IMAGE)))
MAX_GROUP_TILES = 1000
# Pages end where the content says, so the Hub stores only what changed between two versions. Content is looked at
# between these sizes only: from 256 KiB on, which is Parquet's default, that took as long as writing the tiles.
PAGE_BYTES = {"min_chunk_size": 768 << 10, "max_chunk_size": 1280 << 10, "norm_level": 0}
MAX_GROUP_BYTES = 64 << 20
_SLIDES_PER_GROUP = 64


def slide_schema(labels: Iterable[Mapping[str, Any]]) -> pa.Schema:
    """Returns the columns of the `slides` configuration; label columns get the type of their values.

    Args:
        labels (`Iterable[Mapping[str, Any]]`): the labels of all slides.
    """
    types = dict.fromkeys(DATASET_COLUMNS, pa.string())
    types.update(dict.fromkeys(("width_px", "height_px", "tile_size_px", "stride_px"), pa.int32()))
    types.update(dict.fromkeys(("tile_size_level0_px", "num_tiles", "num_copied"), pa.int32()))
    types.update({"tile_start": pa.int64(), "mpp": pa.float64(), "tile_mpp": pa.float64()})
    types["tissue_fraction"] = pa.float64()
    last = {name: types.pop(name) for name in ("status", "reason")}
    del types["tile_xy"]
    types["tile_xy"] = pa.list_(pa.list_(pa.int32(), 2))  # behind the single numbers
    label_types = {name: _LABEL_TYPES[kind] for name, kind in label_kinds(labels).items()}
    return schema_for_datasets(pa.schema({**types, **label_types, **last}))


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
    """Writes tiles to a Parquet file, one row group at a time.

    Args:
        path (`Path`): the file to write.
        schema (`pyarrow.Schema`): `TILE_SCHEMA` or `COORDINATE_SCHEMA`.
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
            # Smallest and largest JPEG would say nothing and cost a comparison of every two.
            write_statistics=["slide_id", "tile_index", "x", "y"],
            write_page_index=True,
            use_content_defined_chunking=PAGE_BYTES,
        )

    def __enter__(self) -> "TileTableWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._writer.close()

    def write_group(
        self, slide_id: str, first_tile: int, tile_xy: np.ndarray, images: ByteStrings | None = None
    ) -> None:
        """Writes neighbouring tiles of one slide as one row group.

        Args:
            slide_id (`str`): the slide.
            first_tile (`int`): index of the first of these tiles in the slide.
            tile_xy (`np.ndarray` of shape `(n, 2)`, int32): their top-left corners, level-0 pixels.
            images (`ByteStrings`, *optional*): their JPEG files, if the table has images; not used after the call.
        """
        num_tiles = len(tile_xy)
        columns = [
            binary_column(join_strings([slide_id.encode()] * num_tiles), pa.string()),
            number_column(np.arange(first_tile, first_tile + num_tiles), pa.int32()),
            *(number_column(tile_xy[:, axis], pa.int32()) for axis in (0, 1)),
        ]
        if images is not None:
            fields = [binary_column(images, pa.binary()), pa.nulls(num_tiles, pa.string())]
            columns.append(pa.StructArray.from_arrays(fields, fields=list(_IMAGE)))
        table = pa.Table.from_arrays(columns, schema=self._schema)
        self._writer.write_table(table, row_group_size=max(1, num_tiles))


def read_tile_xy(tiles: TableSlice) -> np.ndarray:
    """Reads the corners of the tiles in some row groups of a tile table, int32 (N, 2)."""
    with pq.ParquetFile(tiles.path) as file:
        table = file.read_row_groups(list(tiles.groups), columns=["x", "y"])
    return np.stack([read_numbers(table[name]) for name in ("x", "y")], axis=1)


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
                else value_column([row[name] for row in chunk], schema.field(name).type)
                for name in schema.names
            }
            writer.write_table(pa.Table.from_arrays(list(columns.values()), schema=schema))


def _corner_column(corners: Sequence[np.ndarray]) -> pa.Array:
    """Returns list<fixed_size_list<int32>[2]> without a detour over Python numbers."""
    offsets = np.concatenate([[0], np.cumsum([len(xy) for xy in corners])])
    numbers = number_column(np.concatenate([xy.reshape(-1) for xy in corners]), pa.int32())
    pairs = pa.FixedSizeListArray.from_arrays(numbers, 2)
    return pa.ListArray.from_arrays(number_column(offsets, pa.int32()), pairs)
