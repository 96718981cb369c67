# SPDX-License-Identifier: Apache-2.0
"""A slide as a value: sums and counts of its tiles per codeword, which add, subtract and merge to the last bit.

Sums of floating-point numbers depend on their order. Here they do not: a feature has unit norm, so each of its
components is rounded to a multiple of 2^-30 and kept as a whole number. That changes nothing in float16 features nor
in float32 components of at least 2^-7, and smaller ones by at most 4.7e-10. Sums of whole numbers are exact in any
order, in any chunks, on any device; what was added can be taken out again, and 2^32 tiles fit.

Letters: N tiles, K codewords, D feature width.
"""

import hashlib
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from .atomic_files import atomic_file
from .residual_encoder import assign_codewords

GRID_BITS = 30
STATE_FORMAT = "dre-slcl-slide-state-1"
_MAX_COMPONENT = 2.0  # features have unit norm; half precision may round a component a little above 1
_IDENTITY = ("codebook_sha256", "tile_size_px", "tile_mpp")


def codebook_sha256(codebook: torch.Tensor) -> str:
    """Returns the SHA-256 of a codebook `(K, D)`: of its shape and its values as little-endian float32."""
    values = codebook.detach().to("cpu", torch.float32).contiguous().numpy().astype("<f4", copy=False)
    return hashlib.sha256(f"{tuple(values.shape)}".encode() + values.tobytes()).hexdigest()


