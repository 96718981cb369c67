# SPDX-License-Identifier: Apache-2.0
"""Frozen tile features as a Hugging Face dataset: a row per slide, with the columns of a slide dataset's `slides`.

Beside those there are `encoder`, `source_format` and `tile_features`, a list of N lists of D numbers (float32). One
slide is in memory at a time, and a row group never spans two slides.
"""

import json
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
from tqdm.auto import tqdm

from modeling_dre_slcl.atomic_files import atomic_file, write_text
from modeling_dre_slcl.slide_info import SlideError

from .dataset_info import hash_json
from .dataset_tables import label_kinds
from .feature_files import FeatureFolder, open_feature_folder
from .foreign_features import FeatureBag, iter_feature_bags
from .manifest import ManifestRow

if TYPE_CHECKING:
    import datasets

logger = logging.getLogger(__name__)

FEATURE_COLUMNS = ("tile_features", "encoder", "source_format")
DEFAULT_SPLIT = "train"


def features_dataset(
    folder: str | Path,
    *,
    cache_dir: str | Path,
    encoder: str | None = None,
    width: int | None = None,
    manifest: Sequence[ManifestRow] | None = None,
    isolated: bool = False,
    progress: bool = True,
) -> "datasets.Dataset":
    """Returns the tile features of a folder as a dataset that is memory-mapped from `cache_dir`.

    The cache is made slide by slide on the first call, and again when a feature file or an argument has changed.
    Refused slides are logged on every call and listed in a `.refused.jsonl` file beside the cache.

    Args:
        folder (`str` or `Path`): features of TRIDENT, CLAM, AtlasPatch, STAMP or slide2vec.
        cache_dir (`str` or `Path`): folder for the cache.
        encoder (`str`, *optional*), width (`int`, *optional*): which features; see `open_feature_folder`.
        manifest (`Sequence[ManifestRow]`, *optional*): the slides wanted, with case, split, report, labels and mpp.
        isolated (`bool`, *optional*, defaults to `False`): read in another process; see `open_feature_folder`.
        progress (`bool`, *optional*, defaults to `True`): show a progress bar if the output is a terminal.

    Returns:
        `datasets.Dataset`: a row per usable slide; `with_format("numpy")` gives `tile_features` as (N, D) float32.

    Raises:
        ValueError: see `open_feature_folder`, or if no slide can be used.
        FileNotFoundError: if there is no such folder.
    """
    import datasets

    slides = FeatureSlides(folder, encoder=encoder, width=width, manifest=manifest, isolated=isolated)
    path = Path(cache_dir) / f"features-{slides.key[:16]}.arrow"
    refused_path = path.with_suffix(".refused.jsonl")
    if not (path.is_file() and refused_path.is_file()):
        with atomic_file(path) as temporary, pa.OSFile(str(temporary), "wb") as sink:
            with pa.ipc.new_stream(sink, slides.schema) as writer:
                for table in slides.iter_tables(progress=progress):
                    writer.write_table(table)
            slides.require_some()
        write_text(refused_path, refused_lines(slides.refused))
    for line in refused_path.read_text(encoding="utf-8").splitlines():
        logger.warning("Slide is refused: %s", line)
    return datasets.Dataset.from_file(str(path))


def refused_lines(refused: Iterable[SlideError]) -> str:
    """Returns the content of `refused.jsonl`: one JSON object per refused slide."""
    rows = ({"slide_id": error.slide_id, "reason": error.reason, "message": error.message} for error in refused)
    return "".join(json.dumps(row) + "\n" for row in rows)


def feature_columns(width: int, labels: Iterable[Mapping[str, Any]]) -> "datasets.Features":
    """Returns the columns of the dataset.

    Args:
        width (`int`): D.
        labels (`Iterable[Mapping[str, Any]]`): the labels of all slides; they become columns.
    """
    import datasets

    texts = dict.fromkeys(("slide_id", "case_id", "split", "path", "encoder", "source_format"), "string")
    numbers = {"mpp": "float64", "tile_size_px": "int32", "tile_mpp": "float64", "tile_size_level0_px": "int32"}
    kinds = {**texts, **numbers, "num_tiles": "int32", "report": "string", **label_kinds(labels)}
    columns = {name: datasets.Value(kind) for name, kind in kinds.items()}
    columns.update(status=datasets.Value("string"), reason=datasets.Value("string"))
    columns["tile_xy"] = datasets.List(datasets.List(datasets.Value("int32"), length=2))
    columns["tile_features"] = datasets.List(datasets.List(datasets.Value("float32"), length=width))
    return datasets.Features(columns)


