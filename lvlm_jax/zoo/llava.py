"""LLaVA 1 and 1.5, whole: systems by name, the key table of each layout, config.json both ways.

Source: LLaVA (arXiv 2304.08485) and LLaVA-1.5 (arXiv 2310.03744).
"""

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

from lvlm_jax import llm, vision
from lvlm_jax.connectors import LinearConfig, MlpConfig, PerceiverConfig
from lvlm_jax.connectors import keys as connector_keys
from lvlm_jax.fusion import visual_expert
from lvlm_jax.keymap import PUBLIC_ACTIVATIONS, Row, activation, fields, one_of
from lvlm_jax.models.lvlm import LVLMConfig
from lvlm_jax.processing.image import ImageSpec
from lvlm_jax.zoo.spec import CLIP_MEAN, CLIP_STD, Spec

# ---------------------------------------------------------------------------------------------------------------------
# Systems

_CLIP_224 = ImageSpec(size=224, patch=14, mean=CLIP_MEAN, std=CLIP_STD, resample="bicubic", fit="crop")
_CLIP_336 = ImageSpec(size=336, patch=14, mean=CLIP_MEAN, std=CLIP_STD, resample="bicubic", fit="pad")
_RESAMPLER = PerceiverConfig(latents=64, depth=6, heads=16, head_dim=64)


def _v1(name: str, llama: str, source: str) -> Spec:
    # The authors add three words to LLaMA's 32000: the picture's own (32000), and its start and end.
    decoder = dataclasses.replace(llm.llama.PRESETS[llama], vocab=32003)
    config = LVLMConfig(vision=vision.clip.PRESETS["clip_l14"], connector=LinearConfig(), llm=decoder)
    return Spec(name=name, config=config, image=_CLIP_224, template="vicuna_v1", source=source, image_token_id=32000)


def _v15(name: str, vicuna: str, source: str, connector: MlpConfig | PerceiverConfig) -> Spec:
    # The vocabulary of the hub's files: 32000 words, <image>, <pad>, padded to a multiple of 64.
    decoder = dataclasses.replace(llm.llama.PRESETS[vicuna], vocab=32064)
    config = LVLMConfig(vision=vision.clip.PRESETS["clip_l14_336"], connector=connector, llm=decoder)
    return Spec(name=name, config=config, image=_CLIP_336, template="vicuna_v1", source=source, image_token_id=32000)


SYSTEMS: dict[str, Spec] = {
    spec.name: spec
    for spec in (
        _v1("llava_7b", "llama1_7b", "liuhaotian/LLaVA-7b-delta-v1-1"),
        _v1("llava_13b", "llama1_13b", "liuhaotian/LLaVA-13b-delta-v1-1"),
        _v15("llava15_7b", "vicuna15_7b", "llava-hf/llava-1.5-7b-hf", MlpConfig()),
        _v15("llava15_13b", "vicuna15_13b", "llava-hf/llava-1.5-13b-hf", MlpConfig()),
        # No release: towers and language model of LLaVA-1.5, a resampler that is to be trained between them.
        _v15("llava15_7b_perceiver", "vicuna15_7b", "llava-hf/llava-1.5-7b-hf", _RESAMPLER),
    )
}
"""Systems by name."""

# ---------------------------------------------------------------------------------------------------------------------
# Keys


@dataclasses.dataclass(frozen=True)
class Layout:
    """Where the parts stand in one way of writing a LLaVA checkpoint: prefixes, and whole keys of head and newline."""

    vision: str
    connector: str
    llm: str
    head: str
    newline: str


