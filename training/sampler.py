# SPDX-License-Identifier: Apache-2.0
"""Which slides and which of their tiles a step takes: a pure function of (seed, step), whatever runs it.

Slides are partitioned into as many virtual shards as a global batch has slides; each step takes one slide from every
shard. All slides of a case are in one shard, so a batch never holds two of them. A process owns whole shards, so no
bank row ever crosses processes, and another number of processes only means another owner.

Letters: B slides in the global batch, M sampled, R retrieved and F refreshed tiles of each, N tiles of a slide.
"""

import hashlib
import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .strata import Strata

PADDING = -1
_GOLDEN_RATIO = (5**0.5 - 1) / 2


def generator(*key: int | str) -> np.random.Generator:
    """A random generator that is a function of its key alone, for example `(seed, step, slide_id)`."""
    digest = hashlib.sha256("\x1f".join(map(str, key)).encode()).digest()
    return np.random.default_rng(np.frombuffer(digest, dtype=np.uint32))


def partition_slides(case_ids: Sequence[str], num_shards: int, seed: int) -> list[list[int]]:
    """Partitions slides into virtual shards of nearly equal size, keeping the slides of a case together.

    Args:
        case_ids (sequence of `str`): the case of each slide.
        num_shards (`int`): number of shards: slides in a global batch.
        seed (`int`): decides which cases go together.

    Returns:
        `list` of `list` of `int`: the slides of each shard, ascending.

    Raises:
        ValueError: if there are fewer cases than shards.
    """
    slides_of_case: dict[str, list[int]] = defaultdict(list)
    for slide, case_id in enumerate(case_ids):
        slides_of_case[case_id].append(slide)
    if len(slides_of_case) < num_shards:
        raise ValueError(
            f"A batch holds one slide of each of {num_shards} different cases, but there are only "
            f"{len(slides_of_case)} cases with usable slides and reports; set `slides_per_batch` to at most that."
        )
    order = generator(seed, "cases").permutation(len(slides_of_case))
    cases = [slides for _, slides in sorted(slides_of_case.items())]
    shards: list[list[int]] = [[] for _ in range(num_shards)]
    # The largest cases first, each to the shard that is smallest so far: greedy balancing.
    for case in sorted((cases[index] for index in order), key=len, reverse=True):
        min(shards, key=len).extend(case)
    return [sorted(shard) for shard in shards]


@dataclass(frozen=True)
class StepPlan:
    """What one process does in one step.

    Args:
        step (`int`): the step.
        slides (`np.ndarray` of shape `(b,)`, int64): its slides, one from each shard that it owns.
        sampled (`np.ndarray` of shape `(b, M)`, int64): tiles to encode with gradient; -1 is padding.
        retrieved (`np.ndarray` of shape `(b, R)`, int64): other tiles to retrieve from the bank; -1 is padding.
        refreshed (`np.ndarray` of shape `(b, F)`, int64): other tiles to encode into the bank; -1 is padding.
    """

    step: int
    slides: np.ndarray
    sampled: np.ndarray
    retrieved: np.ndarray
    refreshed: np.ndarray


