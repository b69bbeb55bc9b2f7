"""BLIP-2: EVA's giant to its final norm, a Q-Former, one dense layer, and OPT or Flan-T5, to which pictures are queries
in front of the text.

Source: BLIP-2 (arXiv 2301.12597). Keys are those of the torch library's `Blip2ForConditionalGeneration`, the same in
memory and in every file, but for tied heads, of which files hold one.
"""

import dataclasses
from collections.abc import Mapping
from types import ModuleType
from typing import Any

from lvlm_jax import llm
from lvlm_jax.connectors import QFormerConfig, qformer
from lvlm_jax.keymap import Row, dense, fields, layer_norm, one_of
from lvlm_jax.llm import DecoderConfig, EncoderDecoderConfig
from lvlm_jax.models.lvlm import LVLMConfig
from lvlm_jax.processing.image import ImageSpec
from lvlm_jax.vision import blip2_vit
from lvlm_jax.vision.vit import ViTConfig
from lvlm_jax.zoo.spec import CLIP_MEAN, CLIP_STD, Spec

MODEL_TYPE, ARCHITECTURE = "blip-2", "Blip2ForConditionalGeneration"


@dataclasses.dataclass(frozen=True)
class Layout:
    """The keys that a layout is known by, and the whole key of the output head."""

    known: str
    head: str


HEAD = "language_model.lm_head.weight"

LAYOUTS = {"blip2": Layout("qformer.layernorm.", HEAD)}

UNUSED = (
    # Both stacks of a T5 read the one table; old files hold it three times.
    r"language_model\.(encoder|decoder)\.embed_tokens\.weight",
    # A table that T5's first release saved and never read.
    r"language_model\.decoder\.block\.0\.layer\.1\.EncDecAttention\.relative_attention_bias\.weight",
    r"qformer\.embeddings\.position_ids",
)
"""Patterns of keys that hold no weights of their own."""

# ---------------------------------------------------------------------------------------------------------------------
# Systems


def squashed(side: int) -> ImageSpec:
    """How its pictures are prepared: squashed to a square, whatever their shape."""
    return ImageSpec(size=side, patch=14, mean=CLIP_MEAN, std=CLIP_STD, resample="bicubic", fit="squash")


def _opt(name: str, host: str, source: str, side: int = 224) -> Spec:
    # The hub's files: OPT's 50265 words, <image>, padded to a multiple of 64.
    config = LVLMConfig(
        vision=blip2_vit.PRESETS[f"blip2_vit_g14_{side}"],
        connector=qformer.PRESETS["qformer_blip2"],
        llm=dataclasses.replace(llm.opt.PRESETS[host], vocab=50304),
    )
    return Spec(name=name, config=config, image=squashed(side), template="blip2", source=source, image_token_id=50265)


def flan_t5(name: str, host: str, connector: str, source: str) -> Spec:
    """A BLIP-2, or an InstructBLIP by its connector, on Flan-T5, which they run with the exact GELU.

    32100 words, <image>, and rows that T5 has always had.
    """
    config = LVLMConfig(
        vision=blip2_vit.PRESETS["blip2_vit_g14_224"],
        connector=qformer.PRESETS[connector],
        llm=dataclasses.replace(llm.t5.PRESETS[host], activation="gelu"),
        attention="prefix",
    )
    image = squashed(224)
    return Spec(name=name, config=config, image=image, template="blip2_t5", source=source, image_token_id=32100)


SYSTEMS: dict[str, Spec] = {
    spec.name: spec
    for spec in (
        _opt("blip2_opt_2_7b", "opt_2.7b", "Salesforce/blip2-opt-2.7b"),
        _opt("blip2_opt_6_7b", "opt_6.7b", "Salesforce/blip2-opt-6.7b"),
        _opt("blip2_opt_2_7b_coco", "opt_2.7b", "Salesforce/blip2-opt-2.7b-coco", 364),
        flan_t5("blip2_flan_t5_xl", "flan_t5_xl", "qformer_blip2", "Salesforce/blip2-flan-t5-xl"),
        flan_t5("blip2_flan_t5_xxl", "flan_t5_xxl", "qformer_blip2", "Salesforce/blip2-flan-t5-xxl"),
    )
}
"""Systems by name."""

