# SPDX-License-Identifier: Apache-2.0
"""One thread for small fits: more get into each other's way, and add up in another order from run to run."""

import functools
from typing import Any

from threadpoolctl import ThreadpoolController


@functools.lru_cache(maxsize=1)
def _controller() -> ThreadpoolController:
    """Looking for the libraries takes longer than a small fit, so it is done once."""
    return ThreadpoolController()


def one_thread() -> Any:
    """A context in which numerical libraries use one thread."""
    return _controller().limit(limits=1)
