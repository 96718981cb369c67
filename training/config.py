# SPDX-License-Identifier: Apache-2.0
"""The settings of a training run: typed, from YAML and the command line, unknown keys refused."""

import argparse
import dataclasses
import math
import types
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import yaml

from .config_checks import check_numbers, check_together, refuse_unknown


def _setting(default: Any, help: str) -> Any:
    if isinstance(default, dict):
        return field(default_factory=lambda: dict(default), metadata={"help": help})
    return field(default=default, metadata={"help": help})


@dataclass(kw_only=True)
class TrainConfig:
    """Settings of a training run. Each field says what it means in its metadata, which `--help` prints."""

    # Data
    dataset: str = _setting("", "folder or Hub repository of the slide dataset (made by `dre-slcl tiles`)")
    output_dir: str = _setting("", "folder of the run: checkpoints, metrics, final model")
    slides_root: str | None = _setting(None, "folder of the slide files, for a dataset that holds coordinates only")
    private_ids: str | None = _setting(
        None, "the private file of a dataset built with --hash-ids, which says where its slide files are"
    )
    train_split: str = _setting("train", "split to train on")
    validation_split: str | None = _setting(None, "split to validate on while training")
    # Model
    model: str | None = _setting(None, "DRE-SLCL model to go on from; then the model settings below are not used")
    tile_encoder: str | None = _setting(None, "folder or Hub repository of a pretrained tile encoder")
    tile_encoder_config: dict[str, Any] | None = _setting(None, "config of a tile encoder trained from scratch")
    text_model: str | None = _setting(None, "folder or Hub repository of the text model that encodes reports")
    ship_text_model: bool = _setting(
        True, "put the text model into the trained model, so that it answers text queries"
    )
    center_reports: bool = _setting(
        True, "subtract the mean encoding of the training reports, which frozen text models give to every report"
    )
    max_report_tokens: int = _setting(512, "reports are cut to this length")
    model_config: dict[str, Any] = _setting({}, "further fields of DreSlclConfig, for example {num_codewords: 32}")
    image_mean: list[float] | None = _setting(
        None, "pixel mean that the tile encoder expects; default: as its own files say, else 0.5"
    )
    image_std: list[float] | None = _setting(
        None, "pixel standard deviation that it expects; default: as its own files say, else 0.5"
    )
    encoder_image_size_px: int | None = _setting(
        None, "input size of the tile encoder; default: as its own files say, else the tiles' size"
    )
    # Objective
    objective: Literal["contrastive", "labels", "both"] = _setting(
        "contrastive", "train with reports, with labels (then without a text model), or with both"
    )
    contrastive_loss: Literal["infonce", "siglip"] = _setting(
        "infonce", "'infonce': slides compete for a report; 'siglip': each pair is a yes or no, with a learned bias"
    )
    report_negatives: Literal["batch", "all"] = _setting(
        "batch", "reports that a slide is told from: those of the batch, or all training reports"
    )
    report_separator: str | None = _setting(None, "what separates the sections of a report, for example '[SEP]'")
    report_sections: Literal["mean", "sample"] = _setting(
        "mean", "of the sections take the mean of their encodings, or sample one in each step"
    )
    contrastive_weight: float = _setting(1.0, "weight of the contrastive loss beside labels (objective 'both')")
    label_weight: float = _setting(1.0, "weight of the loss on labels beside reports (objective 'both')")
    label_columns: list[str] = field(
        default_factory=list,
        metadata={"help": "one column of classes, or several columns of 0 and 1; empty cells are missing labels"},
    )
    class_weights: dict[str, float] = _setting({}, "weight of classes or labels by name, 1 where not given")
    # Method
    slides_per_batch: int = _setting(8, "slides in a step, over all processes (B)")
    tiles_per_slide: int = _setting(16, "tiles of a slide that a step encodes with gradient (s)")
    retrieved_per_slide: int = _setting(64, "tiles of a slide that a step retrieves from the bank in mode 'paper' (r)")
    bank_mode: Literal["paper", "full", "corrected", "two_pass", "exact"] = _setting(
        "full",
        "'paper': s sampled and r retrieved tiles; 'full': all tiles of the slide, by running sums; 'corrected': "
        "full, with stored features moved along by the drift that the sampled tiles show; 'two_pass': all tiles "
        "encoded in every step, s with gradient; 'exact': all tiles with gradient, in constant memory",
    )
    refresh_per_slide: int = _setting(
        0, "further tiles of each slide, the longest not refreshed, that a step encodes without gradient"
    )
    stale_dropout: float = _setting(
        0.0, "probability that a step leaves out what is stored at a codeword of a slide, where it has fresh tiles"
    )
    gradient_check_steps: int = _setting(
        0, "steps between comparisons of one slide's encoder gradient with the exact one; 0: never"
    )
    bank_dtype: Literal["float16", "bfloat16", "int8", "float32"] = _setting("float16", "type of stored features")
    bank_device: Literal["model", "cpu", "disk"] = _setting(
        "model", "where the bank lives: beside the model, in host memory, or mapped from a file on a disk"
    )
    bank_dir: str | None = _setting(
        None, "folder on a fast local disk for `bank_device: disk`; default inside output_dir"
    )
    bank_whole_mib: int = _setting(
        256, "a shard of the bank up to this size is saved whole; a larger one as a base and the rows changed since"
    )
    bank_init: str | None = _setting(
        None,
        "tile features to start the bank from instead of a first pass: a folder that `dre-slcl bank --export`, "
        "TRIDENT or another tool wrote",
    )
    first_pass_tiles_per_slide: int | None = _setting(
        None, "tiles of each slide that are encoded into the bank before training and at refits; default all"
    )
    codebook_sample: int = _setting(50_000, "tile features that K-means sees, over all slides")
    codebook_refits: list[int] = field(
        default_factory=list,
        metadata={
            "help": "steps at which the bank is filled and the codebook fitted again (for encoders from scratch)"
        },
    )
    train_tile_encoder: bool = _setting(True, "train the tile encoder; false keeps it frozen")
    lora: dict[str, Any] | None = _setting(
        None, "train low-rank adapters of the tile encoder instead, for example {r: 8, lora_alpha: 16} (needs peft)"
    )
    lora_export: Literal["merged", "adapter"] = _setting(
        "merged", "publish adapters merged into the tile encoder's weights, or beside a reference to it"
    )
    activation_checkpointing: bool = _setting(
        False, "recompute the tile encoder's activations: less memory, more time"
    )
    accumulation_steps: int = _setting(
        1, "parts in which a step's tiles go through the tile encoder: as many times less memory; the same gradient"
    )
    augment_flips: bool = _setting(True, "turn and mirror tiles at random")
    augment_stain: float = _setting(0.0, "spread of random factors on the optical density of each colour channel")
    # Optimisation
    num_steps: int = _setting(1000, "training steps")
    finalize_steps: int = _setting(0, "further steps on the head alone, over whole slides of fresh features")
    learning_rate: float = _setting(1e-4, "peak learning rate of the tile encoder")
    layer_decay: float = _setting(1.0, "factor on it for each block further from the tile encoder's output")
    head_learning_rate: float = _setting(3e-4, "peak learning rate of everything else")
    warmup_steps: int = _setting(50, "steps of linear warm-up; then the learning rate follows a cosine to zero")
    weight_decay: float = _setting(0.05, "AdamW's weight decay, on weight matrices only")
    max_gradient_norm: float = _setting(1.0, "gradients are clipped to this norm")
    ema_decay: float = _setting(0.0, "decay of a running average of all trained weights; 0 keeps none")
    final_weights: Literal["last", "ema", "best"] = _setting(
        "last",
        "which weights the final model has, and finalizing starts from: those of the last step, their running "
        "average, or the best of all validations",
    )
    mixed_precision: Literal["no", "bf16"] = _setting("no", "autocast of the tile encoder")
    seed: int = _setting(0, "of everything random")
    # Run
    num_workers: int = _setting(2, "processes that read tiles")
    encode_batch_size: int = _setting(128, "tiles encoded at once without gradient")
    checkpoint_steps: int = _setting(200, "steps between checkpoints")
    keep_checkpoints: int = _setting(2, "checkpoints to keep")
    log_steps: int = _setting(10, "steps between lines of metrics.jsonl")
    validation_steps: int = _setting(200, "steps between validations on `validation_split`")
    validation_metric: Literal["mean_average_precision", "recall@1", "recall@5", "loss"] = _setting(
        "mean_average_precision", "what says which model is best: how slides find their reports, or the loss"
    )
    validation_tiles_per_slide: int | None = _setting(
        None, "random tiles of each slide that a validation encodes; default all"
    )
    early_stopping_patience: int | None = _setting(
        None, "stop after so many validations without a better one; default never"
    )
    trackers: list[Literal["tensorboard", "wandb", "trackio"]] = field(
        default_factory=list, metadata={"help": "where metrics go beside metrics.jsonl; each needs its extra"}
    )

    def __post_init__(self) -> None:
        """Checks types and ranges; see `validate`."""
        hints = get_type_hints(type(self))
        for item in dataclasses.fields(self):
            setattr(self, item.name, _coerce(item.name, getattr(self, item.name), hints[item.name]))
        self.validate()

    def validate(self) -> None:
        """Checks values.

        Raises:
            ValueError: naming the field, what it holds and what it may hold.
        """
        if not self.dataset or not self.output_dir:
            raise ValueError("`dataset` and `output_dir` must be given.")
        check_numbers({item.name: getattr(self, item.name) for item in dataclasses.fields(self)})
        at_least = {"slides_per_batch": 2, "tiles_per_slide": 1, "num_steps": 1, "checkpoint_steps": 1, "log_steps": 1}
        at_least |= {"keep_checkpoints": 1, "encode_batch_size": 1, "retrieved_per_slide": 0, "finalize_steps": 0}
        at_least |= {"refresh_per_slide": 0, "gradient_check_steps": 0, "bank_whole_mib": 0}
        at_least |= {"num_workers": 0, "warmup_steps": 0, "augment_stain": 0, "weight_decay": 0, "codebook_sample": 1}
        for name, least in at_least.items():
            if getattr(self, name) < least:
                raise ValueError(f"`{name}` must be at least {least}, got {getattr(self, name)}.")
        if self.gradient_check_steps and not self.train_tile_encoder:
            raise ValueError("`gradient_check_steps` needs a tile encoder that is trained (`train_tile_encoder`).")
        if not 0 <= self.stale_dropout <= 1:
            raise ValueError(f"`stale_dropout` must be from 0 to 1, got {self.stale_dropout}.")
        if not 0 < self.layer_decay <= 1:
            raise ValueError(f"`layer_decay` must lie above 0 and not above 1, got {self.layer_decay}.")
        if self.lora_export == "adapter" and (self.lora is None or self.tile_encoder is None):
            raise ValueError("`lora_export: adapter` needs `lora` and a pretrained `tile_encoder` to refer to.")
        if self.lora is not None and not self.train_tile_encoder:
            raise ValueError("`lora` trains the tile encoder, `train_tile_encoder: false` freezes it; drop one.")
        positive = ("learning_rate", "head_learning_rate", "max_gradient_norm", "contrastive_weight", "label_weight")
        for name in positive:
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"`{name}` must be a positive number, got {getattr(self, name)}.")
        if self.model is None and (self.tile_encoder is None) == (self.tile_encoder_config is None):
            raise ValueError(
                "Give one of `tile_encoder` (pretrained) and `tile_encoder_config` (from scratch), or `model` to go "
                "on from a DRE-SLCL model."
            )
        if self.model is None and self.text_model is None and self.objective != "labels":
            raise ValueError("`text_model` must be given: a folder or Hub repository of a text model.")
        check_together(self)

    def to_dict(self) -> dict[str, Any]:
        """Returns all settings, ready for JSON."""
        return dataclasses.asdict(self)


