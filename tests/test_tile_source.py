# SPDX-License-Identifier: Apache-2.0
"""Pixels of random tiles, stored or read from slides: the same samples either way, in any process, or one error."""

import multiprocessing
import os
import pickle
import shutil

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tifffile
import torch
from torch.utils.data import DataLoader, Dataset

from dre_slcl.training import slide_handles
from dre_slcl.training.build_dataset import build_dataset
from dre_slcl.training.config import TrainConfig
from dre_slcl.training.demo.slide_writer import write_slide
from dre_slcl.training.sampler import PADDING, StepSampler, generator
from dre_slcl.training.step_dataset import StepDataset, step_loader
from dre_slcl.training.tile_source import TileSource, decode_tile
from dre_slcl.training.train import train
from modeling_dre_slcl.slide_reader import SlideError, SlideReader
from modeling_dre_slcl.tile_grid import TileGridConfig

from . import tiny_dataset

GRID = TileGridConfig(tile_size_px=256, tile_mpp=0.5)
NUM_SLIDES = 4


@pytest.fixture(scope="module")
def cohort(tmp_path_factory):
    """Slides of 16 stained tiles, and datasets of them: `encode` (quality 100), `none`, and `copied` by hand."""
    root = tmp_path_factory.mktemp("access")
    (root / "slides").mkdir()
    for i in range(NUM_SLIDES):
        random = np.random.default_rng(i)
        coarse = random.integers([120, 50, 100], [230, 150, 210], (64, 64, 3)).astype(np.uint8)
        pixels = cv2.resize(coarse, (1024, 1024), interpolation=cv2.INTER_CUBIC)
        write_slide(root / "slides" / f"s{i}.svs", pixels, mpp=0.5)
    options = {"num_workers": 0, "progress": False}
    build_dataset(root / "slides", root / "encode", GRID, jpeg_quality=100, **options)
    build_dataset(root / "slides", root / "none", GRID, pixels="none", **options)
    copy_tiles_of_slides(root)
    return root


def copy_tiles_of_slides(root):
    """Writes the dataset whose images are the slides' own JPEG tiles, cut out of the files."""
    shutil.copytree(root / "encode", root / "copied")
    [shard] = (root / "copied" / "tiles").glob("*.parquet")
    table = pq.read_table(shard)
    rows = table.to_pylist()
    for row in rows:
        with tifffile.TiffFile(root / "slides" / f"{row['slide_id']}.svs") as file:
            page = file.pages[0]
            index = row["y"] // 256 * 4 + row["x"] // 256
            file.filehandle.seek(page.dataoffsets[index])
            row["image"] = {"bytes": file.filehandle.read(page.databytecounts[index]), "path": None}
    pq.write_table(pa.Table.from_pylist(rows, schema=table.schema), shard)


def source(cohort, name, **options):
    return TileSource(cohort / name, "train", slides_root=cohort / "slides", **options)


def sampler_of(tiles):
    ids, counts = [row.slide_id for row in tiles.slides], [row.num_tiles for row in tiles.slides]
    shards = [[0, 1], [2, 3]]
    return StepSampler(shards, [0, 1], ids, counts, tiles_per_slide=5, retrieved_per_slide=0, seed=3)


def steps_of(tiles, *, num_workers=0, steps=6, flips=True, stain=0.1):
    dataset = StepDataset(tiles, sampler_of(tiles), augment_flips=flips, augment_stain=stain)
    return list(step_loader(dataset, range(steps), num_workers=num_workers, seed=0))


def test_the_same_step_gives_the_same_samples_from_stored_tiles_and_from_slides(cohort):
    stored, read = (steps_of(source(cohort, name), flips=True, stain=0.0) for name in ("encode", "none"))
    for one, other in zip(stored, read, strict=True):
        assert one.plan.slides.tolist() == other.plan.slides.tolist()
        assert one.plan.sampled.tolist() == other.plan.sampled.tolist()
        error = (one.tiles.int() - other.tiles.int()).abs().float()
        assert error.mean() < 1.5  # 4:2:0 chroma once more, at quality 100
        assert error.mean() > 0


