# SPDX-License-Identifier: Apache-2.0
"""Publishing a slide dataset: what goes out, what is refused, and the way to the stand-in Hub and back."""

import json
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from huggingface_hub import DatasetCard

from dre_slcl.hub.check_dataset import check_dataset
from dre_slcl.hub.gather import PublishError, gather_dataset
from dre_slcl.training.build_options import BuildOptions
from dre_slcl.training.dataset_tables import PAGE_BYTES
from dre_slcl.training.demo.slide_writer import write_slide
from modeling_dre_slcl.tile_grid import TileGridConfig

from .hub_server import HubServer, run_client
from .slide_cohort import build, write_cohort

TRAIN = "train-00000-of-00001.parquet"


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    root = tmp_path_factory.mktemp("publish")
    build(write_cohort(root / "cohort"), root / "dataset", stain="H&E", license_name="CC BY 4.0")
    return root / "dataset"


@pytest.fixture
def dataset(built, tmp_path):
    return shutil.copytree(built, tmp_path / "dataset")


def rewrite(dataset, name, change):
    """Changes a table by hand, and the sizes beside it, as someone who knows the format would."""
    table = change(pq.read_table(dataset / name))
    pq.write_table(table, dataset / name)
    info = json.loads((dataset / "dre_slcl_dataset.json").read_text())
    info["files"][name] = (dataset / name).stat().st_size
    (dataset / "dre_slcl_dataset.json").write_text(json.dumps(info))


def with_column(table, name, values):
    index = table.schema.get_field_index(name)
    return table.set_column(index, table.schema.field(index), pa.array(values, table.schema.field(index).type))


def findings(dataset):
    out = dataset.parent / "gathered"
    gather_dataset(dataset, out)
    return [str(finding) for finding in check_dataset(out)]


def test_a_fresh_dataset_may_go_out(dataset):
    assert findings(dataset) == []
    out = dataset.parent / "gathered"
    names = {path.relative_to(out).as_posix() for path in out.rglob("*") if not path.is_dir()}
    tables = {f"slides/{split}-00000-of-00001.parquet" for split in ("train", "val", "test")}
    tables |= {f"tiles/{split}-00000-of-00001.parquet" for split in ("train", "test")}
    assert names == tables | {"README.md", "dre_slcl_dataset.json", "previews/contact_sheet.jpg"}


def test_a_case_in_two_splits_is_refused(dataset):
    name = "slides/test-00000-of-00001.parquet"
    rewrite(dataset, name, lambda table: with_column(table, "case_id", ["c1", "c3"]))
    [finding] = findings(dataset)
    assert finding.startswith("slides: 1 cases are in two splits (c1)")


def test_a_slide_that_was_moved_to_another_file_is_refused(dataset):
    rewrite(dataset, f"slides/{TRAIN}", lambda table: with_column(table, "split", ["train", "train", "val", "train"]))
    complaints = findings(dataset)
    assert f"slides/{TRAIN}: holds slides of other splits (s1); run `dre-slcl tiles` again" in complaints
    assert any(text.startswith("slides: 1 cases are in two splits (c1)") for text in complaints)


def test_slides_that_are_there_twice_are_refused(dataset):
    rewrite(dataset, f"slides/{TRAIN}", lambda table: pa.concat_tables([table, table.slice(0, 1)]))
    assert findings(dataset) == ["slides: holds slides twice (s0); run `dre-slcl tiles` again"]


def test_tiles_that_are_not_those_of_the_slides_are_refused(dataset):
    rewrite(dataset, f"slides/{TRAIN}", lambda table: with_column(table, "num_tiles", [1, 0, 2, 3]))
    [finding] = findings(dataset)
    assert "the tiles of 3 slides of split 'train' are not those of `slides` (s0, s1, s2)" in finding


def test_row_groups_of_two_slides_are_refused(dataset):
    rewrite(dataset, f"tiles/{TRAIN}", lambda table: table)
    [finding] = findings(dataset)
    assert "not those of `slides` (s0, s1, s2, two slides in one row group)" in finding


