# SPDX-License-Identifier: Apache-2.0
"""The residual encoder, trained further with labels, on stored tile features; the tile encoder stays as it is.

With a frozen tile encoder and a fixed codebook, all that the residual encoder sees of a slide are its residual sums
and counts per codeword. So a slide is one row of numbers, and fine-tuning is a method like the others: `FineTuning`
takes the place of a linear probe in `run_method`, on the table of `residual_table` rather than on one of embeddings.

Letters: n slides, N tiles, K codewords, D feature width, C classes or labels.
"""

import copy
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from modeling_dre_slcl import DreSlclModel
from modeling_dre_slcl.residual_encoder import ResidualEncoder, residual_sums
from modeling_dre_slcl.slide_classifier import slide_label_loss

from ..feature_files import HDF5_SUFFIXES
from ..stored_features import read_stored_tiles
from .case_folds import Fold, inner_splits, strata_of
from .embedding_table import EmbeddingTable, make_table
from .label_table import TaskLabels
from .null_rows import SHUFFLED, chance_row, shuffle_labels
from .protocol import run_method
from .scores import MAIN_METRIC
from .task_result import TaskResult

logger = logging.getLogger(__name__)
FEATURE_SUFFIXES = (".safetensors", *HDF5_SUFFIXES)
MAX_EPOCHS = 100
PATIENCE = 10
_SLIDES_AT_ONCE = 256


