"""Whole systems by name: data only. One public class of the torch library is one family, one file."""

import difflib
from types import ModuleType

from lvlm_jax.models.lvlm import LVLMConfig
from lvlm_jax.processing.frames import DEFAULT, VideoSpec
from lvlm_jax.zoo import (
    idefics,
    llava,
    llava_next,
    llava_next_video,
    llava_onevision,
    llava_small,
    nanovlm,
    open_flamingo,
    paligemma,
)
from lvlm_jax.zoo.spec import Spec

FAMILIES: dict[str, ModuleType] = {
    family.MODEL_TYPE: family
    for family in (llava, llava_next, llava_next_video, llava_onevision, paligemma, idefics, open_flamingo)
}
"""Public ``model_type`` -> family: a module with

| name | what it is |
| --- | --- |
| MODEL_TYPE, ARCHITECTURE | names of the torch library's class |
| SYSTEMS | its `Spec`s by name |
| LAYOUTS, layout_of(keys), rows(config, layout) | where the parts stand in a checkpoint, and its key table |
| fits(config) | whether that class can hold a model |
| from_hf(raw), to_hf(config, image_token_id, image) | config.json both ways |
| processor(config) | fields of processor_config.json |
"""

OWN_TYPES = (llava.OWN_TYPE, open_flamingo.MODEL_TYPE)
"""``model_type`` of models that the torch library has no class for."""

READS: dict[str, ModuleType] = {**FAMILIES, llava.OWN_TYPE: llava}
"""``model_type`` of a config.json -> the family that reads it; models without a public class are LLaVA's own."""

SYSTEMS: dict[str, Spec] = {
    name: spec for module in (*FAMILIES.values(), nanovlm, llava_small) for name, spec in module.SYSTEMS.items()
}
"""Every system there is."""

LAYOUTS = {name: layout for family in FAMILIES.values() for name, layout in family.LAYOUTS.items()}
"""Every way of writing such a checkpoint."""


def family_of(config: LVLMConfig) -> ModuleType:
    """The family that a model belongs to; LLaVA's where no public class can hold it."""
    return next((family for family in FAMILIES.values() if family.fits(config)), llava)


def video_of(config: LVLMConfig) -> VideoSpec:
    """How the systems of a model's family read videos, where nobody says otherwise."""
    return next((spec.video for spec in family_of(config).SYSTEMS.values()), DEFAULT)


def spec(name: str) -> Spec:
    """A system by name.

    Raises:
      ValueError: no such system, with the nearest names.
    """
    if name not in SYSTEMS:
        near = difflib.get_close_matches(name, SYSTEMS, n=3)
        hint = f"did you mean {' or '.join(near)}? " if near else ""
        raise ValueError(f"unknown system {name!r}; {hint}The systems are {', '.join(SYSTEMS)}")
    return SYSTEMS[name]


__all__ = ["FAMILIES", "LAYOUTS", "OWN_TYPES", "READS", "SYSTEMS", "Spec", "family_of", "spec", "video_of"]
