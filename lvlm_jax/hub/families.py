"""What each public ``model_type`` is here: its config, key table in every layout, and the shapes of its parameters.

Several ways of writing one model's keys stand in front of one table: a layout is where the parts stand, found by
probing the keys. A LLaVA's five layouts are the zoo's; those of towers and decoders alone are here.
"""

import dataclasses
import functools
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax.numpy as jnp

from lvlm_jax import llm, vision, zoo
from lvlm_jax.checkpoint import CheckpointError
from lvlm_jax.keymap import Row
from lvlm_jax.llm.decoder import Decoder, DecoderConfig, dummy_inputs
from lvlm_jax.llm.encoder_decoder import EncoderDecoder, EncoderDecoderConfig
from lvlm_jax.models.contrastive import DualEncoder, DualEncoderConfig
from lvlm_jax.models.lvlm import LVLM, LVLMConfig, dummy_batch
from lvlm_jax.models.senses import NamedSense, Pair, dummy_rows
from lvlm_jax.models.unified import Unified, UnifiedConfig
from lvlm_jax.nn.linear import abstract
from lvlm_jax.processing.schema import Batch
from lvlm_jax.shapes import Params
from lvlm_jax.vision import NativeViTConfig, NFNetConfig, VisionConfig, nfnet, timm, vit_jax, vqgan
from lvlm_jax.vision.text_tower import TextTower, TextTowerConfig
from lvlm_jax.vision.vit import ViTConfig
from lvlm_jax.vision.vq import VQ, VQConfig
from lvlm_jax.zoo import big_vision, big_vision_gemma, chameleon, dual, llava

Config = (
    LVLMConfig
    | NamedSense
    | UnifiedConfig
    | DualEncoderConfig
    | ViTConfig
    | NFNetConfig
    | NativeViTConfig
    | VQConfig
    | TextTowerConfig
    | DecoderConfig
    | EncoderDecoderConfig
)

