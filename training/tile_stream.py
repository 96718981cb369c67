# SPDX-License-Identifier: Apache-2.0
"""Streams the tiles of a slide dataset to many processes, each slide whole to one of them.

What a Parquet file tells of its row groups (their slide, their number of rows) is enough to deal slides out: a row
group never holds two slides. Each process then reads the row groups of its own slides and no others, so nothing is
downloaded twice. Who gets which slide is a function of (dataset, world size, seed, epoch) alone.
"""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
from fsspec.core import url_to_fs

from .dataset_files import find_files, has_configuration
from .sampler import generator

_FOOTERS_AT_ONCE = 16
_ROWS_AT_ONCE = 64


@dataclass(frozen=True)
class StreamedSlide:
    """Where the tiles of one slide are.

    Args:
        slide_id (`str`): its name.
        num_tiles (`int`): its tiles.
        row_groups (`tuple`): (file, row group) of its tiles, in order.
    """

    slide_id: str
    num_tiles: int
    row_groups: tuple[tuple[str, int], ...]


def stream_tiles(
    dataset: str | Path,
    split: str = "train",
    *,
    rank: int = 0,
    world_size: int = 1,
    shuffle_seed: int | None = None,
    epoch: int = 0,
    columns: Sequence[str] | None = None,
) -> datasets.IterableDataset:
    """Streams this process's share of the tiles of a split, slide by slide, without keeping them on disk.

    Over all ranks every tile comes exactly once, and all tiles of a slide come to one rank and there to one
    `DataLoader` worker, in order. Ranks differ by at most the tiles of the largest slide. What is streamed can be
    resumed (`state_dict`, `load_state_dict`), and mixed further by `.shuffle(seed=..., buffer_size=...)`. Hand it to a
    plain `DataLoader`: `Accelerator.prepare` would divide it once more.

    Args:
        dataset (`str` or `Path`): folder or Hub repository of a slide dataset with pixels.
        split (`str`, defaults to `"train"`): its split.
        rank (`int`, defaults to 0): number of this process.
        world_size (`int`, defaults to 1): number of processes.
        shuffle_seed (`int`, *optional*): puts slides in a random order; by default the dataset's.
        epoch (`int`, defaults to 0): with a seed, another epoch is another order.
        columns (sequence of `str`, *optional*): columns to read; by default all.

    Returns:
        `datasets.IterableDataset`: rows of `tiles`; one shard for each slide.

    Raises:
        ValueError: if the dataset has no pixels or no such split or column, a row group holds two slides, `rank` is
            not one of `world_size`, or there are fewer slides than processes.
    """
    if not 0 <= rank < world_size:
        raise ValueError(f"rank: expected 0 to {world_size - 1} for a world_size of {world_size}, found {rank}.")
    if not has_configuration(dataset, "tiles"):
        raise ValueError(
            f"{dataset}: stores tile coordinates but no pixels; read them from the slides (`TileSource`)."
        )
    files = list(find_files(dataset, "tiles", split))
    features = _read_features(files[0], columns)
    slides = find_slides(files)
    if len(slides) < world_size:
        raise ValueError(
            f"{dataset}: split '{split}' has {len(slides)} slides with tiles, which {world_size} processes cannot "
            f"share, because a slide goes whole to one of them; start at most {len(slides)}."
        )
    if shuffle_seed is not None:
        order = generator(shuffle_seed, "stream", epoch).permutation(len(slides))
        slides = [slides[place] for place in order]
    mine = [slides[place] for place in share_slides([slide.num_tiles for slide in slides], world_size)[rank]]
    return datasets.IterableDataset.from_generator(
        _read_slides,
        features=features,
        gen_kwargs={"slides": mine, "columns": tuple(features)},
        split=datasets.NamedSplit(split),
    )


def share_slides(num_tiles: Sequence[int], world_size: int) -> list[list[int]]:
    """Shares slides among processes so that their tiles are balanced: the largest first, each to the emptiest share.

    Args:
        num_tiles (sequence of `int`): tiles of each slide.
        world_size (`int`): number of processes.

    Returns:
        `list` of `list` of `int`: the slides of each process, in the given order.
    """
    shares: list[list[int]] = [[] for _ in range(world_size)]
    filled = [0] * world_size
    for place in sorted(range(len(num_tiles)), key=lambda place: -num_tiles[place]):
        emptiest = filled.index(min(filled))
        shares[emptiest].append(place)
        filled[emptiest] += num_tiles[place]
    return [sorted(share) for share in shares]


def find_slides(files: Sequence[str]) -> list[StreamedSlide]:
    """Finds the row groups of every slide from the ends of Parquet files, without reading any tile.

    Args:
        files (sequence of `str`): paths, or addresses that begin with `hf://`.

    Raises:
        ValueError: if a row group holds tiles of two slides.
    """
    with ThreadPoolExecutor(_FOOTERS_AT_ONCE, thread_name_prefix="footers") as executor:
        footers = list(executor.map(_read_footer, files))
    counts: dict[str, int] = {}
    groups: dict[str, list[tuple[str, int]]] = {}
    for file, footer in zip(files, footers, strict=True):
        for index in range(footer.num_row_groups):
            slide_id = _slide_of(footer.row_group(index), f"{file}: row group {index}")
            counts[slide_id] = counts.get(slide_id, 0) + footer.row_group(index).num_rows
            groups.setdefault(slide_id, []).append((file, index))
    return [StreamedSlide(slide_id, counts[slide_id], tuple(where)) for slide_id, where in groups.items()]


def _read_footer(file: str) -> pq.FileMetaData:
    with _open(file) as handle:
        return pq.read_metadata(handle)


def _slide_of(group: pq.RowGroupMetaData, where: str) -> str:
    """Returns the slide that all tiles of a row group belong to, by the group's statistics."""
    columns = [group.column(index) for index in range(group.num_columns)]
    found = next((column.statistics for column in columns if column.path_in_schema == "slide_id"), None)
    if found is None or not found.has_min_max or found.min != found.max or found.null_count:
        raise ValueError(
            f"{where} does not say that its tiles are of one slide; write the dataset with `dre-slcl tiles`, whose "
            "row groups never hold two slides."
        )
    return found.min


def _read_features(file: str, columns: Sequence[str] | None) -> datasets.Features:
    with _open(file) as handle:
        features = datasets.Features.from_arrow_schema(pq.read_schema(handle))
    unknown = sorted(set(columns or ()) - set(features))
    if unknown:
        raise ValueError(f"{file}: has no columns {unknown}, only {sorted(features)}.")
    return datasets.Features({name: kind for name, kind in features.items() if columns is None or name in columns})


def _read_slides(slides: Sequence[StreamedSlide], columns: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Yields the rows of slides; of a row group only the wanted columns are read."""
    for slide in slides:
        for file, row_groups in groupby(slide.row_groups, key=itemgetter(0)):
            with _open(file) as handle, pq.ParquetFile(handle, pre_buffer=True) as table:
                # One by one: all that are asked for at once are held in memory.
                for _, index in row_groups:
                    for batch in table.iter_batches(_ROWS_AT_ONCE, row_groups=[index], columns=list(columns)):
                        yield from batch.to_pylist()


@contextmanager
def _open(file: str) -> Iterator[Any]:
    """Opens a file here or on the Hub; of one on the Hub exactly the bytes that are asked for are downloaded."""
    system, path = url_to_fs(file)
    options = {"cache_type": "none"} if file.startswith("hf://") else {}
    with system.open(path, "rb", **options) as handle, pa.PythonFile(handle, mode="r") as wrapped:
        yield wrapped
