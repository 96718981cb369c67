# SPDX-License-Identifier: Apache-2.0
"""`dre-slcl convert-encoder`: pickled weights of a tile encoder -> a folder of safetensors that `tile_encoder` takes.

Two kinds of input:

- a checkpoint of DINO, such as HIPT's `vit256_small_dino.pth`: a ViT under `teacher` or `student`, its names beginning
  with `module.backbone.` or `backbone.`; its sizes are read off its tensors. It becomes a `ViTModel` of transformers.
- `pytorch_model.bin` beside a config.json, in transformers' or timm's layout, such as UNI's: the same tensors under
  the same names, as safetensors.

Only a process of its own reads the pickle, with `weights_only=True`; this one sees its tensors as safetensors.

Letters: D feature width, T tokens, P patch size in px.
"""

import argparse
import logging
import shutil
import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel, ViTConfig, ViTImageProcessor, ViTModel

from modeling_dre_slcl.atomic_files import atomic_folder

from .foreign_worker import read_foreign
from .hdf5_files import ForeignFileError
from .pickled_weights import pickle_to_safetensors

logger = logging.getLogger(__name__)
_SECONDS = 600.0
_PREFIXES = ("module.", "backbone.")
_SIDE_FILES = ("config.json", "preprocessor_config.json")
_NAMES = (
    ("pos_embed", "embeddings.position_embeddings"),
    ("patch_embed.proj", "embeddings.patch_embeddings.projection"),
    ("cls_token", "embeddings.cls_token"),
    ("blocks.", "layers."),
    (".norm1.", ".layernorm_before."),
    (".norm2.", ".layernorm_after."),
    (".attn.proj.", ".attention.o_proj."),
    ("norm.", "layernorm."),
)
_HEAD_WIDTH = 64  # of an attention head, in all ViTs of DINO
_DINO_MEAN, _DINO_STD = [0.5, 0.5, 0.5], [0.5, 0.5, 0.5]  # what HIPT feeds its ViT-256 with


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `dre-slcl convert-encoder`."""
    parser.description = (
        "Converts pickled weights of a tile encoder to a folder that `tile_encoder` takes: DINO checkpoints (HIPT's "
        "ViT-256), or pytorch_model.bin beside a config.json (timm or transformers)."
    )
    parser.add_argument("source", type=Path, metavar="FILE", help="the .pth or .bin file")
    parser.add_argument("out", type=Path, metavar="OUT", help="folder to write")
    parser.add_argument(
        "--image-size", type=int, default=256, metavar="PX",
        help="of a DINO checkpoint: size of the tiles it will see (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--key", help="of a DINO checkpoint: `teacher` or `student` (default: teacher, if it is there)"
    )


def run(arguments: argparse.Namespace) -> int:
    """Runs the command; returns its exit status."""
    try:
        convert_encoder(arguments.source, arguments.out, image_size_px=arguments.image_size, key=arguments.key)
    except (ValueError, OSError) as error:
        logger.error("%s", error)
        return 1
    logger.info("Converted; train with `tile_encoder: %s`.", arguments.out)
    return 0


def convert_encoder(source: Path, out: Path, *, image_size_px: int = 256, key: str | None = None) -> None:
    """Converts pickled weights.

    Args:
        source (`Path`): the file.
        out (`Path`): folder to write; replaced if it is there.
        image_size_px (`int`, defaults to 256): of a DINO checkpoint, the size of the tiles it will see.
        key (`str`, *optional*): of a DINO checkpoint, which of its networks.

    Raises:
        ValueError: if the file cannot be read safely, or is no tile encoder.
    """
    config = source.parent / "config.json"
    with tempfile.TemporaryDirectory() as folder:
        weights = Path(folder) / "model.safetensors"
        request = (source, weights, None if config.is_file() else key)
        result = next(
            read_foreign(pickle_to_safetensors, [request], names=[source.name], seconds=_SECONDS, isolated=True)
        )
        if isinstance(result, ForeignFileError):
            raise ValueError(str(result))
        with atomic_folder(out) as temporary:
            if config.is_file():
                save_file(load_file(weights), temporary / weights.name, metadata={"format": "pt"})
                for name in _SIDE_FILES:
                    if (source.parent / name).is_file():
                        shutil.copyfile(source.parent / name, temporary / name)
            else:
                vit_of_dino(load_file(weights), source.name, image_size_px).save_pretrained(temporary)
                size = {"height": image_size_px, "width": image_size_px}
                ViTImageProcessor(size=size, image_mean=_DINO_MEAN, image_std=_DINO_STD).save_pretrained(temporary)


def vit_of_dino(tensors: dict[str, torch.Tensor], name: str, image_size_px: int) -> PreTrainedModel:
    """Builds transformers' ViT with the weights of DINO's.

    Args:
        tensors (`dict`): of the ViT, under DINO's names; a head is left out.
        name (`str`): the file, for messages.
        image_size_px (`int`): size of the tiles it will see. Position embeddings for another size are interpolated
            once, as DINO does at every call.

    Raises:
        ValueError: if tensors are missing, or left over.
    """
    tensors = {_plain(key): value for key, value in tensors.items()}
    tensors = {key: value for key, value in tensors.items() if not key.startswith("head.")}
    try:
        width, _, patch_px, _ = tensors["patch_embed.proj.weight"].shape
        blocks = {int(key.split(".")[1]) for key in tensors if key.startswith("blocks.")}
        config = ViTConfig(
            hidden_size=width,
            num_hidden_layers=len(blocks),
            num_attention_heads=width // _HEAD_WIDTH,
            intermediate_size=tensors["blocks.0.mlp.fc1.weight"].shape[0],
            image_size=image_size_px,
            patch_size=patch_px,
            qkv_bias="blocks.0.attn.qkv.bias" in tensors,
            layer_norm_eps=1e-6,
        )
        tensors["pos_embed"] = _resize_positions(tensors["pos_embed"], image_size_px // patch_px)
    except (KeyError, ValueError) as error:
        raise ValueError(f"{name} holds no ViT of DINO: {error} is missing or has another shape.") from error
    model = ViTModel(config, add_pooling_layer=False).eval()
    renamed = _as_transformers(tensors)
    missing, extra = sorted(set(model.state_dict()) - set(renamed)), sorted(set(renamed) - set(model.state_dict()))
    if missing or extra:
        raise ValueError(f"{name} holds another network than a ViT of DINO: `{(missing + extra)[0]}` does not fit.")
    model.load_state_dict(renamed)
    return model


def _plain(key: str) -> str:
    for prefix in _PREFIXES:
        key = key.removeprefix(prefix)
    return key


def _resize_positions(positions: torch.Tensor, side: int) -> torch.Tensor:
    """Position embeddings `(1, T, D)` for a grid of `side` x `side` patches, interpolated as in DINO's code."""
    count, width = positions.shape[1] - 1, positions.shape[2]
    if count == side * side:
        return positions
    grid = round(count**0.5)
    # (1, T - 1, D) -> (1, D, grid, grid)
    patches = positions[:, 1:].reshape(1, grid, grid, width).permute(0, 3, 1, 2)
    # DINO adds 0.1 to the wanted side before it divides, and interpolates by that scale.
    scale = (side + 0.1) / grid
    patches = torch.nn.functional.interpolate(patches, scale_factor=(scale, scale), mode="bicubic")
    return torch.cat([positions[:, :1], patches.permute(0, 2, 3, 1).reshape(1, -1, width)], dim=1)


def _as_transformers(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Tensors of DINO's ViT under the names that transformers' has for them."""
    renamed = {}
    for key, value in tensors.items():
        if ".attn.qkv." in key:
            start, end = key.split(".attn.qkv.")
            for letter, part in zip("qkv", value.chunk(3), strict=True):
                renamed[f"{start.replace('blocks.', 'layers.')}.attention.{letter}_proj.{end}"] = part.clone()
            continue
        for theirs, ours in _NAMES:
            key = key.replace(theirs, ours)
        renamed[key] = value
    return renamed
