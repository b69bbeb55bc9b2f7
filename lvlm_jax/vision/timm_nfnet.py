"""timm's config.json of an NFNet: one of the families of `vision.timm`.

Source: timm's `NormFreeNet` (github.com/huggingface/pytorch-image-models).
"""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

from lvlm_jax.keymap import one_of, square
from lvlm_jax.vision.nfnet import PRESETS, NFNetConfig, rows

__all__ = ["NAME", "NAMES", "fits", "from_config", "rows", "to_config"]

NAME = re.compile("|".join(f"dm_{name}" for name in PRESETS))
NAMES = "dm_nfnet_f0 to dm_nfnet_f6"
"""The architectures that are read here, and in words."""

_ARGS = {
    "depths": "depths",
    "channels": "widths",
    "stem_chs": "stem_width",
    "num_features": "final_width",
    "group_size": "group_width",
    "alpha": "alpha",
    "act_layer": "activation",
}
"""timm's name of a size -> ours."""

_TIMM_ACTIVATIONS = ("gelu", "silu")


def from_config(config: Mapping[str, Any]) -> NFNetConfig:
    """The tower of a timm folder's config.json: its ``architecture``, changed by its ``model_args``.

    Pictures have the size of ``pretrained_cfg.input_size``.

    Raises:
      ValueError: a value that cannot be run, naming the field and what is supported.
    """
    preset = PRESETS[config["architecture"].partition(".")[0].removeprefix("dm_")]
    given = config.get("model_args") or {}
    changes = {_ARGS[one_of("model_args field", name, _ARGS)]: value for name, value in given.items()}
    one_of("act_layer", changes.get("activation", "gelu"), _TIMM_ACTIVATIONS)
    size = (config.get("pretrained_cfg") or {}).get("input_size")
    if size:
        changes["image_size"] = square("pretrained_cfg.input_size", size[1:])
    changes |= {name: tuple(changes[name]) for name in ("depths", "widths") if name in changes}
    return dataclasses.replace(preset, **changes, classes=config.get("num_classes") or 0)


def fits(config: NFNetConfig) -> bool:
    """Whether timm's class can hold this tower: it standardises its own way."""
    return config.standardization == "timm" and config.activation in _TIMM_ACTIVATIONS


def to_config(config: NFNetConfig) -> dict[str, Any]:
    """timm's config.json; `from_config` reads it back. Every size stands in ``model_args``."""
    args = {theirs: getattr(config, ours) for theirs, ours in _ARGS.items()}
    return {
        "architecture": "dm_nfnet_f0",
        "num_classes": config.classes,
        "num_features": config.final_width,
        "global_pool": "avg",
        "pretrained_cfg": {"input_size": [3, config.image_size, config.image_size]},
        "model_args": args | {"depths": list(config.depths), "channels": list(config.widths)},
    }
