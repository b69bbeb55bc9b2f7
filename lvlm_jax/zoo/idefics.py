"""Idefics 1: Flamingo in the open, CLIP-H whole, a resampler, LLaMA 1 with gated blocks between its layers.

Source: Idefics (OBELICS, arXiv 2306.16527). Keys are those of the torch library's `IdeficsForVisionText2Text`, the same
in memory and in every file. Its `image_attention_mask`, as its processor makes it, lets text see the last picture
before it; packed examples are segments here.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from lvlm_jax import llm, vision
from lvlm_jax.connectors import IDEFICS, PerceiverConfig
from lvlm_jax.fusion.cross_attention import CrossAttentionConfig
from lvlm_jax.keymap import SCALAR, TRANSPOSE, Change, Row, dense, fields, layer_norm, one_of
from lvlm_jax.llm.decoder import DecoderConfig
from lvlm_jax.models.lvlm import LVLMConfig
from lvlm_jax.processing.image import ImageSpec
from lvlm_jax.vision.vit import ViTConfig
from lvlm_jax.zoo.spec import CLIP_MEAN, CLIP_STD, Spec

MODEL_TYPE, ARCHITECTURE = "idefics", "IdeficsForVisionText2Text"

LAYOUTS = {"idefics": "model.gated_cross_attn_layers."}
"""The name of the layout and the keys that it is known by."""

# ---------------------------------------------------------------------------------------------------------------------
# Systems

_CLIP_H = ViTConfig(  # laion/CLIP-ViT-H-14-laion2B-s32B-b79K, to its very end, class token and all
    image_size=224,
    patch_size=14,
    width=1280,
    depth=32,
    heads=16,
    mlp_dim=5120,
    activation="gelu",
    feature_layer=-1,
    class_feature=True,
)
_IMAGE = ImageSpec(size=224, patch=14, mean=CLIP_MEAN, std=CLIP_STD, resample="bicubic", fit="squash")


def blocks(decoder: DecoderConfig, every: int, gate: str = "scalar", qk_norm: bool = True) -> CrossAttentionConfig:
    """Its gated blocks, which have the sizes of the decoder's own layers."""
    return CrossAttentionConfig(
        every=every,
        place="before_first",
        heads=decoder.heads,
        head_dim=decoder.head_width,
        mlp_dim=decoder.mlp_dim,
        gate=gate,
        activation="silu",
        gated=True,
        norm="rms",
        norm_eps=decoder.norm_eps,
        qk_norm="rms" if qk_norm else None,
    )


def _system(name: str, llama: str, source: str) -> Spec:
    decoder = llm.llama.PRESETS[llama]
    config = LVLMConfig(
        vision=_CLIP_H,
        connector=PerceiverConfig(**IDEFICS, project=False),
        llm=decoder,
        fusion=blocks(decoder, every=4),
        words=2,  # <fake_token_around_image> and <image>
    )
    return Spec(name=name, config=config, image=_IMAGE, template="idefics", source=source, image_token_id=32001)


SYSTEMS: dict[str, Spec] = {
    spec.name: spec
    for spec in (
        _system("idefics_9b", "llama1_7b", "HuggingFaceM4/idefics-9b"),
        _system("idefics_80b", "llama1_65b", "HuggingFaceM4/idefics-80b"),
    )
}
"""Systems by name."""

# ---------------------------------------------------------------------------------------------------------------------
# Keys

_VECTOR = Change(lambda x: x.reshape(-1), lambda x: x.reshape(1, 1, -1))


def rows(config: LVLMConfig, layout: str = "idefics") -> list[Row]:
    """The key table of a whole Idefics."""
    if layout not in LAYOUTS:
        raise ValueError(f"an Idefics has no layout {layout!r}; it has one, {', '.join(LAYOUTS)}")
    words = [Row("words/table", "model.embed_tokens.additional_embedding.weight")]
    if not config.llm.tied:
        words.append(Row("words/kernel", "lm_head.additional_fc.weight", TRANSPOSE))
    return [
        *vision.clip.rows(config.vision, "vision", "model.vision_model."),
        *_resampler_rows(config.connector, "connector/resampler", "model.perceiver_resampler"),
        *llm.llama.rows(config.llm, "llm", "model.", "lm_head.weight"),
        *_block_rows(config, "fusion", "model.gated_cross_attn_layers"),
        *(words if config.words else ()),
    ]


