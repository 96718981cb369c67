# SPDX-License-Identifier: Apache-2.0
"""Pictures hold what they are given, in pixels and in matplotlib's own terms; the HTML report is one safe file."""

import base64
import json
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
from matplotlib import colormaps
from sklearn.decomposition import PCA

from dre_slcl.training import figures
from dre_slcl.training.demo.slide_writer import write_slide
from dre_slcl.training.html_report import (
    Commands,
    Confusion,
    NearestReports,
    Paragraph,
    Picture,
    PictureRow,
    Section,
    Table,
    write_html_report,
)
from modeling_dre_slcl.slide_reader import SlideReader
from modeling_dre_slcl.tile_grid import TileGridConfig, make_tile_grid

REAL_SLIDE = Path(__file__).resolve().parents[2] / "shared" / "data" / "slides" / "celiac_HE_5x.svs"


@pytest.fixture
def drawn(monkeypatch):
    """The figures that are saved, to ask matplotlib what is in them."""
    kept, save = [], figures.save_figure
    monkeypatch.setattr(figures, "save_figure", lambda figure, path: (kept.append(figure), save(figure, path)))
    return kept


def write_metrics(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def pixels(path):
    with PIL.Image.open(path) as image:
        return np.asarray(image.convert("RGB"))


def test_curves_show_every_known_quantity_and_where_the_run_was_resumed(tmp_path, drawn):
    rows = [{"step": step, "loss": 3 / (step + 1), "logit_scale": 14.3, "unknown": 1} for step in range(60)]
    rows[10]["loss"] = float("nan")
    rows.insert(30, {"step": 29, "event": "resume"})
    figures.draw_training_curves(write_metrics(tmp_path / "metrics.jsonl", rows), tmp_path / "curves.png")
    loss, scale = drawn[0].axes
    values, means, resumed = loss.get_lines()
    assert values.get_xydata().tolist() == [[step, 3 / (step + 1)] for step in range(60) if step != 10]
    assert resumed.get_xdata()[0] == 29
    # The mean of the first three values stands at the second.
    assert means.get_xydata()[0].tolist() == pytest.approx([1, (3 + 3 / 2 + 3 / 3) / 3])
    assert scale.get_title(loc="left") == "logit scale"
    assert pixels(tmp_path / "curves.png").std() > 1
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".tmp")] == []


def test_curves_survive_a_torn_last_line_and_a_rewound_log(tmp_path, drawn):
    path = write_metrics(tmp_path / "metrics.jsonl", [{"step": step, "loss": 1.0} for step in (1, 2, 3, 2, 3)])
    path.write_text(path.read_text() + '{"step": 4, "lo')
    figures.draw_training_curves(path, tmp_path / "curves.png")
    assert [line.get_xdata()[0] for line in drawn[0].axes[0].get_lines()[1:]] == [2]


def test_curves_of_nothing_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"metrics.jsonl: expected lines with step"):
        figures.draw_training_curves(tmp_path / "metrics.jsonl", tmp_path / "curves.png")


def test_similarities_are_sorted_by_label(tmp_path, drawn):
    similarity = np.arange(12, dtype=float).reshape(4, 3)
    figures.draw_similarity_matrix(
        similarity, tmp_path / "s.png", row_labels=["b", "a", "b", "a"], column_labels=["b", "a", "a"]
    )
    axes = drawn[0].axes[0]
    assert axes.get_images()[0].get_array().tolist() == similarity[[1, 3, 0, 2]][:, [1, 2, 0]].tolist()
    assert [label.get_text() for label in axes.get_yticklabels()] == ["a", "b"]
    assert axes.get_xticks().tolist() == [0.5, 2]
    with pytest.raises(ValueError, match=r"expected shape \(2, 3\)"):
        figures.draw_similarity_matrix(similarity, tmp_path / "s.png", row_labels="ab", column_labels="bab")


def test_the_map_is_that_of_scikit_learn(tmp_path, drawn):
    embeddings = np.random.default_rng(0).normal(size=(20, 6)) * [5, 3, 1, 1, 1, 1]
    labels = ["a", "b"] * 10
    figures.draw_embedding_map(embeddings.astype(np.float32), labels, tmp_path / "map.png")
    axes = drawn[0].axes[0]
    reference = PCA(2)
    expected = reference.fit_transform(embeddings)
    found = np.concatenate([points.get_offsets() for points in axes.collections])
    np.testing.assert_allclose(np.abs(found), np.abs(np.concatenate([expected[::2], expected[1::2]])), atol=1e-4)
    assert f"{reference.explained_variance_ratio_[0]:.0%}" in axes.get_xlabel()
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["a (10)", "b (10)"]


@pytest.mark.parametrize("embeddings", [np.ones((3, 4)), np.array([[0.0], [1.0], [2.0]])])
def test_the_map_of_equal_or_one_dimensional_embeddings_is_drawn(tmp_path, embeddings):
    figures.draw_embedding_map(embeddings, ["a"] * 3, tmp_path / "map.png")
    assert (tmp_path / "map.png").stat().st_size > 1000


def test_a_map_of_one_slide_is_refused(tmp_path):
    with pytest.raises(ValueError, match="at least two"):
        figures.draw_embedding_map(np.ones((1, 4)), ["a"], tmp_path / "map.png")


def test_figures_leave_matplotlib_as_it_was():
    source = Path(figures.__file__).read_text(encoding="utf-8")
    assert "pyplot" not in source
    assert "rcParams" not in source


@pytest.fixture
def slide(tmp_path):
    image = np.full((512, 768, 3), 240, np.uint8)
    image[128:384, 128:640] = (180, 90, 150)
    write_slide(tmp_path / "slide.svs", image, mpp=1.0)
    return tmp_path / "slide.svs"


