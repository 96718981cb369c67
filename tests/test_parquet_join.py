# SPDX-License-Identifier: Apache-2.0
"""Joined Parquet files, against what pyarrow reads from and writes to them."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dre_slcl.training import parquet_join
from dre_slcl.training.arrow_columns import join_strings
from dre_slcl.training.dataset_tables import TILE_SCHEMA, TileTableWriter
from dre_slcl.training.parquet_join import join_tables, slice_table
from dre_slcl.training.thrift_compact import decode_struct, encode_struct


def write_table(path, slide_id, num_groups, *, tile_bytes=3000):
    """A tile table with several pages in a row group."""
    rng = np.random.default_rng(len(slide_id))
    with TileTableWriter(path, TILE_SCHEMA) as writer:
        for group in range(num_groups):
            corners = rng.integers(0, 1 << 30, size=(500 + group, 2), dtype=np.int32)
            writer.write_group(slide_id, 1000 * group, corners, join_strings([rng.bytes(tile_bytes) for _ in corners]))
    return path


@pytest.fixture(scope="module")
def tables(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tables")
    return [write_table(folder / f"{name}.parquet", name, n) for name, n in (("a", 3), ("bb", 1), ("ccc", 20))]


def test_a_whole_table_stays_the_same_bytes(tables, tmp_path):
    for path in tables:
        join_tables(tmp_path / "joined.parquet", [slice_table(path)])
        assert (tmp_path / "joined.parquet").read_bytes() == path.read_bytes()


@pytest.mark.parametrize("in_kernel", [True, False])
def test_rows_and_pages_are_those_of_the_tables(tables, tmp_path, in_kernel, monkeypatch):
    if not in_kernel:
        monkeypatch.delattr(parquet_join.os, "copy_file_range", raising=False)
    slices = [slice_table(tables[0], [2, 0]), slice_table(tables[1]), slice_table(tables[2], range(5, 20))]
    assert [piece.is_whole for piece in slices] == [False, True, False]
    target = tmp_path / "joined.parquet"
    join_tables(target, slices)
    expected = pa.concat_tables(pq.ParquetFile(s.path).read_row_groups(list(s.groups)) for s in slices)
    with pq.ParquetFile(target) as joined:
        assert joined.read().equals(expected)
        assert joined.metadata.num_rows == len(expected)
        assert joined.schema_arrow.equals(TILE_SCHEMA, check_metadata=True)
        assert joined.metadata.num_row_groups == 2 + 1 + 15
        assert joined.metadata.row_group(3).column(4).has_offset_index
    # A filter makes pyarrow's dataset reader skip by statistics, which must belong to the right groups.
    found = pq.read_table(target, filters=[("slide_id", "=", "bb"), ("tile_index", "<", 7)])
    assert found.equals(pq.read_table(tables[1]).slice(0, 7))
    sizes = [slice_table(path).num_bytes for path in tables]
    assert slice_table(target).num_bytes == sum(s.num_bytes for s in slices) < sum(sizes)


def test_page_offsets_point_at_pages(tables, tmp_path):
    """Every place of an offset index is the start of a page header that says the size that the index says."""
    target = tmp_path / "joined.parquet"
    join_tables(target, [slice_table(tables[1]), slice_table(tables[0])])
    content = target.read_bytes()
    footer = decode_struct(content[-8 - int.from_bytes(content[-8:-4], "little") : -8])
    num_pages = 0
    for group in footer[4][1][1]:
        for column in group[1][1][1]:
            start, length = column[4][1], column[5][1]
            for location in decode_struct(content[start : start + length])[1][1][1]:
                offset, size = location[1][1], location[2][1]
                header = decode_struct(content[offset : offset + size])
                assert header[1][1] in (0, 3)  # a data page, version 1 or 2
                assert len(encode_struct(header)) + header[3][1] == size
                num_pages += 1
    assert num_pages > 4 * 5


def test_taking_apart_gives_the_tables_back(tables, tmp_path):
    join_tables(tmp_path / "joined.parquet", [slice_table(path) for path in tables])
    join_tables(tmp_path / "c.parquet", [slice_table(tmp_path / "joined.parquet", range(4, 24))])
    assert (tmp_path / "c.parquet").read_bytes() == tables[2].read_bytes()


def test_what_cannot_be_joined_is_refused(tables, tmp_path):
    pq.write_table(pa.table({"x": [1]}), tmp_path / "other.parquet")
    with pytest.raises(ValueError, match="its columns are not those of"):
        join_tables(tmp_path / "out", [slice_table(tables[0]), slice_table(tmp_path / "other.parquet")])
    (tmp_path / "torn.parquet").write_bytes(tables[0].read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"torn\.parquet: expected a whole Parquet file"):
        slice_table(tmp_path / "torn.parquet")
    with pytest.raises(ValueError, match="nothing to join"):
        join_tables(tmp_path / "out", [])
    with pytest.raises(ValueError, match="end in the midst"):
        decode_struct(b"\x15")