def _resampler_rows(config: PerceiverConfig, ours: str, theirs: str) -> list[Row]:
    out = [Row(f"{ours}/latents", f"{theirs}.latents"), *layer_norm(f"{ours}/norm", f"{theirs}.layer_norm")]
    for i in range(config.depth):
        a, b = f"{ours}/layers/{i}", f"{theirs}.blocks.{i}"
        for x, y in (("norm_context", "0.context"), ("norm_latents", "0.latents")):
            out += layer_norm(f"{a}/{x}", f"{b}.{y}_layer_norm")
        for x, y in (("q", "q_proj"), ("k", "k_proj"), ("v", "v_proj"), ("o", "output_proj")):
            out += dense(f"{a}/attn/{x}", f"{b}.0.{y}")
        for x in ("q", "k") if config.qk_norm else ():
            out += layer_norm(f"{a}/attn/{x}_norm", f"{b}.0.{x}_layer_norm")
        out += layer_norm(f"{a}/norm_mlp", f"{b}.1.ln")
        out += dense(f"{a}/mlp/up", f"{b}.1.fc") + dense(f"{a}/mlp/down", f"{b}.1.c_proj")
    return out


def _block_rows(config: LVLMConfig, ours: str, theirs: str) -> list[Row]:
    gate = SCALAR if config.fusion.gate == "scalar" else _VECTOR
    out: list[Row] = []
    for i in range(len(config.fusion.spots(config.llm.depth))):
        a, b = f"{ours}/layers/{i}", f"{theirs}.{i}"
        out += [Row(f"{a}/{x}/scale", f"{b}.{y}_layernorm.weight") for x, y in _NORMS]
        out += [Row(f"{a}/{x}_gate", f"{b}.alpha_{y}", gate) for x, y in (("attn", "cross_attn"), ("mlp", "dense"))]
        for x in ("q", "k", "v", "o"):
            out += dense(f"{a}/attn/{x}", f"{b}.cross_attn.{x}_proj")
        for x in ("q", "k") if config.fusion.qk_norm else ():
            out.append(Row(f"{a}/attn/{x}_norm/scale", f"{b}.cross_attn.{x}_layer_norm.weight"))
        for x in ("gate", "up", "down"):
            out += dense(f"{a}/mlp/{x}", f"{b}.mlp.{x}_proj")
    return out


_NORMS = (("norm1", "input"), ("norm2", "post_attention"))


# ---------------------------------------------------------------------------------------------------------------------
# config.json

DEFAULTS = {
    **llm.llama.DEFAULTS,
    "additional_vocab_size": 0,
    "alpha_type": "float",
    "cross_layer_interval": 1,
    "qk_layer_norms": False,
    "use_resampler": False,
    "image_token_id": None,
}
"""What the public class assumes for fields that a config leaves out."""

VISION_DEFAULTS = {**vision.clip.VISION_DEFAULTS, "embed_dim": 768, "intermediate_size": 5120, "num_hidden_layers": 32}
VISION_DEFAULTS |= {"patch_size": 14, "num_attention_heads": 16, "hidden_act": "gelu"}

PERCEIVER_DEFAULTS = {
    "resampler_n_latents": 64,
    "resampler_depth": 6,
    "resampler_n_heads": 16,
    "resampler_head_dim": 96,
    "qk_layer_norms_perceiver": False,
}

GATES = {"float": "scalar", "vector": "vector"}
"""``alpha_type`` -> what a gate is here."""


def fits(config: LVLMConfig) -> bool:
    """Whether the torch library's class can hold this model."""
    fusion, connector = config.fusion, config.connector
    if fusion is None or not isinstance(connector, PerceiverConfig):
        return False
    sizes = {name: getattr(connector, name) for name in ("latents", "depth", "heads", "head_dim")}
    own = PerceiverConfig(**IDEFICS | sizes | {"qk_norm": connector.qk_norm and "layer"}, project=False)
    decoder = llm.llama.fits(config.llm) and (config.llm.kv_heads, config.llm.head_dim) == (config.llm.heads, None)
    return (
        decoder
        and vision.clip.fits(config.vision)
        and (config.vision.feature_layer, config.vision.class_feature, config.attention) == (-1, True, "causal")
        and fusion == blocks(config.llm, fusion.every, fusion.gate, fusion.qk_norm is not None)
        and connector == own
        and config.llm.depth % fusion.every == 0
    )


