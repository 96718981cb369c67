# SPDX-License-Identifier: Apache-2.0
"""Reads vectors of slides or cases from the files of this and other tools.

| source | vectors |
| --- | --- |
| folder of `dre-slcl embed` | column `slide_embedding` or `slide_projection` of its table; or `::tile_features` |
| .parquet, .csv, .tsv; folder of Parquet or `datasets` | a column of lists, or numbered columns: `f0`, `f1` ... |
| folder of .h5 (TRIDENT's `slide_features_<encoder>`) | dataset `features` (D,) or (1, D), or `slide_embedding` |
| folder of .safetensors | tensor `slide_embedding` (D,), or another by name |
| folder of tile features (TRIDENT, CLAM, AtlasPatch, STAMP, slide2vec) | their mean, if asked for |

The id of a slide is its file's stem.
"""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..hdf5_files import ForeignFileError, find_dataset, open_hdf5, read_array
from ..manifest import ALIASES
from ..manifest_table import read_table, text_column

if TYPE_CHECKING:
    import pyarrow as pa

Vectors = tuple[list[str], list[str], list[np.ndarray], list[dict[str, str]]]
TILE_FEATURES = "tile_features"
_OWN_TABLE, _OWN_VECTOR = "slides.parquet", "slide_embedding"
_TABLES = {".csv", ".tsv", ".parquet"}
_VECTOR_FILES = {".h5", ".hdf5", ".safetensors"}
_NUMBERED = re.compile(r"(.*?)(\d+)")


