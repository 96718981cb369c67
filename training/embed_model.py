# SPDX-License-Identifier: Apache-2.0
"""Loads the model of an embedding run and puts it on its device."""

import os
from typing import Any

import torch
from transformers import AutoImageProcessor, PreTrainedModel

from modeling_dre_slcl.slide_inference import check_model

from .pretrained import load_slide_model


def load_model(name: str, revision: str | None, device: str | None) -> tuple[PreTrainedModel, Any]:
    """Loads a model with the installed classes: code that a repository carries is not run.

    Args:
        name (`str`): folder or Hub repository.
        revision (`str`, *optional*): branch, tag or commit on the Hub.
        device (`str`, *optional*): by default this process's accelerator, else the CPU.

    Returns:
        `tuple`: the model in evaluation mode, and its image processor.

    Raises:
        ValueError: if it is no DRE-SLCL model, or one that cannot embed anything.
    """
    model = load_slide_model(name, revision)
    check_model(model)
    image_processor = AutoImageProcessor.from_pretrained(name, trust_remote_code=False, revision=revision or "main")
    return model.to(device or default_device()), image_processor


def default_device() -> torch.device:
    """Returns the accelerator of this process by its local rank, or the CPU."""
    if not torch.accelerator.is_available():
        return torch.device("cpu")
    kind = torch.accelerator.current_accelerator().type
    return torch.device(kind, int(os.environ.get("LOCAL_RANK", "0")) % torch.accelerator.device_count())
