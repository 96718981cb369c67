# SPDX-License-Identifier: Apache-2.0
"""How near each `bank_mode`'s gradient of the tile encoder is to the gradient through all tiles of the slides.

    python benchmarks/gradient_fidelity.py            # two seeds, some four minutes on two quiet cores
    python benchmarks/gradient_fidelity.py --full     # more seeds, batches and draws, and `corrected` with a refresh

Slides are bags of about 215 painted tiles of 32 px; a slide's mixture of eight kinds of tissue goes with its report. A
small ViT encodes them. For each seed, mode and share of sampled tiles, a model is trained in that mode from the same
start (learning rate 1e-4), from a bank filled at its beginning, so that the bank is as stale as that mode leaves it.
Then, for some batches of slides and several draws of tiles for each, the gradient of all the encoder's parameters is
compared with the exact one:

- `<mode>_<share>`: mean over seeds of the cosine, one draw; `_sd`: spread over seeds; `_lowest`: the lowest seed.
- `<mode>_mean_of_draws_<share>`: the same for the mean gradient of all draws of a batch: what is left is bias.
- `<mode>_residual_error_<share>`: relative error of the slides' residuals.
- `<mode>_all_tiles_<share>`: the cosine if all tiles passed the gradient on, with the residuals as the mode has them
  (one draw per batch): the error of the estimate alone. That of sampling alone is the figure of `two_pass`.
- `feature_movement`: mean L2 distance of stored features (of norm 1) from fresh ones, in mode `full`, 7%.

Targets: `corrected_7` at least 0.85, `corrected_15` at least 0.92, `exact_*` 1 to 1e-6.

Ends in one line of JSON.
"""

import argparse
import json
import logging
import sys
import time
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from transformers import ViTConfig

from dre_slcl.training.bank_modes import BANK_MODES, BankMode, PlannedTiles
from dre_slcl.training.codebook import fit_codebook
from dre_slcl.training.config import TrainConfig
from dre_slcl.training.gradient_check import GradientCheck, flat
from dre_slcl.training.optimizer import build_optimizer, set_learning_rates
from dre_slcl.training.sampler import PADDING, StepPlan, StepSampler, partition_slides
from dre_slcl.training.strata import Strata
from dre_slcl.training.whole_slides import WholeSlides
from modeling_dre_slcl import DreSlclConfig, DreSlclModel

_TILE_PX = 32
_KINDS = 8  # of tissue
_WIDTH, _CODEWORDS, _REPORT_WIDTH = 48, 16, 32
_SLIDES_PER_BATCH = 8
_SHARES = {"7": 16, "15": 32}  # per cent of about 215 tiles: tiles sampled
# Name in the figures: bank mode, and settings that differ from the defaults.
_VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "paper": ("paper", {}),
    "full": ("full", {}),
    "corrected": ("corrected", {}),
    "corrected_refresh": ("corrected", {"refresh_per_slide": 64}),
    "two_pass": ("two_pass", {}),
    "exact": ("exact", {}),
}
_ONLY_IN_FULL = ("corrected_refresh",)
_LOOK_AT_ALL = ("two_pass", "exact")  # no bank, so no training of their own: measured on the model of `corrected`