class FeatureSlides:
    """The slides of a feature folder, joined with a manifest, as one-row tables.

    Args:
        folder (`str` or `Path`): the features.
        encoder (`str`, *optional*), width (`int`, *optional*): which features; see `open_feature_folder`.
        manifest (`Sequence[ManifestRow]`, *optional*): the slides wanted; without it every slide is its own case in
            the split "train".
        isolated (`bool`, *optional*, defaults to `False`): read in another process; see `open_feature_folder`.

    Attributes:
        folder (`FeatureFolder`): the files.
        schema (`pyarrow.Schema`): of the tables.
        key (`str`): hash of everything that the tables depend on.
        refused (`list[SlideError]`): slides that cannot be used, complete when all tables were made.
        num_tiles (`int`), num_slides (`int`): of the tables made so far.

    Raises:
        ValueError: see `open_feature_folder`, or if a label has the name of a column.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        encoder: str | None = None,
        width: int | None = None,
        manifest: Sequence[ManifestRow] | None = None,
        isolated: bool = False,
    ) -> None:
        self._isolated = isolated
        self._rows = None if manifest is None else {row.slide_id: row for row in manifest}
        self.folder: FeatureFolder = open_feature_folder(
            folder, encoder=encoder, width=width, slide_ids=self._rows, isolated=isolated
        )
        labels = [row.labels for row in (self._rows or {}).values()]
        taken = sorted({name for row in labels for name in row} & set(FEATURE_COLUMNS))
        if taken:
            raise ValueError(f"Label columns must not be called {taken}; rename them.")
        self.schema: pa.Schema = feature_columns(self.folder.width, labels).arrow_schema
        self.refused = list(self.folder.refused)
        known = {file.slide_id for file in self.folder.files} | {error.slide_id for error in self.refused}
        for slide_id in sorted(set(self._rows or {}) - known):
            self.refused.append(SlideError(slide_id, "not_a_file", "the manifest's slide has no feature file"))
        self.num_tiles = self.num_slides = 0

    @property
    def key(self) -> str:
        """Hash of the files' names, sizes and times, of what was taken from them, and of the manifest."""
        files = [[str(f.path), f.dataset, *_size_and_time(f.path), f.encoder] for f in self.folder.files]
        rows = [
            [row.slide_id, row.stored_path, row.case_id, row.mpp, row.report, row.split, row.labels]
            for row in (self._rows or {}).values()
        ]
        return hash_json([files, rows, [str(error) for error in self.refused], str(self.schema)])

    def iter_tables(self, *, progress: bool = True) -> Iterator[pa.Table]:
        """Yields a table of one row for each usable slide, in the order of the ids; the others go to `refused`."""
        mpp = {slide_id: row.mpp for slide_id, row in (self._rows or {}).items() if row.mpp is not None}
        bags = iter_feature_bags(self.folder, mpp=mpp, isolated=self._isolated)
        hidden = None if progress else True  # None: hidden unless the output is a terminal
        for bag in tqdm(bags, total=len(self.folder.files), unit="slide", disable=hidden):
            if isinstance(bag, SlideError):
                self.refused.append(bag)
                continue
            self.num_slides += 1
            self.num_tiles += len(bag.tile_features)
            yield self._table(bag)

    def require_some(self) -> None:
        """Checks that at least one table was made.

        Raises:
            ValueError: with the reasons of the refused slides.
        """
        if not self.num_slides:
            reasons = "; ".join(str(error) for error in self.refused[:5])
            raise ValueError(f"None of {len(self.refused)} slides has usable features: {reasons}.")

    def _table(self, bag: FeatureBag) -> pa.Table:
        row = None if self._rows is None else self._rows[bag.slide_id]
        values = {
            "slide_id": bag.slide_id,
            "case_id": bag.slide_id if row is None else row.case_id,
            "split": DEFAULT_SPLIT if row is None else row.split or DEFAULT_SPLIT,
            "path": None if row is None else row.stored_path,
            "encoder": bag.encoder,
            "source_format": bag.source_format,
            "mpp": bag.mpp,
            "tile_size_px": bag.tile_size_px,
            "tile_mpp": bag.tile_mpp,
            "tile_size_level0_px": bag.tile_size_level0_px,
            "num_tiles": len(bag.tile_features),
            "report": "" if row is None else row.report,
            **({} if row is None else row.labels),
            "status": "ok",
            "reason": "",
        }
        arrays = {"tile_xy": bag.tile_xy, "tile_features": bag.tile_features}
        columns = [
            _one_row(arrays[name]) if name in arrays else pa.array([values.get(name)]) for name in self.schema.names
        ]
        columns = [column.cast(field.type) for column, field in zip(columns, self.schema, strict=True)]
        return pa.table(columns, schema=self.schema)


def _one_row(values: np.ndarray | None) -> pa.Array:
    """Returns one row that holds an array (n, d), without a detour over Python numbers; an empty row for `None`."""
    if values is None:
        return pa.array([None], type=pa.list_(pa.list_(pa.int32(), 2)))
    rows = pa.FixedSizeListArray.from_arrays(pa.array(values.reshape(-1)), values.shape[1])
    return pa.ListArray.from_arrays(pa.array([0, len(values)], type=pa.int32()), rows)


def _size_and_time(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_size, status.st_mtime_ns
