# SPDX-License-Identifier: Apache-2.0
"""Shares of a manifest, built apart and joined, against one build of the whole."""

import shutil

import pytest

from dre_slcl.training.join_datasets import join_datasets
from dre_slcl.training.manifest import ManifestRow, read_manifest
from dre_slcl.training.manifest_shares import divide_manifest, parse_share

from .slide_cohort import build, parquet_hashes, write_cohort


@pytest.fixture(scope="module")
def manifest(tmp_path_factory):
    manifest = write_cohort(tmp_path_factory.mktemp("cohort"))
    slides = manifest.parent / "slides"
    shutil.copy(slides / "s1.tif", slides / "again.tif")  # the same slide twice, for two machines to find
    manifest.write_text(manifest.read_text() + "again,slides/again.tif,c9,,test,benign,,50,3\n")
    return manifest


@pytest.fixture(scope="module")
def shares(manifest, tmp_path_factory):
    folder = tmp_path_factory.mktemp("shares")
    for index in (1, 2, 3):
        build(manifest, folder / str(index), share=(index, 3))
    return [folder / str(index) for index in (1, 2, 3)]


def same_files(first, second):
    names = ["refused.jsonl", *(f"previews/s{i}.jpg" for i in range(4)), *(f"thumbnails/s{i}.jpg" for i in range(4))]
    assert parquet_hashes(first) == parquet_hashes(second)
    for name in names:
        assert (first / name).read_bytes() == (second / name).read_bytes(), name
    card = [(out / "README.md").read_text() for out in (first, second)]
    assert card[0].replace(first.name, second.name) == card[1]


def test_joined_shares_are_one_build(manifest, shares, tmp_path):
    whole = build(manifest, tmp_path / "whole")
    joined = join_datasets([shares[2], shares[0], shares[1]], tmp_path / "joined")
    same_files(tmp_path / "joined", tmp_path / "whole")
    for name in ("num_slides", "num_ok", "num_tiles", "refused_by_reason", "tiles_per_split", "exit_code"):
        assert getattr(joined, name) == getattr(whole, name)
    assert whole.refused_by_reason["duplicate_id"] == 1
    assert join_datasets(shares, tmp_path / "joined").is_up_to_date
    assert build(manifest, tmp_path / "joined").is_up_to_date


def test_joined_coordinates(manifest, tmp_path):
    for index in (1, 2):
        build(manifest, tmp_path / f"share{index}", share=(index, 2), pixels="none")
    join_datasets([tmp_path / "share1", tmp_path / "share2"], tmp_path / "joined")
    build(manifest, tmp_path / "whole", pixels="none")
    same_files(tmp_path / "joined", tmp_path / "whole")


def test_wrong_joins_are_refused(manifest, shares, tmp_path):
    with pytest.raises(ValueError, match=r"shares 1 to 3 once, found \[1, 3\]"):
        join_datasets([shares[0], shares[2]], tmp_path / "out")
    with pytest.raises(ValueError, match=r"found \[1, 1, 2, 3\]"):
        join_datasets([*shares, shares[0]], tmp_path / "out")
    build(manifest, tmp_path / "other", share=(2, 3), jpeg_quality=50)
    with pytest.raises(ValueError, match="jpeg_quality=50"):
        join_datasets([shares[0], tmp_path / "other", shares[2]], tmp_path / "out")
    build(read_manifest(manifest)[:-1], tmp_path / "fewer", share=(2, 3))
    with pytest.raises(ValueError, match="another list of slides"):
        join_datasets([shares[0], tmp_path / "fewer", shares[2]], tmp_path / "out")
    build(manifest, tmp_path / "whole")
    with pytest.raises(ValueError, match="not the dataset of a share"):
        join_datasets([tmp_path / "whole"], tmp_path / "out")
    with pytest.raises(ValueError, match="another folder"):
        join_datasets(shares, shares[0])
    assert not (tmp_path / "out").exists()


def test_shares_cover_the_manifest_and_weigh_the_same(tmp_path):
    rows = []
    for i in range(40):
        path = tmp_path / f"{i}.tif"
        path.write_bytes(b"x" * (1000 * (i % 7) ** 2))
        rows.append(ManifestRow(f"s{i}", path, path.name, f"c{i}"))
    shares = divide_manifest(rows, 4)
    assert sorted(position for share in shares for position in share) == list(range(40))
    weights = [sum(rows[position].path.stat().st_size for position in share) for share in shares]
    assert max(weights) - min(weights) <= 36_000
    assert divide_manifest(rows, 4) == shares
    for path in tmp_path.iterdir():
        path.unlink()
    assert [len(share) for share in divide_manifest(rows, 4)] == [10, 10, 10, 10]  # nothing known: by number


@pytest.mark.parametrize("text", ["0/3", "4/3", "1", "1/", "/3", "a/b", "-1/3", "1/3/5", "1.0/3"])
def test_wrong_share(text):
    with pytest.raises(ValueError, match="--shard"):
        parse_share(text)


def test_an_empty_share_is_an_error(manifest, tmp_path):
    assert parse_share("12/12") == (12, 12)
    with pytest.raises(ValueError, match="share 12 of 12 is empty"):
        build(manifest, tmp_path / "out", share=(12, 12))
