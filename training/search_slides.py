# SPDX-License-Identifier: Apache-2.0
"""`dre-slcl search`: finds slides, reports, or regions of slides, by a text, a slide of the cohort, or a new one.

It reads what `dre-slcl embed` wrote; only a new slide is encoded.
"""

import argparse
import heapq
import json
import logging
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from modeling_dre_slcl.atomic_files import write_text
from modeling_dre_slcl.slide_info import SlideError

from .manifest import ManifestRow, read_manifest
from .search_index import EmbeddingIndex, nearest
from .search_page import Hit, write_search_page

logger = logging.getLogger(__name__)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `dre-slcl search`."""
    parser.description = (
        "Searches embeddings of `dre-slcl embed`: slides that match a text or are like a slide, reports that match a "
        "slide, regions that match a text. Every embedding is compared, so results are exact. Exit status: 0 done, 1 "
        "failed."
    )
    parser.add_argument("query", nargs="?", metavar="TEXT", help="what to search for: a phrase, or a whole report")
    parser.add_argument("--index", required=True, type=Path, metavar="DIR", help="folder written by `dre-slcl embed`")
    parser.add_argument("--model", help="folder or repository of the model that embedded it (not for --like alone)")
    parser.add_argument("--like", metavar="SLIDE_ID", help="search by a slide of the index, instead of a text")
    parser.add_argument("--slide", type=Path, metavar="FILE", help="search by a slide that is not in the index")
    parser.add_argument("--mpp", type=float, help="level-0 resolution of --slide in um/px, if it does not state it")
    parser.add_argument(
        "--find",
        choices=("slides", "reports", "regions"),
        default="slides",
        help="what to find (default: %(default)s)",
    )
    parser.add_argument("--within", metavar="SLIDE_ID", help="with --find regions: only in this slide")
    parser.add_argument(
        "--region-tiles", type=int, default=4, help="side of a region, in tiles (default: %(default)s)"
    )
    parser.add_argument("--other-cases", action="store_true", help="with --like: leave out slides of the same case")
    parser.add_argument("--top-k", type=int, default=10, help="how many to find (default: %(default)s)")
    parser.add_argument(
        "--slides", type=Path, help="manifest or folder with the index's slides, for their pictures and reports"
    )
    parser.add_argument("--slides-root", type=Path, help="folder that the manifest's paths start from")
    parser.add_argument(
        "--out", type=Path, help="results.html with pictures, or results.json (default: JSON on standard output)"
    )
    parser.add_argument("--device", help="for example cpu or cuda:0 (default: the first accelerator)")


def run(arguments: argparse.Namespace) -> int:
    """Runs the command; returns its exit status."""
    try:
        hits, slides = search(arguments)
        _write(arguments, hits, slides)
    except (ValueError, OSError, SlideError) as error:
        logger.error("%s", error)
        return 1
    return 0


def search(arguments: argparse.Namespace) -> tuple[list[Hit], dict[str, ManifestRow]]:
    """Finds what the arguments ask for.

    Returns:
        `tuple`: the hits, best first, and the rows of the manifest by slide, if one was given.

    Raises:
        ValueError: if the arguments do not fit together, or what they name is not there.
        SlideError: if the slide to search by cannot be encoded.
    """
    _check_arguments(arguments)
    index = EmbeddingIndex.open(arguments.index)
    rows = {}
    if arguments.slides is not None:
        rows = {row.slide_id: row for row in read_manifest(arguments.slides, slides_root=arguments.slides_root)}
    if arguments.find == "regions":
        return _find_regions(arguments, index), rows
    query = _query_vectors(arguments, index)
    if arguments.find == "reports":
        return _find_reports(arguments, query["slide_projection"], rows), rows
    return _find_slides(arguments, index, query, rows), rows


def _check_arguments(arguments: argparse.Namespace) -> None:
    given = [value for value in (arguments.query, arguments.like, arguments.slide) if value is not None]
    if len(given) != 1:
        raise ValueError("Give one thing to search by: a text, --like SLIDE_ID or --slide FILE.")
    if arguments.query is not None and not arguments.query.strip():
        raise ValueError("The text to search for is empty.")
    needs_model = arguments.like is None or arguments.find == "reports"
    if needs_model and arguments.model is None:
        raise ValueError("Give --model: the folder or repository of the model that made the index.")
    if arguments.find == "regions" and arguments.query is None:
        raise ValueError("Regions are found by a text; give one.")
    if arguments.find == "reports" and arguments.slides is None:
        raise ValueError("Reports are found in a manifest with a column `report`; give it with --slides.")
    if arguments.out is not None and arguments.out.suffix.lower() not in (".html", ".json"):
        raise ValueError(f"--out {arguments.out}: expected a name that ends in .html or .json.")
    if arguments.top_k < 1:
        raise ValueError(f"--top-k: expected at least 1, found {arguments.top_k}.")


@dataclass
class _Model:
    """A model with what it needs to read text and slides."""

    model: Any
    texts: Any

    def embed_text(self, *texts: str) -> np.ndarray:
        return self.texts().embed(list(texts)).numpy()


def _load_model(arguments: argparse.Namespace, index: EmbeddingIndex) -> _Model:
    import torch
    from transformers import AutoTokenizer

    from modeling_dre_slcl.text_embeddings import TextEmbeddings

    from .pretrained import load_slide_model

    index.check_model(arguments.model)
    model = load_slide_model(arguments.model)
    device = arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")

    def texts() -> TextEmbeddings:
        tokenizer = None
        if model.text_encoder is not None:
            tokenizer = AutoTokenizer.from_pretrained(arguments.model, trust_remote_code=False)
        return TextEmbeddings(model, tokenizer)

    return _Model(model.to(device), texts)


def _query_vectors(arguments: argparse.Namespace, index: EmbeddingIndex) -> dict[str, np.ndarray]:
    """What is searched by, as vectors by space."""
    if arguments.like is not None:
        row = index.row(arguments.like)
        return {name: getattr(index, name)[row] for name in ("slide_embedding", "slide_projection")}
    loaded = _load_model(arguments, index)
    if arguments.query is not None:
        return {"slide_projection": loaded.embed_text(arguments.query)[0]}
    from transformers import AutoImageProcessor

    result = loaded.model.encode_slide(
        arguments.slide,
        image_processor=AutoImageProcessor.from_pretrained(arguments.model, trust_remote_code=False),
        mpp=arguments.mpp,
    )
    return {name: result[name].numpy() for name in ("slide_embedding", "slide_projection")}


def _find_slides(
    arguments: argparse.Namespace,
    index: EmbeddingIndex,
    query: Mapping[str, np.ndarray],
    rows: Mapping[str, ManifestRow],
) -> list[Hit]:
    space = "slide_embedding" if "slide_embedding" in query else "slide_projection"
    left_out = set()
    if arguments.like is not None:
        own = index.row(arguments.like)
        left_out = {own}
        if arguments.other_cases:
            left_out = {row for row, case in enumerate(index.case_ids) if case == index.case_ids[own]}
    found = index.search(query[space], space, arguments.top_k, leave_out=left_out)
    return [
        Hit(
            rank,
            score,
            index.slide_ids[row],
            index.case_ids[row],
            report=rows[index.slide_ids[row]].report if index.slide_ids[row] in rows else "",
        )
        for rank, (row, score) in enumerate(found, start=1)
    ]


def _find_reports(arguments: argparse.Namespace, projection: np.ndarray, rows: Mapping[str, ManifestRow]) -> list[Hit]:
    """Reports of the manifest that match a slide, or a text; equal reports are one."""
    cases: dict[str, str] = {}
    for row in rows.values():
        if row.report.strip():
            cases.setdefault(row.report, row.case_id)
    if not cases:
        raise ValueError(f"{arguments.slides}: no reports; it needs a column `report`.")
    loaded = _load_model(arguments, EmbeddingIndex.open(arguments.index))
    reports = list(cases)
    scores, places = nearest(projection[None], loaded.embed_text(*reports), arguments.top_k)
    return [
        Hit(rank, float(score), "", cases[reports[place]], report=reports[place])
        for rank, (score, place) in enumerate(zip(scores[0], places[0], strict=True), start=1)
    ]


def _find_regions(arguments: argparse.Namespace, index: EmbeddingIndex) -> list[Hit]:
    """Regions of all slides, or of one, that match a text; one slide is in memory at a time."""
    from .search_regions import encode_regions
    from .stored_features import read_stored_tiles, stored_file

    loaded = _load_model(arguments, index)
    text = loaded.embed_text(arguments.query)[0].astype(np.float64)
    wanted = range(len(index)) if arguments.within is None else [index.row(arguments.within)]
    best: list[tuple[float, int, int, tuple[int, int, int, int]]] = []
    for row in wanted:
        tiles = read_stored_tiles(stored_file(index.folder, index.slide_ids[row]), loaded.model.config)
        regions = encode_regions(loaded.model, tiles, arguments.region_tiles)
        scores = regions.projection.double().numpy() @ text
        for place in np.argsort(-scores, kind="stable")[: arguments.top_k].tolist():
            x, y = regions.region_xy[place].tolist()
            found = (x, y, regions.size_level0_px, int(regions.num_tiles[place]))
            # Of equal scores the first slide's first region wins, as in a sort of all of them.
            heapq.heappush(best, (float(scores[place]), -row, -place, found))
        best = heapq.nlargest(arguments.top_k, best)
        heapq.heapify(best)
    return [
        Hit(rank, score, index.slide_ids[-row], index.case_ids[-row], "", (x, y), size, num_tiles)
        for rank, (score, row, _, (x, y, size, num_tiles)) in enumerate(sorted(best, reverse=True), start=1)
    ]


def _write(arguments: argparse.Namespace, hits: list[Hit], rows: Mapping[str, ManifestRow]) -> None:
    asked = arguments.query or arguments.like or str(arguments.slide)
    if arguments.out is not None and arguments.out.suffix.lower() == ".html":
        by = "text" if arguments.query else "slide"
        write_search_page(
            arguments.out,
            title=asked if arguments.query else f"Like {Path(asked).name}",
            summary=f"{len(hits)} {arguments.find} nearest to the {by}, in {arguments.index.name}.",
            hits=hits,
            slides={slide_id: row.path for slide_id, row in rows.items()},
        )
        logger.info("%d %s found; open %s.", len(hits), arguments.find, arguments.out)
        return
    found = {"query": asked, "find": arguments.find, "results": [hit.as_row() for hit in hits]}
    text = json.dumps(found, indent=2, ensure_ascii=False) + "\n"
    if arguments.out is None:
        sys.stdout.write(text)
    else:
        write_text(arguments.out, text)