@pytest.mark.parametrize("name", [f"slides/{TRAIN}", f"tiles/{TRAIN}"])
def test_torn_shards_are_refused(dataset, name):
    content = (dataset / name).read_bytes()
    (dataset / name).write_bytes(content[:-100])
    with pytest.raises(PublishError, match=rf"{name}: expected {len(content)} bytes, found {len(content) - 100}"):
        gather_dataset(dataset, dataset.parent / "gathered")
    (dataset / name).write_bytes(content[:-100] + bytes(100))  # torn on a disk that had given its size already
    [finding] = findings(dataset)
    assert finding.startswith(f"{name}: cannot be read (")


def test_missing_columns_and_local_paths_are_named(dataset):
    rewrite(dataset, f"slides/{TRAIN}", lambda table: table.drop_columns(["case_id"]))
    name = "slides/test-00000-of-00001.parquet"
    rewrite(dataset, name, lambda table: with_column(table, "path", ["/odd/s3.tif", "slides/gone.tif"]))
    complaints = findings(dataset)
    assert complaints[0] == f"slides/{TRAIN}: lacks the columns case_id; run `dre-slcl tiles` again"
    assert complaints[1].startswith(f"{name}: column `path` holds 1 paths of this machine")


@pytest.mark.parametrize("name", ["patients.xlsx", "slides/notes.txt", "tiles/train-00001-of-00002.parquet"])
def test_what_no_build_has_written_is_refused(dataset, name):
    (dataset / name).write_bytes(b"?")
    with pytest.raises(PublishError, match=f"holds {name}, which no build has written"):
        gather_dataset(dataset, dataset.parent / "gathered")


@pytest.mark.parametrize(
    ("info", "message"),
    [
        (None, "no finished slide dataset"),
        ({}, "names no `slides` table"),
        ({"files": {f"slides/{TRAIN}": 1}, "share": "1/2"}, "one machine's share"),
    ],
)
def test_unfinished_datasets_are_refused(dataset, info, message):
    path = dataset / "dre_slcl_dataset.json"
    path.unlink() if info is None else path.write_text(json.dumps(info))
    with pytest.raises(PublishError, match=message):
        gather_dataset(dataset, dataset.parent / "gathered")


def test_a_picture_that_the_card_shows_goes_out_with_it(dataset):
    out = dataset.parent / "gathered"
    assert out / "previews" / "contact_sheet.jpg" in gather_dataset(dataset, out)
    assert check_dataset(out) == []
    (dataset / "previews" / "contact_sheet.jpg").unlink()
    shutil.rmtree(out)
    [finding] = findings(dataset)
    assert finding.startswith("README.md: shows previews/contact_sheet.jpg, which is not there")
    assert not (out / "previews" / "s0.jpg").exists()


PUBLISH = """
import json, sys
from datasets import load_dataset
from dre_slcl_cli import main
from dre_slcl.hub.publish import PublishError, push_dataset_to_hub

dataset, leaking = sys.argv[1:]
published = push_dataset_to_hub(dataset, "tester/slides")
report = {"commit": published.commit, "status": main(["publish", "--dataset", dataset, "--repo", "tester/cli"])}
try:
    push_dataset_to_hub(leaking, "tester/leaking")
except PublishError as error:
    report["refused"] = str(error)
report["leaking"] = main(["publish", "--dataset", leaking, "--repo", "tester/leaking"])
report["loaded"], report["streamed"] = {}, {}
for name in ("slides", "tiles"):
    where = {"path": "tester/slides", "name": name, "revision": published.commit}
    key = "report" if name == "slides" else "tile_index"
    report["loaded"][name] = {split: rows[key][:] for split, rows in load_dataset(**where).items()}
    stream = load_dataset(**where, streaming=True)
    report["streamed"][name] = {split: [row[key] for row in rows] for split, rows in stream.items()}
    report[name] = {split: info.num_examples for split, info in stream["train"].info.splits.items()}
print(json.dumps(report))
"""


