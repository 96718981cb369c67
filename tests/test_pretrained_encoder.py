# SPDX-License-Identifier: Apache-2.0
"""Pretrained tile encoders and whole models: what their files say is used, and what is incomplete is refused."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import ViTImageProcessor, ViTModel

from dre_slcl.training.build_model import build_model
from dre_slcl.training.config import TrainConfig
from dre_slcl.training.pretrained_encoder import encoder_source, load_tile_encoder

from . import tiny_dataset
from .test_convert_encoder import write_timm_folder
from .tiny_models import tiny_image_processor, tiny_model, tiny_vit_config


@pytest.fixture
def vit(tmp_path):
    torch.manual_seed(0)
    ViTModel(tiny_vit_config()).save_pretrained(tmp_path / "vit")
    return tmp_path / "vit"


def settings(encoder, **changes):
    needed = {"dataset": "data", "output_dir": "out", "objective": "labels", "label_columns": ["kind"]}
    return TrainConfig(**needed | {"tile_encoder": str(encoder)} | changes)


def build(encoder, tile_size_px=32, **changes):
    return build_model(settings(encoder, **changes), tile_size_px=tile_size_px, tile_mpp=1.0)


def edit_weights(folder, edit):
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def test_names_that_timm_takes_mean_the_same():
    assert encoder_source("hf-hub:bioptimus/H-optimus-0") == "bioptimus/H-optimus-0"
    assert encoder_source("local-dir:weights/uni") == "weights/uni"
    assert encoder_source("timm/vit_small_patch16_224.dino") == "timm/vit_small_patch16_224.dino"


def test_mean_and_size_come_from_the_encoders_files_unless_given(vit, tmp_path):
    assert list(build(vit).image_processor.image_mean) == [0.5, 0.5, 0.5]
    size = {"height": 32, "width": 32}
    ViTImageProcessor(size=size, image_mean=[0.1, 0.2, 0.3], image_std=[0.4, 0.5, 0.6]).save_pretrained(vit)
    found = build(vit, tile_size_px=48).image_processor
    assert [*found.image_mean, *found.image_std] == [0.1, 0.2, 0.3, 0.4, 0.5, 0.6]
    assert (found.size["height"], found.do_resize) == (32, True)
    assert list(build(vit, image_mean=[0.0, 0.0, 0.0]).image_processor.image_mean) == [0, 0, 0]
    write_timm_folder(tmp_path / "timm", pickled=False)
    found = build(tmp_path / "timm").image_processor
    assert list(found.image_mean) == [0.485, 0.456, 0.406]
    assert (found.size["height"], found.do_resize) == (32, False)


def test_a_size_that_the_encoder_does_not_take_is_named_at_once(vit):
    with pytest.raises(ValueError, match=r"does not take tiles of 48 x 48 px .*set `encoder_image_size_px`"):
        build(vit, tile_size_px=48)
    assert build(vit, tile_size_px=48, encoder_image_size_px=32).image_processor.do_resize


@pytest.mark.parametrize("layout", ["transformers", "timm"])
def test_missing_weights_are_refused(layout, vit, tmp_path):
    folder = vit
    if layout == "timm":
        folder = tmp_path / "timm"
        write_timm_folder(folder, pickled=False)
    edit_weights(
        folder,
        lambda tensors: tensors.pop(next(name for name in tensors if "fc1.weight" in name or "intermediate" in name)),
    )
    with pytest.raises(ValueError, match="are incomplete: 1 tensors are missing, for example `"):
        load_tile_encoder(str(folder))


@pytest.mark.parametrize("layout", ["transformers", "timm"])
def test_weights_of_a_deeper_encoder_are_refused_and_those_of_a_head_are_not(layout, vit, tmp_path):
    folder = vit
    if layout == "timm":
        folder = tmp_path / "timm"
        write_timm_folder(folder, pickled=False)
    edit_weights(folder, lambda tensors: tensors.update({"head.weight": torch.zeros(3, 3)}))
    load_tile_encoder(str(folder))

    def deepen(tensors):
        for name in list(tensors):
            for word in ("blocks.1.", "layer.1."):
                if word in name:
                    tensors[name.replace(word, word.replace("1", "2"))] = tensors[name].clone()

    edit_weights(folder, deepen)
    with pytest.raises(ValueError, match=r"are of another model than its config\.json describes: 1[0-9] tensors"):
        load_tile_encoder(str(folder))


def test_a_folder_without_weights_is_refused(vit):
    (vit / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"cannot be loaded from a config\.json and safetensors weights"):
        load_tile_encoder(str(vit))


def test_an_incomplete_slide_encoder_is_refused_to_go_on_from(tmp_path):
    text = tiny_dataset.write_text_model(tmp_path / "text", hidden_size=16)
    model = tiny_model(report_hidden_size=16)
    model.save_pretrained(tmp_path / "model")
    tiny_image_processor().save_pretrained(tmp_path / "model")
    run = {"dataset": "data", "output_dir": "out", "model": str(tmp_path / "model"), "text_model": str(text)}
    geometry = {"tile_size_px": 32, "tile_mpp": 0.5}
    loaded = build_model(TrainConfig(**run), **geometry).model
    assert torch.equal(loaded.codebook, model.codebook)
    edit_weights(tmp_path / "model", lambda tensors: tensors.update({"residual_encoder.more": torch.zeros(1)}))
    with pytest.raises(ValueError, match=r"1 tensors have no place, for example `residual_encoder\.more`"):
        build_model(TrainConfig(**run), **geometry)
    edit_weights(
        tmp_path / "model",
        lambda tensors: [tensors.pop(name) for name in ("residual_encoder.more", "slide_projection.weight")],
    )
    with pytest.raises(ValueError, match=r"1 tensors are missing, for example `slide_projection\.weight`"):
        build_model(TrainConfig(**run), **geometry)
    (tmp_path / "model" / "model.safetensors").unlink()
    torch.save({}, tmp_path / "model" / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"pytorch_model\.bin holds pickled weights"):
        build_model(TrainConfig(**run), **geometry)


def test_no_local_path_is_published(vit):
    model = build(vit).model
    assert str(vit) not in json.dumps(model.config.to_dict(), default=str)