# ---------------------------------------------------------------------------------------------------------------------
# Keys

HOSTS: dict[str, ModuleType] = {"opt": llm.opt, "llama": llm.llama, "t5": llm.t5}
"""The language models on which its public class, and InstructBLIP's, have been released."""

PROJECTIONS = {"opt": "opt_proj", "llama": "llm_proj", "t5": "t5_proj"}
"""What the authors call the dense layer before each of them."""


def host_of(config: DecoderConfig | EncoderDecoderConfig) -> ModuleType:
    """The family of a language model."""
    return HOSTS[llm.family_of(config)]


def whole_rows(config: LVLMConfig, layout: str) -> list[Row]:
    """The key table of a whole model.

    Args:
      layout: of the Q-Former, a key of `connectors.qformer.LAYOUTS`.
    """
    host = host_of(config.llm)
    return [
        *blip2_vit.rows(config.vision, "vision", "vision_model."),
        *qformer.rows(config.connector, "connector/qformer", "", layout),
        *dense("connector/linear_1", "language_projection", bias=True),
        *host.rows(config.llm, "llm", f"language_model.{host.BASE}", HEAD),
    ]


def rows(config: LVLMConfig, layout: str = "blip2") -> list[Row]:
    """The key table of a whole BLIP-2."""
    if layout not in LAYOUTS:
        raise ValueError(f"a BLIP-2 has no layout {layout!r}; it has one, {', '.join(LAYOUTS)}")
    return whole_rows(config, "blip_2")


def lavis_rows(config: LVLMConfig) -> list[Row]:
    """The key table of the authors' checkpoints, which hold what is trained and nothing else (InstructBLIP's too).

    Q-Former with its queries, projection, and of the vision tower its last norm.
    """
    return [
        *qformer.rows(config.connector, "connector/qformer", "", "lavis"),
        *dense("connector/linear_1", PROJECTIONS[llm.family_of(config.llm)], bias=True),
        *layer_norm("vision/post_norm", "ln_vision"),
    ]


def authors_rows(config: LVLMConfig) -> list[Row]:
    """`lavis_rows`, and those of the tower, which the authors read out of EVA's own file."""
    tower = blip2_vit.authors_rows(config.vision)  # with the last norm, too
    trained = lavis_rows(config)
    known = {row.leaves for row in trained}
    return [*trained, *(row for row in tower if row.leaves not in known)]


def authors_config(
    vision: ViTConfig, connector: QFormerConfig, host: DecoderConfig | EncoderDecoderConfig
) -> LVLMConfig:
    """The whole model that the authors build of these parts.

    They run Flan-T5 with the exact GELU, whatever its config.json says (models/blip2_models/blip2_t5.py).

    Raises:
      ValueError: a language model that they have none on.
    """
    two_stacks = isinstance(host, EncoderDecoderConfig)
    one_of("model_type of the language model", llm.family_of(host), HOSTS)
    plain = connector.vocab is None and llm.family_of(host) == "llama"
    return LVLMConfig(
        vision=vision,
        connector=connector,
        llm=dataclasses.replace(host, activation="gelu") if two_stacks else host,
        attention="prefix" if two_stacks else "causal",
        public=MODEL_TYPE if plain else None,
    )


# ---------------------------------------------------------------------------------------------------------------------
# config.json

DEFAULTS = {"num_query_tokens": 32, "image_token_index": None, "text_config": {}, "vision_config": {}}
DEFAULTS |= {"qformer_config": {}}
"""What the public class assumes for fields that a config leaves out."""


