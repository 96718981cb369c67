# SPDX-License-Identifier: Apache-2.0
"""Which tiles a slide's match with a text rests on, exactly: what the match loses when a tile is left out.

Residuals are sums, so leaving one tile out needs its feature only, no second look at pixels.

Letters: N tiles, K codewords, D feature width, E joint width.
"""

import torch
from transformers import PreTrainedModel


@torch.no_grad()
def attribute_tiles(
    model: PreTrainedModel, tile_features: torch.Tensor, direction: torch.Tensor, *, chunk_size: int = 256
) -> torch.Tensor:
    """Leave-one-out attribution of each tile.

    Args:
        model (`DreSlclModel`): in evaluation mode.
        tile_features (`torch.Tensor` of shape `(N, D)`, float): features of all tiles of a slide.
        direction (`torch.Tensor` of shape `(E,)`, float): what is explained: the projection of a text, or the
            difference between those of two texts.
        chunk_size (`int`, defaults to 256): tiles left out at once; bounds memory.

    Returns:
        `torch.Tensor` of shape `(N,)`, float32, on CPU: dot product of the slide's projection with `direction`, minus
        the same without the tile. Positive where a tile speaks for the text.
    """
    features = tile_features.to(model.device, model.dtype)
    direction = direction.to(model.device, model.dtype)
    state = model.empty_state()
    assignment = state.add(features, model.codebook)
    full = model.get_state_features(state).slide_projection[0] @ direction
    residuals = state.residuals(model.codebook)
    losses = []
    for start in range(0, len(features), chunk_size):
        chunk, codeword = features[start : start + chunk_size], assignment[start : start + chunk_size]
        index = torch.arange(len(chunk), device=chunk.device)
        without, counts = residuals.repeat(len(chunk), 1, 1), state.counts.repeat(len(chunk), 1)
        without[index, codeword] -= chunk.double() - model.codebook[codeword].double()
        counts[index, codeword] -= 1
        # A codeword that loses its only tile is empty: exactly zero, not a rounding error blown up to unit norm.
        without[counts == 0] = 0
        projection = model.encode_residuals(without, counts).slide_projection
        losses.append((full - projection @ direction).float().cpu())
    return torch.cat(losses)


__all__ = ["attribute_tiles"]
