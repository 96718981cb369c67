# SPDX-License-Identifier: Apache-2.0
"""Slide states against Python's exact integers: any order, any chunks, several workers, parts taken out."""

import random

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from modeling_dre_slcl.residual_encoder import assign_codewords, residual_sums
from modeling_dre_slcl.slide_state import SlideState, codebook_sha256, fixed_point

from .tiny_models import IMAGE_SIZE, tiny_model

CODEWORDS, WIDTH = 5, 8


@pytest.fixture(scope="module")
def codebook():
    return torch.randn(CODEWORDS, WIDTH, generator=torch.Generator().manual_seed(0))


def make_features(number, seed=1, dtype=torch.float32):
    """Unit vectors whose components span many magnitudes, so that floating-point sums depend on their order."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(number, WIDTH, generator=generator, dtype=torch.float64)
    values *= 10.0 ** torch.randint(-9, 1, (number, WIDTH), generator=generator)
    return F.normalize(values, dim=-1).to(dtype)


def state_of(features, codebook):
    state = SlideState.empty(codebook)
    state.add(features, codebook)
    return state


def codewords_of(features, codebook):
    distances = torch.cdist(features.double(), codebook.double(), compute_mode="donot_use_mm_for_euclid_dist")
    return distances.argmin(dim=1).tolist()


def integer_sums(features, codebook):
    """Sums in units of 2^-30 and counts, in Python's integers; ties of rounding go to the even number, as IEEE's."""
    sums, counts = [[0] * WIDTH for _ in range(CODEWORDS)], [0] * CODEWORDS
    for feature, codeword in zip(features.tolist(), codewords_of(features, codebook), strict=True):
        counts[codeword] += 1
        for axis, x in enumerate(feature):
            numerator, denominator = x.as_integer_ratio()
            quotient, rest = divmod(numerator << 30, denominator)
            up = 2 * rest > denominator or (2 * rest == denominator and quotient % 2 == 1)
            sums[codeword][axis] += quotient + up
    return sums, counts


@pytest.mark.parametrize("seed", range(20))
def test_any_order_chunks_and_workers_give_the_integers(codebook, seed):
    choose = random.Random(seed)
    features = make_features(300, seed, choose.choice([torch.float16, torch.bfloat16, torch.float32, torch.float64]))
    sums, counts = integer_sums(features, codebook)
    order = list(range(len(features)))
    choose.shuffle(order)
    workers = [SlideState.empty(codebook) for _ in range(choose.randrange(1, 5))]
    while order:
        chunk, order = order[: (size := choose.randrange(1, 40))], order[size:]
        choose.choice(workers).add(features[chunk], codebook)
    choose.shuffle(workers)
    merged = sum(workers)
    assert merged.fixed_sums.tolist() == sums
    assert merged.counts.tolist() == counts
    assert merged == state_of(features, codebook)
    assert merged.num_tiles == 300


@pytest.mark.parametrize("seed", range(10))
def test_what_was_added_can_be_taken_out_again(codebook, seed):
    features = make_features(200, seed)
    inside = torch.rand(200, generator=torch.Generator().manual_seed(seed)) > 0.6
    whole, region, rest = (state_of(part, codebook) for part in (features, features[inside], features[~inside]))
    assert whole - region == rest
    assert rest + region == region + rest == whole
    assert (whole - region) - rest == SlideState.empty(codebook)
    whole.add(features[inside], codebook, sign=-1)
    assert whole == rest


def test_plain_floating_point_sums_of_these_features_depend_on_their_order():
    column = make_features(300, 3)[:, 0].double().tolist()
    assert sum(column) != sum(reversed(column))


def test_the_grid_is_finer_than_float32_and_keeps_half_precision():
    features = make_features(4000)
    error = (fixed_point(features).double() * 2.0**-30 - features.double()).abs()
    assert float(error.max()) <= 2.0**-31
    assert not error[features.abs() >= 2.0**-7].any()
    half = features.half()
    assert torch.equal(fixed_point(half).double() * 2.0**-30, half.double())


def test_residuals_are_those_of_the_plain_sums(codebook):
    features = make_features(100, 2)
    expected, counts = residual_sums(features[None].double(), codebook.double())
    state = state_of(features, codebook)
    torch.testing.assert_close(state.residuals(codebook), expected[0], rtol=0, atol=1e-7)
    assert state.counts.tolist() == counts[0].tolist()


def test_adding_returns_codewords_and_combining_leaves_its_parts_alone(codebook):
    features = make_features(30)
    one, two = SlideState.empty(codebook), state_of(features[:3], codebook)
    assert torch.equal(one.add(features, codebook), assign_codewords(features, codebook))
    before = one.copy()
    together = one + two
    together.add(features, codebook)
    total = sum([one])
    total.add(features, codebook)
    assert one == before
    assert one != two


def test_a_file_brings_the_state_back(codebook, tmp_path):
    state = SlideState.empty(codebook, tile_size_px=256, tile_mpp=0.5, model_id="someone/model@abc")
    state.add(make_features(50), codebook)
    state.save(tmp_path / "slide.safetensors")
    loaded = SlideState.load(tmp_path / "slide.safetensors", codebook)
    assert loaded == state
    assert loaded.model_id == "someone/model@abc"
    assert (loaded.tile_size_px, loaded.tile_mpp) == (256, 0.5)
    assert loaded.codebook_sha256 == codebook_sha256(codebook.clone())


def test_another_codebook_is_refused_everywhere(codebook, tmp_path):
    state = state_of(make_features(10), codebook)
    state.save(tmp_path / "slide.safetensors")
    other = codebook.clone()
    other[2, 3] = torch.nextafter(other[2, 3], torch.tensor(10.0))
    with pytest.raises(ValueError, match=r"slide\.safetensors.*codebook"):
        SlideState.load(tmp_path / "slide.safetensors", other)
    for refused in (
        lambda: state.add(make_features(1), other),
        lambda: state.residuals(other),
        lambda: state + SlideState.empty(other),
        lambda: state - SlideState.empty(other),
    ):
        with pytest.raises(ValueError, match="codebook"):
            refused()
    with pytest.raises(ValueError, match=r"tile_mpp.*None.*0\.5"):
        state + SlideState.empty(codebook, tile_mpp=0.5)


def test_tiles_that_are_not_there_cannot_be_taken_out(codebook):
    features = make_features(20)
    with pytest.raises(ValueError, match="not all in the state"):
        state_of(features[:5], codebook) - state_of(features, codebook)
    other = make_features(20, seed=9)
    one = other[assign_codewords(other, codebook) == assign_codewords(features[:1], codebook)][:1]
    with pytest.raises(ValueError, match="not all in the state"):
        state_of(features[:1], codebook) - state_of(one, codebook)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 40.0])
def test_a_wrong_feature_names_its_tile_and_changes_nothing(codebook, value):
    features = make_features(20)
    features[13, 2] = value
    state = state_of(make_features(5, 4), codebook)
    before = state.copy()
    with pytest.raises(ValueError, match="tile 13 is not"):
        state.add(features, codebook)
    assert state == before


def test_damaged_files_are_named(codebook, tmp_path):
    path = tmp_path / "slide.safetensors"
    state_of(make_features(20), codebook).save(path)
    tensors = load_file(path)
    metadata = {"format": "dre-slcl-slide-state-1", "grid_bits": "30", "model_id": "", "tile_size_px": ""}
    metadata |= {"tile_mpp": "", "codebook_sha256": "0" * 64}
    damaged = {
        "cut": path.read_bytes()[:200],
        "other": ({"weight": torch.zeros(3)}, {"format": "pt"}),
        "negative": (tensors | {"counts": -tensors["counts"] - 1}, metadata),
        "float": (tensors | {"fixed_sums": tensors["fixed_sums"].double()}, metadata),
        "impossible": (tensors | {"counts": torch.zeros_like(tensors["counts"])}, metadata),
        "silent": (tensors, {"format": "dre-slcl-slide-state-1", "grid_bits": "30"}),
    }
    for name, content in damaged.items():
        wrong = tmp_path / f"{name}.safetensors"
        if isinstance(content, bytes):
            wrong.write_bytes(content)
        else:
            save_file(content[0], wrong, metadata=content[1])
        with pytest.raises(ValueError, match=f"{name}.safetensors"):
            SlideState.load(wrong)
    with pytest.raises(FileNotFoundError, match=r"absent\.safetensors"):
        SlideState.load(tmp_path / "absent.safetensors")


def test_a_model_embeds_a_state_and_refuses_an_empty_one():
    model = tiny_model()
    with torch.no_grad():
        features = model.get_tile_features(torch.randn(12, 3, IMAGE_SIZE, IMAGE_SIZE))
        expected = model.get_slide_features(features[None]).slide_embedding
    case = model.state_of_tiles(features[:5]) + model.state_of_tiles(features[5:])
    assert torch.equal(
        model.get_state_features(case).slide_embedding,
        model.get_state_features(model.state_of_tiles(features.flip(0))).slide_embedding,
    )
    torch.testing.assert_close(model.get_state_features(case).slide_embedding, expected, rtol=0, atol=1e-5)
    assert (case.tile_size_px, case.tile_mpp) == (IMAGE_SIZE, 0.5)
    with pytest.raises(ValueError, match="no tile"):
        model.get_state_features(model.empty_state())
    model.codebook[0, 0] += 1
    with pytest.raises(ValueError, match="codebook"):
        model.get_state_features(model.state_of_tiles(features[:1]) + case)
