# SPDX-License-Identifier: Apache-2.0
"""Streaming: every tile once over all ranks and workers, slides whole, only the bytes that are needed."""

import json
from collections import Counter
from itertools import pairwise
from pathlib import Path

import cv2
import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from torch.utils.data import DataLoader

from dre_slcl.training import tile_stream
from dre_slcl.training.tile_stream import find_slides, share_slides, stream_tiles

from .hub_server import HubServer, run_client

SIZES = [7, 23, 4, 12, 1, 18, 9, 5, 14]  # tiles of slides s0, s1, ...
SHARDS = [[0, 1, 2], [3], [4, 5, 6, 7, 8]]
FEATURES = datasets.Features(
    {name: datasets.Value("int32") for name in ("tile_index", "x", "y")}
    | {"slide_id": datasets.Value("string"), "image": datasets.Image()}
)
CARD = """---
license: other
configs:
- config_name: tiles
  default: true
  data_files: [{split: train, path: "tiles/train-*.parquet"}]
---
"""


def jpeg(slide, tile):
    """A tile of about 20 kB that tells by its first and last pixels which it is."""
    pixels = np.random.default_rng(0).integers(0, 255, (96, 96, 3), dtype=np.uint8)
    pixels[:16, :16] = 8 * slide + 40
    pixels[-16:, -16:] = 5 * tile + 60
    return cv2.imencode(".jpg", pixels, [cv2.IMWRITE_JPEG_QUALITY, 100])[1].tobytes()


