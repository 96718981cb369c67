# SPDX-License-Identifier: Apache-2.0
"""Loads the model of an embedding run and puts it on its device."""

import os
from typing import Any

import torch
from transformers import AutoImageProcessor, AutoModel, PreTrainedModel

import modeling_dre_slcl  # noqa: F401 - registers the model with the Auto classes
from modeling_dre_slcl.slide_inference import check_model


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
    options = {"trust_remote_code": False, "revision": revision or "main"}
    model = AutoModel.from_pretrained(name, **options)
    if not hasattr(model, "codebook"):
        raise ValueError(f"{name}: expected a DRE-SLCL model, found {type(model).__name__}.")
    check_model(model)
    image_processor = AutoImageProcessor.from_pretrained(name, **options)
    return model.to(device or default_device()).eval(), image_processor


def default_device() -> torch.device:
    """Returns the accelerator of this process by its local rank, or the CPU."""
    if not torch.accelerator.is_available():
        return torch.device("cpu")
    kind = torch.accelerator.current_accelerator().type
    return torch.device(kind, int(os.environ.get("LOCAL_RANK", "0")) % torch.accelerator.device_count())
