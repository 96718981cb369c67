# SPDX-License-Identifier: Apache-2.0
"""The slide embedding without each of its tiles in turn, exactly, for all tiles of a slide in seconds.

Taking a tile out changes one codeword's sum. Every other codeword's token stays as it is, because each is normalised
on its own and their common norm depends only on how many are not empty. So most of the first layer is computed once
for all tiles (`changed_token`), and empty codewords take no part. Tiles that empty a codeword take the long way.

Letters: N tiles, n tiles left out at once, K codewords, U of them used, D feature width.
"""

import copy
from collections.abc import Iterator

import torch

from .changed_token import Buffers, FirstLayer, refine_in_place
from .residual_encoder import ResidualEncoder
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
            is_short = without.norm(dim=1) > _MIN_NORM
            if not slide.is_regular or int(state.counts[codeword]) == 1:
                is_short[:] = False
            if bool(is_short.any()):
                yield index[is_short], slide.encode_changed(codeword, without[is_short])
            for tile, residual in zip(index[~is_short], without[~is_short], strict=True):
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
        residuals = residuals[self.used]
        # Otherwise the common norm is not the root of the number of codewords.
        self.is_regular = bool((residuals.norm(dim=1) > _MIN_NORM).all())
        self.scale = (encoder.codebook.numel() / len(self.used)) ** 0.5
        self.tokens = self._to_tokens(residuals, self.used)
        self.first = FirstLayer(encoder.layers[0], self.tokens)
        self.buffers = Buffers.allocate(encoder.layers[0], self.tokens, chunk_size)

    def _to_tokens(self, residuals: torch.Tensor, codewords: torch.Tensor) -> torch.Tensor:
        directions = residuals / residuals.norm(dim=1, keepdim=True) * self.scale
        return directions.to(self.encoder.norm.weight.dtype) + self.encoder.codeword_embedding[codewords]

    def encode_changed(self, codeword: int, residuals: torch.Tensor) -> torch.Tensor:
        """Embeddings `(n, D)` of the slide with other residuals `(n, D)`, float64, of one codeword."""
        buffers = self.buffers.first(len(residuals))
        self.first.go_to(int((self.used == codeword).nonzero()))
        self.first(self._to_tokens(residuals, codeword), buffers)
        for layer in self.encoder.layers[1:]:
            refine_in_place(layer, buffers)
        return self.encoder.norm(buffers.tokens).mean(dim=1)


__all__ = ["embeddings_without_tiles", "wide_encoder"]
