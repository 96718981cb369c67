# SPDX-License-Identifier: Apache-2.0
"""What the page shows of a slide beside its pixels: codewords, where a text matches, nearest slides.

Letters: N tiles, K codewords, E joint width.
"""

import logging
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from modeling_dre_slcl.residual_encoder import assign_codewords
from modeling_dre_slcl.text_embeddings import TextEmbeddings

from ..search_index import EmbeddingIndex
from ..search_regions import encode_regions
from ..stored_features import StoredTiles, read_stored_tiles, stored_file

logger = logging.getLogger(__name__)
MODES = ("contribution", "similarity")
MAX_TEXT_LENGTH = 4000
_REGION_TILES = 4
_MAX_KEPT = 32


class SlideMatches:
    """A model and, as they are asked for, the tiles of slides. One thread at a time; `SlideViewer` sees to that.

    Args:
        model (`DreSlclModel`): in evaluation mode.
        image_processor (`DreSlclImageProcessor`): its image processor, for slides without stored tiles.
        tokenizer (*optional*): its tokenizer; without one, or without a text model, texts are refused.
        index (`EmbeddingIndex`, *optional*): embeddings of `dre-slcl embed`: stored tiles, nearest slides.
    """

    def __init__(
        self, model: Any, image_processor: Any, tokenizer: Any = None, index: EmbeddingIndex | None = None
    ) -> None:
        self.model, self.image_processor, self.index = model, image_processor, index
        self.has_text = model.text_encoder is not None and tokenizer is not None
        self.texts = TextEmbeddings(model, tokenizer) if self.has_text else None
        self._tiles: dict[str, StoredTiles] = {}
        self._found: OrderedDict[tuple, dict[str, Any]] = OrderedDict()

    def tiles(self, slide_id: str, path: Path, mpp: float) -> StoredTiles:
        """The tiles of a slide with their features: stored ones if there are, else encoded now, which takes a while.

        Raises:
            SlideError: if the slide cannot be encoded.
        """
        if slide_id not in self._tiles:
            self._tiles[slide_id] = self._stored(slide_id) or self._encode(slide_id, path, mpp)
        return self._tiles[slide_id]

    def describe(self, tiles: StoredTiles) -> dict[str, Any]:
        """Places of the tiles and the codeword of each, as JSON."""
        codewords = assign_codewords(self._features(tiles), self.model.codebook)
        return {
            "tile_xy": tiles.tile_xy.tolist(),
            "tile_size_level0_px": tiles.side_level0_px(self.model.config),
            "codewords": codewords.tolist(),
            "num_codewords": len(self.model.codebook),
        }

    @torch.no_grad()
    def match(self, tiles: StoredTiles, text: str, against: str = "", mode: str = MODES[0]) -> dict[str, Any]:
        """Where a text matches a slide.

        Args:
            tiles (`StoredTiles`): of the slide.
            text (`str`): what is looked for.
            against (`str`, *optional*): another text, to see what speaks for one rather than the other.
            mode (`str`, *optional*): `"contribution"`: what the slide's match loses without a tile, exactly;
                `"similarity"`: how well the tile's surroundings (4 x 4 tiles), taken for a slide, match.

        Returns:
            `dict`: `values`, N numbers, `None` where a tile has none; `similarity`, the slide's cosine with the text
                (minus that with the other).

        Raises:
            ValueError: if a text is empty or too long, the mode is unknown, or there is no text model.
        """
        if not self.has_text:
            raise ValueError("This model ships without a text model, so that no text can be compared with slides.")
        if mode not in MODES:
            raise ValueError(f"mode: expected one of {', '.join(MODES)}, found {mode!r}.")
        if not text.strip() or max(len(text), len(against)) > MAX_TEXT_LENGTH:
            raise ValueError(f"Give a text of at most {MAX_TEXT_LENGTH} characters.")
        key = (tiles.slide_id, text, against, mode)
        if key not in self._found:
            self._found[key] = self._match(tiles, text, against, mode)
            while len(self._found) > _MAX_KEPT:
                self._found.popitem(last=False)
        self._found.move_to_end(key)
        return self._found[key]

    def _match(self, tiles: StoredTiles, text: str, against: str, mode: str) -> dict[str, Any]:
        vectors = self.texts.embed([text, against] if against.strip() else [text])
        direction = vectors[0] - vectors[1] if len(vectors) == 2 else vectors[0]
        whole = self.model.get_slide_features(self._features(tiles)[None])
        if mode == "contribution":
            values = self.model.attribute_tiles(torch.from_numpy(tiles.tile_features), direction).tolist()
        else:
            regions = encode_regions(self.model, tiles, _REGION_TILES)
            scores = (regions.projection @ direction).tolist()
            values = [scores[region] if region >= 0 else None for region in regions.region_of_tile.tolist()]
        return {
            "values": [None if value is None else float(f"{value:.4g}") for value in values],
            "similarity": float(whole.slide_projection[0].float().cpu() @ direction),
            "mode": mode,
        }

    @torch.no_grad()
    def nearest_slides(self, tiles: StoredTiles, top_k: int) -> list[dict[str, Any]]:
        """Slides of the index that are most like this one, as JSON; none without an index."""
        if self.index is None:
            return []
        if tiles.slide_id in self.index.slide_ids:
            own = self.index.row(tiles.slide_id)
            return self._rows(
                self.index.search(self.index.slide_embedding[own], "slide_embedding", top_k, leave_out={own})
            )
        encoded = self.model.get_slide_features(self._features(tiles)[None])
        vector = encoded.slide_embedding[0].float().cpu().numpy()
        return self._rows(self.index.search(vector, "slide_embedding", top_k))

    def slides_of_text(self, text: str, top_k: int) -> list[dict[str, Any]]:
        """Slides of the index that match a text best, as JSON; none without an index."""
        if self.index is None or self.texts is None or not text.strip() or len(text) > MAX_TEXT_LENGTH:
            return []
        return self._rows(self.index.search(self.texts.embed([text])[0].numpy(), "slide_projection", top_k))

    def _rows(self, found: list[tuple[int, float]]) -> list[dict[str, Any]]:
        ids, cases = self.index.slide_ids, self.index.case_ids
        return [{"slide_id": ids[row], "case_id": cases[row], "score": score} for row, score in found]

    def _features(self, tiles: StoredTiles) -> torch.Tensor:
        return torch.from_numpy(tiles.tile_features).to(self.model.device, self.model.dtype)

    def _stored(self, slide_id: str) -> StoredTiles | None:
        if self.index is None or slide_id not in self.index.slide_ids:
            return None
        try:
            return read_stored_tiles(stored_file(self.index.folder, slide_id), self.model.config)
        except (ValueError, FileNotFoundError) as error:
            logger.info("Slide %s is encoded again: %s", slide_id, error)
            return None

    def _encode(self, slide_id: str, path: Path, mpp: float) -> StoredTiles:
        result = self.model.encode_slide(
            path, image_processor=self.image_processor, slide_id=slide_id, mpp=mpp, return_tile_features=True
        )
        tile_xy = np.asarray(result["tile_xy"], dtype=np.int32)
        return StoredTiles(slide_id, result["tile_features"].numpy(), tile_xy, int(result["tile_size_level0_px"]))
