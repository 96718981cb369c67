# SPDX-License-Identifier: Apache-2.0
"""Part 3, residual encoding: tile features + codebook -> residuals per codeword -> slide embedding.

The residual of a tile is its feature minus its nearest codeword. A slide's residuals are sums, V_k = S_k - n_k c_k
with S_k the sum of the features assigned to codeword k and n_k their number, so they can be computed in any order, in
chunks, and corrected tile by tile (`slide_state`).

Letters: B slides, N tiles, K codewords, D feature width, A attention heads.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

# Below it codewords are taken for equal; features have unit length.
_MIN_SPREAD = 1e-6


def assign_codewords(features: torch.Tensor, codebook: torch.Tensor) -> torch.Tensor:
    """Assigns each feature to its nearest codeword (Euclidean distance; the lowest index wins a tie).

    Args:
        features (`torch.Tensor` of shape `(..., D)`, float): tile features.
        codebook (`torch.Tensor` of shape `(K, D)`, float): codewords.

    Returns:
        `torch.Tensor` of shape `(...)`, int64: indices of codewords.
    """
    with torch.autocast(features.device.type, enabled=False):
        features, codebook = _at_least_float32(features, codebook)
        # |x - c|^2 = |x|^2 - 2 x.c + |c|^2, and |x|^2 is the same for all codewords
        return (features @ codebook.T - codebook.square().sum(dim=-1) / 2).argmax(dim=-1)


def residual_sums(
    features: torch.Tensor, codebook: torch.Tensor, tile_mask: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sums the residuals of a slide's tiles at each codeword; differentiable in `features`.

    Args:
        features (`torch.Tensor` of shape `(B, N, D)`, float): tile features.
        codebook (`torch.Tensor` of shape `(K, D)`, float): codewords.
        tile_mask (`torch.Tensor` of shape `(B, N)`, bool, *optional*): True for real tiles, False for padding.

    Returns:
        `tuple`: residuals of shape `(B, K, D)` and counts of shape `(B, K)`, float32 (float64 for such features).
    """
    # Sums of many tiles lose their tail in half precision, also that of an enclosing autocast.
    with torch.autocast(features.device.type, enabled=False):
        features, codebook = _at_least_float32(features, codebook)
        assignment = F.one_hot(assign_codewords(features.detach(), codebook), len(codebook)).to(features.dtype)
        if tile_mask is not None:
            assignment = assignment * tile_mask[..., None].to(features.dtype)
        counts = assignment.sum(dim=1)
        # (B, N, K), (B, N, D) -> (B, K, D)
        sums = torch.einsum("bnk,bnd->bkd", assignment, features)
        return sums - counts[..., None] * codebook, counts


def normalize_residuals(residuals: torch.Tensor) -> torch.Tensor:
    """VLAD normalisation: each codeword's residual to unit L2 norm, then the whole to unit L2 norm.

    Args:
        residuals (`torch.Tensor` of shape `(B, K, D)`, float): zero where a codeword has no tiles.

    Returns:
        `torch.Tensor` of shape `(B, K, D)`, at least float32: zero rows stay zero, which needs an epsilon that
        float16 does not have.
    """
    (residuals,) = _at_least_float32(residuals)
    per_codeword = F.normalize(residuals, dim=-1)
    return F.normalize(per_codeword.flatten(1), dim=-1).view_as(residuals)


def standardize_by_codebook(features: torch.Tensor, codebook: torch.Tensor) -> torch.Tensor:
    """Takes the mean of the codewords off features, and divides by the spread of the codewords around it.

    Features of one tile encoder often share a large constant part, which would drown what differs.

    Args:
        features (`torch.Tensor` of shape `(..., D)`, float): features of tiles, or means of them.
        codebook (`torch.Tensor` of shape `(K, D)`, float): codewords.

    Returns:
        `torch.Tensor` of shape `(..., D)`. The spread is the root mean square over all numbers of the codebook; that
        of unit vectors where all codewords are the same.
    """
    mean = codebook.mean(dim=0)
    spread = (codebook - mean).square().mean().sqrt()
    return (features - mean) / torch.where(spread > _MIN_SPREAD, spread, codebook.shape[1] ** -0.5)


def mean_tokens(residuals: torch.Tensor, counts: torch.Tensor, codebook: torch.Tensor) -> torch.Tensor:
    """The mean feature of a codeword's tiles, V_k / n_k + c_k, standardised.

    Args:
        residuals (`torch.Tensor` of shape `(..., K, D)`, float): residual sums V_k.
        counts (`torch.Tensor` of shape `(..., K)`): numbers n_k of tiles.
        codebook (`torch.Tensor` of shape `(K, D)`, float): codewords c_k.

    Returns:
        `torch.Tensor` of shape `(..., K, D)`, at least float32: what has no tiles is at its codeword.
    """
    residuals, counts, codebook = _at_least_float32(residuals, counts, codebook)
    return standardize_by_codebook(residuals / counts.clamp(min=1)[..., None] + codebook, codebook)