def tile_row(slide, tile):
    image = {"bytes": jpeg(slide, tile), "path": None}
    return {"slide_id": f"s{slide}", "tile_index": tile, "x": 16 * tile, "y": 0, "image": image}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A dataset of 9 slides in 3 files, with row groups of at most 5 tiles."""
    root = tmp_path_factory.mktemp("stream") / "dataset"
    (root / "tiles").mkdir(parents=True)
    (root / "README.md").write_text(CARD)
    for number, shard in enumerate(SHARDS):
        path = root / "tiles" / f"train-{number:05d}-of-{len(SHARDS):05d}.parquet"
        options = {"compression": "none", "use_dictionary": ["slide_id"]}
        with pq.ParquetWriter(path, FEATURES.arrow_schema, **options) as writer:
            for slide in shard:
                rows = [tile_row(slide, tile) for tile in range(SIZES[slide])]
                for start in range(0, len(rows), 5):
                    writer.write_table(pa.Table.from_pylist(rows[start : start + 5], schema=FEATURES.arrow_schema))
    return root


def names(rows):
    return [(row["slide_id"], row["tile_index"]) for row in rows]


EVERY_TILE = {(f"s{slide}", tile) for slide, size in enumerate(SIZES) for tile in range(size)}


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
@pytest.mark.parametrize("num_workers", [0, 2])
def test_every_tile_once_and_slides_whole(folder, world_size, num_workers):
    seen, slides_of = Counter(), []
    for rank in range(world_size):
        stream = stream_tiles(folder, rank=rank, world_size=world_size, columns=["slide_id", "tile_index"])
        loader = DataLoader(stream, batch_size=None, num_workers=num_workers)
        rows = names(loader)
        seen.update(rows)
        slides_of.append({slide for slide, _ in rows})
        for slide in slides_of[-1]:
            assert [tile for name, tile in rows if name == slide] == list(range(SIZES[int(slide[1:])]))
    assert set(seen) == EVERY_TILE
    assert set(seen.values()) == {1}
    assert sum(map(len, slides_of)) == len(SIZES)
    totals = [sum(SIZES[int(slide[1:])] for slide in slides) for slides in slides_of]
    assert max(totals) - min(totals) <= 3  # 93 tiles in slides of up to 23


def test_a_worker_has_whole_slides(folder):
    stream = stream_tiles(folder, columns=["slide_id"])
    batches = list(DataLoader(stream, batch_size=1, num_workers=2, collate_fn=lambda rows: rows[0]["slide_id"]))
    first = batches[0]
    workers = [set(batches[0 : 2 * SIZES[0] : 2]), set(batches[1 : 2 * SIZES[0] : 2])]
    assert first == "s0"
    assert not workers[0] & workers[1]


def test_pixels_are_those_of_the_tile(folder):
    rows = list(stream_tiles(folder, rank=1, world_size=3))
    assert len(rows) > 25
    for row in rows:
        pixels = np.asarray(row["image"])
        slide, tile = int(row["slide_id"][1:]), row["tile_index"]
        assert abs(int(pixels[0, 0, 0]) - (8 * slide + 40)) <= 1
        assert abs(int(pixels[-1, -1, 1]) - (5 * tile + 60)) <= 1
        assert (row["x"], row["y"]) == (16 * tile, 0)


def test_order_is_a_function_of_seed_and_epoch(folder):
    def order(**options):
        return list(dict.fromkeys(name for name, _ in names(stream_tiles(folder, columns=None, **options))))

    plain = [f"s{slide}" for slide in range(len(SIZES))]
    assert order() == plain
    assert order(shuffle_seed=1) == order(shuffle_seed=1) != plain
    assert len({tuple(order(shuffle_seed=seed, epoch=epoch)) for seed in (1, 2) for epoch in (0, 1)}) == 4
    shuffled = [order(shuffle_seed=1, rank=rank, world_size=2) for rank in (0, 1)]
    assert sorted(shuffled[0] + shuffled[1]) == plain


@pytest.mark.parametrize("read", [0, 1, 30, 46])
def test_a_stream_goes_on_where_it_was(folder, read):
    options = {"rank": 0, "world_size": 2, "shuffle_seed": 5, "columns": ["slide_id", "tile_index"]}
    whole = names(stream_tiles(folder, **options))
    stream = stream_tiles(folder, **options)
    rows = iter(stream)
    start = names([next(rows) for _ in range(read)])
    state = json.loads(json.dumps(stream.state_dict()))
    resumed = stream_tiles(folder, **options)
    resumed.load_state_dict(state)
    assert start + names(resumed) == whole


def test_a_shuffle_buffer_mixes_slides_and_loses_nothing(folder):
    stream = stream_tiles(folder, columns=["slide_id", "tile_index"]).shuffle(seed=0, buffer_size=40)
    rows = names(stream)
    assert sorted(rows) == sorted(EVERY_TILE)
    assert sum(one[0] != other[0] for one, other in pairwise(rows)) > 40


def test_shares_are_balanced():
    random = np.random.default_rng(0)
    for world_size in (2, 3, 8):
        sizes = random.integers(1, 5000, 60).tolist()
        shares = share_slides(sizes, world_size)
        assert sorted(place for share in shares for place in share) == list(range(60))
        totals = [sum(sizes[place] for place in share) for share in shares]
        assert max(totals) < 1.02 * sum(sizes) / world_size


def test_only_the_row_groups_of_a_rank_are_read(folder, monkeypatch):
    spans = []

    class Counting:
        def __init__(self, handle, file):
            self.handle, self.file = handle, file

        def read(self, size=-1):
            start = self.handle.tell()
            data = self.handle.read(size)
            spans.append((self.file, start, start + len(data)))
            return data

        def __getattr__(self, name):
            return getattr(self.handle, name)

    real = pa.PythonFile
    monkeypatch.setattr(
        tile_stream.pa, "PythonFile", lambda handle, mode: real(Counting(handle, handle.name), mode=mode)
    )
    stream = stream_tiles(folder, rank=2, world_size=4)
    spans.clear()
    mine = {row["slide_id"] for row in stream}
    slides = find_slides(sorted(map(str, (folder / "tiles").iterdir())))
    chunks = [image_chunk(*group) for slide in slides if slide.slide_id not in mine for group in slide.row_groups]
    assert 5 < len(chunks) < sum(len(slide.row_groups) for slide in slides)
    for file, start, stop in chunks:
        # A file's end is looked for in its last 64 KiB, whatever they are.
        stop = min(stop, Path(file).stat().st_size - 65536)
        assert not any(name == file and begin < stop and start < end for name, begin, end in spans)


def image_chunk(file, index):
    """Where the images of a row group are: file, first byte, byte after the last."""
    group = pq.read_metadata(file).row_group(index)
    columns = {group.column(i).path_in_schema: group.column(i) for i in range(group.num_columns)}
    start = columns["image.bytes"].data_page_offset
    return file, start, start + columns["image.bytes"].total_compressed_size


def test_what_cannot_be_dealt_out_is_refused(folder, tmp_path):
    with pytest.raises(ValueError, match="9 slides with tiles, which 10 processes cannot share"):
        stream_tiles(folder, world_size=10)
    with pytest.raises(ValueError, match=r"rank: expected 0 to 1 .* found 2"):
        stream_tiles(folder, rank=2, world_size=2)
    with pytest.raises(ValueError, match=r"no split 'val', only \['train'\]"):
        stream_tiles(folder, "val")
    with pytest.raises(ValueError, match=r"no columns \['img'\], only \['image'"):
        stream_tiles(folder, columns=["img"])
    mixed = tmp_path / "mixed"
    (mixed / "tiles").mkdir(parents=True)
    (mixed / "README.md").write_text(CARD)
    tables = [pq.read_table(path) for path in sorted((folder / "tiles").iterdir())]
    pq.write_table(pa.concat_tables(tables), mixed / "tiles" / "train-00000-of-00001.parquet")
    with pytest.raises(ValueError, match="row group 0 does not say that its tiles are of one slide"):
        stream_tiles(mixed)
    coordinates = tmp_path / "coordinates"
    (coordinates / "slides").mkdir(parents=True)
    pq.write_table(pa.table({"slide_id": ["s0"]}), coordinates / "slides" / "train-0.parquet")
    (coordinates / "README.md").write_text(CARD.replace("tiles", "slides"))
    with pytest.raises(ValueError, match="no pixels; read them from the slides"):
        stream_tiles(coordinates)


UPLOAD = """
import sys
from huggingface_hub import HfApi
HfApi().create_repo("tester/tiles", repo_type="dataset")
HfApi().upload_folder(repo_id="tester/tiles", repo_type="dataset", folder_path=sys.argv[1])
"""

STREAM = """
import json, os, sys
from huggingface_hub import HfFileSystemFile
from torch.utils.data import DataLoader
from dre_slcl.training.tile_stream import find_files, find_slides, stream_tiles

