"""The encoder block of the transformer towers, and the attention that pools one."""

import functools
from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from lvlm_jax.nn import ranges as R
from lvlm_jax.nn.attention import Attention
from lvlm_jax.nn.linear import named
from lvlm_jax.nn.mlp import GatedMlp, Mlp
from lvlm_jax.nn.norms import NORMS, LayerNorm
from lvlm_jax.nn.positions import ROTATIONS, Turned
from lvlm_jax.shapes import Array, DTypeLike, Float, Int


class Block(nn.Module):
    """Encoder block: attention and feed-forward, each added to what it reads.

    Attributes:
      layer_scale: each value of both branches is weighed by a parameter.
      key_bias: whether keys have a bias, as queries and values do.
      inner_norm: a norm of its own stands before the last product of attention and of a gated feed-forward.
      norm_after: a branch's norm stands behind it instead of before.
      norm: a key of `nn.norms.NORMS`.
      pairs: which values of a head are rotated together, a key of `nn.positions.ROTATIONS`.
      kept: what the block gives is its second output, too, for a tower of which several layers are read.
    """

    heads: int
    mlp_dim: int
    activation: str
    norm_eps: float
    layer_scale: bool = False
    gated: bool = False
    key_bias: bool = True
    inner_norm: bool = False
    norm_after: bool = False
    norm: str = "layer"
    pairs: str = "interleaved"
    kept: bool = False
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B T D"],
        which: Any,
        ranges: R.Ranges | tuple[R.Ranges, ...],
        turns: tuple[Turned, Turned] | None = None,
    ) -> tuple[Float[Array, "B T D"], Float[Array, "B T D"] | None]:
        """The block's output, and once more where it is `kept`.

        Args:
          which: the number of its ranges, where there are several.
          turns: (cos, sin) of each position, by which queries and keys are rotated.
        """
        inner = self.norm_eps if self.inner_norm else None
        ranges = ranges if isinstance(ranges, R.Ranges) else R.choose(ranges, which)
        rotate = None if turns is None else functools.partial(ROTATIONS[self.pairs], cos=turns[0], sin=turns[1])
        attention = functools.partial(Attention, qkv_bias=True, out_bias=True, dtype=self.dtype, name="attn")
        attention = attention(
            self.heads, self.heads, x.shape[-1] // self.heads, key_bias=self.key_bias, inner_norm=inner
        )
        if self.gated:
            mlp = GatedMlp(self.mlp_dim, self.activation, use_bias=True, inner_norm=inner, dtype=self.dtype, name="mlp")
        else:
            mlp = Mlp(self.mlp_dim, self.activation, dtype=self.dtype, name="mlp")
        x = x + self._branch("1", lambda y: attention(y, ranges, rotate=rotate)[0], x)
        x = x + self._branch("2", mlp, x)
        return x, x if self.kept else None

    def _branch(self, number: str, run: Any, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        norm = NORMS[self.norm](self.norm_eps, self.dtype, name=f"norm{number}")
        y = norm(run(x)) if self.norm_after else run(norm(x))
        if not self.layer_scale:
            return y
        scale = self.param(f"scale{number}", named(nn.initializers.ones, ("embed",)), (x.shape[-1],))
        return y * scale.astype(self.dtype)


class MapHead(nn.Module):
    """Attention pooling with one learned probe, as SigLIP pools (arXiv 2303.15343)."""

    heads: int
    mlp_dim: int
    activation: str
    norm_eps: float
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "N P D"], segments: Int[Array, "N P"]) -> Float[Array, "N D"]:
        """One vector a row; padding (segment 0) is not read."""
        width = x.shape[-1]
        probe = self.param("probe", named(nn.initializers.xavier_uniform(), (None, "embed")), (1, width))
        q = jnp.broadcast_to(probe.astype(self.dtype), (x.shape[0], 1, width))
        attention = Attention(
            self.heads, self.heads, width // self.heads, qkv_bias=True, out_bias=True, dtype=self.dtype, name="attn"
        )
        pooled = attention(q, R.shown(segments), context=x)[0]
        normed = LayerNorm(self.norm_eps, self.dtype, name="norm")(pooled)
        return (pooled + Mlp(self.mlp_dim, self.activation, dtype=self.dtype, name="mlp")(normed))[:, 0]
