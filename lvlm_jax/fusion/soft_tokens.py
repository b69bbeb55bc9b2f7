"""Soft tokens: projected picture features stand among the text embeddings, as LLaVA and PaliGemma place them."""

import flax.linen as nn
import jax.numpy as jnp

from lvlm_jax.mesh import constrain
from lvlm_jax.nn.linear import named
from lvlm_jax.shapes import Array, Bool, DTypeLike, Float, Int


class Newline(nn.Module):
    """The learned token that ends each row of a tiled picture (LLaVA-NeXT)."""

    width: int
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self) -> Float[Array, "D"]:
        init = named(nn.initializers.normal(self.width**-0.5), ("embed",))
        return self.param("token", init, (self.width,)).astype(self.dtype)


def append(visual: Float[Array, "G M D"], token: Float[Array, "D"]) -> Float[Array, "G N D"]:
    """One more visual token at the end of each group's, the same in all: what index M reads."""
    last = jnp.broadcast_to(token.astype(visual.dtype), (visual.shape[0], 1, visual.shape[2]))
    return jnp.concatenate([visual, last], axis=1)


def fill(
    text: Float[Array, "B T D"],
    visual: Float[Array, "G M D"],
    image_index: Int[Array, "B T"],
    blend_index: Int[Array, "B T 4"] | None = None,
    blend_weight: Float[Array, "B T 4"] | None = None,
) -> Float[Array, "B T D"]:
    """Puts visual tokens where `image_index` says.

    Args:
      text: embeddings of the tokens; what stands at a picture's positions is replaced.
      visual: the M = N*Q visual tokens of each group, projected to the language width, and perhaps a newline.
      image_index: which of its group's visual tokens fills a position; -1 keeps the text. Rows b*B/G ... of a group
        read that group only, so that the gather never leaves a data shard.
      blend_index, blend_weight: where given, a position is the sum of so many of these visual tokens instead.
    """
    groups, _, width = visual.shape
    rows, length = image_index.shape

    def taken(index: Int[Array, "B T"]) -> Float[Array, "B T D"]:
        index = jnp.maximum(index, 0).reshape(groups, rows // groups * length)
        return jnp.take_along_axis(visual, index[..., None], axis=1).reshape(rows, length, width)

    if blend_index is None:
        found = taken(image_index)
    else:
        parts = zip(jnp.moveaxis(blend_index, -1, 0), jnp.moveaxis(blend_weight, -1, 0))
        found = sum(taken(index).astype(jnp.float32) * weight[..., None] for index, weight in parts)
    filled = jnp.where((image_index >= 0)[..., None], found.astype(text.dtype), text)
    return constrain(filled, ("batch", "length", None))


def prefix_of(segments: Int[Array, "B T"], weights: Float[Array, "B T"]) -> Bool[Array, "B T"]:
    """The prefix of each packed example: all before its first target (all of it where there is none)."""
    targets = jnp.cumsum(weights > 0, axis=1)
    new = jnp.pad(segments[:, 1:] != segments[:, :-1], ((0, 0), (1, 0)), constant_values=True)
    before = jnp.where(new, targets - (weights > 0), 0)
    return targets == jnp.maximum.accumulate(before, axis=1)