LAYOUTS: dict[str, Layout] = {
    # transformers 4.35 to 4.51, and most files on the hub
    "hf-4": Layout(
        "vision_tower.vision_model.",
        "multi_modal_projector",
        "language_model.model.",
        "language_model.lm_head.weight",
        "image_newline",
    ),
    # transformers 4.52 to the last 4.x
    "hf-4.52": Layout(
        "model.vision_tower.vision_model.",
        "model.multi_modal_projector",
        "model.language_model.",
        "lm_head.weight",
        "model.image_newline",
    ),
    # what transformers 5 writes for a fresh model: as hf-4, without "vision_model."
    "hf-5": Layout(
        "vision_tower.",
        "multi_modal_projector",
        "language_model.model.",
        "language_model.lm_head.weight",
        "image_newline",
    ),
    # transformers 5 in memory (`state_dict()`)
    "hf-5-memory": Layout(
        "model.vision_tower.",
        "model.multi_modal_projector",
        "model.language_model.",
        "lm_head.weight",
        "model.image_newline",
    ),
    # the authors' own repository; the tower is often absent, fetched by its hub name
    "llava-original": Layout(
        "model.vision_tower.vision_tower.vision_model.",
        "model.mm_projector",
        "model.",
        "lm_head.weight",
        "model.image_newline",
    ),
}
"""One model, five layouts (all on people's disks)."""


def rows(config: LVLMConfig, layout: str = "hf-5", tower: bool = True) -> list[Row]:
    """The key table of a whole LLaVA in one layout.

    Args:
      layout: a key of `LAYOUTS`.
      tower: False leaves the vision tower out, for files that hold none.
    """
    if layout not in LAYOUTS:
        raise ValueError(f"unknown checkpoint layout {layout!r}; the layouts are {', '.join(LAYOUTS)}")
    at = LAYOUTS[layout]
    tower_rows = vision.FAMILIES[vision.family_of(config.vision)].rows
    decoder_rows = llm.FAMILIES[llm.family_of(config.llm)].rows
    if config.expert:
        decoder_rows = visual_expert.rows
    between = connector_keys.original_rows if layout == "llava-original" else connector_keys.rows
    return [
        *(tower_rows(config.vision, "vision", at.vision) if tower else ()),
        *between(config.connector, "connector", at.connector),
        *decoder_rows(config.llm, "llm", at.llm, at.head),
        *([Row("newline/token", at.newline)] if config.newline else ()),
        *(visual_expert.ends_rows("ends", at.connector) if config.expert else ()),
    ]


def layout_of(keys: Iterable[str]) -> str:
    """The layout that a checkpoint's keys are in, by probing.

    Raises:
      ValueError: none of them.
    """
    keys = list(keys)
    for name in ("llava-original", "hf-4.52", "hf-5-memory", "hf-4", "hf-5"):
        at = LAYOUTS[name]
        has_tower = any(key.startswith(at.vision) for key in keys)
        if any(key.startswith(at.connector) for key in keys) and (has_tower or name == "llava-original"):
            return name
    raise ValueError(
        f"these keys are in no known LLaVA layout ({', '.join(LAYOUTS)}): {', '.join(sorted(keys)[:6])} ... "
        "Is it a LLaVA, and are all of its files there?"
    )


# ---------------------------------------------------------------------------------------------------------------------
# config.json

MODEL_TYPE, ARCHITECTURE = "llava", "LlavaForConditionalGeneration"

OWN_TYPE = "lvlm_jax_llava"
"""``model_type`` of what the torch library has no class for: another connector, prefix attention, capped logits (its
class leaves Gemma 2's cap away). A name that it does not know makes it stop, where "llava" would make it run with other
maths."""

TOWERS = ("clip_vision_model", "siglip_vision_model")
"""The families of towers of the releases. With another the torch library would read registers as features, say."""

DEFAULTS = {
    "image_token_index": 32000,
    "projector_hidden_act": "gelu",
    "vision_feature_select_strategy": "default",
    "vision_feature_layer": -2,
    "multimodal_projector_bias": True,
    "tie_word_embeddings": False,
}
"""What the public class assumes for fields that a config leaves out."""


def fits(config: LVLMConfig) -> bool:
    """Whether the torch library's class can hold this model."""
    plain = config.attention == "causal" and not (config.newline or config.expert or config.vision.feature_norm)
    plain &= config.fusion is None
    plain &= isinstance(config.connector, MlpConfig) and config.llm.final_softcap is None
    return plain and vision.family_of(config.vision) in TOWERS


