# SPDX-License-Identifier: Apache-2.0
"""A bank too large to copy each time: base, changed rows and links restore it to the bit, whatever happens between."""

import random
import shutil

import pytest
import torch
import torch.nn.functional as F

from dre_slcl.training.bank_journal import BankJournal
from dre_slcl.training.checkpoint import CheckpointError, CheckpointFolder, checkpoint_name, validate_checkpoint
from dre_slcl.training.config import TrainConfig
from dre_slcl.training.train import train
from modeling_dre_slcl import MemoryBank

from . import tiny_dataset

WIDTH, CODEWORDS, NUM_TILES = 8, 4, [200, 30, 120, 1]
SHARDS = {0: [0, 1], 1: [2, 3]}
CODEBOOK = F.normalize(torch.randn(CODEWORDS, WIDTH, generator=torch.Generator().manual_seed(5)), dim=-1)


class Run:
    """A bank with its journal and its folder of checkpoints, as a trainer holds them."""

    def __init__(self, root, dtype=torch.float16, mapped=False, **options):
        self.bank = MemoryBank(WIDTH, CODEWORDS)
        self.bank.allocate(NUM_TILES, dtype=dtype, folder=root / "mapped" if mapped else None)
        self.journal = BankJournal(self.bank, SHARDS, 2, whole_bytes=options.pop("whole_bytes", 0), **options)
        self.folder = CheckpointFolder(root / "checkpoints", keep=2, is_main=True, barrier=lambda: None)
        self.folder.prepare()

    def resume(self):
        path = self.folder.newest()
        if path is None:
            write(self.bank, 0, tiles=NUM_TILES)
            self.save(0)
            return 0
        self.journal.restore(path)
        return int(path.name.removeprefix("step-"))

    def save(self, step, dies=False):
        new, links = self.journal.files(step)
        if dies:  # files are there, the manifest is not
            torn = self.folder.folder / f".tmp-{checkpoint_name(step)}"
            torn.mkdir(exist_ok=True)
            for name, source in links.items():
                (torn / name).hardlink_to(source)
            return
        self.folder.save(step, tensors={}, bank_shards=new, bank_links=links, trainer_state={"step": step})
        self.journal.committed(self.folder.folder / checkpoint_name(step))


def write(bank, step, tiles=None):
    """What a step writes is a function of the step; `tiles` fills the slides up to so many tiles."""
    choose = random.Random(step)
    slides = [slide for slide in range(4) if tiles[slide]] if tiles else choose.sample(range(4), 2)
    for slide in slides:
        chosen = (
            list(range(tiles[slide])) if tiles else choose.sample(range(NUM_TILES[slide]), min(3, NUM_TILES[slide]))
        )
        features = torch.randn(1, len(chosen), WIDTH, generator=torch.Generator().manual_seed(step * 7 + slide))
        bank.write(torch.tensor([slide]), torch.tensor([chosen]), F.normalize(features, dim=-1), CODEBOOK, step)


def tables(bank):
    names = set(MemoryBank.BUFFER_NAMES) - {"drift_sums", "step_counts"}
    found = {name: getattr(bank, name).clone() for name in names}
    counts = bank.step_counts
    return found | {"step_counts": counts[: int(counts.nonzero().max()) + 1].clone()}


def assert_equal(one, two):
    for name, table in one.items():
        assert torch.equal(table, two[name]), name


def files(path, pattern):
    return sorted(file.name for file in path.glob(pattern))


@pytest.mark.parametrize("mapped", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.int8])
def test_killed_at_random_points_the_end_is_the_uninterrupted_one(tmp_path, dtype, mapped):
    last, options = 40, {"compact_share": 0.4, "max_changes": 3}
    straight = Run(tmp_path / "straight", dtype)
    straight.resume()
    for step in range(1, last + 1):
        write(straight.bank, step)
    chance, kills, step, run = random.Random(1), 0, 0, None
    kinds = set()
    while step < last or run is None:
        run = Run(tmp_path / "killed", dtype, mapped, **options)
        step = run.resume()
        assert_equal({"sums": run.bank.feature_sums.clone()}, {"sums": recount(run.bank)})
        until = min(last, step + chance.randint(1, 14)) if kills < 6 else last
        while step < until:
            step += 1
            write(run.bank, step)
            if step % 4 == 0:
                run.save(step, dies=step == until)
                newest = max((tmp_path / "killed/checkpoints").glob("step-*"))
                kinds.add((len(files(newest, "*-of-00002.base-*")), len(files(newest, "*.rows-*"))))
        kills += 1
    assert kills >= 3
    assert_equal(tables(straight.bank), tables(run.bank))
    assert len(kinds) > 3  # bases alone, some changes, compacted ones


def recount(bank):
    """Running sums by a loop over the rows."""
    sums, owner = (
        torch.zeros_like(bank.feature_sums),
        torch.bucketize(torch.arange(len(bank.codeword)), bank.slide_start[1:], right=True),
    )
    for row in (bank.written_step >= 0).nonzero().flatten().tolist():
        sums[owner[row], int(bank.codeword[row])] += bank.stored_features(torch.tensor([row]))[0].double()
    return sums


