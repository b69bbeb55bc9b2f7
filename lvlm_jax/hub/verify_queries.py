"""The torch library's side of `verify` for models whose pictures are queries: BLIP-2 and InstructBLIP."""

from pathlib import Path
from typing import Any

import numpy as np

from lvlm_jax.connectors import QFormerConfig
from lvlm_jax.hub import beside
from lvlm_jax.shapes import Int

WRITTEN = 5
"""So many words of the prompt's end an encoder-decoder writes, and the others it reads."""


def instruction(connector: QFormerConfig, folder: Path, prompt: str) -> Int[np.ndarray, "S"]:
    """What the Q-Former reads: the prompt, or made ids where the folder has no tokenizer for it."""
    try:
        return beside.instruction(folder, connector).ids(prompt)
    except FileNotFoundError:
        return (1 + 5 * np.arange(7) % (connector.vocab - 1)).astype(np.int32)


def reference(model: Any, tokens: Any, pixels: Any, instruction: Any = None) -> dict[str, Any]:
    """Its stages on one row with one picture.

    Args:
      tokens: ids [1, T] with its word for a picture where the picture stands; pixels: [1, 3, height, width].
      instruction: ids [1, S] of what its Q-Former reads, where it reads anything.
    """
    features = model.vision_model(pixels).last_hidden_state
    said = {} if instruction is None else {"qformer_input_ids": instruction}
    connected = model.get_image_features(pixels, **said).pooler_output
    parts = {"vision features": features, "connector": connected}
    if model.config.use_decoder_only_language_model:
        out = model(pixel_values=pixels, input_ids=tokens, output_hidden_states=True, **said)
        return parts | {"hidden states": out.language_model_outputs.hidden_states[-1], "logits": out.logits}
    read, written = tokens[:, :-WRITTEN], tokens[:, -WRITTEN:]
    before = written.roll(1, 1)
    before[:, 0] = model.config.text_config.decoder_start_token_id
    out = model(pixel_values=pixels, input_ids=read, decoder_input_ids=before, **said)
    return parts | {"logits": out.logits}