def from_hf(config: Mapping[str, Any]) -> tuple[LVLMConfig, int]:
    """(model, image token id) from a config.json of the torch library, or one that `to_hf` wrote.

    Raises:
      ValueError: a part or value that cannot be run, naming the field and what is supported.
    """
    one_of("model_type", config.get("model_type"), [MODEL_TYPE, OWN_TYPE])
    for part in ("vision_config", "text_config"):
        if not config.get(part):
            raise ValueError(f"config.json: {part} is missing; is this a config of the torch library's LLaVA class?")
    f = fields(config, DEFAULTS | {"image_token_index": config.get("image_token_id", DEFAULTS["image_token_index"])})
    one_of("multimodal_projector_bias", f["multimodal_projector_bias"], [True])
    act = activation("projector_hidden_act", f["projector_hidden_act"])
    own = config["model_type"] == OWN_TYPE
    connector = connector_keys.from_dict(f.get("connector", {})) if own else MlpConfig(activation=act)
    text = dict(config["text_config"])
    text["tie_word_embeddings"] = bool(text.get("tie_word_embeddings") or f["tie_word_embeddings"])
    kind = one_of("text_config.model_type", text.get("model_type", "llama"), llm.FAMILIES)
    decoder = llm.FAMILIES[kind].from_hf(text)
    whole = LVLMConfig(
        vision=_vision_from_hf(f, own),
        connector=connector,
        # The public class puts a head of its own on the decoder, and that head caps nothing.
        llm=decoder if own else dataclasses.replace(decoder, final_softcap=None),
        attention=one_of("attention", f.get("attention", "causal") if own else "causal", ["causal", "prefix"]),
        newline=one_of("newline", f.get("newline", False) if own else False, [False, True]),
        expert=one_of("expert", f.get("expert", False) if own else False, [False, True]),
    )
    return whole, int(f["image_token_index"])


def _vision_from_hf(f: Mapping[str, Any], own: bool = False) -> vision.VisionConfig:
    """The tower, and what is read of it."""
    tower = f["vision_config"]
    kinds = vision.FAMILIES if own else TOWERS
    kind = one_of("vision_config.model_type", tower.get("model_type", "clip_vision_model"), kinds)
    config = vision.FAMILIES[kind].from_hf(tower)
    if own and f.get("vision_max_patches"):
        config = dataclasses.replace(config, max_patches=f["vision_max_patches"])
    # "default" drops the first token, whatever it is: right only where it is the class token.
    strategies = ["default", "full"] if config.class_token else ["full"]
    strategy = one_of("vision_feature_select_strategy", f["vision_feature_select_strategy"], strategies)
    layer = from_end("vision_feature_layer", f["vision_feature_layer"], config.depth)
    norm = one_of("vision_feature_norm", f.get("vision_feature_norm", False), [False, True])
    kept = config.class_token and strategy == "full"
    return vision.reading(config, feature_layer=layer, class_feature=kept, feature_norm=norm)


def from_end(field: str, layer: Any, depth: int) -> int:
    """Layer index counted from the end: -1 the last block, -1-depth the embeddings."""
    span = f"one layer from {-1 - depth} to {depth}"
    if not isinstance(layer, int) or not -1 - depth <= layer <= depth:
        raise ValueError(f"config.json: {field} is {layer!r}, which is not supported; supported: {span}")
    return layer if layer < 0 else layer - depth - 1


def to_hf(config: LVLMConfig, image_token_id: int, image: ImageSpec | None = None) -> dict[str, Any]:
    """The config.json that the torch library reads; `from_hf` reads it back. It says nothing of `image`.

    A model that it has no class for gets our own ``model_type`` and ``connector`` entry instead.
    """
    tower = config.vision
    out = {
        "vision_config": vision.FAMILIES[vision.family_of(tower)].to_hf(tower),
        "text_config": llm.FAMILIES[llm.family_of(config.llm)].to_hf(config.llm),
        "vision_feature_layer": tower.feature_layer,
        "vision_feature_select_strategy": "default" if tower.class_token and not tower.class_feature else "full",
        "image_token_index": image_token_id,
        "image_seq_length": config.visual_tokens,
        "tie_word_embeddings": config.llm.tied,
    }
    if not fits(config):
        own = {"connector": connector_keys.to_dict(config.connector), "attention": config.attention}
        own |= {"newline": config.newline, "expert": config.expert, "vision_feature_norm": tower.feature_norm}
        own |= {"vision_max_patches": tower.max_patches}
        return {"model_type": OWN_TYPE, **out, **own}
    act = one_of("projector_hidden_act", config.connector.activation, PUBLIC_ACTIVATIONS)
    return {
        "model_type": MODEL_TYPE,
        "architectures": [ARCHITECTURE],
        **out,
        "projector_hidden_act": PUBLIC_ACTIVATIONS[act],
        "multimodal_projector_bias": True,
    }


