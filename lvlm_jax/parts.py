"""The parts of a model by name, as a recipe's ``config.model`` holds them: ``--config.model.connector=perceiver``."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from lvlm_jax import llm, vision
from lvlm_jax.config import ConfigError, build, open_fields, to_config
from lvlm_jax.connectors import CONNECTORS, ConnectorConfig
from lvlm_jax.connectors import keys as connector_keys
from lvlm_jax.fusion.cross_attention import CrossAttentionConfig
from lvlm_jax.models.senses import FeatureSlot, Sense
from lvlm_jax.processing.image import ImageSpec
from lvlm_jax.vision import VisionConfig

Named = Mapping[str, Callable[[], Any]]
"""A part's name -> what makes the section of a recipe that describes it."""


def connector_of(fields: Mapping[str, Any], where: str = "config.model.connector") -> ConnectorConfig:
    """The connector that a section with its ``kind`` describes.

    Raises:
      ConfigError: no such kind, or fields that it does not have or needs.
    """
    fields = dict(fields)
    kind = fields.pop("kind", None)
    if kind not in CONNECTORS:
        raise ConfigError(f"{where.removeprefix('config.model.')}.kind={kind!r}: choose one of {list(CONNECTORS)}")
    return build(CONNECTORS[kind], fields, where)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SenseSection:
    """A named sense as a recipe holds it; `connector` carries a ``kind``, as the model's own does.

    encoder: a tower of pictures, prepared as `image` says; or ``length`` and ``width`` of features computed elsewhere.
    """

    encoder: VisionConfig | FeatureSlot
    connector: dict[str, Any]
    image: ImageSpec | None = None

    def sense(self, name: str) -> Sense:
        """The sense; errors name its place in the recipe."""
        at = f"config.model.senses.{name}"
        try:
            connector = connector_of(self.connector, f"{at}.connector")
            return Sense(encoder=self.encoder, connector=connector, image=self.image)
        except ValueError as error:
            raise error if isinstance(error, ConfigError) else ConfigError(f"{at}: {error}") from error


def section_of(sense: Sense) -> SenseSection:
    """The section that makes a sense."""
    return SenseSection(encoder=sense.encoder, connector=connector_keys.to_dict(sense.connector), image=sense.image)


def _connector(kind: str) -> Any:
    """The section of a connector with its kind's defaults; a field without one is left open."""
    section = open_fields(CONNECTORS[kind])
    section.kind = kind
    return section


_TOWERS = (
    vision.clip,
    vision.siglip,
    vision.siglip2,
    vision.plain_vit,
    vision.dinov2,
    vision.blip2_vit,
    vision.eva,
    vision.nfnet,
)


def _tower(config: VisionConfig) -> Any:
    """The section of a released tower, without a pooling head or a classifier, which a language model does not read."""
    fields = {"classes": 0} if getattr(config, "classes", 0) else {}
    fields |= {"pool": "none"} if getattr(config, "pool", None) in ("map", "tanh") else {}
    return to_config(dataclasses.replace(config, **fields))


NAMED: dict[str, Named] = {
    "model.connector": {kind: lambda kind=kind: _connector(kind) for kind in CONNECTORS},
    "model.vision": {
        name: lambda config=config: _tower(config) for family in _TOWERS for name, config in family.PRESETS.items()
    },
    "model.llm": {name: lambda config=config: to_config(config) for name, config in llm.PRESETS.items()},
    "model.fusion": {"none": lambda: None, "cross_attention": lambda: to_config(CrossAttentionConfig())},
}
"""The sections of a recipe that a name can stand for: a connector's kind, a released tower or decoder, a fusion."""

_NATIVE = (
    "reads pictures at their own resolution, several to a vision row, so it needs model.image.native and a connector "
    "of kind 'merger', which one name cannot set; fork qwen2_5_vl_finetune, or lora_your_data:SYSTEM with a Qwen-VL"
)
_CLIPS = (
    "reads the frames of a clip as one, so it needs model.video to show it so many of them, which one name cannot set; "
    "fork videochat_align"
)
APART: dict[str, Mapping[str, str]] = {
    "model.vision": dict.fromkeys(vision.qwen_vl.PRESETS, _NATIVE) | dict.fromkeys(vision.video.PRESETS, _CLIPS)
}
"""Released parts that no name of `NAMED` stands for, and why."""
