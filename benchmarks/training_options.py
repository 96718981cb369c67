# SPDX-License-Identifier: Apache-2.0
"""What options of training cost: seconds of a step by what the tile encoder trains, and of the loss by its negatives.

One process, one thread, a ViT-S/16 on tiles of 128 px (256 px with `--full`). Each figure is the median of several
repetitions, interleaved, so that the load of the machine touches all alike. Ends in one line of JSON; ratios are to
the default within the same run.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from transformers import ViTConfig

from dre_slcl.training.config import TrainConfig
from dre_slcl.training.optimizer import build_optimizer, choose_trained
from modeling_dre_slcl import DreSlclConfig, DreSlclModel
from modeling_dre_slcl.contrastive_loss import slide_level_contrastive_loss

SIZES = {"hidden_size": 384, "num_hidden_layers": 12, "num_attention_heads": 6, "intermediate_size": 1536}
TRAINED = {
    "full": {},
    "layer_decay": {"layer_decay": 0.75},
    "lora": {"lora": {"r": 8, "lora_alpha": 16}},
    "frozen": {"train_tile_encoder": False},
}


def seconds_of(functions: dict[str, Callable[[], None]], repetitions: int) -> dict[str, float]:
    """Median seconds of each function, called in turns after one call that is not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for repetition in range(repetitions + 1):
        for name, function in functions.items():
            started = time.perf_counter()
            function()
            if repetition:
                seconds[name].append(time.perf_counter() - started)
    return {name: statistics.median(values) for name, values in seconds.items()}


def encoder_step(image_size: int, options: dict) -> tuple[Callable[[], None], float]:
    """A step of four tiles, and the share of the tile encoder's parameters that it trains."""
    torch.manual_seed(0)
    sizes = {"projection_size": 64, "report_hidden_size": 64, "tile_size_px": image_size}
    model = DreSlclModel(DreSlclConfig(encoder_config=ViTConfig(**SIZES, image_size=image_size), **sizes)).train()
    needed = {"dataset": "d", "output_dir": "o", "text_model": "t", "tile_encoder_config": {}}
    config = TrainConfig(**needed, **options)
    choose_trained(model, config)
    optimizer = build_optimizer(model, config)
    tiles, reports = torch.randn(2, 2, 3, image_size, image_size), torch.randn(2, 64)

    def step() -> None:
        model(pixel_values=tiles, report_embeds=reports).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    parameters = list(model.tile_encoder.parameters())
    return step, sum(p.numel() for p in parameters if p.requires_grad) / sum(p.numel() for p in parameters)


def loss_calls(num_reports: int, width: int) -> dict[str, Callable[[], None]]:
    """The loss over a batch of 16 slides, with gradient, by kind and negatives."""
    slides, reports = F.normalize(torch.randn(2, 16, width), dim=-1)
    others = F.normalize(torch.randn(num_reports, width), dim=-1)
    extra = {"negative_projection": others, "negative_group_ids": torch.arange(num_reports) + 16}

    def call(bias: torch.Tensor | None, negatives: dict) -> Callable[[], None]:
        def run() -> None:
            rows = slides.clone().requires_grad_()
            groups = torch.arange(16)
            scale = torch.tensor(10.0)
            slide_level_contrastive_loss(rows, reports, scale, groups, logit_bias=bias, **negatives).backward()

        return run

    bias = torch.tensor(-10.0)
    return {
        "infonce_batch": call(None, {}),
        "infonce_all": call(None, extra),
        "siglip_batch": call(bias, {}),
        "siglip_all": call(bias, extra),
    }


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--full", action="store_true", help="tiles of 256 px, 20,000 reports, more repetitions")
    full = parser.parse_args().full
    torch.set_num_threads(1)
    image_size, num_reports, repetitions = (256, 20_000, 10) if full else (128, 5_000, 4)
    steps = {name: encoder_step(image_size, options) for name, options in TRAINED.items()}
    step_seconds = seconds_of({name: step for name, (step, _) in steps.items()}, repetitions)
    loss_seconds = seconds_of(loss_calls(num_reports, 4096), repetitions)
    result = {f"step_seconds_{name}": round(value, 4) for name, value in step_seconds.items()}
    result |= {f"step_ratio_{name}": round(value / step_seconds["full"], 3) for name, value in step_seconds.items()}
    result |= {f"trained_share_{name}": round(share, 5) for name, (_, share) in steps.items()}
    result |= {f"loss_seconds_{name}": round(value, 5) for name, value in loss_seconds.items()}
    result |= {
        "all_negatives_share_of_step": round(
            (loss_seconds["infonce_all"] - loss_seconds["infonce_batch"]) / step_seconds["full"], 3
        ),
        "num_reports": num_reports,
        "image_size_px": image_size,
        "targets": {"trained_share_lora": "<= 0.02", "step_ratio_lora": "<= 1", "all_negatives_share_of_step": "<= 1"},
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
