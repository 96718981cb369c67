# SPDX-License-Identifier: Apache-2.0
"""How slides are tiled and stored: the options of a build, checked before any work."""

from dataclasses import asdict, dataclass, field
from typing import Any

from modeling_dre_slcl.slide_info import MAX_MPP, MIN_MPP
from modeling_dre_slcl.tile_grid import TileGridConfig
from modeling_dre_slcl.tissue import TISSUE_METHODS

from .mask_geojson import MASK_FRAMES

SHARD_BYTES = 500 << 20
PIXELS = ("copy", "encode", "none")
MISALIGNED = ("encode", "refuse")
_NOT_STORED = ("num_workers", "strict", "progress")


@dataclass(frozen=True)
class BuildOptions:
    """How slides are tiled and stored.

    Args:
        grid_config (`TileGridConfig`): size, resolution and stride of tiles, and how much tissue they need.
        pixels (`str`, defaults to `"encode"`): `"encode"` stores every tile as JPEG; `"copy"` stores the slide's own
            compressed tile where it is exactly the wanted one; `"none"` stores coordinates only, so that training
            reads the slides.
        misaligned (`str`, defaults to `"encode"`): with `pixels="copy"`, whether tiles that cannot be copied are
            encoded, or (`"refuse"`) their slide is refused.
        jpeg_quality (`int`, defaults to 90): 1-100, of tiles that are encoded.
        tissue (`str`, defaults to `"stain"`): how tissue is found, one of `TISSUE_METHODS`; slides with a mask or
            coordinates of their own keep those.
        mask_frame (`str`, defaults to `"qupath"`): one of `MASK_FRAMES`: where positions in masks count from.
        slide_mpp (`float`, *optional*): micrometres per level-0 pixel, instead of the files' own value, for all slides
            whose manifest row gives none.
        num_workers (`int`, *optional*): processes that tile slides; default: one per core; 0: none, in this process.
        license_name (`str`, defaults to `"unknown"`): licence of the images for the dataset card.
        stain (`str`, defaults to `"unknown"`): stain of the slides for the dataset card.
        source_text (`str`, defaults to `""`): where the slides come from, for the dataset card.
        strict (`bool`, defaults to `False`): refuse to make a dataset if any slide is refused.
        shard_bytes (`int`, defaults to 500 MiB): size of a tile file.
        progress (`bool`, defaults to `True`): show a progress bar if the output is a terminal.

    Raises:
        ValueError: if a value is out of range.
    """

    grid_config: TileGridConfig = field(default_factory=TileGridConfig)
    pixels: str = "encode"
    misaligned: str = "encode"
    jpeg_quality: int = 90
    tissue: str = "stain"
    mask_frame: str = "qupath"
    slide_mpp: float | None = None
    num_workers: int | None = None
    license_name: str = "unknown"
    stain: str = "unknown"
    source_text: str = ""
    strict: bool = False
    shard_bytes: int = SHARD_BYTES
    progress: bool = True

    def __post_init__(self) -> None:
        if self.pixels not in PIXELS:
            raise ValueError(f"pixels: expected one of {', '.join(PIXELS)}, found {self.pixels!r}.")
        if self.misaligned not in MISALIGNED:
            raise ValueError(f"misaligned: expected one of {', '.join(MISALIGNED)}, found {self.misaligned!r}.")
        if self.tissue not in TISSUE_METHODS:
            raise ValueError(f"tissue: expected one of {', '.join(TISSUE_METHODS)}, found {self.tissue!r}.")
        if self.mask_frame not in MASK_FRAMES:
            raise ValueError(f"mask_frame: expected one of {', '.join(MASK_FRAMES)}, found {self.mask_frame!r}.")
        if not 1 <= self.jpeg_quality <= 100:
            raise ValueError(f"jpeg_quality: expected 1 to 100, found {self.jpeg_quality}.")
        if self.slide_mpp is not None and not MIN_MPP <= self.slide_mpp <= MAX_MPP:
            raise ValueError(f"slide_mpp: expected {MIN_MPP} to {MAX_MPP:g} um/px, found {self.slide_mpp}.")
        if self.num_workers is not None and self.num_workers < 0:
            raise ValueError(f"num_workers: expected 0 or more, found {self.num_workers}.")
        if self.shard_bytes < 1:
            raise ValueError(f"shard_bytes: expected 1 or more, found {self.shard_bytes}.")

    def parameters(self) -> dict[str, Any]:
        """Returns everything that the tiles of a slide depend on."""
        grid = {**asdict(self.grid_config), "stride_px": self.grid_config.effective_stride_px}
        grid |= {"tissue": self.tissue, "mask_frame": self.mask_frame}
        pixels = {
            "none": {"pixels": "none"},
            "encode": {"pixels": "encode", "jpeg_quality": self.jpeg_quality},
            "copy": {"pixels": "copy", "misaligned": self.misaligned, "jpeg_quality": self.jpeg_quality},
        }
        return {**grid, **pixels[self.pixels]}

    def to_dict(self) -> dict[str, Any]:
        """Returns all that a dataset depends on, as `from_dict` takes it."""
        content = asdict(self)
        for name in _NOT_STORED:
            del content[name]
        return content

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> "BuildOptions":
        """Returns the options of a finished dataset."""
        return cls(**{**content, "grid_config": TileGridConfig(**content["grid_config"])})

    def geometry(self) -> dict[str, int | float]:
        """Returns what a model must agree with: `tile_size_px`, `tile_mpp` and `stride_px`."""
        grid = self.grid_config
        return {
            "tile_size_px": grid.tile_size_px,
            "tile_mpp": grid.tile_mpp,
            "stride_px": grid.effective_stride_px,
        }

    def mpp_of(self, row_mpp: float | None) -> float | None:
        """Returns the mpp to use instead of a slide's own: its manifest row's, else the one for all slides."""
        return self.slide_mpp if row_mpp is None else row_mpp
