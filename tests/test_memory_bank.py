# SPDX-License-Identifier: Apache-2.0
"""Part 2: what the memory bank stores, and that its running sums are those of its features, bit for bit."""

import copy
import random

import pytest
import torch
import torch.nn.functional as F

from modeling_dre_slcl import MemoryBank
from modeling_dre_slcl.residual_encoder import residual_sums

NUM_TILES = [7, 1, 12, 5]
CODEWORDS, WIDTH = 4, 6


@pytest.fixture
def codebook():
    return F.normalize(torch.randn(CODEWORDS, WIDTH, generator=torch.Generator().manual_seed(0)), dim=-1)


@pytest.fixture
def bank():
    bank = MemoryBank(WIDTH, CODEWORDS)
    bank.allocate(NUM_TILES)
    return bank


def unit_features(*shape, seed=0):
    return F.normalize(torch.randn(*shape, WIDTH, generator=torch.Generator().manual_seed(seed)), dim=-1)


def draw_batch(choose, slides=2, tiles=3):
    """Different slides, and different tiles of each, padded with -1."""
    drawn = choose.sample(range(len(NUM_TILES)), slides)
    rows = []
    for slide in drawn:
        row = choose.sample(range(NUM_TILES[slide]), min(NUM_TILES[slide], choose.randint(1, tiles)))
        rows.append(row + [-1] * (tiles - len(row)))
    return torch.tensor(drawn), torch.tensor(rows)


def write_at_random(bank, codebook, steps, dtype=torch.float32):
    """Writes random features and returns what a dictionary remembers of them."""
    choose, remembered = random.Random(0), {}
    for step in range(steps):
        slides, tiles = draw_batch(choose)
        features = unit_features(*tiles.shape, seed=step).to(dtype)
        bank.write(slides, tiles, features, codebook, step)
        for slide, row, feature_row in zip(slides.tolist(), tiles.tolist(), features, strict=True):
            remembered |= {(slide, tile): (feature, step) for tile, feature in zip(row, feature_row, strict=True)}
    return {key: value for key, value in remembered.items() if key[1] >= 0}


def every_tile():
    slides = torch.arange(len(NUM_TILES))
    tiles = torch.tensor([[*range(count), *[-1] * (max(NUM_TILES) - count)] for count in NUM_TILES])
    return slides, tiles


def test_reads_back_what_was_last_written_and_nothing_else(bank, codebook):
    remembered = write_at_random(bank, codebook, 6)
    slides, tiles = every_tile()
    features, stored = bank.read(slides, tiles)
    assert features.dtype == torch.float32
    assert 0 < len(remembered) < sum(NUM_TILES)
    for slide in range(len(NUM_TILES)):
        for place in range(tiles.shape[1]):
            known = remembered.get((slide, place))
            assert stored[slide, place] == (known is not None)
            if known is not None:
                assert torch.equal(features[slide, place], known[0].half().float())
                assert bank.written_step[bank.slide_start[slide] + place] == known[1]


def test_a_new_bank_holds_nothing(bank, codebook):
    _, stored = bank.read(*every_tile())
    assert not stored.any()
    residuals, counts = bank.residuals_of_others(*every_tile(), codebook)
    assert not residuals.any()
    assert not counts.any()
    health = bank.health(0)
    assert {health[name] for name in ("coverage", "mean_age_steps", "max_age_steps", "codewords_used")} == {0.0}


