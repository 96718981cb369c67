# SPDX-License-Identifier: Apache-2.0
"""The adapter to TRIDENT, against a stand-in with the signature of its base classes."""

import sys
from types import ModuleType

import pytest
import torch

from modeling_dre_slcl.trident_encoder import magnification, make_trident_encoder

from .tiny_models import IMAGE_SIZE, tiny_model


class BaseSlideEncoder(torch.nn.Module):
    """As TRIDENT's: `_build` says what the model is, `forward(batch, device)` encodes."""

    def __init__(self, freeze=True, **build_kwargs):
        super().__init__()
        self.enc_name = None
        self.model, self.precision, self.embedding_dim = self._build(**build_kwargs)


class CustomSlideEncoder(BaseSlideEncoder):
    def __init__(self, enc_name, model, precision=torch.float32, embedding_dim=None):
        super().__init__(freeze=False)
        self.enc_name, self.model, self.precision, self.embedding_dim = enc_name, model, precision, embedding_dim

    def _build(self, **build_kwargs):
        return None, None, None


@pytest.fixture
def trident(monkeypatch):
    load = ModuleType("trident.slide_encoder_models.load")
    load.CustomSlideEncoder, load.slide_to_patch_encoder_name = CustomSlideEncoder, {"titan": "conch_v15"}
    models = ModuleType("trident.slide_encoder_models")
    models.load = load
    for module in (ModuleType("trident"), models, load):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    return load


def make_batch(**attributes):
    generator = torch.Generator().manual_seed(0)
    facts = {"name": "slide-1", "patch_size": IMAGE_SIZE, "patch_size_level0": 64, "target_magnification": 20}
    return {
        "features": torch.randn(1, 11, 32, generator=generator),
        "coords": torch.zeros(1, 11, 2, dtype=torch.int64),
        "attributes": {**facts, **attributes},
    }


def test_it_keeps_tridents_contract(trident):
    model, batch = tiny_model(), make_batch()
    encoder = make_trident_encoder(model.train(), enc_name="ours", patch_encoder="dre_slcl")
    assert isinstance(encoder, CustomSlideEncoder)
    assert (encoder.enc_name, encoder.precision, encoder.embedding_dim) == ("ours", torch.float32, 32)
    assert trident.slide_to_patch_encoder_name["ours"] == "dre_slcl"
    assert not model.training
    expected = model.encode_slide_from_patch_features(batch["features"], batch["coords"], 64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = encoder(batch, "cpu")
    assert torch.equal(found, expected)
    assert found.shape == (1, 32)


def test_features_of_other_tiles_are_refused_unless_told(trident):
    encoder, lenient = (make_trident_encoder(tiny_model(), allow_mismatch=allow) for allow in (False, True))
    for attributes, text in (
        ({"patch_size": 512}, f"slide-1.*512 instead of {IMAGE_SIZE}"),
        ({"target_magnification": 40}, "40x.*--mag 20"),
        ({"tile_mpp": 0.25}, r"0\.25 instead of 0\.5"),
    ):
        with pytest.raises(ValueError, match=text):
            encoder(make_batch(**attributes), "cpu")
        assert lenient(make_batch(**attributes), "cpu").shape == (1, 32)
    # The exact resolution, where it is written, decides over the name; absent attributes are the text "None".
    encoder(make_batch(target_magnification=40, tile_mpp=0.5), "cpu")
    encoder(make_batch(target_magnification="None", patch_size="None"), "cpu")


def test_without_trident_one_error_says_so(monkeypatch):
    monkeypatch.setitem(sys.modules, "trident", None)
    with pytest.raises(ImportError, match=r"github\.com/mahmoodlab/TRIDENT"):
        make_trident_encoder(tiny_model())


def test_magnifications_are_tridents():
    assert [magnification(mpp) for mpp in (0.1, 0.25, 0.5, 1.0, 2.0, 5.0)] == [80, 40, 20, 10, 5, 2]
