# SPDX-License-Identifier: Apache-2.0
"""The calls of TITAN and PRISM, and what they refuse."""

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModel

from modeling_dre_slcl.feature_fit import check_features_fit, encoder_names

from .tiny_models import IMAGE_SIZE, tiny_config, tiny_model, tiny_tokenizer

TEMPLATES, CLASSES = ["a slide of CLASSNAME", "CLASSNAME tissue"], [["tumor"], ["normal", "normal tissue"]]


@pytest.fixture(scope="module")
def model():
    return tiny_model()


def make_features(*shape, seed=0):
    return torch.randn(*shape, 32, generator=torch.Generator().manual_seed(seed))


def expected(model, features):
    with torch.no_grad():
        return model.get_slide_features(F.normalize(features, dim=-1)[None]).slide_embedding[0]


def test_titans_call_gives_the_slide_embedding_whatever_the_features_norm(model):
    features, coords = make_features(1, 9) * 3, torch.arange(18).view(1, 9, 2)
    found = model.encode_slide_from_patch_features(features, coords, 512)
    assert found.shape == (1, 32)
    torch.testing.assert_close(found[0], expected(model, features[0]), rtol=0, atol=1e-5)
    half = model.encode_slide_from_patch_features(features.half(), coords, 512)
    torch.testing.assert_close(half, found, rtol=0, atol=0.02)


def test_prisms_call_takes_slides_of_different_length(model):
    features, lengths = make_features(3, 7), [7, 2, 5]
    mask = torch.arange(7) < torch.tensor(lengths)[:, None]
    features[~mask] = float("nan")
    found = model.slide_representations(features, mask)
    assert found["image_latents"].shape == (3, 4, 32)
    for slide, length in enumerate(lengths):
        torch.testing.assert_close(
            found["image_embedding"][slide], expected(model, features[slide, :length]), rtol=0, atol=1e-5
        )
    without = model.slide_representations(features[:1])["image_embedding"]
    torch.testing.assert_close(without[0], expected(model, features[0]), rtol=0, atol=1e-5)


def test_wrong_features_are_named(model):
    features, coords = make_features(1, 5), torch.zeros(1, 5, 2, dtype=torch.int64)
    features[0, 3, 1] = float("inf")
    with pytest.raises(ValueError, match="tile 3 of slide 0"):
        model.encode_slide_from_patch_features(features, coords, 256)
    for wrong in ((make_features(1, 5), coords[:, :4], 256), (make_features(1, 5), coords, 0)):
        with pytest.raises(ValueError, match="patch_size_lv0"):
            model.encode_slide_from_patch_features(*wrong)
    with pytest.raises(ValueError, match=r"\(slides, tiles, 32\)"):
        model.slide_representations(torch.zeros(1, 5, 384))
    with pytest.raises(ValueError, match=r"Slide 1 .*no tile"):
        model.slide_representations(make_features(2, 3), torch.tensor([[True] * 3, [False] * 3]))
    with pytest.raises(ValueError, match=r"Slide 0 .*no tile"):
        model.slide_representations(make_features(1, 0))


def test_titans_zero_shot_classifier_finds_its_tokenizer(tmp_path):
    with_text = tiny_model(text=True)
    before = with_text.zero_shot_classifier(tiny_tokenizer(), CLASSES, TEMPLATES)
    assert torch.equal(before, with_text.zero_shot_classifier(CLASSES, TEMPLATES, tokenizer=tiny_tokenizer()))
    with pytest.raises(ValueError, match="pass `tokenizer`"):
        with_text.zero_shot_classifier(CLASSES, TEMPLATES)
    with pytest.raises(ValueError, match="without a text model"):
        tiny_model().zero_shot_classifier(CLASSES, TEMPLATES)
    with_text.save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    loaded = AutoModel.from_pretrained(tmp_path, trust_remote_code=False)
    torch.testing.assert_close(loaded.zero_shot_classifier(CLASSES, TEMPLATES), before)


def test_features_of_another_encoder_or_geometry_are_refused_with_both_values():
    config = tiny_config("timm")
    names = encoder_names(config)
    assert names == ["convnext_atto"]
    fits = {"width": 32, "encoder": "timm/convnext_atto", "tile_mpp": 0.505, "tile_size_px": IMAGE_SIZE}
    check_features_fit(config, **fits)
    check_features_fit(config, width=32, encoder="dre_slcl")
    check_features_fit(config, width=32)
    for change, text in (
        ({"encoder": "uni_v2"}, "'uni_v2' instead of 'convnext_atto'"),
        ({"tile_mpp": 0.25}, r"0\.25 instead of 0\.5"),
        ({"tile_size_px": 256}, f"256 instead of {IMAGE_SIZE}"),
    ):
        with pytest.raises(ValueError, match=text):
            check_features_fit(config, **{**fits, **change})
        check_features_fit(config, **{**fits, **change}, allow_mismatch=True)
    with pytest.raises(ValueError, match=r"1024 wide.*32 wide"):
        check_features_fit(config, width=1024, allow_mismatch=True)
