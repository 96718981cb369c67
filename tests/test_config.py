# SPDX-License-Identifier: Apache-2.0
"""Settings: typed, ranges checked, unknown keys refused with the nearest known one."""

import argparse

import pytest
import yaml

from dre_slcl.training.config import TrainConfig, add_config_arguments, config_from_arguments, load_config

NEEDED = {
    "dataset": "data",
    "output_dir": "out",
    "text_model": "text",
    "tile_encoder_config": {"model_type": "vit"},
}


def write(tmp_path, **settings):
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(NEEDED | settings))
    return path


def test_yaml_then_command_line(tmp_path):
    path = write(tmp_path, num_steps=7, learning_rate=1e-4, bank_mode="paper")
    parser = argparse.ArgumentParser()
    add_config_arguments(parser)
    arguments = parser.parse_args(
        ["--config", str(path), "--num-steps", "9", "--codebook-refits", "[3, 5]", "--augment-flips", "false"]
    )
    config = config_from_arguments(arguments)
    assert (config.num_steps, config.codebook_refits, config.augment_flips) == (9, [3, 5], False)
    assert config.learning_rate == 1e-4
    assert config.bank_mode == "paper"


def test_numbers_that_yaml_reads_as_text_and_words_that_it_reads_as_booleans(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(NEEDED) + "learning_rate: 1e-5\nmixed_precision: no\n")
    config = load_config(path, {})
    assert config.learning_rate == 1e-5
    assert config.mixed_precision == "no"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"slides_per_bach": 4}, "did you mean `slides_per_batch`"),
        ({"num_steps": 2.5}, "`num_steps` must be int, got 2.5"),
        ({"num_steps": "many"}, "`num_steps` must be int, got 'many'"),
        ({"num_steps": True}, "`num_steps` must be int, got True"),
        ({"num_steps": 0}, "`num_steps` must be at least 1"),
        ({"learning_rate": "fast"}, "`learning_rate` must be float"),
        ({"learning_rate": float("nan")}, "`learning_rate` must be a positive number"),
        ({"learning_rate": -1}, "`learning_rate` must be a positive number"),
        ({"bank_mode": "best"}, "`bank_mode` must be one of paper, full"),
        ({"augment_flips": "perhaps"}, "`augment_flips` must be bool"),
        ({"codebook_refits": 3}, "`codebook_refits` must be a list"),
        ({"codebook_refits": ["x"]}, "`codebook_refits` must be int"),
        ({"model_config": [1]}, "`model_config` must be a mapping"),
        ({"tile_encoder": "somewhere"}, "Give one of `tile_encoder`"),
        ({"tile_encoder_config": None}, "Give one of `tile_encoder`"),
        ({"text_model": None}, "`text_model` must be given"),
        ({"dataset": ""}, "`dataset` and `output_dir` must be given"),
        ({"slides_per_batch": 1}, "`slides_per_batch` must be at least 2"),
    ],
)
def test_bad_settings_are_refused_by_name(tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        load_config(write(tmp_path, **settings), {})


@pytest.mark.parametrize("text", ["- a\n- b\n", "a: [", "\x00"])
def test_a_file_that_is_no_mapping_is_refused(tmp_path, text):
    path = tmp_path / "run.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"run\.yaml: expected"):
        load_config(path, {})


def test_settings_survive_a_round_trip_through_json(tmp_path):
    config = load_config(write(tmp_path, codebook_refits=[1], model_config={"num_codewords": 3}), {})
    assert TrainConfig(**config.to_dict()) == config
