# SPDX-License-Identifier: Apache-2.0
"""`dre-slcl explain`: what each tile of a slide does to a text, a class or a codeword map, drawn and as data.

```
<out>/
    <slide_id>.png       the slide with a colour per tile, and the scale
    <slide_id>.geojson   the same for QuPath: a tile object each, with score and codeword as measurements
    <slide_id>.parquet   slide_id, x, y, score, codeword
    <slide_id>.json      what was explained, the score of the slide, how it was computed
    <slide_id>.regions.parquet   with --regions: name, num_tiles, score and both vectors of each region
```
"""

import argparse
import logging
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import torch.nn.functional as F

from modeling_dre_slcl.atomic_files import atomic_file, write_json
from modeling_dre_slcl.attribution import Score, attribute_tiles, class_logit, text_similarity
from modeling_dre_slcl.regions import read_regions, tiles_in_region
from modeling_dre_slcl.slide_info import SlideInfo
from modeling_dre_slcl.slide_reader import SlideReader, slide_fingerprint
from modeling_dre_slcl.tile_grid import tile_size_at_level0

from .heatmap_files import TileMap, draw_tile_map, write_tile_map_geojson, write_tile_map_table
from .mask_geojson import MASK_FRAMES, frame_origin
from .stored_features import StoredTiles, read_stored_tiles