UNUSED = (*vision.clip.UNUSED, *llm.llama.UNUSED)
"""Patterns of keys that hold no weights: tables that old versions saved beside them."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Kind:
    """A kind of model.

    rows(config, layout) is its key table, layouts the names of the layouts with the prefix, or the prefixes, that each
    is known by (the first that occurs wins), shapes(config, scan) the shapes and axes of its parameters, unused the
    patterns of keys that a folder may hold beside its own, default(config) the layout that every version of the torch
    library loads.
    """

    rows: Callable[[Any, str], list[Row]]
    layouts: Mapping[str, str | tuple[str, ...]]
    shapes: Callable[[Any, bool], tuple[Params, Params]]
    unused: tuple[str, ...] = UNUSED
    default: Callable[[Any], str] = lambda config: "hf-4"

    def layout_of(self, keys: Iterable[str], source: Any) -> str:
        """The layout of a folder's keys.

        Raises:
          CheckpointError: none of them, with the first keys.
        """
        keys = list(keys)
        known = {name: prefix for name, prefix in self.layouts.items() if prefix}
        for name, prefix in known.items():
            if any(key.startswith(prefix) for key in keys):
                return name
        if self is KINDS["lvlm"]:
            try:
                return llava.layout_of(keys)
            except ValueError as error:
                raise CheckpointError(f"{source}: {error}") from error
        each = {name: (prefix,) if isinstance(prefix, str) else prefix for name, prefix in known.items()}
        prefixes = ", ".join(f"{name}: {'... or '.join(prefix)}..." for name, prefix in each.items())
        raise CheckpointError(
            f"{source}: its keys are in no known layout ({prefixes}); "
            f"the first are {', '.join(sorted(keys)[:6])}. Is config.json that of another model?"
        )

    def is_unused(self, key: str) -> bool:
        """Whether nobody is meant to read this key."""
        return any(re.fullmatch(pattern, key) for pattern in self.unused)


# ---------------------------------------------------------------------------------------------------------------------
# Key tables

_VISION_AT = {"hf-4": "vision_model.", "hf-5": "", "hf-vit": "", "hf-vit-classifier": "vit."}
_VISION_ROWS = {"timm": timm.rows, "nfnet": nfnet.rows, "vit_jax": vit_jax.rows}
_TEXT_AT = {"hf-4": "text_model.", "hf-5": ""}
_DECODERS = llm.FAMILIES.values()
_DECODER_LAYOUTS = {
    # A family whose whole model has no prefix either has no head of its own; its keys are those of a bare one.
    "hf": tuple(dict.fromkeys(family.BASE + family.LAYERS for family in _DECODERS if family.BASE)),
    "bare": tuple(dict.fromkeys(family.LAYERS for family in _DECODERS)),
}


def _lvlm_rows(config: LVLMConfig, layout: str) -> list[Row]:
    if layout in big_vision_gemma.LAYOUTS:
        return big_vision_gemma.rows(config)
    return zoo.family_of(config).rows(config, layout)


def _sense_rows(config: NamedSense, layout: str) -> list[Row]:
    return zoo.senses.pair_rows(config.sense)


def _vision_rows(config: VisionConfig, layout: str) -> list[Row]:
    if layout in big_vision.LAYOUTS:
        return big_vision.vision_rows(config, "", "img", scan=layout == "big_vision-scan")
    if layout in _VISION_ROWS:
        return _VISION_ROWS[layout](config, "", "")
    name = vision.family_of(config)
    family = vision.FAMILIES[name]
    if layout not in family.LAYOUTS:
        raise ValueError(f"nobody writes a {name} in layout {layout!r}; its layouts are {', '.join(family.LAYOUTS)}")
    return family.rows(config, "", _VISION_AT[layout])


def _vision_default(config: VisionConfig) -> str:
    name = vision.family_of(config)
    layouts = vision.FAMILIES[name].LAYOUTS
    if not layouts:
        raise ValueError(f"nobody writes a {name} alone, so there is no layout for it; export the whole model")
    return layouts[-1 if config.classes else 0]


def _vq_rows(config: VQConfig, layout: str) -> list[Row]:
    return vqgan.rows(config, "", "", vqgan.fits(config) or "chameleon_vqgan")


def _unified_rows(config: UnifiedConfig, layout: str) -> list[Row]:
    return chameleon.rows(config)


def _text_rows(config: TextTowerConfig, layout: str) -> list[Row]:
    return vision.TEXT_FAMILIES[vision.text_family_of(config)].text_rows(config, "", _TEXT_AT[layout])


def _dual_rows(config: DualEncoderConfig, layout: str) -> list[Row]:
    return dual.rows(config) if layout == "hf" else big_vision.rows(config, layout)


def _decoder_rows(config: DecoderConfig, layout: str) -> list[Row]:
    family = llm.FAMILIES[llm.family_of(config)]
    rows = family.rows(config, "", "" if layout == "bare" else family.BASE)
    # The bare model ends at its final norm: it gives hidden states, no logits.
    return [row for row in rows if row.ours != "head/kernel"] if layout == "bare" else rows


def _encoder_decoder_rows(config: EncoderDecoderConfig, layout: str) -> list[Row]:
    return llm.ENCODER_DECODERS[llm.family_of(config)].rows(config, "")


# ---------------------------------------------------------------------------------------------------------------------
# Shapes (tracing takes a second or more; nobody changes these trees in place)


def _picture(config: VisionConfig) -> tuple[Any, Any, Any]:
    p = config.patches
    return jnp.zeros((1, p, config.values)), jnp.zeros((1, p, 2), jnp.int32), jnp.ones((1, p), jnp.int32)


@functools.lru_cache(maxsize=8)
def _lvlm_shapes(config: LVLMConfig, scan: bool) -> tuple[Params, Params]:
    return abstract(LVLM(config, scan=scan), dummy_batch(config))


@functools.lru_cache(maxsize=8)
def _sense_shapes(config: NamedSense, scan: bool) -> tuple[Params, Params]:
    rows = dummy_rows(config.sense, 1, 1)
    pair = Pair(config.sense, config.width, scan=scan)
    return abstract(pair, rows.patches, rows.patch_positions, rows.patch_segments)


@functools.lru_cache(maxsize=8)
def _decoder_shapes(config: DecoderConfig, scan: bool) -> tuple[Params, Params]:
    return abstract(Decoder(config, scan=scan), *dummy_inputs(config))


@functools.lru_cache(maxsize=8)
def _encoder_decoder_shapes(config: EncoderDecoderConfig, scan: bool) -> tuple[Params, Params]:
    text = jnp.zeros((1, 2), jnp.int32)
    return abstract(EncoderDecoder(config, scan=scan), jnp.zeros((1, 2, config.width)), text, text, text)


@functools.lru_cache(maxsize=8)
def _dual_shapes(config: DualEncoderConfig, scan: bool) -> tuple[Params, Params]:
    patches, positions, segments = (x[None] for x in _picture(config.vision))
    text = jnp.zeros((1, config.text.context), jnp.int32)
    batch = Batch(
        tokens=text,
        weights=text.astype(jnp.float32),
        positions=text,
        segments=text + 1,
        image_index=text - 1,
        patches=patches,
        patch_positions=positions,
        patch_segments=segments,
    )
    return abstract(DualEncoder(config, scan=scan), batch)


@functools.lru_cache(maxsize=8)
def _vision_shapes(config: VisionConfig, scan: bool) -> tuple[Params, Params]:
    return abstract(config.build(jnp.float32, scan), *_picture(config))


@functools.lru_cache(maxsize=8)
def _vq_shapes(config: VQConfig, scan: bool) -> tuple[Params, Params]:
    return abstract(VQ(config), jnp.zeros((1, config.image_size, config.image_size, 3)))


@functools.lru_cache(maxsize=8)
def _unified_shapes(config: UnifiedConfig, scan: bool) -> tuple[Params, Params]:
    return abstract(Unified(config, scan=scan), dummy_batch(config))


@functools.lru_cache(maxsize=8)
def _text_shapes(config: TextTowerConfig, scan: bool) -> tuple[Params, Params]:
    return abstract(TextTower(config, scan=scan), jnp.zeros((1, 2), jnp.int32))


KINDS: dict[str, Kind] = {
    "lvlm": Kind(
        rows=_lvlm_rows,
        layouts={
            **dict.fromkeys(zoo.LAYOUTS, ""),
            **big_vision_gemma.LAYOUTS,
            **zoo.idefics.LAYOUTS,
            **zoo.open_flamingo.LAYOUTS,
            **zoo.senses.LAYOUTS,
            **zoo.videochat2.LAYOUTS,
            **zoo.videochat.LAYOUTS,
            **zoo.minigpt4.LAYOUTS,
            **zoo.cogvlm.LAYOUTS,
            **zoo.qwen2_vl.LAYOUTS,
            **{name: at.known for family in (zoo.blip2, zoo.instructblip) for name, at in family.LAYOUTS.items()},
        },
        shapes=_lvlm_shapes,
        unused=(*UNUSED, *zoo.blip2.UNUSED),
        default=lambda config: next(iter(zoo.family_of(config).LAYOUTS)),
    ),
    "sense": Kind(rows=_sense_rows, layouts={"hf": "sense."}, shapes=_sense_shapes),
    "dual": Kind(rows=_dual_rows, layouts={"hf": "vision_model.", **big_vision.LAYOUTS}, shapes=_dual_shapes),
    "vision": Kind(
        rows=_vision_rows,
        # ViT and DINOv2 number their layers under "layer", with a prefix before it where a classifier stands beside.
        layouts={
            "hf-4": "vision_model.",
            "hf-5": "encoder.layers.",
            "hf-vit": "encoder.layer.",
            "hf-vit-classifier": "vit.encoder.layer.",
            **big_vision.LAYOUTS,
            "timm": "blocks.",
            "nfnet": "stem.conv1.",
            "vit_jax": "Transformer/encoderblock_0/",
        },
        shapes=_vision_shapes,
        default=_vision_default,
        # A tower is also read out of a dual encoder's folder or file.
        unused=(*UNUSED, r"text_model\..*", r"(visual|text)_projection\.weight", r"logit_(scale|bias)", r"txt/.*|[tb]"),
    ),
    "text": Kind(
        rows=_text_rows,
        layouts={"hf-4": "text_model.", "hf-5": "encoder.layers."},
        shapes=_text_shapes,
        unused=(*UNUSED, r"vision_model\..*", r"(visual|text)_projection\.weight", r"logit_(scale|bias)"),
    ),
    "decoder": Kind(
        rows=_decoder_rows,
        layouts=_DECODER_LAYOUTS,
        shapes=_decoder_shapes,
        unused=(*UNUSED, *dict.fromkeys(pattern for family in _DECODERS for pattern in family.UNUSED)),
    ),
    "encoder_decoder": Kind(
        rows=_encoder_decoder_rows,
        layouts={"hf": "encoder.block."},
        shapes=_encoder_decoder_shapes,
        unused=(*UNUSED, *(pattern for family in llm.ENCODER_DECODERS.values() for pattern in family.UNUSED)),
    ),
    "vq": Kind(rows=_vq_rows, layouts={"hf": "encoder.down."}, shapes=_vq_shapes),
    "unified": Kind(rows=_unified_rows, layouts={"hf": "model.vqmodel."}, shapes=_unified_shapes),
}
"""Every kind of model there is."""


def without_head(shapes: Params, rows: Sequence[Row]) -> Params:
    """The tree less an output head that no row fills (a bare decoder's)."""
    filled = {path for row in rows for path in row.leaves}
    bare = "kernel" in shapes.get("head", {}) and "head/kernel" not in filled
    return {name: tree for name, tree in shapes.items() if name != "head"} if bare else shapes