def holds(config: LVLMConfig, reads: bool) -> bool:
    """Whether a model is a BLIP-2, with a Q-Former that `reads` an instruction or with one that does not."""
    connector = config.connector
    return (
        isinstance(connector, QFormerConfig)
        and (connector.vocab is not None, connector.extra) == (reads, 0)
        and not (config.newline or config.expert or config.words or config.fusion)
        and config.attention == ("prefix" if config.two_stacks else "causal")
        and config.llm.final_softcap is None
        and isinstance(config.vision, ViTConfig)
        and blip2_vit.fits(config.vision)
        and {name: getattr(config.vision, name) for name in blip2_vit.READ} == blip2_vit.READ
        and llm.family_of(config.llm) in HOSTS
    )


def fits(config: LVLMConfig) -> bool:
    """Whether the torch library's class can hold this model; on a LLaMA it is MiniGPT-4, unless it says otherwise."""
    if config.public not in (None, MODEL_TYPE) or not holds(config, reads=False):
        return False
    return config.public == MODEL_TYPE or llm.family_of(config.llm) != "llama"


def read(config: Mapping[str, Any], qformer_type: str) -> tuple[LVLMConfig, int]:
    """(model, image token id) from a config.json whose Q-Former is of this ``model_type``.

    Files from before the torch library's 4.46 name no word for a picture, which stood in front of the text there as it
    does now. Any word will do, since the picture is laid over it: the last, which no tokenizer of theirs has.
    """
    f = fields(config, DEFAULTS | {"image_token_index": config.get("image_token_id")})
    text = f["text_config"]
    kind = one_of("text_config.model_type", text.get("model_type", "opt"), HOSTS)
    host = HOSTS[kind].from_hf(text)
    whole = LVLMConfig(
        vision=blip2_vit.from_hf(f["vision_config"]),
        connector=qformer.from_hf({"model_type": qformer_type, **f["qformer_config"]}, f["num_query_tokens"]),
        llm=host,
        attention="prefix" if isinstance(host, EncoderDecoderConfig) else "causal",
    )
    word = f["image_token_index"]
    return whole, host.vocab - 1 if word is None else int(word)


def from_hf(config: Mapping[str, Any]) -> tuple[LVLMConfig, int]:
    """(model, image token id) from a config.json of the torch library.

    Raises:
      ValueError: a part or value that cannot be run, naming the field and what is supported.
    """
    one_of("model_type", config.get("model_type"), [MODEL_TYPE])
    one_of("use_qformer_text_input", (config.get("qformer_config") or {}).get("use_qformer_text_input", False), [False])
    whole, word = read(config, "blip_2_qformer")
    return (dataclasses.replace(whole, public=MODEL_TYPE) if llm.family_of(whole.llm) == "llama" else whole), word


def write(config: LVLMConfig, image_token_id: int, qformer_type: str) -> dict[str, Any]:
    """The parts of a config.json that `read` reads back."""
    return {
        "vision_config": blip2_vit.to_hf(config.vision),
        "qformer_config": qformer.to_hf(config.connector, config.vision.width, qformer_type),
        "text_config": host_of(config.llm).to_hf(config.llm),
        "num_query_tokens": config.connector.queries,
        "image_token_index": image_token_id,
        "use_decoder_only_language_model": not config.two_stacks,
    }


def to_hf(config: LVLMConfig, image_token_id: int, image: ImageSpec | None = None) -> dict[str, Any]:
    """The config.json that the torch library reads; `from_hf` reads it back. It says nothing of `image`."""
    names = {"model_type": MODEL_TYPE, "architectures": [ARCHITECTURE]}
    return {**names, **write(config, image_token_id, "blip_2_qformer")}


def processor(config: LVLMConfig) -> dict[str, Any]:
    """What the torch library's processor must know of the model."""
    return {
        "processor_class": "Blip2Processor",
        "image_processor_type": "BlipImageProcessor",
        "num_query_tokens": config.connector.queries,
    }


__all__ = [
    "ARCHITECTURE",
    "LAYOUTS",
    "MODEL_TYPE",
    "SYSTEMS",
    "fits",
    "from_hf",
    "processor",
    "rows",
    "to_hf",
]
