# SPDX-License-Identifier: Apache-2.0
"""The viewer over HTTP: pixels against OpenSlide's Deep Zoom, matches against tiles deleted one by one."""

import asyncio
import io
import json
import os
import re
import subprocess
import sys
import threading
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import openslide
import PIL.Image
import pytest
import torch
import yaml
from openslide.deepzoom import DeepZoomGenerator

from dre_slcl.training.viewer import slide_pyramid
from dre_slcl.training.viewer.slide_pyramid import SlidePyramid
from dre_slcl.training.viewer.view_slides import build_viewer, list_slides
from dre_slcl_cli import main
from modeling_dre_slcl.slide_info import SlideError

from .embedded_cohort import write_embedded_cohort
from .tiny_models import tiny_image_processor, tiny_model, tiny_tokenizer
from .tiny_slide import write_tiny_slide

pytest.importorskip("starlette")
from starlette.testclient import TestClient

from dre_slcl.training.viewer.viewer_app import make_app

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"
LOCAL = "http://127.0.0.1"


@pytest.fixture(scope="module")
def cohort(tmp_path_factory):
    return write_embedded_cohort(tmp_path_factory.mktemp("cohort"))


@pytest.fixture(scope="module")
def client(cohort):
    slides = list_slides(cohort.manifest, None, None)
    viewer = build_viewer(slides, model=str(cohort.model), embeddings=cohort.out, device="cpu")
    with TestClient(make_app(viewer), base_url=LOCAL) as client:
        yield client


def wait_until_ready(client, number=0):
    for _ in range(600):
        state = client.get(f"/api/slides/{number}/state").json()
        if state["state"] != "running":
            return state
        time.sleep(0.05)
    raise AssertionError("the tiles never came")


