# SPDX-License-Identifier: Apache-2.0
"""Where the time of training goes: every moment belongs to exactly one phase, so that phases add up to the whole.

On a GPU, which works behind the program, moments are events of its stream: the time between two of them is what the
GPU took, and they are read when it has come to the last one anyway.
"""

import functools
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

PHASES = ("data", "wait", "encode", "bank", "loss", "backward", "save")


class StepClock:
    """Counts the time of each phase.

    Phases: `data` waiting for tiles, `wait` waiting for other processes, `encode` the tile encoder, `bank` the memory
    bank, `loss` the rest of the forward pass, `backward` the backward pass and the optimizer, `save` logging,
    checkpoints and validations.

    Args:
        device (`torch.device`): where the model is.
    """

    def __init__(self, device: torch.device) -> None:
        self.is_gpu = device.type == "cuda"
        self._stack: list[str] = []
        self._moments: list[tuple[str, Any]] = []

    def switch(self, phase: str) -> None:
        """Ends whatever runs, and begins a phase."""
        self._stack = [phase]
        self._begin(phase)

    @contextmanager
    def within(self, phase: str) -> Iterator[None]:
        """Counts what happens inside as another phase, and not for the one around it."""
        if not self._stack:  # nobody measures
            yield
            return
        self._stack.append(phase)
        self._begin(phase)
        try:
            yield
        finally:
            self._stack.pop()
            self._begin(self._stack[-1] if self._stack else "")

    def watch_forward(self, module: nn.Module, phase: str) -> None:
        """Counts each forward pass of a module as a phase."""
        self.watch_calls(module, ["forward"], phase)

    def watch_calls(self, owner: Any, names: Sequence[str], phase: str) -> None:
        """Counts each call of an object's methods as a phase."""
        for name in names:
            setattr(owner, name, self._counted(getattr(owner, name), phase))

    def take(self) -> dict[str, float]:
        """Returns the seconds of each phase since the last call; the running phase goes on."""
        running = self._stack[-1] if self._stack else ""
        self._begin(running)
        if self.is_gpu:
            self._moments[-1][1].synchronize()
        seconds: dict[str, float] = defaultdict(float)
        for (phase, start), (_, end) in zip(self._moments, self._moments[1:], strict=False):
            if phase:
                seconds[phase] += start.elapsed_time(end) / 1e3 if self.is_gpu else end - start
        self._moments = self._moments[-1:]
        return {phase: seconds[phase] for phase in PHASES}

    def _begin(self, phase: str) -> None:
        if not self.is_gpu:
            self._moments.append((phase, time.perf_counter()))
            return
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        self._moments.append((phase, event))

    def _counted(self, call: Callable[..., Any], phase: str) -> Callable[..., Any]:
        @functools.wraps(call)
        def counted(*args: Any, **kwargs: Any) -> Any:
            with self.within(phase):
                return call(*args, **kwargs)

        return counted
