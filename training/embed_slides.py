# SPDX-License-Identifier: Apache-2.0
"""`dre-slcl embed`: slides -> embeddings on disk, one file per slide and one table, resumable.

```
<out>/
    embeddings/<slide_id>.safetensors   slide_embedding (D,), slide_projection (E,), residuals (K, D),
                                        codeword_counts (K,); with --tile-features also tile_features (N, D) and
                                        tile_xy (N, 2); .h5 with --format h5
    slides.parquet, README.md           a row per slide: slide_id, status, reason, num_tiles, both vectors, ...; loads
                                        with `datasets.load_dataset(<out>)`
    refused.jsonl                       the slides that could not be embedded, with reason codes
    summary.json, summary.md            counts, speed, and where the time went
    embed.json                          the options that made them
```
"""

import argparse
import contextlib
import logging
import os
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from modeling_dre_slcl.atomic_files import read_json, remove_temporary, write_json
from modeling_dre_slcl.slide_info import SlideError
from modeling_dre_slcl.slide_reader import slide_fingerprint
from modeling_dre_slcl.slide_sampling import SamplingConfig

from .build_progress import BuildProgress
from .disk_space import DiskFullError, disk_full_error, is_disk_full
from .embed_arguments import add_embed_arguments
from .embed_files import EmbedRecord, embedding_path, read_facts, write_table
from .embed_processes import ProcessGroup
from .embed_summary import make_summary, write_summary
from .embed_writer import EmbeddingWriter
from .folder_lock import folder_lock
from .manifest import ManifestRow, read_manifest
from .manifest_checks import check_ids
from .manifest_shares import divide_manifest, parse_share, share_info
from .slide_tasks import fingerprint_slides

