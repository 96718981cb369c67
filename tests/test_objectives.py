# SPDX-License-Identifier: Apache-2.0
"""Training runs of seconds with every objective and contrastive option, and with adapters."""

import pyarrow.parquet as pq
import pytest
import torch
from transformers import AutoModel, AutoModelForImageClassification, ViTConfig, ViTModel

from dre_slcl.hub.check_export import check_export
from dre_slcl.hub.gather import gather_model
from dre_slcl.training.config import TrainConfig
from dre_slcl.training.lora import load_adapted_model
from dre_slcl.training.metrics_log import read_metrics
from dre_slcl.training.train import train
from dre_slcl.training.trainer import Trainer
from modeling_dre_slcl import DreSlclForSlideClassification, DreSlclModel

from . import tiny_dataset

KINDS = ["solid", "tubular", "solid", "solid", "", "tubular"]  # of the six cases; the solid ones are reddish


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Case 0 has no report, case 4 no kind, case 5 neither a report nor a flag."""
    root = tmp_path_factory.mktemp("objectives")
    tiny_dataset.write_dataset(root / "data")
    tiny_dataset.write_text_model(root / "text")
    path = root / "data" / "slides" / "train-00000-of-00001.parquet"
    rows = pq.read_table(path).to_pylist()
    for place, row in enumerate(rows):
        case = place // 2
        row["report"] = "" if case in (0, 5) else row["report"].replace(" ", ". ", 2)
        row["kind"] = KINDS[case]
        row["egfr"], row["kras"] = (None, None) if case == 5 else (case % 2, None if case == 1 else 1)
    pq.write_table(pq.read_table(path).from_pylist(rows), path)
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    ViTModel(ViTConfig(**sizes, image_size=tiny_dataset.TILE_PX, patch_size=8)).save_pretrained(root / "vit")
    return root


def settings(data, tmp_path, **changes):
    run = tiny_dataset.train_settings(data, tmp_path / "run") | {"num_steps": 4, "finalize_steps": 2}
    return run | {"codebook_refits": [], "checkpoint_steps": 2} | changes


LABELS = {"objective": "labels", "label_columns": ["kind"], "text_model": None}


def test_labels_alone_are_learned_without_a_text_model(data, tmp_path):
    run = settings(data, tmp_path, **LABELS, num_steps=60, finalize_steps=0, checkpoint_steps=60)
    run |= {"learning_rate": 3e-3, "head_learning_rate": 3e-3, "augment_stain": 0.0, "class_weights": {"solid": 1.25}}
    trainer = Trainer(TrainConfig(**run))
    assert len(trainer.data.slides) == 10  # with a kind, reports or not
    before = trainer.unwrapped.slide_projection.weight.clone()
    trainer.run()
    losses = [row["loss"] for row in read_metrics(tmp_path / "run" / "metrics.jsonl")]
    assert sum(losses[-5:]) < 0.5 * sum(losses[:5])
    assert torch.equal(trainer.unwrapped.slide_projection.weight, before)  # nothing trains it, no weight decay either
    model = AutoModelForImageClassification.from_pretrained(tmp_path / "run" / "model")
    assert type(model) is DreSlclForSlideClassification
    assert model.config.id2label == {0: "solid", 1: "tubular"}
    assert model.config.class_weights == [1.25, 1.0]
    assert model.text_encoder is None
    bank = trainer.unwrapped.memory_bank
    for place, slide in enumerate(trainer.data.owned):
        state = model.get_slide_features(
            bank.features[bank.slide_start[place] : bank.slide_start[place + 1]][None].float()
        )
        found = model.label_probabilities(state.slide_embedding[0])
        assert max(found, key=found.get) == trainer.data.source.slides[slide].labels["kind"]


@pytest.mark.parametrize(
    "options",
    [
        {"contrastive_loss": "siglip"},
        {"contrastive_loss": "siglip", "report_negatives": "all", "bank_mode": "paper", "retrieved_per_slide": 2},
        {"report_negatives": "all", "report_separator": ".", "report_sections": "sample"},
        {"report_separator": "."},
        {"objective": "both", "label_columns": ["egfr", "kras"], "label_weight": 0.5},
        {"objective": "both", "label_columns": ["kind"], "report_negatives": "all", "contrastive_loss": "siglip"},
    ],
    ids=str,
)
def test_every_option_trains_and_resumes_to_the_bit(data, tmp_path, options):
    # Four cases have reports, so batches hold at most four slides.
    whole = settings(data, tmp_path / "whole", **options)
    assert train(TrainConfig(**whole)) == 0
    parted = settings(data, tmp_path / "parted", **options)
    trainer = Trainer(TrainConfig(**parted))
    trainer._after_step = stop_after(3, trainer)
    trainer.run()
    assert train(TrainConfig(**parted)) == 0
    class_of = AutoModelForImageClassification if "objective" in options else AutoModel
    one, other = (class_of.from_pretrained(tmp_path / name / "run" / "model") for name in ("whole", "parted"))
    for (name, value), again in zip(one.state_dict().items(), other.state_dict().values(), strict=True):
        assert value.isfinite().all()
        assert torch.equal(value, again), name
    assert (one.logit_bias is not None) == (options.get("contrastive_loss") == "siglip")
    if "objective" in options:
        assert list(one.config.id2label.values()) in (["egfr", "kras"], ["solid", "tubular"])


def stop_after(step, trainer):
    """As a signal would: a checkpoint is saved, and the run ends."""
    after_step = trainer._after_step

    def stopping(plan, row, bar):
        trainer.signals.received = 15 if plan.step + 1 == step else None
        return after_step(plan, row, bar)

    return stopping


def test_siglip_starts_as_its_authors_start_it(data, tmp_path):
    model = Trainer(TrainConfig(**settings(data, tmp_path, contrastive_loss="siglip"))).unwrapped
    assert model.logit_scale.exp().item() == pytest.approx(10)
    assert model.logit_bias.item() == -10


def test_a_trained_slide_encoder_is_tuned_on_labels(data, tmp_path):
    assert train(TrainConfig(**settings(data, tmp_path / "first"))) == 0
    start = tmp_path / "first" / "run" / "model"
    run = settings(data, tmp_path / "second", **LABELS) | {"model": str(start), "tile_encoder_config": None}
    trainer = Trainer(TrainConfig(**run))
    first = DreSlclModel.from_pretrained(start)
    for name, value in first.state_dict().items():
        assert torch.equal(trainer.unwrapped.state_dict()[name], value), name
    assert trainer.run() is None
    again = run | {"model": str(tmp_path / "second" / "run" / "model"), "output_dir": str(tmp_path / "third")}
    kept = Trainer(TrainConfig(**again)).unwrapped
    assert torch.equal(kept.classifier.weight, trainer.unwrapped.classifier.weight)


def check_publishing(folder, gathered, base):
    """The adapters go out with a card that says how to load them, once they refer to a repository."""
    gather_model(folder, gathered, repo_id="namespace/name")
    assert [finding.file for finding in check_export(gathered)] == ["adapter_config.json"]
    config = gathered / "adapter_config.json"
    config.write_text(config.read_text().replace(base, "namespace/tile-encoder"))
    assert check_export(gathered) == []
    assert "load_adapted_model(snapshot_download" in (gathered / "README.md").read_text()


@pytest.mark.parametrize("export", ["merged", "adapter"])
def test_adapters_train_resume_and_are_published(data, tmp_path, export):
    base = {"tile_encoder": str(data / "vit"), "tile_encoder_config": None, "lora_export": export}
    run = settings(data, tmp_path, **base, lora={"r": 2, "lora_alpha": 8}, finalize_steps=0)
    trainer = Trainer(TrainConfig(**run))
    names = [name for name, p in trainer.unwrapped.tile_encoder.named_parameters() if p.requires_grad]
    assert names
    assert all("lora_" in name for name in names)
    trainer._after_step = stop_after(3, trainer)
    trainer.run()
    trainer = Trainer(TrainConfig(**run))
    assert trainer._resume() == 3
    pixels = torch.randn(2, 3, tiny_dataset.TILE_PX, tiny_dataset.TILE_PX)
    trainer._train(3)
    with torch.no_grad():
        adapted = trainer.unwrapped.eval().get_tile_features(pixels)
    folder = tmp_path / "run" / "model"
    trainer._save_model(folder)
    names = {path.name for path in folder.iterdir()}
    original = ViTModel.from_pretrained(data / "vit")
    if export == "merged":
        model = AutoModel.from_pretrained(folder)
        assert not any("lora" in name for name in model.state_dict())
    else:
        assert {"adapter_config.json", "adapter_model.safetensors"} <= names
        from safetensors import safe_open

        with safe_open(folder / "model.safetensors", framework="pt") as stored:
            assert not any("tile_encoder" in name for name in stored.keys())  # noqa: SIM118
        model = load_adapted_model(folder)
        check_publishing(folder, tmp_path / "gathered", str(data / "vit"))
    torch.testing.assert_close(model.eval().get_tile_features(pixels), adapted, rtol=1e-4, atol=1e-5)
    first = original.state_dict()["layers.0.attention.q_proj.weight"]
    assert not torch.equal(model.tile_encoder.state_dict()["layers.0.attention.q_proj.weight"], first)
    kept = original.state_dict()["layers.0.mlp.fc1.weight"]
    assert torch.equal(model.tile_encoder.state_dict()["layers.0.mlp.fc1.weight"], kept)
