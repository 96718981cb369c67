# SPDX-License-Identifier: Apache-2.0
"""Fills the memory bank with a pass of the tile encoder, and fits the codebook on what it holds.

Letters: S slides, m features sampled of each, D feature width, K codewords.
"""

import logging
import os
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from torch.utils.data import Dataset
from tqdm.auto import tqdm

from modeling_dre_slcl import DreSlclImageProcessor, DreSlclModel, MemoryBank

from .codebook import fit_codebook
from .config import TrainConfig
from .run_data import RunData
from .sampler import generator
from .tile_loader import load_in_order
from .tile_source import TileSource

logger = logging.getLogger(__name__)


def bank_folder(config: TrainConfig) -> Path | None:
    """Returns the folder that the bank is mapped from, `None` where it is kept in memory."""
    return Path(config.bank_dir or Path(config.output_dir) / "bank") if config.bank_device == "disk" else None


def allocate_bank(bank: MemoryBank, num_tiles: list[int], config: TrainConfig, accelerator: Accelerator) -> None:
    """Makes room for the slides of this process where the settings say.

    Args:
        bank (`MemoryBank`): the bank.
        num_tiles (`list` of `int`): tiles of each slide.
        config (`TrainConfig`): the settings.
        accelerator (`Accelerator`): the run's.

    Raises:
        ValueError: if the bank does not fit there.
    """
    bank.allocate(
        num_tiles,
        dtype=getattr(torch, config.bank_dtype),
        device=accelerator.device if config.bank_device == "model" else "cpu",
        folder=bank_folder(config),
        num_sharing=int(os.environ.get("LOCAL_WORLD_SIZE", "1")),
    )


class _TileChunks(Dataset):
    """Chunks of tiles of one slide each, so that a feature does not depend on which process encodes it.

    Which tiles a chunk holds is computed when it is asked for: nothing here grows with the number of tiles.
    """

    def __init__(
        self, source: TileSource, slides: list[int], *, chunk_tiles: int, tiles_per_slide: int | None, seed: int
    ) -> None:
        self.source, self.slides, self.seed = source, slides, seed
        self.chunk_tiles, self.tiles_per_slide = chunk_tiles, tiles_per_slide
        numbers = [self._num_wanted(slide) for slide in slides]
        self._first_chunk = np.cumsum([0, *(-(-number // chunk_tiles) for number in numbers)])

    def __len__(self) -> int:
        return int(self._first_chunk[-1])

    def __getitem__(self, index: int) -> tuple[int, np.ndarray, torch.Tensor]:
        slide, tiles = self.chunk(index)
        return slide, tiles, torch.from_numpy(self.source.read(slide, tiles))

    def chunk(self, index: int) -> tuple[int, np.ndarray]:
        """The slide of a chunk and its tiles `(n,)`."""
        place = int(np.searchsorted(self._first_chunk, index, side="right")) - 1
        slide = self.slides[place]
        start = (index - int(self._first_chunk[place])) * self.chunk_tiles
        stop = min(start + self.chunk_tiles, self._num_wanted(slide))
        row = self.source.slides[slide]
        if self._num_wanted(slide) == row.num_tiles:
            return slide, np.arange(start, stop)
        drawn = generator(self.seed, "first pass", row.slide_id).permutation(row.num_tiles)
        return slide, np.sort(drawn[: self.tiles_per_slide])[start:stop]

    def _num_wanted(self, slide: int) -> int:
        num_tiles = self.source.slides[slide].num_tiles
        return num_tiles if self.tiles_per_slide is None else min(num_tiles, self.tiles_per_slide)


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
        chunks = _TileChunks(
            self.source,
            self.data.owned,
            chunk_tiles=self.batch_size,
            tiles_per_slide=tiles_per_slide,
            seed=self.seed,
        )
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
        held = self._draw(model, sample_size)
        self.fill(model, step, tiles_per_slide)
        self.fit(model, sample_size, held=held)

    @torch.no_grad()
    def fit(
        self, model: DreSlclModel, sample_size: int, held: list[tuple[torch.Tensor, torch.Tensor]] | None = None
    ) -> None:
        """Fits the codebook on a sample of the bank's features, the same on every process. Collective.

        Args:
            model (`DreSlclModel`): unwrapped, with a filled bank.
            sample_size (`int`): features to sample over all slides.
            held (`list`, *optional*): of each owned slide, rows of the bank and their codewords before; K-means then
                starts from their means, and otherwise from k-means++ on a sample drawn now.
        """
        drawn = self._draw(model, sample_size) if held is None else held
        features, codewords = self._sample(model, drawn, self._per_slide(sample_size))
        centers = torch.zeros_like(model.codebook)
        if self.accelerator.is_main_process:
            start = None if held is None else _codeword_means(features, codewords, model.codebook.cpu().numpy())
            fitted = fit_codebook(features, len(model.codebook), self.seed, start)
            centers = torch.from_numpy(fitted).to(model.codebook)
        model.codebook.copy_(self.accelerator.reduce(centers, "sum"))
        model.memory_bank.rebuild_sums(model.codebook)
        logger.info("Codebook of %d codewords fitted on %d tile features.", len(model.codebook), len(features))

    def _per_slide(self, sample_size: int) -> int:
        return max(1, sample_size // len(self.data.slides))

    def _draw(self, model: DreSlclModel, sample_size: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Draws up to m rows `(m,)` of every owned slide that hold a feature, with their codewords `(m,)`."""
        bank, drawn = model.memory_bank, []
        starts = bank.slide_start.tolist()
        for place, slide in enumerate(self.data.owned):
            stored = (bank.codeword[starts[place] : starts[place + 1]] >= 0).nonzero().flatten().cpu()
            order = generator(self.seed, "codebook", self.source.slides[slide].slide_id).permutation(len(stored))
            rows = starts[place] + stored[torch.from_numpy(order[: self._per_slide(sample_size)])]
            rows = rows.to(bank.features.device)
            drawn.append((rows, bank.codeword[rows].long().cpu()))
        return drawn

    def _sample(
        self, model: DreSlclModel, drawn: list[tuple[torch.Tensor, torch.Tensor]], per_slide: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """Stored features of drawn rows `(n, D)`, float32, of all processes in slide order, and codewords `(n,)`."""
        # Codeword 0 marks a missing feature, so stored codewords are shifted by one.
        table = torch.zeros(len(self.data.slides), per_slide, model.config.hidden_size + 1)
        row_of = {slide: row for row, slide in enumerate(self.data.slides)}
        for slide, (rows, codewords) in zip(self.data.owned, drawn, strict=True):
            target = table[row_of[slide], : len(rows)]
            target[:, :-1] = model.memory_bank.stored_features(rows).cpu()
            target[:, -1] = codewords.float() + 1
        table = self.accelerator.reduce(table.to(self.accelerator.device), "sum").cpu().flatten(0, 1)
        table = table[table[:, -1] > 0].numpy()
        return table[:, :-1], table[:, -1].astype(np.int64) - 1


def _codeword_means(features: np.ndarray, codewords: np.ndarray, codebook: np.ndarray) -> np.ndarray:
    """Mean feature of each codeword `(K, D)`; one that holds nothing keeps its place in the codebook."""
    means = codebook.copy()
    for codeword in np.unique(codewords):
        means[codeword] = features[codewords == codeword].mean(axis=0)
    return means
