# SPDX-License-Identifier: Apache-2.0
"""What a worker process runs: tiling one slide, without loading torch.

Importing `modeling_dre_slcl` registers the model with transformers and loads torch: measured 6.7 s of CPU time and
820 MB for each worker, where the files that read slides need 0.3 s and 90 MB. So this file imports nothing of ours at
its top.
"""

import importlib.util
import os
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .slide_part import PartRecord, SlideTask

_PACKAGE = "modeling_dre_slcl"


def prepare_worker() -> None:
    """Makes the files of `modeling_dre_slcl` importable one by one, without the package's own imports.

    Only for processes that do nothing but tile slides.
    """
    # Arrow's own allocator takes memory in steps of 2 MB, long after the first slide; the system's stays flat.
    os.environ.setdefault("ARROW_DEFAULT_MEMORY_POOL", "system")
    spec = importlib.util.find_spec(_PACKAGE)
    if spec is not None and _PACKAGE not in sys.modules:
        sys.modules[_PACKAGE] = importlib.util.module_from_spec(spec)


def tile_in_worker(task: "SlideTask") -> "PartRecord | None":
    """Tiles one slide; see `tile_claimed_slide`."""
    from .slide_part import tile_claimed_slide

    return tile_claimed_slide(task)