def paint_tiles(kinds: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """Paints one tile per kind of tissue `(n,)`: `np.ndarray` of shape `(n, 32, 32, 3)`, uint8.

    A kind is a colour and a grating; a tile varies in colour, phase, contrast and noise.
    """
    grid = np.arange(_TILE_PX)
    angle, wave = np.pi * kinds / _KINDS, 3 + 2 * (kinds % 4)
    angle = angle + random.normal(scale=0.15, size=len(kinds))
    along = np.cos(angle)[:, None, None] * grid[None, :, None] + np.sin(angle)[:, None, None] * grid[None, None, :]
    phase = random.uniform(0, 2 * np.pi, size=(len(kinds), 1, 1))
    contrast = random.uniform(15, 50, size=(len(kinds), 1, 1))
    pattern = contrast * np.sin(2 * np.pi * along / wave[:, None, None] + phase)
    color = np.random.default_rng(5).uniform(90, 200, size=(_KINDS, 3))[kinds]
    color = color + random.normal(scale=15, size=color.shape)
    noise = random.normal(scale=12, size=(len(kinds), _TILE_PX, _TILE_PX, 3))
    return np.clip(color[:, None, None] + pattern[..., None] + noise, 0, 255).astype(np.uint8)


@dataclass
class Bags:
    """Slides in memory, read as `StepDataset` reads slides.

    Args:
        num_slides (`int`): slides.
        seed (`int`): of everything painted.
        sampler (`StepSampler`, *optional*): whose plans are read.
    """

    num_slides: int
    seed: int
    sampler: StepSampler | None = None
    pixels: list[np.ndarray] = field(init=False)
    reports: torch.Tensor = field(init=False)

    def __post_init__(self) -> None:
        """Paints the slides; a report is a random projection of what its slide is made of."""
        random = np.random.default_rng(self.seed)
        mixtures = random.dirichlet(np.full(_KINDS, 0.5), size=self.num_slides)
        self.pixels = [
            paint_tiles(random.choice(_KINDS, size=int(random.integers(180, 251)), p=mixture), random)
            for mixture in mixtures
        ]
        reports = (mixtures - mixtures.mean(axis=0)) @ random.normal(size=(_KINDS, _REPORT_WIDTH))
        self.reports = torch.from_numpy(reports).float()

    def read(self, slide: int, tiles: np.ndarray, *key: int | str) -> np.ndarray:
        """Reads tiles, without augmentation."""
        return self.pixels[slide][tiles]


class PlainProcessor:
    """Pixels -> pixel values in -1 to 1, without resizing."""

    def tiles_to_pixel_values(self, tiles: torch.Tensor, device: torch.device) -> torch.Tensor:
        """Brings tiles `(..., H, W, 3)`, uint8, to `(..., 3, H, W)`, float32."""
        return (tiles.float() / 127.5 - 1).movedim(-1, -3)


class Run:
    """A model in training, in one mode, from the start that the seed gives.

    Args:
        bags (`Bags`): the slides.
        mode (`str`): the bank mode.
        tiles_per_slide (`int`): tiles sampled.
        changes (`dict`): settings that differ from the defaults.
        num_steps (`int`): training steps.
    """

    def __init__(self, bags: Bags, mode: str, tiles_per_slide: int, changes: dict[str, Any], num_steps: int) -> None:
        self.config = TrainConfig(
            dataset="-", output_dir="-", text_model="-", tile_encoder_config={}, bank_mode=mode, num_steps=num_steps,
            tiles_per_slide=tiles_per_slide, retrieved_per_slide=4 * tiles_per_slide, warmup_steps=10,
            slides_per_batch=_SLIDES_PER_BATCH, seed=bags.seed, **changes,
        )  # fmt: skip
        self.bags, self.accelerator = bags, Accelerator(cpu=True)
        self.num_tiles = [len(pixels) for pixels in bags.pixels]
        torch.manual_seed(bags.seed)
        encoder = ViTConfig(
            hidden_size=_WIDTH, num_hidden_layers=2, num_attention_heads=4, intermediate_size=2 * _WIDTH,
            image_size=_TILE_PX, patch_size=16,
        )  # fmt: skip
        config = DreSlclConfig(
            encoder_config=encoder, hidden_size=_WIDTH, num_codewords=_CODEWORDS, num_hidden_layers=2,
            num_attention_heads=4, intermediate_size=2 * _WIDTH, projection_size=_REPORT_WIDTH,
            report_hidden_size=_REPORT_WIDTH, tile_size_px=_TILE_PX, tile_pooling="mean",
        )  # fmt: skip
        self.model = DreSlclModel(config)
        self.image_processor = PlainProcessor()
        self.strata = Strata(range(bags.num_slides), self.num_tiles)
        self.bags.sampler = self.sampler = self._sampler(BANK_MODES[mode])
        self._fill()

    def _sampler(self, mode: type[BankMode]) -> StepSampler:
        names = [f"slide-{slide}" for slide in range(self.bags.num_slides)]
        shards = partition_slides(names, _SLIDES_PER_BATCH, self.bags.seed)
        return StepSampler(
            shards,
            range(_SLIDES_PER_BATCH),
            names,
            self.num_tiles,
            tiles_per_slide=self.config.tiles_per_slide,
            retrieved_per_slide=self.config.retrieved_per_slide if mode.retrieves else 0,
            refreshed_per_slide=self.config.refresh_per_slide,
            strata=self.strata if mode.stratified else None,
            seed=self.bags.seed,
        )

    def mode(self, name: str) -> BankMode:
        """A bank mode over these slides."""
        whole = WholeSlides(self.bags, self.image_processor, self.accelerator, batch_size=128, num_workers=0)
        return BANK_MODES[name](self.config, whole)

    @torch.no_grad()
    def _fill(self) -> None:
        model = self.model.eval()
        features = [self._encode(slide, np.arange(count)) for slide, count in enumerate(self.num_tiles)]
        codebook = fit_codebook(torch.cat(features).numpy(), _CODEWORDS, self.bags.seed)
        model.codebook.copy_(torch.from_numpy(codebook))
        model.memory_bank.allocate(self.num_tiles)
        for slide, encoded in enumerate(features):
            self._write(slide, np.arange(len(encoded)), encoded, 0)
        self.strata.assign(model.memory_bank.codeword)

    def _encode(self, slide: int, tiles: np.ndarray) -> torch.Tensor:
        pixels = torch.from_numpy(self.bags.read(slide, tiles))
        return self.model.get_tile_features(self.image_processor.tiles_to_pixel_values(pixels, torch.device("cpu")))

    def _write(self, slide: int, tiles: np.ndarray, features: torch.Tensor, step: int) -> None:
        tiles, model = torch.from_numpy(tiles), self.model
        model.memory_bank.write(torch.tensor([slide]), tiles[None], features[None], model.codebook, step)

    @torch.no_grad()
    def refresh(self, plan: StepPlan) -> None:
        """Encodes the tiles whose refresh is due into the bank, as the trainer does."""
        for slide, due in zip(plan.slides.tolist(), plan.refreshed, strict=True):
            due = due[due >= 0]
            if len(due):
                self._write(slide, due, self._encode(slide, due), plan.step + 1)

    def inputs(self, plan: StepPlan) -> tuple[PlannedTiles, torch.Tensor, dict[str, torch.Tensor]]:
        """A plan -> the planned tiles, their pixel values, their slides' reports. No slide here is padded."""
        pixels = np.stack([self.bags.read(*pair) for pair in zip(plan.slides.tolist(), plan.sampled, strict=True)])
        values = self.image_processor.tiles_to_pixel_values(torch.from_numpy(pixels), torch.device("cpu"))
        texts = {"report_embeds": self.bags.reports[plan.slides]}
        return PlannedTiles(plan, torch.from_numpy(plan.slides)), values, texts

    def train(self) -> None:
        """Trains."""
        model, mode = self.model.train(), self.mode(self.config.bank_mode)
        optimizer = build_optimizer(model, self.config)
        for step in range(self.config.num_steps):
            # The learning rate stays at its peak: a cosine to zero would leave the bank too fresh.
            set_learning_rates(optimizer, min(step, self.config.warmup_steps), self.config)
            plan = self.sampler.plan(step)
            self.refresh(plan)
            tiles, values, texts = self.inputs(plan)
            outputs = model(values, **mode.arguments(model, tiles), **texts)
            outputs.loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), self.config.max_gradient_norm)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            model.memory_bank.write(tiles.slides, tiles.sampled, outputs.tile_features, model.codebook, step + 1)
        model.eval()

    def measure(self, name: str, num_batches: int, num_draws: int) -> dict[str, float]:
        """Compares a mode's gradients with exact ones, at the model and bank that training left."""
        bank = self.model.memory_bank.slide_state(range(self.bags.num_slides))
        self.bags.sampler = sampler = self._sampler(BANK_MODES[name])
        check = GradientCheck(self.mode(name), self.mode(name).whole_slides)
        places, one, mean, errors, whole = list(range(_SLIDES_PER_BATCH)), [], [], [], []
        for batch in range(num_batches):
            exact, found = None, []
            plan = sampler.plan(self.config.num_steps + batch)
            visit = plan.step // len(sampler.shards[0])
            for draw in range(num_draws):
                drawn = [sampler.tiles_at(slide, 1_000_000 * (batch + 1) + draw) for slide in plan.slides.tolist()]
                sampled, retrieved = (np.stack(part) for part in zip(*drawn, strict=True))
                due = [sampler.refreshed_at(slide, visit) for slide in plan.slides.tolist()]
                due = [np.where(np.isin(tiles, own), PADDING, tiles) for tiles, own in zip(due, sampled, strict=True)]
                redrawn = StepPlan(plan.step, plan.slides, sampled, retrieved, np.stack(due))
                self.refresh(redrawn)
                tiles, values, texts = self.inputs(redrawn)
                given = (self.model, tiles, values, check.features(self.model, values), texts, places)
                residuals, counts, gradient = check.mode_gradient(*given)
                if exact is None:
                    exact = flat(check.exact_gradient(*given, others=(residuals, counts)))
                    fresh = self._fresh_residuals(plan.slides)
                    everything = flat(self._gradient_of_all_tiles(check, redrawn, residuals, counts, texts))
                    whole.append(float(torch.cosine_similarity(everything, exact, dim=0)))
                errors.append(float((residuals - fresh).norm() / fresh.norm()))
                found.append(flat(gradient))
                one.append(float(torch.cosine_similarity(found[-1], exact, dim=0)))
                self.model.memory_bank.load_slide_state(range(self.bags.num_slides), bank)
            mean.append(float(torch.cosine_similarity(torch.stack(found).mean(dim=0), exact, dim=0)))
        figures = {"": one, "_mean_of_draws": mean, "_residual_error": errors, "_all_tiles": whole}
        return {figure: float(np.mean(values)) for figure, values in figures.items()}

    def _gradient_of_all_tiles(
        self,
        check: GradientCheck,
        plan: StepPlan,
        residuals: torch.Tensor,
        counts: torch.Tensor,
        texts: dict[str, torch.Tensor],
    ) -> list[torch.Tensor]:
        """Takes the loss's gradient at estimated residuals, and passes it on through all tiles of the slides."""
        residuals = residuals.clone().requires_grad_()
        loss = self.model.contrast(self.model.encode_residuals(residuals, counts), **texts).loss
        (upstream,) = torch.autograd.grad(loss, residuals)
        no_tiles = replace(plan, sampled=plan.sampled[:, :0])
        return check.whole_slides.gradient(self.model, no_tiles, range(len(plan.slides)), upstream)

    @torch.no_grad()
    def _fresh_residuals(self, slides: np.ndarray) -> torch.Tensor:
        features = [self._encode(slide, np.arange(self.num_tiles[slide]))[None] for slide in slides.tolist()]
        return torch.cat([self.model.get_slide_features(encoded).residuals for encoded in features])

    @torch.no_grad()
    def feature_movement(self) -> float:
        """Mean distance of stored features from fresh ones."""
        fresh = torch.cat([self._encode(slide, np.arange(count)) for slide, count in enumerate(self.num_tiles)])
        return float((fresh - self.model.memory_bank.features.float()).norm(dim=1).mean())


