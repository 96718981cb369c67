# SPDX-License-Identifier: Apache-2.0
"""The processes of an embedding run, one for each device: who does what, and how the results come together.

Started by `accelerate launch` or `torchrun`. Processes talk twice, at the start and at the end, so no collective
waits within a run.
"""

import datetime as dt
import os
from collections import Counter
from typing import Any

from .embed_files import EmbedRecord

# A process that has finished waits for the others, whatever they are at; the launcher ends all if one fails.
_TIMEOUT = dt.timedelta(days=30)


class ProcessGroup:
    """This process among those that a launcher has started.

    Args:
        device (`str`, *optional*): where to encode; by default an accelerator of its own, else the CPU.

    Attributes:
        rank (`int`), size (`int`): its number and that of all.
        device (`str` or `None`): as given, or `None` to choose.
    """

    def __init__(self, device: str | None) -> None:
        self.rank, self.size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
        self.device = device
        if self.size > 1:
            import torch.distributed

            torch.distributed.init_process_group("gloo", timeout=_TIMEOUT)

    @property
    def is_first(self) -> bool:
        """Whether this process writes what there is only one of."""
        return self.rank == 0

    def wait(self) -> None:
        """Waits for all processes."""
        if self.size > 1:
            import torch.distributed

            torch.distributed.barrier()

    def gather(
        self, records: dict[str, EmbedRecord], seconds: "Counter[str]"
    ) -> tuple[dict[str, EmbedRecord], "Counter[str]"] | None:
        """Brings what all processes did to the first one; the others get `None`."""
        if self.size == 1:
            return records, seconds
        import torch.distributed

        gathered: list[Any] | None = [None] * self.size if self.is_first else None
        torch.distributed.gather_object((records, seconds), gathered)
        torch.distributed.destroy_process_group()
        if gathered is None:
            return None
        merged, total = {}, Counter()
        for part, times in gathered:
            merged |= part
            total.update(times)
        return merged, total
