# SPDX-License-Identifier: Apache-2.0
"""The memory bank's part of a checkpoint: whole while it is small; else a base, and the rows changed since.

```
bank-00003-of-00008.safetensors                       virtual shard 3, whole
bank-00003-of-00008.base-00000100-0000.safetensors    or: its rows as they were at step 100, in pieces
bank-00003-of-00008.rows-00000200.safetensors             and those changed by step 200, with their places in the shard
bank-00003-of-00008.rows-00000300.safetensors             and those changed after that by step 300
```

Every checkpoint folder is complete: what did not change is linked into it from the one before (a hard link takes no
room, and stays when that one is removed). Once too many rows have changed a new base is written, once there are too
many files of changed rows one takes their place. Running sums are not written: they are sums of stored features
without rounding, so what is recomputed from the features is what was there, to the bit.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch

from modeling_dre_slcl import MemoryBank
from modeling_dre_slcl.bank_tables import TILE_TABLES

from .checkpoint import CheckpointError, bank_file, load_tensors

_PIECE_BYTES = 256 << 20
_ROWS = "rows"


@dataclass
class _Shard:
    """What the newest checkpoint holds of a shard.

    Args:
        slides (`list` of `int`): its slides, as places in the bank.
        first (`int`), stop (`int`): its rows of the bank's tables.
        base (`list` of `str`), changes (`list` of `str`): names of files.
        changed (`torch.Tensor` of shape `(n,)`, int64): rows changed since the base.
    """

    slides: list[int]
    first: int
    stop: int
    base: list[str] = field(default_factory=list)
    changes: list[str] = field(default_factory=list)
    changed: torch.Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))


class _LazyFiles(Mapping[str, dict[str, torch.Tensor]]):
    """File name -> tensors, made when they are asked for: one file's are in memory at a time."""

    def __init__(self, bank: MemoryBank) -> None:
        self.bank = bank
        self.sources: dict[str, list[int] | tuple[int, int] | tuple[torch.Tensor, int]] = {}

    def __len__(self) -> int:
        return len(self.sources)

    def __iter__(self) -> Iterator[str]:
        return iter(self.sources)

    def __getitem__(self, name: str) -> dict[str, torch.Tensor]:
        source = self.sources[name]
        if isinstance(source, list):
            return self.bank.slide_state(source)
        first, second = source
        if isinstance(first, int):
            return {table: getattr(self.bank, table)[first:second].cpu().contiguous() for table in TILE_TABLES}
        place = first.to(self.bank.features.device)
        return {_ROWS: first - second} | {table: getattr(self.bank, table)[place].cpu() for table in TILE_TABLES}


