# SPDX-License-Identifier: Apache-2.0
"""Report encodings equal the text model's own states, are computed once, and are found again by content."""

import pytest
import torch
from transformers import AutoModel, AutoTokenizer

from dre_slcl.training.reports import ReportEncoder, encode_reports

from . import tiny_dataset

REPORTS = ["solid high grade", "tubular necrosis absent margin free", "solid high grade"]


@pytest.fixture(scope="module")
def text_model(tmp_path_factory):
    return str(tiny_dataset.write_text_model(tmp_path_factory.mktemp("text") / "model"))


def load(text_model, **options):
    return ReportEncoder.from_pretrained(text_model, **({"pooling": "mean", "max_tokens": 32} | options))


def test_mean_pooling_equals_the_models_own_token_states(text_model, tmp_path):
    encoded = encode_reports(load(text_model), REPORTS, tmp_path)
    model, tokenizer = AutoModel.from_pretrained(text_model).eval(), AutoTokenizer.from_pretrained(text_model)
    for report, found in zip(REPORTS, encoded, strict=True):
        with torch.no_grad():
            states = model(**tokenizer(report, return_tensors="pt")).last_hidden_state[0]
        torch.testing.assert_close(found, states.mean(dim=0))


def test_each_distinct_report_is_encoded_once(text_model, tmp_path, monkeypatch):
    encoder = load(text_model)
    calls = []
    real = encoder.encode
    monkeypatch.setattr(encoder, "encode", lambda reports: calls.append(reports) or real(reports))
    first = encode_reports(encoder, REPORTS, tmp_path)
    assert sorted(calls) == sorted([[REPORTS[0]], [REPORTS[1]]])
    calls.clear()
    torch.testing.assert_close(encode_reports(encoder, REPORTS[::-1], tmp_path), first.flip(0), rtol=0, atol=0)
    assert calls == []


def test_another_pooling_length_or_model_has_a_cache_of_its_own(text_model):
    keys = {load(text_model, **options).cache_key() for options in ({}, {"pooling": "cls"}, {"max_tokens": 8})}
    changed = load(text_model)
    with torch.no_grad():
        changed.model.embeddings.word_embeddings.weight[3] += 1e-3
    assert len(keys | {changed.cache_key()}) == 4


def test_long_reports_are_cut_and_counted(text_model, tmp_path, caplog):
    encoder = load(text_model, max_tokens=4)
    long, short = "solid high grade margin free", "solid high"
    encoded = encode_reports(encoder, [long, short], tmp_path)
    assert "1 of 2 new reports are longer than 4 tokens" in caplog.text
    torch.testing.assert_close(encoded[0], encoded[1])
