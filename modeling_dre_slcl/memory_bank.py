# SPDX-License-Identifier: Apache-2.0
"""Part 2, the memory bank: the latest feature of every tile of every training slide, and running sums over them.

The bank is training state: registered, non-persistent buffers of zero rows until `allocate`, never published, never
broadcast. Each process holds the slides it owns. Tile t of slide i is row `slide_start[i] + t`.

Beside the features it keeps, per slide, their sum and number at each codeword. The residuals of ALL tiles of a slide
then cost O(sampled tiles): take the stored part of the sampled tiles out, put their fresh one in. What is subtracted
is exactly what was added (the stored, rounded feature at its stored codeword), and every float64 sum is exact
(`bank_codec` says why), so running sums never drift, in whatever order tiles are written and on whatever device.

Nothing that a step or a line of the log does takes time or memory that grows with the tiles of a slide or of the bank,
but for `moved_residuals_of_others`, whose time grows with the tiles of the step's slides.

Letters: S slides, B slides in a step, M tiles of each, K codewords, D feature width, T steps.
"""

from collections.abc import Callable, Sequence

import torch

from .bank_codec import FEATURE_LIMIT, decode_features, encode_features
from .bank_health import describe_health, measure_drift
from .bank_tables import NEVER, BankTables
from .feature_drift import FeatureDrift
from .residual_encoder import assign_codewords, residual_sums

_ROWS_PER_CHUNK = 1 << 14  # of passes over whole slides
_WRITES_PER_RELEASE = 64  # of mapped pages, so that a process holds those of so many steps at most


class MemoryBank(BankTables):
    """Stored tile features of slides, with running sums per codeword; arguments and buffers as in `BankTables`."""

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
        return features, valid & (self.written_step[rows] != NEVER)

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
        stored = before != NEVER
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
        stored = valid & (self.written_step[rows] != NEVER)
        place = torch.arange(len(slides), device=rows.device)[:, None].expand_as(rows)[stored]
        codeword = self.codeword[rows[stored]].long()
        flat = place * self.num_codewords + codeword
        sums.view(-1, self.hidden_size).index_add_(0, flat, self.stored_features(rows[stored]).double(), alpha=-1)
        counts.view(-1).index_add_(0, flat, torch.full_like(flat, -1))
        residuals = sums - counts[..., None] * codebook.to(sums.device, torch.float64)
        return residuals.float(), counts

    def ages(self, slides: torch.Tensor, tiles: torch.Tensor, step: int) -> torch.Tensor:
        """How long ago tiles were stored, in steps.

        Args:
            slides (`torch.Tensor` of shape `(B,)`, int64): slides, by their place in `allocate`.
            tiles (`torch.Tensor` of shape `(B, M)`, int64): tiles of each slide.
            step (`int`): the step in progress, of number `step + 1` in `write`.

        Returns:
            `torch.Tensor` of shape `(B, M)`, int64: without meaning where nothing is stored.
        """
        return step + 1 - self.written_step[self._rows(slides, tiles)[0]].long()

    @torch.no_grad()
    def moved_residuals_of_others(
        self, slides: torch.Tensor, tiles: torch.Tensor, codebook: torch.Tensor, step: int, drift: FeatureDrift
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Residual sums over all stored tiles of the slides but the given ones, where they are by now.

        A moved tile may be at another codeword, which running sums cannot tell. So this reads all features of the
        slides, in chunks.

        Args:
            slides (`torch.Tensor` of shape `(B,)`, int64): slides, by their place in `allocate`.
            tiles (`torch.Tensor` of shape `(B, M)`, int64): tiles to leave out; -1 marks padding.
            codebook (`torch.Tensor` of shape `(K, D)`, float): codewords.
            step (`int`): the step in progress.
            drift (`FeatureDrift`): how features have moved since they were stored.

        Returns:
            `tuple`: residuals of shape `(B, K, D)` and counts of shape `(B, K)`, both float64.
        """
        rows, valid = self._rows(slides, tiles)
        residuals = torch.zeros(len(slides), *codebook.shape, dtype=torch.float64, device=codebook.device)
        counts = torch.zeros(residuals.shape[:2], dtype=torch.float64, device=codebook.device)
        starts = self.slide_start.tolist()
        for place, slide in enumerate(slides.tolist()):
            for start in range(starts[slide], starts[slide + 1], _ROWS_PER_CHUNK):
                end = min(start + _ROWS_PER_CHUNK, starts[slide + 1])
                others = torch.arange(start, end, device=rows.device)
                left_out = torch.isin(others, rows[place][valid[place]]) | (self.written_step[others] == NEVER)
                others = others[~left_out]
                moved = drift.move(self.stored_features(others), step + 1 - self.written_step[others])
                # In float64, as the running sums: residuals are small against the features and codewords they are of.
                found, number = residual_sums(moved.to(codebook.device).double()[None], codebook.double())
                # A feature that is not finite has a nearest codeword too; it must reach the loss as it is.
                residuals[place] += found[0] if torch.isfinite(moved).all() else torch.nan
                counts[place] += number[0]
            if self._mapped is not None:
                self._mapped.release()
        return residuals, counts

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
                rows = rows[self.written_step[rows] != NEVER]
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

    def _rows(self, slides: torch.Tensor, tiles: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Rows of tiles (padding points at row 0) and the mask of real tiles, both `(B, M)`."""
        slides, tiles = slides.to(self.slide_start.device), tiles.to(self.slide_start.device)
        valid = tiles >= 0
        rows = torch.where(valid, self.slide_start[slides][:, None] + tiles, 0)
        if (rows >= torch.where(valid, self.slide_start[slides + 1][:, None], 1)).any():
            raise IndexError("A tile index lies beyond the tiles allocated for its slide.")
        return rows, valid

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

    def _note_drift(self, old: torch.Tensor, fresh: torch.Tensor, step: int) -> None:
        """Adds how far tiles moved, from what was stored to what is stored now `(n, D)`, to that of the same step."""
        if step != self._drift_step:
            self.drift_sums.zero_()
            self._drift_step = step
        self.drift_sums += measure_drift(old, fresh)
