# SPDX-License-Identifier: Apache-2.0
"""The dataset card (README.md): what people and the Hub are told about a slide dataset.

It names no folder of the machine that the dataset was made on, no slide, no case, no report, and no label that
could be the name of a person: values are listed only where they are categories, which slides share.
"""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import yaml

from modeling_dre_slcl.tile_grid import TileGridConfig

from .card_metadata import config_fields, info_fields, license_fields, size_category
from .dataset_tables import label_kinds
from .dataset_writer import SlideEntry, group_by_split

_CONTACT_SHEET = "previews/contact_sheet"  # .jpg, or _001.jpg where there are several
REPOSITORY = "path/or/repository"  # what stands for the dataset's place; replaced when it is published
_MAX_VALUES = 20
_MAX_VALUE_LENGTH = 40
_MAX_MPP_ROWS = 12
# Dates of birth, of receipt, of death: what a text with one of these says is not for a card.
_DATE = re.compile(r"\d{1,4}[-./]\d{1,2}[-./]\d{1,4}")
_CITATION = """## Citation

Cite the source of the slides, and for the way they were tiled:

```bibtex
@inproceedings{dre_slcl_2025,
  title     = {Dynamic Residual Encoding with Slide-Level Contrastive Learning for End-to-End Whole Slide Image
               Representation},
  booktitle = {Proceedings of the 33rd ACM International Conference on Multimedia},
  year      = {2025},
  eprint    = {2511.05034}
}
```"""


def write_card(
    entries: Sequence[SlideEntry],
    files: Sequence[str],
    *,
    title: str,
    grid_config: TileGridConfig,
    jpeg_quality: int | None,
    license_name: str = "unknown",
    stain: str = "unknown",
    source_text: str = "",
    pixels: str | None = None,
    num_copied: int = 0,
    build_key: str = "",
    folder: Path | None = None,
) -> str:
    """Returns the dataset card: YAML front matter for the Hub and for `datasets`, then text and tables.

    Args:
        entries (`Sequence[SlideEntry]`): all slides of the dataset.
        files (`Sequence[str]`): its files, relative to the dataset's folder; of contact sheets among them
            (`previews/contact_sheet*.jpg`) the card shows the first.
        title (`str`): heading.
        grid_config (`TileGridConfig`): geometry of the tiles.
        jpeg_quality (`int` or `None`): quality of tiles that were encoded, `None` if there are coordinates only.
        license_name (`str`, defaults to `"unknown"`): licence of the images, such as "cc-by-4.0".
        stain (`str`, defaults to `"unknown"`): stain of the slides, such as "H&E".
        source_text (`str`, defaults to `""`): where the slides come from: text or an address.
        pixels (`str`, *optional*): `"copy"`, `"encode"` or `"none"`; by default as `jpeg_quality` says.
        num_copied (`int`, defaults to 0): with `"copy"`, tiles that are the slides' own compressed tiles.
        build_key (`str`, defaults to `""`): hash of everything the dataset depends on, see `config_fields`.
        folder (`Path`, *optional*): where `files` are; then the card says the columns, rows and bytes of every split.
    """
    tables = [file for file in files if file.endswith(".parquet")]
    configs = config_fields(tables, build_key)
    num_tiles = sum(entry.record.num_tiles for entry in entries)
    pixels = pixels or ("none" if jpeg_quality is None else "encode")
    header = {
        **license_fields(license_name),
        "pretty_name": title,
        "task_categories": ["image-feature-extraction"],
        "size_categories": [size_category(num_tiles if pixels != "none" else len(entries))],
        "tags": ["pathology", "histology", "whole-slide-image", "dre-slcl"],
        "configs": configs,
        **({} if folder is None else info_fields(tables, folder)),
        "stain": stain,
        "tile_size_px": grid_config.tile_size_px,
        "tile_mpp": grid_config.tile_mpp,
    }
    sections = [
        f"# {title}",
        _summary(entries, num_tiles),
        _picture_section(files) if pixels != "none" else "",
        _geometry_section(grid_config, stain, _describe_pixels(pixels, jpeg_quality, num_copied, num_tiles)),
        _counts_section(entries),
        _source_section(entries, license_name, source_text),
        _loading_section([config["config_name"] for config in configs]),
        _label_section(entries),
        _refused_section(entries),
        _privacy_section(entries, has_pixels=pixels != "none"),
        _CITATION,
    ]
    front = yaml.safe_dump(header, sort_keys=False, allow_unicode=True)
    return f"---\n{front}---\n\n" + "\n\n".join(section for section in sections if section) + "\n"