class FineTuning:
    """Trains a copy of a residual encoder and a new linear classifier, until the loss on the validation part rises.

    Where no validation part is given, it is one of up to five folds of whole cases within the training part. Classes
    weigh the same, however rare; labels that are not known do not count.

    Args:
        residual_encoder (`ResidualEncoder`): where training starts; it is not changed.
        num_outputs (`int`): C.
        kind (`str`, defaults to `"classification"`): or "multilabel".
        learning_rate (`float`, defaults to 1e-3): of the classifier; the residual encoder learns with a tenth of it.
        weight_decay (`float`, defaults to 0.01): of AdamW.
        batch_size (`int`, defaults to 32): slides in a step.
        device (`str`, defaults to `"cpu"`): where it is trained, such as "cuda:0".

    Attributes:
        settings (`dict`): `epochs` after which the loss was best.
    """

    name = "fine_tuning"
    uses_validation = True

    def __init__(
        self,
        residual_encoder: ResidualEncoder,
        num_outputs: int,
        kind: str = "classification",
        *,
        learning_rate: float = 1e-3,
        weight_decay: float = 0.01,
        batch_size: int = 32,
        device: str = "cpu",
    ) -> None:
        if kind not in ("classification", "multilabel"):
            raise ValueError(f"Fine-tuning asks for classes or labels; this task is of kind {kind}.")
        self.num_codewords, self.hidden_size = residual_encoder.codebook.shape
        self.start = copy.deepcopy(residual_encoder).float().cpu()
        self.num_outputs, self.kind, self.batch_size = num_outputs, kind, batch_size
        self.learning_rate, self.weight_decay, self.device = learning_rate, weight_decay, torch.device(device)
        self.settings: dict[str, Any] = {}

    def fit(
        self,
        features: np.ndarray,
        targets: np.ndarray,
        case_ids: Sequence[str],
        seed: int,
        is_validation: np.ndarray | None = None,
    ) -> "FineTuning":
        """Trains on rows of `residual_table` `(n, K D + K)` with classes `(n,)`, int, or labels `(n, C)`, float."""
        strata = strata_of(TaskLabels("", self.kind, targets, [""] * self.num_outputs))
        fitted, held = next(
            inner_splits(strata, case_ids, seed, is_validation), (np.arange(len(targets)), np.zeros(0, dtype=int))
        )
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            self._train(self._tensors(features), torch.from_numpy(np.asarray(targets)), fitted, held, seed)
        return self

    @torch.no_grad()
    def predict(self, features: np.ndarray) -> np.ndarray:
        """Probabilities `(n, C)` of rows of `residual_table`."""
        self._encoder.eval()
        residuals, counts = self._tensors(features)
        parts = [
            self._logits(residuals[start : start + _SLIDES_AT_ONCE], counts[start : start + _SLIDES_AT_ONCE])
            for start in range(0, len(residuals), _SLIDES_AT_ONCE)
        ]
        logits = torch.cat(parts).double().cpu()
        return (logits.softmax(dim=-1) if self.kind == "classification" else logits.sigmoid()).numpy()

    def _train(
        self,
        slides: tuple[torch.Tensor, torch.Tensor],
        targets: torch.Tensor,
        fitted: np.ndarray,
        held: np.ndarray,
        seed: int,
    ) -> None:
        residuals, counts = slides
        targets = (targets.long() if self.kind == "classification" else targets.float()).to(self.device)
        self._encoder = copy.deepcopy(self.start).to(self.device)
        self._classifier = nn.Linear(self.hidden_size, self.num_outputs).to(self.device)
        groups = [
            {"params": self._encoder.parameters(), "lr": self.learning_rate / 10},
            {"params": self._classifier.parameters(), "lr": self.learning_rate},
        ]
        optimizer = torch.optim.AdamW(groups, weight_decay=self.weight_decay)
        weights = self._class_weights(targets[fitted])
        best, best_loss, best_epoch = self._weights(), float("inf"), 0
        for epoch in range(1, MAX_EPOCHS + 1):
            self._encoder.train()
            order = torch.from_numpy(fitted)[torch.randperm(len(fitted))]
            for place, rows in enumerate(order.split(self.batch_size)):
                # Dropout is a function of the seed and the step, on any device.
                self._encoder.dropout_seed = int(np.random.SeedSequence([seed, epoch, place]).generate_state(1)[0])
                loss = slide_label_loss(self._logits(residuals[rows], counts[rows]), targets[rows], weights)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            if not len(held):
                best, best_epoch = self._weights(), epoch
                if epoch == PATIENCE:
                    break
                continue
            self._encoder.eval()
            with torch.no_grad():
                loss = slide_label_loss(self._logits(residuals[held], counts[held]), targets[held], weights).item()
            if loss < best_loss:
                best, best_loss, best_epoch = self._weights(), loss, epoch
            elif epoch - best_epoch >= PATIENCE:
                break
        self._encoder.load_state_dict(best[0])
        self._classifier.load_state_dict(best[1])
        self.settings = {"epochs": best_epoch}

    def _class_weights(self, targets: torch.Tensor) -> torch.Tensor | None:
        """So that each class has the same weight in all; labels are left as they are."""
        if self.kind != "classification":
            return None
        counts = torch.bincount(targets, minlength=self.num_outputs).float()
        return torch.where(counts > 0, len(targets) / (counts.clamp(min=1) * (counts > 0).sum()), 1.0)

    def _logits(self, residuals: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
        return self._classifier(self._encoder(residuals, counts).slide_embedding)

    def _weights(self) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        return copy.deepcopy(self._encoder.state_dict()), copy.deepcopy(self._classifier.state_dict())

    def _tensors(self, features: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        """Rows `(n, K D + K)` -> residuals `(n, K, D)` and counts `(n, K)`."""
        width = self.num_codewords * (self.hidden_size + 1)
        if features.shape[1] != width:
            raise ValueError(
                f"Fine-tuning needs rows of {width} numbers, residuals and counts of {self.num_codewords} codewords; "
                f"found {features.shape[1]}. Make them with `residual_table` and the same model."
            )
        rows = torch.from_numpy(np.asarray(features, dtype=np.float32)).to(self.device)
        residuals, counts = rows.split([self.num_codewords * self.hidden_size, self.num_codewords], dim=1)
        return residuals.unflatten(1, (self.num_codewords, self.hidden_size)), counts


def residual_table(model: DreSlclModel, folder: str | Path, *, name: str = "slides") -> EmbeddingTable:
    """Stored tile features -> what the residual encoder sees of each slide.

    Args:
        model (`DreSlclModel`): whose tile encoder gave the features, and whose codebook they are assigned to.
        folder (`str` or `Path`): files of tile features, one per slide: `embeddings/` of `dre-slcl embed
            --tile-features`, or those of another tool, see `read_stored_tiles`.
        name (`str`, defaults to `"slides"`): how results call them.

    Returns:
        `EmbeddingTable`: rows of K D residuals and K counts; files that cannot be read are in `left_out`.

    Raises:
        ValueError: if no file can be read; it names the first and why.
    """
    folder = Path(folder)
    paths = sorted(path for path in folder.iterdir() if path.suffix.lower() in FEATURE_SUFFIXES)
    if not paths:
        raise ValueError(f"{folder}: holds no files of tile features ({', '.join(FEATURE_SUFFIXES)}).")
    ids, rows, left_out = [], [], []
    codebook = model.codebook.detach().float().cpu()
    for path in paths:
        try:
            stored = read_stored_tiles(path, model.config)
        except (ValueError, OSError) as error:
            logger.warning("%s is left out: %s", path.name, error)
            left_out.append({"id": path.stem, "reason": "unreadable", "message": str(error)})
            continue
        features = torch.from_numpy(stored.tile_features)
        # Features of other tools are as their encoder gave them; the codebook is one of unit vectors.
        features = features if stored.is_own else F.normalize(features, dim=-1)
        residuals, counts = residual_sums(features[None], codebook)
        ids.append(stored.slide_id)
        rows.append(torch.cat([residuals.flatten(), counts.flatten()]).numpy())
    return make_table(name, ids, [""] * len(ids), rows, left_out=left_out, where=str(folder))


def random_residual_encoder(model: DreSlclModel, seed: int) -> ResidualEncoder:
    """A residual encoder of the same shape without training, with the same codebook: what training must beat.

    Args:
        model (`DreSlclModel`): the trained model.
        seed (`int`): of its weights.
    """
    config = copy.deepcopy(model.config)
    config.text_config = None
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        encoder = DreSlclModel(config).residual_encoder
    encoder.codebook.copy_(model.codebook.detach().cpu())
    return encoder


def evaluate_fine_tuning(
    model: DreSlclModel,
    table: EmbeddingTable,
    labels: TaskLabels,
    folds: Sequence[Fold],
    *,
    seeds: Sequence[int] = (0, 1, 2),
    num_bootstrap: int = 1000,
    device: str = "cpu",
) -> TaskResult:
    """Evaluates fine-tuning beside the same from random weights, beside shuffled labels, and beside chance.

    Args:
        model (`DreSlclModel`): where training starts.
        table (`EmbeddingTable`): the n items of `residual_table`, whose cases are known.
        labels (`TaskLabels`): their classes or labels.
        folds (sequence of `Fold`): as for `run_method`.
        seeds (sequence of `int`): of training.
        num_bootstrap (`int`, defaults to 1000): samples of whole cases for intervals.
        device (`str`, defaults to `"cpu"`): where it is trained.

    Raises:
        ValueError: if the task is neither of classes nor of labels, or rows are of another model.
    """
    options = {"folds": folds, "seeds": seeds, "num_bootstrap": num_bootstrap}
    method = FineTuning(model.residual_encoder, len(labels.classes), labels.kind, device=device)
    scratch = FineTuning(random_residual_encoder(model, seeds[0]), len(labels.classes), labels.kind, device=device)
    dealt = shuffle_labels(labels, table.case_ids, seeds[0])
    rows = [
        run_method(method, table, labels, **options),
        run_method(scratch, table, labels, encoder="random weights", is_null=True, **options),
        run_method(method, table, dealt, encoder=SHUFFLED, is_null=True, **options),
        chance_row(labels, folds),
    ]
    held_out = np.unique(np.concatenate([fold.test for fold in folds]))
    return TaskResult(
        task=f"{labels.task}, fine-tuning",
        kind=labels.kind,
        rows=rows,
        main_metric=MAIN_METRIC[labels.kind],
        classes=labels.classes,
        num_items=len(held_out),
        num_cases=len({table.case_ids[row] for row in held_out}),
        protocol={"seeds": list(seeds), "num_bootstrap": num_bootstrap, "left_out": table.left_out},
    )