def from_hf(config: Mapping[str, Any]) -> tuple[LVLMConfig, int]:
    """(model, image token id) from a config.json of the torch library.

    Raises:
      ValueError: a part or value that cannot be run, naming the field and what is supported.
    """
    one_of("model_type", config.get("model_type"), [MODEL_TYPE])
    f = fields(config, DEFAULTS)
    one_of("use_resampler", f["use_resampler"], [True])
    every, depth = f["cross_layer_interval"], f["num_hidden_layers"]
    if depth % every:
        raise ValueError(
            f"config.json: cross_layer_interval is {every}, which does not divide num_hidden_layers={depth}: the last "
            "group of layers would have no gated block of its own"
        )
    decoder = llm.llama.from_hf({name: f[name] for name in f if name in {*llm.llama.DEFAULTS, "rope_parameters"}})
    v = fields(f.get("vision_config") or {}, VISION_DEFAULTS)
    tower = vision.clip.from_hf({**v, "hidden_size": v["embed_dim"]})
    p = fields(f.get("perceiver_config") or {}, PERCEIVER_DEFAULTS)
    resampler = {
        "latents": p["resampler_n_latents"],
        "depth": p["resampler_depth"],
        "heads": p["resampler_n_heads"],
        "head_dim": p["resampler_head_dim"],
        "qk_norm": "layer" if p["qk_layer_norms_perceiver"] else None,
    }
    whole = LVLMConfig(
        vision=dataclasses.replace(tower, feature_layer=-1, class_feature=True),
        connector=PerceiverConfig(**IDEFICS | resampler, project=False),
        llm=decoder,
        fusion=blocks(decoder, every, GATES[one_of("alpha_type", f["alpha_type"], GATES)], bool(f["qk_layer_norms"])),
        words=f["additional_vocab_size"],
    )
    word = f["image_token_id"]
    return whole, _picture_word(decoder.vocab) if word is None else int(word)


def _picture_word(vocab: int) -> int:
    """``<image>`` in the releases, the second word beyond LLaMA's."""
    return vocab + 1


def to_hf(config: LVLMConfig, image_token_id: int, image: ImageSpec | None = None) -> dict[str, Any]:
    """The config.json that the torch library reads; `from_hf` reads it back. It says nothing of `image`."""
    text = llm.llama.to_hf(config.llm)
    tower = vision.clip.public_vision_values(config.vision)
    tower["embed_dim"] = tower.pop("hidden_size")
    connector, fusion = config.connector, config.fusion
    left_out = ("num_key_value_heads", "head_dim", "attention_bias", "mlp_bias")
    # Their files name no word for a picture, and the torch library takes one beyond LLaMA's for a mistake.
    word = {} if image_token_id == _picture_word(config.llm.vocab) else {"image_token_id": image_token_id}
    return {
        **{name: value for name, value in text.items() if name not in left_out},
        "model_type": MODEL_TYPE,
        "architectures": [ARCHITECTURE],
        "additional_vocab_size": config.words,
        "alpha_type": next(name for name, gate in GATES.items() if gate == fusion.gate),
        "alpha_initializer": "zeros",
        "cross_layer_interval": fusion.every,
        "qk_layer_norms": fusion.qk_norm is not None,
        "use_resampler": True,
        **word,
        "vision_config": {"model_type": "idefics_vision", **tower},
        "perceiver_config": {
            "use_resampler": True,
            "resampler_n_latents": connector.latents,
            "resampler_depth": connector.depth,
            "resampler_n_heads": connector.heads,
            "resampler_head_dim": connector.head_dim,
            "qk_layer_norms_perceiver": connector.qk_norm is not None,
        },
    }


def processor(config: LVLMConfig) -> dict[str, Any]:
    """What the torch library's processor must know of the model."""
    return {"processor_class": "IdeficsProcessor", "image_processor_type": "IdeficsImageProcessor"}


__all__ = [
    "ARCHITECTURE",
    "LAYOUTS",
    "MODEL_TYPE",
    "SYSTEMS",
    "blocks",
    "fits",
    "from_hf",
    "processor",
    "rows",
    "to_hf",
]
