# SPDX-License-Identifier: Apache-2.0
"""The tables of the memory bank: room for them, wherever they live, and their way into checkpoints and back.

Letters: S slides, K codewords, D feature width, T steps, n tiles.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import nn

from .bank_codec import decode_features, max_tiles_per_slide
from .bank_storage import MappedTables, bank_tables, check_room, check_table, make_table

NEVER = -1
SLIDE_TABLES = ("feature_sums", "counts")
TILE_TABLES = ("features", "scales", "written_step", "codeword")


class BankTables(nn.Module):
    """The tables of the bank: by tile its feature, step and codeword, by slide its sums and counts.

    Args:
        hidden_size (`int`): feature width D.
        num_codewords (`int`): number K of codewords.

    Buffers (all non-persistent):
        features (`(total tiles, D)`, float16 by default), scales (`(total tiles, 1)` for int8 features, else
        `(total tiles, 0)`, float16), written_step (`(total tiles,)`, int32, -1 = never), codeword (`(total tiles,)`,
        int16, -1 = none), feature_sums (`(S, K, D)`, float64), counts (`(S, K)`, int64), slide_start (`(S + 1,)`,
        int64), and what `health` is told from: codeword_counts (`(K,)`, int64), step_counts (`(T,)`, int64: tiles last
        written at each step), drift_sums (`(3,)`, float64: tiles written again in the latest step, sum of their L2
        distances, of their cosines).

    Attributes:
        on_write (callable, *optional*): is told the rows `(n,)` of tiles that were just written, or `None` when all
            may have changed.
    """

    BUFFER_NAMES = (*TILE_TABLES, *SLIDE_TABLES, "slide_start", "codeword_counts", "step_counts", "drift_sums")

    def __init__(self, hidden_size: int, num_codewords: int) -> None:
        super().__init__()
        self.hidden_size, self.num_codewords = hidden_size, num_codewords
        self.on_write: Callable[[torch.Tensor | None], None] | None = None
        self._mapped: MappedTables | None = None
        self._num_writes, self._drift_step = 0, NEVER
        shapes = {
            "features": ((0, hidden_size), torch.float32),
            "scales": ((0, 0), torch.float16),
            "written_step": ((0,), torch.int32),
            "codeword": ((0,), torch.int16),
            "feature_sums": ((0, num_codewords, hidden_size), torch.float64),
            "counts": ((0, num_codewords), torch.int64),
            "slide_start": ((0,), torch.int64),
            "codeword_counts": ((0,), torch.int64),
            "step_counts": ((0,), torch.int64),
            "drift_sums": ((0,), torch.float64),
        }
        for name, (shape, dtype) in shapes.items():
            self.register_buffer(name, torch.zeros(shape, dtype=dtype), persistent=False)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> "BankTables":
        """Follows the model to another device, but keeps every dtype: `model.half()` must not round the sums.

        A bank that is mapped from a disk stays there.
        """
        if self._mapped is not None:
            return self
        device = fn(torch.empty(0, device=self.features.device)).device
        for name in self.BUFFER_NAMES:
            buffer = getattr(self, name)
            moved = torch.empty_like(buffer, device=device) if buffer.is_meta else buffer.to(device)
            setattr(self, name, moved)
        return self

    @property
    def is_mapped(self) -> bool:
        """Whether the tables are mapped from files on a disk."""
        return self._mapped is not None

    def allocate(
        self,
        num_tiles: Sequence[int],
        *,
        dtype: torch.dtype = torch.float16,
        device: torch.device | str | None = None,
        folder: str | Path | None = None,
        num_sharing: int = 1,
    ) -> None:
        """Makes room for slides; everything stored before is dropped.

        Args:
            num_tiles (sequence of `int`): tiles of each slide, in the order in which slides are addressed.
            dtype (`torch.dtype`, defaults to `torch.float16`): type of stored features: float16, bfloat16, int8 or
                float32.
            device (`torch.device` or `str`, *optional*): where the bank lives; defaults to where it is now.
            folder (`str` or `Path`, *optional*): a folder on a disk: the tables are mapped from files in it instead.
            num_sharing (`int`, defaults to 1): processes that each allocate as much in the same memory or disk.

        Raises:
            ValueError: if the bank does not fit, with the numbers, before anything is allocated; or if a slide has
                more tiles than can be summed without rounding.
        """
        counts = torch.as_tensor(list(num_tiles), dtype=torch.int64)
        limit = max_tiles_per_slide(dtype)
        if len(counts) and int(counts.max()) > limit:
            raise ValueError(
                f"A slide has {int(counts.max())} tiles, but sums of features stored in {dtype} are exact up to "
                f"{limit}; choose float16, or tile at a coarser mpp."
            )
        sizes = {"hidden_size": self.hidden_size, "num_codewords": self.num_codewords, "dtype": dtype}
        tables = bank_tables(counts.tolist(), **sizes)
        device = torch.device("cpu" if folder is not None else device if device is not None else self.features.device)
        folder = None if folder is None else Path(folder)
        check_room(tables, device=device, folder=folder, num_sharing=num_sharing)
        self._mapped = None if folder is None else MappedTables(folder, tables)
        for name, table in tables.items():
            # The old table goes before the new one comes.
            setattr(self, name, torch.empty(0, device=device))
            setattr(self, name, make_table(table, device) if folder is None else self._mapped.tensors[name])
        self.slide_start = torch.cat([counts.new_zeros(1), counts.cumsum(0)]).to(device)
        self.codeword_counts = torch.zeros(self.num_codewords, dtype=torch.int64, device=device)
        self.step_counts = torch.zeros(1, dtype=torch.int64, device=device)
        self.drift_sums = torch.zeros(3, dtype=torch.float64, device=device)

    def stored_features(self, rows: torch.Tensor) -> torch.Tensor:
        """Returns what is stored at rows `(n,)` of the tables: `torch.Tensor` of shape `(n, D)`, float32, exact."""
        if self._mapped is not None:
            self._mapped.expect(rows, ("features", "scales"))
        return decode_features(self.features[rows], self.scales[rows])

    def slide_state(self, slides: Sequence[int]) -> dict[str, torch.Tensor]:
        """Returns everything stored of some slides (on CPU), for a checkpoint: tile rows in the order of `slides`."""
        rows = self._tile_rows(slides)
        state = {name: getattr(self, name)[rows].cpu() for name in TILE_TABLES}
        index = torch.as_tensor(list(slides), dtype=torch.int64, device=self.counts.device)
        return state | {name: getattr(self, name)[index].cpu() for name in SLIDE_TABLES}

    @torch.no_grad()
    def load_slide_state(self, slides: Sequence[int], state: dict[str, torch.Tensor]) -> None:
        """Puts back what `slide_state` returned, for the same slides.

        Raises:
            ValueError: if the shapes or dtypes differ from what was allocated.
        """
        rows = self._tile_rows(slides)
        index = torch.as_tensor(list(slides), dtype=torch.int64, device=self.counts.device)
        for name in (*TILE_TABLES, *SLIDE_TABLES):
            check_table(name, state[name], getattr(self, name), len(rows if name in TILE_TABLES else index))
        self.codeword_counts -= self.counts[index].sum(dim=0)
        self.load_rows(rows, {name: state[name] for name in TILE_TABLES})
        for name in SLIDE_TABLES:
            getattr(self, name)[index] = state[name].to(self.counts.device)
        self.codeword_counts += self.counts[index].sum(dim=0)

    def load_rows(self, rows: torch.Tensor, state: dict[str, torch.Tensor]) -> None:
        """Puts back rows of the tables by tile; sums are not touched: `rebuild_sums` makes them anew.

        Args:
            rows (`torch.Tensor` of shape `(n,)`, int64): rows.
            state (`dict` of tensors): `features`, `scales`, `written_step` and `codeword`, n rows each.

        Raises:
            ValueError: if the shapes or dtypes differ from what was allocated.
        """
        for name in TILE_TABLES:
            check_table(name, state[name], getattr(self, name), len(rows))
        before, after = self.written_step[rows], state["written_step"].to(rows.device)
        self._count_steps(before[before != NEVER], sign=-1)
        self._count_steps(after[after != NEVER], sign=1, latest=int(after.max()) if len(after) else 0)
        for name in TILE_TABLES:
            getattr(self, name)[rows] = state[name].to(rows.device)
        if self._mapped is not None:
            self._mapped.release()

    def _tile_rows(self, slides: Sequence[int]) -> torch.Tensor:
        starts = self.slide_start.tolist()
        ranges = [torch.arange(starts[slide], starts[slide + 1]) for slide in slides]
        return torch.cat(ranges or [torch.arange(0)]).to(self.features.device)

    def _count_steps(self, steps: torch.Tensor, *, sign: int, latest: int = 0) -> None:
        """Counts tiles as last written at `steps` `(n,)`, none of them after `latest` or what was counted before."""
        if latest >= len(self.step_counts):
            longer = self.step_counts.new_zeros(max(latest + 1, 2 * len(self.step_counts)))
            longer[: len(self.step_counts)] = self.step_counts
            self.step_counts = longer
        steps = steps.long()
        self.step_counts.index_add_(0, steps, torch.full_like(steps, sign))