def test_copied_tiles_have_exactly_the_pixels_of_the_slide(cohort):
    stored, read = (steps_of(source(cohort, name)) for name in ("copied", "none"))
    for one, other in zip(stored, read, strict=True):
        assert one.plan.sampled.tolist() == other.plan.sampled.tolist()
        assert torch.equal(one.tiles, other.tiles)


def test_a_dataset_of_copied_tiles_has_exactly_the_pixels_of_the_slide(cohort, tmp_path):
    build_dataset(cohort / "slides", tmp_path / "copy", GRID, pixels="copy", num_workers=0, progress=False)
    stored, read = (steps_of(tiles) for tiles in (TileSource(tmp_path / "copy", "train"), source(cohort, "none")))
    assert all(torch.equal(one.tiles, other.tiles) for one, other in zip(stored, read, strict=True))


def test_other_kinds_of_images_are_decoded_too():
    pixels = np.random.default_rng(0).integers(0, 255, (32, 32, 3), dtype=np.uint8)
    out = np.empty_like(pixels)
    assert decode_tile(cv2.imencode(".png", pixels[..., ::-1])[1].tobytes(), out) == ""
    np.testing.assert_array_equal(out, pixels)
    assert decode_tile(cv2.imencode(".jpg", pixels[..., 0])[1].tobytes(), out) == ""
    np.testing.assert_array_equal(out[..., 0], out[..., 2])
    assert decode_tile(cv2.imencode(".jpg", np.zeros((40, 32, 3), np.uint8))[1].tobytes(), out) == "32 x 40 px"


def test_tiles_are_those_that_were_asked_for_in_that_order(cohort):
    tiles = source(cohort, "copied")
    with SlideReader(cohort / "slides" / "s2.svs") as reader:
        expected = [reader.read_tile(x, y, tile_size_px=256, tile_mpp=0.5) for x, y in tiles.slides[2].tile_xy]
    for wanted in ([3], [15, 0, 7], [4, 4], list(range(16))):
        np.testing.assert_array_equal(tiles.read(2, wanted), np.stack([expected[tile] for tile in wanted]))
    np.testing.assert_array_equal(np.concatenate(list(tiles.iter_batches(2, 5))), np.stack(expected))
    assert tiles.read(2, []).shape == (0, 256, 256, 3)
    for wanted in ([16], [-1]):
        with pytest.raises(IndexError, match="s2 has 16 tiles"):
            tiles.read(2, wanted)


def test_augmentation_turns_mirrors_and_scales_optical_density(cohort):
    tiles = source(cohort, "copied")
    [batch, *_] = steps_of(tiles, steps=1)
    for place, slide in enumerate(batch.plan.slides.tolist()):
        random = generator(3, "augment", 0, tiles.slides[slide].slide_id)
        for found, pixels in zip(
            batch.tiles[place].numpy(), tiles.read(slide, batch.plan.sampled[place]), strict=True
        ):
            expected = np.rot90(pixels, random.integers(4))
            expected = expected[:, ::-1] if random.integers(2) else expected
            factors = np.exp(random.normal(scale=0.1, size=3))
            expected = np.round(255 * (expected / 255.0) ** factors)
            np.testing.assert_array_equal(found, expected.astype(np.uint8))


def test_small_slides_are_padded_with_zeros(cohort):
    tiles = source(cohort, "none")
    sampler = sampler_of(tiles)
    sampler.tiles_per_slide = 20
    batch = StepDataset(tiles, sampler, augment_flips=False, augment_stain=0.0)[0]
    assert ((batch.plan.sampled == PADDING).sum(axis=1) == 4).all()
    assert (batch.tiles[:, 16:] == 0).all()
    assert (batch.tiles[:, :16].float().mean(dim=(2, 3, 4)) > 50).all()


@pytest.mark.parametrize("name", ["encode", "none"])
def test_workers_change_nothing(cohort, name):
    tiles = source(cohort, name)
    here = steps_of(tiles)  # slides are open in this process when the workers are forked
    there = steps_of(tiles, num_workers=2)
    assert all(torch.equal(one.tiles, other.tiles) for one, other in zip(here, there, strict=True))


