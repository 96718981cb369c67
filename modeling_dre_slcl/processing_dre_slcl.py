# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 The DRE-SLCL authors.
"""Tiles and reports -> the model's inputs: image processor and tokenizer in one object."""

from typing import Any

from transformers import ProcessorMixin


class DreSlclProcessor(ProcessorMixin):
    r"""Bundles the image processor for tiles and the tokenizer for reports and queries.

    Args:
        image_processor (`DreSlclImageProcessor`): prepares tiles.
        tokenizer (`PreTrainedTokenizerBase`): of the text model that ships with the model.
    """

    def __init__(self, image_processor: Any = None, tokenizer: Any = None, **kwargs: Any) -> None:
        super().__init__(image_processor, tokenizer, **kwargs)


__all__ = ["DreSlclProcessor"]
