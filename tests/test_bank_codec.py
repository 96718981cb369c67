# SPDX-License-Identifier: Apache-2.0
"""What is stored of a feature, and that float64 sums of stored features are exact: held to exact fractions."""

import random
from fractions import Fraction

import pytest
import torch
import torch.nn.functional as F

from modeling_dre_slcl import MemoryBank
from modeling_dre_slcl.bank_codec import (
    FEATURE_LIMIT,
    STORAGE_DTYPES,
    decode_features,
    encode_features,
    max_tiles_per_slide,
)

WIDTH, CODEWORDS, NUM_TILES = 24, 4, [40, 9]
# Largest error of a number x with the largest number m of its tile.
LARGEST_ERROR = {
    torch.float16: lambda x, m: x.abs() * 2**-11 + 2**-25,
    torch.bfloat16: lambda x, m: x.abs() * 2**-8 + 2**-25,
    torch.int8: lambda x, m: m / 254 * (1 + 2**-9) + 2**-25,
    torch.float32: lambda x, m: x.abs() * 0 + 2**-30,
}
every_dtype = pytest.mark.parametrize("dtype", STORAGE_DTYPES.values(), ids=STORAGE_DTYPES)


def wild_features(num, seed=0):
    """Features of all sizes: numbers from 1e-12 to the limit, zeros, and unit features."""
    draw = torch.Generator().manual_seed(seed)
    powers = torch.rand(num, WIDTH, generator=draw) * 13.2 - 12
    wild = 10.0**powers * torch.randn(num, WIDTH, generator=draw).sign()
    wild[:: max(1, num // 3), ::2] = 0
    unit = F.normalize(torch.randn(num, WIDTH, generator=draw), dim=-1)
    return torch.cat([wild.clamp(-FEATURE_LIMIT, FEATURE_LIMIT), unit])


def stored(features, dtype):
    return decode_features(*encode_features(features, dtype))


@every_dtype
def test_rounding_is_small_and_repeatable(dtype):
    features = wild_features(200)
    found = stored(features, dtype)
    largest = features.abs().amax(dim=1, keepdim=True)
    assert ((found.double() - features.double()).abs() <= LARGEST_ERROR[dtype](features.double(), largest)).all()
    assert torch.equal(found, stored(features, dtype))
    if dtype != torch.int8:
        assert torch.equal(found, stored(found, dtype))


@every_dtype
def test_every_stored_number_is_a_whole_multiple_so_that_sums_of_the_largest_slide_are_exact(dtype):
    numbers = [Fraction(x) for x in stored(wild_features(300), dtype).flatten().tolist()]
    unit = Fraction(1, 2**29 if dtype == torch.float32 else 2**24)
    assert all((x / unit).denominator == 1 for x in numbers)
    # int8 may exceed the limit by the rounding of its scale.
    assert max(map(abs, numbers)) <= FEATURE_LIMIT * (1 + 2**-10)
    assert FEATURE_LIMIT * max_tiles_per_slide(dtype) / unit <= 2**53
    assert max_tiles_per_slide(dtype) >= 1_000_000


@pytest.mark.parametrize("value", [0.0, 1e-30, 2**-24, FEATURE_LIMIT])
@every_dtype
def test_extreme_features(dtype, value):
    features = torch.full((1, WIDTH), value)
    found = stored(features, dtype)
    assert torch.isfinite(found).all()
    assert ((found - features).abs() <= LARGEST_ERROR[dtype](features, torch.tensor(value))).all()


@every_dtype
def test_sums_of_a_bank_are_the_exact_sums_of_what_it_reads_back(dtype):
    """Updates in random order, numbers of very different sizes; the reference adds fractions."""
    check_exactness(dtype, num_updates=300)


@pytest.mark.slow
@every_dtype
def test_sums_are_exact_after_100000_updates(dtype):
    check_exactness(dtype, num_updates=100_000)


def check_exactness(dtype, num_updates):
    bank, choose = MemoryBank(WIDTH, CODEWORDS), random.Random(0)
    bank.allocate(NUM_TILES, dtype=dtype)
    codebook, pool = F.normalize(torch.randn(CODEWORDS, WIDTH), dim=-1), wild_features(100, seed=1)
    updates = 0
    while updates < num_updates:
        tiles = torch.tensor([choose.sample(range(count), 5) for count in NUM_TILES])
        features = pool[torch.tensor(choose.choices(range(len(pool)), k=10))].view(2, 5, WIDTH)
        bank.write(torch.tensor([0, 1]), tiles, features, codebook, step=updates)
        updates += 10
    for slide, count in enumerate(NUM_TILES):
        features, is_stored = bank.read(torch.tensor([slide]), torch.arange(count)[None])
        codeword = bank.codeword[bank.slide_start[slide] :][:count]
        for k in range(CODEWORDS):
            members = features[0][is_stored[0] & (codeword == k)].tolist()
            exact = [sum(map(Fraction, column), Fraction(0)) for column in zip(*members, strict=True)]
            assert list(map(Fraction, bank.feature_sums[slide, k].tolist())) == (exact or [0] * WIDTH)
            assert int(bank.counts[slide, k]) == len(members)
    sums, counts, codewords = bank.feature_sums.clone(), bank.counts.clone(), bank.codeword_counts.clone()
    bank.rebuild_sums()
    assert torch.equal(sums, bank.feature_sums)
    assert torch.equal(counts, bank.counts)
    assert torch.equal(codewords, bank.codeword_counts)


def test_a_slide_too_large_for_exact_sums_is_refused_and_so_are_other_types():
    bank = MemoryBank(1, 1)
    with pytest.raises(ValueError, match=r"A slide has 2000000 tiles, .* exact up to 1048576"):
        bank.allocate([5, 2_000_000], dtype=torch.float32)
    with pytest.raises(ValueError, match="stores float16, bfloat16, int8, float32"):
        bank.allocate([5], dtype=torch.float64)