def check_pixels(path, client, number=0, levels=None):
    """Tiles of some levels are OpenSlide's own, as JPEG."""
    with openslide.OpenSlide(path) as slide:
        reference = DeepZoomGenerator(slide, tile_size=256, overlap=0, limit_bounds=True)
        for level in levels or range(reference.level_count):
            columns, rows = reference.level_tiles[level]
            for column, row in ((0, 0), (columns - 1, rows - 1), (columns // 2, rows // 2)):
                answer = client.get(f"/api/slides/{number}/tiles/{level}/{column}/{row}.jpg")
                assert answer.headers["content-type"] == "image/jpeg"
                expected = io.BytesIO()
                reference.get_tile(level, (column, row)).save(expected, "JPEG", quality=85)
                found, expected = (np.asarray(PIL.Image.open(file)) for file in (io.BytesIO(answer.content), expected))
                np.testing.assert_array_equal(found, expected)


def test_tiles_are_those_of_openslides_deep_zoom(client, cohort):
    check_pixels(cohort.slides["s1"], client, number=1)
    pyramid = SlidePyramid(cohort.slides["s1"], "s1")
    with openslide.OpenSlide(cohort.slides["s1"]) as slide:
        reference = DeepZoomGenerator(slide, tile_size=256, overlap=0, limit_bounds=True)
        assert pyramid.level_sizes == list(reference.level_dimensions)
        for level in range(reference.level_count):
            for column in range(reference.level_tiles[level][0]):
                found, expected = pyramid.tile(level, column, 0), reference.get_tile(level, (column, 0))
                assert found.tobytes() == expected.tobytes()
    pyramid.close()


@pytest.mark.parametrize("name", ["slides_full/lung-scc_HE3.svs", "containers/*.scn", "vendor/CMU-1-Small*.svs"])
def test_real_slides_are_shown_as_openslide_shows_them(name):
    path = next((path for path in SHARED.glob(name) if path.is_file()), None)
    if path is None:
        pytest.skip("no such slide here")
    viewer = build_viewer([("real", path, None)])
    with TestClient(make_app(viewer), base_url=LOCAL) as client:
        about = client.get("/api/slides").json()["slides"][0]
        check_pixels(path, client, levels=range(6, about["num_levels"], 2))


def test_a_slide_without_small_levels_is_never_read_whole_for_a_tile(tmp_path, monkeypatch):
    path = write_tiny_slide(tmp_path / "flat.tif")
    plain = SlidePyramid(path, "flat")
    expected = [plain.tile(level, 0, 0) for level in range(len(plain.level_sizes))]
    monkeypatch.setattr(slide_pyramid, "_MAX_READ_PX", 300 * 300)
    bounded = SlidePyramid(path, "flat")
    for level, tile in enumerate(expected):
        found = bounded.tile(level, 0, 0)
        # OpenSlide's reduced tiles keep their aspect, and so may lack a pixel.
        assert np.abs(np.subtract(found.size, tile.size)).max() <= 1
        if level >= 5:
            same = found.crop((0, 0, *tile.size))
            assert np.abs(np.asarray(same, dtype=float) - np.asarray(tile, dtype=float)).mean() < 12


def test_many_threads_read_the_same_pixels(cohort):
    pyramid = SlidePyramid(cohort.slides["s2"], "s2")
    places = [(len(pyramid.level_sizes) - 1, column, row) for column in range(3) for row in range(2)] * 8
    alone = {place: pyramid.tile(*place).tobytes() for place in set(places)}
    with ThreadPoolExecutor(8) as executor:
        found = list(executor.map(lambda place: pyramid.tile(*place).tobytes(), places))
    assert found == [alone[place] for place in places]
    assert 1 <= len(pyramid._idle) <= 8


def test_a_slide_that_fails_to_read_is_an_answer_and_not_a_crash():
    path = SHARED / "broken" / "openslide_unreadable.svs"
    if not path.is_file():
        pytest.skip("no such slide here")
    try:
        viewer = build_viewer([("broken", path, 0.5)])
    except ValueError as error:
        assert "broken" in str(error)  # noqa: PT017
        return
    with TestClient(make_app(viewer), base_url=LOCAL) as client:
        top = client.get("/api/slides").json()["slides"][0]["num_levels"] - 1
        for _ in range(2):
            answer = client.get(f"/api/slides/0/tiles/{top}/0/0.jpg")
            assert (answer.status_code, answer.json()["error"]) == (422, "broken: unreadable")


def test_the_page_names_only_files_that_are_served_here(client):
    page = client.get("/")
    assert page.headers["content-security-policy"].startswith("default-src 'self'")
    named = re.findall(r'(?:src|href)="([^"]+)"', page.text)
    assert {"page/style.css", "page/zoom.js", "page/panel.js"} <= set(named)
    for name in named:
        if not name.startswith("data:"):
            answer = client.get(f"/{name}")
            assert answer.status_code == 200
            assert not re.findall(r"https?://", answer.text)
    assert "http" not in page.text.replace("http-equiv", "")


@pytest.mark.parametrize(
    "path",
    [
        "/page/../viewer_app.py",
        "/page/%2e%2e%2fviewer_app.py",
        "/page/..%5cviewer_app.py",
        "/page/page/index.html",
        "/etc/passwd",
        "/api/slides/99/thumbnail.jpg",
        "/api/slides/0/tiles/99/0/0.jpg",
        "/api/slides/0/tiles/3/7/0.jpg",
        "/api/slides/-1/thumbnail.jpg",
        "/api/slides/0/tiles/3/0/-1.jpg",
        "/api/slides/s0/thumbnail.jpg",
    ],
)
def test_nothing_else_is_served(client, path):
    assert client.get(path).status_code == 404


def test_another_web_page_cannot_reach_it_by_a_name_of_its_own(client):
    assert client.get("/api/slides", headers={"host": "evil.example"}).status_code == 400
    assert client.post("/api/slides").status_code == 405


def test_codewords_and_places_are_those_of_the_tiles(client, cohort):
    assert wait_until_ready(client, 2) == {"state": "ready", "message": ""}
    found = client.get("/api/slides/2/features").json()
    model = tiny_model(text=True)
    expected = model.encode_slide(
        cohort.slides["s2"], image_processor=tiny_image_processor(), return_tile_features=True
    )
    assert found["tile_xy"] == expected["tile_xy"].tolist()
    assert found["tile_size_level0_px"] == expected["tile_size_level0_px"]
    distances = torch.cdist(expected["tile_features"].double(), model.codebook.double())
    assert found["codewords"] == distances.argmin(dim=1).tolist()
    assert np.bincount(found["codewords"], minlength=4).tolist() == expected["codeword_counts"].tolist()


def text_vector(text):
    tokens = tiny_tokenizer()([text], return_tensors="pt")
    with torch.no_grad():
        return tiny_model(text=True).get_text_features(tokens["input_ids"], tokens["attention_mask"])[0]


def test_a_match_is_what_is_lost_when_a_tile_is_left_out(client, cohort):
    model = tiny_model(text=True)
    encoded = model.encode_slide(
        cohort.slides["s0"], image_processor=tiny_image_processor(), return_tile_features=True
    )
    features = encoded["tile_features"]
    for against, direction in (
        ("", text_vector("a tumor")),
        ("normal tissue", text_vector("a tumor") - text_vector("normal tissue")),
    ):
        found = client.get("/api/slides/0/match", params={"text": "a tumor", "against": against}).json()
        with torch.no_grad():
            whole = model.get_slide_features(features[None]).slide_projection[0] @ direction
            for tile in range(0, len(features), 17):
                left = torch.cat([features[:tile], features[tile + 1 :]])[None]
                without = model.get_slide_features(left).slide_projection[0] @ direction
                assert found["values"][tile] == pytest.approx(float(whole - without), abs=2e-6, rel=2e-3)
        assert found["similarity"] == pytest.approx(float(whole), abs=1e-5)
        assert len(found["values"]) == len(features)


def test_similarity_is_that_of_the_surroundings_taken_for_a_slide(client, cohort):
    found = client.get("/api/slides/0/match", params={"text": "a tumor", "mode": "similarity"}).json()["values"]
    model = tiny_model(text=True)
    encoded = model.encode_slide(
        cohort.slides["s0"], image_processor=tiny_image_processor(), return_tile_features=True
    )
    xy = encoded["tile_xy"].numpy()
    cells = (xy - xy.min(axis=0)) // (4 * encoded["tile_size_level0_px"])
    for tile in range(0, len(xy), 23):
        own = (cells == cells[tile]).all(axis=1)
        if own.sum() < 4:
            assert found[tile] is None
            continue
        with torch.no_grad():
            vector = model.get_slide_features(encoded["tile_features"][own][None]).slide_projection[0]
        assert found[tile] == pytest.approx(float(vector @ text_vector("a tumor")), abs=1e-3)


def test_nearest_slides_and_slides_of_a_text_are_those_of_brute_force(client, cohort):
    model = tiny_model(text=True)
    encoded = [model.encode_slide(path, image_processor=tiny_image_processor()) for path in cohort.slides.values()]
    embeddings = torch.nn.functional.normalize(
        torch.stack([one["slide_embedding"] for one in encoded]).double(), dim=-1
    )
    cosines = embeddings @ embeddings[3]
    found = client.get("/api/slides/3/nearest").json()
    order = [row for row in cosines.argsort(descending=True).tolist() if row != 3]
    assert [(slide["slide_id"], slide["number"]) for slide in found] == [(f"s{row}", row) for row in order]
    assert [slide["score"] for slide in found] == pytest.approx([float(cosines[row]) for row in order], abs=1e-5)
    similar = torch.stack([one["slide_projection"] for one in encoded]) @ text_vector("tumor")
    found = client.get("/api/slides/3/match", params={"text": "tumor"}).json()["slides"]
    assert [slide["number"] for slide in found] == similar.argsort(descending=True).tolist()


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({}, "Give a text"),
        ({"text": "  "}, "Give a text"),
        ({"text": "x" * 5000}, "Give a text"),
        ({"text": "tumor", "mode": "x"}, "mode: expected one of"),
    ],
)
def test_wrong_questions_are_answered_in_one_line(client, params, message):
    answer = client.get("/api/slides/0/match", params=params)
    assert answer.status_code == 400
    assert message in answer.json()["error"]


