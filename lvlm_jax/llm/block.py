"""One layer of a decoder, and what a kind of layer sees."""

import dataclasses
import functools
from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp

from lvlm_jax.nn.attention import Attention
from lvlm_jax.nn.cache import LayerCache
from lvlm_jax.nn.mlp import GatedMlp, Mlp
from lvlm_jax.nn.norms import NORMS
from lvlm_jax.nn.positions import ROTATIONS
from lvlm_jax.nn.ranges import Ranges
from lvlm_jax.shapes import Array, DTypeLike, Float, Int, pytree


@pytree
@dataclasses.dataclass(frozen=True)
class View:
    """What a kind of layer sees: the keys of each query, and (cos, sin) of each position where it rotates."""

    ranges: Ranges
    rope: tuple[Array, Array] | None


Which = int | Int[Array, ""]


def choose(views: Sequence[View], which: Which) -> View:
    """The view of one kind: by its number where layers run one by one, by selection where they are traced as one."""
    if len(views) == 1:
        return views[0]
    if isinstance(which, int):
        return views[which]
    same = [View(view.ranges.general(), view.rope) for view in views]
    return jax.tree.map(lambda *leaves: jax.lax.select_n(which, *leaves), *same)


class Block(nn.Module):
    """Decoder block: attention and a feed-forward, with norms and sums in one of these orders.

    pre: x + attn(norm1(x)), then the same with the feed-forward and norm2; with `post_norms`, each branch is normed
    again before it is added. post: norm1(x + attn(x)), then the same (the first transformer; OPT-350m). parallel:
    x + attn(norm1(x)) + mlp(norm2(x)) (GPT-NeoX). parallel_shared: the same from one norm (PaLM). normed: with
    y = norm1(x), `residual_scale` y + attn(y), then the same with norm2 (ChatGLM-6B). swin: x + norm1(attn(x)), then
    the same (Swin V2, arXiv 2111.09883; Chameleon 34B).
    """

    heads: int
    kv_heads: int
    head_dim: int
    mlp_dim: int
    norm_eps: float
    qkv_bias: bool = False
    out_bias: bool = False
    mlp: str = "gated"
    mlp_bias: bool = False
    activation: str = "silu"
    norm: str = "rms"
    order: str = "pre"
    residual_scale: float = 1.0
    qk_norm: bool | str = False
    post_norms: bool = False
    query_scalar: int | None = None
    attn_softcap: float | None = None
    clip_qkv: float | None = None
    rotary_pairs: str = "half"
    positions: str = "rotary"
    alibi_max: float = 8.0
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B T D"],
        layer: tuple[LayerCache | None, Which],
        views: tuple[View, ...],
        index: Int[Array, ""] | None,
    ) -> tuple[Float[Array, "B T D"], LayerCache | None]:
        cache, which = layer
        view = choose(views, which)
        norm = functools.partial(NORMS[self.norm], self.norm_eps, self.dtype)
        after = norm if self.post_norms else lambda name: lambda branch: branch
        mlp = (GatedMlp if self.mlp == "gated" else Mlp)(
            self.mlp_dim, self.activation, use_bias=self.mlp_bias, dtype=self.dtype, name="mlp"
        )
        rotate = None if view.rope is None else lambda heads: ROTATIONS[self.rotary_pairs](heads, *view.rope)
        seen = x if self.order in ("post", "swin") else norm(name="norm1")(x)
        out, cache = self.attention()(seen, view.ranges, rotate=rotate, cache=cache, index=index)
        if self.order == "parallel":
            return x + out + mlp(norm(name="norm2")(x)), cache
        if self.order == "parallel_shared":
            return x + out + mlp(seen), cache
        if self.order == "post":
            x = norm(name="norm1")(x + out)
            return norm(name="norm2")(x + mlp(x)), cache
        if self.order == "normed":
            seen = norm(name="norm2")(self.residual_scale * seen + out)
            return self.residual_scale * seen + mlp(seen), cache
        if self.order == "swin":
            x = x + norm(name="norm1")(out)
            return x + norm(name="norm2")(mlp(x)), cache
        x = x + after(name="post_norm1")(out)
        return x + after(name="post_norm2")(mlp(norm(name="norm2")(x))), cache

    def attention(self) -> Attention:
        """The attention layer, ``attn``."""
        return Attention(
            self.heads,
            self.kv_heads,
            self.head_dim,
            qkv_bias=self.qkv_bias,
            out_bias=self.out_bias,
            qk_norm=self.norm if self.qk_norm in (True, "whole") else self.qk_norm or None,
            qk_norm_eps=self.norm_eps,
            qk_norm_whole=self.qk_norm == "whole",
            scale=None if self.query_scalar is None else self.query_scalar**-0.5,
            softcap=self.attn_softcap,
            clip=self.clip_qkv,
            alibi=self.alibi_max if self.positions == "alibi" else None,
            relative=self.positions == "relative",
            dtype=self.dtype,
            name="attn",
        )
