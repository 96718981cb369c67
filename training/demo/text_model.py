# SPDX-License-Identifier: Apache-2.0
"""A tiny text model for the demo: vocabulary and weights come from the cohort's training reports, nothing is downloaded.

For real reports use a pretrained model instead (`text_model` of the training settings).
"""

import logging
from collections.abc import Sequence
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from transformers import BertConfig, BertForMaskedLM, PreTrainedTokenizerFast

from modeling_dre_slcl.atomic_files import atomic_folder

logger = logging.getLogger(__name__)
_SPECIAL = {
    "pad_token": "[PAD]",
    "unk_token": "[UNK]",
    "cls_token": "[CLS]",
    "sep_token": "[SEP]",
    "mask_token": "[MASK]",
}
_MASKED_SHARE = 0.2
_IGNORED_LABEL = -100


def train_tokenizer(reports: Sequence[str], vocabulary_size: int, max_tokens: int) -> PreTrainedTokenizerFast:
    """Trains a lower-casing WordPiece tokenizer on reports."""
    tokenizer = Tokenizer(models.WordPiece(unk_token=_SPECIAL["unk_token"]))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    trainer = trainers.WordPieceTrainer(
        vocab_size=vocabulary_size, special_tokens=list(_SPECIAL.values()), show_progress=False
    )
    # The trainer breaks ties by order of appearance, so the order is fixed.
    tokenizer.train_from_iterator(sorted(set(reports)), trainer)
    cls, sep = _SPECIAL["cls_token"], _SPECIAL["sep_token"]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{cls} $A {sep}",
        special_tokens=[(cls, tokenizer.token_to_id(cls)), (sep, tokenizer.token_to_id(sep))],
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=max_tokens, **_SPECIAL)


def write_text_model(
    folder: str | Path,
    reports: Sequence[str],
    *,
    seed: int,
    hidden_size: int = 128,
    num_steps: int = 200,
    batch_size: int = 32,
    max_tokens: int = 128,
) -> Path:
    """Trains a tiny BERT by masked language modelling on reports and saves it with its tokenizer.

    Args:
        folder (`str` or `Path`): where to save; as `AutoModel.from_pretrained` takes it.
        reports (sequence of `str`): the training reports.
        seed (`int`): of weights, masks and batches.
        hidden_size (`int`, defaults to 128): width of its report encodings.
        num_steps (`int`, defaults to 200): training steps.
        batch_size (`int`, defaults to 32): reports in a step.
        max_tokens (`int`, defaults to 128): longest report.

    Returns:
        `Path`: the folder.
    """
    tokenizer = train_tokenizer(reports, 2000, max_tokens)
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
    model = BertForMaskedLM(config).train()
    tokens = tokenizer(sorted(set(reports)), padding=True, truncation=True, return_tensors="pt")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=1e-3, total_steps=num_steps)
    random = torch.Generator().manual_seed(seed)
    for _ in range(num_steps):
        rows = torch.randint(len(tokens["input_ids"]), (batch_size,), generator=random)
        ids, mask = tokens["input_ids"][rows], tokens["attention_mask"][rows]
        hidden = (torch.rand(ids.shape, generator=random) < _MASKED_SHARE) & mask.bool()
        hidden &= (ids != tokenizer.cls_token_id) & (ids != tokenizer.sep_token_id)
        labels = ids.masked_fill(~hidden, _IGNORED_LABEL)
        outputs = model(input_ids=ids.masked_fill(hidden, tokenizer.mask_token_id), attention_mask=mask, labels=labels)
        outputs.loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    logger.info(
        "Text model trained on %d reports; last masked-word loss %.2f.", len(set(reports)), outputs.loss.item()
    )
    with atomic_folder(folder) as temporary:
        model.eval().bert.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
    return Path(folder)
