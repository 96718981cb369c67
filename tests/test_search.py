# SPDX-License-Identifier: Apache-2.0
"""Search against rankings by brute force in float64, and regions against slides made of the same tiles."""

import json
import re

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file, save_file

from dre_slcl.training.search_index import EmbeddingIndex, nearest
from dre_slcl.training.search_page import Hit, write_search_page
from dre_slcl.training.search_regions import encode_regions
from dre_slcl.training.stored_features import StoredTiles, read_stored_tiles, stored_file
from dre_slcl_cli import main

from .embedded_cohort import REPORTS, write_embedded_cohort, write_slide
from .tiny_models import tiny_image_processor, tiny_model, tiny_tokenizer


@pytest.fixture(scope="module")
def cohort(tmp_path_factory):
    return write_embedded_cohort(tmp_path_factory.mktemp("cohort"))


@pytest.fixture(scope="module")
def vectors(cohort):
    """Per slide, what the model gives for its file."""
    model = tiny_model(text=True)
    return {
        slide_id: model.encode_slide(path, image_processor=tiny_image_processor())
        for slide_id, path in cohort.slides.items()
    }


def text_vector(text):
    model = tiny_model(text=True)
    tokens = tiny_tokenizer()([text], return_tensors="pt")
    with torch.no_grad():
        return model.get_text_features(tokens["input_ids"], tokens["attention_mask"])[0].double().numpy()


def search(cohort, *arguments, capsys):
    capsys.readouterr()
    assert main(["search", *map(str, arguments), "--index", str(cohort.out), "--device", "cpu"]) == 0
    return json.loads(capsys.readouterr().out)["results"]


def brute_force(query, gallery):
    """Cosines, largest first, and rows, one by one."""
    cosines = [float(np.dot(query, row) / np.linalg.norm(query) / np.linalg.norm(row)) for row in gallery]
    order = sorted(range(len(cosines)), key=lambda row: (-cosines[row], row))
    return [cosines[row] for row in order], order


