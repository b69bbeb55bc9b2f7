"""config.json of other people's folders: which kind of model it describes, and back."""

import dataclasses
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from lvlm_jax import llm, vision, zoo
from lvlm_jax.checkpoint import CheckpointError
from lvlm_jax.connectors import LinearConfig, MlpConfig
from lvlm_jax.hub.families import Config
from lvlm_jax.keymap import one_of
from lvlm_jax.llm.decoder import DecoderConfig
from lvlm_jax.llm.encoder_decoder import EncoderDecoderConfig
from lvlm_jax.models.contrastive import DualEncoderConfig
from lvlm_jax.models.lvlm import LVLMConfig
from lvlm_jax.models.unified import UnifiedConfig
from lvlm_jax.processing.image import ImageSpec
from lvlm_jax.processing.tiles import limit_of
from lvlm_jax.vision import NFNetConfig, VisionConfig, vqgan
from lvlm_jax.vision.text_tower import TextTowerConfig
from lvlm_jax.vision.vit import ViTConfig
from lvlm_jax.vision.vq import VQConfig
from lvlm_jax.zoo import chameleon, dual, llava, llava_onevision


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
      CheckpointError: not there, or not an object.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(f"{path}: not there; a checkpoint folder needs its {path.name}") from error
    except ValueError as error:
        raise CheckpointError(f"{path}: not JSON ({error}); fetch it again") from error
    if not isinstance(found, dict):
        raise CheckpointError(f"{path}: holds a {type(found).__name__}, not an object with fields; fetch it again")
    return found


@dataclasses.dataclass(frozen=True, kw_only=True)
class Described:
    """What a config.json says: kind of model, its config, the id of a picture's placeholder (None: not a LVLM)."""

    kind: str
    config: Config
    image_token_id: int | None = None
    original: bool = False


def describe(raw: Mapping[str, Any], source: Path, tower: Mapping[str, Any] | None = None) -> Described:
    """Reads a config.json.

    Args:
      raw: its content.
      source: where it is, for messages.
      tower: config.json of a vision tower that stands in a folder of its own (the LLaVA authors' layout).

    Raises:
      CheckpointError: an unknown model_type, or a value that cannot be run.
    """
    try:
        if "mm_vision_tower" in raw:
            # Their token lists have -200 where a picture goes; any word will do, since the picture is laid over it.
            config = from_original(raw, None if tower is None else vision_config(tower))
            return Described(kind="lvlm", config=config, image_token_id=0, original=True)
        if "architecture" in raw and "model_type" not in raw:
            return Described(kind="vision", config=vision.timm.from_config(raw))
        kind = raw.get("model_type")
        if kind in zoo.READS:
            config, image_token_id = zoo.READS[kind].from_hf(raw)
            return Described(kind="lvlm", config=config, image_token_id=image_token_id)
        if kind not in READERS:
            known = ", ".join([*zoo.FAMILIES, "llava_llama", *READERS])
            raise ValueError(f"config.json: model_type is {kind!r}, which is not supported; supported: {known}")
        name, reader = READERS[kind]
        return Described(kind=name, config=reader(raw))
    except ValueError as error:
        raise CheckpointError(f"{source}: {error}") from error


def vision_config(raw: Mapping[str, Any]) -> VisionConfig:
    """The vision tower of a config.json: a tower's own, or part of a dual encoder's."""
    kind = raw.get("model_type")
    if kind in dual.TYPES:
        return dual.from_hf(raw).vision
    return vision.FAMILIES[one_of("model_type", kind, [*vision.FAMILIES, *dual.TYPES])].from_hf(raw)


