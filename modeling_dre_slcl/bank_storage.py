# SPDX-License-Identifier: Apache-2.0
"""Where the tables of the memory bank lie: beside the model, in host memory, or mapped from files on a disk.

A mapped table is a sparse file that has no name: it takes room on the disk only as it is written, and none after its
process has ended, however that ends. Its pages belong to the operating system's cache, not to the process.

Letters: S slides, K codewords, D feature width.
"""

import math
import mmap
import os
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from .bank_codec import scales_per_tile

_PAGE_BYTES = mmap.PAGESIZE
_FILL_BYTES = 1 << 22
_GIB = 1 << 30


@dataclass(frozen=True)
class TableSpec:
    """A table of the bank.

    Args:
        shape (`tuple` of `int`): its shape.
        dtype (`torch.dtype`): its type.
        is_minus_one (`bool`): whether it starts with -1 instead of 0 everywhere.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    is_minus_one: bool = False

    @property
    def num_bytes(self) -> int:
        """Its size."""
        return math.prod(self.shape) * torch.empty(0, dtype=self.dtype).element_size()


def bank_tables(
    num_tiles: Sequence[int], *, hidden_size: int, num_codewords: int, dtype: torch.dtype
) -> dict[str, TableSpec]:
    """Returns the large tables of a bank, name -> shape and type; all but `feature_sums` and `counts` by tile.

    Args:
        num_tiles (sequence of `int`): tiles of each slide.
        hidden_size (`int`): D.
        num_codewords (`int`): K.
        dtype (`torch.dtype`): type of stored features.
    """
    total, slides = sum(num_tiles), len(num_tiles)
    return {
        "features": TableSpec((total, hidden_size), dtype),
        "scales": TableSpec((total, scales_per_tile(dtype)), torch.float16),
        "written_step": TableSpec((total,), torch.int32, is_minus_one=True),
        "codeword": TableSpec((total,), torch.int16, is_minus_one=True),
        "feature_sums": TableSpec((slides, num_codewords, hidden_size), torch.float64),
        "counts": TableSpec((slides, num_codewords), torch.int64),
    }


def check_room(
    tables: dict[str, TableSpec], *, device: torch.device, folder: Path | None, num_sharing: int = 1
) -> None:
    """Refuses a bank that does not fit, before anything is allocated.

    Args:
        tables (`dict`): from `bank_tables`.
        device (`torch.device`): where it shall live.
        folder (`Path`, *optional*): the folder on a disk, instead.
        num_sharing (`int`, defaults to 1): processes that each put as much there.

    Raises:
        ValueError: with what is needed and what is free.
    """
    if folder is None and device.type == "cuda":  # each process has one of its own
        num_sharing = 1
    each, free, where = sum(table.num_bytes for table in tables.values()), None, f"on {device}"
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        where, free = f"on the disk of {folder}", shutil.disk_usage(folder).free
    elif device.type == "cuda":
        free = torch.cuda.mem_get_info(device)[0]
    elif device.type == "cpu":
        where, free = "in host memory", available_host_bytes()
    if free is not None and each * num_sharing > free:
        tiles, width = tables["features"].shape
        dtype = str(tables["features"].dtype).removeprefix("torch.")
        times = f" for each of {num_sharing} processes" if num_sharing > 1 else ""
        raise ValueError(
            f"The memory bank does not fit {where}: {tiles} tiles of width {width} in {dtype} need "
            f"{each / _GIB:.2f} GiB{times}, {free / _GIB:.2f} GiB are free. Choose a smaller `bank_dtype` (int8), "
            "another `bank_device` (cpu, disk) or `bank_dir`, or train on fewer tiles."
        )


def available_host_bytes() -> int | None:
    """Returns how much memory this process can still get, by Linux' estimate and its control group; else `None`."""
    lines = _read_text(Path("/proc/meminfo")).splitlines()
    found = [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")]
    group = Path("/sys/fs/cgroup")
    limit, used = _read_text(group / "memory.max").strip(), _read_text(group / "memory.current").strip()
    if limit.isdigit() and used.isdigit():
        found.append(int(limit) - int(used))
    return min(found, default=None)


def make_table(table: TableSpec, device: torch.device) -> torch.Tensor:
    """Returns a new table in the memory of a device."""
    return torch.full(table.shape, -1 if table.is_minus_one else 0, dtype=table.dtype, device=device)


class MappedTables:
    """Tables mapped from nameless sparse files in a folder; they live as long as their tensors.

    Args:
        folder (`Path`): a folder on the disk; it is made.
        tables (`dict`): name -> `TableSpec`.

    Attributes:
        tensors (`dict` of `torch.Tensor`): the tables, writable, on the CPU.
    """

    def __init__(self, folder: Path, tables: dict[str, TableSpec]) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._maps: dict[str, mmap.mmap] = {}
        self.tensors = {name: self._map(folder, name, table) for name, table in tables.items()}

    def expect(self, rows: torch.Tensor, names: Sequence[str]) -> None:
        """Asks the disk for rows `(n,)` of tables all at once, where reading would wait for one after the other."""
        for name in names:
            if name in self._maps:
                row_bytes = self.tensors[name][0].numel() * self.tensors[name].element_size()
                for row in rows.tolist():
                    start = row * row_bytes // _PAGE_BYTES * _PAGE_BYTES
                    self._maps[name].madvise(mmap.MADV_WILLNEED, start, (row + 1) * row_bytes - start)

    def release(self) -> None:
        """Gives all pages back to the operating system's cache: the process holds none, and nothing is lost."""
        for mapped in self._maps.values():
            mapped.madvise(mmap.MADV_DONTNEED)

    def _map(self, folder: Path, name: str, table: TableSpec) -> torch.Tensor:
        if not table.num_bytes:
            return torch.empty(table.shape, dtype=table.dtype)
        with tempfile.TemporaryFile(dir=folder) as file:
            if table.is_minus_one:  # in two's complement all bits are set, in whatever width
                for start in range(0, table.num_bytes, _FILL_BYTES):
                    file.write(b"\xff" * min(_FILL_BYTES, table.num_bytes - start))
                file.flush()
            os.ftruncate(file.fileno(), table.num_bytes)
            mapped = mmap.mmap(file.fileno(), table.num_bytes)
        mapped.madvise(mmap.MADV_RANDOM)  # rows are far apart: reading ahead would read a hundred for one
        self._maps[name] = mapped
        return torch.frombuffer(mapped, dtype=table.dtype).view(table.shape)


def check_table(name: str, saved: torch.Tensor, table: torch.Tensor, num_rows: int) -> None:
    """Refuses a table of a checkpoint that does not fit what is allocated.

    Raises:
        ValueError: with both shapes and dtypes.
    """
    expected = (num_rows, *table.shape[1:])
    if tuple(saved.shape) != expected or saved.dtype != table.dtype:
        raise ValueError(
            f"Memory bank table `{name}` of the checkpoint has shape {tuple(saved.shape)} and {saved.dtype}, but "
            f"{expected} and {table.dtype} are allocated: the slides, the tile encoder's width or the bank's dtype "
            "differ from those of the checkpoint."
        )


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="ascii")
    except OSError:
        return ""