class BankJournal:
    """Says which files of the bank a checkpoint needs, and reads them back.

    Args:
        bank (`MemoryBank`): allocated; the journal listens to what is written to it.
        shards (`dict`): virtual shard -> its slides, as places in the bank, of the shards of this process.
        num_shards (`int`): virtual shards of all processes.
        whole_bytes (`int`): a shard up to this size is written whole each time.
        compact_share (`float`, defaults to 0.5): a new base is written once so many of a shard's rows have changed.
        max_changes (`int`, defaults to 16): files of changed rows, until one takes their place.
    """

    def __init__(
        self,
        bank: MemoryBank,
        shards: dict[int, list[int]],
        num_shards: int,
        *,
        whole_bytes: int,
        compact_share: float = 0.5,
        max_changes: int = 16,
    ) -> None:
        self.bank, self.num_shards, self.whole_bytes = bank, num_shards, whole_bytes
        self.compact_share, self.max_changes = compact_share, max_changes
        starts = bank.slide_start.tolist()
        self._shards = {
            shard: _Shard(slides, starts[slides[0]], starts[slides[-1] + 1]) for shard, slides in shards.items()
        }
        self._row_bytes = sum(
            getattr(bank, name)[:1].numel() * getattr(bank, name).element_size() for name in TILE_TABLES
        )
        self._folder: Path | None = None
        self._planned: dict[int, _Shard] = {}
        self._forget()
        bank.on_write = self._note

    def files(self, step: int) -> tuple[Mapping[str, dict[str, torch.Tensor]], dict[str, Path]]:
        """Plans the checkpoint of a step.

        Args:
            step (`int`): completed steps.

        Returns:
            `tuple`: file name -> tensors of what is new, made when asked for; and file name -> the file of the
            checkpoint before that has the same content.
        """
        new, kept = _LazyFiles(self.bank), {}
        written = torch.cat([rows.cpu() for rows in self._written] or [torch.empty(0, dtype=torch.int64)]).unique()
        for shard, now in self._shards.items():
            planned = self._plan(shard, now, written[(written >= now.first) & (written < now.stop)], step, new)
            kept |= {name: self._folder / name for name in (*planned.base, *planned.changes) if name not in new}
            self._planned[shard] = planned
        return new, kept

    def committed(self, folder: Path) -> None:
        """Is told that the checkpoint last planned is complete, and where."""
        self._folder, self._shards, self._planned = folder, self._planned, {}
        self._forget()

    def restore(self, folder: Path) -> None:
        """Reads the bank from a checkpoint whose files were checked.

        Args:
            folder (`Path`): the checkpoint.

        Raises:
            CheckpointError: if a file is missing or its rows are not those of the shard.
            ValueError: if the tables have other shapes or dtypes than the bank.
        """
        for shard, now in self._shards.items():
            name = bank_file(shard, self.num_shards)
            stem = name.removesuffix(".safetensors")
            now.base = sorted(path.name for path in folder.glob(f"{stem}.base-*.safetensors"))
            now.changes = sorted(path.name for path in folder.glob(f"{stem}.rows-*.safetensors"))
            if now.base:
                self._read_shard(folder, now)
            else:
                self.bank.load_slide_state(now.slides, load_tensors(folder / name))
        self._folder = folder
        self._forget()

    def _plan(self, shard: int, now: _Shard, written: torch.Tensor, step: int, new: _LazyFiles) -> _Shard:
        """Adds a shard's new files to `new`; returns what the shard then consists of."""
        name, num_rows = bank_file(shard, self.num_shards), now.stop - now.first
        stem = name.removesuffix(".safetensors")
        planned = _Shard(now.slides, now.first, now.stop)
        if num_rows * self._row_bytes <= self.whole_bytes:
            new.sources[name] = now.slides
            return planned
        changed = torch.cat([now.changed, written]).unique()
        if self._everything or not now.base or len(changed) > self.compact_share * num_rows:
            piece_rows = max(1, _PIECE_BYTES // self._row_bytes)
            for piece, first in enumerate(range(now.first, now.stop, piece_rows)):
                planned.base.append(f"{stem}.base-{step:08d}-{piece:04d}.safetensors")
                new.sources[planned.base[-1]] = (first, min(first + piece_rows, now.stop))
            return planned
        planned.base, planned.changes, planned.changed = now.base, list(now.changes), changed
        if len(planned.changes) >= self.max_changes:
            planned.changes, written = [], changed
        if len(written):
            planned.changes.append(f"{stem}.rows-{step:08d}.safetensors")
            new.sources[planned.changes[-1]] = (written, now.first)
        return planned

    def _read_shard(self, folder: Path, now: _Shard) -> None:
        row = now.first
        for name in now.base:
            piece = load_tensors(folder / name)
            rows = torch.arange(row, row + len(piece["written_step"]))
            self._load(folder / name, now, rows, piece)
            row += len(rows)
        if row != now.stop:
            raise CheckpointError(f"{folder / now.base[0]}: {now.stop - row} of the shard's rows are missing.")
        changed = [now.changed[:0]]
        for name in now.changes:
            state = load_tensors(folder / name)
            changed.append(state.pop(_ROWS) + now.first)
            self._load(folder / name, now, changed[-1], state)
        now.changed = torch.cat(changed).unique()
        self.bank.rebuild_sums(slides=now.slides)

    def _load(self, path: Path, now: _Shard, rows: torch.Tensor, state: dict[str, torch.Tensor]) -> None:
        if len(rows) and not now.first <= int(rows.min()) <= int(rows.max()) < now.stop:
            raise CheckpointError(f"{path} holds rows that the shard has not: it is of another dataset.")
        self.bank.load_rows(rows.to(self.bank.features.device), state)

    def _note(self, rows: torch.Tensor | None) -> None:
        if self._everything:
            return
        self._num_written += 0 if rows is None else len(rows)
        # A pass over all tiles is not worth remembering row by row.
        if rows is None or self._num_written > self.compact_share * len(self.bank.written_step):
            self._everything, self._written = True, []
        else:
            self._written.append(rows)

    def _forget(self) -> None:
        self._written: list[torch.Tensor] = []
        self._num_written, self._everything = 0, False
