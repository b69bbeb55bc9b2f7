"""The key/value cache as a value: static shapes, heads before positions."""

import dataclasses

import jax
import jax.numpy as jnp

from lvlm_jax.shapes import Array, DTypeLike, Float, Int, pytree


@pytree
@dataclasses.dataclass(frozen=True)
class LayerCache:
    """Keys and values of one layer (a scanned stack holds them with a leading axis L)."""

    k: Float[Array, "*L B K S E"]
    v: Float[Array, "*L B K S E"]

    def write(self, k: Float[Array, "B K T E"], v: Float[Array, "B K T E"], index: Int[Array, ""]) -> "LayerCache":
        """The cache with new keys and values at positions index ... index+T-1 of every row."""
        at = (0, 0, index, 0)
        return LayerCache(
            jax.lax.dynamic_update_slice(self.k, k.astype(self.k.dtype), at),
            jax.lax.dynamic_update_slice(self.v, v.astype(self.v.dtype), at),
        )


def empty_cache(
    depth: int, batch: int, kv_heads: int, length: int, head_dim: int, dtype: DTypeLike, scan: bool
) -> tuple[LayerCache, ...] | LayerCache:
    """Zeros for a whole stack: a tuple of layers, or one value with a leading axis L when the stack is scanned."""
    shape = (batch, kv_heads, length, head_dim)
    if scan:
        return LayerCache(jnp.zeros((depth, *shape), dtype), jnp.zeros((depth, *shape), dtype))
    return tuple(LayerCache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype)) for _ in range(depth))