READERS: dict[str, tuple[str, Callable[[Mapping[str, Any]], Config]]] = {
    **{name: ("dual", dual.from_hf) for name in dual.TYPES},
    **{name: ("vision", family.from_hf) for name, family in vision.FAMILIES.items()},
    **{name: ("text", family.text_from_hf) for name, family in vision.TEXT_FAMILIES.items()},
    **{name: ("decoder", family.from_hf) for name, family in llm.FAMILIES.items()},
    **{name: ("encoder_decoder", family.from_hf) for name, family in llm.ENCODER_DECODERS.items()},
    **{name: ("vq", vqgan.from_hf) for name in vqgan.TYPES},
    chameleon.MODEL_TYPE: ("unified", chameleon.from_hf),
}
"""Public ``model_type`` -> kind of model and what reads its config."""


def kind_of(config: Config) -> str:
    """The kind of model that a config of ours describes."""
    kinds = {
        LVLMConfig: "lvlm",
        UnifiedConfig: "unified",
        DualEncoderConfig: "dual",
        ViTConfig: "vision",
        NFNetConfig: "vision",
        VQConfig: "vq",
        TextTowerConfig: "text",
        DecoderConfig: "decoder",
        EncoderDecoderConfig: "encoder_decoder",
    }
    return kinds[type(config)]


_TOWERS = {
    "clip_vision_model": "CLIPVisionModel",
    "siglip_vision_model": "SiglipVisionModel",
    "siglip2_vision_model": "Siglip2VisionModel",
    "blip_2_vision_model": "Blip2VisionModel",
}
"""The class of each family of vision towers that has but one; the others' configs name theirs."""


def public_config(config: Config, image_token_id: int | None = None, image: ImageSpec | None = None) -> dict[str, Any]:
    """The config.json that the torch library reads; `describe` reads it back.

    image: how pictures are prepared, of which some vision-language models' files tell.
    """
    match config:
        case LVLMConfig():
            if image_token_id is None:
                raise ValueError("image_token_id: a vision-language model's config.json needs its picture's token id")
            return zoo.family_of(config).to_hf(config, image_token_id, image)
        case ViTConfig() | NFNetConfig():
            name = vision.family_of(config)
            own = {"architectures": [_TOWERS[name]]} if name in _TOWERS else {}
            return {**own, **vision.FAMILIES[name].to_hf(config)}
        case TextTowerConfig():
            name = vision.text_family_of(config)
            architecture = {"clip_text_model": "CLIPTextModel", "siglip_text_model": "SiglipTextModel"}[name]
            return {**vision.TEXT_FAMILIES[name].text_to_hf(config), "architectures": [architecture]}
        case DualEncoderConfig():
            return dual.to_hf(config)
        case EncoderDecoderConfig():
            return llm.ENCODER_DECODERS[llm.family_of(config)].to_hf(config)
        case VQConfig():
            return vqgan.to_hf(config)
        case UnifiedConfig():
            return chameleon.to_hf(config)
        case _:
            return llm.FAMILIES[llm.family_of(config)].to_hf(config)


# ---------------------------------------------------------------------------------------------------------------------
# The LLaVA authors' own config.json

_FEATURE = {False: "patch", True: "cls_patch"}
_ANYRES = "anyres"
_POOL = {"mm_resampler_type": "spatial_pool", "mm_spatial_pool_mode": "average", "mm_spatial_pool_stride": 2}
"""Their fields of a model that averages frames before the connector, with the values that we know."""


def from_original(raw: Mapping[str, Any], tower: VisionConfig | None = None) -> LVLMConfig:
    """A config.json of the LLaVA authors, with the sizes of `tower` where it stands in a folder of its own.

    A tower that is no released one is described by a ``vision_config`` beside their fields (`to_original` writes it).
    """
    one_of("model_type", raw.get("model_type"), llava.ORIGINAL_DECODERS)
    if raw.get("mm_use_im_start_end"):
        raise ValueError("config.json: mm_use_im_start_end is true, which is not supported; supported: false")
    if tower is None and raw.get("vision_config"):
        tower = vision_config(raw["vision_config"])
    known = llava.from_original(raw) if tower is None else _with_tower(raw, tower)
    limited = known.newline and limit_of(raw["image_aspect_ratio"]) is not None
    pooled = one_of("mm_resampler_type", raw.get("mm_resampler_type") or "none", ["none", _POOL["mm_resampler_type"]])
    for name in _POOL if pooled != "none" else ():
        one_of(name, raw.get(name), [_POOL[name]])
    public = llava_onevision.MODEL_TYPE if limited else None
    return dataclasses.replace(known, public=public, pools_frames=pooled != "none")


