"""OpenFlamingo: CLIP-L, a resampler, and any language model with gated blocks between its layers.

The authors release what they trained (`hub.open_flamingo`); tower and language model are other people's. A whole model
of this kind, whatever its parts, is written under the authors' names, with a config.json of our own.
Source: OpenFlamingo (arXiv 2308.01390) and its repository, version 2.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from lvlm_jax import keymap, llm, vision
from lvlm_jax.config import build, to_dict
from lvlm_jax.connectors import FLAMINGO, PerceiverConfig
from lvlm_jax.connectors import keys as connector_keys
from lvlm_jax.fusion.cross_attention import CrossAttentionConfig
from lvlm_jax.keymap import TRANSPOSE, Row, dense, joined, layer_norm, one_of
from lvlm_jax.models.lvlm import LVLMConfig
from lvlm_jax.processing.image import ImageSpec
from lvlm_jax.zoo import idefics
from lvlm_jax.zoo.spec import CLIP_MEAN, CLIP_STD, Spec

MODEL_TYPE, ARCHITECTURE = "lvlm_jax_flamingo", None
"""Our own ``model_type``: the torch library has no class for it, and stops at a name that it does not know."""

LAYOUTS = {"open_flamingo": "lang_encoder.gated_cross_attn_layers."}
"""The name of the layout and the keys that it is known by."""

RESAMPLER = PerceiverConfig(**FLAMINGO, project=False)

# ---------------------------------------------------------------------------------------------------------------------
# Systems

_TOWER = dataclasses.replace(vision.clip.PRESETS["clip_l14"], feature_layer=-1)
_IMAGE = ImageSpec(size=224, patch=14, mean=CLIP_MEAN, std=CLIP_STD, resample="bicubic", fit="crop")


_NEOX = 50277
"""Words of GPT-NeoX's tokenizer, which all hosts of version 2 have; their tables are longer, and are cut."""


def _system(name: str, decoder: str, words: int, every: int, source: str) -> Spec:
    # The tokenizer has so many words, then come <|endofchunk|>, <image> and <PAD>; the table is cut to them.
    config = LVLMConfig(
        vision=_TOWER,
        connector=RESAMPLER,
        llm=dataclasses.replace(llm.PRESETS[decoder], vocab=words + 3),
        fusion=CrossAttentionConfig(every=every),
    )
    return Spec(
        name=name,
        config=config,
        image=_IMAGE,
        template="flamingo",
        source=source,
        image_token_id=words + 1,
        released=False,
    )


SYSTEMS: dict[str, Spec] = {
    spec.name: spec
    for spec in (
        # openflamingo/OpenFlamingo-9B-deprecated, the first release
        _system("open_flamingo_9b_llama", "llama1_7b", 32000, 4, "huggyllama/llama-7b"),
        # openflamingo/OpenFlamingo-3B-vitl-mpt1b and -langinstruct
        _system("open_flamingo_3b", "mpt_1b", _NEOX, 1, "anas-awadalla/mpt-1b-redpajama-200b"),
        _system("open_flamingo_3b_instruct", "mpt_1b", _NEOX, 1, "anas-awadalla/mpt-1b-redpajama-200b-dolly"),
        # openflamingo/OpenFlamingo-4B-vitl-rpj3b and -langinstruct
        _system("open_flamingo_4b", "redpajama_3b", _NEOX, 2, "togethercomputer/RedPajama-INCITE-Base-3B-v1"),
        _system(
            "open_flamingo_4b_instruct", "redpajama_3b", _NEOX, 2, "togethercomputer/RedPajama-INCITE-Instruct-3B-v1"
        ),
        # openflamingo/OpenFlamingo-9B-vitl-mpt7b
        _system("open_flamingo_9b", "mpt_7b", _NEOX, 4, "anas-awadalla/mpt-7b"),
    )
}
"""Systems by name; `source` has the tokenizer and the language model, the tower is CLIP's release, the rest a delta."""