def processor(config: LVLMConfig) -> dict[str, Any]:
    """What the torch library's processor must know of the model: the fields of processor_config.json."""
    tower = config.vision
    return {
        "processor_class": "LlavaNextProcessor" if config.newline else "LlavaProcessor",
        "patch_size": tower.patch_size,
        "num_additional_image_tokens": int(tower.class_token),
        "vision_feature_select_strategy": "default" if tower.class_token and not tower.class_feature else "full",
    }


_CUT = {"pool": "none", "feature_layer": -1}

ORIGINAL_TOWERS = {name: vision.clip.PRESETS[preset] for name, preset in vision.clip.HUB_NAMES.items()} | {
    name: dataclasses.replace(sizes, depth=sizes.depth - 1, **_CUT)
    for name, sizes in ((name, vision.siglip.PRESETS[preset]) for name, preset in vision.siglip.HUB_NAMES.items())
}
"""``mm_vision_tower`` of the authors' config.json -> tower. Of SigLIP's they drop the last block and the pooling head,
and read what is left to its end, whatever layer config.json names."""

ORIGINAL_DECODERS = {
    "llava": llm.llama,
    "llava_llama": llm.llama,
    "llava_mistral": llm.mistral,
    "llava_qwen": llm.qwen2,
}
"""``model_type`` of the authors' config.json -> family of the language model."""

PROJECTORS = {"linear": LinearConfig(), "mlp2x_gelu": MlpConfig()}
"""``mm_projector_type`` of the authors' config.json -> connector."""


def from_original(config: Mapping[str, Any]) -> LVLMConfig:
    """The model from a config.json of the authors' repository (``mm_vision_tower``, ``mm_projector_type`` ...).

    Their vocabulary has no word for a picture (placeholders are -200 in token lists there).

    Raises:
      ValueError: a tower, projector or value that cannot be run, naming the field and what is supported.
    """
    short = {name.split("/")[-1]: sizes for name, sizes in ORIGINAL_TOWERS.items()}
    tower = str(config.get("mm_vision_tower"))
    sizes = short[one_of("mm_vision_tower", tower.rstrip("/").split("/")[-1], short)]
    decoder = one_of("model_type", config.get("model_type", "llava_llama"), ORIGINAL_DECODERS)
    kind = one_of("mm_projector_type", config.get("mm_projector_type") or "linear", PROJECTORS)
    select = one_of(
        "mm_vision_select_feature", config.get("mm_vision_select_feature") or "patch", ["patch", "cls_patch"]
    )
    if sizes.class_token:
        layer = from_end("mm_vision_select_layer", config.get("mm_vision_select_layer", -2), sizes.depth)
        sizes = dataclasses.replace(sizes, feature_layer=layer, class_feature=select == "cls_patch")
    merge = one_of("mm_patch_merge_type", config.get("mm_patch_merge_type") or "flat", ["flat", "spatial_unpad"])
    return LVLMConfig(
        vision=sizes,
        connector=PROJECTORS[kind],
        llm=ORIGINAL_DECODERS[decoder].from_hf(config),
        newline=merge == "spatial_unpad" and "anyres" in str(config.get("image_aspect_ratio")),
    )


__all__ = [
    "ARCHITECTURE",
    "DEFAULTS",
    "LAYOUTS",
    "MODEL_TYPE",
    "ORIGINAL_DECODERS",
    "ORIGINAL_TOWERS",
    "OWN_TYPE",
    "SYSTEMS",
    "Layout",
    "fits",
    "from_end",
    "from_hf",
    "from_original",
    "layout_of",
    "processor",
    "rows",
    "to_hf",
]