logger = logging.getLogger(__name__)
_OVERVIEW_PX = 1600


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `dre-slcl explain`."""
    parser.description = (
        "Says what each tile of a slide does to a score, by leaving it out, and draws it. Exit status: 0 done, 1 not."
    )
    parser.add_argument("--model", required=True, help="folder or Hub repository of a DRE-SLCL model")
    parser.add_argument("--slide", required=True, type=Path, help="the slide")
    parser.add_argument("--out", required=True, type=Path, help="folder for the pictures and tables")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--text", help="explain the slide's similarity with this text")
    what.add_argument("--class", dest="label", help="explain the logit of this class of a slide classifier")
    what.add_argument("--codewords", action="store_true", help="only show which codeword each tile belongs to")
    parser.add_argument(
        "--against", nargs="+", default=[], metavar="TEXT", help="explain what sets --text apart from these texts"
    )
    parser.add_argument(
        "--features", type=Path, help="the slide's file from `dre-slcl embed --tile-features`, or of another tool"
    )
    parser.add_argument(
        "--allow-mismatch", action="store_true", help="take features of another encoder, resolution or tile size"
    )
    parser.add_argument("--regions", type=Path, help="GeoJSON with areas, which are embedded and scored too")
    parser.add_argument(
        "--frame", choices=MASK_FRAMES, default="qupath", help="frame of GeoJSON coordinates (default: %(default)s)"
    )
    parser.add_argument(
        "--method",
        choices=("deletion", "gradient"),
        default="deletion",
        help="leave each tile out, or take the first-order term of that, much faster (default: %(default)s)",
    )
    parser.add_argument("--mpp", type=float, help="level-0 resolution in um/px, for a slide that does not state it")
    parser.add_argument(
        "--min-tissue-fraction", type=float, default=0.25, help="tiles with less are left out (default: %(default)s)"
    )
    parser.add_argument("--batch-size", type=int, default=32, help="tiles encoded at once (default: %(default)s)")
    parser.add_argument("--num-threads", type=int, default=2, help="threads that read tiles (default: %(default)s)")
    parser.add_argument("--device", default="cpu", help="for example cuda:0 (default: %(default)s)")


def run(arguments: argparse.Namespace) -> int:
    """Runs the command; returns its exit status."""
    try:
        explain_slide(arguments)
    except (ValueError, OSError) as error:
        logger.error("%s", error)
        return 1
    return 0


@dataclass(frozen=True)
class _Target:
    """What is explained: a score of slide embeddings, or none for a map of codewords; and its name."""

    name: str
    score: Score | None


def explain_slide(arguments: argparse.Namespace) -> TileMap:
    """Explains what the arguments name and writes the files.

    Returns:
        `TileMap`: what was written.

    Raises:
        ValueError: if the model has no text model, classifier or such a class, the slide is refused, or the features
            do not fit; nothing is written then.
    """
    model = _load_model(arguments)
    target = _make_target(model, arguments)
    with SlideReader(arguments.slide, mpp=arguments.mpp) as reader:
        info = reader.info
        overview, downsample = reader.read_overview(info.mpp * max(1, max(info.bounds[2:]) / _OVERVIEW_PX))
    stored = _get_tiles(model, info, arguments)
    features = torch.from_numpy(stored.tile_features).to(model.device)
    if not stored.is_own:
        features = F.normalize(features, dim=-1)
    started = time.monotonic()
    scores = None
    if target.score is not None:
        scores = attribute_tiles(model, features, target.score, method=arguments.method).numpy()
    seconds = time.monotonic() - started
    codewords = model.empty_state().add(features, model.codebook).cpu().numpy()
    tiles = TileMap(
        slide_id=info.slide_id,
        tile_xy=stored.tile_xy,
        tile_size_level0_px=stored.tile_size_level0_px or _tile_side(model, info),
        codewords=codewords,
        num_codewords=len(model.codebook),
        scores=scores,
        title=f"{info.slide_id}: {target.name}",
    )
    regions = _region_rows(model, features, tiles, target, info, arguments)
    _write(arguments, tiles, info, (overview, downsample), regions)
    facts = {"slide_id": info.slide_id, "model": arguments.model, "target": target.name, "num_tiles": len(codewords)}
    if target.score is not None:
        facts |= {
            "score": _score_of(model, features, target),
            "method": arguments.method,
            "seconds": round(seconds, 3),
        }
    write_json(arguments.out / f"{info.slide_id}.json", facts)
    logger.info("%d tiles explained in %.1f s: %s", len(codewords), seconds, arguments.out / f"{info.slide_id}.png")
    return tiles


def _load_model(arguments: argparse.Namespace) -> Any:
    """The model in evaluation mode; with --class a slide classifier whose classifier was trained."""
    from transformers import AutoModel, AutoModelForImageClassification

    from .pretrained import check_loaded, load_pretrained

    # The installed classes: code that a repository carries is not run here.
    loader = AutoModel if arguments.label is None else AutoModelForImageClassification
    try:
        model, report = load_pretrained(arguments.model, loader, trust_remote_code=False, output_loading_info=True)
    except KeyError as error:
        raise ValueError(f"{arguments.model}: cannot be loaded for this ({error}).") from error
    if missing := sorted(name for name in report["missing_keys"] if name.startswith("classifier")):
        raise ValueError(
            f"{arguments.model}: has no trained classifier ({', '.join(missing)} missing), so that no class can be "
            "explained; train one, or explain a --text."
        )
    check_loaded(arguments.model, model, report, may_exceed=("classifier.",))
    return model.eval().to(arguments.device)


def _make_target(model: Any, arguments: argparse.Namespace) -> _Target:
    if arguments.against and arguments.text is None:
        raise ValueError("--against needs a --text that is set apart.")
    if arguments.codewords:
        return _Target("codewords", None)
    if arguments.label is not None:
        return _Target(f"class {arguments.label}", class_logit(model, arguments.label))
    if model.text_encoder is None:
        raise ValueError(
            f"{arguments.model}: ships without a text model, so that no --text can be explained. Export the model "
            "with its text model, or explain a --class or --codewords."
        )
    from transformers import AutoTokenizer

    texts = [arguments.text, *arguments.against]
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    tokens = tokenizer(text=texts, padding=True, truncation=True, return_tensors="pt").to(model.device)
    with torch.no_grad():
        vectors = model.get_text_features(tokens["input_ids"], tokens["attention_mask"]).float()
    if not arguments.against:
        return _Target(arguments.text, text_similarity(model, vectors[0]))
    name = f"{arguments.text}, against {', '.join(arguments.against)}"
    return _Target(name, text_similarity(model, vectors[0] - vectors[1:].mean(dim=0)))


def _get_tiles(model: Any, info: SlideInfo, arguments: argparse.Namespace) -> StoredTiles:
    """The slide's tile features: stored ones, or fresh ones."""
    if arguments.features is not None:
        stored = read_stored_tiles(
            arguments.features, model.config, mpp=info.mpp, allow_mismatch=arguments.allow_mismatch
        )
        if stored.fingerprint is not None and stored.fingerprint != slide_fingerprint(arguments.slide):
            raise ValueError(
                f"{arguments.features}: made from another file than {arguments.slide} (fingerprint "
                f"{stored.fingerprint}); name the slide that it is of, or embed this one."
            )
        return stored
    from transformers import AutoImageProcessor

    result = model.encode_slide(
        arguments.slide,
        image_processor=AutoImageProcessor.from_pretrained(arguments.model, trust_remote_code=False),
        mpp=arguments.mpp,
        min_tissue_fraction=arguments.min_tissue_fraction,
        tile_batch_size=arguments.batch_size,
        num_threads=arguments.num_threads,
        return_tile_features=True,
        progress=True,
    )
    features, corners = result["tile_features"].numpy(), result["tile_xy"].numpy()
    return StoredTiles(info.slide_id, features, corners, result["tile_size_level0_px"], info.mpp)


