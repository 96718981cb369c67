# SPDX-License-Identifier: Apache-2.0
"""The wiring of the four parts: forward, saving and loading, precision, checkpointing, and the bank's place."""

import json

import pytest
import torch
from safetensors import safe_open

from modeling_dre_slcl import DreSlclModel, MemoryBank
from modeling_dre_slcl.contrastive_loss import slide_level_contrastive_loss
from modeling_dre_slcl.slide_inference import describe_state, encode_tile_batches

from .tiny_models import IMAGE_SIZE, tiny_config, tiny_image_processor, tiny_model, tiny_tokenizer

ENCODERS = ["vit", "timm"]


def random_tiles(*shape, seed=0):
    return torch.randn(*shape, 3, IMAGE_SIZE, IMAGE_SIZE, generator=torch.Generator().manual_seed(seed))


def random_reports(count, width=16):
    return torch.randn(count, width, generator=torch.Generator().manual_seed(5))


@pytest.fixture(scope="module")
def vit_model():
    return tiny_model()


@pytest.fixture(scope="module")
def text_model():
    return tiny_model(text=True)


@pytest.mark.parametrize("encoder", ENCODERS)
def test_encoding_in_chunks_by_the_running_state_equals_forward_over_all_tiles(encoder):
    model = tiny_model(encoder)
    tiles = random_tiles(13)
    with torch.no_grad():
        expected = model(tiles[None])
        state = model.empty_state()
        for start in range(0, 13, 4):
            state.add(model.get_tile_features(tiles[start : start + 4]), model.codebook)
        found = model.get_state_features(state)
        by_features = model.get_slide_features(model.get_tile_features(tiles)[None])
    for outputs in (found, by_features):
        for name in ("slide_embedding", "slide_projection", "residuals", "codeword_counts"):
            torch.testing.assert_close(outputs[name].float(), expected[name], rtol=0, atol=1e-5)
    torch.testing.assert_close(expected.slide_projection.norm(dim=1), torch.ones(1))


