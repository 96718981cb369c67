# SPDX-License-Identifier: Apache-2.0
"""What each tile of a slide does to a score: what the score loses when the tile is left out.

Residuals are sums, so leaving a tile out needs its feature only, no second look at pixels, and the answer is that of
encoding the slide again without it. A score is any function of the slide embedding: similarity with a text or with
another slide, a class, a probe.

Letters: B slides, N tiles, D feature width, E joint width.
"""

from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from transformers import PreTrainedModel

from .residual_encoder import ResidualEncoder
from .slide_state import SlideState, fixed_point, from_fixed_point
from .tile_deletion import embeddings_without_tiles, wide_encoder

# Slide embeddings (B, D) -> scores (B,).
Score = Callable[[torch.Tensor], torch.Tensor]


def text_similarity(model: PreTrainedModel, direction: torch.Tensor) -> Score:
    """Similarity of a slide with a text.

    Args:
        model (`DreSlclModel`): the model.
        direction (`torch.Tensor` of shape `(E,)`, float): the projection of a text, or the difference of two.

    Returns:
        `Callable`: dot product of a slide's projection, which has unit norm, with the direction.
    """
    return lambda embeddings: (
        F.normalize(_linear(model.slide_projection, embeddings), dim=-1) @ direction.to(embeddings)
    )


def slide_similarity(reference: torch.Tensor) -> Score:
    """Similarity of a slide with another one, as a search among slides ranks by it.

    Args:
        reference (`torch.Tensor` of shape `(D,)`, float): the other slide's `slide_embedding`.

    Returns:
        `Callable`: cosine of the slide embedding with the reference.
    """
    return lambda embeddings: F.cosine_similarity(embeddings, reference.to(embeddings)[None])


def linear_score(weight: torch.Tensor, bias: float = 0.0) -> Score:
    """The output of a linear probe.

    Args:
        weight (`torch.Tensor` of shape `(D,)`, float): the probe's weights for the class that is explained.
        bias (`float`, defaults to 0.0): its bias.

    Returns:
        `Callable`: `slide_embedding @ weight + bias`.
    """
    return lambda embeddings: embeddings @ weight.to(embeddings) + bias


def class_logit(model: PreTrainedModel, label: str | int) -> Score:
    """The logit of a class of a slide classifier.

    Args:
        model (`DreSlclForSlideClassification`): its head `classifier` is explained.
        label (`str` or `int`): name or index of the class.

    Returns:
        `Callable`: the logit.

    Raises:
        ValueError: if the model has no such class, or no classifier; names those that it has.
    """
    head = getattr(model, "classifier", None)
    if head is None:
        raise ValueError(f"{type(model).__name__} has no classifier; load the model as DreSlclForSlideClassification.")
    names = {str(name): int(index) for index, name in model.config.id2label.items()}
    index = names.get(label) if isinstance(label, str) else label
    if index is None or not 0 <= index < len(names):
        raise ValueError(f"There is no class {label!r}; the model's classes are {', '.join(names)}.")
    return lambda embeddings: _linear(head, embeddings)[:, index]


def _linear(layer: torch.nn.Module, embeddings: torch.Tensor) -> torch.Tensor:
    """Applies a layer in the precision of the embeddings, which is at least float32."""
    if not isinstance(layer, torch.nn.Linear):
        return layer(embeddings.to(next(layer.parameters()).dtype)).to(embeddings.dtype)
    bias = None if layer.bias is None else layer.bias.to(embeddings.dtype)
    return F.linear(embeddings, layer.weight.to(embeddings.dtype), bias)


def attribute_tiles(
    model: PreTrainedModel,
    tile_features: torch.Tensor,
    target: torch.Tensor | Score,
    *,
    method: Literal["deletion", "gradient"] = "deletion",
    chunk_size: int = 256,
) -> torch.Tensor:
    """What each tile of a slide does to a score.

    Args:
        model (`DreSlclModel`, or a model with one inside): computes as in evaluation mode.
        tile_features (`torch.Tensor` of shape `(N, D)`, float): features of all tiles of a slide, at least two.
        target (`torch.Tensor` of shape `(E,)`, or `Callable`): what is explained: the projection of a text (or the
            difference of two), or a function of slide embeddings `(B, D)` -> `(B,)` as this file makes them.
        method (`str`, defaults to `"deletion"`): `"deletion"` leaves each tile out; `"gradient"` takes the first-order
            term of that, a hundred times faster and close where no tile weighs much.
        chunk_size (`int`, defaults to 256): tiles left out at once; bounds memory, 50 MB at the default sizes.

    Returns:
        `torch.Tensor` of shape `(N,)`, float32, on CPU: the slide's score minus its score without the tile. Positive
        where a tile speaks for the target.

    Raises:
        ValueError: if there are fewer than two tiles, a feature is not finite (names the tile), or the method is
            unknown.
    """
    if method not in ("deletion", "gradient"):
        raise ValueError(f"`method` must be 'deletion' or 'gradient', got {method!r}.")
    if len(tile_features) < 2:
        raise ValueError(f"A slide of {len(tile_features)} tiles has no score without one of them; two are needed.")
    model = model.base_model
    score = text_similarity(model, target) if isinstance(target, torch.Tensor) else target
    features = tile_features.to(model.device)
    state = model.empty_state()
    assignment = state.add(features, model.codebook)
    encoder = wide_encoder(model.residual_encoder)
    if method == "gradient":
        return _gradient_effects(encoder, state, features, assignment, score).float().cpu()
    return _deletion_effects(encoder, state, features, assignment, score, chunk_size).float().cpu()


@torch.no_grad()
def _deletion_effects(
    encoder: ResidualEncoder,
    state: SlideState,
    features: torch.Tensor,
    assignment: torch.Tensor,
    score: Score,
    chunk_size: int,
) -> torch.Tensor:
    effects = torch.empty(len(features), dtype=torch.float64, device=features.device)
    residuals = state.residuals(encoder.codebook)
    full = score(encoder(residuals[None], state.counts[None]).slide_embedding)[0].double()
    for index, embeddings in embeddings_without_tiles(encoder, state, features, assignment, chunk_size=chunk_size):
        effects[index] = full - score(embeddings).double()
    return effects


def _gradient_effects(
    encoder: ResidualEncoder, state: SlideState, features: torch.Tensor, assignment: torch.Tensor, score: Score
) -> torch.Tensor:
    residuals, counts = state.residuals(encoder.codebook).requires_grad_(), state.counts.double().requires_grad_()
    with torch.enable_grad():
        value = score(encoder(residuals[None], counts[None]).slide_embedding).sum()
        # A residual's direction does not depend on how many tiles it is of.
        of_residuals, of_counts = torch.autograd.grad(value, (residuals, counts), materialize_grads=True)
    taken_out = from_fixed_point(fixed_point(features)) - encoder.codebook.double()[assignment]
    return (taken_out * of_residuals[assignment]).sum(dim=1) + of_counts[assignment]


__all__ = ["attribute_tiles", "class_logit", "linear_score", "slide_similarity", "text_similarity"]