@dataclass(eq=False)
class SlideState:
    """The tiles of a slide, of a region or of a case, as sums per codeword.

    `a + b` holds the tiles of both, `a - b` those of `a` without those of `b`, `sum(states)` those of all; the result
    is the same to the last bit however the tiles were divided. Only states of one codebook and one tile geometry mix.

    Args:
        fixed_sums (`torch.Tensor` of shape `(K, D)`, int64): sums of tile features per codeword, in units of 2^-30.
        counts (`torch.Tensor` of shape `(K,)`, int64): number of tiles per codeword.
        codebook_sha256 (`str`): of the codebook that the tiles were assigned with, from `codebook_sha256`.
        tile_size_px (`int`, *optional*): side of a tile in px at `tile_mpp`.
        tile_mpp (`float`, *optional*): resolution of a tile, um/px.
        model_id (`str`, defaults to `""`): name and revision of the model, for people.

    Example:

    ```python
    state = model.state_of_tiles(tile_features)
    rest = state - model.state_of_tiles(tile_features[in_region])
    embedding = model.get_state_features(rest).slide_embedding
    ```
    """

    fixed_sums: torch.Tensor
    counts: torch.Tensor
    codebook_sha256: str
    tile_size_px: int | None = None
    tile_mpp: float | None = None
    model_id: str = ""
    _checked_codebook: torch.Tensor | None = field(default=None, repr=False)

    @classmethod
    def empty(cls, codebook: torch.Tensor, **facts: Any) -> "SlideState":
        """Returns the state of a slide without tiles, for a codebook of shape `(K, D)`; `facts` as in the class."""
        counts = torch.zeros(len(codebook), dtype=torch.int64, device=codebook.device)
        sums = torch.zeros_like(codebook, dtype=torch.int64)
        return cls(sums, counts, codebook_sha256(codebook), _checked_codebook=codebook, **facts)

    def add(self, features: torch.Tensor, codebook: torch.Tensor, sign: int = 1) -> torch.Tensor:
        """Adds tiles in place (or, with `sign=-1`, takes out tiles that were added before).

        Args:
            features (`torch.Tensor` of shape `(N, D)`, float): L2-normalised tile features.
            codebook (`torch.Tensor` of shape `(K, D)`, float): codewords, those that the state is of.
            sign (`int`, defaults to 1): 1 to add, -1 to take out.

        Returns:
            `torch.Tensor` of shape `(N,)`, int64: the codeword of each tile.

        Raises:
            ValueError: if a feature is not finite or not of unit norm (names the tile; nothing is added then), or the
                codebook is another one.
        """
        self.check_codebook(codebook)
        fixed = fixed_point(features).to(self.counts.device)
        # In float64: in float32 a tile between two codewords may go to either, by how many tiles are added with it.
        assignment = assign_codewords(from_fixed_point(fixed), codebook.to(self.counts.device))
        self.fixed_sums.index_add_(0, assignment, fixed, alpha=sign)
        self.counts.index_add_(0, assignment, torch.full_like(assignment, sign))
        return assignment

    def __add__(self, other: Any) -> "SlideState":
        if not isinstance(other, SlideState):
            return NotImplemented
        self._check_same_kind(other)
        sums, counts = other.fixed_sums.to(self.fixed_sums.device), other.counts.to(self.counts.device)
        return replace(self, fixed_sums=self.fixed_sums + sums, counts=self.counts + counts)

    def __radd__(self, other: Any) -> "SlideState":
        # `sum` starts from the number 0.
        return self.copy() if isinstance(other, int) and other == 0 else NotImplemented

    def __sub__(self, other: Any) -> "SlideState":
        if not isinstance(other, SlideState):
            return NotImplemented
        self._check_same_kind(other)
        sums = self.fixed_sums - other.fixed_sums.to(self.fixed_sums.device)
        counts = self.counts - other.counts.to(self.counts.device)
        if bool((counts < 0).any()) or bool(sums[counts == 0].any()):
            codeword = int(((counts < 0) | ((counts == 0) & sums.any(dim=1))).nonzero()[0])
            raise ValueError(
                f"These tiles are not all in the state that they are taken from: codeword {codeword} has "
                f"{int(self.counts[codeword])} tiles there and {int(other.counts[codeword])} in what is taken out."
            )
        return replace(self, fixed_sums=sums, counts=counts)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, SlideState):
            return NotImplemented
        same = all(getattr(self, name) == getattr(other, name) for name in _IDENTITY)
        mine, theirs = ((state.fixed_sums.cpu(), state.counts.cpu()) for state in (self, other))
        return same and torch.equal(mine[0], theirs[0]) and torch.equal(mine[1], theirs[1])

    __hash__ = None  # its tensors change in place

    def copy(self) -> "SlideState":
        """Returns an independent copy."""
        return replace(self, fixed_sums=self.fixed_sums.clone(), counts=self.counts.clone())

    def to(self, device: torch.device | str) -> "SlideState":
        """Returns the state on a device."""
        return replace(self, fixed_sums=self.fixed_sums.to(device), counts=self.counts.to(device))

    @property
    def num_tiles(self) -> int:
        """Number of tiles."""
        return int(self.counts.sum())

    @property
    def feature_sums(self) -> torch.Tensor:
        """Sums of tile features per codeword: `torch.Tensor` of shape `(K, D)`, float64 (exact up to 2^22 tiles)."""
        return from_fixed_point(self.fixed_sums)

    def residuals(self, codebook: torch.Tensor) -> torch.Tensor:
        """Returns the residuals V_k = S_k - n_k c_k: `torch.Tensor` of shape `(K, D)`, float64.

        Raises:
            ValueError: if the codebook is another one.
        """
        self.check_codebook(codebook)
        return self.feature_sums - self.counts[:, None] * codebook.to(self.counts.device, torch.float64)

    def check_codebook(self, codebook: torch.Tensor) -> None:
        """Checks that a codebook is the one that the tiles were assigned with.

        Raises:
            ValueError: if it is not.
        """
        if codebook is self._checked_codebook:
            return
        found = codebook_sha256(codebook)
        if found != self.codebook_sha256:
            raise ValueError(
                f"This slide state was made with the codebook {self.codebook_sha256[:12]} of model "
                f"{self.model_id or 'unknown'!r}, but the model's codebook is {found[:12]}. Use the model that made "
                "it, or make the state again."
            )
        self._checked_codebook = codebook

    def save(self, path: str | Path) -> None:
        """Writes the state to a safetensors file, atomically.

        The file holds `fixed_sums` `(K, D)` and `counts` `(K,)`, int64, and as metadata `format`, `grid_bits`,
        `codebook_sha256`, `model_id`, `tile_size_px` and `tile_mpp`.
        """
        facts = {name: getattr(self, name) for name in (*_IDENTITY, "model_id")}
        metadata = {name: "" if value is None else str(value) for name, value in facts.items()}
        metadata |= {"format": STATE_FORMAT, "grid_bits": str(GRID_BITS)}
        tensors = {"fixed_sums": self.fixed_sums.cpu().contiguous(), "counts": self.counts.cpu().contiguous()}
        with atomic_file(path) as temporary:
            save_file(tensors, temporary, metadata=metadata)

    @classmethod
    def load(cls, path: str | Path, codebook: torch.Tensor | None = None) -> "SlideState":
        """Reads a state that `save` wrote.

        Args:
            path (`str` or `Path`): the file.
            codebook (`torch.Tensor` of shape `(K, D)`, *optional*): the codebook that it must be of; the state is put
                on its device.

        Raises:
            ValueError: if the file is no slide state, or of another codebook; the message names it.
            FileNotFoundError: if there is no such file.
        """
        if not Path(path).is_file():
            raise FileNotFoundError(f"{path}: there is no such slide state.")
        try:
            with safe_open(path, framework="pt") as stored:
                metadata = stored.metadata() or {}
                if metadata.get("format") != STATE_FORMAT or metadata.get("grid_bits") != str(GRID_BITS):
                    raise ValueError(f"its format is {metadata.get('format')!r}, expected {STATE_FORMAT!r}")
                sums, counts = stored.get_tensor("fixed_sums"), stored.get_tensor("counts")
            _check_tensors(sums, counts)
            size, mpp = metadata["tile_size_px"], metadata["tile_mpp"]
            facts = {"tile_size_px": int(size) if size else None, "tile_mpp": float(mpp) if mpp else None}
            state = cls(sums, counts, metadata["codebook_sha256"], model_id=metadata["model_id"], **facts)
        except (SafetensorError, KeyError, ValueError) as error:
            raise ValueError(f"{path}: not a slide state that can be read ({error}). Make it again.") from error
        if codebook is not None:
            try:
                state.check_codebook(codebook)
            except ValueError as error:
                raise ValueError(f"{path}: {error}") from None
            state = state.to(codebook.device)
        return state

    def _check_same_kind(self, other: "SlideState") -> None:
        for name in _IDENTITY:
            mine, theirs = getattr(self, name), getattr(other, name)
            if mine != theirs:
                raise ValueError(
                    f"States of different kinds cannot be combined: `{name}` is {mine} (model {self.model_id!r}) and "
                    f"{theirs} (model {other.model_id!r}). Make both with one model."
                )


