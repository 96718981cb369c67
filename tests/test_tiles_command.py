# SPDX-License-Identifier: Apache-2.0
"""`dre-slcl tiles` as a program: exit statuses, signals, strictness, full disks, hidden names."""

import errno
import json
import signal
import stat
import subprocess
import sys
import time

import pyarrow.parquet as pq
import pytest

from dre_slcl.training import slide_part
from dre_slcl.training.dataset_info import read_dataset_info
from dre_slcl.training.private_ids import read_private_paths
from dre_slcl_cli import main

from .slide_cohort import build, parquet_hashes, write_cohort, write_slide


@pytest.fixture
def manifest(tmp_path):
    return write_cohort(tmp_path / "cohort")


def tiles(*arguments):
    return main(["tiles", *map(str, arguments), "--tile-size", "64", "--mpp", "1", "--num-workers", "0"])


def test_exit_statuses(manifest, tmp_path, caplog, capsys):
    slides = tmp_path / "slides"
    slides.mkdir()
    write_slide(slides / "a.tif", 1)
    assert tiles("--slides", slides, "--out", tmp_path / "whole") == 0
    assert tiles("--slides", slides, "--out", tmp_path / "whole") == 0
    assert "nothing to do" in capsys.readouterr().out
    assert tiles("--slides", manifest, "--out", tmp_path / "partial") == 3
    assert "refused, no_tissue: 1" in capsys.readouterr().out
    assert tiles("--slides", tmp_path / "absent", "--out", tmp_path / "failed") == 1
    for wrong in (["--shard", "3/2"], ["--jpeg-quality", "0"], ["--min-tissue", "2"], ["--slide-mpp", "100"]):
        assert tiles("--slides", slides, "--out", tmp_path / "wrong", *wrong) == 2
        assert wrong[0][2:].replace("-", "_") in caplog.text.replace("-", "_")
    for wrong in (["--pixels", "jpeg"], ["--join", "x"]):
        with pytest.raises(SystemExit) as stopped:
            tiles("--slides", slides, "--out", tmp_path / "wrong", *wrong)
        assert stopped.value.code == 2
    assert not (tmp_path / "wrong").exists()


def test_shares_by_command(manifest, tmp_path):
    for i in (1, 2):
        assert tiles("--slides", manifest, "--out", tmp_path / f"share{i}", "--shard", f"{i}/2") in (0, 3)
    shares = [str(tmp_path / f"share{i}") for i in (1, 2)]
    assert main(["tiles", "--join", *shares, "--out", str(tmp_path / "j")]) == 3
    tiles("--slides", manifest, "--out", tmp_path / "whole")
    assert parquet_hashes(tmp_path / "j") == parquet_hashes(tmp_path / "whole")


def test_strict_leaves_an_older_dataset_as_it_is_and_loses_no_work(manifest, tmp_path, monkeypatch):
    out, slides = tmp_path / "out", tmp_path / "slides"
    slides.mkdir()
    write_slide(slides / "s0.tif", 99)
    assert tiles("--slides", slides, "--out", out, "--strict") == 0
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    assert tiles("--slides", manifest, "--out", out, "--strict") == 4
    assert {path: path.read_bytes() for path in before} == before
    read_dataset_info(out)
    assert len((out / ".parts" / "refused.jsonl").read_text().splitlines()) == 3
    read = []
    tile = slide_part.tile_one_slide
    monkeypatch.setattr(slide_part, "tile_one_slide", lambda task: read.append(task.slide_id) or tile(task))
    assert tiles("--slides", manifest, "--out", out) == 3
    assert sorted(read) == ["blank", "broken"]
    build(manifest, tmp_path / "fresh")
    assert parquet_hashes(out) == parquet_hashes(tmp_path / "fresh")


