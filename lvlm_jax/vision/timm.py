"""timm's folders: which of the families that timm writes a tower is of, by its ``architecture``.

In a larger model's config.json such a tower is the torch library's ``timm_wrapper``.
Source: timm (github.com/huggingface/pytorch-image-models).
"""

from collections.abc import Mapping
from types import ModuleType
from typing import Any

from lvlm_jax.keymap import Row
from lvlm_jax.vision import eva, timm_nfnet, timm_vit
from lvlm_jax.vision.nfnet import NFNetConfig
from lvlm_jax.vision.vit import ViTConfig

Config = ViTConfig | NFNetConfig

FAMILIES: tuple[tuple[type[Config], ModuleType], ...] = (
    (ViTConfig, timm_vit),
    (ViTConfig, eva),
    (NFNetConfig, timm_nfnet),
)
"""Modules with NAME, NAMES, from_config, to_config, fits, rows, each behind the type of its configs; the first that
fits counts."""

LAYOUTS = ("timm",)
"""How timm writes a tower alone."""


def from_config(config: Mapping[str, Any]) -> Config:
    """The tower of a timm folder's config.json: its ``architecture``, changed by its ``model_args``.

    Raises:
      ValueError: a value that cannot be run, naming the field and what is supported.
    """
    name = str(config.get("architecture")).partition(".")[0]
    for _, family in FAMILIES:
        if family.NAME.fullmatch(name):
            return family.from_config(config)
    known = "; ".join(family.NAMES for _, family in FAMILIES)
    raise ValueError(f"config.json: architecture is {name!r}, which is not supported; supported: {known}")


def fits(config: Config) -> bool:
    """Whether one of timm's classes can hold this tower."""
    return _found(config) is not None


def to_config(config: Config) -> dict[str, Any]:
    """timm's config.json; `from_config` reads it back. Every size stands in ``model_args``.

    Raises:
      ValueError: a tower that none of timm's classes can hold.
    """
    return _family(config).to_config(config)


def rows(config: Config, ours: str = "vision", theirs: str = "") -> list[Row]:
    """The key table of the tower; arguments as a family's."""
    return _family(config).rows(config, ours, theirs)


def from_hf(config: Mapping[str, Any]) -> Config:
    """The tower of a ``timm_wrapper``'s config: timm's own fields with a ``model_type``."""
    return from_config(config)


def to_hf(config: Config) -> dict[str, Any]:
    """A ``timm_wrapper``'s config; `from_hf` reads it back."""
    return {"model_type": "timm_wrapper", **to_config(config)}


def _found(config: Config) -> ModuleType | None:
    fitting = (family for kind, family in FAMILIES if isinstance(config, kind) and family.fits(config))
    return next(fitting, None)


def _family(config: Config) -> ModuleType:
    if (family := _found(config)) is None:
        raise ValueError(
            "timm's VisionTransformer, Eva and NormFreeNet, as they are read here, cannot hold this tower: the first "
            "two have an epsilon of 1e-6, a patch bias and no norm before their blocks, one exact GELU and the pool "
            "'token' or 'map', the other no bias for keys and the pool 'token'; the third standardises as timm does "
            "and has exact GELU or SiLU. Choose another layout"
        )
    return family