def fixed_point(features: torch.Tensor) -> torch.Tensor:
    """Rounds features to the grid on which their sums are exact.

    Args:
        features (`torch.Tensor` of shape `(N, D)`, float): L2-normalised tile features.

    Returns:
        `torch.Tensor` of shape `(N, D)`, int64: in units of 2^-30.

    Raises:
        ValueError: if a feature is not finite, or has a component beyond what unit norm allows; names the tile.
    """
    if features.ndim != 2 or not features.is_floating_point():
        raise ValueError(f"Expected tile features (N, D) of a floating type, found {features.dtype} {features.shape}.")
    # Written so that NaN counts as too large.
    is_fine = (features.abs() <= _MAX_COMPONENT).all(dim=1)
    if not bool(is_fine.all()):
        tile = int((~is_fine).nonzero()[0])
        problem = "not finite" if not bool(torch.isfinite(features[tile]).all()) else "not L2-normalised"
        raise ValueError(
            f"The feature of tile {tile} is {problem} (largest component {float(features[tile].abs().max()):g}). "
            "Expected features as `get_tile_features` returns them."
        )
    wide = features.detach().to(torch.promote_types(features.dtype, torch.float32))
    # Scaling by a power of two is exact, and so is the conversion of a rounded number below 2^31.
    return (wide * 2.0**GRID_BITS).round().to(torch.int64)


def from_fixed_point(fixed: torch.Tensor) -> torch.Tensor:
    """Returns what numbers in units of 2^-30, int64, stand for, float64."""
    return fixed.to(torch.float64) * 2.0**-GRID_BITS


def _check_tensors(sums: torch.Tensor, counts: torch.Tensor) -> None:
    is_fine = sums.ndim == 2 and counts.shape == sums.shape[:1] and sums.dtype == counts.dtype == torch.int64
    if not is_fine:
        raise ValueError(
            f"sums of {sums.dtype} {tuple(sums.shape)} and counts of {counts.dtype} {tuple(counts.shape)}"
        )
    limit = counts[:, None] * int(_MAX_COMPONENT * 2**GRID_BITS)
    if bool((counts < 0).any()) or bool((sums.abs() > limit).any()):
        raise ValueError("its counts are negative or do not fit its sums")


__all__ = ["SlideState", "codebook_sha256", "fixed_point", "from_fixed_point"]
