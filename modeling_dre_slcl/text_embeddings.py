# SPDX-License-Identifier: Apache-2.0
"""Texts -> vectors to compare slides with, each computed once and kept by the hash of its content.

Cache layout: `<cache>/<key of the model>/<first two digits>/<sha256 of the text>.safetensors`, each with one tensor
`text_embedding` of shape `(E,)`, float32.
"""

import hashlib
from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from .atomic_files import atomic_file

_TEXTS_AT_ONCE = 32
_SAMPLED_VALUES = 64


class TextEmbeddings:
    """The text side of a model, with a memory.

    Args:
        model (`DreSlclModel`): with a text model inside.
        tokenizer (`PreTrainedTokenizerBase` or `DreSlclProcessor`): its tokenizer.
        cache_dir (`str` or `Path`, *optional*): folder that keeps vectors between processes; by default they are kept
            in memory only.

    Raises:
        ValueError: if no text model ships with the model, or there is no tokenizer.

    Example:

    ```python
    texts = TextEmbeddings(model, tokenizer, cache_dir="text-cache")
    similarity = texts.embed(["Poorly differentiated squamous cell carcinoma."]) @ slide_projection
    ```
    """

    def __init__(self, model: PreTrainedModel, tokenizer: Any, cache_dir: str | Path | None = None) -> None:
        if model.text_encoder is None:
            raise ValueError(
                "Text cannot be compared with slides: this model ships without a text model (`text_config` is None). "
                "Encode the text with the model that it was trained with (see its card), bring it to the joint space "
                "with `get_report_projection`, and compare it with `slide_projection`; or train with "
                "`ship_text_model: true`."
            )
        if tokenizer is None:
            raise ValueError(
                "Text needs the tokenizer of the model's text encoder, and none was found beside its weights; pass "
                "`tokenizer=AutoTokenizer.from_pretrained(...)`."
            )
        self.model, self.tokenizer = model, getattr(tokenizer, "tokenizer", tokenizer)
        self._kept: dict[str, torch.Tensor] = {}
        self._folder = None if cache_dir is None else Path(cache_dir) / text_model_key(model, self.tokenizer)

    @torch.no_grad()
    def embed(self, texts: Sequence[str]) -> torch.Tensor:
        """Brings texts to the joint space.

        Args:
            texts (sequence of `str`): reports, prompts or queries; what is longer than the text model reads is cut.

        Returns:
            `torch.Tensor` of shape `(len(texts), E)`, float32, on CPU, L2-normalised.

        Raises:
            ValueError: if a text is empty.
        """
        for text in texts:
            if not isinstance(text, str) or not text.strip():
                raise ValueError(f"Expected texts that are not empty, got {text!r}.")
        missing = [text for text in dict.fromkeys(texts) if text not in self._kept and not self._load(text)]
        for batch in self._batches(missing):
            tokens = self.tokenizer(batch, truncation=True, max_length=self._max_tokens(), return_tensors="pt")
            tokens = tokens.to(self.model.device)
            vectors = self.model.get_text_features(tokens["input_ids"], tokens["attention_mask"]).float().cpu()
            for text, vector in zip(batch, vectors, strict=True):
                self._keep(text, vector.clone())
        return torch.stack([self._kept[text] for text in texts]) if texts else torch.empty(0, self._width())

    def _batches(self, texts: Sequence[str]) -> Iterator[list[str]]:
        """Texts of one length together: without padding, a text's vector does not depend on its company."""
        limit = self._max_tokens()
        lengths = {text: len(self.tokenizer(text, truncation=True, max_length=limit)["input_ids"]) for text in texts}
        for _, group in groupby(sorted(texts, key=lengths.__getitem__), key=lengths.__getitem__):
            alike = list(group)
            for start in range(0, len(alike), _TEXTS_AT_ONCE):
                yield alike[start : start + _TEXTS_AT_ONCE]

    def _max_tokens(self) -> int:
        # Tokenizers without a limit of their own state an enormous one.
        return min(
            self.tokenizer.model_max_length,
            getattr(self.model.config.text_config, "max_position_embeddings", None) or self.tokenizer.model_max_length,
        )

    def _width(self) -> int:
        return self.model.config.projection_size

    def _path(self, text: str) -> Path | None:
        digest = hashlib.sha256(text.encode()).hexdigest()
        return None if self._folder is None else self._folder / digest[:2] / f"{digest}.safetensors"

    def _load(self, text: str) -> bool:
        """Takes a vector from the cache, if it is there."""
        path = self._path(text)
        if path is None or not path.is_file():
            return False
        self._kept[text] = load_file(path)["text_embedding"]
        return True

    def _keep(self, text: str, vector: torch.Tensor) -> None:
        self._kept[text] = vector
        if (path := self._path(text)) is not None:
            with atomic_file(path) as temporary:
                save_file({"text_embedding": vector.contiguous()}, temporary)


def text_model_key(model: PreTrainedModel, tokenizer: Any) -> str:
    """Names what a text's vector depends on beside the text: weights, vocabulary and pooling.

    Args:
        model (`DreSlclModel`): with a text model inside.
        tokenizer (`PreTrainedTokenizerBase`): its tokenizer.

    Returns:
        `str`: 16 hexadecimal digits.
    """
    vocabulary = sorted(tokenizer.get_vocab().items())
    digest = hashlib.sha256(f"{model.config.text_pooling}\n{tokenizer.model_max_length}\n{vocabulary}".encode())
    for name, tensor in sorted(model.text_encoder.state_dict().items()):
        # The first and last values of each tensor tell trained weights apart without reading 7B parameters.
        flat = tensor.flatten()
        _update(digest, name, torch.cat([flat[:_SAMPLED_VALUES], flat[-_SAMPLED_VALUES:]]))
    for name, tensor in sorted(model.text_projection.state_dict().items()):
        _update(digest, name, tensor)
    _update(digest, "report_mean", model.report_mean)
    return digest.hexdigest()[:16]


def _update(digest: Any, name: str, values: torch.Tensor) -> None:
    digest.update(
        f"{name}{tuple(values.shape)}".encode() + values.detach().float().cpu().contiguous().numpy().tobytes()
    )


__all__ = ["TextEmbeddings", "text_model_key"]
