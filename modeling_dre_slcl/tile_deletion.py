# SPDX-License-Identifier: Apache-2.0
"""The slide embedding without each of its tiles in turn, exactly, for all tiles of a slide in seconds.

Taking a tile out changes one codeword's sum and count. Every other codeword's token stays as it is: means are its own,
and so are directions, whose common norm depends only on how many codewords are not empty. So most of the first layer
is computed once for all tiles (`changed_token`), and empty codewords take no part. Tiles that empty a codeword take
the long way, and with `codeword_tokens="vlad"` those that leave a residual without a direction.

Letters: N tiles, n tiles left out at once, K codewords, U of them used, D feature width.
"""

import copy
from collections.abc import Iterator

import torch

from .changed_token import Buffers, FirstLayer, refine_in_place
from .residual_encoder import ResidualEncoder, standardize_by_codebook
from .slide_state import SlideState, fixed_point, from_fixed_point

_MIN_NORM = 1e-6  # of a residual, below which its direction is noise: these tiles take the long way


def wide_encoder(encoder: ResidualEncoder) -> ResidualEncoder:
    """Returns a copy of an encoder that computes at least in float32 and in evaluation mode.

    Half precision would drown the effect of one tile among thousands.
    """
    return copy.deepcopy(encoder).to(torch.promote_types(encoder.norm.weight.dtype, torch.float32)).eval()


@torch.no_grad()
def embeddings_without_tiles(
    encoder: ResidualEncoder, state: SlideState, features: torch.Tensor, assignment: torch.Tensor, *, chunk_size: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yields the embedding of a slide without each of its tiles.

    Args:
        encoder (`ResidualEncoder`): from `wide_encoder`.
        state (`SlideState`): the slide, at least two tiles.
        features (`torch.Tensor` of shape `(N, D)`, float): the tiles to leave out, all of them in `state`.
        assignment (`torch.Tensor` of shape `(N,)`, int64): the codeword of each, from `SlideState.add`.
        chunk_size (`int`): tiles left out at once; bounds memory.

    Yields:
        `tuple`: tile indices of shape `(n,)`, int64, and embeddings of shape `(n, D)`; every tile once, codeword by
        codeword.
    """
    residuals = state.residuals(encoder.codebook)
    codebook = encoder.codebook.to(torch.float64)
    slide = _EncodedSlide(encoder, residuals, state.counts, min(chunk_size, int(state.counts.max())))
    for codeword in assignment.unique().tolist():
        for index in (assignment == codeword).nonzero()[:, 0].split(chunk_size):
            without = residuals[codeword] - (from_fixed_point(fixed_point(features[index])) - codebook[codeword])
            is_quick = slide.can_change(codeword, without)
            if bool(is_quick.any()):
                yield index[is_quick], slide.encode_changed(codeword, without[is_quick])
            for tile, residual in zip(index[~is_quick], without[~is_quick], strict=True):
                yield tile[None], _encode_at_length(encoder, residuals, state.counts, codeword, residual)


def _encode_at_length(
    encoder: ResidualEncoder, residuals: torch.Tensor, counts: torch.Tensor, codeword: int, residual: torch.Tensor
) -> torch.Tensor:
    """Encodes a slide `(K, D)` with another residual `(D,)` of one codeword, of one tile less: `(1, D)`."""
    residuals, counts = residuals.clone(), counts.clone()
    counts[codeword] -= 1
    # A codeword that loses its only tile is empty: exactly zero, not a rounding error blown up to unit norm.
    residuals[codeword] = residual if int(counts[codeword]) else 0
    return encoder(residuals[None], counts[None]).slide_embedding


class _EncodedSlide:
    """A slide's tokens and what the first layer makes of them, to be changed in one token.

    Args:
        encoder (`ResidualEncoder`): at least float32.
        residuals (`torch.Tensor` of shape `(K, D)`, float64), counts (`torch.Tensor` of shape `(K,)`): the slide.
        chunk_size (`int`): the most tiles that are left out at once.
    """

    def __init__(
        self, encoder: ResidualEncoder, residuals: torch.Tensor, counts: torch.Tensor, chunk_size: int
    ) -> None:
        self.encoder = encoder
        self.used = (counts > 0).nonzero()[:, 0]
        self.counts, residuals = counts[self.used], residuals[self.used]
        self.has_means = encoder.codeword_tokens == "mean"
        # Otherwise the common norm of directions is not the root of the number of codewords.
        has_directions = self.has_means or bool((residuals.norm(dim=1) > _MIN_NORM).all())
        self.is_regular = has_directions and len(encoder.layers) > 0
        if not self.is_regular:
            return
        weights = self.counts if self.has_means else torch.ones_like(self.counts)
        self.weights = weights.to(encoder.norm.weight.dtype)
        tokens = self._to_tokens(residuals, self.used, self.counts)
        self.first = FirstLayer(encoder.layers[0], tokens, self.weights.log())
        self.buffers = Buffers.allocate(encoder.layers[0], tokens, chunk_size)

    def _to_tokens(self, residuals: torch.Tensor, codewords: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
        """Residuals `(n, D)`, float64, of codewords `(n,)` with counts `(n,)` -> tokens `(n, D)`."""
        if self.has_means:
            codebook = self.encoder.codebook.double()
            values = standardize_by_codebook(residuals / counts[:, None] + codebook[codewords], codebook)
        else:
            scale = (self.encoder.codebook.numel() / len(self.used)) ** 0.5
            values = residuals / residuals.norm(dim=1, keepdim=True) * scale
        return values.to(self.encoder.norm.weight.dtype) + self.encoder.codeword_embedding[codewords]

    def can_change(self, codeword: int, residuals: torch.Tensor) -> torch.Tensor:
        """Which residuals `(n, D)` of a codeword, of one tile less, `encode_changed` can take: `(n,)`, bool."""
        can_change = torch.ones_like(residuals[:, 0], dtype=torch.bool)
        if not self.is_regular or int(self.counts[self.used == codeword]) == 1:
            return ~can_change
        return can_change if self.has_means else residuals.norm(dim=1) > _MIN_NORM

    def encode_changed(self, codeword: int, residuals: torch.Tensor) -> torch.Tensor:
        """Embeddings `(n, D)` of the slide with other residuals `(n, D)`, float64, of a codeword of one tile less."""
        buffers, weights = self.buffers.first(len(residuals)), self.weights.clone()
        place = int((self.used == codeword).nonzero())
        count = self.counts[place] - 1
        if self.has_means:
            weights[place] = count
        codewords = self.used[place].expand(len(residuals))
        changed = self._to_tokens(residuals, codewords, count.expand(len(residuals)))
        self.first.go_to(place)
        self.first(changed, weights[place].log(), buffers)
        # All weights are 1 where they are not counts, and attention without a bias is faster.
        bias = weights.log()[None] if self.has_means else None
        for layer in self.encoder.layers[1:]:
            refine_in_place(layer, buffers, bias)
        return (weights / weights.sum()) @ self.encoder.norm(buffers.tokens)


__all__ = ["embeddings_without_tiles", "wide_encoder"]
