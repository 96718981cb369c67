# SPDX-License-Identifier: Apache-2.0
"""Reports -> frozen encodings by any text model, each computed once and kept by the hash of its content.

Cache layout: `<cache>/<key of the model>/<first two digits>/<sha256 of the report>.safetensors`, each with one tensor
`embedding` of shape `(R,)`, float32.
"""

import hashlib
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from tqdm.auto import tqdm
from transformers import AutoTokenizer, PreTrainedModel

from modeling_dre_slcl.atomic_files import atomic_file
from modeling_dre_slcl.report_encoder import pool_report_states

from .pretrained import load_pretrained

logger = logging.getLogger(__name__)


class ReportEncoder:
    """A frozen text model with its tokenizer.

    Args:
        model (`PreTrainedModel`): the text model.
        tokenizer (`PreTrainedTokenizerBase`): its tokenizer.
        pooling (`str`): `"mean"`, `"cls"` or `"last"`, as `text_pooling` of `DreSlclConfig`.
        max_tokens (`int`): longer reports are cut; how many were is logged.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: Any, *, pooling: str, max_tokens: int) -> None:
        self.model, self.tokenizer = model.eval().requires_grad_(False), tokenizer
        if getattr(model, "pooler", None) is not None:
            # Token states are pooled here; a pooler of the model's own would be dead weight in what is published.
            model.pooler = None
        self.pooling = pooling
        self.max_tokens = min(max_tokens, getattr(model.config, "max_position_embeddings", None) or max_tokens)
        if tokenizer.pad_token is None:
            # Causal language models often have none; padding is masked, so any token will do.
            tokenizer.pad_token = tokenizer.eos_token

    @classmethod
    def from_pretrained(cls, name_or_path: str, *, pooling: str, max_tokens: int, **kwargs: Any) -> "ReportEncoder":
        """Loads a text model and its tokenizer from a folder or the Hub; weights from safetensors only."""
        model = load_pretrained(name_or_path, **kwargs)
        return cls(model, AutoTokenizer.from_pretrained(name_or_path), pooling=pooling, max_tokens=max_tokens)

    @property
    def hidden_size(self) -> int:
        """Width R of the encodings."""
        return int(self.model.config.hidden_size)

    def cache_key(self) -> str:
        """Names what an encoding depends on beside the text: weights, vocabulary, pooling and length."""
        digest = hashlib.sha256(f"{self.pooling}\n{self.max_tokens}\n{sorted(self.tokenizer.get_vocab())}".encode())
        for name, tensor in sorted(self.model.state_dict().items()):
            # The first and last values of each tensor tell trained weights apart without reading 7B parameters.
            flat = tensor.flatten()
            sample = torch.cat([flat[:64], flat[-64:]]).float().cpu()
            digest.update(f"{name}{tuple(tensor.shape)}".encode() + sample.numpy().tobytes())
        return digest.hexdigest()[:16]

    @torch.inference_mode()
    def encode(self, reports: Sequence[str]) -> torch.Tensor:
        """Encodes reports as one batch: `torch.Tensor` of shape `(len(reports), R)`, float32, on CPU."""
        tokens = self.tokenizer(
            list(reports), padding=True, truncation=True, max_length=self.max_tokens, return_tensors="pt"
        )
        mask = tokens["attention_mask"].to(self.model.device)
        states = self.model(input_ids=tokens["input_ids"].to(self.model.device), attention_mask=mask).last_hidden_state
        return pool_report_states(states, mask, self.pooling).float().cpu()


def encode_reports(encoder: ReportEncoder, reports: Sequence[str], cache: str | Path) -> torch.Tensor:
    """Encodes reports, taking from the cache what was encoded before.

    Each report is encoded on its own, so that its encoding does not depend on which others it meets in a batch.

    Args:
        encoder (`ReportEncoder`): the text model.
        reports (sequence of `str`): not empty each.
        cache (`str` or `Path`): folder of the cache.

    Returns:
        `torch.Tensor` of shape `(len(reports), R)`, float32.
    """
    folder = Path(cache) / encoder.cache_key()
    paths = {report: _cache_path(folder, report) for report in reports}
    missing = [report for report, path in paths.items() if not path.exists()]
    too_long = sum(len(encoder.tokenizer(report)["input_ids"]) > encoder.max_tokens for report in missing)
    if too_long:
        logger.warning(
            "%d of %d new reports are longer than %d tokens and are cut.", too_long, len(missing), encoder.max_tokens
        )
    for report in tqdm(missing, desc="encoding reports", unit="report", disable=len(missing) < 32):
        with atomic_file(paths[report]) as temporary:
            save_file({"embedding": encoder.encode([report])[0].contiguous()}, temporary)
    loaded = {report: _load_cached(path) for report, path in paths.items()}
    return torch.stack([loaded[report] for report in reports])


def _load_cached(path: Path) -> torch.Tensor:
    try:
        return load_file(path)["embedding"]
    except (SafetensorError, KeyError) as error:
        raise ValueError(f"{path}: this file of the cache of reports is damaged ({error}); delete it.") from error


def _cache_path(folder: Path, report: str) -> Path:
    digest = hashlib.sha256(report.encode()).hexdigest()
    return folder / digest[:2] / f"{digest}.safetensors"