def read_vectors(path: Path, column: str | None, pool: str | None) -> Vectors:
    """Reads ids, cases, vectors, and what was left out, from whatever is at a path; see `read_embeddings`.

    Args:
        path (`Path`): file or folder.
        column (`str`, *optional*): the column, dataset or tensor with the vectors.
        pool (`str`, *optional*): "mean" or nothing.

    Returns:
        `tuple`: ids, case ids ("" where unknown), vectors `(D,)` float, and `dict`s of what was left out.

    Raises:
        ValueError: if there is nothing, or more than one thing, to read.
        FileNotFoundError: if the path does not exist.
    """
    if pool not in (None, "mean"):
        raise ValueError(f"pool: expected mean or nothing, found {pool!r}.")
    if path.is_file():
        return _of_file(path, column, pool)
    if not path.is_dir():
        raise FileNotFoundError(f"{path}: there is no such file or folder of embeddings.")
    if column == TILE_FEATURES and (path / "embeddings").is_dir():
        return _of_vector_files(path / "embeddings", column, pool)
    if (path / _OWN_TABLE).is_file():
        return _of_table(path / _OWN_TABLE, _read_parquet(path / _OWN_TABLE), column)
    if (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():
        return _of_table(path, _read_saved_dataset(path), column)
    if any(path.glob("*.parquet")) or any((path / "data").glob("*.parquet")):
        files = sorted(path.glob("*.parquet")) or sorted((path / "data").glob("*.parquet"))
        return _of_table(path, _read_parquet(*files), column)
    folder = _vector_folder(path)
    if folder is not None:
        return _of_vector_files(folder, column, pool)
    return _of_tile_features(path, pool)


def _of_file(path: Path, column: str | None, pool: str | None) -> Vectors:
    suffix = path.suffix.lower()
    if suffix in _VECTOR_FILES:
        raise ValueError(f"{path}: is the file of one slide; give its folder.")
    if suffix not in _TABLES:
        raise ValueError(f"{path}: expected a folder or a .parquet, .csv or .tsv table of embeddings.")
    table = _read_parquet(path) if suffix == ".parquet" else read_table(path)
    return _of_table(path, table, column)


def _read_parquet(*paths: Path) -> "pa.Table":
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        return pa.concat_tables([pq.read_table(path) for path in paths], promote_options="default")
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{paths[0]}: expected a Parquet table of embeddings ({error}).") from error


def _read_saved_dataset(path: Path) -> "pa.Table":
    import datasets

    try:
        loaded = datasets.load_from_disk(str(path))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: expected a folder that `save_to_disk` wrote ({error}).") from error
    if isinstance(loaded, datasets.DatasetDict):
        loaded = datasets.concatenate_datasets(list(loaded.values()))
    return loaded.with_format("arrow")[:]


def _of_table(path: Path, table: "pa.Table | dict[str, list[Any]]", column: str | None) -> Vectors:
    """Vectors of a table: Arrow columns, or the text columns of a CSV file."""
    is_text = isinstance(table, dict)
    names = list(table) if is_text else table.column_names
    columns = {name: table[name] if is_text else None for name in names}

    def cells(name: str) -> list[Any]:
        return columns[name] if is_text else table[name].to_pylist()

    keys = {key: next((name for name in names if name in ALIASES[key]), None) for key in ("slide_id", "case_id")}
    id_name = keys["slide_id"] or keys["case_id"]
    if id_name is None:
        raise ValueError(f"{path}: has columns {names[:20]}; expected `slide_id` or `case_id` among them.")
    ids = text_column(id_name, cells(id_name))
    case_ids = text_column(keys["case_id"], cells(keys["case_id"])) if keys["case_id"] else [""] * len(ids)
    if keys["slide_id"]:
        # A slide stands for its case where a manifest named none, which says nothing of cases.
        case_ids = ["" if case_id == id_ else case_id for id_, case_id in zip(ids, case_ids, strict=True)]
    vectors = _text_vectors(path, table, column) if is_text else _arrow_vectors(path, table, column)
    reasons = cells("reason") if "reason" in names else [None] * len(ids)
    kept = [row for row, vector in enumerate(vectors) if vector is not None]
    left_out = [
        {"id": ids[row], "reason": reasons[row] or "no_embedding", "message": "the table has no embedding of it"}
        for row in sorted(set(range(len(ids))) - set(kept))
    ]
    return [ids[row] for row in kept], [case_ids[row] for row in kept], [vectors[row] for row in kept], left_out


def _arrow_vectors(path: Path, table: "pa.Table", column: str | None) -> list[np.ndarray | None]:
    import pyarrow as pa

    lists = {
        field.name
        for field in table.schema
        if (
            pa.types.is_list(field.type)
            or pa.types.is_large_list(field.type)
            or pa.types.is_fixed_size_list(field.type)
        )
        and (pa.types.is_floating(field.type.value_type) or pa.types.is_integer(field.type.value_type))
    }
    if column is None and _OWN_VECTOR in lists:
        column = _OWN_VECTOR
    if column in lists or (column is None and len(lists) == 1):
        return _list_cells(table[column or next(iter(lists))])
    numbers = [
        field.name for field in table.schema if pa.types.is_floating(field.type) or pa.types.is_integer(field.type)
    ]
    numbered = _numbered_columns(numbers, column)
    if numbered:
        return list(np.stack([table[name].to_numpy() for name in numbered], axis=1).astype(np.float64))
    raise _which_column(path, column, sorted(lists))


def _text_vectors(path: Path, table: dict[str, list[str]], column: str | None) -> list[np.ndarray | None]:
    """Vectors of a CSV file: cells such as "[0.1, 0.2]" or "0.1 0.2", or numbered columns."""
    lists = [name for name, cells in table.items() if _looks_like_vector(next((c for c in cells if c.strip()), ""))]
    if column in lists or (column is None and len(lists) == 1):
        name = column or lists[0]
        return [_parse_vector(cell, f"{path}: `{name}`, row {i}") for i, cell in enumerate(table[name], 1)]
    numbered = _numbered_columns(list(table), column)
    if numbered:
        try:
            return [
                np.array([float(table[name][row] or "nan") for name in numbered])
                for row in range(len(table[numbered[0]]))
            ]
        except ValueError as error:
            raise ValueError(
                f"{path}: columns {numbered[0]} to {numbered[-1]} must hold numbers ({error})."
            ) from error
    raise _which_column(path, column, lists)


def _list_cells(column: "pa.ChunkedArray") -> list[np.ndarray | None]:
    """The vector of each row, `None` where there is none, without a detour over Python numbers."""
    import pyarrow as pa
    import pyarrow.compute as pc

    if pa.types.is_fixed_size_list(column.type):
        column = column.cast(pa.list_(column.type.value_type))
    numbers = pc.list_flatten(column).to_numpy().astype(np.float64)  # null: NaN
    widths = pc.list_value_length(column).to_pylist()
    ends = np.cumsum([width or 0 for width in widths])
    return [
        None if width is None else numbers[end - width : end] for width, end in zip(widths, ends.tolist(), strict=True)
    ]


def _looks_like_vector(cell: str) -> bool:
    try:
        vector = _parse_vector(cell, "")
    except ValueError:
        return False
    return vector is not None and len(vector) > 1


def _parse_vector(cell: str, where: str) -> np.ndarray | None:
    text = cell.strip()
    if not text:
        return None
    try:
        values = json.loads(text) if "," in text else text.strip("[]").split()
        return np.array([float(value) for value in values])
    except (ValueError, TypeError) as error:
        raise ValueError(f"{where}: expected numbers such as [0.1, 0.2], found {text[:40]!r}.") from error


def _numbered_columns(names: Sequence[str], prefix: str | None) -> list[str]:
    """Columns that are a prefix and 0, 1, 2 ... (or 1, 2, 3 ...), in that order; none if it is open which."""
    groups: dict[str, dict[int, str]] = {}
    for name in names:
        match = _NUMBERED.fullmatch(name)
        if match is not None:
            groups.setdefault(match[1], {})[int(match[2])] = name
    whole = {
        key: [group[number] for number in sorted(group)]
        for key, group in groups.items()
        if len(group) > 1 and max(group) - min(group) + 1 == len(group) and min(group) in (0, 1)
    }
    if prefix is not None:
        return whole.get(prefix, [])
    return next(iter(whole.values())) if len(whole) == 1 else []


def _which_column(path: Path, column: str | None, lists: Sequence[str]) -> ValueError:
    known = f"columns of vectors: {', '.join(lists)}" if lists else "no column of vectors, nor columns f0, f1, f2 ..."
    asked = "name the one that is meant" if column is None else f"`{column}` is none of them"
    return ValueError(f"{path}: it has {known}; {asked}, as in {path}::COLUMN.")


def _vector_folder(path: Path) -> Path | None:
    """The folder with a file per slide that holds one vector; `None` if there is none."""
    folders = [
        path,
        path / "embeddings",
        *sorted(path.glob("slide_features_*")),
        *sorted(path.glob("*/slide_features_*")),
    ]
    found = [folder for folder in folders if folder.is_dir() and _first_is_vector(folder)]
    if len(found) > 1:
        names = ", ".join(folder.relative_to(path).as_posix() for folder in found)
        raise ValueError(f"{path}: holds embeddings of several encoders ({names}); give one of these folders.")
    return found[0] if found else None


def _vector_files(folder: Path) -> list[Path]:
    files = (path for path in sorted(folder.iterdir()) if path.suffix.lower() in _VECTOR_FILES)
    return [path for path in files if path.is_file() and not path.name.startswith(".")]


def _first_is_vector(folder: Path) -> bool:
    for path in _vector_files(folder):
        try:
            return _read_one(path, None) is not None
        except ForeignFileError:
            continue  # a damaged file says nothing of its neighbours
    return False


def _of_vector_files(folder: Path, column: str | None, pool: str | None) -> Vectors:
    if column == TILE_FEATURES and pool is None:
        raise ValueError(f"{folder}: features of tiles are averaged only if asked for (--pool mean).")
    ids, vectors, left_out = [], [], []
    for path in _vector_files(folder):
        try:
            array = _read_one(path, column)
            if array is None:
                raise ForeignFileError(
                    "unreadable", f"{path.name}: holds no `{column or 'features'}` of a whole slide"
                )
        except ForeignFileError as error:
            left_out.append({"id": path.stem, "reason": error.reason, "message": str(error)})
            continue
        ids.append(path.stem)
        vectors.append(array)
    return ids, [""] * len(ids), vectors, left_out


def _read_one(path: Path, column: str | None) -> np.ndarray | None:
    """The vector of a slide, `None` if the file holds none; tile features `(N, D)` are averaged if named."""
    names = (column,) if column is not None else (_OWN_VECTOR, "features")
    array = _read_safetensors(path, names) if path.suffix.lower() == ".safetensors" else _read_hdf5(path, names)
    if array is None or not array.size:
        return None
    if column == TILE_FEATURES and array.ndim == 2:
        return array.mean(axis=0, dtype=np.float64)
    if array.ndim == 2 and len(array) == 1 and not _has_tiles(path):
        array = array[0]
    return array.astype(np.float64) if array.ndim == 1 else None


def _has_tiles(path: Path) -> bool:
    """Whether a file with one row of features says itself that they are those of a tile."""
    if path.suffix.lower() == ".safetensors" or path.parent.name.startswith("slide_features_"):
        return False
    with open_hdf5(path) as file:
        coords = find_dataset(file, "coords", path)
        return coords is not None and len(coords.shape or ()) > 1 and coords.shape[0] == 1


def _read_hdf5(path: Path, names: Sequence[str]) -> np.ndarray | None:
    with open_hdf5(path) as file:
        for name in names:
            dataset = find_dataset(file, name, path)
            if dataset is not None and len(dataset.shape or ()) in (1, 2):
                is_bag = len(dataset.shape) == 2 and dataset.shape[0] > 1 and name != TILE_FEATURES
                return None if is_bag else read_array(dataset, path)
    return None


def _read_safetensors(path: Path, names: Sequence[str]) -> np.ndarray | None:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="np") as file:
            name = next((name for name in names if name in file.keys()), None)  # noqa: SIM118 - not a mapping
            return None if name is None else file.get_tensor(name)
    except (SafetensorError, OSError, TypeError) as error:
        raise ForeignFileError("unreadable", f"{path.name}: cannot be read as safetensors ({error})") from error


def _of_tile_features(path: Path, pool: str | None) -> Vectors:
    """Means of the tile features that another tool computed."""
    from ..feature_files import open_feature_folder
    from ..foreign_features import iter_feature_bags

    folder = open_feature_folder(path)
    if pool is None:
        raise ValueError(
            f"{path}: holds features of tiles, not of slides. With --pool mean a slide's embedding is their mean; "
            "otherwise give embeddings of slides."
        )
    ids, vectors = [], []
    left_out = [_refusal(error) for error in folder.refused]
    for bag in iter_feature_bags(folder):
        if isinstance(bag, ValueError):
            left_out.append(_refusal(bag))
            continue
        ids.append(bag.slide_id)
        vectors.append(bag.tile_features.mean(axis=0, dtype=np.float64))
    return ids, [""] * len(ids), vectors, left_out


def _refusal(error: Any) -> dict[str, str]:
    return {"id": error.slide_id, "reason": error.reason, "message": str(error)}
