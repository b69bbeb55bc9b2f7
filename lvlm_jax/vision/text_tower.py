"""The text tower that stands beside a vision tower in CLIP and SigLIP."""

import dataclasses
import functools
from typing import Literal

import flax.linen as nn
import jax.numpy as jnp

from lvlm_jax.nn import ranges as R
from lvlm_jax.nn.embed import Embed
from lvlm_jax.nn.linear import linear, named
from lvlm_jax.nn.norms import LayerNorm
from lvlm_jax.nn.stack import make_stack, run_stack
from lvlm_jax.shapes import Array, DTypeLike, Float, Int
from lvlm_jax.vision.blocks import Block


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextTowerConfig:
    """Sizes of a text tower.

    `pool`: "eos" reads the first position that holds `eos_id`; "argmax" the position of the largest id (OpenAI's rule,
    which public configs mark by an eos id of 2); "last" the last position (SigLIP, always padded to `context`).
    """

    vocab: int
    width: int
    depth: int
    heads: int
    mlp_dim: int
    context: int
    activation: str = "quick_gelu"
    norm_eps: float = 1e-5
    causal: bool = True
    pool: Literal["eos", "argmax", "last"] = "argmax"
    eos_id: int = 2
    head: int | None = None


class TextTower(nn.Module):
    """Token and learned position embeddings, encoder blocks, final norm, one pooled vector a row."""

    config: TextTowerConfig
    dtype: DTypeLike = jnp.float32
    scan: bool = False
    remat: str = "none"

    @nn.compact
    def __call__(self, tokens: Int[Array, "B T"]) -> tuple[Float[Array, "B T D"], Float[Array, "B F"]]:
        """(hidden states after the final norm, pooled vector)."""
        c = self.config
        if tokens.shape[1] > c.context:
            raise ValueError(f"{tokens.shape[1]} tokens, but this text tower has {c.context} positions")
        init = named(nn.initializers.normal(0.02), ("positions", "embed"))
        x = Embed(c.vocab, c.width, self.dtype, name="embed")(tokens)
        x = x + self.param("position_embed", init, (c.context, c.width))[: tokens.shape[1]].astype(self.dtype)
        block = functools.partial(
            Block, heads=c.heads, mlp_dim=c.mlp_dim, activation=c.activation, norm_eps=c.norm_eps, dtype=self.dtype
        )
        rows, length = tokens.shape
        ranges = R.causal(rows, length) if c.causal else R.full(rows, length, length)
        stack = make_stack(block, c.depth, self.scan, self.remat, name="layers")
        x, _ = run_stack(stack, c.depth, x, None, ranges)
        x = LayerNorm(c.norm_eps, self.dtype, name="norm")(x)
        if c.pool == "last":
            pooled = x[:, -1]
        else:
            at = jnp.argmax(tokens if c.pool == "argmax" else tokens == c.eos_id, axis=1)
            pooled = jnp.take_along_axis(x, at[:, None, None], axis=1)[:, 0]
        if c.head is not None:
            pooled = linear(c.head, ("embed", None), use_bias=True, dtype=self.dtype, name="head")(pooled)
        return x, pooled
