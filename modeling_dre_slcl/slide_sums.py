# SPDX-License-Identifier: Apache-2.0
"""What an embedding run knows of a slide while its tiles are encoded: sums, and how many tiles are still wanted.

Letters: N tiles of the slide, n tiles of a batch, D feature width.
"""

from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from .slide_info import SlideError
from .slide_sampling import NUM_GROUPS, SamplingConfig, SamplingError, estimate_error, sampling_order
from .slide_state import SlideState


def check_features(features: torch.Tensor, slide_id: str, first_tile: int) -> None:
    """Refuses a slide with a tile whose feature is not finite.

    Args:
        features (`torch.Tensor` of shape `(n, D)`, float): of its tiles.
        slide_id (`str`): the slide.
        first_tile (`int`): place of the first of them.

    Raises:
        SlideError: `non_finite`, naming the tile.
    """
    is_bad = ~torch.isfinite(features).all(dim=1)
    if is_bad.any():
        tile = first_tile + int(is_bad.nonzero()[0])
        text = f"the tile encoder's feature of tile {tile} is not finite; encode in float32, or train the model again"
        raise SlideError(slide_id, "non_finite", text)


@torch.no_grad()
def describe_state(model: PreTrainedModel, state: SlideState) -> dict[str, torch.Tensor]:
    """A slide's running state -> its named vectors, on CPU.

    Returns:
        `dict`: `slide_embedding` `(D,)`, `slide_projection` `(E,)` and `residuals` `(K, D)`, float32, and
        `codeword_counts` `(K,)`, int64.
    """
    outputs = model.get_state_features(state)
    return {
        "slide_embedding": outputs.slide_embedding[0].float().cpu(),
        "slide_projection": outputs.slide_projection[0].float().cpu(),
        "residuals": outputs.residuals[0].float().cpu(),
        "codeword_counts": state.counts.cpu(),
    }


class SlideSums:
    """Takes the features of a slide's tiles, in any order, and gives the slide's vectors.

    Args:
        model (`DreSlclModel`): in evaluation mode.
        slide_id (`str`): the slide.
        tile_xy (`np.ndarray` of shape `(N, 2)`, int32): its tiles, level-0 pixels.
        sampling (`SamplingConfig`): how many of them are encoded.
        keep_features (`bool`, *optional*, defaults to `False`): keep each tile's feature.

    Attributes:
        order (`np.ndarray`, int64): the tiles that may be encoded, in the order in which they are.
        limit (`int`): how many of them are wanted so far.
        most (`int`): how many can ever be wanted.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        slide_id: str,
        tile_xy: np.ndarray,
        sampling: SamplingConfig,
        *,
        keep_features: bool = False,
    ) -> None:
        self._model, self._slide_id, self._tile_xy, self._sampling = model, slide_id, tile_xy, sampling
        self._rounds = sampling.rounds(len(tile_xy))
        self.order = np.arange(len(tile_xy))
        if self._rounds != [len(tile_xy)]:
            self.order = sampling_order(tile_xy, slide_id, sampling.seed)
        self.limit, self.most = self._rounds[0], self._rounds[-1]
        self._num_added = 0
        self._error = SamplingError()
        self._state = model.empty_state()
        num_groups = 0 if sampling.takes_all else NUM_GROUPS
        self._groups = [model.empty_state() for _ in range(num_groups)]
        self._features = None
        if keep_features:
            self._features = torch.zeros(len(tile_xy), model.codebook.shape[1])

    def add(self, features: torch.Tensor, start: int) -> None:
        """Adds tiles.

        Args:
            features (`torch.Tensor` of shape `(n, D)`, float): on CPU.
            start (`int`): place of the first of them in `order`; the others follow it there.

        Raises:
            SlideError: `non_finite`.
        """
        check_features(features, self._slide_id, start)
        stop = start + len(features)
        self._state.add(features, self._model.codebook)
        for place, group in enumerate(self._groups):
            first = (place - start) % NUM_GROUPS
            if first < len(features):
                group.add(features[first::NUM_GROUPS], self._model.codebook)
        if self._features is not None:
            self._features[torch.from_numpy(self.order[start:stop])] = features.float()
        self._num_added += len(features)

    def is_finished(self) -> bool:
        """Whether enough tiles were added; if all that are wanted were but these do not suffice, more are wanted."""
        while self._num_added == self.limit:
            is_last = self.limit == self.most
            if not self._sampling.takes_all:
                self._error = estimate_error(self._model, self._groups, len(self._tile_xy))
            if is_last or self._error.bound <= (self._sampling.tolerance or 0):
                return True
            self.limit = self._rounds[self._rounds.index(self.limit) + 1]
        return False

    def describe(self) -> dict[str, Any]:
        """Returns the slide's named vectors; see `slide_inference.encode_slide`."""
        num_tiles, num_encoded = len(self._tile_xy), self._num_added
        result = {"num_tiles": num_tiles, "num_tiles_encoded": num_encoded, **describe_state(self._model, self._state)}
        if not self._sampling.takes_all:
            result["estimated_error"], result["error_bound"] = self._error.expected, self._error.bound
        if num_encoded < num_tiles:
            # What the sums of all tiles are expected to be; the embedding looks at their directions only.
            scale = num_tiles / num_encoded
            counts = result["codeword_counts"]
            result["residuals"] = result["residuals"] * scale
            result["codeword_counts"] = (counts * scale).round().long()
        encoded = np.sort(self.order[:num_encoded])
        result["tile_xy"] = torch.from_numpy(self._tile_xy[encoded].astype(np.int32))
        if self._features is not None:
            result["tile_features"] = self._features[torch.from_numpy(encoded)]
        return result


__all__ = ["SlideSums", "check_features", "describe_state"]