def _with_tower(raw: Mapping[str, Any], tower: VisionConfig) -> LVLMConfig:
    """The zoo reads all but the sizes of a tower that it does not know."""
    layer = raw.get("mm_vision_select_layer", -2)
    known = llava.from_original(
        {**raw, "mm_vision_tower": next(iter(vision.clip.HUB_NAMES)), "mm_vision_select_layer": -2}
    )
    tower = vision.reading(
        tower,
        feature_layer=llava.from_end("mm_vision_select_layer", layer, tower.depth),
        class_feature=tower.class_token and known.vision.class_feature,
    )
    return dataclasses.replace(known, vision=tower)


_ORIGINAL = {
    "llama": ("llava_llama", "LlavaLlamaForCausalLM"),
    "mistral": ("llava_mistral", "LlavaMistralForCausalLM"),
    "qwen2": ("llava_qwen", "LlavaQwenForCausalLM"),
}
"""Family of the language model -> their ``model_type`` and class."""


def to_original(config: LVLMConfig, image: ImageSpec | None = None) -> dict[str, Any]:
    """The LLaVA authors' config.json; `from_original` reads it back.

    Raises:
      ValueError: a decoder, connector or attention that their code does not have; no `image` for a model with tiles.
    """
    one_of("attention", config.attention, ["causal"])
    decoder = one_of("text_config.model_type", llm.family_of(config.llm), _ORIGINAL)
    model_type, architecture = _ORIGINAL[decoder]
    if isinstance(config.connector, MlpConfig):
        one_of("connector.activation", config.connector.activation, ["gelu"])
    elif not isinstance(config.connector, LinearConfig):
        raise ValueError(
            f"the LLaVA authors' layout has no {type(config.connector).__name__[:-6]} connector; choose another layout"
        )
    family = vision.FAMILIES[vision.family_of(config.vision)]
    # They name the layer of a tower with a class token alone; of another they read the end of what they kept.
    known = config.vision
    if known.class_token:
        known = vision.reading(known, feature_layer=-2, class_feature=False)
    names = [name for name, tower in llava.ORIGINAL_TOWERS.items() if tower == known]
    out = {
        **llm.FAMILIES[decoder].to_hf(config.llm),
        "model_type": model_type,
        "architectures": [architecture],
        "mm_vision_tower": names[0] if names else "vision_config",
        "mm_projector_type": "linear" if isinstance(config.connector, LinearConfig) else "mlp2x_gelu",
        "mm_vision_select_layer": config.vision.feature_layer,
        "mm_vision_select_feature": _FEATURE[config.vision.class_feature],
        "mm_hidden_size": config.vision.width,
        "mm_use_im_start_end": False,
        "mm_use_im_patch_token": False,
        "use_mm_proj": True,
    }
    if config.newline:
        out |= _original_tiles(image)
    if config.pools_frames:
        out |= _POOL
    return out if names else {**out, "vision_config": family.to_hf(config.vision)}


def _original_tiles(image: ImageSpec | None) -> dict[str, Any]:
    """Their fields of a model whose pictures are cut into tiles."""
    if image is None or image.tiles is None:
        raise ValueError("image_spec: config.json of a model with a newline names its tiles; give the image spec")
    tiles = image.tiles
    return {
        "mm_patch_merge_type": "spatial_unpad",
        "image_aspect_ratio": _ANYRES if tiles.most is None else f"{_ANYRES}_max_{tiles.most}",
        # They write (width, height).
        "image_grid_pinpoints": [[width, height] for height, width in tiles.pinpoints],
        # What their code does to frames, where it has both.
        **({} if tiles.most is None else {"mm_spatial_pool_mode": "bilinear", "mm_newline_position": "one_token"}),
    }