logger = logging.getLogger(__name__)
_FAILED, _USAGE, _PARTIAL, _REFUSED_STRICT, _DISK_FULL = 1, 2, 3, 4, 5
# What embeddings of one folder must have in common.
_OPTIONS = ("model", "revision", "mpp", "min_tissue_fraction", "tile_features", "format", "trident")
_SAMPLING_OPTIONS = ("tolerance", "max_tiles", "seed")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `dre-slcl embed`."""
    add_embed_arguments(parser)


def run(arguments: argparse.Namespace) -> int:
    """Runs the command; returns its exit status."""
    try:
        if arguments.join:
            from .embed_join import join_embeddings

            return join_embeddings(arguments.join, arguments.out)
        if not arguments.model:
            raise ValueError("--model: expected the folder or the Hub repository of a model.")
        return embed_slides(arguments)
    except DiskFullError as error:
        logger.error("%s", error)
        return _DISK_FULL
    except (ValueError, OSError, RuntimeError, ImportError) as error:
        if isinstance(error, OSError) and is_disk_full(error):
            logger.error("%s", disk_full_error(arguments.out, 0))
            return _DISK_FULL
        logger.error("%s", error)
        return _FAILED


def embed_slides(arguments: argparse.Namespace) -> int:
    """Embeds what the arguments name.

    Returns:
        `int`: 0 if all slides are embedded, 3 if some were refused (4 with `--strict`), 1 if all were.

    Raises:
        ValueError: if the slides cannot be listed, the model cannot embed anything, or the folder holds embeddings
            made with other options.
    """
    sampling = SamplingConfig(**{name: getattr(arguments, name) for name in _SAMPLING_OPTIONS})
    share = parse_share(arguments.shard) if arguments.shard else None
    rows = list_slides(arguments.slides, arguments.slides_root)
    extra: dict[str, Any] = {}
    if share is not None:
        positions = divide_manifest(rows, share[1])[share[0] - 1]
        extra["share"] = share_info(rows, positions, *share)
        rows = [rows[position] for position in positions]
    group = ProcessGroup(arguments.device)
    out = arguments.out
    started = time.monotonic()
    with folder_lock(_made(out)) if group.is_first else contextlib.nullcontext():
        if group.is_first:
            remove_temporary(out / "embeddings")
            _check_options(arguments, extra)
        group.wait()
        own = [rows[position] for position in divide_manifest(rows, group.size)[group.rank]]
        records, seconds = _embed_share(arguments, own, sampling, group)
        gathered = group.gather(records, seconds)
        if gathered is None:
            return 0
        records, seconds = gathered
        start = time.monotonic()
        write_table(out, rows, records, arguments.format)
        seconds["write"] += time.monotonic() - start
        total_seconds = time.monotonic() - started
        ordered = [records[row.slide_id] for row in rows]
        summary = make_summary(ordered, seconds, total_seconds=total_seconds, num_processes=group.size)
        write_summary(out, summary)
    return _report(arguments, ordered, summary)


def list_slides(slides: Path, slides_root: Path | None) -> list[ManifestRow]:
    """Lists a single slide, or the rows of a manifest or folder.

    Raises:
        ValueError: if there are none.
    """
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


def _made(out: Path) -> Path:
    (out / "embeddings").mkdir(parents=True, exist_ok=True)
    return out


def _check_options(arguments: argparse.Namespace, extra: dict[str, Any]) -> None:
    """Remembers what the embeddings of a folder are made with, and refuses to mix in others."""
    options = {name: getattr(arguments, name) for name in (*_OPTIONS, *_SAMPLING_OPTIONS)}
    options = {name: str(value) if isinstance(value, Path) else value for name, value in options.items()} | extra
    # A model that was trained again is another one, although its folder has the same name.
    options["weights"] = {
        path.name: slide_fingerprint(path) for path in sorted(Path(arguments.model).glob("*.safetensors"))
    }
    path = arguments.out / "embed.json"
    if path.exists() and (before := read_json(path)) != options:
        raise ValueError(f"{arguments.out} holds embeddings made with {before}, not {options}; choose another folder.")
    write_json(path, options)


def _embed_share(
    arguments: argparse.Namespace, rows: Sequence[ManifestRow], sampling: SamplingConfig, group: ProcessGroup
) -> tuple[dict[str, EmbedRecord], "Counter[str]"]:
    """Embeds the slides of this process that are not embedded yet."""
    records = _find_done(arguments, rows)
    left = [row for row in rows if row.slide_id not in records]
    seconds: Counter[str] = Counter()
    with BuildProgress(len(rows), len(records), shows_bar=group.is_first) as progress:
        if not left:
            return records, seconds
        # Here, because it loads the model's libraries.
        from .embed_engine import EmbedOptions, SlideJob, iter_embeddings
        from .embed_model import load_model

        options = EmbedOptions(
            min_tissue_fraction=arguments.min_tissue_fraction,
            batch_size=arguments.batch_size,
            num_workers=arguments.num_workers,
            slide_timeout=arguments.slide_timeout,
            keep_features=arguments.tile_features,
            sampling=sampling,
        )
        model, image_processor = load_model(arguments.model, arguments.revision, group.device)
        jobs = [SlideJob(row.slide_id, row.path, _given_mpp(row, arguments)) for row in left]
        with EmbeddingWriter(arguments, model.config, seconds) as writer:
            for place, result in iter_embeddings(model, image_processor, jobs, options, seconds=seconds):
                slide_id = jobs[place].slide_id
                if isinstance(result, SlideError):
                    # What an earlier run made of a slide that has changed since must not stay beside its refusal.
                    embedding_path(arguments.out, slide_id, arguments.format).unlink(missing_ok=True)
                    record = EmbedRecord(slide_id, "refused", result.reason, result.message)
                else:
                    record = EmbedRecord(slide_id, num_tiles=result["num_tiles_encoded"])
                    writer.write(result | {"given_mpp": str(jobs[place].mpp)})
                records[slide_id] = record
                progress.add(record)
    return records, seconds


def _given_mpp(row: ManifestRow, arguments: argparse.Namespace) -> float | None:
    return row.mpp or arguments.mpp


def _find_done(arguments: argparse.Namespace, rows: Sequence[ManifestRow]) -> dict[str, EmbedRecord]:
    """Records of slides that were embedded before, if neither the file nor the mpp given for it has changed since."""
    facts = {row.slide_id: read_facts(embedding_path(arguments.out, row.slide_id, arguments.format)) for row in rows}
    found = [row for row in rows if facts[row.slide_id]]
    fingerprints = fingerprint_slides(found)
    done = {}
    for row in found:
        made_from = {"fingerprint": fingerprints[row.slide_id], "given_mpp": str(_given_mpp(row, arguments))}
        if made_from.items() <= facts[row.slide_id].items():
            done[row.slide_id] = EmbedRecord(row.slide_id)
    return done


def _report(arguments: argparse.Namespace, records: Sequence[EmbedRecord], summary: dict[str, Any]) -> int:
    logger.info(
        "%d of %d slides embedded, %d refused, %d tiles in %.0f s (%.2f slides/s, %.1f tiles/s); the table is %s.",
        *(summary[name] for name in ("num_embedded", "num_slides", "num_refused", "num_tiles_encoded")),
        *(summary[name] for name in ("total_seconds", "slides_per_second", "tiles_per_second")),
        arguments.out / "slides.parquet",
    )
    num_refused = summary["num_refused"]
    if num_refused == len(records):
        reasons = summary["refused_by_reason"]
        logger.error("None of the %d slides could be embedded (%s); see refused.jsonl.", num_refused, reasons)
        return _FAILED
    if num_refused and arguments.strict:
        logger.error("%d slides were refused, which --strict forbids; see refused.jsonl.", num_refused)
        return _REFUSED_STRICT
    return _PARTIAL if num_refused else 0


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of `accelerate launch -m dre_slcl.training.embed_slides`."""
    level = logging.INFO if os.environ.get("RANK", "0") == "0" else logging.WARNING
    logging.basicConfig(level=level, format="%(levelname)s %(name)s: %(message)s")
    parser = argparse.ArgumentParser("dre_slcl.training.embed_slides")
    add_arguments(parser)
    return run(parser.parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
