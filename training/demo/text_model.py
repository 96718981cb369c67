# SPDX-License-Identifier: Apache-2.0
"""A tiny text model for the demo: its vocabulary comes from the cohort's training reports, nothing is downloaded.

Its weights are random and stay so. On a few dozen reports that is the better choice: a random Transformer keeps words
apart (Wieting and Kiela, 2019, arXiv 1901.10444), while masked language modelling on so little text mostly forgets
them. For real reports use a pretrained model instead (`text_model` of the training settings).
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

from modeling_dre_slcl.atomic_files import atomic_folder

_CLS, _SEP, _UNK = "[CLS]", "[SEP]", "[UNK]"
_SPECIAL = {"pad_token": "[PAD]", "unk_token": _UNK, "cls_token": _CLS, "sep_token": _SEP, "mask_token": "[MASK]"}
_VOCABULARY_SIZE = 2000


def train_tokenizer(reports: Sequence[str], max_tokens: int) -> PreTrainedTokenizerFast:
    """Trains a lower-casing WordPiece tokenizer on reports; reports are cut to `max_tokens`."""
    tokenizer = Tokenizer(models.WordPiece(unk_token=_UNK))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    trainer = trainers.WordPieceTrainer(
        vocab_size=_VOCABULARY_SIZE, special_tokens=list(_SPECIAL.values()), show_progress=False
    )
    # The trainer breaks ties by order of appearance, so the order is fixed.
    tokenizer.train_from_iterator(sorted(set(reports)), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{_CLS} $A {_SEP}",
        special_tokens=[(token, tokenizer.token_to_id(token)) for token in (_CLS, _SEP)],
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=max_tokens, **_SPECIAL)


def write_text_model(
    folder: str | Path, reports: Sequence[str], *, seed: int, hidden_size: int = 256, max_tokens: int = 128
) -> Path:
    """Writes the text model and its tokenizer.

    Args:
        folder (`str` or `Path`): where to save; as `AutoModel.from_pretrained` takes it.
        reports (sequence of `str`): the training reports.
        seed (`int`): of the weights.
        hidden_size (`int`, defaults to 256): width of its report encodings.
        max_tokens (`int`, defaults to 128): longest report.

    Returns:
        `Path`: the folder.
    """
    tokenizer = train_tokenizer(reports, max_tokens)
    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=2 * hidden_size,
        max_position_embeddings=max_tokens,
        pad_token_id=tokenizer.pad_token_id,
    )
    with atomic_folder(folder) as temporary:
        BertModel(config).save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
    return Path(folder)