def _at_least_float32(first: torch.Tensor, *others: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Casts all to the dtype of the first, or to float32 if that is narrower."""
    dtype = torch.promote_types(first.dtype, torch.float32)
    return tuple(tensor.to(dtype) for tensor in (first, *others))


class SharedDropout(nn.Module):
    """Dropout whose masks belong to the slides of a batch, however many processes share it.

    With a generator, every process draws the masks of the whole batch and takes those of its own rows, so the masks
    are those of one process with all of it. Without one it is the dropout of torch.

    Args:
        probability (`float`): share of values that are dropped.
    """

    def __init__(self, probability: float) -> None:
        super().__init__()
        self.probability = probability

    def forward(self, values: torch.Tensor, generator: torch.Generator | None) -> torch.Tensor:
        """Drops values of a tensor of shape `(B, ...)`; every process holds as many rows."""
        if generator is None or not self.training or self.probability == 0:
            return F.dropout(values, self.probability, self.training)
        rank, size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        shape, rows = (size * len(values), *values.shape[1:]), slice(rank * len(values), (rank + 1) * len(values))
        kept = torch.rand(shape, generator=generator, device=values.device)[rows] >= self.probability
        return values * kept / (1 - self.probability)


class CodewordAttention(nn.Module):
    """Multi-head self-attention over codeword tokens: softmax of scores + logarithms of the tokens' weights.

    A token of weight n gets the attention that n such tokens would get, and one of weight 0 none.
    """

    def __init__(self, hidden_size: int, num_attention_heads: int, dropout: float) -> None:
        super().__init__()
        self.num_attention_heads = num_attention_heads
        self.head_size = hidden_size // num_attention_heads
        self.dropout = SharedDropout(dropout)
        self.query_key_value = nn.Linear(hidden_size, 3 * hidden_size)
        self.output = nn.Linear(hidden_size, hidden_size)

    def forward(
        self,
        tokens: torch.Tensor,
        log_weights: torch.Tensor,
        need_weights: bool,
        generator: torch.Generator | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Attends.

        Args:
            tokens (`torch.Tensor` of shape `(B, K, D)`): codeword tokens.
            log_weights (`torch.Tensor` of shape `(B, K)`): logarithms of their weights; minus infinity for none.
            need_weights (`bool`): compute attention step by step and return its weights.
            generator (`torch.Generator`, *optional*): draws the dropout.

        Returns:
            `tuple`: tokens of shape `(B, K, D)`, and weights of shape `(B, A, K, K)` or `None`.
        """
        batch_size, num_codewords, _ = tokens.shape
        # (B, K, 3 D) -> (3, B, A, K, D / A)
        shape = (batch_size, num_codewords, 3, self.num_attention_heads, self.head_size)
        query, key, value = self.query_key_value(tokens).view(shape).permute(2, 0, 3, 1, 4)
        bias = log_weights[:, None, None, :].to(query.dtype)
        weights = None
        if need_weights or (self.training and self.dropout.probability > 0):
            weights = ((query @ key.transpose(-1, -2)) * self.head_size**-0.5 + bias).softmax(dim=-1)
            mixed = self.dropout(weights, generator) @ value
        else:
            mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=bias)
        # (B, A, K, D / A) -> (B, K, D)
        return self.output(mixed.transpose(1, 2).reshape(tokens.shape)), weights if need_weights else None


