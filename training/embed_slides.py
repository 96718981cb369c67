# SPDX-License-Identifier: Apache-2.0
"""`dre-slcl embed`: slides -> embeddings on disk, one file per slide and one table, resumable.

```
<out>/
    embeddings/<slide_id>.safetensors   slide_embedding (D,), slide_projection (E,), residuals (K, D),
                                        codeword_counts (K,); with --tile-features also tile_features (N, D) and
                                        tile_xy (N, 2)
    slides.parquet                      a row per slide: slide_id, status, reason, num_tiles, both vectors, ...
    refused.jsonl                       the slides that could not be embedded, with reason codes
    embed.json                          the options that made them
```
"""

import argparse
import json
import logging
import time
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from safetensors import safe_open
from safetensors.torch import save_file
from tqdm.auto import tqdm

from modeling_dre_slcl.atomic_files import atomic_file, read_json, remove_temporary, write_json, write_text
from modeling_dre_slcl.slide_reader import SlideError, slide_fingerprint

from .folder_lock import folder_lock
from .manifest import ManifestRow, read_manifest
from .manifest_checks import check_ids

logger = logging.getLogger(__name__)
_VECTORS = ("slide_embedding", "slide_projection")
_TENSORS = (*_VECTORS, "residuals", "codeword_counts", "tile_features", "tile_xy")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `dre-slcl embed`."""
    parser.description = (
        "Embeds slides with a trained model. Slides that were embedded before are skipped, so an interrupted run goes "
        "on when it is started again. Exit status: 0 all embedded, 3 some refused (see refused.jsonl), 1 none."
    )
    parser.add_argument("--model", required=True, help="folder or Hub repository of a DRE-SLCL model")
    parser.add_argument("--slides", required=True, type=Path, help="a slide, a folder of slides, or a manifest")
    parser.add_argument("--out", required=True, type=Path, help="folder for the embeddings")
    parser.add_argument(
        "--slides-root", type=Path, help="folder that a manifest's paths start from (default: its own)"
    )
    parser.add_argument("--mpp", type=float, help="level-0 resolution in um/px, for slides that do not state it")
    parser.add_argument(
        "--min-tissue-fraction", type=float, default=0.25, help="tiles with less are left out (default: %(default)s)"
    )
    parser.add_argument("--batch-size", type=int, default=32, help="tiles encoded at once (default: %(default)s)")
    parser.add_argument("--num-threads", type=int, default=2, help="threads that read tiles (default: %(default)s)")
    parser.add_argument("--tile-features", action="store_true", help="also store each tile's feature and place")
    parser.add_argument("--device", help="for example cpu or cuda:0 (default: the first accelerator)")


def run(arguments: argparse.Namespace) -> int:
    """Runs the command; returns its exit status."""
    try:
        return embed_slides(arguments)
    except (ValueError, OSError) as error:
        logger.error("%s", error)
        return 1


def embed_slides(arguments: argparse.Namespace) -> int:
    """Embeds what the arguments name.

    Returns:
        `int`: 0 if all slides are embedded, 3 if some were refused, 1 if all were.

    Raises:
        ValueError: if the slides cannot be listed, or the folder holds embeddings made with other options.
    """
    slides = _list_slides(arguments.slides, arguments.slides_root)
    out = arguments.out
    (out / "embeddings").mkdir(parents=True, exist_ok=True)
    with folder_lock(out):
        remove_temporary(out / "embeddings")
        _check_options(arguments)
        started = time.monotonic()
        embedder = _Embedder(arguments)
        rows = [embedder.embed(slide) for slide in tqdm(slides, desc="embedding", unit="slide")]
        _write_tables(out, rows)
    num_refused = sum(row["status"] == "refused" for row in rows)
    logger.info(
        "%d slides with %d tiles embedded, %d refused, in %.0f s; the table is %s.",
        len(rows) - num_refused,
        sum(row["num_tiles"] for row in rows),
        num_refused,
        time.monotonic() - started,
        out / "slides.parquet",
    )
    return 0 if not num_refused else 3 if num_refused < len(rows) else 1


def _list_slides(slides: Path, slides_root: Path | None) -> list[ManifestRow]:
    """A single slide, or the rows of a manifest or folder."""
    if slides.is_file() and slides.suffix.lower() not in (".csv", ".tsv", ".parquet"):
        path = slides.absolute()
        # A DICOM slide is a folder of files, which has the slide's name.
        slide_id = path.parent.name if path.suffix.lower() == ".dcm" else path.stem
        check_ids([slide_id], [path])
        return [ManifestRow(slide_id, path, path.name, case_id=slide_id)]
    rows = read_manifest(slides, slides_root=slides_root)
    if not rows:
        raise ValueError(f"{slides} lists no slides.")
    return rows


def _check_options(arguments: argparse.Namespace) -> None:
    """Remembers what the embeddings of a folder are made with, and refuses to mix in others."""
    names = ("model", "mpp", "min_tissue_fraction", "tile_features")
    options = {name: getattr(arguments, name) for name in names}
    # A model that was trained again is another one, although its folder has the same name.
    options["weights"] = {
        path.name: slide_fingerprint(path) for path in sorted(Path(arguments.model).glob("*.safetensors"))
    }
    path = arguments.out / "embed.json"
    if path.exists() and (before := read_json(path)) != options:
        raise ValueError(f"{arguments.out} holds embeddings made with {before}, not {options}; choose another folder.")
    write_json(path, options)


class _Embedder:
    """Embeds slides one by one; the model is loaded when the first slide needs it."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments = arguments
        self._pipeline: Any = None

    def embed(self, slide: ManifestRow) -> dict[str, Any]:
        """Embeds a slide, unless its file is there already; returns its row of the table."""
        path = self.arguments.out / "embeddings" / f"{slide.slide_id}.safetensors"
        row = {"slide_id": slide.slide_id, "case_id": slide.case_id, "status": "ok", "reason": "", "num_tiles": 0}
        try:
            made_from = {
                "fingerprint": slide_fingerprint(slide.path),
                "given_mpp": str(slide.mpp or self.arguments.mpp),
            }
            if not _is_made_from(path, made_from):
                self._write(slide, path, made_from)
        except SlideError as error:
            logger.warning("Slide %s is refused (%s): %s", slide.slide_id, error.reason, error)
            return row | {"status": "refused", "reason": error.reason, "message": str(error)}
        with safe_open(path, framework="np") as stored:
            vectors = {name: stored.get_tensor(name) for name in _VECTORS}
            facts = stored.metadata()
        return row | vectors | {"num_tiles": int(facts["num_tiles"]), "mpp": float(facts["mpp"])}

    def _write(self, slide: ManifestRow, path: Path, made_from: dict[str, str]) -> None:
        options = self.arguments
        result = self._load()(
            {"path": str(slide.path), "slide_id": slide.slide_id, "mpp": slide.mpp or options.mpp},
            on_error="raise",
            batch_size=options.batch_size,
            num_threads=options.num_threads,
            min_tissue_fraction=options.min_tissue_fraction,
            return_tile_features=options.tile_features,
        )
        facts = {key: str(result[key]) for key in ("slide_id", "num_tiles", "mpp")} | made_from
        tensors = {name: result[name].contiguous() for name in _TENSORS if name in result}
        with atomic_file(path) as temporary:
            save_file(tensors, temporary, metadata=facts)

    def _load(self) -> Any:
        if self._pipeline is None:
            from transformers import AutoImageProcessor, AutoModel

            from modeling_dre_slcl import SlideFeatureExtractionPipeline

            # The installed classes: code that a repository carries is not run here.
            self._pipeline = SlideFeatureExtractionPipeline(
                model=AutoModel.from_pretrained(self.arguments.model, trust_remote_code=False),
                image_processor=AutoImageProcessor.from_pretrained(self.arguments.model, trust_remote_code=False),
                device=self.arguments.device,
            )
        return self._pipeline


def _is_made_from(path: Path, made_from: dict[str, str]) -> bool:
    """Whether a slide was embedded before, and neither its file nor the mpp given for it has changed since."""
    if not path.is_file():
        return False
    with safe_open(path, framework="np") as stored:
        return made_from.items() <= stored.metadata().items()


def _write_tables(out: Path, rows: list[dict[str, Any]]) -> None:
    columns = ("slide_id", "case_id", "status", "reason", "num_tiles", "mpp", *_VECTORS)
    table = pa.table({name: pa.array([_plain(row.get(name)) for row in rows]) for name in columns})
    with atomic_file(out / "slides.parquet") as temporary:
        pq.write_table(table, temporary)
    refused = [{key: row[key] for key in ("slide_id", "reason", "message")} for row in rows if row["status"] != "ok"]
    write_text(out / "refused.jsonl", "".join(json.dumps(row) + "\n" for row in refused))


def _plain(value: Any) -> Any:
    return value.tolist() if hasattr(value, "tolist") else value
