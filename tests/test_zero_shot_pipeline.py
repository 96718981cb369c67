# SPDX-License-Identifier: Apache-2.0
"""Zero-shot classification of slides against ensembles of prompts that are written out and encoded by hand."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from transformers import pipeline

from modeling_dre_slcl import DreSlclProcessor, ZeroShotSlideClassificationPipeline
from modeling_dre_slcl.text_embeddings import TextEmbeddings
from modeling_dre_slcl.zero_shot import DEFAULT_TEMPLATES, PLACEHOLDER

from .tiny_models import tiny_image_processor, tiny_model, tiny_tokenizer
from .tiny_slide import write_tiny_slide

TASK = "zero-shot-slide-classification"
LABELS = {"cancer": ["tumor", "grade tumor"], "healthy": ["normal tissue"], "other": ["slide"]}
TEMPLATES = ["a slide of CLASSNAME", "CLASSNAME"]


@pytest.fixture(scope="module")
def model():
    return tiny_model(text=True)


@pytest.fixture(scope="module")
def pipe(model):
    return ZeroShotSlideClassificationPipeline(
        model=model, tokenizer=tiny_tokenizer(), image_processor=tiny_image_processor(), device="cpu"
    )


@pytest.fixture(scope="module")
def slides(tmp_path_factory):
    folder = tmp_path_factory.mktemp("slides")
    return {"good": write_tiny_slide(folder / "good.tif"), "empty": write_tiny_slide(folder / "e.tif", tissue=False)}


def probabilities_by_hand(model, projection, labels, templates):
    """Prompt by prompt, through the text model itself, in numpy."""
    vectors = []
    for names in labels.values():
        encoded = []
        for name in names:
            for template in templates:
                tokens = tiny_tokenizer()(template.replace("CLASSNAME", name), return_tensors="pt")
                with torch.no_grad():
                    states = model.text_encoder(**tokens).last_hidden_state[0].mean(dim=0)
                    vector = model.text_projection(states - model.report_mean).double().numpy()
                encoded.append(vector / np.linalg.norm(vector))
        mean = np.mean(encoded, axis=0)
        vectors.append(mean / np.linalg.norm(mean))
    logits = np.exp(model.logit_scale.item()) * np.stack(vectors) @ np.asarray(projection, dtype=np.float64)
    shares = np.exp(logits - logits.max())
    return dict(zip(labels, shares / shares.sum(), strict=True))


def check(result, expected):
    assert {row["label"] for row in result} == set(expected)
    assert [row["score"] for row in result] == sorted((row["score"] for row in result), reverse=True)
    for row in result:
        assert row["score"] == pytest.approx(expected[row["label"]], abs=1e-5)


def test_scores_are_those_of_an_ensemble_written_out(pipe, model, slides):
    projection = model.encode_slide(slides["good"], image_processor=tiny_image_processor())["slide_projection"]
    result = pipe(slides["good"], candidate_labels=LABELS, templates=TEMPLATES)
    expected = probabilities_by_hand(model, projection, LABELS, TEMPLATES)
    check(result, expected)
    assert max(expected.values()) - min(expected.values()) > 0.01
    default = pipe(slides["good"], ["tumor", "normal tissue"])
    plain = {"tumor": ["tumor"], "normal tissue": ["normal tissue"]}
    check(default, probabilities_by_hand(model, projection, plain, DEFAULT_TEMPLATES))


def test_embeddings_made_before_give_the_same(pipe, model, slides, tmp_path):
    embedded = model.encode_slide(slides["good"], image_processor=tiny_image_processor())
    projection = embedded["slide_projection"]
    save_file({"slide_projection": projection}, tmp_path / "good.safetensors")
    expected = pipe(str(slides["good"]), LABELS)
    inputs = [projection, projection.numpy(), embedded, {"status": "ok", **embedded}, tmp_path / "good.safetensors"]
    for one in inputs:
        check(pipe(one, LABELS), {row["label"]: row["score"] for row in expected})
    for many in (inputs, torch.stack([projection] * 3), np.stack([projection] * 3)):
        results = pipe(many, LABELS)
        assert len(results) == len(many)
        for result in results:
            check(result, {row["label"]: row["score"] for row in expected})


def test_takes_labels_and_templates_as_transformers_does(pipe, slides):
    projection = torch.eye(16)[3]
    expected = pipe(projection, ["tumor", "normal tissue"], templates=["a slide of CLASSNAME"])
    assert pipe(projection, "tumor, normal tissue", hypothesis_template="a slide of {}") == expected
    assert pipe(projection, ["tumor", "normal tissue"], templates="a slide of {}") == expected
    assert pipe(projection, ["tumor", "normal tissue"], templates="a slide of {}", top_k=1) == expected[:1]


def test_a_slide_that_cannot_be_encoded_is_recorded_among_others(pipe, slides):
    refused, classified = pipe([slides["empty"], slides["good"]], LABELS)
    assert (refused["status"], refused["reason"]) == ("refused", "no_tissue")
    assert len(classified) == 3
    assert pipe([refused], LABELS) == [refused]


def test_loads_by_its_task_and_is_published_with_a_text_model_only(model, slides, tmp_path):
    model.save_pretrained(tmp_path / "text")
    DreSlclProcessor(tiny_image_processor(), tiny_tokenizer()).save_pretrained(tmp_path / "text")
    names = json.loads((tmp_path / "text" / "config.json").read_text())["custom_pipelines"]
    assert names[TASK] == {"impl": "zero_shot_pipeline.ZeroShotSlideClassificationPipeline", "pt": ["AutoModel"]}
    assert {"zero_shot_pipeline.py", "text_embeddings.py"} <= {path.name for path in (tmp_path / "text").iterdir()}
    loaded = pipeline(TASK, model=str(tmp_path / "text"), trust_remote_code=True, device="cpu")
    expected = ZeroShotSlideClassificationPipeline(
        model=model, tokenizer=tiny_tokenizer(), image_processor=tiny_image_processor(), device="cpu"
    )(slides["good"], LABELS)
    check(loaded(slides["good"], LABELS), {row["label"]: row["score"] for row in expected})
    tiny_model().save_pretrained(tmp_path / "plain")
    tiny_image_processor().save_pretrained(tmp_path / "plain")
    assert TASK not in json.loads((tmp_path / "plain" / "config.json").read_text())["custom_pipelines"]
    with pytest.raises(ValueError, match="ships without a text model"):
        pipeline(TASK, model=str(tmp_path / "plain"), pipeline_class=ZeroShotSlideClassificationPipeline, device="cpu")


@pytest.mark.parametrize(
    ("labels", "options", "message"),
    [
        (None, {}, "Pass `candidate_labels`"),
        ([], {}, "must be a list of labels"),
        (["tumor", "tumor"], {}, "holds a label twice"),
        ({"tumor": []}, {}, "'tumor' needs at least one name"),
        (["tumor", " "], {}, "needs at least one name"),
        (["tumor"], {"templates": "a slide"}, "must contain CLASSNAME or {}"),
        (["tumor"], {"templates": []}, "at least one prompt template"),
        (["tumor"], {"top_k": 0}, "`top_k` must be at least 1"),
        (["tumor"], {"template": "{}"}, r"Unknown options \['template'\]"),
    ],
)
def test_refuses_wrong_labels_and_options(pipe, labels, options, message):
    with pytest.raises(ValueError, match=message):
        pipe(torch.eye(16)[0], labels, **options)


def test_refuses_vectors_of_another_model_and_files_that_are_none(pipe, tmp_path):
    with pytest.raises(ValueError, match=r"must have shape \(16,\)"):
        pipe(torch.ones(8), LABELS)
    (tmp_path / "broken.safetensors").write_bytes(b"nothing")
    with pytest.raises(ValueError, match=r"broken.safetensors: expected a file of `dre-slcl embed`"):
        pipe(tmp_path / "broken.safetensors", LABELS)


def test_texts_are_encoded_once_and_kept_by_content(model, tmp_path, monkeypatch):
    prompts = ["a tumor", "normal tissue", "a tumor", "a slide of normal tissue"]
    alone = torch.cat([TextEmbeddings(model, tiny_tokenizer()).embed([prompt]) for prompt in prompts])
    first = TextEmbeddings(model, tiny_tokenizer(), tmp_path).embed(prompts)
    torch.testing.assert_close(first, alone, rtol=0, atol=1e-6)
    files = sorted(tmp_path.rglob("*.safetensors"))
    assert len(files) == 3

    def fail(*arguments):
        raise AssertionError("encoded again")

    monkeypatch.setattr(model, "get_text_features", fail)
    assert torch.equal(TextEmbeddings(model, tiny_tokenizer(), tmp_path).embed(prompts), first)
    monkeypatch.undo()
    other = tiny_model(text=True)
    with torch.no_grad():
        other.text_projection.weight[5, 7] += 1
    moved = TextEmbeddings(other, tiny_tokenizer(), tmp_path).embed(prompts)
    assert not torch.equal(moved, first)
    assert len(list(tmp_path.rglob("*.safetensors"))) == 6


def test_long_texts_are_cut_and_empty_ones_refused(model):
    texts = TextEmbeddings(model, tiny_tokenizer())
    assert torch.equal(texts.embed(["tumor " * 30]), texts.embed(["tumor " * 500]))
    with pytest.raises(ValueError, match="not empty"):
        texts.embed(["tumor", " "])
    with pytest.raises(ValueError, match="needs the tokenizer"):
        TextEmbeddings(model, None)


def test_every_default_template_has_the_placeholder():
    assert len(set(DEFAULT_TEMPLATES)) == len(DEFAULT_TEMPLATES)
    assert all(template.count(PLACEHOLDER) == 1 for template in DEFAULT_TEMPLATES)
