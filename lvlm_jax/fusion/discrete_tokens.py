"""Discrete tokens: a picture's codes stand in the row as ids of the vocabulary, like words (Chameleon)."""

import jax.numpy as jnp

from lvlm_jax.mesh import constrain
from lvlm_jax.shapes import Array, Int


def fill(tokens: Int[Array, "B T"], pictures: Int[Array, "G M"], image_index: Int[Array, "B T"]) -> Int[Array, "B T"]:
    """Puts picture tokens where `image_index` says; arguments as `soft_tokens.fill`'s, ids in place of vectors."""
    groups = pictures.shape[0]
    rows, length = image_index.shape
    index = image_index.reshape(groups, rows // groups * length)
    taken = jnp.take_along_axis(pictures, jnp.maximum(index, 0), axis=1).reshape(rows, length)
    return constrain(jnp.where(image_index >= 0, taken.astype(tokens.dtype), tokens), ("batch", "length"))
