# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 The DRE-SLCL authors.
"""Tiles as uint8 pixels -> what the tile encoder takes."""

import numpy as np
import torch
from transformers.image_processing_backends import TorchvisionBackend
from transformers.image_utils import IMAGENET_STANDARD_MEAN, IMAGENET_STANDARD_STD, PILImageResampling


class DreSlclImageProcessor(TorchvisionBackend):
    r"""Resizes tiles to the tile encoder's input size, rescales them to [0, 1] and normalises them.

    The default mean and standard deviation of 0.5 are those of HIPT's ViT-256.
    """

    resample = PILImageResampling.BILINEAR
    image_mean = IMAGENET_STANDARD_MEAN
    image_std = IMAGENET_STANDARD_STD
    size = {"height": 256, "width": 256}  # noqa: RUF012 (transformers' own convention)
    do_resize = True
    do_rescale = True
    do_normalize = True
    do_convert_rgb = True

    def tiles_to_pixel_values(self, tiles: np.ndarray | torch.Tensor, device: torch.device | str) -> torch.Tensor:
        """The fast way for tiles of one size: uint8 travels to the device and is resized and normalised there.

        Args:
            tiles (`np.ndarray` or `torch.Tensor` of shape `(..., H, W, 3)`, uint8): RGB pixels.
            device (`torch.device` or `str`): where the result is wanted.

        Returns:
            `torch.Tensor` of shape `(..., 3, H', W')`, float32: equal to calling the processor on each tile.
        """
        tiles = torch.as_tensor(tiles).to(device, non_blocking=True)
        # (..., H, W, 3) -> (n, 3, H, W)
        images = tiles.reshape(-1, *tiles.shape[-3:]).permute(0, 3, 1, 2)
        if self._only_normalizes(images):
            values = self._normalize_at_once(images)
        else:
            values = self.preprocess(images, device=device, return_tensors="pt")["pixel_values"]
        return values.reshape(*tiles.shape[:-3], *values.shape[1:])

    def _only_normalizes(self, images: torch.Tensor) -> bool:
        """Whether uint8 images keep their size and their pixels' places."""
        keeps_size = not self.do_resize or images.shape[-2:] == (self.size.get("height"), self.size.get("width"))
        cuts = self.do_center_crop or self.do_pad
        return images.dtype == torch.uint8 and keeps_size and not cuts and self.do_rescale and self.do_normalize

    def _normalize_at_once(self, images: torch.Tensor) -> torch.Tensor:
        """What `preprocess` does to such images, bit by bit, but not image by image and in memory taken once."""
        mean, std = (
            (torch.tensor(values, device=images.device) * (1 / self.rescale_factor)).view(3, 1, 1)
            for values in (self.image_mean, self.image_std)
        )
        return images.to(torch.float32, memory_format=torch.contiguous_format).sub_(mean).div_(std)


__all__ = ["DreSlclImageProcessor"]
