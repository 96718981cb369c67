# SPDX-License-Identifier: Apache-2.0
"""Part 2, the memory bank: the latest feature of every tile of every training slide, and running sums over them.

The bank is training state: registered, non-persistent buffers of zero rows until `allocate`, never published, never
broadcast. Each process holds the slides it owns. Tile t of slide i is row `slide_start[i] + t`.

Beside the features it keeps, per slide, their sum and number at each codeword. The residuals of ALL tiles of a slide
then cost O(sampled tiles): take the stored part of the sampled tiles out, put their fresh one in. What is subtracted
is exactly what was added (the stored, rounded feature at its stored codeword), and every float64 sum is exact
(`bank_codec` says why), so running sums never drift, in whatever order tiles are written and on whatever device.

Nothing that a step or a line of the log does takes time or memory that grows with the tiles of a slide or of the bank.

Letters: S slides, B slides in a step, M tiles of each, K codewords, D feature width, T steps.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

from .bank_codec import FEATURE_LIMIT, decode_features, encode_features, max_tiles_per_slide
from .bank_health import describe_health, measure_drift
from .bank_storage import MappedTables, bank_tables, check_room, check_table, make_table
from .residual_encoder import assign_codewords

_NEVER = -1
SLIDE_TABLES = ("feature_sums", "counts")
TILE_TABLES = ("features", "scales", "written_step", "codeword")
_ROWS_PER_CHUNK = 1 << 14  # of passes over whole slides
_WRITES_PER_RELEASE = 64  # of mapped pages, so that a process holds those of so many steps at most


@torch.no_grad()
def codeword_drift(
    fresh: torch.Tensor, stored: torch.Tensor, is_stored: torch.Tensor, codebook: torch.Tensor
) -> torch.Tensor:
    """How far features have moved since they were stored, at each codeword, measured on the tiles encoded now.

    Stored features lag behind the tile encoder. Much of that is common to all tiles near a codeword, so what the
    fresh tiles show of it corrects the stale ones. Collective: the tiles of all processes count.

    Args:
        fresh (`torch.Tensor` of shape `(B, M, D)`, float): features of the sampled tiles.
        stored (`torch.Tensor` of shape `(B, M, D)`, float): what the bank holds of them.
        is_stored (`torch.Tensor` of shape `(B, M)`, bool): False for padding and for tiles never stored.
        codebook (`torch.Tensor` of shape `(K, D)`, float): codewords.

    Returns:
        `torch.Tensor` of shape `(K, D)`, float32: mean movement of the tiles at each codeword; where there are none,
        that of all tiles.
    """
    stored = stored.to(fresh.device)
    # (B, M, D) -> (n, D)
    moved = (fresh.float() - stored.float())[is_stored]
    codeword = assign_codewords(stored[is_stored].float(), codebook.float())
    table = torch.zeros(len(codebook), moved.shape[-1] + 1, dtype=torch.float64, device=moved.device)
    table.index_add_(0, codeword, torch.cat([moved, torch.ones_like(moved[:, :1])], dim=1).double())
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(table)
    sums, counts = table[:, :-1], table[:, -1:]
    overall = sums.sum(dim=0) / counts.sum().clamp(min=1)
    return torch.where(counts > 0, sums / counts.clamp(min=1), overall).float()


class MemoryBank(nn.Module):
    """Stored tile features of slides, with running sums per codeword.

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
        self._num_writes, self._drift_step = 0, _NEVER
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

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> "MemoryBank":
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

    def read(self, slides: torch.Tensor, tiles: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Reads stored features.

        Args:
            slides (`torch.Tensor` of shape `(B,)`, int64): slides, by their place in `allocate`.
            tiles (`torch.Tensor` of shape `(B, M)`, int64): tiles of each slide; -1 marks padding.

        Returns:
            `tuple`: features of shape `(B, M, D)`, float32, and a mask of shape `(B, M)`, True where a feature is
            stored.
        """
        rows, valid = self._rows(slides, tiles)
        features = self.stored_features(rows.flatten()).view(*rows.shape, self.hidden_size)
        return features, valid & (self.written_step[rows] != _NEVER)

    def stored_features(self, rows: torch.Tensor) -> torch.Tensor:
        """Returns what is stored at rows `(n,)` of the tables: `torch.Tensor` of shape `(n, D)`, float32, exact."""
        if self._mapped is not None:
            self._mapped.expect(rows, ("features", "scales"))
        return decode_features(self.features[rows], self.scales[rows])

    @torch.no_grad()
    def write(
        self, slides: torch.Tensor, tiles: torch.Tensor, features: torch.Tensor, codebook: torch.Tensor, step: int
    ) -> None:
        """Stores fresh features in place of the old ones and moves the running sums along.

        Args:
            slides (`torch.Tensor` of shape `(B,)`, int64): slides, by their place in `allocate`.
            tiles (`torch.Tensor` of shape `(B, M)`, int64): tiles of each slide, without repetition; -1 marks padding.
            features (`torch.Tensor` of shape `(B, M, D)`, float): their fresh features.
            codebook (`torch.Tensor` of shape `(K, D)`, float): codewords.
            step (`int`): the training step that made the features.

        Raises:
            FloatingPointError: if a feature is not finite, or far from L2-normalised; nothing is stored then. It names
                the slide and the tile.
        """
        rows, valid = self._rows(slides, tiles)
        owner = slides.to(rows.device)[:, None].expand_as(rows)[valid]
        rows, fresh = rows[valid], features.detach().to(self.features.device)[valid].float()
        self._refuse_unusable(rows, owner, fresh)
        numbers, scales = encode_features(fresh, self.features.dtype)
        fresh, before = decode_features(numbers, scales), self.written_step[rows]
        stored = before != _NEVER
        old = self.stored_features(rows[stored])
        self._accumulate(owner[stored], self.codeword[rows[stored]].long(), old, sign=-1)
        codeword = assign_codewords(fresh, codebook.to(fresh.device).float())
        self._accumulate(owner, codeword, fresh, sign=1)
        self.features[rows], self.scales[rows] = numbers, scales
        self.codeword[rows] = codeword.to(self.codeword.dtype)
        self.written_step[rows] = step
        self._count_steps(before[stored], sign=-1)
        self._count_steps(torch.full_like(before, step), sign=1, latest=step)
        self._note_drift(old, fresh[stored], step)
        if self.on_write is not None:
            self.on_write(rows)
        self._num_writes += 1
        if self._mapped is not None and self._num_writes % _WRITES_PER_RELEASE == 0:
            self._mapped.release()

    @torch.no_grad()
    def residuals_of_others(
        self, slides: torch.Tensor, tiles: torch.Tensor, codebook: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Residual sums over all stored tiles of the slides but the given ones, by the running sums.

        Args:
            slides (`torch.Tensor` of shape `(B,)`, int64): slides, by their place in `allocate`.
            tiles (`torch.Tensor` of shape `(B, M)`, int64): tiles to leave out; -1 marks padding.
            codebook (`torch.Tensor` of shape `(K, D)`, float): codewords.

        Returns:
            `tuple`: residuals of shape `(B, K, D)`, float32, and counts of shape `(B, K)`, int64.
        """
        rows, valid = self._rows(slides, tiles)
        slides = slides.to(rows.device)
        sums, counts = self.feature_sums[slides].clone(), self.counts[slides].clone()
        stored = valid & (self.written_step[rows] != _NEVER)
        place = torch.arange(len(slides), device=rows.device)[:, None].expand_as(rows)[stored]
        codeword = self.codeword[rows[stored]].long()
        flat = place * self.num_codewords + codeword
        sums.view(-1, self.hidden_size).index_add_(0, flat, self.stored_features(rows[stored]).double(), alpha=-1)
        counts.view(-1).index_add_(0, flat, torch.full_like(flat, -1))
        residuals = sums - counts[..., None] * codebook.to(sums.device, torch.float64)
        return residuals.float(), counts

    @torch.no_grad()
    def rebuild_sums(self, codebook: torch.Tensor | None = None, slides: Sequence[int] | None = None) -> None:
        """Recomputes everything that is derived from the stored features of slides.

        Args:
            codebook (`torch.Tensor` of shape `(K, D)`, float, *optional*): a new codebook, to which every stored
                feature is assigned; by default each keeps its codeword.
            slides (sequence of `int`, *optional*): slides; by default all.
        """
        slides = range(len(self.counts)) if slides is None else slides
        if codebook is not None:
            codebook = codebook.to(self.features.device).float()
        starts = self.slide_start.tolist()
        for slide in slides:
            self.codeword_counts -= self.counts[slide]
            self.feature_sums[slide], self.counts[slide] = 0, 0
            for start in range(starts[slide], starts[slide + 1], _ROWS_PER_CHUNK):
                rows = torch.arange(
                    start, min(start + _ROWS_PER_CHUNK, starts[slide + 1]), device=self.features.device
                )
                rows = rows[self.written_step[rows] != _NEVER]
                features = self.stored_features(rows)
                if codebook is not None:
                    self.codeword[rows] = assign_codewords(features, codebook).to(self.codeword.dtype)
                self._accumulate(torch.full_like(rows, slide), self.codeword[rows].long(), features, sign=1)
            if self._mapped is not None:
                self._mapped.release()
        if codebook is not None and self.on_write is not None:
            self.on_write(None)

    def health(self, step: int, reduce: Callable[[torch.Tensor], torch.Tensor] | None = None) -> dict[str, float]:
        """Says how full, how old and how well spread the bank is; takes O(K + steps), whatever the number of tiles.

        Args:
            step (`int`): the current training step; nothing that is stored is newer.
            reduce (callable, *optional*): sums a float64 tensor over all processes; the result then is of all tiles.

        Returns:
            `dict`: see `describe_health`.
        """
        written = torch.zeros(step + 1, dtype=torch.float64, device=self.step_counts.device)
        known = self.step_counts[: step + 1]
        written[: len(known)] = known.double()
        sums = [self.slide_start[-1:].double(), self.drift_sums, self.codeword_counts.double(), written]
        flat = torch.cat(sums)
        flat = (flat if reduce is None else reduce(flat)).cpu()
        tiles, drift, codewords, written = flat.split([len(part) for part in (flat[:1], *sums[1:])])
        return describe_health(float(tiles), drift, codewords, written)

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
        self._count_steps(before[before != _NEVER], sign=-1)
        self._count_steps(after[after != _NEVER], sign=1, latest=int(after.max()) if len(after) else 0)
        for name in TILE_TABLES:
            getattr(self, name)[rows] = state[name].to(rows.device)

    def _rows(self, slides: torch.Tensor, tiles: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Rows of tiles (padding points at row 0) and the mask of real tiles, both `(B, M)`."""
        slides, tiles = slides.to(self.slide_start.device), tiles.to(self.slide_start.device)
        valid = tiles >= 0
        rows = torch.where(valid, self.slide_start[slides][:, None] + tiles, 0)
        if (rows >= torch.where(valid, self.slide_start[slides + 1][:, None], 1)).any():
            raise IndexError("A tile index lies beyond the tiles allocated for its slide.")
        return rows, valid

    def _tile_rows(self, slides: Sequence[int]) -> torch.Tensor:
        starts = self.slide_start.tolist()
        ranges = [torch.arange(starts[slide], starts[slide + 1]) for slide in slides]
        return torch.cat(ranges or [torch.arange(0)]).to(self.features.device)

    def _refuse_unusable(self, rows: torch.Tensor, owner: torch.Tensor, fresh: torch.Tensor) -> None:
        # A comparison with NaN is false.
        usable = (fresh.abs() <= FEATURE_LIMIT).all(dim=1)
        if not usable.all():
            where = int((~usable).nonzero()[0])
            tile = int(rows[where] - self.slide_start[owner[where]])
            is_finite = bool(torch.isfinite(fresh[where]).all())
            found = f"beyond {FEATURE_LIMIT:g}, though features are L2-normalised" if is_finite else "not finite"
            raise FloatingPointError(f"The feature of tile {tile} of slide {int(owner[where])} is {found}.")

    def _accumulate(self, slides: torch.Tensor, codeword: torch.Tensor, features: torch.Tensor, sign: int) -> None:
        """Adds features `(n, D)` at their slide and codeword to the running sums, or with `sign=-1` takes them out."""
        flat, ones = slides * self.num_codewords + codeword, torch.full_like(codeword, sign)
        self.feature_sums.view(-1, self.hidden_size).index_add_(0, flat, features.double(), alpha=sign)
        self.counts.view(-1).index_add_(0, flat, ones)
        self.codeword_counts.index_add_(0, codeword, ones)

    def _count_steps(self, steps: torch.Tensor, *, sign: int, latest: int = 0) -> None:
        """Counts tiles as last written at `steps` `(n,)`, none of them after `latest` or what was counted before."""
        if latest >= len(self.step_counts):
            longer = self.step_counts.new_zeros(max(latest + 1, 2 * len(self.step_counts)))
            longer[: len(self.step_counts)] = self.step_counts
            self.step_counts = longer
        steps = steps.long()
        self.step_counts.index_add_(0, steps, torch.full_like(steps, sign))

    def _note_drift(self, old: torch.Tensor, fresh: torch.Tensor, step: int) -> None:
        """Adds how far tiles moved, from what was stored to what is stored now `(n, D)`, to that of the same step."""
        if step != self._drift_step:
            self.drift_sums.zero_()
            self._drift_step = step
        self.drift_sums += measure_drift(old, fresh)
