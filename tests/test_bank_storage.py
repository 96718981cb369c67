# SPDX-License-Identifier: Apache-2.0
"""Where the bank lives: it behaves alike everywhere, takes the room that it says, and refuses what does not fit."""

import random
from collections import namedtuple
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from modeling_dre_slcl import MemoryBank, bank_storage
from modeling_dre_slcl.bank_codec import STORAGE_DTYPES
from modeling_dre_slcl.bank_storage import MappedTables, TableSpec, available_host_bytes, bank_tables

WIDTH, CODEWORDS, NUM_TILES = 16, 4, [300, 1, 50]
every_dtype = pytest.mark.parametrize("dtype", STORAGE_DTYPES.values(), ids=STORAGE_DTYPES)


def make_bank(dtype=torch.float16, folder=None):
    bank = MemoryBank(WIDTH, CODEWORDS)
    bank.allocate(NUM_TILES, dtype=dtype, folder=folder)
    return bank


def fill(bank, steps, first=0):
    codebook = F.normalize(torch.randn(CODEWORDS, WIDTH, generator=torch.Generator().manual_seed(5)), dim=-1)
    for step in range(first, first + steps):
        choose = random.Random(step)
        slides = torch.tensor(choose.sample(range(3), 2))
        tiles = [choose.sample(range(NUM_TILES[slide]), min(7, NUM_TILES[slide])) for slide in slides]
        tiles = torch.tensor([row + [-1] * (7 - len(row)) for row in tiles])
        features = F.normalize(torch.randn(2, 7, WIDTH, generator=torch.Generator().manual_seed(step)), dim=-1)
        bank.write(slides, tiles, features, codebook, step)
    return codebook


def resident_mib(field):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(field))


@every_dtype
def test_a_mapped_bank_holds_to_the_bit_what_one_in_memory_holds(tmp_path, dtype):
    mapped, inside = make_bank(dtype, tmp_path / "bank"), make_bank(dtype)
    codebook = fill(mapped, 200)
    fill(inside, 200)
    for name in MemoryBank.BUFFER_NAMES:
        assert torch.equal(getattr(mapped, name), getattr(inside, name)), name
    slides, tiles = torch.tensor([2, 0]), torch.tensor([[3, 8, 11], [6, 1, -1]])
    for one, two in zip(
        mapped.residuals_of_others(slides, tiles, codebook),
        inside.residuals_of_others(slides, tiles, codebook),
        strict=True,
    ):
        assert torch.equal(one, two)
    assert mapped.health(200) == inside.health(200)


def test_a_new_mapped_bank_is_empty_takes_no_room_and_leaves_no_file(tmp_path):
    bank = MemoryBank(384, CODEWORDS)
    before = tmp_path.stat().st_size
    bank.allocate([1_000_000], folder=tmp_path)  # 768 MB of features
    assert bank.health(0)["coverage"] == 0
    assert (bank.written_step[::100_000] == -1).all()
    assert (bank.codeword[-3:] == -1).all()
    assert not bank.features[::100_000].any()
    assert tmp_path.stat().st_size == before
    assert list(tmp_path.iterdir()) == []


def test_a_mapped_bank_does_not_follow_the_model(tmp_path):
    bank = make_bank(folder=tmp_path)
    fill(bank, 3)
    before = {name: buffer.clone() for name, buffer in bank.named_buffers()}
    places = {name: buffer.data_ptr() for name, buffer in bank.named_buffers()}
    holder = torch.nn.Sequential(bank, torch.nn.Linear(2, 2))
    for move in (lambda: holder.to("meta"), lambda: holder.to_empty(device="cpu"), holder.half, holder.double):
        move()
    assert not holder.state_dict(prefix="x").keys() & {f"x0.{name}" for name in MemoryBank.BUFFER_NAMES}
    for name, buffer in bank.named_buffers():
        assert torch.equal(buffer, before[name]), name
        assert buffer.data_ptr() == places[name], name


def test_pages_are_given_back_and_nothing_is_lost(tmp_path):
    tables = MappedTables(tmp_path, {"features": TableSpec((40_000, 1024), torch.float32)})
    table, values = tables.tensors["features"], torch.arange(40_000.0)
    table[:] = values[:, None]
    held = resident_mib("RssFile")
    tables.release()
    assert held - resident_mib("RssFile") > 140
    tables.expect(torch.tensor([0, 39_999]), ("features",))
    assert torch.equal(table[:, 1023], values)


def test_a_bank_takes_two_bytes_a_number_and_five_percent():
    """The paper's sizes; what is allocated is counted tensor by tensor."""
    bank = MemoryBank(384, 16)
    bank.allocate([15_000] * 2)
    allocated = sum(buffer.numel() * buffer.element_size() for buffer in bank.buffers())
    assert 30_000 * 384 * 2 < allocated < 1.05 * 30_000 * 384 * 2
    stated = bank_tables([15_000] * 2, hidden_size=384, num_codewords=16, dtype=torch.float16)
    assert allocated == pytest.approx(sum(table.num_bytes for table in stated.values()), abs=1000)
    bank.allocate([15_000] * 2, dtype=torch.int8)
    assert sum(buffer.numel() * buffer.element_size() for buffer in bank.buffers()) < 1.07 * 30_000 * 384


def test_a_bank_that_does_not_fit_is_refused_with_the_numbers_before_anything_is_made(tmp_path, monkeypatch):
    bank = make_bank()
    before = bank.features
    with pytest.raises(ValueError, match=r"does not fit in host memory: 1000000000000 tiles .* need \d+\.\d\d GiB"):
        bank.allocate([1_000_000] * 1_000_000)
    usage = namedtuple("usage", "total used free")(10, 0, 2048)
    monkeypatch.setattr(bank_storage.shutil, "disk_usage", lambda folder: usage)
    with pytest.raises(
        ValueError, match=r"does not fit on the disk of .*bank: 351 tiles .*0\.00 GiB are free"
    ) as error:
        bank.allocate(NUM_TILES, folder=tmp_path / "bank")
    assert "`bank_dtype`" in str(error.value)
    assert bank.features is before
    assert list((tmp_path / "bank").iterdir()) == []


def test_processes_on_one_machine_count_together(monkeypatch):
    bank = MemoryBank(WIDTH, CODEWORDS)
    needed = sum(
        table.num_bytes
        for table in bank_tables(NUM_TILES, hidden_size=WIDTH, num_codewords=CODEWORDS, dtype=torch.float16).values()
    )
    monkeypatch.setattr(bank_storage, "available_host_bytes", lambda: 3 * needed)
    bank.allocate(NUM_TILES, num_sharing=3)
    with pytest.raises(ValueError, match="for each of 4 processes"):
        bank.allocate(NUM_TILES, num_sharing=4)


def test_free_memory_is_known_here():
    assert available_host_bytes() is None or 0 < available_host_bytes() < 1 << 50
