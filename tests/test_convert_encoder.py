# SPDX-License-Identifier: Apache-2.0
"""Pickled tile encoders: DINO checkpoints laid out as HIPT's, against a forward pass written out here and timm's."""

import argparse
import json

import pytest
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from transformers import AutoModel

from dre_slcl.training.convert_encoder import convert_encoder
from dre_slcl.training.pretrained_encoder import load_tile_encoder

WIDTH, DEPTH, HEADS, PATCH_PX = 128, 3, 2, 16


def dino_tensors(grid, seed=0):
    """A random ViT under DINO's names, for `grid` x `grid` patches."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator) * 0.1

    tensors = {"cls_token": draw(1, 1, WIDTH), "pos_embed": draw(1, 1 + grid**2, WIDTH)}
    tensors |= {"patch_embed.proj.weight": draw(WIDTH, 3, PATCH_PX, PATCH_PX), "patch_embed.proj.bias": draw(WIDTH)}
    shapes = {"norm1": (WIDTH,), "attn.qkv": (3 * WIDTH, WIDTH), "attn.proj": (WIDTH, WIDTH), "norm2": (WIDTH,)}
    shapes |= {"mlp.fc1": (4 * WIDTH, WIDTH), "mlp.fc2": (WIDTH, 4 * WIDTH)}
    for name, shape in [(f"blocks.{i}.{part}", shape) for i in range(DEPTH) for part, shape in shapes.items()]:
        tensors |= {f"{name}.weight": draw(*shape) + (len(shape) == 1), f"{name}.bias": draw(shape[0])}
    return tensors | {"norm.weight": draw(WIDTH) + 1, "norm.bias": draw(WIDTH)}


def dino_forward(t, pixels):
    """DINO's VisionTransformer, written out; position embeddings are interpolated as its code does."""
    x = F.conv2d(pixels, t["patch_embed.proj.weight"], t["patch_embed.proj.bias"], stride=PATCH_PX)
    side = x.shape[-1]
    x = torch.cat([t["cls_token"].expand(len(x), -1, -1), x.flatten(2).transpose(1, 2)], dim=1)
    positions = t["pos_embed"]
    grid = int((positions.shape[1] - 1) ** 0.5)
    if grid != side:
        patches = positions[:, 1:].reshape(1, grid, grid, WIDTH).permute(0, 3, 1, 2)
        factor = (side + 0.1) / grid
        patches = F.interpolate(patches, scale_factor=(factor, factor), mode="bicubic")
        positions = torch.cat([positions[:, :1], patches.permute(0, 2, 3, 1).reshape(1, side**2, WIDTH)], dim=1)
    x = x + positions
    for i in range(DEPTH):

        def part(name, i=i):
            return t[f"blocks.{i}.{name}.weight"], t[f"blocks.{i}.{name}.bias"]

        y = F.linear(F.layer_norm(x, (WIDTH,), *part("norm1"), eps=1e-6), *part("attn.qkv"))
        q, k, v = y.reshape(*y.shape[:2], 3, HEADS, WIDTH // HEADS).permute(2, 0, 3, 1, 4)
        weights = (q @ k.transpose(-1, -2) * (WIDTH // HEADS) ** -0.5).softmax(dim=-1)
        x = x + F.linear((weights @ v).transpose(1, 2).reshape(x.shape), *part("attn.proj"))
        y = F.layer_norm(x, (WIDTH,), *part("norm2"), eps=1e-6)
        x = x + F.linear(F.gelu(F.linear(y, *part("mlp.fc1"))), *part("mlp.fc2"))
    return F.layer_norm(x, (WIDTH,), t["norm.weight"], t["norm.bias"], eps=1e-6)[:, 0]


@pytest.fixture
def checkpoint(tmp_path):
    """Laid out as HIPT's file: two networks, a projection head, the optimizer and the options."""
    teacher = {f"backbone.{name}": value for name, value in dino_tensors(14, seed=1).items()}
    teacher |= {"head.mlp.0.weight": torch.zeros(2, 2)}
    student = {f"module.backbone.{name}": value for name, value in dino_tensors(14, seed=2).items()}
    content = {"teacher": teacher, "student": student, "epoch": 3, "args": argparse.Namespace(arch="vit_small")}
    content["optimizer"] = {"state": {0: {"step": 1, "exp_avg": torch.zeros(2)}}, "param_groups": [{"lr": 0.1}]}
    torch.save(content, tmp_path / "vit256_small_dino.pth")
    return tmp_path / "vit256_small_dino.pth"


@pytest.mark.parametrize(("key", "seed"), [(None, 1), ("student", 2)])
def test_a_dino_checkpoint_gives_the_features_that_dino_gives(checkpoint, tmp_path, key, seed):
    convert_encoder(checkpoint, tmp_path / "encoder", key=key)
    encoder, expects = load_tile_encoder(str(tmp_path / "encoder"))
    assert (expects.mean, expects.std, expects.size_px) == ([0.5] * 3, [0.5] * 3, 256)
    pixels = torch.randn(2, 3, 256, 256, generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        found = encoder.eval()(pixel_values=pixels).last_hidden_state[:, 0]
        torch.testing.assert_close(found, dino_forward(dino_tensors(14, seed), pixels), rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_without_interpolation_the_features_are_those_of_timm(checkpoint, tmp_path):
    convert_encoder(checkpoint, tmp_path / "encoder", image_size_px=224)
    sizes = {"embed_dim": WIDTH, "depth": DEPTH, "num_heads": HEADS, "num_classes": 0}
    model = timm.models.vision_transformer.VisionTransformer(img_size=224, patch_size=PATCH_PX, **sizes).eval()
    model.load_state_dict(dino_tensors(14, seed=1))
    pixels = torch.randn(2, 3, 224, 224)
    with torch.no_grad():
        found = AutoModel.from_pretrained(tmp_path / "encoder").eval()(pixel_values=pixels).last_hidden_state[:, 0]
        torch.testing.assert_close(found, model(pixels), rtol=1e-4, atol=1e-4)


def write_timm_folder(folder, *, pickled):
    """A folder as UNI's repository: `architecture`, `model_args` and `pretrained_cfg`."""
    folder.mkdir()
    sizes = {"embed_dim": 64, "depth": 2, "num_heads": 2}
    model_args = {"img_size": 32, "patch_size": 8, "init_values": 1e-5, "num_classes": 0, **sizes}
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", **model_args).eval()
    expects = {"input_size": [3, 32, 32], "mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}
    config = {"architecture": "vit_tiny_patch16_224", "num_classes": 0, "num_features": 64, "global_pool": "token"}
    config |= {"model_args": model_args, "pretrained_cfg": expects}
    (folder / "config.json").write_text(json.dumps(config))
    if pickled:
        torch.save(model.state_dict(), folder / "pytorch_model.bin")
    else:
        from safetensors.torch import save_file

        save_file(model.state_dict(), folder / "model.safetensors", metadata={"format": "pt"})
    return model


def test_a_folder_as_unis_with_a_pickle_is_refused_by_name_and_converted(tmp_path):
    model = write_timm_folder(tmp_path / "uni", pickled=True)
    with pytest.raises(ValueError, match=r"pytorch_model\.bin holds pickled weights.*convert-encoder"):
        load_tile_encoder(str(tmp_path / "uni"))
    convert_encoder(tmp_path / "uni" / "pytorch_model.bin", tmp_path / "converted")
    stored = load_file(tmp_path / "converted" / "model.safetensors")
    assert all(torch.equal(stored[name], value) for name, value in model.state_dict().items())
    for name in (f"local-dir:{tmp_path / 'converted'}", str(tmp_path / "converted")):
        encoder, expects = load_tile_encoder(name)
        assert (expects.mean, expects.size_px) == ([0.485, 0.456, 0.406], 32)
        pixels = torch.randn(2, 3, 32, 32)
        with torch.no_grad():
            assert torch.equal(encoder.eval()(pixel_values=pixels).pooler_output, model(pixels))


class Harmful:
    def __reduce__(self):
        return (print, ("code of the file has run",))


def test_code_in_a_checkpoint_never_runs(tmp_path, capfd):
    torch.save({"teacher": {"x": torch.zeros(1)}, "args": Harmful()}, tmp_path / "evil.pth")
    with pytest.raises(ValueError, match=r"evil\.pth: is damaged or holds more than plain tensors"):
        convert_encoder(tmp_path / "evil.pth", tmp_path / "out")
    assert "has run" not in "".join(capfd.readouterr())
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([torch.zeros(1)], "holds a list, expected named tensors"),
        ({"epoch": 1}, "holds no named tensors"),
        ({"teacher": {"fc.weight": torch.zeros(1)}}, "holds no ViT of DINO: 'patch_embed.proj.weight' is missing"),
    ],
)
def test_what_is_no_encoder_is_refused(tmp_path, content, message):
    torch.save(content, tmp_path / "file.pth")
    with pytest.raises(ValueError, match=message):
        convert_encoder(tmp_path / "file.pth", tmp_path / "out")


@pytest.mark.slow
def test_an_incomplete_checkpoint_is_refused(tmp_path):
    tensors = dino_tensors(14)
    del tensors["blocks.1.norm2.bias"]
    torch.save({"teacher": tensors}, tmp_path / "file.pth")
    with pytest.raises(ValueError, match=r"`layers\.1\.layernorm_after\.bias` does not fit"):
        convert_encoder(tmp_path / "file.pth", tmp_path / "out")