def _summary(entries: Sequence[SlideEntry], num_tiles: int) -> str:
    num_ok = sum(entry.record.status == "ok" for entry in entries)
    return (
        f"{num_tiles:,} tiles of {num_ok:,} whole-slide images with their reports and labels, made by "
        "`dre-slcl tiles`. For research, not for diagnosis."
    )


def _picture_section(files: Sequence[str]) -> str:
    """Shows what the slides look like; not for a dataset of coordinates, whose owner has kept the pixels back."""
    sheets = sorted(file for file in files if file.startswith(_CONTACT_SHEET))
    return f"![Thumbnails of the slides]({sheets[0]})" if sheets else ""


def _describe_pixels(pixels: str, jpeg_quality: int | None, num_copied: int, num_tiles: int) -> str:
    """Says how pixels were stored."""
    encoded = f"JPEG, encoded with quality {jpeg_quality}"
    if pixels == "none":
        return "none: coordinates only, pixels are read from the slides"
    if pixels == "encode":
        return encoded
    copied = f"{num_copied:,} of {num_tiles:,} are the slides' own compressed tiles, copied without loss"
    return copied if num_copied == num_tiles else f"{copied}; the others {encoded}"


def _geometry_section(grid_config: TileGridConfig, stain: str, stored: str) -> str:
    rows = [
        ("tile size", f"{grid_config.tile_size_px} px"),
        ("tile resolution", f"{grid_config.tile_mpp:g} um/px"),
        ("field of view", f"{grid_config.tile_size_px * grid_config.tile_mpp:g} um"),
        ("distance between tiles", f"{grid_config.effective_stride_px} px"),
        ("least tissue in a tile", f"{grid_config.min_tissue_fraction:.0%}"),
        ("stored tiles", stored),
        ("stain", stain),
    ]
    return "## Geometry\n\n" + _table(("", "value"), rows)


def _counts_section(entries: Sequence[SlideEntry]) -> str:
    rows, splits_of_case = [], {}
    for split, group in group_by_split(entries).items():
        num_ok = sum(entry.record.status == "ok" for entry in group)
        num_cases = len({entry.row.case_id for entry in group})
        num_reports = sum(bool(entry.row.report) for entry in group)
        num_tiles = sum(entry.record.num_tiles for entry in group)
        rows.append((split, num_cases, num_ok, len(group) - num_ok, num_reports, num_tiles))
        for entry in group:
            splits_of_case.setdefault(entry.row.case_id, set()).add(split)
    text = "## Counts\n\n" + _table(("split", "cases", "slides", "refused slides", "reports", "tiles"), rows)
    if len(rows) > 1 and all(len(splits) == 1 for splits in splits_of_case.values()):
        text += "\n\nSplit by case: no case has slides in two splits."
    return text


def _source_section(entries: Sequence[SlideEntry], license_name: str, source_text: str) -> str:
    """Where slides come from: the user's words, scanners, and the resolutions they were scanned at."""
    records = [entry.record for entry in entries if entry.record.status == "ok"]
    vendors = Counter(record.vendor or "unknown" for record in records)
    text = f"## Sources\n\n{source_text.strip() or 'Not stated.'} Licence: {license_name}.\n\n"
    text += _table(
        ("format or scanner vendor", "slides"), sorted(vendors.items(), key=lambda item: (-item[1], item[0]))
    )
    values = [record.mpp for record in records]
    counts = Counter(f"{value:.3g}" for value in values)
    if len(counts) <= _MAX_MPP_ROWS:
        rows: list[tuple[str, Any]] = sorted(counts.items(), key=lambda item: float(item[0]))
    else:
        rows = [(f"{min(values):.3g} to {max(values):.3g}, median {median(values):.3g}", len(values))]
    return text + "\n\n" + _table(("resolution of the slides (um/px)", "slides"), rows)


