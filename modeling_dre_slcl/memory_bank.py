# SPDX-License-Identifier: Apache-2.0
"""Part 2, the memory bank: the latest feature of every tile of every training slide, and running sums over them.

The bank is training state: registered, non-persistent buffers of zero rows until `allocate`, never published, never
broadcast. Each process holds the slides it owns. Tile t of slide i is row `slide_start[i] + t`.

Beside the features it keeps, per slide, their sum and number at each codeword. The residuals of ALL tiles of a slide
then cost O(sampled tiles): take the stored part of the sampled tiles out, put their fresh one in. What is subtracted
is exactly what was added (the stored, rounded feature at its stored codeword); with float16 features and float64 sums
every sum is exact, so running sums never drift, in whatever order tiles are written.

Letters: S slides, B slides in a step, M tiles of each, K codewords, D feature width.
"""

from collections.abc import Callable, Sequence

import torch
from torch import nn

from .residual_encoder import assign_codewords

_NEVER = -1
_SLIDE_TABLES = ("feature_sums", "counts")
_TILE_TABLES = ("features", "written_step", "codeword")


class MemoryBank(nn.Module):
    """Stored tile features of slides, with running sums per codeword.

    Args:
        hidden_size (`int`): feature width D.
        num_codewords (`int`): number K of codewords.

    Buffers (all non-persistent):
        features (`(total tiles, D)`, float16 by default), written_step (`(total tiles,)`, int32, -1 = never),
        codeword (`(total tiles,)`, int16, -1 = none), feature_sums (`(S, K, D)`, float64), counts (`(S, K)`, int64),
        slide_start (`(S + 1,)`, int64).
    """

    BUFFER_NAMES = (*_TILE_TABLES, *_SLIDE_TABLES, "slide_start")

    def __init__(self, hidden_size: int, num_codewords: int) -> None:
        super().__init__()
        self.hidden_size, self.num_codewords = hidden_size, num_codewords
        self.register_buffer("features", torch.empty(0, hidden_size), persistent=False)
        self.register_buffer("written_step", torch.empty(0, dtype=torch.int32), persistent=False)
        self.register_buffer("codeword", torch.empty(0, dtype=torch.int16), persistent=False)
        self.register_buffer("feature_sums", torch.empty(0, num_codewords, hidden_size), persistent=False)
        self.register_buffer("counts", torch.empty(0, num_codewords, dtype=torch.int64), persistent=False)
        self.register_buffer("slide_start", torch.empty(0, dtype=torch.int64), persistent=False)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> "MemoryBank":
        """Follows the model to another device, but keeps every dtype: `model.half()` must not round the sums."""
        device = fn(torch.empty(0, device=self.features.device)).device
        for name in self.BUFFER_NAMES:
            buffer = getattr(self, name)
            moved = torch.empty_like(buffer, device=device) if buffer.is_meta else buffer.to(device)
            setattr(self, name, moved)
        return self

    def allocate(
        self,
        num_tiles: Sequence[int],
        *,
        dtype: torch.dtype = torch.float16,
        device: torch.device | str | None = None,
    ) -> None:
        """Makes room for slides; everything stored before is dropped.

        Args:
            num_tiles (sequence of `int`): tiles of each slide, in the order in which slides are addressed.
            dtype (`torch.dtype`, defaults to `torch.float16`): floating type of stored features. Sums are exact for
                float16; for wider types they are rounded to float64.
            device (`torch.device` or `str`, *optional*): where the bank lives; defaults to where it is now.
        """
        device = device if device is not None else self.features.device
        starts = torch.zeros(len(num_tiles) + 1, dtype=torch.int64)
        starts[1:] = torch.as_tensor(list(num_tiles), dtype=torch.int64).cumsum(0)
        total, shape = int(starts[-1]), (len(num_tiles), self.num_codewords)
        self.slide_start = starts.to(device)
        self.features = torch.zeros(total, self.hidden_size, dtype=dtype, device=device)
        self.written_step = torch.full((total,), _NEVER, dtype=torch.int32, device=device)
        self.codeword = torch.full((total,), _NEVER, dtype=torch.int16, device=device)
        self.feature_sums = torch.zeros(*shape, self.hidden_size, dtype=torch.float64, device=device)
        self.counts = torch.zeros(shape, dtype=torch.int64, device=device)

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
        return self.features[rows].float(), valid & (self.written_step[rows] != _NEVER)

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
            FloatingPointError: if a feature is not finite; nothing is stored then. It names the slide and the tile.
        """
        rows, valid = self._rows(slides, tiles)
        owner = slides.to(rows.device)[:, None].expand_as(rows)[valid]
        rows, fresh = rows[valid], features.detach().to(self.features.device)[valid].to(self.features.dtype)
        if not torch.isfinite(fresh).all():
            where = int((~torch.isfinite(fresh)).any(dim=1).nonzero()[0])
            tile = int(rows[where] - self.slide_start[owner[where]])
            raise FloatingPointError(f"The feature of tile {tile} of slide {int(owner[where])} is not finite.")
        stored = self.written_step[rows] != _NEVER
        self._accumulate(owner[stored], self.codeword[rows[stored]].long(), self.features[rows[stored]], sign=-1)
        codeword = assign_codewords(fresh.float(), codebook.to(fresh.device).float())
        self._accumulate(owner, codeword, fresh, sign=1)
        self.features[rows] = fresh
        self.codeword[rows] = codeword.to(self.codeword.dtype)
        self.written_step[rows] = step

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
        sums.view(-1, self.hidden_size).index_add_(0, flat, self.features[rows[stored]].double(), alpha=-1)
        counts.view(-1).index_add_(0, flat, torch.full_like(flat, -1))
        residuals = sums - counts[..., None] * codebook.to(sums.device, torch.float64)
        return residuals.float(), counts

    @torch.no_grad()
    def rebuild_sums(self, codebook: torch.Tensor) -> None:
        """Assigns every stored feature to its codeword of a new codebook `(K, D)` and recomputes all running sums."""
        self.feature_sums.zero_()
        self.counts.zero_()
        codebook = codebook.to(self.features.device).float()
        for slide, (start, end) in enumerate(
            zip(self.slide_start[:-1].tolist(), self.slide_start[1:].tolist(), strict=True)
        ):
            rows = torch.arange(start, end, device=self.features.device)
            rows = rows[self.written_step[rows] != _NEVER]
            codeword = assign_codewords(self.features[rows].float(), codebook)
            self.codeword[rows] = codeword.to(self.codeword.dtype)
            self._accumulate(torch.full_like(rows, slide), codeword, self.features[rows], sign=1)

    def health(self, step: int) -> dict[str, float]:
        """Says how full and how old the bank is.

        Args:
            step (`int`): the current training step.

        Returns:
            `dict`: `coverage` (share of tiles with a feature), `mean_age_steps` of those features, and
            `codewords_used` (share of codewords with at least one tile).
        """
        stored = self.written_step != _NEVER
        age = (step - self.written_step[stored]).double()
        return {
            "coverage": float(stored.double().mean()) if len(stored) else 0.0,
            "mean_age_steps": float(age.mean()) if len(age) else 0.0,
            "codewords_used": float((self.counts.sum(dim=0) > 0).double().mean()) if len(self.counts) else 0.0,
        }

    def slide_state(self, slides: Sequence[int]) -> dict[str, torch.Tensor]:
        """Returns everything stored of some slides (on CPU), for a checkpoint: tile rows in the order of `slides`."""
        rows = self._tile_rows(slides)
        state = {name: getattr(self, name)[rows].cpu() for name in _TILE_TABLES}
        index = torch.as_tensor(list(slides), dtype=torch.int64, device=self.counts.device)
        return state | {name: getattr(self, name)[index].cpu() for name in _SLIDE_TABLES}

    def load_slide_state(self, slides: Sequence[int], state: dict[str, torch.Tensor]) -> None:
        """Puts back what `slide_state` returned, for the same slides.

        Raises:
            ValueError: if the shapes or dtypes differ from what was allocated.
        """
        rows = self._tile_rows(slides)
        index = torch.as_tensor(list(slides), dtype=torch.int64, device=self.counts.device)
        for name in (*_TILE_TABLES, *_SLIDE_TABLES):
            table, saved = getattr(self, name), state[name]
            place = rows if name in _TILE_TABLES else index
            if saved.shape != (len(place), *table.shape[1:]) or saved.dtype != table.dtype:
                raise ValueError(
                    f"Memory bank table `{name}` of the checkpoint has shape {tuple(saved.shape)} and {saved.dtype}, "
                    f"but {(len(place), *table.shape[1:])} and {table.dtype} are allocated: the slides, the tile "
                    "encoder's width or the bank's dtype differ from those of the checkpoint."
                )
            table[place] = saved.to(table.device)

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

    def _accumulate(self, slides: torch.Tensor, codeword: torch.Tensor, features: torch.Tensor, sign: int) -> None:
        """Adds features `(n, D)` at their slide and codeword to the running sums, or with `sign=-1` takes them out."""
        flat = slides * self.num_codewords + codeword
        self.feature_sums.view(-1, self.hidden_size).index_add_(0, flat, features.double(), alpha=sign)
        self.counts.view(-1).index_add_(0, flat, torch.full_like(flat, sign))