def test_without_stored_tiles_a_slide_is_encoded_when_it_is_looked_at(cohort):
    viewer = build_viewer([("other", cohort.slides["s4"], None)], model=str(cohort.model), device="cpu")
    with TestClient(make_app(viewer), base_url=LOCAL) as client:
        assert wait_until_ready(client)["state"] == "ready"
        expected = tiny_model(text=True).encode_slide(
            cohort.slides["s4"], image_processor=tiny_image_processor(), return_tile_features=True
        )
        assert client.get("/api/slides/0/features").json()["tile_xy"] == expected["tile_xy"].tolist()
        assert client.get("/api/slides/0/nearest").json() == []


def test_a_slide_without_tissue_is_shown_and_its_refusal_said(cohort, tmp_path):
    path = write_tiny_slide(tmp_path / "empty.tif", tissue=False)
    viewer = build_viewer([("empty", path, None)], model=str(cohort.model), device="cpu")
    with TestClient(make_app(viewer), base_url=LOCAL) as client:
        state = wait_until_ready(client)
        assert state["state"] == "failed"
        assert "no_tissue" in state["message"]
        assert client.get("/api/slides/0/features").status_code == 400
        assert client.get("/api/slides/0/thumbnail.jpg").status_code == 200


def test_without_a_model_there_are_pixels_only(cohort, tmp_path):
    viewer = build_viewer([("s0", cohort.slides["s0"], None), ("gone", tmp_path / "gone.svs", None)])
    with TestClient(make_app(viewer), base_url=LOCAL) as client:
        about = client.get("/api/slides").json()
        assert [slide["slide_id"] for slide in about["slides"]] == ["s0"]
        assert not about["has_model"]
        assert "--model" in client.get("/api/slides/0/features").json()["error"]