@pytest.mark.parametrize("backend", ["numpy", "faiss"])
@pytest.mark.parametrize(("num_rows", "top_k"), [(1, 3), (7, 7), (700, 10)])
def test_neighbours_are_those_of_brute_force(backend, num_rows, top_k):
    if backend == "faiss":
        pytest.importorskip("faiss")
    rng = np.random.default_rng(num_rows)
    gallery, queries = rng.normal(size=(num_rows, 24)).astype(np.float32), rng.normal(size=(300, 24))
    gallery[num_rows // 2 :: 50] = gallery[0]  # equal ones: the first wins
    gallery *= rng.uniform(0.1, 10, size=(num_rows, 1))
    scores, rows = nearest(queries, gallery, top_k, backend=backend)
    unit = gallery.astype(np.float64) / np.linalg.norm(gallery.astype(np.float64), axis=1, keepdims=True)
    for query, found_scores, found in zip(queries, scores, rows, strict=True):
        expected, order = brute_force(query, unit)
        np.testing.assert_allclose(found_scores, expected[:top_k], rtol=0, atol=1e-12)
        np.testing.assert_allclose([unit[row] @ query for row in found], [unit[row] @ query for row in order[:top_k]])


def test_both_backends_give_the_same_rows():
    pytest.importorskip("faiss")
    rng = np.random.default_rng(0)
    gallery, queries = rng.normal(size=(2000, 64)), rng.normal(size=(50, 64))
    gallery[1000:1003] = gallery[17]
    first, second = (nearest(queries, gallery, 25, backend=backend)[1] for backend in ("numpy", "faiss"))
    np.testing.assert_array_equal(first, second)


def test_vectors_of_other_spaces_are_refused():
    with pytest.raises(ValueError, match="come from different models"):
        nearest(np.ones((1, 3)), np.ones((2, 4)), 1)
    with pytest.raises(ValueError, match="top_k"):
        nearest(np.ones((1, 3)), np.ones((2, 3)), 0)


def test_a_text_finds_slides_in_the_order_of_brute_force(cohort, vectors, capsys):
    found = search(
        cohort, "a tumor", "--model", cohort.model, "--top-k", 3, "--slides", cohort.manifest, capsys=capsys
    )
    cosines, order = brute_force(text_vector("a tumor"), [v["slide_projection"].double() for v in vectors.values()])
    assert [hit["slide_id"] for hit in found] == [f"s{row}" for row in order[:3]]
    assert [hit["score"] for hit in found] == pytest.approx(cosines[:3], abs=1e-5)
    assert [hit["rank"] for hit in found] == [1, 2, 3]
    assert [hit.get("report", "") for hit in found] == [REPORTS[row] for row in order[:3]]
    assert [hit["case_id"] for hit in found] == [f"c{row // 2}" for row in order[:3]]


def test_a_slide_finds_like_slides_with_and_without_those_of_its_case(cohort, vectors, capsys):
    embeddings = [one["slide_embedding"].double() for one in vectors.values()]
    _, order = brute_force(embeddings[2], embeddings)
    found = search(cohort, "--like", "s2", capsys=capsys)
    assert [hit["slide_id"] for hit in found] == [f"s{row}" for row in order if row != 2]
    found = search(cohort, "--like", "s2", "--other-cases", capsys=capsys)
    assert [hit["slide_id"] for hit in found] == [f"s{row}" for row in order if row not in (2, 3)]


def test_a_new_slide_is_encoded_and_compared(cohort, vectors, tmp_path, capsys):
    new = write_slide(tmp_path / "new.tif", 99)
    embedding = tiny_model(text=True).encode_slide(new, image_processor=tiny_image_processor())["slide_embedding"]
    cosines, order = brute_force(embedding.double(), [one["slide_embedding"].double() for one in vectors.values()])
    found = search(cohort, "--slide", new, "--model", cohort.model, capsys=capsys)
    assert [hit["slide_id"] for hit in found] == [f"s{row}" for row in order]
    assert [hit["score"] for hit in found] == pytest.approx(cosines, abs=1e-5)


def test_a_slide_finds_reports_each_once(cohort, vectors, capsys):
    options = ["--find", "reports", "--model", cohort.model, "--slides", cohort.manifest]
    found = search(cohort, "--like", "s1", *options, capsys=capsys)
    reports = list(dict.fromkeys(report for report in REPORTS if report))
    gallery = [text_vector(report) for report in reports]
    cosines, order = brute_force(vectors["s1"]["slide_projection"].double().numpy(), gallery)
    assert [hit["report"] for hit in found] == [reports[row] for row in order]
    assert [hit["score"] for hit in found] == pytest.approx(cosines, abs=1e-5)


def test_regions_are_encoded_as_slides_of_their_tiles():
    model = tiny_model()
    rng = np.random.default_rng(0)
    places = np.array([(x, y) for y in range(9) for x in range(7) if rng.random() < 0.8])
    tile_xy = (places * 32.4).round().astype(np.int32) + np.array([1000, 300], dtype=np.int32)
    features = torch.nn.functional.normalize(torch.randn(len(places), 32), dim=-1)
    regions = encode_regions(model, StoredTiles("s", features.numpy(), tile_xy, 32), region_tiles=3)
    # Here by the tiles' places in the grid, one region after the other.
    expected = {}
    for row in range(3):
        for column in range(3):
            own = [k for k, (x, y) in enumerate(places) if (x // 3, y // 3) == (column, row)]
            if len(own) >= 9 / 4:
                with torch.no_grad():
                    expected[row, column] = own, model.get_slide_features(features[own][None]).slide_projection[0]
    assert len(regions.projection) == len(expected) > 6
    for place, (own, projection) in enumerate(expected.values()):
        torch.testing.assert_close(regions.projection[place], projection, rtol=0, atol=1e-5)
        assert regions.num_tiles[place] == len(own)
        assert (regions.region_of_tile[own] == place).all()
    assert (regions.region_xy[:, 0].min(), regions.region_xy[:, 1].min()) == (1000, 300)
    single = encode_regions(model, StoredTiles("s", features.numpy(), tile_xy, 32), region_tiles=1)
    assert len(single.projection) == len(features)
    assert (single.num_tiles == 1).all()


def test_a_text_finds_regions_over_all_slides(cohort, capsys):
    options = ["--find", "regions", "--model", cohort.model, "--region-tiles", 3, "--top-k", 7]
    found = search(cohort, "a tumor", *options, capsys=capsys)
    model = tiny_model(text=True)
    text = text_vector("a tumor")
    candidates = []
    for slide_id in cohort.slides:
        stored = load_file(cohort.out / "embeddings" / f"{slide_id}.safetensors")
        xy = stored["tile_xy"].numpy()
        cells = (xy - xy.min(axis=0)) // (3 * 32)
        for cell in np.unique(cells, axis=0):
            own = (cells == cell).all(axis=1)
            if own.sum() >= 9 / 4:
                with torch.no_grad():
                    vector = model.get_slide_features(stored["tile_features"][own][None]).slide_projection[0]
                corner = cell * 96 + xy.min(axis=0)
                candidates.append((float(vector.double().numpy() @ text), slide_id, corner.tolist(), int(own.sum())))
    candidates.sort(key=lambda one: -one[0])
    assert len(candidates) > 30
    assert [(hit["slide_id"], hit["xy"], hit["num_tiles"]) for hit in found] == [one[1:] for one in candidates[:7]]
    assert [hit["score"] for hit in found] == pytest.approx([one[0] for one in candidates[:7]], abs=1e-5)
    assert {hit["size_level0_px"] for hit in found} == {96}
    within = search(cohort, "a tumor", *options, "--within", "s3", capsys=capsys)
    assert [hit["xy"] for hit in within] == [one[2] for one in candidates if one[1] == "s3"][:7]


def test_the_page_holds_its_pictures_and_escapes_text(cohort, tmp_path):
    page = tmp_path / "results.html"
    options = ["--index", cohort.out, "--model", cohort.model, "--slides", cohort.manifest, "--device", "cpu"]
    assert main(["search", "<script>tumor</script>", *map(str, options), "--out", str(page)]) == 0
    text = page.read_text()
    assert "<script" not in text
    assert "&lt;script&gt;tumor" in text
    assert "&lt;b&gt;tissue&lt;/b&gt;" in text
    assert len(re.findall(r'<img alt="s\d" src="data:image/jpeg;base64,', text)) == 5
    assert not re.findall(r"(?:src|href)=\"(?!data:)", text)
    assert "http" not in text.replace("http-equiv", "")
    regions = [*map(str, options), "--find", "regions", "--top-k", "2", "--out", str(page)]
    assert main(["search", "tumor", *regions]) == 0
    assert page.read_text().count("<img") == 4


def test_a_slide_without_a_readable_file_is_shown_without_picture(tmp_path):
    hits = [Hit(1, 0.5, "gone", "case"), Hit(2, 0.25, "unknown", "case")]
    page = write_search_page(
        tmp_path / "r.html", title="t", summary="", hits=hits, slides={"gone": tmp_path / "no.svs"}
    )
    assert "no picture: not_a_file" in page.read_text()
    assert "give the slides with --slides" in page.read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "Give one thing to search by"),
        (["tumor", "--like", "s0"], "Give one thing to search by"),
        (["  ", "--model", "m"], "is empty"),
        (["tumor"], "Give --model"),
        (["--like", "s0", "--find", "regions"], "Regions are found by a text"),
        (["tumor", "--model", "m", "--find", "reports"], "give it with --slides"),
        (["--like", "s9"], "holds no slide 's9'"),
        (["--like", "s0", "--out", "found.txt"], "ends in .html or .json"),
        (["--like", "s0", "--top-k", "0"], "--top-k"),
    ],
)
def test_refuses_what_does_not_fit_together(cohort, arguments, message, caplog):
    assert main(["search", *arguments, "--index", str(cohort.out)]) == 1
    assert message in caplog.text
    assert "Traceback" not in caplog.text


