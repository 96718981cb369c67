# SPDX-License-Identifier: Apache-2.0
"""How slides are tiled and stored: the options of a build, checked before any work."""

from dataclasses import asdict, dataclass, field
from typing import Any

from modeling_dre_slcl.tile_grid import TileGridConfig

SHARD_BYTES = 500 << 20


@dataclass(frozen=True)
class BuildOptions:
    """How slides are tiled and stored.

    Args:
        grid_config (`TileGridConfig`): size, resolution and stride of tiles, and how much tissue they need.
        pixels (`str`, defaults to `"encode"`): `"encode"` stores every tile as JPEG; `"none"` stores coordinates
            only, so that training reads the slides.
        jpeg_quality (`int`, defaults to 90): 1-100.
        mpp (`float`, *optional*): micrometres per level-0 pixel, instead of the files' own value, for all slides
            whose manifest row gives none.
        num_workers (`int`, *optional*): processes that tile slides; default: one per core; 0: none, in this process.
        license_name (`str`, defaults to `"unknown"`): licence of the images for the dataset card.
        stain (`str`, defaults to `"unknown"`): stain of the slides for the dataset card.
        shard_bytes (`int`, defaults to 500 MiB): size of a tile file.
        progress (`bool`, defaults to `True`): show a progress bar if the output is a terminal.

    Raises:
        ValueError: if a value is out of range.
    """

    grid_config: TileGridConfig = field(default_factory=TileGridConfig)
    pixels: str = "encode"
    jpeg_quality: int = 90
    mpp: float | None = None
    num_workers: int | None = None
    license_name: str = "unknown"
    stain: str = "unknown"
    shard_bytes: int = SHARD_BYTES
    progress: bool = True

    def __post_init__(self) -> None:
        if self.pixels not in {"encode", "none"}:
            raise ValueError(f"pixels: expected 'encode' or 'none', found {self.pixels!r}.")
        if not 1 <= self.jpeg_quality <= 100:
            raise ValueError(f"jpeg_quality: expected 1 to 100, found {self.jpeg_quality}.")
        if self.num_workers is not None and self.num_workers < 0:
            raise ValueError(f"num_workers: expected 0 or more, found {self.num_workers}.")

    @property
    def stored_quality(self) -> int | None:
        """JPEG quality of the stored tiles, `None` if no pixels are stored."""
        return self.jpeg_quality if self.pixels == "encode" else None

    def parameters(self) -> dict[str, Any]:
        """Returns every number that the tiles of a slide depend on."""
        grid = {**asdict(self.grid_config), "stride_px": self.grid_config.effective_stride_px}
        return {**grid, "jpeg_quality": self.stored_quality}

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
        return self.mpp if row_mpp is None else row_mpp
