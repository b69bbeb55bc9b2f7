"""Token embeddings, tied or not."""

import flax.linen as nn
import jax.numpy as jnp

from lvlm_jax.nn.linear import named
from lvlm_jax.shapes import Array, DTypeLike, Float, Int


class Embed(nn.Module):
    """A table of token vectors. Ids are checked on the host: a gather clamps ids that are out of range."""

    vocab: int
    width: int
    dtype: DTypeLike = jnp.float32

    def setup(self) -> None:
        """One parameter, read by the lookup and by a tied head."""
        init = named(nn.initializers.normal(0.02), ("vocab", "embed"))
        self.table = self.param("table", init, (self.vocab, self.width))

    def __call__(self, tokens: Int[Array, "*B"]) -> Float[Array, "*B D"]:
        """Rows of the table."""
        return jnp.take(self.table, tokens, axis=0, mode="clip").astype(self.dtype)

    def kernel(self) -> Float[Array, "D V"]:
        """The table as the kernel [D, V] of a tied head."""
        return self.table.T