def test_running_sums_stay_bit_equal_to_fresh_sums_after_thousands_of_writes(bank, codebook):
    remembered = write_at_random(bank, codebook, 2500)
    sums, counts, codewords = bank.feature_sums.clone(), bank.counts.clone(), bank.codeword.clone()
    assert sums.dtype == torch.float64
    bank.rebuild_sums(codebook)
    assert torch.equal(sums, bank.feature_sums)
    assert torch.equal(counts, bank.counts)
    assert torch.equal(codewords, bank.codeword)
    by_hand = torch.zeros_like(sums)
    for (slide, tile), (feature, _) in remembered.items():
        by_hand[slide, codewords[bank.slide_start[slide] + tile].long()] += feature.half().double()
    assert torch.equal(sums, by_hand)
    assert int(counts.sum()) == len(remembered)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_residuals_of_others_equal_brute_force(codebook, dtype):
    bank = MemoryBank(WIDTH, CODEWORDS)
    bank.allocate(NUM_TILES, dtype=dtype)
    remembered = write_at_random(bank, codebook, 40)
    choose = random.Random(1)
    for _ in range(20):
        slides, tiles = draw_batch(choose, slides=3)
        residuals, counts = bank.residuals_of_others(slides, tiles, codebook)
        assert residuals.dtype == torch.float32
        for place, slide in enumerate(slides.tolist()):
            left = [tile for tile in range(NUM_TILES[slide]) if tile not in tiles[place].tolist()]
            kept = [remembered[slide, tile][0].to(dtype) for tile in left if (slide, tile) in remembered]
            features = torch.stack(kept).double() if kept else torch.zeros(0, WIDTH, dtype=torch.float64)
            expected, numbers = residual_sums(features[None], codebook.double())
            torch.testing.assert_close(residuals[place].double(), expected[0], rtol=0, atol=1e-6)
            assert counts[place].tolist() == numbers[0].tolist()


def test_fresh_tiles_plus_residuals_of_others_are_the_whole_slide(bank, codebook):
    """The identity that makes a step cost as much as its sampled tiles, whatever the size of the slide."""
    write_at_random(bank, codebook, 200)
    slides, tiles = torch.tensor([2, 0]), torch.tensor([[3, 8, 11], [6, 1, -1]])
    fresh = unit_features(2, 3, seed=99).half().float()
    residuals, counts = residual_sums(fresh, codebook, tiles >= 0)
    others, other_counts = bank.residuals_of_others(slides, tiles, codebook)
    bank.write(slides, tiles, fresh, codebook, step=1000)
    nothing = torch.full((2, 1), -1)
    whole, whole_counts = bank.residuals_of_others(slides, nothing, codebook)
    torch.testing.assert_close(residuals + others, whole, rtol=0, atol=1e-5)
    assert torch.equal(counts.long() + other_counts, whole_counts)
    assert whole_counts.sum(dim=1).tolist() == [12, 7]


def test_a_new_codebook_reassigns_every_stored_tile(bank, codebook):
    remembered = write_at_random(bank, codebook, 300)
    other = codebook.flip(0)
    bank.rebuild_sums(other)
    again = MemoryBank(WIDTH, CODEWORDS)
    again.allocate(NUM_TILES)
    for (slide, tile), (feature, step) in remembered.items():
        again.write(torch.tensor([slide]), torch.tensor([[tile]]), feature[None, None], other, step)
    for name in MemoryBank.BUFFER_NAMES:
        if name not in ("step_counts", "drift_sums"):  # their lengths and the latest writes differ
            assert torch.equal(getattr(bank, name), getattr(again, name)), name


@pytest.mark.parametrize(
    ("value", "found"), [(float("nan"), "not finite"), (float("inf"), "not finite"), (-1e6, "beyond 16")]
)
def test_refuses_features_that_are_not_finite_or_huge_and_stores_nothing(bank, codebook, value, found):
    write_at_random(bank, codebook, 20)
    before = copy.deepcopy(bank.state_dict(keep_vars=True) | dict(bank.named_buffers()))
    features = unit_features(2, 2)
    features[1, 0, 3] = value
    with pytest.raises(FloatingPointError, match=f"The feature of tile 4 of slide 0 is {found}"):
        bank.write(torch.tensor([2, 0]), torch.tensor([[0, 1], [4, 2]]), features, codebook, step=21)
    for name, buffer in bank.named_buffers():
        assert torch.equal(buffer, before[name]), name


def test_padding_may_hold_anything(bank, codebook):
    features = unit_features(1, 2)
    features[0, 1] = float("nan")
    bank.write(torch.tensor([1]), torch.tensor([[0, -1]]), features, codebook, step=3)
    assert bank.counts.sum() == 1
    assert torch.isfinite(bank.feature_sums).all()


