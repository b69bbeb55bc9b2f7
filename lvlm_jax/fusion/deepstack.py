"""Deepstack: what earlier layers of the tower saw is added to the first layers of the language model.

Each visual position gets, behind decoder layer i, the token that the tower's i-th tapped layer made of its place.
Source: DeepStack (arXiv 2406.04334); Qwen3-VL (arXiv 2511.21631), section 2.
"""

from typing import Any

import jax
import jax.numpy as jnp

from lvlm_jax.nn.stack import Opened
from lvlm_jax.shapes import Array, Float


class Deepstack:
    """What `Decoder` takes as `between`: adds one of `added` behind each of the first layers.

    Args:
      added: what goes behind layer 0, 1 ...: [B, T, D], zero where a position is text.

    Raises:
      ValueError: more of them than the decoder has layers (when it runs).
    """

    def __init__(self, added: tuple[Float[Array, "B T D"], ...]):
        self.added = added

    def before(self, layer: int, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """What goes behind the layer before this one, where something does."""
        return x + self.added[layer - 1].astype(x.dtype) if 0 < layer <= len(self.added) else x

    def weave(self, layers: Opened, depth: int, x: Float[Array, "B T D"]) -> tuple[Float[Array, "B T D"], Any]:
        """The scanned form: the first layers one by one, the others as one scan."""
        rows, first = (layers.params, layers.per_layer), len(self.added)
        if first > depth:
            raise ValueError(f"{first} tapped layers for a decoder of {depth}: each needs a layer to stand behind")
        outs = []
        for i in range(first):
            x, out = layers.layer(x, jax.tree.map(lambda leaf, i=i: leaf[i], rows))
            x = self.before(i + 1, x)
            outs.append(jax.tree.map(lambda leaf: leaf[None], out))
        x, rest = jax.lax.scan(layers.layer, x, jax.tree.map(lambda leaf: leaf[first:], rows))
        return x, jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *outs, rest)