def test_uint8_tiles_in_batches_give_what_the_processor_and_forward_give(vit_model):
    pixels = torch.randint(0, 256, (7, 40, 40, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    processor = tiny_image_processor()
    batches = [pixels[:3].numpy(), pixels[3:6].numpy(), pixels[6:].numpy()]
    state, features = encode_tile_batches(vit_model, processor, batches, keep_features=True)
    one_by_one = [processor(tile.numpy(), return_tensors="pt")["pixel_values"] for tile in pixels]
    with torch.no_grad():
        expected = vit_model(torch.cat(one_by_one)[None])
    torch.testing.assert_close(features, expected.tile_features[0], rtol=0, atol=1e-5)
    described = describe_state(vit_model, state)
    assert described["codeword_counts"].tolist() == expected.codeword_counts[0].tolist()
    for name in ("slide_embedding", "slide_projection", "residuals"):
        assert described[name].dtype == torch.float32
        torch.testing.assert_close(described[name], expected[name][0], rtol=0, atol=1e-5)


def test_padding_changes_nothing(vit_model):
    tiles, mask = random_tiles(2, 5), torch.tensor([[True] * 5, [True] * 3 + [False] * 2])
    with torch.no_grad():
        padded = vit_model(tiles, tile_mask=mask)
        alone = [vit_model(tiles[:1]), vit_model(tiles[1:, :3])]
    for name in ("slide_embedding", "residuals", "codeword_counts"):
        expected = torch.cat([outputs[name] for outputs in alone])
        torch.testing.assert_close(padded[name], expected, rtol=0, atol=1e-5)


def test_sampled_tiles_and_the_bank_make_the_whole_slide():
    """A forward over 3 tiles with what the bank holds of the rest equals the forward over all."""
    model = tiny_model()
    tiles = random_tiles(1, 10)
    slides, sampled = torch.tensor([0]), torch.tensor([[1, 4, 7]])
    model.memory_bank.allocate([10], dtype=torch.float32)
    with torch.no_grad():
        features = model.get_tile_features(tiles[0])
        model.memory_bank.write(slides, torch.arange(10)[None], features[None], model.codebook, step=0)
        stored = model.memory_bank.residuals_of_others(slides, sampled, model.codebook)
        found = model(tiles[:, sampled[0]], stored_residuals=stored[0], stored_counts=stored[1])
        expected = model(tiles)
    for name in ("slide_embedding", "slide_projection", "residuals", "codeword_counts"):
        torch.testing.assert_close(found[name], expected[name], rtol=0, atol=1e-5)


def test_the_loss_is_that_of_the_projections(vit_model):
    tiles, reports, groups = random_tiles(4, 3), random_reports(4), torch.tensor([0, 1, 1, 2])
    outputs = vit_model(tiles, report_embeds=reports, group_ids=groups)
    torch.testing.assert_close(outputs.report_projection, reports / reports.norm(dim=1, keepdim=True))
    scale = vit_model.logit_scale.exp()
    expected = slide_level_contrastive_loss(outputs.slide_projection, outputs.report_projection, scale, groups)
    torch.testing.assert_close(outputs.loss, expected)
    cosines = outputs.slide_projection @ outputs.report_projection.T
    torch.testing.assert_close(outputs.logits_per_slide, scale * cosines)


def test_reports_are_compared_after_their_mean_is_taken_out(tmp_path):
    model, tiles, reports = tiny_model(), random_tiles(3, 2), random_reports(3)
    assert not model.report_mean.any()
    plain = model(tiles, report_embeds=reports)
    model.report_mean.copy_(torch.arange(16.0))
    model.save_pretrained(tmp_path)
    shifted = DreSlclModel.from_pretrained(tmp_path)(tiles, report_embeds=reports + torch.arange(16.0))
    torch.testing.assert_close(shifted.report_projection, plain.report_projection, rtol=0, atol=1e-5)
    torch.testing.assert_close(shifted.loss, plain.loss, rtol=0, atol=1e-5)


def test_the_logit_scale_is_bounded():
    model = tiny_model(max_logit_scale=2.0)
    model.logit_scale.data.fill_(50.0)
    outputs = model(random_tiles(2, 2), report_embeds=random_reports(2))
    assert float(outputs.logits_per_slide.detach().abs().max()) <= 2.0 + 1e-5


def test_optional_outputs_come_only_when_asked_for(vit_model):
    tiles = random_tiles(2, 3)
    always = ["slide_embedding", "slide_projection", "residuals", "codeword_counts", "tile_features"]
    plain = vit_model(tiles)
    assert list(plain) == always
    full = vit_model(tiles, output_hidden_states=True, output_attentions=True)
    assert set(full) == {*always, "hidden_states", "attentions"}
    assert len(full.hidden_states) == 3
    assert [weights.shape for weights in full.attentions] == [(2, 4, 4, 4)] * 2
    torch.testing.assert_close(full.slide_embedding, plain.slide_embedding, rtol=0, atol=1e-6)
    as_tuple = vit_model(tiles, return_dict=False)
    assert isinstance(as_tuple, tuple)
    assert torch.equal(as_tuple[0], plain.slide_embedding)


def test_refuses_pixels_without_a_slide_dimension(vit_model):
    with pytest.raises(ValueError, match=r"`pixel_values` must have shape \(slides, tiles, channels, height, width\)"):
        vit_model(random_tiles(3))


def test_a_slide_without_a_single_tile_stays_finite(vit_model):
    outputs = vit_model(random_tiles(1, 2), tile_mask=torch.zeros(1, 2, dtype=torch.bool))
    assert torch.isfinite(outputs.slide_projection).all()
    assert not outputs.codeword_counts.any()


def test_text_features_are_pooled_projected_and_normalised(text_model):
    tokens = tiny_tokenizer()(["a tumor of grade", "normal tissue"], padding=True, return_tensors="pt")
    with torch.no_grad():
        found = text_model.get_text_features(tokens["input_ids"], tokens["attention_mask"])
        states = text_model.text_encoder(tokens["input_ids"], tokens["attention_mask"]).last_hidden_state
        means = [state[mask.bool()].mean(dim=0) for state, mask in zip(states, tokens["attention_mask"], strict=True)]
        expected = text_model.text_projection(torch.stack(means))
    torch.testing.assert_close(found, expected / expected.norm(dim=1, keepdim=True), rtol=0, atol=1e-6)
    outputs = text_model(random_tiles(2, 2), **{key: tokens[key] for key in ("input_ids", "attention_mask")})
    torch.testing.assert_close(outputs.report_projection, found)
    assert outputs.loss.requires_grad


def test_the_text_model_is_frozen_also_in_training_and_after_loading(tmp_path, text_model):
    tokens = torch.tensor([[2, 7, 3]])
    expected = text_model.get_text_features(tokens)
    text_model.save_pretrained(tmp_path)
    loaded = DreSlclModel.from_pretrained(tmp_path).train()
    assert loaded.training
    assert loaded.tile_encoder.training
    assert not any(module.training for module in loaded.text_encoder.modules())
    assert not any(parameter.requires_grad for parameter in loaded.text_encoder.parameters())
    assert all(parameter.requires_grad for parameter in loaded.text_projection.parameters())
    torch.testing.assert_close(loaded.get_text_features(tokens), expected)


@pytest.mark.parametrize("encoder", ENCODERS)
@pytest.mark.parametrize("text", [False, True])
def test_a_saved_model_loads_bit_equal_and_without_a_bank(tmp_path, encoder, text):
    model = tiny_model(encoder, text=text)
    model.memory_bank.allocate([3, 2])
    model.memory_bank.write(torch.tensor([0]), torch.tensor([[1]]), torch.randn(1, 1, 32), model.codebook, step=1)
    model.save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", framework="pt") as file:
        names = list(file.keys())
    assert not [name for name in names if "bank" in name]
    assert any("codebook" in name for name in names)

    loaded, report = DreSlclModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values()), report
    for name in MemoryBank.BUFFER_NAMES:
        assert len(getattr(loaded.memory_bank, name)) == 0, name
    state = loaded.state_dict()
    assert state.keys() == model.state_dict().keys()
    assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())
    tiles = random_tiles(2, 3)
    with torch.no_grad():
        assert torch.equal(loaded(tiles).slide_projection, model(tiles).slide_projection)


