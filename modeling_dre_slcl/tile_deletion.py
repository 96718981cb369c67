# SPDX-License-Identifier: Apache-2.0
"""The slide embedding without each of its tiles in turn, exactly, for all tiles of a slide in seconds.

Taking a tile out changes one codeword's sum. Every other codeword's token stays as it is, because each is normalised
on its own and their common norm depends only on how many are not empty. So most of the first layer is computed once
for all tiles (`_FirstLayer`), and empty codewords take no part. Tiles that empty a codeword take the long way.

Letters: N tiles, n tiles left out at once, K codewords, U of them used, D feature width, A attention heads.
"""

import copy
from collections.abc import Iterator

import torch
import torch.nn.functional as F

from .residual_encoder import CodewordLayer, ResidualEncoder
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
    slide = _EncodedSlide(encoder, residuals, state.counts)
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
    """

    def __init__(self, encoder: ResidualEncoder, residuals: torch.Tensor, counts: torch.Tensor) -> None:
        self.encoder = encoder
        self.used = (counts > 0).nonzero()[:, 0]
        residuals = residuals[self.used]
        # Otherwise the common norm is not the root of the number of codewords.
        self.is_regular = bool((residuals.norm(dim=1) > _MIN_NORM).all())
        self.scale = (encoder.codebook.numel() / len(self.used)) ** 0.5
        self.tokens = self._to_tokens(residuals, self.used)
        self.first = _FirstLayer(encoder.layers[0], self.tokens)

    def _to_tokens(self, residuals: torch.Tensor, codewords: torch.Tensor) -> torch.Tensor:
        directions = residuals / residuals.norm(dim=1, keepdim=True) * self.scale
        return directions.to(self.encoder.norm.weight.dtype) + self.encoder.codeword_embedding[codewords]

    def encode_changed(self, codeword: int, residuals: torch.Tensor) -> torch.Tensor:
        """Embeddings `(n, D)` of the slide with other residuals `(n, D)`, float64, of one codeword."""
        self.first.go_to(int((self.used == codeword).nonzero()))
        tokens = self.first(self._to_tokens(residuals, codeword))
        mask = torch.ones(tokens.shape[:2], dtype=torch.bool, device=tokens.device)
        for layer in self.encoder.layers[1:]:
            tokens, _ = layer(tokens, mask, need_weights=False)
        return self.encoder.norm(tokens).mean(dim=1)


class _FirstLayer:
    """A layer for tokens that all stay as they are but one.

    What attention adds to an unchanged token is (1 - w) a + w b in each head: a is what it got from the unchanged
    tokens, b the changed token's value, w the weight on it. So a token after attention, and, since layer norm is
    linear but for a scale, what the feed-forward part's first matrix makes of it, are sums of few vectors: A that
    belong to the place, computed once, and A that belong to the tile.

    Args:
        layer (`CodewordLayer`): the layer.
        tokens (`torch.Tensor` of shape `(U, D)`): the tokens.
    """

    def __init__(self, layer: CodewordLayer, tokens: torch.Tensor) -> None:
        self.layer, self.tokens, self.place = layer, tokens, -1
        attention, norm, intermediate = layer.attention, layer.feed_forward_norm, layer.intermediate
        # (U, 3, A, D / A) -> 3 of (A, U, D / A)
        self.query, self.key, self.value = self._project(tokens).permute(1, 2, 0, 3)
        # (D, A D / A) -> (A, D / A, D): what each head adds to a token
        self.heads = attention.output.weight.unflatten(1, (attention.num_attention_heads, -1)).permute(1, 2, 0)
        # W LN(y) = (W g (y - mean)) / deviation + W b: the mean goes into the matrix.
        weight = intermediate.weight * norm.weight
        self.hidden_weight = (weight - weight.mean(dim=1, keepdim=True)).T
        self.hidden_bias = intermediate.weight @ norm.bias + intermediate.bias
        self.hidden_heads = self.heads @ self.hidden_weight

    def go_to(self, place: int) -> None:
        """Chooses which token will be changed."""
        if place == self.place:
            return
        self.place = place
        scores = self._scale(self.query @ self.key.transpose(-1, -2))
        scores[:, :, place] = -torch.inf
        self.log_total = scores.logsumexp(dim=-1)
        # A token that is alone gets nothing from others.
        others = scores.softmax(dim=-1).nan_to_num() @ self.value
        added = (others @ self.heads).transpose(0, 1)
        self.base, self.steps = self.tokens + self.layer.attention.output.bias + added.sum(dim=1), -added
        self.hidden_base, self.hidden_steps = self.base @ self.hidden_weight, self.steps @ self.hidden_weight

    def _project(self, tokens: torch.Tensor) -> torch.Tensor:
        """Queries, keys and values of tokens `(n, D)`: `(n, 3, A, D / A)`."""
        attention = self.layer.attention
        projected = attention.query_key_value(self.layer.attention_norm(tokens))
        return projected.view(len(tokens), 3, attention.num_attention_heads, attention.head_size)

    def _scale(self, scores: torch.Tensor) -> torch.Tensor:
        return scores * self.layer.attention.head_size**-0.5

    def __call__(self, changed: torch.Tensor) -> torch.Tensor:
        """All tokens after the layer, `(n, U, D)`, if the one at the place is `changed` `(n, D)`."""
        # (n, 3, A, D / A) -> 3 of (A, n, D / A)
        query, key, value = self._project(changed).permute(1, 2, 0, 3)
        # (A, n, U) -> (n, U, A): how much each unchanged token attends to the changed one
        weights = torch.sigmoid(self._scale(key @ self.query.transpose(-1, -2)) - self.log_total[:, None])
        weights = weights.permute(1, 2, 0)
        tokens = _mix(weights, self.base, self.steps, (value @ self.heads).transpose(0, 1))
        hidden = _mix(weights, self.hidden_base, self.hidden_steps, (value @ self.hidden_heads).transpose(0, 1))
        variance = tokens.var(dim=-1, keepdim=True, correction=0)
        hidden.mul_((variance + self.layer.feed_forward_norm.eps).rsqrt()).add_(self.hidden_bias)
        tokens[:, self.place] = changed + self._attend(query, key, value)
        own = self.layer.feed_forward_norm(tokens[:, self.place])
        hidden[:, self.place] = self.layer.intermediate(own)
        return tokens.add_(self.layer.output(F.gelu(hidden)))

    def _attend(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """What attention adds to the changed token, of which the arguments `(A, n, D / A)` are: `(n, D)`."""
        scores = self._scale(query @ self.key.transpose(-1, -2))
        scores[:, :, self.place] = self._scale((query * key).sum(dim=-1))
        weights = scores.softmax(dim=-1)
        own = weights[:, :, self.place, None] * value
        weights[:, :, self.place] = 0
        # (A, n, D / A) -> (n, D)
        return self.layer.attention.output((weights @ self.value + own).transpose(0, 1).flatten(1))


def _mix(weights: torch.Tensor, base: torch.Tensor, steps: torch.Tensor, fresh: torch.Tensor) -> torch.Tensor:
    """base `(U, F)` + sum over heads of weights `(n, U, A)` times (steps `(U, A, F)` + fresh `(n, A, F)`)."""
    # (U, n, A) @ (U, A, F) -> (n, U, F)
    placed = torch.baddbmm(base[:, None], weights.transpose(0, 1), steps).transpose(0, 1)
    return torch.baddbmm(placed, weights, fresh)


__all__ = ["embeddings_without_tiles", "wide_encoder"]
