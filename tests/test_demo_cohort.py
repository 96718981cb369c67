# SPDX-License-Identifier: Apache-2.0
"""The synthetic cohort: real files, exact repeatability, and subtypes that differ in nothing but arrangement."""

import csv
import itertools
import re
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import openslide
import pytest
import tifffile
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GroupKFold, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from training.demo import slide_writer, tissue_painter
from training.demo.cohort import MANIFEST_COLUMNS, make_cases, split_blocks, write_cohort
from training.demo.report_writer import GROWTH, PROMPT_TEMPLATES, REPORT_TEMPLATES, SUBTYPES, write_report
from training.demo.slide_writer import write_slide
from training.demo.tissue_painter import CaseTraits, paint_slide

SMALL = (1000, 1100)
ROOT = Path(__file__).parents[1]


def traits(subtype="tubular", case_id="case-001", **changes):
    return CaseTraits(
        case_id,
        subtype,
        **{"brisk_lymphocytes": False, "necrosis": False, "mucin": False, "nuclear_grade": 2} | changes,
    )


def read_level(path, level=0):
    with openslide.OpenSlide(path) as slide:
        return np.asarray(slide.read_region((0, 0), level, slide.level_dimensions[level]).convert("RGB"))


@pytest.fixture(scope="module")
def cohort(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cohort")
    manifest = write_cohort(folder, num_cases_per_subtype=3, slides_per_case=2, num_workers=1, side_range_px=SMALL)
    with manifest.open(newline="", encoding="utf-8") as handle:
        return folder, list(csv.DictReader(handle))


def test_manifest_has_the_columns_and_every_split_every_subtype(cohort):
    folder, rows = cohort
    assert tuple(rows[0]) == MANIFEST_COLUMNS
    assert len({row["slide_id"] for row in rows}) == len(rows) == 18
    assert all((folder / row["path"]).is_file() and not Path(row["path"]).is_absolute() for row in rows)
    assert {(row["split"], row["subtype"]) for row in rows} == set(
        itertools.product(("train", "val", "test"), SUBTYPES)
    )
    for column in ("split", "subtype", "report"):
        assert len({(row["case_id"], row[column]) for row in rows}) == 9, f"{column} differs within a case"


def test_openslide_finds_vendor_levels_and_mpp(cohort):
    folder, rows = cohort
    for row in rows[:3]:
        with openslide.OpenSlide(folder / row["path"]) as slide:
            assert slide.properties["openslide.vendor"] == "aperio"
            assert float(slide.properties["openslide.mpp-x"]) == float(slide.properties["openslide.mpp-y"]) == 1.0
            assert slide.properties["openslide.objective-power"] == "10"
            assert slide.level_downsamples == pytest.approx([1, 2, 4], rel=0.01)
            assert slide.properties["openslide.level[0].tile-width"] == "256"


def test_openslide_returns_the_painted_pixels_within_jpeg_error(tmp_path):
    pixels = paint_slide(traits(), "case-001-s1", seed=0, side_range_px=SMALL)
    write_slide(tmp_path / "a.svs", pixels, mpp=1.0)
    error = read_level(tmp_path / "a.svs").astype(int) - pixels
    assert np.abs(error.mean((0, 1))).max() < 0.7, "colours shifted: wrong order of channels or photometric"
    assert np.sqrt((error**2).mean()) < 6
    half = cv2.resize(pixels, (pixels.shape[1] // 2, pixels.shape[0] // 2), interpolation=cv2.INTER_AREA)
    assert np.sqrt(((read_level(tmp_path / "a.svs", 1).astype(int) - half) ** 2).mean()) < 6


def test_saturated_colours_keep_their_channels(tmp_path):
    pixels = np.zeros((300, 520, 3), np.uint8)
    for index, colour in enumerate([(220, 30, 40), (30, 200, 60), (40, 50, 210)]):
        pixels[:, 176 * index : 176 * (index + 1)] = colour
    write_slide(tmp_path / "a.svs", pixels, mpp=0.5, num_levels=1)
    read = read_level(tmp_path / "a.svs")
    assert read.shape == pixels.shape
    assert np.abs(read[150, [80, 260, 440]].astype(int) - pixels[150, [80, 260, 440]]).max() <= 4


def test_container_is_a_tiff_that_tifffile_reads_the_same_way(tmp_path):
    pixels = paint_slide(traits(), "a", seed=0, side_range_px=SMALL)
    write_slide(tmp_path / "a.svs", pixels, mpp=0.5)
    with tifffile.TiffFile(tmp_path / "a.svs") as tiff:
        assert tiff.is_svs
        assert len(tiff.pages) == 3
        assert [page.tags["NewSubfileType"].value for page in tiff.pages] == [0, 1, 1]
        page = tiff.pages[0]
        assert page.shape == pixels.shape
        assert (page.compression, page.photometric, page.tile) == (7, 6, (256, 256))
        assert all(offset % 2 == 0 for offset in page.dataoffsets)
        assert "MPP = 0.5" in page.description
        data = (tmp_path / "a.svs").read_bytes()
        spans = sorted(
            (o, o + n) for page in tiff.pages for o, n in zip(page.dataoffsets, page.databytecounts, strict=True)
        )
    assert all(end <= start for (_, end), (start, _) in itertools.pairwise(spans))
    assert all(data[start : start + 2] == b"\xff\xd8" and data[end - 2 : end] == b"\xff\xd9" for start, end in spans)


def test_painting_processes_import_neither_torch_nor_imagecodecs():
    code = (
        "import sys, training.demo.cohort\n"
        "heavy = {'torch', 'transformers', 'tifffile', 'imagecodecs'} & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)\n"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=120)


def test_a_file_beyond_4_gib_is_refused():
    class Full(bytearray):
        def __len__(self):
            return 2**32 - 4

    with pytest.raises(ValueError, match="below 4 GiB"):
        slide_writer._append(Full(), b"12345678")


@pytest.mark.parametrize("seed", range(12))
def test_even_the_smallest_slides_hold_tumour(monkeypatch, seed):
    counts = []
    monkeypatch.setattr(tissue_painter, "_paint_epithelial_nuclei", lambda *args: counts.append(len(args[3])))
    paint_slide(traits(necrosis=True, mucin=True), "x", seed=seed, side_range_px=(tissue_painter.MIN_SIDE_PX,) * 2)
    assert sum(counts) > 100


def test_slides_too_small_for_tissue_are_refused():
    with pytest.raises(ValueError, match="side_range_px"):
        paint_slide(traits(), "x", seed=0, side_range_px=(300, 400))


@pytest.mark.parametrize("pixels", [np.zeros((8, 8, 3), np.float32), np.zeros((8, 8), np.uint8)])
def test_wrong_pixels_are_refused(tmp_path, pixels):
    with pytest.raises(ValueError, match="expected uint8"):
        write_slide(tmp_path / "a.svs", pixels, mpp=1.0)
    assert not list(tmp_path.iterdir())


def test_bytes_are_a_function_of_seed_and_slide_whatever_the_workers(cohort, tmp_path):
    folder, rows = cohort
    settings = {"num_cases_per_subtype": 1, "slides_per_case": 2, "side_range_px": SMALL}
    shares = {"val_fraction": 0.0, "test_fraction": 0.0}
    write_cohort(tmp_path, **settings, **shares, num_workers=2)
    for path in sorted(tmp_path.glob("slides/*.svs")):
        assert path.read_bytes() == (folder / "slides" / path.name).read_bytes()
    assert len({(folder / row["path"]).read_bytes() for row in rows}) == len(rows)


def test_finished_slides_are_kept_and_those_of_another_seed_are_not(tmp_path):
    settings = {"num_cases_per_subtype": 1, "slides_per_case": 1, "num_workers": 1, "side_range_px": SMALL}
    shares = {"val_fraction": 0.0, "test_fraction": 0.0}
    write_cohort(tmp_path, **settings, **shares)
    slides = sorted(tmp_path.glob("slides/*"))
    first = [(path.stat().st_mtime_ns, path.read_bytes()) for path in slides]
    slides[0].unlink()
    write_cohort(tmp_path, **settings, **shares)
    second = [(path.stat().st_mtime_ns, path.read_bytes()) for path in slides]
    assert [data for _, data in second] == [data for _, data in first]
    assert second[1:] == first[1:]
    write_cohort(tmp_path, **settings, **shares, seed=1)
    assert all(path.read_bytes() != data for path, (_, data) in zip(slides, first, strict=True))


def test_painting_does_not_depend_on_global_random_state():
    first = paint_slide(traits(), "x", seed=3, side_range_px=SMALL)
    np.random.seed(1)  # noqa: NPY002 - the global state is what is tested
    cv2.setRNGSeed(5)
    assert np.array_equal(first, paint_slide(traits(), "x", seed=3, side_range_px=SMALL))
    assert not np.array_equal(
        first[:1000, :1000], paint_slide(traits(), "x", seed=4, side_range_px=SMALL)[:1000, :1000]
    )


def test_unknown_subtype_is_refused():
    with pytest.raises(ValueError, match=r"subtype: expected one of .*papillary"):
        paint_slide(traits("papillary"), "x", seed=0)


def paint_canvases(monkeypatch, subtype, slide_id):
    """Returns the canvases, the number of epithelial nuclei and the pixels of a slide."""
    seen = {}
    concentrations, epithelium = tissue_painter._concentrations, tissue_painter._paint_epithelial_nuclei

    def keep_canvas(rng, canvas, frame):
        seen["canvas"] = canvas
        return concentrations(rng, canvas, frame)

    def keep_count(rng, canvas, frame, nuclei, grade):
        seen["num_nuclei"] = len(nuclei)
        epithelium(rng, canvas, frame, nuclei, grade)

    with monkeypatch.context() as patch:
        patch.setattr(tissue_painter, "_concentrations", keep_canvas)
        patch.setattr(tissue_painter, "_paint_epithelial_nuclei", keep_count)
        pixels = paint_slide(traits(subtype), slide_id, seed=11, side_range_px=(1100, 1200))
    return seen["canvas"], seen["num_nuclei"], pixels


def test_one_slide_in_three_subtypes_has_the_same_cells_and_white_area(monkeypatch):
    areas = {subtype: [] for subtype in SUBTYPES}
    for number in range(4):
        counts, outlines = set(), []
        for subtype in SUBTYPES:
            canvas, num_nuclei, _ = paint_canvases(monkeypatch, subtype, f"s{number}")
            counts.add(num_nuclei)
            outlines.append(canvas.tissue)
            white = canvas.white > 127
            body = (canvas.cytoplasm > 60) & ~white
            areas[subtype].append([white.mean(), body.mean(), (canvas.nuclei > 60).mean()])
        assert len(counts) == 1
        assert counts.pop() > 300
        assert all(np.array_equal(outlines[0], other) for other in outlines[1:])
    means = np.array([np.mean(areas[subtype], 0) for subtype in SUBTYPES])
    assert (np.ptp(means, axis=0) / means.mean(0) < 0.09).all(), means


def test_only_arrangement_tells_tubules_from_nests_and_cords(monkeypatch):
    """The white spaces of tubules are ringed by cytoplasm, those of the others lie in bare stroma."""
    ringed = {}
    for subtype in SUBTYPES:
        canvas, _, _ = paint_canvases(monkeypatch, subtype, "s0")
        white = (canvas.white > 127).astype(np.uint8)
        rim = (cv2.dilate(white, np.ones((9, 9), np.uint8)) > 0) & (canvas.white == 0)
        ringed[subtype] = (canvas.cytoplasm[rim] > 0).mean()
    assert ringed["tubular"] > 0.9
    assert ringed["solid"] < 0.3
    assert ringed["trabecular"] < 0.5


def nuisance_features(pixels):
    """Mean colour and dark share of the tissue, its share of the slide, and the white share in it, at 2 um/px."""
    half = cv2.resize(pixels, None, fx=0.5, fy=0.5, interpolation=cv2.INTER_AREA)
    stained = (half.min(2) < 215).astype(np.uint8) * 255
    tissue = cv2.morphologyEx(stained, cv2.MORPH_CLOSE, np.ones((31, 31), np.uint8)) > 0
    inside = half[tissue].astype(np.float64)
    return [*inside.mean(0), tissue.mean(), (inside.min(1) > 215).mean(), (inside.mean(1) < 110).mean()]


def test_colour_and_areas_do_not_tell_the_subtypes_apart():
    cases = make_cases(16, seed=5)
    features = [
        nuisance_features(paint_slide(case, f"{case.case_id}-s1", seed=5, side_range_px=SMALL)) for case in cases
    ]
    subtypes = np.array([case.subtype for case in cases])
    model = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
    folds = GroupKFold(4)
    accuracy = cross_val_score(model, features, subtypes, groups=[case.case_id for case in cases], cv=folds).mean()
    # Chance is 1/3 with a standard error of 0.068 at 48 cases; perfect separation would be 1.
    assert accuracy < 0.55


def test_traits_and_grades_are_balanced_within_each_subtype():
    cases = make_cases(24, seed=0)
    assert cases[:9] == make_cases(3, seed=0), "a larger cohort must begin with the smaller one"
    for subtype in SUBTYPES:
        chosen = [case for case in cases if case.subtype == subtype]
        combinations = [(case.brisk_lymphocytes, case.necrosis, case.mucin) for case in chosen]
        assert {combinations.count(one) for one in itertools.product((False, True), repeat=3)} == {3}
        assert [sum(case.nuclear_grade == grade for case in chosen) for grade in (1, 2, 3)] == [8, 8, 8]
    orders = {tuple(case.subtype for case in cases[3 * block : 3 * block + 3]) for block in range(24)}
    assert len(orders) > 2, "the number of a case must not tell its subtype"


def test_painted_traits_are_visible():
    plain, with_all = (
        paint_slide(traits(case_id="c", brisk_lymphocytes=on, necrosis=on, mucin=on), "s", seed=2)
        for on in (False, True)
    )
    assert plain.shape == with_all.shape
    assert (np.abs(plain.astype(int) - with_all) > 30).any(2).mean() > 0.02


def test_splits_are_blocks_and_refuse_an_empty_training_set():
    splits = split_blocks(10, val_fraction=0.2, test_fraction=0.1, seed=0)
    assert [splits.count(name) for name in ("train", "val", "test")] == [7, 2, 1]
    with pytest.raises(ValueError, match="Take more cases"):
        split_blocks(2, val_fraction=0.2, test_fraction=0.2, seed=0)
    with pytest.raises(ValueError, match="val_fraction"):
        split_blocks(5, val_fraction=-0.1, test_fraction=0.2, seed=0)


def test_numbers_below_one_are_refused(tmp_path):
    with pytest.raises(ValueError, match="expected at least 1 each"):
        write_cohort(tmp_path, num_cases_per_subtype=3, slides_per_case=0)


def test_reports_vary_and_name_their_subtype_and_no_other():
    cases = make_cases(40, seed=0)
    reports = [write_report(case, seed=0) for case in cases]
    assert len(set(reports)) == len(reports)
    assert reports == [write_report(case, seed=0) for case in cases]
    stems = {
        "tubular": r"tubul|acin|gland",
        "solid": r"solid|nest|insular|island",
        "trabecular": r"trabecul|cord|ribbon",
    }
    for case, report in zip(cases, reports, strict=True):
        assert any(name in report.lower() for name in SUBTYPES[case.subtype]), report
        for subtype, stem in stems.items():
            assert bool(re.search(stem, report.lower())) == (subtype == case.subtype), report
        assert not re.search(r"[{}]|CLASSNAME|  ", report)


def test_every_name_and_template_is_used():
    reports = [(case, write_report(case, seed=0)) for case in make_cases(60, seed=0)]
    for subtype, names in SUBTYPES.items():
        own = [report.lower() for case, report in reports if case.subtype == subtype]
        assert all(any(name in report for report in own) for name in names)
        assert all(any(sentence.lower() in report for report in own) for sentence in GROWTH[subtype])
    assert len(REPORT_TEMPLATES) >= 5


def test_reports_tell_the_traits_that_the_slides_show():
    for number, (necrosis, brisk) in enumerate(itertools.product((False, True), repeat=2)):
        for repeat in range(20):
            case = traits(case_id=f"case-{number}{repeat:02d}", necrosis=necrosis, brisk_lymphocytes=brisk)
            report = write_report(case, seed=0)
            if "ecrosis" in report:
                denied = bool(re.search(r"No necrosis|Necrosis is (absent|not)", report))
                assert denied != necrosis, report
            assert bool(re.search(r"brisk|Dense lymphocyte|rich in lymphocytes", report)) == brisk, report


def test_prompt_templates_hold_the_literal_token():
    assert all(template.count("CLASSNAME") == 1 for template in PROMPT_TEMPLATES)
    names = [name for synonyms in SUBTYPES.values() for name in synonyms]
    assert len(set(names)) == len(names)
    assert set(SUBTYPES) == set(tissue_painter.ARRANGEMENTS) == set(GROWTH)
