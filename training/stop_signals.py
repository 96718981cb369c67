# SPDX-License-Identifier: Apache-2.0
"""SIGTERM and SIGINT: what a run does when it is asked to stop."""

import logging
import signal
from types import FrameType, TracebackType

logger = logging.getLogger(__name__)
_NUMBERS = (signal.SIGTERM, signal.SIGINT)


class StoppedBeforeTraining(BaseException):
    """A signal that came while there was nothing to save; it passes through whatever handles errors.

    Args:
        number (`int`): the signal.
    """

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


class StopSignals:
    """While entered, the first signal is noted and the run stops when it can; a second one acts at once.

    Attributes:
        received (`int`, *optional*): the signal that this process was sent.
        can_save (`bool`): whether the run has something to save. Before, the first signal acts at once too.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self.can_save = False
        self._previous: dict[int, object] = {}

    def __enter__(self) -> "StopSignals":
        self._previous = {number: signal.signal(number, self._on_signal) for number in _NUMBERS}
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self.received = number
        for other in _NUMBERS:
            signal.signal(other, signal.SIG_DFL)
        if not self.can_save:
            raise StoppedBeforeTraining(number)
        logger.warning("Signal %d: saving a checkpoint after this step, then stopping; again stops at once.", number)
