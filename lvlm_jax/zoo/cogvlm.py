"""CogVLM: EVA-02-CLIP-E less its last block, a gated projector, Vicuna with a visual expert in every layer.

Source: CogVLM (arXiv 2311.03079), github.com/THUDM/CogVLM, and the hub's modeling_cogvlm.py and visual.py, whose names
the keys are. The files know no word for a picture: where one stands is told beside the text. They hold no tokenizer
either; it is Vicuna's.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from lvlm_jax import llm
from lvlm_jax.connectors import GatedConfig
from lvlm_jax.connectors import keys as connector_keys
from lvlm_jax.fusion import visual_expert
from lvlm_jax.keymap import (
    PUBLIC_ACTIVATIONS,
    TRANSPOSE,
    UNBATCHED,
    Row,
    activation,
    dense,
    fields,
    joined,
    layer_norm,
    one_of,
    patches,
    square,
)
from lvlm_jax.models.lvlm import LVLMConfig
from lvlm_jax.processing.image import ImageSpec
from lvlm_jax.vision.vit import ViTConfig
from lvlm_jax.zoo.spec import CLIP_MEAN, CLIP_STD, Spec

MODEL_TYPE, ARCHITECTURE = "cogvlm", "CogVLMForCausalLM"
"""The releases' config.json names the second alone: their code stands beside the weights."""

LAYOUTS = {"cogvlm": "model.vision.patch_embedding."}
"""The name of the layout and the keys that it is known by."""

PICTURE = 0
"""The id that stands where a picture's tokens go; any would do."""

# ---------------------------------------------------------------------------------------------------------------------
# Systems


def tower(image_size: int, **sizes: Any) -> ViTConfig:
    """EVA-02-CLIP-E as CogVLM reads it: 63 of 64 blocks, no final norm, and keys with a bias (which moves nothing)."""
    return ViTConfig(
        **{
            "image_size": image_size,
            "patch_size": 14,
            "width": 1792,
            "depth": 63,
            "heads": 16,
            "mlp_dim": 15360,
            "activation": "gelu",
            "norm_eps": 1e-6,
            **sizes,
        },
        pre_norm=False,
        patch_bias=True,
        norm_after=True,
        pool="raw",
        feature_layer=-1,
    )


def _system(name: str, side: int, template: str, source: str) -> Spec:
    decoder = dataclasses.replace(llm.llama.PRESETS["vicuna15_7b"], context=2048)
    connector = GatedConfig(hidden=decoder.mlp_dim)
    return Spec(
        name=name,
        config=LVLMConfig(vision=tower(side), connector=connector, llm=decoder, expert=True),
        image=ImageSpec(size=side, patch=14, mean=CLIP_MEAN, std=CLIP_STD, resample="bicubic", fit="squash"),
        template=template,
        source=source,
        tokenizer="lmsys/vicuna-7b-v1.5",
        image_token_id=PICTURE,
    )


SYSTEMS: dict[str, Spec] = {
    spec.name: spec
    for spec in (
        _system("cogvlm_chat", 490, "cogvlm_chat", "THUDM/cogvlm-chat-hf"),
        _system("cogvlm_base_224", 224, "cogvlm_base", "THUDM/cogvlm-base-224-hf"),
        _system("cogvlm_base_490", 490, "cogvlm_base", "THUDM/cogvlm-base-490-hf"),
        _system("cogvlm_grounding", 490, "cogvlm_base", "THUDM/cogvlm-grounding-generalist-hf"),
    )
}
"""Systems by name."""

# ---------------------------------------------------------------------------------------------------------------------
# Keys


def rows(config: LVLMConfig, layout: str = "cogvlm") -> list[Row]:
    """The key table of a whole CogVLM."""
    if layout not in LAYOUTS:
        raise ValueError(f"a CogVLM has no layout {layout!r}; it has one, {', '.join(LAYOUTS)}")
    return [
        *_tower_rows(config.vision, "vision/trunk", "model.vision"),
        *connector_keys.rows(config.connector, "connector", "model.vision.linear_proj"),
        *visual_expert.ends_rows("ends", "model.vision"),
        *visual_expert.rows(config.llm, "llm", "model.", "lm_head.weight"),
    ]


def _tower_rows(config: ViTConfig, ours: str, theirs: str) -> list[Row]:
    embed = f"{theirs}.patch_embedding"
    out = [
        Row(f"{ours}/class_embed", f"{embed}.cls_embedding", UNBATCHED),
        Row(f"{ours}/position_embed", f"{embed}.position_embedding.weight"),
        Row(f"{ours}/patch_embed/kernel", f"{embed}.proj.weight", patches(config.patch_size)),
        Row(f"{ours}/patch_embed/bias", f"{embed}.proj.bias"),
    ]
    for i in range(config.depth):
        a, b = f"{ours}/layers/{i}", f"{theirs}.transformer.layers.{i}"
        out += layer_norm(f"{a}/norm1", f"{b}.input_layernorm")
        out += layer_norm(f"{a}/norm2", f"{b}.post_attention_layernorm")
        kernels, biases = (tuple(f"{a}/attn/{x}/{leaf}" for x in "qkv") for leaf in ("kernel", "bias"))
        out.append(Row(kernels, f"{b}.attention.query_key_value.weight", joined(3, TRANSPOSE)))
        out.append(Row(biases, f"{b}.attention.query_key_value.bias", joined(3)))
        out += dense(f"{a}/attn/o", f"{b}.attention.dense", bias=True)
        out += dense(f"{a}/mlp/up", f"{b}.mlp.fc1", bias=True) + dense(f"{a}/mlp/down", f"{b}.mlp.fc2", bias=True)
    return out


