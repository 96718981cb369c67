# SPDX-License-Identifier: Apache-2.0
"""Drawing by strata: shares, probabilities, and what a draw costs."""

from collections import Counter
from itertools import combinations

import numpy as np
import pytest
import torch

from dre_slcl.training.sampler import generator
from dre_slcl.training.strata import Strata, proportional_shares

SIZES = [70, 1, 12, 5, 12]  # of the strata of one slide


def one_slide(sizes, seed=0):
    """Strata of two slides; the second has strata of the given sizes, mixed. Returns them and its codewords."""
    codeword = np.repeat(np.arange(len(sizes)) - 1, sizes)
    codeword = np.random.default_rng(seed).permutation(codeword).astype(np.int16)
    strata = Strata([4, 9], [3, len(codeword)])
    strata.assign(torch.from_numpy(np.concatenate([np.array([0, 1, 0], dtype=np.int16), codeword])))
    return strata, codeword


@pytest.mark.parametrize("total", [5, 6, 9, 20, 50, 99, 100])
def test_shares_are_proportional_with_at_least_one_each(total):
    sizes = np.array(SIZES)
    shares = proportional_shares(sizes, total)
    assert shares.sum() == total
    assert ((shares >= 1) & (shares <= sizes)).all()
    # As near to proportional as whole numbers of at least one allow: no single move brings the sum of squares down.
    error = ((shares - sizes * total / sizes.sum()) ** 2).sum()
    for giver, taker in ((a, b) for pair in combinations(range(5), 2) for a, b in (pair, pair[::-1])):
        moved = shares + np.eye(5, dtype=int)[taker] - np.eye(5, dtype=int)[giver]
        if (moved >= 1).all() and (moved <= sizes).all():
            assert ((moved - sizes * total / sizes.sum()) ** 2).sum() >= error - 1e-9


@pytest.mark.parametrize("num_drawn", [5, 16, 40])
def test_every_stratum_is_drawn_as_often_as_its_share(num_drawn):
    strata, codeword = one_slide(SIZES)
    for step in range(20):
        tiles = strata.draw(9, num_drawn, generator(0, step))
        assert len(set(tiles.tolist())) == len(tiles) == num_drawn
        drawn = [int((codeword[tiles] == stratum - 1).sum()) for stratum in range(len(SIZES))]
        assert drawn == proportional_shares(np.array(SIZES), num_drawn).tolist()


def test_more_strata_than_tiles_to_draw_share_them():
    strata, _ = one_slide([4] * 30)
    tiles = strata.draw(9, 7, generator(0))
    assert len(set(tiles.tolist())) == 7


def test_a_slide_with_fewer_tiles_is_taken_whole():
    strata, _ = one_slide(SIZES)
    assert sorted(strata.draw(4, 16, generator(0)).tolist()) == [0, 1, 2]


@pytest.mark.parametrize(("sizes", "shares"), [(SIZES, [6, 1, 1, 1, 1]), ([4] * 25, None)])
def test_within_a_stratum_each_tile_is_as_likely(sizes, shares):
    strata, codeword = one_slide(sizes)
    counts, draws = Counter(), 2000
    for step in range(draws):
        counts.update(strata.draw(9, 10, generator(1, step)).tolist())
    # Where neighbouring codewords share a stratum, every stratum has 10 of the 100 tiles.
    probability = np.full(100, 0.1) if shares is None else (np.array(shares) / sizes)[codeword + 1]
    found = np.array([counts[tile] for tile in range(100)]) / draws
    assert (np.abs(found - probability) <= 4.5 * np.sqrt(probability * (1 - probability) / draws)).all()


def test_a_draw_does_not_look_at_all_tiles():
    codeword = torch.arange(200_000, dtype=torch.int64).remainder(16).to(torch.int16)
    strata = Strata([0, 1], [100_000, 100_000])
    strata.assign(codeword)

    class Watched(np.ndarray):
        """Counts the elements that an index takes."""

        taken = 0

        def __getitem__(self, index):
            result = super().__getitem__(index)
            if not isinstance(index, slice):
                Watched.taken += np.size(result)
            return result

    strata._order = strata._order.view(Watched)
    strata.draw(1, 64, generator(0))
    assert Watched.taken == 64


def test_a_saved_state_gives_the_same_draws():
    strata, _ = one_slide(SIZES)
    restored = Strata([4, 9], [3, 100])
    for slides in ([9], [4]):
        restored.restore(slides, strata.state(slides))
    for slide in (4, 9):
        found, expected = (either.draw(slide, 8, generator(3)) for either in (restored, strata))
        np.testing.assert_array_equal(found, expected)