def test_refuses_a_folder_without_embeddings_and_other_weights(cohort, tmp_path, caplog):
    assert main(["search", "--like", "s0", "--index", str(tmp_path)]) == 1
    assert "no slides.parquet" in caplog.text
    tiny_model(seed=5, text=True).save_pretrained(tmp_path / "other")
    assert main(["search", "tumor", "--model", str(tmp_path / "other"), "--index", str(cohort.out)]) == 1
    assert "was embedded with other weights" in caplog.text


def test_a_model_without_text_says_so(tmp_path, caplog):
    cohort = write_embedded_cohort(tmp_path / "plain", text=False)
    assert main(["search", "tumor", "--model", str(cohort.model), "--index", str(cohort.out), "--device", "cpu"]) == 1
    assert "ships without a text model" in caplog.text


def test_damaged_tables_and_files_are_named(cohort, tmp_path):
    table = pq.read_table(cohort.out / "slides.parquet")
    broken = tmp_path / "broken"
    broken.mkdir()
    pq.write_table(table.drop_columns(["slide_projection"]), broken / "slides.parquet")
    with pytest.raises(ValueError, match=r"slides\.parquet"):
        EmbeddingIndex.open(broken)
    place = table.column_names.index("slide_projection")
    ragged = pa.array([[1.0] * (3 + row % 2) for row in range(len(table))])
    pq.write_table(table.set_column(place, "slide_projection", ragged), broken / "slides.parquet")
    with pytest.raises(ValueError, match="vectors of one width"):
        EmbeddingIndex.open(broken)
    (broken / "embeddings").mkdir()
    config = tiny_model().config
    for tensors, message in (
        ({"slide_embedding": torch.ones(3)}, "holds no tile features"),
        ({"tile_features": torch.ones(4, 7), "tile_xy": torch.zeros(4, 2)}, "32"),
    ):
        save_file(tensors, broken / "embeddings" / "s0.safetensors")
        with pytest.raises(ValueError, match=message):
            read_stored_tiles(stored_file(broken, "s0"), config)
    with pytest.raises(FileNotFoundError, match="embed --tile-features"):
        read_stored_tiles(stored_file(broken, "s1"), config)
