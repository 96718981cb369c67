# SPDX-License-Identifier: Apache-2.0
"""The dataset card: what `datasets` and the Hub read from it, what people read, and what must not be in it."""

import json
from dataclasses import replace
from pathlib import Path

import datasets
import pyarrow.parquet as pq
import pytest
from datasets.info import DatasetInfosDict
from huggingface_hub import DatasetCard, DatasetCardData

from dre_slcl.training.card_metadata import license_fields, size_category
from dre_slcl.training.dataset_card import write_card
from dre_slcl.training.dataset_writer import SlideEntry
from dre_slcl.training.manifest import ManifestRow
from dre_slcl.training.slide_part import PartRecord
from modeling_dre_slcl.tile_grid import TileGridConfig

from .slide_cohort import build, write_cohort


def private(person):
    """Labels that say who someone is."""
    return {"name": f"Ada Example {person}", "born": "1951-03-07", "record": 48151623 + person}


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    root = tmp_path_factory.mktemp("card")
    build(write_cohort(root / "cohort"), root / "dataset")
    return root / "dataset"


def entry(number, *, split="train", case=None, mpp=0.25, vendor="aperio", status="ok", report="Benign.", **labels):
    case = f"case-{number}" if case is None else case
    row = ManifestRow(
        slide_id=f"slide-{number}",
        path=Path(f"{number}.svs"),
        stored_path=f"{number}.svs",
        case_id=case,
        report=report,
        split=split,
        labels=labels,
    )
    record = PartRecord(f"slide-{number}", "key", status=status, reason="" if status == "ok" else "no_tissue")
    if status == "ok":
        record = replace(record, mpp=mpp, vendor=vendor, num_tiles=10)
    return SlideEntry(row, "fingerprint", record)


def card(entries, files=("slides/train-0.parquet", "tiles/train-0.parquet"), **options):
    options = {"title": "Slides", "grid_config": TileGridConfig(), "jpeg_quality": 90, **options}
    return write_card(entries, files, **options)


def test_the_hub_library_reads_the_card(built):
    loaded = DatasetCard.load(built / "README.md")
    assert loaded.data.license == "unknown"
    assert loaded.data.size_categories == ["n<1K"]
    assert (loaded.data.stain, loaded.data.tile_size_px, loaded.data.tile_mpp) == ("unknown", 64, 1.0)
    configs = loaded.data.to_dict()["configs"]
    assert [(config["config_name"], config.get("default")) for config in configs] == [
        ("tiles", True),
        ("slides", None),
    ]
    assert "# dataset\n\n108 tiles of 4 whole-slide images" in loaded.text


def test_datasets_knows_columns_rows_and_bytes_before_it_opens_a_file(built, tmp_path):
    for name in ("slides", "tiles"):
        info = datasets.load_dataset_builder(str(built), name, cache_dir=str(tmp_path / "cache")).info
        files = {split: sorted((built / name).glob(f"{split}-*.parquet")) for split in info.splits}
        assert sum(len(paths) for paths in files.values()) == len(list((built / name).iterdir()))
        assert info.features == datasets.Features.from_arrow_schema(pq.read_schema(files["train"][0]))
        for split, paths in files.items():
            assert info.splits[split].num_examples == sum(pq.read_table(path).num_rows for path in paths)
            assert info.splits[split].num_bytes == sum(path.stat().st_size for path in paths)
        loaded = datasets.load_dataset(str(built), name, cache_dir=str(tmp_path / "cache"))  # and checks the numbers
        assert {split: len(rows) for split, rows in loaded.items()} == {
            split: info.splits[split].num_examples for split in files
        }


@pytest.mark.parametrize("pixels", ["encode", "none"])
def test_columns_and_sizes_stand_as_datasets_itself_writes_them(tmp_path, pixels):
    build(write_cohort(tmp_path / "cohort"), tmp_path / "dataset", pixels=pixels)
    infos = {}
    for name in ("slides", "tiles") if pixels == "encode" else ("slides",):
        files = sorted((tmp_path / "dataset" / name).iterdir())
        splits = datasets.SplitDict()
        for file in files:  # one of each split
            splits.add(datasets.SplitInfo(file.name.split("-")[0], file.stat().st_size, len(pq.read_table(file))))
        size = sum(file.stat().st_size for file in files)
        features = datasets.Features.from_arrow_schema(pq.read_schema(files[0]))
        infos[name] = datasets.DatasetInfo(features=features, splits=splits, download_size=size, dataset_size=size)
    expected = DatasetCardData()
    DatasetInfosDict(infos).to_dataset_card_data(expected)
    found = DatasetCard.load(tmp_path / "dataset" / "README.md").data.to_dict()["dataset_info"]
    ordered = [found] if isinstance(found, dict) else found
    for info in ordered:
        info["splits"].sort(key=lambda split: split["name"])
    for info in [expected.dataset_info] if isinstance(expected.dataset_info, dict) else expected.dataset_info:
        info["splits"].sort(key=lambda split: split["name"])
    assert found == expected.to_dict()["dataset_info"]


