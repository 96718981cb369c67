# SPDX-License-Identifier: Apache-2.0
"""The viewer's page in a real browser, without a network: what it draws and says; skipped without Chromium."""

import io
import json
import re
import shutil
import subprocess
import sys
import urllib.parse
import urllib.request

import numpy as np
import PIL.Image
import pytest

from .embedded_cohort import write_embedded_cohort

pytest.importorskip("uvicorn")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = [pytest.mark.slow, pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed")]

OPTIONS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"),
    *("--disable-component-update", "--disable-sync", "--window-size=1200,800"),
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
)


@pytest.fixture(scope="module")
def cohort(tmp_path_factory):
    return write_embedded_cohort(tmp_path_factory.mktemp("cohort"))


@pytest.fixture(scope="module")
def address(cohort):
    """The page, served by the command."""
    options = ["--model", cohort.model, "--embeddings", cohort.out, "--port", "0", "--device", "cpu"]
    command = [sys.executable, "-m", "dre_slcl_cli", "view", cohort.manifest, *options]
    with subprocess.Popen(list(map(str, command)), stderr=subprocess.PIPE, text=True) as served:
        try:
            for line in served.stderr:
                if found := re.search(r"Open (http://127\.0\.0\.1:\d+)", line):
                    yield found.group(1)
                    break
            else:
                raise AssertionError("the viewer ended")
        finally:
            served.terminate()


def browse(address, tmp_path, option, is_done, **query):
    """Runs the browser until the page is complete: its clock may run ahead of a busy machine."""
    url = f"{address}/?{urllib.parse.urlencode(query)}"
    for attempt in range(4):
        profile = f"--user-data-dir={tmp_path / f'profile-{attempt}'}"
        command = [CHROMIUM, *OPTIONS, f"--virtual-time-budget={10_000 * 2**attempt}", profile, option, url]
        printed = subprocess.run(command, capture_output=True, text=True, check=True, timeout=200).stdout
        if is_done(printed):
            break
    return printed


def dump(address, tmp_path, **query):
    return browse(address, tmp_path, "--dump-dom", lambda dom: "Similarity of the slide" in dom, **query)


def screenshot(address, tmp_path, **query):
    path = tmp_path / "page.png"

    def pixels():
        # Without the panel and the overview.
        return np.asarray(PIL.Image.open(path).convert("RGB"), dtype=float)[60:600, 60:800]

    browse(address, tmp_path, f"--screenshot={path}", lambda _: pixels().std() > 10, **query)
    return pixels()


def stitch(address, columns, rows):
    """The finest level of s1, from its tiles."""
    whole = PIL.Image.new("RGB", (256 * columns, 256 * rows))
    for row in range(rows):
        for column in range(columns):
            with urllib.request.urlopen(f"{address}/api/slides/1/tiles/10/{column}/{row}.jpg") as answer:
                whole.paste(PIL.Image.open(io.BytesIO(answer.read())), (256 * column, 256 * row))
    return np.asarray(whole, dtype=float)


def test_it_says_what_matches_and_names_slides(address, tmp_path):
    dom = dump(address, tmp_path, slide="s1", text="a tumor", against="normal tissue")
    with urllib.request.urlopen(f"{address}/api/slides/1/match?text=a%20tumor&against=normal%20tissue") as answer:
        expected = json.load(answer)
    assert f"Similarity of the slide: {expected['similarity']:.3f}" in dom
    assert "speaks for" in dom
    listed = re.search(r'id="matching".*?</section>', dom, re.DOTALL).group()
    assert re.findall(r"<span[^>]*>(s\d)</span>", listed) == [slide["slide_id"] for slide in expected["slides"]]
    nearest = re.search(r'id="nearest".*?</section>', dom, re.DOTALL).group()
    assert len(re.findall(r"<img", nearest)) == 4
    assert re.search("768 . 512 px, 0.4 . 0.3 mm", dom)


def test_it_draws_the_slide_and_codewords_over_it(address, tmp_path, cohort):
    plain = screenshot(address, tmp_path, slide="s1", x=384, y=256, um_per_px=0.5)
    reference = stitch(address, columns=3, rows=2)
    with PIL.Image.open(cohort.slides["s1"]) as original:
        assert reference.shape == (original.height, original.width, 3)
    # The panel is 330 px wide. At the slide's own resolution its middle is that of the canvas, pixel by pixel.
    left, top = 384 - (1200 - 330) // 2 + 60, 256 - 800 // 2 + 60
    middle = plain[200:400, 200:500] - reference[top + 200 : top + 400, left + 200 : left + 500]
    assert np.abs(middle).mean() < 1
    codewords = screenshot(address, tmp_path, slide="s1", x=384, y=256, um_per_px=0.5, layer="codewords")
    changed = np.abs(codewords - plain).max(axis=2) > 20
    tissue = reference.min(axis=2) < 200
    assert changed.mean() == pytest.approx(tissue.sum() / changed.size, rel=0.4)


def test_a_name_or_text_cannot_become_code(address, tmp_path):
    dom = dump(address, tmp_path, slide="s1", text="<img src=x onerror=\"document.title='run'\">")
    assert "<title>DRE-SLCL viewer</title>" in dom
    assert "Similarity of the slide" in dom
