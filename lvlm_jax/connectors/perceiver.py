"""The Perceiver resampler: any number of visual features to a fixed number of tokens.

Three published variants are values of one module (`FLAMINGO`, `IDEFICS`, `IDEFICS2`). Source: Flamingo
(arXiv 2204.14198), section 3.1.1; OpenFlamingo; Idefics 1 and 2.
"""

import dataclasses
import functools
from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from lvlm_jax.nn import ranges as R
from lvlm_jax.nn.attention import Attention
from lvlm_jax.nn.linear import linear, named
from lvlm_jax.nn.mlp import GatedMlp, Mlp
from lvlm_jax.nn.norms import NORMS
from lvlm_jax.nn.stack import make_stack, run_stack
from lvlm_jax.shapes import Array, DTypeLike, Float

FLAMINGO: dict[str, Any] = {"latents": 64, "depth": 6, "heads": 8, "head_dim": 64}
"""OpenFlamingo's: LayerNorm, GELU feed-forward of four times the width."""

IDEFICS: dict[str, Any] = {**FLAMINGO, "heads": 16, "head_dim": 96, "activation": "relu", "qk_norm": "layer"}
"""Idefics 1: ReLU, and queries and keys normalised."""

IDEFICS2: dict[str, Any] = {
    "latents": 64,
    "depth": 3,
    "heads": 16,
    "kv_heads": 4,
    "head_dim": 96,
    "norm": "rms",
    "norm_eps": 1e-5,
    "gated": True,
    "activation": "silu",
}
"""Idefics 2: RMSNorm, grouped heads, SwiGLU."""


class Block(nn.Module):
    """Latents attend to the features and to themselves, then a feed-forward."""

    heads: int
    kv_heads: int
    head_dim: int
    mlp_dim: int
    activation: str
    gated: bool
    norm: str
    norm_eps: float
    qk_norm: str | None
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self, latents: Float[Array, "N Q D"], _: Any, features: Float[Array, "N P D"]
    ) -> tuple[Float[Array, "N Q D"], None]:
        norm = functools.partial(NORMS[self.norm], self.norm_eps, self.dtype)
        queries = norm(name="norm_latents")(latents)
        context = jnp.concatenate([norm(name="norm_context")(features), queries], axis=1)
        everything = R.full(latents.shape[0], latents.shape[1], context.shape[1])
        attention = Attention(
            self.heads, self.kv_heads, self.head_dim, qk_norm=self.qk_norm, dtype=self.dtype, name="attn"
        )
        latents = latents + attention(queries, everything, context=context)[0]
        if self.gated:
            mlp = GatedMlp(self.mlp_dim, self.activation, dtype=self.dtype, name="mlp")
        else:
            mlp = Mlp(self.mlp_dim, self.activation, use_bias=False, dtype=self.dtype, name="mlp")
        return latents + mlp(norm(name="norm_mlp")(latents)), None


class PerceiverResampler(nn.Module):
    """A few learned latents read a picture's features, layer after layer.

    Example:
      >>> import jax
      >>> from lvlm_jax.connectors import PerceiverResampler
      >>> from lvlm_jax.nn.linear import init
      >>> features = jax.random.normal(jax.random.key(0), (3, 17, 32))  # [N, P, D]
      >>> resampler = PerceiverResampler(latents=8, depth=2, heads=4, head_dim=16)
      >>> params = init(resampler, jax.random.key(1), features)
      >>> resampler.apply({"params": params}, features).shape  # [N, Q, D]
      (3, 8, 32)
    """

    latents: int
    depth: int
    heads: int
    head_dim: int
    kv_heads: int | None = None
    mlp_dim: int | None = None
    activation: str = "gelu"
    gated: bool = False
    norm: str = "layer"
    norm_eps: float = 1e-5
    qk_norm: str | None = None
    dtype: DTypeLike = jnp.float32
    scan: bool = False
    remat: str = "none"

    @nn.compact
    def __call__(self, features: Float[Array, "N P D"]) -> Float[Array, "N Q D"]:
        width = features.shape[-1]
        latents = self.param(
            "latents", named(nn.initializers.normal(1.0), ("positions", "embed")), (self.latents, width)
        )
        block = functools.partial(
            Block,
            heads=self.heads,
            kv_heads=self.kv_heads or self.heads,
            head_dim=self.head_dim,
            mlp_dim=self.mlp_dim or 4 * width,
            activation=self.activation,
            gated=self.gated,
            norm=self.norm,
            norm_eps=self.norm_eps,
            qk_norm=self.qk_norm,
            dtype=self.dtype,
        )
        x = jnp.broadcast_to(latents.astype(self.dtype), (features.shape[0], *latents.shape))
        stack = make_stack(block, self.depth, self.scan, self.remat, name="layers")
        x, _ = run_stack(stack, self.depth, x, None, features.astype(self.dtype))
        return NORMS[self.norm](self.norm_eps, self.dtype, name="norm")(x)


@dataclasses.dataclass(frozen=True, kw_only=True)
class PerceiverConfig:
    """A resampler at the vision tower's width, then one dense layer to the language width.

    project: False leaves the dense layer out, for a fusion whose blocks project for themselves (Flamingo).
    """

    latents: int = 64
    depth: int = 6
    heads: int = 8
    head_dim: int = 64
    kv_heads: int | None = None
    mlp_dim: int | None = None
    activation: str = "gelu"
    gated: bool = False
    norm: str = "layer"
    norm_eps: float = 1e-5
    qk_norm: str | None = None
    project: bool = True

    def tokens(self, features: int) -> int:
        """Visual tokens of a vision row: the latents, however many features there are."""
        return self.latents

    def build(self, width: int, dtype: DTypeLike, scan: bool = False, remat: str = "none") -> nn.Module:
        """The module, with `width` the language model's."""
        return PerceiverProjector(self, width, dtype, scan, remat)


class PerceiverProjector(nn.Module):
    """`PerceiverResampler`, then a dense layer to the language width where the config has one."""

    config: PerceiverConfig
    width: int
    dtype: DTypeLike = jnp.float32
    scan: bool = False
    remat: str = "none"

    @nn.compact
    def __call__(self, x: Float[Array, "N P D"]) -> Float[Array, "N Q F"]:
        sizes = dataclasses.asdict(self.config)
        project = sizes.pop("project")
        resampler = PerceiverResampler(**sizes, dtype=self.dtype, scan=self.scan, remat=self.remat, name="resampler")
        x = resampler(x)
        if not project:
            return x
        return linear(self.width, ("embed", "mlp"), use_bias=True, dtype=self.dtype, name="linear_1")(x)
