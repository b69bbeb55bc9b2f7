"""Both sides of `verify` for models whose pictures are tokens among the words (Chameleon)."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lvlm_jax.models.unified import Unified, UnifiedConfig
from lvlm_jax.processing.schema import TEXT, Batch
from lvlm_jax.shapes import Int, Params


def row(config: UnifiedConfig, words: list[int]) -> tuple[Int[np.ndarray, "1 T"], Int[np.ndarray, "1 T"]]:
    """(tokens, image_index) of a text with one picture behind its first two words.

    A word that would be one of a picture's is left out.
    """
    special = {config.begin_id, config.end_id, config.image_id, *config.code_ids}
    words, count = [word for word in words if word not in special], config.visual_tokens
    shown = [config.begin_id, *[config.image_id] * count, config.end_id]
    index = np.full(len(words) + len(shown), TEXT, np.int32)
    index[3 : 3 + count] = np.arange(count)
    return np.asarray([[*words[:2], *shown, *words[2:]]], np.int32), index[None]


def ours(config: UnifiedConfig, params: Params, inputs: dict[str, jax.Array]) -> dict[str, Any]:
    """The stages here: the picture's tokens, hidden states, and scores of words (those of pictures are forbidden)."""
    model, variables, tokens = Unified(config), {"params": params}, inputs["tokens"]
    batch = Batch(
        tokens=tokens,
        weights=jnp.zeros(tokens.shape),
        positions=jnp.arange(tokens.shape[1])[None],
        segments=jnp.ones(tokens.shape, jnp.int32),
        image_index=inputs["image_index"],
        patches=inputs["patches"][None],
        patch_positions=inputs["positions"][None],
        patch_segments=inputs["segments"][None],
    )
    hidden, _ = model.apply(variables, batch)
    read = model.apply(variables, batch.patches, method="read")
    scores = model.apply(variables, hidden, method="logits")[..., _words(config)]
    return {"picture tokens": read, "hidden states": hidden, "logits": scores}


def theirs(config: UnifiedConfig, model: Any, tokens: Any, pixels: Any) -> dict[str, Any]:
    """The same in the torch library."""
    import torch

    with torch.no_grad():
        read = model.get_image_tokens(pixels).reshape(1, -1)
        out = model(
            input_ids=tokens,
            pixel_values=pixels,
            attention_mask=torch.ones_like(tokens),
            output_hidden_states=True,
        )
    scores = out.logits[..., torch.from_numpy(_words(config))]
    return {"picture tokens": read, "hidden states": out.hidden_states[-1], "logits": scores}


def _words(config: UnifiedConfig) -> Int[np.ndarray, "V"]:
    return np.setdiff1d(np.arange(config.llm.vocab), config.code_ids)