def test_published_both_ways_and_loaded_back(built, dataset, tmp_path):
    name = "slides/test-00000-of-00001.parquet"
    rewrite(dataset, name, lambda table: with_column(table, "case_id", ["c0", "c3"]))
    with HubServer(tmp_path / "hub") as server:
        printed = run_client(PUBLISH, server.environment(tmp_path / "home"), arguments=[built, dataset])
        report = json.loads(printed.splitlines()[-1])
        repository = server.repository("tester/slides", "dataset")
        card = DatasetCard(repository.read("main", "README.md").decode())
        assert not server.repository("tester/leaking", "dataset").exists
        assert server.repository("tester/cli", "dataset").files().keys() == repository.files().keys()
    assert report["commit"] == repository.resolve("main")
    assert (report["status"], report["leaking"]) == (0, 1)
    assert "1 cases are in two splits (c0)" in report["refused"]
    for name, key in (("slides", "report"), ("tiles", "tile_index")):
        expected = {}
        for split in ("train", "val", "test"):
            path = built / name / f"{split}-00000-of-00001.parquet"
            if path.is_file():
                expected[split] = pq.read_table(path)[key].to_pylist()
        assert report["loaded"][name] == report["streamed"][name] == expected
        assert report[name] == {split: len(rows) for split, rows in expected.items()}
    assert 'load_dataset("tester/slides", "tiles")' in card.text
    assert "path/or/repository" not in card.text
    assert (card.data.license, card.data.stain) == ("cc-by-4.0", "H&E")


def image_column(path, group=0):
    """What a file's end says of the images in a row group."""
    metadata = pq.read_metadata(path).row_group(group)
    return next(
        metadata.column(i) for i in range(metadata.num_columns) if metadata.column(i).path_in_schema == "image.bytes"
    )


def test_shards_are_made_for_the_hub(tmp_path):
    """Page index, images uncompressed, pages that end where the content says, shards of 500 MB by default."""
    (tmp_path / "slides").mkdir()
    for number in range(3):
        pixels = np.random.default_rng(number).integers([150, 60, 120], [220, 140, 200], (2048, 2048, 3))
        write_slide(tmp_path / "slides" / f"s{number}.svs", pixels.astype(np.uint8), mpp=0.5)
    assert BuildOptions().shard_bytes == 500 << 20
    build(tmp_path / "slides", tmp_path / "dataset", TileGridConfig(), shard_bytes=1 << 20)
    shards = sorted((tmp_path / "dataset" / "tiles").iterdir())
    assert [path.name for path in shards] == [f"train-{number:05d}-of-00003.parquet" for number in range(3)]
    for path in shards:
        metadata = pq.read_metadata(path)
        groups = [metadata.row_group(index) for index in range(metadata.num_row_groups)]
        columns = [group.column(i) for group in groups for i in range(group.num_columns)]
        assert all(column.has_offset_index for column in columns)
        # Least and greatest image would help nobody, and are too long to be kept.
        assert all(c.has_column_index for c in columns if not c.path_in_schema.startswith("image."))
        assert {c.compression for c in columns if c.path_in_schema == "image.bytes"} == {"UNCOMPRESSED"}
    # Where pages end is not told by pyarrow, but each costs a header: the sizes tell how they were cut.
    rows, sizes = pq.ParquetFile(shards[0]).read_row_group(0), {}
    for is_cut_by_content in (True, False):
        pq.write_table(
            rows,
            tmp_path / "again.parquet",
            compression="none",
            use_dictionary=False,
            write_page_index=True,
            use_content_defined_chunking=PAGE_BYTES if is_cut_by_content else False,
        )
        sizes[is_cut_by_content] = image_column(tmp_path / "again.parquet").total_compressed_size
    assert image_column(shards[0]).total_compressed_size == sizes[True] != sizes[False]