class OwnedReader(SlideReader):
    """A reader that notices when another process than the one that opened it touches it."""

    opened = 0

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.process = os.getpid()
        type(self).opened += 1

    def read_tile(self, *args, **options):
        assert self.process == os.getpid(), "read in another process"
        return super().read_tile(*args, **options)

    def close(self):
        assert self.process == os.getpid(), "closed in another process"
        super().close()


class Means(Dataset):
    """The mean of a tile of each slide, and how many slides the reading process opened and holds."""

    def __init__(self, tiles):
        self.tiles = tiles

    def __len__(self):
        return len(self.tiles.slides)

    def __getitem__(self, slide):
        before = OwnedReader.opened
        mean = float(self.tiles.read(slide, [3]).mean())
        return mean, OwnedReader.opened - before, len(self.tiles._handles)


@pytest.mark.parametrize("context", ["fork", "spawn"])
def test_each_process_opens_its_own_slides(cohort, context, monkeypatch):
    if context not in multiprocessing.get_all_start_methods():
        pytest.skip(f"no {context} on this system")
    monkeypatch.setattr(slide_handles, "SlideReader", OwnedReader)
    tiles = source(cohort, "none")
    expected = [Means(tiles)[slide] for slide in range(NUM_SLIDES)]
    assert [(opened, held) for _, opened, held in expected] == [(1, 1), (1, 2), (1, 3), (1, 4)]
    loader = DataLoader(Means(tiles), batch_size=None, num_workers=2, multiprocessing_context=context)
    found = list(loader)
    assert [mean for mean, _, _ in found] == [mean for mean, _, _ in expected]
    if context == "fork":  # spawned workers import an unpatched module
        assert [opened for _, opened, _ in found] == [1] * NUM_SLIDES
    assert [held for _, _, held in found] == [1, 1, 2, 2]


def test_a_pickle_holds_neither_handles_nor_coordinates(cohort):
    tiles = source(cohort, "none")
    tiles.read(0, [0])
    content = pickle.dumps(tiles)
    assert len(content) < 10_000
    copy = pickle.loads(content)
    assert (len(copy._handles), len(tiles._handles)) == (0, 1)
    np.testing.assert_array_equal(copy.read(1, [2]), tiles.read(1, [2]))
    np.testing.assert_array_equal(copy.slides[3].tile_xy, tiles.slides[3].tile_xy)


def test_few_slides_are_open_at_a_time(cohort, monkeypatch):
    monkeypatch.setattr(slide_handles, "SlideReader", OwnedReader)
    tiles = source(cohort, "none")
    tiles._handles.max_open = 2
    before = OwnedReader.opened
    for slide in (0, 1, 0, 2, 0, 1):
        tiles.read(slide, [0])
        assert len(tiles._handles) <= 2
    assert OwnedReader.opened - before == 4  # 0, 1, 2 and 1 again: the least recently used one had to go


@pytest.fixture
def damaged(cohort, tmp_path):
    """A copy of the cohort in which the pixels of slide s1 cannot be read."""
    root = tmp_path / "damaged"
    shutil.copytree(cohort, root)
    with tifffile.TiffFile(root / "slides" / "s1.svs") as file:
        spans = list(zip(file.pages[0].dataoffsets, file.pages[0].databytecounts, strict=True))
    with (root / "slides" / "s1.svs").open("r+b") as handle:
        for start, size in spans:
            handle.seek(start)
            handle.write(b"\xff\xd8" + bytes(size - 2))
    return root


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_slide_that_fails_is_named_with_its_tile(damaged, num_workers, monkeypatch):
    monkeypatch.setattr(slide_handles, "_check_fingerprint", lambda *_: None)
    with pytest.raises(SlideError) as caught:
        steps_of(source(damaged, "none"), num_workers=num_workers, steps=8)
    assert (caught.value.slide_id, type(caught.value)) == ("s1", SlideError)
    assert "tile " in caught.value.message
    assert " at level-0 (" in caught.value.message
    assert "s1.svs" in caught.value.message
    assert "give the same command again, or build" in caught.value.message
    assert "Traceback" not in str(caught.value)


