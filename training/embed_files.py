# SPDX-License-Identifier: Apache-2.0
"""Files of an embedding run: one per slide, the table of all, and the card that lets `datasets` load it."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from modeling_dre_slcl.atomic_files import atomic_file, write_text

from .hdf5_files import require_h5py
from .manifest import ManifestRow
from .trident_export import coordinate_attributes, run_name, write_trident_coordinates, write_trident_features

try:
    import h5py
except ImportError:
    h5py = None

FORMATS = ("safetensors", "h5")
TABLE_NAME = "slides.parquet"
VECTORS = ("slide_embedding", "slide_projection")
_TENSORS = (*VECTORS, "residuals", "codeword_counts")
_TILE_TENSORS = ("tile_features", "tile_xy")
_FACTS = (
    "slide_id",
    "num_tiles",
    "num_tiles_encoded",
    "mpp",
    "estimated_error",
    "error_bound",
    "fingerprint",
    "given_mpp",
)
_ERRORS = ("estimated_error", "error_bound")
_ROWS_PER_GROUP = 256
_ENCODER = "dre_slcl"
_CARD = """---
configs:
- config_name: default
  data_files:
  - split: train
    path: slides.parquet
---

# Slide embeddings

`datasets.load_dataset(<this folder>)` gives a row per slide. `slide_embedding` is for probes, clustering and
slide-to-slide search, `slide_projection` for comparison with text; both are null where `status` is `refused`, and
`reason` says why. `embeddings/` holds a file per slide with the residuals per codeword as well.
"""


@dataclass(frozen=True)
class EmbedRecord:
    """What became of a slide.

    Attributes:
        slide_id (`str`): the slide.
        status (`str`): "ok" or "refused".
        reason (`str`), message (`str`): why it was refused.
        num_tiles (`int`): tiles that were encoded in this run.
    """

    slide_id: str
    status: str = "ok"
    reason: str = ""
    message: str = ""
    num_tiles: int = 0


def embedding_path(out: Path, slide_id: str, file_format: str) -> Path:
    """Returns where the embedding of a slide lies."""
    return out / "embeddings" / f"{slide_id}.{file_format}"


def write_embedding(path: Path, result: Mapping[str, Any], *, with_tiles: bool) -> None:
    """Writes the vectors of a slide, atomically.

    Args:
        path (`Path`): the file; its suffix, `.safetensors` or `.h5`, decides the format.
        result (`Mapping`): from `iter_embeddings`, with `given_mpp`.
        with_tiles (`bool`): whether features and corners of tiles are written too.
    """
    names = (*_TENSORS, *_TILE_TENSORS) if with_tiles else _TENSORS
    tensors = {name: result[name].contiguous() for name in names}
    facts = {name: str(result[name]) for name in _FACTS if name in result}
    with atomic_file(path) as temporary:
        if path.suffix == ".safetensors":
            save_file(tensors, temporary, metadata=facts)
            return
        require_h5py()
        with h5py.File(temporary, "w") as file:
            file.attrs.update(facts)
            for name, tensor in tensors.items():
                file.create_dataset(name, data=tensor.numpy())


def read_facts(path: Path) -> dict[str, str]:
    """Returns what a slide's file says about how it was made; empty if there is none, or it cannot be read."""
    return _read(path, ())[0]


def _read(path: Path, names: Sequence[str]) -> tuple[dict[str, str], dict[str, np.ndarray]]:
    if not path.is_file():
        return {}, {}
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, framework="np") as stored:
                return dict(stored.metadata() or {}), {name: stored.get_tensor(name) for name in names}
        require_h5py()
        with h5py.File(path, "r") as stored:
            return {name: str(value) for name, value in stored.attrs.items()}, {n: stored[n][()] for n in names}
    except (SafetensorError, OSError, KeyError):
        return {}, {}