class CodewordLayer(nn.Module):
    """One pre-norm Transformer layer over codeword tokens."""

    def __init__(
        self, hidden_size: int, num_attention_heads: int, intermediate_size: int, dropout: float, layer_norm_eps: float
    ) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(hidden_size, eps=layer_norm_eps)
        self.attention = CodewordAttention(hidden_size, num_attention_heads, dropout)
        self.feed_forward_norm = nn.LayerNorm(hidden_size, eps=layer_norm_eps)
        self.intermediate = nn.Linear(hidden_size, intermediate_size)
        self.output = nn.Linear(intermediate_size, hidden_size)
        self.dropout = SharedDropout(dropout)

    def forward(
        self,
        tokens: torch.Tensor,
        log_weights: torch.Tensor,
        need_weights: bool,
        generator: torch.Generator | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Refines tokens of shape `(B, K, D)`; arguments and returns as in `CodewordAttention`."""
        attended, weights = self.attention(self.attention_norm(tokens), log_weights, need_weights, generator)
        return self.feed_forward(tokens + self.dropout(attended, generator), generator), weights

    def feed_forward(self, tokens: torch.Tensor, generator: torch.Generator | None = None) -> torch.Tensor:
        """The second half of the layer: tokens of shape `(B, K, D)` after attention -> tokens of the same shape."""
        expanded = F.gelu(self.intermediate(self.feed_forward_norm(tokens)))
        return tokens + self.dropout(self.output(expanded), generator)


@dataclass
class ResidualEncoderOutput:
    """What `ResidualEncoder` returns.

    Args:
        slide_embedding (`torch.Tensor` of shape `(B, D)`): the slide embeddings.
        hidden_states (`tuple` of `torch.Tensor` of shape `(B, K, D)`): tokens before each layer and after the last.
        attentions (`tuple` of `torch.Tensor` of shape `(B, A, K, K)`, *optional*): each layer's attention weights.
    """

    slide_embedding: torch.Tensor
    hidden_states: tuple[torch.Tensor, ...]
    attentions: tuple[torch.Tensor, ...] | None


class ResidualEncoder(nn.Module):
    """The codebook, and the small Transformer that turns a slide's residuals into its embedding.

    A codeword's token comes from its residual sum V_k of n_k tiles in one of two ways:

    - `"mean"`: the mean feature of its tiles, V_k / n_k + c_k, standardised. Attention and the mean over tokens at the
      end weigh a codeword by n_k, so the embedding knows how much of the slide a codeword is.
    - `"vlad"` (the paper): V_k to unit length, and all of them together; each codeword with tiles weighs the same.

    Args:
        hidden_size (`int`): feature width D.
        num_codewords (`int`): number K of codewords.
        codeword_tokens (`str`): `"mean"` or `"vlad"`.
        num_hidden_layers (`int`): Transformer layers.
        num_attention_heads (`int`): attention heads A.
        intermediate_size (`int`): feed-forward width.
        dropout (`float`): dropout probability.
        layer_norm_eps (`float`): epsilon of the layer norms.

    Attributes:
        dropout_seed (`int`, *optional*): set by training before each step, the same on all processes; dropout is then
            a function of it, and does not depend on how many processes share the batch.
    """

    dropout_seed: int | None = None

    def __init__(
        self,
        *,
        hidden_size: int,
        num_codewords: int,
        codeword_tokens: str,
        num_hidden_layers: int,
        num_attention_heads: int,
        intermediate_size: int,
        dropout: float,
        layer_norm_eps: float,
    ) -> None:
        super().__init__()
        self.codeword_tokens = codeword_tokens
        self.register_buffer("codebook", torch.zeros(num_codewords, hidden_size))
        self.codeword_embedding = nn.Parameter(torch.zeros(num_codewords, hidden_size))
        layer: Callable[[], CodewordLayer] = lambda: CodewordLayer(  # noqa: E731
            hidden_size, num_attention_heads, intermediate_size, dropout, layer_norm_eps
        )
        self.layers = nn.ModuleList(layer() for _ in range(num_hidden_layers))
        self.norm = nn.LayerNorm(hidden_size, eps=layer_norm_eps)

    def forward(
        self, residuals: torch.Tensor, counts: torch.Tensor, need_weights: bool = False
    ) -> ResidualEncoderOutput:
        """Encodes slides.

        Args:
            residuals (`torch.Tensor` of shape `(B, K, D)`, float): residual sums, not normalised.
            counts (`torch.Tensor` of shape `(B, K)`): tiles per codeword; codewords with none are masked.
            need_weights (`bool`, defaults to `False`): also return attention weights.

        Returns:
            `ResidualEncoderOutput`.
        """
        tokens, weights = self.codeword_values(residuals, counts)
        tokens = tokens.to(self.norm.weight.dtype) + self.codeword_embedding
        log_weights = weights.clamp(min=1).log().masked_fill(weights == 0, -torch.inf)
        hidden_states, attentions, generator = [tokens], [], None
        if self.training and self.dropout_seed is not None:
            generator = torch.Generator(tokens.device).manual_seed(self.dropout_seed)
        for layer in self.layers:
            tokens, attention = layer(tokens, log_weights, need_weights, generator)
            hidden_states.append(tokens)
            attentions.append(attention)
        shares = (weights / weights.sum(dim=1, keepdim=True))[..., None].to(tokens.dtype)
        embedding = (self.norm(tokens) * shares).sum(dim=1)
        return ResidualEncoderOutput(embedding, tuple(hidden_states), tuple(attentions) if need_weights else None)

    def codeword_values(self, residuals: torch.Tensor, counts: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """What of a slide goes into the tokens, before the codewords' embeddings are added; and the tokens' weights.

        Args:
            residuals (`torch.Tensor` of shape `(B, K, D)`, float): residual sums.
            counts (`torch.Tensor` of shape `(B, K)`): tiles per codeword.

        Returns:
            `tuple`: values of shape `(B, K, D)` and weights of shape `(B, K)`, 0 or at least 1, both at least float32.
        """
        residuals, counts = _at_least_float32(residuals, counts)
        # A slide without any tile attends to all of its tokens instead of to nothing, which would be NaN.
        weights = torch.where(counts.sum(dim=1, keepdim=True) > 0, counts, 1)
        if self.codeword_tokens == "mean":
            return mean_tokens(residuals, counts, self.codebook), weights
        # Unit norm over K D numbers leaves each far smaller than a codeword's embedding, which would drown it: scaled
        # to a root mean square of 1.
        values = normalize_residuals(residuals) * (residuals.shape[1] * residuals.shape[2]) ** 0.5
        return values, (weights > 0).to(values)