def test_a_slide_that_is_not_the_one_that_was_tiled_is_refused(damaged):
    tiles = source(damaged, "none")
    with pytest.raises(SlideError, match=r"s1: changed_during_run: .*s1\.svs: not the file that .* placed on"):
        tiles.read(1, [0])
    assert tiles.read(0, [0]).shape == (1, 256, 256, 3)


def test_a_damaged_stored_tile_is_named(cohort, tmp_path):
    root = tmp_path / "torn"
    shutil.copytree(cohort / "encode", root)
    [shard] = (root / "tiles").glob("*.parquet")
    table = pq.read_table(shard)
    rows = table.to_pylist()
    rows[16 + 5]["image"]["bytes"] = b"no image"
    rows[16 + 6]["image"]["bytes"] = cv2.imencode(".jpg", np.zeros((8, 9, 3), np.uint8))[1].tobytes()
    rows[16 + 7]["image"] = None
    rows[16 + 8]["image"]["bytes"] = rows[16 + 8]["image"]["bytes"][:-200]
    pq.write_table(pa.Table.from_pylist(rows, schema=table.schema), shard)
    tiles = TileSource(root, "train")
    assert tiles.read(1, [4]).shape == (1, 256, 256, 3)
    for tile, found in ((5, "no image"), (6, "9 x 8 px"), (7, "no image"), (8, "one that was cut off")):
        with pytest.raises(SlideError, match=rf"s1: unreadable: tile {tile} \(row {16 + tile} of .* found {found}"):
            tiles.read(1, [4, tile])


def test_missing_slides_are_named_before_any_work(cohort, tmp_path, caplog):
    with pytest.raises(ValueError, match=r"none of the 4 slides .*set `slides_root`"):
        TileSource(cohort / "none", "train", slides_root=tmp_path)
    shutil.copytree(cohort / "slides", tmp_path / "slides")
    (tmp_path / "slides" / "s3.svs").unlink()
    tiles = TileSource(cohort / "none", "train", slides_root=tmp_path / "slides")
    assert "1 of 4 slide files are not in the folder of slides: s3.svs" in caplog.text
    assert [row.slide_id for row in tiles.missing_slides()] == ["s3"]
    with pytest.raises(SlideError, match=r"s3: not_a_file: .*s3\.svs"):
        tiles.read(3, [0])
    tiny_dataset.write_text_model(tmp_path / "text")
    settings = tiny_dataset.train_settings(tmp_path, tmp_path / "run")
    settings |= {"dataset": str(cohort / "none"), "slides_root": str(tmp_path / "slides")}
    with pytest.raises(ValueError, match=r"1 of 4 slide files .*s3\.svs"):
        train(TrainConfig(**settings))


def test_a_rebuilt_dataset_and_one_of_the_same_name_are_not_mixed_up(cohort, tmp_path):
    """`datasets` finds the cache of a folder by its name and card alone."""
    for place in ("here", "there"):
        for report in ("first", "second"):
            root = tmp_path / place / "dataset"
            shutil.copytree(cohort / "none", root, dirs_exist_ok=True)
            [table] = (root / "slides").glob("*.parquet")
            slides = pq.read_table(table)
            index = slides.schema.get_field_index("report")
            slides = slides.set_column(index, slides.schema.field(index), pa.array([f"{place} {report}"] * NUM_SLIDES))
            pq.write_table(slides, table)
            tiles = TileSource(root, "train", slides_root=cohort / "slides")
            assert {row.report for row in tiles.slides} == {f"{place} {report}"}


def test_configurations_that_do_not_belong_together_are_refused(cohort, tmp_path):
    root = tmp_path / "mixed"
    shutil.copytree(cohort / "encode", root)
    [shard] = (root / "tiles").glob("*.parquet")
    pq.write_table(pq.read_table(shard).slice(1), shard)
    with pytest.raises(ValueError, match="tiles of slide s0 are not where `tile_start` says"):
        TileSource(root, "train")