fetched = 0
fetch = HfFileSystemFile._fetch_range
def counting(self, start, end):
    global fetched
    fetched += end - start
    return fetch(self, start, end)
HfFileSystemFile._fetch_range = counting

report = {}
for world_size in (1, 2, 3, 4):
    for num_workers in (0, 2):
        rows = []
        for rank in range(world_size):
            stream = stream_tiles("tester/tiles", rank=rank, world_size=world_size, columns=["slide_id", "tile_index"])
            rows += [[rank, r["slide_id"], r["tile_index"]]
                     for r in DataLoader(stream, batch_size=None, num_workers=num_workers)]
        report[f"{world_size} {num_workers}"] = rows
stream = stream_tiles("tester/tiles", rank=1, world_size=4)
fetched = 0
report["slides"] = sorted({row["slide_id"] for row in stream})
report["fetched"] = fetched
report["cached"] = [name for _, _, names in os.walk(os.environ["HF_HOME"]) for name in names if "parquet" in name]
print(json.dumps(report))
"""


def test_from_the_hub(folder, tmp_path):
    with HubServer(tmp_path / "hub") as server:
        run_client(UPLOAD, server.environment(tmp_path / "author"), arguments=[folder])
        report = json.loads(run_client(STREAM, server.environment(tmp_path / "home")).splitlines()[-1])
    for world_size in (1, 2, 3, 4):
        for num_workers in (0, 2):
            rows = report[f"{world_size} {num_workers}"]
            assert sorted((slide, tile) for _, slide, tile in rows) == sorted(EVERY_TILE)
            assert len({(rank, slide) for rank, slide, _ in rows}) == len(SIZES)
    files = sorted(map(str, (folder / "tiles").iterdir()))
    needed, footers = 0, len(report["slides"])
    for slide in find_slides(files):
        if slide.slide_id in report["slides"]:
            for file, index in slide.row_groups:
                group = pq.read_metadata(file).row_group(index)
                needed += sum(group.column(i).total_compressed_size for i in range(group.num_columns))
    assert needed <= report["fetched"] <= needed + footers * 65536
    assert report["fetched"] < 0.5 * sum(Path(file).stat().st_size for file in files)
    assert report["cached"] == []
