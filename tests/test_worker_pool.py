# SPDX-License-Identifier: Apache-2.0
"""Workers may die, raise and be orphaned; the others and the parent go on."""

import json
import math
import os
import signal
import subprocess
import sys
import textwrap
import time

import pytest

from dre_slcl.training.worker_pool import WorkerCrash, run_in_workers


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
    with pytest.raises(RuntimeError, match=r"could not start \(exit code -6\)"):
        list(run_in_workers(math.factorial, [1, 2], num_workers=1, initializer=os.abort))


def test_error_is_raised_in_the_parent():
    with pytest.raises(ValueError, match="not defined for negative"):
        list(run_in_workers(math.factorial, [3, -1], num_workers=1))


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
