"""The stages of a checkpoint as we compute them, for `hub.verify`: a function for each kind of model."""

from typing import Any

import jax
import jax.numpy as jnp

from lvlm_jax.hub import convert, verify_native, verify_queries, verify_unified
from lvlm_jax.llm.decoder import Decoder
from lvlm_jax.llm.encoder_decoder import EncoderDecoder
from lvlm_jax.models.contrastive import DualEncoder
from lvlm_jax.models.lvlm import LVLM
from lvlm_jax.nn import ranges
from lvlm_jax.processing.schema import Batch
from lvlm_jax.vision.text_tower import TextTower


def _lvlm(loaded: convert.Loaded, inputs: dict[str, jax.Array]) -> dict[str, Any]:
    model, variables = LVLM(loaded.config), {"params": loaded.params}
    tokens, picture = inputs["tokens"], [inputs[name] for name in ("patches", "positions", "segments")]
    said = [inputs["instruction"][None]] if "instruction" in inputs else []
    batch = Batch(
        tokens=tokens,
        weights=inputs["weights"],
        positions=jnp.arange(tokens.shape[1])[None],
        segments=jnp.ones(tokens.shape, jnp.int32),
        image_index=inputs["image_index"],
        patches=picture[0][None],
        patch_positions=picture[1][None],
        patch_segments=picture[2][None],
        blend_index=inputs.get("blend_index"),
        blend_weight=inputs.get("blend_weight"),
        axes=inputs.get("axes"),
        instruction=said[0] if said else None,
    )
    hidden, _ = model.apply(variables, batch)
    if loaded.config.two_stacks:  # position t predicts token t + 1
        hidden = hidden[:, -verify_queries.WRITTEN - 1 : -1]
    parts = {
        "vision features": model.apply(variables, *picture, method=lambda m, *x: m.vision.features(*x)),
        "connector": model.apply(variables, *(x[None] for x in picture), *said, method="embed_images"),
        "hidden states": hidden,
        "logits": model.apply(variables, hidden, method="logits"),
    }
    return verify_native.ordered(parts, inputs["taken"], loaded.config.vision.width) if "taken" in inputs else parts


def _decoder(loaded: convert.Loaded, inputs: dict[str, jax.Array]) -> dict[str, Any]:
    model, variables, tokens = Decoder(loaded.config), {"params": loaded.params}, inputs["tokens"]
    x = model.apply(variables, tokens, method="embed_tokens")
    hidden, _ = model.apply(variables, x, jnp.arange(tokens.shape[1])[None], ranges.causal(*tokens.shape))
    if loaded.layout == "bare":
        return {"hidden states": hidden}
    return {"hidden states": hidden, "logits": model.apply(variables, hidden, method="logits")}


def _encoder_decoder(loaded: convert.Loaded, inputs: dict[str, jax.Array]) -> dict[str, Any]:
    model, variables = EncoderDecoder(loaded.config), {"params": loaded.params}
    tokens, written = inputs["tokens"], inputs["written"]
    x, ones = model.apply(variables, tokens, method="embed_tokens"), jnp.ones_like(tokens)
    hidden = model.apply(variables, x, ones, written, ones)
    read = model.apply(variables, x, ones, method="encode")
    return {"encoder": read, "logits": model.apply(variables, hidden, method="logits")}


def _dual(loaded: convert.Loaded, inputs: dict[str, jax.Array]) -> dict[str, Any]:
    model, variables = DualEncoder(loaded.config), {"params": loaded.params}
    picture = [inputs[name] for name in ("patches", "positions", "segments")]
    image = model.apply(variables, *picture, method="embed_images")
    text = model.apply(variables, inputs["tokens"], method="embed_text")
    scale, bias = loaded.params["logit_scale"], loaded.params.get("logit_bias", 0.0)
    return {"picture vector": image, "text vector": text, "logits": jnp.exp(scale) * image @ text.T + bias}


def _vision(loaded: convert.Loaded, inputs: dict[str, jax.Array]) -> dict[str, Any]:
    picture = [inputs[name] for name in ("patches", "positions", "segments")]
    tower, variables = loaded.config.build(jnp.float32), {"params": loaded.params}
    hidden, pooled = tower.apply(variables, *picture)
    parts = {"hidden states": hidden, "pooled vector": pooled}
    return parts | ({"logits": tower.apply(variables, pooled, method="logits")} if loaded.config.classes else {})


def _text(loaded: convert.Loaded, inputs: dict[str, jax.Array]) -> dict[str, Any]:
    hidden, pooled = TextTower(loaded.config).apply({"params": loaded.params}, inputs["tokens"])
    return {"hidden states": hidden, "pooled vector": pooled}


OURS = {
    "lvlm": _lvlm,
    "unified": lambda loaded, inputs: verify_unified.ours(loaded.config, loaded.params, inputs),
    "decoder": _decoder,
    "encoder_decoder": _encoder_decoder,
    "dual": _dual,
    "vision": _vision,
    "text": _text,
}
"""Kind of model -> (checkpoint, inputs) -> its stages by name."""