def _loading_section(names: Sequence[str]) -> str:
    lines = ["from datasets import load_dataset", ""]
    lines += [f'{name} = load_dataset("{REPOSITORY}", "{name}")' for name in names]
    text = "`slides` has one row per slide; `tile_xy` holds the top-left corner of each tile in level-0 pixels."
    if "tiles" in names:
        lines += [f'stream = load_dataset("{REPOSITORY}", "tiles", streaming=True)  # nothing is kept on disk']
        lines += ["", "# Several processes: every slide whole to one of them, every tile once."]
        lines += ["from dre_slcl.training.tile_stream import stream_tiles", ""]
        lines += [f'share = stream_tiles("{REPOSITORY}", "train", rank=0, world_size=2, shuffle_seed=0, epoch=0)']
        text += (
            " `tiles` has one row per tile in the same order: tile t of a slide is row `tile_start + t` of its split."
        )
    return "## How to load\n\n```python\n" + "\n".join(lines) + "\n```\n\n" + text


def _label_section(entries: Sequence[SlideEntry]) -> str:
    """How many slides of each split have which label."""
    kinds = label_kinds(entry.row.labels for entry in entries)
    if not kinds:
        return ""
    groups = group_by_split(entries)
    rows = []
    for name, kind in kinds.items():
        shown = _shared_values([(entry.row.labels.get(name), entry.row.case_id) for entry in entries])
        counts = {split: Counter(e.row.labels.get(name) for e in group) for split, group in groups.items()}
        rows += [(f"`{name}`", kind, label, *numbers) for label, *numbers in _count_labels(counts, shown)]
    return "## Labels\n\nSlides with each label.\n\n" + _table(("column", "type", "value", *groups), rows)


def _shared_values(labelled: Sequence[tuple[Any, str]]) -> list[Any]:
    """Returns the values that are categories: few, short, no dates, and each of at least two cases, so of no person.

    Args:
        labelled (sequence of `tuple[Any, str]`): the label of each slide, and its case.
    """
    cases: dict[Any, set[str]] = {}
    for value, case_id in labelled:
        if value is not None:
            cases.setdefault(value, set()).add(case_id)
    texts = [str(value) for value in cases]
    if len(cases) > _MAX_VALUES or any(len(text) > _MAX_VALUE_LENGTH or _DATE.search(text) for text in texts):
        return []
    return sorted((value for value, holders in cases.items() if len(holders) > 1), key=str)


def _count_labels(counts: Mapping[str, Counter], shown: Sequence[Any]) -> list[tuple[Any, ...]]:
    """Returns rows of a text and its number of slides in each split: of every value to show, and of all others."""
    rows: list[tuple[Any, ...]] = [(value, *(count[value] for count in counts.values())) for value in shown]
    others = sorted({value for count in counts.values() for value in count} - {None, *shown}, key=str)
    if others:
        total = [sum(count[value] for value in others) for count in counts.values()]
        rows.append((_summarise(others, "other" if shown else "different"), *total))
    missing = [count[None] for count in counts.values()]
    return rows + ([("missing", *missing)] if any(missing) else [])


def _summarise(values: Sequence[Any], word: str) -> str:
    """Says what values are like without showing any, since each may belong to one person."""
    if isinstance(values[0], str):
        return f"{len(values)} {word} texts"
    return f"{len(values)} {word} numbers, about {min(values):.2g} to {max(values):.2g}"


def _refused_section(entries: Sequence[SlideEntry]) -> str:
    """Counts refusals; the slides' names are in the table `slides`."""
    refused = [entry for entry in entries if entry.record.status == "refused"]
    if not refused:
        return "## Refused slides\n\nNone."
    groups = group_by_split(entries)
    reasons = sorted({entry.record.reason for entry in refused})
    counts = {
        split: Counter(e.record.reason for e in group if e.record.status == "refused")
        for split, group in groups.items()
    }
    rows = [(reason, *(count[reason] for count in counts.values())) for reason in reasons]
    text = f"## Refused slides\n\n{len(refused)} slides have no tiles; `slides` has them with their reason.\n\n"
    return text + _table(("reason", *groups), rows)


def _privacy_section(entries: Sequence[SlideEntry], *, has_pixels: bool) -> str:
    """Says what may be about persons, for whoever publishes the dataset or uses it."""
    held = ["names of slides and cases"]
    held += ["pixels of tissue"] if has_pixels else []
    held += ["reports in full"] if any(entry.row.report for entry in entries) else []
    held += ["label columns"] if any(entry.row.labels for entry in entries) else []
    return f"## Personal data\n\nThe files hold {', '.join(held)}. Label images of slides are not read."


def _table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(_cell(value) for value in line) + " |" for line in lines)


def _cell(value: Any) -> str:
    return str(value).replace("|", "\\|").replace("\n", " ")