def write_table(out: Path, rows: Iterable[ManifestRow], records: Mapping[str, EmbedRecord], file_format: str) -> None:
    """Writes `slides.parquet`, a row per slide in the order of the manifest, its card, and `refused.jsonl`.

    Vectors are read from the slides' files again, a few at a time.

    Args:
        out (`Path`): folder of the run.
        rows (`Iterable[ManifestRow]`): the slides.
        records (`Mapping[str, EmbedRecord]`): what became of each.
        file_format (`str`): of the slides' files.
    """
    rows = list(rows)
    own = _own_columns()
    labels = {name: _label_type(rows, name) for name in _label_names(rows) if name not in own}
    schema = pa.schema([*own.items(), *labels.items()])
    with atomic_file(out / TABLE_NAME) as temporary, pq.ParquetWriter(temporary, schema) as writer:
        for start in range(0, max(1, len(rows)), _ROWS_PER_GROUP):
            part = [_table_row(out, row, records[row.slide_id], file_format) for row in rows[start:][:_ROWS_PER_GROUP]]
            writer.write_table(pa.Table.from_pylist(part, schema))
    refused = [records[row.slide_id] for row in rows if records[row.slide_id].status != "ok"]
    lines = [json.dumps({"slide_id": one.slide_id, "reason": one.reason, "message": one.message}) for one in refused]
    write_text(out / "refused.jsonl", "".join(f"{line}\n" for line in lines))
    write_text(out / "README.md", _CARD)


def _own_columns() -> dict[str, pa.DataType]:
    texts = dict.fromkeys(("slide_id", "case_id", "split", "status", "reason"), pa.string())
    numbers = {"num_tiles": pa.int64(), "num_tiles_encoded": pa.int64(), "mpp": pa.float64()}
    return texts | numbers | dict.fromkeys(_ERRORS, pa.float64()) | dict.fromkeys(VECTORS, pa.list_(pa.float32()))


def _label_names(rows: Sequence[ManifestRow]) -> list[str]:
    return list(dict.fromkeys(name for row in rows for name in row.labels))


def _label_type(rows: Sequence[ManifestRow], name: str) -> pa.DataType:
    return pa.array([row.labels.get(name) for row in rows]).type


def _table_row(out: Path, row: ManifestRow, record: EmbedRecord, file_format: str) -> dict[str, Any]:
    values = {"slide_id": row.slide_id, "case_id": row.case_id, "split": row.split, **row.labels}
    values |= {"status": record.status, "reason": record.reason, "num_tiles": 0, "num_tiles_encoded": 0}
    if record.status != "ok":
        return values
    facts, vectors = _read(embedding_path(out, row.slide_id, file_format), VECTORS)
    errors = {name: float(facts[name]) for name in _ERRORS if name in facts}
    return values | {
        "num_tiles": int(facts["num_tiles"]),
        "num_tiles_encoded": int(facts.get("num_tiles_encoded", facts["num_tiles"])),
        "mpp": float(facts["mpp"]),
        **errors,
        **{name: vectors[name].tolist() for name in VECTORS},
    }


def write_trident(job_dir: Path, result: Mapping[str, Any], *, tile_size_px: int, tile_mpp: float) -> None:
    """Writes a slide's embedding in TRIDENT's layout, with coordinates and, if there are any, features of its tiles.

    Args:
        job_dir (`Path`): TRIDENT's job folder.
        result (`Mapping`): from `iter_embeddings`.
        tile_size_px (`int`), tile_mpp (`float`): geometry of the tiles.
    """
    slide_id, tile_xy = result["slide_id"], result["tile_xy"].numpy()
    geometry = {"tile_size_px": tile_size_px, "tile_mpp": tile_mpp, "stride_px": tile_size_px}
    names = ("mpp", "width_px", "height_px", "tile_size_level0_px")
    attributes = coordinate_attributes(slide_id, **{name: result[name] for name in names}, **geometry)
    folder = job_dir / run_name(**geometry)
    write_trident_coordinates(folder / "patches" / f"{slide_id}_patches.h5", tile_xy, attributes)
    if "tile_features" in result:
        target = folder / f"features_{_ENCODER}" / f"{slide_id}.h5"
        features = result["tile_features"].numpy()
        write_trident_features(target, features, tile_xy, encoder=_ENCODER, attributes=attributes)
    target = folder / f"slide_features_{_ENCODER}" / f"{slide_id}.h5"
    with atomic_file(target) as temporary, h5py.File(temporary, "w") as file:
        file.create_dataset("features", data=result["slide_embedding"].numpy())
        corners = file.create_dataset("coords", data=tile_xy.astype(np.int64))
        corners.attrs.update(attributes)
