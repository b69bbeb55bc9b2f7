"""What Qwen2-VL, Qwen2.5-VL and Qwen3-VL have in common: how one of them is put together, its keys, its config.json."""

import dataclasses
from collections.abc import Mapping
from types import ModuleType
from typing import Any

from lvlm_jax.connectors import MergerConfig
from lvlm_jax.connectors import keys as connector_keys
from lvlm_jax.keymap import Row, one_of
from lvlm_jax.llm import llama
from lvlm_jax.llm.decoder import DecoderConfig
from lvlm_jax.models.lvlm import LVLMConfig
from lvlm_jax.processing.frames import VideoSpec
from lvlm_jax.processing.image import ImageSpec
from lvlm_jax.processing.native import Native
from lvlm_jax.vision import NativeViTConfig, qwen_vl
from lvlm_jax.zoo.spec import Spec

IMAGE_TOKEN_ID = 151655
"""``<|image_pad|>`` in the vocabulary of all of them."""

NESTED = {"qwen_vl-nested": "model.visual."}
FLAT = {"qwen_vl": "visual."}
"""Layout -> prefix of the tower's keys. Qwen2-VL's and Qwen2.5-VL's files are flat (the torch library has them nested
in memory), Qwen3-VL's are nested."""

VIDEO = VideoSpec(sampler="fps", frames=768, fps=2.0, least=4, multiple=2)
"""Frames as the authors' qwen-vl-utils takes them."""

_LLM = {"qwen_vl": "model.", "qwen_vl-nested": "model.language_model."}
_PLACES = {"vision_start_token_id": -3, "vision_end_token_id": -2, "image_token_id": 0, "video_token_id": 1}
"""Where the special tokens stand in the vocabulary, counted from the picture's."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Family:
    """One release: names of its public class, and which parts it is made of.

    tower: public ``model_type`` of its vision config. decoder: the family of its language model. merger_names: see
    `connectors.keys`. stamp: how the time of a video's frames is told, see `VideoSpec`.
    """

    model_type: str
    architecture: str
    tower: str
    decoder: ModuleType
    merger_names: tuple[str, str, str]
    layouts: Mapping[str, str]
    stamp: str = "none"

    def config(self, tower: NativeViTConfig, decoder: DecoderConfig) -> LVLMConfig:
        """The whole model."""
        merger = MergerConfig(neighbours=tower.merge**2, norm=tower.norm, taps=len(tower.taps))
        return LVLMConfig(vision=tower, connector=merger, llm=decoder)

    def fits(self, config: LVLMConfig) -> bool:
        """Whether the torch library's class can hold this model."""
        tower, decoder = config.vision, config.llm
        if not (qwen_vl.fits(tower) and qwen_vl.type_of(tower) == self.tower and self.decoder.fits(decoder)):
            return False
        return config == self.config(tower, decoder)

    def rows(self, config: LVLMConfig, layout: str) -> list[Row]:
        """The key table of a whole model in one layout.

        Raises:
          ValueError: a layout that it is not written in.
        """
        if layout not in self.layouts:
            raise ValueError(
                f"unknown checkpoint layout {layout!r}; those of {self.model_type} are {', '.join(self.layouts)}"
            )
        tower = self.layouts[layout]
        return [
            *qwen_vl.rows(config.vision, "vision", tower),
            *connector_keys.merger_rows(config.connector, "connector", tower.removesuffix("."), self.merger_names),
            *llama.rows(config.llm, "llm", _LLM[layout]),
        ]

    def from_hf(self, config: Mapping[str, Any]) -> tuple[LVLMConfig, int]:
        """(model, image token id) from a config.json of the torch library, whose text part may stand at the top level.

        Raises:
          ValueError: a part or value that cannot be run, naming the field and what is supported.
        """
        one_of("model_type", config.get("model_type"), [self.model_type])
        if not config.get("vision_config"):
            raise ValueError("config.json: vision_config is missing; is this a config of the torch library's class?")
        text = dict(config.get("text_config") or config)
        text["tie_word_embeddings"] = bool(text.get("tie_word_embeddings") or config.get("tie_word_embeddings"))
        # The first files have the whole model's type here, or none.
        tower = qwen_vl.from_hf({**config["vision_config"], "model_type": self.tower})
        return self.config(tower, self.decoder.from_hf(text)), int(config.get("image_token_id", IMAGE_TOKEN_ID))

    def to_hf(self, config: LVLMConfig, image_token_id: int, image: ImageSpec | None = None) -> dict[str, Any]:
        """The config.json that the torch library reads; `from_hf` reads it back.

        Args:
          image: says how long a second of a video is, which the public files keep among the tower's values.
        """
        tower = qwen_vl.to_hf(config.vision, config.llm.width)
        if image is not None and image.native is not None and image.native.rate is not None:
            rate = image.native.rate
            tower["tokens_per_second"] = int(rate) if rate.is_integer() else rate  # their class takes whole numbers
        text = self.decoder.to_hf(config.llm) | {"model_type": f"{self.model_type}_text"}
        del text["architectures"]
        return {
            "model_type": self.model_type,
            "architectures": [self.architecture],
            **{name: image_token_id + place for name, place in _PLACES.items()},
            "tie_word_embeddings": config.llm.tied,
            "vision_config": tower,
            "text_config": text,
        }

    def processor(self, config: LVLMConfig) -> dict[str, Any]:
        """What the torch library's processor must know of the model: the fields of processor_config.json."""
        name = self.architecture.replace("ForConditionalGeneration", "Processor")
        return {"processor_class": name, "image_token": "<|image_pad|>"}

    def system(self, name: str, config: LVLMConfig, template: str, source: str, image: ImageSpec) -> Spec:
        """A released system."""
        video = dataclasses.replace(VIDEO, stamp=self.stamp)
        names = {"name": name, "template": template, "source": source}
        return Spec(**names, config=config, image=image, image_token_id=IMAGE_TOKEN_ID, video=video)


def pictures(tower: NativeViTConfig, native: Native, mean: tuple[float, ...], std: tuple[float, ...]) -> ImageSpec:
    """How pictures are prepared for a tower."""
    return ImageSpec(
        size=tower.image_size,
        patch=tower.patch_size,
        mean=mean,
        std=std,
        resample="bicubic",
        fit="native",
        max_patches=tower.max_patches,
        native=dataclasses.replace(native, merge=tower.merge, frames=tower.patch_frames, window=tower.window),
    )