# ---------------------------------------------------------------------------------------------------------------------
# Keys


def rows(config: LVLMConfig, layout: str = "open_flamingo") -> list[Row]:
    """The key table of a whole model: the delta's keys, and the towers' under the authors' prefixes."""
    if layout not in LAYOUTS:
        raise ValueError(f"an OpenFlamingo has no layout {layout!r}; it has one, {', '.join(LAYOUTS)}")
    tower = vision.FAMILIES[vision.family_of(config.vision)]
    words = [Row("words/table", "words.table")]
    words += [] if config.llm.tied else [Row("words/kernel", "words.head", TRANSPOSE)]
    return [
        *tower.rows(config.vision, "vision", "vision_encoder."),
        *trained_rows(config),
        *host_rows(config),
        *(words if config.words else ()),
    ]


def host_rows(config: LVLMConfig) -> list[Row]:
    """The key table of the language model, its own under the authors' prefix."""
    found = llm.FAMILIES[llm.family_of(config.llm)].rows(config.llm, "llm")
    return [dataclasses.replace(row, theirs=f"lang_encoder.{row.theirs}") for row in found]


def trained_rows(config: LVLMConfig) -> list[Row]:
    """The key table of what is trained but the words: ``perceiver.*`` and the gated blocks.

    A block is numbered by the layer that brings it, as the authors number them.
    """
    plain = config.connector == dataclasses.replace(RESAMPLER, **_sizes(config.connector))
    between = _resampler_rows if plain else connector_keys.rows
    return [*between(config.connector, "connector", "perceiver"), *_block_rows(config)]


def _sizes(connector: Any) -> dict[str, Any]:
    """What the authors' names leave free in a resampler."""
    names = ("latents", "depth", "heads", "head_dim", "mlp_dim", "activation", "norm_eps")
    return {name: getattr(connector, name) for name in names if hasattr(connector, name)}


_HALVES = joined(2, TRANSPOSE)


def _attention(ours: str, theirs: str) -> list[Row]:
    """Queries, keys and values in one matrix, output."""
    kv = Row((f"{ours}/k/kernel", f"{ours}/v/kernel"), f"{theirs}.to_kv.weight", _HALVES)
    return [*dense(f"{ours}/q", f"{theirs}.to_q"), kv, *dense(f"{ours}/o", f"{theirs}.to_out")]


def _resampler_rows(config: PerceiverConfig, ours: str, theirs: str) -> list[Row]:
    a = f"{ours}/resampler"
    out = [Row(f"{a}/latents", f"{theirs}.latents"), *layer_norm(f"{a}/norm", f"{theirs}.norm")]
    for i in range(config.depth):
        x, y = f"{a}/layers/{i}", f"{theirs}.layers.{i}"
        out += layer_norm(f"{x}/norm_context", f"{y}.0.norm_media")
        out += layer_norm(f"{x}/norm_latents", f"{y}.0.norm_latents")
        out += _attention(f"{x}/attn", f"{y}.0")
        out += layer_norm(f"{x}/norm_mlp", f"{y}.1.0")
        out += dense(f"{x}/mlp/up", f"{y}.1.1") + dense(f"{x}/mlp/down", f"{y}.1.3")
    return out


