# SPDX-License-Identifier: Apache-2.0
"""A tiny slide dataset in the documented layout, written without our builder, and a tiny text model beside it.

Tiles of 16 px; each slide's tiles have a hue of their own, so that there is something to learn.
"""

from pathlib import Path

import cv2
import numpy as np
import torch
from datasets import Dataset, Features, Image, Value
from transformers import BertConfig, BertModel, BertTokenizerFast

TILE_PX = 16
WORDS = ("solid", "tubular", "necrosis", "lymphocytes", "margin", "free", "brisk", "absent", "grade", "high", "low")
CARD = """---
configs:
- config_name: tiles
  default: true
  data_files: [{split: train, path: "tiles/train-*.parquet"}]
- config_name: slides
  data_files: [{split: train, path: "slides/train-*.parquet"}]
---
"""


def write_dataset(
    folder: Path, *, num_slides: int = 12, slides_per_case: int = 2, tiles: tuple = (6, 20), held_out: int = 0
) -> Path:
    """Writes `num_slides` slides to train on, and `held_out` ones of other cases to split `val`.

    Consecutive slides share a case and its report.
    """
    for name in ("slides", "tiles"):
        (folder / name).mkdir(parents=True)
    _write_split(folder, "train", range(num_slides), slides_per_case, tiles)
    card = CARD
    if held_out:
        first = -(-num_slides // slides_per_case) * slides_per_case
        _write_split(folder, "val", range(first, first + held_out), slides_per_case, tiles)
        for name in ("slides", "tiles"):
            entry = f'{{split: train, path: "{name}/train-*.parquet"}}'
            card = card.replace(entry, entry + entry.replace("{", ", {").replace("train", "val"))
    (folder / "README.md").write_text(card)
    return folder


def _write_split(folder: Path, split: str, slides: range, slides_per_case: int, tiles: tuple) -> None:
    random = np.random.default_rng(slides.start)
    slide_rows, tile_rows = [], []
    for slide in slides:
        num_tiles = int(random.integers(*tiles))
        case = slide // slides_per_case
        color = np.random.default_rng(case).integers(40, 216, size=3)
        for tile in range(num_tiles):
            pixels = np.clip(color + random.normal(scale=25, size=(TILE_PX, TILE_PX, 3)), 0, 255).astype(np.uint8)
            jpeg = cv2.imencode(".jpg", pixels, [cv2.IMWRITE_JPEG_QUALITY, 95])[1].tobytes()
            row = {"slide_id": f"slide-{slide}", "tile_index": tile, "x": tile * TILE_PX, "y": 0}
            tile_rows.append(row | {"image": {"bytes": jpeg, "path": None}})
        words = np.random.default_rng(100 + case).choice(WORDS, size=5)
        slide_rows.append(
            {
                "slide_id": f"slide-{slide}",
                "case_id": f"case-{case}",
                "split": split,
                "path": f"slide-{slide}.tif",
                "mpp": 1.0,
                "tile_size_px": TILE_PX,
                "tile_mpp": 1.0,
                "tile_size_level0_px": TILE_PX,
                "tile_xy": [[tile * TILE_PX, 0] for tile in range(num_tiles)],
                "tile_start": len(tile_rows) - num_tiles,
                "num_tiles": num_tiles,
                "report": " ".join(words),
                "status": "ok",
                "reason": "",
                "subtype": str(words[0]),
            }
        )
    Dataset.from_list(slide_rows).to_parquet(folder / "slides" / f"{split}-00000-of-00001.parquet")
    features = Features(
        {"slide_id": Value("string"), "tile_index": Value("int32"), "x": Value("int32"), "y": Value("int32")}
        | {"image": Image()}
    )
    Dataset.from_list(tile_rows, features=features).to_parquet(folder / "tiles" / f"{split}-00000-of-00001.parquet")


def write_text_model(folder: Path, *, hidden_size: int = 12) -> Path:
    """Writes a random BERT with a vocabulary of whole words."""
    folder.mkdir(parents=True)
    vocabulary = folder / "vocab.txt"
    vocabulary.write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]))
    BertTokenizerFast.from_pretrained(str(folder)).save_pretrained(folder)
    torch.manual_seed(0)
    sizes = {"hidden_size": hidden_size, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    BertModel(BertConfig(vocab_size=5 + len(WORDS), **sizes)).save_pretrained(folder)
    return folder


def train_settings(root: Path, output_dir: Path) -> dict:
    """Settings of a run of seconds on what the two functions above wrote to `root / "data"` and `root / "text"`."""
    encoder = {"model_type": "vit", "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    encoder |= {"intermediate_size": 32, "image_size": TILE_PX, "patch_size": 8}
    return {
        "dataset": str(root / "data"),
        "output_dir": str(output_dir),
        "text_model": str(root / "text"),
        "tile_encoder_config": encoder,
        "model_config": {"num_codewords": 4, "hidden_dropout_prob": 0.1, "num_attention_heads": 2},
        "slides_per_batch": 4,
        "tiles_per_slide": 4,
        "num_steps": 8,
        "warmup_steps": 2,
        "finalize_steps": 4,
        "codebook_refits": [4],
        "learning_rate": 1e-3,
        "augment_stain": 0.1,
        "num_workers": 0,
        "checkpoint_steps": 2,
        "log_steps": 1,
    }