class StepSampler:
    """Plans steps.

    Args:
        shards (`list` of `list` of `int`): from `partition_slides`.
        owned_shards (sequence of `int`): the shards of this process.
        slide_ids (sequence of `str`): names of all slides.
        num_tiles (sequence of `int`): their numbers of tiles.
        tiles_per_slide (`int`): M.
        retrieved_per_slide (`int`): R.
        refreshed_per_slide (`int`, defaults to 0): F.
        strata (`Strata`, *optional*): of the slides in `owned_shards`; without, tiles are sampled uniformly.
        seed (`int`): the run's seed.
    """

    def __init__(
        self,
        shards: list[list[int]],
        owned_shards: Sequence[int],
        slide_ids: Sequence[str],
        num_tiles: Sequence[int],
        *,
        tiles_per_slide: int,
        retrieved_per_slide: int,
        refreshed_per_slide: int = 0,
        strata: Strata | None = None,
        seed: int,
    ) -> None:
        self.shards, self.owned_shards, self.seed = shards, list(owned_shards), seed
        self.slide_ids, self.num_tiles = list(slide_ids), list(num_tiles)
        self.tiles_per_slide, self.retrieved_per_slide = tiles_per_slide, retrieved_per_slide
        self.refreshed_per_slide, self.strata = refreshed_per_slide, strata

    def slide_at(self, shard: int, step: int) -> int:
        """The slide that a shard gives to a step: each pass over the shard is a new permutation of it."""
        slides = self.shards[shard]
        cycle, place = divmod(step, len(slides))
        return slides[generator(self.seed, "slides", shard, cycle).permutation(len(slides))[place]]

    def tiles_at(self, slide: int, step: int) -> tuple[np.ndarray, np.ndarray]:
        """Draws the tiles of a slide for a step, without repetition, in O(M + R) whatever N is.

        Returns:
            `tuple`: sampled tiles `(M,)` and retrieved tiles `(R,)`, as in `StepPlan`.
        """
        num_tiles = self.num_tiles[slide]
        random = generator(self.seed, "tiles", step, self.slide_ids[slide])
        if self.strata is not None:
            sampled = self.strata.draw(slide, self.tiles_per_slide, random)
            retrieved = np.empty(0, dtype=np.int64)
        else:
            wanted = min(self.tiles_per_slide + self.retrieved_per_slide, num_tiles)
            # Of few among many, NumPy draws with a set of those drawn so far (Floyd), not by shuffling all.
            drawn = random.choice(num_tiles, size=wanted, replace=False)
            sampled, retrieved = drawn[: self.tiles_per_slide], drawn[self.tiles_per_slide :]
        return _padded(sampled, self.tiles_per_slide), _padded(retrieved, self.retrieved_per_slide)

    def refreshed_at(self, slide: int, visit: int) -> np.ndarray:
        """The tiles `(F,)` of a slide whose last refresh is the longest ago, at the slide's visit number `visit`.

        Each visit goes on where the one before stopped, round and round, so the oldest are known without asking the
        bank. Neighbours in this round lie far apart on the slide: its steps are the golden share of N, prime to N.
        """
        num_tiles, count = self.num_tiles[slide], min(self.refreshed_per_slide, self.num_tiles[slide])
        stride = max(1, round(num_tiles * _GOLDEN_RATIO))
        while math.gcd(stride, num_tiles) != 1:
            stride += 1
        turns = (visit * count + np.arange(count, dtype=np.int64)) % max(num_tiles, 1)
        return _padded(turns * stride % max(num_tiles, 1), self.refreshed_per_slide)

    def plan(self, step: int) -> StepPlan:
        """Plans this process's part of a step."""
        slides = [self.slide_at(shard, step) for shard in self.owned_shards]
        sampled, retrieved = zip(*(self.tiles_at(slide, step) for slide in slides), strict=True)
        visits = [step // len(self.shards[shard]) for shard in self.owned_shards]
        refreshed = [self.refreshed_at(slide, visit) for slide, visit in zip(slides, visits, strict=True)]
        # What is sampled is fresh anyway.
        refreshed = [np.where(np.isin(due, own), PADDING, due) for due, own in zip(refreshed, sampled, strict=True)]
        return StepPlan(step, np.asarray(slides), *(np.stack(part) for part in (sampled, retrieved, refreshed)))


def _padded(tiles: np.ndarray, length: int) -> np.ndarray:
    """Fills up `tiles` `(n,)` to `length`."""
    return np.concatenate([tiles, np.full(length - len(tiles), PADDING, dtype=tiles.dtype)])


def shards_of_process(num_shards: int, process: int, num_processes: int) -> list[int]:
    """The shards that a process owns: a contiguous range, so that gathered batches come in shard order.

    Raises:
        ValueError: if the processes cannot share the shards evenly; it names the numbers that can.
    """
    if num_shards % num_processes:
        divisors = [number for number in range(1, num_shards + 1) if num_shards % number == 0]
        raise ValueError(
            f"{num_processes} processes cannot share a batch of {num_shards} slides evenly; start "
            f"{' or '.join(map(str, divisors))} processes, or change `slides_per_batch`."
        )
    share = num_shards // num_processes
    return list(range(process * share, (process + 1) * share))