def test_pixels_come_while_the_model_is_at_work(cohort):
    viewer = build_viewer([("s0", cohort.slides["s0"], None)])
    release = threading.Event()

    async def both():
        busy = asyncio.ensure_future(viewer.compute(release.wait))
        picture = await asyncio.wait_for(viewer.read(viewer.slides[0].pyramid.thumbnail_jpeg, 100), 30)
        assert not busy.done()
        release.set()
        await busy
        return picture

    assert asyncio.run(both()).startswith(b"\xff\xd8")
    viewer.close()


def test_what_is_missing_is_said_in_one_line(cohort, tmp_path, caplog, monkeypatch):
    assert main(["view", str(tmp_path / "gone.svs")]) == 1
    assert main(["view", str(cohort.manifest), "--embeddings", str(cohort.out)]) == 1
    assert "--embeddings needs --model" in caplog.text
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    assert main(["view", str(cohort.manifest)]) == 1
    assert "pip install 'dre-slcl[viewer]'" in caplog.text
    assert "Traceback" not in caplog.text


def test_a_refused_slide_alone_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="No slide to show: gone: not_a_file"):
        build_viewer([("gone", tmp_path / "gone.svs", None)])
    with pytest.raises(SlideError):
        SlidePyramid(tmp_path / "gone.svs", "gone")


@pytest.mark.slow
def test_a_space_is_whole_and_serves_the_page(cohort, tmp_path):
    space = tmp_path / "space"
    options = ["--model", str(cohort.model), "--embeddings", str(cohort.out), "--make-space", str(space)]
    assert main(["view", str(cohort.manifest), *options]) == 0
    front = yaml.safe_load((space / "README.md").read_text(encoding="utf-8").split("---")[1])
    assert (front["sdk"], front["app_port"]) == ("docker", 7860)
    required = (space / "requirements.txt").read_text()
    assert {"torch", "starlette", "uvicorn", "openslide-python"} <= set(re.findall(r"^[\w-]+", required, re.MULTILINE))
    assert "pytest" not in required
    assert "EXPOSE 7860" in (space / "Dockerfile").read_text()
    for path in space.rglob("*"):
        if path.suffix in (".json", ".txt", ".md", ".py"):
            assert str(tmp_path) not in path.read_text(encoding="utf-8"), path
    code = "import socket; s = socket.socket(); s.bind(('127.0.0.1', 0)); print(s.getsockname()[1])"
    port = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
    environment = {**os.environ, "PORT": port}
    with subprocess.Popen([sys.executable, "app.py"], cwd=space, env=environment, stderr=subprocess.PIPE) as served:
        try:
            about = read_when_served(f"http://127.0.0.1:{port}/api/slides", served)
        finally:
            served.terminate()
    assert [slide["slide_id"] for slide in about["slides"]] == list(cohort.slides)
    assert about["has_text"]
    assert about["has_index"]
    assert main(["view", str(cohort.manifest), *options]) == 1  # it is there already


def read_when_served(address, process, *, seconds=180):
    for _ in range(seconds * 2):
        assert process.poll() is None, process.stderr.read().decode()
        try:
            with urllib.request.urlopen(address, timeout=10) as answer:
                return json.load(answer)
        except OSError:
            time.sleep(0.5)
    raise AssertionError(f"{address} never answered")