def _tile_side(model: Any, info: SlideInfo) -> int:
    return tile_size_at_level0(model.config.tile_size_px, info.tile_downsample(float(model.config.tile_mpp)))


@torch.no_grad()
def _score_of(model: Any, features: torch.Tensor, target: _Target) -> float:
    embedding = model.get_state_features(model.state_of_tiles(features)).slide_embedding
    return float(target.score(embedding.float())[0])


def _region_rows(
    model: Any,
    features: torch.Tensor,
    tiles: TileMap,
    target: _Target,
    info: SlideInfo,
    arguments: argparse.Namespace,
) -> list[dict[str, Any]]:
    """Vectors and score of each region, from the tiles in it; a region without tiles has none."""
    if arguments.regions is None:
        return []
    rows = []
    origin = tuple(frame_origin(arguments.frame, info.bounds).tolist())
    for region in read_regions(arguments.regions, origin_xy=origin):
        inside = torch.from_numpy(tiles_in_region(region, tiles.tile_xy, tiles.tile_size_level0_px))
        row: dict[str, Any] = {"name": region.name, "num_tiles": int(inside.sum()), "score": None}
        if row["num_tiles"]:
            found = model.get_state_features(model.state_of_tiles(features[inside.to(features.device)]))
            row["score"] = None if target.score is None else float(target.score(found.slide_embedding.float())[0])
            for name in ("slide_embedding", "slide_projection"):
                row[name] = found[name][0].float().cpu().numpy()
        rows.append(row)
    return rows


def _write(
    arguments: argparse.Namespace,
    tiles: TileMap,
    info: SlideInfo,
    picture: tuple[np.ndarray, float],
    regions: list[dict[str, Any]],
) -> None:
    arguments.out.mkdir(parents=True, exist_ok=True)
    start = arguments.out / tiles.slide_id
    by_codeword = tiles.scores is None
    draw_tile_map(f"{start}.png", *picture, info.bounds, tiles, by_codeword=by_codeword)
    write_tile_map_geojson(
        f"{start}.geojson", tiles, bounds=info.bounds, frame=arguments.frame, by_codeword=by_codeword
    )
    write_tile_map_table(f"{start}.parquet", tiles)
    if regions:
        columns = ("name", "num_tiles", "score", "slide_embedding", "slide_projection")
        with atomic_file(f"{start}.regions.parquet") as temporary:
            pq.write_table(
                pa.table({name: pa.array([row.get(name) for row in regions]) for name in columns}), temporary
            )
