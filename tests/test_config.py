# SPDX-License-Identifier: Apache-2.0
"""Settings: typed, ranges checked, unknown keys refused with the nearest known one."""

import argparse
import json
import subprocess
import sys

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


NAN, INF, HUGE = float("nan"), float("inf"), 10**30
WRONG = [
    # Unknown keys, also within `model_config`
    *(
        {"slide_per_batch": 4},
        {"lr": 1e-4},
        {"Seed": 1},
        {"bank_size": 8},
        {"": 1},
        {"model_config": {"codewords": 4}},
    ),
    *({"model_config": {"hidden_sise": 4}}, {"model_config": {"encoder_config": {}}}),
    # Types
    *({"num_steps": "100"}, {"num_steps": [1]}, {"num_steps": 1.0}, {"num_steps": None}, {"seed": "x"}, {"seed": 0.5}),
    *({"learning_rate": [1e-4]}, {"learning_rate": True}, {"learning_rate": {}}, {"dataset": 3}, {"output_dir": []}),
    *({"train_tile_encoder": "yes"}, {"augment_flips": 1}, {"codebook_refits": "10"}, {"codebook_refits": [1.5]}),
    *({"image_mean": 0.5}, {"image_mean": ["a", "b", "c"]}, {"model_config": "small"}, {"tile_encoder_config": [1]}),
    *({"trackers": "wandb"}, {"tile_encoder_config": {"model_type": 3}}, {"model_config": {"num_codewords": "16"}}),
    *({"model_config": {"num_codewords": True}}, {"model_config": {"text_pooling": "max"}}),
    # Not finite
    *({"learning_rate": NAN}, {"weight_decay": NAN}, {"augment_stain": INF}, {"max_gradient_norm": INF}),
    *({"ema_decay": NAN}, {"image_std": [1.0, NAN, 1.0]}, {"model_config": {"layer_norm_eps": NAN}}),
    # Negative, zero
    *({"num_steps": -1}, {"slides_per_batch": 0}, {"tiles_per_slide": -4}, {"seed": -1}, {"weight_decay": -0.1}),
    *({"accumulation_steps": 0}, {"validation_steps": 0}, {"num_workers": -1}, {"head_learning_rate": 0}),
    *({"image_std": [0.0, 1.0, 1.0]}, {"max_report_tokens": 0}, {"codebook_refits": [-1]}, {"ema_decay": -0.5}),
    *({"model_config": {"num_codewords": 0}}, {"encoder_image_size_px": 0}, {"first_pass_tiles_per_slide": 0}),
    # Huge
    *(
        {"num_steps": HUGE},
        {"seed": 2**40},
        {"slides_per_batch": HUGE},
        {"learning_rate": 1e9},
        {"num_workers": 10**6},
    ),
    *({"model_config": {"num_codewords": HUGE}}, {"weight_decay": HUGE}, {"learning_rate": 10**400}),
    # Choices, and what goes together
    *({"bank_mode": "fast"}, {"bank_dtype": "int4"}, {"mixed_precision": "fp16"}, {"trackers": ["mlflow"]}),
    *({"trackers": ["wandb", "wandb"]}, {"image_mean": [0.5, 0.5]}, {"ema_decay": 1.0}, {"final_weights": "ema"}),
    *({"final_weights": "best"}, {"early_stopping_patience": 3}, {"validation_split": "train"}),
    *({"accumulation_steps": 129}, {"tile_encoder": "a"}, {"text_model": None}),
]
CHECK = """
import sys, time, json
from pathlib import Path
from dre_slcl.training import config
started = time.process_time()
errors = []
for path in sorted(Path(sys.argv[1]).glob("*.yaml")):
    begun = time.process_time()
    try:
        config.load_config(path, {})
        errors.append(["", 0])
    except ValueError as error:
        errors.append([str(error), time.process_time() - begun])
print(json.dumps([errors, "torch" in sys.modules]))
"""


@pytest.fixture(scope="module")
def refusals(tmp_path_factory):
    """The error of every wrong setting, in a process that imports nothing else."""
    folder = tmp_path_factory.mktemp("wrong")
    for place, settings in enumerate(WRONG):
        (folder / f"{place:03d}.yaml").write_text(yaml.safe_dump(NEEDED | settings))
    done = subprocess.run([sys.executable, "-c", CHECK, str(folder)], capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


@pytest.mark.parametrize("place", range(len(WRONG)), ids=lambda place: str(WRONG[place])[:60])
def test_a_wrong_setting_is_named_within_a_moment(refusals, place):
    message, seconds = refusals[0][place]
    (name, value), *_ = WRONG[place].items()
    names = list(value) if name == "model_config" and isinstance(value, dict) else [name]
    # `model_type` lies within the field, and needs no second name.
    assert any(f"`{name}" in message for name in names), message
    assert seconds < 1


def test_settings_are_checked_without_torch(refusals):
    assert len(WRONG) >= 60
    assert refusals[1] is False


@pytest.mark.parametrize(
    ("arguments", "named"),
    [(["--num-steps", "0"], "num_steps"), (["--learning-rate", "["], "learning_rate"), ([], "text_model")],
)
def test_the_command_ends_in_one_line_without_a_traceback(tmp_path, arguments, named):
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(NEEDED if arguments else NEEDED | {"text_model": None}))
    command = [sys.executable, "-m", "dre_slcl.training.train", "--config", str(path), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert f"`{named}`" in done.stderr
    assert list(tmp_path.iterdir()) == [path]
