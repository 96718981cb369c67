# SPDX-License-Identifier: Apache-2.0
"""What else a slide encoder is asked for: slide states, explanations, and the calls that TITAN and PRISM know.

A mixin of `DreSlclModel`. Features that come from outside are L2-normalised first, as the model's tile encoder does.

Letters: B slides, N tiles, K codewords, D feature width, E joint width.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from transformers.utils import ModelOutput

from .slide_state import SlideState


class SlideInterfaces:
    """Methods of `DreSlclModel` that are built on its forward pass and have no weights of their own."""

    def empty_state(self) -> SlideState:
        """Returns the running state of a slide without tiles; add tiles with `state.add(features, model.codebook)`."""
        revision = getattr(self.config, "_commit_hash", None)
        name = self.config._name_or_path or ""
        return SlideState.empty(
            self.codebook,
            tile_size_px=self.config.tile_size_px,
            tile_mpp=float(self.config.tile_mpp),
            model_id=f"{name}@{revision}" if revision else name,
        )

    def state_of_tiles(self, tile_features: torch.Tensor) -> SlideState:
        """Returns the state of some tiles, features of shape `(N, D)`: a slide, a region, one worker's share."""
        state = self.empty_state()
        state.add(tile_features.to(self.codebook.device), self.codebook)
        return state

    def state_of_region(
        self, region: Any, tile_features: torch.Tensor, tile_xy: torch.Tensor, tile_size_level0_px: float
    ) -> SlideState:
        """Returns the state of the tiles whose centre lies in a region, without encoding anything again.

        Args:
            region (`regions.Region`): from `regions.box_region` or `regions.read_regions`.
            tile_features (`torch.Tensor` of shape `(N, D)`, float): features of the slide's tiles.
            tile_xy (`torch.Tensor` of shape `(N, 2)`, int32): their top-left corners, level-0 pixels.
            tile_size_level0_px (`float`): side of a tile, level-0 pixels.
        """
        from .regions import tiles_in_region

        inside = tiles_in_region(region, torch.as_tensor(tile_xy).numpy(), tile_size_level0_px)
        return self.state_of_tiles(tile_features[torch.from_numpy(inside).to(tile_features.device)])

    def to_trident_encoder(self, **kwargs: Any) -> torch.nn.Module:
        """Returns the model as a slide encoder of TRIDENT; arguments as in `trident_encoder.make_trident_encoder`."""
        from .trident_encoder import make_trident_encoder

        return make_trident_encoder(self, **kwargs)

    @torch.no_grad()
    def get_state_features(self, state: SlideState) -> ModelOutput:
        """A slide's running state -> slide embedding, with a batch of one.

        Raises:
            ValueError: if the state holds no tile, or is of another codebook.
        """
        if state.num_tiles == 0:
            raise ValueError("This slide state holds no tile, so that there is nothing to embed; add tiles first.")
        residuals = state.residuals(self.codebook).to(self.codebook.device)
        return self.encode_residuals(residuals[None], state.counts.to(residuals.device)[None])

    def attribute_tiles(
        self, tile_features: torch.Tensor, target: torch.Tensor | Callable[..., torch.Tensor], **kwargs: Any
    ) -> torch.Tensor:
        """Says what each tile does to a score; arguments and result as in `attribution.attribute_tiles`."""
        from .attribution import attribute_tiles

        return attribute_tiles(self, tile_features, target, **kwargs)

    @torch.no_grad()
    def encode_slide_from_patch_features(
        self, patch_features: torch.Tensor, patch_coords: torch.Tensor, patch_size_lv0: int
    ) -> torch.Tensor:
        """Features of a slide's tiles -> slide embedding, called as TITAN is.

        Args:
            patch_features (`torch.Tensor` of shape `(1, N, D)`, float): features of the model's own tile encoder.
            patch_coords (`torch.Tensor` of shape `(1, N, 2)`, int64): level-0 (x, y) of each tile. They are checked
                only: a residual encoding does not depend on where tiles lie.
            patch_size_lv0 (`int`): side of a tile in level-0 pixels; checked only.

        Returns:
            `torch.Tensor` of shape `(1, D)`: the slide embedding, not projected.

        Raises:
            ValueError: if shapes do not fit, there is no tile, or a feature is not finite (names the tile).
        """
        if patch_coords.shape != (*patch_features.shape[:2], 2) or patch_size_lv0 <= 0:
            raise ValueError(
                "Expected `patch_features` (1, N, D), `patch_coords` (1, N, 2) and a positive `patch_size_lv0`, found "
                f"{tuple(patch_features.shape)}, {tuple(patch_coords.shape)} and {patch_size_lv0}."
            )
        return self.slide_representations(patch_features)["image_embedding"]

    @torch.no_grad()
    def slide_representations(
        self, tile_embeddings: torch.Tensor, tile_mask: torch.Tensor | None = None
    ) -> dict[str, torch.Tensor]:
        """Features of several slides' tiles -> slide embeddings, called as PRISM is.

        Args:
            tile_embeddings (`torch.Tensor` of shape `(B, N, D)`, float): features of the model's own tile encoder.
            tile_mask (`torch.Tensor` of shape `(B, N)`, bool, *optional*): False for padding.

        Returns:
            `dict`: `image_embedding` of shape `(B, D)`, not projected, and `image_latents` of shape `(B, K, D)`, the
            codeword tokens after the last layer.

        Raises:
            ValueError: if shapes do not fit, a slide has no tile, or a feature is not finite (names slide and tile).
        """
        features = self._checked_features(tile_embeddings, tile_mask)
        outputs = self.get_slide_features(features, None if tile_mask is None else tile_mask.to(features.device))
        return {"image_embedding": outputs.slide_embedding, "image_latents": outputs.hidden_states[-1]}

    def zero_shot_classifier(self, *arguments: Any, tokenizer: Any = None) -> torch.Tensor:
        """Builds a classifier from text: `(tokenizer, class_names, templates)`, or TITAN's `(classes, templates)`.

        Args:
            arguments: a tokenizer, which may be left out; `class_names`, a sequence of lists of names (synonyms), one
                per class; and `templates`, prompts that hold the literal token `CLASSNAME`.
            tokenizer (`PreTrainedTokenizerBase` or `DreSlclProcessor`, *optional*): by default the one beside the
                model's weights.

        Returns:
            `torch.Tensor` of shape `(number of classes, E)`, as `zero_shot.zero_shot_classifier`.
        """
        from .zero_shot import zero_shot_classifier

        if tokenizer is None and callable(arguments[0]):
            tokenizer, *arguments = arguments
        class_names, *templates = arguments
        templates = [part for part in templates if part is not None]
        return zero_shot_classifier(self, tokenizer or self._own_tokenizer(), class_names, *templates)

    def _own_tokenizer(self) -> Any:
        """Loads the tokenizer from where the model came from, at the same revision."""
        from transformers import AutoTokenizer

        source = self.config._name_or_path
        if self.text_encoder is None or not source:
            problem = "ships without a text model" if self.text_encoder is None else "was not loaded from a folder"
            raise ValueError(f"This model {problem}, so that its tokenizer is not known; pass `tokenizer`.")
        return AutoTokenizer.from_pretrained(source, revision=getattr(self.config, "_commit_hash", None) or "main")

    def _checked_features(self, features: torch.Tensor, tile_mask: torch.Tensor | None) -> torch.Tensor:
        """Checks features `(B, N, D)` from outside and brings them to what the tile encoder returns."""
        width = self.config.hidden_size
        shape = tuple(features.shape)
        if features.ndim != 3 or shape[2] != width or (tile_mask is not None and tile_mask.shape != shape[:2]):
            mask = "" if tile_mask is None else f" and a mask of shape {tuple(tile_mask.shape)}"
            raise ValueError(f"Expected tile features of shape (slides, tiles, {width}), found {shape}{mask}.")
        real = torch.ones(shape[:2], dtype=torch.bool) if tile_mask is None else tile_mask.bool().cpu()
        if not shape[1] or not bool(real.any(dim=1).all()):
            slide = 0 if not shape[1] else int((~real.any(dim=1)).nonzero()[0])
            raise ValueError(f"Slide {slide} of the batch has no tile, so that there is nothing to embed.")
        wrong = ~torch.isfinite(features).all(dim=2).cpu() & real
        if bool(wrong.any()):
            slide, tile = wrong.nonzero()[0].tolist()
            raise ValueError(f"The feature of tile {tile} of slide {slide} is not finite; compute it again.")
        # Padding may hold anything, NaN included, and zero times NaN is NaN.
        features = torch.where(real[..., None].to(features.device), features, 0)
        return F.normalize(features.to(self.codebook.device, torch.float32), dim=-1).to(self.codebook.dtype)


__all__ = ["SlideInterfaces"]
