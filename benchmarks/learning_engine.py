# SPDX-License-Identifier: Apache-2.0
"""The arms of `benchmarks.learning` that the package's own engine trains: `Trainer` with a `TrainConfig`."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import nn

from benchmarks.learning_scores import Cohort, SlideVectors
from dre_slcl.training import bank_modes
from dre_slcl.training.config import TrainConfig
from dre_slcl.training.embed_split import embed_split
from dre_slcl.training.sampler import PADDING
from dre_slcl.training.trainer import Trainer

# A small ResNet with group norm, so that no statistics of a batch reach the bank, and a stem for small tiles.
TILE_ENCODER = {
    "model_type": "timm_wrapper",
    "architecture": "resnet18",
    "model_args": {
        "layers": [1, 1, 1, 1],
        "channels": [16, 32, 48, 64],
        "norm_layer": "groupnorm1",
        "stem_type": "deep",
        "stem_width": 4,
    },
}
PROJECTION_SIZE = 64
SETTINGS: dict[str, Any] = {
    "slides_per_batch": 16,
    "tiles_per_slide": 8,
    "retrieved_per_slide": 32,
    "num_steps": 300,
    "finalize_steps": 300,
    "warmup_steps": 20,
    "learning_rate": 3e-4,
    "head_learning_rate": 1e-3,
    "checkpoint_steps": 1_000_000,
    "log_steps": 50,
    "num_workers": 0,
}


class TileCounter:
    """Counts the tiles that pass through a tile encoder, with and without gradient.

    Args:
        encoder (`nn.Module`): the tile encoder.
    """

    def __init__(self, encoder: nn.Module) -> None:
        self.with_gradient = self.without_gradient = 0
        self._hook = encoder.register_forward_hook(self._count, with_kwargs=True)

    def _count(self, encoder: nn.Module, inputs: tuple, named: dict[str, Any], outputs: Any) -> None:
        count = len(named["pixel_values"]) if "pixel_values" in named else len(inputs[0])
        if torch.is_grad_enabled() and any(parameter.requires_grad for parameter in encoder.parameters()):
            self.with_gradient += count
        else:
            self.without_gradient += count

    def stop(self) -> dict[str, int]:
        """Stops counting; returns the counts by their names in the results."""
        self._hook.remove()
        return {"tiles_with_gradient": self.with_gradient, "tiles_without_gradient": self.without_gradient}


def train_with_engine(
    cohort: Cohort, settings: dict[str, Any], start: str | None, changed: str | None, run_dir: Path
) -> tuple[SlideVectors, dict[str, int]]:
    """Trains with the package's engine, and embeds all slides with what came out.

    Args:
        cohort (`Cohort`): the slides and reports.
        settings (`dict`): what differs from `SETTINGS`; `model_config` holds fields of the model's config.
        start (`str`, *optional*): folder of a pretrained tile encoder; `None`: from scratch.
        changed (`str`, *optional*): a part of the method to leave out that no setting leaves out, see `_without`.
        run_dir (`Path`): folder of the run.

    Returns:
        `tuple`: the slides' vectors, and counts of tiles.
    """
    given = SETTINGS | {name: value for name, value in settings.items() if name != "model_config"}
    shape = {"text_projection": "linear", "projection_size": PROJECTION_SIZE} | settings.get("model_config", {})
    text = {} if given.get("objective") == "labels" else {"text_model": cohort.text_model}
    if given.get("objective") == "labels":
        shape = {name: value for name, value in shape.items() if name not in ("text_projection", "projection_size")}
    encoder = {"tile_encoder_config": TILE_ENCODER} if start is None else {"tile_encoder": start}
    config = TrainConfig(
        dataset=cohort.dataset,
        output_dir=str(run_dir),
        model_config=shape,
        seed=cohort.seed,
        **encoder,
        **text,
        **given,
    )
    run_dir.mkdir(parents=True, exist_ok=True)
    (run_dir / "report_cache").symlink_to((cohort.folder / "report_cache").resolve())
    # Pictures of a run, which nobody looks at here, would take as long as a part of it.
    with _without(changed), mock.patch.object(Trainer, "_write_summary"):
        trainer = Trainer(config)
        counter = TileCounter(trainer.unwrapped.tile_encoder)
        if trainer.run() is not None:
            raise KeyboardInterrupt
        counts, model = counter.stop(), trainer.unwrapped
        test = embed_split(model, trainer.parts.image_processor, cohort.test, batch_size=256, progress=False)
        vectors = SlideVectors(_embeddings_in_bank(trainer, len(cohort.train.slides)), test.slide_embedding)
    if text:
        vectors.test_projection = torch.from_numpy(test.slide_projection)
        vectors.project_reports = model.get_report_projection
    return vectors, counts


@torch.no_grad()
def _embeddings_in_bank(trainer: Trainer, num_slides: int) -> np.ndarray:
    """Embeddings of the training slides `(S, D)`: finalizing left all their tiles' final features in the bank."""
    model = trainer.unwrapped.eval()
    places = trainer.data.bank_places(list(range(num_slides)))
    nothing = torch.full((num_slides, 1), PADDING)
    residuals, counts = model.memory_bank.residuals_of_others(places, nothing, model.codebook)
    return model.encode_residuals(residuals.float(), counts.float()).slide_embedding.numpy()


@contextlib.contextmanager
def _without(changed: str | None) -> Iterator[None]:
    """Leaves a part of the method out while a run lasts.

    Args:
        changed (`str`, *optional*): `"drift"`: mode `corrected` keeps its strata and its gradient of all tiles, but
            takes stored tiles as they were stored.
    """
    if changed is None:
        yield
    elif changed == "drift":
        with mock.patch.dict(bank_modes.BANK_MODES, {"corrected": _Uncorrected}):
            yield
    else:
        raise ValueError(f"`changed` must be 'drift', got {changed!r}.")


class _Uncorrected(bank_modes.Corrected):
    """Mode `corrected` without its correction."""

    def arguments(self, model: nn.Module, tiles: bank_modes.PlannedTiles) -> bank_modes.Arguments:
        """As mode `full`, with that gradient; see `BankMode.arguments`."""
        residuals, counts = model.memory_bank.residuals_of_others(tiles.slides, tiles.sampled, model.codebook)
        return {"stored_residuals": residuals, "stored_counts": counts, "stand_for_all": True}