def _coerce(name: str, value: Any, hint: Any) -> Any:
    """Brings a value from YAML or the command line to its field's type, or says that it does not fit."""
    origin, choices = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        if value is None and type(None) in choices:
            return None
        return _coerce(name, value, next(choice for choice in choices if choice is not type(None)))
    if origin is Literal:
        # YAML reads a bare `no` as false.
        value = "no" if value is False and "no" in choices else value
        if value not in choices:
            raise ValueError(f"`{name}` must be one of {', '.join(map(str, choices))}, got {value!r}.")
        return value
    if origin is list and isinstance(value, (list, tuple)):
        return [_coerce(name, item, choices[0]) for item in value]
    if origin is dict and isinstance(value, dict):
        return value
    if hint is float and isinstance(value, (int, float, str)) and not isinstance(value, bool):
        # PyYAML reads `1e-4` as a string.
        try:
            return float(value)
        except (ValueError, OverflowError):
            pass
    elif origin is None and type(value) is hint:
        return value
    expected = "a list" if origin is list else "a mapping" if origin is dict else getattr(hint, "__name__", str(hint))
    raise ValueError(f"`{name}` must be {expected}, got {value!r}.")


def load_config(path: str | Path | None, overrides: dict[str, str]) -> TrainConfig:
    """Reads settings from a YAML file and applies overrides from the command line.

    Args:
        path (`str` or `Path`, *optional*): the YAML file.
        overrides (`dict`): field -> value as typed on the command line (YAML syntax, so `[1, 2]` and `{a: 1}` work).

    Raises:
        ValueError: for a missing or malformed file, an unknown key (the nearest known one is named), or a bad value.
    """
    settings: dict[str, Any] = {}
    if path is not None:
        try:
            settings = yaml.safe_load(Path(path).read_text(encoding="utf-8")) or {}
        except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
            raise ValueError(f"{path}: expected a YAML file of settings, but it cannot be read ({error}).") from error
        if not isinstance(settings, dict):
            raise ValueError(f"{path}: expected `name: value` lines, found {type(settings).__name__}.")
    for name, value in overrides.items():
        try:
            settings[name] = yaml.safe_load(value) if value else value
        except yaml.YAMLError as error:
            raise ValueError(f"`{name}`: {value!r} is no YAML value, as `3`, `[1, 2]` or `{{a: 1}}` are.") from error
    refuse_unknown(settings, [item.name for item in dataclasses.fields(TrainConfig)], "setting")
    return TrainConfig(**settings)


def add_config_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds `--config` and one option per setting, `--slides-per-batch 8` for `slides_per_batch`."""
    parser.add_argument("--config", metavar="RUN.yaml", help="YAML file of settings; options below override it")
    for item in dataclasses.fields(TrainConfig):
        default = item.default if item.default is not dataclasses.MISSING else item.default_factory()
        parser.add_argument(
            f"--{item.name.replace('_', '-')}",
            dest=f"setting_{item.name}",
            metavar="VALUE",
            help=f"{item.metadata['help']} (default: {default!r})".replace("%", "%%"),
        )


def config_from_arguments(arguments: argparse.Namespace) -> TrainConfig:
    """Returns the settings that parsed arguments describe; errors as in `load_config`."""
    prefix = "setting_"
    given = {
        name.removeprefix(prefix): value
        for name, value in vars(arguments).items()
        if name.startswith(prefix) and value is not None
    }
    return load_config(arguments.config, given)
