"""Words beside a language model's own, in matrices of their own: what is new trains, the old table stays as it is.

Source: Idefics (arXiv 2306.16527), whose checkpoints keep them apart.
"""

import flax.linen as nn
import jax.numpy as jnp

from lvlm_jax.nn.linear import named
from lvlm_jax.shapes import Array, DTypeLike, Float, Int


class Words(nn.Module):
    """Embeddings and head of the words beyond a vocabulary, numbered from 0; a tied head is the table."""

    count: int
    width: int
    tied: bool
    dtype: DTypeLike = jnp.float32

    def setup(self) -> None:
        """Few rows: they are whole on every device."""
        self.table = self.param("table", named(nn.initializers.normal(0.02), (None, "embed")), (self.count, self.width))
        if not self.tied:
            init = named(nn.initializers.lecun_normal(), ("embed", None))
            self.kernel = self.param("kernel", init, (self.width, self.count))

    def embed(self, x: Float[Array, "B T D"], words: Int[Array, "B T"]) -> Float[Array, "B T D"]:
        """The embeddings `x`, with these words' own where `words` is not below 0."""
        own = jnp.take(self.table, jnp.maximum(words, 0), axis=0, mode="clip").astype(self.dtype)
        return jnp.where((words >= 0)[..., None], own, x)

    def head_kernel(self) -> Float[Array, "D V"]:
        """The kernel of these words' part of the head."""
        return self.table.T if self.tied else self.kernel

    def logits(self, hidden: Float[Array, "*B D"]) -> Float[Array, "*B V"]:
        """Hidden states -> float32 scores of these words."""
        kernel = self.head_kernel().astype(hidden.dtype)
        return jnp.einsum("...D,DV->...V", hidden, kernel, preferred_element_type=jnp.float32)