def test_unchanged_files_are_linked_and_outlive_the_checkpoint_they_came_from(tmp_path):
    run = Run(tmp_path)
    run.resume()
    first = tmp_path / "checkpoints/step-00000000"
    base = files(first, "*.base-*")
    numbers = {name: (first / name).stat().st_ino for name in base}
    for step in range(1, 9):
        write(run.bank, step)
        if step % 2 == 0:
            run.save(step)
    newest = run.folder.newest()
    assert not first.exists()
    assert newest.name == "step-00000008"
    assert (
        files(newest, "*.base-*")
        == base
        == [f"bank-0000{shard}-of-00002.base-00000000-0000.safetensors" for shard in (0, 1)]
    )
    assert {name: (newest / name).stat().st_ino for name in base} == numbers
    assert len(files(newest, "bank-00000*.rows-*")) == 4
    validate_checkpoint(newest)
    copied = tmp_path / "copied"
    shutil.copytree(newest, copied)
    other = Run(tmp_path / "other")
    other.journal.restore(copied)
    assert_equal(tables(run.bank), tables(other.bank))


@pytest.mark.parametrize("pattern", ["*.base-*", "*.rows-*"])
def test_a_damaged_file_is_noticed_and_the_checkpoint_passed_over(tmp_path, pattern):
    run = Run(tmp_path)
    run.resume()
    for step in (1, 2):
        write(run.bank, step)
        run.save(step)
    newest = run.folder.newest()
    file = next(newest.glob(pattern)) if pattern == "*.base-*" else max(newest.glob(pattern))
    content = bytearray(file.read_bytes())
    content[-3] ^= 1
    file.unlink()  # a damaged copy: a damaged disk block would be in all links
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match=file.name):
        validate_checkpoint(newest)
    assert run.folder.newest().name == "step-00000001"


def test_a_missing_piece_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr("dre_slcl.training.bank_journal._PIECE_BYTES", 1000)
    run = Run(tmp_path)
    run.resume()
    newest = run.folder.newest()
    pieces = files(newest, "bank-00000*.base-*")
    assert len(pieces) > 3
    again = Run(tmp_path)
    again.resume()
    assert_equal(tables(run.bank), tables(again.bank))
    (newest / pieces[-1]).unlink()
    with pytest.raises(CheckpointError, match="of the shard's rows are missing"):
        Run(tmp_path).journal.restore(newest)


def test_many_changes_make_a_new_base_and_a_new_codebook_does_too(tmp_path):
    run = Run(tmp_path)
    run.resume()
    write(run.bank, 1, tiles=[150, 0, 0, 0])
    run.save(1)
    newest = run.folder.newest()
    assert files(newest, "*.base-*")[0].startswith("bank-00000-of-00002.base-00000001")
    assert files(newest, "*.base-*")[1].startswith("bank-00001-of-00002.base-00000000")
    run.bank.rebuild_sums(CODEBOOK.flip(0))
    run.save(2)
    assert all("base-00000002" in name for name in files(run.folder.newest(), "*.base-*"))
    again = Run(tmp_path)
    assert again.resume() == 2
    assert_equal(tables(run.bank), tables(again.bank))


def test_small_shards_are_written_whole(tmp_path):
    run = Run(tmp_path, whole_bytes=1 << 20)
    run.resume()
    assert files(run.folder.newest(), "bank-*") == [f"bank-0000{shard}-of-00002.safetensors" for shard in (0, 1)]
    again = Run(tmp_path)  # and one that writes bases goes on from them
    again.resume()
    assert_equal(tables(run.bank), tables(again.bank))
    write(again.bank, 1)
    again.save(1)
    assert len(files(again.folder.newest(), "*.base-00000001-*")) == 2


@pytest.mark.parametrize("bank_device", ["cpu", "disk"])
def test_a_run_that_saves_changes_only_ends_as_one_that_saves_all(tmp_path, bank_device):
    """Stopped half-way by the number of steps it is given, then resumed: as without a stop."""
    tiny_dataset.write_dataset(tmp_path / "data", num_slides=8, tiles=(30, 40))
    tiny_dataset.write_text_model(tmp_path / "text")
    changes = {"finalize_steps": 0, "codebook_refits": [], "checkpoint_steps": 2, "tiles_per_slide": 2}
    whole = tiny_dataset.train_settings(tmp_path, tmp_path / "whole") | changes
    train(TrainConfig(**whole))
    parts = whole | {"output_dir": str(tmp_path / "parts"), "bank_device": bank_device, "bank_whole_mib": 0}
    train(TrainConfig(**parts))
    checkpoints = [max((tmp_path / name / "checkpoints").glob("step-*")) for name in ("whole", "parts")]
    assert files(checkpoints[1], "bank-*.base-*")
    one, two = ((path / "model.safetensors").read_bytes() for path in checkpoints)
    assert one == two
    shutil.rmtree(tmp_path / "parts" / "model")
    newest, before = checkpoints[1], checkpoints[1].with_name("step-00000006")
    assert files(before, "bank-*.rows-*")
    shutil.rmtree(newest)
    train(TrainConfig(**parts))
    assert (newest / "model.safetensors").read_bytes() == one
