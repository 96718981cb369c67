# SPDX-License-Identifier: Apache-2.0
"""Workers may die, raise and be orphaned; the others and the parent go on."""

import importlib
import json
import math
import os
import signal
import subprocess
import sys
import textwrap
import time

import pytest

from dre_slcl.training.worker_pool import WorkerCrash, WorkerTimeout, run_in_workers


@pytest.mark.parametrize("num_workers", [0, 1, 3])
def test_every_task_gives_its_result(num_workers):
    results = dict(run_in_workers(math.factorial, list(range(8)), num_workers=num_workers))
    assert results == {i: math.factorial(i) for i in range(8)}
    assert list(run_in_workers(math.factorial, [], num_workers=num_workers)) == []


def test_dead_worker_costs_its_task_only():
    """`raise_signal(0)` does nothing, `raise_signal(9)` kills the worker."""
    tasks = [0, signal.SIGKILL, 0, signal.SIGSEGV, signal.SIGKILL, 0, 0]
    results = dict(run_in_workers(signal.raise_signal, tasks, num_workers=2))
    expected = {i: WorkerCrash(-task) if task else None for i, task in enumerate(tasks)}
    assert results == expected


def test_exit_code_is_reported():
    assert list(run_in_workers(os._exit, [7], num_workers=1)) == [(0, WorkerCrash(7))]


def test_running_script_is_not_imported_by_workers(tmp_path):
    """A script without a guard would run again in each worker, and load torch there."""
    script = tmp_path / "script.py"
    script.write_text(
        "import math\n"
        "from dre_slcl.training.worker_pool import run_in_workers\n"
        "print('started', flush=True)\n"
        "print(sorted(run_in_workers(math.factorial, [3, 4], num_workers=2)))\n"
    )
    found = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, check=True)
    assert found.stdout == "started\n[(0, 6), (1, 24)]\n"
    assert found.stderr == ""


def test_worker_that_cannot_start_is_an_error_not_a_crash_of_each_task():
    with pytest.raises(RuntimeError, match=r"could not start \(exit code -6, SIGABRT\)"):
        list(run_in_workers(math.factorial, [1, 2], num_workers=1, initializer=os.abort))


def test_error_is_raised_in_the_parent():
    with pytest.raises(ValueError, match="not defined for negative"):
        list(run_in_workers(math.factorial, [3, -1], num_workers=1))


TASKS = """
import logging, os, time, warnings
from dre_slcl.training.worker_process import report_progress

def say_and_die(text):
    os.write(2, text.encode())
    os.abort()

def be_noisy(size):
    os.write(2, b"x" * size)
    return size

def crawl(seconds):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        time.sleep(0.1)
        report_progress()
    return seconds

def warn(text):
    logging.getLogger("a.b").info("not this")
    logging.getLogger("a.b").warning("this: %s", text)
"""


@pytest.fixture
def tasks(tmp_path, monkeypatch):
    (tmp_path / "some_tasks.py").write_text(TASKS)
    monkeypatch.syspath_prepend(tmp_path)
    return importlib.import_module("some_tasks")


def test_a_hang_costs_its_task_only():
    start = time.perf_counter()
    results = dict(run_in_workers(time.sleep, [0, 600, 0, 600, 0], num_workers=2, deadline_seconds=1))
    assert {i: type(result) for i, result in results.items() if result is not None} == dict.fromkeys(
        [1, 3], WorkerTimeout
    )
    assert len(results) == 5
    assert all(results[i].seconds >= 1 and results[i].exit_code == -signal.SIGKILL for i in (1, 3))
    assert time.perf_counter() - start < 60


def test_progress_keeps_a_long_task_alive(tasks):
    assert list(run_in_workers(tasks.crawl, [4], num_workers=1, deadline_seconds=2)) == [(0, 4)]


def test_time_in_which_nobody_listens_is_no_silence(tasks):
    found = []
    for _, result in run_in_workers(tasks.crawl, [0, 0, 1], num_workers=2, deadline_seconds=1.5):
        found.append(result)
        time.sleep(2)
    assert found == [0, 0, 1]


def test_greed_is_an_error_or_a_crash_of_one_task():
    with pytest.raises(MemoryError):
        list(run_in_workers(bytearray, [1 << 20, 3 << 30], num_workers=1, memory_bytes=1 << 30))


def test_last_words_explain_a_crash(tasks):
    ((_, crash),) = run_in_workers(tasks.say_and_die, ["first\nGLib: failed to allocate\x1b[31m\n\n"], num_workers=1)
    assert crash == WorkerCrash(-signal.SIGABRT, "GLib: failed to allocate[31m")
    assert str(crash) == ("the process that read the slide died (exit code -6, SIGABRT): GLib: failed to allocate[31m")


def test_noise_on_standard_error_neither_blocks_nor_reaches_ours(tasks, capfd):
    sizes = [0, 5_000_000, 7]
    assert dict(run_in_workers(tasks.be_noisy, sizes, num_workers=1)) == dict(enumerate(sizes))
    assert capfd.readouterr().err == ""


def test_warnings_of_workers_reach_our_log(tasks, caplog):
    list(run_in_workers(tasks.warn, ["50%"], num_workers=1))
    assert [(record.name, record.levelname, record.message) for record in caplog.records] == [
        ("a.b", "WARNING", "this: 50%")
    ]


def test_workers_end_when_the_caller_stops_early():
    results = run_in_workers(time.sleep, [0, 60, 60], num_workers=2)
    start = time.perf_counter()
    next(results)
    results.close()
    assert time.perf_counter() - start < 30


def is_running(pid):
    try:
        with open(f"/proc/{pid}/stat") as handle:  # noqa: PTH123
            return handle.read().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="looks into /proc")
def test_workers_end_with_a_killed_parent(tmp_path):
    script = tmp_path / "parent.py"
    script.write_text(
        textwrap.dedent(
            """
            import json, multiprocessing, threading, time
            from dre_slcl.training.worker_pool import run_in_workers

            def report():
                while len(multiprocessing.active_children()) < 2:
                    time.sleep(0.05)
                time.sleep(1)
                print(json.dumps([child.pid for child in multiprocessing.active_children()]), flush=True)

            if __name__ == "__main__":
                threading.Thread(target=report).start()
                list(run_in_workers(time.sleep, [120, 120], num_workers=2))
            """
        )
    )
    with subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, text=True) as parent:
        pids = json.loads(parent.stdout.readline())
        assert len(pids) == 2
        assert all(is_running(pid) for pid in pids)
        parent.kill()
    deadline = time.monotonic() + 30
    while any(is_running(pid) for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not any(is_running(pid) for pid in pids)