def _block_rows(config: LVLMConfig) -> list[Row]:
    """The gated blocks; what the authors' have not (norms of queries and keys, biases, SwiGLU) has names alike."""
    fusion, out = config.fusion, []
    for number, spot in enumerate(fusion.spots(config.llm.depth)):
        a, b = f"fusion/layers/{number}", f"lang_encoder.gated_cross_attn_layers.{spot - fusion.behind}"
        gate = keymap.SCALAR if fusion.gate == "scalar" else keymap.SAME
        out += [Row(f"{a}/attn_gate", f"{b}.attn_gate", gate), Row(f"{a}/mlp_gate", f"{b}.ff_gate", gate)]
        out += _norm(fusion.norm, f"{a}/norm1", f"{b}.attn.norm") + _norm(fusion.norm, f"{a}/norm2", f"{b}.ff.0")
        out += _attention(f"{a}/attn", f"{b}.attn")
        for x in ("q", "k") if fusion.qk_norm else ():
            out += _norm(fusion.qk_norm, f"{a}/attn/{x}_norm", f"{b}.attn.{x}_norm")
        feed = (("gate", "ff.gate"), ("up", "ff.1"), ("down", "ff.3"))[0 if fusion.gated else 1 :]
        out += [row for x, y in feed for row in dense(f"{a}/mlp/{x}", f"{b}.{y}", fusion.bias)]
        for x in ("q", "k", "v", "o") if fusion.bias else ():
            out.append(Row(f"{a}/attn/{x}/bias", f"{b}.attn.{x}_bias"))
    return out


def _norm(kind: str, ours: str, theirs: str) -> list[Row]:
    """A layer norm, or an RMS norm, which has no bias."""
    return layer_norm(ours, theirs) if kind == "layer" else [Row(f"{ours}/scale", f"{theirs}.weight")]


# ---------------------------------------------------------------------------------------------------------------------
# config.json


def fits(config: LVLMConfig) -> bool:
    """Whether a model is of this kind: any with gated cross-attention that is no Idefics."""
    return config.fusion is not None and not idefics.fits(config)


def from_hf(config: Mapping[str, Any]) -> tuple[LVLMConfig, int]:
    """(model, image token id) from a config.json that `to_hf` wrote.

    Raises:
      ValueError: a part or value that cannot be run, naming the field and what is supported.
    """
    one_of("model_type", config.get("model_type"), [MODEL_TYPE])
    for part in ("vision_config", "text_config", "fusion", "connector"):
        if not config.get(part):
            raise ValueError(f"config.json: {part} is missing; a model with cross-attention names it")
    tower = vision.FAMILIES[
        one_of("vision_config.model_type", config["vision_config"].get("model_type"), vision.FAMILIES)
    ]
    host = llm.FAMILIES[one_of("text_config.model_type", config["text_config"].get("model_type"), llm.FAMILIES)]
    read = {name: value for name, value in config["vision_read"].items() if name in _READ}
    whole = LVLMConfig(
        vision=dataclasses.replace(tower.from_hf(config["vision_config"]), **read),
        connector=connector_keys.from_dict(config["connector"]),
        llm=host.from_hf(config["text_config"]),
        attention=one_of("attention", config.get("attention", "causal"), ["causal", "prefix"]),
        fusion=build(CrossAttentionConfig, config["fusion"], "config.json: fusion"),
        words=config.get("words", 0),
    )
    return whole, int(config["image_token_id"])


_READ = ("feature_layer", "class_feature", "feature_norm", "max_patches")
"""What is read of a tower: fields of `ViTConfig` (an NFNet has the first) that its own config.json does not name."""


def to_hf(config: LVLMConfig, image_token_id: int, image: ImageSpec | None = None) -> dict[str, Any]:
    """A config.json of our own, which `from_hf` reads back. It says nothing of `image`."""
    return {
        "model_type": MODEL_TYPE,
        "vision_config": vision.FAMILIES[vision.family_of(config.vision)].to_hf(config.vision),
        "vision_read": {name: value for name, value in to_dict(config.vision).items() if name in _READ},
        "text_config": llm.FAMILIES[llm.family_of(config.llm)].to_hf(config.llm),
        "connector": connector_keys.to_dict(config.connector),
        "fusion": to_dict(config.fusion),
        "attention": config.attention,
        "words": config.words,
        "image_token_id": image_token_id,
    }


def processor(config: LVLMConfig) -> dict[str, Any]:
    """What the torch library's processor must know of the model: it has none for this kind."""
    return {}
