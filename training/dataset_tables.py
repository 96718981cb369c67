# SPDX-License-Identifier: Apache-2.0
"""The two tables of a slide dataset, as Parquet: `tiles` (one row per tile) and `slides` (one row per slide).

Images are stored uncompressed (they are JPEG already) and row groups never span two slides, so that a slide's tiles
can be found and copied without decoding anything.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from .manifest import DATASET_COLUMNS
from .parquet_join import TableSlice

if TYPE_CHECKING:
    import datasets

_IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])  # how datasets stores an `Image`
COORDINATE_SCHEMA = pa.schema(
    [("slide_id", pa.string()), ("tile_index", pa.int32()), ("x", pa.int32()), ("y", pa.int32())]
)
# What `datasets` writes beside its own tables, so that a part can become a shard as it is, without `datasets`.
_FEATURES = {
    name: {"dtype": str(COORDINATE_SCHEMA.field(name).type), "_type": "Value"} for name in COORDINATE_SCHEMA.names
}
_FEATURES["image"] = {"_type": "Image"}
TILE_SCHEMA = COORDINATE_SCHEMA.append(pa.field("image", _IMAGE)).with_metadata(
    {"huggingface": json.dumps({"info": {"features": _FEATURES}})}
)
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

    kinds = dict.fromkeys((*DATASET_COLUMNS, "num_copied"), "string")
    kinds.update(dict.fromkeys(("width_px", "height_px", "tile_size_px", "stride_px"), "int32"))
    kinds.update(dict.fromkeys(("num_tiles", "num_copied"), "int32"))
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
            # Pages end where the content says, so the Hub stores only what changed between two versions.
            use_content_defined_chunking=True,
        )

    def __enter__(self) -> "TileTableWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._writer.close()

    def write_group(
        self, slide_id: str, first_tile: int, tile_xy: np.ndarray, images: Sequence[bytes] | None = None
    ) -> None:
        """Writes neighbouring tiles of one slide as one row group.

        Args:
            slide_id (`str`): the slide.
            first_tile (`int`): index of the first of these tiles in the slide.
            tile_xy (`np.ndarray` of shape `(n, 2)`, int32): their top-left corners, level-0 pixels.
            images (`Sequence[bytes]`, *optional*): their JPEG files, if the table has images.
        """
        num_tiles = len(tile_xy)
        columns = [
            pa.DictionaryArray.from_arrays(np.zeros(num_tiles, dtype=np.int32), [slide_id]).cast(pa.string()),
            pa.array(np.arange(first_tile, first_tile + num_tiles, dtype=np.int32)),
            *(pa.array(np.ascontiguousarray(tile_xy[:, axis], dtype=np.int32)) for axis in (0, 1)),
        ]
        if images is not None:
            fields = [pa.array(images, pa.binary()), pa.nulls(num_tiles, pa.string())]
            columns.append(pa.StructArray.from_arrays(fields, fields=list(_IMAGE)))
        table = pa.Table.from_arrays(columns, schema=self._schema)
        self._writer.write_table(table, row_group_size=max(1, num_tiles))


def read_tile_xy(tiles: TableSlice) -> np.ndarray:
    """Reads the corners of the tiles in some row groups of a tile table, int32 (N, 2)."""
    with pq.ParquetFile(tiles.path) as file:
        table = file.read_row_groups(list(tiles.groups), columns=["x", "y"])
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
