# SPDX-License-Identifier: Apache-2.0
"""Fills the memory bank with a pass of the tile encoder, and fits the codebook on what it holds.

Letters: S slides, m features sampled of each, D feature width, K codewords.
"""

import logging

import numpy as np
import torch
from accelerate import Accelerator
from torch.utils.data import Dataset
from tqdm.auto import tqdm

from modeling_dre_slcl import DreSlclImageProcessor, DreSlclModel

from .codebook import fit_codebook
from .run_data import RunData
from .sampler import generator
from .tile_loader import load_in_order
from .tile_source import TileSource

logger = logging.getLogger(__name__)


class _TileChunks(Dataset):
    """Chunks of tiles of one slide each, so that a feature does not depend on which process encodes it."""

    def __init__(self, source: TileSource, chunks: list[tuple[int, np.ndarray]]) -> None:
        self.source, self.chunks = source, chunks

    def __len__(self) -> int:
        return len(self.chunks)

    def __getitem__(self, index: int) -> tuple[int, np.ndarray, torch.Tensor]:
        place, tiles = self.chunks[index]
        return place, tiles, torch.from_numpy(self.source.read(place, tiles))


class BankFiller:
    """Fills the bank of one process.

    Args:
        data (`RunData`): the slides, and which of them this process owns.
        image_processor (`DreSlclImageProcessor`): prepares tiles.
        accelerator (`Accelerator`): the run's.
        batch_size (`int`): tiles encoded at once.
        num_workers (`int`): processes that read tiles.
        seed (`int`): the run's seed.
    """

    def __init__(
        self,
        data: RunData,
        image_processor: DreSlclImageProcessor,
        accelerator: Accelerator,
        *,
        batch_size: int,
        num_workers: int,
        seed: int,
    ) -> None:
        self.data, self.source = data, data.source
        self.image_processor, self.accelerator = image_processor, accelerator
        self.batch_size, self.num_workers, self.seed = batch_size, num_workers, seed

    @torch.no_grad()
    def fill(self, model: DreSlclModel, step: int, tiles_per_slide: int | None) -> None:
        """Encodes tiles of every owned slide into the bank.

        Args:
            model (`DreSlclModel`): unwrapped; its bank is allocated.
            step (`int`): the step that the features are marked with.
            tiles_per_slide (`int`, *optional*): a random sample of so many tiles of each slide; by default all.
        """
        training, _ = model.training, model.eval()
        chunks = _TileChunks(self.source, self._chunks(tiles_per_slide))
        loader = load_in_order(chunks, range(len(chunks)), num_workers=self.num_workers, seed=self.seed)
        hidden = not self.accelerator.is_main_process
        for slide, tiles, pixels in tqdm(
            loader, total=len(chunks), desc="filling the memory bank", unit="batch", disable=hidden
        ):
            values = self.image_processor.tiles_to_pixel_values(pixels, self.accelerator.device)
            with self.accelerator.autocast():
                features = model.get_tile_features(values)
            where = self.data.bank_places([slide])
            model.memory_bank.write(where, torch.as_tensor(tiles)[None], features[None].float(), model.codebook, step)
        model.train(training)

    def refit(self, model: DreSlclModel, step: int, tiles_per_slide: int | None, sample_size: int) -> None:
        """Fills the bank again and fits the codebook again, to where each codeword's tiles are now. Collective.

        K-means starts from the fresh means of the tiles that each codeword held, so codewords keep their meaning for
        the head that was trained on them. Arguments as in `fill` and `fit`.
        """
        held = model.memory_bank.codeword.clone()
        self.fill(model, step, tiles_per_slide)
        self.fit(model, sample_size, held=held)

    @torch.no_grad()
    def fit(self, model: DreSlclModel, sample_size: int, held: torch.Tensor | None = None) -> None:
        """Fits the codebook on a sample of the bank's features, the same on every process. Collective.

        Args:
            model (`DreSlclModel`): unwrapped, with a filled bank.
            sample_size (`int`): features to sample over all slides.
            held (`torch.Tensor` of shape `(tiles of the bank,)`, *optional*): codeword of each tile before; K-means
                then starts from their means, and otherwise from k-means++.
        """
        codeword = model.memory_bank.codeword if held is None else held
        features, codewords = self._sample(model, codeword, max(1, sample_size // len(self.data.slides)))
        centers = torch.zeros_like(model.codebook)
        if self.accelerator.is_main_process:
            start = None if held is None else _codeword_means(features, codewords, model.codebook.cpu().numpy())
            fitted = fit_codebook(features, len(model.codebook), self.seed, start)
            centers = torch.from_numpy(fitted).to(model.codebook)
        model.codebook.copy_(self.accelerator.reduce(centers, "sum"))
        model.memory_bank.rebuild_sums(model.codebook)
        logger.info("Codebook of %d codewords fitted on %d tile features.", len(model.codebook), len(features))

    def _chunks(self, tiles_per_slide: int | None) -> list[tuple[int, np.ndarray]]:
        chunks = []
        for slide in self.data.owned:
            row = self.source.slides[slide]
            tiles = np.arange(row.num_tiles)
            if tiles_per_slide is not None and tiles_per_slide < row.num_tiles:
                drawn = generator(self.seed, "first pass", row.slide_id).permutation(row.num_tiles)
                tiles = np.sort(drawn[:tiles_per_slide])
            pieces = range(0, len(tiles), self.batch_size)
            chunks.extend((slide, tiles[start : start + self.batch_size]) for start in pieces)
        return chunks

    def _sample(self, model: DreSlclModel, codeword: torch.Tensor, per_slide: int) -> tuple[np.ndarray, np.ndarray]:
        """Up to m stored features of every slide `(n, D)`, float32, in slide order, and their codewords `(n,)`.

        Tiles of which `codeword` knows nothing (-1) are left out.
        """
        bank, device = model.memory_bank, self.accelerator.device
        # Codeword 0 marks a missing feature, so stored codewords are shifted by one.
        table = torch.zeros(len(self.data.slides), per_slide, model.config.hidden_size + 1)
        row_of = {slide: row for row, slide in enumerate(self.data.slides)}
        starts = bank.slide_start.tolist()
        for place, slide in enumerate(self.data.owned):
            rows = torch.arange(starts[place], starts[place + 1])
            rows = rows[(codeword[rows.to(codeword.device)] >= 0).cpu()]
            drawn = generator(self.seed, "codebook", self.source.slides[slide].slide_id).permutation(len(rows))
            rows = rows[torch.from_numpy(drawn[:per_slide])].to(bank.features.device)
            target = table[row_of[slide], : len(rows)]
            target[:, :-1] = bank.features[rows].float().cpu()
            target[:, -1] = codeword[rows].float().cpu() + 1
        table = self.accelerator.reduce(table.to(device), "sum").cpu().flatten(0, 1)
        table = table[table[:, -1] > 0].numpy()
        return table[:, :-1], table[:, -1].astype(np.int64) - 1


def _codeword_means(features: np.ndarray, codewords: np.ndarray, codebook: np.ndarray) -> np.ndarray:
    """Mean feature of each codeword `(K, D)`; one that holds nothing keeps its place in the codebook."""
    means = codebook.copy()
    for codeword in np.unique(codewords):
        means[codeword] = features[codewords == codeword].mean(axis=0)
    return means
