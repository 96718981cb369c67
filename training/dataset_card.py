# SPDX-License-Identifier: Apache-2.0
"""Texts about a slide dataset for people: the dataset card (README.md) and the summary of a build (summary.md).

The card names no folder of the machine the dataset was made on.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from modeling_dre_slcl.tile_grid import TileGridConfig

from .dataset_tables import label_kinds
from .dataset_writer import SlideEntry, group_by_split

_MAX_LABEL_VALUES = 20
_MAX_REFUSED_ROWS = 100


def write_card(
    entries: Sequence[SlideEntry],
    files: Sequence[str],
    *,
    title: str,
    grid_config: TileGridConfig,
    jpeg_quality: int | None,
    license_name: str = "unknown",
    stain: str = "unknown",
) -> str:
    """Returns the dataset card: YAML front matter with the configurations, then tables.

    Args:
        entries (`Sequence[SlideEntry]`): all slides of the dataset.
        files (`Sequence[str]`): its Parquet files, relative to the dataset's folder.
        title (`str`): heading.
        grid_config (`TileGridConfig`): geometry of the tiles.
        jpeg_quality (`int` or `None`): quality of the stored tiles, `None` if there are coordinates only.
        license_name (`str`, *optional*, defaults to `"unknown"`): licence identifier of the Hub, such as "cc-by-4.0".
        stain (`str`, *optional*, defaults to `"unknown"`): stain of the slides, such as "H&E".
    """
    configs = _configs(files)
    header = {
        "license": license_name,
        "pretty_name": title,
        "tags": ["pathology", "whole-slide-image", "dre-slcl"],
        "configs": configs,
        "stain": stain,
        "tile_size_px": grid_config.tile_size_px,
        "tile_mpp": grid_config.tile_mpp,
    }
    sections = [
        f"# {title}",
        "Tiles of whole-slide images with their reports and labels, made by `dre-slcl tiles`.",
        _geometry_section(grid_config, jpeg_quality, stain),
        _counts_section(entries),
        _loading_section([config["config_name"] for config in configs]),
        _label_section(entries),
        _refused_section(entries),
    ]
    front = yaml.safe_dump(header, sort_keys=False, allow_unicode=True)
    return f"---\n{front}---\n\n" + "\n\n".join(section for section in sections if section) + "\n"


def _configs(files: Sequence[str]) -> list[dict[str, Any]]:
    """Returns the `configs` entry; `tiles` comes first and is the default if it is there."""
    configs = []
    for name in ("tiles", "slides"):
        splits = dict.fromkeys(file.split("/")[1].split("-")[0] for file in files if file.startswith(f"{name}/"))
        if splits:
            data_files = [{"split": split, "path": f"{name}/{split}-*.parquet"} for split in splits]
            configs.append({"config_name": name, "data_files": data_files})
    configs[0]["default"] = True
    return configs


def _geometry_section(grid_config: TileGridConfig, jpeg_quality: int | None, stain: str) -> str:
    pixels = "coordinates only, no pixels" if jpeg_quality is None else f"JPEG, quality {jpeg_quality}"
    rows = [
        ("tile size", f"{grid_config.tile_size_px} px"),
        ("tile resolution", f"{grid_config.tile_mpp:g} um/px"),
        ("field of view", f"{grid_config.tile_size_px * grid_config.tile_mpp:g} um"),
        ("distance between tiles", f"{grid_config.effective_stride_px} px"),
        ("least tissue in a tile", f"{grid_config.min_tissue_fraction:.0%}"),
        ("stored tiles", pixels),
        ("stain", stain),
    ]
    return "## Geometry\n\n" + _table(("", "value"), rows)


def _counts_section(entries: Sequence[SlideEntry]) -> str:
    rows = []
    for split, group in group_by_split(entries).items():
        num_ok = sum(entry.record.status == "ok" for entry in group)
        num_cases = len({entry.row.case_id for entry in group})
        num_reports = sum(bool(entry.row.report) for entry in group)
        num_tiles = sum(entry.record.num_tiles for entry in group)
        rows.append((split, num_cases, num_ok, len(group) - num_ok, num_reports, num_tiles))
    return "## Counts\n\n" + _table(("split", "cases", "slides", "refused slides", "reports", "tiles"), rows)


def _loading_section(names: Sequence[str]) -> str:
    lines = ["from datasets import load_dataset", ""]
    lines += [f'{name} = load_dataset("path/or/repository", "{name}")' for name in names]
    text = "## How to load\n\n```python\n" + "\n".join(lines) + "\n```\n\n"
    text += "`slides` has one row per slide; `tile_xy` holds the top-left corner of each tile in level-0 pixels."
    if "tiles" in names:
        text += (
            " `tiles` has one row per tile in the same order: tile t of a slide is row `tile_start + t` of its split."
        )
    return text


def _label_section(entries: Sequence[SlideEntry]) -> str:
    kinds = label_kinds(entry.row.labels for entry in entries)
    if not kinds:
        return ""
    rows = [(name, kind, *_describe([e.row.labels.get(name) for e in entries])) for name, kind in kinds.items()]
    return "## Labels\n\n" + _table(("column", "type", "missing", "values (slides)"), rows)


def _describe(values: Sequence[Any]) -> tuple[int, str]:
    """Returns how many values are missing, and the others in short."""
    present = [value for value in values if value is not None]
    counts = Counter(present)
    if len(counts) <= _MAX_LABEL_VALUES:
        text = ", ".join(f"{value} ({counts[value]})" for value in sorted(counts, key=str))
    elif isinstance(present[0], str):
        text = f"{len(counts)} different texts"
    else:
        text = f"{min(present):g} to {max(present):g}"
    return len(values) - len(present), text


def _refused_section(entries: Sequence[SlideEntry]) -> str:
    refused = [entry for entry in entries if entry.record.status == "refused"]
    if not refused:
        return "## Refused slides\n\nNone."
    rows = [(entry.row.slide_id, entry.split, entry.record.reason) for entry in refused[:_MAX_REFUSED_ROWS]]
    text = f"## Refused slides\n\n{len(refused)} slides have no tiles; `refused.jsonl` says why.\n\n"
    return text + _table(("slide", "split", "reason"), rows)


def write_summary_text(summary: Mapping[str, Any]) -> str:
    """Returns the summary of a build as Markdown.

    Args:
        summary (`Mapping[str, Any]`): the content of `summary.json`.
    """
    counts = [(key, summary[key]) for key in ("num_slides", "num_ok", "num_refused", "num_reused", "num_tiles")]
    rates = [(key, f"{summary[key]:.2f}") for key in ("slides_per_second", "tiles_per_second")]
    seconds = [(f"{stage} (s)", f"{value:.1f}") for stage, value in summary["seconds"].items()]
    text = "# Build of a slide dataset\n\n" + _table(("", "value"), [*counts, *rates])
    text += "\n\nTime in all workers together; `total` is by the clock.\n\n" + _table(("stage", "seconds"), seconds)
    if summary["refused_by_reason"]:
        text += "\n\n## Refused\n\n" + _table(("reason", "slides"), list(summary["refused_by_reason"].items()))
    return text + "\n"


def _table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(_cell(value) for value in line) + " |" for line in lines)


def _cell(value: Any) -> str:
    return str(value).replace("|", "\\|").replace("\n", " ")
