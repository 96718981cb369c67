# SPDX-License-Identifier: Apache-2.0
"""What an embedding run knows of a slide while its tiles are encoded: sums, and how many tiles are still wanted.

Letters: N tiles of the slide, n tiles of a batch, D feature width.
"""

from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from .sampling_strata import Strata, plan_strata
from .slide_info import SlideError
from .slide_sampling import DrawnSums, SamplingConfig, SamplingError, sampling_order
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
    return _describe(model.get_state_features(state)) | {"codeword_counts": state.counts.cpu()}


def _describe(outputs: Any) -> dict[str, torch.Tensor]:
    names = ("slide_embedding", "slide_projection", "residuals")
    return {name: outputs[name][0].float().cpu() for name in names}


class SlideSums:
    """Takes the features of a slide's tiles, in any order, and gives the slide's vectors.

    Args:
        model (`DreSlclModel`): in evaluation mode.
        slide_id (`str`): the slide.
        tile_xy (`np.ndarray` of shape `(N, 2)`, int32): its tiles, level-0 pixels.
        sampling (`SamplingConfig`): how many of them are encoded.
        keep_features (`bool`, *optional*, defaults to `False`): keep each tile's feature.

    Attributes:
        order (`np.ndarray`, int64): the tiles that may be encoded, in the order in which they are. Beyond
            `first_part` it changes when the last of these was added and `is_finished` has said that more are wanted.
        first_part (`int`): see above; as many as there are if it does not change.
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
        if not sampling.takes_all and self._rounds != [len(tile_xy)]:
            self.order = sampling_order(tile_xy, slide_id, sampling.seed)
        self.limit, self.most = self._rounds[0], self._rounds[-1]
        self.first_part = sampling.first_part(len(tile_xy)) or self.most
        self._num_added = 0
        self._error = SamplingError()
        self._state = model.empty_state()
        self._drawn: DrawnSums | None = None
        self._first: list[tuple[torch.Tensor, torch.Tensor]] = []  # features and codewords of the first part
        if not sampling.takes_all:
            self._drawn = DrawnSums(Strata.whole(self.order), model.codebook)
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
        assignment = self._state.add(features, self._model.codebook)
        if self._drawn is not None:
            self._drawn.add(features, assignment, start)
            if start < self.first_part < self.most:
                self._first.append((features, assignment))
        if self._features is not None:
            self._features[torch.from_numpy(self.order[start:stop])] = features.float()
        self._num_added += len(features)

    def is_finished(self) -> bool:
        """Whether enough tiles were added; if all that are wanted were but these do not suffice, more are wanted."""
        while self._num_added == self.limit:
            is_last, tolerance = self.limit == self.most, self._sampling.tolerance
            if self._drawn is not None and (is_last or tolerance is not None):
                self._error = self._drawn.estimate_error(self._model)
            if is_last or (tolerance is not None and self._error.bound <= tolerance):
                return True
            if self.limit == self.first_part:
                self._plan_the_rest()
            self.limit = self._rounds[self._rounds.index(self.limit) + 1]
        return False

    def _plan_the_rest(self) -> None:
        """Draws more where the first part says that tiles move the embedding most."""
        features, assignment = (torch.cat(parts) for parts in zip(*self._first, strict=True))
        self._first = []
        strata = plan_strata(self._model, self._state, features, assignment, self._tile_xy, self.order)
        self.order, self._drawn = strata.order, DrawnSums(strata, self._model.codebook)
        self._drawn.add(features, assignment, 0)

    @torch.no_grad()
    def describe(self) -> dict[str, Any]:
        """Returns the slide's named vectors; see `slide_inference.encode_slide`."""
        num_tiles, num_encoded = len(self._tile_xy), self._num_added
        result = {"num_tiles": num_tiles, "num_tiles_encoded": num_encoded}
        if num_encoded == num_tiles:
            result |= describe_state(self._model, self._state)
        else:
            residuals, counts = (part[None].to(self._model.codebook.device) for part in self._drawn.stand_for_all())
            result |= _describe(self._model.encode_residuals(residuals, counts))
            result["codeword_counts"] = counts[0].round().long().cpu()
        if self._drawn is not None:
            result["estimated_error"], result["error_bound"] = self._error.expected, self._error.bound
        encoded = np.sort(self.order[:num_encoded])
        result["tile_xy"] = torch.from_numpy(self._tile_xy[encoded].astype(np.int32))
        if self._features is not None:
            result["tile_features"] = self._features[torch.from_numpy(encoded)]
        return result


__all__ = ["SlideSums", "check_features", "describe_state"]