def whole_grid(info):
    mask = np.ones((info.bounds[3] // 8, info.bounds[2] // 8), dtype=bool)
    config = TileGridConfig(tile_size_px=128, tile_mpp=1.0)
    downsample = info.tile_downsample(config.tile_mpp)
    return make_tile_grid(mask, mask_downsample=8.0, bounds=info.bounds, tile_downsample=downsample, config=config)


def test_the_heatmap_is_red_where_values_are_high(tmp_path, slide):
    with SlideReader(slide) as reader:
        grid = whole_grid(reader.info)
    figures.draw_slide_heatmap(slide, grid, grid.tile_xy[:, 0], tmp_path / "heat.png", overview_mpp=4.0)
    picture = pixels(tmp_path / "heat.png").astype(int)
    low, high = picture[:, :30].mean(axis=(0, 1)), picture[:, -30:].mean(axis=(0, 1))
    assert high[0] > high[2]
    assert low[2] > high[2]
    assert picture.shape[:2] == (128, 192)


def test_the_grid_outlines_tiles(tmp_path, slide):
    with SlideReader(slide) as reader:
        grid = whole_grid(reader.info)
    figures.draw_slide_grid(slide, grid, tmp_path / "grid.png", overview_mpp=4.0)
    picture = pixels(tmp_path / "grid.png")
    is_outline = (picture == (20, 120, 20)).all(axis=-1)
    assert is_outline.sum(axis=0).argmax() % 32 in (0, 31)
    assert 0 < is_outline.mean() < 0.2


@pytest.mark.skipif(not REAL_SLIDE.exists(), reason="the real slides are not on this machine")
def test_a_real_slide_is_drawn_as_jpeg(tmp_path):
    with SlideReader(REAL_SLIDE) as reader:
        grid = make_tile_grid(
            np.ones((100, 100), dtype=bool),
            mask_downsample=max(reader.info.bounds[2:]) / 100,
            bounds=reader.info.bounds,
            tile_downsample=reader.info.tile_downsample(4.0),
            config=TileGridConfig(tile_mpp=4.0),
        )
    figures.draw_slide_grid(REAL_SLIDE, grid, tmp_path / "grid.jpg")
    assert (tmp_path / "grid.jpg").read_bytes()[:3] == b"\xff\xd8\xff"


class Page(HTMLParser):
    """What a browser would see: tags in balance, links, and text."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.text = [], [], ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data

    def all(self, tag):
        return [attributes for name, attributes in self.tags if name == tag]


@pytest.fixture
def report(tmp_path):
    noise = np.random.default_rng(0).integers(0, 255, (900, 1600, 3)).astype(np.uint8)
    figures.save_image(noise, tmp_path / "large.png")
    figures.save_image(
        (colormaps["viridis"](np.linspace(0, 1, 64))[None, :, :3] * 255).astype(np.uint8), tmp_path / "s.png"
    )
    small, large = Picture(tmp_path / "s.png", "A <small> one"), Picture(tmp_path / "large.png", "A large one")
    sections = [
        Section(
            "What & why", [Paragraph("First.\n\nSecond <script>alert(1)</script>."), Commands(["a < b", "c"], "Do:")]
        ),
        Section("Results", [Table(("task", "score"), [("probe", "1"), ("probe", "2"), ("text", "3")], "Note.")]),
        Section("Pictures", [PictureRow([small, large]), Confusion(["x", "y"], [[3, 1], [0, 0]], "Rows are right.")]),
        Section(
            "Nearest", [NearestReports("slide-1", [(0.9, 'Grade 3.\nNo "mucin"', True), (0.1, "Other", False)], small)]
        ),
    ]
    path = write_html_report(tmp_path / "out" / "index.html", title="A & B", summary="Short.", sections=sections)
    return path.read_text(encoding="utf-8")


def test_the_report_is_balanced_and_holds_everything(report):
    page = Page(report)
    assert page.open == []
    for text in ("A & B", "Short.", "Second <script>alert(1)</script>.", "a < b\nc", 'No "mucin"', "slide-1", "0.900"):
        assert text in page.text
    assert [link["href"] for link in page.all("a")] == [f"#{part['id']}" for part in page.all("section")]
    shares = [cell["style"] for cell in page.all("td") if "style" in cell]
    assert shares == ["--share:0.750", "--share:0.250", "--share:0.000", "--share:0.000"]
    # A name is said once for the rows that it covers.
    assert page.text.count("probe") == 1


def test_the_report_loads_nothing_and_runs_nothing(report):
    page = Page(report)
    assert not page.all("script")
    assert not page.all("link")
    assert "http" not in report
    assert "url(" not in report
    for image in page.all("img"):
        assert image["src"].startswith("data:image/")
        assert image["alt"]


def test_large_pictures_are_reduced_and_small_ones_kept(report, tmp_path):
    small, large, again = (base64.b64decode(image["src"].partition(",")[2]) for image in Page(report).all("img"))
    assert small == again == (tmp_path / "s.png").read_bytes()
    assert (tmp_path / "large.png").stat().st_size > 1_000_000 > len(large)


def test_the_report_refuses_ragged_tables_and_other_files(tmp_path):
    def write(block):
        write_html_report(tmp_path / "r.html", title="t", sections=[Section("s", [block])])

    with pytest.raises(ValueError, match="expected 2 cells"):
        write(Table(("a", "b"), [("1",)]))
    with pytest.raises(ValueError, match="expected 2 x 2 counts"):
        write(Confusion(["a", "b"], [[1, 2]]))
    (tmp_path / "x.svg").write_text("<svg/>")
    with pytest.raises(ValueError, match="expected a PNG or JPEG"):
        write(Picture(tmp_path / "x.svg", "x"))
    assert not (tmp_path / "r.html").exists()