def test_a_full_disk_is_one_line_and_status_5(manifest, tmp_path, monkeypatch, caplog):
    write = slide_part.TileTableWriter.write_group
    written = []

    def fill(self, *args, **kwargs):
        written.append(args)
        if len(written) > 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        write(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(slide_part.TileTableWriter, "write_group", fill)
        assert tiles("--slides", manifest, "--out", tmp_path / "out") == 5
    message = caplog.records[-1].getMessage()
    assert "\n" not in message
    assert str(tmp_path / "out") in message
    needed, free = (int(word) for word in message.split() if word.isdigit())
    assert 0 < needed < 10_000_000 < free
    assert not list((tmp_path / "out").rglob(".tmp-*"))
    assert tiles("--slides", manifest, "--out", tmp_path / "out") == 3
    build(manifest, tmp_path / "fresh")
    assert parquet_hashes(tmp_path / "out") == parquet_hashes(tmp_path / "fresh")


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signals_keep_what_is_done(number, status, tmp_path):
    slides = tmp_path / "slides"
    slides.mkdir()
    for i in range(12):
        write_slide(slides / f"s{i:02}.tif", i, size=1024)
    command = [sys.executable, "-m", "dre_slcl_cli", "tiles", "--slides", str(slides), "--out", str(tmp_path / "out")]
    command += ["--tile-size", "16", "--mpp", "1"]
    with subprocess.Popen([*command, "--num-workers", "1"], stderr=subprocess.PIPE, text=True) as process:
        while not list((tmp_path / "out" / ".parts").glob("s*.json")) and process.poll() is None:
            time.sleep(0.002)
        process.send_signal(number)
        error = process.communicate(timeout=60)[1]
    assert process.returncode == status, error
    assert "Traceback" not in error
    parts = tmp_path / "out" / ".parts"
    done = list(parts.glob("s*.json"))
    assert 1 <= len(done) < 12
    assert not (parts / "members").exists()
    assert not list((parts / "claims").glob("*"))
    assert tiles("--slides", slides, "--out", tmp_path / "out", "--tile-size", "16") == 0


def test_hidden_names_are_nowhere_in_the_dataset(tmp_path):
    slides = tmp_path / "slides"
    slides.mkdir()
    for name in ("MEIER-1970", "SCHULZE-1955"):
        write_slide(slides / f"{name}.tif", len(name))
    (slides / "MEIER-broken.tif").write_bytes(b"II*\0broken")
    write_slide(slides / "MEIER-blank.tif", 5, is_blank=True)
    (tmp_path / "m.csv").write_text(
        "slide_id,path,case_id,split\nMEIER-1970,slides/MEIER-1970.tif,MEIER,train\n"
        "SCHULZE-1955,slides/SCHULZE-1955.tif,SCHULZE,test\nMEIER-broken,slides/MEIER-broken.tif,MEIER,train\n"
        "MEIER-blank,slides/MEIER-blank.tif,MEIER,train\n"
    )
    out = tmp_path / "out"
    assert tiles("--slides", tmp_path / "m.csv", "--out", out, "--hash-ids") == 3
    for path in out.rglob("*"):
        assert not any(name in str(path) for name in ("MEIER", "SCHULZE"))
        assert path.is_dir() or not any(name in path.read_bytes() for name in (b"MEIER", b"SCHULZE")), path
    private = tmp_path / "out.private.json"
    assert stat.S_IMODE(private.stat().st_mode) == 0o600
    rows = [row for path in out.glob("slides/*.parquet") for row in pq.read_table(path).to_pylist()]
    paths = read_private_paths(private)
    assert {paths[row["slide_id"]].name for row in rows} == {path.name for path in slides.iterdir()}
    assert len({row["case_id"] for row in rows}) == 2
    assert all(row["path"] == f"{row['slide_id']}.tif" for row in rows)
    hashes = parquet_hashes(out)
    assert tiles("--slides", tmp_path / "m.csv", "--out", tmp_path / "again", "--hash-ids", private) == 3
    assert parquet_hashes(tmp_path / "again") == hashes
    assert tiles("--slides", tmp_path / "m.csv", "--out", tmp_path / "key2", "--hash-ids", tmp_path / "k.json") == 3
    assert parquet_hashes(tmp_path / "key2") != hashes  # another key, other names
    assert tiles("--slides", tmp_path / "m.csv", "--out", out, "--hash-ids", out / "k.json") == 1
    private.write_text(json.dumps([]))
    assert tiles("--slides", tmp_path / "m.csv", "--out", out, "--hash-ids") == 1
