# SPDX-License-Identifier: Apache-2.0
"""One writer for a folder; the message names the other."""

import os
import platform
from pathlib import Path

import pytest

from dre_slcl.training.folder_lock import folder_lock


def test_the_second_is_refused_and_told_who_is_first(tmp_path):
    with folder_lock(tmp_path):
        with pytest.raises(BlockingIOError, match="another process is writing here") as caught, folder_lock(tmp_path):
            pass
        if Path("/proc/locks").exists():
            assert f"(process {os.getpid()} on {platform.node()})" in str(caught.value)
    with folder_lock(tmp_path):
        assert not list(tmp_path.iterdir())
