# SPDX-License-Identifier: Apache-2.0
"""The layers of the residual encoder for many copies of a slide that differ in one token, as fast as they go.

Nearly all of the time is matrix products that no copy can share: the second matrix of the first layer's feed-forward
part, and all of those of later layers. What the copies do share, the first layer's attention and the first matrix of
its feed-forward part, is computed once (`FirstLayer`). Everything else is a small share of the time only if no large
array is allocated, or passed over, more often than it must: hence `Buffers`, products that add in place, and
activations that overwrite their input.

Letters: n copies, U tokens, D feature width, A attention heads, I width of the feed-forward part.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from .residual_encoder import CodewordAttention, CodewordLayer


@dataclass(frozen=True, eq=False)
class Buffers:
    """Arrays that are used again for every chunk of copies.

    Args:
        tokens (`torch.Tensor` of shape `(n, U, D)`): the tokens, refined layer by layer.
        projected (`torch.Tensor` of shape `(n, U, 3 D)`): their queries, keys and values.
        hidden (`torch.Tensor` of shape `(n, U, I)`): inside the feed-forward part.
    """

    tokens: torch.Tensor
    projected: torch.Tensor
    hidden: torch.Tensor

    @classmethod
    def allocate(cls, layer: CodewordLayer, tokens: torch.Tensor, length: int) -> "Buffers":
        """Buffers for as many copies of tokens `(U, D)`, in layers like this one."""
        width = tokens.shape[1]
        widths = (width, 3 * width, layer.intermediate.out_features)
        return cls(*(tokens.new_empty(length, len(tokens), width) for width in widths))

    def first(self, length: int) -> "Buffers":
        """The part of them for as many copies, which shares their memory."""
        return Buffers(self.tokens[:length], self.projected[:length], self.hidden[:length])


def refine_in_place(layer: CodewordLayer, buffers: Buffers, log_weights: torch.Tensor | None) -> None:
    """Applies a layer to `buffers.tokens`, and overwrites them with what it returns.

    Args:
        layer (`CodewordLayer`): the layer.
        buffers (`Buffers`): the tokens, none of which is masked.
        log_weights (`torch.Tensor` of shape `(1, U)`, *optional*): logarithms of their weights, if these differ.
    """
    attention, tokens = layer.attention, buffers.tokens
    _linear(attention.query_key_value, layer.attention_norm(tokens), buffers.projected)
    query, key, value = _split_heads(attention, buffers.projected).permute(2, 0, 3, 1, 4)
    mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=log_weights)
    # (n, A, U, D / A) -> (n, U, D)
    _add_linear(attention.output, mixed.transpose(1, 2).flatten(2), tokens)
    _linear(layer.intermediate, layer.feed_forward_norm(tokens), buffers.hidden)
    _add_linear(layer.output, F.gelu(buffers.hidden, out=buffers.hidden), tokens)


def _linear(linear: torch.nn.Linear, inputs: torch.Tensor, out: torch.Tensor) -> None:
    torch.addmm(linear.bias, inputs.flatten(0, 1), linear.weight.T, out=out.flatten(0, 1))


def _add_linear(linear: torch.nn.Linear, inputs: torch.Tensor, tokens: torch.Tensor) -> None:
    tokens.add_(linear.bias).flatten(0, 1).addmm_(inputs.flatten(0, 1), linear.weight.T)


def _split_heads(attention: CodewordAttention, projected: torch.Tensor) -> torch.Tensor:
    """Queries, keys and values `(..., 3 D)` -> `(..., 3, A, D / A)`."""
    return projected.unflatten(-1, (3, attention.num_attention_heads, attention.head_size))


class FirstLayer:
    """A layer for tokens that all stay as they are but one.

    What attention adds to an unchanged token is (1 - w) a + w b in each head: a is what it got from the unchanged
    tokens, b the changed token's value, w the weight on it. So a token after attention, and, since layer norm is
    linear but for a scale, what the feed-forward part's first matrix makes of it, are sums of few vectors: A that
    belong to the place, computed once, and A that belong to the copy.

    Args:
        layer (`CodewordLayer`): the layer.
        tokens (`torch.Tensor` of shape `(U, D)`): the tokens.
        log_weights (`torch.Tensor` of shape `(U,)`): logarithms of their weights.
    """

    def __init__(self, layer: CodewordLayer, tokens: torch.Tensor, log_weights: torch.Tensor) -> None:
        self.layer, self.tokens, self.log_weights, self.place = layer, tokens, log_weights, -1
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
        scores = self._scale(self.query @ self.key.transpose(-1, -2)) + self.log_weights
        scores[:, :, place] = -torch.inf
        self.log_total = scores.logsumexp(dim=-1)
        # A token that is alone gets nothing from others.
        others = scores.softmax(dim=-1).nan_to_num() @ self.value
        # (A, U, D) -> (U, A, D)
        added = (others @ self.heads).transpose(0, 1)
        base = self.tokens + self.layer.attention.output.bias + added.sum(dim=1)
        self.placed = torch.cat([-added, base[:, None]], dim=1)
        bias = self.hidden_bias.expand(len(base), 1, -1)
        self.hidden_placed = torch.cat([self.placed @ self.hidden_weight, bias], dim=1)

    def _project(self, tokens: torch.Tensor) -> torch.Tensor:
        """Queries, keys and values of tokens `(n, D)`: `(n, 3, A, D / A)`."""
        attention = self.layer.attention
        return _split_heads(attention, attention.query_key_value(self.layer.attention_norm(tokens)))

    def _scale(self, scores: torch.Tensor) -> torch.Tensor:
        return scores * self.layer.attention.head_size**-0.5

    def __call__(self, changed: torch.Tensor, log_weight: torch.Tensor, buffers: Buffers) -> None:
        """Puts into `buffers.tokens` all tokens after the layer.

        Args:
            changed (`torch.Tensor` of shape `(n, D)`): what the token at the place is.
            log_weight (`torch.Tensor` of shape `()`): the logarithm of its weight.
            buffers (`Buffers`): of as many copies.
        """
        tokens, hidden, norm = buffers.tokens, buffers.hidden, self.layer.feed_forward_norm
        # (n, 3, A, D / A) -> 3 of (A, n, D / A)
        query, key, value = self._project(changed).permute(1, 2, 0, 3)
        # (A, n, U) -> (n, U, A): how much each unchanged token attends to the changed one
        scores = self._scale(key @ self.query.transpose(-1, -2)) + log_weight
        weights = torch.sigmoid(scores - self.log_total[:, None])
        weights = torch.cat([weights.permute(1, 2, 0), weights.new_ones(*tokens.shape[:2], 2)], dim=2)
        _mix(weights[:, :, :-1], self.placed, (value @ self.heads).transpose(0, 1), tokens)
        # All but the bias is divided by the deviation.
        _, _, scale = torch.native_layer_norm(tokens, tokens.shape[2:], None, None, norm.eps)
        weights[:, :, :-1] *= scale
        _mix(weights, self.hidden_placed, (value @ self.hidden_heads).transpose(0, 1), hidden)
        tokens[:, self.place] = changed + self._attend(query, key, value, log_weight)
        hidden[:, self.place] = self.layer.intermediate(norm(tokens[:, self.place]))
        _add_linear(self.layer.output, F.gelu(hidden, out=hidden), tokens)

    def _attend(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, log_weight: torch.Tensor
    ) -> torch.Tensor:
        """What attention adds to the changed token, of which the arguments `(A, n, D / A)` are: `(n, D)`."""
        scores = self._scale(query @ self.key.transpose(-1, -2)) + self.log_weights
        scores[:, :, self.place] = self._scale((query * key).sum(dim=-1)) + log_weight
        weights = scores.softmax(dim=-1)
        own = weights[:, :, self.place, None] * value
        weights[:, :, self.place] = 0
        # (A, n, D / A) -> (n, D)
        return self.layer.attention.output((weights @ self.value + own).transpose(0, 1).flatten(1))


def _mix(weights: torch.Tensor, placed: torch.Tensor, own: torch.Tensor, out: torch.Tensor) -> None:
    """Out `(n, U, F)` = weights `(n, U, S)` times placed `(U, S, F)` + the first A weights times own `(n, A, F)`."""
    # (U, n, S) @ (U, S, F) -> (U, n, F)
    torch.bmm(weights.transpose(0, 1), placed, out=out.transpose(0, 1))
    out.baddbmm_(weights[:, :, : own.shape[1]], own)


__all__ = ["Buffers", "FirstLayer", "refine_in_place"]