# ---------------------------------------------------------------------------------------------------------------------
# config.json

DEFAULTS = {**llm.llama.DEFAULTS, "image_token_id": PICTURE}
"""What the hub's class assumes for fields that a config leaves out."""

VISION_DEFAULTS = {
    "hidden_act": "gelu",
    "hidden_size": 1792,
    "image_size": 490,
    "in_channels": 3,
    "intermediate_size": 15360,
    "layer_norm_eps": 1e-6,
    "num_heads": 16,
    "num_hidden_layers": 63,
    "num_positions": 1226,
    "patch_size": 14,
}
"""The same of its ``vision_config``."""

REMOTE = "THUDM/cogvlm-chat-hf"
"""Where the code is that reads such a folder in the torch library (with ``trust_remote_code=True``)."""


def fits(config: LVLMConfig) -> bool:
    """Whether the hub's class can hold this model."""
    if not config.expert or not isinstance(config.vision, ViTConfig):
        return False
    v, decoder = config.vision, config.llm
    same = ("patch_size", "width", "depth", "heads", "mlp_dim", "activation", "norm_eps")
    return (
        v == tower(v.image_size, **{name: getattr(v, name) for name in same})
        and config.connector == GatedConfig(hidden=decoder.mlp_dim)
        and llm.llama.fits(decoder)
        and (decoder.whole_heads, decoder.rope_theta, decoder.rope_scaling) == (True, 10000.0, None)
    )


def from_hf(config: Mapping[str, Any]) -> tuple[LVLMConfig, int]:
    """(model, id that stands for a picture) from a config.json of the hub's.

    Raises:
      ValueError: a part or value that cannot be run, naming the field and what is supported.
    """
    one_of("model_type", config.get("model_type") or MODEL_TYPE, [MODEL_TYPE])
    one_of("num_multi_query_heads (CogVLM2 has some)", config.get("num_multi_query_heads"), [None])
    one_of("cross_hidden_size (CogAgent has one)", config.get("cross_hidden_size"), [None])
    f = fields(config, DEFAULTS)
    decoder = llm.llama.from_hf({name: f[name] for name in llm.llama.DEFAULTS})
    v = fields(f.get("vision_config") or {}, VISION_DEFAULTS)
    one_of("vision_config.in_channels", v["in_channels"], [3])
    seen = tower(
        square("vision_config.image_size", v["image_size"]),
        patch_size=square("vision_config.patch_size", v["patch_size"]),
        width=v["hidden_size"],
        depth=v["num_hidden_layers"],
        heads=v["num_heads"],
        mlp_dim=v["intermediate_size"],
        activation=activation("vision_config.hidden_act", v["hidden_act"]),
        norm_eps=float(v["layer_norm_eps"]),
    )
    one_of("vision_config.num_positions", v["num_positions"], [seen.patches + 1])
    connector = GatedConfig(hidden=decoder.mlp_dim)
    return LVLMConfig(vision=seen, connector=connector, llm=decoder, expert=True), int(f["image_token_id"])


def to_hf(config: LVLMConfig, image_token_id: int, image: ImageSpec | None = None) -> dict[str, Any]:
    """The config.json that the hub's class reads; `from_hf` reads it back. It says nothing of `image`."""
    text, v = llm.llama.to_hf(config.llm), config.vision
    kept = (
        *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "hidden_act"),
        *("rms_norm_eps", "max_position_embeddings", "tie_word_embeddings"),
    )
    word = {} if image_token_id == PICTURE else {"image_token_id": image_token_id}
    return {
        "model_type": MODEL_TYPE,
        "architectures": [ARCHITECTURE],
        "auto_map": {
            "AutoConfig": f"{REMOTE}--configuration_cogvlm.CogVLMConfig",
            "AutoModelForCausalLM": f"{REMOTE}--modeling_cogvlm.{ARCHITECTURE}",
        },
        **{name: text[name] for name in kept},
        **word,
        "vision_config": {
            "dropout_prob": 0.0,
            "hidden_act": PUBLIC_ACTIVATIONS[v.activation],
            "hidden_size": v.width,
            "image_size": v.image_size,
            "in_channels": 3,
            "intermediate_size": v.mlp_dim,
            "layer_norm_eps": v.norm_eps,
            "num_heads": v.heads,
            "num_hidden_layers": v.depth,
            "num_positions": v.patches + 1,
            "patch_size": v.patch_size,
        },
    }


def processor(config: LVLMConfig) -> dict[str, Any]:
    """What the torch library's processor must know of the model: it has none for this kind."""
    return {}