def main() -> int:
    """Runs the benchmark; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--full", action="store_true", help="5 seeds, 300 steps, 6 batches of 8 draws")
    parser.add_argument("--seeds", type=int, nargs="+", help="seeds (default: 0 1)")
    parser.add_argument("--modes", nargs="+", choices=_VARIANTS, help="default: all that are not for --full")
    parser.add_argument("--shares", nargs="+", choices=_SHARES, default=list(_SHARES), help="default: 7 15")
    parser.add_argument("--steps", type=int, help="training steps (default: 120)")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    seeds = arguments.seeds or list(range(5 if arguments.full else 2))
    num_steps = arguments.steps or (300 if arguments.full else 120)
    names = arguments.modes or [name for name in _VARIANTS if arguments.full or name not in _ONLY_IN_FULL]
    num_batches, num_draws = (6, 8) if arguments.full else (3, 4)
    started, rows, movement = time.monotonic(), {}, []
    for seed in seeds:
        bags = Bags(24, seed)
        for share in arguments.shares:
            run = None
            for name in names:
                mode, changes = _VARIANTS[name]
                if run is None or mode not in _LOOK_AT_ALL:
                    run = Run(bags, mode, _SHARES[share], changes, num_steps)
                    run.train()
                # The exact gradient equals itself, whatever is drawn.
                draws = (1, 1) if mode == "exact" else (num_batches, num_draws)
                for figure, value in run.measure(mode, *draws).items():
                    rows.setdefault(f"{name}{figure}_{share}", []).append(value)
                if (mode, share) == ("full", "7"):
                    movement.append(run.feature_movement())
                logging.info("seed %d, %s%%, %s: cosine %.3f", seed, share, name, rows[f"{name}_{share}"][-1])
    result = {
        name: round(float(np.mean(values)), 6 if name.startswith("exact") else 3) for name, values in rows.items()
    }
    for name, values in rows.items():
        if name.removesuffix("_7").removesuffix("_15") in _VARIANTS:
            result[f"{name}_sd"] = round(float(np.std(values)), 3)
            result[f"{name}_lowest"] = round(float(np.min(values)), 3)
    result["feature_movement"] = round(float(np.mean(movement)), 3) if movement else None
    result |= {"seeds": len(seeds), "steps": num_steps, "seconds": round(time.monotonic() - started)}
    result["targets"] = {"corrected_7": 0.85, "corrected_15": 0.92}
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