def test_all_the_banks_buffers_are_non_persistent_and_kept_from_broadcast(vit_model):
    buffers = {name for name, _ in vit_model.named_buffers() if name.startswith("memory_bank.")}
    assert buffers == {f"memory_bank.{name}" for name in MemoryBank.BUFFER_NAMES}
    assert buffers.isdisjoint(vit_model.state_dict())
    assert buffers <= set(vit_model._ddp_params_and_buffers_to_ignore)


def test_a_loaded_bank_can_be_allocated_and_used(tmp_path, vit_model):
    vit_model.save_pretrained(tmp_path)
    loaded = DreSlclModel.from_pretrained(tmp_path)
    loaded.memory_bank.allocate([2])
    loaded.memory_bank.write(torch.tensor([0]), torch.tensor([[0]]), torch.ones(1, 1, 32), loaded.codebook, step=0)
    assert loaded.memory_bank.health(0)["coverage"] == 0.5


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_finite_and_close_and_leaves_the_bank_alone(dtype):
    model, exact = tiny_model(), tiny_model()
    model.memory_bank.allocate([2])
    model.to(dtype)
    assert model.memory_bank.features.dtype == torch.float16
    assert model.memory_bank.feature_sums.dtype == torch.float64
    tiles = random_tiles(2, 3)
    with torch.no_grad():
        found, expected = model(tiles.to(dtype)), exact(tiles)
        assert (expected.codeword_counts == 0).any()  # float16 knows no small epsilon for empty codewords
        state = model.empty_state()
        state.add(found.tile_features[0], model.codebook)
        by_state = model.get_state_features(state).slide_projection[0]
    assert found.slide_projection.dtype == dtype
    cosine = (found.slide_projection.float() * expected.slide_projection).sum(dim=1)
    assert float(cosine.min()) > 0.99
    torch.testing.assert_close(by_state, found.slide_projection[0], rtol=0, atol=0.02)