def test_a_rebuilt_dataset_loads_with_its_new_rows(tmp_path):
    """`datasets` finds the cache of a folder by its name and the card's front matter alone."""
    manifest = write_cohort(tmp_path / "cohort")
    text = manifest.read_text()
    for report in ("Benign.", "Malign."):  # the same number of bytes
        manifest.write_text(text.replace("Benign.", report))
        build(manifest, tmp_path / "dataset")
        loaded = datasets.load_dataset(
            str(tmp_path / "dataset"), "slides", split="train", cache_dir=str(tmp_path / "cache")
        )
        assert loaded[0]["report"] == report


def test_counts_by_split(built):
    text = (built / "README.md").read_text()
    assert "| train | 2 | 3 | 1 | 2 | 88 |" in text
    assert "no case has slides in two splits" in text
    assert "| `diagnosis` | string | benign | 2 | 1 | 0 |" in text
    assert "| `diagnosis` | string | tumor | 1 | 0 | 2 |" in text
    assert "| not_a_file | 0 | 0 | 1 |" in text
    leaking = [entry(0, case="c"), entry(1, case="c", split="test")]
    assert "no case has slides in two splits" not in card(leaking)


def test_sources_and_resolutions():
    entries = [entry(i, mpp=0.2525 if i < 3 else 0.5, vendor="aperio" if i else None) for i in range(5)]
    text = card(entries, source_text="https://portal.example/cohort", license_name="CC BY 4.0", stain="H&E")
    assert "https://portal.example/cohort Licence: CC BY 4.0." in text
    assert "| aperio | 4 |\n| unknown | 1 |" in text
    assert "| 0.253 | 3 |\n| 0.5 | 2 |" in text
    assert "| stain | H&E |" in text
    many = card([entry(i, mpp=0.2 + 0.01 * i) for i in range(21)])
    assert "| 0.2 to 0.4, median 0.3 | 21 |" in many
    assert "Not stated. Licence: unknown." in many


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"jpeg_quality": 85}, "| stored tiles | JPEG, encoded with quality 85 |"),
        ({"jpeg_quality": None}, "| stored tiles | none: coordinates only, pixels are read from the slides |"),
        (
            {"pixels": "copy", "num_copied": 20},
            "| 20 of 20 are the slides' own compressed tiles, copied without loss |",
        ),
        ({"pixels": "copy", "num_copied": 5}, "copied without loss; the others JPEG, encoded with quality 90 |"),
    ],
)
def test_how_pixels_were_stored(options, said):
    assert said in card([entry(0), entry(1)], **options)


def test_the_contact_sheet_is_shown_if_there_is_one():
    files = ["slides/train-0.parquet", "tiles/train-0.parquet"]
    assert "](previews/contact_sheet.jpg)" in card([entry(0)], [*files, "previews/contact_sheet.jpg"])
    several = [f"previews/contact_sheet_00{number}.jpg" for number in (2, 1)]
    assert "](previews/contact_sheet_001.jpg)" in card([entry(0)], [*files, *several])
    assert "](previews" not in card([entry(0)], files)
    assert "](previews" not in card([entry(0)], [files[0], *several], jpeg_quality=None)


def test_nothing_of_a_person_is_in_the_card():
    entries = [entry(i, report=f"Report on Ada {i}", grade=i % 2, **private(i)) for i in range(5)]
    # Two slides of one person: what is said of them is shared by slides, but not by cases.
    entries += [entry(i, case="twice", grade=0, nickname="Kay", **private(6)) for i in (5, 6)]
    entries += [entry(7, status="refused", report="")]
    text = card(entries)
    assert "| `grade` | int64 | 0 | 5 |" in text
    assert "| `name` | string | 6 different texts | 7 |" in text
    assert "| `born` | string | 1 different texts | 7 |" in text
    assert "| `record` | int64 | 6 different numbers, about 4.8e+07 to 4.8e+07 | 7 |" in text
    assert "| `nickname` | string | 1 different texts | 2 |" in text
    for word in ("Ada", "1951", "48151", "Kay", "Report on", "slide-0", "case-0", "twice", "fingerprint", ".svs"):
        assert word not in text, word
    many = [entry(i, code=f"K{i // 2}") for i in range(60)]  # shared, but too many to be categories
    assert "| `code` | string | 30 different texts | 60 |" in card(many)


def test_licences_that_the_hub_does_not_know_are_named():
    assert license_fields("CC-BY 4.0") == {"license": "cc-by-4.0"}
    assert license_fields("unknown") == {"license": "unknown"}
    assert license_fields("Hospital Agreement 7") == {"license": "other", "license_name": "hospital-agreement-7"}


@pytest.mark.parametrize(
    ("rows", "category"),
    [(0, "n<1K"), (999, "n<1K"), (1001, "1K<n<10K"), (54_321, "10K<n<100K"), (3_000_000, "1M<n<10M")],
)
def test_size_categories_are_those_of_the_hub(rows, category):
    assert size_category(rows) == category


def test_the_card_depends_on_the_build_alone(built, tmp_path):
    manifest = write_cohort(tmp_path / "cohort")
    build(manifest, tmp_path / "dataset")
    assert (tmp_path / "dataset" / "README.md").read_text() == (built / "README.md").read_text()
    key = json.loads((built / "dre_slcl_dataset.json").read_text())["build_key"]
    assert f"build {key[:16]}" in (built / "README.md").read_text()
