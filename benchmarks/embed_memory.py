# SPDX-License-Identifier: Apache-2.0
"""Peak memory of embedding a slide: it should not grow with the number of tiles.

    python benchmarks/embed_memory.py                          # synthetic slides of about 1,000 and 10,000 tiles
    python benchmarks/embed_memory.py --slide slide.svs --tile-mpp 0.5 --tile-size-px 256
    python benchmarks/embed_memory.py --slide slide.svs --model run/model
    python benchmarks/embed_memory.py --full                   # one of about 100,000 tiles as well

One JSON line per slide: `slide`, `num_tiles`, `peak_rss_mib`, `baseline_rss_mib` (after imports, with the model
loaded, before the slide is opened) and `seconds`. Each slide is embedded in a process of its own, because memory that
was once taken is rarely given back. What does grow is small: OpenSlide's caches until they are full (32 MiB for each
thread), and the overview in which tissue is looked for, with the slide's area. The last line of all
says `growth_mib`, by which the peak of the largest slide is above that of the smallest; target 64.
"""

import argparse
import json
import platform
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

_SYNTHETIC_TILES_PER_SIDE = (32, 100)
_TILES_PER_SIDE_OF_FULL = 316
_SYNTHETIC_TILE_PX = 64
_SYNTHETIC_MPP = 1.0
# The smallest encoder that works through real tiles: what is measured is everything around it.
_TILE_ENCODER = {
    "model_type": "timm_wrapper",
    "architecture": "resnet18",
    "model_args": {"layers": [1, 1, 1, 1], "channels": [32, 64, 96, 128], "norm_layer": "groupnorm"},
}


def main() -> int:
    """Runs the benchmark; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--slide", type=Path, help="slide to embed (default: two synthetic ones)")
    parser.add_argument("--model", help="folder or Hub repository of a model (default: a small random one)")
    parser.add_argument("--tile-mpp", type=float, default=0.5, help="of the random model, um/px (default: 0.5)")
    parser.add_argument("--tile-size-px", type=int, default=256, help="of the random model (default: 256)")
    parser.add_argument("--batch-size", type=int, default=32, help="tiles encoded at once (default: 32)")
    parser.add_argument("--num-threads", type=int, default=2, help="threads that read tiles (default: 2)")
    parser.add_argument("--full", action="store_true", help="also a slide of about 100,000 tiles, some minutes")
    arguments = parser.parse_args()
    if arguments.slide is not None:
        print(json.dumps(measure(arguments)))
        return 0
    with tempfile.TemporaryDirectory() as folder:
        figures = []
        for side in (*_SYNTHETIC_TILES_PER_SIDE, *([_TILES_PER_SIDE_OF_FULL] if arguments.full else [])):
            slide = write_slide(Path(folder) / f"synthetic-{side}x{side}.svs", side)
            command = [sys.executable, __file__, "--slide", slide, "--tile-mpp", _SYNTHETIC_MPP]
            command += ["--tile-size-px", _SYNTHETIC_TILE_PX, "--batch-size", arguments.batch_size]
            command += ["--num-threads", arguments.num_threads]
            command += ["--model", arguments.model] if arguments.model else []
            done = subprocess.run([str(part) for part in command], check=True, capture_output=True, text=True)
            figures.append(json.loads(done.stdout.splitlines()[-1]))
            print(json.dumps(figures[-1]), flush=True)
    growth = figures[-1]["peak_rss_mib"] - figures[0]["peak_rss_mib"]
    print(
        json.dumps(
            {"benchmark": "embed_memory", "targets": {"growth_mib": 64}, "growth_mib": growth, "slides": figures}
        )
    )
    return 0


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Embeds one slide in this process and returns what it took."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    embed = load_pipeline(arguments)
    baseline = current_rss_mib()
    started = time.monotonic()
    result = embed(arguments.slide, batch_size=arguments.batch_size, num_threads=arguments.num_threads)
    seconds = time.monotonic() - started
    return {
        "slide": arguments.slide.name,
        "num_tiles": result["num_tiles"],
        "peak_rss_mib": round(peak_rss_mib()),
        "baseline_rss_mib": round(baseline),
        "seconds": round(seconds, 1),
    }


def load_pipeline(arguments: argparse.Namespace) -> Any:
    """Returns the slide pipeline of the given model, or of a small random one; the model has encoded once."""
    import torch
    from transformers import AutoConfig, AutoImageProcessor, AutoModel

    from modeling_dre_slcl import DreSlclConfig, DreSlclImageProcessor, DreSlclModel, SlideFeatureExtractionPipeline

    if arguments.model is not None:
        model = AutoModel.from_pretrained(arguments.model, trust_remote_code=False)
        image_processor = AutoImageProcessor.from_pretrained(arguments.model, trust_remote_code=False)
    else:
        torch.manual_seed(0)
        size = arguments.tile_size_px
        encoder = dict(_TILE_ENCODER)
        config = DreSlclConfig(
            encoder_config=AutoConfig.for_model(encoder.pop("model_type"), **encoder),
            tile_pooling="pooler",
            hidden_size=128,
            num_attention_heads=2,
            intermediate_size=512,
            tile_size_px=size,
            tile_mpp=arguments.tile_mpp,
        )
        model = DreSlclModel(config)
        image_processor = DreSlclImageProcessor(size={"height": size, "width": size}, do_resize=False)
    embed = SlideFeatureExtractionPipeline(model=model.eval(), image_processor=image_processor)
    # What the libraries take at their first use, whatever the slide, belongs to the baseline.
    tiles = np.zeros((1, model.config.tile_size_px, model.config.tile_size_px, 3), dtype=np.uint8)
    with torch.inference_mode():
        model.get_tile_features(image_processor.tiles_to_pixel_values(tiles, model.device).to(model.dtype))
    return embed


def write_slide(path: Path, tiles_per_side: int) -> Path:
    """Writes a pyramidal slide that is all tissue, of `tiles_per_side` x `tiles_per_side` tiles."""
    from dre_slcl.training.demo.slide_writer import write_slide as write_pyramid

    side = tiles_per_side * _SYNTHETIC_TILE_PX
    if tiles_per_side > max(_SYNTHETIC_TILES_PER_SIDE):  # too large to paint
        from large_slide import write_large_slide

        return write_large_slide(path, side, side, mpp=_SYNTHETIC_MPP, tissue_share=1.0, store_once=True)
    pixels = np.random.default_rng(0).integers(-30, 30, (side, side, 3), dtype=np.int16)
    pixels += np.array([190, 110, 160], dtype=np.int16)
    write_pyramid(path, pixels.astype(np.uint8), mpp=_SYNTHETIC_MPP)
    return path


def current_rss_mib() -> float:
    """Memory that this process holds now; where the system does not tell, the most that it has held."""
    return _status_mib("VmRSS") or peak_rss_mib()


def peak_rss_mib() -> float:
    """The most memory that this process has held."""
    # `getrusage` also counts the process that this one was forked from; Linux's own peak does not.
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return _status_mib("VmHWM") or peak / (1 << 20 if platform.system() == "Darwin" else 1 << 10)


def _status_mib(name: str) -> float | None:
    status = Path("/proc/self/status")
    if not status.is_file():
        return None
    lines = dict(line.split(":", 1) for line in status.read_text().splitlines() if ":" in line)
    return int(lines[name].split()[0]) / 1024


if __name__ == "__main__":
    sys.exit(main())