@pytest.mark.parametrize("tile", [1, 100])
def test_refuses_a_tile_of_another_slide(bank, codebook, tile):
    with pytest.raises(IndexError, match="beyond the tiles allocated"):
        bank.write(torch.tensor([1]), torch.tensor([[tile]]), unit_features(1, 1), codebook, step=0)
    with pytest.raises(IndexError, match="beyond the tiles allocated"):
        bank.read(torch.tensor([1]), torch.tensor([[tile]]))


def test_reading_gives_copies(bank, codebook):
    write_at_random(bank, codebook, 50)
    features, _ = bank.read(*every_tile())
    before = bank.features.clone()
    features.zero_()
    assert torch.equal(bank.features, before)


def test_features_written_with_a_gradient_are_stored_without(bank, codebook):
    features = unit_features(1, 1).requires_grad_()
    bank.write(torch.tensor([0]), torch.tensor([[2]]), features * 1, codebook, step=0)
    assert not any(buffer.requires_grad for buffer in bank.buffers())


def test_health_counts_coverage_age_and_codewords(bank, codebook):
    bank.write(torch.tensor([0]), torch.tensor([[0, 1]]), codebook[None, :2], codebook, step=10)
    bank.write(torch.tensor([1]), torch.tensor([[0]]), codebook[None, 1:2], codebook, step=13)
    health = bank.health(step=20)
    assert health["coverage"] == pytest.approx(3 / sum(NUM_TILES))
    assert health["mean_age_steps"] == pytest.approx((10 + 10 + 7) / 3)
    assert health["codewords_used"] == pytest.approx(2 / CODEWORDS)


def test_casting_and_moving_keep_the_dtypes_and_the_content(bank, codebook):
    write_at_random(bank, codebook, 30)
    before = {name: buffer.clone() for name, buffer in bank.named_buffers()}
    for cast in (bank.half, bank.bfloat16, bank.double, lambda: bank.to(torch.bfloat16), lambda: bank.to("cpu")):
        cast()
        for name, buffer in bank.named_buffers():
            assert buffer.dtype == before[name].dtype, name
            assert torch.equal(buffer, before[name]), name
    assert bank.features.dtype == torch.float16
    assert bank.feature_sums.dtype == torch.float64


def test_a_bank_on_the_meta_device_gets_memory_by_to_empty():
    with torch.device("meta"):
        bank = MemoryBank(WIDTH, CODEWORDS)
    bank.to_empty(device="cpu")
    assert all(buffer.device.type == "cpu" for buffer in bank.buffers())


def test_no_buffer_enters_a_state_dict(bank):
    assert not bank.state_dict()
    assert {name for name, _ in bank.named_buffers()} == set(MemoryBank.BUFFER_NAMES)


def test_slide_states_travel_to_another_bank_in_any_order(bank, codebook):
    write_at_random(bank, codebook, 60)
    order = [2, 0, 3]
    state = bank.slide_state(order)
    other = MemoryBank(WIDTH, CODEWORDS)
    other.allocate([NUM_TILES[slide] for slide in order])
    other.load_slide_state([0, 1, 2], state)
    for place, slide in enumerate(order):
        tiles = torch.arange(NUM_TILES[slide])[None]
        mine, theirs = bank.read(torch.tensor([slide]), tiles), other.read(torch.tensor([place]), tiles)
        assert all(torch.equal(one, two) for one, two in zip(mine, theirs, strict=True))
        assert torch.equal(bank.feature_sums[slide], other.feature_sums[place])
        assert torch.equal(bank.counts[slide], other.counts[place])


@pytest.mark.parametrize("changes", [{"tiles": [7, 2]}, {"dtype": torch.float32}, {"width": WIDTH + 1}])
def test_refuses_a_slide_state_of_another_shape_or_dtype(bank, changes):
    other = MemoryBank(changes.get("width", WIDTH), CODEWORDS)
    other.allocate(changes.get("tiles", [7, 1]), dtype=changes.get("dtype", torch.float16))
    with pytest.raises(ValueError, match="Memory bank table `features` of the checkpoint has shape"):
        other.load_slide_state([0, 1], bank.slide_state([0, 1]))
