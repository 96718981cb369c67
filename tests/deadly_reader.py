# SPDX-License-Identifier: Apache-2.0
"""A reader process that slides can kill or stop, as files do that a native library cannot take."""

import os
import signal
import time

from dre_slcl.training.embed_worker import ReaderStart


class DeadlyReader(ReaderStart):
    """Dies when it reads tiles of a slide named crash..., or opens one named burst...; sleeps at one named hang..."""

    def __call__(self, task):
        name, reads = task.job.slide_id, hasattr(task, "tile_xy")
        if (name.startswith("crash") and reads) or name.startswith("burst"):
            os.kill(os.getpid(), signal.SIGSEGV)
        if name.startswith("hang") and reads:
            time.sleep(600)
        return super().__call__(task)