def test_sdpa_equals_eager():
    tiles = random_tiles(2, 3)
    outputs = {}
    for implementation in ("sdpa", "eager"):
        torch.manual_seed(0)
        model = DreSlclModel._from_config(tiny_config(), attn_implementation=implementation).eval()
        assert model.tile_encoder.config._attn_implementation == implementation
        with torch.no_grad():
            outputs[implementation] = model(tiles)
    for name in ("tile_features", "slide_projection"):
        torch.testing.assert_close(outputs["sdpa"][name], outputs["eager"][name], rtol=0, atol=1e-5)


@pytest.mark.parametrize("encoder", ENCODERS)
def test_activation_checkpointing_recomputes_and_gives_the_same_gradients(encoder):
    def gradients(model):
        calls = []
        for module in model.tile_encoder.modules():
            if isinstance(module, torch.nn.LayerNorm):
                module.register_forward_hook(lambda *_: calls.append(1))
        model(random_tiles(3, 2), report_embeds=random_reports(3)).loss.backward()
        return {name: parameter.grad for name, parameter in model.named_parameters()}, len(calls)

    plain, checkpointed = tiny_model(encoder).train(), tiny_model(encoder).train()
    checkpointed.activation_checkpointing_enable()
    assert checkpointed.is_activation_checkpointing
    (expected, calls), (found, calls_with_recomputing) = gradients(plain), gradients(checkpointed)
    assert calls_with_recomputing > calls
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=0, atol=1e-6, msg=name)
    checkpointed.activation_checkpointing_disable()
    assert not checkpointed.is_activation_checkpointing


def test_new_weights_are_drawn_on_their_scales():
    torch.manual_seed(0)
    config = tiny_config(num_codewords=64, logit_scale_init_value=1.5)
    model = DreSlclModel(config)
    assert float(model.codebook.norm(dim=1).mean()) == pytest.approx(1.0, abs=0.1)
    assert float(model.residual_encoder.codeword_embedding.detach().std()) == pytest.approx(0.02, rel=0.1)
    assert model.logit_scale.item() == 1.5


def test_missing_parts_are_initialised_and_reported(tmp_path):
    """A checkpoint without a text model loads into a config with one: only that is new."""
    model = tiny_model(report_hidden_size=24, text_projection="linear")
    model.save_pretrained(tmp_path)
    options = {"config": tiny_config(text=True), "output_loading_info": True}
    loaded, report = DreSlclModel.from_pretrained(tmp_path, **options)
    assert report["missing_keys"]
    assert all(name.startswith("text_encoder.") for name in report["missing_keys"])
    assert torch.equal(loaded.codebook, model.codebook)
    assert all(torch.isfinite(parameter).all() for parameter in loaded.parameters())


def test_the_saved_config_names_the_code_and_the_pipeline(tmp_path, vit_model):
    vit_model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["auto_map"] == {
        "AutoConfig": "configuration_dre_slcl.DreSlclConfig",
        "AutoModel": "modeling_dre_slcl.DreSlclModel",
    }
    assert config["custom_pipelines"] == {
        "slide-feature-extraction": {
            "impl": "pipeline_dre_slcl.SlideFeatureExtractionPipeline",
            "pt": ["AutoModel"],
        }
    }
