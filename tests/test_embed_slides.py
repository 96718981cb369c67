# SPDX-License-Identifier: Apache-2.0
"""`dre-slcl embed`: vectors, tables, refusals, going on after an interruption, and no mixing of options."""

import json
import os
import shutil
import signal
import subprocess
import sys

import pandas as pd
import pyarrow.parquet as pq
import pytest
import torch
from datasets import load_dataset
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import pipeline

from dre_slcl.training import embed_model
from dre_slcl_cli import main
from modeling_dre_slcl import SlideFeatureExtractionPipeline

from .tiny_models import tiny_image_processor, tiny_model
from .tiny_slide import write_tiny_slide

VECTORS = ("slide_embedding", "slide_projection")
KILLED_HALF_WAY = """
import os, signal, sys
from dre_slcl.training import embed_files
from dre_slcl_cli import main

save_file, calls = embed_files.save_file, []

def killed_in_the_second_file(tensors, path, **options):
    save_file(tensors, path, **options)
    calls.append(path)
    if len(calls) == 2:
        path.write_bytes(path.read_bytes()[:500])
        os.kill(os.getpid(), signal.SIGKILL)

embed_files.save_file = killed_in_the_second_file
main(sys.argv[1:])
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    tiny_model().save_pretrained(folder)
    tiny_image_processor().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def slides(tmp_path_factory):
    """Two slides that differ, and one that is no slide."""
    folder = tmp_path_factory.mktemp("slides")
    write_tiny_slide(folder / "one.tif")
    write_tiny_slide(folder / "two.tif")
    with (folder / "two.tif").open("ab") as file:
        file.write(b"\0")  # another file with the same pixels
    (folder / "broken.tif").write_bytes(b"II*\0 this is no slide")
    return folder


@pytest.fixture(scope="module")
def expected(model, slides):
    pipe = pipeline(
        "slide-feature-extraction",
        model=str(model),
        pipeline_class=SlideFeatureExtractionPipeline,
        trust_remote_code=False,
        device="cpu",
    )
    return pipe(slides / "one.tif", return_tile_features=True)


def embed(model, slides, out, *options):
    return main(["embed", "--model", str(model), "--slides", str(slides), "--out", str(out), *options])


def table(out):
    return {row["slide_id"]: row for row in pq.read_table(out / "slides.parquet").to_pylist()}


@pytest.fixture(scope="module")
def embedded(model, slides, tmp_path_factory):
    out = tmp_path_factory.mktemp("out")
    return embed(model, slides, out, "--tile-features"), out


def test_refused_slides_make_the_run_partial(embedded, slides):
    status, out = embedded
    assert status == 3
    assert sorted(path.name for path in out.iterdir()) == [
        *("README.md", "embed.json", "embeddings", "refused.jsonl", "slides.parquet", "summary.json", "summary.md")
    ]
    [refused] = [json.loads(line) for line in (out / "refused.jsonl").read_text().splitlines()]
    row = table(out)["broken"]
    assert (row["status"], row["num_tiles"], row["slide_embedding"]) == ("refused", 0, None)
    assert refused["slide_id"] == "broken"
    assert refused["reason"] == row["reason"]
    assert str(slides / "broken.tif") in refused["message"]


def test_vectors_are_those_of_the_pipeline(embedded, expected):
    _, out = embedded
    assert sorted(path.name for path in (out / "embeddings").iterdir()) == ["one.safetensors", "two.safetensors"]
    for slide_id in ("one", "two"):
        stored, row = load_file(out / "embeddings" / f"{slide_id}.safetensors"), table(out)[slide_id]
        names = {*VECTORS, "residuals", "codeword_counts", "tile_features", "tile_xy"}
        assert set(stored) == names
        for name in names:
            torch.testing.assert_close(stored[name], expected[name], rtol=0, atol=1e-6)
        for name in VECTORS:
            torch.testing.assert_close(torch.tensor(row[name]), expected[name], rtol=0, atol=1e-6)
        assert (row["status"], row["num_tiles"], row["mpp"]) == ("ok", expected["num_tiles"], 0.5)


def test_a_second_run_loads_no_model_and_changes_nothing(embedded, model, slides, tmp_path, monkeypatch):
    _, out = embedded
    for name in ("one.tif", "two.tif"):  # a broken one is tried again, for it may have been mended
        shutil.copyfile(slides / name, tmp_path / name)
    before = {path: path.stat().st_mtime_ns for path in (out / "embeddings").iterdir()}
    rows = table(out)
    monkeypatch.setattr(embed_model, "load_model", lambda *_: pytest.fail("a model was loaded"))
    assert embed(model, tmp_path, out, "--tile-features") == 0
    assert {path: path.stat().st_mtime_ns for path in (out / "embeddings").iterdir()} == before
    assert table(out) == {slide_id: row for slide_id, row in rows.items() if slide_id != "broken"}


def test_other_options_or_other_weights_need_another_folder(embedded, model, slides, tmp_path, caplog):
    _, out = embedded
    assert embed(model, slides, out) == 1
    assert embed(model, slides, out, "--tile-features", "--mpp", "0.4") == 1
    assert caplog.text.count("choose another folder") == 2
    again = tmp_path / "model"
    shutil.copytree(model, again)
    single = slides / "one.tif"
    assert embed(again, single, tmp_path / "out") == 0
    tiny_model(seed=1).save_pretrained(again)  # trained again, in the same place
    assert embed(again, single, tmp_path / "out") == 1
    assert caplog.text.count("choose another folder") == 3


def test_a_single_slide_by_a_relative_path(model, slides, expected, tmp_path, monkeypatch):
    monkeypatch.chdir(slides)
    assert embed(model, "one.tif", tmp_path / "out") == 0
    assert list(table(tmp_path / "out")) == ["one"]
    stored = load_file(tmp_path / "out" / "embeddings" / "one.safetensors")
    assert "tile_features" not in stored
    torch.testing.assert_close(stored["slide_embedding"], expected["slide_embedding"], rtol=0, atol=1e-6)


def test_only_what_has_changed_is_embedded_again(model, slides, tmp_path):
    folder, out = tmp_path / "slides", tmp_path / "out"
    shutil.copytree(slides, folder)
    manifest = folder / "manifest.csv"

    def run(mpp_of_two):
        rows = {"slide_id": ["a", "b"], "path": ["one.tif", "two.tif"], "case_id": ["p", "p"]}
        pd.DataFrame(rows | {"mpp": [None, mpp_of_two]}).to_csv(manifest, index=False)
        assert embed(model, manifest, out) == 0
        return {path.stem: path.stat().st_mtime_ns for path in (out / "embeddings").iterdir()}

    first = run(None)
    assert run(None) == first
    second = run(0.4)  # a corrected resolution
    assert second["a"] == first["a"]
    assert second["b"] > first["b"]
    assert table(out)["b"]["mpp"] == 0.4
    assert table(out)["b"]["case_id"] == "p"
    with (folder / "one.tif").open("ab") as file:
        file.write(b"\0\0")
    third = run(0.4)
    assert third["a"] > second["a"]
    assert third["b"] == second["b"]


def test_nothing_but_refused_slides_is_a_failure(model, slides, tmp_path):
    assert embed(model, slides / "broken.tif", tmp_path / "out") == 1
    assert table(tmp_path / "out")["broken"]["status"] == "refused"


def test_killed_half_way_leaves_no_torn_file_and_goes_on(model, slides, expected, tmp_path):
    out = tmp_path / "out"
    arguments = ["embed", "--model", str(model), "--slides", str(slides), "--out", str(out)]
    environment = os.environ | {"HF_HOME": str(tmp_path / "home")}
    command = [sys.executable, "-c", KILLED_HALF_WAY, *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    complete = [path for path in (out / "embeddings").iterdir() if not path.name.startswith(".")]
    assert [path.stem for path in complete] in (["one"], ["two"])
    with safe_open(complete[0], framework="pt") as stored:
        assert stored.metadata()["slide_id"] == complete[0].stem
    assert len(list((out / "embeddings").iterdir())) == 2  # the torn one under its temporary name
    before = complete[0].stat().st_mtime_ns
    assert main(arguments) == 3
    assert sorted(path.name for path in (out / "embeddings").iterdir()) == ["one.safetensors", "two.safetensors"]
    assert complete[0].stat().st_mtime_ns == before
    stored = load_file(out / "embeddings" / "two.safetensors")
    torch.testing.assert_close(stored["residuals"], expected["residuals"], rtol=0, atol=1e-6)


@pytest.fixture(scope="module")
def cohort(tmp_path_factory):
    """Ten slides, three of them bad in different ways, with a manifest; and the seven good ones alone."""
    folder = tmp_path_factory.mktemp("cohort")
    names = [f"s{number}" for number in range(10)]
    for number, name in enumerate(names):
        path = write_tiny_slide(folder / f"{name}.tif", tissue=number != 4)
        with path.open("ab") as file:
            file.write(bytes([number]))
    (folder / "s2.tif").write_bytes((folder / "s1.tif").read_bytes()[:300])
    (folder / "s7.tif").write_bytes(b"")
    table = pd.DataFrame({"slide_id": names, "path": [f"{name}.tif" for name in names], "grade": [1.0, 2.0] * 5})
    table.to_csv(folder / "all.csv", index=False)
    table[~table.slide_id.isin(["s2", "s4", "s7"])].to_csv(folder / "good.csv", index=False)
    return folder


@pytest.fixture(scope="module")
def whole(model, cohort, tmp_path_factory):
    out = tmp_path_factory.mktemp("whole") / "out"
    assert embed(model, cohort / "all.csv", out, "--num-workers", "1") == 3
    return out


def test_bad_slides_leave_the_rows_of_good_ones_as_they_are(model, cohort, whole, tmp_path):
    assert embed(model, cohort / "good.csv", tmp_path / "out", "--num-workers", "2", "--strict") == 0
    rows = table(whole)
    assert {name: row["reason"] for name, row in rows.items() if row["status"] != "ok"} == {
        "s2": "truncated",
        "s4": "no_tissue",
        "s7": "truncated",
    }
    assert {name: row for name, row in rows.items() if row["status"] == "ok"} == table(tmp_path / "out")
    assert embed(model, cohort / "all.csv", whole, "--strict") == 4


def test_datasets_loads_the_folder(whole, tmp_path):
    rows = load_dataset(str(whole), split="train", cache_dir=str(tmp_path))
    assert rows.num_rows == 10
    assert rows["slide_id"] == [f"s{number}" for number in range(10)]
    assert len(rows[0]["slide_embedding"]) == 32
    assert rows[1]["grade"] == 2.0
    assert rows[2]["slide_embedding"] is None


def test_the_summary_adds_up(model, cohort, tmp_path):
    embed(model, cohort / "all.csv", tmp_path, "--num-workers", "0")
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert (summary["num_slides"], summary["num_embedded"], summary["num_refused"]) == (10, 7, 3)
    assert summary["refused_by_reason"] == {"no_tissue": 1, "truncated": 2}
    assert summary["num_tiles_encoded"] == sum(row["num_tiles"] for row in table(tmp_path).values())
    own = sum(summary["seconds"][name] for name in ("encode", "wait"))
    assert 0 < own <= summary["total_seconds"]
    assert "| encode |" in (tmp_path / "summary.md").read_text()


def test_shares_of_machines_join_to_the_whole(model, cohort, whole, tmp_path, caplog):
    parts = [tmp_path / f"part{index}" for index in (1, 2)]
    for index, part in enumerate(parts, 1):
        assert embed(model, cohort / "all.csv", part, "--shard", f"{index}/2", "--num-workers", "0") in (0, 3)
    join = ["embed", "--join", str(parts[1]), str(parts[0]), "--out", str(tmp_path / "joined")]
    assert main(join) == 3
    assert table(tmp_path / "joined") == table(whole)
    assert list(table(tmp_path / "joined")) == list(table(whole))
    names = sorted(path.name for path in (whole / "embeddings").iterdir())
    assert sorted(path.name for path in (tmp_path / "joined" / "embeddings").iterdir()) == names
    assert main(["embed", "--join", str(parts[0]), "--out", str(tmp_path / "half")]) == 1
    assert "expected each of the 2 shares once, found shares [1]" in caplog.text


def test_hdf5_holds_the_same_numbers(model, cohort, whole, tmp_path):
    h5py = pytest.importorskip("h5py")
    options = ("--format", "h5", "--num-workers", "0", "--tile-features", "--trident", str(tmp_path / "job"))
    assert embed(model, cohort / "s0.tif", tmp_path / "out", *options) == 0
    expected = load_file(whole / "embeddings" / "s0.safetensors")
    with h5py.File(tmp_path / "out" / "embeddings" / "s0.h5") as file:
        assert {*expected, "tile_features", "tile_xy"} == set(file)
        assert all(torch.equal(torch.from_numpy(file[name][()]), value) for name, value in expected.items())
        corners = file["tile_xy"][()]
    run = tmp_path / "job" / "20x_32px_0px_overlap"
    with h5py.File(run / "slide_features_dre_slcl" / "s0.h5") as file:
        assert torch.equal(torch.from_numpy(file["features"][()]), expected["slide_embedding"])
        assert file["coords"].attrs["patch_size_level0"] == 32
        assert (file["coords"][()] == corners).all()
    with h5py.File(run / "features_dre_slcl" / "s0.h5") as file:
        assert file["features"].shape == (len(corners), 32)


def test_a_model_without_a_codebook_is_one_clear_error(slides, tmp_path, caplog):
    model = tiny_model()
    model.codebook.zero_()
    model.save_pretrained(tmp_path / "model")
    tiny_image_processor().save_pretrained(tmp_path / "model")
    assert embed(tmp_path / "model", slides, tmp_path / "out") == 1
    assert "all codewords of its codebook are zero" in caplog.text


@pytest.mark.slow
def test_two_processes_write_what_one_writes(model, cohort, whole, tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "29611"]
    command += ["-m", "dre_slcl.training.embed_slides", "--model", str(model), "--slides", str(cohort / "good.csv")]
    command += ["--out", str(tmp_path / "out"), "--num-workers", "1", "--device", "cpu"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert table(tmp_path / "out") == {name: row for name, row in table(whole).items() if row["status"] == "ok"}
    assert json.loads((tmp_path / "out" / "summary.json").read_text())["num_processes"] == 2
